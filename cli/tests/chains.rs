//! The `image` commands on differencing images, and those that change an image's structure, run as people run them.

mod support;

use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use serde_json::json;
use support::{Ended, blockctl, names, write_raw};

const MIB: u64 = 1 << 20;

/// A folder with `base/base.FORMAT`, which holds something, and `child.FORMAT` on it.
fn with_child(format: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(dir.path().join("base")).expect("a folder");
    write_raw(&dir.path().join("a.img"), 16 * MIB);
    let base = format!("base/base.{format}");
    blockctl(dir.path(), &["image", "convert", "a.img", &base]).expect(0);
    let args = ["image", "create", &format!("child.{format}"), "--type", "differencing", "--parent", &base];
    blockctl(dir.path(), &args).expect(0);
    dir
}

fn image(dir: &Path, line: &str) -> Ended {
    let words: Vec<&str> = std::iter::once("image").chain(line.split_whitespace()).collect();
    blockctl(dir, &words)
}

#[test]
fn a_child_takes_everything_from_its_parent() {
    for format in ["vhd", "vhdx"] {
        let dir = with_child(format);
        let dir = dir.path();
        let line = format!("create second.{format} --parent base/base.{format} --size 32M --json");
        let made = image(dir, &line).expect(0).json();
        assert_eq!(
            made,
            json!({"path": format!("second.{format}"), "format": format, "type": "differencing",
                "size_bytes": 32 * MIB, "parent": format!("base/base.{format}")})
        );
        let info = image(dir, &format!("info child.{format} --json")).expect(0).json();
        assert_eq!((&info["type"], &info["virtual_size"]), (&json!("differencing"), &json!(16 * MIB)));
        assert!(info["parent_paths"].to_string().contains("base"), "{info}");
        assert_eq!(info["parents"], json!([]), "nothing was named");
        // The name does not have to say the format.
        image(dir, &format!("create third --parent base/base.{format}")).expect(0);
        let third = image(dir, &format!("info third --format {format} --json")).expect(0).json();
        assert_eq!(third["type"], "differencing");
    }
}

#[test]
fn options_that_do_not_go_with_a_parent_are_refused() {
    let dir = with_child("vhdx");
    let dir = dir.path();
    for line in [
        "create x.vhdx --size 8M --type differencing",
        "create x.vhdx --size 8M --type fixed --parent base/base.vhdx",
        "create x.img --type differencing --parent a.img",
        "create x.vhdx",
        "convert child.vhdx x.vhdx --type differencing --parents base",
    ] {
        image(dir, line).expect(2);
    }
    for (line, why) in [
        ("create x.vhdx --parent base/base.vhdx --size 8M", "less than"),
        ("create x.vhdx --parent base/base.vhdx --sector-size 4096", "512"),
        ("create x.vhd --parent base/base.vhdx --format vhd", "own format"),
    ] {
        let refused = image(dir, &format!("{line} --json")).expect(1);
        assert_eq!(refused.json()["error"]["kind"], "invalid", "{line}");
        assert!(refused.err.contains(why), "{}", refused.err);
    }
    image(dir, "create x.vhdx --parent base/missing.vhdx").expect(1);
    assert_eq!(names(dir), ["a.img", "base", "child.vhdx"]);
}

#[test]
fn parents_are_found_where_they_are_named_and_the_chain_reads_as_one() {
    for format in ["vhd", "vhdx"] {
        let dir = with_child(format);
        let dir = dir.path();
        let child = format!("child.{format}");
        for line in
            [format!("map {child}"), format!("compare {child} a.img"), format!("convert {child} x.img")]
        {
            let refused = image(dir, &line).expect(1);
            assert!(refused.err.contains("--parents"), "{}", refused.err);
            assert_eq!(refused.err.lines().count(), 1, "one sentence: {}", refused.err);
        }
        image(dir, &format!("compare {child} a.img --parents base")).expect(0);
        image(dir, &format!("compare {child} a.img --parents base/base.{format}")).expect(0);
        let map = image(dir, &format!("map {child} --parents . --json")).expect(0).json();
        assert!(map["extents"].to_string().contains("data"), "{map}");
        image(dir, &format!("convert {child} whole.{format} --parents base")).expect(0);
        let whole = image(dir, &format!("info whole.{format} --json")).expect(0).json();
        assert_eq!(whole["type"], "dynamic");
        image(dir, &format!("compare whole.{format} a.img")).expect(0);
    }
}

#[test]
fn info_tells_which_parents_are_found_and_why_not() {
    let dir = with_child("vhdx");
    let dir = dir.path();
    image(dir, "create grandchild.vhdx --parent child.vhdx").expect(0);
    let info = image(dir, "info grandchild.vhdx --parents . --json").expect(0).json();
    let found: Vec<_> =
        info["parents"].as_array().expect("a list").iter().map(|p| p["found"] == true).collect();
    assert_eq!(found, [true, true], "{info}");
    assert_eq!(info["parents"][0]["path"], "./child.vhdx");
    assert_eq!(info["parents"][1]["type"], "dynamic");
    std::fs::rename(dir.join("base/base.vhdx"), dir.join("base/moved.vhdx")).expect("renamed");
    let info = image(dir, "info grandchild.vhdx --parents . --json").expect(0).json();
    assert_eq!(info["parents"][1]["found"], false);
    assert!(info["parents"][1]["reason"].to_string().contains("is not there"), "{info}");
    assert!(image(dir, "info grandchild.vhdx --parents .").expect(0).out.contains("NOT:"));
    // The content decides, not the name.
    let info =
        image(dir, "info grandchild.vhdx --parents . --parents base/moved.vhdx --json").expect(0).json();
    assert_eq!(info["parents"][1]["path"], "base/moved.vhdx");
}

#[test]
fn a_check_takes_the_parents_in_when_they_are_named() {
    for format in ["vhd", "vhdx"] {
        let dir = with_child(format);
        let dir = dir.path();
        let child = format!("child.{format}");
        image(dir, &format!("check {child}")).expect(0);
        image(dir, &format!("check {child} --parents base")).expect(0);
        std::fs::create_dir(dir.join("empty")).expect("a folder");
        let found = image(dir, &format!("check {child} --parents empty --json")).expect(4).json();
        assert_eq!(found["findings"][0]["code"], "chain-parent", "{found}");
        // The copy of the footer, or of the first header, is damaged: the parent is told, and stays as it is.
        let base = dir.join(format!("base/base.{format}"));
        let at = if format == "vhd" { 100 } else { (64 << 10) + 100 };
        let file = std::fs::File::options().write(true).open(&base).expect("the file");
        file.write_all_at(b"nonsense", at).expect("written");
        let before = std::fs::read(&base).expect("read");
        let found = image(dir, &format!("check {child} --parents base --repair --json")).expect(0).json();
        assert!(found["findings"][0]["structure"].to_string().contains("parent base/base"), "{found}");
        assert!(std::fs::read(&base).expect("read") == before, "the parent was changed");
    }
}

#[test]
fn a_moved_parent_is_found_again_after_a_rebase() {
    for format in ["vhd", "vhdx"] {
        let dir = with_child(format);
        let dir = dir.path();
        let (child, moved) = (format!("child.{format}"), format!("other place/the base.{format}"));
        std::fs::create_dir(dir.join("other place")).expect("a folder");
        std::fs::rename(dir.join(format!("base/base.{format}")), dir.join(&moved)).expect("moved");
        image(dir, &format!("map {child} --parents .")).expect(1);
        let rebase = |parent: &str, more: &[&str]| {
            blockctl(dir, &[&["image", "rebase", &child, "--parent", parent, "--json"], more].concat())
        };
        let done = rebase(&moved, &[]).expect(0).json();
        assert_eq!((&done["parent"], &done["parent_changed"]), (&json!(moved), &json!(false)), "{done}");
        image(dir, &format!("compare {child} a.img --parents .")).expect(0);
        image(dir, &format!("check {child} --parents .")).expect(0);

        // Another image, however alike, is refused until that is accepted.
        let twin = format!("twin.{format}");
        image(dir, &format!("convert a.img {twin}")).expect(0);
        let refused = rebase(&twin, &[]).expect(1);
        assert!(refused.err.contains("--accept-changed-parent"), "{}", refused.err);
        image(dir, &format!("compare {child} a.img --parents .")).expect(0);
        let done = rebase(&twin, &["--accept-changed-parent"]).expect(0).json();
        assert_eq!(done["parent_changed"], true);
        image(dir, &format!("compare {child} a.img --parents .")).expect(0);
    }
}

#[test]
fn an_image_is_never_made_its_own_ancestor_nor_put_on_what_is_no_parent() {
    for format in ["vhd", "vhdx"] {
        let dir = with_child(format);
        let dir = dir.path();
        let child = format!("child.{format}");
        image(dir, &format!("create grandchild.{format} --parent {child}")).expect(0);
        image(dir, &format!("create grandgrandchild.{format} --parent grandchild.{format}")).expect(0);
        std::fs::hard_link(dir.join(&child), dir.join(format!("alias.{format}"))).expect("a link");
        let other = if format == "vhd" { "vhdx" } else { "vhd" };
        image(dir, &format!("create other.{other} --size 16M")).expect(0);
        for (parent, why) in [
            (child.clone(), "its own parent"),
            (format!("alias.{format}"), "its own parent"),
            (format!("grandchild.{format}"), "circle"),
            (format!("grandgrandchild.{format}"), "circle"),
            (format!("other.{other}"), "own format"),
            ("a.img".into(), "own format"),
            ("missing.vhdx".into(), "check the path"),
        ] {
            let line = format!("rebase {child} --parent {parent} --parents . --accept-changed-parent");
            let refused = image(dir, &line).expect(1);
            assert!(refused.err.contains(why), "{parent}: {}", refused.err);
        }
        let whole = image(dir, &format!("rebase base/base.{format} --parent {child}")).expect(1);
        assert!(whole.err.contains("has no parent"), "{}", whole.err);
        image(dir, &format!("compare grandgrandchild.{format} a.img --parents . --parents base")).expect(0);
    }
}

#[test]
fn a_parent_that_was_written_to_is_refused_with_both_ids() {
    let dir = with_child("vhdx");
    let dir = dir.path();
    let image_of =
        |path: &str| formats::open(dir.join(path), &formats::OpenOptions::default()).expect("opens");
    let base = image_of("base/base.vhdx");
    formats::write_payload(&*base, 0, &[1; 512]).expect("written");
    base.close().expect("closed");
    drop(base);
    let refused = image(dir, "compare child.vhdx a.img --parents base --json").expect(1);
    assert!(refused.err.contains("changed after the child was made"), "{}", refused.err);
    let accepted = image(dir, "rebase child.vhdx --parent base/base.vhdx --accept-changed-parent").expect(0);
    assert!(accepted.out.contains("as you accepted"), "{}", accepted.out);
    image(dir, "compare child.vhdx a.img --parents base").expect(4);
}

#[test]
fn disks_grow_and_shrink_only_where_nothing_is_lost() {
    for format in ["raw", "vhd", "vhdx"] {
        let dir = tempfile::tempdir().expect("a folder");
        let dir = dir.path();
        write_raw(&dir.join("a.img"), 16 * MIB);
        let disk = format!("disk.{format}");
        image(dir, &format!("convert a.img {disk}")).expect(0);
        let grown = image(dir, &format!("resize {disk} 40M --json")).expect(0).json();
        assert_eq!(grown, json!({"path": disk, "old_size_bytes": 16 * MIB, "size_bytes": 40 * MIB}));
        image(dir, "resize a.img 40M").expect(0);
        image(dir, &format!("compare {disk} a.img")).expect(0);
        let asked = image(dir, &format!("resize {disk} 20M")).expect(1);
        assert!(asked.err.contains("--shrink"), "{}", asked.err);
        image(dir, &format!("resize {disk} 20M --shrink")).expect(0);
        let lost = image(dir, &format!("resize {disk} 15M --shrink --json")).expect(1);
        assert_eq!(lost.json()["error"]["kind"], "invalid", "{format}: {}", lost.err);
        assert!(lost.err.contains(disk.as_str()), "{}", lost.err);
        image(dir, &format!("resize {disk} 40M")).expect(0);
        image(dir, &format!("compare {disk} a.img")).expect(0);
        image(dir, &format!("check {disk}")).expect(0);
    }
}

#[test]
fn a_child_grows_beyond_its_parent_with_zeroes() {
    for format in ["vhd", "vhdx"] {
        let dir = with_child(format);
        let dir = dir.path();
        image(dir, &format!("resize child.{format} 32M")).expect(0);
        image(dir, "resize a.img 32M").expect(0);
        image(dir, &format!("compare child.{format} a.img --parents base")).expect(0);
        image(dir, &format!("resize child.{format} 48M --parents base")).expect(0);
        image(dir, &format!("resize child.{format} 32M --shrink --parents base")).expect(0);
        image(dir, &format!("compare child.{format} a.img --parents base")).expect(0);
        let missing = image(dir, &format!("resize child.{format} 64M --parents a.img")).expect(1);
        assert!(missing.err.contains("no sound image"), "{}", missing.err);
    }
}

#[test]
fn compacting_gives_space_back_and_keeps_every_byte() {
    for format in ["raw", "vhd", "vhdx"] {
        let dir = tempfile::tempdir().expect("a folder");
        let dir = dir.path();
        let disk = format!("disk.{format}");
        write_raw(&dir.join("a.img"), 64 * MIB);
        image(dir, &format!("create {disk} --size 64M")).expect(0);
        let open = || formats::open(dir.join(&disk), &formats::OpenOptions::default()).expect("opens");
        // Full of zeroes, all of them written.
        let opened = open();
        for at in (0..64).map(|n| n * MIB) {
            formats::write_payload(&*opened, at, &vec![0; MIB as usize]).expect("written");
        }
        for at in [0, 32 * MIB, 64 * MIB - 65536] {
            let content = formats_read(&dir.join("a.img"), at);
            formats::write_payload(&*opened, at, &content).expect("written");
        }
        opened.close().expect("closed");
        drop(opened);
        let before = std::fs::metadata(dir.join(&disk)).expect("it is there").blocks() * 512;
        let done = image(dir, &format!("compact {disk} --json")).expect(0).json();
        let after = std::fs::metadata(dir.join(&disk)).expect("it is there").blocks() * 512;
        assert!(before >= 64 * MIB && after < 12 * MIB, "{format}: {before} -> {after}: {done}");
        assert!(done["freed_bytes"].as_u64() >= Some(48 * MIB), "{done}");
        assert!(done.get("moved_bytes").is_some());
        image(dir, &format!("compare {disk} a.img")).expect(0);
        image(dir, &format!("check {disk}")).expect(0);
        let again = image(dir, &format!("compact {disk}")).expect(0);
        assert!(again.out.starts_with(&format!("{disk}: 0 B given back")), "{}", again.out);
    }
}

/// 64 KiB of a file.
fn formats_read(path: &Path, at: u64) -> Vec<u8> {
    let mut bytes = vec![0; 65536];
    std::fs::File::open(path).expect("the file").read_exact_at(&mut bytes, at).expect("read");
    bytes
}

#[test]
fn writes_of_a_killed_daemon_are_brought_home_before_an_image_is_changed() {
    for (format, verb) in [("vhd", "compact"), ("vhdx", "resize"), ("vhd", "check"), ("vhdx", "rebase")] {
        let dir = with_child(format);
        let dir = dir.path();
        let child = format!("child.{format}");
        let state = dir.join("state");
        std::fs::create_dir(&state).expect("a folder");
        let run = |line: &str| {
            let words = std::iter::once("image").chain(line.split_whitespace());
            support::run(support::command().current_dir(dir).env("BLOCKD_STATE_DIR", &state).args(words))
        };
        let options = formats::OpenOptions {
            parents: vec![dir.join("base")],
            notes_dir: Some(state.join("notes")),
            ..formats::OpenOptions::default()
        };
        let image = formats::open(dir.join(&child), &options).expect("opens");
        formats::write_payload(&*image, MIB, &[9; 512]).expect("written");
        drop(image);
        let refused = run(&format!("map {child} --parents base --json")).expect(4);
        assert!(refused.err.contains("killed"), "{}", refused.err);
        let line = match verb {
            "resize" => format!("resize {child} 32M"),
            "check" => format!("check {child} --repair"),
            "rebase" => format!("rebase {child} --parent base/base.{format}"),
            _ => format!("{verb} {child}"),
        };
        run(&line).expect(0);
        run(&format!("convert {child} whole.img --parents base")).expect(0);
        assert_eq!(formats_read(&dir.join("whole.img"), MIB)[..512], [9; 512], "{verb}");
    }
}

#[test]
fn compacting_that_is_broken_off_leaves_the_same_disk() {
    use nix::sys::signal::{Signal, kill};
    let mut broken_off = 0;
    for (n, format) in ["vhd", "vhdx", "raw"].into_iter().cycle().take(6).enumerate() {
        let dir = tempfile::tempdir().expect("a folder");
        let dir = dir.path();
        let disk = format!("disk.{format}");
        write_raw(&dir.join("a.img"), 128 * MIB);
        image(dir, &format!("create {disk} --size 128M")).expect(0);
        let opened = formats::open(dir.join(&disk), &formats::OpenOptions::default()).expect("opens");
        for at in (0..128).map(|n| n * MIB) {
            formats::write_payload(&*opened, at, &vec![0; MIB as usize]).expect("written");
        }
        for at in [0, 64 * MIB, 128 * MIB - 65536] {
            formats::write_payload(&*opened, at, &formats_read(&dir.join("a.img"), at)).expect("written");
        }
        opened.close().expect("closed");
        drop(opened);
        let mut command = support::command();
        command.current_dir(dir).args(["image", "compact", &disk, "--json"]);
        let child = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::null());
        let child = child.spawn().expect("the program starts");
        std::thread::sleep(std::time::Duration::from_millis(10 + 8 * n as u64));
        let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
        kill(pid, Signal::SIGINT).expect("signalled");
        let ended = child.wait_with_output().expect("it ends");
        // Before it listens to signals, one simply ends it.
        assert!([Some(0), Some(3), None].contains(&ended.status.code()), "{ended:?}");
        broken_off += usize::from(ended.status.code() == Some(3));
        image(dir, &format!("compare {disk} a.img")).expect(0);
        image(dir, &format!("compact {disk}")).expect(0);
        image(dir, &format!("compare {disk} a.img")).expect(0);
        image(dir, &format!("check {disk}")).expect(0);
    }
    println!("{broken_off} of 6 were broken off in the middle");
}
