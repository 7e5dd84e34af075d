//! Differencing VHDs in simulated files, for the tests beside this folder.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]
#![allow(dead_code, reason = "no test uses all of it")]

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use formats::vhd::{self, CreateParams, Vhd};
use formats::{
    Chain, Image, ImageError, ImageType, Layer, LayerOptions, NewParentLink, NotesFile, Severity, Storage,
};
use formats_tests::{SimDisk, SimStorage};
use uuid::Uuid;

/// The running system of most tests.
pub const BOOT: Uuid = Uuid::from_u128(1);
/// Another one: the power was cut in between.
pub const OTHER_BOOT: Uuid = Uuid::from_u128(2);

/// A new dynamic (or, with no block size, fixed) disk.
pub fn base(block_size: Option<u32>, virtual_size: u64) -> Arc<SimStorage> {
    let sim = SimStorage::new();
    let image_type = if block_size.is_some() { ImageType::Dynamic } else { ImageType::Fixed };
    vhd::create(&*sim, &CreateParams { image_type, virtual_size, block_size, parent: None }).unwrap();
    sim
}

pub fn link_to(id: Option<Uuid>) -> NewParentLink {
    NewParentLink {
        id: id.unwrap(),
        next_id: None,
        relative: Some("parent.vhd".into()),
        absolute: "/disks/parent.vhd".into(),
    }
}

/// A new child of `parent`.
pub fn child(parent: &dyn Image, block_size: u32, virtual_size: u64) -> Arc<SimStorage> {
    let sim = SimStorage::new();
    let params = CreateParams {
        image_type: ImageType::Differencing,
        virtual_size,
        block_size: Some(block_size),
        parent: Some(link_to(parent.content_id())),
    };
    vhd::create(&*sim, &params).unwrap();
    sim.forget_trace();
    sim
}

pub fn notes(storage: Arc<dyn Storage>, boot_id: Uuid) -> Option<NotesFile> {
    Some(NotesFile { storage, boot_id })
}

pub fn layer(
    sim: &Arc<SimStorage>,
    read_only: bool,
    notes: Option<NotesFile>,
) -> Result<Arc<Vhd>, ImageError> {
    let options = LayerOptions { read_only, recover: !read_only, notes, ..LayerOptions::default() };
    let storage: Arc<dyn Storage> = sim.clone();
    Vhd::open_layer(storage, &options).map(Arc::new)
}

/// The disk whose top is `top`, over the others, the nearest first, which are opened for reading.
pub fn chain(top: Arc<dyn Layer>, parents: &[Arc<SimStorage>]) -> Chain {
    let parents = parents.iter().map(|sim| layer(sim, true, None).unwrap() as Arc<dyn Image>).collect();
    Chain::new(top, parents).unwrap()
}

/// `len` bytes that no other tag gives, different in every sector.
pub fn content(tag: u8, len: u64) -> Vec<u8> {
    (0..len).map(|i| if i % 512 == 0 { (i / 512) as u8 | 1 } else { tag }).collect()
}

pub fn sound(storage: &SimStorage) -> Result<(), String> {
    let report = vhd::check(storage, false).map_err(|e| e.to_string())?;
    match report.findings.iter().find(|f| f.severity == Severity::Damage && f.code != "vhd-footer-missing") {
        Some(damage) => Err(damage.message.clone()),
        None => Ok(()),
    }
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
    pub fn new(image: &Arc<SimStorage>, notes: SimDisk) -> Arc<Self> {
        let states = Mutex::new(vec![(0, notes.clone())]);
        Arc::new(Self { notes: SimStorage::from_disk(notes), image: image.clone(), states })
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

    /// All points of the image's trace at which the notes changed, and what they became.
    pub fn all(&self) -> Vec<(usize, SimDisk)> {
        self.states.lock().unwrap().clone()
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
