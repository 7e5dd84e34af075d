//! Every crash state of a differencing VHD opens, is sound, and holds for each sector the old content (the parent's, where the
//! child had none) or the new one. What was acknowledged survives the death of the process, by the notes; notes of another
//! boot count for nothing.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod vhd_diff;

use std::collections::HashSet;
use std::sync::Arc;

use formats::{Chain, Image, Storage, ZeroMode};
use formats_tests::{
    CrashCount, CrashExplorer, CrashKind, History, Mark, Progress, SimDisk, SimStorage, TraceOp,
    read_payload, write_payload,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use vhd_diff::{BOOT, OTHER_BOOT, Tape, base, chain, child, content, layer, notes, sound};

const BLOCK: u64 = 4096;
const DISK: u64 = 64 * BLOCK;
/// From here on nobody writes but who goes on after a crash.
const QUIET: u64 = DISK - 4 * BLOCK;

/// The marks that say how far the parent's history goes begin each trace; no crash comes before them.
const MARKS: usize = 3;

/// A child over a parent with content, and all that was written to both.
struct Child {
    parent: Arc<SimStorage>,
    sim: Arc<SimStorage>,
    tape: Arc<Tape>,
    history: History,
}

impl Child {
    /// A new child with blocks of `block` bytes.
    fn new(block: u32) -> Self {
        let (parent, history) = parent_and_history();
        let image = layer(&parent, true, None).unwrap();
        let sim = child(&*image, block, DISK);
        Self::of(parent, sim, SimDisk::new(), history)
    }

    fn of(parent: Arc<SimStorage>, sim: Arc<SimStorage>, notes: SimDisk, history: History) -> Self {
        sim.forget_trace();
        let so_far = history.operations();
        for mark in [Mark::Begun(so_far), Mark::Acknowledged(so_far), Mark::Flushed(so_far)] {
            sim.mark(mark);
        }
        let tape = Tape::new(&sim, notes);
        Self { parent, sim, tape, history }
    }

    fn open(&self) -> Chain {
        let top = layer(&self.sim, false, notes(self.tape.clone(), BOOT)).unwrap();
        chain(top, std::slice::from_ref(&self.parent))
    }

    fn write(&mut self, disk: &Chain, offset: u64, data: &[u8]) {
        self.history.write(disk, &self.sim, offset, data).unwrap();
    }

    fn flush(&mut self, disk: &Chain) {
        self.history.flush(disk, &self.sim).unwrap();
    }

    fn close(&mut self, disk: &Chain) {
        disk.close().unwrap();
        self.history.note_flushed(&self.sim);
    }

    fn zero(&mut self, disk: &Chain, offset: u64, len: u64, mode: ZeroMode) {
        self.history.zero(disk, &self.sim, offset, len, mode).unwrap();
    }
}

/// A parent that holds something in three of four blocks, and its history.
fn parent_and_history() -> (Arc<SimStorage>, History) {
    let parent = base(Some(BLOCK as u32), DISK);
    let image = layer(&parent, false, None).unwrap();
    let mut history = History::new();
    for n in (0..QUIET / BLOCK).filter(|n| n % 4 != 3) {
        history.write(&*image, &parent, n * BLOCK + n % 3 * 512, &content(0xa0, 1536)).unwrap();
    }
    image.close().unwrap();
    (parent, history)
}

/// A file (and notes) as a crash left them.
struct Crashed {
    image: SimDisk,
    notes: SimDisk,
    kind: CrashKind,
    progress: Progress,
}

impl Crashed {
    fn open(&self, child: &Child, read_only: bool) -> Result<(Arc<SimStorage>, Chain), String> {
        let sim = SimStorage::from_disk(self.image.clone());
        let boot = if self.kind == CrashKind::PowerCut { OTHER_BOOT } else { BOOT };
        let file = notes(SimStorage::from_disk(self.notes.clone()), boot);
        let top = layer(&sim, read_only, file).map_err(|e| e.to_string())?;
        Ok((sim, chain(top, std::slice::from_ref(&child.parent))))
    }

    /// What has to hold: for reading, for writing with recovery, after going on from there, and after the next power cut.
    fn survive(&self, child: &Child) -> Result<(), String> {
        let history = &child.history;
        let sure = match self.kind {
            CrashKind::PowerCut => self.progress.flushed,
            CrashKind::ProcessKill => self.progress.acknowledged,
        };
        let begun = self.progress.begun;
        let (sim, reader) = self.open(child, true)?;
        sound(&sim)?;
        history.verify(&reader, sure, begun).map_err(|e| format!("for reading: {e}"))?;
        if sim.contents().fingerprint() != self.image.fingerprint() {
            return Err("opening for reading changed the file".into());
        }
        let (sim, disk) = self.open(child, false)?;
        history.verify(&disk, sure, begun)?;
        go_on(&disk, &sim)?;
        history.verify(&disk, sure, begun).map_err(|e| format!("after writing on: {e}"))?;
        disk.commit().map_err(|e| e.to_string())?;
        let later = SimStorage::from_disk(sim.durable_contents());
        let reader =
            chain(layer(&later, true, None).map_err(|e| e.to_string())?, std::slice::from_ref(&child.parent));
        history
            .verify(&reader, sure, begun)
            .map_err(|e| format!("after the flush of the next session: {e}"))?;
        disk.close().map_err(|e| e.to_string())?;
        drop(disk);
        sound(&sim).map_err(|e| format!("after closing: {e}"))?;
        let reader =
            chain(layer(&sim, true, None).map_err(|e| e.to_string())?, std::slice::from_ref(&child.parent));
        history.verify(&reader, sure, begun).map_err(|e| format!("after closing: {e}"))
    }
}

/// Writes where nothing was, sees it, and leaves zeroes.
fn go_on(disk: &Chain, sim: &SimStorage) -> Result<(), String> {
    for at in [QUIET + 512, DISK - 1024] {
        let written = write_payload(disk, at, &content(0xee, 512))
            .and_then(|()| History::new().flush(disk, sim))
            .map_err(|e| format!("writing on after the crash: {e}"));
        written?;
        if read_payload(disk, at, 512).map_err(|e| e.to_string())? != content(0xee, 512) {
            return Err(format!("what was written at {at} after the crash is not there"));
        }
        write_payload(disk, at, &[0; 512]).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// The deaths of the process at every point: of the image's operations, and of the notes' between them.
fn kill_everywhere(child: &Child, name: &str) -> usize {
    let mut seen = HashSet::new();
    let (mut disk, mut progress) = (child.sim.base(), Progress::default());
    let trace = child.sim.trace();
    for after in 0..=trace.len() {
        match after.checked_sub(1).map(|last| &trace[last]) {
            Some(TraceOp::Write { offset, data }) => disk.write(*offset, data),
            Some(TraceOp::SetLen(len)) => disk.set_len(*len),
            Some(TraceOp::Punch { offset, len }) => disk.zero(*offset, *len),
            Some(TraceOp::Mark(mark)) => progress.pass(*mark),
            Some(TraceOp::Sync) | None => {}
        }
        let notes = if after < MARKS { Vec::new() } else { child.tape.at(after) };
        for notes in notes {
            if seen.insert((disk.fingerprint(), notes.fingerprint(), progress.acknowledged)) {
                let crashed = Crashed { image: disk.clone(), notes, kind: CrashKind::ProcessKill, progress };
                if let Err(why) = crashed.survive(child) {
                    panic!(
                        "{name}: killed after {after} ({:?}), {progress:?}: {why}",
                        trace.get(after.max(1) - 1)
                    );
                }
            }
        }
    }
    seen.len()
}

/// The same power cut on a file system that keeps a new size, but not what was written there.
fn without_the_new_footer(child: &Child, after: usize, image: &SimDisk) -> Option<SimDisk> {
    let (mut now, mut durable) = (child.sim.base().len(), child.sim.base().len());
    for op in &child.sim.trace()[..after] {
        match op {
            TraceOp::Write { offset, data } => now = now.max(offset + data.len() as u64),
            TraceOp::SetLen(len) => now = *len,
            TraceOp::Sync => durable = now,
            _ => {}
        }
    }
    let mut disk = image.clone();
    disk.zero(image.len() - 512, 512);
    (image.len() > durable).then_some(disk)
}

fn cut_power_everywhere(child: &Child, explorer: &CrashExplorer, name: &str) -> CrashCount {
    explorer.explore(&child.sim, |state| {
        if state.kind == CrashKind::ProcessKill {
            return;
        }
        let image = state.storage.contents();
        let torn = without_the_new_footer(child, state.after, &image);
        // The notes may be anything that they were: they are of another boot.
        let notes = child.tape.at(state.after).pop().unwrap();
        for image in std::iter::once(image).chain(torn) {
            let crashed = Crashed { image, notes: notes.clone(), kind: state.kind, progress: state.progress };
            if let Err(why) = crashed.survive(child) {
                let op = state.after.checked_sub(1).map(|n| child.sim.trace()[n].clone());
                panic!(
                    "{name}: power cut after {} ({op:?}), {:?}, kept {}: {why}",
                    state.after, state.progress, state.kept
                );
            }
        }
    })
}

fn explore(child: &Child, name: &str) -> CrashCount {
    let kills = kill_everywhere(child, name);
    let count = cut_power_everywhere(child, &CrashExplorer { from: MARKS, ..CrashExplorer::default() }, name);
    println!("{name}: {count}; and {kills} deaths of the process");
    count
}

#[test]
fn first_writes_to_sectors_survive_every_crash() {
    let mut child = Child::new(BLOCK as u32);
    let disk = child.open();
    for (n, offset) in [0, 3 * BLOCK + 512, 9 * BLOCK - 1024, 512, 20 * BLOCK, 21 * BLOCK].iter().enumerate()
    {
        child.write(&disk, *offset, &content(n as u8 + 1, 2048));
        if n % 2 == 1 {
            child.flush(&disk);
        }
    }
    assert!(explore(&child, "first writes").states > 200);
}

#[test]
fn more_sectors_of_a_block_survive_every_crash() {
    for block in [BLOCK as u32, 512, 64 << 10, 2 << 20, 16 << 20] {
        let mut child = Child::new(block);
        let disk = child.open();
        child.write(&disk, BLOCK, &content(1, 1024));
        child.flush(&disk);
        child.write(&disk, BLOCK + 512, &content(2, 1024));
        child.write(&disk, BLOCK + 3072, &content(3, 512));
        child.flush(&disk);
        child.write(&disk, BLOCK + 512, &content(4, 512));
        child.write(&disk, 2 * BLOCK, &content(5, BLOCK));
        child.flush(&disk);
        child.write(&disk, 2 * BLOCK, &content(6, 512));
        explore(&child, &format!("blocks of {block}"));
    }
}

#[test]
fn zeroes_over_a_parent_survive_every_crash() {
    let mut child = Child::new(BLOCK as u32);
    let disk = child.open();
    child.write(&disk, 4 * BLOCK, &content(1, BLOCK));
    child.zero(&disk, 512, 2 * BLOCK, ZeroMode::Unmap);
    child.flush(&disk);
    child.zero(&disk, 4 * BLOCK + 512, 1024, ZeroMode::Keep);
    child.write(&disk, BLOCK, &content(2, 1024));
    child.flush(&disk);
    child.zero(&disk, BLOCK, 4 * BLOCK, ZeroMode::Unmap);
    child.write(&disk, 30 * BLOCK, &content(3, 512));
    explore(&child, "zeroes over a parent");
}

#[test]
fn closing_survives_every_crash() {
    let mut child = Child::new(BLOCK as u32);
    let disk = child.open();
    child.write(&disk, 5 * BLOCK, &content(1, BLOCK));
    child.close(&disk);
    assert_eq!(child.tape.notes.len().unwrap(), 0);
    child.write(&disk, 7 * BLOCK, &content(2, 1024));
    child.write(&disk, 5 * BLOCK, &content(3, 512));
    child.close(&disk);
    explore(&child, "close");
}

#[test]
fn growth_ahead_survives_every_crash() {
    let mut child = Child::new(BLOCK as u32);
    let disk = child.open();
    for n in 0..14 {
        child.write(&disk, n * BLOCK + 512, &content(n as u8 + 1, 512));
        if disk.wants_maintenance() {
            disk.maintain(&|| ()).unwrap();
        }
        if n % 5 == 4 {
            child.flush(&disk);
        }
    }
    explore(&child, "growth ahead");
}

/// A session that goes on where another one was killed, with sectors that only the notes know.
#[test]
fn a_session_on_the_notes_of_a_killed_one_survives_every_crash() {
    let mut first = Child::new(BLOCK as u32);
    let disk = first.open();
    first.write(&disk, 0, &content(1, 1024));
    first.flush(&disk);
    first.write(&disk, 8 * BLOCK, &content(2, 1024));
    first.write(&disk, 9 * BLOCK + 512, &content(3, 512));
    drop(disk);
    let sim = SimStorage::from_disk(first.sim.contents());
    let mut second = Child::of(first.parent.clone(), sim, first.tape.notes.contents(), first.history.clone());
    // Its file is what was written, and nothing of it is durable that was not flushed: what a power cut leaves of the
    // first session is explored elsewhere, so only its deaths are here.
    let disk = second.open();
    second.write(&disk, 8 * BLOCK + 512, &content(4, 1024));
    second.flush(&disk);
    second.write(&disk, 9 * BLOCK, &content(5, 512));
    second.close(&disk);
    let kills = kill_everywhere(&second, "after a kill");
    println!("a session after a kill: {kills} deaths of the process");
}

/// The child's file as other writers leave it: blocks side by side from any sector, the footer right behind the last block,
/// or behind `slack` sectors of rubbish.
fn as_others_write_it(footer_len: usize, slack: u64) -> Child {
    let Child { parent, sim, mut history, .. } = Child::new(BLOCK as u32);
    let mut disk = sim.contents();
    let mut footer = vec![0; 512];
    disk.read(0, &mut footer);
    let (table, first, second) = (0x2000, 33u64, 42u64);
    disk.set_len(0x4000);
    for (n, sector) in [first, second].into_iter().enumerate() {
        disk.write(table + 4 * n as u64, &(sector as u32).to_be_bytes());
        disk.write(sector * 512, &[0b0110_0000]);
        disk.write((sector + 2) * 512, &content(n as u8 + 1, 1024));
    }
    disk.write((second + 9) * 512, &content(0x77, slack * 512));
    disk.write((second + 9 + slack) * 512, &footer[..footer_len]);
    let other = SimStorage::from_disk(disk);
    let top = layer(&other, false, None).unwrap();
    let image = chain(top, std::slice::from_ref(&parent));
    for n in 0..2u64 {
        history.write(&image, &other, n * BLOCK + 512, &content(n as u8 + 1, 1024)).unwrap();
    }
    history.flush(&image, &other).unwrap();
    Child::of(parent, other, SimDisk::new(), history)
}

#[test]
fn files_of_other_writers_survive_every_crash() {
    // With some of them the footer lies where the bitmap, with others where the data of the next block will be.
    for (footer_len, slack) in
        [(512, 0), (511, 0), (512, 3), (512, 4), (512, 5), (511, 5), (512, 11), (512, 400)]
    {
        let mut child = as_others_write_it(footer_len, slack);
        let disk = child.open();
        assert_eq!(disk.geometry().payload_align, 512, "blocks of the file are off the page grid");
        child.write(&disk, 2 * BLOCK + 512, &content(7, 512));
        child.write(&disk, 0, &content(8, 1024));
        child.flush(&disk);
        child.write(&disk, 13 * BLOCK, &content(9, 512));
        child.close(&disk);
        explore(&child, &format!("other writer, {slack} + {footer_len}"));
    }
}

/// Two flushes at a time: the second has its sync before the first has written the bits, and takes nothing itself.
#[test]
fn flushes_that_overlap_are_durable_when_they_say_so() {
    let mut child = Child::new(BLOCK as u32);
    let disk = child.open();
    child.write(&disk, BLOCK, &content(1, 1024));
    let first = disk.sync_begin();
    child.sim.sync().unwrap();
    child.write(&disk, 2 * BLOCK, &content(2, 512));
    let second = disk.sync_begin();
    child.sim.sync().unwrap();
    let first = disk.sync_done(first).unwrap().expect("bits were written");
    let written = child.history.operations() - 1;
    let third = disk.sync_begin();
    match disk.sync_done(second).unwrap() {
        None => panic!("the second flush has bits that no sync covers"),
        Some(again) => {
            child.sim.sync().unwrap();
            assert_eq!(disk.sync_done(again).unwrap(), None, "the second sync is the last");
            child.sim.mark(Mark::Flushed(written + 1));
        }
    }
    assert_eq!(disk.sync_done(first).unwrap(), None);
    child.sim.sync().unwrap();
    // It began before the last bits were written.
    assert!(disk.sync_done(third).unwrap().is_some());
    explore(&child, "overlapping flushes");
}

fn lightly(seed: u64) -> CrashExplorer {
    CrashExplorer { exhaustive_units: 5, pair_units: 6, seeded_subsets: 6, seed, from: MARKS }
}

#[test]
fn random_sessions_survive_crashes() {
    let (mut total, mut kills) = (CrashCount::default(), 0);
    for seed in 0..12 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut child = Child::new([512, 4096, 16384, 2 << 20][seed as usize % 4]);
        let mut disk = child.open();
        for step in 0..20u8 {
            let sectors = QUIET / 512;
            let first = rng.random_range(0..if seed % 3 == 0 { 64 } else { sectors });
            let (at, len) = (first * 512, rng.random_range(1..=(sectors - first).min(12)) * 512);
            match rng.random_range(0..12) {
                0..6 => child.write(&disk, at, &content(step + 1, len)),
                6 => child.zero(&disk, at, len, ZeroMode::Unmap),
                7 | 8 => child.flush(&disk),
                9 if disk.wants_maintenance() => disk.maintain(&|| ()).unwrap(),
                10 => child.close(&disk),
                // A death of the process and its successor.
                _ => disk = child.open(),
            }
        }
        kills += kill_everywhere(&child, &format!("seed {seed}"));
        total += cut_power_everywhere(&child, &lightly(seed), &format!("seed {seed}"));
    }
    println!("random sessions: {total}; and {kills} deaths of the process");
}
