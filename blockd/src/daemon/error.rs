//! What the daemon answers when it can't do what it was asked.

use blockd_api::{ErrorBody, ErrorInfo};

use crate::disk::DiskError;

/// A stable word for a failure, as the control API has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// No such disk, job, file or route.
    NotFound,
    /// A name, socket or file that is taken.
    Exists,
    /// Something else is under way on the disk.
    Busy,
    /// The request makes no sense, whatever the state of the daemon.
    Invalid,
    /// Another process or disk holds the image or the state directory.
    Locked,
    /// No space is left.
    NoSpace,
    /// The image or a file of the state directory is damaged.
    Corrupt,
    /// The image asks for something that is not supported.
    Unsupported,
    /// The operating system refused.
    Io,
    /// The request makes sense, but not now.
    State,
    /// A bug of ours.
    Internal,
}

impl Kind {
    /// The word in [`ErrorInfo::kind`].
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotFound => "not-found",
            Self::Exists => "exists",
            Self::Busy => "busy",
            Self::Invalid => "invalid",
            Self::Locked => "locked",
            Self::NoSpace => "no-space",
            Self::Corrupt => "corrupt",
            Self::Unsupported => "unsupported",
            Self::Io => "io",
            Self::State => "state",
            Self::Internal => "internal",
        }
    }

    /// The HTTP status that goes with it.
    pub const fn http_status(self) -> u16 {
        match self {
            Self::NotFound => 404,
            Self::Exists | Self::Busy | Self::State | Self::Locked => 409,
            Self::Invalid => 400,
            Self::Corrupt | Self::Unsupported => 422,
            Self::NoSpace => 507,
            Self::Io | Self::Internal => 500,
        }
    }
}

/// A failed request: a kind to match on, and one sentence that names the thing, the reason and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct DaemonError {
    /// What to match on.
    pub kind: Kind,
    /// The sentence.
    pub message: String,
}

impl DaemonError {
    /// An error of `kind`.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// A request that makes no sense.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, message)
    }

    /// A failed operation of the operating system; "no space" is told apart.
    pub fn io(what: impl std::fmt::Display, source: &std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Kind::NoSpace,
            _ => Kind::Io,
        };
        Self::new(kind, format!("{what}: {source}"))
    }

    /// The part of it that goes into a [`blockd_api::Job`].
    pub fn info(&self) -> ErrorInfo {
        ErrorInfo { kind: self.kind.as_str().to_owned(), message: self.message.clone() }
    }

    /// The body of the answer.
    pub fn body(&self) -> ErrorBody {
        ErrorBody { error: self.info() }
    }
}

impl From<formats::ErrorKind> for Kind {
    fn from(kind: formats::ErrorKind) -> Self {
        use formats::ErrorKind as F;
        match kind {
            F::Io => Self::Io,
            F::NoSpace => Self::NoSpace,
            F::WrongFormat | F::OutOfRange | F::InvalidParameter => Self::Invalid,
            F::Corrupt | F::NeedsRepair => Self::Corrupt,
            F::Unsupported | F::Parent => Self::Unsupported,
            F::Locked => Self::Locked,
            F::ReadOnly | F::Poisoned => Self::State,
        }
    }
}

impl From<formats::CreateError> for DaemonError {
    fn from(e: formats::CreateError) -> Self {
        let exists = e.source.as_ref().is_some_and(|s| s.kind() == std::io::ErrorKind::AlreadyExists);
        Self::new(if exists { Kind::Exists } else { e.kind.into() }, e.to_string())
    }
}

impl From<DiskError> for DaemonError {
    fn from(e: DiskError) -> Self {
        Self::new(e.kind.into(), e.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kinds_of_an_image_map_to_the_statuses_of_the_api() {
        use formats::ErrorKind as F;
        for (kind, word, status) in [
            (F::Io, "io", 500),
            (F::NoSpace, "no-space", 507),
            (F::WrongFormat, "invalid", 400),
            (F::Corrupt, "corrupt", 422),
            (F::Unsupported, "unsupported", 422),
            (F::NeedsRepair, "corrupt", 422),
            (F::Parent, "unsupported", 422),
            (F::Locked, "locked", 409),
            (F::ReadOnly, "state", 409),
            (F::OutOfRange, "invalid", 400),
            (F::Poisoned, "state", 409),
            (F::InvalidParameter, "invalid", 400),
        ] {
            let kind = Kind::from(kind);
            assert_eq!((kind.as_str(), kind.http_status()), (word, status));
        }
    }

    #[test]
    fn a_full_file_system_is_told_apart_from_other_failures() {
        let full = std::io::Error::from_raw_os_error(libc::ENOSPC);
        assert_eq!(DaemonError::io("x", &full).kind, Kind::NoSpace);
        let broken = std::io::Error::from_raw_os_error(libc::EIO);
        assert_eq!(DaemonError::io("x", &broken).kind, Kind::Io);
    }
}
