//! A network card: virtio-net on a tap device, one queue each way, served by one thread.
//!
//! It writes guest memory through [`GuestRam::memory`], so what it writes is in the bitmap of that and no log is needed.

mod frames;
mod rings;
mod tap;

use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

pub use self::frames::{Addresses, Mac, announcement};
use self::rings::{Position, Ring};
pub use self::tap::Tap;
use self::tap::{FRAME_MAX, HEADER};
use super::mmio::{self, Backend, F_VERSION_1, Notices, ReadyQueue, Transport, TransportState};
use super::{Device, DeviceState};
use crate::machine::DeviceDescription;
use crate::memory::GuestRam;
use crate::pages::PageSet;

/// Kind of the device in descriptions and states.
pub const KIND: &str = "net";
/// Version of the format of its state.
pub const STATE_VERSION: u32 = 1;
/// Most descriptors of a queue.
const QUEUE_SIZE: u16 = 256;
/// The queue of frames for the guest; the other one has those that it sends.
const RECEIVE: u16 = 0;
const QUEUES: u16 = 2;
const FEATURES: u64 =
    F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_NET_F_MAC;
/// Waits before each round of an announcement; a switch that is busy with the first hears one of the others.
const ANNOUNCE_AFTER: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(250),
    Duration::from_millis(350),
];
/// Waits before the thread looks again at a tap that fails.
const RETRY: Duration = Duration::from_millis(100);

/// How a network card is made.
#[derive(Debug, Clone)]
pub struct NetOptions {
    /// Name of the tap, which is made if there is none.
    pub tap: String,
    /// Address of the card, the same on both sides of a migration.
    pub mac: Mac,
}

/// The state as it travels.
#[derive(Debug, Serialize, Deserialize)]
struct NetState {
    transport: TransportState,
    /// Where each ready queue goes on; empty if the driver does not run the device.
    positions: Vec<Position>,
    /// What is known of the guest's addresses, for the announcement at its new place.
    addresses: Addresses,
}

#[derive(Default)]
struct Inner {
    rings: Vec<Ring>,
    /// What the guest set up and what a restored device goes on with.
    active: bool,
    stopped: bool,
    ending: bool,
    addresses: Addresses,
    /// The guest has no buffers for frames: none is read until it has.
    starved: bool,
}

struct Card {
    options: NetOptions,
    ram: Arc<GuestRam>,
    tap: Arc<Tap>,
    notices: Notices,
    kicks: [EventFd; 2],
    calls: [EventFd; 2],
    wake: EventFd,
    inner: Mutex<Inner>,
}

/// A network card.
pub struct NetDevice {
    transport: Transport<Card>,
    card: Arc<Card>,
    thread: Option<JoinHandle<()>>,
    announcing: Arc<AtomicBool>,
}

impl Card {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn name(&self) -> String {
        format!("network card {} ({})", self.options.mac, self.options.tap)
    }

    fn changed(&self) {
        // A counter that is full has told the thread already.
        let _ = self.wake.write(1);
    }

    fn make_rings(&self, features: u64, queues: &[ReadyQueue], at: &[Position]) -> Result<Vec<Ring>> {
        let event_idx = features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1;
        queues.iter().enumerate().map(|(i, queue)| Ring::new(queue, event_idx, at.get(i).copied())).collect()
    }

    /// Serves the queues once; returns whether there is more to do at once.
    fn serve(&self, inner: &mut Inner, buffer: &mut [u8]) -> bool {
        let Inner { rings, addresses, starved, .. } = inner;
        let (mut more, mut broken) = (false, false);
        for ring in rings {
            let index = ring.position().index;
            let served = if index == RECEIVE {
                let served = ring.receive(&self.ram, &self.tap, buffer);
                *starved = served.starved;
                served
            } else {
                ring.send(&self.ram, &self.tap, buffer, self.options.mac, addresses)
            };
            if served.call {
                let _ = self.calls[usize::from(index)].write(1);
            }
            more |= served.more;
            broken |= ring.is_broken();
        }
        if broken && !self.notices.needs_reset() {
            self.notices.set_needs_reset(true);
            let _ = self.calls[usize::from(RECEIVE)].write(1);
        }
        more
    }

    fn run(&self) {
        let mut buffer = vec![0; FRAME_MAX];
        let mut more = false;
        loop {
            let mut inner = self.lock();
            if inner.ending {
                return;
            }
            let serves = inner.active && !inner.stopped;
            if serves {
                more = self.serve(&mut inner, &mut buffer);
            }
            let receives =
                serves && !inner.starved && inner.rings.iter().any(|ring| ring.position().index == RECEIVE);
            drop(inner);
            let tap = receives.then(|| self.tap.descriptor());
            let time = if serves && more { Some(Duration::ZERO) } else { None };
            let (receive, send) = (self.kicks[0].as_raw_fd(), self.kicks[1].as_raw_fd());
            // While the machine is paused kicks stay where they are, for the next one who serves.
            let kicks = if serves { [Some(receive), Some(send)] } else { [None, None] };
            if let Err(e) = wait([tap, kicks[0], kicks[1], Some(self.wake.as_raw_fd())], time) {
                tracing::error!("{}: cannot wait for frames: {e}", self.name());
                std::thread::sleep(RETRY);
            }
            let _ = self.wake.read();
            if serves {
                // What they stand for is looked at above, after this.
                let _ = (self.kicks[0].read(), self.kicks[1].read());
            }
        }
    }
}

/// Waits until one of the descriptors can be read.
fn wait(fds: [Option<RawFd>; 4], time: Option<Duration>) -> std::io::Result<()> {
    // A negative descriptor is passed over.
    let mut fds = fds.map(|fd| libc::pollfd { fd: fd.unwrap_or(-1), events: libc::POLLIN, revents: 0 });
    let time = time.map_or(-1, |time| i32::try_from(time.as_millis()).unwrap_or(i32::MAX));
    // SAFETY: `fds` is valid for its four entries.
    if unsafe { libc::poll(fds.as_mut_ptr(), 4, time) } < 0 {
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    if fds[0].revents & (libc::POLLERR | libc::POLLHUP | libc::POLLNVAL) != 0 {
        // A tap that is down says so all the time.
        std::thread::sleep(RETRY);
    }
    Ok(())
}

impl Backend for Card {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn notices(&self) -> &Notices {
        &self.notices
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mac = self.options.mac.0;
        let from = usize::try_from(offset).ok().and_then(|offset| mac.get(offset..));
        for (byte, value) in data.iter_mut().zip(from.unwrap_or_default()) {
            *byte = *value;
        }
    }

    fn write_config(&self, _features: u64, _offset: u64, _data: &[u8]) {
        // The address of the card is not for the guest to change.
    }

    fn activate(&self, features: u64, queues: Vec<ReadyQueue>) {
        let mut inner = self.lock();
        match self.make_rings(features, &queues, &[]) {
            Ok(rings) => {
                inner.rings = rings;
                (inner.active, inner.starved) = (true, false);
            }
            Err(e) => {
                tracing::warn!("{}: the guest's queues cannot be served: {e:#}", self.name());
                self.notices.set_needs_reset(true);
            }
        }
        self.changed();
    }

    fn deactivate(&self) {
        // Whoever serves has the lock: nothing touches the queues when this returns.
        let mut inner = self.lock();
        inner.active = false;
        inner.rings.clear();
    }

    fn kick(&self, queue: u16) {
        if let Some(kick) = self.kicks.get(usize::from(queue)) {
            let _ = kick.write(1);
        }
    }
}

impl NetDevice {
    /// A network card that the guest has not touched, on a tap that is opened (and made if there is none).
    ///
    /// # Errors
    /// If the tap cannot be opened.
    pub fn new(options: NetOptions, ram: Arc<GuestRam>) -> Result<Arc<Self>> {
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let card = Arc::new(Card {
            tap: Arc::new(Tap::open(&options.tap)?),
            notices: Notices::default(),
            kicks: [eventfd()?, eventfd()?],
            calls: [eventfd()?, eventfd()?],
            wake: eventfd()?,
            inner: Mutex::default(),
            ram: ram.clone(),
            options,
        });
        let transport = Transport::new(card.clone(), ram, QUEUES, QUEUE_SIZE)?;
        let served = card.clone();
        let thread = std::thread::Builder::new()
            .name("net".into())
            .spawn(move || served.run())
            .context("start the thread that serves the network card")?;
        Ok(Arc::new(Self { transport, card, thread: Some(thread), announcing: Arc::default() }))
    }

    /// The guest's IPv4 addresses, as far as its own frames have told.
    pub fn addresses(&self) -> Vec<Ipv4Addr> {
        self.card.lock().addresses.own()
    }
}

impl Drop for NetDevice {
    fn drop(&mut self) {
        self.card.lock().ending = true;
        self.card.changed();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Device for NetDevice {
    fn description(&self) -> DeviceDescription {
        DeviceDescription {
            kind: KIND.to_owned(),
            id: self.card.options.mac.to_string(),
            version: STATE_VERSION,
            queues: QUEUES,
            features: self.transport.driver_features(),
            size_bytes: None,
        }
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        self.transport.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.transport.write(offset, data);
    }

    fn kicks(&self) -> Vec<EventFd> {
        copies(&self.card.kicks)
    }

    fn calls(&self) -> Vec<EventFd> {
        copies(&self.card.calls)
    }

    fn pause(&self) -> Result<()> {
        // Whoever serves has the lock, for a batch of frames at a time, and completes what it takes at once.
        self.card.lock().stopped = true;
        self.card.changed();
        Ok(())
    }

    fn resume(&self) -> Result<()> {
        self.go_on();
        Ok(())
    }

    fn go_on(&self) {
        let mut inner = self.card.lock();
        inner.stopped = false;
        inner.starved = false;
        for ring in &inner.rings {
            let _ = self.card.calls[usize::from(ring.position().index)].write(1);
        }
        self.card.changed();
    }

    fn save(&self) -> Result<DeviceState> {
        let inner = self.card.lock();
        ensure!(inner.stopped, "{}: it is saved when it is paused", self.card.name());
        let state = NetState {
            transport: self.transport.save(),
            positions: inner.rings.iter().map(Ring::position).collect(),
            addresses: inner.addresses.clone(),
        };
        Ok(DeviceState {
            kind: KIND.to_owned(),
            id: self.card.options.mac.to_string(),
            version: STATE_VERSION,
            data: serde_json::to_value(state)?,
        })
    }

    fn restore(&self, state: &DeviceState) -> Result<()> {
        let name = self.card.name();
        ensure!(
            state.kind == KIND && state.id == self.card.options.mac.to_string(),
            "{name}: the state is that of {} {}",
            state.kind,
            state.id
        );
        ensure!(
            state.version == STATE_VERSION,
            "{name}: its state has version {} and this program knows {STATE_VERSION}; use one of the same version",
            state.version
        );
        let state: NetState =
            serde_json::from_value(state.data.clone()).with_context(|| format!("{name}: its state"))?;
        let features = state.transport.driver_features;
        let negotiated = state.transport.status & mmio::STATUS_FEATURES_OK != 0;
        ensure!(
            state.addresses.is_bounded()
                && (!negotiated || features & !FEATURES == 0 && features & F_VERSION_1 != 0),
            "{name}: its state is malformed: features {features:#x} of {FEATURES:#x}"
        );
        ensure!(
            !self.card.lock().active,
            "{name}: a state is restored on a card that the guest has not touched"
        );
        let queues = self.transport.restore(&state.transport).with_context(|| name.clone())?;
        let (active, queues) = (queues.is_some(), queues.unwrap_or_default());
        ensure!(
            queues.len() == state.positions.len(),
            "{name}: its state has {} positions of queues",
            state.positions.len()
        );
        let rings =
            self.card.make_rings(features, &queues, &state.positions).with_context(|| name.clone())?;
        let mut inner = self.card.lock();
        inner.rings = rings;
        inner.addresses = state.addresses;
        (inner.active, inner.stopped) = (active, true);
        self.card.changed();
        Ok(())
    }

    fn start_logging(&self) -> Result<()> {
        Ok(())
    }

    fn stop_logging(&self) -> Result<()> {
        Ok(())
    }

    fn collect_dirty(&self, _into: &mut PageSet) -> Result<()> {
        Ok(())
    }

    fn announce(&self) -> Result<()> {
        if self.announcing.swap(true, Ordering::SeqCst) {
            // The rounds that are under way will do.
            return Ok(());
        }
        let frames = announcement(self.card.options.mac, &self.addresses());
        let frames: Vec<Vec<u8>> =
            frames.iter().map(|frame| [&[0; HEADER][..], frame.as_slice()].concat()).collect();
        let (tap, announcing, name) = (self.card.tap.clone(), self.announcing.clone(), self.card.name());
        let thread = std::thread::Builder::new().name("announce".into()).spawn(move || {
            for pause in ANNOUNCE_AFTER {
                std::thread::sleep(pause);
                for frame in &frames {
                    if let Err(e) = tap.send(frame) {
                        tracing::warn!("{name}: cannot tell the network where it is: {e}");
                    }
                }
            }
            announcing.store(false, Ordering::SeqCst);
        });
        if thread.is_err() {
            self.announcing.store(false, Ordering::SeqCst);
        }
        thread.map(|_| ()).with_context(|| format!("{}: start to announce it", self.card.name()))
    }
}

fn copies(eventfds: &[EventFd]) -> Vec<EventFd> {
    let copy = |fd: &EventFd| fd.try_clone().expect("a process has room for a few more descriptors");
    eventfds.iter().map(copy).collect()
}
