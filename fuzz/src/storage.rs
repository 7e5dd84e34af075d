//! A file in memory with bounds on its length and on the memory it takes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use formats::Storage;
use rand::Rng;

use crate::SECTOR;

/// The unit in which contents are kept, in bytes.
pub const PAGE: u64 = 4096;
/// The longest file, in bytes.
pub const MAX_LEN: u64 = 1 << 40;
/// The most pages that a file may store; more is "no space".
const MAX_PAGES: usize = 24 << 10;

type Page = [u8; PAGE as usize];

/// Contents and length of a file. Cloning is cheap: pages are shared.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    pages: BTreeMap<u64, Arc<Page>>,
    len: u64,
}

impl Contents {
    /// A hole of `len` bytes.
    pub fn hole(len: u64) -> Self {
        Self { pages: BTreeMap::new(), len }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the length is 0.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `buf` from `offset`; holes and what lies beyond the end are zeroes.
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        for part in Part::of(offset, buf.len() as u64) {
            let to = &mut buf[part.outer()];
            match self.pages.get(&part.page) {
                Some(page) => to.copy_from_slice(&page[part.inner()]),
                None => to.fill(0),
            }
        }
    }

    /// `len` bytes from `offset`.
    pub fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0; len];
        self.read(offset, &mut buf);
        buf
    }

    /// Writes `data` at `offset`; the length grows where needed.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.len = self.len.max(offset + data.len() as u64);
        for part in Part::of(offset, data.len() as u64) {
            let from = &data[part.outer()];
            if !self.pages.contains_key(&part.page) && is_zero(from) {
                continue;
            }
            let page = self.pages.entry(part.page).or_insert_with(|| Arc::new([0; PAGE as usize]));
            Arc::make_mut(page)[part.inner()].copy_from_slice(from);
        }
    }

    /// Makes a range read as zeroes; the length stays.
    pub fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        let (first, last) = (offset.div_ceil(PAGE), end / PAGE);
        if first < last {
            let whole: Vec<u64> = self.pages.range(first..last).map(|(page, _)| *page).collect();
            whole.iter().for_each(|page| drop(self.pages.remove(page)));
        }
        let head = (first * PAGE).min(end);
        let tail = (last * PAGE).max(offset);
        for (from, to) in [(offset, head), (tail.max(head), end)] {
            if let Some(page) = (from < to).then(|| self.pages.get_mut(&(from / PAGE))).flatten() {
                let inner = (from % PAGE) as usize;
                Arc::make_mut(page)[inner..inner + (to - from) as usize].fill(0);
            }
        }
    }

    /// Cuts or extends; what lies beyond a new, smaller length is gone.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len.next_multiple_of(PAGE) - len);
        }
        self.len = len;
    }

    /// The first run of stored pages at or after `offset`, cut at the end of the file.
    pub fn next_data(&self, offset: u64) -> Option<(u64, u64)> {
        let mut pages = self.pages.range(offset / PAGE..).map(|(page, _)| *page);
        let first = pages.next()?;
        // In parts, since looking for the end of a long run again and again takes time in the square of its length.
        let next = pages.zip(first + 1..first + 64).take_while(|(is, next)| is == next).count() as u64;
        let end = first + 1 + next;
        let (start, end) = ((first * PAGE).max(offset), (end * PAGE).min(self.len));
        (start < end).then_some((start, end))
    }

    /// How many pages are kept, at most some of them zeroes.
    pub fn page_count(&self) -> usize {
        self.pages.len()
    }

    /// How many pages hold something.
    pub fn stored(&self) -> usize {
        self.pages.values().filter(|page| !is_zero(&page[..])).count()
    }

    /// All runs of stored pages.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let run = self.next_data(at)?;
            at = run.1;
            Some(run)
        })
    }

    fn take_page_from(&mut self, other: &Self, page: u64) {
        match other.pages.get(&page) {
            Some(stored) => self.pages.insert(page, stored.clone()),
            None => self.pages.remove(&page),
        };
    }
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Whole words: this is where much of the time goes.
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|w| u128::from_ne_bytes(*w) == 0) && rest.iter().all(|b| *b == 0)
}

/// What a range has of one page.
struct Part {
    page: u64,
    /// Where in the page.
    from: usize,
    /// Where in the caller's buffer.
    at: usize,
    len: usize,
}

impl Part {
    fn of(offset: u64, len: u64) -> impl Iterator<Item = Self> {
        let mut done = 0;
        std::iter::from_fn(move || {
            if done == len {
                return None;
            }
            let (page, from) = ((offset + done) / PAGE, (offset + done) % PAGE);
            let n = (PAGE - from).min(len - done);
            let part = Self { page, from: from as usize, at: done as usize, len: n as usize };
            done += n;
            Some(part)
        })
    }

    fn inner(&self) -> std::ops::Range<usize> {
        self.from..self.from + self.len
    }

    fn outer(&self) -> std::ops::Range<usize> {
        self.at..self.at + self.len
    }
}

/// A change that may be lost by a power cut.
#[derive(Debug, Clone)]
enum Change {
    Write { offset: u64, data: Arc<[u8]> },
    SetLen(u64),
    Punch { offset: u64, len: u64 },
}

impl Change {
    fn pages(&self, old_len: u64) -> std::ops::Range<u64> {
        let (offset, len) = match self {
            Self::Write { offset, data } => (*offset, data.len() as u64),
            Self::SetLen(len) => (*len, old_len.saturating_sub(*len)),
            Self::Punch { offset, len } => (*offset, *len),
        };
        offset / PAGE..(offset + len).div_ceil(PAGE)
    }
}

/// Which operation that changes the file is to fail.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// How many still succeed before it.
    pub after: u64,
    /// Whether all later ones fail too.
    pub lasting: bool,
    /// Whether a failing write leaves its first half behind.
    pub partial: bool,
}

/// How much was done to a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Writes, cuts, extensions, punches and syncs.
    pub changes: u64,
    /// Reads and searches for data.
    pub reads: u64,
    /// Bytes that were read.
    pub read_bytes: u64,
}

#[derive(Debug, Default)]
struct Inner {
    now: Contents,
    /// What is safe, and what was done since; only when power cuts are to be played.
    durable: Option<Contents>,
    since: Vec<Change>,
    fault: Option<Fault>,
    /// Whether a fault or the limit was met.
    failed: bool,
    limit: Option<u64>,
    work: Work,
}

/// A [`Storage`] in memory.
pub struct MemoryFile(Mutex<Inner>);

impl std::fmt::Debug for MemoryFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let inner = self.lock();
        write!(f, "MemoryFile({} bytes, {:?})", inner.now.len, inner.work)
    }
}

impl MemoryFile {
    /// A file with these contents, which knows nothing of power cuts.
    pub fn new(now: Contents) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Inner { now, ..Inner::default() })))
    }

    /// A file with these contents, all of them durable.
    pub fn with_power_cuts(now: Contents) -> Arc<Self> {
        let durable = Some(now.clone());
        Arc::new(Self(Mutex::new(Inner { now, durable, ..Inner::default() })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What readers see.
    pub fn contents(&self) -> Contents {
        self.lock().now.clone()
    }

    /// A look at what readers see.
    pub fn look<T>(&self, at: impl FnOnce(&Contents) -> T) -> T {
        at(&self.lock().now)
    }

    /// How much was done to it.
    pub fn work(&self) -> Work {
        self.lock().work
    }

    /// Makes an operation fail, or none any more.
    pub fn set_fault(&self, fault: Option<Fault>) {
        self.lock().fault = fault;
    }

    /// From now on there is no space beyond this length.
    pub fn set_limit(&self, limit: Option<u64>) {
        self.lock().limit = limit;
    }

    /// No operation is to fail any more, and that some did is forgotten.
    pub fn heal(&self) {
        let mut inner = self.lock();
        (inner.fault, inner.limit, inner.failed) = (None, None, false);
    }

    /// Whether an operation failed since it was healed.
    pub fn has_failed(&self) -> bool {
        self.lock().failed
    }

    /// The power fails: of what was not synced, what `keeps` says is kept, sector by sector, in order.
    pub fn cut_power(&self, keeps: &mut dyn FnMut() -> bool) {
        let mut inner = self.lock();
        let changes = std::mem::take(&mut inner.since);
        let Some(mut disk) = inner.durable.take() else { return };
        // The length as it was when a change was made decides whether that change was an extension.
        let mut len = disk.len();
        for change in changes {
            match change {
                Change::Write { offset, data } => {
                    for part in sectors(offset, data.len() as u64) {
                        let at = offset + part.start as u64;
                        let bytes = &data[part];
                        let end = at + bytes.len() as u64;
                        if !keeps() {
                            continue;
                        }
                        if end > len {
                            disk.write(at, bytes);
                        } else if at < disk.len() {
                            let n = (disk.len() - at).min(bytes.len() as u64) as usize;
                            disk.write(at, &bytes[..n]);
                        }
                    }
                    len = len.max(offset + data.len() as u64);
                }
                Change::SetLen(to) => {
                    len = to;
                    if keeps() {
                        disk.set_len(to);
                    }
                }
                Change::Punch { offset, len } => {
                    let step = (len / 4).next_multiple_of(PAGE).max(PAGE);
                    let mut at = offset;
                    while at < offset + len {
                        let n = step.min(offset + len - at);
                        if keeps() {
                            disk.zero(at, n.min(disk.len().saturating_sub(at)));
                        }
                        at += n;
                    }
                }
            }
        }
        inner.now = disk.clone();
        inner.durable = Some(disk);
    }
}

fn sectors(offset: u64, len: u64) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let n = (SECTOR - (offset + done) % SECTOR).min(len - done);
        let range = done as usize..(done + n) as usize;
        done += n;
        Some(range)
    })
}

impl Inner {
    /// Counts, and fails when it is a failing operation's turn. The error comes with whether to do the half of it.
    fn turn(&mut self) -> Result<(), (io::Error, bool)> {
        self.work.changes += 1;
        let Some(fault) = &mut self.fault else { return Ok(()) };
        if fault.after > 0 {
            fault.after -= 1;
            return Ok(());
        }
        let partial = fault.partial;
        if !fault.lasting {
            self.fault = None;
        }
        self.failed = true;
        Err((io::Error::other("the fault that was asked for"), partial))
    }

    fn room(&mut self, end: Option<u64>, pages: usize) -> io::Result<()> {
        let limit = self.limit.unwrap_or(MAX_LEN).max(self.now.len);
        match end {
            Some(end) if end <= limit && self.now.pages.len() + pages <= MAX_PAGES => Ok(()),
            _ => {
                self.failed = true;
                Err(io::ErrorKind::StorageFull.into())
            }
        }
    }

    fn change(&mut self, change: Change) {
        match &change {
            Change::Write { offset, data } => self.now.write(*offset, data),
            Change::SetLen(len) => self.now.set_len(*len),
            Change::Punch { offset, len } => self.now.zero(*offset, *len),
        }
        if self.durable.is_some() {
            self.since.push(change);
        }
    }

    fn settle(&mut self) {
        let Some(durable) = &mut self.durable else { return };
        let mut pages = BTreeSet::new();
        let mut len = durable.len;
        for change in self.since.drain(..) {
            let span = change.pages(len);
            match change {
                Change::Write { offset, data } => {
                    pages.extend(span);
                    len = len.max(offset + data.len() as u64);
                }
                // May be long: only what is stored counts.
                Change::SetLen(_) | Change::Punch { .. } => {
                    pages.extend(durable.pages.range(span.clone()).map(|(page, _)| *page));
                    pages.extend(self.now.pages.range(span).map(|(page, _)| *page));
                    if let Change::SetLen(to) = change {
                        len = to;
                    }
                }
            }
        }
        pages.into_iter().for_each(|page| durable.take_page_from(&self.now, page));
        durable.len = self.now.len;
    }
}

impl Storage for MemoryFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut inner = self.lock();
        inner.work.reads += 1;
        inner.work.read_bytes += buf.len() as u64;
        match offset.checked_add(buf.len() as u64) {
            Some(end) if end <= inner.now.len => inner.now.read(offset, buf),
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut inner = self.lock();
        if let Err((e, partial)) = inner.turn() {
            let half = buf.len() / 2 / SECTOR as usize * SECTOR as usize;
            if partial
                && half > 0
                && inner.room(offset.checked_add(half as u64), half / PAGE as usize).is_ok()
            {
                inner.change(Change::Write { offset, data: buf[..half].into() });
            }
            return Err(e);
        }
        let pages = if is_zero(buf) { 0 } else { buf.len().div_ceil(PAGE as usize) };
        inner.room(offset.checked_add(buf.len() as u64), pages)?;
        if !buf.is_empty() {
            inner.change(Change::Write { offset, data: buf.into() });
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().now.len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut inner = self.lock();
        inner.turn().map_err(|(e, _)| e)?;
        inner.room(Some(len), 0)?;
        inner.change(Change::SetLen(len));
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut inner = self.lock();
        inner.turn().map_err(|(e, _)| e)?;
        let end = offset.saturating_add(len).min(inner.now.len);
        if offset < end {
            inner.change(Change::Punch { offset, len: end - offset });
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut inner = self.lock();
        inner.turn().map_err(|(e, _)| e)?;
        inner.settle();
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let mut inner = self.lock();
        inner.work.reads += 1;
        Ok(inner.now.next_data(offset))
    }

    fn file(&self) -> Option<&File> {
        None
    }
}

/// Ways in which a power cut treats what was not synced, from one byte and a source of chance.
pub fn keeper(how: u8, mut chance: impl Rng) -> impl FnMut() -> bool {
    let mut seen = 0_u32;
    let turning = u32::from(how >> 2) * 2;
    move || {
        seen += 1;
        match how & 3 {
            // Each by itself, rarely or mostly.
            0 => chance.random_range(0..64) <= how >> 2,
            // Only the first ones, only the later ones.
            1 => seen <= turning,
            2 => seen > turning,
            // All but one, or one alone.
            _ => (seen == turning / 4 + 1) == (how & 4 == 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_synced_is_lost_as_the_keeper_says() {
        let file = MemoryFile::with_power_cuts(Contents::hole(1 << 20));
        file.write_at(&[1; 4096], 0).expect("it works");
        file.sync().expect("it works");
        file.write_at(&[2; 1024], 1024).expect("it works");
        file.punch(0, 512).expect("it works");
        file.set_len(2 << 20).expect("it works");
        let mut answers = [false, true, true, false].into_iter();
        file.cut_power(&mut || answers.next().expect("four units"));
        let now = file.contents();
        assert_eq!(now.len(), 1 << 20);
        assert_eq!(now.bytes(0, 2560), [&[0; 512][..], &[1; 1024], &[2; 512], &[1; 512]].concat());
    }

    #[test]
    fn a_sync_makes_everything_durable() {
        let file = MemoryFile::with_power_cuts(Contents::hole(1 << 20));
        file.write_at(&[1; 9000], 5000).expect("it works");
        file.punch(6000, 3000).expect("it works");
        file.set_len(10_000).expect("it works");
        file.set_len(1 << 30).expect("it works");
        file.write_at(&[3; 10], 1 << 29).expect("it works");
        file.sync().expect("it works");
        let before = file.contents();
        file.cut_power(&mut || panic!("nothing is at stake"));
        assert_eq!(file.contents(), before);
        let mut expected = vec![0; 20_000];
        expected[5000..6000].fill(1);
        expected[9000..10_000].fill(1);
        assert_eq!(before.bytes(0, 20_000), expected);
        assert_eq!(before.runs().collect::<Vec<_>>(), [(4096, 12288), (1 << 29, (1 << 29) + 4096)]);
    }
}
