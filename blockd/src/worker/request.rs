//! A virtio-blk request out of a chain (virtio 1.3, section 5.2.6), checked like the hostile input that it is.

use formats::ByteSpan;
use libc::iovec;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::slot::{Op, Slot};
use crate::vhost::memory::{GuestMemory, HostSlice};
use crate::vhost::ring::Buffer;

/// Sectors of the virtio-blk protocol have 512 bytes, whatever the disk's are.
pub const SECTOR: u64 = 512;
/// Length of the header: type, reserved, sector.
const HEADER: usize = 16;
/// Length of a discard or write-zeroes segment.
const SEGMENT: u64 = 16;
/// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, the one flag of a segment.
const FLAG_UNMAP: u32 = 1;
/// Most bytes of one read or write.
pub const REQUEST_BYTES_MAX: u64 = 64 << 20;
/// Length of the serial.
pub const SERIAL_BYTES: usize = 20;

/// What the disk allows.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Its sector size in bytes: 512 or 4096.
    pub sector: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Most bytes of one discard or write zeroes.
    pub zero_bytes_max: u64,
}

/// Why a request is answered without being carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// VIRTIO_BLK_S_IOERR.
    IoError(&'static str),
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
    /// There is no place for a status: the chain goes back with nothing written.
    NoStatus,
}

/// Takes the chain's buffers apart into the slot's: data buffers, status byte, operation and span.
///
/// The guest's layout of descriptors carries no meaning (virtio 1.3, section 2.7.4.2): the header is the first 16
/// readable bytes, the status is the last writable one.
pub fn parse(
    memory: &GuestMemory,
    buffers: &[Buffer],
    limits: &Limits,
    slot: &mut Slot,
) -> Result<(), Refusal> {
    slot.status = find_status(memory, buffers);
    if slot.status.is_none() {
        return Err(Refusal::NoStatus);
    }
    slot.written = 1;
    if buffers.windows(2).any(|w| w[0].writable && !w[1].writable) {
        return Err(Refusal::IoError("a readable descriptor follows a writable one"));
    }
    let header = read_header(memory, buffers)?;
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let sector = u64::from_le_bytes(header[8..].try_into().unwrap_or_default());
    match kind {
        VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => {
            slot.op = if kind == VIRTIO_BLK_T_IN { Op::Read } else { Op::Write };
            let len = data_buffers(memory, buffers, slot)?;
            slot.span = checked_span(sector, len, limits)?;
            if len == 0 || len > REQUEST_BYTES_MAX {
                return Err(Refusal::IoError("a length of 0, or of more than 64 MiB"));
            }
            refuse_write(slot.op, limits)
        }
        VIRTIO_BLK_T_FLUSH => {
            slot.op = Op::Flush;
            Ok(())
        }
        VIRTIO_BLK_T_GET_ID => {
            slot.op = Op::GetId;
            let len = data_buffers(memory, buffers, slot)?;
            if len < SERIAL_BYTES as u64 {
                Err(Refusal::IoError("less room than a serial needs"))
            } else {
                Ok(())
            }
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            slot.op = Op::Write;
            let len = data_buffers(memory, buffers, slot)?;
            if len != SEGMENT {
                return Err(Refusal::IoError("not exactly one segment"));
            }
            parse_segment(kind, limits, slot)?;
            refuse_write(slot.op, limits)
        }
        _ => Err(Refusal::Unsupported),
    }
}

fn refuse_write(op: Op, limits: &Limits) -> Result<(), Refusal> {
    if op.is_change() && limits.read_only { Err(Refusal::IoError("the disk is read-only")) } else { Ok(()) }
}

fn checked_span(sector: u64, len: u64, limits: &Limits) -> Result<ByteSpan, Refusal> {
    let span = sector.checked_mul(SECTOR).map(|offset| ByteSpan::new(offset, len));
    let span = span.filter(|s| s.end().is_some_and(|end| end <= limits.size));
    let span = span.ok_or(Refusal::IoError("beyond the end of the disk"))?;
    let grid = u64::from(limits.sector);
    if !span.offset.is_multiple_of(grid) || !span.len.is_multiple_of(grid) {
        return Err(Refusal::IoError("not on the disk's sectors"));
    }
    Ok(span)
}

fn parse_segment(kind: u32, limits: &Limits, slot: &mut Slot) -> Result<(), Refusal> {
    let mut bytes = [0u8; SEGMENT as usize];
    copy_in(&slot.iov, &mut bytes);
    slot.iov.clear();
    let sector = u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default());
    let count = u32::from_le_bytes(bytes[8..12].try_into().unwrap_or_default());
    let flags = u32::from_le_bytes(bytes[12..].try_into().unwrap_or_default());
    let len = u64::from(count) * SECTOR;
    // Virtio 1.3, section 5.2.6.2: unknown flags, and unmap in a discard, are answered with UNSUPP.
    let allowed = if kind == VIRTIO_BLK_T_WRITE_ZEROES { FLAG_UNMAP } else { 0 };
    if flags & !allowed != 0 {
        return Err(Refusal::Unsupported);
    }
    slot.op = if kind == VIRTIO_BLK_T_DISCARD { Op::Discard } else { Op::WriteZeroes { unmap: flags != 0 } };
    slot.span = checked_span(sector, len, limits)?;
    if len > limits.zero_bytes_max {
        return Err(Refusal::IoError("more sectors than one request may discard or zero"));
    }
    Ok(())
}

/// The last byte that the device may write.
fn find_status(memory: &GuestMemory, buffers: &[Buffer]) -> Option<(*mut u8, u64)> {
    let last = buffers.iter().rev().find(|b| b.writable && b.len > 0)?;
    let addr = last.addr.checked_add(u64::from(last.len) - 1)?;
    let mut at = None;
    let mapped = memory.for_each_slice(addr, 1, |s| at = Some((s.ptr, addr)));
    at.filter(|_| mapped)
}

fn read_header(memory: &GuestMemory, buffers: &[Buffer]) -> Result<[u8; HEADER], Refusal> {
    let mut header = [0u8; HEADER];
    let mut got = 0;
    for b in buffers.iter().take_while(|b| !b.writable) {
        let n = (HEADER - got).min(b.len as usize);
        let mapped = memory.for_each_slice(b.addr, n as u64, |s| {
            // SAFETY: the slice is mapped guest memory of `s.len` bytes, and `got + s.len` is at most 16.
            unsafe { std::ptr::copy_nonoverlapping(s.ptr, header.as_mut_ptr().add(got), s.len) };
            got += s.len;
        });
        if !mapped {
            return Err(Refusal::IoError("the header is not in guest memory"));
        }
        if got == HEADER {
            return Ok(header);
        }
    }
    Err(Refusal::IoError("a header of less than 16 bytes"))
}

/// Collects the data buffers of the operation's direction. Returns their length in bytes.
fn data_buffers(memory: &GuestMemory, buffers: &[Buffer], slot: &mut Slot) -> Result<u64, Refusal> {
    let reads_guest = slot.op == Op::Write;
    let wanted = |b: &&Buffer| b.writable != reads_guest;
    let available: u64 = buffers.iter().filter(wanted).map(|b| u64::from(b.len)).sum();
    // Without the header in front, or without the status byte behind.
    let (mut skip, mut left) =
        if reads_guest { (HEADER as u64, available - HEADER as u64) } else { (0, available - 1) };
    let total = left;
    if total > REQUEST_BYTES_MAX {
        return Err(Refusal::IoError("more than 64 MiB"));
    }
    for b in buffers.iter().filter(wanted) {
        let n = u64::from(b.len);
        let cut = skip.min(n);
        skip -= cut;
        let take = (n - cut).min(left);
        left -= take;
        let (iov, log) = (&mut slot.iov, &mut slot.log_ranges);
        let mapped = b.addr.checked_add(cut).is_some_and(|addr| {
            memory.for_each_slice(addr, take, |s: HostSlice| {
                iov.push(iovec { iov_base: s.ptr.cast(), iov_len: s.len });
                if !reads_guest {
                    log.push((s.guest_addr, s.len as u64));
                }
            })
        });
        if !mapped {
            return Err(Refusal::IoError("a buffer is not in guest memory"));
        }
    }
    if !reads_guest {
        slot.written = total as u32 + 1;
    }
    Ok(total)
}

/// Copies from the guest's buffers; as many bytes as `to` holds.
fn copy_in(iov: &[iovec], to: &mut [u8]) {
    let mut at = 0;
    for v in iov {
        let n = v.iov_len.min(to.len() - at);
        // SAFETY: the buffer is mapped guest memory; `at + n` is within `to`.
        unsafe { std::ptr::copy_nonoverlapping(v.iov_base.cast::<u8>(), to.as_mut_ptr().add(at), n) };
        at += n;
    }
}

/// Copies to the guest's buffers; what does not fit is left out, what is left over is zeroed.
pub fn copy_out(from: &[u8], iov: &[iovec]) {
    let mut at = 0;
    for v in iov {
        let n = v.iov_len.min(from.len() - at);
        // SAFETY: the buffer is mapped guest memory of `iov_len` bytes; `at + n` is within `from`.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr().add(at), v.iov_base.cast::<u8>(), n);
            std::ptr::write_bytes(v.iov_base.cast::<u8>().add(n), 0, v.iov_len - n);
        }
        at += n;
    }
}
