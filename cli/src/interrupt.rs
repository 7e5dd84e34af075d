//! ^C and its like, seen by work that blocks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::signal::unix::{SignalKind, signal};

use crate::failure::Failure;

/// Set once somebody wants the work to end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Whether the work should end.
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Asks the work to end.
    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits for ^C (SIGINT), SIGTERM, or the end of the terminal (SIGHUP). From the first call on they no longer end the process by themselves.
pub(crate) async fn interrupted() -> Result<(), Failure> {
    let listen = |kind| signal(kind).map_err(|e| Failure::io("signals can't be caught", &e));
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut hangup = listen(SignalKind::hangup())?;
    tokio::select! {
        _ = hangup.recv() => {}
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Ok(())
}

/// Runs blocking `work` on a thread of its own; a signal sets its [`Cancel`], and the work decides how to end.
pub(crate) async fn guarded<T: Send + 'static>(
    work: impl FnOnce(Cancel) -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let cancel = Cancel::default();
    let theirs = cancel.clone();
    let mut running = tokio::task::spawn_blocking(move || work(theirs));
    let result = tokio::select! {
        done = &mut running => done,
        caught = interrupted() => {
            caught?;
            cancel.set();
            running.await
        }
    };
    result.unwrap_or_else(|e| Err(Failure::new("internal", format!("a thread of blockctl died: {e}"))))
}
