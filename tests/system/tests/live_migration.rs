//! Whole machines move between processes of `kvm-shim` while the test guest writes memory and disk and verifies both.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use system_tests::PATIENCE;
use system_tests::machine::{Shim, alone, has_kvm};
use system_tests::{Daemon, Image};

/// A daemon with a disk, and a machine on it that moves from process to process.
struct Traveller {
    daemon: Daemon,
    folder: tempfile::TempDir,
    now: Shim,
    count: u32,
}

const GUEST: &str = "selftest,working-set=48M,pattern=random,depth=16,disk-range=32M,flush-every=32";

impl Traveller {
    fn new(memory: &str, guest: &str) -> Self {
        let daemon = Daemon::with_disk(Image::DynamicVhdx, 64 << 20, 2).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut arguments = vec!["--memory".into(), memory.into(), "--guest".into(), guest.into()];
        arguments.extend(disk_arguments(&daemon));
        let now = Shim::start(folder.path(), "vm0", "run", &arguments).unwrap();
        Self { daemon, folder, now, count: 0 }
    }

    fn receiver(&mut self, more: &[&str]) -> (Shim, String) {
        self.count += 1;
        let listen = format!("unix:{}", self.folder.path().join(format!("m{}.sock", self.count)).display());
        let mut arguments = vec!["--listen".to_owned(), listen.clone()];
        arguments.extend(disk_arguments(&self.daemon));
        arguments.extend(more.iter().map(|m| (*m).to_owned()));
        let shim =
            Shim::start(self.folder.path(), &format!("vm{}", self.count), "receive", &arguments).unwrap();
        (shim, listen)
    }

    /// Moves it to a new process; what the migration says at its end.
    fn travel(&mut self, mut request: Value) -> Value {
        let (next, listen) = self.receiver(&[]);
        request["to"] = listen.into();
        self.now.send(&request).unwrap();
        let info = self.now.wait_migration(PATIENCE).unwrap();
        assert_eq!(info["state"], "done", "{info}\n{}\n{}", self.now.log(), next.log());
        next.wait_state("running", PATIENCE).unwrap();
        let mut before = std::mem::replace(&mut self.now, next);
        assert!(before.wait_end().unwrap().success(), "{}", before.log());
        info
    }

    fn assert_sound(&self) {
        let report = self.now.report().unwrap();
        assert!(report["mismatches"] == 0 && report["disk_errors"] == 0, "{report}");
    }

    /// Everything is verified by the guest, then the image from outside.
    fn finish(mut self) {
        let report = self.now.verify().unwrap();
        println!("{report}");
        self.now.call("POST", "/v1/vm/stop", None).unwrap();
        self.now.wait_end().unwrap();
        assert!(self.daemon.terminate().unwrap());
        let disk = &self.daemon.disks()[0];
        disk.kind.check(&disk.image).unwrap();
    }
}

fn disk_arguments(daemon: &Daemon) -> Vec<String> {
    let socket = daemon.socket("disk");
    vec!["--disk".into(), format!("socket={},serial=root,queues=2", socket.display())]
}

fn downtimes(mut all: Vec<u64>) -> String {
    all.sort_unstable();
    let at = |p: usize| all[(all.len() - 1) * p / 100] as f64 / 1e3;
    format!("stood still: p50 {:.1} ms, p99 {:.1} ms, longest {:.1} ms", at(50), at(99), at(100))
}

#[test]
fn two_hundred_moves_to_and_fro_carry_memory_and_disk_exactly() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    let mut traveller = Traveller::new("96M", GUEST);
    let mut stood_still = Vec::new();
    let began = Instant::now();
    for round in 0..200u64 {
        // Each way of sending is taken in turn.
        let request = json!({
            "connections": 1 + round % 3,
            "compress": (["none", "lz4", "zstd"][round as usize / 3 % 3]),
            "downtime_ms": 500,
            "auto_converge": true,
            "postcopy": false,
        });
        let info = traveller.travel(request);
        stood_still.push(info["downtime_us"].as_u64().unwrap());
        traveller.assert_sound();
    }
    println!("200 moves in {:.1} s; {}", began.elapsed().as_secs_f64(), downtimes(stood_still));
    let report = traveller.now.report().unwrap();
    assert!(report["disks"][0]["writes"].as_u64().unwrap() > 1000, "{report}");
    traveller.finish();
}

#[test]
fn it_runs_on_the_target_before_its_memory_is_there() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    let mut traveller = Traveller::new("96M", GUEST);
    for _ in 0..5 {
        // So slow that copying can't keep up with the guest.
        let (next, listen) = traveller.receiver(&[]);
        let request = json!({ "to": listen, "postcopy": true, "bandwidth": 60_u64 << 20, "downtime_ms": 50 });
        traveller.now.send(&request).unwrap();
        next.wait_state("running", PATIENCE).unwrap();
        let info = traveller.now.wait_migration(PATIENCE).unwrap();
        assert_eq!(info["state"], "done", "{info}\n{}\n{}", traveller.now.log(), next.log());
        next.wait_until("the last pages", |next| next.migration().unwrap()["state"] == "arrived");
        let arrived = next.migration().unwrap();
        println!(
            "stood still for {} us, then waited for {} pages: p50, p99 us {}",
            info["downtime_us"], arrived["postcopy_faults"], arrived["postcopy_wait_us"]
        );
        assert!(arrived["postcopy_faults"].as_u64().unwrap() > 0, "{arrived}");
        let mut before = std::mem::replace(&mut traveller.now, next);
        assert!(before.wait_end().unwrap().success(), "{}", before.log());
        traveller.assert_sound();
    }
    traveller.finish();
}

#[test]
fn a_machine_that_was_saved_goes_on_once_from_its_file() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    let mut traveller = Traveller::new("96M", GUEST);
    let file = traveller.folder.path().join("vm.state");
    for round in 0..3 {
        std::thread::sleep(Duration::from_millis(200));
        let saved = traveller.now.call("POST", "/v1/vm/save", Some(&json!({ "path": file }))).unwrap();
        assert_eq!(saved["state"], "done", "{saved}");
        assert!(traveller.now.wait_end().unwrap().success(), "{}", traveller.now.log());
        let mut bytes = std::fs::read(&file).unwrap();
        let mut arguments = disk_arguments(&traveller.daemon);
        arguments.push(file.display().to_string());
        // Damaged, it wakes nothing, and keeps its name.
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&file, &bytes).unwrap();
        let refused = Shim::start(traveller.folder.path(), "damaged", "restore", &arguments).unwrap_err();
        assert!(refused.to_string().contains("vm.state"), "{refused}");
        assert!(file.exists());
        bytes[middle] ^= 1;
        std::fs::write(&file, &bytes).unwrap();
        let name = format!("woken{round}");
        traveller.now = Shim::start(traveller.folder.path(), &name, "restore", &arguments).unwrap();
        let again = Shim::start(traveller.folder.path(), "again", "restore", &arguments).unwrap_err();
        assert!(again.to_string().contains("vm.state"), "{again}");
        traveller.assert_sound();
        assert!(!file.exists());
    }
    // What can't be written leaves the machine as it was.
    let nowhere = json!({ "path": "/nowhere/vm.state" });
    assert!(traveller.now.call("POST", "/v1/vm/save", Some(&nowhere)).is_err());
    assert_eq!(traveller.now.state(), "running");
    traveller.travel(json!({ "downtime_ms": 500, "auto_converge": true }));
    traveller.finish();
}
