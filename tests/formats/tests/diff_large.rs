//! Differencing images with large blocks, and on large parents.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use formats::vhd::{self, Vhd};
use formats::vhdx::{self, Vhdx};
use formats::{ByteSpan, Chain, Image, ImageType, LayerOptions, NewParentLink, Pieces, Storage, ZeroMode};
use formats_tests::{SimStorage, read_payload, write_payload};
use uuid::Uuid;

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

fn link(id: Option<Uuid>) -> NewParentLink {
    NewParentLink { id: id.unwrap(), next_id: None, relative: Some("p".into()), absolute: "/p".into() }
}

fn vhdx(image_type: ImageType, size: u64, block: u64, parent: Option<Uuid>) -> Arc<SimStorage> {
    let sim = SimStorage::new();
    let params = vhdx::CreateParams {
        image_type,
        virtual_size: size,
        block_size: Some(block as u32),
        logical_sector_size: 512,
        physical_sector_size: 4096,
        log_size: Some(1 << 20),
        parent: parent.map(|id| link(Some(id))),
    };
    vhdx::create(&*sim, &params).unwrap();
    sim
}

fn open_vhdx(sim: &Arc<SimStorage>, read_only: bool) -> Arc<Vhdx> {
    let storage: Arc<dyn Storage> = sim.clone();
    Arc::new(Vhdx::open_layer(storage, &LayerOptions { read_only, ..LayerOptions::default() }).unwrap())
}

/// Discards here and there on an empty child: nothing that a guest asks for may take time in the size of the disk.
fn discard_here_and_there(disk: &dyn Image) {
    let (size, mut pieces) = (disk.geometry().virtual_size, Pieces::new());
    let start = Instant::now();
    for n in 0..200 {
        let at = size / 200 * n / MIB * MIB;
        pieces.clear();
        let span = ByteSpan::new(at, 4096);
        disk.map_zero(span, ZeroMode::Unmap, &mut pieces).unwrap();
        assert!(pieces.is_empty(), "the parent reads as zeroes there");
        disk.wrote(span).unwrap();
    }
    let took = start.elapsed();
    println!("{took:?} for 200 discards");
    assert!(took < Duration::from_secs(20), "{took:?} for 200 discards");
}

#[test]
fn discards_on_a_large_vhdx_do_not_look_through_all_of_its_parent() {
    let parent = vhdx(ImageType::Fixed, TIB, MIB, None);
    let id = open_vhdx(&parent, true).content_id();
    let child = vhdx(ImageType::Differencing, TIB, MIB, id);
    let parents = vec![open_vhdx(&parent, true) as Arc<dyn Image>];
    discard_here_and_there(&Chain::new(open_vhdx(&child, false), parents).unwrap());
}

#[test]
fn discards_on_a_large_vhd_do_not_look_through_all_of_its_parent() {
    let create = |image_type, parent| {
        let sim = SimStorage::new();
        let params = vhd::CreateParams { image_type, virtual_size: TIB, block_size: Some(512 << 10), parent };
        vhd::create(&*sim, &params).unwrap();
        sim
    };
    let open = |sim: &Arc<SimStorage>, read_only| {
        let storage: Arc<dyn Storage> = sim.clone();
        Arc::new(Vhd::open_layer(storage, &LayerOptions { read_only, ..LayerOptions::default() }).unwrap())
    };
    let parent = create(ImageType::Dynamic, None);
    let id = open(&parent, true).content_id();
    let child = create(ImageType::Differencing, Some(link(id)));
    let parents = vec![open(&parent, true) as Arc<dyn Image>];
    discard_here_and_there(&Chain::new(open(&child, false), parents).unwrap());
}

#[test]
fn the_bitmaps_of_the_largest_blocks_fit_any_log() {
    let (block, blocks) = (256 * MIB, 80);
    let size = block * blocks;
    let parent = vhdx(ImageType::Dynamic, size, MIB, None);
    let id = open_vhdx(&parent, true).content_id();
    let child = vhdx(ImageType::Differencing, size, block, id);
    let open = || {
        let parents = vec![open_vhdx(&parent, true) as Arc<dyn Image>];
        Chain::new(open_vhdx(&child, false), parents).unwrap()
    };
    let disk = open();
    // One sector for each page of each block's bitmap, all pending at once.
    let at = |n: u64| n * 16 * MIB + n % 7 * 512;
    for n in 0..size / (16 * MIB) {
        write_payload(&disk, at(n), &[n as u8 | 1; 512]).unwrap();
    }
    disk.commit().unwrap();
    // All of some blocks, without payload: holes.
    for n in (0..blocks).step_by(3) {
        let (span, mut pieces) = (ByteSpan::new(n * block, block), Pieces::new());
        disk.map_write(span, &mut pieces).unwrap();
        disk.wrote(span).unwrap();
    }
    let check = |disk: &dyn Image| {
        for n in 0..size / (16 * MIB) {
            assert_eq!(read_payload(disk, at(n), 512).unwrap(), [n as u8 | 1; 512], "{n}");
        }
    };
    check(&disk);
    disk.close().unwrap();
    check(&open());
    let storage: Arc<dyn Storage> = child.clone();
    assert!(vhdx::check(storage, false).unwrap().is_sound());
}
