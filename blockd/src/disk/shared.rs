//! What the threads of a disk share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;

use super::counters::Counters;
use super::handle::ImageHandle;
use super::route::Route;
use super::{DiskEvent, DiskEvents};
use crate::gate::Gate;
use crate::vhost::channel::Channels;
use crate::worker::{Limits, SERIAL_BYTES};

/// What the threads of a disk share.
#[derive(Debug)]
pub struct DiskShared {
    /// The disk's name.
    pub id: String,
    /// What requests are checked against, but for the size.
    limits: Limits,
    /// Size of the disk in bytes.
    size: AtomicU64,
    /// Where requests go.
    pub route: Arc<ArcSwap<Route>>,
    /// Grace periods of mapped I/O.
    pub gate: Arc<Gate>,
    /// Counts.
    pub counters: Counters,
    /// Sessions whose rings run.
    pub running: AtomicU64,
    /// Whether any ever did.
    pub used: AtomicBool,
    /// Where front ends listen.
    pub channels: Channels,
    maintenance: (Mutex<Maintenance>, Condvar),
    maintenance_wanted: AtomicBool,
    failed: Mutex<Option<String>>,
    cache_on: AtomicBool,
    events: Told,
}

/// Whom the disk tells; not to be printed.
struct Told(DiskEvents);

impl std::fmt::Debug for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Told")
    }
}

#[derive(Debug, Default)]
struct Maintenance {
    wanted: bool,
    stop: bool,
}

impl DiskShared {
    /// Of a disk that is served from `image`.
    pub fn new(
        id: &str,
        limits: Limits,
        image: Arc<ImageHandle>,
        workers: usize,
        cache_on: bool,
        events: DiskEvents,
    ) -> Arc<Self> {
        Arc::new(Self {
            id: id.to_owned(),
            limits,
            size: AtomicU64::new(limits.size),
            route: Arc::new(ArcSwap::from_pointee(Route::Single(image))),
            gate: Arc::default(),
            counters: Counters::new(workers),
            running: AtomicU64::new(0),
            used: AtomicBool::new(false),
            channels: Channels::default(),
            maintenance: Default::default(),
            maintenance_wanted: AtomicBool::new(false),
            failed: Mutex::new(None),
            cache_on: AtomicBool::new(cache_on),
            events: Told(events),
        })
    }

    /// What requests are checked against.
    pub fn limits(&self) -> Limits {
        Limits { size: self.size.load(Ordering::Relaxed), ..self.limits }
    }

    /// The disk has another size now. The images check spans themselves, so this may come a little early or late.
    pub fn set_size(&self, bytes: u64) {
        self.size.store(bytes, Ordering::Relaxed);
    }

    /// Tells what happens to the disk.
    pub fn tell(&self, event: DiskEvent) -> Result<(), String> {
        (self.events.0)(event)
    }

    /// Whether the guest has the write cache on: then a write is durable only at its next flush.
    pub fn is_cache_on(&self) -> bool {
        self.cache_on.load(Ordering::SeqCst)
    }

    /// The guest switches the write cache. Durable before it returns, since a guest with the cache off never flushes.
    ///
    /// # Errors
    /// When it cannot be remembered; nothing has changed then.
    pub fn set_cache(&self, on: bool) -> Result<(), String> {
        if self.is_cache_on() != on {
            self.tell(DiskEvent::WriteCache(on))?;
            self.cache_on.store(on, Ordering::SeqCst);
        }
        Ok(())
    }

    /// The serial that the guest reads: the disk's name, cut and padded to 20 bytes.
    pub fn serial(&self) -> [u8; SERIAL_BYTES] {
        let mut serial = [0; SERIAL_BYTES];
        for (to, from) in serial.iter_mut().zip(self.id.bytes()) {
            *to = from;
        }
        serial
    }

    /// Has the images looked after soon. Cheap when that is under way already.
    pub fn wake_maintenance(&self) {
        if !self.maintenance_wanted.swap(true, Ordering::AcqRel) {
            self.maintenance.0.lock().unwrap_or_else(PoisonError::into_inner).wanted = true;
            self.maintenance.1.notify_one();
        }
    }

    /// Ends the maintenance thread.
    pub fn stop_maintenance(&self) {
        self.maintenance.0.lock().unwrap_or_else(PoisonError::into_inner).stop = true;
        self.maintenance.1.notify_one();
    }

    /// The maintenance thread: looks after the images that guests are served from until it is stopped.
    pub fn maintain(&self) {
        loop {
            {
                let mut state = self.maintenance.0.lock().unwrap_or_else(PoisonError::into_inner);
                while !state.wanted && !state.stop {
                    state = self.maintenance.1.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                if state.stop {
                    return;
                }
                state.wanted = false;
            }
            self.maintenance_wanted.store(false, Ordering::Release);
            let route = self.route.load_full();
            for image in std::iter::once(route.source()).chain(route.target()) {
                self.maintain_image(image);
            }
        }
    }

    fn maintain_image(&self, image: &ImageHandle) {
        if !image.image().wants_maintenance() {
            return;
        }
        if let Err(e) = image.maintain(&|| self.gate.wait()) {
            tracing::warn!(disk = self.id, image = %image.path().display(), "maintenance failed: {e}");
            // What asks for it again at once must not turn into a busy loop of failures.
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Why the disk cannot be written any more, if so.
    pub fn failed(&self) -> Option<String> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Remembers why the disk cannot be written any more. The first reason stays.
    pub fn set_failed(&self, why: &str) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.is_none() {
            *failed = Some(why.to_owned());
            tracing::error!(disk = self.id, "the disk has failed: {why}");
            let _ = self.tell(DiskEvent::Failed(why.to_owned()));
        }
    }
}
