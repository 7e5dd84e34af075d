//! Sound images, used in any order, with failing files, dying daemons and power cuts, against a model of the disk.

mod bytes;
mod model;

use std::sync::Arc;

use formats::vhdx;
use formats::{ByteSpan, Format, Image, ImageError, ImageType, ZeroMode, raw, vhd};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::payload::{self, Fence, Until};
use crate::storage::{Contents, Fault, MemoryFile, keeper};
use crate::{SECTOR, codec};
use bytes::{Bytes, span};
use model::{Model, Outcome};

/// So many operations are done at most.
const OPERATIONS_MAX: usize = 400;

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
    file: Arc<MemoryFile>,
    image: Arc<dyn Image>,
    model: Model,
    /// Sectors of the disk as the guest counts them.
    sectors: u64,
    /// Bytes of each.
    sector: u64,
    /// Sectors of a block.
    block: u64,
}

/// Makes an image of a size and a layout that the input chooses.
fn create(bytes: &mut Bytes) -> (Format, Arc<MemoryFile>) {
    let file = MemoryFile::new(Contents::default());
    let kind = bytes.byte();
    let blocks = match bytes.byte() {
        n @ 0..224 => u64::from(n % 64) + 1,
        n => u64::from(n - 223) * 700,
    };
    let odd = u64::from(bytes.byte());
    let made = match kind % 16 {
        0 => raw::create(&*file, (blocks * 8 + odd) * SECTOR).map(|()| Format::Raw),
        1 => {
            let size = (blocks * 8 + odd) * SECTOR;
            let params = vhd::CreateParams {
                image_type: ImageType::Fixed,
                virtual_size: size,
                block_size: None,
                parent: None,
            };
            vhd::create(&*file, &params).map(|()| Format::Vhd)
        }
        2..8 => {
            let block = bytes.one_of(&[512, 4096, 64 << 10, 512 << 10, 2 << 20]);
            let size = blocks * u64::from(block) + odd * SECTOR;
            let params = vhd::CreateParams {
                image_type: ImageType::Dynamic,
                virtual_size: size,
                block_size: Some(block),
                parent: None,
            };
            vhd::create(&*file, &params).map(|()| Format::Vhd)
        }
        n => {
            let block = bytes.one_of(&[1 << 20, 2 << 20, 8 << 20, 1 << 20]);
            let sector: u32 = if n > 13 { 4096 } else { 512 };
            let params = vhdx::CreateParams {
                image_type: if n == 8 { ImageType::Fixed } else { ImageType::Dynamic },
                virtual_size: blocks * u64::from(block) + odd * u64::from(sector),
                block_size: Some(block),
                logical_sector_size: sector,
                physical_sector_size: 4096,
                log_size: Some(1 << 20),
                parent: None,
            };
            vhdx::create(&*file, &params).map(|()| Format::Vhdx)
        }
    };
    let format = made.expect("an image can be made");
    (format, MemoryFile::with_power_cuts(file.contents()))
}

impl Session {
    fn begin(bytes: &mut Bytes) -> Option<Self> {
        if bytes.0.len() < 8 {
            return None;
        }
        let (format, file) = create(bytes);
        let image = codec::open(format, &file, false, false).expect("what was made can be opened");
        let geometry = image.geometry();
        let sector = u64::from(geometry.logical_sector_size);
        let sectors = geometry.virtual_size / sector;
        let block = if geometry.block_size == 0 { 16 } else { u64::from(geometry.block_size) / sector };
        Some(Self { format, file, image, model: Model::default(), sectors, sector, block })
    }

    fn step(&mut self, bytes: &mut Bytes) {
        match bytes.byte() % 32 {
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
            22 => self.close_and_reopen(),
            23 => self.crash(bytes, false),
            24 | 25 => self.crash(bytes, true),
            26 => self.break_something(bytes),
            27 => {
                self.file.set_fault(None);
                self.file.set_limit(None);
            }
            28 => self.compare("in use"),
            29 => self.look_from_outside(),
            30 => self.read(bytes),
            _ => {
                if self.image.wants_maintenance() {
                    self.maintain();
                }
            }
        }
    }

    fn fence(&self) -> Fence {
        Fence::of_ours(self.format, &self.file)
    }

    /// What may fail only if the file did.
    fn expect<T>(&self, what: &str, result: Result<T, ImageError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(e) if self.file.has_failed() => {
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
        let at = span(bytes.sectors(self.sectors, self.block), self.sector);
        let tags = self.model.fresh(at);
        let data = self.model.bytes(&tags);
        let done = codec::bounded("writing", &self.file, || {
            payload::write(&*self.image, at.offset, &data, until, &self.fence())
        });
        let outcome = self.outcome("writing", done);
        match (until, outcome) {
            // A place alone changes nothing that is read; a failure may have come later.
            (Until::Mapped, _) => {}
            (Until::Written, _) => self.model.wrote(at.offset, &tags, Outcome::Unknown),
            (Until::Told, outcome) => self.model.wrote(at.offset, &tags, outcome),
        }
    }

    /// The guest writes what looks like a structure of an image: a sector of the file's own.
    fn forge(&mut self, bytes: &mut Bytes) {
        let file = self.file.contents();
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
        let done = codec::bounded("zeroing", &self.file, || {
            payload::zero(&*self.image, at, mode, punch, &self.fence())
        });
        let outcome = self.outcome("zeroing", done);
        self.model.zeroed(at, outcome);
    }

    fn read(&mut self, bytes: &mut Bytes) {
        let at = span(bytes.sectors(self.sectors, self.block), self.sector);
        let data = payload::read(&*self.image, at, &self.fence()).expect("reading works whatever failed");
        self.model.compare_bytes(at.offset, &data, "reading");
    }

    fn flush(&mut self) {
        let done = codec::bounded("flushing", &self.file, || self.image.commit());
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
        let done = codec::bounded("maintaining", &self.file, || self.image.maintain(&|| ()));
        self.expect("maintaining", done);
    }

    fn close(&mut self) -> bool {
        let done = codec::bounded("closing", &self.file, || self.image.close());
        let closed = self.expect("closing", done).is_some();
        if closed {
            self.model.flushed();
        }
        closed
    }

    fn close_and_reopen(&mut self) {
        let closed = self.close();
        self.file.heal();
        if closed {
            let report = codec::check(self.format, &self.file, false).expect("what is closed can be checked");
            assert!(report.is_sound(), "damaged after it was closed: {report:?}");
        }
        self.image =
            codec::open(self.format, &self.file, false, !closed).expect("what is closed can be opened");
        self.compare("closed and opened");
    }

    /// The daemon dies, or the power fails; maybe once more while the image is opened again.
    fn crash(&mut self, bytes: &mut Bytes, power: bool) {
        self.fail(bytes, power);
        let during_open = bytes.byte();
        if during_open & 1 == 1 {
            let fault =
                Fault { after: u64::from(during_open >> 3), lasting: true, partial: during_open & 2 != 0 };
            self.file.set_fault(Some(fault));
            let opened = codec::open(self.format, &self.file, false, true);
            self.expect("opening after a crash", opened);
            self.fail(bytes, during_open & 4 != 0);
        }
        match bytes.byte() % 4 {
            0 => {
                let before = self.file.contents();
                let report =
                    codec::check(self.format, &self.file, true).expect("what crashed can be checked");
                assert!(report.is_sound(), "damaged by a crash: {report:?}");
                drop(before);
            }
            1 => {
                let before = self.file.contents();
                let image =
                    codec::open(self.format, &self.file, true, true).expect("what crashed can be read");
                self.model.compare(&*image, &self.fence(), "read after a crash");
                assert!(before == self.file.contents(), "opening for reading changed the file");
            }
            _ => {}
        }
        self.image = codec::open(self.format, &self.file, false, true).expect("what crashed can be opened");
        self.compare("opened after a crash");
    }

    fn fail(&mut self, bytes: &mut Bytes, power: bool) {
        self.file.heal();
        if power {
            let (how, seed) = (bytes.byte(), bytes.byte());
            self.file.cut_power(&mut keeper(how, ChaCha8Rng::seed_from_u64(seed.into())));
            self.model.power_was_cut();
        }
    }

    fn break_something(&mut self, bytes: &mut Bytes) {
        let (what, after) = (bytes.byte(), bytes.byte());
        if what & 7 == 7 {
            let room = u64::from(after) * (SECTOR << (what >> 5));
            self.file.set_limit(Some(self.file.contents().len() + room));
        } else {
            let fault =
                Fault { after: u64::from(after % 48), lasting: what & 1 == 1, partial: what & 2 == 2 };
            self.file.set_fault(Some(fault));
        }
    }

    /// Others may look at an image in use.
    fn look_from_outside(&mut self) {
        let copy = MemoryFile::new(self.file.contents());
        let report = codec::check(self.format, &copy, false).expect("an image in use can be checked");
        let damage = codec::damage(&report);
        assert!(
            damage.iter().all(|code| *code == "vhd-footer-missing"),
            "an image in use is damaged: {damage:?}"
        );
        let image = codec::open(self.format, &copy, true, false).expect("an image in use can be read");
        self.model.compare(&*image, &Fence::of_ours(self.format, &copy), "looked at from outside");
    }

    fn compare(&mut self, when: &str) {
        let fence = self.fence();
        self.model.compare(&*self.image, &fence, when);
    }

    fn end(mut self) {
        self.compare("at the end");
        self.file.heal();
        // What failed before may have made the image read-only.
        if self.image.close().is_ok() {
            let report = codec::check(self.format, &self.file, false).expect("what is closed can be checked");
            assert!(report.is_sound(), "damaged at the end: {report:?}");
        }
        let image = codec::open(self.format, &self.file, true, false).expect("it can be opened at the end");
        let whole = ByteSpan::new(0, image.geometry().virtual_size);
        assert_eq!(whole.len, self.sectors * self.sector, "the size has changed");
        self.model.compare(&*image, &self.fence(), "at the very end");
    }
}
