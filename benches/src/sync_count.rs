//! Counts how often a process has files made durable, by system call or by io_uring: `perf stat` on the tracepoints of both.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use system_tests::readable_within;

/// Counts for one process, but only while it is told to.
#[derive(Debug)]
pub struct SyncCount {
    perf: Child,
    orders: File,
    answers: BufReader<File>,
    output: PathBuf,
}

fn command(output: &Path) -> Command {
    let mut command = Command::new("perf");
    command.args(["stat", "-x,", "-o"]).arg(output);
    // IORING_OP_FSYNC is 3, see io_uring_enter(2).
    command.args(["-e", "io_uring:io_uring_submit_req", "--filter", "opcode==3"]);
    command.args(["-e", "syscalls:sys_enter_fdatasync", "-e", "syscalls:sys_enter_fsync"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn pipe(path: &Path) -> Result<File> {
    mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR).with_context(|| format!("make {}", path.display()))?;
    // For both directions: opening one end alone would wait for the other.
    File::options().read(true).write(true).open(path).with_context(|| format!("open {}", path.display()))
}

impl SyncCount {
    /// Fails where it can't be counted.
    ///
    /// # Errors
    /// What is missing.
    pub fn is_possible() -> Result<()> {
        let output = tempfile::NamedTempFile::new()?;
        let status = command(output.path()).arg("true").status().context("perf is not installed")?;
        ensure!(status.success(), "perf may not use the kernel's tracepoints (it can as root)");
        Ok(())
    }

    /// Gets ready to count for a process and the threads that it will have; files for that are made in `dir`.
    ///
    /// # Errors
    /// When perf does not start.
    pub fn start(pid: u32, dir: &Path) -> Result<Self> {
        let [output, orders, answers] =
            ["syncs.csv", "syncs.orders", "syncs.answers"].map(|name| dir.join(name));
        let (order_pipe, answer_pipe) = (pipe(&orders)?, pipe(&answers)?);
        let perf = command(&output)
            .args(["--delay=-1", "--control"])
            .arg(format!("fifo:{},{}", orders.display(), answers.display()))
            .arg("-p")
            .arg(pid.to_string())
            .spawn()
            .context("start perf")?;
        Ok(Self { perf, orders: order_pipe, answers: BufReader::new(answer_pipe), output })
    }

    /// Counts what happens while `work` is done.
    ///
    /// # Errors
    /// What `work` says, or that perf is gone.
    pub fn during(&mut self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.order("enable")?;
        work()?;
        self.order("disable")
    }

    fn order(&mut self, what: &str) -> Result<()> {
        ensure!(self.perf.try_wait()?.is_none(), "perf has ended");
        self.orders.write_all(format!("{what}\n").as_bytes())?;
        let pipe = self.answers.get_ref().as_fd();
        ensure!(readable_within(pipe, Duration::from_secs(20)), "perf does not answer to `{what}`");
        let mut answer = Vec::new();
        // The answer ends with a line feed and, as perf sends it, a zero.
        self.answers.read_until(b'\n', &mut answer)?;
        ensure!(answer.windows(3).any(|word| word == b"ack"), "perf answers {answer:?} to `{what}`");
        Ok(())
    }

    /// The number of syncs in all that was counted.
    ///
    /// # Errors
    /// When perf does not tell.
    pub fn end(mut self) -> Result<u64> {
        kill(Pid::from_raw(i32::try_from(self.perf.id())?), Signal::SIGINT)?;
        self.perf.wait()?;
        let text = std::fs::read_to_string(&self.output).context("perf's figures")?;
        sum(&text).with_context(|| format!("perf's figures are not understood: {text}"))
    }
}

/// Adds up the first column of what is no comment.
fn sum(csv: &str) -> Option<u64> {
    let mut lines = csv.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')).peekable();
    lines.peek()?;
    lines.map(|line| line.split(',').next().and_then(|count| count.parse::<u64>().ok())).sum()
}

impl Drop for SyncCount {
    fn drop(&mut self) {
        let _ = self.perf.kill();
        let _ = self.perf.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_happens_meanwhile_is_counted() {
        if let Err(why) = SyncCount::is_possible() {
            println!("SKIPPED: {why:#}");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("file")).unwrap();
        let mut count = SyncCount::start(std::process::id(), dir.path()).unwrap();
        count.during(|| Ok(())).unwrap();
        file.sync_all().unwrap();
        count.during(|| Ok(file.sync_all().and_then(|()| file.sync_data())?)).unwrap();
        file.sync_all().unwrap();
        assert_eq!(count.end().unwrap(), 2);
    }

    #[test]
    fn counts_of_all_ways_are_added() {
        let csv = "# started on Monday\n\n17,,io_uring:io_uring_submit_req,9,100.00,,\n3,,syscalls:sys_enter_fsync,9,1,,\n";
        assert_eq!(sum(csv), Some(20));
        assert_eq!(sum("<not counted>,,x\n"), None);
        assert_eq!(sum("# nothing\n"), None);
    }
}
