//! The images that are copied: what they hold can't be compressed, and copies of them are proven.

use std::ops::{ControlFlow, Range};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use formats::OpenOptions;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::interrupt;
use crate::size::MIB;

/// Writes random bytes to these ranges of the virtual disk, which are of whole MiB, and makes them durable.
///
/// # Errors
/// When the image can't be opened or written, and on a signal.
pub fn fill(image: &Path, ranges: &[Range<u64>], seed: u64) -> Result<()> {
    let failed = || format!("fill {}", image.display());
    let opened = formats::open(image, &OpenOptions::default()).with_context(failed)?;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut piece = vec![0; MIB as usize];
    for range in ranges {
        for offset in range.clone().step_by(piece.len()) {
            interrupt::check()?;
            random.fill_bytes(&mut piece);
            formats::write_payload(&*opened, offset, &piece).with_context(failed)?;
        }
    }
    opened.commit().with_context(failed)?;
    opened.close().with_context(failed)
}

/// Fails unless both images have the same size and content, and the copy is sound by the rules of its format.
///
/// # Errors
/// Where they differ, what is damaged, and when one of them can't be read.
pub fn prove_equal(source: &Path, copy: &Path) -> Result<()> {
    let report = formats::check(copy, None, false).with_context(|| format!("check {}", copy.display()))?;
    ensure!(report.is_sound(), "WRONG: {} is damaged: {:?}", copy.display(), report.findings);
    let open = |path: &Path| {
        formats::open(path, &OpenOptions::read_only()).with_context(|| format!("open {}", path.display()))
    };
    let go_on = &mut |_| if interrupt::is_set() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    let found = formats::compare(&*open(source)?, &*open(copy)?, go_on);
    let found = found.with_context(|| format!("compare {} with its source", copy.display()))?;
    ensure!(
        found.sizes.0 == found.sizes.1,
        "WRONG: {}: {} bytes became {}",
        copy.display(),
        found.sizes.0,
        found.sizes.1
    );
    if let Some(offset) = found.first_difference {
        bail!("WRONG: {} differs from its source at byte {offset} of the disk", copy.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use formats::{CreateOptions, Format};

    use super::*;

    #[test]
    fn a_copy_that_lacks_a_byte_is_no_copy() {
        let dir = tempfile::tempdir().unwrap();
        let [source, copy] = ["source.vhdx", "copy.vhdx"].map(|name| dir.path().join(name));
        for image in [&source, &copy] {
            formats::create(image, &CreateOptions::new(Format::Vhdx, 8 * MIB)).unwrap();
            fill(image, &[0..MIB, 5 * MIB..6 * MIB], 7).unwrap();
        }
        prove_equal(&source, &copy).unwrap();
        let opened = formats::open(&copy, &OpenOptions::default()).unwrap();
        formats::zero_payload(&*opened, 5 * MIB + 4096, 512).unwrap();
        opened.close().unwrap();
        drop(opened);
        let error = prove_equal(&source, &copy).unwrap_err().to_string();
        assert!(error.contains("WRONG") && error.contains(&(5 * MIB + 4096).to_string()), "{error}");
    }
}
