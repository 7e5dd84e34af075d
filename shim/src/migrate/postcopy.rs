//! Post-copy.
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How the target's processors waited for pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultReport {
    /// Pages that a processor waited for.
    pub faults: u64,
    /// Half of the waits were shorter.
    pub p50: Duration,
    /// 99 of 100 were shorter.
    pub p99: Duration,
    /// The longest.
    pub max: Duration,
}
