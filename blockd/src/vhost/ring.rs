//! The device's side of a split virtqueue (virtio 1.3, section 2.7), with its three areas mapped once and used by
//! raw pointers: no translation and no lock for each access.
//!
//! Everything in a ring is written by the guest and trusted in nothing: every index is checked, every chain is
//! bounded. A ring that breaks the rules is an error that stops the ring, never a loop and never a panic.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::memory::{GuestMemory, HostSlice};

/// Largest queue that is accepted (virtio 1.3, section 2.7: at most 32768).
pub const QUEUE_SIZE_MAX: u16 = 32768;
/// Most descriptors of one chain, indirect ones included: as many as one system call takes, and the two that hold
/// the request's header and status.
pub const CHAIN_MAX: usize = 1024 + 2;

const DESC_BYTES: u64 = 16;
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;
/// VIRTQ_USED_F_NO_NOTIFY.
const NO_NOTIFY: u16 = 1;

/// How a guest's ring can be broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The size is not a power of two up to [`QUEUE_SIZE_MAX`].
    #[error("queue size {0} is not a power of two from 1 to {QUEUE_SIZE_MAX}")]
    BadSize(u32),
    /// An area is not within one region of guest memory, or not aligned.
    #[error("the {0} of the ring is not within one region of guest memory, or not aligned")]
    BadAddress(&'static str),
    /// The driver made more available than the ring holds.
    #[error("available index {avail} is more than {size} ahead of {next}")]
    AvailJump {
        /// The driver's index.
        avail: u16,
        /// What was taken so far.
        next: u16,
        /// The ring's size.
        size: u16,
    },
    /// A descriptor index beyond the table.
    #[error("descriptor index {0} is beyond its table")]
    BadIndex(u32),
    /// More descriptors than [`CHAIN_MAX`], or a loop.
    #[error("a chain has more than {CHAIN_MAX} descriptors")]
    ChainTooLong,
    /// An indirect table within an indirect table, or with a NEXT flag on its descriptor.
    #[error("an indirect descriptor where none may be")]
    BadIndirect,
    /// An indirect table whose length is 0 or no multiple of 16.
    #[error("an indirect table of {0} bytes")]
    BadIndirectLength(u32),
    /// A table or buffer that is not guest memory.
    #[error("guest address {0:#x} is not mapped")]
    BadBuffer(u64),
}

/// Where the driver put the ring's areas, in the front end's virtual addresses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
}

/// One buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes; may be 0.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

/// A mapped ring.
#[derive(Debug)]
pub struct Ring {
    #[expect(dead_code, reason = "keeps the areas mapped that the pointers are into")]
    memory: Arc<GuestMemory>,
    size: u16,
    desc: *const u8,
    avail: *const AtomicU16,
    used: *const AtomicU16,
    used_guest_addr: u64,
    event_idx: bool,
    next_avail: u16,
    /// The available ring's index as it was read last. What lies before it is taken without looking there again: the driver
    /// writes to that cache line at the same time.
    seen_avail: u16,
    next_used: u16,
    /// `next_used` when the driver was last told.
    signalled_used: u16,
    /// Whether the driver has never been told.
    never_signalled: bool,
}

// SAFETY: the pointers are into shared mappings that `memory` keeps alive; one worker owns the ring at a time.
unsafe impl Send for Ring {}

/// A part of the used ring that was written, for the dirty log: guest address and length.
pub type Written = (u64, u64);

impl Ring {
    /// Maps the ring. `next_avail` is where taking goes on; the used ring goes on where its index stands.
    pub fn map(
        memory: &Arc<GuestMemory>,
        size: u32,
        at: RingAddresses,
        event_idx: bool,
        next_avail: u16,
    ) -> Result<Self, RingError> {
        let mut ring = Self::map_areas(memory, size, at, event_idx)?;
        ring.set_next_avail(next_avail);
        ring.next_used = ring.used_idx().load(Ordering::Acquire);
        ring.signalled_used = ring.next_used;
        Ok(ring)
    }

    /// Maps the areas anew (memory or addresses have changed) and goes on with the same indices.
    pub fn remap(&mut self, memory: &Arc<GuestMemory>, at: RingAddresses) -> Result<(), RingError> {
        let mut ring = Self::map_areas(memory, u32::from(self.size), at, self.event_idx)?;
        ring.set_next_avail(self.next_avail);
        ring.next_used = self.next_used;
        ring.signalled_used = self.signalled_used;
        ring.never_signalled = self.never_signalled;
        *self = ring;
        Ok(())
    }

    fn map_areas(
        memory: &Arc<GuestMemory>,
        size: u32,
        at: RingAddresses,
        event_idx: bool,
    ) -> Result<Self, RingError> {
        if !size.is_power_of_two() || size > u32::from(QUEUE_SIZE_MAX) {
            return Err(RingError::BadSize(size));
        }
        let n = u64::from(size);
        let area = |what, addr: u64, len, align| -> Result<HostSlice, RingError> {
            let slice = memory.by_user_addr(addr, len).ok_or(RingError::BadAddress(what))?;
            if (slice.ptr as u64).is_multiple_of(align) {
                Ok(slice)
            } else {
                Err(RingError::BadAddress(what))
            }
        };
        // The event index is read and written only where it was negotiated, but the areas always have room for it.
        let desc = area("descriptor table", at.desc, n * DESC_BYTES, 16)?;
        let avail = area("available ring", at.avail, 6 + 2 * n, 2)?;
        let used = area("used ring", at.used, 6 + 8 * n, 4)?;
        Ok(Self {
            memory: memory.clone(),
            size: size as u16,
            desc: desc.ptr,
            avail: avail.ptr.cast(),
            used: used.ptr.cast(),
            used_guest_addr: used.guest_addr,
            event_idx,
            next_avail: 0,
            seen_avail: 0,
            next_used: 0,
            signalled_used: 0,
            never_signalled: true,
        })
    }

    /// The available ring's field at a multiple of two bytes: flags, idx, ring entries, used_event.
    fn avail_at(&self, index: usize) -> &AtomicU16 {
        debug_assert!(index < 3 + usize::from(self.size));
        // SAFETY: the area was checked to hold `3 + size` aligned u16; it is only used atomically.
        unsafe { &*self.avail.add(index) }
    }

    /// The used ring's field at a multiple of two bytes: flags, idx, entries of four each, avail_event.
    fn used_at(&self, index: usize) -> &AtomicU16 {
        debug_assert!(index < 3 + 4 * usize::from(self.size));
        // SAFETY: as above for `3 + 4 * size`.
        unsafe { &*self.used.add(index) }
    }

    fn avail_idx(&self) -> &AtomicU16 {
        self.avail_at(1)
    }
    fn used_event(&self) -> &AtomicU16 {
        self.avail_at(2 + usize::from(self.size))
    }
    /// The used ring's index as the driver sees it.
    pub fn used_idx(&self) -> &AtomicU16 {
        self.used_at(1)
    }
    fn avail_event(&self) -> &AtomicU16 {
        self.used_at(2 + 4 * usize::from(self.size))
    }

    /// Where taking goes on.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Goes on elsewhere in the available ring.
    pub fn set_next_avail(&mut self, next: u16) {
        (self.next_avail, self.seen_avail) = (next, next);
    }

    /// The ring's size.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Takes the next head from the available ring.
    pub fn pop(&mut self) -> Result<Option<u16>, RingError> {
        if self.seen_avail == self.next_avail {
            // Acquire: the ring entries and descriptors written before the index are seen.
            let avail = self.avail_idx().load(Ordering::Acquire);
            let ahead = avail.wrapping_sub(self.next_avail);
            if ahead == 0 {
                return Ok(None);
            }
            if ahead > self.size {
                return Err(RingError::AvailJump { avail, next: self.next_avail, size: self.size });
            }
            self.seen_avail = avail;
        }
        let head = self.avail_head(self.next_avail);
        if head >= self.size {
            return Err(RingError::BadIndex(u32::from(head)));
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    fn avail_head(&self, index: u16) -> u16 {
        let slot = usize::from(index & (self.size - 1));
        self.avail_at(2 + slot).load(Ordering::Relaxed)
    }

    /// Has the processor fetch what the next requests will be read from, which the driver's processor has written: the
    /// descriptors of the one after the next, and what the next one's first descriptor points to, a header or a table.
    pub fn fetch_ahead(&self, memory: &GuestMemory) {
        let ahead = self.seen_avail.wrapping_sub(self.next_avail);
        let table = Table { ptr: self.desc, len: u32::from(self.size), copy: Vec::new() };
        let next = |n: u16| u32::from(self.avail_head(self.next_avail.wrapping_add(n)));
        if ahead > 1 {
            table.prefetch(next(1));
        }
        if ahead > 0
            && let Ok(first) = table.get(next(0))
        {
            // Whatever is wrong with it is found when it is taken.
            let _ = memory.for_each_slice(first.addr, 1, |slice| prefetch(slice.ptr));
        }
    }

    /// Whether something is available that was not taken.
    pub fn has_available(&self) -> bool {
        self.avail_idx().load(Ordering::Acquire) != self.next_avail
    }

    /// Appends the buffers of the chain that begins at `head`.
    pub fn chain(&self, memory: &GuestMemory, head: u16, out: &mut Vec<Buffer>) -> Result<(), RingError> {
        let mut table = Table { ptr: self.desc, len: u32::from(self.size), copy: Vec::new() };
        let mut index = u32::from(head);
        let mut indirect = false;
        // Bounded by the number of descriptors that the tables can hold together: a loop ends here.
        for _ in 0..=CHAIN_MAX {
            let d = table.get(index)?;
            if d.flags & F_INDIRECT != 0 {
                if indirect || d.flags & F_NEXT != 0 {
                    return Err(RingError::BadIndirect);
                }
                table = Table::indirect(memory, d)?;
                indirect = true;
                index = 0;
                continue;
            }
            if out.len() >= CHAIN_MAX {
                return Err(RingError::ChainTooLong);
            }
            out.push(Buffer { addr: d.addr, len: d.len, writable: d.flags & F_WRITE != 0 });
            if d.flags & F_NEXT == 0 {
                return Ok(());
            }
            index = u32::from(d.next);
        }
        Err(RingError::ChainTooLong)
    }

    /// Puts a completed chain on the used ring and publishes it. Returns the new index and what was written, in order.
    pub fn push_used(&mut self, head: u16, written: u32) -> (u16, [Written; 2]) {
        let slot = usize::from(self.next_used & (self.size - 1));
        let entry = 2 + 4 * slot;
        self.used_at(entry).store(head, Ordering::Relaxed);
        self.used_at(entry + 1).store(0, Ordering::Relaxed);
        self.used_at(entry + 2).store(written as u16, Ordering::Relaxed);
        self.used_at(entry + 3).store((written >> 16) as u16, Ordering::Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
        // Release: the entry, and all that the device wrote before, is seen by who sees the index.
        self.used_idx().store(self.next_used, Ordering::Release);
        (self.next_used, [(self.used_guest_addr + 4 + 8 * slot as u64, 8), (self.used_guest_addr + 2, 2)])
    }

    /// The used ring's part that `enable_kicks` and `disable_kicks` write.
    pub fn event_written(&self) -> Written {
        if self.event_idx {
            (self.used_guest_addr + 4 + 8 * u64::from(self.size), 2)
        } else {
            (self.used_guest_addr, 2)
        }
    }

    /// Whether the driver wants to be told of what was completed since it was told last.
    pub fn needs_call(&mut self) -> bool {
        // The used index must be visible before the driver's wish is read (virtio 1.3, section 2.7.10).
        fence(Ordering::SeqCst);
        if !self.event_idx {
            let wants = self.avail_at(0).load(Ordering::Relaxed) & NO_INTERRUPT == 0;
            return wants && std::mem::replace(&mut self.signalled_used, self.next_used) != self.next_used;
        }
        let (old, new) = (self.signalled_used, self.next_used);
        if old == new {
            return false;
        }
        let event = self.used_event().load(Ordering::Relaxed);
        self.signalled_used = new;
        let first = std::mem::replace(&mut self.never_signalled, false);
        // vring_need_event of the specification: the event index lies within what was published since.
        first || new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// Asks the driver for a kick at the next available chain. Returns whether one became available meanwhile, in
    /// which case the kick may never come.
    #[must_use]
    pub fn enable_kicks(&self) -> bool {
        if self.event_idx {
            self.avail_event().store(self.next_avail, Ordering::Relaxed);
        } else {
            self.used_at(0).store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.has_available()
    }

    /// Tells the driver that no kick is needed. With the event index nothing needs to be said: an index that lies
    /// behind asks for none.
    pub fn disable_kicks(&self) {
        if !self.event_idx {
            self.used_at(0).store(NO_NOTIFY, Ordering::Relaxed);
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// A descriptor table: the ring's own, or an indirect one, which is copied when it does not lie together.
struct Table {
    ptr: *const u8,
    len: u32,
    copy: Vec<u8>,
}

impl Table {
    fn indirect(memory: &GuestMemory, d: Descriptor) -> Result<Self, RingError> {
        if d.len == 0 || !d.len.is_multiple_of(DESC_BYTES as u32) {
            return Err(RingError::BadIndirectLength(d.len));
        }
        let len = d.len / DESC_BYTES as u32;
        // A longer table cannot be used to its end anyway.
        let used_bytes = u64::from(len).min(CHAIN_MAX as u64 + 1) * DESC_BYTES;
        let mut first = None;
        let mut copy = Vec::new();
        let mapped = memory.for_each_slice(d.addr, used_bytes, |s| {
            if s.len as u64 == used_bytes {
                first = Some(s.ptr);
            } else {
                // SAFETY: the slice is mapped; the guest may change it meanwhile, which the copy tolerates.
                unsafe {
                    let at = copy.len();
                    copy.resize(at + s.len, 0);
                    std::ptr::copy_nonoverlapping(s.ptr, copy.as_mut_ptr().add(at), s.len);
                }
            }
        });
        if !mapped {
            return Err(RingError::BadBuffer(d.addr));
        }
        let ptr = first.unwrap_or(copy.as_mut_ptr());
        Ok(Self { ptr, len: len.min(CHAIN_MAX as u32 + 1), copy })
    }

    fn get(&self, index: u32) -> Result<Descriptor, RingError> {
        debug_assert!(self.copy.is_empty() || self.ptr == self.copy.as_ptr());
        if index >= self.len {
            return Err(RingError::BadIndex(index));
        }
        // SAFETY: the table holds `len` descriptors of 16 bytes. The guest may change them at any time: each word is
        // read once, and what was read is what is checked and used.
        let [addr, word] = unsafe {
            let at = self.ptr.add(index as usize * 16);
            if (at as usize).is_multiple_of(8) {
                [at.cast::<u64>().read_volatile(), at.cast::<u64>().add(1).read_volatile()]
            } else {
                // Indirect tables need no alignment.
                let raw = at.cast::<[[u8; 8]; 2]>().read_volatile();
                raw.map(u64::from_ne_bytes)
            }
        };
        let (addr, word) = (u64::from_le(addr), u64::from_le(word));
        Ok(Descriptor { addr, len: word as u32, flags: (word >> 32) as u16, next: (word >> 48) as u16 })
    }

    /// For a chain that begins there: three descriptors, as most have, may lie on two cache lines.
    fn prefetch(&self, index: u32) {
        if index < self.len {
            // SAFETY: the descriptor is within the table.
            let at = unsafe { self.ptr.add(index as usize * 16) };
            prefetch(at);
            prefetch(at.wrapping_add(32));
        }
    }
}

/// Has the processor fetch the cache line at `at`, if that is mapped. Nothing happens where it is not, or where the processor's
/// way of doing it is not known.
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which may name any address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use vhost::vhost_user::message::VhostUserMemoryRegion;
    use virtio_queue::{Queue, QueueT};
    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

    use super::*;

    const MEMORY: usize = 1 << 20;
    const SIZE: u16 = 16;
    const AT: RingAddresses = RingAddresses { desc: 0, avail: 0x1000, used: 0x2000 };

    /// The same memory as this ring and as the `virtio-queue` crate see it.
    fn memory() -> (Arc<GuestMemory>, GuestMemoryMmap<()>) {
        let name = c"ring-test";
        let fd = nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::empty()).expect("memfd");
        let file = std::fs::File::from(fd);
        file.set_len(MEMORY as u64).expect("memfd has a size");
        assert!(file.as_raw_fd() >= 0);
        let theirs = file.try_clone().expect("dup");
        let ranges = [(GuestAddress(0), MEMORY, Some(FileOffset::new(theirs, 0)))];
        let theirs = GuestMemoryMmap::from_ranges_with_files(ranges).expect("mmap");
        let region = VhostUserMemoryRegion::new(0, MEMORY as u64, 0, 0);
        (Arc::new(GuestMemory::from_table(&[region], vec![file]).expect("mmap")), theirs)
    }

    fn descriptor(random: &mut ChaCha8Rng, size: u16, may_be_indirect: bool) -> [u8; 16] {
        let mut d = [0; 16];
        let indirect = may_be_indirect && random.random_ratio(1, 6);
        // Mostly within memory, some beyond its end; tables of whole descriptors, and of others.
        let addr = if random.random_ratio(1, 30) {
            MEMORY as u64 + 5
        } else {
            random.random_range(0x4000..0x8_0000)
        };
        let len = if indirect {
            random.random_range(0..8) * 16 + u32::from(random.random_ratio(1, 20))
        } else {
            random.random_range(0..9000)
        };
        let next = if random.random_ratio(1, 30) { size } else { random.random_range(0..size) };
        let flag = |wanted: bool, flag: u16| if wanted { flag } else { 0 };
        let flags = flag(random.random_ratio(2, 3), F_NEXT)
            | flag(random.random(), F_WRITE)
            | flag(indirect, F_INDIRECT);
        d[..8].copy_from_slice(&addr.to_le_bytes());
        d[8..12].copy_from_slice(&len.to_le_bytes());
        d[12..14].copy_from_slice(&flags.to_le_bytes());
        d[14..].copy_from_slice(&next.to_le_bytes());
        d
    }

    #[test]
    fn chains_are_walked_as_the_virtio_queue_crate_walks_them() {
        let (ours, theirs) = memory();
        let mut ring = Ring::map(&ours, u32::from(SIZE), AT, false, 0).expect("the areas are in memory");
        let mut queue = Queue::new(SIZE).expect("a power of two");
        queue.set_size(SIZE);
        queue.try_set_desc_table_address(GuestAddress(AT.desc)).expect("aligned");
        queue.try_set_avail_ring_address(GuestAddress(AT.avail)).expect("aligned");
        queue.try_set_used_ring_address(GuestAddress(AT.used)).expect("aligned");
        queue.set_ready(true);
        let mut random = ChaCha8Rng::seed_from_u64(11);
        let (mut whole, mut broken) = (0, 0);
        for round in 0..60_000u32 {
            for i in 0..SIZE {
                let d = descriptor(&mut random, SIZE, true);
                theirs.write_slice(&d, GuestAddress(u64::from(i) * 16)).expect("in memory");
            }
            // Anything may be an indirect table; these places often are.
            for _ in 0..40 {
                let at = random.random_range(0x400..0x8000) * 16;
                let indirect = random.random_ratio(1, 10);
                let d = descriptor(&mut random, 8, indirect);
                theirs.write_slice(&d, GuestAddress(at)).expect("in memory");
            }
            let head = random.random_range(0..SIZE);
            let slot = u64::from(round as u16 % SIZE);
            theirs.write_obj(head, GuestAddress(AT.avail + 4 + 2 * slot)).expect("in memory");
            theirs.write_obj((round as u16).wrapping_add(1), GuestAddress(AT.avail + 2)).expect("in memory");

            assert_eq!(ring.pop(), Ok(Some(head)));
            let mut got = Vec::new();
            let result = ring.chain(&ours, head, &mut got);
            let chain = queue.pop_descriptor_chain(&theirs).expect("one is available");
            assert_eq!(chain.head_index(), head);
            let expected: Vec<_> = chain.map(|d| (d.addr().0, d.len(), d.is_write_only())).collect();
            let got: Vec<_> = got.iter().map(|b| (b.addr, b.len, b.writable)).collect();
            if result.is_ok() {
                whole += 1;
                assert_eq!(got, expected, "round {round}");
            } else {
                // The crate ends a broken chain silently; what it gives is a beginning of it.
                broken += 1;
                let n = got.len().min(expected.len());
                assert_eq!(got[..n], expected[..n], "round {round}: {result:?}");
            }
        }
        assert!(whole > 5_000 && broken > 5_000, "{whole} whole chains and {broken} broken ones");
    }

    #[test]
    fn completions_are_published_as_the_virtio_queue_crate_publishes_them() {
        let (ours, theirs) = memory();
        let (other_ours, other) = memory();
        drop(other_ours);
        let mut ring = Ring::map(&ours, u32::from(SIZE), AT, true, 0).expect("the areas are in memory");
        let mut queue = Queue::new(SIZE).expect("a power of two");
        queue.set_size(SIZE);
        queue.try_set_desc_table_address(GuestAddress(AT.desc)).expect("aligned");
        queue.try_set_avail_ring_address(GuestAddress(AT.avail)).expect("aligned");
        queue.try_set_used_ring_address(GuestAddress(AT.used)).expect("aligned");
        queue.set_event_idx(true);
        queue.set_ready(true);
        let mut random = ChaCha8Rng::seed_from_u64(12);
        let mut told = false;
        for round in 0..200_000u32 {
            let (head, len) = (random.random_range(0..SIZE), random.random());
            // The driver asks to be told at any index.
            let event: u16 = if random.random() {
                random.random()
            } else {
                (round as u16).wrapping_sub(random.random_range(0..9))
            };
            for m in [&theirs, &other] {
                m.write_obj(event, GuestAddress(AT.avail + 4 + 2 * u64::from(SIZE))).expect("in memory");
            }
            ring.push_used(head, len);
            queue.add_used(&other, head, len).expect("in memory");
            let (mut a, mut b) = ([0u8; 6 + 8 * SIZE as usize], [0u8; 6 + 8 * SIZE as usize]);
            theirs.read_slice(&mut a, GuestAddress(AT.used)).expect("in memory");
            other.read_slice(&mut b, GuestAddress(AT.used)).expect("in memory");
            assert_eq!(a, b, "round {round}");
            if random.random_ratio(1, 4) {
                let theirs_calls = queue.needs_notification(&other).expect("in memory");
                // The very first time the driver is told in any case: a front end that came back may wait for it.
                assert!(
                    ring.needs_call() == theirs_calls || !std::mem::replace(&mut told, true),
                    "round {round}"
                );
                told = true;
            }
        }
    }
}
