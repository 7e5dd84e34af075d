//! Differencing VHDXs in chains against a flat model: random traces, threads, large disks.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use formats::vhdx::{self, CreateParams, Vhdx};
use formats::{
    AllocState, ByteSpan, Chain, ErrorKind, Image, ImageType, LayerOptions, NewParentLink, NotesFile, Pieces,
    Place, Storage, ZeroMode,
};
use formats_tests::{SimStorage, read_payload, write_payload, zero_payload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use uuid::Uuid;

const MIB: u64 = 1 << 20;

fn create(size: u64, block: u64, sector: u32, parent: Option<Uuid>) -> Arc<SimStorage> {
    let sim = SimStorage::new();
    let link =
        |id| NewParentLink { id, next_id: None, relative: Some("p.vhdx".into()), absolute: "/p.vhdx".into() };
    let params = CreateParams {
        image_type: if parent.is_some() { ImageType::Differencing } else { ImageType::Dynamic },
        virtual_size: size,
        block_size: Some(block as u32),
        logical_sector_size: sector,
        physical_sector_size: 4096,
        log_size: Some(1 << 20),
        parent: parent.map(link),
    };
    vhdx::create(&*sim, &params).unwrap();
    sim
}

fn open_layer(sim: &Arc<SimStorage>, options: &LayerOptions) -> Vhdx {
    let storage: Arc<dyn Storage> = sim.clone();
    Vhdx::open_layer(storage, options).unwrap()
}

fn read_only(sim: &Arc<SimStorage>) -> Vhdx {
    open_layer(sim, &LayerOptions { read_only: true, ..LayerOptions::default() })
}

fn sound(sim: &Arc<SimStorage>) {
    let storage: Arc<dyn Storage> = sim.clone();
    let report = vhdx::check(storage, false).unwrap();
    assert!(report.is_sound(), "{report:?}");
}

/// Images on each other, the base first.
struct Stack {
    sims: Vec<Arc<SimStorage>>,
    /// Of the top.
    notes: Arc<SimStorage>,
    boot_id: Uuid,
}

impl Stack {
    fn new(base: Arc<SimStorage>) -> Self {
        Self { sims: vec![base], notes: SimStorage::new(), boot_id: Uuid::from_u128(1) }
    }

    fn top(&self) -> &Arc<SimStorage> {
        self.sims.last().unwrap()
    }

    /// Puts an empty child on top.
    fn grow(&mut self, size: u64, block: u64, sector: u32) {
        let id = read_only(self.top()).content_id();
        self.sims.push(create(size, block, sector, id));
        self.notes = SimStorage::new();
    }

    fn open_with(&self, options: &LayerOptions) -> Arc<dyn Image> {
        let top = Arc::new(open_layer(self.top(), options));
        if self.sims.len() == 1 {
            return top;
        }
        let parents = self.sims.iter().rev().skip(1).map(|sim| Arc::new(read_only(sim)) as Arc<dyn Image>);
        Arc::new(Chain::new(top, parents.collect()).unwrap())
    }

    fn open(&self) -> Arc<dyn Image> {
        let notes = NotesFile { storage: self.notes.clone(), boot_id: self.boot_id };
        self.open_with(&LayerOptions { notes: Some(notes), ..LayerOptions::default() })
    }

    fn open_for_reading(&self) -> Arc<dyn Image> {
        self.open_with(&LayerOptions { read_only: true, ..LayerOptions::default() })
    }
}

fn compare(model: &[u8], image: &dyn Image) {
    let mut at = 0;
    while let Some(extent) = image.next_extent(at).unwrap() {
        assert_eq!(extent.span.offset, at);
        let range = at as usize..(at + extent.span.len) as usize;
        let read = read_payload(image, at, range.len()).unwrap();
        if let Some(wrong) = read.iter().zip(&model[range.clone()]).position(|(a, b)| a != b) {
            panic!("content at {at} + {wrong} ({:?})", extent.state);
        }
        if extent.state != AllocState::Data {
            assert!(model[range].iter().all(|b| *b == 0), "told as {:?} at {at}", extent.state);
        }
        at += extent.span.len;
    }
    assert_eq!(at, model.len() as u64);
}

struct Trace {
    stack: Stack,
    image: Arc<dyn Image>,
    model: Vec<u8>,
    random: ChaCha8Rng,
    sector: u64,
}

impl Trace {
    fn new(seed: u64, sector: u32) -> Self {
        let size = 12 * MIB + 3 * 4096;
        let stack = Stack::new(create(size, MIB, sector, None));
        let image = stack.open();
        let random = ChaCha8Rng::seed_from_u64(seed);
        Self { stack, image, model: vec![0; size as usize], random, sector: sector.into() }
    }

    /// Closes the top, and puts a child on it, sometimes of another size or with other blocks.
    fn grow(&mut self) {
        self.image.close().unwrap();
        let size = match self.random.random_range(0..4) {
            0 => 9 * MIB + self.sector,
            1 => 14 * MIB + 5 * self.sector,
            _ => self.model.len() as u64,
        };
        let block = MIB << self.random.random_range(0..3);
        self.stack.grow(size, block, self.sector as u32);
        self.image = self.stack.open();
        self.model.resize(size as usize, 0);
    }

    fn step(&mut self) {
        let sectors = self.model.len() as u64 / self.sector;
        let count = match self.random.random_range(0..8) {
            0 => 2 * MIB / self.sector,
            1 => MIB / self.sector,
            _ => self.random.random_range(1..20),
        };
        let first = self.random.random_range(0..=sectors - count);
        let first = if self.random.random_ratio(1, 3) {
            (first * self.sector / MIB * MIB / self.sector).min(sectors - count)
        } else {
            first
        };
        let (at, len) = (first * self.sector, count * self.sector);
        let range = at as usize..(at + len) as usize;
        match self.random.random_range(0..22) {
            0..10 => {
                let data: Vec<u8> = (0..len).map(|_| self.random.random()).collect();
                write_payload(&*self.image, at, &data).unwrap();
                self.model[range].copy_from_slice(&data);
            }
            10..14 => {
                let mode = if self.random.random() { ZeroMode::Unmap } else { ZeroMode::Keep };
                zero_payload(&*self.image, at, len, mode).unwrap();
                self.model[range].fill(0);
            }
            14 => self.image.commit().unwrap(),
            15 => self.flush(),
            16 | 17 => self.image.maintain(&|| ()).unwrap(),
            18 => {
                self.image.close().unwrap();
                sound(self.stack.top());
                compare(&self.model, &*self.stack.open_for_reading());
            }
            19 => self.image = self.stack.open(),
            20 => {
                // The power fails after a flush: what is not durable is lost, notes are worth nothing.
                self.flush();
                let last = self.stack.sims.len() - 1;
                self.stack.sims[last] = SimStorage::from_disk(self.stack.top().durable_contents());
                self.stack.boot_id = Uuid::new_v4();
                self.image = self.stack.open();
                compare(&self.model, &*self.image);
            }
            _ => compare(&self.model, &*self.image),
        }
    }

    /// As a guest's flush: at most two syncs.
    fn flush(&mut self) {
        let mut token = Some(self.image.sync_begin());
        let mut syncs = 0;
        while let Some(begun) = token {
            self.stack.top().sync().unwrap();
            syncs += 1;
            token = self.image.sync_done(begun).unwrap();
        }
        assert!(syncs <= 2, "{syncs} syncs for a flush");
    }
}

fn random_trace(seed: u64, sector: u32) {
    let mut trace = Trace::new(seed, sector);
    for layers in 1..=4 {
        for _ in 0..60 {
            trace.step();
        }
        compare(&trace.model, &*trace.image);
        if layers < 4 {
            trace.grow();
            compare(&trace.model, &*trace.image);
        }
    }
    trace.image.close().unwrap();
    trace.stack.sims.iter().for_each(sound);
    compare(&trace.model, &*trace.stack.open_for_reading());
}

#[test]
fn random_traces_over_chains_agree_with_a_flat_model() {
    for seed in 0..16 {
        random_trace(seed, if seed % 3 == 2 { 4096 } else { 512 });
    }
}

/// A base full of `content`, and an empty child.
fn filled(size: u64, block: u64, sector: u32, content: u8) -> Stack {
    let mut stack = Stack::new(create(size, block, sector, None));
    let image = stack.open();
    write_payload(&*image, 0, &vec![content; size as usize]).unwrap();
    image.close().unwrap();
    stack.grow(size, block, sector);
    stack
}

#[test]
fn zeroes_written_to_a_differencing_block_are_recorded() {
    let stack = filled(4 * MIB, MIB, 512, 7);
    let image = stack.open();
    write_payload(&*image, 4096, &[0; 1024]).unwrap();
    write_payload(&*image, MIB, &vec![0; MIB as usize]).unwrap();
    image.close().unwrap();
    let mut model = vec![7; 4 * MIB as usize];
    model[4096..5120].fill(0);
    model[MIB as usize..2 * MIB as usize].fill(0);
    compare(&model, &*stack.open_for_reading());
}

#[test]
fn what_is_discarded_reads_as_zeroes_and_never_reveals_the_parent() {
    for mode in [ZeroMode::Unmap, ZeroMode::Keep] {
        for at_first in [0, 512, MIB] {
            let stack = filled(4 * MIB, MIB, 512, 7);
            let image = stack.open();
            let mut model = vec![7; 4 * MIB as usize];
            if at_first > 0 {
                write_payload(&*image, 0, &vec![9; at_first as usize]).unwrap();
                model[..at_first as usize].fill(9);
            }
            for (at, len) in [(2 * MIB + 512, 1024), (0, MIB), (MIB - 512, 1024), (3 * MIB, MIB)] {
                zero_payload(&*image, at, len, mode).unwrap();
                model[at as usize..(at + len) as usize].fill(0);
                compare(&model, &*image);
            }
            image.maintain(&|| ()).unwrap();
            // The space is used again.
            write_payload(&*image, MIB, &[3; 512]).unwrap();
            model[MIB as usize..][..512].fill(3);
            compare(&model, &*image);
            image.close().unwrap();
            compare(&model, &*stack.open_for_reading());
            sound(stack.top());
        }
    }
}

#[test]
fn zeroing_what_is_zero_in_the_parent_changes_nothing() {
    let mut stack = Stack::new(create(8 * MIB, MIB, 512, None));
    stack.grow(8 * MIB, MIB, 512);
    let image = stack.open();
    zero_payload(&*image, 0, 8 * MIB, ZeroMode::Unmap).unwrap();
    zero_payload(&*image, 512, 1024, ZeroMode::Keep).unwrap();
    image.close().unwrap();
    assert_eq!(image.next_extent(0).unwrap().unwrap().state, AllocState::Absent);
    assert_eq!(read_only(stack.top()).facts().allocated_bytes, 0);
}

#[test]
fn a_block_that_is_written_whole_is_fully_present_after_a_flush() {
    let stack = filled(4 * MIB, MIB, 512, 7);
    let image = stack.open();
    for part in 0..4 {
        write_payload(&*image, MIB + part * MIB / 4, &vec![1; MIB as usize / 4]).unwrap();
    }
    image.close().unwrap();
    let layer = read_only(stack.top());
    let mut pieces = Pieces::new();
    layer.map_read(ByteSpan::new(0, 4 * MIB), &mut pieces).unwrap();
    let is_own = pieces.iter().map(|p| (p.len, matches!(p.place, Place::File { .. }))).collect::<Vec<_>>();
    assert_eq!(is_own, [(MIB, false), (MIB, true), (2 * MIB, false)]);
    // Entry 1 of the BAT, behind file id and headers, log and metadata.
    let mut entry = [0; 8];
    stack.top().read_at(&mut entry, 3 * MIB + 8).unwrap();
    assert_eq!(entry[0] & 7, 6, "fully present");
}

#[test]
fn old_bits_of_a_block_that_is_not_present_are_not_believed() {
    let stack = filled(4 * MIB, MIB, 512, 7);
    let image = stack.open();
    write_payload(&*image, 0, &[1; 512]).unwrap();
    image.close().unwrap();
    drop(image);
    // Somebody else's hand: bits of block 1 (from byte 256 of the bitmap on) without the block. The first child block of this
    // image is its bitmap.
    let mut bitmap = None;
    for unit in 4..8 {
        let mut byte = [0];
        stack.top().read_at(&mut byte, unit * MIB).unwrap();
        let mut rest = [0; 511];
        stack.top().read_at(&mut rest, unit * MIB + 1).unwrap();
        if byte == [1] && rest == [0; 511] {
            bitmap = Some(unit * MIB);
            break;
        }
    }
    stack.top().write_at(&[0xff; 256], bitmap.unwrap() + 256).unwrap();
    let mut model = vec![7; 4 * MIB as usize];
    model[..512].fill(1);
    let image = stack.open();
    compare(&model, &*image);
    write_payload(&*image, MIB + 512, &[2; 512]).unwrap();
    model[MIB as usize + 512..][..512].fill(2);
    compare(&model, &*image);
    let killed = stack.open();
    compare(&model, &*killed);
    killed.close().unwrap();
    compare(&model, &*stack.open_for_reading());
}

/// Ends the others when it goes, also when a test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// m25: threads write to the same new blocks of a child while it is flushed, looked after and read.
#[test]
fn threads_that_write_sectors_of_the_same_new_blocks_lose_none() {
    const THREADS: u64 = 6;
    const BLOCKS: u64 = 48;
    let stack = filled(BLOCKS * MIB, MIB, 512, 7);
    let image = stack.open();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..THREADS)
            .map(|t| {
                let (image, stack) = (&image, &stack);
                scope.spawn(move || {
                    let mut random = ChaCha8Rng::seed_from_u64(t);
                    for block in 0..BLOCKS {
                        for _ in 0..4 {
                            let at = block * MIB + (t + THREADS * random.random_range(0..100)) * 512;
                            write_payload(&**image, at, &[t as u8 + 10; 512]).unwrap();
                            assert_eq!(read_payload(&**image, at, 512).unwrap(), [t as u8 + 10; 512]);
                        }
                        let all = read_payload(&**image, block * MIB, 600 * 512).unwrap();
                        for (i, sector) in all.chunks(512).enumerate() {
                            let own = (i as u64 % THREADS) as u8 + 10;
                            assert!(sector.iter().all(|b| *b == sector[0]), "torn");
                            assert!(sector[0] == 7 || sector[0] == own, "sector {i} holds {}", sector[0]);
                        }
                        if block % 8 == t {
                            let mut token = Some(image.sync_begin());
                            while let Some(begun) = token {
                                stack.top().sync().unwrap();
                                token = image.sync_done(begun).unwrap();
                            }
                        }
                    }
                })
            })
            .collect();
        let (stopped, image) = (&stop, &image);
        let keeper = scope.spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                image.maintain(&|| ()).unwrap();
                std::thread::yield_now();
            }
        });
        let done = Stop(&stop);
        writers.into_iter().for_each(|w| w.join().unwrap());
        drop(done);
        keeper.join().unwrap();
    });
    let model = read_payload(&*image, 0, (BLOCKS * MIB) as usize).unwrap();
    for t in 0..THREADS {
        let mut random = ChaCha8Rng::seed_from_u64(t);
        for block in 0..BLOCKS {
            for _ in 0..4 {
                let at = block * MIB + (t + THREADS * random.random_range(0..100)) * 512;
                assert_eq!(model[at as usize..][..512], [t as u8 + 10; 512], "block {block}, thread {t}");
            }
        }
    }
    image.close().unwrap();
    sound(stack.top());
    assert_eq!(read_only(stack.top()).facts().allocated_bytes, BLOCKS * MIB);
    compare(&model, &*stack.open_for_reading());
}

/// Reads never see the parent once a sector was written or discarded, whatever other threads do to its block.
#[test]
fn readers_beside_discards_and_writes_never_see_the_parent_again() {
    const BLOCKS: u64 = 200;
    let stack = filled(BLOCKS * MIB, MIB, 512, 7);
    let image = stack.open();
    let (done, written) = (AtomicBool::new(false), std::sync::atomic::AtomicU64::new(0));
    std::thread::scope(|scope| {
        let (image, done, written) = (&image, &done, &written);
        for _ in 0..2 {
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    let until = written.load(Ordering::Acquire);
                    for block in until.saturating_sub(3)..until {
                        let read = read_payload(&**image, block * MIB + 512, 1024).unwrap();
                        assert!(read.iter().all(|b| *b != 7), "block {block} shows its parent: {}", read[0]);
                    }
                }
            });
        }
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                image.commit().unwrap();
                image.maintain(&|| ()).unwrap();
            }
        });
        let _done = Stop(done);
        for block in 0..BLOCKS {
            write_payload(&**image, block * MIB + 512, &[1; 1024]).unwrap();
            written.store(block + 1, Ordering::Release);
            if block % 3 == 0 {
                write_payload(&**image, block * MIB, &vec![1; MIB as usize]).unwrap();
            }
            if block % 2 == 0 {
                zero_payload(&**image, block * MIB, MIB, ZeroMode::Unmap).unwrap();
            }
            if block % 4 == 0 {
                write_payload(&**image, block * MIB + 512, &[2; 512]).unwrap();
            }
        }
    });
    image.close().unwrap();
    sound(stack.top());
}

#[test]
fn the_largest_differencing_disk_opens_at_once_and_in_little_memory() {
    let size = 64 << 40;
    let mut stack = Stack::new(create(size, MIB, 512, None));
    stack.grow(size, MIB, 512);
    let image = stack.open();
    let places = [0, 5 << 40, (33 << 40) + 512, size - 512];
    for at in places {
        write_payload(&*image, at, &[8; 512]).unwrap();
    }
    image.close().unwrap();
    drop(image);
    let (_, before) = stack.top().reads();
    let begun = std::time::Instant::now();
    let layer = open_layer(stack.top(), &LayerOptions::default());
    let took = begun.elapsed();
    let (_, after) = stack.top().reads();
    println!("64 TiB in blocks of 1 MiB, differencing: opened in {took:?}, {} bytes read", after - before);
    assert!(took < std::time::Duration::from_secs(10));
    assert!(after - before < 16 << 20);
    let (mut at, mut own) = (0, Vec::new());
    while let Some(extent) = layer.next_extent(at).unwrap() {
        if extent.state != AllocState::Absent {
            own.push(extent.span);
        }
        at += extent.span.len;
    }
    assert_eq!(own, places.map(|at| ByteSpan::new(at, 512)));
}

#[test]
fn a_last_block_that_is_short_is_clipped_and_becomes_whole() {
    let size = 2 * MIB + 3 * 512;
    let stack = filled(size, MIB, 512, 7);
    let image = stack.open();
    write_payload(&*image, 2 * MIB, &[1; 512]).unwrap();
    let beyond = image.map_write(ByteSpan::new(2 * MIB, 2048), &mut Pieces::new());
    assert_eq!(beyond.unwrap_err().kind, ErrorKind::OutOfRange);
    write_payload(&*image, 2 * MIB + 512, &[2; 1024]).unwrap();
    image.close().unwrap();
    let mut entry = [0; 8];
    stack.top().read_at(&mut entry, 3 * MIB + 16).unwrap();
    assert_eq!(entry[0] & 7, 6, "fully present");
    let mut model = vec![7; size as usize];
    model[2 * MIB as usize..].copy_from_slice(&[[1; 512], [2; 512], [2; 512]].concat());
    compare(&model, &*stack.open_for_reading());
}

#[test]
fn a_session_gets_the_content_id_that_was_asked_for() {
    let stack = filled(4 * MIB, MIB, 512, 7);
    let next = Uuid::new_v4();
    let layer =
        open_layer(stack.top(), &LayerOptions { next_content_id: Some(next), ..LayerOptions::default() });
    assert_ne!(layer.content_id(), Some(next));
    layer.begin_changes().unwrap();
    assert_eq!(layer.content_id(), Some(next));
    layer.close().unwrap();
    assert_eq!(read_only(stack.top()).content_id(), Some(next));
    let link = layer.parent_link().unwrap();
    assert_eq!(link.ids, [read_only(&stack.sims[0]).content_id().unwrap()]);
    assert_eq!(link.paths[0].text, ".\\p.vhdx");
}

/// m10: a parent whose log was left is read through it, and its payload where it is.
#[test]
fn a_parent_with_a_log_that_was_left_is_read_through_it() {
    let mut stack = filled(4 * MIB, MIB, 512, 7);
    let image = stack.open();
    let mut model = vec![7; 4 * MIB as usize];
    write_payload(&*image, 512, &[1; 1024]).unwrap();
    model[512..1536].fill(1);
    image.commit().unwrap();
    image.maintain(&|| ()).unwrap();
    write_payload(&*image, 2048, &[2; 512]).unwrap();
    write_payload(&*image, 3 * MIB, &[3; 512]).unwrap();
    model[2048..2560].fill(2);
    model[3 * MIB as usize..][..512].fill(3);
    image.commit().unwrap();
    // The process dies. The bits are in the log alone, and the log changes no payload.
    drop(image);
    let before = stack.top().contents().fingerprint();
    let left = read_only(stack.top());
    assert!(left.facts().was_dirty);
    let storage: Arc<dyn Storage> = stack.top().clone();
    assert!(Arc::ptr_eq(&left.files()[0], &storage), "payload is read from the file itself");
    compare(&model, &*stack.open_for_reading());
    let killed = stack.top().clone();
    stack.grow(4 * MIB, MIB, 512);
    let image = stack.open();
    write_payload(&*image, 1024, &[9; 512]).unwrap();
    model[1024..1536].fill(9);
    compare(&model, &*image);
    image.close().unwrap();
    assert_eq!(killed.contents().fingerprint(), before, "the parent was written");
}

#[test]
fn more_sectors_than_notes_hold_are_recorded_before_more_come() {
    let size = 160 * MIB;
    let mut stack = Stack::new(create(size, MIB, 512, None));
    stack.grow(size, MIB, 512);
    let image = stack.open();
    let count = 70_000u64;
    for n in 0..count {
        // Apart from each other, in an order that joins nothing.
        let at = (n * 7919 % count) * 4 * 512;
        let mut pieces = Pieces::new();
        image.map_write(ByteSpan::new(at, 512), &mut pieces).unwrap();
        if n % 1000 == 0 {
            let Place::File { offset, .. } = pieces[0].place else { panic!("nowhere") };
            stack.top().write_at(&[1; 512], offset).unwrap();
        }
        image.wrote(ByteSpan::new(at, 512)).unwrap();
    }
    assert!(image.wants_maintenance());
    drop(image);
    let image = stack.open();
    let mut own = 0;
    let mut pieces = Pieces::new();
    image.map_read(ByteSpan::new(0, size), &mut pieces).unwrap();
    for piece in pieces.iter().filter(|piece| matches!(piece.place, Place::File { .. })) {
        own += piece.len / 512;
    }
    assert_eq!(own, count);
    assert_eq!(read_payload(&*image, 0, 512).unwrap(), [1; 512]);
    let begun = std::time::Instant::now();
    image.close().unwrap();
    println!("{count} sectors apart: closed in {:?}", begun.elapsed());
    sound(stack.top());
}

/// Single sectors in turn are told apart in a time that grows with their number.
#[test]
fn extents_of_sectors_in_turn_are_told_in_linear_time() {
    let stack = filled(8 * MIB, 4 * MIB, 512, 7);
    let image = stack.open();
    for n in 0..8 * MIB / 1024 {
        write_payload(&*image, n * 1024, &[1; 512]).unwrap();
    }
    let layer = open_layer(
        stack.top(),
        &LayerOptions {
            read_only: true,
            notes: Some(NotesFile { storage: stack.notes.clone(), boot_id: stack.boot_id }),
            ..LayerOptions::default()
        },
    );
    let (mut at, mut extents) = (0, 0);
    let begun = std::time::Instant::now();
    while let Some(extent) = layer.next_extent(at).unwrap() {
        at += extent.span.len;
        extents += 1;
    }
    println!("{extents} extents in {:?}", begun.elapsed());
    assert_eq!(extents, 8 * MIB / 512);
}
