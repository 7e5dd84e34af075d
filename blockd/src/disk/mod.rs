//! A disk: an image (two while it is moved), the workers that serve it, the socket that front ends connect to.

pub mod counters;
pub mod exchange;
pub mod handle;
pub mod route;
pub mod shared;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use formats::{ErrorKind, Format, Geometry, ImageType};
use serde::{Deserialize, Serialize};

pub use counters::DiskStats;
use handle::{ImageHandle, OpenImage};
use route::Route;
use shared::DiskShared;

use crate::vhost::listener::Listener;
use crate::worker::mailbox::Mailbox;
use crate::worker::{Limits, WorkerHandle};

/// Most queues of a disk.
pub const QUEUES_MAX: u16 = 64;
/// Most bytes of one discard or write zeroes: 2 GiB.
const ZERO_BYTES_MAX: u64 = 2 << 30;
/// How long a flush waits before it looks again whether requests are still held up.
const HELD_PAUSE: Duration = Duration::from_millis(1);

/// What a disk is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Its name.
    pub id: String,
    /// Path of the image.
    pub image: PathBuf,
    /// Path of the vhost-user socket.
    pub socket: PathBuf,
    /// The image's format; from its name when absent.
    pub format: Option<Format>,
    /// Most queues that a front end may use, 1 to 64.
    pub queues: u16,
    /// Threads that serve them, 1 to `queues`.
    pub io_threads: u16,
    /// Writes are refused.
    pub read_only: bool,
    /// Files that may be parents of the image, and folders in which they may be.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parents: Vec<PathBuf>,
}

/// What happens to a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskEvent {
    /// A front end's rings run.
    Connected,
    /// No front end's rings run any more.
    Disconnected,
    /// The disk cannot be written any more.
    Failed(String),
    /// The guest has switched the write cache on or off. To be remembered durably; an error refuses it.
    WriteCache(bool),
}

/// Told of what happens to a disk, from any of its threads; must not block, but for what has to be remembered.
pub type DiskEvents = Arc<dyn Fn(DiskEvent) -> Result<(), String> + Send + Sync>;

/// Why something could not be done to a disk.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct DiskError {
    /// What to match on.
    pub kind: ErrorKind,
    /// What happened and what to do.
    pub message: String,
}

impl DiskError {
    /// An error of `kind`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// A disk that is served.
pub struct Disk {
    spec: DiskSpec,
    shared: Arc<DiskShared>,
    notes_dir: Option<PathBuf>,
    running: Mutex<Option<Running>>,
    /// Held while the image is exchanged, or the disk stopped.
    exchanging: Mutex<()>,
    mailboxes: Vec<Arc<Mailbox>>,
}

/// The threads of a disk, as far as they were started; gone once it was stopped. Fields end in this order.
#[derive(Default)]
struct Running {
    listener: Option<Listener>,
    workers: Vec<WorkerHandle>,
    maintenance: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("spec", &self.spec).finish_non_exhaustive()
    }
}

impl Disk {
    /// Opens the image, binds the socket and starts to serve. `recover` mends what a crash of ours can leave behind.
    /// `cache_on` is the write cache as the guest left it: on, unless it was remembered otherwise. `notes_dir` is the folder
    /// in which differencing images note what a crash must not lose.
    ///
    /// # Errors
    /// What opening the image says; a socket that is in use or cannot be bound; no ring or thread to be had.
    pub fn start(
        spec: DiskSpec,
        recover: bool,
        cache_on: bool,
        notes_dir: Option<&Path>,
        events: DiskEvents,
    ) -> Result<Arc<Self>, DiskError> {
        if !(1..=QUEUES_MAX).contains(&spec.queues) || !(1..=spec.queues).contains(&spec.io_threads) {
            return Err(DiskError::new(
                ErrorKind::InvalidParameter,
                format!(
                    "{} queues and {} I/O threads: 1 to {QUEUES_MAX} queues, and from 1 to as many threads, are possible",
                    spec.queues, spec.io_threads
                ),
            ));
        }
        let how = OpenImage {
            format: spec.format,
            read_only: spec.read_only,
            recover,
            parents: spec.parents.clone(),
            notes_dir: notes_dir.map(Path::to_path_buf),
        };
        let threads = usize::from(spec.io_threads);
        let mailbox = || Mailbox::new().map(Arc::new);
        let mailboxes: Result<Vec<_>, _> = std::iter::repeat_with(mailbox).take(threads).collect();
        let mailboxes =
            mailboxes.map_err(|e| DiskError::new(ErrorKind::Io, format!("cannot make an eventfd: {e}")))?;
        let image = ImageHandle::open(&spec.image, &how)?;
        let geometry = image.image().geometry();
        let limits = Limits {
            size: geometry.virtual_size,
            sector: geometry.logical_sector_size,
            read_only: image.image().is_read_only(),
            zero_bytes_max: ZERO_BYTES_MAX,
        };
        let disk = Self {
            shared: DiskShared::new(&spec.id, limits, image, threads, cache_on, events),
            spec,
            notes_dir: how.notes_dir,
            running: Mutex::new(Some(Running::default())),
            exchanging: Mutex::default(),
            mailboxes,
        };
        // Dropped when this fails, and so stopped: no thread then holds the image, which is closed cleanly.
        disk.run()?;
        Ok(Arc::new(disk))
    }

    /// Starts its threads.
    fn run(&self) -> Result<(), DiskError> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let running = running.get_or_insert_default();
        for (index, mailbox) in self.mailboxes.iter().enumerate() {
            let worker = WorkerHandle::start(index, &self.shared, mailbox.clone());
            running.workers.push(worker.map_err(|e| DiskError::new(ErrorKind::Io, e))?);
        }
        let for_maintenance = self.shared.clone();
        let maintenance = std::thread::Builder::new()
            .name("maintenance".into())
            .spawn(move || for_maintenance.maintain())
            .map_err(|e| DiskError::new(ErrorKind::Io, format!("cannot start a thread: {e}")))?;
        running.maintenance = Some(maintenance);
        let listener = Listener::start(&self.spec, self.shared.clone(), self.mailboxes.clone());
        let listener = listener
            .map_err(|e| DiskError::new(ErrorKind::Io, format!("{}: {e}", self.spec.socket.display())))?;
        running.listener = Some(listener);
        Ok(())
    }

    /// What it was started as.
    pub fn spec(&self) -> &DiskSpec {
        &self.spec
    }

    /// What its threads share.
    pub fn shared(&self) -> &Arc<DiskShared> {
        &self.shared
    }

    /// Where its images keep their notes.
    pub fn notes_dir(&self) -> Option<&Path> {
        self.notes_dir.as_deref()
    }

    /// How its workers are reached.
    pub fn mailboxes(&self) -> &[Arc<Mailbox>] {
        &self.mailboxes
    }

    /// The image that is the disk now.
    pub fn image(&self) -> Arc<ImageHandle> {
        self.shared.route.load().source().clone()
    }

    /// Path of the image that is the disk now.
    pub fn image_path(&self) -> PathBuf {
        self.image().path()
    }

    /// The image's format.
    pub fn format(&self) -> Format {
        self.image().image().format()
    }

    /// The image's type.
    pub fn image_type(&self) -> ImageType {
        self.image().image().image_type()
    }

    /// The image's sizes.
    pub fn geometry(&self) -> Geometry {
        self.image().image().geometry()
    }

    /// Whether a front end's rings run.
    pub fn is_connected(&self) -> bool {
        self.shared.running.load(std::sync::atomic::Ordering::Relaxed) > 0
    }

    /// Whether a front end's rings have ever run since the disk was started.
    pub fn was_used(&self) -> bool {
        self.shared.used.load(std::sync::atomic::Ordering::Acquire)
    }

    /// Why the disk cannot be written any more, if so.
    pub fn failed(&self) -> Option<String> {
        self.shared.failed()
    }

    /// What was counted.
    pub fn stats(&self) -> DiskStats {
        self.shared.counters.stats()
    }

    /// Makes everything written so far durable. Blocks.
    ///
    /// # Errors
    /// What the file says.
    pub fn flush(&self) -> Result<(), DiskError> {
        let shard = self.shared.gate.shard();
        loop {
            let entry = shard.enter();
            let route = self.shared.route.load_full();
            if matches!(*route, Route::Held(_)) {
                // The image is not to be touched now; whoever exchanges it waits for nobody outside of the gate.
                shard.leave(entry);
                std::thread::sleep(HELD_PAUSE);
                continue;
            }
            let done = match (&*route, self.failed()) {
                (Route::Failed(_), why) => Err(DiskError::new(
                    ErrorKind::Poisoned,
                    why.unwrap_or_else(|| "the image was lost".into()),
                )),
                _ => std::iter::once(route.source())
                    .chain(route.flushed_too())
                    .try_for_each(|image| image.image().commit())
                    .map_err(|e| DiskError::new(e.kind, e.to_string())),
            };
            shard.leave(entry);
            return done;
        }
    }

    /// Stops serving: front ends are disconnected, what is in flight ends, the image is closed cleanly. Blocks.
    ///
    /// # Errors
    /// When the image could not be closed; it is then as after a crash, which the next open mends.
    pub fn stop(&self) -> Result<(), DiskError> {
        let _one = self.exchanging.lock().unwrap_or_else(PoisonError::into_inner);
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Running { listener, mut workers, maintenance }) = running else { return Ok(()) };
        drop(listener);
        workers.iter_mut().for_each(WorkerHandle::stop);
        self.shared.stop_maintenance();
        let _ = maintenance.map(JoinHandle::join);
        let route = self.shared.route.load_full();
        let image = route.source();
        // What was lost is not touched any more: others may have changed it under the map that is known here.
        if matches!(*route, Route::Failed(_)) {
            return Ok(());
        }
        // A move that ends just now may still have it open, and look after it.
        let mut given_up = image.without_upkeep();
        *given_up = true;
        if image.image().is_read_only() { Ok(()) } else { self.close(image) }
    }

    /// Lets go of the locks on the images of a disk that was stopped. Whoever looks on, or tidies up behind a move, may keep the
    /// files open for a while; nobody uses them any more.
    ///
    /// # Errors
    /// What the file system says.
    ///
    /// # Panics
    /// When the disk was not stopped.
    pub fn let_go(&self) -> Result<(), DiskError> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(running.is_none(), "only what was stopped may be let go of");
        let image = self.image();
        formats::let_go(image.image())
            .map_err(|e| DiskError::new(e.kind, format!("{}: {e}", image.path().display())))
    }

    fn close(&self, image: &ImageHandle) -> Result<(), DiskError> {
        image.image().close().map_err(|e| {
            DiskError::new(e.kind, format!("{}: cannot be closed cleanly: {e}", image.path().display()))
        })?;
        if let Some(dir) = &self.notes_dir {
            formats::remove_notes(image.image(), dir);
        }
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(e) = self.stop() {
            tracing::error!(disk = self.spec.id, "{e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use formats::{CreateOptions, Format};

    use super::*;

    #[test]
    fn a_start_that_fails_leaves_nothing_of_the_disk_behind() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let image = dir.path().join("a.vhdx");
        formats::create(&image, &CreateOptions::new(Format::Vhdx, 4 << 20)).expect("created");
        let spec = DiskSpec {
            id: "a".into(),
            image,
            socket: dir.path().join("a.sock"),
            format: None,
            queues: 2,
            io_threads: 2,
            read_only: false,
            parents: Vec::new(),
        };
        let events: DiskEvents = Arc::new(|_| Ok(()));
        for _ in 0..20 {
            // A file in the socket's place: the image can be opened, and the disk not be served.
            std::fs::write(&spec.socket, "").expect("written");
            let e = Disk::start(spec.clone(), false, true, None, events.clone()).expect_err("no socket");
            assert!(e.message.contains("a.sock"), "{e}");
            // No thread of it is left that could hold the image, or anything else.
            assert_eq!(Arc::strong_count(&events), 1);
            std::fs::remove_file(&spec.socket).expect("removed");
            let disk =
                Disk::start(spec.clone(), false, true, None, events.clone()).expect("the image is free");
            disk.stop().expect("closed");
        }
    }
}
