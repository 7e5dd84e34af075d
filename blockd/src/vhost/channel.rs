//! The channel on which a back end speaks to its front end: here, to say that the configuration space has changed.
//!
//! The vhost crate takes the channel's descriptor for purposes of its own and does not know this message. So each message of
//! a front end is looked at before the crate reads it; looking at one that carries a descriptor gives a copy of that.

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recv, recvmsg, send};

/// VHOST_USER_SET_BACKEND_REQ_FD.
const SET_BACKEND_REQ_FD: u32 = 21;
/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
const CONFIG_CHANGE: u32 = 2;
/// Version 1 of the protocol, no reply wanted.
const FLAGS: u32 = 1;
/// Descriptors that one message can carry here; only one is of use.
const FDS_MAX: usize = 8;

/// Waits for the next message of a front end, without taking it. When it hands over a channel: a copy of that.
pub(super) fn of_next_message(stream: &UnixStream) -> Option<UnixStream> {
    let mut head = [0; 4];
    let got = recv(stream.as_raw_fd(), &mut head, MsgFlags::MSG_PEEK).ok()?;
    if got < head.len() || u32::from_le_bytes(head) != SET_BACKEND_REQ_FD {
        return None;
    }
    let mut buffers = [IoSliceMut::new(&mut head)];
    let mut control = nix::cmsg_space!([std::os::fd::RawFd; FDS_MAX]);
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut buffers, Some(&mut control), flags).ok()?;
    let mut channel = None;
    for part in message.cmsgs().ok()? {
        let ControlMessageOwned::ScmRights(fds) = part else { continue };
        for fd in fds {
            // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            channel.get_or_insert(UnixStream::from(fd));
        }
    }
    channel
}

/// The channels of a disk's front ends, by session.
#[derive(Debug, Default)]
pub struct Channels(Mutex<BTreeMap<u64, UnixStream>>);

impl Channels {
    /// The session has this channel from now on, or none.
    pub fn set(&self, session: u64, channel: Option<UnixStream>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match channel {
            Some(channel) => drop(all.insert(session, channel)),
            None => drop(all.remove(&session)),
        }
    }

    /// Tells all front ends that the configuration space has changed. Whether any of them could be told.
    pub fn tell_config_changed(&self) -> bool {
        let mut message = [0; 12];
        message[..4].copy_from_slice(&CONFIG_CHANGE.to_le_bytes());
        message[4..8].copy_from_slice(&FLAGS.to_le_bytes());
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let told = all.values().filter(|channel| {
            // A front end that reads its channel so slowly that it is full is not waited for.
            send(channel.as_raw_fd(), &message, flags).is_ok_and(|sent| sent == message.len())
        });
        told.count() > 0
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::io::Write;

    use nix::sys::socket::{ControlMessage, sendmsg};

    use super::*;

    fn message(request: u32) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&request.to_le_bytes());
        bytes
    }

    #[test]
    fn a_channel_is_copied_and_the_message_stays_as_it_was() {
        let (front, back) = UnixStream::pair().expect("a pair");
        let (mut theirs, ours) = UnixStream::pair().expect("a pair");
        let bytes = message(SET_BACKEND_REQ_FD);
        let fds = [ours.as_raw_fd()];
        let parts = [std::io::IoSlice::new(&bytes)];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(front.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None).expect("sent");
        drop(ours);
        let channel = of_next_message(&back).expect("it carries one");
        let mut read = [0; 12];
        (&back).read_exact(&mut read).expect("it is there still");
        assert_eq!(read, bytes);

        let channels = Channels::default();
        assert!(!channels.tell_config_changed(), "nobody listens");
        channels.set(7, Some(channel));
        assert!(channels.tell_config_changed());
        theirs.read_exact(&mut read).expect("told");
        assert_eq!(read[..4], CONFIG_CHANGE.to_le_bytes());
        channels.set(7, None);
        assert_eq!(theirs.read(&mut read).expect("an end"), 0, "nobody holds the channel any more");
    }

    #[test]
    fn other_messages_and_the_end_of_the_connection_carry_none() {
        let (mut front, back) = UnixStream::pair().expect("a pair");
        front.write_all(&message(1)).expect("sent");
        assert!(of_next_message(&back).is_none());
        let mut read = [0; 12];
        (&back).read_exact(&mut read).expect("it is there still");
        front.write_all(&message(SET_BACKEND_REQ_FD)).expect("sent, without a descriptor");
        assert!(of_next_message(&back).is_none());
        (&back).read_exact(&mut read).expect("it is there still");
        drop(front);
        assert!(of_next_message(&back).is_none());
    }
}
