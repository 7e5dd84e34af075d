//! The dirty log: which pages of guest memory the device has written, for a VMM that migrates the machine.

use std::fs::File;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::{FileOffset, MmapRegion};

/// The log's page size (vhost-user specification, "Migration").
const PAGE: u64 = 4096;

/// A mapped log: one bit a page, bit 0 of byte 0 is guest address 0.
#[derive(Debug)]
pub struct DirtyLog {
    map: MmapRegion<()>,
    len: u64,
}

// SAFETY: the mapping is only touched by atomic operations.
unsafe impl Send for DirtyLog {}
// SAFETY: as above.
unsafe impl Sync for DirtyLog {}

impl DirtyLog {
    /// Maps `len` bytes at `offset` of the file that SET_LOG_BASE carries.
    pub fn map(file: File, offset: u64, len: u64) -> Result<Self, String> {
        let file_len = file.metadata().map_err(|e| e.to_string())?.len();
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(format!("log of {len} bytes at {offset} is not within its file of {file_len} bytes"));
        }
        let map = MmapRegion::<()>::from_file(FileOffset::new(file, offset), len as usize)
            .map_err(|e| format!("cannot map the dirty log: {e}"))?;
        super::sigbus::guard(map.as_ptr() as usize, len as usize)?;
        Ok(Self { map, len })
    }

    /// Marks every page that `[addr, addr + len)` touches. What lies beyond the log is not logged: the front end
    /// sized it for its own memory.
    pub fn mark(&self, addr: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = addr.saturating_add(len - 1) / PAGE;
        for page in addr / PAGE..=last {
            let byte = page / 8;
            if byte >= self.len {
                return;
            }
            // SAFETY: `byte` is within the mapping, which is shared and writable; the access is atomic.
            let cell = unsafe { AtomicU8::from_ptr(self.map.as_ptr().add(byte as usize)) };
            let bit = 1 << (page % 8);
            if cell.load(Ordering::Relaxed) & bit == 0 {
                cell.fetch_or(bit, Ordering::Release);
            }
        }
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        super::sigbus::unguard(self.map.as_ptr() as usize);
    }
}
