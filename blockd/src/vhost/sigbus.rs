//! Surviving a front end that cuts its memory short.
//!
//! Guest memory is a file that the front end shares; when it truncates the file, touching the lost pages raises
//! SIGBUS, which would end the daemon and with it every other machine's disks. The handler puts zeroed pages in place of
//! the mapping that the fault is in, if that is guest memory, and lets the access go on: the front end has only hurt
//! itself.
//! A SIGBUS from anywhere else ends the process as ever.

use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Ranges that are guest memory: start and length, 0 where the place is free. A fixed table, because a signal handler
/// can take no lock.
const GUARDS: usize = 4096;
static STARTS: [AtomicUsize; GUARDS] = [const { AtomicUsize::new(0) }; GUARDS];
static LENGTHS: [AtomicUsize; GUARDS] = [const { AtomicUsize::new(0) }; GUARDS];
static INSTALL: Once = Once::new();

/// Protects a mapping of `len` bytes, which is to be unguarded before it goes.
///
/// # Errors
/// When the table is full: such a mapping must not be touched.
pub(super) fn guard(start: usize, len: usize) -> Result<(), &'static str> {
    INSTALL.call_once(install);
    for (s, l) in STARTS.iter().zip(&LENGTHS) {
        if s.compare_exchange(0, usize::MAX, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            l.store(len, Ordering::Release);
            s.store(start, Ordering::Release);
            return Ok(());
        }
    }
    Err("too many memory regions are mapped by all front ends together")
}

/// Takes the protection away, before the mapping goes.
pub(super) fn unguard(start: usize) {
    if let Some(s) = STARTS.iter().find(|s| s.load(Ordering::Acquire) == start) {
        s.store(0, Ordering::Release);
    }
}

fn install() {
    // SAFETY: the handler is async-signal-safe: it reads atomics and calls mmap, sigaction and raise, nothing else.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
    }
}

extern "C" fn handle(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel hands in a valid siginfo; everything called is async-signal-safe.
    unsafe {
        let fault = (*info).si_addr() as usize;
        let hit = STARTS.iter().zip(&LENGTHS).find_map(|(s, l)| {
            let (start, len) = (s.load(Ordering::Acquire), l.load(Ordering::Acquire));
            (start != 0 && start != usize::MAX && fault >= start && fault - start < len)
                .then_some((start, len))
        });
        if let Some((start, len)) = hit {
            // The whole mapping at once: page by page a front end could make us use up all mappings there may be, and
            // pages of a huge page file cannot be replaced one by one.
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
            let got = libc::mmap(start as *mut _, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            if got != libc::MAP_FAILED {
                return;
            }
        }
        let mut default: libc::sigaction = std::mem::zeroed();
        default.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(libc::SIGBUS, &default, std::ptr::null_mut());
        libc::raise(libc::SIGBUS);
    }
}
