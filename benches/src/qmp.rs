//! QEMU's machine protocol, as much of it as a mirror job needs.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::interrupt;

/// How long an answer may take. A mirror job that starts or completes may hold it up for as long as its requests take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// A connection to a monitor.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    partial: Vec<u8>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects and leaves the negotiation mode.
    ///
    /// # Errors
    /// When the socket is not there or the other end is no monitor.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_millis(20)))?;
        let writer = stream.try_clone()?;
        let mut qmp =
            Self { reader: BufReader::new(stream), writer, partial: Vec::new(), events: VecDeque::new() };
        let until = Instant::now() + ANSWER_TIMEOUT;
        while qmp.message()?.is_none() {
            if Instant::now() > until {
                bail!("the monitor does not greet");
            }
        }
        qmp.call("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Gives a command and waits for what it returns.
    ///
    /// # Errors
    /// What the monitor says, or that it is gone.
    pub fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.writer.write_all(line.as_bytes()).with_context(|| format!("{command}: the monitor is gone"))?;
        let until = Instant::now() + ANSWER_TIMEOUT;
        loop {
            interrupt::check()?;
            match self.message().with_context(|| command.to_owned())? {
                Some(message) => {
                    if let Some(answer) = self.sort(command, message)? {
                        return Ok(answer);
                    }
                }
                None if Instant::now() > until => bail!("{command}: no answer within {ANSWER_TIMEOUT:?}"),
                None => {}
            }
        }
    }

    fn sort(&mut self, command: &str, mut message: Value) -> Result<Option<Value>> {
        if message.get("event").is_some() {
            self.events.push_back(message);
            return Ok(None);
        }
        if let Some(error) = message.get("error") {
            bail!("{command}: {}", error["desc"].as_str().unwrap_or("refused without a reason"));
        }
        Ok(message.get_mut("return").map(Value::take))
    }

    /// The next event, when one came within a few milliseconds.
    ///
    /// # Errors
    /// When the monitor is gone.
    pub fn event(&mut self) -> Result<Option<Value>> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        Ok(self.message()?.filter(|message| message.get("event").is_some()))
    }

    fn message(&mut self) -> Result<Option<Value>> {
        match self.reader.read_until(b'\n', &mut self.partial) {
            Ok(0) => bail!("the monitor has closed the connection"),
            Ok(_) if self.partial.ends_with(b"\n") => {
                let line = std::mem::take(&mut self.partial);
                Ok(Some(serde_json::from_slice(&line).context("the monitor sent something else than JSON")?))
            }
            Ok(_) => Ok(None),
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) =>
            {
                Ok(None)
            }
            Err(e) => Err(e).context("read from the monitor"),
        }
    }
}

/// The new status, when the event tells that this job has one.
pub fn job_status<'a>(event: &'a Value, job: &str) -> Option<&'a str> {
    let data = &event["data"];
    (event["event"] == "JOB_STATUS_CHANGE" && data["id"] == job).then(|| data["status"].as_str()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_jobs_own_changes_count() {
        let event = |id: &str| json!({"event": "JOB_STATUS_CHANGE", "data": {"id": id, "status": "ready"}});
        assert_eq!(job_status(&event("move"), "move"), Some("ready"));
        assert_eq!(job_status(&event("other"), "move"), None);
        assert_eq!(job_status(&json!({"event": "BLOCK_JOB_READY"}), "move"), None);
    }

    #[test]
    fn answers_and_events_are_told_apart_however_they_are_cut() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let monitor = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            stream.write_all(b"{\"QMP\": {}}\n").unwrap();
            assert!(lines.next().unwrap().unwrap().contains("qmp_capabilities"));
            stream.write_all(b"{\"return\": {}}\n").unwrap();
            assert!(lines.next().unwrap().unwrap().contains("query"));
            stream.write_all(b"{\"event\": \"X\"}\n{\"ret").unwrap();
            std::thread::sleep(Duration::from_millis(60));
            stream.write_all(b"urn\": 7}\n").unwrap();
            assert!(lines.next().unwrap().unwrap().contains("bad"));
            stream.write_all(b"{\"error\": {\"desc\": \"no such thing\"}}\n").unwrap();
        });
        let mut qmp = Qmp::connect(&socket).unwrap();
        assert_eq!(qmp.call("query", json!({})).unwrap(), json!(7));
        assert_eq!(qmp.event().unwrap().unwrap()["event"], "X");
        assert!(qmp.call("bad", json!({})).unwrap_err().to_string().contains("no such thing"));
        monitor.join().unwrap();
    }
}
