//! Changing the size of images that nobody uses, and giving back the space that they waste.

use serde::{Deserialize, Serialize};

/// What compacting an image has brought. Sizes are in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompactOutcome {
    /// By how much the file takes up less: what was cut off its end, and holes made in it.
    pub freed_bytes: u64,
    /// Content that was moved within the file for that.
    pub moved_bytes: u64,
}
