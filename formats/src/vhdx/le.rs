//! Little-endian fields of on-disk structures.

/// The `u16` at byte `at`. The structure's buffer has a fixed size that covers the field.
pub(super) fn u16_at(buf: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([buf[at], buf[at + 1]])
}

/// The `u32` at byte `at`.
pub(super) fn u32_at(buf: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(buf, at))
}

/// The `u64` at byte `at`.
pub(super) fn u64_at(buf: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(buf, at))
}

/// `N` bytes from byte `at`.
pub(super) fn bytes_at<const N: usize>(buf: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&buf[at..at + N]);
    bytes
}

/// Puts bytes at `at`.
pub(super) fn put(buf: &mut [u8], at: usize, bytes: &[u8]) {
    buf[at..at + bytes.len()].copy_from_slice(bytes);
}
