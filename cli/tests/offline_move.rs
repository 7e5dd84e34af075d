//! `move` of images that no daemon serves.

mod support;

use std::fs::File;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{blockctl, command, names, write_raw};

const MIB: u64 = 1 << 20;

/// A folder with `source` and `target` in it, and a raw image `vm.img` in `source`.
fn stage(size: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    for name in ["source", "target"] {
        std::fs::create_dir(dir.path().join(name)).expect("created");
    }
    write_raw(&dir.path().join("source/vm.img"), size);
    dir
}

fn content(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("read")
}

/// Waits for a file whose name holds `part`.
fn wait_for(folder: &Path, part: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !names(folder).iter().any(|name| name.contains(part)) {
        assert!(Instant::now() < deadline, "no {part} in {:?}", names(folder));
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn end(child: Child) -> (i32, String, String) {
    let output = child.wait_with_output().expect("it ends");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (output.status.code().expect("an exit code"), text(output.stdout), text(output.stderr))
}

#[test]
fn an_image_moves_into_a_folder_under_its_name_and_the_source_is_gone() {
    let dir = stage(64 * MIB);
    let before = content(&dir.path().join("source/vm.img"));
    let done = blockctl(dir.path(), &["move", "source/vm.img", "--to", "target", "--json"]).expect(0).json();
    assert_eq!(done["state"], "done");
    assert_eq!(done["source"][0], "source/vm.img");
    assert_eq!(done["target"][0], "target/vm.img");
    assert_eq!(done["bytes_total"], 64 * MIB);
    assert_eq!(done["bytes_copied"], 192 << 10);
    assert_eq!(done["bytes_skipped_zero"], 64 * MIB - (192 << 10));
    assert_eq!(done["verified"], "full");
    assert_eq!(done["source_deleted"], true);
    assert_eq!(done["error"], serde_json::Value::Null);
    for field in [
        "job",
        "disks",
        "bytes_mirrored",
        "bytes_dirty",
        "rate_bytes_per_s",
        "eta_s",
        "passes",
        "phases",
        "switch",
    ] {
        assert!(done.get(field).is_some(), "{field} is missing");
    }
    assert_eq!(names(&dir.path().join("source")), [""; 0]);
    assert_eq!(names(&dir.path().join("target")), ["vm.img"]);
    assert!(content(&dir.path().join("target/vm.img")) == before);
}

#[test]
fn without_a_terminal_each_phase_is_a_line_and_a_summary_ends_it() {
    let dir = stage(8 * MIB);
    let done = blockctl(dir.path(), &["move", "source/vm.img", "--to", "target"]).expect(0);
    let lines: Vec<&str> = done.out.lines().collect();
    assert!(lines[0].starts_with("source/vm.img (m") && lines[0].ends_with("): copying"), "{}", done.out);
    assert!(lines[1].ends_with("): verifying"), "{}", done.out);
    for part in [
        "from:      source/vm.img",
        "to:        target/vm.img",
        "verified:  full, 8 MiB",
        "source:    deleted",
    ] {
        assert!(done.out.contains(part), "no `{part}` in {}", done.out);
    }
    assert_eq!(done.err, "");
}

#[test]
fn a_move_converts_on_the_way() {
    let dir = stage(16 * MIB);
    std::fs::copy(dir.path().join("source/vm.img"), dir.path().join("same.img")).expect("copied");
    let done =
        blockctl(dir.path(), &["move", "source/vm.img", "--to", "target", "--format", "vhd", "--json"])
            .expect(0);
    assert_eq!(done.json()["target"][0], "target/vm.vhd");
    let info = blockctl(dir.path(), &["image", "info", "target/vm.vhd", "--json"]).expect(0).json();
    assert_eq!((info["format"].as_str(), info["type"].as_str()), (Some("vhd"), Some("dynamic")));
    blockctl(dir.path(), &["image", "compare", "same.img", "target/vm.vhd"]).expect(0);
    // And on to the next format, by the name of the target.
    blockctl(dir.path(), &["move", "target/vm.vhd", "--to", "vm.vhdx"]).expect(0);
    blockctl(dir.path(), &["image", "compare", "same.img", "vm.vhdx"]).expect(0);
    assert!(names(&dir.path().join("target")).is_empty());
}

#[test]
fn the_source_stays_where_that_is_asked_for() {
    for option in ["--keep-source", "--copy-only"] {
        let dir = stage(8 * MIB);
        let args = ["move", "source/vm.img", "--to", "target", option, "--json"];
        let done = blockctl(dir.path(), &args).expect(0).json();
        assert_eq!(done["source_deleted"], false);
        assert_eq!(names(&dir.path().join("source")), ["vm.img"]);
        blockctl(dir.path(), &["image", "compare", "source/vm.img", "target/vm.img"]).expect(0);
    }
}

#[test]
fn every_way_of_verifying_ends_well_on_a_good_disk() {
    for verify in ["none", "sample", "full"] {
        let dir = stage(8 * MIB);
        let args = ["move", "source/vm.img", "--to", "target", "--verify", verify, "--json"];
        let done = blockctl(dir.path(), &args).expect(0).json();
        assert_eq!(done["verified"], verify);
        assert_eq!(done["bytes_verified"].as_u64() == Some(0), verify == "none");
    }
}

#[test]
fn the_target_keeps_the_mode_of_the_source() {
    let dir = stage(8 * MIB);
    let source = dir.path().join("source/vm.img");
    std::fs::set_permissions(&source, std::fs::Permissions::from_mode(0o640)).expect("set");
    blockctl(dir.path(), &["move", "source/vm.img", "--to", "target"]).expect(0);
    let mode = std::fs::metadata(dir.path().join("target/vm.img")).expect("it exists").permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
}

#[test]
fn what_exists_at_the_target_is_not_overwritten() {
    let dir = stage(8 * MIB);
    std::fs::write(dir.path().join("target/vm.img"), "precious").expect("written");
    let refused = blockctl(dir.path(), &["move", "source/vm.img", "--to", "target", "--json"]).expect(1);
    assert_eq!(refused.json()["error"]["kind"], "exists");
    assert_eq!(content(&dir.path().join("target/vm.img")), b"precious");
    assert_eq!(names(&dir.path().join("source")), ["vm.img"]);
    // A link that leads nowhere is something, too.
    std::os::unix::fs::symlink("/nowhere/at/all", dir.path().join("target/link.img")).expect("linked");
    blockctl(dir.path(), &["move", "source/vm.img", "--to", "target/link.img"]).expect(1);
    assert_eq!(names(&dir.path().join("source")), ["vm.img"]);
}

#[test]
fn a_move_onto_itself_is_refused_and_harmless() {
    let dir = stage(8 * MIB);
    for to in ["source", "source/vm.img"] {
        let refused = blockctl(dir.path(), &["move", "source/vm.img", "--to", to, "--json"]).expect(1);
        assert_eq!(refused.json()["error"]["kind"], "exists");
        assert_eq!(names(&dir.path().join("source")), ["vm.img"]);
    }
}

#[test]
fn an_image_that_somebody_has_open_is_not_moved() {
    let dir = stage(8 * MIB);
    let file = File::options().read(true).write(true).open(dir.path().join("source/vm.img")).expect("open");
    let lock = |kind| {
        let whole = nix::libc::flock { l_type: kind, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&whole)).expect("locked");
    };
    for kind in [nix::libc::F_RDLCK, nix::libc::F_WRLCK] {
        lock(kind as nix::libc::c_short);
        let refused = blockctl(dir.path(), &["move", "source/vm.img", "--to", "target", "--json"]).expect(1);
        assert_eq!(refused.json()["error"]["kind"], "locked");
        assert_eq!(names(&dir.path().join("source")), ["vm.img"]);
        assert!(names(&dir.path().join("target")).is_empty());
    }
    // A reader does not stand in the way of a copy.
    lock(nix::libc::F_RDLCK as nix::libc::c_short);
    blockctl(dir.path(), &["move", "source/vm.img", "--to", "target", "--copy-only"]).expect(0);
}

#[test]
fn a_signal_removes_the_unfinished_target_and_keeps_the_source() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let dir = stage(64 * MIB);
        let child = command()
            .current_dir(dir.path())
            .args(["move", "source/vm.img", "--to", "target", "--bandwidth", "16K", "--json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        wait_for(&dir.path().join("target"), ".incomplete-m");
        assert!(!dir.path().join("target/vm.img").exists());
        kill(Pid::from_raw(child.id().cast_signed()), signal).expect("signalled");
        let (code, out, err) = end(child);
        assert_eq!(code, 3, "{out} {err}");
        let said: serde_json::Value = serde_json::from_str(&out).expect("JSON");
        assert_eq!(said["error"]["kind"], "cancelled");
        assert_eq!(names(&dir.path().join("source")), ["vm.img"]);
        assert_eq!(names(&dir.path().join("target")), [""; 0]);
    }
}

#[test]
fn a_killed_move_leaves_a_target_that_can_not_be_mistaken_and_the_next_move_succeeds() {
    let dir = stage(64 * MIB);
    let mut child = command()
        .current_dir(dir.path())
        .args(["move", "source/vm.img", "--to", "target/vm.vhd", "--bandwidth", "16K"])
        .stdout(Stdio::null())
        .spawn()
        .expect("started");
    wait_for(&dir.path().join("target"), ".incomplete-m");
    child.kill().expect("killed");
    child.wait().expect("ended");
    let left = names(&dir.path().join("target"));
    assert!(left.len() == 1 && left[0].starts_with("vm.vhd.incomplete-m"), "{left:?}");
    assert_eq!(names(&dir.path().join("source")), ["vm.img"]);
    let unfinished = format!("target/{}", left[0]);
    let refused =
        blockctl(dir.path(), &["move", &unfinished, "--to", "source/other.vhd", "--json"]).expect(1);
    assert_eq!(refused.json()["error"]["kind"], "state");
    blockctl(dir.path(), &["move", "source/vm.img", "--to", "target/vm.vhd"]).expect(0);
    assert!(names(&dir.path().join("target")).contains(&"vm.vhd".to_owned()));
}

#[test]
fn a_source_that_changes_under_the_move_is_not_deleted() {
    let dir = stage(64 * MIB);
    let child = command()
        .current_dir(dir.path())
        .args([
            "move",
            "source/vm.img",
            "--to",
            "target",
            "--bandwidth",
            "192K",
            "--json",
            "--verify",
            "none",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    wait_for(&dir.path().join("target"), ".incomplete-m");
    // Somebody who knows nothing of locks.
    use std::os::unix::fs::FileExt as _;
    let file = File::options().write(true).open(dir.path().join("source/vm.img")).expect("open");
    file.write_all_at(b"changed", 4 * MIB).expect("written");
    let (code, out, err) = end(child);
    assert_eq!(code, 1, "{out} {err}");
    let said: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(said["error"]["kind"], "busy");
    assert_eq!(names(&dir.path().join("source")), ["vm.img"]);
    assert_eq!(names(&dir.path().join("target")), [""; 0]);
}

#[test]
fn a_link_is_not_moved_in_place_of_what_it_names() {
    let dir = stage(8 * MIB);
    std::os::unix::fs::symlink("source/vm.img", dir.path().join("link.img")).expect("linked");
    let refused = blockctl(dir.path(), &["move", "./link.img", "--to", "target"]).expect(2);
    assert!(refused.err.contains("source/vm.img itself"), "{}", refused.err);
    blockctl(dir.path(), &["move", "./link.img", "--to", "target", "--copy-only"]).expect(0);
    assert_eq!(names(&dir.path().join("source")), ["vm.img"]);
}

#[test]
fn options_for_live_moves_are_wrong_usage_for_a_file() {
    let dir = stage(8 * MIB);
    for option in [
        &["--mirror", "from-start"][..],
        &["--switch", "manual"],
        &["--on-target-error", "abort"],
        &["--detach"],
    ] {
        let refused =
            blockctl(dir.path(), &[&["move", "source/vm.img", "--to", "target"], option].concat()).expect(2);
        assert!(refused.err.contains(option[0]), "{}", refused.err);
    }
    assert_eq!(names(&dir.path().join("source")), ["vm.img"]);
}

#[test]
fn a_folder_that_is_not_there_is_said_so() {
    let dir = stage(8 * MIB);
    for to in ["nowhere/", "nowhere/vm.img"] {
        let refused = blockctl(dir.path(), &["move", "source/vm.img", "--to", to, "--json"]).expect(1);
        assert_eq!(refused.json()["error"]["kind"], "not-found", "{to}");
    }
    let missing = blockctl(dir.path(), &["move", "source/none.img", "--to", "target", "--json"]).expect(1);
    assert_eq!(missing.json()["error"]["kind"], "not-found");
    assert_eq!(names(&dir.path().join("source")), ["vm.img"]);
}

#[test]
fn a_plan_says_what_a_move_would_do_and_does_nothing() {
    let dir = stage(64 * MIB);
    let args = ["plan", "source/vm.img", "--to", "target", "--bandwidth", "192K", "--json"];
    let plan = blockctl(dir.path(), &args).expect(0).json();
    assert_eq!(plan["bytes_to_copy"], 192 << 10);
    assert_eq!(plan["target"], "target/vm.img");
    assert_eq!(plan["fits"], true);
    assert_eq!(plan["ends"], true);
    assert_eq!(plan["seconds"], 2.0);
    assert_eq!(names(&dir.path().join("target")), [""; 0]);
    std::fs::write(dir.path().join("target/vm.img"), "").expect("written");
    let plan = blockctl(dir.path(), &["plan", "source/vm.img", "--to", "target"]).expect(1);
    assert!(plan.out.contains("PROBLEM: target/vm.img exists already"), "{}", plan.out);
}
