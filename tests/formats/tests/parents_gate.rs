//! Which parents may be opened, and how: whatever an image says, nothing outside of what the operator named is.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod gate;

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use formats::{CHAIN_MAX, CreateOptions, ErrorKind, Format, OpenOptions, create, open};
use formats_tests::{read_payload, write_payload};
use gate::*;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use uuid::Uuid;

#[test]
fn a_parent_is_found_in_the_folder_that_was_named_and_nowhere_else() {
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.base("out/base.*", 7);
        let child = scene.child("in/child.*", &base);
        let witness = Witness::of(&scene.path("out"));
        let e = refused(&child, &OpenOptions::read_only());
        assert_eq!(e.kind, ErrorKind::Parent);
        for part in ["no folder was named", "--parents", "blockctl image rebase", "base."] {
            assert!(e.to_string().contains(part), "{part} is missing: {e}");
        }
        assert!(e.to_string().contains(&content_id(format, &base).to_string()), "{e}");
        witness.opened();
        let e = refused(&child, &within([&scene.path("in")]));
        assert!(e.to_string().contains("leads out of the folder"), "{e}");
        assert_eq!(witness.opened(), Vec::<String>::new(), "the parent lies outside");
        for parents in [scene.path("out"), scene.folder.path().to_path_buf(), base.clone()] {
            let image = open(&child, &within([&parents])).unwrap();
            assert_eq!(read_payload(&*image, SIZE - 512, 512).unwrap(), [7; 512], "{}", parents.display());
            assert_eq!(image.as_chain().unwrap().layers().len(), 2);
        }
        assert!(!witness.opened().is_empty(), "the witness sees");
    }
}

#[test]
fn a_parent_is_never_written_to_and_kept_from_writers() {
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.base("in/base.*", 1);
        let child = scene.child("in/child.*", &base);
        let before = std::fs::read(&base).unwrap();
        let options = OpenOptions {
            parents: vec![scene.path("in")],
            notes_dir: Some(scene.path("notes")),
            ..OpenOptions::default()
        };
        let image = open(&child, &options).unwrap();
        write_payload(&*image, 4096, &[2; 8192]).unwrap();
        let e = refused(&base, &OpenOptions::default());
        assert_eq!(e.kind, ErrorKind::Locked);
        let second = scene.child("in/second.*", &base);
        drop(open(&second, &within([&base])).unwrap());
        image.close().unwrap();
        drop(image);
        drop(open(&base, &OpenOptions::default()).unwrap());
        let image = open(&child, &options).unwrap();
        assert_eq!(
            read_payload(&*image, 0, 16384).unwrap(),
            [[1; 4096], [2; 4096], [2; 4096], [1; 4096]].concat()
        );
        drop(image);
        assert!(std::fs::read(&base).unwrap() == before, "the parent has changed");
    }
}

#[test]
fn m01_a_chain_of_more_images_than_are_possible_is_refused() {
    let scene = Scene::new(Format::Vhd);
    let mut last = scene.base("in/0.*", 3);
    for number in 1..CHAIN_MAX {
        last = scene.child(&format!("in/{number}.*"), &last);
    }
    let folder = scene.path("in");
    let image = open(&last, &within([&folder])).unwrap();
    assert_eq!(image.as_chain().unwrap().layers().len(), CHAIN_MAX);
    assert_eq!(read_payload(&*image, 0, 512).unwrap(), [3; 512]);
    drop(image);
    let last = scene.child("in/one-more.*", &last);
    let e = refused(&last, &within([&folder]));
    assert_eq!(e.kind, ErrorKind::Parent);
    assert!(e.to_string().contains("64 images"), "{e}");
}

#[test]
fn m02_the_same_file_under_two_names_is_no_chain() {
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.base("in/base.*", 1);
        let child = scene.child_saying("in/child.*", scene.link(&base, "twin.img", "/x/twin.img"));
        // By its id it would be the right one.
        set_content_id(format, &child, content_id(format, &base));
        let twin = scene.path("in/twin.img");
        std::fs::hard_link(&child, &twin).unwrap();
        for parents in [scene.path("in"), twin.clone(), scene.path("in/../in/./twin.img")] {
            let e = refused(&child, &within([&parents]));
            assert!(e.to_string().contains("circle"), "{e}");
            assert_eq!(e.kind, ErrorKind::Parent);
            let e = refused(&child, &OpenOptions { read_only: false, ..within([&parents]) });
            assert!(e.to_string().contains("circle"), "not taken for somebody else's: {e}");
        }
    }
}

#[test]
fn m02_a_chain_that_goes_in_a_circle_is_refused() {
    for format in FORMATS {
        let scene = Scene::new(format);
        let (one, two) = (Uuid::new_v4(), Uuid::new_v4());
        let link = |id, name: &str| formats::NewParentLink {
            id,
            next_id: None,
            relative: Some(name.into()),
            absolute: format!("/{name}"),
        };
        let a = scene.child_saying("in/a.img", link(two, "b.img"));
        let b = scene.child_saying("in/b.img", link(one, "a.img"));
        set_content_id(format, &a, one);
        set_content_id(format, &b, two);
        let options = OpenOptions { format: Some(format), ..within([&scene.path("in")]) };
        let e = refused(&a, &options);
        assert!(e.to_string().contains("circle"), "{e}");
        assert_eq!(e.path.file_name().unwrap(), "b.img", "the image whose parent is missing: {e}");
    }
}

#[test]
fn m03_no_link_is_followed() {
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.base("out/base.*", 7);
        std::fs::create_dir(scene.path("in/real")).unwrap();
        symlink(&base, scene.path("in/link.img")).unwrap();
        symlink(scene.path("out"), scene.path("in/folder")).unwrap();
        symlink("../../out", scene.path("in/real/up")).unwrap();
        let file_name = base.file_name().unwrap().to_str().unwrap().to_owned();
        let witness = Witness::of(&scene.path("out"));
        for (n, text) in ["link.img", &format!("folder/{file_name}"), &format!("real/up/{file_name}")]
            .into_iter()
            .enumerate()
        {
            let child = scene.child_saying(&format!("in/{n}.*"), scene.link(&base, text, "/nowhere"));
            witness.opened();
            let e = refused(&child, &within([&scene.path("in")]));
            assert_eq!(witness.opened(), Vec::<String>::new(), "{text}");
            assert_eq!(e.kind, ErrorKind::Parent, "{text}: {e}");
            assert!(e.to_string().contains("symbolic link") || text.contains('/'), "{text}: {e}");
        }
        // What the operator names is the operator's word, links or not.
        let child = scene.child("in/child.*", &base);
        for named in ["in/link.img", "in/folder"] {
            drop(open(&child, &within([&scene.path(named)])).unwrap());
        }
    }
}

#[test]
fn m03_a_link_that_takes_the_parents_place_again_and_again_never_leads_out() {
    let scene = Scene::new(Format::Vhd);
    let base = scene.base("in/base.*", 1);
    let child = scene.child("in/child.*", &base);
    // The same image by its id, so that only the way to it tells.
    let outside = scene.path("out/base.*");
    std::fs::copy(&base, &outside).unwrap();
    let link = scene.path("in/link");
    symlink(&outside, &link).unwrap();
    let options = OpenOptions { lock: false, ..within([&scene.path("in")]) };
    let witness = Witness::of(&scene.path("out"));
    let stop = AtomicBool::new(false);
    let (mut opened, mut kept_out) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                renameat2(AT_FDCWD, &base, AT_FDCWD, &link, RenameFlags::RENAME_EXCHANGE).unwrap();
            }
        });
        let until = std::time::Instant::now() + std::time::Duration::from_secs(2);
        while std::time::Instant::now() < until {
            match open(&child, &options) {
                Ok(_) => opened += 1,
                Err(e) => {
                    assert_eq!(e.kind, ErrorKind::Parent, "{e}");
                    kept_out += 1;
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(witness.opened(), Vec::<String>::new(), "after {opened} openings and {kept_out} refusals");
    assert!(opened > 0 && kept_out > 0, "{opened} {kept_out}");
}

#[test]
fn m04_what_is_no_regular_file_is_refused_without_waiting() {
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.base("out/base.*", 7);
        let made =
            |program: &str, args: &[&str]| Command::new(program).args(args).status().unwrap().success();
        let fifo = scene.path("in/fifo");
        assert!(made("mkfifo", &[fifo.to_str().unwrap()]));
        std::fs::create_dir(scene.path("in/folder")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(scene.path("in/socket")).unwrap();
        let mut cases = vec![("fifo", "FIFO"), ("folder", "directory"), ("socket", "cannot be opened")];
        let zero = scene.path("in/zero");
        if made("mknod", &[zero.to_str().unwrap(), "c", "1", "5"]) {
            cases.push(("zero", "character device"));
        } else {
            println!("SKIPPED: a device as a parent, since devices can't be made here");
        }
        for (name, expected) in cases {
            let child =
                scene.child_saying(&format!("in/{name}-child.*"), scene.link(&base, name, "/nowhere"));
            let e = refused(&child, &within([&scene.path("in")]));
            assert!(e.to_string().contains(expected), "{name}: {e}");
            assert_eq!(e.kind, ErrorKind::Parent);
        }
        // A magic link of /proc leads to a file without any path.
        let held = std::fs::File::open(&base).unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&held).to_string();
        let child = scene.child_saying("in/proc-child.*", scene.link(&base, &number, "/nowhere"));
        let e = refused(&child, &within([Path::new("/proc/self/fd")]));
        assert!(e.to_string().contains("symbolic link"), "{e}");
    }
}

#[test]
fn m05_what_a_smaller_parent_lacks_reads_as_zeroes() {
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.base("in/base.*", 9);
        let child = scene.path("in/child.*");
        let options = CreateOptions { virtual_size: 3 * SIZE, ..CreateOptions::on_parent(format, &base) };
        create(&child, &options).unwrap();
        let image = open(&child, &within([&scene.path("in")])).unwrap();
        assert_eq!(image.geometry().virtual_size, 3 * SIZE);
        let around = read_payload(&*image, SIZE - 512, 1024).unwrap();
        assert_eq!(around, [[9; 512], [0; 512]].concat());
        assert_eq!(read_payload(&*image, 3 * SIZE - 512, 512).unwrap(), [0; 512]);
    }
}

#[test]
fn m06_a_larger_parent_is_cut_off() {
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.base("in/base.*", 9);
        let name = base.file_name().unwrap().to_str().unwrap();
        let child = scene.child_like("in/child.*", scene.link(&base, name, "/x"), SIZE / 2, 512);
        let image = open(&child, &within([&scene.path("in")])).unwrap();
        assert_eq!(image.geometry().virtual_size, SIZE / 2);
        assert_eq!(read_payload(&*image, SIZE / 2 - 512, 512).unwrap(), [9; 512]);
        assert_eq!(image.next_extent(SIZE / 2).unwrap(), None);
    }
}

#[test]
fn m07_a_parent_with_other_sectors_is_refused() {
    let scene = Scene::new(Format::Vhdx);
    let base = scene.path("in/base.*");
    let options = CreateOptions { logical_sector_size: 4096, ..CreateOptions::new(Format::Vhdx, SIZE) };
    create(&base, &options).unwrap();
    let child = scene.child_saying("in/child.*", scene.link(&base, "base.vhdx", "/x"));
    let e = refused(&child, &within([&scene.path("in")]));
    assert!(e.to_string().contains("sectors of 4096 bytes"), "{e}");
    // Made as users make it, it has the parent's.
    let child = scene.child("in/second.*", &base);
    let image = open(&child, &within([&base])).unwrap();
    assert_eq!(image.geometry().logical_sector_size, 4096);
}

#[test]
fn m08_m09_a_parent_with_another_id_is_refused_and_both_are_named() {
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.base("in/base.*", 1);
        let child = scene.child("in/child.*", &base);
        let expected = content_id(format, &base);
        if format == Format::Vhdx {
            let image = open(&base, &OpenOptions::default()).unwrap();
            write_payload(&*image, 0, &[2; 512]).unwrap();
            image.close().unwrap();
        } else {
            set_content_id(format, &base, Uuid::new_v4());
        }
        let found = content_id(format, &base);
        assert_ne!(expected, found);
        for parents in [scene.path("in"), base.clone()] {
            let e = refused(&child, &within([&parents]));
            assert_eq!(e.kind, ErrorKind::Parent);
            for part in [expected.to_string(), found.to_string(), "changed".into(), "rebase".into()] {
                assert!(e.to_string().contains(&part), "{part}: {e}");
            }
        }
    }
}

#[test]
fn m09_the_time_at_which_a_vhd_saw_its_parent_is_not_looked_at() {
    let scene = Scene::new(Format::Vhd);
    let base = scene.base("in/base.*", 1);
    let child = scene.child("in/child.*", &base);
    let file = std::fs::File::options().read(true).write(true).open(&child).unwrap();
    patch_checked(&file, 512, 1024, 36, 56, &0x1234_5678u32.to_be_bytes());
    let image = open(&child, &within([&scene.path("in")])).unwrap();
    assert_eq!(read_payload(&*image, 0, 512).unwrap(), [1; 512]);
}

#[test]
fn m10_the_log_of_a_parent_is_replayed_in_memory() {
    let scene = Scene::new(Format::Vhdx);
    let base = scene.path("in/base.*");
    create(&base, &CreateOptions::new(Format::Vhdx, SIZE)).unwrap();
    let image = open(&base, &OpenOptions::default()).unwrap();
    write_payload(&*image, 0, &[6; 4096]).unwrap();
    image.commit().unwrap();
    drop(image);
    let child = scene.child("in/child.*", &base);
    let before = std::fs::read(&base).unwrap();
    assert_eq!(formats::info(&base, None).unwrap().state, formats::ImageState::DirtyLog);
    for read_only in [true, false] {
        let options = OpenOptions { read_only, ..within([&scene.path("in")]) };
        let image = open(&child, &options).unwrap();
        assert_eq!(read_payload(&*image, 0, 8192).unwrap(), [[6; 4096], [0; 4096]].concat());
    }
    assert!(std::fs::read(&base).unwrap() == before, "the parent was written to");
}

#[test]
fn m11_a_parent_that_somebody_writes_to_is_refused() {
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.base("in/base.*", 1);
        let child = scene.child("in/child.*", &base);
        let writer = open(&base, &OpenOptions::default()).unwrap();
        for parents in [scene.path("in"), base.clone()] {
            let e = refused(&child, &within([&parents]));
            assert_eq!(e.kind, ErrorKind::Locked);
            assert!(e.to_string().contains("open for writing elsewhere"), "{e}");
        }
        let e = create(scene.path("in/late.*"), &CreateOptions::on_parent(format, &base)).unwrap_err();
        assert_eq!(e.kind, ErrorKind::Locked, "its id is about to change: {e}");
        assert!(!scene.path("in/late.*").exists());
        drop(writer);
        let options = OpenOptions { read_only: false, ..within([&scene.path("in")]) };
        let first = open(&child, &options).unwrap();
        assert_eq!(refused(&child, &options).kind, ErrorKind::Locked, "the same image twice");
        drop(first);
        drop(open(&child, &options).unwrap());
    }
}

#[test]
fn m15_a_fixed_vhd_that_was_grown_from_outside_has_no_footer() {
    let scene = Scene::new(Format::Vhd);
    for (n, more) in [100, 512, 1 << 20].into_iter().enumerate() {
        let path = scene.path(&format!("in/{n}.*"));
        let fixed =
            CreateOptions { image_type: formats::ImageType::Fixed, ..CreateOptions::new(Format::Vhd, SIZE) };
        create(&path, &fixed).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(SIZE + 512 + more).unwrap();
        let e = refused(&path, &OpenOptions::read_only());
        assert_eq!(e.kind, ErrorKind::Corrupt, "{e}");
        assert!(e.to_string().contains("footer"), "{e}");
    }
}

#[test]
fn m16_m17_what_a_guest_writes_never_decides_what_its_disk_is() {
    let scene = Scene::new(Format::Vhd);
    let base = scene.base("out/secret.*", 7);
    let forged = std::fs::read(scene.child("out/forged.*", &base)).unwrap();
    let witness = Witness::of(&scene.path("out"));
    for (name, image_type) in [("disk.raw", Format::Raw), ("disk.vhd", Format::Vhd)] {
        let path = scene.path(&format!("in/{name}"));
        let fixed =
            CreateOptions { image_type: formats::ImageType::Fixed, ..CreateOptions::new(image_type, SIZE) };
        create(&path, &fixed).unwrap();
        let guest = open(&path, &OpenOptions::default()).unwrap();
        write_payload(&*guest, 0, &forged).unwrap();
        write_payload(&*guest, SIZE - 512, &forged[..512]).unwrap();
        guest.close().unwrap();
        drop(guest);
        witness.opened();
        let options = OpenOptions { parents: vec![scene.path("out")], ..OpenOptions::default() };
        let again = open(&path, &options).unwrap();
        assert_eq!((again.format(), again.image_type()), (image_type, formats::ImageType::Fixed));
        assert_eq!(read_payload(&*again, 0, 512).unwrap(), forged[..512]);
        assert_eq!(witness.opened(), Vec::<String>::new());
    }
    let nameless = scene.path("in/disk");
    std::fs::rename(scene.path("in/disk.raw"), &nameless).unwrap();
    assert_eq!(refused(&nameless, &OpenOptions::default()).kind, ErrorKind::WrongFormat);
}

#[test]
fn m18_hostile_path_texts_lead_nowhere() {
    const PLACE: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.base("out/base.*", 7);
        let outside = base.to_str().unwrap();
        let file_name = base.file_name().unwrap().to_str().unwrap();
        let texts = [
            "..\\..\\..\\..\\..\\..\\..\\..\\etc\\passwd".to_owned(),
            format!("..\\out\\{file_name}"),
            format!("..\\in\\..\\out\\{file_name}"),
            format!("../out/{file_name}"),
            "C:foo".into(),
            "\\\\?\\C:\\Windows\\x".into(),
            "\\\\server\\share\\x".into(),
            format!("%2e%2e\\out\\{file_name}"),
            "a/b\\c/..\\..\\..\\x".into(),
            "..".into(),
            ".".into(),
            "x\\..".into(),
            "..\u{2215}out\u{2215}base".into(),
            "\u{1b}[31mred\u{7}\n".into(),
            "$HOME\\~\\`id`".into(),
            "file://localhost/etc/passwd".into(),
        ];
        let witness = Witness::of(&scene.path("out"));
        for (n, text) in texts.iter().enumerate() {
            let child = scene.child_saying(&format!("in/{n}.*"), scene.link(&base, PLACE, "/nowhere/at/all"));
            // Filled up with slashes, which change nothing of a path.
            let mut units: Vec<u16> = text.encode_utf16().collect();
            assert!(units.len() <= PLACE.len(), "{text}");
            let split = units.iter().position(|u| *u == u16::from(b'\\') || *u == u16::from(b'/'));
            let fill = vec![u16::from(b'\\'); PLACE.len() - units.len()];
            match split {
                Some(at) => drop(units.splice(at..at, fill)),
                None => units = [".\\".encode_utf16().collect(), fill[2..].to_vec(), units].concat(),
            }
            replace_text(&child, PLACE, &units);
            witness.opened();
            let e = refused(&child, &within([&scene.path("in")]));
            assert_eq!(witness.opened(), Vec::<String>::new(), "{text:?}");
            assert_eq!(e.kind, ErrorKind::Parent, "{text:?}: {e}");
        }
        for (n, odd) in [0u16, 0xd800, 0xdc00].into_iter().enumerate() {
            let child =
                scene.child_saying(&format!("in/odd{n}.*"), scene.link(&base, PLACE, "/nowhere/at/all"));
            let mut units: Vec<u16> = PLACE.encode_utf16().collect();
            units[7] = odd;
            replace_text(&child, PLACE, &units);
            let e = refused(&child, &within([&scene.path("in")]));
            assert!([ErrorKind::Corrupt, ErrorKind::Parent].contains(&e.kind), "{e}");
        }
        // An absolute path is of no use either, unless it leads into what was named.
        let child = scene.child_saying("in/absolute.*", scene.link(&base, "missing", outside));
        witness.opened();
        refused(&child, &within([&scene.path("in")]));
        assert_eq!(witness.opened(), Vec::<String>::new());
        drop(open(&child, &within([scene.folder.path()])).unwrap());
    }
}

#[test]
fn m18_very_long_paths_are_told_and_cut_short() {
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.base("in/base.*", 7);
        let long = "x/".repeat(1900);
        let child = scene.child_saying("in/child.*", scene.link(&base, &format!("{long}y"), "/nowhere"));
        let e = refused(&child, &within([&scene.path("in")]));
        assert!(e.to_string().len() < 6000, "{}", e.to_string().len());
        let name = "n".repeat(250);
        let child = scene.child_saying("in/name.*", scene.link(&base, &format!("{name}{name}"), "/nowhere"));
        assert_eq!(refused(&child, &within([&scene.path("in")])).kind, ErrorKind::Parent);
    }
}

#[test]
fn a_wrong_image_of_the_right_name_does_not_hide_the_right_one() {
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.base("out/base.*", 7);
        let child = scene.child("in/child.*", &base);
        let impostor = scene.base("in/base.*", 8);
        std::fs::write(scene.path("junk.*"), "no image").unwrap();
        let places = [scene.path("junk.*"), scene.path("in"), scene.path("out")];
        let image = open(&child, &within([&places[0], &places[1], &places[2]])).unwrap();
        assert_eq!(read_payload(&*image, 0, 512).unwrap(), [7; 512]);
        let e = refused(&child, &within([&places[0], &places[1]]));
        for part in ["no sound image", impostor.to_str().unwrap()] {
            assert!(e.to_string().contains(part), "{part}: {e}");
        }
    }
}

#[test]
fn a_long_chain_over_several_folders_is_found_from_files_and_folders() {
    for format in FORMATS {
        let scene = Scene::new(format);
        std::fs::create_dir(scene.path("in/mid")).unwrap();
        let base = scene.base("out/base.*", 7);
        let first = scene.child("in/mid/first.*", &base);
        let second = scene.child("in/second.*", &first);
        let third = scene.child("in/mid/third.*", &second);
        let image = open(&third, &within([&scene.path("in"), &base])).unwrap();
        assert_eq!(image.as_chain().unwrap().layers().len(), 4);
        assert_eq!(read_payload(&*image, 0, 512).unwrap(), [7; 512]);
        drop(image);
        drop(open(&third, &within([&base, &first, &second])).unwrap());
        let e = refused(&third, &within([&scene.path("in")]));
        assert_eq!(e.path, first, "it is the first whose parent is missing");
        let gone = scene.path("in/gone");
        let e = refused(&third, &within([&gone]));
        assert!(e.to_string().contains("gone is not there"), "{e}");
        drop(open(&third, &within([&gone, &scene.path("in"), &base])).unwrap());
    }
}

#[test]
fn a_writable_child_keeps_its_notes_where_it_was_told() {
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.base("in/base.*", 7);
        let child = scene.child("in/child.*", &base);
        let notes = scene.path("notes");
        let kept = || -> Vec<PathBuf> {
            std::fs::read_dir(&notes).map(|d| d.map(|e| e.unwrap().path()).collect()).unwrap_or_default()
        };
        let options = OpenOptions {
            parents: vec![scene.path("in")],
            notes_dir: Some(notes.clone()),
            ..OpenOptions::default()
        };
        drop(open(&base, &options).unwrap());
        assert!(kept().is_empty(), "a dynamic image needs none");
        let image = open(&child, &options).unwrap();
        let [path] = &kept()[..] else { panic!("{:?}", kept()) };
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
        write_payload(&*image, 512, &[9; 512]).unwrap();
        drop(image); // As after SIGKILL: nothing was synced, and nothing closed.
        let image = open(&child, &options).unwrap();
        assert_eq!(read_payload(&*image, 0, 1536).unwrap(), [[7; 512], [9; 512], [7; 512]].concat());
        image.close().unwrap();
        drop(image);
        let image = open(&child, &within([&scene.path("in")])).unwrap();
        assert_eq!(read_payload(&*image, 512, 512).unwrap(), [9; 512], "after the close it needs no notes");
    }
}

#[test]
fn what_a_killed_process_has_noted_is_brought_home_before_anything_else() {
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.base("in/base.*", 7);
        let child = scene.child("in/child.*", &base);
        let notes = scene.path("notes");
        let options = OpenOptions {
            parents: vec![scene.path("in")],
            notes_dir: Some(notes.clone()),
            ..OpenOptions::default()
        };
        let reading = OpenOptions { read_only: true, ..options.clone() };
        assert!(!formats::settle(&child, None, &notes).unwrap(), "there is no folder yet");
        let image = open(&child, &options).unwrap();
        write_payload(&*image, 512, &[9; 512]).unwrap();
        assert_eq!(formats::settle(&child, None, &notes).unwrap_err().kind, ErrorKind::Locked);
        drop(image);
        let id = content_id(format, &child);
        let grandchild = scene.child("in/grandchild.*", &child);
        let e = refused(&child, &reading);
        assert_eq!(e.kind, ErrorKind::NeedsRepair);
        assert!(e.to_string().contains("killed"), "{e}");
        assert_eq!(refused(&grandchild, &reading).kind, ErrorKind::NeedsRepair, "its parent has notes");
        assert!(formats::settle(&child, None, &notes).unwrap());
        assert_eq!(content_id(format, &child), id, "its children still know it");
        assert!(!formats::settle(&child, None, &notes).unwrap(), "once is enough");
        for path in [&child, &grandchild] {
            let image = open(path, &reading).unwrap();
            assert_eq!(read_payload(&*image, 0, 1536).unwrap(), [[7; 512], [9; 512], [7; 512]].concat());
        }
        assert!(!formats::settle(&base, None, &notes).unwrap(), "no differencing image");
        assert!(formats::check(&child, None, false).unwrap().is_sound());
    }
}
