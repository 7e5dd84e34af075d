//! `disk`, `job`, `move` and `events` against a daemon that answers as the test says.

mod support;

use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use support::{Asked, Daemon, command, run};

fn disk() -> Value {
    let latency = json!({"p50": 85.0, "p99": 420.5, "p999": 1500.0, "max": 12000.0});
    json!({
        "id": "vm1", "image": "/images/vm1.vhdx", "chain": ["/images/vm1.vhdx"], "format": "vhdx",
        "type": "dynamic", "size_bytes": 10737418240u64, "sector_size": 512, "socket": "/run/vm1.sock",
        "queues": 2, "read_only": false, "connected": true, "generation": 3, "released": false, "job": null, "failed": null,
        "reads": 1000, "writes": 500, "flushes": 7, "discards": 0, "read_bytes": 4096000,
        "written_bytes": 2048000, "errors": 0, "latency_us": {"read": latency, "write": latency},
    })
}

fn job(state: &str) -> Value {
    json!({
        "job": "m1a2b3c4", "disks": ["vm1"], "state": state, "ready": false, "source": ["/a/vm1.vhdx"], "target": ["/b/vm1.vhdx"],
        "bytes_total": 1073741824, "bytes_copied": 536870912, "bytes_mirrored": 1048576, "bytes_dirty": 65536,
        "bytes_skipped_zero": 0, "bytes_verified": 0, "rate_bytes_per_s": 104857600, "eta_s": 5, "passes": 1,
        "max_guest_p99_us": null, "guest_p99_us": null,
        "phases": {"copying_s": 4.0, "mirroring_s": 0.5, "verify_s": 0.0, "commit_s": 0.0},
        "switch": {"commit_us": 0, "longest_guest_wait_us": 0},
        "verified": "full", "source_deleted": false, "sources_kept": [], "error": null,
    })
}

fn done() -> Value {
    let mut job = job("done");
    job["bytes_copied"] = json!(1073741824);
    job["bytes_verified"] = json!(1073741824);
    job["bytes_dirty"] = json!(0);
    job["phases"]["verify_s"] = json!(2.0);
    job["switch"] = json!({"commit_us": 850, "longest_guest_wait_us": 1200});
    job["source_deleted"] = json!(true);
    job
}

fn answer(value: &Value) -> (u16, String) {
    (200, value.to_string())
}

fn error(status: u16, kind: &str, message: &str) -> (u16, String) {
    (status, json!({"error": {"kind": kind, "message": message}}).to_string())
}

/// A daemon with one disk, whose move passes through `states`, one a question.
fn moving(states: &'static [&'static str]) -> Daemon {
    let seen = std::sync::atomic::AtomicUsize::new(0);
    Daemon::start(move |asked, _| match (asked.method.as_str(), asked.path.as_str()) {
        ("GET", "/v1/disks") => answer(&json!([disk()])),
        ("POST", "/v1/moves") => answer(&job("queued")),
        ("GET", "/v1/jobs/m1a2b3c4") => {
            let at = seen.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            match states[at.min(states.len() - 1)] {
                "done" => answer(&done()),
                "failed" => {
                    let mut failed = job("failed");
                    failed["error"] = json!({"kind": "io", "message": "/b: the disk is broken"});
                    answer(&failed)
                }
                "paused" => {
                    let mut paused = job("paused");
                    paused["error"] = json!({"kind": "no-space", "message": "/b is full"});
                    answer(&paused)
                }
                state => answer(&job(state)),
            }
        }
        _ => error(404, "not-found", "no such thing"),
    })
}

fn asked(method: &str, path: &str, body: Value) -> Asked {
    Asked { method: method.into(), path: path.into(), body }
}

#[test]
fn disks_are_listed_in_a_table() {
    let daemon = Daemon::always(200, &json!([disk()]));
    let list = daemon.blockctl(&["disk", "list"]).expect(0);
    assert_eq!(
        list.out,
        "ID   STATE     SIZE  FORMAT  JOB  IMAGE\nvm1  in use  10 GiB  vhdx    -    /images/vm1.vhdx\n"
    );
    let list = daemon.blockctl(&["disk", "list", "--json"]).expect(0).json();
    assert_eq!(list, json!({"disks": [disk()]}));
    let none = Daemon::always(200, &json!([])).blockctl(&["disk", "list"]).expect(0);
    assert_eq!(none.out, "no disks; attach one with `blockctl disk attach`\n");
}

#[test]
fn a_disk_is_shown_with_its_counters() {
    let daemon = Daemon::always(200, &disk());
    let shown = daemon.blockctl(&["disk", "show", "vm1"]).expect(0);
    assert_eq!(
        shown.out,
        "id:             vm1\n\
         image:          /images/vm1.vhdx\n\
         format:         dynamic vhdx\n\
         size:           10 GiB (10737418240 bytes)\n\
         sector size:    512\n\
         socket:         /run/vm1.sock\n\
         queues:         2\n\
         read-only:      no\n\
         connected:      yes\n\
         generation:     3\n\
         reads:          1000 (3.9 MiB)\n\
         writes:         500 (2.0 MiB)\n\
         flushes:        7\n\
         discards:       0\n\
         errors:         0\n\
         read latency:   p50 85 µs, p99 420 µs, p99.9 1.5 ms, longest 12.0 ms\n\
         write latency:  p50 85 µs, p99 420 µs, p99.9 1.5 ms, longest 12.0 ms\n"
    );
    assert_eq!(daemon.blockctl(&["disk", "show", "vm1", "--json"]).expect(0).json(), disk());
    assert_eq!(daemon.asked()[0], asked("GET", "/v1/disks/vm1", Value::Null));
}

#[test]
fn a_resize_sends_bytes_and_says_whether_the_guest_knows() {
    let mut resized = disk();
    resized["guest_told"] = json!(true);
    let daemon = Daemon::always(200, &resized);
    let ended = daemon.blockctl(&["disk", "resize", "vm1", "10G"]).expect(0);
    assert_eq!(ended.out, "vm1 has 10 GiB (10737418240 bytes) now; the guest was told\n");
    let ended = daemon.blockctl(&["disk", "resize", "vm1", "5G", "--shrink", "--json"]).expect(0);
    assert_eq!(ended.json(), resized);
    let sent = |bytes: u64, shrink: bool| {
        asked("POST", "/v1/disks/vm1/resize", json!({"size_bytes": bytes, "shrink": shrink}))
    };
    assert_eq!(daemon.asked(), [sent(10 << 30, false), sent(5 << 30, true)]);
    resized["guest_told"] = json!(false);
    let ended = Daemon::always(200, &resized).blockctl(&["disk", "resize", "vm1", "10G"]).expect(0);
    assert!(ended.out.contains("when it next connects"), "{ended:?}");
    daemon.blockctl(&["disk", "resize", "vm1", "0"]).expect(2);
    daemon.blockctl(&["disk", "resize", "vm1"]).expect(2);
}

#[test]
fn a_snapshot_sends_an_absolute_path_and_names_the_parent() {
    let mut after = disk();
    after["chain"] = json!(["/images/new.vhdx", "/images/vm1.vhdx"]);
    after["image"] = json!("/images/new.vhdx");
    let daemon = Daemon::always(200, &after);
    let ended = daemon.blockctl(&["disk", "snapshot", "vm1", "--to", "new.vhdx"]).expect(0);
    assert_eq!(ended.out, "vm1 goes on in /images/new.vhdx; /images/vm1.vhdx stays as it is now\n");
    let here = std::env::current_dir().expect("a folder").join("new.vhdx");
    let body = json!({"to": here.display().to_string()});
    assert_eq!(daemon.asked(), [asked("POST", "/v1/disks/vm1/snapshot", body)]);
    daemon.blockctl(&["disk", "snapshot", "vm1"]).expect(2);
    let shown = daemon.blockctl(&["disk", "show", "vm1"]).expect(0);
    assert!(shown.out.contains("parents:        /images/vm1.vhdx\n"), "{}", shown.out);
}

#[test]
fn parents_are_attached_by_absolute_paths() {
    let daemon = Daemon::always(200, &disk());
    let args =
        ["disk", "attach", "vm1", "a.vhdx", "--socket", "/s", "--parents", "bases", "--parents", "/b/p.vhdx"];
    daemon.blockctl(&args).expect(0);
    let here = std::env::current_dir().expect("a folder").join("bases");
    assert_eq!(daemon.asked()[0].body["parents"], json!([here.display().to_string(), "/b/p.vhdx"]));
}

#[test]
fn attaching_sends_absolute_paths() {
    let daemon = Daemon::always(200, &disk());
    let attached = daemon
        .blockctl(&[
            "disk",
            "attach",
            "vm1",
            "vm1.vhdx",
            "--socket",
            "/run/vm1.sock",
            "--queues",
            "2",
            "--read-only",
        ])
        .expect(0);
    assert_eq!(attached.out, "vm1 serves /images/vm1.vhdx (vhdx 10 GiB) at /run/vm1.sock\n");
    let here = std::env::current_dir().expect("a folder");
    let sent = &daemon.asked()[0];
    assert_eq!((sent.method.as_str(), sent.path.as_str()), ("POST", "/v1/disks"));
    assert_eq!(sent.body["image"], here.join("vm1.vhdx").display().to_string());
    assert_eq!(sent.body["socket"], "/run/vm1.sock");
    assert_eq!(sent.body["queues"], 2);
    assert_eq!(sent.body["read_only"], true);
}

fn handover() -> Value {
    json!({
        "id": "vm1", "image": "/shared/vm1.vhdx", "chain": ["/shared/vm1.vhdx", "/shared/base.vhdx"], "format": "vhdx",
        "size_bytes": 10737418240u64, "sector_size": 512, "queues": 2, "io_threads": 1, "read_only": false,
        "write_cache": true, "generation": 7,
    })
}

#[test]
fn what_a_release_answers_can_be_typed_at_the_other_daemon() {
    let daemon = Daemon::always(200, &handover());
    let released = daemon.blockctl(&["disk", "release", "vm1", "--wait", "1500ms"]).expect(0).out;
    let line = released.lines().find_map(|line| line.trim().strip_prefix("blockctl ")).expect("a command");
    let typed: Vec<_> =
        line.split(' ').map(|word| if word == "SOCKET" { "/run/vm1.sock" } else { word }).collect();
    let there = Daemon::always(200, &disk());
    there.blockctl(&typed).expect(0);
    let sent = &there.asked()[0].body;
    let wanted = [
        ("image", json!("/shared/vm1.vhdx")),
        ("parents", json!(["/shared/base.vhdx"])),
        ("generation", json!(7)),
        ("queues", json!(2)),
        ("format", json!("vhdx")),
    ];
    for (field, value) in wanted {
        assert_eq!(sent[field], value, "{field}");
    }
    let forced = daemon.blockctl(&["disk", "release", "vm1", "--force", "--json"]).expect(0);
    assert_eq!(forced.json(), handover());
    assert_eq!(
        daemon.asked(),
        [
            asked("POST", "/v1/disks/vm1/release?force=false&wait_ms=1500", Value::Null),
            asked("POST", "/v1/disks/vm1/release?force=true&wait_ms=0", Value::Null),
        ]
    );
}

#[test]
fn a_released_disk_is_listed_as_such_and_taken_back() {
    let mut released = disk();
    (released["released"], released["connected"]) = (json!(true), json!(false));
    let shown = Daemon::always(200, &released);
    assert!(
        shown
            .blockctl(&["disk", "show", "vm1"])
            .expect(0)
            .out
            .contains("released:       yes, for another daemon\n")
    );
    let listed = Daemon::always(200, &json!([released]));
    assert!(listed.blockctl(&["disk", "list"]).expect(0).out.contains("vm1  released"));
    let daemon = Daemon::always(200, &disk());
    let back = daemon.blockctl(&["disk", "reclaim", "vm1"]).expect(0);
    assert_eq!(back.out, "vm1 serves /images/vm1.vhdx again, with generation 3\n");
    assert_eq!(daemon.asked(), [asked("POST", "/v1/disks/vm1/reclaim", Value::Null)]);
}

#[test]
fn detaching_and_flushing_name_the_disk() {
    let daemon = Daemon::always(200, &json!({}));
    assert_eq!(daemon.blockctl(&["disk", "detach", "vm1"]).expect(0).out, "vm1 is detached\n");
    daemon.blockctl(&["disk", "detach", "vm1", "--force"]).expect(0);
    let flushed = daemon.blockctl(&["disk", "flush", "vm1", "--json"]).expect(0);
    assert_eq!(flushed.json(), json!({"id": "vm1", "flushed": true}));
    assert_eq!(
        daemon.asked(),
        [
            asked("DELETE", "/v1/disks/vm1", Value::Null),
            asked("DELETE", "/v1/disks/vm1?force=true", Value::Null),
            asked("POST", "/v1/disks/vm1/flush", Value::Null),
        ]
    );
}

#[test]
fn what_the_daemon_refuses_is_passed_on_with_its_reason() {
    let message = "disk `vm9`: there is none of that name; `blockctl disk list` shows them";
    let daemon = Daemon::start(move |_, _| error(404, "not-found", message));
    let refused = daemon.blockctl(&["disk", "show", "vm9", "--json"]).expect(1);
    assert_eq!(refused.json(), json!({"error": {"kind": "not-found", "message": message}}));
    assert_eq!(refused.err, format!("blockctl: {message}\n"));
    let damaged = Daemon::start(|_, _| error(422, "corrupt", "vm1.vhdx: both headers are bad"));
    damaged.blockctl(&["disk", "attach", "vm1", "vm1.vhdx", "--socket", "/run/x"]).expect(4);
}

#[test]
fn a_dead_daemon_is_told_from_a_missing_one_and_both_say_what_to_do() {
    let dir = tempfile::tempdir().expect("a folder");
    let socket = dir.path().join("api.sock");
    let list = || run(command().arg("--api").arg(&socket).args(["disk", "list", "--json"]));
    let missing = list().expect(1);
    assert_eq!(missing.json()["error"]["kind"], "unreachable");
    let at = socket.display();
    assert_eq!(
        missing.err,
        format!(
            "blockctl: no daemon answers at {at}: there is no such socket; start one with `blockd --api {at}` or name another with --api\n"
        )
    );
    drop(std::os::unix::net::UnixListener::bind(&socket).expect("a socket"));
    assert!(list().expect(1).err.contains("nobody listens there any more"));
}

#[test]
fn the_environment_names_the_daemon_too() {
    let daemon = Daemon::always(200, &json!([disk()]));
    let list = run(command().env("BLOCKD_API", &daemon.socket).args(["disk", "list"])).expect(0);
    assert!(list.out.contains("vm1"));
}

#[test]
fn what_is_no_blockd_is_not_believed() {
    let daemon = Daemon::start(|_, _| (200, "<html>".into()));
    let confused = daemon.blockctl(&["disk", "list", "--json"]).expect(1);
    assert_eq!(confused.json()["error"]["kind"], "internal");
    let daemon = Daemon::start(|_, _| (502, "Bad Gateway".into()));
    let confused = daemon.blockctl(&["disk", "list"]).expect(1);
    assert!(confused.err.contains("502"), "{}", confused.err);
}

#[test]
fn jobs_are_listed_and_shown() {
    let daemon = Daemon::always(200, &json!([job("copying"), done()]));
    let list = daemon.blockctl(&["job", "list"]).expect(0);
    assert_eq!(
        list.out,
        "JOB       DISK  STATE     COPIED    LEFT       RATE  TARGET\n\
         m1a2b3c4  vm1   copying  512 MiB  64 KiB  100 MiB/s  /b/vm1.vhdx\n\
         m1a2b3c4  vm1   done       1 GiB     0 B          -  /b/vm1.vhdx\n"
    );
    let list = daemon.blockctl(&["job", "list", "--json"]).expect(0).json();
    assert_eq!(list["jobs"].as_array().map(Vec::len), Some(2));

    let daemon = Daemon::always(200, &job("copying"));
    let shown = daemon.blockctl(&["job", "show", "m1a2b3c4"]).expect(0);
    assert_eq!(
        shown.out,
        "job:        m1a2b3c4\n\
         disk:       vm1\n\
         state:      copying\n\
         rate:       100 MiB/s\n\
         time left:  5.0 s\n\
         dirty:      64 KiB\n\
         from:       /a/vm1.vhdx\n\
         to:         /b/vm1.vhdx\n\
         copied:     512 MiB in 4.0 s (128 MiB/s)\n\
         mirrored:   1 MiB of the guest's writes in 500 ms\n"
    );
    assert_eq!(daemon.blockctl(&["job", "show", "m1a2b3c4", "--json"]).expect(0).json(), job("copying"));
}

#[test]
fn the_verbs_of_a_job_are_sent_and_answered_with_its_state() {
    let daemon = Daemon::always(200, &job("paused"));
    for (verb, told) in [
        ("pause", "m1a2b3c4 is paused\n"),
        ("resume", "m1a2b3c4 will go on; for now it is paused\n"),
        ("switch", "m1a2b3c4 switches over; for now it is paused\n"),
        ("cancel", "m1a2b3c4 is being cancelled; for now it is paused\n"),
    ] {
        assert_eq!(daemon.blockctl(&["job", verb, "m1a2b3c4"]).expect(0).out, told);
    }
    let paths: Vec<String> = daemon.asked().into_iter().map(|a| format!("{} {}", a.method, a.path)).collect();
    let wanted = ["pause", "resume", "switch", "cancel"].map(|verb| format!("POST /v1/jobs/m1a2b3c4/{verb}"));
    assert_eq!(paths, wanted);
}

#[test]
fn a_bandwidth_is_set_in_bytes_and_taken_away() {
    let daemon = Daemon::always(200, &job("copying"));
    let set = daemon.blockctl(&["job", "set", "m1a2b3c4", "--bandwidth", "200M"]).expect(0);
    assert_eq!(set.out, "m1a2b3c4 uses at most 200 MiB/s\n");
    let set = daemon.blockctl(&["job", "set", "m1a2b3c4", "--bandwidth", "none"]).expect(0);
    assert_eq!(set.out, "m1a2b3c4 may use all the bandwidth there is\n");
    assert_eq!(
        daemon.asked(),
        [
            asked("PATCH", "/v1/jobs/m1a2b3c4", json!({"bandwidth": 209715200})),
            asked("PATCH", "/v1/jobs/m1a2b3c4", json!({"bandwidth": 0})),
        ]
    );
    daemon.blockctl(&["job", "set", "m1a2b3c4"]).expect(2);
}

#[test]
fn a_latency_budget_is_set_in_microseconds_and_taken_away() {
    let daemon = Daemon::always(200, &job("copying"));
    let set = |args: &[&str]| {
        let args: Vec<&str> = ["job", "set", "m1a2b3c4"].iter().chain(args).copied().collect();
        daemon.blockctl(&args)
    };
    let told = set(&["--max-guest-p99", "5ms"]).expect(0);
    assert_eq!(told.out, "m1a2b3c4 is to keep the guest's p99 within 5.0 ms\n");
    let told = set(&["--max-guest-p99", "none", "--bandwidth", "1M"]).expect(0);
    assert_eq!(told.out, "m1a2b3c4 uses at most 1 MiB/s\nm1a2b3c4 has no latency budget to keep to\n");
    assert_eq!(
        daemon.asked(),
        [
            asked("PATCH", "/v1/jobs/m1a2b3c4", json!({"max_guest_p99_us": 5000})),
            asked("PATCH", "/v1/jobs/m1a2b3c4", json!({"bandwidth": 1048576, "max_guest_p99_us": 0})),
        ]
    );
    let refused = set(&["--max-guest-p99", "5"]).expect(2);
    assert!(refused.err.contains("such as 5ms"), "{}", refused.err);
}

#[test]
fn a_job_shows_how_fast_the_guest_is_and_how_fast_it_is_to_be() {
    for (now, budget, shown) in [
        (json!(800), json!(5000), Some("800 µs of 5.0 ms")),
        (json!(null), json!(5000), Some("idle, at most 5.0 ms")),
        (json!(800), json!(null), Some("800 µs")),
        (json!(null), json!(null), None),
    ] {
        let mut answer = job("copying");
        answer["guest_p99_us"] = now;
        answer["max_guest_p99_us"] = budget;
        let out = Daemon::always(200, &answer).blockctl(&["job", "show", "m1a2b3c4"]).expect(0).out;
        let line = out.lines().find_map(|line| line.strip_prefix("guest's p99:")).map(str::trim);
        assert_eq!(line, shown, "{out}");
    }
}

#[test]
fn a_receipt_tells_what_was_done() {
    let receipt = json!({
        "job": done(), "started": "2026-01-02T03:04:05Z", "ended": "2026-01-02T03:04:15Z", "generation": [3, 4],
        "journal_sha256": "ab".repeat(32),
    });
    let daemon = Daemon::always(200, &receipt);
    let shown = daemon.blockctl(&["job", "receipt", "m1a2b3c4"]).expect(0);
    assert_eq!(
        shown.out,
        format!(
            "job:         m1a2b3c4\n\
             disk:        vm1\n\
             state:       done\n\
             started:     2026-01-02T03:04:05Z\n\
             ended:       2026-01-02T03:04:15Z\n\
             generation:  3 before, 4 after\n\
             from:        /a/vm1.vhdx\n\
             to:          /b/vm1.vhdx\n\
             copied:      1 GiB in 4.0 s (256 MiB/s)\n\
             mirrored:    1 MiB of the guest's writes in 500 ms\n\
             verified:    full, 1 GiB compared in 2.0 s\n\
             switch:      committed in 850 µs; the guest's longest wait was 1.2 ms\n\
             source:      deleted\n\
             journal:     SHA-256 {}\n",
            "ab".repeat(32)
        )
    );
    assert_eq!(daemon.blockctl(&["job", "receipt", "m1a2b3c4", "--json"]).expect(0).json(), receipt);
}

#[test]
fn a_move_says_each_phase_once_and_sums_up() {
    let daemon = moving(&["copying", "copying", "mirroring", "synced", "committed", "done"]);
    let moved = daemon.blockctl(&["move", "vm1", "--to", "/b/"]).expect(0);
    let phases: Vec<&str> = moved.out.lines().filter_map(|l| l.strip_prefix("vm1 (m1a2b3c4): ")).collect();
    assert_eq!(phases, ["queued", "copying", "mirroring", "synced", "committed", "done"]);
    assert!(moved.out.contains("switch:    committed in 850 µs"), "{}", moved.out);
    let sent = &daemon.asked()[1];
    assert_eq!(
        sent.body,
        json!({
            "disks": ["vm1"], "to": "/b/", "mirror": "after-copy", "switch": "auto", "verify": "full",
            "keep_source": false, "copy_only": false, "flatten": false, "on_target_error": "pause",
        })
    );
}

#[test]
fn phases_that_are_over_at_once_are_told_by_the_events() {
    let event = |seq, job: &str, message: &str| json!({"seq": seq, "time": "t", "kind": "job-state", "disk": "vm1", "job": job, "message": message});
    let told = [("m1a2b3c4", "copying"), ("m0", "failed: no"), ("m1a2b3c4", "paused: /b is full")]
        .into_iter()
        .chain(["mirroring", "synced", "committed", "done"].map(|state| ("m1a2b3c4", state)));
    let body: String =
        told.enumerate().map(|(seq, (job, message))| format!("{}\n", event(seq, job, message))).collect();
    let daemon = Daemon::start(move |asked, _| match (asked.method.as_str(), asked.path.as_str()) {
        ("GET", "/v1/disks") => answer(&json!([disk()])),
        ("POST", "/v1/moves") => answer(&job("copying")),
        ("GET", "/v1/events?follow=true") => (200, body.clone()),
        _ => answer(&done()),
    });
    let moved = daemon.blockctl(&["move", "vm1", "--to", "/b/"]).expect(0);
    let phases: Vec<&str> = moved.out.lines().filter_map(|l| l.strip_prefix("vm1 (m1a2b3c4): ")).collect();
    let paused = "paused: /b is full; go on with `blockctl job resume m1a2b3c4`";
    assert_eq!(phases, ["copying", paused, "mirroring", "synced", "committed", "done"]);
}

#[test]
fn a_move_passes_its_options_on() {
    let daemon = moving(&["done"]);
    let options = "--format vhd --type fixed --block-size 2M --bandwidth 200M --mirror from-start --switch manual \
                   --max-guest-p99 5ms --verify sample --keep-source --on-target-error retry --json";
    let args: Vec<&str> =
        ["move", "vm1", "--to", "/b/vm1.vhd"].into_iter().chain(options.split_whitespace()).collect();
    assert_eq!(daemon.blockctl(&args).expect(0).json(), done());
    assert_eq!(
        daemon.asked()[1].body,
        json!({
            "disks": ["vm1"], "to": "/b/vm1.vhd", "format": "vhd", "type": "fixed", "block_size": 2097152,
            "mirror": "from-start", "switch": "manual", "verify": "sample", "bandwidth": 209715200,
            "max_guest_p99_us": 5000, "keep_source": true, "copy_only": false, "flatten": false, "on_target_error": "retry",
        })
    );
}

#[test]
fn a_detached_move_prints_the_job_and_returns() {
    let daemon = moving(&["copying"]);
    let started = daemon.blockctl(&["move", "vm1", "--to", "/b/", "--detach"]).expect(0);
    assert_eq!(started.out, "m1a2b3c4\n");
    let started = daemon.blockctl(&["move", "vm1", "--to", "/b/", "--detach", "--json"]).expect(0);
    assert_eq!(started.json()["job"], "m1a2b3c4");
}

#[test]
fn a_paused_move_says_why_and_how_it_goes_on() {
    let daemon = moving(&["copying", "paused", "copying", "done"]);
    let moved = daemon.blockctl(&["move", "vm1", "--to", "/b/"]).expect(0);
    let line = "vm1 (m1a2b3c4): paused: /b is full; go on with `blockctl job resume m1a2b3c4`\n";
    assert!(moved.out.contains(line), "{}", moved.out);
}

#[test]
fn a_failed_move_ends_with_one_and_a_cancelled_one_with_three() {
    let failed = moving(&["copying", "failed"]).blockctl(&["move", "vm1", "--to", "/b/", "--json"]).expect(1);
    assert_eq!(failed.json()["state"], "failed");
    assert_eq!(failed.json()["error"]["kind"], "io");
    assert_eq!(failed.err, "blockctl: vm1 (m1a2b3c4) has failed: /b: the disk is broken\n");
    let cancelled = moving(&["copying", "cancelled"]).blockctl(&["job", "watch", "m1a2b3c4"]).expect(3);
    assert!(cancelled.err.contains("the disk stays on /a/vm1.vhdx"), "{}", cancelled.err);
}

#[test]
fn interrupting_the_watching_leaves_the_move_alone_and_says_so() {
    let daemon = moving(&["copying"]);
    let child = command()
        .arg("--api")
        .arg(&daemon.socket)
        .args(["move", "vm1", "--to", "/b/"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    while daemon.asked().len() < 4 {
        std::thread::sleep(Duration::from_millis(10));
    }
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).expect("signalled");
    let output = child.wait_with_output().expect("it ends");
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert_eq!(
        err,
        "blockctl: m1a2b3c4 goes on in the daemon; watch it with `blockctl job watch m1a2b3c4`, give it up with \
         `blockctl job cancel m1a2b3c4`\n"
    );
    assert!(daemon.asked().iter().all(|a| !a.path.ends_with("/cancel")));
}

#[test]
fn a_disk_that_there_is_not_is_refused_by_the_daemon() {
    let daemon = Daemon::start(|asked, _| match asked.path.as_str() {
        "/v1/disks" => answer(&json!([disk()])),
        _ => error(404, "not-found", "disk `vm9`: there is none of that name"),
    });
    let refused = daemon.blockctl(&["move", "vm9", "--to", "/b/", "--json"]).expect(1);
    assert_eq!(refused.json()["error"]["kind"], "not-found");
}

#[test]
fn an_image_that_the_daemon_serves_is_not_moved_behind_its_back() {
    let dir = tempfile::tempdir().expect("a folder");
    let image = dir.path().join("vm1.img");
    support::write_raw(&image, 1 << 20);
    let mut served = disk();
    served["image"] = json!(image.display().to_string());
    served["chain"] = json!([image.display().to_string()]);
    let daemon = Daemon::always(200, &json!([served]));
    let to = dir.path().join("new.img").display().to_string();
    let refused = daemon.blockctl(&["move", &image.display().to_string(), "--to", &to, "--json"]).expect(1);
    assert_eq!(refused.json()["error"]["kind"], "busy");
    assert!(refused.err.contains("blockctl move vm1"), "{}", refused.err);
    assert!(image.exists());
}

#[test]
fn several_disks_move_into_a_folder_one_request_each() {
    let dir = tempfile::tempdir().expect("a folder");
    let daemon = Daemon::start(|asked, _| match (asked.method.as_str(), asked.path.as_str()) {
        ("GET", "/v1/disks") => answer(&json!([])),
        ("POST", "/v1/moves") => {
            let mut started = done();
            started["job"] = json!(format!("job-{}", asked.body["disks"][0].as_str().unwrap_or_default()));
            answer(&started)
        }
        _ => error(404, "not-found", "no such thing"),
    });
    let to = dir.path().display().to_string();
    let moved = daemon.blockctl(&["move", "vm1", "vm2", "--to", &to, "--json"]).expect(0);
    let mut jobs: Vec<String> = moved
        .out
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("an object a line")["job"].to_string())
        .collect();
    jobs.sort();
    assert_eq!(jobs, ["\"job-vm1\"", "\"job-vm2\""]);
    daemon.blockctl(&["move", "vm1", "vm2", "--to", "/nowhere/one.vhdx"]).expect(2);
}

#[test]
fn events_are_a_line_each() {
    let first = json!({"seq": 1, "time": "2026-01-02T03:04:05Z", "kind": "disk-attached", "disk": "vm1", "message": "/images/vm1.vhdx"});
    let second = json!({"seq": 2, "time": "2026-01-02T03:04:06Z", "kind": "job-state", "disk": "vm1", "job": "m1", "message": "copying"});
    let body = format!("{first}\n{second}\n");
    let daemon = Daemon::start(move |_, _| (200, body.clone()));
    let told = daemon.blockctl(&["events"]).expect(0);
    assert_eq!(
        told.out,
        "2026-01-02T03:04:05Z  disk-attached     vm1: /images/vm1.vhdx\n\
         2026-01-02T03:04:06Z  job-state         vm1 m1: copying\n"
    );
    let told = daemon.blockctl(&["events", "--json"]).expect(0);
    let lines: Vec<Value> = told.out.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    assert_eq!(lines, [first, second]);
    // A stream that was to go on and does not is a failure.
    let ended = daemon.blockctl(&["events", "--follow"]).expect(1);
    assert_eq!(ended.out.lines().count(), 2);
    assert_eq!(daemon.asked().last().map(|a| a.path.clone()), Some("/v1/events?follow=true".into()));
}

#[test]
fn a_plan_of_a_served_disk_reads_its_file_and_asks_nothing_of_the_daemon() {
    let dir = tempfile::tempdir().expect("a folder");
    let image = dir.path().join("vm1.vhdx");
    support::write_raw(&image, 1 << 20);
    let mut served = disk();
    served["image"] = json!(image.display().to_string());
    served["job"] = json!("m1a2b3c4");
    let daemon = Daemon::start(move |asked, _| match asked.path.as_str() {
        "/v1/disks" => answer(&json!([served])),
        _ => answer(&served),
    });
    let to = dir.path().join("new.vhd").display().to_string();
    let plan = daemon.blockctl(&["plan", "vm1", "--to", &to, "--json"]).expect(1).json();
    assert_eq!(plan["format"], "vhd");
    assert_eq!(plan["size_bytes"], 10737418240u64);
    assert!(plan["bytes_to_copy"].as_u64().is_some_and(|b| b >= 192 << 10), "{plan}");
    assert!(plan["problems"][0].as_str().is_some_and(|p| p.contains("m1a2b3c4")), "{plan}");
    assert!(daemon.asked().iter().all(|a| a.method == "GET"));
}
