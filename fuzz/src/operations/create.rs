//! Images to begin with, and children of them.

use std::sync::Arc;

use formats::{Format, ImageType, NewParentLink, raw, vhd, vhdx};
use uuid::Uuid;

use super::bytes::Bytes;
use crate::SECTOR;
use crate::storage::{Contents, MemoryFile};

/// Makes an image of a size and a layout that the input chooses.
pub(super) fn base(bytes: &mut Bytes) -> (Format, Arc<MemoryFile>) {
    let file = MemoryFile::new(Contents::default());
    let kind = bytes.byte();
    let blocks = match bytes.byte() {
        n @ 0..224 => u64::from(n % 64) + 1,
        n => u64::from(n - 223) * 700,
    };
    let odd = u64::from(bytes.byte());
    let made = match kind % 16 {
        0 => raw::create(&*file, (blocks * 8 + odd) * SECTOR).map(|()| Format::Raw),
        1 => {
            let params = vhd::CreateParams {
                image_type: ImageType::Fixed,
                virtual_size: (blocks * 8 + odd) * SECTOR,
                block_size: None,
                parent: None,
            };
            vhd::create(&*file, &params).map(|()| Format::Vhd)
        }
        2..8 => {
            let block = vhd_block(bytes);
            let params = vhd::CreateParams {
                image_type: ImageType::Dynamic,
                virtual_size: blocks * u64::from(block) + odd * SECTOR,
                block_size: Some(block),
                parent: None,
            };
            vhd::create(&*file, &params).map(|()| Format::Vhd)
        }
        n => {
            let block = vhdx_block(bytes);
            let sector: u32 = if n > 13 { 4096 } else { 512 };
            let params = vhdx::CreateParams {
                image_type: if n == 8 { ImageType::Fixed } else { ImageType::Dynamic },
                virtual_size: blocks * u64::from(block) + odd * u64::from(sector),
                block_size: Some(block),
                logical_sector_size: sector,
                physical_sector_size: 4096,
                log_size: Some(1 << 20),
                parent: None,
            };
            vhdx::create(&*file, &params).map(|()| Format::Vhdx)
        }
    };
    let format = made.expect("an image can be made");
    (format, MemoryFile::with_power_cuts(file.contents()))
}

fn vhd_block(bytes: &mut Bytes) -> u32 {
    bytes.one_of(&[512, 4096, 64 << 10, 512 << 10, 2 << 20])
}

fn vhdx_block(bytes: &mut Bytes) -> u32 {
    bytes.one_of(&[1 << 20, 2 << 20, 8 << 20, 1 << 20])
}

/// What a child says of its parent; the texts vary in length.
pub(super) fn link(bytes: &mut Bytes, id: Uuid) -> NewParentLink {
    let folder = "folder/".repeat(usize::from(bytes.byte() % 24));
    NewParentLink {
        id,
        next_id: None,
        relative: (bytes.byte() & 1 == 0).then(|| format!("../{folder}parent")),
        absolute: format!("/disks/{folder}parent"),
    }
}

/// Makes an empty child of an image with this id, of `size` bytes and sectors of `sector` bytes.
pub(super) fn child(bytes: &mut Bytes, format: Format, id: Uuid, size: u64, sector: u64) -> Arc<MemoryFile> {
    let file = MemoryFile::new(Contents::default());
    let parent = Some(link(bytes, id));
    let made = match format {
        Format::Raw => panic!("a raw image has no children"),
        Format::Vhd => {
            // Tables of large disks with tiny blocks are large, too.
            let block =
                vhd_block(bytes).max(u32::try_from(size >> 18).unwrap_or(u32::MAX).next_power_of_two());
            let params = vhd::CreateParams {
                image_type: ImageType::Differencing,
                virtual_size: size,
                block_size: Some(block.max(512)),
                parent,
            };
            vhd::create(&*file, &params)
        }
        Format::Vhdx => {
            let params = vhdx::CreateParams {
                image_type: ImageType::Differencing,
                virtual_size: size,
                block_size: Some(vhdx_block(bytes)),
                logical_sector_size: sector as u32,
                physical_sector_size: 4096,
                log_size: Some(1 << 20),
                parent,
            };
            vhdx::create(&*file, &params)
        }
    };
    made.expect("a child can be made");
    MemoryFile::with_power_cuts(file.contents())
}
