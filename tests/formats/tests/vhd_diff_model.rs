//! Chains of differencing VHDs do what a flat array of bytes does, whoever uses them and whatever fails.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod vhd_diff;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use formats::vhd::{self, Vhd};
use formats::{AllocState, ByteSpan, Chain, ErrorKind, Image, ImageType, Pieces, Place, Storage, ZeroMode};
use formats_tests::{Fault, SimStorage, TraceOp, read_payload, write_payload, zero_payload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use vhd_diff::{BOOT, base, chain, child, content, layer, notes, sound};

const BLOCK: u64 = 4096;

/// Everything that `next_extent` says is true of the model, and the runs cover the disk.
fn extents_agree(image: &dyn Image, model: &[u8]) {
    let mut at = 0;
    while let Some(extent) = image.next_extent(at).unwrap() {
        assert_eq!(extent.span.offset, at);
        assert!(extent.span.len > 0 && extent.span.len.is_multiple_of(512));
        let end = at + extent.span.len;
        if extent.state != AllocState::Data {
            assert!(model[at as usize..end as usize].iter().all(|b| *b == 0), "{extent:?} is not zero");
        }
        at = end;
    }
    assert_eq!(at, model.len() as u64);
}

fn flush(image: &dyn Image, sim: &SimStorage) -> usize {
    let (mut token, mut syncs) = (Some(image.sync_begin()), 0);
    while let Some(begun) = token {
        sim.sync().unwrap();
        syncs += 1;
        token = image.sync_done(begun).unwrap();
    }
    assert!(syncs <= 2, "a flush took {syncs} syncs");
    syncs
}

/// A growing chain and what it holds.
struct World {
    rng: ChaCha8Rng,
    /// The top first.
    files: Vec<Arc<SimStorage>>,
    notes: Arc<SimStorage>,
    disk: Chain,
    model: Vec<u8>,
}

impl World {
    fn new(seed: u64, base_block: Option<u32>, block: u32, size: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let bottom = base(base_block, size);
        let image = layer(&bottom, false, None).unwrap();
        let mut model = vec![0; size as usize];
        for _ in 0..12 {
            let (at, data) = some_data(&mut rng, size);
            write_payload(&*image, at, &data).unwrap();
            model[at as usize..at as usize + data.len()].copy_from_slice(&data);
        }
        image.close().unwrap();
        let top = child(&*image, block, size);
        drop(image);
        let notes = SimStorage::new();
        let files = vec![top, bottom];
        let disk = open(&files, &notes);
        Self { rng, files, notes, disk, model }
    }

    fn reopen(&mut self) {
        self.disk = open(&self.files, &self.notes);
    }

    /// The top becomes a parent; its child may have another size.
    fn add_layer(&mut self, block: u32) {
        self.disk.close().unwrap();
        sound(&self.files[0]).unwrap();
        let change = self.rng.random_range(0..3) * 3 * 512;
        let len = self.model.len();
        self.model.resize(if self.rng.random() { len + change } else { len - change }, 0);
        let top = child(self.disk.layers()[0].as_ref(), block, self.model.len() as u64);
        self.files.insert(0, top);
        self.notes = SimStorage::new();
        self.reopen();
    }

    fn step(&mut self) {
        let size = self.model.len() as u64;
        let (at, data) = some_data(&mut self.rng, size);
        let range = at as usize..at as usize + data.len();
        match self.rng.random_range(0..16) {
            0..7 => {
                write_payload(&self.disk, at, &data).unwrap();
                self.model[range].copy_from_slice(&data);
            }
            7 | 8 => {
                let mode = if self.rng.random() { ZeroMode::Unmap } else { ZeroMode::Keep };
                zero_payload(&self.disk, at, data.len() as u64, mode).unwrap();
                self.model[range].fill(0);
            }
            9 | 10 => assert!(read_payload(&self.disk, at, data.len()).unwrap() == self.model[range]),
            11 if self.disk.wants_maintenance() => self.disk.maintain(&|| ()).unwrap(),
            12 => assert!(flush(&self.disk, &self.files[0]) > 0),
            13 => self.disk.commit().unwrap(),
            14 => {
                self.disk.close().unwrap();
                if self.rng.random() {
                    self.reopen();
                }
            }
            // The process dies, and its successor finds the notes.
            15 => self.reopen(),
            _ => {}
        }
    }

    fn agree(&self) {
        let size = self.model.len();
        let all = read_payload(&self.disk, 0, size).unwrap();
        let wrong = (0..size).step_by(512).find(|&at| all[at..at + 512] != self.model[at..at + 512]);
        assert_eq!(wrong, None, "a sector differs");
        extents_agree(&self.disk, &self.model);
    }
}

fn open(files: &[Arc<SimStorage>], notes_file: &Arc<SimStorage>) -> Chain {
    chain(layer(&files[0], false, notes(notes_file.clone(), BOOT)).unwrap(), &files[1..])
}

fn some_data(rng: &mut ChaCha8Rng, size: u64) -> (u64, Vec<u8>) {
    let sectors = size / 512;
    let first = rng.random_range(0..sectors);
    let most = if rng.random_range(0..8) == 0 { 300 } else { 20 };
    let count = rng.random_range(1..=(sectors - first).min(most));
    let mut data = vec![0; (count * 512) as usize];
    rng.fill(&mut data[..]);
    (first * 512, data)
}

#[test]
fn random_operations_on_chains_agree_with_a_flat_model() {
    let shapes = [
        (Some(4096), 4096, 60 * 4096 + 1536, 12),
        (Some(512), 1024, 300 * 512 + 6 * 512, 8),
        (None, 512, 400 * 512, 8),
        (Some(65536), 512 << 10, (3 << 20) + 512 * 7, 6),
        (Some(2 << 20), 2 << 20, (5 << 20) + 512, 4),
        (Some(2 << 20), 16 << 20, 20 << 20, 2),
    ];
    let mut layers = 0;
    for (base_block, block, size, seeds) in shapes {
        for seed in 0..seeds {
            let mut world = World::new(seed, base_block, block, size);
            for part in 0..seed % 4 + 1 {
                if part > 0 {
                    world.add_layer(if seed % 2 == 0 { block } else { block * 2 });
                }
                for _ in 0..50 {
                    world.step();
                }
                world.agree();
            }
            world.disk.close().unwrap();
            assert_eq!(world.notes.len().unwrap(), 0, "a clean close leaves no notes");
            sound(&world.files[0]).unwrap();
            // Without notes, for reading.
            let reader = chain(layer(&world.files[0], true, None).unwrap(), &world.files[1..]);
            assert!(read_payload(&reader, 0, world.model.len()).unwrap() == world.model, "seed {seed}");
            layers += world.files.len();
        }
    }
    println!("{layers} layers in chains of 2 to 5");
}

/// A child over a parent of random content.
fn child_over_noise(block: u32, size: u64) -> (Arc<SimStorage>, Arc<SimStorage>, Vec<u8>) {
    let parent = base(Some(BLOCK as u32), size);
    let image = layer(&parent, false, None).unwrap();
    let mut data = vec![0; size as usize];
    ChaCha8Rng::seed_from_u64(9).fill(&mut data[..]);
    write_payload(&*image, 0, &data).unwrap();
    image.close().unwrap();
    (child(&*image, block, size), parent, data)
}

#[test]
fn a_new_child_reads_as_its_parent_and_takes_no_space() {
    let (sim, parent, data) = child_over_noise(2 << 20, 1 << 20);
    assert!(sim.len().unwrap() <= 20480, "{} bytes", sim.len().unwrap());
    let disk = chain(layer(&sim, false, None).unwrap(), std::slice::from_ref(&parent));
    assert!(read_payload(&disk, 0, 1 << 20).unwrap() == data);
    assert_eq!(disk.image_type(), ImageType::Differencing);
    assert_eq!(disk.layers()[0].next_extent(0).unwrap().unwrap().state, AllocState::Absent);
    let mut out = Pieces::new();
    disk.layers()[0].map_read(ByteSpan::new(0, 1 << 20), &mut out).unwrap();
    assert!(matches!(out.as_slice(), [p] if p.place == Place::Parent));
}

#[test]
fn a_disk_with_a_parent_is_refused_without_it() {
    let (sim, _, _) = child_over_noise(4096, 1 << 16);
    for read_only in [true, false] {
        let storage: Arc<dyn Storage> = sim.clone();
        let e = Vhd::open(storage, read_only, true).unwrap_err();
        assert_eq!(e.kind, ErrorKind::Parent, "{e}");
    }
}

/// Case m09: the id is what counts; the parent's time stamp is whatever it is.
#[test]
fn a_child_names_its_parent_by_the_id_and_whatever_time() {
    let (sim, parent, data) = child_over_noise(4096, 1 << 16);
    let mut disk = sim.contents();
    let mut header = vec![0; 1024];
    disk.read(512, &mut header);
    header[56..60].copy_from_slice(&0x1234_5678u32.to_be_bytes());
    header[36..40].fill(0);
    let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
    header[36..40].copy_from_slice(&(!sum).to_be_bytes());
    disk.write(512, &header);
    let sim = SimStorage::from_disk(disk);
    let top = layer(&sim, false, None).unwrap();
    let link = top.parent_link().unwrap().clone();
    let parent_image = layer(&parent, true, None).unwrap();
    assert_eq!(link.ids, [parent_image.content_id().unwrap()]);
    assert_ne!(top.content_id(), parent_image.content_id(), "a child has an id of its own");
    assert!(parent_image.parent_link().is_none());
    let paths: Vec<_> = link.paths.iter().map(|p| p.text.as_str()).collect();
    assert_eq!(paths, [".\\parent.vhd", "\\disks\\parent.vhd", "parent.vhd"]);
    assert_eq!(read_payload(&chain(top, &[parent]), 0, 1 << 16).unwrap(), data);
}

/// Case m25.
#[test]
fn threads_that_write_a_block_first_give_it_one_place_and_lose_nothing() {
    let size = 256 * BLOCK;
    let (sim, parent, data) = child_over_noise(BLOCK as u32, size);
    let notes_file = SimStorage::new();
    let top = layer(&sim, false, notes(notes_file.clone(), BOOT)).unwrap();
    let disk = chain(top.clone(), std::slice::from_ref(&parent));
    let done = AtomicBool::new(false);
    let acknowledged: Vec<AtomicU64> = (0..7).map(|_| AtomicU64::new(0)).collect();
    let stop = || done.load(Ordering::Relaxed);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop() {
                if disk.wants_maintenance() {
                    disk.maintain(&|| ()).unwrap();
                }
                flush(&disk, &sim);
            }
        });
        for seed in 0..2 {
            let (disk, acknowledged, data) = (&disk, &acknowledged, &data);
            scope.spawn(move || {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                while !stop() {
                    let thread = rng.random_range(0..7usize);
                    let before = acknowledged[thread].load(Ordering::SeqCst);
                    let n = rng.random_range(0..256);
                    let at = n * BLOCK + thread as u64 * 512;
                    let read = read_payload(disk, at, 512).unwrap();
                    let new = read == [thread as u8 + 1; 512];
                    assert!(new || n >= before, "what was acknowledged is not read: block {n}");
                    assert!(new || read == data[at as usize..][..512], "neither old nor new in block {n}");
                }
            });
        }
        let writers: Vec<_> = (0..7u64)
            .map(|thread| {
                let (disk, acknowledged) = (&disk, &acknowledged);
                scope.spawn(move || {
                    for n in 0..256 {
                        write_payload(disk, n * BLOCK + thread * 512, &[thread as u8 + 1; 512]).unwrap();
                        acknowledged[thread as usize].store(n + 1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    let check = |disk: &dyn Image| {
        for n in 0..256 {
            for thread in 0..7u64 {
                let read = read_payload(disk, n * BLOCK + thread * 512, 512).unwrap();
                assert_eq!(read, [thread as u8 + 1; 512], "block {n}, thread {thread}");
            }
            let at = (n * BLOCK + 7 * 512) as usize;
            assert_eq!(
                read_payload(disk, at as u64, 512).unwrap(),
                data[at..at + 512],
                "the parent's sector"
            );
        }
    };
    check(&disk);
    let entries = |op: &&TraceOp| matches!(op, TraceOp::Write { data, .. } if data.len() == 4);
    assert_eq!(sim.trace().iter().filter(entries).count(), 256, "one table entry for each block");
    assert_eq!(top.allocated_bytes(), size);
    disk.close().unwrap();
    drop((disk, top));
    sound(&sim).unwrap();
    check(&chain(layer(&sim, true, None).unwrap(), &[parent]));
}

/// Case m26.
#[test]
fn zeroes_that_are_written_over_a_parent_hide_it() {
    let (sim, parent, data) = child_over_noise(BLOCK as u32, 16 * BLOCK);
    let parents = [parent];
    let disk = chain(layer(&sim, false, None).unwrap(), &parents);
    write_payload(&disk, 512, &[0; 1024]).unwrap();
    disk.close().unwrap();
    drop(disk);
    let disk = chain(layer(&sim, true, None).unwrap(), &parents);
    let read = read_payload(&disk, 0, 4096).unwrap();
    assert_eq!(read[..512], data[..512]);
    assert_eq!(read[512..1536], [0; 1024]);
    assert_eq!(read[1536..], data[1536..4096]);
}

/// Case m27.
#[test]
fn what_was_discarded_over_a_parent_reads_zeroes_for_good() {
    for mode in [ZeroMode::Unmap, ZeroMode::Keep] {
        let (sim, parent, data) = child_over_noise(BLOCK as u32, 16 * BLOCK);
        let parents = [parent];
        let disk = chain(layer(&sim, false, None).unwrap(), &parents);
        write_payload(&disk, 2 * BLOCK, &content(3, 1024)).unwrap();
        zero_payload(&disk, BLOCK + 512, 4 * BLOCK, mode).unwrap();
        let zero = |disk: &dyn Image| {
            let read = read_payload(disk, 0, 16 * BLOCK as usize).unwrap();
            let (from, to) = ((BLOCK + 512) as usize, (5 * BLOCK + 512) as usize);
            assert_eq!(read[..from], data[..from]);
            assert!(read[from..to].iter().all(|b| *b == 0), "the parent is seen");
            assert!(read[to..] == data[to..]);
        };
        zero(&disk);
        disk.commit().unwrap();
        zero(&chain(layer(&SimStorage::from_disk(sim.durable_contents()), true, None).unwrap(), &parents));
        disk.close().unwrap();
        drop(disk);
        zero(&chain(layer(&sim, true, None).unwrap(), &parents));
    }
}

#[test]
fn zeroes_over_a_parent_that_is_zero_take_no_space() {
    let parent = base(Some(BLOCK as u32), 16 * BLOCK);
    let image = layer(&parent, false, None).unwrap();
    write_payload(&*image, 4 * BLOCK, &[1; 512]).unwrap();
    image.close().unwrap();
    let sim = child(&*image, BLOCK as u32, 32 * BLOCK);
    drop(image);
    let top = layer(&sim, false, None).unwrap();
    let disk = chain(top.clone(), &[parent]);
    zero_payload(&disk, 0, 4 * BLOCK, ZeroMode::Unmap).unwrap();
    zero_payload(&disk, 5 * BLOCK, 27 * BLOCK, ZeroMode::Unmap).unwrap();
    assert_eq!((top.allocated_bytes(), sim.trace_len()), (0, 0));
    zero_payload(&disk, 0, 32 * BLOCK, ZeroMode::Unmap).unwrap();
    assert_eq!(top.allocated_bytes(), BLOCK, "the one block that hides something");
    assert!(read_payload(&disk, 0, 32 * BLOCK as usize).unwrap().iter().all(|b| *b == 0));
}

/// Case m28, as far as a VHD goes: no block ever gets another's space.
#[test]
fn a_discarded_block_keeps_its_place() {
    let (sim, parent, _) = child_over_noise(BLOCK as u32, 16 * BLOCK);
    let top = layer(&sim, false, None).unwrap();
    let disk = chain(top.clone(), &[parent]);
    let place = |block: u64| {
        let mut out = Pieces::new();
        disk.map_write(ByteSpan::new(block * BLOCK, BLOCK), &mut out).unwrap();
        out.as_slice()[0].place
    };
    write_payload(&disk, BLOCK, &content(1, BLOCK)).unwrap();
    let first = place(1);
    zero_payload(&disk, BLOCK, BLOCK, ZeroMode::Unmap).unwrap();
    disk.maintain(&|| ()).unwrap();
    assert_ne!(place(2), first);
    assert_eq!(place(1), first);
    assert_eq!(read_payload(&disk, BLOCK, BLOCK as usize).unwrap(), vec![0; BLOCK as usize]);
}

#[test]
fn a_write_costs_what_it_must() {
    let size = 64 << 20;
    let (sim, _, _) = child_over_noise(2 << 20, size);
    let notes_file = SimStorage::new();
    let top = layer(&sim, false, notes(notes_file, BOOT)).unwrap();
    write_payload(&*top, 0, &[1; 512]).unwrap();
    assert_eq!(flush(&*top, &sim), 2, "payload, then bits");
    sim.forget_trace();
    assert_eq!(flush(&*top, &sim), 1, "nothing became own");
    write_payload(&*top, 0, &[2; 512]).unwrap();
    assert_eq!(flush(&*top, &sim), 1, "an own sector is written in its place");
    sim.forget_trace();
    let (reads, _) = sim.reads();
    for n in 1..100 {
        write_payload(&*top, n * 4096, &[1; 4096]).unwrap();
    }
    assert_eq!(sim.syncs(), 0);
    assert!(sim.reads().0 - reads <= 1, "bitmaps are read once");
    assert_eq!(sim.trace_len(), 99, "nothing but payload is written before the flush");
    assert_eq!(flush(&*top, &sim), 2);
    let bitmaps = |op: &&TraceOp| matches!(op, TraceOp::Write { data, .. } if data.len() == 512);
    assert_eq!(sim.trace().iter().filter(bitmaps).count(), 1, "one sector of a bitmap for all of them");
}

#[test]
fn opening_reads_no_bitmaps() {
    let size = 4 << 30;
    let parent = base(Some(2 << 20), size);
    let sim = child(&*layer(&parent, true, None).unwrap(), 2 << 20, size);
    let top = layer(&sim, false, None).unwrap();
    for n in 0..2048 {
        write_payload(&*top, n << 21, &[1; 512]).unwrap();
    }
    top.close().unwrap();
    drop(top);
    let (reads, _) = sim.reads();
    let top = layer(&sim, false, None).unwrap();
    assert!(sim.reads().0 - reads < 16, "{} reads", sim.reads().0 - reads);
    read_payload(&chain(top, &[parent]), 5 << 21, 4096).unwrap();
    assert!(sim.reads().0 - reads < 20);
}

#[test]
fn bits_and_padding_of_other_writers_stay() {
    // Blocks of 4 KiB have bitmaps of one byte; what pads them is not ours.
    let (sim, parent, data) = child_over_noise(BLOCK as u32, 16 * BLOCK);
    let top = layer(&sim, false, None).unwrap();
    write_payload(&*top, 3 * BLOCK, &content(1, 512)).unwrap();
    top.close().unwrap();
    let mut out = Pieces::new();
    top.map_read(ByteSpan::new(3 * BLOCK, 512), &mut out).unwrap();
    let Place::File { offset, .. } = out.as_slice()[0].place else { panic!("{out:?}") };
    drop(top);
    let mut disk = sim.contents();
    let padding = content(0x77, 511);
    disk.write(offset - 511, &padding);
    let sim = SimStorage::from_disk(disk);
    let disk = chain(layer(&sim, false, None).unwrap(), &[parent]);
    write_payload(&disk, 3 * BLOCK + 5 * 512, &content(2, 512)).unwrap();
    disk.close().unwrap();
    let mut bitmap = vec![0; 512];
    sim.contents().read(offset - 512, &mut bitmap);
    assert_eq!(bitmap[0], 0b1000_0100);
    assert_eq!(bitmap[1..], padding);
    let read = read_payload(&disk, 3 * BLOCK, 4096).unwrap();
    assert_eq!(read[..512], content(1, 512));
    assert_eq!(read[512..2560], data[3 * BLOCK as usize + 512..][..2048]);
}

/// Each operation on the file (and on the notes) in turn fails: then all goes on, or the image refuses writes and says why; and
/// whatever was acknowledged is there, in this process and for the next one.
#[test]
fn a_failing_operation_never_costs_acknowledged_content() {
    for error in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
        for partial in [false, true] {
            for lasting in [false, true] {
                for after in 0..150 {
                    fail_at(Fault { after, lasting, error, partial }, false);
                }
                for after in 0..60 {
                    fail_at(Fault { after, lasting, error, partial }, true);
                }
            }
        }
    }
}

fn fail_at(fault: Fault, of_notes: bool) {
    let size = 64 * BLOCK;
    let (sim, parent, mut model) = child_over_noise(BLOCK as u32, size);
    let parents = [parent];
    let notes_file = SimStorage::new();
    let top = layer(&sim, false, notes(notes_file.clone(), BOOT)).unwrap();
    let disk = chain(top, &parents);
    if of_notes {
        notes_file.inject(fault)
    } else {
        sim.inject(fault)
    };
    let mut unsure = vec![false; (size / 512) as usize];
    for n in 0..40u64 {
        let at = (n * 3 % 64) * BLOCK + n % 8 * 512;
        let sector = (at / 512) as usize;
        let zero = n % 5 == 4;
        let done = if zero {
            zero_payload(&disk, at, 512, ZeroMode::Unmap)
        } else {
            write_payload(&disk, at, &[n as u8 + 1; 512])
        };
        assert!(!of_notes || done.is_ok(), "{fault:?}: notes that fail are no reason to fail: {done:?}");
        unsure[sector] = done.is_err();
        if done.is_ok() {
            model[at as usize..at as usize + 512].fill(if zero { 0 } else { n as u8 + 1 });
        }
        if n % 7 == 6 && disk.wants_maintenance() {
            let _ = disk.maintain(&|| ());
        }
        if n % 9 == 8 {
            let committed = disk.commit();
            assert!(!of_notes || committed.is_ok(), "{fault:?}: {committed:?}");
        }
    }
    let agree = |disk: &dyn Image, when: &str| {
        for (n, unsure) in unsure.iter().enumerate() {
            let read = read_payload(disk, n as u64 * 512, 512).unwrap();
            assert!(*unsure || read == model[n * 512..][..512], "{fault:?}, {when}: sector {n}");
        }
    };
    agree(&disk, "in the same process");
    drop(disk);
    sim.clear_fault();
    notes_file.clear_fault();
    let again =
        layer(&sim, false, notes(notes_file.clone(), BOOT)).unwrap_or_else(|e| panic!("{fault:?}: {e}"));
    let disk = chain(again, &parents);
    agree(&disk, "in the next process");
    write_payload(&disk, 63 * BLOCK, &[9; 512]).unwrap();
    disk.close().unwrap();
    sound(&sim).unwrap();
    drop(disk);
    let sim = SimStorage::from_disk(sim.durable_contents());
    agree_but_last(&chain(layer(&sim, true, None).unwrap(), &parents), &model, &unsure);
}

fn agree_but_last(disk: &dyn Image, model: &[u8], unsure: &[bool]) {
    for n in (0..63 * 8).filter(|n| !unsure[*n]) {
        assert_eq!(read_payload(disk, n as u64 * 512, 512).unwrap(), model[n * 512..][..512], "sector {n}");
    }
}

#[test]
fn without_a_notes_file_what_was_not_flushed_dies_with_the_process() {
    let (sim, parent, data) = child_over_noise(BLOCK as u32, 16 * BLOCK);
    let parents = [parent];
    let disk = chain(layer(&sim, false, None).unwrap(), &parents);
    write_payload(&disk, 0, &content(1, 512)).unwrap();
    disk.commit().unwrap();
    write_payload(&disk, 512, &content(2, 512)).unwrap();
    drop(disk);
    let disk = chain(layer(&sim, true, None).unwrap(), &parents);
    assert_eq!(read_payload(&disk, 0, 512).unwrap(), content(1, 512));
    assert_eq!(read_payload(&disk, 512, 512).unwrap(), data[512..1024], "the old content, and nothing else");
}

#[test]
fn spans_beyond_the_disk_or_off_the_grid_are_refused_by_every_verb() {
    let (sim, _, _) = child_over_noise(BLOCK as u32, 16 * BLOCK);
    let image = layer(&sim, false, None).unwrap();
    let size = 16 * BLOCK;
    for (offset, len) in [(size, 512), (size - 512, 1024), (1, 512), (0, 100), (u64::MAX - 511, 512)] {
        let at = ByteSpan::new(offset, len);
        let mut out = Pieces::new();
        let kinds = [
            image.map_read(at, &mut out).unwrap_err().kind,
            image.map_write(at, &mut out).unwrap_err().kind,
            image.map_zero(at, ZeroMode::Unmap, &mut out).unwrap_err().kind,
            image.wrote(at).unwrap_err().kind,
        ];
        assert_eq!(kinds, [ErrorKind::OutOfRange; 4], "{at:?}");
        assert!(out.is_empty());
    }
    assert_eq!(image.next_extent(size).unwrap(), None);
    let reader = layer(&sim, true, None).unwrap();
    let at = ByteSpan::new(0, 512);
    assert_eq!(reader.map_write(at, &mut Pieces::new()).unwrap_err().kind, ErrorKind::ReadOnly);
    assert_eq!(reader.wrote(at).unwrap_err().kind, ErrorKind::ReadOnly);
    assert!(vhd::check(&*sim, false).unwrap().is_sound());
}
