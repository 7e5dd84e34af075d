//! Calls of the control API: one request, one connection, one answer.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::PATIENCE;

/// Sends a request; returns the status and the body.
pub fn call(socket: &Path, method: &str, path: &str, body: Option<&str>) -> Result<(u16, String)> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let body = body.unwrap_or("");
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: blockd\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).with_context(|| format!("{method} {path}: no answer"))?;
    parse(&answer).with_context(|| format!("{method} {path}: not an answer"))
}

fn parse(answer: &[u8]) -> Result<(u16, String)> {
    let Some(end) = answer.windows(4).position(|w| w == b"\r\n\r\n") else { bail!("no end of the head") };
    let head = std::str::from_utf8(&answer[..end])?;
    let status = head.split_whitespace().nth(1).context("no status")?.parse()?;
    let body = &answer[end + 4..];
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { join_chunks(body)? } else { body.to_vec() };
    Ok((status, String::from_utf8(body)?))
}

fn join_chunks(mut rest: &[u8]) -> Result<Vec<u8>> {
    let mut joined = Vec::new();
    loop {
        let end = rest.windows(2).position(|w| w == b"\r\n").context("a chunk without a size")?;
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end])?.trim(), 16)?;
        rest = &rest[end + 2..];
        if size == 0 {
            return Ok(joined);
        }
        joined.extend_from_slice(rest.get(..size).context("a chunk is cut off")?);
        rest = rest.get(size + 2..).context("a chunk is cut off")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_whole_and_in_chunks() {
        let whole = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
        assert_eq!(parse(whole).unwrap(), (200, "{}".into()));
        let chunks =
            b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n";
        assert_eq!(parse(chunks).unwrap(), (404, "{}".into()));
        assert!(parse(b"nonsense").is_err());
    }
}
