//! What the test guest is asked to do.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::layout;

/// In which order pages are visited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// By address.
    Sequential,
    /// Each page once a lap, in an order that differs from lap to lap.
    Random,
    /// Not at all.
    Idle,
}

/// How much of a page is written and verified on a visit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fill {
    /// Its first and last 8 bytes, and 8 more that change from lap to lap.
    Line,
    /// All of it.
    Full,
}

/// What is done with each disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DiskOptions {
    /// Bytes from the start of the disk that are used, a multiple of 4096; or all of the disk where it is smaller. The content is lost.
    pub range_bytes: u64,
    /// Requests in flight in each queue, 1 to 64.
    pub depth: u32,
    /// Queues to use where the disk has so many, 1 to 8.
    pub queues: u32,
    /// Of a hundred requests so many are writes, 0 to 100. With 0 nothing can be verified.
    pub write_percent: u32,
    /// A flush after so many writes; 0 for none.
    pub flush_every: u32,
}

/// What the test guest is asked to do. The text form is `selftest[,KEY=VALUE]...` with the keys `working-set`, `rate`, `pattern`,
/// `fill`, `report-ms`, `seed`, `disk-range`, `depth`, `queues`, `writes` and `flush-every`; sizes may end in K, M, G or T
/// (powers of 1024).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SelftestOptions {
    /// Bytes of memory that are visited, by all processors together, rounded down to pages; 0 for nearly all there is.
    pub working_set_bytes: u64,
    /// Bytes visited per second by all processors together, 4096 for each page; 0 for as many as can be.
    pub rate_bytes_per_s: u64,
    /// In which order.
    pub pattern: Pattern,
    /// How much of each page.
    pub fill: Fill,
    /// What is done with each disk.
    pub disk: DiskOptions,
    /// Milliseconds between two periodic writes to [`super::REPORT_PORT`]; 0 for none.
    pub report_ms: u32,
    /// Goes into all that is written: with another seed an earlier run's data on a disk is told apart.
    pub seed: u64,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self { range_bytes: 64 << 20, depth: 16, queues: 1, write_percent: 70, flush_every: 64 }
    }
}

impl Default for SelftestOptions {
    fn default() -> Self {
        Self {
            working_set_bytes: 0,
            rate_bytes_per_s: 0,
            pattern: Pattern::Sequential,
            fill: Fill::Line,
            disk: DiskOptions::default(),
            report_ms: 1000,
            seed: 1,
        }
    }
}

impl SelftestOptions {
    /// Whether everything is in its range.
    ///
    /// # Errors
    /// The first option that is not, in words.
    pub fn validate(&self) -> Result<(), String> {
        let in_range = |key: &str, value: u64, min: u64, max: u64| {
            if (min..=max).contains(&value) {
                return Ok(());
            }
            Err(format!("{key}={value} of the test guest is out of range; use {min} to {max}"))
        };
        in_range("depth", self.disk.depth.into(), 1, layout::DEPTH_MAX as u64)?;
        in_range("queues", self.disk.queues.into(), 1, layout::QUEUES_MAX as u64)?;
        in_range("writes", self.disk.write_percent.into(), 0, 100)?;
        in_range("disk-range", self.disk.range_bytes, layout::PAGE, 1 << 40)?;
        in_range("rate", self.rate_bytes_per_s, 0, 1 << 50)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "working-set" => self.working_set_bytes = size(key, value)?,
            "rate" => self.rate_bytes_per_s = size(key, value.strip_suffix("/s").unwrap_or(value))?,
            "pattern" => {
                self.pattern = match value {
                    "sequential" => Pattern::Sequential,
                    "random" => Pattern::Random,
                    "idle" => Pattern::Idle,
                    _ => return Err(format!("pattern={value} is unknown; use sequential, random or idle")),
                }
            }
            "fill" => {
                self.fill = match value {
                    "line" => Fill::Line,
                    "full" => Fill::Full,
                    _ => return Err(format!("fill={value} is unknown; use line or full")),
                }
            }
            "disk-range" => self.disk.range_bytes = size(key, value)?,
            "depth" => self.disk.depth = number(key, value)?,
            "queues" => self.disk.queues = number(key, value)?,
            "writes" => self.disk.write_percent = number(key, value)?,
            "flush-every" => self.disk.flush_every = number(key, value)?,
            "report-ms" => self.report_ms = number(key, value)?,
            "seed" => self.seed = number(key, value)?,
            _ => {
                return Err(format!(
                    "the test guest has no option `{key}`; it has working-set, rate, pattern, fill, report-ms, seed, \
                     disk-range, depth, queues, writes and flush-every"
                ));
            }
        }
        Ok(())
    }
}

impl FromStr for SelftestOptions {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        if name != "selftest" {
            return Err(format!("there is no built-in guest `{name}`; use selftest[,KEY=VALUE]..."));
        }
        let mut options = Self::default();
        for part in parts {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| format!("`{part}` of the test guest has no value; use {part}=VALUE"))?;
            options.set(key, value)?;
        }
        options.validate()?;
        Ok(options)
    }
}

/// The text form, complete: parsing it gives the same options.
impl fmt::Display for SelftestOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pattern = match self.pattern {
            Pattern::Sequential => "sequential",
            Pattern::Random => "random",
            Pattern::Idle => "idle",
        };
        let fill = match self.fill {
            Fill::Line => "line",
            Fill::Full => "full",
        };
        let (working_set, rate) = (self.working_set_bytes, self.rate_bytes_per_s);
        write!(f, "selftest,working-set={working_set},rate={rate},pattern={pattern},fill={fill}")?;
        write!(f, ",report-ms={},seed={}", self.report_ms, self.seed)?;
        let DiskOptions { range_bytes, depth, queues, write_percent, flush_every } = self.disk;
        write!(f, ",disk-range={range_bytes},depth={depth},queues={queues}")?;
        write!(f, ",writes={write_percent},flush-every={flush_every}")
    }
}

fn number<T: FromStr>(key: &str, value: &str) -> Result<T, String> {
    value
        .parse()
        .map_err(|_| format!("{key}={value} of the test guest is not a number that fits; use digits only"))
}

fn size(key: &str, value: &str) -> Result<u64, String> {
    let (digits, shift) = match value.as_bytes().last() {
        Some(b'K' | b'k') => (&value[..value.len() - 1], 10),
        Some(b'M' | b'm') => (&value[..value.len() - 1], 20),
        Some(b'G' | b'g') => (&value[..value.len() - 1], 30),
        Some(b'T' | b't') => (&value[..value.len() - 1], 40),
        _ => (value, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("{key}={value} of the test guest is not a size; use one such as 128M"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_name_alone_means_the_defaults() {
        assert_eq!("selftest".parse(), Ok(SelftestOptions::default()));
    }

    #[test]
    fn every_option_can_be_written() {
        let text = "selftest,working-set=128M,rate=100M/s,pattern=random,fill=full,depth=32,queues=2,disk-range=1G,writes=50,\
                    flush-every=0,report-ms=200,seed=7";
        let disk =
            DiskOptions { range_bytes: 1 << 30, depth: 32, queues: 2, write_percent: 50, flush_every: 0 };
        let expected = SelftestOptions {
            working_set_bytes: 128 << 20,
            rate_bytes_per_s: 100 << 20,
            pattern: Pattern::Random,
            fill: Fill::Full,
            disk,
            report_ms: 200,
            seed: 7,
        };
        assert_eq!(text.parse(), Ok(expected));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, named) in [
            ("linux", "`linux`"),
            ("selftest,", "no value"),
            ("selftest,fast", "fast=VALUE"),
            ("selftest,speed=1", "`speed`"),
            ("selftest,pattern=zigzag", "zigzag"),
            ("selftest,fill=half", "half"),
            ("selftest,depth=65", "1 to 64"),
            ("selftest,depth=0", "1 to 64"),
            ("selftest,queues=9", "1 to 8"),
            ("selftest,writes=101", "0 to 100"),
            ("selftest,disk-range=1", "disk-range"),
            ("selftest,rate=1Q", "1Q"),
            ("selftest,rate=99999999999T", "99999999999T"),
            ("selftest,working-set=é", "working-set"),
            ("selftest,seed=-1", "seed=-1"),
        ] {
            let error = text.parse::<SelftestOptions>().expect_err(text);
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_as_the_same(
            numbers in (0u64..1 << 41, 0u64..1 << 50, any::<u32>(), any::<u64>()),
            disk in (4096u64..=1 << 40, 1u32..=64, 1u32..=8, 0u32..=100, any::<u32>()),
            choices in (0usize..3, any::<bool>()),
        ) {
            let options = SelftestOptions {
                working_set_bytes: numbers.0,
                rate_bytes_per_s: numbers.1,
                pattern: [Pattern::Sequential, Pattern::Random, Pattern::Idle][choices.0],
                fill: if choices.1 { Fill::Full } else { Fill::Line },
                disk: DiskOptions {
                    range_bytes: disk.0, depth: disk.1, queues: disk.2, write_percent: disk.3, flush_every: disk.4,
                },
                report_ms: numbers.2,
                seed: numbers.3,
            };
            prop_assert_eq!(options.to_string().parse(), Ok(options));
        }

        #[test]
        fn no_text_makes_it_panic(text in "(selftest)?(,[a-z-]{0,12}=?.{0,8}){0,4}") {
            let _ = text.parse::<SelftestOptions>();
        }
    }
}
