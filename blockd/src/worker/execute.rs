//! From a request to submissions.

use std::sync::Arc;

use formats::{ImageError, SyncToken, ZeroMode};
use io_uring::{opcode, types};
use libc::iovec;
use mirror::{Event, Side, WriteKind, WriteTo};

use super::request::{self, Refusal};
use super::slot::{Op, Part, PartOp, Slot, Stage};
use super::{KIND_PART, Worker, iov};
use crate::disk::handle::{ImageHandle, PayloadFile};
use crate::disk::route::Route;
use crate::mover::shared::{MoveShared, WriteWord, parse_write_id, write_id};

/// VIRTIO_BLK_S_OK, _IOERR, _UNSUPP.
pub(super) const STATUS_OK: u8 = 0;
pub(super) const STATUS_IOERR: u8 = 1;
pub(super) const STATUS_UNSUPP: u8 = 2;

/// Most buffers of one read or write call.
const IOV_MAX: usize = 1024;

impl Worker {
    /// Takes a chain, carries out what can be done at once, and submits the rest.
    pub(super) fn take_request(&mut self, queue: usize, head: u16) {
        let started = self.clock;
        let Ok(memory) = self.read_chain(queue, head) else {
            if let Some(q) = self.queues[queue].as_mut() {
                q.in_flight -= 1;
            }
            return;
        };
        let (index, mut slot) = self.take_slot();
        (slot.queue, slot.head, slot.started) = (queue, head, started);
        let parsed = request::parse(&memory, &self.buffers, &self.disk.limits(), &mut slot);
        slot.memory = Some(memory);
        slot.data_bytes = iov::total(&slot.iov);
        self.bytes_in_flight += slot.data_bytes;
        match parsed {
            Ok(()) => self.execute(index, slot),
            Err(refusal) => {
                let status = match refusal {
                    Refusal::Unsupported => STATUS_UNSUPP,
                    Refusal::IoError(why) => {
                        tracing::debug!(disk = self.disk.id, "request refused: {why}");
                        STATUS_IOERR
                    }
                    Refusal::NoStatus => STATUS_IOERR,
                };
                slot.written = slot.written.min(1);
                slot.log_ranges.clear();
                self.complete(index, slot, status);
            }
        }
    }

    pub(super) fn execute(&mut self, index: u32, mut slot: Box<Slot>) {
        if slot.op == Op::GetId {
            let serial = self.disk.serial();
            request::copy_out(&serial, &slot.iov);
            return self.complete(index, slot, STATUS_OK);
        }
        // Before the route and any map is looked at.
        slot.entry = Some(self.shard.enter());
        let route = self.current_route();
        if matches!(*route, Route::Held(_)) {
            return self.hold(index, slot);
        }
        slot.route = Some(route.clone());
        if slot.op.is_change() && slot.span.len == 0 {
            return self.complete(index, slot, STATUS_OK);
        }
        match (&*route, slot.op) {
            (Route::Failed(_), _) => self.fail(index, slot),
            (_, Op::Read) => self.start_read(index, slot, &route),
            (_, Op::Flush) => self.start_flush(index, slot, &route),
            (Route::Mirrored { moving, .. }, _) => self.ask_to_write(index, slot, moving),
            _ => self.start_write(index, slot, WriteTo::SourceOnly),
        }
    }

    /// Puts a request aside until there is a route. It is not inside the gate meanwhile: whoever holds requests up waits
    /// for those that are.
    fn hold(&mut self, index: u32, mut slot: Box<Slot>) {
        if let Some(entry) = slot.entry.take() {
            self.shard.leave(entry);
        }
        slot.stage = Stage::Held;
        self.slots[index as usize] = Some(slot);
        self.held.push_back(index);
    }

    fn fail(&mut self, index: u32, mut slot: Box<Slot>) {
        slot.written = 1;
        self.complete(index, slot, STATUS_IOERR);
    }

    // --- reads and flushes -------------------------------------------------------------------------------------------

    fn start_read(&mut self, index: u32, mut slot: Box<Slot>, route: &Route) {
        let image = route.source();
        self.pieces.clear();
        if let Err(e) = image.image().map_read(slot.span, &mut self.pieces) {
            return self.refuse(index, slot, &e);
        }
        self.bounce_if_needed(&mut slot, image);
        let pieces = &self.pieces;
        slot.with_data(|slot, data| {
            let mut at = 0;
            for piece in pieces.iter() {
                match image.file_of(piece) {
                    None => iov::zero(data, at, piece.len),
                    Some(place) => slot.add_part(PartOp::Read, Side::Source, place, piece.len, data, at),
                }
                at += piece.len;
            }
        });
        self.run_parts(index, slot);
    }

    fn start_flush(&mut self, index: u32, mut slot: Box<Slot>, route: &Route) {
        if self.disk.limits().read_only {
            return self.complete(index, slot, STATUS_OK);
        }
        let both = match route {
            Route::Mirrored { moving, .. } => moving.flushes_both(),
            Route::Settling { .. } => true,
            _ => false,
        };
        self.add_syncs(&mut slot, route, both);
        self.run_parts(index, slot);
    }

    /// One sync of each image that has to be durable.
    pub(super) fn add_syncs(&mut self, slot: &mut Slot, route: &Route, both: bool) {
        slot.stage = Stage::Syncing;
        let sides =
            [(Side::Source, Some(route.source())), (Side::Target, route.flushed_too().filter(|_| both))];
        for (side, image) in sides {
            let Some(image) = image else { continue };
            let token = image.image().sync_begin();
            slot.add_sync(side, image, token);
        }
    }

    // --- changes -----------------------------------------------------------------------------------------------------

    /// Where writes are mirrored, the move decides when a write may go, and where.
    fn ask_to_write(&mut self, index: u32, mut slot: Box<Slot>, moving: &Arc<MoveShared>) {
        let kind = match slot.op {
            Op::Discard => WriteKind::Discard,
            Op::WriteZeroes { .. } => WriteKind::Zeroes,
            _ => WriteKind::Write,
        };
        let event = Event::WriteBegin {
            id: write_id(self.index, index),
            offset: slot.span.offset,
            len: slot.span.len,
            kind,
        };
        slot.stage = Stage::Waiting;
        self.slots[index as usize] = Some(slot);
        moving.apply_from(Some(self.index), event, &mut self.words);
    }

    /// Does what moves have said about own writes.
    pub(super) fn follow_words(&mut self) -> bool {
        let mut any = false;
        while let Some(word) = (!self.words.is_empty()).then(|| self.words.remove(0)) {
            any = true;
            match word {
                WriteWord::Start(id, to) => {
                    let (index, slot) = self.slot_of(id, Stage::Waiting);
                    self.start_write(index, slot, to);
                }
                WriteWord::Complete(id, side) => {
                    let (index, slot) = self.slot_of(id, Stage::Ended);
                    let failed = match side {
                        Side::Source => &slot.source_error,
                        Side::Target => &slot.target_error,
                    };
                    let status = if failed.is_some() { STATUS_IOERR } else { STATUS_OK };
                    self.complete(index, slot, status);
                }
            }
        }
        any
    }

    fn slot_of(&mut self, id: u64, stage: Stage) -> (u32, Box<Slot>) {
        let (_, index) = parse_write_id(id);
        let slot = self.slots[index as usize].take().expect("the move speaks of writes in flight only");
        assert_eq!(slot.stage, stage, "the move spoke of a write out of turn");
        (index, slot)
    }

    fn start_write(&mut self, index: u32, mut slot: Box<Slot>, to: WriteTo) {
        slot.stage = Stage::Running;
        let route = slot.route.clone().expect("set when the request was taken");
        let target = route.target().filter(|_| to == WriteTo::Both);
        slot.to_target = target.is_some();
        if slot.op == Op::Write {
            if target.is_some() {
                // The guest may change its buffer between the two writes; both disks must get the same bytes.
                self.bounce(&mut slot);
            } else {
                self.bounce_if_needed(&mut slot, route.source());
            }
            if let Some(buffer) = &mut slot.bounce {
                iov::gather(&slot.iov, buffer);
            }
        }
        for (side, image) in [(Side::Source, Some(route.source())), (Side::Target, target)] {
            let Some(image) = image else { continue };
            if let Err(e) = self.map_change(&mut slot, side, image) {
                tracing::warn!(disk = self.disk.id, "write at {}: {e}", slot.span.offset);
                slot.fail(side, || e.to_string());
            }
            if image.image().wants_maintenance() {
                self.disk.wake_maintenance();
            }
        }
        self.run_parts(index, slot);
    }

    fn map_change(&mut self, slot: &mut Slot, side: Side, image: &ImageHandle) -> Result<(), ImageError> {
        self.pieces.clear();
        let pieces = &mut self.pieces;
        let op = match slot.op {
            Op::Write => {
                image.image().map_write(slot.span, pieces)?;
                PartOp::Write
            }
            Op::WriteZeroes { unmap: false } => {
                image.image().map_zero(slot.span, ZeroMode::Keep, pieces)?;
                PartOp::Zero { keep: true }
            }
            _ => {
                image.image().map_zero(slot.span, ZeroMode::Unmap, pieces)?;
                PartOp::Zero { keep: false }
            }
        };
        slot.with_data(|slot, data| {
            let mut at = 0;
            for piece in pieces.iter() {
                if let Some(place) = image.file_of(piece) {
                    slot.add_part(op, side, place, piece.len, data, at);
                }
                at += piece.len;
            }
        });
        Ok(())
    }

    fn refuse(&mut self, index: u32, slot: Box<Slot>, error: &ImageError) {
        tracing::warn!(disk = self.disk.id, "request at {}: {error}", slot.span.offset);
        self.fail(index, slot);
    }

    // --- bouncing ----------------------------------------------------------------------------------------------------

    fn bounce_if_needed(&mut self, slot: &mut Slot, image: &ImageHandle) {
        if slot.iov.len() > IOV_MAX || !iov::is_aligned(&slot.iov, image.memory_align(), image.offset_align())
        {
            self.bounce(slot);
        }
    }

    fn bounce(&mut self, slot: &mut Slot) {
        if slot.bounce.is_none() {
            slot.bounce = Some(self.pool.take(iov::total(&slot.iov) as usize));
        }
    }

    // --- submissions -------------------------------------------------------------------------------------------------

    /// Submits all parts, or ends the request when there are none.
    pub(super) fn run_parts(&mut self, index: u32, mut slot: Box<Slot>) {
        let count = slot.parts.len();
        if count == 0 {
            return self.parts_done(index, slot);
        }
        if slot.stage != Stage::Syncing {
            slot.stage = Stage::Running;
        }
        if slot.can_be_done_here() {
            return self.do_parts_here(index, slot);
        }
        slot.pending = count;
        self.slots[index as usize] = Some(slot);
        for part in 0..count {
            self.submit_part(index, part);
        }
    }

    pub(super) fn submit_part(&mut self, index: u32, part: usize) {
        let slot =
            self.slots[index as usize].as_ref().expect("a request with parts under way is in its slot");
        let Part { op, fd, offset, len, iov: (first, end), .. } = slot.parts[part];
        let fd = types::Fd(fd);
        let buffers = &slot.part_iov[first..end];
        let entry = match op {
            PartOp::Read if buffers.len() == 1 => {
                opcode::Read::new(fd, buffers[0].iov_base.cast(), buffers[0].iov_len as u32)
                    .offset(offset)
                    .build()
            }
            PartOp::Write if buffers.len() == 1 => {
                opcode::Write::new(fd, buffers[0].iov_base.cast(), buffers[0].iov_len as u32)
                    .offset(offset)
                    .build()
            }
            PartOp::Read => {
                opcode::Readv::new(fd, buffers.as_ptr(), buffers.len() as u32).offset(offset).build()
            }
            PartOp::Write => {
                opcode::Writev::new(fd, buffers.as_ptr(), buffers.len() as u32).offset(offset).build()
            }
            PartOp::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            PartOp::Zero { keep } => {
                let how = if keep { libc::FALLOC_FL_ZERO_RANGE } else { libc::FALLOC_FL_PUNCH_HOLE };
                opcode::Fallocate::new(fd, len).offset(offset).mode(how | libc::FALLOC_FL_KEEP_SIZE).build()
            }
        };
        self.push(entry.user_data(KIND_PART | u64::from(index) << 32 | part as u64));
    }
}

impl Slot {
    /// Lends the buffers that I/O uses: the guest's, or the one that stands in for them.
    fn with_data(&mut self, use_them: impl FnOnce(&mut Self, &[iovec])) {
        match &self.bounce {
            None => {
                let iov = std::mem::take(&mut self.iov);
                use_them(self, &iov);
                self.iov = iov;
            }
            Some(b) => {
                let one = iovec { iov_base: b.as_ptr().cast(), iov_len: iov::total(&self.iov) as usize };
                use_them(self, &[one]);
            }
        }
    }

    /// Adds a sync of an image's own file, which the image has given `token` for.
    pub(super) fn add_sync(&mut self, side: Side, image: &ImageHandle, token: SyncToken) {
        self.tokens[side as usize] = Some(token);
        let (fd, in_memory) = (image.top().fd(), image.top().is_in_memory());
        let part = Part { op: PartOp::Sync, side, fd, in_memory, offset: 0, len: 0, iov: (0, 0), retries: 0 };
        self.parts.push(part);
    }

    /// Adds a part of `len` bytes whose data is what `data` holds from byte `at` on.
    fn add_part(
        &mut self,
        op: PartOp,
        side: Side,
        place: (&PayloadFile, u64),
        len: u64,
        data: &[iovec],
        at: u64,
    ) {
        let first = self.part_iov.len();
        if matches!(op, PartOp::Read | PartOp::Write) {
            iov::slice(data, at, len, &mut self.part_iov);
        }
        let (file, offset) = place;
        let iov = (first, self.part_iov.len());
        let (fd, in_memory) = (file.fd(), file.is_in_memory());
        self.parts.push(Part { op, side, fd, in_memory, offset, len, iov, retries: 0 });
    }
}
