//! The journal of a move as a file: appended to, each record durable before what it permits.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use mirror::{Record, Tail};

use crate::disk::DiskError;

/// The name ending of journals.
pub const EXTENSION: &str = "journal";

/// A journal that is written to.
#[derive(Debug)]
pub struct JournalFile {
    file: File,
    path: PathBuf,
    /// Bytes that are known to be good; what a failed append may have left behind is cut off before the next one.
    len: u64,
    /// Whether there was nothing in it when it was opened.
    is_new: bool,
}

/// The path of a job's journal.
pub fn path_of(moves_dir: &Path, job: &str) -> PathBuf {
    moves_dir.join(job).with_extension(EXTENSION)
}

/// Makes what a folder lists durable.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// The folder of a file.
pub fn dir_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

impl JournalFile {
    /// Opens a job's journal, or begins it. A torn last line is cut off.
    ///
    /// # Errors
    /// When the file cannot be made or read, or its contents are damaged.
    pub fn open(moves_dir: &Path, job: &str) -> Result<Self, DiskError> {
        let path = path_of(moves_dir, job);
        let fail = |e: &dyn std::fmt::Display| {
            DiskError::new(
                formats::ErrorKind::Io,
                format!("{}: cannot open the journal: {e}", path.display()),
            )
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| fail(&e))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(|e| fail(&e))?;
        let (_, tail) = mirror::decode_all(&bytes).map_err(|e| fail(&e))?;
        let len = match tail {
            Tail::Whole => bytes.len() as u64,
            Tail::Torn { offset } => offset,
        };
        sync_dir(moves_dir).map_err(|e| fail(&e))?;
        Ok(Self { file, path, len, is_new: bytes.is_empty() })
    }

    /// Appends a record, durably.
    ///
    /// # Errors
    /// What the file says. The record may or may not be durable then; appending it once more is fine.
    pub fn append(&mut self, record: &Record) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let line = mirror::encode(record);
        self.file.set_len(self.len)?;
        self.file.write_all_at(&line, self.len)?;
        self.file.flush()?;
        self.file.sync_all()?;
        self.len += line.len() as u64;
        Ok(())
    }

    /// The next record is the first one: nothing that was recorded before counts any more.
    pub fn begin_anew(&mut self) {
        self.len = 0;
    }

    /// Removes the journal of a move that never began. That of a move which was to begin again stays: the next start of
    /// the daemon may have more luck.
    pub fn discard(self) {
        if !self.is_new {
            return;
        }
        let removed = std::fs::remove_file(&self.path).and_then(|()| sync_dir(dir_of(&self.path)));
        if let Err(e) = removed {
            tracing::warn!(journal = %self.path.display(), "cannot be removed: {e}");
        }
    }

    /// All of it, for a receipt.
    pub fn bytes(&self) -> io::Result<Vec<u8>> {
        std::fs::read(&self.path)
    }
}
