//! A request in flight.

use std::os::fd::RawFd;
use std::time::Instant;

use formats::{ByteSpan, SyncToken};
use libc::iovec;
use mirror::Side;

use super::buffer::AlignedBuffer;
use super::local::Local;
use crate::disk::route::Route;
use crate::gate::GateEntry;
use crate::vhost::memory::GuestMemory;

/// What the guest asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Read sectors.
    Read,
    /// Write sectors.
    Write,
    /// Make everything durable.
    Flush,
    /// Give space back; leaves zeroes behind.
    Discard,
    /// Write zeroes; `unmap` allows to give the space back.
    WriteZeroes {
        /// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP.
        unmap: bool,
    },
    /// Read the disk's serial.
    GetId,
}

impl Op {
    /// Whether it changes the disk's contents.
    pub fn is_change(self) -> bool {
        matches!(self, Self::Write | Self::Discard | Self::WriteZeroes { .. })
    }
}

/// What one submission does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartOp {
    /// Read into the buffers.
    Read,
    /// Write from the buffers.
    Write,
    /// Make the file durable.
    Sync,
    /// Make a range read as zeroes; keep its space where that is possible and asked for.
    Zero {
        /// Whether the space shall stay allocated.
        keep: bool,
    },
}

/// One submission to the ring.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// What it does.
    pub op: PartOp,
    /// Which image it is for.
    pub side: Side,
    /// The file.
    pub fd: RawFd,
    /// Whether that is in memory.
    pub in_memory: bool,
    /// Byte offset in the file.
    pub offset: u64,
    /// Bytes, without what is done already.
    pub len: u64,
    /// Its buffers: a range of the slot's `part_iov`.
    pub iov: (usize, usize),
    /// How often it was tried again.
    pub retries: u8,
}

/// Where a request is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Not in use.
    Free,
    /// Waits for a route, under which it begins.
    Held,
    /// Waits for the move's word that it may start.
    Waiting,
    /// Its parts are under way.
    Running,
    /// Its data is written, the syncs that make it durable are under way.
    Syncing,
    /// Waits for the move's word that the guest may be told.
    Ended,
}

/// A request in flight, with everything that it keeps alive. Reused, with its vectors, from request to request.
#[derive(Debug)]
pub struct Slot {
    /// Where it is on its way.
    pub stage: Stage,
    /// The queue, as the worker numbers them.
    pub queue: usize,
    /// The chain's head.
    pub head: u16,
    /// What the guest asked for.
    pub op: Op,
    /// Which bytes of the disk.
    pub span: ByteSpan,
    /// Where the status byte goes: host pointer and guest address.
    pub status: Option<(*mut u8, u64)>,
    /// Bytes of data, as they count for what is in flight.
    pub data_bytes: u64,
    /// Bytes that the device writes to the guest's buffers, status included.
    pub written: u32,
    /// Guest memory, kept mapped.
    pub memory: Option<Local<GuestMemory>>,
    /// The guest's data buffers.
    pub iov: Vec<iovec>,
    /// The guest's writable data buffers, for the dirty log: guest address and length.
    pub log_ranges: Vec<(u64, u64)>,
    /// Buffers of the parts, in parts' order.
    pub part_iov: Vec<iovec>,
    /// All submissions.
    pub parts: Vec<Part>,
    /// How many of them have not ended.
    pub pending: usize,
    /// The first error on the source.
    pub source_error: Option<String>,
    /// The first error on the target.
    pub target_error: Option<String>,
    /// Whether the target was written at all.
    pub to_target: bool,
    /// Stands in for the guest's buffers.
    pub bounce: Option<AlignedBuffer>,
    /// Tokens of the images whose sync is under way.
    pub tokens: [Option<SyncToken>; 2],
    /// The route that it was taken under.
    pub route: Option<Local<Route>>,
    /// Its entry in the gate.
    pub entry: Option<GateEntry>,
    /// When it was taken.
    pub started: Instant,
}

impl Default for Slot {
    fn default() -> Self {
        Self {
            stage: Stage::Free,
            queue: 0,
            head: 0,
            op: Op::Flush,
            span: ByteSpan::new(0, 0),
            status: None,
            data_bytes: 0,
            written: 0,
            memory: None,
            iov: Vec::new(),
            log_ranges: Vec::new(),
            part_iov: Vec::new(),
            parts: Vec::new(),
            pending: 0,
            source_error: None,
            target_error: None,
            to_target: false,
            bounce: None,
            tokens: [None; 2],
            route: None,
            entry: None,
            started: Instant::now(),
        }
    }
}

impl Slot {
    /// Empties the slot for the next request, keeping the memory of its vectors.
    pub fn reset(&mut self) {
        self.stage = Stage::Free;
        self.status = None;
        self.data_bytes = 0;
        self.written = 0;
        self.memory = None;
        self.iov.clear();
        self.log_ranges.clear();
        self.clear_parts();
        self.source_error = None;
        self.target_error = None;
        self.to_target = false;
        self.route = None;
        assert!(self.bounce.is_none() && self.entry.is_none(), "a slot was freed with what it holds");
    }

    /// Forgets parts that have all ended.
    pub fn clear_parts(&mut self) {
        assert_eq!(self.pending, 0, "parts were forgotten while under way");
        self.part_iov.clear();
        self.parts.clear();
    }

    /// Where the first error of a side is.
    pub fn error_of(&mut self, side: Side) -> &mut Option<String> {
        match side {
            Side::Source => &mut self.source_error,
            Side::Target => &mut self.target_error,
        }
    }

    /// Remembers the first error of a side.
    pub fn fail(&mut self, side: Side, error: impl FnOnce() -> String) {
        self.error_of(side).get_or_insert_with(error);
    }
}
