//! The benchmark itself, on a disk so small that it says nothing about speed: does it run, and is the data right?

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn a_small_move_is_measured_and_leaves_nothing_behind() {
    if let Err(error) = system_tests::daemon::binary("blockd", "BLOCKD_BIN") {
        println!("SKIPPED: {error:#}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let json = tempfile::NamedTempFile::new().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_blockd-bench"))
        .args(["move", "--size", "32M", "--rate", "1000", "--before", "1", "--after", "1", "--from", "raw"])
        .args(["--to", "vhd", "--patience", "20", "--dir"])
        .arg(dir.path())
        .arg("--json")
        .arg(json.path())
        .output()
        .unwrap();
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{complained}");
    println!("{said}");

    let results: serde_json::Value = serde_json::from_slice(&std::fs::read(json.path()).unwrap()).unwrap();
    let moved = &results["comparisons"][0]["blockd"];
    assert_eq!(moved["faults"].as_array().unwrap().len(), 0);
    assert_eq!(moved["told"]["source_deleted"], true);
    let phases = moved["phases"].as_array().unwrap();
    let names: Vec<_> = phases.iter().map(|phase| phase["phase"].as_str().unwrap()).collect();
    assert_eq!(names.first(), Some(&"before"));
    assert_eq!(names.last(), Some(&"after"));
    assert!(names.contains(&"copying") && names.contains(&"switch"), "{names:?}");
    assert!(phases.iter().map(|phase| phase["requests"].as_u64().unwrap()).sum::<u64>() > 1000);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "something was left behind");
}

#[expect(clippy::unwrap_used, reason = "what fails here fails the test")]
/// Runs a question with a folder of its own and returns its figures; `None` where blockd is not built.
fn ask(arguments: &[&str]) -> Option<serde_json::Value> {
    if let Err(error) = system_tests::daemon::binary("blockd", "BLOCKD_BIN") {
        println!("SKIPPED: {error:#}");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let json = tempfile::NamedTempFile::new().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_blockd-bench"))
        .args(arguments)
        .arg("--dir")
        .arg(dir.path())
        .arg("--json")
        .arg(json.path())
        .output()
        .unwrap();
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{complained}");
    println!("{said}");
    assert_eq!(walk(dir.path()), Vec::<PathBuf>::new(), "something was left behind");
    let results: serde_json::Value = serde_json::from_slice(&std::fs::read(json.path()).unwrap()).unwrap();
    Some(results["findings"][0].clone())
}

#[test]
fn serving_is_measured_for_every_format_whoever_else_is_installed() {
    let arguments =
        ["serve", "--disk-size", "16M", "--rounds", "1", "--seconds", "0.2", "--pattern", "depth 32, poll"];
    let Some(finding) = ask(&arguments) else { return };
    let figures = finding["figures"].as_array().unwrap();
    assert_eq!(figures.len(), 2, "random reads and writes");
    for set in figures {
        let contenders = set["contenders"].as_array().unwrap();
        let ours: Vec<_> = contenders.iter().filter(|line| line["who"] == "blockd").collect();
        let formats: Vec<_> = ours.iter().map(|line| line["format"].as_str().unwrap()).collect();
        assert_eq!(formats, ["raw", "vhdx", "vhd"]);
        for line in ours {
            let round = &line["rounds"][0];
            assert!(round["requests"].as_u64().unwrap() > 100, "{round}");
            assert!(round["cpu_s"].as_f64().unwrap() > 0.0, "{round}");
            let [p50, p99, max] = [0, 1, 2].map(|index| round["latency_us"][index].as_f64().unwrap());
            assert!(0.0 < p50 && p50 <= p99 && p99 <= max, "{round}");
        }
    }
    let goals = finding["goals"].as_array().unwrap();
    assert!(goals.iter().any(|goal| goal["what"] == "requests/s, vhdx ÷ raw"), "{goals:?}");
}

#[test]
fn first_writes_are_measured_and_checked() {
    let arguments =
        ["first-writes", "--sequential", "16M", "--scattered", "2M", "--rounds", "1", "--rival", "none"];
    let Some(finding) = ask(&arguments) else { return };
    let cases = finding["figures"].as_array().unwrap();
    assert_eq!(cases.len(), 8);
    for case in cases {
        let trial = &case["blockd"][0];
        let bytes = if case["case"].as_str().unwrap().contains("random") { 2 << 20 } else { 16 << 20 };
        let block = if case["case"].as_str().unwrap().contains("random") { 4 << 10 } else { 128 << 10 };
        assert_eq!(trial["writes"], bytes / block, "{case}");
        assert!(trial["flushes"].as_u64().unwrap() > 0, "{case}");
    }
}

#[test]
fn switches_to_and_fro_are_counted_one_by_one() {
    let arguments = ["switch", "--count", "6", "--switch-size", "4M", "--switch-pair", "raw:vhdx"];
    let Some(finding) = ask(&arguments) else { return };
    let switches = finding["figures"][0]["switches"].as_array().unwrap().clone();
    assert_eq!(switches.len(), 6);
    for one in switches {
        let us = |name: &str| one[name].as_f64().unwrap();
        assert!(us("committed_us") > 0.0 && us("committed_us") <= us("done_us"), "{one}");
    }
}

#[test]
fn scale_is_measured_with_all_its_parts() {
    let small = ["scale", "--disks", "2", "--queues", "2", "--moves", "2", "--move-size", "4M"];
    let smaller = ["--idle-disks", "2", "--places", "50", "--rounds", "1", "--seconds", "0.1"];
    let Some(finding) = ask(&[&small[..], &smaller[..]].concat()) else { return };
    let figures = finding["figures"].as_object().unwrap();
    assert_eq!(figures["disks"].as_array().unwrap().len(), 2);
    assert_eq!(figures["moves at once"][0]["seconds"].as_array().unwrap().len(), 2);
}

#[test]
fn copies_are_measured_and_are_what_was_copied() {
    if let Err(error) = system_tests::daemon::binary("blockctl", "BLOCKCTL_BIN") {
        println!("SKIPPED: {error:#}");
        return;
    }
    let Some(finding) = ask(&["copy", "--size", "32M", "--thin", "16M", "--rounds", "1"]) else { return };
    let full = finding["figures"]["full"].as_array().unwrap();
    for who in ["offline", "live", "live-verified"] {
        let line = full.iter().find(|line| line["who"] == who).unwrap();
        let round = &line["rounds"][0];
        assert!(round["seconds"].as_f64().unwrap() > 0.0 && round["cpu_s"].as_f64().unwrap() > 0.0, "{line}");
        assert!(who == "offline" || round["equal_s"].as_f64() <= round["seconds"].as_f64(), "{line}");
    }
    for thin in ["thin_small", "thin_large"] {
        assert!(finding["figures"][thin][0]["seconds"].as_f64().unwrap() > 0.0, "{finding}");
    }
}

/// Whether `kvm-shim` is built and can run machines here.
fn can_run_machines() -> bool {
    if let Err(error) = system_tests::daemon::binary("kvm-shim", "KVM_SHIM") {
        println!("SKIPPED: {error:#}");
        return false;
    }
    system_tests::machine::has_kvm()
}

#[test]
fn machines_that_move_are_measured_and_verified() {
    if !can_run_machines() {
        return;
    }
    let arguments =
        ["migrate", "--quick", "--small", "32M", "--large", "32M", "--moves", "2", "--case-seconds", "1"];
    let Some(finding) = ask(&arguments) else { return };
    let figures = finding["figures"].as_object().unwrap();
    let rates = figures["copy rate"].as_array().unwrap();
    let wires: Vec<_> = rates.iter().filter(|line| line["wire"] != "iperf3").collect();
    assert_eq!(wires.len(), 9, "three wires with three numbers of connections");
    for line in wires {
        assert!(line["gib_per_s"][0].as_f64().unwrap() > 0.0, "{line}");
    }
    let downtime = figures["downtime"].as_array().unwrap();
    assert_eq!(downtime.len(), 12, "two sizes, four rates, the small one with and without a disk");
    let idle = downtime.iter().find(|case| case["case"] == "32 MiB, idle").unwrap();
    assert!(idle["downtime_ms"][0].as_f64().unwrap() > 0.0, "{idle}");
    for case in figures["logging"].as_array().unwrap() {
        let visits = case["rounds"][0]["visits_per_s"].as_array().unwrap();
        assert!(visits.len() == 3 && visits.iter().all(|rate| rate.as_f64().unwrap() > 0.0), "{case}");
    }
    assert_eq!(figures["compression"].as_array().unwrap().len(), 6);
    assert_eq!(figures["postcopy"].as_array().unwrap().len(), 2);
}

#[test]
fn a_machine_that_cannot_be_made_is_refused_with_a_way_out() {
    if !can_run_machines() {
        return;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_blockd-bench"))
        .args(["migrate", "--large", "17M"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(complained.contains("--large") && complained.contains("multiple of 2M"), "{complained}");
}

#[test]
fn a_disk_that_does_not_fit_is_refused_with_a_way_out() {
    if system_tests::daemon::binary("blockd", "BLOCKD_BIN").is_err() {
        println!("SKIPPED: blockd is not built");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_blockd-bench"))
        .args(["move", "--size", "2000G", "--rival", "none", "--dir"])
        .arg(dir.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(complained.contains("--dir") && complained.contains("--size"), "{complained}");
}

#[test]
fn a_signal_ends_the_run_and_nothing_is_left_behind() {
    if system_tests::daemon::binary("blockd", "BLOCKD_BIN").is_err() {
        println!("SKIPPED: blockd is not built");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Command::new(env!("CARGO_BIN_EXE_blockd-bench"))
        .args(["move", "--size", "32M", "--from", "raw", "--to", "raw", "--rival", "none", "--before", "600"])
        .arg("--dir")
        .arg(dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    let made = || walk(dir.path()).iter().any(|path| path.ends_with("disk.sock"));
    while !made() {
        assert!(Instant::now() < until, "blockd was not started within a minute");
        assert!(bench.try_wait().unwrap().is_none(), "the benchmark ended by itself");
        std::thread::sleep(Duration::from_millis(20));
    }
    let pid = Pid::from_raw(i32::try_from(bench.id()).unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    assert_eq!(bench.wait().unwrap().code(), Some(1));
    assert_eq!(walk(dir.path()), Vec::<PathBuf>::new());
}

#[test]
fn data_that_changes_behind_the_guests_back_is_noticed() {
    if system_tests::daemon::binary("blockd", "BLOCKD_BIN").is_err() {
        println!("SKIPPED: blockd is not built");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Command::new(env!("CARGO_BIN_EXE_blockd-bench"))
        .args(["move", "--size", "32M", "--from", "raw", "--to", "raw", "--rival", "none", "--rate", "200"])
        .args(["--before", "4", "--after", "0", "--dir"])
        .arg(dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(bench.stderr.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap().contains("blockd moves")), "it ended before it moved anything");
    let source = walk(dir.path()).into_iter().find(|path| path.ends_with("source.raw")).unwrap();
    let file = File::options().write(true).open(source).unwrap();
    file.write_all_at(&[0x55; 1 << 20], 8 << 20).unwrap();
    file.sync_all().unwrap();

    let output = bench.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let report = String::from_utf8_lossy(&output.stdout);
    assert!(report.contains("WRONG") && report.contains("Foreign"), "{report}");
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}
