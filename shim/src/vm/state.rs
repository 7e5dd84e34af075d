//! The state of a machine as it travels, and the order in which KVM wants it.
//!
//! Saving a processor: its run state first, since reading it may complete an INIT; its model-specific registers before its
//! local APIC; its events last. Putting it back: CPUID, run state, registers, special registers, floating point and extended
//! state, control of that, debug registers, local APIC (which needs the special registers' APIC base), model-specific
//! registers (the deadline timer needs the APIC in that mode, and the counter that it waits for: it comes last), events last.
//! Then the guest's clock is told that time was lost. KVM's documentation (Documentation/virt/kvm/api.rst) has the calls.
//!
//! **Interrupts are under way while all stands still**: KVM's timers go on, and what was signalled before the pause may come
//! late. They go downstream only, from the timer to the interrupt controllers to the local APICs, and an edge leaves no trace
//! where it has passed. So they are saved in that order: what passes meanwhile is found further down, and at worst in both
//! places. Saved the other way round it would be in neither. For the same reason a local APIC comes after the registers with
//! its timer's deadline, which is gone when it has fired. They are put back in the opposite order, since a controller hands on
//! what it finds pending at once, and the APIC that takes it must not be overwritten. A guest bears an interrupt too many.
//! Devices signal their queues again when they go on ([`crate::device`]), for what comes after the last APIC was saved.

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::cpu::TSC_DEADLINE;
use crate::device::DeviceState;

/// Version of the format. A state of another version is refused.
pub const STATE_VERSION: u32 = 1;

/// Registers that KVM lists but that are not put back: what they hold is set by other means (the system-management base,
/// which needs a mode that we do not offer) or they are the host's business.
const MSRS_LEFT_OUT: [u32; 1] = [0x9e];

/// The whole machine, without its memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct FullState {
    /// [`STATE_VERSION`].
    pub version: u32,
    /// By number.
    pub vcpus: Vec<VcpuState>,
    /// Interrupt controllers, timer, clock.
    pub chips: ChipState,
    /// Serial line first, then in the order of their places.
    pub devices: Vec<DeviceState>,
    /// A person has paused the machine.
    pub held: bool,
}

/// One processor.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
}

/// What the processors share.
#[derive(Debug, Serialize, Deserialize)]
pub struct ChipState {
    irqchips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
}

impl VcpuState {
    /// Reads a processor that does not run. `msrs` are those to take along.
    ///
    /// # Errors
    /// If KVM refuses a part.
    pub fn save(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self> {
        let mp_state = vcpu.get_mp_state().context("read the run state")?;
        let msrs = read_msrs(vcpu, msrs)?;
        let lapic = vcpu.get_lapic().context("read the local APIC")?;
        Ok(Self {
            mp_state,
            regs: vcpu.get_regs().context("read the registers")?,
            sregs: vcpu.get_sregs().context("read the special registers")?,
            xsave: Box::new(vcpu.get_xsave().context("read the extended state")?),
            xcrs: vcpu.get_xcrs().context("read the extended control registers")?,
            debugregs: vcpu.get_debug_regs().context("read the debug registers")?,
            lapic,
            msrs,
            events: vcpu.get_vcpu_events().context("read the pending events")?,
        })
    }

    /// Puts it into a processor that has not run and that was told its CPUID.
    ///
    /// # Errors
    /// If KVM refuses a part; the processor is not to be run then.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<()> {
        vcpu.set_mp_state(self.mp_state).context("set the run state")?;
        vcpu.set_regs(&self.regs).context("set the registers")?;
        vcpu.set_sregs(&self.sregs).context("set the special registers")?;
        // SAFETY: without permission for larger states (AMX), which this process never asks for, KVM reads no more than the
        // 4096 bytes of the structure.
        unsafe { vcpu.set_xsave(&self.xsave) }.context("set the extended state")?;
        vcpu.set_xcrs(&self.xcrs).context("set the extended control registers")?;
        vcpu.set_debug_regs(&self.debugregs).context("set the debug registers")?;
        vcpu.set_lapic(&self.lapic).context("set the local APIC")?;
        write_msrs(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events).context("set the pending events")?;
        // Refused with EINVAL where the guest has no paravirtual clock: there is nobody to tell then.
        let _ = vcpu.kvmclock_ctrl();
        Ok(())
    }
}

fn read_msrs(vcpu: &VcpuFd, wanted: &[u32]) -> Result<Vec<(u32, u64)>> {
    let mut all = Vec::with_capacity(wanted.len());
    // KVM stops at the first one that it can't read; that one is left out and the others are read.
    let mut rest: Vec<u32> = wanted.iter().copied().filter(|msr| !MSRS_LEFT_OUT.contains(msr)).collect();
    while !rest.is_empty() {
        let entries: Vec<_> =
            rest.iter().map(|msr| kvm_msr_entry { index: *msr, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).context("too many model-specific registers")?;
        let read = vcpu.get_msrs(&mut msrs).context("read the model-specific registers")?;
        all.extend(msrs.as_slice()[..read].iter().map(|entry| (entry.index, entry.data)));
        if read < rest.len() {
            tracing::debug!(msr = format!("{:#x}", rest[read]), "a register that KVM lists can't be read");
        }
        rest.drain(..(read + 1).min(rest.len()));
    }
    Ok(all)
}

/// In the order in which they are put back: the timer's deadline when the counter is there that it waits for.
fn deadline_last(values: &[(u32, u64)]) -> Vec<(u32, u64)> {
    let (deadline, mut all): (Vec<_>, Vec<_>) =
        values.iter().copied().partition(|(index, _)| *index == TSC_DEADLINE);
    all.extend(deadline);
    all
}

fn write_msrs(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<()> {
    let values = deadline_last(values);
    let entries: Vec<_> = values
        .iter()
        .map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() })
        .collect();
    let msrs = Msrs::from_entries(&entries).context("too many model-specific registers")?;
    let written = vcpu.set_msrs(&msrs).context("set the model-specific registers")?;
    if let Some((index, data)) = values.get(written) {
        bail!("this host's KVM does not take {data:#x} for the model-specific register {index:#x}");
    }
    Ok(())
}

impl ChipState {
    /// Reads them; no processor runs.
    ///
    /// # Errors
    /// If KVM refuses a part.
    pub fn save(vm: &VmFd) -> Result<Self> {
        let pit = vm.get_pit2().context("read the timer")?;
        let mut irqchips = Vec::new();
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).context("read an interrupt controller")?;
            irqchips.push(chip);
        }
        let mut clock = vm.get_clock().context("read the clock")?;
        // Set again, these would ask for things of the host that the state does not hold.
        clock.flags &= !(KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC);
        Ok(Self { irqchips, pit, clock })
    }

    /// Puts them into a machine none of whose processors runs.
    ///
    /// # Errors
    /// If KVM refuses a part.
    pub fn restore(&self, vm: &VmFd) -> Result<()> {
        ensure!(
            self.irqchips.len() == 3,
            "the state has {} interrupt controllers, not 3",
            self.irqchips.len()
        );
        for chip in &self.irqchips {
            vm.set_irqchip(chip).context("set an interrupt controller")?;
        }
        vm.set_pit2(&self.pit).context("set the timer")?;
        vm.set_clock(&self.clock).context("set the clock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timers_deadline_is_set_when_its_counter_is() {
        let values = [(TSC_DEADLINE, 7), (0x10, 5), (0x174, 1)];
        assert_eq!(deadline_last(&values), [(0x10, 5), (0x174, 1), (TSC_DEADLINE, 7)]);
    }
}
