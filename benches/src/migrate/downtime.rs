//! How long does a machine stand still when it moves, idle and while its guest writes memory and a disk?

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};
use system_tests::Image;

use super::Ask;
use super::traveller::{Moved, Route, Traveller, Wire};
use crate::interrupt;
use crate::served::{Disk, Served};
use crate::server::create;
use crate::size::{MIB, show_size};
use crate::spread::{Bound, Goal, Spread};
use crate::table::{Table, maybe};

/// Longest time that a machine is to stand still, ms: what `kvm-shim send` does by itself.
const BUDGET_MS: f64 = 300.0;
/// A guest writes for so long before its machine is moved again.
const BETWEEN: Duration = Duration::from_millis(100);
/// A migration gives up after so long.
const TIMEOUT_MS: u64 = 20_000;
/// Rates in MiB/s that guests write memory at; 0 is idle here.
const RATES: [u64; 4] = [0, 10, 100, 1000];
/// From this rate on, processors may be slowed down.
const AUTO_CONVERGE_FROM: u64 = 1000;
/// The disk that small machines have.
const DISK_SIZE: u64 = 64 * MIB;
const DISK_RANGE: &str = "32M";

/// One kind of machine, and what came of moving it.
struct Case {
    memory: u64,
    disk: bool,
    /// MiB/s.
    rate: u64,
    moves: u32,
    rounds: Vec<Moved>,
    /// MiB/s that the guest reached before each move.
    reached: Vec<f64>,
    /// There was no time for more.
    cut: bool,
}

impl Case {
    fn name(&self) -> String {
        let disk = if self.disk { " with a disk" } else { "" };
        match self.rate {
            0 => format!("{}{disk}, idle", show_size(self.memory)),
            rate => format!("{}{disk}, {rate} MiB/s", show_size(self.memory)),
        }
    }

    fn downtimes(&self) -> Vec<f64> {
        let mut all: Vec<f64> = self.rounds.iter().filter_map(Moved::downtime_ms).collect();
        all.sort_by(f64::total_cmp);
        all
    }

    fn median(&self, figure: impl Fn(&Moved) -> f64) -> Option<f64> {
        Spread::of(self.rounds.iter().filter(|moved| moved.gave_up.is_none()).map(figure)).map(|s| s.median)
    }

    fn show(&self, table: &mut Table) {
        let downtimes = self.downtimes();
        let at = |share: f64| {
            let rank = (downtimes.len() as f64 * share).ceil() as usize;
            maybe(downtimes.get(rank.max(1) - 1).copied())
        };
        let slowed: Vec<u64> = self.rounds.iter().map(|moved| moved.throttled).filter(|t| *t > 0).collect();
        let slowed = match slowed.iter().max() {
            Some(most) => format!("{} (to {most} %)", slowed.len()),
            None => "0".into(),
        };
        let reached = Spread::of(self.reached.iter().copied()).map(|spread| spread.median);
        table.row([
            self.name(),
            format!("{}{}", downtimes.len(), if self.cut { "*" } else { "" }),
            at(0.5),
            at(0.99),
            at(1.0),
            maybe(self.median(|moved| moved.number("elapsed_ms") / 1e3)),
            maybe(self.median(|moved| moved.number("round"))),
            if self.rate == 0 { "–".into() } else { maybe(reached) },
            slowed,
            self.rounds.iter().filter(|moved| moved.gave_up.is_some()).count().to_string(),
        ]);
    }

    fn figures(&self) -> Value {
        json!({
            "case": self.name(), "memory_bytes": self.memory, "disk": self.disk, "mib_per_s": self.rate,
            "downtime_ms": self.downtimes(), "reached_mib_per_s": self.reached, "cut": self.cut, "moves": self.rounds,
        })
    }
}

/// Measures it.
///
/// # Errors
/// If a machine is lost, or its data is wrong.
pub fn run(ask: &mut Ask<'_>) -> Result<()> {
    let mut cases = cases(ask);
    for round in 0..ask.rounds() {
        for turn in 0..cases.len() {
            interrupt::check()?;
            let index = (round + turn) % cases.len();
            let case = &mut cases[index];
            eprintln!("migrate: downtime, {}, round {} of {} ...", case.name(), round + 1, ask.rounds());
            move_often(ask, case, round)?;
        }
    }
    let mut table = Table::new(
        1,
        [
            "machine and what its guest writes",
            "moves",
            "p50 ms",
            "p99 ms",
            "longest ms",
            "whole move s",
            "rounds",
            "MiB/s reached",
            "slowed down",
            "gave up",
        ],
    );
    for case in &cases {
        case.show(&mut table);
        let found = Spread::of(case.downtimes());
        let goal = Goal::ratio("standing still", case.name(), found, Bound::AtMost(BUDGET_MS));
        ask.finding.goals.extend(goal.map(|goal| Goal { unit: " ms", ..goal }));
    }
    ask.finding.tables.push(("Standing still while moving, budget 300 ms, 2 connections".into(), table));
    describe(ask, cases.iter().any(|case| case.cut));
    ask.figures.insert("downtime".into(), cases.iter().map(Case::figures).collect());
    Ok(())
}

fn cases(ask: &Ask<'_>) -> Vec<Case> {
    let (small, large) = (ask.what.small, ask.what.large);
    let moves = ask.what.moves();
    let case = |memory, disk, rate, moves| Case {
        memory,
        disk,
        rate,
        moves,
        rounds: Vec::new(),
        reached: Vec::new(),
        cut: false,
    };
    let mut cases = Vec::new();
    cases.extend(RATES.map(|rate| case(small, false, rate, moves * 3 / 2)));
    cases.extend(RATES.map(|rate| case(small, true, rate, moves * 3 / 2)));
    cases.extend(RATES.map(|rate| case(large, false, rate, moves)));
    cases
}

fn describe(ask: &mut Ask<'_>, cut: bool) {
    ask.finding.notes.push(format!(
        "Standing still: from the order to pause to the target's word that the machine runs, as kvm-shim tells it. All of the \
         memory is the guest's working set, in random order, and was written before; the guest verified all of it, and its disk, after every \
         move. The test guest polls, so one of this machine's processors is always in use by it, even when it is idle; at {AUTO_CONVERGE_FROM} MiB/s \
         kvm-shim may slow it down (`--auto-converge`). A migration gives up after {} s. The disk: {DISK_RANGE} of an image of blockd in memory, 4 \
         requests in flight, 70 % writes, as fast as it goes; at rest where the guest is idle.",
        TIMEOUT_MS / 1000
    ));
    if cut {
        let seconds = ask.what.case_seconds();
        ask.finding.notes.push(format!(
            "\\* Fewer moves than asked for: a case is ended after {seconds} s, with the small machine after half of that (`--case-seconds`)."
        ));
    }
}

/// The share of a case's moves that belongs to a round, with a machine of its own.
fn move_often(ask: &Ask<'_>, case: &mut Case, round: usize) -> Result<()> {
    let share = if case.memory == ask.what.large { 1.0 } else { 0.5 };
    let seconds = ask.what.case_seconds() * share / ask.rounds() as f64;
    let until = Instant::now() + Duration::from_secs_f64(seconds);
    let dir = ask.folder()?;
    let served = if case.disk { Some(serve(dir.path())?) } else { None };
    let mut disks = Vec::new();
    if let Some(served) = &served {
        disks.push(format!("socket={},serial=root", served.socket("disk")?.display()));
    }
    let guest = format!("selftest,pattern=random,depth=4,disk-range={DISK_RANGE}");
    let mut traveller = Traveller::start(dir.path(), case.memory, &guest, &disks)?;
    traveller.wait_until_full()?;
    traveller.tell(json!({"rate": case.rate * MIB}))?;
    let route = Route {
        wire: Wire::Unix,
        request: json!({
            "connections": 2, "timeout_ms": TIMEOUT_MS, "auto_converge": case.rate >= AUTO_CONVERGE_FROM,
        }),
    };
    let share = |round: usize| case.moves as usize * round / ask.rounds();
    let moves = share(round + 1) - share(round);
    for turn in 0..moves {
        if Instant::now() > until && turn > 0 {
            case.cut = true;
            break;
        }
        traveller.tell(json!({"stop": case.rate == 0}))?;
        let (began, before) = (Instant::now(), traveller.visits()?);
        interrupt::sleep(BETWEEN, || Ok(()))?;
        let visits = traveller.visits()? - before;
        case.reached.push(visits as f64 * 4096.0 / MIB as f64 / began.elapsed().as_secs_f64());
        case.rounds.push(traveller.travel(&route)?);
        traveller.check()?;
        traveller.verify()?;
    }
    traveller.end()?;
    served.map_or(Ok(()), Served::stop)
}

fn serve(dir: &Path) -> Result<Served> {
    let image = dir.join("disk.vhdx");
    create(Image::DynamicVhdx, &image, DISK_SIZE)?;
    Served::blockd(dir, &[Disk::new("disk", Image::DynamicVhdx, image)])
}
