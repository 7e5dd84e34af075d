//! Who may open an image: what its fence, the disk's record and the request say, put together.
//!
//! | the fence | remembered disk | asked for | `--generation N` | taken back |
//! |---|---|---|---|---|
//! | none | yes, unless it had one | yes | yes, N | yes, if it never had one |
//! | held by us | yes | yes | N ≥ its number | yes |
//! | free (detached) | its number is ours or lower | yes, its number + 1 | N > its number | no |
//! | released | no | no | N > its number | by us with our number, or unused with our handover's: + 1 |
//! | held by another one | no | no | N > its number | no |
//!
//! Our handover's number is one more than ours. Who took the image with that number, and released it before anybody had used it, has
//! given it back: it is as we left it. Had it been used, a guest that goes on here would not know of what was written.
//!
//! A disk that is served for reading only takes no fence, and asks for none: it is kept off where somebody else holds the image.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::error::{DaemonError, Kind};
use super::fence::{self, Fence, Hold, Next};
use super::state::{DiskRecord, StateDir};

/// Why an image is to be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taking {
    /// It was served before the daemon ended.
    Remembered,
    /// Somebody attaches it.
    Asked,
    /// Somebody attaches it with the number of a handover.
    Generation(u64),
    /// It was released here, and is to be served here again.
    Reclaimed,
    /// A release could not be finished: it goes on here.
    Resumed,
}

/// With which number an image may be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// The fence stays as it is, or away.
    Unfenced(u64),
    /// The fence says that we hold it.
    Take(u64),
}

/// What was done to a fence, so that it can be undone.
#[derive(Debug)]
#[must_use = "what fails afterwards has to undo it"]
pub(super) struct Admitted {
    image: PathBuf,
    before: Option<Fence>,
    ours: Option<Fence>,
}

impl Admitted {
    /// The state of the guest's write cache that came with the image from another daemon: whether it is off.
    pub(super) fn write_through_from(&self, me: Uuid) -> Option<bool> {
        let before = self.before.as_ref().filter(|before| !before.is_of(me))?;
        before.disk.as_ref().map(|disk| disk.write_through)
    }

    /// Whether the image was released, and is taken with the very next number: nobody has had it since.
    pub(super) fn follows_release(&self) -> bool {
        let number = self.ours.as_ref().map(|ours| ours.generation);
        let before = self.before.as_ref().filter(|before| before.state == Hold::Released);
        before.is_some_and(|before| Some(before.generation + 1) == number)
    }

    /// Puts the fence back as it was: the image was not opened after all.
    pub(super) fn undo(self, state: &StateDir) {
        let Some(ours) = self.ours else { return };
        let undone = fence::change(&self.image, state.id(), |now| {
            Ok(match (now == Some(&ours), self.before.clone()) {
                (false, _) => Next::Leave,
                (true, None) => Next::Remove,
                (true, Some(before)) => Next::Put(before),
            })
        });
        if let Err(e) = undone {
            tracing::warn!(image = %self.image.display(), error = e.message, "the fence is left as ours");
        }
    }
}

/// Takes the image of a disk, if it may be opened. The record that comes back has its number; it is not durable yet.
///
/// # Errors
/// [`Kind::Locked`] when somebody else has it, [`Kind::State`] for a number that is stale, and what the file system says;
/// nothing has changed then.
pub(super) fn admit(
    state: &StateDir,
    record: &DiskRecord,
    how: Taking,
) -> Result<(DiskRecord, Admitted), DaemonError> {
    let (image, me) = (&record.image, state.id());
    let mut admitted = Admitted { image: image.clone(), before: None, ours: None };
    let mut record = record.clone();
    record.released = None;
    // A look first: most images have no fence, and some are where nothing can be written.
    let seen = fence::read(image)?;
    if let Verdict::Unfenced(generation) = decide(me, &record, how, seen.as_ref())? {
        (record.generation, record.fenced) = (generation, false);
        return Ok((record, admitted));
    }
    admitted.before = fence::change(image, me, |now| {
        let generation = match decide(me, &record, how, now)? {
            Verdict::Unfenced(generation) | Verdict::Take(generation) => generation,
        };
        let ours = Fence::new(generation, Hold::Held, state.holder(&record.spec.id));
        let next = if now == Some(&ours) { Next::Leave } else { Next::Put(ours.clone()) };
        admitted.ours = Some(ours);
        Ok(next)
    })?;
    record.generation = admitted.ours.as_ref().map_or(record.generation, |ours| ours.generation);
    record.fenced = true;
    Ok((record, admitted))
}

fn decide(me: Uuid, record: &DiskRecord, how: Taking, fence: Option<&Fence>) -> Result<Verdict, DaemonError> {
    let (image, known) = (&record.image, record.generation);
    if record.spec.read_only
        && let Some(verdict) = decide_read_only(me, record, how, fence)
    {
        return Ok(verdict);
    }
    let Some(fence) = fence else {
        return match how {
            Taking::Remembered | Taking::Reclaimed if record.fenced => Err(gone(record)),
            Taking::Generation(asked) => Ok(Verdict::Take(asked)),
            Taking::Reclaimed => Ok(Verdict::Unfenced(known + 1)),
            Taking::Remembered | Taking::Asked | Taking::Resumed => Ok(Verdict::Unfenced(known)),
        };
    };
    let (is_ours, number) = (fence.is_of(me), fence.generation);
    let later = number.max(known);
    match (how, fence.state) {
        (Taking::Generation(asked), Hold::Held) if is_ours && asked >= number => Ok(Verdict::Take(asked)),
        (Taking::Generation(asked), _) if asked > number => Ok(Verdict::Take(asked)),
        (Taking::Generation(asked), _) => Err(stale(image, asked, fence)),
        (Taking::Reclaimed, Hold::Held) if is_ours => Ok(Verdict::Take(number.max(known + 1))),
        (Taking::Reclaimed, Hold::Released) if is_ours && number == known => Ok(Verdict::Take(known + 1)),
        (Taking::Reclaimed, Hold::Released) if number == known + 1 && is_unused(fence) => {
            Ok(Verdict::Take(number + 1))
        }
        (Taking::Reclaimed, _) => Err(taken(record, fence)),
        (_, Hold::Held) if is_ours => Ok(Verdict::Take(later)),
        (Taking::Resumed, Hold::Released) if is_ours => Ok(Verdict::Take(later + 1)),
        (Taking::Resumed | Taking::Asked, Hold::Free) => Ok(Verdict::Take(later + 1)),
        (Taking::Remembered, Hold::Free) if number <= known => Ok(Verdict::Take(later + 1)),
        _ => Err(elsewhere(record, fence)),
    }
}

fn is_unused(fence: &Fence) -> bool {
    fence.disk.as_ref().is_some_and(|disk| disk.unused)
}

/// Who only reads does not keep others off, so there is nothing to take. `None` where it takes the fence all the same: it
/// comes with a handover of one who had it.
fn decide_read_only(me: Uuid, record: &DiskRecord, how: Taking, fence: Option<&Fence>) -> Option<Verdict> {
    let others = fence.is_some_and(|fence| fence.state != Hold::Free && !fence.is_of(me));
    let known = record.generation;
    match (how, fence) {
        _ if record.fenced => None,
        (Taking::Generation(asked), None) => Some(Verdict::Unfenced(asked)),
        (Taking::Generation(_), Some(_)) => None,
        (Taking::Reclaimed, _) if !others => Some(Verdict::Unfenced(known + 1)),
        (_, Some(fence)) if fence.state == Hold::Released => None,
        _ if !others => Some(Verdict::Unfenced(known)),
        _ => None,
    }
}

fn refused(message: String) -> DaemonError {
    DaemonError::new(Kind::Locked, message)
}

fn elsewhere(record: &DiskRecord, fence: &Fence) -> DaemonError {
    let (image, id, by) = (record.image.display(), &record.spec.id, &fence.by);
    let (number, next) = (fence.generation, fence.generation + 1);
    refused(match fence.state {
        Hold::Released => format!(
            "{image} was released by {by}, with generation {number}; take it back there with `blockctl disk reclaim {}`, or take it \
             over here: `blockctl disk attach {id} {image} --generation {next} ...`",
            by.disk
        ),
        Hold::Held => format!(
            "{image} is held by {by}, with generation {number}; release or detach it there first, or, if that one is gone for good and \
             nothing uses the image any more, take it over here: `blockctl disk attach {id} {image} --generation {next} ...`"
        ),
        Hold::Free => format!(
            "{image} was in the hands of {by} meanwhile, with generation {number}, and disk {id} knows generation {} only; if it is to be \
             served here again: `blockctl disk attach {id} {image} --generation {next} ...`",
            record.generation
        ),
    })
}

fn stale(image: &Path, asked: u64, fence: &Fence) -> DaemonError {
    let what = match fence.state {
        Hold::Held => "taken by",
        Hold::Released => "released by",
        Hold::Free => "taken and detached by",
    };
    let message = format!(
        "generation {asked} is stale: {} was {what} {} with generation {}; release it there and attach it with the number that this \
         answers",
        image.display(),
        fence.by,
        fence.generation
    );
    DaemonError::new(Kind::State, message)
}

fn taken(record: &DiskRecord, fence: &Fence) -> DaemonError {
    let (image, id, next) = (record.image.display(), &record.spec.id, fence.generation + 1);
    refused(match fence.state {
        Hold::Free => format!(
            "disk {id} can't be taken back: {image} was taken by {}, and detached; `blockctl disk attach {id} {image} --generation {next} ...` \
             serves it here again",
            fence.by
        ),
        Hold::Held => format!(
            "disk {id} can't be taken back: {image} is held by {}, with generation {}; release it there, and attach it here with the number \
             that this answers, or, if that one is gone for good and nothing uses the image any more: `blockctl disk attach {id} {image} \
             --generation {next} ...`",
            fence.by, fence.generation
        ),
        Hold::Released => format!(
            "disk {id} can't be taken back: {image} was taken over, and released by {}; `blockctl disk attach {id} {image} --generation {next} ...` \
             serves it here again",
            fence.by
        ),
    })
}

fn gone(record: &DiskRecord) -> DaemonError {
    let image = &record.image;
    refused(format!(
        "disk {id} had taken {} over from another daemon, and {}, which says so, is gone: somebody has removed it, or the storage is not \
         mounted; make sure that nothing else serves the image, and attach it again: `blockctl disk attach {id} {} --generation {} ...`",
        image.display(),
        fence::path_of(image).display(),
        image.display(),
        record.generation + 1,
        id = record.spec.id,
    ))
}
