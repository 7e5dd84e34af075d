//! Kicks as reads in the ring.
//!
//! A kick eventfd is shared with the front end, which may have made it non-blocking: then a read answers EAGAIN at once,
//! and a poll has to come first. The descriptor stays open until its last operation has come back.

use std::fs::File;
use std::os::fd::AsRawFd;

use io_uring::{opcode, types};

use super::{KIND_IGNORE, KIND_KICK, KIND_KICK_POLL, Worker};

#[derive(Debug)]
pub(super) struct Kick {
    file: File,
    buffer: Box<[u8; 8]>,
    /// Which queue it is for; `None` once it is not wanted any more.
    queue: Option<usize>,
    armed: bool,
}

/// All kicks of a worker.
#[derive(Debug, Default)]
pub(super) struct Kicks(Vec<Option<Kick>>);

impl Worker {
    /// Waits for kicks of `file` for a queue. Returns its place.
    pub(super) fn add_kick(&mut self, file: File, queue: usize) -> usize {
        let kick = Kick { file, buffer: Box::new([0; 8]), queue: Some(queue), armed: false };
        let at = match self.kicks.0.iter().position(Option::is_none) {
            Some(at) => at,
            None => {
                self.kicks.0.push(None);
                self.kicks.0.len() - 1
            }
        };
        self.kicks.0[at] = Some(kick);
        self.arm_kick(at);
        at
    }

    fn arm_kick(&mut self, at: usize) {
        let Some(kick) = self.kicks.0[at].as_mut() else { return };
        kick.armed = true;
        let entry = opcode::Read::new(types::Fd(kick.file.as_raw_fd()), kick.buffer.as_mut_ptr(), 8).build();
        self.push(entry.user_data(KIND_KICK | at as u64));
    }

    /// The kick is not wanted any more; it goes when its operation has come back.
    pub(super) fn drop_kick(&mut self, at: usize) {
        let Some(kick) = self.kicks.0[at].as_mut() else { return };
        kick.queue = None;
        if !kick.armed {
            self.kicks.0[at] = None;
            return;
        }
        for kind in [KIND_KICK, KIND_KICK_POLL] {
            self.push(opcode::AsyncCancel::new(kind | at as u64).build().user_data(KIND_IGNORE));
        }
    }

    pub(super) fn kick_ended(&mut self, at: usize, result: i32) {
        let Some(kick) = self.kicks.0[at].as_mut() else { return };
        kick.armed = false;
        if kick.queue.is_none() {
            self.kicks.0[at] = None;
            return;
        }
        match result {
            8 => self.arm_kick(at),
            r if r == -libc::EAGAIN => {
                kick.armed = true;
                let fd = types::Fd(kick.file.as_raw_fd());
                let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32).build();
                self.push(entry.user_data(KIND_KICK_POLL | at as u64));
            }
            r if r == -libc::EINTR || r == -libc::ECANCELED => self.arm_kick(at),
            r => tracing::warn!(
                disk = self.disk.id,
                "a kick descriptor answers {r}: it is not an eventfd, and is ignored"
            ),
        }
    }

    pub(super) fn kick_polled(&mut self, at: usize, result: i32) {
        let Some(kick) = self.kicks.0[at].as_mut() else { return };
        kick.armed = false;
        if kick.queue.is_none() {
            self.kicks.0[at] = None;
        } else if result >= 0 || result == -libc::EINTR {
            self.arm_kick(at);
        }
    }
}
