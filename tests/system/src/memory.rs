//! Guest memory: memfds that the tests and the daemon both map, and the dirty log beside it.
//!
//! The other side writes to this memory whenever it likes, so nothing here hands out references to it: bytes are
//! copied in and out, and the few words that both sides race on are atomics.
#![expect(unsafe_code, reason = "shared memory is reached through raw pointers; every use is checked here")]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use vhost::{VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo};

/// The dirty log has one bit for this many bytes.
pub const LOG_PAGE: u64 = 4096;

/// One mapped memfd.
#[derive(Debug)]
pub struct Mapping {
    file: File,
    base: *mut u8,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is reached only by copies and atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// A new memfd of `len` bytes, all zero, mapped shared.
    pub fn new(len: usize) -> std::io::Result<Self> {
        // SAFETY: the name is a C string; the descriptor that comes back is ours alone.
        let fd =
            unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made and is owned by nothing else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(len as u64)?;
        Self::map(file, 0, len)
    }

    /// Maps `len` bytes of `file` from `offset` on.
    pub fn map(file: File, offset: u64, len: usize) -> std::io::Result<Self> {
        let offset = i64::try_from(offset).map_err(std::io::Error::other)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self { file, base: base.cast(), len })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes, which mmap does not allow.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The memfd.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is mapped here.
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    fn at(&self, offset: usize, len: usize, align: usize) -> *mut u8 {
        let end = offset.checked_add(len).expect("an offset in guest memory fits in usize");
        assert!(end <= self.len, "{offset}+{len} is beyond the mapping of {} bytes", self.len);
        assert_eq!(offset % align, 0, "offset {offset} is not aligned to {align}");
        // SAFETY: the range was checked to lie in the mapping.
        unsafe { self.base.add(offset) }
    }

    /// Copies out of the mapping.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        let from = self.at(offset, to.len(), 1);
        // SAFETY: `from` is valid for `to.len()` bytes, and a private buffer can't overlap a mapping.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
    }

    /// Copies into the mapping.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let to = self.at(offset, from.len(), 1);
        // SAFETY: `to` is valid for `from.len()` bytes, and a private buffer can't overlap a mapping.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    /// Sets `len` bytes to `value`.
    pub fn fill(&self, offset: usize, len: usize, value: u8) {
        let to = self.at(offset, len, 1);
        // SAFETY: `to` is valid for `len` bytes.
        unsafe { std::ptr::write_bytes(to, value, len) }
    }

    /// A byte that both sides use.
    pub fn u8(&self, offset: usize) -> &AtomicU8 {
        let at = self.at(offset, 1, 1);
        // SAFETY: valid and aligned for the mapping's life, which the borrow of `self` bounds.
        unsafe { AtomicU8::from_ptr(at) }
    }

    /// A 16-bit word that both sides use.
    pub fn u16(&self, offset: usize) -> &AtomicU16 {
        let at = self.at(offset, 2, 2);
        // SAFETY: valid and aligned for the mapping's life, which the borrow of `self` bounds.
        unsafe { AtomicU16::from_ptr(at.cast()) }
    }

    /// A 64-bit word that both sides use.
    pub fn u64(&self, offset: usize) -> &AtomicU64 {
        let at = self.at(offset, 8, 8);
        // SAFETY: valid and aligned for the mapping's life, which the borrow of `self` bounds.
        unsafe { AtomicU64::from_ptr(at.cast()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by us with this length and unmapped once; borrows of it have ended.
        unsafe {
            libc::munmap(self.base.cast(), self.len);
        }
    }
}

/// One region of guest memory.
#[derive(Debug)]
pub struct Region {
    /// Guest physical address of its first byte.
    pub start: u64,
    /// Its memory.
    pub mapping: Mapping,
}

impl Region {
    /// As a vhost-user message names it.
    pub fn info(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.start,
            memory_size: self.mapping.len() as u64,
            userspace_addr: self.mapping.base() as u64,
            mmap_offset: 0,
            mmap_handle: self.mapping.file().as_raw_fd(),
        }
    }

    fn end(&self) -> u64 {
        self.start + self.mapping.len() as u64
    }
}

/// Memory of a guest that exists in these tests only: regions with holes between them.
#[derive(Debug)]
pub struct GuestMemory {
    regions: Vec<Region>,
    next_free: Vec<AtomicU64>,
}

impl GuestMemory {
    /// Regions of these sizes in bytes (multiples of 4096), 16 MiB of nothing between them.
    pub fn new(sizes: &[u64]) -> std::io::Result<Self> {
        Self::with_gaps(sizes, 16 << 20)
    }

    /// Regions of these sizes in bytes (multiples of 4096), `gap` bytes of nothing between them.
    pub fn with_gaps(sizes: &[u64], gap: u64) -> std::io::Result<Self> {
        let mut start = 0;
        let mut regions = Vec::new();
        for &size in sizes {
            assert!(size > 0 && size.is_multiple_of(LOG_PAGE), "a region of {size} bytes");
            regions.push(Region { start, mapping: Mapping::new(usize::try_from(size).expect("64-bit"))? });
            start += size + gap;
        }
        // Address 0 is never given away, so that a forgotten address shows.
        let next_free = regions.iter().map(|r| AtomicU64::new(r.start.max(LOG_PAGE))).collect();
        Ok(Self { regions, next_free })
    }

    /// The regions, lowest first.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// One past the highest address.
    pub fn end(&self) -> u64 {
        self.regions.last().map_or(0, Region::end)
    }

    /// Takes `len` bytes of region `region` for good, at a multiple of `align`.
    pub fn alloc(&self, region: usize, len: u64, align: u64) -> u64 {
        let next = &self.next_free[region];
        let at = next.load(Ordering::Relaxed).next_multiple_of(align);
        assert!(at + len <= self.regions[region].end(), "region {region} of guest memory is full");
        next.store(at + len, Ordering::Relaxed);
        at
    }

    fn find(&self, addr: u64) -> (&Region, usize) {
        let region = self.regions.iter().find(|r| r.start <= addr && addr < r.end());
        let region = region.unwrap_or_else(|| panic!("guest address {addr:#x} is in no region"));
        (region, usize::try_from(addr - region.start).expect("64-bit"))
    }

    /// The same byte as this process addresses it: what SET_VRING_ADDR wants.
    pub fn user_addr(&self, addr: u64) -> u64 {
        let (region, offset) = self.find(addr);
        region.mapping.base() as u64 + offset as u64
    }

    /// Where `len` bytes at `addr` are mapped; they must lie in one region.
    pub(crate) fn host(&self, addr: u64, len: usize) -> *mut u8 {
        let (region, offset) = self.find(addr);
        region.mapping.at(offset, len, 1)
    }

    /// Copies out of guest memory.
    pub fn read(&self, addr: u64, to: &mut [u8]) {
        let (region, offset) = self.find(addr);
        region.mapping.read(offset, to);
    }

    /// Copies into guest memory.
    pub fn write(&self, addr: u64, from: &[u8]) {
        let (region, offset) = self.find(addr);
        region.mapping.write(offset, from);
    }

    /// Sets `len` bytes to `value`.
    pub fn fill(&self, addr: u64, len: usize, value: u8) {
        let (region, offset) = self.find(addr);
        region.mapping.fill(offset, len, value);
    }

    /// A byte that both sides use.
    pub fn u8(&self, addr: u64) -> &AtomicU8 {
        let (region, offset) = self.find(addr);
        region.mapping.u8(offset)
    }

    /// A 16-bit word that both sides use.
    pub fn u16(&self, addr: u64) -> &AtomicU16 {
        let (region, offset) = self.find(addr);
        region.mapping.u16(offset)
    }
}

/// The bitmap in which the daemon says what it wrote to guest memory.
#[derive(Debug)]
pub struct DirtyLog {
    mapping: Mapping,
}

impl DirtyLog {
    /// A clean log for guest memory up to `end`.
    pub fn new(end: u64) -> std::io::Result<Self> {
        let bytes = end.div_ceil(LOG_PAGE * 8).next_multiple_of(LOG_PAGE);
        Ok(Self { mapping: Mapping::new(usize::try_from(bytes).expect("64-bit"))? })
    }

    /// As SET_LOG_BASE names it.
    pub fn region(&self) -> VhostUserDirtyLogRegion {
        VhostUserDirtyLogRegion {
            mmap_size: self.mapping.len() as u64,
            mmap_offset: 0,
            mmap_handle: self.mapping.file().as_raw_fd(),
        }
    }

    /// The memfd.
    pub fn file(&self) -> &File {
        self.mapping.file()
    }

    /// The pages marked since the last call, in order; their marks are cleared.
    pub fn take(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        for word in 0..self.mapping.len() / 8 {
            let bits = self.mapping.u64(word * 8);
            // The log is an array of bytes: little-endian words keep its order.
            let mut value = u64::from_le(bits.load(Ordering::Relaxed));
            if value != 0 {
                value = u64::from_le(bits.swap(0, Ordering::AcqRel));
            }
            while value != 0 {
                pages.push(word as u64 * 64 + u64::from(value.trailing_zeros()));
                value &= value - 1;
            }
        }
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_reads_back_what_was_written_in_every_region() {
        let memory = GuestMemory::new(&[1 << 20, 2 << 20]).unwrap();
        let first = memory.alloc(0, 100, 64);
        let second = memory.alloc(1, 100, 64);
        memory.write(first, b"one");
        memory.write(second, b"two");
        let mut back = [0; 3];
        memory.read(first, &mut back);
        assert_eq!(&back, b"one");
        memory.read(second, &mut back);
        assert_eq!(&back, b"two");
        assert_ne!(first, 0);
    }

    #[test]
    fn a_dirty_log_gives_every_page_once() {
        let log = DirtyLog::new(1 << 30).unwrap();
        log.mapping.u8(0).store(0b10, Ordering::Relaxed);
        log.mapping.u8(1000).store(0x81, Ordering::Relaxed);
        assert_eq!(log.take(), [1, 8000, 8007]);
        assert!(log.take().is_empty());
    }
}
