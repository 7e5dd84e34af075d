//! Daemons under test: started with a folder of their own, killed, restarted, and asked over the control API.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blockd_api::{
    AttachRequest, DiskInfo, ErrorBody, Handover, Job, MoveRequest, ResizeRequest, Resized, SnapshotRequest,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use crate::{PATIENCE, http};

/// An image to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Image {
    /// Nothing but the content.
    Raw,
    /// A VHD that grows.
    DynamicVhd,
    /// A VHD of full size.
    FixedVhd,
    /// A VHDX that grows.
    DynamicVhdx,
    /// A VHDX of full size.
    FixedVhdx,
}

impl Image {
    /// Every kind.
    pub const ALL: [Self; 5] =
        [Self::Raw, Self::DynamicVhd, Self::FixedVhd, Self::DynamicVhdx, Self::FixedVhdx];

    /// One of each format: all, or those that `$BLOCKD_TEST_FORMATS` names (as in `raw,vhd`).
    pub fn formats() -> Vec<Self> {
        let mut formats = vec![Self::Raw, Self::DynamicVhd, Self::DynamicVhdx];
        if let Ok(wanted) = std::env::var("BLOCKD_TEST_FORMATS") {
            eprintln!("SKIPPED: all formats but {wanted}");
            formats.retain(|format| wanted.split(',').any(|name| name == format.name()));
        }
        formats
    }

    /// What QEMU calls the format.
    pub fn qemu_name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::DynamicVhd | Self::FixedVhd => "vpc",
            Self::DynamicVhdx | Self::FixedVhdx => "vhdx",
        }
    }

    /// What the format is called here; also the ending of its files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::DynamicVhd | Self::FixedVhd => "vhd",
            Self::DynamicVhdx | Self::FixedVhdx => "vhdx",
        }
    }

    /// `fixed` or `dynamic`.
    pub fn layout(self) -> &'static str {
        match self {
            Self::Raw | Self::FixedVhd | Self::FixedVhdx => "fixed",
            Self::DynamicVhd | Self::DynamicVhdx => "dynamic",
        }
    }

    /// Makes an empty image of `size` bytes with qemu-img, so that what blockd serves comes from another's hand.
    pub fn create(self, path: &Path, size: u64) -> Result<()> {
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", self.qemu_name()]);
        match self {
            Self::Raw => {}
            Self::DynamicVhd | Self::FixedVhd => {
                command.args(["-o", &format!("force_size=on,subformat={}", self.layout())]);
            }
            Self::DynamicVhdx | Self::FixedVhdx => {
                command.args(["-o", &format!("subformat={}", self.layout())]);
            }
        }
        let status =
            command.arg(path).arg(size.to_string()).status().context("qemu-img (package qemu-utils)")?;
        ensure!(status.success(), "qemu-img create {} failed", path.display());
        Ok(())
    }

    /// Copies the content of an image into a raw file with qemu-img.
    pub fn to_raw(self, image: &Path, raw: &Path) -> Result<()> {
        let status = Command::new("qemu-img")
            .args(["convert", "-f", self.qemu_name(), "-O", "raw"])
            .args([image, raw])
            .status()
            .context("qemu-img (package qemu-utils)")?;
        ensure!(status.success(), "qemu-img convert {} failed", image.display());
        Ok(())
    }

    /// Asks `qemu-img check` whether the image is sound; formats that it can't check pass.
    pub fn check(self, image: &Path) -> Result<()> {
        if self.name() != "vhdx" {
            return Ok(());
        }
        let output = Command::new("qemu-img").args(["check", "-f", "vhdx"]).arg(image).output()?;
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "qemu-img check {}: {text}", image.display());
        Ok(())
    }
}

/// A disk to serve.
#[derive(Debug, Clone)]
pub struct DiskSpec {
    /// Its name.
    pub id: String,
    /// The image.
    pub image: PathBuf,
    /// What the image is.
    pub kind: Image,
    /// Queues offered.
    pub queues: u16,
    /// Refuse writes.
    pub read_only: bool,
}

/// A folder on a file system in memory with room for a test's disks; says that the test is skipped where there is none.
pub fn in_memory() -> Option<&'static Path> {
    let folder = Path::new("/dev/shm");
    let is_there = nix::sys::statvfs::statvfs(folder)
        .is_ok_and(|fs| fs.blocks_available() * fs.fragment_size() > 2 << 30);
    if !is_there {
        println!("SKIPPED: {} has no room of 2 GiB, so no disk in memory was tried", folder.display());
    }
    is_there.then_some(folder)
}

impl DiskSpec {
    /// A new image of `size` bytes in `dir`, to be served as `id` with `queues` queues.
    pub fn create(dir: &Path, id: &str, kind: Image, size: u64, queues: u16) -> Result<Self> {
        let image = dir.join(format!("{id}.{}", kind.name()));
        kind.create(&image, size)?;
        Ok(Self { id: id.to_owned(), image, kind, queues, read_only: false })
    }
}

/// Which program serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// The daemon of this project.
    Blockd,
    /// qemu-storage-daemon: another implementation, against which the tests themselves are tried.
    Reference,
}

/// A running daemon. It is killed when this is dropped; when a test has failed, the end of its log is printed.
#[derive(Debug)]
pub struct Daemon {
    program: Program,
    dir: PathBuf,
    child: Option<Child>,
    disks: Vec<DiskSpec>,
    starts: u32,
    watchdog: Watchdog,
    _own_dir: Option<TempDir>,
}

/// Kills a daemon that lives for too long, so that a test that waits for it fails instead of hanging: the vhost crate's
/// front end waits for answers without an end.
#[derive(Debug)]
struct Watchdog {
    pid: Arc<AtomicU32>,
    _over: mpsc::Sender<()>,
}

/// More than any test takes.
const LIFETIME: Duration = Duration::from_secs(900);

impl Watchdog {
    fn start() -> Self {
        let pid = Arc::new(AtomicU32::new(0));
        let (over, receiver) = mpsc::channel::<()>();
        let watched = pid.clone();
        std::thread::spawn(move || {
            if receiver.recv_timeout(LIFETIME) == Err(mpsc::RecvTimeoutError::Timeout) {
                let pid = i32::try_from(watched.load(Ordering::Relaxed)).unwrap_or(0);
                if pid > 0 {
                    eprintln!("a daemon lived for more than {LIFETIME:?}: it is killed");
                    let _ = nix::sys::signal::kill(
                        nix::unistd::Pid::from_raw(pid),
                        nix::sys::signal::Signal::SIGKILL,
                    );
                }
            }
        });
        Self { pid, _over: over }
    }
}

impl Daemon {
    /// The program that `$BLOCKD_TEST_BACKEND` names (`qemu` for the reference), else blockd.
    pub fn program() -> Program {
        match std::env::var("BLOCKD_TEST_BACKEND").as_deref() {
            Ok("qemu") => Program::Reference,
            _ => Program::Blockd,
        }
    }

    /// Starts the daemon with these disks and waits until it serves them. Its state is in `dir`.
    pub fn start(dir: &Path, disks: Vec<DiskSpec>) -> Result<Self> {
        Self::start_program(Self::program(), dir, disks)
    }

    /// As [`Daemon::start`], with a program of the caller's choice.
    pub fn start_program(program: Program, dir: &Path, disks: Vec<DiskSpec>) -> Result<Self> {
        let dir = dir.to_owned();
        let watchdog = Watchdog::start();
        let mut daemon = Self { program, dir, child: None, disks, starts: 0, watchdog, _own_dir: None };
        daemon.restart()?;
        Ok(daemon)
    }

    /// Starts the daemon with one new empty disk in a temporary folder that goes away with it.
    pub fn with_disk(kind: Image, size: u64, queues: u16) -> Result<Self> {
        Self::with_disk_in(&std::env::temp_dir(), kind, size, queues)
    }

    /// The same with the temporary folder in another one. A folder in memory makes the data path another one: see
    /// [`in_memory`].
    pub fn with_disk_in(base: &Path, kind: Image, size: u64, queues: u16) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("blockd-test-").tempdir_in(base)?;
        let disk = DiskSpec::create(dir.path(), "disk", kind, size, queues)?;
        let mut daemon = Self::start(dir.path(), vec![disk])?;
        daemon._own_dir = Some(dir);
        Ok(daemon)
    }

    /// Which program runs.
    pub fn runs(&self) -> Program {
        self.program
    }

    /// The folder that holds state, sockets and the log.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The disks as they were at the start.
    pub fn disks(&self) -> &[DiskSpec] {
        &self.disks
    }

    /// The vhost-user socket of a disk.
    pub fn socket(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.sock"))
    }

    /// The control API's socket.
    pub fn api(&self) -> PathBuf {
        self.dir.join("api.sock")
    }

    /// The daemon's process.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Whether the daemon still runs.
    pub fn is_alive(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Kills the daemon as a crash would: it gets no chance to do anything.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            self.watchdog.pid.store(0, Ordering::Relaxed);
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Asks the daemon to end with SIGTERM and waits; returns whether it ended with 0.
    pub fn terminate(&mut self) -> Result<bool> {
        let Some(mut child) = self.child.take() else { return Ok(false) };
        self.watchdog.pid.store(0, Ordering::Relaxed);
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status.success());
            }
            if Instant::now() > until {
                let _ = child.kill();
                let _ = child.wait();
                bail!("the daemon did not end within 30 s of SIGTERM");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Starts the daemon again (killing it first if it runs) and waits until it serves. From the second start on it
    /// is told of no disks: it has to know them.
    pub fn restart(&mut self) -> Result<()> {
        self.spawn()?;
        self.wait_ready()
    }

    /// Starts the daemon and kills it after `time`, however far it is then.
    pub fn start_and_kill(&mut self, time: Duration) -> Result<()> {
        self.spawn()?;
        std::thread::sleep(time);
        self.kill9();
        Ok(())
    }

    fn spawn(&mut self) -> Result<()> {
        self.kill9();
        let mut command = match self.program {
            Program::Blockd => self.blockd_command()?,
            Program::Reference => self.reference_command(),
        };
        let log = File::options().create(true).append(true).open(self.log_path())?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("start {:?}", command.get_program()))?;
        self.watchdog.pid.store(child.id(), Ordering::Relaxed);
        self.child = Some(child);
        self.starts += 1;
        Ok(())
    }

    fn blockd_command(&self) -> Result<Command> {
        let mut command = Command::new(binary("blockd", "BLOCKD_BIN")?);
        command.arg("--state-dir").arg(self.dir.join("state")).arg("--api").arg(self.api());
        if self.starts == 0 {
            for disk in &self.disks {
                let mut spec = format!(
                    "{},image={},socket={},queues={}",
                    disk.id,
                    disk.image.display(),
                    self.socket(&disk.id).display(),
                    disk.queues
                );
                if disk.read_only {
                    spec.push_str(",read-only");
                }
                command.arg("--disk").arg(spec);
            }
        }
        Ok(command)
    }

    fn reference_command(&self) -> Command {
        let mut command = Command::new("qemu-storage-daemon");
        for disk in &self.disks {
            let (id, image) = (&disk.id, disk.image.display());
            let file = format!("driver=file,node-name=f-{id},filename={image},discard=unmap,locking=off");
            command.arg("--blockdev").arg(file);
            let node = format!("driver={},node-name=n-{id},file=f-{id},discard=unmap", disk.kind.qemu_name());
            command.arg("--blockdev").arg(node);
            let _ = std::fs::remove_file(self.socket(id));
            command.arg("--export").arg(format!(
                "type=vhost-user-blk,id=e-{id},node-name=n-{id},addr.type=unix,addr.path={},writable={},num-queues={}",
                self.socket(id).display(),
                if disk.read_only { "off" } else { "on" },
                disk.queues
            ));
        }
        command
    }

    fn wait_ready(&mut self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let is_ready = match self.program {
                Program::Reference => self.disks.iter().all(|disk| self.socket(&disk.id).exists()),
                Program::Blockd => self.is_served(),
            };
            if is_ready {
                return Ok(());
            }
            if !self.is_alive() {
                bail!("the daemon ended while starting:\n{}", self.log_tail());
            }
            if Instant::now() > until {
                bail!("the daemon was not ready within 30 s:\n{}", self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn is_served(&self) -> bool {
        let Ok((200, body)) = http::call(&self.api(), "GET", "/v1/disks", None) else { return false };
        let disks: Vec<DiskInfo> = serde_json::from_str(&body).unwrap_or_default();
        let is_there = |d: &DiskInfo| d.released || self.socket(&d.id).exists();
        self.disks.iter().all(|disk| disks.iter().any(|d| d.id == disk.id && is_there(d)))
    }

    fn log_path(&self) -> PathBuf {
        self.dir.join("daemon.log")
    }

    /// The last lines of what the daemon said.
    pub fn log_tail(&self) -> String {
        let log = std::fs::read(self.log_path()).unwrap_or_default();
        let text = String::from_utf8_lossy(&log[log.len().saturating_sub(6000)..]).into_owned();
        format!("--- end of the daemon's log\n{text}\n---")
    }

    /// Calls the control API; anything but a success is an error that says what the daemon answered.
    pub fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T> {
        match self.try_call(method, path, body)? {
            Ok(answer) => Ok(answer),
            Err(refusal) => bail!("{method} {path}: {}: {}", refusal.error.kind, refusal.error.message),
        }
    }

    /// Calls the control API; a refusal is an answer, too.
    pub fn try_call<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Result<T, ErrorBody>> {
        let body = body.map(serde_json::to_string).transpose()?;
        let (status, text) = http::call(&self.api(), method, path, body.as_deref())?;
        let parsed = if (200..300).contains(&status) {
            serde_json::from_str(&text).map(Ok)
        } else {
            serde_json::from_str(&text).map(Err)
        };
        parsed.with_context(|| format!("{method} {path}: {status} {text}"))
    }

    /// A disk as the daemon sees it.
    pub fn disk(&self, id: &str) -> Result<DiskInfo> {
        self.call("GET", &format!("/v1/disks/{id}"), None::<&()>)
    }

    /// Lets a disk go on in a new image at `to`.
    pub fn snapshot(&self, id: &str, to: &Path) -> Result<DiskInfo> {
        let to = to.to_string_lossy().into_owned();
        self.call("POST", &format!("/v1/disks/{id}/snapshot"), Some(&SnapshotRequest { to }))
    }

    /// Serves an image as a disk.
    pub fn attach(&self, request: &AttachRequest) -> Result<DiskInfo> {
        self.call("POST", "/v1/disks", Some(request))
    }

    /// Ends serving a disk for another daemon to take it over. What a move still has to do is waited for at most `wait`.
    pub fn release(&self, id: &str, wait: Duration) -> Result<Handover> {
        self.call("POST", &format!("/v1/disks/{id}/release?wait_ms={}", wait.as_millis()), None::<&()>)
    }

    /// Serves a disk again that was released here.
    pub fn reclaim(&self, id: &str) -> Result<DiskInfo> {
        self.call("POST", &format!("/v1/disks/{id}/reclaim"), None::<&()>)
    }

    /// Serves here what another daemon has released, at this daemon's socket for it.
    pub fn take_over(&self, handover: &Handover) -> Result<DiskInfo> {
        self.attach(&handover.attach_at(&self.socket(&handover.id).display().to_string()))
    }

    /// Gives a disk another size.
    pub fn resize(&self, id: &str, size_bytes: u64, shrink: bool) -> Result<Resized> {
        let request = ResizeRequest { size_bytes, shrink };
        self.call("POST", &format!("/v1/disks/{id}/resize"), Some(&request))
    }

    /// Starts a move.
    pub fn start_move(&self, request: &MoveRequest) -> Result<Job> {
        self.call("POST", "/v1/moves", Some(request))
    }

    /// A job as it is now.
    pub fn job(&self, job: &str) -> Result<Job> {
        self.call("GET", &format!("/v1/jobs/{job}"), None::<&()>)
    }

    /// `pause`, `resume`, `switch` or `cancel`.
    pub fn job_verb(&self, job: &str, verb: &str) -> Result<Job> {
        self.call("POST", &format!("/v1/jobs/{job}/{verb}"), None::<&()>)
    }

    /// Waits until `done` says yes to the job; fails after `timeout` or when the job is over before.
    pub fn wait_job(&self, job: &str, timeout: Duration, done: impl Fn(&Job) -> bool) -> Result<Job> {
        let until = Instant::now() + timeout;
        loop {
            let now = self.job(job)?;
            if done(&now) {
                return Ok(now);
            }
            if now.is_over() {
                bail!("the job is over before that: {now:?}");
            }
            if Instant::now() > until {
                bail!("not within {timeout:?}: {now:?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill9();
        if std::thread::panicking() {
            eprintln!("{}", self.log_tail());
        }
    }
}

/// Finds a program of this workspace: where the variable says, else beside this test's executable.
pub fn binary(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(path.into());
    }
    let exe = std::env::current_exe()?;
    // target/debug/deps/name-hash → target/debug/name
    let found = exe.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.with_context(|| {
        format!(
            "{name} is not beside {}: build it first (cargo build -p {name}) or set {variable}",
            exe.display()
        )
    })
}
