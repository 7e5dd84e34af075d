//! Every question, and the document that answers them.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::choice::{Common, Kind};
use crate::finding::Finding;
use crate::machine::Machine;
use crate::report::Comparison;
use crate::{moving, thin};

/// Answers, and where they come from.
#[derive(Debug, Serialize)]
pub struct Results {
    /// The machine.
    pub machine: Machine,
    /// One for each move that was measured.
    pub comparisons: Vec<Comparison>,
    /// One for each other question.
    pub findings: Vec<Finding>,
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
        Ok(Self { machine, comparisons: Vec::new(), findings: Vec::new() })
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
        self.comparisons.iter().all(Comparison::is_sound) && self.findings.iter().all(Finding::is_sound)
    }

    /// Writes the figures as JSON.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn write_json(&self, path: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(self)?;
        std::fs::write(path, json + "\n").with_context(|| format!("write {}", path.display()))
    }

    /// Writes the document, and the figures beside it.
    ///
    /// # Errors
    /// When a file can't be written.
    pub fn write_document(&self, path: &Path) -> Result<()> {
        std::fs::write(path, self.to_string()).with_context(|| format!("write {}", path.display()))?;
        self.write_json(&path.with_extension("json"))
    }
}

impl std::fmt::Display for Results {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "# Moves, measured\n")?;
        writeln!(
            f,
            "Made by `blockd-bench all`. Both servers were run one after the other on the same machine, each with an \
             image of its own that was made by the same program and filled over vhost-user by the same front end. \
             qemu-storage-daemon was set up with cache.direct=on, aio=io_uring and, where it lived through that, an iothread, and moved the disk by \
             blockdev-mirror and job-complete; whatever of an image was in the page cache was given back before the move.\n"
        )?;
        writeln!(
            f,
            "Waits are from putting a request into the ring to seeing its completion. Requests that overlapped the \
             switch count there. Requests that the guest could not make in time, because as many as it may have were in \
             flight, are not made up for: the column `per s` shows what was reached. Processor time is the server's, the \
             guest's requests included; in all, blockd's includes reading back both images, which qemu-storage-daemon \
             does not do.\n"
        )?;
        writeln!(f, "{}", self.machine)?;
        for comparison in &self.comparisons {
            writeln!(f, "{comparison}")?;
        }
        Ok(())
    }
}

/// Asks every question.
///
/// # Errors
/// When blockd can't be measured.
pub fn run(
    results: &mut Results,
    common: &Common,
    load: &moving::Load,
    pairs: &[(Kind, Kind)],
    thin: thin::Thin,
) -> Result<()> {
    for (from, to) in pairs {
        results.add(moving::run(common, load, *from, *to)?);
    }
    results.add(thin::run(common, thin)?);
    Ok(())
}
