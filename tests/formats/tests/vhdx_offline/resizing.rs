//! Giving disks another size.

use formats::vhdx::{self, Vhdx, resize, resize_over};
use formats::{ErrorKind, Image, ImageType, Storage};
use formats_tests::{read_payload, write_payload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::image::{
    FULL, MIB, NOT_PRESENT, PARTIAL, Taken, UNDEFINED, UNMAPPED, ZERO, bytes, create, own, place_block,
    set_entry, shared, sound,
};

/// What a disk of this content is at another size.
fn resized(mut content: Vec<u8>, size: u64) -> Vec<u8> {
    content.resize(size as usize, 0);
    content
}

#[test]
fn a_disk_that_grows_keeps_its_content_and_ends_in_zeroes() {
    for (kind, sector) in [
        (ImageType::Dynamic, 512),
        (ImageType::Dynamic, 4096),
        (ImageType::Fixed, 512),
        (ImageType::Fixed, 4096),
    ] {
        let sim = create(kind, 5 * MIB + 8192, sector);
        let image = Vhdx::open(shared(&sim), false).unwrap();
        write_payload(&image, 0, &bytes(1, 4096)).unwrap();
        write_payload(&image, 5 * MIB, &bytes(2, 8192)).unwrap();
        image.close().unwrap();
        let old = Taken::of(&sim);
        // What lies in the last block behind the disk's end is nobody's, and may be anything.
        sim.write_at(&[0xee; 70000], (old.entry(5) >> 20) * MIB + 8192).unwrap();
        for size in [5 * MIB + 12288, 5 * MIB + 16384, 9 * MIB, 12 * MIB - 4096] {
            let before = Taken::of(&sim);
            let expected = resized(before.content(&[]), size);
            resize(&shared(&sim), size, false).unwrap();
            let after = Taken::of(&sim);
            assert!(after.content(&[]) == expected, "{kind} to {size}");
            assert_ne!(after.data_write, before.data_write, "the content has another id");
            sound(&sim).unwrap();
            let image = Vhdx::open(shared(&sim), false).unwrap();
            assert_eq!(image.geometry().virtual_size, size);
            write_payload(&image, size - 4096, &bytes(3, 4096)).unwrap();
            image.close().unwrap();
            if kind == ImageType::Fixed {
                assert!((0..after.blocks()).all(|b| after.entry(b) & 7 == FULL), "every block has its place");
            }
        }
    }
}

#[test]
fn entries_behind_the_old_table_are_written_anew() {
    // In this table the entry of a sector bitmap comes between the old blocks and the new ones.
    for blocks in [4094, 4095, 4096, 4097, 4607, 511, 512] {
        for kind in [ImageType::Dynamic, ImageType::Differencing] {
            let sim = create(kind, blocks * MIB, 512);
            let old = Taken::of(&sim);
            // Nothing says what lies behind the table's last entry.
            let entries = match kind {
                ImageType::Dynamic => blocks + (blocks - 1) / 4096,
                _ => blocks.div_ceil(4096) * 4097,
            };
            sim.write_at(&[0xff; 80000], old.bat.0 + entries * 8).unwrap();
            resize(&shared(&sim), (blocks + 5000) * MIB, false).unwrap();
            let new = Taken::of(&sim);
            let expected = if kind == ImageType::Dynamic { NOT_PRESENT } else { ZERO };
            for block in blocks..blocks + 5000 {
                assert_eq!(new.entry(block), expected, "{kind}, {blocks} blocks, block {block}");
            }
            assert!((0..(blocks - 1) / 4096).all(|chunk| new.raw(new.bitmap_place(chunk)) == 0));
            sound(&sim).unwrap();
        }
    }
}

#[test]
fn a_table_that_does_not_fit_moves_to_the_end_of_the_file() {
    // 1 MiB of entries is full at 128 GiB, less the entries of the sector bitmaps; a child has those of whole chunks.
    for (kind, small, large) in
        [(ImageType::Dynamic, 131_000, 131_100), (ImageType::Differencing, 126_970, 127_000)]
    {
        let sim = create(kind, small * MIB, 512);
        place_block(&sim, 77, FULL, &bytes(5, MIB));
        place_block(&sim, small - 1, FULL, &bytes(6, MIB));
        let old = Taken::of(&sim);
        resize(&shared(&sim), large * MIB, false).unwrap();
        let new = Taken::of(&sim);
        assert_eq!((new.bat.1, new.size), (2 * MIB, large * MIB));
        assert!(new.bat.0 > old.bat.0);
        for block in [0, 77, small - 1] {
            assert_eq!(new.entry(block), old.entry(block));
        }
        let expected = if kind == ImageType::Dynamic { NOT_PRESENT } else { ZERO };
        assert!((small..large).all(|block| new.entry(block) == expected));
        sound(&sim).unwrap();
        // Compacted, the table is put before the blocks again, and the old place of the table is used.
        let outcome = vhdx::compact(&shared(&sim), &mut |_, _| ()).unwrap();
        sound(&sim).unwrap();
        let packed = Taken::of(&sim);
        assert_eq!(packed.entry(77) & 7, FULL);
        assert!(sim.len().unwrap() <= 8 * MIB, "{outcome:?}, {} bytes", sim.len().unwrap());
    }
}

#[test]
fn the_largest_disk_is_possible_and_no_larger_one() {
    let sim = create(ImageType::Dynamic, MIB, 512);
    resize(&shared(&sim), 64 << 40, false).unwrap();
    sound(&sim).unwrap();
    let image = Vhdx::open(shared(&sim), false).unwrap();
    write_payload(&image, (64 << 40) - 512, &bytes(9, 512)).unwrap();
    image.close().unwrap();
    assert_eq!(read_payload(&image, (64 << 40) - 512, 512).unwrap(), bytes(9, 512));
    for size in [(64 << 40) + 512, 0, 513, u64::MAX] {
        assert_eq!(
            resize(&shared(&sim), size, true).unwrap_err().kind,
            ErrorKind::InvalidParameter,
            "{size}"
        );
    }
    let before = sim.contents().fingerprint();
    resize(&shared(&sim), 64 << 40, false).unwrap();
    assert_eq!(sim.contents().fingerprint(), before, "the same size changes nothing");
}

#[test]
fn only_an_empty_tail_is_cut_off_and_only_on_request() {
    let sim = create(ImageType::Dynamic, 8 * MIB, 512);
    let image = Vhdx::open(shared(&sim), false).unwrap();
    write_payload(&image, MIB, &bytes(1, 512)).unwrap();
    write_payload(&image, 3 * MIB, &vec![0; MIB as usize]).unwrap();
    write_payload(&image, 6 * MIB + 1024, &bytes(1, 512)).unwrap();
    image.close().unwrap();
    let refused = resize(&shared(&sim), 2 * MIB, false).unwrap_err();
    assert!(refused.message.contains("--shrink"), "{refused}");
    let refused = resize(&shared(&sim), 2 * MIB, true).unwrap_err();
    assert!(refused.message.contains(&format!("data at {}", 6 * MIB + 1024)), "{refused}");
    resize(&shared(&sim), 6 * MIB + 1536, true).unwrap();
    let image = Vhdx::open(shared(&sim), false).unwrap();
    formats_tests::zero_payload(&image, 6 * MIB + 1024, 512, formats::ZeroMode::Keep).unwrap();
    image.close().unwrap();
    let content = Taken::of(&sim).content(&[]);
    let len = sim.len().unwrap();
    resize(&shared(&sim), MIB + 512, true).unwrap();
    assert!(Taken::of(&sim).content(&[]) == content[..(MIB + 512) as usize]);
    assert_eq!(sim.len().unwrap(), len - 2 * MIB, "the two empty blocks are cut off");
    sound(&sim).unwrap();
    resize(&shared(&sim), 8 * MIB, false).unwrap();
    assert!(Taken::of(&sim).content(&[])[(MIB + 512) as usize..].iter().all(|b| *b == 0));
    let refused = resize(&shared(&sim), MIB, true).unwrap_err();
    assert!(refused.message.contains(&format!("data at {MIB}")), "{refused}");
}

#[test]
fn a_child_that_grows_shows_nothing_of_its_parent_beyond_its_old_end() {
    let parent = bytes(0x50, 12 * MIB);
    for sector in [512, 4096] {
        for state in [NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, PARTIAL, FULL] {
            let old_size = 3 * MIB + 8192;
            let sim = create(ImageType::Differencing, old_size, sector);
            match state {
                PARTIAL | FULL => place_block(&sim, 3, state, &bytes(0x30, MIB)),
                _ => set_entry(&sim, 3, state),
            }
            if state == PARTIAL {
                // One sector of the disk, and some that are not.
                let first = 3 * MIB / u64::from(sector);
                own(&sim, first..first + 1);
                own(&sim, first + 8192 / u64::from(sector)..first + 12288 / u64::from(sector));
            }
            let shown = Taken::of(&sim).content(&parent);
            for size in [old_size + 4096, old_size + 16384, 5 * MIB, 11 * MIB + 4096] {
                resize(&shared(&sim), size, false).unwrap();
                let now = Taken::of(&sim).content(&parent);
                assert!(now == resized(shown.clone(), size), "state {state}, {sector}, to {size}");
                sound(&sim).unwrap();
            }
        }
    }
}

#[test]
fn a_child_shrinks_only_where_its_parent_is_not_seen() {
    let sim = create(ImageType::Differencing, 8 * MIB, 512);
    for block in 4..8 {
        set_entry(&sim, block, ZERO);
    }
    resize(&shared(&sim), 5 * MIB, true).unwrap();
    resize(&shared(&sim), 4 * MIB, true).unwrap();
    let refused = resize(&shared(&sim), 3 * MIB + 512, true).unwrap_err();
    assert!(refused.message.contains("parent"), "{refused}");
    place_block(&sim, 3, PARTIAL, &vec![0; MIB as usize]);
    own(&sim, 3 * 2048 + 1..4 * 2048);
    resize(&shared(&sim), 3 * MIB + 512, true).unwrap();
    assert!(resize(&shared(&sim), 3 * MIB, true).is_err());
    // Who knows the parent may know better.
    resize_over(&shared(&sim), MIB, true, &|span| Ok(span.offset >= MIB)).unwrap();
    assert!(resize_over(&shared(&sim), 512, true, &|span| Ok(span.offset >= MIB)).is_err());
    sound(&sim).unwrap();
    assert_eq!(Taken::of(&sim).size, MIB);
}

#[test]
fn random_sizes_agree_with_a_flat_model() {
    for seed in 0..12 {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let sector = if seed % 3 == 0 { 4096 } else { 512 };
        let kind = if seed % 4 == 1 { ImageType::Fixed } else { ImageType::Dynamic };
        let mut model = vec![0; 4 << 20];
        let sim = create(kind, model.len() as u64, sector);
        for _ in 0..40 {
            if random.random_ratio(1, 2) {
                let size = random.random_range(1..=12 * MIB / u64::from(sector)) * u64::from(sector);
                let lost = model.get(size as usize..).is_some_and(|tail| tail.iter().any(|b| *b != 0));
                let done = resize(&shared(&sim), size, true);
                assert_eq!(done.is_err(), lost, "{done:?}");
                if !lost {
                    model.resize(size as usize, 0);
                }
            } else {
                let image = Vhdx::open(shared(&sim), false).unwrap();
                for _ in 0..4 {
                    let sectors = model.len() as u64 / u64::from(sector);
                    let at = random.random_range(0..sectors) as usize * sector as usize;
                    let len = (sector as usize * random.random_range(1..40)).min(model.len() - at);
                    if random.random_ratio(1, 2) {
                        let data: Vec<u8> = (0..len).map(|_| random.random()).collect();
                        write_payload(&image, at as u64, &data).unwrap();
                        model[at..at + len].copy_from_slice(&data);
                    } else {
                        let len = model.len() - at;
                        let mode = formats::ZeroMode::Unmap;
                        formats_tests::zero_payload(&image, at as u64, len as u64, mode).unwrap();
                        model[at..].fill(0);
                    }
                }
                image.close().unwrap();
            }
            sound(&sim).unwrap();
            assert!(Taken::of(&sim).content(&[]) == model, "seed {seed}");
        }
    }
}
