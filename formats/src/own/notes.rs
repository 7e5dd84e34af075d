//! The notes file: which sectors are own though the image does not say so yet, for whoever comes after a killed process.
//!
//! ```text
//!      0  header of side 0 ┐ the one with the higher sequence counts
//!    512  header of side 1 ┘
//!   4096  records of side 0, RECORDS_MAX of 32 bytes
//!      …  records of side 1
//! ```
//!
//! Nothing here is ever synced: notes have to survive the death of the process, and the page cache does. They are worthless
//! after a power cut, so the header names the boot. A record is one small write, appended to its side. What is no longer needed
//! goes by changing sides: what still is gets written to the other side, and then its header. Records of a side that were not
//! written since belong to another generation, a random number. A process that dies in between leaves the old side.
//!
//! The file belongs to us, yet anything in it may be anything: what does not fit is passed over, and no size is believed.

use std::io;
use std::ops::Range;

use uuid::Uuid;

use crate::{ImageError, NotesFile};

const MAGIC: [u8; 8] = *b"OwnNotes";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 72;
const HEADER_STRIDE: u64 = 512;
const RECORDS_AT: u64 = 4096;
const RECORD_LEN: usize = 32;
/// Records of a side: 4 MiB.
pub(super) const RECORDS_MAX: u64 = 1 << 17;
/// Records are read in pieces of this many bytes.
const PIECE: usize = 64 << 10;
/// After so many records (1 MiB) the file is cut when there is nothing to keep.
const CUT_AFTER: u64 = 1 << 15;
/// Below this many records of a side it is not worth while to change sides.
const SIDE_WORTH: u64 = 1 << 10;

/// What a record says of its sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    /// They are own.
    Own,
    /// They are not, whatever earlier records say.
    NotOwn,
}

/// The notes of one image.
#[derive(Debug)]
pub(super) struct Notes {
    file: NotesFile,
    image: [u8; 16],
    sectors: u64,
    /// `None`: nothing in the file is ours, it begins with the first record.
    side: Option<Side>,
    /// Records since the file was cut.
    since_cut: u64,
}

#[derive(Debug, Clone, Copy)]
struct Side {
    /// Rises with each change of sides; odd for side 1.
    sequence: u64,
    generation: u64,
    /// How many records there may be.
    used: u64,
}

impl Side {
    fn index(self) -> u64 {
        self.sequence % 2
    }

    fn after(sequence: u64) -> Self {
        Self { sequence: sequence + 1, generation: Uuid::new_v4().as_u64_pair().1, used: 0 }
    }

    fn records_at(self) -> u64 {
        RECORDS_AT + self.index() * RECORDS_MAX * RECORD_LEN as u64
    }
}

impl Notes {
    /// Looks at the file, and calls `each` with its records in order.
    ///
    /// # Errors
    /// The file cannot be read. Whatever it holds is none.
    pub(super) fn open(
        file: NotesFile,
        image: [u8; 16],
        sectors: u64,
        mut each: impl FnMut(Word, Range<u64>),
    ) -> Result<Self, ImageError> {
        let mut notes = Self { file, image, sectors, side: None, since_cut: 0 };
        notes.side = notes.read(&mut each).map_err(|e| ImageError::io("reading the notes file", e))?;
        Ok(notes)
    }

    fn read(&self, each: &mut dyn FnMut(Word, Range<u64>)) -> io::Result<Option<Side>> {
        let len = self.file.storage.len()?;
        let mut newest: Option<Side> = None;
        for index in 0..2 {
            let mut header = [0; HEADER_LEN];
            if len < index * HEADER_STRIDE + HEADER_LEN as u64 {
                continue;
            }
            self.file.storage.read_at(&mut header, index * HEADER_STRIDE)?;
            let side = self.parse_header(&header).filter(|side| side.index() == index);
            newest = side.into_iter().chain(newest).max_by_key(|side| side.sequence);
        }
        let Some(mut side) = newest else { return Ok(None) };
        let end = side.records_at() + RECORDS_MAX * RECORD_LEN as u64;
        let mut at = side.records_at();
        let mut piece = vec![0; PIECE];
        while at < end.min(len) {
            let n = (end.min(len) - at).min(PIECE as u64) as usize;
            self.file.storage.read_at(&mut piece[..n], at)?;
            for (i, record) in piece[..n].as_chunks::<RECORD_LEN>().0.iter().enumerate() {
                if let Some((word, range)) = self.parse_record(side, record) {
                    side.used = (at - side.records_at()) / RECORD_LEN as u64 + i as u64 + 1;
                    each(word, range);
                }
            }
            at += n as u64;
        }
        Ok(Some(side))
    }

    /// Adds a record. Where the side is full, changes sides first, with what `live` says is to be kept.
    pub(super) fn add(
        &mut self,
        word: Word,
        range: &Range<u64>,
        live: impl FnOnce() -> Vec<Range<u64>>,
    ) -> io::Result<()> {
        let mut side = match self.side {
            Some(side) if side.used < RECORDS_MAX => side,
            Some(side) => self.change_sides(side, &live())?,
            None => self.start()?,
        };
        if side.used >= RECORDS_MAX {
            return Err(io::Error::other(format!(
                "there is room for {RECORDS_MAX} notes, and that many are needed"
            )));
        }
        let at = side.records_at() + side.used * RECORD_LEN as u64;
        self.file.storage.write_at(&record(side.generation, word, range), at)?;
        side.used += 1;
        self.side = Some(side);
        self.since_cut += 1;
        Ok(())
    }

    /// Whether any record counts, so that what ceases to be own must be noted too.
    pub(super) fn is_used(&self) -> bool {
        self.side.is_some_and(|side| side.used > 0)
    }

    /// Only `live` ranges are needed any longer, of which there are `count`: drops the other records where that pays off.
    pub(super) fn tidy(&mut self, count: usize, live: impl FnOnce() -> Vec<Range<u64>>) -> io::Result<()> {
        let used = self.side.map_or(0, |side| side.used);
        if used == 0 || (count > 0 && used < SIDE_WORTH.max(4 * count as u64)) {
            return Ok(());
        }
        self.keep_only(&live())?;
        if count == 0 && self.since_cut >= CUT_AFTER {
            self.file.storage.set_len(RECORDS_AT)?;
            self.since_cut = 0;
        }
        Ok(())
    }

    /// Drops all records but those of `live`. After an error the old ones still count.
    pub(super) fn keep_only(&mut self, live: &[Range<u64>]) -> io::Result<()> {
        let side = match self.side {
            Some(side) => side,
            None if live.is_empty() => return Ok(()),
            None => self.start()?,
        };
        self.change_sides(side, live).map(|_| ())
    }

    /// Writes `live` to the other side, and makes it the one that counts.
    fn change_sides(&mut self, old: Side, live: &[Range<u64>]) -> io::Result<Side> {
        let mut side = Side::after(old.sequence);
        if live.len() as u64 > RECORDS_MAX {
            return Err(io::Error::other(format!(
                "{} ranges do not fit into {RECORDS_MAX} notes",
                live.len()
            )));
        }
        for piece in live.chunks(PIECE / RECORD_LEN) {
            let bytes: Vec<u8> = piece.iter().flat_map(|r| record(side.generation, Word::Own, r)).collect();
            self.file.storage.write_at(&bytes, side.records_at() + side.used * RECORD_LEN as u64)?;
            side.used += piece.len() as u64;
        }
        self.write_header(side)?;
        self.since_cut += side.used;
        self.side = Some(side);
        Ok(side)
    }

    /// Empties the file.
    pub(super) fn clear(&mut self) -> io::Result<()> {
        if self.side.is_some() {
            self.file.storage.set_len(0)?;
            self.side = None;
        }
        Ok(())
    }

    fn start(&mut self) -> io::Result<Side> {
        self.file.storage.set_len(0)?;
        let side = Side::after(0);
        self.write_header(side)?;
        self.side = Some(side);
        self.since_cut = 0;
        Ok(side)
    }

    fn write_header(&self, side: Side) -> io::Result<()> {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..32].copy_from_slice(self.file.boot_id.as_bytes());
        bytes[32..48].copy_from_slice(&self.image);
        bytes[48..56].copy_from_slice(&self.sectors.to_le_bytes());
        bytes[56..64].copy_from_slice(&side.sequence.to_le_bytes());
        bytes[64..72].copy_from_slice(&side.generation.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes);
        bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
        self.file.storage.write_at(&bytes, side.index() * HEADER_STRIDE)
    }

    /// The header's side, if it is ours.
    fn parse_header(&self, bytes: &[u8; HEADER_LEN]) -> Option<Side> {
        if bytes.iter().all(|b| *b == 0) {
            return None;
        }
        let mut unsummed = *bytes;
        unsummed[12..16].fill(0);
        if bytes[..8] != MAGIC
            || u32_at(bytes, 8) != VERSION
            || u32_at(bytes, 12) != crc32c::crc32c(&unsummed)
        {
            tracing::warn!("a header of the notes file is damaged or of another version; it is ignored");
            return None;
        }
        if bytes[16..32] != *self.file.boot_id.as_bytes() {
            tracing::debug!("the notes are from before the last boot; they are ignored");
            return None;
        }
        if bytes[32..48] != self.image || u64_at(bytes, 48) != self.sectors {
            tracing::debug!(
                "the notes are about another image, or an earlier session of it; they are ignored"
            );
            return None;
        }
        let sequence = u64_at(bytes, 56);
        (sequence < u64::MAX / 2).then_some(Side { sequence, generation: u64_at(bytes, 64), used: 0 })
    }

    fn parse_record(&self, side: Side, bytes: &[u8; RECORD_LEN]) -> Option<(Word, Range<u64>)> {
        if u64_at(bytes, 8) != side.generation || u32_at(bytes, 0) != crc32c::crc32c(&bytes[4..]) {
            return None;
        }
        let word = match u32_at(bytes, 4) {
            1 => Word::Own,
            2 => Word::NotOwn,
            _ => return None,
        };
        let range = u64_at(bytes, 16)..u64_at(bytes, 24);
        (range.start < range.end && range.end <= self.sectors).then_some((word, range))
    }
}

fn record(generation: u64, word: Word, range: &Range<u64>) -> [u8; RECORD_LEN] {
    let mut bytes = [0; RECORD_LEN];
    let kind: u32 = match word {
        Word::Own => 1,
        Word::NotOwn => 2,
    };
    bytes[4..8].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&generation.to_le_bytes());
    bytes[16..24].copy_from_slice(&range.start.to_le_bytes());
    bytes[24..32].copy_from_slice(&range.end.to_le_bytes());
    let checksum = crc32c::crc32c(&bytes[4..]);
    bytes[..4].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
