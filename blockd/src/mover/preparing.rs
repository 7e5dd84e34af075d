//! The images of a chain that nobody writes to: the targets of the parents are made with the move, and filled before its
//! machine begins with the newest image. Then what the machine sees below its two sides is the same.

use std::ops::ControlFlow;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use formats::{
    CopyError, CopyProgress, CreateOptions, ErrorKind, Geometry, Image, ImageType, Layer, NewParentLink,
};
use mirror::Tick;

use super::layering::{ParentMove, temporary};
use super::shared::MoveShared;
use super::{MovePlan, create_error};
use crate::disk::DiskError;
use crate::disk::handle::ImageHandle;

/// How often a paused preparation looks whether it may go on.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A parent that is to be copied.
#[derive(Debug)]
pub(super) struct ParentCopy {
    source: Arc<dyn Image>,
    /// On its own parents, so that zeroes that hide nothing take no space.
    target: Arc<dyn Image>,
    path: PathBuf,
}

/// Makes the targets of a chain under their temporary names, the base first, and opens them. Answers the whole, and what
/// is to be copied before the move begins, the base first.
///
/// # Errors
/// When a file cannot be made or opened. The caller removes what was made.
pub(super) fn make_chain(
    plan: &MovePlan,
    parents: &[ParentMove],
    source: &ImageHandle,
    geometry: Geometry,
    notes_dir: Option<&Path>,
) -> Result<(Arc<ImageHandle>, Vec<ParentCopy>), DiskError> {
    let chain = source.image().as_chain().ok_or_else(|| {
        DiskError::new(ErrorKind::InvalidParameter, "the disk has no parents any more: start the move again")
    })?;
    let layers = chain.layers();
    if layers.len() != parents.len() + 1 {
        return Err(DiskError::new(
            ErrorKind::InvalidParameter,
            format!("the disk has {} images now, not {}", layers.len(), parents.len() + 1),
        ));
    }
    let mut below: Vec<Arc<dyn Image>> = Vec::new();
    let mut below_path: Option<&Path> = None;
    let mut copies = Vec::new();
    for (parent, layer) in parents.iter().zip(&layers[1..]).rev() {
        if parent.stays() {
            below.insert(0, layer.clone());
        } else {
            let made = Making {
                plan,
                // Only the newest image of a chain that nobody knows of yet could lose something with the process.
                notes_dir: None,
                target: &parent.target,
                image_type: parent.image_type,
                block_size: parent.block_size,
                geometry: Geometry { virtual_size: layer.geometry().virtual_size, ..geometry },
            };
            let made_layer = made.layer(below.first(), below_path)?;
            let target = on_parents(made_layer.clone(), &below)?;
            let path = temporary(&parent.target, &plan.job);
            copies.push(ParentCopy { source: layer.clone(), target, path });
            below.insert(0, made_layer);
        }
        below_path = Some(&parent.target);
    }
    let made = Making {
        plan,
        notes_dir,
        target: &plan.target,
        image_type: plan.image_type,
        block_size: plan.block_size,
        geometry,
    };
    let top = made.layer(below.first(), below_path)?;
    let handle = ImageHandle::new(on_parents(top, &below)?, &plan.temporary(), &[source])?;
    Ok((Arc::new(handle), copies))
}

fn on_parents(layer: Arc<dyn Layer>, below: &[Arc<dyn Image>]) -> Result<Arc<dyn Image>, DiskError> {
    formats::on_parents(layer, below).map_err(|e| DiskError::new(e.kind, e.to_string()))
}

/// One file of the target.
struct Making<'a> {
    plan: &'a MovePlan,
    notes_dir: Option<&'a Path>,
    target: &'a Path,
    image_type: ImageType,
    block_size: Option<u32>,
    geometry: Geometry,
}

impl Making<'_> {
    /// Makes and opens it.
    fn layer(
        &self,
        parent: Option<&Arc<dyn Image>>,
        parent_path: Option<&Path>,
    ) -> Result<Arc<dyn Layer>, DiskError> {
        let path = temporary(self.target, &self.plan.job);
        let options = CreateOptions {
            image_type: self.image_type,
            block_size: self.block_size,
            logical_sector_size: self.geometry.logical_sector_size,
            ..CreateOptions::new(self.plan.format, self.geometry.virtual_size)
        };
        let link = match (parent, parent_path) {
            (Some(parent), Some(parent_path)) => Some(link_to(&**parent, parent_path, self.target)?),
            _ => None,
        };
        formats::make_layer(&path, &options, link, self.notes_dir).map_err(create_error)
    }
}

/// What a child that will be at `child` says of its parent, which will be at `path`.
pub(super) fn link_to(parent: &dyn Image, path: &Path, child: &Path) -> Result<NewParentLink, DiskError> {
    let unusable = |kind, message: String| DiskError::new(kind, format!("{}: {message}", path.display()));
    let id = parent.content_id().ok_or_else(|| {
        unusable(ErrorKind::Unsupported, format!("a {} image cannot be a parent", parent.format()))
    })?;
    // The files are not there yet under these names, but their folders are.
    let real = |path: &Path| {
        let folder = path.parent().unwrap_or(Path::new("/")).canonicalize();
        let folder = folder.map_err(|e| DiskError::new(ErrorKind::Io, format!("{}: {e}", path.display())))?;
        Ok::<_, DiskError>((folder.join(path.file_name().unwrap_or_default()), folder))
    };
    let ((path, _), (_, folder)) = (real(path)?, real(child)?);
    match path.to_str() {
        Some(absolute) if !absolute.contains('\\') => Ok(NewParentLink {
            id,
            next_id: None,
            relative: relative_to(&path, &folder),
            absolute: absolute.to_owned(),
        }),
        _ => Err(unusable(
            ErrorKind::InvalidParameter,
            "an image can't name a parent with a backslash in its path, or a path that is not UTF-8".into(),
        )),
    }
}

/// `path` as seen from `folder`, both absolute.
fn relative_to(path: &Path, folder: &Path) -> Option<String> {
    let is_plain = |p: &Path| p.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || !folder.is_absolute() || !is_plain(path) || !is_plain(folder) {
        return None;
    }
    let common = path.components().zip(folder.components()).take_while(|(a, b)| a == b).count();
    let mut relative: PathBuf = folder.components().skip(common).map(|_| "..").collect();
    relative.extend(path.components().skip(common));
    relative.to_str().map(str::to_owned)
}

/// How far the preparation is, and what it is told.
#[derive(Debug, Default)]
pub(super) struct Preparation {
    state: Mutex<State>,
}

#[derive(Debug, Default, Clone)]
pub(super) struct State {
    /// Whether it runs; the machine has not begun then.
    pub(super) is_running: bool,
    pub(super) is_paused: bool,
    pub(super) is_cancelled: bool,
    /// Bytes a second.
    pub(super) bandwidth: Option<u64>,
    /// Bytes of the parents' disks, of them dealt with, written, and found to be nothing or zeroes.
    pub(super) total: u64,
    pub(super) copied: u64,
    pub(super) zero: u64,
}

impl Preparation {
    pub(super) fn of(copies: &[ParentCopy], bandwidth: Option<u64>) -> Self {
        let total = copies.iter().map(|c| c.source.geometry().virtual_size).sum();
        let state = State { is_running: !copies.is_empty(), bandwidth, total, ..State::default() };
        Self { state: Mutex::new(state) }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies the parents, and leaves them cleanly closed.
    ///
    /// # Errors
    /// Why it failed, or that it was cancelled.
    pub(super) fn run(&self, copies: &[ParentCopy], shared: &MoveShared) -> Result<(), String> {
        for copy in copies {
            let before = self.state().clone();
            let since = Instant::now();
            let mut pace =
                Pace { shared, since, bytes: 0, limit: before.bandwidth, begun: shared.now(), told: 0 };
            let copied = formats::copy_layer(&*copy.source, &*copy.target, &mut |now| {
                self.report(&before, now, &mut pace)
            });
            let path = copy.path.display();
            match copied {
                Ok(_) => {}
                Err(CopyError::Cancelled) => return Err("cancelled".into()),
                Err(CopyError::Source(e)) => return Err(format!("a parent of the source: {e}")),
                Err(CopyError::Target(e)) => return Err(format!("{path}: {e}")),
            }
            copy.target.close().map_err(|e| format!("{path} cannot be closed: {e}"))?;
        }
        Ok(())
    }

    /// Takes note of progress, and waits while that was too fast, or paused.
    fn report(&self, before: &State, now: CopyProgress, pace: &mut Pace<'_>) -> ControlFlow<()> {
        pace.tell(now.bytes_copied);
        loop {
            let wait = {
                let mut state = self.state();
                state.copied = before.copied + now.bytes_copied;
                state.zero = before.zero + now.bytes_zero;
                match () {
                    () if state.is_cancelled => return ControlFlow::Break(()),
                    () if state.is_paused => LOOK_EVERY,
                    () => pace.wait(now.bytes_copied, state.bandwidth),
                }
            };
            if wait.is_zero() {
                pace.begun = pace.shared.now();
                return ControlFlow::Continue(());
            }
            std::thread::sleep(wait.min(LOOK_EVERY));
        }
    }
}

/// Keeps to a limit that may change, and leaves the guest the time that the machine wants it to have.
struct Pace<'a> {
    shared: &'a MoveShared,
    since: Instant,
    bytes: u64,
    limit: Option<u64>,
    /// When the present piece began, and what was copied before it.
    begun: Tick,
    told: u64,
}

impl Pace<'_> {
    /// The machine hears of what was copied.
    fn tell(&mut self, bytes: u64) {
        if bytes > self.told {
            self.shared.machine().copied_beside(self.begun, self.shared.now(), bytes - self.told);
            self.told = bytes;
        }
    }

    fn wait(&mut self, bytes: u64, limit: Option<u64>) -> Duration {
        if limit != self.limit {
            (self.since, self.bytes, self.limit) = (Instant::now(), bytes, limit);
        }
        self.wait_for_limit(bytes).max(self.wait_for_guest())
    }

    fn wait_for_guest(&self) -> Duration {
        let now = self.shared.now();
        let until = self.shared.machine().may_copy_beside(now).err();
        until.map_or(Duration::ZERO, |at| Duration::from_micros(at.us_since(now)))
    }

    fn wait_for_limit(&self, bytes: u64) -> Duration {
        let Some(limit) = self.limit else { return Duration::ZERO };
        let due = (bytes - self.bytes) as f64 / limit as f64;
        Duration::try_from_secs_f64(due).unwrap_or(Duration::MAX).saturating_sub(self.since.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_named_from_the_folder_of_its_child() {
        let seen = |path: &str, folder: &str| relative_to(Path::new(path), Path::new(folder));
        assert_eq!(seen("/a/b/p.vhdx", "/a/b").as_deref(), Some("p.vhdx"));
        assert_eq!(seen("/a/base/p.vhdx", "/a/b/c").as_deref(), Some("../../base/p.vhdx"));
        assert_eq!(seen("/p.vhdx", "/a").as_deref(), Some("../p.vhdx"));
        assert_eq!(seen("/a/../p.vhdx", "/a"), None);
        assert_eq!(seen("p.vhdx", "/a"), None);
    }
}
