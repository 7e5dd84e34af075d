//! Somebody who is measured: a daemon with its image and the front end on it, or fio with its file.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use formats::{ByteSpan, OpenOptions, Pieces};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::choice::Kind;
use crate::drive::{Access, Link, Pattern, Wait};
use crate::fio::Fio;
use crate::load::{Load, Pace};
use crate::process;
use crate::served::{Aio, Disk, Served, start_rival};
use crate::server::{create, format_of};
use crate::size::MIB;

/// The name of the one disk of each daemon.
const DISK: &str = "disk";
/// How long the load that knows every sector runs.
const VERIFIED: Duration = Duration::from_millis(500);

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Who {
    /// This project's daemon.
    #[serde(rename = "blockd")]
    Blockd,
    /// qemu-storage-daemon.
    #[serde(rename = "qemu-storage-daemon")]
    Rival,
    /// fio on a raw file.
    #[serde(rename = "fio")]
    Fio,
}

impl Who {
    /// The program's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Blockd => "blockd",
            Self::Rival => "qemu-storage-daemon",
            Self::Fio => "fio",
        }
    }
}

/// One turn.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Round {
    /// Requests completed.
    pub requests: u64,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Processor seconds of the daemon, or of fio.
    pub cpu_s: f64,
    /// p50, p99 and the longest in microseconds, where they were measured.
    pub latency_us: Option<[f64; 3]>,
}

impl Round {
    /// Requests a second.
    pub fn rate(&self) -> f64 {
        self.requests as f64 / self.seconds
    }

    /// Requests for each second of processor time.
    pub fn per_cpu_s(&self) -> f64 {
        self.requests as f64 / self.cpu_s
    }
}

#[derive(Debug)]
enum Server {
    // The link goes first, as a guest does.
    Daemon { link: Box<Link>, served: Served },
    Fio { fio: Fio, shares: bool },
}

/// Somebody who is measured.
#[derive(Debug)]
pub struct Contender {
    who: Who,
    format: Kind,
    image: PathBuf,
    server: Server,
}

/// Makes an image in `dir`, fills it through blockd, and checks all of it, by what the front end reads and by the rules of
/// the format. What it holds at the end is what [`crate::drive`] expects.
///
/// # Errors
/// When it can't be made, and when anything is wrong.
pub fn make_image(dir: &Path, format: Kind, size: u64, seed: u64) -> Result<PathBuf> {
    eprintln!("{}: fills and verifies the image ...", format.name());
    let image = dir.join(format!("blockd.{}", format.name()));
    create(format.image(), &image, size)?;
    let served =
        Served::blockd(&folder(dir, "fill", format)?, &[Disk::new(DISK, format.image(), image.clone())])?;
    let mut load = Load::connect(&served.socket(DISK)?, seed, 32)?;
    load.fill(0..size)?;
    run_for(&mut load, VERIFIED)?;
    load.verify(0..size)?;
    let (faults, first) = load.faults();
    ensure!(
        faults == 0,
        "WRONG: blockd, {}: {faults} faults, the first: {}",
        format.name(),
        first.unwrap_or("?")
    );
    drop(load);
    let mut link = Link::connect(&served.socket(DISK)?, seed)?;
    link.driver().sweep(Access::Write)?;
    link.driver().sweep(Access::Read).context("after the image was filled by blockd")?;
    drop(link);
    served.stop()?;
    let report = formats::check(&image, Some(format_of(format.image())), false)?;
    ensure!(report.is_sound(), "WRONG: blockd left {} damaged: {:?}", image.display(), report.findings);
    Ok(image)
}

fn run_for(load: &mut Load, time: Duration) -> Result<()> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(time);
            stop.store(true, Ordering::Release);
        });
        // More than any daemon can do: it is the depth that limits.
        load.run(Pace { rate: 1e7, depth: 32 }, &stop)
    })
}

/// Where in the file the content of the disk is, when it is there in one piece.
fn content_of(format: Kind, image: &Path) -> Result<Option<Range<u64>>> {
    let opened = formats::open(
        image,
        &OpenOptions { format: Some(format_of(format.image())), ..OpenOptions::read_only() },
    )?;
    let size = opened.geometry().virtual_size;
    let (mut from, mut to, mut held) = (u64::MAX, 0, 0);
    let mut pieces = Pieces::new();
    for at in (0..size).step_by(MIB as usize) {
        opened.map_read(ByteSpan::new(at, MIB.min(size - at)), &mut pieces)?;
        for piece in pieces.iter() {
            let formats::Place::File { offset, .. } = piece.place else { return Ok(None) };
            (from, to, held) = (from.min(offset), to.max(offset + piece.len), held + piece.len);
        }
    }
    opened.close()?;
    Ok((to.saturating_sub(from) == held).then_some(from..to))
}

/// Copies an image. On a disk in writes of the size in which [`make_image`] writes, past the page cache: a file's speed may
/// depend on how it was written, where the disk is itself a file of a host that caches it.
fn copy_file(from: &Path, to: &Path, direct: bool) -> Result<()> {
    if !direct {
        std::fs::copy(from, to)?;
        return Ok(File::open(to)?.sync_all()?);
    }
    let mut options = File::options();
    options.custom_flags(libc::O_DIRECT);
    let source = options.clone().read(true).open(from)?;
    let target = options.write(true).create_new(true).open(to)?;
    let length = source.metadata()?.len();
    const CHUNK: usize = 256 << 10;
    const ALIGN: usize = 4096;
    let mut room = vec![0; CHUNK + ALIGN];
    let first = room.as_ptr().align_offset(ALIGN);
    let buffer = &mut room[first..first + CHUNK];
    let mut at = 0;
    while at < length {
        let read = source.read_at(buffer, at)?;
        ensure!(read > 0, "it has become shorter");
        // The last piece may be no multiple of what direct I/O can write.
        target.write_all_at(&buffer[..read.next_multiple_of(ALIGN)], at)?;
        at += read as u64;
    }
    target.set_len(length)?;
    Ok(target.sync_all()?)
}

fn folder(dir: &Path, who: &str, format: Kind) -> Result<PathBuf> {
    let folder = dir.join(format!("{who}-{}", format.name()));
    std::fs::create_dir(&folder).with_context(|| format!("make {}", folder.display()))?;
    Ok(folder)
}

impl Contender {
    /// blockd on an image that [`make_image`] made.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn blockd(dir: &Path, format: Kind, image: &Path) -> Result<Self> {
        let disk = Disk::new(DISK, format.image(), image.to_owned());
        let served = Served::blockd(&folder(dir, "ours", format)?, &[disk])?;
        let link = Link::connect(&served.socket(DISK)?, 1)?;
        let server = Server::Daemon { link: Box::new(link), served };
        Ok(Self { who: Who::Blockd, format, image: image.to_owned(), server })
    }

    /// qemu-storage-daemon on a copy of the image, which it has to read as blockd wrote it.
    ///
    /// # Errors
    /// When it does not come up, or reads something else.
    pub fn rival(dir: &Path, format: Kind, image: &Path, direct: bool) -> Result<(Self, Aio)> {
        let copy = dir.join(format!("rival.{}", format.name()));
        copy_file(image, &copy, direct).with_context(|| format!("copy {}", image.display()))?;
        let disk = Disk::new(DISK, format.image(), copy.clone());
        let (served, aio) = start_rival(&folder(dir, "theirs", format)?, &disk, direct)?;
        let mut link = Link::connect(&served.socket(DISK)?, 1)?;
        link.driver().sweep(Access::Read).context("qemu-storage-daemon reads what blockd wrote")?;
        let server = Server::Daemon { link: Box::new(link), served };
        Ok((Self { who: Who::Rival, format, image: copy, server }, aio))
    }

    /// fio on a raw file of this size.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn fio(dir: &Path, size: u64, direct: bool) -> Result<Self> {
        let image = dir.join("fio.raw");
        let mut file = File::create(&image)?;
        let mut random = ChaCha8Rng::seed_from_u64(size);
        let mut chunk = vec![0; MIB as usize];
        for _ in 0..size / MIB {
            random.fill_bytes(&mut chunk);
            file.write_all(&chunk).with_context(|| format!("write {}", image.display()))?;
        }
        file.sync_all()?;
        let server = Server::Fio { fio: Fio { file: image.clone(), range: None, direct }, shares: false };
        Ok(Self { who: Who::Fio, format: Kind::Raw, image, server })
    }

    /// fio on the very file that blockd serves, where the content of the disk is there in one piece; none elsewhere.
    ///
    /// # Errors
    /// When the image can't be read.
    pub fn fio_on(format: Kind, image: &Path) -> Result<Option<Self>> {
        let Some(range) = content_of(format, image)? else { return Ok(None) };
        let fio = Fio { file: image.to_owned(), range: Some(range), direct: true };
        let server = Server::Fio { fio, shares: true };
        Ok(Some(Self { who: Who::Fio, format, image: image.to_owned(), server }))
    }

    /// The image, when another contender's disk holds something else after this one's writes.
    pub fn spoils(&self) -> Option<&Path> {
        matches!(self.server, Server::Fio { shares: true, .. }).then_some(self.image.as_path())
    }

    /// Gives all pages of the disk what they have to hold, when this is the daemon on that image.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn restore(&mut self, image: &Path) -> Result<()> {
        match &mut self.server {
            Server::Daemon { link, .. } if self.image == image => {
                link.driver().sweep(Access::Write).map(drop).context("writing what fio has overwritten")
            }
            _ => Ok(()),
        }
    }

    /// Who it is.
    pub fn who(&self) -> Who {
        self.who
    }

    /// Its image's format.
    pub fn format(&self) -> &'static str {
        self.format.name()
    }

    /// Whether it has the image open past the page cache.
    pub fn is_direct(&self) -> bool {
        match &self.server {
            Server::Daemon { served, .. } => {
                let image = self.image.canonicalize().unwrap_or_else(|_| self.image.clone());
                process::opens_directly(served.pid(), &image).unwrap_or(false)
            }
            Server::Fio { fio, .. } => fio.direct,
        }
    }

    /// Has a daemon write and read some pages, all of which are checked.
    ///
    /// # Errors
    /// When anything is wrong.
    pub fn prove(&mut self, wait: Wait, salt: u64) -> Result<()> {
        let name = self.name();
        match &mut self.server {
            Server::Daemon { link, .. } => link.driver().prove(wait, salt).context(name),
            Server::Fio { .. } => Ok(()),
        }
    }

    fn name(&self) -> String {
        format!("{} with {}", self.who.name(), self.format.name())
    }

    /// One turn.
    ///
    /// # Errors
    /// When it fails or reads anything wrong.
    pub fn run(&mut self, pattern: &Pattern, wait: Wait, time: Duration) -> Result<Round> {
        let name = self.name();
        let round = match &mut self.server {
            Server::Daemon { link, served } => {
                link.check().with_context(|| served.log())?;
                let before = served.cpu_s()?;
                let drove = link.driver().run(pattern, wait, time).context(name)?;
                let cpu_s = served.cpu_s()? - before;
                let us = |time: Duration| time.as_secs_f64() * 1e6;
                let latencies = &drove.latencies;
                let latency =
                    [us(latencies.quantile(0.5)), us(latencies.quantile(0.99)), us(latencies.max())];
                let seconds = drove.time.as_secs_f64();
                Round { requests: drove.requests, seconds, cpu_s, latency_us: Some(latency) }
            }
            Server::Fio { fio, .. } => {
                let crate::fio::Measured { requests, seconds, cpu_s, latency_us } = fio.run(pattern, time)?;
                Round { requests, seconds, cpu_s, latency_us }
            }
        };
        if pattern.access == Access::Write {
            self.settle()?;
        }
        Ok(round)
    }

    /// What was written goes to the disk now and not in the next one's turn.
    fn settle(&mut self) -> Result<()> {
        match &mut self.server {
            Server::Daemon { link, .. } => link.driver().flush(Wait::Sleep),
            Server::Fio { fio, .. } => Ok(File::open(&fio.file)?.sync_all()?),
        }
    }

    /// Reads the whole disk once more, and ends the daemon.
    ///
    /// # Errors
    /// When anything is wrong on the disk, or with the daemon's end.
    pub fn end(self) -> Result<()> {
        let name = self.name();
        if let Server::Daemon { mut link, served } = self.server {
            link.driver().sweep(Access::Read).with_context(|| format!("{name}, after all rounds"))?;
            drop(link);
            if self.who == Who::Blockd {
                served.stop()?;
            }
        }
        Ok(())
    }
}
