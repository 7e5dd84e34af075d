//! Moves: the machine of the `mirror` crate, and the threads that carry out what it decides.
//!
//! ```text
//!   workers ── WriteBegin, WriteEnd, marks ──►┌─────────┐── StartWrite, CompleteWrite ──► workers (mail)
//!   API ────── Pause, Resume, Switch, ... ───►│ Machine │── SetRoute ──► the disk's route, at once
//!   copier ─── CopyEnd, VerifyEnd ───────────►│ (mutex) │── Copy, Verify, Wake ──► copier thread (tokio-uring)
//!   control ── RouteSettled, Recorded, ... ──►└─────────┘── everything that blocks ──► control thread
//! ```

mod control;
mod copier;
mod journal_file;
mod layering;
pub mod marks;
mod merging;
mod preparing;
mod recovery;
pub mod shared;

use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::SystemTime;

use blockd_api::{ErrorInfo, Job, JobPhases, JobSwitch, Receipt};
use formats::{CreateOptions, ErrorKind, Format, Geometry, ImageType};
use mirror::{
    Action, Config, Event, JobState, Machine, MirrorMode, OnTargetError, PauseReason, SwitchMode, Verify,
};
use serde::{Deserialize, Serialize};

use crate::disk::handle::{ImageHandle, OpenImage};
use crate::disk::{Disk, DiskError};
use crate::histogram::Snapshot;
use control::Control;
use journal_file::JournalFile;
use merging::Merging;
use preparing::{ParentCopy, Preparation};
use shared::MoveShared;

pub use layering::{Layering, Merge, ParentMove};
pub use recovery::{Adopt, Recovered, recover};

/// Bytes of one copy: large enough for a disk's full speed, small enough that a guest's write waits little for one.
const COPY_BYTES_MAX: u64 = 512 << 10;
/// Copies in flight: one that reads, one that writes, and one to spare. What is queued at the disk beyond that makes the
/// guest wait and the copy no faster (8 copies of 1 MiB: a guest's p99 of 10 ms instead of 3 ms, at the same rate).
const COPIES_IN_FLIGHT_MAX: u32 = 3;
/// The smallest extent; a disk of more than 2^32 of them has larger ones.
const EXTENT_BYTES: u64 = 64 << 10;

/// What a move is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovePlan {
    /// The job's id.
    pub job: String,
    /// The disk's id.
    pub disk: String,
    /// The disk's generation before the move.
    pub generation: u64,
    /// The image that is the disk now.
    pub source: PathBuf,
    /// The image that shall be the disk, under its final name.
    pub target: PathBuf,
    /// The target's format.
    pub format: Format,
    /// The target's type.
    pub image_type: ImageType,
    /// The target's block size in bytes; its format's own when absent.
    pub block_size: Option<u32>,
    /// When guest writes begin to go to both images.
    pub mirror: MirrorMode,
    /// Who says when the target becomes the disk.
    pub switch: SwitchMode,
    /// How much is read back before.
    pub verify: Verify,
    /// Bytes a second that copying may take.
    pub bandwidth: Option<u64>,
    /// Microseconds that 99 of 100 of the guest's reads and writes may take.
    #[serde(default)]
    pub max_guest_p99_us: Option<u64>,
    /// The source stays.
    pub keep_source: bool,
    /// A copy at one point in time; the disk stays where it is.
    pub copy_only: bool,
    /// What an error of the target does.
    pub on_target_error: OnTargetError,
    /// How the images of a chain are dealt with.
    #[serde(default)]
    pub layering: Layering,
}

impl MovePlan {
    fn config(&self, disk_size: u64) -> Config {
        // What the machine does not know, as the journal keeps it for a restart.
        let json = serde_json::to_string(self).expect("a plan is plain data");
        Config {
            plan: mirror::Plan {
                job: self.job.clone(),
                disk: self.disk.clone(),
                generation: self.generation,
                source: self.source.to_string_lossy().into_owned(),
                target_temporary: self.temporary().to_string_lossy().into_owned(),
                target_final: self.target.to_string_lossy().into_owned(),
                details: BTreeMap::from([("plan".to_owned(), json)]),
            },
            disk_size,
            extent_size: EXTENT_BYTES.max(disk_size.div_ceil(1 << 31).next_power_of_two()),
            mode: self.mirror,
            switch: self.switch,
            verify: self.verify,
            copy_only: self.copy_only,
            keep_source: self.keep_source,
            on_target_error: self.on_target_error,
            bandwidth: self.bandwidth,
            max_guest_p99_us: self.max_guest_p99_us,
            copies_in_flight_max: COPIES_IN_FLIGHT_MAX,
            copy_bytes_max: COPY_BYTES_MAX,
        }
    }
}

/// Hands the control thread what it begins with.
type Begin = std::sync::mpsc::Sender<(JournalFile, Vec<ParentCopy>)>;

/// What a move tells the daemon.
pub struct MoveHooks {
    /// The job is in another state.
    pub state_changed: Box<dyn Fn(&Job) + Send + Sync>,
    /// The disk is another image now. Must be durable when it returns.
    #[expect(clippy::type_complexity, reason = "one use")]
    pub image_changed: Box<dyn Fn(&NewImage) -> io::Result<()> + Send + Sync>,
    /// Who else uses a file, if anybody does.
    #[expect(clippy::type_complexity, reason = "one use")]
    pub used_by: Box<dyn Fn(&Path) -> Option<String> + Send + Sync>,
}

/// What a disk is from the end of a move on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewImage {
    /// The image and its parents, the nearest first.
    pub files: Vec<PathBuf>,
    /// The image's format.
    pub format: Format,
    /// The disk's generation.
    pub generation: u64,
}

/// What is known of a move besides what its machine knows.
#[derive(Debug, Clone, Default)]
struct Outcome {
    over: bool,
    /// The disk is the target, by its record too: what is left to do is behind its back.
    let_go: bool,
    source_deleted: bool,
    /// Parents that others use were left.
    sources_kept: Vec<String>,
    /// Somebody took the final name, so the target is under its temporary one.
    target_kept_name: bool,
    longest_guest_wait_us: u64,
    commit_us: u64,
    receipt: Option<Receipt>,
    /// A failure that the machine cannot know of: its threads are gone.
    broken: Option<String>,
}

/// A move of a disk that is served.
pub struct Move {
    plan: MovePlan,
    shared: Arc<MoveShared>,
    preparation: Preparation,
    outcome: Mutex<Outcome>,
    ended: Condvar,
    started: SystemTime,
    hooks: MoveHooks,
}

impl std::fmt::Debug for Move {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Move").field("plan", &self.plan).finish_non_exhaustive()
    }
}

/// Paths as the API has them.
fn texts(paths: &[PathBuf]) -> Vec<String> {
    paths.iter().map(|path| path.to_string_lossy().into_owned()).collect()
}

fn create_error(e: formats::CreateError) -> DiskError {
    DiskError::new(e.kind, format!("the target cannot be made: {e}"))
}

/// Makes the target under its temporary name and opens it.
fn make_target(plan: &MovePlan, geometry: Geometry) -> Result<Arc<ImageHandle>, DiskError> {
    let temporary = plan.temporary();
    let options = CreateOptions {
        image_type: plan.image_type,
        block_size: plan.block_size,
        logical_sector_size: geometry.logical_sector_size,
        ..CreateOptions::new(plan.format, geometry.virtual_size)
    };
    formats::create(&temporary, &options).map_err(create_error)?;
    let how = OpenImage { format: Some(plan.format), ..OpenImage::default() };
    ImageHandle::open(&temporary, &how)
}

/// Whether the target can stand for the source.
fn check_same_geometry(plan: &MovePlan, geometry: Geometry, target: &ImageHandle) -> Result<(), DiskError> {
    let got = target.image().geometry();
    if (got.virtual_size, got.logical_sector_size) == (geometry.virtual_size, geometry.logical_sector_size) {
        return Ok(());
    }
    Err(DiskError::new(
        ErrorKind::Unsupported,
        format!(
            "{} cannot hold a disk of {} bytes with sectors of {}: choose another format",
            plan.format, geometry.virtual_size, geometry.logical_sector_size
        ),
    ))
}

/// The two sides of a move, and the parents to be copied before it begins.
struct Sides {
    source: Arc<ImageHandle>,
    target: Arc<ImageHandle>,
    copies: Vec<ParentCopy>,
}

impl Sides {
    /// Makes and opens what the plan says. What was made is removed again when that fails.
    fn make(plan: &MovePlan, disk: &Disk) -> Result<Self, DiskError> {
        let geometry = disk.geometry();
        let source = disk.shared().route.load().source().clone();
        let made = match &plan.layering {
            Layering::Flat => make_target(plan, geometry).map(|target| (target, Vec::new())),
            Layering::Chain(parents) => {
                preparing::make_chain(plan, parents, &source, geometry, disk.notes_dir())
            }
            Layering::Merge(merge) => {
                let Merging { source, target } = merging::begin(disk, plan, merge)?;
                let sizes = [&source, &target].map(|image| image.image().geometry().virtual_size);
                assert_eq!(sizes[0], sizes[1], "a parent that is smaller was made as large as the disk");
                return Ok(Self { source, target, copies: Vec::new() });
            }
        };
        let made = made.and_then(|made| check_same_geometry(plan, geometry, &made.0).map(|()| made));
        if made.is_err() {
            remove_made_files(plan);
        }
        made.map(|(target, copies)| Self { source, target, copies })
    }
}

/// Removes what a move has made before it began. What made it fail is told; a leftover under its temporary name cannot be
/// mistaken for a disk.
fn remove_made_files(plan: &MovePlan) {
    for (temporary, _) in plan.made_files().iter().rev() {
        if let Err(e) = control::remove_durably(temporary) {
            tracing::warn!(job = plan.job, "{} is left: {e}", temporary.display());
        }
    }
}

impl Move {
    /// Makes the target, begins the journal and starts to copy.
    ///
    /// # Errors
    /// When the target or the journal cannot be made; nothing has happened to the disk then.
    pub fn start(
        disk: Arc<Disk>,
        plan: MovePlan,
        moves_dir: &Path,
        hooks: MoveHooks,
    ) -> Result<Arc<Self>, DiskError> {
        if let Some((_, taken)) = plan.made_files().iter().find(|(_, target)| target.exists()) {
            return Err(DiskError::new(
                ErrorKind::InvalidParameter,
                format!("{} exists already; name another target", taken.display()),
            ));
        }
        let config = plan.config(disk.geometry().virtual_size);
        // What the guest sees from here until the first copy is what it sees without one.
        let heard = disk.shared().counters.latencies();
        config.check().map_err(|e| DiskError::new(ErrorKind::InvalidParameter, e.to_string()))?;
        // The plan comes first: whatever a crash leaves of the target is found by it.
        let mut journal = JournalFile::open(moves_dir, &plan.job)?;
        // A move that begins again does so from the start, perhaps on a disk that has another size by now.
        journal.begin_anew();
        let sides = journal
            .append(&mirror::Record::plan(&config))
            .map_err(|e| DiskError::new(ErrorKind::Io, format!("the journal cannot be written: {e}")))
            .and_then(|()| Sides::make(&plan, &disk));
        let Sides { source, target, copies } = match sides {
            Ok(sides) => sides,
            Err(e) => {
                // Nothing has begun, so nothing is to be remembered.
                journal.discard();
                return Err(e);
            }
        };
        let (send, actions) = tokio::sync::mpsc::unbounded_channel();
        let disk_shared = disk.shared().clone();
        let preparation = Preparation::of(&copies, plan.bandwidth);
        let shared = MoveShared::new(
            Machine::new(config.clone()),
            &config,
            plan.own_levels(),
            send,
            disk.mailboxes().to_vec(),
            disk_shared.route.clone(),
            source,
            target,
        );
        let this = Arc::new(Self {
            plan,
            shared,
            preparation,
            outcome: Mutex::default(),
            ended: Condvar::new(),
            started: SystemTime::now(),
            hooks,
        });
        let spawned = this.spawn_threads(disk.clone(), config, heard, actions);
        let to_control = match spawned {
            Ok(to_control) => to_control,
            Err(e) => {
                // The target goes first, so that nothing is left that no journal knows of.
                match this.plan.layering {
                    Layering::Merge(_) => drop(merging::give_up(&disk, &this.plan, this.shared.target())),
                    _ => remove_made_files(&this.plan),
                }
                journal.discard();
                return Err(e);
            }
        };
        // The thread waits for nothing else.
        let _ = to_control.send((journal, copies));
        Ok(this)
    }

    /// Starts the move's threads; the control thread waits for its journal.
    fn spawn_threads(
        self: &Arc<Self>,
        disk: Arc<Disk>,
        config: Config,
        heard: Snapshot,
        actions: tokio::sync::mpsc::UnboundedReceiver<Action>,
    ) -> Result<Begin, DiskError> {
        let no_thread =
            |e: io::Error| DiskError::new(ErrorKind::Io, format!("cannot start a thread for the move: {e}"));
        let (to_control, for_control) = std::sync::mpsc::channel();
        let (begin, journal) = std::sync::mpsc::channel::<(JournalFile, Vec<ParentCopy>)>();
        let (this, of_disk) = (self.clone(), disk.clone());
        std::thread::Builder::new()
            .name("move-control".into())
            .spawn(move || {
                // Without a journal the move never began.
                if let Ok((journal, copies)) = journal.recv() {
                    Control::new(this, of_disk, journal).run(&copies, &for_control);
                }
            })
            .map_err(no_thread)?;
        let (this, disk) = (self.clone(), disk.shared().clone());
        std::thread::Builder::new()
            .name("move-copy".into())
            .spawn(move || {
                let forward = |action| {
                    let last = matches!(&action, Action::StateChanged(state) if state.is_final());
                    // The control thread ends only after the last action.
                    let gone = to_control.send(action).is_err();
                    if last || gone { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                };
                let is_merge = matches!(this.plan.layering, Layering::Merge(_));
                if let Err(e) =
                    copier::run(this.shared.clone(), &disk, heard, &config, is_merge, actions, &forward)
                {
                    this.break_off(&format!("the copier cannot run: {e}"));
                }
            })
            .map_err(no_thread)?;
        Ok(begin)
    }

    fn outcome(&self) -> std::sync::MutexGuard<'_, Outcome> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The move can go no further and its machine cannot be asked.
    fn break_off(&self, why: &str) {
        tracing::error!(job = self.plan.job, "{why}");
        let mut outcome = self.outcome();
        outcome.broken = Some(why.to_owned());
        outcome.over = true;
        drop(outcome);
        self.ended.notify_all();
    }

    fn finish(&self, receipt: Receipt) {
        let mut outcome = self.outcome();
        outcome.receipt = Some(receipt);
        outcome.over = true;
        drop(outcome);
        self.ended.notify_all();
    }

    /// The move as it stands.
    pub fn job(&self) -> Job {
        let machine = self.shared.machine();
        let (state, progress) = (machine.state(), machine.progress(self.shared.now()));
        drop(machine);
        let outcome = self.outcome().clone();
        let prepared = self.preparation.state().clone();
        let info = |kind: &str, message: String| Some(ErrorInfo { kind: kind.into(), message });
        let error = match &state {
            JobState::Failed { reason } => info("io", reason.clone()),
            JobState::Paused { reason: PauseReason::Space(why) } => {
                info("no-space", format!("{why}; make room, then resume the job"))
            }
            JobState::Paused { reason: PauseReason::TargetError(why) } => {
                info("io", format!("{why}; mend the target, then resume the job, or cancel it"))
            }
            _ => outcome.broken.clone().and_then(|why| info("internal", why)),
        };
        let state = match &prepared {
            p if p.is_running && p.is_paused => "paused",
            p if p.is_running => "copying",
            _ if outcome.broken.is_some() => "failed",
            _ => state.word(),
        };
        let plan = &self.plan;
        let target =
            if outcome.target_kept_name { self.shared.target().paths() } else { plan.target_files() };
        let source = match plan.layering {
            Layering::Flat => vec![plan.source.clone()],
            Layering::Chain(_) | Layering::Merge(_) => plan.source_files(),
        };
        Job {
            job: plan.job.clone(),
            disks: vec![plan.disk.clone()],
            ready: state == "synced" && progress.ready,
            state: state.into(),
            source: texts(&source),
            target: texts(&target),
            bytes_total: prepared.total + progress.bytes_total,
            bytes_copied: prepared.copied + progress.bytes_copied,
            bytes_mirrored: progress.bytes_mirrored,
            bytes_dirty: progress.bytes_dirty,
            bytes_skipped_zero: prepared.zero + progress.bytes_skipped_zero,
            bytes_verified: progress.bytes_verified,
            rate_bytes_per_s: progress.rate_bytes_per_s,
            eta_s: progress.eta_s.unwrap_or(0),
            passes: progress.passes,
            max_guest_p99_us: progress.max_guest_p99_us,
            guest_p99_us: progress.guest_p99_us,
            phases: JobPhases {
                copying_s: progress.copying_s,
                mirroring_s: progress.mirroring_s,
                verify_s: progress.verify_s,
                commit_s: progress.commit_s,
            },
            switch: JobSwitch {
                commit_us: outcome.commit_us,
                longest_guest_wait_us: outcome.longest_guest_wait_us,
            },
            verified: match plan.verify {
                Verify::None => "none",
                Verify::Sample => "sample",
                Verify::Full => "full",
            }
            .into(),
            source_deleted: outcome.source_deleted,
            sources_kept: outcome.sources_kept,
            error,
        }
    }

    /// What a finished move did; `None` while it runs.
    pub fn receipt(&self) -> Option<Receipt> {
        self.outcome().receipt.clone()
    }

    /// No further copies until it is resumed.
    pub fn pause(&self) {
        self.tell(Event::Pause, |preparation| preparation.is_paused = true);
    }

    /// Goes on after a pause or a target's error.
    pub fn resume(&self) {
        self.tell(Event::Resume, |preparation| preparation.is_paused = false);
    }

    /// The target may become the disk as soon as both are equal.
    pub fn switch(&self) {
        self.shared.apply(Event::Switch);
    }

    /// Back to the source, unless the commit was asked for.
    pub fn cancel(&self) {
        self.tell(Event::Cancel, |preparation| preparation.is_cancelled = true);
    }

    /// Another limit, in bytes a second.
    pub fn set_bandwidth(&self, limit: Option<u64>) {
        self.preparation.state().bandwidth = limit;
        self.shared.apply(Event::SetBandwidth(limit));
    }

    /// Another budget of the guest's 99th percentile, in microseconds.
    pub fn set_max_guest_p99(&self, budget_us: Option<u64>) {
        self.shared.apply(Event::SetMaxGuestP99(budget_us));
    }

    /// Tells the machine, or what comes before it.
    fn tell(&self, event: Event, prepare: impl FnOnce(&mut preparing::State)) {
        let mut preparation = self.preparation.state();
        if preparation.is_running {
            prepare(&mut preparation);
        } else {
            drop(preparation);
            self.shared.apply(event);
        }
    }

    /// Whether the move works on the disk no more: it is over, or only the source is left to be tidied up.
    pub fn has_let_go(&self) -> bool {
        let outcome = self.outcome();
        outcome.over || outcome.let_go
    }

    /// Returns when the move is over.
    pub fn wait(&self) {
        let mut outcome = self.outcome();
        while !outcome.over {
            outcome = self.ended.wait(outcome).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
