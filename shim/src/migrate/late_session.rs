//! The target's part of an attempt after its machine began to run without all of its pages.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::connection::Connection;
use super::door::Door;
use super::postcopy::{FaultReport, FaultThread, Late};
use super::receivers::{Event, Receivers, Sink};
use super::record::Pages;
use super::session::{Armed, Session, listen, unexpected};
use super::target::TargetEvent;
use super::transport::TICK;
use super::wire::{Message, Role, TargetStatus};
use crate::pages::PageSet;

/// What brings pages that are missing.
pub(super) struct LateParts {
    pub late: Arc<Late>,
    sink: Arc<Sink>,
    /// `None`: the source was lost.
    open: Option<(Receivers, FaultThread)>,
}

impl Session<'_> {
    /// The source says which pages are missing: from here on who touches one waits for it.
    pub(super) fn arm(
        &mut self,
        missing: &PageSet,
        sink: &Arc<Sink>,
        faults: Option<Connection>,
    ) -> Result<Armed> {
        let faults = faults.context("the source has no connection for pages that are waited for")?;
        let ram = self.machine.as_ref().context("the machine is not there")?.ram().clone();
        let late = Arc::new(Late::new(&ram, missing)?);
        sink.become_late(late.clone())?;
        let thread = FaultThread::start(&late, faults, self.options.patience)?;
        self.control()?.send(&Message::Armed)?;
        Ok((late, thread))
    }

    /// Keeps what brings missing pages.
    pub(super) fn keep_late(
        &mut self,
        late: Arc<Late>,
        sink: Arc<Sink>,
        receivers: Receivers,
        faults: FaultThread,
    ) {
        self.late = Some(LateParts { late, sink, open: Some((receivers, faults)) });
    }

    /// The machine runs: gets the rest of its pages, however often the source is lost meanwhile. Waits for it without end, as the
    /// processors do that need a page.
    pub(super) fn finish_late(&mut self, door: &mut Door) -> Result<Option<FaultReport>> {
        let Some(mut parts) = self.late.take() else { return Ok(None) };
        while !parts.late.is_complete() {
            if let Err(error) = self.await_pages(&mut parts, door) {
                parts.open = None;
                self.control = None;
                let reason = format!("{error:#}");
                tracing::warn!(
                    "the machine runs here, but pages that it still needs cannot be had: {reason}"
                );
                (self.events)(&TargetEvent::Waiting { reason });
                self.await_source(&mut parts, door)?;
            }
        }
        // Threads first: none may be putting pages there.
        parts.open = None;
        let report = parts.late.finish()?;
        if let Some(control) = &mut self.control {
            // If it does not get there, the source asks.
            let _ = control.send(&Message::Complete);
        }
        (self.events)(&TargetEvent::PagesComplete { report: report.clone() });
        if let Err(error) = self.with_machine(|machine| machine.start_devices()) {
            tracing::error!("the machine runs here, but not all of its devices: {error:#}");
        }
        // After the devices, which the guest waits for. It matters only to who asks when this process is dead.
        if let Err(error) = self.write(TargetStatus::Running, Pages::Complete) {
            tracing::warn!("it could not be written down that all pages are here: {error:#}");
        }
        Ok(Some(report))
    }

    /// Waits until all pages are there, or something is lost.
    fn await_pages(&mut self, parts: &mut LateParts, door: &mut Door) -> Result<()> {
        while !parts.late.is_complete() {
            let (receivers, faults) = parts.open.as_ref().context("there is no connection for pages")?;
            match receivers.wait(TICK) {
                Ok(Some(Event::Failed(error))) if !parts.late.is_complete() => return Err(error),
                Ok(_) => {}
                Err(error) => {
                    ensure!(parts.late.is_complete(), error);
                }
            }
            ensure!(
                parts.late.is_complete() || !faults.is_over(),
                "the connection for waited-for pages was lost"
            );
            match listen(self.control()?, Duration::ZERO)? {
                None => {}
                Some(other) => return Err(unexpected(&other)),
            }
            if let Some(guest) = door.wait(Duration::ZERO)? {
                if guest.hello.role == Role::Resolve && self.is_mine(&guest.hello) {
                    door.hold(guest);
                    bail!("the source lost its connection and comes with another");
                }
                guest.refuse("a machine is running here already");
            }
        }
        Ok(())
    }

    /// Waits for the source to come back, and takes its new connections.
    fn await_source(&mut self, parts: &mut LateParts, door: &mut Door) -> Result<()> {
        loop {
            let Some(mut guest) = door.wait(TICK)? else { continue };
            if guest.hello.role != Role::Resolve || !self.is_mine(&guest.hello) {
                guest.refuse("a machine is running here already");
                continue;
            }
            if guest.welcome().is_err() {
                continue;
            }
            self.control = Some(guest.connection);
            match self.take_up_again(parts, door) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    self.control = None;
                    tracing::warn!("the source came back, but was lost again: {error:#}");
                }
            }
        }
    }

    fn take_up_again(&mut self, parts: &mut LateParts, door: &mut Door) -> Result<()> {
        match self.control()?.await_promptly()? {
            Message::Ask => {}
            other => return Err(unexpected(&other)),
        }
        self.control()?.send(&Message::Status(TargetStatus::Running))?;
        self.control()?.send(&Message::StillMissing(parts.late.missing()))?;
        let (connections, faults) = self.page_connections(door)?;
        let receivers = Receivers::start(connections, &parts.sink)?;
        let faults = faults.context("the source has no connection for pages that are waited for")?;
        parts.open = Some((receivers, FaultThread::start(&parts.late, faults, self.options.patience)?));
        Ok(())
    }
}
