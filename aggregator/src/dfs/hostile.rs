//! A file system in memory that does all that a real one may do to its users, on the orders of a seed.
//!
//! One [`HostileCluster`] is the storage; each [`HostileDfs`] is one process that uses it, with writers and leases of its
//! own. It keeps what HDFS keeps and nothing more:
//!
//! | It may | because on HDFS |
//! |---|---|
//! | stop a process for any time, in the middle of anything | that is what SIGSTOP, a swapping machine or a moved VM does |
//! | do a change and lose the answer, lose the call, or do the change after later calls | a connection breaks, or a NameNode wakes up with a queue of old calls |
//! | refuse everything that changes something for a while | safe mode, standby |
//! | let a sync hang for its whole deadline, with its bytes on disk or not | a DataNode of the pipeline was killed |
//! | cut an open file anywhere behind its last sync when it is recovered | recovery takes the shortest of the copies |
//! | start a recovery again when asked about it faster than once a second | it does that |
//! | lose, with the power, what a recovery kept behind the last sync in the last minute | recovery doesn't sync |
//!
//! Renaming a directory does not stop the writers below it; recovering a file does.
//!
//! Everything is decided by the seed, the order of the calls and tokio's clock: on a single thread with paused time a run
//! repeats itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::time::Instant;

use super::{
    CreateOptions, Dfs, DfsError, DfsPath, DfsWriter, DirEntry, FileStatus, Guard, Recovered, look_after_delete,
    look_after_rename,
};

/// How long what a recovery kept behind the last sync is lost by [`HostileCluster::power_loss`].
pub const SETTLE: Duration = Duration::from_secs(60);
/// A recovery that is asked about sooner than this starts again.
const RECOVERY_PATIENCE: Duration = Duration::from_secs(1);
/// How often a paused process is looked at.
const PAUSED_LOOK: Duration = Duration::from_millis(250);
/// Milliseconds since 1970 at the model's birth.
const BIRTH_MS: i64 = 1_767_225_600_000;

/// How often what happens. Frequencies are per thousand calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hostility {
    /// A change is done, and the answer never comes.
    pub lost_answers: u16,
    /// A change is not done, and no answer comes.
    pub lost_calls: u16,
    /// A change is done after up to 40 later calls of anybody; no answer comes.
    pub late_calls: u16,
    /// A call is refused for now.
    pub unavailable: u16,
    /// A writer fails at a write, sync or close.
    pub writer_failures: u16,
    /// A safe mode of up to 30 calls begins.
    pub safe_modes: u16,
    /// At most so many more attempts until a recovery ends.
    pub recovery_rounds: u8,
    /// What a call without an answer waits.
    pub call_timeout: Duration,
    /// Every call takes up to this.
    pub latency: Duration,
}

impl Hostility {
    /// Nothing fails; only crashes and fencing are what they are.
    #[must_use]
    pub const fn none() -> Self {
        Self {
            lost_answers: 0,
            lost_calls: 0,
            late_calls: 0,
            unavailable: 0,
            writer_failures: 0,
            safe_modes: 0,
            recovery_rounds: 1,
            call_timeout: Duration::from_secs(20),
            latency: Duration::from_millis(3),
        }
    }

    /// Everything fails often.
    #[must_use]
    pub const fn storm() -> Self {
        Self {
            lost_answers: 20,
            lost_calls: 20,
            late_calls: 20,
            unavailable: 30,
            writer_failures: 30,
            safe_modes: 3,
            recovery_rounds: 3,
            call_timeout: Duration::from_secs(20),
            latency: Duration::from_millis(50),
        }
    }
}

/// How changes below a path are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// As by permissions.
    Forbidden,
    /// As by a quota that is used up.
    ForNow,
}

type NodeId = u64;
type ProcessId = u32;

#[derive(Debug)]
enum Node {
    Dir(BTreeMap<String, NodeId>),
    File(FileNode),
}

#[derive(Debug, Default)]
struct FileNode {
    /// All that reached the DataNodes.
    data: Vec<u8>,
    /// So much of it is on disk and seen by readers.
    synced: usize,
    /// Who may add to it.
    lease: Option<Lease>,
    recovery: Option<Recovery>,
    /// Set by a recovery that kept more than was synced.
    settling: Option<(Instant, usize)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lease {
    process: ProcessId,
    writer: u64,
}

#[derive(Debug)]
struct Recovery {
    rounds: u8,
    asked: Instant,
}

#[derive(Debug, Clone)]
enum Change {
    Create(DfsPath, Lease),
    Rename(DfsPath, DfsPath),
    Mkdir(DfsPath),
    MkdirAll(DfsPath),
    Delete(DfsPath),
}

impl Change {
    fn name(&self) -> &'static str {
        match self {
            Self::Create(..) => "create",
            Self::Rename(..) => "rename",
            Self::Mkdir(_) | Self::MkdirAll(_) => "mkdir",
            Self::Delete(_) => "delete",
        }
    }

    fn path(&self) -> &DfsPath {
        match self {
            Self::Create(path, _)
            | Self::Rename(path, _)
            | Self::Mkdir(path)
            | Self::MkdirAll(path)
            | Self::Delete(path) => path,
        }
    }
}

/// How often it did what; for tests that must know that something happened at all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cruelties {
    /// Changes done without an answer.
    pub lost_answers: u64,
    /// Changes neither done nor answered.
    pub lost_calls: u64,
    /// Changes done late.
    pub late_calls: u64,
    /// Calls refused for now.
    pub unavailable: u64,
    /// Writers that failed.
    pub writer_failures: u64,
    /// Recoveries that ended.
    pub recoveries: u64,
    /// Recoveries that cut bytes off.
    pub torn_tails: u64,
}

struct State {
    rng: StdRng,
    hostility: Hostility,
    nodes: BTreeMap<NodeId, (Node, i64)>,
    next_id: u64,
    calls: u64,
    late: Vec<(u64, Change)>,
    /// Until this call everything that changes something is refused.
    safe_until: u64,
    safe_mode: bool,
    refused: Option<(DfsPath, Refusal)>,
    crashed: BTreeSet<ProcessId>,
    paused: BTreeSet<ProcessId>,
    processes: ProcessId,
    nonces: u64,
    born: Instant,
    birth_ms: i64,
    done: Cruelties,
    /// Files that were asked for and not closed by their writer.
    unfinished: BTreeSet<DfsPath>,
}

const ROOT: NodeId = 0;

enum Fate {
    Fine,
    LostAnswer,
    LostCall,
    Late,
    Unavailable(&'static str),
}

impl State {
    fn now_ms(&self) -> i64 {
        self.birth_ms + i64::try_from(self.born.elapsed().as_millis()).unwrap_or(i64::MAX)
    }

    fn chance(&mut self, per_mille: u16) -> bool {
        per_mille > 0 && self.rng.random_range(0..1000) < per_mille
    }

    fn latency(&mut self) -> Duration {
        let most = u64::try_from(self.hostility.latency.as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros(self.rng.random_range(0..=most))
    }

    fn find(&self, path: &DfsPath) -> Option<NodeId> {
        let mut at = ROOT;
        for part in path.as_str().split('/').filter(|part| !part.is_empty()) {
            match &self.nodes.get(&at)?.0 {
                Node::Dir(children) => at = *children.get(part)?,
                Node::File(_) => return None,
            }
        }
        Some(at)
    }

    fn children(&mut self, dir: NodeId) -> Option<&mut BTreeMap<String, NodeId>> {
        match self.nodes.get_mut(&dir) {
            Some((Node::Dir(children), _)) => Some(children),
            _ => None,
        }
    }

    fn file(&mut self, id: NodeId) -> Option<&mut FileNode> {
        match self.nodes.get_mut(&id) {
            Some((Node::File(file), _)) => Some(file),
            _ => None,
        }
    }

    fn touch(&mut self, id: NodeId) {
        let now = self.now_ms();
        if let Some((_, modified)) = self.nodes.get_mut(&id) {
            *modified = now;
        }
    }

    fn insert(&mut self, dir: NodeId, name: &str, node: Node) -> NodeId {
        self.next_id += 1;
        let id = self.next_id;
        let now = self.now_ms();
        self.nodes.insert(id, (node, now));
        if let Some(children) = self.children(dir) {
            children.insert(name.to_owned(), id);
        }
        self.touch(dir);
        id
    }

    /// The directory that `path` lies in.
    fn dir_of(&mut self, call: &'static str, path: &DfsPath) -> Result<NodeId, DfsError> {
        let refused = |reason: &str| DfsError::Refused { call, path: path.clone(), reason: reason.into() };
        let parent = path.parent().ok_or_else(|| refused("the base itself"))?;
        let id = self.find(&parent).ok_or(DfsError::NotFound { path: parent })?;
        if self.children(id).is_none() {
            return Err(refused("its parent is a file"));
        }
        Ok(id)
    }

    fn status(&self, id: NodeId) -> FileStatus {
        let (node, modified_ms) = &self.nodes[&id];
        let (len, is_dir) = match node {
            Node::Dir(_) => (0, true),
            Node::File(file) => (file.synced as u64, false),
        };
        FileStatus { len, is_dir, modified_ms: *modified_ms }
    }

    fn remove(&mut self, id: NodeId) {
        if let Some((Node::Dir(children), _)) = self.nodes.remove(&id) {
            for child in children.into_values() {
                self.remove(child);
            }
        }
    }

    /// Whether changes below the place of this one are refused.
    fn refusal(&self, change: &Change) -> Option<DfsError> {
        let (dir, refusal) = self.refused.as_ref()?;
        let below = |path: &DfsPath| path == dir || path.as_str().starts_with(&format!("{dir}/"));
        let target = if let Change::Rename(_, to) = change { to } else { change.path() };
        if !below(target) && !below(change.path()) {
            return None;
        }
        let (call, path) = (change.name(), target.clone());
        Some(match refusal {
            Refusal::Forbidden => DfsError::Refused { call, path, reason: "permission denied".into() },
            Refusal::ForNow => DfsError::Unavailable { call, path, reason: "the quota is used up".into() },
        })
    }

    fn apply(&mut self, change: &Change) -> Result<NodeId, DfsError> {
        if let Some(refused) = self.refusal(change) {
            return Err(refused);
        }
        match change {
            Change::Create(path, lease) => {
                let dir = self.dir_of("create", path)?;
                if self.find(path).is_some() {
                    return Err(DfsError::Exists { path: path.clone() });
                }
                let file = FileNode { lease: Some(*lease), ..FileNode::default() };
                Ok(self.insert(dir, path.name(), Node::File(file)))
            }
            Change::Mkdir(path) => {
                let dir = self.dir_of("mkdir", path)?;
                if self.find(path).is_some() {
                    return Err(DfsError::Exists { path: path.clone() });
                }
                Ok(self.insert(dir, path.name(), Node::Dir(BTreeMap::new())))
            }
            Change::MkdirAll(path) => match self.find(path) {
                Some(id) if self.children(id).is_some() => Ok(id),
                Some(_) => Err(DfsError::Exists { path: path.clone() }),
                None => {
                    if let Some(parent) = path.parent() {
                        self.apply(&Change::MkdirAll(parent))?;
                    }
                    self.apply(&Change::Mkdir(path.clone()))
                }
            },
            Change::Rename(from, to) => {
                let id = self.find(from).ok_or_else(|| DfsError::NotFound { path: from.clone() })?;
                let old = self.dir_of("rename", from)?;
                if to == from || to.as_str().starts_with(&format!("{from}/")) {
                    return Err(DfsError::Refused {
                        call: "rename",
                        path: from.clone(),
                        reason: format!("{to} is the same or lies in it"),
                    });
                }
                let new = self.dir_of("rename", to)?;
                if self.find(to).is_some() {
                    return Err(DfsError::Exists { path: to.clone() });
                }
                if let Some(children) = self.children(old) {
                    children.remove(from.name());
                }
                if let Some(children) = self.children(new) {
                    children.insert(to.name().to_owned(), id);
                }
                self.touch(old);
                self.touch(new);
                Ok(id)
            }
            Change::Delete(path) => {
                let Some(id) = self.find(path) else { return Ok(ROOT) };
                let dir = self.dir_of("delete", path)?;
                if let Some(children) = self.children(dir) {
                    children.remove(path.name());
                }
                self.remove(id);
                self.touch(dir);
                Ok(id)
            }
        }
    }

    /// Another call arrives: what was late is done now.
    fn arrive(&mut self) {
        self.calls += 1;
        let calls = self.calls;
        let mut due: Vec<_> = self.late.extract_if(.., |(at, _)| *at <= calls).collect();
        due.sort_by_key(|(at, _)| *at);
        for (_, change) in due {
            // Nobody waits for what comes of it any more.
            if self.apply(&change).is_ok() {
                self.done.late_calls += 1;
            }
        }
        if self.chance(self.hostility.safe_modes) {
            self.safe_until = self.calls + self.rng.random_range(1..=30);
        }
    }

    fn fate(&mut self, process: ProcessId, changes: bool) -> Fate {
        self.arrive();
        if self.crashed.contains(&process) {
            return Fate::Unavailable("this process is dead");
        }
        if changes && (self.safe_mode || self.calls <= self.safe_until) {
            self.done.unavailable += 1;
            return Fate::Unavailable("the name node is in safe mode");
        }
        if self.chance(self.hostility.unavailable) {
            self.done.unavailable += 1;
            return Fate::Unavailable("connection refused");
        }
        if !changes {
            return Fate::Fine;
        }
        if self.chance(self.hostility.lost_answers) {
            self.done.lost_answers += 1;
            Fate::LostAnswer
        } else if self.chance(self.hostility.lost_calls) {
            self.done.lost_calls += 1;
            Fate::LostCall
        } else if self.chance(self.hostility.late_calls) {
            Fate::Late
        } else {
            Fate::Fine
        }
    }

    fn end_recovery(&mut self, id: NodeId) -> u64 {
        let Some(file) = self.file(id) else { return 0 };
        let (synced, all) = (file.synced, file.data.len());
        let kept = match self.rng.random_range(0..3) {
            0 => synced,
            1 => all,
            _ => self.rng.random_range(synced..=all),
        };
        self.done.recoveries += 1;
        self.done.torn_tails += u64::from(kept < all);
        let now = Instant::now();
        if let Some(file) = self.file(id) {
            file.data.truncate(kept);
            file.synced = kept;
            file.lease = None;
            file.recovery = None;
            file.settling = (kept > synced).then_some((now, synced));
        }
        self.touch(id);
        kept as u64
    }
}

/// The storage that several processes share.
#[derive(Clone)]
pub struct HostileCluster {
    state: Arc<Mutex<State>>,
}

impl fmt::Debug for HostileCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostileCluster").field("files", &self.files()).finish_non_exhaustive()
    }
}

impl HostileCluster {
    /// An empty one.
    #[must_use]
    pub fn new(seed: u64, hostility: Hostility) -> Self {
        Self::born_at(BIRTH_MS, seed, hostility)
    }

    /// An empty one, whose time of day is `birth_ms` now, in milliseconds since 1970.
    #[must_use]
    pub fn born_at(birth_ms: i64, seed: u64, hostility: Hostility) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                rng: StdRng::seed_from_u64(seed),
                hostility,
                nodes: BTreeMap::from([(ROOT, (Node::Dir(BTreeMap::new()), birth_ms))]),
                next_id: ROOT,
                calls: 0,
                late: Vec::new(),
                safe_until: 0,
                safe_mode: false,
                refused: None,
                crashed: BTreeSet::new(),
                paused: BTreeSet::new(),
                processes: 0,
                nonces: 0,
                born: Instant::now(),
                birth_ms,
                done: Cruelties::default(),
                unfinished: BTreeSet::new(),
            })),
        }
    }

    async fn while_paused(&self, process: ProcessId) {
        while self.state().paused.contains(&process) {
            tokio::time::sleep(PAUSED_LOOK).await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A test that panicked elsewhere leaves a state that is still good to look at.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its time of day in milliseconds since 1970: what files are stamped with.
    #[must_use]
    pub fn now_ms(&self) -> i64 {
        self.state().now_ms()
    }

    /// A new process.
    #[must_use]
    pub fn process(&self) -> HostileDfs {
        let mut state = self.state();
        state.processes += 1;
        HostileDfs { cluster: self.clone(), process: state.processes }
    }

    /// Ends a process as `kill -9` does: its calls and writers fail from now on; the files that it has open stay open.
    pub fn crash(&self, process: &HostileDfs) {
        self.state().crashed.insert(process.process);
    }

    /// Stops a process as SIGSTOP does: what it asks arrives, and what it is answered is heard, only after [`Self::resume`].
    pub fn pause(&self, process: &HostileDfs) {
        self.state().paused.insert(process.process);
    }

    /// Lets a process go on.
    pub fn resume(&self, process: &HostileDfs) {
        self.state().paused.remove(&process.process);
    }

    /// Changes how hostile it is from now on.
    pub fn set_hostility(&self, hostility: Hostility) {
        let mut state = self.state();
        state.hostility = hostility;
        state.safe_until = 0;
    }

    /// Refuses all changes until told otherwise.
    pub fn safe_mode(&self, on: bool) {
        self.state().safe_mode = on;
    }

    /// Refuses changes below a path until told otherwise.
    pub fn refuse_below(&self, refused: Option<(DfsPath, Refusal)>) {
        self.state().refused = refused;
    }

    /// All machines lose their power and come back: what was neither synced nor settled is gone.
    pub fn power_loss(&self) {
        let now = Instant::now();
        for (node, _) in self.state().nodes.values_mut() {
            let Node::File(file) = node else { continue };
            let kept = match file.settling.take() {
                Some((since, synced)) if now.duration_since(since) < SETTLE => synced,
                _ => file.synced,
            };
            file.data.truncate(kept);
            file.synced = kept;
        }
    }

    /// What readers see: every file with its bytes.
    #[must_use]
    pub fn files(&self) -> BTreeMap<DfsPath, Bytes> {
        self.files_up_to(|file| file.synced)
    }

    fn files_up_to(&self, len: impl Fn(&FileNode) -> usize) -> BTreeMap<DfsPath, Bytes> {
        let state = self.state();
        let mut found = BTreeMap::new();
        let mut open = vec![(DfsPath::base(), ROOT)];
        while let Some((path, id)) = open.pop() {
            match &state.nodes[&id].0 {
                Node::Dir(children) => open.extend(children.iter().map(|(name, child)| (path.join(name), *child))),
                Node::File(file) => {
                    found.insert(path, Bytes::copy_from_slice(&file.data[..len(file)]));
                }
            }
        }
        found
    }

    /// Every file with those of its bytes that would be there after a [loss of power](Self::power_loss) now.
    #[must_use]
    pub fn durable_files(&self) -> BTreeMap<DfsPath, Bytes> {
        let now = Instant::now();
        self.files_up_to(|file| match file.settling {
            Some((since, synced)) if now.duration_since(since) < SETTLE => synced,
            _ => file.synced,
        })
    }

    /// Files whose creation was asked for, whatever came of it, and that their writers have not closed: what was written to them
    /// may be lost.
    #[must_use]
    pub fn unfinished(&self) -> BTreeSet<DfsPath> {
        self.state().unfinished.clone()
    }

    /// Calls that came so far, of all processes.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.state().calls
    }

    /// What it did so far.
    #[must_use]
    pub fn cruelties(&self) -> Cruelties {
        self.state().done
    }
}

/// One process's use of a [`HostileCluster`].
#[derive(Clone, Debug)]
pub struct HostileDfs {
    cluster: HostileCluster,
    process: ProcessId,
}

struct NoLock;

impl Guard for NoLock {}

impl HostileDfs {
    async fn latency(&self) {
        let pause = self.cluster.state().latency();
        tokio::time::sleep(pause).await;
        self.cluster.while_paused(self.process).await;
    }

    /// A call that changes nothing.
    async fn ask<T>(
        &self,
        call: &'static str,
        path: &DfsPath,
        answer: impl FnOnce(&mut State) -> Result<T, DfsError>,
    ) -> Result<T, DfsError> {
        self.latency().await;
        let mut state = self.cluster.state();
        match state.fate(self.process, false) {
            Fate::Unavailable(reason) => Err(DfsError::Unavailable { call, path: path.clone(), reason: reason.into() }),
            _ => answer(&mut state),
        }
    }

    async fn change(&self, change: Change) -> Result<NodeId, DfsError> {
        self.latency().await;
        let (call, path) = (change.name(), change.path().clone());
        let silence = {
            let mut state = self.cluster.state();
            match state.fate(self.process, true) {
                Fate::Fine => return state.apply(&change),
                Fate::Unavailable(reason) => {
                    return Err(DfsError::Unavailable { call, path, reason: reason.into() });
                }
                Fate::LostAnswer => {
                    // What came of it is what nobody hears.
                    let _ = state.apply(&change);
                }
                Fate::LostCall => {}
                Fate::Late => {
                    let due = state.calls + state.rng.random_range(1..=40);
                    state.late.push((due, change));
                }
            }
            state.hostility.call_timeout
        };
        tokio::time::sleep(silence).await;
        Err(DfsError::UnknownOutcome { call, path, reason: format!("no answer within {silence:?}") })
    }

    /// Whether the driver manages to look after a change of unknown outcome.
    fn can_look(&self) -> bool {
        self.cluster.state().rng.random_bool(0.5)
    }
}

#[async_trait]
impl Dfs for HostileDfs {
    fn describe(&self) -> String {
        format!("hostile://{}", self.process)
    }

    fn nonce(&self) -> String {
        let mut state = self.cluster.state();
        state.nonces += 1;
        // Scattered, so that names don't sort in the order in which they were made.
        format!("{:016x}", state.nonces.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    async fn lock(&self, _dir: &DfsPath) -> Result<Box<dyn Guard>, DfsError> {
        Ok(Box::new(NoLock))
    }

    async fn create(&self, path: &DfsPath, options: CreateOptions) -> Result<Box<dyn DfsWriter>, DfsError> {
        let lease = {
            let mut state = self.cluster.state();
            state.next_id += 1;
            state.unfinished.insert(path.clone());
            Lease { process: self.process, writer: state.next_id }
        };
        let node = self.change(Change::Create(path.clone(), lease)).await?;
        self.cluster.while_paused(self.process).await;
        Ok(Box::new(HostileWriter {
            cluster: self.cluster.clone(),
            path: path.clone(),
            lease,
            node,
            sync_timeout: options.sync_timeout,
            failed: false,
            len: 0,
        }))
    }

    async fn mkdir(&self, path: &DfsPath) -> Result<(), DfsError> {
        self.change(Change::Mkdir(path.clone())).await.map(drop)
    }

    async fn mkdir_all(&self, path: &DfsPath) -> Result<(), DfsError> {
        self.change(Change::MkdirAll(path.clone())).await.map(drop)
    }

    async fn stat(&self, path: &DfsPath) -> Result<Option<FileStatus>, DfsError> {
        self.ask("stat", path, |state| Ok(state.find(path).map(|id| state.status(id)))).await
    }

    async fn list(&self, dir: &DfsPath) -> Result<Option<Vec<DirEntry>>, DfsError> {
        self.ask("list", dir, |state| match state.find(dir) {
            None => Ok(None),
            Some(id) => match &state.nodes[&id].0 {
                Node::Dir(children) => Ok(Some(
                    children
                        .iter()
                        .map(|(name, id)| DirEntry { name: name.clone(), status: state.status(*id) })
                        .collect(),
                )),
                Node::File(_) => {
                    Err(DfsError::Refused { call: "list", path: dir.clone(), reason: "not a directory".into() })
                }
            },
        })
        .await
    }

    async fn read(&self, path: &DfsPath, offset: u64, len: usize) -> Result<Bytes, DfsError> {
        self.ask("read", path, |state| {
            let id = state.find(path).ok_or_else(|| DfsError::NotFound { path: path.clone() })?;
            let State { nodes, rng, .. } = state;
            let Node::File(file) = &nodes[&id].0 else {
                return Err(DfsError::Refused { call: "read", path: path.clone(), reason: "a directory".into() });
            };
            // A reader of an open file sees at most what was synced.
            let end = if file.lease.is_some() { rng.random_range(0..=file.synced) } else { file.synced };
            let from = usize::try_from(offset).unwrap_or(usize::MAX).min(end);
            Ok(Bytes::copy_from_slice(&file.data[from..from.saturating_add(len).min(end)]))
        })
        .await
    }

    async fn rename(&self, from: &DfsPath, to: &DfsPath) -> Result<(), DfsError> {
        match self.change(Change::Rename(from.clone(), to.clone())).await {
            Ok(_) => Ok(()),
            Err(error @ DfsError::UnknownOutcome { .. }) if self.can_look() => {
                look_after_rename(self, from, to, error).await
            }
            Err(error) => Err(error),
        }
    }

    async fn delete(&self, path: &DfsPath) -> Result<(), DfsError> {
        match self.change(Change::Delete(path.clone())).await {
            Ok(_) => Ok(()),
            Err(error @ DfsError::UnknownOutcome { .. }) if self.can_look() => {
                look_after_delete(self, path, error).await
            }
            Err(error) => Err(error),
        }
    }

    async fn recover(&self, path: &DfsPath) -> Result<Recovered, DfsError> {
        self.latency().await;
        let mut state = self.cluster.state();
        // Recovering twice does no harm, so what happens to the answer makes no difference that a refusal doesn't make.
        if let Fate::Unavailable(reason) = state.fate(self.process, true) {
            return Err(DfsError::Unavailable { call: "recover", path: path.clone(), reason: reason.into() });
        }
        let id = state.find(path).ok_or_else(|| DfsError::NotFound { path: path.clone() })?;
        let rounds = state.hostility.recovery_rounds;
        let rounds = state.rng.random_range(0..=rounds);
        let Some(file) = state.file(id) else {
            return Err(DfsError::Refused { call: "recover", path: path.clone(), reason: "a directory".into() });
        };
        if file.lease.is_none() && file.recovery.is_none() {
            return Ok(Recovered::Closed { len: file.synced as u64 });
        }
        // From its first attempt on the old writer is out.
        file.lease = None;
        let now = Instant::now();
        match &mut file.recovery {
            None => file.recovery = Some(Recovery { rounds, asked: now }),
            Some(recovery) if now.duration_since(recovery.asked) < RECOVERY_PATIENCE => {
                *recovery = Recovery { rounds: rounds.max(1), asked: now };
            }
            Some(recovery) => *recovery = Recovery { rounds: recovery.rounds.saturating_sub(1), asked: now },
        }
        if file.recovery.as_ref().is_some_and(|recovery| recovery.rounds == 0) {
            return Ok(Recovered::Closed { len: state.end_recovery(id) });
        }
        Ok(Recovered::StillOpen)
    }

    async fn set_replication(&self, path: &DfsPath, _replication: u16) -> Result<(), DfsError> {
        self.ask("set replication", path, |state| {
            state.find(path).map(drop).ok_or_else(|| DfsError::NotFound { path: path.clone() })
        })
        .await
    }
}

struct HostileWriter {
    cluster: HostileCluster,
    path: DfsPath,
    lease: Lease,
    node: NodeId,
    sync_timeout: Duration,
    failed: bool,
    len: u64,
}

impl HostileWriter {
    /// The file, while it is this writer's.
    fn mine<'a>(&self, state: &'a mut State) -> Option<&'a mut FileNode> {
        let lease = self.lease;
        state.file(self.node).filter(|file| file.lease == Some(lease))
    }

    /// Fails if an earlier call did, or if the process is dead.
    fn check(&mut self, call: &'static str) -> Result<(), DfsError> {
        let dead = self.cluster.state().crashed.contains(&self.lease.process);
        if self.failed || dead {
            let reason = if dead { "this process is dead" } else { "an earlier call on the file failed" };
            return Err(DfsError::Refused { call, path: self.path.clone(), reason: reason.into() });
        }
        Ok(())
    }

    fn fenced(&mut self, call: &'static str) -> DfsError {
        self.failed = true;
        DfsError::Refused { call, path: self.path.clone(), reason: "the file is not this writer's any more".into() }
    }

    fn unknown(&mut self, call: &'static str) -> DfsError {
        self.failed = true;
        DfsError::UnknownOutcome { call, path: self.path.clone(), reason: "the pipeline broke".into() }
    }

    async fn pause(&self) {
        let pause = self.cluster.state().latency();
        tokio::time::sleep(pause).await;
        self.cluster.while_paused(self.lease.process).await;
    }

    async fn sync_for(&mut self, call: &'static str) -> Result<(), DfsError> {
        self.check(call)?;
        self.pause().await;
        self.check(call)?;
        let cluster = self.cluster.clone();
        let hangs = {
            let mut state = cluster.state();
            state.arrive();
            let fails = state.hostility.writer_failures;
            let fails = state.chance(fails);
            let (reached, hangs) = (state.rng.random_bool(0.5), state.rng.random_bool(0.5));
            let Some(file) = self.mine(&mut state) else { return Err(self.fenced(call)) };
            if !fails || reached {
                file.synced = file.data.len();
            }
            state.touch(self.node);
            if !fails {
                return Ok(());
            }
            state.done.writer_failures += 1;
            hangs
        };
        if hangs {
            tokio::time::sleep(self.sync_timeout).await;
        }
        Err(self.unknown(call))
    }
}

#[async_trait]
impl DfsWriter for HostileWriter {
    async fn write(&mut self, bytes: Bytes) -> Result<(), DfsError> {
        self.check("write")?;
        self.pause().await;
        self.check("write")?;
        let cluster = self.cluster.clone();
        let mut state = cluster.state();
        let fails = state.hostility.writer_failures / 4;
        let fails = state.chance(fails);
        let reached = if fails { state.rng.random_range(0..=bytes.len()) } else { bytes.len() };
        // A fenced writer hears of it only at its next sync: bytes are sent ahead.
        if let Some(file) = self.mine(&mut state) {
            file.data.extend_from_slice(&bytes[..reached]);
        }
        if fails {
            state.done.writer_failures += 1;
            return Err(self.unknown("write"));
        }
        self.len += bytes.len() as u64;
        Ok(())
    }

    async fn sync(&mut self) -> Result<(), DfsError> {
        self.sync_for("sync").await
    }

    async fn close(mut self: Box<Self>) -> Result<u64, DfsError> {
        self.sync_for("close").await?;
        let cluster = self.cluster.clone();
        let mut state = cluster.state();
        let fails = state.hostility.writer_failures;
        let fails = state.chance(fails);
        let closed = !fails || state.rng.random_bool(0.5);
        let Some(file) = self.mine(&mut state) else { return Err(self.fenced("close")) };
        if closed {
            file.lease = None;
        }
        if fails {
            state.done.writer_failures += 1;
            return Err(self.unknown("close"));
        }
        state.unfinished.remove(&self.path);
        Ok(self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dfs::conformance::{self, Place};
    use crate::dfs::recover_until_closed;

    #[async_trait]
    impl Place for HostileCluster {
        async fn process(&self) -> Arc<dyn Dfs> {
            Arc::new(self.process())
        }

        fn recovery_fences(&self) -> bool {
            true
        }
    }

    fn options() -> CreateOptions {
        CreateOptions { block_size: 1 << 20, replication: None, sync_timeout: Duration::from_secs(5) }
    }

    #[tokio::test(start_paused = true)]
    async fn where_nothing_fails_it_keeps_what_the_trait_promises() {
        for seed in 0..20 {
            conformance::run(&HostileCluster::new(seed, Hostility::none())).await;
        }
    }

    /// Writes files for as long as it takes until one is closed, and says what was synced of each.
    async fn weather(seed: u64) -> (Vec<(DfsPath, usize)>, HostileCluster) {
        let cluster = HostileCluster::new(seed, Hostility::storm());
        let dfs = cluster.process();
        let mut synced = Vec::new();
        for i in 0..40 {
            let path = DfsPath::base().join(format!("f{i}"));
            let Ok(mut writer) = dfs.create(&path, options()).await else { continue };
            let mut len = 0;
            for _ in 0..10 {
                if writer.write(vec![7; 100].into()).await.is_err() || writer.sync().await.is_err() {
                    break;
                }
                len += 100;
            }
            synced.push((path, len));
        }
        (synced, cluster)
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_sync_answered_survives_every_storm() {
        let mut done = Cruelties::default();
        for seed in 0..50 {
            let (synced, cluster) = weather(seed).await;
            let reader = cluster.process();
            for (path, len) in synced {
                let found = recover_until_closed(&reader, &path).await.expect("it ends").expect("it is there");
                assert!(found >= len as u64, "seed {seed}: {path} has {found} of {len} bytes");
            }
            let more = cluster.cruelties();
            done.lost_answers += more.lost_answers;
            done.lost_calls += more.lost_calls;
            done.late_calls += more.late_calls;
            done.unavailable += more.unavailable;
            done.writer_failures += more.writer_failures;
            done.torn_tails += more.torn_tails;
        }
        let Cruelties { lost_answers, lost_calls, late_calls, unavailable, writer_failures, torn_tails, .. } = done;
        let all = [lost_answers, lost_calls, late_calls, unavailable, writer_failures, torn_tails];
        assert!(all.iter().all(|count| *count > 10), "some of it never happens: {done:?}");
    }

    /// Calls until something is decided, as a lane's next owner does.
    async fn take(dfs: &HostileDfs, from: &DfsPath, to: &DfsPath) {
        loop {
            match dfs.rename(from, to).await {
                Ok(()) => return,
                // Perhaps by an earlier call of this one, whose answer was lost.
                Err(DfsError::NotFound { .. }) => loop {
                    match dfs.stat(to).await {
                        Ok(found) => return assert!(found.is_some(), "somebody else has it"),
                        Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
                    }
                },
                Err(error) => {
                    assert!(error.is_transient(), "{error}");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_promised_by_an_old_owner_that_the_next_one_has_not_read() {
        let mut taken_from_a_live_writer = 0;
        for seed in 0..300 {
            let cluster = HostileCluster::new(seed, Hostility { writer_failures: 5, ..Hostility::storm() });
            let (old, new) = (cluster.process(), cluster.process());
            let [base, next] = ["e0", "e1"].map(|name| DfsPath::base().join(name));
            while old.mkdir_all(&base).await.is_err() {}
            let mut files = 0;
            let mut writer = loop {
                files += 1;
                if let Ok(writer) = old.create(&base.join(format!("f{files}")), options()).await {
                    break writer;
                }
            };
            let name = format!("f{files}");
            // The two run side by side; the old owner goes on until it is told no.
            let writing = async {
                let mut promised = 0;
                while writer.write(b"0123456789"[..].into()).await.is_ok() && writer.sync().await.is_ok() {
                    promised += 10;
                }
                (promised, cluster.cruelties().writer_failures)
            };
            let taking = async {
                tokio::time::sleep(Duration::from_millis(500)).await;
                take(&new, &base, &next).await;
                recover_until_closed(&new, &next.join(&name)).await.expect("it ends").expect("it is there")
            };
            let ((promised, failures), found) = tokio::join!(writing, taking);
            assert!(promised <= found, "seed {seed}: {promised} bytes were promised, {found} were found");
            taken_from_a_live_writer += u64::from(failures == 0);
            let later = loop {
                if let Ok(bytes) = new.read(&next.join(&name), 0, usize::MAX).await {
                    break bytes;
                }
            };
            assert_eq!(later.len() as u64, found, "seed {seed}: it changed after it was recovered");
        }
        assert!(taken_from_a_live_writer > 50, "only {taken_from_a_live_writer}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_seed_repeats_itself() {
        let (first, one) = weather(7).await;
        let (second, two) = weather(7).await;
        assert_eq!((first, one.files(), one.cruelties()), (second, two.files(), two.cruelties()));
        assert_ne!(one.files(), weather(8).await.1.files());
    }

    #[tokio::test(start_paused = true)]
    async fn a_recovery_asked_about_too_often_never_ends() {
        let hostility = Hostility { recovery_rounds: 2, latency: Duration::ZERO, ..Hostility::none() };
        let mut held = 0;
        for seed in 0..20 {
            let cluster = HostileCluster::new(seed, hostility);
            let dfs = cluster.process();
            let path = DfsPath::base().join("f");
            drop(dfs.create(&path, options()).await.expect("a new file"));
            if dfs.recover(&path).await.expect("asked") != Recovered::StillOpen {
                continue;
            }
            held += 1;
            for _ in 0..100 {
                tokio::time::sleep(Duration::from_millis(500)).await;
                assert_eq!(dfs.recover(&path).await.expect("asked"), Recovered::StillOpen);
            }
            recover_until_closed(&dfs, &path).await.expect("with pauses it ends");
        }
        assert!(held > 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_crashed_process_does_nothing_more_and_its_files_stay_open() {
        let cluster = HostileCluster::new(1, Hostility::none());
        let (one, two) = (cluster.process(), cluster.process());
        let path = DfsPath::base().join("f");
        let mut writer = one.create(&path, options()).await.expect("a new file");
        writer.write("synced".into()).await.expect("written");
        writer.sync().await.expect("synced");
        cluster.crash(&one);
        assert!(writer.write("late".into()).await.is_err());
        assert!(one.stat(&path).await.is_err());
        assert!(matches!(two.create(&path, options()).await, Err(DfsError::Exists { .. })));
        assert_eq!(recover_until_closed(&two, &path).await.expect("recovered"), Some(6));
    }

    #[tokio::test(start_paused = true)]
    async fn a_power_loss_takes_what_a_recovery_kept_unless_a_minute_has_passed() {
        for (pause, stays) in [(1, false), (61, true)] {
            let mut more = 0;
            for seed in 0..20 {
                let cluster = HostileCluster::new(seed, Hostility::none());
                let dfs = cluster.process();
                let path = DfsPath::base().join("f");
                let mut writer = dfs.create(&path, options()).await.expect("a new file");
                writer.write("synced".into()).await.expect("written");
                writer.sync().await.expect("synced");
                writer.write(" not".into()).await.expect("written");
                drop(writer);
                let kept = recover_until_closed(&dfs, &path).await.expect("recovered").expect("there");
                tokio::time::sleep(Duration::from_secs(pause)).await;
                cluster.power_loss();
                let left = dfs.stat(&path).await.expect("asked").expect("there").len;
                assert_eq!(left, if stays { kept } else { 6 });
                more += kept - 6;
            }
            assert!(more > 0);
        }
    }
}
