//! Multisets of lines: what was written, what a reader found, and the difference.
//!
//! A set holds a 128-bit hash per line, 16 bytes of memory whatever the line's length, so that millions of lines are judged in
//! seconds. To show the lines that differ it reads its files a second time.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::{fmt, iter};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use xxhash_rust::xxh3::xxh3_128;

use crate::parts::Parts;

/// How many lines of each kind a [`Difference`] shows.
const EXAMPLES: usize = 5;

/// The lines of some files, each as often as it stands there, without their newlines.
#[derive(Clone, Debug)]
pub struct Lines {
    /// Sorted.
    hashes: Vec<u128>,
    bytes: u64,
    files: Vec<PathBuf>,
    /// Keep the files of readers until the last set that needs them is gone.
    folders: Vec<Arc<TempDir>>,
}

impl Lines {
    /// Reads files completely: `.gz` through `zcat`, `.zst` through `zstdcat`, any other as it is. A last line without a newline
    /// counts as a line.
    ///
    /// # Errors
    /// A file can't be read, or a decompressor complains.
    pub fn of_files(files: impl IntoIterator<Item = PathBuf>) -> Result<Self> {
        let mut lines = Self { hashes: Vec::new(), bytes: 0, files: files.into_iter().collect(), folders: Vec::new() };
        for file in &lines.files {
            for_each_line(file, |line| {
                lines.hashes.push(xxh3_128(line));
                lines.bytes += line.len() as u64;
            })?;
        }
        lines.hashes.sort_unstable();
        Ok(lines)
    }

    /// The same, of files in a folder that is removed with the last copy of the set.
    ///
    /// # Errors
    /// As of [`Self::of_files`].
    pub(crate) fn of_files_in(folder: TempDir, files: impl IntoIterator<Item = PathBuf>) -> Result<Self> {
        let mut lines = Self::of_files(files)?;
        lines.folders.push(Arc::new(folder));
        Ok(lines)
    }

    /// The lines of both.
    #[must_use]
    pub fn joined(mut self, other: Self) -> Self {
        self.hashes.extend(other.hashes);
        self.hashes.sort_unstable();
        self.bytes += other.bytes;
        self.files.extend(other.files);
        self.folders.extend(other.folders);
        self
    }

    /// How many lines, doubles included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    /// Whether there is no line.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// The lines' bytes, without newlines.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What `found` has too little and too much, these being the lines that were written.
    ///
    /// # Errors
    /// The files can't be read again for the examples.
    pub fn difference(&self, found: &Self) -> Result<Difference> {
        let mut difference = Difference { expected: self.len(), found: found.len(), ..Difference::default() };
        let (mut missing, mut doubled, mut foreign) = (HashSet::new(), HashSet::new(), HashSet::new());
        let note = |examples: &mut HashSet<u128>, hash| {
            if examples.len() < EXAMPLES {
                examples.insert(hash);
            }
        };
        let (mut left, mut right) = (runs(&self.hashes).peekable(), runs(&found.hashes).peekable());
        loop {
            let (hash, wanted, got) = match (left.peek().copied(), right.peek().copied()) {
                (None, None) => break,
                (Some((hash, wanted)), other) if other.is_none_or(|(theirs, _)| hash < theirs) => {
                    left.next();
                    (hash, wanted, 0)
                }
                (own, Some((hash, got))) if own.is_none_or(|(ours, _)| hash < ours) => {
                    right.next();
                    (hash, 0, got)
                }
                (own, other) => {
                    left.next();
                    right.next();
                    let (hash, wanted) = own.unwrap_or_default();
                    (hash, wanted, other.unwrap_or_default().1)
                }
            };
            if got < wanted {
                difference.missing += wanted - got;
                note(&mut missing, hash);
            } else if wanted == 0 {
                difference.foreign += got;
                note(&mut foreign, hash);
            } else if got > wanted {
                difference.doubled += got - wanted;
                note(&mut doubled, hash);
            }
        }
        difference.missing_examples = self.texts(&missing)?;
        difference.doubled_examples = found.texts(&doubled)?;
        difference.foreign_examples = found.texts(&foreign)?;
        Ok(difference)
    }

    fn texts(&self, wanted: &HashSet<u128>) -> Result<Vec<String>> {
        let mut texts = HashMap::new();
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        for file in &self.files {
            for_each_line(file, |line| {
                let hash = xxh3_128(line);
                if wanted.contains(&hash) {
                    let example = || format!("{} ({})", String::from_utf8_lossy(line), file.display());
                    texts.entry(hash).or_insert_with(example);
                }
            })?;
        }
        Ok(texts.into_values().collect())
    }
}

/// What a reader found too little and too much. All counts are of lines.
#[derive(Clone, Debug, Default)]
pub struct Difference {
    /// Lines written.
    pub expected: usize,
    /// Lines found.
    pub found: usize,
    /// Written and not found, or not as often.
    pub missing: usize,
    /// Written and found more often.
    pub doubled: usize,
    /// Found and never written: torn, joined or invented.
    pub foreign: usize,
    /// A few of them, each with the file where it stands.
    pub missing_examples: Vec<String>,
    /// A few of them, each with the first file where it stands.
    pub doubled_examples: Vec<String>,
    /// A few of them, each with the first file where it stands.
    pub foreign_examples: Vec<String>,
}

impl Difference {
    /// Every line, once each as often as it was written, and nothing else.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.missing == 0 && self.doubled == 0 && self.foreign == 0
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { expected, found, missing, doubled, foreign, .. } = self;
        write!(f, "{expected} lines written, {found} found: {missing} missing, {doubled} doubled, {foreign} foreign")?;
        let kinds = [
            ("missing", &self.missing_examples),
            ("doubled", &self.doubled_examples),
            ("foreign", &self.foreign_examples),
        ];
        for (kind, examples) in kinds {
            for example in examples {
                write!(f, "\n  {kind}: {example}")?;
            }
        }
        Ok(())
    }
}

/// Each hash of a sorted slice with the number of times that it stands there.
fn runs(sorted: &[u128]) -> impl Iterator<Item = (u128, usize)> {
    let mut rest = sorted;
    iter::from_fn(move || {
        let first = *rest.first()?;
        let count = rest.iter().take_while(|&&hash| hash == first).count();
        rest = &rest[count..];
        Some((first, count))
    })
}

fn for_each_line(file: &Path, mut each: impl FnMut(&[u8])) -> Result<()> {
    let read = |input: &mut dyn Read, each: &mut dyn FnMut(&[u8])| -> Result<()> {
        let mut input = BufReader::with_capacity(1 << 20, input);
        let mut line = Vec::new();
        while input.read_until(b'\n', &mut line).with_context(|| format!("reading {}", file.display()))? > 0 {
            each(line.strip_suffix(b"\n").unwrap_or(&line));
            line.clear();
        }
        Ok(())
    };
    let decompressor = match file.extension().and_then(|extension| extension.to_str()) {
        Some("gz") => "zcat",
        Some("zst") => "zstdcat",
        _ => {
            let mut input = File::open(file).with_context(|| format!("opening {}", file.display()))?;
            return read(&mut input, &mut each);
        }
    };
    let mut child = Command::new(Parts::command(decompressor)?)
        .arg("--")
        .arg(file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {decompressor}"))?;
    let mut output = child.stdout.take().context("the decompressor has no output")?;
    let done = read(&mut output, &mut each);
    drop(output);
    let status = child.wait().with_context(|| format!("waiting for {decompressor}"))?;
    done?;
    ensure!(status.success(), "{decompressor} {}: {status}", file.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn lines(folder: &TempDir, name: &str, text: &str) -> Lines {
        let file = folder.path().join(name);
        fs::write(&file, text).expect("written");
        Lines::of_files([file]).expect("read")
    }

    #[test]
    fn tells_missing_doubled_and_foreign_lines_apart_and_shows_them() {
        let folder = tempfile::tempdir().expect("a folder");
        let written = lines(&folder, "written", "a\nb\nb\nc\nd\n");
        assert!(written.difference(&lines(&folder, "same", "d\nb\nc\nb\na")).expect("compared").is_none());
        let found = lines(&folder, "found", "b\nc\nc\nx\nd\nd\nd\n");
        let difference = written.difference(&found).expect("compared");
        assert_eq!((difference.missing, difference.doubled, difference.foreign), (2, 3, 1));
        let both = lines(&folder, "one", "a\nc\n").joined(lines(&folder, "two", "b\nb\nd\n"));
        assert!(written.difference(&both).expect("compared").is_none());
        assert_eq!((both.len(), both.bytes()), (5, 5));
        let text = difference.to_string();
        for part in
            ["5 lines written, 7 found", "missing: a (", "missing: b (", "doubled: c (", "doubled: d (", "foreign: x ("]
        {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
    }

    #[test]
    fn a_torn_gzip_file_is_an_error() {
        use std::io::Write as _;
        let folder = tempfile::tempdir().expect("a folder");
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(b"one\ntwo\n").expect("compressed");
        let bytes = gzip.finish().expect("compressed");
        let file = folder.path().join("x.gz");
        fs::write(&file, &bytes).expect("written");
        assert_eq!(Lines::of_files([file.clone()]).expect("read").len(), 2);
        fs::write(&file, &bytes[..bytes.len() - 3]).expect("written");
        assert!(Lines::of_files([file]).is_err());
    }
}
