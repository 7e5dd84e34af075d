//! How a command fails: one sentence, a stable word to match on, and an exit code.

use std::fmt;

use blockd_api::{ErrorBody, ErrorInfo};
use formats::{CreateError, ErrorKind, ImageError, OpenError};

/// What the process ends with. The numbers are fixed: scripts hold on to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// It is done.
    Done = 0,
    /// It failed.
    Failed = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// Somebody has cancelled it.
    Cancelled = 3,
    /// Images differ, or one is damaged.
    Different = 4,
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command could not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// What the process ends with.
    pub(crate) exit: Exit,
    /// A stable word to match on; the daemon's where the daemon said it.
    pub(crate) kind: String,
    /// One sentence that names the thing, the reason and what to do.
    pub(crate) message: String,
}

impl Failure {
    /// A failure of the given kind; damage has its own exit code.
    pub(crate) fn new(kind: &str, message: impl Into<String>) -> Self {
        let exit = match kind {
            "corrupt" | "different" => Exit::Different,
            "cancelled" => Exit::Cancelled,
            "usage" => Exit::Usage,
            _ => Exit::Failed,
        };
        Self { exit, kind: kind.to_owned(), message: message.into() }
    }

    /// The command line makes no sense.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new("usage", message)
    }

    /// Somebody pressed ^C, or cancelled the job.
    pub(crate) fn cancelled(message: impl Into<String>) -> Self {
        Self::new("cancelled", message)
    }

    /// Whoever read standard output has seen enough: an end without a word, but one that lets go of everything.
    pub(crate) fn reader_gone() -> Self {
        Self { exit: Exit::Done, kind: "broken-pipe".into(), message: String::new() }
    }

    /// A failed system call on `what`.
    pub(crate) fn io(what: impl fmt::Display, error: &std::io::Error) -> Self {
        Self::new(word_of_io(error), format!("{what}: {error}"))
    }

    /// The body that `--json` prints.
    pub(crate) fn body(&self) -> ErrorBody {
        ErrorBody { error: ErrorInfo { kind: self.kind.clone(), message: self.message.clone() } }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<ErrorInfo> for Failure {
    fn from(error: ErrorInfo) -> Self {
        Self::new(&error.kind, error.message)
    }
}

impl From<OpenError> for Failure {
    fn from(e: OpenError) -> Self {
        Self::new(word_of(e.kind, e.source.as_ref()), e.to_string())
    }
}

impl From<CreateError> for Failure {
    fn from(e: CreateError) -> Self {
        Self::new(word_of(e.kind, e.source.as_ref()), e.to_string())
    }
}

impl From<ImageError> for Failure {
    fn from(e: ImageError) -> Self {
        Self::new(word_of(e.kind, e.source.as_ref()), e.to_string())
    }
}

/// The API's word for what went wrong with an image, so that scripts match on one set of words.
fn word_of(kind: ErrorKind, source: Option<&std::io::Error>) -> &'static str {
    match kind {
        ErrorKind::Io => source.map_or("io", word_of_io),
        ErrorKind::NoSpace => "no-space",
        ErrorKind::Corrupt | ErrorKind::NeedsRepair => "corrupt",
        ErrorKind::Unsupported | ErrorKind::Parent => "unsupported",
        ErrorKind::Locked => "locked",
        ErrorKind::ReadOnly | ErrorKind::Poisoned => "state",
        ErrorKind::WrongFormat | ErrorKind::OutOfRange | ErrorKind::InvalidParameter => "invalid",
    }
}

fn word_of_io(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::NotFound => "not-found",
        std::io::ErrorKind::AlreadyExists => "exists",
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => "no-space",
        _ => "io",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_ends_with_four_and_cancelling_with_three() {
        assert_eq!(Failure::new("corrupt", "x").exit as u8, 4);
        assert_eq!(Failure::cancelled("x").exit as u8, 3);
        assert_eq!(Failure::usage("x").exit as u8, 2);
        assert_eq!(Failure::new("not-found", "x").exit as u8, 1);
    }

    #[test]
    fn an_image_that_is_not_there_is_not_found_rather_than_an_io_error() {
        let source = std::io::Error::from(std::io::ErrorKind::NotFound);
        assert_eq!(Failure::from(ImageError::io("a.vhdx", source)).kind, "not-found");
    }
}
