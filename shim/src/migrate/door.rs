//! The target's door: takes connections, lets each say who it is, and hands those that did so over one by one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::connection::Connection;
use super::transport::{Arrival, CONNECT_TIMEOUT, Listener, TICK};
use super::wire::{Hello, Message, PROTOCOL_MAX, PROTOCOL_MIN};

/// Most connections that are being greeted at once; others wait.
const GREETED_AT_ONCE_MAX: usize = 32;
/// Time until it is looked again whether one of them is through.
const FULL_REST: Duration = Duration::from_millis(10);
/// Most connections that wait for who serves them.
const WAITING_MAX: usize = 64;

/// Somebody who has said who it is.
pub(super) struct Guest {
    pub connection: Connection,
    pub hello: Hello,
}

impl Guest {
    /// Says welcome.
    pub fn welcome(&mut self) -> Result<()> {
        self.connection.send(&Message::Welcome(self.hello.protocol_max.min(PROTOCOL_MAX)))
    }

    /// Says no, and why.
    pub fn refuse(mut self, reason: &str) {
        // Who has gone already need not know.
        let _ = self.connection.send(&Message::Refused(reason.into()));
    }
}

/// The door.
pub(super) struct Door {
    guests: Receiver<Guest>,
    /// One that was let in, and has to wait for another matter to be settled first.
    held: Option<Guest>,
    stop: Arc<AtomicBool>,
    porter: Option<JoinHandle<()>>,
}

impl Door {
    /// Opens it.
    pub fn open(listener: Listener, patience: Duration) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, guests) = sync_channel(WAITING_MAX);
        let stopped = stop.clone();
        let porter = std::thread::Builder::new()
            .name("migrate-door".into())
            .spawn(move || keep(&listener, &sender, patience, &stopped))
            .context("start the thread that accepts connections")?;
        Ok(Self { guests, held: None, stop, porter: Some(porter) })
    }

    /// The next guest within `wait`.
    ///
    /// # Errors
    /// If nobody can come any more.
    pub fn wait(&mut self, wait: Duration) -> Result<Option<Guest>> {
        if let Some(guest) = self.held.take() {
            return Ok(Some(guest));
        }
        match self.guests.recv_timeout(wait) {
            Ok(guest) => Ok(Some(guest)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the thread that accepts connections has ended"),
        }
    }

    /// Keeps a guest for the next [`Door::wait`].
    pub fn hold(&mut self, guest: Guest) {
        self.held = Some(guest);
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(porter) = self.porter.take() {
            // It ends at its next tick, and has nothing to say.
            let _ = porter.join();
        }
    }
}

fn keep(listener: &Listener, guests: &SyncSender<Guest>, patience: Duration, stop: &AtomicBool) {
    let greeted = Arc::new(AtomicUsize::new(0));
    while !stop.load(Ordering::Relaxed) {
        if greeted.load(Ordering::Relaxed) >= GREETED_AT_ONCE_MAX {
            // Whoever comes waits in the kernel's queue: each greeting ends within its time.
            std::thread::sleep(FULL_REST);
            continue;
        }
        match listener.accept() {
            Ok(None) => {}
            Ok(Some(arrival)) => {
                greeted.fetch_add(1, Ordering::Relaxed);
                let (guests, greeted) = (guests.clone(), greeted.clone());
                // Each in a thread of its own: who says nothing must not keep others waiting.
                std::thread::spawn(move || {
                    match greet(arrival, patience) {
                        // A guest for whom there is no room is turned away by being dropped.
                        Ok(guest) => drop(guests.try_send(guest)),
                        Err(error) => tracing::warn!("a connection was turned away: {error:#}"),
                    }
                    greeted.fetch_sub(1, Ordering::Relaxed);
                });
            }
            Err(error) => {
                tracing::warn!("{error:#}");
                std::thread::sleep(TICK);
            }
        }
    }
}

/// Waits for who it is, for [`CONNECT_TIMEOUT`] at most.
fn greet(arrival: Arrival, patience: Duration) -> Result<Guest> {
    let mut connection = Connection::new(arrival.establish()?, patience);
    let until = Instant::now() + CONNECT_TIMEOUT;
    let hello = loop {
        match connection.receive(TICK) {
            Ok(Some(Message::Hello(hello))) => break hello,
            Ok(Some(other)) => bail!("its first message is {}, not hello", other.name()),
            Ok(None) if Instant::now() < until => {}
            Ok(None) => bail!("it did not say who it is within {} s", CONNECT_TIMEOUT.as_secs()),
            Err(error) => {
                // A stranger may be a person who wants to know what is wrong.
                let _ = connection.send(&Message::Refused(format!("{error:#}")));
                return Err(error);
            }
        }
    };
    let guest = Guest { connection, hello };
    let (min, max) = (guest.hello.protocol_min, guest.hello.protocol_max);
    if min > PROTOCOL_MAX || max < PROTOCOL_MIN || min > max {
        let reason = format!(
            "the source speaks versions {min} to {max} of the protocol, the target {PROTOCOL_MIN} to {PROTOCOL_MAX}: update the \
             older of the two"
        );
        guest.refuse(&reason);
        bail!(reason);
    }
    Ok(guest)
}
