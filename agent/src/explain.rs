//! Why a file would be shipped, or not: for an operator who wonders where its lines are.

use std::fmt::Write;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use serde::Serialize;
use tributary_common::bucket::{Bucket, BucketSize};
use tributary_common::config::show_duration;
use tributary_common::ids::CategoryName;

use crate::config::{AgentConfig, ReadFrom, Source};
use crate::identity::{FileFacts, Head, read_up_to};
use crate::timestamp::{LineTime, TimeReader};
use crate::worker::time_before;

/// How much is read of a line, to show it and to find its time.
const LINE_BYTES: usize = 8 << 10;

/// How many characters of a line are shown.
const SHOWN_CHARS: usize = 80;

/// How far back the beginning of the last line is looked for.
const LAST_LINE_SEARCH_BYTES: u64 = 16 << 20;

/// What would become of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// The file, as it was asked about.
    pub path: PathBuf,
    /// Whether it would be shipped.
    pub shipped: bool,
    /// Why, or why not, step by step.
    pub reasons: Vec<String>,
    /// Under which category.
    pub category: Option<CategoryName>,
    /// Bytes in it.
    pub size: Option<u64>,
    /// Its first and its last whole line, as far as it has any.
    pub lines: Vec<LineExplanation>,
}

/// What would become of a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LineExplanation {
    /// `first` or `last`.
    pub which: &'static str,
    /// Its beginning.
    pub text: String,
    /// Its time, RFC 3339, UTC.
    pub time: String,
    /// When its bucket begins, RFC 3339, UTC.
    pub bucket: String,
    /// How its time is known.
    pub reason: String,
}

impl Explanation {
    /// Explains the file at the absolute `path`, by a clock that shows `now_ms`.
    #[must_use]
    pub fn of(config: &AgentConfig, path: &Path, now_ms: i64) -> Self {
        let mut explanation = Self {
            path: path.to_owned(),
            shipped: false,
            reasons: Vec::new(),
            category: None,
            size: None,
            lines: Vec::new(),
        };
        let Some(source) = explanation.source(config, path) else { return explanation };
        explanation.category = Some(source.category.clone());
        match explanation.file(source, path) {
            Ok(Some(file)) => {
                explanation.shipped = true;
                let bucket = explanation.bucket(config, source);
                if let Err(error) = explanation.lines(source, &file, bucket, now_ms) {
                    explanation.reasons.push(format!("its lines can't be read: {error}"));
                }
            }
            Ok(None) => {}
            Err(error) => explanation.reasons.push(format!(
                "it can't be read: {error}; look at its permissions, and at those of the directories above it, for the user \
                 that the agent runs as"
            )),
        }
        explanation
    }

    fn source<'a>(&mut self, config: &'a AgentConfig, path: &Path) -> Option<&'a Source> {
        for (source, number) in config.sources.iter().zip(1..) {
            let name = format!("source {number} ({})", source.category);
            match (source.included_by(path), source.excluded_by(path)) {
                (Some(include), None) => {
                    self.reasons.push(format!("{name} includes it by {:?}", include.as_str()));
                    return Some(source);
                }
                (Some(include), Some(exclude)) => self.reasons.push(format!(
                    "{name} includes it by {:?} and excludes it by {:?}",
                    include.as_str(),
                    exclude.as_str()
                )),
                (None, _) => self.reasons.push(format!("{name} does not include it")),
            }
        }
        self.reasons.push(
            "only where a running agent follows it already, or finds in it what is missing of a log, is it shipped"
                .to_owned(),
        );
        None
    }

    /// The file, if it is one that is shipped.
    fn file(&mut self, source: &Source, path: &Path) -> io::Result<Option<File>> {
        let metadata = match std::fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.reasons.push("there is no such file now; it will be shipped when it comes".to_owned());
                return Ok(None);
            }
            other => other?,
        };
        if !metadata.is_file() {
            let what = if metadata.is_dir() { "a directory" } else { "not a regular file" };
            self.reasons.push(format!("it is {what}"));
            return Ok(None);
        }
        let file = File::open(path)?;
        let facts = FileFacts::of(&file)?;
        self.size = Some(facts.size);
        match Head::of(&file)? {
            Head::Line(_) => {}
            Head::Unfinished(line) if line.is_empty() => {
                self.reasons.push("it is empty: it is shipped when it has lines".to_owned());
            }
            Head::Unfinished(_) => self.reasons.push(format!(
                "its first line has no end yet: it waits for {}, or until the file is rotated away",
                show_duration(source.partial_line_timeout)
            )),
            Head::Compressed(by, _) => {
                self.reasons.push(format!(
                    "it is compressed ({by}): only what is missing of a log that was followed is taken from such a file"
                ));
                return Ok(None);
            }
            Head::Wide(encoding) => {
                self.reasons.push(format!("it is {encoding}, which can't be cut into lines: convert it to UTF-8"));
                return Ok(None);
            }
        }
        if let Some(limit) = source.ignore_older {
            let age = metadata.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
            if age.is_some_and(|age| age > limit) {
                let age = show_duration(Duration::from_secs(age.unwrap_or_default().as_secs()));
                self.reasons.push(format!(
                    "it was written to last {age} ago, longer than ignore_older = {:?}: without a checkpoint it is left alone",
                    show_duration(limit)
                ));
                return Ok(None);
            }
        }
        if source.read_from == ReadFrom::End {
            self.reasons.push(
                "read_from = \"end\": where it was there before the agent first ran, only what comes after is shipped"
                    .to_owned(),
            );
        }
        Ok(Some(file))
    }

    fn bucket(&mut self, config: &AgentConfig, source: &Source) -> BucketSize {
        match config.topology.as_ref().and_then(|topology| topology.category(&source.category)) {
            Some(category) => category.bucket,
            None => {
                self.reasons.push(
                    "without `topology` in the configuration, only the endpoints know how long a bucket is: an hour is assumed here"
                        .to_owned(),
                );
                BucketSize::HOUR
            }
        }
    }

    fn lines(&mut self, source: &Source, file: &File, size: BucketSize, now_ms: i64) -> io::Result<()> {
        let mut times = source.timestamp.as_ref().map(TimeReader::new);
        let end = FileFacts::of(file)?.size;
        let last = last_line(file, end)?;
        for (which, start) in [("first", (end > 0).then_some(0)), ("last", last.filter(|start| *start > 0))] {
            let Some(start) = start else { continue };
            let mut line = vec![0; LINE_BYTES];
            let got = read_up_to(file, &mut line, start)?;
            line.truncate(got);
            line.truncate(memchr::memchr(b'\n', &line).unwrap_or(line.len()));
            let (ms, reason) = match &mut times {
                None => (now_ms, "the time of reading, since the source has no [source.timestamp]"),
                Some(times) => match times.read(&line, now_ms) {
                    LineTime::At(ms) => (ms, "the line says it"),
                    LineTime::Implausible => (now_ms, "the line says a time that can't be: the time of reading"),
                    LineTime::None => match time_before(file, start, times, now_ms)? {
                        Some(ms) => (ms, "the line says none: that of the last line before it that does"),
                        None => (now_ms, "neither the line nor one before it says one: the time of reading"),
                    },
                },
            };
            self.lines.push(LineExplanation {
                which,
                text: String::from_utf8_lossy(&line).chars().take(SHOWN_CHARS).collect(),
                time: show_time(ms),
                bucket: show_bucket(size.bucket_of_ms(ms)),
                reason: reason.to_owned(),
            });
        }
        Ok(())
    }

    /// As a text for people.
    #[must_use]
    pub fn to_text(&self) -> String {
        let verdict = match (&self.category, self.shipped) {
            (Some(category), true) => format!("shipped as {category}"),
            _ => "not shipped".to_owned(),
        };
        let mut text = format!("{}: {verdict}\n", self.path.display());
        for reason in &self.reasons {
            let _ = writeln!(text, "  {reason}");
        }
        if let Some(size) = self.size {
            let _ = writeln!(text, "  size: {size} bytes");
        }
        for LineExplanation { which, text: line, time, bucket, reason } in &self.lines {
            let _ = writeln!(text, "  {which} line: {line:?}\n    bucket {bucket}, for its time is {time}: {reason}");
        }
        text
    }
}

fn show_time(ms: i64) -> String {
    Timestamp::from_millisecond(ms).map_or_else(|_| format!("{ms} ms"), |time| time.to_string())
}

fn show_bucket(bucket: Bucket) -> String {
    show_time(bucket.start_s() * 1000)
}

/// Where the last whole line begins, if there is one.
fn last_line(file: &File, size: u64) -> io::Result<Option<u64>> {
    const PIECE: u64 = 64 << 10;
    let lowest = size.saturating_sub(LAST_LINE_SEARCH_BYTES);
    let (mut end, mut newlines) = (size, 0);
    let mut bytes = Vec::new();
    while end > lowest {
        let from = end.saturating_sub(PIECE).max(lowest);
        bytes.resize((end - from) as usize, 0);
        let got = read_up_to(file, &mut bytes, from)?;
        for at in memchr::memrchr_iter(b'\n', &bytes[..got]) {
            newlines += 1;
            if newlines == 2 {
                return Ok(Some(from + at as u64 + 1));
            }
        }
        end = from;
    }
    Ok((newlines == 1 && lowest == 0).then_some(0))
}
