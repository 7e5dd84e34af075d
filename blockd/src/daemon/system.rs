//! What the daemon needs of the operating system before it can begin, and what it tells systemd.

use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::error::{DaemonError, Kind};

/// Raises the limit of open files as far as it goes: a disk takes some dozens, and the usual limit of 1024 is for
/// programs that use `select`.
pub(super) fn raise_open_files_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard { setrlimit(Resource::RLIMIT_NOFILE, hard, hard) } else { Ok(()) }
    });
    if let Err(e) = raised {
        tracing::warn!(error = %e, "the limit of open files can't be raised; many disks may not find room");
    }
}

/// Finds out whether io_uring may be used, rather than letting each disk stumble over it.
///
/// # Errors
/// [`Kind::Unsupported`] with what stands in the way and how to change it.
pub(super) fn check_io_uring() -> Result<(), DaemonError> {
    match io_uring::IoUring::new(2) {
        Ok(_) => Ok(()),
        Err(e) => Err(explain(&e, io_uring_disabled().as_deref())),
    }
}

fn explain(e: &io::Error, disabled: Option<&str>) -> DaemonError {
    let why = match (e.raw_os_error(), disabled) {
        (Some(libc::ENOSYS), _) => {
            "this kernel has no io_uring, or a seccomp filter hides it; blockd needs Linux 6.1 or later and a filter that allows io_uring_setup, io_uring_enter and io_uring_register".to_owned()
        }
        (Some(libc::EPERM | libc::EACCES), Some(value @ ("1" | "2"))) => format!(
            "kernel.io_uring_disabled is {value}; set it to 0 (`sysctl kernel.io_uring_disabled=0`), or to 1 and start blockd in the group that kernel.io_uring_group names"
        ),
        (Some(libc::EPERM | libc::EACCES), _) => {
            "a seccomp filter or security module forbids it, as the default profiles of container engines do; allow io_uring_setup, io_uring_enter and io_uring_register".to_owned()
        }
        (Some(libc::ENOMEM), _) => "the limit of locked memory (RLIMIT_MEMLOCK) is too low; raise it".to_owned(),
        _ => "see what the kernel says".to_owned(),
    };
    DaemonError::new(Kind::Unsupported, format!("io_uring can't be used ({e}): {why}"))
}

fn io_uring_disabled() -> Option<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok()?;
    Some(text.trim().to_owned())
}

/// Tells systemd, if it has started us, that requests are answered from now on.
pub(super) fn tell_ready() {
    tell(&[sd_notify::NotifyState::Ready]);
}

/// Tells systemd that the end has begun.
pub(super) fn tell_stopping() {
    tell(&[sd_notify::NotifyState::Stopping]);
}

fn tell(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(false, states) {
        tracing::warn!(error = %e, "systemd can't be told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forbidden_io_uring_is_explained_by_what_forbids_it() {
        let says = |errno, disabled| explain(&io::Error::from_raw_os_error(errno), disabled).message;
        assert!(says(libc::EPERM, Some("2")).contains("sysctl kernel.io_uring_disabled=0"));
        assert!(says(libc::EPERM, Some("0")).contains("seccomp"));
        assert!(says(libc::EPERM, None).contains("seccomp"));
        assert!(says(libc::ENOSYS, None).contains("kernel"));
        assert!(says(libc::ENOMEM, None).contains("RLIMIT_MEMLOCK"));
    }
}
