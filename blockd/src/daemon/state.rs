//! The state directory: what the daemon must know again after it was killed.
//!
//! ```text
//! DIR/id             the daemon's id, made once: by it other daemons know who holds an image
//! DIR/lock           held (an open-file-description lock) while a daemon uses the directory
//! DIR/disks/ID.json  one record a disk: what was asked for, and which image is the disk now
//! DIR/notes/         what differencing images must not lose when the daemon is killed, which is their codecs' business
//! DIR/moves/         the journals of moves, which are the mover's business, and receipts beside them
//! ```
//!
//! A record is replaced by writing a temporary file, syncing it, renaming it over the old one and syncing the directory.
//! So whoever reads it after a power cut finds the old record or the new one, whole.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use blockd_api::Receipt;
use formats::Format;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::error::{DaemonError, Kind};
use super::fence::{Holder, ReleasedDisk};
use super::{crash, lock, names};
use crate::disk::DiskSpec;
use crate::mover::NewImage;

/// The layout of a record that this version writes and reads.
const VERSION: u32 = 1;
/// No record comes near it; more is no record of ours.
const RECORD_BYTES_MAX: u64 = 1 << 20;

/// Ends the names of files that are not in their place yet.
const TEMPORARY: &str = ".new";
/// What a job may leave, the journal last.
const JOB_FILES: [&str; 3] = ["receipt", "extents", "journal"];

/// What is remembered of a disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskRecord {
    /// [`VERSION`].
    version: u32,
    /// What was asked for. Its image is the one that was asked for first; a move does not change it.
    pub spec: DiskSpec,
    /// The image that is the disk now, absolute.
    pub image: PathBuf,
    /// Format of `image`; absent only until it was opened for the first time.
    pub format: Option<Format>,
    /// How often a move or a snapshot has put another image in place, or the disk has changed hands.
    pub generation: u64,
    /// Whether `image` has a fence, which has to be ours.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fenced: bool,
    /// The disk was released for another daemon: it is not served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub released: Option<ReleasedDisk>,
    /// Files that `image` needs as its parents, besides what was asked for: those that snapshots have left behind.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parents: Vec<PathBuf>,
    /// What a snapshot has left behind and not closed yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settling: Option<Settling>,
}

/// An image that was the disk until a snapshot: it has to be closed cleanly before it can be the parent that it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settling {
    /// The image, absolute.
    pub image: PathBuf,
    /// The id by which the new image knows its content.
    pub content_id: Uuid,
}

impl DiskRecord {
    /// The record of a disk that was just asked for.
    pub fn new(spec: DiskSpec) -> Self {
        Self {
            version: VERSION,
            image: spec.image.clone(),
            format: spec.format,
            spec,
            generation: 0,
            fenced: false,
            released: None,
            parents: Vec::new(),
            settling: None,
        }
    }

    /// What to serve: what was asked for, from the image that is the disk now.
    pub fn serve(&self) -> DiskSpec {
        let parents = self.spec.parents.iter().chain(&self.parents).cloned().collect();
        DiskSpec { image: self.image.clone(), format: self.format, parents, ..self.spec.clone() }
    }

    /// A move was committed.
    pub fn follow_move(&mut self, image: &NewImage) {
        self.become_image(&image.files[0], Some(image.format));
        self.parents = image.files[1..].to_vec();
        self.generation = image.generation;
    }

    /// The disk is another image now, of which the parents so far are none.
    pub fn become_image(&mut self, image: &Path, format: Option<Format>) {
        (self.image, self.format) = (image.to_owned(), format);
        self.fenced = false;
        (self.parents, self.settling) = (Vec::new(), None);
    }
}

/// The state directory, locked for this process.
#[derive(Debug)]
pub struct StateDir {
    root: PathBuf,
    id: Uuid,
    host: String,
    /// Held while a file is replaced: two writers of the same one share its temporary name.
    writing: Mutex<()>,
    _lock: File,
}

impl StateDir {
    /// Opens the directory, creating what is absent, and takes its lock.
    ///
    /// # Errors
    /// [`Kind::Locked`] when another daemon holds it; [`Kind::Io`] when it can't be created or written.
    pub fn open(root: &Path) -> Result<Self, DaemonError> {
        let failed = |e: io::Error| {
            DaemonError::io(format!("the state directory {} can't be used", root.display()), &e)
        };
        for dir in [root, &root.join("disks"), &root.join("moves"), &root.join("cache")] {
            create_dir(dir).map_err(failed)?;
        }
        let lock = lock_file(&root.join("lock"))?;
        let state = Self {
            // As other daemons are told where it is.
            root: root.canonicalize().map_err(failed)?,
            id: own_id(root)?,
            host: std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned(),
            writing: Mutex::default(),
            _lock: lock,
        };
        state.remove_temporaries().map_err(failed)?;
        Ok(state)
    }

    /// The id of the daemon that this directory is of.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// This daemon as the holder of a disk's image.
    pub fn holder(&self, disk: &str) -> Holder {
        Holder {
            daemon: self.id,
            host: self.host.clone(),
            state_dir: self.root.clone(),
            disk: disk.to_owned(),
        }
    }

    /// Where differencing images keep their notes; made when it is needed.
    pub fn notes_dir(&self) -> PathBuf {
        self.root.join("notes")
    }

    /// Where the journals of moves live.
    pub fn moves_dir(&self) -> PathBuf {
        self.root.join("moves")
    }

    /// Every disk that is remembered; a damaged record is an error of that disk alone.
    ///
    /// # Errors
    /// [`Kind::Io`] when the directory can't be listed.
    pub fn disks(&self) -> Result<BTreeMap<String, Result<DiskRecord, DaemonError>>, DaemonError> {
        let dir = self.root.join("disks");
        let failed = |e: io::Error| DaemonError::io(format!("{} can't be listed", dir.display()), &e);
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let id = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".json"));
            match id {
                Some(id) if names::check_disk_id(id).is_ok() => {
                    found.insert(id.to_owned(), read_record(&path, id));
                }
                _ => tracing::warn!(path = %path.display(), "not a record of a disk: left alone"),
            }
        }
        Ok(found)
    }

    /// Makes the record durable before it returns.
    ///
    /// # Errors
    /// Whatever the file system says; then the old record is still in place, or the new one is there but perhaps not
    /// durable.
    pub fn put(&self, record: &DiskRecord) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(record).map_err(io::Error::other)?;
        let _one = lock(&self.writing);
        replace(&self.record_path(&record.spec.id), &text)
    }

    /// Whether the guest of a disk has its write cache off.
    pub fn is_write_through(&self, id: &str) -> bool {
        self.write_through_path(id).exists()
    }

    /// Remembers durably whether the guest of a disk has its write cache off.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn set_write_through(&self, id: &str, off: bool) -> io::Result<()> {
        let path = self.write_through_path(id);
        if off {
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?.sync_all()?;
        } else {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        sync_dir(&self.root.join("cache"))
    }

    /// An empty file that is there while the guest has its write cache off.
    fn write_through_path(&self, id: &str) -> PathBuf {
        self.root.join("cache").join(format!("{id}.write-through"))
    }

    /// Makes durable that a disk is another image now, as a move's journal tells. A disk that is not remembered any more
    /// is left so.
    ///
    /// # Errors
    /// A damaged record, one that knows a newer image, and whatever the file system says.
    pub fn adopt(&self, id: &str, image: &NewImage) -> io::Result<()> {
        let path = self.record_path(id);
        if !path.exists() {
            return Ok(());
        }
        let mut record = read_record(&path, id).map_err(io::Error::other)?;
        if record.generation > image.generation {
            return Err(io::Error::other(format!("it knows generation {} already", record.generation)));
        }
        if record.generation < image.generation {
            let left = record.clone();
            record.follow_move(image);
            let fenced = self.hold_new_image(id, &record.image, image.generation);
            record.fenced = fenced.map_err(io::Error::other)?;
            self.put(&record)?;
            self.free_old_image(&left, image.generation);
        }
        Ok(())
    }

    /// Forgets a disk, durably; one that was not remembered is no error.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn remove(&self, id: &str) -> io::Result<()> {
        self.set_write_through(id, false)?;
        crash::step();
        match fs::remove_file(self.record_path(id)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => sync_dir(&self.root.join("disks")),
        }?;
        crash::step();
        Ok(())
    }

    /// Path of a disk's record.
    pub fn record_path(&self, id: &str) -> PathBuf {
        self.root.join("disks").join(format!("{id}.json"))
    }

    /// Keeps the receipt of a finished move beside its journal, durably.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn put_receipt(&self, receipt: &Receipt) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(receipt).map_err(io::Error::other)?;
        let _one = lock(&self.writing);
        replace(&self.job_path(&receipt.job.job, "receipt"), &text)
    }

    /// The receipt of a move of an earlier run, if it got as far as that and can be read.
    pub fn receipt(&self, job: &str) -> Option<Receipt> {
        let path = self.job_path(job, "receipt");
        let text = fs::read(&path).ok()?;
        let receipt = serde_json::from_slice(&text);
        receipt.inspect_err(|e| tracing::warn!(path = %path.display(), error = %e, "a damaged receipt")).ok()
    }

    /// Whether a job of this name has left anything.
    pub fn knows_job(&self, job: &str) -> bool {
        JOB_FILES.iter().any(|kind| self.job_path(job, kind).exists())
    }

    /// Forgets a job that is over. What stays behind after a crash here is found again at the next start.
    pub fn forget_job(&self, job: &str) {
        // The journal last: without it nobody would look for the rest.
        for kind in JOB_FILES {
            let path = self.job_path(job, kind);
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), error = %e, "an old job can't be forgotten");
                    return;
                }
                _ => {}
            }
        }
    }

    fn job_path(&self, job: &str, kind: &str) -> PathBuf {
        self.moves_dir().join(format!("{job}.{kind}"))
    }

    /// What a crash between writing and renaming left: never read, so it may go.
    fn remove_temporaries(&self) -> io::Result<()> {
        for dir in ["disks", "moves"] {
            for entry in fs::read_dir(self.root.join(dir))? {
                let entry = entry?;
                let name = entry.file_name();
                if name.to_str().is_some_and(|n| n.starts_with('.') && n.ends_with(TEMPORARY)) {
                    fs::remove_file(entry.path())?;
                }
            }
        }
        Ok(())
    }
}

/// Puts a whole file in the place of another one, durably.
fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // Names of disks and jobs begin with a letter or digit, so this is the name of nothing else.
    let temporary = dir.join(format!(".{}{TEMPORARY}", name.to_string_lossy()));
    let written = (|| {
        crash::step();
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(text)?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        crash::step();
        fs::rename(&temporary, path)
    })();
    crash::step();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written?;
    sync_dir(dir)
}

fn read_record(path: &Path, id: &str) -> Result<DiskRecord, DaemonError> {
    let damaged = |why: String| {
        let message = format!(
            "the record of disk {id}, {}, {why}; restore it from a backup, or detach the disk and attach its image again",
            path.display()
        );
        DaemonError::new(Kind::Corrupt, message)
    };
    let mut text = String::new();
    File::open(path)
        .and_then(|f| f.take(RECORD_BYTES_MAX).read_to_string(&mut text))
        .map_err(|e| damaged(format!("can't be read: {e}")))?;
    // The version first: a later one may well have fields that are unknown here.
    let version: Version = serde_json::from_str(&text).map_err(|e| damaged(format!("is damaged: {e}")))?;
    if version.version != VERSION {
        return Err(damaged(format!("has version {}, and only {VERSION} is known here", version.version)));
    }
    let record: DiskRecord = serde_json::from_str(&text).map_err(|e| damaged(format!("is damaged: {e}")))?;
    if record.spec.id != id {
        return Err(damaged(format!("is of another disk, {:?}", record.spec.id)));
    }
    let settling = record.settling.iter().map(|s| &s.image);
    if let Some(path) =
        std::iter::once(&record.image).chain(&record.parents).chain(settling).find(|p| !p.is_absolute())
    {
        return Err(damaged(format!("names an image by a relative path, {path:?}")));
    }
    names::check_spec(&record.spec).map_err(|e| damaged(format!("is damaged: {e}")))?;
    Ok(record)
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// The id in the state directory; made when there is none.
fn own_id(root: &Path) -> Result<Uuid, DaemonError> {
    let path = root.join("id");
    let failed = |e: io::Error| DaemonError::io(format!("{} can't be used", path.display()), &e);
    match fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|_| {
            let message = format!(
                "{} is no id of a daemon; restore it from a backup, or remove it: disks that were taken over from other daemons \
                 then have to be attached again with --generation",
                path.display()
            );
            DaemonError::new(Kind::Corrupt, message)
        }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let id = Uuid::new_v4();
            replace(&path, id.to_string().as_bytes()).map_err(failed)?;
            Ok(id)
        }
        Err(e) => Err(failed(e)),
    }
}

/// Opens the lock file and locks it for as long as it stays open; the holder's process id is in it, for messages.
fn lock_file(path: &Path) -> Result<File, DaemonError> {
    let failed = |e: io::Error| DaemonError::io(format!("{} can't be locked", path.display()), &e);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole)) {
        Ok(_) => {}
        Err(Errno::EAGAIN | Errno::EACCES) => return Err(held_by_another(path, &mut file)),
        Err(e) => return Err(failed(e.into())),
    }
    write_holder(&mut file).map_err(failed)?;
    Ok(file)
}

fn write_holder(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

fn held_by_another(path: &Path, file: &mut File) -> DaemonError {
    let mut holder = String::new();
    let _ = file.take(20).read_to_string(&mut holder);
    let holder = match holder.trim().parse::<u32>() {
        Ok(pid) => format!(" (process {pid})"),
        Err(_) => String::new(),
    };
    let dir = path.parent().unwrap_or(path).display();
    DaemonError::new(
        Kind::Locked,
        format!(
            "the state directory {dir} is in use by another blockd{holder}; stop that one, or choose another directory with --state-dir"
        ),
    )
}

/// Creates a directory for the owner alone, and its parents; one that exists is left as it is.
fn create_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    // A record that is made durable is lost all the same if the directory's own entry is not.
    dir.parent().filter(|p| !p.as_os_str().is_empty()).map_or(Ok(()), sync_dir)
}

/// Makes the entries of a directory durable.
fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new_image(path: &str, generation: u64) -> NewImage {
        NewImage { files: vec![path.into()], format: Format::Vhd, generation }
    }

    fn spec(id: &str) -> DiskSpec {
        DiskSpec {
            id: id.to_owned(),
            image: "/images/a.vhdx".into(),
            socket: "/run/a.sock".into(),
            format: None,
            queues: 2,
            io_threads: 1,
            read_only: false,
            parents: Vec::new(),
        }
    }

    fn state() -> (tempfile::TempDir, StateDir) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let state = StateDir::open(dir.path()).expect("it opens");
        (dir, state)
    }

    #[test]
    fn a_record_comes_back_as_it_was_put() {
        let (dir, state) = state();
        let mut record = DiskRecord::new(spec("a"));
        state.put(&record).expect("put");
        record.image = "/elsewhere/a.vhd".into();
        record.format = Some(Format::Vhd);
        record.generation = 3;
        state.put(&record).expect("replaced");
        drop(state);

        let state = StateDir::open(dir.path()).expect("it opens again");
        let disks = state.disks().expect("listed");
        let back = disks["a"].as_ref().expect("sound");
        assert_eq!(back.spec.image, PathBuf::from("/images/a.vhdx"));
        assert_eq!(
            (back.image.as_path(), back.format, back.generation),
            (Path::new("/elsewhere/a.vhd"), Some(Format::Vhd), 3)
        );
        let serve = back.serve();
        assert_eq!(
            (serve.image.as_path(), serve.format, serve.queues),
            (Path::new("/elsewhere/a.vhd"), Some(Format::Vhd), 2)
        );
        state.remove("a").expect("removed");
        state.remove("a").expect("once more is no error");
        assert!(state.disks().expect("listed").is_empty());
    }

    #[test]
    fn a_second_opener_is_refused_with_the_holders_process() {
        let (dir, _state) = state();
        let e = StateDir::open(dir.path()).expect_err("it is held");
        assert_eq!(e.kind, Kind::Locked);
        assert!(e.message.contains(&std::process::id().to_string()), "{e}");
        assert!(e.message.contains("--state-dir"), "{e}");
    }

    #[test]
    fn a_crash_before_the_rename_leaves_the_old_record() {
        let (dir, state) = state();
        state.put(&DiskRecord::new(spec("a"))).expect("put");
        let left = dir.path().join("disks/.a.json.new");
        fs::write(&left, b"{\"version\":1,\"spe").expect("a torn temporary file");
        drop(state);
        let state = StateDir::open(dir.path()).expect("it opens");
        assert!(!left.exists());
        assert!(state.disks().expect("listed")["a"].is_ok());
    }

    #[test]
    fn a_failed_replacement_leaves_the_old_record_and_no_temporary_file() {
        let (dir, state) = state();
        let record = DiskRecord::new(spec("a"));
        // A directory in the way lets the rename fail, whoever runs the test.
        fs::create_dir_all(dir.path().join("disks/a.json/x")).expect("made");
        assert!(state.put(&record).is_err());
        assert!(!dir.path().join("disks/.a.json.new").exists());
    }

    #[test]
    fn damaged_records_are_named_and_leave_the_others_alone() {
        let (dir, state) = state();
        state.put(&DiskRecord::new(spec("sound"))).expect("put");
        let whole = fs::read_to_string(state.record_path("sound")).expect("read");
        let bad = |id: &str, text: &str| fs::write(state.record_path(id), text).expect("written");
        bad("empty", "");
        bad("torn", &whole[..whole.len() / 2]);
        bad("zeroes", &"\0".repeat(300));
        bad("other", &whole);
        bad("later", &whole.replacen("\"version\": 1", "\"version\": 7", 1));
        bad("field", &whole.replacen("\"version\": 1", "\"version\": 1, \"surprise\": true", 1));
        bad("relative", &whole.replace("/images/a.vhdx", "a.vhdx").replace("\"sound\"", "\"relative\""));
        bad("queues", &whole.replace("\"queues\": 2", "\"queues\": 0").replace("\"sound\"", "\"queues\""));
        fs::write(dir.path().join("disks/README"), "not a record").expect("written");
        let disks = state.disks().expect("listed");
        assert_eq!(disks.len(), 9);
        for (id, record) in &disks {
            match record {
                Ok(_) => assert_eq!(id, "sound"),
                Err(e) => {
                    assert_eq!(e.kind, Kind::Corrupt, "{id}");
                    assert!(e.message.contains(&format!("{id}.json")), "{e}");
                    assert!(e.message.contains("detach"), "{e}");
                }
            }
        }
        assert!(disks["later"].as_ref().expect_err("refused").message.contains("version 7"));
    }

    #[test]
    fn a_receipt_is_kept_until_its_job_is_forgotten() {
        let (_dir, state) = state();
        let job = blockd_api::Job { job: "m1".to_owned(), ..Default::default() };
        let receipt = Receipt { job, generation: [4, 5], ..Receipt::default() };
        fs::write(state.moves_dir().join("m1.journal"), "").expect("written");
        assert!(state.knows_job("m1") && state.receipt("m1").is_none());
        state.put_receipt(&receipt).expect("put");
        assert_eq!(state.receipt("m1"), Some(receipt));
        state.forget_job("m1");
        assert!(!state.knows_job("m1") && state.receipt("m1").is_none());
        assert_eq!(fs::read_dir(state.moves_dir()).expect("listed").count(), 0);
    }

    #[test]
    fn a_journals_word_is_adopted_once_and_only_forwards() {
        let (_dir, state) = state();
        state.put(&DiskRecord::new(spec("a"))).expect("put");
        state.adopt("a", &new_image("/t.vhd", 1)).expect("adopted");
        state.adopt("a", &new_image("/old.vhd", 1)).expect("nothing to do");
        state.adopt("forgotten", &new_image("/t.vhd", 1)).expect("nothing to do");
        let disks = state.disks().expect("listed");
        let record = disks["a"].as_ref().expect("sound");
        assert_eq!((record.image.as_path(), record.generation), (Path::new("/t.vhd"), 1));
        assert_eq!(disks.len(), 1);
        fs::write(state.record_path("a"), "{").expect("torn");
        assert!(state.adopt("a", &new_image("/t.vhd", 2)).is_err());
    }

    #[test]
    fn every_cut_of_a_record_is_refused_rather_than_misread() {
        let (_dir, state) = state();
        state.put(&DiskRecord::new(spec("a"))).expect("put");
        let whole = fs::read(state.record_path("a")).expect("read");
        for len in 0..whole.len() - 2 {
            fs::write(state.record_path("a"), &whole[..len]).expect("written");
            assert!(state.disks().expect("listed")["a"].is_err(), "cut at {len} of {}", whole.len());
        }
    }
}
