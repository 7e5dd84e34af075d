//! An open image together with the files that its payload is read from and written to.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use formats::{ErrorKind, Format, Image, ImageError, OpenOptions, Piece, Place, Storage};

use super::DiskError;

/// One file of a chain as the data path uses it.
#[derive(Debug)]
pub struct PayloadFile {
    file: File,
    in_memory: bool,
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
            return Ok(Self { file, in_memory: false, memory_align, offset_align });
        }
        let file = options.open(&path).or_else(|_| base.try_clone())?;
        Ok(Self { in_memory: is_in_memory(&file), file, memory_align: 1, offset_align: 1 })
    }

    /// The descriptor for the ring.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether there is no device to wait for: a file of tmpfs.
    pub fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    /// Whether it goes past the page cache.
    pub fn is_direct(&self) -> bool {
        self.memory_align > 1
    }
}

fn is_in_memory(file: &File) -> bool {
    nix::sys::statfs::fstatfs(file).is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC)
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

/// A layer whose payload is not all in its file.
fn no_file(path: &Path, layer: usize) -> DiskError {
    let which = if layer == 0 { "it".to_owned() } else { format!("parent {layer} of it") };
    DiskError::new(
        ErrorKind::NeedsRepair,
        format!(
            "{}: {which} was not closed cleanly, and its log holds payload that is not in its place yet;              run `blockctl image check --repair` on that image first",
            path.display()
        ),
    )
}

/// How an image is opened for serving.
#[derive(Debug, Clone, Default)]
pub struct OpenImage {
    /// Its format; from its name when absent.
    pub format: Option<Format>,
    /// Refuse writes.
    pub read_only: bool,
    /// Mend what a crash of ours can leave behind.
    pub recover: bool,
    /// Files that may be its parents, and folders in which they may be.
    pub parents: Vec<PathBuf>,
    /// Where a differencing image notes what a crash must not lose.
    pub notes_dir: Option<PathBuf>,
}

/// An open image with its parents: the map, and the files to do I/O on.
#[derive(Debug)]
pub struct ImageHandle {
    image: Arc<dyn Image>,
    files: Vec<Arc<PayloadFile>>,
    memory_align: usize,
    offset_align: usize,
    path: Mutex<PathBuf>,
    /// Where the parents are, the nearest first.
    parents: Mutex<Vec<PathBuf>>,
    sync_failed: OnceLock<String>,
    /// Held while the image is maintained; whether it was given up for another view of the same file.
    upkeep: Mutex<bool>,
}

impl ImageHandle {
    /// Opens an image for serving, together with its parents.
    ///
    /// # Errors
    /// What `formats::open` says; what the system says when a file cannot be opened a second time; a parent whose log
    /// holds what is not in its file.
    pub fn open(path: &Path, how: &OpenImage) -> Result<Arc<Self>, DiskError> {
        let options = OpenOptions {
            format: how.format,
            read_only: how.read_only,
            recover: how.recover,
            parents: how.parents.clone(),
            notes_dir: how.notes_dir.clone(),
            ..OpenOptions::default()
        };
        let image = formats::open(path, &options).map_err(|e| DiskError::new(e.kind, e.to_string()))?;
        Self::new(image, path, &[]).map(Arc::new)
    }

    /// Serves `image`, which is at `path`. Files that `known` handles have open already are shared with them.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn new(image: Arc<dyn Image>, path: &Path, known: &[&Self]) -> Result<Self, DiskError> {
        let layers: Vec<&dyn Image> = match image.as_chain() {
            Some(chain) => chain.layers().iter().map(|layer| &**layer).collect(),
            None => vec![&*image],
        };
        let (mut files, mut paths) = (Vec::new(), Vec::new());
        for (layer, storage) in layers.iter().zip(image.files()) {
            let base = storage.file().ok_or_else(|| no_file(path, paths.len()))?;
            let shared = known.iter().find_map(|handle| handle.file_behind(storage));
            let (geometry, writable) = (layer.geometry(), !layer.is_read_only());
            let file = match shared {
                Some(file) => file,
                None => {
                    PayloadFile::open(base, writable, geometry.payload_align, geometry.logical_sector_size)
                        .map(Arc::new)
                        .map_err(|e| {
                            let message = format!("{}: cannot open for I/O: {e}", path.display());
                            DiskError::new(ErrorKind::Io, message)
                        })?
                }
            };
            paths.push(std::fs::read_link(format!("/proc/self/fd/{}", base.as_raw_fd())).unwrap_or_default());
            files.push(file);
        }
        Ok(Self {
            memory_align: files.iter().map(|f| f.memory_align).max().unwrap_or(1),
            offset_align: files.iter().map(|f| f.offset_align as usize).max().unwrap_or(1),
            image,
            files,
            path: Mutex::new(path.to_path_buf()),
            parents: Mutex::new(paths.split_off(1)),
            sync_failed: OnceLock::new(),
            upkeep: Mutex::new(false),
        })
    }

    /// Another view of the image's own file that follows this one: it has the same name, and what a sync of the file has
    /// lost stays lost.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn succeeded_by(&self, image: Arc<dyn Image>) -> Result<Arc<Self>, DiskError> {
        let next = Self::new(image, &self.path(), &[self])?;
        if let Some(e) = self.sync_failed.get() {
            let _ = next.sync_failed.set(e.clone());
        }
        Ok(Arc::new(next))
    }

    /// The file that payload of `storage` is in, if it is one of this image's.
    fn file_behind(&self, storage: &Arc<dyn Storage>) -> Option<Arc<PayloadFile>> {
        let at = self.image.files().iter().position(|own| Arc::ptr_eq(own, storage))?;
        Some(self.files[at].clone())
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

    /// The map, to be shared.
    pub fn shared_image(&self) -> &Arc<dyn Image> {
        &self.image
    }

    /// All files of the chain, the image's own first.
    pub fn files(&self) -> &[Arc<PayloadFile>] {
        &self.files
    }

    /// The image's own file, where all writes go.
    pub fn top(&self) -> &PayloadFile {
        &self.files[0]
    }

    /// The strictest alignment of memory that its files ask for.
    pub fn memory_align(&self) -> usize {
        self.memory_align
    }

    /// The strictest alignment of lengths that its files ask for.
    pub fn offset_align(&self) -> usize {
        self.offset_align
    }

    /// Remembers how a sync of the image's file ended, and says what it counts as: what a failed sync has lost, no later
    /// one brings back, though it may succeed.
    ///
    /// # Errors
    /// This sync's error, or that of an earlier one.
    pub fn synced(&self, ended: Result<(), String>) -> Result<(), String> {
        if let Err(e) = ended {
            self.image.sync_failed(&e);
            let _ = self.sync_failed.set(e);
        }
        self.sync_failed.get().map_or(Ok(()), |e| Err(e.clone()))
    }

    /// [`Image::maintain`], once at a time, and not for an image that was given up.
    ///
    /// # Errors
    /// What the image says.
    pub fn maintain(&self, quiesce: &dyn Fn()) -> Result<(), ImageError> {
        let given_up = self.upkeep.lock().unwrap_or_else(PoisonError::into_inner);
        if *given_up { Ok(()) } else { self.image.maintain(quiesce) }
    }

    /// Keeps maintenance away. What the guard holds says whether the image is given up for good.
    pub fn without_upkeep(&self) -> MutexGuard<'_, bool> {
        self.upkeep.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the image and its parents are, the image first.
    pub fn paths(&self) -> Vec<PathBuf> {
        let parents = self.parents.lock().unwrap_or_else(PoisonError::into_inner).clone();
        std::iter::once(self.path()).chain(parents).collect()
    }

    /// Says that the image and its parents were renamed.
    ///
    /// # Panics
    /// When there are fewer or more paths than files.
    pub fn set_paths(&self, mut paths: Vec<PathBuf>) {
        assert_eq!(paths.len(), self.files.len(), "a path for each file");
        let parents = paths.split_off(1);
        self.set_path(&paths[0]);
        *self.parents.lock().unwrap_or_else(PoisonError::into_inner) = parents;
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
