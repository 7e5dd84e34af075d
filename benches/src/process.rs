//! What the kernel tells of a process: processor time, and how it holds its files.

use std::path::Path;

use anyhow::{Context, Result};
use nix::unistd::{SysconfVar, sysconf};

/// Seconds of processor time that a process has used, in user and kernel mode, all threads (proc(5), `stat`).
///
/// # Errors
/// When the process is gone.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .with_context(|| format!("process {pid} is gone: look into the server's log"))?;
    let ticks = sysconf(SysconfVar::CLK_TCK)?.context("the system does not tell its clock ticks")?;
    let used = cpu_ticks(&stat).with_context(|| format!("/proc/{pid}/stat is not understood: {stat}"))?;
    Ok(used as f64 / ticks as f64)
}

/// `utime` and `stime`: fields 14 and 15, counted behind the name, which may hold spaces and parentheses.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let (user, kernel): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + kernel)
}

/// Whether a process holds a file open past the page cache (O_DIRECT); `None` when it does not hold it open.
pub fn opens_directly(pid: u32, file: &Path) -> Option<bool> {
    let mut found = None;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten() {
        if std::fs::read_link(entry.path()).is_ok_and(|target| target == file) {
            let info = format!("/proc/{pid}/fdinfo/{}", entry.file_name().to_string_lossy());
            let direct = std::fs::read_to_string(info).ok().as_deref().is_some_and(is_direct);
            found = Some(found.unwrap_or(false) || direct);
        }
    }
    found
}

fn is_direct(fdinfo: &str) -> bool {
    let flags = fdinfo.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|octal| i32::from_str_radix(octal.trim(), 8).ok());
    flags.is_some_and(|flags| flags & libc::O_DIRECT != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_found_behind_a_hostile_name() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 0 10 0 0 0 250 50 0 0 20 0 5 0 100 0 0";
        assert_eq!(cpu_ticks(stat), Some(300));
        assert_eq!(cpu_ticks("nonsense"), None);
    }

    #[test]
    fn this_process_uses_processor_time() {
        assert!(cpu_seconds(std::process::id()).unwrap() >= 0.0);
    }

    #[test]
    fn direct_files_are_told_from_others() {
        let flags = |bits: i32| format!("pos:\t0\nflags:\t0{bits:o}\nmnt_id:\t29\n");
        assert!(is_direct(&flags(libc::O_DIRECT | libc::O_RDWR)));
        assert!(!is_direct(&flags(libc::O_RDWR)));
        assert!(!is_direct(""));
    }
}
