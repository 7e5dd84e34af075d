//! A machine: memory, processors, devices, and what a migration asks of them.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MP_STATE_RUNNABLE, KVM_PIT_SPEAKER_DUMMY, kvm_mp_state, kvm_pit_config,
    kvm_regs, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};

use super::cpu;
use super::kvm::{self, DirtyLogMode};
use super::ports::Ports;
use super::state::{ChipState, FullState, STATE_VERSION, VcpuState};
use super::vcpu::{Buses, Ending, Vcpu};
use crate::device::serial::SerialPort;
use crate::device::{DEVICES_MAX, Device, FIRST_IRQ, MMIO_BYTES, MMIO_START, QUEUE_NOTIFY};
use crate::machine::{CpuDescription, Description, MachineState, SourceMachine};
use crate::memory::{GuestRam, Memory, RamRegion};
use crate::pages::PageSet;

/// Most processors of a machine. One byte has their numbers in tables that guests read.
pub const VCPUS_MAX: u32 = 64;
/// Where KVM keeps the task state segment that VMX wants, in the hole below 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// How often processors that are slowed down are made to look at the time.
const THROTTLE_EVERY: Duration = Duration::from_millis(5);

/// How a machine is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Life {
    /// Made, and has never run here.
    Created,
    /// It runs.
    Running,
    /// It stands still and can go on.
    Paused,
    /// It runs elsewhere now.
    Gone,
    /// The guest shut down or asked for a reset.
    Shutdown,
    /// It can't run any more: the sentence says why.
    Failed(String),
}

impl Life {
    /// Whether it will never run here again.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Gone | Self::Shutdown | Self::Failed(_))
    }

    /// A word for it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Gone => "gone",
            Self::Shutdown => "shutdown",
            Self::Failed(_) => "failed",
        }
    }
}

#[derive(Debug)]
struct LifeCell {
    now: Mutex<Life>,
    changed: Condvar,
}

impl LifeCell {
    fn lock(&self) -> MutexGuard<'_, Life> {
        self.now.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// What is over stays so.
    fn set(&self, to: Life) {
        let mut now = self.lock();
        if !now.is_over() {
            *now = to;
        }
        self.changed.notify_all();
    }
}

/// What those who pause a machine and let it go on tell each other.
#[derive(Debug, Default)]
struct Switching {
    /// Devices wait for [`Machine::start_devices`], whatever is paused and goes on meanwhile: pages may be missing that their
    /// backends would not wait for.
    devices_wait: bool,
    /// A person has paused it: it stays so until a person lets it go on, here or wherever it is by then.
    held: bool,
}

/// What hands a machine's disks over between the daemons that serve them.
pub trait Storage: Send + Sync + fmt::Debug {
    /// See [`SourceMachine::release_storage`].
    fn release(&self) -> Result<Vec<u8>>;
    /// See [`SourceMachine::reclaim_storage`].
    fn reclaim(&self) -> Result<()>;
}

/// What a machine is made of.
pub struct Parts {
    /// Its name.
    pub name: String,
    /// Its memory.
    pub ram: Arc<GuestRam>,
    /// Number of processors.
    pub vcpus: u32,
    /// What the guest is told of them.
    pub cpu: CpuDescription,
    /// The serial line.
    pub serial: Arc<SerialPort>,
    /// Devices in the order of their places.
    pub devices: Vec<Arc<dyn Device>>,
}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts").field("name", &self.name).field("vcpus", &self.vcpus).finish_non_exhaustive()
    }
}

/// A machine on KVM. Dropping it ends it.
#[derive(Debug)]
pub struct Machine {
    // The order matters: processors end before the VM, and the VM before its memory is unmapped.
    vcpus: Vec<Arc<Vcpu>>,
    vm: VmFd,
    buses: Arc<Buses>,
    name: String,
    cpu: CpuDescription,
    mode: DirtyLogMode,
    logging: AtomicBool,
    throttling: Arc<AtomicBool>,
    /// Makes processors that are slowed down look at the time.
    throttler: Mutex<Option<JoinHandle<()>>>,
    life: Arc<LifeCell>,
    storage: Mutex<Option<Arc<dyn Storage>>>,
    /// Serialises pausing and going on.
    switching: Mutex<Switching>,
    ram: Arc<GuestRam>,
}

impl Machine {
    /// Makes a machine that stands still.
    ///
    /// # Errors
    /// If KVM refuses a part.
    pub fn new(kvm: &Kvm, parts: Parts) -> Result<Arc<Self>> {
        ensure!(
            (1..=VCPUS_MAX).contains(&parts.vcpus),
            "a machine has 1 to {VCPUS_MAX} processors, not {}",
            parts.vcpus
        );
        ensure!(
            parts.devices.len() <= DEVICES_MAX,
            "a machine has at most {DEVICES_MAX} disks and network cards, not {}",
            parts.devices.len()
        );
        let vm = kvm.create_vm().context("make a virtual machine")?;
        vm.set_tss_address(TSS_ADDRESS).context("place the task state segment")?;
        vm.create_irq_chip().context("make the interrupt controllers")?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).context("make the timer")?;
        let mode = kvm::choose_dirty_log_mode(&vm);
        for region in parts.ram.regions() {
            set_slot(&vm, &parts.ram, region, 0).context("give the machine its memory")?;
        }
        connect_interrupts(&vm, &parts.serial, &parts.devices)?;
        let buses = Arc::new(Buses { ports: Ports::new(parts.serial), devices: parts.devices });
        let life = Arc::new(LifeCell { now: Mutex::new(Life::Created), changed: Condvar::new() });
        let vcpus = (0..parts.vcpus)
            .map(|number| make_vcpu(&vm, number, parts.vcpus, &parts.cpu, &buses, &life).map(Arc::new))
            .collect::<Result<Vec<_>>>()?;
        Ok(Arc::new(Self {
            vcpus,
            vm,
            buses,
            name: parts.name,
            cpu: parts.cpu,
            mode,
            logging: AtomicBool::new(false),
            throttling: Arc::new(AtomicBool::new(false)),
            throttler: Mutex::new(None),
            life,
            storage: Mutex::new(None),
            switching: Mutex::default(),
            ram: parts.ram,
        }))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How it is.
    pub fn life(&self) -> Life {
        self.life.lock().clone()
    }

    /// Waits until it will never run here again, at most so long; says how it is then.
    pub fn wait_until_over(&self, timeout: Duration) -> Life {
        let now = self.life.lock();
        match self.life.changed.wait_timeout_while(now, timeout, |life| !life.is_over()) {
            Ok((life, _)) => life.clone(),
            Err(poisoned) => poisoned.into_inner().0.clone(),
        }
    }

    /// Its processors.
    pub fn vcpus(&self) -> &[Arc<Vcpu>] {
        &self.vcpus
    }

    /// Its ports.
    pub fn ports(&self) -> &Ports {
        &self.buses.ports
    }

    /// Its devices in the order of their places.
    pub fn devices(&self) -> &[Arc<dyn Device>] {
        &self.buses.devices
    }

    /// How its dirty log is read.
    pub fn dirty_log_mode(&self) -> DirtyLogMode {
        self.mode
    }

    /// Who hands the disks over when the machine is sent away; nobody where they stay with the daemon that serves them.
    pub fn set_storage(&self, storage: Option<Arc<dyn Storage>>) {
        *self.storage.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = storage;
    }

    fn storage(&self) -> Option<Arc<dyn Storage>> {
        self.storage.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Sets the registers with which a processor of a new machine begins. `change` gets its special registers.
    ///
    /// # Errors
    /// If there is no such processor, or KVM refuses.
    pub fn begin(
        &self,
        number: usize,
        regs: &kvm_regs,
        change: impl FnOnce(&mut kvm_sregs, &Memory) -> Result<()>,
    ) -> Result<()> {
        ensure!(self.life() == Life::Created, "the machine {} has begun already", self.name);
        let vcpu = self.vcpus.get(number).with_context(|| format!("there is no processor {number}"))?.fd();
        let mut sregs = vcpu.get_sregs().context("read the special registers")?;
        change(&mut sregs, self.ram.memory())?;
        vcpu.set_sregs(&sregs).context("set the special registers")?;
        vcpu.set_regs(regs).context("set the registers")?;
        let runnable = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
        vcpu.set_mp_state(runnable).context("set the run state")
    }

    fn switching(&self) -> MutexGuard<'_, Switching> {
        self.switching.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Lets processors run, and devices too if `devices`. Without them, devices stay as they are until
    /// [`Machine::start_devices`], whoever else has the machine go on before.
    ///
    /// # Errors
    /// If a device can't; then nothing runs.
    pub fn start(&self, devices: bool) -> Result<()> {
        let mut switching = self.switching();
        let life = self.life();
        ensure!(!life.is_over(), "the machine {} can't run: it is {}", self.name, life.name());
        switching.devices_wait |= !devices;
        if switching.held {
            self.life.set(Life::Paused);
            return Ok(());
        }
        if !switching.devices_wait {
            self.resume_devices()?;
        }
        self.vcpus.iter().for_each(|vcpu| vcpu.run());
        self.life.set(Life::Running);
        Ok(())
    }

    /// Pauses it until [`Machine::let_go`], also if it is moved, saved, or goes on after either has failed.
    ///
    /// # Errors
    /// As [`SourceMachine::pause`].
    pub fn hold(&self) -> Result<()> {
        self.pause_all()?;
        self.switching().held = true;
        Ok(())
    }

    /// Lets it run, after [`Machine::hold`] too.
    ///
    /// # Errors
    /// If a device can't; then nothing runs.
    pub fn let_go(&self) -> Result<()> {
        self.switching().held = false;
        self.start(true)
    }

    /// Ends it for good: it is shut down.
    pub fn stop(&self) {
        self.life.set(Life::Shutdown);
    }

    /// Ends it for good: something that it can't be without is lost.
    pub fn fail(&self, why: &str) {
        self.life.set(Life::Failed(why.to_owned()));
    }

    /// Lets the devices work, of a machine whose processors were started without them. If it does not run now they begin
    /// when it goes on. There is no way back from here: each device goes on for itself, and one that has not what it needs
    /// seeks it.
    ///
    /// # Errors
    /// None that is known.
    pub fn start_devices(&self) -> Result<()> {
        let mut switching = self.switching();
        switching.devices_wait = false;
        if self.life() == Life::Running {
            self.buses.devices.iter().for_each(|device| device.go_on());
        }
        Ok(())
    }

    /// The devices go on; on an error those that did are stopped again.
    fn resume_devices(&self) -> Result<()> {
        for (i, device) in self.buses.devices.iter().enumerate() {
            if let Err(error) = device.resume() {
                for before in &self.buses.devices[..i] {
                    if let Err(error) = before.pause() {
                        tracing::warn!(error = format!("{error:#}"), "a device goes on that should not");
                    }
                }
                let description = device.description();
                return Err(error.context(format!("start the {} {}", description.kind, description.id)));
            }
        }
        Ok(())
    }

    fn pause_all(&self) -> Result<()> {
        let _alone = self.switching();
        let life = self.life();
        match life {
            Life::Running => {}
            Life::Paused | Life::Created => return Ok(()),
            _ => bail!("the machine {} can't be paused: it is {}", self.name, life.name()),
        }
        self.vcpus.iter().for_each(|vcpu| vcpu.ask_to_stand());
        let stood: Result<()> = self.vcpus.iter().try_for_each(|vcpu| vcpu.wait_until_it_stands());
        let paused = stood.and_then(|()| self.pause_devices());
        if let Err(error) = paused {
            self.vcpus.iter().for_each(|vcpu| vcpu.run());
            return Err(error);
        }
        if let Some(Ending::Failed(why)) = self.vcpus.iter().find_map(|vcpu| vcpu.ending()) {
            bail!("the machine {} has failed: {why}", self.name);
        }
        self.life.set(Life::Paused);
        Ok(())
    }

    fn pause_devices(&self) -> Result<()> {
        for (i, device) in self.buses.devices.iter().enumerate() {
            if let Err(error) = device.pause() {
                // The processors run on, so no device may be left behind, whatever has become of what it needs.
                self.buses.devices[..i].iter().for_each(|before| before.go_on());
                let description = device.description();
                return Err(error.context(format!("drain the {} {}", description.kind, description.id)));
            }
        }
        Ok(())
    }

    /// Puts a state into a machine that has not run.
    ///
    /// # Errors
    /// If it does not fit, or KVM refuses a part. The machine is not to be run then.
    pub fn restore(&self, state: &MachineState) -> Result<()> {
        let state: FullState = serde_json::from_slice(&state.0)
            .context("the machine's state is not what this version writes")?;
        ensure!(
            state.version == STATE_VERSION,
            "the machine's state has version {}, and this program knows {STATE_VERSION}",
            state.version
        );
        ensure!(
            state.vcpus.len() == self.vcpus.len(),
            "the state has {} processors, the machine {}",
            state.vcpus.len(),
            self.vcpus.len()
        );
        ensure!(
            state.devices.len() == self.buses.devices.len() + 1,
            "the state has {} devices, the machine {}",
            state.devices.len().saturating_sub(1),
            self.buses.devices.len()
        );
        // Against the way that interrupts go.
        self.switching().held = state.held;
        for (vcpu, state) in self.vcpus.iter().zip(&state.vcpus) {
            state.restore(&vcpu.fd())?;
        }
        state.chips.restore(&self.vm)?;
        self.buses.ports.serial.restore(&state.devices[0]).context("restore the serial line")?;
        for (device, state) in self.buses.devices.iter().zip(&state.devices[1..]) {
            device.restore(state).with_context(|| format!("restore the {} {}", state.kind, state.id))?;
        }
        Ok(())
    }

    fn full_state(&self) -> Result<FullState> {
        let mut devices = vec![self.buses.ports.serial.save().context("save the serial line")?];
        for device in &self.buses.devices {
            devices.push(device.save()?);
        }
        // The way that interrupts go, as [`super::state`] explains.
        let chips = ChipState::save(&self.vm)?;
        let vcpus = self.vcpus.iter().map(|vcpu| VcpuState::save(&vcpu.fd(), &self.cpu.msrs));
        let held = self.switching().held;
        Ok(FullState { version: STATE_VERSION, vcpus: vcpus.collect::<Result<_>>()?, chips, devices, held })
    }

    fn set_logging(&self, on: bool) -> Result<()> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        for region in self.ram.regions() {
            set_slot(&self.vm, &self.ram, region, flags).context("switch the dirty log")?;
        }
        self.logging.store(on, Ordering::Release);
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The thread has the processors, which have to end before the memory goes.
        self.throttle(0);
    }
}

fn set_slot(vm: &VmFd, ram: &GuestRam, region: &RamRegion, flags: u32) -> Result<()> {
    let slot = kvm_userspace_memory_region {
        slot: region.slot,
        flags,
        guest_phys_addr: region.guest_start,
        memory_size: region.len,
        userspace_addr: ram.page_pointer(region.first_page) as u64,
    };
    // SAFETY: the range is mapped for as long as the memory lives, and the machine drops its VM before its memory.
    unsafe { vm.set_user_memory_region(slot) }?;
    Ok(())
}

fn connect_interrupts(vm: &VmFd, serial: &SerialPort, devices: &[Arc<dyn Device>]) -> Result<()> {
    vm.register_irqfd(&serial.interrupt()?, crate::device::serial::IRQ)
        .context("connect the serial line's interrupt")?;
    for (i, device) in devices.iter().enumerate() {
        let address = MMIO_START + i as u64 * MMIO_BYTES;
        for (queue, kick) in device.kicks().iter().enumerate() {
            vm.register_ioevent(kick, &IoEventAddress::Mmio(address + QUEUE_NOTIFY), queue as u32)
                .context("connect a queue's kick")?;
        }
        for call in device.calls() {
            vm.register_irqfd(&call, FIRST_IRQ + i as u32).context("connect a queue's interrupt")?;
        }
    }
    Ok(())
}

fn make_vcpu(
    vm: &VmFd,
    number: u32,
    vcpus: u32,
    cpu: &CpuDescription,
    buses: &Arc<Buses>,
    life: &Arc<LifeCell>,
) -> Result<Vcpu> {
    let fd = vm.create_vcpu(number.into()).with_context(|| format!("make processor {number}"))?;
    // Before anything that counts in it. Where it can't be set, the check has said what that means.
    if vm.check_extension(Cap::TscControl) && fd.get_tsc_khz().ok() != Some(cpu.tsc_khz) {
        fd.set_tsc_khz(cpu.tsc_khz).with_context(|| {
            format!(
                "give processor {number} a time-stamp counter of {} kHz, which this host's KVM can't",
                cpu.tsc_khz
            )
        })?;
    }
    let cpuid = cpu::cpuid_of(&cpu.cpuid, number, vcpus)?;
    fd.set_cpuid2(&cpuid).with_context(|| format!("tell processor {number} what it is"))?;
    let life = life.clone();
    Vcpu::new(number, fd, buses.clone(), move |ending| match ending {
        Ending::Failed(why) => {
            tracing::error!(vcpu = number, why, "the machine has failed");
            life.set(Life::Failed(why.clone()));
        }
        _ => life.set(Life::Shutdown),
    })
}

impl SourceMachine for Machine {
    fn description(&self) -> Result<Description> {
        Ok(Description {
            name: self.name.clone(),
            shim_version: env!("CARGO_PKG_VERSION").to_owned(),
            state_version: STATE_VERSION,
            memory_bytes: self.ram.bytes(),
            huge_pages: self.ram.huge_pages(),
            vcpus: self.vcpus.len() as u32,
            cpu: self.cpu.clone(),
            capabilities: kvm::needed_capabilities(),
            devices: self.buses.devices.iter().map(|device| device.description()).collect(),
        })
    }

    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    fn start_logging(&self) -> Result<()> {
        self.set_logging(true)?;
        for device in &self.buses.devices {
            if let Err(error) = device.start_logging() {
                if let Err(e) = self.stop_logging() {
                    tracing::warn!(error = format!("{e:#}"), "dirty pages are still logged");
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn stop_logging(&self) -> Result<()> {
        // All are tried, the first failure is told.
        let devices: Vec<_> = self.buses.devices.iter().map(|device| device.stop_logging()).collect();
        self.set_logging(false)?;
        devices.into_iter().collect()
    }

    fn collect_dirty(&self, into: &mut PageSet) -> Result<()> {
        ensure!(self.logging.load(Ordering::Acquire), "dirty pages are not logged");
        for region in self.ram.regions() {
            let bits =
                self.vm.get_dirty_log(region.slot, region.len as usize).context("read the dirty log")?;
            into.insert_bits(region.first_page, &bits);
        }
        for device in &self.buses.devices {
            device.collect_dirty(into)?;
        }
        self.ram.take_own_writes(into);
        Ok(())
    }

    fn before_copy(&self, first_page: u64, bits: &[u64]) -> Result<()> {
        if self.mode == DirtyLogMode::ClearedByReading {
            return Ok(());
        }
        assert!(first_page.is_multiple_of(64), "whole words");
        let end = first_page + bits.len() as u64 * 64;
        for region in self.ram.regions() {
            let region_end = region.first_page + region.len / 4096;
            let (from, to) = (first_page.max(region.first_page), end.min(region_end));
            if from >= to {
                continue;
            }
            let part = &bits[((from - first_page) / 64) as usize..];
            kvm::clear_dirty_log(&self.vm, region.slot, from - region.first_page, (to - from) as u32, part)
                .context("clear a part of the dirty log")?;
        }
        Ok(())
    }

    fn throttle(&self, percent: u8) {
        self.vcpus.iter().for_each(|vcpu| vcpu.throttle(percent));
        self.throttling.store(percent > 0, Ordering::Release);
        let mut throttler = self.throttler.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if percent == 0 {
            if let Some(thread) = throttler.take() {
                let _ = thread.join();
            }
        } else if throttler.is_none() {
            let (going, vcpus) = (self.throttling.clone(), self.vcpus.clone());
            let keep_looking = move || {
                while going.load(Ordering::Acquire) {
                    std::thread::sleep(THROTTLE_EVERY);
                    vcpus.iter().for_each(|vcpu| vcpu.signal());
                }
            };
            match std::thread::Builder::new().name("throttle".into()).spawn(keep_looking) {
                Ok(thread) => *throttler = Some(thread),
                Err(error) => tracing::warn!(%error, "the processors can't be slowed down"),
            }
        }
    }

    fn pause(&self) -> Result<()> {
        self.pause_all()
    }

    fn save(&self) -> Result<MachineState> {
        let life = self.life();
        ensure!(life == Life::Paused || life == Life::Created, "the machine {} is not paused", self.name);
        Ok(MachineState(serde_json::to_vec(&self.full_state()?).context("write the machine's state down")?))
    }

    fn resume(&self) -> Result<()> {
        self.start(true)
    }

    fn release_storage(&self) -> Result<Vec<u8>> {
        self.storage().map_or_else(|| Ok(Vec::new()), |storage| storage.release())
    }

    fn reclaim_storage(&self) -> Result<()> {
        self.storage().map_or(Ok(()), |storage| storage.reclaim())
    }

    fn end(&self) {
        self.life.set(Life::Gone);
    }
}
