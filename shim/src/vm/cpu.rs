//! What a guest is told of its processors, and whether another host can keep that promise.
//!
//! A guest sees what KVM supports on the host where it starts, less what its baseline leaves out. It keeps that for life: a
//! target gives it the same leaves, or refuses. Leaves and bits are those of the Intel 64 manual (volume 2, CPUID), the AMD64
//! manual (volume 3, appendix E) and of KVM's documentation (virt/kvm/x86/cpuid.rst).

mod baseline;
mod msrs;

use anyhow::{Context, Result};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

pub use self::baseline::Baseline;
use self::baseline::limit;
pub(super) use self::msrs::TSC_DEADLINE;
use crate::machine::{CpuDescription, CpuidLeaf, Finding};

/// A register of a leaf.
const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// Registers whose bits say each that the processor can do something: a target must offer all that the guest sees.
const FEATURES: [(u32, u32, usize, &str); 25] = [
    (0x1, 0, ECX, "1.ECX"),
    (0x1, 0, EDX, "1.EDX"),
    (0x6, 0, EAX, "6.EAX"),
    (0x7, 0, EBX, "7.0.EBX"),
    (0x7, 0, ECX, "7.0.ECX"),
    (0x7, 0, EDX, "7.0.EDX"),
    (0x7, 1, EAX, "7.1.EAX"),
    (0x7, 1, ECX, "7.1.ECX"),
    (0x7, 1, EDX, "7.1.EDX"),
    (0x7, 2, EDX, "7.2.EDX"),
    (0xd, 0, EAX, "D.0.EAX"),
    (0xd, 0, EDX, "D.0.EDX"),
    (0xd, 1, EAX, "D.1.EAX"),
    (0xd, 1, ECX, "D.1.ECX"),
    (0xd, 1, EDX, "D.1.EDX"),
    (0x14, 0, EBX, "14.0.EBX"),
    (0x14, 0, ECX, "14.0.ECX"),
    (0x8000_0001, 0, ECX, "80000001.ECX"),
    (0x8000_0001, 0, EDX, "80000001.EDX"),
    (0x8000_0007, 0, EDX, "80000007.EDX"),
    (0x8000_0008, 0, EBX, "80000008.EBX"),
    (0x8000_0021, 0, EAX, "80000021.EAX"),
    (0x8000_0021, 0, ECX, "80000021.ECX"),
    (0x8000_0022, 0, EAX, "80000022.EAX"),
    (0x4000_0001, 0, EAX, "40000001.EAX (KVM)"),
];

/// Numbers in leaves (function, register, lowest bit, number of bits) of which a target must offer as much as the guest sees.
const NUMBERS: [(u32, usize, u32, u32, &str); 8] = [
    (0xa, EAX, 0, 8, "the version of performance counters"),
    (0xa, EAX, 8, 8, "the number of performance counters"),
    (0xa, EAX, 16, 8, "the bits of a performance counter"),
    (0xa, EDX, 0, 5, "the number of fixed performance counters"),
    (0xa, EDX, 5, 8, "the bits of a fixed performance counter"),
    (0x8000_0008, EAX, 0, 8, "the bits of a physical address"),
    (0x8000_0008, EAX, 8, 8, "the bits of a linear address"),
    (0x8000_0022, EBX, 0, 4, "the number of AMD's performance counters"),
];

/// Bits that people know by name.
const NAMES: [(&str, u32, &str); 41] = [
    ("1.ECX", 0, "SSE3"),
    ("1.ECX", 1, "PCLMULQDQ"),
    ("1.ECX", 9, "SSSE3"),
    ("1.ECX", 12, "FMA"),
    ("1.ECX", 13, "CMPXCHG16B"),
    ("1.ECX", 19, "SSE4.1"),
    ("1.ECX", 20, "SSE4.2"),
    ("1.ECX", 21, "x2APIC"),
    ("1.ECX", 22, "MOVBE"),
    ("1.ECX", 23, "POPCNT"),
    ("1.ECX", 24, "TSC deadline timer"),
    ("1.ECX", 25, "AES"),
    ("1.ECX", 26, "XSAVE"),
    ("1.ECX", 28, "AVX"),
    ("1.ECX", 29, "F16C"),
    ("1.ECX", 30, "RDRAND"),
    ("7.0.EBX", 0, "FSGSBASE"),
    ("7.0.EBX", 3, "BMI1"),
    ("7.0.EBX", 5, "AVX2"),
    ("7.0.EBX", 7, "SMEP"),
    ("7.0.EBX", 8, "BMI2"),
    ("7.0.EBX", 9, "ERMS"),
    ("7.0.EBX", 10, "INVPCID"),
    ("7.0.EBX", 16, "AVX512F"),
    ("7.0.EBX", 17, "AVX512DQ"),
    ("7.0.EBX", 18, "RDSEED"),
    ("7.0.EBX", 19, "ADX"),
    ("7.0.EBX", 20, "SMAP"),
    ("7.0.EBX", 23, "CLFLUSHOPT"),
    ("7.0.EBX", 29, "SHA"),
    ("7.0.EBX", 30, "AVX512BW"),
    ("7.0.EBX", 31, "AVX512VL"),
    ("7.0.ECX", 2, "UMIP"),
    ("7.0.ECX", 3, "PKU"),
    ("7.0.ECX", 9, "VAES"),
    ("7.0.ECX", 16, "57-bit addresses"),
    ("80000001.ECX", 5, "LZCNT"),
    ("80000001.ECX", 6, "SSE4a"),
    ("80000001.EDX", 26, "pages of 1 GiB"),
    ("80000001.EDX", 27, "RDTSCP"),
    ("80000007.EDX", 8, "an invariant time-stamp counter"),
];

/// What KVM supports on this host, limited to a baseline if one is given.
///
/// Nested virtualization (VMX, SVM) is never among it: a guest can't run virtual machines of its own with the processor's
/// help, as the state of those would not move with it.
///
/// # Errors
/// If KVM does not tell, or the host has less than the baseline.
pub fn host_leaves(kvm: &Kvm, baseline: Option<Baseline>) -> Result<Vec<CpuidLeaf>> {
    let supported =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("read what processors KVM supports")?;
    let supported = supported.as_slice().iter().map(leaf_of).collect();
    let mut leaves = shown(supported, kvm.check_extension(Cap::TscDeadlineTimer));
    if let Some(baseline) = baseline {
        limit(&mut leaves, baseline)?;
    }
    Ok(leaves)
}

/// What guests are shown of what KVM supports.
fn shown(mut leaves: Vec<CpuidLeaf>, deadline_timer: bool) -> Vec<CpuidLeaf> {
    add_unlisted(&mut leaves, deadline_timer);
    hide_nested(&mut leaves);
    leaves
}

/// What KVM provides without listing it: that there is a hypervisor, without which a guest asks for none of KVM's help (its
/// clock first of all), and the timer with a deadline (virt/kvm/api.rst, KVM_GET_SUPPORTED_CPUID).
fn add_unlisted(leaves: &mut [CpuidLeaf], deadline_timer: bool) {
    for leaf in leaves.iter_mut().filter(|leaf| leaf.function == 1) {
        leaf.registers[ECX] |= 1 << 31 | u32::from(deadline_timer) << 24;
    }
}

fn leaf_of(entry: &kvm_cpuid_entry2) -> CpuidLeaf {
    CpuidLeaf {
        function: entry.function,
        index: entry.index,
        flags: entry.flags,
        registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
    }
}

/// Takes out VMX and SVM, and the leaf that describes SVM.
fn hide_nested(leaves: &mut Vec<CpuidLeaf>) {
    leaves.retain(|leaf| leaf.function != 0x8000_000a);
    for leaf in leaves {
        match leaf.function {
            0x1 => leaf.registers[ECX] &= !(1 << 5),
            0x8000_0001 => leaf.registers[ECX] &= !(1 << 2),
            _ => {}
        }
    }
}

/// The leaves for one processor of a guest: its number stands in some of them.
///
/// # Errors
/// If there are more leaves than KVM takes.
pub fn cpuid_of(leaves: &[CpuidLeaf], number: u32, vcpus: u32) -> Result<CpuId> {
    let entries: Vec<_> = leaves
        .iter()
        .map(|leaf| {
            let mut registers = leaf.registers;
            match leaf.function {
                0x1 => {
                    registers[EBX] = registers[EBX] & 0x0000_ffff | (vcpus.min(255) << 16) | (number << 24);
                    let several = 1 << 28;
                    registers[EDX] =
                        if vcpus > 1 { registers[EDX] | several } else { registers[EDX] & !several };
                }
                0xb | 0x1f => registers[EDX] = number,
                0x8000_001e => registers[EAX] = number,
                _ => {}
            }
            kvm_cpuid_entry2 {
                function: leaf.function,
                index: leaf.index,
                flags: leaf.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: registers[EAX],
                ebx: registers[EBX],
                ecx: registers[ECX],
                edx: registers[EDX],
                ..Default::default()
            }
        })
        .collect();
    CpuId::from_entries(&entries).context("more leaves of CPUID than KVM takes")
}

/// Describes the processors of a guest that sees these leaves. Of `msrs`, those that KVM saves and restores, the ones travel
/// that the guest can know of.
pub fn describe(
    leaves: Vec<CpuidLeaf>,
    baseline: Option<Baseline>,
    msrs: Vec<u32>,
    tsc_khz: u32,
) -> CpuDescription {
    CpuDescription {
        vendor: vendor(&leaves),
        model: model(&leaves),
        baseline: baseline.map(|b| b.name().to_owned()),
        msrs: msrs::told_of(&leaves, baseline.is_some(), msrs),
        cpuid: leaves,
        tsc_khz,
    }
}

fn find(leaves: &[CpuidLeaf], function: u32, index: u32) -> Option<&CpuidLeaf> {
    leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index))
}

fn text(registers: &[u32]) -> String {
    let bytes: Vec<u8> = registers.iter().flat_map(|r| r.to_le_bytes()).collect();
    String::from_utf8_lossy(&bytes).trim_matches(['\0', ' ']).to_owned()
}

fn vendor(leaves: &[CpuidLeaf]) -> String {
    find(leaves, 0, 0).map_or_else(
        || "unknown".to_owned(),
        |leaf| text(&[leaf.registers[EBX], leaf.registers[EDX], leaf.registers[ECX]]),
    )
}

fn model(leaves: &[CpuidLeaf]) -> String {
    let parts: Vec<u32> =
        (0x8000_0002..=0x8000_0004u32).filter_map(|f| find(leaves, f, 0)).flat_map(|l| l.registers).collect();
    if parts.is_empty() { "unknown".to_owned() } else { text(&parts) }
}

fn names(register: &str, bits: u32) -> Vec<String> {
    (0..32)
        .filter(|bit| bits >> bit & 1 == 1)
        .map(|bit| {
            NAMES
                .iter()
                .find(|(r, b, _)| (*r, *b) == (register, bit))
                .map_or_else(|| format!("CPUID {register} bit {bit}"), |(.., name)| (*name).to_owned())
        })
        .collect()
}

/// What keeps a guest with these processors from running on a host that has others. `host` is what the host's KVM supports,
/// with the registers that it can save and restore and the rate of its time-stamp counter; `scales_tsc` is whether it can give
/// a guest another rate ([`scales_tsc`]).
pub fn compare(guest: &CpuDescription, host: &CpuDescription, scales_tsc: bool) -> Vec<Finding> {
    if guest.vendor != host.vendor {
        // Bits of another vendor's leaves mean other things.
        return vec![Finding {
            kind: "cpu-vendor".into(),
            fatal: true,
            needed: guest.vendor.clone(),
            found: host.vendor.clone(),
            message: format!(
                "the machine runs on a processor of {} and this host has one of {}; a running machine can't go from one \
                 vendor to another: shut it down and start it here",
                guest.vendor, host.vendor
            ),
        }];
    }
    let mut findings = compare_features(&guest.cpuid, &host.cpuid);
    findings.extend(compare_numbers(&guest.cpuid, &host.cpuid));
    findings.extend(compare_xsave(&guest.cpuid, &host.cpuid));
    findings.extend(compare_msrs(&guest.msrs, &host.msrs));
    findings.extend(compare_tsc(guest, host.tsc_khz, scales_tsc));
    findings
}

fn register(leaves: &[CpuidLeaf], function: u32, index: u32, register: usize) -> u32 {
    find(leaves, function, index).map_or(0, |leaf| leaf.registers[register])
}

fn cpuid_finding(needed: String, found: String, message: String) -> Finding {
    Finding { kind: "cpuid".into(), fatal: true, needed, found, message }
}

fn compare_features(guest: &[CpuidLeaf], host: &[CpuidLeaf]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (function, index, at, name) in FEATURES {
        // OSXSAVE and OSPKE mirror what the guest has switched on.
        let own = match name {
            "1.ECX" => 1 << 27,
            "7.0.ECX" => 1 << 4,
            _ => 0,
        };
        let missing = register(guest, function, index, at) & !register(host, function, index, at) & !own;
        if missing != 0 {
            let names = names(name, missing).join(", ");
            let message = format!(
                "the guest was told that its processor has {names}, which this host has not; start the machine on a \
                 baseline that both have (--cpu)"
            );
            findings.push(cpuid_finding(
                names,
                "not supported by this host's processor or its KVM".into(),
                message,
            ));
        }
    }
    findings
}

fn compare_numbers(guest: &[CpuidLeaf], host: &[CpuidLeaf]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (function, at, shift, bits, what) in NUMBERS {
        let number = |leaves| register(leaves, function, 0, at) >> shift & ((1 << bits) - 1);
        let (needed, found) = (number(guest), number(host));
        if needed > found {
            let message = format!(
                "the guest was told that {what} is {needed}, and here it is {found} at most; start the machine on a \
                 baseline (--cpu), or on a host like this one"
            );
            findings.push(cpuid_finding(format!("{what}: {needed}"), format!("{what}: {found}"), message));
        }
    }
    findings
}

/// The layout in which extended state travels is that of the processor: what the guest may switch on has to lie at the same
/// place on both. What this host has not at all is told as a feature.
fn compare_xsave(guest: &[CpuidLeaf], host: &[CpuidLeaf]) -> Vec<Finding> {
    let xcr0 =
        |leaves| u64::from(register(leaves, 0xd, 0, EDX)) << 32 | u64::from(register(leaves, 0xd, 0, EAX));
    let both = xcr0(guest) & xcr0(host);
    let mut findings = Vec::new();
    for part in (2..63).filter(|part| both >> part & 1 == 1) {
        let layout = |leaves| (register(leaves, 0xd, part, EAX), register(leaves, 0xd, part, EBX));
        if layout(guest) != layout(host) {
            let say = |(bytes, at)| format!("part {part} of the extended state: {bytes} bytes at {at}");
            let message = format!(
                "part {part} of the guest's extended state lies elsewhere on this host's processor, which would read it \
                 wrongly; start the machine on a baseline without it (--cpu), or on a host like this one"
            );
            findings.push(cpuid_finding(say(layout(guest)), say(layout(host)), message));
        }
    }
    findings
}

fn compare_msrs(guest: &[u32], host: &[u32]) -> Option<Finding> {
    let missing: Vec<_> = guest.iter().filter(|msr| !host.contains(msr)).collect();
    if missing.is_empty() {
        return None;
    }
    let list = missing.iter().map(|msr| format!("{msr:#x}")).collect::<Vec<_>>().join(", ");
    let message = format!(
        "the guest may use the model-specific registers {list}, which this host's KVM does not know; start the machine on a \
         baseline (--cpu), or bring this host to a newer kernel"
    );
    Some(Finding {
        kind: "msr".into(),
        fatal: true,
        needed: list,
        found: "not among the registers that this host's KVM saves and restores".into(),
        message,
    })
}

/// The rate of the time-stamp counter may differ by what the guest's clock steering bears, 250 parts in a million (as much as
/// KVM and QEMU allow). A host that scales it gives the guest its own. Else the rate changes under the guest: one that was
/// told that it never does measures time wrongly, others take KVM's clock, which follows.
fn compare_tsc(guest: &CpuDescription, host: u32, scales: bool) -> Option<Finding> {
    let rate = guest.tsc_khz;
    let allowed = u64::from(rate) * 250 / 1_000_000;
    if scales || u64::from(rate.abs_diff(host)) <= allowed {
        return None;
    }
    let invariant = register(&guest.cpuid, 0x8000_0007, 0, EDX) >> 8 & 1 == 1;
    let consequence = match invariant {
        true => {
            "the guest was told that its counter never changes its rate; start the machine on a baseline (--cpu), which does \
             not say so, or move it to a host that scales the counter"
        }
        false => "a guest that measures time with the counter alone will be wrong by the difference",
    };
    Some(Finding {
        kind: "tsc".into(),
        fatal: invariant,
        needed: format!("{rate} kHz"),
        found: format!("{host} kHz"),
        message: format!(
            "the guest's time-stamp counter goes at {rate} kHz and this host's at {host}, which it can't scale; {consequence}"
        ),
    })
}

/// Whether this host can give a guest a time-stamp counter with a rate of its own.
pub fn scales_tsc(kvm: &Kvm) -> bool {
    kvm.check_extension(Cap::TscControl)
}

/// Numbers of the model-specific registers that KVM saves and restores.
///
/// # Errors
/// If KVM does not tell.
pub fn msrs(kvm: &Kvm) -> Result<Vec<u32>> {
    let list = kvm.get_msr_index_list().context("read which model-specific registers there are")?;
    Ok(list.as_slice().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> CpuidLeaf {
        CpuidLeaf { function, index, flags: 0, registers }
    }

    fn cpu(vendor: &str, ecx: u32) -> CpuDescription {
        let word =
            |at: usize| u32::from_le_bytes(vendor.as_bytes()[at..at + 4].try_into().expect("12 letters"));
        let leaves = vec![leaf(0, 0, [0xd, word(0), word(8), word(4)]), leaf(1, 0, [0, 0, ecx, 0])];
        describe(leaves, None, vec![0x10, 0x174], 2_000_000)
    }

    #[test]
    fn the_same_processor_has_no_findings() {
        let amd = cpu("AuthenticAMD", 1 << 28);
        assert_eq!(amd.vendor, "AuthenticAMD");
        assert!(compare(&amd, &amd, false).is_empty());
    }

    #[test]
    fn intel_and_amd_do_not_mix() {
        let findings = compare(&cpu("AuthenticAMD", 0), &cpu("GenuineIntel", 0), false);
        assert_eq!(findings.len(), 1);
        assert!(findings[0].fatal && findings[0].kind == "cpu-vendor", "{findings:?}");
    }

    #[test]
    fn a_feature_that_the_host_has_not_is_named() {
        let findings = compare(&cpu("AuthenticAMD", 1 << 28 | 1 << 27 | 1), &cpu("AuthenticAMD", 1), false);
        assert_eq!(findings.len(), 1, "OSXSAVE is the guest's own: {findings:?}");
        assert!(findings[0].fatal && findings[0].needed == "AVX", "{findings:?}");
        assert!(compare(&cpu("AuthenticAMD", 1), &cpu("AuthenticAMD", 1 << 28 | 1), false).is_empty());
    }

    #[test]
    fn a_register_that_the_host_can_not_restore_is_named() {
        let (guest, mut host) = (cpu("GenuineIntel", 0), cpu("GenuineIntel", 0));
        host.msrs.pop();
        let findings = compare(&guest, &host, false);
        assert!(findings.len() == 1 && findings[0].needed == "0x174", "{findings:?}");
    }

    #[test]
    fn another_rate_of_the_counter_is_told_and_no_hindrance() {
        let (guest, mut host) = (cpu("GenuineIntel", 0), cpu("GenuineIntel", 0));
        host.tsc_khz += 400;
        assert!(compare(&guest, &host, false).is_empty());
        host.tsc_khz += 400_000;
        let findings = compare(&guest, &host, false);
        assert!(findings.len() == 1 && !findings[0].fatal, "{findings:?}");
    }

    #[test]
    fn a_baseline_hides_what_is_above_it() {
        let all = leaf(1, 0, [0, 0, u32::MAX, u32::MAX]);
        let mut leaves = vec![all, leaf(7, 0, [0, u32::MAX, u32::MAX, u32::MAX])];
        limit(&mut leaves, Baseline::V2).expect("the host has everything");
        assert_eq!(leaves[0].registers[ECX] >> 28 & 1, 0, "AVX");
        assert_eq!(leaves[0].registers[ECX] >> 20 & 1, 1, "SSE4.2");
        assert_eq!(leaves[1].registers[EBX], 0);
        let mut poor = vec![leaf(1, 0, [0, 0, 1, 0])];
        let error = limit(&mut poor, Baseline::V2).expect_err("the host has SSE3 only").to_string();
        assert!(error.contains("SSE4.2"), "{error}");
    }

    #[test]
    fn a_guest_sees_that_there_is_a_hypervisor() {
        let mut leaves = [leaf(1, 0, [0; 4]), leaf(7, 0, [0; 4])];
        add_unlisted(&mut leaves, false);
        assert_eq!((leaves[0].registers, leaves[1].registers), ([0, 0, 1 << 31, 0], [0; 4]));
        add_unlisted(&mut leaves, true);
        assert_eq!(leaves[0].registers[ECX], 1 << 31 | 1 << 24);
    }

    #[test]
    fn each_processor_sees_its_own_number() {
        let leaves = [leaf(1, 0, [0, 0, 0, 0]), leaf(0xb, 1, [0; 4])];
        let cpuid = cpuid_of(&leaves, 3, 4).expect("two leaves");
        let entries = cpuid.as_slice();
        assert_eq!((entries[0].ebx >> 24, entries[0].ebx >> 16 & 0xff, entries[1].edx), (3, 4, 3));
    }

    /// A host whose processor has everything that its leaves can tell of.
    fn everything() -> Vec<CpuidLeaf> {
        let full = |function, index| leaf(function, index, [u32::MAX; 4]);
        let mut leaves: Vec<_> = [1, 6, 0xa, 0x14, 0x1d, 0x1e, 0x4000_0001].map(|f| full(f, 0)).into();
        leaves.extend([leaf(0, 0, [0x24, 0, 0, 0]), leaf(7, 0, [2, u32::MAX, u32::MAX, u32::MAX])]);
        leaves.extend([full(7, 1), full(7, 2), full(0xd, 0), full(0xd, 1)]);
        leaves.extend([leaf(0xd, 2, [256, 576, 0, 0]), leaf(0xd, 9, [8, 2688, 0, 0])]);
        leaves.extend([
            leaf(0x4000_0000, 0, [0x4000_0010, 0, 0, 0]),
            leaf(0x8000_0000, 0, [0x8000_0022, 0, 0, 0]),
        ]);
        leaves.extend([0x8000_0001, 0x8000_0007, 0x8000_000a, 0x8000_0021, 0x8000_0022].map(|f| full(f, 0)));
        leaves.push(leaf(0x8000_0008, 0, [52 | 57 << 8 | 52 << 16, u32::MAX, 0x7001, u32::MAX]));
        leaves
    }

    #[test]
    fn no_guest_sees_nested_virtualization() {
        let shown = shown(everything(), true);
        let of = |function, register: usize| find(&shown, function, 0).map(|leaf| leaf.registers[register]);
        assert_eq!(of(1, ECX), Some(!(1 << 5)), "VMX");
        assert_eq!(of(0x8000_0001, ECX), Some(!(1 << 2)), "SVM");
        assert_eq!(of(0x8000_000a, EAX), None);
    }

    #[test]
    fn a_baseline_shows_nothing_that_only_some_of_its_hosts_have() {
        let mut leaves = everything();
        limit(&mut leaves, Baseline::V3).expect("the host has everything");
        let of = |function, index| find(&leaves, function, index).map(|leaf| leaf.registers);
        for function in [0xa, 0x14, 0x1d, 0x1e, 0x8000_0007, 0x8000_000a, 0x8000_0021, 0x8000_0022] {
            assert_eq!(of(function, 0), None, "{function:#x}");
        }
        assert_eq!((of(7, 1), of(7, 2), of(7, 0).map(|r| r[EAX])), (None, None, Some(0)));
        assert_eq!(of(0xd, 0), Some([7, 832, 832, 0]), "x87, SSE and AVX");
        assert_eq!((of(0xd, 1), of(0xd, 9)), (Some([0; 4]), None));
        assert_eq!(of(0x8000_0008, 0), Some([41 | 48 << 8, 0, 0x7001, 0]));
        assert_eq!(of(0x4000_0001, 0), Some([0x0100_00eb, 0, 0, 0]));
        let highest = [0, 0x4000_0000, 0x8000_0000].map(|f| of(f, 0).map(|r| r[EAX]));
        assert_eq!(highest, [Some(0xd), Some(0x4000_0001), Some(0x8000_0008)]);
    }

    #[test]
    fn hosts_of_one_level_show_the_same_features() {
        let mut newer = everything();
        let mut older: Vec<_> = everything();
        older.retain(|l| {
            ![0xa, 0x14, 0x1d, 0x1e, 0x8000_0021, 0x8000_0022].contains(&l.function) && l.index < 9
        });
        for leaf in &mut older {
            match leaf.function {
                0xd if leaf.index == 0 => leaf.registers[EAX] = 0xe7,
                0x8000_0008 => leaf.registers = [46 | 48 << 8, 0, 0, 0],
                _ => {}
            }
        }
        for leaves in [&mut newer, &mut older] {
            limit(leaves, Baseline::V3).expect("both have the level");
            leaves.iter_mut().filter(|l| l.function == 0x8000_0008).for_each(|l| l.registers[ECX] = 0);
        }
        assert_eq!(newer, older);
    }

    /// Two processors that differ in one leaf, `guest` the one that the guest was told of.
    fn differ(function: u32, index: u32, guest: [u32; 4], host: [u32; 4]) -> Vec<Finding> {
        let with = |registers| {
            let mut cpu = cpu("GenuineIntel", 0);
            cpu.cpuid.push(leaf(0xd, 0, [0x207, 0, 0, 0]));
            cpu.cpuid.push(leaf(function, index, registers));
            cpu
        };
        compare(&with(guest), &with(host), false)
    }

    #[test]
    fn bits_of_newer_leaves_are_compared_too() {
        for (function, index, register) in [
            (7, 2, EDX),
            (7, 1, ECX),
            (0x8000_0021, 0, EAX),
            (0x8000_0021, 0, ECX),
            (0xd, 1, ECX),
            (0x8000_0007, 0, EDX),
        ] {
            let mut bit = [0; 4];
            bit[register] = 1 << 8;
            let findings = differ(function, index, bit, [0; 4]);
            assert!(findings.len() == 1 && findings[0].fatal, "{function:#x}.{index}: {findings:?}");
            assert!(differ(function, index, [0; 4], bit).is_empty(), "{function:#x}.{index}");
        }
    }

    #[test]
    fn a_guest_goes_to_no_host_with_narrower_addresses_or_fewer_counters() {
        let wide = [46 | 48 << 8, 0, 0, 0];
        let narrow = [39 | 48 << 8, 0, 0, 0];
        let findings = differ(0x8000_0008, 0, wide, narrow);
        assert!(findings.len() == 1 && findings[0].fatal, "{findings:?}");
        assert!(findings[0].needed.contains("46") && findings[0].found.contains("39"), "{findings:?}");
        assert!(differ(0x8000_0008, 0, narrow, wide).is_empty());
        let (eight, four) =
            ([5 | 8 << 8 | 48 << 16, 0, 0, 4 | 48 << 5], [2 | 4 << 8 | 48 << 16, 0, 0, 3 | 48 << 5]);
        assert_eq!(
            differ(0xa, 0, eight, four).iter().filter(|f| f.fatal).count(),
            3,
            "version and both kinds"
        );
        assert!(differ(0xa, 0, four, eight).is_empty());
    }

    #[test]
    fn extended_state_that_the_guest_uses_lies_at_the_same_place() {
        let findings = differ(0xd, 9, [8, 2688, 0, 0], [8, 2432, 0, 0]);
        assert!(findings.len() == 1 && findings[0].fatal, "{findings:?}");
        assert!(findings[0].needed.contains("2688") && findings[0].found.contains("2432"), "{findings:?}");
        assert!(differ(0xd, 9, [8, 2688, 0, 0], [8, 2688, 0, 0]).is_empty());
        assert!(
            differ(0xd, 11, [8, 1, 0, 0], [8, 2, 0, 0]).is_empty(),
            "a part that the guest may not switch on"
        );
    }

    #[test]
    fn registers_that_the_guest_was_not_told_of_do_not_travel() {
        let hidden =
            vec![0xe1, 0x1c4, 0x122, 0x48, 0x480, 0xc001_0117, 0x4000_0000, 0xc5, 0x4b56_4d02, 0xdab];
        let needed = vec![0x10, 0x174, 0xc000_0082, 0x277, 0xc1, 0xce, 0x4b56_4d01];
        let leaves = |ecx7| {
            vec![
                leaf(7, 0, [0, 0, ecx7, 0]),
                leaf(0xa, 0, [2 | 4 << 8, 0, 0, 3]),
                leaf(0x4000_0001, 0, [1 << 3, 0, 0, 0]),
            ]
        };
        let all: Vec<_> = hidden.iter().chain(&needed).copied().collect();
        let cpu = describe(leaves(0), Some(Baseline::V2), all.clone(), 1);
        assert_eq!(cpu.msrs, needed);
        let with_waitpkg = describe(leaves(1 << 5), None, all, 1);
        assert!(with_waitpkg.msrs.contains(&0xe1), "UMWAIT_CONTROL");
        assert!(with_waitpkg.msrs.contains(&0xdab), "nobody knows what it is, so it is needed");
        assert!(!with_waitpkg.msrs.contains(&0x1c4), "XFD");
    }

    #[test]
    fn an_invariant_counter_keeps_its_rate_or_the_guest_stays() {
        let (mut guest, mut host) = (cpu("GenuineIntel", 0), cpu("GenuineIntel", 0));
        for cpu in [&mut guest, &mut host] {
            cpu.cpuid.push(leaf(0x8000_0007, 0, [0, 0, 0, 1 << 8]));
        }
        host.tsc_khz += 400;
        assert!(compare(&guest, &host, false).is_empty(), "within what guests bear");
        host.tsc_khz += 400_000;
        let findings = compare(&guest, &host, false);
        assert!(findings.len() == 1 && findings[0].fatal && findings[0].kind == "tsc", "{findings:?}");
        assert!(compare(&guest, &host, true).is_empty(), "a host that scales gives it its own rate");
    }
}
