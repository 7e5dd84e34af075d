//! The files of an image that nobody serves, for reading and writing much of its payload.
//!
//! Copies go past the page cache where they can: through it each byte would be copied twice more, and what the machine's
//! other programs keep there would be driven out. As with images that are served, that is possible where payload shares no
//! page with metadata, which goes through the cache. Blocks that source and target have at the same offset of a page can be
//! shared instead, on file systems that know how to (XFS, Btrfs): then nothing is copied at all.

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroU64;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::{Advice, MmapMut};
use nix::libc;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, XFS_SUPER_MAGIC, fstatfs};

use crate::{ByteSpan, Image, ImageError, Piece, Pieces, Place};

/// What direct I/O and shared blocks are aligned to here, in bytes: no file system in use wants more.
const GRID: u64 = 4096;

/// A huge page, in bytes, of x86-64 and of most arm64 systems.
const HUGE: usize = 2 << 20;

/// Memory for direct I/O, in huge pages where the system has them: the kernel looks up every page of a buffer, which is a
/// good part of what copying costs, and a huge page only once.
pub(crate) struct PageBuffer {
    memory: MmapMut,
    start: usize,
    len: usize,
}

impl PageBuffer {
    /// Zeroes; `len` in bytes. As everywhere, no memory is no error that could be handled.
    pub(crate) fn new(len: usize) -> Self {
        let memory = MmapMut::map_anon(len.next_multiple_of(HUGE) + HUGE)
            .unwrap_or_else(|e| panic!("no memory for a buffer of {len} bytes: {e}"));
        // Only a saving: where the system has none, it says so.
        let _ = memory.advise(Advice::HugePage);
        let start = memory.as_ptr().align_offset(HUGE);
        assert!(start <= HUGE, "bytes can be aligned to a huge page");
        Self { memory, start, len }
    }

    /// The first `len` bytes, which must not be more than there are.
    pub(crate) fn first(&mut self, len: usize) -> &mut [u8] {
        assert!(len <= self.len, "{len} bytes of {}", self.len);
        &mut self.memory[self.start..self.start + len]
    }
}

/// An image, and its files opened a second time.
#[derive(Debug)]
pub(crate) struct PayloadFiles<'a> {
    image: &'a dyn Image,
    /// One for each of [`Image::files`], where direct I/O is possible.
    direct: Vec<Option<File>>,
    /// The file system has taken direct I/O so far.
    takes_direct: AtomicBool,
}

impl<'a> PayloadFiles<'a> {
    /// Opens the image's files past the page cache where that is possible.
    pub(crate) fn of(image: &'a dyn Image) -> Self {
        let layers: Vec<&dyn Image> = match image.as_chain() {
            Some(chain) => chain.layers().iter().map(|layer| &**layer).collect(),
            None => vec![image],
        };
        let files = layers.iter().zip(image.files());
        let direct = files.map(|(layer, storage)| storage.file().and_then(|file| open_direct(*layer, file)));
        Self { image, direct: direct.collect(), takes_direct: AtomicBool::new(true) }
    }

    /// The image.
    pub(crate) fn image(&self) -> &'a dyn Image {
        self.image
    }

    /// [`crate::read_payload`].
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ImageError> {
        let mut pieces = Pieces::new();
        self.image.map_read(ByteSpan::new(offset, buf.len() as u64), &mut pieces)?;
        let mut rest = buf;
        for piece in pieces.iter() {
            let (part, tail) = rest.split_at_mut(piece.len as usize);
            match piece.place {
                Place::Zero => part.fill(0),
                Place::Parent => return Err(crate::copy::no_parent()),
                Place::File { file, offset } => self.read_at(usize::from(file.0), part, offset)?,
            }
            rest = tail;
        }
        assert!(rest.is_empty(), "a map covers the whole span");
        Ok(())
    }

    fn read_at(&self, file: usize, part: &mut [u8], offset: u64) -> Result<(), ImageError> {
        let len = part.len();
        let done = match self.direct_for(file, part, offset).map(|direct| direct.read_exact_at(part, offset))
        {
            Some(Err(e)) if is_refused(&e) => {
                self.takes_direct.store(false, Ordering::Relaxed);
                self.image.files()[file].read_at(part, offset)
            }
            Some(done) => done,
            None => self.image.files()[file].read_at(part, offset),
        };
        done.map_err(|e| ImageError::io(format!("reading {len} bytes at {offset} of the file"), e))
    }

    /// [`crate::write_payload`].
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Result<(), ImageError> {
        let mut pieces = Pieces::new();
        let at = ByteSpan::new(offset, data.len() as u64);
        self.image.map_write(at, &mut pieces)?;
        let mut rest = data;
        for piece in pieces.iter() {
            let (part, tail) = rest.split_at(piece.len as usize);
            let (file, offset) = in_file(piece);
            self.write_at(file, part, offset).map_err(|e| {
                ImageError::io(format!("writing {} bytes at {offset} of the file", part.len()), e)
            })?;
            rest = tail;
        }
        assert!(rest.is_empty(), "a map covers the whole span");
        self.image.wrote(at)
    }

    fn write_at(&self, file: usize, part: &[u8], offset: u64) -> io::Result<()> {
        if let Some(direct) = self.direct_for(file, part, offset) {
            match direct.write_all_at(part, offset) {
                Err(e) if is_refused(&e) => self.takes_direct.store(false, Ordering::Relaxed),
                done => return done,
            }
        }
        self.image.files()[file].write_at(part, offset)
    }

    fn direct_for(&self, file: usize, part: &[u8], offset: u64) -> Option<&File> {
        let on_grid = (part.as_ptr() as u64).is_multiple_of(GRID)
            && (part.len() as u64).is_multiple_of(GRID)
            && offset.is_multiple_of(GRID);
        let direct = self.direct[file].as_ref().filter(|_| on_grid)?;
        self.takes_direct.load(Ordering::Relaxed).then_some(direct)
    }
}

/// The file is opened again, and not its descriptor copied, because the flag belongs to the opening.
fn open_direct(layer: &dyn Image, file: &File) -> Option<File> {
    if u64::from(layer.geometry().payload_align) < GRID {
        return None;
    }
    let mut options = OpenOptions::new();
    options.read(true).write(!layer.is_read_only()).custom_flags(libc::O_DIRECT);
    options.open(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()
}

/// Whether a file system wants another alignment, or no direct I/O at all. All of what was asked for is then done through the
/// cache.
fn is_refused(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

fn in_file(piece: &Piece) -> (usize, u64) {
    let Place::File { file, offset } = piece.place else {
        panic!("a map for writing names places in files only");
    };
    (usize::from(file.0), offset)
}

/// Whether the target lies on a file system that can share blocks. Elsewhere it is not tried: by then the target has given room
/// to what may turn out to be zeroes.
pub fn may_share(target: &dyn Image) -> bool {
    let kind = target.files()[0].file().and_then(|file| fstatfs(file).ok()).map(|fs| fs.filesystem_type());
    matches!(kind, Some(XFS_SUPER_MAGIC | BTRFS_SUPER_MAGIC))
}

/// Has `target` share the blocks that hold this span of `source`, as [`crate::write_payload`] of what is read there. The answer
/// is whether that was done: not where the span is not all in files on the grid of pages, and not where the file system
/// cannot; the span is to be copied then. What was shared of it does no harm. Both images stay files of their own: whoever
/// writes to one leaves the other as it is (FICLONERANGE of `ioctl_ficlonerange(2)`).
///
/// Source and target may be used by others meanwhile, as with a copy: a write of this span that is under way may be in what is
/// shared or not. Blocks for as long as the file system takes to write back what its cache has of the span.
///
/// # Errors
/// What the maps say.
pub fn share_payload(source: &dyn Image, target: &dyn Image, at: ByteSpan) -> Result<Shared, ImageError> {
    let sector = u64::from(target.geometry().logical_sector_size);
    if !at.len.is_multiple_of(sector) {
        return Ok(Shared::No);
    }
    let mut from = Pieces::new();
    source.map_read(at, &mut from)?;
    let on_grid = |piece: &Piece| match piece.place {
        Place::File { offset, .. } => offset.is_multiple_of(GRID) && piece.len.is_multiple_of(GRID),
        Place::Zero | Place::Parent => false,
    };
    if !at.offset.is_multiple_of(GRID) || !from.iter().all(on_grid) {
        return Ok(Shared::No);
    }
    let mut to = Pieces::new();
    target.map_write(at, &mut to)?;
    if !to.iter().all(on_grid) {
        return Ok(Shared::No);
    }
    let (mut sources, mut targets) = (from.iter().copied(), to.iter().copied());
    let (mut here, mut there) = (sources.next(), targets.next());
    while let (Some(a), Some(b)) = (&mut here, &mut there) {
        let ((a_file, a_at), (b_file, b_at)) = (in_file(a), in_file(b));
        let len = a.len.min(b.len);
        let (Some(a_file), Some(b_file)) = (source.files()[a_file].file(), target.files()[b_file].file())
        else {
            return Ok(Shared::Never);
        };
        let Some(length) = NonZeroU64::new(len) else { break };
        let shared = reflink_copy::ReflinkBlockBuilder::new(a_file, b_file, length)
            .from_offset(a_at)
            .to_offset(b_at)
            .reflink_block();
        if let Err(e) = shared {
            // Whatever stands in the way does so again, or the copy says what it is.
            tracing::debug!("blocks are not shared: {e}");
            return Ok(Shared::Never);
        }
        cut(&mut here, len, &mut sources);
        cut(&mut there, len, &mut targets);
    }
    target.wrote(at)?;
    Ok(Shared::Yes)
}

/// Whether blocks are shared now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shared {
    /// They are.
    Yes,
    /// Not these.
    No,
    /// The file system cannot.
    Never,
}

/// Takes `len` bytes off the front of a piece, and goes on to the next one when nothing is left of it.
fn cut(piece: &mut Option<Piece>, len: u64, rest: &mut impl Iterator<Item = Piece>) {
    let Some(now) = piece else { return };
    now.len -= len;
    if let Place::File { offset, .. } = &mut now.place {
        *offset += len;
    }
    if now.len == 0 {
        *piece = rest.next();
    }
}
