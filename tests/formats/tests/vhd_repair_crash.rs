//! A repair does what a dry run says, mends without touching the content, and may be interrupted anywhere.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod vhd_offline;

use std::sync::Arc;

use formats::ImageType::{Differencing, Dynamic, Fixed};
use formats::{Severity, vhd};
use formats_tests::{CrashExplorer, SimDisk, SimStorage};
use vhd_offline::{BLOCK, Placed, content, empty, seal, see, survives, with_blocks};

fn blocks(disk: SimDisk, numbers: &[u64]) -> SimDisk {
    let base = disk.len() / 512;
    let placed: Vec<_> = (0..)
        .zip(numbers)
        .map(|(n, &block)| Placed {
            block,
            sector: base + n * 9,
            bitmap: 0xf0,
            data: content(block as u8 + 1, 2048),
        })
        .collect();
    with_blocks(disk, &placed, 0, 512)
}

fn smaller(mut disk: SimDisk, size: u64) -> SimDisk {
    for at in [0, disk.len() - 512] {
        disk.write(at + 48, &size.to_be_bytes());
        seal(&mut disk, at, 512, 64);
    }
    disk
}

/// Disks that can be mended, and the codes of what is wrong with them.
fn mendable() -> Vec<(SimDisk, Vec<&'static str>)> {
    let dynamic = blocks(empty(Dynamic, 16 * BLOCK), &[1, 9, 14]);
    let child = blocks(empty(Differencing, 16 * BLOCK), &[1, 9, 14]);
    let mut list = Vec::new();
    for sound in [dynamic, child] {
        let end = sound.len() - 512;
        let mut copy_bad = sound.clone();
        copy_bad.write(100, &[1]);
        list.push((copy_bad, vec!["vhd-copy-bad"]));
        let mut copy_differs = sound.clone();
        copy_differs.write(48, &[0, 0, 0, 9]);
        seal(&mut copy_differs, 0, 512, 64);
        list.push((copy_differs.clone(), vec!["vhd-copy-differs"]));
        list.push((smaller(sound.clone(), 9 * BLOCK + 512), vec!["vhd-surplus-blocks"]));
        let footer = vhd_offline::bytes(&sound, end, 512);
        let mut long = sound.clone();
        long.write(end, &content(0x99, 20000));
        long.write(end + 20480, &footer);
        list.push((long.clone(), vec!["vhd-unused-end"]));
        let mut all = smaller(long, 9 * BLOCK + 512);
        all.write(0, &[0; 8]);
        list.push((all, vec!["vhd-copy-bad", "vhd-surplus-blocks", "vhd-unused-end"]));
    }
    let mut fixed = empty(Fixed, 8192);
    fixed.write(0, &content(3, 1024));
    let footer = vhd_offline::bytes(&fixed, 8192, 512);
    fixed.write(8192, &content(4, 3000));
    fixed.write(8192 + 3000, &footer);
    list.push((fixed, vec!["vhd-unused-space"]));
    list
}

#[test]
fn a_repair_does_what_a_dry_run_says_and_nothing_else() {
    for (disk, codes) in mendable() {
        let sim = SimStorage::from_disk(disk);
        let (before, seen) = (sim.contents().fingerprint(), see(&sim.contents()).unwrap());
        let dry = vhd::check(&*sim, false).unwrap();
        assert_eq!(sim.contents().fingerprint(), before);
        let of = |report: &formats::CheckReport, repaired| {
            let all = report.findings.iter().filter(|f| f.repairable && f.repaired == repaired);
            let mut codes: Vec<_> = all.map(|f| f.code.clone()).collect();
            codes.sort();
            codes
        };
        assert_eq!(of(&dry, false), codes, "{dry:?}");
        let done = vhd::check(&*sim, true).unwrap();
        assert_eq!(of(&done, true), codes, "{done:?}");
        assert_eq!(see(&sim.contents()).unwrap(), seen);
        let left = vhd::check(&*sim, false).unwrap();
        assert!(left.findings.iter().all(|f| f.severity == Severity::Note), "{codes:?}: {left:?}");
    }
}

#[test]
fn repairs_survive_every_crash() {
    let repair = |sim: &Arc<SimStorage>| vhd::check(&**sim, true).map(drop).map_err(|e| e.to_string());
    let mut total = formats_tests::CrashCount::default();
    for (disk, codes) in mendable() {
        total += survives(&format!("{codes:?}"), disk, &CrashExplorer::default(), repair).1;
    }
    println!("repairs: {total}");
}

#[test]
fn a_lost_footer_is_put_back_through_every_crash() {
    let mut disk = blocks(empty(Differencing, 16 * BLOCK), &[1, 9]);
    let whole = see(&disk).unwrap();
    let end = disk.len() - 512;
    for len in [end, end + 100, end + 512, end + 9000] {
        disk.set_len(end);
        disk.set_len(len);
        let sim = SimStorage::from_disk(disk.clone());
        let dry = vhd::check(&*sim, false).unwrap();
        assert!(!dry.is_sound() && dry.findings[0].repair.is_some(), "{dry:?}");
        assert!(vhd::check(&*sim, true).unwrap().is_sound());
        assert_eq!(see(&sim.contents()).unwrap(), whole);
        CrashExplorer::default().explore(&sim, |state| {
            vhd::check(&*state.storage, true).unwrap();
            assert_eq!(see(&state.storage.contents()).unwrap(), whole, "{len}: after {}", state.after);
        });
    }
}

/// What belongs to a suspended virtual machine is left as it is, but for the spare copy of the footer.
#[test]
fn a_suspended_disk_is_only_given_its_spare_footer_back() {
    let mut disk = smaller(blocks(empty(Dynamic, 16 * BLOCK), &[1, 14]), 9 * BLOCK);
    for at in [0, disk.len() - 512] {
        disk.write(at + 84, &[1]);
        seal(&mut disk, at, 512, 64);
    }
    disk.write(0, &[0]);
    let sim = SimStorage::from_disk(disk);
    let report = vhd::check(&*sim, true).unwrap();
    let mended: Vec<_> = report.findings.iter().filter(|f| f.repaired).map(|f| f.code.as_str()).collect();
    assert_eq!(mended, ["vhd-copy-bad"], "{report:?}");
}
