//! Daemons that serve images for load alone: nothing is moved, and they may live as long as the measurement takes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;
use serde::de::DeserializeOwned;
use system_tests::{Image, http};

use crate::{interrupt, process};

/// How long a daemon may take to start or to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// A disk to serve.
#[derive(Debug, Clone)]
pub struct Disk {
    /// Its name.
    pub id: String,
    /// The image.
    pub image: PathBuf,
    /// What it is.
    pub kind: Image,
    /// Queues, each with a thread of its own in blockd.
    pub queues: usize,
}

impl Disk {
    /// A disk with one queue.
    pub fn new(id: impl Into<String>, kind: Image, image: PathBuf) -> Self {
        Self { id: id.into(), image, kind, queues: 1 }
    }
}

/// How qemu-storage-daemon does its I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aio {
    /// By io_uring.
    Uring,
    /// By a pool of threads.
    Threads,
}

impl Aio {
    /// As QEMU calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uring => "io_uring",
            Self::Threads => "threads",
        }
    }
}

/// A running daemon; it is killed when this is dropped.
#[derive(Debug)]
pub struct Served {
    program: &'static str,
    dir: PathBuf,
    child: Child,
}

impl Served {
    /// Starts blockd with these disks. Sockets, state and log go to `dir`, which must exist.
    ///
    /// # Errors
    /// When it does not come up; its log is in the message.
    pub fn blockd(dir: &Path, disks: &[Disk]) -> Result<Self> {
        let mut command = Command::new(system_tests::daemon::binary("blockd", "BLOCKD_BIN")?);
        command.arg("--state-dir").arg(dir.join("state")).arg("--api").arg(dir.join("api.sock"));
        for disk in disks {
            command.arg("--disk").arg(format!(
                "{},image={},socket={},format={},queues={},io-threads={}",
                disk.id,
                disk.image.display(),
                socket_in(dir, &disk.id)?.display(),
                disk.kind.name(),
                disk.queues,
                disk.queues,
            ));
        }
        let mut sockets = vec![dir.join("api.sock")];
        for disk in disks {
            sockets.push(socket_in(dir, &disk.id)?);
        }
        Self::start("blockd", dir, command, &sockets)
    }

    /// Starts qemu-storage-daemon with one disk in a thread of its own, past the page cache if `direct`.
    ///
    /// # Errors
    /// When it does not come up; its log is in the message.
    pub fn rival(dir: &Path, disk: &Disk, direct: bool, aio: Aio) -> Result<Self> {
        let cache = if direct { "on" } else { "off" };
        let escaped = |path: &Path| path.display().to_string().replace(',', ",,");
        let socket = socket_in(dir, &disk.id)?;
        let mut command = Command::new("qemu-storage-daemon");
        command
            .args(["--object", "iothread,id=io"])
            .args(["--blockdev", &format!(
                "driver=file,node-name=file,filename={},cache.direct={cache},aio={},discard=unmap",
                escaped(&disk.image),
                aio.name()
            )])
            .args(["--blockdev", &format!(
                "driver={},node-name=disk,file=file,cache.direct={cache},discard=unmap",
                disk.kind.qemu_name()
            )])
            .args(["--export", &format!(
                "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues={},iothread=io",
                escaped(&socket),
                disk.queues
            )]);
        Self::start("qemu-storage-daemon", dir, command, &[socket])
    }

    fn start(program: &'static str, dir: &Path, mut command: Command, sockets: &[PathBuf]) -> Result<Self> {
        let log = File::create(dir.join(format!("{program}.log")))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("start {program}"))?;
        let mut served = Self { program, dir: dir.to_owned(), child };
        served.wait_ready(sockets).map_err(|error| error.context(served.log()))?;
        Ok(served)
    }

    fn wait_ready(&mut self, sockets: &[PathBuf]) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while !(sockets.iter().all(|socket| socket.exists()) && self.answers()) {
            interrupt::check()?;
            ensure!(self.child.try_wait()?.is_none(), "{} ended while starting", self.program);
            ensure!(Instant::now() < until, "{} was not ready within {PATIENCE:?}", self.program);
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Whether blockd's API answers, which tells that the sockets are listened on and not only there.
    fn answers(&self) -> bool {
        self.program != "blockd" || matches!(http::call(&self.api(), "GET", "/v1/disks", None), Ok((200, _)))
    }

    /// The vhost-user socket of a disk.
    ///
    /// # Errors
    /// When it is longer than a socket's address can be.
    pub fn socket(&self, id: &str) -> Result<PathBuf> {
        socket_in(&self.dir, id)
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Seconds of processor time so far, of all threads.
    ///
    /// # Errors
    /// When it is gone; its log is in the message.
    pub fn cpu_s(&self) -> Result<f64> {
        Ok(process::cpu_clock(self.pid()).with_context(|| self.log())?.as_secs_f64())
    }

    /// The control API's socket.
    pub fn api(&self) -> PathBuf {
        self.dir.join("api.sock")
    }

    /// Calls blockd's control API.
    ///
    /// # Errors
    /// Anything but a success, as the daemon says it.
    pub fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T> {
        call(&self.api(), method, path, body)
    }

    /// The end of what it said.
    pub fn log(&self) -> String {
        let log = std::fs::read(self.dir.join(format!("{}.log", self.program))).unwrap_or_default();
        let end = &log[log.len().saturating_sub(4000)..];
        format!("{}'s log: {}", self.program, String::from_utf8_lossy(end).trim())
    }

    /// Has it end in good order.
    ///
    /// # Errors
    /// When it does not, or tells of a failure.
    pub fn stop(mut self) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGTERM)?;
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "{} ended with {status}: {}", self.program, self.log());
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        bail!("{} did not end within {PATIENCE:?}: {}", self.program, self.log())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Calls the control API at `api`, from any thread.
///
/// # Errors
/// Anything but a success, as the daemon says it.
pub fn call<T: DeserializeOwned>(
    api: &Path,
    method: &str,
    path: &str,
    body: Option<&impl Serialize>,
) -> Result<T> {
    let body = body.map(serde_json::to_string).transpose()?;
    let (status, text) = http::call(api, method, path, body.as_deref())?;
    ensure!((200..300).contains(&status), "{method} {path}: {status}: {text}");
    serde_json::from_str(&text).with_context(|| format!("{method} {path}: {text}"))
}

fn socket_in(dir: &Path, id: &str) -> Result<PathBuf> {
    let socket = dir.join(format!("{id}.sock"));
    // sockaddr_un has 108 bytes, with the final zero.
    let length = socket.as_os_str().len();
    ensure!(
        length <= 107,
        "{} is too long for a socket ({length} bytes): give a shorter --dir",
        socket.display()
    );
    Ok(socket)
}

/// Starts qemu-storage-daemon with io_uring, or with threads where it can't do that.
///
/// # Errors
/// When it comes up with neither.
pub fn start_rival(dir: &Path, disk: &Disk, direct: bool) -> Result<(Served, Aio)> {
    match Served::rival(dir, disk, direct, Aio::Uring) {
        Ok(served) => Ok((served, Aio::Uring)),
        Err(error) if interrupt::is_set() => Err(error),
        Err(_) => Ok((Served::rival(dir, disk, direct, Aio::Threads)?, Aio::Threads)),
    }
}
