//! Memory of our own for what cannot go straight between guest memory and a file.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};

/// Every buffer is aligned to this: enough for direct I/O anywhere.
const ALIGN: usize = 4096;

/// A page-aligned buffer.
#[derive(Debug)]
pub struct AlignedBuffer {
    ptr: *mut u8,
    len: usize,
}

// SAFETY: the buffer is plain memory that is owned by one holder at a time.
unsafe impl Send for AlignedBuffer {}

impl AlignedBuffer {
    /// A zeroed buffer of at least `len` bytes (at least one page).
    pub fn new(len: usize) -> Self {
        let len = len.max(1).next_multiple_of(ALIGN);
        let layout = Layout::from_size_align(len, ALIGN).expect("a buffer's size is bounded");
        // SAFETY: the layout is not empty.
        let ptr = unsafe { alloc_zeroed(layout) };
        if ptr.is_null() {
            handle_alloc_error(layout);
        }
        Self { ptr, len }
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

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        let layout = Layout::from_size_align(self.len, ALIGN).expect("checked when it was made");
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.ptr, layout) }
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
