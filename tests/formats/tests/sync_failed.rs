//! After a sync that somebody else has made has failed, no metadata comes to depend on what that may have lost.

use std::sync::Arc;

use formats::vhd::Vhd;
use formats::vhdx::Vhdx;
use formats::{ErrorKind, Image, ImageType, Storage};
use formats_tests::{SimStorage, write_payload};

const SIZE: u64 = 16 << 20;

#[test]
fn an_image_whose_sync_failed_takes_no_writes_and_no_commit() {
    let vhd = SimStorage::new();
    let params = formats::vhd::CreateParams {
        image_type: ImageType::Dynamic,
        virtual_size: SIZE,
        block_size: None,
        parent: None,
    };
    formats::vhd::create(&*vhd, &params).expect("created");
    let vhdx = SimStorage::new();
    let params = formats::vhdx::CreateParams {
        image_type: ImageType::Dynamic,
        virtual_size: SIZE,
        block_size: None,
        logical_sector_size: 512,
        physical_sector_size: 4096,
        log_size: None,
        parent: None,
    };
    formats::vhdx::create(&*vhdx, &params).expect("created");
    let images: [(Arc<SimStorage>, Arc<dyn Image>); 2] = [
        (vhd.clone(), Arc::new(Vhd::open(vhd as Arc<dyn Storage>, false, false).expect("opens"))),
        (vhdx.clone(), Arc::new(Vhdx::open(vhdx as Arc<dyn Storage>, false).expect("opens"))),
    ];
    for (storage, image) in images {
        write_payload(&*image, 0, &[1; 512]).expect("written");
        image.sync_failed("the disk is gone");
        storage.forget_trace();
        let refused = write_payload(&*image, 8 << 20, &[2; 512]).expect_err("refused");
        assert_eq!(refused.kind, ErrorKind::Poisoned);
        assert!(refused.message.contains("the disk is gone"), "{refused}");
        image.commit().expect_err("what is lost can't be committed");
        image.close().expect_err("nor closed");
        formats_tests::read_payload(&*image, 0, 512).expect("reading goes on");
    }
}
