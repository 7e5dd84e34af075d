//! A blockd of the demo's own: found, started, and ended with the demo however that ends.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::Client;
use crate::failure::Failure;

/// How long the daemon may take to answer at first.
const START: Duration = Duration::from_secs(15);
/// How long it may take to end cleanly before it is killed.
const END: Duration = Duration::from_secs(10);

/// A running daemon; dropping it ends it.
#[derive(Debug)]
pub(super) struct Daemon {
    child: Child,
    log: PathBuf,
    /// Its API.
    pub(super) client: Client,
}

impl Daemon {
    /// Starts `program` with its state and log in `folder` and its API at `socket`, and waits until it answers.
    pub(super) async fn start(program: &Path, folder: &Path, socket: &Path) -> Result<Self, Failure> {
        let log = folder.join("blockd.log");
        let file = File::create(&log).map_err(|e| Failure::io(log.display(), &e))?;
        let child = Command::new(program)
            .arg("--state-dir")
            .arg(folder.join("state"))
            .arg("--api")
            .arg(socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            // A ^C at the terminal is for the demo, which ends the daemon in its own time.
            .process_group(0)
            .spawn()
            .map_err(|e| Failure::io(format!("{} can't be started", program.display()), &e))?;
        let mut daemon = Self { child, log, client: Client::new(Some(socket))? };
        daemon.wait_until_it_answers().await?;
        Ok(daemon)
    }

    async fn wait_until_it_answers(&mut self) -> Result<(), Failure> {
        let deadline = Instant::now() + START;
        loop {
            let failure = match self.client.disks().await {
                Ok(_) => return Ok(()),
                Err(failure) => failure,
            };
            if let Ok(Some(status)) = self.child.try_wait() {
                let message = format!("blockd ended at once ({status}); it said:\n{}", self.last_words());
                return Err(Failure::new("unreachable", message));
            }
            if failure.kind != "unreachable" || Instant::now() > deadline {
                let message = format!("{failure}; it said:\n{}", self.last_words());
                return Err(Failure { message, ..failure });
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The end of its log.
    pub(super) fn last_words(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }

    fn end(&mut self) {
        let deadline = Instant::now() + END;
        // It may have ended by itself; then there is nobody to signal.
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
        while Instant::now() < deadline {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                Ok(Some(_)) | Err(_) => return,
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // A child that was waited for already must not be signalled: its number may be another's by now.
        if matches!(self.child.try_wait(), Ok(None)) {
            self.end();
        }
    }
}

/// The `blockd` program: `BLOCKD_BIN`, next to this program, or on the `PATH`.
pub(super) fn find_program() -> Result<PathBuf, Failure> {
    if let Some(named) = std::env::var_os("BLOCKD_BIN") {
        let named = PathBuf::from(named);
        if named.is_file() {
            return Ok(named);
        }
        return Err(Failure::new("not-found", format!("{}: BLOCKD_BIN names no program", named.display())));
    }
    let beside = std::env::current_exe().ok().and_then(|me| Some(me.parent()?.join("blockd")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|dir| dir.join("blockd"));
    beside.into_iter().chain(on_path).find(|program| program.is_file()).ok_or_else(|| {
        Failure::new(
            "not-found",
            "the program `blockd` is neither next to blockctl nor on the PATH; install it or name it in BLOCKD_BIN",
        )
    })
}
