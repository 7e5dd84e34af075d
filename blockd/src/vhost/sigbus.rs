//! Surviving a front end that cuts its memory short.
//!
//! Guest memory is a file that the front end shares; when it truncates the file, touching the lost pages raises
//! SIGBUS, which would end the daemon and with it every other machine's disks. The handler puts zeroed pages where
//! the fault happened, if that is in guest memory, and lets the access go on: the front end has only hurt itself.
//! A SIGBUS from anywhere else ends the process as ever.

use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Ranges that are guest memory: start and length, 0 where the place is free. A fixed table, because a signal handler
/// can take no lock.
const GUARDS: usize = 4096;
static STARTS: [AtomicUsize; GUARDS] = [const { AtomicUsize::new(0) }; GUARDS];
static LENGTHS: [AtomicUsize; GUARDS] = [const { AtomicUsize::new(0) }; GUARDS];
static INSTALL: Once = Once::new();

/// Protects a mapping. Ranges beyond the table's size are not protected, only served.
pub(super) fn guard(start: usize, len: usize) {
    INSTALL.call_once(install);
    for (s, l) in STARTS.iter().zip(&LENGTHS) {
        if s.compare_exchange(0, usize::MAX, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            l.store(len, Ordering::Release);
            s.store(start, Ordering::Release);
            return;
        }
    }
    tracing::warn!("more than {GUARDS} memory regions: one is not guarded against being truncated");
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
        let hit = STARTS.iter().zip(&LENGTHS).any(|(s, l)| {
            let (start, len) = (s.load(Ordering::Acquire), l.load(Ordering::Acquire));
            start != 0 && start != usize::MAX && fault >= start && fault - start < len
        });
        if hit {
            let page = fault & !4095;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            let got = libc::mmap(page as *mut _, 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
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
