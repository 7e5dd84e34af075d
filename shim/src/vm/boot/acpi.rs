//! ACPI tables (ACPI specification 6.5, chapter 5): processors, the I/O APIC, the serial line, the virtio devices, and how the
//! machine is switched off and reset.
//!
//! Kernels of distributions are built without MP tables and without devices on the command line: all of it has to stand
//! here. The hardware is "reduced" (4.1): no power management ports, no interrupt for them.

use crate::device::serial::{self, PORT, PORTS};
use crate::device::{MMIO_BYTES, Place};
use crate::vm::ports::{KEYBOARD_COMMAND, KEYBOARD_RESET, SLEEP_CONTROL, SLEEP_STATUS, SLEEP_TYPE_OFF};

use super::tables::{IO_APIC, LOCAL_APIC};

/// Bytes before the first table: the root pointer, and room so that the tables are aligned.
const ROOT_BYTES: usize = 64;
/// Bytes of a table's header (5.2.6).
const HEADER_BYTES: usize = 36;
/// Bytes of the fixed table (5.2.9).
const FIXED_BYTES: usize = 276;

/// Flags of the fixed table: WBINVD works, no power or sleep button in it, a reset register, reduced hardware.
const FIXED_FLAGS: u32 = 1 | 1 << 4 | 1 << 5 | 1 << 10 | 1 << 20;
/// What of a PC there is: devices of the ISA bus, but no keyboard, VGA, MSI, ASPM or clock of the CMOS (5.2.9.3).
const PC_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5;

/// The root pointer and the tables, to be put at `address`, which the root pointer begins. Nothing else tells the guest of
/// that memory, so it must be none that the kernel takes for its own.
pub fn acpi_tables(vcpus: u32, devices: usize, address: u64) -> Vec<u8> {
    let mut all = vec![0; ROOT_BYTES];
    let mut put = |table: Vec<u8>| {
        let place = address + all.len() as u64;
        all.extend_from_slice(&table);
        all.resize(all.len().next_multiple_of(16), 0);
        place
    };
    let namespace = put(table(b"DSDT", 2, &definitions(devices)));
    let fixed = put(table(b"FACP", 6, &fixed(namespace)));
    let processors = put(table(b"APIC", 5, &interrupt_controllers(vcpus)));
    let list: Vec<u8> = [fixed, processors].into_iter().flat_map(u64::to_le_bytes).collect();
    let list = put(table(b"XSDT", 1, &list));
    all[..ROOT_BYTES].copy_from_slice(&root_pointer(list));
    all
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

/// 5.2.5.3.
fn root_pointer(list: u64) -> [u8; ROOT_BYTES] {
    let mut root = [0; ROOT_BYTES];
    root[..8].copy_from_slice(b"RSD PTR ");
    root[9..15].copy_from_slice(b"BLOCKD");
    root[15] = 2;
    root[20..24].copy_from_slice(&36u32.to_le_bytes());
    root[24..32].copy_from_slice(&list.to_le_bytes());
    root[8] = checksum(&root[..20]);
    root[32] = checksum(&root[..36]);
    root
}

fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Vec::with_capacity(HEADER_BYTES + body.len());
    table.extend_from_slice(signature);
    table.extend_from_slice(&((HEADER_BYTES + body.len()) as u32).to_le_bytes());
    table.extend_from_slice(&[revision, 0]);
    table.extend_from_slice(b"BLOCKDKVM-SHIM\x01\0\0\0BLKD\x01\0\0\0");
    table.extend_from_slice(body);
    table[9] = checksum(&table);
    table
}

/// A register of eight bits at a port (5.2.3.2).
fn register(port: u16) -> [u8; 12] {
    let mut register = [1, 8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    register[4..6].copy_from_slice(&port.to_le_bytes());
    register
}

/// The fixed table without its header; places are those of 5.2.9 and count from the header's start.
fn fixed(namespace: u64) -> Vec<u8> {
    let mut body = vec![0; FIXED_BYTES - HEADER_BYTES];
    let mut set = |at: usize, bytes: &[u8]| {
        body[at - HEADER_BYTES..at - HEADER_BYTES + bytes.len()].copy_from_slice(bytes);
    };
    set(40, &(namespace as u32).to_le_bytes());
    set(109, &PC_FLAGS.to_le_bytes());
    set(112, &FIXED_FLAGS.to_le_bytes());
    set(116, &register(KEYBOARD_COMMAND));
    set(128, &[KEYBOARD_RESET]);
    set(131, &[5]);
    set(140, &namespace.to_le_bytes());
    set(244, &register(SLEEP_CONTROL));
    set(256, &register(SLEEP_STATUS));
    body
}

/// 5.2.12.
fn interrupt_controllers(vcpus: u32) -> Vec<u8> {
    let mut body = Vec::from(LOCAL_APIC.to_le_bytes());
    // There are two 8259 as well.
    body.extend_from_slice(&1u32.to_le_bytes());
    for number in 0..vcpus as u8 {
        body.extend_from_slice(&[0, 8, number, number, 1, 0, 0, 0]);
    }
    body.extend_from_slice(&[1, 12, vcpus as u8, 0]);
    body.extend_from_slice(&IO_APIC.to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    // Line 1 of every local APIC is its NMI.
    body.extend_from_slice(&[4, 6, 0xff, 0, 0, 1]);
    body
}

/// The devices and the state "off", in AML (chapter 20).
fn definitions(devices: usize) -> Vec<u8> {
    let mut bus = Vec::from(*b"\\_SB_");
    // EISA's way to write PNP0501.
    let id = [0x0c, 0x41, 0xd0, 0x05, 0x01];
    let ports = [&[0x47, 1][..], &PORT.to_le_bytes(), &PORT.to_le_bytes(), &[1, PORTS as u8]].concat();
    bus.extend(device("COM1", &id, 0, &[ports, interrupt(serial::IRQ)].concat()));
    for (index, place) in (0..devices).map_while(|index| Some((index, Place::of(index)?))) {
        let addresses =
            [&[0x86, 9, 0, 1][..], &(place.address as u32).to_le_bytes(), &(MMIO_BYTES as u32).to_le_bytes()]
                .concat();
        let resources = [addresses, interrupt(place.irq)].concat();
        bus.extend(device(&format!("VI{index:02}"), b"\x0dLNRO0005\0", index as u8, &resources));
    }
    let off = sized(&[0x12], &[4, 0x0a, SLEEP_TYPE_OFF, 0, 0, 0]);
    [sized(&[0x10], &bus), name("_S5_", &off)].concat()
}

/// An interrupt line of this device's own: edges, active high (6.4.3.6).
fn interrupt(line: u32) -> Vec<u8> {
    [&[0x89, 6, 0, 0b0011, 1][..], &line.to_le_bytes()].concat()
}

fn device(path: &str, id: &[u8], number: u8, resources: &[u8]) -> Vec<u8> {
    let resources = [resources, &[0x79, 0]].concat();
    let buffer = sized(&[0x11], &[&[0x0a, resources.len() as u8][..], &resources].concat());
    let body =
        [path.as_bytes(), &name("_HID", id), &name("_UID", &[0x0a, number]), &name("_CRS", &buffer)].concat();
    sized(&[0x5b, 0x82], &body)
}

fn name(path: &str, value: &[u8]) -> Vec<u8> {
    [&[0x08], path.as_bytes(), value].concat()
}

/// A term with its length, which counts itself (20.2.4).
fn sized(opcode: &[u8], body: &[u8]) -> Vec<u8> {
    let length = if body.len() < 63 {
        vec![body.len() as u8 + 1]
    } else {
        let all = body.len() + 2;
        assert!(all < 1 << 12, "the devices of a machine are few");
        vec![0x40 | (all & 0xf) as u8, (all >> 4) as u8]
    };
    [opcode, &length, body].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DEVICES_MAX;

    const ADDRESS: u64 = 0xe_0000;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    fn number(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize
    }

    fn table_at(all: &[u8], address: usize) -> &[u8] {
        let from = &all[address - ADDRESS as usize..];
        let table = &from[..number(from, 4)];
        assert_eq!(sum(table), 0, "{:?}", &table[..4]);
        table
    }

    #[test]
    fn every_table_is_reached_from_the_root_and_its_sum_is_zero() {
        for (vcpus, devices) in [(1, 0), (2, 1), (64, DEVICES_MAX)] {
            let all = acpi_tables(vcpus, devices, ADDRESS);
            assert!(all.len() < 0x2_0000, "they fit below 1 MiB");
            assert_eq!((sum(&all[..20]), sum(&all[..36])), (0, 0));
            let list = table_at(&all, number(&all, 24));
            assert_eq!((&list[..4], list.len()), (&b"XSDT"[..], 52));
            let fixed = table_at(&all, number(list, 36));
            assert_eq!((&fixed[..4], fixed.len()), (&b"FACP"[..], FIXED_BYTES));
            let processors = table_at(&all, number(list, 44));
            assert_eq!((&processors[..4], processors.len()), (&b"APIC"[..], 44 + 8 * vcpus as usize + 18));
            let namespace = table_at(&all, number(fixed, 140));
            assert_eq!(&namespace[..4], b"DSDT");
            assert_eq!(number(fixed, 40), number(fixed, 140));
            let virtio = namespace.windows(8).filter(|bytes| bytes == b"LNRO0005").count();
            assert_eq!(virtio, devices);
        }
    }

    #[test]
    fn a_length_counts_itself() {
        assert_eq!(sized(&[0x10], &[7; 62])[..2], [0x10, 63]);
        assert_eq!(sized(&[0x10], &[7; 63])[..3], [0x10, 0x41, 4]);
        assert_eq!(sized(&[0x10], &[7; 1000]).len(), 1003);
    }
}
