//! Every crash state of a change to a closed VHD holds the old disk or the new one.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod vhd_offline;

use std::sync::Arc;

use formats::ImageType::{Differencing, Dynamic, Fixed};
use formats::{ByteSpan, vhd};
use formats_tests::{CrashCount, CrashExplorer, SimDisk, SimStorage};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use vhd_offline::{BLOCK, Placed, arc, bytes, content, empty, link, survives, with_blocks};

/// Over a parent, if any, that holds something right behind the end of a disk of 16 blocks.
fn resize(to: u64) -> impl Fn(&Arc<SimStorage>) -> Result<(), String> {
    let parent_is_zero = |at: ByteSpan| Ok(at.offset + at.len <= 16 * BLOCK || at.offset >= 18 * BLOCK);
    move |sim| vhd::resize_over(&arc(sim), to, true, &parent_is_zero).map_err(|e| e.to_string())
}

fn compact(sim: &Arc<SimStorage>) -> Result<(), String> {
    vhd::compact(&arc(sim), &mut |_, _| ()).map(drop).map_err(|e| e.to_string())
}

fn relink(tag: u8) -> impl Fn(&Arc<SimStorage>) -> Result<(), String> {
    move |sim| vhd::relink(&**sim, &link(tag)).map_err(|e| e.to_string())
}

fn fully() -> CrashExplorer {
    CrashExplorer::default()
}

fn lightly(seed: u64) -> CrashExplorer {
    CrashExplorer { exhaustive_units: 6, pair_units: 6, seeded_subsets: 6, seed, from: 0 }
}

/// A fixed disk of `size` bytes with something in its first and, unless `spare` is taken for it, no further sectors.
fn fixed(size: u64, spare: u64, footer_len: usize) -> SimDisk {
    let mut disk = empty(Fixed, size);
    let footer = bytes(&disk, size, footer_len);
    disk.write(0, &content(1, 1024));
    disk.write(size, &content(0x55, spare));
    disk.write(size + spare, &footer);
    disk
}

#[test]
fn fixed_disks_grow_and_shrink_through_every_crash() {
    let mut total = CrashCount::default();
    for (spare, footer_len) in
        [(0, 512), (0, 511), (512, 512), (2048, 512), (4096, 511), (100, 512), (9000, 512)]
    {
        for to in [4096 + 512, 8192, 65536 + 512, 4096, 2048, 1024] {
            let name = format!("fixed, {spare} spare, {footer_len} to {to}");
            let (after, count) = survives(&name, fixed(4096, spare, footer_len), &fully(), resize(to));
            let seen = vhd_offline::see(&after).unwrap();
            assert_eq!((seen.size, seen.sectors.len()), (to, 2), "{name}: only what was written is there");
            total += count;
        }
    }
    println!("fixed: {total}");
}

fn dynamic(blocks: u64) -> SimDisk {
    let disk = empty(Dynamic, blocks * BLOCK);
    let base = disk.len() / 512 - 1;
    let placed = [(0, 0), (blocks - 1, 9), (blocks / 2, 20)].map(|(block, sector)| Placed {
        block,
        sector: base + sector,
        bitmap: 0xff,
        data: content(block as u8 + 1, 1536),
    });
    with_blocks(disk, &placed, 0, 512)
}

#[test]
fn dynamic_disks_grow_through_every_crash() {
    let mut total = CrashCount::default();
    // Within the table, within its padding, and far beyond it; with blocks behind the table and without.
    for to in [9 * BLOCK, 12 * BLOCK + 512, 128 * BLOCK, 200 * BLOCK, 700 * BLOCK] {
        for disk in
            [dynamic(8), empty(Dynamic, 8 * BLOCK), with_blocks(empty(Dynamic, 8 * BLOCK), &[], 30, 511)]
        {
            total += survives(&format!("dynamic to {to}"), disk, &fully(), resize(to)).1;
        }
    }
    println!("growing: {total}");
}

/// Bytes behind the end of the disk in its last block, and entries behind its last one, must not come up.
#[test]
fn what_lay_behind_the_end_does_not_come_up_by_growing() {
    let mut total = CrashCount::default();
    for to in [4 * BLOCK, 6 * BLOCK, 200 * BLOCK] {
        let mut disk = empty(Dynamic, 8 * BLOCK);
        let size = 3 * BLOCK + 1024;
        for at in [0, disk.len() - 512] {
            disk.write(at + 48, &size.to_be_bytes());
            vhd_offline::seal(&mut disk, at, 512, 64);
        }
        let base = disk.len() / 512;
        let placed = [(3, 0), (5, 9), (7, 18)].map(|(block, sector)| Placed {
            block,
            sector: base + sector,
            bitmap: 0xff,
            data: content(block as u8, BLOCK),
        });
        let disk = with_blocks(disk, &placed, 3, 512);
        let (after, count) = survives(&format!("surplus to {to}"), disk, &fully(), resize(to));
        assert_eq!(
            vhd_offline::see(&after).unwrap().sectors.len(),
            2,
            "the two sectors that were on the disk"
        );
        total += count;
    }
    println!("surplus: {total}");
}

#[test]
fn dynamic_disks_shrink_through_every_crash() {
    let mut total = CrashCount::default();
    for to in [7 * BLOCK, 5 * BLOCK, 5 * BLOCK - 1024, 4 * BLOCK + 2048] {
        let disk = dynamic(8);
        let base = disk.len() / 512 - 1;
        let zero =
            [6, 5].map(|block| Placed { block, sector: base + block * 10, bitmap: 0xff, data: vec![] });
        let mut disk = with_blocks(disk, &zero, 0, 512);
        let entry = bytes(&disk, 1536 + 7 * 4, 4);
        disk.write(1536 + 7 * 4, &[0xff; 4]); // the last block's data would be in the way
        assert_ne!(entry, [0xff; 4]);
        total += survives(&format!("shrinking to {to}"), disk, &fully(), resize(to)).1;
    }
    println!("shrinking: {total}");
}

fn differencing(blocks: &[(u64, u64, u8)]) -> SimDisk {
    let disk = empty(Differencing, 16 * BLOCK);
    let base = disk.len() / 512 - 1;
    let placed: Vec<_> = blocks
        .iter()
        .map(|&(block, sector, bitmap)| Placed {
            block,
            sector: base + sector,
            bitmap,
            data: content(block as u8 + 1, BLOCK),
        })
        .collect();
    with_blocks(disk, &placed, 0, 512)
}

#[test]
fn differencing_disks_change_size_through_every_crash() {
    let mut total = CrashCount::default();
    for to in [20 * BLOCK, 2000 * BLOCK, 9 * BLOCK + 512, 6 * BLOCK] {
        let disk = differencing(&[(2, 0, 0xf0), (8, 10, 0), (9, 20, 0), (5, 30, 0x81)]);
        let (after, count) = survives(&format!("differencing to {to}"), disk, &fully(), resize(to));
        let hidden = vhd_offline::see(&after).unwrap().sectors.range(16 * BLOCK / 512..).count() as u64;
        assert_eq!(
            hidden,
            if to > 16 * BLOCK { 2 * BLOCK / 512 } else { 0 },
            "what the parent holds is hidden"
        );
        total += count;
    }
    // The end of the disk in the middle of a block, which has a place or not.
    for placed in [&[(2, 0, 0xf0), (15, 10, 0x80)][..], &[(2, 0, 0xf0)]] {
        let mut disk = differencing(placed);
        for at in [0, disk.len() - 512] {
            disk.write(at + 48, &(15 * BLOCK + 1024).to_be_bytes());
            vhd_offline::seal(&mut disk, at, 512, 64);
        }
        let parent_is_zero = |at: ByteSpan| Ok(at.offset >= 17 * BLOCK);
        let grow = |sim: &Arc<SimStorage>| {
            vhd::resize_over(&arc(sim), 19 * BLOCK, false, &parent_is_zero).map_err(|e| e.to_string())
        };
        let (after, count) = survives("a differencing disk from the middle of a block", disk, &fully(), grow);
        let hidden = vhd_offline::see(&after).unwrap().sectors.range(15 * BLOCK / 512 + 2..).count() as u64;
        assert_eq!(hidden, 2 * BLOCK / 512 - 2);
        total += count;
    }
    println!("differencing: {total}");
}

#[test]
fn compacting_survives_every_crash() {
    let mut total = CrashCount::default();
    let zero = |block, sector| Placed { block, sector, bitmap: 0xff, data: vec![] };
    let full = |block, sector| Placed { block, sector, bitmap: 0xff, data: content(block as u8 + 1, BLOCK) };
    for (n, gap) in [9, 16, 10, 30].into_iter().enumerate() {
        let disk = empty(Dynamic, 16 * BLOCK);
        let base = disk.len() / 512 + [6, 0, 1, 3][n]; // on pages, and off them
        let at = |k: u64| base + k * gap;
        let blocks = [
            zero(0, at(0)),
            full(3, at(1)),
            zero(4, at(2)),
            full(9, at(3)),
            full(1, at(5)),
            zero(2, at(6)),
            full(7, at(7)),
        ];
        let disk = with_blocks(disk, &blocks, [0, 7, 100, 0][n], [512, 511, 512, 512][n]);
        let old = disk.len();
        let (after, count) = survives(&format!("compacting, {gap}"), disk, &lightly(1), compact);
        assert!(after.len() <= old - 3 * 4608, "{} of {old}", after.len());
        total += count;
    }
    let disk =
        differencing(&[(2, 0, 0), (8, 10, 0x10), (9, 20, 0), (5, 30, 0x81), (6, 40, 0xff), (1, 50, 0)]);
    let old = disk.len();
    let (after, count) = survives("compacting a differencing disk", disk, &fully(), compact);
    assert!(after.len() <= old - 3 * 4608, "{} of {old}", after.len());
    total += count;
    // A table that growing has put behind the blocks comes back.
    for (from, to) in [(dynamic(8), 700), (differencing(&[(2, 0, 0), (8, 10, 0x10), (9, 20, 0)]), 2000)] {
        let sim = SimStorage::from_disk(from);
        resize(to * BLOCK)(&sim).unwrap();
        resize(16 * BLOCK)(&sim).unwrap();
        let table = |disk: &SimDisk| vhd_offline::u64_at(&bytes(disk, 512, 1024), 16);
        let (before, count) = (table(&sim.contents()), total);
        let (after, more) = survives("compacting what was large", sim.contents(), &fully(), compact);
        assert!(table(&after) < before && after.len() < sim.contents().len(), "{before}, {}", table(&after));
        total = count;
        total += more;
    }
    println!("compacting: {total}");
}

#[test]
fn giving_another_parent_survives_every_crash() {
    let mut total = CrashCount::default();
    for (n, disk) in [
        differencing(&[]),
        differencing(&[(2, 0, 0xf0), (8, 10, 0)]),
        with_blocks(differencing(&[(2, 6, 0xf0)]), &[], 11, 511),
    ]
    .into_iter()
    .enumerate()
    {
        for tag in [2, 100] {
            let name = format!("parent {tag} of disk {n}");
            let (after, count) = survives(&name, disk.clone(), &fully(), relink(tag));
            assert_eq!(vhd_offline::u64_at(&bytes(&after, 0, 512), 16), 512, "{name}: the header is at home");
            total += count;
        }
    }
    println!("other parents: {total}");
}

/// A crash in the second attempt after one in the first.
#[test]
fn crashes_after_crashes_are_survived() {
    let mut total = CrashCount::default();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    type Change = Box<dyn Fn(&Arc<SimStorage>) -> Result<(), String>>;
    let cases: [(&str, SimDisk, Change); 4] = [
        ("growing", dynamic(8), Box::new(resize(300 * BLOCK))),
        ("fixed", fixed(4096, 0, 512), Box::new(resize(16384))),
        (
            "compacting",
            differencing(&[(2, 0, 0), (8, 10, 1), (9, 20, 0x3c), (5, 30, 0x81)]),
            Box::new(compact),
        ),
        ("relinking", differencing(&[(2, 0, 0xf0)]), Box::new(relink(100))),
    ];
    for (name, disk, change) in cases {
        let sim = SimStorage::from_disk(disk);
        change(&sim).unwrap();
        let mut states = Vec::new();
        lightly(1).explore(&sim, |state| states.push(state.storage.contents()));
        for _ in 0..12 {
            let state = states[rng.random_range(0..states.len())].clone();
            total += survives(&format!("{name}, again"), state, &lightly(2), &change).1;
        }
    }
    println!("second crashes: {total}");
}

/// A file that fails once, or from some operation on, leaves what a crash leaves, and a second attempt completes it.
#[test]
fn failing_files_leave_the_old_disk_or_the_new_one() {
    type Change = Box<dyn Fn(&Arc<SimStorage>) -> Result<(), String>>;
    let holes = [(2, 0, 0), (8, 10, 1), (9, 20, 0x3c), (5, 30, 0x81)];
    let cases: [(&str, SimDisk, Change); 6] = [
        ("growing", dynamic(8), Box::new(resize(900 * BLOCK))),
        ("growing over a parent", differencing(&[(2, 0, 0xf0)]), Box::new(resize(40 * BLOCK))),
        ("fixed", fixed(4096, 0, 512), Box::new(resize(16384))),
        ("fixed, shrinking", fixed(4096, 100, 512), Box::new(resize(2048))),
        ("compacting", differencing(&holes), Box::new(compact)),
        ("relinking", differencing(&[(2, 0, 0xf0)]), Box::new(relink(100))),
    ];
    let mut faults = 0;
    for (name, disk, change) in cases {
        let sim = SimStorage::from_disk(disk.clone());
        let before = vhd_offline::see(&disk).unwrap();
        change(&sim).unwrap();
        let wanted = vhd_offline::see(&sim.contents()).unwrap();
        for (after, lasting) in (0..).flat_map(|n| [(n, false), (n, true)]) {
            let sim = SimStorage::from_disk(disk.clone());
            let error = std::io::ErrorKind::StorageFull;
            sim.inject(formats_tests::Fault { after, lasting, error, partial: true });
            if change(&sim).is_ok() {
                break;
            }
            faults += 1;
            sim.clear_fault();
            let now = vhd_offline::see(&sim.contents());
            let now = now.unwrap_or_else(|e| panic!("{name}, fault {after}, {lasting}: {e}"));
            assert!(now == before || now == wanted, "{name}, fault {after}, {lasting}");
            vhd_offline::sound(name, &sim, false);
            change(&sim).unwrap();
            assert!(
                vhd_offline::see(&sim.contents()).unwrap() == wanted,
                "{name}, fault {after}, {lasting}: again"
            );
        }
    }
    println!("{faults} faults");
    assert!(faults > 100);
}
