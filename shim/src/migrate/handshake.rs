//! Who runs the machine: two state machines, one on each side. Pure: each state says what is to be done next, and is told
//! what came of it. Drivers do it in [`super::source`] and [`super::target`].
//!
//! ```text
//! source: Sending ─prepared─► Releasing ─► RecordingHandover ─► Committing ─► AwaitingRunning ─running─► RecordingGone ─► Ending ─► Gone
//!            │ failed             │ failed       │ failed            ▲ prepared    │ lost   │ refused
//!            ▼                    ▼              ▼                   └── Asking ◄──┘        ▼
//!         Resuming ◄────────── Reclaiming ◄── RecordingHere ◄──refused, discarded──┴────────┘
//!            ▼                                                  no answer: Unresolved
//!          Here
//!
//! target: Receiving ─complete─► RecordingPrepared ─► Prepared ─commit─► Taking ─► RecordingRunning ─► Resuming ─► Running
//!            │ lost, abort                              │ abort            │ failed    │ failed        │ failed
//!            └───────────► RecordingDiscarded ◄─────────┘                  └───────► Returning ◄───────┘
//!                               ▼                                                       ▼
//!                           Discarded                                   RecordingRefused ─► Refused
//! ```
//!
//! The rules behind it:
//! * the target runs the machine only after a commit, and says `running` durably before it does;
//! * the source sends a commit only after it has said `handed-over` durably, and runs the machine again only after the target
//!   said that it never will (or a person said so, who knows that the target is dead), which it notes durably first;
//! * a target whose process died has lost the memory that it had: whatever was not `running` by then never runs.

use super::wire::TargetStatus;

/// Where the source stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceState {
    /// Memory and state are on their way; the machine runs here or is paused for a moment.
    Sending,
    /// The target is prepared: the storage is to be given away.
    Releasing,
    /// `handed-over` is to be written.
    RecordingHandover,
    /// The commit is to be sent.
    Committing,
    /// The commit was sent.
    AwaitingRunning,
    /// The connection was lost since: the target is to be asked.
    Asking,
    /// Nobody knows who runs the machine, or it cannot be brought back here: it stays paused. Where it goes on if told to.
    Unresolved(Pending),
    /// The target will not run the machine; `here` is to be written.
    RecordingHere,
    /// The storage is to be taken back.
    Reclaiming,
    /// The machine is to go on here.
    Resuming,
    /// The machine runs here. The end.
    Here,
    /// The target runs the machine; `gone` is to be written.
    RecordingGone,
    /// The machine is to be ended here.
    Ending,
    /// The machine is gone. The end.
    Gone,
}

/// What an unresolved source was about to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pending {
    /// Ask the target.
    Ask,
    /// Write `here`.
    RecordHere,
    /// Take the storage back.
    Reclaim,
    /// Go on.
    Resume,
}

/// What happened on the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceInput {
    /// What the state says is done.
    Done,
    /// It could not be done. For [`SourceState::Asking`]: not in as many attempts as are made.
    Failed,
    /// The target has everything.
    Prepared,
    /// The target answered.
    Status(TargetStatus),
    /// The connection is lost.
    Lost,
    /// A person asks to try again.
    Retry,
    /// A person says that the target is certainly dead, and the machine is to go on here.
    ForceHere,
}

impl SourceState {
    /// The state after something happened. What makes no sense in a state changes nothing.
    pub fn after(self, input: SourceInput) -> Self {
        use SourceInput as I;
        match (self, input) {
            (Self::Sending, I::Prepared) => Self::Releasing,
            // No commit was sent: nobody else can run the machine.
            (Self::Sending, I::Failed | I::Lost | I::Status(_)) => Self::Resuming,
            (Self::Releasing, I::Done) => Self::RecordingHandover,
            (Self::Releasing, I::Failed) => Self::Reclaiming,
            (Self::RecordingHandover, I::Done) => Self::Committing,
            // It may have been written all the same: that has to be undone before the machine goes on.
            (Self::RecordingHandover, I::Failed) => Self::RecordingHere,
            (Self::Committing, I::Done) => Self::AwaitingRunning,
            (Self::Committing | Self::AwaitingRunning, I::Failed | I::Lost) => Self::Asking,
            (Self::AwaitingRunning | Self::Asking, I::Status(status)) => match status {
                TargetStatus::Prepared => Self::Committing,
                TargetStatus::Running => Self::RecordingGone,
                TargetStatus::Refused | TargetStatus::Discarded => Self::RecordingHere,
            },
            (Self::Asking, I::Failed) => Self::Unresolved(Pending::Ask),
            (Self::Unresolved(Pending::Ask), I::Retry) => Self::Asking,
            (Self::Unresolved(Pending::Ask), I::ForceHere) => Self::RecordingHere,
            (Self::Unresolved(Pending::RecordHere), I::Retry | I::ForceHere) => Self::RecordingHere,
            (Self::Unresolved(Pending::Reclaim), I::Retry | I::ForceHere) => Self::Reclaiming,
            (Self::Unresolved(Pending::Resume), I::Retry | I::ForceHere) => Self::Resuming,
            (Self::RecordingHere, I::Done) => Self::Reclaiming,
            (Self::RecordingHere, I::Failed) => Self::Unresolved(Pending::RecordHere),
            (Self::Reclaiming, I::Done) => Self::Resuming,
            (Self::Reclaiming, I::Failed) => Self::Unresolved(Pending::Reclaim),
            (Self::Resuming, I::Done) => Self::Here,
            (Self::Resuming, I::Failed) => Self::Unresolved(Pending::Resume),
            // The target runs it, whether or not that can be written down here.
            (Self::RecordingGone, I::Done | I::Failed) => Self::Ending,
            (Self::Ending, I::Done | I::Failed) => Self::Gone,
            (state, _) => state,
        }
    }

    /// Whether nothing is left to do without a person.
    pub fn is_settled(self) -> bool {
        matches!(self, Self::Here | Self::Gone | Self::Unresolved(_))
    }

    /// Whether the attempt may still be cancelled.
    pub fn may_cancel(self) -> bool {
        self == Self::Sending
    }
}

/// Where the target stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TargetState {
    /// Memory and state arrive.
    Receiving,
    /// Everything is there; `prepared` is to be written.
    RecordingPrepared,
    /// Waits for the commit, for as long as the process lives.
    Prepared,
    /// The storage is to be taken over.
    Taking,
    /// `running` is to be written.
    RecordingRunning,
    /// The machine is to run.
    Resuming,
    /// It runs. The end.
    Running,
    /// The storage is to be given back.
    Returning,
    /// `refused` is to be written.
    RecordingRefused,
    /// It never runs here. The end.
    Refused,
    /// `discarded` is to be written.
    RecordingDiscarded,
    /// It never runs here. The end.
    Discarded,
}

/// What happened on the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TargetInput {
    /// What the state says is done.
    Done,
    /// It could not be done.
    Failed,
    /// Memory and state are all there.
    Complete,
    /// The source gave the machine away.
    Commit,
    /// The source asks, on a new connection.
    Ask,
    /// The source, or a person, says that the machine is not to run here.
    Abort,
    /// The connection is lost.
    Lost,
}

impl TargetState {
    /// The state after something happened. What makes no sense in a state changes nothing.
    pub fn after(self, input: TargetInput) -> Self {
        use TargetInput as I;
        match (self, input) {
            (Self::Receiving, I::Complete) => Self::RecordingPrepared,
            (Self::Receiving, I::Failed | I::Lost | I::Abort | I::Ask) => Self::RecordingDiscarded,
            (Self::RecordingPrepared, I::Done) => Self::Prepared,
            (Self::RecordingPrepared, I::Failed) => Self::RecordingDiscarded,
            (Self::Prepared, I::Commit) => Self::Taking,
            (Self::Prepared, I::Abort) => Self::RecordingDiscarded,
            (Self::Taking, I::Done) => Self::RecordingRunning,
            (Self::RecordingRunning, I::Done) => Self::Resuming,
            (Self::Resuming, I::Done) => Self::Running,
            (Self::Taking | Self::RecordingRunning | Self::Resuming, I::Failed) => Self::Returning,
            (Self::Returning, I::Done | I::Failed) => Self::RecordingRefused,
            // Not being able to write it changes nothing: this process does not run the machine, and a later one cannot. But the
            // disk may say `running` then, so that this process tells what it knows, until it can be written.
            (Self::RecordingRefused, I::Done | I::Failed) => Self::Refused,
            (Self::RecordingDiscarded, I::Done | I::Failed) => Self::Discarded,
            (state, _) => state,
        }
    }

    /// What the source is told when this state is reached, or when it asks in it. `None`: the answer waits until something is
    /// done.
    pub fn status(self) -> Option<TargetStatus> {
        match self {
            Self::Prepared => Some(TargetStatus::Prepared),
            Self::Running => Some(TargetStatus::Running),
            Self::Refused => Some(TargetStatus::Refused),
            Self::Discarded => Some(TargetStatus::Discarded),
            _ => None,
        }
    }

    /// Whether the machine runs here or never will.
    pub fn is_settled(self) -> bool {
        matches!(self, Self::Running | Self::Refused | Self::Discarded)
    }
}

#[cfg(test)]
#[path = "handshake_simulation.rs"]
mod simulation;
