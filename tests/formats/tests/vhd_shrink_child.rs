//! A child that hides what its parent has, and is made smaller there, never shows it, whatever a power cut leaves.

use std::sync::Arc;

use formats::vhd::{self, CreateParams, Vhd};
use formats::{
    ByteSpan, Image, ImageType, LayerOptions, NewParentLink, Pieces, Place, Storage, zero_payload,
};
use formats_tests::{CrashExplorer, SimStorage};
use uuid::Uuid;

const SIZE: u64 = 4 << 20;
const LESS: u64 = 2 << 20;

#[test]
fn a_power_cut_while_a_child_is_made_smaller_shows_nothing_of_its_parent() {
    let sim = SimStorage::new();
    let link = NewParentLink {
        id: Uuid::new_v4(),
        next_id: None,
        relative: Some("parent.vhd".into()),
        absolute: "/parent.vhd".into(),
    };
    let params = CreateParams {
        image_type: ImageType::Differencing,
        virtual_size: SIZE,
        block_size: Some(512 << 10),
        parent: Some(link),
    };
    vhd::create(&*sim, &params).expect("created");
    let image = Vhd::open_layer(sim.clone(), &LayerOptions::default()).expect("opens");
    zero_payload(&image, LESS, SIZE - LESS).expect("zeroed");
    image.close().expect("closed");
    sim.forget_trace();
    let storage: Arc<dyn Storage> = sim.clone();
    vhd::resize(&storage, LESS, true).expect("nothing is lost");
    let mut sizes = [0, 0];
    let count = CrashExplorer::default().explore(&sim, |state| {
        let options = LayerOptions { read_only: true, ..LayerOptions::default() };
        let image = Vhd::open_layer(state.storage, &options).expect("opens");
        let size = image.geometry().virtual_size;
        sizes[usize::from(size == LESS)] += 1;
        if size == LESS {
            return;
        }
        assert_eq!(size, SIZE);
        let mut pieces = Pieces::new();
        image.map_read(ByteSpan::new(LESS, SIZE - LESS), &mut pieces).expect("mapped");
        assert!(
            pieces.iter().all(|piece| piece.place != Place::Parent),
            "after step {} the parent is seen: {pieces:?}",
            state.after
        );
    });
    println!("{count}: {} of the old size, {} of the new one", sizes[0], sizes[1]);
    assert!(sizes.iter().all(|n| *n > 0));
}
