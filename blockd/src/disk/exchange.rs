//! Putting another image, or another view of the same one, in the place of a disk's image while guests use it.
//!
//! ```text
//!   reopen_held:  route = Held ── grace period ── the change, alone with the image ── route = Single(new) ── go on
//!   continue_in:  route = Settling { new, old } ── grace period ── old durable ── route = Single(new) ── grace period
//! ```
//!
//! The first holds requests up for as long as the change takes; the second holds nothing up.

use std::path::Path;
use std::sync::{Arc, PoisonError};

use formats::{AllocState, CreateError, ErrorKind, Image, ImageError};

use super::handle::ImageHandle;
use super::route::Route;
use super::{Disk, DiskError};
use crate::worker::command::Command;
use crate::worker::mailbox::Mail;

/// What a disk is served from after a change of its image has failed.
#[derive(Debug)]
pub enum Serve {
    /// The image as it was: the change has not touched it, or its session simply goes on.
    Before,
    /// Another view of the image, opened anew.
    Instead(Arc<ImageHandle>),
    /// Nothing: it could not be opened again. Every request fails until the disk is attached again.
    Nothing,
}

/// A change of a disk's image that has failed.
#[derive(Debug)]
pub struct NotReopened {
    /// Why.
    pub error: DiskError,
    /// What becomes of the disk.
    pub serve: Serve,
}

impl From<DiskError> for NotReopened {
    /// A failure that has not touched the image.
    fn from(error: DiskError) -> Self {
        Self { error, serve: Serve::Before }
    }
}

/// Requests are held up as long as this lives. Whatever happens meanwhile, a panic too, they go on somewhere.
struct Hold<'a> {
    disk: &'a Disk,
    image: Arc<ImageHandle>,
    then: Option<Route>,
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let then = self.then.take().unwrap_or_else(|| Route::Failed(self.image.clone()));
        self.disk.set_route(then);
    }
}

impl Disk {
    /// Holds requests up, has `change` do something with the image while nothing else uses it, and serves from then on
    /// what it returns: requests that came in meanwhile go there, in the order in which they came. Blocks; `change` is on
    /// the clock of the guest.
    ///
    /// The image that `change` is given has no I/O in flight, is not maintained, and stays locked as long as its file is
    /// held open. It may be closed and its storage opened again ([`ImageHandle::succeeded_by`]). What `change` must not do
    /// is to call methods of this disk that wait for requests.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidParameter`] while a move, a snapshot or another exchange works on the disk, or when it was
    /// stopped; what `change` says. The disk goes on as the error says.
    pub fn reopen_held(
        &self,
        change: impl FnOnce(&Arc<ImageHandle>) -> Result<Arc<ImageHandle>, NotReopened>,
    ) -> Result<(), DiskError> {
        let _one = self.exchanging.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.single_image()?;
        let mut given_up = old.without_upkeep();
        self.shared.route.store(Arc::new(Route::Held(old.clone())));
        let mut hold = Hold { disk: self, image: old.clone(), then: None };
        self.shared.gate.wait();
        *given_up = true;
        let (next, result) = match change(&old) {
            Ok(next) => (Some(next), Ok(())),
            Err(NotReopened { error, serve }) => {
                let next = match serve {
                    Serve::Before => Some(old.clone()),
                    Serve::Instead(next) => Some(next),
                    Serve::Nothing => None,
                };
                (next, Err(error))
            }
        };
        *given_up = next.as_ref().is_none_or(|next| !Arc::ptr_eq(next, &old));
        match (next, &result) {
            (Some(next), _) => {
                self.shared.set_size(next.image().geometry().virtual_size);
                hold.then = Some(Route::Single(next));
            }
            (None, Err(e)) => self.shared.set_failed(&e.to_string()),
            (None, Ok(())) => unreachable!("what went well is served"),
        }
        result
    }

    /// Lets the disk go on in `next`, of which the image so far is a parent, without holding anything up: requests that
    /// are under way end on the old image, new ones go to the new one. Returns when the old image is durable and nothing
    /// writes to it any more; it is closed then. Blocks.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidParameter`] as for [`Self::reopen_held`], and nothing has happened then. When the old image
    /// could not be made durable or closed: the disk is `next` already, and flushes go on to reach the old image.
    pub fn continue_in(&self, next: &Arc<ImageHandle>) -> Result<(), DiskError> {
        let _one = self.exchanging.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.single_image()?;
        let fail = |what: &str, e: &dyn std::fmt::Display| {
            let message = format!("{}: cannot be {what}: {e}", old.path().display());
            self.shared.set_failed(&message);
            DiskError::new(ErrorKind::Io, message)
        };
        self.set_route(Route::Settling { image: next.clone(), parent: old.clone() });
        self.shared.gate.wait();
        // Nothing writes to the old image any more, and from here on nothing maintains it.
        let mut given_up = old.without_upkeep();
        old.image().commit().map_err(|e| fail("made durable", &e))?;
        old.synced(Ok(())).map_err(|e| fail("made durable", &e))?;
        self.set_route(Route::Single(next.clone()));
        // Flushes that were to reach the old image have ended when this returns.
        self.shared.gate.wait();
        *given_up = true;
        old.image().close().map_err(|e| {
            let message = format!("{}: cannot be closed cleanly: {e}", old.path().display());
            DiskError::new(e.kind, message)
        })?;
        if let Some(dir) = &self.notes_dir {
            formats::remove_notes(old.image(), dir);
        }
        if let Err(e) = formats::share(old.image()) {
            // Nobody else can read it then before the disk is detached.
            tracing::warn!(disk = self.spec.id, image = %old.path().display(), "stays locked: {e}");
        }
        Ok(())
    }

    /// Makes an empty image at `path` on the one that is the disk now, for [`Self::continue_in`]. Blocks, as any first
    /// write of a session may; no request is held up.
    ///
    /// # Errors
    /// As [`formats::create_over`] has them; no file is left then.
    pub fn make_child(&self, path: &Path) -> Result<Arc<ImageHandle>, CreateError> {
        let old = self.image();
        let made = formats::create_over(path, old.shared_image(), old.path(), self.notes_dir.as_deref())?;
        ImageHandle::new(made, path, &[&*old]).map(Arc::new).map_err(|e| {
            let _ = std::fs::remove_file(path);
            CreateError { path: path.to_owned(), kind: e.kind, message: e.message, source: None }
        })
    }

    /// Gives the image another size; requests are held up meanwhile. Answers whether a front end was told, which is then
    /// to look at the configuration space again. Blocks.
    ///
    /// # Errors
    /// As [`formats::resize`] and [`Self::reopen_held`] have them, and when the map says that something is stored behind a
    /// smaller size; the disk has its old size then.
    pub fn resize(&self, new_size: u64, shrink: bool) -> Result<bool, DiskError> {
        // What can be done before anybody waits is done before.
        let image = self.image();
        let of_image = |e: ImageError| DiskError::new(e.kind, format!("{}: {e}", image.path().display()));
        if new_size < image.image().geometry().virtual_size {
            check_is_empty_behind(image.image(), new_size)?;
        }
        image.maintain(&|| self.shared.gate.wait()).map_err(of_image)?;
        self.flush()?;
        self.reopen_held(|old| {
            old.image().close().map_err(of_image)?;
            let resized = formats::resize_held(old.image(), new_size, shrink).map_err(of_image);
            let reopened = formats::reopen(old.image(), self.notes_dir.as_deref())
                .map_err(of_image)
                .and_then(|image| old.succeeded_by(image));
            match (resized, reopened) {
                (Ok(()), Ok(next)) => Ok(next),
                (Err(error), Ok(next)) => Err(NotReopened { error, serve: Serve::Instead(next) }),
                (_, Err(error)) => Err(NotReopened { error, serve: Serve::Nothing }),
            }
        })?;
        Ok(self.shared.channels.tell_config_changed())
    }

    /// The image, when nothing else works on the disk.
    fn single_image(&self) -> Result<Arc<ImageHandle>, DiskError> {
        let busy = |what: &str| {
            let message = format!("disk {} {what}", self.spec.id);
            Err(DiskError::new(ErrorKind::InvalidParameter, message))
        };
        if self.running.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
            return busy("was stopped");
        }
        match &**self.shared.route.load() {
            Route::Single(image) => Ok(image.clone()),
            Route::Failed(_) => busy("has lost its image; detach it and attach it again"),
            _ => busy("is being worked on; wait for the end of that"),
        }
    }

    /// Sets a route, and has every worker look at it.
    fn set_route(&self, route: Route) {
        self.shared.route.store(Arc::new(route));
        for mailbox in &self.mailboxes {
            mailbox.post(Mail::Command(Command::Look));
        }
    }
}

/// Whether whole blocks behind `size` hold something. Looked at beforehand, so that nobody is held up for a refusal, nor
/// while much that holds zeroes is read; what the guest writes there meanwhile is found when the size is changed.
fn check_is_empty_behind(image: &dyn Image, size: u64) -> Result<(), DiskError> {
    let block = u64::from(image.geometry().block_size).max(1);
    let mut at = size.checked_next_multiple_of(block).unwrap_or(u64::MAX);
    while let Some(extent) = image.next_extent(at).map_err(|e| DiskError::new(e.kind, e.to_string()))? {
        if extent.state == AllocState::Data {
            let message = format!(
                "something is stored at byte {at} and behind it: have the guest discard what lies behind byte {size} first"
            );
            return Err(DiskError::new(ErrorKind::InvalidParameter, message));
        }
        at = extent.span.offset + extent.span.len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use formats::{CreateOptions, Format};

    use super::*;
    use crate::disk::DiskSpec;
    use crate::disk::handle::OpenImage;

    const SIZE: u64 = 4 << 20;

    fn disk(dir: &Path) -> Arc<Disk> {
        let image = dir.join("a.vhdx");
        formats::create(&image, &CreateOptions::new(Format::Vhdx, SIZE)).expect("created");
        let spec = DiskSpec {
            id: "a".into(),
            image,
            socket: dir.join("a.sock"),
            format: None,
            queues: 1,
            io_threads: 1,
            read_only: false,
            parents: Vec::new(),
        };
        Disk::start(spec, false, true, None, Arc::new(|_| Ok(()))).expect("it starts")
    }

    fn another(dir: &Path) -> Arc<ImageHandle> {
        let path = dir.join("b.raw");
        formats::create(&path, &CreateOptions::new(Format::Raw, SIZE * 2)).expect("created");
        ImageHandle::open(&path, &OpenImage::default()).expect("it opens")
    }

    #[test]
    fn a_disk_goes_on_with_what_a_change_returns_and_flushes_wait_for_it() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let disk = disk(dir.path());
        let next = another(dir.path());
        std::thread::scope(|scope| {
            disk.reopen_held(|old| {
                assert_eq!(old.path(), dir.path().join("a.vhdx"));
                let flush = scope.spawn(|| disk.flush().expect("it flushes"));
                std::thread::sleep(Duration::from_millis(50));
                assert!(!flush.is_finished(), "the image is not to be touched now");
                Ok(next.clone())
            })
            .expect("exchanged");
        });
        assert_eq!((disk.format(), disk.geometry().virtual_size), (Format::Raw, SIZE * 2));
        assert_eq!(disk.shared().limits().size, SIZE * 2);
        disk.stop().expect("it ends");
        let e = disk.reopen_held(|old| Ok(old.clone())).expect_err("it was stopped");
        assert!(e.message.contains("stopped"), "{e}");
    }

    #[test]
    fn a_change_that_fails_says_what_the_disk_goes_on_with() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let disk = disk(dir.path());
        let failure = || DiskError::new(ErrorKind::Io, "it burns");
        let e = disk.reopen_held(|_| Err(failure().into())).expect_err("refused");
        assert_eq!(e.message, "it burns");
        assert_eq!(disk.format(), Format::Vhdx);
        let instead = NotReopened { error: failure(), serve: Serve::Instead(another(dir.path())) };
        disk.reopen_held(|_| Err(instead)).expect_err("refused");
        assert_eq!((disk.format(), disk.failed()), (Format::Raw, None));
        disk.flush().expect("it is served");
        let nothing = NotReopened { error: failure(), serve: Serve::Nothing };
        disk.reopen_held(|_| Err(nothing)).expect_err("refused");
        assert_eq!(disk.failed().as_deref(), Some("it burns"));
        disk.flush().expect_err("nothing is served");
        disk.reopen_held(|old| Ok(old.clone())).expect_err("there is nothing to exchange");
        disk.stop().expect("it ends");
    }

    #[test]
    fn a_panic_in_a_change_holds_nobody_up() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let disk = disk(dir.path());
        let panicked = std::thread::scope(|scope| {
            scope.spawn(|| disk.reopen_held(|_| panic!("on purpose"))).join().is_err()
        });
        assert!(panicked);
        disk.flush().expect_err("the image may be anything now");
        disk.stop().expect("it ends");
    }
}
