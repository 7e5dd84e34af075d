//! As much of a machine as the test guest needs: processors on threads, memory, and software disks behind MMIO exits.

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region, kvm_vcpu_events, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use shim::device::{MMIO_BYTES, MMIO_START};
use shim::guest::{REPORT_PORT, Report, Ring, SelftestOptions, VcpuStart, load, report};
use shim::memory::GuestRam;

use crate::disk::SoftDisk;

/// Longest wait for anything the guest is to do.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Whether machines can run here; says so if not.
pub fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            eprintln!("SKIPPED: no /dev/kvm here ({error})");
            None
        }
    }
}

/// State of a processor as far as the guest uses it.
pub struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Loses what was in the floating-point registers: as after a reset.
    pub fn forget_floating_point(&mut self) {
        // The legacy area's registers, from byte 32 on, and XSTATE_BV, which says what is not as after a reset.
        self.xsave.region[8..104].fill(0);
        self.xsave.region[128] = 0;
        self.xsave.region[129] = 0;
    }
}

/// What processors and the test share while they run.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    rings: Mutex<Vec<Ring>>,
    trouble: Mutex<Option<String>>,
}

pub struct Machine {
    vm: Arc<VmFd>,
    pub ram: Arc<GuestRam>,
    pub disks: Vec<Arc<SoftDisk>>,
    vcpus: Vec<VcpuFd>,
    threads: Vec<JoinHandle<VcpuFd>>,
    shared: Arc<Shared>,
}

impl Machine {
    /// A machine on this memory whose processors were not touched yet.
    fn bare(kvm: &Kvm, ram: Arc<GuestRam>, vcpus: u32, disks: Vec<Arc<SoftDisk>>) -> Self {
        let vm = kvm.create_vm().unwrap();
        vm.set_tss_address(0xfffb_d000).unwrap();
        vm.create_irq_chip().unwrap();
        for region in ram.regions() {
            let region = kvm_userspace_memory_region {
                slot: region.slot,
                flags: 0,
                guest_phys_addr: region.guest_start,
                memory_size: region.len,
                userspace_addr: ram.page_pointer(region.first_page) as u64,
            };
            // SAFETY: the memory lives as long as the machine, which holds it and the VM.
            unsafe { vm.set_user_memory_region(region).unwrap() };
        }
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        let vcpus = (0..vcpus)
            .map(|i| {
                let vcpu = vm.create_vcpu(i.into()).unwrap();
                vcpu.set_cpuid2(&cpuid).unwrap();
                vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
                vcpu
            })
            .collect();
        Self { vm: Arc::new(vm), ram, disks, vcpus, threads: Vec::new(), shared: Arc::default() }
    }

    /// A machine with the test guest in it, ready to run.
    pub fn new(kvm: &Kvm, bytes: u64, vcpus: u32, options: &str, disks: Vec<SoftDisk>) -> Self {
        let ram = GuestRam::new(bytes, false).unwrap();
        let disks: Vec<_> = disks.into_iter().map(|disk| disk.start(ram.clone())).collect();
        let addresses: Vec<_> = (0..disks.len() as u64).map(|i| MMIO_START + i * MMIO_BYTES).collect();
        let machine = Self::bare(kvm, ram, vcpus, disks);
        let options: SelftestOptions = options.parse().unwrap();
        let tsc_khz = machine.vcpus[0].get_tsc_khz().unwrap();
        let starts = load(&machine.ram, &options, vcpus, &addresses, tsc_khz).unwrap();
        for (vcpu, start) in machine.vcpus.iter().zip(&starts) {
            begin(vcpu, start);
        }
        machine
    }

    /// Lets the processors run.
    pub fn run(&mut self) {
        self.shared.stop.store(false, Ordering::SeqCst);
        for vcpu in self.vcpus.drain(..) {
            let (shared, disks) = (self.shared.clone(), self.disks.clone());
            self.threads.push(std::thread::spawn(move || run_vcpu(vcpu, &shared, &disks)));
        }
    }

    /// Stops them, wherever they are.
    pub fn pause(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            while !thread.is_finished() {
                // SAFETY: the thread was not joined, so its id is valid; the signal has a handler that does nothing.
                unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGRTMIN()) };
                std::thread::sleep(Duration::from_millis(1));
            }
            self.vcpus.push(thread.join().unwrap());
        }
        if let Some(trouble) = self.shared.trouble.lock().unwrap().take() {
            panic!("{trouble}; {:?}", report(&self.ram));
        }
    }

    /// What the guest rang for so far.
    pub fn rings(&self) -> Vec<Ring> {
        self.shared.rings.lock().unwrap().clone()
    }

    pub fn report(&self) -> Report {
        report(&self.ram).unwrap()
    }

    /// Waits until the report is as wanted.
    pub fn wait(&self, what: &str, wanted: impl Fn(&Report) -> bool) -> Report {
        let end = Instant::now() + PATIENCE;
        loop {
            let report = self.report();
            if wanted(&report) {
                return report;
            }
            if let Some(trouble) = &*self.shared.trouble.lock().unwrap() {
                panic!("{trouble}; {report:?}");
            }
            assert!(Instant::now() < end, "the guest does not get to the point: {what}; {report:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// State of the paused processors.
    pub fn save(&mut self) -> Vec<VcpuState> {
        let save = |vcpu: &VcpuFd| VcpuState {
            regs: vcpu.get_regs().unwrap(),
            sregs: vcpu.get_sregs().unwrap(),
            xsave: vcpu.get_xsave().unwrap(),
            events: vcpu.get_vcpu_events().unwrap(),
        };
        self.vcpus.iter().map(save).collect()
    }

    /// Another machine on a copy of the memory, with these processors.
    pub fn copy(&self, kvm: &Kvm, states: &[VcpuState]) -> Self {
        let ram = GuestRam::new(self.ram.bytes(), false).unwrap();
        let mut buffer = vec![0; 1 << 20];
        for first in (0..ram.pages()).step_by(buffer.len() / 4096) {
            self.ram.read_pages(first, &mut buffer);
            ram.write_pages(first, &buffer);
        }
        let disks = self.disks.iter().map(|disk| disk.moved().start(ram.clone())).collect();
        let machine = Self::bare(kvm, ram, states.len() as u32, disks);
        for (vcpu, state) in machine.vcpus.iter().zip(states) {
            vcpu.set_regs(&state.regs).unwrap();
            vcpu.set_sregs(&state.sregs).unwrap();
            // SAFETY: the processor has no features for which the state would be larger than this structure.
            unsafe { vcpu.set_xsave(&state.xsave).unwrap() };
            vcpu.set_vcpu_events(&state.events).unwrap();
        }
        machine
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.pause();
        }
        self.disks.iter().for_each(|disk| disk.stop());
        let _ = &self.vm;
    }
}

fn begin(vcpu: &VcpuFd, start: &VcpuStart) {
    let mut sregs = vcpu.get_sregs().unwrap();
    start.apply(&mut sregs);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&start.regs).unwrap();
}

fn run_vcpu(mut vcpu: VcpuFd, shared: &Shared, disks: &[Arc<SoftDisk>]) -> VcpuFd {
    catch_signal();
    let disk = |address: u64| {
        let disk =
            disks.get(((address - MMIO_START) / MMIO_BYTES) as usize).expect("the guest knows its disks");
        (disk, (address - MMIO_START) % MMIO_BYTES)
    };
    while !shared.stop.load(Ordering::SeqCst) {
        let trouble = match vcpu.run() {
            Ok(VcpuExit::IoOut(REPORT_PORT, data)) => {
                let ring = Ring::parse(data).expect("a ring that makes sense");
                shared.rings.lock().unwrap().push(ring);
                continue;
            }
            Ok(VcpuExit::MmioRead(address, data)) if address >= MMIO_START => {
                let (disk, offset) = disk(address);
                disk.read(offset, data);
                continue;
            }
            Ok(VcpuExit::MmioWrite(address, data)) if address >= MMIO_START => {
                let (disk, offset) = disk(address);
                disk.write(offset, data);
                continue;
            }
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => continue,
            other => format!("unexpected exit {other:?}"),
        };
        *shared.trouble.lock().unwrap() = Some(format!("{trouble} at {:x?}", vcpu.get_regs()));
        break;
    }
    // What an exit left to be done, such as going on behind an `out`, is done before the state is saved.
    vcpu.set_kvm_immediate_exit(1);
    let _ = vcpu.run();
    vcpu.set_kvm_immediate_exit(0);
    vcpu
}

fn catch_signal() {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: the handler does nothing, and the structure is valid when zeroed.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        libc::sigaction(libc::SIGRTMIN(), &action, std::ptr::null_mut());
    }
}
