//! Which disks come up at the start: what is remembered, what journals say, and what is asked for, put together.

use std::collections::BTreeMap;

use super::config::Asked;
use super::error::DaemonError;
use super::state::DiskRecord;
use crate::mover::NewImage;

/// What becomes of one disk at the start.
#[derive(Debug)]
pub(super) enum Start {
    /// It is served.
    Serve {
        /// What is to be remembered of it.
        record: DiskRecord,
        /// Whether the image was ours before, so that what a crash of ours left in it is mended.
        recover: bool,
        /// Who wants it.
        origin: Origin,
    },
    /// It was released for another daemon, and is only listed.
    Released(DiskRecord),
    /// It can't be, because nobody knows any more which image it is.
    Unknown(DaemonError),
}

/// Why a disk is to be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// It was served before, and nobody has named it in this start.
    Remembered,
    /// It was served before, and is asked for again.
    AskedAgain,
    /// The configuration file names it for the first time.
    Filed,
    /// It was typed just now for the first time: a failure is the typist's to see.
    Typed,
}

impl Origin {
    /// Whether it was served before.
    pub(super) const fn is_known(self) -> bool {
        matches!(self, Self::Remembered | Self::AskedAgain)
    }
}

/// Images that journals of moves tell, by disk.
pub(super) type JournalImages = BTreeMap<String, NewImage>;

/// Puts everything together, by disk.
///
/// The image is decided by whoever knows best: a journal over the record, the record over what is asked for once a move or
/// a snapshot has put another image in place, and what is asked for otherwise. All else is as asked for last.
pub(super) fn recall(
    remembered: BTreeMap<String, Result<DiskRecord, DaemonError>>,
    mut journals: JournalImages,
    asked: Vec<Asked>,
) -> BTreeMap<String, Start> {
    let mut asked: BTreeMap<_, _> = asked.into_iter().map(|a| (a.spec.id.clone(), a)).collect();
    let mut disks = BTreeMap::new();
    for (id, record) in remembered {
        let start = match record {
            // A move may have changed the image: whatever is asked for could be the stale one.
            Err(e) => Start::Unknown(match journals.remove(&id) {
                Some(image) => {
                    let told =
                        format!("{e} (a move's journal says that its image is {})", image.files[0].display());
                    DaemonError::new(e.kind, told)
                }
                None => e,
            }),
            Ok(record) if record.released.is_some() => {
                // A move that had yet to tidy up behind it says nothing new.
                journals.remove(&id);
                if let Some(wanted) = asked.get(&id) {
                    let asked = wanted.spec.image.display();
                    tracing::warn!(disk = id, %asked, "the disk was released for another daemon, so it is not served");
                }
                Start::Released(record)
            }
            Ok(mut record) => {
                if let Some(image) = journals.remove(&id) {
                    follow_journal(&mut record, &image);
                }
                let (recover, origin) = match asked.remove(&id) {
                    Some(wanted) => (follow_asked(&mut record, &wanted), Origin::AskedAgain),
                    None => (true, Origin::Remembered),
                };
                Start::Serve { record, recover, origin }
            }
        };
        asked.remove(&id);
        disks.insert(id, start);
    }
    for (id, image) in journals {
        tracing::warn!(disk = id, image = %image.files[0].display(), "a move's journal tells of a disk that is not remembered");
    }
    for (id, Asked { spec, typed }) in asked {
        let record = DiskRecord::new(spec);
        let origin = if typed { Origin::Typed } else { Origin::Filed };
        disks.insert(id, Start::Serve { record, recover: false, origin });
    }
    disks
}

fn follow_journal(record: &mut DiskRecord, image: &NewImage) {
    if image.generation <= record.generation {
        return;
    }
    tracing::info!(
        disk = record.spec.id,
        image = %image.files[0].display(),
        generation = image.generation,
        "a move was committed just before the daemon ended: its target is the disk"
    );
    record.follow_move(image);
}

/// Takes over what is asked for; answers whether the image is still the one that was served.
fn follow_asked(record: &mut DiskRecord, Asked { spec, .. }: &Asked) -> bool {
    let same = spec.image == record.image;
    if same {
        record.format = spec.format.or(record.format);
    } else if record.generation > 0 {
        tracing::warn!(
            disk = spec.id,
            asked = %spec.image.display(),
            served = %record.image.display(),
            generation = record.generation,
            "a move or a snapshot has put another image in place of the one that is asked for: that one is served \
             (detach the disk and attach it again to go back)"
        );
    } else {
        tracing::warn!(
            disk = spec.id,
            asked = %spec.image.display(),
            served_before = %record.image.display(),
            "another image is asked for than was served before: the one that is asked for is served"
        );
        record.become_image(&spec.image, spec.format);
    }
    record.spec = spec.clone();
    same || record.generation > 0
}

#[cfg(test)]
mod tests {

    use formats::Format;

    use super::*;
    use crate::daemon::error::Kind;
    use crate::disk::DiskSpec;

    fn spec(id: &str, image: &str) -> DiskSpec {
        DiskSpec {
            id: id.into(),
            image: image.into(),
            socket: "/s".into(),
            format: None,
            queues: 1,
            io_threads: 1,
            read_only: false,
            parents: Vec::new(),
        }
    }

    fn record(id: &str, image: &str, generation: u64) -> DiskRecord {
        let mut record = DiskRecord::new(spec(id, "/first.vhdx"));
        (record.image, record.format, record.generation) = (image.into(), Some(Format::Vhdx), generation);
        record
    }

    fn new_image(path: &str, generation: u64) -> NewImage {
        NewImage { files: vec![path.into()], format: Format::Vhd, generation }
    }

    fn asked(id: &str, image: &str) -> Asked {
        let spec = DiskSpec { queues: 8, socket: "/new".into(), ..spec(id, image) };
        Asked { spec, typed: true }
    }

    fn one(
        remembered: Option<Result<DiskRecord, DaemonError>>,
        journal: Option<NewImage>,
        wanted: Option<Asked>,
    ) -> Option<Start> {
        let id = || "a".to_owned();
        let mut all = recall(
            remembered.map(|r| (id(), r)).into_iter().collect(),
            journal.map(|j| (id(), j)).into_iter().collect(),
            wanted.into_iter().collect(),
        );
        let start = all.remove("a");
        assert!(all.is_empty());
        start
    }

    fn served(start: Option<Start>) -> (DiskRecord, bool, Origin) {
        match start {
            Some(Start::Serve { record, recover, origin }) => (record, recover, origin),
            other => panic!("not served: {other:?}"),
        }
    }

    #[test]
    fn a_remembered_disk_comes_back_as_it_was() {
        let (r, recover, origin) = served(one(Some(Ok(record("a", "/moved.vhdx", 2))), None, None));
        assert_eq!(origin, Origin::Remembered);
        assert_eq!((r.image, r.generation, r.spec.queues), ("/moved.vhdx".into(), 2, 1));
        assert!(recover);
    }

    #[test]
    fn a_disk_that_is_asked_for_anew_is_opened_as_it_is() {
        let (r, recover, origin) = served(one(None, None, Some(asked("a", "/i.vhd"))));
        assert_eq!((r.image, r.generation, r.format), ("/i.vhd".into(), 0, None));
        assert!(!recover && origin == Origin::Typed);
    }

    #[test]
    fn a_moved_image_stays_whatever_is_asked_for_but_sockets_and_queues_follow() {
        let (r, recover, origin) =
            served(one(Some(Ok(record("a", "/moved.vhdx", 1))), None, Some(asked("a", "/first.vhdx"))));
        assert_eq!(
            (r.image.as_path(), r.generation, r.format),
            ("/moved.vhdx".as_ref(), 1, Some(Format::Vhdx))
        );
        assert_eq!((r.spec.queues, r.spec.socket.as_path()), (8, "/new".as_ref()));
        assert!(recover && origin == Origin::AskedAgain);
    }

    #[test]
    fn an_image_that_never_moved_may_be_exchanged() {
        let (r, recover, _) =
            served(one(Some(Ok(record("a", "/first.vhdx", 0))), None, Some(asked("a", "/other.img"))));
        assert_eq!((r.image, r.format, r.generation), ("/other.img".into(), None, 0));
        assert!(!recover);
        let (r, recover, _) =
            served(one(Some(Ok(record("a", "/first.vhdx", 0))), None, Some(asked("a", "/first.vhdx"))));
        assert_eq!(r.format, Some(Format::Vhdx));
        assert!(recover);
    }

    #[test]
    fn a_journal_knows_better_than_the_record_and_the_request() {
        let journal = Some(new_image("/target.vhd", 1));
        let (r, recover, _) = served(one(
            Some(Ok(record("a", "/first.vhdx", 0))),
            journal.clone(),
            Some(asked("a", "/first.vhdx")),
        ));
        assert_eq!((r.image, r.format, r.generation), ("/target.vhd".into(), Some(Format::Vhd), 1));
        assert!(recover);
        let (r, ..) = served(one(Some(Ok(record("a", "/later.vhdx", 2))), journal.clone(), None));
        assert_eq!((r.image, r.generation), ("/later.vhdx".into(), 2), "an older generation changes nothing");
        assert!(one(None, journal, None).is_none(), "a forgotten disk stays forgotten");
    }

    #[test]
    fn a_damaged_record_is_not_replaced_by_what_is_asked_for() {
        let damaged = DaemonError::new(Kind::Corrupt, "damaged");
        let start = one(Some(Err(damaged.clone())), None, Some(asked("a", "/first.vhdx")));
        assert!(matches!(start, Some(Start::Unknown(e)) if e == damaged));
        let journal = Some(new_image("/target.vhd", 1));
        let start = one(Some(Err(damaged)), journal, Some(asked("a", "/first.vhdx")));
        assert!(matches!(start, Some(Start::Unknown(e)) if e.message.contains("/target.vhd")));
    }
}
