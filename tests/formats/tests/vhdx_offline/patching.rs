//! Changing single fields of an image by hand, with the checksums that go with them.

use formats::Storage;
use formats_tests::SimStorage;

use crate::image::Taken;

/// Metadata items, by the first bytes of their ids.
#[derive(Debug, Clone, Copy)]
#[repr(u32)]
pub enum Item {
    Parameters = 0xCAA16737,
    Size = 0x2FA54224,
    DiskId = 0xBECA12AB,
    Physical = 0xCDA348C7,
    Locator = 0xA8D35F2D,
}

pub fn read_u32(sim: &SimStorage, at: u64) -> u32 {
    let mut raw = [0; 4];
    sim.read_at(&mut raw, at).unwrap();
    u32::from_le_bytes(raw)
}

pub fn patch(sim: &SimStorage, at: u64, bytes: &[u8]) {
    sim.write_at(bytes, at).unwrap();
}

/// CRC-32C, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ ((crc & 1) * 0x82F6_3B78))
    })
}

/// Makes the checksum of a structure right that has it at byte 4.
pub fn seal(sim: &SimStorage, at: u64, len: usize) {
    patch(sim, at + 4, &[0; 4]);
    let mut raw = vec![0; len];
    sim.read_at(&mut raw, at).unwrap();
    patch(sim, at + 4, &crc32c(&raw).to_le_bytes());
}

/// Changes both headers.
pub fn patch_headers(sim: &SimStorage, field: u64, bytes: &[u8]) {
    for at in [0x10000, 0x20000] {
        patch(sim, at + field, bytes);
        seal(sim, at, 4096);
    }
}

/// Changes both region tables.
pub fn patch_tables(sim: &SimStorage, field: u64, bytes: &[u8]) {
    for at in [0x30000, 0x40000] {
        patch(sim, at + field, bytes);
        seal(sim, at, 65536);
    }
}

/// Changes the entry of a metadata item (`field` below 32) or its content (from 32 on).
pub fn patch_item(sim: &SimStorage, item: Item, field: u64, bytes: &[u8]) {
    let mut region = [0; 8];
    sim.read_at(&mut region, 0x30000 + 16 + 32 + 16).unwrap();
    let region = u64::from_le_bytes(region);
    let count = u64::from(read_u32(sim, region + 8) >> 16);
    let entry =
        (0..count).map(|n| region + 32 + n * 32).find(|at| read_u32(sim, *at) == item as u32).unwrap();
    let at =
        if field < 32 { entry + field } else { region + u64::from(read_u32(sim, entry + 16)) + field - 32 };
    patch(sim, at, bytes);
}

/// The image's metadata region lies where `patch_item` looks for it.
#[test]
fn the_metadata_region_is_the_second_of_the_table() {
    let sim = crate::image::create(formats::ImageType::Dynamic, 1 << 20, 512);
    let mut region = [0; 8];
    sim.read_at(&mut region, 0x30000 + 16 + 32 + 16).unwrap();
    assert_eq!(u64::from_le_bytes(region), Taken::of(&sim).metadata.0);
    assert_eq!(crc32c(b"123456789"), 0xE306_9283);
}
