//! The daemon dies without a word, and comes back.
//!
//! A guest notices nothing but a pause: every write that was acknowledged is there, and every request that was in flight
//! is completed once. What tells the daemon which those are is the in-flight region, for requests complete in any order.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::path::Path;
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use system_tests::PATIENCE;
use system_tests::daemon::{DiskSpec, Program, in_memory};
use system_tests::{Base, Daemon, FrontEnd, Image, LoadOptions, Mix, Options, VerifiedLoad};

const SIZE: u64 = 128 << 20;
const SECTORS: u64 = SIZE / 512;

/// The reference has no in-flight tracking, and loses requests here.
fn is_reference() -> bool {
    let is = Daemon::program() == Program::Reference;
    if is {
        println!("SKIPPED: the reference has no in-flight tracking");
    }
    is
}

fn start_load(daemon: &Daemon, queues: usize, options: LoadOptions) -> VerifiedLoad {
    let front = Options { queues, memory: vec![64 << 20, 128 << 20], ..Options::default() };
    VerifiedLoad::new(FrontEnd::start(&daemon.socket("disk"), front).unwrap(), options).unwrap()
}

/// Ends the daemon and compares the image, as another program reads it, with what the load knows.
fn compare_image(daemon: &mut Daemon, load: &VerifiedLoad) {
    assert!(daemon.terminate().unwrap(), "the daemon failed at its end");
    let DiskSpec { image, kind, .. } = daemon.disks()[0].clone();
    let raw = daemon.dir().join("copy.raw");
    kind.to_raw(&image, &raw).unwrap();
    load.check_file(&raw).unwrap();
    kind.check(&image).unwrap();
}

fn survive_kills(kind: Image, kills: u64, base: Base) {
    survive_kills_in(&std::env::temp_dir(), kind, kills, base);
}

fn survive_kills_in(folder: &Path, kind: Image, kills: u64, base: Base) {
    if is_reference() {
        return;
    }
    let mut random = ChaCha8Rng::seed_from_u64(system_tests::seed(kills));
    let mut daemon = Daemon::with_disk_in(folder, kind, SIZE, 2).unwrap();
    // Long and short requests side by side, so that they overtake each other.
    let options = LoadOptions { depth: 32, max_sectors: 512, base, ..LoadOptions::new(31, SECTORS) };
    let load = start_load(&daemon, 2, options).spawn();
    let start = Instant::now();
    for kill in 1..=kills {
        let reached = load.wait_requests(random.random_range(20..400), PATIENCE);
        if reached.is_err() {
            break;
        }
        std::thread::sleep(Duration::from_micros(random.random_range(0..3000)));
        daemon.kill9();
        if random.random_bool(0.2) {
            std::thread::sleep(Duration::from_millis(50));
        }
        daemon.restart().unwrap();
        if load.wait_reconnects(kill, PATIENCE).is_err() {
            break;
        }
    }
    let mut load = load.stop().unwrap();
    load.verify_all().unwrap();
    println!("{kind:?}, {kills} kills in {:.1?}, starting at {base:?}: {}", start.elapsed(), load.counts());
    assert_eq!(load.counts().reconnects, kills);
    assert!(load.counts().interrupted > kills, "requests were in flight");
    assert!(load.counts().out_of_order > 0, "completions were out of order");
    compare_image(&mut daemon, &load);
}

#[test]
fn a_raw_disk_survives_the_daemons_death() {
    survive_kills(Image::Raw, 25, Base::Used);
}

#[test]
fn a_growing_vhd_survives_the_daemons_death() {
    survive_kills(Image::DynamicVhd, 25, Base::Used);
}

#[test]
fn a_growing_vhdx_survives_the_daemons_death() {
    survive_kills(Image::DynamicVhdx, 25, Base::Used);
}

#[test]
fn disks_in_memory_survive_the_daemons_death() {
    let Some(folder) = in_memory() else { return };
    for kind in [Image::Raw, Image::DynamicVhd, Image::DynamicVhdx] {
        survive_kills_in(folder, kind, 10, Base::Used);
    }
}

#[test]
fn a_vhdx_survives_under_a_front_end_that_starts_at_what_it_made_available() {
    survive_kills(Image::DynamicVhdx, 20, Base::Avail);
}

#[test]
fn the_daemon_may_die_while_it_starts() {
    if is_reference() {
        return;
    }
    let mut random = ChaCha8Rng::seed_from_u64(system_tests::seed(5));
    let kind = Image::formats().pop().unwrap();
    let mut daemon = Daemon::with_disk(kind, SIZE, 2).unwrap();
    let options = LoadOptions { depth: 16, ..LoadOptions::new(32, SECTORS) };
    let load = start_load(&daemon, 2, options).spawn();
    for _ in 0..20 {
        if load.wait_requests(100, PATIENCE).is_err() {
            break;
        }
        daemon.kill9();
        // Dies again at any moment of the start, of the reconnection, and of the first requests.
        for _ in 0..3 {
            daemon.start_and_kill(Duration::from_micros(random.random_range(0..60_000))).unwrap();
        }
        daemon.restart().unwrap();
    }
    let _ = load.wait_requests(100, PATIENCE);
    // An error tells what went wrong.
    let mut load = load.stop().unwrap();
    load.verify_all().unwrap();
    println!("80 deaths, 60 of them while starting: {}", load.counts());
    compare_image(&mut daemon, &load);
}

#[test]
fn what_was_acknowledged_is_there_when_daemon_and_guest_die_together() {
    if is_reference() {
        return;
    }
    for kind in Image::formats() {
        let mut daemon = Daemon::with_disk(kind, SIZE, 1).unwrap();
        let mut model = None;
        for round in 0..8 {
            let options = LoadOptions { depth: 32, mix: Mix::ALL, ..LoadOptions::new(33 + round, SECTORS) };
            let mut load = start_load(&daemon, 1, options);
            if let Some(model) = model.take() {
                load.model = model;
                load.verify_all().unwrap();
            }
            load.run_requests(1500).unwrap();
            daemon.kill9();
            // Completions that were published count as acknowledged; of the others nobody knows.
            load.poll().unwrap();
            let unknown = load.in_flight();
            let known = load.counts();
            model = Some(load.model.into_settled());
            drop(load.front);
            daemon.restart().unwrap();
            println!("{kind:?}, round {round}: {known}; {unknown} in flight");
        }
        let mut load = start_load(&daemon, 1, LoadOptions::new(50, SECTORS));
        load.model = model.expect("rounds were run");
        load.verify_all().unwrap();
        compare_image(&mut daemon, &load);
    }
}

#[test]
fn a_daemon_that_is_asked_to_end_leaves_a_clean_image_and_comes_back() {
    if is_reference() {
        return;
    }
    for kind in Image::formats() {
        let mut daemon = Daemon::with_disk(kind, SIZE, 2).unwrap();
        let load = start_load(&daemon, 2, LoadOptions::new(34, SECTORS)).spawn();
        for round in 1..=5 {
            load.wait_requests(300, PATIENCE).unwrap();
            assert!(daemon.terminate().unwrap(), "the daemon failed at its end");
            // No log to replay, no footer to mend: another program opens it at once.
            kind.check(&daemon.disks()[0].image).unwrap();
            daemon.restart().unwrap();
            load.wait_reconnects(round, PATIENCE).unwrap();
        }
        let mut load = load.stop().unwrap();
        load.verify_all().unwrap();
        println!("{kind:?}, 5 clean ends: {}", load.counts());
        compare_image(&mut daemon, &load);
    }
}
