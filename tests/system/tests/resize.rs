//! A disk gets another size while its guest uses it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use system_tests::PATIENCE;
use system_tests::daemon::Program;
use system_tests::guest::{Guest, GuestOptions, Setup};
use system_tests::{Daemon, FrontEnd, Image, LoadOptions, Mix, Options, VerifiedLoad};

const SIZE: u64 = 64 << 20;
const SECTORS: u64 = SIZE / 512;

fn is_reference() -> bool {
    let is = Daemon::program() == Program::Reference;
    if is {
        println!("SKIPPED: the reference is resized in another way");
    }
    is
}

fn front(daemon: &Daemon) -> FrontEnd {
    let options =
        Options { queues: 2, memory: vec![64 << 20, 128 << 20], config_channel: true, ..Options::default() };
    FrontEnd::start(&daemon.socket("disk"), options).unwrap()
}

fn start_load(daemon: &Daemon, options: LoadOptions) -> VerifiedLoad {
    VerifiedLoad::new(front(daemon), options).unwrap()
}

#[test]
fn a_disk_grows_while_its_guest_writes_and_the_guest_is_told() {
    if is_reference() {
        return;
    }
    for kind in Image::ALL {
        let mut daemon = Daemon::with_disk(kind, SIZE, 2).unwrap();
        let options = LoadOptions { rate: Some(5000.0), max_sectors: 32, ..LoadOptions::new(71, SECTORS) };
        let load = start_load(&daemon, options).spawn();
        load.wait_requests(1000, PATIENCE).unwrap();
        load.mark("resizing");
        let mut size = SIZE;
        for _ in 0..10 {
            size += 8 << 20;
            let resized = daemon.resize("disk", size, false).unwrap();
            assert_eq!((resized.disk.size_bytes, resized.guest_told), (size, true), "{kind:?}");
            load.wait_requests(300, PATIENCE).unwrap();
        }
        let mut load = load.stop().unwrap();
        for (phase, histogram) in load.phases() {
            println!("{kind:?}, {phase}: {histogram}");
        }
        for _ in 0..10 {
            assert!(load.front.config_changed(PATIENCE).unwrap(), "told each time");
        }
        assert_eq!(load.front.config().unwrap().capacity, size / 512);
        load.verify_all().unwrap();
        let model = load.model.grown(size / 512);
        drop(load.front);
        // All of it is a disk: what is new reads as zeroes, and takes writes.
        let mut whole = start_load(&daemon, LoadOptions::new(72, size / 512));
        whole.model = model;
        whole.verify_all().unwrap();
        whole.run_requests(1000).unwrap();
        whole.verify_all().unwrap();
        assert!(daemon.terminate().unwrap());
        let raw = daemon.dir().join("copy.raw");
        let image = daemon.disks()[0].image.clone();
        kind.to_raw(&image, &raw).unwrap();
        whole.check_file(&raw).unwrap();
        kind.check(&image).unwrap();
    }
}

#[test]
fn a_disk_shrinks_only_when_asked_to_and_only_where_it_holds_nothing() {
    if is_reference() {
        return;
    }
    for kind in Image::formats() {
        let daemon = Daemon::with_disk(kind, SIZE, 2).unwrap();
        let mut load = start_load(&daemon, LoadOptions::new(73, SECTORS / 2));
        load.run_requests(1000).unwrap();
        load.drain().unwrap();
        let refused = |size, shrink, what: &str| {
            let error = daemon.resize("disk", size, shrink).unwrap_err().to_string();
            assert!(error.contains(what), "{kind:?}: {error}");
            assert_eq!(daemon.disk("disk").unwrap().size_bytes, SIZE);
        };
        refused(SIZE / 2, false, "shrink");
        refused(1 << 20, true, "");
        refused(SIZE + 100, false, "sectors");
        refused(0, true, "sectors");
        assert_eq!(daemon.disk("disk").unwrap().failed, None);
        load.run_requests(500).unwrap();
        let resized = daemon.resize("disk", SIZE / 2, true).unwrap();
        assert_eq!(resized.disk.size_bytes, SIZE / 2, "{kind:?}");
        assert_eq!(load.front.config().unwrap().capacity, SECTORS / 2);
        load.run_requests(500).unwrap();
        // And grows again: what was cut off does not come back.
        daemon.resize("disk", SIZE, false).unwrap();
        load.verify_all().unwrap();
    }
}

#[test]
fn the_daemons_death_while_a_disk_grows_leaves_one_size_or_the_other_and_all_the_data() {
    if is_reference() {
        return;
    }
    for kind in Image::ALL {
        let mut random = ChaCha8Rng::seed_from_u64(system_tests::seed(74));
        let mut daemon = Daemon::with_disk(kind, SIZE, 2).unwrap();
        let options = LoadOptions { depth: 8, mix: Mix::ALL, ..LoadOptions::new(75, SECTORS) };
        let load = start_load(&daemon, options).spawn();
        let (mut size, mut old, mut new) = (SIZE, 0, 0);
        // How long the daemon lives at most after it was asked, in microseconds: aims at the middle of its work.
        let mut reach = 20_000;
        for _ in 0..15 {
            if load.wait_requests(100, PATIENCE).is_err() {
                break;
            }
            let wanted = size + (1 << 20) * random.random_range(1..9);
            let api = daemon.api();
            let asked = std::thread::spawn(move || {
                let body = format!("{{\"size_bytes\":{wanted}}}");
                system_tests::http::call(&api, "POST", "/v1/disks/disk/resize", Some(&body))
            });
            std::thread::sleep(Duration::from_micros(random.random_range(0..reach)));
            daemon.kill9();
            let answered = asked.join().unwrap().is_ok();
            daemon.restart().unwrap();
            let disk = daemon.disk("disk").unwrap();
            assert_eq!(disk.failed, None, "{}", daemon.log_tail());
            assert!(disk.size_bytes == wanted || !answered && disk.size_bytes == size, "{kind:?}");
            if disk.size_bytes == size {
                (old, reach) = (old + 1, reach * 3 / 2);
            } else {
                (new, reach) = (new + 1, reach * 2 / 3);
            }
            size = disk.size_bytes;
        }
        let mut load = load.stop().unwrap();
        load.verify_all().unwrap();
        let model = load.model.grown(size / 512);
        drop(load.front);
        let mut whole = start_load(&daemon, LoadOptions::new(76, size / 512));
        whole.model = model;
        whole.verify_all().unwrap();
        println!("{kind:?}: {old} deaths left the old size, {new} the new one");
        assert!(daemon.terminate().unwrap());
        kind.check(&daemon.disks()[0].image.clone()).unwrap();
    }
}

#[test]
fn a_linux_guest_sees_its_disk_grow_and_nothing_of_new_images() {
    if is_reference() {
        return;
    }
    let Some(setup) = Setup::find_or_skip("a guest whose disk grows") else { return };
    for kind in [Image::DynamicVhdx, Image::DynamicVhd] {
        let mut daemon = Daemon::with_disk(kind, SIZE, 2).unwrap();
        let options =
            GuestOptions { cpus: 2, queues: 2, rounds: 1000, ..GuestOptions::new("guest", "files") };
        let mut guest = Guest::start(&setup, daemon.dir(), &daemon.socket("disk"), &options).unwrap();
        guest.wait_for("round 1", PATIENCE).unwrap();
        let mut size = SIZE;
        for n in 0..3 {
            size += 8 << 20;
            let resized = daemon.resize("disk", size, false).unwrap();
            assert!(resized.guest_told, "QEMU listens");
            guest.wait_for(&format!("resized sectors={}", size / 512), PATIENCE).unwrap();
            let child = daemon.dir().join(format!("child-{n}.{}", kind.name()));
            daemon.snapshot("disk", &child).unwrap();
            next_round(&mut guest);
            daemon.kill9();
            std::thread::sleep(Duration::from_millis(100));
            daemon.restart().unwrap();
            next_round(&mut guest);
        }
        guest.tell_to_stop().unwrap();
        // The guest has compared its files, checked its file system, and read the disk to its new end.
        guest.wait_for("device ", PATIENCE).unwrap();
        guest.wait_for("PASS", PATIENCE).unwrap();
        guest.wait_end(PATIENCE).unwrap();
        assert!(!guest.said().contains("I/O error"));
        let disk = daemon.disk("disk").unwrap();
        assert_eq!((disk.chain.len(), disk.size_bytes, disk.errors), (4, size, 0));
        assert!(daemon.terminate().unwrap(), "the daemon failed at its end");
    }
}

fn next_round(guest: &mut Guest) {
    let rounds = guest.said().lines().filter(|line| line.starts_with("GUEST: round")).count();
    guest.wait_for(&format!("round {}", rounds + 1), PATIENCE).unwrap();
}
