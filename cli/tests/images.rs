//! The `image` commands, run as people run them.

mod support;

use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use serde_json::json;
use support::{blockctl, names, write_raw};

const MIB: u64 = 1 << 20;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

/// Overwrites bytes of a file.
fn damage(path: &Path, at: u64, with: &[u8]) {
    let file = std::fs::File::options().write(true).open(path).expect("the file");
    file.write_all_at(with, at).expect("written");
}

#[test]
fn an_image_of_each_format_is_created_and_described() {
    let dir = folder();
    for (name, format, image_type) in
        [("a.vhdx", "vhdx", "dynamic"), ("a.vhd", "vhd", "dynamic"), ("a.img", "raw", "fixed")]
    {
        let made = blockctl(dir.path(), &["image", "create", name, "--size", "64M", "--json"]).expect(0);
        assert_eq!(
            made.json(),
            json!({"path": name, "format": format, "type": image_type, "size_bytes": 64 * MIB})
        );
        let info = blockctl(dir.path(), &["image", "info", name, "--json"]).expect(0).json();
        assert_eq!(info["format"], format);
        assert_eq!(info["type"], image_type);
        assert_eq!(info["virtual_size"], 64 * MIB);
        assert_eq!(info["allocated_bytes"], 0, "{name}");
        blockctl(dir.path(), &["image", "check", name]).expect(0);
    }
}

#[test]
fn creating_and_describing_a_vhd_reads_well() {
    let dir = folder();
    let made = blockctl(dir.path(), &["image", "create", "disk.vhd", "--size", "1G"]).expect(0);
    assert_eq!(made.out, "disk.vhd: created, dynamic vhd, 1 GiB\n");
    let info = blockctl(dir.path(), &["image", "info", "disk.vhd"]).expect(0);
    let lines: Vec<&str> = info.out.lines().collect();
    assert_eq!(
        lines[..4],
        [
            "image:             disk.vhd",
            "format:            dynamic vhd",
            "virtual size:      1 GiB (1073741824 bytes)",
            "allocated:         0 bytes",
        ]
    );
    assert!(info.out.contains("\nstate:             clean\n"), "{}", info.out);
}

#[test]
fn the_options_decide_over_the_name() {
    let dir = folder();
    let args = ["image", "create", "odd.name", "--size", "16M", "--format", "vhd", "--type", "fixed"];
    blockctl(dir.path(), &args).expect(0);
    let info =
        blockctl(dir.path(), &["image", "info", "odd.name", "--format", "vhd", "--json"]).expect(0).json();
    assert_eq!((&info["format"], &info["type"]), (&json!("vhd"), &json!("fixed")));
}

#[test]
fn an_existing_file_is_never_overwritten() {
    let dir = folder();
    std::fs::write(dir.path().join("a.vhd"), "precious").expect("written");
    let refused = blockctl(dir.path(), &["image", "create", "a.vhd", "--size", "64M", "--json"]).expect(1);
    assert_eq!(refused.json()["error"]["kind"], "exists");
    assert!(refused.err.starts_with("blockctl: a.vhd: "), "{}", refused.err);
    assert_eq!(std::fs::read(dir.path().join("a.vhd")).expect("read"), b"precious");

    write_raw(&dir.path().join("b.img"), MIB);
    let refused = blockctl(dir.path(), &["image", "convert", "b.img", "a.vhd", "--json"]).expect(1);
    assert_eq!(refused.json()["error"]["kind"], "exists");
    assert_eq!(names(dir.path()), ["a.vhd", "b.img"]);
}

#[test]
fn parameters_that_do_not_go_together_are_refused_and_leave_nothing_behind() {
    let dir = folder();
    for args in [
        &["a.vhd", "--size", "3000G"][..],
        &["a.vhd", "--size", "64M", "--sector-size", "4096"],
        &["a.vhd", "--size", "1000"],
        &["a.img", "--size", "64M", "--block-size", "1M"],
    ] {
        let refused = blockctl(dir.path(), &[&["image", "create"], args, &["--json"]].concat()).expect(1);
        assert_eq!(refused.json()["error"]["kind"], "invalid", "{args:?}");
    }
    let raw =
        blockctl(dir.path(), &["image", "create", "a.img", "--size", "64M", "--type", "dynamic"]).expect(2);
    assert!(raw.err.contains("raw"), "{}", raw.err);
    assert!(names(dir.path()).is_empty());
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let dir = folder();
    for verb in ["info", "check", "map"] {
        let missing = blockctl(dir.path(), &["image", verb, "nowhere.vhdx", "--json"]).expect(1);
        assert_eq!(missing.json()["error"]["kind"], "not-found", "{verb}");
        assert!(missing.err.contains("nowhere.vhdx"), "{}", missing.err);
        assert_eq!(missing.err.lines().count(), 1, "one sentence: {}", missing.err);
    }
}

#[test]
fn a_damaged_image_is_found_and_ends_with_four() {
    let dir = folder();
    blockctl(dir.path(), &["image", "create", "a.vhd", "--size", "64M"]).expect(0);
    // The dynamic header lies behind the footer's copy; this is its cookie.
    damage(&dir.path().join("a.vhd"), 512, b"nonsense");
    let found = blockctl(dir.path(), &["image", "check", "a.vhd", "--json"]).expect(4);
    let report = found.json();
    assert_eq!(report["sound"], false);
    let finding = &report["findings"][0];
    for field in ["code", "severity", "structure", "offset", "message", "repairable", "repaired"] {
        assert!(finding.get(field).is_some(), "{field} is missing in {finding}");
    }
    let told = blockctl(dir.path(), &["image", "check", "a.vhd"]).expect(4);
    assert!(told.out.starts_with("damage: "), "{}", told.out);
    assert!(told.out.ends_with("a.vhd: damaged\n"), "{}", told.out);

    let refused = blockctl(dir.path(), &["image", "map", "a.vhd", "--json"]).expect(4);
    assert_eq!(refused.json()["error"]["kind"], "corrupt");
    blockctl(dir.path(), &["image", "convert", "a.vhd", "b.img"]).expect(4);
    assert_eq!(names(dir.path()), ["a.vhd"]);
}

#[test]
fn a_damaged_vhdx_is_found_and_ends_with_four() {
    let dir = folder();
    blockctl(dir.path(), &["image", "create", "a.vhdx", "--size", "64M"]).expect(0);
    for header in [64 << 10, 128 << 10] {
        damage(&dir.path().join("a.vhdx"), header + 100, b"nonsense");
    }
    let report = blockctl(dir.path(), &["image", "check", "a.vhdx", "--json"]).expect(4).json();
    assert_eq!(report["sound"], false);
}

#[test]
fn a_repair_mends_a_lost_footer() {
    let dir = folder();
    let path = dir.path().join("a.vhd");
    write_raw(&dir.path().join("a.img"), 8 * MIB);
    blockctl(dir.path(), &["image", "convert", "a.img", "a.vhd"]).expect(0);
    let len = std::fs::metadata(&path).expect("it exists").len();
    damage(&path, len - 512, &[0; 512]);
    let repaired = blockctl(dir.path(), &["image", "check", "a.vhd", "--repair", "--json"]).expect(0).json();
    assert_eq!(repaired["sound"], true);
    assert!(
        repaired["findings"].as_array().expect("a list").iter().any(|f| f["repaired"] == true),
        "{repaired}"
    );
    blockctl(dir.path(), &["image", "compare", "a.img", "a.vhd"]).expect(0);
}

#[test]
fn a_map_covers_the_whole_disk_without_gaps() {
    let dir = folder();
    write_raw(&dir.path().join("a.img"), 64 * MIB);
    for target in ["a.vhd", "a.vhdx"] {
        blockctl(dir.path(), &["image", "convert", "a.img", target]).expect(0);
        let map = blockctl(dir.path(), &["image", "map", target, "--json"]).expect(0).json();
        assert_eq!(map["size_bytes"], 64 * MIB);
        let mut next = 0;
        let mut data = 0;
        for extent in map["extents"].as_array().expect("a list") {
            assert_eq!(extent["offset"].as_u64(), Some(next));
            let length = extent["length"].as_u64().expect("a length");
            next += length;
            match extent["state"].as_str() {
                Some("data") => data += length,
                Some("zero" | "absent") => {}
                other => panic!("state {other:?}"),
            }
        }
        assert_eq!(next, 64 * MIB);
        assert!((3 * 65536..=8 * MIB).contains(&data), "{data} bytes of data in {target}");
    }
}

#[test]
fn the_map_of_an_empty_image_reads_well() {
    let dir = folder();
    blockctl(dir.path(), &["image", "create", "a.vhd", "--size", "64M"]).expect(0);
    let map = blockctl(dir.path(), &["image", "map", "a.vhd"]).expect(0);
    assert_eq!(map.out, "OFFSET    LENGTH  STATE\n     0  67108864  absent\n64 MiB in all: 64 MiB absent\n");
}

#[test]
fn converting_round_all_formats_keeps_every_byte_and_every_hole() {
    let dir = folder();
    write_raw(&dir.path().join("a.img"), 256 * MIB);
    let steps = [("a.img", "b.vhdx"), ("b.vhdx", "c.vhd"), ("c.vhd", "d.img"), ("d.img", "e.vhdx")];
    for (from, to) in steps {
        let done = blockctl(dir.path(), &["image", "convert", from, to, "--json"]).expect(0).json();
        assert_eq!(done["bytes_copied"].as_u64().expect("a number") % 4096, 0);
        assert!(done["bytes_copied"].as_u64() <= Some(MIB), "{done}");
        blockctl(dir.path(), &["image", "compare", "a.img", to]).expect(0);
        let blocks = std::fs::metadata(dir.path().join(to)).expect("it exists").blocks() * 512;
        assert!(blocks < 16 * MIB, "{to} takes {blocks} bytes");
        blockctl(dir.path(), &["image", "check", to]).expect(0);
    }
    assert_eq!(names(dir.path()), ["a.img", "b.vhdx", "c.vhd", "d.img", "e.vhdx"]);
}

#[test]
fn converting_says_what_it_did() {
    let dir = folder();
    write_raw(&dir.path().join("a.img"), 64 * MIB);
    let done = blockctl(dir.path(), &["image", "convert", "a.img", "a.vhd"]).expect(0);
    assert!(done.out.starts_with("a.vhd: dynamic vhd, 192 KiB copied in "), "{}", done.out);
    assert!(done.out.ends_with("63.8 MiB empty\n"), "{}", done.out);
}

#[test]
fn a_disk_may_grow_in_converting_but_not_be_cut_off() {
    let dir = folder();
    write_raw(&dir.path().join("a.img"), 8 * MIB);
    blockctl(dir.path(), &["image", "convert", "a.img", "a.vhd", "--size", "16M"]).expect(0);
    let info = blockctl(dir.path(), &["image", "info", "a.vhd", "--json"]).expect(0).json();
    assert_eq!(info["virtual_size"], 16 * MIB);
    let cut = blockctl(dir.path(), &["image", "convert", "a.img", "b.vhd", "--size", "4M"]).expect(2);
    assert!(cut.err.contains("cut it off"), "{}", cut.err);
}

#[test]
fn images_that_differ_are_told_apart_at_the_first_byte() {
    let dir = folder();
    write_raw(&dir.path().join("a.img"), 8 * MIB);
    std::fs::copy(dir.path().join("a.img"), dir.path().join("b.img")).expect("copied");
    let same = blockctl(dir.path(), &["image", "compare", "a.img", "b.img"]).expect(0);
    assert_eq!(same.out, "a.img and b.img hold the same disk\n");
    damage(&dir.path().join("b.img"), 3 * MIB + 17, &[1]);
    let differ = blockctl(dir.path(), &["image", "compare", "a.img", "b.img", "--json"]).expect(4).json();
    assert_eq!(
        differ,
        json!({"a": "a.img", "b": "b.img", "same": false, "first_difference": 3 * MIB + 17,
            "size_bytes_a": 8 * MIB, "size_bytes_b": 8 * MIB})
    );
    let told = blockctl(dir.path(), &["image", "compare", "a.img", "b.img"]).expect(4);
    assert_eq!(told.out, "a.img and b.img differ; the first difference is at byte 3145745\n");
}

#[test]
fn a_disk_that_is_only_longer_is_another_disk() {
    let dir = folder();
    for (name, size) in [("a.vhd", "8M"), ("b.vhd", "16M")] {
        blockctl(dir.path(), &["image", "create", name, "--size", size]).expect(0);
    }
    let differ = blockctl(dir.path(), &["image", "compare", "a.vhd", "b.vhd", "--json"]).expect(4).json();
    assert_eq!(differ["first_difference"], 8 * MIB);
    let told = blockctl(dir.path(), &["image", "compare", "a.vhd", "b.vhd"]).expect(4);
    assert!(told.out.contains("differ in size"), "{}", told.out);
}

#[test]
fn a_name_that_says_nothing_asks_for_the_format() {
    let dir = folder();
    blockctl(dir.path(), &["image", "create", "disk", "--size", "8M", "--format", "vhd"]).expect(0);
    let refused = blockctl(dir.path(), &["image", "info", "disk", "--json"]).expect(1);
    assert_eq!(refused.json()["error"]["kind"], "invalid");
    assert!(refused.err.contains("--format"), "{}", refused.err);
    blockctl(dir.path(), &["image", "compare", "disk", "disk", "--format-a", "vhd", "--format-b", "vhd"])
        .expect(0);
}

#[test]
fn an_unfinished_target_of_a_move_is_called_one() {
    let dir = folder();
    let name = "vm.vhd.incomplete-m12345678";
    blockctl(dir.path(), &["image", "create", name, "--size", "8M", "--format", "vhd"]).expect(0);
    let info = blockctl(dir.path(), &["image", "info", name]).expect(0);
    assert!(info.out.contains("unfinished target of move m12345678"), "{}", info.out);
}
