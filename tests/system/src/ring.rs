//! A split virtqueue as a driver sees it: puts requests in, takes completions out.
//!
//! Virtio 1.3, section 2.7; the requests of a block device, section 5.2.6. Nothing here waits unless
//! [`Ring::wait`] is called, so that one thread drives many rings, or one ring as fast as it goes.
#![expect(
    unsafe_code,
    reason = "the three parts of a ring are reached through cached pointers, as a driver does"
)]

use std::collections::HashSet;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};
use std::time::{Duration, Instant};

use vhost::VringConfigData;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::{GuestMemory, LOG_PAGE};
use crate::readable_within;

/// The chain goes on in the descriptor `next`.
pub const DESC_NEXT: u16 = 1;
/// The device writes to the buffer.
pub const DESC_WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const DESC_INDIRECT: u16 = 4;

/// VIRTIO_BLK_T_IN.
pub const READ: u32 = 0;
/// VIRTIO_BLK_T_OUT.
pub const WRITE: u32 = 1;
/// VIRTIO_BLK_T_FLUSH.
pub const FLUSH: u32 = 4;
/// VIRTIO_BLK_T_GET_ID.
pub const GET_ID: u32 = 8;
/// VIRTIO_BLK_T_DISCARD.
pub const DISCARD: u32 = 11;
/// VIRTIO_BLK_T_WRITE_ZEROES.
pub const WRITE_ZEROES: u32 = 13;
/// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, in a segment of [`WRITE_ZEROES`].
pub const FLAG_UNMAP: u32 = 1;

/// VIRTIO_BLK_S_OK.
pub const OK: u8 = 0;
/// VIRTIO_BLK_S_IOERR.
pub const IO_ERROR: u8 = 1;
/// VIRTIO_BLK_S_UNSUPP.
pub const UNSUPPORTED: u8 = 2;
/// What the status byte holds until the device writes it.
pub const NO_STATUS: u8 = 0xee;

/// Most data segments of one request.
pub const MAX_SEGMENTS: usize = 30;
const TABLE: u64 = (MAX_SEGMENTS as u64 + 2) * 16;
const META: u64 = 32;

/// One descriptor, as it lies in memory.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Desc {
    /// Guest address of the buffer.
    pub addr: u64,
    /// Its length in bytes.
    pub len: u32,
    /// `DESC_*`.
    pub flags: u16,
    /// The next descriptor of the chain.
    pub next: u16,
}

/// A request for a block device.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// `READ`, `WRITE`, ..., or any other number.
    pub kind: u32,
    /// First sector of 512 bytes.
    pub sector: u64,
    /// Guest addresses and lengths of the data.
    pub data: &'a [(u64, u32)],
}

impl Request<'_> {
    fn device_writes_data(&self) -> bool {
        matches!(self.kind, READ | GET_ID)
    }
}

/// Names a request that is in flight: the head of its chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u16);

/// A request that the device is done with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// Which.
    pub token: Token,
    /// `OK`, `IO_ERROR`, `UNSUPPORTED`.
    pub status: u8,
    /// Bytes that the device says it wrote, the status included.
    pub written: u32,
}

/// What a ring looks like.
#[derive(Debug, Clone, Copy)]
pub struct RingOptions {
    /// Descriptors, a power of two.
    pub size: u16,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Use indirect tables.
    pub indirect: bool,
    /// Which region of guest memory holds the ring.
    pub region: usize,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    in_flight: bool,
    position: u16,
    descriptors: u16,
    device_writes: bool,
}

/// A ring and its driver.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<GuestMemory>,
    options: RingOptions,
    desc: u64,
    avail: u64,
    used: u64,
    meta: u64,
    tables: u64,
    desc_at: *mut Desc,
    avail_at: *mut u16,
    used_at: *mut u16,
    meta_at: *mut u8,
    tables_at: *mut Desc,
    kick: EventFd,
    call: EventFd,
    next_avail: u16,
    next_used: u16,
    kicked_at: u16,
    free: Vec<u16>,
    slots: Vec<Slot>,
    in_flight: usize,
    kicks: u64,
    written: Option<HashSet<u64>>,
}

// SAFETY: the pointers go into guest memory, which `memory` keeps mapped and which belongs to no thread.
unsafe impl Send for Ring {}

impl Ring {
    /// An empty ring in its own part of guest memory.
    pub fn new(memory: Arc<GuestMemory>, options: RingOptions) -> std::io::Result<Self> {
        let size = u64::from(options.size);
        assert!(options.size.is_power_of_two(), "a ring of {size} descriptors");
        let page = |len| memory.alloc(options.region, len, LOG_PAGE);
        let (desc, avail, used) = (page(size * 16), page(size * 2 + 6), page(size * 8 + 6));
        let (meta, tables) = (page(size * META), page(size * TABLE));
        let host = |addr, len: u64| memory.host(addr, usize::try_from(len).expect("64-bit"));
        Ok(Self {
            desc_at: host(desc, size * 16).cast(),
            avail_at: host(avail, size * 2 + 6).cast(),
            used_at: host(used, size * 8 + 6).cast(),
            meta_at: host(meta, size * META),
            tables_at: host(tables, size * TABLE).cast(),
            kick: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            call: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            next_avail: 0,
            next_used: 0,
            kicked_at: 0,
            free: (0..options.size).rev().collect(),
            slots: vec![Slot::default(); usize::from(options.size)],
            in_flight: 0,
            kicks: 0,
            written: None,
            memory,
            options,
            desc,
            avail,
            used,
            meta,
            tables,
        })
    }

    /// The memory that the ring lies in.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// What it was made with.
    pub fn options(&self) -> RingOptions {
        self.options
    }

    /// The eventfd by which the device is told of requests.
    pub fn kick_fd(&self) -> &EventFd {
        &self.kick
    }

    /// The eventfd by which the device tells of completions.
    pub fn call_fd(&self) -> &EventFd {
        &self.call
    }

    /// Kicks sent so far.
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether a request is in flight that was made available before another that is completed.
    pub fn is_out_of_order(&self) -> bool {
        let oldest = self.next_avail.wrapping_sub(self.in_flight as u16);
        let age = |slot: &Slot| self.next_avail.wrapping_sub(slot.position);
        self.slots.iter().any(|slot| slot.in_flight && age(slot) > self.next_avail.wrapping_sub(oldest))
    }

    /// Guest addresses of the descriptor table, the available and the used ring.
    pub fn parts(&self) -> [u64; 3] {
        [self.desc, self.avail, self.used]
    }

    /// Where the header (at +0) and the status byte (at +16) of a request lie.
    pub fn meta(&self, token: Token) -> u64 {
        self.meta + u64::from(token.0) * META
    }

    /// Where the indirect table of a request lies.
    pub fn table(&self, token: Token) -> u64 {
        self.tables + u64::from(token.0) * TABLE
    }

    /// Whether the request is in flight.
    pub fn is_in_flight(&self, token: Token) -> bool {
        self.slots[usize::from(token.0)].in_flight
    }

    /// What SET_VRING_ADDR says of this ring.
    pub fn config(&self, log: bool) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.options.size,
            queue_size: self.options.size,
            flags: u32::from(log),
            desc_table_addr: self.memory.user_addr(self.desc),
            used_ring_addr: self.memory.user_addr(self.used),
            avail_ring_addr: self.memory.user_addr(self.avail),
            log_addr: log.then_some(self.used),
        }
    }

    /// The next index of the available ring: what a driver that lost nothing starts from.
    pub fn avail_idx(&self) -> u16 {
        self.next_avail
    }

    /// The index of the used ring as the device left it.
    pub fn used_idx(&self) -> u16 {
        self.used_u16(1).load(Ordering::Acquire)
    }

    /// How far completions were taken.
    pub fn seen_idx(&self) -> u16 {
        self.next_used
    }

    /// From now on remembers each page of guest memory that the device has to have written.
    pub fn track_written_pages(&mut self) {
        self.written = Some(HashSet::new());
    }

    /// The pages that the device wrote since the last call.
    pub fn take_written_pages(&mut self) -> HashSet<u64> {
        self.written.replace(HashSet::new()).unwrap_or_default()
    }

    fn note_written(&mut self, addr: u64, len: u64) {
        if let Some(pages) = &mut self.written
            && len > 0
        {
            pages.extend(addr / LOG_PAGE..=(addr + len - 1) / LOG_PAGE);
        }
    }

    fn avail_u16(&self, index: usize) -> &AtomicU16 {
        assert!(index < usize::from(self.options.size) + 3);
        // SAFETY: the index was checked against the size that was mapped in `new`; aligned to a page plus 2 * index.
        unsafe { AtomicU16::from_ptr(self.avail_at.add(index)) }
    }

    fn used_u16(&self, index: usize) -> &AtomicU16 {
        assert!(index < usize::from(self.options.size) * 4 + 3);
        // SAFETY: as in `avail_u16`.
        unsafe { AtomicU16::from_ptr(self.used_at.add(index)) }
    }

    fn used_element(&self, index: u16) -> (u32, u32) {
        let at = 2 + usize::from(index % self.options.size) * 4;
        let (id, len) = (self.used_u16(at) as *const AtomicU16, self.used_u16(at + 2) as *const AtomicU16);
        // SAFETY: each is the first half of a 32-bit word that is aligned to 4 (the ring starts a page, elements at
        // byte 4) and lies in the ring, as the checked accessors have shown.
        unsafe {
            let load =
                |at: *const AtomicU16| AtomicU32::from_ptr(at.cast_mut().cast()).load(Ordering::Relaxed);
            (load(id), load(len))
        }
    }

    /// Writes a descriptor of the table as it is, whatever is in it.
    pub fn write_desc(&self, index: u16, desc: Desc) {
        assert!(index < self.options.size);
        // SAFETY: within the table mapped in `new`, aligned to 16.
        unsafe { self.desc_at.add(usize::from(index)).write_volatile(desc) }
    }

    /// Writes entries of a request's indirect table as they are.
    pub fn write_table(&self, token: Token, entries: &[Desc]) {
        assert!(entries.len() <= MAX_SEGMENTS + 2, "an indirect table has {} entries", MAX_SEGMENTS + 2);
        assert!(token.0 < self.options.size);
        let first = usize::from(token.0) * (MAX_SEGMENTS + 2);
        for (i, desc) in entries.iter().enumerate() {
            // SAFETY: within the part mapped in `new`: MAX_SEGMENTS + 2 entries for each descriptor; aligned to 16.
            unsafe { self.tables_at.add(first + i).write_volatile(*desc) }
        }
    }

    /// Writes the header of a request and makes its status unset; returns the guest addresses of both.
    pub fn write_header(&self, token: Token, kind: u32, sector: u64) -> (u64, u64) {
        assert!(token.0 < self.options.size);
        // SAFETY: within the part mapped in `new`: META bytes for each descriptor; aligned to 32.
        unsafe {
            let at = self.meta_at.add(usize::from(token.0) * META as usize);
            at.cast::<u32>().write_volatile(kind);
            at.add(4).cast::<u32>().write_volatile(0);
            at.add(8).cast::<u64>().write_volatile(sector);
            at.add(16).write_volatile(NO_STATUS);
        }
        (self.meta(token), self.meta(token) + 16)
    }

    fn status(&self, token: Token) -> u8 {
        assert!(token.0 < self.options.size);
        // SAFETY: as in `write_header`; the device wrote it before the used index that `poll` has read.
        unsafe { self.meta_at.add(usize::from(token.0) * META as usize + 16).read_volatile() }
    }

    /// Whether a request with this many data segments has room.
    pub fn has_room(&self, segments: usize) -> bool {
        self.free.len() >= if self.options.indirect { 1 } else { segments + 2 }
    }

    /// Takes a descriptor for a chain that the caller builds. It comes back when the device completes it, or by
    /// [`Ring::give_back`].
    pub fn take_head(&mut self) -> Option<Token> {
        self.free.pop().map(Token)
    }

    /// Returns what [`Ring::take_head`] gave and was not published.
    pub fn give_back(&mut self, token: Token) {
        self.free.push(token.0);
    }

    /// Puts a chain that the caller built into the available ring. `extra` further descriptors are given back with it,
    /// those that follow it by `next`.
    pub fn publish(&mut self, head: Token, extra: u16) {
        self.slots[usize::from(head.0)] =
            Slot { in_flight: true, position: self.next_avail, descriptors: extra + 1, device_writes: false };
        self.in_flight += 1;
        self.push_avail(head.0);
    }

    /// Writes any number into the next place of the available ring and moves its index.
    pub fn push_avail(&mut self, head: u16) {
        let place = usize::from(self.next_avail % self.options.size);
        self.avail_u16(2 + place).store(head, Ordering::Relaxed);
        self.set_avail_idx(self.next_avail.wrapping_add(1));
    }

    /// Sets the available ring's index to any number.
    pub fn set_avail_idx(&mut self, index: u16) {
        self.next_avail = index;
        self.avail_u16(1).store(index, Ordering::Release);
    }

    /// Puts a request into the ring; the device is told by [`Ring::kick`]. `None` when there is no room.
    pub fn submit(&mut self, request: &Request<'_>) -> Option<Token> {
        assert!(request.data.len() <= MAX_SEGMENTS, "{} segments", request.data.len());
        if !self.has_room(request.data.len()) {
            return None;
        }
        let token = Token(self.free.pop()?);
        let (header, status) = self.write_header(token, request.kind, request.sector);
        let data_flag = if request.device_writes_data() { DESC_WRITE } else { 0 };
        let extra = if self.options.indirect {
            self.chain_in_table(token, request, header, status, data_flag)
        } else {
            self.chain_in_ring(token, request, header, status, data_flag)
        };
        self.publish(token, extra);
        if self.written.is_some() {
            self.slots[usize::from(token.0)].device_writes = request.device_writes_data();
        }
        Some(token)
    }

    fn chain_in_table(
        &mut self,
        token: Token,
        request: &Request<'_>,
        header: u64,
        status: u64,
        flag: u16,
    ) -> u16 {
        let first = usize::from(token.0) * (MAX_SEGMENTS + 2);
        let count = request.data.len() + 2;
        assert!(count <= MAX_SEGMENTS + 2);
        let put = |i: usize, desc| {
            // SAFETY: as in `write_table`.
            unsafe { self.tables_at.add(first + i).write_volatile(desc) }
        };
        put(0, Desc { addr: header, len: 16, flags: DESC_NEXT, next: 1 });
        for (i, &(addr, len)) in request.data.iter().enumerate() {
            put(i + 1, Desc { addr, len, flags: flag | DESC_NEXT, next: i as u16 + 2 });
        }
        put(count - 1, Desc { addr: status, len: 1, flags: DESC_WRITE, next: 0 });
        let desc = Desc { addr: self.table(token), len: count as u32 * 16, flags: DESC_INDIRECT, next: 0 };
        self.write_desc(token.0, desc);
        0
    }

    fn chain_in_ring(
        &mut self,
        token: Token,
        request: &Request<'_>,
        header: u64,
        status: u64,
        flag: u16,
    ) -> u16 {
        let mut at = token.0;
        let mut desc = Desc { addr: header, len: 16, flags: DESC_NEXT, next: 0 };
        for &(addr, len) in request.data {
            desc.next = self.free.pop().expect("room was checked");
            self.write_desc(at, desc);
            at = desc.next;
            desc = Desc { addr, len, flags: flag | DESC_NEXT, next: 0 };
        }
        desc.next = self.free.pop().expect("room was checked");
        self.write_desc(at, desc);
        self.write_desc(desc.next, Desc { addr: status, len: 1, flags: DESC_WRITE, next: 0 });
        request.data.len() as u16 + 1
    }

    /// Tells the device of new requests, if it wants to be told.
    pub fn kick(&mut self) {
        // The index must be visible before the device's wish is read, or both sides could miss each other.
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.kicked_at, self.next_avail);
        let wanted = if self.options.event_idx {
            let event = self.used_u16(2 + usize::from(self.options.size) * 4).load(Ordering::Relaxed);
            self.next_avail.wrapping_sub(event).wrapping_sub(1) < self.next_avail.wrapping_sub(old)
        } else {
            self.used_u16(0).load(Ordering::Relaxed) & 1 == 0
        };
        if wanted {
            self.kick_always();
        }
    }

    /// Tells the device of new requests, whether it wants to be told or not.
    pub fn kick_always(&mut self) {
        self.kicks += 1;
        self.kicked_at = self.next_avail;
        self.kick.write(1).expect("an eventfd takes 1");
    }

    /// Asks the device not to signal completions: for a caller that polls.
    pub fn poll_only(&mut self) {
        if self.options.event_idx {
            // An event index just behind us is reached again after 65,535 completions; `poll` moves it along.
            self.set_used_event(self.next_used.wrapping_sub(1));
        } else {
            self.avail_u16(0).store(1, Ordering::Relaxed);
        }
    }

    fn set_used_event(&self, index: u16) {
        self.avail_u16(2 + usize::from(self.options.size)).store(index, Ordering::Relaxed);
    }

    /// Takes one completion.
    ///
    /// # Panics
    /// When the device completes what was not in flight: the ring is broken then, as a real driver would find it.
    pub fn poll(&mut self) -> Option<Completion> {
        if self.used_idx() == self.next_used {
            return None;
        }
        let (id, written) = self.used_element(self.next_used);
        let element = self.used + 4 + u64::from(self.next_used % self.options.size) * 8;
        self.next_used = self.next_used.wrapping_add(1);
        let token = Token(u16::try_from(id).unwrap_or(u16::MAX));
        let slot = self.slots.get(usize::from(token.0)).copied().unwrap_or_default();
        assert!(slot.in_flight, "the device completed {id}, which is not in flight (ring broken)");
        let status = self.status(token);
        if self.written.is_some() {
            self.note_written(element, 8);
            self.note_written(self.used, 4);
            self.note_written(self.meta(token) + 16, 1);
            if slot.device_writes && status == OK {
                self.note_data(token);
            }
        }
        self.retire(token, slot.descriptors);
        if self.next_used & 0x3fff == 0 && self.options.event_idx {
            self.set_used_event(self.next_used.wrapping_sub(1));
        }
        Some(Completion { token, status, written })
    }

    fn retire(&mut self, head: Token, descriptors: u16) {
        let mut at = head.0;
        for left in (0..descriptors).rev() {
            // SAFETY: `at` is below the size: it comes from `free`, and the device only reads the table.
            let next = unsafe { self.desc_at.add(usize::from(at)).read_volatile().next };
            self.free.push(at);
            if left > 0 {
                at = next;
                assert!(at < self.options.size, "a chain of this driver led out of the table");
            }
        }
        self.slots[usize::from(head.0)].in_flight = false;
        self.in_flight -= 1;
    }

    fn read_desc(&self, from_table: Option<Token>, index: u16) -> Desc {
        let base = from_table.map_or(self.desc, |token| self.table(token));
        let mut bytes = [0; 16];
        self.memory.read(base + u64::from(index) * 16, &mut bytes);
        decode_desc(&bytes)
    }

    fn note_data(&mut self, token: Token) {
        let table = self.options.indirect.then_some(token);
        let mut desc = self.read_desc(table, if table.is_some() { 0 } else { token.0 });
        while desc.flags & DESC_NEXT != 0 {
            desc = self.read_desc(table, desc.next);
            if desc.flags & DESC_WRITE != 0 {
                self.note_written(desc.addr, u64::from(desc.len));
            }
        }
    }

    /// Asks to be signalled when the next request completes; returns whether nothing is there already.
    pub fn arm(&mut self) -> bool {
        if self.options.event_idx {
            self.set_used_event(self.next_used);
        } else {
            self.avail_u16(0).store(0, Ordering::Relaxed);
        }
        // The wish must be visible before the index is looked at again.
        fence(Ordering::SeqCst);
        self.used_idx() == self.next_used
    }

    /// Waits until there is a completion, by the call eventfd; `None` after `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Option<Completion> {
        let until = Instant::now() + timeout;
        loop {
            if let Some(done) = self.poll() {
                self.poll_only();
                return Some(done);
            }
            if self.arm() {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() || !readable_within(self.call_as_fd(), left) {
                    return self.poll();
                }
                let _ = self.call.read();
            }
        }
    }

    /// The call eventfd for poll(2).
    pub fn call_as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor stays open as long as `self.call`, which the borrow bounds.
        unsafe { BorrowedFd::borrow_raw(self.call.as_raw_fd()) }
    }

    /// Submits, kicks and waits for this one request.
    ///
    /// # Panics
    /// When the ring has no room, another request completes, or nothing does within a minute.
    pub fn run(&mut self, request: &Request<'_>) -> Completion {
        let token = self.submit(request).expect("room in the ring");
        self.kick();
        let done = self.wait(Duration::from_secs(60));
        let done = done.unwrap_or_else(|| panic!("no completion of {request:?} within a minute"));
        assert_eq!(done.token, token, "another request was completed");
        done
    }

    /// Forgets everything, as a driver does that resets its device.
    pub fn reset(&mut self) {
        self.free = (0..self.options.size).rev().collect();
        self.slots.fill(Slot::default());
        (self.in_flight, self.next_used, self.kicked_at) = (0, 0, 0);
        for (addr, len) in [(self.avail, 6 + 2 * self.options.size), (self.used, 6 + 8 * self.options.size)] {
            self.memory.fill(addr, usize::from(len), 0);
        }
        self.next_avail = 0;
        let _ = self.kick.read();
        let _ = self.call.read();
    }
}

fn decode_desc(bytes: &[u8; 16]) -> Desc {
    Desc {
        addr: u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")),
        len: u32::from_le_bytes(bytes[8..12].try_into().expect("4 bytes")),
        flags: u16::from_le_bytes(bytes[12..14].try_into().expect("2 bytes")),
        next: u16::from_le_bytes(bytes[14..].try_into().expect("2 bytes")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device that completes everything at once, the newest first.
    fn serve(ring: &Ring, taken: &mut u16) -> usize {
        let available = ring.avail_u16(1).load(Ordering::Acquire);
        let mut heads = Vec::new();
        while *taken != available {
            heads.push(ring.avail_u16(2 + usize::from(*taken % ring.options.size)).load(Ordering::Relaxed));
            *taken = taken.wrapping_add(1);
        }
        for head in heads.iter().rev() {
            let used = ring.used_idx();
            let at = 2 + usize::from(used % ring.options.size) * 4;
            for (i, half) in [*head, 0, 1, 0].into_iter().enumerate() {
                ring.used_u16(at + i).store(half, Ordering::Relaxed);
            }
            ring.memory.u8(ring.meta(Token(*head)) + 16).store(OK, Ordering::Relaxed);
            ring.used_u16(1).store(used.wrapping_add(1), Ordering::Release);
        }
        heads.len()
    }

    fn ring(indirect: bool, event_idx: bool) -> Ring {
        let memory = Arc::new(GuestMemory::new(&[4 << 20]).unwrap());
        Ring::new(memory, RingOptions { size: 64, event_idx, indirect, region: 0 }).unwrap()
    }

    #[test]
    fn a_ring_goes_round_many_times_and_gives_every_descriptor_back() {
        for indirect in [false, true] {
            let mut ring = ring(indirect, false);
            let (mut taken, mut done) = (0, 0);
            while done < 200_000 {
                let data = [(0x1000, 512), (0x2000, 512)];
                while ring.submit(&Request { kind: READ, sector: 1, data: &data }).is_some() {}
                assert_eq!(ring.in_flight(), if indirect { 64 } else { 16 });
                assert!(serve(&ring, &mut taken) > 0);
                while let Some(completion) = ring.poll() {
                    assert_eq!(completion.status, OK);
                    done += 1;
                }
            }
            assert_eq!(ring.free.len(), 64);
        }
    }

    #[test]
    fn a_kick_is_sent_only_when_the_device_asks_for_it() {
        let mut ring = ring(true, true);
        let (mut taken, request) = (0, Request { kind: READ, sector: 0, data: &[(0x1000, 512)] });
        let event = 2 + 4 * 64;
        ring.submit(&request).unwrap();
        ring.kick();
        assert_eq!(ring.kicks(), 1, "the event index is 0: the first request");
        serve(&ring, &mut taken);
        for _ in 0..10 {
            ring.submit(&request).unwrap();
            ring.kick();
        }
        assert_eq!(ring.kicks(), 1, "the device has not asked again");
        ring.used_u16(event).store(11, Ordering::Relaxed);
        ring.submit(&request).unwrap();
        ring.kick();
        assert_eq!(ring.kicks(), 2);
    }

    #[test]
    fn completions_out_of_order_are_seen_as_such() {
        let mut ring = ring(true, false);
        let request = Request { kind: READ, sector: 0, data: &[(0x1000, 512)] };
        for _ in 0..3 {
            ring.submit(&request).unwrap();
        }
        assert!(!ring.is_out_of_order());
        serve(&ring, &mut 0);
        ring.poll().unwrap();
        assert!(ring.is_out_of_order(), "the last was completed first");
        ring.poll().unwrap();
        ring.poll().unwrap();
        assert!(!ring.is_out_of_order());
    }

    #[test]
    #[should_panic(expected = "ring broken")]
    fn a_request_that_is_completed_twice_is_noticed() {
        let mut ring = ring(true, false);
        ring.submit(&Request { kind: READ, sector: 0, data: &[(0x1000, 512)] }).unwrap();
        serve(&ring, &mut 0);
        ring.poll().unwrap();
        serve(&ring, &mut 0);
        ring.poll();
    }

    #[test]
    fn a_request_costs_well_under_two_microseconds() {
        let mut ring = ring(true, true);
        let (mut taken, mut done) = (0, 0u32);
        let start = Instant::now();
        while done < 500_000 {
            while ring.submit(&Request { kind: READ, sector: 1, data: &[(0x1000, 4096)] }).is_some() {}
            ring.kick();
            serve(&ring, &mut taken);
            while ring.poll().is_some() {
                done += 1;
            }
        }
        let each = start.elapsed() / done;
        println!("{each:?} for each request, the device's part included");
        assert!(each < Duration::from_micros(2), "{each:?}");
    }
}
