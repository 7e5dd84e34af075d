//! Hostile images: see `blockd_fuzz::open`.
#![no_main]
#![allow(unsafe_code, reason = "the fuzzer's entry points are exported by name")]

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

/// What the codecs, the input and the file in memory may take together, in bytes; above it an allocation fails, which is
/// a finding.
const MEMORY_MAX: usize = 320 << 20;

#[global_allocator]
static ALLOCATOR: cap::Cap<std::alloc::System> = cap::Cap::new(std::alloc::System, MEMORY_MAX);

fuzz_target!(|data: &[u8]| blockd_fuzz::open::run(data));

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if seed % 4 != 0
        && let Some(mutated) = blockd_fuzz::mutate::mutate(&data[..size], max_size, seed)
    {
        data[..mutated.len()].copy_from_slice(&mutated);
        return mutated.len();
    }
    fuzzer_mutate(data, size, max_size)
});
