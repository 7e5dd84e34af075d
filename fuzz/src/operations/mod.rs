//! Sound images, used in any order, with failing files, dying daemons and power cuts, against a model of the disk.

mod bytes;
mod closed;
mod create;
mod model;

use std::sync::Arc;

use formats::{Format, Image, ImageError, LayerOptions, NotesFile, ZeroMode};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use uuid::Uuid;

use crate::payload::{self, Fence, Until};
use crate::storage::{Contents, Fault, MemoryFile, keeper};
use crate::{SECTOR, codec};
use bytes::{Bytes, span};
use model::{Model, Outcome};

/// So many operations are done at most.
const OPERATIONS_MAX: usize = 400;

/// The guest writes no more when a file stores so many pages.
const PAGES_MAX: usize = 8 << 10;

/// Runs the target on an input: options of a new image, then operations.
///
/// # Panics
/// When `formats` breaks a promise.
pub fn run(data: &[u8]) {
    let mut bytes = Bytes(data);
    let Some(mut session) = Session::begin(&mut bytes) else { return };
    for _ in 0..OPERATIONS_MAX {
        if bytes.is_empty() {
            break;
        }
        session.step(&mut bytes);
    }
    session.end();
}

/// A disk in use.
struct Session {
    format: Format,
    /// The image's own file, then those of its parents, the nearest first.
    layers: Vec<Arc<MemoryFile>>,
    /// Where a differencing image notes what the death of the daemon shall not lose.
    notes: Option<Arc<MemoryFile>>,
    /// Which boot of the system it is.
    boot: u128,
    image: Arc<dyn Image>,
    model: Model,
    /// Sectors of the disk as the guest counts them.
    sectors: u64,
    /// Whether to tell what is done.
    tells: bool,
    /// Bytes of each.
    sector: u64,
    /// Sectors of a block.
    block: u64,
}

impl Session {
    fn begin(bytes: &mut Bytes) -> Option<Self> {
        if bytes.0.len() < 8 {
            return None;
        }
        let (format, file) = create::base(bytes);
        let image = codec::open(format, &file, false, false).expect("what was made can be opened");
        let mut session = Self {
            format,
            layers: vec![file],
            notes: None,
            boot: 1,
            image,
            model: Model::default(),
            tells: std::env::var_os("FUZZ_TELL").is_some(),
            sectors: 0,
            sector: 0,
            block: 0,
        };
        session.measure();
        Some(session)
    }

    /// Takes note of the image's sizes.
    fn measure(&mut self) {
        let geometry = self.image.geometry();
        self.sector = u64::from(geometry.logical_sector_size);
        self.sectors = geometry.virtual_size / self.sector;
        self.block = if geometry.block_size == 0 { 16 } else { u64::from(geometry.block_size) / self.sector };
    }

    fn file(&self) -> &Arc<MemoryFile> {
        &self.layers[0]
    }

    fn is_differencing(&self) -> bool {
        self.layers.len() > 1
    }

    /// Opens the disk, of which these are the files, as it is after a crash or otherwise.
    fn open_as(
        &self,
        files: &[Arc<MemoryFile>],
        notes: Option<&Arc<MemoryFile>>,
        read_only: bool,
        recover: bool,
    ) -> Result<Arc<dyn Image>, ImageError> {
        let notes =
            notes.map(|file| NotesFile { storage: file.clone(), boot_id: Uuid::from_u128(self.boot) });
        let options = LayerOptions { read_only, recover, next_content_id: None, notes };
        codec::open_chain(self.format, files, &options)
    }

    fn open(&self, read_only: bool, recover: bool) -> Result<Arc<dyn Image>, ImageError> {
        self.open_as(&self.layers, self.notes.as_ref(), read_only, recover)
    }

    fn has_failed(&self) -> bool {
        self.file().has_failed() || self.notes.as_ref().is_some_and(|notes| notes.has_failed())
    }

    /// Nothing fails any more; what did may have left the image unusable for writing.
    fn mend(&self) {
        for file in [Some(self.file()), self.notes.as_ref()].into_iter().flatten() {
            file.set_fault(None);
            file.set_limit(None);
        }
    }

    /// Nothing fails any more, and what did has nothing to do with the image as it is opened next.
    fn heal(&self) {
        self.file().heal();
        self.notes.iter().for_each(|notes| notes.heal());
    }

    /// Tells what happens, for whoever looks for a cause.
    fn tell(&self, what: impl FnOnce() -> String) {
        if self.tells {
            eprintln!("layers {}, failed {}: {}", self.layers.len(), self.has_failed(), what());
        }
    }

    fn step(&mut self, bytes: &mut Bytes) {
        self.tell(|| format!("operation {}, {} bytes left", bytes.0[0] % 36, bytes.0.len()));
        match bytes.byte() % 36 {
            0..9 => self.write(bytes, Until::Told),
            9 => self.write(bytes, Until::Mapped),
            10 => self.write(bytes, Until::Written),
            11 => self.forge(bytes),
            12 | 13 => self.zero(bytes, false, ZeroMode::Keep),
            14 | 15 => self.zero(bytes, false, ZeroMode::Unmap),
            16 | 17 => self.zero(bytes, true, ZeroMode::Unmap),
            18 => self.flush(),
            19 => self.flush_beside_a_write(bytes),
            20 => self.maintain(),
            21 => drop(self.close()),
            22 => self.close_and_reopen(bytes),
            23 => self.crash(bytes, false),
            24 | 25 => self.crash(bytes, true),
            26 => self.break_something(bytes),
            27 => self.mend(),
            28 => self.compare("in use"),
            29 => self.look_from_outside(),
            30 => self.read(bytes),
            32 => self.snapshot(bytes),
            33 => self.merge(bytes),
            34 => self.resize(bytes),
            35 => self.compact_or_relink(bytes),
            _ => {
                if self.image.wants_maintenance() {
                    self.maintain();
                }
            }
        }
    }

    fn fence(&self) -> Fence {
        Fence::of_ours(self.format, self.file())
    }

    /// What may fail only if the file did.
    fn expect<T>(&self, what: &str, result: Result<T, ImageError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(e) if self.has_failed() => {
                assert!(e.message.len() > 10, "{what}: no explanation: {e:?}");
                None
            }
            Err(e) => panic!("{what} fails, though the file does what it is told: {e}"),
        }
    }

    fn outcome<T>(&self, what: &str, result: Result<T, ImageError>) -> Outcome {
        if self.expect(what, result).is_some() { Outcome::Done } else { Outcome::Unknown }
    }

    fn write(&mut self, bytes: &mut Bytes, until: Until) {
        if self.file().look(Contents::page_count) > PAGES_MAX {
            return;
        }
        let at = span(bytes.sectors(self.sectors, self.block), self.sector);
        let tags = self.model.fresh(at);
        let data = self.model.bytes(&tags);
        let done = codec::bounded("writing", self.file(), || {
            payload::write(&*self.image, at.offset, &data, until, &self.fence())
        });
        let outcome = self.outcome("writing", done);
        self.tell(|| {
            format!("{until:?} {outcome:?} sectors {} and {} more", at.offset / SECTOR, at.len / SECTOR)
        });
        match (until, outcome) {
            // A place alone changes nothing that is read; a failure may have come later.
            (Until::Mapped, _) => {}
            (Until::Written, _) => self.model.wrote(at.offset, &tags, Outcome::Unknown),
            (Until::Told, outcome) => self.model.wrote(at.offset, &tags, outcome),
        }
    }

    /// The guest writes what looks like a structure of an image: a sector of the file's own.
    fn forge(&mut self, bytes: &mut Bytes) {
        let file = self.file().contents();
        let place = match bytes.byte() {
            0..100 => file.len().saturating_sub(SECTOR),
            100..150 => 0,
            150..180 => 64 << 10,
            n => u64::from(n) * SECTOR,
        };
        let mut sector = [0; SECTOR as usize];
        file.read(place, &mut sector);
        let target = bytes.sectors(self.sectors, self.block);
        let at = span(target.start..(target.start + 4).min(target.end), self.sector);
        let tag = self.model.special(sector);
        let tags = vec![tag; (at.len / SECTOR) as usize];
        let data = self.model.bytes(&tags);
        let done = payload::write(&*self.image, at.offset, &data, Until::Told, &self.fence());
        let outcome = self.outcome("writing", done);
        self.model.wrote(at.offset, &tags, outcome);
    }

    fn zero(&mut self, bytes: &mut Bytes, whole_blocks: bool, mode: ZeroMode) {
        let sectors = if whole_blocks {
            bytes.blocks(self.sectors, self.block)
        } else {
            bytes.sectors(self.sectors, self.block)
        };
        let at = span(sectors, self.sector);
        let punch = bytes.byte() & 1 == 0;
        let done = codec::bounded("zeroing", self.file(), || {
            payload::zero(&*self.image, at, mode, punch, &self.fence())
        });
        let outcome = self.outcome("zeroing", done);
        self.tell(|| {
            format!("zero {mode:?} {outcome:?} sectors {} and {} more", at.offset / SECTOR, at.len / SECTOR)
        });
        self.model.zeroed(at, outcome);
    }

    fn read(&mut self, bytes: &mut Bytes) {
        let at = span(bytes.sectors(self.sectors, self.block), self.sector);
        let data = payload::read(&*self.image, at, &self.fence()).expect("reading works whatever failed");
        self.model.compare_bytes(at.offset, &data, "reading");
    }

    fn flush(&mut self) {
        let done = codec::bounded("flushing", self.file(), || self.image.commit());
        if self.expect("flushing", done).is_some() {
            self.model.flushed();
        }
    }

    /// As a daemon does it: the sync is its own, and writes go on beside it.
    fn flush_beside_a_write(&mut self, bytes: &mut Bytes) {
        let token = self.image.sync_begin();
        let before = self.model.clone();
        self.write(bytes, Until::Told);
        let done = payload::finish_flush(&*self.image, token);
        if self.expect("flushing", done).is_some() {
            self.model.flushed_since(&before);
        }
    }

    fn maintain(&mut self) {
        let done = codec::bounded("maintaining", self.file(), || self.image.maintain(&|| ()));
        self.expect("maintaining", done);
    }

    fn close(&mut self) -> bool {
        let done = codec::bounded("closing", self.file(), || self.image.close());
        let closed = self.expect("closing", done).is_some();
        if closed {
            self.model.flushed();
        }
        closed
    }

    fn close_and_reopen(&mut self, bytes: &mut Bytes) {
        let closed = self.close();
        self.heal();
        if closed {
            let report =
                codec::check(self.format, self.file(), false).expect("what is closed can be checked");
            assert!(report.is_sound(), "damaged after it was closed: {report:?}");
            if bytes.byte() & 1 == 1 && self.notes.is_some() {
                // A closed image owes nothing to its notes.
                self.notes = Some(MemoryFile::new(Contents::default()));
            }
        } else {
            self.died();
        }
        self.image = self.open(false, !closed).expect("what is closed can be opened");
        self.compare("closed and opened");
    }

    /// What the death of the daemon means for what the disk may hold.
    fn died(&mut self) {
        match (self.is_differencing(), &self.notes) {
            (false, _) => {}
            // Sectors that were not flushed may be the parent's again.
            (true, None) => self.model.power_was_cut(),
            (true, Some(_)) => self.model.failures_may_be_undone(),
        }
    }

    /// The daemon dies, or the power fails; maybe once more while the image is opened again.
    fn crash(&mut self, bytes: &mut Bytes, power: bool) {
        self.fail(bytes, power);
        let during_open = bytes.byte();
        if during_open & 1 == 1 {
            let fault =
                Fault { after: u64::from(during_open >> 3), lasting: true, partial: during_open & 2 != 0 };
            self.file().set_fault(Some(fault));
            let opened = self.open(false, true);
            self.expect("opening after a crash", opened);
            self.fail(bytes, during_open & 4 != 0);
        }
        match bytes.byte() % 4 {
            0 => self.repair_what_crashed(),
            1 => self.read_what_crashed(),
            _ => {}
        }
        self.image = self.open(false, true).expect("what crashed can be opened");
        self.compare("opened after a crash");
    }

    fn repair_what_crashed(&self) {
        let report = codec::check(self.format, self.file(), true).expect("what crashed can be checked");
        assert!(report.is_sound(), "damaged by a crash: {report:?}");
    }

    fn read_what_crashed(&mut self) {
        let before = self.file().contents();
        let image = self.open(true, true).expect("what crashed can be read");
        self.model.compare(&*image, &Fence::of_foreign(self.format, self.file()), "read after a crash");
        assert!(before == self.file().contents(), "opening for reading changed the file");
    }

    fn fail(&mut self, bytes: &mut Bytes, power: bool) {
        self.tell(|| if power { "the power fails".into() } else { "the daemon dies".into() });
        self.heal();
        if power {
            let (how, seed) = (bytes.byte(), bytes.byte());
            self.file().cut_power(&mut keeper(how, ChaCha8Rng::seed_from_u64(seed.into())));
            self.model.power_was_cut();
            // Notes are worth something only within one boot.
            self.boot += 1;
        } else {
            self.died();
        }
    }

    fn break_something(&mut self, bytes: &mut Bytes) {
        let (what, after) = (bytes.byte(), bytes.byte());
        if what & 7 == 7 {
            let room = u64::from(after) * (SECTOR << (what >> 5));
            self.file().set_limit(Some(self.file().contents().len() + room));
            return;
        }
        let fault = Fault { after: u64::from(after % 48), lasting: what & 1 == 1, partial: what & 2 == 2 };
        self.tell(|| format!("{fault:?} {what:#x}"));
        match &self.notes {
            Some(notes) if what & 0x30 == 0x30 => notes.set_fault(Some(fault)),
            _ => self.file().set_fault(Some(fault)),
        }
    }

    /// Others may look at an image in use.
    fn look_from_outside(&mut self) {
        let copy_of = |file: &Arc<MemoryFile>| MemoryFile::new(file.contents());
        let mut layers = self.layers.clone();
        layers[0] = copy_of(&layers[0]);
        let notes = self.notes.as_ref().map(copy_of);
        let report = codec::check(self.format, &layers[0], false).expect("an image in use can be checked");
        let damage = codec::damage(&report);
        assert!(
            damage.iter().all(|code| *code == "vhd-footer-missing"),
            "an image in use is damaged: {damage:?}"
        );
        let image = self.open_as(&layers, notes.as_ref(), true, false).expect("an image in use can be read");
        if notes.is_some() || !self.is_differencing() {
            let fence = Fence::of_ours(self.format, &layers[0]);
            // It may differ in what is unknown: nothing is learned from it.
            self.model.clone().compare(&*image, &fence, "looked at from outside");
        }
    }

    fn compare(&mut self, when: &str) {
        let fence = self.fence();
        self.model.compare(&*self.image, &fence, when);
    }

    fn end(mut self) {
        self.compare("at the end");
        self.settle();
        let report = codec::check(self.format, self.file(), false).expect("what is closed can be checked");
        assert!(report.is_sound(), "damaged at the end: {report:?}");
        // What is closed needs no notes.
        let image = self.open_as(&self.layers, None, true, false).expect("it can be opened at the end");
        assert_eq!(image.geometry().virtual_size, self.sectors * self.sector, "the size has changed");
        self.model.compare(&*image, &self.fence(), "at the very end");
    }
}
