//! What the contents of a disk may be after a crash.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use formats::{Image, ImageError, Storage, ZeroMode};

use crate::disk::split;
use crate::{Mark, SECTOR, SimStorage, read_nonzero_sectors, write_payload, zero_payload};

/// How far the user of the disk had come, in numbers of its operations (0: none).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Progress {
    /// Operations up to this one may have reached the disk.
    pub begun: u64,
    /// Operations up to this one were acknowledged.
    pub acknowledged: u64,
    /// Operations up to this one were flushed.
    pub flushed: u64,
}

impl Progress {
    /// Follows a mark of the trace.
    pub fn pass(&mut self, mark: Mark) {
        match mark {
            Mark::Begun(n) => self.begun = n,
            Mark::Acknowledged(n) => self.acknowledged = n,
            Mark::Flushed(n) => self.flushed = n,
        }
    }
}

/// Contents of one sector from one operation on; `None` is zeroes.
type Version = (u64, Option<Arc<[u8]>>);

/// Everything that was written to a disk, sector by sector, and so what it may hold.
///
/// Its verbs do the operation on the image and leave the marks in the trace of the file.
#[derive(Debug, Default, Clone)]
pub struct History {
    sectors: BTreeMap<u64, Vec<Version>>,
    next: u64,
}

impl History {
    /// Of a disk that is all zeroes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of operations so far.
    pub fn operations(&self) -> u64 {
        self.next
    }

    /// Writes and acknowledges. A failed write may have reached the disk in part.
    pub fn write(
        &mut self,
        image: &dyn Image,
        sim: &SimStorage,
        offset: u64,
        data: &[u8],
    ) -> Result<(), ImageError> {
        assert!(offset.is_multiple_of(SECTOR) && (data.len() as u64).is_multiple_of(SECTOR), "whole sectors");
        let number = self.begin(sim);
        for (index, _, range) in split(offset, data.len() as u64, SECTOR) {
            self.record(index, number, Some(data[range].into()));
        }
        write_payload(image, offset, data)?;
        sim.mark(Mark::Acknowledged(number));
        Ok(())
    }

    /// Zeroes (discards) and acknowledges.
    pub fn zero(
        &mut self,
        image: &dyn Image,
        sim: &SimStorage,
        offset: u64,
        len: u64,
        mode: ZeroMode,
    ) -> Result<(), ImageError> {
        let number = self.begin(sim);
        for index in offset / SECTOR..(offset + len) / SECTOR {
            if self.sectors.contains_key(&index) {
                self.record(index, number, None);
            }
        }
        zero_payload(image, offset, len, mode)?;
        sim.mark(Mark::Acknowledged(number));
        Ok(())
    }

    /// A guest's flush: token, sync of the file, token handed back, as often as it takes.
    pub fn flush(&mut self, image: &dyn Image, sim: &SimStorage) -> Result<(), ImageError> {
        let mut token = Some(image.sync_begin());
        while let Some(begun) = token {
            sim.sync().map_err(|e| ImageError::io("flush", e))?;
            token = image.sync_done(begun)?;
        }
        sim.mark(Mark::Flushed(self.next));
        Ok(())
    }

    /// Says that something else (a close, a commit) made all operations so far durable.
    pub fn note_flushed(&self, sim: &SimStorage) {
        sim.mark(Mark::Flushed(self.next));
    }

    fn begin(&mut self, sim: &SimStorage) -> u64 {
        self.next += 1;
        sim.mark(Mark::Begun(self.next));
        self.next
    }

    fn record(&mut self, index: u64, number: u64, data: Option<Arc<[u8]>>) {
        let data = data.filter(|d| d.iter().any(|b| *b != 0));
        self.sectors.entry(index).or_default().push((number, data));
    }

    /// Compares the whole disk with what it may hold when everything up to operation `sure` must be there, and what
    /// came after it up to `begun` may be.
    ///
    /// # Errors
    /// A sentence that names the first sector that holds something else.
    pub fn verify(&self, image: &dyn Image, sure: u64, begun: u64) -> Result<(), String> {
        let found = read_nonzero_sectors(image).map_err(|e| format!("reading back failed: {e}"))?;
        let touched: BTreeSet<u64> =
            self.sectors.keys().copied().chain(found.keys().map(|offset| offset / SECTOR)).collect();
        for index in touched {
            let now = found.get(&(index * SECTOR)).map(|d| &d[..]);
            if !self.allowed(index, sure, begun).iter().any(|a| a.as_deref() == now) {
                return Err(self.describe(index, now, sure, begun));
            }
        }
        Ok(())
    }

    fn allowed(&self, index: u64, sure: u64, begun: u64) -> Vec<Option<Arc<[u8]>>> {
        let versions = self.sectors.get(&index).map_or(&[][..], |v| v);
        let old = versions.iter().rev().find(|(n, _)| *n <= sure).and_then(|(_, d)| d.clone());
        let newer = versions.iter().filter(|(n, _)| *n > sure && *n <= begun).map(|(_, d)| d.clone());
        std::iter::once(old).chain(newer).collect()
    }

    fn describe(&self, index: u64, now: Option<&[u8]>, sure: u64, begun: u64) -> String {
        let versions = self.sectors.get(&index).map_or(&[][..], |v| v);
        let writer = versions.iter().find(|(_, d)| d.as_deref() == now).map(|(n, _)| *n);
        format!(
            "sector at {:#x} holds {} (written by operation {writer:?}); its operations are {:?}, of which those up \
             to {sure} must be there and those up to {begun} may be",
            index * SECTOR,
            now.map_or("zeroes".into(), |d| format!("{:02x?}...", &d[..8])),
            versions.iter().map(|(n, d)| (*n, d.is_some())).collect::<Vec<_>>(),
        )
    }
}
