//! A file in memory, and the disks that the benchmarks beside this folder make in it.
//!
//! The simulated file of the tests keeps a trace and hashes for each write; this one does nothing that a benchmark would
//! then measure. What is never written takes no memory, so a disk of 64 TiB has room, as long as nobody writes payload.
#![allow(dead_code, reason = "no benchmark uses all of it")]
#![allow(clippy::unwrap_used, reason = "what fails here fails the benchmark")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use criterion::Criterion;
use formats::raw::{self, Raw};
use formats::vhd::{self, Vhd};
use formats::vhdx::{self, Vhdx};
use formats::{
    ByteSpan, Chain, Image, ImageType, Layer, LayerOptions, NewParentLink, NotesFile, Pieces, Storage,
};
use uuid::Uuid;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const TIB: u64 = 1 << 40;

const PAGE: u64 = 4096;
type Page = Box<[u8; PAGE as usize]>;

#[derive(Debug, Default, Clone)]
struct Contents {
    pages: BTreeMap<u64, Page>,
    len: u64,
}

/// A sparse file in memory. Syncing it does nothing.
#[derive(Debug, Default)]
pub struct MemoryStorage(Mutex<Contents>);

impl MemoryStorage {
    /// An empty file.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Another file with the same contents.
    pub fn copy(&self) -> Arc<Self> {
        Arc::new(Self(Mutex::new(self.contents().clone())))
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Calls `each` with the pages of `len` bytes at `offset`: number, offset in the page, offset from the start, length.
fn for_each_page(offset: u64, len: usize, mut each: impl FnMut(u64, usize, usize, usize)) {
    let mut done = 0;
    while done < len {
        let at = offset + done as u64;
        let within = (at % PAGE) as usize;
        let n = (PAGE as usize - within).min(len - done);
        each(at / PAGE, within, done, n);
        done += n;
    }
}

impl Storage for MemoryStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let contents = self.contents();
        if offset + buf.len() as u64 > contents.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for_each_page(offset, buf.len(), |page, within, done, n| {
            let part = &mut buf[done..done + n];
            match contents.pages.get(&page) {
                Some(page) => part.copy_from_slice(&page[within..within + n]),
                None => part.fill(0),
            }
        });
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut contents = self.contents();
        contents.len = contents.len.max(offset + buf.len() as u64);
        for_each_page(offset, buf.len(), |page, within, done, n| {
            let page = contents.pages.entry(page).or_insert_with(|| Box::new([0; PAGE as usize]));
            page[within..within + n].copy_from_slice(&buf[done..done + n]);
        });
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.contents().len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let old = self.len()?;
        self.punch(len, old.saturating_sub(len))?;
        self.contents().len = len;
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut contents = self.contents();
        let end = (offset + len).min(contents.len);
        if end <= offset {
            return Ok(());
        }
        let touched: Vec<u64> =
            contents.pages.range(offset / PAGE..end.div_ceil(PAGE)).map(|(&page, _)| page).collect();
        for page in touched {
            let (start, stop) = (page * PAGE, (page + 1) * PAGE);
            if offset <= start && stop <= end {
                contents.pages.remove(&page);
            } else if let Some(bytes) = contents.pages.get_mut(&page) {
                bytes[(offset.max(start) - start) as usize..(end.min(stop) - start) as usize].fill(0);
            }
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let contents = self.contents();
        let mut pages = contents.pages.range(offset / PAGE..).map(|(&page, _)| page);
        let Some(first) = pages.next().filter(|first| first * PAGE < contents.len) else { return Ok(None) };
        let run = 1 + pages.zip(first + 1..).take_while(|(page, next)| page == next).count() as u64;
        Ok(Some((offset.max(first * PAGE), ((first + run) * PAGE).min(contents.len))))
    }

    fn file(&self) -> Option<&File> {
        None
    }
}

/// Which format a disk of blocks has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// VHD.
    Vhd,
    /// VHDX.
    Vhdx,
}

/// A raw disk.
pub fn raw_disk(size: u64) -> Arc<dyn Image> {
    let storage = MemoryStorage::new();
    raw::create(&*storage, size).unwrap();
    Arc::new(Raw::open(storage, false).unwrap())
}

/// A fixed VHD.
pub fn fixed_vhd(virtual_size: u64) -> Arc<dyn Image> {
    let storage = MemoryStorage::new();
    let params =
        vhd::CreateParams { image_type: ImageType::Fixed, virtual_size, block_size: None, parent: None };
    vhd::create(&*storage, &params).unwrap();
    Arc::new(Vhd::open(storage, false, false).unwrap())
}

/// A new file with an image of blocks: dynamic, or, with the id of a parent, differencing.
pub fn create(kind: Kind, virtual_size: u64, block: u64, parent: Option<Uuid>) -> Arc<MemoryStorage> {
    let storage = MemoryStorage::new();
    let image_type = if parent.is_some() { ImageType::Differencing } else { ImageType::Dynamic };
    let block_size = Some(block as u32);
    let parent = parent.map(|id| NewParentLink {
        id,
        next_id: None,
        relative: Some("parent".into()),
        absolute: "/parent".into(),
    });
    match kind {
        Kind::Vhd => {
            vhd::create(&*storage, &vhd::CreateParams { image_type, virtual_size, block_size, parent })
        }
        Kind::Vhdx => {
            let params = vhdx::CreateParams {
                image_type,
                virtual_size,
                block_size,
                logical_sector_size: 512,
                physical_sector_size: 4096,
                log_size: None,
                parent,
            };
            vhdx::create(&*storage, &params)
        }
    }
    .unwrap();
    storage
}

/// Opens what [`create`] made, by itself. A differencing image that is written to has a notes file in memory.
pub fn open(kind: Kind, storage: &Arc<MemoryStorage>, read_only: bool) -> Arc<dyn Layer> {
    let notes = NotesFile { storage: MemoryStorage::new(), boot_id: Uuid::from_u128(1) };
    let options = LayerOptions { read_only, notes: Some(notes), ..LayerOptions::default() };
    match kind {
        Kind::Vhd => Arc::new(Vhd::open_layer(storage.clone(), &options).unwrap()),
        Kind::Vhdx => Arc::new(Vhdx::open_layer(storage.clone(), &options).unwrap()),
    }
}

/// Gives all blocks of the disk's first `len` bytes their place, and says that they were written.
pub fn fill(image: &dyn Image, len: u64) {
    let mut pieces = Pieces::new();
    for offset in (0..len).step_by(GIB as usize) {
        let span = ByteSpan::new(offset, GIB.min(len - offset));
        pieces.clear();
        image.map_write(span, &mut pieces).unwrap();
        image.wrote(span).unwrap();
        image.commit().unwrap();
        image.maintain(&|| ()).unwrap();
    }
}

/// A dynamic disk whose first `filled` bytes have their place, as it is after it was closed and opened again.
pub fn dynamic_disk(kind: Kind, virtual_size: u64, block: u64, filled: u64) -> Arc<dyn Layer> {
    let storage = create(kind, virtual_size, block, None);
    let image = open(kind, &storage, false);
    fill(&*image, filled);
    image.close().unwrap();
    open(kind, &storage, false)
}

/// So many children on each other, the last of which is written to, on a dynamic disk. What holds anything is said by
/// `fill`, which is called with each image and its level, 0 being the disk below all of them.
pub fn chain(
    kind: Kind,
    virtual_size: u64,
    block: u64,
    children: usize,
    fill: impl Fn(usize, &dyn Image),
) -> Arc<dyn Image> {
    let mut parents: Vec<Arc<dyn Image>> = Vec::new();
    for level in 0..=children {
        let parent = parents.first().and_then(|parent| parent.content_id());
        let storage = create(kind, virtual_size, block, parent);
        let image = open(kind, &storage, false);
        fill(level, &*image);
        image.close().unwrap();
        if level < children {
            parents.insert(0, open(kind, &storage, true));
        } else {
            return Arc::new(Chain::new(open(kind, &storage, false), parents).unwrap());
        }
    }
    unreachable!("the loop ends with the last child")
}

/// Benchmarks of pieces that take nanoseconds to milliseconds: short, and many of them.
pub fn criterion() -> Criterion {
    Criterion::default()
        .warm_up_time(std::time::Duration::from_millis(200))
        .measurement_time(std::time::Duration::from_secs(1))
        .sample_size(20)
        .nresamples(10_000)
        .without_plots()
}
