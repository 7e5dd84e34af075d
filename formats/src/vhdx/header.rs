//! File type identifier and headers (2.2.1, 2.2.2).

use super::corruption::{Corruption, Stop};
use super::guid::Guid;
use super::le::{bytes_at, put, u16_at, u32_at, u64_at};
use super::parse::OnIssue;
use super::{HEADER_SECTION, MAX_FILE_SIZE, MIB};
use crate::{ErrorKind, ImageError, Storage};

/// First bytes of every VHDX file.
pub(super) const FILE_SIGNATURE: &[u8; 8] = b"vhdxfile";
const SIGNATURE: &[u8; 4] = b"head";
/// Bytes that a header's checksum covers.
pub(super) const HEADER_SIZE: usize = 4096;
/// Where the two headers are.
pub(super) const HEADER_OFFSETS: [u64; 2] = [64 << 10, 128 << 10];
/// The longest log that is replayed or written, in bytes.
const MAX_LOG: u32 = 1 << 30;
/// So many increments of the sequence number have to be left for a writable open.
const SEQUENCE_RESERVE: u64 = 1 << 16;

/// The fields of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) sequence: u64,
    pub(super) file_write: Guid,
    pub(super) data_write: Guid,
    pub(super) log_guid: Guid,
    pub(super) log_version: u16,
    pub(super) version: u16,
    pub(super) log_len: u32,
    pub(super) log_offset: u64,
}

impl Header {
    /// Decodes a header whose signature and checksum are right; says what is wrong else.
    pub(super) fn decode(buf: &[u8]) -> Result<Self, &'static str> {
        if buf[..4] != SIGNATURE[..] {
            return Err("bad signature");
        }
        if checksum(buf) != u32_at(buf, 4) {
            return Err("bad checksum");
        }
        Ok(Self {
            sequence: u64_at(buf, 8),
            file_write: Guid(bytes_at(buf, 16)),
            data_write: Guid(bytes_at(buf, 32)),
            log_guid: Guid(bytes_at(buf, 48)),
            log_version: u16_at(buf, 64),
            version: u16_at(buf, 66),
            log_len: u32_at(buf, 68),
            log_offset: u64_at(buf, 72),
        })
    }

    /// The 4 KiB as they are written.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut buf = vec![0; HEADER_SIZE];
        put(&mut buf, 0, SIGNATURE);
        put(&mut buf, 8, &self.sequence.to_le_bytes());
        put(&mut buf, 16, &self.file_write.0);
        put(&mut buf, 32, &self.data_write.0);
        put(&mut buf, 48, &self.log_guid.0);
        put(&mut buf, 64, &self.log_version.to_le_bytes());
        put(&mut buf, 66, &self.version.to_le_bytes());
        put(&mut buf, 68, &self.log_len.to_le_bytes());
        put(&mut buf, 72, &self.log_offset.to_le_bytes());
        let sum = checksum(&buf);
        put(&mut buf, 4, &sum.to_le_bytes());
        buf
    }

    /// What is wrong with the fields, as far as that does not depend on other structures but the file's length.
    fn broken_rules(&self, file_len: u64) -> Vec<Corruption> {
        let mut broken = Vec::new();
        if self.version != 1 {
            broken.push(Corruption::Version { version: self.version });
        }
        let dirty = !self.log_guid.is_zero();
        if dirty && self.log_version != 0 {
            broken.push(Corruption::LogVersion { version: self.log_version });
        }
        let (len, offset) = (self.log_len, self.log_offset);
        if !u64::from(len).is_multiple_of(MIB) || len > MAX_LOG || (dirty && len == 0) {
            broken.push(Corruption::LogLength { len });
        }
        if len == 0 {
            return broken;
        }
        if !offset.is_multiple_of(MIB) || offset < MIB {
            broken.push(Corruption::LogOffset { offset });
        }
        if offset.checked_add(len.into()).is_none_or(|end| end > file_len) {
            let what = "the log".into();
            broken.push(Corruption::BeyondEnd { what, offset, len: len.into(), file_len });
        }
        broken
    }

    /// Whether a session of changes may begin.
    pub(super) fn validate_for_writing(&self) -> Result<(), Corruption> {
        if self.sequence > u64::MAX - SEQUENCE_RESERVE {
            return Err(Corruption::SequenceExhausted { sequence: self.sequence });
        }
        if self.log_len == 0 {
            return Err(Corruption::LogLength { len: 0 });
        }
        Ok(())
    }
}

fn checksum(buf: &[u8]) -> u32 {
    let sum = crc32c::crc32c(&buf[..4]);
    let sum = crc32c::crc32c_append(sum, &[0; 4]);
    crc32c::crc32c_append(sum, &buf[8..HEADER_SIZE])
}

/// The current header, and which of the two it is.
#[derive(Debug, Clone)]
pub(super) struct Headers {
    pub(super) current: Header,
    /// 0 or 1.
    pub(super) slot: usize,
    /// What is wrong with the other one, for `check`.
    pub(super) spare: Option<Corruption>,
}

/// Reads the file type identifier and both headers and chooses the current one. `None`: there is none, which `issue` was
/// told. Broken rules of the current one go to `issue` as well.
///
/// # Errors
/// [`ErrorKind::WrongFormat`] for what is no VHDX; what the file or `issue` says.
pub(super) fn read_headers(storage: &dyn Storage, issue: OnIssue<'_>) -> Result<Option<Headers>, Stop> {
    let io = |e| ImageError::io("reading the headers", e);
    let file_len = storage.len().map_err(io)?;
    let mut signature = [0; 8];
    if file_len >= 8 {
        storage.read_at(&mut signature, 0).map_err(io)?;
    }
    if signature != *FILE_SIGNATURE {
        let message =
            "not a VHDX file: it does not begin with \"vhdxfile\"; name the format if it is another one";
        return Err(ImageError::new(ErrorKind::WrongFormat, message).into());
    }
    if file_len < HEADER_SECTION {
        return issue(Corruption::FileTooShort { len: file_len }).map(|()| None);
    }
    if file_len > MAX_FILE_SIZE {
        return issue(Corruption::FileTooLarge { len: file_len }).map(|()| None);
    }
    let mut decoded = [const { Err("") }; 2];
    for (slot, offset) in HEADER_OFFSETS.into_iter().enumerate() {
        let mut buf = vec![0; HEADER_SIZE];
        storage.read_at(&mut buf, offset).map_err(io)?;
        decoded[slot] = Header::decode(&buf);
    }
    match choose(decoded) {
        Err(corruption) => issue(corruption).map(|()| None),
        Ok(headers) => {
            headers.current.broken_rules(file_len).into_iter().try_for_each(issue)?;
            // What another version means is not known.
            Ok(Some(headers).filter(|headers| headers.current.version == 1))
        }
    }
}

fn choose(decoded: [Result<Header, &'static str>; 2]) -> Result<Headers, Corruption> {
    let bad = |slot: usize, reason| {
        Some(Corruption::Header { index: slot as u8 + 1, offset: HEADER_OFFSETS[slot], reason })
    };
    match decoded {
        [Err(first), Err(second)] => Err(Corruption::NoValidHeader { first, second }),
        [Ok(current), Err(reason)] => Ok(Headers { current, slot: 0, spare: bad(1, reason) }),
        [Err(reason), Ok(current)] => Ok(Headers { current, slot: 1, spare: bad(0, reason) }),
        // Disk2vhd leaves two that are the same.
        [Ok(a), Ok(b)] if a.sequence == b.sequence && a != b => {
            Err(Corruption::HeadersAmbiguous { sequence: a.sequence })
        }
        [Ok(a), Ok(b)] if b.sequence > a.sequence => Ok(Headers { current: b, slot: 1, spare: None }),
        [Ok(a), Ok(_)] => Ok(Headers { current: a, slot: 0, spare: None }),
    }
}

impl Headers {
    /// Makes `change`d fields current: writes the header that is not, one number higher, and syncs (2.2.2.1).
    pub(super) fn update(
        &mut self,
        storage: &dyn Storage,
        change: impl Fn(&mut Header),
    ) -> Result<(), HeaderWriteError> {
        let mut next = self.current;
        change(&mut next);
        next.version = 1;
        next.log_version = 0;
        next.sequence = self.current.sequence.checked_add(1).ok_or_else(|| {
            HeaderWriteError::Refused(Corruption::SequenceExhausted { sequence: u64::MAX }.into())
        })?;
        let slot = 1 - self.slot;
        storage.write_at(&next.encode(), HEADER_OFFSETS[slot]).map_err(|e| {
            HeaderWriteError::Write(ImageError::io(format!("writing header {}", slot + 1), e))
        })?;
        storage.sync().map_err(|e| HeaderWriteError::Sync(ImageError::io("syncing a header", e)))?;
        *self = Self { current: next, slot, spare: self.spare.take() };
        Ok(())
    }

    /// Twice, so that both headers say the same (2.2.2.1).
    pub(super) fn update_both(
        &mut self,
        storage: &dyn Storage,
        change: impl Fn(&mut Header),
    ) -> Result<(), HeaderWriteError> {
        self.update(storage, &change)?;
        self.update(storage, &change)?;
        self.spare = None;
        Ok(())
    }
}

/// Which step of a header's update failed; what it means for the image differs.
#[derive(Debug)]
pub(super) enum HeaderWriteError {
    /// Nothing was done.
    Refused(ImageError),
    /// The header that is not current may be torn; writing it again mends that.
    Write(ImageError),
    /// What the file holds is not known any more.
    Sync(ImageError),
}

impl From<HeaderWriteError> for ImageError {
    fn from(error: HeaderWriteError) -> Self {
        match error {
            HeaderWriteError::Refused(e) | HeaderWriteError::Write(e) | HeaderWriteError::Sync(e) => e,
        }
    }
}

/// The creator's name in the file type identifier, for people to read (2.2.1).
pub(super) fn read_creator(storage: &dyn Storage) -> Result<String, ImageError> {
    let mut buf = [0; 512];
    storage.read_at(&mut buf, 8).map_err(|e| ImageError::io("reading the creator", e))?;
    let units = buf.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).take_while(|u| *u != 0);
    let text: String = char::decode_utf16(units).map(|c| c.unwrap_or('\u{fffd}')).collect();
    Ok(text.chars().filter(|c| !c.is_control()).collect())
}
