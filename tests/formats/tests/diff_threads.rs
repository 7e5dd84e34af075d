//! Differencing images under many threads at once, ended again and again by a kill, a power cut or a clean close.
//!
//! Writers, a discarder, readers, flushes that overlap and maintenance run beside each other; each sector has one writer, so
//! that what it may read as is known at any time. Syncs take their time, and make durable only what was there when they began.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use formats::vhd::{self, Vhd};
use formats::vhdx::{self, Vhdx};
use formats::{Chain, Image, ImageType, Layer, LayerOptions, NewParentLink, NotesFile, Storage, ZeroMode};
use formats_tests::{SimDisk, SimStorage, TraceOp, read_payload, write_payload, zero_payload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use uuid::Uuid;

const SECTOR: u64 = 512;
const BLOCK: u64 = 1 << 20;
const BLOCKS: u64 = 6;
const SIZE: u64 = BLOCKS * BLOCK;
const SECTORS: u64 = SIZE / SECTOR;
const PER_BLOCK: u64 = BLOCK / SECTOR;
const WRITERS: u64 = 3;
/// Sectors side by side that have the same writer.
const UNIT: u64 = 8;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Format {
    Vhd,
    Vhdx,
}

/// A file whose syncs take time.
#[derive(Debug)]
struct Slow {
    sim: Arc<SimStorage>,
    /// Entries of the trace that are durable.
    durable: AtomicU64,
}

impl Storage for Slow {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.sim.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.sim.write_at(buf, offset)
    }
    fn len(&self) -> io::Result<u64> {
        self.sim.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.sim.set_len(len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.sim.punch(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        let len = self.sim.trace_len() as u64;
        std::thread::sleep(Duration::from_micros(150));
        self.durable.fetch_max(len, Ordering::SeqCst);
        Ok(())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.sim.next_data(offset)
    }
    fn file(&self) -> Option<&File> {
        None
    }
}

/// What a power cut leaves: all that is durable, and of the rest any sectors.
fn power_cut(base: SimDisk, slow: &Slow, random: &mut ChaCha8Rng) -> SimDisk {
    let durable = slow.durable.load(Ordering::SeqCst) as usize;
    let density = random.random_range(0..=10);
    let mut disk = base;
    for (index, op) in slow.sim.trace().into_iter().enumerate() {
        let mut keep = || index < durable || random.random_range(0..10) < density;
        match op {
            TraceOp::Write { offset, data } => {
                for (n, part) in data.chunks(SECTOR as usize).enumerate() {
                    if keep() {
                        disk.write(offset + n as u64 * SECTOR, part);
                    }
                }
            }
            // A journal keeps these in their order.
            TraceOp::SetLen(len) => disk.set_len(len),
            TraceOp::Punch { offset, len } => {
                for at in (offset..offset + len).step_by(SECTOR as usize) {
                    if keep() {
                        disk.zero(at, SECTOR.min(disk.len().saturating_sub(at)));
                    }
                }
            }
            TraceOp::Sync | TraceOp::Mark(_) => {}
        }
    }
    disk
}

/// What a sector reads as.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Seen {
    Zero,
    Parent,
    Version(u32),
    Garbage,
}

fn bytes_of(sector: u64, version: u32) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    for word in bytes.chunks_mut(16) {
        word[..8].copy_from_slice(&(sector + 1).to_le_bytes());
        word[8..12].copy_from_slice(&version.to_le_bytes());
        word[12..].copy_from_slice(b"blkd");
    }
    bytes
}

/// The parent's content is version 0.
fn seen(sector: u64, bytes: &[u8]) -> Seen {
    if bytes.iter().all(|b| *b == 0) {
        return Seen::Zero;
    }
    let version = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
    match bytes_of(sector, version) == bytes {
        true if version == 0 => Seen::Parent,
        true => Seen::Version(version),
        false => Seen::Garbage,
    }
}

/// Version and epoch in which it was written.
fn pack(version: u32, epoch: u32) -> u64 {
    u64::from(version) << 32 | u64::from(epoch)
}

struct World {
    format: Format,
    parent: Arc<SimStorage>,
    sim: Arc<SimStorage>,
    notes: Arc<SimStorage>,
    boot: u128,
    /// What sectors read as that were not changed since the last crash.
    settled: Vec<Seen>,
    /// The last version that was begun of each sector.
    begun: Vec<AtomicU32>,
}

/// One session of many threads.
struct Round<'a> {
    world: &'a World,
    image: &'a dyn Image,
    /// Odd while a discard is under way.
    epochs: Vec<AtomicU32>,
    /// What was acknowledged last; 0: nothing.
    state: Vec<AtomicU64>,
    /// What is flushed.
    flushed: Mutex<Vec<Option<(u32, u32)>>>,
    /// Held for reading by whoever has mapped something.
    gate: RwLock<()>,
    ended: AtomicBool,
}

impl Round<'_> {
    fn over(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    fn epoch(&self, sector: u64) -> u32 {
        self.epochs[(sector / PER_BLOCK) as usize].load(Ordering::SeqCst)
    }

    fn expected(&self, sector: u64, epoch: u32) -> Seen {
        let state = self.state[sector as usize].load(Ordering::SeqCst);
        let (version, at) = ((state >> 32) as u32, state as u32);
        if version > 0 && at == epoch {
            Seen::Version(version)
        } else if epoch > 0 {
            Seen::Zero
        } else {
            self.world.settled[sector as usize]
        }
    }

    /// Reads sectors of one's own, and says whether they are as they should be.
    fn check(&self, first: u64, count: u64) {
        let _in = self.gate.read().unwrap();
        let before = self.epoch(first);
        let read = read_payload(self.image, first * SECTOR, (count * SECTOR) as usize).unwrap();
        if before % 2 == 1 || self.epoch(first) != before {
            return;
        }
        for (i, bytes) in read.chunks(SECTOR as usize).enumerate() {
            let sector = first + i as u64;
            assert_eq!(seen(sector, bytes), self.expected(sector, before), "sector {sector}, epoch {before}");
        }
    }

    /// Writes sectors of one's own, all in one unit, until that is known to have come after all discards.
    fn write(&self, first: u64, count: u64) {
        loop {
            let _in = self.gate.read().unwrap();
            let epoch = self.epoch(first);
            let versions: Vec<u32> = (first..first + count)
                .map(|s| self.world.begun[s as usize].fetch_add(1, Ordering::SeqCst) + 1)
                .collect();
            let data: Vec<u8> =
                (first..first + count).zip(&versions).flat_map(|(s, v)| bytes_of(s, *v)).collect();
            write_payload(self.image, first * SECTOR, &data).unwrap();
            if epoch.is_multiple_of(2) && self.epoch(first) == epoch {
                for (sector, version) in (first..).zip(versions) {
                    self.state[sector as usize].store(pack(version, epoch), Ordering::SeqCst);
                }
                // A discard that began in between has to win.
                if self.epoch(first) == epoch {
                    return;
                }
            }
            drop(_in);
            std::thread::yield_now();
        }
    }

    fn writer(&self, me: u64, seed: u64) {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        while !self.over() {
            let unit = random.random_range(0..SECTORS / UNIT / WRITERS) * WRITERS + me;
            let block = unit * UNIT / PER_BLOCK;
            match random.random_range(0..12) {
                0 => {
                    for unit in (block * PER_BLOCK / UNIT..(block + 1) * PER_BLOCK / UNIT)
                        .filter(|unit| unit % WRITERS == me)
                    {
                        if self.over() {
                            break;
                        }
                        self.write(unit * UNIT, UNIT);
                    }
                }
                1..8 => {
                    let first = random.random_range(0..UNIT);
                    let count = random.random_range(1..=UNIT - first);
                    self.check(unit * UNIT, UNIT);
                    self.write(unit * UNIT + first, count);
                    self.check(unit * UNIT, UNIT);
                }
                _ => self.check(unit * UNIT, UNIT),
            }
        }
    }

    fn discarder(&self, seed: u64) {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        while !self.over() {
            std::thread::sleep(Duration::from_micros(random.random_range(100..3000)));
            let block = random.random_range(0..BLOCKS);
            let _in = self.gate.read().unwrap();
            self.epochs[block as usize].fetch_add(1, Ordering::SeqCst);
            zero_payload(self.image, block * BLOCK, BLOCK, ZeroMode::Unmap).unwrap();
            self.epochs[block as usize].fetch_add(1, Ordering::SeqCst);
        }
    }

    fn flusher(&self, slow: &Slow) {
        while !self.over() {
            let snapshot: Vec<(u32, u32)> = (0..SECTORS)
                .map(|sector| {
                    let epoch = self.epoch(sector) / 2 * 2;
                    let state = self.state[sector as usize].load(Ordering::SeqCst);
                    let (version, at) = ((state >> 32) as u32, state as u32);
                    if version > 0 && at >= epoch { (at, version) } else { (epoch, 0) }
                })
                .collect();
            let mut token = Some(self.image.sync_begin());
            let mut syncs = 0;
            while let Some(begun) = token {
                // A flush ends anywhere when the round does.
                if self.over() {
                    return;
                }
                slow.sync().unwrap();
                if self.over() {
                    return;
                }
                syncs += 1;
                token = self.image.sync_done(begun).unwrap();
            }
            assert!(syncs <= 2);
            let mut flushed = self.flushed.lock().unwrap();
            for (old, new) in flushed.iter_mut().zip(snapshot) {
                *old = (*old).max(Some(new));
            }
        }
    }

    fn keeper(&self) {
        while !self.over() {
            if self.image.wants_maintenance() {
                self.image.maintain(&|| drop(self.gate.write().unwrap())).unwrap();
            }
            std::thread::sleep(Duration::from_micros(300));
        }
    }
}

impl World {
    fn new(format: Format) -> Self {
        let parent = SimStorage::new();
        let link = |id: Option<Uuid>| NewParentLink {
            id: id.unwrap(),
            next_id: None,
            relative: Some("p".into()),
            absolute: "/p".into(),
        };
        let sim = SimStorage::new();
        let vhdx = |image_type, parent| vhdx::CreateParams {
            image_type,
            virtual_size: SIZE,
            block_size: Some(BLOCK as u32),
            logical_sector_size: 512,
            physical_sector_size: 4096,
            log_size: Some(1 << 20),
            parent,
        };
        let vhd = |image_type, parent| vhd::CreateParams {
            image_type,
            virtual_size: SIZE,
            block_size: Some(BLOCK as u32),
            parent,
        };
        let storage: Arc<dyn Storage> = parent.clone();
        let fill = |image: &dyn Image| {
            for block in 0..BLOCKS {
                // One block is zeroes in the parent.
                let sectors = block * PER_BLOCK..(block + 1) * PER_BLOCK;
                let data: Vec<u8> = sectors.flat_map(|s| bytes_of(s, 0)).collect();
                if block != 1 {
                    write_payload(image, block * BLOCK, &data).unwrap();
                }
            }
            image.close().unwrap();
            image.content_id()
        };
        match format {
            Format::Vhdx => {
                vhdx::create(&*parent, &vhdx(ImageType::Dynamic, None)).unwrap();
                let id = fill(&Vhdx::open(storage, false).unwrap());
                vhdx::create(&*sim, &vhdx(ImageType::Differencing, Some(link(id)))).unwrap();
            }
            Format::Vhd => {
                vhd::create(&*parent, &vhd(ImageType::Dynamic, None)).unwrap();
                let id = fill(&Vhd::open(storage, false, false).unwrap());
                vhd::create(&*sim, &vhd(ImageType::Differencing, Some(link(id)))).unwrap();
            }
        }
        let settled =
            (0..SECTORS).map(|s| if s / PER_BLOCK == 1 { Seen::Zero } else { Seen::Parent }).collect();
        let begun = (0..SECTORS).map(|_| AtomicU32::new(0)).collect();
        Self { format, parent, sim, notes: SimStorage::new(), boot: 1, settled, begun }
    }

    fn layer(&self, storage: Arc<dyn Storage>, options: &LayerOptions) -> Arc<dyn Layer> {
        match self.format {
            Format::Vhdx => Arc::new(Vhdx::open_layer(storage, options).unwrap()),
            Format::Vhd => Arc::new(Vhd::open_layer(storage, options).unwrap()),
        }
    }

    fn open(&self, storage: Arc<dyn Storage>, with_notes: bool) -> Chain {
        let notes = NotesFile { storage: self.notes.clone(), boot_id: Uuid::from_u128(self.boot) };
        let notes = with_notes.then_some(notes);
        let options = LayerOptions { notes, recover: true, ..LayerOptions::default() };
        let top = self.layer(storage, &options);
        let reading = LayerOptions { read_only: true, ..LayerOptions::default() };
        let parent: Arc<dyn Image> = self.layer(self.parent.clone(), &reading);
        Chain::new(top, vec![parent]).unwrap()
    }

    /// A session that ends in `end`: 0 a close, 1 a kill, 2 a power cut.
    fn round(&mut self, seed: u64, end: u32) {
        self.sim.forget_trace();
        let base = self.sim.contents();
        let slow = Arc::new(Slow { sim: self.sim.clone(), durable: AtomicU64::new(0) });
        let image = self.open(slow.clone(), true);
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let round = Round {
            world: self,
            image: &image,
            epochs: (0..BLOCKS).map(|_| AtomicU32::new(0)).collect(),
            state: (0..SECTORS).map(|_| AtomicU64::new(0)).collect(),
            flushed: Mutex::new(vec![None; SECTORS as usize]),
            gate: RwLock::new(()),
            ended: AtomicBool::new(false),
        };
        let discards = random.random_bool(0.4);
        std::thread::scope(|scope| {
            let round = &round;
            for me in 0..WRITERS {
                scope.spawn(move || round.writer(me, seed * 10 + me));
            }
            if discards {
                scope.spawn(move || round.discarder(seed * 10 + 9));
            }
            let slow = &slow;
            (0..2).for_each(|_| drop(scope.spawn(move || round.flusher(slow))));
            scope.spawn(move || round.keeper());
            std::thread::sleep(Duration::from_millis(random.random_range(5..60)));
            round.ended.store(true, Ordering::Relaxed);
        });
        let (epochs, state) = (round.epochs, round.state);
        let flushed = round.flushed.into_inner().unwrap();
        let exact: Vec<Seen> = (0..SECTORS as usize)
            .map(|s| {
                let (state, epoch) =
                    (state[s].load(Ordering::SeqCst), epochs[s / PER_BLOCK as usize].load(Ordering::SeqCst));
                let (version, at) = ((state >> 32) as u32, state as u32);
                match () {
                    () if version > 0 && at == epoch => Seen::Version(version),
                    () if epoch > 0 => Seen::Zero,
                    () => self.settled[s],
                }
            })
            .collect();
        match end {
            0 => {
                image.close().unwrap();
                drop(image);
            }
            1 => drop(image),
            _ => {
                drop(image);
                let disk = power_cut(base, &slow, &mut random);
                self.sim = SimStorage::from_disk(disk);
                self.boot += 1;
            }
        }
        let image = self.open(self.sim.clone(), true);
        let read = read_payload(&image, 0, SIZE as usize).unwrap();
        let now: Vec<Seen> =
            (0..).zip(read.chunks(SECTOR as usize)).map(|(s, bytes)| seen(s, bytes)).collect();
        for s in 0..SECTORS as usize {
            let discarded = epochs[s / PER_BLOCK as usize].load(Ordering::SeqCst) > 0;
            if end < 2 {
                assert_eq!(now[s], exact[s], "sector {s} after {}", ["a close", "a kill"][end as usize]);
                continue;
            }
            let begun = self.begun[s].load(Ordering::SeqCst);
            let ok = match (flushed[s], now[s]) {
                (_, Seen::Garbage) => false,
                (None | Some((0, 0)), seen) if seen == self.settled[s] => true,
                (_, Seen::Parent) => false,
                (_, Seen::Zero) => discarded,
                (None, Seen::Version(v)) => v <= begun,
                // Versions before a discard that was flushed are gone; which they were is not known here.
                (Some((_, least)), Seen::Version(v)) => v >= least && v <= begun,
            };
            assert!(
                ok,
                "sector {s} is {:?}: settled {:?}, flushed {:?}, begun {begun}, discarded {discarded}",
                now[s], self.settled[s], flushed[s]
            );
        }
        image.close().unwrap();
        drop(image);
        // Nothing changes by closing, and nothing depends on notes after it.
        let image = self.open(self.sim.clone(), false);
        assert!(read_payload(&image, 0, SIZE as usize).unwrap() == read, "closed");
        image.close().unwrap();
        self.settled = now;
    }
}

fn lives(format: Format) {
    let seconds = std::env::var("BLOCKD_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(5);
    let first: u64 = std::env::var("BLOCKD_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let (start, mut rounds) = (Instant::now(), 0);
    let mut seed = first * 1_000_000;
    while start.elapsed() < Duration::from_secs(seconds) {
        let mut world = World::new(format);
        for _ in 0..5 {
            seed += 1;
            let end = ChaCha8Rng::seed_from_u64(seed).random_range(0..3);
            world.round(seed, end);
            rounds += 1;
        }
    }
    println!("{rounds} rounds of {format:?}");
}

#[test]
fn threads_on_a_differencing_vhdx_lose_nothing_however_it_ends() {
    lives(Format::Vhdx);
}

#[test]
fn threads_on_a_differencing_vhd_lose_nothing_however_it_ends() {
    lives(Format::Vhd);
}
