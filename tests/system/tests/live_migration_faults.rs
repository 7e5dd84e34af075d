//! Machines move while things go wrong: either side dies, somebody cancels, the disk's daemon dies, the target is no place
//! for the machine. The machine runs on one side, and the test guest finds everything as it left it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use system_tests::PATIENCE;
use system_tests::machine::{Shim, alone, has_kvm};
use system_tests::{Daemon, Image};

const GUEST: &str =
    "selftest,working-set=32M,rate=200M,pattern=random,depth=16,disk-range=16M,flush-every=32";

struct Place {
    daemon: Daemon,
    folder: tempfile::TempDir,
    count: u32,
}

impl Place {
    fn new() -> Self {
        let daemon = Daemon::with_disk(Image::DynamicVhdx, 64 << 20, 2).unwrap();
        Self { daemon, folder: tempfile::tempdir().unwrap(), count: 0 }
    }

    fn disk(&self, serial: &str) -> Vec<String> {
        let socket = self.daemon.socket("disk");
        vec!["--disk".into(), format!("socket={},serial={serial},queues=2", socket.display())]
    }

    fn try_start(&mut self) -> anyhow::Result<Shim> {
        self.count += 1;
        let mut arguments = vec!["--memory".into(), "64M".into(), "--guest".into(), GUEST.into()];
        arguments.extend(self.disk("root"));
        Shim::start(self.folder.path(), &format!("vm{}", self.count), "run", &arguments)
    }

    fn start(&mut self) -> Shim {
        self.try_start().unwrap()
    }

    /// A machine that may run elsewhere is not started a second time, and the reason says what to do.
    fn assert_not_startable(&mut self, runs: &Shim) {
        let error = self.try_start().unwrap_err().to_string();
        assert!(error.contains("kvm-shim resolve --retry --state-dir"), "{error}\n{}", runs.log());
    }

    fn receive(&mut self, listen: &str, serial: &str) -> Shim {
        self.count += 1;
        let mut arguments = vec!["--listen".to_owned(), listen.to_owned()];
        arguments.extend(self.disk(serial));
        Shim::start(self.folder.path(), &format!("vm{}", self.count), "receive", &arguments).unwrap()
    }

    fn receiver_at(&mut self, listen: &str) -> Shim {
        self.receive(listen, "root")
    }

    fn receiver(&mut self, serial: &str) -> (Shim, Value) {
        let socket = self.folder.path().join(format!("m{}.sock", self.count + 1));
        let listen = format!("unix:{}", socket.display());
        (self.receive(&listen, serial), json!({ "to": listen, "downtime_ms": 500 }))
    }

    /// A record in the machines' state directory.
    fn noted(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.path().join("state").join(name)).unwrap_or_default()
    }

    /// What `kvm-shim resolve` says of the machine whose process is dead.
    fn resolve_records(&self, how: &str) -> String {
        let state = self.folder.path().join("state").display().to_string();
        Shim::command(&["resolve", how, "--state-dir", &state]).unwrap()
    }

    /// A move that works, to show that what failed before left nothing behind.
    fn move_on(&mut self, now: &mut Shim) {
        let (next, request) = self.receiver("root");
        now.send(&request).unwrap();
        let info = now.wait_migration(PATIENCE).unwrap();
        assert_eq!(info["state"], "done", "{info}\n{}\n{}", now.log(), next.log());
        next.wait_state("running", PATIENCE).unwrap();
        let mut before = std::mem::replace(now, next);
        assert!(before.wait_end().unwrap().success(), "{}", before.log());
    }
}

/// Any moment of a migration that has begun, two times out of three one about its commit.
fn wait_for_a_moment(place: &Place, source: &Shim, random: &mut ChaCha8Rng) {
    let until = Instant::now() + PATIENCE;
    match random.random_range(0..3) {
        0 => std::thread::sleep(Duration::from_micros(random.random_range(0..150_000))),
        1 => {
            let copies = |info: Value| info["state"] == "running" && info["step"].as_u64() < Some(4);
            while source.migration().is_ok_and(copies) {
                assert!(Instant::now() < until, "the migration does not get on");
            }
            std::thread::sleep(Duration::from_micros(random.random_range(0..30_000)));
        }
        // Between the source's word that it gave the machine away and the target's that it runs.
        _ => {
            let watched = Instant::now();
            while !place.noted("outgoing-vm.json").contains("handed-over") {
                let asks = watched.elapsed() > Duration::from_millis(300);
                if asks && source.migration().is_ok_and(|info| info["state"] != "running") {
                    break;
                }
                assert!(Instant::now() < until, "the migration does not get on");
            }
            if random.random_bool(0.5) {
                std::thread::sleep(Duration::from_micros(random.random_range(0..4_000)));
            }
        }
    }
}

fn assert_sound(shim: &Shim) -> Value {
    let report = shim.report().unwrap();
    assert!(report["mismatches"] == 0 && report["disk_errors"] == 0, "{report}");
    report
}

fn visits(shim: &Shim) -> u64 {
    assert_sound(shim)["vcpus"][0]["visits"].as_u64().unwrap()
}

/// It goes on working, memory and disk.
fn assert_works(shim: &Shim) {
    let done = |report: &Value| {
        (
            report["vcpus"][0]["visits"].as_u64().unwrap(),
            report["disks"][0]["reads"].as_u64().unwrap() + report["disks"][0]["writes"].as_u64().unwrap(),
        )
    };
    let before = done(&assert_sound(shim));
    shim.wait_until(&format!("work after {before:?}"), |shim| {
        let now = done(&assert_sound(shim));
        now.0 > before.0 + 100 && now.1 > before.1 + 100
    });
}

#[test]
fn the_death_of_the_target_at_any_moment_leaves_the_machine_where_it_is() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    let mut place = Place::new();
    let mut now = place.start();
    let mut random = ChaCha8Rng::seed_from_u64(system_tests::seed(7));
    let (mut stayed, mut went, mut unknown) = (0, 0, 0);
    for turn in 0..20 {
        assert_works(&now);
        let (mut next, request) = place.receiver("root");
        now.send(&request).unwrap();
        wait_for_a_moment(&place, &now, &mut random);
        // Whether it had gone already: then the machine dies with its process, and another one begins.
        next.kill9();
        // Every other time somebody starts what was killed again: it answers from what was written down.
        let again = (turn % 2 == 0).then(|| place.receiver_at(request["to"].as_str().unwrap()));
        if again.is_none() && place.noted("outgoing-vm.json").contains("handed-over") {
            // It would be looked for for half a minute.
            std::thread::sleep(Duration::from_secs(1));
            let _ = now.call("POST", "/v1/migration/cancel", None);
        }
        let info = now.wait_migration(PATIENCE * 2).unwrap();
        match info["state"].as_str().unwrap() {
            "failed" => {
                stayed += 1;
                now.wait_state("running", PATIENCE).unwrap();
            }
            "done" => {
                went += 1;
                now.wait_end().unwrap();
                now = place.start();
            }
            // The target was told to run it, and did not live to say so. Only a person can know that it is dead.
            "unresolved" => {
                unknown += 1;
                assert!(again.is_none(), "{info} {}", now.log());
                assert_eq!(now.state(), "paused", "{info}");
                for verb in ["resume", "pause", "stop"] {
                    assert!(now.call("POST", &format!("/v1/vm/{verb}"), None).is_err(), "{verb}");
                }
                std::thread::scope(|scope| {
                    // Somebody still asks the target when somebody else decides.
                    let retry = scope.spawn(|| now.call("POST", "/v1/migration/retry", None));
                    std::thread::sleep(Duration::from_millis(random.random_range(0..50)));
                    now.call("POST", "/v1/migration/resume-here", None).unwrap();
                    now.wait_state("running", PATIENCE).unwrap();
                    assert!(retry.join().unwrap().is_err());
                });
            }
            other => panic!("{other}: {info}"),
        }
        assert_works(&now);
    }
    println!(
        "of 20 moves whose target was killed {stayed} left the machine here, {went} had moved it before, of {unknown} nobody knew"
    );
    place.move_on(&mut now);
    now.verify().unwrap();
}

#[test]
fn the_death_of_the_source_leaves_the_machine_on_one_side_or_none_and_the_disk_whole() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    let mut place = Place::new();
    let mut random = ChaCha8Rng::seed_from_u64(system_tests::seed(8));
    let (mut went, mut died, mut let_go, mut given_up) = (0, 0, 0, 0);
    for _ in 0..20 {
        let mut now = place.start();
        assert_works(&now);
        let (next, request) = place.receiver("root");
        now.send(&request).unwrap();
        wait_for_a_moment(&place, &now, &mut random);
        now.kill9();
        let until = Instant::now() + PATIENCE;
        let handed_over = place.noted("outgoing-vm.json").contains("handed-over");
        loop {
            // It may not have noticed yet that its source is dead.
            match next.state().as_str() {
                "running" => {
                    went += 1;
                    assert_works(&next);
                    next.verify().unwrap();
                    if handed_over {
                        place.assert_not_startable(&next);
                        assert!(place.resolve_records("--retry").contains("runs at"));
                    }
                    break;
                }
                "waiting" => {
                    died += 1;
                    assert!(!handed_over);
                    break;
                }
                "prepared" if next.info().unwrap()["error"].is_null() => {}
                // All of the machine is there, but not its source's word. Somebody has to say what becomes of it.
                "prepared" if handed_over && random.random_bool(0.7) => {
                    let_go += 1;
                    place.assert_not_startable(&next);
                    assert!(place.resolve_records("--retry").contains("runs at"));
                    next.wait_state("running", PATIENCE).unwrap();
                    assert_works(&next);
                    next.verify().unwrap();
                    break;
                }
                "prepared" => {
                    given_up += 1;
                    assert!(next.call("POST", "/v1/vm/stop", None).is_err());
                    next.call("POST", "/v1/migration/discard", None).unwrap();
                    next.wait_state("waiting", PATIENCE).unwrap();
                    assert!(place.resolve_records("--retry").contains("may be started here"));
                    break;
                }
                "arriving" | "paused" | "created" => {}
                other => panic!("{other}: {}", next.log()),
            }
            assert!(Instant::now() < until, "it stays {}: {}", next.state(), next.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    println!(
        "of 20 moves whose source was killed {went} had moved the machine, {died} lost it with its process, {let_go} were finished and \
         {given_up} given up by hand"
    );
    let mut now = place.start();
    place.move_on(&mut now);
    now.verify().unwrap();
    drop(now);
    assert!(place.daemon.terminate().unwrap());
    let disk = &place.daemon.disks()[0];
    disk.kind.check(&disk.image).unwrap();
}

#[test]
fn a_move_that_is_cancelled_at_any_moment_has_never_been() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    let mut place = Place::new();
    let mut now = place.start();
    let mut random = ChaCha8Rng::seed_from_u64(system_tests::seed(9));
    let mut cancelled = 0;
    for _ in 0..20 {
        let (next, mut request) = place.receiver("root");
        request["bandwidth"] = (200_u64 << 20).into();
        now.send(&request).unwrap();
        std::thread::sleep(Duration::from_micros(random.random_range(0..300_000)));
        let asked = now.call("POST", "/v1/migration/cancel", None);
        let info = now.wait_migration(PATIENCE).unwrap();
        if info["state"] == "done" {
            next.wait_state("running", PATIENCE).unwrap();
            now.wait_end().unwrap();
            now = next;
        } else {
            assert!(asked.is_ok(), "{asked:?}");
            assert_eq!(info["state"], "cancelled", "{info}");
            cancelled += 1;
            now.wait_state("running", PATIENCE).unwrap();
        }
        assert_works(&now);
    }
    assert!(cancelled > 0);
    println!("{cancelled} of 20 were cancelled in time");
    place.move_on(&mut now);
    now.verify().unwrap();
}

#[test]
fn a_guest_that_writes_too_fast_makes_the_move_give_up_in_time_and_slowing_it_down_lets_it_end() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    let mut place = Place::new();
    let now = place.start();
    now.call("POST", "/v1/guest", Some(&json!({ "rate": 0 }))).unwrap();
    let (_next, mut request) = place.receiver("root");
    request["bandwidth"] = (20_u64 << 20).into();
    request["downtime_ms"] = 50.into();
    request["timeout_ms"] = 3000.into();
    now.send(&request).unwrap();
    let info = now.wait_migration(PATIENCE).unwrap();
    assert_eq!(info["state"], "failed", "{info}");
    println!("{}", info["error"].as_str().unwrap());
    assert_works(&now);
    let (next, mut request) = place.receiver("root");
    request["bandwidth"] = (300_u64 << 20).into();
    request["downtime_ms"] = 100.into();
    request["auto_converge"] = true.into();
    now.send(&request).unwrap();
    let info = now.wait_migration(PATIENCE * 2).unwrap();
    assert_eq!(info["state"], "done", "{info}");
    println!("slowed down by up to {} %, {} rounds", info["throttle_percent"], info["round"]);
    next.wait_state("running", PATIENCE).unwrap();
    assert_works(&next);
    next.verify().unwrap();
}

#[test]
fn the_disks_daemon_may_die_while_the_machine_runs_and_while_it_moves() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    let mut place = Place::new();
    let mut now = place.start();
    for _ in 0..3 {
        assert_works(&now);
        place.daemon.kill9();
        std::thread::sleep(Duration::from_millis(100));
        place.daemon.restart().unwrap();
        assert_works(&now);
        let (next, mut request) = place.receiver("root");
        request["bandwidth"] = (100_u64 << 20).into();
        now.send(&request).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        place.daemon.kill9();
        place.daemon.restart().unwrap();
        let info = now.wait_migration(PATIENCE).unwrap();
        println!("{} {}", info["state"], info["error"]);
        if info["state"] == "done" {
            next.wait_state("running", PATIENCE).unwrap();
            now.wait_end().unwrap();
            now = next;
        } else {
            now.wait_state("running", PATIENCE).unwrap();
        }
        assert_works(&now);
    }
    place.move_on(&mut now);
    now.verify().unwrap();
}

#[test]
fn what_stands_in_the_way_is_said_before_anything_moves() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    let mut place = Place::new();
    let now = place.start();
    let (fits, request) = place.receiver("root");
    let report = now.call("POST", "/v1/check", Some(&request)).unwrap();
    assert_eq!(report["findings"], json!([]), "{report}");
    let (_other, request) = place.receiver("another");
    let report = now.call("POST", "/v1/check", Some(&request)).unwrap();
    assert_eq!(report["findings"][0]["kind"], "device", "{report}");
    let before = visits(&now);
    now.send(&request).unwrap();
    let info = now.wait_migration(PATIENCE).unwrap();
    assert_eq!(info["state"], "failed", "{info}");
    assert!(info["error"].as_str().unwrap().contains("serial=root"), "{info}");
    assert_works(&now);
    assert!(visits(&now) > before);
    assert_eq!(fits.state(), "waiting");
    // Nobody listens, and what is asked for is none.
    let nobody = json!({ "to": format!("unix:{}/nobody", place.folder.path().display()) });
    now.send(&nobody).unwrap();
    assert_eq!(now.wait_migration(PATIENCE).unwrap()["state"], "failed");
    for wrong in [json!({ "to": "" }), json!({ "to": "unix:/x", "compress": "paper" }), json!({ "t": 1 })] {
        assert!(now.send(&wrong).is_err(), "{wrong}");
    }
    assert_works(&now);
}
