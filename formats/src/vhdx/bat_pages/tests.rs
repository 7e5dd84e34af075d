//! What is in memory, and what readers see of it, while pages come and go.

use std::collections::BTreeSet;
use std::thread::yield_now;

use super::*;
use crate::ErrorKind;

/// Entry `index` of a page in its version `version`: no other entry is ever the same.
fn raw(page: u64, index: usize, version: u64) -> u64 {
    version << 32 | page << 16 | index as u64
}

fn first(page: u64) -> Entries {
    std::array::from_fn(|i| raw(page, i, 0))
}

fn never() -> Result<Entries, ImageError> {
    panic!("it is in memory")
}

/// As good as any for choosing what to do next (xorshift).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self((seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }
}

/// The table in the file. A page is written and read in two halves, between which anything may happen.
struct File(Vec<[Mutex<[u64; 256]>; 2]>);

impl File {
    fn new(pages: u64) -> Self {
        let half = |page, half: usize| std::array::from_fn(|i| raw(page, half * 256 + i, 0));
        Self((0..pages).map(|page| [0, 1].map(|n| Mutex::new(half(page, n)))).collect())
    }

    fn half(&self, page: u64, half: usize) -> MutexGuard<'_, [u64; 256]> {
        self.0[page as usize][half].lock().expect("no test panics while it holds a half")
    }

    fn read(&self, page: u64, meanwhile: impl Fn()) -> Entries {
        let mut entries = [0; 512];
        entries[..256].copy_from_slice(&*self.half(page, 0));
        meanwhile();
        entries[256..].copy_from_slice(&*self.half(page, 1));
        entries
    }

    fn write(&self, page: u64, entries: &Entries, meanwhile: impl Fn()) {
        self.half(page, 0).copy_from_slice(&entries[..256]);
        meanwhile();
        self.half(page, 1).copy_from_slice(&entries[256..]);
    }
}

#[test]
fn a_small_table_stays_as_a_whole_and_is_read_once() {
    let pages = Pages::new(20, 20);
    for round in 0..3 {
        for page in 0..20 {
            assert_eq!(pages.find(page, 7).is_some(), round > 0);
            let read = || if round == 0 { Ok(first(page)) } else { never() };
            assert_eq!(pages.entry(page, 7, &read).expect("it can be read"), raw(page, 7, 0));
        }
    }
    assert_eq!(pages.count(), (20, 0));
}

#[test]
fn no_more_pages_stay_than_the_limit_but_for_those_that_are_pinned() {
    let pages = Pages::new(100, 4);
    for page in 0..50 {
        pages.entry(page, 0, &|| Ok(first(page))).expect("it can be read");
    }
    assert_eq!(pages.count(), (4, 0));
    for page in 0..10 {
        pages.pin(page, &|| Ok(first(page))).expect("it can be read");
        pages.store(page, 1, raw(page, 1, 1));
    }
    for page in 10..50 {
        pages.entry(page, 0, &|| Ok(first(page))).expect("it can be read");
    }
    let (all, pinned) = pages.count();
    assert!(pinned == 10 && (10..=11).contains(&all), "{all} pages");
    (0..10).for_each(|page| assert_eq!(pages.find(page, 1), Some(raw(page, 1, 1))));
    pages.release(0..10);
    assert_eq!(pages.count(), (4, 0));
}

/// Else a reader that was away for long could take what another page had in the frame for an entry of its own.
#[test]
fn a_page_that_comes_back_to_its_frame_begins_another_stay() {
    let (pages, mut stays) = (Pages::new(2, 1), BTreeSet::new());
    for round in 0..10 {
        pages.entry(round % 2, 0, &|| Ok(first(round % 2))).expect("it can be read");
        let stay = pages.stays[(round % 2) as usize].load(Ordering::Relaxed);
        assert!(frame_of(stay) == 0 && stays.insert(stay), "stay {stay:#x}");
        assert_eq!(pages.stays[1 - (round % 2) as usize].load(Ordering::Relaxed), 0);
    }
}

#[test]
fn a_page_that_is_read_again_and_again_stays() {
    let pages = Pages::new(1000, 8);
    pages.entry(3, 0, &|| Ok(first(3))).expect("it can be read");
    for page in 100..300 {
        assert!(pages.find(3, 5).is_some(), "before page {page}");
        pages.entry(page, 0, &|| Ok(first(page))).expect("it can be read");
    }
}

#[test]
fn a_page_that_cannot_be_read_leaves_everything_as_it_was() {
    let pages = Pages::new(10, 2);
    let fails = || Err(ImageError::new(ErrorKind::Io, "the disk is gone"));
    pages.entry(1, 0, &|| Ok(first(1))).expect("it can be read");
    assert!(pages.entry(2, 0, &fails).is_err() && pages.pin(3, &fails).is_err());
    assert_eq!((pages.count(), pages.find(1, 9)), ((1, 0), Some(raw(1, 9, 0))));
    pages.entry(2, 0, &|| Ok(first(2))).expect("it can be read");
}

/// What was read from the file before a change that meanwhile was made, applied and forgotten is not taken for the page.
#[test]
fn what_was_read_before_a_change_is_not_kept_after_it() {
    let pages = Pages::new(10, 1);
    let reads = AtomicU64::new(0);
    let read = || {
        if reads.fetch_add(1, Ordering::Relaxed) > 0 {
            let mut entries = first(0);
            entries[4] = raw(0, 4, 1);
            return Ok(entries);
        }
        pages.pin(0, &|| Ok(first(0)))?;
        pages.store(0, 4, raw(0, 4, 1));
        pages.release([0]);
        pages.entry(1, 0, &|| Ok(first(1)))?;
        assert_eq!(pages.find(0, 4), None, "it was given up");
        Ok(first(0))
    };
    assert_eq!(pages.entry(0, 4, &read).expect("it can be read"), raw(0, 4, 1));
    assert_eq!(reads.load(Ordering::Relaxed), 2);
}

/// Changes as the log makes them, compared with a plain table.
fn random_life(seed: u64, count: u64, pages_max: usize) {
    let mut random = Random::new(seed);
    let (pages, file) = (Pages::new(count, pages_max), File::new(count));
    let mut table: Vec<Entries> = (0..count).map(first).collect();
    let mut dirty = BTreeSet::new();
    for version in 1..4000 {
        let (page, index) = (random.below(count), random.below(512) as usize);
        match random.below(20) {
            0..12 => {
                let entry = pages
                    .find(page, index)
                    .map_or_else(|| pages.entry(page, index, &|| Ok(file.read(page, || ()))), Ok);
                assert_eq!(entry.expect("it can be read"), table[page as usize][index], "seed {seed}");
            }
            12 => {
                let read = || Err(ImageError::new(ErrorKind::Io, "not now"));
                if pages.pin(page, &read).is_ok() && !dirty.contains(&page) {
                    pages.release([page]);
                }
            }
            13 => {
                // Not written to the log after all.
                pages.pin(page, &|| Ok(file.read(page, || ()))).expect("it can be read");
                pages.release(Some(page).filter(|page| !dirty.contains(page)));
            }
            14..18 => {
                pages.pin(page, &|| Ok(file.read(page, || ()))).expect("it can be read");
                assert_eq!(pages.pinned(page), table[page as usize], "seed {seed}");
                table[page as usize][index] = raw(page, index, version);
                dirty.insert(page);
                pages.store(page, index, raw(page, index, version));
            }
            18 => {
                let some: Vec<u64> = dirty.iter().copied().filter(|_| random.below(3) > 0).collect();
                for page in &some {
                    file.write(*page, &pages.pinned(*page), || ());
                    dirty.remove(page);
                }
                pages.release(some);
            }
            _ => {
                let (all, pinned) = pages.count();
                assert!(pinned == dirty.len() && all <= pages_max.max(pinned + 1), "{all}, {pinned} pinned");
            }
        }
    }
}

#[test]
fn random_lives_agree_with_a_plain_table() {
    for seed in 0..40 {
        for (count, pages_max) in [(40, 1), (40, 3), (60, 16), (8, 8), (300, 7)] {
            random_life(seed, count, pages_max);
        }
    }
}

/// The versions of entries that are done, and those that are begun, by page and index.
struct Versions([Vec<[AtomicU64; 512]>; 2]);

impl Versions {
    fn new(count: u64) -> Self {
        Self([0, 1].map(|_| (0..count).map(|_| std::array::from_fn(|_| AtomicU64::new(0))).collect()))
    }

    fn of(&self, kind: usize, page: u64, index: usize) -> &AtomicU64 {
        &self.0[kind][page as usize][index]
    }
}

const DONE: usize = 0;
const BEGUN: usize = 1;
/// Entries of a page that are looked at: some in each half.
const LOOKED_AT: [usize; 4] = [0, 100, 300, 511];

/// What threads that race share.
struct Race {
    count: u64,
    pages: Pages,
    file: File,
    versions: Versions,
    seen: AtomicU64,
    ended: AtomicBool,
}

/// Whoever ends, or panics, ends the race.
struct EndsAll<'a>(&'a AtomicBool);

impl Drop for EndsAll<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn read_all_the_time(seed: u64, race: &Race) {
    let Race { count, pages, file, versions, seen, ended } = race;
    let _all = EndsAll(ended);
    let mut random = Random::new(seed);
    let mut last = vec![[0; 4]; *count as usize];
    while !ended.load(Ordering::Relaxed) {
        let (page, n) = (random.below(*count), random.below(4) as usize);
        let (index, slow) = (LOOKED_AT[n], random.below(4) == 0);
        let done = versions.of(DONE, page, index).load(Ordering::Acquire);
        let read = || {
            Ok(file.read(page, || {
                if slow {
                    yield_now()
                }
            }))
        };
        let entry = pages.find(page, index).map_or_else(|| pages.entry(page, index, &read), Ok);
        let entry = entry.expect("it can be read");
        let begun = versions.of(BEGUN, page, index).load(Ordering::Acquire);
        let version = entry >> 32;
        assert_eq!(entry, raw(page, index, version), "an entry of its own");
        assert!((done..=begun).contains(&version), "{version} is none of {done}..={begun}");
        let last = &mut last[page as usize][n];
        assert!(version >= *last, "{version} after {last}");
        *last = version;
        if random.below(100) == 0 {
            seen.fetch_add(100, Ordering::Relaxed);
            yield_now();
        }
    }
}

/// How many changes it made.
fn change_all_the_time(seed: u64, race: &Race) -> u64 {
    let Race { count, pages, file, versions, seen, ended } = race;
    let _all = EndsAll(ended);
    let mut random = Random::new(seed);
    let mut dirty = BTreeSet::new();
    let (mut version, mut rounds) = (0, 0);
    while (rounds < 300 || seen.load(Ordering::Relaxed) < 5000) && !ended.load(Ordering::Relaxed) {
        for _ in 0..=random.below(6) {
            let (page, index) = (random.below(*count), LOOKED_AT[random.below(4) as usize]);
            pages.pin(page, &|| Ok(file.read(page, yield_now))).expect("it can be read");
            version += 1;
            versions.of(BEGUN, page, index).store(version, Ordering::Release);
            pages.store(page, index, raw(page, index, version));
            versions.of(DONE, page, index).store(version, Ordering::Release);
            dirty.insert(page);
        }
        if random.below(3) > 0 {
            dirty.iter().for_each(|page| file.write(*page, &pages.pinned(*page), yield_now));
            pages.release(std::mem::take(&mut dirty));
        }
        rounds += 1;
    }
    version
}

fn race(seed: u64, count: u64, pages_max: usize) {
    let race = &Race {
        count,
        pages: Pages::new(count, pages_max),
        file: File::new(count),
        versions: Versions::new(count),
        seen: AtomicU64::new(0),
        ended: AtomicBool::new(false),
    };
    std::thread::scope(|scope| {
        let readers = [1, 2, 3].map(|n| scope.spawn(move || read_all_the_time(seed << 8 | n, race)));
        let version = scope.spawn(move || change_all_the_time(seed, race)).join();
        readers.into_iter().for_each(|reader| reader.join().expect("a reader found nothing wrong"));
        let (version, seen) = (version.expect("all pages stayed"), race.seen.load(Ordering::Relaxed));
        println!("seed {seed}: {count} pages, {pages_max} in memory: {version} changes, {seen} entries read");
    });
}

#[test]
fn readers_see_what_was_done_and_nothing_older_while_pages_come_and_go() {
    for seed in 0..6 {
        for (count, pages_max) in [(3, 1), (12, 4), (64, 8)] {
            race(seed, count, pages_max);
        }
    }
}
