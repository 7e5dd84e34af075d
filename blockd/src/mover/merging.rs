//! Folding the newest images of a chain into the one below them.
//!
//! ```text
//!   hold requests ─► the child names both ids of its parent ─► the parent is opened for writing ─► requests go on
//!   move from the chain to the parent: copy what the newest images have, mirror, verify, commit
//!   delete the newest images
//! ```
//!
//! A crash before the commit leaves the chain as the disk, on a parent that has some of what is hidden; the merge then
//! begins again and copies everything once more.

use std::path::PathBuf;
use std::sync::Arc;

use formats::{Chain, ErrorKind, ImageError, MergeChain, MergeRefused, MergeSides};

use super::MovePlan;
use super::layering::{Layering, Merge};
use crate::disk::exchange::{NotReopened, Serve};
use crate::disk::handle::ImageHandle;
use crate::disk::{Disk, DiskError};

/// The chain with a parent that can be written to, and that parent as an image of its own.
#[derive(Debug)]
pub(super) struct Merging {
    pub(super) source: Arc<ImageHandle>,
    pub(super) target: Arc<ImageHandle>,
}

fn told(e: &ImageError) -> DiskError {
    DiskError::new(e.kind, e.to_string())
}

/// Has the disk go on with the same chain, in which the parent that takes the newest images is open for writing. Holds
/// requests for as long as that takes.
///
/// # Errors
/// When the parent cannot be opened for writing, for one because somebody else has it open; the disk goes on as before.
pub(super) fn begin(disk: &Disk, plan: &MovePlan, merge: &Merge) -> Result<Merging, DiskError> {
    let image = disk.shared().route.load().source().clone();
    if image.image().is_read_only() {
        return Err(DiskError::new(
            ErrorKind::ReadOnly,
            "the disk is served for reading only, and a merge writes to its images",
        ));
    }
    let paths = image.paths();
    let chain = merge_chain(disk, &image, &paths, plan, merge)?;
    let sizes = [image.image(), &*chain.chain.layers()[merge.levels()]].map(|i| i.geometry().virtual_size);
    if sizes[0] < sizes[1] {
        let message = format!(
            "{} has {} bytes, and the disk {}: a merge would bring back what it has behind the disk's end; make one image of the chain instead \
             (blockctl move {} --to FILE --flatten)",
            plan.target.display(),
            sizes[1],
            sizes[0],
            plan.disk
        );
        return Err(DiskError::new(ErrorKind::Unsupported, message));
    }
    let files = chain.take_files().map_err(|e| told(&e))?;
    // What is durable already need not be made so while requests wait.
    image.image().commit().map_err(|e| told(&e))?;
    let mut made = None;
    disk.reopen_held(|old| {
        let chain = merge_chain(disk, old, &paths, plan, merge)?;
        old.image().close().map_err(|e| told(&e))?;
        let sides = chain.open(files);
        match sides {
            Ok(sides) => {
                let merging = Merging::of(old, &paths, merge, sides).map_err(lost)?;
                let source = merging.source.clone();
                made = Some(merging);
                Ok(source)
            }
            Err(MergeRefused { error, chain }) => {
                let again = chain.and_then(|chain| old.succeeded_by(chain).ok());
                Err(NotReopened { error: told(&error), serve: again.map_or(Serve::Nothing, Serve::Instead) })
            }
        }
    })?;
    Ok(made.expect("the disk was reopened"))
}

/// After a merge that was given up: the parent goes on as what it was, with another id, which the child takes note of.
///
/// # Errors
/// When the disk cannot go on with the chain; a restart of the daemon opens it again.
pub(super) fn give_up(disk: &Disk, plan: &MovePlan, target: &ImageHandle) -> Result<(), String> {
    let Layering::Merge(merge) = &plan.layering else { return Ok(()) };
    // Maintenance that is under way goes on punching what it took out of the map. It must not outlive the session: in the next
    // one that may be somebody's place.
    let mut target_given_up = target.without_upkeep();
    *target_given_up = true;
    let given_up = disk.reopen_held(|old| {
        let paths = old.paths();
        let merge_chain = merge_chain(disk, old, &paths, plan, merge)?;
        let target = &merge_chain.chain.layers()[merge.levels()];
        old.image().close().and_then(|()| target.close()).map_err(|e| told(&e))?;
        let chain = merge_chain.give_up().map_err(|e| lost(told(&e)))?;
        old.succeeded_by(chain).map_err(lost)
    });
    given_up.map_err(|e| e.to_string())
}

fn lost(error: DiskError) -> NotReopened {
    NotReopened { error, serve: Serve::Nothing }
}

fn merge_chain<'a>(
    disk: &'a Disk,
    image: &'a ImageHandle,
    paths: &'a [PathBuf],
    plan: &MovePlan,
    merge: &Merge,
) -> Result<MergeChain<'a>, DiskError> {
    let levels = merge.levels();
    let long_enough = |chain: &&Chain| chain.layers().len() > levels;
    match image.image().as_chain().filter(long_enough) {
        Some(chain) if paths[levels] == plan.target => {
            Ok(MergeChain { chain, paths, levels, notes_dir: disk.notes_dir() })
        }
        _ => Err(DiskError::new(
            ErrorKind::InvalidParameter,
            format!("{} is no parent of the disk's image any more", plan.target.display()),
        )),
    }
}

impl Merging {
    fn of(old: &ImageHandle, paths: &[PathBuf], merge: &Merge, sides: MergeSides) -> Result<Self, DiskError> {
        let source = old.succeeded_by(sides.chain)?;
        let target = ImageHandle::new(sides.target, &paths[merge.levels()], &[&*source])?;
        Ok(Self { source, target: Arc::new(target) })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use formats::{ByteSpan, CreateOptions, Format, ImageType, OpenOptions, Pieces, ZeroMode};
    use mirror::{MirrorMode, OnTargetError, SwitchMode, Verify};

    use super::*;
    use crate::disk::DiskSpec;

    const BLOCK: u64 = 1 << 20;

    /// A disk of a child on a base, and the plan to merge them.
    fn bench(dir: &Path, read_only: bool) -> (Arc<Disk>, MovePlan) {
        let (base, child) = (dir.join("base.vhdx"), dir.join("child.vhdx"));
        let options =
            CreateOptions { block_size: Some(BLOCK as u32), ..CreateOptions::new(Format::Vhdx, 16 * BLOCK) };
        formats::create(&base, &options).expect("created");
        let image = formats::open(&base, &OpenOptions::default()).expect("opened");
        image.begin_changes().and_then(|()| image.close()).expect("begun and closed");
        drop(image);
        formats::create(&child, &CreateOptions::on_parent(Format::Vhdx, &base)).expect("created");
        let spec = DiskSpec {
            id: "a".into(),
            image: child.clone(),
            socket: dir.join("a.sock"),
            format: None,
            queues: 1,
            io_threads: 1,
            read_only,
            parents: vec![base.clone()],
        };
        let disk = Disk::start(spec, false, true, None, Arc::new(|_| Ok(()))).expect("it starts");
        let base = disk.image().paths()[1].clone();
        let plan = MovePlan {
            job: "m1".into(),
            disk: "a".into(),
            generation: 0,
            source: child,
            target: base,
            format: Format::Vhdx,
            image_type: ImageType::Dynamic,
            block_size: None,
            mirror: MirrorMode::AfterCopy,
            switch: SwitchMode::Auto,
            verify: Verify::None,
            bandwidth: None,
            max_guest_p99_us: None,
            keep_source: false,
            copy_only: false,
            on_target_error: OnTargetError::Pause,
            layering: Layering::Merge(Merge { between: Vec::new(), below: Vec::new() }),
        };
        (disk, plan)
    }

    fn merge_of(plan: &MovePlan) -> &Merge {
        match &plan.layering {
            Layering::Merge(merge) => merge,
            _ => unreachable!("a merge was planned"),
        }
    }

    #[test]
    fn a_merge_is_not_given_up_while_its_target_is_maintained() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (disk, plan) = bench(dir.path(), false);
        let Merging { source, target } = begin(&disk, &plan, merge_of(&plan)).expect("begun");
        drop(source);
        // A block of the parent that is given back: maintenance waits before it is punched.
        let (span, mut pieces) = (ByteSpan::new(0, BLOCK), Pieces::new());
        target.image().map_write(span, &mut pieces).expect("mapped");
        target.image().map_zero(span, ZeroMode::Unmap, &mut pieces).expect("unmapped");
        let (reached, wait) = std::sync::mpsc::channel();
        let (go_on, gone_on) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let maintained = &target;
            scope.spawn(move || {
                let quiesce = || {
                    reached.send(()).expect("somebody waits");
                    gone_on.recv_timeout(Duration::from_secs(5)).expect("somebody goes on");
                };
                maintained.maintain(&quiesce).expect("maintained");
            });
            wait.recv_timeout(Duration::from_secs(5)).expect("maintenance has begun");
            let given_up = scope.spawn(|| give_up(&disk, &plan, &target).expect("given up"));
            std::thread::sleep(Duration::from_millis(300));
            assert!(!given_up.is_finished(), "the parent would be punched after its session");
            go_on.send(()).expect("maintenance waits");
        });
        assert_eq!(disk.failed(), None);
        disk.stop().expect("it ends");
    }

    #[test]
    fn nothing_is_merged_in_a_disk_that_is_served_for_reading_only() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (disk, plan) = bench(dir.path(), true);
        let e = begin(&disk, &plan, merge_of(&plan)).expect_err("refused");
        assert_eq!(e.kind, ErrorKind::ReadOnly, "{e}");
        assert!(disk.image().image().is_read_only());
        assert_eq!(disk.failed(), None);
        disk.stop().expect("it ends");
    }
}
