//! The thread that notices when the backend goes away, and connects anew.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::disk::{Disk, Inner, Outage};
use super::link::{RETRY, is_closed, wait};
use crate::device::mmio::Backend;

/// What the watcher does next.
enum Next {
    End,
    /// Wait until the connection is closed or somebody has a word, at most for the time.
    Wait(Option<Arc<std::os::unix::net::UnixStream>>, Option<Duration>),
    /// Connect; it is sought until then.
    Connect(Instant),
}

/// Runs until the device is dropped.
pub(super) fn watch(disk: &Arc<Disk>) {
    use std::os::fd::AsRawFd;
    loop {
        match next(disk) {
            Next::End => return,
            Next::Wait(stream, time) => {
                if let Err(e) = wait(stream.as_deref(), Some(disk.wake.as_raw_fd()), time) {
                    tracing::error!("{}: cannot wait for its backend: {e}", disk.name());
                    std::thread::sleep(RETRY);
                }
                // What was said is looked at in `next`, whatever it was.
                let _ = disk.wake.read();
            }
            Next::Connect(until) => {
                if let Err(e) = reconnect(disk, until) {
                    if let Outage::Until(_, why) = &mut disk.lock().outage {
                        *why = format!("{e:#}");
                    }
                    let _ = wait(None, Some(disk.wake.as_raw_fd()), Some(RETRY));
                    let _ = disk.wake.read();
                }
            }
        }
    }
}

fn next(disk: &Disk) -> Next {
    let mut inner = disk.lock();
    if inner.ending {
        return Next::End;
    }
    if inner.old.as_ref().is_some_and(|old| is_closed(&old.stream())) {
        inner.old = None;
        disk.changed();
    }
    if let Some((link, _)) = &inner.link {
        let stream = link.stream();
        if !is_closed(&stream) {
            return Next::Wait(Some(stream), None);
        }
        disk.lose(&mut inner, String::from("the backend closed it"));
    }
    let old = inner.old.as_ref().map(|old| old.stream());
    let Outage::Until(until, why) = inner.outage.clone() else { return Next::Wait(old, None) };
    let now = Instant::now();
    if inner.stopped {
        Next::Wait(old, None)
    } else if now >= until {
        give_up(disk, &mut inner, &why);
        Next::Wait(old, None)
    } else if old.is_some() {
        Next::Wait(old, Some(until - now))
    } else {
        Next::Connect(until)
    }
}

fn give_up(disk: &Disk, inner: &mut Inner, why: &str) {
    let waited = disk.options.reconnect;
    let why =
        format!("its backend was away for more than {waited:?} ({why}); start it again and reset the guest");
    tracing::error!("{}: {why}", disk.name());
    inner.outage = Outage::GaveUp(why);
    disk.notices().set_needs_reset(true);
    disk.interrupt_all();
    disk.changed();
}

/// One attempt to have the device served again.
fn reconnect(disk: &Disk, until: Instant) -> Result<()> {
    // The lock is free meanwhile: the guest's processors look at registers.
    let link = disk.open(disk.answer_by().min(until.max(Instant::now() + RETRY)))?;
    let mut inner = disk.lock();
    let wanted = matches!(inner.outage, Outage::Until(..)) && !inner.stopped && !inner.ending;
    if !wanted || inner.link.is_some() || inner.old.is_some() {
        return Ok(());
    }
    inner.link = Some(link);
    let served = disk.check_and_prepare(&mut inner);
    if served.is_ok() {
        disk.take_offer(&mut inner);
    }
    if let Err(e) = served.and_then(|()| disk.enable(&mut inner)) {
        // The search goes on, no longer than it would have.
        let outage = inner.outage.clone();
        disk.lose(&mut inner, format!("{e:#}"));
        inner.outage = outage;
        return Err(e);
    }
    inner.outage = Outage::None;
    tracing::info!("{}: connected again", disk.name());
    disk.nudge(&inner);
    disk.changed();
    Ok(())
}
