//! Memory of our own for what cannot go straight between guest memory and a file.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::sync::Arc;

/// Every buffer is aligned to this: enough for direct I/O anywhere.
const ALIGN: usize = 4096;

/// What [`AlignedBuffer::carve`] asks for as a whole, in bytes: a huge page of x86-64 and of most arm64 systems.
const HUGE: usize = 2 << 20;

/// A page-aligned buffer.
#[derive(Debug)]
pub struct AlignedBuffer {
    ptr: *mut u8,
    len: usize,
    /// Keeps the memory.
    _memory: Arc<Memory>,
}

// SAFETY: the buffer is plain memory that is owned by one holder at a time; what it shares is only given back.
unsafe impl Send for AlignedBuffer {}

/// What buffers are cut from.
#[derive(Debug)]
struct Memory {
    ptr: *mut u8,
    layout: Layout,
}

// SAFETY: nothing is read or written through it; it is allocated and given back as a whole.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Zeroed.
    fn new(layout: Layout) -> Arc<Self> {
        // SAFETY: the layout is not empty.
        let ptr = unsafe { alloc(layout) };
        if ptr.is_null() {
            handle_alloc_error(layout);
        }
        if layout.align() >= HUGE {
            // Before anything touches it. Where there are no huge pages it stays as it is.
            // SAFETY: the range is ours, and the advice does not change what it holds.
            let _ = unsafe { libc::madvise(ptr.cast(), layout.size(), libc::MADV_HUGEPAGE) };
        }
        // SAFETY: so many bytes were allocated.
        unsafe { ptr.write_bytes(0, layout.size()) };
        Arc::new(Self { ptr, layout })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and no buffer is left.
        unsafe { dealloc(self.ptr, self.layout) }
    }
}

impl AlignedBuffer {
    /// A zeroed buffer of at least `len` bytes (at least one page).
    pub fn new(len: usize) -> Self {
        let len = len.max(1).next_multiple_of(ALIGN);
        let layout = Layout::from_size_align(len, ALIGN).expect("a buffer's size is bounded");
        let memory = Memory::new(layout);
        Self { ptr: memory.ptr, len, _memory: memory }
    }

    /// Zeroed buffers of at least `len` bytes each, as many as fit into a huge page, or one: for direct I/O the kernel looks
    /// up every page of a buffer, which is a good part of what copying costs, and a huge page only once.
    pub fn carve(len: usize) -> Vec<Self> {
        let len = len.max(1).next_multiple_of(ALIGN);
        let whole = len.next_multiple_of(HUGE);
        let layout = Layout::from_size_align(whole, HUGE).expect("a buffer's size is bounded");
        let memory = Memory::new(layout);
        // SAFETY: every piece lies within the memory.
        let cut = |n| Self { ptr: unsafe { memory.ptr.add(n * len) }, len, _memory: memory.clone() };
        (0..whole / len).map(cut).collect()
    }

    /// Where it begins.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Its length in bytes, a multiple of a page.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never empty.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Its contents. No I/O may be writing to it.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: initialised on allocation; the borrow keeps the buffer alive.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }

    /// Its contents. No I/O may be using it.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

/// Buffers for reuse, so that the common sizes are not allocated anew for each request.
#[derive(Debug, Default)]
pub struct BufferPool {
    small: Vec<AlignedBuffer>,
    large: Vec<AlignedBuffer>,
}

/// Sizes of the two classes in bytes, and how many of each are kept.
const SMALL: usize = 16 << 10;
const SMALL_KEPT: usize = 256;
const LARGE: usize = 1 << 20;
const LARGE_KEPT: usize = 32;

impl BufferPool {
    /// A buffer of at least `len` bytes; its contents are whatever they were.
    pub fn take(&mut self, len: usize) -> AlignedBuffer {
        match len {
            ..=SMALL => self.small.pop().unwrap_or_else(|| AlignedBuffer::new(SMALL)),
            n if n <= LARGE => self.large.pop().unwrap_or_else(|| AlignedBuffer::new(LARGE)),
            _ => AlignedBuffer::new(len),
        }
    }

    /// Takes a buffer back.
    pub fn put(&mut self, buffer: AlignedBuffer) {
        match buffer.len() {
            SMALL if self.small.len() < SMALL_KEPT => self.small.push(buffer),
            LARGE if self.large.len() < LARGE_KEPT => self.large.push(buffer),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_one_page_are_apart_and_outlive_each_other() {
        let mark = |n: usize| (n % 255) as u8 + 1;
        for (len, count) in [(512 << 10, 4), (700 << 10, 2), (3 << 20, 1), (1, 512)] {
            let mut buffers = AlignedBuffer::carve(len);
            assert_eq!(buffers.len(), count);
            for (n, buffer) in buffers.iter_mut().enumerate() {
                assert!(buffer.len() >= len && (buffer.as_ptr() as usize).is_multiple_of(ALIGN));
                assert!(buffer.as_slice().iter().all(|byte| *byte == 0));
                buffer.as_mut_slice().fill(mark(n));
            }
            let last = buffers.pop().expect("there is one");
            drop(buffers);
            assert!(last.as_slice().iter().all(|byte| *byte == mark(count - 1)));
        }
    }
}
