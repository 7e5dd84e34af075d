//! A vhost-user front end: what a VMM does with the daemon's socket, one message at a time.
//!
//! [`FrontEnd::start`] does the whole of it in the order that QEMU does; tests that want another order call the steps.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

use crate::hung_up;
use crate::memory::{DirtyLog, GuestMemory};
use crate::ring::{Ring, RingOptions};

/// How long a reply may take before the daemon counts as hung.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// VIRTIO_RING_F_INDIRECT_DESC.
pub const F_INDIRECT: u64 = 1 << 28;
/// VIRTIO_RING_F_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VHOST_F_LOG_ALL.
pub const F_LOG_ALL: u64 = 1 << 26;
/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = 1 << 32;
/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const F_PROTOCOL: u64 = 1 << 30;
/// VIRTIO_BLK_F_FLUSH.
pub const F_FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_CONFIG_WCE.
pub const F_CONFIG_WCE: u64 = 1 << 11;
/// VIRTIO_BLK_F_MQ.
pub const F_MQ: u64 = 1 << 12;
/// VIRTIO_BLK_F_DISCARD.
pub const F_DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES.
pub const F_WRITE_ZEROES: u64 = 1 << 14;

/// What a front end asks for.
#[derive(Debug, Clone)]
pub struct Options {
    /// Queues to use.
    pub queues: usize,
    /// Descriptors of each.
    pub queue_size: u16,
    /// Sizes of the regions of guest memory; the rings go into the first.
    pub memory: Vec<u64>,
    /// Bytes of nothing between two regions.
    pub gap: u64,
    /// Use VIRTIO_F_EVENT_IDX when it is offered.
    pub event_idx: bool,
    /// Use indirect descriptors when they are offered.
    pub indirect: bool,
    /// Use ADD_MEM_REG instead of SET_MEM_TABLE when it is offered.
    pub mem_slots: bool,
    /// Use in-flight tracking when it is offered.
    pub inflight: bool,
    /// Listen for changes of the configuration space when that is offered.
    pub config_channel: bool,
    /// Feature bits not to accept.
    pub refuse: u64,
    /// Protocol feature bits not to accept.
    pub refuse_protocol: VhostUserProtocolFeatures,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 128,
            memory: vec![64 << 20],
            gap: 16 << 20,
            event_idx: true,
            indirect: true,
            mem_slots: true,
            inflight: true,
            config_channel: false,
            refuse: 0,
            refuse_protocol: VhostUserProtocolFeatures::empty(),
        }
    }
}

/// Where a ring starts after a connection was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// At what the device completed, as QEMU does.
    Used,
    /// At what the driver made available, as Cloud Hypervisor does.
    Avail,
}

/// The device's configuration space, as far as it is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockConfig {
    /// Sectors of 512 bytes.
    pub capacity: u64,
    /// Most data segments of a request.
    pub seg_max: u32,
    /// The unit of addressing in bytes.
    pub blk_size: u32,
    /// 1 when the write cache is on.
    pub writeback: u8,
    /// Queues.
    pub num_queues: u16,
    /// Most sectors of a discard segment.
    pub max_discard_sectors: u32,
    /// Most segments of a discard.
    pub max_discard_seg: u32,
    /// Most sectors of a write-zeroes segment.
    pub max_write_zeroes_sectors: u32,
    /// Most segments of a write-zeroes.
    pub max_write_zeroes_seg: u32,
    /// Whether write-zeroes may give space back.
    pub write_zeroes_may_unmap: u8,
}

impl BlockConfig {
    /// Size of the part of the space that a block device has, virtio 1.3, section 5.2.4.
    pub const LEN: usize = 60;

    fn parse(bytes: &[u8]) -> Self {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        Self {
            capacity: u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32,
            seg_max: u32_at(12),
            blk_size: u32_at(20),
            writeback: bytes[32],
            num_queues: u16::from_le_bytes([bytes[34], bytes[35]]),
            max_discard_sectors: u32_at(36),
            max_discard_seg: u32_at(40),
            max_write_zeroes_sectors: u32_at(48),
            max_write_zeroes_seg: u32_at(52),
            write_zeroes_may_unmap: bytes[56],
        }
    }
}

/// The in-flight region, kept from connection to connection.
pub struct Inflight {
    /// What SET_INFLIGHT_FD says.
    pub info: VhostUserInflight,
    /// The memory.
    pub file: File,
}

/// A connection, the guest's memory and its rings.
pub struct FrontEnd {
    path: PathBuf,
    /// The messages, for tests that send them one by one.
    pub vhost: Frontend,
    stream: UnixStream,
    options: Options,
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// The rings, in order of their index.
    pub rings: Vec<Ring>,
    /// Features that were accepted.
    pub features: u64,
    /// Protocol features that were accepted.
    pub protocol: VhostUserProtocolFeatures,
    /// The in-flight region, once there is one.
    pub inflight: Option<Inflight>,
    /// Where the device speaks.
    channel: Option<UnixStream>,
}

impl FrontEnd {
    /// Connects and negotiates; no memory and no ring is handed over yet.
    pub fn connect(path: &Path, options: Options) -> Result<Self> {
        let memory = Arc::new(GuestMemory::with_gaps(&options.memory, options.gap)?);
        let (vhost, stream) = open(path, options.queues)?;
        let mut front = Self {
            path: path.to_owned(),
            vhost,
            stream,
            options,
            memory,
            rings: Vec::new(),
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            inflight: None,
            channel: None,
        };
        front.negotiate()?;
        Ok(front)
    }

    /// Connects and starts all rings.
    pub fn start(path: &Path, options: Options) -> Result<Self> {
        let mut front = Self::connect(path, options)?;
        front.make_rings()?;
        front.set_up_inflight()?;
        front.send_memory()?;
        for queue in 0..front.rings.len() {
            front.start_ring(queue, 0)?;
        }
        Ok(front)
    }

    /// What it asks for.
    pub fn options(&self) -> &Options {
        &self.options
    }

    fn negotiate(&mut self) -> Result<()> {
        self.vhost.set_owner().context("SET_OWNER")?;
        let offered = self.vhost.get_features().context("GET_FEATURES")?;
        let mut refused = F_LOG_ALL | self.options.refuse;
        if !self.options.event_idx {
            refused |= F_EVENT_IDX;
        }
        if !self.options.indirect {
            refused |= F_INDIRECT;
        }
        let known = F_INDIRECT | F_EVENT_IDX | F_VERSION_1 | F_PROTOCOL | 0xffff;
        self.features = offered & known & !refused;
        let offered = self.vhost.get_protocol_features().context("GET_PROTOCOL_FEATURES")?;
        // A channel that is not set up must not be promised, nor page faults that nobody handles.
        let mut unused = VhostUserProtocolFeatures::BACKEND_SEND_FD
            | VhostUserProtocolFeatures::HOST_NOTIFIER
            | VhostUserProtocolFeatures::PAGEFAULT;
        if !self.options.config_channel {
            unused |= VhostUserProtocolFeatures::BACKEND_REQ;
        }
        self.protocol = offered & !unused & !self.options.refuse_protocol;
        self.vhost.set_protocol_features(self.protocol).context("SET_PROTOCOL_FEATURES")?;
        self.vhost.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        if self.protocol.contains(VhostUserProtocolFeatures::MQ) {
            let queues = self.vhost.get_queue_num().context("GET_QUEUE_NUM")?;
            ensure!(queues >= self.options.queues as u64, "the device has {queues} queues only");
        }
        if self.protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            let (ours, theirs) = UnixStream::pair()?;
            self.vhost.set_backend_request_fd(&theirs).context("SET_BACKEND_REQ_FD")?;
            self.channel = Some(ours);
        }
        self.vhost.set_features(self.features).context("SET_FEATURES")
    }

    /// Waits until the device says that its configuration space has changed; `false` when it says nothing.
    pub fn config_changed(&mut self, timeout: Duration) -> Result<bool> {
        let channel = self.channel.as_mut().context("no channel was negotiated")?;
        channel.set_read_timeout(Some(timeout))?;
        let mut message = [0; 12];
        match channel.read_exact(&mut message) {
            Ok(()) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(false),
            Err(e) => return Err(e).context("the channel"),
        }
        // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, no reply wanted, nothing behind the header.
        ensure!(message == [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], "another message: {message:?}");
        Ok(true)
    }

    /// Makes the rings in guest memory; the device is not told yet.
    pub fn make_rings(&mut self) -> Result<()> {
        let options = RingOptions {
            size: self.options.queue_size,
            event_idx: self.features & F_EVENT_IDX != 0,
            indirect: self.features & F_INDIRECT != 0,
            region: 0,
        };
        while self.rings.len() < self.options.queues {
            self.rings.push(Ring::new(self.memory.clone(), options)?);
        }
        Ok(())
    }

    /// Asks for an in-flight region, or hands back the one there is, when both sides know of it.
    pub fn set_up_inflight(&mut self) -> Result<()> {
        if !self.options.inflight || !self.protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            return Ok(());
        }
        if self.inflight.is_none() {
            let queues = u16::try_from(self.options.queues).context("queues")?;
            let ask = VhostUserInflight::new(0, 0, queues, self.options.queue_size);
            let (info, file) = self.vhost.get_inflight_fd(&ask).context("GET_INFLIGHT_FD")?;
            self.inflight = Some(Inflight { info, file });
        }
        if let Some(Inflight { info, file }) = &self.inflight {
            self.vhost.set_inflight_fd(info, file.as_raw_fd()).context("SET_INFLIGHT_FD")?;
        }
        Ok(())
    }

    /// The regions of guest memory as messages name them.
    pub fn region_infos(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.memory.regions().iter().map(crate::memory::Region::info).collect()
    }

    /// Hands over guest memory.
    pub fn send_memory(&mut self) -> Result<()> {
        let regions = self.region_infos();
        if self.options.mem_slots && self.protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            for region in &regions {
                self.vhost.add_mem_region(region).context("ADD_MEM_REG")?;
            }
        } else {
            self.vhost.set_mem_table(&regions).context("SET_MEM_TABLE")?;
        }
        Ok(())
    }

    /// Starts a ring at `base`.
    pub fn start_ring(&mut self, queue: usize, base: u16) -> Result<()> {
        let ring = &self.rings[queue];
        self.vhost.set_vring_call(queue, ring.call_fd()).context("SET_VRING_CALL")?;
        self.vhost.set_vring_num(queue, ring.options().size).context("SET_VRING_NUM")?;
        self.vhost.set_vring_base(queue, base).context("SET_VRING_BASE")?;
        self.vhost.set_vring_addr(queue, &ring.config(false)).context("SET_VRING_ADDR")?;
        self.vhost.set_vring_kick(queue, ring.kick_fd()).context("SET_VRING_KICK")?;
        self.enable(queue, true)
    }

    /// Enables or disables a ring.
    pub fn enable(&mut self, queue: usize, on: bool) -> Result<()> {
        self.vhost.set_vring_enable(queue, on).context("SET_VRING_ENABLE")
    }

    /// Stops a ring as QEMU does; returns its base.
    pub fn stop_ring(&mut self, queue: usize) -> Result<u16> {
        self.enable(queue, false)?;
        let base = self.vhost.get_vring_base(queue).context("GET_VRING_BASE")?;
        u16::try_from(base).context("the base of a split ring has 16 bits")
    }

    /// Reads the configuration space.
    pub fn config(&mut self) -> Result<BlockConfig> {
        let bytes = self.config_bytes(0, BlockConfig::LEN as u32)?;
        Ok(BlockConfig::parse(&bytes))
    }

    /// Reads `len` bytes of the configuration space from `offset` on.
    pub fn config_bytes(&mut self, offset: u32, len: u32) -> Result<Vec<u8>> {
        let zeroes = vec![0; len as usize];
        let answer = self.vhost.get_config(offset, len, VhostUserConfigFlags::WRITABLE, &zeroes);
        Ok(answer.with_context(|| format!("GET_CONFIG({offset}, {len})"))?.1)
    }

    /// Starts logging on running rings, as QEMU does when a migration begins.
    pub fn start_log(&mut self, log: &DirtyLog) -> Result<()> {
        self.set_log(log)?;
        self.vhost.set_features(self.features | F_LOG_ALL).context("SET_FEATURES with F_LOG_ALL")?;
        self.set_log_flag(true)
    }

    /// Hands over another log.
    pub fn set_log(&mut self, log: &DirtyLog) -> Result<()> {
        self.vhost.set_log_base(0, Some(log.region())).context("SET_LOG_BASE")
    }

    /// Stops logging on running rings, as QEMU does when a migration is cancelled.
    pub fn stop_log(&mut self) -> Result<()> {
        self.vhost.set_features(self.features).context("SET_FEATURES without F_LOG_ALL")?;
        self.set_log_flag(false)
    }

    fn set_log_flag(&mut self, on: bool) -> Result<()> {
        for (queue, ring) in self.rings.iter().enumerate() {
            self.vhost.set_vring_addr(queue, &ring.config(on)).context("SET_VRING_ADDR")?;
        }
        Ok(())
    }

    /// Whether the daemon has closed the connection.
    pub fn is_hung_up(&self) -> bool {
        hung_up(self.stream.as_fd())
    }

    /// Stops all rings as a VMM does that pauses its guest.
    pub fn stop_rings(&mut self) -> Result<()> {
        (0..self.rings.len()).try_for_each(|queue| self.stop_ring(queue).map(drop))
    }

    /// Goes on at another socket: the connection so far is closed; memory, rings and the in-flight region stay.
    pub fn go_on_at(&mut self, path: &Path, timeout: Duration) -> Result<()> {
        self.vanish();
        path.clone_into(&mut self.path);
        self.reconnect(Base::Used, timeout)
    }

    /// Closes the connection without a word, as a VMM that dies does. Memory, rings and the in-flight region stay.
    pub fn vanish(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Comes back after the connection was lost: same memory, same rings, same in-flight region. When the daemon dies
    /// again meanwhile, it begins anew, until it works or `timeout` is over.
    pub fn reconnect(&mut self, base: Base, timeout: Duration) -> Result<()> {
        let until = Instant::now() + timeout;
        loop {
            let attempt =
                self.reopen(until.saturating_duration_since(Instant::now())).and_then(|()| self.resume(base));
            if attempt.is_ok() || Instant::now() >= until || !self.is_hung_up() {
                return attempt;
            }
        }
    }

    fn resume(&mut self, base: Base) -> Result<()> {
        self.set_up_inflight()?;
        self.send_memory()?;
        for queue in 0..self.rings.len() {
            let ring = &self.rings[queue];
            let base = match base {
                Base::Used => ring.used_idx(),
                Base::Avail => ring.avail_idx(),
            };
            self.start_ring(queue, base)?;
        }
        Ok(())
    }

    /// Connects and negotiates anew, until it works or `timeout` is over.
    pub fn reopen(&mut self, timeout: Duration) -> Result<()> {
        let until = Instant::now() + timeout;
        loop {
            let attempt = open(&self.path, self.options.queues).and_then(|(vhost, stream)| {
                (self.vhost, self.stream) = (vhost, stream);
                self.negotiate()
            });
            match attempt {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() >= until => {
                    bail!("no connection to {} within {timeout:?}: {error:#}", self.path.display())
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }
}

fn open(path: &Path, queues: usize) -> Result<(Frontend, UnixStream)> {
    let stream = UnixStream::connect(path).with_context(|| format!("connect to {}", path.display()))?;
    stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
    stream.set_write_timeout(Some(REPLY_TIMEOUT))?;
    let vhost = Frontend::from_stream(stream.try_clone()?, queues as u64);
    Ok((vhost, stream))
}

impl std::fmt::Debug for FrontEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrontEnd")
            .field("path", &self.path)
            .field("rings", &self.rings.len())
            .finish_non_exhaustive()
    }
}
