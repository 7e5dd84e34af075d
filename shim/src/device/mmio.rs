//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2): registers, the handshake with the driver, and the queues' places.
//!
//! What is behind it is a [`Backend`]. The guest may access the registers in any order, with any size and any value: what
//! makes no sense reads as zero or is ignored, and a queue gets ready only if all of it lies in guest memory.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::QUEUE_NOTIFY;
use crate::memory::GuestRam;

/// `virt`, little-endian (virtio 1.2, 4.2.2).
const MAGIC: u32 = 0x7472_6976;
/// Version of the register layout.
const VERSION: u32 = 2;
/// Vendor: `shim`, little-endian. Drivers show it, nothing more.
const VENDOR: u32 = 0x6d69_6873;
/// Where the configuration space begins.
const CONFIG_START: u64 = 0x100;
/// Largest queue that a driver may use (virtio 1.2, 2.7: at most 32768; more than this is of no use to a disk or a tap).
pub const QUEUE_SIZE_MAX: u16 = 1024;
/// Most queues of one device.
pub const QUEUES_MAX: u16 = 64;

/// ACKNOWLEDGE, DRIVER (virtio 1.2, 2.1).
const STATUS_ACKNOWLEDGE: u32 = 1;
const STATUS_DRIVER: u32 = 2;
/// DRIVER_OK: the driver is set up and the queues run.
pub const STATUS_DRIVER_OK: u32 = 4;
/// FEATURES_OK: the negotiation is over and the device can do what the driver chose.
pub const STATUS_FEATURES_OK: u32 = 8;
/// DEVICE_NEEDS_RESET: only the device sets it.
pub const STATUS_NEEDS_RESET: u32 = 64;
const STATUS_FAILED: u32 = 128;
const STATUS_BY_DRIVER: u32 =
    STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_DRIVER_OK | STATUS_FEATURES_OK | STATUS_FAILED;

/// VIRTIO_F_VERSION_1; a driver without it is none that this transport can serve.
pub const F_VERSION_1: u64 = 1 << 32;

/// What a device has to tell its driver beside completions. The backend writes, the transport reads.
#[derive(Debug, Default)]
pub struct Notices {
    generation: AtomicU32,
    config_changed: AtomicBool,
    needs_reset: AtomicBool,
}

impl Notices {
    /// The configuration space has changed; the caller interrupts the guest.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.config_changed.store(true, Ordering::SeqCst);
    }

    /// The device is lost until the driver resets it; the caller interrupts the guest. `false` takes it back.
    pub fn set_needs_reset(&self, lost: bool) {
        if self.needs_reset.swap(lost, Ordering::SeqCst) != lost && lost {
            // The driver learns of it as it does of a change (virtio 1.2, 2.1.2).
            self.config_changed.store(true, Ordering::SeqCst);
        }
    }

    /// Whether the device is lost.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }
}

/// A queue that the driver has made ready. All of it lies in guest memory and is aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadyQueue {
    /// Which queue.
    pub index: u16,
    /// Descriptors, a power of two up to [`QUEUE_SIZE_MAX`].
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub desc: u64,
    /// Guest-physical address of the available ring.
    pub avail: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
}

impl ReadyQueue {
    /// Bytes of the used ring, the event index included.
    pub fn used_bytes(&self) -> u64 {
        6 + 8 * u64::from(self.size)
    }

    fn is_within(&self, ram: &GuestRam) -> bool {
        let size = u64::from(self.size);
        let fits = |start: u64, len: u64, align: u64| {
            start.is_multiple_of(align)
                && ram.regions().iter().any(|r| {
                    start >= r.guest_start
                        && start.checked_add(len).is_some_and(|end| end <= r.guest_start + r.len)
                })
        };
        fits(self.desc, 16 * size, 16)
            && fits(self.avail, 6 + 2 * size, 2)
            && fits(self.used, self.used_bytes(), 4)
    }
}

/// What is behind the registers. Called from the threads that run the guest's processors: nothing may take for ever.
pub trait Backend: Send + Sync {
    /// Type of the device (virtio 1.2, section 5): 1 network, 2 block.
    fn device_id(&self) -> u32;

    /// Features that are offered.
    fn features(&self) -> u64;

    /// What is to be told to the driver.
    fn notices(&self) -> &Notices;

    /// Reads the configuration space; what is beyond its end stays zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver, which chose `features`, writes into the configuration space.
    fn write_config(&self, features: u64, offset: u64, data: &[u8]);

    /// The driver is set up: the queues run from here.
    fn activate(&self, features: u64, queues: Vec<ReadyQueue>);

    /// The driver has reset the device: when this returns the queues are not touched any more.
    fn deactivate(&self);

    /// The driver made something available.
    fn kick(&self, queue: u16);
}

/// One queue's registers as they travel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// QueueNum.
    pub size: u16,
    /// QueueReady.
    pub ready: bool,
    /// QueueDesc.
    pub desc: u64,
    /// QueueDriver.
    pub avail: u64,
    /// QueueDevice.
    pub used: u64,
}

/// All registers as they travel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Status, without DEVICE_NEEDS_RESET.
    pub status: u32,
    /// DeviceFeaturesSel.
    pub device_features_sel: u32,
    /// DriverFeaturesSel.
    pub driver_features_sel: u32,
    /// DriverFeatures, both halves.
    pub driver_features: u64,
    /// QueueSel.
    pub queue_sel: u32,
    /// The queues.
    pub queues: Vec<QueueRegisters>,
    /// ConfigGeneration.
    pub config_generation: u32,
    /// Bit 1 of InterruptStatus.
    pub config_changed: bool,
    /// DEVICE_NEEDS_RESET of Status.
    pub needs_reset: bool,
}

#[derive(Debug)]
struct Registers {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
}

impl Registers {
    fn new(queues: u16) -> Self {
        Self {
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: vec![QueueRegisters::default(); usize::from(queues)],
        }
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(self.queue_sel as usize)
    }

    /// The selected queue, if its place may still be changed.
    fn open_queue(&mut self) -> Option<&mut QueueRegisters> {
        let runs = self.status & STATUS_DRIVER_OK != 0;
        self.queues.get_mut(self.queue_sel as usize).filter(|queue| !runs && !queue.ready)
    }

    fn ready_queues(&self) -> Vec<ReadyQueue> {
        let ready = self.queues.iter().enumerate().filter(|(_, queue)| queue.ready);
        ready.map(|(index, queue)| queue.at(index)).collect()
    }
}

impl QueueRegisters {
    fn at(&self, index: usize) -> ReadyQueue {
        let Self { size, desc, avail, used, .. } = *self;
        ReadyQueue { index: index as u16, size, desc, avail, used }
    }
}

/// The registers of one device.
pub struct Transport<B> {
    backend: Arc<B>,
    ram: Arc<GuestRam>,
    queue_size_max: u16,
    registers: Mutex<Registers>,
}

impl<B: Backend> Transport<B> {
    /// Registers as after a reset.
    ///
    /// # Errors
    /// If the queues are none or too many, or their size is no power of two or beyond [`QUEUE_SIZE_MAX`].
    pub fn new(backend: Arc<B>, ram: Arc<GuestRam>, queues: u16, queue_size_max: u16) -> Result<Self> {
        ensure!((1..=QUEUES_MAX).contains(&queues), "a device has 1 to {QUEUES_MAX} queues, not {queues}");
        ensure!(
            queue_size_max.is_power_of_two() && queue_size_max <= QUEUE_SIZE_MAX,
            "the size of a queue is a power of two up to {QUEUE_SIZE_MAX}, not {queue_size_max}"
        );
        Ok(Self { backend, ram, queue_size_max, registers: Mutex::new(Registers::new(queues)) })
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is behind the registers.
    pub fn backend(&self) -> &Arc<B> {
        &self.backend
    }

    /// Features that the driver chose, once it has.
    pub fn driver_features(&self) -> u64 {
        let registers = self.lock();
        if registers.status & STATUS_FEATURES_OK != 0 { registers.driver_features } else { 0 }
    }

    /// The guest reads at `offset` of the device.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG_START {
            return self.backend.read_config(offset - CONFIG_START, data);
        }
        // Registers are 32 bits wide and accessed as such (virtio 1.2, 4.2.2.2).
        if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.register(offset).to_le_bytes());
        }
    }

    fn register(&self, offset: u64) -> u32 {
        let registers = self.lock();
        let notices = self.backend.notices();
        match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => self.backend.device_id(),
            0x00c => VENDOR,
            0x010 => half(self.backend.features(), registers.device_features_sel),
            0x034 if registers.queue().is_some() => u32::from(self.queue_size_max),
            0x044 => u32::from(registers.queue().is_some_and(|queue| queue.ready)),
            0x060 => {
                // The queues' interrupts go from the backend to the guest without passing here, so any of them may be why
                // the guest looks.
                let used = registers.queues.iter().any(|queue| queue.ready);
                let changed = notices.config_changed.load(Ordering::SeqCst);
                u32::from(used) | u32::from(changed) << 1
            }
            0x070 => registers.status | if notices.needs_reset() { STATUS_NEEDS_RESET } else { 0 },
            // A region of shared memory that is not there has the length and the base -1 (virtio 1.2, 4.2.2).
            0x0b0 | 0x0b4 | 0x0b8 | 0x0bc => u32::MAX,
            0x0fc => notices.generation.load(Ordering::SeqCst),
            _ => 0,
        }
    }

    /// The guest writes at `offset` of the device.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if offset >= CONFIG_START {
            let features = self.driver_features();
            return self.backend.write_config(features, offset - CONFIG_START, data);
        }
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(bytes);
        if offset == QUEUE_NOTIFY {
            let queues = self.lock().queues.len();
            if let Some(queue) = u16::try_from(value).ok().filter(|queue| usize::from(*queue) < queues) {
                self.backend.kick(queue);
            }
            return;
        }
        let mut registers = self.lock();
        match offset {
            0x014 => registers.device_features_sel = value,
            0x020 => choose(&mut registers, value),
            0x024 => registers.driver_features_sel = value,
            0x030 => registers.queue_sel = value,
            0x064 => {
                if value & 2 != 0 {
                    self.backend.notices().config_changed.store(false, Ordering::SeqCst);
                }
            }
            0x070 => self.set_status(&mut registers, value),
            _ => self.set_queue(&mut registers, offset, value),
        }
    }

    fn set_queue(&self, registers: &mut Registers, offset: u64, value: u32) {
        if offset == 0x044 {
            return self.set_ready(registers, value);
        }
        let max = self.queue_size_max;
        let Some(queue) = registers.open_queue() else { return };
        match offset {
            0x038 => {
                // A size that is none leaves the queue without one, and so it does not get ready.
                let size = u16::try_from(value).ok().filter(|size| size.is_power_of_two() && *size <= max);
                queue.size = size.unwrap_or(0);
            }
            0x080 => set_half(&mut queue.desc, 0, value),
            0x084 => set_half(&mut queue.desc, 1, value),
            0x090 => set_half(&mut queue.avail, 0, value),
            0x094 => set_half(&mut queue.avail, 1, value),
            0x0a0 => set_half(&mut queue.used, 0, value),
            0x0a4 => set_half(&mut queue.used, 1, value),
            _ => {}
        }
    }

    fn set_ready(&self, registers: &mut Registers, value: u32) {
        if registers.status & STATUS_DRIVER_OK != 0 {
            // A queue that runs is stopped by a reset of the device only.
            return;
        }
        let index = registers.queue_sel as usize;
        let Some(queue) = registers.queues.get_mut(index) else { return };
        queue.ready = value == 1 && queue.size != 0 && queue.at(index).is_within(&self.ram);
    }

    fn set_status(&self, registers: &mut Registers, value: u32) {
        if value == 0 {
            return self.reset(registers);
        }
        // Bits are only ever added; all of them go by a reset.
        let mut status = registers.status | value & STATUS_BY_DRIVER;
        let before = registers.status;
        if status & STATUS_FEATURES_OK != 0 && before & STATUS_FEATURES_OK == 0 {
            let chosen = registers.driver_features;
            let can = status & STATUS_DRIVER != 0
                && chosen & F_VERSION_1 != 0
                && chosen & !self.backend.features() == 0;
            if !can {
                status &= !STATUS_FEATURES_OK;
            }
        }
        if status & STATUS_FEATURES_OK == 0 {
            status &= !STATUS_DRIVER_OK;
        }
        registers.status = status;
        if status & STATUS_DRIVER_OK != 0 && before & STATUS_DRIVER_OK == 0 {
            self.backend.activate(registers.driver_features, registers.ready_queues());
        }
    }

    fn reset(&self, registers: &mut Registers) {
        if registers.status & STATUS_DRIVER_OK != 0 {
            self.backend.deactivate();
        }
        *registers = Registers::new(registers.queues.len() as u16);
        let notices = self.backend.notices();
        notices.config_changed.store(false, Ordering::SeqCst);
        notices.needs_reset.store(false, Ordering::SeqCst);
    }

    /// The registers, for a machine that moves.
    pub fn save(&self) -> TransportState {
        let registers = self.lock();
        let notices = self.backend.notices();
        TransportState {
            status: registers.status,
            device_features_sel: registers.device_features_sel,
            driver_features_sel: registers.driver_features_sel,
            driver_features: registers.driver_features,
            queue_sel: registers.queue_sel,
            queues: registers.queues.clone(),
            config_generation: notices.generation.load(Ordering::SeqCst),
            config_changed: notices.config_changed.load(Ordering::SeqCst),
            needs_reset: notices.needs_reset(),
        }
    }

    /// Takes registers over and returns the queues that the driver runs, or `None` if it does not run the device. Nothing is
    /// activated.
    ///
    /// # Errors
    /// If the registers are none that a driver can have brought about here.
    pub fn restore(&self, state: &TransportState) -> Result<Option<Vec<ReadyQueue>>> {
        let mut registers = self.lock();
        ensure!(
            state.queues.len() == registers.queues.len(),
            "the device has {} queues here and {} in the state; make it with as many",
            registers.queues.len(),
            state.queues.len()
        );
        ensure!(
            state.status & !STATUS_BY_DRIVER == 0
                && (state.status & STATUS_DRIVER_OK == 0 || state.status & STATUS_FEATURES_OK != 0),
            "status {:#x} of the state is none that a driver can set",
            state.status
        );
        for (index, queue) in state.queues.iter().enumerate() {
            ensure!(
                queue.size == 0 || queue.size.is_power_of_two() && queue.size <= self.queue_size_max,
                "queue {index} has {} descriptors in the state and at most {} here; make the device with as many",
                queue.size,
                self.queue_size_max
            );
            ensure!(
                !queue.ready || queue.size > 0 && queue.at(index).is_within(&self.ram),
                "queue {index} of the state is not within guest memory"
            );
        }
        *registers = Registers {
            status: state.status,
            device_features_sel: state.device_features_sel,
            driver_features_sel: state.driver_features_sel,
            driver_features: state.driver_features,
            queue_sel: state.queue_sel,
            queues: state.queues.clone(),
        };
        let notices = self.backend.notices();
        notices.generation.store(state.config_generation, Ordering::SeqCst);
        notices.config_changed.store(state.config_changed, Ordering::SeqCst);
        notices.needs_reset.store(state.needs_reset, Ordering::SeqCst);
        Ok((state.status & STATUS_DRIVER_OK != 0).then(|| registers.ready_queues()))
    }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, bits: u32) {
    match select {
        0 => *value = *value & !0xffff_ffff | u64::from(bits),
        1 => *value = *value & 0xffff_ffff | u64::from(bits) << 32,
        _ => {}
    }
}

/// The driver chooses features; what it chose stays when the negotiation is over.
fn choose(registers: &mut Registers, value: u32) {
    if registers.status & STATUS_FEATURES_OK == 0 {
        let select = registers.driver_features_sel;
        set_half(&mut registers.driver_features, select, value);
    }
}
