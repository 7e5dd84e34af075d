//! The gate that says which files may be opened as parents of a differencing image.
//!
//! What an image says of its parent is an untrusted text: followed blindly, it would have a daemon open any file of its
//! host for whoever made the image. So a parent is only ever looked for among what the operator named:
//!
//! ```text
//!   a file that was named      tried for every child
//!   a folder that was named    1. the relative path, from the child's own folder where that lies beneath
//!                              2. an absolute path that leads into the folder
//!                              3. the last name of each path
//! ```
//!
//! What is found there must pass, in this order, on the opened descriptor: a regular file, reached without any link
//! ([`crate::beneath`]); no image of the chain under another name, by device and inode; nobody writing to it; sound in the
//! child's format, which is never guessed; sectors of the child's size; and the id that the child names. Nothing is
//! ever written to a parent: a log that was left in one is replayed in memory.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::beneath::{self, Folder};
use crate::lock::{Lock, LockError, lock};
use crate::open::{no_regular_file, open_file, without_nonblock};
use crate::{
    CHAIN_MAX, ErrorKind, FileStorage, Format, Image, ImageType, LayerOptions, OpenError, ParentLink,
    ParentPathKind, Storage, dispatch,
};

/// How many failed attempts an error tells of.
const TOLD_MAX: usize = 8;

/// Which file it is, whatever its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileId {
    /// Of the file system.
    pub(crate) device: u64,
    /// On it.
    pub(crate) inode: u64,
}

impl FileId {
    /// Of an open file.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self { device: meta.dev(), inode: meta.ino() })
    }
}

/// A parent that has passed the gate, open for reading.
#[derive(Debug, Clone)]
pub(crate) struct Parent {
    pub(crate) image: Arc<dyn Image>,
    pub(crate) path: PathBuf,
    pub(crate) content_id: Uuid,
    /// Its file.
    pub(crate) storage: Arc<dyn Storage>,
    /// The folder that holds it, links resolved.
    folder: Option<PathBuf>,
    pub(crate) file: FileId,
}

/// The image whose parent is looked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Child<'a> {
    pub(crate) path: &'a Path,
    pub(crate) image: &'a dyn Image,
    pub(crate) file: FileId,
}

/// Why something that was tried is not the parent.
#[derive(Debug)]
enum Refusal {
    Unreadable(io::Error),
    NoRegularFile(&'static str),
    InChain,
    Locked,
    Unsound(String),
    WrongId(Option<Uuid>),
    WrongSectors(u32),
    WrongText(&'static str),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(e) if e.raw_os_error() == Some(nix::libc::ELOOP) => {
                f.write_str("is or leads through a symbolic link, and none is followed")
            }
            Self::Unreadable(e) if e.kind() == io::ErrorKind::NotFound => f.write_str("is not there"),
            Self::Unreadable(e) => write!(f, "cannot be opened: {e}"),
            Self::NoRegularFile(what) => write!(f, "is {what}, and parents are regular files"),
            Self::InChain => f.write_str("is an image of this very chain, and a chain can't go in a circle"),
            Self::Locked => f.write_str("is open for writing elsewhere, and a parent must not change"),
            Self::Unsound(why) => write!(f, "is no sound image of the child's format ({why})"),
            Self::WrongId(None) => f.write_str("has no id"),
            Self::WrongId(Some(id)) => {
                write!(f, "has the id {id}: it is another image, or was changed after the child was made")
            }
            Self::WrongSectors(size) => write!(f, "has sectors of {size} bytes, which the child has not"),
            Self::WrongText(why) => write!(f, "is not looked for: {why}"),
        }
    }
}

/// Why the chain ends before its base.
#[derive(Debug)]
pub(crate) struct Missing {
    /// The image whose parent was not found.
    pub(crate) child: PathBuf,
    kind: ErrorKind,
    /// The parent's id, as the child has it.
    pub(crate) id: Option<Uuid>,
    /// What was tried, and why it was not that.
    pub(crate) reason: String,
    message: String,
}

impl From<Missing> for OpenError {
    fn from(missing: Missing) -> Self {
        Self { path: missing.child, kind: missing.kind, message: missing.message, source: None }
    }
}

/// The parents of an image, as far as they were found.
#[derive(Debug)]
pub(crate) struct Walk {
    /// The nearest first.
    pub(crate) parents: Vec<Parent>,
    /// What the last of them, or the image itself, lacks.
    pub(crate) missing: Option<Missing>,
}

/// What the operator has named.
#[derive(Debug)]
pub(crate) struct Gate {
    folders: Vec<Folder>,
    files: Vec<NamedFile>,
    lock: bool,
    /// Files that no chain may have as a parent, whatever they are called.
    forbidden: Vec<FileId>,
}

#[derive(Debug)]
struct NamedFile {
    path: PathBuf,
    /// Opened when it was needed for the first time. In a chain of many images each file is tried for many children.
    seen: Option<(Format, Result<Parent, Arc<Refusal>>)>,
}

type Tried = Vec<(String, Arc<Refusal>)>;

impl Gate {
    /// Takes what the operator named: folders, and files. With `lock`, parents are locked against writers. What is not
    /// there is told when a parent is not found: it may be that it is needed no more.
    pub(crate) fn new(named: &[PathBuf], lock: bool) -> Self {
        let mut gate = Self { folders: Vec::new(), files: Vec::new(), lock, forbidden: Vec::new() };
        for path in named {
            match Folder::open(path) {
                Ok(folder) => gate.folders.push(folder),
                // It is none, or cannot be looked at, which opening it as a file will tell.
                Err(_) => gate.files.push(NamedFile { path: path.clone(), seen: None }),
            }
        }
        gate
    }

    /// Lets no chain come to this file.
    pub(crate) fn forbid(&mut self, file: FileId) {
        self.forbidden.push(file);
    }

    /// Follows `top` down to its base, or as far as that goes.
    pub(crate) fn walk(&mut self, top: Child<'_>) -> Walk {
        let mut walk = Walk { parents: Vec::new(), missing: None };
        let mut files = self.forbidden.clone();
        files.push(top.file);
        loop {
            let last = walk.parents.last();
            let (image, path) = last.map_or((top.image, top.path), |p| (&*p.image, p.path.as_path()));
            if image.image_type() != ImageType::Differencing {
                return walk;
            }
            let folder = last.map_or_else(|| folder_of(top.path), |p| p.folder.clone());
            let link = image.parent_link().expect("a differencing image has a link to its parent");
            let found = if walk.parents.len() + 1 >= CHAIN_MAX {
                Err(too_long(path))
            } else {
                let sector = image.geometry().logical_sector_size;
                let search = Search { link, sector, folder: folder.as_deref(), files: &files };
                self.find(&search).map_err(|tried| missing(path, link, &tried, self.is_empty()))
            };
            match found {
                Ok(parent) => {
                    if parent.image.geometry().virtual_size < image.geometry().virtual_size {
                        let (child, parent) = (path.display(), parent.path.display());
                        tracing::info!(%child, %parent, "the parent is smaller, and reads as zeroes beyond its end");
                    }
                    files.push(parent.file);
                    walk.parents.push(parent);
                }
                Err(missing) => {
                    walk.missing = Some(missing);
                    return walk;
                }
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.folders.is_empty() && self.files.is_empty()
    }

    fn find(&mut self, search: &Search<'_>) -> Result<Parent, Tried> {
        let mut tried = Tried::new();
        for named in &mut self.files {
            match named.open(search, self.lock) {
                Ok(parent) => return Ok(parent),
                Err(why) => tried.push((named.path.display().to_string(), why)),
            }
        }
        for folder in &self.folders {
            for candidate in candidates(folder, search) {
                let (shown, names) = match candidate {
                    Ok(names) => (shown_path(&folder.path, &names), names),
                    Err((text, why)) => {
                        tried.push((shown_text(&text), Arc::new(Refusal::WrongText(why))));
                        continue;
                    }
                };
                match open_candidate(folder, &names, search, self.lock) {
                    Ok(parent) => return Ok(parent),
                    Err(why) => tried.push((shown, Arc::new(why))),
                }
            }
        }
        Err(tried)
    }
}

/// What one parent has to be.
struct Search<'a> {
    link: &'a ParentLink,
    sector: u32,
    /// The child's folder, links resolved.
    folder: Option<&'a Path>,
    /// The chain so far.
    files: &'a [FileId],
}

impl NamedFile {
    fn open(&mut self, search: &Search<'_>, lock: bool) -> Result<Parent, Arc<Refusal>> {
        let format = search.link.format;
        let seen = match &self.seen {
            Some((seen_as, seen)) if *seen_as == format => seen.clone(),
            _ => {
                let seen = self.look(search, lock).map_err(Arc::new);
                // That it is in the chain by now, or somebody has it open, may be otherwise for the next child.
                let lasting =
                    !matches!(seen.as_ref().map_err(|why| &**why), Err(Refusal::InChain | Refusal::Locked));
                self.seen = lasting.then(|| (format, seen.clone()));
                seen
            }
        };
        seen.and_then(|parent| parent.fits(search).map_err(Arc::new))
    }

    fn look(&self, search: &Search<'_>, lock: bool) -> Result<Parent, Refusal> {
        // The operator's own word: links in it are followed.
        let file = open_file(&self.path, true).map_err(|e| match e.source {
            Some(e) => Refusal::Unreadable(e),
            None => Refusal::Unsound(e.message),
        })?;
        admit(file, self.path.clone(), folder_of(&self.path), search, lock)
    }
}

/// Where the parent may be in a folder, in the order in which it is looked for: paths of plain names, each once.
fn candidates(folder: &Folder, search: &Search<'_>) -> Vec<Result<PathBuf, (String, &'static str)>> {
    let mut found = Vec::new();
    let mut last_names = Vec::new();
    for path in &search.link.paths {
        let taken_apart = match path.text.strip_prefix("file://") {
            Some(url) if path.kind == ParentPathKind::Absolute => {
                decoded(url).and_then(|url| beneath::names(&url))
            }
            _ => beneath::names(&path.text),
        };
        let (names, absolute) = match taken_apart {
            Ok(taken_apart) => taken_apart,
            Err(why) => {
                found.push(Err((path.text.clone(), why)));
                continue;
            }
        };
        if path.kind == ParentPathKind::Relative && !absolute {
            let from = search.folder.and_then(|child| child.strip_prefix(&folder.real).ok());
            found.push(
                beneath::walk(from.unwrap_or(Path::new("")), &names).map_err(|why| (path.text.clone(), why)),
            );
        } else if absolute && !names.iter().any(|name| name == "..") {
            let whole = Path::new("/").join(names.iter().collect::<PathBuf>());
            let inside = whole.strip_prefix(&folder.real).ok().filter(|p| !p.as_os_str().is_empty());
            found.extend(inside.map(|inside| Ok(inside.to_path_buf())));
        }
        let last = names.last().map_or(&[][..], std::slice::from_ref);
        last_names.push(beneath::walk(Path::new(""), last).map_err(|why| (path.text.clone(), why)));
    }
    found.append(&mut last_names);
    let mut seen = BTreeSet::new();
    found.retain(|candidate| seen.insert(candidate.clone()));
    found
}

/// The path of a file URL of old Macintosh software (`MacX`): what comes after the host, `%20` and the like decoded.
fn decoded(url: &str) -> Result<String, &'static str> {
    if url.len() > beneath::PATH_MAX_BYTES {
        return Err("its path is longer than 4096 bytes");
    }
    let path = &url[url.find('/').unwrap_or(url.len())..];
    let (mut bytes, mut rest) = (Vec::new(), path.as_bytes());
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..2).and_then(|d| std::str::from_utf8(d).ok()).filter(|_| *first == b'%');
        match digits.and_then(|d| u8::from_str_radix(d, 16).ok()) {
            // A slash that was encoded is meant to be part of a name, which no file can have.
            Some(b'/' | b'\\') => return Err("its path has a slash in a name"),
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).map_err(|_| "its path is not UTF-8")
}

fn open_candidate(folder: &Folder, names: &Path, search: &Search<'_>, lock: bool) -> Result<Parent, Refusal> {
    let file = folder.open_file(names).map_err(Refusal::Unreadable)?;
    let within = folder.real.join(names).parent().map(Path::to_path_buf);
    admit(file, folder.path.join(names), within, search, lock)?.fits(search)
}

/// Looks at what was opened, and opens the image in it.
fn admit(
    file: File,
    path: PathBuf,
    folder: Option<PathBuf>,
    search: &Search<'_>,
    lock_it: bool,
) -> Result<Parent, Refusal> {
    let kind = file.metadata().map_err(Refusal::Unreadable)?.file_type();
    if let Some(what) = no_regular_file(kind) {
        return Err(Refusal::NoRegularFile(what));
    }
    let id = FileId::of(&file).map_err(Refusal::Unreadable)?;
    // Before it is locked: the top of the chain has a lock of its own, and would only seem to be in use.
    if search.files.contains(&id) {
        return Err(Refusal::InChain);
    }
    without_nonblock(&file).map_err(Refusal::Unreadable)?;
    if lock_it {
        lock(&file, Lock::Shared).map_err(|e| match e {
            LockError::Held => Refusal::Locked,
            LockError::Io(e) => Refusal::Unreadable(e),
        })?;
    }
    let options = LayerOptions { read_only: true, ..LayerOptions::default() };
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::new(file));
    let image = dispatch::open_layer(search.link.format, storage.clone(), &options)
        .map_err(|e| Refusal::Unsound(e.message))?;
    let content_id = image.content_id().ok_or(Refusal::WrongId(None))?;
    Ok(Parent { image, path, content_id, storage, folder, file: id })
}

impl Parent {
    /// Whether it is the one that is looked for.
    fn fits(self, search: &Search<'_>) -> Result<Self, Refusal> {
        if search.files.contains(&self.file) {
            return Err(Refusal::InChain);
        }
        if !search.link.ids.contains(&self.content_id) {
            return Err(Refusal::WrongId(Some(self.content_id)));
        }
        let sector = self.image.geometry().logical_sector_size;
        if sector != search.sector {
            return Err(Refusal::WrongSectors(sector));
        }
        Ok(self)
    }
}

/// The folder that holds the file at `path`, links resolved.
fn folder_of(path: &Path) -> Option<PathBuf> {
    path.canonicalize().ok()?.parent().map(Path::to_path_buf)
}

fn too_long(child: &Path) -> Missing {
    let reason = format!("the chain goes on beyond {CHAIN_MAX} images, the most that are possible");
    let message = format!("{reason}; `blockctl image convert` makes one image of a part of it");
    Missing { child: child.to_owned(), kind: ErrorKind::Parent, id: None, reason, message }
}

/// A text of an image as it may be shown: nothing in it acts on a terminal, and it is not too long.
pub(crate) fn shown_text(text: &str) -> String {
    const SHOWN_MAX: usize = 120;
    let acts = |c: &char| c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let mut shown = String::new();
    for (n, c) in text.chars().enumerate() {
        match c {
            _ if n == SHOWN_MAX => {
                shown.push_str("...");
                break;
            }
            c if acts(&c) => shown.extend(c.escape_unicode()),
            c => shown.push(c),
        }
    }
    shown
}

/// A path in a folder: the operator's part as it is, the image's as a text of it.
fn shown_path(folder: &Path, names: &Path) -> String {
    folder.join(shown_text(&names.to_string_lossy())).display().to_string()
}

fn missing(child: &Path, link: &ParentLink, tried: &Tried, nothing_named: bool) -> Missing {
    let ids = link.ids.iter().map(Uuid::to_string).collect::<Vec<_>>().join(" or ");
    let names = link.paths.iter().map(|path| shown_text(&path.text)).collect::<Vec<_>>().join(", ");
    let called = if names.is_empty() { String::new() } else { format!(", called {names}") };
    let mut reasons: Vec<String> =
        tried.iter().take(TOLD_MAX).map(|(what, why)| format!("{what} {why}")).collect();
    if tried.len() > TOLD_MAX {
        reasons.push(format!("and {} more", tried.len() - TOLD_MAX));
    }
    let reason = if nothing_named {
        "no folder was named in which to look for it".to_owned()
    } else if reasons.is_empty() {
        "the image has no path of it".to_owned()
    } else {
        reasons.join("; ")
    };
    let locked = tried.iter().any(|(_, why)| matches!(**why, Refusal::Locked));
    let message = format!(
        "the parent of this differencing image (id {ids}{called}) is needed: {reason}. Name the folder or the file that \
         holds it with --parents, or give the image its parent with `blockctl image rebase {} --parent PATH`",
        child.display()
    );
    let kind = if locked { ErrorKind::Locked } else { ErrorKind::Parent };
    Missing { child: child.to_owned(), kind, id: link.ids.first().copied(), reason, message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ParentPath;

    /// What is looked for in the folder `/d` for a child in `/d/vm`, or why not.
    fn looked_for(kind: ParentPathKind, text: &str) -> Vec<Result<String, &'static str>> {
        let mut folder = Folder::open(Path::new("/")).unwrap();
        folder.real = "/d".into();
        let path = ParentPath { kind, text: text.into() };
        let link = ParentLink { format: Format::Vhd, ids: vec![], paths: vec![path] };
        let search = Search { link: &link, sector: 512, folder: Some(Path::new("/d/vm")), files: &[] };
        let shown = |path: PathBuf| path.to_str().unwrap().to_owned();
        candidates(&folder, &search).into_iter().map(|c| c.map(shown).map_err(|(_, why)| why)).collect()
    }

    fn found(kind: ParentPathKind, text: &str) -> Vec<String> {
        looked_for(kind, text).into_iter().map(Result::unwrap).collect()
    }

    #[test]
    fn a_relative_path_counts_from_the_childs_folder_and_then_by_its_last_name() {
        use ParentPathKind::Relative;
        assert_eq!(found(Relative, ".\\p.vhd"), ["vm/p.vhd", "p.vhd"]);
        assert_eq!(found(Relative, "..\\base\\p.vhd"), ["base/p.vhd", "p.vhd"]);
        assert_eq!(found(Relative, "..\\p.vhd"), ["p.vhd"], "each once");
        let out = looked_for(Relative, "..\\..\\p.vhd");
        assert_eq!(out, [Err("its path leads out of the folder"), Ok("p.vhd".into())]);
        assert_eq!(found(Relative, "\\d\\x\\p.vhd"), ["x/p.vhd", "p.vhd"], "not relative at all");
    }

    #[test]
    fn an_absolute_path_counts_where_it_leads_into_the_folder() {
        use ParentPathKind::{Absolute, Name};
        assert_eq!(found(Absolute, "\\d\\base\\p.vhd"), ["base/p.vhd", "p.vhd"]);
        assert_eq!(found(Absolute, "\\dd\\p.vhd"), ["p.vhd"]);
        assert_eq!(found(Absolute, "\\d\\..\\e\\p.vhd"), ["p.vhd"], "nothing that goes up");
        assert_eq!(found(Absolute, "C:\\d\\base\\p.vhd"), ["p.vhd"]);
        assert_eq!(found(Name, "C:\\disks\\p.vhd"), ["p.vhd"]);
        assert!(looked_for(Absolute, "\\d\\..").iter().all(Result::is_err));
        assert!(looked_for(Absolute, "\\d").iter().all(|c| *c == Ok("d".into())));
    }

    #[test]
    fn only_file_urls_are_decoded_and_a_name_stays_one_name() {
        use ParentPathKind::{Absolute, Relative};
        assert_eq!(found(Absolute, "file://localhost/d/a%20b/p%2Evhd"), ["a b/p.vhd", "p.vhd"]);
        assert_eq!(found(Absolute, "file:///d/100%/p%zz"), ["100%/p%zz", "p%zz"]);
        assert_eq!(found(Absolute, "file:///%2e%2e/%2E%2E/p"), ["p"]);
        for text in
            ["file:///d/..%2f..%2fetc", "file:///d/a%5cb", "file:///d/%00", "file:///%ff", "file://host"]
        {
            assert!(looked_for(Absolute, text).iter().all(Result::is_err), "{text}");
        }
        assert!(found(Relative, "%2e%2e\\p").contains(&"vm/%2e%2e/p".to_owned()));
    }

    #[test]
    fn texts_are_shown_without_what_acts_on_a_terminal() {
        assert_eq!(shown_text("a\u{1b}[2J\u{202e}\\é\n"), "a\\u{1b}[2J\\u{202e}\\é\\u{a}");
        assert_eq!(shown_text(&"x".repeat(121)), format!("{}...", "x".repeat(120)));
    }
}
