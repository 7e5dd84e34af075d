//! Malformed VHDs, field by field: each is refused with the rule that it breaks, and none costs time or memory.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use std::sync::Arc;

use formats::vhd::{self, CreateParams, Vhd, VhdState};
use formats::{ErrorKind, Image, ImageType, Storage};
use formats_tests::{SimDisk, SimStorage, read_payload, write_payload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 4;
const HEADER: u64 = 512;
const TABLE: u64 = 1536;

/// A dynamic disk of four blocks of which two hold something.
fn dynamic() -> SimDisk {
    let sim = SimStorage::new();
    let params = CreateParams {
        image_type: ImageType::Dynamic,
        virtual_size: BLOCKS * BLOCK,
        block_size: Some(BLOCK as u32),
        parent: None,
    };
    vhd::create(&*sim, &params).unwrap();
    let image = open(&sim, false).unwrap();
    write_payload(&image, 0, &[1; 512]).unwrap();
    write_payload(&image, 2 * BLOCK + 512, &[2; 512]).unwrap();
    image.close().unwrap();
    sim.contents()
}

fn fixed(size: u64) -> SimDisk {
    let sim = SimStorage::new();
    let params =
        CreateParams { image_type: ImageType::Fixed, virtual_size: size, block_size: None, parent: None };
    vhd::create(&*sim, &params).unwrap();
    sim.contents()
}

fn open(sim: &Arc<SimStorage>, read_only: bool) -> Result<Vhd, formats::ImageError> {
    let storage: Arc<dyn Storage> = sim.clone();
    Vhd::open(storage, read_only, false)
}

fn bytes(disk: &SimDisk, at: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0; len];
    disk.read(at, &mut buf);
    buf
}

/// Renews the checksum of the structure of `len` bytes at `at`, whose field is `field` bytes in.
fn seal(disk: &mut SimDisk, at: u64, len: usize, field: usize) {
    let mut raw = bytes(disk, at, len);
    raw[field..field + 4].fill(0);
    let sum: u32 = raw.iter().map(|&b| u32::from(b)).sum();
    disk.write(at + field as u64, &(!sum).to_be_bytes());
}

/// Changes a field of both footers.
fn in_footers(disk: &mut SimDisk, field: u64, value: &[u8]) {
    for at in [0, disk.len() - 512] {
        disk.write(at + field, value);
        seal(disk, at, 512, 64);
    }
}

fn in_header(disk: &mut SimDisk, field: u64, value: &[u8]) {
    disk.write(HEADER + field, value);
    seal(disk, HEADER, 1024, 36);
}

/// The rule's code in the refusal, which has to be the same for reading, for writing, and in a check.
fn refusal(disk: SimDisk) -> String {
    let sim = SimStorage::from_disk(disk);
    let before = sim.contents().fingerprint();
    let e = open(&sim, true).expect_err("must not open for reading");
    assert_eq!(e.kind, ErrorKind::Corrupt, "{e}");
    assert_eq!(open(&sim, false).expect_err("must not open for writing").message, e.message);
    let report = vhd::check(&*sim, true).unwrap();
    assert_eq!(sim.contents().fingerprint(), before, "a repair must not touch what it cannot mend");
    assert!(!report.is_sound());
    let code = e.message.rsplit_once('[').unwrap().1.trim_end_matches(']').to_owned();
    assert!(report.findings.iter().any(|f| f.code == code), "{code} is not in {report:?}");
    code
}

#[test]
fn broken_footers_are_refused_by_rule() {
    let cases: [(&str, u64, &[u8]); 8] = [
        ("vhd-footer-version", 12, &0x0002_0000u32.to_be_bytes()),
        ("vhd-disk-type", 60, &1u32.to_be_bytes()),
        ("vhd-disk-type", 60, &5u32.to_be_bytes()),
        ("vhd-disk-type", 60, &u32::MAX.to_be_bytes()),
        ("vhd-size-unaligned", 48, &16383u64.to_be_bytes()),
        ("vhd-size-too-large", 48, &((2040u64 << 30) + 512).to_be_bytes()),
        ("vhd-header-outside", 16, &(u64::MAX - 511).to_be_bytes()),
        ("vhd-header-outside", 16, &(1u64 << 40).to_be_bytes()),
    ];
    for (code, field, value) in cases {
        let mut disk = dynamic();
        in_footers(&mut disk, field, value);
        assert_eq!(refusal(disk), code, "field {field}");
    }
    let mut disk = dynamic();
    in_footers(&mut disk, 16, &0u64.to_be_bytes());
    assert_eq!(refusal(disk), "vhd-header-cookie", "the footer's copy is no header");
    let mut disk = dynamic();
    for at in [0, disk.len() - 512] {
        disk.write(at + 300, &[1]);
    }
    assert_eq!(refusal(disk), "vhd-footer-checksum");
    for len in [0, 1, 511, 512, 1028] {
        let mut disk = SimDisk::new();
        disk.set_len(len);
        assert_eq!(refusal(disk), "vhd-footer-missing", "{len} bytes of nothing");
    }
}

#[test]
fn broken_headers_are_refused_by_rule() {
    let cases: [(&str, u64, &[u8]); 12] = [
        ("vhd-header-cookie", 0, b"cxsparsf"),
        ("vhd-header-version", 24, &0x0002_0000u32.to_be_bytes()),
        ("vhd-table-too-small", 28, &3u32.to_be_bytes()),
        ("vhd-table-too-small", 28, &0u32.to_be_bytes()),
        ("vhd-table-too-large", 28, &u32::MAX.to_be_bytes()),
        ("vhd-table-outside", 28, &(4u32 << 20).to_be_bytes()),
        ("vhd-block-size", 32, &4095u32.to_be_bytes()),
        ("vhd-block-size", 32, &(1u32 << 31).to_be_bytes()),
        ("vhd-table-outside", 16, &(u64::MAX - 511).to_be_bytes()),
        ("vhd-structures-overlap", 16, &512u64.to_be_bytes()),
        ("vhd-structures-overlap", 16, &0u64.to_be_bytes()),
        ("vhd-structures-overlap", 16, &1024u64.to_be_bytes()),
    ];
    for (code, field, value) in cases {
        let mut disk = dynamic();
        in_header(&mut disk, field, value);
        assert_eq!(refusal(disk), code, "field {field} {value:?}");
    }
}

#[test]
fn broken_tables_are_refused_by_rule() {
    let first = u32::from_be_bytes(bytes(&dynamic(), TABLE, 4).try_into().unwrap());
    let cases = [
        ("vhd-block-over-structure", 1),
        ("vhd-block-over-structure", 2),
        ("vhd-block-over-structure", 3),
        ("vhd-blocks-overlap", first + 1),
        ("vhd-blocks-overlap", first - 1),
        ("vhd-block-outside", u32::MAX - 1),
        ("vhd-block-outside", 0x8000_0000),
        ("vhd-block-outside", (dynamic().len() / 512) as u32 - 2),
    ];
    for (code, entry) in cases {
        let mut disk = dynamic();
        disk.write(TABLE + 4, &entry.to_be_bytes());
        let found = refusal(disk);
        assert!(found == code || found == "vhd-blocks-overlap", "entry {entry}: {found} instead of {code}");
    }
}

#[test]
fn a_check_names_every_broken_entry() {
    let mut disk = dynamic();
    disk.write(TABLE + 4, &1u32.to_be_bytes());
    disk.write(TABLE + 12, &(u32::MAX - 1).to_be_bytes());
    let report = vhd::check(&*SimStorage::from_disk(disk), false).unwrap();
    let codes: Vec<_> = report.findings.iter().map(|f| f.code.as_str()).collect();
    assert!(codes.contains(&"vhd-block-over-structure") && codes.contains(&"vhd-block-outside"), "{codes:?}");
}

/// A guest that writes a forged dynamic disk into its fixed disk must not get it taken for one, nor for a lost footer.
#[test]
fn what_a_guest_writes_to_a_fixed_disk_never_changes_its_type() {
    let forged = dynamic();
    let size = forged.len().next_multiple_of(4096);
    let sim = SimStorage::from_disk(fixed(size));
    let image = open(&sim, false).unwrap();
    write_payload(&image, 0, &bytes(&forged, 0, forged.len() as usize)).unwrap();
    write_payload(&image, size - 512, &bytes(&forged, 0, 512)).unwrap();
    image.close().unwrap();
    for read_only in [true, false] {
        let again = open(&sim, read_only).unwrap();
        assert_eq!(again.image_type(), ImageType::Fixed);
        assert_eq!(read_payload(&again, 0, 512).unwrap(), bytes(&forged, 0, 512));
    }
    assert!(vhd::check(&*sim, true).unwrap().findings.is_empty());
}

#[test]
fn a_footer_that_is_not_at_the_end_is_not_looked_for() {
    let mut longer = fixed(8192);
    longer.set_len(longer.len() + 4096);
    assert_eq!(refusal(longer), "vhd-footer-missing");
    let mut trailing = fixed(8192);
    let len = trailing.len();
    trailing.write(len, &[0xaa; 100]);
    assert_eq!(refusal(trailing), "vhd-footer-missing");
}

#[test]
fn a_footer_of_511_bytes_is_read_and_outlives_writes() {
    let mut disk = fixed(8192);
    disk.set_len(disk.len() - 1);
    let sim = SimStorage::from_disk(disk);
    let image = open(&sim, false).unwrap();
    write_payload(&image, 8192 - 512, &[3; 512]).unwrap();
    image.close().unwrap();
    assert_eq!(open(&sim, true).unwrap().geometry().virtual_size, 8192);

    let mut disk = dynamic();
    disk.set_len(disk.len() - 1);
    let sim = SimStorage::from_disk(disk);
    let codes: Vec<_> = vhd::check(&*sim, false).unwrap().findings.into_iter().map(|f| f.code).collect();
    assert_eq!(codes, ["vhd-footer-short"]);
    let image = open(&sim, false).unwrap();
    write_payload(&image, BLOCK, &[3; 512]).unwrap();
    image.close().unwrap();
    assert!(vhd::check(&*sim, false).unwrap().findings.is_empty(), "the footer is whole where it moved");
    assert_eq!(read_payload(&open(&sim, true).unwrap(), BLOCK, 512).unwrap(), [3; 512]);
}

#[test]
fn the_footer_at_the_end_counts_and_writing_mends_the_copy() {
    for damage in [&b"conectiy"[..], &b""[..]] {
        let mut disk = dynamic();
        disk.write(0, damage);
        disk.write(24, &[0xff; 4]);
        if damage.is_empty() {
            seal(&mut disk, 0, 512, 64);
        }
        let sim = SimStorage::from_disk(disk);
        let reader = open(&sim, true).unwrap();
        assert_eq!(reader.state(), VhdState::CopyDiffers);
        let image = open(&sim, false).unwrap();
        write_payload(&image, 3 * BLOCK, &[9; 512]).unwrap();
        image.close().unwrap();
        assert_eq!(open(&sim, true).unwrap().state(), VhdState::Clean);
        let now = sim.contents();
        assert_eq!(bytes(&now, 0, 512), bytes(&now, now.len() - 512, 512));
    }
}

#[test]
fn data_of_other_writers_behind_the_table_is_kept() {
    let sim = SimStorage::new();
    let params = CreateParams {
        image_type: ImageType::Dynamic,
        virtual_size: BLOCKS * BLOCK,
        block_size: Some(BLOCK as u32),
        parent: None,
    };
    vhd::create(&*sim, &params).unwrap();
    let mut disk = sim.contents();
    let footer = bytes(&disk, 0, 512);
    let map = [b"tdbatmap".as_slice(), &[0x5a; 1016]].concat();
    disk.set_len(2048);
    disk.write(2048, &map);
    disk.write(3072, &footer);
    let sim = SimStorage::from_disk(disk);
    let image = open(&sim, false).unwrap();
    for n in 0..BLOCKS {
        write_payload(&image, n * BLOCK, &[n as u8 + 1; 4096]).unwrap();
    }
    image.close().unwrap();
    assert_eq!(bytes(&sim.contents(), 2048, 1024), map);
    let image = open(&sim, true).unwrap();
    for n in 0..BLOCKS {
        assert_eq!(read_payload(&image, n * BLOCK, 4096).unwrap(), vec![n as u8 + 1; 4096]);
    }
}

#[test]
fn a_block_whose_bitmap_is_not_full_reads_its_data_and_is_marked_when_written() {
    let mut disk = dynamic();
    let entry = u64::from(u32::from_be_bytes(bytes(&disk, TABLE, 4).try_into().unwrap()));
    disk.write(entry * 512, &[0]);
    let sim = SimStorage::from_disk(disk);
    assert_eq!(read_payload(&open(&sim, true).unwrap(), 0, 512).unwrap(), [1; 512], "data counts");
    let image = open(&sim, false).unwrap();
    write_payload(&image, 512, &[5; 512]).unwrap();
    assert_eq!(bytes(&sim.contents(), entry * 512, 1), [0xff]);
    assert_eq!(read_payload(&image, 0, 512).unwrap(), [1; 512]);
}

#[test]
fn a_saved_state_is_read_but_not_written() {
    let mut disk = dynamic();
    in_footers(&mut disk, 84, &[1]);
    let sim = SimStorage::from_disk(disk);
    assert_eq!(open(&sim, false).unwrap_err().kind, ErrorKind::Unsupported);
    assert_eq!(read_payload(&open(&sim, true).unwrap(), 0, 512).unwrap(), [1; 512]);
}

/// Every single byte of the structures, changed at random: whatever opens has to stay within its file.
#[test]
fn structures_with_any_byte_changed_neither_panic_nor_leave_the_file() {
    let clean = dynamic();
    let end = clean.len();
    let places = (0..TABLE + 512).chain(end - 512..end);
    let (mut opened, mut refused) = (0, 0);
    for at in places {
        for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            let mut disk = clean.clone();
            disk.write(at, &[value]);
            if (HEADER..TABLE).contains(&at) {
                seal(&mut disk, HEADER, 1024, 36);
            } else if at >= end - 512 {
                seal(&mut disk, end - 512, 512, 64);
            }
            let sim = SimStorage::from_disk(disk);
            vhd::check(&*sim, false).unwrap();
            match open(&sim, true) {
                Err(e) => {
                    assert!(matches!(e.kind, ErrorKind::Corrupt | ErrorKind::Parent), "{at}: {e}");
                    refused += 1;
                }
                Ok(image) => {
                    let size = image.geometry().virtual_size;
                    read_payload(&image, 0, 512).unwrap();
                    read_payload(&image, size - 512, 512).unwrap();
                    opened += 1;
                }
            }
        }
    }
    println!("{opened} opened, {refused} refused");
    assert!(opened > 1000 && refused > 100, "{opened} {refused}");
}

/// Images with several fields changed at random: one that is accepted for writing holds what is written to it, keeps
/// what was there, and is sound afterwards.
#[test]
fn what_is_accepted_for_writing_can_be_relied_on() {
    let clean = dynamic();
    let (mut accepted, mut refused) = (0, 0);
    for seed in 0..6000 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut disk = clean.clone();
        for _ in 0..rng.random_range(1..4) {
            scramble(&mut disk, &mut rng);
        }
        let sim = SimStorage::from_disk(disk);
        let Ok(image) = open(&sim, false) else {
            refused += 1;
            continue;
        };
        accepted += 1;
        let size = image.geometry().virtual_size;
        let places: Vec<u64> =
            (0..8).map(|n| n * BLOCK / 2).chain([size - 512]).filter(|at| at + 512 <= size).collect();
        for (n, &at) in places.iter().enumerate() {
            write_payload(&image, at, &[n as u8 + 1; 512]).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        }
        image.close().unwrap();
        let again = open(&sim, false).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let mut expected = std::collections::BTreeMap::new();
        for (n, &at) in places.iter().enumerate() {
            expected.insert(at, n as u8 + 1);
        }
        for (at, value) in expected {
            assert_eq!(read_payload(&again, at, 512).unwrap(), [value; 512], "seed {seed}, {at}");
        }
        assert!(vhd::check(&*sim, false).unwrap().is_sound(), "seed {seed}");
    }
    println!("{accepted} accepted, {refused} refused");
    assert!(accepted > 500 && refused > 500, "{accepted} {refused}");
}

/// Changes one field, or cuts the file, and renews the checksums.
fn scramble(disk: &mut SimDisk, rng: &mut ChaCha8Rng) {
    let end = disk.len();
    let sectors = (end / 512) as u32;
    match rng.random_range(0..6) {
        0 => {
            let entry = rng.random_range(0..sectors + 2);
            disk.write(TABLE + 4 * rng.random_range(0..BLOCKS), &entry.to_be_bytes());
        }
        1 => in_header(disk, 16, &(512 * rng.random_range(0..u64::from(sectors))).to_be_bytes()),
        2 => in_header(disk, 28, &rng.random_range(2u32..200).to_be_bytes()),
        3 => in_header(disk, 32, &(512u32 << rng.random_range(0..6)).to_be_bytes()),
        4 => in_footers(disk, 48, &(512 * rng.random_range(1u64..64)).to_be_bytes()),
        _ => {
            // Slack of any length between the last block and the footer, with rubbish in it.
            let footer = bytes(disk, end - 512, 512);
            let slack = 512 * rng.random_range(0..40u64);
            disk.write(end - 512, &vec![0x3c; slack as usize]);
            disk.write(end - 512 + slack, &footer);
        }
    }
}

#[test]
fn differencing_disks_are_validated_and_then_refused() {
    let differencing = || {
        let mut disk = dynamic();
        in_footers(&mut disk, 60, &4u32.to_be_bytes());
        let path: Vec<u8> = ".\\parent disk.vhd".encode_utf16().flat_map(u16::to_le_bytes).collect();
        disk.write(2048, &path);
        in_header(&mut disk, 576, b"W2ru");
        in_header(&mut disk, 576 + 4, &512u32.to_be_bytes());
        in_header(&mut disk, 576 + 8, &(path.len() as u32).to_be_bytes());
        in_header(&mut disk, 576 + 16, &2048u64.to_be_bytes());
        disk
    };
    let sim = SimStorage::from_disk(differencing());
    let e = open(&sim, true).unwrap_err();
    assert_eq!(e.kind, ErrorKind::Parent);
    assert!(e.message.contains("parent disk.vhd"), "{e}");
    let info = vhd::inspect(&*sim).unwrap();
    assert_eq!(
        (info.image_type, &info.parent_paths[..]),
        (ImageType::Differencing, &[".\\parent disk.vhd".to_owned()][..])
    );
    assert!(vhd::check(&*sim, false).unwrap().is_sound());

    let with = |field: u64, value: &[u8]| {
        let mut disk = differencing();
        in_header(&mut disk, 576 + field, value);
        refusal(disk)
    };
    assert_eq!(with(8, &8194u32.to_be_bytes()), "vhd-locator-too-long");
    assert_eq!(with(8, &33u32.to_be_bytes()), "vhd-locator-odd");
    assert_eq!(with(16, &(u64::MAX - 3).to_be_bytes()), "vhd-locator-outside");
    assert_eq!(with(16, &512u64.to_be_bytes()), "vhd-structures-overlap");
    for text in [[0x00, 0xd8], [0x00, 0x00]] {
        let mut disk = differencing();
        disk.write(2050, &text);
        assert_eq!(refusal(disk), "vhd-locator-text", "an unpaired surrogate, or NUL, in the path");
    }
}
