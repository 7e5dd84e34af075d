//! The map: what a codec answers, in the words that every format shares.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{ImageError, ParentLink, Storage};

/// A range of the virtual disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSpan {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl ByteSpan {
    /// A span of `len` bytes at `offset`.
    pub const fn new(offset: u64, len: u64) -> Self {
        Self { offset, len }
    }

    /// One past the last byte; `None` when it does not fit in 64 bits.
    pub const fn end(self) -> Option<u64> {
        self.offset.checked_add(self.len)
    }
}

/// Which file of a parent chain: 0 is the image itself, 1 its parent, and so on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileIndex(pub u16);

impl FileIndex {
    /// The image itself, the newest of its chain.
    pub const TOP: Self = Self(0);
}

/// Where a piece of the virtual disk lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// At this byte offset of this file of the chain.
    File {
        /// Which file.
        file: FileIndex,
        /// Byte offset in it.
        offset: u64,
    },
    /// Nowhere: it reads as zeroes.
    Zero,
    /// In the parent. Only a single layer answers so (see [`crate::Chain`], which looks there); an image that is used
    /// as a disk never does.
    Parent,
}

/// One mapped range: `len` bytes that lie together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Length in bytes, never 0.
    pub len: u64,
    /// Where they are.
    pub place: Place,
}

/// The pieces of a span in order. Reused from call to call, so that mapping does not allocate.
#[derive(Debug, Default, Clone)]
pub struct Pieces {
    list: Vec<Piece>,
    /// Pieces before this one are another layer's: nothing is joined to them.
    floor: usize,
    /// Emptied lists, kept for their memory.
    spare: Vec<Vec<Piece>>,
}

impl Pieces {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Empties the list, keeping its memory.
    pub fn clear(&mut self) {
        self.list.clear();
        self.floor = 0;
    }

    /// Appends a piece, joining it to the last one where they touch. A length of 0 is ignored.
    pub fn push(&mut self, piece: Piece) {
        if piece.len == 0 {
            return;
        }
        if let Some(last) = self.list[self.floor..].last_mut() {
            let joins = match (last.place, piece.place) {
                (Place::Zero, Place::Zero) | (Place::Parent, Place::Parent) => true,
                (Place::File { file: a, offset }, Place::File { file: b, offset: next }) => {
                    a == b && offset + last.len == next
                }
                _ => false,
            };
            if joins {
                last.len += piece.len;
                return;
            }
        }
        self.list.push(piece);
    }

    /// The pieces in order.
    pub fn as_slice(&self) -> &[Piece] {
        &self.list
    }

    /// Collects another layer's pieces behind those that there are: whatever `fill` pushes is kept apart from them.
    /// Returns what was pushed, to be given back with [`Self::put_back`].
    pub(crate) fn apart<E>(
        &mut self,
        fill: impl FnOnce(&mut Self) -> Result<(), E>,
    ) -> Result<Vec<Piece>, E> {
        let (start, floor) = (self.list.len(), self.floor);
        self.floor = start;
        let filled = fill(self);
        self.floor = floor;
        let mut pieces = self.spare.pop().unwrap_or_default();
        pieces.extend(self.list.drain(start..));
        match filled {
            Ok(()) => Ok(pieces),
            Err(e) => {
                self.put_back(pieces);
                Err(e)
            }
        }
    }

    /// Keeps the memory of a list that [`Self::apart`] gave.
    pub(crate) fn put_back(&mut self, mut pieces: Vec<Piece>) {
        pieces.clear();
        self.spare.push(pieces);
    }
}

impl std::ops::Deref for Pieces {
    type Target = [Piece];
    fn deref(&self) -> &[Piece] {
        &self.list
    }
}

/// The formats that are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Nothing but the content.
    Raw,
    /// Virtual Hard Disk, version 1.0.
    Vhd,
    /// Virtual Hard Disk version 2, MS-VHDX.
    Vhdx,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
        })
    }
}

/// How an image lays out its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageType {
    /// Every block has its place from the start.
    Fixed,
    /// Blocks get a place when they are first written.
    Dynamic,
    /// What is absent is read from a parent.
    Differencing,
}

impl std::fmt::Display for ImageType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fixed => "fixed",
            Self::Dynamic => "dynamic",
            Self::Differencing => "differencing",
        })
    }
}

/// What stays the same while an image is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the virtual disk in bytes, a multiple of the logical sector size.
    pub virtual_size: u64,
    /// The guest's addressing unit: 512 or 4096 bytes.
    pub logical_sector_size: u32,
    /// What the guest should align to: 512 or 4096 bytes.
    pub physical_sector_size: u32,
    /// The unit of allocation in bytes; 0 where there is none (raw, fixed VHD).
    pub block_size: u32,
    /// Payload never shares a page of this many bytes of the file with metadata, so payload may be read and written
    /// past the page cache when this is at least 4096. A power of two.
    pub payload_align: u32,
}

/// Whether a part of the disk holds anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AllocState {
    /// It may hold something else than zeroes.
    Data,
    /// It has a place or an entry, and is known to read as zeroes.
    Zero,
    /// The image holds nothing for it; it reads as zeroes, or, of a single layer, as the parent has it.
    Absent,
}

/// A run of one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Which bytes of the disk.
    pub span: ByteSpan,
    /// What is known of them.
    pub state: AllocState,
}

/// What becomes of the space of a range that shall read as zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroMode {
    /// It may be given back (discard, write zeroes with unmap).
    Unmap,
    /// It should stay allocated (write zeroes without unmap).
    Keep,
}

/// A point in the order of metadata changes, taken before a sync and handed back after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct SyncToken(pub u64);

/// An open image: the map of a virtual disk onto its file or files.
///
/// `&self` everywhere, so that several queue workers share one image. Spans must lie within the disk and be aligned to
/// the logical sector size; every method checks that and answers [`crate::ErrorKind::OutOfRange`] where it is not so.
/// The caller keeps what it mapped for no longer than the I/O on it runs (see [`Image::maintain`]).
///
/// **Durability.** All metadata that a call changes is handed to the operating system before the call returns, in an
/// order in which any subset that a power cut leaves behind is an image that opens. So an acknowledged write survives
/// the death of the process, and a plain sync of the file makes it survive a power cut:
///
/// ```text
///   token = image.sync_begin()
///   loop { sync of the image's own file (the caller's own fsync, or Storage::sync)
///          match image.sync_done(token)? { None => durable, Some(next) => token = next } }
/// ```
///
/// Once more is needed where metadata may only be written after the payload that it exposes is durable: the sectors that a
/// differencing image has of its own. The second time is the last.
pub trait Image: Send + Sync + std::fmt::Debug {
    /// Which format.
    fn format(&self) -> Format;
    /// Fixed, dynamic or differencing.
    fn image_type(&self) -> ImageType;
    /// Sizes.
    fn geometry(&self) -> Geometry;
    /// Whether writes are refused.
    fn is_read_only(&self) -> bool;
    /// The files of the chain, the image's own first.
    fn files(&self) -> &[Arc<dyn Storage>];

    /// Appends to `out` where the bytes of `at` are, in order and without a gap. In memory and without a lock, but
    /// for a piece of metadata that was not read before, or not lately where a disk has very much of it.
    fn map_read(&self, at: ByteSpan, out: &mut Pieces) -> Result<(), ImageError>;

    /// Appends to `out` where the bytes of `at` are to be written; every piece is a [`Place::File`] of the image itself.
    /// Blocks that have no place get one, which reads as before (zeroes, or the parent's content) until the caller has
    /// written it and said so with [`Image::wrote`]. Without a lock when everything is allocated.
    fn map_write(&self, at: ByteSpan, out: &mut Pieces) -> Result<(), ImageError>;

    /// Makes the bytes of `at` read as zeroes: what metadata alone can say is done, and what is left for the caller
    /// to zero in the file (by punching or writing) is appended to `out`. Space that becomes free is not used again
    /// before [`Image::maintain`]. Followed by [`Image::wrote`] when that is done, also where nothing was left to do.
    fn map_zero(&self, at: ByteSpan, mode: ZeroMode, out: &mut Pieces) -> Result<(), ImageError>;

    /// Says that all of `at`, which one call of `map_write` or `map_zero` mapped, is in the file now, before the guest is
    /// told: from here on it is read from there, also after the death of the process. Not to be called for what failed.
    /// In memory and without a lock where that was so already; nothing to do but in a differencing image.
    fn wrote(&self, at: ByteSpan) -> Result<(), ImageError>;

    /// To be taken before a sync of the image's own file starts.
    fn sync_begin(&self) -> SyncToken;
    /// Says that the image's own file was synced after `token` was taken. `None`: everything that was written before
    /// `token` is durable. `Some`: it is after one more sync, to be started now, and a call with this token.
    fn sync_done(&self, token: SyncToken) -> Result<Option<SyncToken>, ImageError>;
    /// Says that a sync of the image's own file has failed: what was written before may be lost, and no later sync brings it
    /// back though it may succeed. An image with metadata takes no further writes, so that none comes to depend on that.
    fn sync_failed(&self, why: &str);

    /// Whether [`Image::maintain`] would find enough to do (log filling up, space to give back, file to extend).
    fn wants_maintenance(&self) -> bool;
    /// Housekeeping that waits for the disk: applies the log, gives freed space back, extends the file ahead of need.
    /// Runs beside mapping calls of other threads. `quiesce` is called between taking freed blocks out of the map and
    /// using their space again, and must return only when no I/O that was mapped before the call is still in flight.
    fn maintain(&self, quiesce: &dyn Fn()) -> Result<(), ImageError>;

    /// Makes all metadata and payload written so far durable: `sync_begin`, sync, `sync_done`, as often as it takes.
    fn commit(&self) -> Result<(), ImageError>;
    /// Leaves the file as a cleanly closed image. No I/O may be in flight, and no mapping call may follow but after
    /// which the session simply begins anew. An image that is dropped without it is as after a crash: sound.
    fn close(&self) -> Result<(), ImageError>;

    /// What is known of the bytes from `offset` on: the run of one state that begins there, or `None` at the disk's
    /// end. Looks at the allocation of the image and at holes of the file that holds it.
    fn next_extent(&self, offset: u64) -> Result<Option<Extent>, ImageError>;

    /// The id that a child of this image names as its parent's: the DataWriteGuid of a VHDX (which changes with the
    /// first change of a session; [`Image::begin_changes`] has it settled), the unique id of a VHD.
    fn content_id(&self) -> Option<uuid::Uuid>;
    /// What a differencing image says of its parent.
    fn parent_link(&self) -> Option<&ParentLink>;
    /// Does what comes before the first change (a VHDX gets new ids and begins its log), so that
    /// [`Image::content_id`] stays as it is from here to [`Image::close`]. Nothing where that was done.
    fn begin_changes(&self) -> Result<(), ImageError>;
    /// The layers, when the image is a chain of several.
    fn as_chain(&self) -> Option<&crate::Chain> {
        None
    }
}
