//! What do writes cost to a dynamic image that holds nothing yet, where nearly each may need a new block?
//!
//! Every trial has a fresh image; nothing is written twice. Writes are made in batches that end with a flush, which waits for
//! all of them, as a guest's `fsync` does. Afterwards all that was written is read back and checked.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use formats::{CreateOptions, Format};
use serde::Serialize;
use serde_json::json;

use crate::choice::{Common, Kind, check_size};
use crate::drive::{Access, Driver, Link, PAGE, Pattern, Wait};
use crate::finding::Finding;
use crate::plot::{Chart, Group};
use crate::served::{Disk, Served, start_rival};
use crate::server::{Contender, create, format_of};
use crate::size::{MIB, parse_size, show_size};
use crate::spread::{Bound, Goal, Spread, maybe_spread};
use crate::sync_count::SyncCount;
use crate::table::{Table, maybe};
use crate::{interrupt, machine};

/// Writes between two flushes.
const FLUSH_EVERY: [usize; 2] = [1000, 32];
/// A trial is cut off after so long.
const LONGEST: Duration = Duration::from_secs(20);
/// Writes of the trial in which syncs are counted: fewer, as counting slows everything down.
const COUNTED_SHARE: u64 = 8;

/// What is written.
#[derive(Debug, Clone, Args)]
// The group of the question that has these has the same name.
#[group(skip)]
pub struct FirstWrites {
    /// Bytes written one behind the other in a trial
    #[arg(long, default_value = "1G", value_parser = parse_size)]
    pub sequential: u64,
    /// Bytes written at random in a trial
    #[arg(long, default_value = "256M", value_parser = parse_size)]
    pub scattered: u64,
    /// Size of the disk over which those are scattered
    #[arg(long, default_value = "64G", value_parser = parse_size)]
    pub scattered_over: u64,
    /// Block size of the VHDX images [default: blockd's own, 2M]
    #[arg(long, value_parser = parse_size)]
    pub block_size: Option<u64>,
}

/// One trial.
#[derive(Debug, Clone, Copy, Serialize)]
struct Trial {
    writes: u64,
    flushes: u64,
    seconds: f64,
    cpu_s: f64,
    /// `fsync`, `fdatasync` and their like in io_uring while a flush was under way, where they were counted.
    syncs: Option<u64>,
}

impl Trial {
    fn rate(&self) -> f64 {
        self.writes as f64 / self.seconds
    }
}

/// A kind of trial.
#[derive(Debug, Clone, Copy)]
struct Case {
    format: Kind,
    pattern: Pattern,
    disk: u64,
    writes: u64,
    flush_every: usize,
    /// Of a VHDX.
    block_size: Option<u32>,
}

impl Case {
    fn name(&self) -> String {
        let order = if self.pattern.random { "random" } else { "sequential" };
        let kib = self.pattern.block >> 10;
        format!("{}, {order} {kib} KiB, flush every {}", self.format.name(), self.flush_every)
    }

    /// Makes the image, for all contenders alike.
    fn create(&self, image: &Path) -> Result<()> {
        if self.format != Kind::Vhdx {
            return create(self.format.image(), image, self.disk);
        }
        let options =
            CreateOptions { block_size: self.block_size, ..CreateOptions::new(Format::Vhdx, self.disk) };
        formats::create(image, &options).with_context(|| format!("make {}", image.display()))
    }

    fn bound(&self) -> Bound {
        match (self.pattern.random, self.format) {
            (false, Kind::Vhdx) => Bound::AtLeast(10.0),
            (false, Kind::Vhd) => Bound::AtLeast(5.0),
            _ => Bound::None,
        }
    }

    /// The first page of each request; no page twice.
    fn places(&self, pages: u64) -> impl Iterator<Item = u64> + use<> {
        let Self { pattern, .. } = *self;
        let requests = pages / pattern.pages();
        (0..requests).map(move |index| {
            let at = if pattern.random { scatter(index, requests) } else { index };
            at * pattern.pages()
        })
    }
}

/// The `index`th of `count` numbers below `count` in a disorder that has each of them once.
fn scatter(index: u64, count: u64) -> u64 {
    let bits = u64::BITS - (count.max(2) - 1).leading_zeros();
    let (mask, half) = (u64::MAX >> (u64::BITS - bits), bits.div_ceil(2));
    let mut at = index;
    loop {
        // Each step can be undone, so that no two numbers meet; those beyond the end go on until they come back.
        for odd in [0x9e37_79b9_7f4a_7c15_u64, 0xd6e8_feb8_6659_fd93, 0xca5a_8263_9512_1157] {
            at = at.wrapping_mul(odd).wrapping_add(odd >> 7) & mask;
            at ^= at >> half;
        }
        if at < count {
            return at;
        }
    }
}

/// Measures first writes.
///
/// # Errors
/// When blockd can't be measured, and when any contender's data is wrong.
pub fn run(common: &Common, what: &FirstWrites, rounds: usize) -> Result<Finding> {
    check_size(what.sequential)?;
    check_size(what.scattered_over)?;
    ensure!(what.scattered <= what.scattered_over, "--scattered is more than --scattered-over has room for");
    let base = common.memory_dir();
    machine::need_room(&base, what.sequential.max(what.scattered * 3) + 256 * MIB)?;
    let no_rival = common.no_rival();
    let contenders: &[Contender] =
        if no_rival.is_none() { &[Contender::Blockd, Contender::Rival] } else { &[Contender::Blockd] };
    let mut finding = Finding::new("first-writes", "First writes to a dynamic image");
    describe(&mut finding, what, rounds, no_rival);
    let mut shown = Shown::default();
    let mut figures = Vec::new();
    for case in cases(what) {
        eprintln!("first writes: {} ...", case.name());
        let mut trials = vec![Vec::new(); contenders.len()];
        for round in 0..rounds {
            for turn in 0..contenders.len() {
                interrupt::check()?;
                let index = (round + turn) % contenders.len();
                trials[index].push(run_trial(&base, contenders[index], &case, false)?);
            }
        }
        let counted = count_syncs(&base, contenders, &case, &mut finding)?;
        shown.add(&mut finding, &case, &trials, &counted);
        figures.push(
            json!({"case": case.name(), "blockd": trials[0], "rival": trials.get(1), "counted": counted}),
        );
    }
    shown.finish(&mut finding);
    finding.figures = figures.into();
    Ok(finding)
}

fn cases(what: &FirstWrites) -> Vec<Case> {
    let scattered = Pattern { random: true, access: Access::Write, block: PAGE, depth: 32 };
    let sequential = Pattern { random: false, access: Access::Write, block: 128 << 10, depth: 8 };
    let mut cases = Vec::new();
    let block_size = what.block_size.and_then(|size| u32::try_from(size).ok());
    for format in [Kind::Vhdx, Kind::Vhd] {
        for (pattern, disk, bytes) in
            [(sequential, what.sequential, what.sequential), (scattered, what.scattered_over, what.scattered)]
        {
            for flush_every in FLUSH_EVERY {
                cases.push(Case {
                    format,
                    pattern,
                    disk,
                    writes: bytes / pattern.block,
                    flush_every,
                    block_size,
                });
            }
        }
    }
    cases
}

fn describe(finding: &mut Finding, what: &FirstWrites, rounds: usize, no_rival: Option<String>) {
    finding.notes.push(format!(
        "{} rounds, a fresh image for each trial, made by the same program for both. Sequential: {} in requests of 128 KiB, depth 8. Random: {} in \
         pages, depth 32, scattered over a disk of {}, none twice. A trial ends after {} s at the latest. Every flush waits \
         for the writes before it; the front end polls.",
        rounds,
        show_size(what.sequential),
        show_size(what.scattered),
        show_size(what.scattered_over),
        LONGEST.as_secs()
    ));
    finding.notes.push(
        "After each trial all that was written was read back and compared; blockd's images were checked by the rules of their \
         format."
            .into(),
    );
    let block = what.block_size.map_or_else(|| "2 MiB".to_owned(), show_size);
    finding.notes.push(format!(
        "Blocks of the VHDX are {block}, of the VHD 2 MiB. `syncs per flush`: calls that make a file durable, by system call or \
         io_uring, from a flush to its completion, whoever makes them; counted in a trial of its own."
    ));
    if let Some(why) = no_rival {
        finding.notes.push(format!("**No figures of qemu-storage-daemon: {why}.**"));
    }
}

fn run_trial(base: &Path, who: Contender, case: &Case, counted: bool) -> Result<Trial> {
    let dir = Common::folder_in(base)?;
    let image = dir.path().join(format!("disk.{}", case.format.name()));
    case.create(&image)?;
    let disk = Disk::new("disk", case.format.image(), image.clone());
    let served = match who {
        Contender::Blockd => Served::blockd(dir.path(), &[disk])?,
        Contender::Rival => start_rival(dir.path(), &disk, false)?.0,
    };
    let mut link = Link::connect(&served.socket("disk")?, 1)?;
    let mut counter = if counted { Some(SyncCount::start(served.pid(), dir.path())?) } else { None };
    let writes = if counted { case.writes / COUNTED_SHARE } else { case.writes };
    let name = || format!("{}: {}", who.name(), case.name());
    let before = served.cpu_s()?;
    let mut trial = write_all(link.driver(), case, writes, counter.as_mut()).with_context(name)?;
    trial.cpu_s = served.cpu_s()? - before;
    trial.syncs = counter.map(SyncCount::end).transpose()?;
    let written = usize::try_from(trial.writes)?;
    let pages = link.driver().pages();
    link.driver().check(&case.pattern, case.places(pages).take(written)).with_context(name)?;
    drop(link);
    if who == Contender::Blockd {
        served.stop()?;
        let report = formats::check(&image, Some(format_of(case.format.image())), false)?;
        ensure!(report.is_sound(), "WRONG: {}: the image is damaged: {:?}", name(), report.findings);
    }
    Ok(trial)
}

fn write_all(
    driver: &mut Driver,
    case: &Case,
    writes: u64,
    mut counter: Option<&mut SyncCount>,
) -> Result<Trial> {
    let mut places = case.places(driver.pages()).take(usize::try_from(writes)?).peekable();
    let mut trial = Trial { writes: 0, flushes: 0, seconds: 0.0, cpu_s: 0.0, syncs: None };
    let start = Instant::now();
    while places.peek().is_some() && start.elapsed() < LONGEST {
        let mut batch = places.by_ref().take(case.flush_every);
        let drove = driver.run_while(&case.pattern, Wait::Poll, |_, _| batch.next())?;
        match &mut counter {
            Some(counter) => counter.during(|| driver.flush(Wait::Poll))?,
            None => driver.flush(Wait::Poll)?,
        }
        trial.writes += drove.requests;
        trial.flushes += 1;
    }
    trial.seconds = start.elapsed().as_secs_f64();
    Ok(trial)
}

/// One more trial for each, with the syncs of its flushes counted; none, and a note, where that is not possible.
fn count_syncs(
    base: &Path,
    contenders: &[Contender],
    case: &Case,
    finding: &mut Finding,
) -> Result<Vec<Option<Trial>>> {
    if let Err(why) = SyncCount::is_possible() {
        let note = format!("Syncs are not counted: {why:#}.");
        if !finding.notes.contains(&note) {
            finding.notes.push(note);
        }
        return Ok(vec![None; contenders.len()]);
    }
    contenders.iter().map(|who| Ok(Some(run_trial(base, *who, case, true)?))).collect()
}

/// The table, the goals and the chart as they grow.
#[derive(Default)]
struct Shown {
    table: Option<Table>,
    groups: Vec<Group>,
}

impl Shown {
    fn add(&mut self, finding: &mut Finding, case: &Case, trials: &[Vec<Trial>], counted: &[Option<Trial>]) {
        let header = [
            "case",
            "server",
            "MB/s",
            "writes/s",
            "flushes/s",
            "CPU s per million writes",
            "syncs per flush",
        ];
        let table = self.table.get_or_insert_with(|| Table::new(2, header));
        let per_flush = |trial: &Option<Trial>| {
            trial.and_then(|trial| Some(trial.syncs? as f64 / trial.flushes.max(1) as f64))
        };
        for (index, trials) in trials.iter().enumerate() {
            let who = if index == 0 { Contender::Blockd } else { Contender::Rival };
            let each = |figure: &dyn Fn(&Trial) -> f64| maybe_spread(Spread::of(trials.iter().map(figure)));
            table.row([
                case.name(),
                who.name().into(),
                each(&|trial| trial.rate() * case.pattern.block as f64 / 1e6),
                each(&Trial::rate),
                each(&|trial| trial.flushes as f64 / trial.seconds),
                each(&|trial| trial.cpu_s * 1e6 / trial.writes as f64),
                maybe(counted.get(index).and_then(per_flush)),
            ]);
        }
        let rates =
            |index: usize| -> Vec<f64> { trials.get(index).into_iter().flatten().map(Trial::rate).collect() };
        let ratio = Spread::of_ratios(&rates(0), &rates(1));
        finding.goals.extend(Goal::ratio(case.name(), "MB/s ÷ rival", ratio, case.bound()));
        if let Some(syncs) = counted.first().and_then(per_flush).and_then(|syncs| Spread::of([syncs])) {
            finding.goals.push(Goal {
                group: case.name(),
                what: "blockd's syncs per flush".into(),
                unit: "",
                found: syncs,
                bound: Bound::AtMost(2.0),
            });
        }
        let (kib, every) = (case.pattern.block >> 10, case.flush_every);
        let label = format!("{} {kib}K\nflush/{every}", case.format.name());
        self.groups.push(Group { label, bars: vec![ratio], bound: case.bound() });
    }

    fn finish(self, finding: &mut Finding) {
        finding.tables.extend(self.table.map(|table| ("First writes".to_owned(), table)));
        let title = "First writes to a dynamic image: MB/s, blockd ÷ qemu-storage-daemon";
        let series = vec!["blockd".into()];
        finding.charts.extend(Chart::new(title, "ratio, more is better", series, self.groups));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_numbers_come_once_each_and_in_no_order() {
        for count in [1, 2, 3, 64, 1000, 4097] {
            let mut found: Vec<u64> = (0..count).map(|index| scatter(index, count)).collect();
            let in_order = found.is_sorted();
            found.sort_unstable();
            assert!(found.into_iter().eq(0..count), "{count}");
            assert!(count < 10 || !in_order, "{count}");
        }
        // Neighbours are far apart.
        let near =
            (0..10_000u64).filter(|n| scatter(*n, 1 << 24).abs_diff(scatter(n + 1, 1 << 24)) < 512).count();
        assert!(near < 20, "{near}");
    }

    #[test]
    fn sequential_first_writes_have_targets() {
        let what = FirstWrites {
            sequential: 1 << 30,
            scattered: 1 << 28,
            scattered_over: 1 << 36,
            block_size: None,
        };
        let found: Vec<_> = cases(&what).iter().map(|case| (case.name(), case.bound())).collect();
        assert_eq!(found.len(), 8);
        assert_eq!(found[0], ("vhdx, sequential 128 KiB, flush every 1000".into(), Bound::AtLeast(10.0)));
        assert_eq!(found[7], ("vhd, random 4 KiB, flush every 32".into(), Bound::None));
    }
}
