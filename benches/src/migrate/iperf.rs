//! iperf3 on the loopback: what TCP carries here when nothing is read from a guest and nothing is written to one.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::traveller::free_port;
use crate::interrupt;

/// The server may take so long to listen.
const PATIENCE: Duration = Duration::from_secs(5);

/// The server of one measurement; it ends with it, or is killed.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Its version; `None` where it is not installed.
pub fn version() -> Option<String> {
    let output = Command::new("iperf3").arg("--version").output().ok()?;
    version_in(&String::from_utf8_lossy(&output.stdout)).map(Into::into)
}

/// `iperf 3.12 (cJSON 1.7.15)` is 3.12.
fn version_in(said: &str) -> Option<&str> {
    said.strip_prefix("iperf ")?.split_whitespace().next()
}

/// Bytes a second that are received over so many connections.
///
/// # Errors
/// What iperf3 says.
pub fn measure(streams: u32, seconds: u32) -> Result<f64> {
    let port = free_port()?.to_string();
    let mut server = Command::new("iperf3");
    server.args(["-s", "-1", "-B", "127.0.0.1", "-p", &port]).stdout(Stdio::null()).stderr(Stdio::null());
    let server = Server(server.stdin(Stdio::null()).spawn().context("start iperf3")?);
    let until = Instant::now() + PATIENCE;
    loop {
        interrupt::check()?;
        let mut client = Command::new("iperf3");
        client.args(["-J", "-c", "127.0.0.1", "-p", &port]);
        client.args(["-P", &streams.to_string(), "-t", &seconds.to_string()]);
        let output = client.stdin(Stdio::null()).output().context("start iperf3")?;
        let said = String::from_utf8_lossy(&output.stdout);
        // With JSON it ends with 0 whatever happens.
        if let Some(rate) = parse(&said) {
            drop(server);
            return Ok(rate);
        }
        // Until the server listens, the client is refused.
        ensure!(said.contains("onnection refused"), "iperf3 failed: {said}");
        if Instant::now() > until {
            bail!("iperf3's server did not listen within {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn parse(json: &str) -> Option<f64> {
    let value: Value = serde_json::from_str(json).ok()?;
    Some(value["end"]["sum_received"]["bits_per_second"].as_f64()? / 8.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_received_counts() {
        let said =
            r#"{"end": {"sum_sent": {"bits_per_second": 9e9}, "sum_received": {"bits_per_second": 8e9}}}"#;
        assert_eq!(parse(said), Some(1e9));
        assert_eq!(parse("{}"), None);
        assert_eq!(parse(r#"{"end": {}, "error": "unable to connect"}"#), None);
    }

    #[test]
    fn its_version_is_told_from_those_of_its_libraries() {
        assert_eq!(version_in("iperf 3.12 (cJSON 1.7.15)\nLinux vm"), Some("3.12"));
        assert_eq!(version_in(""), None);
    }
}
