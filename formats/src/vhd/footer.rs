//! The footer: 512 bytes that say what a VHD is (specification, "Hard Disk Footer Format").

use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use super::Corruption;
use super::bytes::{put, u32_at, u64_at};

/// Length of a footer in bytes.
pub(super) const FOOTER_LEN: u64 = 512;
const COOKIE: &[u8; 8] = b"conectix";
const CHECKSUM_AT: usize = 64;
const HIDDEN_AT: usize = 85;
/// 1 January 2000, 0:00 UTC, in seconds since the epoch.
const YEAR_2000: u64 = 946_684_800;
/// What this software calls itself in the footers that it makes.
const CREATOR: &[u8; 4] = b"blkd";

/// Disk types (footer offset 60).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DiskType {
    Fixed = 2,
    Dynamic = 3,
    Differencing = 4,
}

/// A footer with a good cookie and checksum. Keeps its bytes, so that fields which mean nothing here survive a move of
/// the footer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Footer {
    raw: [u8; FOOTER_LEN as usize],
}

impl Footer {
    /// Takes the bytes for a footer if cookie and checksum are good. Bytes that are missing at the end (the footer of
    /// Virtual PC before 2004 has 511) count as zero.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let mut raw = [0; FOOTER_LEN as usize];
        raw.get_mut(..bytes.len())?.copy_from_slice(bytes);
        if &raw[..8] != COOKIE {
            return None;
        }
        let stored = u32_at(&raw, CHECKSUM_AT);
        let footer = Self { raw };
        (stored == checksum(&raw, CHECKSUM_AT) || footer.is_hidden_by_tapdisk(stored)).then_some(footer)
    }

    /// Stored and computed checksum of bytes that have a footer's cookie, but are none.
    pub(super) fn bad_checksum(raw: &[u8; FOOTER_LEN as usize]) -> Option<(u32, u32)> {
        (&raw[..8] == COOKIE).then(|| (u32_at(raw, CHECKSUM_AT), checksum(raw, CHECKSUM_AT)))
    }

    /// Early versions of blktap marked a footer as hidden without renewing its checksum.
    fn is_hidden_by_tapdisk(&self, stored: u32) -> bool {
        if self.creator() != *b"tap\0" || !matches!(self.creator_version(), 0x0000_0001 | 0x0001_0001) {
            return false;
        }
        let mut shown = self.raw;
        shown[HIDDEN_AT] = 0;
        stored == checksum(&shown, CHECKSUM_AT)
    }

    /// A footer for a new disk of `size` bytes.
    pub(super) fn new(disk_type: DiskType, size: u64) -> Self {
        let mut raw = [0; FOOTER_LEN as usize];
        let data_offset = if disk_type == DiskType::Fixed { u64::MAX } else { FOOTER_LEN };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(YEAR_2000, |d| d.as_secs());
        let seconds = u32::try_from(now.saturating_sub(YEAR_2000)).unwrap_or(u32::MAX);
        put(&mut raw, 0, COOKIE);
        put(&mut raw, 8, &2u32.to_be_bytes()); // bit 1 is reserved and always set
        put(&mut raw, 12, &0x0001_0000u32.to_be_bytes());
        put(&mut raw, 16, &data_offset.to_be_bytes());
        put(&mut raw, 24, &seconds.to_be_bytes());
        put(&mut raw, 28, CREATOR);
        put(&mut raw, 32, &0x0001_0000u32.to_be_bytes());
        put(&mut raw, 36, b"Wi2k"); // the field knows Windows and Macintosh only
        put(&mut raw, 40, &size.to_be_bytes());
        put(&mut raw, 48, &size.to_be_bytes());
        put(&mut raw, 56, &chs(size));
        put(&mut raw, 60, &(disk_type as u32).to_be_bytes());
        put(&mut raw, 68, Uuid::new_v4().as_bytes());
        Self::sealed(raw)
    }

    pub(super) fn bytes(&self) -> &[u8; FOOTER_LEN as usize] {
        &self.raw
    }

    /// The footer of the same disk with another current size, and the geometry that goes with it.
    pub(super) fn with_size(&self, size: u64) -> Self {
        let mut raw = self.raw;
        let geometry = chs(size);
        put(&mut raw, 48, &size.to_be_bytes());
        put(&mut raw, 56, &geometry);
        // QEMU takes the size of what these have made from the geometry, which is seldom exact.
        if matches!(&self.creator(), b"vpc " | b"qemu") && chs_size(geometry) != size {
            put(&mut raw, 28, CREATOR);
        }
        Self::sealed(raw)
    }

    /// The footer of the same disk whose dynamic header is at `offset`.
    pub(super) fn with_data_offset(&self, offset: u64) -> Self {
        let mut raw = self.raw;
        put(&mut raw, 16, &offset.to_be_bytes());
        Self::sealed(raw)
    }

    fn sealed(mut raw: [u8; FOOTER_LEN as usize]) -> Self {
        let sum = checksum(&raw, CHECKSUM_AT);
        put(&mut raw, CHECKSUM_AT, &sum.to_be_bytes());
        Self { raw }
    }

    /// Cylinders (16 bits), heads, sectors per track.
    pub(super) fn geometry(&self) -> [u8; 4] {
        [self.raw[56], self.raw[57], self.raw[58], self.raw[59]]
    }

    pub(super) fn features(&self) -> u32 {
        u32_at(&self.raw, 8)
    }

    pub(super) fn data_offset(&self) -> u64 {
        u64_at(&self.raw, 16)
    }

    pub(super) fn creator(&self) -> [u8; 4] {
        [self.raw[28], self.raw[29], self.raw[30], self.raw[31]]
    }

    pub(super) fn creator_version(&self) -> u32 {
        u32_at(&self.raw, 32)
    }

    pub(super) fn original_size(&self) -> u64 {
        u64_at(&self.raw, 40)
    }

    /// Size of the virtual disk in bytes, as every current tool reads it (the geometry field is only a hint).
    pub(super) fn current_size(&self) -> u64 {
        u64_at(&self.raw, 48)
    }

    pub(super) fn unique_id(&self) -> Uuid {
        let mut id = [0; 16];
        id.copy_from_slice(&self.raw[68..84]);
        Uuid::from_bytes(id)
    }

    /// Whether a virtual machine was suspended with this disk.
    pub(super) fn saved_state(&self) -> bool {
        self.raw[84] != 0
    }

    /// The disk type; an error for types and versions that are not known. `offset` is where the footer is, for the
    /// message.
    pub(super) fn disk_type(&self, offset: u64) -> Result<DiskType, Corruption> {
        let version = u32_at(&self.raw, 12);
        if version >> 16 != 1 {
            return Err(Corruption::FooterVersion { offset, version });
        }
        match u32_at(&self.raw, 60) {
            2 => Ok(DiskType::Fixed),
            3 => Ok(DiskType::Dynamic),
            4 => Ok(DiskType::Differencing),
            disk_type => Err(Corruption::DiskType { offset, disk_type }),
        }
    }

    /// The creator's name and version as text.
    pub(super) fn creator_text(&self) -> String {
        let name: String =
            self.creator().iter().map(|&b| if b.is_ascii_graphic() { char::from(b) } else { ' ' }).collect();
        let version = self.creator_version();
        format!("{} {}.{}", name.trim_end(), version >> 16, version & 0xffff)
    }
}

/// Ones' complement of the sum of all bytes but the four of the checksum itself (specification, "Checksum").
pub(super) fn checksum(bytes: &[u8], field_at: usize) -> u32 {
    let skip = field_at..field_at + 4;
    let sum =
        bytes.iter().enumerate().filter(|(i, _)| !skip.contains(i)).map(|(_, &b)| u32::from(b)).sum::<u32>();
    !sum
}

/// The geometry that is closest below `size` bytes (specification, appendix "CHS Calculation"): cylinders (16 bits),
/// heads, sectors per track.
pub(super) fn chs(size: u64) -> [u8; 4] {
    const MAX_CYLINDERS: u64 = 65535;
    let total = (size / 512).min(MAX_CYLINDERS * 16 * 255);
    let (sectors, heads, tracks);
    if total >= MAX_CYLINDERS * 16 * 63 {
        (sectors, heads, tracks) = (255, 16, total / 255);
    } else {
        let mut s = 17;
        let mut t = total / s;
        let mut h = t.div_ceil(1024).max(4);
        if t >= h * 1024 || h > 16 {
            (s, h) = (31, 16);
            t = total / s;
        }
        if t >= h * 1024 {
            (s, h) = (63, 16);
            t = total / s;
        }
        (sectors, heads, tracks) = (s, h, t);
    }
    let [.., high, low] = (tracks / heads).to_be_bytes();
    [high, low, heads as u8, sectors as u8]
}

/// The bytes that a geometry can address.
pub(super) fn chs_size([high, low, heads, sectors]: [u8; 4]) -> u64 {
    u64::from(u16::from_be_bytes([high, low])) * u64::from(heads) * u64::from(sectors) * 512
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_footer_parses_and_says_what_was_asked() {
        let footer = Footer::new(DiskType::Dynamic, 8 << 20);
        let again = Footer::parse(footer.bytes()).unwrap();
        assert_eq!(again, footer);
        assert_eq!(again.current_size(), 8 << 20);
        assert_eq!(again.disk_type(0), Ok(DiskType::Dynamic));
        assert_eq!(again.creator_text(), "blkd 1.0");
    }

    #[test]
    fn any_flipped_byte_but_the_checksum_bug_of_tapdisk_is_noticed() {
        let footer = Footer::new(DiskType::Fixed, 4096);
        for at in 0..512 {
            let mut raw = *footer.bytes();
            raw[at] ^= 0x10;
            assert_eq!(Footer::parse(&raw), None, "byte {at}");
        }
        let mut tap = *footer.bytes();
        put(&mut tap, 28, b"tap\0\0\x01\0\x01");
        let sum = checksum(&tap, CHECKSUM_AT);
        put(&mut tap, CHECKSUM_AT, &sum.to_be_bytes());
        tap[HIDDEN_AT] = 1;
        assert!(Footer::parse(&tap).is_some());
    }

    #[test]
    fn a_footer_of_511_bytes_counts_as_one_whose_last_byte_is_zero() {
        let footer = Footer::new(DiskType::Fixed, 4096);
        assert_eq!(Footer::parse(&footer.bytes()[..511]), Some(footer));
    }

    #[test]
    fn geometry_follows_the_appendix_of_the_specification() {
        let of = |size| {
            let g = chs(size);
            (u16::from_be_bytes([g[0], g[1]]), g[2], g[3])
        };
        assert_eq!(of(4 << 20), (120, 4, 17));
        assert_eq!(of(10 << 20), (301, 4, 17));
        assert_eq!(of(512 << 20), (1040, 16, 63));
        assert_eq!(of(2040 << 30), (65535, 16, 255));
    }
}
