//! Paths as they go over the wire and as a move names its target.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use formats::{Format, format_by_name};

use crate::failure::Failure;

/// `path` made absolute, as text: the daemon has a working directory of its own.
///
/// # Errors
/// Wrong usage for a path that is not UTF-8, which JSON can't carry.
pub(crate) fn for_daemon(path: &Path) -> Result<String, Failure> {
    let absolute = std::path::absolute(path).map_err(|e| Failure::io(path.display(), &e))?;
    absolute.into_os_string().into_string().map_err(|name| {
        Failure::usage(format!(
            "{}: the name is not UTF-8, which the API can't carry; rename it",
            name.display()
        ))
    })
}

/// Whether two names lead to one file.
pub(crate) fn same_file(a: &Path, b: &Path) -> bool {
    let id = |path: &Path| std::fs::metadata(path).map(|m: Metadata| (m.dev(), m.ino())).ok();
    id(a).is_some_and(|a| id(b) == Some(a))
}

/// The folder that holds `path`.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Where the daemon keeps its notes on differencing images: in the state directory that `BLOCKD_STATE_DIR` names, else in
/// that of this user. `None` where there are none.
pub(crate) fn notes_dir() -> Option<PathBuf> {
    let named = |name| std::env::var_os(name).map(PathBuf::from).filter(|dir| dir.is_absolute());
    let usual = || {
        if nix::unistd::geteuid().is_root() {
            return Some(PathBuf::from("/var/lib/blockd"));
        }
        let base = named("XDG_STATE_HOME").or_else(|| Some(named("HOME")?.join(".local/state")));
        Some(base?.join("blockd"))
    };
    let state = named("BLOCKD_STATE_DIR").or_else(usual)?;
    Some(state.join("notes")).filter(|dir| dir.is_dir())
}

/// A move's target: its path and format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// The file that will be the disk.
    pub(crate) path: PathBuf,
    /// Its format.
    pub(crate) format: Format,
}

/// Where `source` goes. A folder keeps the name, with the format's ending where the format changes; the format is the
/// one asked for, else what the target's name says, else the source's.
///
/// # Errors
/// When the source's name is none.
pub(crate) fn target_of(
    source: &Path,
    source_format: Format,
    to: &Path,
    format: Option<Format>,
) -> Result<Target, Failure> {
    let names_a_folder = to.as_os_str().as_encoded_bytes().ends_with(b"/");
    if !to.is_dir() && !names_a_folder {
        let format = format.or_else(|| format_by_name(to)).unwrap_or(source_format);
        return Ok(Target { path: to.to_owned(), format });
    }
    if !to.is_dir() {
        return Err(Failure::new(
            "not-found",
            format!("{}: there is no such folder; create it first", to.display()),
        ));
    }
    let name = source
        .file_name()
        .ok_or_else(|| Failure::usage(format!("{}: this names no file", source.display())))?;
    let format = format.unwrap_or(source_format);
    if format == source_format {
        return Ok(Target { path: to.join(name), format });
    }
    // Only an ending that stands for a format gives way: `db.2024` becomes `db.2024.vhd`.
    let stem =
        if format_by_name(name).is_some() { Path::new(name).file_stem().unwrap_or(name) } else { name };
    let mut name = stem.to_owned();
    name.push(format!(".{format}"));
    Ok(Target { path: to.join(name), format })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_keeps_the_name_and_a_new_format_changes_the_ending() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let to = folder.path();
        let source = Path::new("/images/vm.vhdx");
        let kept = target_of(source, Format::Vhdx, to, None).expect("a target");
        assert_eq!(kept, Target { path: to.join("vm.vhdx"), format: Format::Vhdx });
        let changed = target_of(source, Format::Vhdx, to, Some(Format::Vhd)).expect("a target");
        assert_eq!(changed, Target { path: to.join("vm.vhd"), format: Format::Vhd });
        let dotted = target_of(Path::new("db.2024"), Format::Raw, to, Some(Format::Vhd)).expect("a target");
        assert_eq!(dotted.path, to.join("db.2024.vhd"));
    }

    #[test]
    fn a_file_takes_its_format_from_the_option_then_its_name_then_the_source() {
        let source = Path::new("a.vhdx");
        let format =
            |to: &str, format| target_of(source, Format::Vhdx, Path::new(to), format).map(|t| t.format);
        assert_eq!(format("b.vhd", None), Ok(Format::Vhd));
        assert_eq!(format("b.vhd", Some(Format::Raw)), Ok(Format::Raw));
        assert_eq!(format("b", None), Ok(Format::Vhdx));
    }

    #[test]
    fn a_folder_that_is_not_there_is_not_taken_for_a_file() {
        let missing = target_of(Path::new("a.vhdx"), Format::Vhdx, Path::new("/nowhere/at/all/"), None);
        assert_eq!(missing.map_err(|e| e.kind), Err("not-found".to_owned()));
    }
}
