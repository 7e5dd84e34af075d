//! The threads of the source that read pages and send them, one for each connection.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::batch::{BatchBuilder, Compression, Packer};
use super::connection::Connection;
use super::presence::Presence;
use super::shared_set::SharedSet;
use super::transport::{Closer, TICK};
use super::wire::{Message, RoundEnd};
use crate::machine::SourceMachine;
use crate::memory::GuestRam;
use crate::pages::PageSet;

/// Words of a set of pages that one thread takes at once: 1024 pages, 4 MiB.
const CHUNK_WORDS: usize = 16;
/// Most connections for pages.
pub const CONNECTIONS_MAX: u32 = 16;
/// Bytes that may go over the wire at once before the limit of bandwidth holds them back, as time at that limit.
const BURST: Duration = Duration::from_millis(20);

/// One round of copying.
pub(super) struct Round {
    /// Its number.
    pub number: u32,
    /// The pages.
    pub set: PageSet,
    /// Whether the machine runs: pages have to be watched again before they are read.
    pub live: bool,
    /// Words of the set that threads have taken so far.
    next: AtomicU64,
    /// What threads that are through have sent in it.
    sent: Mutex<Sent>,
}

/// What was sent in a round.
#[derive(Debug, Clone, Copy, Default)]
struct Sent {
    connections: usize,
    batches: u64,
    pages: u64,
}

impl Round {
    pub fn new(number: u32, set: PageSet, live: bool) -> Self {
        Self { number, set, live, next: AtomicU64::new(0), sent: Mutex::default() }
    }

    /// One more connection has sent its part.
    fn note_end(&self, end: &RoundEnd) {
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        sent.connections += 1;
        sent.batches += end.batches;
        sent.pages += end.pages;
    }

    /// Checks the target's word that the round has arrived.
    ///
    /// # Errors
    /// If something else was sent.
    pub fn check_received(&self, end: &RoundEnd, connections: usize) -> Result<()> {
        let sent = *self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(
            end.round == self.number
                && sent.connections == connections
                && (end.batches, end.pages) == (sent.batches, sent.pages),
            "the target says that {} pages of round {} have arrived, but not all was sent, or something else ({} pages so far in \
             round {})",
            end.pages,
            end.round,
            sent.pages,
            self.number
        );
        Ok(())
    }

    /// The next words for a thread: the place of the first, and the words.
    fn take_chunk(&self) -> Option<(usize, &[u64])> {
        let words = self.set.words();
        let at = self.next.fetch_add(CHUNK_WORDS as u64, Ordering::Relaxed) as usize;
        (at < words.len()).then(|| (at, &words[at..words.len().min(at + CHUNK_WORDS)]))
    }

    /// Pages of the set that no thread has taken yet.
    pub fn pages_left(&self) -> u64 {
        let words = self.set.words();
        let at = (self.next.load(Ordering::Relaxed) as usize).min(words.len());
        words[at..].iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

/// What all threads count together.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Pages with content.
    pub data_pages: AtomicU64,
    /// Zero pages.
    pub zero_pages: AtomicU64,
    /// Bytes on the wire.
    pub wire_bytes: AtomicU64,
}

/// Keeps all connections together below a number of bytes per second.
pub(super) struct Bandwidth {
    bytes_per_second: Option<u64>,
    free_at: Mutex<Instant>,
}

impl Bandwidth {
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, free_at: Mutex::new(Instant::now()) }
    }

    /// Waits for as long as sending so many bytes has to last.
    pub fn pay(&self, bytes: u64, stop: &AtomicBool) {
        let Some(rate) = self.bytes_per_second else { return };
        let cost = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        let until = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            *free_at = (*free_at).max(Instant::now()) + cost;
            *free_at
        };
        while !stop.load(Ordering::Relaxed) {
            let left = until.saturating_duration_since(Instant::now()).saturating_sub(BURST);
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(TICK));
        }
    }
}

/// What the threads share.
pub(super) struct Common<'env> {
    machine: &'env dyn SourceMachine,
    compression: Compression,
    bandwidth: Bandwidth,
    /// Pages whose content the target has got: of the others it knows that they are zero.
    sent: SharedSet,
    pub counters: Counters,
    /// Ends the threads before they are through.
    stop: AtomicBool,
}

impl<'env> Common<'env> {
    pub fn new(machine: &'env dyn SourceMachine, compression: Compression, bandwidth: Option<u64>) -> Self {
        Self {
            machine,
            compression,
            bandwidth: Bandwidth::new(bandwidth),
            sent: SharedSet::new(machine.ram().pages()),
            counters: Counters::default(),
            stop: AtomicBool::new(false),
        }
    }
}

/// The threads.
pub(super) struct Senders<'scope> {
    queues: Vec<SyncSender<Arc<Round>>>,
    errors: Receiver<anyhow::Error>,
    closers: Vec<Closer>,
    threads: Vec<ScopedJoinHandle<'scope, Connection>>,
    stop: &'scope AtomicBool,
}

impl<'scope> Senders<'scope> {
    /// One thread for each connection.
    pub fn start<'env>(
        scope: &'scope Scope<'scope, 'env>,
        common: &'scope Common<'env>,
        connections: Vec<Connection>,
    ) -> Result<Self> {
        let (failed, errors) = sync_channel(connections.len());
        let mut senders =
            Self { queues: Vec::new(), errors, closers: Vec::new(), threads: Vec::new(), stop: &common.stop };
        for mut connection in connections {
            senders.closers.push(connection.closer()?);
            // There is one round at a time.
            let (queue, rounds) = sync_channel::<Arc<Round>>(1);
            senders.queues.push(queue);
            let failed = failed.clone();
            let packer = Packer::new(common.compression)?;
            senders.threads.push(scope.spawn(move || {
                let (builder, presence) = (BatchBuilder::new(0), Presence::default());
                let mut sender = Sender {
                    common,
                    connection: &mut connection,
                    packer,
                    builder,
                    presence,
                    batches: 0,
                    pages: 0,
                };
                if let Err(error) = rounds.iter().try_for_each(|round| sender.send_round(&round)) {
                    // There is room for one error of each thread.
                    let _ = failed.try_send(error);
                }
                connection
            }));
        }
        Ok(senders)
    }

    /// How many there are.
    pub fn connections(&self) -> usize {
        self.queues.len()
    }

    /// Gives all threads a round.
    pub fn begin(&self, round: &Arc<Round>) -> Result<()> {
        for queue in &self.queues {
            match queue.try_send(round.clone()) {
                Ok(()) => {}
                Err(TrySendError::Disconnected(_)) => return self.check(),
                Err(TrySendError::Full(_)) => {
                    anyhow::bail!("round {} began before the last one ended", round.number)
                }
            }
        }
        Ok(())
    }

    /// Whether all threads are well.
    ///
    /// # Errors
    /// What went wrong in one of them.
    pub fn check(&self) -> Result<()> {
        match self.errors.try_recv() {
            Ok(error) => Err(error),
            Err(_) => {
                ensure!(
                    self.threads.iter().all(|thread| !thread.is_finished()),
                    "a thread that sends pages has ended"
                );
                Ok(())
            }
        }
    }

    /// Ends the threads, also in the middle of a round.
    pub fn abort(self) {
        self.stop.store(true, Ordering::Relaxed);
        for closer in &self.closers {
            closer.close();
        }
        drop(self.queues);
        for thread in self.threads {
            // What went wrong there is of no interest any more.
            let _ = thread.join();
        }
    }

    /// Ends the threads after a round, and gives their connections back.
    pub fn finish(self) -> Vec<Connection> {
        drop(self.queues);
        self.threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    }
}

/// One thread.
struct Sender<'a, 'env> {
    common: &'a Common<'env>,
    connection: &'a mut Connection,
    packer: Packer,
    builder: BatchBuilder,
    presence: Presence,
    batches: u64,
    pages: u64,
}

impl Sender<'_, '_> {
    fn send_round(&mut self, round: &Round) -> Result<()> {
        (self.batches, self.pages) = (0, 0);
        self.builder.clear(round.number);
        while let Some((at, words)) = round.take_chunk() {
            self.send_chunk(round, at, words)?;
        }
        self.flush(round.number)?;
        let end = RoundEnd { round: round.number, batches: self.batches, pages: self.pages };
        // Before the target can know of it.
        round.note_end(&end);
        self.connection.send(&Message::RoundEnd(end))
    }

    fn send_chunk(&mut self, round: &Round, at: usize, words: &[u64]) -> Result<()> {
        if words.iter().all(|word| *word == 0) {
            return Ok(());
        }
        let common = self.common;
        let first = at as u64 * 64;
        if round.live {
            common.machine.before_copy(first, words).context("watch pages again before they are sent")?;
        }
        let ram = common.machine.ram();
        let present = self.presence.pages(ram, first, words.len());
        for (i, (word, present)) in words.iter().zip(present).enumerate() {
            let mut rest = *word;
            while rest != 0 {
                let bit = rest.trailing_zeros();
                rest &= rest - 1;
                self.send_page(
                    round.number,
                    ram,
                    first + i as u64 * 64 + u64::from(bit),
                    present >> bit & 1 == 1,
                )?;
            }
        }
        Ok(())
    }

    fn send_page(&mut self, round: u32, ram: &GuestRam, page: u64, present: bool) -> Result<()> {
        if self.builder.is_full() {
            self.flush(round)?;
        }
        let common = self.common;
        if present && self.builder.take_page(ram, page) {
            common.sent.insert(page);
            return Ok(());
        }
        common.counters.zero_pages.fetch_add(1, Ordering::Relaxed);
        // The target's memory is zero where nothing was sent.
        if common.sent.remove(page) {
            self.builder.put_zero(page);
        }
        Ok(())
    }

    fn flush(&mut self, round: u32) -> Result<()> {
        ensure!(!self.common.stop.load(Ordering::Relaxed), "sending was stopped");
        if self.builder.is_empty() {
            return Ok(());
        }
        let before = self.connection.bytes_sent();
        self.connection.send_pages(&self.builder, &mut self.packer)?;
        let bytes = self.connection.bytes_sent() - before;
        let counters = &self.common.counters;
        counters.data_pages.fetch_add(self.builder.data_pages(), Ordering::Relaxed);
        counters.wire_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.batches += 1;
        self.pages += self.builder.data_pages() + self.builder.zero_pages();
        self.builder.clear(round);
        self.common.bandwidth.pay(bytes, &self.common.stop);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_word_of_a_round_is_taken_once() {
        let round = Round::new(0, PageSet::full(64 * 40), true);
        let mut taken = Vec::new();
        while let Some((at, words)) = round.take_chunk() {
            taken.extend(at..at + words.len());
        }
        assert_eq!(taken, (0..40).collect::<Vec<_>>());
        assert_eq!(round.pages_left(), 0);
    }
}
