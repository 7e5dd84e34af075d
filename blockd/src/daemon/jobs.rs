//! Moves: starting them, their verbs, and the list of those that are over.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use blockd_api::{Job, JobSettings, MergeRequest, MoveRequest, Receipt};

use super::error::{DaemonError, Kind};
use super::events::Events;
use super::plan::{self, SourceDisk, SourceParent, Wanted};
use super::slot::{Claim, Served, Slot};
use super::{Daemon, lock};
use crate::mover::{Layering, Move, MoveHooks, MovePlan};

/// Jobs that are listed; of those that are over, the oldest go first.
pub(super) const JOBS_MAX: usize = 1000;

/// How long the answer to a request waits for the journal of its move.
const BEGIN_GRACE: Duration = Duration::from_secs(10);

/// What a client may tell a running job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Copy and commit nothing until told to.
    Pause,
    /// Go on.
    Resume,
    /// Switch over as soon as both images are equal, in a move that waits for being told.
    Switch,
    /// End without moving.
    Cancel,
}

impl Verb {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Pause => "paused",
            Self::Resume => "resumed",
            Self::Switch => "switched",
            Self::Cancel => "cancelled",
        }
    }
}

/// The list of jobs, oldest first.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    entries: Vec<Entry>,
    ended: BTreeMap<String, u64>,
}

#[derive(Debug)]
struct Entry {
    id: String,
    progress: Progress,
}

#[derive(Clone)]
enum Progress {
    Running(Arc<Move>),
    Over(Box<(Job, Option<Receipt>)>),
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Running(_) => "Running",
            Self::Over(_) => "Over",
        })
    }
}

impl Progress {
    fn job(&self) -> Job {
        match self {
            Self::Running(running) => running.job(),
            Self::Over(over) => over.0.clone(),
        }
    }
}

impl Jobs {
    /// The jobs of earlier runs, and the names of those that are too many.
    pub(super) fn remembered(jobs: Vec<Job>) -> (Self, Vec<String>) {
        let mut all = Self::default();
        let push = |job: Job| all.push(job.job.clone(), Progress::Over(Box::new((job, None))));
        let forgotten = jobs.into_iter().filter_map(push).collect();
        (all, forgotten)
    }

    /// Adds a job; answers the one that had to go for it.
    fn push(&mut self, id: String, progress: Progress) -> Option<String> {
        self.entries.push(Entry { id, progress });
        if self.entries.len() <= JOBS_MAX {
            return None;
        }
        let over = self.entries.iter().position(|e| matches!(e.progress, Progress::Over(_)))?;
        Some(self.entries.remove(over).id)
    }

    fn get(&self, id: &str) -> Option<&Progress> {
        self.entries.iter().rev().find(|e| e.id == id).map(|e| &e.progress)
    }

    fn all(&self) -> Vec<Progress> {
        self.entries.iter().map(|e| e.progress.clone()).collect()
    }

    /// Replaces a running job by how it ended; once.
    fn end(&mut self, id: &str, job: Job, receipt: Option<Receipt>) {
        let running = |e: &&mut Entry| e.id == id && matches!(e.progress, Progress::Running(_));
        if let Some(entry) = self.entries.iter_mut().rev().find(running) {
            *self.ended.entry(job.state.clone()).or_default() += 1;
            entry.progress = Progress::Over(Box::new((job, receipt)));
        }
    }
}

impl Daemon {
    /// Every job, oldest first.
    pub fn job_list(&self) -> Vec<Job> {
        let all = self.jobs().all();
        all.iter().map(Progress::job).collect()
    }

    /// One job.
    ///
    /// # Errors
    /// [`Kind::NotFound`].
    pub fn job(&self, id: &str) -> Result<Job, DaemonError> {
        Ok(self.progress(id)?.job())
    }

    /// What a finished move did.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::State`] when it has not ended, or has left no receipt.
    pub fn receipt(&self, id: &str) -> Result<Receipt, DaemonError> {
        let progress = self.progress(id)?;
        let job = progress.job();
        let receipt = match progress {
            Progress::Running(running) if job.is_over() => {
                running.wait();
                self.keep_receipt(&running)
            }
            Progress::Running(_) => None,
            Progress::Over(over) => over.1.or_else(|| self.state.receipt(id)),
        };
        let why = if job.is_over() { "it broke off before it was written" } else { "it comes with the end" };
        receipt.ok_or_else(|| {
            DaemonError::new(Kind::State, format!("job {id} is {}, and has no receipt: {why}", job.state))
        })
    }

    /// How many jobs have ended in this run, by their last state.
    pub(super) fn jobs_ended(&self) -> BTreeMap<String, u64> {
        self.jobs().ended.clone()
    }

    /// Changes a running job.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::State`] when it is over.
    pub fn set_job(&self, id: &str, settings: &JobSettings) -> Result<Job, DaemonError> {
        let running = self.running(id, "changed")?;
        if let Some(rate) = settings.bandwidth {
            running.set_bandwidth(Some(rate).filter(|&rate| rate > 0));
        }
        if let Some(budget_us) = settings.max_guest_p99_us {
            running.set_max_guest_p99(Some(budget_us).filter(|&us| us > 0));
        }
        Ok(running.job())
    }

    /// Tells a running job something; the answer is the job as it is right after.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::State`] when the job can't do that now.
    pub fn tell_job(&self, id: &str, verb: Verb) -> Result<Job, DaemonError> {
        let running = self.running(id, verb.as_str())?;
        let state = running.job().state;
        match verb {
            _ if state == "committed" => {
                let message =
                    format!("job {id} is committed: the target is the disk already, and the move just ends");
                return Err(DaemonError::new(Kind::State, message));
            }
            Verb::Pause => running.pause(),
            Verb::Resume => running.resume(),
            Verb::Switch => running.switch(),
            Verb::Cancel => running.cancel(),
        }
        tracing::info!(job = id, "to be {}", verb.as_str());
        Ok(running.job())
    }

    /// Starts the moves that are asked for, one a disk, and answers with the first. If one can't be started, those that
    /// were are cancelled.
    ///
    /// # Errors
    /// As [`Kind`] has them; [`Kind::Busy`] for a disk that is being moved.
    pub fn start_moves(self: &Arc<Self>, request: &MoveRequest) -> Result<Job, DaemonError> {
        let wanted = Wanted::read(request)?;
        let holds = request.disks.iter().map(|id| self.hold(id)).collect::<Result<Vec<_>, _>>()?;
        let plans = holds.iter().map(|h| wanted.plan(&h.source(), &h.job)).collect::<Result<Vec<_>, _>>()?;
        let _one = lock(&self.starting);
        self.check_targets(&plans)?;
        let mut started: Vec<Arc<Move>> = Vec::new();
        for (hold, plan) in holds.into_iter().zip(plans) {
            match self.launch(hold, plan) {
                Ok(running) => started.push(running),
                Err(e) => {
                    started.iter().for_each(|running| running.cancel());
                    return Err(e);
                }
            }
        }
        let first = started.first().map(|running| running.job());
        first.ok_or_else(|| DaemonError::invalid("no disk is named; name at least one to move"))
    }

    /// Folds the newest images of a disk's chain into the one below them, or into the one that is named.
    ///
    /// # Errors
    /// [`Kind::State`] for a disk without parents, or that can't be written; [`Kind::Invalid`] for an image that is no
    /// parent; [`Kind::Busy`] for a disk that is being moved, and for images that other disks use.
    pub fn merge(self: &Arc<Self>, disk: &str, request: &MergeRequest) -> Result<Job, DaemonError> {
        let hold = self.hold(disk)?;
        let plan = plan::merge(&hold.source(), &hold.job, request)?;
        if hold.served.disk.spec().read_only {
            let message = format!("disk {disk} is served for reading only, and a merge writes to its images");
            return Err(DaemonError::new(Kind::State, message));
        }
        let Layering::Merge(merge) = &plan.layering else { unreachable!("a merge was planned") };
        for file in merge.between.iter().chain([&plan.target]) {
            if let Some(user) = self.user_of(file, disk) {
                let message = format!(
                    "{} is a parent of {user} too, which a merge would change; flatten the disk with \
                     `blockctl move {disk} --flatten` instead",
                    file.display()
                );
                return Err(DaemonError::new(Kind::Busy, message));
            }
        }
        let _one = lock(&self.starting);
        Ok(self.launch(hold, plan)?.job())
    }

    /// Which disk but this one has the file in its chain, or may have it there when it is served.
    fn user_of(&self, file: &Path, but: &str) -> Option<String> {
        // Files are looked at without the lock: their storage may hang.
        let needs: Vec<_> = self.disks().iter().map(|(id, slot)| (id.clone(), slot.needs())).collect();
        needs.into_iter().filter(|(id, _)| id != but).find_map(|(id, needs)| {
            let told = needs.include(file)?;
            Some(format!("disk {id}{told}"))
        })
    }

    /// Starts a move again that the last run of the daemon left unfinished.
    pub(super) fn restart_move(self: &Arc<Self>, plan: MovePlan) {
        let (job, disk) = (plan.job.clone(), plan.disk.clone());
        let mut failed = Job {
            job: job.clone(),
            disks: vec![disk.clone()],
            state: "failed".to_owned(),
            source: plan.source_files().iter().map(|file| file.to_string_lossy().into_owned()).collect(),
            target: plan.target_files().iter().map(|file| file.to_string_lossy().into_owned()).collect(),
            verified: "none".to_owned(),
            ..Job::default()
        };
        let started = self.hold_for(&disk, job.clone()).and_then(|hold| {
            let image = hold.served.disk.image_path();
            if image != plan.source || hold.served.generation() != plan.generation {
                let message = format!(
                    "the disk is {} now, and the move was to read {}; start a new one",
                    image.display(),
                    plan.source.display()
                );
                return Err(DaemonError::new(Kind::State, message));
            }
            self.launch(hold, plan)
        });
        match started {
            Ok(_) => tracing::info!(job, disk, "the move begins again: the daemon ended before it did"),
            Err(e) => {
                tracing::error!(job, disk, error = e.message, "the move can't begin again");
                if e.kind == Kind::NotFound {
                    // The disk was detached: nobody is left to whom the move could matter at the next start.
                    self.state.forget_job(&job);
                }
                self.events.push("job-state", Some(&disk), Some(&job), format!("failed: {e}"));
                failed.error = Some(e.info());
                self.list_job(job, Progress::Over(Box::new((failed, None))));
            }
        }
    }

    /// Names of the disks that a move works on.
    pub(super) fn moving_disks(&self) -> Vec<String> {
        let running = |served: &Arc<Served>| {
            let progress = self.progress(&served.job()?).ok()?;
            (!progress.job().is_over()).then(|| served.id().to_owned())
        };
        self.served().iter().filter_map(running).collect()
    }

    /// Takes note of the end of a disk's move, if it has ended: a client that saw the end may go on at once.
    pub(super) fn settle_job_of(&self, disk: &str) {
        let Ok(served) = self.find(disk) else { return };
        let Some(job) = served.job() else { return };
        match self.progress(&job) {
            Ok(Progress::Running(running)) if running.job().is_over() => self.settle(&job, &running, &served),
            Ok(Progress::Over(_)) => served.clear_job(&job),
            _ => {}
        }
    }

    /// Whether nothing will happen any more to a job, known or not.
    pub(super) fn is_over(&self, job: &str) -> bool {
        let progress = self.jobs().get(job).cloned();
        progress.is_none_or(|progress| progress.job().is_over())
    }

    /// Whether a job works on its disk no more, though it may still tidy up behind it.
    pub(super) fn has_let_go(&self, job: &str) -> bool {
        let progress = self.jobs().get(job).cloned();
        match progress {
            Some(Progress::Running(running)) => running.has_let_go(),
            _ => true,
        }
    }

    /// Cancels a disk's move, if there is one, and waits for its end. A move that is committed ends by itself.
    pub(super) fn cancel_job_of(&self, disk: &str) {
        let job = self.find(disk).ok().and_then(|served| served.job());
        if let Some(Ok(Progress::Running(running))) = job.map(|job| self.progress(&job)) {
            running.cancel();
            running.wait();
        }
    }

    /// Lists a job, and lets go of the oldest where there are too many.
    fn list_job(&self, id: String, progress: Progress) {
        let forgotten = self.jobs().push(id, progress);
        forgotten.iter().for_each(|job| self.state.forget_job(job));
    }

    fn progress(&self, id: &str) -> Result<Progress, DaemonError> {
        self.jobs().get(id).cloned().ok_or_else(|| {
            let message = format!("there is no job {id:?}; `blockctl job list` shows those that are");
            DaemonError::new(Kind::NotFound, message)
        })
    }

    fn running(&self, id: &str, participle: &str) -> Result<Arc<Move>, DaemonError> {
        let progress = self.progress(id)?;
        let job = progress.job();
        match progress {
            Progress::Running(running) if !job.is_over() => Ok(running),
            _ => Err(DaemonError::new(
                Kind::State,
                format!("job {id} is {}, and can't be {participle}", job.state),
            )),
        }
    }

    fn hold(&self, disk: &str) -> Result<Hold, DaemonError> {
        self.settle_job_of(disk);
        self.hold_for(disk, self.new_job_id())
    }

    /// Keeps everybody else from moving or detaching the disk.
    fn hold_for(&self, disk: &str, job: String) -> Result<Hold, DaemonError> {
        let served = self.find(disk)?;
        if let Some(why) = served.disk.failed() {
            let message = format!("disk {disk} has failed and can't be moved: {why}");
            return Err(DaemonError::new(Kind::State, message));
        }
        // Under the lock of all disks, since a detach looks there.
        let disks = self.disks();
        let still_there = matches!(disks.get(disk), Some(Slot::Served(s)) if Arc::ptr_eq(s, &served));
        if !still_there {
            return Err(DaemonError::new(Kind::Busy, format!("disk {disk} is being detached")));
        }
        served.claim(Claim::Job(job.clone()))?;
        drop(disks);
        Ok(Hold { served, job, kept: false })
    }

    fn new_job_id(&self) -> String {
        loop {
            let id = format!("m{:08x}", uuid::Uuid::new_v4().as_fields().0);
            if !self.state.knows_job(&id) && self.jobs().get(&id).is_none() {
                return id;
            }
        }
    }

    /// No two moves write the same file. Whoever comes second is refused here rather than when both are done.
    fn check_targets(&self, plans: &[MovePlan]) -> Result<(), DaemonError> {
        let mut taken = BTreeMap::new();
        for job in self.job_list().into_iter().filter(|job| !job.is_over()) {
            taken.extend(job.target.into_iter().map(|target| (target, job.job.clone())));
        }
        let made = plans
            .iter()
            .flat_map(|plan| plan.made_files().into_iter().map(move |(_, target)| (plan, target)));
        for (plan, target) in made {
            let target = target.to_string_lossy().into_owned();
            if let Some(job) = taken.insert(target.clone(), plan.job.clone()) {
                let message = format!("job {job} writes to {target} already; name another place");
                return Err(DaemonError::new(Kind::Busy, message));
            }
        }
        Ok(())
    }

    fn launch(self: &Arc<Self>, mut hold: Hold, plan: MovePlan) -> Result<Arc<Move>, DaemonError> {
        let (job, served) = (plan.job.clone(), hold.served.clone());
        let (begun, has_begun) = mpsc::channel();
        let hooks = self.hooks(&plan, &served, begun);
        let (from, to) = (plan.source.clone(), plan.target.clone());
        let running = Move::start(served.disk.clone(), plan, &self.state.moves_dir(), hooks)?;
        hold.kept = true;
        self.list_job(job.clone(), Progress::Running(running.clone()));
        // A move tells its first state when its plan is durable: what is answered is not forgotten by a crash.
        if has_begun.recv_timeout(BEGIN_GRACE).is_err() {
            tracing::warn!(job, "the move's journal takes long to be written");
        }
        tracing::info!(job, disk = served.id(), from = %from.display(), to = %to.display(), "the move has begun");
        let watched = (self.clone(), running.clone());
        let watcher = std::thread::Builder::new().name(format!("end-of-{job}")).spawn(move || {
            let (daemon, running) = watched;
            daemon.settle(&job, &running, &served);
        });
        if let Err(e) = watcher {
            // Its end is then noted when somebody next asks for the disk.
            tracing::warn!(error = %e, "no thread to wait for the end of a move");
        }
        Ok(running)
    }

    /// Waits for the end of a move and notes it.
    fn settle(&self, id: &str, running: &Move, served: &Served) {
        running.wait();
        let receipt = self.keep_receipt(running);
        self.jobs().end(id, running.job(), receipt);
        served.clear_job(id);
    }

    /// The receipt of a move that is over, durable beside its journal. Writing it twice does no harm.
    fn keep_receipt(&self, over: &Move) -> Option<Receipt> {
        let receipt = over.receipt()?;
        if let Err(e) = self.state.put_receipt(&receipt) {
            let job = &receipt.job.job;
            tracing::warn!(job, error = %e, "the receipt can't be kept; it is gone after the next start");
        }
        Some(receipt)
    }

    fn hooks(self: &Arc<Self>, plan: &MovePlan, served: &Arc<Served>, begun: mpsc::Sender<()>) -> MoveHooks {
        let (daemon, disk) = (Arc::downgrade(self), plan.disk.clone());
        let (state, changing, job) = (self.state.clone(), served.clone(), plan.job.clone());
        let tell = tell_changes(self.events.clone(), plan.disk.clone());
        MoveHooks {
            state_changed: Box::new(move |job| {
                // Only the first one is waited for.
                let _ = begun.send(());
                tell(job);
            }),
            image_changed: Box::new(move |image| {
                let left = changing.record();
                let new = state.hold_new_image(changing.id(), &image.files[0], image.generation);
                let fenced = new.map_err(std::io::Error::other)?;
                changing.change_record(&state, |record| {
                    record.follow_move(image);
                    record.fenced = fenced;
                })?;
                state.free_old_image(&left, image.generation);
                let (path, generation) = (image.files[0].display(), image.generation);
                tracing::info!(job, disk = changing.id(), image = %path, generation, "the disk is another image now");
                Ok(())
            }),
            used_by: Box::new(move |file| daemon.upgrade()?.user_of(file, &disk)),
        }
    }
}

/// A move's hold on its disk, given back unless the move has begun.
struct Hold {
    served: Arc<Served>,
    job: String,
    kept: bool,
}

impl Hold {
    fn source(&self) -> SourceDisk {
        let disk = &self.served.disk;
        let handle = disk.shared().route.load().source().clone();
        let layers = handle.image().as_chain().map_or(&[][..], |chain| &chain.layers()[1..]);
        let parents = handle.paths().into_iter().skip(1).zip(layers).map(|(image, layer)| SourceParent {
            image,
            image_type: layer.image_type(),
            block_size: layer.geometry().block_size,
        });
        SourceDisk {
            parents: parents.collect(),
            id: self.served.id().to_owned(),
            image: disk.image_path(),
            format: disk.format(),
            image_type: disk.image_type(),
            generation: self.served.generation(),
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if !self.kept {
            self.served.clear_job(&self.job);
        }
    }
}

/// Turns a move's states into events, each of them once.
fn tell_changes(events: Arc<Events>, disk: String) -> impl Fn(&Job) + Send + Sync {
    let last = Mutex::new(String::new());
    move |job| {
        let message = match &job.error {
            Some(error) => format!("{}: {}", job.state, error.message),
            None => job.state.clone(),
        };
        let mut last = lock(&last);
        if *last != message {
            events.push("job-state", Some(&disk), Some(&job.job), message.clone());
            *last = message;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(n: usize) -> Job {
        Job { job: format!("m{n:08x}"), state: "done".to_owned(), ..Job::default() }
    }

    #[test]
    fn of_the_jobs_that_are_over_only_the_last_thousand_are_kept() {
        let (jobs, forgotten) = Jobs::remembered((0..1200).map(over).collect());
        assert_eq!((jobs.all().len(), forgotten.len()), (JOBS_MAX, 200));
        assert_eq!((forgotten[0].as_str(), forgotten[199].as_str()), ("m00000000", "m000000c7"));
        assert!(jobs.get("m000000c7").is_none());
        assert!(jobs.get("m000000c8").is_some());
    }

    #[test]
    fn a_state_is_told_once_with_its_reason() {
        let events = Arc::<Events>::default();
        let tell = tell_changes(events.clone(), "a".to_owned());
        let mut job = Job { job: "m1".to_owned(), state: "copying".to_owned(), ..Job::default() };
        tell(&job);
        tell(&job);
        job.state = "paused".to_owned();
        job.error = Some(blockd_api::ErrorInfo { kind: "no-space".to_owned(), message: "full".to_owned() });
        tell(&job);
        let told: Vec<_> = events.since(0).into_iter().map(|e| e.message).collect();
        assert_eq!(told, ["copying", "paused: full"]);
    }
}
