//! One thing at a time is done with a machine: two that overlap could make it run twice, or not at all.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::{Control, Migration, locked, refusal};
use crate::vm::machine::Machine;

/// How long it is waited for what is left to do when a machine has come.
const ARRIVAL: Duration = Duration::from_millis(500);

/// What excludes everything else that changes where a machine is, or whether it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Activity {
    /// It has come here; what is left of that comes to its end.
    Arriving,
    /// It is being sent.
    Sending,
    /// It is being saved to a file.
    Saving,
    /// It is being found out where it is.
    Resolving,
    /// It is being paused, resumed or stopped.
    Switching,
}

impl Activity {
    /// What a person is told who has to wait.
    fn says(self) -> &'static str {
        match self {
            Self::Arriving => "the machine has not come here entirely: wait until its last pages are here",
            Self::Sending => "the machine is being sent: wait, or cancel that first",
            Self::Saving => "the machine is being saved to a file: wait until that is done",
            Self::Resolving => "it is being found out where the machine is: wait, or cancel that first",
            Self::Switching => "the machine is being paused, resumed or stopped: try again",
        }
    }
}

/// The right to be the only one that does something with the machine; over when dropped.
pub(super) struct Claim {
    control: Option<Arc<Control>>,
}

impl Claim {
    /// Gives the right back together with saying what came of it: who is told that may do the next thing at once.
    pub fn end(mut self, migration: &mut Migration) {
        migration.activity = None;
        if let Some(control) = self.control.take() {
            control.idle.notify_all();
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(control) = self.control.take() {
            locked(&control.migration).activity = None;
            control.idle.notify_all();
        }
    }
}

impl Control {
    /// The machine, and the right to be the only one that does something with it.
    pub(super) fn claim(self: &Arc<Self>, activity: Activity) -> Result<(Arc<Machine>, Claim)> {
        let machine = self.machine()?;
        let until = Instant::now() + ARRIVAL;
        let mut migration = locked(&self.migration);
        // What is left when a machine has come is over at once, but for missing pages.
        while migration.activity == Some(Activity::Arriving) && Instant::now() < until {
            let wait = until.saturating_duration_since(Instant::now());
            let waited = self.idle.wait_timeout(migration, wait);
            migration = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        if let Some(other) = migration.activity {
            return Err(refusal("busy", other.says()));
        }
        let unresolved = migration.info.state == "unresolved";
        if unresolved != (activity == Activity::Resolving) {
            let message = if unresolved {
                "nobody knows whether the machine runs where it was sent: see `kvm-shim resolve --help`"
            } else {
                "there is no migration to resolve"
            };
            return Err(refusal(if unresolved { "busy" } else { "state" }, message));
        }
        let life = machine.life();
        if life.is_over() {
            let message =
                format!("the machine {} is not here any more: it is {}", machine.name(), life.name());
            return Err(refusal("state", message));
        }
        migration.activity = Some(activity);
        drop(migration);
        Ok((machine, Claim { control: Some(self.clone()) }))
    }
}
