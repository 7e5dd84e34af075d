//! A guest that is a host: it runs machines of its own, of `kvm-shim`, on a disk of a daemon of its own.
//!
//! QEMU emulates a processor with hardware virtualisation, so Linux on it has a KVM that behaves as on real hardware, and
//! stock Linux guests run on that. `guest/host.sh` is what the host does.

use std::path::Path;

use anyhow::Result;

use super::initramfs::Contents;
use super::{INIT, Setup, kernel};
use crate::daemon::binary;

const HOST_INIT: &str = include_str!("host.sh");

/// How a machine is given its kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Image {
    /// As it is distributed: it unpacks itself. Entered at its 64-bit entry.
    BzImage,
    /// The ELF file in it. Entered at its PVH entry.
    Elf,
}

/// How a machine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By the keyboard controller's reset.
    Reboot,
    /// By ACPI.
    PowerOff,
}

/// One machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Its processors, and the queues of its disk.
    pub cpus: u32,
    /// Its kernel.
    pub kernel: Image,
    /// Its end.
    pub end: End,
}

impl Machine {
    fn word(&self) -> String {
        let kernel = if self.kernel == Image::Elf { "vmlinux" } else { "bzImage" };
        let end = if self.end == End::Reboot { "reboot" } else { "poweroff" };
        format!("machine={},{kernel},{end}", self.cpus)
    }
}

/// What a host does: one machine after the other, each of which moves so often.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Moves of each machine.
    pub moves: u32,
    /// The machines.
    pub machines: Vec<Machine>,
}

impl Host {
    /// What the kernel's command line says of it.
    pub(super) fn words(&self) -> String {
        let machines: Vec<String> = self.machines.iter().map(Machine::word).collect();
        format!("moves={} {}", self.moves, machines.join(" "))
    }

    /// Packs its root into `path`.
    pub(super) fn pack(&self, setup: &Setup, path: &Path) -> Result<()> {
        let scratch = tempfile::tempdir()?;
        let machine = scratch.path().join("machine.cpio");
        let contents =
            Contents { init: INIT, modules: &["virtio_mmio", "virtio_blk"], programs: vec![], files: vec![] };
        setup.pack(&machine, &contents)?;
        let image = std::fs::read(&setup.kernel)?;
        let mut files = vec![("machine.cpio", std::fs::read(&machine)?)];
        if self.machines.iter().any(|machine| machine.kernel == Image::Elf) {
            files.push(("vmlinux", kernel::uncompressed(&image, scratch.path())?));
        }
        files.push(("bzImage", image));
        let programs = vec![
            binary("blockd", "BLOCKD_BIN")?,
            binary("blockctl", "BLOCKCTL_BIN")?,
            binary("kvm-shim", "KVM_SHIM")?,
        ];
        setup.pack(path, &Contents { init: HOST_INIT, modules: &["kvm_amd"], programs, files })
    }
}
