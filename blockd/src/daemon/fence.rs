//! Fences: small files beside images that say which daemon may open one, for daemons that know nothing of each other.
//!
//! ```text
//! DIR/disk.vhdx
//! DIR/.disk.vhdx.blockd-owner     {"version":1, "generation":7, "state":"held", "by":{"daemon":..., "host":..., ...}}
//! ```
//!
//! An image that never changed hands has none. The file stands beside the image because that is the one place that both
//! daemons see; inside it there is no room that all formats have, and extended attributes are missing on many shared file
//! systems.
//!
//! A fence is never written in place: a new file is made durable and takes the name. Whoever changes it holds an exclusive
//! lock on the file that has the name *now* (it looks again once it has the lock), and where there is none the name is taken
//! only if it is still free. So of two who have read the same fence only one can put another in its place: the other one
//! finds that, and decides anew.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FcntlArg, RenameFlags, fcntl, renameat2};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::error::{DaemonError, Kind};
use super::{crash, lock, names};

/// The layout that this version writes and reads.
const VERSION: u32 = 1;
/// No fence comes near it; more is none of ours.
const FENCE_BYTES_MAX: u64 = 16 << 10;
/// How long another one may take to change a fence.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(5);
/// How often a fence may change under our eyes before we give up.
const TRIES: u32 = 100;

/// Who has written a fence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Holder {
    /// The daemon: the id in its state directory.
    pub daemon: Uuid,
    /// The host that it ran on, for people.
    pub host: String,
    /// Its state directory, for people.
    pub state_dir: PathBuf,
    /// The disk's name there.
    pub disk: String,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "disk {} of the blockd on {} (state directory {})",
            self.disk,
            self.host,
            self.state_dir.display()
        )
    }
}

/// What a fence says of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hold {
    /// The holder alone may open it.
    Held,
    /// It was released: nobody has it open, and whoever has the handover may take it.
    Released,
    /// It was detached: anybody may take it.
    Free,
}

/// A fence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fence {
    version: u32,
    /// Counts the holders and releases; never goes down.
    pub generation: u64,
    /// What is said of the image.
    pub state: Hold,
    /// By whom.
    pub by: Holder,
    /// The disk, while it is released.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<ReleasedDisk>,
}

/// What is told of a disk that was released, whose image is not open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleasedDisk {
    /// The image and its parents, newest first.
    pub chain: Vec<PathBuf>,
    /// The image's type.
    pub image_type: String,
    /// Virtual size.
    pub size_bytes: u64,
    /// The guest's sector size.
    pub sector_size: u32,
    /// Whether the guest has its write cache off, so that each of its writes has to be durable.
    pub write_through: bool,
    /// Whether it came from the release before this one and no front end has used it since: it is as that one left it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unused: bool,
}

impl Fence {
    /// A fence of this version.
    pub fn new(generation: u64, state: Hold, by: Holder) -> Self {
        Self { version: VERSION, generation, state, by, disk: None }
    }

    /// Whether this daemon has written it.
    pub fn is_of(&self, daemon: Uuid) -> bool {
        self.by.daemon == daemon
    }
}

/// What is to become of a fence.
#[derive(Debug)]
pub enum Next {
    /// It stays.
    Leave,
    /// This one takes its place.
    Put(Fence),
    /// It goes.
    Remove,
}

/// Where the fence of an image is: beside the file itself, whatever links lead to it.
pub fn path_of(image: &Path) -> PathBuf {
    let real = image.canonicalize().unwrap_or_else(|_| image.to_owned());
    let mut name = OsString::from(".");
    name.push(real.file_name().unwrap_or_default());
    name.push(".blockd-owner");
    real.with_file_name(name)
}

/// The fence of an image, if it has one.
///
/// # Errors
/// [`Kind::Corrupt`] for a damaged one, and what the file system says.
pub fn read(image: &Path) -> Result<Option<Fence>, DaemonError> {
    let path = path_of(image);
    match open(&path, false) {
        Ok(Some(mut file)) => parse(&path, &mut file).map(Some),
        Ok(None) => Ok(None),
        Err(e) => Err(failed(&path, &e)),
    }
}

/// Lets `decide` say what becomes of the fence of an image, and does that, durably, as the daemon `me`. Nobody else changes it in between;
/// where somebody has been quicker, `decide` is asked again. Answers the fence that was there.
///
/// # Errors
/// What `decide` says; [`Kind::Corrupt`] for a damaged fence; [`Kind::Locked`] when another one takes too long to change it;
/// what the file system says: the fence is the old one or the new one then.
pub fn change(
    image: &Path,
    me: Uuid,
    decide: impl FnMut(Option<&Fence>) -> Result<Next, DaemonError>,
) -> Result<Option<Fence>, DaemonError> {
    change_at(&path_of(image), image, me, decide)
}

fn change_at(
    path: &Path,
    image: &Path,
    me: Uuid,
    mut decide: impl FnMut(Option<&Fence>) -> Result<Next, DaemonError>,
) -> Result<Option<Fence>, DaemonError> {
    let _one = InThisProcess::enter(path);
    let io_failed = |e: io::Error| failed(path, &e);
    for _ in 0..TRIES {
        let Some(mut file) = open(path, true).map_err(io_failed)? else {
            match decide(None)? {
                Next::Leave | Next::Remove => return Ok(None),
                Next::Put(fence) if put((path, image), me, &fence, false).map_err(io_failed)? => {
                    return Ok(None);
                }
                Next::Put(_) => continue,
            }
        };
        lock_exclusively(path, &file)?;
        if !has_name(path, &file).map_err(io_failed)? {
            continue;
        }
        let now = parse(path, &mut file)?;
        match decide(Some(&now))? {
            Next::Leave => {}
            Next::Put(fence) => {
                put((path, image), me, &fence, true).map_err(io_failed)?;
            }
            Next::Remove => {
                crash::step();
                fs::remove_file(path).and_then(|()| sync_folder(path)).map_err(io_failed)?;
                crash::step();
            }
        }
        return Ok(Some(now));
    }
    Err(DaemonError::new(Kind::Busy, format!("{} keeps changing; try again", path.display())))
}

/// Removes the fence at `path` of an image that was deleted, if nobody holds it.
pub fn remove_free(path: &Path) {
    let is_free = |now: Option<&Fence>| now.is_some_and(|fence| fence.state == Hold::Free);
    let removed =
        change_at(path, path, Uuid::nil(), |now| Ok(if is_free(now) { Next::Remove } else { Next::Leave }));
    if let Err(e) = removed {
        tracing::warn!(error = e.message, "the fence of a deleted image is left");
    }
}

/// Opens a fence; `None` where there is none. A name that is too long for one has none.
fn open(path: &Path, to_change: bool) -> io::Result<Option<File>> {
    // Locking exclusively takes a descriptor that may write. Nobody else's link is followed.
    match OpenOptions::new().read(true).write(to_change).custom_flags(libc::O_NOFOLLOW).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) if e.raw_os_error() == Some(libc::ENAMETOOLONG) && !to_change => Ok(None),
        Err(e) => Err(e),
    }
}

fn parse(path: &Path, file: &mut File) -> Result<Fence, DaemonError> {
    let damaged = |why: String| {
        let message = format!(
            "{}, which says who may open the image beside it, {why}; make sure that no other daemon serves the image, and then \
             remove this file",
            path.display()
        );
        DaemonError::new(Kind::Corrupt, message)
    };
    let mut text = String::new();
    file.take(FENCE_BYTES_MAX)
        .read_to_string(&mut text)
        .map_err(|e| damaged(format!("can't be read ({e})")))?;
    let version: Version = serde_json::from_str(&text).map_err(|e| damaged(format!("is damaged ({e})")))?;
    if version.version != VERSION {
        return Err(damaged(format!("has version {}, and only {VERSION} is known here", version.version)));
    }
    let fence: Fence = serde_json::from_str(&text).map_err(|e| damaged(format!("is damaged ({e})")))?;
    let by = &fence.by;
    let printed = [by.host.as_str(), &by.state_dir.to_string_lossy(), &by.disk].concat();
    // Two times the highest that anybody asks for: what was taken with that is counted on.
    if fence.generation > 2 * names::GENERATION_MAX || printed.chars().any(char::is_control) {
        return Err(damaged("is damaged (a number or a name in it can't be)".into()));
    }
    Ok(fence)
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

fn lock_exclusively(path: &Path, file: &File) -> Result<(), DaemonError> {
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let give_up = Instant::now() + LOCK_WAIT_MAX;
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&whole)) {
            Ok(_) => return Ok(()),
            Err(Errno::EAGAIN | Errno::EACCES) if Instant::now() < give_up => std::thread::sleep(LOCK_PAUSE),
            Err(Errno::EAGAIN | Errno::EACCES) => {
                let message = format!("{} is being changed by another daemon; try again", path.display());
                return Err(DaemonError::new(Kind::Locked, message));
            }
            Err(e) => return Err(failed(path, &e.into())),
        }
    }
}

/// Whether the file is the one that has the name. It is opened anew for that, since a shared file system may answer a mere
/// look from what it remembers.
fn has_name(path: &Path, file: &File) -> io::Result<bool> {
    let Some(there) = open(path, false)? else { return Ok(false) };
    let (there, ours) = (there.metadata()?, file.metadata()?);
    Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino()))
}

/// Gives a new fence its name, durably. Where none is to be replaced, answers whether the name was free.
fn put((path, image): (&Path, &Path), me: Uuid, fence: &Fence, replace: bool) -> io::Result<bool> {
    let text = serde_json::to_vec_pretty(fence).map_err(io::Error::other)?;
    let temporary = temporary_of(path, me);
    // Left by a crash. It may be another name of the fence itself, so it is not written over.
    match fs::remove_file(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let placed = (|| {
        crash::step();
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(&text)?;
        file.write_all(b"\n")?;
        follow_image(&file, image);
        file.sync_all()?;
        crash::step();
        if replace { fs::rename(&temporary, path).map(|()| true) } else { take_free_name(&temporary, path) }
    })();
    if !matches!(placed, Ok(true)) {
        let _ = fs::remove_file(&temporary);
    }
    crash::step();
    if placed? {
        sync_folder(path)?;
        crash::step();
        return Ok(true);
    }
    Ok(false)
}

fn temporary_of(path: &Path, daemon: Uuid) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{:08x}", daemon.as_fields().0));
    path.with_file_name(name)
}

/// Renames unless somebody has the name; answers whether it was free.
fn take_free_name(from: &Path, to: &Path) -> io::Result<bool> {
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        Ok(()) => return Ok(true),
        Err(Errno::EEXIST) => return Ok(false),
        // File systems without that flag, NFS for one, have links.
        Err(Errno::EINVAL | Errno::ENOSYS) => {}
        Err(e) => return Err(e.into()),
    }
    match fs::hard_link(from, to) {
        Ok(()) => fs::remove_file(from).map(|()| true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(e),
    }
}

/// Whoever may write to the image may change its fence: the other daemon may run as another user. Where that can't be, the
/// other one is told by its system.
fn follow_image(fence: &File, image: &Path) {
    let Ok(of_image) = image.metadata() else { return };
    let mode = of_image.permissions().mode() & 0o666 | 0o600;
    let _ = std::os::unix::fs::fchown(fence, Some(of_image.uid()), Some(of_image.gid()));
    let _ = fence.set_permissions(fs::Permissions::from_mode(mode));
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

fn failed(path: &Path, e: &io::Error) -> DaemonError {
    DaemonError::io(
        format!("{}, which says who may open the image beside it, can't be read or changed", path.display()),
        e,
    )
}

/// One at a time in this process: they share the temporary name.
struct InThisProcess(PathBuf);

static CHANGING: (Mutex<BTreeSet<PathBuf>>, Condvar) = (Mutex::new(BTreeSet::new()), Condvar::new());

impl InThisProcess {
    fn enter(path: &Path) -> Self {
        let mut changing = lock(&CHANGING.0);
        while !changing.insert(path.to_owned()) {
            changing = CHANGING.1.wait(changing).unwrap_or_else(PoisonError::into_inner);
        }
        Self(path.to_owned())
    }
}

impl Drop for InThisProcess {
    fn drop(&mut self) {
        lock(&CHANGING.0).remove(&self.0);
        CHANGING.1.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fence(generation: u64, daemon: u128) -> Fence {
        let by = Holder {
            daemon: Uuid::from_u128(daemon),
            host: "h".into(),
            state_dir: "/s".into(),
            disk: "vm1".into(),
        };
        Fence::new(generation, Hold::Held, by)
    }

    fn place(image: &Path, fence: &Fence) {
        let new = image.with_extension("new");
        fs::write(&new, serde_json::to_vec(fence).expect("JSON")).expect("written");
        fs::rename(new, path_of(image)).expect("renamed");
    }

    #[test]
    fn what_another_host_has_put_in_place_while_the_lock_was_waited_for_is_seen() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let image = dir.path().join("disk.raw");
        place(&image, &fence(1, 1));
        // The other one: it has the lock, puts its own in place, and lets go.
        let theirs = open(&path_of(&image), true).expect("opened").expect("there");
        lock_exclusively(&path_of(&image), &theirs).expect("locked");
        std::thread::scope(|scope| {
            let ours = scope.spawn(|| {
                let mut seen = Vec::new();
                change(&image, Uuid::from_u128(2), |now| {
                    seen.extend(now.map(|fence| fence.generation));
                    Ok(Next::Leave)
                })
                .expect("looked at");
                seen
            });
            std::thread::sleep(Duration::from_millis(100));
            place(&image, &fence(2, 1));
            drop(theirs);
            assert_eq!(ours.join().expect("it ends"), [2], "what was replaced is not decided upon");
        });
    }

    #[test]
    fn who_finds_no_fence_does_not_write_over_one_that_came_meanwhile() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let image = dir.path().join("disk.raw");
        let mut asked = 0;
        let before = change(&image, Uuid::from_u128(2), |now| {
            asked += 1;
            match now {
                None => {
                    place(&image, &fence(7, 1));
                    Ok(Next::Put(fence(1, 2)))
                }
                Some(theirs) => {
                    assert_eq!(theirs.generation, 7);
                    Ok(Next::Leave)
                }
            }
        });
        assert_eq!((before.expect("looked at"), asked), (Some(fence(7, 1)), 2));
        let names = fs::read_dir(dir.path()).expect("listed").count();
        assert_eq!(names, 1, "nothing temporary is left");
    }

    #[test]
    fn a_temporary_file_that_a_crash_has_left_as_a_second_name_is_not_written_to() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let image = dir.path().join("disk.raw");
        place(&image, &fence(1, 1));
        fs::hard_link(path_of(&image), temporary_of(&path_of(&image), Uuid::from_u128(1))).expect("linked");
        let old = fs::File::open(path_of(&image)).expect("opened");
        change(&image, Uuid::from_u128(1), |_| Ok(Next::Put(fence(2, 1)))).expect("replaced");
        let mut kept = String::new();
        (&old).take(FENCE_BYTES_MAX).read_to_string(&mut kept).expect("read");
        assert!(kept.contains("\"generation\":1"), "{kept}");
        assert_eq!(read(&image).expect("sound"), Some(fence(2, 1)));
    }
}
