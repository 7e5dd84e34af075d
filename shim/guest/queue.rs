//! A split virtqueue as its driver sees it (virtio 1.2, 2.7), polled. Each request has a slot of its own: four descriptors, a
//! header, a status and a buffer of 4096 bytes, so that no list of free descriptors is needed.

use core::mem::offset_of;

use super::layout::{DEPTH_MAX, PAGE, QUEUE_SIZE_MAX, SLOT_BYTES, SLOT_DESCRIPTORS};
use super::machine::{barrier, fence, load, read_register, store, write_register};

/// Registers of virtio-mmio (virtio 1.2, 4.2.2).
pub mod register {
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC: u64 = 0x080;
    pub const QUEUE_DRIVER: u64 = 0x090;
    pub const QUEUE_DEVICE: u64 = 0x0a0;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Of the available ring without VIRTIO_F_EVENT_IDX: no interrupts, please.
const NO_INTERRUPT: u16 = 1;
/// Of the used ring without it: no notifications, please.
const NO_NOTIFY: u16 = 1;

/// What the header of a request says (virtio 1.2, 5.2.6).
pub const TYPE_IN: u32 = 0;
pub const TYPE_OUT: u32 = 1;
pub const TYPE_FLUSH: u32 = 4;

/// Sectors of a block.
const BLOCK_SECTORS: u64 = PAGE / 512;
/// What is in the status before the device writes it.
const NO_STATUS: u8 = 0xff;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// What the driver keeps of a request, in guest memory. The device reads the first 16 bytes and the descriptors, and writes the
/// status.
#[repr(C)]
struct Slot {
    kind: u32,
    reserved: u32,
    sector: u64,
    indirect: [Descriptor; SLOT_DESCRIPTORS as usize],
    status: u8,
    verifies: u8,
    unused: [u8; 6],
    block: u64,
    generation: u32,
}

const _: () = assert!(size_of::<Slot>() <= SLOT_BYTES as usize);

/// A request.
#[derive(Clone, Copy)]
pub struct Request {
    /// One of `TYPE_`.
    pub kind: u32,
    pub block: u64,
    /// What a write writes, and what a read has to find; 0 for a read that may find anything.
    pub generation: u32,
    /// Whether it belongs to a command to verify.
    pub verifies: bool,
}

/// How a request lies in descriptors.
#[derive(Clone, Copy)]
pub struct Shape {
    /// In a table of their own, or in the ring's.
    pub indirect: bool,
    /// Bytes of the first of two pieces of data; 0 for one piece.
    pub split: u32,
}

/// Something that the device put into the used ring.
pub struct Completion {
    pub id: u32,
    pub len: u32,
}

/// How far the used index went on.
pub struct Progress {
    pub advance: u16,
    pub in_flight: u16,
}

/// What a completion stands for.
pub enum Outcome {
    /// Of this slot; it is free again, but its buffer stays as it is until the next submission.
    Request { slot: u32, request: Request, status: u8 },
    /// No request in flight has this slot.
    Twice,
    /// There is no such request at all.
    Foreign,
}

pub struct Queue {
    pub index: u32,
    area: u64,
    size: u16,
    depth: u32,
    event_index: bool,
    /// A bit for each slot that no request has.
    free: u64,
    /// The available index, the one at the last kick, and the used index up to which completions were taken.
    available: u16,
    kicked: u16,
    used: u16,
}

impl Queue {
    /// Sets a queue of the device up in `area`. On an error the register that stands in the way.
    pub fn set_up(mmio: u64, index: u32, area: u64, depth: u32, event_index: bool) -> Result<Self, u32> {
        // SAFETY: these are the registers of the device, which does nothing with the memory before it is told to.
        let (ready, most) = unsafe {
            write_register(mmio + register::QUEUE_SEL, index);
            (read_register(mmio + register::QUEUE_READY), read_register(mmio + register::QUEUE_NUM_MAX))
        };
        if ready != 0 {
            return Err(ready);
        }
        let most = most.min(u32::from(QUEUE_SIZE_MAX)) as u16;
        if most < SLOT_DESCRIPTORS {
            return Err(u32::from(most));
        }
        let wanted = (depth as u16 * SLOT_DESCRIPTORS).next_power_of_two();
        let size = if wanted <= most { wanted } else { 1 << (15 - most.leading_zeros()) };
        let depth = depth.min(u32::from(size / SLOT_DESCRIPTORS));
        let free = u64::MAX >> (64 - depth);
        let queue = Self { index, area, size, depth, event_index, free, available: 0, kicked: 0, used: 0 };
        if !event_index {
            // SAFETY: the available ring is ours.
            unsafe { store(queue.available_ring(), NO_INTERRUPT) };
        }
        let write = |register: u64, address: u64| {
            // SAFETY: as above.
            unsafe {
                write_register(mmio + register, address as u32);
                write_register(mmio + register + 4, (address >> 32) as u32);
            }
        };
        // SAFETY: as above.
        unsafe { write_register(mmio + register::QUEUE_NUM, u32::from(size)) };
        write(register::QUEUE_DESC, area);
        write(register::QUEUE_DRIVER, queue.available_ring());
        write(register::QUEUE_DEVICE, queue.used_ring());
        // SAFETY: the device may use the rings from here on, which nothing in the program refers to.
        unsafe { write_register(mmio + register::QUEUE_READY, 1) };
        Ok(queue)
    }

    /// Most requests in flight.
    pub fn depth(&self) -> u32 {
        self.depth
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> u32 {
        self.depth - self.free.count_ones()
    }

    /// Whether there is room for a request.
    pub fn has_room(&self) -> bool {
        self.free != 0
    }

    fn available_ring(&self) -> u64 {
        self.area + PAGE
    }

    fn used_ring(&self) -> u64 {
        self.area + PAGE * 2
    }

    fn slot(&self, slot: u32) -> *mut Slot {
        (self.area + PAGE * 3 + u64::from(slot) * SLOT_BYTES) as *mut Slot
    }

    /// Where the buffer of a slot is.
    pub fn buffer(&self, slot: u32) -> u64 {
        self.area + PAGE * 3 + DEPTH_MAX as u64 * SLOT_BYTES + u64::from(slot) * PAGE
    }

    /// Takes a slot, of which there is one free. Its buffer may be filled before [`Queue::submit`].
    pub fn take(&mut self) -> u32 {
        let slot = self.free.trailing_zeros();
        self.free &= !(1 << slot);
        slot
    }

    /// Makes the request of a taken slot available.
    pub fn submit(&mut self, slot: u32, request: Request, shape: Shape) {
        let at = self.slot(slot);
        let is_flush = request.kind == TYPE_FLUSH;
        // SAFETY: the slot is free, so the device has no business in it; its memory is ours.
        unsafe {
            (&raw mut (*at).kind).write_volatile(request.kind);
            (&raw mut (*at).reserved).write_volatile(0);
            (&raw mut (*at).sector).write_volatile(if is_flush { 0 } else { request.block * BLOCK_SECTORS });
            (&raw mut (*at).status).write_volatile(NO_STATUS);
            (&raw mut (*at).verifies).write_volatile(request.verifies.into());
            (&raw mut (*at).block).write_volatile(request.block);
            (&raw mut (*at).generation).write_volatile(request.generation);
        }
        let (parts, count) = self.parts(slot, request.kind, shape.split);
        let head = slot as u16 * SLOT_DESCRIPTORS;
        let in_ring = self.area + u64::from(head) * 16;
        if shape.indirect {
            let table = at as u64 + offset_of!(Slot, indirect) as u64;
            Self::write_chain(table, 0, &parts[..count]);
            let all = Descriptor { address: table, len: count as u32 * 16, flags: INDIRECT, next: 0 };
            // SAFETY: the slot's own descriptors.
            unsafe { store(in_ring, all) };
        } else {
            Self::write_chain(in_ring, head, &parts[..count]);
        }
        let entry = self.available_ring() + 4 + u64::from(self.available % self.size) * 2;
        // SAFETY: an entry of the ring that the device took long ago, as there are no more requests than entries.
        unsafe { store(entry, head) };
        self.available = self.available.wrapping_add(1);
        // The processor keeps stores in their order, and this keeps the compiler from changing it.
        barrier();
        // SAFETY: the index is ours to write.
        unsafe { store(self.available_ring() + 2, self.available) };
    }

    /// Header, data in one or two pieces, status; and how many these are.
    fn parts(&self, slot: u32, kind: u32, split: u32) -> ([Descriptor; SLOT_DESCRIPTORS as usize], usize) {
        let mut parts = [Descriptor::default(); SLOT_DESCRIPTORS as usize];
        let at = self.slot(slot);
        parts[0] = Descriptor { address: at as u64, len: 16, ..Default::default() };
        let mut count = 1;
        if kind != TYPE_FLUSH {
            let (buffer, all) = (self.buffer(slot), PAGE as u32);
            let flags = if kind == TYPE_IN { WRITE } else { 0 };
            if split > 0 && split < all {
                parts[1] = Descriptor { address: buffer, len: split, flags, next: 0 };
                let rest = buffer + u64::from(split);
                parts[2] = Descriptor { address: rest, len: all - split, flags, next: 0 };
                count = 3;
            } else {
                parts[1] = Descriptor { address: buffer, len: all, flags, next: 0 };
                count = 2;
            }
        }
        let status = at as u64 + offset_of!(Slot, status) as u64;
        parts[count] = Descriptor { address: status, len: 1, flags: WRITE, next: 0 };
        (parts, count + 1)
    }

    fn write_chain(table: u64, first: u16, parts: &[Descriptor]) {
        for (i, part) in parts.iter().enumerate() {
            let mut part = *part;
            if i + 1 < parts.len() {
                part.flags |= NEXT;
                part.next = first + i as u16 + 1;
            }
            // SAFETY: descriptors of a free slot.
            unsafe { store(table + i as u64 * 16, part) };
        }
    }

    /// Notifies the device of what was made available since the last time, unless it does not want to know. Whether it did.
    pub fn kick(&mut self, mmio: u64) -> bool {
        let (old, new) = (self.kicked, self.available);
        if old == new {
            return false;
        }
        self.kicked = new;
        // The index is seen by the device before what it wants is read: otherwise both sides could wait for each other.
        fence();
        let wanted = if self.event_index {
            // SAFETY: avail_event, behind the used ring.
            let event: u16 = unsafe { load(self.used_ring() + 4 + u64::from(self.size) * 8) };
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            // SAFETY: the flags of the used ring.
            let flags: u16 = unsafe { load(self.used_ring()) };
            flags & NO_NOTIFY == 0
        };
        if wanted {
            // SAFETY: the device reads what was made available, which nothing in the program refers to.
            unsafe { write_register(mmio + register::QUEUE_NOTIFY, self.index) };
        }
        wanted
    }

    /// How far the used index went on since the last time that all was taken.
    pub fn progress(&self) -> Progress {
        // SAFETY: the used index.
        let index: u16 = unsafe { load(self.used_ring() + 2) };
        // Loads stay in their order too: what the index covers is there.
        barrier();
        Progress { advance: index.wrapping_sub(self.used), in_flight: self.in_flight() as u16 }
    }

    /// Takes the next completion, which [`Queue::progress`] has seen.
    pub fn next(&mut self) -> (Completion, Outcome) {
        let at = self.used_ring() + 4 + u64::from(self.used % self.size) * 8;
        // SAFETY: an element of the used ring.
        let (id, len) = unsafe { (load::<u32>(at), load::<u32>(at + 4)) };
        self.used = self.used.wrapping_add(1);
        if self.event_index {
            // Never wants to be interrupted: the index at which it would is always far away.
            // SAFETY: used_event, behind the available ring.
            unsafe {
                store(self.available_ring() + 4 + u64::from(self.size) * 2, self.used.wrapping_add(0x8000))
            };
        }
        (Completion { id, len }, self.outcome(id))
    }

    fn outcome(&mut self, id: u32) -> Outcome {
        let step = u32::from(SLOT_DESCRIPTORS);
        let slot = id / step;
        if !id.is_multiple_of(step) || slot >= self.depth {
            return Outcome::Foreign;
        }
        if self.free & 1 << slot != 0 {
            return Outcome::Twice;
        }
        self.free |= 1 << slot;
        let at = self.slot(slot);
        // SAFETY: the slot is ours again; only the status was the device's to write.
        let (request, status) = unsafe {
            let request = Request {
                kind: (&raw const (*at).kind).read_volatile(),
                block: (&raw const (*at).block).read_volatile(),
                generation: (&raw const (*at).generation).read_volatile(),
                verifies: (&raw const (*at).verifies).read_volatile() != 0,
            };
            (request, (&raw const (*at).status).read_volatile())
        };
        Outcome::Request { slot, request, status }
    }
}
