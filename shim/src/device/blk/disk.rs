//! The disk behind the registers: what the guest has set up, whether the machine runs, and the connection that serves it.
//!
//! Everything that changes these is done under one lock, and every exchange with the backend has an end. Whenever one fails
//! half way the connection is given up: the backend drains what it has, [`super::watch`] connects anew, and the in-flight
//! region tells the backend where the rings stand. So there is one way back from every fault.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::super::mmio::{Backend, Notices, ReadyQueue};
use super::BlkOptions;
use super::link::{Link, RETRY, is_closed};
use super::log::Logs;
use super::offer::{CONFIG_WCE, Offer};
use super::plan::{self, Inflight, Plan, RingPlan};
use crate::memory::GuestRam;
use crate::pages::PageSet;

/// What a driver runs.
pub(super) struct Run {
    pub(super) features: u64,
    pub(super) rings: Vec<ReadyQueue>,
    /// Where each ring goes on; `None` from when they run, as the backend and the in-flight region know it then.
    pub(super) bases: Option<Vec<u16>>,
}

impl Run {
    fn queues(&self) -> Vec<u16> {
        self.rings.iter().map(|ring| ring.index).collect()
    }
}

/// Why there is no connection although the device should have one.
#[derive(Debug, Clone)]
pub(super) enum Outage {
    /// There is one, or none is wanted.
    None,
    /// One is sought until then.
    Until(Instant, String),
    /// None was found.
    GaveUp(String),
}

/// What the lock guards.
pub(super) struct Inner {
    /// The connection, and what the backend offered on it.
    pub(super) link: Option<(Link, Offer)>,
    /// A connection that was given up and that the backend has not closed yet: it may still write to guest memory.
    pub(super) old: Option<Link>,
    /// Set by the driver, taken away by its reset.
    pub(super) run: Option<Run>,
    /// The machine is paused, or was restored and has not gone on: no ring runs.
    pub(super) stopped: bool,
    /// What the guest was told is known, so that a backend can be measured by it.
    pub(super) known: bool,
    pub(super) logs: Option<Logs>,
    inflight: Option<Inflight>,
    pub(super) outage: Outage,
    /// The device is being dropped.
    pub(super) ending: bool,
}

/// The disk.
pub(super) struct Disk {
    pub(super) options: BlkOptions,
    ram: Arc<GuestRam>,
    notices: Notices,
    /// What the guest is told.
    offer: Mutex<Offer>,
    pub(super) kicks: Vec<Arc<EventFd>>,
    pub(super) calls: Vec<Arc<EventFd>>,
    inner: Mutex<Inner>,
    /// Something changed that callers wait for.
    settled: Condvar,
    /// Tells the watcher.
    pub(super) wake: EventFd,
}

impl Disk {
    pub(super) fn new(options: BlkOptions, ram: Arc<GuestRam>) -> Result<Self> {
        let eventfds = || -> Result<Vec<Arc<EventFd>>> {
            let one = |_| Ok(Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?));
            (0..options.queues).map(one).collect()
        };
        let inner = Inner {
            link: None,
            old: None,
            run: None,
            stopped: options.deferred,
            known: false,
            logs: None,
            inflight: None,
            outage: Outage::None,
            ending: false,
        };
        Ok(Self {
            kicks: eventfds().context("make the queues' eventfds")?,
            calls: eventfds().context("make the queues' eventfds")?,
            wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            offer: Mutex::new(Offer { features: 0, queues: 0, config: Vec::new() }),
            notices: Notices::default(),
            inner: Mutex::new(inner),
            settled: Condvar::new(),
            options,
            ram,
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the guest is told.
    pub(super) fn offer(&self) -> Offer {
        self.offer.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_offer(&self, offer: Offer) {
        *self.offer.lock().unwrap_or_else(PoisonError::into_inner) = offer;
    }

    /// `disk ID (SOCKET)`, for messages.
    pub(super) fn name(&self) -> String {
        format!("disk {} ({})", self.options.id, self.options.socket.display())
    }

    pub(super) fn answer_by(&self) -> Instant {
        Instant::now() + self.options.answer
    }

    /// Tells those who wait, and the watcher.
    pub(super) fn changed(&self) {
        self.settled.notify_all();
        // A counter that is full has told the watcher already.
        let _ = self.wake.write(1);
    }

    pub(super) fn interrupt_all(&self) {
        for call in &self.calls {
            let _ = call.write(1);
        }
    }

    // --- the connection ----------------------------------------------------------------------------------------------

    /// The connection is of no use any more. If the device runs, another one is sought.
    pub(super) fn lose(&self, inner: &mut Inner, why: String) {
        if let Some((link, _)) = inner.link.take() {
            link.give_up();
            // One that is closed already takes no place; there can be no other, as a connection is made without one only.
            inner.old = Some(link).filter(|link| !is_closed(&link.stream()));
        }
        if !inner.stopped {
            tracing::warn!("{}: the connection is lost: {why}", self.name());
            inner.outage = Outage::Until(Instant::now() + self.options.reconnect, why);
        }
        self.changed();
    }

    /// One attempt to connect, without anything that the guest could notice.
    pub(super) fn open(&self, until: Instant) -> Result<(Link, Offer)> {
        let (link, offer) = Link::open(&self.options.socket, self.options.queues, until)?;
        Ok((link, offer.with_queues(self.options.queues)))
    }

    /// One attempt to have a connection where there is none.
    fn open_once(&self, inner: &mut Inner, until: Instant) -> Result<()> {
        if inner.old.as_ref().is_some_and(|old| is_closed(&old.stream())) {
            inner.old = None;
        }
        ensure!(inner.old.is_none(), "the backend has not closed the former connection yet");
        inner.link = Some(self.open(until)?);
        Ok(())
    }

    /// Attempts until it works or the time that callers wait at most is over.
    pub(super) fn open_patiently(&self, inner: &mut Inner) -> Result<()> {
        let until = Instant::now() + self.options.patience;
        let mut told = None;
        loop {
            let by = self.answer_by().min(until + RETRY);
            let Err(error) = self.open_once(inner, by) else { return Ok(()) };
            // An attempt that ran out of time says less than an earlier one that was answered.
            let out_of_time = Instant::now() >= by;
            let why = told.take().filter(|_| out_of_time).unwrap_or(error);
            if Instant::now() >= until {
                let (name, waited) = (self.name(), self.options.patience);
                bail!("{name}: no backend within {waited:?} ({why:#}); is it running and serving this disk?");
            }
            told = Some(why);
            std::thread::sleep(RETRY);
        }
    }

    /// Whether the backend that is connected will do for the guest.
    pub(super) fn check_link(&self, inner: &Inner) -> Result<()> {
        let Some((_, fresh)) = inner.link.as_ref().filter(|_| inner.known) else { return Ok(()) };
        self.check(fresh, inner)
    }

    /// Whether a backend that offers this will do for the guest.
    pub(super) fn check(&self, fresh: &Offer, inner: &Inner) -> Result<()> {
        let features = inner.run.as_ref().map_or(0, |run| run.features);
        let fits = self.offer().can_become(fresh, features, self.options.queues);
        fits.with_context(|| format!("{}: this backend cannot serve the guest", self.name()))
    }

    /// The guest is told what the connected backend offers, but for the write cache, which stays as the guest knows it.
    pub(super) fn take_offer(&self, inner: &mut Inner) {
        let Some((_, fresh)) = &inner.link else { return };
        let mut fresh = fresh.clone();
        let before = self.offer();
        if self.wce_to_set(inner).is_some() {
            fresh.set_wce(before.wce());
        }
        let changed = inner.known && before.config != fresh.config;
        inner.known = true;
        self.set_offer(fresh);
        if changed {
            self.notices.config_changed();
            self.interrupt_all();
        }
    }

    /// The write cache that the guest has chosen, if the backend has another one. Nothing is durable without it: a guest that
    /// has switched the cache off sends no flushes.
    fn wce_to_set(&self, inner: &Inner) -> Option<u8> {
        let (_, fresh) = inner.link.as_ref()?;
        let chosen = self.offer().wce();
        let may = inner.run.as_ref().is_some_and(|run| run.features >> VIRTIO_BLK_F_CONFIG_WCE & 1 == 1);
        (may && inner.known && fresh.wce() != chosen).then_some(chosen)
    }

    // --- rings -------------------------------------------------------------------------------------------------------

    /// Sends all that the rings need but the word to run. Nothing else runs them: neither this connection nor a former one.
    pub(super) fn prepare(&self, inner: &mut Inner) -> Result<()> {
        let wce = self.wce_to_set(inner);
        let (Some((link, _)), Some(run)) = (&inner.link, &inner.run) else { return Ok(()) };
        if let Some(logs) = &mut inner.logs {
            logs.take_all();
            logs.note_used_rings(run.rings.iter());
        }
        let bases = match &run.bases {
            Some(bases) => bases.clone(),
            None => run.rings.iter().map(|ring| self.used_index(ring)).collect::<Result<_>>()?,
        };
        let rings = run.rings.iter().zip(bases).map(|(ring, base)| RingPlan {
            ring: *ring,
            base,
            kick: self.kicks[usize::from(ring.index)].clone(),
            call: self.calls[usize::from(ring.index)].clone(),
        });
        let plan = Plan {
            ram: self.ram.clone(),
            features: run.features,
            wce,
            inflight: inner.inflight.clone(),
            queues: self.options.queues,
            queue_size: self.options.queue_size,
            log: inner.logs.as_ref().map(Logs::active),
            rings: rings.collect(),
        };
        let inflight = link.call(self.answer_by(), move |frontend| plan.prepare(frontend))?;
        inner.inflight = Some(inflight);
        Ok(())
    }

    /// Lets the rings run.
    pub(super) fn enable(&self, inner: &mut Inner) -> Result<()> {
        let (Some((link, _)), Some(run)) = (&inner.link, &mut inner.run) else { return Ok(()) };
        run.bases = None;
        let queues = run.queues();
        link.call(self.answer_by(), move |frontend| plan::enable(frontend, &queues))
    }

    /// Has the rings looked at, by the backend and by the guest: something may have happened while nobody was there to tell.
    pub(super) fn nudge(&self, inner: &Inner) {
        for ring in inner.run.iter().flat_map(|run| &run.rings) {
            let _ = self.kicks[usize::from(ring.index)].write(1);
            let _ = self.calls[usize::from(ring.index)].write(1);
        }
    }

    fn stop_rings(&self, inner: &Inner) -> Result<Vec<u16>> {
        let (Some((link, _)), Some(run)) = (&inner.link, &inner.run) else { return Ok(Vec::new()) };
        let queues = run.queues();
        let bases = link.call(self.answer_by(), move |frontend| plan::stop(frontend, &queues))?;
        for (ring, base) in run.rings.iter().zip(&bases) {
            // The guest can write there, too, so this is a word of warning only.
            if self.used_index(ring)? != *base {
                let (name, queue) = (self.name(), ring.index);
                tracing::warn!("{name}: queue {queue} stands at {base}, but its used ring does not");
            }
        }
        Ok(bases)
    }

    fn used_index(&self, ring: &ReadyQueue) -> Result<u16> {
        let index: u16 = self.ram.memory().load(GuestAddress(ring.used + 2), Ordering::Acquire)?;
        Ok(u16::from_le(index))
    }

    // --- what machines ask for ---------------------------------------------------------------------------------------

    /// Waits until the state of the backend is known: connected, or not needed. Fails when it is away for longer than callers
    /// wait, or for good.
    fn lock_settled(&self, what: &str) -> Result<MutexGuard<'_, Inner>> {
        let until = Instant::now() + self.options.patience;
        let mut inner = self.lock();
        loop {
            // The watcher may not have come to it yet.
            if inner.link.as_ref().is_some_and(|(link, _)| is_closed(&link.stream())) {
                self.lose(&mut inner, String::from("the backend closed it"));
            }
            let is_quiet = inner.run.is_none() && inner.old.is_none();
            if inner.link.is_some() || inner.stopped || is_quiet {
                return Ok(inner);
            }
            let why = match &inner.outage {
                Outage::GaveUp(why) => bail!("{}: cannot {what}: {why}", self.name()),
                Outage::Until(_, why) => why.clone(),
                Outage::None => String::from("it is being connected"),
            };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let (name, waited) = (self.name(), self.options.patience);
                bail!("{name}: cannot {what} while its backend is away ({why}); waited {waited:?}, try again")
            }
            inner = self.settled.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// See [`crate::device::Device::pause`].
    pub(super) fn pause(&self) -> Result<()> {
        let mut inner = self.lock_settled("pause")?;
        if inner.stopped {
            return Ok(());
        }
        match self.stop_rings(&inner) {
            Ok(bases) => {
                if let Some(run) = &mut inner.run {
                    run.bases = Some(bases);
                }
                inner.stopped = true;
                inner.outage = Outage::None;
                self.changed();
                Ok(())
            }
            Err(e) => {
                self.lose(&mut inner, format!("it did not stop its queues: {e:#}"));
                Err(e).with_context(|| format!("{}: cannot pause; it goes on as before", self.name()))
            }
        }
    }

    /// See [`crate::device::Device::preflight`]: connects, compares with what the guest knows, and leaves.
    pub(super) fn preflight(&self) -> Result<()> {
        let inner = self.lock();
        if inner.link.is_some() {
            return self.check_link(&inner);
        }
        let until = Instant::now() + self.options.answer.min(self.options.patience);
        let (_, offer) = self.open(until).with_context(|| {
            format!("{}: cannot ask its backend; is it running and serving this disk?", self.name())
        })?;
        if inner.known { self.check(&offer, &inner) } else { Ok(()) }
    }

    /// See [`crate::device::Device::resume`].
    pub(super) fn resume(&self) -> Result<()> {
        let mut inner = self.lock();
        if !inner.stopped {
            return Ok(());
        }
        self.drop_closed(&mut inner);
        if inner.link.is_none() {
            self.open_patiently(&mut inner)?;
        }
        if let Err(e) = self.check_and_prepare(&mut inner) {
            self.lose(&mut inner, String::new());
            return Err(e).with_context(|| format!("{}: cannot resume; it stays paused", self.name()));
        }
        self.run_rings(&mut inner);
        Ok(())
    }

    /// See [`crate::device::Device::go_on`].
    pub(super) fn go_on(&self) {
        let mut inner = self.lock();
        if !inner.stopped {
            return;
        }
        self.drop_closed(&mut inner);
        // One attempt only: the watcher makes the others.
        let until = self.answer_by();
        let connected = if inner.link.is_none() { self.open_once(&mut inner, until) } else { Ok(()) };
        match connected.and_then(|()| self.check_and_prepare(&mut inner)) {
            Ok(()) => self.run_rings(&mut inner),
            Err(e) => {
                // From here on it is a device that runs and whose backend is away.
                inner.stopped = false;
                self.lose(&mut inner, format!("{e:#}"));
            }
        }
    }

    /// Forgets a connection that the backend closed during a pause.
    fn drop_closed(&self, inner: &mut Inner) {
        if inner.link.as_ref().is_some_and(|(link, _)| is_closed(&link.stream())) {
            self.lose(inner, String::from("it went away during the pause"));
        }
    }

    pub(super) fn check_and_prepare(&self, inner: &mut Inner) -> Result<()> {
        self.check_link(inner)?;
        self.prepare(inner)
    }

    /// Lets a device run that was prepared. A backend that fails now is one that fails later: another connection is sought.
    fn run_rings(&self, inner: &mut Inner) {
        self.take_offer(inner);
        inner.stopped = false;
        inner.outage = Outage::None;
        self.notices.set_needs_reset(false);
        if let Err(e) = self.enable(inner) {
            self.lose(inner, format!("it did not start its queues: {e:#}"));
        }
        self.nudge(inner);
        self.changed();
    }

    /// See [`crate::device::Device::start_logging`].
    pub(super) fn start_logging(&self) -> Result<()> {
        let mut inner = self.lock_settled("log its writes")?;
        if inner.logs.is_some() {
            return Ok(());
        }
        let logs = Logs::new(&self.ram)?;
        // Rings that do not run get the log when they do.
        if let Err(e) = self.switch_log(&inner, Some(&logs)) {
            self.lose(&mut inner, format!("it did not start to log: {e:#}"));
            return Err(e).with_context(|| format!("{}: cannot log its writes", self.name()));
        }
        inner.logs = Some(logs);
        Ok(())
    }

    /// See [`crate::device::Device::stop_logging`].
    pub(super) fn stop_logging(&self) -> Result<()> {
        let mut inner = self.lock();
        if inner.logs.take().is_some()
            && let Err(e) = self.switch_log(&inner, None)
        {
            // The next connection does not log.
            self.lose(&mut inner, format!("it did not stop to log: {e:#}"));
        }
        Ok(())
    }

    /// Switches logging of running rings on or off.
    fn switch_log(&self, inner: &Inner, logs: Option<&Logs>) -> Result<()> {
        let (Some((link, _)), Some(run), false) = (&inner.link, &inner.run, inner.stopped) else {
            return Ok(());
        };
        let log = logs.map(Logs::active);
        let (features, rings, ram) = (run.features, run.rings.clone(), self.ram.clone());
        link.call(self.answer_by(), move |frontend| {
            if let Some(log) = &log {
                plan::set_log(frontend, log)?;
            }
            plan::set_features(frontend, features, log.is_some())?;
            rings.iter().try_for_each(|ring| plan::set_addresses(frontend, &ram, ring, log.is_some()))
        })
    }

    /// See [`crate::device::Device::collect_dirty`].
    pub(super) fn collect_dirty(&self, into: &mut PageSet) -> Result<()> {
        ensure!(into.pages() == self.ram.pages(), "a set of {} pages for another memory", into.pages());
        let mut guard = self.lock_settled("collect what it wrote")?;
        let inner = &mut *guard;
        let Some(logs) = &mut inner.logs else { return Ok(()) };
        match &inner.link {
            Some((link, _)) if inner.run.is_some() && !inner.stopped => {
                let next = logs.turn()?;
                let turned = link.call(self.answer_by(), move |frontend| plan::set_log(frontend, &next));
                if let Err(e) = turned {
                    self.lose(inner, format!("it did not take a new log: {e:#}"));
                    return Err(e).with_context(|| format!("{}: cannot collect what it wrote", self.name()));
                }
                logs.take_old();
            }
            // No ring runs.
            _ => logs.take_all(),
        }
        logs.report(into);
        Ok(())
    }

    /// Puts a state of a paused machine in place.
    pub(super) fn restore(&self, offer: Offer, run: Option<Run>) -> Result<()> {
        let mut inner = self.lock();
        inner.run = run;
        inner.stopped = true;
        inner.known = true;
        inner.inflight = None;
        inner.outage = Outage::None;
        self.set_offer(offer);
        self.changed();
        self.check_link(&inner)
    }
}

impl Backend for Disk {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.offer.lock().unwrap_or_else(PoisonError::into_inner).features
    }

    fn notices(&self) -> &Notices {
        &self.notices
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let offer = self.offer.lock().unwrap_or_else(PoisonError::into_inner);
        let from = usize::try_from(offset).ok().and_then(|offset| offer.config.get(offset..));
        for (byte, value) in data.iter_mut().zip(from.unwrap_or_default()) {
            *byte = *value;
        }
    }

    fn write_config(&self, features: u64, offset: u64, data: &[u8]) {
        let may = features >> VIRTIO_BLK_F_CONFIG_WCE & 1 == 1;
        let &[wce @ (0 | 1)] = data else { return };
        if !may || offset != CONFIG_WCE as u64 {
            return;
        }
        let mut inner = self.lock();
        let Some((link, fresh)) = &mut inner.link else {
            // The driver reads back that nothing has changed.
            return;
        };
        let flags = VhostUserConfigFlags::WRITABLE;
        let set = link.call(self.answer_by(), move |frontend| {
            frontend.set_config(CONFIG_WCE as u32, flags, &[wce]).context("SET_CONFIG of the write cache")
        });
        match set {
            Ok(()) => {
                fresh.set_wce(wce);
                self.offer.lock().unwrap_or_else(PoisonError::into_inner).set_wce(wce);
            }
            Err(e) => self.lose(&mut inner, format!("{e:#}")),
        }
    }

    fn activate(&self, features: u64, queues: Vec<ReadyQueue>) {
        let mut inner = self.lock();
        let bases = Some(vec![0; queues.len()]);
        inner.run = Some(Run { features, rings: queues, bases });
        inner.inflight = None;
        if inner.stopped {
            return;
        }
        if inner.link.is_none() {
            return self.seek(&mut inner);
        }
        let started = self.prepare(&mut inner).and_then(|()| self.enable(&mut inner));
        if let Err(e) = started {
            self.lose(&mut inner, format!("it did not start the guest's queues: {e:#}"));
        }
    }

    fn deactivate(&self) {
        let mut inner = self.lock();
        if !inner.stopped
            && let Err(e) = self.stop_rings(&inner)
        {
            self.lose(&mut inner, format!("it did not stop its queues: {e:#}"));
        }
        inner.run = None;
        inner.inflight = None;
        // The guest may use the memory for something else as soon as this returns.
        let until = Instant::now() + self.options.patience;
        while inner.old.is_some() && Instant::now() < until {
            let left = until.saturating_duration_since(Instant::now());
            inner = self.settled.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if inner.old.is_some() {
            tracing::error!("{}: the guest was reset, but a request may still be in flight", self.name());
        }
        self.seek(&mut inner);
    }

    fn kick(&self, queue: u16) {
        if let Some(kick) = self.kicks.get(usize::from(queue)) {
            let _ = kick.write(1);
        }
    }
}

impl Disk {
    /// Has a connection sought, if there is none and nobody seeks.
    fn seek(&self, inner: &mut Inner) {
        if inner.link.is_none() && !inner.stopped && !matches!(inner.outage, Outage::Until(..)) {
            let why = String::from("the guest began anew");
            inner.outage = Outage::Until(Instant::now() + self.options.reconnect, why);
            self.changed();
        }
    }
}
