//! The source's part of post-copy: it keeps the pages that the target still needs, sends those that are asked for at once, and
//! the others one after the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::batch::{BatchBuilder, Compression, Packer};
use super::connection::Connection;
use super::presence::Presence;
use super::senders::Bandwidth;
use super::shared_set::SharedSet;
use super::source::{PostcopyReport, SendOptions};
use super::transport::{Closer, TICK};
use super::wire::{Message, RoundEnd};
use crate::memory::GuestRam;
use crate::pages::PageSet;

/// Words of the set of pages that one thread takes at once: 256 pages, so that threads share the rest evenly.
const CHUNK_WORDS: u64 = 4;

/// What the source keeps while its machine runs on the target already.
pub(super) struct LateSource {
    ram: Arc<GuestRam>,
    compression: Compression,
    bandwidth: Option<u64>,
    /// How many connections for pages there are to be.
    pub connections: u32,
    /// Pages that were not sent yet.
    todo: Arc<SharedSet>,
    /// How many there were at first.
    pages: u64,
    requested: Arc<AtomicU64>,
    /// `None`: there is no connection, and the target has to be asked what it still needs.
    open: Option<Open>,
    begun: Instant,
}

/// Connections to the target.
struct Open {
    server: Server,
    pushers: Vec<Connection>,
    round: u32,
}

impl LateSource {
    /// Without a connection yet, and without knowing which pages are needed.
    pub fn new(ram: &Arc<GuestRam>, options: &SendOptions) -> Self {
        Self {
            ram: ram.clone(),
            compression: options.compression,
            bandwidth: options.bandwidth,
            connections: options.connections,
            todo: Arc::new(SharedSet::new(ram.pages())),
            pages: 0,
            requested: Arc::default(),
            open: None,
            begun: Instant::now(),
        }
    }

    /// These pages are needed, and asked for over this connection from now on.
    pub fn open(&mut self, missing: &PageSet, faults: Connection) -> Result<()> {
        ensure!(
            missing.pages() == self.ram.pages(),
            "the target misses pages of a memory of {}, but there are {}",
            missing.pages(),
            self.ram.pages()
        );
        self.close();
        self.todo = Arc::new(SharedSet::from_set(missing));
        self.pages = self.pages.max(missing.len());
        let server = Server::start(&self.ram, &self.todo, &self.requested, faults)?;
        self.open = Some(Open { server, pushers: Vec::new(), round: 0 });
        Ok(())
    }

    /// The other pages go over these connections, as this round.
    pub fn push_over(&mut self, connections: Vec<Connection>, round: u32) {
        if let Some(open) = &mut self.open {
            (open.pushers, open.round) = (connections, round);
        }
    }

    /// Whether there is a connection.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Hangs up.
    pub fn close(&mut self) {
        self.open = None;
    }

    /// How it went.
    pub fn report(&self) -> PostcopyReport {
        PostcopyReport {
            pages: self.pages,
            requested: self.requested.load(Ordering::Relaxed),
            took: self.begun.elapsed(),
        }
    }

    /// Sends what is left, until the target says that it has everything.
    pub fn send_rest(&mut self, control: &mut Connection) -> Result<()> {
        let open = self.open.as_mut().context("there is no connection for pages")?;
        let (stop, next) = (AtomicBool::new(false), AtomicU64::new(0));
        let bandwidth = Bandwidth::new(self.bandwidth);
        let closers: Result<Vec<Closer>> = open.pushers.iter().map(Connection::closer).collect();
        let (closers, server) = (closers?, &open.server);
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for connection in &mut open.pushers {
                let push = Push {
                    ram: &self.ram,
                    todo: &self.todo,
                    next: &next,
                    bandwidth: &bandwidth,
                    stop: &stop,
                    round: open.round,
                    compression: self.compression,
                };
                threads.push(scope.spawn(move || push.run(connection)));
            }
            let complete = await_complete(control, server, &mut threads);
            if complete.is_err() {
                stop.store(true, Ordering::Relaxed);
                closers.iter().for_each(Closer::close);
            }
            complete
        })
    }
}

fn await_complete(
    control: &mut Connection,
    server: &Server,
    threads: &mut Vec<std::thread::ScopedJoinHandle<'_, Result<()>>>,
) -> Result<()> {
    loop {
        match control.receive(TICK)? {
            Some(Message::Complete) => return Ok(()),
            Some(Message::Abort(reason)) => bail!("the target gave up: {reason}"),
            Some(other) => bail!("the target sent a {} message while pages follow", other.name()),
            None => control.watch()?,
        }
        let (over, rest) =
            std::mem::take(threads).into_iter().partition::<Vec<_>, _>(|thread| thread.is_finished());
        *threads = rest;
        for thread in over {
            thread.join().unwrap_or_else(|_| bail!("a thread that sends pages panicked"))?;
        }
        ensure!(!server.is_over(), "the connection for pages that are waited for was lost");
    }
}

/// One thread that sends pages nobody has asked for yet.
struct Push<'a> {
    ram: &'a GuestRam,
    todo: &'a SharedSet,
    next: &'a AtomicU64,
    bandwidth: &'a Bandwidth,
    stop: &'a AtomicBool,
    round: u32,
    compression: Compression,
}

impl Push<'_> {
    fn run(&self, connection: &mut Connection) -> Result<()> {
        let (mut packer, mut builder) = (Packer::new(self.compression)?, BatchBuilder::new(self.round));
        let mut end = RoundEnd { round: self.round, batches: 0, pages: 0 };
        let (words, mut presence) = (self.ram.pages().div_ceil(64), Presence::default());
        loop {
            let at = self.next.fetch_add(CHUNK_WORDS, Ordering::Relaxed);
            if at >= words {
                break;
            }
            self.push_chunk(at, words.min(at + CHUNK_WORDS) - at, &mut presence, &mut builder);
            self.flush(connection, &mut builder, &mut packer, &mut end)?;
        }
        connection.send(&Message::RoundEnd(end))
    }

    /// A chunk fits into one batch: each page is in it once.
    fn push_chunk(&self, at: u64, words: u64, presence: &mut Presence, builder: &mut BatchBuilder) {
        let first = at * 64;
        let present = presence.pages(self.ram, first, words as usize);
        for page in first..(first + words * 64).min(self.ram.pages()) {
            if self.todo.remove(page) {
                let index = page - first;
                take(builder, self.ram, page, present[(index / 64) as usize] >> (index % 64) & 1 == 1);
            }
        }
    }

    fn flush(
        &self,
        connection: &mut Connection,
        builder: &mut BatchBuilder,
        packer: &mut Packer,
        end: &mut RoundEnd,
    ) -> Result<()> {
        ensure!(!self.stop.load(Ordering::Relaxed), "sending was stopped");
        if builder.is_empty() {
            return Ok(());
        }
        let before = connection.bytes_sent();
        connection.send_pages(builder, packer)?;
        end.batches += 1;
        end.pages += builder.data_pages() + builder.zero_pages();
        builder.clear(self.round);
        self.bandwidth.pay(connection.bytes_sent() - before, self.stop);
        Ok(())
    }
}

/// Puts a page into a batch, also if it is zero: the target waits for it.
fn take(builder: &mut BatchBuilder, ram: &GuestRam, page: u64, present: bool) {
    if !(present && builder.take_page(ram, page)) {
        builder.put_zero(page);
    }
}

/// The thread that sends pages which are asked for.
struct Server {
    closer: Closer,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(
        ram: &Arc<GuestRam>,
        todo: &Arc<SharedSet>,
        requested: &Arc<AtomicU64>,
        mut connection: Connection,
    ) -> Result<Self> {
        let (closer, stop) = (connection.closer()?, Arc::new(AtomicBool::new(false)));
        let (ram, todo, requested, stopped) = (ram.clone(), todo.clone(), requested.clone(), stop.clone());
        let thread = std::thread::Builder::new().name("migrate-late".into()).spawn(move || {
            if let Err(error) = serve(&ram, &todo, &requested, &mut connection, &stopped) {
                tracing::info!("the connection for pages that are waited for has ended: {error:#}");
            }
        });
        Ok(Self { closer, stop, thread: Some(thread.context("start the thread that answers requests")?) })
    }

    fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.closer.close();
        if let Some(thread) = self.thread.take() {
            // What went wrong there was said.
            let _ = thread.join();
        }
    }
}

fn serve(
    ram: &GuestRam,
    todo: &SharedSet,
    requested: &AtomicU64,
    connection: &mut Connection,
    stop: &AtomicBool,
) -> Result<()> {
    // What is waited for is not compressed: that would only make the wait longer.
    let (mut packer, mut builder) = (Packer::new(Compression::None)?, BatchBuilder::new(0));
    connection.watch_from_now();
    while !stop.load(Ordering::Relaxed) {
        match connection.receive(TICK)? {
            None => connection.watch()?,
            Some(Message::Request(mut pages)) => {
                // Batches go in ascending order.
                pages.sort_unstable();
                builder.clear(0);
                // What was sent already is on its way.
                for page in pages.into_iter().filter(|page| todo.remove(*page)) {
                    requested.fetch_add(1, Ordering::Relaxed);
                    take(&mut builder, ram, page, true);
                }
                if !builder.is_empty() {
                    connection.send_pages(&builder, &mut packer)?;
                }
                connection.beat()?;
            }
            Some(other) => bail!("a {} message came where requests for pages belong", other.name()),
        }
    }
    Ok(())
}

/// How often the rest of the pages is begun anew after a loss, before a person has to look at it.
pub(super) const RECOVERIES_MAX: u32 = 100;
/// Rest between two of them.
pub(super) const RECOVERY_REST: Duration = Duration::from_millis(100);
