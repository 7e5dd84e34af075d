//! What does it cost the guest that the pages it writes are logged?
//!
//! The machine is in this process: it is logged and collected as a migration does, in rounds, but nothing is copied.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::Serialize;
use serde_json::json;
use shim::device::serial::SerialPort;
use shim::guest::{self, SelftestOptions};
use shim::machine::SourceMachine;
use shim::memory::GuestRam;
use shim::pages::PageSet;
use shim::vm::machine::{Machine, Parts};
use shim::vm::{cpu, host, kvm};

use super::Ask;
use crate::interrupt;
use crate::size::{MIB, show_size};
use crate::spread::{Spread, maybe_spread};
use crate::table::Table;

const MEMORY: u64 = 256 * MIB;
/// Working sets in MiB.
const WORKING_SETS: [u64; 2] = [16, 200];
/// Rates in MiB/s; 0 is as fast as it goes.
const RATES: [u64; 2] = [0, 100];
/// Between two rounds of collecting.
const ROUND: Duration = Duration::from_millis(100);
/// Words of a set of pages for which writes are watched again in one call, as the threads that send pages do it.
const CHUNK_WORDS: usize = 16;
const PATIENCE: Duration = Duration::from_secs(60);

/// One round of one case.
#[derive(Debug, Clone, Copy, Serialize)]
struct Round {
    /// Visits of pages a second: before, while pages are logged, and after.
    visits_per_s: [f64; 3],
    /// Pages found written in a collection, on average.
    pages: f64,
    /// Milliseconds that a collection took, on average: to find out which, and to have them watched again.
    collect_ms: [f64; 2],
}

/// Measures it.
///
/// # Errors
/// If the machine can't be run, or its data is wrong.
pub fn run(ask: &mut Ask<'_>) -> Result<()> {
    let cases: Vec<(u64, u64)> = WORKING_SETS.iter().flat_map(|set| RATES.map(|rate| (*set, rate))).collect();
    let mut rounds = vec![Vec::new(); cases.len()];
    for round in 0..ask.rounds() {
        eprintln!("migrate: logging, round {} of {} ...", round + 1, ask.rounds());
        for turn in 0..cases.len() {
            let index = (round + turn) % cases.len();
            rounds[index].push(measure(cases[index].0, cases[index].1, ask.what.phase())?);
        }
    }
    let mut table = Table::new(
        2,
        [
            "working set",
            "writes",
            "thousand visits/s before",
            "while logged",
            "after",
            "while logged ÷ before",
            "after ÷ before",
            "pages a round",
            "collecting ms",
            "watching again ms",
        ],
    );
    for ((set, rate), rounds) in cases.iter().zip(&rounds) {
        let spread = |figure: &dyn Fn(&Round) -> f64| maybe_spread(Spread::of(rounds.iter().map(figure)));
        table.row([
            show_size(set * MIB),
            if *rate == 0 { "as fast as it can".into() } else { format!("{rate} MiB/s") },
            spread(&|round| round.visits_per_s[0] / 1e3),
            spread(&|round| round.visits_per_s[1] / 1e3),
            spread(&|round| round.visits_per_s[2] / 1e3),
            spread(&|round| round.visits_per_s[1] / round.visits_per_s[0]),
            spread(&|round| round.visits_per_s[2] / round.visits_per_s[0]),
            spread(&|round| round.pages),
            spread(&|round| round.collect_ms[0]),
            spread(&|round| round.collect_ms[1]),
        ]);
    }
    let heading = format!("Logging the pages that a guest of {} writes, nothing copied", show_size(MEMORY));
    ask.finding.tables.push((heading, table));
    ask.finding.notes.push(format!(
        "Logging: one processor visits pages in random order (24 bytes read and written in each). Each of the three phases \
         lasts {} s; while logged, what was written is collected every {} ms and watched again, as for copying.",
        ask.what.phase().as_secs_f64(),
        ROUND.as_millis()
    ));
    let named = cases
        .iter()
        .zip(&rounds)
        .map(|((set, rate), rounds)| json!({"working_set_mib": set, "mib_per_s": rate, "rounds": rounds}));
    ask.figures.insert("logging".into(), named.collect());
    Ok(())
}

fn measure(set: u64, rate: u64, phase: Duration) -> Result<Round> {
    let machine = start(set)?;
    let ram = SourceMachine::ram(&*machine);
    let until = Instant::now() + PATIENCE;
    while guest::report(ram)?.vcpus.iter().any(|vcpu| vcpu.laps < 1) {
        interrupt::check()?;
        ensure!(Instant::now() < until, "the guest does not get through its memory within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    guest::set_rate(ram, rate * MIB)?;
    let sleep = || interrupt::sleep(phase, || Ok(()));
    let before = visits_per_s(&machine, sleep)?;
    machine.start_logging()?;
    let mut found = PageSet::full(ram.pages());
    watch(&machine, &found)?;
    let mut sums = [0.0; 3];
    let mut collections = 0;
    let during = visits_per_s(&machine, || {
        let until = Instant::now() + phase;
        while Instant::now() < until {
            interrupt::sleep(ROUND, || Ok(()))?;
            let began = Instant::now();
            found.clear();
            machine.collect_dirty(&mut found)?;
            let collected = began.elapsed();
            watch(&machine, &found)?;
            sums[0] += found.len() as f64;
            sums[1] += collected.as_secs_f64() * 1e3;
            sums[2] += (began.elapsed() - collected).as_secs_f64() * 1e3;
            collections += 1;
        }
        Ok(())
    })?;
    machine.stop_logging()?;
    let after = visits_per_s(&machine, sleep)?;
    let report = guest::report(ram)?;
    ensure!(report.mismatches == 0, "WRONG: the guest found: {report:?}");
    machine.pause()?;
    machine.end();
    let [pages, collecting, watching] = sums.map(|sum| sum / f64::from(collections.max(1)));
    Ok(Round { visits_per_s: [before, during, after], pages, collect_ms: [collecting, watching] })
}

/// A machine whose guest fills its working set as fast as it can.
fn start(set: u64) -> Result<Arc<Machine>> {
    let kvm = kvm::open()?;
    let ram = GuestRam::new(MEMORY, false)?;
    let leaves = cpu::host_leaves(&kvm, None)?;
    let tsc_khz = host::tsc_khz(&kvm)?;
    let parts = Parts {
        name: "logged".into(),
        ram: ram.clone(),
        vcpus: 1,
        cpu: cpu::describe(leaves, None, cpu::msrs(&kvm)?, tsc_khz),
        serial: Arc::new(SerialPort::new(Box::new(std::io::sink()))?),
        devices: Vec::new(),
    };
    let machine = Machine::new(&kvm, parts)?;
    let options: Result<SelftestOptions, _> = format!("selftest,working-set={set}M,pattern=random").parse();
    let starts = guest::load(&ram, &options.map_err(anyhow::Error::msg)?, 1, &[], tsc_khz)?;
    for (number, start) in starts.iter().enumerate() {
        machine.begin(number, &start.regs, |sregs, _| {
            start.apply(sregs);
            Ok(())
        })?;
    }
    SourceMachine::resume(&*machine)?;
    Ok(machine)
}

/// What the guest visits in a second while something is done.
fn visits_per_s(machine: &Machine, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let ram = SourceMachine::ram(machine);
    let visits = || -> Result<u64> { Ok(guest::report(ram)?.vcpus.iter().map(|vcpu| vcpu.visits).sum()) };
    let (began, before) = (Instant::now(), visits()?);
    work()?;
    Ok((visits()? - before) as f64 / began.elapsed().as_secs_f64())
}

/// Has writes to these pages noticed again.
fn watch(machine: &Machine, set: &PageSet) -> Result<()> {
    for (index, words) in set.words().chunks(CHUNK_WORDS).enumerate() {
        if words.iter().any(|word| *word != 0) {
            machine.before_copy((index * CHUNK_WORDS * 64) as u64, words)?;
        }
    }
    Ok(())
}
