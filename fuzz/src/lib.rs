//! Bodies of the fuzz targets of `formats`, without the fuzzer's runtime, so that plain tests can call them too.
//!
//! ```text
//!   bytes ── encoding ──► sparse file ── structures (mends checksums) ──► open::run        hostile images
//!   bytes ── bytes ─────► options and operations ──────────────────────► operations::run  sound images, crashes
//!                                            both on MemoryFile, which is bounded and counts the work done to it
//! ```
//!
//! A target panics when a promise of `formats` is broken; README.md says which ones are looked at.
#![forbid(unsafe_code)]

mod codec;
pub mod encoding;
pub mod mutate;
pub mod open;
pub mod operations;
pub mod payload;
pub mod seeds;
pub mod storage;
pub mod structures;

/// The unit that a power cut keeps or loses, in bytes.
pub const SECTOR: u64 = 512;
