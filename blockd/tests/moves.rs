//! Moves as a client of the control API sees them, without a guest.

mod support;

use std::path::Path;

use serde_json::{Value, json};
use support::{Bench, Daemon};

const NONE: Value = Value::Null;
const MIB: usize = 1 << 20;

/// A disk with something in every fourth MiB, and a folder to move it to.
fn bench(mib: usize) -> (Bench, String, Vec<u8>) {
    let bench = Bench::new();
    let mut content = vec![0; mib * MIB];
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for (n, byte) in content.iter_mut().enumerate() {
        if (n / MIB).is_multiple_of(4) {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = (seed >> 56) as u8;
        }
    }
    std::fs::write(bench.path("a.img"), &content).expect("written");
    std::fs::create_dir(bench.path("new")).expect("made");
    let image = bench.text("a.img");
    (bench, image, content)
}

fn start_move(daemon: &Daemon, request: Value) -> String {
    let job = daemon.ok("POST", "/v1/moves", &request);
    let id = job["job"].as_str().expect("an id");
    assert!(id.len() == 9 && id.starts_with('m'), "{id}");
    assert_eq!(job["disks"], request["disks"]);
    id.to_owned()
}

fn job(daemon: &Daemon, id: &str) -> Value {
    daemon.get(&format!("/v1/jobs/{id}"))
}

/// Waits until the job is in this state; any end that is another is a failure.
#[track_caller]
fn reach(daemon: &Daemon, id: &str, state: &str) -> Value {
    let mut last = NONE;
    support::eventually(&format!("{id} is {state}"), || {
        last = job(daemon, id);
        let over = ["done", "failed", "cancelled"].contains(&last["state"].as_str().expect("a state"));
        assert!(!over || last["state"] == state, "{last}\n{}", daemon.log());
        last["state"] == state
    });
    last
}

fn tell(daemon: &Daemon, id: &str, verb: &str) -> Value {
    daemon.ok("POST", &format!("/v1/jobs/{id}/{verb}"), &NONE)
}

#[test]
fn a_move_ends_with_the_disk_at_its_target_and_stays_there() {
    let (bench, image, content) = bench(16);
    let typed = bench.disk("a", &image);
    let daemon = bench.start(&["--disk", &typed]);
    let id = start_move(&daemon, json!({ "disks": ["a"], "to": bench.text("new") }));
    let done = reach(&daemon, &id, "done");
    let target = bench.text("new/a.img");
    assert_eq!((&done["source"], &done["target"]), (&json!([image]), &json!([target])));
    assert_eq!(
        (&done["source_deleted"], &done["verified"], &done["error"]),
        (&json!(true), &json!("full"), &NONE)
    );
    let disk = daemon.get("/v1/disks/a");
    assert_eq!((&disk["image"], &disk["generation"], &disk["job"]), (&json!(target), &json!(1), &NONE));
    assert!(!bench.path("a.img").exists());
    let receipt = daemon.get(&format!("/v1/jobs/{id}/receipt"));
    assert_eq!(receipt["generation"], json!([0, 1]));
    assert_eq!(receipt["job"]["job"], json!(id));
    support::eventually("the end among the events", || {
        daemon.send("GET", "/v1/events", "").1.contains("\"message\":\"done\"")
    });
    for verb in ["pause", "resume", "switch", "cancel"] {
        let path = format!("/v1/jobs/{id}/{verb}");
        assert!(daemon.refused("POST", &path, &NONE, 409, "state").contains("done"));
    }
    daemon.refused("PATCH", &format!("/v1/jobs/{id}"), &json!({ "bandwidth": 1 }), 409, "state");

    daemon.kill();
    let daemon = bench.start(&["--disk", &typed]);
    assert_eq!(daemon.get("/v1/disks/a")["image"], json!(target), "whatever the command line says");
    assert_eq!(job(&daemon, &id)["state"], "done");
    assert_eq!(daemon.get(&format!("/v1/jobs/{id}/receipt")), receipt);
    daemon.end();
    assert_eq!(std::fs::read(&target).expect("read"), content);
    assert_eq!(support::names(&bench.path("new")), ["a.img"]);
}

#[test]
fn a_disk_goes_through_every_format_and_comes_back_equal() {
    let (bench, image, content) = bench(12);
    let daemon = bench.start(&["--disk", &bench.disk("a", &image)]);
    for (generation, name) in ["1.vhd", "2.raw", "3.vhd", "4.raw"].iter().enumerate() {
        let to = bench.text(&format!("new/{name}"));
        let id = start_move(&daemon, json!({ "disks": ["a"], "to": to }));
        reach(&daemon, &id, "done");
        let disk = daemon.get("/v1/disks/a");
        let format = name.split_once('.').expect("an ending").1;
        assert_eq!((&disk["image"], &disk["format"]), (&json!(to), &json!(format)));
        assert_eq!(disk["generation"], json!(generation + 1));
        if format != "raw" {
            assert_eq!(disk["type"], "dynamic");
        }
    }
    daemon.end();
    let moved = std::fs::read(bench.path("new/4.raw")).expect("read");
    assert!(moved == content, "the content has changed on the way");
    assert_eq!(support::names(&bench.path("new")), ["4.raw"]);
}

#[test]
fn a_kept_source_stays_and_a_copy_moves_nothing() {
    let (bench, image, content) = bench(8);
    let daemon = bench.start(&["--disk", &bench.disk("a", &image)]);
    let copy = json!({ "disks": ["a"], "to": bench.text("new/copy.img"), "copy_only": true });
    let done = reach(&daemon, &start_move(&daemon, copy), "done");
    assert_eq!(done["source_deleted"], json!(false));
    let disk = daemon.get("/v1/disks/a");
    assert_eq!((&disk["image"], &disk["generation"]), (&json!(image), &json!(0)));

    let keep = json!({ "disks": ["a"], "to": bench.text("new/kept.img"), "keep_source": true });
    let done = reach(&daemon, &start_move(&daemon, keep), "done");
    assert_eq!(done["source_deleted"], json!(false));
    assert_eq!(daemon.get("/v1/disks/a")["image"], json!(bench.text("new/kept.img")));
    daemon.end();
    for name in ["a.img", "new/copy.img", "new/kept.img"] {
        assert!(std::fs::read(bench.path(name)).expect("read") == content, "{name}");
    }
}

#[test]
fn a_manual_move_waits_for_its_switch_and_holds_the_disk_until_then() {
    let (bench, image, _) = bench(8);
    let daemon = bench.start(&["--disk", &bench.disk("a", &image)]);
    let request = json!({ "disks": ["a"], "to": bench.text("new"), "switch": "manual" });
    let id = start_move(&daemon, request.clone());
    reach(&daemon, &id, "synced");
    assert_eq!(daemon.get("/v1/disks/a")["job"], json!(id));
    let message = daemon.refused("DELETE", "/v1/disks/a", &NONE, 409, "busy");
    assert!(message.contains(&id) && message.contains("force"), "{message}");
    assert!(daemon.refused("POST", "/v1/moves", &request, 409, "busy").contains(&id));
    let (_, metrics) = daemon.send("GET", "/metrics", "");
    let state = format!("blockd_job_state{{job=\"{id}\",disk=\"a\",state=\"synced\"}} 1\n");
    assert!(metrics.contains(&state), "{metrics}");
    daemon.refused("GET", &format!("/v1/jobs/{id}/receipt"), &NONE, 409, "state");
    tell(&daemon, &id, "switch");
    reach(&daemon, &id, "done");
    daemon.ok("DELETE", "/v1/disks/a", &NONE);
    daemon.ok("POST", "/v1/disks", &bench.attach("a", &bench.text("new/a.img")));
    let (_, metrics) = daemon.send("GET", "/metrics", "");
    assert!(metrics.contains("blockd_jobs_ended_total{state=\"done\"} 1\n"), "{metrics}");
    assert!(!metrics.contains(&id), "{metrics}");
    daemon.end();
}

#[test]
fn a_slow_move_is_paused_sped_up_and_cancelled_and_the_next_one_works() {
    let (bench, image, content) = bench(16);
    let daemon = bench.start(&["--disk", &bench.disk("a", &image)]);
    let slow = json!({ "disks": ["a"], "to": bench.text("new"), "bandwidth": 64 << 10 });
    let id = start_move(&daemon, slow.clone());
    reach(&daemon, &id, "copying");
    tell(&daemon, &id, "pause");
    reach(&daemon, &id, "paused");
    tell(&daemon, &id, "resume");
    reach(&daemon, &id, "copying");
    tell(&daemon, &id, "cancel");
    let cancelled = reach(&daemon, &id, "cancelled");
    assert_eq!(cancelled["source_deleted"], json!(false));
    support::eventually("the target is gone", || support::names(&bench.path("new")).is_empty());
    assert_eq!(daemon.get("/v1/disks/a")["image"], json!(image));

    let mut budgeted = slow.clone();
    budgeted["max_guest_p99_us"] = json!(5_000);
    let id = start_move(&daemon, budgeted);
    let answer = daemon.ok("PATCH", &format!("/v1/jobs/{id}"), &json!({ "max_guest_p99_us": 800 }));
    assert_eq!(answer["max_guest_p99_us"], json!(800));
    assert_eq!(answer["guest_p99_us"], json!(null), "there is no guest");
    let answer = daemon.ok("PATCH", &format!("/v1/jobs/{id}"), &json!({ "max_guest_p99_us": 0 }));
    assert_eq!(answer["max_guest_p99_us"], json!(null));
    let answer = daemon.ok("PATCH", &format!("/v1/jobs/{id}"), &json!({ "bandwidth": 0 }));
    assert_eq!(answer["job"], json!(id));
    assert_eq!(answer["max_guest_p99_us"], json!(null));
    reach(&daemon, &id, "done");
    let states: Vec<_> =
        daemon.get("/v1/jobs").as_array().expect("jobs").iter().map(|j| j["state"].clone()).collect();
    assert_eq!(states, ["cancelled", "done"]);
    daemon.end();
    assert!(std::fs::read(bench.path("new/a.img")).expect("read") == content);
}

#[test]
fn a_forced_detach_cancels_the_move_first() {
    let (bench, image, content) = bench(16);
    let daemon = bench.start(&["--disk", &bench.disk("a", &image)]);
    let id = start_move(&daemon, json!({ "disks": ["a"], "to": bench.text("new"), "bandwidth": 64 << 10 }));
    reach(&daemon, &id, "copying");
    daemon.refused("DELETE", "/v1/disks/a", &NONE, 409, "busy");
    daemon.ok("DELETE", "/v1/disks/a?force=true", &NONE);
    assert_eq!(job(&daemon, &id)["state"], "cancelled");
    assert_eq!(daemon.get("/v1/disks"), json!([]));
    assert!(support::names(&bench.path("new")).is_empty());
    daemon.ok("POST", "/v1/disks", &bench.attach("a", &image));
    daemon.end();
    assert!(std::fs::read(&image).expect("read") == content);
}

#[test]
fn a_move_that_the_end_of_the_daemon_interrupts_goes_on_at_the_next_start() {
    for kill in [false, true] {
        let (bench, image, content) = bench(8);
        let daemon = bench.start(&["--disk", &bench.disk("a", &image)]);
        let request = json!({ "disks": ["a"], "to": bench.text("new"), "switch": "manual" });
        let id = start_move(&daemon, request);
        reach(&daemon, &id, "synced");
        if kill {
            daemon.kill()
        } else {
            daemon.end()
        };
        assert!(!bench.path("new/a.img").exists());

        let daemon = bench.start(&[]);
        assert_eq!(daemon.get("/v1/disks/a")["job"], json!(id), "{}", daemon.log());
        reach(&daemon, &id, "synced");
        tell(&daemon, &id, "switch");
        reach(&daemon, &id, "done");
        assert_eq!(daemon.get("/v1/disks/a")["image"], json!(bench.text("new/a.img")));
        daemon.end();
        assert!(std::fs::read(bench.path("new/a.img")).expect("read") == content);
        assert_eq!(support::names(&bench.path("new")), ["a.img"]);
        assert!(!bench.path("a.img").exists());
    }
}

#[test]
fn an_interrupted_move_of_a_disk_that_is_away_fails_and_is_forgotten_with_the_disk() {
    let (bench, image, content) = bench(8);
    let daemon = bench.start(&["--disk", &bench.disk("a", &image)]);
    let request = json!({ "disks": ["a"], "to": bench.text("new"), "switch": "manual" });
    let id = start_move(&daemon, request);
    reach(&daemon, &id, "synced");
    daemon.kill();
    std::fs::rename(&image, bench.path("elsewhere")).expect("renamed");

    let daemon = bench.start(&[]);
    let failed = job(&daemon, &id);
    assert_eq!((&failed["state"], &failed["error"]["kind"]), (&json!("failed"), &json!("state")));
    assert!(failed["error"]["message"].as_str().is_some_and(|m| m.contains(&image)), "{failed}");
    assert!(support::names(&bench.path("new")).is_empty(), "what was copied is useless and gone");
    daemon.ok("DELETE", "/v1/disks/a", &NONE);
    daemon.kill();

    let daemon = bench.start(&[]);
    assert_eq!(job(&daemon, &id)["error"]["kind"], "not-found");
    daemon.end();
    let daemon = bench.start(&[]);
    assert_eq!(daemon.get("/v1/jobs"), json!([]));
    daemon.end();
    assert!(std::fs::read(bench.path("elsewhere")).expect("read") == content);
}

#[test]
fn several_disks_move_into_one_folder_unless_their_names_clash() {
    let (bench, image, _) = bench(4);
    std::fs::create_dir(bench.path("b")).expect("made");
    let b = bench.image("b/b.img", 4 * MIB as u64);
    let clash = bench.image("b/a.img", 4 * MIB as u64);
    let disks = [bench.disk("a", &image), bench.disk("b", &b), bench.disk("c", &clash)];
    let daemon = bench.start(&["--disk", &disks[0], "--disk", &disks[1], "--disk", &disks[2]]);
    let to = |ids: &[&str]| json!({ "disks": ids, "to": bench.text("new") });
    daemon.refused("POST", "/v1/moves", &to(&["a", "b", "c"]), 409, "busy");
    daemon.refused("POST", "/v1/moves", &to(&["a", "none"]), 404, "not-found");
    assert_eq!(daemon.get("/v1/jobs"), json!([]));
    let first = daemon.ok("POST", "/v1/moves", &to(&["a", "b"]));
    assert_eq!(first["disks"], json!(["a"]));
    let jobs = daemon.get("/v1/jobs");
    for job in jobs.as_array().expect("jobs") {
        reach(&daemon, job["job"].as_str().expect("an id"), "done");
    }
    assert_eq!(jobs.as_array().map(Vec::len), Some(2));
    daemon.end();
    assert_eq!(support::names(&bench.path("new")), ["a.img", "b.img"]);
}

#[test]
fn sigkill_at_any_moment_of_a_move_leaves_one_whole_disk() {
    const ROUNDS: u64 = 16;
    let (bench, image, content) = bench(8);
    std::fs::create_dir(bench.path("old")).expect("made");
    let mut daemon = bench.start(&["--disk", &bench.disk("a", &image)]);
    let (mut finished, mut begun_again) = (0, 0);
    for round in 0..ROUNDS {
        // Disk `a` is moved to and fro, from one format to the other; nothing is in the way of the next round.
        let to = [bench.text("new/a.vhd"), bench.text("old/a.img")][round as usize % 2].clone();
        let before = daemon.get("/v1/disks/a");
        let id = start_move(&daemon, json!({ "disks": ["a"], "to": to }));
        std::thread::sleep(std::time::Duration::from_millis(round * 7 % 100));
        daemon.kill();

        daemon = bench.start(&[]);
        let after = daemon.get("/v1/disks/a");
        assert_eq!(after["failed"], NONE, "{after}");
        let moved = after["image"] == json!(to);
        assert!(moved || after["image"] == before["image"], "{before} became {after}");
        let step = u64::from(moved);
        assert_eq!(after["generation"].as_u64(), before["generation"].as_u64().map(|g| g + step));
        if moved {
            finished += 1
        } else {
            begun_again += 1
        }
        reach(&daemon, &id, "done");
        let disk = daemon.get("/v1/disks/a");
        assert_eq!(disk["image"], json!(to));
        assert!(!Path::new(before["image"].as_str().expect("a path")).exists(), "the source is left");
    }
    println!("{ROUNDS} moves were killed: {finished} were committed, {begun_again} began again");
    daemon.end();
    assert_eq!(support::names(&bench.path("new")), Vec::<String>::new());
    assert_eq!(support::names(&bench.path("old")), ["a.img"]);
    assert!(
        std::fs::read(bench.path("old/a.img")).expect("read") == content,
        "the content has changed on the way"
    );
}

#[test]
fn another_name_of_a_deleted_source_keeps_its_content() {
    let (bench, image, content) = bench(8);
    std::fs::hard_link(&image, bench.path("backup.img")).expect("link");
    let daemon = bench.start(&["--disk", &bench.disk("a", &image)]);
    let request = json!({ "disks": ["a"], "to": bench.text("new/a.img") });
    let done = reach(&daemon, &start_move(&daemon, request), "done");
    assert_eq!(done["source_deleted"], json!(true));
    assert!(!bench.path("a.img").exists());
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(
        std::fs::read(bench.path("backup.img")).expect("read") == content,
        "the other name lost its content"
    );
}

#[test]
fn a_file_that_took_the_sources_name_meanwhile_is_not_deleted() {
    let (bench, image, content) = bench(8);
    let daemon = bench.start(&["--disk", &bench.disk("a", &image)]);
    let request = json!({ "disks": ["a"], "to": bench.text("new/a.img"), "switch": "manual" });
    let id = start_move(&daemon, request);
    reach(&daemon, &id, "synced");
    std::fs::rename(&image, bench.path("elsewhere.img")).expect("rename");
    std::fs::write(&image, b"somebody else's").expect("write");
    tell(&daemon, &id, "switch");
    let done = reach(&daemon, &id, "done");
    assert_eq!(done["source_deleted"], json!(false));
    assert_eq!(std::fs::read(&image).expect("read"), b"somebody else's");
    assert!(std::fs::read(bench.path("elsewhere.img")).expect("read") == content, "the source was cut");
}
