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

mod beneath;
mod chain;
mod check;
mod copy;
mod create;
mod dispatch;
mod error;
mod flat;
mod held;
mod image;
mod info;
mod layers;
mod link;
mod lock;
mod merge;
mod notes_dir;
mod open;
mod own;
mod parents;
mod payload_files;
pub mod raw;
mod rebase;
mod resize;
mod settle;
mod storage;
pub mod vhd;
pub mod vhdx;

pub use chain::{CHAIN_MAX, Chain, Layer};
pub use check::{CheckReport, Finding, Severity, check, check_with_parents};
pub use copy::{
    Comparison, CopyError, CopyOutcome, CopyProgress, compare, copy, copy_layer, read_payload, write_payload,
    zero_payload,
};
pub use create::{CreateOptions, create, link_to_parent};
pub use error::{CreateError, ErrorKind, ImageError, OpenError};
pub use held::{create_over, let_go, remove_notes, reopen, resize_held, share};
pub use image::{
    AllocState, ByteSpan, Extent, FileIndex, Format, Geometry, Image, ImageType, Piece, Pieces, Place,
    SyncToken, ZeroMode,
};
pub use info::{ImageInfo, ImageState, ParentInfo, info, info_with_parents};
pub use layers::{make_layer, on_parents};
pub use link::{LayerOptions, NewParentLink, NotesFile, ParentLink, ParentPath, ParentPathKind};
pub use merge::{MergeChain, MergeFiles, MergeRefused, MergeSides, ReadAlone, read_alone};
pub use open::{OpenOptions, format_by_name, incomplete_move, open};
pub use payload_files::{Shared, may_share, share_payload};
pub use rebase::{RebaseOptions, Rebased, rebase};
pub use resize::{CompactOutcome, compact, resize, resize_with_parents};
pub use settle::settle;
pub use storage::{FileStorage, Storage};
