//! A load that checks everything it reads against a [`Model`], and lives through the daemon's death.
//!
//! One thread drives all rings of one front end. Writes never overlap writes that are in flight (their order would be
//! open), reads overlap whatever they like.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::PATIENCE;
use crate::front::{Base, F_DISCARD, F_FLUSH, F_WRITE_ZEROES, FrontEnd};
use crate::histogram::Histogram;
use crate::model::{Model, SECTOR, stamp};
use crate::ring::{Completion, DISCARD, FLAG_UNMAP, FLUSH, OK, READ, Request, WRITE, WRITE_ZEROES};

/// How often each kind of request is made, relative to each other.
#[derive(Debug, Clone, Copy)]
pub struct Mix {
    /// Reads.
    pub read: u32,
    /// Writes.
    pub write: u32,
    /// Write zeroes, half of them with unmap.
    pub zero: u32,
    /// Discards; they have to read as zeroes afterwards.
    pub discard: u32,
    /// Flushes.
    pub flush: u32,
}

impl Mix {
    /// A bit of everything.
    pub const ALL: Self = Self { read: 40, write: 50, zero: 4, discard: 4, flush: 2 };
    /// Reads, writes and flushes.
    pub const PLAIN: Self = Self { read: 48, write: 50, zero: 0, discard: 0, flush: 2 };
    /// Writes only.
    pub const WRITES: Self = Self { read: 0, write: 1, zero: 0, discard: 0, flush: 0 };
}

/// What to do.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Of the random numbers.
    pub seed: u64,
    /// Requests in flight on each ring.
    pub depth: usize,
    /// Most sectors of a request.
    pub max_sectors: u64,
    /// Which sectors are used.
    pub range: std::ops::Range<u64>,
    /// Kinds of requests.
    pub mix: Mix,
    /// Requests a second; flat out when absent.
    pub rate: Option<f64>,
    /// Most segments of a request's data.
    pub max_segments: usize,
    /// Buffers for each request in flight, used in turn: with more of them, fewer pages are written twice.
    pub buffers_per_request: usize,
    /// Where rings go on after the connection was lost.
    pub base: Base,
    /// Remember when each write began and ended, for [`Model::check_copy`].
    pub history: bool,
    /// How long the daemon may be away.
    pub patience: Duration,
}

impl LoadOptions {
    /// Everything on the whole of a disk of `sectors` sectors, 16 requests at a time.
    pub fn new(seed: u64, sectors: u64) -> Self {
        Self {
            seed,
            depth: 16,
            max_sectors: 64,
            range: 0..sectors,
            mix: Mix::ALL,
            rate: None,
            max_segments: 3,
            buffers_per_request: 1,
            base: Base::Used,
            history: false,
            patience: PATIENCE,
        }
    }
}

/// What was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Reads whose content was right.
    pub reads: u64,
    /// Writes acknowledged.
    pub writes: u64,
    /// Discards and write-zeroes acknowledged.
    pub zeroes: u64,
    /// Flushes acknowledged.
    pub flushes: u64,
    /// Writes, discards and write-zeroes that were acknowledged before the last flush began.
    pub flushed: u64,
    /// Times that the connection was lost and made again.
    pub reconnects: u64,
    /// How many of these found a ring whose requests had not been completed in their order.
    pub out_of_order: u64,
    /// Requests that were in flight when the connection was lost.
    pub interrupted: u64,
}

impl Counts {
    /// Requests of all kinds.
    pub fn total(&self) -> u64 {
        self.reads + self.writes + self.zeroes + self.flushes
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { reads, writes, zeroes, flushes, reconnects, interrupted, out_of_order, .. } = self;
        write!(f, "{reads} reads, {writes} writes, {zeroes} zeroings, {flushes} flushes")?;
        if *reconnects > 0 {
            write!(
                f,
                ", {reconnects} reconnections with {interrupted} in flight, {out_of_order} out of order"
            )?;
        }
        Ok(())
    }
}

#[derive(Debug, Clone)]
struct Slot {
    kind: u32,
    sector: u64,
    count: u64,
    snapshot: Vec<u32>,
    since: Instant,
    buffer: u64,
    acknowledged_before: u64,
}

/// The load.
#[derive(Debug)]
pub struct VerifiedLoad {
    /// The connection.
    pub front: FrontEnd,
    /// What the disk must hold.
    pub model: Model,
    options: LoadOptions,
    random: ChaCha8Rng,
    slots: Vec<Vec<Option<Slot>>>,
    buffers: VecDeque<u64>,
    counts: Counts,
    phases: Vec<(String, Histogram)>,
    scratch: Vec<u8>,
    segments: Vec<(u64, u32)>,
    paced_since: Instant,
    paced: u64,
    last_progress: Instant,
}

impl VerifiedLoad {
    /// A load on the disk behind `front`, whose rings run; the disk reads as zeroes.
    pub fn new(mut front: FrontEnd, options: LoadOptions) -> Result<Self> {
        let capacity = front.config()?.capacity;
        ensure!(options.range.end <= capacity, "the disk has {capacity} sectors only");
        let offers = |bit: u64| u32::from(front.features & bit != 0);
        let mut mix = options.mix;
        mix.zero *= offers(F_WRITE_ZEROES);
        mix.discard *= offers(F_DISCARD);
        mix.flush *= offers(F_FLUSH);
        let region = front.memory.regions().len() - 1;
        let stride = (options.max_sectors * SECTOR as u64).next_multiple_of(4096) + 4096;
        let count = options.depth * front.rings.len() * options.buffers_per_request.max(1);
        let buffers = (0..count).map(|_| front.memory.alloc(region, stride, 4096)).collect();
        let slots = front.rings.iter().map(|ring| vec![None; usize::from(ring.options().size)]).collect();
        for ring in &mut front.rings {
            ring.poll_only();
        }
        let mut model = Model::new(capacity);
        if options.history {
            model.remember_history();
        }
        Ok(Self {
            model,
            random: ChaCha8Rng::seed_from_u64(crate::seed(options.seed)),
            options: LoadOptions { mix, ..options },
            slots,
            buffers,
            counts: Counts::default(),
            phases: vec![("all".into(), Histogram::default())],
            scratch: Vec::new(),
            segments: Vec::new(),
            paced_since: Instant::now(),
            paced: 0,
            last_progress: Instant::now(),
            front,
        })
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Latencies by phase, see [`VerifiedLoad::mark`].
    pub fn phases(&self) -> &[(String, Histogram)] {
        &self.phases
    }

    /// A new phase begins: latencies are counted apart from now on.
    pub fn mark(&mut self, phase: &str) {
        self.phases.push((phase.to_owned(), Histogram::default()));
    }

    /// Changes the rate: requests a second, or flat out.
    pub fn set_rate(&mut self, rate: Option<f64>) {
        self.options.rate = rate;
        (self.paced_since, self.paced) = (Instant::now(), 0);
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.front.rings.iter().map(crate::Ring::in_flight).sum()
    }

    /// Runs for a while; requests stay in flight at the end.
    pub fn run_for(&mut self, time: Duration) -> Result<()> {
        let until = Instant::now() + time;
        self.run_while(|_| Instant::now() < until)
    }

    /// Runs until this many further requests are done.
    pub fn run_requests(&mut self, requests: u64) -> Result<()> {
        let until = self.counts.total() + requests;
        self.run_while(|load| load.counts.total() < until)
    }

    /// Runs as long as `wanted` says so.
    pub fn run_while(&mut self, mut wanted: impl FnMut(&Self) -> bool) -> Result<()> {
        while wanted(self) {
            let submitted = self.submit_all();
            let completed = self.poll()?;
            if submitted + completed == 0 {
                self.idle()?;
            }
        }
        Ok(())
    }

    /// Submits nothing more and waits for what is in flight.
    pub fn drain(&mut self) -> Result<()> {
        while self.in_flight() > 0 {
            if self.poll()? == 0 {
                self.idle()?;
            }
        }
        Ok(())
    }

    fn allowance(&mut self) -> u64 {
        let Some(rate) = self.options.rate else { return u64::MAX };
        let due = (self.paced_since.elapsed().as_secs_f64() * rate) as u64;
        // Requests that could not be made in time are not made up for later.
        self.paced = self.paced.max(due.saturating_sub(self.options.depth as u64));
        due.saturating_sub(self.paced)
    }

    fn submit_all(&mut self) -> usize {
        let mut allowance = self.allowance();
        let mut submitted = 0;
        for queue in 0..self.front.rings.len() {
            let before = submitted;
            while allowance > 0 && self.front.rings[queue].in_flight() < self.options.depth {
                if !self.submit_one(queue) {
                    break;
                }
                submitted += 1;
                allowance -= 1;
                self.paced += 1;
            }
            if submitted > before {
                self.front.rings[queue].kick();
            }
        }
        submitted
    }

    fn choose(&mut self) -> (u32, u64, u64) {
        let mix = self.options.mix;
        let kinds = [
            (READ, mix.read),
            (WRITE, mix.write),
            (WRITE_ZEROES, mix.zero),
            (DISCARD, mix.discard),
            (FLUSH, mix.flush),
        ];
        let mut pick = self.random.random_range(0..kinds.iter().map(|k| k.1).sum());
        let mut kind = READ;
        for (candidate, weight) in kinds {
            if pick < weight {
                kind = candidate;
                break;
            }
            pick -= weight;
        }
        let range = &self.options.range;
        let most = self.options.max_sectors.min(range.end - range.start);
        // Half of the requests are of whole pages, as file systems make them; the others are of any sectors.
        let unit = if self.random.random_bool(0.5) && most >= 8 { 8 } else { 1 };
        let count = self.random.random_range(1..=most / unit) * unit;
        let sector = self.random.random_range(range.start..=range.end - count) / unit * unit;
        (kind, sector.max(range.start), count)
    }

    fn submit_one(&mut self, queue: usize) -> bool {
        if !self.front.rings[queue].has_room(self.options.max_segments) {
            return false;
        }
        for _ in 0..20 {
            let (kind, sector, count) = self.choose();
            if !matches!(kind, READ | FLUSH) && self.model.is_busy(sector, count) {
                continue;
            }
            let Some(buffer) = self.buffers.pop_front() else { return false };
            self.submit(queue, kind, sector, count, buffer);
            return true;
        }
        false
    }

    fn submit(&mut self, queue: usize, kind: u32, sector: u64, count: u64, buffer: u64) {
        let mut snapshot = Vec::new();
        let len = count as usize * SECTOR;
        // Guests' buffers are aligned to whatever they like.
        let start = buffer + [0, 0, 512, 4, 1][self.random.random_range(0..5)];
        self.segments.clear();
        match kind {
            READ => {
                self.model.snapshot(sector, count, &mut snapshot);
                self.front.memory.fill(start, len, 0xa5);
                self.split(start, len);
            }
            WRITE => {
                let generation = self.model.begin_write(sector, count);
                self.scratch.resize(len, 0);
                stamp(&mut self.scratch, sector, generation);
                self.front.memory.write(start, &self.scratch);
                self.split(start, len);
            }
            FLUSH => {}
            _ => {
                self.model.begin_zero(sector, count);
                let unmap = kind == WRITE_ZEROES && self.random.random_bool(0.5);
                self.front.memory.write(buffer, &zero_segment(sector, count, unmap));
                self.segments.push((buffer, 16));
            }
        }
        let in_header = if matches!(kind, READ | WRITE) { sector } else { 0 };
        let request = Request { kind, sector: in_header, data: &self.segments };
        let token = self.front.rings[queue].submit(&request).expect("room was checked");
        self.slots[queue][usize::from(token.0)] = Some(Slot {
            kind,
            sector,
            count,
            snapshot,
            since: Instant::now(),
            buffer: start,
            acknowledged_before: self.counts.writes + self.counts.zeroes,
        });
    }

    fn split(&mut self, start: u64, len: usize) {
        let mut left = len as u32;
        let mut at = start;
        for remaining in (1..=self.options.max_segments).rev() {
            let sectors = left / SECTOR as u32;
            let take = if remaining == 1 || sectors <= 1 {
                left
            } else {
                self.random.random_range(1..=sectors) * SECTOR as u32
            };
            self.segments.push((at, take));
            (at, left) = (at + u64::from(take), left - take);
            if left == 0 {
                return;
            }
        }
    }

    /// Takes and checks what is completed, without waiting; returns how many requests that were.
    pub fn poll(&mut self) -> Result<usize> {
        let mut taken = 0;
        for queue in 0..self.front.rings.len() {
            while let Some(done) = self.front.rings[queue].poll() {
                self.finish(queue, done)?;
                taken += 1;
            }
        }
        if taken > 0 {
            self.last_progress = Instant::now();
        }
        Ok(taken)
    }

    fn finish(&mut self, queue: usize, done: Completion) -> Result<()> {
        let slot = self.slots[queue][usize::from(done.token.0)].take();
        let slot =
            slot.with_context(|| format!("ring {queue} completed {done:?}, which was not submitted"))?;
        let (kind, sector, count) = (slot.kind, slot.sector, slot.count);
        ensure!(
            done.status == OK,
            "request {kind} of {count} sectors at {sector} ended with status {:#x}",
            done.status
        );
        match kind {
            READ => {
                self.scratch.resize(count as usize * SECTOR, 0);
                self.front.memory.read(slot.buffer, &mut self.scratch);
                self.model.check_read(sector, &self.scratch, &slot.snapshot)?;
                self.counts.reads += 1;
            }
            FLUSH => {
                self.counts.flushes += 1;
                self.counts.flushed = self.counts.flushed.max(slot.acknowledged_before);
            }
            WRITE => {
                self.model.acknowledge(sector, count);
                self.counts.writes += 1;
            }
            _ => {
                self.model.acknowledge(sector, count);
                self.counts.zeroes += 1;
            }
        }
        // Buffers are aligned to a page; what was added to them is less.
        self.buffers.push_back(slot.buffer & !4095);
        if let Some((_, histogram)) = self.phases.last_mut() {
            histogram.record(slot.since.elapsed());
        }
        Ok(())
    }

    /// Nothing to do: sleeps until a completion, the next request's time or the end of the connection.
    fn idle(&mut self) -> Result<()> {
        if self.front.is_hung_up() {
            return self.come_back();
        }
        let silent = self.last_progress.elapsed();
        if self.in_flight() == 0 {
            self.last_progress = Instant::now();
        } else if silent > self.options.patience {
            bail!("{} requests are in flight and none completed for {silent:?}", self.in_flight());
        }
        if self.front.rings.iter_mut().map(crate::Ring::arm).fold(true, |a, b| a & b) {
            let fds = self.front.rings.iter().map(|ring| PollFd::new(ring.call_as_fd(), PollFlags::POLLIN));
            let mut fds: Vec<_> = fds.collect();
            let wait = if self.options.rate.is_some() { 1u8 } else { 10 };
            let _ = nix::poll::poll(&mut fds, PollTimeout::from(wait));
        }
        for ring in &mut self.front.rings {
            let _ = ring.call_fd().read();
            ring.poll_only();
        }
        Ok(())
    }

    fn come_back(&mut self) -> Result<()> {
        // What the daemon completed before it went has to be seen before the rings start anew.
        self.poll()?;
        self.counts.interrupted += self.in_flight() as u64;
        self.counts.out_of_order += u64::from(self.front.rings.iter().any(crate::Ring::is_out_of_order));
        let patience = self.options.patience;
        self.front.reconnect(self.options.base, patience).context("come back after the daemon went away")?;
        for ring in &mut self.front.rings {
            ring.kick_always();
        }
        self.counts.reconnects += 1;
        self.last_progress = Instant::now();
        Ok(())
    }

    /// Waits for what is in flight, then reads the whole disk and checks it.
    pub fn verify_all(&mut self) -> Result<()> {
        self.drain()?;
        let mut next = 0;
        let step = self.options.max_sectors;
        while next < self.model.sectors() {
            while next < self.model.sectors() && self.front.rings[0].has_room(self.options.max_segments) {
                let Some(buffer) = self.buffers.pop_front() else { break };
                let count = step.min(self.model.sectors() - next);
                self.submit(0, READ, next, count, buffer);
                next += count;
            }
            self.front.rings[0].kick();
            if self.poll()? == 0 {
                self.idle()?;
            }
        }
        self.drain()
    }

    /// Checks a raw file against the model.
    pub fn check_file(&self, raw: &Path) -> Result<()> {
        self.model.check_file(raw)
    }
}

/// The 16 bytes of a discard or write-zeroes segment, virtio 1.3, section 5.2.6.
pub fn zero_segment(sector: u64, count: u64, unmap: bool) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12]
        .copy_from_slice(&u32::try_from(count).expect("a segment has less than 2^32 sectors").to_le_bytes());
    bytes[12..].copy_from_slice(&(if unmap { FLAG_UNMAP } else { 0 }).to_le_bytes());
    bytes
}
