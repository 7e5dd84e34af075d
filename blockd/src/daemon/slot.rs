//! What the daemon keeps of each disk: served, broken, handed over, or in somebody's hands for a moment.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use blockd_api::DiskInfo;

use super::disks::{busy, text};
use super::error::{DaemonError, Kind};
use super::handover::Released;
use super::state::DiskRecord;
use super::{lock, plan};
use crate::disk::{Disk, DiskSpec};

/// A disk, as far as the daemon has got with it.
#[derive(Debug)]
pub(super) enum Slot {
    /// It is served.
    Served(Arc<Served>),
    /// It is remembered, and can't be served.
    Broken(Broken),
    /// It was handed over, and is not served.
    Released(Released),
    /// Somebody is at it: the word says what is being done.
    Taken(DiskSpec, &'static str),
}

/// The files of a disk's chain.
#[derive(Debug)]
pub(super) enum Needs {
    /// Exactly these.
    These(Vec<PathBuf>),
    /// It is not served, so its parents may be any that are named or in the folders that are; and a remark on that.
    Perhaps(DiskSpec, &'static str),
}

/// A disk that can't be served.
#[derive(Debug, Clone)]
pub(super) struct Broken {
    /// Absent when even that could not be read.
    pub(super) record: Option<DiskRecord>,
    pub(super) why: String,
}

/// A disk that is served.
pub(super) struct Served {
    pub(super) disk: Arc<Disk>,
    /// Whether it was opened right after another daemon's release, as that one left it.
    pub(super) as_released: bool,
    /// As it is in the state directory; held while it is replaced there.
    pub(super) record: Mutex<DiskRecord>,
    /// Who works on it; set under the lock of all disks, since a detach looks there.
    pub(super) claim: Mutex<Option<Claim>>,
}

/// What works on a disk and keeps others from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Claim {
    /// A job.
    Job(String),
    /// Something short, in words: "being resized".
    Act(&'static str),
}

impl std::fmt::Debug for Served {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Served")
            .field("record", &self.record)
            .field("claim", &self.claim)
            .finish_non_exhaustive()
    }
}

impl Served {
    pub(super) fn id(&self) -> &str {
        &self.disk.spec().id
    }

    pub(super) fn generation(&self) -> u64 {
        lock(&self.record).generation
    }

    pub(super) fn job(&self) -> Option<String> {
        match &*lock(&self.claim) {
            Some(Claim::Job(job)) => Some(job.clone()),
            _ => None,
        }
    }

    /// Takes the disk for a job or an act. To be called under the lock of all disks.
    ///
    /// # Errors
    /// [`Kind::Busy`] when somebody else has it.
    pub(super) fn claim(&self, claim: Claim) -> Result<(), DaemonError> {
        let mut held = lock(&self.claim);
        if let Some(other) = &*held {
            return Err(other.busy(self.id()));
        }
        *held = Some(claim);
        Ok(())
    }

    /// Lets go of the job, if it is still this one that has the disk.
    pub(super) fn clear_job(&self, job: &str) {
        let mut held = lock(&self.claim);
        if matches!(&*held, Some(Claim::Job(of)) if of == job) {
            *held = None;
        }
    }

    /// The record as it is.
    pub(super) fn record(&self) -> DiskRecord {
        lock(&self.record).clone()
    }

    /// Changes the record in memory once the changed one is durable.
    pub(super) fn change_record(
        &self,
        state: &super::state::StateDir,
        change: impl FnOnce(&mut DiskRecord),
    ) -> std::io::Result<()> {
        let mut record = lock(&self.record);
        let mut changed = record.clone();
        change(&mut changed);
        state.put(&changed)?;
        *record = changed;
        Ok(())
    }

    /// The end of the daemon: closes the disk, or only flushes it when a move works on it.
    pub(super) fn end(&self, moving: bool) {
        let ended = if moving { self.disk.flush() } else { self.disk.stop() };
        match ended {
            Ok(()) => tracing::info!(disk = self.id(), moving, "ended"),
            Err(e) => tracing::error!(disk = self.id(), moving, error = e.message, "did not end cleanly"),
        }
    }

    pub(super) fn info(&self) -> DiskInfo {
        let (disk, spec, stats) = (&self.disk, self.disk.spec(), self.disk.stats());
        let (image, geometry) = (disk.image(), disk.geometry());
        DiskInfo {
            id: spec.id.clone(),
            chain: image.paths().iter().map(|path| text(path)).collect(),
            image: text(&image.path()),
            format: disk.format().to_string(),
            image_type: disk.image_type().to_string(),
            size_bytes: geometry.virtual_size,
            sector_size: geometry.logical_sector_size,
            socket: text(&spec.socket),
            queues: spec.queues,
            read_only: spec.read_only,
            connected: disk.is_connected(),
            generation: self.generation(),
            released: false,
            job: self.job(),
            failed: disk.failed(),
            reads: stats.reads,
            writes: stats.writes,
            flushes: stats.flushes,
            discards: stats.discards,
            read_bytes: stats.read_bytes,
            written_bytes: stats.written_bytes,
            errors: stats.errors,
            latency_us: stats.latency_us(),
        }
    }
}

impl Broken {
    pub(super) fn is_not_served(&self, id: &str) -> DaemonError {
        DaemonError::new(Kind::State, format!("disk {id} is not served: {}", self.why))
    }

    pub(super) fn info(&self, id: &str) -> DiskInfo {
        let record = self.record.as_ref();
        let image = record.map(|r| text(&r.image)).unwrap_or_default();
        DiskInfo {
            id: id.to_owned(),
            chain: record.iter().map(|r| text(&r.image)).collect(),
            image,
            format: record.and_then(|r| r.format).map(|f| f.to_string()).unwrap_or_default(),
            image_type: String::new(),
            size_bytes: 0,
            sector_size: 0,
            socket: record.map(|r| text(&r.spec.socket)).unwrap_or_default(),
            queues: record.map_or(0, |r| r.spec.queues),
            read_only: record.is_some_and(|r| r.spec.read_only),
            connected: false,
            generation: record.map_or(0, |r| r.generation),
            released: false,
            job: None,
            failed: Some(self.why.clone()),
            // Nobody serves it: there is nothing to count.
            ..DiskInfo::default()
        }
    }
}

impl Needs {
    /// Whether the file is among them; what else is to be said of the disk then.
    pub(super) fn include(&self, file: &Path) -> Option<&'static str> {
        match self {
            Self::These(paths) => paths.iter().any(|path| plan::same_file(path, file)).then_some(""),
            Self::Perhaps(spec, told) => {
                let real = file.canonicalize().unwrap_or_else(|_| file.to_owned());
                let is_below = |folder: &Path| folder.canonicalize().is_ok_and(|f| real.starts_with(f));
                let may_be = |parent: &PathBuf| plan::same_file(parent, file) || is_below(parent);
                (plan::same_file(&spec.image, file) || spec.parents.iter().any(may_be)).then_some(*told)
            }
        }
    }
}

impl Claim {
    pub(super) fn busy(&self, disk: &str) -> DaemonError {
        match self {
            Self::Job(job) => DaemonError::new(
                Kind::Busy,
                format!("disk {disk} is being moved by job {job}; wait for its end or cancel it first"),
            ),
            Self::Act(what) => busy(disk, what),
        }
    }
}

/// A short hold on a disk, in which nobody else moves, detaches or changes it.
pub(super) struct Act {
    pub(super) served: Arc<Served>,
}

impl Drop for Act {
    fn drop(&mut self) {
        *lock(&self.served.claim) = None;
    }
}

impl Slot {
    /// What files it needs, as far as that is known.
    pub(super) fn needs(&self) -> Needs {
        match self {
            Self::Served(served) => Needs::These(served.disk.image().paths()),
            Self::Broken(broken) => broken.record.as_ref().map_or_else(
                || Needs::These(Vec::new()),
                |record| Needs::Perhaps(record.serve(), " (not served now; detach it if it is given up)"),
            ),
            Self::Released(released) => Needs::Perhaps(
                released.record.serve(),
                " (released, but it may be taken back; detach it if it is given up)",
            ),
            Self::Taken(spec, _) => Needs::Perhaps(spec.clone(), ""),
        }
    }

    /// Socket and image that it holds or wants.
    pub(super) fn holds(&self) -> Option<(PathBuf, PathBuf)> {
        match self {
            Self::Served(served) => Some((served.disk.spec().socket.clone(), served.disk.image_path())),
            Self::Taken(spec, _) => Some((spec.socket.clone(), spec.image.clone())),
            // Another may take what such a disk would want: that one is not served anyway.
            Self::Broken(_) | Self::Released(_) => None,
        }
    }
}
