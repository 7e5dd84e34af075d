//! The two queues of a network card: frames from the host into the guest's buffers, and from those to the host.

use std::io::ErrorKind;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::super::mmio::{QUEUE_SIZE_MAX, ReadyQueue};
use super::frames::{Addresses, Mac};
use super::tap::{FRAME_MAX, HEADER, Tap};
use crate::memory::{GuestRam, Memory};

/// Most frames of a queue before the other has its turn, and whoever waits for the lock.
const BATCH: usize = 64;
/// Longest piece of a chain that is looked at; a frame needs a few.
const PIECES_MAX: usize = 64;

/// Where a queue goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Position {
    pub(super) index: u16,
    pub(super) next_avail: u16,
    pub(super) next_used: u16,
}

/// One queue.
pub(super) struct Ring {
    queue: Queue,
    index: u16,
    /// The guest broke the rules; nothing is done until it resets the device.
    broken: bool,
}

/// What came of serving a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Served {
    /// The guest wants to be interrupted.
    pub(super) call: bool,
    /// There may be more to do at once.
    pub(super) more: bool,
    /// Nothing can be done before the guest makes buffers available.
    pub(super) starved: bool,
}

impl Ring {
    pub(super) fn new(ready: &ReadyQueue, event_idx: bool, at: Option<Position>) -> Result<Self> {
        let mut queue = Queue::new(QUEUE_SIZE_MAX).context("make a queue")?;
        queue.set_size(ready.size);
        let address = GuestAddress;
        queue.try_set_desc_table_address(address(ready.desc)).context("the descriptor table")?;
        queue.try_set_avail_ring_address(address(ready.avail)).context("the available ring")?;
        queue.try_set_used_ring_address(address(ready.used)).context("the used ring")?;
        queue.set_event_idx(event_idx);
        if let Some(at) = at {
            ensure!(at.index == ready.index, "the position of queue {} for queue {}", at.index, ready.index);
            queue.set_next_avail(at.next_avail);
            queue.set_next_used(at.next_used);
        }
        queue.set_ready(true);
        Ok(Self { queue, index: ready.index, broken: false })
    }

    pub(super) fn position(&self) -> Position {
        let (next_avail, next_used) = (self.queue.next_avail(), self.queue.next_used());
        Position { index: self.index, next_avail, next_used }
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    fn has_available(&self, memory: &Memory) -> Result<bool> {
        Ok(self.queue.avail_idx(memory, Ordering::Acquire)?.0 != self.queue.next_avail())
    }

    /// Takes the next chain: its head and its pieces, those that the device writes apart from those that it reads.
    fn take(&mut self, memory: &Memory) -> Result<Option<Chain>> {
        let Some(chain) = self.queue.iter(memory)?.next() else { return Ok(None) };
        let mut taken = Chain { head: chain.head_index(), read: Vec::new(), write: Vec::new() };
        for piece in chain.take(PIECES_MAX) {
            let list = if piece.is_write_only() { &mut taken.write } else { &mut taken.read };
            list.push((piece.addr(), piece.len() as usize));
        }
        Ok(Some(taken))
    }

    fn give_back(&mut self, memory: &Memory, head: u16, written: usize) -> Result<()> {
        self.queue.add_used(memory, head, written as u32).context("complete a chain")
    }

    /// Does `what`; a guest that breaks the rules is served no more.
    fn guarded(&mut self, what: impl FnOnce(&mut Self) -> Result<Served>) -> Served {
        if self.broken {
            return Served { starved: true, ..Served::default() };
        }
        what(self).unwrap_or_else(|e| {
            tracing::warn!(
                "queue {} of the network card is broken and not served any more: {e:#}",
                self.index
            );
            self.broken = true;
            Served { starved: true, ..Served::default() }
        })
    }

    /// Frames from the host into the guest.
    pub(super) fn receive(&mut self, ram: &GuestRam, tap: &Tap, buffer: &mut [u8]) -> Served {
        self.guarded(|ring| ring.try_receive(ram.memory(), tap, buffer))
    }

    fn try_receive(&mut self, memory: &Memory, tap: &Tap, buffer: &mut [u8]) -> Result<Served> {
        let mut served = Served::default();
        let mut frames = 0;
        while frames < BATCH {
            if !self.has_available(memory)? {
                // Between the look and the wish for a kick buffers may have come.
                if self.queue.enable_notification(memory)? {
                    continue;
                }
                served.starved = true;
                break;
            }
            let len = match tap.receive(buffer) {
                Ok(len) if len > HEADER => len,
                Ok(_) => continue,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => {
                    // A tap that is down or gone; the next frame is waited for.
                    tracing::debug!("cannot read from the tap: {e}");
                    break;
                }
            };
            // No offload was negotiated; a frame is in one buffer (virtio 1.2, 5.1.6).
            buffer[..HEADER].fill(0);
            buffer[10] = 1;
            let Some(chain) = self.take(memory)? else { break };
            let room: usize = chain.write.iter().map(|(_, len)| *len).sum();
            // A frame that is too long for its buffer is lost, as on any wire; the buffer is not.
            let written = if room < len { 0 } else { chain.scatter(memory, &buffer[..len])? };
            if written == 0 {
                self.queue.go_to_previous_position();
            } else {
                self.give_back(memory, chain.head, written)?;
                served.call = true;
            }
            frames += 1;
        }
        served.more = frames == BATCH;
        served.call = served.call && self.queue.needs_notification(memory)?;
        Ok(served)
    }

    /// Frames from the guest to the host.
    pub(super) fn send(
        &mut self,
        ram: &GuestRam,
        tap: &Tap,
        buffer: &mut [u8],
        mac: Mac,
        addresses: &mut Addresses,
    ) -> Served {
        self.guarded(|ring| ring.try_send(ram.memory(), tap, buffer, mac, addresses))
    }

    fn try_send(
        &mut self,
        memory: &Memory,
        tap: &Tap,
        buffer: &mut [u8],
        mac: Mac,
        addresses: &mut Addresses,
    ) -> Result<Served> {
        let mut served = Served::default();
        let mut frames = 0;
        while frames < BATCH {
            let Some(chain) = self.take(memory)? else {
                if self.queue.enable_notification(memory)? {
                    continue;
                }
                break;
            };
            let len = chain.gather(memory, buffer)?;
            if len > HEADER {
                // No offload was negotiated: whatever the guest has put there means nothing.
                buffer[..HEADER].fill(0);
                addresses.look_at(mac, &buffer[HEADER..len]);
                if let Err(e) = tap.send(&buffer[..len]) {
                    tracing::debug!("a frame of the guest is lost: {e}");
                }
            }
            self.give_back(memory, chain.head, 0)?;
            served.call = true;
            frames += 1;
        }
        served.more = frames == BATCH;
        served.call = served.call && self.queue.needs_notification(memory)?;
        Ok(served)
    }
}

struct Chain {
    head: u16,
    read: Vec<(GuestAddress, usize)>,
    write: Vec<(GuestAddress, usize)>,
}

impl Chain {
    /// Reads what the guest sends, as much as a frame may have.
    fn gather(&self, memory: &Memory, buffer: &mut [u8]) -> Result<usize> {
        let mut at = 0;
        for (address, len) in &self.read {
            let end = (at + len).min(FRAME_MAX);
            memory.read_slice(&mut buffer[at..end], *address).context("read a frame")?;
            at = end;
        }
        Ok(at)
    }

    fn scatter(&self, memory: &Memory, frame: &[u8]) -> Result<usize> {
        let mut at = 0;
        for (address, len) in &self.write {
            let end = (at + len).min(frame.len());
            memory.write_slice(&frame[at..end], *address).context("write a frame")?;
            at = end;
        }
        Ok(at)
    }
}
