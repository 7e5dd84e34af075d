//! Values that stay in the registers of the floating-point units for long, so that a move which loses them is noticed.
//!
//! The eight MMX registers (which are those of the x87 unit) hold values from one check to the next, whatever else runs:
//! compiled code for x86-64 uses neither. The SSE registers, which it does use, hold values while the processor rests.

use core::arch::asm;

use super::layout::{Mismatch, WRONG_MMX, WRONG_SSE};
use super::pattern::mix;
use super::report::VcpuReport;

/// Calls of [`Registers::check`] for each real one.
const CHECK_EVERY: u32 = 64;

pub struct Registers {
    seed: u64,
    beat: u64,
    calls: u32,
}

impl Registers {
    pub fn new(seed: u64, vcpu: u32) -> Self {
        let registers = Self { seed: mix(seed ^ u64::from(vcpu) << 40), beat: 0, calls: 0 };
        registers.put();
        registers
    }

    fn value(&self, register: u64) -> u64 {
        mix(self.seed ^ self.beat << 8 ^ register)
    }

    fn put(&self) {
        let values: [u64; 8] = core::array::from_fn(|i| self.value(i as u64));
        // SAFETY: reads the array. Nothing else in the program uses the x87 unit, so its state is nobody's business.
        unsafe {
            asm!(
                "movq mm0, [{0}]", "movq mm1, [{0} + 8]", "movq mm2, [{0} + 16]", "movq mm3, [{0} + 24]",
                "movq mm4, [{0} + 32]", "movq mm5, [{0} + 40]", "movq mm6, [{0} + 48]", "movq mm7, [{0} + 56]",
                in(reg) values.as_ptr(), options(nostack, readonly, preserves_flags)
            );
        }
    }

    /// Looks at the MMX registers every now and then, and gives them new values.
    #[inline]
    pub fn check(&mut self, report: &mut VcpuReport) {
        self.calls += 1;
        if self.calls == CHECK_EVERY {
            self.calls = 0;
            self.check_now(report);
        }
    }

    fn check_now(&mut self, report: &mut VcpuReport) {
        let mut found = [0u64; 8];
        // SAFETY: writes the array.
        unsafe {
            asm!(
                "movq [{0}], mm0", "movq [{0} + 8], mm1", "movq [{0} + 16], mm2", "movq [{0} + 24], mm3",
                "movq [{0} + 32], mm4", "movq [{0} + 40], mm5", "movq [{0} + 48], mm6", "movq [{0} + 56], mm7",
                in(reg) found.as_mut_ptr(), options(nostack, preserves_flags)
            );
        }
        self.compare(WRONG_MMX, &found, report);
        self.beat += 1;
        self.put();
        report.registers_checked();
    }

    /// Pauses, with values in the SSE registers meanwhile.
    pub fn rest(&self, pauses: u32, report: &mut VcpuReport) {
        let mut values: [u64; 16] = core::array::from_fn(|i| self.value(i as u64));
        // SAFETY: reads and writes the array.
        unsafe {
            asm!(
                "movups xmm8, [{0}]", "movups xmm9, [{0} + 16]", "movups xmm10, [{0} + 32]",
                "movups xmm11, [{0} + 48]", "movups xmm12, [{0} + 64]", "movups xmm13, [{0} + 80]",
                "movups xmm14, [{0} + 96]", "movups xmm15, [{0} + 112]",
                "2:", "pause", "dec {1:e}", "jnz 2b",
                "movups [{0}], xmm8", "movups [{0} + 16], xmm9", "movups [{0} + 32], xmm10",
                "movups [{0} + 48], xmm11", "movups [{0} + 64], xmm12", "movups [{0} + 80], xmm13",
                "movups [{0} + 96], xmm14", "movups [{0} + 112], xmm15",
                in(reg) values.as_mut_ptr(), inout(reg) pauses.max(1) => _,
                out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _, options(nostack)
            );
        }
        self.compare(WRONG_SSE, &values, report);
    }

    /// Reports the first of them that is wrong.
    fn compare(&self, kind: u32, found: &[u64], report: &mut VcpuReport) {
        for (i, found) in found.iter().copied().enumerate() {
            let expected = self.value(i as u64);
            if found != expected {
                report.mismatch(Mismatch {
                    kind,
                    word: i as u32,
                    address: 0,
                    expected,
                    found,
                    lap: self.beat,
                });
                return;
            }
        }
    }
}
