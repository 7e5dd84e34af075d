//! A file system that can share blocks, for the tests of what does.

use std::path::PathBuf;
use std::process::Command;

/// Bytes of the file in which it is.
const SIZE: u64 = 400 << 20;

/// An XFS in a file, mounted as long as this lives.
#[derive(Debug)]
pub struct Xfs {
    folder: tempfile::TempDir,
}

impl Xfs {
    /// `None`, said loudly, where that cannot be done.
    pub fn mount() -> Option<Self> {
        let mounted = Self::try_mount();
        if mounted.is_none() {
            println!(
                "SKIPPED: no XFS can be made and mounted here (xfsprogs, root, loop devices), so no blocks were shared"
            );
        }
        mounted
    }

    fn try_mount() -> Option<Self> {
        let folder = tempfile::Builder::new().prefix("blockd-xfs-").tempdir().ok()?;
        let (image, place) = (folder.path().join("image"), folder.path().join("mounted"));
        std::fs::create_dir(&place).ok()?;
        std::fs::File::create(&image).ok()?.set_len(SIZE).ok()?;
        let run = |command: &mut Command| {
            let output = command.env("PATH", "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin").output();
            output.is_ok_and(|output| output.status.success())
        };
        let is_there = run(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&image))
            && run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&place));
        is_there.then_some(Self { folder })
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("mounted")
    }

    /// Bytes in use, when all is on the disk.
    ///
    /// # Errors
    /// What the system says.
    pub fn used(&self) -> std::io::Result<u64> {
        std::fs::File::open(self.path())?.sync_all()?;
        let fs = nix::sys::statvfs::statvfs(&self.path())?;
        Ok((fs.blocks() - fs.blocks_free()) * fs.fragment_size())
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}
