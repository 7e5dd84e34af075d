//! ^C and SIGTERM end a run, not the process: so that what was started is ended and what was written is removed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on signals are noticed by [`check`]; the second one ends the process at once.
///
/// # Errors
/// When signals can't be caught.
pub fn install() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let guard = runtime.enter();
    let mut signals = Vec::new();
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        signals.push(signal(kind).context("signals can't be caught")?);
    }
    drop(guard);
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(first_of(&mut signals));
        INTERRUPTED.store(true, Ordering::Release);
        eprintln!(
            "interrupted: cleaning up (once more to end at once and leave the temporary folder behind)"
        );
        runtime.block_on(first_of(&mut signals));
        std::process::exit(130);
    })?;
    Ok(())
}

async fn first_of(signals: &mut [Signal]) {
    let [interrupt, terminate, hangup] = signals else { return };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
}

/// Whether a signal has come.
pub fn is_set() -> bool {
    INTERRUPTED.load(Ordering::Acquire)
}

/// Fails once a signal has come.
///
/// # Errors
/// `interrupted`.
pub fn check() -> Result<()> {
    if is_set() {
        bail!("interrupted");
    }
    Ok(())
}

/// Sleeps, and calls `look` every few milliseconds; ends early when it fails or a signal comes.
///
/// # Errors
/// What `look` says, or `interrupted`.
pub fn sleep(time: Duration, mut look: impl FnMut() -> Result<()>) -> Result<()> {
    let until = Instant::now() + time;
    while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        check()?;
        look()?;
        std::thread::sleep(left.min(Duration::from_millis(20)));
    }
    Ok(())
}
