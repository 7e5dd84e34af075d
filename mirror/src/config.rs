//! What a move is told before it begins.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The smallest extent.
pub const BYTES_PER_EXTENT_MIN: u64 = 4 << 10;
/// The largest extent.
pub const BYTES_PER_EXTENT_MAX: u64 = 16 << 20;

/// When guest writes begin to go to both disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MirrorMode {
    /// After the first copy of everything: until then guest writes go to the source at full speed.
    #[default]
    AfterCopy,
    /// At once: each extent is copied once, and writes to what is copied already go to both disks.
    FromStart,
}

/// Who says when the target becomes the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SwitchMode {
    /// As soon as both sides are equal and verified.
    #[default]
    Auto,
    /// [`crate::Event::Switch`], which may come before both sides are equal and is then remembered.
    Manual,
}

/// How much is read back on both sides before the commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verify {
    /// Nothing.
    None,
    /// One extent of every 64, chosen pseudo-randomly, and the first and the last.
    Sample,
    /// All of the disk.
    #[default]
    Full,
}

/// What an error of the target does to the move. It is never the guest's error before the commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnTargetError {
    /// The move pauses until it is resumed.
    #[default]
    Pause,
    /// The move goes on after a while (0.1 s, doubled up to 30 s). A full target pauses it all the same.
    Retry,
    /// The move fails and the target is discarded.
    Abort,
}

/// Who and where: what the journal says about the move, unknown to the machine but for the generation.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Plan {
    /// The job's id.
    pub job: String,
    /// The disk's id.
    pub disk: String,
    /// The disk's generation before the move; the commit makes it one more.
    pub generation: u64,
    /// The source's image.
    pub source: String,
    /// The target under the name that it has until it is finished.
    pub target_temporary: String,
    /// The target under its final name.
    pub target_final: String,
    /// What else the caller needs in order to begin the move anew after a restart (format, type, block size and so on).
    #[serde(default)]
    pub details: BTreeMap<String, String>,
}

/// The parameters of a move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What the journal says about the move.
    pub plan: Plan,
    /// Size of the disk in bytes, at least 1. The last extent may be a part of one.
    pub disk_size: u64,
    /// Bytes of an extent: a power of two from 4 KiB to 16 MiB.
    pub extent_size: u64,
    /// When guest writes begin to go to both disks.
    pub mode: MirrorMode,
    /// Who says when the target becomes the disk.
    pub switch: SwitchMode,
    /// How much is read back before the commit.
    pub verify: Verify,
    /// The target becomes a copy as of one point in time, and the disk stays where it is.
    pub copy_only: bool,
    /// The source is not deleted.
    pub keep_source: bool,
    /// What an error of the target does.
    pub on_target_error: OnTargetError,
    /// Bytes a second that copies (and verifying reads) may take; `None` for no limit. At least 1.
    pub bandwidth: Option<u64>,
    /// Microseconds that 99 of 100 of the guest's reads and writes may take: copies and verifying reads are paced so that they
    /// do, as far as pacing helps and down to 8 MiB a second. At least 1. Without it, what they take in moments without
    /// copies, times 1.4, and down to 32 MiB a second.
    pub max_guest_p99_us: Option<u64>,
    /// Copies, or verifying reads, in flight at the same time: at least 1.
    pub copies_in_flight_max: u32,
    /// Bytes of one copy at most: a multiple of `extent_size`. Where writes are mirrored copies have 256 KiB at most (or
    /// one extent where that is larger), so that guest writes wait less.
    pub copy_bytes_max: u64,
}

impl Default for Config {
    /// A disk of 1 GiB in extents of 64 KiB, with 8 copies of up to 1 MiB in flight.
    fn default() -> Self {
        Self {
            plan: Plan::default(),
            disk_size: 1 << 30,
            extent_size: 64 << 10,
            mode: MirrorMode::default(),
            switch: SwitchMode::default(),
            verify: Verify::default(),
            copy_only: false,
            keep_source: false,
            on_target_error: OnTargetError::default(),
            bandwidth: None,
            max_guest_p99_us: None,
            copies_in_flight_max: 8,
            copy_bytes_max: 1 << 20,
        }
    }
}

/// A parameter outside its range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The disk has no bytes.
    #[error("disk_size is 0 bytes: a disk to move has at least 1")]
    EmptyDisk,
    /// The extent size is not a power of two in its range.
    #[error("extent_size is {0} bytes: it has to be a power of two from 4096 to 16777216")]
    ExtentSize(u64),
    /// More extents than can be numbered.
    #[error(
        "{disk_size} bytes are more than 2^32 - 1 extents of {extent_size} bytes: choose a larger extent_size"
    )]
    TooManyExtents {
        /// Bytes of the disk.
        disk_size: u64,
        /// Bytes of an extent.
        extent_size: u64,
    },
    /// No copy could ever start.
    #[error("copies_in_flight_max is 0: at least 1 copy has to be allowed")]
    NoCopies,
    /// The size of a copy does not fit the extents.
    #[error(
        "copy_bytes_max is {copy_bytes_max} bytes: it has to be a multiple of the extent size, {extent_size}"
    )]
    CopyBytes {
        /// Bytes of a copy.
        copy_bytes_max: u64,
        /// Bytes of an extent.
        extent_size: u64,
    },
    /// The commit would have no generation.
    #[error("the disk's generation is {0}: the next one does not fit in 64 bits")]
    Generation(u64),
    /// No bandwidth at all.
    #[error("bandwidth is 0 bytes a second: at least 1, or none for no limit; to stop a move, pause it")]
    NoBandwidth,
    /// No request is that fast.
    #[error("max_guest_p99_us is 0 microseconds: at least 1, or none for no budget")]
    NoLatency,
}

impl Config {
    /// Whether all parameters are in their ranges.
    ///
    /// # Errors
    /// The first parameter that is not.
    pub fn check(&self) -> Result<(), ConfigError> {
        let Self { disk_size, extent_size, copy_bytes_max, .. } = *self;
        if disk_size == 0 {
            return Err(ConfigError::EmptyDisk);
        }
        if !extent_size.is_power_of_two()
            || !(BYTES_PER_EXTENT_MIN..=BYTES_PER_EXTENT_MAX).contains(&extent_size)
        {
            return Err(ConfigError::ExtentSize(extent_size));
        }
        if disk_size.div_ceil(extent_size) > u64::from(u32::MAX) {
            return Err(ConfigError::TooManyExtents { disk_size, extent_size });
        }
        if self.copies_in_flight_max == 0 {
            return Err(ConfigError::NoCopies);
        }
        if copy_bytes_max == 0 || copy_bytes_max % extent_size != 0 {
            return Err(ConfigError::CopyBytes { copy_bytes_max, extent_size });
        }
        if self.plan.generation == u64::MAX {
            return Err(ConfigError::Generation(self.plan.generation));
        }
        if self.bandwidth == Some(0) {
            return Err(ConfigError::NoBandwidth);
        }
        if self.max_guest_p99_us == Some(0) {
            return Err(ConfigError::NoLatency);
        }
        Ok(())
    }

    /// The number of extents, the last of which may be a part of one.
    pub fn extent_count(&self) -> u32 {
        u32::try_from(self.disk_size.div_ceil(self.extent_size))
            .expect("checked: extents are numbered in 32 bits")
    }
}
