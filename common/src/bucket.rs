//! Time buckets: the partitions of a category ("hours", whatever their size).

use std::fmt;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

/// The size of a category's buckets in seconds: from one minute to one day, and a divisor of a day.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct BucketSize(u32);

const DAY_S: u32 = 86_400;
const HOUR_S: u32 = 3_600;

impl BucketSize {
    /// One hour, the default.
    pub const HOUR: Self = Self(HOUR_S);

    /// The size in seconds.
    #[must_use]
    pub fn seconds(self) -> u32 {
        self.0
    }

    /// The bucket that holds the moment `time_ms` (milliseconds since 1970, UTC).
    #[must_use]
    pub fn bucket_of_ms(self, time_ms: i64) -> Bucket {
        let second = time_ms.div_euclid(1000);
        Bucket { start_s: second - second.rem_euclid(i64::from(self.0)), size: self }
    }

    /// The first bucket that does not begin before this second since 1970, UTC.
    #[must_use]
    pub fn first_from(self, start_s: i64) -> Bucket {
        let size = i64::from(self.0);
        Bucket { start_s: start_s.saturating_add((-start_s).rem_euclid(size)), size: self }
    }
}

impl TryFrom<u32> for BucketSize {
    type Error = String;
    fn try_from(seconds: u32) -> Result<Self, String> {
        if (60..=DAY_S).contains(&seconds) && DAY_S.is_multiple_of(seconds) {
            Ok(Self(seconds))
        } else {
            Err(format!("a bucket of {seconds} s is not possible: write 1m to 1d, a divisor of a day"))
        }
    }
}

impl From<BucketSize> for u32 {
    fn from(size: BucketSize) -> u32 {
        size.0
    }
}

/// One bucket: `[start, start + size)` in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Bucket {
    start_s: i64,
    size: BucketSize,
}

/// A bucket's start is not a multiple of its size, or lies outside of the years 1 to 9999.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{start_s} s after 1970 is not the start of a bucket of {size_s} s")]
pub struct BucketError {
    start_s: i64,
    size_s: u32,
}

/// First and last second of the years 1 to 9999, all that a directory name has digits for.
const YEARS_S: std::ops::Range<i64> = -62_135_596_800..253_402_300_800;

impl Bucket {
    /// The bucket that starts at `start_s` seconds since 1970, UTC.
    ///
    /// # Errors
    /// When no bucket of that size starts there.
    pub fn new(start_s: i64, size: BucketSize) -> Result<Self, BucketError> {
        if start_s.rem_euclid(i64::from(size.0)) == 0 && YEARS_S.contains(&start_s) {
            Ok(Self { start_s, size })
        } else {
            Err(BucketError { start_s, size_s: size.0 })
        }
    }

    /// Its start in seconds since 1970, UTC.
    #[must_use]
    pub fn start_s(self) -> i64 {
        self.start_s
    }

    /// The end, exclusive, in milliseconds since 1970, UTC.
    #[must_use]
    pub fn end_ms(self) -> i64 {
        (self.start_s + i64::from(self.size.0)) * 1000
    }

    /// The one that begins where it ends.
    #[must_use]
    pub fn next(self) -> Self {
        Self { start_s: self.start_s + i64::from(self.size.0), size: self.size }
    }

    /// Its size.
    #[must_use]
    pub fn size(self) -> BucketSize {
        self.size
    }

    /// Whether the moment `time_ms` lies in it.
    #[must_use]
    pub fn contains_ms(self, time_ms: i64) -> bool {
        self.size.bucket_of_ms(time_ms) == self
    }

    /// The directories that lead to the bucket's own, below its category: `dt=2026-11-22`, or none for a day.
    #[must_use]
    pub fn parent_dir(self) -> Option<String> {
        (self.size.0 < DAY_S).then(|| format!("dt={}", self.civil().strftime("%Y-%m-%d")))
    }

    /// The bucket's own directory, the one whose appearance publishes it: `dt=2026-11-22` for a day, `hr=20` for whole
    /// hours, `hm=2015` for less. The names sort by time and are what Hive and Spark take for partitions.
    #[must_use]
    pub fn dir_name(self) -> String {
        let civil = self.civil();
        match self.size.0 {
            DAY_S => format!("dt={}", civil.strftime("%Y-%m-%d")),
            size if size.is_multiple_of(HOUR_S) => format!("hr={}", civil.strftime("%H")),
            _ => format!("hm={}", civil.strftime("%H%M")),
        }
    }

    /// The name under which the bucket's directory is prepared: readers skip names that begin with `.`. They skip those that
    /// begin with `_` too, but Spark not when they hold a `=`: it would read `_hr=20` as a partition by `_hr`.
    #[must_use]
    pub fn hidden_dir_name(self) -> String {
        format!(".{}", self.dir_name())
    }

    /// A name for use inside of file names: `20261122T2015Z`.
    #[must_use]
    pub fn file_label(self) -> String {
        self.civil().strftime("%Y%m%dT%H%MZ").to_string()
    }

    fn civil(self) -> jiff::civil::DateTime {
        let start = Timestamp::from_second(self.start_s).unwrap_or(Timestamp::UNIX_EPOCH);
        TimeZone::UTC.to_datetime(start)
    }
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.civil().strftime("%Y-%m-%dT%H:%MZ"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(seconds: u32) -> BucketSize {
        seconds.try_into().expect("a valid size")
    }

    #[test]
    fn directories_name_the_time() {
        let time_ms = 1_795_378_521_000; // 2026-11-22T20:15:21Z
        let hour = BucketSize::HOUR.bucket_of_ms(time_ms);
        assert_eq!((hour.parent_dir().as_deref(), hour.dir_name().as_str()), (Some("dt=2026-11-22"), "hr=20"));
        assert_eq!(hour.hidden_dir_name(), ".hr=20");
        let quarter = size(900).bucket_of_ms(time_ms);
        assert_eq!((quarter.parent_dir().as_deref(), quarter.dir_name().as_str()), (Some("dt=2026-11-22"), "hm=2015"));
        let day = size(86_400).bucket_of_ms(time_ms);
        assert_eq!((day.parent_dir(), day.dir_name().as_str()), (None, "dt=2026-11-22"));
        assert_eq!(quarter.file_label(), "20261122T2015Z");
        assert_eq!(quarter.to_string(), "2026-11-22T20:15Z");
    }

    #[test]
    fn a_bucket_holds_its_first_moment_and_not_its_end() {
        let bucket = size(60).bucket_of_ms(-1);
        assert_eq!((bucket.start_s(), bucket.end_ms()), (-60, 0));
        assert!(bucket.contains_ms(-60_000) && bucket.contains_ms(-1));
        assert!(!bucket.contains_ms(0) && !bucket.contains_ms(-60_001));
    }

    #[test]
    fn buckets_follow_each_other_and_the_first_from_a_moment_does_not_begin_before_it() {
        let bucket = size(900).bucket_of_ms(1_795_378_521_000);
        assert_eq!((bucket.next().start_s() * 1000, bucket.next().size()), (bucket.end_ms(), size(900)));
        for (from, first) in [(0, 0), (1, 900), (900, 900), (-1, 0), (-900, -900), (-901, -900)] {
            assert_eq!(size(900).first_from(from).start_s(), first, "{from}");
        }
    }

    #[test]
    fn sizes_that_do_not_divide_a_day_are_refused() {
        for bad in [0, 1, 59, 7_000, 86_401, 172_800] {
            assert!(BucketSize::try_from(bad).is_err(), "{bad}");
        }
        assert!(Bucket::new(1, BucketSize::HOUR).is_err());
        assert!(Bucket::new(i64::MAX - i64::MAX % 3600, BucketSize::HOUR).is_err(), "beyond the year 9999");
    }
}
