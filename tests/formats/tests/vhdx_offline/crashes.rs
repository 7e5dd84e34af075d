//! Every crash state of these operations opens, holds the old disk or the new one, and the operation can be done again.

use std::sync::Arc;

use formats::vhdx::{self, Vhdx, compact, relink, resize};
use formats::{Image, ImageError, ImageType, Storage};
use formats_tests::{CrashCount, CrashExplorer, SimStorage, write_payload};

use crate::image::{
    FULL, MIB, PARTIAL, Taken, UNMAPPED, bytes, copy_of, create, link, own, place_block, set_entry, shared,
    sound,
};

/// What is looked at after a crash.
#[derive(Debug, PartialEq, Eq, Clone)]
struct Seen {
    content: Vec<u8>,
    locator: Vec<u8>,
}

fn seen(sim: &SimStorage, parent: &[u8]) -> Seen {
    let taken = Taken::of(sim);
    Seen { content: taken.content(parent), locator: taken.locator }
}

/// Explores the crashes of an operation, whose results before and after are known, and does it again after each.
fn explore(
    name: &str,
    sim: &Arc<SimStorage>,
    parent: &[u8],
    operation: &dyn Fn(&Arc<SimStorage>) -> Result<(), ImageError>,
) -> CrashCount {
    sim.forget_trace();
    let recovered = |from: &SimStorage| {
        let sim = copy_of(from);
        let report = vhdx::check(shared(&sim), true).unwrap();
        assert!(report.is_sound(), "{report:?}");
        sim
    };
    let old = seen(&recovered(sim), parent);
    operation(sim).unwrap();
    let new = seen(sim, parent);
    sound(sim).unwrap();
    let mut outcomes = [0, 0];
    let count = CrashExplorer::default().explore(sim, |state| {
        let describe = || {
            let op = state.after.checked_sub(1).map(|n| sim.trace()[n].clone());
            format!("{name}: {:?} after {} ({op:?}), kept {}", state.kind, state.after, state.kept)
        };
        let report =
            vhdx::check(shared(&state.storage), false).unwrap_or_else(|e| panic!("{}: {e}", describe()));
        assert!(report.is_sound(), "{}: {:?}", describe(), report.findings.first());
        let now = seen(&recovered(&state.storage), parent);
        assert!(now == old || now == new, "{}: neither old nor new", describe());
        outcomes[usize::from(now == new)] += 1;
        operation(&state.storage).unwrap_or_else(|e| panic!("{}: again: {e}", describe()));
        assert!(seen(&state.storage, parent) == new, "{}: done again it gives something else", describe());
        sound(&state.storage).unwrap_or_else(|e| panic!("{}: afterwards: {e}", describe()));
    });
    println!("{name}: {count}; {} old, {} new", outcomes[0], outcomes[1]);
    assert!(old == new || outcomes.iter().all(|n| *n > 0));
    count
}

fn written(kind: ImageType, size: u64, close: bool) -> Arc<SimStorage> {
    let sim = create(kind, size, 512);
    let image = Vhdx::open(shared(&sim), false).unwrap();
    write_payload(&image, MIB + 512, &bytes(1, 1024)).unwrap();
    write_payload(&image, size - 1024, &bytes(2, 1024)).unwrap();
    if close {
        image.close().unwrap();
    } else {
        image.commit().unwrap();
    }
    sim
}

#[test]
fn growing_survives_every_crash() {
    for kind in [ImageType::Dynamic, ImageType::Fixed] {
        for close in [true, false] {
            let sim = written(kind, 3 * MIB + 4096, close);
            let name = format!("growing a {kind} image, closed: {close}");
            explore(&name, &sim, &[], &|sim| resize(&shared(sim), 6 * MIB, false));
        }
    }
}

#[test]
fn growing_a_child_survives_every_crash() {
    let parent = bytes(0x50, 8 * MIB);
    for partial in [true, false] {
        let sim = create(ImageType::Differencing, 2 * MIB + 4096, 512);
        place_block(&sim, 0, FULL, &bytes(1, MIB));
        if partial {
            place_block(&sim, 2, PARTIAL, &bytes(2, MIB));
            own(&sim, 2 * 2048 + 3..2 * 2048 + 6);
        }
        let name = format!("growing a child, its last block partially present: {partial}");
        explore(&name, &sim, &parent, &|sim| resize(&shared(sim), 5 * MIB, false));
    }
}

#[test]
fn moving_the_table_survives_every_crash() {
    let size = 126_976 * MIB;
    let sim = create(ImageType::Differencing, size, 512);
    let before = Taken::of(&sim).bat;
    sim.forget_trace();
    resize(&shared(&sim), size + 20 * MIB, false).unwrap();
    let mut count = [0, 0];
    let explored = CrashExplorer::default().explore(&sim, |state| {
        vhdx::check(shared(&state.storage), true).unwrap();
        sound(&state.storage).unwrap();
        let taken = Taken::of(&state.storage);
        let moved = taken.bat != before;
        assert_eq!(taken.size, if moved { size + 20 * MIB } else { size });
        count[usize::from(moved)] += 1;
        resize(&shared(&state.storage), size + 20 * MIB, false).unwrap();
        let taken = Taken::of(&state.storage);
        assert_eq!((taken.size, taken.bat.1), (size + 20 * MIB, 2 * MIB));
        assert!((126_976..126_996).all(|block| taken.entry(block) == 2));
        sound(&state.storage).unwrap();
    });
    println!("moving the table: {explored}; {count:?}");
    assert!(count.iter().all(|n| *n > 0));
}

#[test]
fn shrinking_survives_every_crash() {
    let sim = create(ImageType::Dynamic, 8 * MIB, 512);
    let image = Vhdx::open(shared(&sim), false).unwrap();
    for at in [MIB, 3 * MIB, 5 * MIB] {
        write_payload(&image, at, &bytes(1, 1024)).unwrap();
    }
    write_payload(&image, 5 * MIB, &[0; 1024]).unwrap();
    image.close().unwrap();
    explore("shrinking", &sim, &[], &|sim| resize(&shared(sim), 3 * MIB + 4096, true));
}

#[test]
fn compacting_survives_every_crash() {
    let sim = create(ImageType::Dynamic, 12 * MIB, 512);
    let image = Vhdx::open(shared(&sim), false).unwrap();
    for block in 0..8 {
        let data = if block % 3 == 0 { vec![0; 2048] } else { bytes(block as u8, 2048) };
        write_payload(&image, block * MIB + 4096, &data).unwrap();
    }
    image.close().unwrap();
    set_entry(&sim, 5, 0);
    explore("compacting", &sim, &[], &|sim| compact(&shared(sim), &mut |_, _| ()).map(drop));
}

#[test]
fn compacting_a_child_survives_every_crash() {
    let parent = bytes(0x50, 8 * MIB);
    let sim = create(ImageType::Differencing, 8 * MIB, 512);
    let sparse = |tag| [vec![0; 8192], bytes(tag, 1024), vec![0; (MIB - 9216) as usize]].concat();
    place_block(&sim, 0, FULL, &vec![0; MIB as usize]);
    place_block(&sim, 1, UNMAPPED, &sparse(1));
    place_block(&sim, 2, PARTIAL, &sparse(2));
    own(&sim, 2 * 2048 + 16..2 * 2048 + 17);
    place_block(&sim, 4, FULL, &sparse(4));
    explore("compacting a child", &sim, &parent, &|sim| compact(&shared(sim), &mut |_, _| ()).map(drop));
}

#[test]
fn relinking_survives_every_crash() {
    let sim = create(ImageType::Differencing, 2 * MIB, 512);
    explore("relinking", &sim, &[], &|sim| relink(&shared(sim), &link("elsewhere/another-base.vhdx")));
    let deep = "folder/".repeat(300);
    explore("relinking far away", &sim, &[], &|sim| relink(&shared(sim), &link(&deep)));
}

#[test]
fn a_failing_file_leaves_the_old_disk_or_the_new_one() {
    let mut failures = 0;
    for n in 0.. {
        let sim = written(ImageType::Dynamic, 3 * MIB + 4096, n % 2 == 0);
        set_entry_of_a_hole(&sim);
        let old = seen(&closed(&sim), &[]);
        sim.inject(formats_tests::Fault {
            after: n / 2,
            lasting: n % 4 > 1,
            error: std::io::ErrorKind::StorageFull,
            partial: n % 3 == 0,
        });
        let done = resize(&shared(&sim), 6 * MIB, false)
            .and_then(|()| compact(&shared(&sim), &mut |_, _| ()).map(drop));
        sim.clear_fault();
        let now = seen(&closed(&sim), &[]);
        let grown = [old.content.clone(), vec![0; (3 * MIB - 4096) as usize]].concat();
        assert!(now.content == old.content || now.content == grown, "failure {n}");
        resize(&shared(&sim), 6 * MIB, false).unwrap();
        compact(&shared(&sim), &mut |_, _| ()).unwrap();
        assert!(seen(&sim, &[]).content == grown);
        sound(&sim).unwrap();
        match done {
            Ok(()) if n > 100 => break,
            Ok(()) => {}
            Err(_) => failures += 1,
        }
        if n > 400 {
            break;
        }
    }
    println!("{failures} failures");
    assert!(failures > 40);
}

/// The image with its log replayed.
fn closed(sim: &SimStorage) -> Arc<SimStorage> {
    let sim = copy_of(sim);
    vhdx::check(shared(&sim), true).unwrap();
    sim
}

/// Leaves a hole before the last block, when the image is closed.
fn set_entry_of_a_hole(sim: &SimStorage) {
    let len = sim.len().unwrap();
    sim.set_len(len + MIB).unwrap();
    sim.write_at(&[0xee; 512], len).unwrap();
}
