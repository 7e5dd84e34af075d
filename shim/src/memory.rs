//! Guest memory: one sealed memfd, mapped once, of which the guest sees two regions at most (below and above the hole for
//! devices at 3 to 4 GiB).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::pages::{PAGE_BYTES, PageSet};

/// Where the hole for devices begins: memory up to here is at its own address.
pub const HOLE_START: u64 = 3 << 30;
/// Where the hole ends and the rest of the memory begins.
pub const HOLE_END: u64 = 4 << 30;
/// Most memory of a guest.
pub const MEMORY_MAX_BYTES: u64 = 1 << 40;

/// Bytes of a huge page, of which a guest's memory can be made.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// What the kernel tells of the host's pool of them.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Bytes that the host is asked for at once.
const FILL_BYTES: u64 = 1 << 30;
/// How often a signal may interrupt that before it is given up.
const FILL_TRIES_MAX: u32 = 10_000;

/// Guest memory as vm-memory sees it. Its bitmap has what this process writes into it for the guest.
pub type Memory = GuestMemoryMmap<OwnWrites>;

/// What this process writes into a region, page by page. A region may be kept for longer than its [`GuestRam`], so it keeps
/// the mapping as well.
#[derive(Debug)]
pub struct OwnWrites {
    pages: AtomicBitmap,
    _mapping: Arc<Mapping>,
}

impl<'a> WithBitmapSlice<'a> for OwnWrites {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for OwnWrites {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.pages.mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.pages.dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

/// A range of guest-physical addresses with memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    /// KVM's number of the slot.
    pub slot: u32,
    /// First guest-physical address.
    pub guest_start: u64,
    /// Bytes.
    pub len: u64,
    /// Index of its first page in the whole memory; its place in the memfd is this many pages from the start.
    pub first_page: u64,
}

/// The memory of one guest.
#[derive(Debug)]
pub struct GuestRam {
    mapping: Arc<Mapping>,
    file: Arc<File>,
    regions: Vec<RamRegion>,
    memory: Memory,
    huge_pages: bool,
}

/// The whole memfd in this process, unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it is memory that several parties write at any time anyway (processors of the guest, the kernel, backends); access
// goes through raw pointers and vm-memory, never through references.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map` and nobody keeps a pointer into it: all that have one hold the `GuestRam` or a
        // region, and these this mapping.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

impl GuestRam {
    /// Memory of `bytes`, a multiple of 2 MiB, all zeroes. `huge_pages` takes it from the host's pool of 2 MiB pages, all of it
    /// at once: what the pool lacks is told here, as whoever touches a page that cannot be had later is killed. That takes the
    /// time in which the host clears so much memory.
    ///
    /// # Errors
    /// If the size is none, or the host has not got the memory or the huge pages.
    pub fn new(bytes: u64, huge_pages: bool) -> Result<Arc<Self>> {
        ensure!(
            bytes > 0 && bytes.is_multiple_of(2 << 20) && bytes <= MEMORY_MAX_BYTES,
            "a guest's memory is a multiple of 2M, up to {} GiB; {bytes} bytes are not",
            MEMORY_MAX_BYTES >> 30
        );
        let free = huge_pages.then(huge_pages_free).flatten();
        let (file, mapping) = take(bytes, huge_pages).with_context(|| {
            if huge_pages {
                no_huge_pages(bytes, free)
            } else {
                format!("make a memfd of {bytes} bytes and map it")
            }
        })?;
        let low = bytes.min(HOLE_START);
        let mut regions = vec![RamRegion { slot: 0, guest_start: 0, len: low, first_page: 0 }];
        if bytes > low {
            let first_page = low / PAGE_BYTES as u64;
            regions.push(RamRegion { slot: 1, guest_start: HOLE_END, len: bytes - low, first_page });
        }
        let parts: Result<Vec<_>> = regions
            .iter()
            .map(|region| {
                let offset = region.first_page as usize * PAGE_BYTES;
                let pages = AtomicBitmap::with_len(region.len as usize);
                let writes = OwnWrites { pages, _mapping: mapping.clone() };
                // SAFETY: the range is within the mapping, which the region keeps with its bitmap.
                let part = unsafe {
                    let start = mapping.start.as_ptr().add(offset);
                    MmapRegionBuilder::new_with_bitmap(region.len as usize, writes)
                        .with_raw_mmap_pointer(start)
                        .with_file_offset(FileOffset::from_arc(file.clone(), offset as u64))
                        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                        .with_mmap_flags(libc::MAP_SHARED)
                        .build()
                }?;
                GuestRegionMmap::new(part, GuestAddress(region.guest_start)).context("a region that wraps")
            })
            .collect();
        let memory = Memory::from_regions(parts?).context("put the regions together")?;
        Ok(Arc::new(Self { mapping, file, regions, memory, huge_pages }))
    }

    /// The memory by guest-physical address. What is written through it is noted in its bitmap
    /// ([`GuestRam::take_own_writes`]).
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The regions in the order of their addresses, which is that of their pages.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// The memfd: page `n` is at `n * PAGE_BYTES`.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Whether it stands in pages of 2 MiB.
    pub fn huge_pages(&self) -> bool {
        self.huge_pages
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        (self.mapping.len / PAGE_BYTES) as u64
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> u64 {
        self.mapping.len as u64
    }

    /// Where the page is in this process.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn page_pointer(&self, page: u64) -> *mut u8 {
        assert!(page < self.pages(), "page {page} of {}", self.pages());
        // SAFETY: within the mapping, as was just checked.
        unsafe { self.mapping.start.as_ptr().add(page as usize * PAGE_BYTES) }
    }

    /// The page of a guest-physical address, if it is memory.
    pub fn page_of(&self, address: u64) -> Option<u64> {
        let region =
            self.regions.iter().find(|r| address >= r.guest_start && address - r.guest_start < r.len)?;
        Some(region.first_page + (address - region.guest_start) / PAGE_BYTES as u64)
    }

    /// The guest-physical address of a page.
    pub fn address_of(&self, page: u64) -> Option<u64> {
        let pages = |region: &RamRegion| region.len / PAGE_BYTES as u64;
        let region = self.regions.iter().find(|r| page >= r.first_page && page - r.first_page < pages(r))?;
        Some(region.guest_start + (page - region.first_page) * PAGE_BYTES as u64)
    }

    /// Reads pages from `first` on into `to`, whose length is a multiple of a page. The guest may write meanwhile: what is
    /// read then is a mixture.
    ///
    /// # Panics
    /// If the range is not within the memory.
    pub fn read_pages(&self, first: u64, to: &mut [u8]) {
        self.check_range(first, to.len());
        // SAFETY: both ranges are valid for their length and do not overlap, as `to` is memory of our own. The guest's writes
        // meanwhile are what the function's description allows; bytes have no invalid values.
        unsafe { std::ptr::copy_nonoverlapping(self.page_pointer(first), to.as_mut_ptr(), to.len()) };
    }

    /// Writes pages from `first` on. Nothing is noted in the bitmap.
    ///
    /// # Panics
    /// If the range is not within the memory.
    pub fn write_pages(&self, first: u64, from: &[u8]) {
        self.check_range(first, from.len());
        // SAFETY: as in `read_pages`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.page_pointer(first), from.len()) };
    }

    fn check_range(&self, first: u64, len: usize) {
        let pages = (len / PAGE_BYTES) as u64;
        assert!(
            len.is_multiple_of(PAGE_BYTES) && first.checked_add(pages).is_some_and(|end| end <= self.pages()),
            "{len} bytes at page {first} of {}",
            self.pages()
        );
    }

    /// Gives pages back to the host; they read as zeroes afterwards.
    ///
    /// # Errors
    /// If the host refuses, and for memory in huge pages: another process may take what the pool gets back, and who touches
    /// the page afterwards is killed.
    pub fn discard(&self, first: u64, pages: u64) -> io::Result<()> {
        if self.huge_pages {
            let reason = "huge pages are not given back while the guest has them: take memory without them";
            return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
        }
        let (offset, len) = (first * PAGE_BYTES as u64, pages * PAGE_BYTES as u64);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: plain system call on a descriptor of ours.
        let result = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset as i64, len as i64) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Adds the pages that this process wrote through [`GuestRam::memory`] since the last call.
    pub fn take_own_writes(&self, into: &mut PageSet) {
        use vm_memory::GuestMemoryBackend;
        for (region, place) in self.memory.iter().zip(&self.regions) {
            let bits = vm_memory::MmapRegion::bitmap(region).pages.get_and_reset();
            into.insert_bits(place.first_page, &bits);
        }
    }
}

/// Huge pages of 2 MiB that this host can still give to a new guest: those that nobody has or was promised, and those that
/// the kernel may add to the pool. `None`: the kernel does not say, or has none of this size.
pub fn huge_pages_free() -> Option<u64> {
    let count = |name: &str| {
        std::fs::read_to_string(format!("{POOL}/{name}_hugepages")).ok()?.trim().parse::<u64>().ok()
    };
    let idle = count("free")?.saturating_sub(count("resv")?);
    Some(idle + count("nr_overcommit")?.saturating_sub(count("surplus")?))
}

/// Says that a host with `free` huge pages of 2 MiB cannot give `needed`, and what to do.
pub fn too_few_huge_pages(needed: u64, free: u64) -> String {
    format!(
        "the machine needs {needed} huge pages of 2 MiB, and {free} are free on this host: raise vm.nr_hugepages by at least {} \
         (or nr_hugepages in {POOL}, where 2 MiB are not the usual size)",
        needed.saturating_sub(free)
    )
}

/// Why there was no memory in huge pages where `free` were free before.
fn no_huge_pages(bytes: u64, free: Option<u64>) -> String {
    let needed = bytes / HUGE_PAGE_BYTES;
    match free {
        Some(free) if free < needed => too_few_huge_pages(needed, free),
        Some(free) => format!(
            "the host does not give {needed} huge pages of 2 MiB though {free} are free: look at the limits of this process \
             (hugetlb.2MB.max of its cgroup, the memory nodes of its cpuset)"
        ),
        None => format!(
            "the host does not give {needed} huge pages of 2 MiB: see whether it has any in {POOL} (vm.nr_hugepages)"
        ),
    }
}

/// The memfd of a guest and its mapping. In huge pages all of it is there when this returns.
fn take(bytes: u64, huge_pages: bool) -> io::Result<(Arc<File>, Arc<Mapping>)> {
    let file = memfd(bytes, huge_pages)?;
    let mapping = map(&file, bytes as usize, huge_pages)?;
    if huge_pages {
        fill(&file, bytes)?;
    }
    Ok((Arc::new(file), Arc::new(mapping)))
}

/// Has the host put memory behind the whole file. That the pool has pages for it was promised when it was mapped, but only
/// taking them shows what a cgroup or a cpuset forbids.
fn fill(file: &File, bytes: u64) -> io::Result<()> {
    for at in (0..bytes).step_by(FILL_BYTES as usize) {
        let len = FILL_BYTES.min(bytes - at);
        let mut tries = 0;
        // SAFETY: plain system call on a descriptor of ours.
        while unsafe { libc::fallocate(file.as_raw_fd(), 0, at as i64, len as i64) } != 0 {
            let error = io::Error::last_os_error();
            tries += 1;
            // A signal of this process. What was taken until then stays.
            if error.kind() != io::ErrorKind::Interrupted || tries == FILL_TRIES_MAX {
                return Err(error);
            }
        }
    }
    Ok(())
}

fn memfd(bytes: u64, huge_pages: bool) -> io::Result<File> {
    let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    if huge_pages {
        flags |= libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
    }
    // SAFETY: the name is a C string; the result is checked.
    let fd = unsafe { libc::memfd_create(c"guest-memory".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    // A backend maps it as well: nobody may make it shorter, which would kill who touches what is gone.
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: plain system call on a descriptor of ours.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

fn map(file: &File, len: usize, huge_pages: bool) -> io::Result<Mapping> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // Without NORESERVE the pool sets all huge pages aside at once, or refuses.
    let flags = libc::MAP_SHARED | if huge_pages { 0 } else { libc::MAP_NORESERVE };
    // SAFETY: a new mapping at a place of the kernel's choice.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, file.as_raw_fd(), 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // A helper process must not share it, nor a core dump hold the guest's secrets.
    for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
        // SAFETY: the range was just mapped; a refusal changes nothing.
        unsafe { libc::madvise(start, len, advice) };
    }
    let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
    Ok(Mapping { start, len })
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn pages_and_addresses_belong_together_around_the_hole() {
        let ram = GuestRam::new((3 << 30) + (4 << 20), false).expect("memory that nobody touches");
        let last_below = HOLE_START / 4096 - 1;
        assert_eq!(ram.page_of(HOLE_START - 1), Some(last_below));
        assert_eq!(ram.page_of(HOLE_START), None);
        assert_eq!(ram.page_of(HOLE_END), Some(last_below + 1));
        assert_eq!(ram.address_of(last_below + 1), Some(HOLE_END));
        assert_eq!(ram.address_of(ram.pages()), None);
    }

    #[test]
    fn what_is_written_for_the_guest_is_noted_once() {
        let ram = GuestRam::new(4 << 20, false).expect("memory");
        ram.memory().write_slice(&[1; 100], GuestAddress(8 * 4096 - 50)).expect("in memory");
        let mut set = PageSet::empty(ram.pages());
        ram.take_own_writes(&mut set);
        assert_eq!(set.iter().collect::<Vec<_>>(), [7, 8]);
        set.clear();
        ram.take_own_writes(&mut set);
        assert!(set.is_empty());
    }

    #[test]
    fn what_keeps_the_memory_keeps_it_mapped() {
        let ram = GuestRam::new(4 << 20, false).expect("ram");
        let kept = ram.memory().clone();
        drop(ram);
        kept.write_obj(7u64, GuestAddress(4096)).expect("in memory");
        assert_eq!(kept.read_obj::<u64>(GuestAddress(4096)).expect("in memory"), 7);
    }

    #[test]
    fn a_size_that_is_none_is_refused() {
        assert!(GuestRam::new(0, false).is_err());
        assert!(GuestRam::new(4096, false).is_err());
        assert!(GuestRam::new(u64::MAX, false).is_err());
    }
}
