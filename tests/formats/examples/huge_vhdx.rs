//! Measures what it takes to open and to use the largest VHDX that there can be: 64 TiB in blocks of 1 MiB, empty, and with every
//! entry of its table of 513 MiB naming a block; and what finding a block takes there and in a small image, as long as its part of
//! the table is in memory.
//!
//! ```text
//!   cargo run --release -p formats-tests --example huge_vhdx [FOLDER]
//! ```
//!
//! The folder (/dev/shm) has to be on a file system with files of more than 64 TiB, such as tmpfs or XFS, and half a gibibyte of
//! room. Each opening is done by a process of its own, which prints its time and the most memory that it had. The run fails where
//! that is [`MEMORY_MAX`] or more.
#![allow(clippy::unwrap_used, reason = "what fails here fails the run")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use formats::{ByteSpan, CreateOptions, Format, Image, OpenOptions, Pieces};

const MIB: u64 = 1 << 20;
const BLOCKS: u64 = 64 << 20;
/// Payload blocks between two sector bitmaps in the table.
const CHUNK: u64 = 4096;
/// What an image of 64 TiB may take, with all of the process, in KiB.
const MEMORY_MAX: u64 = 64 << 10;
/// Reads, or first writes, all over the disk.
const READS: u64 = 100_000;
/// Rounds of [`LOOKUPS`] lookups, of which the fastest counts: others use the processor too.
const ROUNDS: usize = 15;
const LOOKUPS: u64 = 1_000_000;
/// A disk whose table is small, in bytes: 64 pages of 4 KiB.
const SMALL: u64 = 64 * 512 * MIB;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let [_, path, how] = &args[..] {
        return measure(Path::new(path), how);
    }
    let folder = args.get(1).map_or("/dev/shm", String::as_str);
    let folder = tempfile::tempdir_in(folder).unwrap();
    let path = folder.path().join("huge.vhdx");
    let options =
        CreateOptions { block_size: Some(MIB as u32), ..CreateOptions::new(Format::Vhdx, BLOCKS * MIB) };
    formats::create(&path, &options).unwrap();
    open_in_processes("empty", &path, &["for reading", "for writing"]);
    open_in_processes("empty", &path, &["and filled"]);
    fill_table(&path);
    open_in_processes("every block with a place", &path, &["for reading", "for writing"]);
    print!("finding one of 32768 blocks whose entries are in memory, in an image of 64 TiB: ");
    time_lookups(&path);
    let small = folder.path().join("small.vhdx");
    formats::create(&small, &CreateOptions { virtual_size: SMALL, ..options }).unwrap();
    let image = formats::open(&small, &OpenOptions::default()).unwrap();
    (0..SMALL / MIB).for_each(|block| map(&*image, block, &mut Pieces::new(), true));
    image.close().unwrap();
    drop(image);
    print!("in an image of {} GiB: ", SMALL >> 30);
    time_lookups(&small);
}

fn map(image: &dyn Image, block: u64, out: &mut Pieces, write: bool) {
    let span = ByteSpan::new(block * MIB, 4096);
    if write { image.map_write(span, out) } else { image.map_read(span, out) }.unwrap();
}

/// Looks blocks up all over the first pages of the table.
fn time_lookups(path: &Path) {
    let image = formats::open(path, &OpenOptions { read_only: true, ..OpenOptions::default() }).unwrap();
    let mut pieces = Pieces::new();
    let blocks = SMALL / MIB;
    (0..blocks).for_each(|block| map(&*image, block, &mut Pieces::new(), false));
    let mut round = |stride: u64| {
        let begun = Instant::now();
        for n in 0..LOOKUPS {
            pieces.clear();
            map(&*image, n * stride % blocks, &mut pieces, false);
        }
        begun.elapsed().as_secs_f64() * 1e9 / LOOKUPS as f64
    };
    let mut fastest = |stride| (0..ROUNDS).map(|_| round(stride)).fold(f64::MAX, f64::min);
    println!("one block {:.1} ns, another page each time {:.1} ns", fastest(0), fastest(521));
}

fn open_in_processes(what: &str, path: &Path, how: &[&str]) {
    for how in how {
        let done = Command::new(std::env::current_exe().unwrap()).arg(path).arg(how).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        print!("{what}, {how}: {}", String::from_utf8_lossy(&done.stdout));
    }
}

fn measure(path: &Path, how: &str) {
    let before = peak_kib();
    let begun = Instant::now();
    let options = OpenOptions { read_only: how == "for reading", ..OpenOptions::default() };
    let image = formats::open(path, &options).unwrap();
    let opened = begun.elapsed();
    let at_open = peak_kib();
    let mut buf = [0; 4096];
    let begun = Instant::now();
    for n in 0..READS {
        let block = n * 40_503_067 % BLOCKS;
        if how == "and filled" {
            map(&*image, block, &mut Pieces::new(), true);
            if image.wants_maintenance() {
                image.maintain(&|| ()).unwrap();
            }
        } else {
            formats::read_payload(&*image, block * MIB, &mut buf).unwrap();
        }
    }
    let read = begun.elapsed();
    let allocated = formats::info(path, None).unwrap().allocated_bytes;
    println!(
        "opened in {:.1} ms, peak {} KiB (before: {before} KiB); {READS} {} all over it {:.1} ms, peak {} KiB; \
         {allocated} bytes have a place",
        opened.as_secs_f64() * 1e3,
        at_open,
        if how == "and filled" { "first writes" } else { "reads" },
        read.as_secs_f64() * 1e3,
        peak_kib()
    );
    if how != "for reading" {
        image.close().unwrap();
    }
    assert!(peak_kib() < MEMORY_MAX, "{} KiB is more than the {MEMORY_MAX} KiB that it may take", peak_kib());
}

/// The most memory that this process had so far.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Gives every block a place behind the table, and the file the length for it, all of it a hole.
fn fill_table(path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let (table, len) = table_of(&file);
    let first = (table + len).div_ceil(MIB);
    file.set_len((first + BLOCKS) * MIB).unwrap();
    let mut entries = Vec::with_capacity(1 << 20);
    let mut at = table;
    for block in 0..BLOCKS {
        let fully_present = (first + block) << 20 | 6;
        entries.extend_from_slice(&fully_present.to_le_bytes());
        if block % CHUNK == CHUNK - 1 && block + 1 < BLOCKS {
            entries.extend_from_slice(&[0; 8]);
        }
        if entries.len() >= 1 << 20 || block + 1 == BLOCKS {
            file.write_all_at(&entries, at).unwrap();
            at += entries.len() as u64;
            entries.clear();
        }
    }
    assert!(at <= table + len);
}

/// Offset and length of the block allocation table, by the first region table.
fn table_of(file: &File) -> (u64, u64) {
    const BAT: [u8; 16] =
        [0x66, 0x77, 0xC2, 0x2D, 0x23, 0xF6, 0x00, 0x42, 0x9D, 0x64, 0x11, 0x5E, 0x9B, 0xFD, 0x4A, 0x08];
    let mut table = [0; 4096];
    file.read_exact_at(&mut table, 192 << 10).unwrap();
    let entry = table[16..].chunks(32).find(|entry| entry[..16] == BAT).unwrap();
    let offset = u64::from_le_bytes(entry[16..24].try_into().unwrap());
    let len = u32::from_le_bytes(entry[24..28].try_into().unwrap());
    (offset, len.into())
}
