//! Disks of differencing images, their snapshots and sizes, as a client of the control API sees them, without a guest.

mod support;

use std::path::Path;

use formats::{CreateOptions, Format};
use serde_json::{Value, json};
use support::{Bench, Daemon, names};

const NONE: Value = Value::Null;
const MIB: u64 = 1 << 20;

/// A base in a folder of its own, and a child of it.
fn chain(bench: &Bench, format: &str) -> (String, String) {
    std::fs::create_dir(bench.path("bases")).expect("made");
    let base = bench.text(&format!("bases/base.{format}"));
    let child = bench.text(&format!("child.{format}"));
    make(&base, format);
    on_parent(&child, &base, format);
    (base, child)
}

fn format_of(name: &str) -> Format {
    if name == "vhd" { Format::Vhd } else { Format::Vhdx }
}

fn make(path: &str, format: &str) {
    formats::create(path, &CreateOptions::new(format_of(format), 16 * MIB)).expect("created");
    // Only an image that was written to once is sure to have an id.
    let image = formats::open(path, &formats::OpenOptions::default()).expect("opened");
    image.begin_changes().expect("begun");
    image.close().expect("closed");
}

fn on_parent(child: &str, parent: &str, format: &str) {
    formats::create(child, &CreateOptions::on_parent(format_of(format), parent)).expect("created");
}

fn snapshot(daemon: &Daemon, id: &str, to: &str) -> Value {
    daemon.ok("POST", &format!("/v1/disks/{id}/snapshot"), &json!({ "to": to }))
}

fn resize_path(id: &str) -> String {
    format!("/v1/disks/{id}/resize")
}

#[test]
fn a_child_is_served_with_its_parents_and_comes_back_with_them() {
    for format in ["vhdx", "vhd"] {
        let bench = Bench::new();
        let (base, child) = chain(&bench, format);
        let daemon = bench.start(&[]);
        let mut request = bench.attach("a", &child);
        let message = daemon.refused("POST", "/v1/disks", &request, 422, "unsupported");
        assert!(message.contains("--parents"), "{message}");
        assert_eq!(daemon.get("/v1/disks"), json!([]));
        request["parents"] = json!(["bases"]);
        let message = daemon.refused("POST", "/v1/disks", &request, 400, "invalid");
        assert!(message.contains("absolute"), "{message}");
        request["parents"] = json!([bench.text("bases")]);
        let disk = daemon.ok("POST", "/v1/disks", &request);
        assert_eq!((&disk["chain"], &disk["type"]), (&json!([child, base]), &json!("differencing")));
        // Others may read the base too, and nobody may write to it.
        let second = bench.text(&format!("second.{format}"));
        on_parent(&second, &base, format);
        let mut other = bench.attach("b", &second);
        other["parents"] = json!([base]);
        daemon.ok("POST", "/v1/disks", &other);
        daemon.refused("POST", "/v1/disks", &bench.attach("c", &base), 409, "locked");
        let before = daemon.get("/v1/disks");
        daemon.kill();
        let daemon = bench.start(&[]);
        assert_eq!(daemon.get("/v1/disks"), before);
        daemon.end();
        assert_eq!(names(&bench.path("state/notes")), [""; 0], "nothing is left to note");
        let daemon = bench.start(&[]);
        assert_eq!(daemon.get("/v1/disks"), before);
        // A base that is gone is an error of its disks alone, and they come back with it.
        let away = bench.path("away");
        std::fs::rename(&base, &away).expect("renamed");
        daemon.end();
        let daemon = bench.start(&[]);
        let broken = daemon.get("/v1/disks/a");
        assert!(broken["failed"].as_str().expect("a reason").contains("child"), "{broken}");
        std::fs::rename(&away, &base).expect("renamed");
        daemon.ok("POST", "/v1/disks", &request);
        daemon.end();
    }
}

#[test]
fn parents_are_named_on_the_command_line_and_in_the_file_too() {
    let bench = Bench::new();
    let (base, child) = chain(&bench, "vhdx");
    let typed = format!("{},parents={},parents={base}", bench.disk("a", &child), bench.text("bases"));
    let daemon = bench.start(&["--disk", &typed]);
    assert_eq!(daemon.get("/v1/disks/a")["chain"], json!([child, base]));
    daemon.ok("DELETE", "/v1/disks/a", &NONE);
    daemon.end();
    let config = format!(
        "[[disk]]\nid = \"b\"\nimage = \"{child}\"\nsocket = \"{}\"\nparents = [\"{}\"]\n",
        bench.text("b.sock"),
        bench.text("bases")
    );
    std::fs::write(bench.path("blockd.toml"), config).expect("written");
    let daemon = bench.start(&["--config", &bench.text("blockd.toml")]);
    assert_eq!(daemon.get("/v1/disks/b")["chain"], json!([child, base]));
    daemon.end();
    let (code, log) = bench.run(&["--disk", &format!("{},parents", bench.disk("a", &child))]);
    assert_eq!(code, Some(2), "{log}");
}

#[test]
fn a_snapshot_is_refused_with_a_reason_and_leaves_nothing() {
    let bench = Bench::new();
    let daemon = bench.start(&[]);
    make(&bench.text("a.vhdx"), "vhdx");
    daemon.ok("POST", "/v1/disks", &bench.attach("a", &bench.text("a.vhdx")));
    daemon.ok("POST", "/v1/disks", &bench.attach("raw", &bench.image("raw.img", MIB)));
    make(&bench.text("ro.vhdx"), "vhdx");
    let mut read_only = bench.attach("ro", &bench.text("ro.vhdx"));
    read_only["read_only"] = json!(true);
    daemon.ok("POST", "/v1/disks", &read_only);
    std::fs::write(bench.path("there.vhdx"), "precious").expect("written");
    let before = names(bench.path("raw.img").parent().expect("a folder"));
    for (id, to, status, kind, word) in [
        ("nobody", bench.text("n.vhdx"), 404, "not-found", "nobody"),
        ("a", "n.vhdx".into(), 400, "invalid", "absolute"),
        ("a", bench.text("n.vhd"), 400, "invalid", "vhdx"),
        ("a", bench.text("there.vhdx"), 409, "exists", "there.vhdx"),
        ("a", bench.text("a.vhdx"), 409, "exists", "a.vhdx"),
        ("a", bench.text("nowhere/n.vhdx"), 500, "io", "nowhere"),
        ("raw", bench.text("n.vhdx"), 422, "unsupported", "raw"),
        ("ro", bench.text("n.vhdx"), 409, "state", "read-only"),
    ] {
        let path = format!("/v1/disks/{id}/snapshot");
        let message = daemon.refused("POST", &path, &json!({ "to": to }), status, kind);
        assert!(message.contains(word), "{message}");
    }
    daemon.refused("POST", "/v1/disks/a/snapshot", &json!({}), 400, "invalid");
    assert_eq!(names(bench.path("raw.img").parent().expect("a folder")), before);
    assert_eq!(std::fs::read(bench.path("there.vhdx")).expect("read"), b"precious");
    let disk = daemon.get("/v1/disks/a");
    assert_eq!((&disk["generation"], &disk["failed"]), (&json!(0), &NONE));
    daemon.end();
}

#[test]
fn a_chain_ends_at_64_images_and_comes_back_whole() {
    for format in ["vhdx", "vhd"] {
        let bench = Bench::new();
        let first = bench.text(&format!("0.{format}"));
        make(&first, format);
        let daemon = bench.start(&["--disk", &bench.disk("a", &first)]);
        for n in 1..64 {
            let to = bench.text(&format!("{n}.{format}"));
            let disk = snapshot(&daemon, "a", &to);
            assert_eq!((&disk["image"], &disk["generation"]), (&json!(to), &json!(n)));
        }
        let to = bench.text(&format!("64.{format}"));
        let message =
            daemon.refused("POST", "/v1/disks/a/snapshot", &json!({ "to": to }), 422, "unsupported");
        assert!(message.contains("64"), "{message}");
        assert!(!Path::new(&to).exists());
        let before = daemon.get("/v1/disks");
        assert_eq!(before[0]["chain"].as_array().expect("a chain").len(), 64);
        daemon.kill();
        let daemon = bench.start(&["--disk", &bench.disk("a", &first)]);
        assert_eq!(daemon.get("/v1/disks"), before, "whatever the command line says");
        daemon.end();
        let daemon = bench.start(&[]);
        assert_eq!(daemon.get("/v1/disks"), before);
        daemon.end();
    }
}

#[test]
fn a_disk_that_is_moved_keeps_its_image_and_its_size() {
    let bench = Bench::new();
    std::fs::write(bench.path("a.img"), vec![1; 8 * MIB as usize]).expect("written");
    let daemon = bench.start(&["--disk", &bench.disk("a", &bench.text("a.img"))]);
    let request = json!({ "disks": ["a"], "to": bench.text("b.vhdx"), "switch": "manual" });
    let job = daemon.ok("POST", "/v1/moves", &request);
    let job = job["job"].as_str().expect("an id");
    for (verb, body) in
        [("snapshot", json!({ "to": bench.text("c.vhdx") })), ("resize", json!({ "size_bytes": 16 * MIB }))]
    {
        let message = daemon.refused("POST", &format!("/v1/disks/a/{verb}"), &body, 409, "busy");
        assert!(message.contains(job), "{message}");
    }
    daemon.ok("POST", &format!("/v1/jobs/{job}/switch"), &NONE);
    support::eventually("the end of the move", || daemon.get(&format!("/v1/jobs/{job}"))["state"] == "done");
    let disk = snapshot(&daemon, "a", &bench.text("c.vhdx"));
    assert_eq!(disk["chain"], json!([bench.text("c.vhdx"), bench.text("b.vhdx")]));
    daemon.ok("POST", &resize_path("a"), &json!({ "size_bytes": 16 * MIB }));
    daemon.kill();
    let daemon = bench.start(&[]);
    let again = daemon.get("/v1/disks/a");
    assert_eq!((&again["chain"], &again["size_bytes"]), (&disk["chain"], &json!(16 * MIB)));
    daemon.end();
}

#[test]
fn a_disk_gets_another_size_in_every_format_and_keeps_it() {
    let bench = Bench::new();
    let daemon = bench.start(&[]);
    let mut ids = Vec::new();
    for (name, format) in [("r", Format::Raw), ("v", Format::Vhd), ("x", Format::Vhdx)] {
        let image = bench.text(&format!("{name}.{format}"));
        formats::create(&image, &CreateOptions::new(format, 16 * MIB)).expect("created");
        daemon.ok("POST", "/v1/disks", &bench.attach(name, &image));
        ids.push(name);
    }
    make(&bench.text("base.vhdx"), "vhdx");
    on_parent(&bench.text("child.vhdx"), &bench.text("base.vhdx"), "vhdx");
    let mut request = bench.attach("c", &bench.text("child.vhdx"));
    request["parents"] = json!([bench.text("base.vhdx")]);
    daemon.ok("POST", "/v1/disks", &request);
    ids.push("c");
    for id in &ids {
        let size = |bytes: u64| json!({ "size_bytes": bytes });
        for (bytes, word) in [(0, "multiple"), (16 * MIB + 1, "multiple"), (8 * MIB, "shrink")] {
            let message = daemon.refused("POST", &resize_path(id), &size(bytes), 400, "invalid");
            assert!(message.contains(word), "{message}");
        }
        let resized = daemon.ok("POST", &resize_path(id), &size(40 * MIB));
        assert_eq!((&resized["size_bytes"], &resized["guest_told"]), (&json!(40 * MIB), &json!(false)));
        assert_eq!(resized["id"], json!(id));
        daemon.ok("POST", &resize_path(id), &size(40 * MIB));
        let smaller = json!({ "size_bytes": 24 * MIB, "shrink": true });
        assert_eq!(daemon.ok("POST", &resize_path(id), &smaller)["size_bytes"], json!(24 * MIB));
        daemon.ok("POST", &format!("/v1/disks/{id}/flush"), &NONE);
    }
    let before = daemon.get("/v1/disks");
    daemon.kill();
    let daemon = bench.start(&[]);
    assert_eq!(daemon.get("/v1/disks"), before);
    daemon.end();
    let daemon = bench.start(&[]);
    assert_eq!(daemon.get("/v1/disks"), before);
    daemon.end();
}

#[test]
fn a_snapshot_whose_record_cannot_be_written_leaves_the_disk_as_it_was() {
    for format in ["vhdx", "vhd"] {
        let bench = Bench::new();
        let (image, to) = (bench.text(&format!("a.{format}")), bench.text(&format!("b.{format}")));
        make(&image, format);
        let daemon = bench.start(&["--disk", &bench.disk("a", &image)]);
        let before = daemon.get("/v1/disks/a");
        // A directory in the way fails the writing, whoever runs the test.
        let obstacle = bench.path("state/disks/.a.json.new");
        std::fs::create_dir(&obstacle).expect("made");
        let message = daemon.refused("POST", "/v1/disks/a/snapshot", &json!({ "to": to }), 500, "io");
        assert!(message.contains("as before"), "{message}");
        assert_eq!(daemon.get("/v1/disks/a"), before);
        daemon.ok("POST", "/v1/disks/a/flush", &NONE);
        std::fs::remove_dir(&obstacle).expect("removed");
        // What the attempt may have left is in nobody's way.
        assert_eq!(snapshot(&daemon, "a", &to)["chain"], json!([to, image]));
        daemon.end();
    }
}

#[test]
fn an_image_that_has_to_settle_is_closed_before_its_child_is_served() {
    for format in ["vhdx", "vhd"] {
        let bench = Bench::new();
        let (image, to) = (bench.text(&format!("a.{format}")), bench.text(&format!("b.{format}")));
        make(&image, format);
        let record = bench.path("state/disks/a.json");
        let read = || serde_json::from_slice::<Value>(&std::fs::read(&record).expect("read")).expect("JSON");
        let daemon = bench.start(&["--disk", &bench.disk("a", &image)]);
        snapshot(&daemon, "a", &to);
        let settled = read();
        assert_eq!(settled["settling"], NONE);
        daemon.kill();
        let mut unsettled = settled.clone();
        let id = formats::open(&image, &formats::OpenOptions::read_only()).expect("opened").content_id();
        unsettled["settling"] = json!({ "image": image, "content_id": id.expect("an id").to_string() });
        std::fs::write(&record, unsettled.to_string()).expect("written");
        let daemon = bench.start(&[]);
        assert_eq!(daemon.get("/v1/disks/a")["chain"], json!([to, image]));
        assert_eq!(read(), settled);
        daemon.kill();
        // Where that is not possible the disk is not served, and the reason names both images.
        std::fs::write(&record, unsettled.to_string()).expect("written");
        std::fs::rename(&image, bench.path("away")).expect("renamed");
        let daemon = bench.start(&[]);
        let broken = daemon.get("/v1/disks/a");
        let why = broken["failed"].as_str().expect("a reason");
        assert!(why.contains(&image) && why.contains(&to), "{why}");
        std::fs::rename(bench.path("away"), &image).expect("renamed");
        daemon.ok("POST", "/v1/disks", &bench.attach("a", &to));
        assert_eq!(read()["settling"], NONE);
        daemon.end();
    }
}
