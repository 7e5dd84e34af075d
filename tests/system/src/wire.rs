//! vhost-user messages made by hand, for a front end that does not keep to the protocol.

use std::io::Read;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Version 1 of the protocol, in the flags of every message.
pub const VERSION: u32 = 1;
/// Set in a reply.
pub const REPLY: u32 = 1 << 2;
/// Asks for a reply.
pub const NEED_REPLY: u32 = 1 << 3;

/// A connection that sends whatever it is given.
#[derive(Debug)]
pub struct RawConnection {
    stream: UnixStream,
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A message: its number and body.
    Message(u32, Vec<u8>),
    /// The daemon closed the connection.
    Closed,
    /// Nothing within the time.
    Silence,
}

impl RawConnection {
    /// Connects; no message is sent.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| format!("connect to {}", path.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.set_write_timeout(Some(Duration::from_secs(5)))?;
        Ok(Self { stream })
    }

    /// Sends a message with these flags, claimed size, body and descriptors. An error tells that the daemon has closed.
    pub fn send(
        &self,
        request: u32,
        flags: u32,
        size: u32,
        body: &[u8],
        fds: &[RawFd],
    ) -> std::io::Result<()> {
        let mut bytes = Vec::with_capacity(12 + body.len());
        for word in [request, flags, size] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(body);
        self.send_bytes(&bytes, fds)
    }

    /// Sends bytes that need not be a message.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[RawFd]) -> std::io::Result<()> {
        let mut sent = match self.stream.send_with_fds(&[bytes], fds) {
            Ok(sent) => sent,
            Err(error) => return Err(std::io::Error::from_raw_os_error(error.errno())),
        };
        while sent < bytes.len() {
            sent += std::io::Write::write(&mut &self.stream, &bytes[sent..])?;
        }
        Ok(())
    }

    /// A well-formed message with the right size.
    pub fn message(&self, request: u32, body: &[u8], fds: &[RawFd]) -> std::io::Result<()> {
        let size = u32::try_from(body.len()).map_err(std::io::Error::other)?;
        self.send(request, VERSION, size, body, fds)
    }

    /// Waits for an answer.
    pub fn answer(&mut self) -> Answer {
        let mut header = [0; 12];
        match self.stream.read_exact(&mut header) {
            Ok(()) => {}
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                return Answer::Silence;
            }
            Err(_) => return Answer::Closed,
        }
        let word = |i: usize| u32::from_le_bytes(header[i..i + 4].try_into().expect("4 bytes"));
        let mut body = vec![0; word(8).min(1 << 16) as usize];
        match self.stream.read_exact(&mut body) {
            Ok(()) => Answer::Message(word(0), body),
            Err(_) => Answer::Closed,
        }
    }

    /// Sends no more; the daemon reads an end of file.
    pub fn finish(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
    }
}
