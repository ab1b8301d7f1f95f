//! The time that a line says it is of.
//!
//! Lines of a log come in the order of time, or nearly: the text of a line's time is that of the line before, but for
//! the seconds. So a time that was parsed is kept together with the place of its seconds (and of a fraction behind
//! them); as long as all other bytes stay the same, only those digits are read. Where the seconds are in the text is
//! found out by trying: other digits are put there, and the whole text must parse to the time that they would mean.
//!
//! A time is believed if it is at most [`MAX_AHEAD_MS`] ahead of this machine's clock and at most [`MAX_BEHIND_MS`]
//! behind. Where that clock itself can't be right, since it shows a time before [`CLOCK_IS_RIGHT_FROM_MS`], as on a
//! machine that has not heard from a time server yet, times that are not older than that are believed.
//!
//! Where a zone's clocks are set back, a local time that comes twice is taken for the first; where they are set forward, one
//! that doesn't exist is read by the offset from before. A time without a year is of that year which makes it nearest to
//! the clock.

use jiff::Timestamp;
use jiff::fmt::strtime::BrokenDownTime;
use jiff::tz::TimeZone;
use memchr::memmem::Finder;
use wide::u8x16;

use crate::config::{TimeFormat, TimestampOptions};
use crate::find;

/// How far ahead of the clock a time is believed: one day, for clocks that are wrong and zones that are mistaken.
pub const MAX_AHEAD_MS: i64 = 86_400_000;

/// How far behind the clock a time is believed: ten years, for old logs that are shipped late.
pub const MAX_BEHIND_MS: i64 = 3653 * 86_400_000;

/// A clock that shows an earlier time, 2026-01-01T00:00:00Z in milliseconds since 1970, is wrong: this program is newer.
pub const CLOCK_IS_RIGHT_FROM_MS: i64 = 1_767_225_600_000;

/// Half a year, nearly: a time that is so near to the clock is not nearer in another year.
const NEAREST_YEAR_MS: i64 = 182 * 86_400_000;

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
    place: Place,
    timezone: TimeZone,
    last: Option<Remembered>,
}

impl std::fmt::Debug for TimeReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TimeReader").field("formats", &self.formats).finish_non_exhaustive()
    }
}

/// Where in the line the time stands.
enum Place {
    Beginning,
    /// Right behind this byte.
    AfterByte(u8),
    /// Right behind these bytes.
    After(Finder<'static>),
    /// The value of the JSON field whose key this is, with its quotes.
    JsonField(Finder<'static>),
}

impl Place {
    fn of(options: &TimestampOptions) -> Self {
        match &options.json_field {
            Some(key) => Self::JsonField(Finder::new(&format!("\"{key}\"")).into_owned()),
            None => match *options.after {
                [] => Self::Beginning,
                [byte] => Self::AfterByte(byte),
                _ => Self::After(Finder::new(&options.after).into_owned()),
            },
        }
    }

    /// The line from the time on.
    #[inline]
    fn find<'a>(&self, line: &'a [u8]) -> Option<&'a [u8]> {
        let searched = &line[..line.len().min(SEARCH_BYTES)];
        match self {
            Self::Beginning => Some(line),
            Self::AfterByte(byte) => Some(&line[find::first(*byte, searched)? + 1..]),
            Self::After(after) => Some(&line[after.find(searched)? + after.needle().len()..]),
            Self::JsonField(key) => key.find_iter(searched).find_map(|at| {
                // A value that reads the same as the key has no colon behind it.
                let value = skip_spaces(skip_spaces(&line[at + key.needle().len()..]).strip_prefix(b":")?);
                Some(value.strip_prefix(b"\"").unwrap_or(value))
            }),
        }
    }
}

/// Without the white space that JSON allows within a line.
fn skip_spaces(text: &[u8]) -> &[u8] {
    let len = text.iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\r')).count();
    &text[len..]
}

#[derive(Debug, Clone)]
enum Format {
    Strptime(String, Opening),
    /// Seconds since 1970, with a fraction if there is one.
    UnixSeconds,
    UnixMs,
}

/// What texts of a format begin with: lines without a time, as those of a stack trace, are many and have to be told fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opening {
    /// White space, if any, and a digit or a sign.
    Number,
    /// A letter.
    Name,
    /// This byte.
    Literal(u8),
    /// It isn't known.
    Any,
}

impl Opening {
    fn of(format: &str) -> Self {
        let Some(directive) = format.strip_prefix('%') else {
            let first = format.bytes().next().filter(|byte| !byte.is_ascii_whitespace());
            return first.map_or(Self::Any, Self::Literal);
        };
        // Between the percent sign and the letter there may be how it is padded, and how wide it is.
        match directive.trim_start_matches(|mark: char| matches!(mark, '-' | '_' | '0'..='9')).bytes().next() {
            Some(
                b'C' | b'd' | b'D' | b'e' | b'F' | b'H' | b'I' | b'k' | b'l' | b'm' | b'M' | b'S' | b's' | b'T' | b'Y'
                | b'y',
            ) => Self::Number,
            Some(b'A' | b'a' | b'B' | b'b' | b'h') => Self::Name,
            _ => Self::Any,
        }
    }

    #[inline]
    fn fits(self, text: &[u8]) -> bool {
        match self {
            Self::Number => matches!(text.trim_ascii_start().first(), Some(b'0'..=b'9' | b'+' | b'-')),
            Self::Name => text.first().is_some_and(u8::is_ascii_alphabetic),
            Self::Literal(byte) => text.first() == Some(&byte),
            Self::Any => true,
        }
    }
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
    /// Which bits of the text, and of the two bytes behind it, are always the same where the line is of the same kind.
    same: [Same; REMEMBERED_BYTES / LANES + 1],
    /// How many of these there are.
    parts: usize,
    /// What followed.
    behind: [u8; 2],
    /// Whether the year is not in the text, so that it depends on the clock.
    yearless: bool,
}

/// Bytes that are compared at a time.
const LANES: usize = 16;

/// Some bits of so many bytes, and what they should be.
#[derive(Debug, Clone, Copy, Default)]
struct Same {
    mask: u8x16,
    wanted: u8x16,
}

/// What kinds of characters follow a time that ends at `end`.
fn behind(line: &[u8], end: usize) -> [u8; 2] {
    [end, end + 1].map(|at| match line.get(at) {
        Some(b'0'..=b'9') => b'0',
        Some(mark @ (b'.' | b',' | b':')) => *mark,
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

    /// Remembers what is the same of `line`, in which the text stands, and of lines of its kind.
    fn compare_with(mut self, line: &[u8]) -> Self {
        let end = self.len + 2;
        let (seconds, fraction) = (self.seconds_at..self.seconds_at + 2, self.seconds_at + 3..self.tail_at());
        self.parts = end.div_ceil(LANES);
        for (n, one) in self.same.iter_mut().enumerate() {
            let bytes: [usize; LANES] = std::array::from_fn(|byte| n * LANES + byte);
            let is_same = |at: usize| at < end && !seconds.contains(&at) && !fraction.contains(&at);
            one.mask = u8x16::new(bytes.map(|at| if is_same(at) { u8::MAX } else { 0 }));
            one.wanted = u8x16::new(bytes.map(|at| line.get(at).copied().unwrap_or(0))) & one.mask;
        }
        self
    }

    /// Whether nothing but the digits differs. A line that is too short to be compared in these parts, or has another character of the
    /// same kind behind its time, isn't surely the same, but may be.
    #[inline]
    fn is_surely_the_same(&self, line: &[u8]) -> bool {
        let Some(text) = line.get(..self.parts * LANES) else { return false };
        let (parts, _) = text.as_chunks::<LANES>();
        parts.iter().zip(&self.same).all(|(bytes, same)| (u8x16::new(*bytes) & same.mask) == same.wanted)
    }

    #[inline]
    fn read(&self, line: &[u8], now_ms: i64) -> Option<i64> {
        if self.yearless && self.minute_ms.abs_diff(now_ms) > NEAREST_YEAR_MS.unsigned_abs() {
            return None;
        }
        let text = line.get(..self.len)?;
        let (head, tail_at) = (self.seconds_at, self.tail_at());
        if !self.is_surely_the_same(line) {
            if behind(line, self.len) != self.behind {
                // More digits, a fraction, or the seconds of an offset may belong to the time.
                return None;
            }
            if text[..head] != self.text[..head] || text[tail_at..] != self.text[tail_at..self.len] {
                return None;
            }
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
            TimeFormat::Strptime(format) => Format::Strptime(format.clone(), Opening::of(format)),
        });
        Self { formats: formats.collect(), place: Place::of(options), timezone: options.timezone.clone(), last: None }
    }

    /// The time of `line`, by a clock that shows `now_ms`.
    #[inline(always)]
    pub fn read(&mut self, line: &[u8], now_ms: i64) -> LineTime {
        let Some(text) = self.place.find(line) else { return LineTime::None };
        let known = self.last.as_ref().and_then(|last| last.read(text, now_ms));
        match known.or_else(|| self.parse(text, now_ms)) {
            None => LineTime::None,
            Some(ms) if is_plausible(ms, now_ms) => LineTime::At(ms),
            Some(_) => LineTime::Implausible,
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
                Format::Strptime(_, opening) if !opening.fits(text) => {}
                Format::Strptime(format, _) => {
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

fn is_plausible(ms: i64, now_ms: i64) -> bool {
    if now_ms < CLOCK_IS_RIGHT_FROM_MS {
        return (CLOCK_IS_RIGHT_FROM_MS..CLOCK_IS_RIGHT_FROM_MS + MAX_BEHIND_MS).contains(&ms);
    }
    ms <= now_ms.saturating_add(MAX_AHEAD_MS) && ms >= now_ms.saturating_sub(MAX_BEHIND_MS)
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

/// Whether what the text says by the format leaves the year open.
fn is_yearless(format: &str, text: &[u8]) -> bool {
    BrokenDownTime::parse_prefix(format, text)
        .is_ok_and(|(parsed, _)| parsed.year().is_none() && parsed.to_timestamp().is_err())
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
            yearless: is_yearless(format, text),
            same: Default::default(),
            parts: 0,
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
        let found = found.compare_with(line);
        return (found.read(line, now_ms) == Some(ms)).then_some(found);
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
        reader_of(formats, after, None, timezone)
    }

    fn json_reader(formats: &[&str], field: &str) -> TimeReader {
        reader_of(formats, "", Some(field), "UTC")
    }

    fn reader_of(formats: &[&str], after: &str, json_field: Option<&str>, timezone: &str) -> TimeReader {
        let formats = formats.iter().map(|format| match *format {
            "unix_ms" => TimeFormat::UnixMs,
            format => TimeFormat::Strptime(format.to_owned()),
        });
        TimeReader::new(&TimestampOptions {
            formats: formats.collect(),
            after: after.to_owned().into(),
            json_field: json_field.map(str::to_owned),
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
    fn lines_of_a_stack_trace_are_told_by_how_they_begin() {
        for (format, no) in [
            ("%Y-%m-%d %H:%M:%S", "\tat com.example.Main"),
            ("%4Y-%m-%d", "Caused by: java.io.IOException"),
            ("%b %e %H:%M:%S", "\tat com.example.Main"),
            ("[%d/%b/%Y:%H:%M:%S", "\tat com.example.Main"),
        ] {
            assert!(!Opening::of(format).fits(no.as_bytes()), "{format}");
        }
        assert!(Opening::of("%n%Y").fits(b"\t2026"));
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
    fn the_time_is_the_value_of_a_json_field() {
        let mut text = json_reader(&["%Y-%m-%dT%H:%M:%S%.f%:z", "%s"], "ts");
        for line in [
            r#"{"ts":"2026-11-22T20:15:31Z","msg":"x"}"#,
            r#"{"msg": "x", "ts" : "2026-11-22T20:15:31.000+00:00"}"#,
            r#"{"msg":"its key is \"ts\"","ts":"2026-11-22T21:15:31+01:00","tsx":1}"#,
            r#"{"kind":"ts", "more":["ts"], "in":{"ts":1795378531}, "ts":1}"#,
            "{\t\"ts\"\t:\t1795378531}",
        ] {
            let line = line.replace("31Z", "31+00:00");
            assert_eq!(text.read(line.as_bytes(), NOW_MS), at("2026-11-22T20:15:31Z"), "{line}");
        }
        for line in
            [r#"{"msg":"x"}"#, r#"{"ts":null}"#, r#"{"ts":"never"}"#, r#"{"ts""#, r#"{"ts":"#, r#"{"ts":""#, "ts"]
        {
            assert_eq!(text.read(line.as_bytes(), NOW_MS), LineTime::None, "{line}");
        }
        let far = format!("{{\"msg\":\"{}\",\"ts\":1795378531}}", "x".repeat(SEARCH_BYTES));
        assert_eq!(text.read(far.as_bytes(), NOW_MS), LineTime::None);
        let mut ms = json_reader(&["unix_ms"], "@timestamp");
        assert_eq!(ms.read(br#"{"@timestamp": 1795378531007}"#, NOW_MS), LineTime::At(NOW_MS + 7));
        assert_eq!(ms.read(br#"{"@timestamp": "1795378531008"}"#, NOW_MS), LineTime::At(NOW_MS + 8));
    }

    #[test]
    fn a_local_time_that_comes_twice_or_never_is_read_all_the_same() {
        let mut berlin = reader(&["%Y-%m-%d %H:%M:%S"], "", "Europe/Berlin");
        assert_eq!(berlin.read(b"2026-10-25 01:59:59", NOW_MS), at("2026-10-24T23:59:59Z"));
        assert_eq!(berlin.read(b"2026-10-25 02:30:00", NOW_MS), at("2026-10-25T00:30:00Z"), "the first of two");
        assert_eq!(berlin.read(b"2026-10-25 03:00:00", NOW_MS), at("2026-10-25T02:00:00Z"));
        assert_eq!(berlin.read(b"2026-03-29 01:59:59", NOW_MS), at("2026-03-29T00:59:59Z"));
        assert_eq!(berlin.read(b"2026-03-29 02:30:00", NOW_MS), at("2026-03-29T01:30:00Z"), "which doesn't exist");
        assert_eq!(berlin.read(b"2026-03-29 03:00:00", NOW_MS), at("2026-03-29T01:00:00Z"));
    }

    #[test]
    fn a_clock_that_jumps_changes_the_year_of_a_time_without_one_also_when_it_is_remembered() {
        let mut syslog = reader(&["%b %d %H:%M:%S"], "", "UTC");
        let clock = |time: &str| time.parse::<Timestamp>().expect("a time").as_millisecond();
        assert_eq!(syslog.read(b"Nov 22 20:15:31 host x", clock("2027-11-22T20:15:31Z")), at("2027-11-22T20:15:31Z"));
        assert_eq!(syslog.read(b"Nov 22 20:15:32 host x", clock("2026-11-22T20:15:31Z")), at("2026-11-22T20:15:32Z"));
    }

    #[test]
    fn by_a_clock_that_can_not_be_right_times_of_late_are_believed() {
        let mut reader = reader(&["%Y-%m-%d %H:%M:%S"], "", "UTC");
        assert_eq!(reader.read(b"2026-11-22 20:15:31", 60_000), at("2026-11-22T20:15:31Z"));
        assert_eq!(reader.read(b"1970-01-01 00:00:31", 60_000), LineTime::Implausible);
        assert_eq!(reader.read(b"2099-01-01 00:00:31", 60_000), LineTime::Implausible);
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
        /// What is told by its first bytes to be no time is none.
        #[test]
        fn what_can_not_begin_so_is_no_time(
            format in 0_usize..12,
            time in 0..4_000_000_000_i64,
            mut before in "[ \\t\\r\\n+A-Za-z\\[0-9-]{0,3}".prop_map(String::into_bytes),
            skipped in 0_usize..4,
        ) {
            let format = [
                "%Y-%m-%d %H:%M:%S", "%b %e %H:%M:%S", "%A, %d %B %Y %T", "%d/%b/%Y:%T", "[%F %T", " %F %T", "%_d.%-m.%4Y %T", "%n%F %T",
                "%s", "%D %T", "%e. %b %T", "%k:%M:%S %F",
            ][format];
            let time = Timestamp::from_second(time).expect("a time").to_zoned(TimeZone::UTC);
            let written = strtime::format(format, &time).expect("formats");
            before.extend_from_slice(&written.as_bytes()[skipped.min(written.len())..]);
            for text in [written.as_bytes(), &before] {
                let fits = Opening::of(format).fits(text);
                prop_assert!(fits || strptime(format, text, &TimeZone::UTC, NOW_MS).is_none(), "{}", String::from_utf8_lossy(text));
            }
        }

        /// Bytes that are no lines of a log do no harm, and what is remembered of them changes nothing.
        #[test]
        fn no_bytes_make_it_panic(
            lines in proptest::collection::vec(
                prop_oneof![
                    proptest::collection::vec(any::<u8>(), 0..80),
                    "[{]?[\"]?(ts)?[\"]? ?:? ?[\"]?[0-9TZ:. +-]{0,40}".prop_map(String::into_bytes),
                    (proptest::collection::vec(any::<u8>(), 0..4), 0_usize..30).prop_map(|(odd, at)| {
                        let mut line = b"2026-11-22T20:15:31.125+00:00 text".to_vec();
                        line.splice(at..(at + odd.len()).min(34), odd);
                        line
                    }),
                ],
                1..20,
            ),
            place in 0_usize..3,
            clocks in proptest::collection::vec(prop_oneof![Just(NOW_MS), any::<i64>()], 20),
        ) {
            let formats = ["%Y-%m-%dT%H:%M:%S%.f%:z", "%b %e %H:%M:%S", "%d/%b/%y:%I:%M:%S %p", "%s", "unix_ms"];
            let make = || match place {
                0 => reader(&formats, "", "Europe/Berlin"),
                1 => reader(&formats, "T", "Europe/Berlin"),
                _ => json_reader(&formats, "ts"),
            };
            let mut remembering = make();
            for (line, now_ms) in lines.iter().zip(clocks) {
                let said = remembering.read(line, now_ms);
                prop_assert_eq!(said, make().read(line, now_ms), "{:?}", String::from_utf8_lossy(line));
            }
        }

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
