//! `demo`: the whole story on one machine, without a virtual machine.
//!
//! ```text
//!   daemon (a blockd of its own) ◄── API ── this module ──► guest (threads, over vhost-user)
//!                                                             └─ pattern: what every byte must be
//! ```

mod daemon;
mod guest;
mod latency;
mod memory;
mod pattern;
mod report;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockd_api::{AttachRequest, Job, MoveRequest};
use clap::Args as ClapArgs;
use formats::{CreateOptions, Format, OpenOptions};
use nix::sys::statvfs::statvfs;
use tempfile::TempDir;

use self::daemon::Daemon;
use self::guest::{CHUNK, Faults, Guest, Load, Measured, Moment, SLOTS};
use self::memory::Device;
use self::pattern::{BLOCK, Content, Random};
use self::report::{GuestReport, Report};
use crate::failure::{Exit, Failure};
use crate::interrupt::{Cancel, interrupted};
use crate::render::{self, Screen};
use crate::units::parse_nonzero_size;
use crate::watch;

/// How long the guest runs before and after the move, to compare with.
const AROUND: Duration = Duration::from_secs(2);
/// The smallest disk on which anything can be seen.
const MIN_SIZE: u64 = 16 << 20;
/// Space wanted besides the two images.
const SPARE_BYTES: u64 = 64 << 20;
/// How long a guest's connecting may take.
const CONNECT: Duration = Duration::from_secs(15);
/// Every fourth of so many parts of the disk is left untouched, to show that it takes no space and is not copied.
const PARTS: u64 = 16;
/// The longest path that fits in a Unix socket's address.
const MAX_SOCKET_PATH: usize = 107;

/// Show the whole story on this machine: serve a disk, use it, move it live, verify every byte
///
/// Creates a VHDX, serves it with a blockd of its own, fills it through vhost-user as a virtual machine would, keeps
/// reading and writing (each read verified) while the disk is moved to a VHD in another folder, then reads every byte
/// back. Everything is in a temporary folder and is removed at the end, also after a failure or ^C.
#[derive(Debug, ClapArgs)]
#[command(after_help = "Examples:\n  blockctl demo\n  blockctl demo --size 4G --dir /mnt/fast")]
pub(crate) struct Args {
    /// Size of the disk
    #[arg(long, default_value = "1G", value_parser = parse_nonzero_size)]
    size: u64,
    /// Where to make the temporary folder; the disk needs space twice while it moves [default: the system's]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Write the same content as the run that printed this seed
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

/// `blockctl demo`
pub(crate) async fn run(args: Args, screen: Screen) -> Result<Exit, Failure> {
    let cancel = Cancel::default();
    let load = Load::default();
    let result = tokio::select! {
        result = story(&args, screen, &cancel, &load) => result,
        caught = interrupted() => {
            caught.and(Err(Failure::cancelled("the demo was cancelled; everything that it made is removed")))
        }
    };
    // Threads of the guest may still run where the story was broken off.
    cancel.set();
    load.stop();
    let report = result?;
    screen.show(&report, Report::render)?;
    Ok(if report.ok { Exit::Done } else { Exit::Failed })
}

/// The folder of a run. What is in it goes with it.
struct Stage {
    folder: TempDir,
    source: PathBuf,
    target_folder: PathBuf,
    size: u64,
    seed: u64,
}

impl Stage {
    fn set_up(args: &Args) -> Result<Self, Failure> {
        let size = args.size.next_multiple_of(1 << 20);
        if size < MIN_SIZE {
            return Err(Failure::usage(format!(
                "--size {} is too small; take 16M or more",
                render::size(args.size)
            )));
        }
        let parent = match &args.dir {
            Some(dir) => std::path::absolute(dir).map_err(|e| Failure::io(dir.display(), &e))?,
            None => std::env::temp_dir(),
        };
        refuse_little_space(&parent, size)?;
        let failed = |e: std::io::Error| Failure::io(parent.display(), &e);
        let folder = tempfile::Builder::new().prefix("blockd-demo-").tempdir_in(&parent).map_err(failed)?;
        let path = folder.path().to_owned();
        if path.join("disk.sock").as_os_str().len() > MAX_SOCKET_PATH {
            let message =
                format!("{}: too long a path for a socket; name a shorter one with --dir", path.display());
            return Err(Failure::new("invalid", message));
        }
        for name in ["source", "target"] {
            std::fs::create_dir(path.join(name)).map_err(failed)?;
        }
        let seed = args.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0);
        Ok(Self {
            folder,
            source: path.join("source/disk.vhdx"),
            target_folder: path.join("target"),
            size,
            seed,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn target(&self) -> PathBuf {
        self.target_folder.join("disk.vhd")
    }

    /// Which chunks the guest fills.
    fn is_filled(&self) -> impl Fn(u64) -> bool + Send + 'static {
        let part = (self.size / CHUNK as u64).div_ceil(PARTS);
        move |chunk| chunk / part % 4 != 3
    }
}

fn refuse_little_space(parent: &Path, size: u64) -> Result<(), Failure> {
    let stat = statvfs(parent).map_err(|e| Failure::io(parent.display(), &e.into()))?;
    let free = (stat.blocks_available()).saturating_mul(stat.fragment_size());
    let needed = size.saturating_mul(2).saturating_add(SPARE_BYTES);
    if free >= needed {
        return Ok(());
    }
    Err(Failure::new(
        "no-space",
        format!(
            "{} has {} free, and the demo needs {}; choose a smaller --size or another --dir",
            parent.display(),
            render::size(free),
            render::size(needed)
        ),
    ))
}

/// The story: everything that it starts ends when it is dropped.
async fn story(args: &Args, screen: Screen, cancel: &Cancel, load: &Load) -> Result<Report, Failure> {
    let program = daemon::find_program()?;
    let stage = Stage::set_up(args)?;
    screen.text(&format!(
        "A disk of {}, in {}, which is removed at the end (seed {})",
        render::size(stage.size),
        stage.folder.path().display(),
        stage.seed
    ))?;
    let daemon = Daemon::start(&program, stage.folder.path(), &stage.path("api.sock")).await?;
    let told = act(&stage, &daemon, screen, cancel, load).await;
    told.map_err(|e| match e.kind.as_str() {
        "cancelled" | "broken-pipe" => e,
        _ => Failure { message: format!("{e}; the end of blockd's log:\n{}", daemon.last_words()), ..e },
    })
}

async fn act(
    stage: &Stage,
    daemon: &Daemon,
    screen: Screen,
    cancel: &Cancel,
    load: &Load,
) -> Result<Report, Failure> {
    let guest = start_disk(stage, daemon, screen).await?;

    let (guest, filled_bytes, time) = fill(stage, guest, screen, cancel).await?;
    let fill_bytes_per_s = per_second(filled_bytes, time);
    screen.text(&format!(
        "The guest has written {} at {}, and left the rest untouched",
        render::size(filled_bytes),
        render::rate(fill_bytes_per_s)
    ))?;

    let (guest, measured, job) = move_under_load(stage, daemon, guest, screen, load).await?;

    let (guest, verified_bytes, time) = verify(guest, screen, cancel, stage.size).await?;
    let mut report = Report {
        ok: false,
        size_bytes: stage.size,
        seed: stage.seed,
        filled_bytes,
        fill_bytes_per_s,
        job,
        guest: GuestReport::new(&measured),
        verified_bytes,
        verify_bytes_per_s: per_second(verified_bytes, time),
        mismatches: 0,
        errors: 0,
        source_deleted: !stage.source.exists(),
        target_sound: false,
        faults: Vec::new(),
    };
    report.add_faults("the guest's disk", &guest.faults);
    let content = guest.leave();
    daemon.client.detach("demo", false).await?;
    examine_target(stage, content, cancel, &mut report).await?;
    report.conclude();
    Ok(report)
}

async fn start_disk(stage: &Stage, daemon: &Daemon, screen: Screen) -> Result<Guest, Failure> {
    formats::create(&stage.source, &CreateOptions::new(Format::Vhdx, stage.size))?;
    let socket = stage.path("disk.sock");
    let request = AttachRequest {
        id: "demo".into(),
        image: stage.source.display().to_string(),
        socket: socket.display().to_string(),
        format: None,
        queues: 1,
        io_threads: 1,
        read_only: false,
        parents: Vec::new(),
        generation: None,
    };
    daemon.client.attach(&request).await?;
    let connecting = tokio::task::spawn_blocking(move || Device::connect(&socket, SLOTS, CHUNK));
    let device = match tokio::time::timeout(CONNECT, connecting).await {
        Ok(Ok(connected)) => connected.map_err(|e| Failure::io("the guest can't connect to its disk", &e))?,
        Ok(Err(e)) => return Err(Failure::new("internal", e.to_string())),
        Err(_) => return Err(Failure::new("io", "blockd does not answer the guest on the disk's socket")),
    };
    let size = device.size_bytes().map_err(|e| Failure::io("the disk's configuration", &e))?;
    if size != stage.size {
        let message = format!("the guest sees a disk of {size} bytes instead of {}", stage.size);
        return Err(Failure::new("internal", message));
    }
    screen.text("blockd serves it as a dynamic VHDX; the guest is connected over vhost-user")?;
    Ok(Guest::new(device, Content::new(stage.seed, (stage.size / BLOCK as u64) as usize)))
}

/// Runs the guest's work on a thread of its own.
async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let joined = tokio::task::spawn_blocking(work).await;
    joined.unwrap_or_else(|e| Err(Failure::new("internal", format!("the guest's thread died: {e}"))))
}

async fn fill(
    stage: &Stage,
    mut guest: Guest,
    screen: Screen,
    cancel: &Cancel,
) -> Result<(Guest, u64, Duration), Failure> {
    let bar = screen.bar(stage.size / 4 * 3);
    bar.set_prefix("filling");
    let (wanted, cancel) = (stage.is_filled(), cancel.clone());
    on_thread(move || {
        let started = Instant::now();
        let written = guest.fill(wanted, &cancel, |bytes| bar.set_position(bytes))?;
        bar.finish_and_clear();
        Ok((guest, written, started.elapsed()))
    })
    .await
}

async fn verify(
    mut guest: Guest,
    screen: Screen,
    cancel: &Cancel,
    size: u64,
) -> Result<(Guest, u64, Duration), Failure> {
    let bar = screen.bar(size);
    bar.set_prefix("reading");
    let cancel = cancel.clone();
    on_thread(move || {
        let started = Instant::now();
        let read = guest.verify(&cancel, |bytes| bar.set_position(bytes))?;
        bar.finish_and_clear();
        Ok((guest, read, started.elapsed()))
    })
    .await
}

/// Moves the disk while the guest uses it, with some time before and after to compare with.
async fn move_under_load(
    stage: &Stage,
    daemon: &Daemon,
    mut guest: Guest,
    screen: Screen,
    load: &Load,
) -> Result<(Guest, Measured, Job), Failure> {
    let (theirs, mut random) = (load.clone(), Random::new(stage.seed ^ 1));
    let busy = on_thread(move || {
        let measured = guest.keep_busy(&theirs, &mut random)?;
        Ok((guest, measured))
    });
    let moving = async {
        load.now(Moment::Before);
        tokio::time::sleep(AROUND).await;
        screen.text(&format!("Moving it to {}, while the guest goes on", stage.target().display()))?;
        load.now(Moment::During);
        let job = daemon.client.start_move(&request(stage)).await?;
        let job = watch::one(&daemon.client, job, screen).await?;
        load.now(Moment::After);
        tokio::time::sleep(AROUND).await;
        load.stop();
        Ok::<Job, Failure>(job)
    };
    // Where one of them fails, the other is not waited for.
    let ((guest, measured), job) = tokio::try_join!(busy, moving)?;
    if job.state != "done" {
        let reason = job.error.map_or_else(|| "for no stated reason".to_owned(), |e| e.message);
        return Err(Failure::new("state", format!("the move ended as {}: {reason}", job.state)));
    }
    Ok((guest, measured, job))
}

fn request(stage: &Stage) -> MoveRequest {
    MoveRequest {
        disks: vec!["demo".into()],
        to: stage.target().display().to_string(),
        format: Some("vhd".into()),
        image_type: None,
        block_size: None,
        mirror: "after-copy".into(),
        switch: "auto".into(),
        verify: "full".into(),
        bandwidth: None,
        max_guest_p99_us: None,
        keep_source: false,
        copy_only: false,
        flatten: false,
        files: Vec::new(),
        // Nobody is there to mend and resume it.
        on_target_error: "abort".into(),
    }
}

/// Once nobody serves it any more: the target's file must be sound and hold every byte.
async fn examine_target(
    stage: &Stage,
    content: Content,
    cancel: &Cancel,
    report: &mut Report,
) -> Result<(), Failure> {
    let (target, cancel) = (stage.target(), cancel.clone());
    let (sound, faults) = on_thread(move || {
        let sound = formats::check(&target, None, false)?.is_sound();
        let faults = compare_file(&target, &content, &cancel)?;
        Ok((sound, faults))
    })
    .await?;
    report.target_sound = sound && faults.mismatches == 0;
    report.add_faults("the target's file", &faults);
    Ok(())
}

fn compare_file(target: &Path, content: &Content, cancel: &Cancel) -> Result<Faults, Failure> {
    let image = formats::open(target, &OpenOptions::read_only())?;
    let mut faults = Faults::default();
    let (mut data, mut scratch) = (vec![0; CHUNK], [0; BLOCK]);
    for offset in (0..content.blocks() * BLOCK as u64).step_by(CHUNK) {
        if cancel.is_set() {
            return Err(Failure::cancelled("the demo was cancelled"));
        }
        formats::read_payload(&*image, offset, &mut data)?;
        for (block, data) in (offset / BLOCK as u64..).zip(data.chunks_exact(BLOCK)) {
            faults.compare(content, block, data, &mut scratch);
        }
    }
    Ok(faults)
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    (bytes as f64 / time.as_secs_f64().max(1e-9)) as u64
}
