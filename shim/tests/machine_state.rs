//! A machine on KVM with a few instructions of its own: what it dirties is told, it stops and goes on, it is slowed down, and
//! its state goes on in another machine.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::arch::global_asm;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use shim::device::serial::SerialPort;
use shim::machine::SourceMachine;
use shim::memory::GuestRam;
use shim::pages::PageSet;
use shim::vm::machine::{Life, Machine, Parts};
use shim::vm::{cpu, host, kvm};
use vm_memory::{Bytes, GuestAddress};

// For each page from r8 to r9, the lap (rbx) is written into its first word; endlessly.
global_asm!(
    ".pushsection .rodata",
    ".globl lapper_start",
    ".globl lapper_end",
    "lapper_start:",
    "1: movq %r8, %rdi",
    "incq %rbx",
    "2: movq %rbx, (%rdi)",
    "addq $4096, %rdi",
    "cmpq %r9, %rdi",
    "jb 2b",
    "movq %rbx, (%r10)",
    "jmp 1b",
    "lapper_end:",
    ".popsection",
    options(att_syntax)
);

unsafe extern "C" {
    static lapper_start: u8;
    static lapper_end: u8;
}

const MEMORY: u64 = 64 << 20;
const CODE: u64 = 0x1_0000;
const LAPS: u64 = 0x2_0000;
const FIRST: u64 = 16 << 20;

fn kvm_or_skip() -> Option<kvm_ioctls::Kvm> {
    match kvm::open() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            eprintln!("SKIPPED: no KVM here: {error:#}");
            None
        }
    }
}

fn machine(kvm: &kvm_ioctls::Kvm) -> Arc<Machine> {
    machine_at(kvm, host::tsc_khz(kvm).unwrap())
}

/// One whose time-stamp counter is to go at this rate.
fn machine_at(kvm: &kvm_ioctls::Kvm, tsc_khz: u32) -> Arc<Machine> {
    let ram = GuestRam::new(MEMORY, false).unwrap();
    let leaves = cpu::host_leaves(kvm, None).unwrap();
    let parts = Parts {
        name: "lapper".into(),
        ram,
        vcpus: 1,
        cpu: cpu::describe(leaves, None, cpu::msrs(kvm).unwrap(), tsc_khz),
        serial: Arc::new(SerialPort::new(Box::new(std::io::sink())).unwrap()),
        devices: Vec::new(),
    };
    Machine::new(kvm, parts).unwrap()
}

fn segment(type_: u8, selector: u16, l: u8, db: u8) -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    }
}

/// Puts the program into the machine and lets it begin.
fn load(machine: &Machine, pages: u64) {
    let memory = SourceMachine::ram(machine).memory();
    let put = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).unwrap();
    put(0x2000, 0x3007);
    put(0x3000, 0x4007);
    (0..512u64).for_each(|i| put(0x4000 + i * 8, i << 21 | 0x87));
    // SAFETY: both symbols stand in one section, the end behind the start.
    let code = unsafe {
        let len = (&raw const lapper_end).offset_from(&raw const lapper_start) as usize;
        std::slice::from_raw_parts(&raw const lapper_start, len)
    };
    memory.write_slice(code, GuestAddress(CODE)).unwrap();
    let vcpu = machine.vcpus()[0].fd();
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cs = segment(11, 0x33, 1, 0);
    let data = segment(3, 0x2b, 0, 1);
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    (sregs.cr3, sregs.cr4, sregs.efer) = (0x2000, sregs.cr4 | 1 << 5, sregs.efer | 0x500);
    sregs.cr0 |= 0x8000_0023;
    vcpu.set_sregs(&sregs).unwrap();
    let regs = kvm_regs {
        rip: CODE,
        rflags: 0x3002,
        rsp: 0x7000,
        r8: FIRST,
        r9: FIRST + pages * 4096,
        r10: LAPS,
        ..Default::default()
    };
    vcpu.set_regs(&regs).unwrap();
}

fn laps(machine: &Machine) -> u64 {
    SourceMachine::ram(machine).memory().read_obj(GuestAddress(LAPS)).unwrap()
}

fn wait_for_laps(machine: &Machine, laps_wanted: u64) {
    let until = Instant::now() + Duration::from_secs(60);
    while laps(machine) < laps_wanted {
        assert!(Instant::now() < until, "{} laps of {laps_wanted}: {:?}", laps(machine), machine.life());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn it_stops_and_goes_on_where_it_stood() {
    let Some(kvm) = kvm_or_skip() else { return };
    let machine = machine(&kvm);
    load(&machine, 100);
    machine.resume().unwrap();
    for _ in 0..20 {
        wait_for_laps(&machine, laps(&machine) + 10);
        machine.pause().unwrap();
        assert_eq!(machine.life(), Life::Paused);
        let stood = laps(&machine);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(laps(&machine), stood, "it runs while it is paused");
        machine.resume().unwrap();
    }
}

#[test]
fn what_it_writes_is_told_and_told_again_after_it_was_copied() {
    let Some(kvm) = kvm_or_skip() else { return };
    let machine = machine(&kvm);
    load(&machine, 100);
    machine.start_logging().unwrap();
    let pages = SourceMachine::ram(&*machine).pages();
    let all = PageSet::full(pages);
    for round in 0..5 {
        machine.resume().unwrap();
        wait_for_laps(&machine, laps(&machine) + 3);
        machine.pause().unwrap();
        let mut dirty = PageSet::empty(pages);
        machine.collect_dirty(&mut dirty).unwrap();
        for page in FIRST / 4096..FIRST / 4096 + 100 {
            assert!(dirty.contains(page), "round {round}: page {page} was written");
        }
        assert!(dirty.contains(LAPS / 4096));
        if round > 0 {
            assert!(dirty.len() <= 110, "round {round}: {} pages", dirty.len());
        }
        machine.before_copy(0, all.words()).unwrap();
        dirty.clear();
        machine.collect_dirty(&mut dirty).unwrap();
        assert!(dirty.is_empty(), "round {round}: {} pages of a machine that stands still", dirty.len());
    }
    machine.stop_logging().unwrap();
    machine.stop_logging().unwrap();
    machine.start_logging().unwrap();
}

#[test]
fn its_state_goes_on_in_another_machine_with_the_same_memory() {
    let Some(kvm) = kvm_or_skip() else { return };
    let mut machine_now = machine(&kvm);
    load(&machine_now, 1000);
    machine_now.resume().unwrap();
    for _ in 0..5 {
        wait_for_laps(&machine_now, laps(&machine_now) + 3);
        machine_now.pause().unwrap();
        let state = machine_now.save().unwrap();
        let next = machine(&kvm);
        let (from, to) = (SourceMachine::ram(&*machine_now), SourceMachine::ram(&*next));
        let mut buffer = vec![0; 1 << 20];
        for chunk in 0..MEMORY >> 20 {
            from.read_pages(chunk * 256, &mut buffer);
            to.write_pages(chunk * 256, &buffer);
        }
        let stood = laps(&next);
        next.restore(&state).unwrap();
        let before = machine_now.vcpus()[0].fd().get_regs().unwrap();
        assert_eq!(next.vcpus()[0].fd().get_regs().unwrap(), before);
        SourceMachine::end(&*machine_now);
        assert!(machine_now.resume().is_err(), "what is gone can't run again");
        next.resume().unwrap();
        wait_for_laps(&next, stood + 3);
        machine_now = next;
    }
}

#[test]
fn a_slowed_down_machine_does_less_and_stops_as_fast() {
    let Some(kvm) = kvm_or_skip() else { return };
    let machine = machine(&kvm);
    load(&machine, 1000);
    machine.resume().unwrap();
    wait_for_laps(&machine, 10);
    let measure = |time: Duration| {
        let before = laps(&machine);
        std::thread::sleep(time);
        laps(&machine) - before
    };
    let compare = || {
        machine.throttle(0);
        std::thread::sleep(Duration::from_millis(50));
        let full = measure(Duration::from_millis(400));
        machine.throttle(90);
        std::thread::sleep(Duration::from_millis(50));
        let slow = measure(Duration::from_millis(400));
        machine.throttle(0);
        std::thread::sleep(Duration::from_millis(50));
        let again = measure(Duration::from_millis(400));
        println!("laps in 400 ms: {full}, {slow} slowed down by 90 %, {again} afterwards");
        slow * 3 < full && slow * 3 < again * 2
    };
    // What else the host does may take the processor from either, but not always from the faster one.
    assert!((0..10).any(|_| compare()), "never slower");
    machine.throttle(99);
    let began = Instant::now();
    machine.pause().unwrap();
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let Some(kvm) = kvm_or_skip() else { return };
    let machine = machine(&kvm);
    let garbage = shim::machine::MachineState(b"{\"version\":1}".to_vec());
    assert!(machine.restore(&garbage).is_err());
    let state = machine.save().unwrap();
    let mut value: serde_json::Value = serde_json::from_slice(&state.0).unwrap();
    value["version"] = 77.into();
    let other = shim::machine::MachineState(serde_json::to_vec(&value).unwrap());
    let error = format!("{:#}", machine.restore(&other).unwrap_err());
    assert!(error.contains("77"), "{error}");
}

#[test]
fn its_counter_goes_at_the_rate_that_the_guest_knows_where_the_host_can_scale_it() {
    let Some(kvm) = kvm_or_skip() else { return };
    let here = host::tsc_khz(&kvm).unwrap();
    let wanted = here / 10 * 9;
    let machine = machine_at(&kvm, wanted);
    let rate = machine.vcpus()[0].fd().get_tsc_khz().unwrap();
    assert_eq!(rate, if cpu::scales_tsc(&kvm) { wanted } else { here });
}

#[test]
fn a_timer_that_is_set_or_has_just_fired_goes_along() {
    const DEADLINE: u32 = 0x6e0;
    let Some(kvm) = kvm_or_skip() else { return };
    if !kvm.check_extension(kvm_ioctls::Cap::TscDeadlineTimer) {
        return eprintln!("SKIPPED: no timer with a deadline here");
    }
    let msr = |machine: &Machine, index| {
        let entry = kvm_msr_entry { index, ..Default::default() };
        let mut msrs = Msrs::from_entries(&[entry]).unwrap();
        assert_eq!(machine.vcpus()[0].fd().get_msrs(&mut msrs).unwrap(), 1);
        msrs.as_slice()[0].data
    };
    for far in [true, false] {
        let from = machine(&kvm);
        let deadline = if far { msr(&from, 0x10) + (1 << 41) } else { 1 };
        {
            let vcpu = from.vcpus()[0].fd();
            let mut lapic = vcpu.get_lapic().unwrap();
            // Switched on; the timer waits for a deadline and has vector 0x40.
            lapic.regs[0xf1] = 1;
            (lapic.regs[0x320], lapic.regs[0x322]) = (0x40, 0b100);
            vcpu.set_lapic(&lapic).unwrap();
            let entry = kvm_msr_entry { index: DEADLINE, data: deadline, ..Default::default() };
            assert_eq!(vcpu.set_msrs(&Msrs::from_entries(&[entry]).unwrap()).unwrap(), 1);
        }
        let to = machine(&kvm);
        to.restore(&from.save().unwrap()).unwrap();
        let pending = to.vcpus()[0].fd().get_lapic().unwrap().regs[0x220] & 1 == 1;
        assert!(msr(&to, DEADLINE) == deadline || !far && pending, "deadline {:#x}", msr(&to, DEADLINE));
    }
}
