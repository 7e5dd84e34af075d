//! What a killed process has noted of a child outlives an opening that was killed too, and whatever changes the closed file.

use std::sync::Arc;

use formats::vhdx::{self, CreateParams, Vhdx};
use formats::{Image, ImageType, LayerOptions, NewParentLink, NotesFile, Storage};
use formats_tests::{SimStorage, write_payload};
use uuid::Uuid;

const MIB: u64 = 1 << 20;

fn child() -> Arc<SimStorage> {
    let sim = SimStorage::new();
    let link = NewParentLink {
        id: Uuid::new_v4(),
        next_id: None,
        relative: Some("parent.vhdx".into()),
        absolute: "/parent.vhdx".into(),
    };
    let params = CreateParams {
        image_type: ImageType::Differencing,
        virtual_size: 16 * MIB,
        block_size: Some(MIB as u32),
        logical_sector_size: 512,
        physical_sector_size: 4096,
        log_size: Some(MIB as u32),
        parent: Some(link),
    };
    vhdx::create(&*sim, &params).expect("created");
    sim
}

fn open(sim: &Arc<SimStorage>, notes: &Arc<SimStorage>, boot_id: Uuid) -> Vhdx {
    let notes = NotesFile { storage: notes.clone(), boot_id };
    let options = LayerOptions { notes: Some(notes), ..LayerOptions::default() };
    Vhdx::open_layer(sim.clone(), &options).expect("opens")
}

/// The file as the death of the process leaves it.
fn killed(sim: &Arc<SimStorage>) -> Arc<SimStorage> {
    SimStorage::from_disk(sim.contents())
}

#[test]
fn an_acknowledged_write_survives_two_deaths_and_a_change_of_the_closed_file() {
    for name in ["check", "compact", "resize"] {
        for flushed in [false, true] {
            let (mut sim, mut notes, boot_id) = (child(), SimStorage::new(), Uuid::new_v4());
            let image = open(&sim, &notes, boot_id);
            write_payload(&image, 5 * MIB, &[1; 4096]).expect("written");
            if flushed {
                image.commit().expect("committed");
            }
            write_payload(&image, 5 * MIB + 8192, &[2; 512]).expect("written");
            write_payload(&image, 9 * MIB, &vec![3; MIB as usize]).expect("written");
            (sim, notes) = (killed(&sim), killed(&notes));
            drop(image);
            // A process that dies before it changes anything.
            drop(open(&sim, &notes, boot_id));
            (sim, notes) = (killed(&sim), killed(&notes));
            let storage: Arc<dyn Storage> = sim.clone();
            match name {
                "check" => vhdx::check(storage, true).map(drop),
                "compact" => vhdx::compact(&storage, &mut |_, _| ()).map(|_| ()),
                _ => vhdx::resize(&storage, 32 * MIB, false),
            }
            .unwrap_or_else(|e| panic!("{name}: {e}"));
            let image = open(&sim, &notes, boot_id);
            for (offset, len, byte) in [(5 * MIB, 4096, 1), (5 * MIB + 8192, 512, 2), (9 * MIB, MIB, 3)] {
                let mut data = vec![0; len as usize];
                // What is not the child's own can't be read without its parent.
                let read = formats::read_payload(&image, offset, &mut data);
                read.unwrap_or_else(|e| panic!("{name}: what was written at {offset} is lost: {e}"));
                assert!(data.iter().all(|b| *b == byte), "{name}: what was written at {offset} is lost");
            }
        }
    }
}
