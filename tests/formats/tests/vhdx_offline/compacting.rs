//! Giving space back.

use std::sync::Arc;

use formats::vhdx::{Vhdx, compact};
use formats::{CompactOutcome, Image, ImageType, Storage};
use formats_tests::{SimStorage, write_payload, zero_payload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::image::{
    FULL, MIB, NOT_PRESENT, PARTIAL, Taken, UNDEFINED, UNMAPPED, ZERO, bytes, create, own, place_block,
    set_entry, shared, sound,
};

fn compacted(sim: &Arc<SimStorage>) -> CompactOutcome {
    let (mut last, mut calls) = (0, 0);
    let outcome = compact(&shared(sim), &mut |done, total| {
        assert!(done >= last && done <= total, "{done} of {total} after {last}");
        (last, calls) = (done, calls + 1);
    });
    assert!(calls >= 2);
    outcome.unwrap()
}

#[test]
fn blocks_of_zeroes_and_leaked_space_are_given_back() {
    let sim = create(ImageType::Dynamic, 64 * MIB, 512);
    let empty = sim.len().unwrap();
    let image = Vhdx::open(shared(&sim), false).unwrap();
    for block in 0..20 {
        let data = if block % 2 == 0 { vec![0; MIB as usize] } else { bytes(block as u8, MIB) };
        write_payload(&image, block * MIB, &data).unwrap();
    }
    image.close().unwrap();
    // What a crash leaves: a block that nothing names any more, and slack behind the last.
    set_entry(&sim, 3, NOT_PRESENT);
    sim.set_len(sim.len().unwrap() + 5 * MIB + 77).unwrap();
    let before = Taken::of(&sim);
    let outcome = compacted(&sim);
    let after = Taken::of(&sim);
    assert_eq!(sim.len().unwrap(), empty + 9 * MIB);
    assert!(after.content(&[]) == before.content(&[]));
    assert_eq!(after.data_write, before.data_write, "what the disk holds is the same");
    assert!((0..20).step_by(2).all(|block| after.entry(block) == ZERO));
    // The leaked block held data; zeroes in the simulated file are holes. The log has grown by a few entries.
    assert!((MIB - 65536..=MIB).contains(&outcome.freed_bytes), "{outcome:?}");
    assert!(outcome.moved_bytes > 0 && outcome.moved_bytes <= 9 * MIB, "{outcome:?}");
    sound(&sim).unwrap();
    let trace = sim.trace_len();
    assert_eq!(compacted(&sim), CompactOutcome::default());
    assert_eq!(sim.trace_len(), trace, "nothing is left to do");
}

#[test]
fn a_fixed_image_keeps_its_blocks_and_loses_what_nothing_uses() {
    let sim = create(ImageType::Fixed, 6 * MIB, 512);
    let before = Taken::of(&sim);
    let len = sim.len().unwrap();
    sim.set_len(len + 3 * MIB).unwrap();
    sim.write_at(&[0xee; 5000], len + MIB).unwrap();
    compacted(&sim);
    let after = Taken::of(&sim);
    assert_eq!(sim.len().unwrap(), len);
    assert!((0..6).all(|block| after.entry(block) == before.entry(block)));
    // One as QEMU makes it: its blocks have no places, and will need them.
    for block in 0..6 {
        set_entry(&sim, block, ZERO);
    }
    let outcome = compacted(&sim);
    assert_eq!((sim.len().unwrap(), outcome.moved_bytes), (len, 0));
}

#[test]
fn a_child_keeps_what_hides_its_parent() {
    let parent = bytes(0x50, 9 * MIB);
    let sim = create(ImageType::Differencing, 8 * MIB + 512, 512);
    place_block(&sim, 0, FULL, &vec![0; MIB as usize]);
    place_block(&sim, 1, UNMAPPED, &bytes(1, MIB));
    place_block(&sim, 2, UNDEFINED, &bytes(2, MIB));
    place_block(&sim, 3, PARTIAL, &bytes(3, MIB));
    own(&sim, 3 * 2048 + 5..3 * 2048 + 900);
    place_block(&sim, 4, PARTIAL, &bytes(4, MIB));
    place_block(&sim, 8, PARTIAL, &bytes(8, MIB));
    own(&sim, 8 * 2048..8 * 2048 + 1);
    place_block(&sim, 5, FULL, &bytes(5, MIB));
    let before = Taken::of(&sim);
    let outcome = compacted(&sim);
    let after = Taken::of(&sim);
    assert!(after.content(&parent) == before.content(&parent));
    let states: Vec<u64> = (0..9).map(|block| after.entry(block) & 7).collect();
    assert_eq!(states, [ZERO, UNMAPPED, UNDEFINED, PARTIAL, PARTIAL, FULL, 0, 0, PARTIAL]);
    assert_eq!((after.entry(0), after.entry(1), after.entry(2)), (ZERO, UNMAPPED, UNDEFINED));
    assert_eq!(outcome.moved_bytes, 3 * MIB, "{outcome:?}");
    sound(&sim).unwrap();
}

#[test]
fn sector_bitmaps_move_into_small_holes_and_go_when_no_block_needs_them() {
    let chunk = 4096;
    let sim = create(ImageType::Differencing, 3 * chunk * MIB, 512);
    place_block(&sim, 0, FULL, &vec![0; MIB as usize]);
    for n in 0..3 {
        place_block(&sim, n * chunk + 1, PARTIAL, &bytes(n as u8, MIB));
        own(&sim, (n * chunk + 1) * 2048..(n * chunk + 1) * 2048 + 100);
    }
    // The second chunk's block is written to the end: its bitmap is not looked at any more.
    let image = Taken::of(&sim);
    set_entry(&sim, chunk + 1, image.entry(chunk + 1) & !7 | FULL);
    let before = Taken::of(&sim);
    compacted(&sim);
    let after = Taken::of(&sim);
    assert_eq!(after.raw(after.bitmap_place(1)), 0);
    assert!(after.raw(after.bitmap_place(2)) < before.raw(before.bitmap_place(2)));
    assert_eq!(sim.len().unwrap(), before.bat.0 + before.bat.1 + 5 * MIB);
    sound(&sim).unwrap();
}

#[test]
fn random_images_hold_the_same_after_compacting() {
    for seed in 0..16 {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let size = 24 * MIB + 4096;
        let sim = create(ImageType::Dynamic, size, if seed % 2 == 0 { 512 } else { 4096 });
        for _ in 0..6 {
            let image = Vhdx::open(shared(&sim), false).unwrap();
            for _ in 0..20 {
                let at = random.random_range(0..size / 4096) * 4096;
                let len = (random.random_range(1..400) * 4096).min(size - at);
                match random.random_range(0..5) {
                    0 | 1 => write_payload(&image, at, &bytes(random.random(), len)).unwrap(),
                    2 => write_payload(&image, at, &vec![0; len as usize]).unwrap(),
                    3 => zero_payload(&image, at, len, formats::ZeroMode::Unmap).unwrap(),
                    _ => image.maintain(&|| ()).unwrap(),
                }
            }
            // A session that was not closed leaves blocks that nothing names, and a log.
            let expected = formats_tests::read_payload(&image, 0, size as usize).unwrap();
            if random.random_ratio(2, 3) {
                image.close().unwrap();
            }
            drop(image);
            compacted(&sim);
            let after = Taken::of(&sim);
            assert!(after.content(&[]) == expected, "seed {seed}");
            let used = (0..after.blocks()).filter(|block| after.entry(*block) & 7 == FULL).count() as u64;
            assert_eq!(sim.len().unwrap(), after.bat.0 + after.bat.1 + used * MIB, "no hole is left");
            sound(&sim).unwrap();
        }
    }
}
