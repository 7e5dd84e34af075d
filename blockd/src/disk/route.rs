//! Where guest requests go: one image, or two under a move, or none for a moment.

use std::sync::Arc;

use crate::mover::shared::MoveShared;

use super::handle::ImageHandle;

/// What a worker does with guest requests. Swapped as a whole; a request uses the route that it saw when it was taken
/// to its end.
#[derive(Debug)]
pub enum Route {
    /// Everything goes to one image.
    Single(Arc<ImageHandle>),
    /// Nothing goes anywhere: requests wait for another route. What was the image, and may be again.
    Held(Arc<ImageHandle>),
    /// The image was lost while it was exchanged: every request fails.
    Failed(Arc<ImageHandle>),
    /// A snapshot was just made: everything goes to the new image, and flushes to its parent as well, which may still
    /// hold acknowledged writes that are not durable.
    Settling {
        /// The new image.
        image: Arc<ImageHandle>,
        /// What was the image before.
        parent: Arc<ImageHandle>,
    },
    /// Everything goes to the source; what a write touched is marked when it ends.
    Tracked(Arc<ImageHandle>, Arc<MoveShared>),
    /// Reads go to the source, writes where the move says.
    Mirrored {
        /// What is read.
        source: Arc<ImageHandle>,
        /// What becomes the disk.
        target: Arc<ImageHandle>,
        /// Decides for each write.
        moving: Arc<MoveShared>,
    },
}

impl Route {
    /// The image that reads come from.
    pub fn source(&self) -> &Arc<ImageHandle> {
        match self {
            Self::Single(image)
            | Self::Held(image)
            | Self::Failed(image)
            | Self::Settling { image, .. }
            | Self::Tracked(image, _)
            | Self::Mirrored { source: image, .. } => image,
        }
    }

    /// The second image that writes may go to, where there is one.
    pub fn target(&self) -> Option<&Arc<ImageHandle>> {
        match self {
            Self::Mirrored { target, .. } => Some(target),
            _ => None,
        }
    }

    /// The second image that may hold what a flush has to make durable.
    pub fn flushed_too(&self) -> Option<&Arc<ImageHandle>> {
        match self {
            Self::Settling { parent, .. } => Some(parent),
            Self::Mirrored { target, .. } => Some(target),
            _ => None,
        }
    }
}
