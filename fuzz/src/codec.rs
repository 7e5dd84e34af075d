//! The verbs of the codecs under one name each, with a bound on the time they take.

use std::sync::Arc;

use formats::raw::{self, Raw};
use formats::vhd::{self, Vhd};
use formats::vhdx::{self, Vhdx};
use formats::{
    Chain, CheckReport, CompactOutcome, Format, Geometry, Image, ImageError, Layer, LayerOptions,
    NewParentLink, Severity, Storage,
};
use nix::time::{ClockId, clock_gettime};

use crate::storage::MemoryFile;

/// No call may take more time of a processor than this, in seconds, whatever the file says. The fuzzer's instrumentation
/// makes everything a few times slower than it is.
const SECONDS_MAX: f64 = 4.0;
/// Nor may it do more reads than this,
const READS_MAX: u64 = 4 << 20;
/// or read more bytes.
const READ_BYTES_MAX: u64 = 4 << 30;

fn processor_seconds() -> f64 {
    let now = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("there is such a clock");
    now.tv_sec() as f64 + now.tv_nsec() as f64 / 1e9
}

/// Does `call`, which may work on `file`, and demands that it takes little.
///
/// # Panics
/// When it takes more.
pub(crate) fn bounded<T>(what: &str, file: &MemoryFile, call: impl FnOnce() -> T) -> T {
    let (began, before) = (processor_seconds(), file.work());
    let result = call();
    let (took, after) = (processor_seconds() - began, file.work());
    assert!(took < SECONDS_MAX, "{what} took {took:.1} seconds");
    let (reads, bytes) = (after.reads - before.reads, after.read_bytes - before.read_bytes);
    assert!(reads < READS_MAX, "{what} did {reads} reads");
    assert!(bytes < READ_BYTES_MAX, "{what} read {bytes} bytes");
    result
}

pub(crate) fn open(
    format: Format,
    file: &Arc<MemoryFile>,
    read_only: bool,
    recover: bool,
) -> Result<Arc<dyn Image>, ImageError> {
    let storage: Arc<dyn Storage> = file.clone();
    bounded("opening", file, || {
        Ok(match format {
            Format::Raw => Arc::new(Raw::open(storage, read_only)?) as Arc<dyn Image>,
            Format::Vhd => Arc::new(Vhd::open(storage, read_only, recover)?),
            Format::Vhdx => Arc::new(Vhdx::open(storage, read_only)?),
        })
    })
}

/// Opens one layer of a chain; a raw image is none.
pub(crate) fn open_layer(
    format: Format,
    file: &Arc<MemoryFile>,
    options: &LayerOptions,
) -> Result<Arc<dyn Layer>, ImageError> {
    let storage: Arc<dyn Storage> = file.clone();
    bounded("opening a layer", file, || {
        Ok(match format {
            Format::Raw => panic!("a raw image is no layer"),
            Format::Vhd => Arc::new(Vhd::open_layer(storage, options)?) as Arc<dyn Layer>,
            Format::Vhdx => Arc::new(Vhdx::open_layer(storage, options)?),
        })
    })
}

/// Opens an image with its parents, the nearest first, which are opened for reading.
pub(crate) fn open_chain(
    format: Format,
    files: &[Arc<MemoryFile>],
    options: &LayerOptions,
) -> Result<Arc<dyn Image>, ImageError> {
    let [top, parents @ ..] = files else { panic!("there is no image") };
    if parents.is_empty() {
        return open(format, top, options.read_only, options.recover);
    }
    let read_only = LayerOptions { read_only: true, ..LayerOptions::default() };
    let top = open_layer(format, top, options)?;
    let parents = parents.iter().map(|file| Ok(open_layer(format, file, &read_only)? as Arc<dyn Image>));
    let parents = parents.collect::<Result<Vec<_>, ImageError>>().expect("a parent that never changes opens");
    Ok(Arc::new(Chain::new(top, parents)?))
}

pub(crate) fn resize(
    format: Format,
    file: &Arc<MemoryFile>,
    size: u64,
    shrink: bool,
) -> Result<(), ImageError> {
    let storage: Arc<dyn Storage> = file.clone();
    bounded("resizing", file, || match format {
        Format::Raw => raw::resize(&*storage, size, shrink),
        Format::Vhd => vhd::resize(&storage, size, shrink),
        Format::Vhdx => vhdx::resize(&storage, size, shrink),
    })
}

pub(crate) fn compact(format: Format, file: &Arc<MemoryFile>) -> Result<CompactOutcome, ImageError> {
    let storage: Arc<dyn Storage> = file.clone();
    bounded("compacting", file, || match format {
        Format::Raw => raw::compact(&*storage, &mut |_, _| ()),
        Format::Vhd => vhd::compact(&storage, &mut |_, _| ()),
        Format::Vhdx => vhdx::compact(&storage, &mut |_, _| ()),
    })
}

pub(crate) fn relink(format: Format, file: &Arc<MemoryFile>, link: &NewParentLink) -> Result<(), ImageError> {
    let storage: Arc<dyn Storage> = file.clone();
    bounded("relinking", file, || match format {
        Format::Raw => panic!("a raw image has no parent"),
        Format::Vhd => vhd::relink(&*storage, link),
        Format::Vhdx => vhdx::relink(&storage, link),
    })
}

pub(crate) fn check(format: Format, file: &Arc<MemoryFile>, repair: bool) -> Result<CheckReport, ImageError> {
    bounded("checking", file, || match format {
        Format::Raw => raw::check(&**file),
        Format::Vhd => vhd::check(&**file, repair),
        Format::Vhdx => vhdx::check(file.clone(), repair),
    })
}

/// What the codec says of an image without opening it: size of the disk and of its blocks.
pub(crate) fn inspect(format: Format, file: &Arc<MemoryFile>) -> Result<(u64, u32), ImageError> {
    let storage: Arc<dyn Storage> = file.clone();
    bounded("inspecting", file, || {
        Ok(match format {
            Format::Raw => (file.len().unwrap_or_default() / 512 * 512, 0),
            Format::Vhd => vhd::inspect(&*storage).map(|info| (info.virtual_size, info.block_size))?,
            Format::Vhdx => {
                let Geometry { virtual_size, block_size, .. } = vhdx::inspect(&storage)?.geometry;
                (virtual_size, block_size)
            }
        })
    })
}

/// Codes of what is damaged, and was not mended.
pub(crate) fn damage(report: &CheckReport) -> Vec<&str> {
    let left = report.findings.iter().filter(|f| f.severity == Severity::Damage && !f.repaired);
    left.map(|f| f.code.as_str()).collect()
}
