//! Images by path: which format, whose file, what is made and what is left behind.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use formats::{
    CreateOptions, ErrorKind, Format, Image, ImageState, ImageType, OpenError, OpenOptions, check, create,
    info, open,
};
use formats_tests::{read_payload, write_payload};
use tempfile::TempDir;

const SIZE: u64 = 8 << 20;

/// Whether VHDX can be made by path in this build.
fn has_vhdx() -> bool {
    let folder = TempDir::new().unwrap();
    let made = create(folder.path().join("probe.vhdx"), &CreateOptions::new(Format::Vhdx, SIZE));
    let there = !made.is_err_and(|e| e.kind == ErrorKind::Unsupported);
    if !there {
        println!("SKIPPED: VHDX is not in this build, so the cases with it were left out");
    }
    there
}

fn made(folder: &TempDir, name: &str, format: Format) -> PathBuf {
    let path = folder.path().join(name);
    create(&path, &CreateOptions::new(format, SIZE)).unwrap();
    path
}

fn kind(result: Result<Arc<dyn Image>, OpenError>) -> ErrorKind {
    result.expect_err("must be refused").kind
}

#[test]
fn each_format_is_made_opened_and_described() {
    let folder = TempDir::new().unwrap();
    for (name, format) in [("a.raw", Format::Raw), ("a.vhd", Format::Vhd), ("a.vhdx", Format::Vhdx)] {
        if format == Format::Vhdx && !has_vhdx() {
            continue;
        }
        let path = made(&folder, name, format);
        let image = open(&path, &OpenOptions::default()).unwrap();
        assert_eq!((image.format(), image.geometry().virtual_size), (format, SIZE));
        write_payload(&*image, 4096, &[5; 4096]).unwrap();
        image.close().unwrap();
        drop(image);
        let image = open(&path, &OpenOptions::read_only()).unwrap();
        assert_eq!(read_payload(&*image, 4096, 4096).unwrap(), [5; 4096]);
        assert_eq!(write_payload(&*image, 0, &[0; 4096]).unwrap_err().kind, ErrorKind::ReadOnly);
        let info = info(&path, None).unwrap();
        assert_eq!((info.format, info.virtual_size, info.state), (format, SIZE, ImageState::Clean));
        assert_eq!(info.file_size, std::fs::metadata(&path).unwrap().len());
        assert!(info.disk_usage < SIZE / 2 + (4 << 20), "{info:?}");
        assert!(!info.in_use);
        assert!(check(&path, None, false).unwrap().findings.is_empty());
        let json = serde_json::to_value(&info).unwrap();
        assert_eq!(json["format"], name.rsplit_once('.').unwrap().1);
    }
}

#[test]
fn an_image_that_is_open_for_writing_is_refused_to_others() {
    let folder = TempDir::new().unwrap();
    let path = made(&folder, "a.vhd", Format::Vhd);
    let image = open(&path, &OpenOptions::default()).unwrap();
    assert_eq!(kind(open(&path, &OpenOptions::default())), ErrorKind::Locked);
    let e = open(&path, &OpenOptions::read_only()).unwrap_err();
    assert_eq!(e.kind, ErrorKind::Locked);
    assert!(e.to_string().starts_with(path.to_str().unwrap()), "{e}");
    assert_eq!(check(&path, None, false).unwrap_err().kind, ErrorKind::Locked);
    assert!(info(&path, None).unwrap().in_use);
    let unlocked = OpenOptions { lock: false, ..OpenOptions::read_only() };
    drop(open(&path, &unlocked).unwrap());
    assert_eq!(
        kind(open(&path, &OpenOptions::default())),
        ErrorKind::Locked,
        "closing another does not unlock"
    );
    drop(image);
    let first = open(&path, &OpenOptions::read_only()).unwrap();
    let second = open(&path, &OpenOptions::read_only()).unwrap();
    assert_eq!(kind(open(&path, &OpenOptions::default())), ErrorKind::Locked, "readers keep writers off");
    assert!(!info(&path, None).unwrap().in_use);
    drop((first, second));
    drop(open(&path, &OpenOptions::default()).unwrap());
}

#[test]
fn the_name_decides_and_content_is_never_believed() {
    let folder = TempDir::new().unwrap();
    let vhd = made(&folder, "a.vhd", Format::Vhd);
    let content = std::fs::read(&vhd).unwrap();
    let forged = |name: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, &content).unwrap();
        path
    };
    let raw = forged("guest.raw");
    assert_eq!(open(&raw, &OpenOptions::default()).unwrap().format(), Format::Raw);
    let nameless = forged("guest");
    let e = open(&nameless, &OpenOptions::default()).unwrap_err();
    assert_eq!(e.kind, ErrorKind::WrongFormat);
    assert!(e.message.contains("--format vhd"), "{e}");
    assert_eq!(info(&nameless, None).unwrap_err().kind, ErrorKind::WrongFormat);
    for format in [Format::Raw, Format::Vhd] {
        let said = OpenOptions { format: Some(format), ..OpenOptions::default() };
        assert_eq!(open(&nameless, &said).unwrap().format(), format);
    }
    // Signatures at the very end count too, and those of VHDX.
    let tail = folder.path().join("tail");
    let file = File::create(&tail).unwrap();
    file.set_len(1 << 20).unwrap();
    file.write_all_at(b"conectix", (1 << 20) - 512).unwrap();
    assert_eq!(kind(open(&tail, &OpenOptions::default())), ErrorKind::WrongFormat);
    file.write_all_at(&[0; 8], (1 << 20) - 512).unwrap();
    assert_eq!(open(&tail, &OpenOptions::default()).unwrap().format(), Format::Raw);
    file.write_all_at(b"vhdxfile", 0).unwrap();
    assert_eq!(kind(open(&tail, &OpenOptions::default())), ErrorKind::WrongFormat);
}

#[test]
fn what_is_no_image_is_refused_without_waiting() {
    let folder = TempDir::new().unwrap();
    let fifo = folder.path().join("fifo.raw");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let expected = [
        (fifo.as_path(), ErrorKind::Unsupported),
        (folder.path(), ErrorKind::Unsupported),
        (Path::new("/dev/zero"), ErrorKind::Unsupported),
        (Path::new("/nonexistent/disk.vhd"), ErrorKind::Io),
    ];
    for (path, expected) in expected {
        assert_eq!(kind(open(path, &OpenOptions::read_only())), expected, "{}", path.display());
        assert_eq!(info(path, Some(Format::Raw)).unwrap_err().kind, expected, "{}", path.display());
    }
    let text = folder.path().join("text.vhd");
    std::fs::write(&text, "no image").unwrap();
    let e = open(&text, &OpenOptions::default()).unwrap_err();
    assert_eq!(e.kind, ErrorKind::Corrupt);
    assert!(e.to_string().contains("text.vhd: no valid footer"), "{e}");
}

#[test]
fn creating_overwrites_nothing_and_leaves_nothing_behind() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.vhd");
    std::fs::write(&path, "precious").unwrap();
    let e = create(&path, &CreateOptions::new(Format::Vhd, SIZE)).unwrap_err();
    assert!(e.to_string().contains("already"), "{e}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    let wrong = [
        CreateOptions::new(Format::Vhd, 1000),
        CreateOptions::new(Format::Vhd, 3 << 40),
        CreateOptions::new(Format::Raw, 1000),
        CreateOptions::new(Format::Vhdx, 1000),
        CreateOptions::new(Format::Vhdx, 65 << 40),
        CreateOptions { logical_sector_size: 1024, ..CreateOptions::new(Format::Vhdx, SIZE) },
        CreateOptions { block_size: Some(1 << 20), ..CreateOptions::new(Format::Raw, SIZE) },
        CreateOptions { image_type: ImageType::Differencing, ..CreateOptions::new(Format::Raw, SIZE) },
        CreateOptions { logical_sector_size: 4096, ..CreateOptions::new(Format::Vhd, SIZE) },
        CreateOptions { logical_sector_size: 4096, ..CreateOptions::new(Format::Raw, SIZE) },
    ];
    let vhdx = has_vhdx();
    for options in wrong.into_iter().filter(|o| vhdx || o.format != Format::Vhdx) {
        let path = folder.path().join("new");
        let e = create(&path, &options).unwrap_err();
        assert_eq!(e.kind, ErrorKind::InvalidParameter, "{options:?}: {e}");
        assert!(!path.exists(), "{options:?} left a file");
    }
}

#[test]
fn an_unfinished_move_target_says_so() {
    let folder = TempDir::new().unwrap();
    let path = made(&folder, "disk.vhd.incomplete-42ab", Format::Vhd);
    let info = info(&path, None).unwrap();
    assert_eq!((info.format, info.incomplete_move.as_deref()), (Format::Vhd, Some("42ab")));
    assert_eq!(serde_json::to_value(&info).unwrap()["incomplete_move"], "42ab");
}

#[test]
fn a_lost_footer_is_told_and_repaired() {
    let folder = TempDir::new().unwrap();
    let path = made(&folder, "a.vhd", Format::Vhd);
    let image = open(&path, &OpenOptions::default()).unwrap();
    write_payload(&*image, 0, &[8; 512]).unwrap();
    image.close().unwrap();
    drop(image);
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 512).unwrap();
    assert_eq!(info(&path, None).unwrap().state, ImageState::NeedsRepair);
    let e = open(&path, &OpenOptions::default()).unwrap_err();
    assert_eq!(e.kind, ErrorKind::NeedsRepair);
    assert!(!check(&path, None, false).unwrap().is_sound());
    let recovered = open(&path, &OpenOptions { recover: true, ..OpenOptions::default() }).unwrap();
    assert_eq!(read_payload(&*recovered, 0, 512).unwrap(), [8; 512]);
    drop(recovered);
    assert!(check(&path, None, true).unwrap().is_sound());
    assert_eq!(info(&path, None).unwrap().state, ImageState::Clean);
}
