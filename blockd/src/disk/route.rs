//! Where guest requests go: one image, or two while a move is under way.

use std::sync::Arc;

use crate::mover::shared::MoveShared;

use super::handle::ImageHandle;

/// What a worker does with guest requests. Swapped as a whole; a request uses the route that it saw when it was taken
/// to its end.
#[derive(Debug)]
pub enum Route {
    /// Everything goes to one image.
    Single(Arc<ImageHandle>),
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
            Self::Single(image) | Self::Tracked(image, _) | Self::Mirrored { source: image, .. } => image,
        }
    }

    /// The second image, where there is one.
    pub fn target(&self) -> Option<&Arc<ImageHandle>> {
        match self {
            Self::Mirrored { target, .. } => Some(target),
            _ => None,
        }
    }
}
