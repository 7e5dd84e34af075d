//! From a format's name to its codec.

use std::sync::Arc;

use crate::raw::{self, Raw};
use crate::vhd::{self, Vhd};
use crate::vhdx::{self, Vhdx};
use crate::{CheckReport, CreateOptions, ErrorKind, Format, Image, ImageError, ImageType, Storage};

/// Opens what is in `storage`.
pub(crate) fn open(
    format: Format,
    storage: Arc<dyn Storage>,
    read_only: bool,
    recover: bool,
) -> Result<Arc<dyn Image>, ImageError> {
    Ok(match format {
        Format::Raw => Arc::new(Raw::open(storage, read_only)?),
        Format::Vhd => Arc::new(Vhd::open(storage, read_only, recover)?),
        Format::Vhdx => Arc::new(Vhdx::open(storage, read_only)?),
    })
}

/// Makes an image in an empty `storage`.
pub(crate) fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<(), ImageError> {
    if options.format != Format::Vhdx && options.logical_sector_size != 512 {
        return Err(ImageError::new(
            ErrorKind::InvalidParameter,
            format!(
                "a {} image has sectors of 512 bytes, not {}; VHDX has both",
                options.format, options.logical_sector_size
            ),
        ));
    }
    match options.format {
        Format::Raw => create_raw(storage, options),
        Format::Vhd => vhd::create(
            storage,
            &vhd::CreateParams {
                image_type: options.image_type,
                virtual_size: options.virtual_size,
                block_size: options.block_size,
                parent: None,
            },
        ),
        Format::Vhdx => vhdx::create(
            storage,
            &vhdx::CreateParams {
                image_type: options.image_type,
                virtual_size: options.virtual_size,
                block_size: options.block_size,
                logical_sector_size: options.logical_sector_size,
                physical_sector_size: 4096,
                log_size: None,
                parent: None,
            },
        ),
    }
}

fn create_raw(storage: &dyn Storage, options: &CreateOptions) -> Result<(), ImageError> {
    let wrong = if options.image_type == ImageType::Differencing {
        "a raw image cannot be differencing"
    } else if options.block_size.is_some() {
        "a raw image has no blocks, so no block size can be given"
    } else {
        return raw::create(storage, options.virtual_size);
    };
    Err(ImageError::new(ErrorKind::InvalidParameter, wrong))
}

/// Checks, and repairs, what is in `storage`.
pub(crate) fn check(
    format: Format,
    storage: Arc<dyn Storage>,
    repair: bool,
) -> Result<CheckReport, ImageError> {
    match format {
        Format::Raw => raw::check(&*storage),
        Format::Vhd => vhd::check(&*storage, repair),
        Format::Vhdx => vhdx::check(storage, repair),
    }
}
