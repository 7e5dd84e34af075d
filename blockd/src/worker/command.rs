//! What sessions and the disk ask of a worker.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Sender;

use crate::vhost::inflight::InflightQueue;
use crate::vhost::log::DirtyLog;
use crate::vhost::memory::GuestMemory;
use crate::vhost::ring::{Ring, RingAddresses};

/// Names a queue: the session's number and the queue's index in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct QueueKey {
    /// Counts the connections of a disk.
    pub session: u64,
    /// The virtqueue.
    pub index: u16,
}

/// What a queue needs of its surroundings besides the ring; may change while it runs.
#[derive(Debug)]
pub struct QueueSetup {
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// Where the ring is in it.
    pub addresses: RingAddresses,
    /// The dirty log, while the front end wants one.
    pub log: Option<Arc<DirtyLog>>,
    /// Kicked by the driver; `None` for a front end that wants the ring polled.
    pub kick: Option<File>,
    /// Tells the driver that something was completed.
    pub call: Option<File>,
    /// Tells the front end that the ring is broken.
    pub err: Option<File>,
}

/// A queue that begins to run.
#[derive(Debug)]
pub struct QueueStart {
    /// The mapped ring.
    pub ring: Ring,
    /// Its surroundings.
    pub setup: QueueSetup,
    /// In-flight tracking, where the front end has it.
    pub inflight: Option<InflightQueue>,
    /// Heads that an earlier process took and did not complete, oldest first.
    pub open: Vec<u16>,
    /// Each write is to be durable before it is completed.
    pub write_through: Arc<AtomicBool>,
}

/// A request to a worker. Each is confirmed through its sender, which is dropped if the worker ends.
#[derive(Debug)]
pub enum Command {
    /// Begin to serve a queue.
    Start(QueueKey, Box<QueueStart>, Sender<()>),
    /// Change a running queue's surroundings; an error leaves the ring stopped and says why. A queue that does not run
    /// is fine.
    Update(QueueKey, Box<QueueSetup>, Sender<Result<(), String>>),
    /// Take nothing more from the queue, complete what was taken, and answer where taking would go on (`None` when the
    /// queue did not run).
    Stop(QueueKey, Sender<Option<u16>>),
    /// The disk has another route: what waited for one goes on.
    Look,
    /// Stop everything and end the thread.
    Exit,
}
