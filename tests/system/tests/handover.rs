//! Disks are handed over between two daemons that share nothing but the folder of the images.
//!
//! Whatever happens, at most one of them serves a disk, every acknowledged write is there afterwards, and what is refused
//! says how it goes on.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockd_api::{AttachRequest, Handover, MoveRequest};
use system_tests::daemon::{DiskSpec, Program};
use system_tests::{Daemon, FrontEnd, Image, LoadOptions, Options, VerifiedLoad};

const SIZE: u64 = 64 << 20;
const SECTORS: u64 = SIZE / 512;
const MINUTE: Duration = Duration::from_secs(60);
const AT_ONCE: Duration = Duration::ZERO;

/// The reference hands nothing over.
fn is_reference() -> bool {
    let is = Daemon::program() == Program::Reference;
    if is {
        println!("SKIPPED: the reference hands no disks over");
    }
    is
}

/// Two daemons with a folder each, and the images in a third one.
struct Pair {
    dir: tempfile::TempDir,
    daemons: [Daemon; 2],
}

impl Pair {
    /// The first of them serves `disk`.
    fn new(kind: Image) -> Self {
        let dir = tempfile::Builder::new().prefix("blockd-pair-").tempdir().unwrap();
        for name in ["images", "a", "b"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let disk = DiskSpec::create(&dir.path().join("images"), "disk", kind, SIZE, 2).unwrap();
        let first = Daemon::start(&dir.path().join("a"), vec![disk]).unwrap();
        let second = Daemon::start(&dir.path().join("b"), Vec::new()).unwrap();
        Self { dir, daemons: [first, second] }
    }

    fn images(&self) -> PathBuf {
        self.dir.path().join("images")
    }

    fn load(&self, seed: u64) -> VerifiedLoad {
        let front = Options { queues: 2, ..Options::default() };
        let front = FrontEnd::start(&self.daemons[0].socket("disk"), front).unwrap();
        let options = LoadOptions { depth: 8, ..LoadOptions::new(seed, SECTORS) };
        VerifiedLoad::new(front, options).unwrap()
    }

    /// What each of the two refuses to do with an image that the other one holds.
    fn attach_request(&self, handover: &Handover, at: usize, generation: Option<u64>) -> AttachRequest {
        let socket = self.daemons[at].socket("disk").display().to_string();
        AttachRequest { generation, ..handover.attach_at(&socket) }
    }
}

/// The guest is paused, its disk goes from one daemon to the other, and the guest goes on there.
fn hand_over(pair: &Pair, load: &mut VerifiedLoad, from: usize) -> Duration {
    load.drain().unwrap();
    load.front.stop_rings().unwrap();
    let begun = Instant::now();
    let handover = pair.daemons[from].release("disk", AT_ONCE).unwrap();
    let taken = pair.daemons[1 - from].take_over(&handover).unwrap();
    let took = begun.elapsed();
    assert_eq!(taken.generation, handover.generation);
    assert!(pair.daemons[from].disk("disk").unwrap().released);
    load.front.go_on_at(&pair.daemons[1 - from].socket("disk"), MINUTE).unwrap();
    took
}

fn there_and_back(kind: Image) {
    if is_reference() {
        return;
    }
    let mut pair = Pair::new(kind);
    let mut load = pair.load(61);
    let mut times = Vec::new();
    for round in 0..20 {
        load.run_requests(300).unwrap();
        times.push(hand_over(&pair, &mut load, round % 2));
    }
    load.run_requests(300).unwrap();
    load.verify_all().unwrap();
    times.sort();
    println!(
        "{kind:?}, 20 handovers of {:.1?} (median), {:.1?} at most; {}",
        times[10],
        times[19],
        load.counts()
    );
    assert!(pair.daemons[0].terminate().unwrap() && pair.daemons[1].terminate().unwrap());
    compare(&load, kind, &pair.images().join(format!("disk.{}", kind.name())));
}

fn compare(load: &VerifiedLoad, kind: Image, image: &Path) {
    let raw = image.with_extension("copy");
    kind.to_raw(image, &raw).unwrap();
    load.check_file(&raw).unwrap();
    kind.check(image).unwrap();
    std::fs::remove_file(raw).unwrap();
}

#[test]
fn a_raw_disk_goes_to_and_fro_without_losing_a_write() {
    there_and_back(Image::Raw);
}

#[test]
fn a_vhd_goes_to_and_fro_without_losing_a_write() {
    there_and_back(Image::DynamicVhd);
}

#[test]
fn a_vhdx_goes_to_and_fro_without_losing_a_write() {
    there_and_back(Image::DynamicVhdx);
}

#[test]
fn a_disk_that_was_taken_back_goes_on_for_the_front_end_that_comes_back() {
    if is_reference() {
        return;
    }
    let pair = Pair::new(Image::DynamicVhdx);
    let mut load = pair.load(62);
    load.run_requests(500).unwrap();
    load.drain().unwrap();
    load.front.stop_rings().unwrap();
    let handover = pair.daemons[0].release("disk", AT_ONCE).unwrap();
    assert_eq!(
        pair.daemons[0].release("disk", AT_ONCE).unwrap(),
        handover,
        "asked again it answers the same"
    );
    let back = pair.daemons[0].reclaim("disk").unwrap();
    assert_eq!((back.generation, back.released), (handover.generation, false));
    // The same memory, rings and in-flight region, by the same socket.
    load.front.reconnect(system_tests::Base::Used, MINUTE).unwrap();
    load.run_requests(500).unwrap();
    load.verify_all().unwrap();
    let refused = pair.daemons[1].take_over(&handover).unwrap_err().to_string();
    assert!(refused.contains("stale") && refused.contains("release it there"), "{refused}");
}

#[test]
fn a_move_that_is_synced_is_switched_while_the_guest_is_paused_and_its_target_handed_over() {
    if is_reference() {
        return;
    }
    for (from, to) in [
        (Image::Raw, Image::DynamicVhdx),
        (Image::DynamicVhdx, Image::Raw),
        (Image::DynamicVhdx, Image::DynamicVhd),
    ] {
        let mut pair = Pair::new(from);
        let mut load = pair.load(63);
        load.run_requests(1500).unwrap();
        let target = pair.images().join(format!("moved.{}", to.name()));
        let request: MoveRequest = serde_json::from_value(serde_json::json!({
            "disks": ["disk"], "to": target, "format": to.name(), "switch": "manual",
        }))
        .unwrap();
        let daemon = &pair.daemons[0];
        let job = daemon.start_move(&request).unwrap();
        let source = daemon.disk("disk").unwrap().image;
        while !daemon.job(&job.job).unwrap().ready {
            load.run_requests(50).unwrap();
        }
        load.run_requests(200).unwrap();
        load.drain().unwrap();
        load.front.stop_rings().unwrap();
        let begun = Instant::now();
        let refused = daemon.release("disk", AT_ONCE).unwrap_err().to_string();
        assert!(refused.contains("synced") && refused.contains("switch it over"), "{refused}");
        daemon.job_verb(&job.job, "switch").unwrap();
        let handover = daemon.release("disk", MINUTE).unwrap();
        let released = begun.elapsed();
        assert_eq!(Path::new(&handover.image), target);
        pair.daemons[1].take_over(&handover).unwrap();
        let took = begun.elapsed();
        load.front.go_on_at(&pair.daemons[1].socket("disk"), MINUTE).unwrap();
        load.run_requests(500).unwrap();
        load.verify_all().unwrap();
        let done = daemon.wait_job(&job.job, MINUTE, |job| job.is_over()).unwrap();
        assert!(done.state == "done" && done.source_deleted && !Path::new(&source).exists(), "{done:?}");
        println!(
            "{from:?} to {to:?}: released after {released:.1?}, taken over after {took:.1?}; {:?}",
            done.switch
        );
        pair.daemons[0].restart().unwrap();
        assert!(pair.daemons[0].disk("disk").unwrap().released);
        assert!(pair.daemons[1].terminate().unwrap());
        compare(&load, to, &target);
    }
}
