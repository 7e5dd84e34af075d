//! A queue that runs, and taking requests from it.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::command::{QueueKey, QueueSetup, QueueStart};
use super::local::Local;
use super::{BATCH, BYTES_HERE_MAX, SUBMIT_EVERY, Worker};
use crate::vhost::inflight::InflightQueue;
use crate::vhost::log::DirtyLog;
use crate::vhost::memory::GuestMemory;
use crate::vhost::ring::{Ring, RingError};

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) key: QueueKey,
    pub(super) ring: Ring,
    pub(super) memory: Local<GuestMemory>,
    pub(super) log: Option<Arc<DirtyLog>>,
    pub(super) inflight: Option<InflightQueue>,
    pub(super) kick: Option<usize>,
    call: Option<File>,
    err: Option<File>,
    write_through: Arc<AtomicBool>,
    /// Taken and not completed.
    pub(super) in_flight: usize,
    /// Takes nothing more.
    pub(super) stopping: bool,
    /// The guest broke the ring's rules: takes nothing more either.
    broken: bool,
    /// Something was completed since the driver was last told.
    pub(super) wants_call: bool,
    /// Heads that an earlier process left open, newest first.
    open: Vec<u16>,
}

impl Queue {
    pub(super) fn has_work(&self) -> bool {
        !self.broken && (!self.open.is_empty() || !self.stopping && self.ring.has_available())
    }

    /// Whether everything taken has been completed. What an earlier process took counts as taken: the available index
    /// that a stop answers lies behind it.
    pub(super) fn is_drained(&self) -> bool {
        self.in_flight == 0 && (self.open.is_empty() || self.broken)
    }

    pub(super) fn enable_kicks(&mut self) -> bool {
        if self.stopping || self.broken {
            return false;
        }
        let any = self.ring.enable_kicks();
        self.log_event();
        any
    }

    pub(super) fn disable_kicks(&mut self) {
        if !self.stopping && !self.broken {
            self.ring.disable_kicks();
            self.log_event();
        }
    }

    fn log_event(&self) {
        if let Some(log) = &self.log {
            let (addr, len) = self.ring.event_written();
            log.mark(addr, len);
        }
    }

    pub(super) fn is_write_through(&self) -> bool {
        self.write_through.load(Ordering::Relaxed)
    }

    /// Tells the driver, if it wants to be told.
    pub(super) fn call(&mut self) {
        self.wants_call = false;
        if self.ring.needs_call() {
            self.signal();
        }
    }

    fn signal(&self) {
        if let Some(call) = &self.call {
            ring_bell(call);
        }
    }

    /// Stops taking requests for good, and tells the front end.
    fn break_ring(&mut self, disk: &str, error: RingError) {
        self.broken = true;
        tracing::warn!(disk, queue = self.key.index, "the guest's ring is broken and was stopped: {error}");
        if let Some(err) = &self.err {
            ring_bell(err);
        }
    }

    fn next_head(&mut self) -> Result<Option<u16>, RingError> {
        if let Some(head) = self.open.pop() {
            return Ok(Some(head));
        }
        if self.stopping {
            return Ok(None);
        }
        let head = self.ring.pop()?;
        self.ring.fetch_ahead(&self.memory);
        if let (Some(head), Some(inflight)) = (head, &mut self.inflight) {
            inflight.take(head);
        }
        Ok(head)
    }
}

/// Adds one to a front end's eventfd. One whose counter is full has told its reader already; writing to it would block,
/// unless the front end has made it non-blocking.
fn ring_bell(fd: &File) {
    let mut can = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut can, PollTimeout::ZERO).is_ok_and(|n| n > 0) {
        let _ = (&mut &*fd).write(&1u64.to_ne_bytes());
    }
}

impl Worker {
    pub(super) fn queue_mut(&mut self, key: QueueKey) -> Option<&mut Queue> {
        self.queues.iter_mut().flatten().find(|q| q.key == key)
    }

    pub(super) fn start_queue(&mut self, key: QueueKey, start: QueueStart) {
        let at = match self.queues.iter().position(Option::is_none) {
            Some(at) => at,
            None => {
                self.queues.push(None);
                self.queues.len() - 1
            }
        };
        let QueueStart { ring, setup, inflight, mut open, write_through } = start;
        open.reverse();
        let kick = setup.kick.map(|file| self.add_kick(file, at));
        let queue = Queue {
            key,
            ring,
            memory: Local::new(setup.memory),
            log: setup.log,
            inflight,
            kick,
            call: setup.call,
            err: setup.err,
            write_through,
            in_flight: 0,
            stopping: self.exiting,
            broken: false,
            wants_call: false,
            open,
        };
        // A front end that has just come back may wait for a completion that was published but not signalled.
        queue.signal();
        queue.ring.disable_kicks();
        queue.log_event();
        self.queues[at] = Some(queue);
    }

    pub(super) fn update_queue(&mut self, key: QueueKey, setup: QueueSetup) -> Result<(), String> {
        let Some(at) = self.queues.iter().position(|q| q.as_ref().is_some_and(|q| q.key == key)) else {
            return Ok(());
        };
        let kick = setup.kick.map(|file| self.add_kick(file, at));
        let Some(queue) = self.queues[at].as_mut() else { return Ok(()) };
        let old_kick = std::mem::replace(&mut queue.kick, kick);
        let remapped = queue.ring.remap(&setup.memory, setup.addresses);
        queue.memory = Local::new(setup.memory);
        queue.log = setup.log;
        queue.call = setup.call;
        queue.err = setup.err;
        if let Err(e) = remapped {
            queue.break_ring(&self.disk.id, e);
        }
        // The driver may have kicked or expects a call on the old descriptors: look and tell once.
        queue.signal();
        queue.log_event();
        if let Some(old) = old_kick {
            self.drop_kick(old);
        }
        remapped.map_err(|e| e.to_string())
    }

    pub(super) fn poll_queues(&mut self) -> bool {
        let mut any = false;
        for at in 0..self.queues.len() {
            self.bytes_here = 0;
            for _ in 0..BATCH {
                if !self.has_room() {
                    return any;
                }
                if self.bytes_here >= BYTES_HERE_MAX {
                    break;
                }
                let Some(queue) = self.queues[at].as_mut() else { break };
                if queue.broken {
                    break;
                }
                match queue.next_head() {
                    Ok(Some(head)) => {
                        queue.in_flight += 1;
                        if !std::mem::replace(&mut any, true) {
                            self.clock = Instant::now();
                        }
                        self.take_request(at, head);
                        if self.ring.submission().len() >= SUBMIT_EVERY {
                            self.submit();
                        }
                    }
                    Ok(None) => break,
                    Err(e) => {
                        queue.break_ring(&self.disk.id, e);
                        break;
                    }
                }
            }
        }
        any
    }

    /// Takes the chain apart. A chain that breaks the ring's rules stops the ring.
    pub(super) fn read_chain(&mut self, at: usize, head: u16) -> Result<Local<GuestMemory>, ()> {
        let queue = self.queues[at].as_mut().ok_or(())?;
        self.buffers.clear();
        let memory = queue.memory.clone();
        match queue.ring.chain(&memory, head, &mut self.buffers) {
            Ok(()) => Ok(memory),
            Err(e) => {
                queue.break_ring(&self.disk.id, e);
                Err(())
            }
        }
    }

    pub(super) fn call_drivers(&mut self) {
        for queue in self.queues.iter_mut().flatten() {
            if queue.wants_call {
                queue.call();
            }
        }
    }
}
