//! A driver of a virtio block device that knows what is on the disk: it writes blocks that say what they are, reads them
//! back and verifies them exactly.

use super::layout::*;
use super::machine::{load, read_register, read_register_16, store, write_register};
use super::pattern::{block_words, mix};
use super::queue::{Completion, Outcome, Queue, Request, Shape, TYPE_FLUSH, TYPE_IN, TYPE_OUT, register};
use super::report::{DiskReport, VcpuReport, add, get, set};

// Feature bits (virtio 1.2, 5.2.3 and 6).
const SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
const MULTI_QUEUE: u64 = 1 << 12;
const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;
const WANTED: u64 = SEG_MAX | FLUSH | MULTI_QUEUE | INDIRECT_DESC | EVENT_IDX | VERSION_1;

// Bits of the status register (virtio 1.2, 2.1).
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const WORKING: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK;

// Fields of the configuration (virtio 1.2, 5.2.4).
const CONFIG_CAPACITY: u64 = 0;
const CONFIG_SEG_MAX: u64 = 12;
const CONFIG_NUM_QUEUES: u64 = 34;

/// Reads of a register that is waited for.
const REGISTER_READS_MAX: u32 = 10_000;
/// Blocks looked at for one that no request has.
const PICKS_MAX: u32 = 8;
/// Blocks without data that are skipped in one step.
const SKIPS_MAX: u32 = 4096;
/// Requests made in one step, of each queue.
const SUBMITS_MAX: u32 = 16;

// An entry of the table of generations: what was written last, and two flags.
/// A request has the block.
const BUSY: u32 = 1 << 31;
/// A write failed, so nobody knows what is there.
const UNKNOWN: u32 = 1 << 30;
const GENERATION: u32 = UNKNOWN - 1;

/// What the disk is for at the moment.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Run,
    /// No new requests.
    Drain,
    /// Read everything that was written.
    Verify,
}

pub struct Disk<'a> {
    parameters: &'a DiskParameters,
    seed: u64,
    tsc_khz: u64,
    disk: u32,
    report: DiskReport,
    queues: [Option<Queue>; QUEUES_MAX],
    features: u64,
    segments: u32,
    blocks: u64,
    random: u64,
    writes_until_flush: u32,
    /// The next block to verify.
    cursor: u64,
    /// When a request was completed last, or begun while there was none.
    progress_at: u64,
    failed: bool,
}

impl<'a> Disk<'a> {
    pub fn new(all: &'a Parameters, disk: u32) -> Self {
        let parameters = &all.disk[disk as usize];
        Self {
            parameters,
            seed: all.seed,
            tsc_khz: u64::from(all.tsc_khz),
            disk,
            report: DiskReport::new(disk),
            queues: [const { None }; QUEUES_MAX],
            features: 0,
            segments: 1,
            blocks: 0,
            random: mix(all.seed ^ u64::from(disk)) | 1,
            writes_until_flush: parameters.flush_every,
            cursor: 0,
            progress_at: 0,
            failed: false,
        }
    }

    /// Begins with the device, from its reset to DRIVER_OK (virtio 1.2, 3.1.1). What stands in the way is reported.
    pub fn set_up(&mut self, vcpu: &mut VcpuReport) {
        match self.try_set_up() {
            Ok(()) => set!(self.report.record, state, STATE_RUNNING),
            Err((kind, queue, found)) => {
                self.failed = true;
                set!(self.report.record, state, STATE_FAILED);
                self.report.error(DiskError { kind, queue, found, ..Default::default() }, vcpu);
            }
        }
    }

    fn try_set_up(&mut self) -> Result<(), (u32, u32, u64)> {
        for (register, expected) in
            [(register::MAGIC_VALUE, 0x7472_6976), (register::VERSION, 2), (register::DEVICE_ID, 2)]
        {
            let found = self.read(register);
            if found != expected {
                return Err((DISK_NOT_BLOCK, 0, found.into()));
            }
        }
        self.write(register::STATUS, 0);
        if !(0..REGISTER_READS_MAX).any(|_| self.read(register::STATUS) == 0) {
            return Err((DISK_RESET, 0, self.read(register::STATUS).into()));
        }
        self.write(register::STATUS, ACKNOWLEDGE);
        self.write(register::STATUS, ACKNOWLEDGE | DRIVER);
        self.negotiate()?;
        self.read_configuration()?;
        let offered = match self.features & MULTI_QUEUE {
            0 => 1,
            // SAFETY: a field of the device's configuration.
            _ => unsafe {
                read_register_16(self.parameters.mmio + register::CONFIG + CONFIG_NUM_QUEUES).into()
            },
        };
        let count = self.parameters.queues.min(offered).clamp(1, QUEUES_MAX as u32);
        for index in 0..count {
            let area = u64::from(index) * queue_area_bytes(self.parameters.depth);
            let queue = Queue::set_up(
                self.parameters.mmio,
                index,
                self.parameters.queues_start + area,
                self.parameters.depth,
                self.features & EVENT_IDX != 0,
            )
            .map_err(|found| (DISK_QUEUE, index, found.into()))?;
            set!(self.report.record, depth, queue.depth());
            self.queues[index as usize] = Some(queue);
        }
        set!(self.report.record, queues, count);
        self.write(register::STATUS, WORKING);
        Ok(())
    }

    fn negotiate(&mut self) -> Result<(), (u32, u32, u64)> {
        let half = |half: u32| {
            self.write(register::DEVICE_FEATURES_SEL, half);
            u64::from(self.read(register::DEVICE_FEATURES)) << (half * 32)
        };
        let offered = half(0) | half(1);
        if offered & READ_ONLY != 0 && self.parameters.write_percent > 0 {
            return Err((DISK_READ_ONLY, 0, offered));
        }
        self.features = offered & (WANTED | READ_ONLY);
        if self.features & VERSION_1 == 0 {
            return Err((DISK_FEATURES, 0, offered));
        }
        for half in 0..2 {
            self.write(register::DRIVER_FEATURES_SEL, half);
            self.write(register::DRIVER_FEATURES, (self.features >> (half * 32)) as u32);
        }
        self.write(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if self.read(register::STATUS) & FEATURES_OK == 0 {
            return Err((DISK_FEATURES, 0, self.features));
        }
        set!(self.report.record, features, self.features);
        Ok(())
    }

    fn read_configuration(&mut self) -> Result<(), (u32, u32, u64)> {
        let mut capacity = 0;
        // Until both halves are of one configuration.
        for _ in 0..REGISTER_READS_MAX {
            let before = self.read(register::CONFIG_GENERATION);
            let low = self.read(register::CONFIG + CONFIG_CAPACITY);
            let high = self.read(register::CONFIG + CONFIG_CAPACITY + 4);
            capacity = u64::from(high) << 32 | u64::from(low);
            if self.read(register::CONFIG_GENERATION) == before {
                break;
            }
        }
        if self.features & SEG_MAX != 0 {
            self.segments = self.read(register::CONFIG + CONFIG_SEG_MAX);
        }
        self.blocks = self.parameters.blocks.min(capacity / (PAGE / 512));
        set!(self.report.record, capacity, capacity);
        set!(self.report.record, blocks, self.blocks);
        if self.blocks == 0 { Err((DISK_EMPTY, 0, capacity)) } else { Ok(()) }
    }

    fn read(&self, register: u64) -> u32 {
        // SAFETY: a register of the device.
        unsafe { read_register(self.parameters.mmio + register) }
    }

    fn write(&self, register: u64, value: u32) {
        // SAFETY: a register of the device; the queues are not touched this way.
        unsafe { write_register(self.parameters.mmio + register, value) }
    }

    /// The device has to be as the driver left it.
    pub fn check_device(&mut self, vcpu: &mut VcpuReport) {
        let found = self.read(register::STATUS);
        if !self.failed && found != WORKING {
            let (kind, expected) = (DISK_DEVICE_STATUS, WORKING.into());
            self.report.error(DiskError { kind, expected, found: found.into(), ..Default::default() }, vcpu);
        }
    }

    pub fn begin_verifying(&mut self) {
        self.cursor = 0;
        set!(self.report.record, verified_now, 0);
    }

    /// Takes completions and makes new requests. Whether nothing is left to do in this mode.
    pub fn step(&mut self, now: u64, mode: Mode, vcpu: &mut VcpuReport) -> bool {
        if self.failed {
            return true;
        }
        for index in 0..QUEUES_MAX {
            // The queue is taken out meanwhile, so that it and the rest of the disk can be used side by side.
            let Some(mut queue) = self.queues[index].take() else { break };
            self.reap(&mut queue, now, vcpu);
            if !self.failed {
                match mode {
                    Mode::Run => self.submit_some(&mut queue),
                    Mode::Verify => self.submit_reads(&mut queue),
                    Mode::Drain => {}
                }
                if queue.kick(self.parameters.mmio) {
                    add!(self.report.record, kicks, 1);
                }
            }
            self.queues[index] = Some(queue);
        }
        let in_flight = self.queues.iter().flatten().map(Queue::in_flight).sum::<u32>();
        self.note_progress(now, in_flight);
        in_flight == 0 && (mode != Mode::Verify || self.cursor == self.blocks)
    }

    fn note_progress(&mut self, now: u64, in_flight: u32) {
        if u64::from(in_flight) != get!(self.report.record, in_flight) {
            set!(self.report.record, in_flight, in_flight.into());
        }
        // Nor does the beginning, or a clock that went back, say how long anything takes.
        if in_flight == 0 || self.progress_at == 0 || now < self.progress_at {
            self.progress_at = now;
        }
        let gap_us = (now - self.progress_at) / (self.tsc_khz / 1000).max(1);
        if gap_us > get!(self.report.record, longest_gap_us) {
            set!(self.report.record, longest_gap_us, gap_us);
        }
        let stalled = u64::from(gap_us > 1_000_000);
        if stalled != get!(self.report.record, stalled) {
            set!(self.report.record, stalled, stalled);
        }
    }

    fn error(&mut self, vcpu: &mut VcpuReport, error: DiskError) {
        self.report.error(error, vcpu);
    }

    fn reap(&mut self, queue: &mut Queue, now: u64, vcpu: &mut VcpuReport) {
        let progress = queue.progress();
        if progress.advance > progress.in_flight {
            let (expected, found) = (progress.in_flight.into(), progress.advance.into());
            let (kind, queue) = (DISK_USED_INDEX, queue.index);
            self.error(vcpu, DiskError { kind, queue, expected, found, ..Default::default() });
            if progress.advance > QUEUE_SIZE_MAX {
                // That is no ring any more.
                self.failed = true;
                set!(self.report.record, state, STATE_FAILED);
                return;
            }
        }
        for _ in 0..progress.advance {
            self.progress_at = now;
            let (completion, outcome) = queue.next();
            self.complete(queue, completion, outcome, vcpu);
        }
    }

    fn complete(&mut self, queue: &Queue, completion: Completion, outcome: Outcome, vcpu: &mut VcpuReport) {
        let wrong = |kind, block, expected, found| DiskError {
            kind,
            queue: queue.index,
            block,
            offset: 0,
            expected,
            found,
        };
        let (slot, request, status) = match outcome {
            Outcome::Request { slot, request, status } => (slot, request, status),
            Outcome::Twice => {
                return self.error(vcpu, wrong(DISK_COMPLETED_TWICE, 0, 0, completion.id.into()));
            }
            Outcome::Foreign => return self.error(vcpu, wrong(DISK_FOREIGN, 0, 0, completion.id.into())),
        };
        let is_read = request.kind == TYPE_IN;
        let done = status == 0;
        if !done {
            self.error(vcpu, wrong(DISK_STATUS, request.block, 0, status.into()));
        }
        // What the device wrote: the status, and what was read.
        let expected = if is_read { PAGE as u32 + 1 } else { 1 };
        if done && completion.len != expected {
            self.error(vcpu, wrong(DISK_LENGTH, request.block, expected.into(), completion.len.into()));
        }
        match request.kind {
            TYPE_FLUSH => add!(self.report.record, flushes, 1),
            TYPE_OUT => {
                self.set_entry(
                    request.block,
                    if done { request.generation } else { request.generation | UNKNOWN },
                );
                add!(self.report.record, writes, 1);
            }
            _ => {
                let entry = self.entry(request.block);
                self.set_entry(request.block, entry & !BUSY);
                add!(self.report.record, reads, 1);
                if done && request.generation != 0 {
                    self.verify(queue, slot, request, vcpu);
                }
            }
        }
    }

    fn verify(&mut self, queue: &Queue, slot: u32, request: Request, vcpu: &mut VcpuReport) {
        let buffer = queue.buffer(slot);
        for unit in 0..PAGE / 16 {
            let (one, other) = block_words(self.seed, self.disk, request.block, request.generation, unit);
            for (offset, expected) in [(unit * 16, one), (unit * 16 + 8, other)] {
                // SAFETY: the slot's own buffer, which the device has given back.
                let found: u64 = unsafe { load(buffer + offset) };
                if found != expected {
                    let (kind, queue, block) = (DISK_DATA, queue.index, request.block);
                    return self.error(vcpu, DiskError { kind, queue, block, offset, expected, found });
                }
            }
        }
        add!(self.report.record, verified, 1);
        if request.verifies {
            add!(self.report.record, verified_now, 1);
        }
    }

    fn entry(&self, block: u64) -> u32 {
        // SAFETY: the table has an entry for each block.
        unsafe { load(self.parameters.table + block * 4) }
    }

    fn set_entry(&mut self, block: u64, entry: u32) {
        // SAFETY: as above.
        unsafe { store(self.parameters.table + block * 4, entry) }
    }

    /// The next number of a generator with a period of 2^64 - 1.
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn shape(&mut self) -> Shape {
        let random = self.random();
        let split =
            if self.segments >= 2 && random & 2 != 0 { 512 * (1 + (random >> 8) as u32 % 7) } else { 0 };
        Shape { indirect: self.features & INDIRECT_DESC != 0 && random & 1 != 0, split }
    }

    /// Random reads and writes, and flushes among them.
    fn submit_some(&mut self, queue: &mut Queue) {
        for _ in 0..SUBMITS_MAX {
            if !queue.has_room() {
                return;
            }
            let may_flush = self.parameters.flush_every > 0 && self.features & FLUSH != 0;
            if may_flush && self.writes_until_flush == 0 {
                self.writes_until_flush = self.parameters.flush_every;
                let request = Request { kind: TYPE_FLUSH, block: 0, generation: 0, verifies: false };
                self.submit(queue, request);
                continue;
            }
            let Some((block, entry)) = self.pick() else { return };
            let write_percent = u64::from(self.parameters.write_percent);
            let known = entry != 0 && entry & UNKNOWN == 0;
            // A block of which nothing is known is written first, if anything is.
            let write = write_percent > 0 && (!known || self.random() % 100 < write_percent);
            let request = if write {
                self.writes_until_flush = self.writes_until_flush.saturating_sub(1);
                let generation = (entry + 1) & GENERATION;
                Request { kind: TYPE_OUT, block, generation: generation.max(1), verifies: false }
            } else {
                let generation = if known { entry } else { 0 };
                Request { kind: TYPE_IN, block, generation, verifies: false }
            };
            self.submit(queue, request);
        }
    }

    /// A block that no request has, and its entry.
    fn pick(&mut self) -> Option<(u64, u32)> {
        (0..PICKS_MAX).find_map(|_| {
            let block = self.random() % self.blocks;
            let entry = self.entry(block);
            (entry & BUSY == 0).then_some((block, entry))
        })
    }

    /// Reads of what was written, from the first block to the last one.
    fn submit_reads(&mut self, queue: &mut Queue) {
        let (mut submits, mut skips) = (0, 0);
        while self.cursor < self.blocks && submits < SUBMITS_MAX && skips < SKIPS_MAX && queue.has_room() {
            let entry = self.entry(self.cursor);
            if entry & BUSY != 0 {
                return; // its request was made before the command; it will be completed
            }
            let block = self.cursor;
            self.cursor += 1;
            if entry == 0 || entry & UNKNOWN != 0 {
                skips += 1;
                continue;
            }
            submits += 1;
            self.submit(queue, Request { kind: TYPE_IN, block, generation: entry, verifies: true });
        }
    }

    fn submit(&mut self, queue: &mut Queue, request: Request) {
        let slot = queue.take();
        let buffer = queue.buffer(slot);
        match request.kind {
            TYPE_OUT => {
                for unit in 0..PAGE / 16 {
                    let (one, other) =
                        block_words(self.seed, self.disk, request.block, request.generation, unit);
                    // SAFETY: the slot's own buffer, which the device has no business in yet.
                    unsafe {
                        store(buffer + unit * 16, one);
                        store(buffer + unit * 16 + 8, other);
                    }
                }
                self.set_entry(request.block, request.generation | BUSY);
            }
            TYPE_IN => {
                // What an earlier request left must not pass for this one's data.
                for sector in 0..PAGE / 512 {
                    // SAFETY: as above.
                    unsafe { store(buffer + sector * 512, !0u64) };
                }
                let entry = self.entry(request.block);
                self.set_entry(request.block, entry | BUSY);
            }
            _ => {}
        }
        let shape = self.shape();
        queue.submit(slot, request, shape);
    }
}
