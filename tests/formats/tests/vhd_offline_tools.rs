//! VHDs that were resized, compacted and given other parents are read alike by QEMU's tools and 7-Zip, where they are
//! installed, and keep what blktap keeps in them.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod vhd_offline;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use formats::vhd::{self, CreateParams, Vhd};
use formats::{FileStorage, Image, ImageType, LayerOptions, NewParentLink, Storage};
use formats_tests::{SimDisk, read_payload, write_payload};
use tempfile::TempDir;
use vhd_offline::{arc, bytes, see, u32_at, u64_at};

fn has(program: &str, arg: &str) -> bool {
    let there = Command::new(program).arg(arg).output().is_ok_and(|o| o.status.success());
    if !there {
        println!("SKIPPED: {program} does not run here, so nothing was read with it");
    }
    there
}

fn output(command: &mut Command) -> Vec<u8> {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    out.stdout
}

fn file(path: &Path) -> Arc<dyn Storage> {
    let file =
        std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    Arc::new(FileStorage::new(file))
}

fn open(storage: &Arc<dyn Storage>) -> Vhd {
    Vhd::open_layer(storage.clone(), &LayerOptions::default()).unwrap()
}

/// What each tool that is here reads is what the model has.
fn read_alike(path: &Path, model: &[u8], qemu: bool) -> usize {
    let mut readers = 0;
    if qemu && has("qemu-img", "--version") {
        let raw = path.with_extension("raw");
        output(Command::new("qemu-img").args(["convert", "-f", "vpc", "-O", "raw"]).args([path, &raw]));
        assert!(std::fs::read(&raw).unwrap() == model, "qemu-img reads {} differently", path.display());
        std::fs::remove_file(raw).unwrap();
        readers += 1;
    }
    if has("7zz", "i") {
        let data = output(Command::new("7zz").args(["x", "-so", "-y"]).arg(path));
        assert!(data == model, "7-Zip reads {} differently", path.display());
        readers += 1;
    }
    readers
}

#[test]
fn other_software_reads_what_was_resized_and_compacted() {
    let mut readings = 0;
    for (image_type, made_by_qemu) in [
        (ImageType::Fixed, false),
        (ImageType::Dynamic, false),
        (ImageType::Dynamic, true),
        (ImageType::Fixed, true),
    ] {
        if made_by_qemu && !has("qemu-img", "--version") {
            continue;
        }
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("disk.vhd");
        let old: u64 = 20 << 20;
        if made_by_qemu {
            // Of exactly this size by current size and by geometry.
            let options = format!("subformat={image_type},force_size=on");
            output(
                Command::new("qemu-img")
                    .args(["create", "-q", "-f", "vpc", "-o", &options])
                    .arg(&path)
                    .arg("20M"),
            );
        } else {
            let params = CreateParams { image_type, virtual_size: old, block_size: None, parent: None };
            vhd::create(&*file(&path), &params).unwrap();
        }
        let storage = file(&path);
        let image = open(&storage);
        let mut model = vec![0; old as usize];
        for (at, len) in [(0, 4096), (5 << 20, 3 << 20), (12 << 20, 2 << 20), (old - 1024, 1024)] {
            let data: Vec<u8> = (0..len).map(|n: usize| (n / 512 + 3) as u8 | 1).collect();
            write_payload(&image, at, &data).unwrap();
            model[at as usize..at as usize + len].copy_from_slice(&data);
        }
        // Becomes a hole in the file.
        write_payload(&image, 4 << 20, &vec![0; 8 << 20]).unwrap();
        model[4 << 20..12 << 20].fill(0);
        image.close().unwrap();
        drop(image);
        for size in [(21 << 20) + 512, 3 << 30, 40 << 20] {
            vhd::resize(&storage, size, true).unwrap();
            if size < 1 << 30 {
                model.resize(size as usize, 0);
                readings += read_alike(&path, &model, true);
            }
        }
        let before = std::fs::metadata(&path).unwrap().len();
        let outcome = vhd::compact(&storage, &mut |_, _| ()).unwrap();
        let after = std::fs::metadata(&path).unwrap().len();
        assert!(
            image_type == ImageType::Fixed || after + (6 << 20) < before,
            "{outcome:?}: {after} of {before}"
        );
        readings += read_alike(&path, &model, true);
    }
    println!("{readings} readings");
}

/// 7-Zip looks for the parent by its name beside the child.
#[test]
fn a_chain_is_read_through_the_parent_that_it_was_given() {
    if !has("7zz", "i") {
        return;
    }
    let folder = TempDir::new().unwrap();
    let paths = ["one.vhd", "two.vhd", "child.vhd"].map(|name| folder.path().join(name));
    let size = 8 << 20;
    let mut ids = Vec::new();
    for (n, path) in paths[..2].iter().enumerate() {
        let params = CreateParams {
            image_type: ImageType::Dynamic,
            virtual_size: size,
            block_size: None,
            parent: None,
        };
        vhd::create(&*file(path), &params).unwrap();
        let image = open(&file(path));
        write_payload(&image, 1 << 20, &vec![n as u8 + 1; 65536]).unwrap();
        ids.push(image.content_id().unwrap());
        image.close().unwrap();
    }
    let link = |n: usize| NewParentLink {
        id: ids[n],
        next_id: None,
        relative: Some(["one.vhd", "two.vhd"][n].into()),
        absolute: paths[n].to_str().unwrap().into(),
    };
    let child = file(&paths[2]);
    let params = CreateParams {
        image_type: ImageType::Differencing,
        virtual_size: size,
        block_size: None,
        parent: Some(link(0)),
    };
    vhd::create(&*child, &params).unwrap();
    let image = open(&child);
    write_payload(&image, (1 << 20) + 512, &[9; 1024]).unwrap();
    write_payload(&image, 6 << 20, &[8; 1024]).unwrap();
    image.close().unwrap();
    drop(image);
    let model = |n: u8| {
        let mut model = vec![0; size as usize];
        model[1 << 20..(1 << 20) + 65536].fill(n);
        model[(1 << 20) + 512..(1 << 20) + 1536].fill(9);
        model[6 << 20..(6 << 20) + 1024].fill(8);
        model
    };
    assert_eq!(read_alike(&paths[2], &model(1), false), 1);
    vhd::relink(&*child, &link(1)).unwrap();
    assert_eq!(read_alike(&paths[2], &model(2), false), 1);
    vhd::compact(&child, &mut |_, _| ()).unwrap();
    assert_eq!(read_alike(&paths[2], &model(2), false), 1);
    vhd::relink(&*child, &link(0)).unwrap();
    assert_eq!(read_alike(&paths[2], &model(1), false), 1);
}

/// blktap's map as its software finds it: behind the table.
fn batmap(disk: &SimDisk) -> (u64, Vec<u8>) {
    let header = bytes(disk, 512, 1024);
    let table_end = (u64_at(&header, 16) + u32_at(&header, 28) * 4).next_multiple_of(512);
    let map = bytes(disk, table_end, 512);
    assert_eq!(&map[..8], b"tdbatmap", "there is no map behind the table");
    let bits = bytes(disk, u64_at(&map, 8), u32_at(&map, 16) as usize * 512);
    let sum: u32 = bits.iter().map(|&b| u32::from(b)).sum();
    assert_eq!(u64::from(!sum), u32_at(&map, 24), "its checksum");
    assert!(bits.len() as u64 * 8 >= u32_at(&header, 28));
    (table_end, bits)
}

#[test]
fn the_map_that_blktap_keeps_moves_with_the_table() {
    let Some(corpus) = formats_tests::corpus::corpus("VHD") else { return };
    let packed = formats_tests::corpus::unpack(&corpus.join("blktap-libvhd/base.vhd.bz2")).unwrap();
    let sim = formats_tests::corpus::sparse(&packed);
    let (at, bits) = batmap(&sim.contents());
    let before = see(&sim.contents()).unwrap();
    vhd::resize(&arc(&sim), 300 << 30, false).unwrap();
    let (moved, longer) = batmap(&sim.contents());
    assert!(moved > at && longer.starts_with(&bits) && longer[bits.len()..].iter().all(|&b| b == 0));
    // A session that adds blocks leaves it alone, and so does everything else.
    let image = open(&arc(&sim));
    write_payload(&image, 200 << 30, &[5; 512]).unwrap();
    image.close().unwrap();
    assert_eq!(read_payload(&image, 200 << 30, 512).unwrap(), [5; 512]);
    drop(image);
    vhd::compact(&arc(&sim), &mut |_, _| ()).unwrap();
    assert_eq!(batmap(&sim.contents()).1, longer);
    let report = vhd::check(&*sim, false).unwrap();
    assert!(
        report.findings.iter().all(|f| f.code != "vhd-batmap" && f.severity == formats::Severity::Note),
        "{report:?}"
    );
    let mut after = see(&sim.contents()).unwrap();
    assert_eq!(after.sectors.remove(&((200 << 30) / 512)), Some(vec![5; 512]));
    assert_eq!(after.sectors, before.sectors);
}
