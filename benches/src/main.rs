//! `blockd-bench`: what blockd costs and how fast it is, beside what would be used instead.
//!
//! ```text
//!   all                          every question, as a page with figures and a plot (finding, spread, plot)
//!    │
//!    ├── serve, first_writes,    load alone: daemons (served) behind a lean front end (drive), fio, syncs counted
//!    │   scale, switch           (sync_count); a finding has tables, and goals to hold its ratios against
//!    │
//!    ├── migrate                  running machines moved between processes of kvm-shim (traveller), beside iperf3
//!    │
//!    ├── copy                     copies without a guest: blockd, blockctl, qemu-img, fio, qemu-storage-daemon
//!    │
//!    └── moving, thin            one move by each contender
//!          │                     (chain: reads alone, by a guest of its own)
//!        trial                   one move: fill, load, move, verify
//!        │   │
//!      load  server              the guest that knows every sector; who serves: blockd (events), rival (qmp)
//!          │
//!        report, table           figures and tables, with the machine they are of
//! ```
//!
//! A figure counts only if the data was right: moved disks are checked read by read and sector by sector, served ones before,
//! during (in samples) and after the rounds, and the program ends with 1 when anything was wrong. Run it from a release build,
//! with blockd beside it or in `BLOCKD_BIN`.
#![forbid(unsafe_code)]

mod all;
mod blockd;
mod chain;
mod choice;
mod copy;
mod drive;
mod events;
mod finding;
mod fio;
mod first_writes;
mod interrupt;
mod load;
mod machine;
mod migrate;
mod moving;
mod plot;
mod process;
mod qmp;
mod report;
mod rival;
mod scale;
mod serve;
mod served;
mod server;
mod size;
mod spread;
mod switch;
mod sync_count;
mod table;
mod thin;
mod trial;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use all::{All, Results};
use chain::Chains;
use choice::{Common, Effort, Kind, parse_rounds};
use copy::Copying;
use finding::Finding;
use serve::Place;
use size::parse_size;
use thin::Thin;

/// Measures moves of disks by blockd, beside qemu-storage-daemon where it is installed.
#[derive(Debug, Parser)]
#[command(
    name = "blockd-bench",
    version,
    after_help = "Example: blockd-bench move --size 4G --from vhd --to vhdx"
)]
struct Cli {
    #[command(subcommand)]
    question: Question,
}

#[derive(Debug, Subcommand)]
enum Question {
    /// Full disks are served: requests, processor time and latency, in memory and on a disk
    Serve {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        serve: serve::Serve,
        #[command(flatten)]
        effort: Effort,
        /// The same on a real disk: a folder there; --dir is left out then
        #[arg(long)]
        disk_dir: Option<PathBuf>,
        /// Also write the figures to this file
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Fresh dynamic images are written to, beside qemu-storage-daemon
    FirstWrites {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        writes: first_writes::FirstWrites,
        /// Rounds; each has one trial of every contender
        #[arg(long, default_value_t = 5, value_parser = parse_rounds)]
        rounds: usize,
        /// Also write the figures to this file
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// A small disk is switched from image to image, a thousand times
    Switch {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        switch: switch::Switch,
        /// Also write the figures to this file
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// blockd alone with more disks, more queues and larger images
    Scale {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        scale: scale::Scale,
        #[command(flatten)]
        effort: Effort,
        /// Also write the figures to this file
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// A full disk is moved under a busy guest
    Move {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        load: moving::Load,
        /// What the disk is first
        #[arg(long, value_enum, default_value = "vhd")]
        from: Kind,
        /// What the disk becomes
        #[arg(long, value_enum, default_value = "vhdx")]
        to: Kind,
        /// Also write the figures to this file
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// A full disk is copied without load, beside qemu-img convert, qemu-storage-daemon and what the disk can do; then a thin one
    Copy {
        #[command(flatten)]
        common: Common,
        /// Size of the disk, all of which is filled with what can't be compressed
        #[arg(long, default_value = "4G", value_parser = parse_size)]
        size: u64,
        /// What a disk of 1 TiB and one of twice this size hold, whose moves are compared
        #[arg(long, default_value = "1G", value_parser = parse_size)]
        thin: u64,
        /// Rounds; each has one copy by everybody
        #[arg(long, default_value_t = 5, value_parser = parse_rounds)]
        rounds: usize,
        /// Also write the figures to this file
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// A large disk that holds little is moved without load
    Thin {
        #[command(flatten)]
        common: Common,
        /// Size of the disk
        #[arg(long, default_value = "64G", value_parser = parse_size)]
        size: u64,
        /// What it holds, in 16 pieces
        #[arg(long, default_value = "1G", value_parser = parse_size)]
        held: u64,
        /// Its format, which it keeps
        #[arg(long, value_enum, default_value = "vhdx")]
        format: Kind,
        /// Also write the figures to this file
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Reads go through chains of differencing images
    Chain {
        #[command(flatten)]
        common: Common,
        /// Size of the disk, all of which is held
        #[arg(long, default_value = "1G", value_parser = parse_size)]
        size: u64,
        /// Format of the images
        #[arg(long, value_enum, default_value = "vhdx")]
        format: Kind,
        /// Images of a chain; repeatable
        #[arg(long = "images", default_values_t = [1, 4, 16])]
        lengths: Vec<usize>,
        /// Requests in flight
        #[arg(long, default_value_t = 32)]
        depth: usize,
        /// Rounds for each chain
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Seconds of a round
        #[arg(long, default_value_t = 2.0)]
        seconds: f64,
        /// Also write the figures to this file
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Running machines are moved from process to process: copy rate, downtime, what it costs the guest
    Migrate {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        migrate: migrate::Migrate,
        /// Also write the figures to this file
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Everything, as a page with its figures and a plot beside it
    #[command(visible_alias = "all")]
    Results(Box<All>),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match answer(cli.question) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("blockd-bench: something was wrong: see the lines that begin with WRONG");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("blockd-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns whether everything was right.
fn answer(question: Question) -> Result<bool> {
    interrupt::install()?;
    let sound = match question {
        Question::Serve { common, serve, effort, disk_dir, json } => {
            let place = disk_dir.map_or_else(|| Place::Memory(common.memory_dir()), Place::Disk);
            tell(place.dir(), json, || serve::run(&common, &serve, effort, &place))?
        }
        Question::FirstWrites { common, writes, rounds, json } => {
            tell(&common.memory_dir(), json, || first_writes::run(&common, &writes, rounds))?
        }
        Question::Switch { common, switch, json } => {
            tell(&common.memory_dir(), json, || switch::run(&common, &switch))?
        }
        Question::Scale { common, scale, effort, json } => {
            tell(&common.memory_dir(), json, || scale::run(&common, &scale, effort))?
        }
        Question::Move { common, load, from, to, json } => {
            let mut results = Results::new(&common)?;
            println!("{}", results.machine);
            results.add(moving::run(&common, &load, from, to)?);
            json.map_or(Ok(()), |path| results.write_json(&path))?;
            results.is_sound()
        }
        Question::Copy { common, size, thin, rounds, json } => {
            let copying = Copying { size, thin, rounds };
            tell(&common.dir(), json, || copy::run(&common, copying))?
        }
        Question::Thin { common, size, held, format, json } => {
            let mut results = Results::new(&common)?;
            println!("{}", results.machine);
            results.add(thin::run(&common, Thin { size, held, format })?);
            json.map_or(Ok(()), |path| results.write_json(&path))?;
            results.is_sound()
        }
        Question::Chain { common, size, format, lengths, depth, rounds, seconds, json } => {
            let chains = Chains { size, format, lengths, depth, rounds, seconds };
            let answers = chain::run(&common, &chains)?;
            println!("{}", chain::table(&chains, &answers));
            if let Some(path) = json {
                std::fs::write(path, serde_json::to_vec_pretty(&answers)?)?;
            }
            true
        }
        Question::Migrate { common, migrate, json } => {
            tell(&common.memory_dir(), json, || migrate::run(&common, &migrate))?
        }
        Question::Results(all) => all::run(&all)?,
    };
    Ok(sound)
}

/// Prints an answer, with the machine that it is of, and keeps its figures.
fn tell(dir: &Path, json: Option<PathBuf>, ask: impl FnOnce() -> Result<Finding>) -> Result<bool> {
    let mut results = Results::in_dir(dir)?;
    println!("{}", results.machine);
    results.add_finding(ask()?);
    json.map_or(Ok(()), |path| results.write_json(&path))?;
    Ok(results.is_sound())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_options_do_not_contradict_each_other() {
        Cli::command().debug_assert();
    }

    #[test]
    fn everything_has_defaults_but_the_page() {
        for name in ["results", "all"] {
            let cli = Cli::try_parse_from(["blockd-bench", name, "--out", "results.md"]).unwrap();
            assert!(matches!(cli.question, Question::Results(_)));
        }
        assert!(Cli::try_parse_from(["blockd-bench", "results"]).is_err());
    }
}
