//! What a disk may be asked to be: identifiers, paths and counts, whoever says them (API, configuration, state).

use std::path::Path;

use formats::{Format, ImageType};

use super::error::DaemonError;
use crate::disk::DiskSpec;

/// Longest identifier of a disk, in bytes.
pub const DISK_ID_MAX: usize = 64;
/// Most queues of a disk.
pub const QUEUES_MAX: u16 = 64;
/// The highest generation that may be asked for: nobody counts that far, and everybody can count on from there.
pub const GENERATION_MAX: u64 = 1 << 53;
/// Longest path of a Unix socket, in bytes: `sun_path` less its terminating zero.
pub const SOCKET_PATH_MAX: usize = 107;

/// Checks the name of a disk: 1 to [`DISK_ID_MAX`] of letters, digits, `-`, `_` and `.`, beginning with a letter or
/// digit.
///
/// # Errors
/// [`super::error::Kind::Invalid`].
pub fn check_disk_id(id: &str) -> Result<(), DaemonError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    let first = id.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
    if first && id.len() <= DISK_ID_MAX && id.bytes().all(allowed) {
        return Ok(());
    }
    Err(DaemonError::invalid(format!(
        "{id:?} can't be the name of a disk: it takes 1 to {DISK_ID_MAX} letters, digits, '-', '_' and '.', and begins with a letter or digit"
    )))
}

/// Checks that a path is absolute and can be handed to the operating system.
///
/// # Errors
/// [`super::error::Kind::Invalid`].
pub fn check_absolute(what: &str, path: &Path) -> Result<(), DaemonError> {
    if path.as_os_str().is_empty() {
        return Err(DaemonError::invalid(format!("{what} is empty; give an absolute path")));
    }
    if !path.is_absolute() {
        return Err(DaemonError::invalid(format!(
            "{what} {} is not an absolute path; the daemon has no current folder of yours, so give the whole path",
            path.display()
        )));
    }
    if path.as_os_str().as_encoded_bytes().contains(&0) || path.to_str().is_none() {
        return Err(DaemonError::invalid(format!(
            "{what} {path:?} holds a zero byte or is not UTF-8; rename it"
        )));
    }
    Ok(())
}

/// Checks the path of a socket to listen on.
///
/// # Errors
/// [`super::error::Kind::Invalid`].
pub fn check_socket(what: &str, path: &Path) -> Result<(), DaemonError> {
    check_absolute(what, path)?;
    let len = path.as_os_str().len();
    if len > SOCKET_PATH_MAX {
        return Err(DaemonError::invalid(format!(
            "{what} {} is {len} bytes long, and the path of a Unix socket takes at most {SOCKET_PATH_MAX}; choose a shorter one",
            path.display()
        )));
    }
    Ok(())
}

/// Checks all that can be checked of a disk without opening anything.
///
/// # Errors
/// [`super::error::Kind::Invalid`].
pub fn check_spec(spec: &DiskSpec) -> Result<(), DaemonError> {
    check_disk_id(&spec.id)?;
    check_absolute("the image", &spec.image)?;
    check_socket("the socket", &spec.socket)?;
    spec.parents.iter().try_for_each(|path| check_absolute("the parents' place", path))?;
    if !(1..=QUEUES_MAX).contains(&spec.queues) {
        return Err(DaemonError::invalid(format!(
            "disk {}: {} queues are asked for; a disk has 1 to {QUEUES_MAX}",
            spec.id, spec.queues
        )));
    }
    if !(1..=spec.queues).contains(&spec.io_threads) {
        return Err(DaemonError::invalid(format!(
            "disk {}: {} I/O threads are asked for; a disk of {} queues has 1 to {}",
            spec.id, spec.io_threads, spec.queues, spec.queues
        )));
    }
    Ok(())
}

/// Reads the name of a format.
///
/// # Errors
/// [`super::error::Kind::Invalid`].
pub fn parse_format(text: &str) -> Result<Format, DaemonError> {
    match text {
        "raw" => Ok(Format::Raw),
        "vhd" => Ok(Format::Vhd),
        "vhdx" => Ok(Format::Vhdx),
        _ => {
            Err(DaemonError::invalid(format!("{text:?} is no format of images; there are raw, vhd and vhdx")))
        }
    }
}

/// Reads the name of an image type that a target may have.
///
/// # Errors
/// [`super::error::Kind::Invalid`].
pub fn parse_type(text: &str) -> Result<ImageType, DaemonError> {
    match text {
        "dynamic" => Ok(ImageType::Dynamic),
        "fixed" => Ok(ImageType::Fixed),
        _ => {
            Err(DaemonError::invalid(format!("{text:?} is no type of a target; there are dynamic and fixed")))
        }
    }
}

/// The format that a file's name says, if it says one.
pub fn format_of_name(path: &Path) -> Option<Format> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    match extension.as_str() {
        "raw" | "img" => Some(Format::Raw),
        "vhd" | "avhd" => Some(Format::Vhd),
        "vhdx" | "avhdx" => Some(Format::Vhdx),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_disks_are_short_and_harmless_as_file_names() {
        for good in ["a", "0", "vm-1_root.disk", &"x".repeat(64)] {
            assert!(check_disk_id(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", ".a", "-a", "_a", "a/b", "a b", "ä", "a\0", "a\n", &"x".repeat(65)] {
            assert!(check_disk_id(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_disk_is_refused_with_the_value_and_the_range() {
        let good = DiskSpec {
            id: "a".into(),
            image: "/a.vhdx".into(),
            socket: "/a.sock".into(),
            format: None,
            queues: 64,
            io_threads: 64,
            read_only: true,
            parents: Vec::new(),
        };
        assert_eq!(check_spec(&good), Ok(()));
        let message = |change: &dyn Fn(&mut DiskSpec)| {
            let mut spec = good.clone();
            change(&mut spec);
            check_spec(&spec).expect_err("refused").message
        };
        assert!(message(&|s| s.queues = 0).contains("1 to 64"));
        assert!(message(&|s| s.parents = vec!["bases".into()]).contains("absolute"));
        assert!(message(&|s| s.queues = 65).contains("65 queues"));
        assert!(message(&|s| s.io_threads = 65).contains("1 to 64"));
        assert!(message(&|s| (s.queues, s.io_threads) = (2, 3)).contains("1 to 2"));
        assert!(message(&|s| s.io_threads = 0).contains("0 I/O threads"));
        assert!(message(&|s| s.image = "a.vhdx".into()).contains("absolute"));
        assert!(message(&|s| s.image = "".into()).contains("absolute"));
        assert!(message(&|s| s.socket = "s".into()).contains("absolute"));
        assert!(message(&|s| s.socket = format!("/{}", "s".repeat(107)).into()).contains("107"));
    }

    #[test]
    fn the_format_is_read_from_the_name_whatever_its_case() {
        for (name, format) in [
            ("/a.VHDX", Some(Format::Vhdx)),
            ("/a.avhdx", Some(Format::Vhdx)),
            ("/a.vhd", Some(Format::Vhd)),
            ("/a.img", Some(Format::Raw)),
            ("/a.qcow2", None),
            ("/vhdx", None),
        ] {
            assert_eq!(format_of_name(Path::new(name)), format, "{name}");
        }
    }
}
