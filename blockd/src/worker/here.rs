//! I/O that the worker does itself: on files that are in memory.
//!
//! tmpfs has no reads and writes that promise not to block, so the ring would hand each of them to a thread of its own:
//! two switches of context for a copy of 4 KiB. It has no device to wait for either, so doing them at once, one
//! system call each, holds nobody up for longer than the copy takes.

use super::slot::{Part, PartOp, Slot};
use super::{Worker, iov};

/// The longest request that is done here, in bytes: copying it takes some tenths of a millisecond, in which the worker
/// looks after nothing else.
const LENGTH_MAX: u64 = 1 << 20;

impl Part {
    fn can_be_done_here(&self) -> bool {
        self.in_memory && !matches!(self.op, PartOp::Zero { .. })
    }
}

impl Slot {
    /// Whether everything that is to be done is in memory, and little enough.
    pub(super) fn can_be_done_here(&self) -> bool {
        self.parts.iter().all(Part::can_be_done_here)
            && self.parts.iter().map(|part| part.len).sum::<u64>() <= LENGTH_MAX
    }

    /// Does one part: what the ring would answer, a number of bytes or a negative error.
    fn transfer(&self, part: usize) -> i32 {
        let Part { op, fd, offset, iov: (first, end), .. } = self.parts[part];
        let buffers = &self.part_iov[first..end];
        let (base, count, at) = (buffers.as_ptr(), buffers.len() as i32, offset as i64);
        // SAFETY: the buffers are guest memory that the slot's snapshot keeps mapped, or the slot's own; the descriptor is
        // the image's, which the slot's route keeps open.
        let done = unsafe {
            match (op, buffers) {
                (PartOp::Read, [one]) => libc::pread(fd, one.iov_base, one.iov_len, at),
                (PartOp::Write, [one]) => libc::pwrite(fd, one.iov_base, one.iov_len, at),
                (PartOp::Read, _) => libc::preadv(fd, base, count, at),
                (PartOp::Write, _) => libc::pwritev(fd, base, count, at),
                (PartOp::Sync, _) => libc::fdatasync(fd) as isize,
                (PartOp::Zero { .. }, _) => unreachable!("left to the ring"),
            }
        };
        match i32::try_from(done) {
            Ok(done) if done >= 0 => done,
            _ => -std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

impl Worker {
    /// Does all parts, and goes on with the request.
    pub(super) fn do_parts_here(&mut self, index: u32, mut slot: Box<Slot>) {
        self.bytes_here += iov::total(&slot.part_iov);
        for part in 0..slot.parts.len() {
            while {
                let result = slot.transfer(part);
                slot.retry(part, result)
            } {}
        }
        self.parts_done(index, slot);
    }
}
