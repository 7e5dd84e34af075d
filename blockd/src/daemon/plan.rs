//! From what a client asks of a move to the plan of it: which file, which format, which type.

use std::path::{Path, PathBuf};

use blockd_api::MoveRequest;
use formats::{Format, ImageType};
use mirror::{MirrorMode, OnTargetError, SwitchMode, Verify};

use super::error::{DaemonError, Kind};
use super::names;
use crate::mover::MovePlan;

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
    keep_source: bool,
    copy_only: bool,
    on_target_error: OnTargetError,
}

/// What a plan needs to know of the disk as it is.
#[derive(Debug, Clone)]
pub(super) struct SourceDisk {
    pub(super) id: String,
    pub(super) image: PathBuf,
    pub(super) format: Format,
    pub(super) image_type: ImageType,
    pub(super) generation: u64,
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
            verify: word(
                "verify",
                &request.verify,
                &[("none", Verify::None), ("sample", Verify::Sample), ("full", Verify::Full)],
            )?,
            bandwidth: request.bandwidth.filter(|&rate| rate > 0),
            keep_source: request.keep_source,
            copy_only: request.copy_only,
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
    /// [`Kind::Exists`] when the target is there already, [`Kind::Invalid`] when the options do not go together,
    /// [`Kind::Unsupported`] for an image that can't be moved yet.
    pub(super) fn plan(&self, source: &SourceDisk, job: &str) -> Result<MovePlan, DaemonError> {
        let format = self.target_format(source.format);
        let target = self.target_path(source, format)?;
        check_free(&source.image, &target)?;
        let image_type = self.target_type(source, format)?;
        self.check_block_size(format, image_type)?;
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
            keep_source: self.keep_source,
            copy_only: self.copy_only,
            on_target_error: self.on_target_error,
        })
    }

    fn target_format(&self, source: Format) -> Format {
        let by_name = if self.to_folder { None } else { names::format_of_name(&self.to) };
        self.format.or(by_name).unwrap_or(source)
    }

    fn target_path(&self, source: &SourceDisk, format: Format) -> Result<PathBuf, DaemonError> {
        if !self.to_folder {
            return Ok(self.to.clone());
        }
        let name = source.image.file_name().ok_or_else(|| {
            DaemonError::new(Kind::Internal, format!("the image {} has no file name", source.image.display()))
        })?;
        if format == source.format {
            return Ok(self.to.join(name));
        }
        let mut name = PathBuf::from(name);
        if names::format_of_name(&name).is_some() {
            name.set_extension("");
        }
        let mut name = name.into_os_string();
        name.push(match format {
            Format::Raw => ".raw",
            Format::Vhd => ".vhd",
            Format::Vhdx => ".vhdx",
        });
        Ok(self.to.join(name))
    }

    fn target_type(&self, source: &SourceDisk, format: Format) -> Result<ImageType, DaemonError> {
        match (format, self.image_type, source.format, source.image_type) {
            (_, _, _, ImageType::Differencing) => Err(DaemonError::new(
                Kind::Unsupported,
                format!(
                    "disk {} has a parent image, and chains can't be moved yet; merge it first",
                    source.id
                ),
            )),
            (Format::Raw, Some(ImageType::Dynamic), ..) => Err(DaemonError::invalid(
                "a raw target can't be dynamic; leave the type away (it is sparse anyway), or choose vhd or vhdx",
            )),
            (Format::Raw, ..) => Ok(ImageType::Fixed),
            (_, Some(asked), ..) => Ok(asked),
            // A raw file says nothing of its type, and what it does not hold should take no space on the target.
            (_, None, Format::Raw, _) => Ok(ImageType::Dynamic),
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

fn same_file(a: &Path, b: &Path) -> bool {
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
            let source = SourceDisk { id: "a".into(), image, format, image_type, generation: 4 };
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
        refuse(&|r| r.mirror = "sometimes".into());
        refuse(&|r| r.switch = "".into());
        refuse(&|r| r.verify = "most".into());
        refuse(&|r| r.on_target_error = "panic".into());
        assert_eq!(b.plan("to", |r| r.bandwidth = Some(0)).expect("a plan").bandwidth, None);
        let chain = Bench::new("web.avhdx", Format::Vhdx, ImageType::Differencing);
        assert_eq!(chain.plan("to", |_| ()).expect_err("refused").kind, Kind::Unsupported);
    }
}
