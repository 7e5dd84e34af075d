//! The records that the host reads. Each is written by one processor only, and word by word, so that the host finds sensible
//! numbers whenever it looks: details are written before they are counted.

use core::ptr::write_volatile;

use super::layout::{
    DETAILS_MAX, DiskError, DiskRecord, Mismatch, PANIC_TEXT, REPORT_PORT, RING_WRONG, RINGS_MAX,
    STATE_FAILED, VcpuRecord, disk_record_address, vcpu_record_address,
};
use super::machine::{barrier, out};

macro_rules! get {
    ($record:expr, $field:ident) => {
        // SAFETY: the record is a page of its own that the host made, and this processor alone writes it.
        unsafe { core::ptr::read_volatile(core::ptr::addr_of_mut!((*$record).$field)) }
    };
}

macro_rules! set {
    ($record:expr, $field:ident, $value:expr) => {
        // SAFETY: as in `get`.
        unsafe { core::ptr::write_volatile(core::ptr::addr_of_mut!((*$record).$field), $value) }
    };
}

macro_rules! add {
    ($record:expr, $field:ident, $value:expr) => {{
        let value = get!($record, $field).wrapping_add($value);
        set!($record, $field, value)
    }};
}

pub(crate) use {add, get, set};

/// What a processor says.
pub struct VcpuReport {
    vcpu: u32,
    record: *mut VcpuRecord,
    last_time: u64,
}

impl VcpuReport {
    pub fn new(vcpu: u32) -> Self {
        Self { vcpu, record: vcpu_record_address(vcpu) as *mut VcpuRecord, last_time: 0 }
    }

    pub fn set_state(&mut self, state: u32) {
        set!(self.record, state, state);
    }

    pub fn answer(&mut self, command: u64) {
        set!(self.record, answered, command);
    }

    /// A page is written: `visits` is the number of all visits.
    #[inline]
    pub fn visited(&mut self, visits: u64) {
        // The host relies on it: pages up to here are written.
        barrier();
        set!(self.record, visits, visits);
        barrier();
    }

    pub fn set_verified(&mut self, pages: u64) {
        set!(self.record, verified, pages);
    }

    pub fn registers_checked(&mut self) {
        add!(self.record, register_checks, 1);
    }

    /// Notices a clock that goes back.
    #[inline]
    pub fn saw_time(&mut self, now: u64) {
        if now < self.last_time {
            add!(self.record, tsc_back, 1);
        }
        self.last_time = now;
    }

    /// Something is wrong: counts it, keeps it if it is among the first ones, and tells the host.
    #[cold]
    pub fn mismatch(&mut self, mismatch: Mismatch) {
        let details = get!(self.record, details) as usize;
        if details < DETAILS_MAX {
            // SAFETY: within the record; otherwise as in `get`.
            unsafe { write_volatile(core::ptr::addr_of_mut!((*self.record).first[details]), mismatch) };
            barrier();
            set!(self.record, details, details as u32 + 1);
        }
        add!(self.record, mismatches, 1);
        if get!(self.record, mismatches) <= RINGS_MAX {
            self.ring(RING_WRONG);
        }
    }

    /// Tells the host to look.
    pub fn ring(&mut self, reason: u32) {
        add!(self.record, rings, 1);
        out(REPORT_PORT, reason | self.vcpu << 8);
    }

    /// The program is wrong; the text is to be written.
    pub fn panicked(&mut self) -> PanicText {
        self.set_state(STATE_FAILED);
        PanicText { record: self.record }
    }
}

/// Takes the message of a panic.
pub struct PanicText {
    record: *mut VcpuRecord,
}

impl core::fmt::Write for PanicText {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for byte in text.bytes() {
            let at = get!(self.record, panic_len) as usize;
            if at < PANIC_TEXT {
                // SAFETY: within the record; otherwise as in `get`.
                unsafe { write_volatile(core::ptr::addr_of_mut!((*self.record).panic[at]), byte) };
                set!(self.record, panic_len, at as u64 + 1);
            }
        }
        Ok(())
    }
}

/// What is said of a disk.
pub struct DiskReport {
    pub record: *mut DiskRecord,
}

impl DiskReport {
    pub fn new(disk: u32) -> Self {
        Self { record: disk_record_address(disk) as *mut DiskRecord }
    }

    /// As [`VcpuReport::mismatch`].
    #[cold]
    pub fn error(&mut self, error: DiskError, vcpu: &mut VcpuReport) {
        let details = get!(self.record, details) as usize;
        if details < DETAILS_MAX {
            // SAFETY: within the record; otherwise as in `get`.
            unsafe { write_volatile(core::ptr::addr_of_mut!((*self.record).first[details]), error) };
            barrier();
            set!(self.record, details, details as u32 + 1);
        }
        add!(self.record, errors, 1);
        if get!(self.record, errors) <= RINGS_MAX {
            vcpu.ring(RING_WRONG);
        }
    }
}
