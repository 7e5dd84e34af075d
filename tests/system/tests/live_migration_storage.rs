//! Machines move together with their disks: on storage that both sides see the image changes hands between two daemons;
//! without it the disk is mirrored first, and the move is committed while the machine stands still.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use blockd_api::{Job, MoveRequest};
use serde_json::{Value, json};
use system_tests::daemon::DiskSpec;
use system_tests::machine::{Shim, alone, has_kvm};
use system_tests::{Daemon, Image};

const MINUTE: Duration = Duration::from_secs(60);
const GUEST: &str = "selftest,working-set=24M,rate=100M,depth=16,disk-range=16M,flush-every=32";

/// Two hosts, each with a daemon and its state, that see one folder with images.
struct Hosts {
    folder: tempfile::TempDir,
    daemons: [Daemon; 2],
    at: usize,
    now: Option<Shim>,
    count: u32,
}

impl Hosts {
    fn new(kind: Image) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["images", "a", "b"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        let disk = DiskSpec::create(&folder.path().join("images"), "disk", kind, 64 << 20, 2).unwrap();
        let first = Daemon::start(&folder.path().join("a"), vec![disk]).unwrap();
        let second = Daemon::start(&folder.path().join("b"), Vec::new()).unwrap();
        let mut hosts = Self { folder, daemons: [first, second], at: 0, now: None, count: 0 };
        let mut arguments = vec!["--memory".into(), "64M".into(), "--guest".into(), GUEST.into()];
        arguments.extend(hosts.disk(0));
        hosts.now = Some(Shim::start(hosts.folder.path(), "vm", "run", &arguments).unwrap());
        hosts
    }

    fn disk(&self, at: usize) -> Vec<String> {
        let daemon = &self.daemons[at];
        let (socket, api) = (daemon.socket("disk"), daemon.api());
        let disk =
            format!("socket={},serial=root,queues=2,blockd={},id=disk", socket.display(), api.display());
        vec!["--disk".into(), disk]
    }

    fn receiver(&mut self, at: usize) -> (Shim, String) {
        self.count += 1;
        let listen = format!("unix:{}", self.folder.path().join(format!("m{}.sock", self.count)).display());
        let mut arguments = vec!["--listen".to_owned(), listen.clone()];
        arguments.extend(self.disk(at));
        let shim =
            Shim::start(self.folder.path(), &format!("vm{}", self.count), "receive", &arguments).unwrap();
        (shim, listen)
    }

    fn now(&self) -> &Shim {
        self.now.as_ref().unwrap()
    }

    /// Moves machine and disk to the other host.
    fn travel(&mut self, storage: &str) -> Value {
        let (next, listen) = self.receiver(1 - self.at);
        self.now().send(&json!({ "to": listen, "storage": storage, "downtime_ms": 500 })).unwrap();
        let info = self.now().wait_migration(MINUTE).unwrap();
        assert_eq!(info["state"], "done", "{info}\n{}\n{}", self.now().log(), next.log());
        next.wait_state("running", MINUTE).unwrap();
        let mut before = self.now.replace(next).unwrap();
        assert!(before.wait_end().unwrap().success(), "{}", before.log());
        assert!(
            self.daemons[self.at].disk("disk").is_err()
                || self.daemons[self.at].disk("disk").unwrap().released
        );
        self.at = 1 - self.at;
        info
    }

    fn assert_works(&self) {
        let done = || {
            let report = self.now().report().unwrap();
            assert!(report["mismatches"] == 0 && report["disk_errors"] == 0, "{report}");
            report["disks"][0]["writes"].as_u64().unwrap()
        };
        let before = done();
        let until = std::time::Instant::now() + MINUTE;
        while done() < before + 200 {
            assert!(std::time::Instant::now() < until, "{}", self.now().log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn finish(mut self) {
        self.now().verify().unwrap();
        self.now().call("POST", "/v1/vm/stop", None).unwrap();
        self.now = None;
        let image: PathBuf = self.daemons[self.at].disk("disk").unwrap().image.into();
        let kind = self.daemons[0].disks()[0].kind;
        for daemon in &mut self.daemons {
            assert!(daemon.terminate().unwrap());
        }
        kind.check(&image).unwrap();
    }
}

fn move_disk(daemon: &Daemon, to: &Path) -> Job {
    let request = json!({ "disks": ["disk"], "to": to.display().to_string(), "switch": "manual" });
    let request: MoveRequest = serde_json::from_value(request).unwrap();
    let job = daemon.start_move(&request).unwrap();
    daemon.wait_job(&job.job, MINUTE, |job| job.state == "synced").unwrap()
}

#[test]
fn on_shared_storage_the_image_changes_hands_and_no_write_is_lost() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    for kind in Image::formats() {
        let mut hosts = Hosts::new(kind);
        let mut longest = 0;
        for _ in 0..6 {
            hosts.assert_works();
            let info = hosts.travel("release");
            longest = longest.max(info["downtime_us"].as_u64().unwrap());
        }
        hosts.assert_works();
        println!("{kind:?}: 6 moves, stood still for at most {:.1} ms", longest as f64 / 1e3);
        hosts.finish();
    }
}

#[test]
fn a_mirrored_disk_is_committed_while_the_machine_stands_still() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    let mut hosts = Hosts::new(Image::DynamicVhdx);
    let mut longest = 0;
    for round in 0..4 {
        hosts.assert_works();
        let target = hosts.folder.path().join(format!("images/moved-{round}.vhdx"));
        let source: PathBuf = hosts.daemons[hosts.at].disk("disk").unwrap().image.into();
        move_disk(&hosts.daemons[hosts.at], &target);
        hosts.assert_works();
        let from = hosts.at;
        let info = hosts.travel("commit");
        longest = longest.max(info["downtime_us"].as_u64().unwrap());
        let served: PathBuf = hosts.daemons[hosts.at].disk("disk").unwrap().image.into();
        assert_eq!(served, target);
        hosts.assert_works();
        let until = std::time::Instant::now() + MINUTE;
        while source.exists() {
            assert!(
                std::time::Instant::now() < until,
                "{} is deleted: {}",
                source.display(),
                hosts.daemons[from].log_tail()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    println!("4 moves of machine and disk, stood still for at most {:.1} ms", longest as f64 / 1e3);
    hosts.finish();
}

#[test]
fn a_target_whose_daemon_is_away_gives_the_machine_and_its_disk_back() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    let mut hosts = Hosts::new(Image::DynamicVhdx);
    hosts.assert_works();
    let (next, listen) = hosts.receiver(1);
    hosts.daemons[1].kill9();
    hosts.now().send(&json!({ "to": listen, "storage": "release" })).unwrap();
    let info = hosts.now().wait_migration(MINUTE).unwrap();
    assert_eq!(info["state"], "failed", "{info}");
    println!("{}", info["error"].as_str().unwrap());
    assert_eq!(next.state(), "waiting");
    hosts.assert_works();
    hosts.daemons[1].restart().unwrap();
    drop(next);
    hosts.travel("release");
    hosts.assert_works();
    hosts.travel("release");
    hosts.finish();
}

#[test]
fn a_disk_that_is_not_synced_or_has_no_daemon_is_refused_before_anything_moves() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    let mut hosts = Hosts::new(Image::DynamicVhdx);
    let (_next, listen) = hosts.receiver(1);
    for (storage, word) in [("commit", "--switch manual"), ("elsewhere", "elsewhere")] {
        let refused = hosts.now().send(&json!({ "to": listen, "storage": storage })).unwrap_err();
        assert!(refused.to_string().contains(word), "{refused}");
    }
    let target = hosts.folder.path().join("images/moved.vhdx");
    move_disk(&hosts.daemons[0], &target);
    let refused = hosts.now().send(&json!({ "to": listen, "storage": "release" })).unwrap_err();
    assert!(refused.to_string().contains("being moved"), "{refused}");
    hosts.assert_works();
}
