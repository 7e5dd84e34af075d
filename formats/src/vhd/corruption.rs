//! The rules that a VHD may break, one variant each.

use crate::{ErrorKind, ImageError};

use super::MAX_TABLE_ENTRIES;

/// A rule of the Virtual Hard Disk specification 1.0 (or a bound that follows from it) that a file breaks.
///
/// Offsets are bytes in the file unless a name says otherwise.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Corruption {
    /// No sector that could be a footer has a good cookie and checksum.
    #[error(
        "no valid footer: neither the last 512 (or 511) bytes of the file ({file_len} bytes) nor the copy at 0 \
         have the cookie `conectix` and a good checksum; the file is cut short, damaged, or not a VHD"
    )]
    FooterMissing {
        /// Size of the file.
        file_len: u64,
    },
    /// A footer with a bad checksum, and no valid copy of it.
    #[error(
        "footer at {offset}: checksum is {stored:#010x}, computed {computed:#010x}, and there is no valid copy at 0"
    )]
    FooterChecksum {
        /// Where the footer is.
        offset: u64,
        /// What it says.
        stored: u32,
        /// What its bytes give.
        computed: u32,
    },
    /// A footer of another major version.
    #[error("footer at {offset}: version {version:#010x}, only 1.x (0x0001xxxx) is known")]
    FooterVersion {
        /// Where the footer is.
        offset: u64,
        /// Its version field.
        version: u32,
    },
    /// A disk type that is reserved or unknown.
    #[error("footer at {offset}: disk type {disk_type}, must be 2 (fixed), 3 (dynamic) or 4 (differencing)")]
    DiskType {
        /// Where the footer is.
        offset: u64,
        /// Its type field.
        disk_type: u32,
    },
    /// A disk of no bytes.
    #[error("footer: current size is 0, must be 512 bytes at least")]
    SizeZero,
    /// A disk that ends inside a sector.
    #[error("footer: current size {size} is not a multiple of 512 bytes")]
    SizeUnaligned {
        /// The current size field.
        size: u64,
    },
    /// A disk larger than the format allows.
    #[error("footer: current size {size} is above the format's limit of 2040 GiB (2190433320960 bytes)")]
    SizeTooLarge {
        /// The current size field.
        size: u64,
    },
    /// A fixed disk whose content does not fit before its footer.
    #[error(
        "fixed disk: current size {size}, but only {room} bytes precede the footer; the file is cut short"
    )]
    FixedTooShort {
        /// The current size field.
        size: u64,
        /// Bytes before the footer.
        room: u64,
    },
    /// The dynamic header off the sector grid.
    #[error("footer: data offset {offset} of the dynamic header is not a multiple of 512")]
    HeaderUnaligned {
        /// The footer's data offset.
        offset: u64,
    },
    /// The dynamic header outside of the file.
    #[error("footer: data offset {offset}: the dynamic header (1024 bytes) must end by {limit}")]
    HeaderOutside {
        /// The footer's data offset.
        offset: u64,
        /// Where the footer begins.
        limit: u64,
    },
    /// No dynamic header where there should be one.
    #[error("dynamic header at {offset}: the cookie is not `cxsparse`")]
    HeaderCookie {
        /// Where it should be.
        offset: u64,
    },
    /// A dynamic header with a bad checksum.
    #[error("dynamic header at {offset}: checksum is {stored:#010x}, computed {computed:#010x}")]
    HeaderChecksum {
        /// Where the header is.
        offset: u64,
        /// What it says.
        stored: u32,
        /// What its bytes give.
        computed: u32,
    },
    /// A dynamic header of another major version.
    #[error("dynamic header: version {version:#010x}, only 1.x (0x0001xxxx) is known")]
    HeaderVersion {
        /// Its version field.
        version: u32,
    },
    /// A block size that cannot be.
    #[error("dynamic header: block size {size}, must be a power of two from 512 to 268435456 (256 MiB)")]
    BlockSize {
        /// The block size field.
        size: u32,
    },
    /// A block table larger than any disk needs.
    #[error("dynamic header: max table entries {entries}, at most {MAX_TABLE_ENTRIES} are allowed")]
    TableTooLarge {
        /// The field.
        entries: u32,
    },
    /// A block table too small for the disk.
    #[error("dynamic header: max table entries {entries}, the disk needs {needed}")]
    TableTooSmall {
        /// The field.
        entries: u32,
        /// Blocks of the disk.
        needed: u64,
    },
    /// A block table off the sector grid.
    #[error("dynamic header: table offset {offset} is not a multiple of 512")]
    TableUnaligned {
        /// The field.
        offset: u64,
    },
    /// A block table outside of the file.
    #[error("dynamic header: the block table at {offset} ({len} bytes) must end by {limit}")]
    TableOutside {
        /// The table offset field.
        offset: u64,
        /// Length of the table.
        len: u64,
        /// Where the footer begins.
        limit: u64,
    },
    /// Two structures in one place.
    #[error("{first} and {second} overlap at {offset}")]
    StructuresOverlap {
        /// The one that begins first.
        first: &'static str,
        /// The other.
        second: &'static str,
        /// Where the other begins.
        offset: u64,
    },
    /// A block that does not end before the footer.
    #[error(
        "block table entry {block}: the block at {offset} ({len} bytes with its bitmap) must end by {limit}"
    )]
    BlockOutside {
        /// The block's number.
        block: u64,
        /// Where its sector bitmap begins.
        offset: u64,
        /// Bytes of bitmap and data.
        len: u64,
        /// Where the footer (or the file) ends.
        limit: u64,
    },
    /// A block over a structure.
    #[error("block table entry {block}: the block at {offset} overlaps the {structure}")]
    BlockOverStructure {
        /// The block's number.
        block: u64,
        /// Where its sector bitmap begins.
        offset: u64,
        /// What it overlaps.
        structure: &'static str,
    },
    /// Two blocks in one place.
    #[error("block table entries {block} and {other}: their blocks overlap at {offset}")]
    BlocksOverlap {
        /// One block's number.
        block: u64,
        /// The other's.
        other: u64,
        /// Where the later of the two begins.
        offset: u64,
    },
    /// A parent locator's data outside of the file.
    #[error("parent locator {index}: {len} bytes at {offset} must end by {limit}")]
    LocatorOutside {
        /// Which of the eight.
        index: usize,
        /// Its data offset.
        offset: u64,
        /// Its data length.
        len: u32,
        /// Where the footer begins.
        limit: u64,
    },
    /// A parent locator longer than any path.
    #[error("parent locator {index}: data length {len}, at most {max} bytes are allowed")]
    LocatorTooLong {
        /// Which of the eight.
        index: usize,
        /// Its data length.
        len: u32,
        /// The bound.
        max: u32,
    },
    /// UTF-16 of an odd number of bytes.
    #[error("parent locator {index}: data length {len} of a UTF-16 path is odd")]
    LocatorOdd {
        /// Which of the eight.
        index: usize,
        /// Its data length.
        len: u32,
    },
    /// A path that is not UTF-16, or holds NUL.
    #[error("parent locator {index}: the path is not valid UTF-16, or holds a NUL character")]
    LocatorText {
        /// Which of the eight.
        index: usize,
    },
}

impl Corruption {
    /// A stable name of the rule, to match on.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::FooterMissing { .. } => "vhd-footer-missing",
            Self::FooterChecksum { .. } => "vhd-footer-checksum",
            Self::FooterVersion { .. } => "vhd-footer-version",
            Self::DiskType { .. } => "vhd-disk-type",
            Self::SizeZero => "vhd-size-zero",
            Self::SizeUnaligned { .. } => "vhd-size-unaligned",
            Self::SizeTooLarge { .. } => "vhd-size-too-large",
            Self::FixedTooShort { .. } => "vhd-fixed-too-short",
            Self::HeaderUnaligned { .. } => "vhd-header-unaligned",
            Self::HeaderOutside { .. } => "vhd-header-outside",
            Self::HeaderCookie { .. } => "vhd-header-cookie",
            Self::HeaderChecksum { .. } => "vhd-header-checksum",
            Self::HeaderVersion { .. } => "vhd-header-version",
            Self::BlockSize { .. } => "vhd-block-size",
            Self::TableTooLarge { .. } => "vhd-table-too-large",
            Self::TableTooSmall { .. } => "vhd-table-too-small",
            Self::TableUnaligned { .. } => "vhd-table-unaligned",
            Self::TableOutside { .. } => "vhd-table-outside",
            Self::StructuresOverlap { .. } => "vhd-structures-overlap",
            Self::BlockOutside { .. } => "vhd-block-outside",
            Self::BlockOverStructure { .. } => "vhd-block-over-structure",
            Self::BlocksOverlap { .. } => "vhd-blocks-overlap",
            Self::LocatorOutside { .. } => "vhd-locator-outside",
            Self::LocatorTooLong { .. } => "vhd-locator-too-long",
            Self::LocatorOdd { .. } => "vhd-locator-odd",
            Self::LocatorText { .. } => "vhd-locator-text",
        }
    }

    /// The structure and its offset, for a report.
    pub const fn place(&self) -> (&'static str, Option<u64>) {
        match self {
            Self::FooterMissing { .. } => ("footer", None),
            Self::FooterChecksum { offset, .. }
            | Self::FooterVersion { offset, .. }
            | Self::DiskType { offset, .. } => ("footer", Some(*offset)),
            Self::SizeZero | Self::SizeUnaligned { .. } | Self::SizeTooLarge { .. } => ("footer", None),
            Self::FixedTooShort { .. } => ("footer", None),
            Self::HeaderUnaligned { offset }
            | Self::HeaderOutside { offset, .. }
            | Self::HeaderCookie { offset }
            | Self::HeaderChecksum { offset, .. } => ("dynamic header", Some(*offset)),
            Self::HeaderVersion { .. } | Self::BlockSize { .. } => ("dynamic header", None),
            Self::TableTooLarge { .. } | Self::TableTooSmall { .. } => ("block table", None),
            Self::TableUnaligned { offset } | Self::TableOutside { offset, .. } => {
                ("block table", Some(*offset))
            }
            Self::StructuresOverlap { second, offset, .. } => (*second, Some(*offset)),
            Self::BlockOutside { offset, .. }
            | Self::BlockOverStructure { offset, .. }
            | Self::BlocksOverlap { offset, .. } => ("block", Some(*offset)),
            Self::LocatorOutside { offset, .. } => ("parent locator", Some(*offset)),
            Self::LocatorTooLong { .. } | Self::LocatorOdd { .. } | Self::LocatorText { .. } => {
                ("parent locator", None)
            }
        }
    }
}

impl From<Corruption> for ImageError {
    fn from(c: Corruption) -> Self {
        Self::new(ErrorKind::Corrupt, format!("{c} [{}]", c.code()))
    }
}

/// Why reading the structures ended early: the file breaks a rule, or could not be read.
#[derive(Debug)]
pub(super) enum Fault {
    /// It breaks a rule.
    Corrupt(Corruption),
    /// It could not be read.
    Image(ImageError),
}

impl From<Corruption> for Fault {
    fn from(c: Corruption) -> Self {
        Self::Corrupt(c)
    }
}

impl From<ImageError> for Fault {
    fn from(e: ImageError) -> Self {
        Self::Image(e)
    }
}

impl From<Fault> for ImageError {
    fn from(f: Fault) -> Self {
        match f {
            Fault::Corrupt(c) => c.into(),
            Fault::Image(e) => e,
        }
    }
}
