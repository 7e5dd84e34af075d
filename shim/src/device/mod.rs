//! Devices of a machine: virtio-mmio with a vhost-user disk or a tap behind it, and the serial line.
//!
//! KVM is not seen here: a device hands out eventfds, which [`crate::vm`] makes KVM signal (a queue's kick) or listen to (a
//! queue's call).

pub mod blk;
pub mod mmio;
pub mod net;
pub mod serial;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::machine::DeviceDescription;
use crate::pages::PageSet;

/// Address of the first virtio-mmio device; each has [`MMIO_BYTES`] and they follow each other.
pub const MMIO_START: u64 = 0xd000_0000;
/// Bytes of addresses that a virtio-mmio device takes.
pub const MMIO_BYTES: u64 = 0x1000;
/// Interrupt line of the first virtio-mmio device; the others follow. Edges, not levels.
pub const FIRST_IRQ: u32 = 5;
/// Most virtio-mmio devices: lines 5 to 15.
pub const DEVICES_MAX: usize = 11;

/// Where the QueueNotify register is in a virtio-mmio device (virtio 1.2, 4.2.2).
pub const QUEUE_NOTIFY: u64 = 0x50;

/// Where a virtio-mmio device is for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// First guest-physical address; the device takes [`MMIO_BYTES`].
    pub address: u64,
    /// Interrupt line.
    pub irq: u32,
}

impl Place {
    /// The place of the device with this index, or `None` from [`DEVICES_MAX`] on.
    pub fn of(index: usize) -> Option<Self> {
        let n = u32::try_from(index).ok().filter(|_| index < DEVICES_MAX)?;
        Some(Self { address: MMIO_START + u64::from(n) * MMIO_BYTES, irq: FIRST_IRQ + n })
    }

    /// The index of the device and the offset in it, if the address belongs to one.
    pub fn find(address: u64) -> Option<(usize, u64)> {
        let offset = address.checked_sub(MMIO_START)?;
        let index = usize::try_from(offset / MMIO_BYTES).ok().filter(|index| *index < DEVICES_MAX)?;
        Some((index, offset % MMIO_BYTES))
    }
}

/// State of one device as it travels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceState {
    /// As in its description.
    pub kind: String,
    /// As in its description.
    pub id: String,
    /// Version of `data`.
    pub version: u32,
    /// What the device makes of it.
    pub data: serde_json::Value,
}

/// A device with registers in the guest's address space. Methods may be called from any thread.
pub trait Device: Send + Sync {
    /// What it is, for the target of a migration.
    fn description(&self) -> DeviceDescription;

    /// The guest reads `data.len()` bytes at `offset` of the device.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The guest writes at `offset` of the device. Never fails: what makes no sense is ignored, as hardware does.
    fn write(&self, offset: u64, data: &[u8]);

    /// What a guest's write of a queue's number to [`QUEUE_NOTIFY`] signals, by queue.
    fn kicks(&self) -> Vec<EventFd>;

    /// What interrupts the guest when it is signalled.
    fn calls(&self) -> Vec<EventFd>;

    /// Everything the guest asked for is completed, or not begun and left in the ring; nothing touches guest memory from here
    /// until [`Device::resume`]. Bounded in time. On an error the device runs as before.
    fn pause(&self) -> Result<()>;

    /// Looks whether [`Device::resume`] would find what it needs, without beginning anything: no ring runs, and guest memory,
    /// of which pages may be missing, is touched by nobody. Bounded in time, which the guest stands still.
    ///
    /// # Errors
    /// A sentence that says what is missing or does not fit the guest.
    fn preflight(&self) -> Result<()> {
        Ok(())
    }

    /// Goes on, after a pause or after [`Device::restore`]. Notices requests that came meanwhile. On an error it stays paused.
    fn resume(&self) -> Result<()>;

    /// As [`Device::resume`] where there is no way back to a paused machine: never fails. What the device needs and has not
    /// now is sought without the caller, as it is when it gets lost while the guest runs.
    fn go_on(&self);

    /// The state of a paused device.
    fn save(&self) -> Result<DeviceState>;

    /// Takes a state over, on a device that the guest has not touched. Nothing runs before [`Device::resume`].
    fn restore(&self, state: &DeviceState) -> Result<()>;

    /// From here on pages that the device writes are remembered. Idempotent.
    fn start_logging(&self) -> Result<()>;

    /// Ends that. Idempotent.
    fn stop_logging(&self) -> Result<()>;

    /// Adds the pages written since the last call. What this process writes through
    /// [`crate::memory::GuestRam::memory`] need not be added.
    fn collect_dirty(&self, into: &mut PageSet) -> Result<()>;

    /// Tells the network where the guest is now; nothing for other devices.
    fn announce(&self) -> Result<()> {
        Ok(())
    }
}
