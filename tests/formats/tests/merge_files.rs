//! What merging does with the files of a chain that is in use: their locks, their ids, and what they read as meanwhile.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use formats::{
    CreateOptions, ErrorKind, Format, Image, MergeChain, OpenOptions, create, create_over, open, share,
};
use formats_tests::{read_payload, write_payload, zero_payload};
use tempfile::TempDir;

const SIZE: u64 = 8 << 20;
const MIB: u64 = 1 << 20;

struct Folder {
    dir: TempDir,
    paths: Vec<PathBuf>,
}

impl Folder {
    /// A chain of so many images, of which each has MiB `n` of its own, the base being 0. Closed.
    fn new(format: Format, images: usize) -> Self {
        let dir = TempDir::new().unwrap();
        let path = |n: usize| dir.path().join(format!("{n}.{format}"));
        create(path(0), &CreateOptions { block_size: Some(2 << 20), ..CreateOptions::new(format, SIZE) })
            .unwrap();
        let mut image = open(path(0), &OpenOptions::default()).unwrap();
        for n in 0..images {
            if n > 0 {
                let next =
                    create_over(path(n), &image, path(n - 1), Some(&dir.path().join("notes"))).unwrap();
                image.close().unwrap();
                share(&*image).unwrap();
                image = next;
            }
            write_payload(&*image, n as u64 * MIB, &[n as u8 + 1; 4096]).unwrap();
        }
        image.close().unwrap();
        let paths = (0..images).rev().map(path).collect();
        Self { dir, paths }
    }

    fn open(&self) -> Arc<dyn Image> {
        let options = OpenOptions {
            parents: vec![self.dir.path().to_path_buf()],
            notes_dir: Some(self.dir.path().join("notes")),
            ..OpenOptions::default()
        };
        open(&self.paths[0], &options).unwrap()
    }
}

fn check(image: &dyn Image, images: usize) {
    for n in 0..images {
        let read = read_payload(image, n as u64 * MIB, 4096).unwrap();
        assert_eq!(read, [n as u8 + 1; 4096], "of image {n}");
    }
}

#[test]
fn a_parent_is_never_without_a_lock_while_a_merge_asks_for_it() {
    let folder = Folder::new(Format::Vhdx, 2);
    let image = folder.open();
    let notes = folder.dir.path().join("notes");
    let base = &folder.paths[1];
    let stolen = AtomicBool::new(false);
    for _ in 0..6 {
        let reader = open(base, &OpenOptions::read_only()).unwrap();
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    stolen.fetch_or(open(base, &OpenOptions::default()).is_ok(), Ordering::Relaxed);
                }
            });
            let files = scope.spawn(|| {
                let chain = image.as_chain().unwrap();
                let merge = MergeChain { chain, paths: &folder.paths, levels: 1, notes_dir: Some(&notes) };
                merge.take_files().map(drop)
            });
            std::thread::sleep(Duration::from_millis(25));
            drop(reader);
            let files = files.join().unwrap();
            std::thread::sleep(Duration::from_millis(30));
            ended.store(true, Ordering::Relaxed);
            assert!(files.is_ok_and(|()| true) || stolen.load(Ordering::Relaxed), "the parent was free");
        });
        assert!(!stolen.load(Ordering::Relaxed), "somebody opened the parent of a chain in use for writing");
    }
    check(&*image, 2);
}

fn merge_and_break_off(format: Format, images: usize, levels: usize) {
    let folder = Folder::new(format, images);
    let notes = folder.dir.path().join("notes");
    let image = folder.open();
    check(&*image, images);
    let merge_of = |image: &Arc<dyn Image>| {
        let image = image.clone();
        let (paths, notes) = (folder.paths.clone(), notes.clone());
        move |then: &mut dyn FnMut(MergeChain<'_>)| {
            let chain = image.as_chain().unwrap();
            then(MergeChain { chain, paths: &paths, levels, notes_dir: Some(&notes) });
        }
    };
    let mut sides = None;
    merge_of(&image)(&mut |merge| {
        let files = merge.take_files().unwrap();
        image.close().unwrap();
        sides = Some(merge.open(files).unwrap());
    });
    let sides = sides.unwrap();
    drop(image);
    check(&*sides.chain, images);
    // Everybody else is kept off both.
    for path in &folder.paths[..=levels] {
        let locked =
            open(path, &OpenOptions { parents: vec![folder.dir.path().into()], ..OpenOptions::read_only() });
        if path == &folder.paths[0] || path == &folder.paths[levels] {
            assert_eq!(locked.unwrap_err().kind, ErrorKind::Locked, "{}", path.display());
        }
    }
    // The merge copies something, the guest writes and discards something else.
    for n in images - levels..images {
        let read = read_payload(&*sides.chain, n as u64 * MIB, 4096).unwrap();
        write_payload(&*sides.target, n as u64 * MIB, &read).unwrap();
    }
    write_payload(&*sides.chain, 6 * MIB + 512, &[77; 1024]).unwrap();
    zero_payload(&*sides.chain, 0, 4096, formats::ZeroMode::Unmap).unwrap();
    let after = |image: &dyn Image| {
        assert_eq!(read_payload(image, 0, 4096).unwrap(), [0; 4096]);
        assert_eq!(read_payload(image, 6 * MIB + 512, 1024).unwrap(), [77; 1024]);
        for n in 1..images {
            assert_eq!(
                read_payload(image, n as u64 * MIB, 4096).unwrap(),
                [n as u8 + 1; 4096],
                "of image {n}"
            );
        }
    };
    after(&*sides.chain);
    // Killed in the middle of it: the chain opens as it is.
    if images == 3 {
        drop(sides);
        let image = folder.open();
        after(&*image);
        image.close().unwrap();
        return;
    }
    let chain = sides.chain.clone();
    sides.chain.close().unwrap();
    sides.target.close().unwrap();
    let mut image = None;
    merge_of(&chain)(&mut |merge| image = Some(merge.give_up().unwrap()));
    drop((sides, chain));
    let image = image.unwrap();
    after(&*image);
    write_payload(&*image, 7 * MIB, &[9; 512]).unwrap();
    image.close().unwrap();
    drop(image);
    let image = folder.open();
    after(&*image);
    image.close().unwrap();
}

#[test]
fn a_merge_that_is_given_up_or_killed_leaves_the_chain_as_it_reads() {
    for format in [Format::Vhdx, Format::Vhd] {
        for (images, levels) in [(2, 1), (3, 1), (3, 2), (4, 2), (4, 3)] {
            merge_and_break_off(format, images, levels);
        }
    }
}

/// What is asked of a parent that somebody else reads.
#[test]
fn a_merge_into_a_parent_that_others_read_is_refused_and_changes_nothing() {
    let folder = Folder::new(Format::Vhdx, 2);
    let notes = folder.dir.path().join("notes");
    let image = folder.open();
    let reader = open(&folder.paths[1], &OpenOptions::read_only()).unwrap();
    let chain = image.as_chain().unwrap();
    let merge = MergeChain { chain, paths: &folder.paths, levels: 1, notes_dir: Some(&notes) };
    let start = Instant::now();
    assert_eq!(merge.take_files().unwrap_err().kind, ErrorKind::Locked);
    assert!(start.elapsed() < Duration::from_secs(20));
    drop(reader);
    assert_eq!(open(&folder.paths[1], &OpenOptions::default()).unwrap_err().kind, ErrorKind::Locked);
    drop(merge.take_files().unwrap());
    assert_eq!(open(&folder.paths[1], &OpenOptions::default()).unwrap_err().kind, ErrorKind::Locked);
    open(&folder.paths[1], &OpenOptions::read_only()).unwrap();
    check(&*image, 2);
}

#[test]
fn a_power_cut_that_loses_the_growth_of_a_merges_target_leaves_a_chain_that_opens() {
    let folder = Folder::new(Format::Vhdx, 2);
    let notes = folder.dir.path().join("notes");
    let image = folder.open();
    let before = std::fs::metadata(&folder.paths[1]).unwrap().len();
    let chain = image.as_chain().unwrap();
    let merge = MergeChain { chain, paths: &folder.paths, levels: 1, notes_dir: Some(&notes) };
    let files = merge.take_files().unwrap();
    image.close().unwrap();
    let sides = merge.open(files).unwrap();
    // A block that the target has not, so its file grows; nothing is synced after that.
    write_payload(&*sides.target, 7 * MIB, &[1; 4096]).unwrap();
    drop((sides, image));
    // The log reached the disk, the new size did not.
    let base = std::fs::File::options().write(true).open(&folder.paths[1]).unwrap();
    assert!(base.metadata().unwrap().len() > before);
    base.set_len(before).unwrap();
    drop(base);
    let image = folder.open();
    check(&*image, 2);
    assert!(image.files().iter().all(|file| file.file().is_some()), "it can be served");
}
