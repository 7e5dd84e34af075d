//! What the host's KVM can do, and the calls that kvm-ioctls has not got.

use std::io;

use anyhow::{Context, Result, ensure};
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

/// KVM's letter in the numbers of its calls.
const KVMIO: u32 = 0xae;
mod calls {
    #![allow(missing_docs)]
    use super::{KVMIO, ioctl_iowr_nr, kvm_clear_dirty_log};
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
}

/// The version of the interface that every KVM has had since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// What a machine needs, with the names under which a migration tells of them.
const NEEDED: [(Cap, &str); 10] = [
    (Cap::Irqchip, "irqchip"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::UserMemory, "user-memory"),
    (Cap::SetTssAddr, "set-tss-address"),
    (Cap::Pit2, "pit2"),
    (Cap::PitState2, "pit-state2"),
    (Cap::AdjustClock, "adjust-clock"),
    (Cap::Xsave, "xsave"),
    (Cap::ImmediateExit, "immediate-exit"),
];

/// Opens `/dev/kvm`.
///
/// # Errors
/// If there is none, it may not be opened, or it lacks what every machine needs.
pub fn open() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(io::Error::from).context(
        "open /dev/kvm (is the module kvm_intel, kvm_amd or kvm_pvm loaded, and may this user open it?)",
    )?;
    let version = kvm.get_api_version();
    ensure!(version == API_VERSION, "KVM speaks version {version} of its interface, not {API_VERSION}");
    let missing: Vec<_> =
        NEEDED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, n)| *n).collect();
    ensure!(missing.is_empty(), "this host's KVM has no {}; every machine needs it", missing.join(", no "));
    Ok(kvm)
}

/// Names of what machines use of KVM.
pub fn needed_capabilities() -> Vec<String> {
    NEEDED.iter().map(|(_, name)| (*name).to_owned()).collect()
}

/// Those of `names` that this host's KVM has not got.
pub fn missing_capabilities(kvm: &Kvm, names: &[String]) -> Vec<String> {
    let has = |name: &str| NEEDED.iter().any(|(cap, n)| *n == name && kvm.check_extension(*cap));
    names.iter().filter(|name| !has(name)).cloned().collect()
}

/// How the dirty log of a machine is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirtyLogMode {
    /// Reading it clears it.
    ClearedByReading,
    /// Reading leaves it; pages are cleared (and protected again) by a call of their own, piece by piece, right before they
    /// are copied. What is written in between then needs no second copy, and no call holds the guest up for long.
    ClearedByHand,
}

/// Asks for the better way of reading the dirty log and says which it is.
pub fn choose_dirty_log_mode(vm: &VmFd) -> DirtyLogMode {
    let flags = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    if offered < 0 || offered as u32 & flags != flags {
        return DirtyLogMode::ClearedByReading;
    }
    let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
    cap.args[0] = flags.into();
    match vm.enable_cap(&cap) {
        Ok(()) => DirtyLogMode::ClearedByHand,
        Err(_) => DirtyLogMode::ClearedByReading,
    }
}

/// Clears pages of a slot's dirty log: they are write-protected again. `bits` are the pages to clear, bit 0 of the first word
/// being `first_page` of the slot.
///
/// # Errors
/// As KVM has it: `first_page` must be a multiple of 64, and so must `pages` unless they end with the slot.
pub fn clear_dirty_log(vm: &VmFd, slot: u32, first_page: u64, pages: u32, bits: &[u64]) -> io::Result<()> {
    assert!(bits.len() * 64 >= pages as usize, "the bitmap covers the pages");
    let argument = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_ptr() as *mut _ },
    };
    // SAFETY: the descriptor is a VM's; KVM reads the structure and, of the bitmap, as many bits as there are pages, which
    // the slice has.
    let result = unsafe { ioctl_with_ref(vm, calls::KVM_CLEAR_DIRTY_LOG(), &argument) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
