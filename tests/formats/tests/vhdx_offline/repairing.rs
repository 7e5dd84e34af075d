//! A repair that is interrupted leaves an image that holds the same, and can be done again.

use std::sync::Arc;

use formats::vhdx::{self, Vhdx};
use formats::{Image, ImageType, Storage};
use formats_tests::{CrashExplorer, SimStorage, write_payload};

use crate::image::{
    MIB, NOT_PRESENT, PARTIAL, Taken, UNMAPPED, ZERO, bytes, copy_of, create, own, place_block, set_entry,
    shared, sound,
};
use crate::patching::{patch, seal};

/// Explores the crashes of a repair.
fn explore(name: &str, sim: &Arc<SimStorage>, parent: &[u8]) {
    let repaired = |sim: &Arc<SimStorage>| {
        let report = vhdx::check(shared(sim), true).unwrap();
        assert!(report.is_sound(), "{report:?}");
        assert!(report.findings.iter().all(|f| f.repaired == f.repairable), "{report:#?}");
        sound(sim).unwrap();
        Taken::of(sim)
    };
    let sim = copy_of(sim);
    let clean = repaired(&copy_of(&sim));
    let (content, id) = (clean.content(parent), clean.data_write);
    repaired(&sim);
    let count = CrashExplorer::default().explore(&sim, |state| {
        let describe = || {
            let op = state.after.checked_sub(1).map(|n| sim.trace()[n].clone());
            format!("{name}: {:?} after {} ({op:?}), kept {}", state.kind, state.after, state.kept)
        };
        let report =
            vhdx::check(shared(&state.storage), false).unwrap_or_else(|e| panic!("{}: {e}", describe()));
        assert!(report.is_sound(), "{}: {:?}", describe(), report.findings.first());
        let taken = repaired(&state.storage);
        assert!(taken.content(parent) == content, "{}: the content changed", describe());
        assert_eq!(taken.data_write, id, "{}", describe());
    });
    println!("{name}: {count}");
}

fn spoilt(kind: ImageType, close: bool) -> Arc<SimStorage> {
    let sim = create(kind, 10 * MIB, 512);
    if kind == ImageType::Differencing {
        place_block(&sim, 1, PARTIAL, &bytes(1, MIB));
        own(&sim, 2048..2050);
    } else {
        let image = Vhdx::open(shared(&sim), false).unwrap();
        for block in 0..4 {
            write_payload(&image, block * MIB, &bytes(block as u8, 1024)).unwrap();
        }
        if close {
            image.close().unwrap();
        } else {
            image.commit().unwrap();
        }
    }
    sim
}

#[test]
fn mending_tables_and_entries_survives_every_crash() {
    for kind in [ImageType::Dynamic, ImageType::Differencing] {
        let sim = spoilt(kind, true);
        set_entry(&sim, 2, NOT_PRESENT);
        set_entry(&sim, 5, 4000 << 20 | ZERO);
        set_entry(&sim, 6, 4001 << 20 | NOT_PRESENT);
        set_entry(&sim, 7, 4002 << 20 | UNMAPPED);
        sim.write_at(&[0xee; 1024], sim.len().unwrap() + 512).unwrap();
        for torn in [0x30000, 0x40000] {
            let sim = copy_of(&sim);
            patch(&sim, torn + 300, &[1; 600]);
            explore(
                &format!("entries of a {kind} image and the table at {torn:#x}"),
                &sim,
                &bytes(0x50, 10 * MIB),
            );
        }
    }
}

#[test]
fn mending_headers_survives_every_crash() {
    for torn in [0x10000, 0x20000] {
        let sim = spoilt(ImageType::Dynamic, true);
        patch(&sim, torn + 512, &[7; 512]);
        explore(&format!("the header at {torn:#x}"), &sim, &[]);
        let sim = spoilt(ImageType::Dynamic, true);
        patch(&sim, torn + 8, &0_u64.to_le_bytes());
        patch(&sim, torn + 32, &[7; 16]);
        seal(&sim, torn, 4096);
        explore(&format!("the old header at {torn:#x}"), &sim, &[]);
    }
}

#[test]
fn replaying_a_log_and_mending_the_rest_survives_every_crash() {
    let sim = spoilt(ImageType::Dynamic, false);
    explore("a log", &sim, &[]);
    patch(&sim, 0x40000 + 300, &[1; 600]);
    explore("a log and a region table", &sim, &[]);
}

/// The header's FileWriteGuid.
fn file_write(sim: &SimStorage) -> [u8; 16] {
    let number = |at: u64| {
        let mut raw = [0; 8];
        sim.read_at(&mut raw, at + 8).unwrap();
        u64::from_le_bytes(raw)
    };
    let at = if number(0x20000) > number(0x10000) { 0x20000 } else { 0x10000 };
    let mut id = [0; 16];
    sim.read_at(&mut id, at + 16).unwrap();
    id
}

#[test]
fn a_child_that_was_not_closed_keeps_the_id_that_notes_are_bound_to() {
    let sim = create(ImageType::Differencing, 4 * MIB, 512);
    let image = Vhdx::open_layer(shared(&sim), &formats::LayerOptions::default()).unwrap();
    write_payload(&image, 0, &bytes(1, 1024)).unwrap();
    let id = file_write(&sim);
    let killed = copy_of(&sim);
    image.close().unwrap();
    drop(image);
    for what in 0..3 {
        let sim = copy_of(&killed);
        match what {
            0 => drop(vhdx::check(shared(&sim), true).unwrap()),
            1 => drop(vhdx::compact(&shared(&sim), &mut |_, _| ()).unwrap()),
            _ => vhdx::relink(&shared(&sim), &crate::image::link("other.vhdx")).unwrap(),
        }
        assert_eq!(file_write(&sim), id, "{what}");
        // Its blocks stay where the notes will look for them.
        assert_eq!(Taken::of(&sim).entry(0) & 7, PARTIAL, "{what}");
    }
    for size in [MIB, 6 * MIB] {
        let before = killed.contents().fingerprint();
        let refused = vhdx::resize(&shared(&killed), size, true).unwrap_err();
        assert_eq!(refused.kind, formats::ErrorKind::NeedsRepair);
        assert_eq!(killed.contents().fingerprint(), before, "what is refused is left alone");
    }
    vhdx::resize(&shared(&sim), 6 * MIB, false).unwrap();
    assert_ne!(file_write(&sim), id, "closed, it begins a session of its own");
}
