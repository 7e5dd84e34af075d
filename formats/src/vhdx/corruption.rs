//! The rules of the specification that a file may break, one variant each.

use super::guid::Guid;
use crate::{ErrorKind, ImageError};

/// A rule of MS-VHDX that a file breaks. Offsets and lengths are in bytes of the file unless said otherwise.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Corruption {
    /// The file ends before its own headers.
    #[error("the file has {len} bytes, but the header section alone takes {} (2.2)", super::HEADER_SECTION)]
    FileTooShort {
        /// Size of the file.
        len: u64,
    },
    /// The file is larger than the largest that is supported.
    #[error("the file has {len} bytes; at most {} are supported", super::MAX_FILE_SIZE)]
    FileTooLarge {
        /// Size of the file.
        len: u64,
    },
    /// One header is bad (the other one may do).
    #[error("header {index} at {offset:#x}: {reason} (2.2.2)")]
    Header {
        /// 1 or 2.
        index: u8,
        /// Where it is.
        offset: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Neither header is valid.
    #[error("no valid header: header 1 at 0x10000 has a {first}, header 2 at 0x20000 has a {second} (2.2.2)")]
    NoValidHeader {
        /// What is wrong with header 1.
        first: &'static str,
        /// What is wrong with header 2.
        second: &'static str,
    },
    /// Both headers are valid, with the same sequence number and different contents.
    #[error(
        "both headers have SequenceNumber {sequence:#x} and differ, so there is no current header (2.2.2)"
    )]
    HeadersAmbiguous {
        /// Their sequence number.
        sequence: u64,
    },
    /// The header names another version of the format.
    #[error("header Version is {version}, only 1 is defined (2.2.2)")]
    Version {
        /// As found.
        version: u16,
    },
    /// A log of unknown version would have to be replayed.
    #[error(
        "header LogVersion is {version} while LogGuid says that there is a log; only 0 can be replayed (2.2.2)"
    )]
    LogVersion {
        /// As found.
        version: u16,
    },
    /// The header's sequence number cannot grow any more.
    #[error(
        "header SequenceNumber is {sequence:#x} and cannot be incremented, so the image can only be opened \
         read-only; convert it to a new image (2.2.2.1)"
    )]
    SequenceExhausted {
        /// As found.
        sequence: u64,
    },
    /// The log's length is not allowed.
    #[error(
        "header LogLength is {len:#x}; it must be a multiple of 1 MiB of at most 1 GiB, and not 0 when LogGuid is set (2.2.2)"
    )]
    LogLength {
        /// As found.
        len: u32,
    },
    /// The log's place is not allowed.
    #[error("header LogOffset is {offset:#x}; it must be a multiple of 1 MiB of at least 1 MiB (2.2.2)")]
    LogOffset {
        /// As found.
        offset: u64,
    },
    /// A structure reaches beyond the end of the file.
    #[error("{what} at {offset:#x} of {len:#x} bytes reaches beyond the end of the file at {file_len:#x}")]
    BeyondEnd {
        /// Which structure.
        what: String,
        /// Where it begins.
        offset: u64,
        /// Its length.
        len: u64,
        /// Size of the file.
        file_len: u64,
    },
    /// Two structures share space.
    #[error("{what} at {offset:#x} of {len:#x} bytes overlaps another structure (2.1)")]
    Overlap {
        /// The one that was looked at second.
        what: String,
        /// Where it begins.
        offset: u64,
        /// Its length.
        len: u64,
    },
    /// One region table is bad (the other one may do).
    #[error("region table {index} at {offset:#x}: {reason} (2.2.3)")]
    RegionTable {
        /// 1 or 2.
        index: u8,
        /// Where it is.
        offset: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Neither region table is valid.
    #[error(
        "no valid region table: table 1 at 0x30000 has a {first}, table 2 at 0x40000 has a {second} (2.2.3)"
    )]
    NoValidRegionTable {
        /// What is wrong with table 1.
        first: &'static str,
        /// What is wrong with table 2.
        second: &'static str,
    },
    /// Both region tables are valid and differ.
    #[error("region tables 1 and 2 are both valid and differ (2.2.3)")]
    RegionTablesDiffer,
    /// A region's place or length is not allowed.
    #[error(
        "region {guid}: FileOffset {offset:#x}, Length {len:#x}; both must be multiples of 1 MiB, the offset at \
         least 1 MiB, the length not 0, and their sum below 2^63 (2.2.3.2)"
    )]
    RegionPlace {
        /// Which region.
        guid: Guid,
        /// As found.
        offset: u64,
        /// As found.
        len: u32,
    },
    /// A region is listed twice.
    #[error("region {guid} is listed twice (2.2.3.2)")]
    RegionDuplicate {
        /// Which region.
        guid: Guid,
    },
    /// An unknown region is required.
    #[error("region {guid} is required and not known; a newer program may have made this image (2.2.3.2)")]
    RegionUnknown {
        /// Which region.
        guid: Guid,
    },
    /// A region that every file needs is not there.
    #[error("the region table has no {what} region (2.2.3.2)")]
    RegionMissing {
        /// Which region.
        what: &'static str,
    },
    /// A region exceeds the supported size.
    #[error("the {what} region has {len:#x} bytes; at most {max:#x} are supported")]
    RegionTooLarge {
        /// Which region.
        what: &'static str,
        /// As found.
        len: u32,
        /// The limit.
        max: u32,
    },
    /// The metadata table is not one.
    #[error("metadata table at {offset:#x}: {reason} (2.6.1.1)")]
    MetadataTable {
        /// Where it is.
        offset: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A metadata item's place or length is not allowed.
    #[error("metadata item {item}: Offset {offset:#x}, Length {len:#x} {reason} (2.6.1.2)")]
    MetadataItemPlace {
        /// Which item.
        item: Guid,
        /// As found, from the start of the region.
        offset: u32,
        /// As found.
        len: u32,
        /// What is wrong.
        reason: &'static str,
    },
    /// A metadata item is listed twice.
    #[error("metadata item {item} is listed twice (2.6.1.2)")]
    MetadataDuplicate {
        /// Which item.
        item: Guid,
    },
    /// An unknown metadata item is required.
    #[error(
        "metadata item {item} is required and not known; a newer program may have made this image (2.6.1.2)"
    )]
    MetadataUnknown {
        /// Which item.
        item: Guid,
    },
    /// A metadata item that every file needs is not there.
    #[error("the metadata has no {what} item (2.6.2)")]
    MetadataMissing {
        /// Which item.
        what: &'static str,
    },
    /// Whoever wrote the file was interrupted.
    #[error("the image is marked as incomplete: the copy that made it was interrupted; make the copy again")]
    Incomplete,
    /// The block size is not allowed.
    #[error(
        "File Parameters: BlockSize is {value:#x}; it must be a power of two from 1 MiB to 256 MiB (2.6.2.1)"
    )]
    BlockSize {
        /// As found.
        value: u32,
    },
    /// The size of the disk is not allowed.
    #[error(
        "Virtual Disk Size is {value:#x}; it must be a multiple of the logical sector size {sector}, above 0 and at \
         most 64 TiB (2.6.2.2)"
    )]
    VirtualSize {
        /// As found.
        value: u64,
        /// The logical sector size.
        sector: u32,
    },
    /// A sector size is not allowed.
    #[error("{which} Sector Size is {value}; it must be 512 or 4096 (2.6.2.4, 2.6.2.5)")]
    SectorSize {
        /// Logical or Physical.
        which: &'static str,
        /// As found.
        value: u32,
    },
    /// The parent locator is unsound.
    #[error("parent locator: {reason} (2.6.2.6)")]
    Locator {
        /// What is wrong with it.
        reason: String,
    },
    /// The BAT region cannot hold all entries.
    #[error("the BAT region has {len:#x} bytes, but a disk of this size needs {needed:#x} (2.5)")]
    BatTooSmall {
        /// Length of the region.
        len: u32,
        /// Bytes that the entries take.
        needed: u64,
    },
    /// A BAT entry has a state that is not allowed here.
    #[error("BAT entry {index} at {at:#x} ({raw:#018x}): state {state} is not allowed for {whose} (2.5.1)")]
    BatState {
        /// Index in the table.
        index: u64,
        /// Where the entry is.
        at: u64,
        /// As found.
        raw: u64,
        /// Its state.
        state: u8,
        /// What kind of entry it is.
        whose: &'static str,
    },
    /// A BAT entry has reserved bits set.
    #[error("BAT entry {index} at {at:#x} ({raw:#018x}): reserved bits are set (2.5.1)")]
    BatReserved {
        /// Index in the table.
        index: u64,
        /// Where the entry is.
        at: u64,
        /// As found.
        raw: u64,
    },
    /// A BAT entry's block lies where none can lie.
    #[error(
        "BAT entry {index} at {at:#x} ({raw:#018x}): a block at {offset:#x} of {len:#x} bytes; blocks begin at 1 MiB \
         or later and end within the file of {file_len:#x} bytes (2.5.1)"
    )]
    BatPlace {
        /// Index in the table.
        index: u64,
        /// Where the entry is.
        at: u64,
        /// As found.
        raw: u64,
        /// Where the block would be.
        offset: u128,
        /// How long it is.
        len: u64,
        /// Size of the file.
        file_len: u64,
    },
    /// A BAT entry's block overlaps something.
    #[error(
        "BAT entry {index} at {at:#x} ({raw:#018x}): the block at {offset:#x} of {len:#x} bytes overlaps another block \
         or structure (2.5.1)"
    )]
    BatOverlap {
        /// Index in the table.
        index: u64,
        /// Where the entry is.
        at: u64,
        /// As found.
        raw: u64,
        /// Where the block is.
        offset: u64,
        /// How long it is.
        len: u64,
    },
    /// A partially present block has no sector bitmap.
    #[error(
        "BAT entry {index}: the block is partially present, but its chunk has no sector bitmap block (2.5.1.2)"
    )]
    SectorBitmapMissing {
        /// Index in the table of the payload entry.
        index: u64,
    },
    /// A log must be replayed and none is found.
    #[error(
        "LogGuid is {guid}, so the log must be replayed, but it holds no valid sequence of entries (2.3.3)"
    )]
    LogEmpty {
        /// The header's.
        guid: Guid,
    },
    /// The file is shorter than its log knows it was.
    #[error(
        "the file has {len:#x} bytes, but its log says {flushed:#x} were durable: it was truncated (2.3.3)"
    )]
    LogFileTruncated {
        /// Size of the file.
        len: u64,
        /// FlushedFileOffset of the newest entry.
        flushed: u64,
    },
    /// A log entry would write where the log must not.
    #[error(
        "log entry {sequence}: a descriptor writes {len:#x} bytes at {offset:#x}; allowed is what is above the headers \
         (0x30000), outside the log, and below the end {end:#x} (2.3.1)"
    )]
    LogTarget {
        /// Sequence number of the entry.
        sequence: u64,
        /// Where it would write.
        offset: u64,
        /// How much.
        len: u64,
        /// End of the file after the replay.
        end: u64,
    },
    /// A log has more descriptors than are supported.
    #[error("the log to be replayed has more than {max} descriptors, which is the most that is supported")]
    LogTooLarge {
        /// The limit.
        max: usize,
    },
    /// A log would make the file larger than supported.
    #[error(
        "log entry {sequence}: LastFileOffset is {last:#x}; at most {} is supported",
        super::MAX_FILE_SIZE
    )]
    LogLastFileOffset {
        /// Sequence number of the entry.
        sequence: u64,
        /// As found.
        last: u64,
    },
}

impl Corruption {
    /// A stable name to match on.
    pub fn code(&self) -> &'static str {
        match self {
            Self::FileTooShort { .. } => "vhdx-file-too-short",
            Self::FileTooLarge { .. } => "vhdx-file-too-large",
            Self::Header { .. } => "vhdx-header",
            Self::NoValidHeader { .. } => "vhdx-no-valid-header",
            Self::HeadersAmbiguous { .. } => "vhdx-headers-ambiguous",
            Self::Version { .. } => "vhdx-version",
            Self::LogVersion { .. } => "vhdx-log-version",
            Self::SequenceExhausted { .. } => "vhdx-header-sequence-exhausted",
            Self::LogLength { .. } => "vhdx-log-length",
            Self::LogOffset { .. } => "vhdx-log-offset",
            Self::BeyondEnd { .. } => "vhdx-beyond-end",
            Self::Overlap { .. } => "vhdx-overlap",
            Self::RegionTable { .. } => "vhdx-region-table",
            Self::NoValidRegionTable { .. } => "vhdx-no-valid-region-table",
            Self::RegionTablesDiffer => "vhdx-region-tables-differ",
            Self::RegionPlace { .. } => "vhdx-region-place",
            Self::RegionDuplicate { .. } => "vhdx-region-duplicate",
            Self::RegionUnknown { .. } => "vhdx-region-unknown",
            Self::RegionMissing { .. } => "vhdx-region-missing",
            Self::RegionTooLarge { .. } => "vhdx-region-too-large",
            Self::MetadataTable { .. } => "vhdx-metadata-table",
            Self::MetadataItemPlace { .. } => "vhdx-metadata-item-place",
            Self::MetadataDuplicate { .. } => "vhdx-metadata-duplicate",
            Self::MetadataUnknown { .. } => "vhdx-metadata-unknown",
            Self::MetadataMissing { .. } => "vhdx-metadata-missing",
            Self::Incomplete => "vhdx-incomplete",
            Self::BlockSize { .. } => "vhdx-block-size",
            Self::VirtualSize { .. } => "vhdx-virtual-size",
            Self::SectorSize { .. } => "vhdx-sector-size",
            Self::Locator { .. } => "vhdx-parent-locator",
            Self::BatTooSmall { .. } => "vhdx-bat-too-small",
            Self::BatState { .. } => "vhdx-bat-state",
            Self::BatReserved { .. } => "vhdx-bat-reserved",
            Self::BatPlace { .. } => "vhdx-bat-place",
            Self::BatOverlap { .. } => "vhdx-bat-overlap",
            Self::SectorBitmapMissing { .. } => "vhdx-sector-bitmap-missing",
            Self::LogEmpty { .. } => "vhdx-log-empty",
            Self::LogFileTruncated { .. } => "vhdx-file-truncated",
            Self::LogTarget { .. } => "vhdx-log-target",
            Self::LogTooLarge { .. } => "vhdx-log-too-large",
            Self::LogLastFileOffset { .. } => "vhdx-log-last-file-offset",
        }
    }

    /// What to match on: most are [`ErrorKind::Corrupt`], a few only ask for what is not supported.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::FileTooLarge { .. }
            | Self::Version { .. }
            | Self::LogVersion { .. }
            | Self::SequenceExhausted { .. }
            | Self::RegionUnknown { .. }
            | Self::RegionTooLarge { .. }
            | Self::MetadataUnknown { .. }
            | Self::LogTooLarge { .. } => ErrorKind::Unsupported,
            _ => ErrorKind::Corrupt,
        }
    }

    /// Which structure of the file it is about.
    pub fn structure(&self) -> &'static str {
        match self {
            Self::FileTooShort { .. } | Self::FileTooLarge { .. } => "file",
            Self::Header { .. }
            | Self::NoValidHeader { .. }
            | Self::HeadersAmbiguous { .. }
            | Self::Version { .. }
            | Self::LogVersion { .. }
            | Self::SequenceExhausted { .. }
            | Self::LogLength { .. }
            | Self::LogOffset { .. } => "header",
            Self::BeyondEnd { .. } | Self::Overlap { .. } => "layout",
            Self::RegionTable { .. }
            | Self::NoValidRegionTable { .. }
            | Self::RegionTablesDiffer
            | Self::RegionPlace { .. }
            | Self::RegionDuplicate { .. }
            | Self::RegionUnknown { .. }
            | Self::RegionMissing { .. }
            | Self::RegionTooLarge { .. } => "region table",
            Self::Locator { .. } => "parent locator",
            Self::BatTooSmall { .. }
            | Self::BatState { .. }
            | Self::BatReserved { .. }
            | Self::BatPlace { .. }
            | Self::BatOverlap { .. }
            | Self::SectorBitmapMissing { .. } => "BAT",
            Self::LogEmpty { .. }
            | Self::LogFileTruncated { .. }
            | Self::LogTarget { .. }
            | Self::LogTooLarge { .. }
            | Self::LogLastFileOffset { .. } => "log",
            _ => "metadata",
        }
    }

    /// Where in the file it is, when one place can be named.
    pub fn offset(&self) -> Option<u64> {
        match self {
            Self::Header { offset, .. }
            | Self::RegionTable { offset, .. }
            | Self::MetadataTable { offset, .. }
            | Self::BeyondEnd { offset, .. }
            | Self::Overlap { offset, .. } => Some(*offset),
            Self::BatState { at, .. }
            | Self::BatReserved { at, .. }
            | Self::BatPlace { at, .. }
            | Self::BatOverlap { at, .. } => Some(*at),
            _ => None,
        }
    }
}

impl From<Corruption> for ImageError {
    fn from(corruption: Corruption) -> Self {
        Self::new(corruption.kind(), format!("{corruption} [{}]", corruption.code()))
    }
}

/// Why parsing stopped: a broken rule (which `check` reports by its code), or anything else.
#[derive(Debug)]
pub(super) enum Stop {
    Corrupt(Corruption),
    Other(ImageError),
}

impl From<Corruption> for Stop {
    fn from(corruption: Corruption) -> Self {
        Self::Corrupt(corruption)
    }
}

impl From<ImageError> for Stop {
    fn from(error: ImageError) -> Self {
        Self::Other(error)
    }
}

impl From<Stop> for ImageError {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Corrupt(corruption) => corruption.into(),
            Stop::Other(error) => error,
        }
    }
}
