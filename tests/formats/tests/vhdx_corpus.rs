//! Real and hostile VHDXs of the corpus: `BLOCKD_CORPUS` names its folder, whose README says what is in it.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use formats::vhdx::{self, Vhdx};
use formats::{ErrorKind, Image, Storage};
use formats_tests::corpus::{self, sha256_of as whole, sparse64k_of as sparse64k};
use formats_tests::{SimStorage, read_payload, write_payload};

fn unpack(path: &Path) -> Arc<SimStorage> {
    corpus::sparse(&corpus::unpack(path).unwrap())
}

fn table(path: &Path) -> Vec<Vec<String>> {
    corpus::table(path).unwrap()
}

fn open(sim: &Arc<SimStorage>, read_only: bool) -> Result<Vhdx, formats::ImageError> {
    let storage: Arc<dyn Storage> = sim.clone();
    Vhdx::open(storage, read_only)
}

fn check(sim: &Arc<SimStorage>, repair: bool) -> Result<formats::CheckReport, formats::ImageError> {
    let storage: Arc<dyn Storage> = sim.clone();
    vhdx::check(storage, repair)
}

fn assert_content(image: &dyn Image, row: &[String], what: &str) {
    assert_eq!(image.geometry().virtual_size.to_string(), row[6], "{what}");
    if image.geometry().virtual_size <= 1 << 30 {
        assert_eq!(whole(image), row[7], "{what}: content");
    }
    if !row[8].is_empty() {
        assert_eq!(sparse64k(image), row[8], "{what}: sparse content");
    }
}

#[test]
fn real_images_read_as_their_makers_software_reads_them_and_keep_their_content() {
    let Some(corpus) = corpus::corpus("VHDX") else { return };
    let mut read = 0;
    for row in table(&corpus.join("manifest.tsv")).iter().filter(|row| row[0].contains(".vhdx.")) {
        let path = &row[0];
        let sim = unpack(&corpus.join(path));
        let before = sim.contents().fingerprint();
        let begun = Instant::now();
        let image = open(&sim, true).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(10), "{path}: opening took {:?}", begun.elapsed());
        // A log that was left is replayed in memory here.
        assert_content(&image, row, path);
        assert!(check(&sim, false).unwrap().is_sound(), "{path}");
        assert_eq!(sim.contents().fingerprint(), before, "{path}: reading wrote");
        let dirty = image.facts().was_dirty;
        // And into the file here.
        let image = open(&sim, false).unwrap();
        assert_content(&image, row, path);
        let (size, sector) = (image.geometry().virtual_size, u64::from(image.geometry().logical_sector_size));
        let places = [0, size / 2 / sector * sector, size - sector];
        let old = places.map(|at| read_payload(&image, at, sector as usize).unwrap());
        for at in places {
            write_payload(&image, at, &vec![0xa5; sector as usize]).unwrap();
        }
        image.close().unwrap();
        let image = open(&sim, false).unwrap();
        for (at, old) in places.into_iter().zip(&old) {
            assert_eq!(
                read_payload(&image, at, sector as usize).unwrap(),
                vec![0xa5; sector as usize],
                "{path}: {at}"
            );
            write_payload(&image, at, old).unwrap();
        }
        image.close().unwrap();
        assert_content(&open(&sim, true).unwrap(), row, path);
        assert!(check(&sim, false).unwrap().is_sound(), "{path}");
        read += 1;
        println!(
            "{path}: {} {} bytes{}",
            image.image_type(),
            row[6],
            if dirty { ", log replayed" } else { "" }
        );
    }
    assert!(read >= 9, "only {read} images were read");
}

/// What is owed for each hostile file: (for writing, for reading).
fn owed(name: &str) -> (bool, bool) {
    match &name[..3] {
        "x00" | "x08" | "x82" | "l00" | "l26" | "l28" | "l30" => (true, true),
        "x06" => (false, true),
        _ => (false, false),
    }
}

#[test]
fn hostile_images_are_refused_or_contained() {
    let Some(corpus) = corpus::corpus("VHDX") else { return };
    let mut seen = 0;
    for row in table(&corpus.join("hostile/cases.tsv")) {
        let name = &row[0];
        if !name.ends_with(".vhdx") {
            continue;
        }
        let sim = unpack(&corpus.join("hostile").join(format!("{name}.bz2")));
        let before = sim.contents().fingerprint();
        let begun = Instant::now();
        let (_, read_before) = sim.reads();
        let reading = open(&sim, true);
        let report = check(&sim, false);
        assert_eq!(sim.contents().fingerprint(), before, "{name}: reading wrote to the file");
        let writing = open(&sim, false);
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(10), "{name}: took {took:?}");
        let (_, read_after) = sim.reads();
        assert!(read_after - read_before < 64 << 20, "{name}: read {} bytes", read_after - read_before);
        let (to_write, to_read) = owed(name);
        assert_eq!(writing.is_ok(), to_write, "{name} ({}): {:?}", row[1], writing.err());
        assert_eq!(reading.is_ok(), to_read, "{name} ({}): {:?}", row[1], reading.err());
        match &reading {
            Ok(image) => {
                // All of it can be read.
                println!("{name} ({}): opens, {}", row[1], &whole(image)[..8]);
                assert!(report.unwrap().is_sound(), "{name}");
            }
            Err(e) => {
                let expected =
                    matches!(e.kind, ErrorKind::Corrupt | ErrorKind::Parent | ErrorKind::Unsupported);
                assert!(expected, "{name}: {e:?}");
                println!("{name} ({}): {e}", row[1]);
                // A differencing image is sound without its parent; all else is damaged.
                assert!(name.starts_with('d') || !report.unwrap().is_sound(), "{name}");
            }
        }
        if !to_write && !name.starts_with("x06") {
            assert_eq!(sim.contents().fingerprint(), before, "{name}: a refused open wrote to the file");
        }
        seen += 1;
    }
    assert!(seen >= 60, "only {seen} cases were seen");
}

#[test]
fn a_replayed_log_adds_its_block_and_extends_the_file() {
    let Some(corpus) = corpus::corpus("VHDX") else { return };
    let sim = unpack(&corpus.join("hostile/l00-good.vhdx.bz2"));
    let len = sim.len().unwrap();
    let image = open(&sim, false).unwrap();
    assert_eq!(sim.len().unwrap(), len + (1 << 20));
    let block = u64::from(image.geometry().block_size);
    let mut pieces = formats::Pieces::new();
    image.map_read(formats::ByteSpan::new(2 * block, 512), &mut pieces).unwrap();
    assert!(matches!(pieces[0].place, formats::Place::File { .. }), "block 2 has a place");
    assert!(read_payload(&image, 2 * block, block as usize).unwrap().iter().all(|b| *b == 0));
    drop(image);
    assert!(check(&sim, false).unwrap().is_sound());
    assert!(!open(&sim, true).unwrap().facts().was_dirty);
}
