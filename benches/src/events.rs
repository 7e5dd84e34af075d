//! The daemon's stream of events, with the time at which each was seen.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blockd_api::Event;

/// Follows `/v1/events` in a thread of its own until it is dropped.
#[derive(Debug)]
pub struct Events {
    stream: UnixStream,
    seen: Receiver<(Instant, Event)>,
}

impl Events {
    /// Subscribes; what happens from now on is not missed.
    ///
    /// # Errors
    /// When the daemon refuses.
    pub fn follow(api: &Path) -> Result<Self> {
        let stream = UnixStream::connect(api).with_context(|| format!("connect to {}", api.display()))?;
        let ask = "GET /v1/events?follow=true HTTP/1.1\r\nHost: blockd\r\n\r\n";
        (&stream).write_all(ask.as_bytes())?;
        let mut reader = BufReader::new(stream.try_clone()?);
        read_head(&mut reader)?;
        let (send, seen) = mpsc::channel();
        std::thread::Builder::new().name("events".into()).spawn(move || {
            let mut pending = Vec::new();
            // The stream ends when the daemon does, or when this side is dropped.
            while let Ok(true) = read_chunk(&mut reader, &mut pending) {
                let now = Instant::now();
                while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = pending.drain(..=end).collect();
                    if let Ok(event) = serde_json::from_slice(&line) {
                        let _ = send.send((now, event));
                    }
                }
            }
        })?;
        Ok(Self { stream, seen })
    }

    /// The next event, if one comes within `timeout`.
    pub fn next(&self, timeout: Duration) -> Option<(Instant, Event)> {
        self.seen.recv_timeout(timeout).ok()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn read_head(reader: &mut impl BufRead) -> Result<()> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    ensure!(
        line.split_whitespace().nth(1) == Some("200"),
        "the daemon's answer to a wish for events: {line}"
    );
    while !line.trim_end().is_empty() {
        line.clear();
        reader.read_line(&mut line)?;
    }
    Ok(())
}

/// Reads one chunk of the body (RFC 9112, section 7.1); returns whether it was not the last.
fn read_chunk(reader: &mut impl BufRead, to: &mut Vec<u8>) -> Result<bool> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        bail!("the stream broke off");
    }
    let size = line.split(';').next().unwrap_or_default().trim();
    let size = u64::from_str_radix(size, 16).with_context(|| format!("{line:?} is no size of a chunk"))?;
    ensure!(size <= 1 << 24, "a chunk of {size} bytes: events are smaller");
    let mut chunk = vec![0; size as usize + 2];
    reader.read_exact(&mut chunk)?;
    to.extend_from_slice(&chunk[..size as usize]);
    Ok(size > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_joined_and_the_empty_one_is_the_last() {
        let mut body = &b"3\r\nab\n\r\n1\r\nc\r\n0\r\n\r\n"[..];
        let mut joined = Vec::new();
        assert!(read_chunk(&mut body, &mut joined).unwrap());
        assert!(read_chunk(&mut body, &mut joined).unwrap());
        assert!(!read_chunk(&mut body, &mut joined).unwrap());
        assert_eq!(joined, b"ab\nc");
        assert!(read_chunk(&mut body, &mut joined).is_err());
        assert!(read_chunk(&mut &b"ffffffffff\r\n"[..], &mut joined).is_err());
    }

    #[test]
    fn a_refusal_is_told() {
        assert!(read_head(&mut &b"HTTP/1.1 404 Not Found\r\n\r\n"[..]).is_err());
        assert!(read_head(&mut &b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n"[..]).is_ok());
    }
}
