//! Hostile images: whatever a file says, it is refused or it is safe to use.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use formats::{
    AllocState, ByteSpan, Chain, ErrorKind, Format, Image, ImageError, ImageType, LayerOptions,
    NewParentLink, NotesFile, Pieces, ZeroMode, vhdx,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use uuid::Uuid;

use crate::codec;
use crate::encoding::Input;
use crate::payload::{self, Fence, Until, in_file};
use crate::storage::{Contents, MemoryFile};
use crate::structures;

/// The most runs of a disk that are walked over.
const EXTENTS_MAX: usize = 2048;
/// The most blocks of a disk that are mapped all at once.
const BLOCKS_MAX: u64 = 16 << 10;

/// Runs the target on an input.
///
/// # Panics
/// When `formats` breaks a promise.
pub fn run(data: &[u8]) {
    let Some(input) = Input::decode(data) else { return };
    let format = input.format();
    let mut file = input.contents();
    structures::mend(&mut file, format, input.mend());
    let case = Case { format, file, choices: input.choices };
    let samples = case.look();
    case.repair(samples.as_ref());
    case.change(samples.as_ref(), false);
    if format == Format::Vhd {
        case.change(samples.as_ref(), true);
    }
    case.change_closed(samples.as_ref());
}

/// Sectors of the disk as they were read, by offset.
type Samples = BTreeMap<u64, Vec<u8>>;

struct Case {
    format: Format,
    file: Contents,
    choices: u8,
}

/// Bytes of the parent that a differencing image is put on.
const PARENT_LEN: u64 = 40 << 20;

/// A parent with something in every 64th sector, larger or smaller than the child.
fn parent(sector: u64) -> Arc<dyn Image> {
    static PARENTS: [OnceLock<Contents>; 2] = [const { OnceLock::new() }; 2];
    let params = vhdx::CreateParams {
        image_type: ImageType::Fixed,
        virtual_size: PARENT_LEN,
        block_size: None,
        logical_sector_size: sector as u32,
        physical_sector_size: 4096,
        log_size: Some(1 << 20),
        parent: None,
    };
    let made = PARENTS[usize::from(sector == 4096)].get_or_init(|| {
        let file = MemoryFile::new(Contents::default());
        vhdx::create(&*file, &params).expect("an image can be made");
        let image = codec::open(Format::Vhdx, &file, false, false).expect("what was made can be opened");
        let fence = Fence::of_ours(Format::Vhdx, &file);
        for at in (0..PARENT_LEN).step_by(64 * 4096) {
            payload::write(&*image, at, &[0x77; 4096], Until::Told, &fence).expect("it can be written");
        }
        image.close().expect("it can be closed");
        file.contents()
    });
    codec::open(Format::Vhdx, &MemoryFile::new(made.clone()), true, false)
        .expect("what was made can be opened")
}

/// Opens an image; a differencing one on some parent.
pub(crate) fn on_some_parent(
    format: Format,
    file: &Arc<MemoryFile>,
    options: &LayerOptions,
) -> Result<Arc<dyn Image>, ImageError> {
    match codec::open(format, file, options.read_only, options.recover) {
        Err(e) if e.kind == ErrorKind::Parent => {}
        opened => return opened,
    }
    let top = codec::open_layer(format, file, options)?;
    let differencing = top.image_type() == ImageType::Differencing && top.parent_link().is_some();
    assert!(differencing, "no child, but it needs a parent");
    let parent = parent(top.geometry().logical_sector_size.into());
    Ok(Arc::new(Chain::new(top, vec![parent]).expect("parent and child fit")))
}

impl Case {
    fn random(&self) -> ChaCha8Rng {
        ChaCha8Rng::seed_from_u64(self.choices.into())
    }

    /// Opens the image; a differencing one on some parent.
    fn open(
        &self,
        file: &Arc<MemoryFile>,
        notes: &Arc<MemoryFile>,
        read_only: bool,
        recover: bool,
    ) -> Result<Arc<dyn Image>, ImageError> {
        let notes = Some(NotesFile { storage: notes.clone(), boot_id: Uuid::nil() });
        let options = LayerOptions { read_only, recover, next_content_id: None, notes };
        on_some_parent(self.format, file, &options)
    }

    /// Everything that may not write.
    fn look(&self) -> Option<Samples> {
        let file = MemoryFile::new(self.file.clone());
        let notes = MemoryFile::new(Contents::default());
        let report = codec::check(self.format, &file, false);
        let info = codec::inspect(self.format, &file);
        let image = self.open(&file, &notes, true, self.choices & 1 == 1);
        let samples = match &image {
            Ok(image) => {
                let report = report.expect("what opens can be checked");
                let damage = codec::damage(&report);
                assert!(
                    damage.iter().all(|code| *code == "vhd-footer-missing"),
                    "opens for reading, but is damaged: {damage:?}"
                );
                let (size, block) = info.expect("what opens can be inspected");
                let geometry = image.geometry();
                assert_eq!(
                    (size, block),
                    (geometry.virtual_size, geometry.block_size),
                    "two words on the sizes"
                );
                let samples =
                    walk(&**image, &Fence::of_foreign(self.format, &file), &file, &mut self.random());
                image.close().expect("nothing is to be done");
                assert!(image.map_write(ByteSpan::new(0, 4096), &mut Pieces::new()).is_err());
                Some(samples)
            }
            Err(e) => {
                explained(e);
                if let Ok(report) = &report {
                    let refused = e.kind == ErrorKind::Unsupported;
                    assert!(refused || !report.is_sound(), "sound, but does not open for reading: {e}");
                }
                None
            }
        };
        assert_eq!(notes.work().changes, 0, "something was noted that was to be read only");
        assert_eq!(file.work().changes, 0, "something was written that was to be read only");
        samples
    }

    fn repair(&self, samples: Option<&Samples>) {
        let file = MemoryFile::new(self.file.clone());
        let notes = MemoryFile::new(Contents::default());
        let Ok(report) = codec::check(self.format, &file, true) else { return };
        if file.has_failed() {
            return;
        }
        let again = codec::check(self.format, &file, false).expect("what was repaired can be checked");
        for mended in report.findings.iter().filter(|f| f.repaired) {
            assert!(
                again.findings.iter().all(|f| f.code != mended.code),
                "repaired, but still there: {mended:?}"
            );
        }
        if !report.is_sound() {
            assert!(report.findings.iter().all(|f| !f.repaired), "repaired in part: {report:?}");
            assert!(file.contents() == self.file, "changed by a repair that did nothing");
            return;
        }
        assert!(again.is_sound(), "sound after a repair, and then not: {again:?}");
        let Some(samples) = samples else { return };
        let image = self.open(&file, &notes, true, false).expect("it opened before it was repaired");
        compare(&*image, &Fence::of_foreign(self.format, &file), samples, "after a repair");
    }

    /// Opens it for writing, writes, and looks whether all is as it should be.
    fn change(&self, samples: Option<&Samples>, recover: bool) {
        let file = MemoryFile::new(self.file.clone());
        let notes = MemoryFile::new(Contents::default());
        let image = match self.open(&file, &notes, false, recover) {
            Ok(image) => image,
            Err(e) => {
                explained(&e);
                return;
            }
        };
        let fence = Fence::of_ours(self.format, &file);
        let mut samples = samples.expect("opens for writing, but not for reading").clone();
        compare(&*image, &fence, &samples, "opened for writing");
        let mut random = self.random();
        walk(&*image, &fence, &file, &mut random);
        assert!(codec::damage(&sound(self.format, &file)).is_empty(), "damaged when opened for writing");
        self.write(&*image, &file, &mut samples, &mut random);
        compare(&*image, &fence, &samples, "after writing");
        let closed = self.choices & 0x10 == 0 && image.close().is_ok();
        drop(image);
        let no_space = file.has_failed();
        assert!(closed || no_space || self.choices & 0x10 != 0, "cannot be closed");
        file.heal();
        let again = self.open(&file, &notes, false, !closed).expect("it opened before");
        compare(&*again, &fence, &samples, "opened again");
        walk(&*again, &fence, &file, &mut random);
        if again.close().is_ok() {
            assert!(codec::damage(&sound(self.format, &file)).is_empty(), "damaged when closed");
        } else {
            assert!(file.has_failed(), "cannot be closed, though nothing failed");
        }
        let last = self.open(&file, &notes, true, false).expect("it opened before");
        compare(&*last, &fence, &samples, "opened for reading at last");
    }

    /// Compacts it, or gives it another size or name of its parent.
    fn change_closed(&self, samples: Option<&Samples>) {
        let file = MemoryFile::new(self.file.clone());
        let notes = MemoryFile::new(Contents::default());
        let size = codec::inspect(self.format, &file).map_or(1 << 20, |(size, _)| size);
        let link = NewParentLink {
            id: Uuid::from_u128(7),
            next_id: None,
            relative: Some("parent".into()),
            absolute: "/disks/".to_owned() + &"longer/".repeat(self.choices.into()),
        };
        let (what, done) = match self.choices >> 5 & 3 {
            0 => ("compacting", codec::compact(self.format, &file).map(drop)),
            1 => ("growing", codec::resize(self.format, &file, size.saturating_add(8 << 20), false)),
            2 => ("shrinking", codec::resize(self.format, &file, (size / 2).next_multiple_of(4096), true)),
            _ => ("relinking", codec::relink(self.format, &file, &link)),
        };
        if let Err(e) = &done {
            explained(e);
            if samples.is_none() {
                return;
            }
        } else {
            assert!(codec::damage(&sound(self.format, &file)).is_empty(), "damaged by {what}");
        }
        let Some(samples) = samples else { panic!("{what} works on what does not open") };
        let image = self.open(&file, &notes, true, false).expect("it opened before");
        let size = image.geometry().virtual_size;
        let mut samples = samples.clone();
        samples.retain(|offset, data| offset + data.len() as u64 <= size);
        compare(&*image, &Fence::of_foreign(self.format, &file), &samples, what);
        walk(&*image, &Fence::of_foreign(self.format, &file), &file, &mut self.random());
    }

    /// A few writes, zeroings and flushes.
    fn write(
        &self,
        image: &dyn Image,
        file: &Arc<MemoryFile>,
        samples: &mut Samples,
        random: &mut ChaCha8Rng,
    ) {
        let fence = Fence::of_ours(self.format, file);
        for n in 0..1 + self.choices % 8 {
            let done = codec::bounded("a change", file, || change_once(image, &fence, samples, random, n));
            if let Err(e) = done {
                assert!(file.has_failed(), "a change fails, though the file does what it is told: {e}");
                explained(&e);
            }
        }
        let committed = codec::bounded("flushing", file, || image.commit());
        let maintained = codec::bounded("maintaining", file, || image.maintain(&|| ()));
        if let Err(e) = committed.and(maintained) {
            assert!(file.has_failed(), "a flush fails, though the file does what it is told: {e}");
        }
    }
}

fn explained(e: &ImageError) {
    assert!(e.message.len() > 10, "no explanation: {e:?}");
}

fn sound(format: Format, file: &Arc<MemoryFile>) -> formats::CheckReport {
    codec::check(format, file, false).expect("what opens can be checked")
}

fn change_once(
    image: &dyn Image,
    fence: &Fence,
    samples: &mut Samples,
    random: &mut ChaCha8Rng,
    n: u8,
) -> Result<(), ImageError> {
    let geometry = image.geometry();
    let sector = u64::from(geometry.logical_sector_size);
    let sectors = geometry.virtual_size / sector;
    let known: Vec<u64> = samples.keys().copied().collect();
    let first = if random.random_ratio(1, 3) && !known.is_empty() {
        known[random.random_range(0..known.len())] / sector
    } else {
        random.random_range(0..sectors)
    };
    let block = (u64::from(geometry.block_size) / sector).max(1);
    let (first, count) = match random.random_range(0..4) {
        0 => (first / block * block, block),
        _ => (first, random.random_range(1..=8)),
    };
    let at = ByteSpan::new(first * sector, count.min(sectors - first) * sector);
    let zeroes = random.random_ratio(1, 3);
    let byte = if zeroes { 0 } else { 0x80 | n };
    // What fails may be there in part: nothing is known of it.
    samples.retain(|offset, _| *offset < at.offset || *offset >= at.offset + at.len);
    if zeroes {
        let mode = if random.random() { ZeroMode::Unmap } else { ZeroMode::Keep };
        payload::zero(image, at, mode, random.random(), fence)?;
    } else {
        let at = ByteSpan::new(at.offset, at.len.min(1 << 20));
        payload::write(image, at.offset, &vec![byte; at.len as usize], Until::Told, fence)?;
        samples.insert(at.offset + at.len - sector, vec![byte; sector as usize]);
    }
    samples.insert(at.offset, vec![byte; sector as usize]);
    Ok(())
}

fn compare(image: &dyn Image, fence: &Fence, samples: &Samples, when: &str) {
    for (offset, expected) in samples {
        let found = payload::read(image, ByteSpan::new(*offset, expected.len() as u64), fence)
            .unwrap_or_else(|e| panic!("{when}: cannot read at {offset}: {e}"));
        assert!(
            found == *expected,
            "{when}: the content at {offset:#x} was {:02x?}..., and is {:02x?}...",
            &expected[..8],
            &found[..8]
        );
    }
}

/// Looks at all of an open image, as far as that is bounded, and reads some of it.
fn walk(image: &dyn Image, fence: &Fence, file: &MemoryFile, random: &mut ChaCha8Rng) -> Samples {
    let geometry = image.geometry();
    let sector = u64::from(geometry.logical_sector_size);
    assert!([512, 4096].contains(&sector), "{geometry:?}");
    assert!(geometry.virtual_size > 0 && geometry.virtual_size.is_multiple_of(sector), "{geometry:?}");
    assert!(geometry.payload_align.is_power_of_two() && geometry.virtual_size <= 64 << 40, "{geometry:?}");
    out_of_range_is_refused(image);
    let mut places = codec::bounded("walking over the extents", file, || extents(image));
    codec::bounded("mapping the disk", file, || map_all(image, fence));
    for _ in 0..4 {
        places.push((random.random_range(0..geometry.virtual_size / sector) * sector, None));
    }
    places.push((geometry.virtual_size - sector, None));
    let mut samples = Samples::new();
    for (offset, state) in places {
        let data =
            payload::read(image, ByteSpan::new(offset, sector), fence).expect("what is mapped can be read");
        if matches!(state, Some(AllocState::Zero | AllocState::Absent)) {
            assert!(crate::storage::is_zero(&data), "said to be {state:?}, but holds data at {offset}");
        }
        samples.insert(offset, data);
    }
    samples
}

/// The beginnings of runs, some of each state.
fn extents(image: &dyn Image) -> Vec<(u64, Option<AllocState>)> {
    let geometry = image.geometry();
    let (mut at, mut data, mut rest) = (0, Vec::new(), Vec::new());
    for _ in 0..EXTENTS_MAX {
        let Some(extent) = image.next_extent(at).expect("what opens has extents") else {
            assert_eq!(at, geometry.virtual_size, "the extents end before the disk");
            break;
        };
        assert_eq!(extent.span.offset, at, "extents have a gap");
        let len = extent.span.len;
        assert!(len > 0 && len.is_multiple_of(geometry.logical_sector_size.into()), "{extent:?}");
        let list = if extent.state == AllocState::Data { &mut data } else { &mut rest };
        if list.len() < 12 {
            list.push((at, Some(extent.state)));
        }
        at = extent.span.end().expect("an extent does not wrap around");
        assert!(at <= geometry.virtual_size, "{extent:?} reaches beyond the disk");
    }
    data.extend(rest);
    data
}

/// Maps the disk, or its ends, and demands that no two of its parts share a place.
fn map_all(image: &dyn Image, fence: &Fence) {
    let geometry = image.geometry();
    let unit = u64::from(geometry.block_size).max(1 << 20);
    let (size, reach) = (geometry.virtual_size, BLOCKS_MAX * unit);
    let tail = size.saturating_sub(reach / 2) / unit * unit;
    let spans = if size <= reach {
        vec![ByteSpan::new(0, size)]
    } else {
        vec![ByteSpan::new(0, reach / 2), ByteSpan::new(tail, size - tail)]
    };
    let mut places = Vec::new();
    for span in spans {
        let mut pieces = Pieces::new();
        image.map_read(span, &mut pieces).expect("all of the disk can be mapped");
        fence.watch(image, span, &pieces);
        places.extend(pieces.iter().filter_map(|p| in_file(p).map(|(file, offset)| (file, offset, p.len))));
    }
    places.sort_unstable();
    for pair in places.windows(2) {
        let ((a, from, len), (b, next, _)) = (pair[0], pair[1]);
        assert!(a != b || from + len <= next, "two parts of the disk share the place {next:#x} of the file");
    }
}

fn out_of_range_is_refused(image: &dyn Image) {
    let size = image.geometry().virtual_size;
    let mut pieces = Pieces::new();
    for (offset, len) in [
        (size, 4096),
        (size - 512, 8192),
        (u64::MAX - 4095, 4096),
        (u64::MAX - 4095, 8192),
        (0, u64::MAX),
        (1, 4096),
        (0, 100),
    ] {
        let refused = image.map_read(ByteSpan::new(offset, len), &mut pieces);
        let kind = refused.expect_err("a span beyond the disk or off its sectors was mapped").kind;
        assert_eq!(kind, ErrorKind::OutOfRange, "{len} bytes at {offset}");
    }
    assert!(pieces.is_empty(), "a refused span has pieces");
}
