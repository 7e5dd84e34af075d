//! Reads what the test guest says, and commands it.

use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::layout;
use crate::memory::GuestRam;

/// What a processor or a disk of the test guest is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Has not begun.
    Starting,
    /// Does its work.
    Running,
    /// Verifies everything, as commanded.
    Verifying,
    /// Has verified everything and rests. Whether all was right is in the counters.
    Verified,
    /// Rests, as commanded.
    Stopped,
    /// Something was wrong, or it cannot go on.
    Failed,
}

/// What the test guest can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Do the work.
    Run,
    /// Finish the I/O in flight and rest.
    Stop,
    /// Finish the I/O in flight, verify all memory and all blocks written so far, and rest.
    Verify,
}

/// Something in memory or in a register that is not as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatch {
    /// What it is.
    pub kind: MismatchKind,
    /// Guest-physical address of the 8 bytes, 0 for a register.
    pub address: u64,
    /// Word of the page (the first one has the page in its upper half and the lap in its lower one), or number of the register.
    pub word: u32,
    /// What should be there.
    pub expected: u64,
    /// What is there.
    pub found: u64,
    /// The lap that wrote the page last.
    pub lap: u64,
}

/// What is not as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MismatchKind {
    /// A word of memory.
    Memory,
    /// A register of the x87 unit, used as MMX.
    MmxRegister,
    /// Half a register of the SSE unit.
    SseRegister,
}

/// What a processor says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuReport {
    /// What it is at.
    pub state: State,
    /// Number of the last command that it carried out.
    pub answered: u32,
    /// Pages of its part of the working set.
    pub pages: u64,
    /// Whole laps through them.
    pub laps: u64,
    /// Pages visited, all laps together.
    pub visits: u64,
    /// Pages verified since the last command to verify.
    pub verified: u64,
    /// Wrong pages and registers seen.
    pub mismatches: u64,
    /// The first of them.
    pub first_mismatches: Vec<Mismatch>,
    /// Times that the floating-point registers were verified.
    pub register_checks: u64,
    /// Times that the time-stamp counter went back.
    pub tsc_back: u64,
    /// Writes to the port.
    pub rings: u64,
    /// Message of a panic of the guest's program.
    pub panic: Option<String>,
}

/// What is wrong with a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskErrorKind {
    /// It is no virtio block device of version 2; `found` is a register.
    NotBlock,
    /// It does not come out of its reset.
    Reset,
    /// It does not take the features in `found`, or has not got VIRTIO_F_VERSION_1.
    Features,
    /// It can only be read, but writes were asked for.
    ReadOnly,
    /// A queue was ready before it was set up, or is smaller than a request.
    Queue,
    /// It has not got one block.
    Empty,
    /// The used index went on by `found`, with only `expected` requests in flight.
    UsedIndex,
    /// A request was completed that was not in flight; `found` is its descriptor.
    CompletedTwice,
    /// Something was completed that is no request; `found` is its descriptor.
    Foreign,
    /// A request's status is `found`, not 0.
    Status,
    /// A used element says that `found` bytes were written.
    Length,
    /// Data that was read is not what was written last.
    Data,
    /// The device's status register is not what the driver made it.
    DeviceStatus,
}

/// Something about a disk that is not as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskError {
    /// What it is.
    pub kind: DiskErrorKind,
    /// The queue.
    pub queue: u32,
    /// The block of 4096 bytes, where there is one.
    pub block: u64,
    /// Byte in the block.
    pub offset: u64,
    /// What should be there.
    pub expected: u64,
    /// What is there.
    pub found: u64,
}

/// What is said of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskReport {
    /// What it is at: starting, running or failed.
    pub state: State,
    /// Virtio features negotiated.
    pub features: u64,
    /// Sectors of 512 bytes that the device has.
    pub capacity_sectors: u64,
    /// Blocks of 4096 bytes that are used.
    pub blocks: u64,
    /// Queues that are used.
    pub queues: u32,
    /// Most requests in flight in each.
    pub depth: u32,
    /// Requests in flight.
    pub in_flight: u64,
    /// Reads completed.
    pub reads: u64,
    /// Writes completed.
    pub writes: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Blocks read and found right, all together.
    pub verified: u64,
    /// Blocks found right since the last command to verify.
    pub verified_now: u64,
    /// Notifications.
    pub kicks: u64,
    /// Whether nothing was completed for a second though something is in flight. No error by itself.
    pub stalled: bool,
    /// Longest time without a completion while something was in flight, microseconds by the guest's clock, which may jump.
    pub longest_gap_us: u64,
    /// Errors seen.
    pub errors: u64,
    /// The first of them.
    pub first_errors: Vec<DiskError>,
}

/// The whole report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// `failed` if anything is wrong; otherwise what the processor is at that has got least far.
    pub state: State,
    /// Number of the command that stands, see [`send_command`].
    pub command: u32,
    /// Wrong pages and registers, all processors together.
    pub mismatches: u64,
    /// Errors of all disks.
    pub disk_errors: u64,
    /// Each processor.
    pub vcpus: Vec<VcpuReport>,
    /// Each disk.
    pub disks: Vec<DiskReport>,
}

impl Report {
    /// Whether nothing wrong was seen so far.
    pub fn is_right(&self) -> bool {
        self.state != State::Failed
    }

    /// Whether every processor has carried out the command that [`send_command`] gave this number.
    pub fn answered(&self, number: u32) -> bool {
        self.vcpus.iter().all(|vcpu| vcpu.answered == number)
    }

    /// Pages visited, all processors together.
    pub fn visits(&self) -> u64 {
        self.vcpus.iter().map(|vcpu| vcpu.visits).sum()
    }
}

/// Why the guest writes to [`super::REPORT_PORT`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RingReason {
    /// A processor begins.
    Started,
    /// The time between two reports is over.
    Periodic,
    /// Something is wrong.
    Wrong,
    /// A command was carried out.
    Answered,
}

/// What the guest writes to [`super::REPORT_PORT`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ring {
    /// Why.
    pub reason: RingReason,
    /// Which processor.
    pub vcpu: u8,
}

impl Ring {
    /// From the bytes of the write; `None` if they make no sense.
    pub fn parse(data: &[u8]) -> Option<Self> {
        let value = u32::from_le_bytes(data.try_into().ok()?);
        let reason = match value & 0xff {
            layout::RING_STARTED => RingReason::Started,
            layout::RING_PERIODIC => RingReason::Periodic,
            layout::RING_WRONG => RingReason::Wrong,
            layout::RING_ANSWERED => RingReason::Answered,
            _ => return None,
        };
        (value >> 16 == 0).then_some(Self { reason, vcpu: (value >> 8) as u8 })
    }
}

fn state(word: u32, whose: &str) -> Result<State> {
    Ok(match word {
        layout::STATE_STARTING => State::Starting,
        layout::STATE_RUNNING => State::Running,
        layout::STATE_VERIFYING => State::Verifying,
        layout::STATE_VERIFIED => State::Verified,
        layout::STATE_STOPPED => State::Stopped,
        layout::STATE_FAILED => State::Failed,
        _ => bail!("the report of the test guest says that {whose} is in state {word}, which there is not"),
    })
}

fn mismatch(record: &layout::Mismatch) -> Result<Mismatch> {
    let kind = match record.kind {
        layout::WRONG_MEMORY => MismatchKind::Memory,
        layout::WRONG_MMX => MismatchKind::MmxRegister,
        layout::WRONG_SSE => MismatchKind::SseRegister,
        kind => bail!("the report of the test guest has a mismatch of kind {kind}, which there is not"),
    };
    let layout::Mismatch { word, address, expected, found, lap, .. } = *record;
    let in_page =
        if kind == MismatchKind::Memory { u64::from(word % layout::PAGE_WORDS as u32) * 8 } else { 0 };
    Ok(Mismatch { kind, address: address.saturating_add(in_page), word, expected, found, lap })
}

fn disk_error(record: &layout::DiskError) -> Result<DiskError> {
    use DiskErrorKind::*;
    let kind = match record.kind {
        layout::DISK_NOT_BLOCK => NotBlock,
        layout::DISK_RESET => Reset,
        layout::DISK_FEATURES => Features,
        layout::DISK_READ_ONLY => ReadOnly,
        layout::DISK_QUEUE => Queue,
        layout::DISK_EMPTY => Empty,
        layout::DISK_USED_INDEX => UsedIndex,
        layout::DISK_COMPLETED_TWICE => CompletedTwice,
        layout::DISK_FOREIGN => Foreign,
        layout::DISK_STATUS => Status,
        layout::DISK_LENGTH => Length,
        layout::DISK_DATA => Data,
        layout::DISK_DEVICE_STATUS => DeviceStatus,
        kind => bail!("the report of the test guest has a disk error of kind {kind}, which there is not"),
    };
    let layout::DiskError { queue, block, offset, expected, found, .. } = *record;
    Ok(DiskError { kind, queue, block, offset, expected, found })
}

fn read<T: ByteValued>(ram: &GuestRam, address: u64) -> Result<T> {
    ram.memory().read_obj(GuestAddress(address)).context("the machine's memory is too small for a test guest")
}

/// The parameters of the guest in this memory, as far as they can be trusted: the guest may have overwritten them.
pub(super) fn parameters(ram: &GuestRam) -> Result<layout::Parameters> {
    let parameters: layout::Parameters = read(ram, layout::PARAMETERS_ADDRESS)?;
    ensure!(parameters.magic == layout::MAGIC, "this machine does not run the built-in test guest");
    ensure!(
        parameters.version == layout::VERSION,
        "this machine runs version {} of the test guest, and this program knows version {}; use the program that started it",
        parameters.version,
        layout::VERSION
    );
    let in_range = (1..=layout::VCPUS_MAX as u32).contains(&parameters.vcpus)
        && parameters.disks as usize <= layout::DISKS_MAX
        && parameters.low_pages <= parameters.pages
        && parameters.pages <= ram.pages();
    ensure!(in_range, "the test guest's parameters were overwritten: {parameters:?}");
    Ok(parameters)
}

/// What the test guest says, at any time. While it runs, numbers may be of slightly different moments.
///
/// # Errors
/// If there is no test guest in this memory, or what it says makes no sense.
pub fn report(ram: &GuestRam) -> Result<Report> {
    let parameters = parameters(ram)?;
    let header: layout::Header = read(ram, layout::REPORT_ADDRESS)?;
    let expected = layout::Header {
        magic: layout::MAGIC,
        version: layout::VERSION,
        vcpus: parameters.vcpus,
        disks: parameters.disks,
        reserved: 0,
    };
    ensure!(header == expected, "the head of the test guest's report was overwritten: {header:?}");
    let control: layout::Control = read(ram, layout::CONTROL_ADDRESS)?;
    let vcpus: Vec<_> =
        (0..parameters.vcpus).map(|vcpu| vcpu_report(ram, &parameters, vcpu)).collect::<Result<_>>()?;
    let disks: Vec<_> = (0..parameters.disks).map(|disk| disk_report(ram, disk)).collect::<Result<_>>()?;
    let mismatches = vcpus.iter().map(|vcpu| vcpu.mismatches).fold(0, u64::saturating_add);
    let disk_errors = disks.iter().map(|disk| disk.errors).fold(0, u64::saturating_add);
    let failed = mismatches > 0
        || disk_errors > 0
        || vcpus.iter().any(|vcpu| vcpu.state == State::Failed)
        || disks.iter().any(|disk| disk.state == State::Failed);
    let state = if failed { State::Failed } else { least_far(&vcpus) };
    Ok(Report { state, command: (control.command >> 32) as u32, mismatches, disk_errors, vcpus, disks })
}

fn least_far(vcpus: &[VcpuReport]) -> State {
    let order = [State::Starting, State::Running, State::Verifying, State::Stopped, State::Verified];
    let states = order.into_iter().find(|state| vcpus.iter().any(|vcpu| vcpu.state == *state));
    states.unwrap_or(State::Starting)
}

fn vcpu_report(ram: &GuestRam, parameters: &layout::Parameters, vcpu: u32) -> Result<VcpuReport> {
    let record: layout::VcpuRecord = read(ram, layout::vcpu_record_address(vcpu))?;
    let (_, pages) = super::pattern::slice(parameters.pages, parameters.vcpus, vcpu);
    let details = (record.details as usize).min(layout::DETAILS_MAX);
    let panic = &record.panic[..(record.panic_len as usize).min(layout::PANIC_TEXT)];
    let state = state(record.state, &format!("processor {vcpu}"))?;
    Ok(VcpuReport {
        state,
        answered: (record.answered >> 32) as u32,
        pages,
        laps: record.visits.checked_div(pages).unwrap_or(0),
        visits: record.visits,
        verified: record.verified,
        mismatches: record.mismatches,
        first_mismatches: record.first[..details].iter().map(mismatch).collect::<Result<_>>()?,
        register_checks: record.register_checks,
        tsc_back: record.tsc_back,
        rings: record.rings,
        panic: (state == State::Failed).then(|| String::from_utf8_lossy(panic).into_owned()),
    })
}

fn disk_report(ram: &GuestRam, disk: u32) -> Result<DiskReport> {
    let record: layout::DiskRecord = read(ram, layout::disk_record_address(disk))?;
    let details = (record.details as usize).min(layout::DETAILS_MAX);
    Ok(DiskReport {
        state: state(record.state, &format!("disk {disk}"))?,
        features: record.features,
        capacity_sectors: record.capacity,
        blocks: record.blocks,
        queues: record.queues,
        depth: record.depth,
        in_flight: record.in_flight,
        reads: record.reads,
        writes: record.writes,
        flushes: record.flushes,
        verified: record.verified,
        verified_now: record.verified_now,
        kicks: record.kicks,
        stalled: record.stalled != 0,
        longest_gap_us: record.longest_gap_us,
        errors: record.errors,
        first_errors: record.first[..details].iter().map(disk_error).collect::<Result<_>>()?,
    })
}

/// Tells the test guest something, at any time, also while it is paused. The number that is returned is in
/// [`VcpuReport::answered`] of each processor that has carried it out; a later command replaces one that is not carried out yet.
///
/// # Errors
/// If there is no test guest in this memory.
pub fn send_command(ram: &GuestRam, command: Command) -> Result<u32> {
    parameters(ram)?;
    let word = match command {
        Command::Run => layout::COMMAND_RUN,
        Command::Stop => layout::COMMAND_STOP,
        Command::Verify => layout::COMMAND_VERIFY,
    };
    let control: layout::Control = read(ram, layout::CONTROL_ADDRESS)?;
    // 0 is the command that the guest starts with.
    let number = ((control.command >> 32) as u32).wrapping_add(1).max(1);
    let address = GuestAddress(layout::CONTROL_ADDRESS);
    ram.memory()
        .store(u64::from(number) << 32 | u64::from(word), address, Ordering::Release)
        .context("write the command")?;
    Ok(number)
}

/// Changes how many bytes the test guest visits per second, 0 for as many as can be.
///
/// # Errors
/// If there is no test guest in this memory.
pub fn set_rate(ram: &GuestRam, bytes_per_s: u64) -> Result<()> {
    parameters(ram)?;
    let address = layout::CONTROL_ADDRESS + std::mem::offset_of!(layout::Control, rate) as u64;
    ram.memory().store(bytes_per_s, GuestAddress(address), Ordering::Release).context("write the rate")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{SelftestOptions, load};

    fn loaded() -> std::sync::Arc<GuestRam> {
        let ram = GuestRam::new(8 << 20, false).expect("memory");
        load(&ram, &SelftestOptions::default(), 2, &[0xd000_0000], 1_000_000).expect("it loads");
        ram
    }

    #[test]
    fn a_guest_that_never_ran_is_starting_and_right() {
        let report = report(&loaded()).expect("a report");
        assert_eq!((report.state, report.vcpus.len(), report.disks.len()), (State::Starting, 2, 1));
        assert!(report.is_right() && report.answered(0));
    }

    #[test]
    fn memory_without_a_test_guest_is_told() {
        let ram = GuestRam::new(8 << 20, false).expect("memory");
        let error = report(&ram).expect_err("no guest").to_string();
        assert!(error.contains("does not run the built-in test guest"), "{error}");
        assert!(send_command(&ram, Command::Stop).is_err() && set_rate(&ram, 0).is_err());
    }

    #[test]
    fn commands_have_numbers_and_are_noted_as_written_memory() {
        let ram = loaded();
        let mut set = crate::pages::PageSet::empty(ram.pages());
        ram.take_own_writes(&mut set);
        set.clear();
        assert_eq!(send_command(&ram, Command::Stop).expect("sent"), 1);
        assert_eq!(send_command(&ram, Command::Run).expect("sent"), 2);
        ram.take_own_writes(&mut set);
        assert_eq!(set.iter().collect::<Vec<_>>(), [layout::CONTROL_ADDRESS / layout::PAGE]);
        set_rate(&ram, 4096).expect("set");
        let control: layout::Control = read(&ram, layout::CONTROL_ADDRESS).expect("memory");
        assert_eq!(control, layout::Control { command: 2 << 32, rate: 4096 });
    }

    #[test]
    fn a_report_that_makes_no_sense_is_refused_not_believed() {
        let state = |record: u64, value: u32| {
            let ram = loaded();
            ram.memory().write_obj(value, GuestAddress(record)).expect("memory");
            report(&ram)
        };
        assert!(state(layout::vcpu_record_address(1), 6).is_err());
        assert!(state(layout::disk_record_address(0), 99).is_err());
        assert!(state(layout::REPORT_ADDRESS, 0).is_err());
        assert!(state(layout::PARAMETERS_ADDRESS + 12, 65).is_err());
        // More details than there is room for, of no kind.
        assert!(state(layout::vcpu_record_address(0) + 4, u32::MAX).is_err());
    }

    #[test]
    fn a_report_survives_json() {
        let report = report(&loaded()).expect("a report");
        let text = serde_json::to_string(&report).expect("JSON");
        assert_eq!(serde_json::from_str::<Report>(&text).expect("JSON"), report);
    }

    #[test]
    fn what_the_port_says_is_understood() {
        let ring = |value: u32| Ring::parse(&value.to_le_bytes());
        assert_eq!(ring(0x0103), Some(Ring { reason: RingReason::Wrong, vcpu: 1 }));
        assert_eq!((ring(0), ring(5), ring(0x10001), Ring::parse(&[1])), (None, None, None, None));
    }
}
