//! One front end's connection: what it negotiated, its memory, its rings.
//!
//! Messages are handled one after the other in the connection's thread. Whatever a running ring depends on is handed
//! to its worker, and the message is answered only when the worker has confirmed: after the reply to SET_LOG_BASE
//! nothing is marked in the old log, after the reply to GET_VRING_BASE or a disabling SET_VRING_ENABLE nothing is in
//! flight, and after SET_MEM_TABLE new requests use the new memory only.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::*;
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::inflight::InflightRegion;
use super::listener::{Common, Turn};
use super::log::DirtyLog;
use super::memory::{GuestMemory, REGIONS_MAX};
use super::ring::{QUEUE_SIZE_MAX, Ring, RingAddresses};
use crate::disk::DiskEvent;
use crate::worker::SECTOR;
use crate::worker::command::{Command, QueueKey, QueueSetup, QueueStart};
use crate::worker::mailbox::{Mail, Mailbox};

/// How long a worker may take to drain a ring. GET_VRING_BASE holds up the VMM, so there has to be an end; a disk that
/// takes longer to answer has failed.
const DRAIN_MAX: Duration = Duration::from_secs(60);
/// VHOST_F_LOG_ALL.
const LOG_ALL: u64 = 1 << 26;
/// VHOST_USER_F_PROTOCOL_FEATURES.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Bytes of the configuration space that any front end may ask for.
const CONFIG_BYTES_MAX: u32 = 256;
/// Offset of `writeback` in the configuration space.
const CONFIG_WCE: u32 = 32;
/// Data segments of one request that drivers are told of: fits the usual ring of 128 with header and status.
const SEG_MAX: u32 = 126;

#[derive(Debug, Default)]
struct Vring {
    size: u32,
    addresses: Option<RingAddresses>,
    base: u16,
    kick: Option<File>,
    /// A kick message has come, with or without a descriptor.
    started: bool,
    enabled: bool,
    call: Option<File>,
    err: Option<File>,
    /// It is at a worker.
    running: bool,
}

/// The state of one connection.
pub struct Session {
    number: u64,
    me: Weak<Mutex<Session>>,
    common: Arc<Common>,
    features: u64,
    protocol: u64,
    memory: Arc<GuestMemory>,
    log: Option<Arc<DirtyLog>>,
    inflight: Option<Arc<InflightRegion>>,
    vrings: Vec<Vring>,
    write_through: Arc<AtomicBool>,
    counted: bool,
    ended: bool,
}

fn refused(what: impl std::fmt::Display) -> Error {
    Error::ReqHandlerError(std::io::Error::new(std::io::ErrorKind::InvalidInput, what.to_string()))
}

fn clone_file(file: &Option<File>) -> Result<Option<File>> {
    file.as_ref().map(File::try_clone).transpose().map_err(Error::ReqHandlerError)
}

fn confirmed<T>(from: &Receiver<T>) -> Result<T> {
    from.recv_timeout(DRAIN_MAX).map_err(|_| refused("the disk did not finish its requests in time"))
}

impl Session {
    pub(super) fn new(number: u64, common: Arc<Common>) -> Arc<Mutex<Self>> {
        let vrings = (0..common.queues).map(|_| Vring::default()).collect();
        Arc::new_cyclic(|me| {
            Mutex::new(Self {
                number,
                me: me.clone(),
                common,
                features: 0,
                protocol: 0,
                memory: Arc::default(),
                log: None,
                inflight: None,
                vrings,
                write_through: Arc::new(AtomicBool::new(false)),
                counted: false,
                ended: false,
            })
        })
    }

    fn offered(&self) -> u64 {
        let mut features = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_CONFIG_WCE
            | 1 << VIRTIO_BLK_F_MQ
            | LOG_ALL
            | PROTOCOL_FEATURES;
        if self.common.disk.limits().read_only {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else {
            features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        features
    }

    fn has(&self, bit: u32) -> bool {
        self.features & 1 << bit != 0
    }

    /// Whether each write has to be durable before it is completed: the driver cannot flush, or has the cache off
    /// (virtio 1.3, section 5.2.6.2).
    fn note_cache(&self) {
        let cache_on = self.common.disk.is_cache_on();
        let off = !self.has(VIRTIO_BLK_F_FLUSH) || self.has(VIRTIO_BLK_F_CONFIG_WCE) && !cache_on;
        self.write_through.store(off, Ordering::Relaxed);
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let count = self.vrings.len();
        self.vrings.get_mut(index as usize).ok_or_else(|| refused(format!("queue {index} of {count}")))
    }

    fn key(&self, index: usize) -> QueueKey {
        QueueKey { session: self.number, index: index as u16 }
    }

    fn worker(&self, index: usize) -> &Mailbox {
        &self.common.workers[index % self.common.workers.len()]
    }

    fn setup(&self, index: usize) -> Result<QueueSetup> {
        let vring = &self.vrings[index];
        Ok(QueueSetup {
            memory: self.memory.clone(),
            addresses: vring.addresses.unwrap_or_default(),
            log: self.log.clone().filter(|_| self.features & LOG_ALL != 0),
            kick: clone_file(&vring.kick)?,
            call: clone_file(&vring.call)?,
            err: clone_file(&vring.err)?,
        })
    }

    // --- rings -------------------------------------------------------------------------------------------------------

    /// Starts every ring that is ready and does not run.
    pub(super) fn start_rings(&mut self) {
        for index in 0..self.vrings.len() {
            if let Err(e) = self.start_ring(index) {
                tracing::warn!(
                    disk = self.common.disk.id,
                    queue = index,
                    "the ring could not be started: {e}"
                );
            }
        }
    }

    fn start_ring(&mut self, index: usize) -> Result<()> {
        let vring = &self.vrings[index];
        let ready = vring.started && vring.enabled && vring.size > 0 && vring.addresses.is_some();
        if vring.running || !ready || self.memory.is_empty() || self.ended {
            return Ok(());
        }
        let turn = self.common.ownership.acquire(self.number, &self.me);
        if turn == Turn::Wait {
            tracing::info!(
                disk = self.common.disk.id,
                queue = index,
                "the ring waits until another front end has stopped"
            );
            return Ok(());
        }
        let started = self.hand_over(index);
        if turn == Turn::YesAfterWaiting {
            self.start_rings();
        }
        if started.is_err() {
            self.release_if_idle();
        }
        started
    }

    /// Maps the ring and gives it to its worker.
    fn hand_over(&mut self, index: usize) -> Result<()> {
        let vring = &self.vrings[index];
        let event_idx = self.has(VIRTIO_RING_F_EVENT_IDX);
        let addresses = vring.addresses.unwrap_or_default();
        let mut ring =
            Ring::map(&self.memory, vring.size, addresses, event_idx, vring.base).map_err(refused)?;
        let mut inflight = self.inflight.as_ref().and_then(|r| r.queue(index, ring.size()));
        let mut open = Vec::new();
        if let Some(queue) = &mut inflight {
            let recovered = queue.recover(ring.used_idx().load(Ordering::Acquire)).map_err(refused)?;
            if let Some(next) = recovered.next_avail {
                // The region knows better than the front end, which after a crash goes by the used index alone.
                ring.set_next_avail(next);
            }
            if !recovered.open.is_empty() {
                let n = recovered.open.len();
                tracing::info!(
                    disk = self.common.disk.id,
                    queue = index,
                    "{n} requests were in flight and are done again"
                );
            }
            open = recovered.open;
        }
        self.note_cache();
        let write_through = self.write_through.clone();
        let start = QueueStart { ring, setup: self.setup(index)?, inflight, open, write_through };
        let (done, wait) = channel();
        // Before it can be: a request may be done at once.
        self.common.disk.used.store(true, Ordering::Release);
        self.worker(index).post(Mail::Command(Command::Start(self.key(index), Box::new(start), done)));
        self.vrings[index].running = true;
        confirmed(&wait)?;
        if !std::mem::replace(&mut self.counted, true)
            && self.common.disk.running.fetch_add(1, Ordering::Relaxed) == 0
        {
            let _ = self.common.disk.tell(DiskEvent::Connected);
        }
        Ok(())
    }

    /// Drains a ring. Its base says afterwards where it would go on.
    fn stop_ring(&mut self, index: usize) -> Result<()> {
        if !self.vrings[index].running {
            return Ok(());
        }
        let (done, wait) = channel();
        self.worker(index).post(Mail::Command(Command::Stop(self.key(index), done)));
        let next = confirmed(&wait)?;
        self.ring_stopped(index, next);
        self.release_if_idle();
        Ok(())
    }

    fn release_if_idle(&mut self) {
        if self.vrings.iter().any(|v| v.running) {
            return;
        }
        self.common.ownership.release(self.number);
        if std::mem::replace(&mut self.counted, false)
            && self.common.disk.running.fetch_sub(1, Ordering::Relaxed) == 1
        {
            let _ = self.common.disk.tell(DiskEvent::Disconnected);
        }
    }

    /// Drains all rings, side by side.
    fn stop_all(&mut self) -> Result<()> {
        let waits = self.post_stops();
        let mut result = Ok(());
        for (index, wait) in waits {
            match confirmed(&wait) {
                Ok(next) => self.ring_stopped(index, next),
                Err(e) => result = Err(e),
            }
        }
        self.release_if_idle();
        result
    }

    fn post_stops(&self) -> Vec<(usize, Receiver<Option<u16>>)> {
        let running = (0..self.vrings.len()).filter(|&index| self.vrings[index].running);
        running
            .map(|index| {
                let (done, wait) = channel();
                self.worker(index).post(Mail::Command(Command::Stop(self.key(index), done)));
                (index, wait)
            })
            .collect()
    }

    fn ring_stopped(&mut self, index: usize, next: Option<u16>) {
        let vring = &mut self.vrings[index];
        vring.running = false;
        if let Some(next) = next {
            vring.base = next;
        }
    }

    /// Tells the worker of a running ring what has changed around it.
    fn update_ring(&mut self, index: usize) -> Result<()> {
        if !self.vrings[index].running {
            return self.start_ring(index);
        }
        let (done, wait) = channel();
        let setup = Box::new(self.setup(index)?);
        self.worker(index).post(Mail::Command(Command::Update(self.key(index), setup, done)));
        confirmed(&wait)?.map_err(refused)
    }

    fn update_all(&mut self) -> Result<()> {
        let mut result = Ok(());
        for index in 0..self.vrings.len() {
            let updated = self.update_ring(index);
            result = result.and(updated);
        }
        result
    }

    /// The connection has ended.
    pub(super) fn end(&mut self) {
        self.ended = true;
        // However long it takes: until everything has drained, no other front end may run rings that may lie in the same
        // memory. A worker that has ended answers too, by dropping its sender.
        for (index, wait) in self.post_stops() {
            let next = wait.recv().ok().flatten();
            self.ring_stopped(index, next);
        }
        self.release_if_idle();
        self.common.ownership.release(self.number);
    }

    // --- configuration space (virtio 1.3, section 5.2.4) ---------------------------------------------------------------

    fn config_space(&self) -> [u8; CONFIG_BYTES_MAX as usize] {
        let disk = self.common.disk.limits();
        let exponent = (self.common.physical_sector / disk.sector).max(1).ilog2() as u8;
        let zero_sectors = (disk.zero_bytes_max / SECTOR) as u32;
        let align = (self.common.physical_sector.max(4096) / SECTOR as u32).to_le_bytes();
        let mut space = [0; CONFIG_BYTES_MAX as usize];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(disk.size / SECTOR).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &disk.sector.to_le_bytes());
        put(24, &[exponent]);
        put(26, &(1u16 << exponent).to_le_bytes());
        put(CONFIG_WCE as usize, &[u8::from(self.common.disk.is_cache_on())]);
        put(34, &self.common.queues.to_le_bytes());
        put(36, &zero_sectors.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &align);
        put(48, &zero_sectors.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        space
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.stop_all()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_all()?;
        for vring in &mut self.vrings {
            *vring = Vring { call: vring.call.take(), err: vring.err.take(), ..Vring::default() };
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.offered();
        if unknown != 0 {
            return Err(refused(format!("features {unknown:#x} were not offered")));
        }
        self.features = features;
        if features & PROTOCOL_FEATURES == 0 {
            // Such a front end sends no SET_VRING_ENABLE: rings run from their kick on.
            self.vrings.iter_mut().for_each(|v| v.enabled = true);
        }
        self.note_cache();
        // LOG_ALL may have changed under running rings.
        self.update_all()
    }

    fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.memory = Arc::new(GuestMemory::from_table(table, files).map_err(refused)?);
        self.update_all()?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        if !num.is_power_of_two() || num > u32::from(QUEUE_SIZE_MAX) {
            return Err(refused(format!("queue size {num}")));
        }
        let vring = self.vring(index)?;
        if vring.running {
            return Err(refused("the size of a running queue cannot change"));
        }
        vring.size = num;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        desc: u64,
        used: u64,
        avail: u64,
        _log: u64,
    ) -> Result<()> {
        // Used-ring writes are logged at their guest address, which the log address can only repeat.
        self.vring(index)?.addresses = Some(RingAddresses { desc, avail, used });
        self.update_ring(index as usize)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let vring = self.vring(index)?;
        if vring.running {
            return Err(refused("the base of a running queue cannot change"));
        }
        vring.base = u16::try_from(base).map_err(refused)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.vring(index)?;
        self.stop_ring(index as usize)?;
        let vring = self.vring(index)?;
        // The ring is stopped until its next kick message.
        vring.started = false;
        vring.kick = None;
        Ok(VhostUserVringState::new(index, u32::from(vring.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let vring = self.vring(u32::from(index))?;
        vring.kick = fd;
        vring.started = true;
        self.update_ring(usize::from(index))
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.vring(u32::from(index))?.call = fd;
        self.update_ring(usize::from(index))
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.vring(u32::from(index))?.err = fd;
        self.update_ring(usize::from(index))
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        use VhostUserProtocolFeatures as P;
        Ok(P::MQ
            | P::LOG_SHMFD
            | P::REPLY_ACK
            | P::CONFIG
            | P::INFLIGHT_SHMFD
            | P::CONFIGURE_MEM_SLOTS
            | P::RESET_DEVICE
            | P::DEVICE_STATE
            | P::BACKEND_REQ)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.protocol = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.common.queues))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.vring(index)?.enabled = enable;
        if enable { self.start_ring(index as usize) } else { self.stop_ring(index as usize) }
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let end = offset.checked_add(size).filter(|end| *end <= CONFIG_BYTES_MAX);
        let end = end.ok_or_else(|| refused(format!("{size} bytes of configuration at {offset}")))?;
        Ok(self.config_space()[offset as usize..end as usize].to_vec())
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let at = CONFIG_WCE.checked_sub(offset).and_then(|at| bytes.get(at as usize));
        let Some(&wce) = at else { return Err(refused("the write cache is all that can be configured")) };
        // Remembered with the disk, not with the connection: a front end that comes back does not repeat it, and its
        // guest, which has the cache off, sends no flushes.
        self.common.disk.set_cache(wce != 0).map_err(refused)?;
        self.note_cache();
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        Err(refused("a disk has no GPU socket"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(refused("a disk shares no objects"))
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let queues = wanted.num_queues.min(self.common.queues).max(1);
        if wanted.queue_size == 0 || wanted.queue_size > QUEUE_SIZE_MAX {
            return Err(refused(format!("an in-flight region for queues of {}", wanted.queue_size)));
        }
        let (mmap_size, file) =
            InflightRegion::create(queues, wanted.queue_size).map_err(Error::ReqHandlerError)?;
        let reply = VhostUserInflight {
            mmap_size,
            mmap_offset: 0,
            num_queues: queues,
            queue_size: wanted.queue_size,
        };
        Ok((reply, file))
    }

    fn set_inflight_fd(&mut self, region: &VhostUserInflight, file: File) -> Result<()> {
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *region;
        if self.vrings.iter().any(|v| v.running) {
            return Err(refused("the in-flight region of running rings cannot change"));
        }
        let mapped = InflightRegion::map(file, mmap_offset, mmap_size, num_queues, queue_size);
        self.inflight = Some(mapped.map_err(refused)?);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(REGIONS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.memory = Arc::new(self.memory.with_region(region, file).map_err(refused)?);
        self.update_all()?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.memory = Arc::new(self.memory.without_region(region).map_err(refused)?);
        self.update_all()
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        // All rings are drained when this comes, and the disk keeps nothing else of a front end: the state is empty.
        // Dropping the descriptor tells the reader so; a writer has nothing to write.
        Ok(None)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Ok(())
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(refused("a disk shares no memory"))
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let mapped = DirtyLog::map(file, log.mmap_offset, log.mmap_size).map_err(refused)?;
        self.log = Some(Arc::new(mapped));
        self.update_all()
    }
}
