//! A copy on a file system that can share blocks shares them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::ops::ControlFlow;
use std::path::Path;

use formats::{CreateOptions, Format, OpenOptions};
use formats_tests::Xfs;

const MIB: u64 = 1 << 20;

fn fill(path: &Path, options: &CreateOptions) {
    formats::create(path, options).unwrap();
    let image = formats::open(path, &OpenOptions::default()).unwrap();
    let mut content = vec![0; 3 * MIB as usize];
    for (n, word) in content.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
    for at in [0, 10 * MIB + 512, 40 * MIB, 61 * MIB] {
        formats::write_payload(&*image, at, &content).unwrap();
    }
    image.close().unwrap();
}

#[test]
fn blocks_are_shared_where_the_file_system_can() {
    let Some(xfs) = Xfs::mount() else { return };
    let source = xfs.path().join("source.vhdx");
    fill(&source, &CreateOptions::new(Format::Vhdx, 64 * MIB));
    let image = formats::open(&source, &OpenOptions::read_only()).unwrap();
    let formats =
        [(Format::Vhdx, None), (Format::Vhdx, Some(MIB as u32)), (Format::Raw, None), (Format::Vhd, None)];
    for (format, block_size) in formats {
        let before = xfs.used().unwrap();
        let path = xfs.path().join(format!("target-{}.{format}", block_size.unwrap_or(0)));
        formats::create(&path, &CreateOptions { block_size, ..CreateOptions::new(format, 64 * MIB) })
            .unwrap();
        let target =
            formats::open(&path, &OpenOptions { format: Some(format), ..OpenOptions::default() }).unwrap();
        let outcome = formats::copy(&*image, &*target, &mut |_| ControlFlow::Continue(())).unwrap();
        assert!(outcome.bytes_copied >= 12 * MIB, "{outcome:?}");
        let same = formats::compare(&*image, &*target, &mut |_| ControlFlow::Continue(())).unwrap();
        assert!(same.is_same(), "{format}: {same:?}");
        // The copy is a file of its own.
        formats::write_payload(&*target, 0, &[7; 4096]).unwrap();
        let mut first = [0; 4096];
        formats::read_payload(&*image, 0, &mut first).unwrap();
        assert_ne!(first, [7; 4096], "{format}: the source has changed with the copy");
        target.files()[0].sync().unwrap();
        let taken = xfs.used().unwrap().saturating_sub(before);
        println!("{format}, blocks of {block_size:?}: {} KiB taken", taken >> 10);
        assert!(taken < 4 * MIB, "{format}: {taken} bytes");
        target.close().unwrap();
    }
}

#[test]
fn zeroes_that_a_block_holds_get_no_room_in_a_copy() {
    let folder = tempfile::tempdir().unwrap();
    let open = |name: &str| {
        let path = folder.path().join(name);
        formats::create(&path, &CreateOptions::new(Format::Vhdx, 16 * MIB)).unwrap();
        formats::open(&path, &OpenOptions::default()).unwrap()
    };
    let (source, target) = (open("source.vhdx"), open("target.vhdx"));
    formats::write_payload(&*source, 0, &vec![0; 4 * MIB as usize]).unwrap();
    let outcome = formats::copy(&*source, &*target, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(outcome.bytes_copied, 0);
    let extent = target.next_extent(0).unwrap().unwrap();
    assert_eq!((extent.state, extent.span.len), (formats::AllocState::Absent, 16 * MIB));
}
