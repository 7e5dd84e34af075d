//! A virtio block device in software, on a thread of its own, that can be told to do one thing wrong.

use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, Thread};
use std::time::Duration;

use shim::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

const BLOCK: usize = 4096;
const EVENT_IDX: u64 = 1 << 29;
/// VERSION_1, EVENT_IDX, INDIRECT_DESC, MQ, FLUSH, SEG_MAX.
pub const ALL_FEATURES: u64 = 1 << 32 | EVENT_IDX | 1 << 28 | 1 << 12 | 1 << 9 | 1 << 2;
/// Without those that change how rings look.
pub const FEW_FEATURES: u64 = 1 << 32;

/// What the device does wrong, once, some time after it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Nothing,
    /// A block on the disk changes by itself.
    CorruptBlock,
    /// A write is completed and never done.
    LoseWrite,
    /// A request is completed once more, in the place of another.
    CompleteTwice,
    /// Something is completed that nobody asked for, in the place of a request.
    CompleteForeign,
    /// A request fails.
    FailOne,
    /// A used element has a wrong length.
    WrongLength,
    /// The device is reset behind the driver's back.
    ForgetStatus,
    /// The device stops serving for good.
    Hang,
}

/// Requests before the fault.
const FAULT_AFTER: u64 = 2000;

#[derive(Default, Clone)]
struct Queue {
    size: u32,
    ready: u32,
    desc: u64,
    driver: u64,
    device: u64,
    next_available: u16,
    next_used: u16,
}

#[derive(Default, Clone)]
struct Registers {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<Queue>,
}

#[derive(Clone)]
struct Store {
    data: Vec<u8>,
    fault: Fault,
    requests: u64,
    /// The block whose writes are lost.
    lost: Option<usize>,
}

pub struct SoftDisk {
    features: u64,
    queue_num_max: u32,
    queue_count: u16,
    registers: Mutex<Registers>,
    store: Mutex<Store>,
    stop: AtomicBool,
    thread: Mutex<Option<(Thread, JoinHandle<()>)>>,
}

struct Part {
    address: u64,
    len: usize,
    writable: bool,
}

impl SoftDisk {
    pub fn new(bytes: usize, features: u64, queues: usize, fault: Fault) -> Self {
        Self {
            features,
            queue_num_max: 256,
            queue_count: queues as u16,
            registers: Mutex::new(Registers { queues: vec![Queue::default(); queues], ..Default::default() }),
            store: Mutex::new(Store { data: vec![0xa5; bytes], fault, requests: 0, lost: None }),
            stop: AtomicBool::new(false),
            thread: Mutex::new(None),
        }
    }

    /// With rings of this size at most.
    pub fn with_ring(mut self, size: u32) -> Self {
        self.queue_num_max = size;
        self
    }

    /// The same disk elsewhere, with its registers and content. This one is stopped.
    pub fn moved(&self) -> Self {
        assert!(self.stop.load(Ordering::SeqCst), "a disk that serves cannot move");
        Self {
            features: self.features,
            queue_num_max: self.queue_num_max,
            queue_count: self.queue_count,
            registers: Mutex::new(self.registers.lock().unwrap().clone()),
            store: Mutex::new(self.store.lock().unwrap().clone()),
            stop: AtomicBool::new(false),
            thread: Mutex::new(None),
        }
    }

    pub fn start(self, ram: Arc<GuestRam>) -> Arc<Self> {
        let disk = Arc::new(self);
        let server = disk.clone();
        let handle = std::thread::spawn(move || {
            while !server.stop.load(Ordering::SeqCst) {
                if !server.serve(&ram) {
                    std::thread::park_timeout(Duration::from_millis(50));
                }
            }
        });
        *disk.thread.lock().unwrap() = Some((handle.thread().clone(), handle));
        disk
    }

    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some((thread, handle)) = self.thread.lock().unwrap().take() {
            thread.unpark();
            let _ = handle.join();
        }
    }

    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = self.registers.lock().unwrap();
        let queue = registers.queues.get(registers.queue_sel as usize);
        let value: u32 = match offset {
            0x000 => 0x7472_6976,
            0x004 | 0x008 => 2,
            0x010 => (self.features >> (registers.device_features_sel * 32)) as u32,
            0x034 => queue.map_or(0, |_| self.queue_num_max),
            0x044 => queue.map_or(0, |queue| queue.ready),
            0x070 => registers.status,
            0x100..=0x1ff => return self.read_config((offset - 0x100) as usize, data),
            _ => 0,
        };
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = [0u8; 256];
        let sectors = self.store.lock().unwrap().data.len() as u64 / 512;
        config[..8].copy_from_slice(&sectors.to_le_bytes());
        config[12..16].copy_from_slice(&126u32.to_le_bytes());
        config[34..36].copy_from_slice(&self.queue_count.to_le_bytes());
        data.copy_from_slice(&config[offset..offset + data.len()]);
    }

    pub fn write(&self, offset: u64, data: &[u8]) {
        let value = u32::from_le_bytes(data.try_into().expect("32 bits"));
        if offset == 0x50 {
            if let Some((thread, _)) = &*self.thread.lock().unwrap() {
                thread.unpark();
            }
            return;
        }
        let mut registers = self.registers.lock().unwrap();
        let half = |word: &mut u64, high: bool| {
            let shift = if high { 32 } else { 0 };
            *word = *word & !(0xffff_ffff << shift) | u64::from(value) << shift;
        };
        match offset {
            0x014 => registers.device_features_sel = value,
            0x020 => {
                let high = registers.driver_features_sel == 1;
                half(&mut registers.driver_features, high);
            }
            0x024 => registers.driver_features_sel = value,
            0x030 => registers.queue_sel = value,
            0x070 => registers.status = value,
            _ => {
                let index = registers.queue_sel as usize;
                let queue = &mut registers.queues[index];
                match offset {
                    0x038 => queue.size = value,
                    0x044 => queue.ready = value,
                    0x080 | 0x084 => half(&mut queue.desc, offset == 0x084),
                    0x090 | 0x094 => half(&mut queue.driver, offset == 0x094),
                    0x0a0 | 0x0a4 => half(&mut queue.device, offset == 0x0a4),
                    _ => panic!("the driver writes to {offset:#x}"),
                }
            }
        }
    }
}

impl SoftDisk {
    /// Serves all queues once; false if there was nothing to do.
    fn serve(&self, ram: &GuestRam) -> bool {
        let mut registers = self.registers.lock().unwrap();
        if registers.status & 4 == 0 || self.store.lock().unwrap().is_due(Fault::Hang) {
            return false;
        }
        if self.store.lock().unwrap().takes(Fault::ForgetStatus) {
            registers.status = 0;
        }
        let mut worked = false;
        let event_index = registers.driver_features & EVENT_IDX != 0;
        for index in 0..registers.queues.len() {
            let mut queue = registers.queues[index].clone();
            if queue.ready == 1 {
                worked |= self.serve_queue(ram, &mut queue, event_index);
                registers.queues[index] = queue;
            }
        }
        worked
    }

    fn serve_queue(&self, ram: &GuestRam, queue: &mut Queue, event_index: bool) -> bool {
        let mut completions = Vec::new();
        for round in 0..2 {
            let available: u16 = get(ram, queue.driver + 2);
            while queue.next_available != available {
                let entry = u64::from(u32::from(queue.next_available) % queue.size);
                let head: u16 = get(ram, queue.driver + 4 + entry * 2);
                queue.next_available = queue.next_available.wrapping_add(1);
                self.serve_request(ram, queue, head, &mut completions);
            }
            if round == 0 && event_index {
                put(ram, queue.device + 4 + u64::from(queue.size) * 8, queue.next_available);
                fence(Ordering::SeqCst);
            }
        }
        // The driver has to cope with any order.
        completions.reverse();
        for (id, len) in &completions {
            let at = queue.device + 4 + u64::from(u32::from(queue.next_used) % queue.size) * 8;
            put(ram, at, *id);
            put(ram, at + 4, *len);
            queue.next_used = queue.next_used.wrapping_add(1);
        }
        fence(Ordering::SeqCst);
        put(ram, queue.device + 2, queue.next_used);
        !completions.is_empty()
    }

    fn serve_request(&self, ram: &GuestRam, queue: &Queue, head: u16, completions: &mut Vec<(u32, u32)>) {
        let parts = chain(ram, queue, head);
        let (header, status) = (&parts[0], parts.last().expect("a status"));
        assert!(
            parts.len() >= 2 && header.len == 16 && !header.writable && status.len == 1 && status.writable
        );
        let (kind, sector): (u32, u64) = (get(ram, header.address), get(ram, header.address + 8));
        let mut store = self.store.lock().unwrap();
        store.requests += 1;
        let mut len = 1;
        let mut at = sector as usize * 512;
        let block = at / BLOCK;
        let data = &parts[1..parts.len() - 1];
        assert_eq!(data.iter().map(|part| part.len).sum::<usize>(), if kind == 4 { 0 } else { BLOCK });
        if kind == 0 && store.takes(Fault::CorruptBlock) {
            store.data[at + 123] ^= 0x10;
        }
        if kind == 1 && store.takes(Fault::LoseWrite) {
            store.lost = Some(block);
        }
        for part in data {
            match kind {
                0 => {
                    assert!(part.writable);
                    let from = &store.data[at..at + part.len];
                    ram.memory().write_slice(from, GuestAddress(part.address)).unwrap();
                    len += part.len as u32;
                }
                1 => {
                    assert!(!part.writable);
                    let mut place = vec![0; part.len];
                    ram.memory().read_slice(&mut place, GuestAddress(part.address)).unwrap();
                    if store.lost != Some(block) {
                        store.data[at..at + part.len].copy_from_slice(&place);
                    }
                }
                _ => panic!("a request of type {kind} with data"),
            }
            at += part.len;
        }
        put(ram, status.address, u8::from(store.takes(Fault::FailOne)));
        len += u32::from(store.takes(Fault::WrongLength));
        // As many completions as requests: one more could be found by the used index alone.
        let mut id = u32::from(head);
        if let Some((earlier, _)) = completions.last()
            && store.takes(Fault::CompleteTwice)
        {
            id = *earlier;
        }
        id += u32::from(store.takes(Fault::CompleteForeign));
        completions.push((id, len));
    }
}

impl Store {
    fn is_due(&self, fault: Fault) -> bool {
        self.fault == fault && self.requests >= FAULT_AFTER
    }

    /// Whether this fault is to be made now; once only.
    fn takes(&mut self, fault: Fault) -> bool {
        let due = self.is_due(fault);
        if due {
            self.fault = Fault::Nothing;
        }
        due
    }
}

/// The parts of a request, from the ring's descriptors or a table of their own.
fn chain(ram: &GuestRam, queue: &Queue, head: u16) -> Vec<Part> {
    let (mut table, mut index) = (queue.desc, u64::from(head));
    let mut parts = Vec::new();
    loop {
        let at = table + index * 16;
        let (address, len): (u64, u32) = (get(ram, at), get(ram, at + 8));
        let (flags, next): (u16, u16) = (get(ram, at + 12), get(ram, at + 14));
        if flags & 4 != 0 {
            assert!(table == queue.desc && flags == 4, "one table of one level");
            (table, index) = (address, 0);
            continue;
        }
        parts.push(Part { address, len: len as usize, writable: flags & 2 != 0 });
        if flags & 1 == 0 {
            return parts;
        }
        assert!(parts.len() < 8, "a chain without an end");
        index = next.into();
    }
}

fn get<T: vm_memory::ByteValued>(ram: &GuestRam, address: u64) -> T {
    ram.memory().read_obj(GuestAddress(address)).unwrap()
}

fn put<T: vm_memory::ByteValued>(ram: &GuestRam, address: u64, value: T) {
    ram.memory().write_obj(value, GuestAddress(address)).unwrap();
}
