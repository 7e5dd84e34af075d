//! What a migration needs of a machine. [`crate::vm`] implements it for real machines; tests do for a memory that a
//! thread scribbles into.

use std::sync::Arc;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::memory::GuestRam;
use crate::pages::PageSet;

/// What a machine is made of and what it stands on: enough for the target to say whether it can run it, and to make it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// Name of the machine, the same on both sides.
    pub name: String,
    /// Version of the program on the source.
    pub shim_version: String,
    /// Version of the format of the machine's state, of the processors and of the machine as a whole.
    pub state_version: u32,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// Whether it stands in huge pages of 2 MiB.
    pub huge_pages: bool,
    /// Number of processors.
    pub vcpus: u32,
    /// What the guest was told of its processors and what its state needs.
    pub cpu: CpuDescription,
    /// Capabilities of KVM that the machine uses, by name.
    pub capabilities: Vec<String>,
    /// The devices in the order of their places.
    pub devices: Vec<DeviceDescription>,
}

/// What a guest was told of its processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuDescription {
    /// `GenuineIntel`, `AuthenticAMD`, ...
    pub vendor: String,
    /// Model name, for people.
    pub model: String,
    /// Baseline that the guest was started on, if one was asked for.
    pub baseline: Option<String>,
    /// The leaves of CPUID that the guest sees.
    pub cpuid: Vec<CpuidLeaf>,
    /// Model-specific registers that travel with the machine.
    pub msrs: Vec<u32>,
    /// The guest's time-stamp counter, kHz.
    pub tsc_khz: u32,
}

/// One leaf of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// EAX on entry.
    pub function: u32,
    /// ECX on entry.
    pub index: u32,
    /// KVM's flags of the entry.
    pub flags: u32,
    /// EAX, EBX, ECX, EDX.
    pub registers: [u32; 4],
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceDescription {
    /// `serial`, `blk`, `net`.
    pub kind: String,
    /// What tells it from others of its kind: a disk's serial number, a network card's MAC address.
    pub id: String,
    /// Version of the format of its state.
    pub version: u32,
    /// Queues.
    pub queues: u16,
    /// Virtio features that the driver negotiated.
    pub features: u64,
    /// Bytes of the disk, where it is one.
    pub size_bytes: Option<u64>,
}

/// State of processors, machine and devices: JSON in a form of the machine's own, which the wire carries as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MachineState(pub Vec<u8>);

/// A machine that can be sent away. All methods may be called from any thread; none is called twice at once, but for
/// [`SourceMachine::before_copy`], which several senders call for different pages.
pub trait SourceMachine: Send + Sync {
    /// What it is made of.
    fn description(&self) -> Result<Description>;

    /// Its memory.
    fn ram(&self) -> &Arc<GuestRam>;

    /// From here on every page that is written (by processors, by this process, by the backends of devices) is
    /// remembered until it is collected. Pages written before may be reported or not. Idempotent.
    fn start_logging(&self) -> Result<()>;

    /// Ends the remembering; what was remembered is forgotten. Idempotent.
    fn stop_logging(&self) -> Result<()>;

    /// Adds the pages written since they were last collected (or, where [`SourceMachine::before_copy`] does so page by page,
    /// since it was last called for them). On an error some may have been taken: the caller treats every page as dirty.
    fn collect_dirty(&self, into: &mut PageSet) -> Result<()>;

    /// Called before these pages are read for sending: what is written from now on has to be reported again. `bits` are
    /// whole words of a bitmap, of which bit 0 of the first is page `first_page`, a multiple of 64.
    fn before_copy(&self, first_page: u64, bits: &[u64]) -> Result<()>;

    /// Slows the processors down: they rest `percent` of the time, 0 to 99.
    fn throttle(&self, percent: u8);

    /// Stops the processors and drains the devices' queues. When it returns nothing writes the memory any more, and a last
    /// [`SourceMachine::collect_dirty`] finds all that was written. On an error the machine runs as before.
    fn pause(&self) -> Result<()>;

    /// State of everything but the memory. The machine is paused.
    fn save(&self) -> Result<MachineState>;

    /// Goes on after a pause, as if nothing had happened.
    fn resume(&self) -> Result<()>;

    /// Gives the storage away: another process may open the images afterwards. What the target needs for that (path,
    /// generation) is returned, empty where there is nothing to hand over. The machine is paused.
    fn release_storage(&self) -> Result<Vec<u8>>;

    /// Takes back what was given away, because the target will not run the machine.
    fn reclaim_storage(&self) -> Result<()>;

    /// The machine runs elsewhere: ends it here.
    fn end(&self);
}

/// A machine on the target, made for one description; it does not run yet. Dropping it ends it.
pub trait TargetMachine: Send {
    /// Its memory, all zeroes at first.
    fn ram(&self) -> &Arc<GuestRam>;

    /// Takes the state over, but runs nothing and touches no image yet. The memory need not be there yet (post-copy).
    fn restore(&mut self, state: &MachineState) -> Result<()>;

    /// Opens the storage that the source has given away, and looks whether every device would find there what it needs, while
    /// the source can still go on. `handover` is what [`SourceMachine::release_storage`] returned.
    fn take_storage(&mut self, handover: &[u8]) -> Result<()>;

    /// Gives it back: the source takes it again.
    fn return_storage(&mut self) -> Result<()>;

    /// Lets the processors run. Nothing that can fail is left to do here but what KVM refuses; on an error nothing has run.
    /// Devices begin with [`TargetMachine::start_devices`]: until then a guest's notification waits.
    fn resume(&mut self) -> Result<()>;

    /// Lets the devices work, as soon as all of the memory is there: at once after [`TargetMachine::resume`], or at the end of
    /// post-copy. What a backend reads of a page that is not there does not wait for it, unlike a processor. The machine is
    /// here for good by then: a device that lacks something goes on seeking it, and keeps no other from its work.
    fn start_devices(&mut self) -> Result<()> {
        Ok(())
    }

    /// Tells the network where the machine is now (gratuitous ARP and RARP on each network card).
    fn announce(&mut self) -> Result<()>;
}

/// What makes machines on the target.
pub trait TargetHost: Send + Sync {
    /// Whether this host can run such a machine, and if not, why.
    fn check(&self, description: &Description) -> CompatibilityReport;

    /// Makes one that waits for its memory and state.
    fn create(&self, description: &Description) -> Result<Box<dyn TargetMachine>>;
}

/// What stands in the way of a machine on a host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CompatibilityReport {
    /// What was found, the most important first. Empty: nothing differs.
    pub findings: Vec<Finding>,
}

impl CompatibilityReport {
    /// Whether nothing that was found keeps the machine from running.
    pub fn is_compatible(&self) -> bool {
        self.findings.iter().all(|finding| !finding.fatal)
    }
}

/// One difference between what a machine needs and what a host has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// A stable word: `cpu-vendor`, `cpuid`, `msr`, `memory`, `device`, `capability`, `version`, `tsc`.
    pub kind: String,
    /// Whether it keeps the machine from running there.
    pub fatal: bool,
    /// What the machine needs.
    pub needed: String,
    /// What the host has.
    pub found: String,
    /// One sentence, with what to do.
    pub message: String,
}
