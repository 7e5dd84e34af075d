//! Differencing VHDXs in simulated files, for the tests beside this folder.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]
#![allow(dead_code, reason = "no test uses all of it")]

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use formats::vhdx::{self, CreateParams, Vhdx};
use formats::{Chain, Image, ImageError, ImageType, LayerOptions, NewParentLink, NotesFile, Storage};
use formats_tests::{SimDisk, SimStorage};
use uuid::Uuid;

pub const MIB: u64 = 1 << 20;
/// The running system of most tests.
pub const BOOT: Uuid = Uuid::from_u128(1);
/// Another one: the power was cut in between.
pub const OTHER_BOOT: Uuid = Uuid::from_u128(2);

/// A new image in blocks of 1 MiB with a log of 1 MiB: dynamic, or a child of who has the id.
pub fn create(size: u64, sector: u32, parent: Option<Uuid>) -> Arc<SimStorage> {
    create_with(size, MIB as u32, sector, parent)
}

pub fn create_with(size: u64, block: u32, sector: u32, parent: Option<Uuid>) -> Arc<SimStorage> {
    let sim = SimStorage::new();
    let link =
        |id| NewParentLink { id, next_id: None, relative: Some("p.vhdx".into()), absolute: "/p.vhdx".into() };
    let params = CreateParams {
        image_type: if parent.is_some() { ImageType::Differencing } else { ImageType::Dynamic },
        virtual_size: size,
        block_size: Some(block),
        logical_sector_size: sector,
        physical_sector_size: 4096,
        log_size: Some(1 << 20),
        parent: parent.map(link),
    };
    vhdx::create(&*sim, &params).unwrap();
    sim.forget_trace();
    sim
}

pub fn layer(sim: &Arc<SimStorage>, read_only: bool, notes: Option<NotesFile>) -> Result<Vhdx, ImageError> {
    let storage: Arc<dyn Storage> = sim.clone();
    Vhdx::open_layer(storage, &LayerOptions { read_only, notes, ..LayerOptions::default() })
}

pub fn read_only(sim: &Arc<SimStorage>) -> Vhdx {
    layer(sim, true, None).unwrap()
}

/// The disk whose top is `top`, over one parent.
pub fn over(top: Vhdx, parent: &Arc<SimStorage>) -> Chain {
    Chain::new(Arc::new(top), vec![Arc::new(read_only(parent)) as Arc<dyn Image>]).unwrap()
}

/// `len` bytes that no other tag gives, different in every sector.
pub fn content(tag: u8, len: u64) -> Vec<u8> {
    (0..len).map(|i| if i % 512 == 0 { (i / 512) as u8 | 1 } else { tag }).collect()
}

pub fn sound(sim: &Arc<SimStorage>) -> Result<(), String> {
    let storage: Arc<dyn Storage> = sim.clone();
    let report = vhdx::check(storage, false).map_err(|e| e.to_string())?;
    if report.is_sound() { Ok(()) } else { Err(format!("{:?}", report.findings[0])) }
}

/// A notes file that remembers what was in it at each point of the image's trace.
#[derive(Debug)]
pub struct Tape {
    pub notes: Arc<SimStorage>,
    image: Arc<SimStorage>,
    /// Length of the image's trace, and the notes from then on.
    states: Mutex<Vec<(usize, SimDisk)>>,
}

impl Tape {
    pub fn new(image: &Arc<SimStorage>) -> Arc<Self> {
        let states = Mutex::new(vec![(0, SimDisk::new())]);
        Arc::new(Self { notes: SimStorage::new(), image: image.clone(), states })
    }

    fn remember<T>(&self, done: io::Result<T>) -> io::Result<T> {
        self.states.lock().unwrap().push((self.image.trace_len(), self.notes.contents()));
        done
    }

    /// The notes that there may have been when the image's trace had `len` entries.
    pub fn at(&self, len: usize) -> Vec<SimDisk> {
        let states = self.states.lock().unwrap();
        let before = states.iter().rev().find(|(at, _)| *at < len);
        before.into_iter().chain(states.iter().filter(|(at, _)| *at == len)).map(|(_, d)| d.clone()).collect()
    }
}

impl Storage for Tape {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.notes.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.remember(self.notes.write_at(buf, offset))
    }
    fn len(&self) -> io::Result<u64> {
        self.notes.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.remember(self.notes.set_len(len))
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.remember(self.notes.punch(offset, len))
    }
    fn sync(&self) -> io::Result<()> {
        self.notes.sync()
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.notes.next_data(offset)
    }
    fn file(&self) -> Option<&File> {
        None
    }
}
