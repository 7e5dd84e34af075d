//! Images made by hand, and a reader that takes them apart straight from the specification.

use std::sync::Arc;

use formats::vhdx::{self, CreateParams};
use formats::{ImageType, NewParentLink, Storage};
use formats_tests::{SimDisk, SimStorage};

pub const MIB: u64 = 1 << 20;
pub const NOT_PRESENT: u64 = 0;
pub const UNDEFINED: u64 = 1;
pub const ZERO: u64 = 2;
pub const UNMAPPED: u64 = 3;
pub const FULL: u64 = 6;
pub const PARTIAL: u64 = 7;

/// The storage as the functions under test take it.
pub fn shared(sim: &Arc<SimStorage>) -> Arc<dyn Storage> {
    sim.clone()
}

pub fn link(name: &str) -> NewParentLink {
    NewParentLink {
        id: "83ed3e5e-5a8e-4a4e-9b5b-2c9f4f1f1c11".parse().unwrap(),
        next_id: None,
        relative: Some(format!("../{name}")),
        absolute: format!("/images/{name}"),
    }
}

/// A new image in blocks of 1 MiB, its trace forgotten.
pub fn create(image_type: ImageType, size: u64, sector: u32) -> Arc<SimStorage> {
    let sim = SimStorage::new();
    let params = CreateParams {
        image_type,
        virtual_size: size,
        block_size: Some(MIB as u32),
        logical_sector_size: sector,
        physical_sector_size: 4096,
        log_size: Some(MIB as u32),
        parent: (image_type == ImageType::Differencing).then(|| link("base.vhdx")),
    };
    vhdx::create(&*sim, &params).unwrap();
    sim.forget_trace();
    sim
}

/// A copy of what readers see now, durable.
pub fn copy_of(sim: &SimStorage) -> Arc<SimStorage> {
    SimStorage::from_disk(sim.contents())
}

/// Fails unless `check` finds neither damage nor a warning.
pub fn sound(sim: &Arc<SimStorage>) -> Result<(), String> {
    let report = vhdx::check(shared(sim), false).map_err(|e| e.to_string())?;
    match report.findings.first() {
        Some(finding) if finding.severity != formats::Severity::Note => Err(format!("{finding:?}")),
        _ => Ok(()),
    }
}

/// A cleanly closed image, taken apart.
#[derive(Debug, Clone)]
pub struct Taken {
    disk: SimDisk,
    pub bat: (u64, u64),
    pub metadata: (u64, u64),
    pub block: u64,
    pub size: u64,
    pub sector: u64,
    pub has_parent: bool,
    pub data_write: [u8; 16],
    pub locator: Vec<u8>,
}

impl Taken {
    /// Takes a file apart.
    pub fn of(sim: &SimStorage) -> Self {
        Self::of_disk(sim.contents())
    }

    pub fn of_disk(disk: SimDisk) -> Self {
        let bytes = |at: u64, n: usize| {
            let mut buf = vec![0; n];
            disk.read(at, &mut buf);
            buf
        };
        let u64_at = |at: u64| u64::from_le_bytes(bytes(at, 8).try_into().unwrap());
        let u32_at = |at: u64| u64::from(u32::from_le_bytes(bytes(at, 4).try_into().unwrap()));
        let header = [0x10000, 0x20000].into_iter().max_by_key(|at| u64_at(at + 8)).unwrap();
        assert_eq!(bytes(header + 48, 16), [0; 16], "the image was not closed");
        let mut regions = [(0, 0); 2];
        for at in (0..u32_at(0x30008)).map(|n| 0x30010 + n * 32) {
            let known = [0x66, 0x06].iter().position(|first| bytes(at, 1)[0] == *first);
            regions[known.expect("only known regions")] = (u64_at(at + 16), u32_at(at + 24));
        }
        assert_eq!(bytes(0x30000, 65536), bytes(0x40000, 65536), "the region tables differ");
        let metadata = regions[1].0;
        let item = |first: [u8; 4]| {
            let entries = (0..u32_at(metadata + 10) & 0xffff).map(|n| metadata + 32 + n * 32);
            let found = entries.into_iter().find(|at| bytes(*at, 4) == first)?;
            Some(bytes(metadata + u32_at(found + 16), u32_at(found + 20) as usize))
        };
        let number = |raw: Vec<u8>| raw.iter().rev().fold(0_u64, |n, b| n << 8 | u64::from(*b));
        let parameters = item([0x37, 0x67, 0xA1, 0xCA]).unwrap();
        Self {
            bat: regions[0],
            metadata: regions[1],
            block: number(parameters[..4].to_vec()),
            has_parent: parameters[4] & 2 != 0,
            size: number(item([0x24, 0x42, 0xA5, 0x2F]).unwrap()),
            sector: number(item([0x1D, 0xBF, 0x41, 0x81]).unwrap()),
            data_write: bytes(header + 32, 16).try_into().unwrap(),
            locator: item([0x2D, 0x5F, 0xD3, 0xA8]).unwrap_or_default(),
            disk,
        }
    }

    pub fn ratio(&self) -> u64 {
        (self.sector << 23) / self.block
    }

    /// Where the entry of a payload block is.
    pub fn entry_place(&self, block: u64) -> u64 {
        self.bat.0 + 8 * (block + block / self.ratio())
    }

    /// Where the entry of the sector bitmap of a chunk is.
    pub fn bitmap_place(&self, chunk: u64) -> u64 {
        self.bat.0 + 8 * ((chunk + 1) * (self.ratio() + 1) - 1)
    }

    pub fn raw(&self, at: u64) -> u64 {
        let mut raw = [0; 8];
        self.disk.read(at, &mut raw);
        u64::from_le_bytes(raw)
    }

    pub fn entry(&self, block: u64) -> u64 {
        self.raw(self.entry_place(block))
    }

    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block)
    }

    /// The whole disk, over a parent of this content.
    pub fn content(&self, parent: &[u8]) -> Vec<u8> {
        let mut content = vec![0; self.size as usize];
        for block in 0..self.blocks() {
            let start = block * self.block;
            let len = self.block.min(self.size - start);
            for at in (0..len).step_by(self.sector as usize) {
                let range = (start + at) as usize..(start + at + self.sector) as usize;
                let out = &mut content[range.clone()];
                match self.entry(block) & 7 {
                    FULL => self.disk.read((self.entry(block) >> 20) * MIB + at, out),
                    PARTIAL if self.is_own(start + at) => {
                        self.disk.read((self.entry(block) >> 20) * MIB + at, out);
                    }
                    NOT_PRESENT | PARTIAL if self.has_parent => {
                        let shown = parent.get(range.start..range.end.min(parent.len())).unwrap_or(&[]);
                        out[..shown.len()].copy_from_slice(shown);
                    }
                    _ => {}
                }
            }
        }
        content
    }

    fn is_own(&self, at: u64) -> bool {
        let chunk = at / (self.sector << 23);
        let entry = self.raw(self.bitmap_place(chunk));
        assert_eq!(entry & 7, FULL, "a partially present block has a sector bitmap");
        let bit = at / self.sector % (1 << 23);
        let mut byte = [0];
        self.disk.read((entry >> 20) * MIB + bit / 8, &mut byte);
        byte[0] >> (bit % 8) & 1 == 1
    }
}

/// Puts a block with these bytes (of which there is one block's worth) behind the end of the file, and its entry.
pub fn place_block(sim: &SimStorage, block: u64, state: u64, data: &[u8]) {
    let image = Taken::of(sim);
    let unit = sim.len().unwrap().div_ceil(MIB);
    sim.set_len((unit + image.block / MIB) * MIB).unwrap();
    sim.write_at(data, unit * MIB).unwrap();
    sim.write_at(&(unit << 20 | state).to_le_bytes(), image.entry_place(block)).unwrap();
}

/// Sets the entry of a block.
pub fn set_entry(sim: &SimStorage, block: u64, raw: u64) {
    let image = Taken::of(sim);
    sim.write_at(&raw.to_le_bytes(), image.entry_place(block)).unwrap();
}

/// Marks sectors as the image's own, making the bitmap block where there is none.
pub fn own(sim: &SimStorage, sectors: std::ops::Range<u64>) {
    let image = Taken::of(sim);
    for sector in sectors {
        let place = image.bitmap_place(sector >> 23);
        let mut raw = [0; 8];
        sim.read_at(&mut raw, place).unwrap();
        let mut entry = u64::from_le_bytes(raw);
        if entry & 7 == 0 {
            let unit = sim.len().unwrap().div_ceil(MIB);
            sim.set_len((unit + 1) * MIB).unwrap();
            entry = unit << 20 | FULL;
            sim.write_at(&entry.to_le_bytes(), place).unwrap();
        }
        let at = (entry >> 20) * MIB + (sector & 0x7f_ffff) / 8;
        let mut byte = [0];
        sim.read_at(&mut byte, at).unwrap();
        byte[0] |= 1 << (sector % 8);
        sim.write_at(&byte, at).unwrap();
    }
}

/// Bytes that no other tag gives, different in every sector, none zero.
pub fn bytes(tag: u8, len: u64) -> Vec<u8> {
    (0..len).map(|i| if i % 512 == 0 { (i / 512) as u8 | 1 } else { tag | 1 }).collect()
}
