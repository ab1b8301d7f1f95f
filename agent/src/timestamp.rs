//! The time that a line says it is of.
//!
//! Lines of a log come in the order of time, or nearly: the text of a line's time is that of the line before, but for
//! the seconds. So a time that was parsed is kept together with the place of its seconds (and of a fraction behind
//! them); as long as all other bytes stay the same, only those digits are read. Where the seconds are in the text is
//! found out by trying: other digits are put there, and the whole text must parse to the time that they would mean.
//!
//! A time is believed if it is at most [`MAX_AHEAD_MS`] ahead of this machine's clock and at most [`MAX_BEHIND_MS`]
//! behind.

use jiff::Timestamp;
use jiff::fmt::strtime::BrokenDownTime;
use jiff::tz::TimeZone;
use memchr::memmem::Finder;

use crate::config::{TimeFormat, TimestampOptions};

/// How far ahead of the clock a time is believed: one day, for clocks that are wrong and zones that are mistaken.
pub const MAX_AHEAD_MS: i64 = 86_400_000;

/// How far behind the clock a time is believed: ten years, for old logs that are shipped late.
pub const MAX_BEHIND_MS: i64 = 3653 * 86_400_000;

/// How far into a line the text before the time is looked for.
const SEARCH_BYTES: usize = 4096;

/// The longest text of a time that is remembered.
const REMEMBERED_BYTES: usize = 64;

/// What a line says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineTime {
    /// Milliseconds since 1970.
    At(i64),
    /// Nothing: it belongs to the line before.
    None,
    /// A time that can't be: not to be believed.
    Implausible,
}

/// Reads the times of lines.
///
/// What it remembers only saves time: what it says of a line does not depend on the lines before.
pub struct TimeReader {
    formats: Vec<Format>,
    after: Option<Finder<'static>>,
    timezone: TimeZone,
    last: Option<Remembered>,
}

impl std::fmt::Debug for TimeReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TimeReader").field("formats", &self.formats).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone)]
enum Format {
    Strptime(String),
    /// Seconds since 1970, with a fraction if there is one.
    UnixSeconds,
    UnixMs,
}

/// A time as it was written, and where its seconds are.
#[derive(Debug, Clone)]
struct Remembered {
    text: [u8; REMEMBERED_BYTES],
    len: usize,
    /// The time with seconds and fraction zero.
    minute_ms: i64,
    /// Where the two digits of the seconds are.
    seconds_at: usize,
    /// Digits of a fraction that follows the seconds and one more character.
    fraction_digits: usize,
    /// What followed.
    behind: [u8; 2],
}

/// What kinds of characters follow a time that ends at `end`.
fn behind(line: &[u8], end: usize) -> [u8; 2] {
    [end, end + 1].map(|at| match line.get(at) {
        Some(b'0'..=b'9') => b'0',
        Some(mark @ (b'.' | b',')) => *mark,
        _ => b' ',
    })
}

impl Remembered {
    fn tail_at(&self) -> usize {
        match self.fraction_digits {
            0 => self.seconds_at + 2,
            digits => self.seconds_at + 3 + digits,
        }
    }

    fn read(&self, line: &[u8]) -> Option<i64> {
        let text = line.get(..self.len)?;
        let (head, tail_at) = (self.seconds_at, self.tail_at());
        if tail_at == self.len && behind(line, self.len) != self.behind {
            // Where nothing else ends a time, more digits or a fraction may belong to it.
            return None;
        }
        if text[..head] != self.text[..head] || text[tail_at..] != self.text[tail_at..self.len] {
            return None;
        }
        let [tens, ones] = [text[head].wrapping_sub(b'0'), text[head + 1].wrapping_sub(b'0')];
        if tens > 5 || ones > 9 {
            return None;
        }
        let mut ms = self.minute_ms + i64::from(tens * 10 + ones) * 1000;
        if self.fraction_digits > 0 {
            if text[head + 2] != self.text[head + 2] {
                return None;
            }
            ms += fraction_ms(&text[head + 3..tail_at])?;
        }
        Some(ms)
    }
}

/// The milliseconds of a fraction's digits.
fn fraction_ms(digits: &[u8]) -> Option<i64> {
    let mut ms = 0;
    for (n, weight) in [100, 10, 1].into_iter().enumerate() {
        let Some(digit) = digits.get(n) else { break };
        if !digit.is_ascii_digit() {
            return None;
        }
        ms += i64::from(digit - b'0') * weight;
    }
    digits.iter().all(u8::is_ascii_digit).then_some(ms)
}

impl TimeReader {
    /// A reader for these options.
    #[must_use]
    pub fn new(options: &TimestampOptions) -> Self {
        let formats = options.formats.iter().map(|format| match format {
            TimeFormat::UnixMs => Format::UnixMs,
            TimeFormat::Strptime(format) if matches!(format.as_str(), "%s" | "%s.%f" | "%s%.f" | "%s.%3f") => {
                Format::UnixSeconds
            }
            TimeFormat::Strptime(format) => Format::Strptime(format.clone()),
        });
        Self {
            formats: formats.collect(),
            after: (!options.after.is_empty()).then(|| Finder::new(&options.after).into_owned()),
            timezone: options.timezone.clone(),
            last: None,
        }
    }

    /// The time of `line`, by a clock that shows `now_ms`.
    #[inline]
    pub fn read(&mut self, line: &[u8], now_ms: i64) -> LineTime {
        let text = match &self.after {
            None => line,
            Some(after) => match after.find(&line[..line.len().min(SEARCH_BYTES)]) {
                Some(at) => &line[at + after.needle().len()..],
                None => return LineTime::None,
            },
        };
        let known = self.last.as_ref().and_then(|last| last.read(text));
        match known.or_else(|| self.parse(text, now_ms)) {
            None => LineTime::None,
            Some(ms) if ms > now_ms.saturating_add(MAX_AHEAD_MS) || ms < now_ms.saturating_sub(MAX_BEHIND_MS) => {
                LineTime::Implausible
            }
            Some(ms) => LineTime::At(ms),
        }
    }

    #[cold]
    fn parse(&mut self, text: &[u8], now_ms: i64) -> Option<i64> {
        for format in &self.formats {
            match format {
                Format::UnixMs | Format::UnixSeconds => {
                    if let Some(ms) = unix_time(text, matches!(format, Format::UnixMs)) {
                        return Some(ms);
                    }
                }
                Format::Strptime(format) => {
                    if let Some((ms, len)) = strptime(format, text, &self.timezone, now_ms) {
                        if let Some(last) = remember(format, text, len, ms, &self.timezone, now_ms) {
                            self.last = Some(last);
                        }
                        return Some(ms);
                    }
                }
            }
        }
        None
    }
}

/// A number of milliseconds or seconds since 1970 at the beginning of `text`.
fn unix_time(text: &[u8], milliseconds: bool) -> Option<i64> {
    let len = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    // 18 digits fit, and are more than any time has.
    if !(1..=18).contains(&len) {
        return None;
    }
    let number = text[..len].iter().fold(0_i64, |number, digit| number * 10 + i64::from(digit - b'0'));
    if milliseconds {
        return Some(number);
    }
    let fraction = match text.get(len) {
        Some(b'.' | b',') => {
            let digits = &text[len + 1..];
            let end = digits.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(digits.len());
            fraction_ms(&digits[..end]).unwrap_or(0)
        }
        _ => 0,
    };
    number.checked_mul(1000)?.checked_add(fraction)
}

/// The time at the beginning of `text`, and how many bytes it takes.
fn strptime(format: &str, text: &[u8], timezone: &TimeZone, now_ms: i64) -> Option<(i64, usize)> {
    let (mut parsed, len) = BrokenDownTime::parse_prefix(format, text).ok()?;
    if let Ok(time) = parsed.to_timestamp() {
        return Some((time.as_millisecond(), len));
    }
    let zoned = |parsed: &BrokenDownTime| {
        let civil = parsed.to_datetime().ok()?;
        match parsed.offset() {
            Some(offset) => Some(offset.to_timestamp(civil).ok()?.as_millisecond()),
            None => Some(timezone.to_ambiguous_timestamp(civil).compatible().ok()?.as_millisecond()),
        }
    };
    if parsed.year().is_some() {
        return Some((zoned(&parsed)?, len));
    }
    // Without a year, the one that makes it nearest to now: a line of December is read in January, too.
    let this_year = timezone.to_datetime(Timestamp::from_millisecond(now_ms).ok()?).year();
    let mut nearest: Option<i64> = None;
    for year in [this_year - 1, this_year, this_year + 1] {
        let Some(ms) = parsed.set_year(Some(year)).ok().and_then(|()| zoned(&parsed)) else { continue };
        if nearest.is_none_or(|other| (ms - now_ms).abs() < (other - now_ms).abs()) {
            nearest = Some(ms);
        }
    }
    Some((nearest?, len))
}

/// Finds the seconds in the text of `len` bytes at the beginning of `line`, which means `ms`, by trying what other digits there would mean.
fn remember(format: &str, line: &[u8], len: usize, ms: i64, timezone: &TimeZone, now_ms: i64) -> Option<Remembered> {
    let text = &line[..len];
    let mut copy = [0; REMEMBERED_BYTES];
    copy.get_mut(..len)?.copy_from_slice(text);
    let second = u8::try_from(ms.div_euclid(1000).rem_euclid(60)).expect("less than 60");
    let other = (second + 7) % 60;
    let digits = |number: u8| [b'0' + number / 10, b'0' + number % 10];
    let means = |text: &[u8; REMEMBERED_BYTES], wanted: i64| {
        strptime(format, &text[..len], timezone, now_ms) == Some((wanted, len))
    };
    for seconds_at in 0..len.saturating_sub(1) {
        if text[seconds_at..seconds_at + 2] != digits(second) {
            continue;
        }
        let mut tried = copy;
        tried[seconds_at..seconds_at + 2].copy_from_slice(&digits(other));
        if !means(&tried, ms + (i64::from(other) - i64::from(second)) * 1000) {
            continue;
        }
        let mut found = Remembered {
            text: copy,
            len,
            minute_ms: ms - ms.rem_euclid(1000) - i64::from(second) * 1000,
            seconds_at,
            fraction_digits: 0,
            behind: behind(line, len),
        };
        if let Some(b'.' | b',') = text.get(seconds_at + 2) {
            let behind = &text[seconds_at + 3..];
            let digits = behind.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(behind.len());
            // Nines, and a time that they mean: these digits are the fraction.
            tried = copy;
            tried[seconds_at + 3..seconds_at + 3 + digits].fill(b'9');
            let nines = fraction_ms(&tried[seconds_at + 3..seconds_at + 3 + digits])?;
            if digits > 0 && means(&tried, ms - ms.rem_euclid(1000) + nines) {
                found.fraction_digits = digits;
            }
        }
        return (found.read(line) == Some(ms)).then_some(found);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::fmt::strtime;
    use proptest::prelude::*;

    /// 2026-11-22T20:15:31Z
    const NOW_MS: i64 = 1_795_378_531_000;

    fn reader(formats: &[&str], after: &str, timezone: &str) -> TimeReader {
        let formats = formats.iter().map(|format| match *format {
            "unix_ms" => TimeFormat::UnixMs,
            format => TimeFormat::Strptime(format.to_owned()),
        });
        TimeReader::new(&TimestampOptions {
            formats: formats.collect(),
            after: after.to_owned().into(),
            timezone: TimeZone::get(timezone).expect("a time zone"),
        })
    }

    fn at(time: &str) -> LineTime {
        LineTime::At(time.parse::<Timestamp>().expect("a time").as_millisecond())
    }

    #[test]
    fn the_time_stands_behind_the_given_text() {
        let mut nginx = reader(&["%d/%b/%Y:%H:%M:%S %z"], "[", "UTC");
        let line = b"10.0.0.1 - - [22/Nov/2026:21:15:31 +0100] \"GET /[22/Nov/2020 HTTP/1.1\" 200\n";
        assert_eq!(nginx.read(line, NOW_MS), at("2026-11-22T20:15:31Z"));
        assert_eq!(nginx.read(b"10.0.0.1 - - [22/Nov/2026:21:15:59 +0100] x", NOW_MS), at("2026-11-22T20:15:59Z"));
        assert_eq!(nginx.read(b"10.0.0.1 - - [22/Nov/2026:21:15:59 -0100] x", NOW_MS), at("2026-11-22T22:15:59Z"));
        assert_eq!(nginx.read(b"10.0.0.1 - - [22/Nov/2026:21:15:61 +0100] x", NOW_MS), LineTime::None);
        assert_eq!(nginx.read(b"no bracket", NOW_MS), LineTime::None);
        assert_eq!(nginx.read(b"", NOW_MS), LineTime::None);
    }

    #[test]
    fn a_time_without_an_offset_is_of_the_configured_zone() {
        let mut berlin = reader(&["%Y-%m-%d %H:%M:%S,%3f"], "", "Europe/Berlin");
        assert_eq!(berlin.read(b"2026-11-22 21:15:31,250 INFO x", NOW_MS), at("2026-11-22T20:15:31.250Z"));
        assert_eq!(berlin.read(b"2026-11-22 21:15:32,999 INFO x", NOW_MS), at("2026-11-22T20:15:32.999Z"));
        assert_eq!(berlin.read(b"2026-07-01 21:15:32,001 INFO x", NOW_MS), at("2026-07-01T19:15:32.001Z"));
        assert_eq!(berlin.read(b"\tat com.example.Main", NOW_MS), LineTime::None);
    }

    #[test]
    fn a_time_without_a_year_is_the_nearest_one() {
        let mut syslog = reader(&["%b %d %H:%M:%S"], "", "UTC");
        assert_eq!(syslog.read(b"Nov 22 20:15:31 host x", NOW_MS), at("2026-11-22T20:15:31Z"));
        assert_eq!(syslog.read(b"Nov  2 20:15:31 host x", NOW_MS), at("2026-11-02T20:15:31Z"));
        let new_year = "2027-01-01T00:00:10Z".parse::<Timestamp>().expect("a time").as_millisecond();
        assert_eq!(syslog.read(b"Dec 31 23:59:59 host x", new_year), at("2026-12-31T23:59:59Z"));
        assert_eq!(syslog.read(b"Jan  1 00:00:09 host x", new_year), at("2027-01-01T00:00:09Z"));
    }

    #[test]
    fn seconds_and_milliseconds_since_1970_are_times() {
        let mut seconds = reader(&["%s"], "", "UTC");
        assert_eq!(seconds.read(b"1795378531 x", NOW_MS), LineTime::At(NOW_MS));
        assert_eq!(seconds.read(b"1795378531.25 x", NOW_MS), LineTime::At(NOW_MS + 250));
        assert_eq!(seconds.read(b"99999999999999999999 x", NOW_MS), LineTime::None);
        let mut ms = reader(&["unix_ms"], "ts=", "UTC");
        assert_eq!(ms.read(b"level=info ts=1795378531007 msg=x", NOW_MS), LineTime::At(NOW_MS + 7));
    }

    #[test]
    fn the_first_format_that_fits_counts() {
        let mut two = reader(&["%Y-%m-%dT%H:%M:%S%.f%:z", "%Y-%m-%d %H:%M:%S"], "", "UTC");
        for (line, time) in [
            ("2026-11-22T20:15:31.5+00:00 x", "2026-11-22T20:15:31.5Z"),
            ("2026-11-22 20:15:32 x", "2026-11-22T20:15:32Z"),
            ("2026-11-22T20:15:33.75+00:00 x", "2026-11-22T20:15:33.75Z"),
        ] {
            assert_eq!(two.read(line.as_bytes(), NOW_MS), at(time), "{line}");
        }
    }

    #[test]
    fn an_absurd_time_is_not_believed() {
        let mut reader = reader(&["%Y-%m-%d %H:%M:%S"], "", "UTC");
        assert_eq!(reader.read(b"2026-11-23 20:15:31", NOW_MS), at("2026-11-23T20:15:31Z"));
        assert_eq!(reader.read(b"2026-11-23 20:15:32", NOW_MS), LineTime::Implausible);
        assert_eq!(reader.read(b"1970-01-01 00:00:00", NOW_MS), LineTime::Implausible);
    }

    #[test]
    fn the_place_of_the_seconds_is_found_whatever_the_format() {
        for format in ["%d/%b/%Y:%H:%M:%S %z", "%Y-%m-%dT%H:%M:%S%.6f%:z", "%S %M %H %d %m %Y", "%Y%m%d%H%M%S"] {
            let mut reader = reader(&[format], "", "UTC");
            let time = "2026-11-22T20:22:20.125Z".parse::<Timestamp>().expect("a time").to_zoned(TimeZone::UTC);
            let text = strtime::format(format, &time).expect("formats");
            reader.read(text.as_bytes(), NOW_MS);
            let last = reader.last.expect("remembered");
            assert_eq!(last.minute_ms, time.timestamp().as_millisecond() - 20_125, "{format}");
        }
    }

    proptest! {
        /// What is remembered never changes what is said.
        #[test]
        fn a_reader_that_remembers_says_what_a_fresh_one_says(
            format in 0_usize..6,
            steps in proptest::collection::vec((0_i64..200_000, 0_u8..10), 1..60),
        ) {
            let format = [
                "%d/%b/%Y:%H:%M:%S %z", "%Y-%m-%dT%H:%M:%S%.f%:z", "%b %e %H:%M:%S", "%Y-%m-%d %I:%M:%S %p", "%S.%M %H %d %m %Y",
                "%Y-%m-%d %H:%M:%S%.f",
            ][format];
            let mut remembering = reader(&[format], "", "Europe/Berlin");
            let mut ms = NOW_MS;
            for (step, odd) in steps {
                ms += step - 60_000;
                let time = Timestamp::from_millisecond(ms).expect("a time").to_zoned(TimeZone::UTC);
                let mut text = strtime::format(format, &time).expect("formats").into_bytes();
                match odd {
                    0 => text.truncate(text.len() / 2),
                    1 => { let at = step as usize % text.len(); text[at] = b'7'; }
                    _ => text.extend_from_slice(b" message"),
                }
                let fresh = reader(&[format], "", "Europe/Berlin").read(&text, NOW_MS);
                prop_assert_eq!(remembering.read(&text, NOW_MS), fresh, "{}", String::from_utf8_lossy(&text));
            }
        }
    }
}
