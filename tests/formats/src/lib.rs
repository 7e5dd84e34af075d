//! Simulated storage, crash enumeration and an oracle for the image formats.
//!
//! ```text
//!   test ── write_payload / zero_payload ──► Image ──► SimStorage ── trace ──► CrashExplorer ── each crash state ──┐
//!     └── History (what was begun, acknowledged, flushed) ◄── verify ── Image opened anew on that state ◄──────────┘
//! ```
//!
//! [`SimStorage`] is a file in memory that knows what a power cut would leave of it. [`CrashExplorer`] goes through the
//! operations that were done and through what a power cut after each of them may leave behind; [`History`] says which
//! contents are then allowed. The unit of everything is the 512-byte sector, which is written whole or not at all.
#![forbid(unsafe_code)]

pub mod corpus;
mod crash;
mod disk;
mod oracle;
mod payload;
pub mod readers;
mod sim;
mod xfs;

pub use crash::{CrashCount, CrashExplorer, CrashKind, CrashState};
pub use disk::SimDisk;
pub use oracle::{History, Progress};
pub use payload::{read_nonzero_sectors, read_payload, write_payload, zero_payload};
pub use sim::{Fault, Mark, SimStorage, TraceOp};
pub use xfs::Xfs;

/// The unit that a power cut keeps or loses, in bytes.
pub const SECTOR: u64 = 512;
