//! The guest: one queue, whole pages, every sector known.
//!
//! The library's `VerifiedLoad` makes requests of all sizes on buffers of all alignments, to find faults. This one
//! makes what a file system makes, aligned requests of one size, to measure; it remembers when each request
//! began and how long it took, so that requests are sorted into phases afterwards, when it is known when those began.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::{TimeSpec, TimeValLike};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use system_tests::model::{Model, SECTOR, stamp};
use system_tests::ring::{Completion, FLUSH, OK, READ, Request, WRITE};
use system_tests::{FrontEnd, Options};

use crate::interrupt;

/// Sectors of a request of the random load: one page.
const PAGE_SECTORS: u64 = 8;
/// Sectors of a request that fills or verifies.
const CHUNK_SECTORS: u64 = 512;
/// Requests in flight while filling and verifying.
const CHUNK_DEPTH: usize = 16;
/// One request in this many is a flush.
const FLUSH_EVERY: u32 = 512;
/// How long nothing may complete before the server counts as hung.
const PATIENCE: Duration = Duration::from_secs(30);

/// A request that is over.
#[derive(Debug, Clone, Copy)]
pub struct Record {
    /// When it was put into the ring.
    pub began: Instant,
    /// Until its completion was seen.
    pub took: Duration,
    /// How it ended.
    pub outcome: Outcome,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// As it should.
    Right,
    /// It read what was never there, or no longer.
    Mismatch,
    /// The device said that it failed.
    Failed,
}

#[derive(Debug)]
struct Slot {
    kind: u32,
    sector: u64,
    count: u64,
    snapshot: Vec<u32>,
    began: Instant,
    buffer: u64,
}

/// What the random load does.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Requests a second.
    pub rate: f64,
    /// Most requests in flight.
    pub depth: usize,
}

/// A guest and what its disk must hold.
#[derive(Debug)]
pub struct Load {
    front: FrontEnd,
    model: Model,
    random: ChaCha8Rng,
    slots: Vec<Option<Slot>>,
    spare: Vec<Vec<u32>>,
    buffers: Vec<u64>,
    scratch: Vec<u8>,
    records: Vec<Record>,
    first_fault: Option<String>,
    faults: u64,
    last_progress: Instant,
}

impl Load {
    /// Connects to a disk that reads as zeroes.
    ///
    /// # Errors
    /// When the connection or the negotiation fails.
    pub fn connect(socket: &Path, seed: u64, depth: usize) -> Result<Self> {
        let mut front = FrontEnd::start(socket, Options::default())?;
        let sectors = front.config()?.capacity;
        let size = usize::from(front.rings[0].options().size);
        ensure!((1..=size).contains(&depth), "a depth of {depth}: 1 to {size} is possible");
        let buffer = |_| front.memory.alloc(0, CHUNK_SECTORS * SECTOR as u64, 4096);
        let buffers = (0..depth.max(CHUNK_DEPTH)).map(buffer).collect();
        front.rings[0].poll_only();
        Ok(Self {
            model: Model::new(sectors),
            random: ChaCha8Rng::seed_from_u64(seed),
            slots: (0..size).map(|_| None).collect(),
            spare: Vec::new(),
            buffers,
            scratch: Vec::new(),
            records: Vec::new(),
            first_fault: None,
            faults: 0,
            last_progress: Instant::now(),
            front,
        })
    }

    /// Bytes of the disk.
    pub fn bytes(&self) -> u64 {
        self.model.sectors() * SECTOR as u64
    }

    /// Disconnects; what is left is the knowledge of what the disk must hold.
    pub fn into_model(self) -> Model {
        self.model
    }

    /// What the random load's requests did.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Requests of any kind that failed or read something wrong, and what the first of them said.
    pub fn faults(&self) -> (u64, Option<&str>) {
        (self.faults, self.first_fault.as_deref())
    }

    /// Writes these bytes of the disk from front to back with data that is nowhere else, then flushes.
    ///
    /// # Errors
    /// When the server goes away or hangs, or on a signal.
    pub fn fill(&mut self, bytes: std::ops::Range<u64>) -> Result<()> {
        self.sweep(WRITE, bytes)?;
        self.flush()
    }

    /// Reads these bytes of the disk and compares every sector with what it must hold.
    ///
    /// # Errors
    /// As [`Load::fill`]. What is wrong on the disk is counted, see [`Load::faults`].
    pub fn verify(&mut self, bytes: std::ops::Range<u64>) -> Result<()> {
        self.sweep(READ, bytes)
    }

    /// Has the disk make durable what was written.
    ///
    /// # Errors
    /// As [`Load::fill`].
    pub fn flush(&mut self) -> Result<()> {
        self.submit(FLUSH, 0, 0);
        self.front.rings[0].kick();
        self.drain(false)
    }

    fn sweep(&mut self, kind: u32, bytes: std::ops::Range<u64>) -> Result<()> {
        let mut next = bytes.start / SECTOR as u64;
        let end = bytes.end / SECTOR as u64;
        ensure!(end <= self.model.sectors(), "the disk ends at sector {}", self.model.sectors());
        while next < end {
            interrupt::check()?;
            while next < end && self.front.rings[0].in_flight() < CHUNK_DEPTH {
                let count = CHUNK_SECTORS.min(end - next);
                self.submit(kind, next, count);
                next += count;
            }
            self.front.rings[0].kick();
            if self.reap(false) == 0 {
                self.wait(Duration::from_millis(10))?;
            }
        }
        self.drain(false)
    }

    /// Reads and writes pages all over the disk until `stop`.
    ///
    /// # Errors
    /// As [`Load::fill`].
    pub fn run(&mut self, pace: Pace, stop: &AtomicBool) -> Result<()> {
        let (mut since, mut made) = (Instant::now(), 0u64);
        while !stop.load(Ordering::Acquire) {
            interrupt::check()?;
            let due = (since.elapsed().as_secs_f64() * pace.rate) as u64;
            if due > made + pace.depth as u64 {
                // What could not be asked for in time is not made up for: a guest does not do so either.
                (since, made) = (Instant::now(), 0);
            }
            let before = made;
            while made < due && self.front.rings[0].in_flight() < pace.depth {
                self.submit_random();
                made += 1;
            }
            if made > before {
                self.front.rings[0].kick();
            }
            if self.reap(true) == 0 {
                let next =
                    Duration::from_secs_f64((made + 1) as f64 / pace.rate).saturating_sub(since.elapsed());
                let full = self.front.rings[0].in_flight() >= pace.depth;
                self.wait(if full {
                    Duration::from_millis(10)
                } else {
                    next.min(Duration::from_millis(10))
                })?;
            }
        }
        self.drain(true)
    }

    fn submit_random(&mut self) {
        if self.random.random_ratio(1, FLUSH_EVERY) {
            return self.submit(FLUSH, 0, 0);
        }
        let page = self.random.random_range(0..self.model.sectors() / PAGE_SECTORS);
        let (sector, write) = (page * PAGE_SECTORS, self.random.random_bool(0.5));
        // Two writes to a page at once would leave open which of them lasts: such a one becomes a read.
        let kind = if write && !self.model.is_busy(sector, PAGE_SECTORS) { WRITE } else { READ };
        self.submit(kind, sector, PAGE_SECTORS);
    }

    fn submit(&mut self, kind: u32, sector: u64, count: u64) {
        let buffer = self.buffers.pop().expect("a buffer for each request in flight");
        let len = count as usize * SECTOR;
        let mut snapshot = self.spare.pop().unwrap_or_default();
        match kind {
            WRITE => {
                let generation = self.model.begin_write(sector, count);
                self.scratch.resize(len, 0);
                stamp(&mut self.scratch, sector, generation);
                self.front.memory.write(buffer, &self.scratch);
            }
            READ => self.model.snapshot(sector, count, &mut snapshot),
            _ => {}
        }
        let data = [(buffer, len as u32)];
        let data = if kind == FLUSH { &data[..0] } else { &data[..] };
        let began = Instant::now();
        let token = self.front.rings[0].submit(&Request { kind, sector, data });
        let token = token.expect("the ring has room for the depth that was checked");
        self.slots[usize::from(token.0)] = Some(Slot { kind, sector, count, snapshot, began, buffer });
    }

    fn reap(&mut self, record: bool) -> usize {
        let mut taken = 0;
        while let Some(done) = self.front.rings[0].poll() {
            let now = Instant::now();
            let slot =
                self.slots[usize::from(done.token.0)].take().expect("the ring knows what is in flight");
            let outcome = self.judge(&slot, done);
            if record {
                self.records.push(Record { began: slot.began, took: now - slot.began, outcome });
            }
            self.buffers.push(slot.buffer);
            self.spare.push(slot.snapshot);
            taken += 1;
        }
        if taken > 0 {
            self.last_progress = Instant::now();
        }
        taken
    }

    fn judge(&mut self, slot: &Slot, done: Completion) -> Outcome {
        let Slot { kind, sector, count, .. } = *slot;
        if done.status != OK {
            // A write that failed may be on the disk or not: it stays in flight for the model, which allows for both.
            self.fault(format!(
                "request {kind} of {count} sectors at {sector} failed with status {}",
                done.status
            ));
            return Outcome::Failed;
        }
        match kind {
            WRITE => self.model.acknowledge(sector, count),
            READ => {
                self.scratch.resize(count as usize * SECTOR, 0);
                self.front.memory.read(slot.buffer, &mut self.scratch);
                if let Err(wrong) = self.model.check_read(sector, &self.scratch, &slot.snapshot) {
                    self.fault(wrong.to_string());
                    return Outcome::Mismatch;
                }
            }
            _ => {}
        }
        Outcome::Right
    }

    fn fault(&mut self, what: String) {
        self.faults += 1;
        self.first_fault.get_or_insert(what);
    }

    fn drain(&mut self, record: bool) -> Result<()> {
        while self.front.rings[0].in_flight() > 0 {
            interrupt::check()?;
            if self.reap(record) == 0 {
                self.wait(Duration::from_millis(10))?;
            }
        }
        Ok(())
    }

    /// Sleeps until a completion or for `at_most`, so that the server has the processor.
    fn wait(&mut self, at_most: Duration) -> Result<()> {
        if self.front.is_hung_up() {
            bail!("the server has closed the connection");
        }
        let ring = &mut self.front.rings[0];
        if ring.in_flight() == 0 {
            self.last_progress = Instant::now();
        } else if self.last_progress.elapsed() > PATIENCE {
            bail!("{} requests are in flight and none was completed for {PATIENCE:?}", ring.in_flight());
        }
        if ring.arm() {
            let mut fds = [PollFd::new(ring.call_as_fd(), PollFlags::POLLIN)];
            let timeout = TimeSpec::microseconds(i64::try_from(at_most.as_micros()).unwrap_or(10_000));
            ppoll(&mut fds, Some(timeout), None)
                .or_else(interrupted_is_fine)
                .context("wait for completions")?;
        }
        let _ = ring.call_fd().read();
        ring.poll_only();
        Ok(())
    }
}

fn interrupted_is_fine(error: nix::Error) -> nix::Result<i32> {
    if error == nix::Error::EINTR { Ok(0) } else { Err(error) }
}
