//! Copying and comparing whole images: synchronous, thin, for images that nothing else writes.
//!
//! ```text
//!   planner:          next_extent ─► what is absent or zero ───────────────────────────┐
//!                                └─► up to 1 MiB that may hold something ─┐            │
//!   copiers (a few):  share its blocks, or read ─► find zeroes ─► write ◄─┘            │
//!   caller's thread:  progress ◄── what was done ◄──────────────────────┴──────────────┘
//!   flusher:          sync every 128 MiB
//! ```
//!
//! Several copiers keep the disk busy with reads and writes at the same time.
//!
//! Nothing is written for what the source does not hold or holds as zeroes, so the target, which has to be fresh, gets
//! no space for it, whatever the two formats.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread;

use crate::payload_files::{PageBuffer, PayloadFiles, Shared, may_share, share_payload};
use crate::{AllocState, ByteSpan, ErrorKind, Image, ImageError, Pieces, Place, ZeroMode};

/// What is read or compared at a time, in bytes.
const CHUNK: u64 = 1 << 20;
/// Threads that copy, each of which reads or writes one [`CHUNK`] at a time.
const COPIERS: usize = 6;
/// Chunks that are planned ahead.
const CHUNKS_AHEAD: usize = 16;
/// How much is written before the next sync beside the writing, in bytes.
const FLUSH_EVERY: u64 = 128 << 20;
/// The granule in which zeroes are found, in bytes: 16 KiB keeps more holes than the usual 64 KiB and still writes long
/// runs.
const ZERO_GRANULE: usize = 16 << 10;
/// Threads that compare.
const COMPARERS: usize = 4;

/// How far a copy or a comparison is. All in bytes of the virtual disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CopyProgress {
    /// Size of what is gone through.
    pub bytes_total: u64,
    /// What is dealt with, skipped ranges included.
    pub bytes_done: u64,
    /// What was written (when comparing: read on both sides).
    pub bytes_copied: u64,
    /// What was skipped because it is absent or zero.
    pub bytes_zero: u64,
}

/// What a finished copy did, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyOutcome {
    /// What was written to the target.
    pub bytes_copied: u64,
    /// What was skipped because it is absent or zero.
    pub bytes_zero: u64,
}

/// Why a copy or comparison ended early.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The source (when comparing: the first image) failed.
    #[error("source: {0}")]
    Source(#[source] ImageError),
    /// The target (when comparing: the second image) failed.
    #[error("target: {0}")]
    Target(#[source] ImageError),
    /// The caller's progress function said so.
    #[error("cancelled")]
    Cancelled,
}

/// The answer of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Comparison {
    /// Offset of the first byte that differs; what one disk lacks in size counts as zeroes.
    pub first_difference: Option<u64>,
    /// Sizes of the two disks in bytes.
    pub sizes: (u64, u64),
}

impl Comparison {
    /// Whether contents and sizes are the same.
    pub fn is_same(&self) -> bool {
        self.first_difference.is_none() && self.sizes.0 == self.sizes.1
    }
}

/// Fills `buf` from `offset` of the virtual disk.
///
/// # Errors
/// [`ErrorKind::OutOfRange`]; what the files say.
pub fn read_payload(image: &dyn Image, offset: u64, buf: &mut [u8]) -> Result<(), ImageError> {
    let mut pieces = Pieces::new();
    image.map_read(ByteSpan::new(offset, buf.len() as u64), &mut pieces)?;
    let mut rest = buf;
    for piece in pieces.iter() {
        let (part, tail) = rest.split_at_mut(piece.len as usize);
        match piece.place {
            Place::Zero => part.fill(0),
            Place::Parent => return Err(no_parent()),
            Place::File { file, offset } => {
                image.files()[usize::from(file.0)].read_at(part, offset).map_err(|e| {
                    ImageError::io(format!("reading {} bytes at {offset} of the file", part.len()), e)
                })?
            }
        }
        rest = tail;
    }
    assert!(rest.is_empty(), "a map covers the whole span");
    Ok(())
}

/// Writes `data` at `offset` of the virtual disk. Durable after [`Image::commit`].
///
/// # Errors
/// What [`Image::map_write`] and the file say.
pub fn write_payload(image: &dyn Image, offset: u64, data: &[u8]) -> Result<(), ImageError> {
    let mut pieces = Pieces::new();
    let at = ByteSpan::new(offset, data.len() as u64);
    image.map_write(at, &mut pieces)?;
    let mut rest = data;
    for piece in pieces.iter() {
        let (part, tail) = rest.split_at(piece.len as usize);
        let Place::File { file, offset } = piece.place else {
            panic!("a map for writing names places in files only");
        };
        image.files()[usize::from(file.0)].write_at(part, offset).map_err(|e| {
            ImageError::io(format!("writing {} bytes at {offset} of the file", part.len()), e)
        })?;
        rest = tail;
    }
    assert!(rest.is_empty(), "a map covers the whole span");
    image.wrote(at)
}

pub(crate) fn no_parent() -> ImageError {
    ImageError::new(ErrorKind::Parent, "a differencing image can't be read without its parent")
}

/// Makes `len` bytes at `offset` of the virtual disk read as zeroes, giving space back where that is possible. Durable
/// after [`Image::commit`].
///
/// # Errors
/// What [`Image::map_zero`] and the file say.
pub fn zero_payload(image: &dyn Image, offset: u64, len: u64) -> Result<(), ImageError> {
    let mut pieces = Pieces::new();
    let at = ByteSpan::new(offset, len);
    image.map_zero(at, ZeroMode::Unmap, &mut pieces)?;
    for piece in pieces.iter() {
        if let Place::File { file, offset } = piece.place {
            image.files()[usize::from(file.0)].punch(offset, piece.len).map_err(|e| {
                ImageError::io(format!("zeroing {} bytes at {offset} of the file", piece.len), e)
            })?;
        }
    }
    image.wrote(at)
}

/// What is next on a disk.
enum Chunk {
    /// So many bytes at this offset, which may hold something.
    Data(u64, u64),
    /// So many bytes at this offset that a layer holds as zeroes, whatever its parent has there.
    Zero(u64, u64),
    /// So many bytes that need nothing.
    Nothing(u64),
}

impl Chunk {
    fn len(&self) -> u64 {
        match self {
            Self::Data(_, len) | Self::Zero(_, len) | Self::Nothing(len) => *len,
        }
    }
}

/// Copies all of `source` to `target`, which has to read as zeroes and be no smaller, and makes the copy durable. The
/// caller closes both. `progress` is called after every chunk of 1 MiB or run of nothing, in the caller's thread.
///
/// # Errors
/// [`CopyError::Target`] with [`ErrorKind::InvalidParameter`] for a target that is too small; [`CopyError::Cancelled`]
/// when `progress` says `Break`; what either image says.
pub fn copy(
    source: &dyn Image,
    target: &dyn Image,
    progress: &mut dyn FnMut(CopyProgress) -> ControlFlow<()>,
) -> Result<CopyOutcome, CopyError> {
    let grid = common_grid(source, target);
    copy_chunks(source, target, false, &|at, size| next_chunk(source, at, size, grid), progress)
}

/// Copies what the layer `source` has of its own, zeroes included, to `target`, and leaves the rest to the parents of both,
/// which have to have the same content. `target` is a fresh image, on its parents if it has any, and has the same sectors.
///
/// # Errors
/// As [`copy()`].
pub fn copy_layer(
    source: &dyn Image,
    target: &dyn Image,
    progress: &mut dyn FnMut(CopyProgress) -> ControlFlow<()>,
) -> Result<CopyOutcome, CopyError> {
    let sectors = [source, target].map(|image| image.geometry().logical_sector_size);
    if sectors[0] != sectors[1] {
        let message = format!("its sectors have {} bytes, and the source's have {}", sectors[1], sectors[0]);
        return Err(CopyError::Target(ImageError::new(ErrorKind::InvalidParameter, message)));
    }
    copy_chunks(source, target, true, &|at, _| next_own_chunk(source, at), progress)
}

/// What comes next at an offset of a disk of this size.
type NextChunk<'a> = &'a (dyn Fn(u64, u64) -> Result<Chunk, ImageError> + Sync);

/// What was done with a chunk, in bytes.
struct Done {
    written: u64,
    zero: u64,
}

fn copy_chunks(
    source: &dyn Image,
    target: &dyn Image,
    keep_zeroes: bool,
    next: NextChunk<'_>,
    progress: &mut dyn FnMut(CopyProgress) -> ControlFlow<()>,
) -> Result<CopyOutcome, CopyError> {
    let size = source.geometry().virtual_size;
    fits(size, target).map_err(CopyError::Target)?;
    let mut now = CopyProgress { bytes_total: size, ..CopyProgress::default() };
    let copying = Copying {
        source: PayloadFiles::of(source),
        target: PayloadFiles::of(target),
        keep_zeroes,
        shares: AtomicBool::new(may_share(target)),
        writing: RwLock::new(()),
        upkeep: Mutex::new(()),
    };
    thread::scope(|scope| {
        let (planned, chunks) = sync_channel(CHUNKS_AHEAD);
        let (done, ends) = sync_channel(CHUNKS_AHEAD);
        let (grown, rounds) = sync_channel(1);
        // The copiers own the end of the plan: when the last one goes, the planner goes too.
        let chunks = Arc::new(Mutex::new(chunks));
        for _ in 0..COPIERS {
            let (chunks, done, copying) = (chunks.clone(), done.clone(), &copying);
            scope.spawn(move || copying.run(&chunks, &done));
        }
        drop(chunks);
        scope.spawn(move || plan(size, next, &planned, &done));
        let flusher = scope.spawn(move || flush_now_and_then(target, &rounds));
        let copied = follow(ends, &grown, &mut now, progress);
        drop(grown);
        let flushed = flusher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        copied.and(flushed.map_err(CopyError::Target))
    })?;
    assert_eq!(now.bytes_done, size, "the plan covers the whole disk");
    target.commit().map_err(CopyError::Target)?;
    Ok(CopyOutcome { bytes_copied: now.bytes_copied, bytes_zero: now.bytes_zero })
}

/// Takes note of what is done, until all is or something fails. Returning drops `ends`, which ends the copiers.
fn follow(
    ends: Receiver<Result<Done, CopyError>>,
    grown: &SyncSender<()>,
    now: &mut CopyProgress,
    progress: &mut dyn FnMut(CopyProgress) -> ControlFlow<()>,
) -> Result<(), CopyError> {
    let mut unflushed = 0;
    for end in ends {
        let Done { written, zero } = end?;
        now.bytes_copied += written;
        now.bytes_zero += zero;
        now.bytes_done += written + zero;
        unflushed += written;
        // A flusher that is busy is asked again with the next chunk.
        if unflushed >= FLUSH_EVERY && grown.try_send(()).is_ok() {
            unflushed = 0;
        }
        if progress(*now).is_break() {
            return Err(CopyError::Cancelled);
        }
    }
    Ok(())
}

/// Goes through the disk, in order, until its end or until nobody listens any more.
fn plan(
    size: u64,
    next: NextChunk<'_>,
    planned: &SyncSender<Chunk>,
    done: &SyncSender<Result<Done, CopyError>>,
) {
    let mut offset = 0;
    while offset < size {
        let is_heard = match next(offset, size) {
            Ok(chunk) => {
                offset += chunk.len();
                match chunk {
                    Chunk::Nothing(zero) => done.send(Ok(Done { written: 0, zero })).is_ok(),
                    chunk => planned.send(chunk).is_ok(),
                }
            }
            Err(e) => {
                offset = size;
                done.send(Err(CopyError::Source(e))).is_ok()
            }
        };
        if !is_heard {
            return;
        }
    }
}

/// What the copiers share.
struct Copying<'a> {
    source: PayloadFiles<'a>,
    target: PayloadFiles<'a>,
    /// Zeroes are written too: they hide what a parent has.
    keep_zeroes: bool,
    /// As far as is known the file system can share blocks.
    shares: AtomicBool,
    /// Held for reading while something is written to the target.
    writing: RwLock<()>,
    /// Held while the target is maintained.
    upkeep: Mutex<()>,
}

impl Copying<'_> {
    fn run(&self, chunks: &Mutex<Receiver<Chunk>>, done: &SyncSender<Result<Done, CopyError>>) {
        let mut buffer = PageBuffer::new(CHUNK as usize);
        loop {
            let next = chunks.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(chunk) = next else { return };
            let end = self.carry_out(&chunk, &mut buffer);
            let has_failed = end.is_err();
            if done.send(end).is_err() || has_failed {
                return;
            }
        }
    }

    fn carry_out(&self, chunk: &Chunk, buffer: &mut PageBuffer) -> Result<Done, CopyError> {
        let done = match *chunk {
            Chunk::Nothing(zero) => Done { written: 0, zero },
            Chunk::Zero(offset, len) => {
                let _writing = self.writing.read().unwrap_or_else(PoisonError::into_inner);
                zero_payload(self.target.image(), offset, len).map_err(CopyError::Target)?;
                Done { written: 0, zero: len }
            }
            Chunk::Data(offset, len) => {
                let written = match self.share(ByteSpan::new(offset, len)).map_err(CopyError::Target)? {
                    true => len,
                    false => self.copy(offset, buffer.first(len as usize))?,
                };
                Done { written, zero: len - written }
            }
        };
        self.maintain().map_err(CopyError::Target)?;
        Ok(done)
    }

    /// Whether the target shares these blocks of the source now.
    fn share(&self, at: ByteSpan) -> Result<bool, ImageError> {
        if !self.shares.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let _writing = self.writing.read().unwrap_or_else(PoisonError::into_inner);
        let shared = share_payload(self.source.image(), self.target.image(), at)?;
        if shared == Shared::Never {
            self.shares.store(false, Ordering::Relaxed);
        }
        Ok(shared == Shared::Yes)
    }

    /// How much was written.
    fn copy(&self, offset: u64, data: &mut [u8]) -> Result<u64, CopyError> {
        self.source.read(offset, data).map_err(CopyError::Source)?;
        let _writing = self.writing.read().unwrap_or_else(PoisonError::into_inner);
        write_runs(&self.target, offset, data, self.keep_zeroes).map_err(CopyError::Target)
    }

    /// Looks after the target's log and the like, unless another copier does.
    fn maintain(&self) -> Result<(), ImageError> {
        if !self.target.image().wants_maintenance() {
            return Ok(());
        }
        let Ok(_upkeep) = self.upkeep.try_lock() else { return Ok(()) };
        // Whoever wrote before that has ended when the lock was had.
        let quiesce = || drop(self.writing.write().unwrap_or_else(PoisonError::into_inner));
        self.target.image().maintain(&quiesce)
    }
}

/// Syncs the target beside the writing, so that the disk is busy from the start and the memory of the host is not
/// filled with what is still to be written.
fn flush_now_and_then(target: &dyn Image, rounds: &Receiver<()>) -> Result<(), ImageError> {
    for () in rounds {
        let mut token = Some(target.sync_begin());
        while let Some(begun) = token {
            target.files()[0].sync().map_err(|e| ImageError::io("cannot sync the target", e))?;
            token = target.sync_done(begun)?;
        }
    }
    Ok(())
}

fn fits(size: u64, target: &dyn Image) -> Result<(), ImageError> {
    let geometry = target.geometry();
    let needed = size.next_multiple_of(u64::from(geometry.logical_sector_size));
    if geometry.virtual_size >= needed {
        return Ok(());
    }
    Err(ImageError::new(
        ErrorKind::InvalidParameter,
        format!("the disk has {} bytes, and {needed} are needed to hold the source", geometry.virtual_size),
    ))
}

fn next_chunk(source: &dyn Image, offset: u64, size: u64, grid: u64) -> Result<Chunk, ImageError> {
    let nothing = empty_run(source, offset, size, grid)?;
    if nothing > 0 {
        return Ok(Chunk::Nothing(nothing));
    }
    Ok(Chunk::Data(offset, data_run_at(source, offset, size, grid)?))
}

/// What a layer has of its own at `offset`.
fn next_own_chunk(layer: &dyn Image, offset: u64) -> Result<Chunk, ImageError> {
    let extent = layer.next_extent(offset)?.expect("the offset lies within the disk");
    let len = extent.span.len;
    Ok(match extent.state {
        AllocState::Absent => Chunk::Nothing(len),
        AllocState::Zero => Chunk::Zero(offset, len),
        AllocState::Data => Chunk::Data(offset, len.min(CHUNK)),
    })
}

/// What both images can address: the larger of their sectors.
fn common_grid(a: &dyn Image, b: &dyn Image) -> u64 {
    u64::from(a.geometry().logical_sector_size.max(b.geometry().logical_sector_size))
}

/// Length of the run of nothing (absent or zero) at `offset`, up to `end` or a multiple of `grid`; 0 where there is data.
/// What an image lacks in size is nothing.
fn empty_run(image: &dyn Image, offset: u64, end: u64, grid: u64) -> Result<u64, ImageError> {
    let mut to = offset;
    while to < end {
        match image.next_extent(to)? {
            Some(extent) if extent.state == AllocState::Data => break,
            Some(extent) => to += extent.span.len,
            None => to = end,
        }
    }
    Ok(if to >= end { end - offset } else { (to - offset) / grid * grid })
}

/// How much to read at `offset`, where there is data: up to its end, rounded up to `grid`, at most a chunk.
fn data_run_at(image: &dyn Image, offset: u64, end: u64, grid: u64) -> Result<u64, ImageError> {
    let run = match image.next_extent(offset)? {
        Some(extent) if extent.state == AllocState::Data => extent.span.len,
        _ => grid,
    };
    Ok(run.min(CHUNK).next_multiple_of(grid).min(end - offset))
}

/// Writes the runs of `data` that are not zero, in granules, and with `keep_zeroes` the others as zeroes. Returns how many
/// bytes were written.
fn write_runs(
    target: &PayloadFiles<'_>,
    offset: u64,
    data: &[u8],
    keep_zeroes: bool,
) -> Result<u64, ImageError> {
    let sector = target.image().geometry().logical_sector_size as usize;
    let mut written = 0;
    let mut at = 0;
    while at < data.len() {
        let zero = zero_run(&data[at..]);
        if keep_zeroes && zero > 0 {
            zero_payload(target.image(), offset + at as u64, zero as u64)?;
        }
        at += zero;
        let run = data_run(&data[at..]);
        if run == 0 {
            continue;
        }
        let part = &data[at..at + run];
        if run.is_multiple_of(sector) {
            target.write(offset + at as u64, part)?;
        } else {
            // The source ends inside a sector of the target.
            let mut padded = part.to_vec();
            padded.resize(run.next_multiple_of(sector), 0);
            target.write(offset + at as u64, &padded)?;
        }
        written += run as u64;
        at += run;
    }
    Ok(written)
}

/// Length of the granules of zeroes that `data` begins with.
fn zero_run(data: &[u8]) -> usize {
    data.chunks(ZERO_GRANULE).take_while(|g| is_zero(g)).map(<[u8]>::len).sum()
}

/// Length of the granules with content that `data` begins with.
fn data_run(data: &[u8]) -> usize {
    data.chunks(ZERO_GRANULE).take_while(|g| !is_zero(g)).map(<[u8]>::len).sum()
}

fn is_zero(data: &[u8]) -> bool {
    static ZEROES: [u8; ZERO_GRANULE] = [0; ZERO_GRANULE];
    data == &ZEROES[..data.len()]
}

/// Compares two images byte by byte, skipping what neither holds. Where the sizes differ, the rest of the larger one is
/// compared with zeroes.
///
/// # Errors
/// [`CopyError::Source`] and [`CopyError::Target`] when the first or second image cannot be read,
/// [`CopyError::Cancelled`] when `progress` says `Break`.
pub fn compare(
    first: &dyn Image,
    second: &dyn Image,
    progress: &mut dyn FnMut(CopyProgress) -> ControlFlow<()>,
) -> Result<Comparison, CopyError> {
    let sizes = (first.geometry().virtual_size, second.geometry().virtual_size);
    let work = Comparing {
        first: PayloadFiles::of(first),
        second: PayloadFiles::of(second),
        total: sizes.0.max(sizes.1),
        grid: common_grid(first, second),
        next: AtomicU64::new(0),
        difference: AtomicU64::new(u64::MAX),
        stop: AtomicBool::new(false),
    };
    let mut now = CopyProgress { bytes_total: work.total, ..CopyProgress::default() };
    let mut failed = None;
    thread::scope(|scope| {
        let (steps, done) = sync_channel(COMPARERS * 2);
        for _ in 0..COMPARERS {
            let steps = steps.clone();
            scope.spawn(|| work.run(steps));
        }
        drop(steps);
        for step in done {
            match step {
                Ok(step) => {
                    now.bytes_copied += step.read;
                    now.bytes_zero += step.skipped;
                    now.bytes_done += step.read + step.skipped;
                    if progress(now).is_break() {
                        failed.get_or_insert(CopyError::Cancelled);
                    }
                }
                Err(e) => drop(failed.get_or_insert(e)),
            }
            if failed.is_some() {
                work.stop.store(true, Ordering::Relaxed);
            }
        }
    });
    match failed {
        Some(e) => Err(e),
        None => {
            let at = work.difference.into_inner();
            Ok(Comparison { first_difference: (at != u64::MAX).then_some(at), sizes })
        }
    }
}

/// The part of a comparison that its threads share.
struct Comparing<'a> {
    first: PayloadFiles<'a>,
    second: PayloadFiles<'a>,
    total: u64,
    /// What both can address.
    grid: u64,
    /// Where the next stripe begins.
    next: AtomicU64,
    /// The lowest offset found to differ.
    difference: AtomicU64,
    stop: AtomicBool,
}

/// What one step of a comparison went through, in bytes.
struct Step {
    read: u64,
    skipped: u64,
}

impl Comparing<'_> {
    /// What a thread takes at a time: enough that holes are skipped in large steps.
    const STRIPE: u64 = 16 * CHUNK;

    fn run(&self, steps: SyncSender<Result<Step, CopyError>>) {
        let mut buffers = (PageBuffer::new(CHUNK as usize), PageBuffer::new(CHUNK as usize));
        while !self.stop.load(Ordering::Relaxed) {
            let from = self.next.fetch_add(Self::STRIPE, Ordering::Relaxed);
            // Stripes are taken in order, so nothing behind a difference can come before it.
            if from >= self.total.min(self.difference.load(Ordering::Relaxed)) {
                return;
            }
            let to = (from + Self::STRIPE).min(self.total);
            let step = self.stripe(from, to, &mut buffers);
            let failed = step.is_err();
            if steps.send(step).is_err() || failed {
                return;
            }
        }
    }

    fn stripe(&self, from: u64, to: u64, buffers: &mut (PageBuffer, PageBuffer)) -> Result<Step, CopyError> {
        let (first, second) = (self.first.image(), self.second.image());
        let mut step = Step { read: 0, skipped: 0 };
        let mut at = from;
        while at < to {
            let a = empty_run(first, at, to, self.grid).map_err(CopyError::Source)?;
            let b = empty_run(second, at, to, self.grid).map_err(CopyError::Target)?;
            let both = a.min(b);
            if both > 0 {
                step.skipped += both;
                at += both;
                continue;
            }
            // One of them has data here; the other may be known to have none, and is not read then.
            let run = match a {
                0 => data_run_at(first, at, to, self.grid).map_err(CopyError::Source)?,
                _ => data_run_at(second, at, to, self.grid).map_err(CopyError::Target)?,
            };
            let len = if a.max(b) > 0 { run.min(a.max(b)) } else { run };
            let (left, right) = (buffers.0.first(len as usize), buffers.1.first(len as usize));
            read_or_zero(&self.first, a, at, left).map_err(CopyError::Source)?;
            read_or_zero(&self.second, b, at, right).map_err(CopyError::Target)?;
            step.read += len;
            if left != right {
                let within = left.iter().zip(right.iter()).take_while(|(l, r)| l == r).count() as u64;
                self.difference.fetch_min(at + within, Ordering::Relaxed);
                return Ok(step);
            }
            at += len;
        }
        Ok(step)
    }
}

/// Reads, unless the first `empty` bytes, which are not fewer than asked for, are known to be zeroes. What the image
/// lacks in size is zeroes too.
fn read_or_zero(image: &PayloadFiles<'_>, empty: u64, offset: u64, buf: &mut [u8]) -> Result<(), ImageError> {
    let held = image.image().geometry().virtual_size.saturating_sub(offset).min(buf.len() as u64);
    let held = if empty > 0 { 0 } else { held };
    let (data, lacking) = buf.split_at_mut(held as usize);
    lacking.fill(0);
    if data.is_empty() { Ok(()) } else { image.read(offset, data) }
}
