//! What claims to be blktap's map of full blocks, and to lie where blocks are, costs no block its content.

use std::sync::Arc;

use formats::vhd::{self, CreateParams, Vhd};
use formats::{Image, ImageType, Storage};
use formats_tests::{SimStorage, read_payload, write_payload};

#[test]
fn growing_a_disk_leaves_blocks_alone_that_a_map_lays_claim_to() {
    let sim = SimStorage::new();
    let params = CreateParams {
        image_type: ImageType::Dynamic,
        virtual_size: 4 << 20,
        block_size: Some(512 << 10),
        parent: None,
    };
    vhd::create(&*sim, &params).expect("created");
    let image = Vhd::open(sim.clone(), false, false).expect("opens");
    let content = vec![7; 1 << 20];
    write_payload(&image, 0, &content).expect("written");
    image.close().expect("closed");
    // Behind the table of 8 entries at 0x600, which is padded to a sector.
    let mut header = [0; 512];
    header[..8].copy_from_slice(b"tdbatmap");
    header[8..16].copy_from_slice(&0xa00_u64.to_be_bytes());
    header[16..20].copy_from_slice(&0xf2_u32.to_be_bytes());
    let mut before = [1; 512];
    sim.read_at(&mut before, 0x800).expect("read");
    assert_eq!(before, [0; 512], "nothing is there");
    sim.write_at(&header, 0x800).expect("written");
    let storage: Arc<dyn Storage> = sim.clone();
    vhd::resize(&storage, 4 << 30, false).expect("grown");
    let image = Vhd::open(sim, true, false).expect("opens");
    assert_eq!(image.geometry().virtual_size, 4 << 30);
    assert!(read_payload(&image, 0, content.len()).expect("read") == content, "a block was destroyed");
}
