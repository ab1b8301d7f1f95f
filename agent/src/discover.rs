//! Finds log files: scans are the truth, what the system tells of changes in directories ([`crate::watch`]) only hastens
//! them.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use globset::{GlobBuilder, GlobMatcher};

use crate::config::Source;
use crate::identity::FileKey;
use crate::memory::{is_named_after, stem};

/// How deep below a pattern's fixed part `**` leads. A loop of links ends there at the latest.
const MAX_DEPTH: usize = 64;

/// A file that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Where.
    pub path: PathBuf,
    /// Which.
    pub key: FileKey,
    /// The number of the source that it belongs to.
    pub source: usize,
    /// Its size in bytes.
    pub size: u64,
    /// When it was last written to: seconds since 1970, and nanoseconds.
    pub written: (i64, i64),
    /// How it was found.
    pub by: FoundBy,
}

impl Found {
    /// How long it has not been written to; none where that is in the future.
    #[must_use]
    pub fn age(&self) -> Option<Duration> {
        let written = Duration::new(self.written.0.try_into().ok()?, self.written.1.try_into().ok()?);
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH + written).ok()
    }
}

/// How a file was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FoundBy {
    /// A source has its name.
    Name,
    /// A source has its name, and something hinted at it: no scan has seen what else there is by now.
    Hint,
    /// A source had its name, and it was renamed since: a log that was rotated before it was opened.
    FormerName,
    /// It has the inode number of a file that was missed, or may be a copy of one: no source has its name.
    Likeness,
}

/// A file that is looked for in the directory in which it was last, under whatever name.
#[derive(Debug, Clone)]
pub struct Missed {
    /// Its inode number.
    pub inode: u64,
    /// Where it was last.
    pub path: PathBuf,
    /// The number of its source.
    pub source: usize,
    /// Whether files named after it are to be found, too, which may be copies of it, compressed or not.
    pub copies: bool,
    /// Whether nothing was read of it yet: it was renamed between being found and being opened.
    pub unread: bool,
}

/// What a scan brought.
#[derive(Debug, Default)]
pub struct Scan {
    /// The files, each once.
    pub found: Vec<Found>,
    /// Directories in which files that match could appear.
    pub directories: BTreeSet<PathBuf>,
    /// Directories that could not be read, and why. Not those that don't exist: they may come.
    pub unreadable: Vec<(PathBuf, String)>,
    /// How long it took.
    pub took: Duration,
}

/// Scans for the files of all sources, and for those that are missed.
#[must_use]
pub fn scan(sources: &[Source], missed: &[Missed]) -> Scan {
    let begin = Instant::now();
    let mut scan = Scan::default();
    let mut keys = HashSet::new();
    for (index, source) in sources.iter().enumerate() {
        for pattern in &source.include {
            let steps = Steps::of(pattern.as_str(), pattern.base());
            let mut visited = HashSet::new();
            let is_of_source = |path: &Path| sources.iter().position(|one| one.matches(path)) == Some(index);
            walk(&mut scan, pattern.base(), &steps, 0, &mut visited, &is_of_source, &mut |scan, path, metadata| {
                if keys.insert(key_of(metadata)) {
                    scan.found.push(found(path, metadata, index, FoundBy::Name));
                }
            });
        }
    }
    let there: HashSet<u64> = keys.iter().map(|key: &FileKey| key.inode).collect();
    let mut by_directory: HashMap<&Path, (HashMap<u64, &Missed>, NamedAfter<'_>)> = HashMap::new();
    for one in missed {
        let Some(directory) = one.path.parent() else { continue };
        let (inodes, copies) = by_directory.entry(directory).or_default();
        if !there.contains(&one.inode) {
            inodes.insert(one.inode, one);
        }
        if one.copies {
            copies.insert(one);
        }
    }
    by_directory.retain(|_, (inodes, copies)| !inodes.is_empty() || !copies.is_empty());
    for (directory, (inodes, copies)) in by_directory {
        let Ok(entries) = std::fs::read_dir(directory) else { continue };
        for entry in entries.flatten() {
            let same = inodes.get(&entry.ino()).copied();
            let Some(one) = same.or_else(|| copies.of(&entry.file_name())) else { continue };
            let path = entry.path();
            // An inode number may have been used again, by a file that has nothing to do with logs.
            if one.unread && !is_named_after(&path, &one.path) {
                continue;
            }
            let by = if one.unread { FoundBy::FormerName } else { FoundBy::Likeness };
            if let Ok(metadata) = std::fs::metadata(&path)
                && metadata.is_file()
                && keys.insert(key_of(&metadata))
            {
                scan.found.push(found(&path, &metadata, one.source, by));
            }
        }
    }
    scan.found.sort_by(|a, b| a.path.cmp(&b.path));
    scan.took = begin.elapsed();
    scan
}

/// Looks at one path: what it leads to, if that is a file that a source has.
#[must_use]
pub fn look_at(sources: &[Source], path: &Path) -> Option<Found> {
    let source = sources.iter().position(|source| source.matches(path))?;
    let metadata = std::fs::metadata(path).ok().filter(Metadata::is_file)?;
    Some(found(path, &metadata, source, FoundBy::Hint))
}

/// Looks at a file that was renamed to `path`, and whose name `first` a source has.
#[must_use]
pub fn look_at_renamed(sources: &[Source], first: &Path, path: &Path) -> Option<Found> {
    let source = sources.iter().position(|source| source.matches(first))?;
    let metadata = std::fs::metadata(path).ok().filter(Metadata::is_file)?;
    Some(found(path, &metadata, source, FoundBy::FormerName))
}

/// The missed files of one directory by the beginnings of their names, so that the copies of many are found at once.
#[derive(Debug, Default)]
struct NamedAfter<'a> {
    by_stem: HashMap<&'a [u8], &'a Missed>,
    lengths: BTreeSet<usize>,
}

impl<'a> NamedAfter<'a> {
    fn insert(&mut self, one: &'a Missed) {
        let Some(name) = one.path.file_name() else { return };
        let stem = stem(name);
        self.lengths.insert(stem.len());
        self.by_stem.insert(stem, one);
    }

    fn is_empty(&self) -> bool {
        self.by_stem.is_empty()
    }

    /// One after which a file of this name is named.
    fn of(&self, name: &OsStr) -> Option<&'a Missed> {
        let name = name.as_encoded_bytes();
        self.lengths.iter().find_map(|len| self.by_stem.get(name.get(..*len)?).copied())
    }
}

fn key_of(metadata: &Metadata) -> FileKey {
    FileKey { device: metadata.dev(), inode: metadata.ino() }
}

fn found(path: &Path, metadata: &Metadata, source: usize, by: FoundBy) -> Found {
    Found {
        path: path.to_owned(),
        key: key_of(metadata),
        source,
        size: metadata.len(),
        written: (metadata.mtime(), metadata.mtime_nsec()),
        by,
    }
}

/// What the names below a pattern's fixed part must be like, level by level; without steps, anything at any level.
struct Steps(Option<Vec<GlobMatcher>>);

impl Steps {
    fn of(pattern: &str, base: &Path) -> Self {
        let below = Path::new(pattern).strip_prefix(base).ok().and_then(Path::to_str).unwrap_or(pattern);
        // A brace may have slashes in it, and `**` stands for any number of levels.
        if below.contains("**") || below.contains('{') {
            return Self(None);
        }
        let matcher = |part: &str| {
            GlobBuilder::new(part)
                .literal_separator(true)
                .backslash_escape(true)
                .build()
                .map(|glob| glob.compile_matcher())
        };
        Self(below.split('/').map(matcher).collect::<Result<_, _>>().ok())
    }

    fn allow(&self, level: usize, name: &Path) -> bool {
        self.0.as_ref().is_none_or(|steps| steps.get(level).is_some_and(|step| step.is_match(name)))
    }

    fn go_below(&self, level: usize) -> bool {
        level + 1 < self.0.as_ref().map_or(MAX_DEPTH, Vec::len)
    }
}

fn walk(
    scan: &mut Scan,
    directory: &Path,
    steps: &Steps,
    level: usize,
    visited: &mut HashSet<FileKey>,
    is_of_source: &impl Fn(&Path) -> bool,
    file: &mut impl FnMut(&mut Scan, &Path, &Metadata),
) {
    let entries = match std::fs::metadata(directory).and_then(|metadata| {
        // Two links to one directory don't lead to its files twice.
        if visited.insert(key_of(&metadata)) { std::fs::read_dir(directory).map(Some) } else { Ok(None) }
    }) {
        Ok(None) => return,
        Ok(Some(entries)) => entries,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return,
        Err(error) => {
            scan.unreadable.push((directory.to_owned(), error.to_string()));
            return;
        }
    };
    scan.directories.insert(directory.to_owned());
    let mut below = Vec::new();
    let go_below = steps.go_below(level);
    for entry in entries {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                scan.unreadable.push((directory.to_owned(), error.to_string()));
                return;
            }
        };
        if !steps.allow(level, Path::new(&entry.file_name())) {
            continue;
        }
        let path = entry.path();
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        // So that many files of others cost no more than the reading of their names.
        let is_file = !is_directory && is_of_source(&path);
        let may_lead_on = go_below && (is_directory || entry.file_type().is_ok_and(|kind| kind.is_symlink()));
        if !is_file && !may_lead_on {
            continue;
        }
        // A file that is gone by now is not worth a word.
        let Ok(metadata) = std::fs::metadata(&path) else { continue };
        if metadata.is_file() && is_file {
            file(scan, &path, &metadata);
        } else if metadata.is_dir() && go_below {
            below.push(path);
        }
    }
    below.sort();
    for path in below {
        walk(scan, &path, steps, level + 1, visited, is_of_source, file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{AgentConfig, Surroundings};

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new(files: &[&str]) -> Self {
            let dir = tempfile::tempdir().expect("a directory");
            for file in files {
                let path = dir.path().join(file);
                std::fs::create_dir_all(path.parent().expect("a parent")).expect("made");
                std::fs::write(path, file).expect("written");
            }
            Self(dir)
        }

        /// Sources, each given by its `include` and `exclude` below the tree.
        fn sources(&self, patterns: &[(&[&str], &[&str])]) -> Vec<Source> {
            let list = |patterns: &[&str]| {
                let quoted = patterns.iter().map(|pattern| format!("{:?}", self.0.path().join(pattern)));
                quoted.collect::<Vec<_>>().join(", ")
            };
            let mut text = "endpoints = [\"http://edge:1\"]\n".to_owned();
            for (include, exclude) in patterns {
                text += &format!("[[source]]\ncategory = \"app\"\ninclude = [{}]\n", list(include));
                if !exclude.is_empty() {
                    text += &format!("exclude = [{}]\n", list(exclude));
                }
            }
            let here = Surroundings { hostname: "h".into(), machine_id: Some("0".repeat(32)) };
            AgentConfig::parse(Path::new("agent.toml"), &text, &here).expect("a configuration").sources
        }

        fn names(&self, scan: &Scan) -> Vec<String> {
            let name = |found: &Found| found.path.strip_prefix(self.0.path()).expect("below").display().to_string();
            scan.found.iter().map(|found| format!("{}:{}", found.source, name(found))).collect()
        }
    }

    #[test]
    fn only_what_matches_is_found_and_only_the_way_there_is_walked() {
        let tree = Tree::new(&["a/x.log", "a/x.txt", "a/deep/x.log", "b/x.log", "c/d/e/x.log", "x.log"]);
        let all = scan(&tree.sources(&[(&["*/x.log"], &["b/*"])]), &[]);
        assert_eq!(tree.names(&all), ["0:a/x.log"]);
        assert!(!all.directories.contains(&tree.0.path().join("a/deep")), "{:?}", all.directories);
        assert!(all.directories.contains(&tree.0.path().join("b")), "a file may appear there");
        let deep = scan(&tree.sources(&[(&["c/**/*.log", "{a,b}/x.log"], &[])]), &[]);
        assert_eq!(tree.names(&deep), ["0:a/x.log", "0:b/x.log", "0:c/d/e/x.log"]);
    }

    #[test]
    fn a_file_belongs_to_the_first_source_and_is_found_once() {
        let tree = Tree::new(&["a.log", "b.log"]);
        std::fs::hard_link(tree.0.path().join("a.log"), tree.0.path().join("link.log")).expect("linked");
        std::os::unix::fs::symlink(tree.0.path(), tree.0.path().join("loop")).expect("linked");
        let all = scan(&tree.sources(&[(&["a*"], &[]), (&["**/*.log"], &[])]), &[]);
        assert_eq!(tree.names(&all), ["0:a.log", "1:b.log"]);
    }

    #[test]
    fn a_directory_that_is_not_there_or_is_a_file_is_no_trouble() {
        let tree = Tree::new(&["a.log/inside"]);
        let all = scan(&tree.sources(&[(&["missing/*.log", "a.log", "a.log/inside/*"], &[])]), &[]);
        assert_eq!(all.found, []);
        assert_eq!(all.unreadable, []);
    }

    #[test]
    fn a_file_that_was_renamed_meanwhile_is_found_by_its_inode() {
        let tree = Tree::new(&["app.log"]);
        let inode = std::fs::metadata(tree.0.path().join("app.log")).expect("metadata").ino();
        std::fs::rename(tree.0.path().join("app.log"), tree.0.path().join("app-1.old")).expect("renamed");
        std::fs::write(tree.0.path().join("app.log"), "new").expect("written");
        let missed = [Missed { inode, path: tree.0.path().join("app.log"), source: 0, copies: false, unread: false }];
        let all = scan(&tree.sources(&[(&["app.log"], &[])]), &missed);
        assert_eq!(tree.names(&all), ["0:app-1.old", "0:app.log"]);
        assert_eq!(all.found.iter().map(|found| found.by).collect::<Vec<_>>(), [FoundBy::Likeness, FoundBy::Name]);
    }
}
