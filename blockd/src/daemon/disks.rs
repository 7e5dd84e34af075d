//! Disks that are served: attaching, listing, flushing, detaching.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blockd_api::{AttachRequest, DiskInfo};

use super::admission::{Taking, admit};
use super::error::{DaemonError, Kind};
use super::slot::{Act, Broken, Claim, Served, Slot};
use super::state::DiskRecord;
use super::{Daemon, lock, names};
use crate::disk::{Disk, DiskEvent, DiskEvents, DiskSpec};

/// How long a detach waits for a front end that has just let go.
const DISCONNECT_GRACE: Duration = Duration::from_secs(2);

/// How long a detach waits for those who just look at the disk, or note the end of its move.
const RELEASE_GRACE: Duration = Duration::from_secs(2);

impl Daemon {
    /// Serves a disk and remembers it. A disk that is remembered but could not be served is tried again when its image is
    /// the one that is asked for.
    ///
    /// # Errors
    /// As [`Kind`] has them; nothing is remembered then that was not before.
    pub fn attach(&self, request: &AttachRequest) -> Result<DiskInfo, DaemonError> {
        let spec = requested(request)?;
        let how = request.generation.map_or(Taking::Asked, Taking::Generation);
        let before = self.take_for_attach(&spec, request.generation)?;
        let (known, job) = match &before {
            Some(Slot::Broken(broken)) => (broken.record.clone(), None),
            Some(Slot::Released(released)) => (Some(released.record.clone()), released.job.clone()),
            _ => (None, None),
        };
        // Whoever takes an image over mends what the death of its holder may have left.
        let recover = known.is_some() || request.generation.is_some();
        let record = match known.clone().filter(|old| old.released.is_none()) {
            Some(mut old) => {
                (old.format, old.spec) = (spec.format.or(old.format), spec.clone());
                old
            }
            None => DiskRecord::new(spec.clone()),
        };
        let served = self.serve_for(&record, recover, known.as_ref(), how, job);
        if served.is_err() {
            // As it was, so that the disk may be tried again.
            let mut disks = self.disks();
            match before {
                Some(slot) => disks.insert(spec.id.clone(), slot),
                None => disks.remove(&spec.id),
            };
        }
        Ok(served?.info())
    }

    /// Every disk, by name.
    pub fn list(&self) -> Vec<DiskInfo> {
        let ids: Vec<_> = self.disks().keys().cloned().collect();
        ids.iter().filter_map(|id| self.show(id).ok()).collect()
    }

    /// One disk.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Busy`] while it is attached or detached.
    pub fn show(&self, id: &str) -> Result<DiskInfo, DaemonError> {
        self.settle_job_of(id);
        let not_served = match self.disks().get(id) {
            Some(Slot::Broken(broken)) => Some(broken.info(id)),
            Some(Slot::Released(released)) => {
                let job = released.job.clone().filter(|job| !self.is_over(job));
                Some(DiskInfo { job, ..released.info() })
            }
            _ => None,
        };
        match not_served {
            Some(info) => Ok(info),
            None => Ok(self.find(id)?.info()),
        }
    }

    /// Makes durable what the guest has written so far.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Busy`], [`Kind::State`] for a disk that is not served; what the image says.
    pub fn flush(&self, id: &str) -> Result<(), DaemonError> {
        Ok(self.find(id)?.disk.flush()?)
    }

    /// Ends serving a disk and forgets it. The image stays, closed. Force is needed to take a disk from a front end that
    /// uses it, or from a move, which is cancelled then.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Busy`] when force is needed; what the image says when it can't be closed: the disk is
    /// no longer served then, but listed with the reason.
    pub fn detach(&self, id: &str, force: bool) -> Result<(), DaemonError> {
        if force {
            self.cancel_job_of(id);
        }
        self.settle_job_of(id);
        let stopped = match self.take_for_detach(id, force)? {
            Slot::Served(served) => {
                let record = served.record();
                let stopped = served.disk.stop();
                wait_until_released(served);
                stopped.map_err(|e| (record.clone(), e)).map(|()| Some(record))
            }
            Slot::Broken(broken) => Ok(broken.record),
            // The fence of a released disk is for whoever takes it over.
            Slot::Released(_) | Slot::Taken(..) => Ok(None),
        };
        let freed = match stopped {
            Ok(freed) => freed,
            Err((record, e)) => {
                let e = DaemonError::from(e);
                self.list_as_broken(id, Some(record), e.clone());
                return Err(e);
            }
        };
        freed.iter().for_each(|record| self.free_fence(record));
        let forgotten = self.state.remove(id);
        self.disks().remove(id);
        self.events.push(
            "disk-detached",
            Some(id),
            None,
            if force { "detached by force" } else { "detached" },
        );
        forgotten.map_err(|e| {
            DaemonError::io(
                format!(
                    "disk {id} is detached, but its record {} can't be removed, so it will come back with the next start",
                    self.state.record_path(id).display()
                ),
                &e,
            )
        })
    }

    /// The disk, if it is served.
    pub(super) fn find(&self, id: &str) -> Result<Arc<Served>, DaemonError> {
        match self.disks().get(id) {
            Some(Slot::Served(served)) => Ok(served.clone()),
            Some(Slot::Taken(_, what)) => Err(busy(id, what)),
            Some(Slot::Broken(broken)) => Err(broken.is_not_served(id)),
            Some(Slot::Released(released)) => Err(released.is_released()),
            None => Err(not_found(id)),
        }
    }

    /// Takes a disk for a short while; `what` says what for: "being resized".
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Busy`] when somebody else has it; [`Kind::State`] when it is not served, has failed, or
    /// can't be written.
    pub(super) fn act(&self, id: &str, what: &'static str) -> Result<Act, DaemonError> {
        self.settle_job_of(id);
        let served = self.find(id)?;
        if served.disk.spec().read_only {
            return Err(DaemonError::new(
                Kind::State,
                format!("disk {id} is read-only, and can't be changed"),
            ));
        }
        if let Some(why) = served.disk.failed() {
            return Err(DaemonError::new(Kind::State, format!("disk {id} has failed: {why}")));
        }
        let disks = self.disks();
        if !matches!(disks.get(id), Some(Slot::Served(s)) if Arc::ptr_eq(s, &served)) {
            return Err(busy(id, "being detached"));
        }
        served.claim(Claim::Act(what))?;
        Ok(Act { served: served.clone() })
    }

    /// Every disk that is served.
    pub(super) fn served(&self) -> Vec<Arc<Served>> {
        let served = |slot: &Slot| match slot {
            Slot::Served(served) => Some(served.clone()),
            _ => None,
        };
        self.disks().values().filter_map(served).collect()
    }

    /// Remembers the disk and serves it, if its fence allows that. `known` is the record of a disk that was remembered before.
    pub(super) fn serve(
        &self,
        record: &DiskRecord,
        recover: bool,
        known: Option<&DiskRecord>,
        how: Taking,
    ) -> Result<Arc<Served>, DaemonError> {
        self.serve_for(record, recover, known, how, None)
    }

    /// The same while a job has the disk. Remembered first: a guest may write as soon as the socket is there, and counts on
    /// finding the disk again after a crash.
    pub(super) fn serve_for(
        &self,
        record: &DiskRecord,
        recover: bool,
        known: Option<&DiskRecord>,
        how: Taking,
        job: Option<String>,
    ) -> Result<Arc<Served>, DaemonError> {
        let id = &record.spec.id;
        self.check_not_held(&record.serve())?;
        let (record, admitted) = admit(&self.state, record, how)?;
        let opened = self
            .take_write_cache(id, admitted.write_through_from(self.state.id()))
            .and_then(|()| self.remember(&record))
            .and_then(|()| self.open(&record, recover, admitted.follows_release()));
        let served = match opened {
            Ok(served) => served,
            Err(e) => {
                // At worst it is listed as a disk that can't be served after the next start.
                let _ = match known {
                    Some(known) => self.state.put(known),
                    None => self.state.remove(id),
                };
                admitted.undo(&self.state);
                return Err(e);
            }
        };
        *lock(&served.claim) = job.map(Claim::Job);
        self.disks().insert(id.clone(), Slot::Served(served.clone()));
        let (image, socket) = (served.disk.image_path(), record.spec.socket.display());
        let message = format!("{} is served on {socket}", image.display());
        self.events.push("disk-attached", Some(id), None, message);
        Ok(served)
    }

    /// A guest that comes with its disk from another daemon has its write cache as it had it there.
    fn take_write_cache(&self, id: &str, write_through: Option<bool>) -> Result<(), DaemonError> {
        let Some(off) = write_through else { return Ok(()) };
        self.state.set_write_through(id, off).map_err(|e| self.not_remembered(id, &e))
    }

    fn open(
        &self,
        record: &DiskRecord,
        recover: bool,
        as_released: bool,
    ) -> Result<Arc<Served>, DaemonError> {
        let id = &record.spec.id;
        let cache_on = !self.state.is_write_through(id);
        let record = &self.settle_snapshot(record)?;
        let notes_dir = self.state.notes_dir();
        let disk = Disk::start(record.serve(), recover, cache_on, Some(&notes_dir), self.disk_events(id))?;
        let format = disk.format();
        let (record_now, claim) = (Mutex::new(record.clone()), Mutex::default());
        let served = Arc::new(Served { disk, as_released, record: record_now, claim });
        if record.format != Some(format) {
            served.change_record(&self.state, |r| r.format = Some(format)).map_err(|e| {
                let _ = served.disk.stop();
                self.not_remembered(&record.spec.id, &e)
            })?;
        }
        Ok(served)
    }

    pub(super) fn remember(&self, record: &DiskRecord) -> Result<(), DaemonError> {
        self.state.put(record).map_err(|e| self.not_remembered(&record.spec.id, &e))
    }

    fn not_remembered(&self, id: &str, e: &std::io::Error) -> DaemonError {
        let path = self.state.record_path(id);
        DaemonError::io(
            format!("disk {id} can't be remembered in {}, so it is not served", path.display()),
            e,
        )
    }

    fn disk_events(&self, id: &str) -> DiskEvents {
        let (events, state, id) = (self.events.clone(), self.state.clone(), id.to_owned());
        // Called from the threads that serve guests, so nothing is written to the log here: whoever reads that may stall.
        Arc::new(move |event| {
            let (kind, message) = match event {
                DiskEvent::Connected => {
                    ("disk-connected", "a front end is connected and its rings run".to_owned())
                }
                DiskEvent::Disconnected => ("disk-disconnected", "the front end is gone".to_owned()),
                DiskEvent::Failed(why) => ("disk-failed", why),
                DiskEvent::WriteCache(on) => {
                    return state
                        .set_write_through(&id, !on)
                        .map_err(|e| format!("the write cache's state cannot be remembered: {e}"));
                }
            };
            events.push(kind, Some(&id), None, message);
            Ok(())
        })
    }

    /// Lists a disk that can't be served, with the reason.
    pub(super) fn list_as_broken(&self, id: &str, record: Option<DiskRecord>, e: DaemonError) {
        self.events.push("disk-failed", Some(id), None, e.message.clone());
        self.disks().insert(id.to_owned(), Slot::Broken(Broken { record, why: e.message }));
    }

    /// Holds the name for a disk to be attached; answers what was there of it.
    fn take_for_attach(&self, spec: &DiskSpec, generation: Option<u64>) -> Result<Option<Slot>, DaemonError> {
        let mut disks = self.disks();
        let id = &spec.id;
        let exists = |message: String| Err(DaemonError::new(Kind::Exists, message));
        match disks.get(id) {
            None => {}
            Some(Slot::Served(_)) => {
                return exists(format!("disk {id} exists; choose another name, or detach that one first"));
            }
            Some(Slot::Taken(_, what)) => return Err(busy(id, what)),
            Some(Slot::Released(released)) => match generation {
                Some(asked) if asked > released.record.generation => {}
                Some(asked) => {
                    let message = format!(
                        "generation {asked} is stale: disk {id} was released here with generation {}; take it back with \
                         `blockctl disk reclaim {id}`, or attach it with the number of a later release",
                        released.record.generation
                    );
                    return Err(DaemonError::new(Kind::State, message));
                }
                None => return exists(released.is_released().message),
            },
            Some(Slot::Broken(broken)) => match &broken.record {
                Some(record) if record.image == spec.image => {
                    if let Some(asked) = generation.filter(|asked| *asked < record.generation) {
                        let message = format!(
                            "generation {asked} is stale: disk {id} has generation {} here already; attach it with the number of a later \
                             release",
                            record.generation
                        );
                        return Err(DaemonError::new(Kind::State, message));
                    }
                }
                _ => {
                    return exists(format!(
                        "disk {id} is remembered, but not served: {}; detach it first",
                        broken.why
                    ));
                }
            },
        }
        Ok(disks.insert(id.clone(), Slot::Taken(spec.clone(), "being attached")))
    }

    /// Takes the disk out of service's reach; what was in the slot is the caller's.
    fn take_for_detach(&self, id: &str, force: bool) -> Result<Slot, DaemonError> {
        let give_up = Instant::now() + DISCONNECT_GRACE;
        loop {
            let mut disks = self.disks();
            let slot = disks.get_mut(id).ok_or_else(|| not_found(id))?;
            match slot {
                Slot::Taken(_, what) => return Err(busy(id, what)),
                Slot::Broken(_) => {}
                Slot::Released(released) => {
                    // Its journal still names the disk, which must not become another one meanwhile.
                    if let Some(job) = released.job.as_ref().filter(|job| !self.is_over(job)) {
                        if Instant::now() < give_up {
                            drop(disks);
                            std::thread::sleep(Duration::from_millis(20));
                            continue;
                        }
                        return Err(Claim::Job(job.clone()).busy(id));
                    }
                }
                Slot::Served(served) => {
                    let claim = lock(&served.claim).clone();
                    if let Some(Claim::Job(job)) = claim {
                        return Err(DaemonError::new(
                            Kind::Busy,
                            format!("disk {id} is being moved by job {job}; cancel that first, or use force"),
                        ));
                    }
                    let in_use = !force && served.disk.is_connected();
                    if in_use || claim.is_some() {
                        if Instant::now() < give_up {
                            drop(disks);
                            std::thread::sleep(Duration::from_millis(20));
                            continue;
                        }
                        if let Some(act) = claim {
                            return Err(act.busy(id));
                        }
                        return Err(DaemonError::new(
                            Kind::Busy,
                            format!(
                                "disk {id} is used by a front end; shut the guest down first, or use force"
                            ),
                        ));
                    }
                }
            }
            let spec = match slot {
                Slot::Served(served) => {
                    DiskSpec { image: served.disk.image_path(), ..served.disk.spec().clone() }
                }
                _ => placeholder(id),
            };
            return Ok(std::mem::replace(slot, Slot::Taken(spec, "being detached")));
        }
    }

    /// No two disks share an image or a socket, and none takes the API's.
    fn check_not_held(&self, spec: &DiskSpec) -> Result<(), DaemonError> {
        let taken = |what: &str, path: &Path, by: &str| {
            let path = path.display();
            let message = format!("disk {}: the {what} {path} is used by {by}; choose another one", spec.id);
            Err(DaemonError::new(Kind::Exists, message))
        };
        if spec.socket == self.api_socket {
            return taken("socket", &spec.socket, "the control API");
        }
        for (id, slot) in self.disks().iter().filter(|(id, _)| **id != spec.id) {
            match slot.holds() {
                Some((socket, _)) if socket == spec.socket => {
                    return taken("socket", &socket, &format!("disk {id}"));
                }
                Some((_, image)) if image == spec.image => {
                    return taken("image", &image, &format!("disk {id}"));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Waits until nobody else looks at a disk that was stopped: until then its image stays open and locked, and whoever
/// takes it next would be refused.
fn wait_until_released(served: Arc<Served>) {
    let give_up = Instant::now() + RELEASE_GRACE;
    while Arc::strong_count(&served) + Arc::strong_count(&served.disk) > 2 && Instant::now() < give_up {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What a slot holds whose disk was not served.
fn placeholder(id: &str) -> DiskSpec {
    DiskSpec {
        id: id.to_owned(),
        image: PathBuf::new(),
        socket: PathBuf::new(),
        format: None,
        queues: 0,
        io_threads: 0,
        read_only: false,
        parents: Vec::new(),
    }
}

fn requested(request: &AttachRequest) -> Result<DiskSpec, DaemonError> {
    let spec = DiskSpec {
        id: request.id.clone(),
        image: request.image.clone().into(),
        socket: request.socket.clone().into(),
        format: request.format.as_deref().map(names::parse_format).transpose()?,
        queues: request.queues,
        io_threads: request.io_threads,
        read_only: request.read_only,
        parents: request.parents.iter().map(PathBuf::from).collect(),
    };
    names::check_spec(&spec)?;
    if let Some(generation) = request.generation.filter(|&generation| generation > names::GENERATION_MAX) {
        return Err(DaemonError::invalid(format!(
            "disk {}: generation {generation} is no number of a handover; those go to {}",
            spec.id,
            names::GENERATION_MAX
        )));
    }
    match spec.image.metadata() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let message = format!("disk {}: there is no image {}; create it first", spec.id, request.image);
            Err(DaemonError::new(Kind::NotFound, message))
        }
        _ => Ok(spec),
    }
}

pub(super) fn not_found(id: &str) -> DaemonError {
    DaemonError::new(
        Kind::NotFound,
        format!("there is no disk {id:?}; `blockctl disk list` shows those that are"),
    )
}

pub(super) fn busy(id: &str, what: &str) -> DaemonError {
    DaemonError::new(Kind::Busy, format!("disk {id} is {what}; try again when that is done"))
}

pub(super) fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
