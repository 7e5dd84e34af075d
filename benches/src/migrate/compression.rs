//! What does compression save on the wire, and what does it cost in time?

use anyhow::{Result, ensure};
use serde_json::json;

use super::Ask;
use super::traveller::{Moved, Route, Traveller, Wire};
use crate::interrupt;
use crate::size::{GIB, show_size};
use crate::spread::{Spread, maybe_spread};
use crate::table::Table;

const WAYS: [&str; 3] = ["none", "lz4", "zstd"];
/// What the guest leaves in a page, and what that means to a reader.
const FILLS: [(&str, &str); 2] =
    [("line", "nearly empty: a few words in each page"), ("full", "can't be compressed")];

/// Measures it.
///
/// # Errors
/// If the machine can't be moved, or its data is wrong.
pub fn run(ask: &mut Ask<'_>) -> Result<()> {
    let size = ask.what.compressed();
    let mut table = Table::new(
        2,
        ["pages", "compression", "wire bytes ÷ bytes of memory", "GiB/s of memory", "processor s per GiB"],
    );
    let mut figures = Vec::new();
    for (fill, meaning) in FILLS {
        let rounds = measure(ask, size, fill)?;
        for (way, rounds) in WAYS.iter().zip(&rounds) {
            let spread = |figure: &dyn Fn(&Moved) -> f64| maybe_spread(Spread::of(rounds.iter().map(figure)));
            let memory = |moved: &Moved| moved.number("pages_sent") * 4096.0;
            table.row([
                meaning.to_owned(),
                (*way).to_owned(),
                spread(&|moved| moved.number("bytes_sent") / memory(moved)),
                spread(&|moved| moved.number("rate_bytes_per_s") / GIB as f64),
                spread(&|moved| moved.cpu_s / memory(moved) * GIB as f64),
            ]);
            figures.push(json!({"fill": fill, "compression": way, "rounds": rounds}));
        }
    }
    let heading =
        format!("Compression: {} of an idle guest over a Unix socket, 2 connections", show_size(size));
    ask.finding.tables.push((heading, table));
    ask.figures.insert("compression".into(), figures.into());
    Ok(())
}

/// The rounds of each way, which take turns.
fn measure(ask: &Ask<'_>, size: u64, fill: &str) -> Result<[Vec<Moved>; 3]> {
    let dir = ask.folder()?;
    // So slow that it is stopped in its second lap: each lap of the nearly empty pages adds to what is in them.
    let guest = format!("selftest,fill={fill},pattern=sequential,rate=1G");
    let mut traveller = Traveller::start(dir.path(), size, &guest, &[])?;
    traveller.wait_until_full()?;
    traveller.vm("pause")?;
    let mut rounds: [Vec<Moved>; 3] = Default::default();
    for round in 0..ask.rounds() {
        eprintln!("migrate: compression, pages {fill}, round {} of {} ...", round + 1, ask.rounds());
        for turn in 0..WAYS.len() {
            interrupt::check()?;
            let index = (round + turn) % WAYS.len();
            let request = json!({"connections": 2, "compress": WAYS[index]});
            let moved = traveller.travel(&Route { wire: Wire::Unix, request })?;
            ensure!(moved.gave_up.is_none(), "an idle machine was not moved: {:?}", moved.gave_up);
            traveller.vm("resume")?;
            traveller.verify()?;
            traveller.vm("pause")?;
            rounds[index].push(moved);
        }
    }
    traveller.end()?;
    Ok(rounds)
}
