//! What the tests of devices stand on: a real blockd, and a driver that does through registers and rings what a guest does.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

pub mod driver;

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shim::device::blk::{BlkDevice, BlkOptions};
use shim::memory::GuestRam;

/// Bytes of every test's disk.
pub const DISK_BYTES: u64 = 32 << 20;

/// Where the daemon is: beside the tests, if it was built.
pub fn blockd() -> Option<PathBuf> {
    let exe = std::env::current_exe().unwrap();
    let found = exe.ancestors().skip(1).take(2).map(|dir| dir.join("blockd")).find(|path| path.is_file());
    if found.is_none() {
        eprintln!("SKIPPED: blockd is not beside {}: build it first (cargo build -p blockd)", exe.display());
    }
    found
}

/// A daemon with one disk. It is killed when this is dropped.
pub struct Daemon {
    program: PathBuf,
    pub dir: PathBuf,
    queues: u16,
    child: Option<Child>,
    known: bool,
}

impl Daemon {
    /// Starts one in an empty folder, with a new disk; `None` (and a word about it) when there is no program.
    pub fn start(dir: &Path, queues: u16) -> Option<Self> {
        Self::start_with(dir, queues, DISK_BYTES)
    }

    pub fn start_with(dir: &Path, queues: u16, bytes: u64) -> Option<Self> {
        let program = blockd()?;
        File::create(dir.join("disk.raw")).unwrap().set_len(bytes).unwrap();
        let mut daemon = Self { program, dir: dir.to_owned(), queues, child: None, known: false };
        daemon.restart();
        Some(daemon)
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("disk.sock")
    }

    pub fn pid(&self) -> i32 {
        self.child.as_ref().unwrap().id() as i32
    }

    /// As a crash would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: plain system call; the child is one of ours and not waited for yet.
        assert_eq!(unsafe { libc::kill(self.pid(), signal) }, 0);
        if signal == libc::SIGSTOP {
            eventually("the backend stands still", || self.stands_still());
        }
    }

    /// Whether none of its threads runs: one may go on for a moment while another takes the signal.
    fn stands_still(&self) -> bool {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let mut states = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")));
        // Behind the name, which is in brackets.
        states
            .all(|stat| stat.is_ok_and(|stat| stat.rsplit(") ").next().unwrap_or_default().starts_with('T')))
    }

    /// Starts it (again) and waits until it serves.
    pub fn restart(&mut self) {
        self.spawn();
        let until = Instant::now() + Duration::from_secs(60);
        while UnixStream::connect(self.socket()).is_err() {
            assert!(Instant::now() < until, "blockd does not serve:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts it without waiting.
    pub fn spawn(&mut self) {
        self.kill();
        let log = File::options().create(true).append(true).open(self.dir.join("blockd.log")).unwrap();
        let mut command = Command::new(&self.program);
        command.arg("--state-dir").arg(self.dir.join("state")).arg("--api").arg(self.dir.join("api.sock"));
        // It remembers its disks.
        if !std::mem::replace(&mut self.known, true) {
            let (image, socket) = (self.dir.join("disk.raw"), self.socket());
            let spec =
                format!("disk,image={},socket={},queues={}", image.display(), socket.display(), self.queues);
            command.arg("--disk").arg(spec);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(command.spawn().unwrap());
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("blockd.log")).unwrap_or_default()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- blockd said:\n{}---", self.log());
        }
    }
}

/// Options with times for tests.
pub fn options(socket: PathBuf, queues: u16) -> BlkOptions {
    BlkOptions {
        queues,
        queue_size: 128,
        reconnect: Duration::from_secs(60),
        patience: Duration::from_secs(30),
        ..BlkOptions::new(socket, "disk0")
    }
}

pub fn memory() -> Arc<GuestRam> {
    GuestRam::new(16 << 20, false).unwrap()
}

pub fn device(daemon: &Daemon, queues: u16, ram: &Arc<GuestRam>) -> Arc<BlkDevice> {
    BlkDevice::new(options(daemon.socket(), queues), ram.clone()).unwrap()
}

/// Waits until something holds, which has to be soon.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < until, "not within a minute: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
