//! Every crash state of a dynamic VHD opens, is sound, and holds for each sector the old content or the new.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use std::sync::Arc;

use formats::vhd::{self, CreateParams, Vhd};
use formats::{ErrorKind, Image, ImageType, Severity, Storage, ZeroMode};
use formats_tests::{CrashCount, CrashExplorer, CrashKind, CrashState, History, Mark, SimStorage, TraceOp};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const BLOCK: u64 = 4096;
const DISK: u64 = 64 * BLOCK;

fn create(block_size: u32, virtual_size: u64) -> Arc<SimStorage> {
    let sim = SimStorage::new();
    let params = CreateParams {
        image_type: ImageType::Dynamic,
        virtual_size,
        block_size: Some(block_size),
        parent: None,
    };
    vhd::create(&*sim, &params).unwrap();
    sim.forget_trace();
    sim
}

fn open(sim: &Arc<SimStorage>, read_only: bool) -> Result<Vhd, String> {
    let storage: Arc<dyn Storage> = sim.clone();
    Vhd::open(storage, read_only, !read_only).map_err(|e| e.to_string())
}

/// `len` bytes that no other tag gives, different in every sector.
fn content(tag: u8, len: u64) -> Vec<u8> {
    (0..len).map(|i| if i % 512 == 0 { (i / 512) as u8 | 1 } else { tag }).collect()
}

fn sound(storage: &SimStorage) -> Result<(), String> {
    let report = vhd::check(storage, false).map_err(|e| e.to_string())?;
    match report.findings.iter().find(|f| f.severity == Severity::Damage && f.code != "vhd-footer-missing") {
        Some(damage) => Err(damage.message.clone()),
        None => Ok(()),
    }
}

/// What has to hold after a crash: for reading, for writing with recovery, and after going on from there.
fn survive(state: &CrashState, history: &History) -> Result<(), String> {
    let (sure, begun) = (state.sure(), state.progress.begun);
    sound(&state.storage)?;
    let before = state.storage.contents().fingerprint();
    history.verify(&open(&state.storage, true)?, sure, begun)?;
    if before != state.storage.contents().fingerprint() {
        return Err("opening for reading changed the file".into());
    }
    let image = open(&state.storage, false)?;
    history.verify(&image, sure, begun)?;
    go_on(&image, state, history, sure, begun)?;
    image.close().map_err(|e| e.to_string())?;
    let report = vhd::check(&*state.storage, false).map_err(|e| e.to_string())?;
    match report.findings.iter().find(|f| f.severity == Severity::Damage) {
        Some(f) => Err(format!("after closing: {}", f.message)),
        None => Ok(()),
    }
}

/// Writes to blocks that had no place yet and sees that nothing but that content has appeared.
fn go_on(image: &Vhd, state: &CrashState, history: &History, sure: u64, begun: u64) -> Result<(), String> {
    let size = image.geometry().virtual_size;
    let block = u64::from(image.geometry().block_size);
    let offsets = [size - block + 512 % block, size - 3 * block + 1024 % block];
    let mut later = History::new();
    for offset in offsets {
        later
            .write(image, &state.storage, offset, &content(0xee, 512))
            .and_then(|()| later.flush(image, &state.storage))
            .map_err(|e| format!("writing on after the crash: {e}"))?;
    }
    let again = open(&state.storage, true)?;
    for offset in offsets {
        let read = formats_tests::read_payload(&again, offset, 512).map_err(|e| e.to_string())?;
        if read != content(0xee, 512) {
            return Err(format!("what was written at {offset} after the crash is not there"));
        }
    }
    // The new sectors are not in the history; blot them out before comparing.
    for offset in offsets {
        formats_tests::write_payload(image, offset, &[0; 512]).map_err(|e| e.to_string())?;
    }
    history.verify(image, sure, begun).map_err(|e| format!("after writing on: {e}"))
}

/// The size of the file that is durable after so many operations.
fn durable_len(sim: &SimStorage, after: usize) -> u64 {
    let (mut now, mut durable) = (sim.base().len(), sim.base().len());
    for op in &sim.trace()[..after] {
        match op {
            TraceOp::Write { offset, data } => now = now.max(offset + data.len() as u64),
            TraceOp::SetLen(len) => now = *len,
            TraceOp::Sync => durable = now,
            _ => {}
        }
    }
    durable
}

/// The same crash on a file system that keeps a new size, but not what was written there.
fn without_the_new_footer(sim: &SimStorage, state: &CrashState) -> Option<CrashState> {
    let mut disk = state.storage.contents();
    let len = disk.len();
    if state.kind == CrashKind::ProcessKill || len <= durable_len(sim, state.after) {
        return None;
    }
    disk.zero(len - 512, 512);
    let kept = format!("{}, but not the footer", state.kept);
    Some(CrashState { storage: SimStorage::from_disk(disk), kept, ..*state })
}

fn explore(sim: &SimStorage, history: &History, name: &str) -> CrashCount {
    explore_from(sim, history, name, 0)
}

fn explore_from(sim: &SimStorage, history: &History, name: &str, from: usize) -> CrashCount {
    let (mut kills, mut lost, mut torn_lost) = (0, 0, 0);
    let explorer = CrashExplorer { from, ..CrashExplorer::default() };
    let count = explorer.explore(sim, |state| {
        kills += usize::from(state.kind == CrashKind::ProcessKill);
        let torn = without_the_new_footer(sim, &state);
        lost += usize::from(needs_recovery(&state));
        torn_lost += usize::from(torn.as_ref().is_some_and(needs_recovery));
        for state in std::iter::once(state).chain(torn) {
            if let Err(why) = survive(&state, history) {
                let CrashState { after, kind, progress, kept, .. } = &state;
                let op = after.checked_sub(1).map(|n| sim.trace()[n].clone());
                panic!("{name}: {kind:?} after {after} ({op:?}), {progress:?}, kept {kept}: {why}");
            }
        }
    });
    println!(
        "{name}: {count}; {kills} process kills; recovery was needed in {lost}, and in {torn_lost} where besides the file \
         had grown without its content"
    );
    assert!(from > 0 || lost == 0, "the footer at the end may be lost only with the file system's help");
    count
}

fn needs_recovery(state: &CrashState) -> bool {
    let storage: Arc<dyn Storage> = state.storage.clone();
    matches!(Vhd::open(storage, false, false), Err(e) if e.kind == ErrorKind::NeedsRepair)
}

#[test]
fn first_writes_to_blocks_survive_every_crash() {
    let sim = create(BLOCK as u32, DISK);
    let image = open(&sim, false).unwrap();
    let mut history = History::new();
    for (n, offset) in [0, 3 * BLOCK + 512, 9 * BLOCK - 1024, 512, 20 * BLOCK, 21 * BLOCK].iter().enumerate()
    {
        history.write(&image, &sim, *offset, &content(n as u8 + 1, 2048)).unwrap();
        if n % 2 == 1 {
            history.flush(&image, &sim).unwrap();
        }
    }
    assert!(explore(&sim, &history, "allocation").states > 200);
}

#[test]
fn growth_ahead_survives_every_crash() {
    let sim = create(BLOCK as u32, DISK);
    let image = open(&sim, false).unwrap();
    let mut history = History::new();
    for block in 0..14 {
        history.write(&image, &sim, block * BLOCK, &content(block as u8 + 1, 512)).unwrap();
        if image.wants_maintenance() {
            image.maintain(&|| ()).unwrap();
        }
        if block % 5 == 4 {
            history.flush(&image, &sim).unwrap();
        }
    }
    explore(&sim, &history, "growth ahead");
}

#[test]
fn closing_survives_every_crash() {
    let sim = create(BLOCK as u32, DISK);
    let image = open(&sim, false).unwrap();
    let mut history = History::new();
    history.write(&image, &sim, 5 * BLOCK, &content(1, BLOCK)).unwrap();
    image.close().unwrap();
    history.note_flushed(&sim);
    let short = sim.len().unwrap();
    history.write(&image, &sim, 7 * BLOCK, &content(2, BLOCK)).unwrap();
    history.write(&image, &sim, 5 * BLOCK, &content(3, 512)).unwrap();
    image.close().unwrap();
    history.note_flushed(&sim);
    assert_eq!(sim.len().unwrap(), short + 2 * BLOCK, "a block and its bitmap were added");
    explore(&sim, &history, "close");
}

#[test]
fn discards_survive_every_crash() {
    let sim = create(BLOCK as u32, DISK);
    let image = open(&sim, false).unwrap();
    let mut history = History::new();
    history.write(&image, &sim, 0, &content(1, 3 * BLOCK)).unwrap();
    history.flush(&image, &sim).unwrap();
    history.zero(&image, &sim, 512, 2 * BLOCK, ZeroMode::Unmap).unwrap();
    history.write(&image, &sim, BLOCK, &content(2, 1024)).unwrap();
    history.flush(&image, &sim).unwrap();
    history.zero(&image, &sim, 0, DISK, ZeroMode::Keep).unwrap();
    history.write(&image, &sim, 30 * BLOCK, &content(3, 512)).unwrap();
    explore(&sim, &history, "discard");
}

/// A disk whose last session ended in a crash while the footer was missing or the file was longer than its blocks.
#[test]
fn a_second_session_after_a_crash_survives_every_crash() {
    let sim = create(BLOCK as u32, DISK);
    let image = open(&sim, false).unwrap();
    let mut history = History::new();
    history.write(&image, &sim, 0, &content(1, 1024)).unwrap();
    history.write(&image, &sim, 8 * BLOCK, &content(2, 1024)).unwrap();
    history.flush(&image, &sim).unwrap();
    history.write(&image, &sim, 9 * BLOCK, &content(3, 1024)).unwrap();
    // What survives is everything; then a tail of garbage that never was a block, and no footer.
    let mut crashed = sim.contents();
    let len = crashed.len();
    crashed.write(len - 512, &content(0x99, 512));
    let again = SimStorage::from_disk(crashed);
    let mut second = history.clone();
    again.mark(Mark::Begun(history.operations()));
    again.mark(Mark::Flushed(history.operations()));
    let image = open(&again, false).unwrap();
    second.write(&image, &again, 40 * BLOCK, &content(4, 512)).unwrap();
    second.write(&image, &again, 41 * BLOCK, &content(5, 512)).unwrap();
    second.flush(&image, &again).unwrap();
    image.close().unwrap();
    explore_from(&again, &second, "second session", 2);
}

/// The file as other writers leave it: blocks side by side from any sector, the footer right behind the last block, or
/// behind `slack` sectors of rubbish.
fn as_others_write_it(footer_len: usize, slack: u64) -> (Arc<SimStorage>, History) {
    let sim = create(BLOCK as u32, DISK);
    let image = open(&sim, false).unwrap();
    image.close().unwrap();
    let mut disk = sim.contents();
    let mut footer = vec![0; 512];
    disk.read(0, &mut footer);
    let table = 1536;
    let (first, second) = (4u64, 13u64); // bitmap at sector 4, data 5..13; bitmap 13, data 14..22
    disk.set_len(2048);
    disk.write(table, &(first as u32).to_be_bytes());
    disk.write(table + 4, &(second as u32).to_be_bytes());
    for (n, sector) in [first, second].into_iter().enumerate() {
        disk.write(sector * 512, &[0xff; 1]);
        disk.write(sector * 512 + 512, &content(n as u8 + 1, BLOCK));
    }
    disk.write((second + 9) * 512, &content(0x77, slack * 512));
    disk.write((second + 9 + slack) * 512, &footer[..footer_len]);
    let other = SimStorage::from_disk(disk);
    let mut history = History::new();
    let image = open(&other, false).unwrap();
    for n in 0..2u8 {
        history.write(&image, &other, u64::from(n) * BLOCK, &content(n + 1, BLOCK)).unwrap();
    }
    history.flush(&image, &other).unwrap();
    (other, history)
}

#[test]
fn unaligned_files_of_other_writers_survive_every_crash() {
    // Behind 5 sectors the footer lies where the data of the next block will be.
    for (footer_len, slack) in [(512, 0), (511, 0), (512, 1), (512, 5), (511, 5), (512, 20), (511, 400)] {
        let (sim, mut history) = as_others_write_it(footer_len, slack);
        let image = open(&sim, false).unwrap();
        assert_eq!(image.geometry().payload_align, 512, "blocks of the file are off the page grid");
        history.write(&image, &sim, 2 * BLOCK + 512, &content(7, 512)).unwrap();
        history.write(&image, &sim, 12 * BLOCK, &content(8, 1024)).unwrap();
        history.flush(&image, &sim).unwrap();
        history.write(&image, &sim, 13 * BLOCK, &content(9, 512)).unwrap();
        image.close().unwrap();
        let from = sim.trace().iter().position(|op| matches!(op, TraceOp::Sync)).unwrap() + 2;
        explore_from(&sim, &history, &format!("other writer, {slack} + {footer_len}"), from);
    }
}

#[test]
fn tiny_and_large_blocks_survive_every_crash() {
    for block in [512u32, 2048, 65536, 4 << 20] {
        let size = (u64::from(block) * 32).max(DISK);
        let sim = create(block, size);
        let image = open(&sim, false).unwrap();
        let mut history = History::new();
        for n in 0..7u64 {
            let offset = n * 2 * u64::from(block);
            history.write(&image, &sim, offset, &content(n as u8 + 1, 1024)).unwrap();
        }
        history.flush(&image, &sim).unwrap();
        image.close().unwrap();
        history.note_flushed(&sim);
        explore(&sim, &history, &format!("blocks of {block}"));
    }
}

/// A light exploration, for many traces.
fn lightly(seed: u64, from: usize) -> CrashExplorer {
    CrashExplorer { exhaustive_units: 5, pair_units: 6, seeded_subsets: 6, seed, from }
}

/// What a disk holds now, taken for its history: written back once and flushed, which begins a new trace.
fn history_of(image: &Vhd, sim: &SimStorage) -> History {
    let mut history = History::new();
    for (at, sector) in formats_tests::read_nonzero_sectors(image).unwrap() {
        history.write(image, sim, at, &sector).unwrap();
    }
    image.commit().unwrap();
    sim.forget_trace();
    sim.mark(Mark::Begun(history.operations()));
    sim.mark(Mark::Acknowledged(history.operations()));
    sim.mark(Mark::Flushed(history.operations()));
    history
}

#[test]
fn a_second_crash_in_the_session_after_the_first_is_survived() {
    let sim = create(BLOCK as u32, DISK);
    let image = open(&sim, false).unwrap();
    let mut history = History::new();
    for block in [0, 7, 3, 30, 31, 12] {
        history.write(&image, &sim, block * BLOCK, &content(block as u8 + 1, 1024)).unwrap();
    }
    history.flush(&image, &sim).unwrap();
    image.close().unwrap();
    let mut second = CrashCount::default();
    let mut first = 0;
    CrashExplorer::default().explore(&sim, |state| {
        let torn = without_the_new_footer(&sim, &state).filter(needs_recovery);
        if state.storage.contents().fingerprint() % 11 != 0 && torn.is_none() {
            return;
        }
        let state = torn.unwrap_or(state);
        first += 1;
        let again = &state.storage;
        let image = open(again, false).unwrap();
        let mut history = history_of(&image, again);
        for block in [40, 3, 41] {
            history.write(&image, again, block * BLOCK + 512, &content(block as u8 + 1, 512)).unwrap();
        }
        history.flush(&image, again).unwrap();
        history.write(&image, again, 50 * BLOCK, &content(50, 512)).unwrap();
        image.close().unwrap();
        second += lightly(2, 3).explore(again, |later| {
            if let Err(why) = survive(&later, &history) {
                panic!(
                    "first crash after {}, kept {}; second after {}, kept {}: {why}",
                    state.after, state.kept, later.after, later.kept
                );
            }
        });
    });
    println!("second crashes: {second} of {first} first ones");
    assert!(first > 50);
}

#[test]
fn random_sessions_survive_crashes() {
    let mut total = CrashCount::default();
    for seed in 0..40 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let block = [512, 4096, 16384][seed as usize % 3];
        let size = 48 * u64::from(block);
        let sim = create(block, size);
        let mut image = open(&sim, false).unwrap();
        let mut history = History::new();
        for step in 0..24u8 {
            let sectors = size / 512 - u64::from(block) * 4 / 512; // the last blocks are for going on
            let first = rng.random_range(0..sectors);
            let (at, len) = (first * 512, rng.random_range(1..=(sectors - first).min(12)) * 512);
            match rng.random_range(0..12) {
                0..6 => history.write(&image, &sim, at, &content(step + 1, len)).unwrap(),
                6 => history.zero(&image, &sim, at, len, ZeroMode::Unmap).unwrap(),
                7 | 8 => history.flush(&image, &sim).unwrap(),
                9 if image.wants_maintenance() => image.maintain(&|| ()).unwrap(),
                10 => {
                    image.close().unwrap();
                    history.note_flushed(&sim);
                }
                _ => image = open(&sim, false).unwrap(),
            }
        }
        total += lightly(seed, 0).explore(&sim, |state| {
            if let Err(why) = survive(&state, &history) {
                panic!("seed {seed}: {:?} after {}, kept {}: {why}", state.kind, state.after, state.kept);
            }
        });
    }
    println!("random sessions: {total}");
}
