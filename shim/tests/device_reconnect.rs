//! A disk whose backend dies, hangs, stays away or comes back as another one.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod device_rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use device_rig::driver::{Load, WRITE, fill, read32, set_up, stamp, write32};
use device_rig::{Daemon, device, eventually, memory, options};
use shim::device::Device;
use shim::device::blk::BlkDevice;
use shim::memory::GuestRam;
use shim::pages::PageSet;

fn dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("shim-blk-").tempdir().unwrap()
}

/// Kills and restarts the daemon again and again, until told to stop.
fn chaos(mut daemon: Daemon, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<(Daemon, u32)> {
    std::thread::spawn(move || {
        let mut kills = 0;
        while !stop.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(30 + u64::from(kills) * 7 % 60));
            daemon.restart();
            kills += 1;
        }
        (daemon, kills)
    })
}

#[test]
fn nothing_is_lost_or_doubled_when_the_backend_is_killed_under_load() {
    let dir = dir();
    let Some(daemon) = Daemon::start(dir.path(), 2) else { return };
    let ram = memory();
    let device = device(&daemon, 2, &ram);
    let mut load = Load::new(set_up(&*device, &ram, 2, 0), 24);
    load.run(&ram, &device, 100);
    let stop = Arc::new(AtomicBool::new(false));
    let killer = chaos(daemon, stop.clone());
    let until = Instant::now() + Duration::from_millis(2000);
    while Instant::now() < until {
        load.run(&ram, &device, 50);
    }
    stop.store(true, Ordering::Relaxed);
    let (_daemon, kills) = killer.join().unwrap();
    load.verify(&ram, &device);
    println!("{} requests, {kills} kills", load.completed());
    assert!(kills > 3);
}

#[test]
fn the_log_stays_whole_and_a_machine_can_be_paused_while_the_backend_dies_again_and_again() {
    let dir = dir();
    let Some(daemon) = Daemon::start(dir.path(), 2) else { return };
    let ram = memory();
    let device = device(&daemon, 2, &ram);
    let mut load = Load::new(set_up(&*device, &ram, 2, 0), 24);
    load.run(&ram, &device, 100);
    let stop = Arc::new(AtomicBool::new(false));
    let killer = chaos(daemon, stop.clone());
    let (mut rounds, mut failed) = (0, 0);
    let mut insist = |what: &dyn Fn() -> anyhow::Result<()>| {
        eventually("a backend that stays long enough", || match what() {
            Ok(()) => true,
            Err(_) => {
                failed += 1;
                false
            }
        });
    };
    let until = Instant::now() + Duration::from_millis(2500);
    while Instant::now() < until {
        insist(&|| device.start_logging());
        let copy = memory();
        let mut dirty = PageSet::full(ram.pages());
        ram.take_own_writes(&mut PageSet::empty(ram.pages()));
        for round in 0..6 {
            follow(&ram, &copy, &dirty);
            load.run(&ram, &device, 30);
            load.submit_all(&ram, &*device);
            if round == 5 {
                insist(&|| device.pause());
            }
            // What a failed call has taken comes with the next one.
            let collected = std::cell::RefCell::new(PageSet::empty(ram.pages()));
            insist(&|| device.collect_dirty(&mut collected.borrow_mut()));
            dirty = collected.into_inner();
            ram.take_own_writes(&mut dirty);
        }
        follow(&ram, &copy, &dirty);
        let (mut a, mut b) = (vec![0; ram.bytes() as usize], vec![0; ram.bytes() as usize]);
        ram.read_pages(0, &mut a);
        copy.read_pages(0, &mut b);
        let differ = |page: &usize| a[page * 4096..][..4096] != b[page * 4096..][..4096];
        let different: Vec<_> = (0..ram.pages() as usize).filter(differ).collect();
        assert!(different.is_empty(), "pages {different:x?} differ");
        device.stop_logging().unwrap();
        insist(&|| device.resume());
        rounds += 1;
    }
    stop.store(true, Ordering::Relaxed);
    let (_daemon, kills) = killer.join().unwrap();
    load.verify(&ram, &device);
    println!("{rounds} rounds, {kills} kills, {failed} calls failed and were made again");
    assert!(kills > 3);
}

fn follow(ram: &GuestRam, copy: &GuestRam, dirty: &PageSet) {
    let mut page = vec![0; 4096];
    for index in dirty.iter() {
        ram.read_pages(index, &mut page);
        copy.write_pages(index, &page);
    }
}

#[test]
fn calls_during_an_outage_fail_in_time_and_leave_the_device_as_it_was() {
    let dir = dir();
    let Some(mut daemon) = Daemon::start(dir.path(), 1) else { return };
    let ram = memory();
    let mut wanted = options(daemon.socket(), 1);
    wanted.patience = Duration::from_secs(1);
    let device = BlkDevice::new(wanted, ram.clone()).unwrap();
    let mut load = Load::new(set_up(&*device, &ram, 1, 0), 24);
    load.run(&ram, &device, 50);
    daemon.kill();
    eventually("the loss is noticed", || !device.is_connected());
    load.submit_all(&ram, &*device);
    let start = Instant::now();
    let error = format!("{:#}", device.pause().unwrap_err());
    assert!(error.contains("disk0") && error.contains("cannot pause while its backend is away"), "{error}");
    assert!(device.start_logging().is_err());
    assert!(device.save().is_err());
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    daemon.restart();
    load.run(&ram, &device, 100);
    device.pause().unwrap();
    device.resume().unwrap();
    load.verify(&ram, &device);
}

#[test]
fn a_backend_that_stays_away_is_given_up_and_a_reset_begins_anew() {
    let dir = dir();
    let Some(mut daemon) = Daemon::start(dir.path(), 1) else { return };
    let ram = memory();
    let mut wanted = options(daemon.socket(), 1);
    wanted.reconnect = Duration::from_millis(300);
    let device = BlkDevice::new(wanted, ram.clone()).unwrap();
    let mut load = Load::new(set_up(&*device, &ram, 1, 0), 24);
    load.run(&ram, &device, 50);
    daemon.kill();
    load.submit_all(&ram, &*device);
    eventually("the guest is told", || read32(&*device, 0x70) & 64 != 0);
    assert_eq!(read32(&*device, 0x60) & 2, 2, "by a change of the configuration");
    let start = Instant::now();
    let error = format!("{:#}", device.pause().unwrap_err());
    assert!(start.elapsed() < Duration::from_secs(5), "nobody waits for what was given up");
    assert!(error.contains("away for more than 300ms"), "{error}");
    assert!(device.collect_dirty(&mut PageSet::empty(ram.pages())).is_err());
    device.stop_logging().unwrap();
    daemon.restart();
    let mut queue = set_up(&*device, &ram, 1, 0).remove(0);
    fill(&ram, queue.data(0), 5);
    assert_eq!(queue.run(&ram, &device, WRITE, 3), 0);
    device.pause().unwrap();
}

#[test]
fn a_backend_that_hangs_holds_nobody_up_and_nothing_is_lost_when_it_goes_on() {
    let dir = dir();
    let Some(daemon) = Daemon::start(dir.path(), 2) else { return };
    let ram = memory();
    let mut wanted = options(daemon.socket(), 2);
    (wanted.answer, wanted.patience) = (Duration::from_millis(500), Duration::from_millis(500));
    let device = BlkDevice::new(wanted, ram.clone()).unwrap();
    let mut load = Load::new(set_up(&*device, &ram, 2, 0), 24);
    for round in 0..3 {
        load.run(&ram, &device, 100);
        load.submit_all(&ram, &*device);
        daemon.signal(libc::SIGSTOP);
        let start = Instant::now();
        let called = match round {
            0 => device.pause(),
            1 => device.start_logging(),
            _ => device.collect_dirty(&mut PageSet::empty(ram.pages())),
        };
        let error = format!("{:#}", called.unwrap_err());
        assert!(error.contains("did not answer in time"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
        assert!(device.pause().is_err(), "it still hangs");
        daemon.signal(libc::SIGCONT);
        load.run(&ram, &device, 100);
        if round == 1 {
            eventually("it is connected again", || device.start_logging().is_ok());
        }
    }
    load.verify(&ram, &device);
}

#[test]
fn a_reset_during_an_outage_holds_nobody_up() {
    let dir = dir();
    let Some(mut daemon) = Daemon::start(dir.path(), 1) else { return };
    let ram = memory();
    let mut wanted = options(daemon.socket(), 1);
    wanted.patience = Duration::from_secs(1);
    let device = BlkDevice::new(wanted, ram.clone()).unwrap();
    let mut load = Load::new(set_up(&*device, &ram, 1, 0), 24);
    load.run(&ram, &device, 50);
    load.submit_all(&ram, &*device);
    daemon.kill();
    eventually("the loss is noticed", || !device.is_connected());
    let start = Instant::now();
    write32(&*device, 0x70, 0);
    device.pause().unwrap();
    device.resume().expect_err("nobody is there to go on with");
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    daemon.restart();
    device.resume().unwrap();
    let mut queue = set_up(&*device, &ram, 1, 0).remove(0);
    assert_eq!(queue.run(&ram, &device, WRITE, 3), 0);
}

#[test]
fn a_backend_that_came_back_worse_is_refused_until_a_better_one_comes() {
    let (dir, other) = (dir(), dir());
    let Some(mut daemon) = Daemon::start(dir.path(), 1) else { return };
    let Some(mut worse) = Daemon::start_with(other.path(), 1, device_rig::DISK_BYTES / 2) else { return };
    let ram = memory();
    let mut wanted = options(daemon.socket(), 1);
    wanted.patience = Duration::from_secs(3);
    let device = BlkDevice::new(wanted, ram.clone()).unwrap();
    let mut load = Load::new(set_up(&*device, &ram, 1, 0), 24);
    load.run(&ram, &device, 50);
    load.submit_all(&ram, &*device);
    daemon.kill();
    std::fs::remove_file(daemon.socket()).unwrap();
    std::os::unix::fs::symlink(worse.socket(), daemon.socket()).unwrap();
    let error = format!("{:#}", device.pause().unwrap_err());
    assert!(error.contains("32768 sectors and the guest knows one of 65536"), "{error}");
    worse.kill();
    std::fs::remove_file(daemon.socket()).unwrap();
    daemon.restart();
    load.run(&ram, &device, 50);
    load.verify(&ram, &device);
}

#[test]
fn a_target_waits_for_a_socket_that_begins_to_exist_when_it_goes_on() {
    let dir = dir();
    let Some(mut daemon) = Daemon::start(dir.path(), 2) else { return };
    let ram = memory();
    let source = device(&daemon, 2, &ram);
    let mut load = Load::new(set_up(&*source, &ram, 2, 0), 24);
    load.run(&ram, &source, 100);
    load.submit_all(&ram, &*source);
    source.pause().unwrap();
    let state = source.save().unwrap();
    // The storage is handed over: the source's backend is gone before the target's is there.
    daemon.kill();
    std::fs::remove_file(daemon.socket()).unwrap();
    let mut wanted = options(daemon.socket(), 2);
    wanted.deferred = true;
    let target = BlkDevice::new(wanted, ram.clone()).unwrap();
    target.restore(&state).unwrap();
    let error = format!("{:#}", target.preflight().unwrap_err());
    assert!(error.contains("disk0") && error.contains("is it running"), "{error}");
    assert_eq!(target.description().size_bytes, Some(device_rig::DISK_BYTES));
    let starting = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        daemon.restart();
        daemon
    });
    target.resume().unwrap();
    let _daemon = starting.join().unwrap();
    drop(source);
    load.run(&ram, &target, 100);
    load.verify(&ram, &target);
}

#[test]
fn a_paused_disk_goes_on_without_its_backend_and_is_served_when_that_is_back() {
    let dir = dir();
    let Some(mut daemon) = Daemon::start(dir.path(), 2) else { return };
    let ram = memory();
    let device = device(&daemon, 2, &ram);
    let mut load = Load::new(set_up(&*device, &ram, 2, 0), 24);
    for round in 0..4 {
        load.run(&ram, &device, 100);
        load.submit_all(&ram, &*device);
        device.pause().unwrap();
        load.submit_all(&ram, &*device);
        if round > 0 {
            daemon.kill();
        }
        if round == 3 {
            // A pause while it is away, of a device that runs, is one that fails as it always did.
            device.go_on();
            load.submit_all(&ram, &*device);
            daemon.restart();
            device.pause().unwrap();
            device.resume().unwrap();
            continue;
        }
        let start = Instant::now();
        device.go_on();
        device.go_on();
        assert!(start.elapsed() < Duration::from_secs(10), "nobody waits: {:?}", start.elapsed());
        assert_eq!(device.is_connected(), round == 0);
        load.submit_all(&ram, &*device);
        if round > 0 {
            daemon.restart();
        }
    }
    load.run(&ram, &device, 100);
    load.verify(&ram, &device);
}

#[test]
fn a_disk_that_went_on_without_a_backend_that_fits_is_given_up_like_any_other() {
    let (dir, other) = (dir(), dir());
    let Some(daemon) = Daemon::start(dir.path(), 1) else { return };
    let Some(worse) = Daemon::start_with(other.path(), 1, device_rig::DISK_BYTES / 2) else { return };
    let ram = memory();
    let source = device(&daemon, 1, &ram);
    Load::new(set_up(&*source, &ram, 1, 0), 24).run(&ram, &source, 50);
    source.pause().unwrap();
    let mut wanted = options(worse.socket(), 1);
    (wanted.deferred, wanted.reconnect) = (true, Duration::from_secs(2));
    let target = BlkDevice::new(wanted, ram.clone()).unwrap();
    target.restore(&source.save().unwrap()).unwrap();
    target.go_on();
    assert!(!target.is_connected());
    eventually("the guest is told", || read32(&*target, 0x70) & 64 != 0);
    let error = format!("{:#}", target.pause().unwrap_err());
    assert!(error.contains("32768 sectors"), "{error}");
}

#[test]
fn a_source_whose_target_does_not_come_goes_on_with_a_backend_that_was_started_anew() {
    let dir = dir();
    let Some(mut daemon) = Daemon::start(dir.path(), 2) else { return };
    let ram = memory();
    let source = device(&daemon, 2, &ram);
    let mut load = Load::new(set_up(&*source, &ram, 2, 0), 24);
    for _ in 0..3 {
        load.run(&ram, &source, 100);
        load.submit_all(&ram, &*source);
        source.start_logging().unwrap();
        source.pause().unwrap();
        daemon.restart();
        source.collect_dirty(&mut PageSet::empty(ram.pages())).unwrap();
        source.stop_logging().unwrap();
        source.resume().unwrap();
    }
    load.verify(&ram, &source);
}

#[test]
fn a_target_whose_backend_does_not_fit_says_so_before_anything_runs() {
    let (dir, other) = (dir(), dir());
    let Some(daemon) = Daemon::start(dir.path(), 1) else { return };
    let Some(worse) = Daemon::start_with(other.path(), 1, device_rig::DISK_BYTES / 2) else { return };
    let ram = memory();
    let source = device(&daemon, 1, &ram);
    let mut load = Load::new(set_up(&*source, &ram, 1, 0), 24);
    load.run(&ram, &source, 100);
    source.pause().unwrap();
    let state = source.save().unwrap();
    let mut wanted = options(worse.socket(), 1);
    wanted.deferred = true;
    let target = BlkDevice::new(wanted.clone(), ram.clone()).unwrap();
    target.restore(&state).unwrap();
    for error in [target.preflight().unwrap_err(), target.resume().unwrap_err()] {
        assert!(format!("{error:#}").contains("32768 sectors"), "{error:#}");
    }
    wanted.deferred = false;
    let connected = BlkDevice::new(wanted, ram.clone()).unwrap();
    assert!(connected.restore(&state).is_err());
    // And a state that is none.
    let bad = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut options = options(daemon.socket(), 1);
        options.deferred = true;
        let target = BlkDevice::new(options, ram.clone()).unwrap();
        let mut state = state.clone();
        change(&mut state.data);
        target.restore(&state).expect_err("a bad state")
    };
    bad(&|data| data["transport"]["queues"][0]["desc"] = 0xffff_f000_u64.into());
    bad(&|data| data["transport"]["queues"][0]["size"] = 77.into());
    bad(&|data| data["transport"]["status"] = 4.into());
    bad(&|data| data["bases"] = serde_json::json!([]));
    bad(&|data| data["transport"]["driver_features"] = u64::MAX.into());
    drop((target, connected));
    source.resume().unwrap();
    load.verify(&ram, &source);
}

#[test]
fn the_write_cache_that_the_guest_chose_goes_with_it_and_stays_after_an_outage() {
    let (dir, other) = (dir(), dir());
    let Some(mut daemon) = Daemon::start(dir.path(), 1) else { return };
    let Some(at_target) = Daemon::start(other.path(), 1) else { return };
    let ram = memory();
    let source = device(&daemon, 1, &ram);
    let mut queue = set_up(&*source, &ram, 1, 1 << 11).remove(0);
    let wce = |device: &BlkDevice| {
        let mut wce = [9];
        device.read(0x120, &mut wce);
        wce[0]
    };
    assert_eq!(wce(&source), 1);
    source.write(0x120, &[7]);
    source.write(0x121, &[0]);
    source.write(0x100, &[0; 8]);
    assert_eq!(wce(&source), 1, "only a word that is one is taken");
    source.write(0x120, &[0]);
    assert_eq!(wce(&source), 0);
    daemon.restart();
    fill(&ram, queue.data(0), 77);
    assert_eq!(queue.run(&ram, &source, WRITE, 0), 0);
    assert_eq!(stamp(&ram, queue.data(0)), 77);
    source.pause().unwrap();
    let mut wanted = options(at_target.socket(), 1);
    wanted.deferred = true;
    let target = BlkDevice::new(wanted, ram.clone()).unwrap();
    target.restore(&source.save().unwrap()).unwrap();
    target.resume().unwrap();
    assert_eq!(wce(&target), 0);
    // Another front end sees it, too: the target's backend was told.
    let seen = shim::device::blk::probe(&at_target.socket(), 1, Duration::from_secs(5)).unwrap();
    assert_eq!(seen.wce(), 0);
}
