//! Moving a running machine.
pub mod batch;
pub mod connection;
pub mod converge;
pub mod handshake;
pub mod record;
mod tls;
pub mod transport;
pub mod wire;
