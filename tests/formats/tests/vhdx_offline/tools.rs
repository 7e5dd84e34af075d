//! What these operations leave, other people's tools read: QEMU's and 7-Zip.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use formats::vhdx::{self, CreateParams, Vhdx, compact, relink, resize};
use formats::{ErrorKind, FileStorage, Image, ImageType, Storage, ZeroMode};
use formats_tests::{read_payload, write_payload, zero_payload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::image::{MIB, link};

fn has(program: &str, argument: &str) -> bool {
    let there = Command::new(program).arg(argument).output().is_ok_and(|o| o.status.success());
    if !there {
        println!("SKIPPED: {program} does not run here, so images were not read with it");
    }
    there
}

fn file(path: &Path) -> Arc<dyn Storage> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    Arc::new(FileStorage::new(file))
}

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Reads the image with each tool, and compares that with the model. How many there were.
fn compare(path: &Path, model: &[u8], qemu_knows: bool) -> usize {
    let mut readers = 0;
    if qemu_knows && has("qemu-img", "--version") {
        run(Command::new("qemu-img").args(["check", "-f", "vhdx"]).arg(path));
        let raw = path.with_extension("raw");
        run(Command::new("qemu-img").args(["convert", "-f", "vhdx", "-O", "raw"]).args([path, &raw]));
        assert!(std::fs::read(&raw).unwrap() == model, "qemu-img reads {} differently", path.display());
        readers += 1;
    }
    // 7-Zip knows disks with sectors of 4096 bytes only in whole MiB.
    if (qemu_knows || (model.len() as u64).is_multiple_of(MIB)) && has("7zz", "i") {
        let read = run(Command::new("7zz").args(["x", "-so", "-y"]).arg(path));
        assert!(read == model, "7-Zip reads {} differently", path.display());
        readers += 1;
    }
    readers
}

#[test]
fn qemu_and_7zip_read_what_was_resized_and_compacted() {
    let folder = tempfile::tempdir().unwrap();
    let mut read = 0;
    for (kind, sector) in [(ImageType::Dynamic, 512), (ImageType::Fixed, 512), (ImageType::Dynamic, 4096)] {
        let path = folder.path().join(format!("{kind}-{sector}.vhdx"));
        let params = CreateParams {
            image_type: kind,
            virtual_size: 20 * MIB + 4096,
            block_size: Some(2 << 20),
            logical_sector_size: sector,
            physical_sector_size: 4096,
            log_size: None,
            parent: None,
        };
        vhdx::create(&*file(&path), &params).unwrap();
        let mut random = ChaCha8Rng::seed_from_u64(u64::from(sector) + kind as u64);
        let mut model = vec![0; params.virtual_size as usize];
        let mut sizes = [31 * MIB, 30 * MIB, 45 * MIB + 8192, 64 * MIB].into_iter();
        for round in 0..8 {
            let image = Vhdx::open(file(&path), false).unwrap();
            for _ in 0..12 {
                let len = random.random_range(1..500) * 4096;
                let at = random.random_range(0..=(model.len() - len) / 4096) * 4096;
                if random.random_ratio(1, 3) {
                    let len = (4 << 20).min(model.len() - at);
                    zero_payload(&image, at as u64, len as u64, ZeroMode::Unmap).unwrap();
                    model[at..at + len].fill(0);
                } else {
                    let data: Vec<u8> = (0..len).map(|_| random.random()).collect();
                    write_payload(&image, at as u64, &data).unwrap();
                    model[at..at + len].copy_from_slice(&data);
                }
            }
            image.close().unwrap();
            drop(image);
            if round % 2 == 0 {
                let size = sizes.next().unwrap();
                match resize(&file(&path), size, true) {
                    Ok(()) => model.resize(size as usize, 0),
                    Err(e) => {
                        assert_eq!(e.kind, ErrorKind::InvalidParameter, "{e}");
                        assert!(model[size as usize..].iter().any(|b| *b != 0), "{e}");
                    }
                }
            } else {
                compact(&file(&path), &mut |_, _| ()).unwrap();
            }
            let image = Vhdx::open(file(&path), true).unwrap();
            assert!(read_payload(&image, 0, model.len()).unwrap() == model);
            drop(image);
            read += compare(&path, &model, sector == 512);
        }
    }
    println!("{read} images read by others");
}

#[test]
fn seven_zip_finds_the_parent_that_a_child_was_given() {
    if !has("7zz", "i") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let params = |parent| CreateParams {
        image_type: if parent == 0 { ImageType::Dynamic } else { ImageType::Differencing },
        virtual_size: 8 * MIB,
        block_size: Some(1 << 20),
        logical_sector_size: 512,
        physical_sector_size: 4096,
        log_size: None,
        parent: (parent == 1).then(|| link("nowhere.vhdx")),
    };
    let (base, child) = (folder.path().join("base.vhdx"), folder.path().join("child.vhdx"));
    vhdx::create(&*file(&base), &params(0)).unwrap();
    let image = Vhdx::open(file(&base), false).unwrap();
    let content: Vec<u8> = (0..8 * MIB).map(|at| (at / 512 % 251) as u8).collect();
    write_payload(&image, 0, &content).unwrap();
    image.close().unwrap();
    vhdx::create(&*file(&child), &params(1)).unwrap();
    let id = image.content_id().unwrap();
    let parent = formats::NewParentLink {
        id,
        next_id: None,
        relative: Some("base.vhdx".into()),
        absolute: base.to_str().unwrap().into(),
    };
    relink(&file(&child), &parent).unwrap();
    assert!(run(Command::new("7zz").args(["x", "-so", "-y"]).arg(&child)) == content);
    // Larger than its parent, it ends in zeroes. (7-Zip knows disks of whole physical sectors only.)
    resize(&file(&child), 10 * MIB + 8192, false).unwrap();
    let grown = [content, vec![0; (2 * MIB + 8192) as usize]].concat();
    assert!(run(Command::new("7zz").args(["x", "-so", "-y"]).arg(&child)) == grown);
    compact(&file(&child), &mut |_, _| ()).unwrap();
    assert!(run(Command::new("7zz").args(["x", "-so", "-y"]).arg(&child)) == grown);
}
