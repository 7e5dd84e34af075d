//! `job`: moves that are under way or over.

use blockd_api::{Job, JobSettings, Receipt};
use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand};
use serde_json::json;

use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::render::{self, Facts, Screen, Table};
use crate::units::{parse_budget, parse_limit};
use crate::watch;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the moves
    #[command(after_help = "Example:\n  blockctl job list")]
    List,
    /// Show one move
    #[command(after_help = "Example:\n  blockctl job show m1a2b3c4d --json")]
    Show(Id),
    /// Follow a move until it ends
    #[command(after_help = "Example:\n  blockctl job watch m1a2b3c4d")]
    Watch(Id),
    /// Stop copying for now; the guest goes on
    #[command(after_help = "Example:\n  blockctl job pause m1a2b3c4d")]
    Pause(Id),
    /// Go on with a paused move
    #[command(after_help = "Example:\n  blockctl job resume m1a2b3c4d")]
    Resume(Id),
    /// Let the disk continue on the target, for a move that was started with `--switch manual`
    #[command(after_help = "Example:\n  blockctl job switch m1a2b3c4d")]
    Switch(Id),
    /// Give a move up; the disk stays on its source
    #[command(after_help = "Example:\n  blockctl job cancel m1a2b3c4d")]
    Cancel(Id),
    /// Change a running move
    #[command(after_help = "Examples:\n  blockctl job set m1a2b3c4d --bandwidth 200M
  blockctl job set m1a2b3c4d --bandwidth none
  blockctl job set m1a2b3c4d --max-guest-p99 5ms")]
    #[command(group(clap::ArgGroup::new("setting").required(true).multiple(true)))]
    Set {
        #[command(flatten)]
        job: Id,
        /// Copy and verify at most this much a second; `none` takes the limit away
        #[arg(long, value_name = "RATE", value_parser = parse_limit, group = "setting")]
        bandwidth: Option<u64>,
        /// Copy and verify as fast as 99 of 100 of the guest's requests end within this time; `none` takes the budget away
        #[arg(long, value_name = "TIME", value_parser = parse_budget, group = "setting")]
        max_guest_p99: Option<u64>,
    },
    /// Show what a finished move copied, verified and deleted
    #[command(after_help = "Example:\n  blockctl job receipt m1a2b3c4d")]
    Receipt(Id),
}

#[derive(Debug, Args)]
pub(crate) struct Id {
    /// The move's id, as `blockctl job list` shows it
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    job: String,
}

/// `blockctl job ...`
pub(crate) async fn run(command: Command, client: &Client, screen: Screen) -> Result<Exit, Failure> {
    match command {
        Command::List => {
            let jobs = client.jobs().await?;
            screen.show(&json!({ "jobs": jobs }), |_| table(&jobs))?;
        }
        Command::Show(id) => screen.show(&client.job(&id.job).await?, details)?,
        Command::Watch(id) => {
            let job = client.job(&id.job).await?;
            return watch::until_over(client, vec![job], screen).await;
        }
        Command::Pause(id) => verb(client, &id, "pause", screen).await?,
        Command::Resume(id) => verb(client, &id, "resume", screen).await?,
        Command::Switch(id) => verb(client, &id, "switch", screen).await?,
        Command::Cancel(id) => verb(client, &id, "cancel", screen).await?,
        Command::Set { job, bandwidth, max_guest_p99 } => {
            let settings = JobSettings { bandwidth, max_guest_p99_us: max_guest_p99 };
            let job = client.set_job(&job.job, &settings).await?;
            screen.show(&job, |job| told(&job.job, &settings))?;
        }
        Command::Receipt(id) => screen.show(&client.receipt(&id.job).await?, receipt)?,
    }
    Ok(Exit::Done)
}

async fn verb(client: &Client, id: &Id, verb: &str, screen: Screen) -> Result<(), Failure> {
    let job = client.job_verb(&id.job, verb).await?;
    screen.show(&job, |job| {
        let (reached, asked) = match verb {
            "pause" => (job.state == "paused", "will pause"),
            "resume" => (job.state != "paused", "will go on"),
            "switch" => (matches!(job.state.as_str(), "committed" | "done"), "switches over"),
            _ => (job.is_over(), "is being cancelled"),
        };
        match reached {
            true => format!("{} is {}", job.job, job.state),
            // The daemon has taken the order and carries it out as soon as it can.
            false => format!("{} {asked}; for now it is {}", job.job, job.state),
        }
    })
}

/// What a move was told, a line each.
fn told(job: &str, settings: &JobSettings) -> String {
    let bandwidth = settings.bandwidth.map(|limit| match limit {
        0 => format!("{job} may use all the bandwidth there is"),
        limit => format!("{job} uses at most {}", render::rate(limit)),
    });
    let budget = settings.max_guest_p99_us.map(|budget_us| match budget_us {
        0 => format!("{job} has no latency budget to keep to"),
        us => format!("{job} is to keep the guest's p99 within {}", render::micros(us as f64)),
    });
    bandwidth.into_iter().chain(budget).collect::<Vec<_>>().join("\n")
}

fn table(jobs: &[Job]) -> String {
    if jobs.is_empty() {
        return "no moves; start one with `blockctl move`".into();
    }
    let mut table = Table::new(&["JOB", "DISK", "STATE", ">COPIED", ">LEFT", ">RATE", "TARGET"]);
    for job in jobs {
        let rate = if job.is_over() { "-".into() } else { render::rate(job.rate_bytes_per_s) };
        table.row([
            job.job.clone(),
            job.disks.join(", "),
            job.state.clone(),
            render::size(job.bytes_copied),
            render::size(job.bytes_dirty),
            rate,
            job.target.join(", "),
        ]);
    }
    table.render()
}

fn details(job: &Job) -> String {
    let mut facts = Facts::new();
    let state = if job.ready { "synced, a switch takes effect at once" } else { job.state.as_str() };
    facts.add("job", &job.job).add("disk", job.disks.join(", ")).add("state", state);
    if let Some(error) = &job.error {
        facts.add("reason", &error.message);
    }
    if !job.is_over() {
        facts
            .add("rate", render::rate(job.rate_bytes_per_s))
            .add("time left", render::duration(std::time::Duration::from_secs(job.eta_s)))
            .add("dirty", render::size(job.bytes_dirty));
        if let Some(latency) = watch::guest_latency(job) {
            facts.add("guest's p99", latency);
        }
    }
    watch::add_summary(&mut facts, job);
    facts.render()
}

fn receipt(receipt: &Receipt) -> String {
    let mut facts = Facts::new();
    let [before, after] = receipt.generation;
    facts
        .add("job", &receipt.job.job)
        .add("disk", receipt.job.disks.join(", "))
        .add("state", &receipt.job.state)
        .add("started", &receipt.started)
        .add("ended", &receipt.ended)
        .add("generation", format!("{before} before, {after} after"));
    watch::add_summary(&mut facts, &receipt.job);
    facts.add("journal", format!("SHA-256 {}", receipt.journal_sha256));
    facts.render()
}
