//! What a guest sees that is to go to any host of a level.
//!
//! It is a list of what may be seen, not of what may not: a leaf that a newer processor or KVM adds stays hidden.

use anyhow::{Result, bail};

use super::{EAX, EBX, ECX, EDX, FEATURES, find, names};
use crate::machine::CpuidLeaf;

/// A baseline: the highest level of the x86-64 psABI that the guest is told of, so that it can go to any processor of that
/// level and vendor.
///
/// Besides the level it sees the features of KVM that all have had for years, and addresses of 41 bits: enough for all memory
/// that a machine can have, and no more than servers have (on a host with fewer it sees that host's). It sees no performance
/// counters, no tracing, no controls of speculation, and no time-stamp counter that promises to keep its rate, as the next
/// host's may have another one: it takes KVM's clock. What is only for people or for tuning (model, caches) is that of the
/// host where it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Baseline {
    /// SSE3 to SSE4.2, POPCNT, CMPXCHG16B.
    V2,
    /// And AVX, AVX2, BMI, FMA, F16C, LZCNT, MOVBE.
    V3,
    /// And AVX-512 F, BW, CD, DQ, VL.
    V4,
}

/// Leaves that are kept, those of the processor's names and caches as they are.
const KEPT: [u32; 18] = [
    0x0,
    0x1,
    0x2,
    0x4,
    0x6,
    0x7,
    0xb,
    0xd,
    0x4000_0000,
    0x4000_0001,
    0x8000_0000,
    0x8000_0001,
    0x8000_0002,
    0x8000_0003,
    0x8000_0004,
    0x8000_0005,
    0x8000_0006,
    0x8000_0008,
];
/// The highest leaf that is told of, of the processor's, of KVM's, of the extended ones.
const HIGHEST: [(u32, u32); 3] = [(0x0, 0xd), (0x4000_0000, 0x4000_0001), (0x8000_0000, 0x8000_0008)];
/// Bits of a physical address: twice the most memory of a machine.
const PHYSICAL_BITS: u32 = 41;
/// Bits of a linear address without those of 57 bits.
const LINEAR_BITS: u32 = 48;
/// Where the extended state ends of which every processor with XSAVE has the layout: legacy area and header.
const XSAVE_MIN: u32 = 576;

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

    /// What a guest may see of a feature register.
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
            // Both clocks, no delay after port accesses, stolen time, end of interrupt without an exit, kicks of waiting
            // processors, a clock that all processors agree on. Page faults that do not wait are not among them: older
            // and newer KVMs tell of them in different ways.
            "40000001.EAX (KVM)" => bits(&[0, 1, 3, 5, 6, 7, 24]),
            _ => 0,
        }
    }
}

/// Leaves out what is not of the baseline.
///
/// # Errors
/// If the host has less than the baseline.
pub(super) fn limit(leaves: &mut Vec<CpuidLeaf>, baseline: Baseline) -> Result<()> {
    let xcr0 = find(leaves, 0xd, 0).map_or(0, |leaf| leaf.registers[EAX]) & baseline.allowed("D.0.EAX");
    leaves.retain(|leaf| match (leaf.function, leaf.index) {
        (0x7, index) => index == 0,
        (0xd, index) => index < 2 || xcr0.checked_shr(index).unwrap_or(0) & 1 == 1,
        (function, _) => KEPT.contains(&function),
    });
    for (function, index, register, name) in FEATURES {
        let Some(leaf) = leaves.iter_mut().find(|leaf| (leaf.function, leaf.index) == (function, index))
        else {
            continue;
        };
        leaf.registers[register] &= baseline.allowed(name);
        check_level(baseline, name, leaf.registers[register])?;
    }
    let xsave_end = leaves
        .iter()
        .filter(|leaf| leaf.function == 0xd && leaf.index >= 2)
        .map(|leaf| leaf.registers[EBX].saturating_add(leaf.registers[EAX]))
        .fold(XSAVE_MIN, u32::max);
    leaves.iter_mut().for_each(|leaf| limit_numbers(leaf, xsave_end));
    Ok(())
}

/// Whether a register has the bits that every processor of the level has. KVM's own are not the processor's, OSXSAVE is the
/// guest's.
fn check_level(baseline: Baseline, name: &str, seen: u32) -> Result<()> {
    let of_level = match name {
        "1.ECX" => baseline.allowed(name) & !(1 << 21 | 1 << 24 | 1 << 27 | 1 << 31),
        "7.0.EBX" => baseline.allowed(name) & !(1 << 7 | 1 << 20),
        _ => 0,
    };
    let missing = of_level & !seen;
    if missing != 0 {
        bail!(
            "this host has less than {}: no {}; take a lower baseline",
            baseline.name(),
            names(name, missing).join(", no ")
        );
    }
    Ok(())
}

/// What in a leaf is not a bit for each feature.
fn limit_numbers(leaf: &mut CpuidLeaf, xsave_end: u32) {
    let registers = &mut leaf.registers;
    if let Some((_, highest)) = HIGHEST.iter().find(|(function, _)| *function == leaf.function) {
        registers[EAX] = registers[EAX].min(*highest);
    }
    match (leaf.function, leaf.index) {
        (0x6, _) | (0xd, 1) => *registers = [0; 4],
        // No further leaves.
        (0x7, _) => registers[EAX] = 0,
        // KVM writes what is switched on into EBX.
        (0xd, 0) => (registers[EBX], registers[ECX]) = (xsave_end, xsave_end),
        // Hints among them.
        (0x4000_0001, _) => (registers[EBX], registers[ECX], registers[EDX]) = (0, 0, 0),
        (0x8000_0008, _) => {
            let (physical, linear) = (registers[EAX] & 0xff, registers[EAX] >> 8 & 0xff);
            registers[EAX] = physical.min(PHYSICAL_BITS) | linear.min(LINEAR_BITS) << 8;
            registers[EDX] = 0;
        }
        _ => {}
    }
}
