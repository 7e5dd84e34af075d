//! How a daemon begins, ends, and comes back.

mod support;

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::process::Command;

use serde_json::{Value, json};
use support::{Bench, Daemon};

const NONE: Value = Value::Null;
const MIB: u64 = 1 << 20;

#[test]
fn sigterm_ends_cleanly_and_disks_come_back() {
    for signal in ["TERM", "INT"] {
        let bench = Bench::new();
        let mut daemon = bench.start(&[]);
        let mut request = bench.attach("a", &bench.image("a.img", MIB));
        request["queues"] = json!(3);
        request["io_threads"] = json!(2);
        request["read_only"] = json!(true);
        let before = daemon.ok("POST", "/v1/disks", &request);
        daemon.signal(signal);
        assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
        for gone in ["a.sock", "api.sock"] {
            assert!(!bench.path(gone).exists(), "{gone} is left");
        }
        let daemon = bench.start(&[]);
        assert_eq!(daemon.get("/v1/disks"), json!([before]));
        assert!(bench.path("a.sock").exists());
        daemon.end();
    }
}

#[test]
fn disks_come_back_after_sigkill_over_the_sockets_that_are_left() {
    let bench = Bench::new();
    let (a, b) = (bench.image("a.img", MIB), bench.image("b.img", 2 * MIB));
    let mut daemon = bench.start(&["--disk", &bench.disk("a", &a)]);
    daemon.ok("POST", "/v1/disks", &bench.attach("b", &b));
    let before = daemon.get("/v1/disks");
    for _ in 0..5 {
        daemon.kill();
        assert!(bench.path("a.sock").exists() && bench.path("api.sock").exists());
        daemon = bench.start(&[]);
        assert_eq!(daemon.get("/v1/disks"), before);
    }
    daemon.ok("DELETE", "/v1/disks/a", &NONE);
    daemon.kill();
    let daemon = bench.start(&[]);
    assert_eq!(daemon.get("/v1/disks"), json!([before[1]]), "what was detached stays so");
    daemon.end();
}

#[test]
fn a_second_daemon_is_refused_clearly() {
    let bench = Bench::new();
    let daemon = bench.start(&[]);
    let other = bench.text("other.sock");
    let (code, log) = bench.run(&["--api", &other]);
    assert_eq!(code, Some(2), "an option that is given twice is wrong usage: {log}");

    let mut same_state = Command::new(env!("CARGO_BIN_EXE_blockd"));
    same_state.arg("--state-dir").arg(bench.path("state")).args(["--api", &other]);
    let (code, log) = bench.run_command(same_state);
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains(&format!("process {}", daemon.pid())) && log.contains("--state-dir"), "{log}");
    assert!(!bench.path("other.sock").exists());

    let mut same_api = Command::new(env!("CARGO_BIN_EXE_blockd"));
    same_api.arg("--state-dir").arg(bench.path("state2")).arg("--api").arg(bench.path("api.sock"));
    let (code, log) = bench.run_command(same_api);
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("another daemon") && log.contains("--api"), "{log}");

    assert_eq!(daemon.get("/v1/disks"), json!([]), "the first one goes on");
    daemon.end();
}

#[test]
fn an_image_that_another_daemon_serves_is_locked() {
    let (bench, second) = (Bench::new(), Bench::new());
    let image = bench.image("a.img", MIB);
    let first = bench.start(&["--disk", &bench.disk("a", &image)]);
    let other = second.start(&[]);
    let message = other.refused("POST", "/v1/disks", &second.attach("a", &image), 409, "locked");
    assert!(message.contains(&image), "{message}");
    first.end();
    other.ok("POST", "/v1/disks", &second.attach("a", &image));
    other.end();
}

#[test]
fn the_api_socket_is_the_owners_alone_and_never_takes_another_files_place() {
    let bench = Bench::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_blockd"));
    let deep = bench.path("run/blockd/api.sock");
    command.arg("--state-dir").arg(bench.path("state")).arg("--api").arg(&deep);
    let mut child = command.stderr(std::process::Stdio::null()).spawn().expect("spawned");
    support::eventually("the socket in a new folder", || deep.exists());
    let metadata = deep.symlink_metadata().expect("there");
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    let folder = deep.parent().expect("a folder").metadata().expect("there");
    assert_eq!(folder.permissions().mode() & 0o777, 0o700);
    let state = bench.path("state").metadata().expect("there");
    assert_eq!(state.permissions().mode() & 0o777, 0o700);
    child.kill().expect("killed");
    child.wait().expect("waited for");

    std::fs::write(bench.path("api.sock"), "precious").expect("written");
    let (code, log) = bench.run(&[]);
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("no socket"), "{log}");
    assert_eq!(std::fs::read(bench.path("api.sock")).expect("read"), b"precious");
}

#[test]
fn a_damaged_record_is_named_and_the_other_disks_come_up() {
    let bench = Bench::new();
    let (a, b) = (bench.image("a.img", MIB), bench.image("b.img", MIB));
    bench.start(&["--disk", &bench.disk("a", &a), "--disk", &bench.disk("b", &b)]).end();
    let record = bench.path("state/disks/a.json");
    let whole = std::fs::read(&record).expect("read");
    std::fs::write(&record, &whole[..whole.len() / 2]).expect("torn");

    // Even when it is asked for: a move may have put another image in place.
    let daemon = bench.start(&["--disk", &bench.disk("a", &a)]);
    let disks = daemon.get("/v1/disks");
    assert_eq!((&disks[1]["id"], &disks[1]["failed"]), (&json!("b"), &NONE));
    let why = disks[0]["failed"].as_str().expect("a reason");
    assert!(why.contains("a.json") && why.contains("damaged"), "{why}");
    support::eventually("the damage in the log", || daemon.log().contains("a.json"));
    assert!(!bench.path("a.sock").exists());
    daemon.refused("POST", "/v1/disks/a/flush", &NONE, 409, "state");
    daemon.refused("POST", "/v1/moves", &json!({ "disks": ["a"], "to": bench.text("n.img") }), 409, "state");
    daemon.refused("POST", "/v1/disks", &bench.attach("a", &a), 409, "exists");
    daemon.ok("DELETE", "/v1/disks/a", &NONE);
    daemon.ok("POST", "/v1/disks", &bench.attach("a", &a));
    daemon.end();
}

#[test]
fn a_remembered_disk_whose_image_is_away_is_listed_and_can_be_tried_again() {
    let bench = Bench::new();
    let image = bench.image("a.img", MIB);
    bench.start(&["--disk", &bench.disk("a", &image)]).end();
    std::fs::rename(&image, bench.path("elsewhere")).expect("renamed");
    let daemon = bench.start(&["--disk", &bench.disk("a", &image)]);
    let disk = daemon.get("/v1/disks/a");
    assert!(disk["failed"].as_str().is_some_and(|why| why.contains(&image)), "{disk}");
    assert_eq!(disk["image"], json!(image));
    daemon.refused("POST", "/v1/disks", &bench.attach("a", &image), 404, "not-found");
    std::fs::rename(bench.path("elsewhere"), &image).expect("renamed");
    let disk = daemon.ok("POST", "/v1/disks", &bench.attach("a", &image));
    assert_eq!(disk["failed"], NONE);
    daemon.end();
}

#[test]
fn a_disk_that_was_typed_and_cannot_be_served_ends_the_start_and_is_not_remembered() {
    let bench = Bench::new();
    let (good, absent) = (bench.image("good.img", MIB), bench.text("absent.img"));
    let (code, log) = bench.run(&["--disk", &bench.disk("b", &absent), "--disk", &bench.disk("a", &good)]);
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("disk b") && log.contains(&absent), "{log}");
    assert!(!bench.path("api.sock").exists() && !bench.path("a.sock").exists());
    assert!(!bench.path("state/disks/b.json").exists());

    // The configuration file is read by nobody in particular: there the others come up.
    let disks = [("a", &good), ("b", &absent)].map(|(id, image)| {
        format!(
            "[[disk]]\nid = '{id}'\nimage = '{image}'\nsocket = '{}'\n",
            bench.text(&format!("{id}.sock"))
        )
    });
    std::fs::write(bench.path("blockd.toml"), disks.concat()).expect("written");
    let daemon = bench.start(&["--config", &bench.text("blockd.toml")]);
    let disks = daemon.get("/v1/disks");
    assert_eq!((&disks[0]["id"], &disks[0]["failed"]), (&json!("a"), &NONE));
    assert!(disks[1]["failed"].as_str().is_some_and(|why| why.contains(&absent)), "{disks}");
    daemon.end();
}

#[test]
fn the_image_that_a_move_put_in_place_wins_over_the_command_line() {
    let bench = Bench::new();
    let (first, moved) = (bench.image("first.img", MIB), bench.image("moved.img", 2 * MIB));
    bench.start(&["--disk", &bench.disk("a", &first)]).end();
    let path = bench.path("state/disks/a.json");
    let mut record: Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
    record["image"] = json!(moved);
    record["generation"] = json!(1);
    std::fs::write(&path, record.to_string()).expect("written");

    let typed = format!("{},queues=2", bench.disk("a", &first));
    let daemon = bench.start(&["--disk", &typed]);
    let disk = daemon.get("/v1/disks/a");
    assert_eq!((&disk["image"], &disk["queues"]), (&json!(moved), &json!(2)));
    assert_eq!((&disk["size_bytes"], &disk["generation"]), (&json!(2 * MIB), &json!(1)));
    assert!(daemon.log().contains("a move or a snapshot has put another image in place"), "{}", daemon.log());
    daemon.kill();
    let daemon = bench.start(&["--disk", &typed]);
    assert_eq!(daemon.get("/v1/disks/a")["image"], json!(moved), "and so it stays");
    daemon.end();
}

#[test]
fn systemd_is_told_of_readiness_and_of_the_end() {
    let bench = Bench::new();
    let notified = UnixDatagram::bind(bench.path("notify.sock")).expect("bound");
    notified.set_read_timeout(Some(support::PATIENCE)).expect("set");
    let image = bench.image("a.img", MIB);
    let mut command = bench.command(&["--disk", &bench.disk("a", &image)]);
    command.env("NOTIFY_SOCKET", bench.path("notify.sock"));
    let daemon = Daemon::start(&bench, command);
    let mut buffer = [0; 256];
    let mut next = || {
        let n = notified.recv(&mut buffer).expect("a message");
        String::from_utf8(buffer[..n].to_vec()).expect("UTF-8")
    };
    assert!(next().contains("READY=1"));
    daemon.end();
    assert!(next().contains("STOPPING=1"));
}

#[test]
fn the_log_is_text_or_json_as_asked() {
    let bench = Bench::new();
    let image = bench.image("a.img", MIB);
    let daemon = bench.start(&["--log-format", "json", "--disk", &bench.disk("a", &image)]);
    support::eventually("the disk in the log", || daemon.log().contains("is served on"));
    let log = daemon.log();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(lines.iter().any(|line| line["message"] == "ready" && line["level"] == "INFO"), "{log}");
    let told = |line: &Value| line["message"].as_str().is_some_and(|m| m.starts_with("disk-attached: "));
    assert!(lines.iter().any(|line| told(line) && line["disk"] == "a"), "{log}");
    daemon.end();

    let bench = Bench::new();
    let mut command = bench.command(&[]);
    command.env("RUST_LOG", "error");
    let daemon = Daemon::start(&bench, command);
    assert_eq!(daemon.log(), "");
    daemon.end();
}

#[test]
fn usage_is_told_and_wrong_usage_ends_with_2() {
    let output =
        |args: &[&str]| Command::new(env!("CARGO_BIN_EXE_blockd")).args(args).output().expect("it runs");
    let help = output(&["--help"]);
    let text = String::from_utf8(help.stdout).expect("UTF-8");
    assert_eq!(help.status.code(), Some(0));
    for part in ["--state-dir", "--api", "--config", "--disk", "--log-format", "Example:", "/var/lib/blockd"]
    {
        assert!(text.contains(part), "{part} is missing in:\n{text}");
    }
    let version = output(&["--version"]);
    assert_eq!(version.stdout, format!("blockd {}\n", env!("CARGO_PKG_VERSION")).into_bytes());
    for args in [
        &["--disk", "a"][..],
        &["--disk", "a,image=/i,socket=/s,queues=0"],
        &["--frobnicate"],
        &["--config", "/nonexistent.toml"],
        &["positional"],
    ] {
        let wrong = output(args);
        assert_eq!(wrong.status.code(), Some(2), "{args:?}");
        assert!(wrong.stdout.is_empty() && !wrong.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn two_signals_in_a_row_end_it_too() {
    let bench = Bench::new();
    let mut daemon = bench.start(&[]);
    let _open = daemon.follow("/v1/events?follow=true");
    daemon.signal("TERM");
    let _ = Command::new("kill").arg(daemon.pid().to_string()).stderr(std::process::Stdio::null()).status();
    let code = daemon.wait().code();
    assert!(matches!(code, Some(0 | 1)), "{code:?}\n{}", daemon.log());
}
