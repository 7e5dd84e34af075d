//! Which model-specific registers a guest can know of. The others hold nothing of it, so they need not travel, and a target
//! need not have them.
//!
//! Numbers are those of the Intel 64 manual (volume 4), the AMD64 manual (volume 2, appendix A) and of KVM's documentation
//! (virt/kvm/x86/msr.rst).

use std::ops::RangeInclusive;

use super::{EAX, EBX, ECX, EDX, find, vendor};
use crate::machine::CpuidLeaf;

/// What tells a guest of registers.
enum Told {
    /// Nothing has to: it may use them.
    Always,
    /// Nothing can: no guest is shown what they belong to.
    Never,
    /// That its processor is one of AMD.
    Amd,
    /// Bits of CPUID (function, index, register, mask), one of which is enough.
    By(&'static [(u32, u32, usize, u32)]),
    /// A number in leaf 0xa (register, lowest bit): so many of the registers are there.
    Counted(usize, u32),
}

use Told::{Always, Amd, By, Counted, Never};

/// A feature of KVM.
macro_rules! kvm {
    ($bit:literal) => {
        By(&[(0x4000_0001, 0, EAX, 1 << $bit)])
    };
}

/// Nested virtualization: VMX, SVM.
const VMX: Told = By(&[(0x1, 0, ECX, 1 << 5)]);
const SVM: Told = By(&[(0x8000_0001, 0, ECX, 1 << 2)]);
/// Any version of the performance counters that leaf 0xa describes.
const COUNTERS: Told = By(&[(0xa, 0, EAX, 0xff)]);
/// Tracing by the processor.
const TRACE: Told = By(&[(0x7, 0, EBX, 1 << 25)]);
/// What speculation does: Intel's bits for it, AMD's.
const SPECULATION: Told =
    By(&[(0x7, 0, EDX, 1 << 26 | 1 << 27 | 1 << 31), (0x8000_0008, 0, EBX, 1 << 14 | 1 << 15 | 1 << 24)]);

/// Registers that KVM saves, by number.
const REGISTERS: &[(RangeInclusive<u32>, Told)] = &[
    // Counter, feature control (which kernels lock without being told of it), adjustment, speculation.
    (0x10..=0x10, Always),
    (0x11..=0x12, kvm!(0)),
    (0x34..=0x34, Always),
    (0x3a..=0x3a, Always),
    (0x3b..=0x3b, By(&[(0x7, 0, EBX, 1 << 1)])),
    (0x48..=0x48, SPECULATION),
    (0x8b..=0x8b, Always),
    (0xc1..=0xc8, Counted(EAX, 8)),
    (0xce..=0xce, Always),
    // UMWAIT_CONTROL.
    (0xe1..=0xe1, By(&[(0x7, 0, ECX, 1 << 5)])),
    // ARCH_CAPABILITIES, and TSX_CTRL of which it tells.
    (0x10a..=0x10a, By(&[(0x7, 0, EDX, 1 << 29)])),
    (0x122..=0x122, By(&[(0x7, 0, EDX, 1 << 29)])),
    (0x140..=0x140, Always),
    (0x174..=0x176, Always),
    (0x17a..=0x17b, Always),
    (0x186..=0x18d, Counted(EAX, 8)),
    (0x1a0..=0x1a0, Always),
    // XFD.
    (0x1c4..=0x1c5, By(&[(0xd, 1, EAX, 1 << 4)])),
    (0x1fc..=0x1fc, Always),
    (0x277..=0x277, Always),
    (0x309..=0x319, Counted(EDX, 0)),
    (0x345..=0x345, By(&[(0x1, 0, ECX, 1 << 15)])),
    (0x38d..=0x391, COUNTERS),
    // Sampling into memory.
    (0x3f1..=0x3f2, By(&[(0x1, 0, EDX, 1 << 21)])),
    (0x480..=0x493, VMX),
    (0x560..=0x561, TRACE),
    (0x570..=0x572, TRACE),
    (0x580..=0x587, TRACE),
    (0x600..=0x600, By(&[(0x1, 0, EDX, 1 << 21)])),
    // Shadow stacks, indirect branch tracking.
    (0x6a0..=0x6a8, By(&[(0x7, 0, ECX, 1 << 7), (0x7, 0, EDX, 1 << 20)])),
    (TSC_DEADLINE..=TSC_DEADLINE, By(&[(0x1, 0, ECX, 1 << 24)])),
    (0xd90..=0xd90, By(&[(0x7, 0, EBX, 1 << 14)])),
    (0xda0..=0xda0, By(&[(0xd, 1, EAX, 1 << 3)])),
    // Those of Hyper-V, which KVM can play.
    (0x4000_0000..=0x4000_1fff, Never),
    (0x4b56_4d00..=0x4b56_4d01, kvm!(3)),
    (0x4b56_4d02..=0x4b56_4d02, kvm!(4)),
    (0x4b56_4d03..=0x4b56_4d03, kvm!(5)),
    (0x4b56_4d04..=0x4b56_4d04, kvm!(6)),
    (0x4b56_4d05..=0x4b56_4d05, kvm!(12)),
    (0x4b56_4d06..=0x4b56_4d07, kvm!(14)),
    (0x4b56_4d08..=0x4b56_4d08, kvm!(17)),
    (0xc000_0081..=0xc000_0084, Always),
    (0xc000_0102..=0xc000_0102, Always),
    // TSC_AUX, by RDTSCP or RDPID.
    (0xc000_0103..=0xc000_0103, By(&[(0x8000_0001, 0, EDX, 1 << 27), (0x7, 0, ECX, 1 << 22)])),
    (0xc000_0104..=0xc000_0104, SVM),
    (0xc000_0300..=0xc000_0303, By(&[(0x8000_0022, 0, EAX, 1)])),
    (0xc001_0000..=0xc001_0007, Amd),
    (0xc001_0015..=0xc001_0015, Always),
    (0xc001_0117..=0xc001_0117, SVM),
    // VIRT_SPEC_CTRL.
    (0xc001_011f..=0xc001_011f, By(&[(0x8000_0008, 0, EBX, 1 << 25)])),
    (0xc001_0200..=0xc001_020b, By(&[(0x8000_0001, 0, ECX, 1 << 23)])),
];

/// The deadline of the local APIC's timer.
pub(in crate::vm) const TSC_DEADLINE: u32 = 0x6e0;

impl Told {
    /// Whether a guest that sees these leaves is told of the register so far behind the first one.
    fn holds(&self, leaves: &[CpuidLeaf], behind: u32) -> bool {
        match self {
            Always => true,
            Never => false,
            Amd => matches!(vendor(leaves).as_str(), "AuthenticAMD" | "HygonGenuine"),
            By(bits) => bits.iter().any(|(function, index, register, mask)| {
                find(leaves, *function, *index).is_some_and(|leaf| leaf.registers[*register] & mask != 0)
            }),
            Counted(register, shift) => {
                // The number of fixed counters has 5 bits, that of the others 8.
                let mask = if *register == EDX { 0x1f } else { 0xff };
                find(leaves, 0xa, 0).is_some_and(|leaf| behind < leaf.registers[*register] >> shift & mask)
            }
        }
    }
}

/// Those of `msrs` that a guest that sees these leaves can know of. One that nobody here knows counts as known to the guest,
/// unless `all_known`: a baseline shows it nothing that could tell of one.
pub(super) fn told_of(leaves: &[CpuidLeaf], all_known: bool, mut msrs: Vec<u32>) -> Vec<u32> {
    msrs.retain(|msr| {
        let known = REGISTERS.iter().find(|(numbers, _)| numbers.contains(msr));
        known.map_or(!all_known, |(numbers, told)| told.holds(leaves, msr - numbers.start()))
    });
    msrs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_register_stands_in_the_table_once() {
        for pair in REGISTERS.windows(2) {
            assert!(pair[0].0.end() < pair[1].0.start(), "{:x?} and {:x?}", pair[0].0, pair[1].0);
        }
    }
}
