//! One move by one contender, from the empty image to the last check of the target.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use system_tests::Image;
use system_tests::histogram::Histogram;

use crate::load::{Load, Outcome, Pace, Record};
use crate::report::{ImageFile, Moved, Phase};
use crate::server::{Contender, Mark, Plan, Server, Told, Watch, format_of, serve};
use crate::{interrupt, machine, process};

/// What the guest does around the move.
#[derive(Debug, Clone, Copy)]
pub struct Guest {
    /// How fast it asks.
    pub pace: Pace,
    /// How long before the move.
    pub before: Duration,
    /// How long after it.
    pub after: Duration,
}

/// What is to be tried.
#[derive(Debug, Clone)]
pub struct Trial {
    /// The folder in which a temporary one is made.
    pub dir: PathBuf,
    /// Source and target.
    pub plan: Plan,
    /// The byte ranges of the disk that are filled before.
    pub held: Vec<std::ops::Range<u64>>,
    /// The load; none for an idle disk.
    pub guest: Option<Guest>,
    /// Of the random numbers.
    pub seed: u64,
    /// Whether the target's content is also read from its file with qemu-img, into a raw copy.
    pub read_back: bool,
}

impl Trial {
    /// Bytes filled before the move.
    pub fn held_bytes(&self) -> u64 {
        self.held.iter().map(|range| range.end - range.start).sum()
    }

    /// Runs it; everything that it made is gone afterwards.
    ///
    /// # Errors
    /// When it can't be carried out, with the end of the server's log. What is found wrong on the disk is in the result.
    pub fn run(&self, contender: Contender) -> Result<Moved> {
        let dir = tempfile::Builder::new()
            .prefix("blockd-bench-")
            .tempdir_in(&self.dir)
            .with_context(|| format!("make a folder in {}: give another with --dir", self.dir.display()))?;
        let (source, mut server) = serve(contender, dir.path(), &self.plan)?;
        let moved = self.run_on(contender, dir.path(), &source, server.as_mut());
        match moved {
            Err(_) if interrupt::is_set() => bail!("interrupted"),
            Err(error) => Err(error.context(server.log())),
            moved => moved,
        }
    }

    fn run_on(
        &self,
        contender: Contender,
        dir: &Path,
        source: &Path,
        server: &mut dyn Server,
    ) -> Result<Moved> {
        let depth = self.guest.map_or(16, |guest| guest.pace.depth);
        let mut load = Load::connect(&server.socket(), self.seed, depth)?;
        ensure!(load.bytes() == self.plan.size, "the disk has {} bytes", load.bytes());
        let fill_mb_per_s = self.fill(contender, &mut load)?;
        forget_cached(source)?;
        let source_file = image_file(server.pid()?, source)?;

        let target = dir.join(format!("target.{}", self.plan.to.name()));
        progress(contender, "moves");
        let (mut load, told, marks, phases) = self.move_under_load(load, server, &target)?;
        let target_file = image_file(server.pid()?, &target)?;

        progress(contender, "verifies every sector");
        load.verify(0..self.plan.size)?;
        let (faults, first) = load.faults();
        let mut faults: Vec<String> = first
            .map(|first| format!("{faults} of the guest's requests, the first: {first}"))
            .into_iter()
            .collect();
        let mut checks = Vec::new();
        if faults.is_empty() {
            checks.push("every sector was read over vhost-user and is as the guest wrote it".into());
        }
        let model = load.into_model();
        server.stop()?;
        progress(contender, "checks the target's file");
        check_format(contender, self.plan.to, &target, &mut checks, &mut faults);
        self.read_back(&model, dir, &target, &mut checks, &mut faults)?;

        let at = |phase: &[&str]| marks.iter().find(|mark| phase.contains(&mark.phase));
        let first = marks.first().context("a move has a beginning")?;
        let equal = at(&["verify", "ready", "switch"]).context("a move has a switch")?;
        let done = at(&["done"]).context("a move has an end")?;
        Ok(Moved {
            contender,
            disk_bytes: self.plan.size,
            held_bytes: self.held_bytes(),
            fill_mb_per_s,
            phases,
            equal_s: (equal.at - first.at).as_secs_f64(),
            total_s: (done.at - first.at).as_secs_f64(),
            cpu_equal_s: equal.cpu_s - first.cpu_s,
            cpu_total_s: done.cpu_s - first.cpu_s,
            told,
            source: source_file,
            target: target_file,
            faults,
            checks,
        })
    }

    fn fill(&self, contender: Contender, load: &mut Load) -> Result<f64> {
        progress(contender, "fills the source");
        let start = Instant::now();
        for range in &self.held {
            load.fill(range.clone())?;
        }
        Ok(self.held_bytes() as f64 / 1e6 / start.elapsed().as_secs_f64())
    }

    fn move_under_load(
        &self,
        load: Load,
        server: &mut dyn Server,
        target: &Path,
    ) -> Result<(Load, Told, Vec<Mark>, Vec<Phase>)> {
        let Some(guest) = self.guest else {
            let (told, marks) = self.order(server, target, &mut || Ok(()))?;
            return Ok((load, told, marks, Vec::new()));
        };
        let began = Instant::now();
        let running = Running::start(load, guest.pace)?;
        let moved = interrupt::sleep(guest.before, || running.check())
            .and_then(|()| self.order(server, target, &mut || running.check()))
            .and_then(|moved| interrupt::sleep(guest.after, || running.check()).map(|()| moved));
        // What stopped the load is the cause of what stopped the move.
        let load = running.stop()?;
        let (told, marks) = moved?;
        let ended = Instant::now();
        let phases = sort_into_phases(load.records(), began, &marks, ended);
        Ok((load, told, marks, phases))
    }

    fn order(
        &self,
        server: &mut dyn Server,
        target: &Path,
        look: &mut dyn FnMut() -> Result<()>,
    ) -> Result<(Told, Vec<Mark>)> {
        let mut watch = Watch::new(server.pid()?, look);
        let told = server.run_move(&self.plan, target, &mut watch)?;
        Ok((told, watch.into_marks()))
    }

    /// Reads the target as qemu-img understands it, and compares every sector.
    fn read_back(
        &self,
        model: &system_tests::model::Model,
        dir: &Path,
        target: &Path,
        checks: &mut Vec<String>,
        faults: &mut Vec<String>,
    ) -> Result<()> {
        if !self.read_back || !machine::is_there("qemu-img") {
            return Ok(());
        }
        let raw = dir.join("target-read-back.raw");
        machine::need_room(dir, self.held_bytes())?;
        match self.plan.to.to_raw(target, &raw).and_then(|()| model.check_file(&raw)) {
            Ok(()) => checks.push("every sector that qemu-img reads from the target's file is right".into()),
            Err(error) => faults.push(format!("read with qemu-img: {error:#}")),
        }
        std::fs::remove_file(&raw).or_else(|e| if raw.exists() { Err(e) } else { Ok(()) })?;
        Ok(())
    }
}

fn progress(contender: Contender, what: &str) {
    eprintln!("{} {what} ...", contender.name());
}

/// Gives the page cache of a file back, so that no contender reads from memory what it wrote just before.
///
/// # Errors
/// When the file can't be opened or synced.
pub fn forget_cached(path: &Path) -> Result<()> {
    let file = std::fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
    file.sync_all()?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    Ok(())
}

fn image_file(pid: u32, path: &Path) -> Result<ImageFile> {
    let meta = std::fs::metadata(path).with_context(|| format!("look at {}", path.display()))?;
    // `st_blocks` counts 512 bytes, whatever the file system's block is.
    let direct = process::opens_directly(pid, &path.canonicalize()?);
    Ok(ImageFile { length: meta.len(), allocated: meta.blocks() * 512, direct })
}

fn check_format(
    contender: Contender,
    kind: Image,
    target: &Path,
    checks: &mut Vec<String>,
    faults: &mut Vec<String>,
) {
    if contender == Contender::Blockd {
        match formats::check(target, Some(format_of(kind)), false) {
            Ok(report) if report.is_sound() => {
                checks.push("the target's file is sound by its format's rules".into())
            }
            Ok(report) => faults.push(format!("the target's file is damaged: {:?}", report.findings)),
            Err(error) => faults.push(format!("the target's file can't be checked: {error}")),
        }
    }
    if kind.name() == "vhdx" && machine::is_there("qemu-img") {
        match kind.check(target) {
            Ok(()) => checks.push("qemu-img check finds the target's file sound".into()),
            Err(error) => faults.push(format!("{error:#}")),
        }
    }
}

/// A load in a thread of its own.
#[derive(Debug)]
pub struct Running {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(Load, Result<()>)>,
}

impl Running {
    /// Starts the random load.
    ///
    /// # Errors
    /// When there is no thread for it.
    pub fn start(mut load: Load, pace: Pace) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let theirs = stop.clone();
        let thread = std::thread::Builder::new().name("guest".into()).spawn(move || {
            let result = load.run(pace, &theirs);
            (load, result)
        })?;
        Ok(Self { stop, thread })
    }

    /// Fails when it has ended by itself.
    ///
    /// # Errors
    /// That it has; [`Running::stop`] tells why.
    pub fn check(&self) -> Result<()> {
        ensure!(!self.thread.is_finished(), "the load has ended");
        Ok(())
    }

    /// Ends it and hands it back.
    ///
    /// # Errors
    /// What has stopped it before.
    pub fn stop(self) -> Result<Load> {
        self.stop.store(true, Ordering::Release);
        match self.thread.join() {
            Ok((load, Ok(()))) => Ok(load),
            Ok((_, Err(error))) => Err(error.context("the guest's load")),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Sorts requests by when they ended. Those that were in flight at any moment of the switch count there: it is the
/// switch that they may have waited for.
fn sort_into_phases(records: &[Record], began: Instant, marks: &[Mark], ended: Instant) -> Vec<Phase> {
    let mut starts = vec![("before", began)];
    starts
        .extend(marks.iter().map(|mark| (if mark.phase == "done" { "after" } else { mark.phase }, mark.at)));
    let end_of = |index: usize| starts.get(index + 1).map_or(ended, |next| next.1);
    let switch = starts.iter().position(|(phase, _)| *phase == "switch");
    let place = |record: &Record| {
        let end = record.began + record.took;
        let at_switch = switch.filter(|index| record.began < end_of(*index) && end >= starts[*index].1);
        at_switch.unwrap_or_else(|| starts.iter().rposition(|(_, start)| end >= *start).unwrap_or(0))
    };
    let mut sums: Vec<(Histogram, u64, u64)> = starts.iter().map(|_| Default::default()).collect();
    for record in records {
        let (waits, mismatches, errors) = &mut sums[place(record)];
        waits.record(record.took);
        *mismatches += u64::from(record.outcome == Outcome::Mismatch);
        *errors += u64::from(record.outcome == Outcome::Failed);
    }
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let phases = starts.iter().zip(&sums).enumerate().map(|(index, ((phase, start), sum))| {
        let (waits, mismatches, errors) = sum;
        let seconds = end_of(index).saturating_duration_since(*start).as_secs_f64();
        Phase {
            phase: (*phase).into(),
            seconds,
            requests: waits.count(),
            rate: if seconds > 0.0 { waits.count() as f64 / seconds } else { 0.0 },
            mismatches: *mismatches,
            errors: *errors,
            p50_ms: ms(waits.quantile(0.5)),
            p99_ms: ms(waits.quantile(0.99)),
            longest_ms: ms(waits.max()),
        }
    });
    phases.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_count_where_they_end_and_at_the_switch_when_they_overlap_it() {
        let began = Instant::now();
        let at = |ms: u64| began + Duration::from_millis(ms);
        let mark = |phase, ms| Mark { phase, at: at(ms), cpu_s: 0.0 };
        let marks = [mark("copying", 100), mark("switch", 200), mark("done", 210)];
        let record =
            |start, took, outcome| Record { began: at(start), took: Duration::from_millis(took), outcome };
        let records = [
            record(0, 10, Outcome::Right),
            record(95, 10, Outcome::Mismatch),
            record(195, 30, Outcome::Right),
            record(205, 1, Outcome::Failed),
            record(211, 1, Outcome::Right),
        ];
        let phases = sort_into_phases(&records, began, &marks, at(1210));
        let found: Vec<_> =
            phases.iter().map(|p| (p.phase.as_str(), p.requests, p.mismatches, p.errors)).collect();
        let want = [("before", 1, 0, 0), ("copying", 1, 1, 0), ("switch", 2, 0, 1), ("after", 1, 0, 0)];
        assert_eq!(found, want);
        assert!((phases[2].longest_ms - 30.0).abs() < 1e-6);
        assert!((phases[3].rate - 1.0).abs() < 1e-6);
    }
}
