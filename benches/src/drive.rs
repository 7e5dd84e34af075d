//! The guest for load alone: one queue, buffers made before, as little as possible between a completion and the next request.
//!
//! It keeps no model of the disk, as [`crate::load`] does, and still notices a server that mixes data up: each page that it
//! writes carries its own number at both ends, and of the reads one in sixteen is looked at while it is measured. So
//! after [`Driver::sweep`] has written the whole disk once, any read at any time knows what it must find.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use system_tests::histogram::Histogram;
use system_tests::ring::{FLUSH, OK, READ, Request, Ring, RingOptions, WRITE};
use system_tests::{FrontEnd, GuestMemory, Options, readable_within};

use crate::interrupt;

/// The unit of the stamps, in bytes.
pub const PAGE: u64 = 4096;
/// Bytes for the data of all requests that are in flight at once.
const POOL: u64 = 8 << 20;
/// Bytes for a ring of 128 and its tables.
const RING_ROOM: u64 = 256 << 10;
/// Of so many reads one is looked at.
const LOOK_EVERY: u64 = 16;
/// How long nothing may complete before the server counts as hung.
const PATIENCE: Duration = Duration::from_secs(30);
/// Rounds of busy polling between two looks at the time.
const SPINS: u32 = 4096;

/// Whether data comes or goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Access {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

/// How the guest learns of completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Wait {
    /// It looks at the used ring all the time, and never sleeps.
    Poll,
    /// It sleeps until the call eventfd wakes it, as a guest sleeps until an interrupt.
    Sleep,
}

impl Wait {
    /// As tables and figures name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Poll => "poll",
            Self::Sleep => "sleep",
        }
    }
}

/// Requests of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pattern {
    /// Anywhere on the disk, instead of one behind the other.
    pub random: bool,
    /// Whether data comes or goes.
    pub access: Access,
    /// Bytes of a request, a multiple of 4096.
    pub block: u64,
    /// Requests in flight.
    pub depth: usize,
}

impl Pattern {
    /// Pages of a request.
    pub fn pages(&self) -> u64 {
        self.block / PAGE
    }

    /// As in `random 4 KiB read, depth 32`.
    pub fn name(&self) -> String {
        let order = if self.random { "random" } else { "sequential" };
        let access = if self.access == Access::Read { "read" } else { "write" };
        format!("{order} {} KiB {access}, depth {}", self.block >> 10, self.depth)
    }
}

/// What was done in a while.
#[derive(Debug, Clone, Default)]
pub struct Drove {
    /// Requests completed.
    pub requests: u64,
    /// How long that took.
    pub time: Duration,
    /// From putting a request into the ring to seeing its completion.
    pub latencies: Histogram,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    page: u64,
    pages: u64,
    buffer: u64,
    read: bool,
    began: Instant,
}

/// One queue of one disk.
#[derive(Debug)]
pub struct Driver {
    ring: Ring,
    memory: Arc<GuestMemory>,
    pool: u64,
    pool_bytes: u64,
    free: Vec<u64>,
    slots: Vec<Option<Slot>>,
    pages: u64,
    random: u64,
    next: u64,
    reads: u64,
    /// Of so many reads one is looked at; 1 looks at every page of every read.
    look_every: u64,
    /// Changes what pages carry, so that an old content differs from a new one.
    salt: u64,
    wrong: Option<String>,
}

/// A connection and its queues. It ends when this is dropped.
#[derive(Debug)]
pub struct Link {
    front: FrontEnd,
    /// One for each queue.
    pub drivers: Vec<Driver>,
}

impl Link {
    /// Connects to a disk by one queue, for requests of any kind.
    ///
    /// # Errors
    /// When the connection or the negotiation fails, or the disk is tiny.
    pub fn connect(socket: &Path, seed: u64) -> Result<Self> {
        Self::with_queues(socket, 1, POOL, seed)
    }

    /// Connects to a disk by `queues` queues, with `pool` bytes for the data of each.
    ///
    /// # Errors
    /// As [`Link::connect`].
    pub fn with_queues(socket: &Path, queues: usize, pool: u64, seed: u64) -> Result<Self> {
        let memory = (queues as u64 * (pool + RING_ROOM)).next_multiple_of(1 << 20);
        let options = Options { queues, memory: vec![memory], ..Options::default() };
        let mut front = FrontEnd::start(socket, options)
            .with_context(|| format!("connect to the disk at {}", socket.display()))?;
        let pages = front.config()?.capacity * 512 / PAGE;
        ensure!(pages >= 64, "a disk of {pages} pages is too small to be measured");
        let rings = std::mem::take(&mut front.rings);
        let make = |(queue, ring)| Driver::new(ring, pages, pool, seed + queue as u64);
        let drivers = rings.into_iter().enumerate().map(make).collect();
        Ok(Self { front, drivers })
    }

    /// The first queue.
    pub fn driver(&mut self) -> &mut Driver {
        &mut self.drivers[0]
    }

    /// Fails when the server has closed the connection.
    ///
    /// # Errors
    /// That it has.
    pub fn check(&self) -> Result<()> {
        ensure!(!self.front.is_hung_up(), "the server has closed the connection");
        Ok(())
    }
}

impl Driver {
    fn new(ring: Ring, pages: u64, pool_bytes: u64, seed: u64) -> Self {
        let memory = ring.memory().clone();
        let pool = memory.alloc(0, pool_bytes, PAGE);
        // Touched now, so that no page fault is measured.
        memory.fill(pool, pool_bytes as usize, 0x5a);
        let slots = vec![None; usize::from(ring.options().size)];
        let random = seed.wrapping_mul(2).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self {
            ring,
            memory,
            pool,
            pool_bytes,
            free: Vec::new(),
            slots,
            pages,
            random,
            next: 0,
            reads: 0,
            look_every: LOOK_EVERY,
            salt: 0,
            wrong: None,
        }
    }

    /// Pages of the disk.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.ring.in_flight()
    }

    /// Makes buffers for a pattern. Nothing may be in flight.
    pub fn prepare(&mut self, pattern: &Pattern) {
        assert_eq!(self.ring.in_flight(), 0, "buffers change while requests use them");
        assert!(pattern.block.is_multiple_of(PAGE) && pattern.block > 0, "{pattern:?}");
        let size = usize::from(self.ring.options().size);
        assert!(
            pattern.depth <= size && pattern.depth as u64 * pattern.block <= self.pool_bytes,
            "{pattern:?}"
        );
        self.free.clear();
        self.free.extend((0..pattern.depth as u64).map(|index| self.pool + index * pattern.block));
        self.ring.poll_only();
    }

    /// The first page of the next request: at random, or behind the one before.
    pub fn next_page(&mut self, pattern: &Pattern) -> u64 {
        let requests = self.pages / pattern.pages();
        let index = if pattern.random {
            // xorshift64*: cheap, and good enough for places on a disk.
            self.random ^= self.random >> 12;
            self.random ^= self.random << 25;
            self.random ^= self.random >> 27;
            let word = self.random.wrapping_mul(0x2545_f491_4f6c_dd1d);
            ((u128::from(word) * u128::from(requests)) >> 64) as u64
        } else {
            self.next = if self.next + 1 < requests { self.next + 1 } else { 0 };
            self.next
        };
        index * pattern.pages()
    }

    /// Whether a request has a buffer.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Puts a request into the ring; [`Driver::kick`] tells the device.
    ///
    /// # Panics
    /// Without room.
    pub fn submit(&mut self, pattern: &Pattern, page: u64, now: Instant) {
        let buffer = self.free.pop().expect("the caller asked for room");
        let (read, pages) = (pattern.access == Access::Read, pattern.pages());
        if !read {
            for index in 0..pages {
                self.stamp(buffer + index * PAGE, page + index);
            }
        }
        let kind = if read { READ } else { WRITE };
        let data = [(buffer, pattern.block as u32)];
        let token = self.ring.submit(&Request { kind, sector: page * 8, data: &data });
        let token = token.expect("the ring has room for the depth that was checked");
        self.slots[usize::from(token.0)] = Some(Slot { page, pages, buffer, read, began: now });
    }

    /// Tells the device of new requests, if it wants to be told.
    pub fn kick(&mut self) {
        self.ring.kick();
    }

    /// Takes what is completed.
    ///
    /// # Errors
    /// When a request has failed. What was read wrong is kept for [`Driver::finish`].
    pub fn reap(&mut self, latencies: &mut Histogram) -> Result<usize> {
        let ready = self.ring.used_idx().wrapping_sub(self.ring.seen_idx());
        if ready == 0 {
            return Ok(0);
        }
        let now = Instant::now();
        for _ in 0..ready {
            let done = self.ring.poll().expect("the index has told of it");
            let slot =
                self.slots[usize::from(done.token.0)].take().expect("the ring knows what is in flight");
            ensure!(done.status == OK, "a request at page {} failed with status {}", slot.page, done.status);
            latencies.record(now.saturating_duration_since(slot.began));
            if slot.pages == 0 {
                continue;
            }
            self.free.push(slot.buffer);
            if slot.read {
                self.look_at_read(&slot);
            }
        }
        Ok(usize::from(ready))
    }

    fn look_at_read(&mut self, slot: &Slot) {
        self.reads += 1;
        if self.look_every == 1 {
            for index in 0..slot.pages {
                self.look(slot.buffer + index * PAGE, slot.page + index);
            }
        } else if self.reads.is_multiple_of(self.look_every) {
            let index = self.reads / self.look_every % slot.pages;
            self.look(slot.buffer + index * PAGE, slot.page + index);
        }
    }

    fn stamp(&self, at: u64, page: u64) {
        let [first, last] = stamps(page, self.salt);
        self.memory.write(at, &first.to_le_bytes());
        self.memory.write(at + PAGE - 8, &last.to_le_bytes());
    }

    fn look(&mut self, at: u64, page: u64) {
        let word = |at| {
            let mut bytes = [0; 8];
            self.memory.read(at, &mut bytes);
            u64::from_le_bytes(bytes)
        };
        let found = [word(at), word(at + PAGE - 8)];
        let expected = stamps(page, self.salt);
        if found != expected {
            let wrong = || format!("page {page} reads as {found:x?} instead of {expected:x?}");
            self.wrong.get_or_insert_with(wrong);
        }
    }

    /// Fails if anything was read wrong since the last call.
    ///
    /// # Errors
    /// What was wrong first.
    pub fn finish(&mut self) -> Result<()> {
        self.wrong.take().map_or(Ok(()), |wrong| bail!("WRONG: {wrong}"))
    }

    /// Waits for completions, as `wait` says; returns how many there were.
    ///
    /// # Errors
    /// When nothing completes for half a minute, a request has failed, or a signal came.
    pub fn wait(&mut self, wait: Wait, latencies: &mut Histogram) -> Result<usize> {
        let since = Instant::now();
        loop {
            let taken = match wait {
                Wait::Poll => self.spin(latencies)?,
                Wait::Sleep => self.sleep(latencies)?,
            };
            if taken > 0 {
                return Ok(taken);
            }
            interrupt::check()?;
            ensure!(
                since.elapsed() < PATIENCE,
                "{} requests are in flight and none was completed for {PATIENCE:?}",
                self.ring.in_flight()
            );
        }
    }

    fn spin(&mut self, latencies: &mut Histogram) -> Result<usize> {
        for _ in 0..SPINS {
            let taken = self.reap(latencies)?;
            if taken > 0 {
                return Ok(taken);
            }
            std::hint::spin_loop();
        }
        Ok(0)
    }

    fn sleep(&mut self, latencies: &mut Histogram) -> Result<usize> {
        if self.ring.arm() {
            readable_within(self.ring.call_as_fd(), Duration::from_millis(100));
            let _ = self.ring.call_fd().read();
        }
        self.reap(latencies)
    }

    /// Keeps requests of a pattern in flight for so long, then waits for the last of them.
    ///
    /// # Errors
    /// As [`Driver::wait`], and when anything was read wrong.
    pub fn run(&mut self, pattern: &Pattern, wait: Wait, time: Duration) -> Result<Drove> {
        let start = Instant::now();
        self.run_while(pattern, wait, |driver, now| {
            (now.duration_since(start) < time).then(|| driver.next_page(pattern))
        })
    }

    /// Makes a request for each page that `next` names until it names none, then waits for the last of them. `next`
    /// gets the time at which the last completions were seen.
    ///
    /// # Errors
    /// As [`Driver::run`].
    pub fn run_while(
        &mut self,
        pattern: &Pattern,
        wait: Wait,
        mut next: impl FnMut(&mut Self, Instant) -> Option<u64>,
    ) -> Result<Drove> {
        self.prepare(pattern);
        let mut drove = Drove::default();
        let start = Instant::now();
        let (mut now, mut over) = (start, false);
        loop {
            while !over && self.has_room() {
                match next(self, now) {
                    Some(page) => self.submit(pattern, page, now),
                    None => over = true,
                }
            }
            self.kick();
            if self.in_flight() == 0 {
                break;
            }
            drove.requests += self.wait(wait, &mut drove.latencies)? as u64;
            now = Instant::now();
        }
        drove.time = start.elapsed();
        self.finish()?;
        Ok(drove)
    }

    /// Reads or writes the whole disk once. After it was written, all of it can be checked; reading checks all of it.
    ///
    /// # Errors
    /// As [`Driver::run`].
    pub fn sweep(&mut self, access: Access) -> Result<Drove> {
        let pattern = Pattern { random: false, access, block: 256 << 10, depth: 16 };
        let mut places = (0..=self.pages - pattern.pages()).step_by(pattern.pages() as usize);
        if access == Access::Read {
            return self.check(&pattern, places);
        }
        let drove = self.run_while(&pattern, Wait::Sleep, |_, _| places.next())?;
        self.flush(Wait::Sleep)?;
        Ok(drove)
    }

    /// Reads what was written at these pages and checks all of it.
    ///
    /// # Errors
    /// As [`Driver::run`].
    pub fn check(&mut self, pattern: &Pattern, mut pages: impl Iterator<Item = u64>) -> Result<Drove> {
        self.look_every = 1;
        let read = Pattern { access: Access::Read, ..*pattern };
        let drove = self.run_while(&read, Wait::Sleep, |_, _| pages.next())?;
        self.look_every = LOOK_EVERY;
        Ok(drove)
    }

    /// Overwrites some pages all over the disk with something new, reads them back, and does the same with what they
    /// have to hold. The disk was swept before.
    ///
    /// # Errors
    /// As [`Driver::run`].
    pub fn prove(&mut self, wait: Wait, salt: u64) -> Result<()> {
        const PROVEN: u64 = 2000;
        let places: Vec<u64> = (0..PROVEN).map(|n| n * self.pages / PROVEN).collect();
        let pattern = Pattern { random: true, access: Access::Write, block: PAGE, depth: 32 };
        for salt in [salt, 0] {
            self.salt = salt;
            let mut left = places.iter().copied();
            self.run_while(&pattern, wait, |_, _| left.next())?;
            self.check(&pattern, places.iter().copied())?;
        }
        Ok(())
    }

    /// Has the disk make durable what was written. Nothing else may be in flight.
    ///
    /// # Errors
    /// As [`Driver::wait`].
    pub fn flush(&mut self, wait: Wait) -> Result<()> {
        assert_eq!(self.in_flight(), 0, "a flush is waited for alone");
        let token = self.ring.submit(&Request { kind: FLUSH, sector: 0, data: &[] });
        let token = token.expect("an empty ring has room");
        self.slots[usize::from(token.0)] =
            Some(Slot { page: 0, pages: 0, buffer: 0, read: false, began: Instant::now() });
        self.kick();
        self.wait(wait, &mut Histogram::default())?;
        Ok(())
    }
}

/// As [`Driver::run`], by one thread for many queues at once, all of which it watches all the time.
///
/// # Errors
/// As [`Driver::run`].
pub fn run_together(drivers: &mut [&mut Driver], pattern: &Pattern, time: Duration) -> Result<Drove> {
    let mut drove = Drove::default();
    drivers.iter_mut().for_each(|driver| driver.prepare(pattern));
    let start = Instant::now();
    let (mut now, mut last) = (start, start);
    loop {
        let mut idle = true;
        for driver in drivers.iter_mut() {
            drove.requests += driver.reap(&mut drove.latencies)? as u64;
            if driver.has_room() && now.duration_since(start) < time {
                now = Instant::now();
                last = now;
                while driver.has_room() {
                    let page = driver.next_page(pattern);
                    driver.submit(pattern, page, now);
                }
                driver.kick();
            }
            idle &= driver.in_flight() == 0;
        }
        now = Instant::now();
        if idle {
            break;
        }
        interrupt::check()?;
        ensure!(now.duration_since(last) < time + PATIENCE, "nothing was completed for {PATIENCE:?}");
    }
    drove.time = start.elapsed();
    drivers.iter_mut().try_for_each(|driver| driver.finish())?;
    Ok(drove)
}

/// What stands at both ends of a page.
fn stamps(page: u64, salt: u64) -> [u64; 2] {
    let first = (page + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt.wrapping_mul(0xd6e8_feb8_6659_fd93);
    [first, first.rotate_left(32) ^ page]
}

/// Seconds that this front end and a device that does nothing need for a request of a pattern, in one thread: no server
/// can be measured to be faster than that.
///
/// # Errors
/// When there is no guest memory.
pub fn own_cost(pattern: &Pattern, requests: u32) -> Result<f64> {
    let memory = Arc::new(GuestMemory::new(&[POOL + (2 << 20)])?);
    let ring = Ring::new(memory, RingOptions { size: 128, event_idx: true, indirect: true, region: 0 })?;
    let mut driver = Driver::new(ring, 1 << 18, POOL, 1);
    driver.prepare(pattern);
    let (mut latencies, mut taken, mut done) = (Histogram::default(), 0, 0);
    let start = Instant::now();
    while done < requests {
        let now = Instant::now();
        while driver.has_room() {
            let page = driver.next_page(pattern);
            driver.submit(pattern, page, now);
        }
        driver.kick();
        complete_all(&driver.ring, &mut taken);
        done += driver.reap(&mut latencies)? as u32;
    }
    Ok(start.elapsed().as_secs_f64() / f64::from(done))
}

/// A device that completes everything at once and moves no data.
fn complete_all(ring: &Ring, taken: &mut u16) {
    use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
    let (memory, size) = (ring.memory(), u64::from(ring.options().size));
    let [_, avail, used] = ring.parts();
    let available = memory.u16(avail + 2).load(Acquire);
    while *taken != available {
        let slot = u64::from(*taken) % size;
        let head = memory.u16(avail + 4 + slot * 2).load(Relaxed);
        memory.u16(used + 4 + slot * 8).store(head, Relaxed);
        memory.u8(ring.meta(system_tests::ring::Token(head)) + 16).store(OK, Relaxed);
        *taken = taken.wrapping_add(1);
        memory.u16(used + 2).store(*taken, Release);
    }
    memory.u16(used + 4 + size * 8).store(*taken, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANDOM_READ: Pattern = Pattern { random: true, access: Access::Read, block: 4096, depth: 32 };

    fn driver() -> Driver {
        let memory = Arc::new(GuestMemory::new(&[POOL + (2 << 20)]).unwrap());
        let options = RingOptions { size: 128, event_idx: true, indirect: true, region: 0 };
        Driver::new(Ring::new(memory, options).unwrap(), 1000, POOL, 7)
    }

    #[test]
    fn places_are_on_the_disk_and_all_over_it() {
        let mut driver = driver();
        let found: Vec<u64> = (0..2000).map(|_| driver.next_page(&RANDOM_READ)).collect();
        assert!(found.iter().all(|page| *page < 1000));
        assert!(found.iter().any(|page| *page < 50) && found.iter().any(|page| *page >= 950));
        let sequential = Pattern { random: false, block: 128 << 10, depth: 8, ..RANDOM_READ };
        let found: Vec<u64> = (0..32).map(|_| driver.next_page(&sequential)).collect();
        assert_eq!(found[..3], [32, 64, 96]);
        assert!(found.iter().all(|page| page + 32 <= 1000), "the last request ends on the disk: {found:?}");
    }

    #[test]
    fn a_page_of_another_place_is_noticed_while_it_is_measured() {
        let mut driver = driver();
        driver.prepare(&RANDOM_READ);
        let (mut latencies, mut taken) = (Histogram::default(), 0);
        for round in 0..LOOK_EVERY {
            let page = if round + 1 == LOOK_EVERY { 5 } else { 6 };
            driver.submit(&RANDOM_READ, page, Instant::now());
            driver.stamp(driver.pool + 31 * PAGE, 6);
            complete_all(&driver.ring, &mut taken);
            assert_eq!(driver.reap(&mut latencies).unwrap(), 1);
        }
        let wrong = driver.finish().unwrap_err().to_string();
        assert!(wrong.contains("page 5"), "{wrong}");
        assert!(driver.finish().is_ok(), "it is told once");
        assert_eq!(latencies.count(), LOOK_EVERY);
    }

    #[test]
    fn the_front_end_alone_is_much_faster_than_any_server() {
        let each = own_cost(&RANDOM_READ, 200_000).unwrap();
        println!("{:.0} ns for each request", each * 1e9);
        assert!(each < 2e-6, "{each}");
    }
}
