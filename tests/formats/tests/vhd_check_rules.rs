//! Each rule of a VHD that is broken has its code, and what stops first does not hide what follows.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod vhd_offline;

use formats::ImageType::{Differencing, Dynamic, Fixed};
use formats::{Severity, vhd};
use formats_tests::{SimDisk, SimStorage};
use vhd_offline::{BLOCK, Placed, content, empty, seal, u32_at, with_blocks};

const HEADER: u64 = 512;

fn in_footers(disk: &mut SimDisk, field: u64, value: &[u8]) {
    let end = disk.len() - 512;
    for at in if disk.len() > 66048 || &vhd_offline::bytes(disk, 0, 8) == b"conectix" {
        vec![0, end]
    } else {
        vec![end]
    } {
        disk.write(at + field, value);
        seal(disk, at, 512, 64);
    }
}

fn in_header(disk: &mut SimDisk, field: u64, value: &[u8]) {
    disk.write(HEADER + field, value);
    seal(disk, HEADER, 1024, 36);
}

fn codes(disk: SimDisk) -> Vec<(String, Severity)> {
    let report = vhd::check(&*SimStorage::from_disk(disk), false).unwrap();
    assert!(report.findings.iter().all(|f| f.repairable == f.repair.is_some() && !f.repaired), "{report:?}");
    assert!(report.findings.is_sorted_by_key(|f| std::cmp::Reverse(f.severity)));
    report.findings.into_iter().map(|f| (f.code, f.severity)).collect()
}

fn differencing() -> SimDisk {
    placed(empty(Differencing, 6 * BLOCK + 1024), &[(1, 0xf0), (6, 0xc0)])
}

fn dynamic() -> SimDisk {
    placed(empty(Dynamic, 6 * BLOCK + 1024), &[(1, 0xff), (6, 0xc0)])
}

fn placed(disk: SimDisk, blocks: &[(u64, u8)]) -> SimDisk {
    let base = disk.len() / 512;
    let blocks: Vec<_> = (0..)
        .zip(blocks)
        .map(|(n, &(block, bitmap))| Placed { block, sector: base + n * 9, bitmap, data: content(1, 1024) })
        .collect();
    with_blocks(disk, &blocks, 0, 512)
}

#[test]
fn sound_disks_have_no_findings() {
    for disk in
        [dynamic(), differencing(), empty(Fixed, 8192), empty(Dynamic, 1 << 30), empty(Differencing, 1 << 30)]
    {
        assert_eq!(codes(disk), []);
    }
}

#[test]
fn oddities_are_notes_and_warnings_with_their_codes() {
    use Severity::{Note, Warning};
    type Change = fn(&mut SimDisk);
    let id = |disk: &SimDisk| vhd_offline::bytes(disk, disk.len() - 444, 16);
    let own = id(&differencing());
    assert_eq!(own.len(), 16);
    let cases: [(&str, Severity, Change); 18] = [
        ("vhd-saved-state", Note, |d| in_footers(d, 84, &[1])),
        ("vhd-features", Note, |d| in_footers(d, 8, &[0, 0, 0, 0])),
        ("vhd-features", Note, |d| in_footers(d, 8, &[0, 0, 1, 2])),
        ("vhd-geometry", Note, |d| in_footers(d, 56, &[0xff; 4])),
        ("vhd-reserved", Note, |d| in_footers(d, 300, &[1])),
        ("vhd-reserved", Note, |d| in_header(d, 900, &[1])),
        ("vhd-reserved", Note, |d| in_header(d, 60, &[1])),
        ("vhd-data-offset", Note, |d| in_header(d, 8, &[0; 8])),
        ("vhd-locator-unknown", Note, |d| in_header(d, 576 + 24, b"Wi2r")),
        ("vhd-locator-fields", Note, |d| in_header(d, 576 + 4, &[0; 4])),
        ("vhd-locator-fields", Note, |d| in_header(d, 576 + 12, &[1])),
        ("vhd-locator-fields", Note, |d| in_header(d, 576 + 48 + 8, &[1])),
        ("vhd-parent-unknown", Warning, |d| in_header(d, 40, &[0; 16])),
        ("vhd-parent-unknown", Warning, |d| {
            in_header(d, 64, &[0; 512]);
            in_header(d, 576, &[0; 192]);
        }),
        ("vhd-bitmap-beyond", Note, |d| {
            let entry = u32_at(&vhd_offline::bytes(d, 0x2000 + 24, 4), 0);
            d.write(entry * 512, &[0xff]);
        }),
        ("vhd-block-empty", Note, |d| {
            let entry = u32_at(&vhd_offline::bytes(d, 0x2000 + 4, 4), 0);
            d.write(entry * 512, &[0]);
        }),
        ("vhd-table-padding", Note, |d| d.write(0x2000 + 100, &[0; 4])),
        ("vhd-table-entries", Note, |d| in_header(d, 28, &8u32.to_be_bytes())),
    ];
    for (code, severity, change) in cases {
        let mut disk = differencing();
        change(&mut disk);
        assert_eq!(codes(disk), [(code.to_owned(), severity)], "{code}");
    }
    let mut disk = differencing();
    in_header(&mut disk, 40, &own);
    let at = disk.len() - 444;
    disk.write(at, &own);
    disk.write(68, &own);
    in_footers(&mut disk, 68, &own);
    assert_eq!(codes(disk), [("vhd-parent-self".to_owned(), Warning)]);
}

#[test]
fn oddities_of_disks_without_a_parent_are_found() {
    use Severity::{Note, Warning};
    let mut disk = dynamic();
    in_header(&mut disk, 576, b"W2ru");
    assert_eq!(codes(disk), [("vhd-parent-unused".to_owned(), Note)]);
    let mut disk = dynamic();
    let entry = u32_at(&vhd_offline::bytes(&disk, 1536 + 24, 4), 0);
    disk.write(entry * 512, &[0x80]);
    assert_eq!(codes(disk), [("vhd-bitmap-partial".to_owned(), Note)]);
    let mut disk = empty(Fixed, 8192);
    disk.write(8192 + 16, &[0; 8]);
    seal(&mut disk, 8192, 512, 64);
    assert_eq!(codes(disk), [("vhd-data-offset".to_owned(), Note)]);
    let mut disk = empty(Fixed, 8192);
    let footer = vhd_offline::bytes(&disk, 8192, 512);
    disk.write(8192 + 100, &footer);
    assert_eq!(
        codes(disk),
        [("vhd-unused-space".to_owned(), Warning), ("vhd-footer-unaligned".to_owned(), Note)]
    );
    let mut disk = dynamic();
    disk.write(0, &[0]);
    assert_eq!(codes(disk), [("vhd-copy-bad".to_owned(), Warning)]);
    let mut disk = dynamic();
    disk.write(24, &[9]);
    seal(&mut disk, 0, 512, 64);
    assert_eq!(codes(disk), [("vhd-copy-differs".to_owned(), Warning)]);
}

#[test]
fn one_broken_rule_does_not_hide_another() {
    let mut disk = differencing();
    in_footers(&mut disk, 48, &513u64.to_be_bytes());
    in_header(&mut disk, 28, &u32::MAX.to_be_bytes());
    in_header(&mut disk, 32, &513u32.to_be_bytes());
    in_header(&mut disk, 16, &513u64.to_be_bytes());
    in_header(&mut disk, 24, &[0, 9]);
    in_header(&mut disk, 576 + 8, &33u32.to_be_bytes());
    in_header(&mut disk, 600 + 16, &u64::MAX.to_be_bytes());
    disk.write(HEADER + 900, &[7]);
    disk.write(3, &[0]);
    let found = codes(disk);
    for code in [
        "vhd-size-unaligned",
        "vhd-table-too-large",
        "vhd-block-size",
        "vhd-table-unaligned",
        "vhd-header-version",
        "vhd-header-checksum",
        "vhd-locator-odd",
        "vhd-locator-outside",
        "vhd-reserved",
        "vhd-copy-bad",
    ] {
        assert!(found.iter().any(|(c, _)| c == code), "{code} is not in {found:?}");
    }

    // A wrong checksum and version do not keep the blocks from being looked at, nor does one broken locator.
    let mut disk = differencing();
    disk.write(HEADER + 600, &[9]);
    disk.write(HEADER + 25, &[0xee; 1]);
    disk.write(HEADER + 24, &[0xee; 1]);
    disk.write(HEADER + 576 + 8, &u32::MAX.to_be_bytes());
    disk.write(0x2000 + 4 * 4, &2u32.to_be_bytes());
    let found = codes(disk);
    for code in
        ["vhd-header-checksum", "vhd-header-version", "vhd-locator-too-long", "vhd-block-over-structure"]
    {
        assert!(found.iter().any(|(c, _)| c == code), "{code} is not in {found:?}");
    }
}

#[test]
fn a_damaged_disk_is_not_promised_a_repair() {
    let mut disk = dynamic();
    disk.write(0, &[0]);
    disk.write(1536 + 4, &1u32.to_be_bytes());
    let sim = SimStorage::from_disk(disk);
    let before = sim.contents().fingerprint();
    let report = vhd::check(&*sim, true).unwrap();
    assert!(!report.is_sound() && report.findings.iter().all(|f| !f.repairable && !f.repaired), "{report:?}");
    assert!(report.findings.iter().any(|f| f.code == "vhd-copy-bad"));
    assert_eq!(sim.contents().fingerprint(), before);
}

/// A file may be cut anywhere, within the padding of its block table too.
#[test]
fn a_file_that_ends_within_the_padding_of_its_table_is_reported_on() {
    let whole = empty(Dynamic, 5 * BLOCK);
    for len in (1536 + 5 * 4..2048).step_by(17) {
        let mut disk = whole.clone();
        disk.set_len(len);
        let found = codes(disk);
        assert!(found.iter().any(|(code, _)| code == "vhd-footer-missing"), "{len}: {found:?}");
    }
}
