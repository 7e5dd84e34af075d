//! What the kernel tells of a process: processor time, and how it holds its files.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use nix::time::clock_getcpuclockid;
use nix::unistd::{Pid, SysconfVar, sysconf};

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

/// As [`cpu_seconds`], to the nanosecond instead of the clock tick: the process's own clock, threads that have ended included.
///
/// # Errors
/// When the process is gone.
pub fn cpu_clock(pid: u32) -> Result<Duration> {
    let gone = || format!("process {pid} is gone: look into the server's log");
    let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(pid)?)).with_context(gone)?;
    Ok(clock.now().with_context(gone)?.into())
}

/// Seconds of processor time of all children of this process that have ended and were waited for.
///
/// # Errors
/// What the system says.
pub fn cpu_of_children() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let seconds = |time: TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// Bytes of memory that a process has in use, shared ones included (proc(5), `VmRSS`).
///
/// # Errors
/// When the process is gone.
pub fn resident_bytes(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))
        .with_context(|| format!("process {pid} is gone: look into the server's log"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    Ok(kib.with_context(|| format!("/proc/{pid}/status tells no VmRSS"))? << 10)
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
        let pid = std::process::id();
        assert!(cpu_seconds(pid).unwrap() >= 0.0);
        let before = cpu_clock(pid).unwrap();
        let spin = std::time::Instant::now();
        while spin.elapsed() < Duration::from_millis(2) {}
        assert!(cpu_clock(pid).unwrap() > before);
        assert!(resident_bytes(pid).unwrap() > 4096);
    }

    #[test]
    fn direct_files_are_told_from_others() {
        let flags = |bits: i32| format!("pos:\t0\nflags:\t0{bits:o}\nmnt_id:\t29\n");
        assert!(is_direct(&flags(libc::O_DIRECT | libc::O_RDWR)));
        assert!(!is_direct(&flags(libc::O_RDWR)));
        assert!(!is_direct(""));
    }
}
