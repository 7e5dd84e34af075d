//! The source's part of an attempt up to the point where the target has everything: nothing here lets the target run the
//! machine.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::connection::Connection;
use super::converge::{self, Convergence, Decision};
use super::handover::{greet, hello};
use super::late::LateSource;
use super::progress::{CancelToken, Observer, Progress, Step};
use super::record::SourceRecord;
use super::senders::{Common, Round, Senders};
use super::source::SendOptions;
use super::transport::{Connector, TICK};
use super::wire::{Message, Plan, Role, STATE_MAX};
use crate::machine::{CompatibilityReport, Description, SourceMachine};
use crate::pages::{PAGE_BYTES, PageSet};

/// How often progress is told within a round.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// Why an attempt ended before the target had everything.
#[derive(Debug)]
pub(super) enum Stop {
    Cancelled,
    Incompatible(CompatibilityReport),
    Failed(anyhow::Error),
}

impl Stop {
    pub fn into_error(self) -> anyhow::Error {
        match self {
            Self::Cancelled => anyhow::anyhow!("the migration was cancelled"),
            Self::Incompatible(_) => anyhow::anyhow!("the target cannot run this machine"),
            Self::Failed(error) => error,
        }
    }
}

impl From<anyhow::Error> for Stop {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

/// The target has everything.
pub(super) struct Copied {
    pub control: Connection,
    pub rounds: u32,
    /// The pages that it lacks, if it is to run without them.
    pub late: Option<LateSource>,
}

/// One attempt.
pub(super) struct Attempt<'a> {
    pub machine: &'a dyn SourceMachine,
    pub options: &'a SendOptions,
    pub record: &'a SourceRecord,
    pub connector: &'a Connector,
    pub progress: Observer<'a>,
    pub cancel: &'a CancelToken,
    pub begun: Instant,
    pub seen: Progress,
    /// When the machine was paused, if it was.
    pub paused_at: Option<Instant>,
    /// Whether the target may be prepared.
    pub state_sent: bool,
}

impl Attempt<'_> {
    /// Copies everything.
    pub fn copy(&mut self) -> Result<Copied, Stop> {
        self.see(Step::Create);
        self.check_cancel()?;
        let description = self.machine.description().context("describe the machine")?;
        let mut control = greet(self.connector, hello(self.record, Role::Control, 0), self.options.patience)?;
        let copied = self.copy_over(&mut control, description);
        match copied {
            Ok((rounds, late)) => Ok(Copied { control, rounds, late }),
            Err(stop) => {
                // What went wrong after that is no news.
                let stop = if self.cancel.is_cancelled() { Stop::Cancelled } else { stop };
                // If it does not get there, the target notices that the connection ends.
                let _ = control.send(&Message::Abort(match &stop {
                    Stop::Cancelled => "the migration was cancelled".into(),
                    Stop::Incompatible(_) => "the target cannot run the machine".into(),
                    Stop::Failed(error) => format!("{error:#}"),
                }));
                Err(stop)
            }
        }
    }

    fn copy_over(
        &mut self,
        control: &mut Connection,
        description: Description,
    ) -> Result<(u32, Option<LateSource>), Stop> {
        self.create(control, description)?;
        let mut connections = Vec::new();
        for index in 0..self.options.connections {
            self.check_cancel()?;
            connections.push(greet(
                self.connector,
                hello(self.record, Role::Pages, index),
                self.options.patience,
            )?);
        }
        let faults = match self.options.postcopy {
            true => Some(greet(self.connector, hello(self.record, Role::Faults, 0), self.options.patience)?),
            false => None,
        };
        self.machine.start_logging().context("remember which pages the guest writes")?;
        let common = Common::new(self.machine, self.options.compression, self.options.bandwidth);
        std::thread::scope(|scope| {
            let senders = Senders::start(scope, &common, connections)?;
            let mut rounds = Rounds {
                attempt: self,
                control,
                senders: &senders,
                common: &common,
                number: 0,
                last_seen: None,
                faults,
                late: None,
            };
            let copied = rounds.run();
            let late = rounds.late.take();
            match (copied, late) {
                (Ok(rounds), Some(mut late)) => {
                    late.push_over(senders.finish(), rounds);
                    Ok((rounds, Some(late)))
                }
                (Ok(rounds), None) => {
                    senders.finish();
                    Ok((rounds, None))
                }
                (Err(stop), late) => {
                    drop(late);
                    senders.abort();
                    Err(stop)
                }
            }
        })
    }

    fn create(&mut self, control: &mut Connection, machine: Description) -> Result<(), Stop> {
        let (connections, postcopy) = (self.options.connections, self.options.postcopy);
        control.send(&Message::Plan(Box::new(Plan { machine, connections, postcopy })))?;
        match control.await_message(|| self.still_wanted())? {
            Message::Compatibility(report) if !report.is_compatible() => {
                return Err(Stop::Incompatible(report));
            }
            Message::Compatibility(report) => warn_of(&report),
            other => return Err(unexpected(&other, "a report of what it can run").into()),
        }
        let created = control.await_message(|| self.still_wanted());
        self.check_cancel()?;
        match created? {
            Message::Created => Ok(()),
            other => Err(unexpected(&other, "that the machine is made").into()),
        }
    }

    fn check_cancel(&self) -> Result<(), Stop> {
        if self.cancel.is_cancelled() { Err(Stop::Cancelled) } else { Ok(()) }
    }

    fn still_wanted(&self) -> Result<()> {
        ensure!(!self.cancel.is_cancelled(), "the migration was cancelled");
        Ok(())
    }

    fn see(&mut self, step: Step) {
        self.seen.step = step;
        self.seen.elapsed = self.begun.elapsed();
        (self.progress)(&self.seen);
    }
}

/// What the target found that is no hindrance.
fn warn_of(report: &CompatibilityReport) {
    for finding in &report.findings {
        tracing::warn!(kind = finding.kind, "the target differs: {}", finding.message);
    }
}

/// What the target said instead of what was expected.
fn unexpected(message: &Message, expected: &str) -> anyhow::Error {
    match message {
        Message::Refused(reason) => anyhow::anyhow!("the target refused: {reason}"),
        Message::Abort(reason) => anyhow::anyhow!("the target gave up: {reason}"),
        other => anyhow::anyhow!("the target sent a {} message instead of {expected}", other.name()),
    }
}

/// The rounds of copying, and what follows them.
struct Rounds<'r, 'a, 'scope> {
    attempt: &'r mut Attempt<'a>,
    control: &'r mut Connection,
    senders: &'r Senders<'scope>,
    common: &'r Common<'a>,
    number: u32,
    last_seen: Option<Instant>,
    /// The connection for pages that are waited for, if there is to be one.
    faults: Option<Connection>,
    /// The pages that the target is to run without.
    late: Option<LateSource>,
}

impl Rounds<'_, '_, '_> {
    fn run(&mut self) -> Result<u32, Stop> {
        let mut convergence = Convergence::new(self.attempt.options.limits());
        self.attempt.see(Step::InitialCopy);
        let mut set = PageSet::full(self.attempt.machine.ram().pages());
        let late = loop {
            let begun = Instant::now();
            let before = self.common.counters.data_pages.load(Ordering::Relaxed);
            self.copy(set, true, &convergence)?;
            set = self.collect_dirty()?;
            let round = converge::Round {
                number: self.number - 1,
                copied: self.common.counters.data_pages.load(Ordering::Relaxed) - before,
                dirty: set.len(),
                took: begun.elapsed(),
                elapsed: self.attempt.begun.elapsed(),
            };
            let decision = convergence.after(&round);
            self.note(&round, &convergence);
            match decision {
                Decision::Copy => {}
                Decision::Throttle(percent) => self.attempt.machine.throttle(percent),
                Decision::Pause => break false,
                Decision::Postcopy => break true,
                Decision::GiveUp(reason) => return Err(Stop::Failed(anyhow::anyhow!(reason))),
            }
            self.attempt.see(Step::DirtyRounds);
        };
        self.finish(set, &convergence, late)?;
        Ok(self.number)
    }

    /// Pauses the machine and sends the rest of it, or says which pages are missing.
    fn finish(&mut self, mut set: PageSet, convergence: &Convergence, late: bool) -> Result<(), Stop> {
        self.attempt.check_cancel()?;
        self.attempt.see(Step::Pause);
        let machine = self.attempt.machine;
        let pausing = Instant::now();
        let (paused, beaten) = self.control.while_beating(|| machine.pause());
        paused.context("pause the machine")?;
        self.attempt.paused_at = Some(pausing);
        beaten?;
        machine.throttle(0);
        self.control.send(&Message::Paused)?;
        self.attempt.see(Step::State);
        let last = self.collect_dirty()?;
        set.insert_all(&last);
        if late {
            self.leave_behind(&set)?;
        } else {
            self.copy(set, false, convergence)?;
        }
        let (state, beaten) = self.control.while_beating(|| machine.save());
        beaten?;
        let state = state.context("save the state of processors and devices")?.0;
        if state.len() > STATE_MAX {
            let error = anyhow::anyhow!(
                "the state has {} bytes, more than the {STATE_MAX} that can be sent",
                state.len()
            );
            return Err(error.into());
        }
        self.attempt.check_cancel()?;
        self.attempt.state_sent = true;
        self.control.send(&Message::State(state))?;
        let answer = self.control.await_message(|| self.attempt.still_wanted());
        self.attempt.check_cancel()?;
        match answer? {
            Message::Prepared => Ok(()),
            other => Err(unexpected(&other, "that it is prepared").into()),
        }
    }

    /// These pages follow when the machine runs on the target. They are there for who needs them from now on.
    fn leave_behind(&mut self, missing: &PageSet) -> Result<(), Stop> {
        let faults = self.faults.take().context("there is no connection for pages that are waited for")?;
        let mut late = LateSource::new(self.attempt.machine.ram(), self.attempt.options);
        late.open(missing, faults)?;
        self.late = Some(late);
        self.control.send(&Message::Missing(missing.clone()))?;
        let answer = self.control.await_message(|| self.attempt.still_wanted());
        self.attempt.check_cancel()?;
        match answer? {
            Message::Armed => Ok(()),
            other => Err(unexpected(&other, "that it waits for missing pages").into()),
        }
    }

    fn collect_dirty(&self) -> Result<PageSet> {
        let machine = self.attempt.machine;
        let mut set = PageSet::empty(machine.ram().pages());
        machine.collect_dirty(&mut set).context("find out which pages were written")?;
        Ok(set)
    }

    /// Copies a set of pages; when this returns they are in the target's memory.
    fn copy(&mut self, set: PageSet, live: bool, convergence: &Convergence) -> Result<(), Stop> {
        let round = Arc::new(Round::new(self.number, set, live));
        self.control.send(&Message::RoundBegin(self.number))?;
        self.senders.begin(&round)?;
        loop {
            self.attempt.check_cancel()?;
            let message = match self.control.receive(TICK) {
                Ok(message) => message,
                // What a thread found out first says more than that the connection ended.
                Err(error) => {
                    self.senders.check()?;
                    return Err(error.into());
                }
            };
            match message {
                Some(Message::RoundReceived(end)) => {
                    round.check_received(&end, self.senders.connections())?;
                    break;
                }
                Some(other) => return Err(unexpected(&other, "that the round has arrived").into()),
                None => {}
            }
            self.senders.check()?;
            self.control.watch()?;
            self.tell(&round, convergence);
            if live && convergence.is_late(self.attempt.begun.elapsed()) && convergence.gives_up_when_late() {
                return Err(Stop::Failed(too_late(self.attempt.begun.elapsed(), &round)));
            }
        }
        self.number += 1;
        Ok(())
    }

    /// Tells progress now and then.
    fn tell(&mut self, round: &Round, convergence: &Convergence) {
        if self.last_seen.is_some_and(|at| at.elapsed() < PROGRESS_EVERY) {
            return;
        }
        self.last_seen = Some(Instant::now());
        self.count();
        let seen = &mut self.attempt.seen;
        (seen.round, seen.pages_left) = (round.number, round.pages_left());
        seen.throttle = convergence.throttle();
        let step = seen.step;
        self.attempt.see(step);
    }

    fn count(&mut self) {
        let (seen, counters) = (&mut self.attempt.seen, &self.common.counters);
        seen.pages_sent = counters.data_pages.load(Ordering::Relaxed);
        seen.pages_zero = counters.zero_pages.load(Ordering::Relaxed);
        seen.wire_bytes = counters.wire_bytes.load(Ordering::Relaxed) + self.control.bytes_sent();
    }

    /// What a whole round says.
    fn note(&mut self, round: &converge::Round, convergence: &Convergence) {
        self.count();
        let seen = &mut self.attempt.seen;
        (seen.round, seen.pages_left) = (round.number, round.dirty);
        seen.copy_rate = convergence.rate().unwrap_or(0);
        let millis = u64::try_from(round.took.as_millis()).unwrap_or(u64::MAX).max(1);
        seen.dirty_rate = (round.dirty * PAGE_BYTES as u64).saturating_mul(1000) / millis;
        seen.expected_downtime = convergence.expected_downtime();
        seen.throttle = convergence.throttle();
    }
}

fn too_late(elapsed: Duration, round: &Round) -> anyhow::Error {
    anyhow::anyhow!(
        "the time for the migration was up after {:.1} s, in round {} with {} MiB left to look at; allow more time or bandwidth, \
         auto-converge or post-copy",
        elapsed.as_secs_f64(),
        round.number,
        (round.pages_left() * PAGE_BYTES as u64) >> 20
    )
}

/// Tells a target that may be prepared that it is not going to run the machine. If it cannot be reached it learns it from the
/// next attempt.
pub(super) fn withdraw(connector: &Connector, record: &SourceRecord, patience: Duration) {
    let tell = || -> Result<()> {
        let mut control = greet(connector, hello(record, Role::Resolve, 0), patience)?;
        control.send(&Message::Abort("the source goes on by itself".into()))?;
        match control.await_message(|| Ok(()))? {
            Message::Status(_) => Ok(()),
            other => bail!("a {} message", other.name()),
        }
    };
    if let Err(error) = tell() {
        tracing::info!("the target was not told that the attempt is over: {error:#}");
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Mutex;

    use super::*;
    use crate::machine::Finding;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("nobody panicked").write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_is_no_hindrance_is_told_in_the_log() {
        let note = Finding {
            kind: "tsc".into(),
            fatal: false,
            needed: "2 kHz".into(),
            found: "3 kHz".into(),
            message: "the counter goes at another rate".into(),
        };
        let log = Log::default();
        let theirs = log.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || theirs.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            warn_of(&CompatibilityReport { findings: vec![note] });
        });
        let text = String::from_utf8(log.0.lock().expect("nobody panicked").clone()).expect("text");
        assert!(text.contains("WARN") && text.contains("another rate"), "{text}");
    }
}
