//! From what a client asks of a move to the plan of it: which file, which format, which type.

use std::path::{Path, PathBuf};

use blockd_api::{FilePlace, MergeRequest, MoveRequest};
use formats::{Format, ImageType};
use mirror::{MirrorMode, OnTargetError, SwitchMode, Verify};

use super::error::{DaemonError, Kind};
use super::names;
use crate::mover::{Layering, Merge, MovePlan, ParentMove};

/// How much is compared before the switch.
const VERIFY: &[(&str, Verify)] =
    &[("none", Verify::None), ("sample", Verify::Sample), ("full", Verify::Full)];

/// What is asked for, in our words.
#[derive(Debug)]
pub(super) struct Wanted {
    to: PathBuf,
    /// Names are kept in a folder; several disks need one.
    to_folder: bool,
    format: Option<Format>,
    image_type: Option<ImageType>,
    block_size: Option<u32>,
    mirror: MirrorMode,
    switch: SwitchMode,
    verify: Verify,
    bandwidth: Option<u64>,
    max_guest_p99_us: Option<u64>,
    keep_source: bool,
    copy_only: bool,
    on_target_error: OnTargetError,
    flatten: bool,
    /// Single files and where they go.
    files: Vec<(PathBuf, PathBuf)>,
}

/// What a plan needs to know of the disk as it is.
#[derive(Debug, Clone)]
pub(super) struct SourceDisk {
    pub(super) id: String,
    pub(super) image: PathBuf,
    pub(super) format: Format,
    pub(super) image_type: ImageType,
    pub(super) generation: u64,
    /// Its parents, the nearest first.
    pub(super) parents: Vec<SourceParent>,
}

/// A parent of a disk's image.
#[derive(Debug, Clone)]
pub(super) struct SourceParent {
    pub(super) image: PathBuf,
    pub(super) image_type: ImageType,
    pub(super) block_size: u32,
}

impl Wanted {
    /// Reads a request, as far as that needs no disk.
    ///
    /// # Errors
    /// [`Kind::Invalid`], [`Kind::NotFound`] for a folder that is not there.
    pub(super) fn read(request: &MoveRequest) -> Result<Self, DaemonError> {
        let to = PathBuf::from(&request.to);
        names::check_absolute("the target", &to)?;
        let to_folder = to.is_dir();
        if !to_folder {
            check_new_file(&request.to, &to)?;
        }
        if request.disks.len() > 1 && !to_folder {
            return Err(DaemonError::invalid(format!(
                "{} disks can't become the one file {}; name an existing folder",
                request.disks.len(),
                request.to
            )));
        }
        Ok(Self {
            to,
            to_folder,
            format: request.format.as_deref().map(names::parse_format).transpose()?,
            image_type: request.image_type.as_deref().map(names::parse_type).transpose()?,
            block_size: request.block_size,
            mirror: word(
                "mirror",
                &request.mirror,
                &[("after-copy", MirrorMode::AfterCopy), ("from-start", MirrorMode::FromStart)],
            )?,
            switch: word(
                "switch",
                &request.switch,
                &[("auto", SwitchMode::Auto), ("manual", SwitchMode::Manual)],
            )?,
            verify: word("verify", &request.verify, VERIFY)?,
            bandwidth: request.bandwidth.filter(|&rate| rate > 0),
            max_guest_p99_us: request.max_guest_p99_us.filter(|&us| us > 0),
            keep_source: request.keep_source,
            copy_only: request.copy_only,
            flatten: request.flatten,
            files: read_files(&request.files)?,
            on_target_error: word(
                "on_target_error",
                &request.on_target_error,
                &[
                    ("pause", OnTargetError::Pause),
                    ("retry", OnTargetError::Retry),
                    ("abort", OnTargetError::Abort),
                ],
            )?,
        })
    }

    /// The plan for one disk.
    ///
    /// # Errors
    /// [`Kind::Exists`] when a target is there already, [`Kind::Invalid`] when the options do not go together.
    pub(super) fn plan(&self, source: &SourceDisk, job: &str) -> Result<MovePlan, DaemonError> {
        let format = self.target_format(source.format);
        let is_chain = !source.parents.is_empty() && !self.flatten;
        self.check_files(source, is_chain)?;
        let target = match self.place_of(&source.image, source.format, format)? {
            Some(place) => place,
            None if is_chain && !self.to_folder && self.files.is_empty() => {
                return Err(self.needs_folder(source));
            }
            None => self.target_path(source, format)?,
        };
        check_free(&source.image, &target)?;
        let image_type = if is_chain { ImageType::Differencing } else { self.target_type(source, format)? };
        self.check_block_size(format, image_type)?;
        let layering = if is_chain { self.chain(source, format, &target)? } else { Layering::Flat };
        Ok(MovePlan {
            job: job.to_owned(),
            disk: source.id.clone(),
            generation: source.generation,
            source: source.image.clone(),
            target,
            format,
            image_type,
            block_size: self.block_size,
            mirror: self.mirror,
            switch: self.switch,
            verify: self.verify,
            bandwidth: self.bandwidth,
            max_guest_p99_us: self.max_guest_p99_us,
            keep_source: self.keep_source,
            copy_only: self.copy_only,
            on_target_error: self.on_target_error,
            layering,
        })
    }

    /// Where each parent goes.
    fn chain(&self, source: &SourceDisk, format: Format, top: &Path) -> Result<Layering, DaemonError> {
        if format == Format::Raw {
            return Err(DaemonError::invalid(format!(
                "disk {} is a chain of {} images, and raw images have no parents; add --flatten, or choose vhd or vhdx",
                source.id,
                source.parents.len() + 1
            )));
        }
        let mut parents: Vec<ParentMove> = Vec::new();
        for parent in &source.parents {
            let place = self.place_of(&parent.image, source.format, format)?;
            let target = match place {
                Some(place) => place,
                None if self.to_folder => self.to.join(kept_name(&parent.image, source.format, format)?),
                None => return Err(self.needs_folder(source)),
            };
            let base_type = self.image_type.unwrap_or(parent.image_type);
            let parent_move = ParentMove {
                image_type: if parent.image_type == ImageType::Differencing {
                    parent.image_type
                } else {
                    base_type
                },
                block_size: self
                    .block_size
                    .or((format == source.format).then_some(parent.block_size))
                    .filter(|s| *s > 0),
                source: parent.image.clone(),
                target,
            };
            self.check_parent(source, &parent_move, &parents, format, top)?;
            parents.push(parent_move);
        }
        Ok(Layering::Chain(parents))
    }

    fn check_parent(
        &self,
        source: &SourceDisk,
        parent: &ParentMove,
        above: &[ParentMove],
        format: Format,
        top: &Path,
    ) -> Result<(), DaemonError> {
        let (from, to) = (parent.source.display(), parent.target.display());
        let same_name = |other: &Path| *other == parent.target;
        if same_name(top) || above.iter().any(|p| same_name(&p.target)) {
            return Err(DaemonError::invalid(format!(
                "two images of disk {} would both become {to}; say where {from} goes with --disk {from}=WHERE",
                source.id
            )));
        }
        if parent.stays() && format != source.format {
            return Err(DaemonError::invalid(format!(
                "{from} can't stay a {} image while its child becomes a {format} one",
                source.format
            )));
        }
        match above.last() {
            Some(child) if child.stays() && !parent.stays() => Err(DaemonError::invalid(format!(
                "{} stays where it is, so its parent {from} has to stay too: it is found where the child says",
                child.source.display()
            ))),
            _ if parent.stays() => Ok(()),
            _ => check_free(&parent.source, &parent.target),
        }
    }

    fn needs_folder(&self, source: &SourceDisk) -> DaemonError {
        DaemonError::invalid(format!(
            "disk {} is a chain of {} images, which can't all become {}; name an existing folder, say for each file \
             where it goes (--disk FILE=WHERE), or add --flatten",
            source.id,
            source.parents.len() + 1,
            self.to.display()
        ))
    }

    /// What was said of single files has to be about this disk.
    fn check_files(&self, source: &SourceDisk, is_chain: bool) -> Result<(), DaemonError> {
        if self.files.is_empty() {
            return Ok(());
        }
        if !is_chain && source.parents.is_empty() {
            return Err(DaemonError::invalid(format!(
                "disk {} is one image, so no single files of it can be placed; name its place with --to",
                source.id
            )));
        }
        if !is_chain {
            return Err(DaemonError::invalid(
                "with --flatten there is one new image; name its place with --to",
            ));
        }
        let is_part = |file: &Path| {
            same_file(file, &source.image) || source.parents.iter().any(|p| same_file(file, &p.image))
        };
        match self.files.iter().find(|(file, _)| !is_part(file)) {
            None => Ok(()),
            Some((file, _)) => Err(DaemonError::invalid(format!(
                "{} is no image of disk {}; `blockctl disk show {}` lists them",
                file.display(),
                source.id,
                source.id
            ))),
        }
    }

    /// Where this file goes, if that was said of it alone.
    fn place_of(&self, file: &Path, from: Format, format: Format) -> Result<Option<PathBuf>, DaemonError> {
        let Some((_, to)) = self.files.iter().find(|(named, _)| same_file(named, file)) else {
            return Ok(None);
        };
        if same_file(to, file) {
            return Ok(Some(file.to_owned()));
        }
        if to.is_dir() {
            return Ok(Some(to.join(kept_name(file, from, format)?)));
        }
        check_new_file(&to.to_string_lossy(), to)?;
        Ok(Some(to.clone()))
    }

    fn target_format(&self, source: Format) -> Format {
        let by_name = if self.to_folder { None } else { names::format_of_name(&self.to) };
        self.format.or(by_name).unwrap_or(source)
    }

    fn target_path(&self, source: &SourceDisk, format: Format) -> Result<PathBuf, DaemonError> {
        if !self.to_folder {
            return Ok(self.to.clone());
        }
        Ok(self.to.join(kept_name(&source.image, source.format, format)?))
    }

    fn target_type(&self, source: &SourceDisk, format: Format) -> Result<ImageType, DaemonError> {
        match (format, self.image_type, source.format, source.image_type) {
            (Format::Raw, Some(ImageType::Dynamic), ..) => Err(DaemonError::invalid(
                "a raw target can't be dynamic; leave the type away (it is sparse anyway), or choose vhd or vhdx",
            )),
            (Format::Raw, ..) => Ok(ImageType::Fixed),
            (_, Some(asked), ..) => Ok(asked),
            // A raw file says nothing of its type, and what it does not hold should take no space on the target; and a chain
            // becomes what grows as it did.
            (_, None, Format::Raw, _) | (_, None, _, ImageType::Differencing) => Ok(ImageType::Dynamic),
            (_, None, _, same) => Ok(same),
        }
    }

    fn check_block_size(&self, format: Format, image_type: ImageType) -> Result<(), DaemonError> {
        let Some(size) = self.block_size else { return Ok(()) };
        let fixed_vhd = format == Format::Vhd && image_type == ImageType::Fixed;
        if format == Format::Raw || fixed_vhd {
            return Err(DaemonError::invalid(format!(
                "a block size of {size} is asked for, and a {image_type} {format} image has no blocks; leave it away"
            )));
        }
        if !size.is_power_of_two() {
            return Err(DaemonError::invalid(format!("a block size of {size} is no power of two")));
        }
        Ok(())
    }
}

/// The plan of a merge.
///
/// # Errors
/// [`Kind::State`] for a disk without parents, [`Kind::Invalid`] when the target that is named is none of them.
pub(super) fn merge(source: &SourceDisk, job: &str, request: &MergeRequest) -> Result<MovePlan, DaemonError> {
    if source.parents.is_empty() {
        return Err(DaemonError::new(
            Kind::State,
            format!("disk {} is one image without a parent, so there is nothing to merge", source.id),
        ));
    }
    let into = request.into.as_deref().map(Path::new);
    let level = match into {
        None => Some(0),
        Some(into) => source.parents.iter().position(|p| same_file(&p.image, into)),
    };
    let Some(level) = level else {
        let into = into.unwrap_or(Path::new("")).display();
        return Err(DaemonError::invalid(format!(
            "{into} is no parent of disk {}; `blockctl disk show {}` lists them",
            source.id, source.id
        )));
    };
    let verify = word("verify", &request.verify, VERIFY)?;
    let images = |parents: &[SourceParent]| parents.iter().map(|p| p.image.clone()).collect::<Vec<_>>();
    Ok(MovePlan {
        job: job.to_owned(),
        disk: source.id.clone(),
        generation: source.generation,
        source: source.image.clone(),
        target: source.parents[level].image.clone(),
        format: source.format,
        image_type: source.parents[level].image_type,
        block_size: None,
        mirror: MirrorMode::AfterCopy,
        switch: SwitchMode::Auto,
        verify,
        bandwidth: request.bandwidth.filter(|&rate| rate > 0),
        max_guest_p99_us: request.max_guest_p99_us.filter(|&us| us > 0),
        keep_source: false,
        copy_only: false,
        on_target_error: OnTargetError::Pause,
        layering: Layering::Merge(Merge {
            between: images(&source.parents[..level]),
            below: images(&source.parents[level + 1..]),
        }),
    })
}

/// What was said of single files.
fn read_files(asked: &[FilePlace]) -> Result<Vec<(PathBuf, PathBuf)>, DaemonError> {
    let mut files: Vec<(PathBuf, PathBuf)> = Vec::new();
    for FilePlace { file, to } in asked {
        let (file, to) = (PathBuf::from(file), PathBuf::from(to));
        names::check_absolute("a file of the chain", &file)?;
        names::check_absolute("the place of a file", &to)?;
        if files.iter().any(|(other, _)| same_file(other, &file)) {
            return Err(DaemonError::invalid(format!("{} is given two places; give it one", file.display())));
        }
        files.push((file, to));
    }
    Ok(files)
}

/// The name of a file in another folder, with the ending of its new format.
fn kept_name(image: &Path, from: Format, to: Format) -> Result<PathBuf, DaemonError> {
    let name = image.file_name().ok_or_else(|| {
        DaemonError::new(Kind::Internal, format!("the image {} has no file name", image.display()))
    })?;
    let mut name = PathBuf::from(name);
    if to == from {
        return Ok(name);
    }
    if names::format_of_name(&name).is_some() {
        name.set_extension("");
    }
    let mut name = name.into_os_string();
    name.push(match to {
        Format::Raw => ".raw",
        Format::Vhd => ".vhd",
        Format::Vhdx => ".vhdx",
    });
    Ok(name.into())
}

/// A target that is a file: its folder is there, and its name is one.
fn check_new_file(asked: &str, to: &Path) -> Result<(), DaemonError> {
    if asked.ends_with('/') {
        return Err(DaemonError::new(
            Kind::NotFound,
            format!("there is no folder {asked}; create it, or name a file"),
        ));
    }
    if to.file_name().is_none() {
        return Err(DaemonError::invalid(format!(
            "{asked} names no file; give the path of one, or of a folder"
        )));
    }
    match to.parent() {
        Some(folder) if folder.is_dir() => Ok(()),
        _ => Err(DaemonError::new(
            Kind::NotFound,
            format!("the folder of {asked} is not there; create it first"),
        )),
    }
}

/// The target must not be there, not even as a dangling link: nothing is ever overwritten.
fn check_free(source: &Path, target: &Path) -> Result<(), DaemonError> {
    match target.symlink_metadata() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(DaemonError::io(format!("the target {} can't be looked at", target.display()), &e)),
        Ok(_) if same_file(source, target) => Err(DaemonError::new(
            Kind::Exists,
            format!("{} is the disk's image already; name another place", target.display()),
        )),
        Ok(_) => Err(DaemonError::new(
            Kind::Exists,
            format!(
                "{} exists, and nothing is overwritten; remove it or name another file",
                target.display()
            ),
        )),
    }
}

pub(super) fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (a.metadata(), b.metadata()) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => a == b,
    }
}

fn word<T: Copy>(option: &str, text: &str, words: &[(&str, T)]) -> Result<T, DaemonError> {
    if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
        return Ok(*value);
    }
    let known: Vec<_> = words.iter().map(|(word, _)| *word).collect();
    Err(DaemonError::invalid(format!("{option} can't be {text:?}; there are {}", known.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        dir: tempfile::TempDir,
        source: SourceDisk,
    }

    impl Bench {
        fn new(name: &str, format: Format, image_type: ImageType) -> Self {
            let dir = tempfile::tempdir().expect("a temporary directory");
            std::fs::create_dir(dir.path().join("to")).expect("made");
            let image = dir.path().join(name);
            std::fs::write(&image, "").expect("written");
            let source =
                SourceDisk { id: "a".into(), image, format, image_type, generation: 4, parents: Vec::new() };
            Self { dir, source }
        }

        fn plan(&self, to: &str, change: impl Fn(&mut MoveRequest)) -> Result<MovePlan, DaemonError> {
            let mut request = request(&self.dir.path().join(to));
            change(&mut request);
            Wanted::read(&request)?.plan(&self.source, "m1")
        }

        fn target(&self, to: &str, change: impl Fn(&mut MoveRequest)) -> (String, Format, ImageType) {
            let plan = self.plan(to, change).expect("a plan");
            let target = plan.target.strip_prefix(self.dir.path()).expect("below it");
            (target.to_str().expect("UTF-8").to_owned(), plan.format, plan.image_type)
        }
    }

    fn request(to: &Path) -> MoveRequest {
        let json = serde_json::json!({ "disks": ["a"], "to": to.to_str() });
        serde_json::from_value(json).expect("a request")
    }

    #[test]
    fn a_folder_keeps_the_name_and_a_conversion_changes_its_ending() {
        let b = Bench::new("web.vhdx", Format::Vhdx, ImageType::Dynamic);
        assert_eq!(b.target("to", |_| ()), ("to/web.vhdx".into(), Format::Vhdx, ImageType::Dynamic));
        assert_eq!(b.target("to/", |_| ()).0, "to/web.vhdx");
        let to_vhd = |r: &mut MoveRequest| r.format = Some("vhd".into());
        assert_eq!(b.target("to", to_vhd), ("to/web.vhd".into(), Format::Vhd, ImageType::Dynamic));
        let to_raw = |r: &mut MoveRequest| r.format = Some("raw".into());
        assert_eq!(b.target("to", to_raw), ("to/web.raw".into(), Format::Raw, ImageType::Fixed));

        let odd = Bench::new("web.v1.disk", Format::Raw, ImageType::Fixed);
        assert_eq!(odd.target("to", |_| ()).0, "to/web.v1.disk");
        assert_eq!(odd.target("to", to_vhd), ("to/web.v1.disk.vhd".into(), Format::Vhd, ImageType::Dynamic));
    }

    #[test]
    fn a_files_name_says_the_format_unless_the_request_does() {
        let b = Bench::new("web.vhdx", Format::Vhdx, ImageType::Fixed);
        assert_eq!(b.target("new.vhd", |_| ()), ("new.vhd".into(), Format::Vhd, ImageType::Fixed));
        assert_eq!(b.target("new", |_| ()), ("new".into(), Format::Vhdx, ImageType::Fixed));
        let both =
            |r: &mut MoveRequest| (r.format, r.image_type) = (Some("vhdx".into()), Some("dynamic".into()));
        assert_eq!(b.target("new.img", both), ("new.img".into(), Format::Vhdx, ImageType::Dynamic));
    }

    #[test]
    fn nothing_is_overwritten_and_a_disk_is_not_moved_onto_itself() {
        let b = Bench::new("web.vhdx", Format::Vhdx, ImageType::Dynamic);
        let e = b.plan("web.vhdx", |_| ()).expect_err("refused");
        assert!(e.kind == Kind::Exists && e.message.contains("already"), "{e}");
        let e = b.plan("", |_| ()).expect_err("its own folder");
        assert!(e.kind == Kind::Exists && e.message.contains("already"), "{e}");
        std::os::unix::fs::symlink("/nonexistent", b.dir.path().join("to/web.vhdx")).expect("linked");
        let e = b.plan("to", |_| ()).expect_err("refused");
        assert!(e.kind == Kind::Exists && e.message.contains("overwritten"), "{e}");
    }

    #[test]
    fn targets_without_a_folder_are_not_found() {
        let b = Bench::new("web.vhdx", Format::Vhdx, ImageType::Dynamic);
        for to in ["absent/", "absent/new.vhdx", "web.vhdx/new.vhdx"] {
            assert_eq!(b.plan(to, |_| ()).expect_err("refused").kind, Kind::NotFound, "{to}");
        }
        let e = b.plan("", |r| r.to = "to/new.vhdx".into()).expect_err("relative");
        assert!(e.kind == Kind::Invalid && e.message.contains("absolute"), "{e}");
        let e = b.plan("new", |r| r.disks = vec!["a".into(), "b".into()]).expect_err("two disks, one file");
        assert!(e.kind == Kind::Invalid && e.message.contains("folder"), "{e}");
    }

    #[test]
    fn options_that_do_not_go_together_are_invalid() {
        let b = Bench::new("web.vhdx", Format::Vhdx, ImageType::Dynamic);
        let refuse = |change: &dyn Fn(&mut MoveRequest)| {
            let e = b.plan("to", change).expect_err("refused");
            assert_eq!(e.kind, Kind::Invalid, "{e}");
        };
        refuse(&|r| (r.format, r.image_type) = (Some("raw".into()), Some("dynamic".into())));
        refuse(&|r| (r.format, r.block_size) = (Some("raw".into()), Some(1 << 20)));
        refuse(&|r| {
            (r.format, r.image_type, r.block_size) = (Some("vhd".into()), Some("fixed".into()), Some(1 << 20))
        });
        refuse(&|r| r.block_size = Some(3 << 20));
        refuse(&|r| r.image_type = Some("differencing".into()));
        refuse(&|r| r.files = vec![place("/a", "/b")]);
        refuse(&|r| r.mirror = "sometimes".into());
        refuse(&|r| r.switch = "".into());
        refuse(&|r| r.verify = "most".into());
        refuse(&|r| r.on_target_error = "panic".into());
        assert_eq!(b.plan("to", |r| r.bandwidth = Some(0)).expect("a plan").bandwidth, None);
        assert_eq!(b.plan("to", |r| r.max_guest_p99_us = Some(0)).expect("a plan").max_guest_p99_us, None);
    }

    #[test]
    fn a_latency_budget_is_kept_in_the_journal_and_was_not_in_older_ones() {
        let b = Bench::new("web.vhdx", Format::Vhdx, ImageType::Dynamic);
        let plan = b.plan("to", |r| r.max_guest_p99_us = Some(5_000)).expect("a plan");
        assert_eq!(plan.max_guest_p99_us, Some(5_000));
        let mut json = serde_json::to_value(&plan).expect("plain data");
        assert_eq!(serde_json::from_value::<MovePlan>(json.clone()).expect("the same"), plan);
        json.as_object_mut().expect("fields").remove("max_guest_p99_us");
        assert_eq!(serde_json::from_value::<MovePlan>(json).expect("an older one").max_guest_p99_us, None);
    }

    fn place(file: impl AsRef<Path>, to: impl AsRef<Path>) -> FilePlace {
        let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
        FilePlace { file: text(file.as_ref()), to: text(to.as_ref()) }
    }

    /// `top.avhdx` on `mid.avhdx` on `base.vhdx`.
    fn chain() -> Bench {
        let mut b = Bench::new("top.avhdx", Format::Vhdx, ImageType::Differencing);
        for (name, image_type) in [("mid.avhdx", ImageType::Differencing), ("base.vhdx", ImageType::Fixed)] {
            let image = b.dir.path().join(name);
            std::fs::write(&image, "").expect("written");
            b.source.parents.push(SourceParent { image, image_type, block_size: 2 << 20 });
        }
        b
    }

    fn parents(b: &Bench, plan: &MovePlan) -> Vec<(String, ImageType, Option<u32>)> {
        let Layering::Chain(parents) = &plan.layering else { panic!("no chain: {plan:?}") };
        let seen = |p: &ParentMove| {
            let target = p.target.strip_prefix(b.dir.path()).expect("below it").to_str().expect("UTF-8");
            (target.to_owned(), p.image_type, p.block_size)
        };
        parents.iter().map(seen).collect()
    }

    #[test]
    fn the_images_of_a_chain_keep_their_names_types_and_blocks_in_a_folder() {
        let b = chain();
        let plan = b.plan("to", |_| ()).expect("a plan");
        assert_eq!((plan.image_type, plan.target.ends_with("to/top.avhdx")), (ImageType::Differencing, true));
        let blocks = Some(2 << 20);
        let expected = [
            ("to/mid.avhdx".to_owned(), ImageType::Differencing, blocks),
            ("to/base.vhdx".to_owned(), ImageType::Fixed, blocks),
        ];
        assert_eq!(parents(&b, &plan), expected);
        let plan = b.plan("to", |r| (r.format, r.image_type) = (Some("vhd".into()), Some("dynamic".into())));
        let expected = [
            ("to/mid.vhd".to_owned(), ImageType::Differencing, None),
            ("to/base.vhd".to_owned(), ImageType::Dynamic, None),
        ];
        assert_eq!(parents(&b, &plan.expect("a plan")), expected);
    }

    #[test]
    fn a_file_of_a_chain_goes_where_it_is_told_or_stays() {
        let b = chain();
        let at = |name: &str| b.dir.path().join(name);
        let plan = b.plan("to", |r| {
            r.files = vec![place(at("top.avhdx"), at("new.vhdx")), place(at("base.vhdx"), at("base.vhdx"))];
        });
        let plan = plan.expect("a plan");
        assert!(plan.target.ends_with("new.vhdx"));
        assert_eq!(parents(&b, &plan)[1].0, "base.vhdx");
        assert_eq!(plan.made_files().len(), 2, "the base is not made anew");
        assert_eq!(plan.source_files(), [at("top.avhdx"), at("mid.avhdx")], "nor deleted");
        let refuse = |change: &dyn Fn(&mut MoveRequest), word: &str| {
            let e = b.plan("to", change).expect_err("refused");
            assert!(e.kind == Kind::Invalid && e.message.contains(word), "{e}");
        };
        refuse(&|r| r.files = vec![place(at("mid.avhdx"), at("mid.avhdx"))], "stay too");
        refuse(&|r| r.files = vec![place(at("base.vhdx"), at("to/top.avhdx"))], "both");
        refuse(&|r| r.files = vec![place("/other", at("to"))], "no image of disk");
        refuse(&|r| r.to = at("new.vhdx").to_str().expect("UTF-8").into(), "folder");
        refuse(&|r| r.format = Some("raw".into()), "flatten");
        refuse(
            &|r| (r.format, r.files) = (Some("vhd".into()), vec![place(at("base.vhdx"), at("base.vhdx"))]),
            "stay",
        );
    }

    #[test]
    fn a_flattened_chain_is_one_dynamic_image_unless_told_otherwise() {
        let b = chain();
        let plan = b.plan("flat.vhdx", |r| r.flatten = true).expect("a plan");
        assert_eq!((plan.image_type, &plan.layering), (ImageType::Dynamic, &Layering::Flat));
        let plan = b.plan("flat.raw", |r| r.flatten = true).expect("a plan");
        assert_eq!(plan.format, Format::Raw);
        assert_eq!(plan.source_files().len(), 1, "the parents may be other disks' as well");
    }
}
