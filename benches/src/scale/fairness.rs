//! Many moves at once: does each get its share?

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blockd_api::{Job, JobSettings, MoveRequest};
use serde_json::json;

use crate::choice::{Common, Kind};
use crate::drive::{Access, Link};
use crate::interrupt;
use crate::served::{Disk, Served, call};
use crate::size::show_size;
use crate::spread::{Bound, Goal, Spread, maybe_spread};
use crate::table::Table;

use super::Ask;

/// All moves together may take so long.
const PATIENCE: Duration = Duration::from_secs(300);

/// Bytes a second of each move until all were ordered.
const SLOW: u64 = 1 << 20;

/// One round: what each had copied when the first was done copying, and how long each took.
struct Round {
    copied: Vec<u64>,
    seconds: Vec<f64>,
}

/// Measures the shares.
pub fn run(ask: &mut Ask<'_>) -> Result<()> {
    let mut rounds = Vec::new();
    for round in 0..ask.effort.rounds {
        eprintln!("{} moves at once, round {} ...", ask.scale.moves, round + 1);
        rounds.push(one_round(&ask.common.memory_dir(), ask.scale.moves, ask.scale.move_size)?);
    }
    let least_share = Spread::of(rounds.iter().map(|round| {
        let most = round.copied.iter().max().copied().unwrap_or(0);
        round.copied.iter().min().copied().unwrap_or(0) as f64 / most.max(1) as f64
    }));
    let quickest = Spread::of(rounds.iter().map(|round| {
        let [least, most] = ends(&round.seconds);
        least / most
    }));
    let mut table = Table::new(1, ["moves at once", "median (least–most of the rounds)"]);
    table.row(["least ÷ most copied when the first was done copying".into(), maybe_spread(least_share)]);
    table.row(["quickest ÷ slowest, from their release to their ends".into(), maybe_spread(quickest)]);
    let slowest = Spread::of(rounds.iter().map(|round| ends(&round.seconds)[1]));
    table.row(["seconds of the slowest".into(), maybe_spread(slowest)]);
    let heading = format!(
        "{} moves at once, a VHDX of {} each, in memory, no load; ordered with a bandwidth of 1 MiB/s, \
         which is then taken away from all at the same time",
        ask.scale.moves,
        show_size(ask.scale.move_size)
    );
    ask.finding.tables.push((heading, table));
    let what = "least ÷ most copied when the first is done";
    ask.finding.goals.extend(Goal::ratio("moves at once", what, least_share, Bound::None));
    let figures =
        rounds.iter().map(|round| json!({"copied_when_first_done": round.copied, "seconds": round.seconds}));
    ask.figures.insert("moves at once".into(), figures.collect());
    Ok(())
}

fn ends(values: &[f64]) -> [f64; 2] {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    [least, values.iter().copied().fold(0.0, f64::max)]
}

fn one_round(base: &Path, moves: u32, size: u64) -> Result<Round> {
    let dir = Common::folder_in(base)?;
    let mut disks = Vec::new();
    for n in 0..moves {
        let image = dir.path().join(format!("{n}.vhdx"));
        crate::server::create(Kind::Vhdx.image(), &image, size)?;
        disks.push(Disk::new(format!("{n}"), Kind::Vhdx.image(), image));
    }
    let served = Served::blockd(dir.path(), &disks)?;
    for disk in &disks {
        Link::connect(&served.socket(&disk.id)?, 1)?.driver().sweep(Access::Write)?;
    }
    let round = move_all(&served, &disks, dir.path()).with_context(|| served.log())?;
    for disk in &disks {
        let mut link = Link::connect(&served.socket(&disk.id)?, 1)?;
        link.driver().sweep(Access::Read).with_context(|| format!("disk {} after its move", disk.id))?;
    }
    served.stop()?;
    Ok(round)
}

/// Has all moves begin slowly, then lets all go at the same time, and looks at them until they are over. Ordering a move takes
/// longer than copying a good part of a small disk: without that, it is the order of the orders that is measured.
fn move_all(served: &Served, disks: &[Disk], dir: &Path) -> Result<Round> {
    let api = served.api();
    let mut jobs: Vec<Job> = Vec::new();
    for disk in disks {
        let request = request(&disk.id, &dir.join(format!("moved-{}.vhdx", disk.id)));
        jobs.push(call(&api, "POST", "/v1/moves", Some(&request))?);
    }
    let free = JobSettings { bandwidth: Some(0), max_guest_p99_us: None };
    let release = |job: &Job| -> Result<(Instant, Job)> {
        Ok((Instant::now(), call(&api, "PATCH", &format!("/v1/jobs/{}", job.job), Some(&free))?))
    };
    let released: Vec<Result<(Instant, Job)>> = std::thread::scope(|scope| {
        let threads: Vec<_> = jobs.iter().map(|job| scope.spawn(|| release(job))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    });
    watch(served, &released.into_iter().collect::<Result<Vec<_>>>()?)
}

fn watch(served: &Served, released: &[(Instant, Job)]) -> Result<Round> {
    let until = Instant::now() + PATIENCE;
    let mut seconds = vec![None; released.len()];
    let mut copied = None;
    while seconds.iter().any(Option::is_none) {
        interrupt::check()?;
        ensure!(Instant::now() < until, "the moves were not over within {PATIENCE:?}");
        // All in one answer, so that they are looked at in the same moment.
        let jobs: Vec<Job> = served.call("GET", "/v1/jobs", None::<&()>)?;
        let find = |id: &str| jobs.iter().find(|job| job.job == id);
        let now: Vec<&Job> = released.iter().filter_map(|(_, job)| find(&job.job)).collect();
        ensure!(now.len() == released.len(), "{} of {} moves are listed", now.len(), released.len());
        for ((job, took), (since, _)) in now.iter().zip(&mut seconds).zip(released) {
            match job.state.as_str() {
                "done" => *took = took.or_else(|| Some(since.elapsed().as_secs_f64())),
                "failed" | "cancelled" | "paused" => bail!("a move is {}: {:?}", job.state, job.error),
                _ => {}
            }
        }
        if copied.is_none() && now.iter().any(|job| !matches!(job.state.as_str(), "queued" | "copying")) {
            copied = Some(now.iter().map(|job| job.bytes_copied).collect());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(Round { copied: copied.unwrap_or_default(), seconds: seconds.into_iter().flatten().collect() })
}

fn request(disk: &str, target: &Path) -> MoveRequest {
    MoveRequest {
        disks: vec![disk.into()],
        to: target.to_string_lossy().into_owned(),
        format: Some("vhdx".into()),
        image_type: Some("dynamic".into()),
        block_size: None,
        mirror: "after-copy".into(),
        switch: "auto".into(),
        verify: "none".into(),
        bandwidth: Some(SLOW),
        max_guest_p99_us: None,
        keep_source: false,
        copy_only: false,
        flatten: false,
        files: Vec::new(),
        on_target_error: "abort".into(),
    }
}
