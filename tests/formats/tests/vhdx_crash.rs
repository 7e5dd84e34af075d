//! Every crash state of a dynamic VHDX opens, is sound, and holds for each sector the old content or the new.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use std::sync::Arc;

use formats::vhdx::{self, CreateParams, Vhdx};
use formats::{ErrorKind, Image, ImageType, Storage, ZeroMode};
use formats_tests::{CrashCount, CrashExplorer, CrashKind, CrashState, History, Mark, SimStorage};

const BLOCK: u64 = 1 << 20;
const DISK: u64 = 2048 * BLOCK;

fn create(sector: u32) -> Arc<SimStorage> {
    let sim = SimStorage::new();
    let params = CreateParams {
        image_type: ImageType::Dynamic,
        virtual_size: DISK,
        block_size: Some(BLOCK as u32),
        logical_sector_size: sector,
        physical_sector_size: 4096,
        log_size: Some(1 << 20),
        parent: None,
    };
    vhdx::create(&*sim, &params).unwrap();
    sim.forget_trace();
    sim
}

fn open(sim: &Arc<SimStorage>, read_only: bool) -> Result<Vhdx, String> {
    let storage: Arc<dyn Storage> = sim.clone();
    Vhdx::open(storage, read_only).map_err(|e| e.to_string())
}

/// `len` bytes that no other tag gives, different in every sector.
fn content(tag: u8, len: u64) -> Vec<u8> {
    (0..len).map(|i| if i % 512 == 0 { (i / 512) as u8 | 1 } else { tag }).collect()
}

fn sound(storage: &Arc<SimStorage>) -> Result<(), String> {
    let storage: Arc<dyn Storage> = storage.clone();
    let report = vhdx::check(storage, false).map_err(|e| e.to_string())?;
    if report.is_sound() { Ok(()) } else { Err(format!("{:?}", report.findings[0])) }
}

/// What has to hold after a crash: for reading, for writing, and after going on from there.
fn survive(state: &CrashState, history: &History) -> Result<(), String> {
    let (sure, begun) = (state.sure(), state.progress.begun);
    sound(&state.storage)?;
    let before = state.storage.contents().fingerprint();
    history.verify(&open(&state.storage, true)?, sure, begun).map_err(|e| format!("for reading: {e}"))?;
    if before != state.storage.contents().fingerprint() {
        return Err("opening for reading changed the file".into());
    }
    let image = open(&state.storage, false)?;
    history.verify(&image, sure, begun).map_err(|e| format!("for writing: {e}"))?;
    go_on(&image, state)?;
    history.verify(&image, sure, begun).map_err(|e| format!("after writing on: {e}"))?;
    image.close().map_err(|e| e.to_string())?;
    sound(&state.storage).map_err(|e| format!("after closing: {e}"))?;
    history.verify(&open(&state.storage, true)?, sure, begun).map_err(|e| format!("after closing: {e}"))
}

/// Writes to a block that had no place yet: it must show nothing but that content.
fn go_on(image: &Vhdx, state: &CrashState) -> Result<(), String> {
    let sector = u64::from(image.geometry().logical_sector_size);
    let offset = DISK - BLOCK + 4 * sector;
    let mut later = History::new();
    later
        .write(image, &state.storage, offset, &content(0xee, sector))
        .and_then(|()| later.flush(image, &state.storage))
        .map_err(|e| format!("writing on after the crash: {e}"))?;
    let read = formats_tests::read_payload(image, DISK - BLOCK, BLOCK as usize).map_err(|e| e.to_string())?;
    let (from, to) = (4 * sector as usize, 5 * sector as usize);
    if read[from..to] != content(0xee, sector) {
        return Err("what was written after the crash is not there".into());
    }
    if read[..from].iter().chain(&read[to..]).any(|b| *b != 0) {
        return Err("a new block shows what somebody else wrote".into());
    }
    formats_tests::zero_payload(image, DISK - BLOCK, BLOCK, ZeroMode::Unmap).map_err(|e| e.to_string())
}

fn explore(sim: &SimStorage, history: &History, name: &str) -> CrashCount {
    explore_from(sim, history, name, 0)
}

fn explore_from(sim: &SimStorage, history: &History, name: &str, from: usize) -> CrashCount {
    let mut kills = 0;
    let explorer = CrashExplorer { from, ..CrashExplorer::default() };
    let count = explorer.explore(sim, |state| {
        kills += usize::from(state.kind == CrashKind::ProcessKill);
        if let Err(why) = survive(&state, history) {
            let CrashState { after, kind, progress, kept, .. } = &state;
            let op = after.checked_sub(1).map(|n| sim.trace()[n].clone());
            panic!("{name}: {kind:?} after {after} ({op:?}), {progress:?}, kept {kept}: {why}");
        }
    });
    println!("{name}: {count}; {kills} process kills");
    count
}

#[test]
fn first_writes_to_blocks_survive_every_crash() {
    let sim = create(512);
    let image = open(&sim, false).unwrap();
    let mut history = History::new();
    for (n, offset) in
        [0, 3 * BLOCK + 512, 9 * BLOCK - 1024, 512, 600 * BLOCK, 601 * BLOCK].iter().enumerate()
    {
        history.write(&image, &sim, *offset, &content(n as u8 + 1, 2048)).unwrap();
        if n % 2 == 1 {
            history.flush(&image, &sim).unwrap();
        }
    }
    assert!(explore(&sim, &history, "allocation").states > 200);
}

#[test]
fn large_sectors_and_writes_across_many_blocks_survive_every_crash() {
    let sim = create(4096);
    let image = open(&sim, false).unwrap();
    let mut history = History::new();
    history.write(&image, &sim, 700 * BLOCK - 4096, &content(1, 8192)).unwrap();
    history.flush(&image, &sim).unwrap();
    history.write(&image, &sim, 511 * BLOCK - 4096, &content(2, 8192)).unwrap();
    explore(&sim, &history, "large sectors");
}

#[test]
fn growth_and_checkpoints_survive_every_crash() {
    let sim = create(512);
    let image = open(&sim, false).unwrap();
    let mut history = History::new();
    for n in 0..70u64 {
        // Most of it lies behind us; the end of one stretch of the file and a checkpoint are looked at.
        history.write(&image, &sim, n * 7 * BLOCK, &content(n as u8 + 1, 512)).unwrap();
        if n == 60 {
            history.flush(&image, &sim).unwrap();
        }
    }
    let from = sim.trace_len() - 22;
    image.maintain(&|| ()).unwrap();
    history.write(&image, &sim, 1500 * BLOCK, &content(0x71, 512)).unwrap();
    image.maintain(&|| ()).unwrap();
    history.write(&image, &sim, 1501 * BLOCK, &content(0x72, 512)).unwrap();
    explore_from(&sim, &history, "growth and checkpoints", from);
}

#[test]
fn closing_and_beginning_anew_survive_every_crash() {
    let sim = create(512);
    let image = open(&sim, false).unwrap();
    let mut history = History::new();
    history.write(&image, &sim, 5 * BLOCK, &content(1, 4096)).unwrap();
    image.close().unwrap();
    history.note_flushed(&sim);
    let short = sim.len().unwrap();
    history.write(&image, &sim, 7 * BLOCK, &content(2, 4096)).unwrap();
    history.write(&image, &sim, 5 * BLOCK, &content(3, 512)).unwrap();
    image.close().unwrap();
    history.note_flushed(&sim);
    assert_eq!(sim.len().unwrap(), short + BLOCK, "one block was added, and no slack is left");
    explore(&sim, &history, "close");
}

#[test]
fn discards_and_the_reuse_of_their_space_survive_every_crash() {
    let sim = create(512);
    let image = open(&sim, false).unwrap();
    let mut history = History::new();
    history.write(&image, &sim, 4096, &content(1, 1024)).unwrap();
    history.write(&image, &sim, BLOCK, &content(2, 1024)).unwrap();
    history.flush(&image, &sim).unwrap();
    let from = sim.trace_len();
    let places = |at| {
        let mut pieces = formats::Pieces::new();
        image.map_read(formats::ByteSpan::new(at, 512), &mut pieces).unwrap();
        pieces.as_slice()[0].place
    };
    let (first, second) = (places(0), places(BLOCK));
    history.zero(&image, &sim, 0, 2 * BLOCK, ZeroMode::Unmap).unwrap();
    // The space is not free yet: this one comes from elsewhere.
    history.write(&image, &sim, 8 * BLOCK, &content(3, 512)).unwrap();
    image.maintain(&|| ()).unwrap();
    history.write(&image, &sim, 9 * BLOCK + 512, &content(4, 512)).unwrap();
    history.write(&image, &sim, 512, &content(5, 512)).unwrap();
    let reused = [places(9 * BLOCK), places(0)];
    assert!(reused.iter().all(|p| *p == first || *p == second), "{reused:?} are {first:?} and {second:?}");
    history.flush(&image, &sim).unwrap();
    history.zero(&image, &sim, 8 * BLOCK, 2 * BLOCK, ZeroMode::Keep).unwrap();
    explore_from(&sim, &history, "discard and reuse", from);
}

#[test]
fn replaying_the_log_survives_every_crash() {
    let sim = create(512);
    let image = open(&sim, false).unwrap();
    let mut history = History::new();
    for n in 0..5u64 {
        history.write(&image, &sim, n * 600 * BLOCK / 2, &content(n as u8 + 1, 1024)).unwrap();
    }
    history.flush(&image, &sim).unwrap();
    // The power goes; everything was durable. The next session replays, writes and closes.
    let again = SimStorage::from_disk(sim.contents());
    let mut second = history.clone();
    again.mark(Mark::Begun(history.operations()));
    again.mark(Mark::Flushed(history.operations()));
    let image = open(&again, false).unwrap();
    second.write(&image, &again, 40 * BLOCK, &content(6, 512)).unwrap();
    second.flush(&image, &again).unwrap();
    second.write(&image, &again, 41 * BLOCK, &content(7, 512)).unwrap();
    image.close().unwrap();
    second.note_flushed(&again);
    explore_from(&again, &second, "replay", 2);
}

#[test]
fn the_log_wrapping_round_survives_every_crash() {
    let sim = create(512);
    let image = open(&sim, false).unwrap();
    let mut history = History::new();
    let mut looked_at = 0;
    let mut from = sim.trace_len();
    for n in 0..400u64 {
        let syncs = sim.syncs();
        history.write(&image, &sim, n * 5 * BLOCK, &content(n as u8, 512)).unwrap();
        if sim.syncs() > syncs && n > 0 {
            // The log was full: its oldest entries are applied and overwritten from here on.
            looked_at += 1;
            for more in 0..3 {
                history
                    .write(&image, &sim, n * 5 * BLOCK + (more + 1) * BLOCK, &content(more as u8, 512))
                    .unwrap();
            }
            if looked_at == 1 || looked_at == 3 {
                explore_from(&sim, &history, &format!("log full for the {looked_at}. time"), from);
            }
        }
        if n % 16 == 15 {
            history.flush(&image, &sim).unwrap();
        }
        from = sim.trace_len();
    }
    assert!(looked_at >= 3, "the log was full {looked_at} times only");
}

#[test]
fn no_space_refuses_a_write_and_harms_nothing() {
    let sim = create(512);
    let image = open(&sim, false).unwrap();
    let mut history = History::new();
    history.write(&image, &sim, 0, &content(1, 512)).unwrap();
    history.flush(&image, &sim).unwrap();
    sim.limit_len(Some(sim.len().unwrap()));
    let mut refused = 0;
    for n in 1..200u64 {
        if let Err(e) = history.write(&image, &sim, n * BLOCK, &content(2, 512)) {
            assert_eq!(e.kind, ErrorKind::NoSpace, "{e}");
            refused += 1;
        }
    }
    assert!(refused > 0);
    sim.limit_len(None);
    history.write(&image, &sim, 900 * BLOCK, &content(3, 512)).unwrap();
    history.flush(&image, &sim).unwrap();
    image.close().unwrap();
    sound(&sim).unwrap();
}
