//! A machine with the test guest that moves from process to process.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde_json::{Value, json};
use system_tests::machine::Shim;

use crate::{interrupt, process};

/// Between two looks at a migration: short beside any that is measured, and long beside what a look costs.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// A migration, a lap of the guest or a verification may take so long.
const PATIENCE: Duration = Duration::from_secs(120);

/// PEM files of one authority and of a certificate for 127.0.0.1 that it signed; both sides use the same.
#[derive(Debug, Clone)]
pub struct Certificates {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// The certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// What the bytes of a migration go through.
#[derive(Debug, Clone)]
pub enum Wire {
    /// A Unix socket.
    Unix,
    /// TCP on the loopback, in the clear.
    Tcp,
    /// TCP on the loopback with TLS on both sides.
    Tls(Certificates),
}

impl Wire {
    /// As tables have it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Unix => "Unix socket",
            Self::Tcp => "TCP",
            Self::Tls(_) => "TCP with TLS",
        }
    }
}

/// How a machine goes.
#[derive(Debug, Clone)]
pub struct Route {
    /// Through what.
    pub wire: Wire,
    /// What `POST /v1/migration` is given besides the address and its security.
    pub request: Value,
}

/// How one migration went. The times are those of `kvm-shim`, which has the clock at hand where the machine stops and runs.
#[derive(Debug, Clone, Serialize)]
pub struct Moved {
    /// What it says at the end, as the API has it.
    pub told: Value,
    /// The largest share of time for which the processors were made to rest, percent.
    pub throttled: u64,
    /// Processor time of both sides from the order to the end, seconds.
    pub cpu_s: f64,
    /// Why it stayed where it was, if it did.
    pub gave_up: Option<String>,
}

impl Moved {
    /// A number that the API told; 0 where it told none.
    pub fn number(&self, name: &str) -> f64 {
        self.told[name].as_f64().unwrap_or(0.0)
    }

    /// Milliseconds for which the machine stood still, if it moved.
    pub fn downtime_ms(&self) -> Option<f64> {
        self.gave_up.is_none().then(|| self.told["downtime_us"].as_f64()).flatten().map(|us| us / 1e3)
    }
}

/// The machine.
#[derive(Debug)]
pub struct Traveller {
    dir: PathBuf,
    disks: Vec<String>,
    /// The process that has it.
    pub now: Shim,
    count: u32,
}

impl Traveller {
    /// Starts a machine with `memory` bytes and this guest. `disks` are values of `--disk`. Sockets and records go to `dir`.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(dir: &Path, memory: u64, guest: &str, disks: &[String]) -> Result<Self> {
        let mut arguments =
            vec!["--memory".into(), memory.to_string(), "--guest".to_owned(), guest.to_owned()];
        arguments.extend(disk_arguments(disks));
        let now = Shim::start(dir, "vm0", "run", &arguments)?;
        Ok(Self { dir: dir.to_owned(), disks: disks.to_vec(), now, count: 0 })
    }

    /// Waits until the guest has written each page of its working set.
    ///
    /// # Errors
    /// If that takes too long.
    pub fn wait_until_full(&self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while self.laps()? < 1 {
            interrupt::check()?;
            ensure!(Instant::now() < until, "the guest does not get through its memory within {PATIENCE:?}");
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// Laps of the processor that is least far.
    fn laps(&self) -> Result<u64> {
        let report = self.now.report()?;
        let vcpus = report["vcpus"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(vcpus.iter().filter_map(|vcpu| vcpu["laps"].as_u64()).min().unwrap_or(0))
    }

    /// Pages that the guest has visited so far.
    ///
    /// # Errors
    /// If there is no report.
    pub fn visits(&self) -> Result<u64> {
        let report = self.now.report()?;
        let vcpus = report["vcpus"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(vcpus.iter().filter_map(|vcpu| vcpu["visits"].as_u64()).sum())
    }

    /// Tells the guest something.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn tell(&self, what: Value) -> Result<()> {
        self.now.call("POST", "/v1/guest", Some(&what)).map(drop)
    }

    /// `pause` or `resume`.
    ///
    /// # Errors
    /// If the machine can't.
    pub fn vm(&self, verb: &str) -> Result<()> {
        self.now.call("POST", &format!("/v1/vm/{verb}"), None).map(drop)
    }

    /// Has the guest verify all of its memory and of its disks; it rests afterwards.
    ///
    /// # Errors
    /// If anything is wrong.
    pub fn verify(&self) -> Result<()> {
        self.now.verify().context("WRONG: the guest's data is not what it wrote").map(drop)
    }

    /// Fails if the guest has found anything wrong so far.
    ///
    /// # Errors
    /// What it found.
    pub fn check(&self) -> Result<()> {
        let report = self.now.report()?;
        ensure!(report["mismatches"] == 0 && report["disk_errors"] == 0, "WRONG: the guest found: {report}");
        Ok(())
    }

    /// Moves it to a new process; it stays where it is if the migration gives up.
    ///
    /// # Errors
    /// If it was lost, or the processes can't be asked.
    pub fn travel(&mut self, route: &Route) -> Result<Moved> {
        self.travel_watched(route, |_| Ok(()))
    }

    /// The same; `look` is called every few milliseconds with the process that receives.
    ///
    /// # Errors
    /// As above, and what `look` says.
    pub fn travel_watched(
        &mut self,
        route: &Route,
        mut look: impl FnMut(&Shim) -> Result<()>,
    ) -> Result<Moved> {
        let (next, request) = self.prepare(route)?;
        let cpu = |next: &Shim| -> Result<f64> {
            let both = process::cpu_clock(self.now.pid())? + process::cpu_clock(next.pid())?;
            Ok(both.as_secs_f64())
        };
        let (before, state) = (cpu(&next)?, self.now.state());
        self.now.send(&request)?;
        let until = Instant::now() + PATIENCE;
        let mut throttled = 0;
        let (told, used) = loop {
            interrupt::check()?;
            look(&next)?;
            let used = cpu(&next)?;
            let info = self.now.migration()?;
            throttled = throttled.max(info["throttle_percent"].as_u64().unwrap_or(0));
            if info["state"] != "running" {
                break (info, used);
            }
            ensure!(Instant::now() < until, "the migration does not end: {info}");
            std::thread::sleep(LOOK_EVERY);
        };
        let cpu_s = used - before;
        match told["state"].as_str() {
            Some("done") => {
                next.wait_state(&state, PATIENCE)?;
                let mut before = std::mem::replace(&mut self.now, next);
                let status = before.wait_end()?;
                ensure!(status.success(), "the source ended with {status}: {}", before.log());
                Ok(Moved { told, throttled, cpu_s, gave_up: None })
            }
            Some("failed" | "cancelled") => {
                let why = told["error"].as_str().unwrap_or("no reason given").to_owned();
                Ok(Moved { told, throttled, cpu_s, gave_up: Some(why) })
            }
            _ => bail!("the machine is lost: {told}\n{}\n{}", self.now.log(), next.log()),
        }
    }

    /// Starts the process that receives, and makes the request.
    fn prepare(&mut self, route: &Route) -> Result<(Shim, Value)> {
        self.count += 1;
        let name = format!("vm{}", self.count);
        let to = match &route.wire {
            Wire::Unix => format!("unix:{}", self.dir.join(format!("{name}.wire")).display()),
            Wire::Tcp | Wire::Tls(_) => format!("tcp:127.0.0.1:{}", free_port()?),
        };
        let mut arguments = vec!["--listen".to_owned(), to.clone()];
        let mut request = route.request.clone();
        request["to"] = to.into();
        match &route.wire {
            Wire::Unix => {}
            Wire::Tcp => {
                arguments.push("--insecure-plain-tcp".into());
                request["insecure_plain_tcp"] = true.into();
            }
            Wire::Tls(Certificates { ca, cert, key }) => {
                let files = format!("ca={},cert={},key={}", ca.display(), cert.display(), key.display());
                arguments.extend(["--tls".into(), files]);
                request["tls"] = json!({"ca": ca, "cert": cert, "key": key});
            }
        }
        arguments.extend(disk_arguments(&self.disks));
        let next = Shim::start(&self.dir, &name, "receive", &arguments)?;
        Ok((next, request))
    }

    /// Ends the machine and its process in good order.
    ///
    /// # Errors
    /// If they do not end.
    pub fn end(mut self) -> Result<()> {
        self.now.call("POST", "/v1/vm/stop", None)?;
        let status = self.now.wait_end()?;
        ensure!(status.success(), "kvm-shim ended with {status}: {}", self.now.log());
        Ok(())
    }
}

fn disk_arguments(disks: &[String]) -> Vec<String> {
    disks.iter().flat_map(|disk| ["--disk".to_owned(), disk.clone()]).collect()
}

/// A port of the loopback that nobody listens on at the moment.
///
/// # Errors
/// If there is none.
pub fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("find a free port")?;
    Ok(listener.local_addr()?.port())
}
