//! What a power cut may leave behind: every point of the trace, every subset of what was not yet synced.

use std::collections::HashSet;
use std::sync::Arc;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::disk::split;
use crate::{Progress, SECTOR, SimDisk, SimStorage, TraceOp};

/// How a crash state came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CrashKind {
    /// The power failed: of what was not synced, a subset is left.
    PowerCut,
    /// The process died: everything that was written is left.
    ProcessKill,
}

/// A file as a crash left it.
#[derive(Debug)]
pub struct CrashState {
    /// Opened anew on it, the image has to be sound. Its trace is empty.
    pub storage: Arc<SimStorage>,
    /// The crash came after this many entries of the trace.
    pub after: usize,
    /// What failed.
    pub kind: CrashKind,
    /// How far the user had come.
    pub progress: Progress,
    /// Which of the unsynced units were kept, in words.
    pub kept: String,
}

impl CrashState {
    /// The last operation whose effect must be there.
    pub fn sure(&self) -> u64 {
        match self.kind {
            CrashKind::PowerCut => self.progress.flushed,
            CrashKind::ProcessKill => self.progress.acknowledged,
        }
    }
}

/// How much was explored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CrashCount {
    /// Points of the trace after which the crash was put.
    pub points: usize,
    /// Subsets that were formed.
    pub subsets: usize,
    /// Different states among them: as many were visited.
    pub states: usize,
    /// Points at which every subset was formed.
    pub exhaustive_points: usize,
}

impl std::fmt::Display for CrashCount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { points, subsets, states, exhaustive_points } = self;
        write!(
            f,
            "{states} different crash states from {subsets} subsets at {points} points ({exhaustive_points} of them \
             exhaustively)"
        )
    }
}

impl std::ops::AddAssign for CrashCount {
    fn add_assign(&mut self, other: Self) {
        self.points += other.points;
        self.subsets += other.subsets;
        self.states += other.states;
        self.exhaustive_points += other.exhaustive_points;
    }
}

/// Enumerates crash states of a trace.
///
/// After each operation the unsynced changes are cut into units: each 512-byte sector of a write, each set_len, and each
/// quarter of a punch. Units that change nothing whatever else is kept are left out. With few units all subsets are
/// formed. With more, a covering set is: none, all, every prefix and every suffix, each one alone, all but each one,
/// every pair alone, all but every pair, and seeded subsets of every density. Kept units take effect in the order in
/// which they were issued, so later ones may be there without earlier ones.
///
/// A file that is cut short, or whose extension was lost, loses the sectors beyond its end; a write that itself extends
/// the file extends it as far as its kept sectors reach.
#[derive(Debug, Clone)]
pub struct CrashExplorer {
    /// Up to this many units all subsets are formed.
    pub exhaustive_units: usize,
    /// Up to this many units all pairs are formed.
    pub pair_units: usize,
    /// How many seeded subsets are added where not all are formed.
    pub seeded_subsets: usize,
    /// Seed of those.
    pub seed: u64,
    /// Entries of the trace before which no crash is put.
    pub from: usize,
}

impl Default for CrashExplorer {
    fn default() -> Self {
        Self { exhaustive_units: 9, pair_units: 24, seeded_subsets: 32, seed: 1, from: 0 }
    }
}

#[derive(Clone)]
enum Unit {
    Bytes { offset: u64, data: Arc<[u8]>, range: std::ops::Range<usize>, extends: bool },
    Zero { offset: u64, len: u64 },
    SetLen(u64),
}

impl Unit {
    fn apply(&self, disk: &mut SimDisk) {
        match self {
            Self::Bytes { offset, data, range, extends } => {
                let part = &data[range.clone()];
                if *extends {
                    disk.write(*offset, part);
                } else if *offset < disk.len() {
                    let n = (disk.len() - offset).min(part.len() as u64) as usize;
                    disk.write(*offset, &part[..n]);
                }
            }
            Self::Zero { offset, len } => disk.zero(*offset, (*len).min(disk.len().saturating_sub(*offset))),
            Self::SetLen(len) => disk.set_len(*len),
        }
    }
}

impl CrashExplorer {
    /// Calls `visit` with every different crash state of the storage's trace.
    pub fn explore(&self, sim: &SimStorage, mut visit: impl FnMut(CrashState)) -> CrashCount {
        let trace = sim.trace();
        let mut walk = Walk {
            explorer: self,
            count: CrashCount::default(),
            seen: HashSet::new(),
            killed: HashSet::new(),
            progress: Progress::default(),
            durable: sim.base(),
            volatile: sim.base(),
            units: Vec::new(),
            after: 0,
        };
        if self.from == 0 {
            walk.crash_here(&mut visit);
        }
        for (index, op) in trace.iter().enumerate() {
            walk.step(op);
            walk.after = index + 1;
            if walk.after >= self.from {
                walk.crash_here(&mut visit);
            }
        }
        walk.count
    }

    fn subsets(&self, n: usize, rng: &mut ChaCha8Rng) -> (Vec<Vec<bool>>, bool) {
        if n <= self.exhaustive_units {
            return (
                (0..1_u32 << n).map(|bits| (0..n).map(|i| bits >> i & 1 == 1).collect()).collect(),
                true,
            );
        }
        let mut sets = vec![vec![false; n], vec![true; n]];
        for i in 1..n {
            sets.push((0..n).map(|k| k < i).collect());
            sets.push((0..n).map(|k| k >= i).collect());
        }
        for i in 0..n {
            sets.push((0..n).map(|k| k == i).collect());
            sets.push((0..n).map(|k| k != i).collect());
        }
        for i in 0..if n <= self.pair_units { n } else { 0 } {
            for j in i + 1..n {
                sets.push((0..n).map(|k| k == i || k == j).collect());
                sets.push((0..n).map(|k| k != i && k != j).collect());
            }
        }
        for _ in 0..self.seeded_subsets {
            let density = rng.random_range(1..10);
            sets.push((0..n).map(|_| rng.random_range(0..10) < density).collect());
        }
        (sets, false)
    }
}

struct Walk<'a> {
    explorer: &'a CrashExplorer,
    count: CrashCount,
    seen: HashSet<(u64, u64)>,
    killed: HashSet<(u64, u64)>,
    progress: Progress,
    durable: SimDisk,
    volatile: SimDisk,
    units: Vec<Unit>,
    after: usize,
}

impl Walk<'_> {
    fn step(&mut self, op: &TraceOp) {
        match op {
            TraceOp::Write { offset, data } => {
                let old_len = self.volatile.len();
                for (_, _, range) in split(*offset, data.len() as u64, SECTOR) {
                    let at = offset + range.start as u64;
                    let extends = offset + range.end as u64 > old_len;
                    self.units.push(Unit::Bytes { offset: at, data: data.clone(), range, extends });
                }
                self.volatile.write(*offset, data);
            }
            TraceOp::SetLen(len) => {
                self.units.push(Unit::SetLen(*len));
                self.volatile.set_len(*len);
            }
            TraceOp::Punch { offset, len } => {
                let quarter = (len / 4).next_multiple_of(4096).max(4096);
                for (_, _, range) in split(0, *len, quarter) {
                    let unit = Unit::Zero { offset: offset + range.start as u64, len: range.len() as u64 };
                    self.units.push(unit);
                }
                self.volatile.zero(*offset, *len);
            }
            TraceOp::Sync => {
                self.durable = self.volatile.clone();
                self.units.clear();
            }
            TraceOp::Mark(mark) => self.progress.pass(*mark),
        }
    }

    /// Leaves out units that have no effect, whatever else is kept.
    fn effective_units(&self) -> Vec<Unit> {
        let mut writers = std::collections::HashMap::<u64, usize>::new();
        let lengths = self.units.iter().any(|u| matches!(u, Unit::SetLen(_)));
        for unit in &self.units {
            match unit {
                Unit::Bytes { offset, .. } => *writers.entry(offset / SECTOR).or_default() += 1,
                Unit::Zero { offset, len } => {
                    for sector in offset / SECTOR..(offset + len).div_ceil(SECTOR) {
                        *writers.entry(sector).or_default() += 1;
                    }
                }
                Unit::SetLen(_) => {}
            }
        }
        let shrinks = lengths && self.volatile.len() < self.durable.len();
        let idle = |unit: &Unit| match unit {
            Unit::Bytes { offset, data, range, extends } => {
                let mut now = vec![0; range.len()];
                self.durable.read(*offset, &mut now);
                !extends && !shrinks && writers[&(offset / SECTOR)] == 1 && now == data[range.clone()]
            }
            _ => false,
        };
        self.units.iter().filter(|u| !idle(u)).cloned().collect()
    }

    fn crash_here(&mut self, visit: &mut impl FnMut(CrashState)) {
        self.count.points += 1;
        if self.killed.insert((self.volatile.fingerprint(), self.progress.acknowledged)) {
            self.emit(self.volatile.clone(), CrashKind::ProcessKill, "everything".into(), visit);
        }
        let units = self.effective_units();
        let mut rng = ChaCha8Rng::seed_from_u64(self.explorer.seed ^ (self.after as u64) << 20);
        let (subsets, exhaustive) = self.explorer.subsets(units.len(), &mut rng);
        self.count.exhaustive_points += usize::from(exhaustive);
        for subset in subsets {
            self.count.subsets += 1;
            let mut disk = self.durable.clone();
            for (unit, _) in units.iter().zip(&subset).filter(|(_, kept)| **kept) {
                unit.apply(&mut disk);
            }
            if self.seen.insert((disk.fingerprint(), self.progress.flushed)) {
                let kept: String = subset.iter().map(|k| if *k { '1' } else { '0' }).collect();
                self.emit(disk, CrashKind::PowerCut, kept, visit);
            }
        }
    }

    fn emit(&mut self, disk: SimDisk, kind: CrashKind, kept: String, visit: &mut impl FnMut(CrashState)) {
        self.count.states += 1;
        let storage = SimStorage::from_disk(disk);
        visit(CrashState { storage, after: self.after, kind, progress: self.progress, kept });
    }
}
