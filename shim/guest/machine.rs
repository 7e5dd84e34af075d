//! The processor: how the program begins, how it ends when it panics, ports, clock and memory, and the functions that the
//! compiler expects of a C library.

use core::arch::{asm, global_asm, naked_asm};
use core::fmt::Write;
use core::panic::PanicInfo;

use super::layout::{PARAMETERS_ADDRESS, Parameters, RING_WRONG, STACK_BYTES};
use super::report::VcpuReport;

// The host sets the stack and puts the number of the processor into EDI. The floating-point units are put into the state
// that the calling convention asks for, whatever KVM begins with.
global_asm!(
    ".pushsection .text._start, \"ax\"",
    ".globl _start",
    "_start:",
    "fninit",
    "push 0x1f80",
    "ldmxcsr [rsp]",
    "add rsp, 8",
    "cld",
    "call {run}",
    "ud2",
    ".popsection",
    run = sym super::run,
);

/// The time-stamp counter.
#[inline]
pub fn tsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a register; CR4.TSD is off.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes 4 bytes to a port. The host may read all of memory then.
pub fn out(port: u16, value: u32) {
    // SAFETY: IOPL is 3; what the host does then is to read.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) };
}

/// Everything written before is seen by others before anything that is read afterwards.
#[inline]
pub fn fence() {
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
}

/// The compiler moves no access to memory across this; the processor keeps stores in their order, and loads too.
#[inline]
pub fn barrier() {
    // SAFETY: no instruction at all.
    unsafe { asm!("", options(nostack, preserves_flags)) };
}

/// Reads a value as it is now.
///
/// # Safety
/// There is a `T` at the address.
#[inline]
pub unsafe fn load<T: Copy>(address: u64) -> T {
    // SAFETY: as the caller promises.
    unsafe { (address as *const T).read_volatile() }
}

/// Writes a value now.
///
/// # Safety
/// There is room for a `T` at the address that nothing else in the program refers to.
#[inline]
pub unsafe fn store<T: Copy>(address: u64, value: T) {
    // SAFETY: as the caller promises.
    unsafe { (address as *mut T).write_volatile(value) }
}

/// Reads 4 bytes of a device: one plain instruction, which any emulator knows.
///
/// # Safety
/// There is a register of a device at the address.
pub unsafe fn read_register(address: u64) -> u32 {
    let value: u32;
    // SAFETY: as the caller promises.
    unsafe { asm!("mov {0:e}, [{1}]", out(reg) value, in(reg) address, options(nostack, preserves_flags)) };
    value
}

/// Reads 2 bytes of a device.
///
/// # Safety
/// There is a register of a device at the address.
pub unsafe fn read_register_16(address: u64) -> u16 {
    let value: u16;
    // SAFETY: as the caller promises.
    unsafe { asm!("mov {0:x}, [{1}]", out(reg) value, in(reg) address, options(nostack, preserves_flags)) };
    value
}

/// Writes 4 bytes of a device. It may read and write memory as it was told to.
///
/// # Safety
/// There is a register of a device at the address, and what the device does then is sound.
pub unsafe fn write_register(address: u64, value: u32) {
    // SAFETY: as the caller promises.
    unsafe { asm!("mov [{1}], {0:e}", in(reg) value, in(reg) address, options(nostack, preserves_flags)) };
}

/// Says in the report that the program is wrong, and rests for ever.
#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    let stack: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rsp", out(reg) stack, options(nomem, nostack, preserves_flags)) };
    // SAFETY: the host wrote the parameters there before it started the processors.
    let parameters = unsafe { load::<Parameters>(PARAMETERS_ADDRESS) };
    let vcpu = (stack.wrapping_sub(parameters.stacks) / STACK_BYTES) as u32;
    // A stack that is none of ours is the first one's problem.
    let mut report = VcpuReport::new(if vcpu < parameters.vcpus { vcpu } else { 0 });
    // Writing cannot fail: what is too long is cut off.
    let _ = write!(report.panicked(), "{info}");
    report.ring(RING_WRONG);
    loop {
        core::hint::spin_loop();
    }
}

/// The compiler's own library refers to these two; nothing calls them, as a panic does not unwind.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() {}

// What the compiler makes of copies and comparisons. They are written in assembly so that it does not make calls of
// themselves of them.

#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    naked_asm!("mov rax, rdi", "mov rcx, rdx", "rep movsb", "ret")
}

#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "mov rcx, rdx",
        // From the end where the destination begins within the source.
        "mov r8, rdi",
        "sub r8, rsi",
        "cmp r8, rdx",
        "jb 2f",
        "rep movsb",
        "ret",
        "2:",
        "lea rdi, [rdi + rdx - 1]",
        "lea rsi, [rsi + rdx - 1]",
        "std",
        "rep movsb",
        "cld",
        "ret"
    )
}

#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, len: usize) -> *mut u8 {
    naked_asm!("mov r8, rdi", "mov eax, esi", "mov rcx, rdx", "rep stosb", "mov rax, r8", "ret")
}

#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, len: usize) -> i32 {
    naked_asm!(
        "xor ecx, ecx",
        "2:",
        "cmp rcx, rdx",
        "je 3f",
        "movzx eax, byte ptr [rdi + rcx]",
        "movzx r8d, byte ptr [rsi + rcx]",
        "inc rcx",
        "sub eax, r8d",
        "je 2b",
        "ret",
        "3:",
        "xor eax, eax",
        "ret"
    )
}

#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, len: usize) -> i32 {
    naked_asm!("jmp {}", sym memcmp)
}

#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    naked_asm!("xor eax, eax", "2:", "cmp byte ptr [rdi + rax], 0", "je 3f", "inc rax", "jmp 2b", "3:", "ret")
}
