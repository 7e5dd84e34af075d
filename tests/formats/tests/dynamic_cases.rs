//! Situations that no single file shows, for every codec that can get into them. README.md of this crate has the table of all
//! such cases (m01 to m28) and of the tests that are elsewhere.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod cross;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cross::{Disk, read_all};
use formats::vhd::{self, Vhd};
use formats::vhdx::{self, Vhdx};
use formats::{
    ByteSpan, Chain, CreateOptions, ErrorKind, Format, Image, ImageType, Layer, LayerOptions, NewParentLink,
    NotesFile, Pieces, Place, Storage, ZeroMode,
};
use formats_tests::{SimStorage, read_payload, write_payload, zero_payload};
use uuid::Uuid;

const MIB: u64 = 1 << 20;

/// A disk in simulated files, a child on a parent if it is a differencing one.
struct Simulated {
    name: &'static str,
    format: Format,
    top: Arc<SimStorage>,
    parent: Option<Arc<SimStorage>>,
    notes: Arc<SimStorage>,
    sector: u32,
    block: u64,
    model: Vec<u8>,
}

fn make(format: Format, size: u64, sector: u32, parent: Option<NewParentLink>) -> Arc<SimStorage> {
    let sim = SimStorage::new();
    let image_type = if parent.is_some() { ImageType::Differencing } else { ImageType::Dynamic };
    match format {
        Format::Vhd => {
            let block_size = Some(64 << 10);
            vhd::create(&*sim, &vhd::CreateParams { image_type, virtual_size: size, block_size, parent })
        }
        _ => vhdx::create(
            &*sim,
            &vhdx::CreateParams {
                image_type,
                virtual_size: size,
                block_size: Some(MIB as u32),
                logical_sector_size: sector,
                physical_sector_size: 4096,
                log_size: Some(MIB as u32),
                parent,
            },
        ),
    }
    .unwrap();
    sim
}

fn layer(format: Format, sim: &Arc<SimStorage>, options: &LayerOptions) -> Arc<dyn Layer> {
    let storage: Arc<dyn Storage> = sim.clone();
    match format {
        Format::Vhd => Arc::new(Vhd::open_layer(storage, options).unwrap()),
        _ => Arc::new(Vhdx::open_layer(storage, options).unwrap()),
    }
}

impl Simulated {
    fn new(name: &'static str, format: Format, size: u64, sector: u32, differencing: bool) -> Self {
        let base = make(format, size, sector, None);
        let mut disk = Self {
            name,
            format,
            top: base.clone(),
            parent: None,
            notes: SimStorage::new(),
            sector,
            block: if format == Format::Vhd { 64 << 10 } else { MIB },
            model: vec![0; size as usize],
        };
        if differencing {
            let image = disk.open();
            for at in (0..size).step_by(3 * 4096) {
                disk.write(&*image, at, 4096.min(size - at), 0x11);
            }
            image.close().unwrap();
            let id = image.content_id().unwrap();
            let link = NewParentLink { id, next_id: None, relative: Some("p".into()), absolute: "/p".into() };
            disk.top = make(format, size, sector, Some(link));
            disk.parent = Some(base);
        }
        disk
    }

    fn open(&self) -> Arc<dyn Image> {
        let Some(parent) = &self.parent else {
            return layer(self.format, &self.top, &LayerOptions::default());
        };
        let notes = NotesFile { storage: self.notes.clone(), boot_id: Uuid::from_u128(1) };
        let top =
            layer(self.format, &self.top, &LayerOptions { notes: Some(notes), ..LayerOptions::default() });
        let below = LayerOptions { read_only: true, ..LayerOptions::default() };
        Arc::new(Chain::new(top, vec![layer(self.format, parent, &below)]).unwrap())
    }

    fn write(&mut self, image: &dyn Image, at: u64, len: u64, byte: u8) {
        self.try_write(image, at, len, byte).unwrap();
    }

    fn try_write(
        &mut self,
        image: &dyn Image,
        at: u64,
        len: u64,
        byte: u8,
    ) -> Result<(), formats::ImageError> {
        let data = vec![byte; len as usize];
        write_payload(image, at, &data)?;
        self.model[at as usize..][..data.len()].copy_from_slice(&data);
        Ok(())
    }

    fn agree(&self, image: &dyn Image, when: &str) {
        let data = read_payload(image, 0, self.model.len()).unwrap();
        let wrong = (0..data.len()).find(|&at| data[at] != self.model[at]);
        assert_eq!(wrong, None, "{}, {when}: a byte differs", self.name);
    }

    fn sound(&self) {
        let report = match self.format {
            Format::Vhd => vhd::check(&*self.top, false),
            _ => vhdx::check(self.top.clone(), false),
        };
        let report = report.unwrap();
        assert!(report.is_sound(), "{}: {report:?}", self.name);
    }
}

/// Every codec that allocates, at this size.
fn disks(size: u64) -> Vec<Simulated> {
    vec![
        Simulated::new("dynamic VHD", Format::Vhd, size, 512, false),
        Simulated::new("differencing VHD", Format::Vhd, size, 512, true),
        Simulated::new("dynamic VHDX", Format::Vhdx, size, 512, false),
        Simulated::new("differencing VHDX", Format::Vhdx, size, 512, true),
        Simulated::new("differencing VHDX with sectors of 4096", Format::Vhdx, size, 4096, true),
    ]
}

#[test]
fn m12_what_is_cut_off_a_file_in_use_is_an_error_and_never_other_data() {
    for (format, image_type) in [
        (Format::Raw, ImageType::Fixed),
        (Format::Vhd, ImageType::Fixed),
        (Format::Vhd, ImageType::Dynamic),
        (Format::Vhdx, ImageType::Fixed),
        (Format::Vhdx, ImageType::Dynamic),
        (Format::Vhd, ImageType::Differencing),
        (Format::Vhdx, ImageType::Differencing),
    ] {
        let differencing = image_type == ImageType::Differencing;
        let base = if differencing { ImageType::Dynamic } else { image_type };
        let options = CreateOptions { image_type: base, ..CreateOptions::new(format, 16 * MIB) };
        let mut disk = Disk::new(&options, 12);
        if differencing {
            disk.grow_child(&format!("child.{format}"), None, 0);
        }
        disk.write(0, 16 * MIB);
        disk.image().commit().unwrap();
        let file = File::options().write(true).open(disk.top()).unwrap();
        let mut places = Pieces::new();
        disk.image().map_read(ByteSpan::new(0, 16 * MIB), &mut places).unwrap();
        let ends = places.iter().map(|piece| match piece.place {
            Place::File { offset, .. } => offset + piece.len,
            place => panic!("{place:?} after a write"),
        });
        file.set_len(ends.max().unwrap() / 2).unwrap();
        let (mut good, mut bad) = (0, 0);
        for at in (0..16 * MIB).step_by(64 << 10) {
            match read_payload(disk.image(), at, 64 << 10) {
                Ok(data) => {
                    assert!(
                        data == disk.model[at as usize..][..64 << 10],
                        "{format} {image_type} at {at:#x}"
                    );
                    good += 1;
                }
                Err(e) => {
                    assert_eq!(e.kind, ErrorKind::Io, "{e}");
                    bad += 1;
                }
            }
        }
        assert!(good > 0 && bad > 0, "{format} {image_type}: {good} pieces were read, {bad} not");
        // Whatever it says to the rest, it says it in words.
        let _ = write_payload(disk.image(), 0, &[1; 4096]);
        let _ = zero_payload(disk.image(), 4 * MIB, 4 * MIB, ZeroMode::Unmap);
        let _ = disk.image().commit();
        let _ = disk.image().maintain(&|| ());
        let _ = disk.image().close();
        disk.image = None;
        let _ = formats::check(disk.top(), None, false);
        let _ = formats::open(disk.top(), &disk.open_options(false));
    }
}

#[test]
fn m13_a_full_file_system_refuses_writes_and_harms_nothing() {
    for mut disk in disks(96 * MIB) {
        let (name, block) = (disk.name, disk.block);
        let image = disk.open();
        disk.write(&*image, 0, 4096, 1);
        disk.top.limit_len(Some(disk.top.len().unwrap()));
        disk.notes.limit_len(Some(disk.notes.len().unwrap()));
        let mut next = 1;
        let refused = loop {
            let at = next * block;
            match disk.try_write(&*image, at, 4096, next as u8) {
                Ok(()) => next += 1,
                Err(e) => break e,
            }
        };
        assert_eq!(refused.kind, ErrorKind::NoSpace, "{name}: {refused}");
        disk.agree(&*image, "full");
        // Where there is a place everything goes on, though the notes have no room either.
        disk.write(&*image, 8192, 4096, 0xee);
        image.commit().unwrap();
        disk.agree(&*image, "full and flushed");
        // The process dies, or the power fails, while it is full.
        drop(image);
        let durable = SimStorage::from_disk(disk.top.durable_contents());
        let kept = std::mem::replace(&mut disk.top, durable);
        let notes = std::mem::replace(&mut disk.notes, SimStorage::new());
        disk.agree(&*disk.open(), "after a power cut");
        (disk.top, disk.notes) = (kept, notes);
        disk.top.limit_len(None);
        disk.notes.limit_len(None);
        let image = disk.open();
        disk.agree(&*image, "opened again");
        for n in next..(next + 40).min(96 * MIB / block) {
            disk.write(&*image, n * block, 4096, n as u8);
        }
        disk.agree(&*image, "with space again");
        image.close().unwrap();
        disk.sound();
        println!("{name}: {next} blocks fitted");
    }
}

/// The two headers of a VHDX.
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];

#[test]
fn m14_a_torn_header_leaves_the_other_one() {
    let mut disk = Simulated::new("dynamic VHDX", Format::Vhdx, 8 * MIB, 512, false);
    let fresh = disk.top.contents();
    let image = disk.open();
    disk.write(&*image, MIB, 4096, 7);
    image.commit().unwrap();
    let dirty = disk.top.contents();
    image.close().unwrap();
    let closed = disk.top.contents();
    drop(image);
    let mut opened = 0;
    for (now, before) in [(&dirty, &fresh), (&closed, &dirty)] {
        for slot in HEADERS {
            for written in 0..8 {
                for old_first in [false, true] {
                    let mut torn = now.clone();
                    let mut sectors = if old_first { 0..8 - written } else { written..8 };
                    sectors.start = sectors.start.min(8);
                    let mut old = vec![0; ((sectors.end - sectors.start) * 512) as usize];
                    before.read(slot + sectors.start * 512, &mut old);
                    // What a sector held before, or nothing that anybody ever wrote.
                    for garbage in [false, true] {
                        if garbage {
                            old.fill(0xa5);
                        }
                        torn.write(slot + sectors.start * 512, &old);
                        disk.top = SimStorage::from_disk(torn.clone());
                        disk.agree(&*disk.open(), "with a torn header");
                        opened += 1;
                    }
                }
            }
        }
    }
    let mut torn = closed.clone();
    for slot in HEADERS {
        torn.write(slot, &[0xa5; 512]);
    }
    let storage: Arc<dyn Storage> = SimStorage::from_disk(torn);
    assert_eq!(Vhdx::open(storage, false).unwrap_err().kind, ErrorKind::Corrupt);
    println!("{opened} torn headers were survived");
}

/// A file whose log is made up as it is read: a gibibyte of it takes no memory.
struct MadeUpLog<F> {
    file: Arc<SimStorage>,
    log: Range<u64>,
    /// The sector of this number.
    sector: F,
    read: AtomicU64,
}

impl<F> std::fmt::Debug for MadeUpLog<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MadeUpLog({:?})", self.log)
    }
}

impl<F: Fn(u64) -> [u8; 4096] + Send + Sync> Storage for MadeUpLog<F> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        let end = offset + buf.len() as u64;
        if end <= self.log.start || offset >= self.log.end {
            return self.file.read_at(buf, offset);
        }
        assert!(self.log.start <= offset && end <= self.log.end && offset.is_multiple_of(4096));
        for (index, part) in buf.chunks_mut(4096).enumerate() {
            let sector = (self.sector)((offset - self.log.start) / 4096 + index as u64);
            part.copy_from_slice(&sector[..part.len()]);
        }
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        panic!("opening for reading writes nothing")
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        panic!("opening for reading changes no length")
    }

    fn punch(&self, _: u64, _: u64) -> io::Result<()> {
        panic!("opening for reading punches nothing")
    }

    fn sync(&self) -> io::Result<()> {
        panic!("opening for reading syncs nothing")
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let len = self.file.len()?;
        Ok((offset < len).then_some((offset, len)))
    }

    fn file(&self) -> Option<&File> {
        None
    }
}

/// A sector that begins a log entry of so many sectors; the checksum is right if it is one.
fn log_entry(guid: &[u8; 16], sequence: u64, tail: u32, sectors: u32, descriptors: u32) -> [u8; 4096] {
    let mut entry = [0; 4096];
    entry[..4].copy_from_slice(b"loge");
    entry[8..12].copy_from_slice(&(sectors * 4096).to_le_bytes());
    entry[12..16].copy_from_slice(&tail.to_le_bytes());
    entry[16..24].copy_from_slice(&sequence.to_le_bytes());
    entry[24..28].copy_from_slice(&descriptors.to_le_bytes());
    entry[32..48].copy_from_slice(guid);
    let sum = crc32c::crc32c(&entry);
    entry[4..8].copy_from_slice(&sum.to_le_bytes());
    entry
}

#[test]
fn m20_a_log_of_a_gibibyte_of_plausible_entries_is_looked_at_in_linear_time() {
    const LOG: u64 = 1 << 30;
    const SECTORS: u32 = (LOG / 4096) as u32;
    let sim = SimStorage::new();
    let params = vhdx::CreateParams {
        image_type: ImageType::Dynamic,
        virtual_size: 8 * MIB,
        block_size: Some(MIB as u32),
        logical_sector_size: 512,
        physical_sector_size: 4096,
        log_size: Some(LOG as u32),
        parent: None,
    };
    vhdx::create(&*sim, &params).unwrap();
    let image = Vhdx::open(sim.clone(), false).unwrap();
    write_payload(&image, MIB, &[5; 4096]).unwrap();
    image.maintain(&|| ()).unwrap();
    image.commit().unwrap();
    drop(image);
    // It was not closed: the current header names the log.
    let header = HEADERS.map(|at| {
        let mut header = [0; 4096];
        sim.contents().read(at, &mut header);
        header
    });
    let sequence = |header: &[u8; 4096]| u64::from_le_bytes(header[8..16].try_into().unwrap());
    let current = header.into_iter().max_by_key(sequence).unwrap();
    let guid: [u8; 16] = current[48..64].try_into().unwrap();
    assert_ne!(guid, [0; 16]);
    let start = u64::from_le_bytes(current[72..80].try_into().unwrap());
    let look = |what: &str, sector: Box<dyn Fn(u64) -> [u8; 4096] + Send + Sync>| {
        let storage =
            MadeUpLog { file: sim.clone(), log: start..start + LOG, sector, read: AtomicU64::new(0) };
        let storage = Arc::new(storage);
        let begun = Instant::now();
        let opened = Vhdx::open(storage.clone(), true);
        let (took, read) = (begun.elapsed(), storage.read.load(Ordering::Relaxed));
        println!(
            "{what}: {}, {took:.1?}, {} MiB read",
            if opened.is_ok() { "opened" } else { "refused" },
            read >> 20
        );
        assert!(read < 4 * LOG, "{what}: {read} bytes were read of a log of {LOG}");
        assert!(took < Duration::from_secs(120), "{what} took {took:?}");
        opened.map(|image| image.geometry().virtual_size)
    };
    let one = look("one sequence of all sectors", Box::new(move |n| log_entry(&guid, n + 1, 0, 1, 0)));
    assert_eq!(one.unwrap(), 8 * MIB);
    let each = move |n| log_entry(&guid, 7 + 2 * n, (n * 4096) as u32, 1, 0);
    assert_eq!(look("each sector a sequence", Box::new(each)).unwrap(), 8 * MIB);
    let whole = move |n: u64| log_entry(&guid, n + 1, 0, SECTORS, SECTORS - 1);
    assert_eq!(look("each entry as long as the log", Box::new(whole)).unwrap_err().kind, ErrorKind::Corrupt);
    // Every second sector may be a descriptor or data, so entries overlap in every way.
    let mixed = move |n: u64| match n % 3 {
        0 => log_entry(&guid, n + 1, 0, 1 + (n * 2_654_435_761 % 5_000) as u32, 5_000),
        1 => {
            let mut sector = [0; 4096];
            sector[..4].copy_from_slice(b"data");
            sector
        }
        _ => [0; 4096],
    };
    assert_eq!(look("entries of all lengths", Box::new(mixed)).unwrap_err().kind, ErrorKind::Corrupt);
}

#[test]
fn m23_a_last_block_that_is_short_ends_where_the_disk_ends() {
    // Not even all of a page of 4096 bytes, where sectors are smaller.
    for size in [3 * MIB + (68 << 10), 3 * MIB + 4096] {
        for mut disk in disks(size) {
            let sector = u64::from(disk.sector);
            let image = disk.open();
            disk.write(&*image, size - sector, sector, 0x33);
            disk.agree(&*image, "the last sector");
            let last = (size - 1) / disk.block * disk.block;
            disk.write(&*image, last, size - last, 0x44);
            disk.agree(&*image, "all of the last block");
            zero_payload(&*image, last + sector, size - last - sector, ZeroMode::Unmap).unwrap();
            disk.model[(last + sector) as usize..].fill(0);
            disk.agree(&*image, "a discard up to the end");
            for (at, len) in
                [(size, sector), (size - sector, 2 * sector), (0, size + sector), (u64::MAX - 511, 512)]
            {
                let span = ByteSpan::new(at, len);
                let mut out = Pieces::new();
                let refused = [
                    image.map_read(span, &mut out),
                    image.map_write(span, &mut out),
                    image.map_zero(span, ZeroMode::Unmap, &mut out),
                ];
                for refused in refused {
                    assert_eq!(refused.unwrap_err().kind, ErrorKind::OutOfRange, "{}: {span:?}", disk.name);
                }
            }
            disk.agree(&*image, "what was refused");
            image.close().unwrap();
            drop(image);
            disk.sound();
            disk.agree(&*disk.open(), "opened again");
        }
    }
}

#[test]
fn m26_m27_zeroes_and_discards_over_a_parent_stay_through_deaths_and_power_cuts() {
    for mut disk in disks(6 * MIB) {
        let name = disk.name;
        for (round, mode) in [ZeroMode::Keep, ZeroMode::Unmap].into_iter().enumerate() {
            let image = disk.open();
            let at = round as u64 * 3 * MIB;
            // Zeroes that are written, zeroes in the middle of a block, a whole block, and across blocks.
            disk.write(&*image, at, 12 << 10, 0);
            for (first, len) in [(64 << 10, 8 << 10), (MIB, MIB), (2 * MIB - 4096, 64 << 10)] {
                zero_payload(&*image, at + first, len, mode).unwrap();
                disk.model[(at + first) as usize..][..len as usize].fill(0);
            }
            disk.agree(&*image, "zeroed");
            drop(image);
            disk.agree(&*disk.open(), "after a death");
            let image = disk.open();
            image.commit().unwrap();
            drop(image);
            let cut = SimStorage::from_disk(disk.top.durable_contents());
            disk.top = cut;
            disk.notes = SimStorage::new();
            disk.agree(&*disk.open(), "after a power cut");
        }
        let image = disk.open();
        image.close().unwrap();
        drop(image);
        disk.sound();
        let all = read_all(&*disk.open());
        assert!(all == disk.model, "{name}");
    }
}
