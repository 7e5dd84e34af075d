//! A real Linux guest on the daemon's disks.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::path::Path;
use std::time::{Duration, Instant};

use blockd_api::{Job, MoveRequest};
use serde_json::json;
use system_tests::daemon::Program;
use system_tests::guest::{Guest, GuestOptions, Setup};
use system_tests::{Daemon, Image};

/// An emulated guest on a busy machine is slow.
const PATIENCE: Duration = Duration::from_secs(300);

/// SHA-256 of an image's content, computed by programs that are not of this project.
fn content_sum(kind: Image, image: &Path, scratch: &Path) -> String {
    kind.to_raw(image, scratch).unwrap();
    let output = std::process::Command::new("sha256sum").arg(scratch).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split_whitespace().next().unwrap().to_owned()
}

#[test]
fn a_guest_makes_a_file_system_and_reads_back_what_it_wrote() {
    let Some(setup) = Setup::find_or_skip("a guest on every format") else { return };
    let known = Image::formats();
    for (kind, cpus, queues) in [(Image::Raw, 1, 1), (Image::DynamicVhd, 1, 1), (Image::DynamicVhdx, 2, 2)] {
        if !known.contains(&kind) {
            continue;
        }
        let start = Instant::now();
        let mut daemon = Daemon::with_disk(kind, 128 << 20, queues as u16).unwrap();
        let options = GuestOptions { cpus, queues, ..GuestOptions::new("guest", "files") };
        let mut guest = Guest::start(&setup, daemon.dir(), &daemon.socket("disk"), &options).unwrap();
        let disk = guest.wait_for("disk ", PATIENCE).unwrap();
        println!("{kind:?}: {disk}");
        assert!(disk.contains(&format!("queues={queues}")), "all queues are used");
        if daemon.runs() == Program::Blockd {
            assert!(disk.contains("cache=write-back"), "Linux sends flushes only then");
            assert!(disk.contains("serial=disk"));
        }
        let sum = guest.wait_for("device ", PATIENCE).unwrap();
        guest.wait_for("PASS", PATIENCE).unwrap();
        guest.wait_end(PATIENCE).unwrap();
        let ended = daemon.terminate().unwrap();
        assert!(ended || daemon.runs() != Program::Blockd, "the daemon failed at its end");
        let image = &daemon.disks()[0].image;
        assert_eq!(
            content_sum(kind, image, &daemon.dir().join("raw")),
            sum,
            "the file holds what the guest read"
        );
        kind.check(image).unwrap();
        println!("{kind:?}: {options:?} done in {:.1?}", start.elapsed());
    }
}

/// The reference can do none of what follows.
fn is_reference() -> bool {
    let is = Daemon::program() == Program::Reference;
    if is {
        println!("SKIPPED: the reference does not move disks");
    }
    is
}

fn start_move(daemon: &Daemon, kind: Image, name: &str, change: impl Fn(&mut MoveRequest)) -> Job {
    let to = daemon.dir().join(format!("{name}.{}", kind.name()));
    let request = json!({ "disks": ["disk"], "to": to, "format": kind.name() });
    let mut request: MoveRequest = serde_json::from_value(request).unwrap();
    change(&mut request);
    daemon.start_move(&request).unwrap()
}

/// Ends everything and compares the image with what the guest read last.
fn compare_with_guest(mut daemon: Daemon, kind: Image, mut guest: Guest) {
    let sum = guest.wait_for("device ", PATIENCE).unwrap();
    guest.wait_for("PASS", PATIENCE).unwrap();
    guest.wait_end(PATIENCE).unwrap();
    let said = guest.said();
    let complaint = said.lines().find(|line| line.contains("I/O error") || line.contains("not a head"));
    assert_eq!(complaint, None, "the guest's kernel complains");
    let image = daemon.disk("disk").unwrap().image;
    assert!(daemon.terminate().unwrap(), "the daemon failed at its end");
    let image = Path::new(&image);
    assert_eq!(
        content_sum(kind, image, &daemon.dir().join("raw")),
        sum,
        "the file holds what the guest read"
    );
    kind.check(image).unwrap();
}

#[test]
fn a_guests_disk_moves_twice_and_the_daemon_dies_once_while_files_are_written() {
    if is_reference() {
        return;
    }
    let Some(setup) = Setup::find_or_skip("moves under a guest") else { return };
    let start = Instant::now();
    let other = Image::formats().pop().unwrap();
    let mut daemon = Daemon::with_disk(Image::DynamicVhd, 128 << 20, 2).unwrap();
    let options = GuestOptions { cpus: 2, queues: 2, rounds: 1000, ..GuestOptions::new("guest", "files") };
    let mut guest = Guest::start(&setup, daemon.dir(), &daemon.socket("disk"), &options).unwrap();
    guest.wait_for("disk ", PATIENCE).unwrap();
    // The file system is made while writes go to both images.
    let first = start_move(&daemon, other, "first", |r| {
        r.mirror = "from-start".into();
        r.switch = "manual".into();
    });
    guest.wait_for("file system made", PATIENCE).unwrap();
    guest.wait_for("round 1", PATIENCE).unwrap();
    daemon.wait_job(&first.job, PATIENCE, |job| job.state == "synced").unwrap();
    daemon.job_verb(&first.job, "switch").unwrap();
    let first = daemon.wait_job(&first.job, PATIENCE, |job| job.state == "done").unwrap();
    guest.wait_for("round 3", PATIENCE).unwrap();
    let second = start_move(&daemon, Image::DynamicVhd, "second", |r| r.bandwidth = Some(32 << 20));
    daemon.wait_job(&second.job, PATIENCE, |job| job.bytes_copied > 4 << 20).unwrap();
    let state = daemon.job(&second.job).unwrap().state;
    daemon.kill9();
    std::thread::sleep(Duration::from_millis(300));
    daemon.restart().unwrap();
    let second = daemon.wait_job(&second.job, PATIENCE, |job| job.state == "done").unwrap();
    let rounds = guest.said().lines().filter(|line| line.starts_with("GUEST: round")).count();
    guest.wait_for(&format!("round {}", rounds + 2), PATIENCE).unwrap();
    guest.tell_to_stop().unwrap();
    compare_with_guest(daemon, Image::DynamicVhd, guest);
    println!(
        "VHD to {other:?} ({} KiB mirrored, commit in {} us) to VHD (killed while {state}, {} KiB mirrored), {rounds} \
         rounds of files, {:.1?}",
        first.bytes_mirrored >> 10,
        first.switch.commit_us,
        second.bytes_mirrored >> 10,
        start.elapsed()
    );
}

#[test]
fn a_guest_outlives_the_daemons_death_again_and_again() {
    if is_reference() {
        return;
    }
    let Some(setup) = Setup::find_or_skip("the daemon's death under a guest") else { return };
    let start = Instant::now();
    let mut daemon = Daemon::with_disk(Image::DynamicVhd, 64 << 20, 2).unwrap();
    let options = GuestOptions { cpus: 2, queues: 2, rounds: 1000, ..GuestOptions::new("guest", "blocks") };
    let mut guest = Guest::start(&setup, daemon.dir(), &daemon.socket("disk"), &options).unwrap();
    guest.wait_for("part 1 round 2", PATIENCE).unwrap();
    for kill in 0..6 {
        std::thread::sleep(Duration::from_millis(400 + 37 * kill));
        daemon.kill9();
        std::thread::sleep(Duration::from_millis(100));
        daemon.restart().unwrap();
        let rounds = guest.said().matches("part 0 round").count();
        guest.wait_for(&format!("part 0 round {}", rounds + 1), PATIENCE).unwrap();
    }
    guest.tell_to_stop().unwrap();
    compare_with_guest(daemon, Image::DynamicVhd, guest);
    println!("6 deaths, {:.1?}", start.elapsed());
}

#[test]
fn a_running_guest_migrates_to_another_qemu_on_the_same_disk() {
    if is_reference() {
        return;
    }
    let Some(setup) = Setup::find_or_skip("a guest's live migration") else { return };
    let start = Instant::now();
    let daemon = Daemon::with_disk(Image::Raw, 64 << 20, 2).unwrap();
    let options = GuestOptions { cpus: 2, queues: 2, rounds: 1000, ..GuestOptions::new("source", "blocks") };
    let mut source = Guest::start(&setup, daemon.dir(), &daemon.socket("disk"), &options).unwrap();
    source.wait_for("part 1 round 3", PATIENCE).unwrap();
    let options = GuestOptions { name: "target".into(), incoming: true, ..options };
    let mut target = Guest::start(&setup, daemon.dir(), &daemon.socket("disk"), &options).unwrap();
    let uri = format!("unix:{}", daemon.dir().join("migration").display());
    target.monitor(&[("migrate-incoming", json!({ "uri": uri }))]).unwrap();
    source.monitor(&[("migrate", json!({ "uri": uri }))]).unwrap();
    let until = Instant::now() + PATIENCE;
    let state = loop {
        let state = source.monitor(&[("query-migrate", json!({}))]).unwrap();
        if state["status"] != "active" && state["status"] != "setup" && state["status"] != "device" {
            break state;
        }
        assert!(Instant::now() < until, "the migration does not end: {state}");
        std::thread::sleep(Duration::from_millis(100));
    };
    assert_eq!(state["status"], "completed", "{state}");
    drop(source);
    // What the guest says from now on comes from the other QEMU.
    target.wait_for("part 0 round", PATIENCE).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    target.tell_to_stop().unwrap();
    compare_with_guest(daemon, Image::Raw, target);
    println!(
        "migrated in {} ms, downtime {} ms; {:.1?}",
        state["total-time"],
        state["downtime"],
        start.elapsed()
    );
}
