//! How long does a switch take, and how long does a guest wait for it? Not once but a thousand times.
//!
//! A small disk goes to and fro between two images under a load that knows every sector. Each move waits in `synced` for
//! the command to switch, so that what is measured is the switch and not the copy before it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blockd_api::{Job, MoveRequest};
use clap::Args;
use serde::Serialize;
use serde_json::json;

use crate::choice::{Common, Kind, check_size, parse_pair};
use crate::events::Events;
use crate::finding::Finding;
use crate::load::{Load, Pace, Record};
use crate::served::{Disk, Served};
use crate::server::create;
use crate::size::{MIB, parse_size, show_size};
use crate::table::{Table, number};
use crate::trial::Running;
use crate::{interrupt, machine};

const DISK: &str = "disk";
/// A state of a move may take so long to come.
const PATIENCE: Duration = Duration::from_secs(60);

/// The switches.
#[derive(Debug, Clone, Args)]
// The group of the question that has these has the same name.
#[group(skip)]
pub struct Switch {
    /// Switches for each pair of formats
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub count: u32,
    /// Size of the disk, all of which is filled
    #[arg(id = "switch-size", long = "switch-size", default_value = "16M", value_parser = parse_size)]
    pub size: u64,
    /// Requests a second of the guest: random pages, read and written in equal parts
    #[arg(id = "switch-rate", long = "switch-rate", default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub rate: u32,
    /// The two formats between which it goes to and fro, as raw:vhdx; repeatable
    #[arg(id = "switch-pair", long = "switch-pair", value_parser = parse_pair, default_values = ["vhdx:vhdx", "raw:vhdx"])]
    pub pairs: Vec<(Kind, Kind)>,
}

/// One switch, times in microseconds.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Switched {
    /// From the command to the news of the commit.
    committed_us: f64,
    /// From the command to the end of the move, with the source deleted.
    done_us: f64,
    /// From the command to move to the command to switch: copy, mirror, no verification.
    copied_us: f64,
    /// The longest request that was in flight between the command and the end.
    longest_wait_us: f64,
    /// From the decision to the durable record, as the daemon tells it.
    told_commit_us: f64,
    /// The longest wait, as the daemon tells it.
    told_wait_us: f64,
}

/// Switches a disk to and fro.
///
/// # Errors
/// When a move fails, or the guest's data is wrong.
pub fn run(common: &Common, switch: &Switch) -> Result<Finding> {
    check_size(switch.size)?;
    let base = common.memory_dir();
    machine::need_room(&base, switch.size * 3 + 64 * MIB)?;
    let mut finding =
        Finding::new("switch", format!("{} switches of a disk of {}", switch.count, show_size(switch.size)));
    finding.notes.push(format!(
        "A full disk is moved to and fro between two images in memory while its guest makes {} random 4 KiB requests a \
         second, reads and writes in equal parts, every one of them checked. Each move waits in `synced`; the command is \
         `switch`. Every sector was read and compared at the end.",
        switch.rate
    ));
    finding.notes.push(
        "A request's wait counts for a switch when the request was in flight at any moment between the command and the end of the move \
         (target renamed, source deleted)."
            .into(),
    );
    let mut figures = Vec::new();
    for (from, to) in &switch.pairs {
        let name = format!("{} to {} and back", from.name(), to.name());
        eprintln!("switches, {name} ...");
        let (switched, calm) = run_pair(&base, switch, [*from, *to], common.seed)?;
        finding.tables.push((name.clone(), table(&switched, &calm)));
        figures.push(json!({"pair": name, "switches": switched}));
    }
    finding.figures = figures.into();
    Ok(finding)
}

fn run_pair(base: &Path, switch: &Switch, kinds: [Kind; 2], seed: u64) -> Result<(Vec<Switched>, Vec<f64>)> {
    let dir = Common::folder_in(base)?;
    let path = |turn: u32| dir.path().join(format!("{turn}.{}", kinds[turn as usize % 2].name()));
    create(kinds[0].image(), &path(0), switch.size)?;
    let served = Served::blockd(dir.path(), &[Disk::new(DISK, kinds[0].image(), path(0))])?;
    let mut load = Load::connect(&served.socket(DISK)?, seed, 32)?;
    load.fill(0..switch.size)?;
    let running = Running::start(load, Pace { rate: f64::from(switch.rate), depth: 32 })?;
    let outcome = switch_often(&served, &running, switch.count, &kinds, path);
    // What stopped the load is the cause of what stopped the moves.
    let mut load = running.stop()?;
    let (mut switched, windows) = outcome.with_context(|| served.log())?;
    load.verify(0..switch.size)?;
    let (faults, first) = load.faults();
    ensure!(faults == 0, "WRONG: {faults} requests, the first: {}", first.unwrap_or("?"));
    let calm = sort_waits(load.records(), &windows, &mut switched);
    drop(load);
    served.stop()?;
    Ok((switched, calm))
}

type Windows = Vec<(Instant, Instant)>;

fn switch_often(
    served: &Served,
    running: &Running,
    count: u32,
    kinds: &[Kind; 2],
    path: impl Fn(u32) -> PathBuf,
) -> Result<(Vec<Switched>, Windows)> {
    let events = Events::follow(&served.api())?;
    let (mut switched, mut windows) = (Vec::new(), Vec::new());
    for turn in 1..=count {
        interrupt::check()?;
        running.check()?;
        let request = request(&path(turn), kinds[turn as usize % 2]);
        let began = Instant::now();
        let job: Job = served.call("POST", "/v1/moves", Some(&request))?;
        wait_for(&events, running, &job.job, "synced")?;
        let command = Instant::now();
        let _: Job = served.call("POST", &format!("/v1/jobs/{}/switch", job.job), None::<&()>)?;
        let committed = wait_for(&events, running, &job.job, "committed")?;
        let done = wait_for(&events, running, &job.job, "done")?;
        let job: Job = served.call("GET", &format!("/v1/jobs/{}", job.job), None::<&()>)?;
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        switched.push(Switched {
            committed_us: us(committed.saturating_duration_since(command)),
            done_us: us(done.saturating_duration_since(command)),
            copied_us: us(command - began),
            longest_wait_us: 0.0,
            told_commit_us: job.switch.commit_us as f64,
            told_wait_us: job.switch.longest_guest_wait_us as f64,
        });
        windows.push((command, done));
    }
    Ok((switched, windows))
}

fn request(target: &Path, kind: Kind) -> MoveRequest {
    MoveRequest {
        disks: vec![DISK.into()],
        to: target.to_string_lossy().into_owned(),
        format: Some(kind.name().into()),
        image_type: Some(kind.image().layout().into()),
        block_size: None,
        mirror: "after-copy".into(),
        switch: "manual".into(),
        verify: "none".into(),
        bandwidth: None,
        max_guest_p99_us: None,
        keep_source: false,
        copy_only: false,
        flatten: false,
        files: Vec::new(),
        on_target_error: "abort".into(),
    }
}

/// Waits for a state of a job; returns when the news of it came.
fn wait_for(events: &Events, running: &Running, job: &str, state: &str) -> Result<Instant> {
    let until = Instant::now() + PATIENCE;
    loop {
        interrupt::check()?;
        running.check()?;
        ensure!(Instant::now() < until, "job {job} was not {state} within {PATIENCE:?}");
        let Some((at, event)) = events.next(Duration::from_millis(50)) else { continue };
        if event.job.as_deref() != Some(job) {
            continue;
        }
        if event.message == state {
            return Ok(at);
        }
        if ["failed", "cancelled", "paused", "done"].iter().any(|bad| event.message.starts_with(bad)) {
            bail!("job {job} was to be {state} and is {}", event.message);
        }
    }
}

/// Gives each switch the longest wait of the requests that overlap it; returns the waits of all others, in microseconds.
fn sort_waits(records: &[Record], windows: &Windows, switched: &mut [Switched]) -> Vec<f64> {
    let mut calm = Vec::new();
    for record in records {
        let (end, wait) = (record.began + record.took, record.took.as_secs_f64() * 1e6);
        // Windows follow each other in time: those from the first that ends late enough on may overlap.
        let first = windows.partition_point(|(_, done)| *done < record.began);
        let overlapping = windows[first..].iter().take_while(|(command, _)| *command <= end).count();
        for one in &mut switched[first..first + overlapping] {
            one.longest_wait_us = one.longest_wait_us.max(wait);
        }
        if overlapping == 0 {
            calm.push(wait);
        }
    }
    calm
}

fn table(switched: &[Switched], calm: &[f64]) -> Table {
    let mut table = Table::new(1, ["milliseconds", "p50", "p99", "longest", "of"]);
    let mut row = |what: &str, mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let rank = (values.len() as f64 * share).ceil() as usize;
            values
                .get(rank.clamp(1, values.len().max(1)) - 1)
                .map_or_else(|| "–".into(), |us| number(us / 1e3))
        };
        table.row([what.to_owned(), at(0.5), at(0.99), at(1.0), values.len().to_string()]);
    };
    let each = |figure: fn(&Switched) -> f64| switched.iter().map(figure).collect::<Vec<_>>();
    row("from the command to committed", each(|one| one.committed_us));
    row("from the decision to the durable record, as blockd tells it", each(|one| one.told_commit_us));
    row("from the command to the end, source deleted", each(|one| one.done_us));
    row("longest wait of the guest at the switch", each(|one| one.longest_wait_us));
    row("longest wait at the switch, as blockd tells it", each(|one| one.told_wait_us));
    row("from the order to move to equal images", each(|one| one.copied_us));
    row("waits of all requests that met no switch", calm.to_vec());
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Outcome;

    #[test]
    fn a_wait_counts_for_every_switch_that_it_overlaps() {
        let began = Instant::now();
        let at = |ms: u64| began + Duration::from_millis(ms);
        let windows = vec![(at(10), at(20)), (at(30), at(40)), (at(50), at(60))];
        let record =
            |from, ms| Record { began: at(from), took: Duration::from_millis(ms), outcome: Outcome::Right };
        let mut switched = vec![Switched::default(); 3];
        let records = [record(0, 5), record(15, 20), record(21, 3), record(45, 1), record(39, 4)];
        let calm = sort_waits(&records, &windows, &mut switched);
        let longest: Vec<f64> = switched.iter().map(|one| one.longest_wait_us / 1e3).collect();
        assert_eq!(longest, [20.0, 20.0, 0.0]);
        assert_eq!(calm.len(), 3);
    }
}
