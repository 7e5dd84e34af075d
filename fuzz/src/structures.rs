//! Where the structures of an image lie, read without the codecs: to hold these against it, and to mend checksums.

use formats::Format;

use crate::encoding::Mend;
use crate::storage::Contents;

const MIB: u64 = 1 << 20;
const LOG_SECTOR: u64 = 4096;
/// The most bytes of one log entry that are mended.
const ENTRY_MAX: u64 = MIB;
const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const FOOTER: u64 = 512;

fn be(file: &Contents, at: u64, len: usize) -> u64 {
    file.bytes(at, len).iter().fold(0, |n, b| n << 8 | u64::from(*b))
}

fn le(file: &Contents, at: u64, len: usize) -> u64 {
    file.bytes(at, len).iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

fn has(file: &Contents, at: u64, signature: &[u8]) -> bool {
    file.bytes(at, signature.len()) == signature
}

/// Makes checksums right wherever there is the signature of a structure that has one.
pub fn mend(file: &mut Contents, format: Format, mend: Mend) {
    match (format, mend) {
        (_, Mend::Nothing) | (Format::Raw, _) => {}
        (Format::Vhd, _) => mend_vhd(file),
        (Format::Vhdx, mend) => {
            mend_vhdx(file);
            for header in HEADERS {
                mend_log(file, header, mend == Mend::Log);
            }
        }
    }
}

/// Ranges of the file that hold no payload: whoever reads or writes payload there breaks the image.
pub fn metadata(file: &Contents, format: Format) -> Vec<(u64, u64)> {
    match format {
        Format::Raw => Vec::new(),
        Format::Vhd => vhd_metadata(file).unwrap_or_default(),
        Format::Vhdx => vhdx_metadata(file),
    }
}

/// Whether there is a log to be replayed, so that structures may be elsewhere than the file says.
pub fn has_log(file: &Contents, format: Format) -> bool {
    let named = |header| !crate::storage::is_zero(&file.bytes(header + 48, 16));
    format == Format::Vhdx && current_header(file).is_some_and(named)
}

/// Ranges that hold no payload whatever a log says.
pub fn beyond_logs(format: Format) -> Vec<(u64, u64)> {
    if format == Format::Vhdx { vec![(0, MIB)] } else { Vec::new() }
}

fn vhd_sum(bytes: &[u8], skip: usize) -> u32 {
    !bytes
        .iter()
        .enumerate()
        .filter(|(at, _)| !(skip..skip + 4).contains(at))
        .map(|(_, b)| u32::from(*b))
        .sum::<u32>()
}

fn end_footer(file: &Contents) -> Option<u64> {
    let back = if file.len() % FOOTER == FOOTER - 1 { FOOTER - 1 } else { FOOTER };
    file.len().checked_sub(back)
}

fn mend_vhd(file: &mut Contents) {
    for at in [Some(0), end_footer(file)].into_iter().flatten() {
        if !has(file, at, b"conectix") || at + FOOTER - 1 > file.len() {
            continue;
        }
        let mut footer = file.bytes(at, FOOTER as usize);
        let sum = vhd_sum(&footer, 64);
        footer[64..68].copy_from_slice(&sum.to_be_bytes());
        let inside = (file.len() - at).min(FOOTER) as usize;
        file.write(at, &footer[..inside]);
        let header = be(file, at + 16, 8);
        if header.checked_add(1024).is_some_and(|end| end <= file.len()) && has(file, header, b"cxsparse") {
            let sum = vhd_sum(&file.bytes(header, 1024), 36);
            file.write(header + 36, &sum.to_be_bytes());
        }
    }
}

fn valid_footer(file: &Contents, at: u64) -> bool {
    let bytes = file.bytes(at, FOOTER as usize);
    bytes.starts_with(b"conectix") && vhd_sum(&bytes, 64) == be(file, at + 64, 4) as u32
}

fn vhd_metadata(file: &Contents) -> Option<Vec<(u64, u64)>> {
    let end = end_footer(file)?;
    let mut ranges = Vec::new();
    let footer = if valid_footer(file, end) {
        ranges.push((end, end + FOOTER));
        end
    } else {
        0
    };
    if be(file, footer + 60, 4) == 2 {
        return Some(ranges);
    }
    ranges.push((0, FOOTER));
    let header = be(file, footer + 16, 8);
    ranges.push((header, header.checked_add(1024)?));
    let table = be(file, header + 16, 8);
    ranges.push((table, table.checked_add(be(file, header + 28, 4) * 4)?));
    Some(ranges)
}

fn put_crc(file: &mut Contents, at: u64, len: usize) {
    let mut bytes = file.bytes(at, len);
    bytes[4..8].fill(0);
    let crc = crc32c::crc32c(&bytes);
    file.write(at + 4, &crc.to_le_bytes());
}

fn mend_vhdx(file: &mut Contents) {
    for at in HEADERS.into_iter().filter(|at| at + 4096 <= file.len()).collect::<Vec<_>>() {
        if has(file, at, b"head") {
            put_crc(file, at, 4096);
        }
    }
    for at in REGION_TABLES.into_iter().filter(|at| at + (64 << 10) <= file.len()).collect::<Vec<_>>() {
        if has(file, at, b"regi") {
            put_crc(file, at, 64 << 10);
        }
    }
}

/// The log that a header names.
#[derive(Clone, Copy)]
struct Log {
    start: u64,
    len: u64,
}

impl Log {
    fn of(file: &Contents, header: u64) -> Option<Self> {
        let (start, len) = (le(file, header + 72, 8), le(file, header + 68, 4));
        let fits = start.checked_add(len).is_some_and(|end| end <= file.len());
        let sound = start % LOG_SECTOR == 0 && len % LOG_SECTOR == 0 && start >= MIB;
        (fits && sound && has(file, header, b"head")).then_some(Self { start, len })
    }

    /// Where in the file a place behind the sector at `at` is: the log is a ring.
    fn place(self, at: u64, behind: u64) -> u64 {
        self.start + (at - self.start + behind) % self.len
    }

    fn read(self, file: &Contents, at: u64, len: u64) -> Vec<u8> {
        (0..len)
            .step_by(LOG_SECTOR as usize)
            .flat_map(|n| file.bytes(self.place(at, n), LOG_SECTOR as usize))
            .collect()
    }

    fn write(self, file: &mut Contents, at: u64, bytes: &[u8]) {
        for (n, sector) in bytes.chunks(LOG_SECTOR as usize).enumerate() {
            file.write(self.place(at, n as u64 * LOG_SECTOR), sector);
        }
    }
}

fn mend_log(file: &mut Contents, header: u64, coherent: bool) {
    let Some(log) = Log::of(file, header) else { return };
    let guid = file.bytes(header + 48, 16);
    let within = |(from, to): (u64, u64)| (from.max(log.start), to.min(log.start + log.len));
    let runs: Vec<_> = file.runs().map(within).filter(|(from, to)| from < to).collect();
    let sectors = runs.iter().flat_map(|(from, to)| (*from..*to).step_by(LOG_SECTOR as usize));
    let starts: Vec<u64> = sectors.filter(|at| has(file, *at, b"loge")).take(64).collect();
    for at in starts {
        let len = le(file, at + 8, 4);
        if len == 0 || !len.is_multiple_of(LOG_SECTOR) || len > log.len.min(ENTRY_MAX) {
            continue;
        }
        let mut entry = log.read(file, at, len);
        if coherent {
            cohere(&mut entry, &guid);
        }
        entry[4..8].fill(0);
        let crc = crc32c::crc32c(&entry);
        entry[4..8].copy_from_slice(&crc.to_le_bytes());
        log.write(file, at, &entry);
    }
}

/// Gives an entry the log's id, and its parts the entry's number.
fn cohere(entry: &mut [u8], guid: &[u8]) {
    entry[32..48].copy_from_slice(guid);
    let sequence: [u8; 8] = entry[16..24].try_into().unwrap_or_default();
    let count = u32::from_le_bytes(entry[24..28].try_into().unwrap_or_default()) as usize;
    let described = count.saturating_mul(32).saturating_add(64).min(entry.len());
    for descriptor in entry[64..described].chunks_exact_mut(32) {
        descriptor[24..32].copy_from_slice(&sequence);
    }
    for data in
        entry[described.next_multiple_of(4096)..].chunks_exact_mut(4096).filter(|d| d.starts_with(b"data"))
    {
        data[4..8].copy_from_slice(&sequence[4..]);
        data[4092..].copy_from_slice(&sequence[..4]);
    }
}

fn valid_crc(file: &Contents, at: u64, len: usize, signature: &[u8]) -> bool {
    let mut bytes = file.bytes(at, len);
    let stored = le(file, at + 4, 4) as u32;
    bytes[4..8].fill(0);
    bytes.starts_with(signature) && crc32c::crc32c(&bytes) == stored
}

fn current_header(file: &Contents) -> Option<u64> {
    HEADERS.into_iter().filter(|at| valid_crc(file, *at, 4096, b"head")).max_by_key(|at| le(file, at + 8, 8))
}

fn vhdx_metadata(file: &Contents) -> Vec<(u64, u64)> {
    let mut ranges = vec![(0, MIB)];
    // Where two copies say different things, other rules than a checksum may decide between them.
    let header = agreed(file, HEADERS, 4096, b"head", 64..80);
    ranges.extend(header.map(|at| (le(file, at + 72, 8), le(file, at + 68, 4))));
    if let Some(table) = agreed(file, REGION_TABLES, 64 << 10, b"regi", 0..64 << 10) {
        let entries = (0..le(file, table + 8, 4).min(2047)).map(|n| table + 16 + n * 32);
        ranges.extend(entries.map(|at| (le(file, at + 16, 8), le(file, at + 24, 4))));
    }
    ranges.into_iter().map(|(start, len)| (start, start.saturating_add(len))).collect()
}

/// The structure of which there are two copies, when those that are valid have the same bytes in this range.
fn agreed(
    file: &Contents,
    copies: [u64; 2],
    len: usize,
    signature: &[u8],
    same: std::ops::Range<u64>,
) -> Option<u64> {
    let valid: Vec<u64> = copies.into_iter().filter(|at| valid_crc(file, *at, len, signature)).collect();
    let bytes = |at: u64| file.bytes(at + same.start, (same.end - same.start) as usize);
    match valid[..] {
        [first, second] if bytes(first) != bytes(second) => None,
        _ => valid.first().copied(),
    }
}

/// Places in a file of a format at which a change is likely to matter.
pub fn hot_places(file: &Contents, format: Format) -> Vec<u64> {
    let mut places: Vec<u64> = metadata(file, format).into_iter().map(|(start, _)| start).collect();
    match format {
        Format::Vhd => places.extend(end_footer(file)),
        Format::Vhdx => places.extend(HEADERS.into_iter().chain(REGION_TABLES)),
        Format::Raw => {}
    }
    places.retain(|at| *at < file.len());
    places
}
