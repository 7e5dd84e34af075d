//! Every rule that an image can break has its code, and one that is broken does not hide the next.

use std::collections::BTreeSet;
use std::sync::Arc;

use formats::vhdx::{self, Vhdx};
use formats::{Finding, Image, ImageType, Severity, Storage};
use formats_tests::{SimStorage, write_payload};

use crate::image::{
    FULL, MIB, NOT_PRESENT, PARTIAL, Taken, UNDEFINED, UNMAPPED, ZERO, bytes, copy_of, create, own,
    place_block, set_entry, shared,
};
use crate::patching::{Item, patch, patch_headers, patch_item, patch_tables, read_u32, seal};

pub fn findings(sim: &Arc<SimStorage>) -> Vec<Finding> {
    vhdx::check(shared(sim), false).unwrap().findings
}

fn codes(sim: &Arc<SimStorage>) -> BTreeSet<String> {
    findings(sim).into_iter().map(|f| f.code).collect()
}

/// An image with some blocks written, closed.
fn written() -> Arc<SimStorage> {
    let sim = create(ImageType::Dynamic, 8 * MIB + 4096, 512);
    let image = Vhdx::open(shared(&sim), false).unwrap();
    for block in [0, 2, 5] {
        write_payload(&image, block * MIB, &bytes(block as u8, 4096)).unwrap();
    }
    image.close().unwrap();
    sim
}

/// One that was not closed: its log has to be replayed.
fn dirty() -> Arc<SimStorage> {
    let sim = create(ImageType::Dynamic, 8 * MIB, 512);
    let image = Vhdx::open(shared(&sim), false).unwrap();
    write_payload(&image, 0, &bytes(1, 4096)).unwrap();
    image.commit().unwrap();
    drop(image);
    copy_of(&sim)
}

fn child() -> Arc<SimStorage> {
    let sim = create(ImageType::Differencing, 8 * MIB + 4096, 512);
    place_block(&sim, 1, PARTIAL, &bytes(1, MIB));
    own(&sim, 2048..2050);
    place_block(&sim, 2, FULL, &bytes(2, MIB));
    sim
}

/// The current header.
fn header(sim: &SimStorage) -> u64 {
    let number = |at: u64| u64::from(read_u32(sim, at + 8)) | u64::from(read_u32(sim, at + 12)) << 32;
    if number(0x20000) > number(0x10000) { 0x20000 } else { 0x10000 }
}

type Case = (&'static str, Severity, fn() -> Arc<SimStorage>, fn(&SimStorage));

/// What is done to an image, the code that this has to give, and how bad it is.
fn cases() -> Vec<Case> {
    use Severity::{Damage, Note, Warning};
    vec![
        ("vhdx-file-too-short", Damage, written, |s| s.set_len(300_000).unwrap()),
        ("vhdx-no-valid-header", Damage, written, |s| {
            [0x10000, 0x20000].iter().for_each(|at| patch(s, at + 100, &[1]));
        }),
        ("vhdx-headers-ambiguous", Damage, written, |s| {
            for (number, at) in [(7, 0x10000), (8, 0x20000)] {
                patch(s, at + 8, &1000_u64.to_le_bytes());
                patch(s, at + 16, &[number]);
                seal(s, at, 4096);
            }
        }),
        ("vhdx-header", Warning, written, |s| patch(s, 0x30000 - header(s) + 7, &[1])),
        ("vhdx-header-stale", Note, written, |s| {
            let spare = 0x30000 - header(s);
            patch(s, spare + 8, &1_u64.to_le_bytes());
            patch(s, spare + 16, &[0xaa; 16]);
            seal(s, spare, 4096);
        }),
        ("vhdx-header-reserved", Note, written, |s| patch_headers(s, 2000, &[1])),
        ("vhdx-header-sequence-exhausted", Warning, written, |s| {
            let at = header(s);
            patch(s, at + 8, &u64::MAX.to_le_bytes());
            seal(s, at, 4096);
        }),
        ("vhdx-version", Damage, written, |s| patch_headers(s, 66, &[2])),
        ("vhdx-log-version", Note, written, |s| patch_headers(s, 64, &[1])),
        ("vhdx-log-version", Damage, dirty, |s| patch_headers(s, 64, &[1])),
        ("vhdx-log-length", Damage, written, |s| patch_headers(s, 68, &0x10_0001_u32.to_le_bytes())),
        ("vhdx-log-length", Warning, written, |s| patch_headers(s, 68, &0_u32.to_le_bytes())),
        ("vhdx-log-offset", Damage, written, |s| patch_headers(s, 72, &0x10_1000_u64.to_le_bytes())),
        ("vhdx-beyond-end", Damage, written, |s| patch_headers(s, 72, &(1_u64 << 40).to_le_bytes())),
        ("vhdx-overlap", Damage, written, |s| patch_headers(s, 72, &Taken::of(s).bat.0.to_le_bytes())),
        ("vhdx-no-valid-region-table", Damage, written, |s| {
            [0x30000, 0x40000].iter().for_each(|at| patch(s, at + 100, &[1]));
        }),
        ("vhdx-region-table", Warning, written, |s| patch(s, 0x30000 + 100, &[1])),
        ("vhdx-region-table", Warning, written, |s| patch(s, 0x40000, &[0; 4])),
        ("vhdx-region-tables-differ", Warning, written, |s| {
            patch(s, 0x40000 + 12, &[1]);
            seal(s, 0x40000, 65536);
        }),
        ("vhdx-region-place", Damage, written, |s| patch_tables(s, 32, &[1])),
        ("vhdx-region-duplicate", Damage, written, |s| {
            let mut guid = [0; 16];
            s.read_at(&mut guid, 0x30010).unwrap();
            patch_tables(s, 48, &guid);
        }),
        ("vhdx-region-missing", Damage, written, |s| patch_tables(s, 8, &[1])),
        ("vhdx-region-unknown", Damage, written, |s| {
            patch_tables(
                s,
                80,
                &[&[9; 16][..], &[0, 0, 0xf0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 1, 0, 0, 0]].concat(),
            );
            patch_tables(s, 8, &[3]);
            s.set_len(32 * MIB).unwrap();
        }),
        ("vhdx-region-too-large", Damage, written, |s| {
            s.set_len(2 << 30).unwrap();
            patch_tables(s, 40, &(600_u32 << 20).to_le_bytes());
        }),
        ("vhdx-region-reserved", Note, written, |s| patch_tables(s, 12, &[1])),
        ("vhdx-region-not-required", Note, written, |s| patch_tables(s, 44, &[0])),
        ("vhdx-log-empty", Damage, dirty, |s| patch(s, MIB, &[0; 65536])),
        ("vhdx-file-truncated", Damage, dirty, |s| s.set_len(3 * MIB).unwrap()),
        ("vhdx-log-dirty", Note, dirty, |_| ()),
        ("vhdx-metadata-table", Damage, written, |s| patch(s, Taken::of(s).metadata.0, &[0])),
        ("vhdx-metadata-item-place", Damage, written, |s| patch_item(s, Item::Size, 16, &[0xff; 4])),
        ("vhdx-metadata-duplicate", Damage, written, |s| {
            let mut guid = [0; 16];
            s.read_at(&mut guid, Taken::of(s).metadata.0 + 32).unwrap();
            patch(s, Taken::of(s).metadata.0 + 64, &guid);
        }),
        ("vhdx-metadata-unknown", Damage, written, |s| patch_item(s, Item::DiskId, 0, &[9])),
        ("vhdx-metadata-missing", Damage, written, |s| patch_item(s, Item::DiskId, 0, &[9])),
        ("vhdx-metadata-reserved", Note, written, |s| patch_item(s, Item::Size, 28, &[1])),
        ("vhdx-metadata-flags", Note, written, |s| patch_item(s, Item::Size, 24, &[4])),
        ("vhdx-block-size", Damage, written, |s| patch_item(s, Item::Parameters, 32, &[0, 0, 0x30])),
        ("vhdx-virtual-size", Damage, written, |s| patch_item(s, Item::Size, 32, &[1])),
        ("vhdx-virtual-size", Damage, written, |s| {
            patch_item(s, Item::Size, 32, &(65_u64 << 40).to_le_bytes())
        }),
        ("vhdx-sector-size", Damage, written, |s| patch_item(s, Item::Physical, 32, &[1])),
        ("vhdx-parent-locator", Damage, child, |s| patch_item(s, Item::Locator, 32, &[0; 16])),
        ("vhdx-parent-locator-unused", Note, child, |s| {
            set_entry(s, 1, ZERO);
            patch(s, Taken::of(s).bitmap_place(0), &[0; 8]);
            patch_item(s, Item::Parameters, 36, &[0]);
        }),
        ("vhdx-bat-too-small", Damage, written, |s| {
            patch_item(s, Item::Size, 32, &(1_u64 << 40).to_le_bytes())
        }),
        ("vhdx-bat-state", Damage, written, |s| set_entry(s, 1, 5)),
        ("vhdx-bat-state", Damage, written, |s| set_entry(s, 1, 20 << 20 | PARTIAL)),
        ("vhdx-bat-reserved", Damage, written, |s| set_entry(s, 0, Taken::of(s).entry(0) | 8)),
        ("vhdx-bat-place", Damage, written, |s| set_entry(s, 1, 4000 << 20 | FULL)),
        ("vhdx-bat-overlap", Damage, written, |s| set_entry(s, 1, Taken::of(s).entry(0))),
        ("vhdx-sector-bitmap-missing", Damage, child, |s| patch(s, Taken::of(s).bitmap_place(0), &[0; 8])),
        ("vhdx-bat-stale", Warning, written, |s| set_entry(s, 1, 4000 << 20 | ZERO)),
        ("vhdx-bat-stale", Note, written, |s| set_entry(s, 1, 4000 << 20 | NOT_PRESENT)),
        ("vhdx-bat-anchor", Note, written, |s| place_block(s, 1, UNMAPPED, &vec![0; MIB as usize])),
        ("vhdx-bat-anchor-place", Warning, written, |s| set_entry(s, 1, 4000 << 20 | UNMAPPED)),
        ("vhdx-bat-anchor-place", Warning, written, |s| {
            set_entry(s, 1, Taken::of(s).entry(0) & !7 | UNDEFINED)
        }),
        ("vhdx-bat-padding", Note, written, |s| patch(s, Taken::of(s).bat.0 + 9 * 8, &[1])),
        ("vhdx-bat-padding", Note, child, |s| patch(s, Taken::of(s).bat.0 + 9 * 8, &[1])),
        (
            "vhdx-fixed-unallocated",
            Note,
            || create(ImageType::Fixed, 4 * MIB, 512),
            |s| set_entry(s, 1, ZERO),
        ),
        ("vhdx-partial-empty", Note, child, |s| place_block(s, 3, PARTIAL, &bytes(3, MIB))),
        ("vhdx-partial-full", Note, child, |s| own(s, 2048..4096)),
        ("vhdx-bitmap-stray", Note, child, |s| own(s, 5 * 2048..5 * 2048 + 1)),
        ("vhdx-bitmap-stray", Note, child, |s| own(s, 8 * 2048 + 8..8 * 2048 + 9)),
        ("vhdx-bitmap-stray", Note, child, |s| own(s, 9 * 2048..9 * 2048 + 1)),
        ("vhdx-bitmap-unused", Note, child, |s| set_entry(s, 1, Taken::of(s).entry(1) & !7 | FULL)),
        ("vhdx-space-leaked", Warning, written, |s| set_entry(s, 0, NOT_PRESENT)),
        ("vhdx-space-slack", Warning, written, |s| s.write_at(&[1], s.len().unwrap() + MIB).unwrap()),
        ("vhdx-space-slack", Note, written, |s| s.set_len(s.len().unwrap() + MIB).unwrap()),
        ("vhdx-space-unused", Note, written, |s| {
            let at = Taken::of(s).entry(0) >> 20;
            set_entry(s, 0, NOT_PRESENT);
            s.punch(at * MIB, MIB).unwrap();
        }),
    ]
}

#[test]
fn every_rule_has_its_code_and_a_repair_does_what_it_says() {
    let (mut told, mut mended) = (BTreeSet::new(), 0);
    for (code, severity, make, spoil) in cases() {
        let sim = make();
        let parent = bytes(0x50, 9 * MIB);
        spoil(&sim);
        let before = sim.contents().fingerprint();
        let found = findings(&sim);
        assert_eq!(sim.contents().fingerprint(), before, "{code}: checking wrote");
        let this = found.iter().find(|f| f.code == code && f.severity == severity);
        let this = this.unwrap_or_else(|| panic!("no {code} ({severity:?}) in {found:#?}"));
        assert!(
            this.offset.is_some()
                || ["vhdx-file-too-short", "vhdx-space-unused"].contains(&code)
                || this.structure == "header"
                || this.structure == "layout",
            "{this:?}"
        );
        assert_eq!(this.repairable, this.repair.is_some(), "{this:?}");
        told.insert(code);
        let report = vhdx::check(shared(&sim), true).unwrap();
        let damaged = found.iter().any(|f| f.severity == Severity::Damage);
        if !found.iter().any(|f| f.repairable) {
            assert_eq!(sim.contents().fingerprint(), before, "{code}: nothing was to be mended");
        }
        assert!(
            !damaged || found.iter().all(|f| !f.repairable),
            "{code}: in a damaged image nothing is mended"
        );
        assert_eq!(report.is_sound(), !damaged, "{code}: {report:#?}");
        if !damaged && found.iter().any(|f| f.repairable) {
            let left = findings(&sim);
            assert!(left.iter().all(|f| !f.repairable), "{code}: {left:#?}");
            assert!(report.findings.iter().all(|f| f.repairable == f.repaired), "{code}: {report:#?}");
            let _ = Taken::of(&sim).content(&parent);
            mended += 1;
        }
    }
    println!("{} codes, {mended} repairs", told.len());
    assert!(told.len() >= 48 && mended >= 12, "{} codes, {mended} repairs", told.len());
}

#[test]
fn one_broken_rule_does_not_hide_the_others() {
    let sim = written();
    let taken = Taken::of(&sim);
    set_entry(&sim, 1, 5);
    set_entry(&sim, 3, 4000 << 20 | FULL);
    set_entry(&sim, 4, taken.entry(0));
    patch_item(&sim, Item::Size, 24, &[4]);
    patch(&sim, 0x40000 + 100, &[1]);
    patch_headers(&sim, 72, &taken.bat.0.to_le_bytes());
    let found = codes(&sim);
    for code in [
        "vhdx-bat-state",
        "vhdx-bat-place",
        "vhdx-bat-overlap",
        "vhdx-metadata-flags",
        "vhdx-region-table",
        "vhdx-overlap",
    ] {
        assert!(found.contains(code), "{code} is not in {found:?}");
    }
    // Two sizes, and a header that names no possible log.
    patch_item(&sim, Item::Physical, 32, &[1]);
    patch_item(&sim, Item::Parameters, 32, &[0, 0, 0x30]);
    patch_headers(&sim, 68, &7_u32.to_le_bytes());
    let found = codes(&sim);
    for code in ["vhdx-sector-size", "vhdx-block-size", "vhdx-log-length", "vhdx-region-table"] {
        assert!(found.contains(code), "{code} is not in {found:?}");
    }
}

#[test]
fn a_sound_image_of_every_kind_has_nothing_to_tell() {
    for kind in [ImageType::Dynamic, ImageType::Fixed, ImageType::Differencing] {
        for sector in [512, 4096] {
            assert_eq!(findings(&create(kind, 8 * MIB, sector)), [], "{kind}");
        }
    }
    assert_eq!(findings(&written()), []);
    assert_eq!(findings(&child()), []);
}

#[test]
fn a_table_full_of_damage_gives_a_list_that_ends() {
    let sim = create(ImageType::Dynamic, 60_000 * MIB, 512);
    let taken = Taken::of(&sim);
    sim.write_at(&[0xff; 400_000], taken.bat.0).unwrap();
    let found = findings(&sim);
    assert!(found.len() > 900 && found.len() < 1100, "{} findings", found.len());
    let sim = create(ImageType::Dynamic, 60_000 * MIB, 512);
    let stale: Vec<u8> = (0..4096).flat_map(|_| (77_u64 << 20 | ZERO).to_le_bytes()).collect();
    sim.write_at(&stale, taken.bat.0).unwrap();
    sim.write_at(&stale, taken.entry_place(4096)).unwrap();
    assert!(findings(&sim).len() < 200);
    assert!(vhdx::check(shared(&sim), true).unwrap().findings.iter().all(|f| f.repaired));
    assert!((0..8192).all(|block| Taken::of(&sim).entry(block) == ZERO));
}
