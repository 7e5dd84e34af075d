//! The built-in test guest (`--guest selftest`): shows that memory, registers and disks are carried over exactly when a machine
//! moves.
//!
//! The guest is a program of its own in `shim/guest`, built by the build script and embedded. It writes every page of its working
//! set lap after lap and verifies on each visit what the lap before left there; it writes blocks of up to four virtio disks,
//! reads them back and verifies them; and it keeps values in floating-point registers. What it finds goes into a report in guest
//! memory. Everything it needs is in guest memory and registers, so that whoever runs the machine can read the report
//! and command it.
//!
//! ```text
//! let options: SelftestOptions = "selftest,rate=100M,pattern=random".parse()?;
//! let starts = load(&ram, &options, vcpus, &disks, tsc_khz)?;   // once, on memory that is all zeroes
//! // for each processor: starts[i].apply(&mut sregs), set_sregs, set_regs(&starts[i].regs), mp_state = RUNNABLE
//! // at an exit for REPORT_PORT, or at any time:
//! let report = report(&ram)?;
//! let number = send_command(&ram, Command::Verify)?;   // report.answered(number) is true when it is done
//! ```

mod load;
mod options;
mod report;
mod verify;

// Both sides compile these files; some of what is in them is for one side only.
#[allow(dead_code)]
#[path = "../../guest/layout.rs"]
mod layout;
#[allow(dead_code)]
#[path = "../../guest/pattern.rs"]
mod pattern;

pub use layout::{DISKS_MAX, REPORT_PORT, VCPUS_MAX};
pub use load::{VcpuStart, load};
pub use options::{DiskOptions, Fill, Pattern, SelftestOptions};
pub use report::{
    Command, DiskError, DiskErrorKind, DiskReport, Mismatch, MismatchKind, Report, Ring, RingReason, State,
    VcpuReport, report, send_command, set_rate,
};
pub use verify::{Summary, verify_from_outside};

use vm_memory::ByteValued;

// SAFETY: integers in C's layout without gaps (every field is aligned by those before it), for which all bytes are valid.
unsafe impl ByteValued for layout::Parameters {}
// SAFETY: as above.
unsafe impl ByteValued for layout::Control {}
// SAFETY: as above.
unsafe impl ByteValued for layout::Header {}
// SAFETY: as above.
unsafe impl ByteValued for layout::Mismatch {}
// SAFETY: as above.
unsafe impl ByteValued for layout::VcpuRecord {}
// SAFETY: as above.
unsafe impl ByteValued for layout::DiskError {}
// SAFETY: as above.
unsafe impl ByteValued for layout::DiskRecord {}
