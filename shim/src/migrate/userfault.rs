//! Memory whose pages come when they are touched: Linux's userfaultfd (see ioctl_userfaultfd(2)), by its bare system calls.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};

use crate::memory::GuestRam;
use crate::pages::PAGE_BYTES;

/// `USERFAULTFD_IOC_NEW` on `/dev/userfaultfd`.
const IOC_NEW: libc::c_ulong = 0xaa00;
/// `UFFDIO_API`.
const IOC_API: libc::c_ulong = 0xc018_aa3f;
/// `UFFDIO_REGISTER`.
const IOC_REGISTER: libc::c_ulong = 0xc020_aa00;
/// `UFFDIO_UNREGISTER`.
const IOC_UNREGISTER: libc::c_ulong = 0x8010_aa01;
/// `UFFDIO_WAKE`.
const IOC_WAKE: libc::c_ulong = 0x8010_aa02;
/// `UFFDIO_COPY`.
const IOC_COPY: libc::c_ulong = 0xc028_aa03;
/// `UFFDIO_ZEROPAGE`.
const IOC_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
/// `UFFD_API`.
const API: u64 = 0xaa;
/// `UFFD_FEATURE_MISSING_SHMEM`: for memory of a memfd.
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// `UFFDIO_REGISTER_MODE_MISSING`.
const MODE_MISSING: u64 = 1;
/// `UFFD_EVENT_PAGEFAULT`.
const EVENT_PAGEFAULT: u8 = 0x12;
/// Faults that one read takes at most.
const FAULTS_AT_ONCE: usize = 64;
/// Most times in a row that the kernel may ask to try again, because the address space changes.
const AGAIN_MAX: u32 = 10_000;

#[repr(C)]
#[derive(Default)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
#[derive(Default)]
struct ZeroPage {
    range: Range,
    mode: u64,
    zeroed: i64,
}

/// `struct uffd_msg`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Fault {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    rest: u64,
}

/// What came of putting a page into the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// It is there now, and who waited for it goes on.
    Done,
    /// Something was there already.
    Exists,
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl Userfault {
    /// One that also serves faults of the kernel, as KVM's are.
    ///
    /// # Errors
    /// If the host has none, or this process may not use it.
    pub fn new() -> Result<Self> {
        let fd = open().context(
            "open a userfaultfd: post-copy needs one, which takes access to /dev/userfaultfd or the capability SYS_PTRACE",
        )?;
        let this = Self(fd);
        let mut api = Api { api: API, ..Api::default() };
        this.ioctl(IOC_API, &mut api).context("agree with the kernel on userfaultfd")?;
        ensure!(
            api.features & FEATURE_MISSING_SHMEM != 0,
            "the kernel's userfaultfd does not know memory of a memfd, which post-copy needs"
        );
        Ok(this)
    }

    fn ioctl<T>(&self, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
        // SAFETY: `argument` has the layout that the request takes, as each caller below pairs them, and lives for the call.
        // Requests that write memory of the guest get addresses within a mapping that the caller borrows.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument as *mut T) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// From here on who touches a page of the memory that is not there waits until it is put there.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn register(&self, ram: &GuestRam) -> Result<()> {
        let mut register = Register { range: whole(ram), mode: MODE_MISSING, ioctls: 0 };
        self.ioctl(IOC_REGISTER, &mut register).context("register the guest's memory with userfaultfd")
    }

    /// Pages that are not there are zero again, for those who wait as well.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn unregister(&self, ram: &GuestRam) -> Result<()> {
        self.ioctl(IOC_UNREGISTER, &mut whole(ram)).context("unregister the guest's memory from userfaultfd")
    }

    /// Puts a page there.
    ///
    /// # Errors
    /// If the kernel refuses.
    ///
    /// # Panics
    /// If there is no such page, or the content is not a page's.
    pub fn copy(&self, ram: &GuestRam, page: u64, content: &[u8]) -> Result<Put> {
        assert_eq!(content.len(), PAGE_BYTES);
        self.put(page, || {
            let (dst, src) = (ram.page_pointer(page) as u64, content.as_ptr() as u64);
            let mut copy = Copy { dst, src, len: PAGE_BYTES as u64, mode: 0, copied: 0 };
            self.ioctl(IOC_COPY, &mut copy)
        })
    }

    /// Puts a page of zeroes there.
    ///
    /// # Errors
    /// If the kernel refuses.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn zero(&self, ram: &GuestRam, page: u64) -> Result<Put> {
        self.put(page, || {
            let mut zero = ZeroPage { range: one(ram, page), mode: 0, zeroed: 0 };
            self.ioctl(IOC_ZEROPAGE, &mut zero)
        })
    }

    fn put(&self, page: u64, mut call: impl FnMut() -> io::Result<()>) -> Result<Put> {
        for _ in 0..AGAIN_MAX {
            match call() {
                Ok(()) => return Ok(Put::Done),
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => return Ok(Put::Exists),
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
                Err(error) => {
                    return Err(error).with_context(|| format!("put page {page} into the guest's memory"));
                }
            }
        }
        anyhow::bail!(
            "page {page} cannot be put into the guest's memory: the address space never stops changing"
        )
    }

    /// Lets those who wait for a page look again.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn wake(&self, ram: &GuestRam, page: u64) -> Result<()> {
        self.ioctl(IOC_WAKE, &mut one(ram, page)).with_context(|| format!("wake who waits for page {page}"))
    }

    /// Adds the pages that are being waited for and were not reported yet. Does not wait.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn faults(&self, ram: &GuestRam, into: &mut Vec<u64>) -> Result<()> {
        let mut faults = [Fault::default(); FAULTS_AT_ONCE];
        // SAFETY: the kernel writes whole messages, of which any bytes are valid, into an array of that size at most.
        let read =
            unsafe { libc::read(self.0.as_raw_fd(), faults.as_mut_ptr().cast(), size_of_val(&faults)) };
        if read < 0 {
            let error = io::Error::last_os_error();
            let nothing = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
            return if nothing { Ok(()) } else { Err(error).context("read which pages are waited for") };
        }
        let start = ram.page_pointer(0) as u64;
        for fault in &faults[..read as usize / size_of::<Fault>()] {
            let page = fault.address.wrapping_sub(start) / PAGE_BYTES as u64;
            if fault.event == EVENT_PAGEFAULT && page < ram.pages() {
                into.push(page);
            }
        }
        Ok(())
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn whole(ram: &GuestRam) -> Range {
    Range { start: ram.page_pointer(0) as u64, len: ram.bytes() }
}

fn one(ram: &GuestRam, page: u64) -> Range {
    Range { start: ram.page_pointer(page) as u64, len: PAGE_BYTES as u64 }
}

fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let fd = match File::options().read(true).write(true).open("/dev/userfaultfd") {
        // SAFETY: plain system call; the descriptor is open for the call.
        Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), IOC_NEW, flags) },
        // Older kernels, and those who have the capability but not the device.
        // SAFETY: plain system call without pointers.
        Err(_) => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) as libc::c_int },
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_waited_for_is_reported_and_put_once() {
        let userfault = match Userfault::new() {
            Ok(userfault) => userfault,
            Err(error) => return eprintln!("SKIPPED: {error:#}"),
        };
        let ram = GuestRam::new(4 << 20, false).expect("ram");
        ram.write_pages(1, &[1; PAGE_BYTES]);
        userfault.register(&ram).expect("registered");
        let reader = {
            let ram = ram.clone();
            std::thread::spawn(move || {
                let mut pages = vec![0; 3 * PAGE_BYTES];
                ram.read_pages(1, &mut pages);
                pages
            })
        };
        let mut faults = Vec::new();
        while faults.is_empty() {
            userfault.faults(&ram, &mut faults).expect("read");
        }
        assert_eq!(userfault.copy(&ram, 2, &[2; PAGE_BYTES]).expect("put"), Put::Done);
        assert_eq!(userfault.copy(&ram, 2, &[9; PAGE_BYTES]).expect("tried"), Put::Exists);
        while faults.len() < 2 {
            userfault.faults(&ram, &mut faults).expect("read");
        }
        assert_eq!(faults, [2, 3]);
        assert_eq!(userfault.zero(&ram, 3).expect("put"), Put::Done);
        userfault.wake(&ram, 3).expect("woken");
        let pages = reader.join().expect("reader");
        assert!((0..3).all(|i| pages[i * PAGE_BYTES..][..PAGE_BYTES].iter().all(|b| *b == [1, 2, 0][i])));
        userfault.unregister(&ram).expect("unregistered");
        let mut page = [7; PAGE_BYTES];
        ram.read_pages(9, &mut page);
        assert_eq!(page, [0; PAGE_BYTES]);
    }
}
