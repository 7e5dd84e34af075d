//! `move`: a disk through its daemon while the guest runs, or an image that nobody serves.

use std::path::{Path, PathBuf};

use blockd_api::{DiskInfo, FilePlace, MoveRequest};
use clap::Args as ClapArgs;
use clap::builder::NonEmptyStringValueParser;

use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::render::Screen;
use crate::units::{parse_block_size, parse_rate, parse_time};
use crate::{offline, paths, watch};

/// Move disks while their guests run, or an image that no disk serves
#[derive(Debug, ClapArgs)]
#[command(after_help = "Examples:
  blockctl move vm1 --to /mnt/faster/
  blockctl move vm1 --to /mnt/vm1.vhd --bandwidth 200M --switch manual
  blockctl move vm1 --to /mnt/faster/ --max-guest-p99 5ms
  blockctl move vm1 --to /mnt/faster/ --disk /images/golden.vhdx=/images/golden.vhdx
  blockctl move ./old.vhdx --to /mnt/faster/
  blockctl move ./child.vhdx --to /mnt/faster/ --parents ./base")]
pub(crate) struct Args {
    /// Disks by name, or images by path
    #[arg(required = true, value_name = "ID|IMAGE", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) what: Vec<String>,
    #[command(flatten)]
    pub(crate) options: Options,
    /// Print the job's id and return
    #[arg(long)]
    detach: bool,
}

/// What `move` and `plan` share.
#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct Options {
    /// The new file, or a folder, in which names are kept
    #[arg(long, value_name = "WHERE")]
    pub(crate) to: PathBuf,
    /// Format of the target [default: from its name, else the source's]
    #[arg(long, value_parser = ["raw", "vhd", "vhdx"])]
    pub(crate) format: Option<String>,
    /// Type of the target [default: the source's]
    #[arg(long = "type", value_name = "TYPE", value_parser = ["dynamic", "fixed"])]
    pub(crate) image_type: Option<String>,
    /// Block size of the target
    #[arg(long, value_name = "SIZE", value_parser = parse_block_size)]
    pub(crate) block_size: Option<u32>,
    /// Format of a source that no daemon serves [default: from its name]
    #[arg(long, value_name = "FORMAT", value_parser = ["raw", "vhd", "vhdx"])]
    pub(crate) from_format: Option<String>,
    /// Copy and verify at most this much a second
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(crate) bandwidth: Option<u64>,
    /// Copy and verify as fast as 99 of 100 of the guest's requests end within this time, down to 8 MiB/s
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(crate) max_guest_p99: Option<u64>,
    /// When the guest's writes begin to go to both [default: after-copy]
    #[arg(long, value_name = "WHEN", value_parser = ["after-copy", "from-start"])]
    pub(crate) mirror: Option<String>,
    /// `manual` waits in `synced` for `blockctl job switch` [default: auto]
    #[arg(long, value_name = "HOW", value_parser = ["auto", "manual"])]
    pub(crate) switch: Option<String>,
    /// How the target is compared before the source is deleted
    #[arg(long, value_name = "HOW", value_parser = ["none", "sample", "full"], default_value = "full")]
    pub(crate) verify: String,
    /// Leave the source where it is
    #[arg(long)]
    pub(crate) keep_source: bool,
    /// A copy at one point in time; the disk stays where it is
    #[arg(long)]
    pub(crate) copy_only: bool,
    /// Make one image of a chain; its parents stay where they are
    #[arg(long)]
    pub(crate) flatten: bool,
    /// Where one file of a chain goes, all others to --to; a file that goes to itself stays
    #[arg(long = "disk", value_name = "FILE=WHERE", value_parser = parse_place)]
    pub(crate) files: Vec<(PathBuf, PathBuf)>,
    /// A folder, or a file, in which parents of an image that no daemon serves may be found; repeatable
    #[arg(long, value_name = "DIR")]
    pub(crate) parents: Vec<PathBuf>,
    /// What to do when the target fails [default: pause]
    #[arg(long, value_name = "WHAT", value_parser = ["pause", "retry", "abort"])]
    pub(crate) on_target_error: Option<String>,
}

/// What an argument of `move` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Subject {
    /// A disk of the daemon.
    Disk(String),
    /// A file that no daemon serves, as far as the one that was asked knows.
    Image(PathBuf),
}

/// `blockctl move`
pub(crate) async fn run(
    args: &Args,
    client: Result<Client, Failure>,
    screen: Screen,
) -> Result<Exit, Failure> {
    check_target(&args.what, &args.options.to)?;
    let mut ids = Vec::new();
    let mut images = Vec::new();
    for subject in subjects(&args.what, client.as_ref()).await? {
        match subject {
            Subject::Disk(id) => ids.push(id),
            Subject::Image(path) => images.push(path),
        }
    }
    if !images.is_empty() {
        refuse_live_options(args)?;
    }
    for image in images {
        offline::run(image, &args.options, screen).await?;
    }
    if ids.is_empty() {
        return Ok(Exit::Done);
    }
    move_disks(args, &ids, &client?, screen).await
}

async fn move_disks(args: &Args, ids: &[String], client: &Client, screen: Screen) -> Result<Exit, Failure> {
    let mut jobs = Vec::new();
    for id in ids {
        match client.start_move(&request(id, &args.options)?).await {
            Ok(job) => jobs.push(job),
            Err(e) if jobs.is_empty() => return Err(e),
            Err(e) => {
                let started: Vec<&str> = jobs.iter().map(|job| job.job.as_str()).collect();
                let message = format!("{e}; already started and going on: {}", started.join(", "));
                return Err(Failure { message, ..e });
            }
        }
    }
    if args.detach {
        for job in &jobs {
            screen.show(job, |job| job.job.clone())?;
        }
        return Ok(Exit::Done);
    }
    watch::until_over(client, jobs, screen).await
}

/// Refuses targets that can't be meant.
pub(crate) fn check_target(what: &[String], to: &Path) -> Result<(), Failure> {
    if to.to_string_lossy().contains("://") {
        let message = format!("{}: this version moves to files and folders of this host only", to.display());
        return Err(Failure::new("unsupported", message));
    }
    if what.len() > 1 && !to.is_dir() {
        return Err(Failure::usage(format!(
            "{}: several disks can't become one file; name a folder that exists with --to",
            to.display()
        )));
    }
    Ok(())
}

/// Tells disks from images. A disk's name wins; then whatever holds a `/` or is a file is an image.
pub(crate) async fn subjects(
    what: &[String],
    client: Result<&Client, &Failure>,
) -> Result<Vec<Subject>, Failure> {
    let disks = match client {
        Ok(client) => client.disks().await,
        Err(e) => Err(e.clone()),
    };
    what.iter().map(|word| subject(word, disks.as_deref())).collect()
}

fn subject(word: &str, disks: Result<&[DiskInfo], &Failure>) -> Result<Subject, Failure> {
    let is_path = word.contains('/') || Path::new(word).is_file();
    let served = match disks {
        Ok(disks) => disks,
        // Without a daemon there is still work to do on files; anything else about it must not be passed over.
        Err(e) if is_path && matches!(e.kind.as_str(), "unreachable" | "usage") => &[],
        Err(e) => return Err(e.clone()),
    };
    if !is_path || served.iter().any(|disk| disk.id == word) {
        return Ok(Subject::Disk(word.to_owned()));
    }
    let path = Path::new(word);
    for disk in served {
        let files = disk.chain.iter().chain(std::iter::once(&disk.image));
        if files.into_iter().any(|file| paths::same_file(Path::new(file), path)) {
            let message =
                format!("{word} is served as disk `{0}`; move it with `blockctl move {0}`", disk.id);
            return Err(Failure::new("busy", message));
        }
    }
    Ok(Subject::Image(path.to_owned()))
}

fn refuse_live_options(args: &Args) -> Result<(), Failure> {
    let options = &args.options;
    let given = [
        ("--mirror", options.mirror.is_some()),
        ("--switch", options.switch.is_some()),
        ("--max-guest-p99", options.max_guest_p99.is_some()),
        ("--on-target-error", options.on_target_error.is_some()),
        ("--detach", args.detach),
    ];
    match given.into_iter().find(|(_, given)| *given) {
        Some((name, _)) => Err(Failure::usage(format!(
            "{name} is for disks that a daemon serves; an image that nobody serves is moved here and now"
        ))),
        None => Ok(()),
    }
}

fn request(id: &str, options: &Options) -> Result<MoveRequest, Failure> {
    if options.from_format.is_some() {
        return Err(Failure::usage(
            "--from-format is for images that no daemon serves; a disk's format is known",
        ));
    }
    if !options.parents.is_empty() {
        return Err(Failure::usage(
            "--parents is for images that no daemon serves; a disk's parents are known",
        ));
    }
    let or = |value: &Option<String>, default: &str| value.clone().unwrap_or_else(|| default.to_owned());
    Ok(MoveRequest {
        disks: vec![id.to_owned()],
        to: paths::for_daemon(&options.to)?,
        format: options.format.clone(),
        image_type: options.image_type.clone(),
        block_size: options.block_size,
        mirror: or(&options.mirror, "after-copy"),
        switch: or(&options.switch, "auto"),
        verify: options.verify.clone(),
        bandwidth: options.bandwidth,
        max_guest_p99_us: options.max_guest_p99,
        keep_source: options.keep_source,
        copy_only: options.copy_only,
        flatten: options.flatten,
        files: options.files.iter().map(place).collect::<Result<_, _>>()?,
        on_target_error: or(&options.on_target_error, "pause"),
    })
}

fn place((file, to): &(PathBuf, PathBuf)) -> Result<FilePlace, Failure> {
    Ok(FilePlace { file: paths::for_daemon(file)?, to: paths::for_daemon(to)? })
}

/// Reads `FILE=WHERE`. The last `=` counts, so that the file's name may have others.
fn parse_place(text: &str) -> Result<(PathBuf, PathBuf), String> {
    match text.rsplit_once('=') {
        Some((file, to)) if !file.is_empty() && !to.is_empty() => Ok((file.into(), to.into())),
        _ => Err("say FILE=WHERE: a file of the chain, and the new file or a folder".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(id: &str, image: &str) -> DiskInfo {
        DiskInfo {
            id: id.into(),
            image: image.into(),
            chain: vec![image.into()],
            format: "vhdx".into(),
            image_type: "dynamic".into(),
            size_bytes: 0,
            sector_size: 512,
            socket: String::new(),
            queues: 1,
            read_only: false,
            connected: false,
            generation: 0,
            released: false,
            job: None,
            failed: None,
            reads: 0,
            writes: 0,
            flushes: 0,
            discards: 0,
            read_bytes: 0,
            written_bytes: 0,
            errors: 0,
            latency_us: Default::default(),
        }
    }

    #[test]
    fn a_word_with_a_slash_is_an_image_and_one_without_a_disk() {
        let none: &[DiskInfo] = &[];
        assert_eq!(subject("./a.vhdx", Ok(none)), Ok(Subject::Image("./a.vhdx".into())));
        assert_eq!(subject("vm1", Ok(none)), Ok(Subject::Disk("vm1".into())));
    }

    #[test]
    fn a_file_in_this_folder_is_an_image_unless_a_disk_has_its_name() {
        // Tests run in the crate's folder.
        let none: &[DiskInfo] = &[];
        assert_eq!(subject("Cargo.toml", Ok(none)), Ok(Subject::Image("Cargo.toml".into())));
        let disks = [disk("Cargo.toml", "/elsewhere.vhdx")];
        assert_eq!(subject("Cargo.toml", Ok(&disks)), Ok(Subject::Disk("Cargo.toml".into())));
    }

    #[test]
    fn an_image_that_the_daemon_serves_is_refused_with_the_disk_to_name_instead() {
        let disks = [disk("vm1", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))];
        let refused = subject("./Cargo.toml", Ok(&disks)).expect_err("it is served");
        assert_eq!(refused.kind, "busy");
        assert!(refused.message.contains("blockctl move vm1"), "{refused}");
    }

    #[test]
    fn without_a_daemon_an_image_can_be_moved_and_a_disk_can_not() {
        let dead = Failure::new("unreachable", "no daemon");
        assert_eq!(subject("./a.vhdx", Err(&dead)), Ok(Subject::Image("./a.vhdx".into())));
        assert_eq!(subject("vm1", Err(&dead)), Err(dead.clone()));
        let confused = Failure::new("internal", "what is this");
        assert_eq!(subject("./a.vhdx", Err(&confused)), Err(confused.clone()));
    }

    #[test]
    fn several_disks_need_a_folder_and_other_hosts_are_refused() {
        let two = ["a".to_owned(), "b".to_owned()];
        assert_eq!(check_target(&two, Path::new("/no/such/folder")).map_err(|e| e.kind), Err("usage".into()));
        assert_eq!(check_target(&two, Path::new(env!("CARGO_MANIFEST_DIR"))), Ok(()));
        let far = check_target(&two[..1], Path::new("nbds://host/name"));
        assert_eq!(far.map_err(|e| e.kind), Err("unsupported".into()));
    }
}
