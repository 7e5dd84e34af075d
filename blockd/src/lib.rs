//! blockd: serves raw, VHD and VHDX images over vhost-user-blk, and moves them while they are used.
//!
//! ```text
//!   front end (VMM) ── messages ──► vhost::session ── commands ──► worker ── io_uring ──► image files
//!        └───────────── rings, guest memory ────────────────────────┘ │
//!                                                                     └── route: one image, or two under a move (mover)
//! ```
//!
//! All danger lives in this room: `unsafe`, threads, rings and guest memory. It must not know how an image lays out
//! its bytes.

#![allow(unsafe_code, reason = "rings, guest memory and io_uring: each block says why it is sound")]

pub mod daemon;
pub mod disk;
pub mod gate;
pub mod histogram;
pub mod mover;
pub mod vhost;
pub mod worker;
