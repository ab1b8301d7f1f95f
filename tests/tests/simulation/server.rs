//! An app server: its log files, which programs write, rotate, empty and restore, and the agent's database on it.
//!
//! It also keeps count of which lines may be missing, or there twice, in the end: those exceptions that the design names.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};

use tributary_agent::identity::ReadAt;
use tributary_common::ids::{AgentId, StreamId};
use tributary_common::position::Position;

use crate::chance::{Chance, Trace, locked};

#[derive(Default)]
struct Content {
    bytes: Vec<u8>,
    /// The end and the name of each line.
    lines: Vec<(u64, String)>,
    /// The beginning of a line whose end is still to be written.
    begun: Option<(String, i64, Vec<u8>)>,
    rotated: bool,
    changes: u64,
}

/// One log file.
pub(crate) struct LogFile {
    pub(crate) inode: u64,
    content: Mutex<Content>,
}

/// What an agent sees of a file without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) size: u64,
    pub(crate) rotated: bool,
    /// Grows with every change, as the time of the last change does.
    pub(crate) changes: u64,
}

impl LogFile {
    pub(crate) fn facts(&self) -> Facts {
        let content = locked(&self.content);
        Facts { size: content.bytes.len() as u64, rotated: content.rotated, changes: content.changes }
    }
}

impl ReadAt for LogFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let content = locked(&self.content);
        let rest = content.bytes.get(offset as usize..).unwrap_or(&[]);
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }
}

/// What an agent remembers of a file.
#[derive(Debug, Clone)]
pub(crate) struct Checkpoint {
    pub(crate) first_line: Vec<u8>,
    pub(crate) stream: StreamId,
    pub(crate) base: Position,
    pub(crate) committed: Position,
    pub(crate) history: Vec<Position>,
}

/// The agent's database.
#[derive(Debug, Clone, Default)]
pub(crate) struct Database {
    pub(crate) files: BTreeMap<u64, Checkpoint>,
    pub(crate) taken: BTreeSet<StreamId>,
}

/// How far a file is shipped, as its agent has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Shipped {
    pub(crate) stream: Option<StreamId>,
    pub(crate) committed: u64,
    /// The positions that the agent knows the file to have had.
    pub(crate) known: Vec<u64>,
    /// The file that is committed to its end: its size and its changes.
    pub(crate) all_of: Option<(u64, u64)>,
    pub(crate) state: String,
}

/// A line that programs wrote.
#[derive(Debug, Clone)]
pub(crate) struct Written {
    pub(crate) name: String,
    /// The time that stands in it.
    pub(crate) time_ms: i64,
    /// When its end was written.
    pub(crate) ended_ms: i64,
}

#[derive(Default)]
struct Fates {
    /// The number of lines that were begun.
    begun: usize,
    written: Vec<Written>,
    may_miss: BTreeSet<String>,
    may_double: BTreeSet<String>,
    /// What was shown of a file when it lost bytes: of another content.
    outdated: BTreeMap<u64, Option<StreamId>>,
    next_inode: u64,
}

/// From when the lane's owner knows an agent to when the agent first said that it would leave.
#[derive(Debug, Clone, Copy)]
struct Expected {
    from_ms: i64,
    to_ms: Option<i64>,
}

#[derive(Default)]
struct Presence {
    expected: Vec<Expected>,
    /// Its agent has said that it leaves, and is not known to be back.
    said_goodbye: bool,
    /// Its agent is to ship everything and leave.
    leaves: bool,
    /// Its agent has left, and its process has ended.
    has_left: bool,
    died_ms: Option<i64>,
}

/// One server.
pub(crate) struct Server {
    pub(crate) agent: AgentId,
    files: Mutex<Vec<Arc<LogFile>>>,
    pub(crate) database: Mutex<Database>,
    pub(crate) shipped: Mutex<BTreeMap<u64, Shipped>>,
    fates: Mutex<Fates>,
    presence: Mutex<Presence>,
    /// Lines that are not of the present are up to so old.
    oldest_ms: u64,
    chance: Chance,
    trace: Trace,
}

impl Server {
    pub(crate) fn new(name: &str, logs: usize, oldest_ms: u64, chance: Chance, trace: Trace) -> Self {
        let server = Self {
            agent: name.parse().expect("a good name"),
            files: Mutex::default(),
            database: Mutex::default(),
            shipped: Mutex::default(),
            fates: Mutex::default(),
            presence: Mutex::default(),
            oldest_ms,
            chance,
            trace,
        };
        (0..logs).for_each(|_| server.create());
        server
    }

    pub(crate) fn files(&self) -> Vec<Arc<LogFile>> {
        locked(&self.files).clone()
    }

    fn create(&self) {
        let mut fates = locked(&self.fates);
        fates.next_inode += 1;
        let file = LogFile { inode: fates.next_inode, content: Mutex::default() };
        locked(&self.files).push(Arc::new(file));
    }

    /// One of the files that are being written.
    fn any_live(&self) -> Option<Arc<LogFile>> {
        if self.died_ms().is_some() {
            return None;
        }
        let live: Vec<_> = self.files().into_iter().filter(|file| !file.facts().rotated).collect();
        live.get(self.chance.index(live.len())).cloned()
    }

    /// Programs write some lines, the last of which may be there only in part at first.
    pub(crate) fn write(&self, count: u64, now_ms: i64) {
        let Some(file) = self.any_live() else { return };
        let mut content = locked(&file.content);
        self.finish_line(&mut content, now_ms);
        for n in 0..count {
            let mut fates = locked(&self.fates);
            let name = format!("{}/{}/{}", self.agent, file.inode, fates.begun);
            fates.begun += 1;
            drop(fates);
            // Lines of one time and of times that go back.
            let age_ms = self.chance.below(if self.chance.one_in(20) { self.oldest_ms } else { 1_500 });
            let time_ms = now_ms - age_ms as i64;
            let padding = "x".repeat(self.chance.index(70));
            let mut line = format!("{time_ms} {name} {padding}").into_bytes();
            line.push(b'\n');
            let rest = if n + 1 == count && self.chance.one_in(4) { 1 + self.chance.index(line.len() - 1) } else { 0 };
            let later = line.split_off(line.len() - rest);
            content.bytes.extend_from_slice(&line);
            if later.is_empty() {
                let end = content.bytes.len() as u64;
                content.lines.push((end, name.clone()));
                locked(&self.fates).written.push(Written { name, time_ms, ended_ms: now_ms });
            } else {
                content.begun = Some((name, time_ms, later));
            }
        }
        content.changes += 1;
        self.trace.add(|| format!("{} file {} has {} bytes", self.agent, file.inode, content.bytes.len()));
    }

    fn finish_line(&self, content: &mut Content, now_ms: i64) {
        if let Some((name, time_ms, rest)) = content.begun.take() {
            content.bytes.extend_from_slice(&rest);
            let end = content.bytes.len() as u64;
            content.lines.push((end, name.clone()));
            content.changes += 1;
            locked(&self.fates).written.push(Written { name, time_ms, ended_ms: now_ms });
        }
    }

    /// All lines that were begun are ended.
    pub(crate) fn finish_lines(&self, now_ms: i64) {
        for file in self.files() {
            self.finish_line(&mut locked(&file.content), now_ms);
        }
    }

    /// A file is renamed, and another one begun under its name.
    pub(crate) fn rotate(&self, now_ms: i64) {
        let Some(file) = self.any_live() else { return };
        let mut content = locked(&file.content);
        if content.lines.is_empty() {
            return;
        }
        self.finish_line(&mut content, now_ms);
        content.rotated = true;
        content.changes += 1;
        drop(content);
        self.trace.add(|| format!("{} file {} is rotated", self.agent, file.inode));
        self.create();
    }

    /// How far the present content of a file is committed for certain.
    fn committed(&self, inode: u64, fates: &Fates) -> u64 {
        let shipped = locked(&self.shipped);
        let Some(shown) = shipped.get(&inode) else { return 0 };
        match fates.outdated.get(&inode) {
            Some(outdated) if *outdated == shown.stream => 0,
            _ => shown.committed,
        }
    }

    /// A file loses its end, from somewhere in its `percent` on, and goes on with other lines: emptied where that is 0, brought
    /// back as it had been once where it is more.
    pub(crate) fn cut_off(&self, percent: u64, now_ms: i64) {
        let Some(file) = self.any_live() else { return };
        let mut content = locked(&file.content);
        self.finish_line(&mut content, now_ms);
        let keep = content.lines.len() * percent as usize / 100;
        let len = keep.checked_sub(1).map_or(0, |last| content.lines[last].0);
        let mut fates = locked(&self.fates);
        let committed = self.committed(file.inode, &fates);
        let known = locked(&self.shipped).get(&file.inode).map(|shown| shown.known.clone()).unwrap_or_default();
        let common = known.into_iter().filter(|at| *at <= len && *at <= committed).max().unwrap_or(0);
        for (end, name) in content.lines.split_off(keep) {
            if end > committed {
                fates.may_miss.insert(name);
            }
        }
        for (_, name) in content.lines.iter().filter(|(end, _)| *end > common) {
            fates.may_double.insert(name.clone());
        }
        let stream = locked(&self.shipped).get(&file.inode).and_then(|shown| shown.stream);
        fates.outdated.insert(file.inode, stream);
        drop(fates);
        content.bytes.truncate(len as usize);
        content.changes += 1;
        drop(content);
        self.trace.add(|| format!("{} file {} is cut to {len} bytes", self.agent, file.inode));
        self.write(1, now_ms);
    }

    /// The agent's database is gone, or older than it was.
    pub(crate) fn replace_database(&self, with: Database) {
        *locked(&self.database) = with;
        self.trace.add(|| format!("{} has another database", self.agent));
    }

    /// The lane's owner knows the agent.
    pub(crate) fn is_known_from(&self, now_ms: i64) {
        let mut presence = locked(&self.presence);
        presence.said_goodbye = false;
        if presence.expected.last().is_none_or(|expected| expected.to_ms.is_some()) {
            presence.expected.push(Expected { from_ms: now_ms, to_ms: None });
        }
    }

    /// Since when hours wait for it, if they do.
    pub(crate) fn known_ms(&self) -> Option<i64> {
        locked(&self.presence).expected.first().map(|expected| expected.from_ms)
    }

    /// Its agent says that it leaves. Whether or not that is heard, hours may do without it.
    pub(crate) fn says_goodbye(&self, now_ms: i64) {
        let mut presence = locked(&self.presence);
        presence.said_goodbye = true;
        if let Some(expected) = presence.expected.last_mut() {
            expected.to_ms.get_or_insert(now_ms);
        }
    }

    /// Whether its agent said so, and is not known to be back.
    pub(crate) fn said_goodbye(&self) -> bool {
        locked(&self.presence).said_goodbye
    }

    /// Whether a line has to be in an hour, and not beside it, that ends at `end_ms`: written in time, by a server whose agent was
    /// waited for and has not left before.
    pub(crate) fn must_be_in(&self, line: &Written, end_ms: i64, close_delay_ms: i64) -> bool {
        locked(&self.presence).expected.iter().any(|expected| {
            let until_ms = expected.to_ms.unwrap_or(i64::MAX).min(end_ms + close_delay_ms);
            expected.from_ms < end_ms && line.ended_ms < until_ms
        })
    }

    /// Its agent is to ship everything and leave, or not.
    pub(crate) fn wish_to_leave(&self, leaves: bool) {
        locked(&self.presence).leaves = leaves;
    }

    pub(crate) fn wants_to_leave(&self) -> bool {
        locked(&self.presence).leaves
    }

    /// Whether its agent has left since the last call.
    pub(crate) fn take_has_left(&self) -> bool {
        std::mem::take(&mut locked(&self.presence).has_left)
    }

    /// Its agent was heard to leave.
    pub(crate) fn leaves(&self) {
        let mut presence = locked(&self.presence);
        (presence.leaves, presence.has_left) = (false, true);
    }

    /// It is gone for ever, with its files.
    pub(crate) fn die(&self, now_ms: i64) {
        for file in self.files() {
            let mut content = locked(&file.content);
            content.begun = None;
            let mut fates = locked(&self.fates);
            let committed = self.committed(file.inode, &fates);
            let lost = content.lines.iter().filter(|(end, _)| *end > committed);
            fates.may_miss.extend(lost.map(|(_, name)| name.clone()));
        }
        locked(&self.presence).died_ms = Some(now_ms);
        self.trace.add(|| format!("{} dies for ever", self.agent));
    }

    /// When it died, if it did.
    pub(crate) fn died_ms(&self) -> Option<i64> {
        locked(&self.presence).died_ms
    }

    /// Whether everything is committed, also what its agent hasn't seen yet.
    pub(crate) fn is_done(&self) -> bool {
        let shipped = locked(&self.shipped);
        let whole = |file: &Arc<LogFile>| {
            let Facts { size, changes, .. } = file.facts();
            size == 0 || shipped.get(&file.inode).is_some_and(|one| one.all_of == Some((size, changes)))
        };
        self.died_ms().is_some() || self.files().iter().all(whole)
    }

    /// What became of lines: what was written, what of it may be missing, what of it may be there twice.
    pub(crate) fn fates(&self) -> (Vec<Written>, BTreeSet<String>, BTreeSet<String>) {
        let fates = locked(&self.fates);
        (fates.written.clone(), fates.may_miss.clone(), fates.may_double.clone())
    }
}
