//! The whole against a flat model, with threads, and with a process that dies at every point.
#![allow(clippy::single_range_in_vec_init, reason = "lists of one range are what is meant")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::*;
use crate::Storage;

const BOOT: Uuid = Uuid::from_u128(0xb007);
const IMAGE: [u8; 16] = [7; 16];

/// A file in memory, sparse by pages of 4096 bytes, that remembers its changes and fails when told to.
#[derive(Debug, Default)]
struct Memory {
    inner: Mutex<Inner>,
    failing: AtomicBool,
}

#[derive(Debug, Default, Clone)]
struct Inner {
    pages: BTreeMap<u64, Vec<u8>>,
    len: u64,
    changes: Vec<Change>,
}

#[derive(Debug, Clone)]
enum Change {
    Write(u64, Vec<u8>),
    SetLen(u64),
}

impl Memory {
    fn of(bytes: &[u8]) -> Arc<Self> {
        let memory = Self::default();
        memory.write_at(bytes, 0).expect("memory takes all");
        Arc::new(memory)
    }

    fn changes(&self) -> Vec<Change> {
        self.inner.lock().expect("no panic").changes.clone()
    }

    fn apply(&self, change: &Change) {
        match change {
            Change::Write(at, bytes) => self.write_at(bytes, *at),
            Change::SetLen(len) => self.set_len(*len),
        }
        .expect("memory takes all");
    }

    fn check(&self) -> io::Result<()> {
        let failing = self.failing.load(Ordering::Relaxed);
        if failing { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl Storage for Memory {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let inner = self.inner.lock().expect("no panic");
        if offset + buf.len() as u64 > inner.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let from = (at % 4096) as usize;
            let n = (4096 - from).min(buf.len() - done);
            match inner.pages.get(&(at / 4096)) {
                Some(page) => buf[done..done + n].copy_from_slice(&page[from..from + n]),
                None => buf[done..done + n].fill(0),
            }
            done += n;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.check()?;
        let mut inner = self.inner.lock().expect("no panic");
        inner.changes.push(Change::Write(offset, buf.to_vec()));
        inner.len = inner.len.max(offset + buf.len() as u64);
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let from = (at % 4096) as usize;
            let n = (4096 - from).min(buf.len() - done);
            let page = inner.pages.entry(at / 4096).or_insert_with(|| vec![0; 4096]);
            page[from..from + n].copy_from_slice(&buf[done..done + n]);
            done += n;
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.inner.lock().expect("no panic").len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check()?;
        assert_eq!(len % 4096, 0, "this file is cut at pages only");
        let mut inner = self.inner.lock().expect("no panic");
        inner.changes.push(Change::SetLen(len));
        inner.pages.split_off(&(len / 4096));
        inner.len = len;
        Ok(())
    }

    fn punch(&self, _: u64, _: u64) -> io::Result<()> {
        unreachable!("notes punch nothing")
    }

    fn sync(&self) -> io::Result<()> {
        unreachable!("notes are never synced")
    }

    fn next_data(&self, _: u64) -> io::Result<Option<(u64, u64)>> {
        unreachable!("notes look for no holes")
    }

    fn file(&self) -> Option<&File> {
        None
    }
}

/// xorshift64*: the same numbers from the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % n
    }

    /// Mostly short, sometimes over several pages.
    fn range(&mut self, sectors: u64) -> Range<u64> {
        let longest = match self.below(10) {
            0 => 3 * PAGE_SECTORS,
            1..4 => 200,
            _ => 16,
        };
        let first = self.below(sectors);
        first..sectors.min(first + 1 + self.below(longest))
    }
}

fn own_with(sectors: u64, pages_max: usize, storage: &Arc<Memory>) -> OwnSectors {
    let notes = NotesFile { storage: storage.clone(), boot_id: BOOT };
    OwnSectors::new(sectors, pages_max, Some((notes, IMAGE))).expect("memory can be read")
}

fn recovered(sectors: u64, storage: &Arc<Memory>) -> BTreeSet<u64> {
    let ranges = own_with(sectors, 8, storage).recovered();
    assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start), "sorted and disjoint: {ranges:?}");
    ranges.into_iter().flatten().collect()
}

fn nothing(_: u64, _: &mut PageBits) -> Result<(), ImageError> {
    Ok(())
}

/// What a codec and its image know, sector by sector.
struct Model {
    random: Random,
    own: OwnSectors,
    storage: Arc<Memory>,
    sectors: u64,
    /// What readers are to see.
    is_own: Vec<bool>,
    /// What the metadata has.
    meta: Vec<bool>,
    /// When a sector became pending; `None` where it is not, or when its payload is durable.
    since: Vec<Option<u64>>,
    clock: u64,
    /// Token → when its sync began.
    syncs: BTreeMap<u64, u64>,
    taken: Vec<Vec<Range<u64>>>,
    given_back: BTreeSet<u64>,
}

impl Model {
    fn new(seed: u64, sectors: u64) -> Self {
        let storage = Arc::new(Memory::default());
        let len = sectors as usize;
        Self {
            random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            own: own_with(sectors, 8, &storage),
            storage,
            sectors,
            is_own: vec![false; len],
            meta: vec![false; len],
            since: vec![None; len],
            clock: 0,
            syncs: BTreeMap::new(),
            taken: Vec::new(),
            given_back: BTreeSet::new(),
        }
    }

    fn load(&self) -> impl Fn(u64, &mut PageBits) -> Result<(), ImageError> + '_ {
        |page, bits| {
            let first = page * PAGE_SECTORS;
            for sector in first..self.sectors.min(first + PAGE_SECTORS) {
                bits[word_of(sector)] |= u64::from(self.meta[sector as usize]) << (sector % 64);
            }
            Ok(())
        }
    }

    fn step(&mut self) {
        self.clock += 1;
        match self.random.below(20) {
            0..8 => self.write(),
            8..10 => self.begin(),
            10..12 => self.take(),
            12..14 => self.settle(),
            14 => self.clear(),
            _ => self.look(),
        }
        let pending = (0..self.sectors as usize).any(|s| self.is_own[s] && !self.meta[s]);
        assert!(!pending || self.own.has_pending(), "what is not recorded is pending");
    }

    fn write(&mut self) {
        let range = self.random.range(self.sectors);
        let before = range.clone().all(|s| self.is_own[s as usize]);
        let wrote =
            self.own.wrote(range.start, range.end - range.start, &self.load()).expect("the load works");
        assert!(
            matches!((before, &wrote), (true, Wrote::Already) | (false, Wrote::Noted)),
            "{before} {wrote:?}"
        );
        for sector in range.map(|s| s as usize).filter(|_| !before) {
            if !self.is_own[sector] {
                self.since[sector] = Some(self.clock);
                self.is_own[sector] = true;
            }
        }
    }

    fn begin(&mut self) {
        // Tokens need not rise.
        let token = self.clock ^ 0x55;
        self.own.begin(token);
        self.syncs.insert(token, self.clock);
    }

    fn take(&mut self) {
        let known: Vec<u64> = self.syncs.keys().copied().collect();
        if known.is_empty() {
            return;
        }
        let token = known[self.random.below(known.len() as u64) as usize];
        let began = self.syncs.remove(&token).expect("it is known");
        let mut ranges = self.own.take_some(token, 3);
        while let Some(last) = ranges.last().filter(|_| self.random.below(2) == 0) {
            let more = self.own.take_some(token, 5);
            let Some(next) = more.first() else { break };
            assert!(last.end <= next.start, "parts in order");
            ranges.extend(more);
        }
        ranges.extend(self.own.take(token));
        assert!(
            ranges.windows(2).all(|pair| pair[0].end <= pair[1].start),
            "sorted and disjoint: {ranges:?}"
        );
        let list: BTreeSet<u64> = ranges.iter().cloned().flatten().collect();
        for sector in 0..self.sectors {
            let since = self.since[sector as usize];
            let back = self.given_back.contains(&sector);
            if back || since.is_some_and(|since| since < began) {
                assert!(list.contains(&sector), "sector {sector} is durable, and was not taken");
            } else if since.is_some() {
                assert!(!list.contains(&sector), "sector {sector} was taken before it is durable");
            }
        }
        for sector in list {
            self.since[sector as usize] = None;
            self.given_back.remove(&sector);
        }
        self.taken.push(ranges);
    }

    fn settle(&mut self) {
        for ranges in std::mem::take(&mut self.taken) {
            if self.random.below(4) == 0 {
                self.own.give_back(&ranges);
                self.given_back.extend(ranges.into_iter().flatten());
            } else {
                for sector in ranges.iter().cloned().flatten() {
                    self.meta[sector as usize] = true;
                    self.given_back.remove(&sector);
                }
                self.own.recorded(&ranges);
            }
        }
    }

    fn clear(&mut self) {
        // As the codecs do it: what was taken is dealt with before anything else happens to its block.
        self.settle();
        let range = self.random.range(self.sectors);
        for sector in range.clone() {
            self.meta[sector as usize] = false;
            self.is_own[sector as usize] = false;
            self.since[sector as usize] = None;
            self.given_back.remove(&sector);
        }
        self.own.clear(range.start, range.end - range.start);
    }

    fn look(&mut self) {
        let range = self.random.range(self.sectors);
        let mut seen = Vec::new();
        let mut last = None;
        let each = &mut |len: u64, own: bool| {
            assert!(len > 0 && last != Some(own), "runs are as long as can be");
            last = Some(own);
            seen.extend(std::iter::repeat_n(own, len as usize));
        };
        self.own.runs(range.start, range.end - range.start, &self.load(), each).expect("the load works");
        assert_eq!(seen, self.is_own[range.start as usize..range.end as usize], "{range:?}");
    }

    /// What a recovery must bring: own, and not in the metadata.
    fn needed(&self) -> BTreeSet<u64> {
        (0..self.sectors).filter(|s| self.is_own[*s as usize] && !self.meta[*s as usize]).collect()
    }

    /// What it may bring: to record a sector again does no harm.
    fn allowed(&self) -> BTreeSet<u64> {
        (0..self.sectors).filter(|s| self.is_own[*s as usize]).collect()
    }
}

#[test]
fn random_histories_read_as_a_flat_model_while_pages_come_and_go() {
    for seed in 1..17 {
        let mut model = Model::new(seed, 37 * PAGE_SECTORS + 123);
        for _ in 0..400 {
            model.step();
        }
        let recovered = recovered(model.sectors, &model.storage);
        assert!(model.needed().is_subset(&recovered) && recovered.is_subset(&model.allowed()), "seed {seed}");
    }
}

#[test]
fn a_process_killed_after_any_write_of_its_notes_loses_none_and_brings_back_none() {
    for seed in 1..7 {
        let mut model = Model::new(seed, 3 * PAGE_SECTORS + 5);
        let killed = Arc::new(Memory::default());
        let mut replayed = 0;
        for _ in 0..200 {
            let (needed, allowed) = (model.needed(), model.allowed());
            model.step();
            let changes = model.storage.changes();
            for change in &changes[replayed..] {
                killed.apply(change);
                let found = recovered(model.sectors, &killed);
                let needed: BTreeSet<u64> = needed.intersection(&model.needed()).copied().collect();
                assert!(needed.is_subset(&found), "seed {seed}: lost {:?}", needed.difference(&found).next());
                let allowed: BTreeSet<u64> = allowed.union(&model.allowed()).copied().collect();
                assert!(
                    found.is_subset(&allowed),
                    "seed {seed}: back {:?}",
                    found.difference(&allowed).next()
                );
            }
            replayed = changes.len();
            let found = recovered(model.sectors, &killed);
            assert!(model.needed().is_subset(&found) && found.is_subset(&model.allowed()), "seed {seed}");
        }
    }
}

/// An image that threads share: metadata under a lock, and what readers are to see of each block.
struct Shared {
    own: OwnSectors,
    meta: Vec<AtomicU64>,
    codec: Mutex<()>,
    /// Rises before and after each change of a block by its writer, so that it is odd meanwhile.
    versions: Vec<AtomicU64>,
    expected: Vec<AtomicU64>,
    ended: AtomicBool,
}

const BLOCK_WORDS: usize = 32;

impl Shared {
    fn load(&self, locked: bool) -> impl Fn(u64, &mut PageBits) -> Result<(), ImageError> + '_ {
        move |page, bits| {
            let _codec = locked.then(|| self.codec.lock().expect("no panic"));
            for (word, meta) in bits.iter_mut().zip(&self.meta[page as usize * 64..]) {
                *word = meta.load(Ordering::SeqCst);
            }
            Ok(())
        }
    }

    /// Changes blocks of its own (every other one): more and more of them own, then all of a block cleared.
    fn write(&self, which: usize, locked: bool) {
        let mut random = Random(which as u64 + 77);
        let load = self.load(locked);
        while !self.ended.load(Ordering::Relaxed) {
            let block = random.below(self.versions.len() as u64 / 2) as usize * 2 + which;
            let first = (block * BLOCK_WORDS * 64) as u64;
            let words = block * BLOCK_WORDS..(block + 1) * BLOCK_WORDS;
            self.versions[block].fetch_add(1, Ordering::SeqCst);
            if random.below(40) == 0 {
                let _codec = self.codec.lock().expect("no panic");
                words.for_each(|w| {
                    self.meta[w].store(0, Ordering::SeqCst);
                    self.expected[w].store(0, Ordering::SeqCst);
                });
                self.own.clear(first, (BLOCK_WORDS * 64) as u64);
            } else {
                let at = random.below((BLOCK_WORDS * 64 - 64) as u64);
                let range = first + at..first + at + 1 + random.below(64);
                let wrote = self.own.wrote(range.start, range.end - range.start, &load).expect("it loads");
                assert!(matches!(wrote, Wrote::Already | Wrote::Noted), "{wrote:?}");
                range.for_each(|s| {
                    self.expected[(s / 64) as usize].fetch_or(1 << (s % 64), Ordering::SeqCst);
                });
            }
            self.versions[block].fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Returns how many times it could tell.
    fn read(&self, seed: u64, locked: bool) -> u64 {
        let mut random = Random(seed);
        let load = self.load(locked);
        let mut told = 0;
        while !self.ended.load(Ordering::Relaxed) {
            let word = random.below(self.expected.len() as u64) as usize;
            let version = &self.versions[word / BLOCK_WORDS];
            let before = version.load(Ordering::SeqCst);
            let expected = self.expected[word].load(Ordering::SeqCst);
            let (mut seen, mut at) = (0u64, 0);
            let each = &mut |len: u64, own: bool| {
                seen |= if own { (u64::MAX >> (64 - len)) << at } else { 0 };
                at += len;
            };
            self.own.runs(word as u64 * 64, 64, &load, each).expect("it loads");
            if before.is_multiple_of(2) && version.load(Ordering::SeqCst) == before {
                assert_eq!(seen, expected, "word {word}");
                told += 1;
            }
        }
        told
    }

    fn record(&self) -> u64 {
        let mut random = Random(99);
        let mut token = 0;
        while !self.ended.load(Ordering::Relaxed) {
            token += 1;
            self.own.begin(token);
            let _codec = self.codec.lock().expect("no panic");
            let ranges = self.own.take(token);
            if random.below(4) == 0 {
                self.own.give_back(&ranges);
                continue;
            }
            for sector in ranges.iter().cloned().flatten() {
                self.meta[(sector / 64) as usize].fetch_or(1 << (sector % 64), Ordering::SeqCst);
            }
            self.own.recorded(&ranges);
        }
        token
    }
}

fn share_among_threads(locked: bool) {
    let pages = 64;
    let storage = Arc::new(Memory::default());
    let words = || (0..pages * 64).map(|_| AtomicU64::new(0)).collect();
    let shared = Shared {
        own: own_with(pages as u64 * PAGE_SECTORS, 16, &storage),
        meta: words(),
        codec: Mutex::new(()),
        versions: (0..pages * 64 / BLOCK_WORDS).map(|_| AtomicU64::new(0)).collect(),
        expected: words(),
        ended: AtomicBool::new(false),
    };
    let (told, syncs) = std::thread::scope(|scope| {
        let shared = &shared;
        let readers = [5, 6].map(|seed| scope.spawn(move || shared.read(seed, locked)));
        let writers = [0, 1].map(|which| scope.spawn(move || shared.write(which, locked)));
        let recorder = scope.spawn(|| shared.record());
        let until = Instant::now() + Duration::from_millis(1500);
        while Instant::now() < until && !writers.iter().any(|w| w.is_finished()) {
            std::thread::sleep(Duration::from_millis(10));
            // The file remembers its changes, which is not asked for here.
            storage.inner.lock().expect("no panic").changes.clear();
        }
        shared.ended.store(true, Ordering::Relaxed);
        writers.into_iter().for_each(|w| w.join().expect("a writer found nothing wrong"));
        let told: u64 = readers.into_iter().map(|r| r.join().expect("a reader found nothing wrong")).sum();
        (told, recorder.join().expect("the recorder found nothing wrong"))
    });
    println!("{told} reads, {syncs} syncs");
    assert!(told > 1000 && syncs > 10, "{told} reads, {syncs} syncs");
    let found = recovered(shared.own.sectors, &storage);
    for sector in 0..shared.own.sectors {
        let bit =
            |words: &[AtomicU64]| words[(sector / 64) as usize].load(Ordering::SeqCst) >> (sector % 64) & 1;
        let (own, meta) = (bit(&shared.expected), bit(&shared.meta));
        assert!(own == 0 || meta == 1 || found.contains(&sector), "sector {sector} is lost");
        assert!(own == 1 || !found.contains(&sector), "sector {sector} is back");
    }
}

#[test]
fn what_was_written_is_own_to_every_thread_until_it_is_cleared() {
    share_among_threads(false);
}

#[test]
fn loads_may_take_the_lock_under_which_sectors_are_recorded() {
    share_among_threads(true);
}

#[test]
fn notes_of_another_boot_image_or_size_are_ignored_and_overwritten() {
    let storage = Arc::new(Memory::default());
    let own = own_with(5000, 8, &storage);
    own.wrote(10, 5, &nothing).expect("it loads");
    assert_eq!(recovered(5000, &storage), (10..15).collect());
    let others = [(Uuid::from_u128(1), IMAGE, 5000), (BOOT, [8; 16], 5000), (BOOT, IMAGE, 5001)];
    for (boot_id, image, sectors) in others {
        let copy = Arc::new(Memory {
            inner: Mutex::new(storage.inner.lock().expect("no panic").clone()),
            ..Memory::default()
        });
        let notes = NotesFile { storage: copy.clone(), boot_id };
        let own = OwnSectors::new(sectors, 8, Some((notes, image))).expect("it is read");
        assert!(own.recovered().is_empty() && !own.has_pending());
        own.wrote(100, 1, &nothing).expect("it loads");
        assert!(recovered(5000, &copy).is_empty(), "the old notes are gone");
        let notes = NotesFile { storage: copy, boot_id };
        let own = OwnSectors::new(sectors, 8, Some((notes, image))).expect("it is read");
        assert_eq!(own.recovered(), [100..101]);
    }
}

#[test]
fn garbage_in_the_notes_file_brings_nothing_and_breaks_nothing() {
    let storage = Arc::new(Memory::default());
    let own = own_with(9000, 8, &storage);
    for i in 0..50 {
        own.wrote(i * 100, 7, &nothing).expect("it loads");
    }
    let noted: BTreeSet<u64> = (0..50).flat_map(|i| i * 100..i * 100 + 7).collect();
    let mut bytes = vec![0; storage.len().expect("memory") as usize];
    storage.read_at(&mut bytes, 0).expect("memory");
    let mut random = Random(4711);
    for _ in 0..300 {
        let mut bad = bytes.clone();
        for _ in 0..1 + random.below(20) {
            let at = random.below(bad.len() as u64) as usize;
            bad[at] = random.below(256) as u8;
        }
        bad.truncate(bytes.len() - random.below(3000) as usize);
        assert!(recovered(9000, &Memory::of(&bad)).is_subset(&noted));
    }
    for len in [0, 1, 71, 72, 511, 583, 584, 4095, 4096, 5000, 100_000] {
        let garbage: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
        assert!(recovered(9000, &Memory::of(&garbage)).is_empty());
    }
}

#[test]
fn a_recovered_session_goes_on_with_its_notes_and_ends_without() {
    let storage = Arc::new(Memory::default());
    own_with(5000, 8, &storage).wrote(10, 5, &nothing).expect("it loads");
    let own = own_with(5000, 8, &storage);
    assert!(own.are_own(10, 5, &nothing).expect("it loads"));
    own.wrote(4000, 5, &nothing).expect("it loads");
    own.clear(12, 1);
    let all: Vec<Range<u64>> = vec![10..12, 13..15, 4000..4005];
    assert_eq!(own_with(5000, 8, &storage).recovered(), all);
    own.begin(3);
    assert_eq!(own.take(3), all);
    own.drop_notes().expect("memory takes all");
    assert_eq!(own_with(5000, 8, &storage).recovered(), all, "what is pending keeps its notes");
    own.recorded(&all);
    assert!(!own.has_pending() && recovered(5000, &storage).is_empty());
    own.drop_notes().expect("memory takes all");
    assert_eq!(storage.len().expect("memory"), 0);
    own.wrote(1, 1, &nothing).expect("it loads");
    assert_eq!(recovered(5000, &storage), (1..2).collect(), "a closed session may begin anew");
}

#[test]
fn recovered_sectors_may_be_recorded_without_being_taken() {
    let storage = Arc::new(Memory::default());
    own_with(5000, 8, &storage).wrote(10, 5, &nothing).expect("it loads");
    let own = own_with(5000, 8, &storage);
    own.recorded(&own.recovered());
    assert!(!own.has_pending() && recovered(5000, &storage).is_empty());
}

#[test]
fn a_sync_takes_nothing_that_was_written_after_it_began() {
    let own = OwnSectors::new(5000, 8, None).expect("there is no file");
    own.wrote(1, 1, &nothing).expect("it loads");
    own.begin(6);
    own.wrote(3, 1, &nothing).expect("it loads");
    own.begin(5);
    own.wrote(5, 1, &nothing).expect("it loads");
    assert_eq!(own.take(6), [1..2], "the order of the tokens does not matter");
    assert_eq!(own.take(7), [], "a sync that was not announced");
    assert_eq!(own.take(5), [3..4]);
    own.give_back(&[1..2, 3..4]);
    assert_eq!(own.take(7), [1..2, 3..4], "their payload is durable");
    assert!(own.has_pending());
}

#[test]
#[should_panic(expected = "two syncs in a row have the token 5")]
fn a_token_that_is_used_twice_is_found() {
    let own = OwnSectors::new(5000, 8, None).expect("there is no file");
    own.begin(5);
    own.begin(5);
}

#[test]
fn sectors_that_could_not_be_noted_are_own_and_are_told_of_to_everyone_who_writes_them() {
    let storage = Arc::new(Memory::default());
    let own = own_with(5000, 8, &storage);
    own.wrote(0, 4, &nothing).expect("it loads");
    storage.failing.store(true, Ordering::Relaxed);
    assert!(matches!(own.wrote(2, 4, &nothing), Ok(Wrote::NotNoted(_))));
    assert!(own.are_own(0, 6, &nothing).expect("it loads") && own.is_crowded());
    assert!(
        matches!(own.wrote(5, 1, &nothing), Ok(Wrote::NotNoted(_))),
        "another writer has to care as well"
    );
    storage.failing.store(false, Ordering::Relaxed);
    assert!(matches!(own.wrote(5, 1, &nothing), Ok(Wrote::Noted)));
    assert_eq!(recovered(5000, &storage), (0..4).chain(5..6).collect());
    own.begin(1);
    let taken = own.take(1);
    assert_eq!(taken, [0..6]);
    own.wrote(4000, 1, &nothing).expect("it loads");
    own.recorded(&taken);
    assert!(!own.is_crowded(), "all that is pending is noted");
    assert!(matches!(own.wrote(4000, 1, &nothing), Ok(Wrote::Already)));
    assert_eq!(recovered(5000, &storage), (4000..4001).collect());
}

#[test]
fn too_many_pending_ranges_are_refused_until_some_are_recorded() {
    let storage = Arc::new(Memory::default());
    let sectors = 4 * PENDING_MAX as u64;
    let own = own_with(sectors, 8, &storage);
    for i in 0..PENDING_MAX as u64 {
        assert_eq!(own.is_crowded(), i >= PENDING_MAX as u64 / 2);
        assert!(matches!(own.wrote(2 * i, 1, &nothing), Ok(Wrote::Noted)));
    }
    let next = 2 * PENDING_MAX as u64;
    assert!(matches!(own.wrote(next, 1, &nothing), Ok(Wrote::Crowded)));
    assert!(!own.are_own(next, 1, &nothing).expect("it loads"));
    assert_eq!(recovered(sectors, &storage).len(), PENDING_MAX);
    own.begin(1);
    let taken = own.take(1);
    assert_eq!(taken.len(), PENDING_MAX);
    own.recorded(&taken);
    assert!(!own.is_crowded());
    assert!(matches!(own.wrote(next, 1, &nothing), Ok(Wrote::Noted)));
    assert_eq!(recovered(sectors, &storage), (next..next + 1).collect());
}

#[test]
fn notes_stay_small_while_something_is_always_pending() {
    let storage = Arc::new(Memory::default());
    let sectors = 1 << 22;
    let own = own_with(sectors, 8, &storage);
    let mut random = Random(1);
    for token in 0..2000 {
        let ahead = random.below(sectors);
        own.begin(token);
        for _ in 0..100 {
            own.wrote(random.below(sectors), 1, &nothing).expect("it loads");
        }
        own.wrote(ahead, 1, &nothing).expect("it loads");
        let taken = own.take(token);
        own.recorded(&taken);
        taken.iter().for_each(|r| own.clear(r.start, r.end - r.start));
    }
    let pages = storage.inner.lock().expect("no panic").pages.len();
    println!("{pages} pages of notes after 200000 writes");
    assert!(pages < 100, "{pages} pages of notes");
}

#[test]
fn a_full_side_gives_way_to_the_other_and_nothing_is_lost() {
    // With one note first it is a clear that finds the side full, with two a write.
    for first in [10, 11] {
        let storage = Arc::new(Memory::default());
        let mut own = own_with(9000, 8, &storage);
        let mut kept = BTreeSet::new();
        let mut keep = |own: &OwnSectors, sector| {
            assert!(matches!(own.wrote(sector, 1, &nothing), Ok(Wrote::Noted)));
            kept.insert(sector);
            kept.clone()
        };
        let mut expected = (10..=first).map(|sector| keep(&own, sector)).last().expect("at least one");
        for i in 0..notes::RECORDS_MAX / 2 + 100 {
            if i % 20_000 == 9_999 {
                own = own_with(9000, 8, &storage);
                keep(&own, 8500 + i / 10_000);
                expected = keep(&own, 8600 + i / 10_000);
            }
            assert!(matches!(own.wrote(i % 8000 + 20, 3, &nothing), Ok(Wrote::Noted)));
            own.clear(i % 8000 + 20, 3);
            if i % 10_000 == 0 || (i * 2).abs_diff(notes::RECORDS_MAX) < 20 {
                assert_eq!(recovered(9000, &storage), expected, "after {i}");
            }
        }
    }
}

#[test]
fn a_load_that_fails_is_told_and_changes_nothing() {
    let own = OwnSectors::new(5000, 8, None).expect("there is no file");
    let fails = |_: u64, _: &mut PageBits| Err(ImageError::new(crate::ErrorKind::Io, "no"));
    assert!(own.runs(0, 1, &fails, &mut |_, _| {}).is_err());
    assert!(own.wrote(0, 1, &fails).is_err() && !own.has_pending());
    assert!(own.wrote(0, 1, &nothing).is_ok() && own.are_own(0, 1, &fails).expect("it is in memory"));
}

#[test]
fn what_changes_while_a_page_is_loaded_counts_more_than_the_load() {
    let own = OwnSectors::new(5000, 8, None).expect("there is no file");
    let stale = |_: u64, bits: &mut PageBits| {
        bits[0] = 0b1010;
        own.clear(1, 1);
        own.recorded(&[0..1]);
        Ok(())
    };
    for load in [&stale as Load, &nothing] {
        let mut seen = Vec::new();
        own.runs(0, 5, load, &mut |len, own| seen.push((len, own))).expect("it loads");
        assert_eq!(seen, [(1, true), (2, false), (1, true), (1, false)]);
    }
}

#[test]
fn cached_pages_are_read_in_nanoseconds() {
    let own = OwnSectors::new(1 << 30, PAGES_MAX, None).expect("there is no file");
    own.wrote(0, 1 << 20, &nothing).expect("it loads");
    let mut random = Random(5);
    let places: Vec<u64> = (0..4096).map(|_| random.below(1 << 20) & !7).collect();
    places.iter().for_each(|at| assert!(own.are_own(*at, 8, &nothing).is_ok_and(|own| own)));
    let time = |name: &str, count: u64, f: &mut dyn FnMut(u64)| {
        let start = Instant::now();
        (0..count).for_each(f);
        println!("{name}: {:.1} ns", start.elapsed().as_nanos() as f64 / count as f64);
    };
    let at = |i: u64| places[i as usize % places.len()];
    let mut total = 0;
    time("runs of 8 cached sectors", 1 << 20, &mut |i| {
        own.runs(at(i), 8, &nothing, &mut |len, own| total += len * u64::from(own)).expect("it is in memory");
    });
    assert_eq!(total, 8 << 20);
    time("runs of 2048 cached sectors", 1 << 16, &mut |i| {
        own.runs(at(i) & !2047, 2048, &nothing, &mut |len, _| total += len).expect("it is in memory");
    });
    time("wrote of 8 own sectors", 1 << 20, &mut |i| {
        assert!(matches!(own.wrote(at(i), 8, &nothing), Ok(Wrote::Already)));
    });
    let path = std::env::temp_dir().join(format!("own-notes-{}", std::process::id()));
    let file =
        File::options().read(true).write(true).create(true).truncate(true).open(&path).expect("a folder");
    let notes = NotesFile { storage: Arc::new(crate::FileStorage::new(file)), boot_id: BOOT };
    let own = OwnSectors::new(1 << 30, PAGES_MAX, Some((notes, IMAGE))).expect("an empty file");
    time("wrote of 8 new sectors, noted in a file", 50_000, &mut |i| {
        assert!(matches!(own.wrote((i * 7919 % 50_000) * 16, 8, &nothing), Ok(Wrote::Noted)));
    });
    own.begin(1);
    let start = Instant::now();
    let taken = own.take(1);
    own.recorded(&taken);
    println!("taking and recording {} ranges: {:?}", taken.len(), start.elapsed());
    std::fs::remove_file(path).expect("it is there");
}
