//! What is seen of a migration while it goes on, and how it is stopped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The eight steps of a live migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// 1: a machine is made on the target.
    Create,
    /// 2: all of the memory is copied.
    InitialCopy,
    /// 3: what was written meanwhile is copied, round by round.
    DirtyRounds,
    /// 4: the source pauses.
    Pause,
    /// 5: the last pages and the state of devices and processors follow.
    State,
    /// 6: the target resumes.
    Resume,
    /// 7: the network learns the new place.
    Announce,
    /// 8: the source ends.
    End,
}

impl Step {
    /// Its number, 1 to 8.
    pub fn number(self) -> u8 {
        self as u8 + 1
    }
}

/// Where a migration stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The step.
    pub step: Step,
    /// The round of copying, from 0.
    pub round: u32,
    /// Pages of the guest's memory.
    pub pages_total: u64,
    /// Pages of this round that are still to be looked at.
    pub pages_left: u64,
    /// Pages with content sent so far, in all rounds.
    pub pages_sent: u64,
    /// Zero pages found so far, in all rounds.
    pub pages_zero: u64,
    /// Bytes that went over the wire.
    pub wire_bytes: u64,
    /// Bytes of memory copied per second in the last round that says something about it.
    pub copy_rate: u64,
    /// Bytes of memory that the guest wrote per second in the last round.
    pub dirty_rate: u64,
    /// Downtime that the machine would have if it were paused now.
    pub expected_downtime: Option<Duration>,
    /// Share of time that the processors rest, percent.
    pub throttle: u8,
    /// From the pause to the target's word that the machine runs.
    pub downtime: Option<Duration>,
    /// Since the migration began.
    pub elapsed: Duration,
    /// Pages that the target's processors waited for, in post-copy.
    pub faults: u64,
}

impl Progress {
    /// At the beginning.
    pub fn new(pages_total: u64) -> Self {
        Self {
            step: Step::Create,
            round: 0,
            pages_total,
            pages_left: 0,
            pages_sent: 0,
            pages_zero: 0,
            wire_bytes: 0,
            copy_rate: 0,
            dirty_rate: 0,
            expected_downtime: None,
            throttle: 0,
            downtime: None,
            elapsed: Duration::ZERO,
            faults: 0,
        }
    }
}

/// Who wants to know where a migration stands. Called from the migration's thread; it is not to block.
pub type Observer<'a> = &'a (dyn Fn(&Progress) + Sync);

/// Asks a migration to stop. Clones ask for the same.
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// One that nobody has used.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it was asked.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// Whether it was asked; what was asked is over with that.
    pub fn take(&self) -> bool {
        self.0.swap(false, Ordering::SeqCst)
    }
}
