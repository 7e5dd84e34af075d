//! What a guest is told of its processors, and whether another host can keep that promise.
//!
//! A guest sees what KVM supports on the host where it starts, less what its baseline leaves out. It keeps that for life: a
//! target gives it the same leaves, or refuses. Leaves and bits are those of the Intel 64 manual (volume 2, CPUID), the AMD64
//! manual (volume 3, appendix E) and of KVM's documentation (virt/kvm/x86/cpuid.rst).

use anyhow::{Context, Result, bail};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::machine::{CpuDescription, CpuidLeaf, Finding};

/// A register of a leaf.
const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// Registers whose bits say each that the processor can do something: a target must offer all that the guest sees.
const FEATURES: [(u32, u32, usize, &str); 15] = [
    (0x1, 0, ECX, "1.ECX"),
    (0x1, 0, EDX, "1.EDX"),
    (0x6, 0, EAX, "6.EAX"),
    (0x7, 0, EBX, "7.0.EBX"),
    (0x7, 0, ECX, "7.0.ECX"),
    (0x7, 0, EDX, "7.0.EDX"),
    (0x7, 1, EAX, "7.1.EAX"),
    (0x7, 1, EDX, "7.1.EDX"),
    (0xd, 0, EAX, "D.0.EAX"),
    (0xd, 0, EDX, "D.0.EDX"),
    (0xd, 1, EAX, "D.1.EAX"),
    (0x8000_0001, 0, ECX, "80000001.ECX"),
    (0x8000_0001, 0, EDX, "80000001.EDX"),
    (0x8000_0008, 0, EBX, "80000008.EBX"),
    (0x4000_0001, 0, EAX, "40000001.EAX (KVM)"),
];

/// Bits that people know by name.
const NAMES: [(&str, u32, &str); 40] = [
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
];

/// A baseline: the highest level of the x86-64 psABI that the guest is told of, so that it can go to any processor of that
/// level and vendor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Baseline {
    /// SSE3 to SSE4.2, POPCNT, CMPXCHG16B.
    V2,
    /// And AVX, AVX2, BMI, FMA, F16C, LZCNT, MOVBE.
    V3,
    /// And AVX-512 F, BW, CD, DQ, VL.
    V4,
}

impl std::str::FromStr for Baseline {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "x86-64-v2" => Ok(Self::V2),
            "x86-64-v3" => Ok(Self::V3),
            "x86-64-v4" => Ok(Self::V4),
            _ => bail!(
                "{text} is no baseline; take x86-64-v2, x86-64-v3, x86-64-v4, or none for all that the host has"
            ),
        }
    }
}

impl Baseline {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        }
    }

    /// What a guest may see of a feature register, where the baseline limits it.
    fn allowed(self, register: &str) -> u32 {
        let bits = |list: &[u32]| list.iter().fold(0, |mask, bit| mask | 1 << bit);
        let (v3, v4) = (self != Self::V2, self == Self::V4);
        let with = |base: u32, in_v3: &[u32], in_v4: &[u32]| {
            base | if v3 { bits(in_v3) } else { 0 } | if v4 { bits(in_v4) } else { 0 }
        };
        match register {
            // Besides the level: x2APIC, the deadline timer and "there is a hypervisor", which KVM itself provides.
            "1.ECX" => with(bits(&[0, 9, 13, 19, 20, 21, 23, 24, 31]), &[12, 22, 26, 27, 28, 29], &[]),
            // FPU to SSE2 without those that tell of the very processor (PSN, thermal things).
            "1.EDX" => bits(&[0, 1, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26]),
            // SMEP and SMAP protect the guest and are as old as the levels' processors.
            "7.0.EBX" => with(0, &[3, 5, 7, 8, 20], &[16, 17, 28, 30, 31]),
            "D.0.EAX" => with(0b11, &[2], &[5, 6, 7]),
            "80000001.ECX" => with(bits(&[0]), &[5], &[]),
            "80000001.EDX" => bits(&[11, 20, 27, 29]),
            "40000001.EAX (KVM)" => u32::MAX,
            _ => 0,
        }
    }
}

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

fn limit(leaves: &mut [CpuidLeaf], baseline: Baseline) -> Result<()> {
    for (function, index, register, name) in FEATURES {
        let Some(leaf) = leaves.iter_mut().find(|leaf| (leaf.function, leaf.index) == (function, index))
        else {
            continue;
        };
        leaf.registers[register] &= baseline.allowed(name);
        // Bits that every processor of the level has. KVM's own are not the processor's, OSXSAVE is the guest's.
        let of_level = match name {
            "1.ECX" => baseline.allowed(name) & !(1 << 21 | 1 << 24 | 1 << 27 | 1 << 31),
            "7.0.EBX" => baseline.allowed(name) & !(1 << 7 | 1 << 20),
            _ => 0,
        };
        let missing = of_level & !leaf.registers[register];
        if missing != 0 {
            bail!(
                "this host has less than {}: no {}; take a lower baseline",
                baseline.name(),
                names(name, missing).join(", no ")
            );
        }
    }
    Ok(())
}

fn leaf_of(entry: &kvm_cpuid_entry2) -> CpuidLeaf {
    CpuidLeaf {
        function: entry.function,
        index: entry.index,
        flags: entry.flags,
        registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
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

/// Describes the processors of a guest that sees these leaves.
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
        cpuid: leaves,
        msrs,
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
/// `host_msrs` the registers that it can save and restore, `host_tsc_khz` the rate of its time-stamp counter.
pub fn compare(guest: &CpuDescription, host: &CpuDescription) -> Vec<Finding> {
    let mut findings = Vec::new();
    if guest.vendor != host.vendor {
        findings.push(Finding {
            kind: "cpu-vendor".into(),
            fatal: true,
            needed: guest.vendor.clone(),
            found: host.vendor.clone(),
            message: format!(
                "the machine runs on a processor of {} and this host has one of {}; a running machine can't go from one \
                 vendor to another: shut it down and start it here",
                guest.vendor, host.vendor
            ),
        });
        // Bits of another vendor's leaves mean other things.
        return findings;
    }
    for (function, index, register, name) in FEATURES {
        let bits =
            |leaves| find(leaves, function, index).map_or(0, |leaf: &CpuidLeaf| leaf.registers[register]);
        // OSXSAVE and OSPKE mirror what the guest has switched on.
        let own = match name {
            "1.ECX" => 1 << 27,
            "7.0.ECX" => 1 << 4,
            _ => 0,
        };
        let missing = bits(&guest.cpuid) & !bits(&host.cpuid) & !own;
        if missing != 0 {
            let names = names(name, missing).join(", ");
            findings.push(Finding {
                kind: "cpuid".into(),
                fatal: true,
                needed: names.clone(),
                found: "not supported by this host's processor or its KVM".into(),
                message: format!(
                    "the guest was told that its processor has {names}, which this host has not; start the machine on a \
                     baseline that both have (--cpu)"
                ),
            });
        }
    }
    let missing: Vec<_> = guest.msrs.iter().filter(|msr| !host.msrs.contains(msr)).collect();
    if !missing.is_empty() {
        let list = missing.iter().map(|msr| format!("{msr:#x}")).collect::<Vec<_>>().join(", ");
        findings.push(Finding {
            kind: "msr".into(),
            fatal: true,
            needed: list.clone(),
            found: "not among the registers that this host's KVM saves and restores".into(),
            message: format!("the machine's state has the model-specific registers {list}, which this host's KVM does not know"),
        });
    }
    findings.extend(compare_tsc(guest.tsc_khz, host.tsc_khz));
    findings
}

/// The rate of the time-stamp counter may differ by what the guest's clock steering bears, 250 parts in a million (as much as
/// QEMU allows).
fn compare_tsc(guest: u32, host: u32) -> Option<Finding> {
    let allowed = u64::from(guest) * 250 / 1_000_000;
    (u64::from(guest.abs_diff(host)) > allowed).then(|| Finding {
        kind: "tsc".into(),
        fatal: false,
        needed: format!("{guest} kHz"),
        found: format!("{host} kHz"),
        message: format!(
            "the guest's time-stamp counter goes at {guest} kHz and this host's at {host}; a guest that measures time with it \
             alone will be wrong by the difference"
        ),
    })
}

/// Numbers of the model-specific registers that travel.
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
        assert!(compare(&amd, &amd).is_empty());
    }

    #[test]
    fn intel_and_amd_do_not_mix() {
        let findings = compare(&cpu("AuthenticAMD", 0), &cpu("GenuineIntel", 0));
        assert_eq!(findings.len(), 1);
        assert!(findings[0].fatal && findings[0].kind == "cpu-vendor", "{findings:?}");
    }

    #[test]
    fn a_feature_that_the_host_has_not_is_named() {
        let findings = compare(&cpu("AuthenticAMD", 1 << 28 | 1 << 27 | 1), &cpu("AuthenticAMD", 1));
        assert_eq!(findings.len(), 1, "OSXSAVE is the guest's own: {findings:?}");
        assert!(findings[0].fatal && findings[0].needed == "AVX", "{findings:?}");
        assert!(compare(&cpu("AuthenticAMD", 1), &cpu("AuthenticAMD", 1 << 28 | 1)).is_empty());
    }

    #[test]
    fn a_register_that_the_host_can_not_restore_is_named() {
        let (guest, mut host) = (cpu("GenuineIntel", 0), cpu("GenuineIntel", 0));
        host.msrs.pop();
        let findings = compare(&guest, &host);
        assert!(findings.len() == 1 && findings[0].needed == "0x174", "{findings:?}");
    }

    #[test]
    fn another_rate_of_the_counter_is_told_and_no_hindrance() {
        let (guest, mut host) = (cpu("GenuineIntel", 0), cpu("GenuineIntel", 0));
        host.tsc_khz += 400;
        assert!(compare(&guest, &host).is_empty());
        host.tsc_khz += 400_000;
        let findings = compare(&guest, &host);
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
}
