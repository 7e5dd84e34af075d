//! Every crash state of a differencing VHDX opens, is sound, and holds for each sector the old content (the parent's, where the
//! child had none) or the new one, and nothing else. What was acknowledged survives the death of the process, by the notes;
//! notes of another boot count for nothing.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod vhdx_diff;

use std::collections::HashSet;
use std::sync::Arc;

use formats::{Chain, Image, NotesFile, Storage, ZeroMode};
use formats_tests::{
    CrashCount, CrashExplorer, CrashKind, History, Mark, Progress, SimDisk, SimStorage, TraceOp, read_payload,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use vhdx_diff::{BOOT, MIB, OTHER_BOOT, Tape, content, create, layer, over, read_only, sound};

const DISK: u64 = 48 * MIB;
/// From here on nobody writes but who goes on after a crash.
const QUIET: u64 = DISK - 2 * MIB;
/// The marks that say how far the parent's history goes begin each trace; no crash comes before them.
const MARKS: usize = 3;

/// A child over a parent with content, and all that was written to both.
struct Child {
    parent: Arc<SimStorage>,
    sim: Arc<SimStorage>,
    tape: Arc<Tape>,
    history: History,
    /// Whether there is a file for notes.
    noted: bool,
}

impl Child {
    fn new(sector: u32) -> Self {
        let (parent, history) = parent_and_history(sector);
        let sim = create(DISK, sector, read_only(&parent).content_id());
        let so_far = history.operations();
        for mark in [Mark::Begun(so_far), Mark::Acknowledged(so_far), Mark::Flushed(so_far)] {
            sim.mark(mark);
        }
        let tape = Tape::new(&sim);
        Self { parent, sim, tape, history, noted: true }
    }

    /// Opens it; once more as after the death of the process.
    fn open(&self) -> Chain {
        let notes = NotesFile { storage: self.tape.clone(), boot_id: BOOT };
        over(layer(&self.sim, false, self.noted.then_some(notes)).unwrap(), &self.parent)
    }

    fn write(&mut self, disk: &Chain, offset: u64, data: &[u8]) {
        self.history.write(disk, &self.sim, offset, data).unwrap();
    }

    fn zero(&mut self, disk: &Chain, offset: u64, len: u64, mode: ZeroMode) {
        self.history.zero(disk, &self.sim, offset, len, mode).unwrap();
    }

    fn flush(&mut self, disk: &Chain) {
        self.history.flush(disk, &self.sim).unwrap();
    }

    fn close(&mut self, disk: &Chain) {
        disk.close().unwrap();
        self.history.note_flushed(&self.sim);
    }

    /// What must be there after a crash.
    fn sure(&self, kind: CrashKind, progress: Progress) -> u64 {
        match kind {
            CrashKind::ProcessKill if self.noted => progress.acknowledged,
            _ => progress.flushed,
        }
    }
}

/// A parent that holds something in most blocks, and its history.
fn parent_and_history(sector: u32) -> (Arc<SimStorage>, History) {
    let parent = create(DISK, sector, None);
    let image = layer(&parent, false, None).unwrap();
    let mut history = History::new();
    for n in (0..QUIET / MIB).filter(|n| n % 4 != 3) {
        history.write(&image, &parent, n * MIB, &content(0xa0, 4096)).unwrap();
        history.write(&image, &parent, n * MIB + MIB / 2, &content(0xa1, 4096)).unwrap();
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
    fn reopen(
        &self,
        child: &Child,
        sim: &Arc<SimStorage>,
        notes: &Arc<SimStorage>,
        for_reading: bool,
    ) -> Result<Chain, String> {
        let boot_id = if self.kind == CrashKind::PowerCut { OTHER_BOOT } else { BOOT };
        let notes = NotesFile { storage: notes.clone(), boot_id };
        let top = layer(sim, for_reading, child.noted.then_some(notes)).map_err(|e| e.to_string())?;
        Ok(over(top, &child.parent))
    }

    /// What has to hold: for reading, for writing with recovery, after being killed once more, after going on from there, and
    /// after the next power cut.
    fn survive(&self, child: &Child) -> Result<(), String> {
        let history = &child.history;
        let (sure, begun) = (child.sure(self.kind, self.progress), self.progress.begun);
        let sim = SimStorage::from_disk(self.image.clone());
        let notes = SimStorage::from_disk(self.notes.clone());
        sound(&sim)?;
        let verify = |image: &Chain, when: &str| {
            history.verify(image, sure, begun).map_err(|e| format!("{when}: {e}"))
        };
        verify(&self.reopen(child, &sim, &notes, true)?, "for reading")?;
        if sim.contents().fingerprint() != self.image.fingerprint() {
            return Err("opening for reading changed the file".into());
        }
        verify(&self.reopen(child, &sim, &notes, false)?, "for writing")?;
        let disk = self.reopen(child, &sim, &notes, false)?;
        verify(&disk, "opened once more")?;
        go_on(&disk, &sim)?;
        verify(&disk, "after writing on")?;
        let later = SimStorage::from_disk(sim.durable_contents());
        let reader = over(layer(&later, true, None).map_err(|e| e.to_string())?, &child.parent);
        verify(&reader, "after the flush of the next session")?;
        disk.close().map_err(|e| e.to_string())?;
        drop(disk);
        sound(&sim).map_err(|e| format!("after closing: {e}"))?;
        verify(&over(read_only(&sim), &child.parent), "after closing")
    }
}

/// Writes where nothing was: it must show that and nothing else. Leaves zeroes.
fn go_on(disk: &Chain, sim: &SimStorage) -> Result<(), String> {
    let sector = u64::from(disk.geometry().logical_sector_size);
    let offset = DISK - MIB + 4 * sector;
    let mut later = History::new();
    later
        .write(disk, sim, offset, &content(0xee, sector))
        .and_then(|()| later.flush(disk, sim))
        .map_err(|e| format!("writing on after the crash: {e}"))?;
    let read = read_payload(disk, DISK - MIB, MIB as usize).map_err(|e| e.to_string())?;
    let (from, to) = (4 * sector as usize, 5 * sector as usize);
    if read[from..to] != content(0xee, sector) {
        return Err("what was written after the crash is not there".into());
    }
    if read[..from].iter().chain(&read[to..]).any(|b| *b != 0) {
        return Err("a new block shows what somebody else wrote".into());
    }
    later
        .write(disk, sim, offset, &vec![0; sector as usize])
        .and_then(|()| later.flush(disk, sim))
        .map_err(|e| format!("writing zeroes after the crash: {e}"))
}

/// The deaths of the process at every point: of the image's operations, and of the notes' between them.
fn kill_everywhere(child: &Child, from: usize, name: &str) -> usize {
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
        let notes = if after < from { Vec::new() } else { child.tape.at(after) };
        for notes in notes {
            if seen.insert((disk.fingerprint(), notes.fingerprint(), progress.acknowledged)) {
                let crashed = Crashed { image: disk.clone(), notes, kind: CrashKind::ProcessKill, progress };
                if let Err(why) = crashed.survive(child) {
                    let op = trace.get(after.max(1) - 1);
                    panic!("{name}: killed after {after} ({op:?}), {progress:?}: {why}");
                }
            }
        }
    }
    seen.len()
}

fn cut_power_everywhere(child: &Child, explorer: &CrashExplorer, name: &str) -> CrashCount {
    explorer.explore(&child.sim, |state| {
        if state.kind == CrashKind::ProcessKill {
            return;
        }
        // The notes may be anything that they were: they are of another boot.
        let notes = child.tape.at(state.after).pop().unwrap();
        let (image, progress) = (state.storage.contents(), state.progress);
        let crashed = Crashed { image, notes, kind: state.kind, progress };
        if let Err(why) = crashed.survive(child) {
            let op = state.after.checked_sub(1).map(|n| child.sim.trace()[n].clone());
            panic!(
                "{name}: power cut after {} ({op:?}), {progress:?}, kept {}: {why}",
                state.after, state.kept
            );
        }
    })
}

fn explore(child: &Child, name: &str) -> CrashCount {
    explore_from(child, name, MARKS)
}

fn explore_from(child: &Child, name: &str, from: usize) -> CrashCount {
    let kills = kill_everywhere(child, from, name);
    let explorer = CrashExplorer { from, pair_units: 12, ..CrashExplorer::default() };
    let count = cut_power_everywhere(child, &explorer, name);
    println!("{name}: {count}; and {kills} deaths of the process");
    count
}

#[test]
fn first_writes_to_sectors_survive_every_crash() {
    for sector in [512, 4096] {
        let mut child = Child::new(sector);
        let disk = child.open();
        let len = u64::from(sector);
        child.write(&disk, len, &content(1, len));
        // Across two blocks.
        child.write(&disk, 9 * MIB - len, &content(2, 2 * len));
        child.flush(&disk);
        child.write(&disk, 2 * len, &content(3, len));
        child.write(&disk, 3 * MIB, &content(4, len));
        child.flush(&disk);
        assert!(explore(&child, &format!("first writes, sectors of {sector}")).states > 200);
    }
}

#[test]
fn more_sectors_of_a_block_survive_every_crash() {
    let mut child = Child::new(512);
    let disk = child.open();
    child.write(&disk, 512, &content(1, 1024));
    child.flush(&disk);
    let from = child.sim.trace_len();
    child.write(&disk, 1024, &content(2, 1024));
    child.write(&disk, MIB / 2, &content(3, 512));
    child.flush(&disk);
    child.write(&disk, 512, &content(4, 512));
    child.write(&disk, 4096, &content(5, 512));
    explore_from(&child, "more sectors", from);
}

/// A block's last sectors come: it becomes fully present. And one that is written at once.
#[test]
fn blocks_that_become_whole_survive_every_crash() {
    let mut child = Child::new(512);
    let disk = child.open();
    child.write(&disk, 0, &vec![0; MIB as usize - 1024]);
    child.flush(&disk);
    let from = child.sim.trace_len();
    child.write(&disk, MIB - 1024, &content(1, 1024));
    child.flush(&disk);
    child.write(&disk, 512, &content(2, 512));
    let mut block = vec![0; MIB as usize];
    for (n, at) in [0, 4096, MIB / 2, MIB - 512].into_iter().enumerate() {
        block[at as usize..][..512].copy_from_slice(&content(n as u8 + 3, 512));
    }
    child.write(&disk, MIB, &block);
    child.write(&disk, MIB + 512, &content(9, 512));
    child.flush(&disk);
    let mut entry = [0; 16];
    disk.maintain(&|| ()).unwrap();
    child.sim.read_at(&mut entry, 3 * MIB).unwrap();
    assert_eq!((entry[0] & 7, entry[8] & 7), (6, 6), "fully present");
    explore_from(&child, "whole blocks", from);
}

#[test]
fn zeroes_over_a_parent_survive_every_crash() {
    let mut child = Child::new(512);
    let disk = child.open();
    child.write(&disk, 4 * MIB + 512, &content(1, 1024));
    // Part of a block, a whole one without a place, and one whose sectors are not recorded yet.
    child.zero(&disk, 512, 1024, ZeroMode::Keep);
    child.zero(&disk, MIB, MIB, ZeroMode::Unmap);
    child.zero(&disk, 4 * MIB, MIB, ZeroMode::Unmap);
    child.flush(&disk);
    child.write(&disk, 4 * MIB + 512, &content(2, 512));
    child.zero(&disk, 2 * MIB - 1024, MIB, ZeroMode::Unmap);
    child.flush(&disk);
    child.write(&disk, MIB + 512, &content(3, 512));
    child.zero(&disk, 4 * MIB, MIB, ZeroMode::Keep);
    explore(&child, "zeroes over a parent");
}

#[test]
fn discards_and_the_reuse_of_their_space_survive_every_crash() {
    let mut child = Child::new(512);
    let disk = child.open();
    child.write(&disk, 512, &content(1, 1024));
    child.write(&disk, MIB + 512, &content(2, 1024));
    child.flush(&disk);
    let from = child.sim.trace_len();
    child.write(&disk, 2048, &content(3, 512));
    child.zero(&disk, 0, 2 * MIB, ZeroMode::Unmap);
    disk.maintain(&|| ()).unwrap();
    // One takes the place of another, and shows the parent where it has nothing.
    child.write(&disk, 9 * MIB + 512, &content(4, 512));
    child.write(&disk, 512, &content(5, 512));
    child.flush(&disk);
    explore_from(&child, "discard and reuse", from);
}

#[test]
fn checkpoints_survive_every_crash() {
    let mut child = Child::new(512);
    let disk = child.open();
    child.write(&disk, 512, &content(1, 512));
    child.write(&disk, 5 * MIB, &content(2, 512));
    child.flush(&disk);
    let from = child.sim.trace_len();
    child.write(&disk, 1024, &content(3, 512));
    disk.maintain(&|| ()).unwrap();
    child.write(&disk, 1536, &content(4, 512));
    child.write(&disk, 6 * MIB, &content(5, 512));
    child.flush(&disk);
    disk.maintain(&|| ()).unwrap();
    child.write(&disk, 2048, &content(6, 512));
    explore_from(&child, "checkpoints", from);
}

#[test]
fn the_log_wrapping_round_survives_every_crash() {
    let mut child = Child::new(512);
    let disk = child.open();
    let mut looked_at = 0;
    let mut from = child.sim.trace_len();
    for n in 0..400u64 {
        let syncs = child.sim.syncs();
        child.write(&disk, n % 40 * MIB + n * 1024, &content(n as u8, 512));
        child.flush(&disk);
        if child.sim.syncs() > syncs + 2 && n > 0 {
            // The log was full: its oldest entries are applied and overwritten from here on.
            looked_at += 1;
            child.write(&disk, 3 * MIB + n * 1024, &content(1, 512));
            child.flush(&disk);
            if looked_at <= 2 {
                explore_from(&child, &format!("log full for the {looked_at}. time"), from);
            }
        }
        from = child.sim.trace_len();
    }
    assert!(looked_at >= 2, "the log was full {looked_at} times only");
}

#[test]
fn closing_and_beginning_anew_survive_every_crash() {
    let mut child = Child::new(512);
    let disk = child.open();
    child.write(&disk, 5 * MIB, &content(1, 1024));
    child.close(&disk);
    child.write(&disk, 7 * MIB, &content(2, 512));
    child.write(&disk, 5 * MIB, &content(3, 1536));
    child.close(&disk);
    explore(&child, "close");
}

/// m21, and the notes: sessions that go on where others were killed, and are killed and cut off themselves. Nothing that the
/// killed ones wrote is durable when the next one begins.
#[test]
fn sessions_on_the_notes_of_killed_ones_survive_every_crash() {
    let mut child = Child::new(512);
    let disk = child.open();
    child.write(&disk, 0, &content(1, 1024));
    child.flush(&disk);
    child.write(&disk, 512, &content(2, 1024));
    child.write(&disk, 9 * MIB + 512, &content(3, 512));
    let from = child.sim.trace_len();
    drop(disk);
    let disk = child.open();
    child.write(&disk, 9 * MIB, &content(4, 512));
    drop(disk);
    let disk = child.open();
    child.write(&disk, 9 * MIB + 512, &content(5, 1024));
    child.flush(&disk);
    child.write(&disk, 10 * MIB, &content(6, 512));
    drop(disk);
    // The last one only closes.
    let disk = child.open();
    child.close(&disk);
    explore_from(&child, "sessions after kills", from);
}

#[test]
fn a_discard_before_a_kill_is_not_undone_by_notes() {
    let mut child = Child::new(512);
    let disk = child.open();
    child.write(&disk, 512, &content(1, 1024));
    child.zero(&disk, 0, MIB, ZeroMode::Unmap);
    child.write(&disk, 4 * MIB, &content(2, 512));
    drop(disk);
    let disk = child.open();
    child.write(&disk, 512, &content(3, 512));
    child.flush(&disk);
    explore(&child, "discard before a kill");
}

#[test]
fn without_notes_what_was_not_flushed_is_the_parents_after_a_kill() {
    let mut child = Child::new(512);
    child.noted = false;
    let disk = child.open();
    child.write(&disk, 512, &content(1, 1024));
    child.flush(&disk);
    child.write(&disk, 1024, &content(2, 1024));
    child.write(&disk, 6 * MIB, &content(3, 512));
    disk.commit().unwrap();
    child.history.note_flushed(&child.sim);
    child.write(&disk, 6 * MIB + 512, &content(4, 512));
    explore(&child, "without notes");
}

#[test]
fn a_full_disk_under_the_notes_costs_time_and_no_write() {
    let mut child = Child::new(512);
    child.tape.notes.limit_len(Some(0));
    let disk = child.open();
    for n in 0..4 {
        child.write(&disk, n * MIB / 2 + 512, &content(n as u8 + 1, 512));
    }
    child.flush(&disk);
    explore(&child, "no space for notes");
}

/// Random sessions on a few blocks, with kills in between.
#[test]
fn random_sessions_survive_every_crash() {
    for seed in 0..8 {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut child = Child::new(if seed % 3 == 2 { 4096 } else { 512 });
        let sector = if seed % 3 == 2 { 4096 } else { 512 };
        let mut disk = child.open();
        for step in 0..14u8 {
            let at = random.random_range(0..3) * MIB + random.random_range(0..8) * sector;
            match random.random_range(0..12) {
                0..5 => child.write(&disk, at, &content(step + 1, sector)),
                5 => child.zero(&disk, at, sector, ZeroMode::Unmap),
                6 => child.zero(&disk, at / MIB * MIB, MIB, ZeroMode::Unmap),
                7 | 8 => child.flush(&disk),
                9 => disk.maintain(&|| ()).unwrap(),
                10 => child.close(&disk),
                _ => {
                    drop(disk);
                    disk = child.open();
                }
            }
        }
        let kills = kill_everywhere(&child, MARKS, "random sessions");
        let explorer =
            CrashExplorer { exhaustive_units: 6, pair_units: 0, seeded_subsets: 8, seed, from: MARKS };
        let count = cut_power_everywhere(&child, &explorer, "random sessions");
        println!("random session {seed}: {count}; and {kills} deaths of the process");
    }
}
