//! The companion of blockd that runs virtual machines and moves them: memory, processors and devices go from one process
//! to another, on this host or to another one, while blockd has the disks.
//!
//! ```text
//! main (command line) ──► api (HTTP on a Unix socket) ──► vm ──► device (virtio-mmio, vhost-user-blk, tap, serial)
//!                                │                         │──► guest (the built-in test guest)
//!                                └──► migrate ─────────────┴──► memory, pages, machine (the seam)
//! ```
//!
//! | room | what lives there | what it must not know |
//! |---|---|---|
//! | [`memory`], [`pages`] | guest memory in a sealed memfd, sets of pages | everything else |
//! | [`machine`] | what a migration needs of a machine, on either side | KVM, devices, the wire |
//! | [`vm`] | KVM: processors, state, dirty log, booting | the wire |
//! | [`device`] | virtio-mmio, the vhost-user front end, tap, serial | KVM (it gets eventfds), the wire |
//! | [`guest`] | the test guest: code, parameters, report | devices' insides |
//! | [`migrate`] | messages, connections, rounds, convergence, who runs the machine, post-copy, files | KVM and devices: it sees [`machine`] only |
//! | [`api`] | the control API and its types | |
//!
//! Exactly one side runs a machine at any time; [`migrate`] says how that is kept.

pub mod api;
pub mod cli;
pub mod control;
pub mod device;
pub mod guest;
pub mod machine;
pub mod memory;
pub mod migrate;
pub mod pages;
pub mod setup;
pub mod storage;
pub mod vm;
