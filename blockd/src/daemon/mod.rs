//! The daemon around the data path: which disks are served, how they come back after a crash, and how clients drive it.
//!
//! ```text
//!   main ─► config ─► server ──── signals, systemd, the API's socket
//!                       │
//!              api ─► Daemon ─► disks ─► crate::disk      attach, detach, show, flush
//!                       │  ├──► handover ─► fence          from one daemon to another
//!                       │  └──► jobs  ─► crate::mover     moves and their verbs
//!                       ├─► state    records that survive a power cut
//!                       └─► events, metrics
//! ```
//!
//! [`Daemon`] is plain blocking code: the API calls it from threads that may wait. No lock is held while a disk or a move
//! is opened, stopped or waited for; whatever is under way on a disk holds that disk's slot instead.
//!
//! This room must not know how an image lays out its bytes, nor what a ring is.

mod admission;
pub mod api;
pub mod clock;
pub mod config;
mod crash;
mod disks;
pub mod error;
pub mod events;
pub mod fence;
mod handover;
mod jobs;
pub mod metrics;
pub mod names;
mod openapi;
mod plan;
mod recall;
pub mod server;
mod slot;
mod snapshot;
pub mod state;
mod system;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::mover;
use admission::Taking;
use config::Asked;
use error::DaemonError;
use events::Events;
use handover::Released;
use jobs::Jobs;
use recall::{Origin, Start};
use slot::Slot;
use state::StateDir;

pub use jobs::Verb;

/// All that a daemon serves and does.
#[derive(Debug)]
pub struct Daemon {
    state: Arc<StateDir>,
    /// No disk may take it.
    api_socket: PathBuf,
    events: Arc<Events>,
    disks: Mutex<BTreeMap<String, Slot>>,
    jobs: Mutex<Jobs>,
    /// Held while targets are looked at and moves to them are started: two that ask at once must not both find a name
    /// free.
    starting: Mutex<()>,
}

impl Daemon {
    /// Brings up everything: finishes or undoes what journals of moves say, serves the disks that are remembered or asked
    /// for, and starts the moves again that were under way. A disk that can't be served is listed with the reason, and
    /// the others come up.
    ///
    /// # Errors
    /// When the state directory can't be read, or a disk that was typed just now and never served before can't be
    /// served.
    pub fn start(state: StateDir, api_socket: &Path, asked: Vec<Asked>) -> Result<Arc<Self>, DaemonError> {
        let recovered = mover::recover(&state.moves_dir(), &|disk, image| state.adopt(disk, image))?;
        let starts = recall::recall(state.disks()?, recovered.images, asked);
        let (jobs, forgotten) = Jobs::remembered(recovered.jobs);
        forgotten.iter().for_each(|job| state.forget_job(job));
        let daemon = Arc::new(Self {
            state: Arc::new(state),
            api_socket: api_socket.to_owned(),
            events: Arc::default(),
            starting: Mutex::default(),
            disks: Mutex::default(),
            jobs: Mutex::new(jobs),
        });
        daemon.bring_up(starts)?;
        for plan in recovered.restart {
            daemon.restart_move(plan);
        }
        Ok(daemon)
    }

    /// The events so far and to come.
    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }

    /// Ends cleanly: every disk that no move works on is drained and closed. A disk that is being moved is flushed and
    /// left to the end of the process, as after a crash: so its move is taken up at the next start.
    pub fn stop(&self) {
        self.events.close();
        let moving = self.moving_disks();
        std::thread::scope(|scope| {
            for served in self.served() {
                let moving = moving.contains(&served.id().to_owned());
                // Each in its own thread: a disk whose storage hangs must not keep the others from closing.
                scope.spawn(move || served.end(moving));
            }
        });
    }

    /// Serves what [`recall`] has put together: first what was asked for, since that is what somebody waits for.
    fn bring_up(&self, starts: BTreeMap<String, Start>) -> Result<(), DaemonError> {
        let remembered = |start: &Start| matches!(start, Start::Serve { origin: Origin::Remembered, .. });
        let (then, first): (Vec<_>, Vec<_>) = starts.into_iter().partition(|(_, start)| remembered(start));
        for (id, start) in first.into_iter().chain(then) {
            match start {
                Start::Unknown(e) => self.list_as_broken(&id, None, e),
                Start::Released(record) => self.list_as_released(record),
                Start::Serve { mut record, recover, origin } => {
                    let how = if recover { Taking::Remembered } else { Taking::Asked };
                    let is_released =
                        if origin.is_known() { self.finish_release(&mut record) } else { Ok(false) };
                    let served = match is_released {
                        Ok(true) => {
                            self.list_as_released(record);
                            continue;
                        }
                        Ok(false) => self.serve(&record, recover, origin.is_known().then_some(&record), how),
                        Err(e) => Err(e),
                    };
                    match served {
                        Ok(_) => {}
                        Err(e) if origin == Origin::Typed => {
                            self.stop();
                            return Err(DaemonError::new(e.kind, format!("disk {id} can't be served: {e}")));
                        }
                        Err(e) => self.list_as_broken(&id, Some(record), e),
                    }
                }
            }
        }
        Ok(())
    }

    fn list_as_released(&self, record: state::DiskRecord) {
        let id = record.spec.id.clone();
        tracing::info!(disk = id, generation = record.generation, "released for another daemon: not served");
        self.disks().insert(id, Slot::Released(Released { record, job: None }));
    }

    fn disks(&self) -> MutexGuard<'_, BTreeMap<String, Slot>> {
        lock(&self.disks)
    }

    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        lock(&self.jobs)
    }
}

/// Nothing under these locks is left half done by a panic, so a poisoned one is as good.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
