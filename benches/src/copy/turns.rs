//! One copy by each of those that are measured.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blockd_api::{Job, MoveRequest};
use serde::Serialize;

use crate::choice::Kind;
use crate::events::Events;
use crate::fio;
use crate::interrupt;
use crate::process;
use crate::rival::Rival;
use crate::served::{Disk, Served};
use crate::server::{Plan, Server, Watch};

const DISK: &str = "disk";
/// How long a move may take. More than any takes, as nothing is served meanwhile.
const PATIENCE: Duration = Duration::from_secs(3600);

/// Who copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Who {
    /// fio, a reader and a writer: what the disk can do.
    Fio,
    /// `blockctl move` of an image that nobody serves.
    Offline,
    /// `qemu-img convert`.
    Convert,
    /// blockd, without a comparison afterwards.
    Live,
    /// blockd, which compares both images before it switches.
    LiveVerified,
    /// qemu-storage-daemon.
    Rival,
}

impl Who {
    /// All, in the order of the tables.
    pub const ALL: [Self; 6] =
        [Self::Fio, Self::Offline, Self::Convert, Self::Live, Self::LiveVerified, Self::Rival];

    /// As tables show it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fio => "fio, slower of reader and writer",
            Self::Offline => "blockctl move, offline",
            Self::Convert => "qemu-img convert",
            Self::Live => "blockd, verify none",
            Self::LiveVerified => "blockd, verify full",
            Self::Rival => "qemu-storage-daemon",
        }
    }
}

/// How it went.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Copied {
    /// Until the copy was complete and the new image in use, in seconds; of fio what the slower of both would need.
    pub seconds: f64,
    /// Until both images were equal for the first time, where that is told.
    pub equal_s: Option<f64>,
    /// Processor time of the process that copied, in seconds; none of fio.
    pub cpu_s: Option<f64>,
    /// Bytes a second of fio's reader and writer.
    pub fio: Option<[f64; 2]>,
}

/// What is copied where.
#[derive(Debug)]
pub struct Turn<'a> {
    /// The image, a dynamic VHDX.
    pub source: &'a Path,
    /// What does not exist yet.
    pub target: &'a Path,
    /// An empty folder for sockets, state and logs.
    pub dir: &'a Path,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Bytes that it holds.
    pub held: u64,
}

impl Turn<'_> {
    /// Has it copied.
    ///
    /// # Errors
    /// What the program said that failed.
    pub fn run(&self, who: Who) -> Result<Copied> {
        match who {
            Who::Fio => self.fio(),
            Who::Offline => self.offline(),
            Who::Convert => self.convert(),
            Who::Live => self.live("none"),
            Who::LiveVerified => self.live("full"),
            Who::Rival => self.rival(),
        }
    }

    /// The reader reads the very file that the others copy; the writer writes a new one.
    fn fio(&self) -> Result<Copied> {
        let rates = fio::read_and_write(self.source, self.target, self.held)?;
        let seconds = self.held as f64 / rates[0].min(rates[1]);
        Ok(Copied { seconds, equal_s: None, cpu_s: None, fio: Some(rates) })
    }

    fn offline(&self) -> Result<Copied> {
        let blockctl = system_tests::daemon::binary("blockctl", "BLOCKCTL_BIN")?;
        let mut command = Command::new(blockctl);
        // A daemon that happens to run here is not to be asked.
        command.env("BLOCKD_API", self.dir.join("no-daemon.sock"));
        command.env("BLOCKD_STATE_DIR", self.dir.join("state"));
        command.arg("move").arg(self.source).arg("--to").arg(self.target);
        command.args(["--keep-source", "--verify", "none"]);
        run_program(command)
    }

    fn convert(&self) -> Result<Copied> {
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-W", "-m", "16", "-t", "none", "-T", "none", "-f", "vhdx", "-O", "vhdx"]);
        command.args([self.source, self.target]);
        run_program(command)
    }

    /// A move by a daemon that serves the image to nobody.
    pub fn live(&self, verify: &str) -> Result<Copied> {
        let disk = Disk::new(DISK, Kind::Vhdx.image(), self.source.to_owned());
        let served = Served::blockd(self.dir, &[disk])?;
        let copied = self.live_by(&served, verify).with_context(|| served.log())?;
        served.stop()?;
        Ok(copied)
    }

    fn live_by(&self, served: &Served, verify: &str) -> Result<Copied> {
        let events = Events::follow(&served.api())?;
        let cpu_s = served.cpu_s()?;
        let began = Instant::now();
        let job: Job = served.call("POST", "/v1/moves", Some(&request(self.target, verify)))?;
        let (mut equal, mut done) = (None, None);
        while done.is_none() {
            interrupt::check()?;
            ensure!(began.elapsed() < PATIENCE, "the move was not over within {PATIENCE:?}");
            let Some((at, event)) = events.next(Duration::from_millis(20)) else { continue };
            if event.job.as_deref() != Some(&job.job) {
                continue;
            }
            match event.message.as_str() {
                "synced" => equal = equal.or(Some(at)),
                "done" => done = Some(at),
                "queued" | "copying" | "mirroring" | "committed" => {}
                other => bail!("the move did not end: {other}"),
            }
        }
        let since = |at: Instant| at.saturating_duration_since(began).as_secs_f64();
        let cpu_s = served.cpu_s()? - cpu_s;
        let seconds = done.map_or(0.0, since);
        Ok(Copied { seconds, equal_s: equal.map(since), cpu_s: Some(cpu_s), fio: None })
    }

    /// With the disk in an iothread, as is recommended; without where it does not live through that.
    fn rival(&self) -> Result<Copied> {
        match self.rival_with(true) {
            Err(error) if !interrupt::is_set() => {
                eprintln!(
                    "qemu-storage-daemon failed with the disk in an iothread ({error:#}); once more without"
                );
                for leftover in ["qmp.sock", "disk.sock"].map(|name| self.dir.join(name)) {
                    let _ = std::fs::remove_file(leftover);
                }
                let _ = std::fs::remove_file(self.target);
                self.rival_with(false)
            }
            copied => copied,
        }
    }

    fn rival_with(&self, own_thread: bool) -> Result<Copied> {
        let image = Kind::Vhdx.image();
        let plan = Plan {
            from: image,
            to: image,
            size: self.size,
            verify: "none".into(),
            max_guest_p99_us: None,
            patience: PATIENCE,
            own_thread,
        };
        let mut rival = Rival::start(self.dir, image, self.source, own_thread)?;
        let pid = rival.pid()?;
        let mut look = || Ok(());
        let mut watch = Watch::new(pid, &mut look);
        let before = process::cpu_clock(pid)?;
        rival.run_move(&plan, self.target, &mut watch).with_context(|| rival.log())?;
        let cpu_s = (process::cpu_clock(pid)? - before).as_secs_f64();
        let marks = watch.into_marks();
        let at = |phase| marks.iter().find(|mark| mark.phase == phase).map(|mark| mark.at);
        let began = at("copying").context("the move has no beginning")?;
        let since = |at: Instant| at.saturating_duration_since(began).as_secs_f64();
        let seconds = at("done").map(since).context("the move has no end")?;
        rival.stop()?;
        Ok(Copied { seconds, equal_s: at("ready").map(since), cpu_s: Some(cpu_s), fio: None })
    }
}

/// Runs a program to its end; it must be the only child that ends meanwhile.
fn run_program(mut command: Command) -> Result<Copied> {
    let name = command.get_program().to_string_lossy().into_owned();
    let before = process::cpu_of_children()?;
    let began = Instant::now();
    let output = command.output().with_context(|| format!("start {name}"))?;
    let seconds = began.elapsed().as_secs_f64();
    let cpu_s = process::cpu_of_children()? - before;
    ensure!(
        output.status.success(),
        "{name} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(Copied { seconds, equal_s: None, cpu_s: Some(cpu_s), fio: None })
}

fn request(target: &Path, verify: &str) -> MoveRequest {
    MoveRequest {
        disks: vec![DISK.into()],
        to: target.to_string_lossy().into_owned(),
        format: Some("vhdx".into()),
        image_type: Some("dynamic".into()),
        block_size: None,
        mirror: "after-copy".into(),
        switch: "auto".into(),
        verify: verify.into(),
        bandwidth: None,
        max_guest_p99_us: None,
        keep_source: true,
        copy_only: false,
        flatten: false,
        files: Vec::new(),
        on_target_error: "abort".into(),
    }
}
