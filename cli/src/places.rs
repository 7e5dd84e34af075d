//! Where each file of a chain goes, and as what: the rules that the daemon has for the chains that it serves.

use std::path::{Component, Path, PathBuf};

use formats::{Format, ImageType, NewParentLink, format_by_name};
use uuid::Uuid;

use crate::failure::Failure;
use crate::moving::Options;
use crate::offline::format_named;
use crate::paths::{folder_of, same_file, target_of};

/// A file of the chain as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SourceFile {
    /// Where.
    pub(crate) path: PathBuf,
    /// Differencing but for the base.
    pub(crate) image_type: ImageType,
    /// In bytes; 0 where there are no blocks.
    pub(crate) block_size: u32,
}

/// What becomes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// Where it is.
    pub(crate) source: PathBuf,
    /// Where it goes; the file itself where it stays.
    pub(crate) target: PathBuf,
    /// The new image's type; differencing but for the base.
    pub(crate) image_type: ImageType,
    /// The new image's block size in bytes; its format's own when absent.
    pub(crate) block_size: Option<u32>,
    /// Whether it is left where it is.
    pub(crate) stays: bool,
}

/// The format and the places of a chain's files, the newest first, as `options` say.
///
/// # Errors
/// Wrong usage when the options do not go together or with the chain; `not-found` for a folder that is not there; `exists`
/// when the newest image is to become itself.
pub(crate) fn of_chain(
    files: &[SourceFile],
    from: Format,
    options: &Options,
) -> Result<(Format, Vec<Place>), Failure> {
    assert!(files.len() > 1, "a chain has parents");
    let rules = Rules { files, from, options, format: format_of(from, options) };
    if rules.format == Format::Raw {
        return Err(Failure::usage(format!(
            "{} is a chain of {} images, and raw images have no parents; add --flatten, or choose vhd or vhdx",
            rules.name(),
            files.len()
        )));
    }
    check_files(files, options)?;
    let mut places: Vec<Place> = Vec::new();
    for (level, file) in files.iter().enumerate() {
        let place = rules.place(level, file)?;
        rules.check(&place, &places)?;
        places.push(place);
    }
    Ok((rules.format, places))
}

/// What was said of single files has to be about this image, and each has one place.
///
/// # Errors
/// Wrong usage.
pub(crate) fn check_files(files: &[SourceFile], options: &Options) -> Result<(), Failure> {
    let name = files[0].path.display();
    let Some((first, _)) = options.files.first() else { return Ok(()) };
    if options.flatten {
        return Err(Failure::usage("with --flatten there is one new image; name its place with --to"));
    }
    if files.len() == 1 {
        return Err(Failure::usage(format!(
            "{name} is one image, so no single files of it (such as {}) can be placed; name its place with --to",
            first.display()
        )));
    }
    for (at, (file, _)) in options.files.iter().enumerate() {
        if !files.iter().any(|own| same_file(&own.path, file)) {
            return Err(Failure::usage(format!(
                "{} is no image of the chain of {name}; `blockctl image info {name} --parents DIR` lists them",
                file.display()
            )));
        }
        if options.files[..at].iter().any(|(other, _)| same_file(other, file)) {
            return Err(Failure::usage(format!("{} is given two places; give it one", file.display())));
        }
    }
    Ok(())
}

/// The format that is asked for, else what the target's name says, else the source's.
fn format_of(from: Format, options: &Options) -> Format {
    let asked = options.format.as_deref().and_then(format_named);
    let by_name = if options.to.is_dir() { None } else { format_by_name(&options.to) };
    asked.or(by_name).unwrap_or(from)
}

struct Rules<'a> {
    files: &'a [SourceFile],
    from: Format,
    options: &'a Options,
    format: Format,
}

impl Rules<'_> {
    fn name(&self) -> String {
        self.files[0].path.display().to_string()
    }

    fn place(&self, level: usize, file: &SourceFile) -> Result<Place, Failure> {
        let named = self.options.files.iter().find(|(named, _)| same_file(named, &file.path));
        let target = match named {
            Some((_, to)) => self.named_target(file, to)?,
            // With other files placed one by one, --to may be the newest image's own.
            None if self.options.to.is_dir() || (level == 0 && !self.options.files.is_empty()) => {
                target_of(&file.path, self.from, &self.options.to, Some(self.format))?.path
            }
            None => return Err(self.needs_folder()),
        };
        let stays = real_name(&target)? == real_name(&file.path)?;
        if stays && level == 0 {
            let message = format!("{}: is already there; name another place", file.path.display());
            return Err(Failure::new("exists", message));
        }
        Ok(Place {
            image_type: match file.image_type {
                ImageType::Differencing => ImageType::Differencing,
                own => self.options.image_type.as_deref().map_or(own, type_named),
            },
            block_size: None,
            source: file.path.clone(),
            target,
            stays,
        }
        .with_blocks(self, file))
    }

    fn named_target(&self, file: &SourceFile, to: &Path) -> Result<PathBuf, Failure> {
        if same_file(to, &file.path) {
            return Ok(file.path.clone());
        }
        let target = target_of(&file.path, self.from, to, Some(self.format))?.path;
        match format_by_name(&target) {
            Some(said) if said != self.format && self.options.format.is_none() => {
                Err(Failure::usage(format!(
                    "{} would be a {} image under the name of a {said} one; choose another name, or add --format {said}",
                    target.display(),
                    self.format
                )))
            }
            _ => Ok(target),
        }
    }

    fn needs_folder(&self) -> Failure {
        let to = &self.options.to;
        if to.as_os_str().as_encoded_bytes().ends_with(b"/") {
            let message = format!("{}: there is no such folder; create it first", to.display());
            return Failure::new("not-found", message);
        }
        Failure::usage(format!(
            "{} is a chain of {} images, which can't all become {}; name an existing folder, say for each file where it \
             goes (--disk FILE=WHERE), or add --flatten",
            self.name(),
            self.files.len(),
            to.display()
        ))
    }

    fn check(&self, place: &Place, above: &[Place]) -> Result<(), Failure> {
        let (from, to) = (place.source.display(), place.target.display());
        let real = real_name(&place.target)?;
        for other in above {
            if real_name(&other.target)? == real {
                return Err(Failure::usage(format!(
                    "two images of {} would both become {to}; say where {from} goes with --disk {from}=WHERE",
                    self.name()
                )));
            }
        }
        if place.stays && self.format != self.from {
            return Err(Failure::usage(format!(
                "{from} can't stay a {} image while its child becomes a {} one",
                self.from, self.format
            )));
        }
        match above.last() {
            Some(child) if child.stays && !place.stays => Err(Failure::usage(format!(
                "{} stays where it is, so its parent {from} has to stay too: it is found where the child says; add --disk \
                 {from}={from}",
                child.source.display()
            ))),
            _ => Ok(()),
        }
    }
}

impl Place {
    fn with_blocks(mut self, rules: &Rules<'_>, file: &SourceFile) -> Self {
        let own = Some(file.block_size).filter(|_| rules.format == rules.from);
        let has_blocks = rules.format == Format::Vhdx || self.image_type != ImageType::Fixed;
        let asked = rules.options.block_size.or(own);
        self.block_size = asked.filter(|size| has_blocks && *size > 0);
        self
    }
}

/// A type by its name, which the parser of the arguments has checked.
pub(crate) fn type_named(name: &str) -> ImageType {
    match name {
        "fixed" => ImageType::Fixed,
        _ => ImageType::Dynamic,
    }
}

/// The absolute path of a file that need not be there, with no link in its folder's.
///
/// # Errors
/// `not-found` when its folder is not there.
pub(crate) fn real_name(path: &Path) -> Result<PathBuf, Failure> {
    let folder = folder_of(path);
    let real = std::fs::canonicalize(folder).map_err(|e| Failure::io(folder.display(), &e))?;
    let name =
        path.file_name().ok_or_else(|| Failure::usage(format!("{}: this names no file", path.display())))?;
    Ok(real.join(name))
}

/// What the image that will be at `child` is to say of its parent, which has this id and will be at `parent`.
///
/// # Errors
/// Wrong usage for names that an image can't hold.
pub(crate) fn link_to(parent: &Path, id: Uuid, child: &Path) -> Result<NewParentLink, Failure> {
    let (parent, child) = (real_name(parent)?, real_name(child)?);
    let text = |path: &Path| match path.to_str() {
        Some(text) if !text.contains('\\') => Ok(text.to_owned()),
        _ => Err(Failure::usage(format!(
            "{}: an image can't name a parent with a backslash in its path, or a path that is not UTF-8; choose another",
            path.display()
        ))),
    };
    let absolute = text(&parent)?;
    let relative = text(&way(folder_of(&child), &parent))?;
    Ok(NewParentLink { id, next_id: None, relative: Some(relative), absolute })
}

/// The way from the folder `from` to `to`, both absolute and without links.
fn way(from: &Path, to: &Path) -> PathBuf {
    let shared = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(shared).map(|_| Component::ParentDir);
    up.chain(to.components().skip(shared)).collect()
}
