//! Payload I/O through the map, with a look at every place that the map names.

use std::sync::Arc;

use formats::{ByteSpan, FileIndex, Format, Image, ImageError, Piece, Pieces, Place, SyncToken, ZeroMode};

use crate::storage::MemoryFile;
use crate::structures;

/// The file and the offset of a piece, unless it is in none.
pub fn in_file(piece: &Piece) -> Option<(FileIndex, u64)> {
    if let Place::File { file, offset } = piece.place { Some((file, offset)) } else { None }
}

fn io(e: std::io::Error) -> ImageError {
    ImageError::io("payload", e)
}

/// Where payload may be in an image's own file: not where its structures are at that moment.
#[derive(Debug, Clone)]
pub struct Fence {
    format: Format,
    file: Arc<MemoryFile>,
    /// Whether a log of somebody else's may still move the structures.
    foreign_log: bool,
}

impl Fence {
    /// Of the image of a format in `file`, which we made or have opened for writing.
    pub fn of_ours(format: Format, file: &Arc<MemoryFile>) -> Self {
        Self { format, file: file.clone(), foreign_log: false }
    }

    /// Of an image that was only opened for reading.
    pub fn of_foreign(format: Format, file: &Arc<MemoryFile>) -> Self {
        Self { format, file: file.clone(), foreign_log: true }
    }

    fn metadata(&self) -> Vec<(u64, u64)> {
        self.file.look(|contents| {
            if self.foreign_log && structures::has_log(contents, self.format) {
                return structures::beyond_logs(self.format);
            }
            structures::metadata(contents, self.format)
        })
    }

    /// Demands that a piece of the image's own file keeps away from these structures.
    fn keep_out(metadata: &[(u64, u64)], at: ByteSpan, piece: &Piece, place: u64) {
        let hit = metadata.iter().find(|(from, to)| place < *to && *from < place + piece.len);
        assert!(hit.is_none(), "{piece:?} of {at:?} reaches into a structure of the file at {hit:x?}");
    }

    /// Demands that pieces cover the span without a gap, lie in their files, and keep away from metadata.
    ///
    /// # Panics
    /// When they don't.
    pub fn watch(&self, image: &dyn Image, at: ByteSpan, pieces: &Pieces) {
        let metadata = self.metadata();
        let total: u64 = pieces.iter().map(|p| p.len).sum();
        assert_eq!(total, at.len, "pieces of {at:?} have a gap or too much");
        for piece in pieces.iter() {
            assert!(piece.len > 0, "an empty piece of {at:?}");
            let Some((file, offset)) = in_file(piece) else {
                assert!(piece.place == Place::Zero, "{at:?} is said to be in a parent");
                continue;
            };
            let storage =
                image.files().get(usize::from(file.0)).expect("the file of a piece is one of the image's");
            let end = offset.checked_add(piece.len).expect("a piece does not wrap around");
            let len = storage.len().expect("there is no fault");
            assert!(end <= len, "{piece:?} of {at:?} reaches beyond the file's {len} bytes");
            if file == FileIndex::TOP {
                Self::keep_out(&metadata, at, piece, offset);
            }
        }
    }
}

/// Reads a span.
///
/// # Errors
/// What the map or the file says.
pub fn read(image: &dyn Image, at: ByteSpan, fence: &Fence) -> Result<Vec<u8>, ImageError> {
    let mut pieces = Pieces::new();
    image.map_read(at, &mut pieces)?;
    fence.watch(image, at, &pieces);
    let mut data = vec![0; at.len as usize];
    let mut done = 0;
    for piece in pieces.iter() {
        let part = &mut data[done..done + piece.len as usize];
        if let Some((file, offset)) = in_file(piece) {
            image.files()[usize::from(file.0)].read_at(part, offset).map_err(io)?;
        }
        done += piece.len as usize;
    }
    Ok(data)
}

/// How far a write gets before its daemon dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// A place was found; nothing was written there.
    Mapped,
    /// The bytes are in the file; the map was not told.
    Written,
    /// All of it is done.
    Told,
}

/// Writes `data` at `offset`.
///
/// # Errors
/// What the map or the file says.
pub fn write(
    image: &dyn Image,
    offset: u64,
    data: &[u8],
    until: Until,
    fence: &Fence,
) -> Result<(), ImageError> {
    let at = ByteSpan::new(offset, data.len() as u64);
    let mut pieces = Pieces::new();
    image.map_write(at, &mut pieces)?;
    let mut rest = data;
    let metadata = fence.metadata();
    let total: u64 = pieces.iter().map(|p| p.len).sum();
    assert_eq!(total, at.len, "map_write left a gap in {at:?}");
    if until == Until::Mapped {
        return Ok(());
    }
    for piece in pieces.iter() {
        let (part, tail) = rest.split_at(piece.len as usize);
        let (file, place) = in_file(piece).expect("map_write names only places in the image's file");
        assert_eq!(file, FileIndex::TOP, "map_write names only places in the image's own file");
        Fence::keep_out(&metadata, at, piece, place);
        image.files()[0].write_at(part, place).map_err(io)?;
        rest = tail;
    }
    if until == Until::Told { told(image, at) } else { Ok(()) }
}

/// Zeroes a span; what the map leaves to do is punched, or written.
///
/// # Errors
/// What the map or the file says.
pub fn zero(
    image: &dyn Image,
    at: ByteSpan,
    mode: ZeroMode,
    punch: bool,
    fence: &Fence,
) -> Result<(), ImageError> {
    let mut pieces = Pieces::new();
    image.map_zero(at, mode, &mut pieces)?;
    let metadata = fence.metadata();
    for piece in pieces.iter() {
        let (file, place) = in_file(piece).expect("map_zero leaves only places in the image's file");
        assert_eq!(file, FileIndex::TOP, "map_zero names only places in the image's own file");
        Fence::keep_out(&metadata, at, piece, place);
        let file = &image.files()[0];
        if punch || piece.len > 4 << 20 {
            file.punch(place, piece.len).map_err(io)?;
        } else {
            file.write_at(&vec![0; piece.len as usize], place).map_err(io)?;
        }
    }
    told(image, at)
}

/// Says that a span is written.
fn told(image: &dyn Image, at: ByteSpan) -> Result<(), ImageError> {
    image.wrote(at)
}

/// The second half of a flush: syncs as often as it takes, from a token on.
///
/// # Errors
/// What the map or the file says.
pub fn finish_flush(image: &dyn Image, mut token: SyncToken) -> Result<(), ImageError> {
    for _ in 0..2 {
        image.files()[0].sync().map_err(io)?;
        match image.sync_done(token)? {
            Some(next) => token = next,
            None => return Ok(()),
        }
    }
    panic!("a flush takes more than two syncs");
}
