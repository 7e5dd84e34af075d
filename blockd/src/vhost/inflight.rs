//! In-flight tracking: which requests were taken but not yet completed, in memory that outlives this process.
//!
//! The layout of a split queue's region and the order of the steps are those of the vhost-user specification,
//! "Inflight I/O tracking":
//!
//! ```text
//!   take:      desc[head].counter = n++;  desc[head].inflight = 1
//!   complete:  desc[head].next = last_batch_head;  last_batch_head = head;
//!              (used ring entry, used.idx);  desc[head].inflight = 0;  used_idx = used.idx
//! ```
//!
//! A process that dies between two of the steps leaves enough for the next one to know which heads are still open:
//! those with `inflight` set, but for the last completed one if `used.idx` had moved on and `used_idx` had not.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering, fence};

use nix::fcntl::{FcntlArg, SealFlag};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{FileOffset, MmapRegion};

/// Queue regions begin on a multiple of this, as in libvhost-user.
const ALIGN: u64 = 64;
/// `features`, `version`, `desc_num`, `last_batch_head`, `used_idx`.
const HEADER: u64 = 16;
/// `inflight`, padding, `next`, `counter`.
const DESC: u64 = 16;
const VERSION: u16 = 1;

/// Bytes of one queue's region with `size` descriptors.
fn queue_bytes(size: u16) -> u64 {
    (HEADER + DESC * u64::from(size)).next_multiple_of(ALIGN)
}

/// The whole region of a device.
#[derive(Debug)]
pub struct InflightRegion {
    map: MmapRegion<()>,
    queues: u16,
    queue_size: u16,
}

// SAFETY: the mapping is only touched by atomic operations.
unsafe impl Send for InflightRegion {}
// SAFETY: as above.
unsafe impl Sync for InflightRegion {}

impl InflightRegion {
    /// Makes a zeroed region for a front end that has none yet. Returns it with its size and the file to hand over.
    pub fn create(queues: u16, queue_size: u16) -> io::Result<(u64, File)> {
        let len = queue_bytes(queue_size) * u64::from(queues.max(1));
        let fd = memfd_create(c"blockd-inflight", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let file = File::from(fd);
        file.set_len(len)?;
        let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
        nix::fcntl::fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Ok((len, file))
    }

    /// Maps the region that SET_INFLIGHT_FD carries.
    pub fn map(file: File, offset: u64, len: u64, queues: u16, queue_size: u16) -> Result<Arc<Self>, String> {
        let needed = queue_bytes(queue_size) * u64::from(queues);
        let file_len = file.metadata().map_err(|e| e.to_string())?.len();
        if queues == 0 || queue_size == 0 || len < needed {
            return Err(format!(
                "in-flight region of {len} bytes for {queues} queues of {queue_size}: {needed} are needed"
            ));
        }
        if offset.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(format!(
                "in-flight region of {len} bytes at {offset} is not within its file of {file_len}"
            ));
        }
        let map = MmapRegion::<()>::from_file(FileOffset::new(file, offset), needed as usize)
            .map_err(|e| format!("cannot map the in-flight region: {e}"))?;
        super::sigbus::guard(map.as_ptr() as usize, needed as usize)?;
        Ok(Arc::new(Self { map, queues, queue_size }))
    }

    /// The part of queue `index`, or `None` when the region was made for fewer queues or smaller ones.
    pub fn queue(self: &Arc<Self>, index: usize, size: u16) -> Option<InflightQueue> {
        if index >= usize::from(self.queues) || size > self.queue_size {
            return None;
        }
        let offset = queue_bytes(self.queue_size) * index as u64;
        // SAFETY: `map` checked that all queues' regions are within the mapping.
        let base = unsafe { self.map.as_ptr().add(offset as usize) };
        Some(InflightQueue { region: self.clone(), base, size, counter: 0 })
    }
}

impl Drop for InflightRegion {
    fn drop(&mut self) {
        super::sigbus::unguard(self.map.as_ptr() as usize);
    }
}

/// One queue's part, used by the worker that serves the queue.
#[derive(Debug)]
pub struct InflightQueue {
    #[expect(dead_code, reason = "keeps the mapping that `base` points into")]
    region: Arc<InflightRegion>,
    base: *mut u8,
    size: u16,
    counter: u64,
}

// SAFETY: `base` points into the shared mapping that `region` keeps alive; access is atomic.
unsafe impl Send for InflightQueue {}

/// What a queue starts from.
#[derive(Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Where to go on in the available ring, or `None` when the region was fresh and the front end's word counts.
    pub next_avail: Option<u16>,
    /// Heads that were taken and not completed, oldest first.
    pub open: Vec<u16>,
}

impl InflightQueue {
    fn u8_at(&self, offset: u64) -> &AtomicU8 {
        // SAFETY: callers pass offsets within this queue's region, which is mapped, shared and only used atomically.
        unsafe { AtomicU8::from_ptr(self.base.add(offset as usize)) }
    }

    fn u16_at(&self, offset: u64) -> &AtomicU16 {
        // SAFETY: as above; region starts on a page, the fields are aligned.
        unsafe { AtomicU16::from_ptr(self.base.add(offset as usize).cast()) }
    }

    fn u64_at(&self, offset: u64) -> &AtomicU64 {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(self.base.add(offset as usize).cast()) }
    }

    fn version(&self) -> &AtomicU16 {
        self.u16_at(8)
    }
    fn desc_num(&self) -> &AtomicU16 {
        self.u16_at(10)
    }
    fn last_batch_head(&self) -> &AtomicU16 {
        self.u16_at(12)
    }
    fn used_idx(&self) -> &AtomicU16 {
        self.u16_at(14)
    }
    fn inflight(&self, head: u16) -> &AtomicU8 {
        self.u8_at(HEADER + DESC * u64::from(head))
    }
    fn next(&self, head: u16) -> &AtomicU16 {
        self.u16_at(HEADER + DESC * u64::from(head) + 6)
    }
    fn desc_counter(&self, head: u16) -> &AtomicU64 {
        self.u64_at(HEADER + DESC * u64::from(head) + 8)
    }

    /// Brings the region in order for a ring whose used index is `ring_used_idx`, and says what is still open.
    pub fn recover(&mut self, ring_used_idx: u16) -> Result<Recovered, String> {
        if self.version().load(Ordering::Acquire) == 0 {
            self.desc_num().store(self.size, Ordering::Release);
            // A ring that has run before (on another host) begins with this used index, not with 0.
            self.used_idx().store(ring_used_idx, Ordering::Release);
            self.version().store(VERSION, Ordering::Release);
            return Ok(Recovered { next_avail: None, open: Vec::new() });
        }
        let (version, size) =
            (self.version().load(Ordering::Acquire), self.desc_num().load(Ordering::Acquire));
        if version != VERSION || size > self.size {
            return Err(format!(
                "in-flight region has version {version} and {size} descriptors, not {VERSION} and at most {}",
                self.size
            ));
        }
        if size < self.size {
            self.desc_num().store(self.size, Ordering::Release);
        }
        self.finish_last_batch(ring_used_idx)?;
        let mut open: Vec<(u64, u16)> = (0..self.size)
            .filter(|&head| self.inflight(head).load(Ordering::Acquire) == 1)
            .map(|head| (self.desc_counter(head).load(Ordering::Acquire), head))
            .collect();
        open.sort_unstable();
        self.counter = open.last().map_or(0, |(counter, _)| counter + 1);
        let next_avail = ring_used_idx.wrapping_add(open.len() as u16);
        Ok(Recovered { next_avail: Some(next_avail), open: open.into_iter().map(|(_, head)| head).collect() })
    }

    /// The ring's used index had moved on, but the process died before it could say so here: the heads of that last
    /// batch are done.
    fn finish_last_batch(&self, ring_used_idx: u16) -> Result<(), String> {
        let behind = ring_used_idx.wrapping_sub(self.used_idx().load(Ordering::Acquire));
        if behind > self.size {
            // A ring that was set up anew (the guest has rebooted): nothing of the old one is open.
            for head in 0..self.size {
                self.inflight(head).store(0, Ordering::Release);
            }
        } else {
            let mut head = self.last_batch_head().load(Ordering::Acquire);
            for _ in 0..behind {
                if head >= self.size {
                    return Err(format!("in-flight region names descriptor {head} of {}", self.size));
                }
                self.inflight(head).store(0, Ordering::Release);
                head = self.next(head).load(Ordering::Acquire);
            }
        }
        fence(Ordering::SeqCst);
        self.used_idx().store(ring_used_idx, Ordering::Release);
        Ok(())
    }

    /// A request was taken from the available ring.
    pub fn take(&mut self, head: u16) {
        self.desc_counter(head).store(self.counter, Ordering::Relaxed);
        self.counter += 1;
        self.inflight(head).store(1, Ordering::Release);
    }

    /// A request is about to be put on the used ring.
    pub fn completing(&mut self, head: u16) {
        self.next(head).store(self.last_batch_head().load(Ordering::Relaxed), Ordering::Relaxed);
        self.last_batch_head().store(head, Ordering::Release);
    }

    /// The used ring's index has been published as `used_idx`.
    pub fn completed(&mut self, head: u16, used_idx: u16) {
        self.inflight(head).store(0, Ordering::Release);
        self.used_idx().store(used_idx, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region() -> (Arc<InflightRegion>, File) {
        let (len, file) = InflightRegion::create(2, 8).expect("memfd");
        let again = file.try_clone().expect("dup");
        (InflightRegion::map(file, 0, len, 2, 8).expect("map"), again)
    }

    #[test]
    fn a_fresh_region_leaves_the_start_to_the_front_end() {
        let mut q = region().0.queue(0, 8).expect("in range");
        assert_eq!(q.recover(77).expect("fresh"), Recovered { next_avail: None, open: vec![] });
    }

    #[test]
    fn open_requests_are_found_in_the_order_they_were_taken() {
        let (r, _) = region();
        let mut q = r.queue(1, 8).expect("in range");
        q.recover(0).expect("fresh");
        for head in [5, 2, 7, 0] {
            q.take(head);
        }
        q.completing(2);
        q.completed(2, 1);
        let mut after = r.queue(1, 8).expect("in range");
        assert_eq!(after.recover(1).expect("sound"), Recovered { next_avail: Some(4), open: vec![5, 7, 0] });
    }

    #[test]
    fn a_death_between_used_index_and_bookkeeping_does_not_repeat_the_request() {
        let (r, _) = region();
        let mut q = r.queue(0, 8).expect("in range");
        q.recover(0).expect("fresh");
        for head in [1, 3] {
            q.take(head);
        }
        q.completing(3); // the used ring says 1 now, the region still 0
        let mut after = r.queue(0, 8).expect("in range");
        assert_eq!(after.recover(1).expect("sound"), Recovered { next_avail: Some(2), open: vec![1] });
    }

    #[test]
    fn a_death_before_the_used_index_repeats_the_request() {
        let (r, _) = region();
        let mut q = r.queue(0, 8).expect("in range");
        q.recover(0).expect("fresh");
        q.take(6);
        q.completing(6);
        let mut after = r.queue(0, 8).expect("in range");
        assert_eq!(after.recover(0).expect("sound"), Recovered { next_avail: Some(1), open: vec![6] });
    }

    #[test]
    fn a_ring_that_was_set_up_anew_has_nothing_open() {
        let (r, _) = region();
        let mut q = r.queue(0, 8).expect("in range");
        q.recover(500).expect("fresh");
        q.take(1);
        let mut after = r.queue(0, 8).expect("in range");
        assert_eq!(after.recover(0).expect("sound"), Recovered { next_avail: Some(0), open: vec![] });
    }

    #[test]
    fn a_region_that_is_too_small_is_refused() {
        let (_, file) = region();
        assert!(InflightRegion::map(file.try_clone().expect("dup"), 0, 64, 2, 8).is_err());
        assert!(InflightRegion::map(file, 1 << 40, 4096, 1, 8).is_err());
    }
}
