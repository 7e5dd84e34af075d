//! The test guest on KVM with a disk of a real blockd: it pauses and goes on, and its state goes on in another machine.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod device_rig;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shim::cli::parts::ConsoleArgument;
use shim::device::blk::{BlkDevice, BlkOptions};
use shim::device::serial::SerialPort;
use shim::device::{Device, DeviceState, MMIO_BYTES, MMIO_START};
use shim::guest::{self, Command, SelftestOptions};
use shim::machine::{DeviceDescription, MachineState, SourceMachine, TargetHost};
use shim::memory::GuestRam;
use shim::pages::PageSet;
use shim::setup::Devices;
use shim::vm::host::KvmHost;
use shim::vm::machine::{Life, Machine, Parts};
use shim::vm::{cpu, host, kvm};
use vmm_sys_util::eventfd::EventFd;

use device_rig::Daemon;

const MEMORY: u64 = 64 << 20;
const QUEUES: u16 = 2;

/// Held by a test while its machines run: hosts with fewer processors than busy guests have get nothing else done.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kvm_or_skip() -> Option<kvm_ioctls::Kvm> {
    match kvm::open() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            eprintln!("SKIPPED: no KVM here: {error:#}");
            None
        }
    }
}

fn disk(daemon: &Daemon, serial: &str, ram: &Arc<GuestRam>, deferred: bool) -> Arc<BlkDevice> {
    let options = BlkOptions { queues: QUEUES, deferred, ..BlkOptions::new(daemon.socket(), serial) };
    BlkDevice::new(options, ram.clone()).unwrap()
}

/// A disk for a test in which its daemon goes away: nobody waits for that for long.
fn impatient(daemon: &Daemon, serial: &str, ram: &Arc<GuestRam>, deferred: bool) -> Arc<BlkDevice> {
    let patience = Duration::from_secs(1);
    let options =
        BlkOptions { queues: QUEUES, deferred, patience, ..BlkOptions::new(daemon.socket(), serial) };
    BlkDevice::new(options, ram.clone()).unwrap()
}

fn machine_of(
    kvm: &kvm_ioctls::Kvm,
    ram: Arc<GuestRam>,
    devices: Vec<Arc<dyn Device>>,
) -> anyhow::Result<Arc<Machine>> {
    let leaves = cpu::host_leaves(kvm, None)?;
    let parts = Parts {
        name: "tested".into(),
        ram,
        vcpus: 2,
        cpu: cpu::describe(leaves, None, cpu::msrs(kvm)?, host::tsc_khz(kvm)?),
        serial: Arc::new(SerialPort::new(Box::new(std::io::sink()))?),
        devices,
    };
    Machine::new(kvm, parts)
}

fn machine(kvm: &kvm_ioctls::Kvm, daemon: &Daemon, deferred: bool) -> Arc<Machine> {
    let ram = GuestRam::new(MEMORY, false).unwrap();
    let disk = disk(daemon, "root", &ram, deferred);
    machine_of(kvm, ram, vec![disk]).unwrap()
}

fn load(kvm: &kvm_ioctls::Kvm, machine: &Machine) {
    let options: SelftestOptions =
        "selftest,working-set=24M,pattern=random,depth=16,disk-range=8M,flush-every=32".parse().unwrap();
    let tsc_khz = host::tsc_khz(kvm).unwrap();
    let ram = SourceMachine::ram(machine);
    let places =
        machine.devices().iter().enumerate().filter(|(_, device)| device.description().kind == "blk");
    let disks: Vec<u64> = places.map(|(place, _)| MMIO_START + place as u64 * MMIO_BYTES).collect();
    let starts = guest::load(ram, &options, 2, &disks, tsc_khz).unwrap();
    for (number, start) in starts.iter().enumerate() {
        machine
            .begin(number, &start.regs, |sregs, _| {
                start.apply(sregs);
                Ok(())
            })
            .unwrap();
    }
}

/// Waits until it has done so many further requests; nothing is wrong meanwhile.
fn work(machine: &Machine, requests: u64) {
    work_on(machine, 0, requests);
}

/// As [`work`], of this disk.
fn work_on(machine: &Machine, disk: usize, requests: u64) {
    let ram = SourceMachine::ram(machine);
    let done = || {
        let report = guest::report(ram).ok()?;
        assert!(report.mismatches == 0 && report.disk_errors == 0, "{report:#?}");
        report.disks.get(disk).map(|disk| disk.reads + disk.writes)
    };
    let wanted = done().unwrap_or(0) + requests;
    let until = Instant::now() + Duration::from_secs(60);
    while done().is_none_or(|done| done < wanted) {
        assert!(Instant::now() < until, "{:?} {:#?}", machine.life(), guest::report(ram));
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn verify(machine: &Machine) {
    let ram = SourceMachine::ram(machine);
    let number = guest::send_command(ram, Command::Verify).unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let report = guest::report(ram).unwrap();
        assert!(report.mismatches == 0 && report.disk_errors == 0, "{report:#?}");
        if report.answered(number) {
            println!("{:?}", report.disks[0]);
            return;
        }
        assert!(Instant::now() < until, "{report:#?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn it_pauses_and_goes_on_with_its_disk() {
    let _alone = alone();
    let (Some(kvm), dir) = (kvm_or_skip(), tempfile::tempdir().unwrap()) else { return };
    let Some(daemon) = Daemon::start(dir.path(), QUEUES) else { return };
    let machine = machine(&kvm, &daemon, false);
    load(&kvm, &machine);
    machine.resume().unwrap();
    for _ in 0..20 {
        work(&machine, 100);
        machine.pause().unwrap();
        machine.resume().unwrap();
    }
    verify(&machine);
}

/// What a migration does, without a wire: logging, two rounds, a pause, the last pages and the state.
#[test]
fn it_goes_on_in_another_machine_with_what_was_logged() {
    let _alone = alone();
    let (Some(kvm), dir) = (kvm_or_skip(), tempfile::tempdir().unwrap()) else { return };
    let Some(daemon) = Daemon::start(dir.path(), QUEUES) else { return };
    let mut now = machine(&kvm, &daemon, false);
    load(&kvm, &now);
    now.resume().unwrap();
    for round in 0..5 {
        work(&now, 200);
        let next = machine(&kvm, &daemon, true);
        let (from, to) = (SourceMachine::ram(&*now).clone(), SourceMachine::ram(&*next).clone());
        now.start_logging().unwrap();
        let mut dirty = PageSet::full(from.pages());
        let mut page_bytes = vec![0; 4096];
        let mut copy = |set: &PageSet| {
            now.before_copy(0, set.words()).unwrap();
            set.iter().for_each(|page| {
                from.read_pages(page, &mut page_bytes);
                to.write_pages(page, &page_bytes);
            });
        };
        for _ in 0..2 {
            copy(&dirty);
            dirty.clear();
            now.collect_dirty(&mut dirty).unwrap();
        }
        let began = Instant::now();
        now.pause().unwrap();
        now.collect_dirty(&mut dirty).unwrap();
        let last = dirty.len();
        copy(&dirty);
        let state = now.save().unwrap();
        next.restore(&state).unwrap();
        now.end();
        drop(std::mem::replace(&mut now, next));
        now.resume().unwrap();
        println!("round {round}: {last} last pages, {} bytes of state, {:?}", state.0.len(), began.elapsed());
    }
    work(&now, 200);
    verify(&now);
}

/// A device between two others, with which something happens as it is paused.
struct Between(Box<dyn Fn() + Send + Sync>);

impl Device for Between {
    fn description(&self) -> DeviceDescription {
        let (kind, id) = ("between".into(), "between".into());
        DeviceDescription { kind, id, version: 1, queues: 0, features: 0, size_bytes: None }
    }
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _offset: u64, _data: &[u8]) {}
    fn kicks(&self) -> Vec<EventFd> {
        Vec::new()
    }
    fn calls(&self) -> Vec<EventFd> {
        Vec::new()
    }
    fn pause(&self) -> anyhow::Result<()> {
        (self.0)();
        Ok(())
    }
    fn resume(&self) -> anyhow::Result<()> {
        Ok(())
    }
    fn go_on(&self) {}
    fn save(&self) -> anyhow::Result<DeviceState> {
        anyhow::bail!("it has no state")
    }
    fn restore(&self, _state: &DeviceState) -> anyhow::Result<()> {
        Ok(())
    }
    fn start_logging(&self) -> anyhow::Result<()> {
        Ok(())
    }
    fn stop_logging(&self) -> anyhow::Result<()> {
        Ok(())
    }
    fn collect_dirty(&self, _into: &mut PageSet) -> anyhow::Result<()> {
        Ok(())
    }
}

fn two_daemons() -> Option<([tempfile::TempDir; 2], [Daemon; 2])> {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let daemons = [Daemon::start(dirs[0].path(), QUEUES)?, Daemon::start(dirs[1].path(), QUEUES)?];
    Some((dirs, daemons))
}

#[test]
fn after_a_pause_that_failed_half_way_every_disk_goes_on_as_soon_as_its_backend_is_back() {
    let _alone = alone();
    let Some(kvm) = kvm_or_skip() else { return };
    let Some((_dirs, daemons)) = two_daemons() else { return };
    let ram = GuestRam::new(MEMORY, false).unwrap();
    let disks = [0, 1].map(|i| impatient(&daemons[i], &format!("disk{i}"), &ram, false));
    let [first, second] = disks;
    let daemons = Arc::new(Mutex::new(daemons));
    let killed = daemons.clone();
    let between = Between(Box::new(move || killed.lock().unwrap().iter_mut().for_each(Daemon::kill)));
    let machine = machine_of(&kvm, ram, vec![first, Arc::new(between), second]).unwrap();
    load(&kvm, &machine);
    machine.resume().unwrap();
    work_on(&machine, 0, 100);
    work_on(&machine, 1, 100);
    let error = format!("{:#}", machine.pause().unwrap_err());
    assert!(error.contains("disk1"), "{error}");
    assert_eq!(machine.life(), Life::Running);
    daemons.lock().unwrap().iter_mut().for_each(Daemon::restart);
    work_on(&machine, 0, 200);
    work_on(&machine, 1, 200);
    verify(&machine);
}

/// A paused machine with two disks, and its state.
fn paused_with_two_disks(kvm: &kvm_ioctls::Kvm, daemons: &[Daemon; 2]) -> (Arc<Machine>, MachineState) {
    let ram = GuestRam::new(MEMORY, false).unwrap();
    let [first, second] = [0, 1].map(|i| disk(&daemons[i], &format!("disk{i}"), &ram, false));
    let source = machine_of(kvm, ram, vec![first, second]).unwrap();
    load(kvm, &source);
    source.resume().unwrap();
    work_on(&source, 0, 100);
    work_on(&source, 1, 100);
    source.pause().unwrap();
    let state = source.save().unwrap();
    (source, state)
}

/// A machine that stands where `source` does, and its disks.
fn target_of(
    kvm: &kvm_ioctls::Kvm,
    daemons: &[Daemon; 2],
    source: &Machine,
    state: &MachineState,
) -> (Arc<Machine>, [Arc<BlkDevice>; 2]) {
    let ram = GuestRam::new(MEMORY, false).unwrap();
    copy_memory(SourceMachine::ram(source), &ram);
    let disks = [0, 1].map(|i| impatient(&daemons[i], &format!("disk{i}"), &ram, true));
    let devices: Vec<Arc<dyn Device>> = disks.iter().map(|disk| disk.clone() as Arc<dyn Device>).collect();
    let target = machine_of(kvm, ram, devices).unwrap();
    target.restore(state).unwrap();
    (target, disks)
}

fn copy_memory(from: &GuestRam, to: &GuestRam) {
    let mut bytes = vec![0; 1 << 20];
    for page in (0..from.pages()).step_by(256) {
        from.read_pages(page, &mut bytes);
        to.write_pages(page, &bytes);
    }
}

#[test]
fn a_disk_whose_backend_is_away_holds_no_other_up_on_the_target_and_follows_when_it_is_back() {
    let _alone = alone();
    let Some(kvm) = kvm_or_skip() else { return };
    let Some((_dirs, mut daemons)) = two_daemons() else { return };
    let (source, state) = paused_with_two_disks(&kvm, &daemons);
    let (target, disks) = target_of(&kvm, &daemons, &source, &state);
    source.end();
    drop(source);
    daemons[0].kill();
    target.start(false).unwrap();
    target.start_devices().unwrap();
    work_on(&target, 1, 200);
    assert!(!disks[0].is_connected());
    daemons[0].restart();
    work_on(&target, 0, 200);
    verify(&target);
}

#[test]
fn devices_that_wait_for_the_memory_are_not_begun_by_a_pause_and_its_end() {
    let _alone = alone();
    let Some(kvm) = kvm_or_skip() else { return };
    let Some((_dirs, daemons)) = two_daemons() else { return };
    let (source, state) = paused_with_two_disks(&kvm, &daemons);
    let (target, disks) = target_of(&kvm, &daemons, &source, &state);
    source.end();
    drop(source);
    let connected = || disks.iter().filter(|disk| disk.is_connected()).count();
    target.start(false).unwrap();
    target.pause().unwrap();
    target.resume().unwrap();
    assert_eq!(connected(), 0, "pages may be missing");
    target.pause().unwrap();
    target.start_devices().unwrap();
    assert_eq!(connected(), 0, "the machine is paused");
    target.resume().unwrap();
    assert_eq!(connected(), 2);
    work_on(&target, 0, 100);
    work_on(&target, 1, 100);
    verify(&target);
}

/// This host as a target, with these daemons' disks.
fn host_with(daemons: [&Daemon; 2]) -> KvmHost {
    let disk = |i: usize| format!("socket={},serial=disk{i},queues=2", daemons[i].socket().display());
    let disks = (0..2).map(|i| disk(i).parse().unwrap()).collect();
    let devices = Devices { disks, taps: Vec::new(), console: ConsoleArgument::Off };
    KvmHost::new(kvm::open().unwrap(), Box::new(devices), None)
}

#[test]
fn a_target_with_a_disk_that_does_not_fit_or_is_not_there_refuses_before_the_machine_is_lost_to_the_source() {
    let _alone = alone();
    let Some(kvm) = kvm_or_skip() else { return };
    let Some((_dirs, daemons)) = two_daemons() else { return };
    let dir = tempfile::tempdir().unwrap();
    let Some(mut other) = Daemon::start_with(dir.path(), QUEUES, device_rig::DISK_BYTES / 2) else { return };
    let (source, state) = paused_with_two_disks(&kvm, &daemons);
    let take = |other: &Daemon| {
        let host = host_with([&daemons[0], other]);
        let mut target = host.create(&source.description().unwrap()).unwrap();
        target.restore(&state).unwrap();
        let began = Instant::now();
        let taken = target.take_storage(&[]);
        (taken.map_err(|error| format!("{error:#}")), began.elapsed())
    };
    let mut twins = source.description().unwrap();
    twins.devices[1] = twins.devices[0].clone();
    let report = host_with([&daemons[0], &daemons[1]]).check(&twins);
    assert!(report.findings.iter().any(|f| f.fatal && f.message.contains("two blk")), "{report:?}");
    let error = take(&other).0.unwrap_err();
    assert!(error.contains("disk1") && error.contains("32768 sectors"), "{error}");
    other.kill();
    let (taken, waited) = take(&other);
    let error = taken.unwrap_err();
    assert!(error.contains("disk1") && waited < Duration::from_secs(10), "{waited:?}: {error}");
    let (taken, waited) = take(&daemons[1]);
    taken.unwrap();
    println!("two disks were looked at within {waited:?}");
    // Nobody else's rings have run meanwhile.
    source.resume().unwrap();
    work_on(&source, 0, 100);
    work_on(&source, 1, 100);
    verify(&source);
}
