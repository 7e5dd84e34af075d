//! The target's part of post-copy: the machine runs, and pages that it touches before they are there are asked for.
//!
//! The pages that are missing are known from the beginning. Each is put into the memory once, by whichever thread gets it
//! first, through userfaultfd, which wakes who waits for it. Pages that are not there but not missing either are zero.
//!
//! If the connection is lost, processors that touch a missing page wait until the source has connected again. If the source
//! dies, the machine is lost: half of its memory is gone. That is the price of post-copy, and nothing can be done about it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};
use std::os::fd::AsFd;

use super::batch::{Batch, Unpacker};
use super::connection::{Connection, Parcel};
use super::shared_set::SharedSet;
use super::transport::{Closer, TICK};
use super::userfault::{Put, Userfault};
use super::wire::{Message, REQUEST_PAGES_MAX};
use crate::memory::GuestRam;
use crate::pages::{PAGE_BYTES, PageSet};

/// How the target's processors waited for pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultReport {
    /// Pages that were missing at the beginning.
    pub pages: u64,
    /// Pages of them that somebody waited for.
    pub faults: u64,
    /// Half of the waits were not longer.
    pub p50: Duration,
    /// 99 of 100 were not longer.
    pub p99: Duration,
    /// The longest.
    pub max: Duration,
}

/// How far the memory may be relied on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The source may still take the machine back.
    Armed,
    /// The machine runs, or is going to.
    Committed,
    /// Missing pages can no longer be had: the memory must not be used.
    Broken,
}

/// A memory some of whose pages are missing.
pub(super) struct Late {
    ram: Arc<GuestRam>,
    userfault: Userfault,
    /// Pages that were missing at the beginning.
    late: PageSet,
    /// Those that nobody has got yet.
    missing: SharedSet,
    /// Pages that are not in the memory yet.
    left: AtomicU64,
    waits: Mutex<Waits>,
    phase: Mutex<Phase>,
}

/// A page that somebody waits for.
struct Wait {
    /// Since when.
    since: Instant,
    /// Since when it is to be asked for over the connection that there is now: what an earlier one did not bring says nothing
    /// about this one.
    asked: Instant,
}

#[derive(Default)]
struct Waits {
    /// Pages that are waited for.
    open: HashMap<u64, Wait>,
    /// Pages that are to be asked for.
    unasked: Vec<u64>,
    histogram: Histogram,
}

impl Late {
    /// Throws the missing pages away, and lets who touches them wait from now on.
    pub fn new(ram: &Arc<GuestRam>, missing: &PageSet) -> Result<Self> {
        ensure!(
            missing.pages() == ram.pages(),
            "the source's set of missing pages is for {} pages, the machine has {}",
            missing.pages(),
            ram.pages()
        );
        ensure!(!ram.huge_pages(), "post-copy does not work with huge pages: leave one of the two out");
        refuse_huge_pages(ram);
        discard(ram, missing)?;
        let userfault = Userfault::new()?;
        userfault.register(ram)?;
        Ok(Self {
            ram: ram.clone(),
            userfault,
            late: missing.clone(),
            missing: SharedSet::from_set(missing),
            left: AtomicU64::new(missing.len()),
            waits: Mutex::default(),
            phase: Mutex::new(Phase::Armed),
        })
    }

    /// Puts the pages of a batch there, those that are still missing.
    pub fn apply(&self, batch: &Batch<'_>) -> Result<()> {
        batch.for_each(|run, content| {
            for (i, page) in (run.first..run.first + u64::from(run.pages)).enumerate() {
                if !self.missing.remove(page) {
                    continue;
                }
                let content = (!run.zero).then(|| &content[i * PAGE_BYTES..][..PAGE_BYTES]);
                let put = match content {
                    None => self.userfault.zero(&self.ram, page),
                    Some(content) => self.userfault.copy(&self.ram, page, content),
                };
                // A page that could not be put there is missing again.
                let put = put.inspect_err(|_| self.missing.insert(page))?;
                self.arrived(page, put, content)?;
            }
            Ok(())
        })
    }

    fn arrived(&self, page: u64, put: Put, content: Option<&[u8]>) -> Result<()> {
        if put == Put::Exists {
            // Something wrote the memory past userfaultfd, which nothing may do before all pages are there. The guest's own
            // content is the lesser evil.
            tracing::error!("page {page} came into being before it arrived; its content is replaced");
            self.ram.write_pages(page, content.unwrap_or(&[0; PAGE_BYTES]));
            self.userfault.wake(&self.ram, page)?;
        }
        let mut waits = self.waits();
        if let Some(wait) = waits.open.remove(&page) {
            waits.histogram.add(wait.since.elapsed());
        }
        drop(waits);
        self.left.fetch_sub(1, Ordering::AcqRel);
        Ok(())
    }

    /// Whether all pages are there.
    pub fn is_complete(&self) -> bool {
        self.left.load(Ordering::Acquire) == 0
    }

    /// Pages that are not there. Nobody may be putting pages there meanwhile.
    pub fn missing(&self) -> PageSet {
        self.missing.to_set(self.ram.pages())
    }

    /// The memory is going to be used: from here on a loss of the connection is waited out.
    pub fn commit(&self) -> Result<()> {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(*phase != Phase::Broken, "the connection for the pages that are still missing was lost");
        *phase = Phase::Committed;
        Ok(())
    }

    /// The connection for faults is lost. Before the commit nobody may be left waiting, as what is waited for never comes.
    fn lost(&self) -> Result<()> {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        if *phase == Phase::Armed {
            *phase = Phase::Broken;
            self.userfault.unregister(&self.ram)?;
        }
        Ok(())
    }

    /// All pages are there: the memory is as any other.
    pub fn finish(&self) -> Result<FaultReport> {
        ensure!(self.is_complete(), "pages are still missing");
        self.userfault.unregister(&self.ram)?;
        let waits = self.waits();
        let histogram = &waits.histogram;
        Ok(FaultReport {
            pages: self.late.len(),
            faults: histogram.count,
            p50: histogram.below(50),
            p99: histogram.below(99),
            max: histogram.max,
        })
    }

    fn waits(&self) -> MutexGuard<'_, Waits> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of who waits for what.
    fn note_faults(&self, faults: &mut Vec<u64>) -> Result<()> {
        self.userfault.faults(&self.ram, faults)?;
        for page in faults.drain(..) {
            let mut waits = self.waits();
            if waits.open.contains_key(&page) {
                continue;
            }
            if self.missing.contains(page) {
                let now = Instant::now();
                waits.open.insert(page, Wait { since: now, asked: now });
                waits.unasked.push(page);
                continue;
            }
            drop(waits);
            // Somebody is just putting it there, which wakes who waits: waking them now would only make them ask again. Or it
            // never was missing and is zero.
            if !self.late.contains(page) && self.userfault.zero(&self.ram, page)? == Put::Exists {
                self.userfault.wake(&self.ram, page)?;
            }
        }
        Ok(())
    }

    /// Pages to ask for, at most as many as one message may have.
    fn take_unasked(&self) -> Vec<u64> {
        let mut waits = self.waits();
        let from = waits.unasked.len().saturating_sub(REQUEST_PAGES_MAX);
        waits.unasked.split_off(from)
    }

    /// On a new connection everything has to be asked for again.
    fn ask_again(&self) {
        let mut waits = self.waits();
        let now = Instant::now();
        waits.open.values_mut().for_each(|wait| wait.asked = now);
        waits.unasked = waits.open.keys().copied().collect();
    }

    /// Whether this connection owes a page for longer than this.
    fn owes_longer_than(&self, patience: Duration) -> bool {
        self.waits().open.values().any(|wait| wait.asked.elapsed() > patience)
    }
}

/// Keeps the kernel from putting pages of the memory together to a huge one: what is missing from it would be there then, as
/// zeroes, and nobody would wait for it.
fn refuse_huge_pages(ram: &GuestRam) {
    let (start, len) = (ram.page_pointer(0), ram.bytes() as usize);
    // SAFETY: the range is the mapping, which is there for as long as `ram`; the advice changes nothing of what is in it. A
    // kernel that does not know the advice has no such pages.
    unsafe { libc::madvise(start.cast(), len, libc::MADV_NOHUGEPAGE) };
}

/// Makes sure that pages are not there. Those in a part of a huge page that the kernel could not split are only made zero.
fn check_gone(ram: &GuestRam, first: u64, count: u64) -> Result<()> {
    let at = |page: u64| (page * PAGE_BYTES as u64) as libc::off_t;
    match lseek(ram.file(), at(first), Whence::SeekData) {
        Err(nix::Error::ENXIO) => Ok(()),
        Ok(data) if data >= at(first + count) => Ok(()),
        Ok(data) => bail!(
            "the kernel does not let go of page {} of the memory, which is missing: move the machine without post-copy",
            data as u64 / PAGE_BYTES as u64
        ),
        Err(error) => Err(error).context("look whether pages that are missing are gone"),
    }
}

/// Gives pages back to the host, in runs.
fn discard(ram: &GuestRam, pages: &PageSet) -> Result<()> {
    let mut run: Option<(u64, u64)> = None;
    let give = |(first, count): (u64, u64)| {
        ram.discard(first, count).context("discard pages that are missing")?;
        check_gone(ram, first, count)
    };
    for page in pages.iter() {
        run = match run {
            Some((first, count)) if first + count == page => Some((first, count + 1)),
            last => {
                last.map_or(Ok(()), give)?;
                Some((page, 1))
            }
        };
    }
    run.map_or(Ok(()), give)
}

/// The thread that asks for pages that are waited for. It ends when this is dropped, or its connection is lost.
pub(super) struct FaultThread {
    closer: Closer,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FaultThread {
    /// Starts it. `patience` is how long a page may be waited for before the connection counts as lost.
    pub fn start(late: &Arc<Late>, mut connection: Connection, patience: Duration) -> Result<Self> {
        let (closer, stop) = (connection.closer()?, Arc::new(AtomicBool::new(false)));
        let (late, stopped) = (late.clone(), stop.clone());
        let thread = std::thread::Builder::new().name("migrate-faults".into()).spawn(move || {
            if let Err(error) = serve(&late, &mut connection, patience, &stopped) {
                tracing::warn!("pages that are waited for cannot be asked for: {error:#}");
            }
            if let Err(error) = late.lost() {
                tracing::error!("who waits for pages could not be let go: {error:#}");
            }
        });
        let thread = thread.context("start the thread that asks for pages")?;
        Ok(Self { closer, stop, thread: Some(thread) })
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for FaultThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.closer.close();
        if let Some(thread) = self.thread.take() {
            // What went wrong there was said.
            let _ = thread.join();
        }
    }
}

fn serve(late: &Late, connection: &mut Connection, patience: Duration, stop: &AtomicBool) -> Result<()> {
    let (mut faults, mut unpacker) = (Vec::new(), Unpacker::new());
    late.ask_again();
    // Also when all are there: pages that are not there are zero for as long as this goes on.
    while !stop.load(Ordering::Relaxed) {
        late.note_faults(&mut faults)?;
        let pages = late.take_unasked();
        if !pages.is_empty() {
            connection.send(&Message::Request(pages))?;
        }
        while let Some(parcel) = connection.receive_parcel(Duration::ZERO, late.ram.pages(), &mut unpacker)? {
            match parcel {
                Parcel::Pages(batch) => late.apply(&batch)?,
                Parcel::Message(other) => bail!("a {} message came where pages belong", other.name()),
            }
        }
        ensure!(!late.owes_longer_than(patience), "a page did not come within {} s", patience.as_secs_f32());
        connection.beat()?;
        // What TLS has read ahead does not show at the descriptor.
        if connection.is_readable()? {
            continue;
        }
        let mut fds = [
            PollFd::new(late.userfault.as_fd(), PollFlags::POLLIN),
            PollFd::new(connection.descriptor(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::try_from(TICK).unwrap_or(PollTimeout::ZERO)) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error).context("wait for pages and for who waits for them"),
        }
    }
    Ok(())
}

/// Buckets of a histogram: four for each power of two microseconds, up to more than an hour.
const BUCKETS: usize = 4 * 33;

/// How long waits were, to a quarter of their length.
struct Histogram {
    buckets: [u64; BUCKETS],
    count: u64,
    max: Duration,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [0; BUCKETS], count: 0, max: Duration::ZERO }
    }
}

impl Histogram {
    fn add(&mut self, wait: Duration) {
        let micros = u64::try_from(wait.as_micros()).unwrap_or(u64::MAX).max(1);
        let power = micros.ilog2() as usize;
        let quarter = if power < 2 { 0 } else { (micros >> (power - 2)) as usize & 3 };
        self.buckets[(power * 4 + quarter).min(BUCKETS - 1)] += 1;
        self.count += 1;
        self.max = self.max.max(wait);
    }

    /// What so many percent were not longer than.
    fn below(&self, percent: u64) -> Duration {
        let wanted = (self.count * percent).div_ceil(100);
        let mut seen = 0;
        for (i, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted && wanted > 0 {
                let (power, quarter) = (i / 4, i as u64 % 4);
                let upper = if power < 2 { 2 << power } else { (5 + quarter) << (power - 2) };
                return Duration::from_micros(upper).min(self.max);
            }
        }
        self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The flags of the memory's mapping, as in proc(5) under `VmFlags`.
    fn flags_of(ram: &GuestRam) -> String {
        let start = format!("{:x}-", ram.page_pointer(0) as usize);
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("read");
        let mut lines = maps.lines().skip_while(|line| !line.starts_with(&start));
        lines.find_map(|line| line.strip_prefix("VmFlags:")).expect("flags").to_owned()
    }

    #[test]
    fn missing_pages_are_taken_out_of_a_memory_that_gets_no_huge_pages() {
        if let Err(error) = Userfault::new() {
            return eprintln!("SKIPPED: {error:#}");
        }
        let ram = GuestRam::new(4 << 20, false).expect("ram");
        (0..1024).for_each(|page| ram.write_pages(page, &[1; PAGE_BYTES]));
        assert!(!flags_of(&ram).contains(" nh"), "{}", flags_of(&ram));
        let mut missing = PageSet::empty(ram.pages());
        [3, 4, 700, 1023].into_iter().for_each(|page| missing.insert(page));
        let _late = Late::new(&ram, &missing).expect("armed");
        assert!(flags_of(&ram).contains(" nh"), "{}", flags_of(&ram));
    }

    #[test]
    fn a_page_that_could_not_be_taken_out_is_noticed() {
        let ram = GuestRam::new(4 << 20, false).expect("ram");
        check_gone(&ram, 0, 1024).expect("nothing was written");
        ram.write_pages(513, &[0; PAGE_BYTES]);
        check_gone(&ram, 0, 513).expect("it comes after these");
        check_gone(&ram, 514, 510).expect("it comes before these");
        let error = check_gone(&ram, 500, 14).expect_err("it is one of these").to_string();
        assert!(error.contains("page 513"), "{error}");
    }

    #[test]
    fn percentiles_are_right_to_a_quarter() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.below(99), Duration::ZERO);
        for micros in 1..=10_000 {
            histogram.add(Duration::from_micros(micros));
        }
        for percent in [50, 99] {
            let exact = percent * 100;
            let found = histogram.below(percent).as_micros() as u64;
            assert!(found >= exact && found <= exact * 5 / 4 + 1, "{percent}: {found}");
        }
        assert_eq!(histogram.max, Duration::from_micros(10_000));
    }
}
