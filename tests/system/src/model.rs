//! What every sector of a disk must hold.
//!
//! Each write has a generation of its own, and each of its sectors is filled with (sector number, generation). So one
//! look at a sector tells whose write it was, and the model tells whether that one may be seen: the last acknowledged
//! write, or one that is in flight.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// The unit of the model and of virtio-blk requests.
pub const SECTOR: usize = 512;
const MAGIC: u64 = 0x5e_c7_0a_00 << 32;
const ZERO: u32 = 1 << 31;

/// What a sector was found to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Nothing but zeroes.
    Zero,
    /// The write of this generation.
    Written(u32),
    /// A mixture, another sector's content, or rubbish.
    Foreign,
}

/// Fills `buffer` as the write of `generation` at `sector`.
pub fn stamp(buffer: &mut [u8], sector: u64, generation: u32) {
    for (i, chunk) in buffer.chunks_exact_mut(SECTOR).enumerate() {
        let first = (MAGIC ^ (sector + i as u64)).to_le_bytes();
        let second = u64::from(generation).to_le_bytes();
        for pair in chunk.chunks_exact_mut(16) {
            pair[..8].copy_from_slice(&first);
            pair[8..].copy_from_slice(&second);
        }
    }
}

/// Tells what one sector's bytes are.
pub fn read_stamp(bytes: &[u8], sector: u64) -> Content {
    let first = &bytes[..16];
    if bytes.chunks_exact(16).any(|pair| pair != first) {
        return Content::Foreign;
    }
    if first == [0; 16] {
        return Content::Zero;
    }
    let word = |at: usize| u64::from_le_bytes(first[at..at + 8].try_into().expect("8 bytes"));
    if word(0) != MAGIC ^ sector {
        return Content::Foreign;
    }
    u32::try_from(word(8)).map_or(Content::Foreign, Content::Written)
}

/// The disk as it has to be. A generation with the bit `ZERO` set is a write of zeroes.
#[derive(Debug, Clone)]
pub struct Model {
    current: Vec<u32>,
    pending: Vec<u32>,
    last_zeroed: Vec<u32>,
    /// May be there as well, of a guest that died.
    either: Vec<u32>,
    next: u32,
    history: Option<History>,
}

/// When writes began and ended, in steps of one for each event.
#[derive(Debug, Clone, Default)]
struct History {
    clock: u64,
    /// By generation: began, ended, first sector, sectors, whether it wrote zeroes.
    writes: Vec<Write>,
}

#[derive(Debug, Clone, Copy)]
struct Write {
    began: u64,
    ended: u64,
    sector: u64,
    count: u64,
    zero: bool,
}

impl Model {
    /// A disk of `sectors` sectors that reads as zeroes.
    pub fn new(sectors: u64) -> Self {
        let len = usize::try_from(sectors).expect("64-bit");
        Self {
            current: vec![0; len],
            pending: vec![0; len],
            last_zeroed: vec![0; len],
            either: vec![0; len],
            next: 1,
            history: None,
        }
    }

    /// The same disk with more sectors; those that are new read as zeroes.
    pub fn grown(mut self, sectors: u64) -> Self {
        let len = usize::try_from(sectors).expect("64-bit");
        assert!(len >= self.current.len(), "a model does not shrink");
        for part in [&mut self.current, &mut self.pending, &mut self.last_zeroed, &mut self.either] {
            part.resize(len, 0);
        }
        self
    }

    /// Remembers from now on when writes began and ended. Nothing may have been written yet.
    pub fn remember_history(&mut self) {
        assert_eq!(self.next, 1, "the history has to be whole");
        self.history = Some(History::default());
    }

    /// Sectors of the disk.
    pub fn sectors(&self) -> u64 {
        self.current.len() as u64
    }

    /// Sectors that hold something else than zeroes.
    pub fn sectors_written(&self) -> u64 {
        self.current.iter().filter(|c| **c & ZERO == 0 && **c != 0).count() as u64
    }

    fn range(sector: u64, count: u64) -> std::ops::Range<usize> {
        sector as usize..(sector + count) as usize
    }

    /// Whether a write to any of these sectors is in flight.
    pub fn is_busy(&self, sector: u64, count: u64) -> bool {
        self.pending[Self::range(sector, count)].iter().any(|p| *p != 0)
    }

    /// A write begins; returns its generation.
    pub fn begin_write(&mut self, sector: u64, count: u64) -> u32 {
        let generation = self.next;
        self.next += 1;
        assert!(self.next < ZERO, "the generations are used up");
        self.pending[Self::range(sector, count)].fill(generation);
        if let Some(history) = &mut self.history {
            history.clock += 1;
            history.writes.push(Write { began: history.clock, ended: u64::MAX, sector, count, zero: false });
        }
        generation
    }

    /// A write of zeroes begins.
    pub fn begin_zero(&mut self, sector: u64, count: u64) -> u32 {
        let generation = self.begin_write(sector, count);
        self.pending[Self::range(sector, count)].fill(generation | ZERO);
        self.last_zeroed[Self::range(sector, count)].fill(generation);
        if let Some(write) = self.history.as_mut().and_then(|h| h.writes.last_mut()) {
            write.zero = true;
        }
        generation
    }

    /// The write that is in flight on these sectors was acknowledged.
    pub fn acknowledge(&mut self, sector: u64, count: u64) {
        if let Some(history) = &mut self.history {
            history.clock += 1;
            let generation = self.pending[sector as usize] & !ZERO;
            history.writes[generation as usize - 1].ended = history.clock;
        }
        for at in Self::range(sector, count) {
            self.current[at] = std::mem::take(&mut self.pending[at]);
            self.either[at] = 0;
        }
    }

    /// After the guest's death: of writes that were in flight nobody knows whether they are there, so that both
    /// contents are right for good. They are no longer busy.
    pub fn into_settled(mut self) -> Self {
        for at in 0..self.current.len() {
            let pending = std::mem::take(&mut self.pending[at]);
            if pending != 0 {
                self.either[at] = pending;
            }
        }
        self
    }

    /// What was acknowledged last, to be given to [`Model::check_read`] when the read is done.
    pub fn snapshot(&self, sector: u64, count: u64, to: &mut Vec<u32>) {
        to.clear();
        to.extend_from_slice(&self.current[Self::range(sector, count)]);
    }

    /// Checks what a read returned that began when `snapshot` was taken.
    pub fn check_read(&self, sector: u64, bytes: &[u8], snapshot: &[u32]) -> Result<()> {
        for (i, chunk) in bytes.chunks_exact(SECTOR).enumerate() {
            let at = sector + i as u64;
            let found = read_stamp(chunk, at);
            ensure!(
                self.may_hold(at, found, snapshot[i]) || self.may_be_torn(at, chunk, snapshot[i]),
                "{}",
                self.complaint(at, found, snapshot[i], chunk)
            );
        }
        Ok(())
    }

    fn may_hold(&self, sector: u64, found: Content, snapshot: u32) -> bool {
        let at = sector as usize;
        let (current, pending, either) = (self.current[at], self.pending[at], self.either[at]);
        let oldest = snapshot & !ZERO;
        match found {
            Content::Foreign => false,
            Content::Written(generation) => {
                let exact = [snapshot, current, pending, either].contains(&generation) && generation != 0;
                let newest = (current & !ZERO).max(pending & !ZERO);
                // Between two acknowledged writes there may have been others while the read was under way.
                exact || (generation > oldest && generation < newest)
            }
            Content::Zero => {
                snapshot == 0
                    || [snapshot, current, pending, either].iter().any(|g| g & ZERO != 0)
                    || self.last_zeroed[at] > oldest
            }
        }
    }

    /// Whether these bytes are a mixture of contents that the read may have found, each whole, because a write of the
    /// sector was under way meanwhile. Page caches copy without holding readers off, so a read that overlaps a write in
    /// time may see a part of it; no driver does that to data it cares for. Once the write is done nothing may be mixed.
    fn may_be_torn(&self, sector: u64, bytes: &[u8], snapshot: u32) -> bool {
        let at = sector as usize;
        let overlaps = self.pending[at] != 0 || self.current[at] != snapshot;
        let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
        overlaps
            && bytes.chunks_exact(16).all(|pair| {
                let (first, second) = (word(&pair[..8]), word(&pair[8..]));
                let first_fits = match first {
                    0 => self.may_hold(sector, Content::Zero, snapshot),
                    first => first == MAGIC ^ sector,
                };
                let second = match second {
                    0 => Content::Zero,
                    second => u32::try_from(second).map_or(Content::Foreign, Content::Written),
                };
                first_fits && self.may_hold(sector, second, snapshot)
            })
    }

    fn complaint(&self, sector: u64, found: Content, snapshot: u32, bytes: &[u8]) -> String {
        let name = |g: u32| match g {
            0 => "never written".to_owned(),
            g if g & ZERO != 0 => format!("zeroed by {}", g & !ZERO),
            g => format!("written by {g}"),
        };
        let at = sector as usize;
        let pending = match self.pending[at] {
            0 => "nothing in flight".to_owned(),
            g => format!("in flight: {}", name(g)),
        };
        let (first, last) = (&bytes[..16], &bytes[SECTOR - 16..]);
        format!(
            "sector {sector} holds {found:?} (first bytes {first:02x?}, last {last:02x?}), but when the read began it was {}, \
             is now {}, {pending}",
            name(snapshot),
            name(self.current[at]),
        )
    }

    /// Checks that a raw file holds the disk as it was at one moment: there is a moment such that each sector holds the
    /// last write that ended before it, or one that was under way then. Returns between which writes' generations that
    /// moment lies.
    ///
    /// # Panics
    /// Without [`Model::remember_history`].
    pub fn check_copy(&self, path: &Path) -> Result<(u32, u32)> {
        let history = self.history.as_ref().expect("the history was remembered");
        let content = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        ensure!(
            content.len() as u64 == self.sectors() * SECTOR as u64,
            "the copy has {} bytes",
            content.len()
        );
        let found: Vec<_> =
            content.chunks_exact(SECTOR).enumerate().map(|(i, bytes)| read_stamp(bytes, i as u64)).collect();
        // The writes of each sector in their order. They never overlap in time.
        let mut of_sector = vec![Vec::new(); found.len()];
        for (index, write) in history.writes.iter().enumerate() {
            for sector in Self::range(write.sector, write.count) {
                of_sector[sector].push(index);
            }
        }
        let (mut earliest, mut latest) = (0, u64::MAX);
        for (sector, content) in found.iter().enumerate() {
            let (from, until) = moments(&history.writes, &of_sector[sector], *content, earliest, latest)
                .with_context(|| {
                    format!(
                        "sector {sector} holds {content:?}, which fits to no moment between steps \
                     {earliest} and {latest}, as the sectors before it want"
                    )
                })?;
            (earliest, latest) = (from, until);
        }
        let began = |moment| history.writes.iter().take_while(|w| w.began <= moment).count() as u32;
        Ok((began(earliest), began(latest)))
    }

    /// Checks every sector of a raw file, with nothing in flight (or with writes in flight that may or may not be there).
    pub fn check_file(&self, path: &Path) -> Result<()> {
        let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        let mut buffer = vec![0; 1 << 20];
        let mut sector = 0;
        while sector < self.sectors() {
            let count = (self.sectors() - sector).min((buffer.len() / SECTOR) as u64);
            let bytes = &mut buffer[..count as usize * SECTOR];
            file.read_exact(bytes).with_context(|| format!("read {} at sector {sector}", path.display()))?;
            let snapshot = &self.current[Self::range(sector, count)];
            self.check_read(sector, bytes, snapshot).with_context(|| format!("in {}", path.display()))?;
            sector += count;
        }
        Ok(())
    }
}

/// The moments between `earliest` and `latest` at which a sector with these writes may have held `content`. Zeroes may
/// stem from several writes: the hull of their moments is taken.
fn moments(
    all: &[Write],
    writes: &[usize],
    content: Content,
    earliest: u64,
    latest: u64,
) -> Option<(u64, u64)> {
    let fits = |index: Option<usize>| match (index, content) {
        (_, Content::Foreign) => false,
        (None, Content::Zero) => true,
        (None, Content::Written(_)) => false,
        (Some(index), Content::Zero) => all[index].zero,
        (Some(index), Content::Written(generation)) => !all[index].zero && index + 1 == generation as usize,
    };
    let mut hull: Option<(u64, u64)> = None;
    // From a write's begin, until the next one's end.
    for place in 0..=writes.len() {
        let index = place.checked_sub(1).map(|p| writes[p]);
        if !fits(index) {
            continue;
        }
        let from = index.map_or(0, |i| all[i].began).max(earliest);
        let until = writes.get(place).map_or(u64::MAX, |i| all[*i].ended).min(latest);
        if from <= until {
            hull = Some(hull.map_or((from, until), |(a, b)| (a.min(from), b.max(until))));
        }
    }
    hull
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sector_of(sector: u64, generation: u32) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR];
        stamp(&mut bytes, sector, generation);
        bytes
    }

    fn now(model: &Model, sector: u64) -> Vec<u32> {
        let mut snapshot = Vec::new();
        model.snapshot(sector, 1, &mut snapshot);
        snapshot
    }

    #[test]
    fn a_lost_write_is_found() {
        let mut model = Model::new(8);
        let first = model.begin_write(3, 1);
        model.acknowledge(3, 1);
        let second = model.begin_write(3, 1);
        model.acknowledge(3, 1);
        let snapshot = now(&model, 3);
        assert!(model.check_read(3, &sector_of(3, second), &snapshot).is_ok());
        assert!(model.check_read(3, &sector_of(3, first), &snapshot).is_err());
        assert!(model.check_read(3, &[0; SECTOR], &snapshot).is_err());
        assert!(model.check_read(3, &sector_of(4, second), &snapshot).is_err());
    }

    #[test]
    fn a_write_in_flight_may_be_seen_or_not() {
        let mut model = Model::new(8);
        let first = model.begin_write(0, 1);
        model.acknowledge(0, 1);
        let second = model.begin_write(0, 1);
        let snapshot = now(&model, 0);
        assert!(model.check_read(0, &sector_of(0, first), &snapshot).is_ok());
        assert!(model.check_read(0, &sector_of(0, second), &snapshot).is_ok());
        assert!(model.check_read(0, &[0; SECTOR], &snapshot).is_err());
        let mut torn = sector_of(0, first);
        torn[256..].copy_from_slice(&sector_of(0, second)[256..]);
        assert!(model.check_read(0, &torn, &snapshot).is_ok(), "the read overlaps the write");
        let mut foreign = torn.clone();
        foreign[64..].copy_from_slice(&sector_of(1, second)[64..]);
        assert!(model.check_read(0, &foreign, &snapshot).is_err());
        model.acknowledge(0, 1);
        assert!(
            model.check_read(0, &torn, &snapshot).is_ok(),
            "it may have been read before the write was done"
        );
        assert!(model.check_read(0, &torn, &now(&model, 0)).is_err(), "a write that is done is whole");
    }

    #[test]
    fn a_read_that_began_before_a_write_may_see_either() {
        let mut model = Model::new(8);
        let snapshot = now(&model, 0);
        let generation = model.begin_zero(0, 1);
        model.acknowledge(0, 1);
        let next = model.begin_write(0, 1);
        assert!(next > generation);
        model.acknowledge(0, 1);
        assert!(model.check_read(0, &[0; SECTOR], &snapshot).is_ok());
        assert!(model.check_read(0, &sector_of(0, next), &snapshot).is_ok());
        assert!(model.check_read(0, &[0; SECTOR], &now(&model, 0)).is_err());
    }
}
