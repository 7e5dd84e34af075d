//! What a failing file, a hostile log or an unusual request does to a VHDX: refused or survived, never a lost flush.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use formats::vhdx::{self, CreateParams, Vhdx};
use formats::{ErrorKind, Image, ImageType, Storage, ZeroMode};
use formats_tests::{CrashExplorer, Fault, SimStorage, read_payload, write_payload, zero_payload};
use std::io;
use std::sync::Arc;
const BLOCK: u64 = 1 << 20;
fn create(size: u64) -> Arc<SimStorage> {
    let sim = SimStorage::new();
    let p = CreateParams {
        image_type: ImageType::Dynamic,
        virtual_size: size,
        block_size: Some(BLOCK as u32),
        logical_sector_size: 512,
        physical_sector_size: 4096,
        log_size: Some(1 << 20),
        parent: None,
    };
    vhdx::create(&*sim, &p).unwrap();
    sim.forget_trace();
    sim
}
fn open(sim: &Arc<SimStorage>, ro: bool) -> Result<Vhdx, formats::ImageError> {
    let s: Arc<dyn Storage> = sim.clone();
    Vhdx::open(s, ro)
}
fn flush(image: &Vhdx, sim: &SimStorage) {
    let mut token = Some(image.sync_begin());
    while let Some(begun) = token {
        sim.sync().unwrap();
        token = image.sync_done(begun).unwrap();
    }
}

/// For every n: the n-th change of close() fails once; then a new block is written and flushed; power cut.
#[test]
fn a_flushed_write_after_a_failed_close_is_never_lost() {
    let mut bad = Vec::new();
    for error in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
        for n in 0..12 {
            let sim = create(64 * BLOCK);
            let image = open(&sim, false).unwrap();
            write_payload(&image, 0, &[1; 512]).unwrap();
            flush(&image, &sim);
            sim.inject(Fault { after: n, lasting: false, error, partial: false });
            let closed = image.close();
            sim.clear_fault();
            if closed.is_ok() {
                continue;
            }
            if write_payload(&image, 5 * BLOCK, &[7; 512]).is_err() {
                continue;
            }
            flush(&image, &sim);
            let cut = SimStorage::from_disk(sim.durable_contents());
            match open(&cut, false) {
                Err(e) => bad.push(format!("{error:?} at {n}: does not open: {e}")),
                Ok(i) => {
                    if read_payload(&i, 5 * BLOCK, 512).unwrap() != [7; 512]
                        || read_payload(&i, 0, 512).unwrap() != [1; 512]
                    {
                        bad.push(format!(
                            "{error:?} at {n} ({:?}): FLUSHED WRITE LOST",
                            closed.unwrap_err().message
                        ))
                    }
                }
            }
        }
    }
    assert!(bad.is_empty(), "{bad:#?}");
}

/// For every n: the n-th change of the first write of a session fails once, the write is tried again; every crash.
#[test]
fn a_session_that_failed_to_begin_leaves_an_image_that_opens() {
    let mut bad = Vec::new();
    for error in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
        for n in 0..10 {
            let sim = create(64 * BLOCK);
            let image = open(&sim, false).unwrap();
            write_payload(&image, 0, &[1; 512]).unwrap();
            image.close().unwrap();
            sim.forget_trace();
            sim.inject(Fault { after: n, lasting: false, error, partial: false });
            let first = write_payload(&image, 5 * BLOCK, &[7; 512]);
            sim.clear_fault();
            if first.is_ok() {
                continue;
            }
            if write_payload(&image, 5 * BLOCK, &[7; 512]).is_err() {
                continue;
            }
            CrashExplorer::default().explore(&sim, |state| {
                let lost = match open(&state.storage, false) {
                    Err(e) => Some(format!("does not open: {e}")),
                    Ok(i) => (read_payload(&i, 0, 512).unwrap() != [1; 512]).then(|| "old data lost".into()),
                };
                if let Some(why) = lost {
                    bad.push(format!("{error:?} at {n}, crash after {}: {why}", state.after));
                }
            });
        }
    }
    bad.dedup();
    assert!(bad.is_empty(), "{} states: {:#?}", bad.len(), &bad[..bad.len().min(6)]);
}

#[test]
fn a_discard_of_blocks_far_apart_is_cut_to_what_the_log_takes() {
    let sim = create(200 << 30);
    let image = open(&sim, false).unwrap();
    for n in 0..100 {
        write_payload(&image, n << 30, &[1; 512]).unwrap();
    }
    zero_payload(&image, 0, 200 << 30, ZeroMode::Unmap).unwrap();
}

#[test]
fn a_failed_log_write_poisons_the_image() {
    let sim = create(64 * BLOCK);
    let image = open(&sim, false).unwrap();
    write_payload(&image, 0, &[1; 512]).unwrap();
    sim.inject(Fault { after: 0, lasting: false, error: io::ErrorKind::Other, partial: true });
    write_payload(&image, BLOCK, &[1; 512]).unwrap_err();
    assert_eq!(write_payload(&image, BLOCK, &[1; 512]).map_err(|e| e.kind), Err(ErrorKind::Poisoned));
}

#[test]
fn freed_space_can_be_used_when_the_file_cannot_grow() {
    let sim = create(256 * BLOCK);
    let image = open(&sim, false).unwrap();
    write_payload(&image, 0, &[1; 512]).unwrap();
    sim.limit_len(Some(sim.len().unwrap()));
    let mut n = 1;
    while write_payload(&image, n * BLOCK, &[1; 512]).is_ok() {
        n += 1;
    }
    zero_payload(&image, 0, 10 * BLOCK, ZeroMode::Unmap).unwrap();
    image.maintain(&|| ()).unwrap();
    write_payload(&image, 200 * BLOCK, &[2; 512]).unwrap();
}

/// A clean image whose header is made to name a log with one entry.
fn with_log(entry_last: u64, page: Option<(u64, Vec<u8>)>) -> Arc<SimStorage> {
    let sim = create(64 * BLOCK);
    let image = open(&sim, false).unwrap();
    write_payload(&image, 0, &[1; 512]).unwrap();
    image.close().unwrap();
    let mut h = vec![0; 4096];
    sim.read_at(&mut h, 64 << 10).unwrap();
    h[8..16].copy_from_slice(&1000u64.to_le_bytes());
    h[48..64].fill(9);
    let seal = |b: &mut [u8]| {
        b[4..8].fill(0);
        let c = crc32(b);
        b[4..8].copy_from_slice(&c.to_le_bytes());
    };
    seal(&mut h);
    sim.write_at(&h, 64 << 10).unwrap();
    let mut e = vec![0; if page.is_some() { 8192 } else { 4096 }];
    e[..4].copy_from_slice(b"loge");
    let len = e.len() as u32;
    e[8..12].copy_from_slice(&len.to_le_bytes());
    e[16..24].copy_from_slice(&5u64.to_le_bytes());
    e[32..48].fill(9);
    e[48..56].copy_from_slice(&BLOCK.to_le_bytes());
    e[56..64].copy_from_slice(&entry_last.to_le_bytes());
    if let Some((at, data)) = page {
        e[24] = 1;
        e[64..68].copy_from_slice(b"desc");
        e[68..72].copy_from_slice(&data[4092..]);
        e[72..80].copy_from_slice(&data[..8]);
        e[80..88].copy_from_slice(&at.to_le_bytes());
        e[88..96].copy_from_slice(&5u64.to_le_bytes());
        e[4096..8192].copy_from_slice(&data);
        e[4096..4100].copy_from_slice(b"data");
        e[4100..4104].fill(0);
        e[8188..].copy_from_slice(&5u32.to_le_bytes());
    }
    seal(&mut e);
    sim.write_at(&e, 1 << 20).unwrap();
    sim.sync().unwrap();
    sim
}
fn crc32(b: &[u8]) -> u32 {
    let mut c = !0u32;
    for x in b {
        c ^= u32::from(*x);
        for _ in 0..8 {
            c = if c & 1 != 0 { c >> 1 ^ 0x82F63B78 } else { c >> 1 };
        }
    }
    !c
}
#[test]
fn a_log_that_claims_a_huge_file_is_refused_in_little_memory() {
    let sim = with_log(1 << 62, None);
    println!("{:?}", open(&sim, true).map(|_| ()));
}
#[test]
fn payload_that_only_the_log_has_is_told_as_data() {
    let sim = create(64 * BLOCK);
    drop(sim);
    // Block 0 of such an image lies behind log, metadata and BAT: 1 + 1 + 1 + 1 MiB.
    let sim = with_log(5 << 20, Some(((4 << 20) + (512 << 10), vec![0x5a; 4096])));
    let image = open(&sim, true).unwrap();
    let data = read_payload(&image, 512 << 10, 4096).unwrap();
    assert_eq!(data, vec![0x5a; 4096]);
    let e = image.next_extent(512 << 10).unwrap().unwrap();
    assert_eq!(e.state, formats::AllocState::Data, "{e:?}");
}

/// One operation of the file fails, once or twice in a row, anywhere in a session with discards and two closes; then every crash.
#[test]
fn one_failure_anywhere_and_then_every_crash_loses_no_flush() {
    use formats_tests::{CrashKind, History};
    let mut bad = std::collections::BTreeMap::<String, usize>::new();
    let mut total = formats_tests::CrashCount::default();
    for error in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
        for n in 0..60 {
            let sim = create(64 * BLOCK);
            let image = open(&sim, false).unwrap();
            let mut h = History::new();
            sim.inject(Fault { after: n, lasting: false, error, partial: true });
            let c = |t: u8| vec![t; 512];
            // What fails is tried again; what fails again ends the scenario, so that nothing refused counts as acknowledged.
            let mut run = || -> Option<()> {
                macro_rules! again {
                    ($e:expr) => {
                        if $e.is_err() {
                            $e.ok()?
                        }
                    };
                }
                again!(h.write(&image, &sim, 0, &c(1)));
                again!(h.write(&image, &sim, 3 * BLOCK, &c(2)));
                h.flush(&image, &sim).ok()?;
                again!(h.zero(&image, &sim, 0, BLOCK, ZeroMode::Unmap));
                again!(image.maintain(&|| ()));
                again!(h.write(&image, &sim, 5 * BLOCK, &c(3)));
                again!(h.write(&image, &sim, 0, &c(4)));
                h.flush(&image, &sim).ok()?;
                // A close that fails is not tried again here: the guest goes on.
                if image.close().is_ok() {
                    h.note_flushed(&sim);
                }
                again!(h.write(&image, &sim, 7 * BLOCK, &c(5)));
                h.flush(&image, &sim).ok()?;
                again!(h.write(&image, &sim, 8 * BLOCK, &c(6)));
                again!(image.close());
                h.note_flushed(&sim);
                Some(())
            };
            run();
            let ex =
                CrashExplorer { exhaustive_units: 6, pair_units: 8, seeded_subsets: 6, ..Default::default() };
            total += ex.explore(&sim, |s| {
                let r = open(&s.storage, true).map_err(|e| format!("does not open: {}", e.message)).and_then(
                    |i| {
                        h.verify(&i, s.sure(), s.progress.begun).map_err(|e| {
                            format!(
                                "{} content: {}",
                                if s.kind == CrashKind::ProcessKill { "kill" } else { "cut" },
                                &e[..e.len().min(90)]
                            )
                        })
                    },
                );
                if let Err(why) = r {
                    *bad.entry(format!("{error:?} fault at {n}: {why}")).or_default() += 1;
                }
            });
        }
    }
    println!("{total}");
    assert!(bad.is_empty(), "{} kinds: {:#?}", bad.len(), bad);
}
