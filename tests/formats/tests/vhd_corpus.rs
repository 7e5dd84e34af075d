//! Real and hostile VHDs of the corpus: `BLOCKD_CORPUS` names its folder, whose README says what is in it.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use formats::vhd::{self, Vhd};
use formats::{ErrorKind, Image, ImageType, Severity, Storage};
use formats_tests::corpus::{self, sha256_of as whole, sparse, sparse64k_of as sparse64k};
use formats_tests::{SimStorage, read_payload, write_payload};

fn unpack(path: &Path) -> Vec<u8> {
    corpus::unpack(path).unwrap()
}

fn table(path: &Path) -> Vec<Vec<String>> {
    corpus::table(path).unwrap()
}

fn open(sim: &Arc<SimStorage>, read_only: bool, recover: bool) -> Result<Vhd, formats::ImageError> {
    let storage: Arc<dyn Storage> = sim.clone();
    Vhd::open(storage, read_only, recover)
}

#[test]
fn real_images_read_as_their_makers_software_reads_them() {
    let Some(corpus) = corpus::corpus("VHD") else { return };
    let mut read = 0;
    for row in table(&corpus.join("manifest.tsv")) {
        let (path, parents, size) = (&row[0], &row[5], &row[6]);
        if !path.contains(".vhd.") {
            continue;
        }
        let sim = sparse(&unpack(&corpus.join(path)));
        let begun = Instant::now();
        let image = match open(&sim, true, false) {
            Ok(image) => image,
            Err(e) => {
                // Chains are refused; two files have footers whose checksums are wrong in both places.
                let refused = matches!(e.kind, ErrorKind::Parent)
                    || (path.starts_with("dfvfs/image") && e.kind == ErrorKind::Corrupt);
                assert!(refused, "{path}: {e}");
                println!("{path}: refused: {e}");
                continue;
            }
        };
        assert!(begun.elapsed() < Duration::from_secs(10), "{path}: opening took {:?}", begun.elapsed());
        assert!(parents.is_empty(), "{path} needs a parent");
        assert_eq!(image.geometry().virtual_size.to_string(), *size, "{path}");
        if image.geometry().virtual_size <= 1 << 30 {
            assert_eq!(whole(&image), row[7], "{path}: content");
        }
        if !row[8].is_empty() {
            assert_eq!(sparse64k(&image), row[8], "{path}: sparse content");
        }
        let report = vhd::check(&*sim, false).unwrap();
        assert!(report.is_sound(), "{path}: {report:?}");
        read += 1;
        println!("{path}: {} {} bytes, {:?}", image.image_type(), size, report.findings);
    }
    assert!(read >= 9, "only {read} images were read");
}

#[test]
fn real_images_keep_their_content_when_they_are_written_to() {
    let Some(corpus) = corpus::corpus("VHD") else { return };
    let mut written = 0;
    for row in table(&corpus.join("manifest.tsv")) {
        if !row[0].contains(".vhd.") {
            continue;
        }
        let sim = sparse(&unpack(&corpus.join(&row[0])));
        let Ok(image) = open(&sim, false, false) else { continue };
        let size = image.geometry().virtual_size;
        // One sector in the middle, one in the last, and everything else as it was.
        let before = |at| read_payload(&image, at, 512).unwrap();
        let places = [size / 2 / 512 * 512, size - 512];
        let old = places.map(before);
        for at in places {
            write_payload(&image, at, &[0xa5; 512]).unwrap();
        }
        image.close().unwrap();
        let image = open(&sim, false, false).unwrap();
        for at in places {
            assert_eq!(read_payload(&image, at, 512).unwrap(), [0xa5; 512], "{}: {at}", row[0]);
        }
        for (at, old) in places.into_iter().zip(&old) {
            write_payload(&image, at, old).unwrap();
        }
        image.close().unwrap();
        if size <= 1 << 30 {
            assert_eq!(whole(&open(&sim, true, false).unwrap()), row[7], "{}", row[0]);
        }
        assert!(vhd::check(&*sim, false).unwrap().is_sound(), "{}", row[0]);
        written += 1;
    }
    assert!(written >= 9, "only {written} images were written");
}

/// Some software puts a new block where the old footer was, and lets the guest read the footer.
#[test]
fn a_new_block_of_a_windows_disk_holds_no_stale_footer() {
    let Some(corpus) = corpus::corpus("VHD") else { return };
    let sim = sparse(&unpack(&corpus.join("node-vhd/dynamic.vhd.gz")));
    let image = open(&sim, false, false).unwrap();
    assert_eq!(image.geometry().payload_align, 4096, "Windows puts data on pages");
    let block = u64::from(image.geometry().block_size);
    let absent = (0..256)
        .map(|n| n * block)
        .find(|&at| image.next_extent(at).unwrap().unwrap().state == formats::AllocState::Absent)
        .unwrap();
    let before = sim.len().unwrap();
    write_payload(&image, absent, &[0x5a; 512]).unwrap();
    let content = read_payload(&image, absent, block as usize).unwrap();
    assert_eq!(content[..512], [0x5a; 512]);
    assert!(content[512..].iter().all(|b| *b == 0), "a sector that was never written is not zero");
    image.close().unwrap();
    assert_eq!(sim.len().unwrap(), before + block + 4096, "the block lies where Windows would put it");
    assert!(
        read_payload(&open(&sim, true, false).unwrap(), absent + 512, block as usize - 512)
            .unwrap()
            .iter()
            .all(|b| *b == 0)
    );
}

/// What is owed for each hostile file: how it opens for writing, and for reading.
#[test]
fn hostile_images_are_refused_or_contained() {
    use ErrorKind::{Corrupt, NeedsRepair, Parent, Unsupported};
    let Some(corpus) = corpus::corpus("VHD") else { return };
    type Owed = Result<(), ErrorKind>;
    let owed = |name: &str| -> (Owed, Owed) {
        match &name[..3] {
            "v00" | "v02" | "v06" => (Ok(()), Ok(())),
            "v04" => (Err(NeedsRepair), Ok(())),
            "v34" => (Err(Unsupported), Ok(())),
            "v40" | "v44" => (Err(Parent), Err(Parent)),
            _ => (Err(Corrupt), Err(Corrupt)),
        }
    };
    let clean = sparse(&unpack(&corpus.join("hostile/v00-clean.vhd.bz2")));
    let content = whole(&open(&clean, true, false).unwrap());
    let mut seen = 0;
    for row in table(&corpus.join("hostile/cases.tsv")) {
        let name = &row[0];
        if !name.starts_with('v') {
            continue;
        }
        let sim = sparse(&unpack(&corpus.join("hostile").join(format!("{name}.bz2"))));
        let before = sim.contents().fingerprint();
        let begun = Instant::now();
        let (reads, read_bytes) = sim.reads();
        let writing = open(&sim, false, false).map(drop);
        let reading = open(&sim, true, true);
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(10), "{name}: took {took:?}");
        let now = sim.reads();
        assert!(now.1 - read_bytes < 1 << 20 && now.0 - reads < 1000, "{name}: read too much: {now:?}");
        let (to_write, to_read) = owed(name);
        assert_eq!(
            writing.as_ref().map_err(|e| e.kind).copied(),
            to_write,
            "{name} ({}): {writing:?}",
            row[1]
        );
        assert_eq!(reading.as_ref().map_err(|e| e.kind).map(drop), to_read, "{name} ({})", row[1]);
        assert_eq!(sim.contents().fingerprint(), before, "{name}: opening wrote to the file");
        let report = vhd::check(&*sim, false).unwrap();
        let damaged = matches!(to_read, Err(Corrupt)) || name.starts_with("v04");
        assert_eq!(!report.is_sound(), damaged, "{name}: {report:?}");
        match reading {
            Ok(image) => assert_eq!(whole(&image), content, "{name}"),
            Err(e) => println!("{name} ({}): {e}", row[1]),
        }
        seen += 1;
    }
    assert!(seen >= 22, "only {seen} cases were seen");
}

#[test]
fn a_lost_footer_comes_back_by_repair_and_by_recovery() {
    let Some(corpus) = corpus::corpus("VHD") else { return };
    let bytes = unpack(&corpus.join("hostile/v04-no-end-footer.vhd.bz2"));
    let content = whole(&open(&sparse(&bytes), true, false).unwrap());
    for recover in [false, true] {
        let sim = sparse(&bytes);
        if !recover {
            let report = vhd::check(&*sim, true).unwrap();
            let mended = report.findings.iter().find(|f| f.code == "vhd-footer-missing").unwrap();
            assert!(mended.repaired && mended.severity == Severity::Damage);
        }
        let image = open(&sim, false, recover).unwrap();
        assert_eq!(image.image_type(), ImageType::Dynamic);
        assert_eq!(whole(&image), content);
        image.close().unwrap();
        drop(image);
        assert_eq!(whole(&open(&sim, false, false).unwrap()), content);
        let report = vhd::check(&*sim, false).unwrap();
        assert!(report.findings.iter().all(|f| f.severity == Severity::Note), "{report:?}");
    }
}
