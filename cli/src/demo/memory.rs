//! A virtio-blk driver over vhost-user with buffers of its own: the one place of this program with `unsafe`.
//!
//! The driver crate asks for raw pointers, since the device writes into them behind the compiler's back. Here they
//! point into a shared mapping that is only ever touched through volatile copies, cut into slots; a slot belongs to the
//! caller or to one request, never to both.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::time::TimeSpec;
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory as _};

/// Descriptors of the ring. A request takes three, so this is room for 85 at a time.
const RING_SIZE: u16 = 256;
/// Most slots, so that every one of them finds its descriptors.
pub(super) const MAX_SLOTS: usize = 64;

/// A connected disk with `slots` buffers of `slot_bytes` each.
pub(super) struct Device {
    // Dropped in this order: the queue refers to rings that the transport holds.
    queue: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    completed: Arc<EventFd>,
    transport: Box<VirtioBlkTransport>,
    buffers: MmapRegion<()>,
    slot_bytes: usize,
    in_flight: Vec<bool>,
}

impl Device {
    /// Connects to a vhost-user-blk socket, with one queue.
    ///
    /// # Errors
    /// When nobody listens there, or the back end lacks what a driver needs.
    pub(super) fn connect(socket: &Path, slots: usize, slot_bytes: usize) -> io::Result<Self> {
        assert!((1..=MAX_SLOTS).contains(&slots) && slot_bytes.is_multiple_of(4096), "slots out of range");
        let path = socket.to_str().ok_or_else(|| io::Error::other("the socket's path is not UTF-8"))?;
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | (VirtioBlkFeatureFlags::BLK_SIZE | VirtioBlkFeatureFlags::FLUSH | VirtioBlkFeatureFlags::MQ)
                .bits();
        let mut transport: Box<VirtioBlkTransport> = Box::new(VhostUser::new(path, features)?);
        let mut queues = VirtioBlkQueue::setup_queues(transport.as_mut(), 1, RING_SIZE)?;
        let mut queue = queues.pop().ok_or_else(|| io::Error::other("the driver made no queue"))?;
        queue.set_used_notif_enabled(true);
        let buffers = shared_memory(transport.as_mut(), slots * slot_bytes)?;
        Ok(Self {
            queue,
            notifier: transport.get_submission_notifier(0),
            completed: transport.get_completion_fd(0),
            transport,
            buffers,
            slot_bytes,
            in_flight: vec![false; slots],
        })
    }

    /// Size of the disk in bytes.
    pub(super) fn size_bytes(&self) -> io::Result<u64> {
        let sectors = u64::from(self.transport.get_config()?.capacity);
        sectors.checked_mul(512).ok_or_else(|| io::Error::other(format!("a capacity of {sectors} sectors")))
    }

    /// Size of a slot's buffer in bytes.
    pub(super) fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// A slot that no request uses.
    pub(super) fn idle_slot(&self) -> Option<usize> {
        self.in_flight.iter().position(|in_flight| !in_flight)
    }

    /// Whether a request is under way.
    pub(super) fn is_busy(&self) -> bool {
        self.in_flight.contains(&true)
    }

    /// Copies `data` into an idle slot's buffer.
    pub(super) fn put(&mut self, slot: usize, data: &[u8]) -> io::Result<()> {
        self.claim(slot, data.len());
        let place = self.buffers.get_slice(slot * self.slot_bytes, data.len()).map_err(io::Error::other)?;
        place.copy_from(data);
        Ok(())
    }

    /// Copies the beginning of an idle slot's buffer out.
    pub(super) fn get(&self, slot: usize, data: &mut [u8]) -> io::Result<()> {
        self.claim(slot, data.len());
        let place = self.buffers.get_slice(slot * self.slot_bytes, data.len()).map_err(io::Error::other)?;
        place.copy_to(data);
        Ok(())
    }

    /// Queues a read of `len` bytes at `offset` into the slot's buffer.
    pub(super) fn read(&mut self, slot: usize, offset: u64, len: usize) -> io::Result<()> {
        let at = self.pointer(slot, len);
        // SAFETY: `pointer` has checked that `len` bytes at `at` lie in the mapping, which this struct keeps alive for
        // as long as the queue. No reference to the buffer exists: it is only copied to and from by volatile access,
        // and `in_flight` keeps that away until the request has completed.
        unsafe { self.queue.read_raw(offset, at, len, slot) }?;
        self.in_flight[slot] = true;
        Ok(())
    }

    /// Queues a write of the first `len` bytes of the slot's buffer at `offset`.
    pub(super) fn write(&mut self, slot: usize, offset: u64, len: usize) -> io::Result<()> {
        let at = self.pointer(slot, len);
        // SAFETY: as for `read`; the device only reads from the buffer.
        unsafe { self.queue.write_raw(offset, at.cast_const(), len, slot) }?;
        self.in_flight[slot] = true;
        Ok(())
    }

    /// Queues a flush, which occupies the slot.
    pub(super) fn flush(&mut self, slot: usize) -> io::Result<()> {
        self.claim(slot, 0);
        self.queue.flush(slot)?;
        self.in_flight[slot] = true;
        Ok(())
    }

    /// Tells the device of what was queued, if it wants to be told.
    pub(super) fn kick(&mut self) -> io::Result<()> {
        if self.queue.avail_notif_needed() { self.notifier.notify() } else { Ok(()) }
    }

    /// Appends what has completed: the slot, and 0 or a negative `errno`.
    pub(super) fn completed(&mut self, done: &mut Vec<(usize, i32)>) {
        for completion in self.queue.completions() {
            self.in_flight[completion.context] = false;
            done.push((completion.context, completion.ret));
        }
    }

    /// Waits until the device signals or the time is over.
    pub(super) fn wait(&self, at_most: Duration) -> io::Result<()> {
        let mut fds = [PollFd::new(self.completed.as_fd(), PollFlags::POLLIN)];
        match ppoll(&mut fds, Some(TimeSpec::from_duration(at_most)), None) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Ok(_) => self.completed.read().map(|_| ()),
            Err(e) => Err(e.into()),
        }
    }

    fn claim(&self, slot: usize, len: usize) {
        assert!(!self.in_flight[slot], "slot {slot} belongs to a request");
        assert!(len <= self.slot_bytes, "{len} bytes do not fit in a slot");
    }

    fn pointer(&self, slot: usize, len: usize) -> *mut u8 {
        self.claim(slot, len);
        // `claim` has indexed `in_flight`, so the slot lies in the mapping.
        self.buffers.as_ptr().wrapping_add(slot * self.slot_bytes)
    }
}

/// Memory that the device can see.
fn shared_memory(transport: &mut VirtioBlkTransport, len: usize) -> io::Result<MmapRegion<()>> {
    let file = File::from(memfd_create("blockctl-demo", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(len as u64)?;
    let fd = file.as_raw_fd();
    let mapping = FileOffset::new(file, 0);
    let region = MmapRegion::<()>::from_file(mapping.clone(), len).map_err(io::Error::other)?;
    transport.map_mem_region(region.as_ptr() as usize, len, fd, 0)?;
    Ok(region)
}
