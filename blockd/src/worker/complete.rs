//! From completions to the used ring.

use std::sync::atomic::Ordering;
use std::time::Instant;

use mirror::{Event, Side};

use super::buffer::AlignedBuffer;
use super::execute::{STATUS_IOERR, STATUS_OK};
use super::slot::{Op, PartOp, Slot, Stage};
use super::{Worker, iov};
use crate::disk::route::Route;
use crate::mover::shared::write_id;

/// How often a part is tried again after EAGAIN or EINTR, or after a short transfer.
const RETRIES_MAX: u8 = 100;

impl Worker {
    /// A submission has come back.
    pub(super) fn part_ended(&mut self, index: u32, part: usize, result: i32) {
        let slot =
            self.slots[index as usize].as_mut().expect("a request with parts under way is in its slot");
        if slot.retry(part, result) {
            return self.submit_part(index, part);
        }
        slot.pending -= 1;
        if slot.pending == 0 {
            let slot = self.slots[index as usize].take().expect("still there");
            self.parts_done(index, slot);
        }
    }

    /// All parts of a request (or of its sync) have ended.
    pub(super) fn parts_done(&mut self, index: u32, mut slot: Box<Slot>) {
        slot.clear_parts();
        let Some(route) = slot.route.clone() else { return self.complete(index, slot, STATUS_IOERR) };
        if slot.stage == Stage::Running && slot.op.is_change() {
            slot.say_written(&route);
        }
        if slot.stage == Stage::Syncing {
            self.note_syncs(&mut slot, &route);
            if !slot.parts.is_empty() {
                // Metadata that had to wait for the payload was written just now, and needs a sync of its own.
                return self.run_parts(index, slot);
            }
            if let (Op::Flush, Some(error), Route::Mirrored { moving, .. }) =
                (slot.op, slot.target_error.clone(), &*route)
            {
                slot.stage = Stage::Ended;
                self.slots[index as usize] = Some(slot);
                let event = Event::FlushFailed { id: write_id(self.index, index), error };
                return moving.apply_from(Some(self.index), event, &mut self.words);
            }
        } else if slot.op.is_change() && slot.source_error.is_none() && self.is_write_through(&slot) {
            let both = slot.to_target && slot.target_error.is_none();
            self.sync_write(&mut slot, &route, both);
            return self.run_parts(index, slot);
        }
        match (&*route, slot.op.is_change()) {
            (Route::Tracked(_, moving), true) => {
                // Well or not: a failed write may have changed something. Before the guest is told.
                moving.mark(slot.span.offset, slot.span.len);
                let status = slot.source_status();
                self.complete(index, slot, status);
            }
            (Route::Mirrored { moving, .. }, true) => {
                let target = slot.to_target.then(|| match &slot.target_error {
                    None => Ok(()),
                    Some(e) => Err(e.clone()),
                });
                let source_ok = slot.source_error.is_none();
                slot.stage = Stage::Ended;
                self.slots[index as usize] = Some(slot);
                let event = Event::WriteEnd { id: write_id(self.index, index), source_ok, target };
                moving.apply_from(Some(self.index), event, &mut self.words);
            }
            _ => {
                let status = slot.source_status();
                self.complete(index, slot, status);
            }
        }
    }

    fn is_write_through(&self, slot: &Slot) -> bool {
        slot.stage == Stage::Running
            && self.queues[slot.queue].as_ref().is_some_and(super::queue::Queue::is_write_through)
    }

    fn sync_write(&mut self, slot: &mut Slot, route: &Route, both: bool) {
        slot.stage = Stage::Syncing;
        self.add_syncs(slot, route, both);
    }

    /// Tells the images what is durable now.
    fn note_syncs(&mut self, slot: &mut Slot, route: &Route) {
        for (side, image) in [(Side::Source, Some(route.source())), (Side::Target, route.flushed_too())] {
            let token = slot.tokens[side as usize].take();
            if let (Side::Target, Some(_), Route::Mirrored { moving, .. }) = (side, token, route) {
                let ended = slot.target_error.take().map_or(Ok(()), Err);
                if let (Err(e), Some(image)) = (&ended, image) {
                    // Its metadata may be lost as well as content, and copying everything again brings only that back.
                    image.image().sync_failed(e);
                }
                slot.target_error = moving.target_flushed(ended).err();
            }
            // Both images of a snapshot that settles are the disk.
            let is_disk = side == Side::Source || matches!(route, Route::Settling { .. });
            if let (true, Some(_), Some(image)) = (is_disk, token, image) {
                let ended = slot.error_of(side).take().map_or(Ok(()), Err);
                *slot.error_of(side) = image.synced(ended).err();
                if let Some(e) = slot.error_of(side) {
                    self.disk.set_failed(&format!("{} cannot be made durable: {e}", image.path().display()));
                }
            }
            let (Some(token), Some(image), None) = (token, image, slot.error_of(side)) else { continue };
            match image.image().sync_done(token) {
                Ok(None) => {}
                Ok(Some(next)) => slot.add_sync(side, image, next),
                Err(e) => {
                    tracing::warn!(disk = self.disk.id, image = %image.path().display(), "flush: {e}");
                    slot.fail(side, || e.to_string());
                }
            }
            if image.image().wants_maintenance() {
                self.disk.wake_maintenance();
            }
        }
        if matches!(route, Route::Settling { .. })
            && let Some(e) = slot.target_error.take()
        {
            slot.fail(Side::Source, || e);
        }
    }

    /// Tells the guest.
    pub(super) fn complete(&mut self, index: u32, mut slot: Box<Slot>, status: u8) {
        if let Some(bounce) = slot.bounce.take() {
            if slot.op == Op::Read && status == STATUS_OK {
                iov::scatter(&bounce, &slot.iov);
            }
            self.pool.put(bounce);
        }
        self.clock = Instant::now();
        self.count(&slot, status);
        let queue = self.queues[slot.queue].as_mut().expect("a queue stays until it has drained");
        if let Some((ptr, addr)) = slot.status {
            // SAFETY: one byte of guest memory that the slot's snapshot keeps mapped.
            unsafe { ptr.write_volatile(status) };
            if let Some(log) = &queue.log {
                log.mark(addr, 1);
            }
        }
        if let Some(log) = &queue.log {
            // A failed read may have written a part.
            for &(addr, len) in &slot.log_ranges {
                log.mark(addr, len);
            }
        }
        if let Some(inflight) = &mut queue.inflight {
            inflight.completing(slot.head);
        }
        let (used_idx, written) = queue.ring.push_used(slot.head, slot.written);
        if let Some(log) = &queue.log {
            written.iter().for_each(|&(addr, len)| log.mark(addr, len));
        }
        if let Some(inflight) = &mut queue.inflight {
            inflight.completed(slot.head, used_idx);
        }
        queue.in_flight -= 1;
        queue.wants_call = true;
        if let Some(entry) = slot.entry.take() {
            self.shard.leave(entry);
        }
        self.free_slot(index, slot);
    }

    fn count(&self, slot: &Slot, status: u8) {
        let c = &self.counters;
        let add = |cell: &std::sync::atomic::AtomicU64, n: u64| {
            cell.store(cell.load(Ordering::Relaxed) + n, Ordering::Relaxed);
        };
        if status != STATUS_OK {
            return add(&c.errors, 1);
        }
        let ns = self.clock.saturating_duration_since(slot.started).as_nanos() as u64;
        match slot.op {
            Op::Read => {
                add(&c.reads, 1);
                add(&c.read_bytes, slot.span.len);
                c.read_latency.record(ns);
            }
            Op::Write | Op::WriteZeroes { .. } => {
                add(&c.writes, 1);
                add(&c.written_bytes, if slot.op == Op::Write { slot.span.len } else { 0 });
                c.write_latency.record(ns);
            }
            Op::Flush => add(&c.flushes, 1),
            Op::Discard => add(&c.discards, 1),
            Op::GetId => return,
        }
        if ns > c.longest.load(Ordering::Relaxed) {
            c.longest.fetch_max(ns, Ordering::Relaxed);
        }
    }
}

impl Slot {
    /// Tells the images that the payload of a change is in the file, for each side that got all of it.
    fn say_written(&mut self, route: &Route) {
        let target = route.target().filter(|_| self.to_target);
        for (side, image) in [(Side::Source, Some(route.source())), (Side::Target, target)] {
            let (Some(image), None) = (image, self.error_of(side)) else { continue };
            if let Err(e) = image.image().wrote(self.span) {
                self.fail(side, || format!("{}: {e}", image.path().display()));
            }
        }
    }

    fn source_status(&self) -> u8 {
        if self.source_error.is_some() { STATUS_IOERR } else { STATUS_OK }
    }

    /// Looks at a part's result. Returns whether it has to be submitted again, as it is now.
    pub(super) fn retry(&mut self, part: usize, result: i32) -> bool {
        let p = &mut self.parts[part];
        let (side, op, offset) = (p.side, p.op, p.offset);
        if result < 0 {
            if matches!(-result, libc::EAGAIN | libc::EINTR) && p.retries < RETRIES_MAX {
                p.retries += 1;
                return true;
            }
            let unsupported = matches!(-result, libc::EOPNOTSUPP | libc::ENOSYS);
            if unsupported && op == (PartOp::Zero { keep: true }) {
                // A file system that cannot zero in place can still punch, and that reads as zeroes just the same.
                p.op = PartOp::Zero { keep: false };
                return true;
            }
            let error = if unsupported && matches!(op, PartOp::Zero { .. }) {
                match zero_by_writing(p.fd, p.offset, p.len) {
                    Ok(()) => return false,
                    Err(e) => e,
                }
            } else {
                std::io::Error::from_raw_os_error(-result)
            };
            self.fail(side, || format!("{op:?} at byte {offset} of the file: {error}"));
            return false;
        }
        if !matches!(op, PartOp::Read | PartOp::Write) || result as u64 == p.len {
            return false;
        }
        if result == 0 || p.retries >= RETRIES_MAX {
            self.fail(side, || {
                format!("{op:?} at byte {offset} of the file: it ends there, though the image does not")
            });
            return false;
        }
        // A short transfer: the rest follows.
        let done = result as u64;
        p.retries += 1;
        p.offset += done;
        p.len -= done;
        let mut skip = result as usize;
        let (mut first, end) = p.iov;
        while skip > 0 {
            let v = &mut self.part_iov[first];
            let n = skip.min(v.iov_len);
            // SAFETY: `n` is within the buffer.
            v.iov_base = unsafe { v.iov_base.add(n) };
            v.iov_len -= n;
            skip -= n;
            if v.iov_len == 0 {
                first += 1;
            }
        }
        self.parts[part].iov = (first, end);
        true
    }
}

/// A file system that can neither zero nor punch: zeroes are written, by the worker itself, since it is rare.
fn zero_by_writing(fd: std::os::fd::RawFd, mut offset: u64, mut len: u64) -> std::io::Result<()> {
    let zeroes = AlignedBuffer::new(256 << 10);
    while len > 0 {
        let n = len.min(zeroes.len() as u64);
        // SAFETY: the buffer holds at least `n` bytes; the descriptor is the image's, open while the request runs.
        let written = unsafe { libc::pwrite(fd, zeroes.as_ptr().cast(), n as usize, offset as i64) };
        match written {
            1.. => (offset, len) = (offset + written as u64, len - written as u64),
            0 => return Err(std::io::ErrorKind::WriteZero.into()),
            _ => {
                let e = std::io::Error::last_os_error();
                if e.kind() != std::io::ErrorKind::Interrupted {
                    return Err(e);
                }
            }
        }
    }
    Ok(())
}
