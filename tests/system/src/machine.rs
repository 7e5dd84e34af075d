//! Machines under test: processes of `kvm-shim`, asked over their control API.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::daemon::binary;
use crate::{PATIENCE, http};

/// Whether machines can run here; says that the test is skipped where they can't.
pub fn has_kvm() -> bool {
    let opened = File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &opened {
        println!("SKIPPED: /dev/kvm can't be used ({error}), so no machine was run");
    }
    opened.is_ok()
}

/// Held by a test while its machines run: with more busy processors of guests than the host has, a host whose KVM is
/// paravirtual stops to get anything else done for tens of seconds.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A process of `kvm-shim` with a machine, or waiting for one. Killed when dropped.
#[derive(Debug)]
pub struct Shim {
    child: Child,
    api: PathBuf,
    log: PathBuf,
}

impl Shim {
    /// Starts `kvm-shim VERB ARGUMENTS` in `dir` under a name of its own, and waits until its API answers.
    pub fn start(dir: &Path, name: &str, verb: &str, arguments: &[String]) -> Result<Self> {
        let api = dir.join(format!("{name}.api"));
        let log = dir.join(format!("{name}.log"));
        // As on a host where machines come and go.
        let state = dir.join("state");
        let child = Command::new(binary("kvm-shim", "KVM_SHIM")?)
            .arg(verb)
            .arg("--api")
            .arg(&api)
            .arg("--state-dir")
            .arg(&state)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .context("start kvm-shim")?;
        let mut shim = Self { child, api, log };
        let until = Instant::now() + PATIENCE;
        while shim.info().is_err() {
            if let Some(status) = shim.child.try_wait()? {
                bail!("kvm-shim {verb} ended with {status}: {}", shim.log());
            }
            ensure!(Instant::now() < until, "kvm-shim {verb} does not answer: {}", shim.log());
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(shim)
    }

    /// What `kvm-shim ARGUMENTS` prints; an error with what it complains of if it fails.
    pub fn command(arguments: &[&str]) -> Result<String> {
        let output = Command::new(binary("kvm-shim", "KVM_SHIM")?).args(arguments).output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
        Ok(said)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The socket of its API.
    pub fn api(&self) -> &Path {
        &self.api
    }

    /// What it wrote to standard error.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// `METHOD path`, with a body; the answer, or its error's message.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let text = body.map(Value::to_string);
        let (status, answer) = http::call(&self.api, method, path, text.as_deref())?;
        let value: Value = serde_json::from_str(&answer).unwrap_or(Value::Null);
        if status / 100 == 2 {
            return Ok(value);
        }
        bail!("{method} {path}: {}", value["error"]["message"].as_str().unwrap_or("no message"))
    }

    /// `GET /v1/vm`.
    pub fn info(&self) -> Result<Value> {
        self.call("GET", "/v1/vm", None)
    }

    /// How its machine is.
    pub fn state(&self) -> String {
        self.info().map_or_else(|_| "no answer".into(), |i| i["state"].as_str().unwrap_or("").to_owned())
    }

    /// `GET /v1/guest`: the test guest's report.
    pub fn report(&self) -> Result<Value> {
        self.call("GET", "/v1/guest", None)
    }

    /// Has the test guest verify everything; the report, or what it found.
    pub fn verify(&self) -> Result<Value> {
        let report = self.call("POST", "/v1/guest", Some(&serde_json::json!({ "verify": true })))?;
        ensure!(report["mismatches"] == 0 && report["disk_errors"] == 0, "the guest found: {report}");
        Ok(report)
    }

    /// `GET /v1/migration`.
    pub fn migration(&self) -> Result<Value> {
        self.call("GET", "/v1/migration", None)
    }

    /// Begins a migration.
    pub fn send(&self, request: &Value) -> Result<Value> {
        self.call("POST", "/v1/migration", Some(request))
    }

    /// Waits until the migration is over; how it ended. A process that ends says so by its exit code.
    pub fn wait_migration(&self, timeout: Duration) -> Result<Value> {
        let until = Instant::now() + timeout;
        loop {
            let info = self.migration()?;
            if info["state"] != "running" {
                return Ok(info);
            }
            ensure!(Instant::now() < until, "the migration does not end: {info}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the machine is in this state.
    pub fn wait_state(&self, state: &str, timeout: Duration) -> Result<()> {
        let until = Instant::now() + timeout;
        while self.state() != state {
            ensure!(Instant::now() < until, "it is {}, not {state}: {}", self.state(), self.log());
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Waits until something is true of it, for [`PATIENCE`] at most.
    pub fn wait_until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !is_so(self) {
            assert!(Instant::now() < until, "waited in vain for {what}: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// SIGKILL.
    pub fn kill9(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end.
    pub fn wait_end(&mut self) -> Result<ExitStatus> {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < until, "kvm-shim does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        self.kill9();
        if std::thread::panicking() {
            eprintln!("kvm-shim {}: {}", self.api.display(), self.log());
        }
    }
}
