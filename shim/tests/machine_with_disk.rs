//! The test guest on KVM with a disk of a real blockd: it pauses and goes on, and its state goes on in another machine.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod device_rig;

use std::sync::Arc;
use std::time::{Duration, Instant};

use shim::device::blk::{BlkDevice, BlkOptions};
use shim::device::serial::SerialPort;
use shim::device::{Device, MMIO_START};
use shim::guest::{self, Command, SelftestOptions};
use shim::machine::SourceMachine;
use shim::memory::GuestRam;
use shim::pages::PageSet;
use shim::vm::machine::{Machine, Parts};
use shim::vm::{cpu, host, kvm};

use device_rig::Daemon;

const MEMORY: u64 = 64 << 20;
const QUEUES: u16 = 2;

fn kvm_or_skip() -> Option<kvm_ioctls::Kvm> {
    match kvm::open() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            eprintln!("SKIPPED: no KVM here: {error:#}");
            None
        }
    }
}

fn machine(kvm: &kvm_ioctls::Kvm, daemon: &Daemon, deferred: bool) -> Arc<Machine> {
    let ram = GuestRam::new(MEMORY, false).unwrap();
    let options = BlkOptions { queues: QUEUES, deferred, ..BlkOptions::new(daemon.socket(), "root") };
    let disk: Arc<dyn Device> = BlkDevice::new(options, ram.clone()).unwrap();
    let leaves = cpu::host_leaves(kvm, None).unwrap();
    let parts = Parts {
        name: "tested".into(),
        ram,
        vcpus: 2,
        cpu: cpu::describe(leaves, None, cpu::msrs(kvm).unwrap(), host::tsc_khz(kvm).unwrap()),
        serial: Arc::new(SerialPort::new(Box::new(std::io::sink())).unwrap()),
        devices: vec![disk],
    };
    Machine::new(kvm, parts).unwrap()
}

fn load(kvm: &kvm_ioctls::Kvm, machine: &Machine) {
    let options: SelftestOptions =
        "selftest,working-set=24M,pattern=random,depth=16,disk-range=8M,flush-every=32".parse().unwrap();
    let tsc_khz = host::tsc_khz(kvm).unwrap();
    let ram = SourceMachine::ram(machine);
    let starts = guest::load(ram, &options, 2, &[MMIO_START], tsc_khz).unwrap();
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
    let done = |report: &guest::Report| report.disks[0].reads + report.disks[0].writes;
    let ram = SourceMachine::ram(machine);
    let wanted =
        guest::report(ram).map_or(0, |report| report.disks.first().map_or(0, |_| done(&report))) + requests;
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        if let Ok(report) = guest::report(ram) {
            assert!(report.mismatches == 0 && report.disk_errors == 0, "{report:#?}");
            if !report.disks.is_empty() && done(&report) >= wanted {
                return;
            }
        }
        assert!(Instant::now() < until, "{:?} {:#?}", machine.life(), guest::report(ram));
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn verify(machine: &Machine) {
    let ram = SourceMachine::ram(machine);
    let number = guest::send_command(ram, Command::Verify).unwrap();
    let until = Instant::now() + Duration::from_secs(20);
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
