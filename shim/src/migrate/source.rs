//! The source of a migration: sends a machine away, or leaves it running as if nothing had happened.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::attempt::{self, Attempt, Stop};
use super::batch::Compression;
use super::connection::Connection;
use super::converge::{Limits, OnTimeout};
use super::handover::{Handover, greet, hello};
use super::handshake::{Pending, SourceInput, SourceState};
use super::late::LateSource;
use super::progress::{CancelToken, Observer, Progress};
use super::record::{GIVEN_UP_MAX, Place, RECORD_VERSION, Records, SourceLock, SourceRecord};
use super::senders::CONNECTIONS_MAX;
use super::transport::{Address, Connector, Security};
use super::wire::{Message, MigrationId, Plan, Role};
use crate::machine::{CompatibilityReport, Description, SourceMachine};

/// How long a silent peer is waited for, unless said otherwise. A host that is gone is noticed sooner, by the connection; a host
/// whose processors are all taken by machines may say nothing for the better part of a minute.
pub const DEFAULT_PATIENCE: Duration = Duration::from_secs(60);
/// How long a target is looked for after a loss that came with the commit, unless said otherwise.
pub const DEFAULT_RECONNECT: Duration = Duration::from_secs(30);

/// How a machine is sent.
#[derive(Debug, Clone)]
pub struct SendOptions {
    /// Where to.
    pub to: Address,
    /// TLS, or the flag that it is not wanted.
    pub security: Security,
    /// Directory for the record of where the machine is.
    pub state_dir: PathBuf,
    /// Longest time that the machine may stand still; 300 ms unless said otherwise.
    pub downtime: Duration,
    /// Longest time until the machine is paused. `None`: as long as it takes.
    pub timeout: Option<Duration>,
    /// What to do when that is over.
    pub on_timeout: OnTimeout,
    /// Connections for pages, 1 to [`CONNECTIONS_MAX`].
    pub connections: u32,
    /// Most bytes per second over the wire.
    pub bandwidth: Option<u64>,
    /// How pages are compressed.
    pub compression: Compression,
    /// Slows the processors down if the guest writes too fast.
    pub auto_converge: bool,
    /// Runs the machine on the target before all pages are there, if the guest writes too fast.
    pub postcopy: bool,
    /// How long a silent peer is waited for.
    pub patience: Duration,
    /// How long the target is looked for after a loss that came with the commit.
    pub reconnect: Duration,
}

impl SendOptions {
    /// The usual ones.
    pub fn new(to: Address, state_dir: PathBuf) -> Self {
        Self {
            to,
            security: Security::default(),
            state_dir,
            downtime: Duration::from_millis(300),
            timeout: None,
            on_timeout: OnTimeout::Cancel,
            connections: 1,
            bandwidth: None,
            compression: Compression::None,
            auto_converge: false,
            postcopy: false,
            patience: DEFAULT_PATIENCE,
            reconnect: DEFAULT_RECONNECT,
        }
    }

    pub(super) fn limits(&self) -> Limits {
        Limits {
            downtime: self.downtime,
            timeout: self.timeout,
            on_timeout: self.on_timeout,
            auto_converge: self.auto_converge,
            postcopy: self.postcopy,
        }
    }

    fn check(&self) -> Result<()> {
        ensure!(
            (1..=CONNECTIONS_MAX).contains(&self.connections),
            "{} connections are not possible: say 1 to {CONNECTIONS_MAX}",
            self.connections
        );
        ensure!(self.bandwidth != Some(0), "a bandwidth of 0 moves nothing: leave it out for no limit");
        Ok(())
    }
}

/// A machine was moved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The attempt.
    pub migration: MigrationId,
    /// How it stood at the end.
    pub progress: Progress,
    /// Rounds of copying, the last one included.
    pub rounds: u32,
    /// How the pages that the target's processors waited for were served, if it ran before all were there.
    pub postcopy: Option<PostcopyReport>,
}

/// How post-copy went, as the source saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostcopyReport {
    /// Pages that were missing when the machine began to run on the target.
    pub pages: u64,
    /// Pages of them that a processor waited for.
    pub requested: u64,
    /// From the commit until all pages were there.
    pub took: Duration,
}

/// Why a machine was not moved.
#[derive(Debug, Error)]
pub enum SendError {
    /// It was asked to stop in time. The machine runs here.
    #[error("the migration was cancelled; the machine goes on here")]
    Cancelled,
    /// The target cannot run the machine. It runs here.
    #[error("the target cannot run this machine: {}; it goes on here", reasons(.0))]
    Incompatible(CompatibilityReport),
    /// Something went wrong. The machine is here: it runs, if it ran before.
    #[error("the migration failed and the machine goes on here: {0:#}")]
    Failed(anyhow::Error),
    /// The machine is paused here, and may run on the target.
    #[error(
        "nobody knows whether the target runs the machine, so it stays paused here: {0:#}; ask the target again, or force the \
         machine to go on here if the target is certainly dead"
    )]
    Unresolved(anyhow::Error),
    /// The machine runs on the target, but the pages that it still needs are here.
    #[error(
        "the target was let run the machine before all of its pages were there, and the rest did not get there: {0:#}; they are \
         kept here, and sent if the target is asked again"
    )]
    PostcopyInterrupted(anyhow::Error),
}

fn reasons(report: &CompatibilityReport) -> String {
    let fatal: Vec<_> = report
        .findings
        .iter()
        .filter(|finding| finding.fatal)
        .map(|finding| finding.message.as_str())
        .collect();
    fatal.join("; ")
}

/// Asks a target whether it could run a machine. Nothing moves.
///
/// # Errors
/// If the target cannot be asked.
pub fn check(description: &Description, options: &SendOptions) -> Result<CompatibilityReport> {
    let connector = Connector::new(options.to.clone(), &options.security)?;
    let record = new_record(&description.name, options);
    let mut control = greet(&connector, hello(&record, Role::Check, 0), options.patience)?;
    let plan =
        Plan { machine: description.clone(), connections: options.connections, postcopy: options.postcopy };
    control.send(&Message::Plan(Box::new(plan)))?;
    match control.await_message(|| Ok(()))? {
        Message::Compatibility(report) => Ok(report),
        Message::Refused(reason) => anyhow::bail!("the target refuses to check: {reason}"),
        other => anyhow::bail!("the target answered with a {} message", other.name()),
    }
}

fn new_record(machine: &str, options: &SendOptions) -> SourceRecord {
    SourceRecord {
        version: RECORD_VERSION,
        machine: machine.to_owned(),
        migration: MigrationId::new(),
        secret: format!("{}{}", MigrationId::new(), MigrationId::new()),
        place: Place::Here,
        to: options.to.to_string(),
        handover: Vec::new(),
        postcopy: false,
        given_up: Vec::new(),
    }
}

/// Sends a running machine away. `progress` is told at each step and several times a second, `cancel` ends it
/// at any time before the commit.
///
/// # Errors
/// If the machine was not moved: [`SendError`] says where it is then.
pub fn send(
    machine: &dyn SourceMachine,
    options: &SendOptions,
    progress: Observer<'_>,
    cancel: &CancelToken,
) -> Result<Report, SendError> {
    let prepared = prepare(machine, options).map_err(SendError::Failed)?;
    let (records, connector, record) = prepared;
    let begun = Instant::now();
    let mut attempt = Attempt {
        machine,
        options,
        record: &record,
        connector: &connector,
        progress,
        cancel,
        begun,
        seen: Progress::new(machine.ram().pages()),
        paused_at: None,
        state_sent: false,
    };
    let copied = attempt.copy();
    let Attempt { seen, paused_at, state_sent, .. } = attempt;
    let mut handover = Handover {
        machine: Some(machine),
        records: &records,
        record: record.clone(),
        connector: &connector,
        control: None,
        questions: 0,
        asked: false,
        patience: options.patience,
        reconnect: options.reconnect,
        cancel,
        troubles: Vec::new(),
        running_at: None,
        late: None,
    };
    let mut ending = Ending { handover: &mut handover, seen, paused_at, begun, progress, rounds: 0 };
    match copied {
        Ok(copied) => {
            ending.rounds = copied.rounds;
            ending.handover.record.postcopy = copied.late.is_some();
            ending.handover.late = copied.late;
            ending.hand_over(copied.control)
        }
        Err(stop) => ending.go_on_here(stop, state_sent),
    }
}

type Prepared = (Records, Connector, SourceRecord);

fn prepare(machine: &dyn SourceMachine, options: &SendOptions) -> Result<Prepared> {
    options.check()?;
    let records = Records::open(&options.state_dir)?;
    let name = machine.description().context("describe the machine")?.name;
    let last = records.source(&name)?;
    if let Some(last) = &last {
        ensure!(
            // One that went away and is here again has come back, or another one has been started under its name.
            last.place != Place::HandedOver,
            "the last attempt to move {name} (to {}) is not settled: ask that target, or force the machine to go on here, first",
            last.to
        );
    }
    ensure!(
        !(options.postcopy && machine.ram().huge_pages()),
        "post-copy does not work with huge pages: move {name} without it"
    );
    let connector = Connector::new(options.to.clone(), &options.security)?;
    let mut record = new_record(&name, options);
    if let Some(last) = last {
        // A target that was left prepared may be taken up again only after many attempts that did not reach it.
        record.given_up = last.given_up;
        record.given_up.push(last.migration);
        let forgotten = record.given_up.len().saturating_sub(GIVEN_UP_MAX);
        record.given_up.drain(..forgotten);
    }
    records.write_source(&record)?;
    Ok((records, connector, record))
}

/// What follows the copying.
struct Ending<'a, 'b> {
    handover: &'a mut Handover<'b>,
    seen: Progress,
    paused_at: Option<Instant>,
    begun: Instant,
    progress: Observer<'a>,
    rounds: u32,
}

impl Ending<'_, '_> {
    /// The target is prepared.
    fn hand_over(&mut self, control: Connection) -> Result<Report, SendError> {
        self.handover.control = Some(control);
        self.see(super::progress::Step::Resume);
        let state = self.handover.drive(SourceState::Sending.after(SourceInput::Prepared));
        self.settle(state)
    }

    fn settle(&mut self, state: SourceState) -> Result<Report, SendError> {
        match state {
            SourceState::Gone => Ok(self.report()),
            SourceState::Unresolved(_) => Err(SendError::Unresolved(self.trouble())),
            SourceState::Ending => Err(SendError::PostcopyInterrupted(self.trouble())),
            _ => {
                let tidied = self.tidy();
                let trouble = self.trouble();
                Err(SendError::Failed(match tidied {
                    Ok(()) => trouble,
                    Err(error) => trouble.context(format!("{error:#}")),
                }))
            }
        }
    }

    fn report(&mut self) -> Report {
        let downtime = self.paused_at.zip(self.handover.running_at).map(|(from, to)| to.duration_since(from));
        self.seen.downtime = downtime;
        // The target tells the network before this side ends.
        self.see(super::progress::Step::Announce);
        self.see(super::progress::Step::End);
        Report {
            migration: self.handover.record.migration,
            progress: self.seen.clone(),
            rounds: self.rounds,
            postcopy: self.handover.late.as_ref().map(LateSource::report),
        }
    }

    /// Copying did not come to its end: the machine goes on first, then the rest is tidied up.
    fn go_on_here(&mut self, stop: Stop, state_sent: bool) -> Result<Report, SendError> {
        if self.paused_at.is_some() {
            let state = self.handover.drive(SourceState::Sending.after(SourceInput::Failed));
            if state != SourceState::Here {
                return Err(SendError::Unresolved(self.trouble().context(stop.into_error())));
            }
        }
        let tidied = self.tidy();
        if state_sent {
            attempt::withdraw(self.handover.connector, &self.handover.record, self.handover.patience);
        }
        match (stop, tidied) {
            (Stop::Cancelled, Ok(())) => Err(SendError::Cancelled),
            (Stop::Incompatible(report), Ok(())) => Err(SendError::Incompatible(report)),
            (stop, Ok(())) => Err(SendError::Failed(stop.into_error())),
            (stop, Err(error)) => Err(SendError::Failed(stop.into_error().context(format!("{error:#}")))),
        }
    }

    /// Leaves the machine as it was before.
    fn tidy(&self) -> Result<()> {
        let Some(machine) = self.handover.machine else { return Ok(()) };
        machine.throttle(0);
        machine.stop_logging().context("stop remembering which pages the guest writes")
    }

    fn trouble(&mut self) -> anyhow::Error {
        let mut troubles = std::mem::take(&mut self.handover.troubles).into_iter();
        let first = troubles.next().unwrap_or_else(|| anyhow::anyhow!("for no reason that was noted"));
        troubles.fold(first, |first, next| first.context(format!("{next:#}")))
    }

    fn see(&mut self, step: super::progress::Step) {
        self.seen.step = step;
        self.seen.elapsed = self.begun.elapsed();
        (self.progress)(&self.seen);
    }
}

/// How an unresolved migration is to be settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolve {
    /// Ask the target, and do what follows from its answer.
    Ask,
    /// The target is certainly dead: the machine goes on here. If it is not, two machines write the same disk.
    ForceHere,
}

/// Where a machine is after [`resolve`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolved {
    /// Here. It runs, if the process still had it; else it may be started.
    Here,
    /// On the target.
    Gone,
}

/// What the source wrote down about a machine's last attempt. A machine whose place is not [`Place::Here`] must not be started.
///
/// # Errors
/// If the record cannot be read.
pub fn last_attempt(state_dir: &std::path::Path, machine: &str) -> Result<Option<SourceRecord>> {
    Records::open(state_dir)?.source(machine)
}

/// Takes the right to say where a machine is: whoever calls [`send`] or [`resolve`] holds it until that is settled.
///
/// # Errors
/// If another process has it.
pub fn lock(state_dir: &std::path::Path, machine: &str) -> Result<SourceLock> {
    Records::open(state_dir)?.lock_source(machine)
}

/// Settles a migration that [`send`] left unresolved, in the same process (with its machine) or in a later one (without). The
/// target's address is that of `options`; the attempt is the last one of the machine of this name.
///
/// # Errors
/// If it is still unresolved.
pub fn resolve(
    machine: Option<&dyn SourceMachine>,
    name: &str,
    options: &SendOptions,
    how: Resolve,
    cancel: &CancelToken,
) -> Result<Resolved, SendError> {
    let begin = || -> Result<_> {
        let records = Records::open(&options.state_dir)?;
        let record =
            records.source(name)?.with_context(|| format!("no attempt to move {name} is known here"))?;
        Ok((records, record, Connector::new(options.to.clone(), &options.security)?))
    };
    let (records, record, connector) = begin().map_err(SendError::Unresolved)?;
    let retry = match how {
        Resolve::Ask => SourceInput::Retry,
        Resolve::ForceHere => SourceInput::ForceHere,
    };
    let state = match record.place {
        // Pages that the target needs are still here.
        Place::Gone if record.postcopy && machine.is_some() => SourceState::Ending,
        Place::Gone => return Ok(Resolved::Gone),
        Place::HandedOver => SourceState::Unresolved(Pending::Ask).after(retry),
        // The target's answer was written down; what came after it did not work.
        Place::Here => SourceState::Unresolved(Pending::Reclaim).after(retry),
    };
    let late = machine.filter(|_| record.postcopy).map(|machine| LateSource::new(machine.ram(), options));
    let mut handover = Handover {
        machine,
        records: &records,
        record,
        connector: &connector,
        control: None,
        questions: 0,
        asked: false,
        patience: options.patience,
        reconnect: options.reconnect,
        cancel,
        troubles: Vec::new(),
        running_at: None,
        late,
    };
    let state = handover.drive(state);
    let progress: Observer<'_> = &|_| {};
    let pages = machine.map_or(0, |machine| machine.ram().pages());
    let seen = Progress::new(pages);
    let mut ending =
        Ending { handover: &mut handover, seen, paused_at: None, begun: Instant::now(), progress, rounds: 0 };
    match state {
        SourceState::Gone => Ok(Resolved::Gone),
        SourceState::Here => ending.tidy().map(|()| Resolved::Here).map_err(SendError::Failed),
        SourceState::Ending => Err(SendError::PostcopyInterrupted(ending.trouble())),
        _ => Err(SendError::Unresolved(ending.trouble())),
    }
}
