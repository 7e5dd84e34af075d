//! Sizes as they are typed and printed: powers of 1024.

/// One GiB.
pub const GIB: u64 = 1 << 30;
/// One MiB.
pub const MIB: u64 = 1 << 20;

/// Bytes from `512`, `64K`, `4G`; not 0, and a multiple of 512.
///
/// # Errors
/// A sentence that says what is understood.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let hint = || format!("`{text}` is no size: give a whole number with K, M, G or T, such as 4G");
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let number: u64 = text[..digits].parse().map_err(|_| hint())?;
    let shift = match text[digits..].to_ascii_uppercase().as_str() {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(hint()),
    };
    let bytes =
        number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is more than 64 bits can hold"))?;
    if bytes == 0 || !bytes.is_multiple_of(512) {
        return Err(format!("{text} is no size of a disk: a multiple of 512 bytes is, and not 0"));
    }
    Ok(bytes)
}

/// `4 GiB`, `1.5 MiB`, `512 B`.
pub fn show_size(bytes: u64) -> String {
    let (unit, name) = match bytes {
        b if b >= 1 << 40 => (1u64 << 40, "TiB"),
        b if b >= GIB => (GIB, "GiB"),
        b if b >= MIB => (MIB, "MiB"),
        b if b >= 1 << 10 => (1 << 10, "KiB"),
        _ => return format!("{bytes} B"),
    };
    let value = bytes as f64 / unit as f64;
    if bytes.is_multiple_of(unit) { format!("{value:.0} {name}") } else { format!("{value:.2} {name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(parse_size("4G"), Ok(4 << 30));
        assert_eq!(parse_size("64k"), Ok(65536));
        assert_eq!(parse_size("512"), Ok(512));
        for wrong in ["", "G", "4X", "-1", "4.5G", "0", "100", "99999999999T"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_largest_unit_that_they_fill() {
        assert_eq!(show_size(4 << 30), "4 GiB");
        assert_eq!(show_size(3 << 19), "1.50 MiB");
        assert_eq!(show_size(100), "100 B");
    }
}
