//! What is sent to a backend to have it serve a guest's rings: one list, whether the guest has just set the device up, the
//! machine goes on after a pause, or the backend came back.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::super::mmio::ReadyQueue;
use super::link::{F_LOG_ALL, F_PROTOCOL};
use super::log::Log;
use super::offer::CONFIG_WCE;
use crate::memory::GuestRam;
use crate::pages::PAGE_BYTES;

/// Flag of SET_VRING_ADDR: writes of the used ring are logged.
const ADDR_LOG: u32 = 1;

/// The in-flight region, which outlives the backend: it says which requests were taken and not completed.
#[derive(Clone)]
pub(super) struct Inflight {
    info: VhostUserInflight,
    file: Arc<File>,
}

impl Inflight {
    fn ask(frontend: &mut Frontend, queues: u16, queue_size: u16) -> Result<Self> {
        let wanted = VhostUserInflight { mmap_size: 0, mmap_offset: 0, num_queues: queues, queue_size };
        let (info, file) = frontend.get_inflight_fd(&wanted).context("GET_INFLIGHT_FD")?;
        let VhostUserInflight { mmap_size, num_queues, queue_size: size, .. } = info;
        ensure!(
            num_queues >= queues && size >= queue_size && mmap_size > 0,
            "the backend's in-flight region is for {num_queues} queues of {size}, not {queues} of {queue_size}"
        );
        Ok(Self { info, file: Arc::new(file) })
    }

    fn set(&self, frontend: &mut Frontend) -> Result<()> {
        frontend.set_inflight_fd(&self.info, self.file.as_raw_fd()).context("SET_INFLIGHT_FD")
    }
}

/// One ring, and where it goes on.
pub(super) struct RingPlan {
    pub(super) ring: ReadyQueue,
    /// Index in the available ring of what is taken next.
    pub(super) base: u16,
    pub(super) kick: Arc<EventFd>,
    pub(super) call: Arc<EventFd>,
}

/// All that is sent.
pub(super) struct Plan {
    pub(super) ram: Arc<GuestRam>,
    /// Features that the guest's driver chose.
    pub(super) features: u64,
    /// The write cache has to be switched to this first.
    pub(super) wce: Option<u8>,
    /// The region of before, or none for rings of which nothing is in flight.
    pub(super) inflight: Option<Inflight>,
    /// Queues of the device and the most descriptors of each.
    pub(super) queues: u16,
    pub(super) queue_size: u16,
    pub(super) log: Option<Arc<Log>>,
    pub(super) rings: Vec<RingPlan>,
}

impl Plan {
    /// Sends everything but the messages that let the rings run. Returns the in-flight region, which has to be kept before
    /// any ring runs.
    pub(super) fn prepare(&self, frontend: &mut Frontend) -> Result<Inflight> {
        if let Some(wce) = self.wce {
            frontend
                .set_config(CONFIG_WCE as u32, VhostUserConfigFlags::WRITABLE, &[wce])
                .context("SET_CONFIG of the write cache")?;
        }
        set_features(frontend, self.features, self.log.is_some())?;
        frontend.set_mem_table(&self.memory_table()).context("SET_MEM_TABLE")?;
        let inflight = match &self.inflight {
            Some(kept) => kept.clone(),
            None => Inflight::ask(frontend, self.queues, self.queue_size)?,
        };
        inflight.set(frontend)?;
        if let Some(log) = &self.log {
            set_log(frontend, log)?;
        }
        for RingPlan { ring, base, kick, call } in &self.rings {
            let queue = usize::from(ring.index);
            frontend.set_vring_num(queue, ring.size).context("SET_VRING_NUM")?;
            frontend.set_vring_base(queue, *base).context("SET_VRING_BASE")?;
            set_addresses(frontend, &self.ram, ring, self.log.is_some())?;
            frontend.set_vring_call(queue, call).context("SET_VRING_CALL")?;
            frontend.set_vring_kick(queue, kick).context("SET_VRING_KICK")?;
        }
        Ok(inflight)
    }

    fn memory_table(&self) -> Vec<VhostUserMemoryRegionInfo> {
        let region = |region: &crate::memory::RamRegion| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.guest_start,
            memory_size: region.len,
            userspace_addr: self.ram.page_pointer(region.first_page) as u64,
            mmap_offset: region.first_page * PAGE_BYTES as u64,
            mmap_handle: self.ram.file().as_raw_fd(),
        };
        self.ram.regions().iter().map(region).collect()
    }
}

/// Tells the backend what the driver chose, and whether guest memory is logged.
pub(super) fn set_features(frontend: &mut Frontend, features: u64, log: bool) -> Result<()> {
    let log = if log { F_LOG_ALL } else { 0 };
    frontend.set_features(features | F_PROTOCOL | log).context("SET_FEATURES")
}

/// Hands a log over; when this returns the one before is not written any more.
pub(super) fn set_log(frontend: &mut Frontend, log: &Log) -> Result<()> {
    frontend.set_log_base(0, Some(log.region())).context("SET_LOG_BASE")
}

/// Tells where a ring is, in addresses of this process, and whether its used ring is logged.
pub(super) fn set_addresses(
    frontend: &mut Frontend,
    ram: &GuestRam,
    ring: &ReadyQueue,
    log: bool,
) -> Result<()> {
    let user = |address: u64| -> Result<u64> {
        let page = ram.page_of(address).with_context(|| format!("ring at {address:#x}, outside memory"))?;
        Ok(ram.page_pointer(page) as u64 + address % PAGE_BYTES as u64)
    };
    let data = VringConfigData {
        queue_max_size: ring.size,
        queue_size: ring.size,
        flags: if log { ADDR_LOG } else { 0 },
        desc_table_addr: user(ring.desc)?,
        used_ring_addr: user(ring.used)?,
        avail_ring_addr: user(ring.avail)?,
        log_addr: log.then_some(ring.used),
    };
    frontend.set_vring_addr(usize::from(ring.index), &data).context("SET_VRING_ADDR")
}

/// Lets rings run.
pub(super) fn enable(frontend: &mut Frontend, queues: &[u16]) -> Result<()> {
    for queue in queues {
        frontend.set_vring_enable(usize::from(*queue), true).context("SET_VRING_ENABLE")?;
    }
    Ok(())
}

/// Stops rings, each with what was taken from it completed; returns where each goes on.
pub(super) fn stop(frontend: &mut Frontend, queues: &[u16]) -> Result<Vec<u16>> {
    let stop_one = |queue: &u16| {
        let queue = usize::from(*queue);
        frontend.set_vring_enable(queue, false).context("SET_VRING_ENABLE to stop the queue")?;
        let base = frontend.get_vring_base(queue).context("GET_VRING_BASE")?;
        u16::try_from(base).context("the base of a split ring has 16 bits")
    };
    queues.iter().map(stop_one).collect()
}
