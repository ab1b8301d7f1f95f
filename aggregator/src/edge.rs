//! A node between agents and roots: what comes in goes to the spool, what is in the spool goes up, and `committed` comes
//! down.
//!
//! One task owns all state and does one thing at a time; [`Edge`] is the handle by which requests reach it. Blocking work
//! (writing, reading, copying) and requests to the parent tier run beside it and report back.

mod core;
mod metrics;
mod recent;
mod reports;

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use rustix::fs::{FlockOperation, flock};
use tokio::sync::{mpsc, oneshot};
use tributary_common::http::client::ClientOptions;
use tributary_common::http::endpoint::Endpoint;
use tributary_common::http::pool::PoolOptions;
use tributary_common::ids::LaneCount;
use tributary_common::messages::{Answer, PositionsQuery};
use tributary_common::report::{Report, ReportAnswer};
use tributary_common::topology::rendezvous;

pub use self::core::SyncFailed;
use self::core::{Core, Message, Opened};
pub use self::metrics::EdgeMetrics;
use crate::config::NodeConfig;
use crate::forward::{Client, ForwardLimits, Upstream};
use crate::setaside::SetAside;
use crate::spool::io::{DiskFolder, Folder};
use crate::spool::{OpenError, Spool, SpoolLimits};
use crate::surroundings::Surroundings;
use crate::tier::{Overloaded, Received, Tier};

/// How many requests may wait for the task that owns the state.
const QUEUE: usize = 1024;

/// What a sender is told when that many wait.
const QUEUE_RETRY_AFTER: Duration = Duration::from_secs(1);

/// Settings of an edge.
#[derive(Debug, Clone)]
pub struct EdgeOptions {
    /// Bounds of the spool.
    pub spool: SpoolLimits,
    /// Least time between two groups: batches that come within it are made durable together.
    pub sync_interval: Duration,
    /// What was received longer ago is set aside.
    pub max_age: Duration,
    /// Most bytes set aside.
    pub max_set_aside_bytes: u64,
    /// Bounds of forwarding.
    pub forward: ForwardLimits,
    /// Timeouts towards the parent tier.
    pub client: ClientOptions,
    /// How many lanes there are.
    pub lanes: LaneCount,
    /// Where to: lane n goes by route n modulo their number; each has its nodes in order of preference.
    pub routes: Vec<Vec<Endpoint>>,
}

impl EdgeOptions {
    /// The settings of a node that isn't a root.
    #[must_use]
    pub fn of(config: &NodeConfig) -> Self {
        let topology = &config.topology;
        let parents = topology.parents_of(config.name.as_str());
        let to_roots = topology.root_tier().nodes.as_slice() == parents;
        let endpoints =
            |key: &str| rendezvous(key.as_bytes(), parents).iter().map(|node| node.endpoint.clone()).collect();
        let routes = if to_roots {
            let roots = |lane| topology.roots_of(lane).into_iter().map(|node| node.endpoint.clone()).collect();
            topology.lanes().lanes().map(roots).collect()
        } else {
            vec![endpoints(config.name.as_str())]
        };
        let forward = topology.forward();
        Self {
            spool: SpoolLimits { max_bytes: config.spool.max_bytes, segment_bytes: config.spool.segment_bytes },
            sync_interval: config.spool.sync_interval,
            max_age: config.spool.max_age,
            max_set_aside_bytes: config.spool.max_bytes,
            forward: ForwardLimits {
                request_bytes: ForwardLimits::default().request_bytes.min(topology.limits().max_request_bytes),
                pool: PoolOptions::new(forward.backoff, forward.max_connection_age),
                ..ForwardLimits::default()
            },
            client: ClientOptions {
                connect_timeout: forward.connect_timeout,
                request_timeout: forward.request_timeout,
                max_idle_connections: ForwardLimits::default().requests_in_flight + 1,
            },
            lanes: topology.lanes(),
            routes,
        }
    }
}

/// An edge could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory can't be used.
    #[error("can't open {path}: {error}; check that it belongs to the user that this runs as", path = path.display())]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// Another process has it.
    #[error("another process uses the data directory {}: stop it, or give this one another data_dir", .0.display())]
    InUse(PathBuf),
    /// The spool can't be opened.
    #[error(transparent)]
    Spool(#[from] OpenError),
    /// The HTTP client can't be set up.
    #[error("can't set up the HTTP client: {0}")]
    Client(#[from] reqwest::Error),
}

/// The folders of an edge.
pub struct Folders {
    /// The segment files.
    pub spool: Arc<dyn Folder>,
    /// What is set aside.
    pub set_aside: Arc<dyn Folder>,
    /// Held for the life of the process, so that no two write to the same files.
    lock: Option<File>,
}

impl Folders {
    /// The folders in a data directory, which no other process may use.
    ///
    /// # Errors
    /// When they can't be made or are in use.
    pub fn open(data_dir: &Path) -> Result<Self, StartError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |error| StartError::Folder { path, error }
        };
        std::fs::create_dir_all(data_dir).map_err(failed(data_dir))?;
        let lock_path = data_dir.join("lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&lock_path);
        let lock = lock.map_err(failed(&lock_path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(StartError::InUse(data_dir.to_owned())),
            Err(error) => return Err(failed(&lock_path)(error.into())),
        }
        let folder = |name: &str| {
            let path = data_dir.join(name);
            DiskFolder::open(&path).map_err(failed(&path)).map(|folder| Arc::new(folder) as Arc<dyn Folder>)
        };
        Ok(Self { spool: folder("spool")?, set_aside: folder("set-aside")?, lock: Some(lock) })
    }

    /// Folders that no other process knows of.
    #[must_use]
    pub fn unlocked(spool: Arc<dyn Folder>, set_aside: Arc<dyn Folder>) -> Self {
        Self { spool, set_aside, lock: None }
    }
}

/// What the task that owns the state lets others see of it.
#[derive(Debug, Clone, Default)]
struct Shown {
    status: serde_json::Value,
    trouble: Option<String>,
}

/// The handle of a running edge.
#[derive(Clone)]
pub struct Edge {
    messages: mpsc::Sender<Message>,
    shown: Arc<Mutex<Shown>>,
}

impl Edge {
    /// Reads the spool and starts forwarding. Reading blocks a thread of the runtime's pool for that.
    ///
    /// # Errors
    /// When the spool can't be opened.
    pub async fn start(options: EdgeOptions, folders: Folders, metrics: Arc<EdgeMetrics>) -> Result<Self, StartError> {
        let upstream = Arc::new(Client::new(options.client, options.routes.len())?);
        let (edge, work) = Self::prepare(options, folders, upstream, Surroundings::system(), metrics).await?;
        tokio::spawn(async move {
            if let Err(error) = work.await {
                tracing::error!(error = %error, "ending the process");
                std::process::abort();
            }
        });
        Ok(edge)
    }

    /// Reads the spool. Nothing happens before what is returned with the handle is awaited; whoever drops that ends the node
    /// like a crash does, and its error must end it.
    ///
    /// # Errors
    /// When the spool can't be opened.
    pub async fn prepare(
        options: EdgeOptions,
        folders: Folders,
        upstream: Arc<dyn Upstream>,
        surroundings: Surroundings,
        metrics: Arc<EdgeMetrics>,
    ) -> Result<(Self, impl Future<Output = Result<(), SyncFailed>> + Send + 'static), StartError> {
        let (max_set_aside, limits) = (options.max_set_aside_bytes, options.spool);
        let clock = surroundings.clock.clone();
        let opened = surroundings.blocking.run(move || {
            let set_aside = SetAside::open(Arc::clone(&folders.set_aside), max_set_aside, clock)
                .map_err(|error| StartError::Folder { path: folders.set_aside.describe().into(), error })?;
            let (spool, recovery) = Spool::open(Arc::clone(&folders.spool), &set_aside, limits)?;
            Ok::<_, StartError>((Opened { spool, set_aside, lock: folders.lock }, recovery))
        });
        let (opened, recovery) = opened.await?;
        tracing::info!(
            segments = recovery.segments,
            batches = recovery.entries,
            dropped = recovery.dropped_entries,
            torn_bytes = recovery.torn_bytes,
            corrupt_files = recovery.corrupt_files,
            "spool opened"
        );
        metrics.recovered(&recovery);
        let (messages, inbox) = mpsc::channel(QUEUE);
        let shown = Arc::new(Mutex::new(Shown::default()));
        let core = Core::new(options, opened, upstream, surroundings, metrics, Arc::clone(&shown));
        Ok((Self { messages, shown }, core.run(inbox)))
    }

    /// Finishes the group that is being written and stops. Nothing is lost by not calling it.
    pub async fn stop(&self) {
        let (reply, done) = oneshot::channel();
        if self.messages.send(Message::Stop { reply }).await.is_ok() {
            // An error means that the task is gone already.
            let _ = done.await;
        }
    }

    /// Takes nothing new from now on, forwards what it has, and returns when all of that is committed.
    pub async fn drain(&self) {
        let (reply, empty) = oneshot::channel();
        if self.messages.send(Message::Drain { reply }).await.is_ok() {
            // An error means that the task is gone already.
            let _ = empty.await;
        }
    }

    async fn ask<R>(
        &self,
        message: impl FnOnce(oneshot::Sender<Result<R, Overloaded>>) -> Message,
    ) -> Result<R, Overloaded> {
        let (reply, answer) = oneshot::channel();
        self.messages.try_send(message(reply)).map_err(|error| {
            let reason = match error {
                mpsc::error::TrySendError::Full(_) => format!("{QUEUE} requests wait already"),
                mpsc::error::TrySendError::Closed(_) => "the node is stopping".into(),
            };
            Overloaded::new(reason, QUEUE_RETRY_AFTER)
        })?;
        answer.await.unwrap_or_else(|_| Err(Overloaded::new("the node is stopping", QUEUE_RETRY_AFTER)))
    }
}

#[async_trait]
impl Tier for Edge {
    async fn offer(&self, batches: Vec<Received>) -> Result<Vec<Answer>, Overloaded> {
        self.ask(|reply| Message::Offer { batches, reply }).await
    }

    async fn positions(&self, query: PositionsQuery) -> Result<Vec<Answer>, Overloaded> {
        self.ask(|reply| Message::Positions { query, reply }).await
    }

    async fn reports(&self, reports: Vec<Report>) -> Result<Vec<ReportAnswer>, Overloaded> {
        self.ask(|reply| Message::Reports { reports, reply }).await
    }

    async fn status(&self) -> serde_json::Value {
        self.shown.lock().expect("nothing panics while the lock is held").status.clone()
    }

    fn ready(&self) -> Result<(), String> {
        if self.messages.is_closed() {
            return Err("the node is stopping".into());
        }
        self.shown.lock().expect("nothing panics while the lock is held").trouble.clone().map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests;
