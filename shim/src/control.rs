//! One process with one machine: what its API can ask of it, and the migration that is under way.

mod claim;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use self::claim::{Activity, Claim};
use crate::api::{ErrorInfo, GuestRequest, MigrationInfo, STEPS, SaveRequest, SendRequest, TlsFiles, VmInfo};
use crate::cli::args::Process;
use crate::cli::parts::DiskArgument;
use crate::guest::{self, Command, Report};
use crate::machine::{CompatibilityReport, SourceMachine};
use crate::migrate::batch::Compression;
use crate::migrate::converge::OnTimeout;
use crate::migrate::progress::{CancelToken, Progress};
use crate::migrate::source::{self, Resolve, Resolved, SendError, SendOptions};
use crate::migrate::target::TargetEvent;
use crate::migrate::transport::{Address, Listener, Security};
use crate::migrate::{MigrationId, SourceLock, file, target};
use crate::setup::Devices;
use crate::storage::{Releases, Takes};
use crate::vm::host::KvmHost;
use crate::vm::kvm;
use crate::vm::machine::{Life, Machine, Storage};

/// How long the test guest may take to verify everything.
const VERIFY: Duration = Duration::from_secs(3600);
/// How long a question to the target, given up, may take to end.
const QUESTION: Duration = Duration::from_secs(90);
/// How long it may take to give up a machine that is prepared.
const DISCARD: Duration = Duration::from_secs(10);
/// How often it is looked at meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// How a process waits for a machine.
#[derive(Debug, Clone)]
pub struct Receiving {
    /// Where.
    pub listen: String,
    /// Files for mutual TLS.
    pub tls: Option<TlsFiles>,
    /// TCP without TLS.
    pub insecure_plain_tcp: bool,
    /// Say what happens as JSON.
    pub json: bool,
}

/// The migration that is under way, or the last one.
#[derive(Debug, Default)]
struct Migration {
    info: MigrationInfo,
    cancel: CancelToken,
    options: Option<SendOptions>,
    /// Somebody was told how it ended.
    told: bool,
    /// Held until it is settled where the machine is.
    lock: Option<SourceLock>,
    /// What is being done that nothing else may be done beside.
    activity: Option<Activity>,
}

/// What has come of waiting for a machine.
#[derive(Debug, Default)]
struct Awaited {
    machine: Option<Arc<Machine>>,
    failed: Option<String>,
    stopped: bool,
    coming: Option<Coming>,
}

/// A machine that is on its way here.
#[derive(Debug)]
struct Coming {
    id: MigrationId,
    name: String,
    /// Everything is here. Its source is to say that it runs here.
    prepared: bool,
    /// Why its source can't say so.
    lost: Option<String>,
}

/// The process.
#[derive(Debug)]
pub struct Control {
    state_dir: PathBuf,
    disks: Vec<DiskArgument>,
    host: Option<Arc<KvmHost>>,
    awaited: Mutex<Awaited>,
    arrived: Condvar,
    migration: Mutex<Migration>,
    /// Nothing is being done any more that excludes the rest.
    idle: Condvar,
    stop_receiving: CancelToken,
    discard: CancelToken,
}

fn refusal(kind: &str, message: impl Into<String>) -> anyhow::Error {
    ErrorInfo { kind: kind.into(), message: message.into() }.into()
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Control {
    /// A process whose machine is there.
    ///
    /// # Errors
    /// If the records say that a machine of this name may run elsewhere.
    pub fn with_machine(machine: Arc<Machine>, process: &Process) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            state_dir: process.state_dir.clone(),
            disks: process.disks.clone(),
            host: None,
            awaited: Mutex::new(Awaited { machine: Some(machine), ..Awaited::default() }),
            arrived: Condvar::new(),
            migration: Mutex::default(),
            idle: Condvar::new(),
            stop_receiving: CancelToken::new(),
            discard: CancelToken::new(),
        }))
    }

    /// A process that waits for a machine.
    ///
    /// # Errors
    /// If there is no KVM, or two of the devices have the same name.
    pub fn waiting(process: &Process, devices: Devices) -> Result<Arc<Self>> {
        devices.check_names()?;
        let takes = Arc::new(Takes::new(&process.disks));
        let host = Arc::new(KvmHost::new(kvm::open()?, Box::new(devices), Some(takes)));
        Ok(Arc::new(Self {
            state_dir: process.state_dir.clone(),
            disks: process.disks.clone(),
            host: Some(host),
            awaited: Mutex::default(),
            arrived: Condvar::new(),
            migration: Mutex::default(),
            idle: Condvar::new(),
            stop_receiving: CancelToken::new(),
            discard: CancelToken::new(),
        }))
    }

    fn host(&self) -> Result<Arc<KvmHost>> {
        self.host.clone().context("this process does not wait for machines")
    }

    /// Waits for a machine in a thread of its own.
    ///
    /// # Errors
    /// If it can't listen.
    pub fn begin_to_receive(self: &Arc<Self>, receiving: Receiving) -> Result<()> {
        let address: Address = receiving.listen.parse()?;
        let security = security(receiving.tls.as_ref(), receiving.insecure_plain_tcp);
        let listener = Listener::bind(&address, &security)?;
        let (control, host) = (self.clone(), self.host()?);
        std::thread::Builder::new()
            .name("receive".into())
            .spawn(move || {
                if let Err(error) = control.receive(listener, &host) {
                    locked(&control.awaited).failed = Some(format!("{error:#}"));
                    control.arrived.notify_all();
                }
            })
            .context("start the thread that waits for a machine")?;
        Ok(())
    }

    /// Waits until a machine has come, or it is told to stop.
    fn receive(&self, listener: Listener, host: &KvmHost) -> Result<()> {
        let mut options = target::ReceiveOptions::new(self.state_dir.clone());
        options.stop = self.stop_receiving.clone();
        options.discard = self.discard.clone();
        let see = |event: &TargetEvent| {
            tracing::info!(event = serde_json::to_string(event).unwrap_or_default(), "a machine comes");
            let coming = |change: &dyn Fn(&mut Coming)| {
                if let Some(coming) = &mut locked(&self.awaited).coming {
                    change(coming);
                }
            };
            match event {
                TargetEvent::Created { machine, migration } => {
                    let (id, name) = (*migration, machine.clone());
                    locked(&self.awaited).coming = Some(Coming { id, name, prepared: false, lost: None });
                }
                TargetEvent::Prepared => coming(&|coming| coming.prepared = true),
                TargetEvent::Waiting { reason } => coming(&|coming| coming.lost = Some(reason.clone())),
                // From here on it is this process's machine, although pages may still be missing.
                TargetEvent::Running => self.arrive(host),
                TargetEvent::Failed { reason } => {
                    let mut awaited = locked(&self.awaited);
                    awaited.coming = None;
                    host.forget();
                    // It ran here already: then it is lost, and this process with it.
                    if let Some(machine) = &awaited.machine {
                        machine.fail(reason);
                    }
                }
                _ => {}
            }
        };
        let received = target::receive(listener, host, &options, &see);
        let mut migration = locked(&self.migration);
        if migration.activity == Some(Activity::Arriving) {
            migration.activity = None;
            self.idle.notify_all();
        }
        let Some(received) = received? else {
            return Ok(());
        };
        migration.info.state = "arrived".into();
        if let Some(faults) = received.postcopy {
            migration.info.postcopy_faults = faults.faults;
            migration.info.postcopy_wait_us = Some([micros(faults.p50), micros(faults.p99)]);
        }
        Ok(())
    }

    /// The machine runs here, although pages may still be missing: it can be looked at, and no more until they are here.
    fn arrive(&self, host: &KvmHost) {
        let mut awaited = locked(&self.awaited);
        let mut migration = locked(&self.migration);
        migration.info.id = awaited.coming.as_ref().map_or_else(String::new, |coming| coming.id.to_string());
        migration.info.state = "arriving".into();
        migration.activity = Some(Activity::Arriving);
        awaited.machine = host.latest();
        self.arrived.notify_all();
    }

    /// Goes on with a machine from a file.
    ///
    /// # Errors
    /// If the file is damaged or used up, or this host can't run what is in it.
    pub fn restore(self: &Arc<Self>, path: &Path) -> Result<()> {
        let host = self.host()?;
        file::restore(path, &*host)?;
        locked(&self.awaited).machine = host.latest();
        self.arrived.notify_all();
        Ok(())
    }

    /// Waits until the machine is over, or what was waited for will not come.
    ///
    /// # Errors
    /// If no machine came.
    pub fn wait_until_over(&self) -> Result<Life> {
        let machine = {
            let mut awaited = locked(&self.awaited);
            loop {
                if let Some(machine) = &awaited.machine {
                    break machine.clone();
                }
                if let Some(why) = &awaited.failed {
                    bail!("no machine came: {why}");
                }
                if awaited.stopped {
                    return Ok(Life::Shutdown);
                }
                awaited = self.arrived.wait(awaited).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
        };
        loop {
            let life = machine.wait_until_over(Duration::from_secs(3600));
            if life.is_over() {
                return Ok(life);
            }
        }
    }

    /// Waits, for at most so long, until somebody has asked how the migration ended.
    pub async fn wait_until_told(&self, at_most: Duration) {
        let until = Instant::now() + at_most;
        while Instant::now() < until && !locked(&self.migration).told {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        // The answer is on its way.
        tokio::time::sleep(LOOK_EVERY * 4).await;
    }

    fn machine(&self) -> Result<Arc<Machine>> {
        let machine = locked(&self.awaited).machine.clone();
        machine.ok_or_else(|| refusal("state", "no machine has come here yet"))
    }

    /// `GET /v1/vm`.
    ///
    /// # Errors
    /// If the machine can't be described.
    pub fn info(&self) -> Result<VmInfo> {
        let Ok(machine) = self.machine() else {
            let awaited = locked(&self.awaited);
            let (name, state, lost) = match &awaited.coming {
                None => ("", "waiting", None),
                Some(coming) if !coming.prepared => (coming.name.as_str(), "arriving", None),
                Some(coming) => (coming.name.as_str(), "prepared", coming.lost.as_ref()),
            };
            let lost = lost.map(|why| {
                format!("its source, which has to say that it runs here, was lost: {why}; see `kvm-shim resolve --help`")
            });
            return Ok(VmInfo {
                name: name.into(),
                state: state.into(),
                error: awaited.failed.clone().or(lost),
                memory_bytes: 0,
                vcpus: 0,
                cpu: String::new(),
                baseline: None,
                devices: Vec::new(),
                exits: 0,
            });
        };
        let description = machine.description()?;
        let life = machine.life();
        Ok(VmInfo {
            name: description.name,
            state: life.name().into(),
            error: if let Life::Failed(why) = life { Some(why) } else { None },
            memory_bytes: description.memory_bytes,
            vcpus: description.vcpus,
            cpu: description.cpu.model,
            baseline: description.cpu.baseline,
            devices: description.devices,
            exits: machine.vcpus().iter().map(|vcpu| vcpu.exits()).sum(),
        })
    }

    /// `POST /v1/vm/pause`.
    ///
    /// # Errors
    /// If it can't be paused, or something else is being done with it.
    pub fn pause(self: &Arc<Self>) -> Result<VmInfo> {
        let (machine, _claim) = self.claim(Activity::Switching)?;
        machine.hold()?;
        self.info()
    }

    /// `POST /v1/vm/resume`.
    ///
    /// # Errors
    /// If it can't go on, or something else is being done with it.
    pub fn resume(self: &Arc<Self>) -> Result<VmInfo> {
        let (machine, _claim) = self.claim(Activity::Switching)?;
        machine.let_go()?;
        self.info()
    }

    /// `POST /v1/vm/stop`: the guest is paused, its requests are completed, and the process ends.
    ///
    /// # Errors
    /// If something else is being done with it, or it is prepared and its source may have given it away.
    pub fn stop(self: &Arc<Self>) -> Result<VmInfo> {
        if self.machine().is_err() {
            return self.stop_waiting();
        }
        let (machine, _claim) = self.claim(Activity::Switching)?;
        machine.pause()?;
        let info = self.info()?;
        machine.stop();
        Ok(info)
    }

    fn stop_waiting(&self) -> Result<VmInfo> {
        let held = locked(&self.awaited).coming.as_ref().is_some_and(|coming| coming.prepared);
        if held {
            let message = "this process holds a machine that its source may have given away, which would be lost: settle that \
                           first, with `kvm-shim resolve` at its source or with `--discard` here";
            return Err(refusal("busy", message));
        }
        self.stop_receiving.cancel();
        locked(&self.awaited).stopped = true;
        self.arrived.notify_all();
        self.info()
    }

    /// `GET /v1/guest`.
    ///
    /// # Errors
    /// If it is not the test guest.
    pub fn guest(&self) -> Result<Report> {
        let machine = self.machine()?;
        let report = guest::report(SourceMachine::ram(&*machine));
        report.map_err(|e| refusal("state", format!("there is no report of a test guest: {e:#}")))
    }

    /// `POST /v1/guest`.
    ///
    /// # Errors
    /// If it is not the test guest, or it does not answer.
    pub fn tell_guest(&self, request: &GuestRequest) -> Result<Report> {
        self.guest()?;
        let machine = self.machine()?;
        let ram = SourceMachine::ram(&*machine);
        if let Some(rate) = request.rate {
            guest::set_rate(ram, rate)?;
        }
        match (request.verify, request.stop) {
            (true, _) => self.command(&machine, Command::Verify),
            (_, Some(true)) => self.command(&machine, Command::Stop),
            (_, Some(false)) => self.command(&machine, Command::Run),
            _ => self.guest(),
        }
    }

    fn command(&self, machine: &Machine, command: Command) -> Result<Report> {
        let ram = SourceMachine::ram(machine);
        let number = guest::send_command(ram, command)?;
        let until = Instant::now() + VERIFY;
        loop {
            let report = guest::report(ram)?;
            if report.answered(number) {
                return Ok(report);
            }
            let life = machine.life();
            if life != Life::Running || Instant::now() > until {
                return Err(refusal("state", format!("the guest does not answer: it is {}", life.name())));
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn storage(&self, what: &str) -> Result<Option<Arc<dyn Storage>>> {
        let commit = match what {
            "keep" => return Ok(None),
            "release" => false,
            "commit" => true,
            other => {
                let message =
                    format!("{other} is nothing that becomes of disks; there are keep, release and commit");
                return Err(refusal("invalid", message));
            }
        };
        let releases = Releases::new(&self.disks, commit)?;
        releases.check()?;
        Ok(Some(Arc::new(releases)))
    }

    /// `POST /v1/vm/save`.
    ///
    /// # Errors
    /// If the file can't be written; the machine goes on then. If something else is being done with the machine.
    pub fn save(self: &Arc<Self>, request: &SaveRequest) -> Result<MigrationInfo> {
        let storage = self.storage(&request.storage)?;
        let (machine, _claim) = self.claim(Activity::Saving)?;
        let _lock = source::lock(&self.state_dir, machine.name())?;
        machine.set_storage(storage);
        let begun = Instant::now();
        let bytes = SourceMachine::ram(&*machine).bytes();
        file::save(&*machine, &request.path, Compression::None)?;
        let elapsed_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(MigrationInfo {
            state: "done".into(),
            to: request.path.display().to_string(),
            memory_bytes: bytes,
            elapsed_ms,
            ..MigrationInfo::default()
        })
    }

    fn options(&self, request: &SendRequest) -> Result<SendOptions> {
        let to: Address = request.to.parse().map_err(|e| refusal("invalid", format!("{e:#}")))?;
        let mut options = SendOptions::new(to, self.state_dir.clone());
        options.security = security(request.tls.as_ref(), request.insecure_plain_tcp);
        options.downtime = Duration::from_millis(request.downtime_ms);
        options.timeout = request.timeout_ms.map(Duration::from_millis);
        options.on_timeout = match request.on_timeout.as_str() {
            "cancel" => OnTimeout::Cancel,
            "force" => OnTimeout::Force,
            other => {
                return Err(refusal("invalid", format!("on_timeout is cancel or force, not {other}")));
            }
        };
        options.connections = request.connections;
        options.bandwidth = request.bandwidth;
        options.compression = match request.compress.as_str() {
            "none" => Compression::None,
            "lz4" => Compression::Lz4,
            "zstd" => Compression::Zstd,
            other => return Err(refusal("invalid", format!("compress is none, lz4 or zstd, not {other}"))),
        };
        options.auto_converge = request.auto_converge;
        options.postcopy = request.postcopy;
        Ok(options)
    }

    /// `POST /v1/check`.
    ///
    /// # Errors
    /// If the target can't be asked.
    pub fn check(&self, request: &SendRequest) -> Result<CompatibilityReport> {
        let description = self.machine()?.description()?;
        source::check(&description, &self.options(request)?)
    }

    /// `POST /v1/migration`.
    ///
    /// # Errors
    /// If one is under way, or what is asked for is none.
    pub fn send(self: &Arc<Self>, request: &SendRequest) -> Result<MigrationInfo> {
        let options = self.options(request)?;
        let storage = self.storage(&request.storage)?;
        let (machine, claim) = self.claim(Activity::Sending)?;
        let lock = source::lock(&self.state_dir, machine.name())?;
        machine.set_storage(storage);
        let (info, cancel) = self.begin(&request.to, &machine, &options, lock);
        let control = self.clone();
        let sends = move || {
            let observer = |progress: &Progress| control.see(progress);
            let sent = source::send(&*machine, &options, &observer, &cancel);
            control.sent(sent, claim);
        };
        if let Err(error) = std::thread::Builder::new().name("send".into()).spawn(sends) {
            let mut migration = locked(&self.migration);
            (migration.info.state, migration.lock) = ("failed".into(), None);
            return Err(error).context("start the thread that sends the machine");
        }
        Ok(info)
    }

    /// A migration is under way from now on.
    fn begin(
        &self,
        to: &str,
        machine: &Machine,
        options: &SendOptions,
        lock: SourceLock,
    ) -> (MigrationInfo, CancelToken) {
        let mut migration = locked(&self.migration);
        *migration = Migration {
            info: MigrationInfo {
                id: uuid::Uuid::new_v4().to_string(),
                state: "running".into(),
                to: to.into(),
                memory_bytes: SourceMachine::ram(machine).bytes(),
                ..MigrationInfo::default()
            },
            cancel: CancelToken::new(),
            options: Some(options.clone()),
            told: false,
            lock: Some(lock),
            activity: migration.activity,
        };
        (migration.info.clone(), migration.cancel.clone())
    }

    fn see(&self, progress: &Progress) {
        let mut migration = locked(&self.migration);
        show_progress(&mut migration.info, progress);
    }

    fn sent(&self, sent: Result<source::Report, SendError>, claim: Claim) {
        let mut migration = locked(&self.migration);
        match sent {
            Ok(report) => {
                migration.info.id = report.migration.to_string();
                show_progress(&mut migration.info, &report.progress);
                migration.info.round = report.rounds;
                migration.info.postcopy_faults = report.postcopy.map_or(0, |late| late.requested);
                migration.info.state = "done".into();
            }
            Err(error) => {
                let state = match &error {
                    SendError::Cancelled => "cancelled",
                    SendError::Unresolved(_) | SendError::PostcopyInterrupted(_) => "unresolved",
                    _ => "failed",
                };
                tracing::warn!(state, "{error}");
                migration.info.state = state.into();
                migration.info.error = Some(error.to_string());
            }
        }
        if migration.info.state != "unresolved" {
            migration.lock = None;
        }
        claim.end(&mut migration);
    }

    /// `GET /v1/migration`.
    ///
    /// # Errors
    /// Never.
    pub fn migration(&self) -> Result<MigrationInfo> {
        let mut migration = locked(&self.migration);
        migration.told = migration.info.state == "done";
        Ok(migration.info.clone())
    }

    /// `POST /v1/migration/cancel`. Also ends looking for a target that does not answer.
    ///
    /// # Errors
    /// If none is under way.
    pub fn cancel(&self) -> Result<MigrationInfo> {
        let migration = locked(&self.migration);
        if !matches!(migration.activity, Some(Activity::Sending | Activity::Resolving)) {
            return Err(refusal("state", "no migration is under way"));
        }
        migration.cancel.cancel();
        Ok(migration.info.clone())
    }

    /// `POST /v1/migration/retry`.
    ///
    /// # Errors
    /// If there is nothing to resolve, or it stays unresolved.
    pub fn retry(self: &Arc<Self>) -> Result<MigrationInfo> {
        self.resolve(Resolve::Ask)
    }

    /// `POST /v1/migration/resume-here`. A question that is under way is given up first: its answer could still let the machine
    /// run on the target.
    ///
    /// # Errors
    /// If there is nothing to resolve, or the machine can't go on here.
    pub fn resume_here(self: &Arc<Self>) -> Result<MigrationInfo> {
        let until = Instant::now() + QUESTION;
        let mut migration = locked(&self.migration);
        while migration.activity == Some(Activity::Resolving) && Instant::now() < until {
            migration.cancel.cancel();
            let waited = self.idle.wait_timeout(migration, LOOK_EVERY);
            migration = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        drop(migration);
        self.resolve(Resolve::ForceHere)
    }

    fn resolve(self: &Arc<Self>, how: Resolve) -> Result<MigrationInfo> {
        let (machine, claim) = self.claim(Activity::Resolving)?;
        let (options, cancel) = {
            let mut migration = locked(&self.migration);
            migration.cancel = CancelToken::new();
            let options = migration.options.clone().context("nobody knows how the machine was sent")?;
            (options, migration.cancel.clone())
        };
        let resolved = source::resolve(Some(&*machine), machine.name(), &options, how, &cancel);
        let mut migration = locked(&self.migration);
        match resolved {
            Ok(Resolved::Here) => {
                migration.info.state = "failed".into();
                migration.info.error = Some("the target does not run the machine; it goes on here".into());
            }
            Ok(Resolved::Gone) => {
                migration.info.state = "done".into();
                migration.info.error = None;
            }
            Err(error @ SendError::Failed(_)) => {
                // It runs here; what failed came after that.
                migration.info.state = "failed".into();
                migration.info.error = Some(error.to_string());
            }
            Err(error) => {
                drop(migration);
                return Err(error.into());
            }
        }
        migration.lock = None;
        claim.end(&mut migration);
        Ok(migration.info.clone())
    }

    /// `POST /v1/migration/discard`: gives up a machine that is prepared here, once that is written down.
    ///
    /// # Errors
    /// If none is.
    pub fn discard(&self) -> Result<VmInfo> {
        let prepared = || locked(&self.awaited).coming.as_ref().is_some_and(|coming| coming.prepared);
        if !prepared() || self.machine().is_ok() {
            return Err(refusal("state", "no machine is prepared here"));
        }
        self.discard.cancel();
        let until = Instant::now() + DISCARD;
        while prepared() && self.machine().is_err() && Instant::now() < until {
            std::thread::sleep(LOOK_EVERY);
        }
        if self.machine().is_ok() {
            return Err(refusal("state", "its source let the machine run here just now"));
        }
        self.info()
    }
}

/// How a connection is secured, as people have said it.
pub(crate) fn security(tls: Option<&TlsFiles>, insecure_plain_tcp: bool) -> Security {
    Security {
        tls: tls.map(|files| crate::migrate::TlsFiles {
            ca: files.ca.clone(),
            certificate: files.cert.clone(),
            key: files.key.clone(),
        }),
        server_name: tls.and_then(|files| files.name.clone()),
        insecure_plain_tcp,
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn show_progress(info: &mut MigrationInfo, progress: &Progress) {
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    info.step = progress.step.number().into();
    info.step_name = STEPS.get(info.step.saturating_sub(1) as usize).copied().unwrap_or("").into();
    info.round = progress.round + 1;
    info.pages_sent = progress.pages_sent;
    info.pages_zero = progress.pages_zero;
    info.bytes_sent = progress.wire_bytes;
    info.dirty_bytes = progress.pages_left * 4096;
    info.rate_bytes_per_s = progress.copy_rate;
    info.dirty_rate_bytes_per_s = progress.dirty_rate;
    info.expected_downtime_ms = progress.expected_downtime.map_or(0, millis);
    info.throttle_percent = progress.throttle.into();
    info.downtime_us = progress.downtime.map(micros);
    info.elapsed_ms = millis(progress.elapsed);
    info.postcopy_faults = progress.faults;
}
