//! VHDX against a flat model: random traces, failing storage, many threads.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

use std::sync::Arc;

use formats::vhdx::{self, CreateParams, Vhdx};
use formats::{AllocState, ByteSpan, ErrorKind, Image, ImageType, Pieces, Place, Storage, ZeroMode};
use formats_tests::{Fault, SimStorage, read_payload, write_payload, zero_payload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const BLOCK: u64 = 1 << 20;

fn create(image_type: ImageType, sector: u32, size: u64) -> Arc<SimStorage> {
    let sim = SimStorage::new();
    let params = CreateParams {
        image_type,
        virtual_size: size,
        block_size: Some(BLOCK as u32),
        logical_sector_size: sector,
        physical_sector_size: 4096,
        log_size: Some(1 << 20),
        parent: None,
    };
    vhdx::create(&*sim, &params).unwrap();
    sim
}

fn open(sim: &Arc<SimStorage>, read_only: bool) -> Vhdx {
    let storage: Arc<dyn Storage> = sim.clone();
    Vhdx::open(storage, read_only).unwrap()
}

fn sound(sim: &Arc<SimStorage>) {
    let storage: Arc<dyn Storage> = sim.clone();
    let report = vhdx::check(storage, false).unwrap();
    assert!(report.is_sound(), "{report:?}");
}

/// The model: the content, and a way to compare all of it.
struct Model(Vec<u8>);

impl Model {
    fn compare(&self, image: &dyn Image) {
        let mut at = 0;
        while let Some(extent) = image.next_extent(at).unwrap() {
            assert_eq!(extent.span.offset, at);
            let range = at as usize..(at + extent.span.len) as usize;
            let read = read_payload(image, at, range.len()).unwrap();
            assert!(read == self.0[range.clone()], "content at {at}");
            if extent.state != AllocState::Data {
                assert!(self.0[range].iter().all(|b| *b == 0), "told as {:?} at {at}", extent.state);
            }
            at += extent.span.len;
        }
        assert_eq!(at, self.0.len() as u64);
    }
}

fn random_trace(seed: u64, image_type: ImageType, sector: u32) {
    let size = 24 * BLOCK + 3 * 4096;
    let sim = create(image_type, sector, size);
    let mut image = open(&sim, false);
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut model = Model(vec![0; size as usize]);
    let sector = u64::from(sector);
    for _ in 0..200 {
        let count = if random.random_ratio(1, 6) { 2 * BLOCK / sector } else { random.random_range(1..20) };
        let at = random.random_range(0..=size / sector - count) * sector;
        let (len, range) = (count * sector, at as usize..(at + count * sector) as usize);
        match random.random_range(0..20) {
            0..10 => {
                let data: Vec<u8> = (0..len).map(|_| random.random()).collect();
                write_payload(&image, at, &data).unwrap();
                model.0[range].copy_from_slice(&data);
            }
            10..14 => {
                let mode = if random.random() { ZeroMode::Unmap } else { ZeroMode::Keep };
                zero_payload(&image, at, len, mode).unwrap();
                model.0[range].fill(0);
            }
            14 => image.commit().unwrap(),
            15 | 16 => image.maintain(&|| ()).unwrap(),
            17 => {
                image.close().unwrap();
                sound(&sim);
            }
            18 => {
                // The process dies: what was written is there, and the log is replayed.
                drop(image);
                model.compare(&open(&sim, true));
                image = open(&sim, false);
            }
            _ => model.compare(&image),
        }
    }
    model.compare(&image);
    image.close().unwrap();
    sound(&sim);
    model.compare(&open(&sim, true));
}

#[test]
fn random_traces_agree_with_a_flat_model() {
    for seed in 0..24 {
        let kind = if seed % 4 == 3 { ImageType::Fixed } else { ImageType::Dynamic };
        random_trace(seed, kind, if seed % 3 == 2 { 4096 } else { 512 });
    }
}

/// Each operation of the storage fails in turn: nothing that was flushed is lost, and the image stays sound.
#[test]
fn a_failing_storage_costs_no_flushed_write() {
    let size = 64 * BLOCK;
    let mut faults = 0;
    for n in 0.. {
        let sim = create(ImageType::Dynamic, 512, size);
        let image = open(&sim, false);
        write_payload(&image, 0, &[1; 1024]).unwrap();
        image.commit().unwrap();
        sim.inject(Fault { after: n, lasting: false, error: std::io::ErrorKind::Other, partial: n % 2 == 1 });
        let mut flushed = 0;
        let mut failed = None;
        for block in 1..20u8 {
            let done = write_payload(&image, u64::from(block) * BLOCK, &[block; 512])
                .and_then(|()| if block % 4 == 0 { image.maintain(&|| ()) } else { Ok(()) })
                .and_then(|()| image.commit());
            match done {
                Ok(()) => flushed = block,
                Err(e) => {
                    failed.get_or_insert(e);
                    break;
                }
            }
        }
        sim.clear_fault();
        // Whether it goes on or is poisoned: it never lies.
        let later = write_payload(&image, 40 * BLOCK, &[0x40; 512]).and_then(|()| image.commit());
        if let Err(e) = &later {
            assert_eq!(e.kind, ErrorKind::Poisoned, "{e}");
        }
        drop(image);
        sound(&sim);
        let image = open(&sim, false);
        for block in 1..=flushed {
            assert_eq!(read_payload(&image, u64::from(block) * BLOCK, 512).unwrap(), [block; 512]);
        }
        if later.is_ok() {
            assert_eq!(read_payload(&image, 40 * BLOCK, 512).unwrap(), [0x40; 512]);
        }
        if failed.is_none() {
            break;
        }
        faults += 1;
    }
    println!("{faults} failing operations");
    assert!(faults > 50);
}

/// Many threads write to the same new blocks: each gets one place, and no write is lost.
#[test]
fn threads_that_write_to_the_same_new_blocks_allocate_each_once() {
    const THREADS: u64 = 8;
    let size = 300 * BLOCK;
    let sim = create(ImageType::Dynamic, 512, size);
    let image = Arc::new(open(&sim, false));
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..THREADS)
            .map(|t| {
                let (image, sim) = (&image, &sim);
                scope.spawn(move || {
                    for block in 0..300 {
                        let at = block * BLOCK + t * 512;
                        let mut pieces = Pieces::new();
                        image.map_write(ByteSpan::new(at, 512), &mut pieces).unwrap();
                        let Place::File { offset, .. } = pieces[0].place else { panic!("nowhere") };
                        sim.write_at(&[t as u8 + 1; 512], offset).unwrap();
                        if block % 50 == t {
                            image.commit().unwrap();
                        }
                    }
                })
            })
            .collect();
        let stopped = &stop;
        let keeper = scope.spawn(|| {
            while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                image.maintain(&|| ()).unwrap();
                std::thread::yield_now();
            }
        });
        writers.into_iter().for_each(|w| w.join().unwrap());
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        keeper.join().unwrap();
    });
    for block in 0..300 {
        let read = read_payload(&*image, block * BLOCK, THREADS as usize * 512).unwrap();
        for t in 0..THREADS as usize {
            assert_eq!(read[t * 512..(t + 1) * 512], [t as u8 + 1; 512], "block {block}, thread {t}");
        }
    }
    image.close().unwrap();
    sound(&sim);
    assert_eq!(open(&sim, true).facts().allocated_bytes, 300 * BLOCK);
}

#[test]
fn the_largest_disk_opens_at_once_and_in_little_memory() {
    let sim = create(ImageType::Dynamic, 512, 64 << 40);
    let image = open(&sim, false);
    write_payload(&image, (64 << 40) - 512, &[7; 512]).unwrap();
    write_payload(&image, 33 << 40, &[8; 512]).unwrap();
    image.close().unwrap();
    drop(image);
    let (_, before) = sim.reads();
    let begun = std::time::Instant::now();
    let image = open(&sim, false);
    let took = begun.elapsed();
    let (_, after) = sim.reads();
    println!("64 TiB in blocks of 1 MiB: opened in {took:?}, {} bytes read", after - before);
    assert!(took < std::time::Duration::from_secs(10));
    assert!(after - before < 16 << 20);
    assert_eq!(read_payload(&image, (64 << 40) - 512, 512).unwrap(), [7; 512]);
    let mut data = 0;
    let mut at = 0;
    while let Some(extent) = image.next_extent(at).unwrap() {
        data += u64::from(extent.state == AllocState::Data) * extent.span.len;
        at += extent.span.len;
    }
    assert_eq!(at, 64 << 40);
    assert!((1024..=16 << 10).contains(&data), "{data} bytes are told as data");
}

#[test]
fn spans_off_the_disk_or_off_its_sectors_are_refused() {
    let sim = create(ImageType::Dynamic, 4096, 8 * BLOCK);
    let image = open(&sim, false);
    for (offset, len) in
        [(8 * BLOCK, 4096), (8 * BLOCK - 4096, 8192), (512, 4096), (0, 512), (u64::MAX - 4095, 4096)]
    {
        let mut pieces = Pieces::new();
        let span = ByteSpan::new(offset, len);
        assert_eq!(image.map_read(span, &mut pieces).unwrap_err().kind, ErrorKind::OutOfRange, "{span:?}");
        assert_eq!(image.map_write(span, &mut pieces).unwrap_err().kind, ErrorKind::OutOfRange, "{span:?}");
    }
    let image = open(&sim, true);
    assert_eq!(
        image.map_write(ByteSpan::new(0, 4096), &mut Pieces::new()).unwrap_err().kind,
        ErrorKind::ReadOnly
    );
}
