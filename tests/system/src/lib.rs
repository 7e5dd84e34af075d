//! What the tests of the whole daemon stand on: a daemon to start and kill, a vhost-user front end with its own ring
//! driver, a load that knows what every sector must hold, and a real Linux guest in QEMU.
//!
//! ```text
//!   Daemon (blockd, killed and restarted)   ◄── http ──┐
//!     ▲ vhost-user socket                              │
//!   FrontEnd ── Ring ── GuestMemory (memfd)            tests/*.rs
//!     ▲                                                │
//!   VerifiedLoad (model of every sector)    ◄──────────┘
//! ```
//!
//! `cargo build -p blockd` (with the same profile) comes before `cargo test -p system-tests`. Tests that miss something
//! they need print a line that begins with `SKIPPED:` and say what.
//!
//! | variable | meaning |
//! |---|---|
//! | `BLOCKD_BIN` | the daemon's binary; else `blockd` beside the test's own executable |
//! | `BLOCKCTL_BIN` | the command-line tool; else the one beside the test's own executable |
//! | `KVM_SHIM` | the binary of `kvm-shim`; else the one beside the test's own executable |
//! | `BLOCKD_GUEST_DIR` | where `.ci/guest-setup` put QEMU and the kernel; else `blockd-guest` in the cache folder |
//! | `BLOCKD_TEST_SEED` | added to the seed of every random choice, for soaking: each number is another run |
//! | `BLOCKD_TEST_FORMATS` | only these formats, as in `raw,vhd` |
//! | `BLOCKD_TEST_BACKEND` | `qemu`: the tests are tried on qemu-storage-daemon, as far as it knows what they ask for |

pub mod daemon;
pub mod front;
pub mod guest;
pub mod histogram;
pub mod http;
pub mod load;
pub mod machine;
pub mod memory;
pub mod model;
pub mod ring;
pub mod running;
pub mod wire;

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout};

pub use daemon::{Daemon, DiskSpec, Image};
pub use front::{Base, FrontEnd, Options};
pub use load::{LoadOptions, Mix, VerifiedLoad};
pub use memory::{DirtyLog, GuestMemory};
pub use ring::{Request, Ring};
pub use running::RunningLoad;

/// How long a test waits for what has to come: more than a busy machine takes. Nothing is asked of how fast it comes.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The seed of a test's random choices: its own number, changed by `$BLOCKD_TEST_SEED`.
pub fn seed(own: u64) -> u64 {
    let more = std::env::var("BLOCKD_TEST_SEED").ok().and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    own.wrapping_add(more.wrapping_mul(1000))
}

/// Waits until `fd` can be read, at most `timeout`.
pub fn readable_within(fd: BorrowedFd<'_>, timeout: Duration) -> bool {
    let timeout = PollTimeout::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX);
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    matches!(nix::poll::poll(&mut fds, timeout), Ok(n) if n > 0)
}

/// Whether the other end of a socket is gone.
pub fn hung_up(fd: BorrowedFd<'_>) -> bool {
    assert!(fd.as_raw_fd() >= 0);
    let mut fds = [PollFd::new(fd, PollFlags::empty())];
    if nix::poll::poll(&mut fds, PollTimeout::ZERO).is_err() {
        return true;
    }
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
    fds[0].revents().is_some_and(|events| events.intersects(gone))
}
