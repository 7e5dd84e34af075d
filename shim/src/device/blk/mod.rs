//! A disk that a vhost-user backend serves (blockd, or another that logs writes and tracks what is in flight).

mod disk;
mod link;
mod log;
mod offer;
mod plan;
mod watch;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use self::disk::{Disk, Run};
pub use self::offer::Offer;
use super::mmio::{self, Transport, TransportState};
use super::{Device, DeviceState};
use crate::machine::DeviceDescription;
use crate::memory::GuestRam;
use crate::pages::PageSet;

/// Kind of the device in descriptions and states.
pub const KIND: &str = "blk";
/// Version of the format of its state.
pub const STATE_VERSION: u32 = 1;

/// How a disk is made.
#[derive(Debug, Clone)]
pub struct BlkOptions {
    /// The backend's socket.
    pub socket: PathBuf,
    /// What tells the disk from others, on both sides of a migration.
    pub id: String,
    /// Queues, 1 to [`super::mmio::QUEUES_MAX`]; the backend must have as many.
    pub queues: u16,
    /// Most descriptors of a queue, a power of two up to [`super::mmio::QUEUE_SIZE_MAX`].
    pub queue_size: u16,
    /// How long another connection is sought when the backend has gone away while the guest runs.
    pub reconnect: Duration,
    /// How long the constructor and [`Device::resume`] wait for the backend to appear, pausing and logging for one that is
    /// away, and [`Device::preflight`] at most for its answer.
    pub patience: Duration,
    /// How long one exchange with the backend may take; stopping the queues, which completes what is in flight, is one.
    pub answer: Duration,
    /// Connect at [`Device::resume`] only: for the target of a migration, whose backend may begin to serve the disk then.
    pub deferred: bool,
}

impl BlkOptions {
    /// One queue of 256 that is connected at once, with times for production: 60 s to come back, 10 s of patience, 30 s for an
    /// answer.
    pub fn new(socket: impl Into<PathBuf>, id: impl Into<String>) -> Self {
        Self {
            socket: socket.into(),
            id: id.into(),
            queues: 1,
            queue_size: 256,
            reconnect: Duration::from_secs(60),
            patience: Duration::from_secs(10),
            answer: Duration::from_secs(30),
            deferred: false,
        }
    }
}

/// The state as it travels.
#[derive(Debug, Serialize, Deserialize)]
struct BlkState {
    transport: TransportState,
    /// What the guest was told of the disk.
    offer: Offer,
    /// Where each ready queue goes on, in their order; empty if the driver does not run the device.
    bases: Vec<u16>,
}

/// A disk.
pub struct BlkDevice {
    transport: Transport<Disk>,
    disk: Arc<Disk>,
    watcher: Option<JoinHandle<()>>,
}

/// Connects to a backend, looks at what it offers and leaves again. The backend may be serving somebody else.
///
/// # Errors
/// If it is not there, does not answer within `answer`, has fewer than `queues` queues, or lacks what this program needs.
pub fn probe(socket: &Path, queues: u16, answer: Duration) -> Result<Offer> {
    let (_, offer) = link::Link::open(socket, queues, Instant::now() + answer)
        .with_context(|| format!("look at the backend {}", socket.display()))?;
    Ok(offer.with_queues(queues))
}

impl BlkDevice {
    /// A disk that the guest has not touched. Unless it is deferred its backend is connected when this returns.
    ///
    /// # Errors
    /// If the options are none, or the backend does not appear in time or lacks something.
    pub fn new(options: BlkOptions, ram: Arc<GuestRam>) -> Result<Arc<Self>> {
        let (queues, queue_size, deferred) = (options.queues, options.queue_size, options.deferred);
        let disk = Arc::new(Disk::new(options, ram.clone())?);
        let transport = Transport::new(disk.clone(), ram, queues, queue_size)
            .with_context(|| format!("make {}", disk.name()))?;
        if !deferred {
            let mut inner = disk.lock();
            disk.open_patiently(&mut inner)?;
            disk.take_offer(&mut inner);
        }
        let watched = disk.clone();
        let watcher = std::thread::Builder::new()
            .name("blk-watch".into())
            .spawn(move || watch::watch(&watched))
            .context("start the thread that watches the backend")?;
        Ok(Arc::new(Self { transport, disk, watcher: Some(watcher) }))
    }

    /// Whether the backend is connected.
    pub fn is_connected(&self) -> bool {
        self.disk.lock().link.is_some()
    }

    /// Bytes of the disk; 0 while it is not known.
    pub fn size_bytes(&self) -> u64 {
        self.disk.offer().capacity().saturating_mul(512)
    }
}

impl Drop for BlkDevice {
    fn drop(&mut self) {
        self.disk.lock().ending = true;
        self.disk.changed();
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
        // Connections hold threads, which end with them.
        let mut inner = self.disk.lock();
        (inner.link, inner.old) = (None, None);
    }
}

impl Device for BlkDevice {
    fn description(&self) -> DeviceDescription {
        let options = &self.disk.options;
        DeviceDescription {
            kind: KIND.to_owned(),
            id: options.id.clone(),
            version: STATE_VERSION,
            queues: options.queues,
            features: self.transport.driver_features(),
            size_bytes: Some(self.size_bytes()),
        }
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        self.transport.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.transport.write(offset, data);
    }

    fn kicks(&self) -> Vec<EventFd> {
        copies(&self.disk.kicks)
    }

    fn calls(&self) -> Vec<EventFd> {
        copies(&self.disk.calls)
    }

    fn pause(&self) -> Result<()> {
        self.disk.pause()
    }

    fn preflight(&self) -> Result<()> {
        self.disk.preflight()
    }

    fn resume(&self) -> Result<()> {
        self.disk.resume()
    }

    fn go_on(&self) {
        self.disk.go_on();
    }

    fn save(&self) -> Result<DeviceState> {
        let inner = self.disk.lock();
        ensure!(inner.stopped, "{}: it is saved when it is paused", self.disk.name());
        let bases = match &inner.run {
            None => Vec::new(),
            Some(run) => run.bases.clone().context("a paused disk knows where its queues stand")?,
        };
        let state = BlkState { transport: self.transport.save(), offer: self.disk.offer(), bases };
        Ok(DeviceState {
            kind: KIND.to_owned(),
            id: self.disk.options.id.clone(),
            version: STATE_VERSION,
            data: serde_json::to_value(state)?,
        })
    }

    fn restore(&self, state: &DeviceState) -> Result<()> {
        let name = self.disk.name();
        ensure!(
            state.kind == KIND && state.id == self.disk.options.id,
            "{name}: the state is that of {} {}",
            state.kind,
            state.id
        );
        ensure!(
            state.version == STATE_VERSION,
            "{name}: its state has version {} and this program knows {STATE_VERSION}; use one of the same version",
            state.version
        );
        let state: BlkState =
            serde_json::from_value(state.data.clone()).with_context(|| format!("{name}: its state"))?;
        let features = state.transport.driver_features;
        let negotiated = state.transport.status & mmio::STATUS_FEATURES_OK != 0;
        ensure!(
            state.offer.config.len() == offer::CONFIG_BYTES
                && state.offer.features & !offer::KNOWN_FEATURES == 0
                && (!negotiated
                    || features & !state.offer.features == 0 && features & mmio::F_VERSION_1 != 0),
            "{name}: its state is malformed: features {features:#x} of {:#x}, {} bytes of configuration",
            state.offer.features,
            state.offer.config.len()
        );
        ensure!(
            self.disk.lock().run.is_none(),
            "{name}: a state is restored on a disk that the guest has not touched"
        );
        let rings = self.transport.restore(&state.transport).with_context(|| name.clone())?;
        ensure!(
            rings.as_ref().map_or(0, Vec::len) == state.bases.len(),
            "{name}: its state has {} positions of queues",
            state.bases.len()
        );
        let run = rings.map(|rings| Run { features, rings, bases: Some(state.bases) });
        self.disk.restore(state.offer, run)
    }

    fn start_logging(&self) -> Result<()> {
        self.disk.start_logging()
    }

    fn stop_logging(&self) -> Result<()> {
        self.disk.stop_logging()
    }

    fn collect_dirty(&self, into: &mut PageSet) -> Result<()> {
        self.disk.collect_dirty(into)
    }
}

fn copies(eventfds: &[Arc<EventFd>]) -> Vec<EventFd> {
    let copy = |fd: &Arc<EventFd>| fd.try_clone().expect("a process has room for a few more descriptors");
    eventfds.iter().map(copy).collect()
}
