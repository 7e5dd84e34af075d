//! A dynamic or fixed VHD does what a flat array of bytes does, whoever uses it and whatever fails.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use std::io;
use std::sync::Arc;

use formats::vhd::{self, CreateParams, Vhd};
use formats::{AllocState, ByteSpan, ErrorKind, Image, ImageType, Pieces, Storage, ZeroMode};
use formats_tests::{Fault, SimStorage, TraceOp, read_payload, write_payload, zero_payload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn create(image_type: ImageType, block_size: Option<u32>, virtual_size: u64) -> Arc<SimStorage> {
    let sim = SimStorage::new();
    vhd::create(&*sim, &CreateParams { image_type, virtual_size, block_size, parent: None }).unwrap();
    sim
}

fn dynamic(block_size: u32, virtual_size: u64) -> Arc<SimStorage> {
    create(ImageType::Dynamic, Some(block_size), virtual_size)
}

fn open(sim: &Arc<SimStorage>, read_only: bool) -> Vhd {
    let storage: Arc<dyn Storage> = sim.clone();
    Vhd::open(storage, read_only, false).unwrap()
}

fn sound(sim: &SimStorage) {
    let report = vhd::check(sim, false).unwrap();
    assert!(report.is_sound(), "{report:?}");
}

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

#[test]
fn random_operations_agree_with_a_flat_model() {
    let shapes = [
        (ImageType::Dynamic, Some(4096), 40 * 4096 + 1536),
        (ImageType::Dynamic, Some(512), 300 * 512),
        (ImageType::Dynamic, Some(65536), 20 * 65536),
        (ImageType::Dynamic, Some(1 << 20), (5 << 20) + 512),
        (ImageType::Dynamic, Some(8 << 20), 20 << 20),
        (ImageType::Fixed, None, 100 * 1024 + 512),
    ];
    for (seed, (image_type, block, size)) in (0..24).flat_map(|s| shapes.map(|shape| (s, shape))) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let sim = create(image_type, block, size);
        let mut image = open(&sim, false);
        let mut model = vec![0u8; size as usize];
        for step in 0..120 {
            let sectors = size / 512;
            let first = rng.random_range(0..sectors);
            let count = rng.random_range(1..=(sectors - first).min(64));
            let (offset, len) = (first * 512, (count * 512) as usize);
            let range = offset as usize..offset as usize + len;
            match rng.random_range(0..10) {
                0..5 => {
                    let mut data = vec![0; len];
                    rng.fill(&mut data[..]);
                    write_payload(&image, offset, &data).unwrap();
                    model[range].copy_from_slice(&data);
                }
                5 => {
                    let mode = if rng.random() { ZeroMode::Unmap } else { ZeroMode::Keep };
                    zero_payload(&image, offset, len as u64, mode).unwrap();
                    model[range].fill(0);
                }
                6 => assert_eq!(read_payload(&image, offset, len).unwrap(), model[range]),
                7 if image.wants_maintenance() => image.maintain(&|| ()).unwrap(),
                8 => {
                    let mut token = Some(image.sync_begin());
                    while let Some(begun) = token {
                        sim.sync().unwrap();
                        token = image.sync_done(begun).unwrap();
                    }
                }
                _ => {
                    if rng.random_range(0..4) > 0 {
                        image.close().unwrap();
                    }
                    if rng.random() {
                        sound(&sim);
                        image = open(&sim, false);
                    }
                }
            }
            if step % 40 == 39 {
                extents_agree(&image, &model);
            }
        }
        image.close().unwrap();
        sound(&sim);
        let reader = open(&sim, true);
        assert_eq!(read_payload(&reader, 0, size as usize).unwrap(), model, "seed {seed}, blocks {block:?}");
        extents_agree(&reader, &model);
    }
}

#[test]
fn threads_that_write_a_block_first_give_it_one_place() {
    let block = 4096u64;
    let sim = dynamic(block as u32, 256 * block);
    let image = open(&sim, false);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                if image.wants_maintenance() {
                    image.maintain(&|| ()).unwrap();
                }
                std::thread::yield_now();
            }
        });
        let writers: Vec<_> = (0..8u64)
            .map(|thread| {
                let image = &image;
                scope.spawn(move || {
                    for n in 0..256 {
                        let at = n * block + thread * 512;
                        write_payload(image, at, &[thread as u8 + 1; 512]).unwrap();
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.join().unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    for n in 0..256 {
        for thread in 0..8 {
            let read = read_payload(&image, n * block + thread * 512, 512).unwrap();
            assert_eq!(read, [thread as u8 + 1; 512], "block {n}, thread {thread}");
        }
    }
    let entries = |op: &&TraceOp| matches!(op, TraceOp::Write { data, .. } if data.len() == 4);
    assert_eq!(sim.trace().iter().filter(entries).count(), 256, "one table entry for each block");
    assert_eq!(image.allocated_bytes(), 256 * block);
    image.close().unwrap();
    sound(&sim);
}

#[test]
fn a_full_file_system_is_an_error_that_passes() {
    let block = 4096u64;
    let sim = dynamic(block as u32, 64 * block);
    let image = open(&sim, false);
    write_payload(&image, 0, &[1; 512]).unwrap();
    sim.limit_len(Some(sim.len().unwrap()));
    let mut written = 1;
    let error = loop {
        match write_payload(&image, written * block, &[1; 512]) {
            Ok(()) => written += 1,
            Err(e) => break e,
        }
    };
    assert_eq!(error.kind, ErrorKind::NoSpace, "{error}");
    assert!((2..64).contains(&written), "{written}");
    assert!(!image.wants_maintenance(), "maintenance does not try again and again");
    write_payload(&image, 0, &[2; 512]).expect("blocks that have a place are written all the same");
    sound(&sim);
    sim.limit_len(None);
    for n in written..64 {
        write_payload(&image, n * block, &[1; 512]).unwrap();
    }
    image.close().unwrap();
    sound(&sim);
}

/// Each operation on the file in turn fails once: then either all goes on, or the image refuses writes and says why; and
/// whatever was acknowledged is there afterwards.
#[test]
fn a_failing_operation_never_costs_acknowledged_content() {
    for error in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
        for partial in [false, true] {
            for after in 0..200 {
                fail_at(Fault { after, lasting: false, error, partial });
                fail_at(Fault { after, lasting: true, error, partial });
            }
        }
    }
}

fn fail_at(fault: Fault) {
    let block = 4096u64;
    let sim = dynamic(block as u32, 64 * block);
    let image = open(&sim, false);
    sim.inject(fault);
    let mut model = vec![0u8; 64 * block as usize];
    let mut unsure = vec![false; 64 * 8];
    let mut poisoned = false;
    for n in 0..40u64 {
        let at = (n * 3 % 64) * block + n % 8 * 512;
        let range = at as usize..at as usize + 512;
        match write_payload(&image, at, &[n as u8 + 1; 512]) {
            Ok(()) => {
                assert!(!poisoned || fault.error == io::ErrorKind::StorageFull, "{fault:?}: writes go on");
                model[range].fill(n as u8 + 1);
                unsure[at as usize / 512] = false;
            }
            Err(e) => {
                unsure[at as usize / 512] = true;
                poisoned |= e.kind == ErrorKind::Poisoned;
            }
        }
        if n % 7 == 6 && image.wants_maintenance() {
            let _ = image.maintain(&|| ());
        }
        if n % 9 == 8 {
            let _ = image.commit();
        }
    }
    // Whether it can be closed depends on the fault; what it leaves has to be in order either way.
    let _ = image.close();
    sim.clear_fault();
    let storage: Arc<dyn Storage> = sim.clone();
    let again = Vhd::open(storage, false, true).unwrap_or_else(|e| panic!("{fault:?}: {e}"));
    for (n, unsure) in unsure.iter().enumerate() {
        let read = read_payload(&again, n as u64 * 512, 512).unwrap();
        if !unsure {
            assert_eq!(read, model[n * 512..][..512], "{fault:?}: sector {n}");
        }
    }
    write_payload(&again, 63 * block, &[9; 512]).unwrap();
    again.close().unwrap();
    sound(&sim);
}

#[test]
fn a_failed_table_write_poisons_the_image() {
    let block = 4096u64;
    let sim = dynamic(block as u32, 64 * block);
    let image = open(&sim, false);
    write_payload(&image, 0, &[1; 512]).unwrap();
    sim.inject(Fault { after: 0, lasting: false, error: io::ErrorKind::Other, partial: false });
    let first = write_payload(&image, block, &[1; 512]).unwrap_err();
    assert_eq!(first.kind, ErrorKind::Io);
    let later = write_payload(&image, 0, &[2; 512]).unwrap_err();
    assert_eq!(later.kind, ErrorKind::Poisoned);
    assert!(later.message.contains("block table entry 1"), "{later}");
    assert_eq!(image.commit().unwrap_err().kind, ErrorKind::Poisoned);
    assert_eq!(image.close().unwrap_err().kind, ErrorKind::Poisoned);
    assert_eq!(read_payload(&image, 0, 512).unwrap(), [1; 512], "reads go on");
}

#[test]
fn spans_beyond_the_disk_or_off_the_grid_are_refused_by_every_verb() {
    for sim in [dynamic(4096, 10 * 4096 + 512), create(ImageType::Fixed, None, 41472)] {
        let image = open(&sim, false);
        let size = image.geometry().virtual_size;
        let bad =
            [(size, 512), (size - 512, 1024), (1, 512), (0, 100), (u64::MAX - 511, 512), (512, u64::MAX)];
        for (offset, len) in bad {
            let at = ByteSpan::new(offset, len);
            let mut out = Pieces::new();
            let kinds = [
                image.map_read(at, &mut out).unwrap_err().kind,
                image.map_write(at, &mut out).unwrap_err().kind,
                image.map_zero(at, ZeroMode::Unmap, &mut out).unwrap_err().kind,
            ];
            assert_eq!(kinds, [ErrorKind::OutOfRange; 3], "{at:?}");
            assert!(out.is_empty());
        }
        assert_eq!(image.next_extent(size).unwrap(), None);
        let reader = open(&sim, true);
        let kind = reader.map_write(ByteSpan::new(0, 512), &mut Pieces::new()).unwrap_err().kind;
        assert_eq!(kind, ErrorKind::ReadOnly);
    }
}

#[test]
fn allocation_inside_grown_space_costs_one_write_and_no_sync() {
    let block = 2 << 20;
    let sim = dynamic(block as u32, 64 << 30);
    let image = open(&sim, false);
    write_payload(&image, 0, &[1; 512]).unwrap();
    sim.forget_trace();
    let mut pieces = Pieces::new();
    image.map_write(ByteSpan::new(7 * block, 4096), &mut pieces).unwrap();
    assert!(
        matches!(&sim.trace()[..], [TraceOp::Write { data, .. }] if data.len() == 4),
        "{:?}",
        sim.trace()
    );
    for n in 8..16 {
        image.map_write(ByteSpan::new(n * block, 4096), &mut pieces).unwrap();
    }
    assert_eq!(sim.syncs(), 0);
    image.map_write(ByteSpan::new(7 * block, 9 * block), &mut pieces).unwrap();
    assert_eq!(sim.trace_len(), 9, "blocks that have a place cost nothing");
    for n in 16..200 {
        if image.wants_maintenance() {
            image.maintain(&|| ()).unwrap();
        }
        image.map_write(ByteSpan::new(n * block, 4096), &mut pieces).unwrap();
    }
    assert!(sim.syncs() <= 7, "{} syncs for 200 blocks", sim.syncs());
}

#[test]
fn sizes_and_blocks_outside_of_the_format_are_refused_with_the_range() {
    let refused = |image_type, block_size, virtual_size| {
        let sim = SimStorage::new();
        let e = vhd::create(&*sim, &CreateParams { image_type, virtual_size, block_size, parent: None })
            .unwrap_err();
        assert_eq!(sim.trace_len(), 0, "nothing was written");
        (e.kind, e.message)
    };
    for size in [0, 511, 513, (2040 << 30) + 512, u64::MAX] {
        let (kind, message) = refused(ImageType::Dynamic, None, size);
        assert_eq!(kind, ErrorKind::InvalidParameter, "{message}");
    }
    for block in [0, 256, 3 << 20, 1 << 29] {
        assert_eq!(refused(ImageType::Dynamic, Some(block), 1 << 30).0, ErrorKind::InvalidParameter);
    }
    assert_eq!(refused(ImageType::Dynamic, Some(512), 1 << 40).0, ErrorKind::InvalidParameter);
    assert_eq!(refused(ImageType::Differencing, None, 1 << 30).0, ErrorKind::InvalidParameter);
}

#[test]
fn the_largest_disk_has_room_for_all_its_blocks() {
    // With 512 KiB blocks on pages the last ones would lie beyond 2 TiB, where no table entry reaches.
    for (block, align) in [(512 << 10, 512), (1 << 20, 4096), (2 << 20, 4096)] {
        let sim = create(ImageType::Dynamic, Some(block), 2040 << 30);
        let image = open(&sim, false);
        assert_eq!(image.geometry().payload_align, align, "blocks of {block}");
    }
    let largest = create(ImageType::Dynamic, Some(512 << 10), 2040 << 30);
    let image = open(&largest, false);
    write_payload(&image, (2040 << 30) - 512, &[7; 512]).unwrap();
    assert_eq!(read_payload(&image, (2040 << 30) - 512, 512).unwrap(), [7; 512]);
}
