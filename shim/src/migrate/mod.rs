//! Moving a running machine: [`send`] on the one side, [`receive`] on the other.
//!
//! | file | what it is about |
//! |---|---|
//! | [`wire`], [`batch`] | messages and pages as bytes, with limits |
//! | [`transport`], `tls`, [`connection`] | sockets, certificates, whole messages in bounded time |
//! | [`converge`] | pure: another round, pause, slow down, give up |
//! | [`handshake`] | pure: who runs the machine |
//! | [`record`] | what each side remembers across its death |
//! | [`source`], `attempt`, `senders`, `handover` | the source: all of it, copying, its threads, giving away |
//! | [`target`], `door`, `session`, `receivers` | the target: all of it, who comes in, one attempt, its threads |
//! | [`postcopy`], `userfault`, `late`, `late_session` | running before all pages are there: both sides of it |
//! | [`mod@file`] | quick migration: a machine in a file |
//! | [`progress`] | what is seen of it |

mod attempt;
pub mod batch;
pub mod connection;
pub mod converge;
mod door;
pub mod file;
mod handover;
pub mod handshake;
mod late;
mod late_session;
pub mod postcopy;
mod presence;
pub mod progress;
mod receivers;
pub mod record;
mod senders;
mod session;
mod shared_set;
pub mod source;
pub mod target;
mod tls;
pub mod transport;
mod userfault;
pub mod wire;

pub use batch::Compression;
pub use converge::OnTimeout;
pub use file::{Restored, SaveReport, restore, save};
pub use progress::{CancelToken, Observer, Progress, Step};
pub use record::{Place, SourceLock, SourceRecord};
pub use senders::CONNECTIONS_MAX;
pub use source::{
    Report, Resolve, Resolved, SendError, SendOptions, check, last_attempt, lock, resolve, send,
};
pub use target::{ReceiveOptions, Received, TargetEvent, receive};
pub use tls::TlsFiles;
pub use transport::{Address, Listener, Security};
pub use wire::MigrationId;
