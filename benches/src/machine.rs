//! On what was measured: figures of one machine say nothing about another.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::size::{GIB, show_size};

/// More than this share of the processors in others' use makes figures doubtful.
const BUSY_MAX: f64 = 0.1;

/// The machine and the versions.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Model of the processor.
    pub processor: String,
    /// Processors that this program may use.
    pub cores: usize,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// The kernel's release.
    pub kernel: String,
    /// Type of the file system that held the images.
    pub file_system: String,
    /// Device of that file system.
    pub device: String,
    /// Share of the processors' time that others used in the second before the run, 0 to 1.
    pub busy: f64,
    /// What `blockd --version` says.
    pub blockd: String,
    /// What `qemu-storage-daemon --version` says, when it is there.
    pub rival: Option<String>,
    /// What `fio --version` says, when it is there.
    pub fio: Option<String>,
}

impl Machine {
    /// Looks around; images will be in `dir`.
    ///
    /// # Errors
    /// When blockd is not found or `/proc` can't be read.
    pub fn look(dir: &Path) -> Result<Self> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
        let dir =
            dir.canonicalize().with_context(|| format!("{}: give a folder that exists", dir.display()))?;
        let (file_system, device) = mount_of(&mounts, &dir).unwrap_or(("unknown".into(), "unknown".into()));
        Ok(Self {
            processor: field(&cpuinfo, "model name").unwrap_or("unknown").into(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: field(&meminfo, "MemTotal").and_then(kib).unwrap_or(0),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().into(),
            file_system,
            device,
            busy: busy_share()?,
            blockd: version(&system_tests::daemon::binary("blockd", "BLOCKD_BIN")?).context(
                "blockd does not run: build it (cargo build --release -p blockd) or set BLOCKD_BIN",
            )?,
            rival: version(Path::new("qemu-storage-daemon")).ok(),
            fio: version(Path::new("fio")).ok(),
        })
    }

    /// No machine at all.
    #[cfg(test)]
    pub fn unknown() -> Self {
        Self {
            processor: String::new(),
            cores: 1,
            memory_bytes: 0,
            kernel: String::new(),
            file_system: String::new(),
            device: String::new(),
            busy: 0.0,
            blockd: String::new(),
            rival: None,
            fio: None,
        }
    }

    /// A warning when others use the machine, which makes figures worthless.
    pub fn warning(&self) -> Option<String> {
        (self.busy > BUSY_MAX).then(|| {
            format!(
                "Others used {:.0} % of the processors before the run: these figures are worth little, wait until the \
                 machine is idle.",
                self.busy * 100.0
            )
        })
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "* Machine: {}, {} cores, {:.0} GiB",
            self.processor,
            self.cores,
            gib(self.memory_bytes)
        )?;
        writeln!(f, "* Kernel {}, {} on {}", self.kernel, self.file_system, self.device)?;
        writeln!(f, "* {}", self.blockd)?;
        writeln!(f, "* {}", self.fio.as_deref().unwrap_or("no fio on the PATH"))?;
        writeln!(f, "* {}", self.rival.as_deref().unwrap_or("no qemu-storage-daemon on the PATH"))?;
        match self.warning() {
            Some(warning) => writeln!(f, "* **{warning}**"),
            None => writeln!(f, "* Others used {:.0} % of the processors before the run", self.busy * 100.0),
        }
    }
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / GIB as f64
}

/// Whether a program answers to `--version`.
pub fn is_there(program: &str) -> bool {
    version(Path::new(program)).is_ok()
}

/// The last word of what a program answers to `--version`; `?` when there is none.
pub fn version_of(program: &str) -> String {
    let said = version(Path::new(program)).unwrap_or_default();
    said.split_whitespace().last().map_or("?", |word| word.trim_start_matches(&format!("{program}-"))).into()
}

fn version(program: &Path) -> Result<String> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .with_context(|| format!("{} is not there", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.lines().next().context("it says no version")?.trim().to_owned())
}

/// The share of the processors' time that is used while this program sleeps for a second.
fn busy_share() -> Result<f64> {
    let times = || -> Result<(u64, u64)> {
        let stat = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        processor_times(&stat).context("/proc/stat is not understood")
    };
    let (idle, all) = times()?;
    std::thread::sleep(Duration::from_secs(1));
    let (idle_then, all_then) = times()?;
    let passed = all_then.saturating_sub(all).max(1);
    Ok(1.0 - (idle_then.saturating_sub(idle) as f64 / passed as f64).min(1.0))
}

/// Ticks that all processors together were idle (waiting for devices included), and all ticks (proc(5), `stat`).
fn processor_times(stat: &str) -> Option<(u64, u64)> {
    let ticks = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = ticks.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    // Guests' ticks, from the ninth on, are counted in the first two already.
    Some((ticks.get(3)? + ticks.get(4)?, ticks.iter().take(8).sum()))
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

fn kib(text: &str) -> Option<u64> {
    Some(text.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// Type and device of the file system that a path lies on: the last mount of the longest prefix (proc(5), `mountinfo`).
fn mount_of(mountinfo: &str, path: &Path) -> Option<(String, String)> {
    let mut best: Option<(usize, String, String)> = None;
    for line in mountinfo.lines() {
        let (before, after) = line.split_once(" - ")?;
        let point = before.split_whitespace().nth(4)?.replace("\\040", " ");
        let mut after = after.split_whitespace();
        let (kind, device) = (after.next()?, after.next()?);
        let depth = Path::new(&point).components().count();
        if path.starts_with(&point) && best.as_ref().is_none_or(|(most, ..)| depth >= *most) {
            best = Some((depth, kind.into(), device.into()));
        }
    }
    best.map(|(_, kind, device)| (kind, device))
}

/// Bytes of memory that programs can have without others being pushed out (proc(5), `MemAvailable`).
///
/// # Errors
/// When the system does not tell.
pub fn available_memory() -> Result<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    field(&meminfo, "MemAvailable").and_then(kib).context("/proc/meminfo tells no MemAvailable")
}

/// Fails unless `dir` has room for this many bytes.
///
/// # Errors
/// How much is missing and what to do.
pub fn need_room(dir: &Path, bytes: u64) -> Result<()> {
    let stat =
        nix::sys::statvfs::statvfs(dir).with_context(|| format!("ask for the room in {}", dir.display()))?;
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    anyhow::ensure!(
        free >= bytes,
        "{} has {} free, and this needs {}: give another folder with --dir, or a smaller --size",
        dir.display(),
        show_size(free),
        show_size(bytes)
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_lies_on_the_innermost_mount() {
        let mounts = "1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 0:5 / /tmp rw shared:1 - tmpfs tmpfs rw\n\
                      3 1 8:2 / /tmpx rw - xfs /dev/b rw\n";
        let on = |path: &str| mount_of(mounts, Path::new(path)).unwrap().0;
        assert_eq!([on("/tmp/x"), on("/tmpx"), on("/home")], ["tmpfs", "xfs", "ext4"]);
    }

    #[test]
    fn idle_time_includes_waiting_for_devices_and_guests_are_not_counted_twice() {
        let stat = "cpu  10 0 20 50 5 1 2 3 4 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        assert_eq!(processor_times(stat), Some((55, 91)));
        assert_eq!(processor_times("cpu  1 2\n"), None);
    }

    #[test]
    fn fields_of_proc_files_are_found() {
        let text = "MemTotal:       24683804 kB\nMemFree:  1 kB\n";
        assert_eq!(field(text, "MemTotal").and_then(kib), Some(24_683_804 << 10));
        assert_eq!(field(text, "Mem"), None);
    }
}
