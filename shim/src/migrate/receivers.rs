//! The threads of the target that put arriving pages into its memory, one for each connection.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::batch::{Batch, Unpacker};
use super::connection::{Connection, Parcel};
use super::postcopy::Late;
use super::transport::{Closer, TICK};
use super::wire::{Message, RoundEnd};
use crate::memory::GuestRam;

/// Events of one thread that may wait: it cannot be further than one round ahead of who reads them.
const EVENTS_PER_THREAD: usize = 4;

/// What a thread has to say.
pub(super) enum Event {
    /// A round has ended on its connection, and all its pages are in the memory.
    RoundEnded(RoundEnd),
    /// Its connection is over.
    Failed(anyhow::Error),
}

/// Where pages go: into a memory that nobody uses, until it becomes one that is used before all pages are there.
pub(super) struct Sink {
    ram: Arc<GuestRam>,
    late: OnceLock<Arc<Late>>,
}

impl Sink {
    /// Into a memory that nobody uses.
    pub fn new(ram: Arc<GuestRam>) -> Arc<Self> {
        Arc::new(Self { ram, late: OnceLock::new() })
    }

    /// From here on pages may be waited for. No pages are arriving at the moment.
    pub fn become_late(&self, late: Arc<Late>) -> Result<()> {
        ensure!(self.late.set(late).is_ok(), "the source named the missing pages twice");
        Ok(())
    }

    fn apply(&self, batch: &Batch<'_>) -> Result<()> {
        match self.late.get() {
            Some(late) => late.apply(batch),
            None => batch.apply(&self.ram),
        }
    }
}

/// The threads. They end when this is dropped.
pub(super) struct Receivers {
    events: Receiver<Event>,
    closers: Vec<Closer>,
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    pages: Arc<AtomicU64>,
}

impl Receivers {
    /// One thread for each connection.
    pub fn start(connections: Vec<Connection>, sink: &Arc<Sink>) -> Result<Self> {
        let (sender, events) = sync_channel(connections.len() * EVENTS_PER_THREAD);
        let (stop, pages) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut receivers = Self { events, closers: Vec::new(), threads: Vec::new(), stop, pages };
        for connection in connections {
            receivers.closers.push(connection.closer()?);
            let (stop, events) = (receivers.stop.clone(), sender.clone());
            let (sink, pages) = (sink.clone(), receivers.pages.clone());
            let thread = std::thread::Builder::new().name("migrate-pages".into()).spawn(move || {
                if let Err(error) = run(connection, &sink, &pages, &events, &stop) {
                    // Who does not listen any more has ended the attempt.
                    let _ = events.try_send(Event::Failed(error));
                }
            });
            receivers.threads.push(thread.context("start a thread that receives pages")?);
        }
        Ok(receivers)
    }

    /// What a thread has to say within `wait`.
    pub fn wait(&self, wait: Duration) -> Result<Option<Event>> {
        match self.events.recv_timeout(wait) {
            Ok(event) => Ok(Some(event)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("all threads that receive pages have ended"),
        }
    }

    /// Pages received so far.
    pub fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }
}

impl Drop for Receivers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for closer in &self.closers {
            closer.close();
        }
        for thread in self.threads.drain(..) {
            // What went wrong there was said.
            let _ = thread.join();
        }
    }
}

fn run(
    mut connection: Connection,
    sink: &Sink,
    pages: &AtomicU64,
    events: &SyncSender<Event>,
    stop: &AtomicBool,
) -> Result<()> {
    let mut unpacker = Unpacker::new();
    let mut seen = RoundEnd { round: 0, batches: 0, pages: 0 };
    while !stop.load(Ordering::Relaxed) {
        match connection.receive_parcel(TICK, sink.ram.pages(), &mut unpacker)? {
            None => {}
            Some(Parcel::Pages(batch)) => {
                ensure!(
                    batch.round == seen.round,
                    "pages of round {} came on a connection that is in round {}",
                    batch.round,
                    seen.round
                );
                sink.apply(&batch)?;
                seen.batches += 1;
                seen.pages += batch.pages();
                pages.fetch_add(batch.pages(), Ordering::Relaxed);
            }
            Some(Parcel::Message(Message::RoundEnd(end))) => {
                ensure!(end == seen, "a connection says that it carried {end:?}, but {seen:?} came");
                if events.try_send(Event::RoundEnded(end)).is_err() {
                    bail!("a round ended before the last one was acknowledged");
                }
                seen = RoundEnd { round: end.round.wrapping_add(1), batches: 0, pages: 0 };
            }
            Some(Parcel::Message(other)) => {
                bail!("a {} message came on a connection for pages", other.name())
            }
        }
    }
    Ok(())
}
