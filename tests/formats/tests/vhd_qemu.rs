//! VHDs are swapped both ways with QEMU's tools, where they are installed.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use formats::{CreateOptions, ErrorKind, Format, Image, ImageType, OpenOptions};
use formats_tests::{read_payload, write_payload};
use tempfile::TempDir;

fn has_qemu() -> bool {
    let there =
        ["qemu-img", "qemu-io"].iter().all(|tool| Command::new(tool).arg("--version").output().is_ok());
    if !there {
        println!("SKIPPED: qemu-img and qemu-io are not on the PATH, so nothing was swapped with QEMU");
    }
    there
}

fn qemu(args: &[&str], paths: &[&Path]) -> Output {
    Command::new(args[0]).args(&args[1..]).args(paths).output().unwrap()
}

fn ok(args: &[&str], paths: &[&Path]) -> String {
    let out = qemu(args, paths);
    assert!(out.status.success(), "{args:?} {paths:?}: {out:?}");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Where a test writes on a disk, and what: at its ends, across blocks, in the middle.
fn places(size: u64) -> Vec<(u64, Vec<u8>)> {
    let block = 2 << 20;
    let middle = size / 2 / 512 * 512;
    [(0, 4096), (block - 1024, 2048), (middle, 512), (3 * block + 512, 65536), (size - 512, 512)]
        .into_iter()
        .enumerate()
        .map(|(n, (at, len))| (at, vec![n as u8 + 1; len]))
        .collect()
}

fn write_places(image: &dyn Image) {
    for (at, data) in places(image.geometry().virtual_size) {
        write_payload(image, at, &data).unwrap();
    }
}

fn assert_places(image: &dyn Image) {
    for (at, data) in places(image.geometry().virtual_size) {
        assert_eq!(read_payload(image, at, data.len()).unwrap(), data, "at {at}");
    }
}

/// A raw file of the same content, made without any of the code under test but reading.
fn raw_twin(folder: &TempDir, size: u64) -> PathBuf {
    use std::os::unix::fs::FileExt;
    let path = folder.path().join("twin.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(size).unwrap();
    for (at, data) in places(size) {
        file.write_all_at(&data, at).unwrap();
    }
    path
}

#[test]
fn qemu_reads_what_was_written_here() {
    if !has_qemu() {
        return;
    }
    // The largest is beyond the geometry field, which QEMU once took for the size.
    for (image_type, size) in [
        (ImageType::Dynamic, 64 << 20),
        (ImageType::Dynamic, (10 << 20) + 512),
        (ImageType::Dynamic, 200 << 30),
        (ImageType::Fixed, (16 << 20) + 512),
    ] {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("ours.vhd");
        let options = CreateOptions { image_type, ..CreateOptions::new(Format::Vhd, size) };
        formats::create(&path, &options).unwrap();
        let image = formats::open(&path, &OpenOptions::default()).unwrap();
        write_places(&*image);
        image.commit().unwrap();
        let refused = qemu(&["qemu-img", "info", "-f", "vpc"], &[&path]);
        assert!(!refused.status.success(), "QEMU must not open an image that is in use");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("lock"));
        drop(image);
        // As a crash leaves it, and closed in order.
        for closed in [false, true] {
            if closed {
                formats::open(&path, &OpenOptions::default()).unwrap().close().unwrap();
            }
            let info = ok(&["qemu-img", "info", "-f", "vpc", "--output", "json"], &[&path]);
            let info: serde_json::Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["virtual-size"], size, "{image_type}, {size}");
            let twin = raw_twin(&folder, size);
            ok(&["qemu-img", "compare", "-f", "vpc", "-F", "raw"], &[&path, &twin]);
        }
    }
}

#[test]
fn what_qemu_made_is_written_here_and_read_there() {
    if !has_qemu() {
        return;
    }
    for (subformat, size) in [("dynamic", 64u64 << 20), ("fixed", 16 << 20), ("dynamic", 1 << 40)] {
        for force in ["on", "off"] {
            if force == "off" && size > 100 << 30 {
                continue; // beyond what its geometry can say
            }
            let folder = TempDir::new().unwrap();
            let path = folder.path().join("theirs.vhd");
            let options = format!("subformat={subformat},force_size={force}");
            ok(
                &["qemu-img", "create", "-q", "-f", "vpc", "-o", &options],
                &[&path, Path::new(&size.to_string())],
            );
            ok(&["qemu-io", "-f", "vpc", "-c", "write -P 0x77 5M 1M"], &[&path]);
            let image = formats::open(&path, &OpenOptions::default()).unwrap();
            let size = image.geometry().virtual_size;
            assert_eq!(read_payload(&*image, 5 << 20, 1 << 20).unwrap(), vec![0x77; 1 << 20]);
            write_payload(&*image, 5 << 20, &vec![0; 1 << 20]).unwrap();
            write_places(&*image);
            image.close().unwrap();
            drop(image);
            let twin = raw_twin(&folder, size);
            ok(&["qemu-img", "compare", "-f", "vpc", "-F", "raw"], &[&path, &twin]);
            // And on: QEMU adds a block to what was written here.
            ok(&["qemu-io", "-f", "vpc", "-c", "write -P 0x55 9M 64k"], &[&path]);
            let image = formats::open(&path, &OpenOptions::default()).unwrap();
            assert_places(&*image);
            assert_eq!(read_payload(&*image, 9 << 20, 65536).unwrap(), vec![0x55; 65536]);
            assert!(formats::check(&path, None, false).is_err_and(|e| e.kind == ErrorKind::Locked));
            drop(image);
            let report = formats::check(&path, None, false).unwrap();
            assert!(report.is_sound(), "{report:?}");
        }
    }
}
