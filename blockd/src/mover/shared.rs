//! The move as the workers and the move's own threads share it: the machine behind a mutex, and what its actions
//! set in motion.
//!
//! Actions are carried out in the machine's order, under its lock: the route is swapped at once, a worker gets its word
//! by mail, and what takes time goes to the move's threads by channel.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwap;
use mirror::{Action, Event, ExtentRange, Machine, Route as RouteKind, Side, Tick, WriteId, WriteTo};
use tokio::sync::mpsc::UnboundedSender;

use super::marks::Marks;
use crate::disk::handle::ImageHandle;
use crate::disk::route::Route;
use crate::worker::mailbox::{Mail, Mailbox};

/// What a worker is told about its guest's write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteWord {
    /// The write may go.
    Start(WriteId, WriteTo),
    /// The guest may be told this side's result.
    Complete(WriteId, Side),
}

impl WriteWord {
    fn id(self) -> WriteId {
        match self {
            Self::Start(id, _) | Self::Complete(id, _) => id,
        }
    }
}

/// Names a write by the worker and the slot that hold it: unique while it is in flight.
pub fn write_id(worker: usize, slot: u32) -> WriteId {
    (worker as u64) << 32 | u64::from(slot)
}

/// The worker and the slot of a write.
pub fn parse_write_id(id: WriteId) -> (usize, u32) {
    ((id >> 32) as usize, id as u32)
}

/// A move under way.
#[derive(Debug)]
pub struct MoveShared {
    machine: Mutex<Machine>,
    /// Bytes of an extent.
    pub extent_size: u64,
    /// How many of the source's newest images are copied by themselves; `None` when all that it reads as is.
    pub own_levels: Option<usize>,
    started: Instant,
    marks: Marks,
    delivering: Mutex<()>,
    /// Whether guest flushes have to go to both images.
    flush_target: AtomicBool,
    /// Whether a flush of the target has failed: what that has lost no later flush brings back, though it may succeed.
    flush_lost: AtomicBool,
    actions: UnboundedSender<Action>,
    mailboxes: Vec<Arc<Mailbox>>,
    route: Arc<ArcSwap<Route>>,
    source: Arc<ImageHandle>,
    target: Arc<ImageHandle>,
}

impl MoveShared {
    /// A move that has not begun. `actions` gets what the move's threads are to do.
    #[expect(clippy::too_many_arguments, reason = "one use")]
    pub fn new(
        machine: Machine,
        config: &mirror::Config,
        own_levels: Option<usize>,
        actions: UnboundedSender<Action>,
        mailboxes: Vec<Arc<Mailbox>>,
        route: Arc<ArcSwap<Route>>,
        source: Arc<ImageHandle>,
        target: Arc<ImageHandle>,
    ) -> Arc<Self> {
        Arc::new(Self {
            machine: Mutex::new(machine),
            extent_size: config.extent_size,
            own_levels,
            started: Instant::now(),
            marks: Marks::new(config.extent_count()),
            delivering: Mutex::default(),
            flush_target: AtomicBool::new(false),
            flush_lost: AtomicBool::new(false),
            actions,
            mailboxes,
            route,
            source,
            target,
        })
    }

    /// The image that the disk is moved from.
    pub fn source(&self) -> &Arc<ImageHandle> {
        &self.source
    }

    /// The image that the disk is moved to.
    pub fn target(&self) -> &Arc<ImageHandle> {
        &self.target
    }

    /// Now, as the machine counts it.
    pub fn now(&self) -> Tick {
        Tick(self.started.elapsed().as_micros() as u64)
    }

    /// The machine, to look at.
    pub fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a guest's flush has to reach both images.
    pub fn flushes_both(&self) -> bool {
        self.flush_target.load(Ordering::SeqCst)
    }

    /// What a flush of the target counts as that ended like this.
    ///
    /// # Errors
    /// Its own error, or that of an earlier flush since the move last gave up on what had been flushed.
    pub fn target_flushed(&self, ended: Result<(), String>) -> Result<(), String> {
        match ended {
            Err(e) => {
                self.flush_lost.store(true, Ordering::SeqCst);
                Err(e)
            }
            Ok(()) if self.flush_lost.load(Ordering::SeqCst) => {
                Err("an earlier flush of the target has failed, and may have lost something".into())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Tells the machine what happened, and sets in motion what it answers.
    pub fn apply(self: &Arc<Self>, event: Event) {
        self.apply_from(None, event, &mut Vec::new());
    }

    /// The same for a worker, which gets words about its own writes in `own` instead of by mail.
    pub fn apply_from(self: &Arc<Self>, worker: Option<usize>, event: Event, own: &mut Vec<WriteWord>) {
        let mut actions = Vec::new();
        let mut machine = self.machine();
        machine.apply(self.now(), event, &mut actions);
        for action in actions {
            self.dispatch(worker, action, own);
        }
    }

    fn dispatch(self: &Arc<Self>, worker: Option<usize>, action: Action, own: &mut Vec<WriteWord>) {
        match action {
            Action::StartWrite { id, to } => self.tell(worker, WriteWord::Start(id, to), own),
            Action::CompleteWrite { id, result_of } => {
                self.tell(worker, WriteWord::Complete(id, result_of), own)
            }
            action => {
                match &action {
                    Action::SetRoute(kind) => self.set_route(*kind),
                    Action::FlushTarget => self.flush_target.store(true, Ordering::SeqCst),
                    Action::FlushSourceOnly => {
                        self.flush_target.store(false, Ordering::SeqCst);
                        self.flush_lost.store(false, Ordering::SeqCst);
                    }
                    _ => {}
                }
                // The receiver goes only when the machine has ended and emits nothing any more.
                let _ = self.actions.send(action);
            }
        }
    }

    fn tell(self: &Arc<Self>, worker: Option<usize>, word: WriteWord, own: &mut Vec<WriteWord>) {
        let (to, _) = parse_write_id(word.id());
        if worker == Some(to) {
            own.push(word);
        } else {
            self.mailboxes[to].post(Mail::Write(word));
        }
    }

    fn set_route(self: &Arc<Self>, kind: RouteKind) {
        let route = match kind {
            RouteKind::Source => Route::Single(self.source.clone()),
            RouteKind::Tracked => Route::Tracked(self.source.clone(), self.clone()),
            RouteKind::Mirrored => Route::Mirrored {
                source: self.source.clone(),
                target: self.target.clone(),
                moving: self.clone(),
            },
            RouteKind::Target => Route::Single(self.target.clone()),
        };
        self.route.store(Arc::new(route));
    }

    /// Remembers that a guest write touched `len` bytes at `offset`. Lock-free.
    pub fn mark(&self, offset: u64, len: u64) {
        self.marks.mark(ExtentRange::touched_by(offset, len, self.extent_size));
    }

    /// Hands all marks so far to the machine.
    pub fn deliver_marks(self: &Arc<Self>) {
        // Collecting and telling is one step: whoever finds nothing to collect may count on the machine knowing it all.
        let _one = self.delivering.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ranges = Vec::new();
        self.marks.collect(|range| ranges.push(range));
        for range in ranges {
            self.apply(Event::Dirtied(range));
        }
    }
}
