//! What the subcommands ask of the user in common.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use system_tests::Image;
use tempfile::TempDir;

use crate::report::{Comparison, Moved};
use crate::server::Contender;
use crate::trial::Trial;
use crate::{interrupt, machine};

/// A format of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// A VHD that grows.
    Vhd,
    /// A VHDX that grows.
    Vhdx,
    /// A raw file, sparse.
    Raw,
}

impl Kind {
    /// The image that is made.
    pub fn image(self) -> Image {
        match self {
            Self::Vhd => Image::DynamicVhd,
            Self::Vhdx => Image::DynamicVhdx,
            Self::Raw => Image::Raw,
        }
    }

    /// As it is typed.
    pub fn name(self) -> &'static str {
        self.image().name()
    }
}

/// Formats of source and target, as `vhd:vhdx`.
///
/// # Errors
/// What is understood.
pub fn parse_pair(text: &str) -> Result<(Kind, Kind), String> {
    let pair = text
        .split_once(':')
        .and_then(|(from, to)| Some((Kind::from_str(from, true).ok()?, Kind::from_str(to, true).ok()?)));
    pair.ok_or_else(|| {
        format!("`{text}` is no pair of formats: give two of vhd, vhdx and raw, such as vhd:vhdx")
    })
}

/// Whether to measure qemu-storage-daemon, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RivalChoice {
    /// When it is installed.
    Auto,
    /// Not at all.
    None,
    /// As `auto`, and on disks of full size even where it inflates the target.
    Full,
}

/// Where, how exactly and against whom.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Folder in which a temporary one is made; removed at the end [default: the system's folder for such; /dev/shm for
    /// serve, first-writes, switch and scale]
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Whether to measure qemu-storage-daemon beside blockd
    #[arg(long, value_enum, default_value = "auto")]
    pub rival: RivalChoice,
    /// Seconds that the rival's mirror may try to catch up with the guest in its default mode
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub patience: u64,
    /// Of the random numbers
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

impl Common {
    /// The folder to work in.
    pub fn dir(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(std::env::temp_dir)
    }

    /// The folder to work in where the question is about what happens in memory.
    pub fn memory_dir(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(|| "/dev/shm".into())
    }

    /// Makes a folder in `base` that goes away when it is dropped.
    ///
    /// # Errors
    /// When `base` can't be used.
    pub fn folder_in(base: &Path) -> Result<TempDir> {
        let made = tempfile::Builder::new().prefix("blockd-bench-").tempdir_in(base);
        made.with_context(|| format!("make a folder in {}: give another with --dir", base.display()))
    }

    /// How long the rival may take.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(self.patience)
    }

    /// Why the rival isn't measured, if it isn't.
    pub fn no_rival(&self) -> Option<String> {
        if self.rival == RivalChoice::None {
            return Some("not wanted (--rival none)".into());
        }
        let missing =
            ["qemu-storage-daemon", "qemu-img"].into_iter().find(|program| !machine::is_there(program));
        missing.map(|program| format!("{program} is not on the PATH (package qemu-utils)"))
    }
}

/// How much is done for each figure.
#[derive(Debug, Clone, Copy, Args)]
pub struct Effort {
    /// Rounds; each runs every contender once
    #[arg(long, default_value_t = 5, value_parser = parse_rounds)]
    pub rounds: usize,
    /// Seconds of a contender's turn
    #[arg(long, default_value_t = 2.0, value_parser = parse_seconds)]
    pub seconds: f64,
}

impl Effort {
    /// A contender's turn.
    pub fn time(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }
}

/// A number of rounds.
///
/// # Errors
/// What is possible.
pub fn parse_rounds(text: &str) -> Result<usize, String> {
    let rounds = text.parse().ok().filter(|rounds| (1..=1000).contains(rounds));
    rounds.ok_or_else(|| format!("`{text}` is no number of rounds: give 1 to 1000"))
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.01..=3600.0).contains(seconds));
    seconds.ok_or_else(|| format!("`{text}` is no time: give seconds, 0.01 to 3600"))
}

/// Fails unless a disk can have this size and be worked through in pieces.
///
/// # Errors
/// The sizes that are possible.
pub fn check_size(size: u64) -> Result<()> {
    const MOST: u64 = 2040 << 30;
    ensure!(
        size.is_multiple_of(1 << 20) && size <= MOST,
        "a disk of {size} bytes: give a whole number of MiB, at most 2040G (the most that a VHD holds)"
    );
    Ok(())
}

/// Has blockd run the trial, then the rival, perhaps a smaller one.
///
/// # Errors
/// When blockd can't; the rival's failure is part of the result.
pub fn compare(question: String, ours: &Trial, theirs: Result<&Trial, String>) -> Result<Comparison> {
    let blockd = ours.run(Contender::Blockd)?;
    let (rival, no_rival) = match theirs.map(run_rival) {
        Err(why) => (None, Some(why)),
        Ok(Ok(moved)) => (Some(moved), None),
        Ok(Err(_)) if interrupt::is_set() => bail!("interrupted"),
        Ok(Err(error)) => (None, Some(format!("it failed: {error:#}"))),
    };
    Ok(Comparison { question, blockd, rival, no_rival })
}

/// The rival with the disk in a thread of its own, as it is recommended; if that ends early, once more without.
fn run_rival(trial: &Trial) -> Result<Moved> {
    let failed = match trial.run(Contender::Rival) {
        Err(error) if !interrupt::is_set() => error,
        done => return done,
    };
    eprintln!("qemu-storage-daemon failed with the disk in an iothread ({failed:#}); once more without");
    let mut plain = trial.clone();
    plain.plan.own_thread = false;
    let mut moved = plain.run(Contender::Rival)?;
    let before = moved.told.note.take().map(|note| note + " ").unwrap_or_default();
    moved.told.note = Some(format!(
        "{before}With the disk in an iothread, as is recommended, the move failed; these figures are without. It said: \
         {failed:#}"
    ));
    Ok(moved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_name_two_formats() {
        assert_eq!(parse_pair("vhd:VHDX"), Ok((Kind::Vhd, Kind::Vhdx)));
        for wrong in ["vhd", "vhd:", "vhd:qcow2", ""] {
            assert!(parse_pair(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn effort_is_bounded() {
        assert_eq!(parse_rounds("5"), Ok(5));
        assert_eq!(parse_seconds("0.2"), Ok(0.2));
        assert!(parse_rounds("0").is_err() && parse_seconds("0").is_err() && parse_seconds("NaN").is_err());
    }

    #[test]
    fn disks_are_whole_mebibytes() {
        assert!(check_size(4 << 30).is_ok());
        assert!(check_size((4 << 30) + 512).is_err());
        assert!(check_size(1 << 42).is_err());
    }
}
