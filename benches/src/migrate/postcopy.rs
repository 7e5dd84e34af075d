//! Machines that run on the target before their memory is there: how long they wait for a page, and for how long that goes on.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;
use serde_json::{Value, json};
use system_tests::machine::Shim;

use super::Ask;
use super::traveller::{Moved, Route, Traveller, Wire};
use crate::interrupt;
use crate::size::show_size;
use crate::spread::{Spread, maybe_spread};
use crate::table::Table;

/// So little that a guest that writes as fast as it can is never paused for the rest to be copied, ms.
const DOWNTIME_MS: u64 = 25;
/// The target tells its figures so long after the end, at the latest.
const PATIENCE: Duration = Duration::from_secs(5);

/// One migration.
#[derive(Debug, Clone, Serialize)]
struct Round {
    moved: Moved,
    /// From the machine running on the target to the end of the source, which has nothing more to send then, ms.
    all_there_ms: f64,
    /// Pages that the guest waited for.
    faults: f64,
    /// Half of the waits and 99 of 100 were not longer, us; `None`: the target tells none.
    wait_us: Option<[f64; 2]>,
}

/// Measures it.
///
/// # Errors
/// If a machine is lost, or its data is wrong.
pub fn run(ask: &mut Ask<'_>) -> Result<()> {
    let sizes = [ask.what.small, ask.what.large];
    let mut rounds: [Vec<Round>; 2] = Default::default();
    let moves = ask.what.postcopy_moves();
    for (memory, rounds) in sizes.iter().zip(&mut rounds) {
        eprintln!("migrate: post-copy, {} ...", show_size(*memory));
        *rounds = measure(ask, *memory, moves)?;
    }
    let mut table = Table::new(
        1,
        ["memory", "moves", "pages waited for", "p50 us", "p99 us", "all there after ms", "stood still ms"],
    );
    for (memory, rounds) in sizes.iter().zip(&rounds) {
        let measured: Vec<&Round> = rounds.iter().filter(|round| round.wait_us.is_some()).collect();
        let spread = |figure: &dyn Fn(&Round) -> f64| {
            let spread = Spread::of(measured.iter().map(|round| figure(round)));
            if measured.is_empty() { "not measured".into() } else { maybe_spread(spread) }
        };
        let wait = |round: &Round, index: usize| round.wait_us.map_or(f64::NAN, |us| us[index]);
        table.row([
            show_size(*memory),
            measured.len().to_string(),
            spread(&|round| round.faults),
            spread(&|round| wait(round, 0)),
            spread(&|round| wait(round, 1)),
            spread(&|round| round.all_there_ms),
            spread(&|round| round.moved.downtime_ms().unwrap_or(f64::NAN)),
        ]);
    }
    let heading = "Post-copy of a guest that writes as fast as it can: medians of the moves (least–most)";
    ask.finding.tables.push((heading.into(), table));
    ask.finding.notes.push(format!(
        "Post-copy: the guest visits all of its memory in random order as fast as it can, and the machine may stand still for \
         {DOWNTIME_MS} ms, which is never enough to copy the rest. Waits are those of the guest's processor, as the receiving side \
         tells them; everything is there when the source has ended. The guest verified all of its memory after every move."
    ));
    let all: Vec<&Round> = rounds.iter().flatten().collect();
    if all.iter().any(|round| round.wait_us.is_none()) {
        let missing = all.iter().filter(|round| round.wait_us.is_none()).count();
        ask.finding.notes.push(format!(
            "{missing} of {} migrations tell of no page that was waited for (`postcopy_wait_us` of the receiving side): they were \
             not post-copy, and are not measured.",
            all.len()
        ));
    }
    let named =
        sizes.iter().zip(&rounds).map(|(memory, rounds)| json!({"memory_bytes": memory, "rounds": rounds}));
    ask.figures.insert("postcopy".into(), named.collect());
    Ok(())
}

fn measure(ask: &Ask<'_>, memory: u64, moves: u32) -> Result<Vec<Round>> {
    let dir = ask.folder()?;
    let mut traveller = Traveller::start(dir.path(), memory, "selftest,pattern=random", &[])?;
    traveller.wait_until_full()?;
    let route = Route {
        wire: Wire::Unix,
        request: json!({"connections": 2, "postcopy": true, "downtime_ms": DOWNTIME_MS}),
    };
    let mut rounds = Vec::new();
    for _ in 0..moves {
        traveller.tell(json!({"stop": false}))?;
        let mut running = None;
        let moved = traveller.travel_watched(&route, |next| {
            if running.is_none() && next.state() == "running" {
                running = Some(Instant::now());
            }
            Ok(())
        })?;
        let all_there_ms = running.map_or(0.0, |at| at.elapsed().as_secs_f64() * 1e3);
        let told = told_by(&traveller.now)?;
        let wait_us = told["postcopy_wait_us"]
            .as_array()
            .and_then(|pair| Some([pair.first()?.as_f64()?, pair.get(1)?.as_f64()?]));
        let faults = told["postcopy_faults"].as_f64().unwrap_or(0.0);
        traveller.verify()?;
        rounds.push(Round { moved, all_there_ms, faults, wait_us });
    }
    traveller.end()?;
    Ok(rounds)
}

/// What the receiving side says of the migration, as soon as it is over there.
fn told_by(target: &Shim) -> Result<Value> {
    let until = Instant::now() + PATIENCE;
    loop {
        interrupt::check()?;
        let info = target.migration()?;
        let is_over = ["arrived", "done"].iter().any(|state| info["state"] == *state);
        if is_over || Instant::now() > until {
            return Ok(info);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
