//! Making children by path, and giving them parents anew: what goes, what is refused, and what stays as it was.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod gate;

use formats::{
    CreateOptions, ErrorKind, Format, ImageType, OpenOptions, RebaseOptions, create, info, info_with_parents,
    open, rebase,
};
use formats_tests::{read_payload, write_payload};
use gate::*;
use uuid::Uuid;

fn accept() -> RebaseOptions {
    RebaseOptions { accept_changed_parent: true, ..RebaseOptions::default() }
}

#[test]
fn a_child_has_its_parents_sizes_unless_it_is_larger() {
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.path("in/base.*");
        let options = CreateOptions { block_size: Some(1 << 20), ..CreateOptions::new(format, SIZE) };
        create(&base, &options).unwrap();
        let child = scene.child("in/child.*", &base);
        let (ours, theirs) = (info(&child, None).unwrap(), info(&base, None).unwrap());
        assert_eq!(ours.image_type, ImageType::Differencing);
        assert_eq!(
            (ours.virtual_size, ours.block_size, ours.logical_sector_size, ours.physical_sector_size),
            (theirs.virtual_size, theirs.block_size, theirs.logical_sector_size, theirs.physical_sector_size)
        );
        let wrong = [
            CreateOptions { virtual_size: SIZE - 512, ..CreateOptions::on_parent(format, &base) },
            CreateOptions { logical_sector_size: 4096, ..CreateOptions::on_parent(format, &base) },
            CreateOptions { image_type: ImageType::Dynamic, ..CreateOptions::on_parent(format, &base) },
            CreateOptions { parent: None, virtual_size: SIZE, ..CreateOptions::on_parent(format, &base) },
            CreateOptions::on_parent(Format::Raw, &base),
        ];
        for options in wrong {
            let path = scene.path("in/wrong.*");
            let e = create(&path, &options).unwrap_err();
            assert_eq!(e.kind, ErrorKind::InvalidParameter, "{options:?}: {e}");
            assert!(!path.exists(), "{options:?} left a file");
        }
    }
}

#[test]
fn a_parent_whose_path_an_image_cannot_say_is_refused() {
    use std::os::unix::ffi::OsStrExt;
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.base("in/base.*", 1);
        for name in [&b"back\\slash"[..], b"not-\xff-utf8"] {
            let odd = scene.path("in").join(std::ffi::OsStr::from_bytes(name));
            std::fs::copy(&base, &odd).unwrap();
            let e = create(scene.path("in/child.*"), &CreateOptions::on_parent(format, &odd)).unwrap_err();
            assert_eq!(e.kind, ErrorKind::InvalidParameter, "{e}");
            assert!(!scene.path("in/child.*").exists());
        }
    }
}

#[test]
fn a_child_whose_parent_has_moved_is_made_whole_by_a_rebase() {
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.base("in/base.*", 5);
        let child = scene.child("in/child.*", &base);
        let write = |parents: Vec<_>| {
            let image = open(&child, &OpenOptions { parents, ..OpenOptions::default() }).unwrap();
            write_payload(&*image, 1 << 20, &[6; 4096]).unwrap();
            image.close().unwrap();
        };
        write(vec![scene.path("in")]);
        let moved = scene.path("out/moved base.*");
        std::fs::rename(&base, &moved).unwrap();
        refused(&child, &within([scene.folder.path()]));
        let done = rebase(&child, &moved, &RebaseOptions::default()).unwrap();
        assert!(!done.parent_changed());
        assert_eq!(done.id, content_id(format, &moved));
        let image = open(&child, &within([scene.folder.path()])).unwrap();
        assert_eq!(read_payload(&*image, (1 << 20) - 512, 1024).unwrap(), [[5; 512], [6; 512]].concat());
        drop(image);
        let told = info_with_parents(&child, None, &[scene.path("out")]).unwrap();
        assert_eq!((told.parents.len(), told.parents[0].found), (1, true), "{told:?}");
        write(vec![scene.path("out")]);
    }
}

#[test]
fn a_refused_rebase_changes_nothing() {
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.base("in/base.*", 5);
        let child = scene.child("in/child.*", &base);
        let grandchild = scene.child("in/grandchild.*", &child);
        let other = scene.base("in/other.*", 6);
        let orphan = scene.child("in/orphan.*", &other);
        std::fs::hard_link(&child, scene.path("in/alias.*")).unwrap();
        let before = std::fs::read(&child).unwrap();
        let plain = RebaseOptions::default();
        let with_folder = RebaseOptions { parents: vec![scene.path("in")], ..accept() };
        let cases = [
            (&other, &plain, ErrorKind::Parent, "accept-changed-parent"),
            (&child, &with_folder, ErrorKind::InvalidParameter, "own parent"),
            (&scene.path("in/alias.*"), &with_folder, ErrorKind::InvalidParameter, "own parent"),
            (&grandchild, &with_folder, ErrorKind::Parent, "circle"),
            (&orphan, &accept(), ErrorKind::Parent, "--parents"),
            (&scene.path("in/nowhere.*"), &accept(), ErrorKind::Io, "check the path"),
            (&scene.path("in"), &accept(), ErrorKind::Unsupported, "directory"),
        ];
        for (parent, options, kind, part) in cases {
            let e = rebase(&child, parent, options).unwrap_err();
            assert_eq!(e.kind, kind, "{}: {e}", parent.display());
            assert!(e.to_string().contains(part), "{}: {e}", parent.display());
        }
        let writer = open(&other, &OpenOptions::default()).unwrap();
        assert_eq!(rebase(&child, &other, &accept()).unwrap_err().kind, ErrorKind::Locked);
        drop(writer);
        let user = open(&child, &within([&base])).unwrap();
        assert_eq!(rebase(&child, &base, &plain).unwrap_err().kind, ErrorKind::Locked, "somebody reads it");
        drop(user);
        let e = rebase(&base, &other, &accept()).unwrap_err();
        assert_eq!(e.kind, ErrorKind::InvalidParameter, "a base has no parent: {e}");
        assert!(std::fs::read(&child).unwrap() == before, "the child was changed");
        let whole = RebaseOptions { parents: vec![scene.path("in")], ..accept() };
        assert!(rebase(&child, &orphan, &whole).unwrap().parent_changed());
        let image = open(&child, &within([&scene.path("in")])).unwrap();
        assert_eq!(read_payload(&*image, 0, 512).unwrap(), [6; 512]);
        assert_eq!(image.as_chain().unwrap().layers().len(), 3);
    }
}

#[test]
fn m07_a_rebase_onto_other_sectors_or_another_format_is_refused() {
    let scene = Scene::new(Format::Vhdx);
    let base = scene.base("in/base.*", 5);
    let child = scene.child("in/child.*", &base);
    let large = scene.path("in/large.*");
    let options = CreateOptions { logical_sector_size: 4096, ..CreateOptions::new(Format::Vhdx, SIZE) };
    create(&large, &options).unwrap();
    let vhd = scene.path("in/other.vhd");
    create(&vhd, &CreateOptions::new(Format::Vhd, SIZE)).unwrap();
    let raw = scene.path("in/other.raw");
    create(&raw, &CreateOptions::new(Format::Raw, SIZE)).unwrap();
    for (parent, part) in [(&large, "sectors of 4096"), (&vhd, "own format"), (&raw, "own format")] {
        let e = rebase(&child, parent, &accept()).unwrap_err();
        assert_eq!(e.kind, ErrorKind::InvalidParameter, "{e}");
        assert!(e.to_string().contains(part), "{e}");
        let e = create(scene.path("in/new"), &CreateOptions::on_parent(Format::Vhd, parent));
        assert_eq!(e.is_ok(), parent == &vhd, "{e:?}");
        let _ = std::fs::remove_file(scene.path("in/new"));
    }
}

#[test]
fn m08_a_parent_that_was_changed_is_taken_only_on_the_operators_word() {
    for format in FORMATS {
        let scene = Scene::new(format);
        let base = scene.base("in/base.*", 5);
        let child = scene.child("in/child.*", &base);
        set_content_id(format, &base, Uuid::new_v4());
        let e = rebase(&child, &base, &RebaseOptions::default()).unwrap_err();
        assert_eq!(e.kind, ErrorKind::Parent);
        assert!(e.to_string().contains("mixture"), "{e}");
        refused(&child, &within([&scene.path("in")]));
        assert!(rebase(&child, &base, &accept()).unwrap().parent_changed());
        drop(open(&child, &within([&scene.path("in")])).unwrap());
    }
}
