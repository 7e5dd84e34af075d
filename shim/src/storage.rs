//! Hands a machine's disks over between the daemons that serve them, by their control APIs.
//!
//! The machine stands still when this happens. The source's daemon lets the image go and says at which generation it was;
//! the target's daemon opens it at the next one, and is refused if anybody has taken it meanwhile. Until the target has
//! taken it the source may take it back.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blockd_api::{DiskInfo, Handover, Job};
use serde::{Deserialize, Serialize};

use crate::api::client::Client;
use crate::cli::parts::DiskArgument;
use crate::vm::host::TakeStorage;
use crate::vm::machine::Storage;

/// Longest that committing a move may take; the target holds everything by then.
const COMMIT: Duration = Duration::from_secs(30);
/// Longest that a daemon may wait for what still uses the image before it lets it go.
const RELEASE: Duration = Duration::from_secs(5);
/// How long a move's verification is waited for, before the machine is sent.
const READY: Duration = Duration::from_secs(20);
/// How often a daemon is asked whether it is so far.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// A disk, as its daemon knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Disk {
    serial: String,
    api: PathBuf,
    id: String,
    socket: PathBuf,
}

fn with_daemons(disks: &[DiskArgument]) -> Result<Vec<Disk>> {
    disks
        .iter()
        .map(|disk| {
            let (api, id) = disk.blockd.clone().with_context(|| {
                format!(
                    "the disk {} can't be handed over: nobody said which daemon serves it; give --disk ...,blockd=API-SOCKET,\
                     id=DISK",
                    disk.serial
                )
            })?;
            Ok(Disk { serial: disk.serial.clone(), api, id, socket: disk.socket.clone() })
        })
        .collect()
}

/// What travels: of each disk its serial number and what its daemon said when it let go.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Travels {
    serial: String,
    handover: Handover,
}

/// The source's side.
#[derive(Debug)]
pub struct Releases {
    disks: Vec<Disk>,
    commit: bool,
}

impl Releases {
    /// For a machine with these disks. `commit`: they are being moved, and the moves are committed first.
    ///
    /// # Errors
    /// If a disk's daemon was not named.
    pub fn new(disks: &[DiskArgument], commit: bool) -> Result<Self> {
        Ok(Self { disks: with_daemons(disks)?, commit })
    }

    /// Looks, before anything moves, whether it could be done.
    ///
    /// # Errors
    /// If a daemon does not answer, or a disk that is to be committed is not synced.
    pub fn check(&self) -> Result<()> {
        for disk in &self.disks {
            let info: DiskInfo = Client::new(&disk.api).get(&format!("/v1/disks/{}", disk.id))?;
            if !self.commit {
                ensure!(
                    info.job.is_none(),
                    "the disk {} is being moved; let the move end, or take --storage commit",
                    disk.serial
                );
                continue;
            }
            wait_until_ready(disk, &info)?;
        }
        Ok(())
    }

    fn release_one(&self, disk: &Disk) -> Result<Travels> {
        let client = Client::new(&disk.api);
        if self.commit {
            commit(disk, &client)?;
        }
        let handover: Handover = client
            .post::<(), _>(&format!("/v1/disks/{}/release?wait_ms={}", disk.id, RELEASE.as_millis()), None)
            .with_context(|| format!("release the disk {}", disk.serial))?;
        Ok(Travels { serial: disk.serial.clone(), handover })
    }

    fn reclaim_one(disk: &Disk) -> Result<()> {
        let answer: Result<DiskInfo> =
            Client::new(&disk.api).post::<(), _>(&format!("/v1/disks/{}/reclaim", disk.id), None);
        answer.map(|_| ()).with_context(|| format!("take the disk {} back", disk.serial))
    }
}

fn job_of(disk: &Disk, info: &DiskInfo) -> Result<Job> {
    let job = info.job.as_ref().with_context(|| {
        format!(
            "the disk {} is not being moved; start a move with --switch manual first, or take --storage release",
            disk.serial
        )
    })?;
    Client::new(&disk.api).get(&format!("/v1/jobs/{job}"))
}

/// A move that is synced is verified before it is committed; that is waited for while the machine still runs.
fn wait_until_ready(disk: &Disk, info: &DiskInfo) -> Result<()> {
    let until = Instant::now() + READY;
    loop {
        let job = job_of(disk, info)?;
        ensure!(
            job.state == "synced",
            "the move of the disk {} is {}; start it with --switch manual and wait until it is synced",
            disk.serial,
            job.state
        );
        if job.ready {
            return Ok(());
        }
        ensure!(
            Instant::now() < until,
            "the move of the disk {} still verifies what it copied; wait until `blockctl job show {}` says that it is ready",
            disk.serial,
            job.job
        );
        std::thread::sleep(LOOK_EVERY * 10);
    }
}

/// Commits the move of a disk: afterwards the move's target is the disk.
fn commit(disk: &Disk, client: &Client) -> Result<()> {
    let info: DiskInfo = client.get(&format!("/v1/disks/{}", disk.id))?;
    let job = job_of(disk, &info)?.job;
    let mut now: Job = client.post::<(), _>(&format!("/v1/jobs/{job}/switch"), None)?;
    let until = Instant::now() + COMMIT;
    while !["committed", "done"].contains(&now.state.as_str()) {
        if ["failed", "cancelled"].contains(&now.state.as_str()) || Instant::now() > until {
            let why = now.error.map_or_else(|| format!("it is {}", now.state), |e| e.message);
            bail!("the move of the disk {} was not committed: {why}", disk.serial);
        }
        std::thread::sleep(LOOK_EVERY);
        now = client.get(&format!("/v1/jobs/{job}"))?;
    }
    Ok(())
}

impl Storage for Releases {
    fn release(&self) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        for (i, disk) in self.disks.iter().enumerate() {
            match self.release_one(disk) {
                Ok(travels) => all.push(travels),
                Err(error) => {
                    for before in &self.disks[..i] {
                        Self::reclaim_one(before)?;
                    }
                    return Err(error);
                }
            }
        }
        serde_json::to_vec(&all).context("write down what is handed over")
    }

    fn reclaim(&self) -> Result<()> {
        self.disks.iter().try_for_each(Self::reclaim_one)
    }
}

/// The target's side.
#[derive(Debug)]
pub struct Takes {
    disks: Vec<DiskArgument>,
}

impl Takes {
    /// For a machine whose disks these are to be.
    pub fn new(disks: &[DiskArgument]) -> Self {
        Self { disks: disks.to_vec() }
    }

    fn take_one(disk: &Disk, handover: &Handover) -> Result<()> {
        let mut request = handover.attach_at(&disk.socket.display().to_string());
        request.id = disk.id.clone();
        let answer: Result<DiskInfo> = Client::new(&disk.api).post("/v1/disks", Some(&request));
        answer.map(|_| ()).with_context(|| format!("open the disk {} ({})", disk.serial, handover.image))
    }
}

impl TakeStorage for Takes {
    fn take(&self, handover: &[u8]) -> Result<()> {
        if handover.is_empty() {
            return Ok(());
        }
        let all: Vec<Travels> = serde_json::from_slice(handover)
            .context("what is handed over is not what this version writes")?;
        let disks = with_daemons(&self.disks)?;
        let mut taken = Vec::new();
        for travels in &all {
            let found = disks.iter().find(|disk| disk.serial == travels.serial);
            let result = found
                .with_context(|| format!("there is no --disk with serial={} here", travels.serial))
                .and_then(|disk| Self::take_one(disk, &travels.handover).map(|()| disk));
            match result {
                Ok(disk) => taken.push(disk),
                Err(error) => {
                    for disk in taken {
                        release(disk)?;
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn give_back(&self) -> Result<()> {
        with_daemons(&self.disks)?.iter().try_for_each(release)
    }
}

fn release(disk: &Disk) -> Result<()> {
    let answer: Result<Handover> =
        Client::new(&disk.api).post::<(), _>(&format!("/v1/disks/{}/release", disk.id), None);
    answer.map(|_| ()).with_context(|| format!("give the disk {} back", disk.serial))
}
