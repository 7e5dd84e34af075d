//! Messages over a stream: whole ones only, and never an endless wait.

use std::io::{self, ErrorKind};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::batch::{Batch, BatchBuilder, Packer, Unpacker};
use super::transport::{Closer, Stream, TICK};
use super::wire::{CONTROL_MAX, HEADER_BYTES, Header, KIND_PAGES, Message, kind_name};

/// How often a side says that it is still there while it has nothing else to say.
pub const BEAT: Duration = Duration::from_secs(1);
/// How long a side that hangs up waits for the other to do so too.
const PARTING: Duration = Duration::from_millis(500);
/// Bytes that one read asks for at most, so that a length is believed only as far as bytes follow it.
const READ_BYTES: usize = 256 << 10;

/// A connection. One thread uses it.
pub struct Connection {
    stream: Box<dyn Stream>,
    /// Room for the message that is arriving, header and body; it keeps its size for the next.
    inbox: Vec<u8>,
    /// Bytes of it that have arrived.
    filled: usize,
    /// The message in the inbox was handed out: the next one begins.
    delivered: bool,
    /// The peer has said something other than that it is there.
    introduced: bool,
    /// How long the peer may be silent in the middle of a message, or take no bytes.
    patience: Duration,
    last_heard: Instant,
    last_said: Instant,
    bytes_sent: u64,
    head: Vec<u8>,
}

/// What a connection for pages carries.
pub enum Parcel<'a> {
    /// Pages.
    Pages(Batch<'a>),
    /// Something else.
    Message(Message),
}

impl Connection {
    /// A connection over a stream. `patience` is how long its peer may be silent before it counts as dead.
    pub fn new(stream: Box<dyn Stream>, patience: Duration) -> Self {
        let now = Instant::now();
        Self {
            stream,
            inbox: Vec::new(),
            filled: 0,
            delivered: false,
            introduced: false,
            patience,
            last_heard: now,
            last_said: now,
            bytes_sent: 0,
            head: Vec::new(),
        }
    }

    /// What ends it from another thread.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn closer(&self) -> Result<Closer> {
        self.stream.closer().context("keep a handle of a connection")
    }

    /// Whether something has come that was not received yet.
    ///
    /// # Errors
    /// If the system cannot say.
    pub fn is_readable(&self) -> Result<bool> {
        self.stream.readable(Duration::ZERO).context("look for something from the peer")
    }

    /// What to wait on, together with other descriptors, when nothing is left to receive.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.stream.descriptor()
    }

    /// Bytes sent so far, headers included.
    pub fn bytes_sent(&self) -> u64 {
        self.bytes_sent
    }

    /// Sends a message.
    ///
    /// # Errors
    /// If the peer is gone, or takes nothing for as long as patience lasts.
    pub fn send(&mut self, message: &Message) -> Result<()> {
        let body = message.encode()?;
        let header = Header::encode(message.kind(), &[&body])?;
        let whole = [&header[..], &body].concat();
        self.write_all(&whole).with_context(|| format!("send the {} message", message.name()))
    }

    /// Sends pages.
    ///
    /// # Errors
    /// As [`Connection::send`].
    pub fn send_pages(&mut self, pages: &BatchBuilder, packer: &mut Packer) -> Result<()> {
        let mut head = std::mem::take(&mut self.head);
        let content = pages.encode(packer, &mut head)?;
        let header = Header::encode(KIND_PAGES, &[&head, content])?;
        head.splice(0..0, header);
        let sent = self.write_all(&head).and_then(|()| self.write_all(content));
        self.head = head;
        sent.context("send pages")
    }

    fn write_all(&mut self, mut bytes: &[u8]) -> Result<()> {
        let mut progress = Instant::now();
        let mut flushed = false;
        // After the last byte the layer of TLS may still have some of its own.
        while !bytes.is_empty() || !flushed {
            let result =
                if bytes.is_empty() { self.stream.flush().map(|()| 0) } else { self.stream.write(bytes) };
            match result {
                Ok(0) if bytes.is_empty() => flushed = true,
                Ok(0) => bail!("the peer hung up"),
                Ok(len) => {
                    bytes = &bytes[len..];
                    self.bytes_sent += len as u64;
                    progress = Instant::now();
                }
                Err(error) if is_tick(&error) => ensure!(
                    progress.elapsed() < self.patience,
                    "the peer took nothing for {} s: it hangs or its host is gone",
                    self.patience.as_secs_f32()
                ),
                Err(error) => return Err(error).context("the connection is lost"),
            }
        }
        self.last_said = Instant::now();
        Ok(())
    }

    /// The next message, if one is complete within `wait`. [`Message::Alive`] is not shown; when the time is up nothing is
    /// looked for behind it, so that a peer which sends many of them does not keep us here.
    ///
    /// # Errors
    /// If the peer is gone or stops in the middle of a message, or the message is malformed.
    pub fn receive(&mut self, wait: Duration) -> Result<Option<Message>> {
        let until = Instant::now() + wait;
        while let Some(header) = self.fill(until)? {
            ensure!(header.kind != KIND_PAGES, "the peer sent pages on a connection that is not for them");
            match Message::decode(header.kind, self.body(&header).to_vec())? {
                Message::Alive if Instant::now() >= until => break,
                Message::Alive => {}
                message => {
                    self.introduced = true;
                    return Ok(Some(message));
                }
            }
        }
        Ok(None)
    }

    /// The next message or pages, if complete within `wait`, for a memory of so many pages.
    ///
    /// # Errors
    /// As [`Connection::receive`], and if the batch is malformed.
    pub fn receive_parcel<'a>(
        &'a mut self,
        wait: Duration,
        pages: u64,
        unpacker: &'a mut Unpacker,
    ) -> Result<Option<Parcel<'a>>> {
        let until = Instant::now() + wait;
        while let Some(header) = self.fill(until)? {
            if header.kind == KIND_PAGES {
                let batch = unpacker.unpack(self.body(&header), pages)?;
                return Ok(Some(Parcel::Pages(batch)));
            }
            match Message::decode(header.kind, self.body(&header).to_vec())? {
                Message::Alive if Instant::now() >= until => break,
                Message::Alive => {}
                message => {
                    self.introduced = true;
                    return Ok(Some(Parcel::Message(message)));
                }
            }
        }
        Ok(None)
    }

    fn body(&self, header: &Header) -> &[u8] {
        &self.inbox[HEADER_BYTES..HEADER_BYTES + header.length]
    }

    /// Reads until the inbox has one whole message, which was checked, or the time is up.
    fn fill(&mut self, until: Instant) -> Result<Option<Header>> {
        if std::mem::take(&mut self.delivered) {
            self.filled = 0;
        }
        loop {
            let (wanted, header) = if self.filled < HEADER_BYTES {
                (HEADER_BYTES, None)
            } else {
                let bytes = self.inbox.first_chunk().expect("the header has arrived");
                let header = Header::decode(bytes)?;
                // Before it has said who it is nobody gets room for more.
                ensure!(
                    self.introduced || header.length <= CONTROL_MAX,
                    "the peer's first message has {} bytes, more than the {CONTROL_MAX} allowed there",
                    header.length
                );
                (HEADER_BYTES + header.length, Some(header))
            };
            match header {
                Some(header) if self.filled == wanted => {
                    header.check(self.body(&header))?;
                    self.delivered = true;
                    return Ok(Some(header));
                }
                header => self.read_towards(wanted, header.map(|header| header.kind), until)?,
            }
            // What is whole by now is taken even if the time is up.
            if self.filled < wanted && Instant::now() >= until {
                return Ok(None);
            }
        }
    }

    /// One read, towards a message of `wanted` bytes.
    fn read_towards(&mut self, wanted: usize, kind: Option<u16>, until: Instant) -> Result<()> {
        let left = until.saturating_duration_since(Instant::now());
        if left < TICK && !self.stream.readable(left).context("wait for the peer")? {
            return self.check_stall(kind);
        }
        let end = wanted.min(self.filled + READ_BYTES);
        if self.inbox.len() < end {
            self.inbox.resize(end, 0);
        }
        match self.stream.read(&mut self.inbox[self.filled..end]) {
            Ok(0) if self.filled == 0 => bail!("the peer hung up"),
            Ok(0) => bail!("the peer hung up in the middle of a {} message", kind.map_or("new", kind_name)),
            Ok(len) => {
                self.filled += len;
                self.last_heard = Instant::now();
                Ok(())
            }
            Err(error) if is_tick(&error) => self.check_stall(kind),
            Err(error) => Err(error).context("the connection is lost"),
        }
    }

    /// Nothing came: in the middle of a message that may last only so long.
    fn check_stall(&self, kind: Option<u16>) -> Result<()> {
        ensure!(
            self.filled == 0 || self.last_heard.elapsed() < self.patience,
            "the peer went silent for {} s in the middle of a {} message: it hangs or its host is gone",
            self.patience.as_secs_f32(),
            kind.map_or("new", kind_name)
        );
        Ok(())
    }

    /// Sends a last message in a way that gets there: to hang up at once would throw it away, where the peer has sent
    /// something that was not read.
    pub fn part(mut self, message: &Message) {
        let Ok(closer) = self.closer() else { return };
        // Who cannot be told finds out that the connection ends.
        if self.send(message).is_err() {
            return;
        }
        closer.close_sending();
        let until = Instant::now() + PARTING;
        let mut rest = [0; 4096];
        while Instant::now() < until {
            match self.stream.read(&mut rest) {
                Ok(1..) => {}
                Err(error) if is_tick(&error) => {}
                _ => return,
            }
        }
    }

    /// Says that this side is there, if it has said nothing for [`BEAT`].
    ///
    /// # Errors
    /// As [`Connection::send`].
    pub fn beat(&mut self) -> Result<()> {
        if self.last_said.elapsed() >= BEAT { self.send(&Message::Alive) } else { Ok(()) }
    }

    /// Begins to watch a peer that had no reason to say anything so far.
    pub fn watch_from_now(&mut self) {
        self.last_heard = Instant::now();
    }

    /// Says that this side is there, and checks that the peer was heard of within the time of patience.
    ///
    /// # Errors
    /// If it was not, or as [`Connection::send`].
    pub fn watch(&mut self) -> Result<()> {
        ensure!(
            self.last_heard.elapsed() < self.patience,
            "the peer was not heard of for {} s: it hangs or its host is gone",
            self.patience.as_secs_f32()
        );
        self.beat()
    }

    /// Runs something that takes its time, while the peer is told that this side is there. What the peer says meanwhile
    /// waits.
    ///
    /// # Errors
    /// If the connection is lost, which does not cut the work short; its result is lost then only if it says so itself.
    pub fn while_beating<T: Send>(&mut self, work: impl FnOnce() -> T + Send) -> (T, Result<()>) {
        let (done, wait) = std::sync::mpsc::sync_channel::<()>(1);
        let outcome = std::thread::scope(|scope| {
            let worker = scope.spawn(move || {
                let _done = done;
                work()
            });
            let mut beaten = Ok(());
            while wait.recv_timeout(BEAT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                if beaten.is_ok() {
                    beaten = self.beat();
                }
            }
            let result = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (result, beaten)
        });
        self.last_heard = Instant::now();
        outcome
    }

    /// Waits for a message that the peer has no reason to keep back, at most as long as patience lasts: one that only says
    /// that it is there holds nobody for ever.
    ///
    /// # Errors
    /// As [`Connection::await_message`], and if the message does not come in time.
    pub fn await_promptly(&mut self) -> Result<Message> {
        let (begun, patience) = (Instant::now(), self.patience);
        self.await_message(|| {
            ensure!(
                begun.elapsed() < patience,
                "the peer is there, but has not said for {} s what it has to say now",
                patience.as_secs_f32()
            );
            Ok(())
        })
    }

    /// Waits for the next message for as long as the peer shows that it is there; `stop` is asked at each tick.
    ///
    /// # Errors
    /// As [`Connection::receive`], and if the peer goes silent or `stop` says so.
    pub fn await_message(&mut self, mut stop: impl FnMut() -> Result<()>) -> Result<Message> {
        loop {
            stop()?;
            if let Some(message) = self.receive(TICK)? {
                return Ok(message);
            }
            self.watch()?;
        }
    }
}

/// Whether a read or write only waited for its time.
fn is_tick(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}
