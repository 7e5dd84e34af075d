//! Puts the test guest into memory: program, page tables, parameters, and where everything is.

use std::io::Cursor;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::Elf;
use vm_memory::{Bytes, GuestAddress};

use super::layout::{self, PAGE};
use super::options::{Fill, Pattern, SelftestOptions};
use crate::memory::{GuestRam, HOLE_END};

/// The program, see the build script.
static PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/selftest.elf"));

// Entries of page tables (Intel SDM 3A, 4.5): present, writable, user, and accessed and dirty from the start, so that the
// processor need not write them.
const TABLE: u64 = 0x27;
const LARGE_PAGE: u64 = 0xe7;
/// Bytes that an entry of the lowest table used maps.
const LARGE_PAGE_BYTES: u64 = 2 << 20;
/// Entries of a table.
const ENTRIES: u64 = 512;

/// How a processor begins.
#[derive(Debug, Clone, Copy)]
pub struct VcpuStart {
    /// Its general registers, complete.
    pub regs: kvm_regs,
    page_tables: u64,
}

impl VcpuStart {
    /// Changes the special registers of a fresh processor: 64-bit user mode with paging. All other fields stay as KVM made them.
    ///
    /// The processor needs nothing else but, where it is not the first one, to be made runnable.
    pub fn apply(&self, sregs: &mut kvm_sregs) {
        const CR0_PE_MP_NE_WP_PG: u64 = 1 | 1 << 1 | 1 << 5 | 1 << 16 | 1 << 31;
        const CR0_EM_TS_NW_CD: u64 = 1 << 2 | 1 << 3 | 1 << 29 | 1 << 30;
        const CR4_PAE_OSFXSR_OSXMMEXCPT: u64 = 1 << 5 | 1 << 9 | 1 << 10;
        const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
        sregs.cs = segment(11, 0x33, true);
        let data = segment(3, 0x2b, false);
        (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
        sregs.cr0 = (sregs.cr0 & !CR0_EM_TS_NW_CD) | CR0_PE_MP_NE_WP_PG;
        sregs.cr3 = self.page_tables;
        sregs.cr4 |= CR4_PAE_OSFXSR_OSXMMEXCPT;
        sregs.efer |= EFER_LME_LMA;
    }
}

/// A flat segment of privilege level 3. Its selector is one that Linux uses: a KVM that runs the guest's user mode as the host's
/// own takes no other.
fn segment(type_: u8, selector: u16, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// Gives away memory from low to high addresses, below the hole for devices.
struct Space<'a> {
    ram: &'a GuestRam,
    next: u64,
    end: u64,
}

impl Space<'_> {
    fn take(&mut self, bytes: u64, align: u64, what: &str) -> Result<u64> {
        let start = self.next.next_multiple_of(align);
        let end = start.checked_add(bytes.next_multiple_of(PAGE)).filter(|end| *end <= self.end);
        self.next = end.with_context(|| {
            format!(
                "the test guest's {what} of {bytes} bytes do not fit the machine's memory of {} bytes; give it more \
                 memory, or the guest a smaller disk-range, depth or number of queues",
                self.ram.bytes()
            )
        })?;
        Ok(start)
    }

    fn put<T: vm_memory::ByteValued>(&self, value: T, address: u64) -> Result<()> {
        self.ram.memory().write_obj(value, GuestAddress(address)).context("write into the guest's memory")
    }
}

/// Puts the test guest into memory that is all zeroes, and says how each processor begins.
///
/// `disks` are the addresses of virtio-mmio block devices, at most [`super::DISKS_MAX`]; `tsc_khz` is the rate of the guest's
/// time-stamp counter.
///
/// # Errors
/// If the options are out of range, or the memory is too small for them.
pub fn load(
    ram: &Arc<GuestRam>,
    options: &SelftestOptions,
    vcpus: u32,
    disks: &[u64],
    tsc_khz: u32,
) -> Result<Vec<VcpuStart>> {
    options.validate().map_err(anyhow::Error::msg)?;
    ensure!(
        (1..=layout::VCPUS_MAX as u32).contains(&vcpus),
        "the test guest runs on 1 to {} processors, not on {vcpus}",
        layout::VCPUS_MAX
    );
    ensure!(
        disks.len() <= layout::DISKS_MAX,
        "the test guest drives up to {} disks, not {}",
        layout::DISKS_MAX,
        disks.len()
    );
    ensure!(
        tsc_khz > 0,
        "the rate of the guest's time-stamp counter is not known, so the test guest has no clock"
    );
    let program = Elf::load(ram.memory(), None, &mut Cursor::new(PROGRAM), None)
        .context("load the test guest's program (is the machine's memory smaller than 2M?)")?;
    let end = ram.regions()[0].len;
    let mut space = Space { ram, next: program.kernel_end.next_multiple_of(PAGE), end };

    let page_tables = write_page_tables(&mut space)?;
    let stacks = space.take(u64::from(vcpus) * layout::STACK_BYTES, layout::STACK_BYTES, "stacks")?;
    let mut disk = [layout::DiskParameters::default(); layout::DISKS_MAX];
    for (parameters, mmio) in disk.iter_mut().zip(disks) {
        *parameters = place_disk(&mut space, options, *mmio)?;
    }
    let parameters =
        layout::Parameters { stacks, disk, ..parameters(&space, options, vcpus, disks, tsc_khz)? };

    let header = layout::Header {
        magic: layout::MAGIC,
        version: layout::VERSION,
        vcpus,
        disks: parameters.disks,
        reserved: 0,
    };
    space.put(parameters, layout::PARAMETERS_ADDRESS)?;
    space.put(layout::Control { command: 0, rate: options.rate_bytes_per_s }, layout::CONTROL_ADDRESS)?;
    space.put(header, layout::REPORT_ADDRESS)?;
    let regs = |vcpu: u32| kvm_regs {
        rip: program.kernel_load.0,
        rsp: stacks + u64::from(vcpu + 1) * layout::STACK_BYTES,
        rdi: vcpu.into(),
        // IOPL 3, interrupts off, and the bit that is always set.
        rflags: 3 << 12 | 2,
        ..Default::default()
    };
    Ok((0..vcpus).map(|vcpu| VcpuStart { regs: regs(vcpu), page_tables }).collect())
}

/// Parameters without stacks and disks' details; the working set is what the space has left.
fn parameters(
    space: &Space<'_>,
    options: &SelftestOptions,
    vcpus: u32,
    disks: &[u64],
    tsc_khz: u32,
) -> Result<layout::Parameters> {
    let low_free = (space.end - space.next) / PAGE;
    let high = space.ram.regions().get(1).map_or(0, |region| region.len / PAGE);
    let pages = match options.working_set_bytes {
        0 => low_free + high,
        bytes => bytes / PAGE,
    };
    ensure!(
        pages > 0 && pages <= low_free + high,
        "the test guest's working set of {} bytes is not between a page and the {} bytes that are left of its memory; use \
         working-set=0 for all of it",
        options.working_set_bytes,
        (low_free + high) * PAGE
    );
    Ok(layout::Parameters {
        magic: layout::MAGIC,
        version: layout::VERSION,
        vcpus,
        seed: options.seed,
        tsc_khz,
        report_ms: options.report_ms,
        pattern: match options.pattern {
            Pattern::Sequential => layout::PATTERN_SEQUENTIAL,
            Pattern::Random => layout::PATTERN_RANDOM,
            Pattern::Idle => layout::PATTERN_IDLE,
        },
        fill: match options.fill {
            Fill::Line => layout::FILL_LINE,
            Fill::Full => layout::FILL_FULL,
        },
        low_start: space.next,
        low_pages: pages.min(low_free),
        high_start: HOLE_END,
        pages,
        disks: disks.len() as u32,
        ..Default::default()
    })
}

fn place_disk(space: &mut Space<'_>, options: &SelftestOptions, mmio: u64) -> Result<layout::DiskParameters> {
    let disk = &options.disk;
    let blocks = disk.range_bytes / PAGE;
    let queues = u64::from(disk.queues) * layout::queue_area_bytes(disk.depth);
    Ok(layout::DiskParameters {
        mmio,
        queues_start: space.take(queues, PAGE, "queues of a disk")?,
        table: space.take(blocks * 4, PAGE, "table of a disk's blocks")?,
        blocks,
        queues: disk.queues,
        depth: disk.depth,
        write_percent: disk.write_percent,
        flush_every: disk.flush_every,
    })
}

/// Maps the first 4 GiB, where devices are too, and what memory there is above them, each address to itself.
fn write_page_tables(space: &mut Space<'_>) -> Result<u64> {
    let end = space.ram.regions().iter().map(|region| region.guest_start + region.len).max().unwrap_or(0);
    let large_pages = end.max(HOLE_END).div_ceil(LARGE_PAGE_BYTES);
    let directories = large_pages.div_ceil(ENTRIES);
    let pointers = directories.div_ceil(ENTRIES);
    let root = space.take((1 + pointers + directories) * PAGE, PAGE, "page tables")?;
    let level = |first: u64, count: u64| (0..count).map(move |i| (first + i * PAGE) | TABLE);
    let put = |entries: Vec<u64>, at: u64| -> Result<()> {
        let bytes: Vec<u8> = entries.into_iter().flat_map(u64::to_le_bytes).collect();
        space.ram.memory().write_slice(&bytes, GuestAddress(at)).context("write the guest's page tables")
    };
    let (pointers_at, directories_at) = (root + PAGE, root + (1 + pointers) * PAGE);
    put(level(pointers_at, pointers).collect(), root)?;
    put(level(directories_at, directories).collect(), pointers_at)?;
    put((0..large_pages).map(|i| (i * LARGE_PAGE_BYTES) | LARGE_PAGE).collect(), directories_at)?;
    Ok(root)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::HOLE_START;

    fn read(ram: &GuestRam, address: u64) -> u64 {
        ram.memory().read_obj(GuestAddress(address)).expect("memory")
    }

    /// What the page tables make of an address.
    fn translate(ram: &GuestRam, root: u64, address: u64) -> Option<u64> {
        let mut table = root;
        for shift in [39, 30, 21] {
            let entry = read(ram, table + (address >> shift & 511) * 8);
            if entry & 7 != 7 {
                return None;
            }
            table = entry & !0xfff;
        }
        Some(table + (address & (LARGE_PAGE_BYTES - 1)))
    }

    #[test]
    fn each_address_is_mapped_to_itself_up_to_the_end_of_memory() {
        for bytes in [4 << 20, HOLE_START, HOLE_START + (6 << 20), 600 << 30] {
            let ram = GuestRam::new(bytes, false).expect("memory that nobody touches");
            let starts = load(&ram, &SelftestOptions::default(), 2, &[], 1_000_000).expect("it loads");
            let root = starts[1].page_tables;
            let top = ram.address_of(ram.pages() - 1).expect("a page");
            for address in [0, 0x10_0000, 0xd000_0050, HOLE_END - 1, top, top + 4095] {
                if address < HOLE_END || bytes > HOLE_START {
                    assert_eq!(translate(&ram, root, address), Some(address), "{address:#x} of {bytes:#x}");
                }
            }
            assert_eq!(translate(&ram, root, top.max(HOLE_END) + (4 << 20)), None);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_a_way_out() {
        let ram = GuestRam::new(4 << 20, false).expect("memory");
        let attempt = |text: &str, vcpus: u32, disks: usize| {
            let options: SelftestOptions = text.parse().expect("options");
            let error = load(&ram, &options, vcpus, &vec![0xd000_0000; disks], 1_000_000).err();
            format!("{:#}", error.unwrap_or_else(|| panic!("{text} with {vcpus} and {disks}")))
        };
        assert!(attempt("selftest,working-set=1G", 1, 0).contains("working-set=0"));
        assert!(attempt("selftest,working-set=1K", 1, 0).contains("a page"));
        assert!(attempt("selftest,disk-range=1T", 1, 1).contains("smaller disk-range"));
        assert!(attempt("selftest", 0, 0).contains("1 to 64 processors"));
        assert!(attempt("selftest", 65, 0).contains("1 to 64 processors"));
        assert!(attempt("selftest", 1, 5).contains("up to 4 disks"));
    }
}
