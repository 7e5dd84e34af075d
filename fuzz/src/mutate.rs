//! Mutations that know the encoding of a sparse file and the integers of the formats.

use formats::Format;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::encoding::Input;
use crate::structures::hot_places;

/// One to four mutations of an input of the `open` target; `None` when it is too short to be one, or got longer than
/// `max_len` bytes.
pub fn mutate(data: &[u8], max_len: usize, seed: u32) -> Option<Vec<u8>> {
    let mut random = ChaCha8Rng::seed_from_u64(seed.into());
    let mut input = Input::decode(data)?;
    for _ in 0..random.random_range(1..=4) {
        mutate_once(&mut input, &mut random);
    }
    let out = input.encode();
    (out.len() <= max_len).then_some(out)
}

fn mutate_once(input: &mut Input, random: &mut ChaCha8Rng) {
    match random.random_range(0..20) {
        0..11 => change_integer(input, random),
        11..13 => {
            if let Some(bytes) = some_piece(input, random) {
                let at = random.random_range(0..bytes.len());
                bytes[at] ^= 1 << random.random_range(0..8);
            }
        }
        13 => input.len = another_length(input, random),
        14 => copy_words(input, random),
        15 => copy_piece(input, random),
        16 => insert_piece(input, random),
        17 => {
            if !input.pieces.is_empty() {
                input.pieces.remove(random.random_range(0..input.pieces.len()));
            }
        }
        18 => {
            if let Some(at) = (0..input.pieces.len()).collect::<Vec<_>>().choose(random) {
                let offset = &mut input.pieces[*at].0;
                *offset = shifted(*offset, random);
            }
        }
        _ => {
            // The format stays: nothing of one means anything in the other.
            input.flags = input.flags & 1 | (random.random_range(0..4) << 1);
            input.choices = random.random();
        }
    }
}

fn some_piece<'a>(input: &'a mut Input, random: &mut ChaCha8Rng) -> Option<&'a mut Vec<u8>> {
    let filled: Vec<usize> = (0..input.pieces.len()).filter(|n| !input.pieces[*n].1.is_empty()).collect();
    filled.choose(random).map(|n| &mut input.pieces[*n].1)
}

fn shifted(offset: u64, random: &mut ChaCha8Rng) -> u64 {
    let step = *[1, 4, 8, 32, 512, 4096, 64 << 10, 1 << 20].choose(random).unwrap_or(&1);
    let place = if random.random() { offset.wrapping_add(step) } else { offset.wrapping_sub(step) };
    place & ((1 << 48) - 1)
}

fn another_length(input: &Input, random: &mut ChaCha8Rng) -> u64 {
    match random.random_range(0..5) {
        0 => input.pieces.choose(random).map_or(0, |(offset, bytes)| offset + bytes.len() as u64),
        1 => input.len.next_multiple_of(1 << 20),
        2 => 1 << random.random_range(9..41),
        _ => shifted(input.len, random),
    }
}

/// Sets an aligned integer to something interesting.
fn change_integer(input: &mut Input, random: &mut ChaCha8Rng) {
    let (big_endian, len) = (input.format() == Format::Vhd, input.len);
    let width = *[1, 2, 4, 4, 8, 8].choose(random).unwrap_or(&4);
    let Some(other) = some_piece(input, random).map(|bytes| bytes.clone()) else { return };
    let Some(bytes) = some_piece(input, random) else { return };
    let Some(words) = (bytes.len() / width).checked_sub(1) else { return };
    let at = random.random_range(0..=words) * width;
    let word = &mut bytes[at..at + width];
    let read = |word: &[u8]| {
        let fold = |n: u64, b: &u8| n << 8 | u64::from(*b);
        if big_endian { word.iter().fold(0, fold) } else { word.iter().rev().fold(0, fold) }
    };
    let old = read(word);
    let new = match random.random_range(0..12) {
        0 => 0,
        1 => 1,
        2 => u64::MAX,
        3 => 1 << random.random_range(0..64),
        4 => (1_u64 << random.random_range(0..64)).wrapping_sub(1),
        5 => shifted(old, random),
        6 => old.wrapping_mul(2),
        7 => old / 2,
        8 => shifted(len, random),
        9 => random.random_range(0..300) << *[0, 9, 12, 20].choose(random).unwrap_or(&0),
        // A BAT entry of a VHDX, a sector number of a VHD.
        10 => random.random_range(0..40) << 20 | random.random_range(0..8),
        _ => other.chunks_exact(width).collect::<Vec<_>>().choose(random).map_or(old, |w| read(w)),
    };
    let new = if big_endian {
        new.to_be_bytes()[8 - width..].to_vec()
    } else {
        new.to_le_bytes()[..width].to_vec()
    };
    word.copy_from_slice(&new);
}

/// Copies some words of a piece over others of the same or another one.
fn copy_words(input: &mut Input, random: &mut ChaCha8Rng) {
    let unit = *[4, 8, 32].choose(random).unwrap_or(&8);
    let Some(from) = some_piece(input, random).map(|bytes| bytes.clone()) else { return };
    let Some(to) = some_piece(input, random) else { return };
    let (sources, targets) = (from.len() / unit, to.len() / unit);
    if sources == 0 || targets == 0 {
        return;
    }
    let (s, t) = (random.random_range(0..sources), random.random_range(0..targets));
    let n = random.random_range(1..=4_usize).min(sources - s).min(targets - t);
    to[t * unit..(t + n) * unit].copy_from_slice(&from[s * unit..(s + n) * unit]);
}

/// Puts a copy of a piece near another place.
fn copy_piece(input: &mut Input, random: &mut ChaCha8Rng) {
    let Some((offset, bytes)) = input.pieces.choose(random).cloned() else { return };
    let place = if random.random() { offset } else { input.pieces.choose(random).map_or(0, |p| p.0) };
    input.pieces.push((shifted(place, random), bytes));
}

/// Puts a few bytes into or behind a structure.
fn insert_piece(input: &mut Input, random: &mut ChaCha8Rng) {
    let mut file = input.contents();
    crate::structures::mend(&mut file, input.format(), input.mend());
    let Some(start) = hot_places(&file, input.format()).choose(random).copied() else { return };
    let at = start + random.random_range(0..128_u64) * *[1, 4, 8, 32].choose(random).unwrap_or(&8);
    let bytes = (0..random.random_range(1..=32)).map(|_| if random.random() { 0 } else { random.random() });
    let bytes = bytes.collect();
    input.pieces.push((at, bytes));
}
