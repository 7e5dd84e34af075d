//! The test guest in a real machine: does its work, finds every wrong byte, and goes on elsewhere.
// All of this is a test, in which a panic is the answer to what must not be.
#![allow(clippy::unwrap_used)]

mod disk;
mod machine;

use std::time::{Duration, Instant};

use disk::{ALL_FEATURES, FEW_FEATURES, Fault, SoftDisk};
use machine::{Machine, kvm};
use shim::guest::{
    Command, DiskErrorKind, MismatchKind, Ring, RingReason, State, send_command, set_rate,
    verify_from_outside,
};
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;

/// Has the guest verify everything, and returns when it has.
fn verify(machine: &Machine) -> shim::guest::Report {
    let number = send_command(&machine.ram, Command::Verify).unwrap();
    machine.wait("to verify", |report| report.answered(number))
}

#[test]
fn laps_advance_with_every_pattern_and_fill_and_all_is_right() {
    let Some(kvm) = kvm() else { return };
    for pattern in ["sequential", "random"] {
        for fill in ["line", "full"] {
            let options = format!("selftest,pattern={pattern},fill={fill},report-ms=10");
            let mut machine = Machine::new(&kvm, 8 * MIB, 2, &options, vec![]);
            machine.run();
            // More laps than a page has words that take turns.
            machine.wait("600 laps", |report| report.vcpus.iter().all(|vcpu| vcpu.laps > 600));
            let report = verify(&machine);
            machine.pause();
            assert_eq!((report.state, report.mismatches), (State::Verified, 0), "{options}: {report:?}");
            for vcpu in &report.vcpus {
                assert_eq!(vcpu.verified, vcpu.pages, "{options}");
                assert!(vcpu.register_checks > 10, "{options}: {report:?}");
            }
            let summary = verify_from_outside(&machine.ram).unwrap();
            assert!(summary.is_right() && summary.pages == summary.written, "{options}: {summary:?}");
            let reasons: Vec<_> = machine.rings().iter().map(|ring| ring.reason).collect();
            for reason in [RingReason::Started, RingReason::Periodic, RingReason::Answered] {
                assert!(reasons.contains(&reason), "{options}: no {reason:?}");
            }
        }
    }
}

#[test]
fn an_idle_guest_leaves_its_memory_alone() {
    let Some(kvm) = kvm() else { return };
    let mut machine = Machine::new(&kvm, 8 * MIB, 1, "selftest,pattern=idle,report-ms=5", vec![]);
    machine.run();
    machine.wait("some reports", |report| report.vcpus[0].rings > 5);
    let report = verify(&machine);
    machine.pause();
    assert_eq!((report.state, report.visits()), (State::Verified, 0), "{report:?}");
    let summary = verify_from_outside(&machine.ram).unwrap();
    assert!(summary.is_right() && summary.written == 0 && summary.pages > 1000, "{summary:?}");
}

#[test]
fn a_paused_machine_is_right_from_outside_wherever_it_was_paused() {
    let Some(kvm) = kvm() else { return };
    for options in ["selftest,pattern=random,fill=full", "selftest"] {
        let mut machine = Machine::new(&kvm, 6 * MIB, 2, options, vec![]);
        for _ in 0..20 {
            machine.run();
            std::thread::sleep(Duration::from_millis(7));
            machine.pause();
            let summary = verify_from_outside(&machine.ram).unwrap();
            assert!(summary.is_right(), "{options}: {summary:?}");
        }
        assert!(machine.report().visits() > 0);
    }
}

#[test]
fn the_rate_is_kept_and_can_be_changed() {
    let Some(kvm) = kvm() else { return };
    let mut machine = Machine::new(&kvm, 16 * MIB, 2, "selftest,rate=20M,pattern=random", vec![]);
    machine.run();
    for mib_per_s in [20, 100] {
        set_rate(&machine.ram, mib_per_s * MIB).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        let measure = || {
            let (start, before) = (Instant::now(), machine.report().visits());
            std::thread::sleep(Duration::from_millis(700));
            let visits = machine.report().visits() - before;
            let measured = visits as f64 * 4096.0 / MIB as f64 / start.elapsed().as_secs_f64();
            let share = measured / mib_per_s as f64;
            assert!(share < 1.2, "{measured:.1} MiB/s instead of {mib_per_s}");
            share > 0.8
        };
        // A busy host may keep the processors from running for a while, but not always.
        assert!((0..5).any(|_| measure()), "never nearly {mib_per_s} MiB/s");
    }
    machine.pause();
    assert!(machine.report().is_right());
}

#[test]
fn a_flipped_byte_is_found_wherever_it_is_and_told_at_once() {
    let Some(kvm) = kvm() else { return };
    for (options, offset) in [
        ("selftest,fill=full,rate=40M", 1000),
        ("selftest,fill=full,rate=40M,pattern=random", 4095),
        ("selftest,fill=line,rate=40M", 3),
        ("selftest,fill=line,rate=40M,pattern=random", 4090),
    ] {
        let mut machine = Machine::new(&kvm, 8 * MIB, 1, options, vec![]);
        machine.run();
        machine.wait("two laps", |report| report.vcpus[0].laps >= 2);
        machine.pause();
        let at = GuestAddress(5 * MIB + offset);
        let byte: u8 = machine.ram.memory().read_obj(at).unwrap();
        machine.ram.memory().write_obj(byte ^ 0x40, at).unwrap();
        let summary = verify_from_outside(&machine.ram).unwrap();
        assert_eq!((summary.mismatches, summary.first_mismatches[0].address), (1, at.0 & !7), "{options}");
        machine.run();
        let report = machine.wait("the flipped byte", |report| report.mismatches > 0);
        let found = report.vcpus[0].first_mismatches[0];
        assert_eq!((found.kind, found.address), (MismatchKind::Memory, at.0 & !7), "{options}");
        assert_eq!(found.expected ^ found.found, 0x40 << (offset % 8 * 8), "{options}");
        assert_eq!(report.state, State::Failed);
        machine.pause();
        assert!(machine.rings().iter().any(|ring| ring.reason == RingReason::Wrong));
        // It is written anew on the same visit, and the guest goes on.
        machine.run();
        let laps = report.vcpus[0].laps;
        let later = machine.wait("to go on", |report| report.vcpus[0].laps > laps + 1);
        assert_eq!(later.mismatches, 1, "{options}");
    }
}

#[test]
fn a_flipped_byte_that_no_lap_looks_at_is_found_by_the_command_to_verify() {
    let Some(kvm) = kvm() else { return };
    let mut machine = Machine::new(&kvm, 8 * MIB, 1, "selftest,rate=200M", vec![]);
    machine.run();
    machine.wait("a few laps", |report| report.vcpus[0].laps >= 3);
    let number = send_command(&machine.ram, Command::Stop).unwrap();
    machine.wait("to stop", |report| report.answered(number) && report.state == State::Stopped);
    // Beyond the words whose turn has come: still zero.
    let at = GuestAddress(5 * MIB + 2000);
    machine.ram.memory().write_obj(1u8, at).unwrap();
    let report = verify(&machine);
    let found = report.vcpus[0].first_mismatches[0];
    assert_eq!((report.mismatches, found.address, found.expected, found.found), (1, at.0, 0, 1));
    machine.pause();
}

#[test]
fn a_page_of_an_earlier_lap_is_found() {
    let Some(kvm) = kvm() else { return };
    for options in ["selftest,fill=full,rate=100M", "selftest,fill=line,pattern=random,rate=100M"] {
        let mut machine = Machine::new(&kvm, 8 * MIB, 1, options, vec![]);
        let (page, mut old) = (1300, [0; 4096]);
        machine.run();
        let laps = machine.wait("laps", |report| report.vcpus[0].laps > 1).vcpus[0].laps;
        machine.pause();
        machine.ram.read_pages(page, &mut old);
        machine.run();
        machine.wait("more laps", |report| report.vcpus[0].laps > laps + 3);
        machine.pause();
        machine.ram.write_pages(page, &old);
        let summary = verify_from_outside(&machine.ram).unwrap();
        assert_eq!(
            (summary.mismatches, summary.first_mismatches[0].address),
            (1, page * 4096),
            "{summary:?}"
        );
        machine.run();
        let report = machine.wait("the old page", |report| report.mismatches > 0);
        let found = report.vcpus[0].first_mismatches[0];
        // The first word says which page it is, and of which lap.
        assert_eq!((found.word, found.expected >> 32), (0, found.found >> 32), "{found:?}");
        assert!(
            found.found as u32 <= laps as u32 + 1 && found.expected as u32 > laps as u32 + 1,
            "{found:?}"
        );
        machine.pause();
    }
}

#[test]
fn a_copy_of_memory_and_processors_goes_on_without_a_mismatch() {
    let Some(kvm) = kvm() else { return };
    for options in ["selftest,fill=full,pattern=random", "selftest,fill=line", "selftest,rate=30M"] {
        let mut machine = Machine::new(&kvm, 6 * MIB, 2, options, vec![]);
        machine.run();
        machine.wait("a lap", |report| report.vcpus.iter().all(|vcpu| vcpu.laps > 1));
        for _ in 0..5 {
            machine.pause();
            let states = machine.save();
            let mut next = machine.copy(&kvm, &states);
            assert!(verify_from_outside(&next.ram).unwrap().is_right());
            let before = next.report();
            next.run();
            next.wait("to go on there", |now| {
                now.vcpus.iter().zip(&before.vcpus).all(|(now, before)| now.visits > before.visits + 100)
            });
            machine = next;
        }
        let report = verify(&machine);
        assert_eq!((report.state, report.mismatches), (State::Verified, 0), "{options}: {report:?}");
        machine.pause();
    }
}

#[test]
fn memory_above_the_hole_is_visited_too() {
    let Some(kvm) = kvm() else { return };
    // The second processor's part is all above the hole; of this memory only what is visited is there.
    let mut machine = Machine::new(&kvm, 6 << 30, 2, "selftest,rate=4M,fill=full", vec![]);
    machine.run();
    let report = machine.wait("visits", |report| report.vcpus.iter().all(|vcpu| vcpu.visits > 100));
    machine.pause();
    assert!(report.is_right(), "{report:?}");
    let first_above = (3 << 30) / 4096;
    let mut page = [0; 4096];
    machine.ram.read_pages(first_above, &mut page);
    assert_eq!(page, [0; 4096], "what the first processor has not got to yet");
    let pages = report.vcpus[0].pages;
    let start = machine.ram.pages() - pages;
    machine.ram.read_pages(start + 1, &mut page);
    assert_eq!(
        page[..8],
        ((pages + 1) << 32 | 1).to_le_bytes(),
        "the second page of the second processor, in its first lap"
    );
}

#[test]
fn a_panic_of_the_program_is_told() {
    let Some(kvm) = kvm() else { return };
    let mut machine = Machine::new(&kvm, 6 * MIB, 2, "selftest,pattern=idle", vec![]);
    // A number of pages with which the second processor's part cannot be computed; put right before the report is read.
    let pages = GuestAddress(0x1000 + 64);
    let real: u64 = machine.ram.memory().read_obj(pages).unwrap();
    assert!(real > 512 && real < 1536, "the parameters have changed: {real}");
    machine.ram.memory().write_obj(u64::MAX, pages).unwrap();
    machine.run();
    let end = Instant::now() + machine::PATIENCE;
    let wrong = |ring: &Ring| *ring == Ring { reason: RingReason::Wrong, vcpu: 1 };
    while !machine.rings().iter().any(wrong) && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    machine.pause();
    machine.ram.memory().write_obj(real, pages).unwrap();
    let report = machine.report();
    assert_eq!(report.state, State::Failed);
    let text = report.vcpus[1].panic.as_deref().unwrap_or_default();
    assert!(text.contains("overflow") && text.contains("guest/pattern.rs"), "{text}");
}

#[test]
#[ignore = "shows how fast the guest is; takes a while and a quiet machine"]
fn the_speed_of_visits() {
    let Some(kvm) = kvm() else { return };
    for vcpus in [1, 2] {
        for pattern in ["sequential", "random"] {
            for fill in ["line", "full"] {
                let options = format!("selftest,working-set=240M,pattern={pattern},fill={fill}");
                let mut machine = Machine::new(&kvm, 256 * MIB, vcpus, &options, vec![]);
                machine.run();
                machine.wait("two laps", |report| report.vcpus.iter().all(|vcpu| vcpu.laps > 1));
                let (start, before) = (Instant::now(), machine.report().visits());
                std::thread::sleep(Duration::from_secs(2));
                let visits = machine.report().visits() - before;
                let rate = visits as f64 / start.elapsed().as_secs_f64() / f64::from(vcpus);
                eprintln!("{vcpus} processors, {pattern}, {fill}: {rate:.0} pages/s each");
                machine.pause();
                let start = Instant::now();
                assert!(verify_from_outside(&machine.ram).unwrap().is_right());
                eprintln!("    from outside {:?}", start.elapsed());
            }
        }
    }
}

#[test]
fn registers_that_are_lost_on_the_way_are_found() {
    let Some(kvm) = kvm() else { return };
    let mut machine = Machine::new(&kvm, 6 * MIB, 1, "selftest,rate=1M", vec![]);
    machine.run();
    machine.wait("a report", |report| report.vcpus[0].register_checks > 1);
    machine.pause();
    let mut states = machine.save();
    // All registers of the floating-point units as after a reset.
    states[0].forget_floating_point();
    let mut next = machine.copy(&kvm, &states);
    let before = next.report().vcpus[0].register_checks;
    next.run();
    let report = next.wait("the loss", |report| report.vcpus[0].register_checks > before + 5);
    let kinds: Vec<_> = report.vcpus[0].first_mismatches.iter().map(|found| found.kind).collect();
    assert!(kinds.contains(&MismatchKind::MmxRegister), "{report:?}");
    next.pause();
}

#[test]
fn a_stopped_guest_rests_until_it_is_told_to_run() {
    let Some(kvm) = kvm() else { return };
    let disk = SoftDisk::new(4 << 20, ALL_FEATURES, 1, Fault::Nothing);
    let mut machine = Machine::new(&kvm, 16 * MIB, 2, &disk_options(""), vec![disk]);
    machine.run();
    for _ in 0..3 {
        let number = send_command(&machine.ram, Command::Stop).unwrap();
        let stopped = machine.wait("to stop", |report| report.answered(number));
        assert_eq!((stopped.state, stopped.disks[0].in_flight), (State::Stopped, 0), "{stopped:?}");
        std::thread::sleep(Duration::from_millis(20));
        let later = machine.report();
        assert_eq!((later.visits(), later.disks[0].reads), (stopped.visits(), stopped.disks[0].reads));
        let number = send_command(&machine.ram, Command::Run).unwrap();
        machine.wait("to run again", |report| {
            report.answered(number)
                && report.state == State::Running
                && report.visits() > stopped.visits()
                && report.disks[0].reads > stopped.disks[0].reads
        });
    }
    assert_eq!(verify(&machine).state, State::Verified);
    machine.pause();
}

fn disk_options(more: &str) -> String {
    format!("selftest,working-set=1M,rate=10M,disk-range=2M,report-ms=20{more}")
}

#[test]
fn a_disk_is_written_and_verified() {
    let Some(kvm) = kvm() else { return };
    for (features, queues, ring, options) in [
        (ALL_FEATURES, 1, 256, ",depth=16"),
        (ALL_FEATURES, 2, 256, ",depth=64,queues=4,flush-every=8"),
        (FEW_FEATURES, 1, 256, ",depth=4,writes=30"),
        (ALL_FEATURES, 1, 8, ",depth=16,writes=100"),
    ] {
        let disk = || SoftDisk::new(4 << 20, features, queues, Fault::Nothing).with_ring(ring);
        let mut machine = Machine::new(&kvm, 16 * MIB, 2, &disk_options(options), vec![disk(), disk()]);
        machine.run();
        machine.wait("requests", |report| report.disks.iter().all(|disk| disk.writes > 3000));
        let report = verify(&machine);
        machine.pause();
        assert_eq!(report.state, State::Verified, "{options}: {report:?}");
        for disk in &report.disks {
            assert_eq!((disk.errors, disk.in_flight, disk.blocks), (0, 0, 512), "{options}");
            // Few blocks were never written, and all others are read.
            assert!((480..=512).contains(&disk.verified_now), "{options}: {report:?}");
            assert_eq!(disk.features & !(1 << 5), features);
            assert_eq!(disk.flushes > 0, features == ALL_FEATURES, "{options}: {report:?}");
            assert_eq!(disk.queues, if features == ALL_FEATURES { queues as u32 } else { 1 }.min(4));
            assert!(disk.depth <= ring / 4 && disk.kicks > 0);
        }
    }
}

#[test]
fn a_disk_that_moves_with_requests_in_flight_stays_right() {
    let Some(kvm) = kvm() else { return };
    let disk = SoftDisk::new(4 << 20, ALL_FEATURES, 2, Fault::Nothing);
    let options = disk_options(",queues=2,depth=32");
    let mut machine = Machine::new(&kvm, 16 * MIB, 1, &options, vec![disk]);
    machine.run();
    let mut in_flight = 0;
    for _ in 0..8 {
        let writes = machine.report().disks[0].writes;
        machine.wait("writes", |report| report.disks[0].writes > writes + 300);
        machine.pause();
        machine.disks[0].stop();
        in_flight += machine.report().disks[0].in_flight;
        let states = machine.save();
        machine = machine.copy(&kvm, &states);
        machine.run();
    }
    let report = verify(&machine);
    machine.pause();
    assert_eq!((report.state, report.disks[0].errors), (State::Verified, 0), "{report:?}");
    assert!(in_flight > 0, "nothing was ever in flight");
}

#[test]
fn each_thing_that_a_disk_does_wrong_is_found() {
    let Some(kvm) = kvm() else { return };
    for (fault, kind) in [
        (Fault::CorruptBlock, DiskErrorKind::Data),
        (Fault::LoseWrite, DiskErrorKind::Data),
        (Fault::CompleteTwice, DiskErrorKind::CompletedTwice),
        (Fault::CompleteForeign, DiskErrorKind::Foreign),
        (Fault::FailOne, DiskErrorKind::Status),
        (Fault::WrongLength, DiskErrorKind::Length),
        (Fault::ForgetStatus, DiskErrorKind::DeviceStatus),
    ] {
        let disk = SoftDisk::new(4 << 20, ALL_FEATURES, 1, fault);
        let mut machine = Machine::new(&kvm, 16 * MIB, 1, &disk_options(""), vec![disk]);
        machine.run();
        let report = machine.wait(&format!("{fault:?}"), |report| !report.disks[0].first_errors.is_empty());
        assert!(report.disks[0].first_errors.iter().any(|error| error.kind == kind), "{fault:?}: {report:?}");
        assert_eq!(machine.report().state, State::Failed);
        machine.pause();
    }
}

#[test]
fn a_disk_that_hangs_is_stalled_and_nothing_is_wrong() {
    let Some(kvm) = kvm() else { return };
    let disk = SoftDisk::new(4 << 20, ALL_FEATURES, 1, Fault::Hang);
    let mut machine = Machine::new(&kvm, 16 * MIB, 1, &disk_options(""), vec![disk]);
    machine.run();
    let report = machine.wait("the disk to stall", |report| report.disks[0].stalled);
    assert!(report.is_right() && report.disks[0].in_flight > 0, "{report:?}");
    // Memory is visited all the same.
    let laps = report.vcpus[0].laps;
    machine.wait("laps without a disk", |report| report.vcpus[0].laps > laps);
    machine.pause();
}

#[test]
fn something_that_is_no_disk_is_told() {
    let Some(kvm) = kvm() else { return };
    for (bytes, features, kind) in [
        (4 << 20, 0, DiskErrorKind::Features),
        (4 << 20, ALL_FEATURES | 1 << 5, DiskErrorKind::ReadOnly),
        (0, ALL_FEATURES, DiskErrorKind::Empty),
    ] {
        let disk = SoftDisk::new(bytes, features, 1, Fault::Nothing);
        let mut machine = Machine::new(&kvm, 16 * MIB, 1, &disk_options(""), vec![disk]);
        machine.run();
        let report = machine.wait("the refusal", |report| report.disks[0].errors > 0);
        assert_eq!(report.disks[0].first_errors[0].kind, kind);
        // The guest can be commanded all the same.
        assert_eq!(verify(&machine).disks[0].state, State::Failed);
        machine.pause();
    }
}
