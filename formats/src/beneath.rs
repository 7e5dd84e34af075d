//! Opening a file inside a folder that the operator named, by a path that an image has made up.
//!
//! The path is untrusted: whoever wrote the image chose it. It is taken apart into names first ([`names`]), and the kernel
//! then resolves it without leaving the folder and without following a link of any kind, so nothing that happens in the
//! folder meanwhile leads out of it. What was opened is judged by its descriptor alone.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::sys::stat::Mode;

/// The longest path text that is looked at, in bytes of UTF-8.
pub(crate) const PATH_MAX_BYTES: usize = 4096;

/// A folder, held open.
#[derive(Debug)]
pub(crate) struct Folder {
    /// As the operator named it.
    pub(crate) path: PathBuf,
    /// Where it really is, links resolved.
    pub(crate) real: PathBuf,
    handle: OwnedFd,
}

impl Folder {
    /// Holds the folder at `path` open. The operator has named it, so links in `path` are followed.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let handle = open(path, flags, Mode::empty())?;
        Ok(Self { path: path.to_owned(), real: path.canonicalize()?, handle })
    }

    /// Opens `names`, a path of plain names, for reading and without waiting.
    pub(crate) fn open_file(&self, names: &Path) -> io::Result<File> {
        match open_resolved(&self.handle, names) {
            // An old kernel, or a sandbox that knows no newer system calls.
            Err(Errno::ENOSYS | Errno::EPERM) => open_by_steps(&self.handle, names),
            other => other,
        }
        .map(File::from)
        .map_err(io::Error::from)
    }
}

/// `O_NONBLOCK` keeps the opening of a FIFO from waiting, `O_NOCTTY` that of a terminal from taking it.
fn for_reading() -> OFlag {
    OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC
}

fn open_resolved(folder: impl AsFd, names: &Path) -> nix::Result<OwnedFd> {
    let resolve =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    openat2(folder, names, OpenHow::new().flags(for_reading()).resolve(resolve))
}

/// The same for kernels without `openat2`: each folder on the way is opened by its plain name and must be no link, so
/// each step stays beneath the one before.
fn open_by_steps(folder: impl AsFd, names: &Path) -> nix::Result<OwnedFd> {
    let mut steps: Vec<_> = names.iter().collect();
    let name = steps.pop().ok_or(Errno::ENOENT)?;
    let mut at =
        folder.as_fd().try_clone_to_owned().map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)))?;
    let on_the_way = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    for step in steps {
        at = openat(&at, step, on_the_way, Mode::empty())?;
    }
    openat(&at, name, for_reading(), Mode::empty())
}

/// Takes a path text of an image apart: backslashes are slashes, empty names and `.` fall away, and nothing is decoded or
/// expanded. The second value says whether it began with a slash.
///
/// # Errors
/// What is wrong with it, for the operator: a NUL, or more than [`PATH_MAX_BYTES`].
pub(crate) fn names(text: &str) -> Result<(Vec<String>, bool), &'static str> {
    if text.len() > PATH_MAX_BYTES {
        return Err("its path is longer than 4096 bytes");
    }
    if text.contains('\0') {
        return Err("its path has a NUL in it");
    }
    let text = text.replace('\\', "/");
    let names = text.split('/').filter(|name| !name.is_empty() && *name != ".").map(str::to_owned).collect();
    Ok((names, text.starts_with('/')))
}

/// Goes from the folder `from` along `names`, in thought: `..` takes the last name away. The result is a path of plain
/// names.
///
/// # Errors
/// When that leads out of where `from` begins, or nowhere.
pub(crate) fn walk(from: &Path, names: &[String]) -> Result<PathBuf, &'static str> {
    let mut at = from.to_path_buf();
    for name in names {
        if name != ".." {
            at.push(name);
        } else if !at.pop() {
            return Err("its path leads out of the folder");
        }
    }
    if names.last().is_none_or(|name| name == "..") {
        return Err("its path names no file");
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walked(from: &str, text: &str) -> Result<PathBuf, &'static str> {
        walk(Path::new(from), &names(text)?.0)
    }

    #[test]
    fn paths_are_taken_apart_and_nothing_is_expanded() {
        assert_eq!(walked("", ".\\p.vhdx"), Ok("p.vhdx".into()));
        assert_eq!(walked("a/b", "..\\c\\.\\\\p.vhdx"), Ok("a/c/p.vhdx".into()));
        assert_eq!(walked("", "C:foo"), Ok("C:foo".into()), "a name like any other");
        assert_eq!(walked("", "%2e%2e\\p"), Ok("%2e%2e/p".into()), "nothing is decoded");
        assert_eq!(walked("", "a\u{2215}..\u{2215}b"), Ok("a\u{2215}..\u{2215}b".into()), "one odd name");
        assert_eq!(walked("", "$HOME/~"), Ok("$HOME/~".into()));
        assert_eq!(names("\\\\?\\C:\\x").map(|(_, absolute)| absolute), Ok(true));
    }

    #[test]
    fn paths_that_lead_out_or_nowhere_are_refused() {
        for text in ["..", "a\\..\\..\\b", "..\\..\\etc\\passwd", "/../../x", "..//p"] {
            assert!(walked("", text).is_err(), "{text}");
        }
        for text in ["", ".", "/", "a/..", "\\.\\"] {
            assert!(walked("x", text).is_err(), "{text:?}");
        }
        assert!(walked("", "a\0b").is_err());
        assert!(walked("", &"x".repeat(PATH_MAX_BYTES + 1)).is_err());
        assert!(walked("", &"\\..".repeat(1 << 20)).is_err());
    }

    /// What both ways of opening answer for a path.
    fn both(folder: &Folder, names: &str) -> [Result<(), Errno>; 2] {
        let names = Path::new(names);
        [open_resolved(&folder.handle, names), open_by_steps(&folder.handle, names)].map(|r| r.map(drop))
    }

    #[test]
    fn an_old_kernel_refuses_the_same_paths() {
        use std::os::unix::fs::symlink;
        let temp = std::env::temp_dir().join(format!("blockd-beneath-{}", uuid::Uuid::new_v4()));
        let inside = temp.join("in");
        std::fs::create_dir_all(inside.join("sub")).unwrap();
        std::fs::write(temp.join("secret"), "x").unwrap();
        std::fs::write(inside.join("sub/file"), "x").unwrap();
        symlink(temp.join("secret"), inside.join("link")).unwrap();
        symlink("sub/file", inside.join("near")).unwrap();
        symlink("..", inside.join("up")).unwrap();
        symlink("/proc/self/root", inside.join("magic")).unwrap();
        let folder = Folder::open(&inside).unwrap();
        assert_eq!(both(&folder, "sub/file"), [Ok(()), Ok(())]);
        for refused in ["link", "near", "up/secret", "magic/etc/passwd", "sub/../link"] {
            assert!(both(&folder, refused).iter().all(Result::is_err), "{refused}");
        }
        assert_eq!(both(&folder, "missing/file"), [Err(Errno::ENOENT); 2]);
        std::fs::remove_dir_all(&temp).unwrap();
    }
}
