//! What do the parents of a differencing image cost the guest's reads?
//!
//! The same content is served as one image and as chains, in which each page is in an image chosen at random. Rounds of
//! all of them take turns on one daemon, so that what else the machine does meets all of them alike.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blockd_api::{AttachRequest, DiskInfo};
use formats::{CreateOptions, Format, OpenOptions};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use system_tests::daemon::Program;
use system_tests::ring::{OK, READ, Request};
use system_tests::{Daemon, FrontEnd, Options};

use crate::choice::{Common, Kind};
use crate::{interrupt, machine};

/// Bytes of a request.
const PAGE: u64 = 4096;
/// How long nothing may complete before the server counts as hung.
const PATIENCE: Duration = Duration::from_secs(30);

/// The question.
#[derive(Debug, Clone)]
pub struct Chains {
    /// Bytes of the disk, all of which are held.
    pub size: u64,
    /// Its format.
    pub format: Kind,
    /// Images of each chain.
    pub lengths: Vec<usize>,
    /// Requests in flight.
    pub depth: usize,
    /// Rounds for each.
    pub rounds: usize,
    /// Seconds of a round.
    pub seconds: f64,
}

/// The answer for one chain.
#[derive(Debug, Clone, Serialize)]
pub struct Answer {
    /// Images of the chain.
    pub images: usize,
    /// Reads a second in each round.
    pub reads_per_s: Vec<f64>,
    /// Relative to one image in the same round: the median, the least and the most.
    pub relative: [f64; 3],
}

/// Measures random reads of 4 KiB.
///
/// # Errors
/// When a chain can't be made or served, and when anything that is read is wrong.
pub fn run(common: &Common, chains: &Chains) -> Result<Vec<Answer>> {
    let is_chain_format = matches!(chains.format, Kind::Vhd | Kind::Vhdx);
    ensure!(is_chain_format, "raw images have no parents: choose vhd or vhdx");
    ensure!(chains.lengths.contains(&1), "what is relative to one image needs a chain of 1");
    let base = common.dir.clone().unwrap_or_else(std::env::temp_dir);
    let dir = tempfile::tempdir_in(&base).with_context(|| format!("a folder in {}", base.display()))?;
    machine::need_room(dir.path(), chains.size * (chains.lengths.len() as u64 + 1))?;
    let daemon_dir = dir.path().join("daemon");
    std::fs::create_dir(&daemon_dir)?;
    let mut daemon = Daemon::start_program(Program::Blockd, &daemon_dir, Vec::new())?;
    let mut guests = Vec::new();
    for &images in &chains.lengths {
        let files = make(dir.path(), chains, images, common.seed)?;
        guests.push((images, attach(&daemon, dir.path(), images, &files, chains.depth)?));
    }
    let mut rates: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    for _ in 0..chains.rounds {
        for (images, guest) in &mut guests {
            rates.entry(*images).or_default().push(guest.read_for(Duration::from_secs_f64(chains.seconds))?);
        }
    }
    drop(guests);
    ensure!(daemon.terminate()?, "blockd did not end well:\n{}", daemon.log_tail());
    let one = rates[&1].clone();
    let answer = |(images, reads_per_s): (usize, Vec<f64>)| {
        let mut ratios: Vec<f64> = reads_per_s.iter().zip(&one).map(|(a, b)| a / b).collect();
        ratios.sort_by(f64::total_cmp);
        let relative = [ratios[ratios.len() / 2], ratios[0], ratios[ratios.len() - 1]];
        Answer { images, reads_per_s, relative }
    };
    Ok(rates.into_iter().map(answer).collect())
}

/// A table of the answers.
pub fn table(chains: &Chains, answers: &[Answer]) -> String {
    let mut text = format!(
        "random reads of 4 KiB at depth {} on a {} of {} MiB, {} rounds of {} s each\n\n| images | reads/s (median) | \
         relative to one (min-max) |\n|---:|---:|---:|\n",
        chains.depth,
        chains.format.name(),
        chains.size >> 20,
        chains.rounds,
        chains.seconds
    );
    for answer in answers {
        let mut rates = answer.reads_per_s.clone();
        rates.sort_by(f64::total_cmp);
        let [median, least, most] = answer.relative;
        let rate = rates[rates.len() / 2];
        text.push_str(&format!("| {} | {rate:.0} | {median:.2} ({least:.2}-{most:.2}) |\n", answer.images));
    }
    text
}

/// Makes a chain of so many images. Returns its files, the newest first.
fn make(dir: &Path, chains: &Chains, images: usize, seed: u64) -> Result<Vec<PathBuf>> {
    let format = if chains.format == Kind::Vhd { Format::Vhd } else { Format::Vhdx };
    let pages = chains.size / PAGE;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let level: Vec<usize> = (0..pages).map(|_| random.random_range(0..images)).collect();
    let mut files: Vec<PathBuf> = Vec::new();
    for n in 0..images {
        interrupt::check()?;
        let path = dir.join(format!("{images}-{n}.{}", chains.format.name()));
        let options = match files.first() {
            None => CreateOptions::new(format, chains.size),
            Some(parent) => CreateOptions::on_parent(format, parent),
        };
        formats::create(&path, &options)?;
        let image = formats::open(&path, &OpenOptions { parents: files.clone(), ..OpenOptions::default() })?;
        let mut page = 0;
        while page < pages {
            // The base has everything, each child the pages that were drawn for it.
            let run = (page..pages)
                .take_while(|&p| (n == 0 || level[p as usize] == n) && p - page < 256)
                .count() as u64;
            if run > 0 {
                let bytes: Vec<u8> = (page..page + run).flat_map(content).collect();
                formats::write_payload(&*image, page * PAGE, &bytes)?;
                if image.wants_maintenance() {
                    image.maintain(&|| ())?;
                }
            }
            page += run.max(1);
        }
        image.close()?;
        files.insert(0, path);
    }
    Ok(files)
}

fn content(page: u64) -> impl Iterator<Item = u8> {
    let word = page.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes();
    (0..PAGE as usize).map(move |i| word[i % 8])
}

struct Guest {
    front: FrontEnd,
    pages: u64,
    random: ChaCha8Rng,
    buffers: Vec<u64>,
    in_flight: Vec<Option<(u64, u64)>>,
}

fn attach(daemon: &Daemon, dir: &Path, images: usize, files: &[PathBuf], depth: usize) -> Result<Guest> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let socket = dir.join(format!("{images}.sock"));
    let request = AttachRequest {
        id: format!("chain-{images}"),
        image: text(&files[0]),
        socket: text(&socket),
        format: None,
        queues: 1,
        io_threads: 1,
        read_only: true,
        parents: files[1..].iter().map(|file| text(file)).collect(),
        generation: None,
    };
    let disk: DiskInfo = daemon.call("POST", "/v1/disks", Some(&request))?;
    ensure!(disk.chain.len() == images, "a chain of {images} is served as {:?}", disk.chain);
    let mut front = FrontEnd::start(&socket, Options::default())?;
    let size = usize::from(front.rings[0].options().size);
    ensure!((1..=size).contains(&depth), "a depth of {depth}: 1 to {size} is possible");
    front.rings[0].poll_only();
    let pages = front.config()?.capacity * 512 / PAGE;
    let buffers = (0..depth).map(|_| front.memory.alloc(0, PAGE, PAGE)).collect();
    let in_flight = (0..size).map(|_| None).collect();
    Ok(Guest { front, pages, random: ChaCha8Rng::seed_from_u64(images as u64), buffers, in_flight })
}

impl Guest {
    /// Reads at random for so long. Returns reads a second.
    fn read_for(&mut self, time: Duration) -> Result<f64> {
        let started = Instant::now();
        let (mut done, mut last) = (0u64, started);
        while started.elapsed() < time {
            interrupt::check()?;
            self.submit();
            let taken = self.reap()?;
            done += taken;
            match taken {
                0 if last.elapsed() > PATIENCE => bail!("no request was completed for {PATIENCE:?}"),
                0 => std::thread::yield_now(),
                _ => last = Instant::now(),
            }
        }
        let elapsed = started.elapsed();
        while self.front.rings[0].in_flight() > 0 {
            if self.reap()? == 0 {
                ensure!(last.elapsed() < PATIENCE, "no request was completed for {PATIENCE:?}");
                std::thread::yield_now();
            }
        }
        Ok(done as f64 / elapsed.as_secs_f64())
    }

    fn submit(&mut self) {
        let mut any = false;
        while let Some(buffer) = self.buffers.pop() {
            let page = self.random.random_range(0..self.pages);
            let data = [(buffer, PAGE as u32)];
            let token = self.front.rings[0].submit(&Request { kind: READ, sector: page * 8, data: &data });
            let token = token.expect("the ring has room for the depth that was checked");
            self.in_flight[usize::from(token.0)] = Some((page, buffer));
            any = true;
        }
        if any {
            self.front.rings[0].kick();
        }
    }

    fn reap(&mut self) -> Result<u64> {
        let mut taken = 0;
        while let Some(completion) = self.front.rings[0].poll() {
            let (page, buffer) = self.in_flight[usize::from(completion.token.0)]
                .take()
                .expect("the ring knows what is in flight");
            let mut start = [0; 8];
            self.front.memory.read(buffer, &mut start);
            ensure!(completion.status == OK, "a read failed with status {}", completion.status);
            let expected: Vec<u8> = content(page).take(8).collect();
            ensure!(start[..] == expected[..], "WRONG: page {page} reads as something else");
            self.buffers.push(buffer);
            taken += 1;
        }
        Ok(taken)
    }
}
