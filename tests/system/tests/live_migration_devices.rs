//! A target whose devices are not what the machine needs: it refuses while the source can still go on.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::path::Path;

use serde_json::json;
use system_tests::PATIENCE;
use system_tests::daemon::DiskSpec;
use system_tests::machine::{Shim, alone, has_kvm};
use system_tests::{Daemon, Image};

const GUEST: &str = "selftest,working-set=8M,rate=50M,depth=16,disk-range=4M,flush-every=32";

/// Disks of the guest.
const DISKS: [&str; 2] = ["first", "second"];

fn daemon(dir: &Path, name: &str, bytes: [u64; 2]) -> Daemon {
    let dir = dir.join(name);
    std::fs::create_dir(&dir).unwrap();
    let disk = |i: usize| DiskSpec::create(&dir, DISKS[i], Image::DynamicVhdx, bytes[i], 1).unwrap();
    let disks = vec![disk(0), disk(1)];
    Daemon::start(&dir, disks).unwrap()
}

/// What is said of the disks, for a process that uses this daemon of each.
fn disks(daemons: [&Daemon; 2]) -> Vec<String> {
    let disk = |i: usize| format!("socket={},serial={}", daemons[i].socket(DISKS[i]).display(), DISKS[i]);
    vec!["--disk".into(), disk(0), "--disk".into(), disk(1)]
}

/// Waits until the guest has written more to every disk.
fn assert_works(shim: &Shim) {
    let done = || {
        let report = shim.report().unwrap();
        assert!(report["mismatches"] == 0 && report["disk_errors"] == 0, "{report}");
        [0, 1].map(|disk: usize| report["disks"][disk]["writes"].as_u64().unwrap_or(0))
    };
    let before = done();
    shim.wait_until("writes to every disk", |_| {
        done().iter().zip(before).all(|(now, was)| *now >= was + 100)
    });
}

#[test]
fn a_disk_that_is_smaller_on_the_target_or_not_there_leaves_the_machine_with_the_source() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let here = daemon(folder.path(), "here", [64 << 20; 2]);
    let mut smaller = daemon(folder.path(), "smaller", [64 << 20, 32 << 20]);
    let mut arguments = vec!["--memory".to_owned(), "32M".into(), "--guest".into(), GUEST.into()];
    arguments.extend(disks([&here, &here]));
    let source = Shim::start(folder.path(), "vm", "run", &arguments).unwrap();
    assert_works(&source);
    let receive = |name: &str, second: &Daemon| {
        let listen = format!("unix:{}", folder.path().join(format!("{name}.sock")).display());
        let mut arguments = vec!["--listen".to_owned(), listen.clone()];
        arguments.extend(disks([&here, second]));
        (Shim::start(folder.path(), name, "receive", &arguments).unwrap(), listen)
    };
    // Also when the pages are to come later: the disks are looked at before a page is missed.
    for (attempt, postcopy) in [(1, false), (2, true), (3, false)] {
        if attempt == 3 {
            smaller.kill9();
        }
        let (target, listen) = receive(&format!("target{attempt}"), &smaller);
        source.send(&json!({ "to": listen, "downtime_ms": 500, "postcopy": postcopy })).unwrap();
        let info = source.wait_migration(PATIENCE).unwrap();
        assert_eq!(info["state"], "failed", "{info}\n{}", target.log());
        let error = info["error"].as_str().unwrap();
        println!("{error}");
        let reason = if attempt == 3 { "is it running" } else { "65536 sectors" };
        assert!(error.contains("second") && error.contains(reason), "{error}");
        assert_eq!(target.state(), "waiting");
        assert_works(&source);
    }
    // And a target that has both is no worse for what happened before.
    let (target, listen) = receive("target4", &here);
    source.send(&json!({ "to": listen, "downtime_ms": 500 })).unwrap();
    let info = source.wait_migration(PATIENCE).unwrap();
    assert_eq!(info["state"], "done", "{info}\n{}\n{}", source.log(), target.log());
    println!("stood still for {} us", info["downtime_us"]);
    target.wait_state("running", PATIENCE).unwrap();
    assert_works(&target);
    target.verify().unwrap();
}
