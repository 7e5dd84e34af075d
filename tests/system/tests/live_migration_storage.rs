//! Machines move together with their disks: on storage that both sides see the image changes hands between two daemons;
//! without it the disk is mirrored first, and the move is committed while the machine stands still.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockd_api::{Job, MoveRequest};
use serde_json::{Value, json};
use shim::cli::parts::DiskArgument;
use shim::storage::{Releases, Takes};
use shim::vm::host::TakeStorage as _;
use shim::vm::machine::Storage as _;
use system_tests::PATIENCE;
use system_tests::daemon::DiskSpec;
use system_tests::machine::{Shim, alone, has_kvm};
use system_tests::{Daemon, Image, http};

const GUEST: &str = "selftest,working-set=24M,rate=100M,depth=16,disk-range=16M,flush-every=32";

const BOTH: [&str; 2] = ["disk", "data"];

/// Two daemons in a folder each, and the images in a third one; the first serves disks of these names.
fn daemons(kind: Image, ids: &[&str]) -> (tempfile::TempDir, [Daemon; 2]) {
    let folder = tempfile::tempdir().unwrap();
    for name in ["images", "a", "b"] {
        std::fs::create_dir(folder.path().join(name)).unwrap();
    }
    let images = folder.path().join("images");
    let disks = ids.iter().map(|id| DiskSpec::create(&images, id, kind, 64 << 20, 2).unwrap()).collect();
    let first = Daemon::start(&folder.path().join("a"), disks).unwrap();
    let second = Daemon::start(&folder.path().join("b"), Vec::new()).unwrap();
    (folder, [first, second])
}

/// Two hosts, each with a daemon and its state, that see one folder with images.
struct Hosts {
    folder: tempfile::TempDir,
    daemons: [Daemon; 2],
    at: usize,
    now: Option<Shim>,
    count: u32,
}

impl Hosts {
    /// The first has the disk and the machine.
    fn new(kind: Image) -> Self {
        Self::with_disks(kind, &["disk"])
    }

    fn with_disks(kind: Image, ids: &[&str]) -> Self {
        let (folder, daemons) = daemons(kind, ids);
        let mut hosts = Self { folder, daemons, at: 0, now: None, count: 0 };
        let mut arguments = vec!["--memory".into(), "64M".into(), "--guest".into(), GUEST.into()];
        arguments.extend(hosts.disks(0));
        hosts.now = Some(Shim::start(hosts.folder.path(), "vm", "run", &arguments).unwrap());
        hosts
    }

    fn ids(&self) -> impl Iterator<Item = &str> {
        self.daemons[0].disks().iter().map(|disk| disk.id.as_str())
    }

    fn disks(&self, at: usize) -> Vec<String> {
        let daemon = &self.daemons[at];
        let api = daemon.api();
        let disk = |id| {
            let socket = daemon.socket(id);
            format!("socket={},serial={id},queues=2,blockd={},id={id}", socket.display(), api.display())
        };
        self.ids().flat_map(|id| ["--disk".into(), disk(id)]).collect()
    }

    fn receiver(&mut self, at: usize) -> (Shim, String) {
        let disks = self.disks(at);
        self.receiver_with(disks)
    }

    fn receiver_with(&mut self, disks: Vec<String>) -> (Shim, String) {
        self.count += 1;
        let listen = format!("unix:{}", self.folder.path().join(format!("m{}.sock", self.count)).display());
        let mut arguments = vec!["--listen".to_owned(), listen.clone()];
        arguments.extend(disks);
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
        let info = self.now().wait_migration(PATIENCE).unwrap();
        assert_eq!(info["state"], "done", "{info}\n{}\n{}", self.now().log(), next.log());
        next.wait_state("running", PATIENCE).unwrap();
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
            let disks = report["disks"].as_array().unwrap();
            assert_eq!(disks.len(), self.ids().count());
            disks.iter().map(|disk| disk["writes"].as_u64().unwrap()).collect::<Vec<_>>()
        };
        let before = done();
        let until = std::time::Instant::now() + PATIENCE;
        while std::iter::zip(done(), &before).any(|(now, before)| now < before + 200) {
            assert!(
                std::time::Instant::now() < until,
                "{}: {:?}\n{}",
                self.now().report().unwrap(),
                self.ids().map(|id| self.daemons[self.at].disk(id)).collect::<Vec<_>>(),
                self.now().log()
            );
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
    daemon.wait_job(&job.job, PATIENCE, |job| job.state == "synced").unwrap()
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
        let until = std::time::Instant::now() + PATIENCE;
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
    let info = hosts.now().wait_migration(PATIENCE).unwrap();
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

/// Makes a disk one that can't be released: what stands beside its image is none of blockd's.
fn spoil_fence(folder: &Path, image: &str) -> PathBuf {
    let fence = folder.join("images").join(format!(".{image}.blockd-owner"));
    std::fs::write(&fence, "nothing that a daemon wrote").unwrap();
    fence
}

#[test]
fn a_machine_whose_disks_are_not_released_goes_on_where_it_is() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    // It is the last that stays: of two the first has been released by then.
    for ids in [&BOTH[..1], &BOTH] {
        let mut hosts = Hosts::with_disks(Image::DynamicVhdx, ids);
        let (next, listen) = hosts.receiver(1);
        hosts.assert_works();
        let last = ids.last().unwrap();
        let fence = spoil_fence(hosts.folder.path(), &format!("{last}.vhdx"));
        hosts.now().send(&json!({ "to": listen, "storage": "release" })).unwrap();
        let info = hosts.now().wait_migration(PATIENCE).unwrap();
        let error = info["error"].as_str().unwrap();
        assert!(info["state"] == "failed" && error.contains(&format!("release the disk {last}")), "{info}");
        assert_eq!(hosts.now().state(), "running");
        hosts.assert_works();
        assert!(ids.iter().all(|id| hosts.daemons[0].disk(id).unwrap().connected));
        drop(next);
        std::fs::remove_file(fence).unwrap();
        hosts.travel("release");
        hosts.assert_works();
        hosts.finish();
    }
}

#[test]
fn a_machine_of_which_the_target_took_only_one_disk_goes_on_with_both_where_it_was() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    let mut hosts = Hosts::with_disks(Image::DynamicVhdx, &BOTH);
    let mut disks = hosts.disks(1);
    let nowhere = hosts.folder.path().join("nowhere.sock");
    let last = disks.last_mut().unwrap();
    *last = last.replace(&hosts.daemons[1].api().display().to_string(), &nowhere.display().to_string());
    let (next, listen) = hosts.receiver_with(disks);
    for _ in 0..2 {
        hosts.assert_works();
        hosts.now().send(&json!({ "to": listen, "storage": "release" })).unwrap();
        let info = hosts.now().wait_migration(PATIENCE).unwrap();
        assert_eq!(info["state"], "failed", "{info}");
        assert!(next.log().contains("nowhere.sock"), "{}", next.log());
        assert_eq!(hosts.now().state(), "running");
        hosts.assert_works();
        let served = |id: &&str| hosts.daemons[0].disk(id).unwrap().connected;
        assert!(BOTH.iter().all(served));
        hosts.now().verify().unwrap();
        hosts.now().call("POST", "/v1/guest", Some(&json!({ "stop": false }))).unwrap();
    }
    drop(next);
    hosts.travel("release");
    hosts.assert_works();
    hosts.finish();
}

fn arguments(daemon: &Daemon, ids: &[&str]) -> Vec<DiskArgument> {
    let argument = |id: &&str| DiskArgument {
        socket: daemon.socket(id),
        serial: (*id).into(),
        queues: 2,
        blockd: Some((daemon.api(), (*id).into())),
    };
    ids.iter().map(argument).collect()
}

fn serves(daemon: &Daemon, ids: &[&str]) -> bool {
    ids.iter().all(|id| daemon.disk(id).is_ok_and(|disk| !disk.released && disk.failed.is_none()))
}

#[test]
fn storage_is_taken_back_as_often_as_that_is_asked_for() {
    let (folder, [here, there]) = daemons(Image::Raw, &BOTH);
    let releases = Releases::new(&arguments(&here, &BOTH), false).unwrap();
    releases.reclaim().unwrap();
    let fence = spoil_fence(folder.path(), "data.raw");
    releases.release().unwrap_err();
    for _ in 0..2 {
        releases.reclaim().unwrap();
        assert!(serves(&here, &BOTH));
    }
    std::fs::remove_file(fence).unwrap();
    let handover = releases.release().unwrap();
    for _ in 0..2 {
        releases.reclaim().unwrap();
        assert!(serves(&here, &BOTH));
    }
    let takes = Takes::new(&arguments(&there, &BOTH));
    takes.take(&handover).unwrap_err();
    takes.take(&releases.release().unwrap()).unwrap();
    assert!(serves(&there, &BOTH));
}

#[test]
fn storage_that_the_target_took_and_gave_back_is_taken_back() {
    let (_folder, [here, there]) = daemons(Image::Raw, &BOTH);
    let releases = Releases::new(&arguments(&here, &BOTH), false).unwrap();
    let mut lame = arguments(&there, &BOTH);
    lame[1].blockd.as_mut().unwrap().0 = there.dir().join("nowhere.sock");
    let whole = Takes::new(&arguments(&there, &BOTH));
    for takes in [&Takes::new(&lame), &whole] {
        let handover = releases.release().unwrap();
        assert_eq!(takes.take(&handover).is_ok(), std::ptr::eq(takes, &whole));
        takes.give_back().unwrap();
        releases.reclaim().unwrap();
        releases.reclaim().unwrap();
        assert!(serves(&here, &BOTH) && !serves(&there, &BOTH[..1]) && !serves(&there, &BOTH[1..]));
        takes.take(&handover).unwrap_err();
        takes.give_back().unwrap();
        assert!(serves(&here, &BOTH), "that handover is over");
    }
    whole.take(&releases.release().unwrap()).unwrap();
    assert!(serves(&there, &BOTH));
}

#[test]
fn storage_that_the_target_still_has_is_not_taken_back_but_the_rest_is() {
    let (_folder, [here, there]) = daemons(Image::Raw, &BOTH);
    let releases = Releases::new(&arguments(&here, &BOTH), false).unwrap();
    let takes = Takes::new(&arguments(&there, &BOTH));
    takes.take(&releases.release().unwrap()).unwrap();
    there.release("data", Duration::ZERO).unwrap();
    for _ in 0..2 {
        let error = format!("{:#}", releases.reclaim().unwrap_err());
        assert!(
            error.contains("disk.raw is held by disk disk") && error.contains("release it there"),
            "{error}"
        );
        assert!(serves(&here, &BOTH[1..]) && serves(&there, &BOTH[..1]));
        assert!(!serves(&here, &BOTH[..1]) && !serves(&there, &BOTH[1..]));
    }
    takes.give_back().unwrap();
    releases.reclaim().unwrap();
    assert!(serves(&here, &BOTH) && !serves(&there, &BOTH[..1]));
}

#[test]
fn storage_that_was_not_taken_is_not_given_back() {
    let (folder, [here, there]) = daemons(Image::Raw, &BOTH);
    // One daemon for both sides: nothing changes hands.
    let shared = Takes::new(&arguments(&here, &BOTH));
    shared.take(&[]).unwrap();
    shared.give_back().unwrap();
    assert!(serves(&here, &BOTH));
    // Somebody else's disk has the name on the other side.
    let releases = Releases::new(&arguments(&here, &BOTH), false).unwrap();
    let other = DiskSpec::create(folder.path(), "data", Image::Raw, 1 << 20, 1).unwrap();
    let request = json!({ "id": "data", "image": other.image, "socket": there.socket("data") });
    there.attach(&serde_json::from_value(request).unwrap()).unwrap();
    let takes = Takes::new(&arguments(&there, &BOTH));
    let refused = format!("{:#}", takes.take(&releases.release().unwrap()).unwrap_err());
    assert!(refused.contains("disk data exists"), "{refused}");
    takes.give_back().unwrap();
    assert!(serves(&there, &BOTH[1..]));
    releases.reclaim().unwrap();
    assert!(serves(&here, &BOTH));
    // What an attempt took is none of the next one's.
    there.call::<Value>("DELETE", "/v1/disks/data", None::<&()>).unwrap();
    takes.take(&releases.release().unwrap()).unwrap();
    takes.take(&[]).unwrap();
    takes.give_back().unwrap();
    assert!(serves(&there, &BOTH));
}

/// Stands before a daemon's API and keeps the first answer to an attach to itself; where it listens.
fn before_api(daemon: &Daemon) -> PathBuf {
    let (api, socket) = (daemon.api(), daemon.dir().join("before.sock"));
    let listener = UnixListener::bind(&socket).unwrap();
    let mut kept = false;
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = BufReader::new(connection.unwrap());
            let (mut first, mut length) = (String::new(), 0);
            connection.read_line(&mut first).unwrap();
            loop {
                let mut line = String::new();
                connection.read_line(&mut line).unwrap();
                let line = line.trim().to_lowercase();
                length = line.strip_prefix("content-length:").map_or(length, |n| n.trim().parse().unwrap());
                if line.is_empty() {
                    break;
                }
            }
            let mut body = vec![0; length];
            connection.read_exact(&mut body).unwrap();
            let mut words = first.split(' ');
            let (method, path) = (words.next().unwrap(), words.next().unwrap());
            let body = String::from_utf8(body).unwrap();
            let (status, answer) = http::call(&api, method, path, Some(&body)).unwrap();
            if (method, path) == ("POST", "/v1/disks") && !std::mem::replace(&mut kept, true) {
                continue;
            }
            let head = format!("HTTP/1.1 {status} so\r\ncontent-length: {}\r\n\r\n", answer.len());
            let _ = connection.get_mut().write_all((head + &answer).as_bytes());
        }
    });
    socket
}

#[test]
fn storage_whose_daemon_took_it_without_being_heard_is_given_back() {
    let (_folder, [here, there]) = daemons(Image::Raw, &BOTH);
    let releases = Releases::new(&arguments(&here, &BOTH), false).unwrap();
    let mut arguments = arguments(&there, &BOTH);
    arguments[0].blockd.as_mut().unwrap().0 = before_api(&there);
    let takes = Takes::new(&arguments);
    takes.take(&releases.release().unwrap()).unwrap_err();
    assert!(serves(&there, &BOTH[..1]));
    takes.give_back().unwrap();
    releases.reclaim().unwrap();
    assert!(serves(&here, &BOTH) && !serves(&there, &BOTH[..1]));
    takes.take(&releases.release().unwrap()).unwrap();
    assert!(serves(&there, &BOTH));
}
