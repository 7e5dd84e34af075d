//! The machine itself.

use crate::{Action, Config, Event, JobState, Progress, Record, Tick};

/// One move of one disk.
#[derive(Debug)]
pub struct Machine {
    config: Config,
    state: JobState,
}

impl Machine {
    /// A move that has not begun.
    ///
    /// # Panics
    /// When [`Config::check`] has not been heeded.
    pub fn new(config: Config) -> Self {
        if let Err(error) = config.check() {
            panic!("a machine needs a checked configuration: {error}");
        }
        Self { config, state: JobState::Queued }
    }

    /// Takes one event and appends what is to be done, in order, to `actions`.
    pub fn apply(&mut self, _now: Tick, event: Event, actions: &mut Vec<Action>) {
        if event == Event::Start && self.state == JobState::Queued {
            actions.push(Action::Record(Record::plan(&self.config)));
        }
    }

    /// How far the move is.
    pub fn progress(&self, _now: Tick) -> Progress {
        Progress { bytes_total: self.config.disk_size, ..Progress::default() }
    }

    /// Where the job stands.
    pub fn state(&self) -> JobState {
        self.state.clone()
    }
}
