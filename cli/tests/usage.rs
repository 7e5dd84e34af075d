//! Help, wrong usage, completions and manual pages.

mod support;

use std::path::Path;

use serde_json::json;
use support::{blockctl, names};

fn here(args: &[&str]) -> support::Ended {
    blockctl(Path::new("."), args)
}

#[test]
fn every_command_has_help_with_an_example() {
    for command in [
        "",
        "demo",
        "image",
        "image create",
        "image info",
        "image check",
        "image map",
        "image compare",
        "image convert",
        "disk",
        "disk attach",
        "disk list",
        "disk show",
        "disk detach",
        "disk flush",
        "plan",
        "move",
        "job",
        "job list",
        "job show",
        "job watch",
        "job pause",
        "job resume",
        "job switch",
        "job cancel",
        "job set",
        "job receipt",
        "events",
        "completions",
        "man",
    ] {
        let args: Vec<&str> = command.split_whitespace().chain(["--help"]).collect();
        let help = here(&args).expect(0);
        assert!(help.out.contains("Example"), "`blockctl {command} --help` has no example");
        assert!(help.out.contains(&format!("\n  blockctl {command}")), "`{command}`: {}", help.out);
        assert_eq!(help.err, "");
    }
}

#[test]
fn wrong_usage_ends_with_two() {
    for args in [
        &["nonsense"][..],
        &[],
        &["image", "create", "a.vhdx"],
        &["image", "create", "a.vhdx", "--size", "10X"],
        &["image", "create", "a.vhdx", "--size", "0"],
        &["image", "create", "a.vhdx", "--size", "1G", "--format", "qcow2"],
        &["image", "create", "a.vhdx", "--size", "1G", "--sector-size", "520"],
        &["disk", "attach", "vm1", "a.vhdx"],
        &["disk", "attach", "vm1", "a.vhdx", "--socket", "s", "--queues", "65"],
        &["disk", "show", ""],
        &["move", "vm1"],
        &["move", "vm1", "--to", "x", "--bandwidth", "0"],
        &["move", "vm1", "--to", "x", "--max-guest-p99", "0"],
        &["move", "vm1", "--to", "x", "--max-guest-p99", "5"],
        &["move", "./a.vhdx", "--to", "x", "--max-guest-p99", "5ms"],
        &["move", "vm1", "--to", "x", "--verify", "maybe"],
        &["job", "set", "m1", "--bandwidth", "fast"],
        &["completions", "cmd.exe"],
    ] {
        let refused = here(args).expect(2);
        assert_eq!(refused.out, "", "{args:?}");
        assert_ne!(refused.err, "", "{args:?}");
    }
}

#[test]
fn wrong_usage_is_json_where_that_is_asked_for() {
    let refused = here(&["image", "create", "a.vhdx", "--size", "10X", "--json"]).expect(2);
    let error = &refused.json()["error"];
    assert_eq!(error["kind"], "usage");
    assert!(error["message"].as_str().is_some_and(|m| m.contains("such as 10G")), "{error}");
    let refused =
        here(&["disk", "attach", "a", "b", "--socket", "c", "--io-threads", "2", "--json"]).expect(2);
    assert_eq!(refused.json()["error"]["kind"], "usage");
}

#[test]
fn completions_are_made_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = here(&["completions", shell]).expect(0).out;
        assert!(script.contains("blockctl") && script.contains("convert"), "{shell}");
    }
}

#[test]
fn manual_pages_are_written_for_every_command() {
    let dir = tempfile::tempdir().expect("a folder");
    let made = blockctl(dir.path(), &["man", "pages/man1", "--json"]).expect(0);
    assert_eq!(made.json(), json!({"dir": "pages/man1"}));
    let pages = names(&dir.path().join("pages/man1"));
    for page in ["blockctl.1", "blockctl-image-create.1", "blockctl-move.1", "blockctl-job-receipt.1"] {
        assert!(pages.contains(&page.to_owned()), "{page} is missing in {pages:?}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    use std::process::Stdio;
    let mut child = support::command()
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0));
}

#[test]
fn a_demo_without_a_blockd_says_where_it_looked() {
    let mut command = support::command();
    let missing =
        support::run(command.env("BLOCKD_BIN", "/nowhere/blockd").args(["demo", "--json"])).expect(1);
    assert_eq!(missing.json()["error"]["kind"], "not-found");
    assert!(missing.err.contains("BLOCKD_BIN"), "{}", missing.err);
}

#[test]
fn a_demo_that_is_too_small_or_too_large_is_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().expect("a folder");
    let demo = |size| {
        let mut command = support::command();
        support::run(
            command
                .env("BLOCKD_BIN", "/bin/true")
                .args(["demo", "--json", "--size", size, "--dir"])
                .arg(dir.path()),
        )
    };
    demo("1M").expect(2);
    let large = demo("1P").expect(1);
    assert_eq!(large.json()["error"]["kind"], "no-space");
    assert!(names(dir.path()).is_empty());
}

#[test]
fn a_demo_whose_daemon_does_not_start_says_so_and_leaves_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut command = support::command();
    command
        .env("BLOCKD_BIN", "/bin/false")
        .args(["demo", "--json", "--size", "16M", "--dir"])
        .arg(dir.path());
    let failed = support::run(&mut command).expect(1);
    assert!(failed.err.contains("blockd ended at once"), "{}", failed.err);
    assert!(names(dir.path()).is_empty());
}
