//! The MP table (Intel MultiProcessor Specification 1.4, chapter 4): how many processors there are, and which interrupt line
//! leads to which pin of the I/O APIC.

/// Where the local APICs are.
pub(super) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Where the I/O APIC is.
pub(super) const IO_APIC: u32 = 0xfec0_0000;
/// Version of KVM's APICs.
const APIC_VERSION: u8 = 0x14;
/// Lines of the ISA bus.
const LINES: u8 = 16;
/// Interrupt types of entries.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

fn with_checksum(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[at] = bytes[at].wrapping_sub(sum);
    bytes
}

/// The pointer and, right behind it, the table, to be put at `address`.
pub fn mp_table(vcpus: u32, address: u64) -> Vec<u8> {
    let io_apic_id = vcpus as u8;
    let (mut entries, mut count) = (Vec::new(), 0u16);
    let mut add = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for number in 0..vcpus as u8 {
        // Enabled; the first is the one that boots. Signature and features are for people.
        let flags = 1 | u8::from(number == 0) << 1;
        let mut entry = [0; 20];
        entry[..4].copy_from_slice(&[0, number, APIC_VERSION, flags]);
        entry[4..8].copy_from_slice(&0x600u32.to_le_bytes());
        entry[8..12].copy_from_slice(&0x201u32.to_le_bytes());
        add(&entry);
    }
    add(b"\x01\x00ISA   ");
    let mut io_apic = [2, io_apic_id, APIC_VERSION, 1, 0, 0, 0, 0];
    io_apic[4..].copy_from_slice(&IO_APIC.to_le_bytes());
    add(&io_apic);
    for line in 0..LINES {
        // As the bus has it: edges, active high.
        add(&[3, INT, 0, 0, 0, line, io_apic_id, line]);
    }
    add(&[4, EXT_INT, 0, 0, 0, 0, 0, 0]);
    add(&[4, NMI, 0, 0, 0, 0, 0xff, 1]);

    let mut table = Vec::from(*b"PCMP");
    table.extend_from_slice(&(44 + entries.len() as u16).to_le_bytes());
    table.extend_from_slice(&[4, 0]);
    table.extend_from_slice(b"BLOCKD  KVM-SHIM    ");
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(&entries);
    let table = with_checksum(table, 7);

    let mut pointer = Vec::from(*b"_MP_");
    pointer.extend_from_slice(&(address as u32 + 16).to_le_bytes());
    pointer.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
    let mut all = with_checksum(pointer, 10);
    all.extend_from_slice(&table);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_zero_and_lengths_fit() {
        for vcpus in [1, 2, 64] {
            let bytes = mp_table(vcpus, 0x9fc00);
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum(&bytes[..16]), 0);
            assert_eq!(sum(&bytes[16..]), 0);
            let length = u16::from_le_bytes([bytes[20], bytes[21]]);
            assert_eq!(usize::from(length) + 16, bytes.len());
            assert_eq!(bytes.len(), 16 + 44 + 20 * vcpus as usize + 8 * 20);
        }
    }
}
