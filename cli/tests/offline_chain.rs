//! `move` and `plan` of chains that no daemon serves.

mod support;

use std::fs::File;
use std::os::unix::fs::{FileExt as _, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use formats::{Format, OpenOptions, format_by_name};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use support::{Ended, blockctl, command, names};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// What an image reads as.
type Model = Vec<u8>;

/// A folder with a chain in `source`: `top` on `mid` on `base`, and the empty folders `target` and `other`.
struct Stage {
    dir: tempfile::TempDir,
    format: &'static str,
    /// What `base`, `mid` and `top` read as.
    models: [Model; 3],
}

const NAMES: [&str; 3] = ["base", "mid", "top"];

impl Stage {
    fn new(format: &'static str) -> Self {
        Self::with(format, [8 * MIB, 8 * MIB, 12 * MIB])
    }

    fn with(format: &'static str, sizes: [u64; 3]) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        for name in ["source", "target", "other"] {
            std::fs::create_dir(dir.path().join(name)).expect("created");
        }
        let (mut models, mut model) = ([const { Model::new() }; 3], Model::new());
        for (level, name) in NAMES.into_iter().enumerate() {
            let path = format!("source/{name}.{format}");
            let size = sizes[level].to_string();
            let parent = format!("source/{}.{format}", NAMES[level.saturating_sub(1)]);
            let mut args = vec!["image", "create", &path, "--size", &size, "--block-size", "1M"];
            if level > 0 {
                args.extend(["--parent", &parent]);
            }
            blockctl(dir.path(), &args).expect(0);
            model.resize(sizes[level] as usize, 0);
            fill(&dir.path().join(&path), level as u64, &mut model);
            models[level].clone_from(&model);
        }
        Self { dir, format, models }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn at(&self, place: &str) -> PathBuf {
        self.path().join(place)
    }

    /// Runs `blockctl` with these words, in which `F` as an ending stands for the format.
    fn run(&self, line: &str) -> Ended {
        let line = line.replace(".F", &format!(".{}", self.format));
        blockctl(self.path(), &line.split_whitespace().collect::<Vec<_>>())
    }

    fn start(&self, line: &str) -> Child {
        let line = line.replace(".F", &format!(".{}", self.format));
        command()
            .current_dir(self.path())
            .args(line.split_whitespace())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started")
    }

    fn files(&self, folder: &str) -> Vec<String> {
        names(&self.at(folder))
    }

    fn source_names(&self) -> Vec<String> {
        NAMES.iter().map(|name| format!("{name}.{}", self.format)).collect()
    }

    /// The source is there as it was, and sound.
    #[track_caller]
    fn expect_source(&self) {
        for (level, name) in NAMES.iter().enumerate() {
            let path = format!("source/{name}.{}", self.format);
            assert!(self.reads(&path, &["source"]) == self.models[level], "{path} has another content");
        }
    }

    /// What the image at `path` reads as, its parents found in these folders.
    #[track_caller]
    fn reads(&self, path: &str, parents: &[&str]) -> Model {
        let parents = parents.iter().map(|parent| self.at(parent)).collect();
        let options = OpenOptions { parents, ..OpenOptions::read_only() };
        let image = formats::open(self.at(path), &options).expect("it opens");
        let mut content = vec![0; image.geometry().virtual_size as usize];
        formats::read_payload(&*image, 0, &mut content).expect("read");
        content
    }

    /// The images at these paths, base first, read as they should, and are sound.
    #[track_caller]
    fn expect_target(&self, paths: [&str; 3], parents: &[&str]) {
        for (level, path) in paths.into_iter().enumerate() {
            assert!(self.reads(path, parents) == self.models[level], "{path} has another content");
            let mut args = vec!["image", "check", path];
            parents.iter().filter(|_| level > 0).for_each(|parent| args.extend(["--parents", parent]));
            blockctl(self.path(), &args).expect(0);
        }
    }
}

/// Writes to the image at `path`, and to the model of what it reads as.
fn fill(path: &Path, level: u64, model: &mut Model) {
    let parents = vec![path.parent().expect("a folder").to_owned()];
    let image = formats::open(path, &OpenOptions { parents, ..OpenOptions::default() }).expect("it opens");
    let end = model.len() as u64;
    let spots = [
        (0, 3 * 512),
        (MIB + 512 * level, 4608),
        (if level == 0 { 4 * MIB } else { 7 * MIB }, MIB >> (3 * level)),
        (5 * MIB + level * 300 * KIB, 600 * KIB),
    ];
    for (at, len) in spots.into_iter().chain([(end - 512 * (level + 1), 512)]) {
        let data: Vec<u8> = (0..len).map(|i| (i / 7 + at + level * 41) as u8 | 1).collect();
        formats::write_payload(&*image, at, &data).expect("written");
        model[at as usize..(at + len) as usize].copy_from_slice(&data);
    }
    if level > 0 {
        // Zeroes that hide what the parent has: less than a sector's run, and a whole block.
        for (at, len) in [(512, 512), (4 * MIB, MIB / 2 * level)] {
            formats::zero_payload(&*image, at, len).expect("zeroed");
            model[at as usize..(at + len) as usize].fill(0);
        }
    }
    image.close().expect("closed");
}

fn end(child: Child) -> (Option<i32>, String, String) {
    let output = child.wait_with_output().expect("it ends");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn wait_for(folder: &Path, part: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !names(folder).iter().any(|name| name.contains(part)) {
        assert!(Instant::now() < deadline, "no {part} in {:?}", names(folder));
        std::thread::sleep(Duration::from_millis(5));
    }
}

const MOVE: &str = "move source/top.F --to target --parents source";

#[test]
fn a_chain_moves_with_all_its_images() {
    for format in ["vhd", "vhdx"] {
        let stage = Stage::new(format);
        for (name, mode) in [("base", 0o440), ("mid", 0o640), ("top", 0o600)] {
            let file = stage.at(&format!("source/{name}.{format}"));
            std::fs::set_permissions(file, PermissionsExt::from_mode(mode)).expect("set");
        }
        let done = stage.run(&format!("{MOVE} --json")).expect(0).json();
        let all =
            |folder: &str| json!(["top", "mid", "base"].map(|name| format!("{folder}/{name}.{format}")));
        let source = done["source"].as_array().expect("a list");
        assert_eq!((source.len(), &source[0]), (3, &json!(format!("source/top.{format}"))), "{done}");
        assert!(source[2].as_str().expect("text").ends_with(&format!("source/base.{format}")), "{done}");
        assert_eq!(done["target"], all("target"));
        assert_eq!((&done["state"], &done["verified"]), (&json!("done"), &json!("full")));
        assert_eq!(done["source_deleted"], true);
        assert_eq!(done["bytes_total"], 28 * MIB);
        assert!(done["bytes_copied"].as_u64().expect("a number") < 3 * MIB, "only what each has of its own");
        assert_eq!(stage.files("source"), [""; 0]);
        assert_eq!(stage.files("target"), stage.source_names());
        let at = |name: &str| format!("target/{name}.{format}");
        stage.expect_target([&at("base"), &at("mid"), &at("top")], &["target"]);
        for (name, mode) in [("base", 0o440), ("mid", 0o640), ("top", 0o600)] {
            let now = std::fs::metadata(stage.at(&at(name))).expect("it is there").permissions().mode();
            assert_eq!(now & 0o777, mode, "{name}");
        }
    }
}

#[test]
fn each_layer_holds_no_more_than_its_source_did() {
    let stage = Stage::new("vhdx");
    let own = |folder: &str, name: &str| {
        let path = stage.at(&format!("{folder}/{name}.vhdx"));
        let options = OpenOptions { parents: vec![stage.at(folder)], ..OpenOptions::read_only() };
        let image = formats::open(path, &options).expect("it opens");
        let layer = image.as_chain().map_or(image.clone(), |chain| chain.layers()[0].clone());
        let (mut at, mut found) = (0, Vec::new());
        while let Some(extent) = layer.next_extent(at).expect("an extent") {
            at += extent.span.len;
            if extent.state != formats::AllocState::Absent {
                found.push((extent.span.offset, extent.span.len));
            }
        }
        found.iter().map(|(_, len)| len).sum::<u64>()
    };
    let before = NAMES.map(|name| own("source", name));
    stage.run(MOVE).expect(0);
    let after = NAMES.map(|name| own("target", name));
    assert!(after[1] <= before[1] && after[2] <= before[2], "{before:?} {after:?}");
}

#[test]
fn a_chain_is_converted_on_the_way_and_back() {
    let stage = Stage::new("vhd");
    let done = stage.run(&format!("{MOVE} --format vhdx --block-size 2M --json")).expect(0).json();
    assert_eq!(done["target"], json!(["target/top.vhdx", "target/mid.vhdx", "target/base.vhdx"]));
    stage.expect_target(["target/base.vhdx", "target/mid.vhdx", "target/top.vhdx"], &["target"]);
    for name in NAMES {
        let info = stage.run(&format!("image info target/{name}.vhdx --json")).expect(0).json();
        assert_eq!((&info["format"], &info["block_size"]), (&json!("vhdx"), &json!(2 * MIB)));
        assert_eq!(info["type"], if name == "base" { "dynamic" } else { "differencing" });
    }
    let line = "move target/top.vhdx --to other --parents target --format vhd --type fixed --json";
    stage.run(line).expect(0);
    stage.expect_target(["other/base.vhd", "other/mid.vhd", "other/top.vhd"], &["other"]);
    let info = stage.run("image info other/base.vhd --json").expect(0).json();
    assert_eq!(info["type"], "fixed");
    assert_eq!((stage.files("source").len(), stage.files("target").len()), (0, 0));
}

#[test]
fn a_disk_with_large_sectors_becomes_no_vhd() {
    let stage = Stage::new("vhdx");
    stage.run("image create source/big.vhdx --size 8M --sector-size 4096").expect(0);
    stage.run("image create source/child.vhdx --parent source/big.vhdx").expect(0);
    let line = "move source/child.vhdx --to target --parents source --format vhd --json";
    let refused = stage.run(line).expect(1);
    assert_eq!(refused.json()["error"]["kind"], "invalid");
    assert!(refused.err.contains("4096"), "{}", refused.err);
    assert_eq!(stage.files("target"), [""; 0]);
    stage.run("move source/child.vhdx --to target --parents source").expect(0);
    assert_eq!(stage.files("target"), ["big.vhdx", "child.vhdx"]);
}

#[test]
fn files_go_where_they_are_told_and_find_each_other() {
    let stage = Stage::new("vhdx");
    std::fs::create_dir(stage.at("target/deep")).expect("created");
    stage
        .run(&format!(
            "{MOVE} --disk source/base.F=other --disk source/top.F=target/deep/new.vhdx --disk source/mid.F=other/m.F"
        ))
        .expect(0);
    assert_eq!(stage.files("other"), ["base.vhdx", "m.vhdx"]);
    assert_eq!((stage.files("source").len(), stage.files("target")), (0, vec!["deep".to_owned()]));
    stage.expect_target(["other/base.vhdx", "other/m.vhdx", "target/deep/new.vhdx"], &["other"]);
    // By the relative path, from a folder that holds all.
    assert!(stage.reads("target/deep/new.vhdx", &["."]) == stage.models[2]);
}

#[test]
fn a_base_that_is_shared_stays() {
    for format in ["vhd", "vhdx"] {
        let stage = Stage::new(format);
        let done = stage.run(&format!("{MOVE} --disk source/base.F=source/base.F --json")).expect(0).json();
        assert_eq!(done["source"].as_array().map(Vec::len), Some(2), "{done}");
        assert_eq!(done["target"].as_array().map(Vec::len), Some(3), "{done}");
        assert_eq!((&done["source_deleted"], &done["bytes_total"]), (&json!(true), &json!(20 * MIB)));
        assert_eq!(stage.files("source"), [format!("base.{format}")]);
        let at = |place: &str| format!("{place}.{format}");
        let paths = [&at("source/base")[..], &at("target/mid"), &at("target/top")];
        stage.expect_target(paths, &["source", "target"]);
        // And on: only the newest leaves its parents.
        let line = "move target/top.F --to other --parents source --parents target \
                    --disk target/mid.F=target/mid.F --disk source/base.F=source/base.F";
        stage.run(line).expect(0);
        assert_eq!(stage.files("target"), [format!("mid.{format}")]);
        stage.expect_target([paths[0], paths[1], &at("other/top")], &["source", "target"]);
    }
}

#[test]
fn what_does_not_go_together_is_wrong_usage_and_changes_nothing() {
    let stage = Stage::new("vhdx");
    stage.run("image create source/one.vhdx --size 8M").expect(0);
    let line = "source/top.vhdx --parents source";
    for (more, why) in [
        ("--to target --disk source/mid.vhdx=source/mid.vhdx", "has to stay too"),
        ("--to target --disk source/base.vhdx=target/top.vhdx", "would both become"),
        ("--to target --disk source/one.vhdx=other", "is no image of the chain"),
        ("--to target --disk source/mid.vhdx=other --disk source/mid.vhdx=target", "two places"),
        ("--to target/new.vhdx", "name an existing folder"),
        ("--to target --format raw", "--flatten"),
        ("--to target/new.raw", "--flatten"),
        ("--to target --format vhd --disk source/base.vhdx=source/base.vhdx", "can't stay a vhdx image"),
        ("--to target --flatten --disk source/mid.vhdx=other", "one new image"),
        ("--to target --disk source/mid.vhdx=other/mid.vhd", "--format vhd"),
    ] {
        for verb in ["move", "plan"] {
            let refused = stage.run(&format!("{verb} {line} {more}")).expect(2);
            assert!(refused.err.contains(why), "{more}: {}", refused.err);
        }
    }
    let refused = stage.run("move source/one.vhdx --to target --disk source/one.vhdx=other").expect(2);
    assert!(refused.err.contains("is one image"), "{}", refused.err);
    let refused = stage.run(&format!("move {line} --to nowhere/ --json")).expect(1);
    assert_eq!(refused.json()["error"]["kind"], "not-found");
    let refused = stage.run(&format!("move {line} --to source --json")).expect(1);
    assert_eq!(refused.json()["error"]["kind"], "exists");
    let refused = stage.run("move source/top.vhdx --to target").expect(1);
    assert!(refused.err.contains("--parents"), "{}", refused.err);
    std::fs::write(stage.at("target/mid.vhdx"), "precious").expect("written");
    let refused = stage.run(&format!("{MOVE} --json")).expect(1);
    assert_eq!(refused.json()["error"]["kind"], "exists");
    assert_eq!(std::fs::read(stage.at("target/mid.vhdx")).expect("read"), b"precious");
    assert_eq!(stage.files("target"), ["mid.vhdx"]);
    assert_eq!(stage.files("source").len(), 4);
    stage.expect_source();
}

#[test]
fn a_chain_can_become_one_image_and_its_parents_stay() {
    for (format, target) in [("vhd", "flat.vhdx"), ("vhdx", "flat.vhd"), ("vhdx", "flat.raw")] {
        let stage = Stage::new(format);
        let line = format!("move source/top.F --to target/{target} --parents source --flatten --json");
        let done = stage.run(&line).expect(0).json();
        assert_eq!(done["source"], json!([format!("source/top.{format}")]));
        assert_eq!(done["source_deleted"], true);
        assert_eq!(stage.files("source"), stage.source_names()[..2]);
        assert_eq!(stage.files("target"), [target]);
        assert!(stage.reads(&format!("target/{target}"), &[]) == stage.models[2]);
        let info = stage.run(&format!("image info target/{target} --json")).expect(0).json();
        assert_eq!(info["type"], if target.ends_with("raw") { "fixed" } else { "dynamic" });
    }
}

/// Locks the file as somebody who reads it, or writes to it.
fn lock(path: &Path, kind: nix::libc::c_int) -> File {
    let file = File::options().read(true).write(true).open(path).expect("open");
    let whole = nix::libc::flock { l_type: kind as _, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
    // A process that another test is just starting has a copy of whatever was open here, and of its lock, for a moment.
    for attempt in 0.. {
        match nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&whole)) {
            Err(nix::errno::Errno::EAGAIN) if attempt < 200 => {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            done => {
                done.expect("locked");
                break;
            }
        }
    }
    file
}

#[test]
fn a_parent_that_somebody_reads_stays_with_all_below_it() {
    for name in ["base", "mid"] {
        let stage = Stage::new("vhdx");
        let reader = lock(&stage.at(&format!("source/{name}.vhdx")), nix::libc::F_RDLCK);
        let done = stage.run(&format!("{MOVE} --json")).expect(0);
        assert_eq!(done.json()["source_deleted"], false);
        assert!(done.err.contains(&format!("{name}.vhdx is not deleted: another program")), "{}", done.err);
        assert_eq!(done.err.lines().count(), if name == "base" { 1 } else { 2 }, "{}", done.err);
        let left = if name == "base" { vec!["base.vhdx"] } else { vec!["base.vhdx", "mid.vhdx"] };
        assert_eq!(stage.files("source"), left);
        drop(reader);
        assert!(stage.reads(&format!("source/{name}.vhdx"), &["source"]) == stage.models[left.len() - 1]);
        stage.expect_target(["target/base.vhdx", "target/mid.vhdx", "target/top.vhdx"], &["target"]);
    }
}

#[test]
fn a_parent_with_another_name_stays_with_all_below_it() {
    let stage = Stage::new("vhd");
    std::fs::hard_link(stage.at("source/mid.vhd"), stage.at("other/alias.vhd")).expect("linked");
    let done = stage.run(MOVE).expect(0);
    assert!(done.err.contains("mid.vhd is not deleted: it has 2 names"), "{}", done.err);
    assert!(done.err.contains("base.vhd is not deleted: its child"), "{}", done.err);
    assert_eq!(stage.files("source"), ["base.vhd", "mid.vhd"]);
    assert!(stage.reads("other/alias.vhd", &["source"]) == stage.models[1]);
    stage.expect_target(["target/base.vhd", "target/mid.vhd", "target/top.vhd"], &["target"]);
}

#[test]
fn a_chain_that_somebody_writes_to_is_not_moved() {
    for name in NAMES {
        let stage = Stage::new("vhdx");
        let writer = lock(&stage.at(&format!("source/{name}.vhdx")), nix::libc::F_WRLCK);
        for more in ["", "--copy-only", "--flatten"] {
            let refused = stage.run(&format!("{MOVE} {more} --json")).expect(1);
            assert_eq!(refused.json()["error"]["kind"], "locked", "{name} {more}");
        }
        drop(writer);
        assert_eq!(stage.files("target"), [""; 0]);
        stage.expect_source();
    }
}

#[test]
fn a_copy_leaves_the_source_even_while_others_read_it() {
    for option in ["--copy-only", "--keep-source"] {
        let stage = Stage::new("vhdx");
        let _readers = NAMES.map(|name| lock(&stage.at(&format!("source/{name}.vhdx")), nix::libc::F_RDLCK));
        let done = stage.run(&format!("{MOVE} {option} --json --verify sample")).expect(0).json();
        assert_eq!((&done["source_deleted"], &done["verified"]), (&json!(false), &json!("sample")));
        stage.expect_source();
        stage.expect_target(["target/base.vhdx", "target/mid.vhdx", "target/top.vhdx"], &["target"]);
    }
}

#[test]
fn a_parent_that_changes_under_the_move_ends_it() {
    let stage = Stage::new("vhd");
    let child = stage.start(&format!("{MOVE} --bandwidth 512K --verify none --json"));
    wait_for(&stage.at("target"), "top.vhd.incomplete-m");
    // Somebody who knows nothing of locks.
    let file = File::options().write(true).open(stage.at("source/base.vhd")).expect("open");
    let len = file.metadata().expect("its size").len();
    file.set_len(len).expect("touched");
    file.write_all_at(&[0], len - 1).expect("written");
    let (code, out, err) = end(child);
    assert_eq!(code, Some(1), "{out} {err}");
    assert!(out.contains("busy") && err.contains("base.vhd"), "{out} {err}");
    assert_eq!(stage.files("source"), stage.source_names());
    assert_eq!(stage.files("target"), [""; 0]);
}

#[test]
fn a_signal_removes_all_that_was_made() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let stage = Stage::new("vhdx");
        let child = stage.start(&format!("{MOVE} --bandwidth 64K --json"));
        wait_for(&stage.at("target"), "top.vhdx.incomplete-m");
        assert_eq!(stage.files("target").len(), 3);
        kill(Pid::from_raw(child.id().cast_signed()), signal).expect("signalled");
        let (code, out, err) = end(child);
        assert_eq!(code, Some(3), "{out} {err}");
        assert_eq!(stage.files("target"), [""; 0]);
        stage.expect_source();
    }
}

/// What a kill has left: the source whole, or the target. Nothing under another name than those, and `.incomplete-JOB`.
#[track_caller]
fn expect_one_whole(stage: &Stage, format: Format) -> bool {
    let (source, target) = (stage.files("source"), stage.files("target"));
    let final_names: Vec<&String> = target.iter().filter(|name| !name.contains(".incomplete-m")).collect();
    // From the base upwards, each with its parents.
    let made = NAMES.iter().take_while(|name| final_names.contains(&&format!("{name}.{format}"))).count();
    assert_eq!(final_names.len(), made, "a child has its name before its parent: {target:?}");
    for (level, name) in NAMES.iter().enumerate().take(made) {
        let path = format!("target/{name}.{format}");
        assert!(stage.reads(&path, &["target"]) == stage.models[level], "{path} has another content");
    }
    let all = stage.source_names();
    if source != all {
        assert_eq!(made, 3, "the source was touched before the target was whole: {source:?} {target:?}");
        assert_eq!(source, all[..source.len()], "a child is left without its parent");
    }
    for (level, name) in source.iter().enumerate() {
        let path = format!("source/{name}");
        assert!(stage.reads(&path, &["source"]) == stage.models[level], "{path} has another content");
    }
    made == 3
}

#[test]
fn whenever_it_is_killed_the_source_or_the_target_is_whole() {
    let mut whole = [0, 0];
    for round in 0..40_u64 {
        let (format, to) = [("vhd", "vhd"), ("vhdx", "vhdx"), ("vhd", "vhdx")][(round % 3) as usize];
        let stage = Stage::new(format);
        let mut child = stage.start(&format!("{MOVE} --format {to} --verify sample"));
        // In no step with what it does: while it copies, while it renames, and while it deletes.
        let (reached, most_us) = match round % 4 {
            0 => (None, 150_000),
            1 => (Some((format!("target/base.{to}.incomplete"), true)), 150_000),
            2 => (Some((format!("target/base.{to}"), true)), 12_000),
            _ => (Some((format!("source/top.{format}"), false)), 6_000),
        };
        if let Some((place, there)) = reached {
            let (folder, part) = place.split_once('/').expect("a folder");
            let seen =
                |name: &String| if part.ends_with("incomplete") { name.contains(part) } else { name == part };
            let deadline = Instant::now() + Duration::from_secs(60);
            while stage.files(folder).iter().any(seen) != there && Instant::now() < deadline {
                std::hint::spin_loop();
            }
        }
        std::thread::sleep(Duration::from_micros(round * 7919 % most_us));
        child.kill().expect("killed");
        child.wait().expect("ended");
        whole[usize::from(expect_one_whole(&stage, format_by_name(format!("x.{to}")).expect("a format")))] +=
            1;
    }
    eprintln!("40 kills: {} before the target was whole, {} after", whole[0], whole[1]);
    assert!(whole[0] > 0 && whole[1] > 0, "{whole:?}");
}

#[test]
fn after_a_kill_the_move_can_be_made_again() {
    let stage = Stage::new("vhdx");
    let mut child = stage.start(&format!("{MOVE} --bandwidth 64K"));
    wait_for(&stage.at("target"), "top.vhdx.incomplete-m");
    child.kill().expect("killed");
    child.wait().expect("ended");
    assert!(stage.files("target").iter().all(|name| name.contains(".vhdx.incomplete-m")));
    stage.run(MOVE).expect(0);
    stage.expect_target(["target/base.vhdx", "target/mid.vhdx", "target/top.vhdx"], &["target"]);
}

#[test]
fn what_a_killed_daemon_has_noted_is_moved_too() {
    for format in ["vhd", "vhdx"] {
        let mut stage = Stage::new(format);
        let state = stage.at("state");
        std::fs::create_dir(&state).expect("a folder");
        let options = OpenOptions {
            parents: vec![stage.at("source")],
            notes_dir: Some(state.join("notes")),
            ..OpenOptions::default()
        };
        let image = formats::open(stage.at(&format!("source/top.{format}")), &options).expect("opens");
        formats::write_payload(&*image, 2 * MIB + 4096, &[9; 1024]).expect("written");
        // As if the process had died.
        drop(image);
        stage.models[2][2 * MIB as usize + 4096..][..1024].fill(9);
        let run = |line: &str| {
            let line = line.replace(".F", &format!(".{format}"));
            let mut command = command();
            support::run(
                command
                    .current_dir(stage.path())
                    .env("BLOCKD_STATE_DIR", &state)
                    .args(line.split_whitespace()),
            )
        };
        let refused = run(&format!("{MOVE} --copy-only")).expect(4);
        assert!(refused.err.contains("killed"), "{}", refused.err);
        run(MOVE).expect(0);
        let at = |name: &str| format!("target/{name}.{format}");
        stage.expect_target([&at("base"), &at("mid"), &at("top")], &["target"]);
    }
}

#[test]
fn a_plan_lists_the_files_of_a_chain_and_what_each_takes() {
    let stage = Stage::new("vhdx");
    let line = "plan source/top.F --to target --parents source --bandwidth 1M --json";
    let plan = stage.run(line).expect(0).json();
    let files = plan["files"].as_array().expect("a list");
    assert_eq!(files.len(), 3);
    assert_eq!((&files[0]["target"], &files[0]["type"]), (&json!("target/top.vhdx"), &json!("differencing")));
    assert_eq!((&files[2]["type"], &files[2]["stays"]), (&json!("dynamic"), &json!(false)));
    let sum: u64 = files.iter().filter_map(|file| file["bytes_to_copy"].as_u64()).sum();
    assert_eq!((plan["bytes_to_copy"].as_u64(), plan["space_needed_bytes"].as_u64()), (Some(sum), Some(sum)));
    assert!(sum > MIB && plan["seconds"].as_f64().expect("a time") > 1.0, "{plan}");
    assert_eq!((&plan["size_bytes"], &plan["fits"]), (&json!(12 * MIB), &json!(true)));

    let plan = stage.run(&format!("{line} --disk source/base.F=source/base.F")).expect(0).json();
    assert_eq!(plan["files"][2]["stays"], true);
    assert!(plan["bytes_to_copy"].as_u64().expect("a number") < sum);
    let plan = stage.run(&format!("{line} --flatten")).expect(0).json();
    assert_eq!((plan["files"].as_array().map(Vec::len), &plan["type"]), (Some(1), &json!("dynamic")));

    std::fs::write(stage.at("target/mid.vhdx"), "").expect("written");
    let shown = stage.run("plan source/top.F --to target --parents source").expect(1);
    assert!(shown.out.contains("PROBLEM: target/mid.vhdx exists already"), "{}", shown.out);
    assert!(shown.out.contains("target/base.vhdx, at most"), "{}", shown.out);
    stage.expect_source();
}

#[test]
fn a_parent_named_through_a_link_is_moved_itself() {
    let stage = Stage::new("vhdx");
    std::os::unix::fs::symlink(stage.at("source/base.vhdx"), stage.at("other/link.vhdx")).expect("linked");
    stage.run("move source/top.F --to target --parents other/link.vhdx --parents source/mid.vhdx").expect(0);
    assert_eq!((stage.files("source").len(), stage.files("target")), (0, stage.source_names()));
    stage.expect_target(["target/base.vhdx", "target/mid.vhdx", "target/top.vhdx"], &["target"]);
}
