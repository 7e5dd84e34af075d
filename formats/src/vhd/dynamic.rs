//! The map of a dynamic disk: which block is where, and how a block gets its place. A differencing disk has its blocks from
//! here too.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::flat::{check_span, check_writable, state_in_file};
use crate::{AllocState, ByteSpan, ErrorKind, Extent, FileIndex, ImageError, Piece, Pieces, Place, Storage};

use super::SECTOR;
use super::grow::{Growth, SlotGrid, Slots, sync};
use super::layout::{Body, Shape};
use super::table::BlockTable;

/// A longer run of blocks that have no place is told in parts: a guest's discard asks what the parents have, and must not wait
/// for all of their tables to be looked through.
const ABSENT_RUN_MAX: u64 = 1 << 12;

/// Slots that are ready, and how far blocks reach. Held for a write of four bytes at most, never across a sync.
#[derive(Debug)]
struct Ready {
    slots: Slots,
    /// End of the last block that has its place in the table.
    used_end: u64,
}

/// What only a disk that is open for writing has.
#[derive(Debug)]
struct Writer {
    grid: SlotGrid,
    /// Taken before `ready` where both are needed.
    growth: Mutex<Growth>,
    ready: Mutex<Ready>,
    /// `ready.slots.count`, to be read without the lock.
    ready_count: AtomicU64,
    /// Whether a block got its place in this session, so that growing ahead is worth it.
    allocates: AtomicBool,
    /// Whether the last attempt to grow failed: maintenance leaves it to the next write that needs space.
    growth_failed: AtomicBool,
    /// Why nothing can be written any more.
    poison: OnceLock<String>,
}

/// An open dynamic disk.
#[derive(Debug)]
pub(super) struct Dynamic {
    files: [Arc<dyn Storage>; 1],
    shape: Shape,
    table: BlockTable,
    payload_align: u32,
    writer: Option<Writer>,
}

/// A block's part of a span.
pub(super) struct Part {
    pub(super) block: u64,
    /// First byte within the block.
    pub(super) within: u64,
    /// Bytes.
    pub(super) len: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic under these locks cannot leave them half changed: each is updated after the I/O it records.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Dynamic {
    /// A disk for reading, or, with `growth` and the end of its last block, for writing.
    pub(super) fn new(storage: Arc<dyn Storage>, body: &Body, growth: Option<(Growth, u64)>) -> Self {
        let shape = body.shape;
        Self {
            files: [storage],
            shape,
            table: BlockTable::new(&body.table),
            payload_align: body.payload_align(),
            writer: growth.map(|(growth, used_end)| Writer {
                grid: growth.grid(),
                growth: Mutex::new(growth),
                ready: Mutex::new(Ready { slots: Slots { first_data: 0, count: 0 }, used_end }),
                ready_count: AtomicU64::new(0),
                allocates: AtomicBool::new(false),
                growth_failed: AtomicBool::new(false),
                poison: OnceLock::new(),
            }),
        }
    }

    pub(super) fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }

    pub(super) fn shape(&self) -> &Shape {
        &self.shape
    }

    pub(super) fn payload_align(&self) -> u32 {
        self.payload_align
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.writer.is_none()
    }

    fn storage(&self) -> &dyn Storage {
        &*self.files[0]
    }

    /// The span's parts, block by block.
    pub(super) fn parts(&self, at: ByteSpan) -> impl Iterator<Item = Part> + use<> {
        let size = self.shape.block_size;
        let (mut offset, end) = (at.offset, at.offset + at.len);
        std::iter::from_fn(move || {
            let within = offset % size;
            let len = (size - within).min(end - offset);
            let part = Part { block: offset / size, within, len };
            offset += len;
            (len > 0).then_some(part)
        })
    }

    /// Where a part of the block with this entry is.
    pub(super) fn piece(&self, entry: u32, part: &Part) -> Piece {
        let offset = self.shape.data_at(entry) + part.within;
        Piece { len: part.len, place: Place::File { file: FileIndex::TOP, offset } }
    }

    /// Refuses spans that leave the disk or are off its grid.
    pub(super) fn check_span(&self, at: ByteSpan) -> Result<(), ImageError> {
        check_span(at, self.shape.virtual_size, SECTOR as u32)
    }

    /// Refuses what would write to a disk that is read-only or poisoned.
    pub(super) fn check_writable(&self) -> Result<(), ImageError> {
        self.writer().map(drop)
    }

    /// The table entry of a block; `None` when it has no place.
    pub(super) fn entry(&self, block: u64) -> Option<u32> {
        self.table.get(block)
    }

    /// The table entry of a block, which gets its place if it has none.
    pub(super) fn entry_for_writing(&self, block: u64) -> Result<u32, ImageError> {
        match self.table.get(block) {
            Some(entry) => Ok(entry),
            None => self.place(self.writer()?, block),
        }
    }

    pub(super) fn map_read(&self, at: ByteSpan, out: &mut Pieces) -> Result<(), ImageError> {
        self.check_span(at)?;
        for part in self.parts(at) {
            out.push(match self.table.get(part.block) {
                Some(entry) => self.piece(entry, &part),
                None => Piece { len: part.len, place: Place::Zero },
            });
        }
        Ok(())
    }

    pub(super) fn map_write(&self, at: ByteSpan, out: &mut Pieces) -> Result<(), ImageError> {
        let writer = self.writer()?;
        self.check_span(at)?;
        for part in self.parts(at) {
            let entry = match self.table.get(part.block) {
                Some(entry) if self.table.is_marked(part.block) => entry,
                Some(entry) => self.mark(part.block, entry)?,
                None => self.place(writer, part.block)?,
            };
            out.push(self.piece(entry, &part));
        }
        Ok(())
    }

    /// The parts that have a place are for the caller to zero: the table cannot say that a block reads as zeroes, and
    /// taking the block away would lose it for good, since a VHD has no list of free space.
    pub(super) fn map_zero(&self, at: ByteSpan, out: &mut Pieces) -> Result<(), ImageError> {
        self.writer()?;
        self.check_span(at)?;
        for part in self.parts(at) {
            if let Some(entry) = self.table.get(part.block) {
                out.push(self.piece(entry, &part));
            }
        }
        Ok(())
    }

    /// What writing needs; refuses when the disk is read-only or poisoned.
    fn writer(&self) -> Result<&Writer, ImageError> {
        check_writable(self.writer.is_none())?;
        let writer = self.writer.as_ref().expect("looked at just now");
        match writer.poison.get() {
            None => Ok(writer),
            Some(why) => Err(ImageError::new(
                ErrorKind::Poisoned,
                format!(
                    "the image takes no writes since an earlier failure ({why}); close it and open it again"
                ),
            )),
        }
    }

    /// Passes an error on. One that leaves it open what is in the file makes the image unusable for writing.
    pub(super) fn fatal(&self, error: ImageError) -> ImageError {
        if let Some(writer) = self.writer.as_ref().filter(|_| error.kind != ErrorKind::NoSpace) {
            tracing::error!(error = %error.message, "VHD takes no further writes");
            // A failure before this one has said why already.
            let _ = writer.poison.set(error.message.clone());
        }
        error
    }

    /// A sync by somebody else has failed.
    pub(super) fn sync_failed(&self, why: &str) {
        self.fatal(ImageError::new(ErrorKind::Io, format!("syncing the image: {why}")));
    }

    /// Syncs the file.
    pub(super) fn sync(&self) -> Result<(), ImageError> {
        sync(self.storage()).map_err(|e| self.fatal(e))
    }

    /// Makes the bitmap of a block of an earlier session all ones, before its first write in this one: data is read
    /// here whatever the bitmap says, but other readers go by it.
    fn mark(&self, block: u64, entry: u32) -> Result<u32, ImageError> {
        // Without a lock: threads that meet here write the same ones.
        let at = u64::from(entry) * SECTOR;
        let mut bitmap = vec![0; self.shape.bitmap_used() as usize];
        self.storage()
            .read_at(&mut bitmap, at)
            .map_err(|e| ImageError::io(format!("reading the sector bitmap at {at}"), e))?;
        if bitmap.iter().any(|&b| b != 0xff) {
            bitmap.fill(0xff);
            self.storage()
                .write_at(&bitmap, at)
                .map_err(|e| self.fatal(ImageError::io(format!("writing the sector bitmap at {at}"), e)))?;
        }
        self.table.mark(block);
        Ok(entry)
    }

    /// Gives a block its place, unless another thread has done so meanwhile.
    fn place(&self, writer: &Writer, block: u64) -> Result<u32, ImageError> {
        loop {
            {
                let mut ready = lock(&writer.ready);
                if let Some(entry) = self.table.get(block) {
                    return Ok(entry);
                }
                if ready.slots.count > 0 {
                    return self.place_in(writer, &mut ready, block);
                }
            }
            self.grow(writer, 0)?;
        }
    }

    fn place_in(&self, writer: &Writer, ready: &mut Ready, block: u64) -> Result<u32, ImageError> {
        let data = ready.slots.first_data;
        let entry = writer.grid.entry_of(data);
        let at = self.shape.table_offset + block * 4;
        self.storage().write_at(&entry.to_be_bytes(), at).map_err(|e| {
            self.fatal(ImageError::io(format!("writing block table entry {block} at {at}"), e))
        })?;
        ready.slots.first_data += writer.grid.stride;
        ready.slots.count -= 1;
        ready.used_end = data + self.shape.block_size;
        writer.ready_count.store(ready.slots.count, Ordering::Relaxed);
        writer.allocates.store(true, Ordering::Relaxed);
        self.table.mark(block);
        self.table.set(block, entry);
        Ok(entry)
    }

    /// Makes slots, unless there are more than `enough` by the time that the growth lock is taken.
    fn grow(&self, writer: &Writer, enough: u64) -> Result<(), ImageError> {
        let mut growth = lock(&writer.growth);
        let have = lock(&writer.ready).slots.count;
        if have > enough {
            return Ok(());
        }
        let wanted = writer.grid.step().min(self.table.absent().saturating_sub(have)).max(1);
        let made = growth.extend(self.storage(), wanted);
        writer.growth_failed.store(made.is_err(), Ordering::Relaxed);
        let made = made.map_err(|e| self.fatal(e))?;
        let mut ready = lock(&writer.ready);
        let slots = &mut ready.slots;
        if slots.count == 0 {
            *slots = made;
        } else {
            let next = slots.first_data + slots.count * writer.grid.stride;
            assert_eq!(next, made.first_data, "new slots follow the ones that are left");
            slots.count += made.count;
        }
        writer.ready_count.store(slots.count, Ordering::Relaxed);
        Ok(())
    }

    /// Whether so few slots are left that it is time to grow, in a session that uses any.
    pub(super) fn wants_maintenance(&self) -> bool {
        self.writer.as_ref().is_some_and(|w| {
            let ready = w.ready_count.load(Ordering::Relaxed);
            w.allocates.load(Ordering::Relaxed)
                && ready <= w.grid.step() / 2
                && ready < self.table.absent()
                && !w.growth_failed.load(Ordering::Relaxed)
                && w.poison.get().is_none()
        })
    }

    pub(super) fn maintain(&self) -> Result<(), ImageError> {
        if !self.wants_maintenance() {
            return Ok(());
        }
        let writer = self.writer()?;
        self.grow(writer, writer.grid.step() / 2)
    }

    pub(super) fn commit(&self) -> Result<(), ImageError> {
        if self.writer.is_none() {
            return Ok(());
        }
        self.writer()?;
        self.sync()
    }

    pub(super) fn close(&self) -> Result<(), ImageError> {
        if self.writer.is_none() {
            return Ok(());
        }
        let writer = self.writer()?;
        let mut growth = lock(&writer.growth);
        let mut ready = lock(&writer.ready);
        if !growth.moved {
            return self.sync();
        }
        ready.slots.count = 0;
        writer.ready_count.store(0, Ordering::Relaxed);
        writer.allocates.store(false, Ordering::Relaxed);
        growth.shrink(self.storage(), ready.used_end).map_err(|e| self.fatal(e))
    }

    pub(super) fn next_extent(&self, offset: u64) -> Result<Option<Extent>, ImageError> {
        let Shape { virtual_size, block_size, blocks, .. } = self.shape;
        if offset >= virtual_size {
            return Ok(None);
        }
        let (block, within) = (offset / block_size, offset % block_size);
        let (state, len) = match self.table.get(block) {
            Some(entry) => {
                state_in_file(self.storage(), self.shape.data_at(entry) + within, block_size - within)?
            }
            None => {
                // A block may get its place between the two looks at the table: then the run is its first sector,
                // which was absent at the first look.
                let run = self.table.absent_run(block, blocks.min(block + ABSENT_RUN_MAX));
                (AllocState::Absent, (run * block_size).saturating_sub(within).max(SECTOR))
            }
        };
        let len = len.min(virtual_size - offset);
        Ok(Some(Extent { span: ByteSpan::new(offset, len), state }))
    }

    /// Bytes of the file that blocks take.
    pub(super) fn allocated_bytes(&self) -> u64 {
        self.table.present() * self.shape.block_size
    }
}
