//! Chains of differencing VHDXs that are written here, read by other people's tools.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use formats::vhdx::{self, CreateParams, Vhdx};
use formats::{Chain, FileStorage, Image, ImageType, LayerOptions, NewParentLink, Storage, ZeroMode};
use formats_tests::{read_payload, write_payload, zero_payload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SIZE: u64 = 40 << 20;

fn storage(path: &Path) -> Arc<dyn Storage> {
    let file =
        std::fs::File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    Arc::new(FileStorage::new(file))
}

fn open(path: &Path, read_only: bool) -> Arc<Vhdx> {
    let options = LayerOptions { read_only, ..LayerOptions::default() };
    Arc::new(Vhdx::open_layer(storage(path), &options).unwrap())
}

/// The disk `names[0]` over the others of the folder.
fn disk(folder: &Path, names: &[String]) -> Arc<dyn Image> {
    let top = open(&folder.join(&names[0]), false);
    if names.len() == 1 {
        return top;
    }
    let parents = names[1..].iter().map(|name| open(&folder.join(name), true) as Arc<dyn Image>).collect();
    Arc::new(Chain::new(top, parents).unwrap())
}

fn create(folder: &Path, name: &str, parent: Option<&str>, block: u32, sector: u32) {
    let link = parent.map(|parent| NewParentLink {
        id: open(&folder.join(parent), true).content_id().unwrap(),
        next_id: None,
        relative: Some(parent.to_owned()),
        absolute: folder.join(parent).to_str().unwrap().to_owned(),
    });
    let params = CreateParams {
        image_type: if link.is_some() { ImageType::Differencing } else { ImageType::Dynamic },
        virtual_size: SIZE,
        block_size: Some(block),
        logical_sector_size: sector,
        physical_sector_size: 4096,
        log_size: None,
        parent: link,
    };
    vhdx::create(&*storage(&folder.join(name)), &params).unwrap();
}

/// Writes, zeroes and discards at random, and keeps the model.
fn scribble(disk: &dyn Image, model: &mut [u8], sector: u64, seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    for step in 0..120u32 {
        let count = random.random_range(1..=if step % 20 == 0 { 5 << 20 } else { 32 << 10 } / sector);
        let first = random.random_range(0..=SIZE / sector - count);
        let (at, len) = (first * sector, count * sector);
        let range = at as usize..(at + len) as usize;
        if step % 5 == 4 {
            let mode = if random.random() { ZeroMode::Unmap } else { ZeroMode::Keep };
            zero_payload(disk, at, len, mode).unwrap();
            model[range].fill(0);
        } else {
            random.fill(&mut model[range.clone()]);
            write_payload(disk, at, &model[range]).unwrap();
        }
        if step % 50 == 49 {
            disk.commit().unwrap();
            disk.maintain(&|| ()).unwrap();
        }
    }
}

/// Makes a chain of four in the folder, and calls `look` with each newest image and what it holds.
fn chain_of_four(folder: &Path, sector: u32, look: &mut dyn FnMut(&Path, &[u8])) {
    let mut model = vec![0; SIZE as usize];
    let mut names: Vec<String> = Vec::new();
    for (n, block) in [2 << 20, 1 << 20, 32 << 20, 2 << 20].into_iter().enumerate() {
        let name = format!("disk {n}.vhdx");
        create(folder, &name, names.first().map(String::as_str), block, sector);
        names.insert(0, name);
        let disk = disk(folder, &names);
        scribble(&*disk, &mut model, sector.into(), n as u64);
        disk.close().unwrap();
        assert!(read_payload(&*disk, 0, SIZE as usize).unwrap() == model);
        look(&folder.join(&names[0]), &model);
    }
}

#[test]
fn chains_that_are_written_here_read_the_same_in_7_zip() {
    let there = Command::new("7zz").arg("i").output().is_ok_and(|o| o.status.success());
    if !there {
        println!("SKIPPED: 7zz does not run here, so chains were not read with it");
    }
    let folder = tempfile::tempdir().unwrap();
    chain_of_four(folder.path(), 512, &mut |path, model| {
        if !there {
            return;
        }
        // As one stream, whatever the content looks like.
        let output = Command::new("7zz").args(["x", "-so", "-tVHDX"]).arg(path).output().unwrap();
        assert!(
            output.status.success(),
            "7zz on {}: {}",
            path.display(),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.stdout == model, "7zz reads {} differently", path.display());
    });
}

#[test]
fn chains_with_sectors_of_4096_bytes_read_back() {
    let folder = tempfile::tempdir().unwrap();
    chain_of_four(folder.path(), 4096, &mut |_, _| ());
}
