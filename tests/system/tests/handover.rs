//! Disks are handed over between two daemons that share nothing but the folder of the images.
//!
//! Whatever happens, at most one of them serves a disk, every acknowledged write is there afterwards, and what is refused
//! says how it goes on.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockd_api::{Handover, Job, MergeRequest, MoveRequest};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use system_tests::PATIENCE;
use system_tests::daemon::{DiskSpec, Program};
use system_tests::{Base, Daemon, FrontEnd, Image, LoadOptions, Options, VerifiedLoad};

const SIZE: u64 = 64 << 20;
const SECTORS: u64 = SIZE / 512;
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
    go_on(pair, load, 1 - from);
    took
}

/// The guest goes on at the other daemon, which knows nothing of the connection so far.
fn go_on(pair: &Pair, load: &mut VerifiedLoad, at: usize) {
    load.front.inflight = None;
    load.front.go_on_at(&pair.daemons[at].socket("disk"), PATIENCE).unwrap();
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
    load.front.reconnect(Base::Used, PATIENCE).unwrap();
    load.run_requests(500).unwrap();
    load.verify_all().unwrap();
    let refused = pair.daemons[1].take_over(&handover).unwrap_err().to_string();
    assert!(refused.contains("stale") && refused.contains("release it there"), "{refused}");
}

#[test]
fn a_disk_that_a_guest_used_elsewhere_is_not_taken_back_but_an_unused_one_is() {
    if is_reference() {
        return;
    }
    let pair = Pair::new(Image::DynamicVhdx);
    let [here, there] = &pair.daemons;
    let mut load = pair.load(70);
    load.run_requests(300).unwrap();
    hand_over(&pair, &mut load, 0);
    load.run_requests(300).unwrap();
    load.drain().unwrap();
    load.front.stop_rings().unwrap();
    let handover = there.release("disk", AT_ONCE).unwrap();
    let refused = here.reclaim("disk").unwrap_err().to_string();
    assert!(refused.contains("was taken over, and released by"), "{refused}");
    here.take_over(&handover).unwrap();
    let handover = here.release("disk", AT_ONCE).unwrap();
    // The one that has it back from there has not used it.
    assert_eq!(there.reclaim("disk").unwrap().generation, handover.generation);
    go_on(&pair, &mut load, 1);
    load.run_requests(300).unwrap();
    load.verify_all().unwrap();
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
        let handover = daemon.release("disk", PATIENCE).unwrap();
        let released = begun.elapsed();
        assert_eq!(Path::new(&handover.image), target);
        pair.daemons[1].take_over(&handover).unwrap();
        let took = begun.elapsed();
        go_on(&pair, &mut load, 1);
        load.run_requests(500).unwrap();
        load.verify_all().unwrap();
        let done = daemon.wait_job(&job.job, PATIENCE, |job| job.is_over()).unwrap();
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

/// Moves the disk of a daemon to a file of this name; the guest goes on meanwhile.
fn move_to(daemon: &Daemon, load: &mut VerifiedLoad, to: &Path) {
    let request: MoveRequest =
        serde_json::from_value(serde_json::json!({ "disks": ["disk"], "to": to })).unwrap();
    wait_done(daemon, load, &daemon.start_move(&request).unwrap());
}

/// Folds the newest image of the chain into its parent.
fn merge(daemon: &Daemon, load: &mut VerifiedLoad) {
    let request = MergeRequest { verify: "full".into(), ..MergeRequest::default() };
    let job: Job = daemon.call("POST", "/v1/disks/disk/merge", Some(&request)).unwrap();
    wait_done(daemon, load, &job);
}

fn wait_done(daemon: &Daemon, load: &mut VerifiedLoad, job: &Job) {
    loop {
        let now = daemon.job(&job.job).unwrap();
        if now.is_over() {
            assert_eq!(now.state, "done", "{now:?}");
            return;
        }
        load.run_requests(50).unwrap();
    }
}

fn fences(pair: &Pair) -> Vec<String> {
    let names = std::fs::read_dir(pair.images())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut fences: Vec<_> = names.filter(|name| name.contains("blockd-owner")).collect();
    fences.sort();
    fences
}

#[test]
fn a_chain_goes_to_and_fro_and_is_changed_on_both_sides() {
    if is_reference() {
        return;
    }
    let mut pair = Pair::new(Image::DynamicVhdx);
    let mut load = pair.load(64);
    for round in 0..20 {
        let at = round % 2;
        let daemon = &pair.daemons[at];
        load.run_requests(150).unwrap();
        match round % 5 {
            0 | 1 => {
                let child = pair.images().join(format!("child-{round}.vhdx"));
                daemon.snapshot("disk", &child).unwrap();
            }
            2 => {
                merge(daemon, &mut load);
            }
            // The chain becomes one image elsewhere.
            3 => {
                let request: MoveRequest = serde_json::from_value(serde_json::json!({
                    "disks": ["disk"], "to": pair.images().join(format!("flat-{round}.vhdx")), "flatten": true,
                }))
                .unwrap();
                wait_done(daemon, &mut load, &daemon.start_move(&request).unwrap());
            }
            _ => {}
        }
        load.run_requests(150).unwrap();
        hand_over(&pair, &mut load, at);
    }
    load.verify_all().unwrap();
    println!("a chain, 20 handovers; {}", load.counts());
    let image = pair.daemons[0].disk("disk").unwrap().image;
    assert!(pair.daemons[0].terminate().unwrap() && pair.daemons[1].terminate().unwrap());
    compare(&load, Image::DynamicVhdx, Path::new(&image));
}

#[test]
fn a_disk_that_merges_into_an_image_that_another_daemon_had_held_stays_its_own() {
    if is_reference() {
        return;
    }
    let mut pair = Pair::new(Image::DynamicVhdx);
    let mut load = pair.load(65);
    hand_over(&pair, &mut load, 0);
    hand_over(&pair, &mut load, 1);
    // The base has a fence now; it becomes a parent here, and the disk again there.
    pair.daemons[0].snapshot("disk", &pair.images().join("child.vhdx")).unwrap();
    load.run_requests(200).unwrap();
    hand_over(&pair, &mut load, 0);
    merge(&pair.daemons[1], &mut load);
    assert!(pair.daemons[1].disk("disk").unwrap().image.ends_with("/disk.vhdx"));
    load.drain().unwrap();
    pair.daemons[1].restart().unwrap();
    load.front.reconnect(Base::Used, PATIENCE).unwrap();
    load.run_requests(200).unwrap();
    hand_over(&pair, &mut load, 1);
    load.verify_all().unwrap();
    assert_eq!(fences(&pair), [".disk.vhdx.blockd-owner"], "that of the child has gone with it");
}

#[test]
fn a_fence_goes_with_the_source_of_a_move() {
    if is_reference() {
        return;
    }
    let pair = Pair::new(Image::Raw);
    let mut load = pair.load(66);
    hand_over(&pair, &mut load, 0);
    assert_eq!(fences(&pair), [".disk.raw.blockd-owner"]);
    move_to(&pair.daemons[1], &mut load, &pair.images().join("moved.raw"));
    assert!(fences(&pair).is_empty(), "{:?}", fences(&pair));
    let before = pair.daemons[1].disk("disk").unwrap().generation;
    hand_over(&pair, &mut load, 1);
    assert!(pair.daemons[0].disk("disk").unwrap().generation > before);
    assert_eq!(fences(&pair), [".moved.raw.blockd-owner"]);
    load.run_requests(200).unwrap();
    load.verify_all().unwrap();
}

#[test]
fn a_disk_in_use_is_released_by_force_alone_and_its_requests_in_flight_go_on_elsewhere() {
    if is_reference() {
        return;
    }
    let pair = Pair::new(Image::DynamicVhdx);
    let mut load = pair.load(67);
    for round in 0..10 {
        let (here, there) = (&pair.daemons[round % 2], &pair.daemons[1 - round % 2]);
        load.run_requests(200).unwrap();
        if round == 0 {
            let refused = here.release("disk", AT_ONCE).unwrap_err().to_string();
            assert!(refused.contains("busy") && refused.contains("pause the guest"), "{refused}");
            load.run_requests(100).unwrap();
        }
        let handover: Handover = here.call("POST", "/v1/disks/disk/release?force=true", None::<&()>).unwrap();
        there.take_over(&handover).unwrap();
        load.poll().unwrap();
        load.front.go_on_at(&there.socket("disk"), PATIENCE).unwrap();
    }
    load.run_requests(200).unwrap();
    load.verify_all().unwrap();
}

/// Does something at a daemon in a thread of its own and kills the daemon somewhere in the middle.
fn killed_while(daemon: &mut Daemon, path: &str, body: Option<String>, after: Duration) {
    let (api, path) = (daemon.api(), path.to_owned());
    let caller = std::thread::spawn(move || system_tests::http::call(&api, "POST", &path, body.as_deref()));
    std::thread::sleep(after);
    daemon.kill9();
    let _ = caller.join().unwrap();
    daemon.restart().unwrap();
}

fn survive_kills(kind: Image) {
    if is_reference() {
        return;
    }
    let mut random = ChaCha8Rng::seed_from_u64(system_tests::seed(68));
    let mut pair = Pair::new(kind);
    let mut load = pair.load(68);
    let mut served_again = 0;
    for round in 0..20 {
        let (here, there) = (round % 2, 1 - round % 2);
        load.run_requests(100).unwrap();
        load.drain().unwrap();
        load.front.stop_rings().unwrap();
        let mut some_time = || Duration::from_micros(random.random_range(0..20_000));
        killed_while(&mut pair.daemons[here], "/v1/disks/disk/release", None, some_time());
        served_again += u32::from(!pair.daemons[here].disk("disk").unwrap().released);
        let handover = pair.daemons[here].release("disk", AT_ONCE).unwrap();
        let socket = pair.daemons[there].socket("disk").display().to_string();
        let body = serde_json::to_string(&handover.attach_at(&socket)).unwrap();
        killed_while(&mut pair.daemons[there], "/v1/disks", Some(body), some_time());
        let disks: Vec<blockd_api::DiskInfo> =
            pair.daemons[there].call("GET", "/v1/disks", None::<&()>).unwrap();
        if disks.iter().all(|disk| disk.released) {
            pair.daemons[there].take_over(&handover).unwrap();
        }
        let [of_here, of_there] = [here, there].map(|at| pair.daemons[at].disk("disk").unwrap());
        assert!(
            of_here.released && !of_there.released && of_there.failed.is_none(),
            "{of_here:?}, {of_there:?}"
        );
        assert!(pair.daemons[here].reclaim("disk").is_err());
        go_on(&pair, &mut load, there);
    }
    load.verify_all().unwrap();
    println!("{kind:?}, 40 kills, {served_again} releases undone by them; {}", load.counts());
    assert!(pair.daemons[0].terminate().unwrap());
    compare(&load, kind, &pair.images().join(format!("disk.{}", kind.name())));
}

#[test]
fn daemons_may_die_while_they_hand_over_a_raw_disk() {
    survive_kills(Image::Raw);
}

#[test]
fn daemons_may_die_while_they_hand_over_a_vhdx() {
    survive_kills(Image::DynamicVhdx);
}

/// Keeps others from having the file to themselves, until it is dropped.
fn read_locked(path: &Path) -> std::fs::File {
    let file = std::fs::File::open(path).unwrap();
    let whole = libc::flock {
        l_type: libc::F_RDLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&whole)).unwrap();
    file
}

#[test]
fn a_disk_is_released_while_its_move_still_tidies_up_behind_it() {
    if is_reference() {
        return;
    }
    for dies in [false, true] {
        let mut pair = Pair::new(Image::DynamicVhdx);
        let mut load = pair.load(69);
        load.run_requests(500).unwrap();
        let base = pair.images().join("disk.vhdx");
        pair.daemons[0].snapshot("disk", &pair.images().join("child.vhdx")).unwrap();
        load.run_requests(300).unwrap();
        let to = pair.images().join("moved");
        std::fs::create_dir(&to).unwrap();
        let request: MoveRequest =
            serde_json::from_value(serde_json::json!({ "disks": ["disk"], "to": to, "switch": "manual" }))
                .unwrap();
        let job = pair.daemons[0].start_move(&request).unwrap();
        while !pair.daemons[0].job(&job.job).unwrap().ready {
            load.run_requests(50).unwrap();
        }
        load.drain().unwrap();
        load.front.stop_rings().unwrap();
        // The move waits for a while for whoever else reads the parent, before it leaves it alone.
        let reader = read_locked(&base);
        let begun = Instant::now();
        pair.daemons[0].job_verb(&job.job, "switch").unwrap();
        let handover = pair.daemons[0].release("disk", PATIENCE).unwrap();
        let released = begun.elapsed();
        let state = pair.daemons[0].job(&job.job).unwrap().state;
        pair.daemons[1].take_over(&handover).unwrap();
        println!("released after {released:.1?}, the move being {state}");
        if dies {
            pair.daemons[0].restart().unwrap();
        } else {
            pair.daemons[0].call::<serde_json::Value>("DELETE", "/v1/disks/disk", None::<&()>).unwrap();
            let over = pair.daemons[0].job(&job.job).unwrap();
            assert_eq!(over.state, "done", "a disk is not forgotten while a move names it");
        }
        go_on(&pair, &mut load, 1);
        load.run_requests(300).unwrap();
        load.verify_all().unwrap();
        drop(reader);
        assert!(!pair.images().join("child.vhdx").exists());
        let there = pair.daemons[1].disk("disk").unwrap();
        assert_eq!(there.chain.len(), 2);
        hand_over_to_file(&mut pair, &mut load, Path::new(&there.image));
    }
}

/// Ends both daemons and compares the chain, as one image, with what the load knows.
fn hand_over_to_file(pair: &mut Pair, load: &mut VerifiedLoad, image: &Path) {
    let raw = pair.images().join("copy.raw");
    let request: MoveRequest = serde_json::from_value(serde_json::json!({
        "disks": ["disk"], "to": raw, "format": "raw", "flatten": true,
    }))
    .unwrap();
    wait_done(&pair.daemons[1], load, &pair.daemons[1].start_move(&request).unwrap());
    load.verify_all().unwrap();
    assert!(pair.daemons[1].terminate().unwrap() && !image.exists());
    load.check_file(&raw).unwrap();
}
