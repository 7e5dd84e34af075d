//! A VHDX of whose block allocation table only a few pages fit in memory: what is given up and read again is never old.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use formats::vhdx::Vhdx;
use formats::{
    ByteSpan, Chain, ErrorKind, Image, LayerOptions, NotesFile, Piece, Pieces, Place, Storage, ZeroMode,
};
use formats_tests::{CrashExplorer, CrashKind, CrashState, Fault, History, Mark, SimStorage};
use formats_tests::{read_payload, write_payload, zero_payload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[path = "vhdx_diff/mod.rs"]
mod images;
use images::{BOOT, MIB, content, create, sound};

/// Blocks whose entries are on one page of the table.
const PAGE: u64 = 512;

fn open(sim: &Arc<SimStorage>, options: &LayerOptions, pages: usize) -> Vhdx {
    let storage: Arc<dyn Storage> = sim.clone();
    Vhdx::open_bounded(storage, options, pages).unwrap()
}

fn reading() -> LayerOptions {
    LayerOptions { read_only: true, ..LayerOptions::default() }
}

// --- a flat model ----------------------------------------------------------------------------------------------------

/// A disk whose blocks hold a tag in their first sector, and what each of them is to hold.
struct Life {
    parent: Option<Arc<SimStorage>>,
    sim: Arc<SimStorage>,
    notes: Arc<SimStorage>,
    image: Option<Arc<dyn Image>>,
    tags: Vec<u8>,
    pages: usize,
    random: ChaCha8Rng,
}

impl Life {
    fn new(seed: u64, table_pages: u64, pages: usize, has_parent: bool) -> Self {
        let (mut random, size) = (ChaCha8Rng::seed_from_u64(seed), table_pages * PAGE * MIB);
        let base = create(size, 512, None);
        let mut tags = vec![0; (size / MIB) as usize];
        let parent = has_parent.then(|| {
            let image = open(&base, &LayerOptions::default(), 1);
            for _ in 0..100 {
                let block = random.random_range(0..tags.len());
                tags[block] = random.random_range(1..=255);
                write_payload(&image, block as u64 * MIB, &[tags[block]; 512]).unwrap();
            }
            image.close().unwrap();
            base.clone()
        });
        let sim = match &parent {
            Some(base) => create(size, 512, open(base, &reading(), 1).content_id()),
            None => base,
        };
        Self { parent, sim, notes: SimStorage::new(), image: None, tags, pages, random }
    }

    fn open(&self, read_only: bool) -> Arc<dyn Image> {
        let notes = NotesFile { storage: self.notes.clone(), boot_id: BOOT };
        let options =
            LayerOptions { read_only, notes: Some(notes).filter(|_| !read_only), ..LayerOptions::default() };
        let top = Arc::new(open(&self.sim, &options, self.pages));
        let Some(parent) = &self.parent else { return top };
        let parent = Arc::new(open(parent, &reading(), self.pages)) as Arc<dyn Image>;
        Arc::new(Chain::new(top, vec![parent]).unwrap())
    }

    fn image(&mut self) -> Arc<dyn Image> {
        self.image.take().unwrap_or_else(|| self.open(false))
    }

    /// A block: any, or one of a few on each page, so that they are seen again.
    fn some_block(&mut self) -> u64 {
        let block = self.random.random_range(0..self.tags.len() as u64);
        if self.random.random_ratio(3, 4) { block / 64 * 64 } else { block }
    }

    fn compare(&self, image: &dyn Image, blocks: impl Iterator<Item = u64>) {
        for block in blocks {
            let read = read_payload(image, block * MIB, 512).unwrap();
            assert_eq!(read, [self.tags[block as usize]; 512], "block {block}");
        }
    }

    /// After a failure either is there: the old content or the new. `true`: it can go on.
    fn settle(&mut self, image: &dyn Image, block: u64, tag: u8, error: ErrorKind) -> bool {
        self.sim.clear_fault();
        assert!(matches!(error, ErrorKind::NoSpace | ErrorKind::Poisoned | ErrorKind::Io), "{error:?}");
        let now = read_payload(image, block * MIB, 512).unwrap();
        let old = self.tags[block as usize];
        assert!(now == [old; 512] || now == [tag; 512] || (old == 0 && now == [0; 512]), "block {block}");
        self.tags[block as usize] = now[0];
        // A poisoned image goes on after it was opened anew.
        write_payload(image, block * MIB, &now).is_ok()
    }

    fn step(&mut self, faults: bool) {
        let image = self.image();
        let block = self.some_block();
        if faults && self.random.random_ratio(1, 8) {
            let error = [io::ErrorKind::StorageFull, io::ErrorKind::Other][self.random.random_range(0..2)];
            let after = self.random.random_range(0..6);
            self.sim.inject(Fault { after, lasting: false, error, partial: self.random.random() });
        }
        let (done, tag) = match self.random.random_range(0..40) {
            0..20 => {
                let tag = self.random.random_range(1..=255);
                (write_payload(&*image, block * MIB, &[tag; 512]), tag)
            }
            20..26 => (zero_payload(&*image, block * MIB, MIB, ZeroMode::Unmap), 0),
            26..28 => (image.commit(), self.tags[block as usize]),
            28..32 => (image.maintain(&|| ()), self.tags[block as usize]),
            32 => (image.close(), self.tags[block as usize]),
            33 => {
                // The process dies. What was noted of a child is for the next one that writes, so only that one is asked.
                self.sim.clear_fault();
                drop(image);
                if self.parent.is_none() {
                    self.compare(&*self.open(true), 0..self.tags.len() as u64);
                }
                return;
            }
            _ => {
                let blocks: Vec<u64> = (0..40).map(|_| self.some_block()).collect();
                self.compare(&*image, blocks.into_iter());
                (Ok(()), self.tags[block as usize])
            }
        };
        match done {
            Ok(()) => self.tags[block as usize] = tag,
            Err(e) => {
                if !self.settle(&*image, block, tag, e.kind) {
                    return;
                }
            }
        }
        self.image = Some(image);
    }

    fn live(mut self, steps: usize, faults: bool) {
        (0..steps).for_each(|_| self.step(faults));
        self.sim.clear_fault();
        let image = self.image();
        self.compare(&*image, 0..self.tags.len() as u64);
        image.close().unwrap();
        drop(image);
        sound(&self.sim).unwrap();
        self.compare(&*self.open(true), 0..self.tags.len() as u64);
    }
}

#[test]
fn random_lives_with_few_pages_in_memory_agree_with_a_flat_model() {
    for seed in 0..12 {
        Life::new(seed, 24, [1, 2, 5][seed as usize % 3], seed % 4 == 3).live(1500, false);
    }
}

#[test]
fn failures_of_the_storage_with_few_pages_in_memory_lose_nothing() {
    for seed in 100..112 {
        Life::new(seed, 24, [1, 3][seed as usize % 2], seed % 4 == 3).live(1500, true);
    }
}

/// More pages are changed at once than may stay: they are pinned until the log is applied.
#[test]
fn a_write_that_changes_more_pages_than_may_stay_shows_all_of_them() {
    let sim = create(64 * PAGE * MIB, 512, None);
    let image = open(&sim, &LayerOptions::default(), 1);
    for round in 1..=3u8 {
        for page in 0..64 {
            write_payload(&image, (page * PAGE + u64::from(round)) * MIB, &[round + page as u8; 512])
                .unwrap();
        }
        if round == 2 {
            image.maintain(&|| ()).unwrap();
            image.commit().unwrap();
        }
    }
    for pass in 0..2 {
        for (round, page) in (1..=3u8).flat_map(|round| (0..64).map(move |page| (round, page))) {
            let read = read_payload(&image, (page * PAGE + u64::from(round)) * MIB, 512).unwrap();
            assert_eq!(read, [round + page as u8; 512], "pass {pass}, round {round}, page {page}");
        }
        image.close().unwrap();
    }
    sound(&sim).unwrap();
}

/// A file whose next sync has something else happen first.
struct Interrupted {
    sim: Arc<SimStorage>,
    before_sync: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl std::fmt::Debug for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.sim.fmt(f)
    }
}

impl Storage for Interrupted {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.sim.read_at(buf, offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.sim.len()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.sim.next_data(offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.sim.write_at(buf, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.sim.set_len(len)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.sim.punch(offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        let first = self.before_sync.lock().unwrap().take();
        first.into_iter().for_each(|first| first());
        self.sim.sync()
    }

    fn file(&self) -> Option<&File> {
        None
    }
}

/// A page that changes again while it is written to its place is not given up: its place has the older change alone.
#[test]
fn a_page_that_changes_while_it_is_applied_stays() {
    let sim = create(4 * PAGE * MIB, 512, None);
    let storage = Arc::new(Interrupted { sim, before_sync: Mutex::new(None) });
    let image = Arc::new(Vhdx::open_bounded(storage.clone(), &LayerOptions::default(), 1).unwrap());
    for page in 0..4 {
        write_payload(&*image, page * PAGE * MIB, &[1; 512]).unwrap();
    }
    let other = image.clone();
    *storage.before_sync.lock().unwrap() = Some(Box::new(move || {
        for page in 0..4 {
            write_payload(&*other, (page * PAGE + 1) * MIB, &[2; 512]).unwrap();
        }
    }));
    for round in 0..3 {
        image.maintain(&|| ()).unwrap();
        assert!(storage.before_sync.lock().unwrap().is_none(), "a checkpoint was interrupted");
        for page in (0..4).chain(0..4) {
            for (block, tag) in [(0, 1), (1, 2)] {
                let read = read_payload(&*image, (page * PAGE + block) * MIB, 512).unwrap();
                assert_eq!(read, [tag; 512], "round {round}: block {block} of page {page}");
            }
        }
        image.commit().unwrap();
    }
    image.close().unwrap();
    sound(&storage.sim).unwrap();
}

/// More pages than there may ever be in memory are about to change, one after the other, and none of them does.
#[test]
fn changes_that_the_log_had_no_room_for_keep_no_pages_in_memory() {
    let sim = create(2500 * PAGE * MIB, 512, None);
    let image = open(&sim, &LayerOptions::default(), 1);
    write_payload(&image, 0, &[1; 512]).unwrap();
    for page in 0..2500 {
        sim.inject(Fault {
            after: 0,
            lasting: false,
            error: io::ErrorKind::StorageFull,
            partial: page % 2 == 0,
        });
        let refused = write_payload(&image, (page * PAGE + 7) * MIB, &[2; 512]).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::NoSpace, "{refused}");
        sim.clear_fault();
    }
    for page in 0..2500 {
        assert_eq!(read_payload(&image, (page * PAGE + 7) * MIB, 512).unwrap(), [0; 512]);
    }
    assert_eq!(read_payload(&image, 0, 512).unwrap(), [1; 512]);
    write_payload(&image, 2000 * PAGE * MIB, &[3; 512]).unwrap();
    image.close().unwrap();
    sound(&sim).unwrap();
}

// --- threads ---------------------------------------------------------------------------------------------------------

fn place(image: &dyn Image, block: u64) -> Place {
    let mut pieces = Pieces::new();
    image.map_read(ByteSpan::new(block * MIB, 512), &mut pieces).unwrap();
    let [Piece { place, .. }] = pieces[..] else { panic!("one piece") };
    place
}

/// Blocks get places while pages come and go: whoever learned of a place is never told anything else.
#[test]
fn threads_see_the_place_that_a_block_got_while_pages_come_and_go() {
    const PAGES: u64 = 32;
    for (seed, limit) in [(1, 1), (2, 3), (3, 8)] {
        let sim = create(PAGES * PAGE * MIB, 512, None);
        let image = &open(&sim, &LayerOptions::default(), limit);
        // Where each block is, once that is known.
        let places: &Vec<AtomicU64> = &(0..PAGES * PAGE).map(|_| AtomicU64::new(0)).collect();
        let (ended, looked) = (&AtomicBool::new(false), &AtomicU64::new(0));
        std::thread::scope(|scope| {
            let readers = [10, 11].map(|n| {
                scope.spawn(move || {
                    let mut random = ChaCha8Rng::seed_from_u64(seed << 8 | n);
                    while !ended.load(Ordering::Relaxed) {
                        let block = random.random_range(0..PAGES * PAGE) / 32 * 32;
                        let known = places[block as usize].load(Ordering::Acquire);
                        match place(image, block) {
                            Place::File { offset, .. } if known != 0 => assert_eq!(offset, known),
                            Place::File { offset, .. } => {
                                assert_eq!(
                                    places[block as usize].fetch_max(offset, Ordering::AcqRel).max(offset),
                                    offset
                                );
                            }
                            _ => assert_eq!(known, 0, "block {block} is lost"),
                        }
                        looked.fetch_add(1, Ordering::Relaxed);
                    }
                })
            });
            let writers = [20, 21].map(|n| {
                scope.spawn(move || {
                    let mut random = ChaCha8Rng::seed_from_u64(seed << 8 | n);
                    for _ in 0..1500 {
                        let block = random.random_range(0..PAGES * PAGE) / 32 * 32;
                        let mut pieces = Pieces::new();
                        image.map_write(ByteSpan::new(block * MIB, 512), &mut pieces).unwrap();
                        let Place::File { offset, .. } = pieces[0].place else { panic!("nowhere") };
                        let before = places[block as usize].fetch_max(offset, Ordering::AcqRel);
                        assert!(before == 0 || before == offset, "block {block}");
                    }
                })
            });
            let keeper = scope.spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    image.maintain(&|| ()).unwrap();
                    std::thread::yield_now();
                }
            });
            let written = writers.map(|writer| writer.join());
            ended.store(true, Ordering::Relaxed);
            written.into_iter().for_each(|done| done.unwrap());
            readers.into_iter().for_each(|reader| reader.join().unwrap());
            keeper.join().unwrap();
        });
        println!("{limit} pages in memory: {} looks", looked.load(Ordering::Relaxed));
        image.close().unwrap();
        sound(&sim).unwrap();
        let image = open(&sim, &reading(), 1);
        for (block, known) in places.iter().enumerate() {
            let offset = match place(&image, block as u64) {
                Place::File { offset, .. } => offset,
                _ => 0,
            };
            assert_eq!(offset, known.load(Ordering::Relaxed), "block {block}");
        }
    }
}

// --- crashes ---------------------------------------------------------------------------------------------------------

/// What has to hold after a crash, with one page of the table in memory throughout.
fn survive(state: &CrashState, history: &History) -> Result<(), String> {
    let (sim, sure, begun) = (&state.storage, state.sure(), state.progress.begun);
    sound(sim)?;
    history.verify(&open(sim, &reading(), 1), sure, begun).map_err(|e| format!("for reading: {e}"))?;
    let image = open(sim, &LayerOptions::default(), 1);
    history.verify(&image, sure, begun).map_err(|e| format!("for writing: {e}"))?;
    let mut later = History::new();
    for page in 0..4 {
        // Blocks that nobody has used before.
        let at = (page * PAGE + 500) * MIB;
        later.write(&image, sim, at, &content(0xe0 + page as u8, 512)).map_err(|e| e.to_string())?;
        zero_payload(&image, at, MIB, ZeroMode::Unmap).map_err(|e| e.to_string())?;
    }
    image.maintain(&|| ()).map_err(|e| e.to_string())?;
    history.verify(&image, sure, begun).map_err(|e| format!("after going on: {e}"))?;
    image.close().map_err(|e| e.to_string())?;
    sound(sim).map_err(|e| format!("after closing: {e}"))?;
    history.verify(&open(sim, &reading(), 1), sure, begun).map_err(|e| format!("after closing: {e}"))
}

fn explore(sim: &SimStorage, history: &History, name: &str, from: usize) {
    let mut kills = 0;
    let count = CrashExplorer { from, ..CrashExplorer::default() }.explore(sim, |state| {
        kills += usize::from(state.kind == CrashKind::ProcessKill);
        if let Err(why) = survive(&state, history) {
            let CrashState { after, kind, progress, kept, .. } = &state;
            panic!("{name}: {kind:?} after {after}, {progress:?}, kept {kept}: {why}");
        }
    });
    println!("{name}: {count}; {kills} process kills");
    assert!(count.states > 100);
}

/// Reads all over the disk, so that the page that may stay is another one.
fn wander(image: &dyn Image, expected: &BTreeMap<u64, Vec<u8>>) {
    for (at, data) in expected {
        assert_eq!(read_payload(image, *at, data.len()).unwrap(), *data, "at {at}");
    }
}

#[test]
fn changes_of_pages_that_come_and_go_survive_every_crash() {
    let sim = create(4 * PAGE * MIB, 512, None);
    let image = open(&sim, &LayerOptions::default(), 1);
    let (mut history, mut expected) = (History::new(), BTreeMap::new());
    let mut from = 0;
    for n in 0..24u64 {
        let (at, data) = ((n % 4 * PAGE + n / 4 * 7) * MIB, content(n as u8 + 1, 1024));
        history.write(&image, &sim, at, &data).unwrap();
        expected.insert(at, data);
        wander(&image, &expected);
        match n {
            5 | 17 => history.flush(&image, &sim).unwrap(),
            // Applied: from here on these pages may be given up.
            11 | 15 | 20 => image.maintain(&|| ()).unwrap(),
            _ => {}
        }
        if n == 9 {
            from = sim.trace_len();
        }
    }
    for page in 0..4 {
        history.zero(&image, &sim, page * PAGE * MIB, MIB, ZeroMode::Unmap).unwrap();
        expected.insert(page * PAGE * MIB, vec![0; 1024]);
        wander(&image, &expected);
    }
    image.maintain(&|| ()).unwrap();
    wander(&image, &expected);
    explore(&sim, &history, "pages that come and go", from);
}

#[test]
fn a_log_that_fills_up_with_one_page_in_memory_survives_every_crash() {
    let sim = create(4 * PAGE * MIB, 512, None);
    let image = open(&sim, &LayerOptions::default(), 1);
    let (mut history, mut expected, mut from, mut filled) = (History::new(), BTreeMap::new(), 0, 0);
    for n in 0..300u64 {
        let syncs = sim.syncs();
        let (at, data) = ((n % 4 * PAGE + n / 4 * 5) * MIB, content(n as u8, 512));
        history.write(&image, &sim, at, &data).unwrap();
        expected.insert(at, data);
        if sim.syncs() > syncs && n > 0 {
            filled += 1;
            wander(&image, &expected);
            if filled == 2 {
                // The log was full: its oldest entries were applied, and are overwritten from here on.
                history.write(&image, &sim, at + 2 * MIB, &content(0xaa, 512)).unwrap();
                history
                    .write(&image, &sim, (at + PAGE * MIB) % (4 * PAGE * MIB), &content(0xab, 512))
                    .unwrap();
                break;
            }
        }
        if n % 16 == 15 {
            history.flush(&image, &sim).unwrap();
        }
        from = sim.trace_len();
    }
    assert_eq!(filled, 2);
    explore(&sim, &history, "a log that fills up", from);
}

#[test]
fn an_image_that_was_not_closed_is_read_through_its_log_page_by_page() {
    let sim = create(8 * PAGE * MIB, 512, None);
    let image = open(&sim, &LayerOptions::default(), 1);
    let (mut history, mut expected) = (History::new(), BTreeMap::new());
    for n in 0..40u64 {
        let (at, data) = ((n % 8 * PAGE + n) * MIB, content(n as u8 + 1, 512));
        history.write(&image, &sim, at, &data).unwrap();
        expected.insert(at, data);
        if n == 20 {
            image.maintain(&|| ()).unwrap();
        }
    }
    history.flush(&image, &sim).unwrap();
    sim.mark(Mark::Flushed(history.operations()));
    let left = SimStorage::from_disk(sim.contents());
    let before = left.contents().fingerprint();
    let image = open(&left, &reading(), 1);
    assert!(image.facts().was_dirty);
    (0..3).for_each(|_| wander(&image, &expected));
    assert_eq!(left.contents().fingerprint(), before);
    // And for writing: now the log is replayed into the file.
    let image = open(&left, &LayerOptions::default(), 1);
    wander(&image, &expected);
    image.close().unwrap();
    sound(&left).unwrap();
}
