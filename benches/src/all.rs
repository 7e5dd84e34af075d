//! Every question, and the page that answers them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::json;

use crate::chain::{self, Chains};
use crate::choice::{Common, Effort, Kind, parse_pair};
use crate::copy::{self, Copying};
use crate::finding::Finding;
use crate::first_writes::{self, FirstWrites};
use crate::machine::Machine;
use crate::migrate::{self, Migrate};
use crate::report::Comparison;
use crate::scale::{self, Scale};
use crate::serve::{self, Place, Serve};
use crate::size::{parse_size, show_size};
use crate::switch::{self, Switch};
use crate::table::{Table, number};
use crate::{interrupt, moving, plot, thin};

/// A part of the page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Serving in memory
    Serve,
    /// Serving on the disk
    ServeDisk,
    /// First writes to dynamic images
    FirstWrites,
    /// Full disks moved under load
    Moves,
    /// Full and thin disks copied without load
    Copy,
    /// A thin disk moved
    Thin,
    /// Reads through chains
    Chain,
    /// A thousand switches
    Switch,
    /// More disks, queues, larger images
    Scale,
    /// Running machines moved from process to process
    Migrate,
}

/// Everything that can be asked for.
#[derive(Debug, Clone, Args)]
pub struct All {
    #[command(flatten)]
    common: Common,
    /// Folder in memory; --dir is the one on a disk
    #[arg(long, default_value = "/dev/shm")]
    memory_dir: PathBuf,
    /// Only this part; repeatable
    #[arg(long, value_enum)]
    only: Vec<Part>,
    #[command(flatten)]
    effort: Effort,
    #[command(flatten)]
    serve: Serve,
    #[command(flatten)]
    writes: FirstWrites,
    #[command(flatten)]
    load: moving::Load,
    /// Formats of source and target of a move, as vhd:vhdx; repeatable
    #[arg(long = "pair", value_parser = parse_pair, default_values = ["vhd:vhdx", "vhdx:vhdx", "raw:raw"])]
    pairs: Vec<(Kind, Kind)>,
    /// Size of the thin disk
    #[arg(long, default_value = "64G", value_parser = parse_size)]
    thin_size: u64,
    /// What the thin disk holds, in 16 pieces
    #[arg(long, default_value = "1G", value_parser = parse_size)]
    thin_held: u64,
    /// The thin disk's format, which it keeps
    #[arg(long, value_enum, default_value = "vhdx")]
    thin_format: Kind,
    #[command(flatten)]
    switch: Switch,
    #[command(flatten)]
    scale: Scale,
    /// The page; the figures and the plot go beside it, with the endings .json and .svg
    #[arg(long)]
    out: PathBuf,
}

/// Answers, and where they come from.
#[derive(Debug, Serialize)]
pub struct Results {
    /// The machine.
    pub machine: Machine,
    /// One for each question.
    pub findings: Vec<Finding>,
    /// One for each move that was measured.
    pub comparisons: Vec<Comparison>,
    /// What could not be answered, and why.
    pub failures: Vec<String>,
}

impl Results {
    /// No answers yet.
    ///
    /// # Errors
    /// As [`Machine::look`].
    pub fn new(common: &Common) -> Result<Self> {
        Self::in_dir(&common.dir())
    }

    /// No answers yet; images will be in `dir`.
    ///
    /// # Errors
    /// As [`Machine::look`].
    pub fn in_dir(dir: &Path) -> Result<Self> {
        let machine = Machine::look(dir)?;
        if let Some(warning) = machine.warning() {
            eprintln!("{warning}");
        }
        Ok(Self { machine, findings: Vec::new(), comparisons: Vec::new(), failures: Vec::new() })
    }

    /// Adds an answer and prints it.
    pub fn add(&mut self, comparison: Comparison) {
        println!("{comparison}");
        self.comparisons.push(comparison);
    }

    /// Adds an answer and prints it.
    pub fn add_finding(&mut self, finding: Finding) {
        println!("{finding}");
        self.findings.push(finding);
    }

    /// Whether nothing was wrong.
    pub fn is_sound(&self) -> bool {
        self.comparisons.iter().all(Comparison::is_sound)
            && self.findings.iter().all(Finding::is_sound)
            && self.failures.is_empty()
    }

    /// Writes the figures as JSON.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn write_json(&self, path: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(self)?;
        std::fs::write(path, json + "\n").with_context(|| format!("write {}", path.display()))
    }

    /// Writes the page, and the figures and the plot beside it.
    ///
    /// # Errors
    /// When a file can't be written.
    pub fn write_page(&self, path: &Path) -> Result<()> {
        let plot = path.with_extension("svg");
        let charts: Vec<_> = self.findings.iter().flat_map(|finding| finding.charts.clone()).collect();
        let mut page = self.head();
        if !charts.is_empty() {
            std::fs::write(&plot, plot::draw(&charts))
                .with_context(|| format!("write {}", plot.display()))?;
            let name = plot.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            page.push_str(&format!(
                "\n![Ratios to what would be used instead, with least and most]({name})\n"
            ));
        }
        for finding in &self.findings {
            page.push_str(&format!("\n{finding}"));
        }
        if !self.comparisons.is_empty() {
            page.push_str(ABOUT_MOVES);
        }
        for comparison in &self.comparisons {
            page.push_str(&format!("\n{comparison}"));
        }
        std::fs::write(path, page).with_context(|| format!("write {}", path.display()))?;
        self.write_json(&path.with_extension("json"))
    }

    fn head(&self) -> String {
        let mut head = format!("# Results\n\n{ABOUT}\n{}", self.machine);
        for failure in &self.failures {
            head.push_str(&format!("* **WRONG: {failure}**\n"));
        }
        let mut table = Table::new(1, ["question", "targets", "reached"]);
        for finding in &self.findings {
            let (all, met) = finding.score();
            table.row([finding.title.clone(), all.to_string(), met.to_string()]);
        }
        if !self.findings.is_empty() {
            head.push_str(&format!("\n{table}"));
        }
        head
    }
}

const ABOUT: &str = "\
Made by `blockd-bench results`. Figures of one machine say nothing about another, and this one is noisy: everything that \
is compared was measured in turns in the same run, each figure is the median of the rounds with the least and the most, and \
ratios are made within the rounds. Every target is held against the median. Data is verified while it is measured: a run in which \
any of it was wrong has no figures. All rounds are in the file with the ending `.json` beside this one.
";

const ABOUT_MOVES: &str = "
# Moves

Both servers were run one after the other, each with an image of its own that was made by the same program and filled over \
vhost-user by the same front end. qemu-storage-daemon was set up with cache.direct=on, aio=io_uring and, where it lived \
through that, an iothread, and moved the disk by blockdev-mirror and job-complete; whatever of an image was in the page cache \
was given back before the move.

Waits are from putting a request into the ring to seeing its completion. Requests that overlapped the \
switch count there. Requests that the guest could not make in time, because as many as it may have were in \
flight, are not made up for: the column `per s` shows what was reached. Processor time is the server's, the \
guest's requests included; in all, blockd's includes reading back both images, which qemu-storage-daemon \
does not do.
";

/// Asks every question; the page is written after each, so that a run that is broken off has left something. Returns whether
/// nothing was wrong.
///
/// # Errors
/// When the page can't be written, or on a signal. A question that can't be answered is told in the page.
pub fn run(all: &All) -> Result<bool> {
    let memory = Common { dir: Some(all.memory_dir.clone()), ..all.common.clone() };
    let mut results = Results::new(&all.common)?;
    for part in Part::value_variants().iter().filter(|part| all.only.is_empty() || all.only.contains(part)) {
        if let Err(error) = answer(*part, all, &memory, &mut results) {
            if interrupt::is_set() {
                return Err(error);
            }
            let name = part.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
            eprintln!("{name}: {error:#}");
            results.failures.push(format!("{name}: {error:#}"));
        }
        results.write_page(&all.out)?;
    }
    Ok(results.is_sound())
}

fn answer(part: Part, all: &All, memory: &Common, results: &mut Results) -> Result<()> {
    let effort = all.effort;
    match part {
        Part::Serve => {
            let place = Place::Memory(all.memory_dir.clone());
            results.add_finding(serve::run(memory, &all.serve, effort, &place)?);
        }
        Part::ServeDisk => {
            let place = Place::Disk(all.common.dir());
            results.add_finding(serve::run(&all.common, &all.serve, effort, &place)?);
        }
        Part::FirstWrites => {
            results.add_finding(first_writes::run(memory, &all.writes, effort.rounds)?);
        }
        Part::Moves => {
            for (from, to) in &all.pairs {
                results.add(moving::run(&all.common, &all.load, *from, *to)?);
            }
        }
        Part::Copy => {
            let copying = Copying { size: all.load.size, thin: all.thin_held, rounds: effort.rounds };
            results.add_finding(copy::run(&all.common, copying)?);
        }
        Part::Thin => {
            let thin = thin::Thin { size: all.thin_size, held: all.thin_held, format: all.thin_format };
            results.add(thin::run(&all.common, thin)?);
        }
        Part::Chain => results.add_finding(chains(memory, effort, all.serve.size)?),
        Part::Switch => results.add_finding(switch::run(memory, &all.switch)?),
        Part::Scale => results.add_finding(scale::run(memory, &all.scale, effort)?),
        Part::Migrate => results.add_finding(migrate::run(memory, &Migrate::usual())?),
    }
    Ok(())
}

fn chains(common: &Common, effort: Effort, size: u64) -> Result<Finding> {
    let chains = Chains {
        size,
        format: Kind::Vhdx,
        lengths: vec![1, 4, 16],
        depth: 32,
        rounds: effort.rounds,
        seconds: effort.seconds,
    };
    let answers = chain::run(common, &chains)?;
    let mut finding = Finding::new("chain", "Reading through chains of differencing images in memory");
    let mut table = Table::new(0, ["images", "reads/s (median)", "relative to one (least–most)"]);
    for answer in &answers {
        let mut rates = answer.reads_per_s.clone();
        rates.sort_by(f64::total_cmp);
        let [median, least, most] = answer.relative;
        let relative = format!("{} ({}–{})", number(median), number(least), number(most));
        table.row([answer.images.to_string(), number(rates[rates.len() / 2]), relative]);
    }
    let heading = format!("Random 4 KiB reads, depth 32, a VHDX of {} that is full", show_size(size));
    finding.tables.push((heading, table));
    finding.figures = json!(answers);
    Ok(finding)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plot::{Chart, Group};
    use crate::spread::{Bound, Goal, Spread};

    #[test]
    fn a_page_has_its_figures_and_its_plot_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let spread = Spread::of([2.0, 3.0]);
        let mut finding = Finding::new("serve", "Serving");
        finding.goals.extend(Goal::ratio("read", "raw", spread, Bound::AtLeast(2.0)));
        let group = Group { label: "read".into(), bars: vec![spread], bound: Bound::AtLeast(2.0) };
        finding.charts.extend(Chart::new("Title", "axis", vec!["raw".into()], vec![group]));
        let machine = Machine::unknown();
        let failures = vec!["switch: no".to_owned()];
        let results = Results { machine, findings: vec![finding], comparisons: Vec::new(), failures };
        results.write_page(&dir.path().join("page.md")).unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let page = read("page.md");
        assert!(
            page.contains("(page.svg)") && page.contains("WRONG: switch: no") && page.contains("2.50"),
            "{page}"
        );
        assert!(read("page.svg").contains("</svg>"));
        let json: serde_json::Value = serde_json::from_str(&read("page.json")).unwrap();
        assert_eq!(json["findings"][0]["goals"][0]["found"]["median"], 2.5);
        assert!(!results.is_sound());
    }
}
