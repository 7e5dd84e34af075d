//! vhost-user: the front end's messages, its memory and its rings.
//!
//! The session is our own, on the message layer of the `vhost` crate: one thread a connection handles messages, and
//! hands what the workers need to them by command, waiting for each to be confirmed before it answers the front end.

pub mod channel;
pub mod inflight;
pub mod listener;
pub mod log;
pub mod memory;
pub mod ring;
pub mod session;
mod sigbus;
