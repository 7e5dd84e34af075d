//! Payload I/O through the map, as a caller of an image does it.

use std::collections::BTreeMap;

use formats::{ByteSpan, Image, ImageError, Pieces, Place, Storage, ZeroMode};

use crate::SECTOR;

fn storage_of(image: &dyn Image, place: Place) -> Option<(&dyn Storage, u64)> {
    match place {
        Place::Zero => None,
        Place::Parent => panic!("only chains are read"),
        Place::File { file, offset } => Some((&*image.files()[usize::from(file.0)], offset)),
    }
}

fn io(error: std::io::Error) -> ImageError {
    ImageError::io("payload", error)
}

/// Writes `data` at `offset` of the virtual disk: maps it, then writes each piece.
pub fn write_payload(image: &dyn Image, offset: u64, data: &[u8]) -> Result<(), ImageError> {
    let mut pieces = Pieces::new();
    image.map_write(ByteSpan::new(offset, data.len() as u64), &mut pieces)?;
    let mut rest = data;
    for piece in pieces.as_slice() {
        let (part, tail) = rest.split_at(piece.len as usize);
        let (storage, at) = storage_of(image, piece.place).expect("map_write names only places in files");
        storage.write_at(part, at).map_err(io)?;
        rest = tail;
    }
    assert!(rest.is_empty(), "map_write left a gap");
    image.wrote(ByteSpan::new(offset, data.len() as u64))
}

/// Reads `len` bytes at `offset` of the virtual disk.
pub fn read_payload(image: &dyn Image, offset: u64, len: usize) -> Result<Vec<u8>, ImageError> {
    let mut pieces = Pieces::new();
    image.map_read(ByteSpan::new(offset, len as u64), &mut pieces)?;
    let mut data = vec![0; len];
    let mut at = 0;
    for piece in pieces.as_slice() {
        let part = &mut data[at..at + piece.len as usize];
        if let Some((storage, offset)) = storage_of(image, piece.place) {
            storage.read_at(part, offset).map_err(io)?;
        }
        at += piece.len as usize;
    }
    assert_eq!(at, len, "map_read left a gap");
    Ok(data)
}

/// Zeroes a range of the virtual disk: the map first, then what it leaves to the caller, by punching.
pub fn zero_payload(image: &dyn Image, offset: u64, len: u64, mode: ZeroMode) -> Result<(), ImageError> {
    let mut pieces = Pieces::new();
    image.map_zero(ByteSpan::new(offset, len), mode, &mut pieces)?;
    for piece in pieces.as_slice() {
        if let Some((storage, at)) = storage_of(image, piece.place) {
            storage.punch(at, piece.len).map_err(io)?;
        }
    }
    image.wrote(ByteSpan::new(offset, len))
}

/// All sectors of the virtual disk that are not zero, by their byte offset. Skips holes of the file.
pub fn read_nonzero_sectors(image: &dyn Image) -> Result<BTreeMap<u64, Vec<u8>>, ImageError> {
    let size = image.geometry().virtual_size;
    let mut pieces = Pieces::new();
    image.map_read(ByteSpan::new(0, size), &mut pieces)?;
    let mut found = BTreeMap::new();
    let mut virtual_offset = 0;
    for piece in pieces.as_slice() {
        if let Some((storage, offset)) = storage_of(image, piece.place) {
            let mut at = offset;
            let end = offset + piece.len;
            while let Some((start, stop)) = storage.next_data(at).map_err(io)?.filter(|(s, _)| *s < end) {
                let from = start.max(offset) / SECTOR * SECTOR;
                let to = stop.min(end).next_multiple_of(SECTOR).min(end);
                let mut buf = vec![0; (to - from) as usize];
                storage.read_at(&mut buf, from).map_err(io)?;
                for (i, sector) in buf.chunks(SECTOR as usize).enumerate() {
                    if sector.iter().any(|b| *b != 0) {
                        let where_ = virtual_offset + (from - offset) + i as u64 * SECTOR;
                        found.insert(where_, sector.to_vec());
                    }
                }
                at = to.max(at + 1);
            }
        }
        virtual_offset += piece.len;
    }
    Ok(found)
}
