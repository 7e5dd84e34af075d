//! Checking a broken image takes no more memory than its file is worth, wherever its table says that blocks are.

use std::sync::Arc;

use formats::vhdx::{self, CreateParams, Vhdx};
use formats::{ImageType, Storage};
use formats_tests::{SimStorage, write_payload};

const MIB: u64 = 1 << 20;

#[test]
fn a_block_that_is_said_to_lie_at_the_end_of_the_world_is_damage_and_no_more() {
    let sim = SimStorage::new();
    let params = CreateParams {
        image_type: ImageType::Dynamic,
        virtual_size: 16 * MIB,
        block_size: Some(MIB as u32),
        logical_sector_size: 512,
        physical_sector_size: 4096,
        log_size: Some(MIB as u32),
        parent: None,
    };
    vhdx::create(&*sim, &params).expect("created");
    let image = Vhdx::open(sim.clone(), false).expect("opens");
    write_payload(&image, 0, &[1; 512]).expect("written");
    formats::Image::close(&image).expect("closed");
    // The one entry of the table that names a place: FULLY_PRESENT is 6.
    let len = sim.len().expect("a length");
    let mut entry = [0; 8];
    let found = (MIB..len).step_by(MIB as usize).find(|&at| {
        sim.read_at(&mut entry, at).expect("read");
        let raw = u64::from_le_bytes(entry);
        raw & 0xf_ffff == 6 && (raw >> 20) * MIB < len
    });
    let at = found.expect("the table is somewhere");
    sim.write_at(&(u64::MAX << 20 | 6).to_le_bytes(), at).expect("written");
    let storage: Arc<dyn Storage> = sim;
    for repair in [false, true] {
        let report = vhdx::check(storage.clone(), repair).expect("checked");
        assert!(!report.is_sound(), "{report:?}");
        assert!(report.findings.iter().any(|f| f.code.starts_with("vhdx-bat")), "{report:?}");
    }
}
