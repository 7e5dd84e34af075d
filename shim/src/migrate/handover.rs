//! The source's side of the question who runs the machine, done for real: [`super::handshake`] says what, this does it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::connection::Connection;
use super::handshake::{SourceInput, SourceState};
use super::late::{LateSource, RECOVERIES_MAX, RECOVERY_REST};
use super::progress::CancelToken;
use super::record::{Place, Records, SourceRecord};
use super::transport::{Connector, TICK};
use super::wire::{HANDOVER_MAX, Hello, Message, PROTOCOL_MAX, PROTOCOL_MIN, Role, TargetStatus};
use crate::machine::SourceMachine;
use crate::pages::PageSet;

/// Rest between two attempts to reach the target again.
const RECONNECT_REST: Duration = Duration::from_millis(500);
/// How often the target is asked anew before a person has to look at it. Each commit that does not get through is a reason.
const QUESTIONS_MAX: u32 = 200;

/// Longest time that a target which shows that it is there is given to take the storage over and run the machine.
const TAKING_MAX: Duration = Duration::from_secs(600);
/// How long an answer is waited for even if a person does not want to wait: who asks at all wants to know.
const CANCEL_GRACE: Duration = Duration::from_secs(1);

/// Why nothing more is done for an attempt.
const SETTLED_BY_ANOTHER: &str =
    "somebody else has settled meanwhile where the machine is, or has sent it anew: look there first";

/// A machine on its way out.
pub(super) struct Handover<'a> {
    /// `None` if the process that had it is dead.
    pub machine: Option<&'a dyn SourceMachine>,
    pub records: &'a Records,
    pub record: SourceRecord,
    pub connector: &'a Connector,
    pub control: Option<Connection>,
    /// How often the target was asked so far.
    pub questions: u32,
    /// It is one on which the target was asked who runs the machine.
    pub asked: bool,
    /// How long a silent peer is waited for.
    pub patience: Duration,
    /// How long the target is looked for after a loss, before the machine stays as it is.
    pub reconnect: Duration,
    /// Ends that search early.
    pub cancel: &'a CancelToken,
    /// What went wrong on the way, the last at the end.
    pub troubles: Vec<anyhow::Error>,
    /// When the target said that it runs the machine.
    pub running_at: Option<Instant>,
    /// Pages that the target needs after that.
    pub late: Option<LateSource>,
}

impl Handover<'_> {
    /// Goes on until nothing is left to do without a person. It ends before [`SourceState::Ending`] if the target still needs
    /// pages from here and cannot be reached.
    pub fn drive(&mut self, mut state: SourceState) -> SourceState {
        while !state.is_settled() {
            if state == SourceState::Ending
                && let Err(error) = self.send_late_pages()
            {
                self.troubles.push(error);
                return state;
            }
            let input = self.act(state).unwrap_or_else(|error| {
                let lost = state == SourceState::AwaitingRunning;
                self.troubles.push(error);
                if lost { SourceInput::Lost } else { SourceInput::Failed }
            });
            state = state.after(input);
            if state == SourceState::RecordingGone {
                self.running_at = Some(Instant::now());
            }
        }
        state
    }

    fn act(&mut self, state: SourceState) -> Result<SourceInput> {
        match state {
            SourceState::Releasing => self.release()?,
            SourceState::RecordingHandover => self.write(Place::HandedOver)?,
            SourceState::Committing => self.commit()?,
            SourceState::AwaitingRunning => return self.await_running(),
            SourceState::Asking => {
                // If the disk does not say, the answer is worth having all the same.
                ensure!(self.is_handed_over().unwrap_or(true), SETTLED_BY_ANOTHER);
                return self.ask();
            }
            SourceState::RecordingHere => self.write(Place::Here)?,
            SourceState::Reclaiming => self.reclaim()?,
            SourceState::Resuming => {
                self.late = None;
                self.with_machine(|machine| machine.resume()).context("let the machine go on here")?;
            }
            SourceState::RecordingGone => self.write(Place::Gone)?,
            SourceState::Ending => self.end(),
            SourceState::Sending | SourceState::Here | SourceState::Gone | SourceState::Unresolved(_) => {
                bail!("nothing is to be done in the state {state:?}")
            }
        }
        Ok(SourceInput::Done)
    }

    /// Something on the machine, while the target is told that this side is there.
    fn with_machine<T: Send>(
        &mut self,
        work: impl FnOnce(&dyn SourceMachine) -> Result<T> + Send,
    ) -> Result<Option<T>> {
        let Some(machine) = self.machine else { return Ok(None) };
        let Some(control) = &mut self.control else { return work(machine).map(Some) };
        let (result, beaten) = control.while_beating(|| work(machine));
        if beaten.is_err() {
            // It is noticed where the next message goes.
            self.control = None;
        }
        result.map(Some)
    }

    /// The machine runs on the target: sends it the pages that it still needs, also over new connections if need be.
    fn send_late_pages(&mut self) -> Result<()> {
        let Some(mut late) = self.late.take() else { return Ok(()) };
        let mut trouble = None;
        for recovery in 0..RECOVERIES_MAX {
            if recovery > 0 {
                if self.cancel.is_cancelled() {
                    break;
                }
                std::thread::sleep(RECOVERY_REST);
            }
            match self.try_late_pages(&mut late) {
                Ok(()) => {
                    self.late = Some(late);
                    self.record.postcopy = false;
                    // Where the machine is was written down; this only spares a question.
                    let _ = self.records.write_source(&self.record);
                    return Ok(());
                }
                Err(Interrupted::Lost(error)) => {
                    late.close();
                    self.control = None;
                    trouble = Some(error);
                }
                Err(Interrupted::ForGood(error)) => {
                    late.close();
                    trouble = Some(error);
                    break;
                }
            }
        }
        late.close();
        self.late = Some(late);
        Err(trouble.unwrap_or_else(|| anyhow::anyhow!("for no reason that was noted")))
    }

    fn try_late_pages(&mut self, late: &mut LateSource) -> Result<(), Interrupted> {
        // A connection that came later than those for pages means that those are old.
        if !late.is_open() || self.control.is_none() || self.asked {
            late.close();
            if self.control.is_none() || !self.asked {
                self.control = None;
                match self.ask().map_err(Interrupted::ForGood)? {
                    SourceInput::Status(TargetStatus::Running) => {}
                    other => {
                        let error = anyhow::anyhow!("the target ran the machine, and says {other:?} now");
                        return Err(Interrupted::ForGood(error));
                    }
                }
            }
            self.asked = false;
            if self.reopen(late)? {
                return Ok(());
            }
        }
        let control = self.control.as_mut().context("the connection was lost").map_err(Interrupted::Lost)?;
        late.send_rest(control).map_err(Interrupted::Lost)
    }

    /// Asks which pages are still missing, and makes connections for them. Whether none is.
    fn reopen(&mut self, late: &mut LateSource) -> Result<bool, Interrupted> {
        let missing = match self.await_answer().map_err(Interrupted::Lost)? {
            Message::StillMissing(missing) => missing,
            Message::Complete => return Ok(true),
            Message::Refused(reason) => return Err(Interrupted::ForGood(anyhow::anyhow!(reason))),
            other => {
                let name = other.name();
                let error =
                    anyhow::anyhow!("the target sent a {name} message instead of what it still needs");
                return Err(Interrupted::Lost(error));
            }
        };
        self.connect_for_pages(late, &missing).map_err(Interrupted::Lost)?;
        Ok(false)
    }

    fn connect_for_pages(&self, late: &mut LateSource, missing: &PageSet) -> Result<()> {
        let mut connections = Vec::new();
        for index in 0..late.connections {
            connections.push(greet(self.connector, hello(&self.record, Role::Pages, index), self.patience)?);
        }
        let faults = greet(self.connector, hello(&self.record, Role::Faults, 0), self.patience)?;
        late.open(missing, faults)?;
        late.push_over(connections, 0);
        Ok(())
    }

    /// What the target says to a question, which takes no work on its side.
    fn await_answer(&mut self) -> Result<Message> {
        let control = self.control.as_mut().context("the connection was lost")?;
        control.await_message(prompt(self.patience, self.cancel))
    }

    fn release(&mut self) -> Result<()> {
        let handover =
            self.with_machine(|machine| machine.release_storage()).context("give the storage away")?;
        let handover = handover.unwrap_or_default();
        ensure!(
            handover.len() <= HANDOVER_MAX,
            "the storage hands over {} bytes, more than the {HANDOVER_MAX} that can be sent",
            handover.len()
        );
        self.record.handover = handover;
        Ok(())
    }

    fn reclaim(&mut self) -> Result<()> {
        self.late = None;
        // Whatever comes now, this connection has nothing more to say.
        if let Some(mut control) = self.control.take() {
            // The target finds out by itself as well.
            let _ = control.send(&Message::Abort("the source goes on by itself".into()));
        }
        self.with_machine(|machine| machine.reclaim_storage()).context("take the storage back")?;
        Ok(())
    }

    fn write(&mut self, place: Place) -> Result<()> {
        self.record.place = place;
        self.records.write_source(&self.record)
    }

    /// Whether this attempt is still the one to be settled, and nobody else has done so: two people may be at it at once.
    fn is_handed_over(&self) -> Result<bool> {
        let known = self.records.source(&self.record.machine)?;
        let ours = known.filter(|record| record.migration == self.record.migration);
        Ok(ours.is_some_and(|record| record.place == Place::HandedOver))
    }

    fn commit(&mut self) -> Result<()> {
        // The last look before the target may run it: where it was let go on meanwhile it would run twice.
        ensure!(self.is_handed_over().context("look where the machine is")?, SETTLED_BY_ANOTHER);
        let control = self.control.as_mut().context("the connection was lost before the commit")?;
        control.send(&Message::Commit(self.record.handover.clone()))
    }

    fn await_running(&mut self) -> Result<SourceInput> {
        let control = self.control.as_mut().context("the connection was lost after the commit")?;
        // It takes the storage over, which may last: it gets the time of patience also from a person who does not want to wait.
        let (begun, patience, cancel) = (Instant::now(), self.patience, self.cancel);
        let answer = control.await_message(|| {
            let asked_to_stop = cancel.is_cancelled() && begun.elapsed() >= patience;
            ensure!(!asked_to_stop, "waiting for the target to run the machine was cancelled");
            ensure!(
                begun.elapsed() < TAKING_MAX,
                "the target is there, but has not run the machine within {} s",
                TAKING_MAX.as_secs()
            );
            Ok(())
        });
        if answer.is_err() {
            self.control = None;
        }
        let status = match answer.context("wait for the target to run the machine")? {
            Message::Running => TargetStatus::Running,
            Message::Status(status) => status,
            Message::Refused(reason) => {
                self.troubles.push(anyhow::anyhow!("the target refused the machine: {reason}"));
                TargetStatus::Refused
            }
            other => {
                self.control = None;
                bail!("the target answered the commit with a {} message", other.name());
            }
        };
        Ok(SourceInput::Status(status))
    }

    /// Looks for the target until it answers or the time is up.
    fn ask(&mut self) -> Result<SourceInput> {
        self.questions += 1;
        ensure!(
            self.questions <= QUESTIONS_MAX,
            "the connection was lost {QUESTIONS_MAX} times around the commit"
        );
        // Once in any case: who is told to stop still wants to know. But a target may answer the same for ever.
        ensure!(self.questions == 1 || !self.cancel.is_cancelled(), "asking the target again was cancelled");
        let until = Instant::now() + self.reconnect;
        loop {
            match self.ask_once() {
                Ok((control, status)) => {
                    (self.control, self.asked) = (Some(control), true);
                    if matches!(status, TargetStatus::Refused | TargetStatus::Discarded) {
                        self.troubles
                            .push(anyhow::anyhow!("the target says that it will not run the machine"));
                    }
                    return Ok(SourceInput::Status(status));
                }
                Err(error) if Instant::now() >= until || self.cancel.is_cancelled() => {
                    return Err(error.context(format!(
                        "the target at {} does not say whether it runs the machine",
                        self.connector.address()
                    )));
                }
                Err(_) => self.rest(until),
            }
        }
    }

    fn rest(&self, until: Instant) {
        let until = until.min(Instant::now() + RECONNECT_REST);
        while Instant::now() < until && !self.cancel.is_cancelled() {
            std::thread::sleep(TICK.min(until.saturating_duration_since(Instant::now())));
        }
    }

    fn ask_once(&mut self) -> Result<(Connection, TargetStatus)> {
        let hello = hello(&self.record, Role::Resolve, 0);
        let mut control = greet(self.connector, hello, self.patience)?;
        control.send(&Message::Ask)?;
        match control.await_message(prompt(self.patience, self.cancel))? {
            Message::Status(TargetStatus::Prepared) if self.machine.is_none() && self.record.postcopy => {
                // The pages that it lacks died with the process that had them: it must not run.
                control.send(&Message::Abort("the source has died, and pages with it".into()))?;
                match control.await_promptly()? {
                    Message::Status(status) => Ok((control, status)),
                    other => bail!("the target answered with a {} message", other.name()),
                }
            }
            Message::Status(status) => Ok((control, status)),
            Message::Running => Ok((control, TargetStatus::Running)),
            Message::Refused(reason) => bail!("the target refuses to answer: {reason}"),
            other => {
                bail!("the target answered the question who runs the machine with a {} message", other.name())
            }
        }
    }

    fn end(&mut self) {
        if let Some(machine) = self.machine {
            machine.end();
        }
        if let Some(control) = &mut self.control {
            // Without it the target keeps its answer ready, which costs nothing.
            let _ = control.send(&Message::Gone);
        }
    }
}

/// Why pages could not be sent after the machine ran on the target.
enum Interrupted {
    /// The connection was lost, and may come back.
    Lost(anyhow::Error),
    /// The target was looked for long enough.
    ForGood(anyhow::Error),
}

/// Ends the wait for an answer that takes the target no work: after the time of patience, or soon if a person asks for that.
fn prompt(patience: Duration, cancel: &CancelToken) -> impl FnMut() -> Result<()> {
    let begun = Instant::now();
    move || {
        ensure!(
            begun.elapsed() < patience,
            "the target is there, but has not answered for {} s",
            patience.as_secs_f32()
        );
        let asked_to_stop = cancel.is_cancelled() && begun.elapsed() >= CANCEL_GRACE;
        ensure!(!asked_to_stop, "waiting for the target's answer was cancelled");
        Ok(())
    }
}

/// The first message of a connection of an attempt.
pub(super) fn hello(record: &SourceRecord, role: Role, index: u32) -> Hello {
    Hello {
        protocol_min: PROTOCOL_MIN,
        protocol_max: PROTOCOL_MAX,
        role,
        index,
        migration: record.migration,
        secret: record.secret.clone(),
        given_up: record.given_up.clone(),
    }
}

/// A connection on which the target has said welcome.
pub(super) fn greet(connector: &Connector, hello: Hello, patience: Duration) -> Result<Connection> {
    let mut connection = Connection::new(connector.connect()?, patience);
    connection.send(&Message::Hello(hello))?;
    match connection.await_promptly()? {
        Message::Welcome(version) if (PROTOCOL_MIN..=PROTOCOL_MAX).contains(&version) => Ok(connection),
        Message::Welcome(version) => bail!(
            "the target wants to speak version {version} of the protocol, this program speaks {PROTOCOL_MIN} to {PROTOCOL_MAX}"
        ),
        Message::Refused(reason) => bail!("the target at {} refuses: {reason}", connector.address()),
        other => bail!("the target greets with a {} message", other.name()),
    }
}
