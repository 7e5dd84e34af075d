//! The whole demo, where a `blockd` is at hand: next to the program, or named in `BLOCKD_BIN`.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{command, names, run};

fn blockd() -> Option<PathBuf> {
    let named = std::env::var_os("BLOCKD_BIN").map(PathBuf::from);
    let beside = Path::new(env!("CARGO_BIN_EXE_blockctl")).with_file_name("blockd");
    let found = named.or_else(|| beside.is_file().then_some(beside));
    if found.is_none() {
        eprintln!("SKIPPED: no blockd at hand; build it (`cargo build -p blockd`) or name it in BLOCKD_BIN");
    }
    found
}

fn demo(blockd: &Path, dir: &Path, args: &[&str]) -> Command {
    let mut command = command();
    command.env("BLOCKD_BIN", blockd).args(["demo", "--json", "--dir"]).arg(dir).args(args);
    command
}

#[test]
fn the_demo_moves_a_disk_live_and_not_a_byte_is_lost() {
    let Some(blockd) = blockd() else { return };
    let dir = tempfile::tempdir().expect("a folder");
    let report = run(&mut demo(&blockd, dir.path(), &["--size", "64M", "--seed", "7"])).expect(0).json();
    assert_eq!(report["ok"], true, "{report:#}");
    assert_eq!(report["mismatches"], 0);
    assert_eq!(report["errors"], 0);
    assert_eq!(report["seed"], 7);
    assert_eq!(report["filled_bytes"], 48 << 20);
    assert_eq!(report["verified_bytes"], 64 << 20);
    assert_eq!(report["move"]["state"], "done");
    assert_eq!(report["source_deleted"], true);
    for moment in ["before", "during", "after"] {
        let guest = &report["guest"][moment];
        assert!(guest["requests"].as_u64() > Some(0), "{guest}");
        assert!(guest["p99_us"].as_f64() >= guest["p50_us"].as_f64(), "{guest}");
    }
    assert!(names(dir.path()).is_empty());
}

#[test]
fn a_demo_that_is_interrupted_leaves_nothing_behind() {
    let Some(blockd) = blockd() else { return };
    let dir = tempfile::tempdir().expect("a folder");
    let child = demo(&blockd, dir.path(), &["--size", "64M"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    let deadline = Instant::now() + Duration::from_secs(60);
    let socket =
        || names(dir.path()).first().is_some_and(|name| dir.path().join(name).join("disk.sock").exists());
    while !socket() {
        assert!(Instant::now() < deadline, "no disk is served");
        std::thread::sleep(Duration::from_millis(10));
    }
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).expect("signalled");
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(names(dir.path()).is_empty(), "{:?}", names(dir.path()));
}
