//! What we write, other people's tools read: QEMU's, 7-Zip and libvhdi. And what they cannot judge they are not asked.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use std::path::Path;
use std::process::Command;

use formats::{CreateOptions, Format, Image, ImageType, OpenOptions, ZeroMode};
use formats_tests::{write_payload, zero_payload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

/// Not a multiple of any block size, but of 4096.
const SIZE: u64 = (70 << 20) + (12 << 10);
/// For sectors of 4096 bytes, where 7-Zip knows only disks of whole MiB.
const SIZE_4K: u64 = 70 << 20;

/// Reads all of an image, dumped by libvhdi through its Python binding.
const VHDI: &str = "
import hashlib, sys, pyvhdi
f = pyvhdi.file()
f.open(sys.argv[1])
h, left = hashlib.sha256(), f.get_media_size()
while left:
    data = f.read_buffer(min(left, 1 << 20))
    h.update(data)
    left -= len(data)
print(f.get_media_size(), h.hexdigest())
";

/// A random trace of writes, zeroes and discards, and what the disk holds after it.
fn fill(image: &dyn Image, seed: u64) -> Vec<u8> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let size = image.geometry().virtual_size;
    let mut model = vec![0; size as usize];
    let sector = u64::from(image.geometry().logical_sector_size);
    for step in 0..400u32 {
        let count = random.random_range(1..=if step % 20 == 0 { 600 } else { 24 });
        let at = random.random_range(0..size / sector - count) * sector;
        let len = count * sector;
        let range = at as usize..(at + len) as usize;
        if step % 7 == 6 {
            let mode = if step % 2 == 0 { ZeroMode::Unmap } else { ZeroMode::Keep };
            zero_payload(image, at, len, mode).unwrap();
            model[range].fill(0);
        } else {
            let data: Vec<u8> = (0..len).map(|_| random.random()).collect();
            write_payload(image, at, &data).unwrap();
            model[range].copy_from_slice(&data);
        }
        if step % 50 == 49 {
            image.commit().unwrap();
            image.maintain(&|| ()).unwrap();
        }
    }
    model
}

fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

fn output(command: &mut Command) -> Option<Vec<u8>> {
    let out = command.output().ok()?;
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    Some(out.stdout)
}

fn has(program: &str, args: &[&str]) -> bool {
    let there = Command::new(program).args(args).output().is_ok_and(|o| o.status.success());
    if !there {
        println!("SKIPPED: {program} {} does not run here, so images were not read with it", args.join(" "));
    }
    there
}

/// The content as each tool that is here reads it, compared with the model. Returns how many tools agreed.
fn compare(path: &Path, model: &[u8], qemu_knows: bool) -> usize {
    let wanted = hex(Sha256::digest(model));
    let mut readers = 0;
    let driver = if path.extension().is_some_and(|e| e == "vhd") { "vpc" } else { "vhdx" };
    if qemu_knows && has("qemu-img", &["--version"]) {
        let raw = path.with_extension("qemu.raw");
        output(Command::new("qemu-img").args(["convert", "-f", driver, "-O", "raw"]).args([path, &raw]));
        // QEMU may round a VHD's size to its geometry; what lies beyond is zero.
        let mut data = std::fs::read(&raw).unwrap();
        assert!(data.len() >= model.len() && data[model.len()..].iter().all(|b| *b == 0));
        data.truncate(model.len());
        assert!(data == model, "qemu-img reads {} differently", path.display());
        if driver == "vhdx" {
            output(Command::new("qemu-img").args(["check", "-f", driver]).arg(path));
        }
        std::fs::remove_file(raw).unwrap();
        readers += 1;
    }
    if has("7zz", &["i"]) {
        let data = output(Command::new("7zz").args(["x", "-so", "-y"]).arg(path)).unwrap();
        assert_eq!(hex(Sha256::digest(&data)), wanted, "7-Zip reads {} differently", path.display());
        readers += 1;
    }
    if has("/usr/bin/python3", &["-c", "import pyvhdi"]) {
        let said = output(Command::new("/usr/bin/python3").args(["-c", VHDI]).arg(path)).unwrap();
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        assert_eq!(said, format!("{} {wanted}", model.len()), "libvhdi reads {} differently", path.display());
        readers += 1;
    }
    readers
}

fn swap(format: Format, image_type: ImageType, sector: u32, block_size: Option<u32>, qemu_knows: bool) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(format!("disk.{format}"));
    let options = CreateOptions {
        image_type,
        block_size,
        logical_sector_size: sector,
        ..CreateOptions::new(format, if sector == 512 { SIZE } else { SIZE_4K })
    };
    formats::create(&path, &options).unwrap();
    let image = formats::open(&path, &OpenOptions::default()).unwrap();
    let model = fill(&*image, u64::from(sector) + 17);
    image.close().unwrap();
    drop(image);
    assert!(formats::check(&path, None, false).unwrap().is_sound());
    let readers = compare(&path, &model, qemu_knows);
    println!("{format} {image_type}, sectors of {sector}: {readers} other readers agree");
}

#[test]
fn fixed_vhds_read_the_same_everywhere() {
    swap(Format::Vhd, ImageType::Fixed, 512, None, true);
}

#[test]
fn dynamic_vhds_read_the_same_everywhere() {
    swap(Format::Vhd, ImageType::Dynamic, 512, None, true);
    swap(Format::Vhd, ImageType::Dynamic, 512, Some(512 << 10), true);
}

#[test]
fn dynamic_vhdxs_read_the_same_everywhere() {
    swap(Format::Vhdx, ImageType::Dynamic, 512, None, true);
    swap(Format::Vhdx, ImageType::Dynamic, 512, Some(1 << 20), true);
    swap(Format::Vhdx, ImageType::Dynamic, 512, Some(32 << 20), true);
}

#[test]
fn fixed_vhdxs_read_the_same_everywhere() {
    swap(Format::Vhdx, ImageType::Fixed, 512, None, true);
}

#[test]
fn vhdxs_with_large_sectors_read_the_same_where_they_are_known() {
    // QEMU knows sectors of 512 bytes only.
    swap(Format::Vhdx, ImageType::Dynamic, 4096, None, false);
}

#[test]
fn vhdxs_that_qemu_makes_are_read_and_written() {
    if !has("qemu-img", &["--version"]) || !has("qemu-io", &["--version"]) {
        return;
    }
    let run = |program: &str, args: &[&str], path: &Path| {
        output(Command::new(program).args(args).arg(path)).unwrap()
    };
    for (options, size) in [
        ("subformat=dynamic", "96M"),
        ("subformat=dynamic,block_size=1048576", "96M"),
        ("subformat=dynamic,block_size=1048576,log_size=2097152", "9G"),
        ("subformat=fixed", "64M"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("theirs.vhdx");
        let created = Command::new("qemu-img")
            .args(["create", "-q", "-f", "vhdx", "-o", options])
            .arg(&path)
            .arg(size)
            .output();
        assert!(created.unwrap().status.success());
        run("qemu-io", &["-f", "vhdx", "-c", "write -P 0x77 5M 3M"], &path);
        let image = formats::open(&path, &OpenOptions::default()).unwrap();
        let mut read = vec![0; 3 << 20];
        formats::read_payload(&*image, 5 << 20, &mut read).unwrap();
        assert!(read.iter().all(|b| *b == 0x77), "{options}");
        write_payload(&*image, 6 << 20, &vec![0x11; 4 << 20]).unwrap();
        zero_payload(&*image, 5 << 20, 512, ZeroMode::Unmap).unwrap();
        image.close().unwrap();
        drop(image);
        run("qemu-img", &["check", "-q", "-f", "vhdx"], &path);
        // And on: QEMU reads what was written here, and adds to it.
        for c in ["read -P 0x0 5M 512", "read -P 0x11 6M 4M", "write -P 0x55 30M 64k", "read -P 0x0 40M 1M"] {
            run("qemu-io", &["-f", "vhdx", "-c", c], &path);
        }
        let image = formats::open(&path, &OpenOptions::default()).unwrap();
        let mut read = vec![0; 64 << 10];
        formats::read_payload(&*image, 30 << 20, &mut read).unwrap();
        assert!(read.iter().all(|b| *b == 0x55), "{options}");
        drop(image);
        assert!(formats::check(&path, None, false).unwrap().is_sound());
    }
}
