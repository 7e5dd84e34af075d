//! Differencing VHDs that break rules are refused by name; those that are accepted can be relied on.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod vhd_diff;

use std::sync::Arc;

use formats::{ErrorKind, Image, ParentPathKind, vhd};
use formats_tests::{SimDisk, SimStorage, read_payload, write_payload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use vhd_diff::{BOOT, base, chain, child, content, layer, notes};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 4;
const HEADER: u64 = 512;
const ABSOLUTE: u64 = 0x1000;
const TABLE: u64 = 0x2000;
const RELATIVE: u64 = 0x3000;

/// A child with something in two of its four blocks, and its parent.
fn family() -> (SimDisk, Arc<SimStorage>) {
    let parent = base(Some(BLOCK as u32), BLOCKS * BLOCK);
    let image = layer(&parent, false, None).unwrap();
    write_payload(&*image, 0, &content(0xa0, BLOCKS * BLOCK)).unwrap();
    image.close().unwrap();
    let sim = child(&*image, BLOCK as u32, BLOCKS * BLOCK);
    let top = layer(&sim, false, None).unwrap();
    write_payload(&*top, 512, &content(1, 1024)).unwrap();
    write_payload(&*top, 2 * BLOCK, &content(2, BLOCK)).unwrap();
    top.close().unwrap();
    (sim.contents(), parent)
}

/// Renews the checksum of the structure of `len` bytes at `at`, whose field is `field` bytes in.
fn seal(disk: &mut SimDisk, at: u64, len: usize, field: usize) {
    let mut raw = vec![0; len];
    disk.read(at, &mut raw);
    raw[field..field + 4].fill(0);
    let sum: u32 = raw.iter().map(|&b| u32::from(b)).sum();
    disk.write(at + field as u64, &(!sum).to_be_bytes());
}

fn in_header(disk: &mut SimDisk, field: u64, value: &[u8]) {
    disk.write(HEADER + field, value);
    seal(disk, HEADER, 1024, 36);
}

/// Where locator `n` is in the header.
fn locator(n: u64) -> u64 {
    576 + 24 * n
}

#[test]
fn the_layout_is_that_of_windows() {
    let (disk, _) = family();
    let bytes = |at: u64, len: usize| {
        let mut raw = vec![0; len];
        disk.read(at, &mut raw);
        raw
    };
    assert_eq!(bytes(HEADER + 16, 8), TABLE.to_be_bytes());
    for (n, code, at) in [(0, b"W2ku", ABSOLUTE), (1, b"W2ru", RELATIVE)] {
        let entry = bytes(HEADER + locator(n), 24);
        assert_eq!(&entry[..4], code);
        assert_eq!(entry[4..8], 4096u32.to_be_bytes());
        assert_eq!(entry[16..], at.to_be_bytes());
    }
    // The first block comes behind the space that is the relative path's to use, its data on a page.
    let first = u32::from_be_bytes(bytes(TABLE, 4).try_into().unwrap());
    assert_eq!(u64::from(first) * 512, RELATIVE + 0x1000 + 0x1000 - 512);
    assert_eq!(bytes(u64::from(first) * 512, 1), [0b0110_0000]);
}

#[test]
fn broken_locators_are_refused_by_rule() {
    let (clean, _) = family();
    let codes = |field: u64, value: &[u8]| {
        let mut disk = clean.clone();
        in_header(&mut disk, field, value);
        let sim = SimStorage::from_disk(disk);
        let e = layer(&sim, true, None).unwrap_err();
        assert_eq!(e.kind, ErrorKind::Corrupt);
        assert_eq!(layer(&sim, false, None).unwrap_err().message, e.message);
        e.message.rsplit_once('[').unwrap().1.trim_end_matches(']').to_owned()
    };
    for n in [0, 1] {
        assert_eq!(codes(locator(n) + 8, &u32::MAX.to_be_bytes()), "vhd-locator-too-long");
        assert_eq!(codes(locator(n) + 8, &33u32.to_be_bytes()), "vhd-locator-odd");
        assert_eq!(codes(locator(n) + 16, &(u64::MAX - 3).to_be_bytes()), "vhd-locator-outside");
        assert_eq!(codes(locator(n) + 16, &(1u64 << 40).to_be_bytes()), "vhd-locator-outside");
        assert_eq!(codes(locator(n) + 16, &(TABLE + 2).to_be_bytes()), "vhd-structures-overlap");
    }
    let mut disk = clean.clone();
    disk.write(RELATIVE + 2, &[0x00, 0xd8]);
    let e = layer(&SimStorage::from_disk(disk), true, None).unwrap_err();
    assert!(e.message.contains("vhd-locator-text"), "an unpaired surrogate in the path: {e}");
}

#[test]
fn paths_of_a_parent_are_text_and_come_in_the_order_to_look_for_them() {
    let (mut disk, _) = family();
    // A file URL in a third locator, and one of a kind that nobody reads.
    let url = "file:///C:/%2e%2e/..\\x";
    disk.write(0x1800, url.as_bytes());
    in_header(&mut disk, locator(2), b"MacX");
    in_header(&mut disk, locator(2) + 8, &(url.len() as u32).to_be_bytes());
    in_header(&mut disk, locator(2) + 16, &0x1800u64.to_be_bytes());
    in_header(&mut disk, locator(3), b"Wi2k");
    let name: Vec<u8> = "..\\..\\etc".encode_utf16().chain([0xd800, 0]).flat_map(u16::to_be_bytes).collect();
    in_header(&mut disk, 64, &name);
    let link =
        layer(&SimStorage::from_disk(disk.clone()), true, None).unwrap().parent_link().unwrap().clone();
    let paths: Vec<_> = link.paths.iter().map(|p| (p.kind, p.text.as_str())).collect();
    let wanted = [
        (ParentPathKind::Relative, ".\\parent.vhd"),
        (ParentPathKind::Absolute, "\\disks\\parent.vhd"),
        (ParentPathKind::Absolute, url),
        (ParentPathKind::Name, "..\\..\\etc\u{fffd}"),
    ];
    assert_eq!(paths, wanted);
    // A file URL that is not UTF-8 is no path.
    disk.write(0x1800, &[0xff]);
    let link = layer(&SimStorage::from_disk(disk), true, None).unwrap().parent_link().unwrap().clone();
    assert_eq!(link.paths.len(), 3);
}

/// Every single byte of the structures, changed at random: whatever opens has to stay within its file.
#[test]
fn structures_with_any_byte_changed_neither_panic_nor_leave_the_file() {
    let (clean, parent) = family();
    let end = clean.len();
    let structures = [(0, HEADER + 1024), (ABSOLUTE, ABSOLUTE + 64), (TABLE, TABLE + 512)];
    let rest = [(RELATIVE, RELATIVE + 64), (end - 512, end)];
    let (mut opened, mut refused) = (0, 0);
    for at in structures.into_iter().chain(rest).flat_map(|(from, to)| from..to) {
        for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            let mut disk = clean.clone();
            disk.write(at, &[value]);
            if (HEADER..HEADER + 1024).contains(&at) {
                seal(&mut disk, HEADER, 1024, 36);
            } else if at >= end - 512 {
                seal(&mut disk, end - 512, 512, 64);
            }
            let sim = SimStorage::from_disk(disk);
            vhd::check(&*sim, false).unwrap();
            let Ok(top) = layer(&sim, true, None) else {
                refused += 1;
                continue;
            };
            opened += 1;
            if top.parent_link().is_some() {
                let size = top.geometry().virtual_size;
                let disk = chain(top, std::slice::from_ref(&parent));
                read_payload(&disk, 0, 512).unwrap();
                read_payload(&disk, size - 512, 512).unwrap();
            }
        }
    }
    println!("{opened} opened, {refused} refused");
    assert!(opened > 1000 && refused > 100, "{opened} {refused}");
}

/// Images with several fields changed at random: one that is accepted for writing holds what is written to it, is sound
/// afterwards, and shows nothing but that and what was there.
#[test]
fn what_is_accepted_for_writing_can_be_relied_on() {
    let (clean, parent) = family();
    let parents = [parent];
    let (mut accepted, mut refused) = (0, 0);
    for seed in 0..3000 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut disk = clean.clone();
        for _ in 0..rng.random_range(1..4) {
            scramble(&mut disk, &mut rng);
        }
        let sim = SimStorage::from_disk(disk);
        let Ok(top) = layer(&sim, false, notes(SimStorage::new(), BOOT)) else {
            refused += 1;
            continue;
        };
        accepted += 1;
        let disk = chain(top, &parents);
        let size = disk.geometry().virtual_size;
        let before = read_payload(&disk, 0, size as usize).unwrap();
        let places: Vec<u64> =
            (0..8).map(|n| n * BLOCK / 2).chain([size - 512]).filter(|at| at + 512 <= size).collect();
        let mut expected = before;
        for (n, &at) in places.iter().enumerate() {
            write_payload(&disk, at, &[n as u8 + 1; 512]).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            expected[at as usize..at as usize + 512].fill(n as u8 + 1);
        }
        disk.close().unwrap();
        drop(disk);
        let top = layer(&sim, false, None).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let disk = chain(top, &parents);
        assert!(read_payload(&disk, 0, size as usize).unwrap() == expected, "seed {seed}");
        assert!(vhd::check(&*sim, false).unwrap().is_sound(), "seed {seed}");
    }
    println!("{accepted} accepted, {refused} refused");
    assert!(accepted > 300 && refused > 300, "{accepted} {refused}");
}

/// Changes one field, or what is between the blocks and the footer, and renews the checksums.
fn scramble(disk: &mut SimDisk, rng: &mut ChaCha8Rng) {
    let end = disk.len();
    let sectors = (end / 512) as u32;
    match rng.random_range(0..7) {
        0 => {
            let entry = rng.random_range(0..sectors + 2);
            disk.write(TABLE + 4 * rng.random_range(0..BLOCKS), &entry.to_be_bytes());
        }
        1 => in_header(disk, 16, &(512 * rng.random_range(0..u64::from(sectors))).to_be_bytes()),
        2 => in_header(disk, 28, &rng.random_range(2u32..200).to_be_bytes()),
        3 => in_header(disk, 32, &(512u32 << rng.random_range(0..6)).to_be_bytes()),
        4 => in_header(disk, locator(1) + 16, &rng.random_range(0..end).to_be_bytes()),
        5 => in_header(disk, locator(1) + 4, &rng.random_range(0..u32::MAX).to_be_bytes()),
        _ => {
            let mut footer = vec![0; 512];
            disk.read(end - 512, &mut footer);
            let slack = 512 * rng.random_range(0..40u64);
            disk.write(end - 512, &vec![0x3c; slack as usize]);
            disk.write(end - 512 + slack, &footer);
        }
    }
}
