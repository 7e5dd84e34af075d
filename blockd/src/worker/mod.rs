//! The data path: one thread, one ring, some queues.
//!
//! ```text
//!   available ring ─► parse ─► gate, route ─► image.map_* ─► parts ─► io_uring ─► status, used ring ─► call
//!                                │                                       ▲
//!                                └── a move is under way: its word first ┘
//! ```
//!
//! A worker owns its queues, its ring and everything in flight; other threads reach it by mail only. Guest memory is
//! never registered with the ring: after a balloon has punched a hole into it, fixed I/O would go on to the lost page
//! and succeed. Everything that the worker waits for (kicks, mail, I/O) completes in the ring, so there is one place to
//! sleep. Before it sleeps it polls for a while, longer when that paid off lately.

pub mod buffer;
pub mod command;
mod complete;
mod execute;
mod here;
mod iov;
mod kick;
mod local;
pub mod mailbox;
mod queue;
pub mod request;
pub mod slot;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use arc_swap::Cache;
use formats::Pieces;
use io_uring::{IoUring, opcode, squeue, types};

use crate::disk::counters::WorkerCounters;
use crate::disk::route::Route;
use crate::disk::shared::DiskShared;
use crate::gate::GateShard;
use crate::mover::shared::WriteWord;
use crate::vhost::ring::Buffer;
use buffer::BufferPool;
use command::{Command, QueueKey};
use kick::Kicks;
use local::Local;
use mailbox::{Mail, Mailbox};
use queue::Queue;
use slot::Slot;

pub use request::{Limits, REQUEST_BYTES_MAX, SECTOR, SERIAL_BYTES};

/// Submission entries of a worker's ring; completions have twice as many. Small, because rings count against the limit
/// of locked memory of a daemon that is not root.
const RING_ENTRIES: u32 = 256;
/// Most requests in flight at one worker; what is beyond stays in the guest's rings.
const SLOTS_MAX: usize = 1024;
/// Most bytes of data in flight at one worker, but for a last request: bounds the memory for buffers of our own.
const BYTES_IN_FLIGHT_MAX: u64 = 256 << 20;
/// Most requests taken from one queue before the next one has its turn.
const BATCH: usize = 64;
/// Submissions that wait for more while requests are taken. A disk that has nothing to do waits for the first of them, and
/// a host's block device often reports a whole batch at once: without a bound it would rest while the next is prepared.
const SUBMIT_EVERY: usize = 4;
/// Completions after which further requests are looked for, in units of one and one more for each 32 KiB, for the same
/// reason.
const REAP_MAX: u64 = 8;
/// Bytes after whose copying by the worker itself the next queue has its turn, and the drivers are told: so that a driver that
/// sleeps makes its next requests while the ones before are copied.
const BYTES_HERE_MAX: u64 = 128 << 10;
/// The longest that a worker polls before it sleeps.
const POLL_MAX: Duration = Duration::from_micros(64);
/// The shortest window that is worth polling at all.
const POLL_MIN: Duration = Duration::from_micros(4);

/// What a completion belongs to: kind in the top byte.
const KIND_BELL: u64 = 1 << 56;
const KIND_KICK: u64 = 2 << 56;
const KIND_KICK_POLL: u64 = 3 << 56;
const KIND_PART: u64 = 4 << 56;
const KIND_IGNORE: u64 = 5 << 56;
const KIND_MASK: u64 = 0xff << 56;

/// A worker's thread, as the disk holds it.
#[derive(Debug)]
pub struct WorkerHandle {
    /// Its mailbox.
    pub mailbox: Arc<Mailbox>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl WorkerHandle {
    /// Starts a worker for `disk`. Returns once its ring exists.
    ///
    /// # Errors
    /// When no ring or no thread can be made; the text says what may be in the way.
    pub fn start(index: usize, disk: &Arc<DiskShared>, mailbox: Arc<Mailbox>) -> Result<Self, String> {
        let (ready, started) = std::sync::mpsc::channel();
        let (disk, mail) = (disk.clone(), mailbox.clone());
        let name = format!("io-{index}-{}", disk.id);
        let thread = std::thread::Builder::new()
            .name(name.chars().take(15).collect())
            .spawn(move || match Worker::new(index, &disk, mail) {
                Ok(mut worker) => {
                    let _ = ready.send(Ok(()));
                    worker.run();
                }
                Err(e) => drop(ready.send(Err(e))),
            })
            .map_err(|e| format!("cannot start a thread: {e}"))?;
        match started.recv().unwrap_or_else(|_| Err("the worker ended at once".to_owned())) {
            Ok(()) => Ok(Self { mailbox, thread: Some(thread) }),
            Err(e) => {
                // It holds the disk as long as it is there.
                let _ = thread.join();
                Err(e)
            }
        }
    }

    /// Ends the worker when everything in flight has ended.
    pub fn stop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.mailbox.post(Mail::Command(Command::Exit));
            if thread.join().is_err() {
                tracing::error!("an I/O worker had panicked");
            }
        }
    }
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Worker {
    index: usize,
    disk: Arc<DiskShared>,
    counters: Arc<WorkerCounters>,
    ring: IoUring,
    mailbox: Arc<Mailbox>,
    bell: Box<[u8; 8]>,
    shard: GateShard,
    route: Cache<Arc<ArcSwap<Route>>, Arc<Route>>,
    /// The route as requests share it, without touching the shared count for each.
    route_held: Local<Route>,
    queues: Vec<Option<Queue>>,
    kicks: Kicks,
    slots: Vec<Option<Box<Slot>>>,
    free: Vec<u32>,
    in_flight: usize,
    /// Data of the requests in flight, each of which may need a buffer of ours.
    bytes_in_flight: u64,
    /// Bytes that were copied by the worker itself since the present queue has its turn.
    bytes_here: u64,
    pool: BufferPool,
    pieces: Pieces,
    buffers: Vec<Buffer>,
    /// Words of a move about own writes, to be looked at in this round.
    words: Vec<WriteWord>,
    stops: Vec<(QueueKey, Sender<Option<u16>>)>,
    /// Requests that wait for a route, in the order in which they were taken. While there are any, no further ones are
    /// taken.
    held: VecDeque<u32>,
    exiting: bool,
    poll_window: Duration,
    /// The time as it was read last: when the requests that are being taken began. Reading it costs as much as a good part
    /// of the rest.
    clock: Instant,
}

impl Worker {
    fn new(index: usize, disk: &Arc<DiskShared>, mailbox: Arc<Mailbox>) -> Result<Self, String> {
        let ring = IoUring::builder()
            .setup_cqsize(RING_ENTRIES * 4)
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .dontfork()
            .build(RING_ENTRIES)
            .map_err(|e| {
                format!(
                    "cannot set up io_uring: {e} (needs Linux 6.1; see kernel.io_uring_disabled, the container's seccomp \
                     profile, and the limit of locked memory when not root)"
                )
            })?;
        let route = Cache::new(disk.route.clone());
        let route_held = Local::new(disk.route.load_full());
        Ok(Self {
            index,
            disk: disk.clone(),
            counters: disk.counters.worker(index),
            ring,
            mailbox,
            bell: Box::new([0; 8]),
            shard: disk.gate.shard(),
            route,
            route_held,
            queues: Vec::new(),
            kicks: Kicks::default(),
            slots: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            bytes_in_flight: 0,
            bytes_here: 0,
            pool: BufferPool::default(),
            pieces: Pieces::new(),
            buffers: Vec::new(),
            words: Vec::new(),
            stops: Vec::new(),
            held: VecDeque::new(),
            exiting: false,
            poll_window: Duration::ZERO,
            clock: Instant::now(),
        })
    }

    fn run(&mut self) {
        self.arm_bell();
        loop {
            let mut busy = self.read_mail();
            busy |= self.poll_queues();
            busy |= self.follow_words();
            self.submit();
            busy |= self.reap();
            busy |= self.follow_words();
            self.call_drivers();
            self.answer_stops();
            if self.exiting && self.queues.iter().flatten().all(Queue::is_drained) && self.stops.is_empty() {
                return;
            }
            if !busy {
                self.idle();
            }
        }
    }

    // --- the ring ---------------------------------------------------------------------------------------------------

    fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: whoever builds an entry keeps its buffers and descriptors alive until the completion: slots hold the
        // guest memory snapshot and their vectors, kicks and the bell own theirs.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.submit();
        }
    }

    fn submit(&mut self) {
        loop {
            let wants_entry = {
                let sq = self.ring.submission();
                !sq.is_empty() || sq.taskrun() || sq.cq_overflow()
            };
            if !wants_entry {
                return;
            }
            match self.ring.submit() {
                Ok(_) => return,
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
                // Too many completions wait: they are reaped in the next round, and submitted again after that.
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                    self.reap();
                }
                Err(e) => panic!("io_uring_enter: {e}"),
            }
        }
    }

    fn reap(&mut self) -> bool {
        let mut any = false;
        let mut weight = 0;
        while weight < REAP_MAX {
            let Some((data, result)) = self.ring.completion().next().map(|c| (c.user_data(), c.result()))
            else {
                return any;
            };
            any = true;
            weight += 1 + (result.max(0) as u64 >> 15);
            let rest = data & !KIND_MASK;
            match data & KIND_MASK {
                KIND_PART => self.part_ended((rest >> 32) as u32, rest as u32 as usize, result),
                KIND_BELL => self.arm_bell(),
                KIND_KICK => self.kick_ended(rest as usize, result),
                KIND_KICK_POLL => self.kick_polled(rest as usize, result),
                _ => {}
            }
        }
        any
    }

    fn arm_bell(&mut self) {
        let entry = opcode::Read::new(types::Fd(self.mailbox.bell()), self.bell.as_mut_ptr(), 8).build();
        self.push(entry.user_data(KIND_BELL));
    }

    // --- sleeping ---------------------------------------------------------------------------------------------------

    /// Nothing to do: polls for a while, then sleeps until something completes.
    fn idle(&mut self) {
        let polled = Instant::now();
        if self.poll_window >= POLL_MIN {
            while polled.elapsed() < self.poll_window {
                if self.something_waits() {
                    return;
                }
                std::hint::spin_loop();
            }
        }
        if self.enable_kicks() {
            return;
        }
        let slept = Instant::now();
        match self.ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
            Err(e) => panic!("io_uring_enter: {e}"),
        }
        self.disable_kicks();
        // What came soon would have been caught by polling; what came late made it a waste.
        self.poll_window = if slept.elapsed() < POLL_MAX {
            (self.poll_window * 2).clamp(POLL_MIN, POLL_MAX)
        } else {
            self.poll_window / 2
        };
    }

    fn something_waits(&mut self) -> bool {
        if !self.ring.completion().is_empty() || self.ring.submission().taskrun() {
            return true;
        }
        self.has_room() && self.queues.iter().flatten().any(Queue::has_work)
    }

    /// Asks all drivers for kicks. Returns whether something came in meanwhile.
    fn enable_kicks(&mut self) -> bool {
        if !self.has_room() {
            return false;
        }
        let mut any = false;
        for queue in self.queues.iter_mut().flatten() {
            any |= queue.enable_kicks();
        }
        if any {
            self.disable_kicks();
        }
        any
    }

    fn disable_kicks(&mut self) {
        for queue in self.queues.iter_mut().flatten() {
            queue.disable_kicks();
        }
    }

    // --- mail -------------------------------------------------------------------------------------------------------

    fn read_mail(&mut self) -> bool {
        let mail = self.mailbox.take();
        let any = !mail.is_empty();
        for item in mail {
            match item {
                Mail::Write(word) => self.words.push(word),
                Mail::Command(command) => self.obey(command),
            }
        }
        any
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Start(key, start, done) => {
                self.start_queue(key, *start);
                let _ = done.send(());
            }
            Command::Update(key, setup, done) => {
                let _ = done.send(self.update_queue(key, *setup));
            }
            Command::Stop(key, done) => {
                if let Some(queue) = self.queue_mut(key) {
                    queue.stopping = true;
                }
                self.stops.push((key, done));
            }
            Command::Look => {
                // Whatever the old route held on to is let go of, also while no request comes.
                self.current_route();
                for index in std::mem::take(&mut self.held) {
                    let slot = self.slots[index as usize].take().expect("what is held is in its slot");
                    self.execute(index, slot);
                }
            }
            Command::Exit => {
                self.exiting = true;
                for queue in self.queues.iter_mut().flatten() {
                    queue.stopping = true;
                }
            }
        }
    }

    /// Answers those who wait for a queue that has drained, and forgets the queue.
    fn answer_stops(&mut self) {
        let mut i = 0;
        while i < self.stops.len() {
            let key = self.stops[i].0;
            match self.queues.iter().position(|q| q.as_ref().is_some_and(|q| q.key == key)) {
                Some(at) if self.queues[at].as_ref().is_some_and(|q| !q.is_drained()) => i += 1,
                at => {
                    let (_, done) = self.stops.swap_remove(i);
                    let queue = at.and_then(|at| self.queues[at].take());
                    if let Some(kick) = queue.as_ref().and_then(|q| q.kick) {
                        self.drop_kick(kick);
                    }
                    let _ = done.send(queue.map(|q| q.ring.next_avail()));
                }
            }
        }
    }

    // --- slots ------------------------------------------------------------------------------------------------------

    /// Whether another request may be taken.
    fn has_room(&self) -> bool {
        self.held.is_empty() && self.in_flight < SLOTS_MAX && self.bytes_in_flight < BYTES_IN_FLIGHT_MAX
    }

    /// The current route, shared among requests without touching its atomic count.
    fn current_route(&mut self) -> Local<Route> {
        let now = self.route.load();
        if !Arc::ptr_eq(now, self.route_held.shared()) {
            self.route_held = Local::new(now.clone());
        }
        self.route_held.clone()
    }

    fn take_slot(&mut self) -> (u32, Box<Slot>) {
        self.in_flight += 1;
        match self.free.pop() {
            Some(i) => (i, self.slots[i as usize].take().unwrap_or_default()),
            None => {
                self.slots.push(None);
                (self.slots.len() as u32 - 1, Box::default())
            }
        }
    }

    fn free_slot(&mut self, index: u32, mut slot: Box<Slot>) {
        self.bytes_in_flight -= slot.data_bytes;
        slot.reset();
        self.slots[index as usize] = Some(slot);
        self.free.push(index);
        self.in_flight -= 1;
    }
}
