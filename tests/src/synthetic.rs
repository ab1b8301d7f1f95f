//! Lines like those of an access log, made from a number: the same number and time give the same line, everywhere.
//!
//! A line is about 210 bytes long in nginx's `combined` format and a request's id, compresses about as well as the log of a real
//! site, and has its number in the URL, so no two are equal.

use std::io::Write as _;

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// The agent's `timestamp.format` for these lines.
pub const TIME_FORMAT: &str = "%d/%b/%Y:%H:%M:%S %z";
/// The agent's `timestamp.after` for these lines.
pub const TIME_AFTER: &str = "[";

const BROWSERS: [&str; 5] = [
    "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko)",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 Version/17.5 Safari/605.1.15",
    "curl/8.9.1",
];
const PAGES: [&str; 6] = ["article", "search", "static/img", "user", "api/v2/items", "feed"];
const REFERRERS: [&str; 3] = ["-", "https://www.example.net/", "https://search.example.com/?q=river"];
const STATUSES: [u16; 8] = [200, 200, 200, 200, 200, 304, 404, 301];

/// Makes lines. Remembers the last second's text, as a web server does.
#[derive(Debug, Default)]
pub struct AccessLog {
    second: Option<i64>,
    time: String,
}

impl AccessLog {
    /// Appends the line `serial` with its newline to `out`; its time is `second`, seconds since 1970.
    pub fn line(&mut self, serial: u64, second: i64, out: &mut Vec<u8>) {
        if self.second != Some(second) {
            let moment = Timestamp::from_second(second).unwrap_or(Timestamp::UNIX_EPOCH);
            self.time = moment.to_zoned(TimeZone::UTC).strftime(TIME_FORMAT).to_string();
            self.second = Some(second);
        }
        let (a, b, c) = (mix(serial), mix(serial ^ 0x5555_5555), mix(serial ^ 0xAAAA_AAAA));
        // A visitor comes back, so addresses repeat; one visitor has one browser.
        let visitor = mix(a % 5000);
        let browser = BROWSERS[(visitor % BROWSERS.len() as u64) as usize];
        let page = PAGES[(b % PAGES.len() as u64) as usize];
        let referrer = REFERRERS[(b >> 16) as usize % REFERRERS.len()];
        let status = STATUSES[(c % STATUSES.len() as u64) as usize];
        let (ip, time) = (visitor.to_be_bytes(), &self.time);
        let (item, size, id) = ((b >> 24) % 20_000, (c >> 8) % 60_000, c ^ a.rotate_left(17));
        // Writing to a Vec can't fail.
        let _ = writeln!(
            out,
            "{}.{}.{}.{} - - [{time}] \"GET /{page}/{item}?serial={serial} HTTP/1.1\" {status} {size} \"{referrer}\" \
             \"{browser}\" {id:016x}",
            ip[0], ip[1], ip[2], ip[3]
        );
    }
}

/// The finalizer of SplitMix64: every input bit changes every output bit.
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn lines_are_unique_reproducible_and_as_long_as_those_of_a_site() {
        let make = || {
            let (mut log, mut out) = (AccessLog::default(), Vec::new());
            (0..10_000).for_each(|serial| log.line(serial, 1_790_000_000 + serial as i64 / 100, &mut out));
            String::from_utf8(out).expect("text")
        };
        let text = make();
        assert_eq!(text, make());
        assert_eq!(text.lines().collect::<HashSet<_>>().len(), 10_000);
        let mean = text.len() / 10_000;
        assert!((190..=230).contains(&mean), "{mean} bytes: {:?}", text.lines().next());
        assert!(text.lines().next().is_some_and(|line| line.contains("[21/Sep/2026:14:13:20 +0000]")), "{text:.200}");
        assert_eq!(crate::load::serial_of(text.lines().nth(77).expect("a line")), Some(77));
    }
}
