//! Quick migration: a machine in a file, which is restored once.

mod migrate_fake;

use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;

use migrate_fake::*;
use shim::machine::SourceMachine;
use shim::migrate::file::RESTORED_SUFFIX;
use shim::migrate::{Compression, restore, save};

fn files(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("directory").flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn a_machine_goes_on_elsewhere_from_a_file_once() {
    for compression in [Compression::None, Compression::Lz4, Compression::Zstd] {
        let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
        let source = FakeSource::new(&world, 8 << 20, Log::Classic, 2000);
        let path = dir.path().join("vm.saved");
        let host = FakeHost { world: world.clone(), incompatible: false };
        let report = save(&source, &path, compression).expect("saved");
        assert_eq!((world.runs(), source.ended()), ('-', true));
        assert!(report.pages > 900, "{report:?}");
        assert_eq!(report.bytes, std::fs::metadata(&path).expect("there").len());
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        let restored = restore(&path, &host).expect("restored");
        assert_eq!(world.runs(), 't');
        assert!(world.announced.load(SeqCst) && world.devices_started.load(SeqCst));
        assert_same(source.ram(), restored.machine.ram());
        let left = files(dir.path());
        assert!(left.len() == 1 && left[0].ends_with(RESTORED_SUFFIX), "{left:?}");
        assert!(restore(&path, &host).is_err(), "a second time");
        world.assert_rules_kept();
    }
}

#[test]
fn whatever_fails_while_saving_the_machine_goes_on_and_no_file_is_left() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 4 << 20, Log::Classic, 500);
    let path = dir.path().join("vm.saved");
    for method in ["pause", "save", "release_storage"] {
        world.fail(method);
        let error = format!("{:#}", save(&source, &path, Compression::None).expect_err(method));
        assert!(error.contains("was told to fail"), "{error}");
        world.heal();
        source.assert_untouched();
        assert!(files(dir.path()).is_empty());
    }
    let nowhere = dir.path().join("no/where");
    let error = format!("{:#}", save(&source, &nowhere, Compression::None).expect_err("no directory"));
    assert!(error.contains("it goes on"), "{error}");
    source.assert_untouched();
    std::fs::write(&path, "mine").expect("written");
    assert!(save(&source, &path, Compression::None).is_err());
    assert_eq!(std::fs::read(&path).expect("kept"), b"mine");
    source.assert_untouched();
    world.assert_rules_kept();
}

#[test]
fn whatever_fails_while_restoring_the_next_one_may_try() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 4 << 20, Log::Classic, 500);
    let path = dir.path().join("vm.saved");
    save(&source, &path, Compression::Lz4).expect("saved");
    let host = FakeHost { world: world.clone(), incompatible: false };
    for method in ["create", "restore", "take_storage", "target resume"] {
        world.fail(method);
        let error = format!("{:#}", restore(&path, &host).err().expect(method));
        assert!(error.contains(&format!("{method} was told to fail")), "{error}");
        world.heal();
        assert_eq!(world.runs(), '-');
        assert_eq!(files(dir.path()), ["vm.saved"]);
    }
    let picky = FakeHost { world: world.clone(), incompatible: true };
    let error = format!("{:#}", restore(&path, &picky).err().expect("incompatible"));
    assert!(error.contains("there is no memory; add some"), "{error}");
    let restored = restore(&path, &host).expect("restored");
    assert_same(source.ram(), restored.machine.ram());
    world.assert_rules_kept();
}

#[test]
fn a_name_can_be_used_again_and_what_others_left_there_is_not_touched() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("vm.saved");
    // Somebody who could read along put it there.
    std::fs::write(dir.path().join("vm.saved.unfinished"), "mine").expect("written");
    for _ in 0..2 {
        let world = World::new();
        let source = FakeSource::new(&world, 4 << 20, Log::Classic, 500);
        save(&source, &path, Compression::None).expect("saved");
        let host = FakeHost { world: world.clone(), incompatible: false };
        drop(restore(&path, &host).expect("restored"));
    }
    assert_eq!(std::fs::read(dir.path().join("vm.saved.unfinished")).expect("kept"), b"mine");
    assert_eq!(files(dir.path()).len(), 3);
}

#[test]
fn a_file_keeps_its_name_even_if_the_storage_cannot_be_given_back() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 4 << 20, Log::Classic, 500);
    let path = dir.path().join("vm.saved");
    save(&source, &path, Compression::None).expect("saved");
    let host = FakeHost { world: world.clone(), incompatible: false };
    world.fail("target resume");
    world.fail("return_storage");
    let error = format!("{:#}", restore(&path, &host).err().expect("fails"));
    assert!(error.contains("target resume was told to fail") && error.contains("return_storage"), "{error}");
    assert_eq!(files(dir.path()), ["vm.saved"]);
}

#[test]
fn a_damaged_file_is_refused_and_keeps_its_name() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 4 << 20, Log::Classic, 0);
    source.ram().discard(5, source.ram().pages() - 5).expect("discarded");
    let path = dir.path().join("vm.saved");
    save(&source, &path, Compression::Lz4).expect("saved");
    let host = FakeHost { world: world.clone(), incompatible: false };
    let good = std::fs::read(&path).expect("read");
    let refused = |content: &[u8], what: &str| {
        std::fs::write(&path, content).expect("written");
        let error =
            format!("{:#}", restore(&path, &host).err().unwrap_or_else(|| panic!("{what} was taken")));
        assert!(error.contains("damaged") || error.contains("no saved machine"), "{what}: {error}");
        assert_eq!(files(dir.path()), ["vm.saved"], "{what}");
        assert_eq!(world.runs(), '-');
    };
    for at in (0..good.len()).step_by(7) {
        let mut content = good.clone();
        content[at] ^= 0x10;
        refused(&content, &format!("byte {at} of {} changed", good.len()));
    }
    for len in (0..good.len()).step_by(13) {
        refused(&good[..len], &format!("cut at {len}"));
    }
    refused(&[&good[..], b"x"].concat(), "a byte more");
    std::fs::write(&path, &good).expect("written");
    restore(&path, &host).expect("restored");
}

#[test]
fn of_two_that_restore_at_once_one_runs_the_machine() {
    for _ in 0..10 {
        let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
        let source = FakeSource::new(&world, 2 << 20, Log::Classic, 0);
        let path = dir.path().join("vm.saved");
        save(&source, &path, Compression::None).expect("saved");
        let host = FakeHost { world: world.clone(), incompatible: false };
        let restored: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..2).map(|_| scope.spawn(|| restore(&path, &host))).collect();
            threads.into_iter().filter_map(|thread| thread.join().expect("no panic").ok()).collect()
        });
        assert_eq!(restored.len(), 1);
        world.assert_rules_kept();
    }
}
