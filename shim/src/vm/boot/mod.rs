//! Linux kernels: bzImage by the 64-bit boot protocol (Documentation/arch/x86/boot.rst), ELF with a PVH note by that of Xen
//! (docs/misc/pvh.pandoc there), ELF without one at its 64-bit entry.
//!
//! Processors, interrupt lines and devices are told by ACPI tables ([`acpi`]), and for kernels that are built without ACPI by
//! an MP table ([`tables`]) and the kernel's command line.

mod acpi;
mod tables;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{BzImage, KernelLoader, KernelLoaderResult, load_cmdline};
use vm_memory::{Bytes, GuestAddress};

use crate::device::{FIRST_IRQ, MMIO_BYTES, MMIO_START};
use crate::memory::{GuestRam, Memory};

/// Where things are put in the guest's memory. All below 640 KiB, where real hardware has memory too.
mod place {
    pub const GDT: u64 = 0x500;
    pub const START_INFO: u64 = 0x6000;
    pub const MODULES: u64 = 0x6100;
    pub const MEMORY_MAP: u64 = 0x6200;
    pub const ZERO_PAGE: u64 = 0x7000;
    pub const STACK: u64 = 0x8ff0;
    pub const PML4: u64 = 0x9000;
    pub const PDPT: u64 = 0xa000;
    pub const PD: u64 = 0xb000;
    pub const CMDLINE: u64 = 0x20000;
    /// The last KiB below 640 KiB, where the MP table is searched.
    pub const MP_TABLE: u64 = 0x9fc00;
    /// Where firmware would be, and where the root of the ACPI tables is searched.
    pub const ACPI: u64 = 0xe_0000;
    pub const HIGH_MEMORY: u64 = 0x10_0000;
}

/// Most bytes of a command line that kernels take.
const CMDLINE_MAX: usize = 2048;
/// Where an initial RAM disk must end for kernels that do not say.
const INITRD_MAX: u64 = 0x37ff_ffff;
/// Type of memory in the maps that kernels are given.
const MAP_RAM: u32 = 1;
/// What begins a PVH start info.
const START_MAGIC: u32 = 0x336e_c578;
/// Bit of xloadflags: the kernel has a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// How far behind its start a bzImage has its 64-bit entry.
const ENTRY_64: u64 = 0x200;

/// What to boot.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// bzImage or ELF.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line; what the devices need is added.
    pub cmdline: String,
}

/// How the first processor begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    address: u64,
    /// PVH: 32-bit, no paging. Else 64-bit.
    pvh: bool,
}

/// Puts a kernel and all it needs into the memory of a machine with `vcpus` processors and `devices` virtio-mmio devices.
///
/// # Errors
/// If a file can't be read, is no kernel, or does not fit.
pub fn load(ram: &GuestRam, kernel: &Kernel, vcpus: u32, devices: usize) -> Result<Entry> {
    let memory = ram.memory();
    let path = &kernel.kernel;
    let mut file = File::open(path).with_context(|| format!("open the kernel {}", path.display()))?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic).with_context(|| format!("read the kernel {}", path.display()))?;
    file.seek(SeekFrom::Start(0))?;
    let is_elf = magic == *b"\x7fELF";
    let loaded = if is_elf {
        Elf::load(memory, None, &mut file, Some(GuestAddress(place::HIGH_MEMORY)))
    } else {
        BzImage::load(memory, None, &mut file, Some(GuestAddress(place::HIGH_MEMORY)))
    }
    .with_context(|| {
        format!("load {}: it is no bzImage or ELF kernel, or larger than the memory", path.display())
    })?;
    let header = loaded.setup_header.unwrap_or_default();
    if !is_elf {
        ensure!(
            header.version >= 0x20c && header.xloadflags & XLF_KERNEL_64 != 0,
            "the kernel {} has no 64-bit entry; kernels since 3.8 built for x86-64 have one",
            path.display()
        );
    }
    let cmdline_len = write_cmdline(memory, &kernel.cmdline, devices)?;
    let initrd = match &kernel.initrd {
        Some(path) => {
            let limit = if header.initrd_addr_max == 0 { INITRD_MAX } else { header.initrd_addr_max.into() };
            let kernel_end = if is_elf { loaded.kernel_end } else { unpacked_end(&header, &loaded) };
            Some(load_initrd(ram, path, kernel_end, limit)?)
        }
        None => None,
    };
    memory
        .write_slice(&tables::mp_table(vcpus, place::MP_TABLE), GuestAddress(place::MP_TABLE))
        .context("write the MP table")?;
    memory
        .write_slice(&acpi::acpi_tables(vcpus, devices, place::ACPI), GuestAddress(place::ACPI))
        .context("write the ACPI tables")?;
    if let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap {
        write_start_info(ram, initrd)?;
        return Ok(Entry { address: entry.0, pvh: true });
    }
    write_page_tables(memory)?;
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: place::ACPI, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = 0x5372_6448;
    params.hdr.cmd_line_ptr = place::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline_len as u32;
    if let Some((start, len)) = initrd {
        (params.hdr.ramdisk_image, params.hdr.ramdisk_size) = (start as u32, len as u32);
    }
    let map = memory_map(ram);
    params.e820_entries = map.len() as u8;
    for (entry, (addr, size)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: *addr, size: *size, r#type: MAP_RAM };
    }
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(place::ZERO_PAGE)),
        memory,
    )
    .context("write the boot parameters")?;
    let address = if is_elf { loaded.kernel_load.0 } else { loaded.kernel_load.0 + ENTRY_64 };
    Ok(Entry { address, pvh: false })
}

/// Memory that the kernel may use: all but what lies between 639 KiB and 1 MiB.
fn memory_map(ram: &GuestRam) -> Vec<(u64, u64)> {
    let mut map = vec![(0, place::MP_TABLE)];
    for region in ram.regions() {
        let start = region.guest_start.max(place::HIGH_MEMORY);
        map.push((start, region.guest_start + region.len - start));
    }
    map
}

fn write_cmdline(memory: &Memory, text: &str, devices: usize) -> Result<usize> {
    let mut cmdline = Cmdline::try_from(text, CMDLINE_MAX)
        .map_err(|e| anyhow::anyhow!("the kernel's command line is not usable: {e:?}"))?;
    for i in 0..devices as u64 {
        let address = GuestAddress(MMIO_START + i * MMIO_BYTES);
        cmdline
            .add_virtio_mmio_device(MMIO_BYTES, address, FIRST_IRQ + i as u32, None)
            .map_err(|e| anyhow::anyhow!("the kernel's command line is too long: {e:?}"))?;
    }
    load_cmdline(memory, GuestAddress(place::CMDLINE), &cmdline)
        .context("write the kernel's command line")?;
    Ok(cmdline.as_cstring().map_err(|e| anyhow::anyhow!("{e:?}"))?.as_bytes_with_nul().len())
}

/// Where the memory ends in which a bzImage unpacks itself: it moves up to where it would rather be, or to the next address of
/// its alignment, and needs `init_size` bytes from there until it has read the memory map.
fn unpacked_end(header: &setup_header, loaded: &KernelLoaderResult) -> u64 {
    let alignment = u64::from(header.kernel_alignment).max(1);
    let start = loaded.kernel_load.0.max(header.pref_address).checked_next_multiple_of(alignment);
    start.unwrap_or(u64::MAX).saturating_add(header.init_size.into()).max(loaded.kernel_end)
}

/// Puts it as high as it may be; returns place and length.
fn load_initrd(ram: &GuestRam, path: &Path, kernel_end: u64, limit: u64) -> Result<(u64, u64)> {
    let mut file = File::open(path).with_context(|| format!("open the initrd {}", path.display()))?;
    let len = file.metadata().with_context(|| format!("look at the initrd {}", path.display()))?.len();
    let end = ram.regions()[0].len.min(limit + 1);
    let start = end.checked_sub(len).map(|start| start & !0xfff).filter(|start| *start >= kernel_end);
    let Some(start) = start else {
        bail!("the initrd {} of {len} bytes does not fit into the memory behind the kernel", path.display());
    };
    ram.memory()
        .read_exact_volatile_from(GuestAddress(start), &mut file, len as usize)
        .with_context(|| format!("read the initrd {}", path.display()))?;
    Ok((start, len))
}

fn write_start_info(ram: &GuestRam, initrd: Option<(u64, u64)>) -> Result<()> {
    let map: Vec<_> = memory_map(ram)
        .into_iter()
        .map(|(addr, size)| hvm_memmap_table_entry { addr, size, type_: MAP_RAM, reserved: 0 })
        .collect();
    let modules: Vec<_> = initrd
        .iter()
        .map(|(paddr, size)| hvm_modlist_entry { paddr: *paddr, size: *size, ..Default::default() })
        .collect();
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        cmdline_paddr: place::CMDLINE,
        rsdp_paddr: place::ACPI,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { place::MODULES },
        memmap_paddr: place::MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(place::START_INFO));
    params.set_sections(&map, GuestAddress(place::MEMORY_MAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(place::MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, ram.memory()).context("write the start info")
}

/// The first GiB at its own addresses, in pages of 2 MiB.
fn write_page_tables(memory: &Memory) -> Result<()> {
    let (present_writable, large) = (0b11, 1 << 7);
    memory.write_obj(place::PDPT | present_writable, GuestAddress(place::PML4))?;
    memory.write_obj(place::PD | present_writable, GuestAddress(place::PDPT))?;
    for i in 0..512u64 {
        memory.write_obj((i << 21) | present_writable | large, GuestAddress(place::PD + i * 8))?;
    }
    Ok(())
}

impl Entry {
    /// The registers with which the first processor begins.
    pub fn regs(&self) -> kvm_regs {
        let mut regs = kvm_regs { rip: self.address, rflags: 2, ..Default::default() };
        if self.pvh {
            regs.rbx = place::START_INFO;
        } else {
            (regs.rsi, regs.rsp, regs.rbp) = (place::ZERO_PAGE, place::STACK, place::STACK);
        }
        regs
    }

    /// Changes its special registers, and writes the descriptors that they name.
    ///
    /// # Errors
    /// If the descriptors can't be written.
    pub fn apply(&self, sregs: &mut kvm_sregs, memory: &Memory) -> Result<()> {
        let long = u8::from(!self.pvh);
        let code = segment(0x8, 11, long);
        let data = segment(0x10, 3, 0);
        let descriptors = [0, descriptor(&code), descriptor(&data), 0];
        for (i, descriptor) in descriptors.into_iter().enumerate() {
            memory.write_obj(descriptor, GuestAddress(place::GDT + i as u64 * 8))?;
        }
        sregs.gdt = kvm_dtable { base: place::GDT, limit: 31, ..Default::default() };
        sregs.idt = kvm_dtable { base: 0, limit: 0, ..Default::default() };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr =
            kvm_segment { limit: 0x67, selector: 0x18, type_: 11, present: 1, s: 0, ..Default::default() };
        let (protected, numeric, paging) = (1, 1 << 4, 1 << 31);
        if self.pvh {
            (sregs.cr0, sregs.cr4, sregs.efer) = (protected | numeric, 0, 0);
        } else {
            (sregs.cr3, sregs.cr4, sregs.efer) = (place::PML4, 1 << 5, 1 << 8 | 1 << 10);
            sregs.cr0 = protected | numeric | paging;
        }
        Ok(())
    }
}

fn segment(selector: u16, type_: u8, long: u8) -> kvm_segment {
    let db = u8::from(long == 0);
    kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db,
        s: 1,
        l: long,
        g: 1,
        ..Default::default()
    }
}

/// A segment with base 0 as it stands in a table of descriptors (Intel 64 manual, volume 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let access = u64::from(segment.type_) | u64::from(segment.s) << 4 | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    0xffff | access << 40 | 0xf << 48 | flags << 52
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(path: &Path) -> Kernel {
        Kernel { kernel: path.to_owned(), initrd: None, cmdline: "console=ttyS0".into() }
    }

    #[test]
    fn what_is_no_kernel_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("text");
        std::fs::write(&path, vec![b'x'; 4096]).expect("written");
        let ram = GuestRam::new(64 << 20, false).expect("memory");
        let error = format!("{:#}", load(&ram, &kernel(&path), 1, 1).expect_err("no kernel"));
        assert!(error.contains("text"), "{error}");
        let error = format!("{:#}", load(&ram, &kernel(Path::new("/nowhere")), 1, 1).expect_err("no file"));
        assert!(error.contains("/nowhere"), "{error}");
    }

    #[test]
    fn the_kernel_is_told_of_all_memory_but_the_hole_for_old_devices() {
        let ram = GuestRam::new(5 << 30, false).expect("memory that nobody touches");
        let map = memory_map(&ram);
        assert_eq!(map[0], (0, 0x9fc00));
        assert_eq!(map[1], (1 << 20, (3 << 30) - (1 << 20)));
        assert_eq!(map[2], (4 << 30, 2 << 30));
    }

    #[test]
    fn the_command_line_names_the_devices() {
        let ram = GuestRam::new(4 << 20, false).expect("memory");
        let len = write_cmdline(ram.memory(), "quiet", 2).expect("short enough");
        let mut bytes = vec![0; len];
        ram.memory().read_slice(&mut bytes, GuestAddress(place::CMDLINE)).expect("in memory");
        let text = String::from_utf8_lossy(&bytes).into_owned();
        assert_eq!(text, "quiet virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6\0");
        assert!(write_cmdline(ram.memory(), &"x".repeat(3000), 0).is_err());
    }

    #[test]
    fn descriptors_are_those_of_the_manual() {
        assert_eq!(descriptor(&segment(0x8, 11, 1)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(0x10, 3, 0)), 0x00cf_9300_0000_ffff);
    }

    /// A bzImage without code: what a boot loader reads of it, and `len` bytes to load.
    fn bzimage(pref_address: u64, init_size: u32, len: usize) -> Vec<u8> {
        let mut image = vec![0; 1024 + len];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[1]);
        put(0x202, b"HdrS");
        put(0x206, &0x20f_u16.to_le_bytes());
        put(0x211, &[1]);
        put(0x214, &0x10_0000_u32.to_le_bytes());
        put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
        put(0x230, &0x20_0000_u32.to_le_bytes());
        put(0x236, &XLF_KERNEL_64.to_le_bytes());
        put(0x258, &pref_address.to_le_bytes());
        put(0x260, &init_size.to_le_bytes());
        image
    }

    #[test]
    fn an_initrd_keeps_clear_of_what_the_kernel_unpacks_into() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (path, initrd) = (dir.path().join("kernel"), dir.path().join("initrd"));
        std::fs::write(&initrd, vec![0; 8 << 20]).expect("written");
        let kernel = Kernel { initrd: Some(initrd), ..kernel(&path) };
        let ram = GuestRam::new(64 << 20, false).expect("memory");
        let boot = |pref_address, init_size| {
            std::fs::write(&path, bzimage(pref_address, init_size, 4096)).expect("written");
            load(&ram, &kernel, 1, 0)
        };
        boot(16 << 20, 40 << 20).expect("the kernel ends where the initrd begins");
        let error = format!("{:#}", boot(16 << 20, 41 << 20).expect_err("they overlap"));
        assert!(error.contains("initrd"), "{error}");
        // Loaded above where it would rather be, it goes to the next address that is a multiple of 2 MiB.
        boot(0, 54 << 20).expect("the kernel ends where the initrd begins");
        boot(0, 55 << 20).expect_err("they overlap");
        boot(u64::MAX, 4096).expect_err("no such place");
    }
}
