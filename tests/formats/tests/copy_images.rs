//! Copying and comparing images: content, sparseness and sizes, from every format to every other.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use formats::{
    AllocState, Comparison, CopyError, CopyProgress, CreateOptions, ErrorKind, Format, Image, ImageType,
    OpenOptions, compare, copy, create, open,
};
use formats_tests::{read_payload, write_payload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

const SIZE: u64 = 96 << 20;

/// All kinds of images: name and how it is made.
fn kinds() -> Vec<(String, CreateOptions)> {
    let of = |format, image_type, block_size, sector| {
        let base = CreateOptions::new(format, SIZE);
        let options = CreateOptions { image_type, block_size, logical_sector_size: sector, ..base };
        (format!("{format}-{image_type}-{sector}.{format}"), options)
    };
    let mut kinds = vec![
        of(Format::Raw, ImageType::Fixed, None, 512),
        of(Format::Vhd, ImageType::Fixed, None, 512),
        of(Format::Vhd, ImageType::Dynamic, Some(512 << 10), 512),
        of(Format::Vhdx, ImageType::Fixed, None, 512),
        of(Format::Vhdx, ImageType::Dynamic, Some(1 << 20), 512),
        of(Format::Vhdx, ImageType::Dynamic, Some(1 << 20), 4096),
    ];
    let vhdx = has_vhdx();
    kinds.retain(|(_, options)| vhdx || options.format != Format::Vhdx);
    kinds
}

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

fn made(folder: &TempDir, name: &str, options: &CreateOptions) -> (PathBuf, Arc<dyn Image>) {
    let path = folder.path().join(name);
    create(&path, options).unwrap();
    let image = open(&path, &OpenOptions::default()).unwrap();
    (path, image)
}

fn go_on(_: CopyProgress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn compared(a: &dyn Image, b: &dyn Image) -> Comparison {
    compare(a, b, &mut go_on).unwrap()
}

/// Writes runs of content, of written zeroes, and of 4 KiB islands; 7 MiB in all.
fn fill(image: &dyn Image) {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut data = vec![0; 3 << 20];
    rng.fill(&mut data[..]);
    write_payload(image, 0, &data[..4096]).unwrap();
    write_payload(image, (10 << 20) - 8192, &data).unwrap();
    write_payload(image, 40 << 20, &vec![0; 2 << 20]).unwrap();
    for n in 0..20u64 {
        write_payload(image, (50 << 20) + n * (1 << 20) + 4096 * n, &data[..4096]).unwrap();
    }
    write_payload(image, SIZE - 4096, &data[4096..8192]).unwrap();
}

fn usage(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn every_format_is_copied_to_every_other_with_its_content_and_its_holes() {
    let folder = TempDir::new().unwrap();
    for (source_name, source_options) in kinds() {
        let (source_path, source) = made(&folder, &format!("from-{source_name}"), &source_options);
        fill(&*source);
        source.commit().unwrap();
        for (target_name, target_options) in kinds() {
            let (path, target) = made(&folder, &format!("to-{target_name}"), &target_options);
            let mut last = CopyProgress::default();
            let outcome = copy(&*source, &*target, &mut |p| {
                assert!(p.bytes_done >= last.bytes_done && p.bytes_total == SIZE);
                last = p;
                ControlFlow::Continue(())
            })
            .unwrap();
            let names = format!("{source_name} to {target_name}");
            assert_eq!(last.bytes_done, SIZE, "{names}");
            assert_eq!(outcome.bytes_copied + outcome.bytes_zero, SIZE, "{names}");
            assert!(outcome.bytes_copied <= 5 << 20, "{names}: {outcome:?}");
            target.close().unwrap();
            drop(target);
            let target = open(&path, &OpenOptions::read_only()).unwrap();
            assert!(compared(&*source, &*target).is_same(), "{names}");
            assert!(formats::check(&path, None, false).unwrap().is_sound(), "{names}");
            let room = usage(&source_path) + (6 << 20);
            assert!(usage(&path) <= room, "{names}: takes {} of {room}", usage(&path));
            drop(target);
            std::fs::remove_file(&path).unwrap();
        }
        drop(source);
        std::fs::remove_file(&source_path).unwrap();
    }
}

#[test]
fn a_comparison_finds_the_first_difference_wherever_it_is() {
    let folder = TempDir::new().unwrap();
    let (_, a) = made(&folder, "a.raw", &CreateOptions::new(Format::Raw, SIZE));
    let (_, b) = made(&folder, "b.vhd", &CreateOptions::new(Format::Vhd, SIZE));
    assert!(compared(&*a, &*b).is_same());
    fill(&*a);
    fill(&*b);
    assert!(compared(&*a, &*b).is_same());
    // From the end towards the start, so that each is found before those of earlier rounds.
    for at in [SIZE - 512, 60 << 20, (33 << 20) - 512, 33 << 20, 16 << 20, 512, 0] {
        let mut sector = read_payload(&*a, at, 512).unwrap();
        sector[100] ^= 0x40;
        write_payload(&*a, at, &sector).unwrap();
        let expected = at + 100;
        for (x, y) in [(&a, &b), (&b, &a)] {
            let found = compared(&**x, &**y).first_difference.unwrap();
            assert!(found == expected || found < expected && at == 33 << 20, "{found} instead of {expected}");
        }
    }
}

#[test]
fn what_one_disk_lacks_in_size_counts_as_zeroes() {
    let folder = TempDir::new().unwrap();
    let (_, small) = made(&folder, "small.vhd", &CreateOptions::new(Format::Vhd, (1 << 20) + 512));
    let (_, large) = made(&folder, "large.raw", &CreateOptions::new(Format::Raw, 20 << 20));
    write_payload(&*small, 1 << 20, &[3; 512]).unwrap();
    write_payload(&*large, 1 << 20, &[3; 512]).unwrap();
    let same = compared(&*small, &*large);
    assert_eq!((same.first_difference, same.sizes), (None, ((1 << 20) + 512, 20 << 20)));
    assert!(!same.is_same(), "the sizes differ");
    write_payload(&*large, (20 << 20) - 512, &[1; 512]).unwrap();
    assert_eq!(compared(&*small, &*large).first_difference, Some((20 << 20) - 512));
    assert_eq!(compared(&*large, &*small).first_difference, Some((20 << 20) - 512));
}

#[test]
fn a_disk_that_ends_inside_a_large_sector_is_copied_whole() {
    if !has_vhdx() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let size = (3 << 20) + 1536;
    let (_, source) = made(&folder, "a.raw", &CreateOptions::new(Format::Raw, size));
    write_payload(&*source, size - 512, &[9; 512]).unwrap();
    write_payload(&*source, 5 * 512, &[8; 512]).unwrap();
    let options = CreateOptions {
        logical_sector_size: 4096,
        ..CreateOptions::new(Format::Vhdx, size.next_multiple_of(4096))
    };
    let (_, target) = made(&folder, "b.vhdx", &options);
    copy(&*source, &*target, &mut go_on).unwrap();
    let compared = compared(&*source, &*target);
    assert_eq!(compared.first_difference, None, "{compared:?}");
    assert_eq!(read_payload(&*target, 0, 4096).unwrap()[2560..3072], [8; 512]);
}

#[test]
fn a_target_that_is_too_small_is_refused_before_anything_is_written() {
    let folder = TempDir::new().unwrap();
    let (_, source) = made(&folder, "a.raw", &CreateOptions::new(Format::Raw, 2 << 20));
    let (_, target) = made(&folder, "b.vhd", &CreateOptions::new(Format::Vhd, 1 << 20));
    fill_start(&*source);
    match copy(&*source, &*target, &mut go_on) {
        Err(CopyError::Target(e)) => assert_eq!(e.kind, ErrorKind::InvalidParameter, "{e}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(target.next_extent(0).unwrap().unwrap().state, AllocState::Absent);
}

fn fill_start(image: &dyn Image) {
    write_payload(image, 0, &vec![1; 1 << 20]).unwrap();
}

#[test]
fn a_copy_and_a_comparison_end_when_told_to() {
    let folder = TempDir::new().unwrap();
    let (_, source) = made(&folder, "a.raw", &CreateOptions::new(Format::Raw, 64 << 20));
    for n in 0..64 {
        write_payload(&*source, n << 20, &vec![1; 1 << 20]).unwrap();
    }
    let (_, target) = made(&folder, "b.vhd", &CreateOptions::new(Format::Vhd, 64 << 20));
    let mut calls = 0;
    let mut stop = |_| {
        calls += 1;
        if calls == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    assert!(matches!(copy(&*source, &*target, &mut stop), Err(CopyError::Cancelled)));
    assert_eq!(calls, 3);
    let mut stop = |_| ControlFlow::Break(());
    assert!(matches!(compare(&*source, &*source, &mut stop), Err(CopyError::Cancelled)));
}

#[test]
fn what_somebody_cut_off_a_file_is_an_error_and_never_zeroes() {
    let folder = TempDir::new().unwrap();
    let (path, source) = made(&folder, "a.raw", &CreateOptions::new(Format::Raw, 8 << 20));
    fill_start(&*source);
    write_payload(&*source, 7 << 20, &[1; 512]).unwrap();
    let (_, target) = made(&folder, "b.vhd", &CreateOptions::new(Format::Vhd, 8 << 20));
    // The file shrinks behind the map's back: an error, and no crash.
    std::fs::File::options().write(true).open(&path).unwrap().set_len(512 << 10).unwrap();
    assert!(matches!(copy(&*source, &*target, &mut go_on), Err(CopyError::Source(_))));
    assert!(matches!(compare(&*target, &*source, &mut go_on), Err(CopyError::Target(_))));
}
