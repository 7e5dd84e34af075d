//! Makes machines for migrations that come in, and says which can be made.

use std::fmt;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use kvm_ioctls::Kvm;

use super::machine::{Machine, Parts, VCPUS_MAX};
use super::state::STATE_VERSION;
use super::{cpu, kvm};
use crate::device::Device;
use crate::device::serial::SerialPort;
use crate::machine::{
    CompatibilityReport, CpuDescription, Description, DeviceDescription, Finding, MachineState,
    SourceMachine, TargetHost, TargetMachine,
};
use crate::memory::{GuestRam, HUGE_PAGE_BYTES, MEMORY_MAX_BYTES, huge_pages_free, too_few_huge_pages};

/// Makes the devices of a machine that comes in. What this host gives them (sockets, taps) it has from its command line.
pub trait DeviceMaker: Send + Sync + fmt::Debug {
    /// What keeps this host from making such a device, if anything does.
    fn check(&self, index: usize, wanted: &DeviceDescription) -> Vec<Finding>;

    /// Makes it; it connects to nothing before it runs.
    fn make(&self, index: usize, wanted: &DeviceDescription, ram: &Arc<GuestRam>) -> Result<Arc<dyn Device>>;

    /// The serial line's other end.
    fn serial(&self) -> Result<Arc<SerialPort>>;
}

/// What opens the disks that a source has given away.
pub trait TakeStorage: Send + Sync + fmt::Debug {
    /// See [`TargetMachine::take_storage`].
    fn take(&self, handover: &[u8]) -> Result<()>;
    /// See [`TargetMachine::return_storage`].
    fn give_back(&self) -> Result<()>;
}

/// This host as a target.
#[derive(Debug)]
pub struct KvmHost {
    kvm: Kvm,
    makes: Box<dyn DeviceMaker>,
    storage: Option<Arc<dyn TakeStorage>>,
    latest: Mutex<Option<Arc<Machine>>>,
}

impl KvmHost {
    /// A host whose devices are made so.
    pub fn new(kvm: Kvm, makes: Box<dyn DeviceMaker>, storage: Option<Arc<dyn TakeStorage>>) -> Self {
        Self { kvm, makes, storage, latest: Mutex::new(None) }
    }

    /// The machine that was made last.
    pub fn latest(&self) -> Option<Arc<Machine>> {
        self.latest.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Lets go of the machine that was made last.
    pub fn forget(&self) {
        self.latest.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    }

    /// What this host's processors offer, as a description.
    ///
    /// # Errors
    /// If KVM does not tell.
    pub fn offer(&self) -> Result<CpuDescription> {
        offer(&self.kvm)
    }
}

/// What the processors of this host offer.
///
/// # Errors
/// If KVM does not tell.
pub fn offer(kvm: &Kvm) -> Result<CpuDescription> {
    let leaves = cpu::host_leaves(kvm, None)?;
    Ok(cpu::describe(leaves, None, cpu::msrs(kvm)?, tsc_khz(kvm)?))
}

/// The rate at which a guest's time-stamp counter goes here, kHz.
///
/// # Errors
/// If KVM does not tell.
pub fn tsc_khz(kvm: &Kvm) -> Result<u32> {
    let vm = kvm.create_vm().context("make a virtual machine")?;
    let vcpu = vm.create_vcpu(0).context("make a processor")?;
    vcpu.get_tsc_khz().context("read the rate of the time-stamp counter")
}

fn finding(kind: &str, needed: String, found: String, message: String) -> Finding {
    Finding { kind: kind.into(), fatal: true, needed, found, message }
}

/// Bytes of memory that a new guest may take here without anybody being killed for it.
fn memory_available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

fn check_versions(wanted: &Description) -> Option<Finding> {
    (wanted.state_version != STATE_VERSION).then(|| {
        finding(
            "version",
            format!("state of version {} (kvm-shim {})", wanted.state_version, wanted.shim_version),
            format!("version {STATE_VERSION} (kvm-shim {})", env!("CARGO_PKG_VERSION")),
            format!(
                "the machine's state has version {}, and kvm-shim {} here knows {STATE_VERSION}: bring both to one version",
                wanted.state_version,
                env!("CARGO_PKG_VERSION")
            ),
        )
    })
}

fn check_memory(wanted: &Description) -> Option<Finding> {
    let bytes = wanted.memory_bytes;
    if bytes == 0 || bytes > MEMORY_MAX_BYTES || !bytes.is_multiple_of(2 << 20) {
        let message = format!("a machine can't have {bytes} bytes of memory here");
        return Some(finding("memory", format!("{bytes} bytes"), "a multiple of 2 MiB".into(), message));
    }
    if wanted.huge_pages {
        return check_huge_pages(bytes / HUGE_PAGE_BYTES);
    }
    let available = memory_available()?;
    (bytes > available).then(|| {
        finding(
            "memory",
            format!("{} MiB", bytes >> 20),
            format!("{} MiB available", available >> 20),
            format!(
                "the machine has {} MiB of memory, and this host {} MiB to spare",
                bytes >> 20,
                available >> 20
            ),
        )
    })
}

fn check_huge_pages(needed: u64) -> Option<Finding> {
    let free = huge_pages_free()?;
    (needed > free).then(|| {
        finding(
            "memory",
            format!("{needed} huge pages of 2 MiB"),
            format!("{free} free"),
            too_few_huge_pages(needed, free),
        )
    })
}

/// Two devices of one name would both get what this host has for it: two disks one image, written through both.
fn check_twin(before: &[DeviceDescription], device: &DeviceDescription) -> Option<Finding> {
    let DeviceDescription { kind, id, .. } = device;
    before.iter().any(|other| other.kind == *kind && other.id == *id).then(|| {
        let message = format!(
            "the machine has two {kind} devices named {id}, and what is given for one here would serve both; start it with names \
             that differ (serial=.. of its disks, mac=.. of its network cards)"
        );
        finding("device", "names that differ".into(), format!("{kind} {id} twice"), message)
    })
}

impl TargetHost for KvmHost {
    fn check(&self, wanted: &Description) -> CompatibilityReport {
        let mut findings: Vec<_> = check_versions(wanted).into_iter().collect();
        match self.offer() {
            Ok(offer) => findings.extend(cpu::compare(&wanted.cpu, &offer, cpu::scales_tsc(&self.kvm))),
            Err(error) => findings.push(finding(
                "cpuid",
                "processors".into(),
                "unknown".into(),
                format!("what this host's processors can do is unknown: {error:#}"),
            )),
        }
        findings.extend(check_memory(wanted));
        if wanted.vcpus == 0 || wanted.vcpus > VCPUS_MAX {
            let message =
                format!("the machine has {} processors, here 1 to {VCPUS_MAX} can be", wanted.vcpus);
            findings.push(finding(
                "cpu-count",
                wanted.vcpus.to_string(),
                format!("at most {VCPUS_MAX}"),
                message,
            ));
        }
        for name in kvm::missing_capabilities(&self.kvm, &wanted.capabilities) {
            let message = format!("the machine uses {name} of KVM, which this host's KVM has not");
            findings.push(finding("capability", name, "missing".into(), message));
        }
        for (index, device) in wanted.devices.iter().enumerate() {
            findings.extend(check_twin(&wanted.devices[..index], device));
            findings.extend(self.makes.check(index, device));
        }
        CompatibilityReport { findings }
    }

    fn create(&self, wanted: &Description) -> Result<Box<dyn TargetMachine>> {
        let report = self.check(wanted);
        let reasons: Vec<_> =
            report.findings.iter().filter(|f| f.fatal).map(|f| f.message.as_str()).collect();
        ensure!(reasons.is_empty(), "this host can't run the machine: {}", reasons.join("; "));
        let ram = GuestRam::new(wanted.memory_bytes, wanted.huge_pages)?;
        let devices = wanted
            .devices
            .iter()
            .enumerate()
            .map(|(index, device)| self.makes.make(index, device, &ram))
            .collect::<Result<Vec<_>>>()?;
        let parts = Parts {
            name: wanted.name.clone(),
            ram,
            vcpus: wanted.vcpus,
            cpu: wanted.cpu.clone(),
            serial: self.makes.serial()?,
            devices,
        };
        let machine = Machine::new(&self.kvm, parts)?;
        *self.latest.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(machine.clone());
        Ok(Box::new(Arriving { machine, storage: self.storage.clone(), handed_over: false }))
    }
}

/// A machine that comes in.
#[derive(Debug)]
struct Arriving {
    machine: Arc<Machine>,
    storage: Option<Arc<dyn TakeStorage>>,
    /// Storage was handed over. What stays with the daemon that serves it is not given back: the source uses it.
    handed_over: bool,
}

impl TargetMachine for Arriving {
    fn ram(&self) -> &Arc<GuestRam> {
        SourceMachine::ram(&*self.machine)
    }

    fn restore(&mut self, state: &MachineState) -> Result<()> {
        self.machine.restore(state)
    }

    fn take_storage(&mut self, handover: &[u8]) -> Result<()> {
        self.handed_over = !handover.is_empty();
        match &self.storage {
            Some(storage) => storage.take(handover)?,
            None => ensure!(
                handover.is_empty(),
                "the source hands its disks over, and this side was not told which daemon serves them: give --disk ... \
                 with blockd=SOCKET"
            ),
        }
        // Everything is where it is going to be. The last moment at which the source can go on if a device could not here.
        self.machine.devices().iter().try_for_each(|device| device.preflight())
    }

    fn return_storage(&mut self) -> Result<()> {
        let storage = self.storage.as_ref().filter(|_| self.handed_over);
        storage.map_or(Ok(()), |storage| storage.give_back())
    }

    fn resume(&mut self) -> Result<()> {
        self.machine.start(false)
    }

    fn start_devices(&mut self) -> Result<()> {
        self.machine.start_devices()
    }

    fn announce(&mut self) -> Result<()> {
        self.machine.devices().iter().try_for_each(|device| device.announce())
    }
}
