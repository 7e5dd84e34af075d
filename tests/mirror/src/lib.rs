//! A simulator of moves: one seed is one history.
//!
//! ```text
//!   guest (reads, writes, zeroes, discards, flushes) ─► data path (routes, workers that are late) ─► two disks
//!                                                           │ ▲                                       ▲
//!                                                           ▼ │                                       │
//!                                                          Machine ─► copies, verifications, flushes ─┘
//!                                                             └─────► journal
//! ```
//!
//! The disks are arrays of sectors, each holding the stamp of the write that it got last. Every transfer is torn into
//! sectors, which land one by one in any order; at each step the dice say what goes on next. Transfers fail, records
//! may or may not be durable when they are reported as failed, a failed flush loses data for good, the daemon is
//! killed or the power is cut at any moment, people pause, resume, cancel, switch and change the limit.
//!
//! What is checked is checked against bookkeeping of the simulator's own: the guest's view of its disk ([`oracle`]),
//! equality of the sides wherever the machine says so, which transfers are in flight beside which, what the journal
//! says after a death, and that a move ends once the faults have.

mod checks;
mod chosen;
mod death;
pub mod dice;
pub mod disk;
pub mod history;
mod journal_file;
pub mod oracle;
mod outside;
mod requests;
mod tally;

pub use history::run;
pub use tally::Tally;
