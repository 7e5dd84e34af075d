//! What metadata I/O stands on: the few verbs that a codec needs of a file.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::FallocateFlags;
use nix::unistd::Whence;

/// A file (or the simulation of one) as the codecs see it.
///
/// Blocking, because only first writes to a block, discards and maintenance wait for it. Offsets and lengths are in
/// bytes. Writes are visible to other readers, and survive the death of this process, as soon as the call returns;
/// they survive a power cut only after [`Storage::sync`] has returned.
pub trait Storage: Send + Sync + Debug {
    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the file ends inside the range; whatever else the file says.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `buf` at `offset`, extending the file where needed.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// The file's size in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Whether the file is empty.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Cuts the file or extends it with a hole that reads as zeroes.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes `len` bytes at `offset` read as zeroes and gives their space back where the file system can. The size
    /// of the file stays; the part of the range beyond it is left alone.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes everything written so far durable: contents and size.
    fn sync(&self) -> io::Result<()>;
    /// The first range `[start, end)` at or after `offset` that may hold data, or `None` when only holes follow.
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>>;
    /// The file behind it, for the caller's own payload I/O; `None` for a simulated one.
    fn file(&self) -> Option<&File>;
}

/// A [`Storage`] on a real file.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    /// The last answer of [`Storage::next_data`]. Some file systems look through everything up to the next hole for each
    /// answer (tmpfs goes page by page), so a scan in small steps would take time in the square of the file's size.
    data_run: Mutex<Option<DataRun>>,
}

/// A range of the file that held data when it was looked at.
#[derive(Debug, Clone, Copy)]
struct DataRun {
    start: u64,
    end: u64,
    seen: Instant,
}

impl DataRun {
    /// For how long it is believed: others may punch the file. Taking a hole for data costs a read of zeroes, no more.
    const BELIEVED: Duration = Duration::from_secs(1);

    fn holds(&self, offset: u64) -> bool {
        (self.start..self.end).contains(&offset) && self.seen.elapsed() < Self::BELIEVED
    }
}

impl FileStorage {
    /// Takes over an open file; locks and flags are the opener's business.
    pub fn new(file: File) -> Self {
        Self { file, data_run: Mutex::new(None) }
    }

    fn data_run(&self) -> MutexGuard<'_, Option<DataRun>> {
        self.data_run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_zeroes(&self, mut offset: u64, end: u64) -> io::Result<()> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        while offset < end {
            let n = (end - offset).min(ZEROES.len() as u64) as usize;
            self.file.write_all_at(&ZEROES[..n], offset)?;
            offset += n as u64;
        }
        Ok(())
    }
}

impl Storage for FileStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let done = self.file.set_len(len);
        *self.data_run() = None;
        done
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.saturating_add(len).min(self.len()?);
        if end <= offset {
            return Ok(());
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let punched = nix::fcntl::fallocate(&self.file, flags, offset as i64, (end - offset) as i64);
        *self.data_run() = None;
        match punched {
            Ok(()) => Ok(()),
            Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENOSYS) => self.write_zeroes(offset, end),
            Err(e) => Err(e.into()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        use nix::errno::Errno;
        if let Some(run) = self.data_run().filter(|run| run.holds(offset)) {
            return Ok(Some((offset, run.end)));
        }
        let len = self.len()?;
        if offset >= len {
            return Ok(None);
        }
        let start = match nix::unistd::lseek(&self.file, offset as i64, Whence::SeekData) {
            Ok(at) => at as u64,
            Err(Errno::ENXIO) => return Ok(None),
            // A file system that knows no holes: everything is data.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(Some((offset, len))),
            Err(e) => return Err(e.into()),
        };
        let end = nix::unistd::lseek(&self.file, start as i64, Whence::SeekHole)? as u64;
        *self.data_run() = Some(DataRun { start, end, seen: Instant::now() });
        Ok(Some((start, end)))
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }
}
