//! The target's part of one attempt.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::connection::Connection;
use super::door::{Door, Guest};
use super::handshake::{TargetInput, TargetState};
use super::late_session::LateParts;
use super::postcopy::{FaultThread, Late};
use super::receivers::{Event, Receivers, Sink};
use super::record::{Pages, RECORD_VERSION, Records, TargetRecord};
use super::senders::CONNECTIONS_MAX;
use super::target::{ReceiveOptions, Received, TargetEvent, TargetObserver};
use super::transport::{CONNECT_TIMEOUT, TICK};
use super::userfault::Userfault;
use super::wire::{Hello, Message, Plan, Role, RoundEnd, TargetStatus};
use crate::machine::{Finding, MachineState, TargetHost, TargetMachine};

/// How an attempt ended.
pub(super) enum Ended {
    /// The machine runs here. With the connection to the source, if there is one.
    Running(Box<Received>, Option<Connection>),
    /// It does not.
    Not {
        /// Why.
        reason: anyhow::Error,
        /// That it never will could not be written down: the disk may say that it runs.
        unwritten: Option<TargetRecord>,
    },
}

/// A memory with missing pages, and who asks for them.
pub(super) type Armed = (Arc<Late>, FaultThread);

/// One attempt.
pub(super) struct Session<'a> {
    hello: Hello,
    pub(super) control: Option<Connection>,
    host: &'a dyn TargetHost,
    pub(super) options: &'a ReceiveOptions,
    records: &'a Records,
    pub(super) events: TargetObserver<'a>,
    plan: Option<Plan>,
    pub(super) machine: Option<Box<dyn TargetMachine>>,
    /// What brings the pages that the machine is to run without.
    pub(super) late: Option<LateParts>,
    handover: Vec<u8>,
    /// Why the machine does not run here.
    reason: Option<anyhow::Error>,
    /// A refusal that could not be written down.
    unwritten: Option<TargetRecord>,
    /// The storage was taken, so it may have to be given back.
    taken: bool,
}

impl<'a> Session<'a> {
    /// Begins with whoever wants to send a machine.
    pub fn begin(
        guest: Guest,
        host: &'a dyn TargetHost,
        options: &'a ReceiveOptions,
        records: &'a Records,
        events: TargetObserver<'a>,
    ) -> Self {
        Self {
            hello: guest.hello,
            control: Some(guest.connection),
            host,
            options,
            records,
            events,
            plan: None,
            machine: None,
            late: None,
            handover: Vec::new(),
            reason: None,
            unwritten: None,
            taken: false,
        }
    }

    /// Goes on until the machine runs here or never will.
    pub fn run(mut self, door: &mut Door) -> Ended {
        let mut state = match self.receive(door) {
            Ok(()) => TargetState::Receiving.after(TargetInput::Complete),
            Err(error) => {
                self.reason = Some(error);
                // Nothing was written down yet, and what this process does not finish nobody runs.
                self.drop_machine();
                self.refuse();
                TargetState::Discarded
            }
        };
        while !state.is_settled() {
            let input = self.act(state, door).unwrap_or_else(|error| {
                self.reason.get_or_insert(error);
                TargetInput::Failed
            });
            state = state.after(input);
            if let Some(status) = state.status() {
                self.say(status);
            }
        }
        self.end(state, door)
    }

    fn end(mut self, state: TargetState, door: &mut Door) -> Ended {
        let mut postcopy = None;
        if state == TargetState::Running {
            self.announce();
            match self.finish_late(door) {
                Ok(report) => postcopy = report,
                Err(error) => {
                    let reason = error.context("the machine ran here, and is lost");
                    return Ended::Not { reason, unwritten: None };
                }
            }
        }
        let (machine, plan) = (self.machine.take(), self.plan.take());
        match (state, machine, plan) {
            (TargetState::Running, Some(machine), Some(plan)) => {
                let migration = self.hello.migration;
                let received = Received { machine, description: plan.machine, migration, postcopy };
                Ended::Running(Box::new(received), self.control)
            }
            _ => {
                let reason = self.reason.take().unwrap_or_else(|| anyhow::anyhow!("the source gave up"));
                Ended::Not { reason, unwritten: self.unwritten.take() }
            }
        }
    }

    fn announce(&mut self) {
        if let Err(error) = self.with_machine(|machine| machine.announce()) {
            tracing::warn!("the network was not told where the machine is now: {error:#}");
        }
        (self.events)(&TargetEvent::Announced);
    }

    /// Tells the source why it is over, in a way that gets there.
    fn refuse(&mut self) {
        let Some(control) = self.control.take() else { return };
        let reason = self.reason.as_ref().map_or_else(String::new, |error| format!("{error:#}"));
        control.part(&Message::Refused(reason));
    }

    fn say(&mut self, status: TargetStatus) {
        let message = match status {
            TargetStatus::Prepared => {
                (self.events)(&TargetEvent::Prepared);
                Message::Prepared
            }
            TargetStatus::Running => {
                (self.events)(&TargetEvent::Running);
                Message::Running
            }
            TargetStatus::Refused => return self.refuse(),
            TargetStatus::Discarded => Message::Status(status),
        };
        if let Some(control) = &mut self.control
            && let Err(error) = control.send(&message)
        {
            self.lose(&error);
        }
    }

    fn lose(&mut self, error: &anyhow::Error) {
        self.control = None;
        tracing::warn!("the source was lost: {error:#}");
    }

    fn act(&mut self, state: TargetState, door: &mut Door) -> Result<TargetInput> {
        match state {
            TargetState::RecordingPrepared => {
                // What was said of an earlier machine does not hold for this one.
                self.options.discard.take();
                self.write(TargetStatus::Prepared, Pages::All)?;
            }
            TargetState::Prepared => return self.await_commit(door),
            TargetState::Taking => self.take_storage()?,
            TargetState::RecordingRunning => {
                let pages = if self.late.is_some() { Pages::Missing } else { Pages::All };
                self.write(TargetStatus::Running, pages)?;
            }
            TargetState::Resuming => self.resume()?,
            TargetState::Returning => self.return_storage()?,
            TargetState::RecordingRefused => {
                let written = self.write(TargetStatus::Refused, Pages::All);
                self.unwritten = written.is_err().then(|| self.record(TargetStatus::Refused, Pages::All));
                written?;
            }
            TargetState::RecordingDiscarded => {
                self.drop_machine();
                self.write(TargetStatus::Discarded, Pages::All)?;
            }
            TargetState::Receiving | TargetState::Running | TargetState::Refused | TargetState::Discarded => {
                bail!("nothing is to be done in the state {state:?}")
            }
        }
        Ok(TargetInput::Done)
    }

    pub(super) fn write(&self, status: TargetStatus, pages: Pages) -> Result<()> {
        self.records.write_target(&self.record(status, pages))
    }

    fn record(&self, status: TargetStatus, pages: Pages) -> TargetRecord {
        TargetRecord {
            version: RECORD_VERSION,
            machine: self.plan.as_ref().map(|plan| plan.machine.name.clone()),
            migration: self.hello.migration,
            status,
            pages,
            settled: false,
        }
    }

    /// Something on the machine, while the source is told that this side is there.
    pub(super) fn with_machine<T: Send>(
        &mut self,
        work: impl FnOnce(&mut dyn TargetMachine) -> Result<T> + Send,
    ) -> Result<T> {
        let machine = self.machine.as_deref_mut().context("the machine is not there")?;
        let Some(control) = &mut self.control else { return work(machine) };
        let (result, beaten) = control.while_beating(move || work(machine));
        if let Err(error) = beaten {
            self.lose(&error);
        }
        result
    }

    /// Ends the machine here. Nobody is left waiting for a page: that would keep it from ending.
    fn drop_machine(&mut self) {
        self.late = None;
        self.machine = None;
    }

    fn take_storage(&mut self) -> Result<()> {
        if let Some(parts) = &self.late {
            parts.late.commit()?;
        }
        // Also if it fails: it may have been taken in part.
        self.taken = true;
        let handover = std::mem::take(&mut self.handover);
        self.with_machine(move |machine| machine.take_storage(&handover)).context("take the storage over")
    }

    fn resume(&mut self) -> Result<()> {
        self.with_machine(|machine| machine.resume()).context("let the machine run here")?;
        if self.late.is_some() {
            return Ok(());
        }
        // From here on it runs: what fails now is the machine's trouble, not the migration's.
        if let Err(error) = self.with_machine(|machine| machine.start_devices()) {
            tracing::error!("the machine runs here, but not all of its devices: {error:#}");
        }
        Ok(())
    }

    fn return_storage(&mut self) -> Result<()> {
        let returned =
            if self.taken { self.with_machine(|machine| machine.return_storage()) } else { Ok(()) };
        // The source is told only when nothing here can touch the storage any more.
        self.drop_machine();
        returned.context("give the storage back")
    }

    /// Waits for the word of the source, for as long as this process lives.
    fn await_commit(&mut self, door: &mut Door) -> Result<TargetInput> {
        if self.control.is_none() {
            self.wait_again("it was not there any more when everything had come");
        }
        loop {
            if self.options.discard.take() {
                self.reason = Some(anyhow::anyhow!("the prepared machine was given up here, as asked"));
                return Ok(TargetInput::Abort);
            }
            if let Some(control) = &mut self.control {
                match listen(control, TICK) {
                    Ok(Some(Message::Commit(handover))) => {
                        self.handover = handover;
                        return Ok(TargetInput::Commit);
                    }
                    Ok(Some(Message::Abort(reason))) => {
                        self.reason = Some(anyhow::anyhow!("the source gave up: {reason}"));
                        return Ok(TargetInput::Abort);
                    }
                    Ok(Some(Message::Ask)) => {
                        // If it does not get there, that shows at the next turn.
                        let _ = control.send(&Message::Status(TargetStatus::Prepared));
                    }
                    Ok(Some(other)) => self.wait_again(&format!("it sent a {} message", other.name())),
                    Ok(None) => {}
                    Err(error) => self.wait_again(&format!("{error:#}")),
                }
            }
            let wait = if self.control.is_some() { Duration::ZERO } else { TICK };
            if let Some(guest) = door.wait(wait)?
                && let Some(input) = self.visit_prepared(guest, door)
            {
                return Ok(input);
            }
        }
    }

    fn wait_again(&mut self, reason: &str) {
        self.control = None;
        (self.events)(&TargetEvent::Waiting { reason: reason.into() });
    }

    fn visit_prepared(&mut self, mut guest: Guest, door: &mut Door) -> Option<TargetInput> {
        if guest.hello.role == Role::Resolve && self.is_mine(&guest.hello) {
            self.control = guest.welcome().is_ok().then_some(guest.connection);
            return None;
        }
        if self.is_given_up(&guest.hello) {
            // The source has gone on with the machine, and tries anew.
            self.reason = Some(anyhow::anyhow!("the source gave this attempt up and begins another"));
            self.control = None;
            door.hold(guest);
            return Some(TargetInput::Abort);
        }
        let machine = self.plan.as_ref().map_or("", |plan| plan.machine.name.as_str());
        guest.refuse(&format!(
            "this target holds {machine}, of which it waits to hear whether to run it (migration {}): let it run there or discard it there if its source is dead, see `kvm-shim resolve --help`",
            self.hello.migration
        ));
        None
    }

    pub(super) fn is_mine(&self, hello: &Hello) -> bool {
        let (a, b) = (hello.secret.as_bytes(), self.hello.secret.as_bytes());
        // In a time that says nothing about where they differ.
        let same = a.len() == b.len() && a.iter().zip(b).fold(0, |any, (a, b)| any | (a ^ b)) == 0;
        hello.migration == self.hello.migration && same
    }

    /// Whether this is the source of this attempt, which begins another.
    fn is_given_up(&self, hello: &Hello) -> bool {
        hello.role == Role::Control && hello.given_up.contains(&self.hello.migration)
    }

    /// Takes everything that the source sends. Nothing of it runs.
    fn receive(&mut self, door: &mut Door) -> Result<()> {
        let known = self.records.target(self.hello.migration)?;
        ensure!(
            known.is_none(),
            "the migration {} was here before: each attempt has its own name",
            self.hello.migration
        );
        let version = self.hello.protocol_max.min(super::wire::PROTOCOL_MAX);
        self.control()?.send(&Message::Welcome(version))?;
        self.make()?;
        let (connections, faults) = self.page_connections(door)?;
        let ram = self.machine.as_ref().context("the machine is not there")?.ram().clone();
        let sink = Sink::new(ram);
        let receivers = Receivers::start(connections, &sink)?;
        let (state, late) = self.rounds(door, &receivers, &sink, faults)?;
        if let Some((late, faults)) = late {
            self.keep_late(late, sink, receivers, faults);
        }
        self.with_machine(move |machine| machine.restore(&MachineState(state)))
            .context("take over the state of processors and devices")
    }

    pub(super) fn control(&mut self) -> Result<&mut Connection> {
        self.control.as_mut().context("the source was lost")
    }

    fn make(&mut self) -> Result<()> {
        let plan = match self.control()?.await_promptly()? {
            Message::Plan(plan) => *plan,
            other => return Err(unexpected(&other)),
        };
        ensure!(
            (1..=CONNECTIONS_MAX).contains(&plan.connections),
            "the source wants {} connections, 1 to {CONNECTIONS_MAX} are possible",
            plan.connections
        );
        let (description, postcopy) = (plan.machine.clone(), plan.postcopy);
        self.plan = Some(plan);
        let mut report = self.host.check(&description);
        if postcopy {
            report.findings.extend(no_postcopy(description.huge_pages));
        }
        self.control()?.send(&Message::Compatibility(report.clone()))?;
        let (machine, compatible) = (description.name.clone(), report.is_compatible());
        (self.events)(&TargetEvent::Checked { machine: machine.clone(), report });
        ensure!(compatible, "this host cannot run {machine}");
        let host = self.host;
        let (made, beaten) = self.control()?.while_beating(|| host.create(&description));
        let made = made.with_context(|| format!("make {machine}"))?;
        ensure!(
            made.ram().bytes() == description.memory_bytes,
            "{machine} was made with {} bytes of memory instead of {}",
            made.ram().bytes(),
            description.memory_bytes
        );
        self.machine = Some(made);
        beaten?;
        self.control()?.send(&Message::Created)?;
        (self.events)(&TargetEvent::Created { machine, migration: self.hello.migration });
        Ok(())
    }

    /// Waits for the connections that pages are going to come over.
    pub(super) fn page_connections(
        &mut self,
        door: &mut Door,
    ) -> Result<(Vec<Connection>, Option<Connection>)> {
        let (count, postcopy) =
            self.plan.as_ref().map_or((1, false), |plan| (plan.connections, plan.postcopy));
        let (mut found, mut faults) = (BTreeMap::new(), None);
        let until = Instant::now() + CONNECT_TIMEOUT * (count + 1);
        while found.len() < count as usize || (postcopy && faults.is_none()) {
            ensure!(
                Instant::now() < until,
                "only {} of the source's {count} connections for pages came",
                found.len()
            );
            let Some(mut guest) = door.wait(TICK)? else {
                // Nothing belongs here but a word that it is over.
                self.listen(Duration::ZERO)?.map_or(Ok(()), |message| Err(unexpected(&message)))?;
                continue;
            };
            let (role, index) = (guest.hello.role, guest.hello.index);
            let fits = match role {
                Role::Pages => index < count && !found.contains_key(&index),
                Role::Faults => postcopy && faults.is_none(),
                _ => false,
            };
            if !fits || !self.is_mine(&guest.hello) {
                self.visit_receiving(guest, door)?;
                continue;
            }
            guest.welcome()?;
            if role == Role::Pages {
                found.insert(index, guest.connection);
            } else {
                faults = Some(guest.connection);
            }
        }
        Ok((found.into_values().collect(), faults))
    }

    /// What the source says within `wait`, as long as it lives.
    fn listen(&mut self, wait: Duration) -> Result<Option<Message>> {
        listen(self.control()?, wait)
    }

    /// Somebody comes while a machine is received.
    fn visit_receiving(&self, guest: Guest, door: &mut Door) -> Result<()> {
        let asks = guest.hello.role == Role::Resolve && self.is_mine(&guest.hello);
        if asks || self.is_given_up(&guest.hello) {
            // It would not come if its old connection were alive. It is served when this attempt is over.
            door.hold(guest);
            bail!("the source lost its connection and comes with another");
        }
        guest.refuse("another migration to this target is under way: wait for its end");
        Ok(())
    }

    /// The rounds of pages, up to the state of processors and devices.
    fn rounds(
        &mut self,
        door: &mut Door,
        receivers: &Receivers,
        sink: &Arc<Sink>,
        mut faults: Option<Connection>,
    ) -> Result<(Vec<u8>, Option<Armed>)> {
        let (mut next, mut late) = (0, None);
        loop {
            // A guest first: a source that asks anew has lost the connection that is listened to here.
            if let Some(guest) = door.wait(Duration::ZERO)? {
                self.visit_receiving(guest, door)?;
            }
            match self.listen(TICK)? {
                None => {}
                Some(Message::RoundBegin(round)) if round == next && late.is_none() => {
                    let end = self.round(round, door, receivers)?;
                    self.control()?.send(&Message::RoundReceived(end))?;
                    (self.events)(&TargetEvent::RoundReceived { round, pages: receivers.pages() });
                    next += 1;
                }
                Some(Message::Paused) => (self.events)(&TargetEvent::SourcePaused),
                Some(Message::Missing(missing)) if next > 0 && late.is_none() => {
                    late = Some(self.arm(&missing, sink, faults.take())?);
                }
                Some(Message::State(state)) if next > 0 => return Ok((state, late)),
                Some(other) => return Err(unexpected(&other)),
            }
        }
    }

    /// One round: until all connections have come to its end.
    fn round(&mut self, round: u32, door: &mut Door, receivers: &Receivers) -> Result<RoundEnd> {
        let connections = self.plan.as_ref().map_or(1, |plan| plan.connections);
        let mut sum = RoundEnd { round, batches: 0, pages: 0 };
        let mut ended = 0;
        while ended < connections {
            match receivers.wait(TICK)? {
                Some(Event::RoundEnded(end)) if end.round == round => {
                    sum.batches += end.batches;
                    sum.pages += end.pages;
                    ended += 1;
                }
                Some(Event::RoundEnded(end)) => bail!("round {} ended within round {round}", end.round),
                Some(Event::Failed(error)) => return Err(error.context("a connection for pages failed")),
                None => {
                    self.listen(Duration::ZERO)?.map_or(Ok(()), |message| Err(unexpected(&message)))?;
                    if let Some(guest) = door.wait(Duration::ZERO)? {
                        self.visit_receiving(guest, door)?;
                    }
                }
            }
        }
        Ok(sum)
    }
}

/// What keeps this host from running a machine before all its pages are there.
fn no_postcopy(huge_pages: bool) -> Option<Finding> {
    let (found, message) = match Userfault::new() {
        Err(error) => (
            format!("{error:#}"),
            format!("this host cannot do post-copy: {error:#}; move the machine without it"),
        ),
        Ok(_) if huge_pages => (
            "memory in huge pages".to_owned(),
            "post-copy does not work with huge pages: move the machine without it".to_owned(),
        ),
        Ok(_) => return None,
    };
    Some(Finding { kind: "capability".into(), fatal: true, needed: "userfaultfd".into(), found, message })
}

/// What the peer says within `wait`, as long as it lives.
pub(super) fn listen(control: &mut Connection, wait: Duration) -> Result<Option<Message>> {
    let message = control.receive(wait)?;
    if message.is_none() {
        control.watch()?;
    }
    Ok(message)
}

/// What the source said where it does not belong.
pub(super) fn unexpected(message: &Message) -> anyhow::Error {
    match message {
        Message::Abort(reason) => anyhow::anyhow!("the source gave up: {reason}"),
        other => anyhow::anyhow!("the source sent a {} message where it does not belong", other.name()),
    }
}
