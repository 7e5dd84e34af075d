//! Memory that is written all the time arrives exactly as it was when the machine was paused.

mod migrate_fake;

use std::sync::Mutex;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use migrate_fake::*;
use shim::machine::SourceMachine;
use shim::migrate::target::TargetEvent;
use shim::migrate::{CancelToken, Compression, OnTimeout, Place, Progress, Security, SendError, Step};

const MIB: u64 = 1 << 20;

#[test]
fn memory_under_constant_writes_arrives_exactly() {
    for (connections, compression, log) in [
        (1, Compression::None, Log::Classic),
        (2, Compression::Lz4, Log::Manual),
        (4, Compression::Zstd, Log::Classic),
        (4, Compression::None, Log::Manual),
    ] {
        let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
        let source = FakeSource::new(&world, 32 * MIB, log, 4000);
        let target = Target::start(&world, &unix(dir.path()), &Security::default(), dir.path());
        let mut options = options(&target.address, dir.path());
        (options.connections, options.compression) = (connections, compression);
        let report = send(&source, &options).expect("moved");
        let received = target.received();
        assert_same(source.ram(), received.machine.ram());
        assert_eq!((world.runs(), source.ended()), ('t', true));
        assert!(world.announced.load(SeqCst) && world.devices_started.load(SeqCst));
        assert!(report.rounds >= 2 && report.progress.pages_zero > 0, "{report:?}");
        assert!(report.progress.downtime.expect("measured") < Duration::from_secs(2), "{report:?}");
        world.assert_rules_kept();
    }
}

#[test]
fn the_eight_steps_are_seen_in_their_order() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 8 * MIB, Log::Classic, 5000);
    let target = Target::start(&world, &unix(dir.path()), &Security::default(), dir.path());
    let mut options = options(&target.address, dir.path());
    // So slow that pages are written meanwhile.
    options.bandwidth = Some(16 * MIB);
    // So small that a second round is needed.
    options.downtime = Duration::from_micros(1);
    options.timeout = Some(Duration::from_millis(600));
    options.on_timeout = OnTimeout::Force;
    let steps = Mutex::new(Vec::new());
    let see = |progress: &Progress| {
        let mut steps = steps.lock().expect("nobody panics with it");
        if steps.last() != Some(&progress.step) {
            steps.push(progress.step);
        }
    };
    shim::migrate::send(&source, &options, &see, &CancelToken::new()).expect("moved");
    let all = [
        Step::Create,
        Step::InitialCopy,
        Step::DirtyRounds,
        Step::Pause,
        Step::State,
        Step::Resume,
        Step::Announce,
        Step::End,
    ];
    assert_eq!(*steps.lock().expect("nobody panics with it"), all);
    assert_same(source.ram(), target.received().machine.ram());
}

#[test]
fn zero_pages_are_not_sent_and_not_read_into_existence() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 64 * MIB, Log::Classic, 0);
    source.ram().discard(100, source.ram().pages() - 100).expect("discarded");
    let target = Target::start(&world, &unix(dir.path()), &Security::default(), dir.path());
    let report = send(&source, &options(&target.address, dir.path())).expect("moved");
    assert_eq!(report.progress.pages_sent, 100);
    assert!(report.progress.wire_bytes < 120 * 4096, "{report:?}");
    use std::os::unix::fs::MetadataExt;
    let blocks = source.ram().file().metadata().expect("metadata").blocks();
    assert!(blocks * 512 < 2 * MIB, "{blocks} blocks were made by reading");
    assert_same(source.ram(), target.received().machine.ram());
}

#[test]
fn a_check_reports_and_leaves() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let host = FakeHost { world: world.clone(), incompatible: true };
    let source = FakeSource::new(&world, 4 * MIB, Log::Classic, 100);
    let target = Target::start_with(host, &unix(dir.path()), &Security::default(), dir.path());
    let options = options(&target.address, dir.path());
    let report = shim::migrate::check(&description(4 * MIB), &options).expect("a report");
    assert!(!report.is_compatible());
    let error = send(&source, &options).expect_err("refused");
    assert!(matches!(&error, SendError::Incompatible(found) if *found == report), "{error}");
    assert!(error.to_string().contains("there is no memory; add some"), "{error}");
    source.assert_untouched();
}

#[test]
fn a_guest_that_writes_too_fast_is_slowed_down_until_it_fits() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 8 * MIB, Log::Manual, 6000);
    let target = Target::start(&world, &unix(dir.path()), &Security::default(), dir.path());
    let mut options = options(&target.address, dir.path());
    options.bandwidth = Some(16 * MIB);
    options.downtime = Duration::from_millis(60);
    options.auto_converge = true;
    options.timeout = Some(Duration::from_secs(20));
    send(&source, &options).expect("moved");
    let throttled = source.throttled();
    assert!(throttled.starts_with(&[20, 30]) && throttled.last() == Some(&0), "{throttled:?}");
    assert_same(source.ram(), target.received().machine.ram());
}

#[test]
fn what_does_not_converge_in_time_is_given_up_or_forced_as_asked() {
    for on_timeout in [OnTimeout::Cancel, OnTimeout::Force] {
        let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
        let source = FakeSource::new(&world, 8 * MIB, Log::Manual, 6000);
        let target = Target::start(&world, &unix(dir.path()), &Security::default(), dir.path());
        let mut options = options(&target.address, dir.path());
        options.bandwidth = Some(16 * MIB);
        options.downtime = Duration::from_millis(30);
        options.timeout = Some(Duration::from_millis(700));
        options.on_timeout = on_timeout;
        let sent = send(&source, &options);
        match on_timeout {
            OnTimeout::Force => {
                sent.expect("moved");
                assert_same(source.ram(), target.received().machine.ram());
            }
            OnTimeout::Cancel => {
                let error = sent.expect_err("too late").to_string();
                assert!(error.contains("goes on here") && error.contains("auto-converge"), "{error}");
                source.assert_untouched();
            }
        }
        world.assert_rules_kept();
    }
}

#[test]
fn the_bandwidth_is_kept_over_all_connections() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 16 * MIB, Log::Classic, 0);
    let target = Target::start(&world, &unix(dir.path()), &Security::default(), dir.path());
    let mut options = options(&target.address, dir.path());
    (options.bandwidth, options.connections) = (Some(8 * MIB), 4);
    let begun = Instant::now();
    let report = send(&source, &options).expect("moved");
    // 8 MiB have content.
    let took = begun.elapsed();
    assert!(took > Duration::from_millis(900), "{took:?}: {report:?}");
    assert!(took < Duration::from_secs(4), "{took:?}: {report:?}");
}

#[test]
fn a_cancelled_migration_leaves_the_machine_running_and_the_next_one_works() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 16 * MIB, Log::Manual, 2000);
    let target = Target::start(&world, &unix(dir.path()), &Security::default(), dir.path());
    let mut options = options(&target.address, dir.path());
    options.bandwidth = Some(24 * MIB);
    let mut cancelled = 0;
    for millis in [0, 1, 5, 20, 60, 110, 170, 240] {
        let cancel = CancelToken::new();
        let later = cancel.clone();
        let timer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(millis));
            later.cancel();
        });
        match shim::migrate::send(&source, &options, &|_| {}, &cancel) {
            Err(SendError::Cancelled) => cancelled += 1,
            other => panic!("{millis} ms: {other:?}"),
        }
        timer.join().expect("timer");
        source.assert_untouched();
    }
    assert_eq!(cancelled, 8);
    options.bandwidth = None;
    send(&source, &options).expect("moved");
    assert_same(source.ram(), target.received().machine.ram());
    world.assert_rules_kept();
}

#[test]
fn whatever_fails_on_either_side_the_machine_goes_on_and_the_next_attempt_works() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 4 * MIB, Log::Classic, 1000);
    let target = Target::start(&world, &unix(dir.path()), &Security::default(), dir.path());
    let options = options(&target.address, dir.path());
    for method in [
        "start_logging",
        "collect_dirty",
        "before_copy",
        "pause",
        "save",
        "release_storage",
        "create",
        "restore",
        "take_storage",
        "target resume",
    ] {
        world.fail(method);
        let error = send(&source, &options).expect_err(method);
        assert!(matches!(error, SendError::Failed(_)), "{method}: {error}");
        assert!(error.to_string().contains(&format!("{method} was told to fail")), "{method}: {error}");
        world.heal();
        source.assert_untouched();
        world.assert_rules_kept();
    }
    send(&source, &options).expect("moved");
    assert_same(source.ram(), target.received().machine.ram());
    world.assert_rules_kept();
}

#[test]
fn a_machine_that_cannot_get_its_storage_back_stays_paused_until_told() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 4 * MIB, Log::Classic, 1000);
    let target = Target::start(&world, &unix(dir.path()), &Security::default(), dir.path());
    let options = options(&target.address, dir.path());
    world.fail("take_storage");
    world.fail("reclaim_storage");
    let error = send(&source, &options).expect_err("refused");
    assert!(matches!(error, SendError::Unresolved(_)), "{error}");
    assert_eq!(world.runs(), '-');
    world.heal();
    let name = source.description().expect("description").name;
    let resolve = || {
        shim::migrate::resolve(
            Some(&source),
            &name,
            &options,
            shim::migrate::Resolve::Ask,
            &CancelToken::new(),
        )
    };
    assert_eq!(resolve().expect("resolved"), shim::migrate::Resolved::Here);
    source.assert_untouched();
    send(&source, &options).expect("moved");
    let last = shim::migrate::last_attempt(&options.state_dir, &name).expect("record").expect("there");
    assert_eq!(last.place, Place::Gone);
    target.await_event(|event| matches!(event, TargetEvent::Announced));
}

#[test]
fn storage_that_hands_over_too_much_is_taken_back() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 4 << 20, Log::Classic, 300);
    let target = Target::start(&world, &unix(dir.path()), &Security::default(), dir.path());
    let options = options(&target.address, dir.path());
    *world.handover.lock().expect("nobody panics with it") = vec![0; (1 << 20) + 1];
    let error = send(&source, &options).expect_err("too much").to_string();
    assert!(error.contains("hands over 1048577 bytes"), "{error}");
    source.assert_untouched();
    *world.handover.lock().expect("nobody panics with it") = HANDOVER.to_vec();
    send(&source, &options).expect("moved");
    world.assert_rules_kept();
}
