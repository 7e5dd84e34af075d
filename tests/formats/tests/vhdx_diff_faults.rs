//! What a failing file, a hostile image or an unusual request does to a differencing VHDX: refused or survived, never a lost
//! flush, and never a sector that is neither old nor new.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod vhdx_diff;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use formats::vhdx::{self, Vhdx};
use formats::{
    ByteSpan, Chain, ErrorKind, Image, ImageError, LayerOptions, NotesFile, Pieces, Place, Storage, ZeroMode,
};
use formats_tests::corpus;
use formats_tests::{
    CrashCount, CrashExplorer, CrashKind, Fault, History, Mark, SimStorage, read_payload, write_payload,
    zero_payload,
};
use vhdx_diff::{BOOT, MIB, OTHER_BOOT, Tape, content, create, create_with, layer, over, read_only, sound};

const DISK: u64 = 16 * MIB;

fn notes(storage: Arc<dyn Storage>, boot_id: uuid::Uuid) -> Option<NotesFile> {
    Some(NotesFile { storage, boot_id })
}

/// A parent with content in its blocks, and its history.
fn parent() -> (Arc<SimStorage>, History) {
    let sim = create(DISK, 512, None);
    let (image, mut history) = (layer(&sim, false, None).unwrap(), History::new());
    for n in 0..DISK / MIB - 2 {
        history.write(&image, &sim, n * MIB, &content(0xa0, 1024)).unwrap();
    }
    image.close().unwrap();
    (sim, history)
}

/// One thing after another; what fails is tried again, and what fails again ends it, so that nothing refused counts as
/// acknowledged.
fn session(history: &mut History, sim: &Arc<SimStorage>, disk: &Chain) -> Option<()> {
    macro_rules! again {
        ($e:expr) => {
            if $e.is_err() {
                $e.ok()?
            }
        };
    }
    again!(history.write(disk, sim, 512, &content(1, 1024)));
    again!(history.write(disk, sim, 3 * MIB, &content(2, 512)));
    history.flush(disk, sim).ok()?;
    again!(history.write(disk, sim, 1024, &content(3, 1024)));
    again!(history.zero(disk, sim, 3 * MIB, MIB, ZeroMode::Unmap));
    again!(history.zero(disk, sim, 4 * MIB, 1024, ZeroMode::Keep));
    again!(history.zero(disk, sim, 5 * MIB, MIB, ZeroMode::Unmap));
    again!(disk.maintain(&|| ()));
    again!(history.write(disk, sim, 3 * MIB + 512, &content(4, 512)));
    again!(history.write(disk, sim, 6 * MIB, &content(5, 512)));
    history.flush(disk, sim).ok()?;
    // A close that fails is not tried again here: the guest goes on.
    if disk.close().is_ok() {
        history.note_flushed(sim);
    }
    again!(history.write(disk, sim, 6 * MIB + 512, &content(6, 512)));
    history.flush(disk, sim).ok()?;
    again!(history.write(disk, sim, 8 * MIB, &content(7, 512)));
    again!(disk.close());
    history.note_flushed(sim);
    Some(())
}

/// One operation of the file fails, anywhere in a session; then every crash.
#[test]
fn one_failure_anywhere_and_then_every_crash_loses_no_flush() {
    let (parent, parents_history) = parent();
    let id = read_only(&parent).content_id();
    let mut bad = BTreeMap::<String, usize>::new();
    let mut total = CrashCount::default();
    let mut finished = 0;
    for error in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
        for n in 0.. {
            let sim = create(DISK, 512, id);
            let mut history = parents_history.clone();
            let so_far = history.operations();
            for mark in [Mark::Begun(so_far), Mark::Acknowledged(so_far), Mark::Flushed(so_far)] {
                sim.mark(mark);
            }
            let tape = Tape::new(&sim);
            let disk = over(layer(&sim, false, notes(tape.clone(), BOOT)).unwrap(), &parent);
            sim.inject(Fault { after: n, lasting: false, error, partial: n % 2 == 1 });
            finished += usize::from(session(&mut history, &sim, &disk).is_some());
            sim.clear_fault();
            let explorer = CrashExplorer {
                exhaustive_units: 4,
                pair_units: 4,
                seeded_subsets: 2,
                from: 3,
                ..Default::default()
            };
            total += explorer.explore(&sim, |state| {
                let killed = state.kind == CrashKind::ProcessKill;
                let left = tape.at(state.after);
                let some = if killed { &left[..] } else { &left[..1] };
                for disk in some {
                    let file = SimStorage::from_disk(disk.clone());
                    let boot = if killed { BOOT } else { OTHER_BOOT };
                    let opened = layer(&state.storage, true, notes(file, boot)).map_err(|e| e.message);
                    let result = opened.and_then(|top| {
                        history.verify(&over(top, &parent), state.sure(), state.progress.begun)
                    });
                    if let Err(why) = result.and_then(|()| sound(&state.storage)) {
                        let why = &why[..why.len().min(120)];
                        *bad.entry(format!("{error:?} at {n}, {:?}: {why}", state.kind)).or_default() += 1;
                    }
                }
            });
            if fault_never_came(&sim, n) {
                break;
            }
        }
    }
    println!("{total}; {finished} sessions came to their end");
    assert!(bad.is_empty(), "{} kinds: {:#?}", bad.len(), bad);
    assert!(finished > 10);
}

/// Whether fewer operations were done than had to succeed before the fault.
fn fault_never_came(sim: &SimStorage, n: u64) -> bool {
    let done = sim.trace().iter().filter(|op| !matches!(op, formats_tests::TraceOp::Mark(_))).count();
    (done as u64) < n
}

/// Each operation fails for good from some point on: writes are refused, and what was flushed stays.
#[test]
fn a_file_that_fails_for_good_keeps_what_was_flushed() {
    let (parent, _) = parent();
    let id = read_only(&parent).content_id();
    for n in 0..40 {
        let sim = create(DISK, 512, id);
        let disk = over(layer(&sim, false, None).unwrap(), &parent);
        write_payload(&disk, 512, &[1; 512]).unwrap();
        disk.commit().unwrap();
        sim.inject(Fault { after: n, lasting: true, error: io::ErrorKind::Other, partial: true });
        let mut flushed = 0;
        for k in 1..12u64 {
            let done = write_payload(&disk, k * MIB + 512, &[k as u8; 512]).and_then(|()| disk.commit());
            match done {
                Ok(()) => flushed = k,
                Err(_) => break,
            }
        }
        sim.clear_fault();
        if let Err(e) = write_payload(&disk, 14 * MIB, &[9; 512]).and_then(|()| disk.commit()) {
            assert_eq!(e.kind, ErrorKind::Poisoned, "{e}");
        }
        let cut = SimStorage::from_disk(sim.durable_contents());
        let disk = over(read_only(&cut), &parent);
        for k in 1..=flushed {
            assert_eq!(read_payload(&disk, k * MIB + 512, 512).unwrap(), [k as u8; 512]);
        }
        assert_eq!(read_payload(&disk, MIB, 512).unwrap(), content(0xa0, 512), "fault at {n}");
    }
}

/// A write whose payload fails is not told as written: the parent is still there, now and after a crash.
#[test]
fn a_payload_write_that_fails_leaves_the_parents_content() {
    let (parent, _) = parent();
    let sim = create(DISK, 512, read_only(&parent).content_id());
    let tape = Tape::new(&sim);
    let disk = over(layer(&sim, false, notes(tape.clone(), BOOT)).unwrap(), &parent);
    let mut pieces = Pieces::new();
    disk.map_write(ByteSpan::new(MIB, 4096), &mut pieces).unwrap();
    let Place::File { offset, .. } = pieces[0].place else { panic!("nowhere") };
    sim.write_at(&[0xbb; 1024], offset).unwrap();
    // It failed here. What lies there is seen neither then nor when a neighbour is written, zeroed or flushed.
    assert_eq!(read_payload(&disk, MIB, 1024).unwrap(), content(0xa0, 1024));
    assert_eq!(read_payload(&disk, MIB + 1024, 3072).unwrap(), [0; 3072]);
    write_payload(&disk, MIB + 1024, &[1; 512]).unwrap();
    disk.commit().unwrap();
    assert_eq!(read_payload(&disk, MIB, 1024).unwrap(), content(0xa0, 1024));
    let again = over(layer(&sim, false, notes(tape, BOOT)).unwrap(), &parent);
    assert_eq!(read_payload(&again, MIB, 1024).unwrap(), content(0xa0, 1024));
    zero_payload(&again, MIB, 512, ZeroMode::Unmap).unwrap();
    assert_eq!(read_payload(&again, MIB, 512).unwrap(), [0; 512]);
    assert_eq!(read_payload(&again, MIB + 512, 512).unwrap(), content(0xa0, 1024)[512..]);
}

#[test]
fn notes_of_another_boot_another_session_or_another_image_are_not_believed() {
    let (parent, _) = parent();
    let id = read_only(&parent).content_id();
    let (sim, tape) = (create(DISK, 512, id), SimStorage::new());
    let disk = over(layer(&sim, false, notes(tape.clone(), BOOT)).unwrap(), &parent);
    write_payload(&disk, 512, &[1; 512]).unwrap();
    let left = |boot, sim: &Arc<SimStorage>| {
        let file = SimStorage::from_disk(tape.contents());
        let disk = over(layer(sim, true, notes(file, boot)).unwrap(), &parent);
        read_payload(&disk, 512, 512).unwrap()
    };
    assert_eq!(left(BOOT, &sim), [1; 512]);
    assert_eq!(left(OTHER_BOOT, &sim), content(0xa0, 1024)[512..]);
    // Another child with a block in the same place.
    let other = create(DISK, 512, id);
    let disk = over(layer(&other, false, None).unwrap(), &parent);
    write_payload(&disk, 4096, &[2; 512]).unwrap();
    disk.commit().unwrap();
    assert_eq!(left(BOOT, &other), content(0xa0, 1024)[512..]);
    // Somebody without our notes opens it for writing and goes on.
    let disk = over(layer(&sim, false, None).unwrap(), &parent);
    write_payload(&disk, 8192, &[3; 512]).unwrap();
    disk.close().unwrap();
    assert_eq!(left(BOOT, &sim), content(0xa0, 1024)[512..]);
}

#[test]
fn flushes_of_many_writers_take_two_syncs_each_at_most() {
    let (parent, _) = parent();
    let sim = create(DISK, 512, read_only(&parent).content_id());
    let disk = over(layer(&sim, false, notes(SimStorage::new(), BOOT)).unwrap(), &parent);
    let most = std::thread::scope(|scope| {
        let writers = (0..4u64).map(|t| {
            let (disk, sim) = (&disk, &sim);
            scope.spawn(move || {
                let mut most = 0;
                for n in 0..200 {
                    write_payload(disk, (t * 3 + n % 3) * MIB + n * 1024, &[t as u8 + 1; 512]).unwrap();
                    let (mut token, mut syncs) = (Some(disk.sync_begin()), 0);
                    while let Some(begun) = token {
                        sim.sync().unwrap();
                        syncs += 1;
                        token = disk.sync_done(begun).unwrap();
                    }
                    most = most.max(syncs);
                    if n % 20 == 0 {
                        // What was flushed is there after a power cut, whoever else was busy.
                        let cut = SimStorage::from_disk(sim.durable_contents());
                        let disk =
                            Vhdx::open_layer(cut, &LayerOptions { read_only: true, ..Default::default() });
                        let (disk, mut pieces) = (disk.unwrap(), Pieces::new());
                        let at = ByteSpan::new((t * 3 + n % 3) * MIB + n * 1024, 512);
                        disk.map_read(at, &mut pieces).unwrap();
                        assert!(matches!(pieces[0].place, Place::File { .. }), "{:?}", pieces[0]);
                    }
                }
                most
            })
        });
        writers.collect::<Vec<_>>().into_iter().map(|w| w.join().unwrap()).max()
    });
    assert_eq!(most, Some(2));
    // Nothing new became own: one is enough.
    let token = disk.sync_begin();
    sim.sync().unwrap();
    assert_eq!(disk.sync_done(token).unwrap(), None);
}

/// Another flush may take a flush's sectors, and write their bits when its sync has long begun.
#[test]
fn a_flush_whose_sectors_another_one_recorded_waits_for_their_bits() {
    let (parent, _) = parent();
    let sim = create(DISK, 512, read_only(&parent).content_id());
    let disk = over(layer(&sim, false, notes(SimStorage::new(), BOOT)).unwrap(), &parent);
    write_payload(&disk, 512, &[1; 512]).unwrap();
    let first = disk.sync_begin();
    sim.sync().unwrap();
    write_payload(&disk, 4096, &[2; 512]).unwrap();
    let second = disk.sync_begin();
    sim.sync().unwrap();
    let next = disk.sync_done(second).unwrap().expect("bits were written");
    let firsts = disk.sync_done(first).unwrap().expect("its bits are not durable yet");
    let cut = || over(read_only(&SimStorage::from_disk(sim.durable_contents())), &parent);
    assert_eq!(read_payload(&cut(), 512, 512).unwrap(), content(0xa0, 1024)[512..]);
    sim.sync().unwrap();
    assert_eq!(disk.sync_done(firsts).unwrap(), None);
    assert_eq!(disk.sync_done(next).unwrap(), None);
    assert_eq!(read_payload(&cut(), 512, 512).unwrap(), [1; 512]);
    assert_eq!(read_payload(&cut(), 4096, 512).unwrap(), [2; 512]);
    // And one whose sectors others have made durable meanwhile does not wait.
    write_payload(&disk, 1024, &[3; 512]).unwrap();
    let first = disk.sync_begin();
    sim.sync().unwrap();
    disk.commit().unwrap();
    assert_eq!(disk.sync_done(first).unwrap(), None);
    assert_eq!(read_payload(&cut(), 1024, 512).unwrap(), [3; 512]);
}

/// A flush records what was written before it began, and nothing of what came later: its payload may not be durable.
#[test]
fn a_flush_records_nothing_that_was_written_after_it_began() {
    let (parent, _) = parent();
    let sim = create(DISK, 512, read_only(&parent).content_id());
    let disk = over(layer(&sim, false, notes(SimStorage::new(), BOOT)).unwrap(), &parent);
    write_payload(&disk, MIB, &[1; 512]).unwrap();
    let mut token = Some(disk.sync_begin());
    sim.sync().unwrap();
    write_payload(&disk, MIB + 512, &[2; 512]).unwrap();
    while let Some(begun) = token {
        token = disk.sync_done(begun).unwrap();
    }
    // The log has been written; what it says is looked at by itself.
    let killed = over(read_only(&sim), &parent);
    assert_eq!(read_payload(&killed, MIB, 512).unwrap(), [1; 512]);
    assert_eq!(read_payload(&killed, MIB + 512, 512).unwrap(), content(0xa0, 1024)[512..]);
}

// --- images that break rules -------------------------------------------------------------------------------------------

/// Where the BAT of [`create`]'s images is: behind file id and headers, log and metadata.
const BAT: u64 = 3 * MIB;

fn put_entry(sim: &SimStorage, index: u64, raw: u64) {
    sim.write_at(&raw.to_le_bytes(), BAT + index * 8).unwrap();
}

fn refused(sim: &Arc<SimStorage>) -> ImageError {
    let error = layer(sim, true, None).map(drop).unwrap_err();
    let writing = layer(sim, false, None).map(drop).unwrap_err();
    assert_eq!(error.message, writing.message);
    let storage: Arc<dyn Storage> = sim.clone();
    assert!(!vhdx::check(storage, false).unwrap().is_sound(), "{error}");
    assert_eq!(error.kind, ErrorKind::Corrupt);
    error
}

#[test]
fn entries_that_break_the_rules_of_differencing_images_are_refused_by_name() {
    let chunk = (8 << 20) * 512 / MIB;
    let place = |unit: u64, state: u64| unit << 20 | state;
    let cases: [(&[(u64, u64)], &str); 6] = [
        (&[(0, place(5, 7))], "vhdx-sector-bitmap-missing"),
        (&[(0, place(5, 7)), (chunk, place(6, 7))], "vhdx-bat-state"),
        (&[(0, place(5, 7)), (chunk, place(5, 6))], "vhdx-bat-overlap"),
        (&[(0, place(5, 7)), (chunk, place(700, 6))], "vhdx-bat-place"),
        (&[(0, place(5, 5))], "vhdx-bat-state"),
        (&[(0, place(5, 7) | 8), (chunk, place(6, 6))], "vhdx-bat-reserved"),
    ];
    for (entries, code) in cases {
        let sim = create(DISK, 512, Some(uuid::Uuid::from_u128(1)));
        sim.set_len(8 * MIB).unwrap();
        entries.iter().for_each(|(index, raw)| put_entry(&sim, *index, *raw));
        let error = refused(&sim);
        assert!(error.message.contains(code), "{error} / {code}");
    }
    // Partially present blocks are for differencing images only.
    let sim = create(DISK, 512, None);
    sim.set_len(8 * MIB).unwrap();
    put_entry(&sim, 0, place(5, 7));
    assert!(refused(&sim).message.contains("vhdx-bat-state"));
}

#[test]
fn states_that_are_not_the_parents_read_as_zeroes() {
    let (parent, _) = parent();
    for state in 1..=3u64 {
        let sim = create(DISK, 512, read_only(&parent).content_id());
        // UNDEFINED and UNMAPPED may keep an old place.
        put_entry(&sim, 0, state);
        let disk = over(layer(&sim, false, None).unwrap(), &parent);
        assert_eq!(read_payload(&disk, 0, 4096).unwrap(), [0; 4096], "state {state}");
        write_payload(&disk, 512, &[1; 512]).unwrap();
        assert_eq!(read_payload(&disk, 0, 512).unwrap(), [0; 512]);
        assert_eq!(disk.sync_done(disk.sync_begin()).unwrap(), None, "nothing has to be recorded");
        disk.close().unwrap();
        assert_eq!(read_payload(&over(read_only(&sim), &parent), 0, 1536).unwrap()[512..1024], [1; 512]);
    }
}

#[test]
fn a_block_that_is_fully_present_never_looks_at_its_bitmap() {
    let (parent, _) = parent();
    let sim = create(DISK, 512, read_only(&parent).content_id());
    sim.set_len(8 * MIB).unwrap();
    put_entry(&sim, 0, 5 << 20 | 6);
    let disk = over(read_only(&sim), &parent);
    assert_eq!(read_payload(&disk, 0, 4096).unwrap(), [0; 4096], "no bitmap at all");
    put_entry(&sim, (8 << 20) * 512 / MIB, 6 << 20 | 6);
    let disk = over(read_only(&sim), &parent);
    assert_eq!(read_payload(&disk, 0, 4096).unwrap(), [0; 4096], "a bitmap without bits");
}

#[test]
fn blocks_and_chunks_of_every_size_keep_their_sectors_apart() {
    for (sector, block) in [(512, MIB), (512, 256 * MIB), (4096, MIB), (4096, 256 * MIB), (512, 32 * MIB)] {
        let size = if sector == 512 { 9 << 30 } else { 70 << 30 };
        let base = create_with(size, block as u32, sector, None);
        let image = layer(&base, false, None).unwrap();
        let chunk = (8 << 20) * u64::from(sector);
        let len = u64::from(sector);
        let places = [0, block - len, block, chunk - len, chunk, chunk + block, 2 * chunk, size - len];
        for at in places {
            write_payload(&image, at, &vec![7; len as usize]).unwrap();
        }
        image.close().unwrap();
        let sim = create_with(size, block as u32, sector, image.content_id());
        let disk = over(layer(&sim, false, None).unwrap(), &base);
        for (n, at) in places.into_iter().enumerate().filter(|(n, _)| n % 2 == 0) {
            write_payload(&disk, at, &vec![n as u8 + 10; len as usize]).unwrap();
        }
        for round in 0..2 {
            for (n, at) in places.into_iter().enumerate() {
                let expected = if n % 2 == 0 { n as u8 + 10 } else { 7 };
                let read = read_payload(&disk, at, len as usize).unwrap();
                assert_eq!(read, vec![expected; len as usize], "round {round}: {at} of {size} in {block}");
                if at >= 2 * len && at + len < size && n == 2 {
                    assert_eq!(read_payload(&disk, at + len, len as usize).unwrap(), vec![0; len as usize]);
                }
            }
            disk.close().unwrap();
        }
        let disk = over(read_only(&sim), &base);
        for (n, at) in places.into_iter().enumerate() {
            let expected = if n % 2 == 0 { n as u8 + 10 } else { 7 };
            assert_eq!(read_payload(&disk, at, len as usize).unwrap(), vec![expected; len as usize]);
        }
        sound(&sim).unwrap();
    }
}

/// What the layer itself has to say of the corpus' hostile children; which parents may be opened is not its business.
#[test]
fn hostile_children_of_the_corpus_are_refused_or_only_name_their_parents() {
    let Some(folder) = corpus::corpus("hostile differencing VHDXs") else { return };
    let mut seen = 0;
    for row in corpus::table(&folder.join("hostile/cases.tsv")).unwrap() {
        let name = &row[0];
        if !name.starts_with('d') || !name.ends_with(".vhdx") {
            continue;
        }
        let bytes = corpus::unpack(&folder.join("hostile").join(format!("{name}.bz2"))).unwrap();
        let sim = corpus::sparse(&bytes);
        let before = sim.contents().fingerprint();
        let opened = layer(&sim, true, None);
        // These are sound by themselves: what is wrong with them are the paths of their parents.
        let names_only = ["d00", "d02", "d04", "d06"].contains(&&name[..3]);
        assert_eq!(opened.is_ok(), names_only, "{name} ({}): {:?}", row[1], opened.err());
        match &opened {
            Ok(image) => println!("{name}: {:?}", image.parent_link().unwrap()),
            Err(e) => {
                assert_eq!(e.kind, ErrorKind::Corrupt, "{name}: {e}");
                println!("{name}: {e}");
            }
        }
        let storage: Arc<dyn Storage> = sim.clone();
        assert!(Vhdx::open(storage, false).is_err(), "{name}: a child by itself is no disk");
        assert_eq!(sim.contents().fingerprint(), before, "{name}: reading wrote");
        seen += 1;
    }
    assert!(seen >= 9, "only {seen} cases were seen");
}
