//! How fast is a full disk copied while no guest asks for anything, and does the time follow what a disk holds?
//!
//! In each round everybody copies the same image once, and fio reads it while it writes another file: that is what the disk can
//! do. The copies of the first round are compared with their source before any figure is shown.

mod images;
mod shown;
mod turns;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use formats::{CreateOptions, Format};
use serde_json::json;
use tempfile::TempDir;

use crate::choice::{Common, Kind, check_size};
use crate::finding::Finding;
use crate::server::create;
use crate::size::{MIB, show_size};
use crate::thin::{PIECES, pieces};
use crate::trial::forget_cached;
use crate::{fio, interrupt, machine};

use turns::{Copied, Turn, Who};

/// Size of the large thin disk.
const LARGE: u64 = 1 << 40;
/// How many times what it holds the small thin disk's size is.
const SMALL: u64 = 2;

/// What is copied.
#[derive(Debug, Clone, Copy)]
pub struct Copying {
    /// Bytes of the full disk.
    pub size: u64,
    /// Bytes that the thin disks hold.
    pub thin: u64,
    /// Rounds.
    pub rounds: usize,
}

/// Measures copies.
///
/// # Errors
/// When blockd or blockctl can't be measured, and when any copy is wrong.
pub fn run(common: &Common, what: Copying) -> Result<Finding> {
    check_size(what.size)?;
    ensure!(
        what.thin.is_multiple_of(PIECES * MIB) && what.thin <= LARGE / SMALL,
        "{} in thin disks: give a multiple of 16M, at most 512G",
        show_size(what.thin)
    );
    let base = common.dir();
    machine::need_room(&base, (what.size * 2).max(what.thin * 3) + 256 * MIB)?;
    let mut finding = Finding::new("copy", "Copying without load");
    let who = those_present(common, &mut finding);
    shown::describe(&mut finding, what);
    let full = full_disks(&base, common.seed, what, &who)?;
    shown::add_full(&mut finding, what.size, &who, &full);
    let thin = thin_disks(&base, common.seed, what)?;
    shown::add_thin(&mut finding, what.thin, &thin);
    let of_each: Vec<_> =
        who.iter().zip(&full).map(|(who, rounds)| json!({"who": who, "rounds": rounds})).collect();
    finding.figures = json!({"full": of_each, "thin_small": thin[0], "thin_large": thin[1]});
    Ok(finding)
}

/// Who is installed and wanted, with a note on who is not.
fn those_present(common: &Common, finding: &mut Finding) -> Vec<Who> {
    let no_rival = common.no_rival();
    let no_fio =
        (!machine::is_there("fio")).then(|| format!("it is not on the PATH: {}", fio::HOW_TO_GET_IT));
    if let Some(why) = &no_rival {
        finding.notes.push(format!("**No figures of qemu-img and qemu-storage-daemon: {why}.**"));
    }
    if let Some(why) = &no_fio {
        finding.notes.push(format!("**No figures of fio: {why}.**"));
    }
    let is_present = |who: &Who| match who {
        Who::Fio => no_fio.is_none(),
        Who::Convert | Who::Rival => no_rival.is_none(),
        Who::Offline | Who::Live | Who::LiveVerified => true,
    };
    Who::ALL.into_iter().filter(is_present).collect()
}

/// Has all of them copy the full disk; the answer has the rounds of each.
fn full_disks(base: &Path, seed: u64, what: Copying, who: &[Who]) -> Result<Vec<Vec<Copied>>> {
    eprintln!("copy: fills {} ...", show_size(what.size));
    let place = Place::new(base)?;
    let source = place.path("source.vhdx");
    create(Kind::Vhdx.image(), &source, what.size)?;
    images::fill(&source, std::slice::from_ref(&(0..what.size)), seed)?;
    let mut rounds = vec![Vec::new(); who.len()];
    for round in 0..what.rounds {
        for turn in 0..who.len() {
            let index = (round + turn) % who.len();
            eprintln!("copy: round {}, {} ...", round + 1, who[index].name());
            let prove = round == 0 && who[index] != Who::Fio;
            let copied = place.turn(&source, what.size, what.size, prove, |turn| turn.run(who[index]))?;
            rounds[index].push(copied);
        }
    }
    Ok(rounds)
}

/// Has blockd move a small and a large disk that hold the same; the answer has the rounds of each.
fn thin_disks(base: &Path, seed: u64, what: Copying) -> Result<[Vec<Copied>; 2]> {
    eprintln!("copy: fills two thin disks with {} each ...", show_size(what.thin));
    let place = Place::new(base)?;
    let sizes = [what.thin * SMALL, LARGE];
    let sources = ["small.vhdx", "large.vhdx"].map(|name| place.path(name));
    for (source, size) in sources.iter().zip(sizes) {
        // By our own hand: qemu-img gives larger disks larger blocks, and it is the size alone that is to differ.
        formats::create(source, &CreateOptions::new(Format::Vhdx, size))
            .with_context(|| format!("make {}", source.display()))?;
        images::fill(source, &pieces(size, what.thin), seed)?;
    }
    let mut rounds = [Vec::new(), Vec::new()];
    for round in 0..what.rounds {
        for turn in 0..sizes.len() {
            let index = (round + turn) % sizes.len();
            eprintln!("copy: round {}, blockd moves a disk of {} ...", round + 1, show_size(sizes[index]));
            let copied =
                place.turn(&sources[index], sizes[index], what.thin, round == 0, |turn| turn.live("none"))?;
            rounds[index].push(copied);
        }
    }
    Ok(rounds)
}

/// A folder for sources and one copy at a time.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new(base: &Path) -> Result<Self> {
        Ok(Self { dir: Common::folder_in(base)? })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Has somebody copy on a disk that has nothing else to do; the copy is removed again, having been compared if `prove`.
    fn turn(
        &self,
        source: &Path,
        size: u64,
        held: u64,
        prove: bool,
        copy: impl FnOnce(&Turn<'_>) -> Result<Copied>,
    ) -> Result<Copied> {
        interrupt::check()?;
        let target = self.path("target.vhdx");
        let own = tempfile::Builder::new().prefix("t").tempdir_in(self.dir.path())?;
        forget_cached(source)?;
        nix::unistd::sync();
        let copied = copy(&Turn { source, target: &target, dir: own.path(), size, held })?;
        interrupt::check()?;
        ensure!(source.exists(), "WRONG: {} is gone, and was to be kept", source.display());
        if prove {
            images::prove_equal(source, &target)?;
        }
        std::fs::remove_file(&target).with_context(|| format!("remove {}", target.display()))?;
        Ok(copied)
    }
}
