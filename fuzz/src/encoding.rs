//! How the bytes of a fuzzer's input stand for a sparse file of up to 1 TiB.
//!
//! ```text
//!   flags: u8 | choices: u8 | length: u48 | { offset: u48, bytes: u16, the bytes }*        little-endian
//! ```
//!
//! Every input stands for some file: a last piece that is cut short is taken as it is.

use formats::Format;

use crate::storage::{Contents, MAX_LEN};

/// What is done to the file before it is opened, so that mutations get past its checksums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mend {
    /// Nothing.
    Nothing,
    /// Checksums are made right.
    Checksums,
    /// Also numbers and ids in a log that have to be equal.
    Log,
}

/// A sparse file, and what to do with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// Format, and how to mend: see [`Self::format`] and [`Self::mend`].
    pub flags: u8,
    /// Seeds the places that are read and written.
    pub choices: u8,
    /// Length of the file; more than [`MAX_LEN`] is as much.
    pub len: u64,
    /// Bytes of the file; later pieces win.
    pub pieces: Vec<(u64, Vec<u8>)>,
}

const U48: u64 = (1 << 48) - 1;
const HEAD: usize = 8;

fn u48(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..6].copy_from_slice(&bytes[..6]);
    u64::from_le_bytes(word)
}

impl Input {
    /// Flags for a file of a format.
    pub fn flags(format: Format, mend: Mend) -> u8 {
        u8::from(format == Format::Vhdx)
            | match mend {
                Mend::Nothing => 0,
                Mend::Checksums => 2,
                Mend::Log => 4,
            }
    }

    /// VHD or VHDX.
    pub fn format(&self) -> Format {
        if self.flags & 1 == 0 { Format::Vhd } else { Format::Vhdx }
    }

    /// What to do before it is opened.
    pub fn mend(&self) -> Mend {
        match self.flags >> 1 & 3 {
            0 => Mend::Nothing,
            1 => Mend::Checksums,
            _ => Mend::Log,
        }
    }

    /// Reads the input.
    pub fn decode(data: &[u8]) -> Option<Self> {
        let (head, mut rest) = data.split_at_checked(HEAD)?;
        let mut pieces = Vec::new();
        while let Some((at, bytes)) = rest.split_at_checked(HEAD) {
            let len = usize::from(u16::from_le_bytes([at[6], at[7]])).min(bytes.len());
            pieces.push((u48(at), bytes[..len].to_vec()));
            rest = &bytes[len..];
        }
        Some(Self { flags: head[0], choices: head[1], len: u48(&head[2..]), pieces })
    }

    /// The other way round. Pieces are at most 65,535 bytes long.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![self.flags, self.choices];
        out.extend(&(self.len & U48).to_le_bytes()[..6]);
        for (offset, bytes) in &self.pieces {
            let len = bytes.len().min(usize::from(u16::MAX));
            out.extend(&(offset & U48).to_le_bytes()[..6]);
            out.extend((len as u16).to_le_bytes());
            out.extend(&bytes[..len]);
        }
        out
    }

    /// The file, before it is mended.
    pub fn contents(&self) -> Contents {
        let len = self.len.min(MAX_LEN);
        let mut file = Contents::hole(len);
        for (offset, bytes) in &self.pieces {
            let room = len.saturating_sub(*offset).min(bytes.len() as u64);
            if room > 0 {
                file.write(*offset, &bytes[..room as usize]);
            }
        }
        file
    }

    /// The input that stands for a file. Of content that is longer than `budget` bytes only the beginning is taken, but
    /// what lies in `important` is taken first.
    pub fn of_file(file: &Contents, flags: u8, important: &[(u64, u64)], budget: usize) -> Self {
        let mut input = Self { flags, choices: 0, len: file.len(), pieces: Vec::new() };
        let mut left = budget;
        for first in [true, false] {
            for (start, end) in file.runs() {
                for at in (start..end).step_by(64) {
                    let matters = important.iter().any(|(from, to)| at < *to && *from < at + 64);
                    let bytes = file.bytes(at, (end - at).min(64) as usize);
                    if matters == first && left >= bytes.len() && bytes.iter().any(|b| *b != 0) {
                        left -= bytes.len();
                        input.push(at, &bytes);
                    }
                }
            }
        }
        input
    }

    fn push(&mut self, at: u64, bytes: &[u8]) {
        match self.pieces.last_mut() {
            Some((offset, last)) if *offset + last.len() as u64 == at && last.len() < 4096 => {
                last.extend(bytes)
            }
            _ => self.pieces.push((at, bytes.to_vec())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_survives_its_encoding() {
        let mut file = Contents::hole(3 << 30);
        file.write(5, b"begin");
        file.write(1 << 30, &[7; 5000]);
        file.write((3 << 30) - 3, b"end");
        let input = Input::of_file(&file, 3, &[], 1 << 20);
        assert_eq!(Input::decode(&input.encode()), Some(input.clone()));
        assert_eq!(input.contents(), file);
        assert_eq!((input.format(), input.mend()), (Format::Vhdx, Mend::Checksums));
    }

    #[test]
    fn any_bytes_are_some_file() {
        assert_eq!(Input::decode(&[0; 7]), None);
        let huge = Input::decode(&[0xff; 40]).expect("long enough");
        assert_eq!(huge.contents().len(), MAX_LEN);
    }
}
