//! The verbs of the codecs under one name each, with a bound on the time they take.

use std::sync::Arc;

use formats::raw::{self, Raw};
use formats::vhd::{self, Vhd};
use formats::vhdx::{self, Vhdx};
use formats::{CheckReport, Format, Geometry, Image, ImageError, Severity, Storage};
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
