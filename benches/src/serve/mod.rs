//! How many requests does a daemon serve, at what cost and latency, beside its rival and what the kernel allows?
//!
//! ```text
//!   contender.rs   one daemon on its own image (filled and verified first), or fio on a raw file
//!        │
//!     this file    sets of rounds: each round runs every contender once in turn, another one first each time
//!        │
//!     goals.rs     ratios within the rounds, held against what is demanded; tables and charts
//! ```

mod contender;
mod goals;

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use clap::Args;
use serde::Serialize;
use serde_json::json;

use crate::choice::{Common, Effort, Kind, check_size};
use crate::drive::{Access, Pattern, Wait, own_cost};
use crate::finding::Finding;
use crate::size::{parse_size, show_size};
use crate::{fio, interrupt, machine};

use contender::{Contender, Round, Who};

/// What is served.
#[derive(Debug, Clone, Args)]
// The group of the question that has these has the same name.
#[group(skip)]
pub struct Serve {
    /// Size of each disk, all of which is held
    #[arg(id = "disk-size", long = "disk-size", default_value = "1G", value_parser = parse_size)]
    pub size: u64,
    /// Format of an image; repeatable
    #[arg(long = "format", value_enum, default_values = ["raw", "vhdx", "vhd"])]
    pub formats: Vec<Kind>,
    /// Only patterns whose name has this in it, as in `random 4 KiB read, depth 32, poll`
    #[arg(long)]
    pub pattern: Option<String>,
}

/// Where the images are.
#[derive(Debug, Clone)]
pub enum Place {
    /// In memory.
    Memory(PathBuf),
    /// On a disk.
    Disk(PathBuf),
}

impl Place {
    /// The folder.
    pub fn dir(&self) -> &PathBuf {
        match self {
            Self::Memory(dir) | Self::Disk(dir) => dir,
        }
    }
}

/// Rounds of one contender.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// Who.
    pub who: Who,
    /// The image's format.
    pub format: &'static str,
    /// One for each round.
    pub rounds: Vec<Round>,
}

/// All rounds of one pattern.
#[derive(Debug, Clone)]
pub struct Set {
    /// Of what.
    pub pattern: Pattern,
    /// How the front end waited.
    pub wait: Wait,
    /// One for each contender.
    pub lines: Vec<Line>,
}

impl Set {
    /// As in `random 4 KiB read, depth 32, poll`.
    pub fn name(&self) -> String {
        name_of(&self.pattern, self.wait)
    }
}

fn name_of(pattern: &Pattern, wait: Wait) -> String {
    format!("{}, {}", pattern.name(), wait.name())
}

/// Every pattern with every way to wait that is asked for.
fn patterns() -> Vec<(Pattern, Wait)> {
    let mut all = Vec::new();
    for depth in [32, 1] {
        for access in [Access::Read, Access::Write] {
            for wait in [Wait::Poll, Wait::Sleep] {
                all.push((Pattern { random: true, access, block: 4096, depth }, wait));
            }
        }
    }
    for access in [Access::Read, Access::Write] {
        for wait in [Wait::Poll, Wait::Sleep] {
            all.push((Pattern { random: false, access, block: 128 << 10, depth: 8 }, wait));
        }
    }
    all
}

/// Serves full disks to a front end that only makes load.
///
/// # Errors
/// When blockd can't be measured, and when any contender's data is wrong.
pub fn run(common: &Common, serve: &Serve, effort: Effort, place: &Place) -> Result<Finding> {
    check_size(serve.size)?;
    let wanted = |name: &str| serve.pattern.as_ref().is_none_or(|part| name.contains(part.as_str()));
    let chosen: Vec<_> =
        patterns().into_iter().filter(|(pattern, wait)| wanted(&name_of(pattern, *wait))).collect();
    ensure!(!chosen.is_empty(), "--pattern {:?}: no pattern has this in its name", serve.pattern);
    let dir = Common::folder_in(place.dir())?;
    machine::need_room(dir.path(), serve.size * (serve.formats.len() as u64 * 2 + 1) + (64 << 20))?;

    let mut finding = Finding::new(
        if matches!(place, Place::Memory(_)) { "serve" } else { "serve-disk" },
        format!(
            "Serving full disks of {} {}",
            show_size(serve.size),
            if matches!(place, Place::Memory(_)) { "in memory" } else { "on a real disk" }
        ),
    );
    let mut contenders = gather(common, serve, place, dir.path(), &mut finding)?;
    let mut sets = Vec::new();
    for (number, (pattern, wait)) in chosen.iter().enumerate() {
        sets.push(run_set(&mut contenders, *pattern, *wait, effort, number as u64 + 1)?);
    }
    for contender in contenders {
        contender.end()?;
    }
    describe(&mut finding, effort)?;
    goals::judge(&mut finding, &sets, matches!(place, Place::Disk(_)));
    let figures = sets.iter().map(|set| json!({"pattern": set.name(), "contenders": set.lines}));
    finding.figures = figures.collect();
    Ok(finding)
}

/// Everybody who can take part, and a note for each who can't.
fn gather(
    common: &Common,
    serve: &Serve,
    place: &Place,
    dir: &Path,
    finding: &mut Finding,
) -> Result<Vec<Contender>> {
    let mut contenders = Vec::new();
    let no_rival = common.no_rival();
    let mut direct_raw = None;
    let on_disk = matches!(place, Place::Disk(_));
    let with_fio = machine::is_there("fio");
    let mut beside = Vec::new();
    for format in &serve.formats {
        let image = contender::make_image(dir, *format, serve.size, common.seed)?;
        let fio = if with_fio && on_disk { Contender::fio_on(*format, &image)? } else { None };
        beside.extend(fio.is_some().then_some(format.name()));
        let blockd = Contender::blockd(dir, *format, &image)?;
        let direct = blockd.is_direct();
        direct_raw = direct_raw.or(Some(direct));
        let way = if direct { "past the page cache (O_DIRECT)" } else { "through the page cache" };
        if no_rival.is_none() {
            let (rival, aio) = Contender::rival(dir, *format, &image, direct)?;
            finding.notes.push(format!(
                "{}: blockd serves its image {way}; qemu-storage-daemon a copy of the same file, in an iothread, with \
                 cache.direct={} and aio={}.",
                format.name(),
                if direct { "on" } else { "off" },
                aio.name()
            ));
            contenders.push(rival);
        } else {
            finding.notes.push(format!("{}: blockd serves its image {way}.", format.name()));
        }
        contenders.push(blockd);
        contenders.extend(fio);
    }
    if let Some(why) = no_rival {
        finding.notes.push(format!("**No figures of qemu-storage-daemon: {why}.**"));
    }
    if with_fio {
        let on_what = if on_disk && !beside.is_empty() {
            format!(
                "on the very file that blockd serves ({}; the disk's content in it), and after its writes blockd writes the disk \
                 anew: two files on one disk are not equally fast",
                beside.join(", ")
            )
        } else {
            contenders.push(Contender::fio(dir, serve.size, direct_raw.unwrap_or(false))?);
            "on a raw file in the same folder".into()
        };
        finding.notes.push(format!(
            "fio {} runs the same pattern with io_uring {on_what}; --direct={}, at depths above 1 without its clocks \
             (--gtod_reduce=1).",
            machine::version_of("fio"),
            u8::from(direct_raw.unwrap_or(false))
        ));
    } else {
        eprintln!("\nNO FIGURES OF FIO: it is not installed. To get them, {}.\n", fio::HOW_TO_GET_IT);
        finding.notes.push(format!("**No figures of fio: it is not installed; {}.**", fio::HOW_TO_GET_IT));
    }
    Ok(contenders)
}

fn run_set(
    contenders: &mut [Contender],
    pattern: Pattern,
    wait: Wait,
    effort: Effort,
    salt: u64,
) -> Result<Set> {
    eprintln!("{} ...", name_of(&pattern, wait));
    let line = |c: &Contender| Line { who: c.who(), format: c.format(), rounds: Vec::new() };
    let mut lines: Vec<Line> = contenders.iter().map(line).collect();
    for contender in contenders.iter_mut() {
        contender.prove(wait, salt)?;
    }
    let count = contenders.len();
    for round in 0..effort.rounds {
        // Another one begins each time, so that nobody always comes after the same neighbour's leftovers.
        for turn in 0..count {
            interrupt::check()?;
            let index = (round + turn) % count;
            lines[index].rounds.push(contenders[index].run(&pattern, wait, effort.time())?);
            let spoilt = contenders[index].spoils().filter(|_| pattern.access == Access::Write);
            if let Some(image) = spoilt.map(Path::to_owned) {
                contenders.iter_mut().try_for_each(|other| other.restore(&image))?;
            }
        }
    }
    Ok(Set { pattern, wait, lines })
}

fn describe(finding: &mut Finding, effort: Effort) -> Result<()> {
    let pattern = Pattern { random: true, access: Access::Read, block: 4096, depth: 32 };
    let own = own_cost(&pattern, 1_000_000)?;
    finding.notes.push(format!(
        "{} rounds of {} s; in each round every contender has one turn. Shown is the median with the least and the \
         most; ratios are made within the rounds.",
        effort.rounds, effort.seconds
    ));
    finding.notes.push(format!(
        "One queue of 128 with event indexes and indirect descriptors. `poll`: the front end watches the used ring all the \
         time; `sleep`: it waits for the call eventfd. It could itself make {:.1} million 4 KiB requests a second.",
        1e-6 / own
    ));
    finding.notes.push(
        "Before the measurement each blockd ran a load that knows what every sector must hold, on a disk filled through it, and \
         read all of it back; before each pattern each daemon overwrote 2,000 pages and read them back; one in 16 reads was \
         checked while it was measured, and the whole disk afterwards."
            .into(),
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_has_a_name_of_its_own() {
        let names: std::collections::BTreeSet<_> = patterns().iter().map(|(p, w)| name_of(p, *w)).collect();
        assert_eq!(names.len(), 12);
        assert!(names.contains("random 4 KiB read, depth 32, poll"));
        assert!(names.contains("sequential 128 KiB write, depth 8, poll"));
    }
}
