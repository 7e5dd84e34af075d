//! Sizes, rates and times as people type them: whole numbers, sizes in powers of 1024.

/// Bytes from `512`, `64K`, `10G`; `KiB`, `kb` and the like are understood too.
///
/// # Errors
/// A sentence that says what is understood; also when the number does not fit in 64 bits.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let hint =
        || format!("`{text}` is no size; give bytes or a whole number with K, M, G, T or P, such as 10G");
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let number: u64 = match text[..digits].parse() {
        Ok(number) => number,
        Err(_) if digits > 0 => return Err(format!("{text} is more than 64 bits can hold")),
        Err(_) => return Err(hint()),
    };
    let unit = text[digits..].trim_start().to_ascii_lowercase();
    let power = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" if matches!(unit.as_str(), "" | "b") => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return Err(hint()),
    };
    1024u64
        .checked_pow(power)
        .and_then(|factor| number.checked_mul(factor))
        .ok_or_else(|| format!("{text} is more than 64 bits can hold"))
}

/// A size that an image can have: not nothing.
pub(crate) fn parse_nonzero_size(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        0 => Err("the size must be at least one sector".into()),
        size => Ok(size),
    }
}

/// A block size: what a 32-bit field can hold.
pub(crate) fn parse_block_size(text: &str) -> Result<u32, String> {
    let size = parse_nonzero_size(text)?;
    u32::try_from(size).map_err(|_| format!("{text} is too large for a block; VHDX allows 1M to 256M"))
}

/// Bytes a second from `200M`; `200M/s` is understood too.
pub(crate) fn parse_rate(text: &str) -> Result<u64, String> {
    match parse_size(text.strip_suffix("/s").unwrap_or(text)) {
        Ok(0) => Err("a rate of 0 would never end; leave the option away for no limit".into()),
        other => other,
    }
}

/// A rate, or 0 and `none` for no limit.
pub(crate) fn parse_limit(text: &str) -> Result<u64, String> {
    match text {
        "0" | "none" => Ok(0),
        _ => parse_rate(text),
    }
}

/// Microseconds from `5ms`, `500us`, `1s`. A number alone could mean any of them.
pub(crate) fn parse_time(text: &str) -> Result<u64, String> {
    match time_of(text)? {
        0 => Err("no request takes no time at all; leave the option away for no budget".into()),
        us => Ok(us),
    }
}

/// A time, or 0 and `none` for no budget.
pub(crate) fn parse_budget(text: &str) -> Result<u64, String> {
    match text {
        "0" | "none" => Ok(0),
        _ => parse_time(text),
    }
}

fn time_of(text: &str) -> Result<u64, String> {
    let hint = || format!("`{text}` is no time; give a whole number with us, ms or s, such as 5ms");
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let factor = match text[digits..].trim_start() {
        "us" | "µs" | "μs" => 1,
        "ms" => 1_000,
        "s" => 1_000_000,
        "" if text[..digits].parse() == Ok(0) => 1,
        _ => return Err(hint()),
    };
    if digits == 0 {
        return Err(hint());
    }
    let number: Option<u64> = text[..digits].parse().ok();
    number.and_then(|n| n.checked_mul(factor)).ok_or_else(|| format!("{text} is more than 64 bits can hold"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024_in_every_usual_spelling() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("64K", 64 << 10),
            ("64k", 64 << 10),
            ("64KiB", 64 << 10),
            ("64 KB", 64 << 10),
            ("200M", 200 << 20),
            ("10G", 10 << 30),
            ("64T", 64 << 40),
            ("1P", 1 << 50),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_a_hint() {
        for text in ["", "G", "-1", "1.5G", "10X", "1i", "10 10", "ten", "1Gi b", "i", "5iB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert!(parse_size("16384P").is_err_and(|e| e.contains("64 bits")));
        assert!(parse_size("99999999999999999999").is_err_and(|e| e.contains("64 bits")));
        assert!(parse_size("1Q").is_err_and(|e| e.contains("such as 10G")));
    }

    #[test]
    fn a_rate_of_nothing_is_refused_where_a_limit_of_nothing_means_none() {
        assert!(parse_rate("0").is_err());
        assert_eq!(parse_limit("0"), Ok(0));
        assert_eq!(parse_limit("none"), Ok(0));
        assert_eq!(parse_rate("200M/s"), Ok(200 << 20));
    }

    #[test]
    fn a_time_has_a_unit_and_is_more_than_nothing() {
        for (text, us) in [("500us", 500), ("80µs", 80), ("5ms", 5_000), ("5 ms", 5_000), ("2s", 2_000_000)]
        {
            assert_eq!(parse_time(text), Ok(us), "{text}");
            assert_eq!(parse_budget(text), Ok(us), "{text}");
        }
        for text in ["", "5", "ms", "1.5ms", "-5ms", "5m", "5MS", "fast", "none"] {
            assert!(parse_time(text).is_err_and(|e| e.contains("such as 5ms")), "{text}");
        }
        for text in ["0", "0ms"] {
            assert!(parse_time(text).is_err_and(|e| e.contains("leave the option away")), "{text}");
        }
        assert!(parse_time("99999999999999999999s").is_err_and(|e| e.contains("64 bits")));
        assert!(parse_time("18446744073709551615s").is_err_and(|e| e.contains("64 bits")));
        assert_eq!((parse_budget("0"), parse_budget("none")), (Ok(0), Ok(0)));
    }

    #[test]
    fn a_block_size_fits_in_32_bits() {
        assert_eq!(parse_block_size("2M"), Ok(2 << 20));
        assert!(parse_block_size("4G").is_err());
    }
}
