//! A verified load in a thread of its own, while a test does things to the daemon.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::load::VerifiedLoad;

impl VerifiedLoad {
    /// Goes on in a thread of its own.
    pub fn spawn(mut self) -> RunningLoad {
        let shared = Arc::new(Shared::default());
        let (sender, phases) = mpsc::channel::<Change>();
        let theirs = shared.clone();
        let thread = std::thread::spawn(move || {
            let result = self.run_while_told(&theirs, &phases);
            if let Err(error) = &result {
                // Whoever waits for requests is told only that there will be no more.
                eprintln!("the load ended: {error:#}");
            }
            theirs.ended.store(true, Ordering::Release);
            (self, result)
        });
        RunningLoad { shared, sender, thread }
    }

    fn run_while_told(&mut self, shared: &Shared, changes: &mpsc::Receiver<Change>) -> Result<()> {
        while !shared.stop.load(Ordering::Acquire) {
            for change in changes.try_iter() {
                match change {
                    Change::Phase(name) => self.mark(&name),
                    Change::Rate(rate) => self.set_rate(rate),
                }
            }
            let mut rounds = 0;
            self.run_while(|_| {
                rounds += 1;
                rounds <= 64
            })?;
            shared.done.store(self.counts().total(), Ordering::Release);
            shared.reconnects.store(self.counts().reconnects, Ordering::Release);
        }
        self.drain()
    }
}

enum Change {
    Phase(String),
    Rate(Option<f64>),
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    ended: AtomicBool,
    done: AtomicU64,
    reconnects: AtomicU64,
}

/// A load that runs in a thread of its own.
#[derive(Debug)]
pub struct RunningLoad {
    shared: Arc<Shared>,
    sender: mpsc::Sender<Change>,
    thread: JoinHandle<(VerifiedLoad, Result<()>)>,
}

impl RunningLoad {
    /// Requests done so far.
    pub fn done(&self) -> u64 {
        self.shared.done.load(Ordering::Acquire)
    }

    /// Reconnections so far.
    pub fn reconnects(&self) -> u64 {
        self.shared.reconnects.load(Ordering::Acquire)
    }

    /// Whether it has ended by itself: it found something wrong.
    pub fn has_failed(&self) -> bool {
        self.shared.ended.load(Ordering::Acquire)
    }

    /// A new phase begins.
    pub fn mark(&self, phase: &str) {
        let _ = self.sender.send(Change::Phase(phase.to_owned()));
    }

    /// Changes the rate.
    pub fn set_rate(&self, rate: Option<f64>) {
        let _ = self.sender.send(Change::Rate(rate));
    }

    /// Waits until this many further requests are done.
    pub fn wait_requests(&self, requests: u64, timeout: Duration) -> Result<()> {
        let until = self.done() + requests;
        self.wait_until(timeout, || self.done() >= until)
    }

    /// Waits until the load was reconnected this often in all.
    pub fn wait_reconnects(&self, reconnects: u64, timeout: Duration) -> Result<()> {
        self.wait_until(timeout, || self.reconnects() >= reconnects)
    }

    fn wait_until(&self, timeout: Duration, reached: impl Fn() -> bool) -> Result<()> {
        let end = Instant::now() + timeout;
        while !reached() {
            ensure!(!self.has_failed(), "the load has failed; stop it to learn why");
            ensure!(Instant::now() < end, "the load did not get on within {timeout:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Ends it, waits for what is in flight, and hands the load back. An error tells what the load found wrong.
    pub fn stop(self) -> Result<VerifiedLoad> {
        self.shared.stop.store(true, Ordering::Release);
        match self.thread.join() {
            Ok((load, Ok(()))) => Ok(load),
            Ok((_, Err(error))) => Err(error),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}
