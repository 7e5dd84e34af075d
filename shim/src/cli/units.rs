//! Sizes, rates and times as people type them.

use std::time::Duration;

/// `512`, `64K`, `10G`: powers of 1024.
///
/// # Errors
/// A sentence, for what is no size or too large.
pub fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        other => return Err(format!("{other} is no unit; sizes are like 512, 64K, 256M, 4G")),
    };
    let number: u64 =
        digits.parse().map_err(|_| format!("{text} is no size; sizes are like 512, 64K, 256M, 4G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is too large"))
}

/// `300ms`, `5s`, `2m`.
///
/// # Errors
/// A sentence, for what is no time.
pub fn time(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 =
        digits.parse().map_err(|_| format!("{text} is no time; times are like 300ms, 5s, 2m"))?;
    match &text[digits.len()..] {
        "us" => Ok(Duration::from_micros(number)),
        "ms" => Ok(Duration::from_millis(number)),
        "s" => Ok(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs).ok_or_else(|| format!("{text} is too long")),
        _ => Err(format!("{text} has no unit that is known; times are like 300ms, 5s, 2m")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_what_people_type() {
        assert_eq!((size("512"), size("64K"), size("2G")), (Ok(512), Ok(65536), Ok(2 << 30)));
        assert!(
            size("").is_err() && size("G").is_err() && size("12Q").is_err() && size("99999999T").is_err()
        );
        assert_eq!(
            (time("300ms"), time("2m")),
            (Ok(Duration::from_millis(300)), Ok(Duration::from_secs(120)))
        );
        assert!(time("5").is_err() && time("s").is_err());
    }
}
