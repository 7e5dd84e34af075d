//! An open image together with the files that its payload is read from and written to.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use formats::{ErrorKind, Format, Image, OpenOptions, Piece, Place};

use super::DiskError;

/// One file of a chain as the data path uses it.
#[derive(Debug)]
pub struct PayloadFile {
    file: File,
    /// Alignment that buffers need, in bytes: 1 for I/O through the page cache.
    pub memory_align: usize,
    /// Alignment that offsets and lengths need, in bytes: 1 for I/O through the page cache.
    pub offset_align: u64,
}

impl PayloadFile {
    /// Opens the file behind a codec's storage a second time: past the page cache where the file system can do that
    /// with the image's sectors, and where payload shares no page with metadata, which goes through the cache.
    fn open(base: &File, writable: bool, payload_align: u32, sector: u32) -> std::io::Result<Self> {
        let path = format!("/proc/self/fd/{}", base.as_raw_fd());
        let mut options = std::fs::OpenOptions::new();
        options.read(true).write(writable);
        if payload_align >= 4096
            && let Some((memory_align, offset_align)) = direct_io_align(base)
            && offset_align <= u64::from(sector)
            && let Ok(file) = options.clone().custom_flags(libc::O_DIRECT).open(&path)
        {
            return Ok(Self { file, memory_align, offset_align });
        }
        let file = options.open(&path).or_else(|_| base.try_clone())?;
        Ok(Self { file, memory_align: 1, offset_align: 1 })
    }

    /// The descriptor for the ring.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether it goes past the page cache.
    pub fn is_direct(&self) -> bool {
        self.memory_align > 1
    }
}

/// What `statx` says of direct I/O on the file: alignment of memory and of offsets; `None` where it is not possible
/// or not told.
fn direct_io_align(file: &File) -> Option<(usize, u64)> {
    // SAFETY: statx fills the buffer that it is given; the path is a constant C string.
    let stat = unsafe {
        let mut stat: libc::statx = std::mem::zeroed();
        let got =
            libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &mut stat);
        (got == 0).then_some(stat)?
    };
    let told = stat.stx_mask & libc::STATX_DIOALIGN != 0;
    let (memory, offset) = (stat.stx_dio_mem_align as usize, u64::from(stat.stx_dio_offset_align));
    (told && memory.is_power_of_two() && offset.is_power_of_two()).then_some((memory, offset))
}

/// An open image: the map, and the files to do I/O on.
#[derive(Debug)]
pub struct ImageHandle {
    image: Arc<dyn Image>,
    files: Vec<PayloadFile>,
    path: Mutex<PathBuf>,
    sync_failed: OnceLock<String>,
}

impl ImageHandle {
    /// Opens an image for serving. `recover` mends what a crash of ours can leave behind.
    ///
    /// # Errors
    /// What `formats::open` says; what the system says when a file cannot be opened a second time.
    pub fn open(
        path: &Path,
        format: Option<Format>,
        read_only: bool,
        recover: bool,
    ) -> Result<Arc<Self>, DiskError> {
        let options = OpenOptions { format, read_only, recover, ..OpenOptions::default() };
        let image = formats::open(path, &options).map_err(|e| DiskError::new(e.kind, e.to_string()))?;
        let geometry = image.geometry();
        let mut files = Vec::new();
        for (i, storage) in image.files().iter().enumerate() {
            let base =
                storage.file().ok_or_else(|| DiskError::new(ErrorKind::Io, "the image has no file"))?;
            let writable = i == 0 && !image.is_read_only();
            files.push(
                PayloadFile::open(base, writable, geometry.payload_align, geometry.logical_sector_size)
                    .map_err(|e| {
                        DiskError::new(ErrorKind::Io, format!("{}: cannot open for I/O: {e}", path.display()))
                    })?,
            );
        }
        Ok(Arc::new(Self {
            image,
            files,
            path: Mutex::new(path.to_path_buf()),
            sync_failed: OnceLock::new(),
        }))
    }

    /// The map.
    pub fn image(&self) -> &dyn Image {
        &*self.image
    }

    /// The file that a piece lies in.
    pub fn file_of(&self, piece: &Piece) -> Option<(&PayloadFile, u64)> {
        match piece.place {
            Place::File { file, offset } => Some((&self.files[usize::from(file.0)], offset)),
            Place::Zero => None,
            Place::Parent => {
                unreachable!("what is served has its parents, and their pieces are places in files")
            }
        }
    }

    /// All files of the chain, the image's own first.
    pub fn files(&self) -> &[PayloadFile] {
        &self.files
    }

    /// The image's own file, where all writes go.
    pub fn top(&self) -> &PayloadFile {
        &self.files[0]
    }

    /// The strictest alignment of memory that its files ask for.
    pub fn memory_align(&self) -> usize {
        self.files.iter().map(|f| f.memory_align).max().unwrap_or(1)
    }

    /// The strictest alignment of lengths that its files ask for.
    pub fn offset_align(&self) -> usize {
        self.files.iter().map(|f| f.offset_align as usize).max().unwrap_or(1)
    }

    /// Remembers how a sync of the image's file ended, and says what it counts as: what a failed sync has lost, no later
    /// one brings back, though it may succeed.
    ///
    /// # Errors
    /// This sync's error, or that of an earlier one.
    pub fn synced(&self, ended: Result<(), String>) -> Result<(), String> {
        if let Err(e) = ended {
            let _ = self.sync_failed.set(e);
        }
        self.sync_failed.get().map_or(Ok(()), |e| Err(e.clone()))
    }

    /// Where the image is now.
    pub fn path(&self) -> PathBuf {
        self.path.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says that the image was renamed.
    pub fn set_path(&self, path: &Path) {
        *self.path.lock().unwrap_or_else(PoisonError::into_inner) = path.to_path_buf();
    }
}
