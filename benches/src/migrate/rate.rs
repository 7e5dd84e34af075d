//! How fast is a machine's memory copied, over what, beside what the loopback carries?

use anyhow::Result;
use serde_json::{Value, json};

use super::iperf;
use super::traveller::{Moved, Route, Traveller, Wire};
use super::{Ask, certificates};
use crate::interrupt;
use crate::size::{GIB, show_size};
use crate::spread::{Spread, maybe_spread};
use crate::table::Table;

/// Connections that carry memory.
const CONNECTIONS: [u32; 3] = [1, 2, 4];

/// What is measured in turns.
struct Line {
    wire: Wire,
    connections: u32,
    rounds: Vec<Moved>,
}

impl Line {
    fn gib_per_s(&self) -> Vec<f64> {
        self.rounds.iter().map(|moved| moved.number("rate_bytes_per_s") / GIB as f64).collect()
    }

    fn cpu_s_per_gib(&self) -> Vec<f64> {
        let gib = |moved: &Moved| moved.number("pages_sent") * 4096.0 / GIB as f64;
        self.rounds.iter().map(|moved| moved.cpu_s / gib(moved)).collect()
    }
}

/// Measures it.
///
/// # Errors
/// If the machine can't be moved, or its data is wrong.
pub fn run(ask: &mut Ask<'_>) -> Result<()> {
    let dir = ask.folder()?;
    let tls = Wire::Tls(certificates::make(dir.path())?);
    let guest = "selftest,fill=full,pattern=sequential";
    let mut traveller = Traveller::start(dir.path(), ask.what.large, guest, &[])?;
    traveller.wait_until_full()?;
    // The test guest polls, and would take a core while it has nothing to do; a guest that is idle does not.
    traveller.vm("pause")?;
    let wires = [Wire::Unix, Wire::Tcp, tls];
    let mut lines: Vec<Line> = CONNECTIONS
        .iter()
        .flat_map(|connections| {
            wires.clone().map(|wire| Line { wire, connections: *connections, rounds: Vec::new() })
        })
        .collect();
    let iperf = iperf::version();
    let mut loopback = vec![Vec::new(); CONNECTIONS.len()];
    for round in 0..ask.rounds() {
        eprintln!("migrate: copy rate, round {} of {} ...", round + 1, ask.rounds());
        for turn in 0..lines.len() {
            interrupt::check()?;
            let count = lines.len();
            let line = &mut lines[(round + turn) % count];
            let request = json!({"connections": line.connections});
            let moved = traveller.travel(&Route { wire: line.wire.clone(), request })?;
            anyhow::ensure!(moved.gave_up.is_none(), "an idle machine was not moved: {:?}", moved.gave_up);
            line.rounds.push(moved);
            // Beside what it is compared with.
            if matches!(line.wire, Wire::Unix) && iperf.is_some() {
                let index = CONNECTIONS.iter().position(|count| *count == line.connections).unwrap_or(0);
                let bytes_per_s = iperf::measure(line.connections, ask.what.iperf_seconds())?;
                loopback[index].push(bytes_per_s / GIB as f64);
            }
        }
        traveller.vm("resume")?;
        traveller.verify()?;
        traveller.vm("pause")?;
    }
    traveller.end()?;
    show(ask, &lines, &loopback, iperf.as_deref());
    Ok(())
}

fn show(ask: &mut Ask<'_>, lines: &[Line], loopback: &[Vec<f64>], version: Option<&str>) {
    let has_iperf = version.is_some();
    let mut rates = Table::new(
        0,
        ["connections", "Unix socket", "TCP", "TCP with TLS", "iperf3", "TCP ÷ iperf3", "TLS ÷ iperf3"],
    );
    let mut cpu = Table::new(0, ["connections", "Unix socket", "TCP", "TCP with TLS"]);
    let mut figures = Vec::new();
    for (index, connections) in CONNECTIONS.iter().enumerate() {
        let of = |name: &str| {
            lines.iter().find(|line| line.connections == *connections && line.wire.name() == name)
        };
        let three = ["Unix socket", "TCP", "TCP with TLS"].map(of);
        let rate = three.map(|line| line.map(Line::gib_per_s).unwrap_or_default());
        let beside = |ours: &[f64]| {
            if has_iperf { maybe_spread(Spread::of_ratios(ours, &loopback[index])) } else { "–".into() }
        };
        let spread = |rounds: &[f64]| maybe_spread(Spread::of(rounds.iter().copied()));
        let iperf = if has_iperf { spread(&loopback[index]) } else { "not installed".into() };
        let [unix, tcp, tls] = &rate;
        let cells = [spread(unix), spread(tcp), spread(tls), iperf, beside(tcp), beside(tls)];
        rates.row(std::iter::once(connections.to_string()).chain(cells));
        let used = three.map(|line| spread(&line.map(Line::cpu_s_per_gib).unwrap_or_default()));
        cpu.row(std::iter::once(connections.to_string()).chain(used));
        for line in three.into_iter().flatten() {
            figures.push(json!({
                "wire": line.wire.name(), "connections": connections, "gib_per_s": line.gib_per_s(),
                "cpu_s_per_gib": line.cpu_s_per_gib(), "rounds": line.rounds,
            }));
        }
        figures.push(json!({
            "wire": "iperf3", "connections": connections,
            "gib_per_s": if has_iperf { json!(loopback[index]) } else { Value::Null },
        }));
    }
    let size = show_size(ask.what.large);
    let heading =
        format!("Copying {size} of an idle guest, GiB/s: median of {} rounds (least–most)", ask.rounds());
    ask.finding.tables.push((heading, rates));
    let heading = "The same: seconds of processor time for each GiB, both sides together".to_owned();
    ask.finding.tables.push((heading, cpu));
    let version = version.map_or_else(
        || "iperf3 is not installed (package iperf3), so the loopback's limit is missing".into(),
        |version| format!(
            "iperf3 {version} sends the same few buffers again and again, out of the processor's caches, which memory that is copied once can't be"
        ),
    );
    ask.finding.notes.push(format!(
        "Copy rate: all of the {size} was filled with data that can't be compressed, then the processors were paused; the rate is that of \
         the first round, as kvm-shim tells it. {version}.",
    ));
    ask.figures.insert("copy rate".into(), figures.into());
}
