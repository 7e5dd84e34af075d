//! Guest memory as the front end shares it.
//!
//! A [`GuestMemory`] is an immutable snapshot of the regions; a message that changes them makes a new one. A request
//! in flight holds the snapshot that it was translated with, so that nothing is unmapped under the kernel's feet.

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::message::{VhostUserMemoryRegion, VhostUserSingleMemoryRegion};
use vm_memory::MmapRegion;

/// Most regions of one front end; what is announced as memory slots.
pub const REGIONS_MAX: usize = 509;

/// One shared mapping.
#[derive(Debug)]
struct Region {
    guest_addr: u64,
    len: u64,
    user_addr: u64,
    map: MmapRegion<()>,
}

impl Region {
    fn new(guest_addr: u64, len: u64, user_addr: u64, map: MmapRegion<()>) -> Result<Arc<Self>, MemoryError> {
        if len == 0 || guest_addr.checked_add(len).is_none() || user_addr.checked_add(len).is_none() {
            return Err(MemoryError::BadRegion { guest_addr, len });
        }
        // SAFETY: the mapping covers exactly this range and lives as long as `map`. The advice changes nothing of its
        // contents: guest memory must not end up in a core dump or a forked child.
        unsafe {
            libc::madvise(map.as_ptr().cast(), len as usize, libc::MADV_DONTFORK);
            libc::madvise(map.as_ptr().cast(), len as usize, libc::MADV_DONTDUMP);
        }
        super::sigbus::guard(map.as_ptr() as usize, len as usize).map_err(|e| MemoryError::Map(e.into()))?;
        Ok(Arc::new(Self { guest_addr, len, user_addr, map }))
    }

    fn host(&self) -> *mut u8 {
        self.map.as_ptr()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        super::sigbus::unguard(self.map.as_ptr() as usize);
    }
}

/// Why a memory message was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Empty, or its addresses overflow.
    #[error("memory region at guest address {guest_addr:#x} with {len:#x} bytes is empty or overflows")]
    BadRegion {
        /// Guest physical address.
        guest_addr: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Two regions share guest addresses.
    #[error("memory regions overlap at guest address {0:#x}")]
    Overlap(u64),
    /// More than [`REGIONS_MAX`].
    #[error("more than {REGIONS_MAX} memory regions")]
    TooMany,
    /// The file is shorter than the region that shall be mapped from it.
    #[error(
        "the memory region at guest address {guest_addr:#x} needs {needed:#x} bytes of a file of {len:#x}"
    )]
    FileTooShort {
        /// Guest physical address.
        guest_addr: u64,
        /// Offset plus length.
        needed: u64,
        /// Size of the file.
        len: u64,
    },
    /// A region to be removed is not there.
    #[error("no memory region at guest address {0:#x}")]
    NotFound(u64),
    /// The kernel refused.
    #[error("cannot map guest memory: {0}")]
    Map(String),
}

/// A snapshot of all regions, sorted by guest address.
#[derive(Debug, Default, Clone)]
pub struct GuestMemory {
    regions: Vec<Arc<Region>>,
}

// SAFETY: the regions are shared mappings that live as long as the snapshot; all access to them is by raw pointers
// whose users (the ring, the request parser, the kernel) treat the contents as volatile.
unsafe impl Send for GuestMemory {}
// SAFETY: as above; nothing of the snapshot itself changes.
unsafe impl Sync for GuestMemory {}

/// A part of guest memory that lies together in this process.
#[derive(Debug, Clone, Copy)]
pub struct HostSlice {
    /// Where it is mapped.
    pub ptr: *mut u8,
    /// Its guest physical address.
    pub guest_addr: u64,
    /// Length in bytes.
    pub len: usize,
}

fn check_file(file: &File, guest_addr: u64, offset: u64, len: u64) -> Result<(), MemoryError> {
    let file_len = file.metadata().map_err(|e| MemoryError::Map(e.to_string()))?.len();
    let needed = offset.checked_add(len).ok_or(MemoryError::BadRegion { guest_addr, len })?;
    if needed > file_len {
        return Err(MemoryError::FileTooShort { guest_addr, needed, len: file_len });
    }
    Ok(())
}

impl GuestMemory {
    /// The regions of SET_MEM_TABLE.
    pub fn from_table(table: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<Self, MemoryError> {
        let mut memory = Self::default();
        for (r, file) in table.iter().zip(files) {
            let (guest_addr, len) = (r.guest_phys_addr, r.memory_size);
            check_file(&file, guest_addr, r.mmap_offset, len)?;
            let map = r.mmap_region::<()>(file).map_err(|e| MemoryError::Map(e.to_string()))?;
            memory.insert(Region::new(guest_addr, len, r.user_addr, map)?)?;
        }
        Ok(memory)
    }

    /// A copy with the region of ADD_MEM_REG.
    pub fn with_region(&self, r: &VhostUserSingleMemoryRegion, file: File) -> Result<Self, MemoryError> {
        let (guest_addr, len) = (r.guest_phys_addr, r.memory_size);
        check_file(&file, guest_addr, r.mmap_offset, len)?;
        let map = r.mmap_region::<()>(file).map_err(|e| MemoryError::Map(e.to_string()))?;
        let mut memory = self.clone();
        memory.insert(Region::new(guest_addr, len, r.user_addr, map)?)?;
        Ok(memory)
    }

    /// A copy without the region of REM_MEM_REG, which is told by its addresses and length.
    pub fn without_region(&self, r: &VhostUserSingleMemoryRegion) -> Result<Self, MemoryError> {
        let mut memory = self.clone();
        let at = memory.regions.iter().position(|x| {
            x.guest_addr == r.guest_phys_addr && x.len == r.memory_size && x.user_addr == r.user_addr
        });
        memory.regions.remove(at.ok_or(MemoryError::NotFound(r.guest_phys_addr))?);
        Ok(memory)
    }

    fn insert(&mut self, region: Arc<Region>) -> Result<(), MemoryError> {
        if self.regions.len() >= REGIONS_MAX {
            return Err(MemoryError::TooMany);
        }
        let at = self.regions.partition_point(|r| r.guest_addr < region.guest_addr);
        let end = region.guest_addr + region.len;
        if self.regions.get(at).is_some_and(|next| next.guest_addr < end) {
            return Err(MemoryError::Overlap(self.regions[at].guest_addr));
        }
        if at > 0 && self.regions[at - 1].guest_addr + self.regions[at - 1].len > region.guest_addr {
            return Err(MemoryError::Overlap(region.guest_addr));
        }
        self.regions.insert(at, region);
        Ok(())
    }

    /// Calls `each` with the parts of `[addr, addr + len)`, in order. Returns whether all of it is mapped.
    #[must_use]
    pub fn for_each_slice(&self, addr: u64, len: u64, mut each: impl FnMut(HostSlice)) -> bool {
        let (mut addr, mut left) = (addr, len);
        while left > 0 {
            let at = self.regions.partition_point(|r| r.guest_addr <= addr);
            let Some(region) = at.checked_sub(1).map(|i| &self.regions[i]) else { return false };
            let offset = addr - region.guest_addr;
            if offset >= region.len {
                return false;
            }
            let n = left.min(region.len - offset);
            // SAFETY: `offset + n` is within the mapping.
            let ptr = unsafe { region.host().add(offset as usize) };
            each(HostSlice { ptr, guest_addr: addr, len: n as usize });
            left -= n;
            // The end of a region may be the end of the address space; nothing is left then.
            addr = addr.wrapping_add(n);
        }
        true
    }

    /// The one mapping that holds all of `[addr, addr + len)`, addressed as the front end does (its own virtual
    /// addresses).
    pub fn by_user_addr(&self, addr: u64, len: u64) -> Option<HostSlice> {
        let region = self.regions.iter().find(|r| addr >= r.user_addr && addr - r.user_addr < r.len)?;
        let offset = addr - region.user_addr;
        if len > region.len - offset {
            return None;
        }
        // SAFETY: `offset + len` is within the mapping.
        let ptr = unsafe { region.host().add(offset as usize) };
        Some(HostSlice { ptr, guest_addr: region.guest_addr + offset, len: len as usize })
    }

    /// Whether no region is there.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }
}
