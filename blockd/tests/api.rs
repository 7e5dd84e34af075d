//! The control API through its socket, with raw images.

mod support;

use serde_json::{Value, json};
use support::{Bench, Daemon};

const NONE: Value = Value::Null;
const MIB: u64 = 1 << 20;

#[test]
fn a_disk_is_attached_listed_shown_flushed_and_detached() {
    let bench = Bench::new();
    let daemon = bench.start(&[]);
    assert_eq!(daemon.get("/v1/disks"), json!([]));

    let mut request = bench.attach("web", &bench.image("web.img", 8 * MIB));
    request["queues"] = json!(4);
    request["io_threads"] = json!(2);
    let disk = daemon.ok("POST", "/v1/disks", &request);
    for (field, value) in [
        ("id", json!("web")),
        ("image", request["image"].clone()),
        ("chain", json!([request["image"]])),
        ("format", json!("raw")),
        ("type", json!("fixed")),
        ("size_bytes", json!(8 * MIB)),
        ("sector_size", json!(512)),
        ("socket", request["socket"].clone()),
        ("queues", json!(4)),
        ("read_only", json!(false)),
        ("connected", json!(false)),
        ("generation", json!(0)),
        ("job", NONE),
        ("failed", NONE),
        ("reads", json!(0)),
        ("errors", json!(0)),
    ] {
        assert_eq!(disk[field], value, "{field}");
    }
    assert!(disk["latency_us"]["read"]["p99"].is_number() && disk["latency_us"]["write"]["max"].is_number());
    assert!(bench.path("web.sock").exists());
    assert_eq!(daemon.get("/v1/disks"), json!([disk]));
    assert_eq!(daemon.get("/v1/disks/web"), disk);
    assert_eq!(daemon.ok("POST", "/v1/disks/web/flush", &NONE), json!({}));

    assert_eq!(daemon.ok("DELETE", "/v1/disks/web", &NONE), json!({}));
    assert!(!bench.path("web.sock").exists());
    assert!(bench.path("web.img").exists());
    assert_eq!(daemon.get("/v1/disks"), json!([]));
    daemon.refused("GET", "/v1/disks/web", &NONE, 404, "not-found");
    assert_eq!(daemon.ok("POST", "/v1/disks", &request)["id"], "web", "the name is free again");
    daemon.end();
}

#[test]
fn an_attach_that_makes_no_sense_is_refused_and_leaves_nothing() {
    let bench = Bench::new();
    let daemon = bench.start(&[]);
    let image = bench.image("a.img", MIB);
    let good = bench.attach("a", &image);
    let with = |field: &str, value: Value| {
        let mut request = good.clone();
        request[field] = value;
        request
    };
    for (field, value, says) in [
        ("id", json!(""), "1 to 64"),
        ("id", json!("../a"), "letters"),
        ("image", json!("a.img"), "absolute"),
        ("socket", json!("a.sock"), "absolute"),
        ("socket", json!(format!("/{}", "s".repeat(120))), "107"),
        ("queues", json!(0), "1 to 64"),
        ("queues", json!(65), "1 to 64"),
        ("queues", json!(-1), "-1"),
        ("io_threads", json!(2), "1 to 1"),
        ("format", json!("qcow2"), "raw, vhd and vhdx"),
        ("read_only", json!("yes"), "yes"),
        ("surprise", json!(1), "surprise"),
    ] {
        let message = daemon.refused("POST", "/v1/disks", &with(field, value), 400, "invalid");
        assert!(message.contains(says), "{field}: {message}");
    }
    let absent = bench.text("absent.img");
    let message = daemon.refused("POST", "/v1/disks", &with("image", json!(absent)), 404, "not-found");
    assert!(message.contains(&absent), "{message}");
    daemon.refused("POST", "/v1/disks", &with("parents", json!(["p"])), 400, "invalid");
    let (status, answer) = daemon.ask("POST", "/v1/disks", &with("image", json!(bench.text(""))));
    assert!(status >= 400 && answer["error"]["kind"].is_string(), "a folder is no image: {answer}");

    assert_eq!(daemon.get("/v1/disks"), json!([]));
    assert_eq!(support::names(&bench.path("state/disks")), Vec::<String>::new());
    assert!(!bench.path("a.sock").exists());
    daemon.end();
}

#[test]
fn names_sockets_and_images_are_given_once() {
    let bench = Bench::new();
    let daemon = bench.start(&[]);
    let (a, b) = (bench.image("a.img", MIB), bench.image("b.img", MIB));
    daemon.ok("POST", "/v1/disks", &bench.attach("a", &a));
    daemon.refused("POST", "/v1/disks", &bench.attach("a", &b), 409, "exists");
    let mut request = bench.attach("b", &b);
    request["socket"] = json!(bench.text("a.sock"));
    let message = daemon.refused("POST", "/v1/disks", &request, 409, "exists");
    assert!(message.contains("disk a"), "{message}");
    request["socket"] = json!(bench.text("api.sock"));
    let message = daemon.refused("POST", "/v1/disks", &request, 409, "exists");
    assert!(message.contains("control API"), "{message}");
    daemon.refused("POST", "/v1/disks", &bench.attach("b", &a), 409, "exists");
    std::os::unix::fs::symlink(&a, bench.path("link.img")).expect("linked");
    daemon.refused("POST", "/v1/disks", &bench.attach("b", &bench.text("link.img")), 409, "locked");
    assert_eq!(daemon.get("/v1/disks").as_array().map(Vec::len), Some(1));
    daemon.ok("POST", "/v1/disks", &bench.attach("b", &b));
    daemon.end();
}

#[test]
fn every_failure_is_json_with_a_kind() {
    let bench = Bench::new();
    let daemon = bench.start(&[]);
    let raw = |method: &str, path: &str, body: &str, status: u16, kind: &str| {
        let (got, answer) = daemon.send(method, path, body);
        let answer: Value = serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{path}: {e}: {answer}"));
        assert_eq!((got, &answer["error"]["kind"]), (status, &json!(kind)), "{method} {path}: {answer}");
        assert!(answer["error"]["message"].as_str().is_some_and(|m| !m.is_empty()));
    };
    raw("GET", "/", "", 404, "not-found");
    raw("GET", "/v2/disks", "", 404, "not-found");
    raw("POST", "/v1/jobs/m1/explode", "", 404, "not-found");
    raw("PUT", "/v1/disks", "", 405, "invalid");
    raw("DELETE", "/metrics", "", 405, "invalid");
    raw("POST", "/v1/disks", "", 400, "invalid");
    raw("POST", "/v1/disks", "{\"id\":", 400, "invalid");
    raw("POST", "/v1/disks", "[1]", 400, "invalid");
    raw("POST", "/v1/moves", &" ".repeat(100_000), 400, "invalid");
    raw("DELETE", "/v1/disks/a?force=perhaps", "", 400, "invalid");
    raw("DELETE", "/v1/disks/a?fierce=true", "", 400, "invalid");
    raw("GET", "/v1/events?follow=2", "", 400, "invalid");
    raw("GET", "/v1/disks/%FF", "", 400, "invalid");
    for (method, path) in [
        ("GET", "/v1/disks/none"),
        ("DELETE", "/v1/disks/none"),
        ("DELETE", "/v1/disks/none?force=true"),
        ("POST", "/v1/disks/none/flush"),
        ("GET", "/v1/jobs/m0"),
        ("GET", "/v1/jobs/m0/receipt"),
        ("POST", "/v1/jobs/m0/pause"),
        ("POST", "/v1/jobs/m0/resume"),
        ("POST", "/v1/jobs/m0/switch"),
        ("POST", "/v1/jobs/m0/cancel"),
    ] {
        raw(method, path, "", 404, "not-found");
    }
    raw("PATCH", "/v1/jobs/m0", "{}", 404, "not-found");
    raw("PATCH", "/v1/jobs/m0", "{\"bandwith\":1}", 400, "invalid");
    assert_eq!(daemon.get("/v1/jobs"), json!([]));
    daemon.end();
}

#[test]
fn a_move_that_makes_no_sense_is_refused_and_holds_nothing() {
    let bench = Bench::new();
    let image = bench.image("a.img", MIB);
    let daemon = bench.start(&["--disk", &bench.disk("a", &image)]);
    let refuse = |body: Value, status, kind: &str| daemon.refused("POST", "/v1/moves", &body, status, kind);
    refuse(json!({ "disks": ["none"], "to": bench.text("new.img") }), 404, "not-found");
    refuse(json!({ "disks": [], "to": bench.text("new.img") }), 400, "invalid");
    refuse(json!({ "disks": ["a"], "to": "new.img" }), 400, "invalid");
    refuse(json!({ "disks": ["a"], "to": bench.text("absent/new.img") }), 404, "not-found");
    refuse(json!({ "disks": ["a"], "to": image }), 409, "exists");
    refuse(json!({ "disks": ["a"], "to": bench.text("") }), 409, "exists");
    refuse(json!({ "disks": ["a", "a"], "to": bench.text("") }), 409, "busy");
    refuse(json!({ "disks": ["a"], "to": bench.text("new.img"), "type": "dynamic" }), 400, "invalid");
    refuse(json!({ "disks": ["a"], "to": bench.text("new.img"), "mirror": "never" }), 400, "invalid");
    refuse(json!({ "disks": ["a"], "to": bench.text("new.img"), "speed": 9 }), 400, "invalid");
    let disk = daemon.get("/v1/disks/a");
    assert_eq!((&disk["job"], &disk["failed"]), (&NONE, &NONE));
    assert_eq!(daemon.get("/v1/jobs"), json!([]));
    assert!(!bench.path("new.img").exists());
    daemon.ok("DELETE", "/v1/disks/a", &NONE);
    daemon.end();
}

#[test]
fn events_are_told_and_followed_until_the_daemon_ends() {
    let bench = Bench::new();
    let daemon = bench.start(&[]);
    let image = bench.image("a.img", MIB);
    daemon.ok("POST", "/v1/disks", &bench.attach("a", &image));
    let mut followed = daemon.follow("/v1/events?follow=true");
    let first = followed.next().expect("an event");
    assert_eq!(
        (&first["seq"], &first["kind"], &first["disk"]),
        (&json!(1), &json!("disk-attached"), &json!("a"))
    );
    let time = first["time"].as_str().expect("a time");
    assert!(time.len() == 24 && time.starts_with("20") && time.ends_with('Z'), "{time}");
    daemon.ok("DELETE", "/v1/disks/a", &NONE);
    let second = followed.next().expect("an event");
    assert_eq!((&second["seq"], &second["kind"]), (&json!(2), &json!("disk-detached")));

    let (status, lines) = daemon.send("GET", "/v1/events", "");
    let told: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!((status, told), (200, vec![first, second]));

    daemon.end();
    assert_eq!(followed.next(), None, "an open stream neither holds up the end nor survives it");
}

/// A sample of Prometheus's text format: name, labels, value.
type Sample = (String, Vec<(String, String)>, f64);

/// Reads the format by its grammar, and holds that each sample belongs to the family above it.
fn parse_metrics(text: &str) -> Vec<Sample> {
    let (mut family, mut kind, mut samples) = (String::new(), String::new(), Vec::new());
    let mut families = std::collections::BTreeSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            family = rest.split(' ').next().expect("a name").to_owned();
            assert!(families.insert(family.clone()), "{family} comes twice");
            continue;
        }
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, of) = rest.split_once(' ').expect("a type");
            assert_eq!(name, family);
            assert!(["counter", "gauge", "histogram"].contains(&of), "{line}");
            kind = of.to_owned();
            assert_eq!(name.ends_with("_total"), kind == "counter", "{line}");
            continue;
        }
        let (series, value) = line.rsplit_once(' ').expect("a value");
        let value = value.parse().unwrap_or_else(|e| panic!("{line}: {e}"));
        let (name, labels) = match series.split_once('{') {
            None => (series, Vec::new()),
            Some((name, labels)) => {
                let labels = labels.strip_suffix("\"}").expect("labels end");
                let pairs = labels.split("\",").map(|pair| pair.split_once("=\"").expect("a label"));
                (name, pairs.map(|(l, v)| (l.to_owned(), v.to_owned())).collect())
            }
        };
        let stem = match kind.as_str() {
            "histogram" => ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s)),
            _ => Some(name),
        };
        assert_eq!(stem, Some(family.as_str()), "{line}");
        assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{name}");
        samples.push((name.to_owned(), labels, value));
    }
    assert!(text.ends_with('\n'));
    samples
}

fn value(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> f64 {
    let has = |sample: &&Sample| {
        let wanted = labels.iter().all(|(l, v)| sample.1.iter().any(|(a, b)| a == l && b == v));
        sample.0 == name && wanted
    };
    samples.iter().find(has).unwrap_or_else(|| panic!("no {name} {labels:?}")).2
}

#[test]
fn metrics_are_well_formed_and_tell_of_disks_and_process() {
    let bench = Bench::new();
    let (a, b) = (bench.image("a.img", 3 * MIB), bench.image("b.img", 5 * MIB));
    let daemon = bench.start(&["--disk", &bench.disk("a", &a), "--disk", &bench.disk("b", &b)]);
    let (status, text) = daemon.send("GET", "/metrics", "");
    assert_eq!(status, 200);
    let samples = parse_metrics(&text);
    assert_eq!(value(&samples, "blockd_disk_size_bytes", &[("disk", "a")]), (3 * MIB) as f64);
    assert_eq!(value(&samples, "blockd_disk_size_bytes", &[("disk", "b")]), (5 * MIB) as f64);
    assert_eq!(value(&samples, "blockd_disk_connected", &[("disk", "a")]), 0.0);
    assert_eq!(value(&samples, "blockd_disk_requests_total", &[("disk", "b"), ("op", "write")]), 0.0);
    let histogram = "blockd_disk_request_duration_seconds";
    let labels = [("disk", "a"), ("op", "read"), ("le", "+Inf")];
    assert_eq!(value(&samples, &format!("{histogram}_bucket"), &labels), 0.0);
    assert_eq!(value(&samples, &format!("{histogram}_count"), &labels[..2]), 0.0);
    assert!(value(&samples, "process_resident_memory_bytes", &[]) > MIB as f64);
    assert!(value(&samples, "process_open_fds", &[]) > 3.0);
    assert!(value(&samples, "process_cpu_seconds_total", &[]) >= 0.0);
    daemon.end();
}

#[test]
fn every_route_of_the_openapi_document_is_there() {
    let bench = Bench::new();
    let daemon = bench.start(&[]);
    let document = daemon.get("/openapi.json");
    assert!(document["openapi"].as_str().is_some_and(|v| v.starts_with("3.")));
    let mut routes = 0;
    for (path, item) in document["paths"].as_object().expect("paths") {
        for method in item.as_object().expect("operations").keys() {
            let path = path.replace("{id}", "none").replace("{job}", "none");
            let (status, answer) = daemon.send(&method.to_uppercase(), &path, "");
            assert!(status != 405 && !answer.contains("openapi.json tells"), "{method} {path}: {answer}");
            routes += 1;
        }
    }
    assert_eq!(routes, 21);
    daemon.end();
}

#[test]
fn attaches_and_detaches_at_the_same_time_leave_one_disk_or_none() {
    let bench = Bench::new();
    let daemon = bench.start(&[]);
    let request = bench.attach("a", &bench.image("a.img", MIB));
    let attached = std::sync::atomic::AtomicI32::new(0);
    std::thread::scope(|scope| {
        for n in 0..8 {
            let (daemon, request, attached): (&Daemon, _, _) = (&daemon, &request, &attached);
            scope.spawn(move || {
                for round in 0..20 {
                    let attach = (n + round) % 2 == 0;
                    let (method, path) =
                        if attach { ("POST", "/v1/disks") } else { ("DELETE", "/v1/disks/a") };
                    let body = if attach { request } else { &NONE };
                    let (status, answer) = daemon.ask(method, path, body);
                    match status {
                        200 => {
                            _ = attached
                                .fetch_add(if attach { 1 } else { -1 }, std::sync::atomic::Ordering::SeqCst)
                        }
                        _ => assert!([404, 409].contains(&status), "{method}: {answer}"),
                    }
                }
            });
        }
    });
    let left = daemon.get("/v1/disks").as_array().expect("disks").len();
    assert_eq!(i32::try_from(left).expect("few"), attached.into_inner());
    daemon.end();
}
