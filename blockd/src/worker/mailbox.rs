//! How other threads reach a worker: a list behind a mutex that is empty nearly always, and an eventfd that wakes it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::command::Command;
use crate::mover::shared::WriteWord;

/// One message to a worker.
#[derive(Debug)]
pub enum Mail {
    /// From a session or the disk.
    Command(Command),
    /// From a move.
    Write(WriteWord),
}

/// A worker's mailbox.
#[derive(Debug)]
pub struct Mailbox {
    list: Mutex<Vec<Mail>>,
    pending: AtomicBool,
    bell: EventFd,
}

impl Mailbox {
    /// An empty one.
    pub fn new() -> std::io::Result<Self> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        Ok(Self { list: Mutex::new(Vec::new()), pending: AtomicBool::new(false), bell })
    }

    /// Leaves a message and wakes the worker if it may be asleep.
    pub fn post(&self, mail: Mail) {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).push(mail);
        if !self.pending.swap(true, Ordering::SeqCst) {
            // An eventfd of our own, whose counter stays far from its limit.
            let _ = self.bell.write(1);
        }
    }

    /// Takes all messages, in order. A glance at a flag when there are none.
    pub fn take(&self) -> Vec<Mail> {
        if !self.pending.load(Ordering::Acquire) {
            return Vec::new();
        }
        // Before the list is looked at: who posts after that rings again.
        self.pending.store(false, Ordering::SeqCst);
        std::mem::take(&mut *self.list.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What the worker's ring reads from.
    pub fn bell(&self) -> RawFd {
        self.bell.as_fd().as_raw_fd()
    }

    /// The same as a borrowed descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
