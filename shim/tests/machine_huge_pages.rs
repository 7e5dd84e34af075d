//! Machines in huge pages: all their memory is theirs from the start or they are refused, and they move like others.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod migrate_fake;

use std::fs::{File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use migrate_fake::{FakeHost, FakeSource, Log, Target, World, assert_same, options, send, unix};
use shim::device::Device;
use shim::device::serial::SerialPort;
use shim::guest::{self, Command};
use shim::machine::{Description, DeviceDescription, Finding, SourceMachine, TargetHost};
use shim::memory::{GuestRam, HUGE_PAGE_BYTES, huge_pages_free};
use shim::migrate::{Security, SendError};
use shim::pages::PAGE_BYTES;
use shim::vm::host::{DeviceMaker, KvmHost};
use shim::vm::machine::{Machine, Parts};
use shim::vm::{cpu, host, kvm};

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
/// Longest wait for the pool, or for anything a guest is to do.
const PATIENCE: Duration = Duration::from_secs(30);
const MIB: u64 = 1 << 20;

/// The host's pool of huge pages, for one test at a time. It is put back as it was.
struct Pool {
    before: Option<String>,
    // Let go of last: until then the pool is not another test's.
    _alone: File,
}

impl Pool {
    /// With so many pages free at least; says so where that cannot be.
    fn with_free(pages: u64) -> Option<Self> {
        let alone =
            File::open(POOL).inspect_err(|error| eprintln!("SKIPPED: no huge pages: {error}")).ok()?;
        let until = Instant::now() + PATIENCE;
        while let Err(error) = alone.try_lock() {
            assert!(matches!(error, TryLockError::WouldBlock), "{error}");
            assert!(Instant::now() < until, "another test keeps the pool of huge pages");
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut pool = Self { before: None, _alone: alone };
        let missing = pages.saturating_sub(huge_pages_free().unwrap());
        if missing > 0 {
            let before = std::fs::read_to_string(POOL).unwrap();
            let wanted = before.trim().parse::<u64>().unwrap() + missing;
            if std::fs::write(POOL, wanted.to_string()).is_ok() {
                pool.before = Some(before);
            }
        }
        let free = huge_pages_free().unwrap();
        if free < pages {
            eprintln!(
                "SKIPPED: {free} huge pages are free, {pages} are needed, and this user cannot add any"
            );
            return None;
        }
        Some(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            std::fs::write(POOL, before).unwrap();
        }
    }
}

/// Nothing is to be given to machines without devices.
#[derive(Debug)]
struct NoDevices;

impl DeviceMaker for NoDevices {
    fn check(&self, _: usize, _: &DeviceDescription) -> Vec<Finding> {
        Vec::new()
    }

    fn make(&self, _: usize, _: &DeviceDescription, _: &Arc<GuestRam>) -> Result<Arc<dyn Device>> {
        bail!("there are no devices here")
    }

    fn serial(&self) -> Result<Arc<SerialPort>> {
        Ok(Arc::new(SerialPort::new(Box::new(std::io::sink()))?))
    }
}

fn kvm_or_skip() -> Option<kvm_ioctls::Kvm> {
    kvm::open().inspect_err(|error| eprintln!("SKIPPED: no KVM here: {error:#}")).ok()
}

/// A machine with the test guest in it.
fn machine(kvm: &kvm_ioctls::Kvm, bytes: u64, huge_pages: bool) -> Arc<Machine> {
    let tsc_khz = host::tsc_khz(kvm).unwrap();
    let parts = Parts {
        name: "huge".into(),
        ram: GuestRam::new(bytes, huge_pages).unwrap(),
        vcpus: 1,
        cpu: cpu::describe(cpu::host_leaves(kvm, None).unwrap(), None, cpu::msrs(kvm).unwrap(), tsc_khz),
        serial: NoDevices.serial().unwrap(),
        devices: Vec::new(),
    };
    let machine = Machine::new(kvm, parts).unwrap();
    let options = "selftest,pattern=random,working-set=4M,rate=16M,report-ms=5".parse().unwrap();
    let starts = guest::load(SourceMachine::ram(&*machine), &options, 1, &[], tsc_khz).unwrap();
    let apply = |sregs: &mut _, _: &_| {
        starts[0].apply(sregs);
        Ok(())
    };
    machine.begin(0, &starts[0].regs, apply).unwrap();
    machine
}

/// Has the guest go on and verify all that it wrote.
fn works(ram: &GuestRam) {
    let until = Instant::now() + PATIENCE;
    let mut number = None;
    loop {
        if let Ok(report) = guest::report(ram) {
            assert_eq!(report.mismatches, 0, "{report:#?}");
            let number = *number.get_or_insert_with(|| guest::send_command(ram, Command::Verify).unwrap());
            if report.answered(number) {
                return;
            }
        }
        assert!(Instant::now() < until, "{:#?}", guest::report(ram));
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn memory_that_the_pool_cannot_hold_is_refused_with_what_is_missing() {
    let Some(_pool) = Pool::with_free(0) else { return };
    let free = huge_pages_free().unwrap();
    let error = GuestRam::new((free + 3) * HUGE_PAGE_BYTES, true).expect_err("the pool is too small");
    let text = format!("{error:#}");
    for part in
        [&format!("{} huge pages", free + 3), &format!("{free} are free"), "vm.nr_hugepages", "least 3"]
    {
        assert!(text.contains(part), "{part:?} is missing: {text}");
    }
    assert_eq!(huge_pages_free(), Some(free), "what was refused keeps nothing");
}

#[test]
fn all_of_the_memory_is_its_own_from_the_start() {
    let Some(_pool) = Pool::with_free(4) else { return };
    let free = huge_pages_free().unwrap();
    let ram = GuestRam::new(4 * HUGE_PAGE_BYTES, true).unwrap();
    assert_eq!(huge_pages_free(), Some(free - 4));
    assert_eq!(ram.file().metadata().unwrap().blocks() * 512, ram.bytes(), "it stands in memory already");
    drop(ram);
    assert_eq!(huge_pages_free(), Some(free));
}

#[test]
fn signals_meanwhile_do_not_keep_it_from_its_memory() {
    extern "C" fn nothing(_: libc::c_int) {}
    let Some(_pool) = Pool::with_free(32) else { return };
    // SAFETY: the handler does nothing, and the structure is valid when zeroed.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        libc::sigaction(libc::SIGRTMIN() + 5, &action, std::ptr::null_mut());
    }
    let maker = std::thread::spawn(|| GuestRam::new(32 * HUGE_PAGE_BYTES, true).unwrap());
    while !maker.is_finished() {
        // SAFETY: the thread was not joined, so its id is valid.
        unsafe { libc::pthread_kill(maker.as_pthread_t(), libc::SIGRTMIN() + 5) };
        std::thread::sleep(Duration::from_micros(500));
    }
    let ram = maker.join().unwrap();
    assert_eq!(ram.file().metadata().unwrap().blocks() * 512, ram.bytes());
}

#[test]
fn no_page_of_it_can_be_given_back() {
    let Some(_pool) = Pool::with_free(1) else { return };
    let ram = GuestRam::new(HUGE_PAGE_BYTES, true).unwrap();
    assert!(ram.discard(0, ram.pages()).is_err(), "touching it could kill the machine afterwards");
}

#[test]
fn a_target_without_enough_huge_pages_says_so_before_anything_moves() {
    let Some(kvm) = kvm_or_skip() else { return };
    let Some(_pool) = Pool::with_free(0) else { return };
    let small = machine(&kvm, 8 * MIB, false);
    let target = KvmHost::new(kvm::open().unwrap(), Box::new(NoDevices), None);
    let needs = |pages: u64| {
        let small = SourceMachine::description(&*small).unwrap();
        Description { huge_pages: true, memory_bytes: pages * HUGE_PAGE_BYTES, ..small }
    };
    let free = huge_pages_free().unwrap();
    assert!(free == 0 || target.check(&needs(free)).is_compatible());
    let report = target.check(&needs(free + 3));
    let [finding] = &report.findings[..] else { panic!("{report:?}") };
    assert_eq!((finding.kind.as_str(), finding.fatal), ("memory", true));
    assert!(finding.needed.starts_with(&(free + 3).to_string()), "{finding:?}");
    assert!(finding.found.starts_with(&free.to_string()), "{finding:?}");
    assert!(finding.message.contains("vm.nr_hugepages by at least 3"), "{finding:?}");
    assert!(
        target.create(&needs(free + 3)).is_err_and(|error| error.to_string().contains("vm.nr_hugepages"))
    );
}

/// Also what only a backend wrote, through a mapping of its own.
#[test]
fn memory_in_huge_pages_under_constant_writes_arrives_exactly() {
    let Some(_pool) = Pool::with_free(16) else { return };
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let ram = GuestRam::new(16 * MIB, true).unwrap();
    let source = FakeSource::with_ram(&world, ram, Log::Manual, 4000);
    source.set_span(1024);
    let backend = vm_memory::FileOffset::from_arc(source.ram().file().clone(), 0);
    let backend = vm_memory::MmapRegion::<()>::from_file(backend, 16 << 20).unwrap();
    let by_backend = source.ram().pages() - 5;
    // SAFETY: the page lies within the mapping, and nobody else has it.
    unsafe { backend.as_ptr().add(by_backend as usize * PAGE_BYTES).write_bytes(0xbe, PAGE_BYTES) };
    let target = Target::start(&world, &unix(dir.path()), &Security::default(), dir.path());
    let report = send(&source, &options(&target.address, dir.path())).expect("moved");
    let received = target.received();
    assert!(received.machine.ram().huge_pages() && received.description.huge_pages);
    assert_same(source.ram(), received.machine.ram());
    let mut page = [0; PAGE_BYTES];
    received.machine.ram().read_pages(by_backend, &mut page);
    assert_eq!(page, [0xbe; PAGE_BYTES]);
    assert!(report.progress.pages_zero > 0, "{report:?}");
    world.assert_rules_kept();
}

#[test]
fn a_source_goes_on_when_the_target_has_no_huge_pages() {
    let Some(_pool) = Pool::with_free(4) else { return };
    let (world, dir) = (World::new(), tempfile::tempdir().unwrap());
    let free = huge_pages_free().unwrap();
    // What is left is one page short.
    let ram = GuestRam::new(free.div_ceil(2).max(1) * HUGE_PAGE_BYTES, true).unwrap();
    let rest = huge_pages_free().unwrap();
    let _others = (rest > 1).then(|| GuestRam::new((rest - 1) * HUGE_PAGE_BYTES, true).unwrap());
    let source = FakeSource::with_ram(&world, ram, Log::Classic, 500);
    let host = FakeHost { world: world.clone(), incompatible: false };
    let target = Target::start_with(host, &unix(dir.path()), &Security::default(), dir.path());
    let error = send(&source, &options(&target.address, dir.path())).expect_err("no room");
    assert!(matches!(error, SendError::Failed(_)), "{error}");
    assert!(error.to_string().contains("vm.nr_hugepages"), "{error}");
    source.assert_untouched();
    world.assert_rules_kept();
}

#[test]
fn a_machine_in_huge_pages_starts_works_and_moves() {
    let Some(kvm) = kvm_or_skip() else { return };
    let Some(_pool) = Pool::with_free(16) else { return };
    let dir = tempfile::tempdir().unwrap();
    let source = machine(&kvm, 16 * MIB, true);
    source.resume().unwrap();
    works(SourceMachine::ram(&*source));
    let host = KvmHost::new(kvm, Box::new(NoDevices), None);
    let target = Target::start_with(host, &unix(dir.path()), &Security::default(), dir.path());
    let report = send(&*source, &options(&target.address, dir.path())).expect("moved");
    let received = target.received();
    assert!(received.machine.ram().huge_pages(), "{report:?}");
    works(received.machine.ram());
    assert!(guest::verify_from_outside(SourceMachine::ram(&*source)).unwrap().is_right());
}
