//! What a differencing VHD notes for whoever comes after a kill, and what flushes of many threads promise.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod vhd_diff;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use formats::{ByteSpan, ErrorKind, Image, Pieces, Storage};
use formats_tests::{Fault, SimStorage, read_payload, write_payload};
use vhd_diff::{BOOT, OTHER_BOOT, base, chain, child, content, layer, notes};

const BLOCK: u64 = 4096;
const DISK: u64 = 16 * BLOCK;

/// A parent full of content, and a new child of it.
fn family(block: u32) -> (Arc<SimStorage>, Arc<SimStorage>) {
    let parent = base(Some(BLOCK as u32), DISK);
    let image = layer(&parent, false, None).unwrap();
    write_payload(&*image, 0, &content(0xa0, DISK)).unwrap();
    image.close().unwrap();
    (child(&*image, block, DISK), parent)
}

/// A child that was killed after it had written two sectors, and its notes.
fn killed(sim: &Arc<SimStorage>) -> Arc<SimStorage> {
    let file = SimStorage::new();
    let top = layer(sim, false, notes(file.clone(), BOOT)).unwrap();
    write_payload(&*top, BLOCK, &content(1, 1024)).unwrap();
    file
}

fn old(at: u64, len: usize) -> Vec<u8> {
    content(0xa0, DISK)[at as usize..at as usize + len].to_vec()
}

#[test]
fn notes_count_for_the_same_image_on_the_same_boot_alone() {
    for (boot, same_image, noted) in [(BOOT, true, true), (OTHER_BOOT, true, false), (BOOT, false, false)] {
        let (sim, parent) = family(BLOCK as u32);
        let file = killed(&sim);
        let sim = if same_image {
            sim
        } else {
            let other = child(&*layer(&parent, true, None).unwrap(), BLOCK as u32, DISK);
            drop(killed(&other));
            other
        };
        for read_only in [true, false] {
            let file = SimStorage::from_disk(file.contents());
            let top = layer(&sim, read_only, notes(file, boot)).unwrap();
            let disk = chain(top, std::slice::from_ref(&parent));
            let wanted = if noted { content(1, 1024) } else { old(BLOCK, 1024) };
            assert_eq!(
                read_payload(&disk, BLOCK, 1024).unwrap(),
                wanted,
                "{boot}, the same image: {same_image}"
            );
        }
    }
}

/// Somebody has put an older copy of the file in its place: what was noted is not in it.
#[test]
fn notes_of_blocks_without_a_place_expose_nothing() {
    let (sim, parent) = family(BLOCK as u32);
    let before = sim.contents();
    let file = killed(&sim);
    let sim = SimStorage::from_disk(before);
    let parents = [parent];
    let disk = chain(layer(&sim, false, notes(file, BOOT)).unwrap(), &parents);
    assert_eq!(read_payload(&disk, BLOCK, 1024).unwrap(), old(BLOCK, 1024));
    write_payload(&disk, BLOCK + 2048, &content(2, 512)).unwrap();
    let agree = |disk: &dyn Image| {
        assert_eq!(read_payload(disk, BLOCK, 2048).unwrap(), old(BLOCK, 2048), "the block has its place now");
        assert_eq!(read_payload(disk, BLOCK + 2048, 512).unwrap(), content(2, 512));
    };
    agree(&disk);
    disk.close().unwrap();
    drop(disk);
    agree(&chain(layer(&sim, true, None).unwrap(), &parents));
}

#[test]
fn rubbish_in_the_notes_is_ignored() {
    for tag in 0..40u8 {
        let (sim, parent) = family(BLOCK as u32);
        let file = killed(&sim);
        let mut rubbish = file.contents();
        let at = u64::from(tag) * 23 % rubbish.len().max(1);
        rubbish.write(at, &content(tag, 600));
        let disk = chain(layer(&sim, false, notes(SimStorage::from_disk(rubbish), BOOT)).unwrap(), &[parent]);
        for at in (0..DISK).step_by(512) {
            let read = read_payload(&disk, at, 512).unwrap();
            let new = (BLOCK..BLOCK + 1024).contains(&at)
                && read == content(1, 1024)[(at - BLOCK) as usize..][..512];
            assert!(new || read == old(at, 512), "rubbish {tag}: neither old nor new at {at}");
        }
        write_payload(&disk, 0, &content(3, 512)).unwrap();
        disk.close().unwrap();
        assert_eq!(read_payload(&disk, 0, 512).unwrap(), content(3, 512));
    }
}

#[test]
fn more_scattered_writes_than_can_be_pending_go_on() {
    let (block, size) = (2 << 20, 160 << 20);
    let parent = base(Some(block), size);
    let sim = child(&*layer(&parent, true, None).unwrap(), block, size);
    let file = SimStorage::new();
    let top = layer(&sim, false, notes(file.clone(), BOOT)).unwrap();
    let sectors = (0..160_000u64).map(|n| n * 2 * 512);
    for at in sectors.clone() {
        write_payload(&*top, at, &[1; 512]).unwrap();
    }
    assert!(sim.syncs() >= 2, "bits were written in between");
    assert!(sim.syncs() < 200, "{} syncs", sim.syncs());
    // The process dies here.
    drop(top);
    let top = layer(&sim, false, notes(file.clone(), BOOT)).unwrap();
    top.close().unwrap();
    let disk = chain(layer(&sim, true, None).unwrap(), &[parent]);
    let read = read_payload(&disk, 0, size as usize).unwrap();
    let wrong =
        sectors.clone().find(|&at| read[at as usize..at as usize + 1024] != [[1; 512], [0; 512]].concat());
    assert_eq!(wrong, None);
    assert_eq!(file.len().unwrap(), 0);
}

#[test]
fn maintenance_does_not_try_again_and_again_what_fails() {
    for error in [std::io::ErrorKind::StorageFull, std::io::ErrorKind::Other] {
        let (sim, _) = family(BLOCK as u32);
        let file = SimStorage::new();
        let top = layer(&sim, false, notes(file.clone(), BOOT)).unwrap();
        write_payload(&*top, 0, &content(1, 512)).unwrap();
        top.maintain(&|| ()).unwrap();
        assert!(!top.wants_maintenance());
        // Notes fail, and the bits that are to be written instead fail too: the sync before them does not.
        file.inject(Fault { after: 0, lasting: true, error, partial: false });
        sim.inject(Fault { after: 2, lasting: true, error, partial: false });
        let failed = write_payload(&*top, 512, &content(2, 512)).unwrap_err();
        assert!(matches!(failed.kind, ErrorKind::NoSpace | ErrorKind::Io), "{failed}");
        assert!(!top.wants_maintenance());
        top.maintain(&|| ()).unwrap();
        sim.clear_fault();
        let flushed = top.commit();
        assert_eq!(flushed.is_ok(), error == std::io::ErrorKind::StorageFull, "{flushed:?}");
        if flushed.is_ok() {
            let reader = layer(&SimStorage::from_disk(sim.durable_contents()), true, None).unwrap();
            let mut out = Pieces::new();
            reader.map_read(ByteSpan::new(0, 1024), &mut out).unwrap();
            assert!(
                matches!(out.as_slice(), [p] if matches!(p.place, formats::Place::File { .. })),
                "{out:?}"
            );
        }
    }
}

/// Threads write and flush on their own. What a flush said to be durable is there after a power cut at that moment.
#[test]
fn every_flush_of_many_threads_is_durable_when_it_says_so() {
    for block in [BLOCK as u32, 16384] {
        let (sim, parent) = family(block);
        let top = layer(&sim, false, notes(SimStorage::new(), BOOT)).unwrap();
        let (seconds, flushes) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for thread in 0..6u64 {
                let (top, sim, parent, seconds, flushes) = (&top, &sim, &parent, &seconds, &flushes);
                scope.spawn(move || {
                    for n in (thread..DISK / 512).step_by(6) {
                        let at = n * 512;
                        write_payload(&**top, at, &content(thread as u8 + 1, 512)).unwrap();
                        let (mut token, mut syncs) = (Some(top.sync_begin()), 0);
                        while let Some(begun) = token {
                            sim.sync().unwrap();
                            syncs += 1;
                            token = top.sync_done(begun).unwrap();
                        }
                        assert!(syncs <= 2);
                        seconds.fetch_add(syncs - 1, Ordering::Relaxed);
                        flushes.fetch_add(1, Ordering::Relaxed);
                        let cut = SimStorage::from_disk(sim.durable_contents());
                        let disk = chain(layer(&cut, true, None).unwrap(), std::slice::from_ref(parent));
                        let read = read_payload(&disk, at, 512).unwrap();
                        assert_eq!(read, content(thread as u8 + 1, 512), "sector {n} was flushed");
                        // And whatever else there is, is old or new.
                        let other = (n * 7 + 3) % (DISK / 512);
                        let read = read_payload(&disk, other * 512, 512).unwrap();
                        let new = content((other % 6) as u8 + 1, 512);
                        assert!(read == new || read == old(other * 512, 512), "sector {other}");
                    }
                });
            }
        });
        println!("{:?} flushes, {:?} of them took a second sync", flushes, seconds);
    }
}

/// Bits reach the file only for payload that a sync has covered, whatever the order in which things are called.
#[test]
fn a_write_that_was_mapped_but_not_said_to_be_written_stays_the_parents() {
    let (sim, parent) = family(BLOCK as u32);
    let top = layer(&sim, false, notes(SimStorage::new(), BOOT)).unwrap();
    let disk = chain(top, std::slice::from_ref(&parent));
    let mut out = Pieces::new();
    disk.map_write(ByteSpan::new(0, 2 * BLOCK), &mut out).unwrap();
    let formats::Place::File { offset, .. } = out.as_slice()[0].place else { panic!() };
    // The payload's write fails half way: nobody says `wrote`.
    sim.write_at(&content(9, 1024), offset).unwrap();
    assert_eq!(read_payload(&disk, 0, 4096).unwrap(), old(0, 4096));
    write_payload(&disk, 1024, &content(2, 512)).unwrap();
    disk.close().unwrap();
    drop(disk);
    let disk = chain(layer(&sim, true, None).unwrap(), &[parent]);
    assert_eq!(read_payload(&disk, 0, 1024).unwrap(), old(0, 1024));
    assert_eq!(read_payload(&disk, 1024, 512).unwrap(), content(2, 512));
    assert_eq!(read_payload(&disk, 1536, 8192 - 1536).unwrap(), old(1536, 8192 - 1536));
}
