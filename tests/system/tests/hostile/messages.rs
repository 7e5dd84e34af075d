//! Messages that no front end sends.

/// The body of a message with a memory table: guest address, size, user address, offset in the file.
fn memory_table(regions: &[[u64; 4]]) -> Vec<u8> {
    let mut body = (regions.len() as u64).to_le_bytes().to_vec();
    regions.iter().flatten().for_each(|word| body.extend_from_slice(&word.to_le_bytes()));
    body
}

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// (what it is, request, body, how many copies of the memfd go with it)
pub(crate) fn all_messages() -> Vec<(&'static str, u32, Vec<u8>, usize)> {
    const MIB: u64 = 1 << 20;
    let state = |index: u32, value: u32| u64::from(index) | u64::from(value) << 32;
    let inflight = |size: u64, offset: u64, queues: u16, depth: u16| {
        let mut body = words(&[size, offset]);
        body.extend_from_slice(&queues.to_le_bytes());
        body.extend_from_slice(&depth.to_le_bytes());
        body.extend_from_slice(&[0; 4]);
        body
    };
    let config = |offset: u32, size: u32, len: usize| {
        let mut body: Vec<u8> = [offset, size, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
        body.resize(12 + len, 0);
        body
    };
    let mut many = vec![[0, MIB, 0x1000, 0]; 100];
    many.iter_mut().enumerate().for_each(|(i, region)| region[0] = i as u64 * MIB);
    vec![
        ("request 0", 0, vec![], 0),
        ("an unknown request", 45, words(&[1]), 0),
        ("a request far out", 1000, vec![0; 64], 0),
        ("the last request", u32::MAX, vec![], 0),
        ("features in a question for them", 1, words(&[1]), 0),
        ("files in a question for features", 1, vec![], 3),
        ("half of the features", 2, vec![0; 4], 0),
        ("no memory table", 5, vec![], 0),
        ("an empty memory table", 5, memory_table(&[]), 0),
        ("a memory table without files", 5, memory_table(&[[0, MIB, 0x1000, 0]]), 0),
        ("a memory table with too many files", 5, memory_table(&[[0, MIB, 0x1000, 0]]), 3),
        ("a memory table of 100 regions", 5, memory_table(&many), 8),
        ("a memory table that says 1000 regions", 5, [words(&[1000]), vec![0; 32]].concat(), 1),
        ("a region of no size", 5, memory_table(&[[0, 0, 0x1000, 0]]), 1),
        ("a region whose end overflows", 5, memory_table(&[[u64::MAX - 100, MIB, 0x1000, 0]]), 1),
        ("a region whose user address overflows", 5, memory_table(&[[0, MIB, u64::MAX - 100, 0]]), 1),
        ("a region beyond its file", 5, memory_table(&[[0, MIB, 0x1000, 1 << 40]]), 1),
        ("a region whose offset overflows", 5, memory_table(&[[0, MIB, 0x1000, u64::MAX - 4095]]), 1),
        ("a region that is larger than its file", 5, memory_table(&[[0, 1 << 45, 0x1000, 0]]), 1),
        ("overlapping regions", 5, memory_table(&[[0, MIB, 0x1000, 0], [MIB / 2, MIB, 0x20_0000, 0]]), 2),
        ("overlapping user addresses", 5, memory_table(&[[0, MIB, 0x1000, 0], [2 * MIB, MIB, 0x2000, 0]]), 2),
        ("a log of no size", 6, words(&[0, 0]), 1),
        ("a log beyond its file", 6, words(&[1 << 40, 0]), 1),
        ("a log whose offset overflows", 6, words(&[4096, u64::MAX - 10]), 1),
        ("a log without a file", 6, words(&[4096, 0]), 0),
        ("a ring of 65,535", 8, words(&[state(0, 65535)]), 0),
        ("a ring of 2^31", 8, words(&[state(0, 1 << 31)]), 0),
        ("the size of ring 4 billion", 8, words(&[state(u32::MAX, 128)]), 0),
        ("addresses of ring 200", 9, words(&[200, 0x1000, 0x2000, 0x3000, 0]), 0),
        ("addresses that are odd", 9, words(&[0, 0x1001, 0x2001, 0x3001, 0]), 0),
        ("addresses at the end of everything", 9, words(&[0, u64::MAX, u64::MAX, u64::MAX, u64::MAX]), 0),
        ("a base of ring 9999", 10, words(&[state(9999, 0)]), 0),
        ("a base of 4 billion", 10, words(&[state(0, u32::MAX)]), 0),
        ("a question for the base of ring 9999", 11, words(&[state(9999, 0)]), 0),
        ("a kick with two files", 12, words(&[0]), 2),
        ("a kick for ring 255", 12, words(&[255]), 1),
        ("a kick that is a memfd", 12, words(&[0]), 1),
        ("a call that is a memfd", 13, words(&[0]), 1),
        ("a kick without a file that says it has one", 12, words(&[0]), 0),
        ("a wish for ring 77", 18, words(&[state(77, 1)]), 0),
        ("a wish that is 7", 18, words(&[state(0, 7)]), 0),
        ("a channel that is a memfd", 21, vec![], 1),
        ("an empty piece of configuration", 24, config(0, 0, 0), 0),
        ("configuration whose size lies", 24, config(0, 200, 10), 0),
        ("configuration far out", 24, config(u32::MAX - 10, 60, 60), 0),
        ("configuration of 4 GiB", 24, config(0, u32::MAX, 60), 0),
        ("a write to all of the configuration", 25, config(0, 256, 256), 0),
        ("a write to the end of the configuration", 25, config(250, 100, 100), 0),
        ("a question for 65,535 rings in flight", 31, inflight(0, 0, 65535, 65535), 0),
        ("a question for no rings in flight", 31, inflight(0, 0, 0, 0), 0),
        ("an in-flight region beyond its file", 32, inflight(1 << 40, 0, 4, 128), 1),
        ("an in-flight region that is too small", 32, inflight(64, 0, 4, 128), 1),
        ("an in-flight region whose offset overflows", 32, inflight(1 << 16, u64::MAX - 5, 4, 128), 1),
        ("an in-flight region of a ring of 100", 32, inflight(1 << 16, 0, 1, 100), 1),
        ("an in-flight region without a file", 32, inflight(1 << 16, 0, 1, 128), 0),
        ("memory added without a file", 37, words(&[0, 0, MIB, 0x1000, 0]), 0),
        ("memory added beyond its file", 37, words(&[0, 0, MIB, 0x1000, 1 << 40]), 1),
        ("memory added of no size", 37, words(&[0, 0, 0, 0x1000, 0]), 1),
        ("memory removed that is not there", 38, words(&[0, 1 << 40, MIB, 0x1000, 0]), 0),
        ("a state in no direction", 42, words(&[9]), 1),
        ("a state to load from a memfd of zeroes", 42, words(&[1]), 1),
    ]
}
