//! Both sides of the handshake in one small world, of which every history is tried: messages lost with their connection,
//! processes killed, steps that fail, records that were or were not written.

use std::collections::{HashSet, VecDeque};

use super::*;

/// What is written on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum SourceDisk {
    Here,
    HandedOver,
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum TargetDisk {
    Nothing,
    Prepared,
    Running,
    Refused,
    Discarded,
}

/// The machine as one side has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Vm {
    /// Lost with its process, or ended.
    None,
    Paused,
    Running,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Wire {
    Everything,
    Commit,
    Ask,
    Abort,
    Prepared,
    Status(TargetStatus),
    Lost,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    /// `None`: the process is dead, until it is started again.
    source: Option<SourceState>,
    target: Option<TargetState>,
    source_disk: SourceDisk,
    target_disk: TargetDisk,
    source_vm: Vm,
    target_vm: Vm,
    /// The source's machine has run since its state was taken: the target's copy is worth nothing.
    copy_is_stale: bool,
    /// The target's machine has run: the source's is worth nothing.
    target_ran: bool,
    /// The target could not write down that it refused, and knows it by heart.
    unwritten: bool,
    connected: bool,
    to_target: VecDeque<Wire>,
    to_source: VecDeque<Wire>,
    cuts: u8,
    source_kills: u8,
    target_kills: u8,
    failures: u8,
}

impl World {
    fn new(cuts: u8, source_kills: u8, target_kills: u8, failures: u8) -> Self {
        Self {
            source: Some(SourceState::Sending),
            target: Some(TargetState::Receiving),
            source_disk: SourceDisk::Here,
            target_disk: TargetDisk::Nothing,
            source_vm: Vm::Paused,
            target_vm: Vm::Paused,
            copy_is_stale: false,
            target_ran: false,
            unwritten: false,
            connected: true,
            to_target: VecDeque::from([Wire::Everything]),
            to_source: VecDeque::new(),
            cuts,
            source_kills,
            target_kills,
            failures,
        }
    }

    fn check(&self) {
        let both = self.source_vm == Vm::Running && self.target_vm == Vm::Running;
        assert!(!both, "both run: {self:?}");
        assert!(!(self.target_vm == Vm::Running && self.copy_is_stale), "an old copy runs: {self:?}");
        assert!(!(self.source_vm == Vm::Running && self.target_ran), "the source runs again: {self:?}");
    }

    /// The connection is gone: what was on its way may still be read by whom it was sent to, in order, then the end.
    fn cut(&mut self) {
        if self.connected {
            self.connected = false;
            self.to_target.push_back(Wire::Lost);
            self.to_source.push_back(Wire::Lost);
        }
    }

    fn say(&mut self, status: Option<TargetStatus>) {
        if let Some(status) = status.filter(|_| self.connected) {
            self.to_source.push_back(match status {
                TargetStatus::Prepared => Wire::Prepared,
                status => Wire::Status(status),
            });
        }
    }

    /// Every world that may come next by the program's own steps.
    fn steps(&self) -> Vec<Self> {
        let mut next = Vec::new();
        self.source_steps(&mut next);
        self.target_steps(&mut next);
        next
    }

    fn source_steps(&self, next: &mut Vec<Self>) {
        let Some(state) = self.source else {
            let mut world = self.clone();
            world.start_source();
            next.push(world);
            return;
        };
        if let Some(message) = self.to_source.front() {
            let mut world = self.clone();
            world.to_source.pop_front();
            let input = match message {
                Wire::Prepared if state == SourceState::Sending => SourceInput::Prepared,
                Wire::Prepared => SourceInput::Status(TargetStatus::Prepared),
                Wire::Status(status) => SourceInput::Status(*status),
                _ => SourceInput::Lost,
            };
            // A loss is noticed by who waits; who is busy notices it later, in what it does next.
            let waits =
                matches!(state, SourceState::Sending | SourceState::AwaitingRunning | SourceState::Asking);
            if waits {
                world.source = Some(state.after(input));
                next.push(world);
            } else if state.is_settled() {
                next.push(world);
            }
        }
        self.source_work(state, true, next);
        if self.failures > 0 {
            let mut world = self.clone();
            world.failures -= 1;
            world.source_work(state, false, next);
        }
    }

    fn source_work(&self, state: SourceState, well: bool, next: &mut Vec<Self>) {
        let mut world = self.clone();
        let input = if well { SourceInput::Done } else { SourceInput::Failed };
        let record = match state {
            SourceState::RecordingHandover => Some(SourceDisk::HandedOver),
            SourceState::RecordingHere => Some(SourceDisk::Here),
            SourceState::RecordingGone => Some(SourceDisk::Gone),
            _ => None,
        };
        match state {
            // It was decided here to give up: an error of the machine, or a cancellation.
            SourceState::Sending if !well => world.to_target.push_back(Wire::Abort),
            SourceState::Resuming if well => {
                world.source_vm = if self.source_vm == Vm::None { Vm::None } else { Vm::Running };
                world.copy_is_stale = true;
            }
            SourceState::Ending => world.source_vm = Vm::None,
            SourceState::Committing if well => {
                if !self.connected {
                    world.source = Some(state.after(SourceInput::Failed));
                    next.push(world);
                    return;
                }
                world.to_target.push_back(Wire::Commit);
            }
            SourceState::Asking if well => {
                // Connects anew, if the target is there; the old connection is forgotten on both sides.
                if self.target.is_none() || self.connected {
                    return;
                }
                world.connected = true;
                world.to_source.clear();
                world.to_target.clear();
                world.to_target.push_back(Wire::Ask);
                next.push(world);
                return;
            }
            // Whoever gives up hangs up.
            SourceState::Asking | SourceState::Committing => {
                world.cut();
                world.to_source.clear();
            }
            SourceState::Unresolved(_) => {
                world.source = Some(state.after(SourceInput::Retry));
                next.push(world);
                return;
            }
            SourceState::Sending | SourceState::AwaitingRunning | SourceState::Here | SourceState::Gone => {
                return;
            }
            _ => {}
        }
        world.source = Some(state.after(input));
        if let Some(record) = record {
            if !well {
                // It may not have been written ...
                next.push(world.clone());
            }
            // ... or it was, whatever the disk said.
            world.source_disk = record;
        }
        next.push(world);
    }

    /// The source's process starts again: its memory is gone.
    fn start_source(&mut self) {
        self.source = Some(match self.source_disk {
            SourceDisk::Here => SourceState::Here,
            SourceDisk::HandedOver => SourceState::Asking,
            SourceDisk::Gone => SourceState::Gone,
        });
    }

    fn target_steps(&self, next: &mut Vec<Self>) {
        let Some(state) = self.target else {
            let mut world = self.clone();
            world.start_target();
            next.push(world);
            return;
        };
        let waits = matches!(state, TargetState::Receiving | TargetState::Prepared) || state.is_settled();
        if let Some(message) = self.to_target.front().filter(|_| waits) {
            let mut world = self.clone();
            world.to_target.pop_front();
            let input = match message {
                Wire::Everything => TargetInput::Complete,
                Wire::Commit => TargetInput::Commit,
                Wire::Ask => TargetInput::Ask,
                Wire::Abort => TargetInput::Abort,
                _ => TargetInput::Lost,
            };
            let after = state.after(input);
            world.target = Some(after);
            if after == state && matches!(input, TargetInput::Ask | TargetInput::Commit) {
                world.say(world.answer(state));
            }
            next.push(world);
        }
        if self.unwritten {
            let mut world = self.clone();
            (world.unwritten, world.target_disk) = (false, TargetDisk::Refused);
            next.push(world);
        }
        self.target_work(state, true, next);
        if self.failures > 0 {
            let mut world = self.clone();
            world.failures -= 1;
            world.target_work(state, false, next);
        }
    }

    /// What the target says when it is asked in this state. Once an attempt is over that is what the disk says, unless the
    /// disk is known to be wrong.
    fn answer(&self, state: TargetState) -> Option<TargetStatus> {
        if !state.is_settled() {
            return state.status();
        }
        if self.unwritten {
            return Some(TargetStatus::Refused);
        }
        Some(match self.target_disk {
            TargetDisk::Running => TargetStatus::Running,
            TargetDisk::Refused => TargetStatus::Refused,
            TargetDisk::Nothing | TargetDisk::Prepared | TargetDisk::Discarded => TargetStatus::Discarded,
        })
    }

    fn target_work(&self, state: TargetState, well: bool, next: &mut Vec<Self>) {
        if matches!(state, TargetState::Prepared)
            || state.is_settled()
            || (state == TargetState::Receiving && well)
        {
            return;
        }
        let mut world = self.clone();
        let after = state.after(if well { TargetInput::Done } else { TargetInput::Failed });
        world.target = Some(after);
        if state == TargetState::Resuming && well {
            world.target_vm = Vm::Running;
            world.target_ran = true;
        }
        if matches!(after, TargetState::Refused | TargetState::Discarded) {
            world.target_vm = Vm::None;
        }
        world.say(after.status());
        let record = match state {
            TargetState::RecordingPrepared => Some(TargetDisk::Prepared),
            TargetState::RecordingRunning => Some(TargetDisk::Running),
            TargetState::RecordingRefused => Some(TargetDisk::Refused),
            TargetState::RecordingDiscarded => Some(TargetDisk::Discarded),
            _ => None,
        };
        world.unwritten = record == Some(TargetDisk::Refused) && !well;
        if let Some(record) = record {
            if !well {
                next.push(world.clone());
            }
            world.target_disk = record;
        }
        next.push(world);
    }

    fn start_target(&mut self) {
        self.target = Some(match self.target_disk {
            TargetDisk::Running => TargetState::Running,
            TargetDisk::Refused => TargetState::Refused,
            TargetDisk::Discarded => TargetState::Discarded,
            TargetDisk::Nothing | TargetDisk::Prepared => TargetState::RecordingDiscarded,
        });
    }

    /// What may befall it from outside.
    fn blows(&self) -> Vec<Self> {
        let mut next = Vec::new();
        if self.cuts > 0 && self.connected {
            // What was on its way is lost as well, or only what one side had not read.
            for (lose_to_target, lose_to_source) in
                [(false, false), (true, false), (false, true), (true, true)]
            {
                let mut world = self.clone();
                world.cuts -= 1;
                if lose_to_target {
                    world.to_target.clear();
                }
                if lose_to_source {
                    world.to_source.clear();
                }
                world.cut();
                next.push(world);
            }
        }
        if self.source_kills > 0 && self.source.is_some() {
            let mut world = self.clone();
            world.source_kills -= 1;
            world.source = None;
            world.source_vm = Vm::None;
            world.cut();
            world.to_source.clear();
            next.push(world);
        }
        if self.target_kills > 0 && self.target.is_some() {
            let mut world = self.clone();
            world.target_kills -= 1;
            world.target = None;
            world.target_vm = Vm::None;
            world.unwritten = false;
            world.cut();
            world.to_target.clear();
            next.push(world);
        }
        next
    }

    /// No blows any more: where it ends.
    fn calm(&self) -> Self {
        Self { cuts: 0, source_kills: 0, target_kills: 0, failures: 0, ..self.clone() }
    }
}

/// Every world that can be reached, each checked.
fn explore(start: World) -> HashSet<World> {
    let mut seen = HashSet::from([start.clone()]);
    let mut todo = vec![start];
    while let Some(world) = todo.pop() {
        world.check();
        for next in world.steps().into_iter().chain(world.blows()) {
            if seen.insert(next.clone()) {
                todo.push(next);
            }
        }
    }
    seen
}

/// Where a world ends when nothing bad happens any more, whatever the order of steps.
fn ends(world: &World) -> Vec<World> {
    let mut ends = Vec::new();
    for end in explore_calm(world.calm()) {
        if end.steps().iter().all(|next| *next == end) {
            ends.push(end);
        }
    }
    ends
}

fn explore_calm(start: World) -> HashSet<World> {
    let mut seen = HashSet::from([start.clone()]);
    let mut todo = vec![start];
    while let Some(world) = todo.pop() {
        for next in world.steps() {
            if seen.insert(next.clone()) {
                todo.push(next);
            }
        }
    }
    seen
}

#[test]
fn the_two_sides_never_both_run_whatever_is_lost_killed_or_fails() {
    let seen = explore(World::new(3, 1, 1, 2));
    assert!(seen.len() > 10_000, "only {} worlds were tried", seen.len());
}

#[test]
fn without_a_killed_process_exactly_one_side_runs_in_the_end() {
    // Two failures: a record that is there although writing it failed, and the one that was to replace it.
    for world in explore(World::new(3, 0, 0, 1)).union(&explore(World::new(1, 0, 0, 2))) {
        let ends = ends(world);
        assert!(!ends.is_empty(), "never ends: {world:?}");
        for end in ends {
            let running = [end.source_vm, end.target_vm].iter().filter(|vm| **vm == Vm::Running).count();
            assert_eq!(running, 1, "{end:?}\nfrom {world:?}");
        }
    }
}

#[test]
fn after_a_kill_one_side_has_the_machine_and_both_agree_which() {
    for world in explore(World::new(1, 1, 1, 0)) {
        for end in ends(&world) {
            match (end.source, end.target) {
                // The machine's process on the side that has it may have been the one that was killed.
                (Some(SourceState::Gone), Some(TargetState::Running)) => {
                    assert_ne!(end.source_vm, Vm::Running, "{end:?}");
                }
                (Some(SourceState::Here), target) => {
                    assert_ne!(target, Some(TargetState::Running), "{end:?}");
                    let untouched = world.source_kills == 1 && end.source_kills == world.source_kills;
                    assert!(!untouched || end.source_vm == Vm::Running || world.source.is_none(), "{end:?}");
                }
                _ => panic!("undecided: {end:?}\nfrom {world:?}"),
            }
        }
    }
}

#[test]
fn a_source_killed_after_it_handed_over_lets_the_prepared_target_run() {
    let mut world = World::new(0, 0, 0, 0);
    world.source = None;
    world.source_vm = Vm::None;
    world.source_disk = SourceDisk::HandedOver;
    world.target = Some(TargetState::Prepared);
    world.target_disk = TargetDisk::Prepared;
    world.to_target.clear();
    world.cut();
    for end in ends(&world) {
        assert_eq!((end.source, end.target_vm), (Some(SourceState::Gone), Vm::Running), "{end:?}");
    }
}
