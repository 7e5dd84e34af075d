//! Following moves until they end: a bar for each on a terminal, else a line at each change of phase.

use std::time::{Duration, Instant};

use blockd_api::Job;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget};
use tokio::task::JoinSet;

use crate::client::{Client, Events};
use crate::failure::{Exit, Failure};
use crate::interrupt::interrupted;
use crate::render::{self, Facts, Screen, complain};

/// How often a job is asked after.
const POLL: Duration = Duration::from_millis(100);
/// How long a daemon may be away before watching gives up: a restarted one goes on with its moves.
const DAEMON_AWAY: Duration = Duration::from_secs(30);

/// Follows `jobs` until all are over, and prints each as it ends.
///
/// # Errors
/// When the daemon goes away for good, and when ^C ends the watching (the moves go on).
pub(crate) async fn until_over(client: &Client, jobs: Vec<Job>, screen: Screen) -> Result<Exit, Failure> {
    let ids: Vec<String> = jobs.iter().map(|job| job.job.clone()).collect();
    let target = if screen.is_live() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bars = MultiProgress::with_draw_target(target);
    let mut running = JoinSet::new();
    for job in jobs {
        let bar = bars.add(screen.bar(job.bytes_total));
        running.spawn(follow(client.clone(), job, bar, screen));
    }
    let all = async {
        let mut worst = Exit::Done;
        while let Some(ended) = running.join_next().await {
            let job = ended.unwrap_or_else(|e| Err(Failure::new("internal", e.to_string())))?;
            worst = worse(worst, bars.suspend(|| show_end(&job, screen))?);
        }
        Ok(worst)
    };
    let result = tokio::select! {
        result = all => result,
        caught = interrupted() => caught.and_then(|()| Err(left_alone(&ids))),
    };
    // Whatever ended the watching, no half-drawn bar may be left on the terminal.
    let _ = bars.clear();
    result
}

/// Follows one move until it is over, and leaves what is said about its end to the caller.
pub(crate) async fn one(client: &Client, job: Job, screen: Screen) -> Result<Job, Failure> {
    let bar = screen.bar(job.bytes_total);
    follow(client.clone(), job, bar, screen).await
}

fn left_alone(ids: &[String]) -> Failure {
    let list = ids.join(" and ");
    let first = ids.first().map_or("JOB", String::as_str);
    Failure::new(
        "interrupted",
        format!(
            "{list} goes on in the daemon; watch it with `blockctl job watch {first}`, give it up with `blockctl job cancel {first}`"
        ),
    )
}

/// The exit code of several moves: a failure outweighs a cancelled one, which outweighs success.
fn worse(a: Exit, b: Exit) -> Exit {
    let rank = |exit| match exit {
        Exit::Done => 0,
        Exit::Cancelled => 1,
        _ => 2,
    };
    if rank(b) > rank(a) { b } else { a }
}

async fn follow(client: Client, mut job: Job, bar: ProgressBar, screen: Screen) -> Result<Job, Failure> {
    let mut tale = Tale::begin(&client, &job, screen).await;
    loop {
        tale.see(&job)?;
        draw(&bar, &job);
        if job.is_over() {
            tale.end(&job).await?;
            bar.finish_and_clear();
            return Ok(job);
        }
        tale.listen(POLL, None).await?;
        job = ask_again(&client, &job.job, &bar).await?;
    }
}

/// Tells each phase of a move in a line, where no bar is drawn. Some are over sooner than a job can be asked after, so
/// the daemon's events are listened to; without them, what is seen in the job has to do.
struct Tale {
    job: String,
    name: String,
    events: Option<Events>,
    said: String,
    screen: Screen,
}

impl Tale {
    /// How long the event of a move's end may come after the end itself.
    const LATE: Duration = Duration::from_secs(1);

    async fn begin(client: &Client, job: &Job, screen: Screen) -> Self {
        let wanted = screen.tells_lines() && !job.is_over();
        let events = if wanted { client.events(true).await.ok() } else { None };
        Self { job: job.job.clone(), name: name(job), events, said: String::new(), screen }
    }

    fn say(&mut self, phase: String) -> Result<(), Failure> {
        if phase != self.said {
            self.screen.note(&format!("{}: {phase}", self.name))?;
            self.said = phase;
        }
        Ok(())
    }

    /// Takes a phase from the job itself, unless the events will tell it in its turn.
    fn see(&mut self, job: &Job) -> Result<(), Failure> {
        if self.events.is_none() { self.say(phase_of(job)) } else { Ok(()) }
    }

    /// Tells what the events bring, until the time is over or `last` was told.
    async fn listen(&mut self, time: Duration, last: Option<&str>) -> Result<(), Failure> {
        let until = tokio::time::Instant::now() + time;
        while last.is_none_or(|last| last != self.said) {
            let Some(events) = &mut self.events else {
                if last.is_none() {
                    tokio::time::sleep_until(until).await;
                }
                return Ok(());
            };
            match tokio::time::timeout_at(until, events.next()).await {
                Err(_) => return Ok(()),
                Ok(Ok(Some(event))) if event.kind == "job-state" && event.job.as_ref() == Some(&self.job) => {
                    let (state, reason) = match event.message.split_once(": ") {
                        Some((state, reason)) => (state, Some(reason)),
                        None => (event.message.as_str(), None),
                    };
                    self.say(phase(&self.job, state, reason))?;
                }
                Ok(Ok(Some(_))) => {}
                // The daemon is being restarted, or is no longer there.
                Ok(Ok(None) | Err(_)) => self.events = None,
            }
        }
        Ok(())
    }

    async fn end(&mut self, job: &Job) -> Result<(), Failure> {
        let last = phase_of(job);
        self.listen(Self::LATE, Some(&last)).await?;
        self.say(last)
    }
}

/// Asks after a job, with patience for a daemon that is being restarted.
async fn ask_again(client: &Client, id: &str, bar: &ProgressBar) -> Result<Job, Failure> {
    let gone = Instant::now() + DAEMON_AWAY;
    loop {
        match client.job(id).await {
            Err(e) if e.kind == "unreachable" && Instant::now() < gone => {
                bar.set_message("the daemon is away");
                tokio::time::sleep(POLL * 5).await;
            }
            other => return other,
        }
    }
}

fn name(job: &Job) -> String {
    if job.disks.is_empty() { job.job.clone() } else { format!("{} ({})", job.disks.join(", "), job.job) }
}

fn phase_of(job: &Job) -> String {
    phase(&job.job, &job.state, job.error.as_ref().map(|e| e.message.as_str()))
}

/// What changes only when the phase does.
fn phase(job: &str, state: &str, reason: Option<&str>) -> String {
    let reason = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
    match state {
        "paused" => format!("paused{reason}; go on with `blockctl job resume {job}`"),
        "failed" | "cancelled" => format!("{state}{reason}"),
        state => state.to_owned(),
    }
}

fn draw(bar: &ProgressBar, job: &Job) {
    let verifying = job.bytes_verified > 0 && !matches!(job.state.as_str(), "copying" | "queued");
    let (prefix, position) = if verifying && !job.is_over() && job.bytes_verified < job.bytes_total {
        ("verifying", job.bytes_verified)
    } else {
        // What holds nothing is done without being copied, so this is what tells how far it is.
        (job.state.as_str(), job.bytes_total.saturating_sub(job.bytes_dirty))
    };
    bar.set_length(job.bytes_total);
    bar.set_position(position);
    bar.set_prefix(prefix.to_owned());
    bar.set_message(match job.state.as_str() {
        "paused" => phase_of(job),
        "synced" => format!("both are equal; `blockctl job switch {}` goes over", job.job),
        _ => {
            let mut message = format!(
                "{}, {} dirty, {} left",
                render::rate(job.rate_bytes_per_s),
                render::size(job.bytes_dirty),
                render::duration(Duration::from_secs(job.eta_s))
            );
            if let (Some(_), Some(latency)) = (job.max_guest_p99_us, guest_latency(job)) {
                message.push_str(&format!(", p99 {latency}"));
            }
            message
        }
    });
}

/// How fast the guest's requests are, and how fast they are to be.
pub(crate) fn guest_latency(job: &Job) -> Option<String> {
    let now = job.guest_p99_us.map(|us| render::micros(us as f64));
    let budget = job.max_guest_p99_us.map(|us| render::micros(us as f64));
    match (now, budget) {
        (Some(now), Some(budget)) => Some(format!("{now} of {budget}")),
        (None, Some(budget)) => Some(format!("idle, at most {budget}")),
        (now, None) => now,
    }
}

/// Prints a move that is over, and says how it ended.
pub(crate) fn show_end(job: &Job, screen: Screen) -> Result<Exit, Failure> {
    screen.show(job, |job| {
        let mut facts = Facts::new();
        add_summary(&mut facts, job);
        if job.state == "done" { facts.render() } else { String::new() }
    })?;
    let reason = job.error.as_ref().map_or("no reason was given", |e| e.message.as_str());
    match job.state.as_str() {
        "done" => Ok(Exit::Done),
        "cancelled" => {
            complain(&format!("{} was cancelled; the disk stays on {}", name(job), job.source.join(", ")));
            Ok(Exit::Cancelled)
        }
        _ => {
            complain(&format!("{} has failed: {reason}", name(job)));
            let kind = job.error.as_ref().map_or("internal", |e| e.kind.as_str());
            Ok(Failure::new(kind, reason).exit)
        }
    }
}

/// What a move has done so far.
pub(crate) fn add_summary(facts: &mut Facts, job: &Job) {
    let seconds = |s: f64| render::duration(Duration::try_from_secs_f64(s).unwrap_or_default());
    let phases = &job.phases;
    facts.add("from", job.source.join(", ")).add("to", job.target.join(", ")).add("copied", copied(job));
    if job.bytes_skipped_zero > 0 {
        facts.add("skipped", format!("{} that hold nothing", render::size(job.bytes_skipped_zero)));
    }
    if job.bytes_mirrored > 0 || phases.mirroring_s > 0.0 {
        let time = seconds(phases.mirroring_s);
        facts
            .add("mirrored", format!("{} of the guest's writes in {time}", render::size(job.bytes_mirrored)));
    }
    let done = job.state == "done";
    if job.bytes_verified > 0 || (done && job.verified != "none") {
        let time = seconds(phases.verify_s);
        facts.add(
            "verified",
            format!("{}, {} compared in {time}", job.verified, render::size(job.bytes_verified)),
        );
    } else if done {
        facts.add("verified", "not, as was asked");
    }
    if job.switch.commit_us > 0 {
        let [commit, wait] = [job.switch.commit_us, job.switch.longest_guest_wait_us].map(|us| us as f64);
        let (commit, wait) = (render::micros(commit), render::micros(wait));
        facts.add("switch", format!("committed in {commit}; the guest's longest wait was {wait}"));
    }
    if done {
        facts.add("source", if job.source_deleted { "deleted" } else { "kept" });
        for file in &job.sources_kept {
            facts.add("kept", format!("{file}, which something else uses"));
        }
    }
}

fn copied(job: &Job) -> String {
    let time = job.phases.copying_s;
    let mut text = render::size(job.bytes_copied);
    if time > 0.0 {
        let mean = (job.bytes_copied as f64 / time) as u64;
        let time = Duration::try_from_secs_f64(time).unwrap_or_default();
        text.push_str(&format!(" in {} ({})", render::duration(time), render::rate(mean)));
    }
    if job.passes > 1 {
        text.push_str(&format!(", {} passes", job.passes));
    }
    text
}
