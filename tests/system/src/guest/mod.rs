//! A real Linux guest: Debian's kernel in QEMU's system emulator, with a disk on a vhost-user socket.
//!
//! `.ci/guest-setup` fetches kernel, busybox and QEMU into a folder; [`Setup::find`] reads what it left there. The guest's
//! root is an initramfs that [`initramfs`] packs; its init script (`guest/init.sh`) does the job that the kernel's
//! command line names, and says on the serial console how far it is, in lines that begin with `GUEST:`.
//!
//! A guest may also be a host of machines of its own ([`host`]), on the KVM of the processor that QEMU emulates.

mod host;
mod initramfs;
mod kernel;
mod qemu;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use initramfs::Contents;

pub use host::{End, Host, Image, Machine};
pub use qemu::{Guest, GuestOptions};

const INIT: &str = include_str!("init.sh");

/// Where things are that a guest needs.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The system emulator.
    pub qemu: PathBuf,
    /// Folders of its libraries, as in LD_LIBRARY_PATH; empty when they are installed.
    pub qemu_lib: String,
    /// Folders of its firmware; none when they are installed.
    pub qemu_share: Vec<String>,
    /// The kernel.
    pub kernel: PathBuf,
    /// Its modules.
    pub modules: PathBuf,
    /// A static busybox.
    pub busybox: PathBuf,
}

impl Setup {
    /// Reads what `.ci/guest-setup` left in `$BLOCKD_GUEST_DIR`, else in the cache folder.
    pub fn find() -> Result<Self> {
        let dir = Self::dir().context("neither BLOCKD_GUEST_DIR nor HOME is set")?;
        let file = dir.join("guest.env");
        let text = std::fs::read_to_string(&file)
            .with_context(|| format!("{} is not there: run .ci/guest-setup", file.display()))?;
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            line.with_context(|| format!("{} has no {name}: run .ci/guest-setup --force", file.display()))
        };
        let setup = Self {
            qemu: value("QEMU")?.into(),
            qemu_lib: value("QEMU_LIB")?.into(),
            qemu_share: value("QEMU_SHARE")?.split(':').filter(|s| !s.is_empty()).map(Into::into).collect(),
            kernel: value("KERNEL")?.into(),
            modules: value("MODULES")?.into(),
            busybox: value("BUSYBOX")?.into(),
        };
        for path in [&setup.qemu, &setup.kernel, &setup.modules, &setup.busybox] {
            path.metadata().with_context(|| format!("{}: run .ci/guest-setup --force", path.display()))?;
        }
        Ok(setup)
    }

    fn dir() -> Option<PathBuf> {
        if let Some(dir) = std::env::var_os("BLOCKD_GUEST_DIR") {
            return Some(dir.into());
        }
        let cache = std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()).map(PathBuf::from);
        Some(
            cache
                .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?
                .join("blockd-guest"),
        )
    }

    /// As [`Setup::find`]; says loudly on standard error why a test can't run.
    pub fn find_or_skip(test: &str) -> Option<Self> {
        match Self::find() {
            Ok(setup) => Some(setup),
            Err(error) => {
                eprintln!("SKIPPED: {test}: {error:#}");
                None
            }
        }
    }

    /// Packs the guest's root into `path`.
    pub fn pack_initramfs(&self, path: &Path) -> Result<()> {
        let programs = ["mkfs.ext4", "e2fsck"].map(|name| initramfs::installed(name, "e2fsprogs"));
        self.pack(
            path,
            &Contents {
                init: INIT,
                modules: &["virtio_pci", "virtio_blk"],
                programs: programs.into_iter().collect::<Result<_>>()?,
                files: Vec::new(),
            },
        )
    }

    fn pack(&self, path: &Path, contents: &Contents<'_>) -> Result<()> {
        let archive = initramfs::pack(self, contents)?;
        std::fs::write(path, archive).with_context(|| format!("write {}", path.display()))
    }
}
