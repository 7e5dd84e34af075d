//! What serves the disk and moves it: blockd or its rival, seen alike.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use formats::{CreateOptions, Format};
use serde::Serialize;
use system_tests::Image;

use crate::blockd::Blockd;
use crate::machine;
use crate::rival::Rival;
use crate::{interrupt, process};

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Contender {
    /// This project's daemon.
    Blockd,
    /// qemu-storage-daemon with a mirror job.
    Rival,
}

impl Contender {
    /// The program's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Blockd => "blockd",
            Self::Rival => "qemu-storage-daemon",
        }
    }
}

/// The image to move and what it is to become.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What the disk is first.
    pub from: Image,
    /// What the disk is afterwards.
    pub to: Image,
    /// Bytes of the disk.
    pub size: u64,
    /// What blockd reads back before it deletes the source: `none`, `sample` or `full`.
    pub verify: String,
    /// What blockd's move keeps the guest's 99th percentile within, in microseconds.
    pub max_guest_p99_us: Option<u64>,
    /// How long the rival may try to get both images equal in its default mode.
    pub patience: std::time::Duration,
    /// Whether the rival serves the disk in a thread of its own.
    pub own_thread: bool,
}

/// A moment of a move.
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    /// The phase that begins here.
    pub phase: &'static str,
    /// When.
    pub at: Instant,
    /// Processor time that the server had used when this was seen, in seconds.
    pub cpu_s: f64,
}

/// How a move goes, as seen from outside.
pub struct Watch<'a> {
    pid: u32,
    marks: Vec<Mark>,
    look: &'a mut dyn FnMut() -> Result<()>,
}

impl<'a> Watch<'a> {
    /// Watches the process `pid`; `look` fails when there is no use in waiting any longer.
    pub fn new(pid: u32, look: &'a mut dyn FnMut() -> Result<()>) -> Self {
        Self { pid, marks: Vec::new(), look }
    }

    /// A phase has begun.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn mark(&mut self, phase: &'static str, at: Instant) -> Result<()> {
        self.marks.push(Mark { phase, at, cpu_s: process::cpu_seconds(self.pid)? });
        Ok(())
    }

    /// To be called while waiting.
    ///
    /// # Errors
    /// On a signal, or when the load has failed.
    pub fn look(&mut self) -> Result<()> {
        interrupt::check()?;
        (self.look)()
    }

    /// The phases in order; the last is `done`.
    pub fn into_marks(self) -> Vec<Mark> {
        self.marks
    }
}

/// What the server itself tells of a move that is done.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Told {
    /// Bytes copied, what was copied twice counted twice.
    pub bytes_copied: Option<u64>,
    /// Passes over the disk.
    pub passes: Option<u32>,
    /// From the decision to switch to the durable record of it.
    pub commit_us: Option<u64>,
    /// The longest that a guest's request took during the switch.
    pub longest_guest_wait_us: Option<u64>,
    /// Seconds spent on comparing both images.
    pub verify_s: f64,
    /// How the target was verified.
    pub verified: String,
    /// Whether the source is gone.
    pub source_deleted: bool,
    /// Something that is to be known with the figures.
    pub note: Option<String>,
}

/// A server of one disk.
pub trait Server {
    /// The vhost-user socket.
    fn socket(&self) -> PathBuf;
    /// The process.
    fn pid(&self) -> Result<u32>;
    /// Moves the disk and waits until that is over.
    fn run_move(&mut self, plan: &Plan, target: &Path, watch: &mut Watch<'_>) -> Result<Told>;
    /// Ends in good order.
    fn stop(&mut self) -> Result<()>;
    /// The end of its log.
    fn log(&self) -> String;
}

/// Makes the source in `dir` and has it served.
///
/// # Errors
/// When the image can't be made, or the server does not come up.
pub fn serve(contender: Contender, dir: &Path, plan: &Plan) -> Result<(PathBuf, Box<dyn Server>)> {
    let source = dir.join(format!("source.{}", plan.from.name()));
    create(plan.from, &source, plan.size)?;
    let server: Box<dyn Server> = match contender {
        Contender::Blockd => Box::new(Blockd::start(dir, plan.from, &source)?),
        Contender::Rival => Box::new(Rival::start(dir, plan.from, &source, plan.own_thread)?),
    };
    // sockaddr_un has 108 bytes, with the final zero.
    let length = server.socket().as_os_str().len();
    if length > 107 {
        bail!(
            "{} is too long for a socket ({length} bytes): give a shorter --dir",
            server.socket().display()
        );
    }
    Ok((source, server))
}

/// Makes an empty image; with qemu-img when it is there, so that both contenders get the same.
///
/// # Errors
/// When the file can't be made.
pub fn create(kind: Image, path: &Path, size: u64) -> Result<()> {
    if machine::is_there("qemu-img") {
        return kind.create(path, size);
    }
    let format = format_of(kind);
    formats::create(path, &CreateOptions::new(format, size))
        .with_context(|| format!("make {}", path.display()))
}

/// The format of an image of this kind.
pub fn format_of(kind: Image) -> Format {
    match kind {
        Image::Raw => Format::Raw,
        Image::DynamicVhd | Image::FixedVhd => Format::Vhd,
        Image::DynamicVhdx | Image::FixedVhdx => Format::Vhdx,
    }
}
