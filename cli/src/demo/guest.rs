//! The demo's guest: fills its disk, keeps it busy with reads that it verifies, and reads every byte back.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use super::latency::Latencies;
use super::memory::Device;
use super::pattern::{BLOCK, Content, Mismatch, Random};
use crate::failure::Failure;
use crate::interrupt::Cancel;

/// Bytes of a request while filling and verifying.
pub(super) const CHUNK: usize = 256 << 10;
/// Slots of the guest's memory, and so requests at a time.
pub(super) const SLOTS: usize = 16;
/// Verified reads and writes a second while the disk is busy.
const REQUESTS_PER_S: u32 = 5000;
/// A disk that does not answer for so long is taken for dead.
const SILENCE: Duration = Duration::from_secs(30);
/// Mismatches that are remembered; all are counted.
const MISMATCHES_KEPT: usize = 10;
/// How late the guest may be and still catch up with a burst.
const CATCH_UP: Duration = Duration::from_millis(20);

/// What went wrong as the guest sees it.
#[derive(Debug, Default)]
pub(super) struct Faults {
    /// Blocks that did not hold what they must.
    pub(super) mismatches: u64,
    /// Requests that the disk failed.
    pub(super) errors: u64,
    /// The first mismatches.
    pub(super) examples: Vec<Mismatch>,
}

impl Faults {
    /// Counts a block that does not hold what it must.
    pub(super) fn compare(&mut self, content: &Content, block: u64, data: &[u8], scratch: &mut [u8; BLOCK]) {
        let Some(found) = content.first_mismatch(block, data, scratch) else { return };
        self.mismatches += 1;
        if self.examples.len() < MISMATCHES_KEPT {
            self.examples.push(found);
        }
    }
}

/// A guest with its disk and what it knows of the disk's content.
pub(super) struct Guest {
    device: Device,
    /// What the disk must hold.
    content: Content,
    /// What went wrong so far.
    pub(super) faults: Faults,
    done: Vec<(usize, i32)>,
    heard: Instant,
}

impl Guest {
    /// A guest on a disk that was never written.
    pub(super) fn new(device: Device, content: Content) -> Self {
        assert!(device.slot_bytes() == CHUNK, "a slot holds one chunk");
        Self { device, content, faults: Faults::default(), done: Vec::new(), heard: Instant::now() }
    }

    /// Lets go of the disk; what it must hold is left.
    pub(super) fn leave(self) -> Content {
        self.content
    }

    /// Writes the pattern to every chunk that `wanted` picks, then flushes. Returns the bytes written.
    pub(super) fn fill(
        &mut self,
        wanted: impl Fn(u64) -> bool,
        cancel: &Cancel,
        progress: impl Fn(u64),
    ) -> Result<u64, Failure> {
        let mut chunks = (0..self.chunks()).filter(|chunk| wanted(*chunk));
        let mut written = 0;
        let mut block = [0; BLOCK];
        loop {
            stop_if(cancel)?;
            while let Some(slot) = self.device.idle_slot() {
                let Some(chunk) = chunks.next() else { break };
                let mut data = Vec::with_capacity(CHUNK);
                for place in blocks_of(chunk) {
                    self.content.set_version(place, 1);
                    self.content.fill(place, 1, &mut block);
                    data.extend_from_slice(&block);
                }
                self.device.put(slot, &data).map_err(|e| lost(&e))?;
                self.device.write(slot, chunk * CHUNK as u64, CHUNK).map_err(|e| lost(&e))?;
            }
            if !self.device.is_busy() {
                break;
            }
            for (_, result) in self.reap()? {
                refuse_error("a write", result)?;
                written += CHUNK as u64;
                progress(written);
            }
        }
        self.device.flush(0).map_err(|e| lost(&e))?;
        while self.device.is_busy() {
            for (_, result) in self.reap()? {
                refuse_error("a flush", result)?;
            }
        }
        Ok(written)
    }

    /// Reads the whole disk and compares every byte. Returns the bytes read.
    pub(super) fn verify(&mut self, cancel: &Cancel, progress: impl Fn(u64)) -> Result<u64, Failure> {
        let mut chunks = 0..self.chunks();
        let mut reading = [0; SLOTS];
        let mut data = vec![0; CHUNK];
        let mut read = 0;
        loop {
            stop_if(cancel)?;
            while let Some(slot) = self.device.idle_slot() {
                let Some(chunk) = chunks.next() else { break };
                reading[slot] = chunk;
                self.device.read(slot, chunk * CHUNK as u64, CHUNK).map_err(|e| lost(&e))?;
            }
            if !self.device.is_busy() {
                return Ok(read);
            }
            for (slot, result) in self.reap()? {
                refuse_error("a read", result)?;
                self.device.get(slot, &mut data).map_err(|e| lost(&e))?;
                self.compare(*blocks_of(reading[slot]).start(), &data);
                read += CHUNK as u64;
                progress(read);
            }
        }
    }

    /// Counts every block of `data` that is wrong.
    fn compare(&mut self, first: u64, data: &[u8]) {
        let mut scratch = [0; BLOCK];
        for (data, block) in data.chunks_exact(BLOCK).zip(first..) {
            self.faults.compare(&self.content, block, data, &mut scratch);
        }
    }

    fn chunks(&self) -> u64 {
        self.content.blocks() * BLOCK as u64 / CHUNK as u64
    }

    /// Kicks, then waits until something completes.
    fn reap(&mut self) -> Result<Vec<(usize, i32)>, Failure> {
        self.device.kick().map_err(|e| lost(&e))?;
        self.heard = Instant::now();
        loop {
            self.device.completed(&mut self.done);
            if !self.done.is_empty() {
                return Ok(std::mem::take(&mut self.done));
            }
            if self.heard.elapsed() > SILENCE {
                return Err(Failure::new(
                    "io",
                    "the disk has not answered a request for 30 s; see blockd's log",
                ));
            }
            self.device.wait(Duration::from_millis(100)).map_err(|e| lost(&e))?;
        }
    }
}

fn blocks_of(chunk: u64) -> std::ops::RangeInclusive<u64> {
    const PER_CHUNK: u64 = (CHUNK / BLOCK) as u64;
    chunk * PER_CHUNK..=chunk * PER_CHUNK + PER_CHUNK - 1
}

fn stop_if(cancel: &Cancel) -> Result<(), Failure> {
    if cancel.is_set() { Err(Failure::cancelled("the demo was cancelled")) } else { Ok(()) }
}

fn lost(e: &io::Error) -> Failure {
    Failure::io("the guest has lost its disk", e)
}

fn refuse_error(what: &str, result: i32) -> Result<(), Failure> {
    match result {
        0 => Ok(()),
        errno => {
            Err(Failure::io(format!("{what} of the guest failed"), &io::Error::from_raw_os_error(-errno)))
        }
    }
}

/// When a request was sent, seen from the move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    /// Before the move.
    Before = 0,
    /// While it runs.
    During = 1,
    /// Once the target is the disk.
    After = 2,
}

/// How the guest is told what goes on around it.
#[derive(Debug, Clone, Default)]
pub(super) struct Load(Arc<(AtomicU8, AtomicBool)>);

impl Load {
    /// Latencies count as this moment's from now on.
    pub(super) fn now(&self, moment: Moment) {
        self.0.0.store(moment as u8, Ordering::Relaxed);
    }

    /// Ends the load.
    pub(super) fn stop(&self) {
        self.0.1.store(true, Ordering::Relaxed);
    }

    fn moment(&self) -> usize {
        usize::from(self.0.0.load(Ordering::Relaxed))
    }

    fn is_stopped(&self) -> bool {
        self.0.1.load(Ordering::Relaxed)
    }
}

/// A request of the load.
#[derive(Debug, Clone, Copy)]
enum Request {
    Read(u64),
    Write(u64),
    Flush,
}

/// What the load has measured.
#[derive(Debug)]
pub(super) struct Measured {
    /// Latencies of reads and writes by [`Moment`].
    pub(super) by_moment: [Latencies; 3],
    /// Bytes written.
    pub(super) written_bytes: u64,
}

impl Guest {
    /// Reads and writes at random, some 5,000 times a second, verifying each read, with a flush every second, until
    /// told to stop.
    pub(super) fn keep_busy(&mut self, load: &Load, random: &mut Random) -> Result<Measured, Failure> {
        let mut measured =
            Measured { by_moment: std::array::from_fn(|_| Latencies::new()), written_bytes: 0 };
        let pace = Duration::from_secs(1) / REQUESTS_PER_S;
        let mut sent: [Option<(Request, Instant, usize)>; SLOTS] = [None; SLOTS];
        let mut next = Instant::now();
        let mut next_flush = next + Duration::from_secs(1);
        self.heard = next;
        while !load.is_stopped() || self.device.is_busy() {
            let now = Instant::now();
            next = next.max(now.checked_sub(CATCH_UP).unwrap_or(now));
            while !load.is_stopped() && next <= now {
                let Some(slot) = self.device.idle_slot() else { break };
                let request = if now >= next_flush { Request::Flush } else { self.pick(random, &sent) };
                if matches!(request, Request::Flush) {
                    next_flush = now + Duration::from_secs(1);
                }
                self.send(slot, request)?;
                sent[slot] = Some((request, Instant::now(), load.moment()));
                next += pace;
            }
            self.device.kick().map_err(|e| lost(&e))?;
            self.device.completed(&mut self.done);
            let ended = Instant::now();
            if self.done.is_empty() {
                self.wait_for_next(next)?;
            }
            for (slot, result) in std::mem::take(&mut self.done) {
                self.heard = ended;
                let Some((request, started, moment)) = sent[slot].take() else {
                    return Err(Failure::new("internal", format!("slot {slot} ended twice")));
                };
                self.finish(slot, request, result, &mut measured)?;
                if !matches!(request, Request::Flush) {
                    measured.by_moment[moment].add(ended.duration_since(started));
                }
            }
        }
        Ok(measured)
    }

    /// Waits for a completion, but no longer than until the next request is due.
    fn wait_for_next(&self, next: Instant) -> Result<(), Failure> {
        if self.device.is_busy() && self.heard.elapsed() > SILENCE {
            return Err(Failure::new("io", "the disk has not answered a request for 30 s; see blockd's log"));
        }
        let left = next.saturating_duration_since(Instant::now());
        // With all slots in flight the next request is overdue, and only a completion helps.
        let wait = if left.is_zero() { Duration::from_millis(10) } else { left };
        self.device.wait(wait).map_err(|e| lost(&e))
    }

    /// Half reads, half writes, of blocks that no request of the guest is on: so what a read must find is certain.
    fn pick(&self, random: &mut Random, sent: &[Option<(Request, Instant, usize)>]) -> Request {
        loop {
            let block = random.below(self.content.blocks());
            let taken = sent.iter().flatten().any(|(request, ..)| match request {
                Request::Read(other) | Request::Write(other) => *other == block,
                Request::Flush => false,
            });
            if !taken {
                return if random.next() & 1 == 0 { Request::Read(block) } else { Request::Write(block) };
            }
        }
    }

    fn send(&mut self, slot: usize, request: Request) -> Result<(), Failure> {
        let sent = match request {
            Request::Flush => self.device.flush(slot),
            Request::Read(block) => self.device.read(slot, block * BLOCK as u64, BLOCK),
            Request::Write(block) => {
                let mut data = [0; BLOCK];
                self.content.fill(block, self.content.version(block) + 1, &mut data);
                let put = self.device.put(slot, &data);
                put.and_then(|()| self.device.write(slot, block * BLOCK as u64, BLOCK))
            }
        };
        sent.map_err(|e| lost(&e))
    }

    fn finish(
        &mut self,
        slot: usize,
        request: Request,
        result: i32,
        measured: &mut Measured,
    ) -> Result<(), Failure> {
        if result != 0 {
            // After a failed write the block's content is anybody's guess: the demo has failed in any case.
            self.faults.errors += 1;
            return Ok(());
        }
        match request {
            Request::Flush => {}
            Request::Write(block) => {
                self.content.set_version(block, self.content.version(block) + 1);
                measured.written_bytes += BLOCK as u64;
            }
            Request::Read(block) => {
                let mut data = [0; BLOCK];
                self.device.get(slot, &mut data).map_err(|e| lost(&e))?;
                self.compare(block, &data);
            }
        }
        Ok(())
    }
}
