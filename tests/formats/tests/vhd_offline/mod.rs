//! VHDs laid out by hand, and a reader that shares no code with the codec.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "shared by several tests, and what fails in a helper fails the test"
)]

use std::collections::BTreeMap;
use std::sync::Arc;

use formats::vhd::{self, CreateParams};
use formats::{ImageType, NewParentLink, Severity, Storage};
use formats_tests::{CrashCount, CrashExplorer, CrashKind, SimDisk, SimStorage};
use uuid::Uuid;

pub const BLOCK: u64 = 4096;

pub fn bytes(disk: &SimDisk, at: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0; len];
    disk.read(at, &mut buf);
    buf
}

pub fn u32_at(raw: &[u8], at: usize) -> u64 {
    u64::from(u32::from_be_bytes(raw[at..at + 4].try_into().unwrap()))
}

pub fn u64_at(raw: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(raw[at..at + 8].try_into().unwrap())
}

fn sum(raw: &[u8], field: usize) -> u32 {
    let all: u32 = raw.iter().map(|&b| u32::from(b)).sum();
    let own: u32 = raw[field..field + 4].iter().map(|&b| u32::from(b)).sum();
    !(all - own)
}

/// Renews the checksum of the structure of `len` bytes at `at`, whose field is `field` bytes in.
pub fn seal(disk: &mut SimDisk, at: u64, len: usize, field: usize) {
    let raw = bytes(disk, at, len);
    disk.write(at + field as u64, &sum(&raw, field).to_be_bytes());
}

/// What a differencing disk says of its parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub id: Vec<u8>,
    pub name: String,
    /// By their platform codes.
    pub paths: Vec<(Vec<u8>, String)>,
}

/// What a disk says, by the specification alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub size: u64,
    pub id: Vec<u8>,
    /// Of a dynamic or fixed disk the sectors that are not zero, of a differencing one those that it has of its own.
    pub sectors: BTreeMap<u64, Vec<u8>>,
    pub link: Option<Link>,
}

fn utf16(raw: &[u8], unit: fn([u8; 2]) -> u16) -> String {
    let units: Vec<u16> = raw.chunks_exact(2).map(|p| unit([p[0], p[1]])).take_while(|&u| u != 0).collect();
    String::from_utf16(&units).unwrap()
}

/// Reads a disk sector by sector.
///
/// # Errors
/// What the file lacks to be one.
pub fn see(disk: &SimDisk) -> Result<Seen, String> {
    let len = disk.len();
    let at = if len % 512 == 511 { len - 511 } else { len.checked_sub(512).ok_or("too short")? };
    let footer = bytes(disk, at, 512);
    if &footer[..8] != b"conectix" || u32_at(&footer, 64) != u64::from(sum(&footer, 64)) {
        return Err("no footer at the end".into());
    }
    let (size, kind) = (u64_at(&footer, 48), u32_at(&footer, 60));
    let mut seen = Seen { size, id: footer[68..84].to_vec(), sectors: BTreeMap::new(), link: None };
    if kind == 2 {
        if size > at {
            return Err("the content does not fit".into());
        }
        for sector in 0..size / 512 {
            seen.take(sector, bytes(disk, sector * 512, 512));
        }
        return Ok(seen);
    }
    let header = bytes(disk, u64_at(&footer, 16), 1024);
    if &header[..8] != b"cxsparse" || u32_at(&header, 36) != u64::from(sum(&header, 36)) {
        return Err("no header".into());
    }
    if kind == 4 {
        let entries = (0..8).map(|n| &header[576 + 24 * n..][..24]).filter(|e| e[..4] != [0; 4]);
        let path = |e: &[u8]| utf16(&bytes(disk, u64_at(e, 16), u32_at(e, 8) as usize), u16::from_le_bytes);
        let paths = entries.map(|e| (e[..4].to_vec(), path(e))).collect();
        let name = utf16(&header[64..576], u16::from_be_bytes);
        seen.link = Some(Link { id: header[40..56].to_vec(), name, paths });
    }
    seen.read_blocks(disk, at, &header)?;
    Ok(seen)
}

impl Seen {
    fn take(&mut self, sector: u64, data: Vec<u8>) {
        if data.iter().any(|&b| b != 0) {
            self.sectors.insert(sector, data);
        }
    }

    fn read_blocks(&mut self, disk: &SimDisk, limit: u64, header: &[u8]) -> Result<(), String> {
        let (table, block) = (u64_at(header, 16), u32_at(header, 32));
        let bitmap_len = (block / 4096).max(1).next_multiple_of(512);
        for n in 0..self.size.div_ceil(block) {
            if n >= u32_at(header, 28) {
                return Err(format!("block {n} has no entry"));
            }
            let entry = u32_at(&bytes(disk, table + n * 4, 4), 0);
            if entry == 0xffff_ffff {
                continue;
            }
            if entry * 512 + bitmap_len + block > limit {
                return Err(format!("block {n} lies outside"));
            }
            let bitmap = bytes(disk, entry * 512, bitmap_len as usize);
            for within in 0..(block.min(self.size - n * block)) / 512 {
                let own = bitmap[within as usize / 8] & (0x80 >> (within % 8)) != 0;
                let data = bytes(disk, entry * 512 + bitmap_len + within * 512, 512);
                let sector = n * block / 512 + within;
                match self.link {
                    Some(_) if own => drop(self.sectors.insert(sector, data)),
                    Some(_) => {}
                    None => self.take(sector, data),
                }
            }
        }
        Ok(())
    }
}

/// A block of a disk to be made: its number, the sector of its bitmap, the bitmap's first bytes, and its content.
pub struct Placed {
    pub block: u64,
    pub sector: u64,
    pub bitmap: u8,
    pub data: Vec<u8>,
}

/// `len` bytes that no other tag gives, different in every sector.
pub fn content(tag: u8, len: u64) -> Vec<u8> {
    (0..len).map(|i| if i % 512 == 0 { (i / 512) as u8 | 1 } else { tag }).collect()
}

pub fn link(tag: u8) -> NewParentLink {
    NewParentLink {
        id: Uuid::from_bytes([tag; 16]),
        next_id: None,
        relative: Some(format!("../base/parent{tag}.vhd")),
        absolute: format!("/disks/base/parent{tag}.vhd"),
    }
}

/// An empty disk with blocks of [`BLOCK`] bytes.
pub fn empty(image_type: ImageType, size: u64) -> SimDisk {
    let sim = SimStorage::new();
    let block_size = (image_type != ImageType::Fixed).then_some(BLOCK as u32);
    let parent = (image_type == ImageType::Differencing).then(|| link(1));
    vhd::create(&*sim, &CreateParams { image_type, virtual_size: size, block_size, parent }).unwrap();
    sim.contents()
}

/// Puts blocks into an empty disk, and the footer `slack` sectors of rubbish behind the last one.
pub fn with_blocks(mut disk: SimDisk, blocks: &[Placed], slack: u64, footer_len: usize) -> SimDisk {
    let footer = bytes(&disk, disk.len() - 512, footer_len);
    let header = bytes(&disk, 512, 1024);
    let mut end = disk.len() - 512;
    disk.set_len(end);
    for placed in blocks {
        disk.write(u64_at(&header, 16) + placed.block * 4, &(placed.sector as u32).to_be_bytes());
        disk.write(placed.sector * 512, &[placed.bitmap]);
        disk.write(placed.sector * 512 + 512, &placed.data);
        disk.write(
            placed.sector * 512 + 512 + BLOCK - 1,
            &[*placed.data.get(BLOCK as usize - 1).unwrap_or(&0)],
        );
        end = end.max(placed.sector * 512 + 512 + BLOCK);
    }
    disk.write(end, &content(0x77, slack * 512));
    disk.write(end + slack * 512, &footer);
    disk
}

pub fn arc(sim: &Arc<SimStorage>) -> Arc<dyn Storage> {
    sim.clone()
}

/// Does `change` to `disk` and looks at every crash state: it holds what was before or what is afterwards, is sound, and
/// when `change` is done again, holds the latter. Returns the disk afterwards, and what was explored.
pub fn survives(
    name: &str,
    disk: SimDisk,
    explorer: &CrashExplorer,
    change: impl Fn(&Arc<SimStorage>) -> Result<(), String>,
) -> (SimDisk, CrashCount) {
    let sim = SimStorage::from_disk(disk);
    let before = see(&sim.contents()).unwrap();
    change(&sim).unwrap_or_else(|e| panic!("{name}: {e}"));
    let after = see(&sim.contents()).unwrap();
    sound(name, &sim, true);
    let mut needed_recovery = 0;
    let count = explorer.explore(&sim, |state| {
        let here = || format!("{name}: {:?} after {}, kept {}", state.kind, state.after, state.kept);
        let mut now = see(&state.storage.contents());
        if now.is_err() && state.kind == CrashKind::PowerCut {
            needed_recovery += 1;
            vhd::check(&*state.storage, true).unwrap();
            now = see(&state.storage.contents());
        }
        let now = now.unwrap_or_else(|e| panic!("{}: {e}, trace {:?}", here(), &sim.trace()[..state.after]));
        assert!(now == before || now == after, "{}: {}", here(), differ(&now, &before, &after));
        sound(&here(), &state.storage, false);
        change(&state.storage).unwrap_or_else(|e| panic!("{}: done again: {e}", here()));
        let again = see(&state.storage.contents()).unwrap();
        assert!(again == after, "{}: done again: {}", here(), differ(&again, &before, &after));
        sound(&here(), &state.storage, false);
    });
    println!("{name}: {count}");
    assert_eq!(needed_recovery, 0, "{name}: the footer at the end was lost");
    (sim.contents(), count)
}

fn differ(now: &Seen, before: &Seen, after: &Seen) -> String {
    let keys = |seen: &Seen| seen.sectors.keys().copied().collect::<Vec<_>>();
    format!(
        "neither old nor new: size {} of {} and {}, link {:?}, sectors {:?} of {:?} and {:?}",
        now.size,
        before.size,
        after.size,
        now.link,
        keys(now),
        keys(before),
        keys(after)
    )
}

pub fn sound(name: &str, sim: &Arc<SimStorage>, wholly: bool) {
    let report = vhd::check(&**sim, false).unwrap();
    assert!(report.is_sound(), "{name}: {report:?}");
    if wholly {
        let bad = report.findings.iter().find(|f| f.severity > Severity::Note && f.code != "vhd-unused-end");
        assert!(bad.is_none(), "{name}: {report:?}");
    }
}
