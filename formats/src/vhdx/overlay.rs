//! A file as it is once its log has been replayed, without writing to it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::Arc;

use super::corruption::{Corruption, Stop};
use super::header::Header;
use super::log_entry::{Descriptor, SECTOR, SECTOR_LEN};
use super::log_scan::LogReader;
use super::{MAX_FILE_SIZE, MIB};
use crate::{ImageError, Storage};

/// A log of 1 GiB holds this many data sectors; each takes some 60 bytes of memory here.
const MAX_DESCRIPTORS: usize = 1 << 18;
/// Below this the log must not write: file type identifier and headers.
const FIRST_LOGGABLE: u64 = 192 << 10;

#[derive(Debug, Clone, Copy)]
enum Source {
    Zero,
    /// A data sector of the log, at this offset of the file.
    Data {
        sector: u64,
        leading: [u8; 8],
        trailing: [u8; 4],
    },
}

#[derive(Debug, Clone, Copy)]
struct Patch {
    end: u64,
    source: Source,
}

/// The changes that a log holds, over the file that holds the log.
#[derive(Debug)]
pub(super) struct Overlay {
    inner: Arc<dyn Storage>,
    /// By their first byte; disjoint.
    patches: BTreeMap<u64, Patch>,
    len: u64,
}

impl Overlay {
    /// Finds the active sequence and collects what it changes.
    pub(super) fn replay(inner: Arc<dyn Storage>, header: &Header) -> Result<Self, Stop> {
        let reader = LogReader::new(&*inner, header);
        let active = reader.active_sequence()?;
        let head = *active.head();
        let file_len = inner.len().map_err(|e| ImageError::io("reading the size of the file", e))?;
        if head.flushed > file_len {
            return Err(Corruption::LogFileTruncated { len: file_len, flushed: head.flushed }.into());
        }
        if head.last > MAX_FILE_SIZE {
            return Err(Corruption::LogLastFileOffset { sequence: head.sequence, last: head.last }.into());
        }
        let end = file_len.max(head.last.next_multiple_of(MIB));
        let mut patches = Patches { map: BTreeMap::new(), count: 0 };
        for (at, entry) in &active.entries {
            let mut failed = None;
            reader.descriptors(*at, entry, |descriptor, sector| {
                if failed.is_none() {
                    failed = patches.take(header, entry.sequence, end, descriptor, sector).err();
                }
            })?;
            if let Some(corruption) = failed {
                return Err(corruption.into());
            }
        }
        Ok(Self { inner, patches: patches.map, len: end })
    }

    /// Whether the log changes anything that none of these ranges holds. They are sorted and disjoint.
    pub(super) fn touches_outside(&self, ranges: &[(u64, u64)]) -> bool {
        self.patches.iter().any(|(&start, patch)| {
            let before = ranges.partition_point(|r| r.0 <= start);
            before == 0 || patch.end > ranges[before - 1].1
        })
    }

    /// Whether the file is longer once the log is replayed, and its old end lies within a sector of a disk.
    pub(super) fn extends_within_sector(&self) -> bool {
        self.inner.len().is_ok_and(|len| len < self.len && !len.is_multiple_of(SECTOR_LEN))
    }

    /// The length of the file as it is.
    pub(super) fn inner_len(&self) -> Result<u64, ImageError> {
        self.inner.len().map_err(|e| ImageError::io("reading the size of the file", e))
    }

    fn first_over(&self, from: u64, to: u64) -> Option<(u64, Patch)> {
        let before = self.patches.range(..=from).next_back().filter(|(_, p)| p.end > from);
        before.or_else(|| self.patches.range(from..to).next()).map(|(start, patch)| (*start, *patch))
    }

    /// Writes the changes to the file and syncs it (2.3.3). Doing it again does no harm.
    pub(super) fn apply(&self, storage: &dyn Storage) -> Result<(), ImageError> {
        let io = |e| ImageError::io("replaying the log", e);
        if storage.len().map_err(io)? < self.len {
            storage.set_len(self.len).map_err(io)?;
        }
        for (&start, patch) in &self.patches {
            match patch.source {
                Source::Zero => storage.punch(start, patch.end - start).map_err(io)?,
                source @ Source::Data { .. } => {
                    storage.write_at(&self.sector(source).map_err(io)?, start).map_err(io)?;
                }
            }
        }
        storage.sync().map_err(io)
    }

    fn sector(&self, source: Source) -> io::Result<Vec<u8>> {
        let mut buf = vec![0; SECTOR];
        if let Source::Data { sector, leading, trailing } = source {
            self.inner.read_at(&mut buf, sector)?;
            buf[..8].copy_from_slice(&leading);
            buf[SECTOR - 4..].copy_from_slice(&trailing);
        }
        Ok(buf)
    }

    /// Reads from the file itself; zeroes beyond its end.
    fn read_inner(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let present = self.inner.len()?.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (head, beyond) = buf.split_at_mut(present);
        beyond.fill(0);
        if head.is_empty() { Ok(()) } else { self.inner.read_at(head, offset) }
    }
}

struct Patches {
    map: BTreeMap<u64, Patch>,
    count: usize,
}

impl Patches {
    fn take(
        &mut self,
        header: &Header,
        sequence: u64,
        end: u64,
        descriptor: Descriptor,
        sector: u64,
    ) -> Result<(), Corruption> {
        self.count += 1;
        if self.count > MAX_DESCRIPTORS {
            return Err(Corruption::LogTooLarge { max: MAX_DESCRIPTORS });
        }
        let (offset, len, source) = match descriptor {
            Descriptor::Zero { offset, len } => (offset, len, Source::Zero),
            Descriptor::Data { offset, leading, trailing } => {
                (offset, SECTOR_LEN, Source::Data { sector: header.log_offset + sector, leading, trailing })
            }
        };
        let log = header.log_offset..header.log_offset + u64::from(header.log_len);
        let stop = offset.checked_add(len).filter(|stop| {
            offset >= FIRST_LOGGABLE && *stop <= end && (*stop <= log.start || offset >= log.end)
        });
        let stop = stop.ok_or(Corruption::LogTarget { sequence, offset, len, end })?;
        if len > 0 {
            self.insert(offset, Patch { end: stop, source });
        }
        Ok(())
    }

    /// Puts a patch over whatever was there. Data patches are one sector and all patches are aligned to sectors, so only
    /// zero patches are ever cut.
    fn insert(&mut self, start: u64, patch: Patch) {
        while let Some((at, old)) = self.map.range(..patch.end).next_back().map(|(at, old)| (*at, *old)) {
            if old.end <= start {
                break;
            }
            self.map.remove(&at);
            if old.end > patch.end {
                self.map.insert(patch.end, old);
            }
            if at < start {
                self.map.insert(at, Patch { end: start, ..old });
                break;
            }
        }
        self.map.insert(start, patch);
    }
}

impl Storage for Overlay {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.len);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut at = offset;
        while at < end {
            let patch = self.first_over(at, end);
            let (stop, source) = match patch {
                Some((start, patch)) if start <= at => (patch.end.min(end), Some((start, patch.source))),
                Some((start, _)) => (start.min(end), None),
                None => (end, None),
            };
            let part = &mut buf[(at - offset) as usize..(stop - offset) as usize];
            match source {
                None => self.read_inner(part, at)?,
                Some((_, Source::Zero)) => part.fill(0),
                Some((start, data)) => {
                    let from = (at - start) as usize;
                    part.copy_from_slice(&self.sector(data)?[from..from + part.len()]);
                }
            }
            at = stop;
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let patch = self.first_over(offset, u64::MAX).map(|(start, p)| (start.max(offset), p.end));
        let inner = self.inner.next_data(offset)?;
        Ok(match (patch, inner) {
            (Some(a), Some(b)) if b.0 < a.0 => Some((b.0, b.1.min(a.0))),
            (Some(a), _) => Some(a),
            (None, b) => b,
        })
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn punch(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync(&self) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn file(&self) -> Option<&File> {
        None
    }
}
