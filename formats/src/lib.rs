//! On-disk structures of raw, VHD and VHDX images.
//!
//! A codec is a **map**: it answers "where do these bytes live?" and keeps its own metadata safe. It never sees
//! guest memory, virtio or a ring, and it moves no payload: the caller reads and writes the places that the map
//! names. Everything here is plain synchronous Rust.
//!
//! ```text
//!   caller ── map_read / map_write / map_zero ──► Image ── Pieces (file, offset, length | zeroes) ──► caller's I/O
//!                                                   │
//!                                                   └── metadata: read_at, write_at, sync ──► Storage
//! ```
//!
//! This room must not know guest memory, rings, runtimes or sockets.
#![forbid(unsafe_code)]

mod check;
mod error;
mod flat;
mod image;
pub mod raw;
mod storage;
pub mod vhd;

pub use check::{CheckReport, Finding, Severity};
pub use error::{CreateError, ErrorKind, ImageError, OpenError};
pub use image::{
    AllocState, ByteSpan, Extent, FileIndex, Format, Geometry, Image, ImageType, Piece, Pieces, Place,
    SyncToken, ZeroMode,
};
pub use storage::{FileStorage, Storage};
