//! The target of a migration: waits for a machine, and runs it once its source has given it away.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::door::{Door, Guest};
use super::postcopy::FaultReport;
use super::progress::CancelToken;
use super::record::{Pages, RECORD_VERSION, Records, TargetRecord};
use super::session::{Ended, Session};
use super::source::DEFAULT_PATIENCE;
use super::transport::{Listener, TICK};
use super::wire::{Message, MigrationId, Role, TargetStatus};
use crate::machine::{CompatibilityReport, Description, TargetHost, TargetMachine};

/// How long a source that was told that its machine ran here is waited for, to say that it knows. Meanwhile nobody else is
/// served.
const FAREWELL: Duration = Duration::from_secs(1);
/// Rest until it is tried again to write down a refusal.
const UNWRITTEN_REST: Duration = Duration::from_secs(1);
/// What a source is told that still has pages which the machine needed.
const LOST: &str = "the machine is lost: it ran on the target before all of its memory had come, and the process that ran it \
                    there is dead. It must not go on at the source either, as its disks were written since: start it anew from \
                    its disks, as after a loss of power";

/// How a machine is received.
#[derive(Debug, Clone)]
pub struct ReceiveOptions {
    /// Directory for the records of attempts.
    pub state_dir: PathBuf,
    /// How long a silent peer is waited for.
    pub patience: Duration,
    /// Stops waiting for a machine. One that is prepared stays so: see `discard`.
    pub stop: CancelToken,
    /// Gives up a machine that is prepared. Its source, if it lives, goes on with it; if the source is dead, it is lost.
    pub discard: CancelToken,
}

impl ReceiveOptions {
    /// The usual ones.
    pub fn new(state_dir: PathBuf) -> Self {
        Self { state_dir, patience: DEFAULT_PATIENCE, stop: CancelToken::new(), discard: CancelToken::new() }
    }
}

/// What happens on a target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum TargetEvent {
    /// A source asked what stands in the way of its machine.
    Checked {
        /// The machine.
        machine: String,
        /// What was found.
        report: CompatibilityReport,
    },
    /// A machine was made and waits for its memory.
    Created {
        /// The machine.
        machine: String,
        /// The attempt.
        migration: MigrationId,
    },
    /// A round of pages has arrived.
    RoundReceived {
        /// The round, from 0.
        round: u32,
        /// Pages received so far.
        pages: u64,
    },
    /// The source has paused the machine.
    SourcePaused,
    /// Everything is here; the machine waits for its source to give it away.
    Prepared,
    /// The source was lost while the machine is prepared: it is waited for.
    Waiting {
        /// Why the connection ended.
        reason: String,
    },
    /// The machine runs here.
    Running,
    /// The network was told.
    Announced,
    /// All pages are here, of a machine that began to run before.
    PagesComplete {
        /// How its processors waited for them.
        report: FaultReport,
    },
    /// The attempt is over, and the machine does not run here. The next may come.
    Failed {
        /// Why.
        reason: String,
    },
}

/// Who wants to know what happens on a target.
pub type TargetObserver<'a> = &'a (dyn Fn(&TargetEvent) + Sync);

/// A machine that runs here now.
pub struct Received {
    /// The machine.
    pub machine: Box<dyn TargetMachine>,
    /// What it is made of.
    pub description: Description,
    /// The attempt.
    pub migration: MigrationId,
    /// How the pages that its processors waited for were served, if it ran before all were here.
    pub postcopy: Option<FaultReport>,
}

/// Waits for a machine until one runs. Attempts that fail are told to `events`, and the next is waited for. `None`: told to
/// stop.
///
/// After this has returned a thread goes on answering the source's question who runs the machine, until the source knows.
///
/// # Errors
/// If nobody can connect, or the directory for records is of no use.
pub fn receive(
    listener: Listener,
    host: &dyn TargetHost,
    options: &ReceiveOptions,
    events: TargetObserver<'_>,
) -> Result<Option<Received>> {
    let records = Records::open(&options.state_dir)?;
    let mut door = Door::open(listener, options.patience)?;
    let mut unwritten: Option<Unwritten> = None;
    while !options.stop.is_cancelled() {
        unwritten = unwritten.and_then(|unwritten| unwritten.write(&records, UNWRITTEN_REST));
        let Some(guest) = door.wait(TICK)? else { continue };
        match guest.hello.role {
            Role::Check => check(guest, host, events),
            Role::Resolve => answer(guest, &records, unwritten.as_ref()),
            // One that was refused must not be forgotten over another.
            Role::Control if unwritten.is_some() => guest.refuse(
                "this target cannot write to its state directory, and takes no machine until it can: see its log",
            ),
            Role::Pages | Role::Faults => {
                guest.refuse("no migration is under way that this connection could belong to")
            }
            Role::Control => {
                let session = Session::begin(guest, host, options, &records, events);
                match session.run(&mut door) {
                    Ended::Running(received, control) => {
                        let late = received.postcopy.is_some();
                        see_off(door, records, received.migration, control, late);
                        return Ok(Some(*received));
                    }
                    Ended::Not { reason, unwritten: refusal } => {
                        tracing::warn!("a machine was not received: {reason:#}");
                        unwritten = refusal.map(Unwritten::new);
                        events(&TargetEvent::Failed { reason: format!("{reason:#}") });
                    }
                }
            }
        }
    }
    if let Some(left) = unwritten.and_then(|unwritten| unwritten.write(&records, Duration::ZERO)) {
        tracing::error!(
            "it is not written down that the migration {} was refused here: its source may be told that the machine runs here, \
             where it does not",
            left.record.migration
        );
    }
    Ok(None)
}

/// A refusal that could not be written down. The disk may say that the machine runs here, which a source that asks must not be
/// told: its machine would run nowhere.
struct Unwritten {
    record: TargetRecord,
    tried: Instant,
}

impl Unwritten {
    fn new(record: TargetRecord) -> Self {
        tracing::error!(
            "it could not be written down that the migration {} was refused: no machine is taken until it can be",
            record.migration
        );
        Self { record, tried: Instant::now() }
    }

    /// Tries again, if that was `rest` ago. `None`: it is written down now.
    fn write(mut self, records: &Records, rest: Duration) -> Option<Self> {
        if self.tried.elapsed() < rest {
            return Some(self);
        }
        self.tried = Instant::now();
        let written = records.write_target(&self.record);
        written.inspect_err(|error| tracing::debug!("it still cannot: {error:#}")).is_err().then_some(self)
    }
}

/// Says what stands in the way of a machine, and no more.
fn check(mut guest: Guest, host: &dyn TargetHost, events: TargetObserver<'_>) {
    let mut checked = || -> Result<()> {
        guest.welcome()?;
        let Message::Plan(plan) = guest.connection.await_promptly()? else {
            anyhow::bail!("a source asked for a check without saying of what");
        };
        let report = host.check(&plan.machine);
        guest.connection.send(&Message::Compatibility(report.clone()))?;
        events(&TargetEvent::Checked { machine: plan.machine.name, report });
        Ok(())
    };
    if let Err(error) = checked() {
        tracing::warn!("a check did not come to its end: {error:#}");
    }
}

/// Answers for an attempt that is not under way in this process: what could not be written down, what was, or else a promise, written down first,
/// that it never will be.
fn answer(mut guest: Guest, records: &Records, unwritten: Option<&Unwritten>) {
    let mut answered = || -> Result<()> {
        let migration = guest.hello.migration;
        let by_heart = unwritten.map(|unwritten| &unwritten.record);
        let known = match by_heart.filter(|record| record.migration == migration) {
            Some(record) => Some(record.clone()),
            None => records.target(migration)?,
        };
        let pages = known.as_ref().map_or(Pages::All, |record| record.pages);
        let status = match known.as_ref().map(|record| record.status) {
            Some(TargetStatus::Running) => TargetStatus::Running,
            Some(TargetStatus::Refused) => TargetStatus::Refused,
            Some(TargetStatus::Discarded) => TargetStatus::Discarded,
            // The process that had it is dead.
            Some(TargetStatus::Prepared) | None => {
                let machine = known.and_then(|record| record.machine);
                records.write_target(&TargetRecord {
                    version: RECORD_VERSION,
                    machine,
                    migration,
                    status: TargetStatus::Discarded,
                    pages: Pages::All,
                    settled: false,
                })?;
                TargetStatus::Discarded
            }
        };
        guest.welcome()?;
        match guest.connection.await_promptly()? {
            Message::Ask | Message::Commit(_) | Message::Abort(_) => {
                guest.connection.send(&Message::Status(status))?
            }
            other => anyhow::bail!("a {} message came where a question belongs", other.name()),
        }
        if status == TargetStatus::Running {
            // A source that kept pages wants to know what became of them.
            match pages {
                Pages::All => {}
                Pages::Missing => guest.connection.send(&Message::Refused(LOST.into()))?,
                Pages::Complete => guest.connection.send(&Message::Complete)?,
            }
            settle(&mut guest, records, migration);
        }
        Ok(())
    };
    if let Err(error) = answered() {
        tracing::warn!("a source that asked for its machine was not answered: {error:#}");
    }
}

/// Waits a little for the source's word that it knows, after it was told that the machine ran here.
fn settle(guest: &mut Guest, records: &Records, migration: MigrationId) {
    let until = Instant::now() + FAREWELL;
    let in_time = || {
        anyhow::ensure!(Instant::now() < until, "it has not said so in time");
        Ok(())
    };
    if let Ok(Message::Gone) = guest.connection.await_message(in_time) {
        note_settled(records, migration);
    }
}

fn note_settled(records: &Records, migration: MigrationId) {
    let note = || -> Result<()> {
        let record = records.target(migration)?.context("the record is gone")?;
        records.write_target(&TargetRecord { settled: true, ..record })
    };
    if let Err(error) = note() {
        tracing::warn!("the record of migration {migration} could not be settled: {error:#}");
    }
}

/// Answers the source for as long as it does not know that the machine runs here.
fn see_off(
    mut door: Door,
    records: Records,
    migration: MigrationId,
    mut control: Option<super::connection::Connection>,
    late: bool,
) {
    let answer = move || {
        loop {
            if let Some(connection) = &mut control {
                let said = connection.receive(TICK).and_then(|message| match message {
                    Some(Message::Gone) => Ok(true),
                    Some(Message::Ask | Message::Commit(_) | Message::Abort(_)) => {
                        connection.send(&Message::Status(TargetStatus::Running))?;
                        // A source that still kept pages does not know that they are needed no more.
                        if late { connection.send(&Message::Complete).map(|()| false) } else { Ok(false) }
                    }
                    Some(other) => anyhow::bail!("a {} message after the machine ran", other.name()),
                    None => connection.beat().map(|()| false),
                });
                match said {
                    Ok(true) => return note_settled(&records, migration),
                    Ok(false) => {}
                    Err(_) => control = None,
                }
            }
            let Ok(guest) = door.wait(if control.is_some() { Duration::ZERO } else { TICK }) else { return };
            match guest {
                Some(mut guest)
                    if guest.hello.role == Role::Resolve && guest.hello.migration == migration =>
                {
                    control = guest.welcome().is_ok().then_some(guest.connection);
                }
                Some(guest) if guest.hello.role == Role::Resolve => answer(guest, &records, None),
                Some(guest) => guest.refuse("this process runs a machine already"),
                None => {}
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("migrate-farewell".into()).spawn(answer) {
        tracing::warn!(
            "no thread to answer the source with, which has to ask a restarted process instead: {error}"
        );
    }
}
