//! What may be asked of a machine while something else is being done with it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use system_tests::PATIENCE;
use system_tests::machine::{Shim, alone, has_kvm};

fn start(dir: &Path, guest: &str) -> Shim {
    let arguments = ["--memory", "64M", "--guest", guest].map(str::to_owned);
    Shim::start(dir, "here", "run", &arguments).unwrap()
}

fn receiver(dir: &Path) -> (Shim, Value) {
    let listen = format!("unix:{}", dir.join("m.sock").display());
    let shim = Shim::start(dir, "there", "receive", &["--listen".to_owned(), listen.clone()]).unwrap();
    (shim, json!({ "to": listen, "downtime_ms": 500 }))
}

fn assert_refused(shim: &Shim, path: &str, body: Option<&Value>) {
    let answer = shim.call("POST", path, body);
    assert!(answer.is_err(), "{path}: {answer:?}");
}

/// All of its working set has been written, so that to send it takes long.
fn wait_for_laps(shim: &Shim) {
    shim.wait_until("laps", |shim| shim.report().unwrap()["vcpus"][0]["laps"].as_u64() >= Some(3));
}

/// Nothing that would change where the machine is, or whether it runs.
fn assert_all_refused(shim: &Shim, dir: &Path) {
    let save = json!({ "path": dir.join("not.saved") });
    assert_refused(shim, "/v1/vm/save", Some(&save));
    assert_refused(shim, "/v1/migration", Some(&json!({ "to": "unix:/nowhere" })));
    for verb in ["pause", "resume", "stop"] {
        assert_refused(shim, &format!("/v1/vm/{verb}"), None);
    }
    assert!(!dir.join("not.saved").exists());
}

#[test]
fn while_a_machine_is_sent_nothing_else_is_done_with_it() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let now = start(dir.path(), "selftest,working-set=32M,rate=100M,pattern=random,fill=full");
    wait_for_laps(&now);
    let (next, mut request) = receiver(dir.path());
    request["bandwidth"] = (4 << 20).into();
    now.send(&request).unwrap();
    assert_all_refused(&now, dir.path());
    now.call("POST", "/v1/migration/cancel", None).unwrap();
    assert_eq!(now.wait_migration(PATIENCE).unwrap()["state"], "cancelled");
    // What was refused works at once when that is over.
    now.call("POST", "/v1/vm/pause", None).unwrap();
    assert_eq!(now.state(), "paused");
    // It stays paused where it is sent, and where it stays.
    now.send(&json!({ "to": "unix:/nowhere" })).unwrap();
    assert_eq!(now.wait_migration(PATIENCE).unwrap()["state"], "failed");
    assert_eq!(now.state(), "paused");
    request["bandwidth"] = Value::Null;
    now.send(&request).unwrap();
    assert_eq!(now.wait_migration(PATIENCE).unwrap()["state"], "done");
    next.wait_state("paused", PATIENCE).unwrap();
    let visits = |shim: &Shim| shim.report().unwrap()["vcpus"][0]["visits"].as_u64().unwrap();
    let before = visits(&next);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(visits(&next), before);
    next.call("POST", "/v1/vm/resume", None).unwrap();
    // It rests once it has verified everything.
    next.wait_until("the guest to go on", |next| visits(next) > before);
    next.verify().unwrap();
}

#[test]
fn a_machine_whose_pages_are_still_on_their_way_is_only_looked_at() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let now = start(dir.path(), "selftest,working-set=48M,rate=0,pattern=random,fill=full");
    wait_for_laps(&now);
    now.call("POST", "/v1/guest", Some(&json!({ "rate": 20_u64 << 20 }))).unwrap();
    let (next, mut request) = receiver(dir.path());
    request["bandwidth"] = (8 << 20).into();
    request["postcopy"] = true.into();
    now.send(&request).unwrap();
    next.wait_state("running", PATIENCE).unwrap();
    let file = json!({ "path": dir.path().join("not.saved") });
    let (saved, info) = (next.call("POST", "/v1/vm/save", Some(&file)), next.migration().unwrap());
    assert_eq!(info["state"], "arriving", "nothing was asked in time");
    assert!(saved.unwrap_err().to_string().contains("last pages"), "{info}");
    assert_refused(&next, "/v1/vm/pause", None);
    assert_eq!(now.wait_migration(PATIENCE).unwrap()["state"], "done");
    next.wait_until("the last pages", |next| next.migration().unwrap()["state"] == "arrived");
    next.verify().unwrap();
    next.call("POST", "/v1/vm/pause", None).unwrap();
    next.call("POST", "/v1/vm/resume", None).unwrap();
    next.verify().unwrap();
}

#[test]
fn a_machine_that_was_paused_stays_so_whether_it_can_be_saved_or_not() {
    if !has_kvm() {
        return;
    }
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let mut now = start(dir.path(), "selftest,working-set=16M,rate=50M");
    now.call("POST", "/v1/vm/pause", None).unwrap();
    let nowhere = json!({ "path": dir.path().join("no/where") });
    assert_refused(&now, "/v1/vm/save", Some(&nowhere));
    assert_eq!(now.state(), "paused");
    let file = dir.path().join("vm.saved");
    now.call("POST", "/v1/vm/save", Some(&json!({ "path": file }))).unwrap();
    assert!(now.wait_end().unwrap().success(), "{}", now.log());
    let again = Shim::start(dir.path(), "again", "restore", &[file.display().to_string()]).unwrap();
    again.wait_state("paused", PATIENCE).unwrap();
    again.call("POST", "/v1/vm/resume", None).unwrap();
    again.verify().unwrap();
    assert!(!file.exists());
}
