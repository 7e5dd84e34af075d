//! The folder of real and hostile images that `BLOCKD_CORPUS` names; its README says what is in it.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use formats::{AllocState, Image};
use sha2::{Digest, Sha256};

use crate::{SimDisk, SimStorage, read_payload};

/// The folder, or a loud word that `what` was not looked at.
pub fn corpus(what: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("BLOCKD_CORPUS").map(PathBuf::from);
    if folder.is_none() {
        println!("SKIPPED: BLOCKD_CORPUS is not set, so no {what} of the corpus was looked at");
    }
    folder
}

/// The bytes of a file that may be packed.
pub fn unpack(path: &Path) -> std::io::Result<Vec<u8>> {
    let packed = std::fs::read(path)?;
    let mut image = Vec::new();
    match path.extension().and_then(|e| e.to_str()) {
        Some("bz2") => bzip2::read::BzDecoder::new(&packed[..]).read_to_end(&mut image)?,
        Some("gz") => flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut image)?,
        _ => return Ok(packed),
    };
    Ok(image)
}

/// A simulated file of these bytes in which zeroes are holes, as on disk.
pub fn sparse(bytes: &[u8]) -> Arc<SimStorage> {
    let mut disk = SimDisk::new();
    disk.set_len(bytes.len() as u64);
    disk.write(0, bytes);
    SimStorage::from_disk(disk)
}

/// Rows of a table with a heading, by tabs.
pub fn table(path: &Path) -> std::io::Result<Vec<Vec<String>>> {
    let text = std::fs::read_to_string(path)?;
    Ok(text.lines().skip(1).map(|l| l.split('\t').map(str::to_owned).collect()).collect())
}

/// Hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// SHA-256 of the whole content; only for disks that are small enough.
///
/// # Panics
/// When the image can't be read.
pub fn sha256_of(image: &dyn Image) -> String {
    let size = image.geometry().virtual_size;
    let mut hash = Sha256::new();
    for at in (0..size).step_by(1 << 20) {
        hash.update(
            read_payload(image, at, (size - at).min(1 << 20) as usize).expect("the image can be read"),
        );
    }
    hex(&hash.finalize())
}

/// SHA-256 over the 64 KiB chunks that are not zero, with their offsets, and the size.
///
/// # Panics
/// When the image can't be read.
pub fn sparse64k_of(image: &dyn Image) -> String {
    const CHUNK: u64 = 64 << 10;
    let size = image.geometry().virtual_size;
    let mut hash = Sha256::new();
    let mut at = 0;
    while at < size {
        let extent = image.next_extent(at).expect("the image can be read").expect("not the end yet");
        if extent.state != AllocState::Data && extent.span.len >= 2 * CHUNK {
            let to = at + extent.span.len;
            at = if to == size { size } else { to / CHUNK * CHUNK };
            continue;
        }
        let data = read_payload(image, at, (size - at).min(CHUNK) as usize).expect("the image can be read");
        if data.iter().any(|b| *b != 0) {
            hash.update(at.to_le_bytes());
            hash.update(&data);
        }
        at += CHUNK;
    }
    hash.update(size.to_le_bytes());
    hex(&hash.finalize())
}
