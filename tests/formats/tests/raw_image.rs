//! Raw images: the file is the disk.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use std::sync::Arc;

use formats::raw::{self, Raw};
use formats::{AllocState, ByteSpan, ErrorKind, FileIndex, Image, Piece, Pieces, Place, Storage, ZeroMode};
use formats_tests::{CrashExplorer, History, SimStorage, read_payload, write_payload, zero_payload};

fn open(sim: &Arc<SimStorage>, read_only: bool) -> Result<Raw, formats::ImageError> {
    let storage: Arc<dyn Storage> = sim.clone();
    Raw::open(storage, read_only)
}

fn create(size: u64) -> Arc<SimStorage> {
    let sim = SimStorage::new();
    raw::create(&*sim, size).unwrap();
    sim
}

#[test]
fn every_byte_is_where_it_is_in_the_file() {
    let sim = create(1 << 20);
    let image = open(&sim, false).unwrap();
    assert_eq!((image.geometry().virtual_size, image.geometry().payload_align), (1 << 20, 4096));
    for map in [Image::map_read, Image::map_write] {
        let mut out = Pieces::new();
        map(&image, ByteSpan::new(512, 1 << 19), &mut out).unwrap();
        let place = Place::File { file: FileIndex::TOP, offset: 512 };
        assert_eq!(out.as_slice(), [Piece { len: 1 << 19, place }]);
    }
    assert_eq!(sim.trace_len(), 2, "mapping writes nothing: only creation did");
}

#[test]
fn holes_are_absent_and_zeroing_makes_them() {
    let sim = create(1 << 20);
    let image = open(&sim, false).unwrap();
    write_payload(&image, 64 << 10, &[1; 8192]).unwrap();
    let runs = |image: &Raw| {
        let mut runs = Vec::new();
        let mut at = 0;
        while let Some(extent) = image.next_extent(at).unwrap() {
            at = extent.span.offset + extent.span.len;
            runs.push((extent.state, extent.span.len));
        }
        runs
    };
    let rest = (1 << 20) - (72 << 10);
    assert_eq!(
        runs(&image),
        [(AllocState::Absent, 64 << 10), (AllocState::Data, 8192), (AllocState::Absent, rest)]
    );
    zero_payload(&image, 64 << 10, 8192, ZeroMode::Unmap).unwrap();
    assert_eq!(runs(&image), [(AllocState::Absent, 1 << 20)]);
}

#[test]
fn a_size_off_the_grid_is_clipped_for_reading_and_refused_for_writing() {
    let sim = SimStorage::from_bytes(&[7; 1300]);
    let e = open(&sim, false).unwrap_err();
    assert_eq!(e.kind, ErrorKind::Unsupported);
    assert!(e.message.contains("1300") && e.message.contains("1536"), "{e}");
    let image = open(&sim, true).unwrap();
    assert_eq!(image.geometry().virtual_size, 1024);
    assert_eq!(read_payload(&image, 512, 512).unwrap(), [7; 512]);
    assert_eq!(
        image.map_read(ByteSpan::new(1024, 512), &mut Pieces::new()).unwrap_err().kind,
        ErrorKind::OutOfRange
    );
    let report = raw::check(&*sim).unwrap();
    assert_eq!((report.findings.len(), report.is_sound()), (1, true));
    assert!(open(&SimStorage::new(), true).is_err(), "an empty file is no disk");
}

#[test]
fn writes_survive_every_crash_as_their_sectors_do() {
    let sim = create(64 << 10);
    sim.forget_trace();
    let image = open(&sim, false).unwrap();
    let mut history = History::new();
    history.write(&image, &sim, 0, &[1; 2048]).unwrap();
    history.flush(&image, &sim).unwrap();
    history.write(&image, &sim, 1024, &[2; 2048]).unwrap();
    history.zero(&image, &sim, 512, 1024, ZeroMode::Unmap).unwrap();
    history.flush(&image, &sim).unwrap();
    history.write(&image, &sim, 60 << 10, &[3; 4096]).unwrap();
    let count = CrashExplorer::default().explore(&sim, |state| {
        let image = open(&state.storage, false).unwrap();
        history.verify(&image, state.sure(), state.progress.begun).unwrap();
    });
    println!("raw: {count}");
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    for size in [0, 1, 511, 1000, u64::MAX - 511] {
        assert_eq!(raw::create(&*SimStorage::new(), size).unwrap_err().kind, ErrorKind::InvalidParameter);
    }
}
