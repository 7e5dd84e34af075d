//! Chains of differencing VHDs are read alike by 7-Zip, the one widespread tool that follows them; and those of the corpus are
//! read as their makers' software reads them.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod vhd_diff;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use formats::vhd::{self, CreateParams, Vhd};
use formats::{
    Chain, ErrorKind, FileStorage, Image, ImageType, LayerOptions, NewParentLink, NotesFile, ParentPathKind,
    Storage, ZeroMode,
};
use formats_tests::corpus::{self, hex, sha256_of, sparse};
use formats_tests::{read_payload, write_payload, zero_payload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};
use vhd_diff::{BOOT, chain, layer, sound};

fn storage(path: &Path) -> Arc<dyn Storage> {
    let file =
        std::fs::File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    Arc::new(FileStorage::new(file))
}

fn open(path: &Path, read_only: bool) -> Arc<Vhd> {
    let notes = path.with_extension("notes");
    let notes = (!read_only).then(|| NotesFile { storage: storage(&notes), boot_id: BOOT });
    let options = LayerOptions { read_only, notes, ..LayerOptions::default() };
    Arc::new(Vhd::open_layer(storage(path), &options).unwrap())
}

/// The disk `names[0]` over the others of the folder.
fn disk(folder: &Path, names: &[String]) -> Chain {
    let parents = names[1..].iter().map(|name| open(&folder.join(name), true) as Arc<dyn Image>).collect();
    Chain::new(open(&folder.join(&names[0]), false), parents).unwrap()
}

fn create(folder: &Path, name: &str, parent: Option<&str>, block_size: u32, virtual_size: u64) {
    let link = parent.map(|parent| NewParentLink {
        id: open(&folder.join(parent), true).content_id().unwrap(),
        next_id: None,
        relative: Some(parent.to_owned()),
        absolute: folder.join(parent).to_str().unwrap().to_owned(),
    });
    let image_type = if link.is_some() { ImageType::Differencing } else { ImageType::Dynamic };
    let params = CreateParams { image_type, virtual_size, block_size: Some(block_size), parent: link };
    vhd::create(&*storage(&folder.join(name)), &params).unwrap();
}

/// Writes, zeroes and discards at random, and keeps the model.
fn scribble(disk: &dyn Image, model: &mut [u8], seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for step in 0..120u32 {
        let count = rng.random_range(1..=if step % 20 == 0 { 1200 } else { 24 });
        let first = rng.random_range(0..model.len() as u64 / 512 - count);
        let (at, len) = (first * 512, count * 512);
        let range = at as usize..(at + len) as usize;
        if step % 6 == 5 {
            zero_payload(disk, at, len, if step % 4 == 1 { ZeroMode::Unmap } else { ZeroMode::Keep })
                .unwrap();
            model[range].fill(0);
        } else {
            let data: Vec<u8> = (0..len).map(|_| rng.random()).collect();
            write_payload(disk, at, &data).unwrap();
            model[range].copy_from_slice(&data);
        }
        if step % 50 == 49 {
            disk.commit().unwrap();
            disk.maintain(&|| ()).unwrap();
        }
    }
}

#[test]
fn chains_that_are_written_here_read_the_same_in_7_zip() {
    let there = Command::new("7zz").arg("i").output().is_ok_and(|o| o.status.success());
    if !there {
        println!("SKIPPED: 7zz does not run here, so chains were not read with it");
    }
    let (size, folder) = (40 << 20, tempfile::tempdir().unwrap());
    let folder = folder.path();
    let mut model = vec![0; size as usize];
    let mut names: Vec<String> = Vec::new();
    for (n, block) in [2 << 20, 2 << 20, 512 << 10, 2 << 20].into_iter().enumerate() {
        let name = format!("disk {n}.vhd");
        create(folder, &name, names.first().map(String::as_str), block, size);
        names.insert(0, name);
        let image = disk(folder, &names);
        scribble(&image, &mut model, n as u64);
        assert!(read_payload(&image, 0, model.len()).unwrap() == model);
        image.close().unwrap();
        drop(image);
        let path = folder.join(&names[0]);
        assert!(vhd::check(&*storage(&path), false).unwrap().is_sound());
        assert!(read_payload(&disk(folder, &names), 0, model.len()).unwrap() == model, "opened anew");
        if there {
            let out = Command::new("7zz").args(["x", "-so", "-y"]).arg(&path).output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            assert_eq!(
                hex(&Sha256::digest(&out.stdout)),
                hex(&Sha256::digest(&model)),
                "7-Zip reads a chain of {} differently",
                n + 1
            );
        }
    }
}

#[test]
fn a_child_that_blktap_made_reads_and_writes_over_its_parent() {
    let Some(corpus) = corpus::corpus("differencing VHD") else { return };
    let unpacked = |name: &str| sparse(&corpus::unpack(&corpus.join(name)).unwrap());
    let wanted = corpus::table(&corpus.join("manifest.tsv"))
        .unwrap()
        .into_iter()
        .find(|row| row[0] == "blktap-libvhd/mid.vhd.bz2")
        .unwrap();
    let (sim, parents) = (unpacked("blktap-libvhd/mid.vhd.bz2"), [unpacked("blktap-libvhd/base.vhd.bz2")]);
    let top = layer(&sim, false, None).unwrap();
    let link = top.parent_link().unwrap();
    assert_eq!(Some(link.ids[0]), layer(&parents[0], true, None).unwrap().content_id());
    let paths: Vec<_> = link.paths.iter().map(|p| (p.kind, p.text.as_str())).collect();
    let wanted_paths = [
        (ParentPathKind::Relative, ".\\base.vhd"),
        (ParentPathKind::Absolute, "file://./base.vhd"),
        (ParentPathKind::Absolute, ".\\base.vhd"),
        (ParentPathKind::Name, "base.vhd"),
    ];
    assert_eq!(paths, wanted_paths);
    let disk = chain(top, &parents);
    assert_eq!(disk.geometry().virtual_size.to_string(), wanted[6]);
    assert_eq!(sha256_of(&disk), wanted[7]);
    // Blocks that it has, blocks that it has not, and everything back again.
    let places = [512u64, (2 << 20) + 1024, (9 << 20) + 512, (34 << 20) - 512];
    let old = places.map(|at| read_payload(&disk, at, 1024.min(((34u64 << 20) - at) as usize)).unwrap());
    for (at, old) in places.iter().zip(&old) {
        write_payload(&disk, *at, &vec![0x5a; old.len()]).unwrap();
    }
    disk.close().unwrap();
    drop(disk);
    let disk = chain(layer(&sim, false, None).unwrap(), &parents);
    assert_ne!(sha256_of(&disk), wanted[7]);
    for (at, old) in places.iter().zip(&old) {
        assert_eq!(read_payload(&disk, *at, old.len()).unwrap(), vec![0x5a; old.len()]);
        write_payload(&disk, *at, old).unwrap();
    }
    disk.close().unwrap();
    assert_eq!(sha256_of(&disk), wanted[7]);
    sound(&sim).unwrap();
    let mut map = [0; 8];
    sim.contents().read(0x800, &mut map);
    assert_eq!(&map, b"tdbatmap", "blktap's own map stays");
}

/// One child of the corpus has bad checksums, as has its parent. With good ones both are ordinary disks.
#[test]
fn a_child_whose_checksums_are_put_right_reads_as_it_was_meant() {
    let Some(corpus) = corpus::corpus("differencing VHD") else { return };
    let sealed = |name: &str| {
        let mut bytes = corpus::unpack(&corpus.join(name)).unwrap();
        let end = bytes.len() - 512;
        for (at, len, field) in [(0, 512, 64), (512, 1024, 36), (end, 512, 64)] {
            let part = &mut bytes[at..at + len];
            part[field..field + 4].fill(0);
            let sum: u32 = part.iter().map(|&b| u32::from(b)).sum();
            part[field..field + 4].copy_from_slice(&(!sum).to_be_bytes());
        }
        sparse(&bytes)
    };
    let broken = sparse(&corpus::unpack(&corpus.join("dfvfs/image-differential.vhd.bz2")).unwrap());
    assert_eq!(layer(&broken, true, None).unwrap_err().kind, ErrorKind::Corrupt);
    let (sim, parents) = (sealed("dfvfs/image-differential.vhd.bz2"), [sealed("dfvfs/image.vhd.bz2")]);
    let rows = corpus::table(&corpus.join("manifest.tsv")).unwrap();
    let row = rows.iter().find(|row| row[0] == "dfvfs/image-differential.vhd.bz2").unwrap();
    let top = layer(&sim, false, None).unwrap();
    let own = top.next_extent(0).unwrap();
    assert!(own.is_some_and(|e| e.span.len < top.geometry().virtual_size), "some of it is its own: {own:?}");
    let disk = chain(top, &parents);
    assert_eq!(disk.geometry().virtual_size.to_string(), row[6]);
    assert_eq!(sha256_of(&disk), row[7]);
    write_payload(&disk, 1024, &[7; 512]).unwrap();
    disk.close().unwrap();
    drop(disk);
    let disk = chain(layer(&sim, true, None).unwrap(), &parents);
    assert_eq!(read_payload(&disk, 1024, 512).unwrap(), [7; 512]);
    sound(&sim).unwrap();
}

/// What is owed for each hostile differencing disk, taken for a layer.
#[test]
fn hostile_children_are_refused_or_say_no_more_than_text() {
    let Some(corpus) = corpus::corpus("hostile differencing VHD") else { return };
    let mut seen = 0;
    for row in corpus::table(&corpus.join("hostile/cases.tsv")).unwrap() {
        let name = &row[0];
        if !name.starts_with('v') || !name.contains("-diff-") {
            continue;
        }
        let packed = corpus.join("hostile").join(format!("{name}.bz2"));
        let sim = sparse(&corpus::unpack(&packed).unwrap());
        let before = sim.contents().fingerprint();
        for read_only in [true, false] {
            let opened = layer(&sim, read_only, None);
            match &name[..3] {
                "v40" => {
                    let link = opened.unwrap().parent_link().unwrap().clone();
                    assert!(link.paths.iter().all(|p| p.kind == ParentPathKind::Name), "{link:?}");
                }
                "v44" => {
                    let link = opened.unwrap().parent_link().unwrap().clone();
                    assert!(link.paths.iter().any(|p| p.text.contains("..\\")), "text, as it is: {link:?}");
                }
                "v42" | "v46" => {
                    let e = opened.unwrap_err();
                    assert_eq!(e.kind, ErrorKind::Corrupt, "{name}: {e}");
                    assert!(e.message.contains("vhd-locator-"), "{name}: {e}");
                }
                _ => drop(opened),
            }
        }
        assert_eq!(sim.contents().fingerprint(), before, "{name}: opening wrote to the file");
        seen += 1;
    }
    assert!(seen >= 4, "only {seen} cases were seen");
}
