//! What a move or a merge must not take from anybody: parents that others need, sources whose targets are away, and the
//! daemon's next start.

mod support;

use std::io::Write;
use std::path::Path;

use formats::{CreateOptions, Format, OpenOptions};
use serde_json::{Value, json};
use support::{Bench, Daemon};

const NONE: Value = Value::Null;
const MIB: u64 = 1 << 20;

/// A base with two children, each of them a disk.
struct Family {
    bench: Bench,
    base: String,
    children: [String; 2],
}

impl Family {
    fn new() -> Self {
        let bench = Bench::new();
        let base = bench.text("base.vhdx");
        formats::create(&base, &CreateOptions::new(Format::Vhdx, 16 * MIB)).expect("created");
        let image = formats::open(&base, &OpenOptions::default()).expect("opened");
        image.begin_changes().expect("begun");
        image.close().expect("closed");
        drop(image);
        let children = ["a", "b"].map(|id| {
            let child = bench.text(&format!("{id}.vhdx"));
            formats::create(&child, &CreateOptions::on_parent(Format::Vhdx, &base)).expect("created");
            child
        });
        std::fs::create_dir(bench.path("new")).expect("made");
        Self { bench, base, children }
    }

    fn attach(&self, daemon: &Daemon, n: usize, parents: &str) {
        let mut request = self.bench.attach(["a", "b"][n], &self.children[n]);
        request["parents"] = json!([parents]);
        daemon.ok("POST", "/v1/disks", &request);
    }

    /// A daemon in which the second disk is remembered, and can't be served because its image is away.
    fn with_one_away(&self, parents: &str) -> Daemon {
        let daemon = self.bench.start(&[]);
        self.attach(&daemon, 0, &self.base);
        self.attach(&daemon, 1, parents);
        daemon.end();
        std::fs::rename(&self.children[1], self.bench.path("away")).expect("renamed");
        let daemon = self.bench.start(&[]);
        assert!(daemon.get("/v1/disks/b")["failed"].is_string());
        daemon
    }

    fn bring_back(&self, daemon: &Daemon, parents: &str) {
        std::fs::rename(self.bench.path("away"), &self.children[1]).expect("renamed");
        self.attach(daemon, 1, parents);
    }
}

fn done(daemon: &Daemon, job: &Value) {
    let path = format!("/v1/jobs/{}", job["job"].as_str().expect("an id"));
    support::eventually("the end of the job", || {
        let job = daemon.get(&path);
        let state = job["state"].as_str().expect("a state");
        assert!(!["failed", "cancelled"].contains(&state), "{job}\n{}", daemon.log());
        state == "done"
    });
}

#[test]
fn a_move_leaves_the_parent_of_a_disk_that_is_remembered_and_not_served() {
    for by_folder in [false, true] {
        let family = Family::new();
        let parents = if by_folder { family.bench.text("") } else { family.base.clone() };
        let daemon = family.with_one_away(&parents);
        let job = daemon.ok("POST", "/v1/moves", &json!({ "disks": ["a"], "to": family.bench.text("new") }));
        done(&daemon, &job);
        assert!(!Path::new(&family.children[0]).exists());
        assert!(Path::new(&family.base).exists(), "disk b needs it");
        family.bring_back(&daemon, &parents);
        daemon.end();
    }
}

#[test]
fn nothing_is_merged_into_the_parent_of_a_disk_that_is_remembered_and_not_served() {
    let family = Family::new();
    let daemon = family.with_one_away(&family.base);
    let message = daemon.refused("POST", "/v1/disks/a/merge", &json!({}), 409, "busy");
    assert!(message.contains("disk b"), "{message}");
    family.bring_back(&daemon, &family.base);
    daemon.end();
}

#[test]
fn a_move_leaves_a_parent_that_another_process_reads() {
    let family = Family::new();
    let daemon = family.bench.start(&[]);
    family.attach(&daemon, 0, &family.base);
    let reader = formats::open(&family.base, &OpenOptions::read_only()).expect("opened");
    let len = std::fs::metadata(&family.base).expect("there").len();
    let job = daemon.ok("POST", "/v1/moves", &json!({ "disks": ["a"], "to": family.bench.text("new") }));
    done(&daemon, &job);
    assert!(!Path::new(&family.children[0]).exists());
    assert_eq!(std::fs::metadata(&family.base).expect("still there").len(), len);
    drop(reader);
    daemon.end();
}

#[test]
fn a_committed_source_stays_while_its_target_is_away() {
    let bench = Bench::new();
    let source = bench.image("a.img", 8 * MIB);
    let (folder, away) = (bench.path("new"), bench.path("away"));
    std::fs::create_dir(&folder).expect("made");
    let daemon = bench.start(&["--disk", &bench.disk("a", &source)]);
    let request = json!({ "disks": ["a"], "to": bench.text("new/b.vhdx"), "switch": "manual" });
    let job = daemon.ok("POST", "/v1/moves", &request)["job"].as_str().expect("an id").to_owned();
    support::eventually("both are equal", || daemon.get(&format!("/v1/jobs/{job}"))["state"] == "synced");
    daemon.kill();
    // The daemon dies right after the commit, and the target's storage is not mounted at the next start.
    let journal = bench.path(&format!("state/moves/{job}.journal"));
    let mut journal = std::fs::OpenOptions::new().append(true).open(journal).expect("opened");
    journal.write_all(&mirror::encode(&mirror::Record::Committed { generation: 1 })).expect("written");
    std::fs::rename(&folder, &away).expect("renamed");
    let daemon = bench.start(&[]);
    assert!(Path::new(&source).exists(), "nobody has seen the target");
    assert!(daemon.get("/v1/disks/a")["failed"].is_string());
    daemon.end();
    std::fs::rename(&away, &folder).expect("renamed");
    let daemon = bench.start(&[]);
    let disk = daemon.get("/v1/disks/a");
    assert_eq!((&disk["image"], &disk["failed"]), (&json!(bench.text("new/b.vhdx")), &NONE));
    assert!(!Path::new(&source).exists());
    daemon.end();
}

#[test]
fn a_move_that_could_not_begin_again_before_its_disk_was_resized_keeps_no_daemon_from_starting() {
    let bench = Bench::new();
    let source = bench.text("a.img");
    std::fs::write(&source, vec![1; 8 * MIB as usize]).expect("written");
    let (folder, away) = (bench.path("new"), bench.path("away"));
    std::fs::create_dir(&folder).expect("made");
    let daemon = bench.start(&["--disk", &bench.disk("a", &source)]);
    let request = json!({ "disks": ["a"], "to": bench.text("new/b.vhdx"), "switch": "manual" });
    let job = daemon.ok("POST", "/v1/moves", &request)["job"].as_str().expect("an id").to_owned();
    let path = format!("/v1/jobs/{job}");
    daemon.kill();
    std::fs::rename(&folder, &away).expect("renamed");
    let daemon = bench.start(&[]);
    assert_eq!(daemon.get(&path)["state"], "failed");
    daemon.ok("POST", "/v1/disks/a/resize", &json!({ "size_bytes": 16 * MIB }));
    daemon.end();
    std::fs::rename(&away, &folder).expect("renamed");
    let daemon = bench.start(&[]);
    support::eventually("both are equal", || daemon.get(&path)["state"] == "synced");
    daemon.kill();
    let daemon = bench.start(&[]);
    support::eventually("both are equal", || daemon.get(&path)["state"] == "synced");
    daemon.ok("POST", &format!("{path}/switch"), &NONE);
    support::eventually("the end", || daemon.get(&path)["state"] == "done");
    daemon.end();
    let daemon = bench.start(&[]);
    let disk = daemon.get("/v1/disks/a");
    assert_eq!((&disk["size_bytes"], &disk["failed"]), (&json!(16 * MIB), &NONE));
    daemon.end();
}

#[test]
fn a_disk_is_not_merged_into_a_larger_parent() {
    let family = Family::new();
    let small = family.bench.text("small.vhdx");
    formats::create(&small, &CreateOptions::on_parent(Format::Vhdx, &family.base)).expect("created");
    formats::resize_with_parents(&small, None, 8 * MIB, true, &[family.base.clone().into()]).expect("cut");
    let daemon = family.bench.start(&[]);
    let mut request = family.bench.attach("s", &small);
    request["parents"] = json!([family.base]);
    assert_eq!(daemon.ok("POST", "/v1/disks", &request)["size_bytes"], json!(8 * MIB));
    let message = daemon.refused("POST", "/v1/disks/s/merge", &json!({}), 422, "unsupported");
    assert!(message.contains("--flatten"), "{message}");
    let disk = daemon.get("/v1/disks/s");
    assert_eq!((&disk["chain"], &disk["failed"]), (&json!([small, family.base]), &NONE));
    daemon.end();
}
