//! Which hours a sink has, told from its directories.

use anyhow::Context;
use jiff::Timestamp;
use jiff::civil::{Date, DateTime};
use jiff::tz::TimeZone;
use tributary_common::ids::CategoryName;

use crate::dfs::{Dfs, DfsPath};
use crate::root::hours::{LATE_DIR, MANIFEST_FILE};

/// The directory of an hour.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct HourDir {
    /// The category.
    pub category: CategoryName,
    /// When the hour begins, in seconds since 1970, UTC. How long it is, its manifest says.
    pub start_s: i64,
    /// Where it is.
    pub path: DfsPath,
    /// Whether readers see it.
    pub published: bool,
}

impl HourDir {
    /// Where readers see it, once they do, and where it is put together until then.
    #[must_use]
    pub fn visible_and_hidden(&self) -> (DfsPath, DfsPath) {
        let (name, parent) = (visible_name(self.path.name()).0, self.path.parent().unwrap_or_default());
        (parent.join(name), parent.join(format!(".{name}")))
    }
}

/// An hour as people name it on a command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AskedHour {
    /// Its start as it was written, in seconds since 1970.
    pub start_s: i64,
    /// How long it is by the way in which it was written: `2026-11-22` is a day, `2026-11-22T20` an hour; 0 where that can't be told.
    pub span_s: u32,
}

/// Reads an hour's start, in any form of [`parse_moment`].
///
/// # Errors
/// When it is none of them.
pub fn parse_hour(text: &str) -> anyhow::Result<AskedHour> {
    let start_s = parse_moment(text)?;
    let span_s = match text.trim_end_matches('Z').split_once('T') {
        Some((_, clock)) if clock.len() == 2 => 3600,
        None if text.len() == "2026-11-22".len() => 86_400,
        _ => 0,
    };
    Ok(AskedHour { start_s, span_s })
}

/// The categories that have a directory, by name.
///
/// # Errors
/// When the sink can't be read.
pub async fn categories(dfs: &dyn Dfs) -> anyhow::Result<Vec<CategoryName>> {
    let entries = dfs.list(&DfsPath::base()).await?.unwrap_or_default();
    let dirs = entries.into_iter().filter(|entry| entry.status.is_dir);
    let mut found: Vec<CategoryName> = dirs.filter_map(|entry| entry.name.parse().ok()).collect();
    found.sort();
    Ok(found)
}

/// A day in seconds, the longest hour.
const DAY_S: i64 = 86_400;

/// What a category's directory holds.
#[derive(Debug, Default)]
pub struct Tree {
    /// The hours by time, also those that are being put together and that readers don't see yet.
    pub hours: Vec<HourDir>,
    /// How many days there are, looked at or not.
    pub days: usize,
    /// Days with nothing in them, by their starts.
    pub empty_days: Vec<(i64, DfsPath)>,
    /// Files and directories that lie where only days are, or only hours.
    pub foreign: Vec<DfsPath>,
}

/// The hours of a category from `since_s` (seconds since 1970) on, by time; also those that are being put together and that
/// readers don't see yet.
///
/// # Errors
/// When the sink can't be read.
pub async fn hours(dfs: &dyn Dfs, category: &CategoryName, since_s: i64) -> anyhow::Result<Vec<HourDir>> {
    Ok(tree(dfs, category, since_s).await?.hours)
}

/// The same of which the end may lie behind `moment_s`: how long one is, only its manifest says.
///
/// # Errors
/// When the sink can't be read.
pub async fn hours_that_may_end_after(
    dfs: &dyn Dfs,
    category: &CategoryName,
    moment_s: i64,
) -> anyhow::Result<Vec<HourDir>> {
    let mut hours = of_days(dfs, category, moment_s).await?.hours;
    hours.retain(|hour| {
        // What divides a day and is shorter is half of it at most.
        let longest_s = if clock_of(visible_name(hour.path.name()).0).is_some() { DAY_S / 2 } else { DAY_S };
        hour.start_s.saturating_add(longest_s) > moment_s
    });
    Ok(hours)
}

/// The hours from `since_s` (seconds since 1970) on with all that is no hour.
///
/// # Errors
/// When the sink can't be read.
pub async fn tree(dfs: &dyn Dfs, category: &CategoryName, since_s: i64) -> anyhow::Result<Tree> {
    let mut tree = of_days(dfs, category, since_s).await?;
    tree.hours.retain(|hour| hour.start_s >= since_s);
    Ok(tree)
}

/// What lies in the days that end behind `moment_s`.
async fn of_days(dfs: &dyn Dfs, category: &CategoryName, moment_s: i64) -> anyhow::Result<Tree> {
    let root = DfsPath::base().join(category.as_str());
    let mut tree = Tree::default();
    for entry in dfs.list(&root).await?.unwrap_or_default() {
        let path = root.join(&entry.name);
        let (name, published) = visible_name(&entry.name);
        let Some(midnight_s) = midnight_of(name).filter(|_| entry.status.is_dir) else {
            tree.foreign.push(path);
            continue;
        };
        tree.days += 1;
        if midnight_s + DAY_S <= moment_s {
            continue;
        }
        let (mut hours, mut others) = (Vec::new(), Vec::new());
        for inner in dfs.list(&path).await?.unwrap_or_default() {
            let (name, visible) = visible_name(&inner.name);
            // What lies in a hidden day is its own: nobody makes hours there.
            match clock_of(name).filter(|_| inner.status.is_dir && published) {
                Some((hour, minute)) => hours.push(HourDir {
                    category: category.clone(),
                    start_s: midnight_s + i64::from(hour) * 3600 + i64::from(minute) * 60,
                    path: path.join(&inner.name),
                    published: visible,
                }),
                None => others.push(inner.name),
            }
        }
        let marks = others.iter().any(|name| [MANIFEST_FILE, LATE_DIR].contains(&name.as_str()));
        if !published || marks || (hours.is_empty() && !others.is_empty()) {
            tree.hours.push(HourDir { category: category.clone(), start_s: midnight_s, path, published });
        } else if hours.is_empty() {
            tree.empty_days.push((midnight_s, path));
        } else {
            tree.foreign.extend(others.iter().map(|name| path.join(name)));
        }
        tree.hours.append(&mut hours);
    }
    tree.hours.sort_by(|a, b| (a.start_s, &a.path).cmp(&(b.start_s, &b.path)));
    Ok(tree)
}

/// Whether a name inside of a day's directory is that of an hour, visible or not.
#[must_use]
pub fn is_hour_of_a_day(name: &str) -> bool {
    clock_of(visible_name(name).0).is_some()
}

/// Whether readers skip what has this name: Hadoop's jobs and Spark do, but Spark not where a `=` follows the `_`.
#[must_use]
pub fn is_hidden(name: &str) -> bool {
    name.starts_with('.') || (name.starts_with('_') && !name.contains('='))
}

/// A directory's name without the dot that hides it, and whether it had none.
fn visible_name(name: &str) -> (&str, bool) {
    name.strip_prefix('.').map_or((name, true), |name| (name, false))
}

/// When the day of `dt=2026-11-22` begins. Written in another way it would be another partition.
fn midnight_of(name: &str) -> Option<i64> {
    let text = name.strip_prefix("dt=")?;
    let date = text.parse::<Date>().ok().filter(|date| date.to_string() == text)?;
    Some(start_of(date.at(0, 0, 0, 0)))
}

/// Hour and minute of `hr=20` and `hm=2015`.
fn clock_of(name: &str) -> Option<(u8, u8)> {
    let (digits, with_minutes) = match name.split_once('=')? {
        ("hr", digits) => (digits, false),
        ("hm", digits) => (digits, true),
        _ => return None,
    };
    let number = |text: &str| text.parse::<u8>().ok();
    let (hour, minute) = match (digits.len(), with_minutes) {
        (2, false) => (number(digits)?, 0),
        (4, true) => (number(digits.get(..2)?)?, number(digits.get(2..)?)?),
        _ => return None,
    };
    (hour < 24 && minute < 60).then_some((hour, minute))
}

fn start_of(civil: DateTime) -> i64 {
    TimeZone::UTC.to_timestamp(civil).map_or(0, Timestamp::as_second)
}

/// Reads a moment as people write one for an hour: `2026-11-22T20`, `2026-11-22T20:15`, `2026-11-22` (all UTC), or a whole
/// timestamp with its zone. In seconds since 1970.
///
/// # Errors
/// When it is none of these.
pub fn parse_moment(text: &str) -> anyhow::Result<i64> {
    if let Ok(moment) = text.parse::<Timestamp>() {
        return Ok(moment.as_second());
    }
    let text = text.trim_end_matches('Z');
    // A lone hour is not a time by any standard, and is what people write.
    let civil = match text.split_once('T') {
        Some((_, hour)) if hour.len() == 2 => format!("{text}:00").parse::<DateTime>(),
        Some(_) => text.parse::<DateTime>(),
        None => text.parse::<Date>().map(|date| date.at(0, 0, 0, 0)),
    };
    civil.map(start_of).with_context(|| {
        format!("{text:?} is not a moment: write 2026-11-22T20, 2026-11-22T20:15 or 2026-11-22, in UTC")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dfs::local::LocalDfs;
    use tributary_common::bucket::BucketSize;

    #[test]
    fn moments_are_read_as_people_write_them() {
        let hour = 1_795_377_600;
        for (text, expected) in [
            ("2026-11-22T20", hour),
            ("2026-11-22T20Z", hour),
            ("2026-11-22T20:15", hour + 900),
            ("2026-11-22T20:15Z", hour + 900),
            ("2026-11-22T21:00:00+01:00", hour),
            ("2026-11-22", hour - 20 * 3600),
        ] {
            assert_eq!(parse_moment(text).expect(text), expected, "{text}");
        }
        for bad in ["", "yesterday", "2026-11-22T25", "2026-13-01", "20"] {
            assert!(parse_moment(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn hours_of_every_size_are_found_by_time_and_foreign_directories_are_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let dfs = LocalDfs::open(dir.path()).expect("opens");
        for path in [
            "app/backup",
            "app/dt=20261122/hr=20",
            "app/dt=2026-11-20",
            "app/dt=2026-11-22/hr=20",
            "app/dt=2026-11-22/hm=2015",
            "app/dt=2026-11-22/.hr=21",
            "app/dt=2026-11-22/backup",
            "app/dt=2026-11-21/_late",
            "app/.dt=2026-11-23",
            "app/dt=today",
            "app/dt=2026-11-22/hr=99",
            "_tributary/lanes",
        ] {
            std::fs::create_dir_all(dir.path().join(path)).expect("made");
        }
        assert_eq!(categories(&dfs).await.expect("lists").len(), 1);
        let app = "app".parse().expect("valid");
        let tree = tree(&dfs, &app, i64::MIN).await.expect("lists");
        let (found, mut foreign) = (tree.hours, tree.foreign);
        let day = |day: i64| BucketSize::HOUR.bucket_of_ms(1_795_305_600_000 + day * 86_400_000).start_s();
        let found: Vec<_> = found.iter().map(|hour| (hour.path.as_str(), hour.start_s, hour.published)).collect();
        assert_eq!(
            found,
            [
                ("app/dt=2026-11-21", day(-1), true),
                ("app/dt=2026-11-22/hr=20", day(0) + 20 * 3600, true),
                ("app/dt=2026-11-22/hm=2015", day(0) + 20 * 3600 + 900, true),
                ("app/dt=2026-11-22/.hr=21", day(0) + 21 * 3600, false),
                ("app/.dt=2026-11-23", day(1), false),
            ]
        );
        foreign.sort();
        let foreign: Vec<_> = foreign.iter().map(DfsPath::as_str).collect();
        assert_eq!(
            foreign,
            ["app/backup", "app/dt=2026-11-22/backup", "app/dt=2026-11-22/hr=99", "app/dt=20261122", "app/dt=today"]
        );
        assert_eq!(tree.days, 4);
        assert_eq!(tree.empty_days, [(day(-2), DfsPath::base().join("app/dt=2026-11-20"))]);
        let since = hours(&dfs, &app, day(0) + 20 * 3600 + 1).await.expect("lists");
        assert_eq!(since.len(), 3);
        let ends_after = async |moment_s| {
            let hours = hours_that_may_end_after(&dfs, &app, moment_s).await.expect("lists");
            hours.into_iter().map(|hour| hour.path.as_str().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(ends_after(day(0) + 23 * 3600).await.len(), 4, "one that is shorter than a day may take half of it");
        assert_eq!(ends_after(day(1) + 23 * 3600).await, ["app/.dt=2026-11-23"], "a day ends at midnight");
        assert!(ends_after(day(2)).await.is_empty());
    }

    #[test]
    fn an_hour_knows_how_exactly_it_was_written() {
        let hour = 1_795_377_600;
        for (text, start_s, span_s) in [
            ("2026-11-22T20", hour, 3600),
            ("2026-11-22T20Z", hour, 3600),
            ("2026-11-22T20:00", hour, 0),
            ("2026-11-22T21:00:00+01:00", hour, 0),
            ("2026-11-22", hour - 20 * 3600, 86_400),
        ] {
            assert_eq!(parse_hour(text).expect(text), AskedHour { start_s, span_s }, "{text}");
        }
    }
}
