//! What is known of streams, open or not: found by their file's inode, by their first line, by what they are copies of.
//! Pure.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::path::Path;

use tributary_common::ids::{AgentId, CategoryName, StreamId};
use tributary_common::position::TailHash;

use crate::checkpoint::Checkpoint;
use crate::identity::{FileFacts, Origin, stream_id};

/// With so many streams at most a file is compared that begins like them.
const MAX_CANDIDATES: usize = 16;

/// The streams.
#[derive(Debug, Default)]
pub struct Memory {
    streams: HashMap<StreamId, Checkpoint>,
    by_inode: HashMap<u64, Vec<StreamId>>,
    by_line: HashMap<TailHash, Vec<StreamId>>,
    copies: HashMap<StreamId, Vec<StreamId>>,
}

impl Memory {
    /// Remembers a stream as it is now.
    pub fn insert(&mut self, checkpoint: Checkpoint) {
        let stream = checkpoint.stream;
        // Only what changes is looked up: this is done with every commit.
        match self.streams.get(&stream) {
            Some(old) if old.inode == checkpoint.inode && old.copy_of == checkpoint.copy_of => {}
            _ => {
                self.remove(stream);
                self.by_inode.entry(checkpoint.inode).or_default().push(stream);
                self.by_line.entry(checkpoint.first_line_hash).or_default().push(stream);
                if let Some(original) = checkpoint.copy_of {
                    self.copies.entry(original).or_default().push(stream);
                }
            }
        }
        self.streams.insert(stream, checkpoint);
    }

    /// Forgets a stream.
    pub fn remove(&mut self, stream: StreamId) -> Option<Checkpoint> {
        fn take<K: std::hash::Hash + Eq>(index: &mut HashMap<K, Vec<StreamId>>, key: &K, stream: StreamId) {
            if let Some(streams) = index.get_mut(key) {
                streams.retain(|one| *one != stream);
                if streams.is_empty() {
                    index.remove(key);
                }
            }
        }
        let old = self.streams.remove(&stream)?;
        take(&mut self.by_inode, &old.inode, stream);
        take(&mut self.by_line, &old.first_line_hash, stream);
        if let Some(original) = old.copy_of {
            take(&mut self.copies, &original, stream);
        }
        Some(old)
    }

    /// What is remembered of a stream.
    #[must_use]
    pub fn get(&self, stream: StreamId) -> Option<&Checkpoint> {
        self.streams.get(&stream)
    }

    /// All streams.
    pub fn iter(&self) -> impl Iterator<Item = &Checkpoint> {
        self.streams.values()
    }

    /// Whether a file with this inode number is known.
    #[must_use]
    pub fn knows_inode(&self, inode: u64) -> bool {
        self.by_inode.contains_key(&inode)
    }

    /// The streams that were read last from a file with this inode number.
    pub fn at_inode(&self, inode: u64) -> impl Iterator<Item = &Checkpoint> {
        self.by_inode.get(&inode).into_iter().flatten().filter_map(|stream| self.streams.get(stream))
    }

    /// The newest stream of a file that begins with `line`.
    #[must_use]
    pub fn of_file(&self, agent: &AgentId, facts: &FileFacts, line: &[u8]) -> Option<&Checkpoint> {
        let is_it = |one: &&Checkpoint| {
            let origin = Origin { inode: one.origin_inode, birth_or_filesystem: one.origin_birth };
            one.birth_or_filesystem == facts.birth_or_filesystem
                && line
                    .get(..one.first_line_bytes as usize)
                    .is_some_and(|line| stream_id(agent, origin, line, one.incarnation) == one.stream)
        };
        // A stream that goes on in this file comes before one that was taken for its own.
        self.at_inode(facts.key.inode)
            .filter(is_it)
            .max_by_key(|one| (one.origin_inode != facts.key.inode, one.incarnation))
    }

    /// Whether the stream is the one that its file is read for, and no newer one has begun in that file.
    #[must_use]
    pub fn is_newest(&self, one: &Checkpoint) -> bool {
        let same = self.at_inode(one.inode).filter(|other| other.birth_or_filesystem == one.birth_or_filesystem);
        same.max_by_key(|other| (other.origin_inode != one.inode, other.incarnation))
            .is_none_or(|newest| newest.stream == one.stream)
    }

    /// The streams of a category of which a file that begins with a line of this hash may be a copy, likelier ones first.
    #[must_use]
    pub fn candidates(&self, category: &CategoryName, line: TailHash, path: &Path) -> Vec<&Checkpoint> {
        let streams = self.by_line.get(&line).into_iter().flatten().filter_map(|stream| self.streams.get(stream));
        let mut streams: Vec<_> = streams.filter(|one| one.category == *category && one.copy_of.is_none()).collect();
        streams.sort_by_cached_key(|one| {
            let unrelated = !is_named_after(path, &one.path) && !is_named_after(&one.path, path);
            (unrelated, one.finished, std::cmp::Reverse(one.seen_ms), one.stream)
        });
        streams.truncate(MAX_CANDIDATES);
        streams
    }

    /// The copies that have nothing of their own yet, each with its original.
    pub fn mere_copies(&self) -> impl Iterator<Item = (&Checkpoint, &Checkpoint)> {
        let copies = self.copies.values().flatten().filter_map(|stream| self.streams.get(stream));
        let mere = copies.filter(|one| one.committed.offset == one.base.offset);
        mere.filter_map(|one| Some((one, self.streams.get(&one.copy_of?)?)))
    }

    /// Takes out what may be forgotten of files that are gone. `there`: the inode numbers of those that are not.
    pub fn forget(&mut self, there: &HashSet<u64>, now_ms: i64) -> Vec<StreamId> {
        let gone = self.streams.values().filter(|one| !there.contains(&one.inode) || !self.is_newest(one));
        let forgotten: Vec<_> = gone.filter(|one| one.may_be_forgotten(now_ms)).map(|one| one.stream).collect();
        for stream in &forgotten {
            self.remove(*stream);
        }
        forgotten
    }
}

/// Whether `path` may be what a rotation made of `original`: in the same directory, its name begins like that, up to the
/// first dot.
#[must_use]
pub fn is_named_after(path: &Path, original: &Path) -> bool {
    let (Some(name), Some(original_name)) = (path.file_name(), original.file_name()) else { return false };
    path.parent() == original.parent() && name.as_encoded_bytes().starts_with(stem(original_name))
}

/// With what the names of a file's copies begin: its own up to the first dot, but for one at its beginning.
#[must_use]
pub fn stem(name: &OsStr) -> &[u8] {
    let name = name.as_encoded_bytes();
    &name[..name.iter().skip(1).position(|byte| *byte == b'.').map_or(name.len(), |at| at + 1)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::FileKey;
    use tributary_common::position::Position;

    const LINE: &[u8] = b"first line";

    fn agent() -> AgentId {
        "web-1".parse().expect("valid")
    }

    fn facts(inode: u64) -> FileFacts {
        let key = FileKey { device: 1, inode };
        FileFacts { key, birth_or_filesystem: 5, size: 0, deleted: false, regular: true }
    }

    fn checkpoint(inode: u64, incarnation: u32) -> Checkpoint {
        let origin = facts(inode).origin();
        Checkpoint {
            stream: stream_id(&agent(), origin, LINE, incarnation),
            path: format!("/var/log/app.log.{inode}").into(),
            device: 1,
            inode,
            birth_or_filesystem: 5,
            origin_inode: inode,
            origin_birth: 5,
            first_line_bytes: LINE.len() as u32,
            first_line_hash: TailHash::of(LINE),
            incarnation,
            base: Position::zero(),
            committed: Position::zero(),
            history: Vec::new(),
            category: "app".parse().expect("valid"),
            finished: false,
            seen_ms: 1000,
            copy_of: None,
        }
    }

    #[test]
    fn the_newest_incarnation_of_a_file_counts() {
        let mut memory = Memory::default();
        for incarnation in [1, 2, 0] {
            memory.insert(checkpoint(7, incarnation));
        }
        let found = memory.of_file(&agent(), &facts(7), b"first line, and more").expect("known");
        assert_eq!(found.incarnation, 2);
        assert!(memory.is_newest(&checkpoint(7, 2)) && !memory.is_newest(&checkpoint(7, 1)));
        assert!(memory.of_file(&agent(), &facts(7), b"another line").is_none());
        assert!(memory.of_file(&agent(), &facts(8), LINE).is_none());
        let later = FileFacts { birth_or_filesystem: 6, ..facts(7) };
        assert!(memory.of_file(&agent(), &later, LINE).is_none(), "the inode number is used again");
    }

    #[test]
    fn a_stream_that_goes_on_in_a_copy_is_found_there() {
        let mut memory = Memory::default();
        let began = checkpoint(7, 0);
        memory.insert(began.clone());
        memory.insert(Checkpoint { copy_of: Some(began.stream), ..checkpoint(8, 0) });
        let copies: Vec<_> = memory.mere_copies().map(|(copy, original)| (copy.stream, original.stream)).collect();
        assert_eq!(copies, [(checkpoint(8, 0).stream, began.stream)]);
        let moved = Checkpoint { inode: 8, ..began.clone() };
        memory.insert(moved.clone());
        assert_eq!(memory.of_file(&agent(), &facts(8), LINE).map(|one| one.stream), Some(began.stream));
        assert!(memory.of_file(&agent(), &facts(7), LINE).is_none());
        assert!(memory.is_newest(&moved));
        assert_eq!(memory.remove(began.stream), Some(moved));
        assert_eq!(memory.of_file(&agent(), &facts(8), LINE).map(|one| one.stream), Some(checkpoint(8, 0).stream));
    }

    #[test]
    fn likelier_candidates_come_first_and_copies_are_none() {
        let mut memory = Memory::default();
        for inode in 0..40 {
            memory.insert(Checkpoint { path: format!("/srv/{inode}/x.log").into(), ..checkpoint(inode, 0) });
        }
        let near = Checkpoint { path: "/var/log/app.log".into(), finished: true, ..checkpoint(50, 0) };
        memory.insert(near.clone());
        memory.insert(Checkpoint { copy_of: Some(near.stream), ..checkpoint(51, 0) });
        memory.insert(Checkpoint { category: "other".parse().expect("valid"), ..checkpoint(52, 0) });
        let found = memory.candidates(&near.category, TailHash::of(LINE), Path::new("/var/log/app.log-20261122"));
        assert_eq!(found.len(), MAX_CANDIDATES);
        assert_eq!(found[0], &near);
        assert!(found.iter().all(|one| one.copy_of.is_none() && one.category == near.category));
    }

    #[test]
    fn only_what_is_gone_or_was_replaced_is_forgotten() {
        let mut memory = Memory::default();
        memory.insert(checkpoint(7, 0));
        memory.insert(checkpoint(7, 1));
        memory.insert(checkpoint(8, 0));
        let late = 1000 + 61 * 86_400_000;
        assert_eq!(memory.forget(&[7, 8].into(), 2000), []);
        let mut forgotten = memory.forget(&[7].into(), late);
        forgotten.sort();
        let mut expected = [checkpoint(7, 0).stream, checkpoint(8, 0).stream];
        expected.sort();
        assert_eq!(forgotten, expected);
        assert!(memory.knows_inode(7) && !memory.knows_inode(8));
    }

    #[test]
    fn rotations_keep_the_beginning_of_a_name() {
        let original = Path::new("/var/log/app.log");
        for name in ["app.log.1", "app.log.1.gz", "app-20261122.log.gz", "app.log", "app.1.log"] {
            assert!(is_named_after(&Path::new("/var/log").join(name), original), "{name}");
        }
        for other in ["/var/log/other.log", "/srv/app.log.1", "/var/log/ap"] {
            assert!(!is_named_after(Path::new(other), original), "{other}");
        }
    }
}
