//! Hands a machine's disks over between the daemons that serve them, by their control APIs.
//!
//! The machine stands still when this happens. The source's daemon lets the image go and says at which generation it was;
//! the target's daemon opens it at the next one, and is refused if anybody has taken it meanwhile. The source may take it back
//! until the target has taken it, and again once the target has given it back unused. Either may fail halfway and be asked for again:
//! what is back already stays so, and the target gives back only what it took.

use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blockd_api::{DiskInfo, Handover, Job};
use serde::{Deserialize, Serialize};

use crate::api::ErrorInfo;
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
/// How long a daemon that is just at a disk is waited for, when that is to go back: what it does may be a release or an attach whose
/// answer was lost.
const AT_IT: Duration = Duration::from_secs(10);
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
        let path = format!("/v1/disks/{}/reclaim", disk.id);
        let answer = once_it_is_free(|| Client::new(&disk.api).post::<(), DiskInfo>(&path, None));
        answer.map(|_| ()).with_context(|| format!("take the disk {} back", disk.serial))
    }
}

/// The answer to a question that a daemon refuses while it is at the disk.
fn once_it_is_free<T>(ask: impl Fn() -> Result<T>) -> Result<T> {
    let until = Instant::now() + AT_IT;
    loop {
        match ask() {
            Err(error) if is_refusal(&error, "busy") && Instant::now() < until => {
                std::thread::sleep(LOOK_EVERY)
            }
            answer => return answer,
        }
    }
}

fn is_refusal(error: &anyhow::Error, kind: &str) -> bool {
    error.downcast_ref::<ErrorInfo>().is_some_and(|info| info.kind == kind)
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
    /// On an error some may have been released: [`Storage::reclaim`] takes all of them back.
    fn release(&self) -> Result<Vec<u8>> {
        let all = self.disks.iter().map(|disk| self.release_one(disk)).collect::<Result<Vec<_>>>()?;
        serde_json::to_vec(&all).context("write down what is handed over")
    }

    fn reclaim(&self) -> Result<()> {
        // Each is tried, whatever becomes of the others.
        let back: Vec<_> = self.disks.iter().map(Self::reclaim_one).collect();
        back.into_iter().collect()
    }
}

/// The target's side.
#[derive(Debug)]
pub struct Takes {
    disks: Vec<DiskArgument>,
    /// What the present attempt has taken, or may have.
    taken: Mutex<Vec<Taken>>,
}

/// A disk as it was taken: what tells it from others that have its name at the daemon.
#[derive(Debug)]
struct Taken {
    disk: Disk,
    image: String,
    generation: u64,
}

impl Takes {
    /// For a machine whose disks these are to be.
    pub fn new(disks: &[DiskArgument]) -> Self {
        Self { disks: disks.to_vec(), taken: Mutex::default() }
    }

    fn take_all(&self, all: Vec<Travels>, taken: &mut Vec<Taken>) -> Result<()> {
        let disks = with_daemons(&self.disks)?;
        for Travels { serial, handover } in all {
            let disk = disks.iter().find(|disk| disk.serial == serial);
            let disk = disk.with_context(|| format!("there is no --disk with serial={serial} here"))?;
            Taken::take(disk, &handover, taken)
                .with_context(|| format!("open the disk {serial} ({})", handover.image))?;
        }
        Ok(())
    }
}

impl Taken {
    fn take(disk: &Disk, handover: &Handover, taken: &mut Vec<Self>) -> Result<()> {
        let mut request = handover.attach_at(&disk.socket.display().to_string());
        request.id = disk.id.clone();
        let answer: Result<DiskInfo> = Client::new(&disk.api).post("/v1/disks", Some(&request));
        let (image, generation) = match &answer {
            Ok(info) => (info.image.clone(), info.generation),
            // It refused, or there was none to be asked (the client's only error of this kind).
            Err(error) if error.is::<ErrorInfo>() || error.is::<io::Error>() => return answer.map(drop),
            // A daemon that was asked and not heard of may have taken it.
            Err(_) => (handover.image.clone(), handover.generation),
        };
        taken.push(Self { disk: disk.clone(), image, generation });
        answer.map(drop)
    }

    fn give_back(&self) -> Result<()> {
        let (client, path) = (Client::new(&self.disk.api), format!("/v1/disks/{}", self.disk.id));
        let back = || match once_it_is_free(|| client.get::<DiskInfo>(&path)) {
            Ok(now) if now.released || now.generation != self.generation || now.image != self.image => Ok(()),
            Ok(_) => client.post::<(), Handover>(&format!("{path}/release"), None).map(drop),
            Err(error) if is_refusal(&error, "not-found") => Ok(()),
            Err(error) => Err(error),
        };
        back().with_context(|| format!("give the disk {} back", self.disk.serial))
    }
}

impl TakeStorage for Takes {
    /// On an error some may have been taken: [`TakeStorage::give_back`] returns those, and no others.
    fn take(&self, handover: &[u8]) -> Result<()> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        // What an earlier attempt could not give back is not this one's.
        taken.clear();
        if handover.is_empty() {
            return Ok(());
        }
        let all = serde_json::from_slice(handover)
            .context("what is handed over is not what this version writes")?;
        self.take_all(all, &mut taken)
    }

    fn give_back(&self) -> Result<()> {
        let mut back = Ok(());
        // Each is tried, whatever becomes of the others.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).retain(|taken| {
            let given = taken.give_back();
            let is_kept = given.is_err();
            if back.is_ok() {
                back = given;
            }
            is_kept
        });
        back
    }
}
