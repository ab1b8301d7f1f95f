//! The tables `[[source]]`: which files, of which category, and how their lines are read.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use globset::{GlobBuilder, GlobMatcher};
use jiff::Timestamp;
use jiff::fmt::strtime::{self, BrokenDownTime};
use jiff::tz::TimeZone;
use tributary_common::config::kind::{Kind, choice, duration, list, parsed, size, text, text_as};
use tributary_common::config::{Complaint, Field, KIB, MIB, Place, Read, Reported, Table, nearest};
use tributary_common::ids::{AgentId, CategoryName};
use tributary_common::limits::MAX_RECORD_PREFIX_BYTES;

use tributary_common::topology::Topology;

use super::{DAY, HOUR, MS, SECOND};

/// Where reading begins in a file that is seen for the first time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadFrom {
    /// At its first line.
    Beginning,
    /// At its end as it is when the agent sees it.
    End,
}

/// What is done with a line longer than `max_line_bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LongLines {
    /// It becomes several records.
    Split,
    /// Its beginning is kept.
    Truncate,
    /// Nothing of it is kept.
    Drop,
}

/// How a time is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TimeFormat {
    /// A `strptime` format that was tried out: what it prints of a time, it reads back to the same hour of the same
    /// day (of any year, where the format has none).
    Strptime(String),
    /// Milliseconds since 1970, written `unix_ms`.
    UnixMs,
}

/// The table `[source.timestamp]`.
#[derive(Debug, Clone)]
pub struct TimestampOptions {
    /// `format`: one or several, tried in order. Required.
    pub formats: Vec<TimeFormat>,
    /// `after`: the time stands right behind the first occurrence of these bytes in the line. Default empty: at the
    /// line's beginning.
    pub after: Bytes,
    /// `json_field`: in its place, the key of the JSON field whose value, a string or a number, is the time: the first
    /// key of that name in the first 4 KiB of the line, at whatever depth, with or without spaces around the colon. From
    /// 1 to 128 bytes, as it stands between its quotes.
    pub json_field: Option<String>,
    /// `timezone`: an IANA name, for formats that say no offset. Default `UTC`.
    pub timezone: TimeZone,
}

/// One source: files of one category.
#[derive(Debug, Clone)]
pub struct Source {
    /// `category`. Required.
    pub category: CategoryName,
    /// `include`: absolute globs; `*` and `?` don't match a slash, `**` does. Required.
    pub include: Vec<PathPattern>,
    /// `exclude`: absolute globs of files that are left out again. Default none.
    pub exclude: Vec<PathPattern>,
    /// `read_from`: `beginning` (default) or `end`.
    pub read_from: ReadFrom,
    /// `ignore_older`: files last changed longer ago, and without a checkpoint, aren't opened. Default: none. From 1m
    /// to 10000d.
    pub ignore_older: Option<Duration>,
    /// `rotate_wait`: how long a file that was rotated away is watched for more. Default 5s, from 100ms to 1h.
    pub rotate_wait: Duration,
    /// `partial_line_timeout`: how long a last line without its newline waits for it. Default 30s, from 100ms to 1d.
    pub partial_line_timeout: Duration,
    /// `max_line_bytes`: of a longer line, see `long_lines`. At most `batch.max_bytes`, which is the default where that
    /// is below 1 MiB. Default 1 MiB, from 1 KiB to 8 MiB.
    pub max_line_bytes: u64,
    /// `long_lines`: `split` (default), `truncate` or `drop`.
    pub long_lines: LongLines,
    /// `record_prefix`: put before each record, up to 256 bytes, the placeholders filled in. Default empty.
    pub record_prefix: Bytes,
    /// `[source.timestamp]`; without it the time of reading is the time of the record.
    pub timestamp: Option<TimestampOptions>,
}

impl Source {
    /// Whether the file at the absolute `path` belongs to this source (unless an earlier one has it).
    #[must_use]
    pub fn matches(&self, path: &Path) -> bool {
        self.included_by(path).is_some() && self.excluded_by(path).is_none()
    }

    /// The first of the globs that include it.
    #[must_use]
    pub fn included_by(&self, path: &Path) -> Option<&PathPattern> {
        self.include.iter().find(|pattern| pattern.matches(path))
    }

    /// The first of the globs that exclude it.
    #[must_use]
    pub fn excluded_by(&self, path: &Path) -> Option<&PathPattern> {
        self.exclude.iter().find(|pattern| pattern.matches(path))
    }
}

/// An absolute glob.
#[derive(Debug, Clone)]
pub struct PathPattern {
    text: String,
    base: PathBuf,
    matcher: GlobMatcher,
}

impl PathPattern {
    /// The glob `text`.
    ///
    /// # Errors
    /// When it is relative, has `.` or `..` in it (no path that is found has), or is no glob.
    pub fn new(text: &str) -> Result<Self, Complaint> {
        if !text.starts_with('/') {
            return Err(Complaint::new(format!("the pattern {text:?} is relative"))
                .help("write the whole path, beginning with a slash"));
        }
        if text.split('/').any(|part| part == "." || part == "..") || text.contains("//") {
            return Err(Complaint::new(format!("the pattern {text:?} can match nothing"))
                .help("write the path without “.”, “..” and double slashes"));
        }
        if text.ends_with('/') {
            return Err(Complaint::new(format!("the pattern {text:?} ends with a slash and can match no file"))
                .help(format!("write \"{text}*\" for the files in that directory")));
        }
        let glob = GlobBuilder::new(text).literal_separator(true).backslash_escape(true).build().map_err(|error| {
            Complaint::new(format!("the pattern {text:?} can't be read: {}", error.kind()))
                .help("close every [ and {, and write \\ before one that stands for itself")
        })?;
        let literal = text.split('/').take_while(|part| !part.contains(['*', '?', '[', '{', '\\']));
        let mut base: PathBuf = Path::new("/").join(literal.collect::<Vec<_>>().join("/").trim_start_matches('/'));
        if base == Path::new(text) {
            base.pop();
        }
        Ok(Self { text: text.to_owned(), base, matcher: glob.compile_matcher() })
    }

    /// The glob as it is written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The deepest directory that every match lies below.
    #[must_use]
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// Whether it matches the absolute `path`.
    #[must_use]
    pub fn matches(&self, path: &Path) -> bool {
        self.matcher.is_match(path)
    }
}

pub(super) fn read_all(
    root: &mut Table<'_>,
    agent_id: &AgentId,
    host: &str,
    max_batch: u64,
    topology: Option<&Topology>,
) -> Read<Vec<Source>> {
    let tables = root.tables("source");
    if tables.is_empty() {
        return Err(root.complain(
            Complaint::new("there is no source")
                .label("nothing would be shipped")
                .help("write [[source]], and below it category = \"…\" and include = [\"/var/log/…\"]"),
        ));
    }
    let mut seen: Vec<(String, Place)> = Vec::new();
    let read: Vec<_> = tables
        .into_iter()
        .map(|mut table| {
            let include = table.required("include", patterns());
            if let Ok(include) = &include {
                for pattern in include.iter() {
                    if let Some((_, earlier)) = seen.iter().find(|(text, _)| text == pattern.as_str()) {
                        let _: Reported = table.complain_between(
                            &[include.place(), earlier],
                            Complaint::new(format!("{:?} is included twice", pattern.as_str())).help(
                                "a file belongs to the first source that matches it: take the pattern out of one",
                            ),
                        );
                    }
                    seen.push((pattern.as_str().to_owned(), include.place().clone()));
                }
            }
            Source::read(&mut table, include, agent_id, host, max_batch, topology)
        })
        .collect();
    read.into_iter().collect()
}

fn patterns() -> impl Kind<Out = Vec<PathPattern>> {
    list(text_as("\"/var/log/nginx/access.log*\"", PathPattern::new))
}

impl Source {
    fn read(
        table: &mut Table<'_>,
        include: Read<Field<Vec<PathPattern>>>,
        agent_id: &AgentId,
        host: &str,
        max_batch: u64,
        topology: Option<&Topology>,
    ) -> Read<Self> {
        let category = table.required("category", parsed::<CategoryName>("\"nginx-access\""));
        if let (Ok(category), Some(topology)) = (&category, topology)
            && topology.category(category).is_none()
        {
            let known: Vec<_> = topology.categories().keys().map(CategoryName::as_str).collect();
            let help = match nearest(category.as_str(), known.iter().copied()) {
                Some(name) => format!("did you mean \"{name}\"?"),
                None => format!("write one of {}, or add [category.{}] to the topology", known.join(", "), **category),
            };
            let complaint = Complaint::new(format!("there is no category {:?} in the topology", category.as_str()));
            let _: Reported = table.complain_at(category.place(), complaint.label("not in the topology").help(help));
        }
        let exclude = table.optional("exclude", patterns());
        let read_from = table.or(
            "read_from",
            choice(&[("beginning", ReadFrom::Beginning), ("end", ReadFrom::End)]),
            ReadFrom::Beginning,
        );
        let ignore_older = table.optional("ignore_older", duration(60 * SECOND..=10_000 * DAY));
        let rotate_wait = table.or("rotate_wait", duration(100 * MS..=HOUR), 5 * SECOND);
        let partial_line_timeout = table.or("partial_line_timeout", duration(100 * MS..=DAY), 30 * SECOND);
        let max_line_bytes = table.or("max_line_bytes", size(KIB..=8 * MIB), MIB.min(max_batch));
        if *max_line_bytes > max_batch {
            let _: Reported = table.complain_between(
                &[max_line_bytes.place()],
                Complaint::new("this must hold: source.max_line_bytes <= batch.max_bytes")
                    .help("a batch holds whole lines: make the line shorter or the batch larger"),
            );
        }
        let long_lines = table.or(
            "long_lines",
            choice(&[("split", LongLines::Split), ("truncate", LongLines::Truncate), ("drop", LongLines::Drop)]),
            LongLines::Split,
        );
        let category_name = category.as_ref().map_or("unknown", |category| category.as_str());
        let record_prefix = table.or(
            "record_prefix",
            text_as("\"{host}\\t\"", |template| {
                fill(template, &[("host", host), ("agent_id", agent_id.as_str()), ("category", category_name)])
            }),
            Bytes::new(),
        );
        let timestamp = TimestampOptions::read(table);
        Ok(Self {
            category: category?.into_value(),
            include: include?.into_value(),
            exclude: exclude.into_value().unwrap_or_default(),
            read_from: *read_from,
            ignore_older: *ignore_older,
            rotate_wait: *rotate_wait,
            partial_line_timeout: *partial_line_timeout,
            max_line_bytes: *max_line_bytes,
            long_lines: *long_lines,
            record_prefix: record_prefix.into_value(),
            timestamp: timestamp?,
        })
    }
}

/// Fills in the placeholders `{name}` of a record prefix; `{{` and `}}` stand for the braces themselves.
fn fill(template: &str, values: &[(&str, &str)]) -> Result<Bytes, Complaint> {
    let known = values.iter().map(|(name, _)| format!("{{{name}}}")).collect::<Vec<_>>().join(", ");
    let mut filled = String::new();
    let mut rest = template;
    while let Some(at) = rest.find(['{', '}']) {
        filled.push_str(&rest[..at]);
        let brace = &rest[at..=at];
        let behind = &rest[at + 1..];
        if let Some(behind) = behind.strip_prefix(brace) {
            filled.push_str(brace);
            rest = behind;
            continue;
        }
        let placeholder = if brace == "{" { behind.split_once('}') } else { None };
        let Some((name, behind)) = placeholder else {
            return Err(Complaint::new(format!("the prefix {template:?} has a brace without its partner"))
                .help(format!("the placeholders are {known}; write {{{{ or }}}} for a brace itself")));
        };
        let Some((_, value)) = values.iter().find(|(known, _)| *known == name) else {
            return Err(Complaint::new(format!("the prefix {template:?} has the unknown placeholder {{{name}}}"))
                .help(format!("the placeholders are {known}")));
        };
        filled.push_str(value);
        rest = behind;
    }
    filled.push_str(rest);
    if filled.contains(['\n', '\r', '\0']) {
        return Err(Complaint::new("a record prefix can't have line breaks or zero bytes in it")
            .help("each record is one line: separate the prefix by a tab or a space"));
    }
    if filled.len() > MAX_RECORD_PREFIX_BYTES {
        return Err(Complaint::new(format!(
            "the record prefix is {} bytes long with its placeholders filled in",
            filled.len()
        ))
        .help(format!("make it {MAX_RECORD_PREFIX_BYTES} bytes at most")));
    }
    Ok(Bytes::from(filled))
}

impl TimestampOptions {
    fn read(source: &mut Table<'_>) -> Read<Option<Self>> {
        let mut table = source.table("timestamp");
        if !table.is_written() {
            return Ok(None);
        }
        let formats = table.required("format", list(text_as("\"%d/%b/%Y:%H:%M:%S %z\"", check_format)));
        let after = table.optional("after", text().example("\"[\""));
        let json_field = table.optional("json_field", text_as("\"ts\"", check_json_field));
        if after.is_written() && json_field.is_written() {
            let _: Reported = table.complain_between(
                &[after.place(), json_field.place()],
                Complaint::new("`after` and `json_field` are both written")
                    .help("write one: `json_field` for lines that are JSON objects, `after` for others"),
            );
        }
        let timezone = table.or(
            "timezone",
            text_as("\"Europe/Berlin\"", |name| {
                TimeZone::get(name).map_err(|_| {
                    Complaint::new(format!("there is no time zone {name:?} on this machine"))
                        .help("write an IANA name, as in \"UTC\" or \"Europe/Berlin\" (the package tzdata has them)")
                })
            }),
            TimeZone::UTC,
        );
        Ok(Some(Self {
            formats: formats?.into_value(),
            after: Bytes::from(after.into_value().unwrap_or_default()),
            json_field: json_field.into_value(),
            timezone: timezone.into_value(),
        }))
    }
}

fn check_json_field(key: &str) -> Result<String, Complaint> {
    if (1..=128).contains(&key.len()) && !key.contains(['"', '\\']) && !key.chars().any(char::is_control) {
        return Ok(key.to_owned());
    }
    Err(Complaint::new(format!("{key:?} can't be the key of a JSON field"))
        .help("write the key alone, as in \"ts\": 1 to 128 bytes without quotes and backslashes; a path into nested objects can't be given"))
}

/// Tries a format out: prints a time by it and reads that back.
fn check_format(format: &str) -> Result<TimeFormat, Complaint> {
    if format == "unix_ms" {
        return Ok(TimeFormat::UnixMs);
    }
    let help = "write strptime's letters, as in \"%Y-%m-%dT%H:%M:%S%:z\", \"%d/%b/%Y:%H:%M:%S %z\", \"%b %d %H:%M:%S\", \
                \"%s\", or \"unix_ms\"";
    let wrong = |what: String| Complaint::new(format!("the format {format:?} {what}")).help(help);
    // A Sunday evening: an hour that 12 hour clocks write differently, and no two parts are the same number.
    let sample: Timestamp = "2026-11-22T20:15:31Z".parse().expect("a valid time");
    let sample = sample.to_zoned(TimeZone::UTC);
    let printed = strtime::format(format, &sample).map_err(|error| wrong(format!("can't be used: {error}")))?;
    let mut read =
        BrokenDownTime::parse(format, &printed).map_err(|error| wrong(format!("can't be read back: {error}")))?;
    if let Ok(time) = read.to_timestamp() {
        return if (time.as_second() - sample.timestamp().as_second()).abs() < 3600 {
            Ok(TimeFormat::Strptime(format.to_owned()))
        } else {
            Err(wrong("doesn't say the hour".to_owned()))
        };
    }
    if read.year().is_none() {
        read.set_year(Some(2026)).map_err(|error| wrong(format!("can't be used: {error}")))?;
    }
    let time = read.to_datetime().map_err(|error| wrong(format!("doesn't say day and time: {error}")))?;
    if time.date() != sample.date() || time.hour() != sample.hour() {
        return Err(wrong("doesn't say the day and the hour of 24".to_owned()));
    }
    Ok(TimeFormat::Strptime(format.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_that_say_day_and_hour_are_accepted() {
        for good in [
            "%d/%b/%Y:%H:%M:%S %z",
            "%Y-%m-%dT%H:%M:%S%.f%:z",
            "%Y-%m-%d %H:%M:%S,%3f",
            "%Y-%m-%d %I:%M:%S %p",
            "%b %d %H:%M:%S",
            "%b %e %T",
            "%s",
            "%s.%3f",
            "%Y%m%d%H",
        ] {
            assert_eq!(check_format(good).map_err(|e| format!("{e:?}")), Ok(TimeFormat::Strptime(good.to_owned())));
        }
        assert_eq!(check_format("unix_ms"), Ok(TimeFormat::UnixMs));
    }

    #[test]
    fn formats_that_do_not_are_refused() {
        for bad in ["%H:%M:%S", "%Y-%m-%d", "%Y-%m-%d %I:%M", "%d %H:%M", "plain", "%", "%!", "%Y-%m-%d %H:%M:%S %Z"] {
            assert!(check_format(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn a_pattern_knows_its_directory_and_keeps_to_its_slashes() {
        let pattern = PathPattern::new("/var/log/*/access.log*").expect("a glob");
        assert_eq!(pattern.base(), Path::new("/var/log"));
        assert!(pattern.matches(Path::new("/var/log/nginx/access.log.1")));
        assert!(!pattern.matches(Path::new("/var/log/nginx/old/access.log")));
        assert!(!pattern.matches(Path::new("/var/log/access.log")));
        let deep = PathPattern::new("/srv/**/*.log").expect("a glob");
        assert!(deep.matches(Path::new("/srv/a/b/c.log")) && deep.matches(Path::new("/srv/c.log")));
        assert_eq!(PathPattern::new("/var/log/syslog").expect("a path").base(), Path::new("/var/log"));
        assert_eq!(PathPattern::new("/*.log").expect("a glob").base(), Path::new("/"));
    }

    #[test]
    fn a_prefix_is_filled_in() {
        let values = [("host", "web-1"), ("category", "c")];
        assert_eq!(fill("{host}\t", &values).as_deref(), Ok(&b"web-1\t"[..]));
        assert_eq!(fill("{{{host}}} {category} ", &values).as_deref(), Ok(&b"{web-1} c "[..]));
        for bad in ["{host", "host}", "{path}", "{}", "{host}\n", &"x".repeat(257)] {
            assert!(fill(bad, &values).is_err(), "{bad:?} was accepted");
        }
    }
}
