//! Errors by phase: creating, opening, using an image.

use std::io;
use std::path::PathBuf;

/// What a caller may want to match on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The operating system refused.
    Io,
    /// No space is left on the file system (`ENOSPC`, `EDQUOT`, `EFBIG`).
    NoSpace,
    /// The file is not an image of the format that was asked for, or its format is not said.
    WrongFormat,
    /// The image breaks a rule of its specification.
    Corrupt,
    /// The image is sound, but asks for something that is not supported.
    Unsupported,
    /// The image needs a repair before it can be written.
    NeedsRepair,
    /// The image's parent was not found, or not allowed.
    Parent,
    /// Another process holds the image open.
    Locked,
    /// A write to an image that was opened for reading.
    ReadOnly,
    /// A span beyond the disk's end or off the sector grid.
    OutOfRange,
    /// An earlier failure of a metadata write has made the image unusable for writing.
    Poisoned,
    /// Parameters that do not go together.
    InvalidParameter,
}

/// Why an image could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{}: {message}", path.display())]
pub struct OpenError {
    /// The file.
    pub path: PathBuf,
    /// What to match on.
    pub kind: ErrorKind,
    /// The structure, the field, the value, the allowed range, and what to do.
    pub message: String,
    /// What the operating system said.
    #[source]
    pub source: Option<io::Error>,
}

/// Why an image could not be created.
#[derive(Debug, thiserror::Error)]
#[error("{}: {message}", path.display())]
pub struct CreateError {
    /// The file.
    pub path: PathBuf,
    /// What to match on.
    pub kind: ErrorKind,
    /// What is wrong and what to do.
    pub message: String,
    /// What the operating system said.
    #[source]
    pub source: Option<io::Error>,
}

/// Why an open image could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ImageError {
    /// What to match on.
    pub kind: ErrorKind,
    /// What happened, with the structure and the offset.
    pub message: String,
    /// What the operating system said.
    #[source]
    pub source: Option<io::Error>,
}

impl ImageError {
    /// An error of `kind`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// A failed operation on the file; "no space" is told apart.
    pub fn io(what: impl std::fmt::Display, source: io::Error) -> Self {
        let kind = kind_of(&source);
        Self { kind, message: format!("{what}: {source}"), source: Some(source) }
    }
}

/// Tells "no space" from the rest.
pub(crate) fn kind_of(e: &io::Error) -> ErrorKind {
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            ErrorKind::NoSpace
        }
        _ => ErrorKind::Io,
    }
}
