//! `disk`: what a daemon serves.

use std::path::PathBuf;

use blockd_api::{
    AttachRequest, DiskInfo, Handover, MergeRequest, Percentiles, ResizeRequest, SnapshotRequest,
};
use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand};
use serde_json::json;

use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::render::{self, Facts, Screen, Table, yes};
use crate::{paths, units, watch};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Attach(AttachArgs),
    /// List the disks
    #[command(after_help = "Example:\n  blockctl disk list")]
    List,
    /// Show one disk with its counters
    #[command(after_help = "Example:\n  blockctl disk show vm1 --json")]
    Show(Id),
    /// Stop serving a disk; its image stays
    #[command(after_help = "Examples:\n  blockctl disk detach vm1\n  blockctl disk detach vm1 --force")]
    Detach {
        #[command(flatten)]
        id: Id,
        /// Even while a guest uses it or a move is under way (the move is cancelled)
        #[arg(long)]
        force: bool,
    },
    /// Stop serving a disk so that another daemon can take it over, for one when its machine moves there
    #[command(after_help = "Examples:
  blockctl disk release vm1
  blockctl disk release vm1 --wait 30s
  blockctl disk release vm1 --json

The answer has what the other daemon's `disk attach` takes, its --generation for one.")]
    Release {
        #[command(flatten)]
        id: Id,
        /// Even while a guest uses it; a move has to be over or committed all the same
        #[arg(long)]
        force: bool,
        /// How long to wait for a move to be committed [default: not at all]
        #[arg(long, value_name = "TIME", value_parser = units::parse_time)]
        wait: Option<u64>,
    },
    /// Serve a disk again that was released here, if nobody has taken it over
    #[command(after_help = "Example:\n  blockctl disk reclaim vm1")]
    Reclaim(Id),
    /// Change the size of a disk, also while a guest uses it
    #[command(
        after_help = "Examples:\n  blockctl disk resize vm1 20G\n  blockctl disk resize vm1 5G --shrink"
    )]
    Resize {
        #[command(flatten)]
        id: Id,
        /// The new size: bytes, or a whole number with K, M, G or T
        #[arg(value_parser = units::parse_nonzero_size)]
        size: u64,
        /// Allow a smaller size; what is cut off must not hold anything
        #[arg(long)]
        shrink: bool,
    },
    /// Let a disk go on in a new differencing image; the one so far stays as it is now
    #[command(after_help = "Example:\n  blockctl disk snapshot vm1 --to /images/vm1-tuesday.vhdx")]
    Snapshot {
        #[command(flatten)]
        id: Id,
        /// The new image, which must not exist
        #[arg(long, value_name = "PATH")]
        to: PathBuf,
    },
    /// Fold the newest differencing image of a disk into its parent, while the guest writes
    #[command(after_help = "Examples:
  blockctl disk merge vm1
  blockctl disk merge vm1 --into /images/vm1.vhdx")]
    Merge {
        #[command(flatten)]
        id: Id,
        /// The image of the chain that takes all newer ones [default: the parent of the newest]
        #[arg(long, value_name = "PATH")]
        into: Option<PathBuf>,
        /// Copy and verify at most this much a second
        #[arg(long, value_name = "RATE", value_parser = units::parse_rate)]
        bandwidth: Option<u64>,
        /// Copy and verify as fast as 99 of 100 of the guest's requests end within this time, down to 8 MiB/s
        #[arg(long, value_name = "TIME", value_parser = units::parse_time)]
        max_guest_p99: Option<u64>,
        /// How both are compared before the newest is deleted
        #[arg(long, value_name = "HOW", value_parser = ["none", "sample", "full"], default_value = "full")]
        verify: String,
        /// Print the job's id and return
        #[arg(long)]
        detach: bool,
    },
    /// Make everything written to a disk so far durable
    #[command(after_help = "Example:\n  blockctl disk flush vm1")]
    Flush(Id),
}

#[derive(Debug, Args)]
pub(crate) struct Id {
    /// The disk's name
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    id: String,
}

/// Serve an image as a disk
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  blockctl disk attach vm1 /images/vm1.vhdx --socket /run/vm1.sock
  blockctl disk attach iso /images/install.img --socket /run/iso.sock --read-only
  blockctl disk attach vm2 /images/vm2.vhdx --socket /run/vm2.sock --parents /images/bases
  blockctl disk attach vm1 /shared/vm1.vhdx --socket /run/vm1.sock --generation 7")]
pub(crate) struct AttachArgs {
    #[command(flatten)]
    id: Id,
    /// The image
    image: PathBuf,
    /// The vhost-user socket to listen on
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// The image's format [default: from its name]
    #[arg(long, value_parser = ["raw", "vhd", "vhdx"])]
    format: Option<String>,
    /// Most queues that the guest may use
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    /// Threads that serve the queues, at most as many as queues
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    io_threads: u16,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// A folder in which parents of the image may be opened, or a file that may be one; repeatable
    #[arg(long, value_name = "DIR")]
    parents: Vec<PathBuf>,
    /// Take the image over from another daemon: the number that its `release` has answered
    #[arg(long, value_name = "N")]
    generation: Option<u64>,
}

/// `blockctl disk ...`
pub(crate) async fn run(command: Command, client: &Client, screen: Screen) -> Result<Exit, Failure> {
    match command {
        Command::Attach(args) => {
            let disk = client.attach(&request(args)?).await?;
            screen.show(&disk, |disk| {
                let size = render::size(disk.size_bytes);
                format!("{} serves {} ({} {size}) at {}", disk.id, disk.image, disk.format, disk.socket)
            })?;
        }
        Command::List => {
            let disks = client.disks().await?;
            screen.show(&json!({ "disks": disks }), |_| table(&disks))?;
        }
        Command::Show(id) => screen.show(&client.disk(&id.id).await?, details)?,
        Command::Detach { id, force } => {
            client.detach(&id.id, force).await?;
            screen.show(&json!({ "id": id.id, "detached": true }), |_| format!("{} is detached", id.id))?;
        }
        Command::Release { id, force, wait } => {
            let handover = client.release(&id.id, force, wait.unwrap_or(0).div_ceil(1000)).await?;
            screen.show(&handover, released)?;
        }
        Command::Reclaim(id) => {
            screen.show(&client.reclaim(&id.id).await?, |disk| {
                format!("{} serves {} again, with generation {}", disk.id, disk.image, disk.generation)
            })?;
        }
        Command::Resize { id, size, shrink } => {
            let request = ResizeRequest { size_bytes: size, shrink };
            let resized = client.resize(&id.id, &request).await?;
            screen.show(&resized, |resized| {
                let size = render::size_exact(resized.disk.size_bytes);
                let guest = if resized.guest_told {
                    "the guest was told"
                } else {
                    "a guest sees it when it next connects, for no front end listens for changes"
                };
                format!("{} has {size} now; {guest}", resized.disk.id)
            })?;
        }
        Command::Snapshot { id, to } => {
            let request = SnapshotRequest { to: paths::for_daemon(&to)? };
            let disk = client.snapshot(&id.id, &request).await?;
            screen.show(&disk, |disk| {
                let parent = disk.chain.get(1).cloned().unwrap_or_default();
                format!("{} goes on in {}; {parent} stays as it is now", disk.id, disk.image)
            })?;
        }
        Command::Merge { id, into, bandwidth, max_guest_p99, verify, detach } => {
            let into = into.as_deref().map(paths::for_daemon).transpose()?;
            let request = MergeRequest { into, bandwidth, max_guest_p99_us: max_guest_p99, verify };
            let job = client.merge(&id.id, &request).await?;
            if detach {
                screen.show(&job, |job| job.job.clone())?;
            } else {
                return watch::until_over(client, vec![job], screen).await;
            }
        }
        Command::Flush(id) => {
            client.flush(&id.id).await?;
            screen.show(&json!({ "id": id.id, "flushed": true }), |_| format!("{} is flushed", id.id))?;
        }
    }
    Ok(Exit::Done)
}

fn request(args: AttachArgs) -> Result<AttachRequest, Failure> {
    if args.io_threads > args.queues {
        return Err(Failure::usage(format!(
            "--io-threads {} is more than --queues {}; a queue is served by one thread",
            args.io_threads, args.queues
        )));
    }
    Ok(AttachRequest {
        id: args.id.id,
        image: paths::for_daemon(&args.image)?,
        socket: paths::for_daemon(&args.socket)?,
        format: args.format,
        queues: args.queues,
        io_threads: args.io_threads,
        read_only: args.read_only,
        parents: args.parents.iter().map(|path| paths::for_daemon(path)).collect::<Result<_, _>>()?,
        generation: args.generation,
    })
}

/// What to do with a disk that was released.
fn released(handover: &Handover) -> String {
    let Handover { id, image, format, queues, io_threads, generation, .. } = handover;
    let mut attach = format!(
        "blockctl disk attach {id} {image} --socket SOCKET --format {format} --generation {generation}"
    );
    if *queues > 1 {
        attach.push_str(&format!(" --queues {queues}"));
    }
    if *io_threads > 1 {
        attach.push_str(&format!(" --io-threads {io_threads}"));
    }
    if handover.read_only {
        attach.push_str(" --read-only");
    }
    for parent in handover.chain.iter().skip(1) {
        attach.push_str(&format!(" --parents {parent}"));
    }
    format!(
        "{id} is released; another daemon takes it over with\n  {attach}\nand this one takes it back with\n  blockctl disk reclaim {id}"
    )
}

fn state(disk: &DiskInfo) -> &'static str {
    match (&disk.failed, disk.connected) {
        _ if disk.released => "released",
        (Some(_), _) => "failed",
        (None, true) => "in use",
        (None, false) => "waiting",
    }
}

fn table(disks: &[DiskInfo]) -> String {
    if disks.is_empty() {
        return "no disks; attach one with `blockctl disk attach`".into();
    }
    let mut table = Table::new(&["ID", "STATE", ">SIZE", "FORMAT", "JOB", "IMAGE"]);
    for disk in disks {
        table.row([
            disk.id.clone(),
            state(disk).into(),
            render::size(disk.size_bytes),
            disk.format.clone(),
            disk.job.clone().unwrap_or_else(|| "-".into()),
            disk.image.clone(),
        ]);
    }
    table.render()
}

fn details(disk: &DiskInfo) -> String {
    let mut facts = Facts::new();
    facts
        .add("id", &disk.id)
        .add("image", &disk.image)
        .add("parents", disk.chain.iter().skip(1).cloned().collect::<Vec<_>>().join(", "))
        .add("format", format!("{} {}", disk.image_type, disk.format))
        .add("size", render::size_exact(disk.size_bytes))
        .add("sector size", disk.sector_size.to_string())
        .add("socket", &disk.socket)
        .add("queues", disk.queues.to_string())
        .add("read-only", yes(disk.read_only))
        .add("connected", yes(disk.connected))
        .add("generation", disk.generation.to_string())
        .add("released", if disk.released { "yes, for another daemon" } else { "" })
        .add("job", disk.job.clone().unwrap_or_default())
        .add("failed", disk.failed.clone().unwrap_or_default())
        .add("reads", format!("{} ({})", disk.reads, render::size(disk.read_bytes)))
        .add("writes", format!("{} ({})", disk.writes, render::size(disk.written_bytes)))
        .add("flushes", disk.flushes.to_string())
        .add("discards", disk.discards.to_string())
        .add("errors", disk.errors.to_string())
        .add("read latency", latency(&disk.latency_us.read))
        .add("write latency", latency(&disk.latency_us.write));
    facts.render()
}

fn latency(p: &Percentiles) -> String {
    let [p50, p99, p999, max] = [p.p50, p.p99, p.p999, p.max].map(render::micros);
    format!("p50 {p50}, p99 {p99}, p99.9 {p999}, longest {max}")
}
