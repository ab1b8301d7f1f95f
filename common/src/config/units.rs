//! Sizes and durations with their units.

use std::time::Duration;

use bytesize::ByteSize;
use jiff::SpanRelativeTo;
use jiff::fmt::friendly::SpanParser;

/// The size in bytes that a text such as `64 MiB`, `1.5GB` or `100 B` says.
///
/// `KiB`, `MiB`, `GiB`, `TiB` are powers of 1,024; `kB`, `MB`, `GB`, `TB` are powers of 1,000. The unit is needed.
///
/// # Errors
/// What is wrong with the text, to be followed by what to write.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    if text.ends_with(|last: char| last.is_ascii_digit() || last == '.') {
        return Err(format!("the size {text:?} has no unit"));
    }
    text.parse::<ByteSize>().map(|size| size.as_u64()).map_err(|_| format!("{text:?} is not a size"))
}

/// The duration that a text such as `250ms`, `5m`, `1h 30m` or `7d` says. A day is 24 hours. The unit is needed.
///
/// # Errors
/// What is wrong with the text, to be followed by what to write.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    static PARSER: SpanParser = SpanParser::new();
    let text = text.trim();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        return Err(format!("the duration {text:?} has no unit"));
    }
    let wrong = || format!("{text:?} is not a duration");
    let span = PARSER.parse_span(text).map_err(|_| wrong())?;
    let duration = span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_| wrong())?;
    Duration::try_from(duration).map_err(|_| format!("the duration {text:?} is negative"))
}

/// The shortest exact way to write a size: `64 MiB`, `1000 B`.
#[must_use]
pub fn show_size(bytes: u64) -> String {
    const UNITS: [(u64, &str); 4] =
        [(bytesize::TIB, "TiB"), (bytesize::GIB, "GiB"), (bytesize::MIB, "MiB"), (bytesize::KIB, "KiB")];
    match UNITS.iter().find(|(unit, _)| bytes >= *unit && bytes.is_multiple_of(*unit)) {
        Some((unit, name)) => format!("{} {name}", bytes / unit),
        None => format!("{bytes} B"),
    }
}

/// The shortest exact way to write a duration: `30d`, `1m 30s`, `250ms`.
#[must_use]
pub fn show_duration(duration: Duration) -> String {
    const UNITS: [(u128, &str); 7] = [
        (86_400_000_000_000, "d"),
        (3_600_000_000_000, "h"),
        (60_000_000_000, "m"),
        (1_000_000_000, "s"),
        (1_000_000, "ms"),
        (1_000, "us"),
        (1, "ns"),
    ];
    let mut rest = duration.as_nanos();
    let mut parts = Vec::new();
    for (unit, name) in UNITS {
        if rest >= unit {
            parts.push(format!("{}{name}", rest / unit));
            rest %= unit;
        }
    }
    if parts.is_empty() { "0s".to_owned() } else { parts.join(" ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_need_their_unit() {
        assert_eq!(parse_size("64 MiB"), Ok(64 << 20));
        assert_eq!(parse_size("64MB"), Ok(64_000_000));
        assert_eq!(parse_size("1.5 GiB"), Ok(3 << 29));
        assert_eq!(parse_size("0 B"), Ok(0));
        for bad in ["64", "6.4", "", "MiB", "-1 MiB", "1 MiBB", "a lot", "1 m/s"] {
            assert!(parse_size(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn durations_need_their_unit() {
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_duration("1h 30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("7d"), Ok(Duration::from_secs(7 * 86_400)));
        assert_eq!(parse_duration("0s"), Ok(Duration::ZERO));
        for bad in ["5", "0.5", "", "m", "-5m", "5m ago", "5 parsecs", "1y", "1mo", "soon"] {
            assert!(parse_duration(bad).is_err(), "{bad:?} was accepted");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_reads_back(nanos in 0_u64..=u64::MAX / 2, bytes in 0_u64..1 << 50) {
            let duration = Duration::from_nanos(nanos);
            prop_assert_eq!(parse_duration(&show_duration(duration)), Ok(duration));
            prop_assert_eq!(parse_size(&show_size(bytes)), Ok(bytes));
        }
    }
}
