//! A driver for a block device: the handshake through registers, and requests through split rings in guest memory, with
//! notifications as EVENT_IDX has them, so that a kick or an interrupt that gets lost is noticed.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use shim::device::Device;
use shim::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

pub const READ: u32 = 0;
pub const WRITE: u32 = 1;
pub const FLUSH: u32 = 4;
/// Bytes of every read and write.
pub const BLOCK: usize = 4096;
/// Descriptors of each ring.
pub const SIZE: u16 = 64;
/// Requests that a ring holds: three descriptors each.
pub const DEPTH: usize = 16;

const F_EVENT_IDX: u64 = 1 << 29;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
const F_VERSION_1: u64 = 1 << 32;

/// Guest memory of one queue: 64 pages of rings and headers, then a page of data for each request.
const QUEUE_BYTES: u64 = 1 << 19;

pub fn read32(device: &dyn Device, offset: u64) -> u32 {
    let mut data = [0; 4];
    device.read(offset, &mut data);
    u32::from_le_bytes(data)
}

pub fn write32(device: &dyn Device, offset: u64, value: u32) {
    device.write(offset, &value.to_le_bytes());
}

/// Resets the device and sets it up with `queues` queues, whose rings begin at 1 MiB.
pub fn set_up(device: &dyn Device, ram: &GuestRam, queues: u16, more_features: u64) -> Vec<Queue> {
    write32(device, 0x70, 0);
    assert_eq!((read32(device, 0), read32(device, 4), read32(device, 8)), (0x7472_6976, 2, 2));
    write32(device, 0x70, 1);
    write32(device, 0x70, 3);
    let offered = (0..2u32).map(|half| {
        write32(device, 0x14, half);
        u64::from(read32(device, 0x10)) << (32 * half)
    });
    let offered: u64 = offered.sum();
    let wanted = F_VERSION_1 | F_EVENT_IDX | F_FLUSH | F_MQ | more_features;
    assert_eq!(wanted & !offered, 0, "features {offered:#x} are offered");
    for half in 0..2 {
        write32(device, 0x24, half);
        write32(device, 0x20, (wanted >> (32 * half)) as u32);
    }
    write32(device, 0x70, 11);
    assert_eq!(read32(device, 0x70), 11, "the features were accepted");
    let rings: Vec<_> = (0..queues).map(|index| Queue::set_up(device, ram, index)).collect();
    write32(device, 0x70, 15);
    assert_eq!(read32(device, 0x70), 15);
    rings
}

/// One request's outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    pub slot: usize,
    pub status: u8,
}

/// One queue as its driver sees it. It belongs to the guest, so it goes with the guest's memory from device to device.
#[derive(Debug, Clone)]
pub struct Queue {
    pub index: u16,
    base: u64,
    next_avail: u16,
    next_used: u16,
    kicked_at: u16,
    pub in_flight: BTreeSet<usize>,
    /// Completions, all of them.
    pub completed: u64,
}

impl Queue {
    fn set_up(device: &dyn Device, ram: &GuestRam, index: u16) -> Self {
        let base = (1 << 20) + u64::from(index) * QUEUE_BYTES;
        let queue = Self {
            index,
            base,
            next_avail: 0,
            next_used: 0,
            kicked_at: 0,
            in_flight: BTreeSet::new(),
            completed: 0,
        };
        ram.memory().write_slice(&vec![0; 64 * 4096], GuestAddress(base)).unwrap();
        write32(device, 0x30, u32::from(index));
        assert!(read32(device, 0x34) >= u32::from(SIZE));
        write32(device, 0x38, u32::from(SIZE));
        for (at, address) in [(0x80, queue.desc()), (0x90, queue.avail()), (0xa0, queue.used())] {
            write32(device, at, address as u32);
            write32(device, at + 4, (address >> 32) as u32);
        }
        write32(device, 0x44, 1);
        assert_eq!(read32(device, 0x44), 1, "queue {index} is ready");
        queue
    }

    fn desc(&self) -> u64 {
        self.base
    }
    fn avail(&self) -> u64 {
        self.base + 4096
    }
    pub fn used(&self) -> u64 {
        self.base + 2 * 4096
    }
    /// Header of a request, and its status 16 bytes on.
    pub fn meta(&self, slot: usize) -> u64 {
        self.base + 3 * 4096 + slot as u64 * 64
    }
    /// Data of a request.
    pub fn data(&self, slot: usize) -> u64 {
        self.base + 64 * 4096 + slot as u64 * BLOCK as u64
    }

    fn load(&self, ram: &GuestRam, at: u64) -> u16 {
        ram.memory().load(GuestAddress(at), Ordering::Acquire).unwrap()
    }

    fn store(&self, ram: &GuestRam, at: u64, value: u16) {
        ram.memory().store(value, GuestAddress(at), Ordering::Release).unwrap();
    }

    /// A request that is not in flight.
    pub fn free_slot(&self) -> Option<usize> {
        (0..DEPTH).find(|slot| !self.in_flight.contains(slot))
    }

    /// Makes a request available. Its data is in place already.
    pub fn submit(&mut self, ram: &GuestRam, slot: usize, kind: u32, block: u64) {
        assert!(self.in_flight.insert(slot));
        let memory = ram.memory();
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&(block * (BLOCK as u64 / 512)).to_le_bytes());
        memory.write_slice(&header, GuestAddress(self.meta(slot))).unwrap();
        memory.write_slice(&[0xee], GuestAddress(self.meta(slot) + 16)).unwrap();
        let first = slot as u16 * 3;
        let data_flags = if kind == READ { 3 } else { 1 };
        let mut chain = vec![(self.meta(slot), 16, 1)];
        if kind != FLUSH {
            chain.push((self.data(slot), BLOCK as u32, data_flags));
        }
        chain.push((self.meta(slot) + 16, 1, 2u16));
        for (i, (address, len, flags)) in chain.into_iter().enumerate() {
            let index = first + i as u16;
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&(index + 1).to_le_bytes());
            memory.write_slice(&bytes, GuestAddress(self.desc() + u64::from(index) * 16)).unwrap();
        }
        self.store(ram, self.avail() + 4 + 2 * u64::from(self.next_avail % SIZE), first);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.store(ram, self.avail() + 2, self.next_avail);
    }

    /// Tells the device, if it wants to be told.
    pub fn kick(&mut self, ram: &GuestRam, device: &dyn Device) {
        fence(Ordering::SeqCst);
        let event = self.load(ram, self.used() + 4 + 8 * u64::from(SIZE));
        let old = std::mem::replace(&mut self.kicked_at, self.next_avail);
        if self.next_avail.wrapping_sub(event).wrapping_sub(1) < self.next_avail.wrapping_sub(old) {
            write32(device, 0x50, u32::from(self.index));
        }
    }

    /// Takes a completion.
    pub fn poll(&mut self, ram: &GuestRam) -> Option<Done> {
        if self.load(ram, self.used() + 2) == self.next_used {
            return None;
        }
        let element = self.used() + 4 + 8 * u64::from(self.next_used % SIZE);
        let id: u32 = ram.memory().load(GuestAddress(element), Ordering::Acquire).unwrap();
        self.next_used = self.next_used.wrapping_add(1);
        let slot = id as usize / 3;
        let queue = self.index;
        assert!(
            id.is_multiple_of(3) && self.in_flight.remove(&slot),
            "queue {queue}: {id} was completed and is not in flight"
        );
        self.completed += 1;
        let status = ram.memory().read_obj(GuestAddress(self.meta(slot) + 16)).unwrap();
        assert_ne!(status, 0xee, "queue {queue}: {id} was completed without a status");
        Some(Done { slot, status })
    }

    /// Waits for a completion as a guest does, by the interrupt; `None` when none came.
    pub fn wait(&mut self, ram: &GuestRam, call: &EventFd, time: Duration) -> Option<Done> {
        let until = std::time::Instant::now() + time;
        loop {
            if let Some(done) = self.poll(ram) {
                return Some(done);
            }
            self.store(ram, self.avail() + 4 + 2 * u64::from(SIZE), self.next_used);
            fence(Ordering::SeqCst);
            if self.load(ram, self.used() + 2) != self.next_used {
                continue;
            }
            let left = until.saturating_duration_since(std::time::Instant::now());
            let mut fd = libc::pollfd { fd: call.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid entry.
            if left.is_zero() || unsafe { libc::poll(&mut fd, 1, left.as_millis() as i32 + 1) } == 0 {
                return None;
            }
            let _ = call.read();
        }
    }

    /// One request, with nothing else in flight.
    pub fn run(&mut self, ram: &GuestRam, device: &Arc<impl Device>, kind: u32, block: u64) -> u8 {
        let call = device.calls().remove(usize::from(self.index));
        self.submit(ram, 0, kind, block);
        self.kick(ram, &**device);
        let done = self.wait(ram, &call, Duration::from_secs(60)).expect("a completion within a minute");
        assert_eq!(done.slot, 0);
        done.status
    }
}

/// Fills a request's data with a stamp.
pub fn fill(ram: &GuestRam, at: u64, stamp: u64) {
    let bytes: Vec<u8> = stamp.to_le_bytes().iter().copied().cycle().take(BLOCK).collect();
    ram.memory().write_slice(&bytes, GuestAddress(at)).unwrap();
}

/// The stamp that all of a request's data has.
pub fn stamp(ram: &GuestRam, at: u64) -> u64 {
    let mut bytes = vec![0; BLOCK];
    ram.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
    let first = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    for word in bytes.chunks(8) {
        assert_eq!(u64::from_le_bytes(word.try_into().unwrap()), first, "a torn block");
    }
    first
}

/// A guest that writes and reads back all the time, on all queues, and knows what every block has to hold.
pub struct Load {
    pub queues: Vec<Queue>,
    blocks: u64,
    /// What each block of each queue holds.
    holds: Vec<Vec<u64>>,
    /// What each slot is about: kind, block, stamp.
    slots: Vec<[(u32, u64, u64); DEPTH]>,
    next_stamp: u64,
    random: u64,
}

impl Load {
    /// Every queue uses `blocks` blocks of its own: few, so that each is written again and again, and a write that is done
    /// twice brings back what was overwritten.
    pub fn new(queues: Vec<Queue>, blocks: u64) -> Self {
        let n = queues.len();
        Self {
            queues,
            blocks,
            holds: vec![vec![0; blocks as usize]; n],
            slots: vec![[(0, 0, 0); DEPTH]; n],
            next_stamp: 1,
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// Fills the queues.
    pub fn submit_all(&mut self, ram: &GuestRam, device: &dyn Device) {
        for q in 0..self.queues.len() {
            while let Some(slot) = self.queues[q].free_slot() {
                let block = self.random() % self.blocks;
                let busy = &self.queues[q].in_flight;
                if busy.iter().any(|other| self.slots[q][*other].1 == block) {
                    break;
                }
                let kind = if self.random().is_multiple_of(3) { READ } else { WRITE };
                let stamp = if kind == WRITE { self.next_stamp } else { self.holds[q][block as usize] };
                self.next_stamp += 1;
                let at = self.queues[q].data(slot);
                fill(ram, at, if kind == WRITE { stamp } else { !0 });
                self.slots[q][slot] = (kind, block, stamp);
                let place = q as u64 * self.blocks + block;
                self.queues[q].submit(ram, slot, kind, place);
            }
            self.queues[q].kick(ram, device);
        }
    }

    /// Takes what is completed and checks it; returns how many.
    pub fn reap(&mut self, ram: &GuestRam) -> u64 {
        let mut n = 0;
        for q in 0..self.queues.len() {
            while let Some(done) = self.queues[q].poll(ram) {
                self.check(ram, q, done);
                n += 1;
            }
        }
        n
    }

    fn check(&mut self, ram: &GuestRam, q: usize, done: Done) {
        let (kind, block, wanted) = self.slots[q][done.slot];
        assert_eq!(done.status, 0, "queue {q}: kind {kind} of block {block} failed");
        if kind == READ {
            let found = stamp(ram, self.queues[q].data(done.slot));
            assert_eq!(found, wanted, "queue {q}: block {block} holds another write");
        } else {
            self.holds[q][block as usize] = wanted;
        }
    }

    pub fn completed(&self) -> u64 {
        self.queues.iter().map(|queue| queue.completed).sum()
    }

    /// Goes on for this many completions.
    pub fn run(&mut self, ram: &GuestRam, device: &Arc<impl Device>, completions: u64) {
        let until = self.completed() + completions;
        let calls = device.calls();
        while self.completed() < until {
            self.submit_all(ram, &**device);
            if self.reap(ram) == 0 {
                self.wait(ram, &calls);
            }
        }
    }

    /// Waits for one completion on a queue with something in flight.
    fn wait(&mut self, ram: &GuestRam, calls: &[EventFd]) {
        let Some(q) = (0..self.queues.len()).find(|q| !self.queues[*q].in_flight.is_empty()) else { return };
        let index = usize::from(self.queues[q].index);
        let done = self.queues[q].wait(ram, &calls[index], Duration::from_secs(60));
        let in_flight = &self.queues[q].in_flight;
        let done =
            done.unwrap_or_else(|| panic!("queue {q}: nothing in a minute, in flight are {in_flight:?}"));
        self.check(ram, q, done);
    }

    /// Waits until nothing is in flight.
    pub fn drain(&mut self, ram: &GuestRam, device: &Arc<impl Device>) {
        let calls = device.calls();
        while self.queues.iter().any(|queue| !queue.in_flight.is_empty()) {
            self.wait(ram, &calls);
        }
    }

    /// Reads back every block.
    pub fn verify(&mut self, ram: &GuestRam, device: &Arc<impl Device>) {
        self.drain(ram, device);
        for q in 0..self.queues.len() {
            for block in 0..self.blocks {
                let place = q as u64 * self.blocks + block;
                let status = self.queues[q].run(ram, device, READ, place);
                assert_eq!(status, 0);
                let found = stamp(ram, self.queues[q].data(0));
                assert_eq!(found, self.holds[q][block as usize], "queue {q}, block {block}: the last write");
            }
        }
    }
}
