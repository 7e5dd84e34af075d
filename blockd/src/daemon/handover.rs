//! Handing a disk over to another daemon, and taking it back.
//!
//! A release, and what the daemon finds when it starts again after it died behind each step:
//!
//! ```text
//!                                                the fence says      a restart
//!   1. rings stopped, the image closed           held by us, none    serves the disk as before
//!   2. the fence is replaced                     released, G         lists it as released; so may it be taken over already,
//!                                                                    by whoever guesses the number
//!   3. the record is replaced: released          the same            the same
//!   4. answered                                  the same            the same; the handover's number is G + 1
//! ```
//!
//! Taking over, or back:
//!
//! ```text
//!   1. the fence is replaced                     held by us, G + 1   knows nothing of the disk yet (or lists it as released); asking
//!                                                                    again, with the same number, goes on from here
//!   2. the record is replaced                    the same            serves the disk
//!   3. the image opened, the socket bound        the same            the same
//! ```
//!
//! The fence decides alone ([`super::fence`]); the record follows. What fails behind step 1 of a take-over is undone, the
//! record first: so the image is nobody's only while the fence still says that it is ours.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockd_api::{DiskInfo, Handover};

use super::admission::Taking;
use super::disks::{busy, not_found, text};
use super::error::{DaemonError, Kind};
use super::fence::{self, Fence, Hold, Next, ReleasedDisk};
use super::slot::{Claim, Served, Slot};
use super::state::{DiskRecord, StateDir};
use super::{Daemon, lock};
use crate::disk::DiskSpec;

/// How long a release waits at least for a front end that has just let go, and for a committed move to put its target in place.
const RELEASE_GRACE: Duration = Duration::from_secs(2);
/// The longest that a release may be asked to wait.
pub(super) const RELEASE_WAIT_MAX: Duration = Duration::from_secs(600);
const PAUSE: Duration = Duration::from_millis(2);

/// A disk that was released.
#[derive(Debug, Clone)]
pub(super) struct Released {
    pub(super) record: DiskRecord,
    /// A move that still tidies up behind the disk.
    pub(super) job: Option<String>,
}

impl Released {
    pub(super) fn info(&self) -> DiskInfo {
        let record = &self.record;
        let disk = record.released.as_ref();
        DiskInfo {
            id: record.spec.id.clone(),
            image: text(&record.image),
            chain: disk.map(|d| d.chain.iter().map(|path| text(path)).collect()).unwrap_or_default(),
            format: record.format.map(|f| f.to_string()).unwrap_or_default(),
            image_type: disk.map(|d| d.image_type.clone()).unwrap_or_default(),
            size_bytes: disk.map_or(0, |d| d.size_bytes),
            sector_size: disk.map_or(0, |d| d.sector_size),
            socket: text(&record.spec.socket),
            queues: record.spec.queues,
            read_only: record.spec.read_only,
            connected: false,
            generation: record.generation,
            released: true,
            job: self.job.clone(),
            failed: None,
            // Nobody serves it: there is nothing to count.
            ..DiskInfo::default()
        }
    }

    fn handover(&self) -> Handover {
        let info = self.info();
        Handover {
            write_cache: !self.record.released.as_ref().is_some_and(|disk| disk.write_through),
            io_threads: self.record.spec.io_threads,
            generation: info.generation + 1,
            id: info.id,
            image: info.image,
            chain: info.chain,
            format: info.format,
            size_bytes: info.size_bytes,
            sector_size: info.sector_size,
            queues: info.queues,
            read_only: info.read_only,
        }
    }

    pub(super) fn is_released(&self) -> DaemonError {
        let DiskRecord { spec, generation, .. } = &self.record;
        DaemonError::new(
            Kind::State,
            format!(
                "disk {id} was released with generation {generation} and is not served; take it back with `blockctl disk reclaim {id}`, \
                 or forget it with `blockctl disk detach {id}`",
                id = spec.id
            ),
        )
    }
}

/// What a release found in the disk's slot.
enum Found {
    Served(Arc<Served>, Option<String>),
    Released(Box<Released>),
}

impl Daemon {
    /// Ends serving a disk so that another daemon can: everything that was acknowledged is durable, the image and its parents
    /// are closed, and that is remembered. A disk that was released before answers the same again.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Busy`] for a disk whose front end runs its rings (unless `force`), and for one that is moved
    /// and does not get out of that within `wait`; [`Kind::State`] for one that is not served or has failed; [`Kind::Locked`]
    /// when somebody else has taken the image; what closing the image says.
    pub fn release(&self, id: &str, force: bool, wait: Duration) -> Result<Handover, DaemonError> {
        let (served, job) = match self.take_for_release(id, force, wait.min(RELEASE_WAIT_MAX))? {
            Found::Served(served, job) => (served, job),
            Found::Released(released) => return self.release_again(*released),
        };
        if let Err(e) = served.disk.stop() {
            let e = DaemonError::from(e);
            self.list_as_broken(id, Some(served.record()), e.clone());
            return Err(e);
        }
        let record = match self.close_snapshot(&served).and_then(|record| self.write_release(&served, record))
        {
            Ok(record) => record,
            Err(e) => return Err(self.serve_on(&served, e)),
        };
        // Not before: until the fence stands, the lock is what keeps others off.
        if let Err(e) = served.disk.let_go() {
            tracing::warn!(disk = id, error = e.message, "the image stays locked until its files are closed");
        }
        drop(served);
        let released = Released { record, job };
        let handover = released.handover();
        self.disks().insert(id.to_owned(), Slot::Released(released.clone()));
        self.events.push(
            "disk-released",
            Some(id),
            None,
            format!("released for generation {}", handover.generation),
        );
        // The fence has decided; a record that can't follow now does so at the next start.
        self.remember(&released.record)?;
        Ok(handover)
    }

    /// Serves a disk again that was released here. One that is served already stays so: who asks again because an answer was lost,
    /// or does not know whether a release came to its end, has what he wants.
    ///
    /// Who took it over with the handover's number and released it unused has given it back.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Busy`] while it is released or attached; [`Kind::State`] for a disk that can't be served;
    /// [`Kind::Locked`] when somebody else has taken the image; what opening it says. It stays released then.
    pub fn reclaim(&self, id: &str) -> Result<DiskInfo, DaemonError> {
        self.settle_job_of(id);
        let released = {
            let mut disks = self.disks();
            let slot = disks.get_mut(id).ok_or_else(|| not_found(id))?;
            match slot {
                Slot::Released(released) => {
                    let released = released.clone();
                    *slot = Slot::Taken(released.record.spec.clone(), "being taken back");
                    released
                }
                Slot::Taken(_, what) => return Err(busy(id, what)),
                Slot::Served(served) => return Ok(served.info()),
                Slot::Broken(broken) => return Err(broken.is_not_served(id)),
            }
        };
        let known = Some(&released.record);
        match self.serve_for(&released.record, true, known, Taking::Reclaimed, released.job.clone()) {
            Ok(served) => {
                let message = format!("taken back with generation {}", served.generation());
                self.events.push("disk-reclaimed", Some(id), None, message);
                Ok(served.info())
            }
            Err(e) => {
                self.disks().insert(id.to_owned(), Slot::Released(released));
                Err(e)
            }
        }
    }

    /// Takes the disk out of service's reach once nothing stands against its release.
    fn take_for_release(&self, id: &str, force: bool, wait: Duration) -> Result<Found, DaemonError> {
        let begun = Instant::now();
        let mut is_checked = false;
        loop {
            self.settle_job_of(id);
            // The storage of a fence may hang, so it is looked at without the lock.
            if !std::mem::replace(&mut is_checked, true) {
                self.check_releasable(id)?;
            }
            let mut disks = self.disks();
            let slot = disks.get_mut(id).ok_or_else(|| not_found(id))?;
            let served = match slot {
                Slot::Taken(_, what) => return Err(busy(id, what)),
                Slot::Broken(broken) => return Err(broken.is_not_served(id)),
                Slot::Released(released) => {
                    let released = released.clone();
                    *slot = Slot::Taken(released.record.spec.clone(), "being released");
                    return Ok(Found::Released(Box::new(released)));
                }
                Slot::Served(served) => served.clone(),
            };
            if let Some(why) = served.disk.failed() {
                let message = format!(
                    "disk {id} has failed and can't be released: {why}; detach it, and attach it again"
                );
                return Err(DaemonError::new(Kind::State, message));
            }
            let claim = lock(&served.claim).clone();
            let (job, in_the_way) = self.stands_against(&served, claim, force);
            let Some((e, grace)) = in_the_way else {
                let spec = DiskSpec { image: served.disk.image_path(), ..served.disk.spec().clone() };
                *slot = Slot::Taken(spec, "being released");
                return Ok(Found::Served(served, job));
            };
            drop(disks);
            if begun.elapsed() >= wait.max(grace) {
                return Err(e);
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// A move that goes on behind the disk's back when it is released, and what keeps it from being released; with the time
    /// that this deserves in any case.
    fn stands_against(
        &self,
        served: &Served,
        claim: Option<Claim>,
        force: bool,
    ) -> (Option<String>, Option<(DaemonError, Duration)>) {
        let id = served.id();
        let job = match claim {
            None => None,
            Some(Claim::Act(what)) => return (None, Some((busy(id, what), RELEASE_GRACE))),
            Some(Claim::Job(job)) => {
                if !self.has_let_go(&job) {
                    let state = self.job(&job).map(|job| job.state).unwrap_or_default();
                    let grace = if state == "committed" { RELEASE_GRACE } else { Duration::ZERO };
                    let message = format!(
                        "disk {id} is being moved by job {job}, which is {state}; cancel it, or switch it over and wait for its commit"
                    );
                    return (None, Some((DaemonError::new(Kind::Busy, message), grace)));
                }
                Some(job)
            }
        };
        if !force && served.disk.is_connected() {
            let message = format!(
                "disk {id} is used by a front end; pause the guest, so that its rings stop, or use force"
            );
            return (job, Some((DaemonError::new(Kind::Busy, message), RELEASE_GRACE)));
        }
        (job, None)
    }

    /// Whether somebody else has the image, before anything is stopped for it.
    fn check_releasable(&self, id: &str) -> Result<(), DaemonError> {
        let Ok(served) = self.find(id) else { return Ok(()) };
        let record = served.record();
        self.next_for_release(&record, fence::read(&served.disk.image_path())?.as_ref()).map(drop)
    }

    /// With which number the disk is released; `None` when that was written before.
    fn next_for_release(&self, record: &DiskRecord, now: Option<&Fence>) -> Result<Option<u64>, DaemonError> {
        let known = record.generation;
        match now {
            None => Ok(Some(known)),
            Some(fence) if fence.is_of(self.state.id()) && fence.state == Hold::Released => Ok(None),
            Some(fence) if fence.is_of(self.state.id()) || fence.state == Hold::Free => {
                Ok(Some(known.max(fence.generation)))
            }
            Some(fence) => {
                let message = format!(
                    "disk {} can't be released: {} was taken by {} with generation {}; stop the guest here, and detach the disk",
                    record.spec.id,
                    record.image.display(),
                    fence.by,
                    fence.generation
                );
                Err(DaemonError::new(Kind::Locked, message))
            }
        }
    }

    /// Says beside the image that it is released. The record that comes back says so too, but is not durable yet.
    fn write_release(&self, served: &Served, mut record: DiskRecord) -> Result<DiskRecord, DaemonError> {
        let (id, geometry) = (&record.spec.id.clone(), served.disk.geometry());
        let disk = ReleasedDisk {
            chain: served.disk.image().paths(),
            image_type: served.disk.image_type().to_string(),
            size_bytes: geometry.virtual_size,
            sector_size: geometry.logical_sector_size,
            write_through: self.state.is_write_through(id),
            unused: served.as_released && !served.disk.was_used(),
        };
        record.released = Some(disk);
        // Readers share an image: there is nothing to keep each other off.
        if !record.spec.read_only || record.fenced {
            record.generation = self.put_released(&record)?;
            record.fenced = true;
        }
        Ok(record)
    }

    /// Puts the fence of a released disk in place; answers its number.
    fn put_released(&self, record: &DiskRecord) -> Result<u64, DaemonError> {
        let mut number = record.generation;
        fence::change(&record.image, self.state.id(), |now| {
            let Some(next) = self.next_for_release(record, now)? else {
                number = now.map_or(number, |fence| fence.generation);
                return Ok(Next::Leave);
            };
            number = next;
            let mut fence = Fence::new(next, Hold::Released, self.state.holder(&record.spec.id));
            fence.disk.clone_from(&record.released);
            Ok(Next::Put(fence))
        })?;
        Ok(number)
    }

    /// Closes what a snapshot that went wrong has left open.
    fn close_snapshot(&self, stopped: &Served) -> Result<DiskRecord, DaemonError> {
        let record = stopped.record();
        if record.settling.is_some() {
            // It is opened once more, for writing.
            stopped.disk.let_go()?;
        }
        self.settle_snapshot(&record)
    }

    /// The release could not be written: the disk goes on here, as far as that is possible.
    fn serve_on(&self, stopped: &Served, e: DaemonError) -> DaemonError {
        let record = stopped.record();
        let id = record.spec.id.clone();
        if let Err(e) = stopped.disk.let_go() {
            tracing::warn!(disk = id, error = e.message, "the image stays locked");
        }
        match self.serve_for(&record, true, Some(&record), Taking::Resumed, None) {
            Ok(_) => {
                DaemonError::new(e.kind, format!("disk {id} was not released, and is served as before: {e}"))
            }
            Err(again) => {
                let e = DaemonError::new(
                    e.kind,
                    format!("disk {id} was not released ({e}), and can't be served again: {again}"),
                );
                self.list_as_broken(&id, Some(record), e.clone());
                e
            }
        }
    }

    /// Answers once more what a released disk was released as. What an interrupted reclaim has left is undone.
    fn release_again(&self, mut released: Released) -> Result<Handover, DaemonError> {
        let id = released.record.spec.id.clone();
        let me = self.state.id();
        let mut number = released.record.generation;
        let changed = if released.record.fenced {
            fence::change(&released.record.image, me, |now| {
                Ok(match now {
                    Some(fence) if fence.is_of(me) && fence.state == Hold::Held => {
                        number = number.max(fence.generation);
                        let mut fence = Fence::new(number, Hold::Released, self.state.holder(&id));
                        fence.disk.clone_from(&released.record.released);
                        Next::Put(fence)
                    }
                    _ => Next::Leave,
                })
            })
            .map(drop)
        } else {
            Ok(())
        };
        if changed.is_ok() {
            released.record.generation = number;
        }
        let answer = changed.and_then(|()| self.remember(&released.record)).map(|()| released.handover());
        self.disks().insert(id, Slot::Released(released));
        answer
    }

    /// Whether the last run of the daemon had released the disk and was not able to note it. Then the record says so now.
    pub(super) fn finish_release(&self, record: &mut DiskRecord) -> Result<bool, DaemonError> {
        if record.released.is_some() {
            return Ok(true);
        }
        let Some(fence) = fence::read(&record.image)? else { return Ok(false) };
        let was_released = fence.is_of(self.state.id())
            && fence.by.disk == record.spec.id
            && fence.state == Hold::Released
            && fence.generation >= record.generation;
        if !was_released {
            return Ok(false);
        }
        (record.released, record.generation, record.fenced) = (fence.disk, fence.generation, true);
        self.remember(record)?;
        Ok(true)
    }

    /// Says beside the image of a disk that is detached that anybody may take it, if it was ours.
    pub(super) fn free_fence(&self, record: &DiskRecord) {
        self.state.free_image(&record.image, record.generation);
    }
}

impl StateDir {
    /// A disk of ours is to be another image: if there is a fence beside that, it is ours from now on, whoever left it there.
    /// Answers whether there is one.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn hold_new_image(
        &self,
        disk: &str,
        image: &Path,
        generation: u64,
    ) -> Result<bool, DaemonError> {
        let before = fence::change(image, self.id(), |now| {
            Ok(now.map_or(Next::Leave, |now| {
                let number = generation.max(now.generation + u64::from(!now.is_of(self.id())));
                Next::Put(Fence::new(number, Hold::Held, self.holder(disk)))
            }))
        })?;
        Ok(before.is_some())
    }

    /// An image is not ours any more: if it has a fence that says so, anybody may take it.
    pub(super) fn free_image(&self, image: &Path, generation: u64) {
        let freed = fence::change(image, self.id(), |now| {
            Ok(match now {
                Some(now) if now.is_of(self.id()) && now.state == Hold::Held => {
                    let number = generation.max(now.generation);
                    Next::Put(Fence::new(number, Hold::Free, now.by.clone()))
                }
                _ => Next::Leave,
            })
        });
        if let Err(e) = freed {
            tracing::warn!(image = %image.display(), error = e.message, "the image still has a fence that says it is held here");
        }
    }

    /// A disk has become another image: the old one, if it had a fence, is free.
    pub(super) fn free_old_image(&self, old: &DiskRecord, generation: u64) {
        if old.fenced {
            self.free_image(&old.image, generation);
        }
    }
}

#[cfg(test)]
mod tests;
