//! The log of pages that the backend writes: one bit a page of guest-physical addresses, in a memfd that both sides map
//! (vhost-user specification, "Migration").
//!
//! A log is read only when nobody writes to it any more: after another one has taken its place, or when the rings stand
//! still. Taking bits out of a log that is in use could lose one: a processor may look at the bit (and find it set) before
//! the write that it stands for is visible.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, SealFlag};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::VhostUserDirtyLogRegion;
use vm_memory::{FileOffset, MmapRegion};

use super::super::mmio::ReadyQueue;
use crate::memory::GuestRam;
use crate::pages::{PAGE_BYTES, PageSet};

/// A log and its mapping.
#[derive(Debug)]
pub(super) struct Log {
    map: MmapRegion<()>,
    file: Arc<File>,
    bytes: u64,
}

// SAFETY: the mapping is only touched by atomic operations.
unsafe impl Send for Log {}
// SAFETY: as above.
unsafe impl Sync for Log {}

impl Log {
    /// An empty log for all of the memory.
    fn new(ram: &GuestRam) -> Result<Self> {
        let end = ram.regions().iter().map(|r| r.guest_start + r.len).max().unwrap_or(0);
        // Whole words: they are read as such.
        let bytes = (end / PAGE_BYTES as u64).div_ceil(64) * 8;
        let fd = memfd_create(c"dirty-log", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
            .context("make a memfd for the dirty log")?;
        let file = Arc::new(File::from(fd));
        file.set_len(bytes).with_context(|| format!("give the dirty log {bytes} bytes"))?;
        let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
        nix::fcntl::fcntl(&*file, FcntlArg::F_ADD_SEALS(seals)).context("seal the dirty log")?;
        let map = MmapRegion::from_file(FileOffset::from_arc(file.clone(), 0), bytes as usize)
            .context("map the dirty log")?;
        Ok(Self { map, file, bytes })
    }

    /// As SET_LOG_BASE names it.
    pub(super) fn region(&self) -> VhostUserDirtyLogRegion {
        VhostUserDirtyLogRegion { mmap_size: self.bytes, mmap_offset: 0, mmap_handle: self.file.as_raw_fd() }
    }

    /// Takes out what is marked.
    fn take(&self, ram: &GuestRam, into: &mut PageSet) {
        for region in ram.regions() {
            let first = (region.guest_start / PAGE_BYTES as u64 / 64) as usize;
            let words = (region.len / PAGE_BYTES as u64).div_ceil(64) as usize;
            let bits: Vec<u64> = (first..first + words).map(|word| self.take_word(word)).collect();
            into.insert_bits(region.first_page, &bits);
        }
    }

    fn take_word(&self, word: usize) -> u64 {
        assert!((word as u64) < self.bytes / 8, "word {word} of a log of {} bytes", self.bytes);
        // SAFETY: within the mapping, as was just checked, and aligned, as a mapping begins with a page; all access is atomic.
        let cell = unsafe { AtomicU64::from_ptr(self.map.as_ptr().cast::<u64>().add(word)) };
        // Most are empty, and a write would make the page of the log one of our own.
        if cell.load(Ordering::Acquire) == 0 { 0 } else { u64::from_le(cell.swap(0, Ordering::AcqRel)) }
    }
}

/// What is logged, and what was and is not reported yet.
#[derive(Debug)]
pub(super) struct Logs {
    ram: Arc<GuestRam>,
    /// The one that the backend has, or gets when it is connected again.
    active: Arc<Log>,
    /// Logs that had their turn and were not taken out, because the backend did not confirm the next one. At most two, as
    /// the backend is connected anew after that.
    old: Vec<Arc<Log>>,
    /// An empty one for the next turn.
    spare: Option<Arc<Log>>,
    /// Taken out and not reported.
    taken: PageSet,
}

impl Logs {
    /// An empty log.
    pub(super) fn new(ram: &Arc<GuestRam>) -> Result<Self> {
        Ok(Self {
            ram: ram.clone(),
            active: Arc::new(Log::new(ram)?),
            old: Vec::new(),
            spare: None,
            taken: PageSet::empty(ram.pages()),
        })
    }

    /// The log to hand to the backend.
    pub(super) fn active(&self) -> Arc<Log> {
        self.active.clone()
    }

    /// Makes another log the active one. The one before is kept until [`Logs::take_old`].
    pub(super) fn turn(&mut self) -> Result<Arc<Log>> {
        let next = match self.spare.take() {
            Some(spare) => spare,
            None => Arc::new(Log::new(&self.ram)?),
        };
        self.old.push(std::mem::replace(&mut self.active, next));
        Ok(self.active.clone())
    }

    /// Takes out the logs that the backend does not write to any more, since it has confirmed the active one.
    pub(super) fn take_old(&mut self) {
        for log in self.old.drain(..) {
            log.take(&self.ram, &mut self.taken);
            self.spare = Some(log);
        }
    }

    /// Takes out all logs: the backend writes to none.
    pub(super) fn take_all(&mut self) {
        self.take_old();
        self.active.take(&self.ram, &mut self.taken);
    }

    /// The used rings were written, whether the log has that or not: a backend that dies between a write and its mark leaves
    /// no mark, and what a ring says is completed is not done (and marked) again.
    pub(super) fn note_used_rings<'a>(&mut self, rings: impl Iterator<Item = &'a ReadyQueue>) {
        for ring in rings {
            let last = (ring.used + ring.used_bytes() - 1) / PAGE_BYTES as u64;
            for page in ring.used / PAGE_BYTES as u64..=last {
                if let Some(page) = self.ram.page_of(page * PAGE_BYTES as u64) {
                    self.taken.insert(page);
                }
            }
        }
    }

    /// Reports what was taken out.
    pub(super) fn report(&mut self, into: &mut PageSet) {
        into.insert_all(&self.taken);
        self.taken.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(log: &Log, page: usize) {
        // SAFETY: the tests name pages within the log.
        unsafe { *log.map.as_ptr().add(page / 8) |= 1 << (page % 8) };
    }

    fn reported(logs: &mut Logs) -> Vec<u64> {
        let mut set = PageSet::empty(logs.ram.pages());
        logs.report(&mut set);
        set.iter().collect()
    }

    #[test]
    fn addresses_above_the_hole_become_the_pages_that_follow_those_below() {
        let ram = GuestRam::new((3 << 30) + (4 << 20), false).unwrap();
        let mut logs = Logs::new(&ram).unwrap();
        let above = (4u64 << 30) / 4096;
        mark(&logs.active, 7);
        mark(&logs.active, above as usize + 3);
        logs.take_all();
        assert_eq!(reported(&mut logs), [7, (3 << 30) / 4096 + 3]);
        assert!(reported(&mut logs).is_empty());
    }

    #[test]
    fn a_log_whose_successor_was_not_confirmed_is_reported_with_the_next() {
        let ram = GuestRam::new(4 << 20, false).unwrap();
        let mut logs = Logs::new(&ram).unwrap();
        let first = logs.active();
        let second = logs.turn().unwrap();
        mark(&first, 1);
        mark(&second, 2);
        let third = logs.turn().unwrap();
        mark(&first, 3);
        mark(&third, 4);
        logs.take_old();
        assert_eq!(reported(&mut logs), [1, 2, 3]);
        logs.take_all();
        assert_eq!(reported(&mut logs), [4]);
    }

    #[test]
    fn a_log_comes_back_empty() {
        let ram = GuestRam::new(4 << 20, false).unwrap();
        let mut logs = Logs::new(&ram).unwrap();
        for round in 0..5 {
            mark(&logs.active(), round);
            logs.turn().unwrap();
            logs.take_old();
            assert_eq!(reported(&mut logs), [round as u64]);
        }
    }
}
