//! Inputs to begin with: our own images, and those of the corpus.

use std::io::Read;
use std::path::Path;

use formats::{Format, ImageType, LayerOptions, NewParentLink, ZeroMode, vhd, vhdx};
use uuid::Uuid;

use crate::encoding::{Input, Mend};
use crate::open;
use crate::payload::{self, Fence, Until};
use crate::storage::{Contents, MemoryFile};
use crate::structures::{hot_places, metadata};

/// Bytes of a file that a seed may have.
const BUDGET: usize = 12 << 10;

/// An input and a name for it.
pub type Seed = (String, Vec<u8>);

/// Seeds of the `open` target: images that we make, closed and left open.
pub fn own_images() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for (n, block) in [512, 4096, 2 << 20].into_iter().enumerate() {
        let params = |image_type, block_size| vhd::CreateParams {
            image_type,
            virtual_size: 9_000_448,
            block_size,
            parent: None,
        };
        let file = MemoryFile::new(Contents::default());
        vhd::create(&*file, &params(ImageType::Dynamic, Some(block))).expect("an image can be made");
        seeds.extend(used(&format!("vhd-dynamic-{n}"), Format::Vhd, &file.contents()));
        if n == 0 {
            let file = MemoryFile::new(Contents::default());
            vhd::create(&*file, &params(ImageType::Fixed, None)).expect("an image can be made");
            seeds.extend(used("vhd-fixed", Format::Vhd, &file.contents()));
        }
    }
    for (n, image_type) in [ImageType::Dynamic, ImageType::Fixed].into_iter().enumerate() {
        for sector in [512, 4096] {
            let params = vhdx::CreateParams {
                image_type,
                virtual_size: if n == 0 { 9 << 30 } else { 5 << 20 },
                block_size: Some(1 << 20),
                logical_sector_size: sector,
                physical_sector_size: 4096,
                log_size: Some(1 << 20),
                parent: None,
            };
            let file = MemoryFile::new(Contents::default());
            vhdx::create(&*file, &params).expect("an image can be made");
            seeds.extend(used(&format!("vhdx-{image_type}-{sector}"), Format::Vhdx, &file.contents()));
        }
    }
    seeds
}

/// Seeds of the `open` target: images with a parent, closed and left open.
pub fn own_children() -> Vec<Seed> {
    let parent = Some(NewParentLink {
        id: Uuid::from_u128(5),
        next_id: None,
        relative: Some("../base/parent".into()),
        absolute: "/disks/base/parent".into(),
    });
    let mut seeds = Vec::new();
    for block in [512, 4096, 2 << 20] {
        let file = MemoryFile::new(Contents::default());
        let params = vhd::CreateParams {
            image_type: ImageType::Differencing,
            virtual_size: 9_000_448,
            block_size: Some(block),
            parent: parent.clone(),
        };
        vhd::create(&*file, &params).expect("a child can be made");
        seeds.extend(used(&format!("vhd-child-{block}"), Format::Vhd, &file.contents()));
    }
    for sector in [512, 4096] {
        let file = MemoryFile::new(Contents::default());
        let params = vhdx::CreateParams {
            image_type: ImageType::Differencing,
            virtual_size: 9 << 30,
            block_size: Some(1 << 20),
            logical_sector_size: sector,
            physical_sector_size: 4096,
            log_size: Some(1 << 20),
            parent: parent.clone(),
        };
        vhdx::create(&*file, &params).expect("a child can be made");
        seeds.extend(used(&format!("vhdx-child-{sector}"), Format::Vhdx, &file.contents()));
    }
    seeds
}

/// An image as it was made, with some content, with its user dead, and closed.
fn used(name: &str, format: Format, made: &Contents) -> Vec<Seed> {
    let file = MemoryFile::new(made.clone());
    let image =
        open::on_some_parent(format, &file, &LayerOptions::default()).expect("what was made can be opened");
    let geometry = image.geometry();
    let size = geometry.virtual_size;
    let step = size / 5 / 4096 * 4096;
    let fence = Fence::of_ours(format, &file);
    for n in 0..5 {
        let data = vec![n as u8 + 1; 4096];
        payload::write(&*image, n * step, &data, Until::Told, &fence).expect("it can be written");
    }
    let block = u64::from(geometry.block_size.max(4096));
    let at = formats::ByteSpan::new(step / block * block, block);
    payload::zero(&*image, at, ZeroMode::Unmap, true, &fence).expect("it can be zeroed");
    let dead = file.contents();
    image.maintain(&|| ()).expect("it can be maintained");
    let tended = file.contents();
    image.close().expect("it can be closed");
    let closed = file.contents();
    let states = [("made", made.clone()), ("dead", dead), ("tended", tended), ("closed", closed)];
    states.into_iter().flat_map(|(state, file)| encoded(&format!("{name}-{state}"), format, &file)).collect()
}

fn encoded(name: &str, format: Format, file: &Contents) -> Vec<Seed> {
    let mut important = metadata(file, format);
    important.extend(hot_places(file, format).into_iter().map(|at| (at, at + 1024)));
    let seed = |mend: Mend, choices: u8| {
        let mut input = Input::of_file(file, Input::flags(format, mend), &important, BUDGET);
        input.choices = choices;
        (format!("{name}-{mend:?}-{choices}").to_lowercase(), input.encode())
    };
    vec![seed(Mend::Nothing, 3), seed(Mend::Checksums, 0x16), seed(Mend::Log, 0x05)]
}

/// Seeds of the `open` target: the images of a folder and those below, packed or not.
///
/// # Errors
/// When a file cannot be read.
pub fn corpus(folder: &Path) -> std::io::Result<Vec<Seed>> {
    let mut seeds = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            seeds.extend(corpus(&path)?);
            continue;
        }
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let format = match name.trim_end_matches(".bz2").trim_end_matches(".gz") {
            n if n.ends_with(".vhd") || n.ends_with(".avhd") => Format::Vhd,
            n if n.ends_with(".vhdx") || n.ends_with(".avhdx") => Format::Vhdx,
            _ => continue,
        };
        let mut file = Contents::default();
        file.write(0, &unpacked(&path)?);
        seeds.extend(encoded(&name, format, &file));
    }
    Ok(seeds)
}

fn unpacked(path: &Path) -> std::io::Result<Vec<u8>> {
    let packed = std::fs::read(path)?;
    let mut image = Vec::new();
    match path.extension().and_then(|e| e.to_str()) {
        Some("bz2") => bzip2::read::BzDecoder::new(&packed[..]).read_to_end(&mut image)?,
        Some("gz") => flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut image)?,
        _ => return Ok(packed),
    };
    Ok(image)
}

/// Seeds of the `operations` target: each layout with a little of everything.
pub fn sessions() -> Vec<Seed> {
    (0..48_u8)
        .map(|n| {
            let mut bytes = vec![n % 16, n.wrapping_mul(37), n.wrapping_mul(11), n / 3];
            for step in 0..60_u8 {
                let mixed = step.wrapping_mul(73).wrapping_add(n.wrapping_mul(29));
                bytes.extend([
                    step.wrapping_mul(7).wrapping_add(n) % 32,
                    mixed,
                    mixed.rotate_left(3),
                    mixed ^ 0x5a,
                ]);
            }
            (format!("session-{n}"), bytes)
        })
        .collect()
}
