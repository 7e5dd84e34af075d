//! A file in memory that remembers what was done to it and what of that is durable.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use formats::Storage;

use crate::SimDisk;

/// One operation that changes the file, or a mark that the test left between them.
#[derive(Clone)]
pub enum TraceOp {
    /// Bytes were written.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Arc<[u8]>,
    },
    /// The length was set.
    SetLen(u64),
    /// A hole was punched.
    Punch {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Everything before became durable.
    Sync,
    /// See [`Mark`].
    Mark(Mark),
}

impl std::fmt::Debug for TraceOp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Write { offset, data } => write!(f, "write {offset:#x}+{:#x}", data.len()),
            Self::SetLen(len) => write!(f, "set_len {len:#x}"),
            Self::Punch { offset, len } => write!(f, "punch {offset:#x}+{len:#x}"),
            Self::Sync => write!(f, "sync"),
            Self::Mark(mark) => write!(f, "{mark:?}"),
        }
    }
}

/// What the user of the disk knows at a point of the trace. Operations of the user are numbered 1, 2, 3 and so on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// This operation may have reached the disk from here on.
    Begun(u64),
    /// This operation and all before it were acknowledged: they survive the death of the process.
    Acknowledged(u64),
    /// This operation and all before it were flushed: they survive a power cut.
    Flushed(u64),
}

/// Which operation is to fail.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// How many writes, set_lens, punches and syncs still succeed before it.
    pub after: u64,
    /// Whether all later ones fail too, until [`SimStorage::clear_fault`].
    pub lasting: bool,
    /// What they fail with.
    pub error: io::ErrorKind,
    /// Whether a failing write leaves the first half of its sectors behind.
    pub partial: bool,
}

struct Inner {
    /// Durable contents where the trace begins.
    base: SimDisk,
    durable: SimDisk,
    volatile: SimDisk,
    trace: Vec<TraceOp>,
    fault: Option<Fault>,
    limit: Option<u64>,
    reads: u64,
    read_bytes: u64,
}

/// A [`Storage`] in memory, sparse, with volatile and durable contents, a trace, and errors on demand.
pub struct SimStorage(Mutex<Inner>);

impl std::fmt::Debug for SimStorage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let inner = self.lock();
        write!(f, "SimStorage({:?}, {} operations)", inner.volatile, inner.trace.len())
    }
}

impl SimStorage {
    /// An empty file.
    pub fn new() -> Arc<Self> {
        Self::from_disk(SimDisk::new())
    }

    /// A file with these contents, all durable.
    pub fn from_disk(disk: SimDisk) -> Arc<Self> {
        let inner = Inner {
            base: disk.clone(),
            durable: disk.clone(),
            volatile: disk,
            trace: Vec::new(),
            fault: None,
            limit: None,
            reads: 0,
            read_bytes: 0,
        };
        Arc::new(Self(Mutex::new(inner)))
    }

    /// A file with these bytes, all durable.
    pub fn from_bytes(bytes: &[u8]) -> Arc<Self> {
        let mut disk = SimDisk::new();
        disk.write(0, bytes);
        Self::from_disk(disk)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// What readers see now: also what the death of the process leaves behind.
    pub fn contents(&self) -> SimDisk {
        self.lock().volatile.clone()
    }

    /// What a power cut leaves behind at the least (none of the unsynced changes).
    pub fn durable_contents(&self) -> SimDisk {
        self.lock().durable.clone()
    }

    /// The contents where the trace begins.
    pub fn base(&self) -> SimDisk {
        self.lock().base.clone()
    }

    /// Everything done since creation or [`Self::forget_trace`].
    pub fn trace(&self) -> Vec<TraceOp> {
        self.lock().trace.clone()
    }

    /// Number of entries of the trace.
    pub fn trace_len(&self) -> usize {
        self.lock().trace.len()
    }

    /// How many reads were done, and how many bytes they took.
    pub fn reads(&self) -> (u64, u64) {
        let inner = self.lock();
        (inner.reads, inner.read_bytes)
    }

    /// Number of syncs in the trace.
    pub fn syncs(&self) -> usize {
        self.lock().trace.iter().filter(|op| matches!(op, TraceOp::Sync)).count()
    }

    /// Makes everything durable and begins a new trace: the state from which a test starts.
    pub fn forget_trace(&self) {
        let mut inner = self.lock();
        inner.durable = inner.volatile.clone();
        inner.base = inner.volatile.clone();
        inner.trace.clear();
    }

    /// Leaves a mark in the trace.
    pub fn mark(&self, mark: Mark) {
        self.lock().trace.push(TraceOp::Mark(mark));
    }

    /// Makes an operation fail.
    pub fn inject(&self, fault: Fault) {
        self.lock().fault = Some(fault);
    }

    /// Takes the fault away.
    pub fn clear_fault(&self) {
        self.lock().fault = None;
    }

    /// From now on no space is left beyond this length of the file (`None`: there is).
    pub fn limit_len(&self, limit: Option<u64>) {
        self.lock().limit = limit;
    }
}

impl Inner {
    /// Counts down to the fault; the error if it is this operation's turn.
    fn turn(&mut self) -> Option<Fault> {
        let fault = self.fault.as_mut()?;
        if fault.after > 0 {
            fault.after -= 1;
            return None;
        }
        let now = *fault;
        if !now.lasting {
            self.fault = None;
        }
        Some(now)
    }

    fn within_limit(&self, end: u64) -> io::Result<()> {
        match self.limit {
            Some(limit) if end > limit => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.volatile.write(offset, data);
        self.trace.push(TraceOp::Write { offset, data: data.into() });
    }
}

impl Storage for SimStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut inner = self.lock();
        inner.reads += 1;
        inner.read_bytes += buf.len() as u64;
        match offset.checked_add(buf.len() as u64) {
            Some(end) if end <= inner.volatile.len() => {}
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        inner.volatile.read(offset, buf);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut inner = self.lock();
        let end = offset.checked_add(buf.len() as u64).ok_or(io::ErrorKind::FileTooLarge)?;
        if let Some(fault) = inner.turn() {
            let half = (buf.len() / 2) & !(crate::SECTOR as usize - 1);
            if fault.partial && half > 0 {
                inner.write(offset, &buf[..half]);
            }
            return Err(fault.error.into());
        }
        inner.within_limit(end)?;
        if !buf.is_empty() {
            inner.write(offset, buf);
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().volatile.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut inner = self.lock();
        if let Some(fault) = inner.turn() {
            return Err(fault.error.into());
        }
        inner.within_limit(len)?;
        inner.volatile.set_len(len);
        inner.trace.push(TraceOp::SetLen(len));
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut inner = self.lock();
        if let Some(fault) = inner.turn() {
            return Err(fault.error.into());
        }
        let end = offset.saturating_add(len).min(inner.volatile.len());
        if end > offset {
            inner.volatile.zero(offset, end - offset);
            inner.trace.push(TraceOp::Punch { offset, len: end - offset });
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut inner = self.lock();
        if let Some(fault) = inner.turn() {
            return Err(fault.error.into());
        }
        inner.durable = inner.volatile.clone();
        inner.trace.push(TraceOp::Sync);
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        Ok(self.lock().volatile.next_data(offset))
    }

    fn file(&self) -> Option<&File> {
        None
    }
}
