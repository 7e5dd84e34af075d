//! A resize that has failed is done again, and then it is durable, whatever the first attempt had left unsynced.

use std::sync::Arc;

use formats::{ErrorKind, ImageType, Storage};
use formats_tests::{Fault, SimDisk, SimStorage};

const SIZE: u64 = 4 << 20;

type Resize = fn(&Arc<dyn Storage>, u64) -> Result<(), formats::ImageError>;
type Size = fn(&Arc<dyn Storage>) -> u64;

fn vhd(image_type: ImageType) -> Arc<SimStorage> {
    let sim = SimStorage::new();
    let params =
        formats::vhd::CreateParams { image_type, virtual_size: SIZE, block_size: None, parent: None };
    formats::vhd::create(&*sim, &params).expect("created");
    sim
}

fn vhdx() -> Arc<SimStorage> {
    let sim = SimStorage::new();
    let params = formats::vhdx::CreateParams {
        image_type: ImageType::Dynamic,
        virtual_size: SIZE,
        block_size: None,
        logical_sector_size: 512,
        physical_sector_size: 4096,
        log_size: None,
        parent: None,
    };
    formats::vhdx::create(&*sim, &params).expect("created");
    sim
}

#[test]
fn what_fails_and_is_done_again_survives_a_power_cut() {
    let of_vhd: (Resize, Size) = (
        |storage, size| formats::vhd::resize(storage, size, true),
        |storage| {
            use formats::Image;
            formats::vhd::Vhd::open(storage.clone(), true, false).expect("opens").geometry().virtual_size
        },
    );
    let of_vhdx: (Resize, Size) = (
        |storage, size| formats::vhdx::resize(storage, size, true),
        |storage| {
            use formats::Image;
            formats::vhdx::Vhdx::open(storage.clone(), true).expect("opens").geometry().virtual_size
        },
    );
    let kinds = [
        ("fixed VHD", vhd(ImageType::Fixed), of_vhd),
        ("dynamic VHD", vhd(ImageType::Dynamic), of_vhd),
        ("VHDX", vhdx(), of_vhdx),
    ];
    for (name, made, (resize, size_of)) in kinds {
        for new in [SIZE * 2, SIZE / 2] {
            let (mut failures, mut after) = (0, 0);
            loop {
                let sim = SimStorage::from_disk(made.contents());
                let storage: Arc<dyn Storage> = sim.clone();
                sim.inject(Fault { after, lasting: false, error: std::io::ErrorKind::Other, partial: false });
                let first = resize(&storage, new);
                sim.clear_fault();
                let Err(error) = first else { break };
                assert_eq!(error.kind, ErrorKind::Io, "{name}: {error}");
                failures += 1;
                resize(&storage, new).expect("nothing fails any more");
                let left: SimDisk = sim.durable_contents();
                let left: Arc<dyn Storage> = SimStorage::from_disk(left);
                assert_eq!(size_of(&left), new, "{name} to {new} bytes, operation {after} failed");
                after += 1;
            }
            println!("{name} to {new} bytes: {failures} failures");
            assert!(failures > 2, "{name}");
        }
    }
}
