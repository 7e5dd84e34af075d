//! Sound images in use: see `blockd_fuzz::operations`.
#![no_main]
#![allow(unsafe_code, reason = "the fuzzer's entry point is exported by name")]

use libfuzzer_sys::fuzz_target;

/// What the codecs, the model and the file in memory may take together, in bytes; above it an allocation fails, which is
/// a finding.
const MEMORY_MAX: usize = 512 << 20;

#[global_allocator]
static ALLOCATOR: cap::Cap<std::alloc::System> = cap::Cap::new(std::alloc::System, MEMORY_MAX);

fuzz_target!(|data: &[u8]| blockd_fuzz::operations::run(data));
