//! From a format's name to its codec.

use std::sync::Arc;

use uuid::Uuid;

use crate::raw;
use crate::vhd::{self, Vhd};
use crate::vhdx::{self, Vhdx};
use crate::{
    CheckReport, CompactOutcome, CreateOptions, ErrorKind, Format, ImageError, ImageType, Layer,
    LayerOptions, NewParentLink, Storage,
};

/// Opens what is in `storage` by itself, as one layer; a raw image is none.
pub(crate) fn open_layer(
    format: Format,
    storage: Arc<dyn Storage>,
    options: &LayerOptions,
) -> Result<Arc<dyn Layer>, ImageError> {
    Ok(match format {
        Format::Raw => {
            let message = "a raw image has no parent and is none: convert it to VHDX or VHD";
            return Err(ImageError::new(ErrorKind::Unsupported, message));
        }
        Format::Vhd => Arc::new(Vhd::open_layer(storage, options)?),
        Format::Vhdx => Arc::new(Vhdx::open_layer(storage, options)?),
    })
}

/// Makes an image in an empty `storage`, on `parent` if it is to have one.
pub(crate) fn create(
    storage: &dyn Storage,
    options: &CreateOptions,
    physical_sector_size: u32,
    parent: Option<NewParentLink>,
) -> Result<(), ImageError> {
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
                parent,
            },
        ),
        Format::Vhdx => vhdx::create(
            storage,
            &vhdx::CreateParams {
                image_type: options.image_type,
                virtual_size: options.virtual_size,
                block_size: options.block_size,
                logical_sector_size: options.logical_sector_size,
                physical_sector_size,
                log_size: None,
                parent,
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

/// Changes the size of the disk in `storage`.
pub(crate) fn resize(
    format: Format,
    storage: &Arc<dyn Storage>,
    new_size: u64,
    shrink: bool,
) -> Result<(), ImageError> {
    match format {
        Format::Raw => raw::resize(&**storage, new_size, shrink),
        Format::Vhd => vhd::resize(storage, new_size, shrink),
        Format::Vhdx => vhdx::resize(storage, new_size, shrink),
    }
}

/// Makes the disk in `storage` larger; its content has this id then, where a format changes it with the content.
pub(crate) fn grow_as(
    format: Format,
    storage: &Arc<dyn Storage>,
    new_size: u64,
    content_id: Uuid,
) -> Result<(), ImageError> {
    match format {
        Format::Vhdx => vhdx::grow_as(storage, new_size, content_id),
        Format::Raw | Format::Vhd => resize(format, storage, new_size, false),
    }
}

/// Gives back the space that the image in `storage` wastes.
pub(crate) fn compact(
    format: Format,
    storage: &Arc<dyn Storage>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CompactOutcome, ImageError> {
    match format {
        Format::Raw => raw::compact(&**storage, progress),
        Format::Vhd => vhd::compact(storage, progress),
        Format::Vhdx => vhdx::compact(storage, progress),
    }
}

/// Has the differencing image in `storage` name another parent.
pub(crate) fn relink(
    format: Format,
    storage: &Arc<dyn Storage>,
    link: &NewParentLink,
) -> Result<(), ImageError> {
    match format {
        Format::Raw => Err(ImageError::new(ErrorKind::InvalidParameter, "a raw image has no parent")),
        Format::Vhd => vhd::relink(&**storage, link),
        Format::Vhdx => vhdx::relink(storage, link),
    }
}
