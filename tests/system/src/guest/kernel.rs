//! The kernel itself out of a bzImage, for those who boot it without the code that unpacks it.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::initramfs::unpack;

/// Most bytes that a block of LZ4's old format unpacks to.
const LZ4_BLOCK_BYTES: usize = 8 << 20;

fn number(bytes: &[u8], at: usize) -> Result<usize> {
    let bytes = bytes.get(at..at + 4).context("the kernel is cut off")?;
    Ok(u32::from_le_bytes(bytes.try_into()?) as usize)
}

/// The ELF file in a bzImage (Documentation/arch/x86/boot.rst: payload_offset, payload_length). `scratch` is a folder.
pub(super) fn uncompressed(image: &[u8], scratch: &Path) -> Result<Vec<u8>> {
    ensure!(image.get(0x202..0x206) == Some(b"HdrS"), "the kernel is no bzImage");
    let setup_sectors = if image[0x1f1] == 0 { 4 } else { usize::from(image[0x1f1]) };
    let start = (setup_sectors + 1) * 512 + number(image, 0x248)?;
    let payload = image.get(start..start + number(image, 0x24c)?).context("the kernel is cut off")?;
    // The length of what is packed stands behind it.
    let (packed, length) = payload.split_at(payload.len() - 4);
    let elf = match packed {
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => unpack_lz4(blocks)?,
        [0xfd, b'7', b'z', ..] => unpack_with_tool(packed, &scratch.join("vmlinux.xz"))?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => unpack_with_tool(packed, &scratch.join("vmlinux.zst"))?,
        _ => bail!("the kernel is packed in a way that is not known here: {:x?}", &packed[..4]),
    };
    ensure!(elf.len() == number(length, 0)?, "the kernel does not unpack to the length that it tells");
    ensure!(elf.starts_with(b"\x7fELF"), "what is in the bzImage is no ELF file");
    Ok(elf)
}

fn unpack_lz4(mut rest: &[u8]) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    while !rest.is_empty() {
        let length = number(rest, 0)?;
        let block = rest.get(4..4 + length).context("the kernel is cut off")?;
        all.extend(lz4_flex::block::decompress(block, LZ4_BLOCK_BYTES)?);
        rest = &rest[4 + length..];
    }
    Ok(all)
}

fn unpack_with_tool(packed: &[u8], file: &Path) -> Result<Vec<u8>> {
    std::fs::write(file, packed)?;
    unpack(file)
}
