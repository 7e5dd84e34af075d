//! Where things are in the memory of the test guest, and what they look like: the one thing that the guest and its host
//! have to agree on. Both compile this file.
//!
//! ```text
//! 0x0000_1000  Parameters   the host writes them once, the guest reads them
//! 0x0000_2000  Control      the host writes at any time, the guest reads
//! 0x0001_0000  Header, then a page for each processor and for each disk: the report; the guest writes, the host reads
//! 0x0010_0000  the program
//!              page tables, stacks, then for each disk its rings, buffers and table of generations
//!              the working set: from here to the end of the memory, or as much as was asked for
//! ```
//!
//! Every structure consists of integers without gaps, so that its bytes are its value.

/// Begins [`Parameters`] and [`Header`].
pub const MAGIC: u64 = u64::from_le_bytes(*b"selftest");
/// Version of everything in this file.
pub const VERSION: u32 = 1;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Words of a page.
pub const PAGE_WORDS: usize = 512;
/// Where [`Parameters`] are.
pub const PARAMETERS_ADDRESS: u64 = 0x1000;
/// Where [`Control`] is.
pub const CONTROL_ADDRESS: u64 = 0x2000;
/// Where the report begins, with [`Header`].
pub const REPORT_ADDRESS: u64 = 0x1_0000;
/// Where the program is linked to, and may not begin below.
pub const PROGRAM_ADDRESS: u64 = 0x10_0000;

/// Most processors.
pub const VCPUS_MAX: usize = 64;
/// Most disks.
pub const DISKS_MAX: usize = 4;
/// Most queues of a disk that are used.
pub const QUEUES_MAX: usize = 8;
/// Most requests in flight in a queue.
pub const DEPTH_MAX: usize = 64;
/// Bytes of a processor's stack, a power of two; each is aligned to it, which tells a panic whose it is.
pub const STACK_BYTES: u64 = 0x1_0000;

/// Writing 4 bytes to this port means "look at the report". The lowest byte is one of the `RING_` reasons, the next one the
/// number of the processor.
pub const REPORT_PORT: u16 = 0x500;
/// The processor begins.
pub const RING_STARTED: u32 = 1;
/// The time between two reports is over.
pub const RING_PERIODIC: u32 = 2;
/// Something is not as it should be.
pub const RING_WRONG: u32 = 3;
/// A command was carried out.
pub const RING_ANSWERED: u32 = 4;
/// Mismatches of a processor, and errors of a disk, that ring at once; later ones wait for the next periodic ring, so that a
/// guest whose memory is all wrong still gets on.
pub const RINGS_MAX: u64 = 64;

/// Do the work.
pub const COMMAND_RUN: u32 = 0;
/// Finish what is in flight and rest.
pub const COMMAND_STOP: u32 = 1;
/// Finish what is in flight, read and verify everything, and rest.
pub const COMMAND_VERIFY: u32 = 2;

/// Has not begun.
pub const STATE_STARTING: u32 = 0;
/// Works.
pub const STATE_RUNNING: u32 = 1;
/// Verifies as commanded.
pub const STATE_VERIFYING: u32 = 2;
/// Has verified, and rests. What it found is in the counters.
pub const STATE_VERIFIED: u32 = 3;
/// Rests as commanded.
pub const STATE_STOPPED: u32 = 4;
/// Cannot go on: the program panicked, or the disk could not be set up or broke the rules of its ring.
pub const STATE_FAILED: u32 = 5;

/// Pages in the order of their addresses.
pub const PATTERN_SEQUENTIAL: u32 = 0;
/// Pages in an order that differs from lap to lap, each once a lap.
pub const PATTERN_RANDOM: u32 = 1;
/// No page at all.
pub const PATTERN_IDLE: u32 = 2;

/// A few words of each page.
pub const FILL_LINE: u32 = 0;
/// Every word of each page.
pub const FILL_FULL: u32 = 1;

/// What the host asks for once.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Parameters {
    /// [`MAGIC`].
    pub magic: u64,
    /// [`VERSION`].
    pub version: u32,
    /// Number of processors, up to [`VCPUS_MAX`].
    pub vcpus: u32,
    /// Goes into everything that is written, so that two runs do not take each other's data for theirs.
    pub seed: u64,
    /// The time-stamp counter at the start, kHz.
    pub tsc_khz: u32,
    /// Milliseconds between periodic rings; 0 for none.
    pub report_ms: u32,
    /// One of `PATTERN_`.
    pub pattern: u32,
    /// One of `FILL_`.
    pub fill: u32,
    /// First address of the working set.
    pub low_start: u64,
    /// Pages from there on.
    pub low_pages: u64,
    /// First address of what of the working set is above the hole for devices.
    pub high_start: u64,
    /// Pages of the whole working set.
    pub pages: u64,
    /// Where the stack of the first processor begins; the others follow.
    pub stacks: u64,
    /// Number of disks, up to [`DISKS_MAX`].
    pub disks: u32,
    /// Zero.
    pub reserved: u32,
    /// The disks.
    pub disk: [DiskParameters; DISKS_MAX],
}

/// What the host asks for of one disk.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskParameters {
    /// Address of its virtio-mmio registers.
    pub mmio: u64,
    /// Where its queues are, each of [`queue_area_bytes`].
    pub queues_start: u64,
    /// Where its table of generations is, 4 bytes a block.
    pub table: u64,
    /// Blocks of 4096 bytes from the start of the disk that are used.
    pub blocks: u64,
    /// Queues to use where the device has so many.
    pub queues: u32,
    /// Requests in flight in each queue.
    pub depth: u32,
    /// Of a hundred requests so many are writes.
    pub write_percent: u32,
    /// A flush after so many writes; 0 for none.
    pub flush_every: u32,
}

/// What the host may change while the guest runs.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Control {
    /// One of `COMMAND_` in the lower half, its number in the upper one: the guest answers each number once.
    pub command: u64,
    /// Bytes of memory to visit per second, all processors together, 4096 for each page; 0 for as many as can be.
    pub rate: u64,
}

/// Begins the report; written by the host.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: u64,
    /// [`VERSION`].
    pub version: u32,
    /// Number of processors.
    pub vcpus: u32,
    /// Number of disks.
    pub disks: u32,
    /// Zero.
    pub reserved: u32,
}

/// First mismatches of a processor, and errors of a disk, that are kept in detail.
pub const DETAILS_MAX: usize = 16;

/// A word of memory is not what was written there.
pub const WRONG_MEMORY: u32 = 1;
/// A register of the x87 unit (as MMX) is not what was put there.
pub const WRONG_MMX: u32 = 2;
/// A register of the SSE unit is not what was put there.
pub const WRONG_SSE: u32 = 3;

/// Something in memory or in a register that is not as it should be.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mismatch {
    /// One of `WRONG_`.
    pub kind: u32,
    /// The word in the page, or the number of the register's half.
    pub word: u32,
    /// Address of the page; 0 for a register.
    pub address: u64,
    /// What should be there.
    pub expected: u64,
    /// What is there.
    pub found: u64,
    /// The lap in which the page was written last.
    pub lap: u64,
}

/// Bytes of a panic's message that are kept.
pub const PANIC_TEXT: usize = 256;

/// What a processor says of itself.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VcpuRecord {
    /// One of `STATE_`.
    pub state: u32,
    /// Valid entries of `first`.
    pub details: u32,
    /// The last [`Control::command`] that was carried out.
    pub answered: u64,
    /// Pages visited, all laps together; added to when the page is written.
    pub visits: u64,
    /// Pages verified since the last command to verify.
    pub verified: u64,
    /// Wrong pages and registers seen.
    pub mismatches: u64,
    /// Times that the registers of the floating-point units were looked at.
    pub register_checks: u64,
    /// Times that the time-stamp counter went back.
    pub tsc_back: u64,
    /// Writes to [`REPORT_PORT`].
    pub rings: u64,
    /// The first mismatches.
    pub first: [Mismatch; DETAILS_MAX],
    /// Bytes of `panic`.
    pub panic_len: u64,
    /// Message of a panic.
    pub panic: [u8; PANIC_TEXT],
}

/// The device is not a virtio block device of version 2; `found` is the register.
pub const DISK_NOT_BLOCK: u32 = 1;
/// The device does not come out of its reset.
pub const DISK_RESET: u32 = 2;
/// The device does not take the features.
pub const DISK_FEATURES: u32 = 3;
/// The device can only be read, but writes were asked for.
pub const DISK_READ_ONLY: u32 = 4;
/// A queue is in use before it was set up, or too small; `found` is the register.
pub const DISK_QUEUE: u32 = 5;
/// The disk has not one block.
pub const DISK_EMPTY: u32 = 6;
/// The used index went on by more than what is in flight.
pub const DISK_USED_INDEX: u32 = 7;
/// A request was completed that is not in flight; `found` is its descriptor.
pub const DISK_COMPLETED_TWICE: u32 = 8;
/// Something was completed that is no request; `found` is its descriptor.
pub const DISK_FOREIGN: u32 = 9;
/// The status of a request is not 0.
pub const DISK_STATUS: u32 = 10;
/// The length of a used element is wrong.
pub const DISK_LENGTH: u32 = 11;
/// Data that was read is not what was written.
pub const DISK_DATA: u32 = 12;
/// The device's status register is not what the driver made it.
pub const DISK_DEVICE_STATUS: u32 = 13;

/// Something about a disk that is not as it should be.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskError {
    /// One of `DISK_`.
    pub kind: u32,
    /// The queue.
    pub queue: u32,
    /// The block, where there is one.
    pub block: u64,
    /// Byte in the block at which the data is wrong.
    pub offset: u64,
    /// What should be there.
    pub expected: u64,
    /// What is there.
    pub found: u64,
}

/// What the guest says of a disk.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskRecord {
    /// One of `STATE_`.
    pub state: u32,
    /// Valid entries of `first`.
    pub details: u32,
    /// Features negotiated.
    pub features: u64,
    /// Sectors of 512 bytes that the device has.
    pub capacity: u64,
    /// Blocks that are used.
    pub blocks: u64,
    /// Queues that are used.
    pub queues: u32,
    /// Requests in flight in each queue, at most.
    pub depth: u32,
    /// Requests in flight now.
    pub in_flight: u64,
    /// Reads completed.
    pub reads: u64,
    /// Writes completed.
    pub writes: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Blocks read whose content was known and right, all together.
    pub verified: u64,
    /// Blocks known right since the last command to verify.
    pub verified_now: u64,
    /// Writes to the notification register.
    pub kicks: u64,
    /// 1 while requests are in flight and none was completed for a second.
    pub stalled: u64,
    /// The longest time without a completion while requests were in flight, in microseconds by the time-stamp counter.
    pub longest_gap_us: u64,
    /// Errors seen.
    pub errors: u64,
    /// The first errors.
    pub first: [DiskError; DETAILS_MAX],
}

/// Where the record of a processor is.
pub const fn vcpu_record_address(vcpu: u32) -> u64 {
    REPORT_ADDRESS + PAGE * (1 + vcpu as u64)
}

/// Where the record of a disk is.
pub const fn disk_record_address(disk: u32) -> u64 {
    REPORT_ADDRESS + PAGE * (1 + VCPUS_MAX as u64 + disk as u64)
}

/// Where the report ends.
pub const REPORT_END: u64 = disk_record_address(DISKS_MAX as u32);

/// Descriptors of a request: header, data in two pieces at most, status.
pub const SLOT_DESCRIPTORS: u16 = 4;
/// Most descriptors of a queue: as many as all slots have.
pub const QUEUE_SIZE_MAX: u16 = SLOT_DESCRIPTORS * DEPTH_MAX as u16;
/// Bytes of what the driver keeps of a request.
pub const SLOT_BYTES: u64 = 128;

/// Pages of a queue: descriptors, available ring, used ring, slots, buffers.
pub const fn queue_area_bytes(depth: u32) -> u64 {
    PAGE * 3 + DEPTH_MAX as u64 * SLOT_BYTES + depth as u64 * PAGE
}

const _: () = {
    assert!(size_of::<Parameters>() <= PAGE as usize);
    assert!(size_of::<VcpuRecord>() <= PAGE as usize);
    assert!(size_of::<DiskRecord>() <= PAGE as usize);
    assert!(REPORT_END <= PROGRAM_ADDRESS);
    assert!(QUEUE_SIZE_MAX as u64 * 16 <= PAGE);
};
