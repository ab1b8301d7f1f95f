//! The disk of an edge: forgets and tears what was not synced, fails, fills up, rots, is lost, and is brought back as it was
//! some time ago.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use tributary_aggregator::spool::io::{Folder, FolderFile};
use tributary_aggregator::surroundings::Blocking;
use xxhash_rust::xxh3::xxh3_64;

use crate::chance::{Chance, Trace, locked};
use crate::network::Gate;

/// How often a call fails, in ten thousand.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Wear {
    pub(crate) writes: u64,
    pub(crate) syncs: u64,
}

#[derive(Default, Clone)]
struct Content {
    bytes: Vec<u8>,
    synced: Vec<u8>,
}

type Names = BTreeMap<String, Arc<Mutex<Content>>>;

#[derive(Default)]
struct State {
    files: Names,
    /// The names that a loss of power leaves.
    synced_names: Names,
    wear: Wear,
}

/// What a disk held at some time.
#[derive(Clone)]
pub(crate) struct Copy(BTreeMap<String, Vec<u8>>);

#[derive(Clone)]
pub(crate) struct Disk {
    state: Arc<Mutex<State>>,
    chance: Chance,
    trace: Trace,
}

impl Disk {
    pub(crate) fn new(chance: Chance, trace: Trace) -> Self {
        Self { state: Arc::default(), chance, trace }
    }

    pub(crate) fn set_wear(&self, wear: Wear) {
        locked(&self.state).wear = wear;
    }

    /// A folder of it, as a process uses it.
    pub(crate) fn folder(&self, gate: &Gate, name: &'static str) -> Arc<dyn Folder> {
        Arc::new(View { disk: self.clone(), gate: gate.clone(), name })
    }

    /// All is gone.
    pub(crate) fn lose(&self) {
        let mut state = locked(&self.state);
        state.files.clear();
        state.synced_names.clear();
    }

    pub(crate) fn copy(&self) -> Copy {
        let state = locked(&self.state);
        Copy(state.files.iter().map(|(name, file)| (name.clone(), locked(file).bytes.clone())).collect())
    }

    /// It is as it was then.
    pub(crate) fn roll_back(&self, copy: &Copy) {
        let mut state = locked(&self.state);
        state.files = (copy.0.iter())
            .map(|(name, bytes)| {
                let content = Content { bytes: bytes.clone(), synced: bytes.clone() };
                (name.clone(), Arc::new(Mutex::new(content)))
            })
            .collect();
        state.synced_names = state.files.clone();
    }

    /// The machine loses power: of what was not synced any beginning stays, some of it as zeros; a name that was not synced may
    /// stay, and a removed one come back.
    pub(crate) fn lose_power(&self) {
        let chance = &self.chance;
        let mut state = locked(&self.state);
        let mut names = state.synced_names.clone();
        for (name, file) in &state.files {
            if chance.one_in(2) {
                names.insert(name.clone(), Arc::clone(file));
            }
        }
        let files = &state.files;
        names.retain(|name, _| files.contains_key(name) || chance.one_in(2));
        let torn = names.into_iter().map(|(name, file)| {
            let content = locked(&file);
            let mut bytes = content.synced.clone();
            if content.bytes.len() > bytes.len() && content.bytes.starts_with(&bytes) {
                let more = chance.index(content.bytes.len() - bytes.len() + 1);
                bytes = content.bytes[..bytes.len() + more].to_vec();
                if chance.per_mille(300) {
                    let zeros = chance.index(more + 1);
                    let from = bytes.len() - zeros;
                    bytes[from..].fill(0);
                }
            }
            let content = Content { synced: bytes.clone(), bytes };
            (name, Arc::new(Mutex::new(content)))
        });
        state.files = torn.collect();
        state.synced_names = state.files.clone();
    }

    /// One bit of it turns.
    pub(crate) fn rot(&self) {
        let state = locked(&self.state);
        let files: Vec<&Arc<Mutex<Content>>> =
            state.files.values().filter(|file| !locked(file).bytes.is_empty()).collect();
        if let Some(file) = files.get(self.chance.index(files.len())) {
            let mut content = locked(file);
            let at = self.chance.index(content.bytes.len());
            content.bytes[at] ^= 1 << self.chance.below(8);
            if at < content.synced.len() {
                content.synced[at] = content.bytes[at];
            }
        }
    }
}

/// Where a process does what blocks: here, after a pause in which it may be stopped or die, and before another one.
pub(crate) fn slow(gate: &Gate, chance: &Chance) -> Blocking {
    let (gate, chance) = (gate.clone(), chance.clone());
    Blocking::new(move |work| {
        let (gate, chance) = (gate.clone(), chance.clone());
        async move {
            tokio::time::sleep(chance.up_to(Duration::from_millis(15))).await;
            gate.pass().await;
            work();
            tokio::time::sleep(chance.up_to(Duration::from_millis(15))).await;
            gate.pass().await;
        }
        .boxed()
    })
}

#[derive(Clone)]
struct View {
    disk: Disk,
    gate: Gate,
    name: &'static str,
}

impl View {
    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.name)
    }

    /// Whether a call is done at all; `failures` of ten thousand are not.
    fn call(&self, what: &str, name: &str, failures: u64) -> io::Result<()> {
        assert!(!self.gate.is_dead(), "a dead process does nothing on its disk");
        let fails = self.disk.chance.below(10_000) < failures;
        self.disk.trace.add(|| {
            let outcome = if fails { " fails" } else { "" };
            format!("{} {what} {}/{name}{outcome}", self.gate.name, self.name)
        });
        if fails { Err(io::Error::other("the disk is broken")) } else { Ok(()) }
    }

    fn file(&self, name: &str, content: Arc<Mutex<Content>>) -> Arc<dyn FolderFile> {
        Arc::new(OpenFile { view: self.clone(), name: name.into(), content })
    }

    fn wear(&self) -> Wear {
        locked(&self.disk.state).wear
    }
}

impl Folder for View {
    fn list(&self) -> io::Result<Vec<(String, u64)>> {
        self.call("lists", "", 0)?;
        let prefix = format!("{}/", self.name);
        let state = locked(&self.disk.state);
        let mine = state.files.iter().filter_map(|(path, file)| Some((path.strip_prefix(&prefix)?, file)));
        Ok(mine.map(|(name, file)| (name.to_owned(), locked(file).bytes.len() as u64)).collect())
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn FolderFile>> {
        self.call("creates", name, self.wear().writes)?;
        let mut state = locked(&self.disk.state);
        if state.files.contains_key(&self.path(name)) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        let content = Arc::<Mutex<Content>>::default();
        state.files.insert(self.path(name), Arc::clone(&content));
        Ok(self.file(name, content))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn FolderFile>> {
        self.call("opens", name, 0)?;
        let content = locked(&self.disk.state).files.get(&self.path(name)).cloned().ok_or(ErrorKind::NotFound)?;
        Ok(self.file(name, content))
    }

    fn delete(&self, name: &str) -> io::Result<()> {
        self.call("deletes", name, self.wear().writes)?;
        locked(&self.disk.state).files.remove(&self.path(name)).map(|_| ()).ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn sync(&self) -> io::Result<()> {
        self.call("syncs", "", self.wear().syncs)?;
        let mut state = locked(&self.disk.state);
        let prefix = format!("{}/", self.name);
        let mine: Names = state
            .files
            .iter()
            .filter(|(path, _)| path.starts_with(&prefix))
            .map(|(p, f)| (p.clone(), f.clone()))
            .collect();
        state.synced_names.retain(|path, _| !path.starts_with(&prefix));
        state.synced_names.extend(mine);
        Ok(())
    }

    fn describe(&self) -> String {
        format!("memory of {}", self.gate.name)
    }
}

struct OpenFile {
    view: View,
    name: String,
    content: Arc<Mutex<Content>>,
}

impl FolderFile for OpenFile {
    fn write_at(&self, pieces: &[Bytes], offset: u64) -> io::Result<()> {
        let all = pieces.concat();
        let written = self.view.call(
            &format!("writes {} bytes {:016x} to", all.len(), xxh3_64(&all)),
            &self.name,
            self.view.wear().writes,
        );
        let len = if written.is_ok() { all.len() } else { self.view.disk.chance.index(all.len() + 1) };
        let mut content = locked(&self.content);
        let (from, to) = (offset as usize, offset as usize + len);
        if content.bytes.len() < to {
            content.bytes.resize(to, 0);
        }
        content.bytes[from..to].copy_from_slice(&all[..len]);
        written
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let content = locked(&self.content);
        let rest = content.bytes.get(offset as usize..).unwrap_or(&[]);
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.view.call("syncs", &self.name, self.view.wear().syncs)?;
        let mut content = locked(&self.content);
        content.synced = content.bytes.clone();
        Ok(())
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.view.call("truncates", &self.name, self.view.wear().writes)?;
        locked(&self.content).bytes.truncate(len as usize);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(locked(&self.content).bytes.len() as u64)
    }
}
