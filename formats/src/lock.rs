//! Locks that keep a second opener off an image.
//!
//! Open-file-description locks on the whole file: they end with the last descriptor of the opening, whatever else the
//! process opens or closes, and QEMU's tools, which lock bytes of their own in the same way, respect them. They are
//! advisory, and reach across hosts only as far as the file system takes them there.

use std::fs::File;
use std::io;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// What else may be done with the file while it is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lock {
    /// Others may read.
    Shared,
    /// Nobody else may open it with a lock.
    Exclusive,
}

/// Why a file could not be locked.
#[derive(Debug)]
pub(crate) enum LockError {
    /// Somebody else holds a lock that does not go with this one.
    Held,
    /// The system refused.
    Io(io::Error),
}

/// How often and how long a lock is tried for that somebody may be about to let go of. A process that has closed an image
/// while another of its threads was starting a program holds the lock until that program runs.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(10);

/// Locks the whole file. Waits for a fifth of a second at most.
pub(crate) fn lock(file: &File, kind: Lock) -> Result<(), LockError> {
    for _ in 0..TRIES {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&whole_file(kind))) {
            Ok(_) => return Ok(()),
            Err(Errno::EAGAIN | Errno::EACCES) => std::thread::sleep(PAUSE),
            Err(e) => return Err(LockError::Io(e.into())),
        }
    }
    Err(LockError::Held)
}

/// Lets go of the lock.
pub(crate) fn unlock(file: &File) -> io::Result<()> {
    let none = libc::flock { l_type: libc::F_UNLCK as libc::c_short, ..whole_file(Lock::Shared) };
    fcntl(file, FcntlArg::F_OFD_SETLK(&none)).map(drop).map_err(Into::into)
}

/// Whether somebody else holds an exclusive lock. Takes none, so nobody is kept off by the question.
pub(crate) fn is_held_exclusively(file: &File) -> bool {
    let mut answer = whole_file(Lock::Shared);
    let asked = fcntl(file, FcntlArg::F_OFD_GETLK(&mut answer));
    asked.is_ok() && answer.l_type != libc::F_UNLCK as libc::c_short
}

fn whole_file(kind: Lock) -> libc::flock {
    libc::flock {
        l_type: match kind {
            Lock::Shared => libc::F_RDLCK as libc::c_short,
            Lock::Exclusive => libc::F_WRLCK as libc::c_short,
        },
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}
