//! A whole tree of real processes on this machine: any number of agents, edges, nodes between, roots and lanes.
//!
//! ```no_run
//! # async fn f() -> anyhow::Result<()> {
//! use tributary_tests::cluster::{Cluster, ClusterOptions, Role};
//!
//! let mut cluster = Cluster::start(ClusterOptions::default()).await?;
//! cluster.kill9(Role::Root(0))?;
//! cluster.start_node(Role::Root(0))?;
//! cluster.wait_until_ready(Role::Root(0)).await?;
//! # Ok(()) }
//! ```
//!
//! All that the processes have on local disk is in one temporary folder:
//!
//! ```text
//! topology.toml  agent-0.toml  edge-0.toml  root-0.toml ...   the configuration
//! logs/0/                                                   what agent 0 tails
//! state/agent-0/  state/edge-0/ ...                         data_dir of each
//! out/agent-0.1.log  out/agent-0.2.log ...                  what each run of each printed
//! sink/                                                     the sink, unless the options name another
//! ```
//!
//! The folder is removed when the value is dropped, unless a scenario failed (see [`Cluster::explain`]).

mod config;
mod lanes;

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;
use std::{fmt, fs};

use anyhow::{Context, Error, Result, bail, ensure};
use jiff::Timestamp;
use reqwest::Client;
use rustix::process::Signal;
use tempfile::TempDir;
use tributary_common::ids::{AgentId, LaneCount};
use tributary_common::topology::Topology;

use crate::disk::SmallDisk;
use crate::process::{AtParentDeath, Process, log_tail};
use crate::programs::Programs;
use crate::proxy::Proxy;
use crate::readers::Tree;
use crate::wait::until;
use crate::webhdfs::WebHdfs;

/// Only turns a hang into a failure.
const LIMIT: Duration = Duration::from_secs(120);

/// Which of the processes. The numbers begin at 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// One of the agents, which all send to the edges.
    Agent(usize),
    /// One of the aggregators that agents send to.
    Edge(usize),
    /// One of the aggregators between the edges and the roots.
    Mid(usize),
    /// One of the aggregators that write to the sink.
    Root(usize),
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent(number) => write!(f, "agent-{number}"),
            Self::Edge(number) => write!(f, "edge-{number}"),
            Self::Mid(number) => write!(f, "mid-{number}"),
            Self::Root(number) => write!(f, "root-{number}"),
        }
    }
}

/// Where the roots write.
#[derive(Clone, Debug, Default)]
pub enum Sink {
    /// A folder of the cluster's own.
    #[default]
    Local,
    /// A folder in HDFS.
    Hdfs {
        /// `hdfs://HOST:PORT`
        uri: String,
        /// The same HDFS by HTTP.
        webhdfs: WebHdfs,
        /// Absolute, like `/logs`.
        path: String,
    },
}

/// What tree to build. The timeouts are short, so that what must be waited for in a test comes soon.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// How many agents, each with a folder of logs of its own; default 1.
    pub agents: usize,
    /// How many edges; default 1.
    pub edges: usize,
    /// How many nodes the tier between the edges and the roots has; default 0: there is none.
    pub mids: usize,
    /// How many roots; default 1.
    pub roots: usize,
    /// How many lanes; default 1.
    pub lanes: u16,
    /// Whether others reach each aggregator through a [`Proxy`]; default no.
    pub proxies: bool,
    /// Default: a folder of the cluster's own.
    pub sink: Sink,
    /// The one category; default `nginx-access`.
    pub category: String,
    /// The category's bucket; default `1m`, the smallest.
    pub bucket: String,
    /// `gzip` (default) or `zstd`.
    pub codec: String,
    /// Whether the agents find the edges in the topology, each in an order of its own; default no: the first of each is the one
    /// with its number.
    pub edges_by_tier: bool,
    /// At what size a file is closed, as the topology has it; default 1 GiB.
    pub roll_size: String,
    /// What the agents tail in their folders; default `access.log*`.
    pub include: String,
    /// What they don't; default `*.gz`.
    pub exclude: String,
    /// Processes whose state lies on a [`SmallDisk`] of so many megabytes; default none.
    pub small_disks: Vec<(Role, u32)>,
    /// More tables for the topology; default none.
    pub topology_lines: String,
    /// More lines for the short timeouts of `[root]`; default none.
    pub root_lines: String,
    /// More lines for the top of the agents' files; default none.
    pub agent_lines: String,
    /// Tables in place of the short timeouts of `[root]`, `[spool]`, `[forward]`; default `None`.
    pub tables: Option<String>,
    /// Everything of it lies in this folder, which must be there, and stays. Default: a temporary one.
    pub folder: Option<PathBuf>,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self {
            agents: 1,
            edges: 1,
            mids: 0,
            roots: 1,
            lanes: 1,
            proxies: false,
            sink: Sink::Local,
            category: "nginx-access".into(),
            bucket: "1m".into(),
            codec: "gzip".into(),
            edges_by_tier: false,
            roll_size: "1 GiB".into(),
            include: "access.log*".into(),
            exclude: "*.gz".into(),
            small_disks: Vec::new(),
            topology_lines: String::new(),
            root_lines: String::new(),
            agent_lines: String::new(),
            tables: None,
            folder: None,
        }
    }
}

impl ClusterOptions {
    /// The programs' own settings in place of the short ones for tests, and buckets of an hour; everything lies in `folder`.
    #[must_use]
    pub fn as_shipped(folder: &Path) -> Self {
        Self { tables: Some(String::new()), bucket: "1h".into(), folder: Some(folder.into()), ..Self::default() }
    }
}

#[derive(Debug)]
struct Node {
    port: u16,
    config: PathBuf,
    /// How many times it was started.
    starts: u32,
    process: Option<Process>,
    /// Whether it was sent SIGSTOP last.
    asleep: bool,
    proxy: Option<Proxy>,
}

impl Node {
    /// Where others reach it.
    fn outer_port(&self) -> u16 {
        self.proxy.as_ref().map_or(self.port, Proxy::port)
    }
}

#[derive(Debug)]
enum Folder {
    Temporary(TempDir),
    Given(PathBuf),
}

impl Folder {
    fn path(&self) -> &Path {
        match self {
            Self::Temporary(folder) => folder.path(),
            Self::Given(folder) => folder,
        }
    }
}

/// A running tree. The fields' order is the order of their end: processes before the folder.
#[derive(Debug)]
pub struct Cluster {
    nodes: BTreeMap<Role, Node>,
    options: ClusterOptions,
    programs: Programs,
    http: Client,
    lanes: LaneCount,
    agent_ids: Vec<AgentId>,
    disks: BTreeMap<Role, SmallDisk>,
    folder: Folder,
}

impl Cluster {
    /// Writes the configuration and starts all processes; returns when they are ready.
    ///
    /// # Errors
    /// The programs can't be built, or one doesn't come up (it shows the end of its log).
    pub async fn start(options: ClusterOptions) -> Result<Self> {
        let proxies = options.proxies;
        let mut cluster = Self::prepare(options)?;
        if proxies {
            for (_, node) in cluster.nodes.iter_mut().filter(|(role, _)| !matches!(role, Role::Agent(_))) {
                node.proxy = Some(Proxy::start(node.port).await?);
            }
            cluster.write_config().context("writing the configuration")?;
        }
        // The root first: the others then have somebody to ask. They must come up in any order, which the tests that kill
        // them show.
        let roles: Vec<Role> = cluster.nodes.keys().rev().copied().collect();
        let started = async {
            for role in &roles {
                cluster.start_node(*role)?;
            }
            for role in roles {
                cluster.wait_until_ready(role).await?;
            }
            Ok(())
        };
        match started.await {
            Ok(()) => Ok(cluster),
            Err(error) => cluster.explain(Err(error)),
        }
    }

    /// Writes the configuration and starts nothing.
    ///
    /// # Errors
    /// The programs can't be built, or the files can't be written.
    pub fn prepare(options: ClusterOptions) -> Result<Self> {
        ensure!(options.edges > 0 && options.roots > 0, "a tree has edges, to which agents send, and roots");
        let programs = Programs::find()?;
        let folder = match &options.folder {
            Some(folder) => Folder::Given(folder.canonicalize().with_context(|| format!("{}", folder.display()))?),
            None => Folder::Temporary(tempfile::Builder::new().prefix("tributary-cluster-").tempdir()?),
        };
        let mut roles: Vec<Role> = (0..options.roots).map(Role::Root).collect();
        roles.extend((0..options.mids).map(Role::Mid));
        roles.extend((0..options.edges).map(Role::Edge));
        roles.extend((0..options.agents).map(Role::Agent));
        let mut nodes = BTreeMap::new();
        for role in roles {
            let config = folder.path().join(format!("{role}.toml"));
            nodes.insert(
                role,
                Node { port: free_port()?, config, starts: 0, process: None, asleep: false, proxy: None },
            );
        }
        // No pooled connections: a killed process would leave dead ones in it.
        let http = Client::builder().no_proxy().pool_max_idle_per_host(0).timeout(Duration::from_secs(10)).build()?;
        let lanes = LaneCount::try_from(options.lanes).map_err(Error::msg)?;
        let agent_ids = (0..options.agents).map(|number| lanes::agent_id(number, lanes)).collect::<Result<_>>()?;
        let mut cluster = Self { nodes, options, programs, http, lanes, agent_ids, disks: BTreeMap::new(), folder };
        cluster.write_config().context("writing the configuration")?;
        for (role, megabytes) in cluster.options.small_disks.clone() {
            let disk = SmallDisk::mount(&cluster.state_dir(role), megabytes)?;
            cluster.disks.insert(role, disk);
        }
        Ok(cluster)
    }

    /// The folder with everything in it.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The programs that it runs.
    #[must_use]
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// The folder whose logs agent `number` tails.
    #[must_use]
    pub fn log_dir(&self, number: usize) -> PathBuf {
        self.folder().join("logs").join(number.to_string())
    }

    /// The `data_dir` of a process.
    #[must_use]
    pub fn state_dir(&self, role: Role) -> PathBuf {
        self.folder().join("state").join(role.to_string())
    }

    /// The configuration file of a process.
    ///
    /// # Panics
    /// There is no such process in this tree.
    #[must_use]
    pub fn config(&self, role: Role) -> &Path {
        &self.nodes[&role].config
    }

    /// All processes, the ones that lines come to first, first.
    #[must_use]
    pub fn roles(&self) -> Vec<Role> {
        self.nodes.keys().copied().collect()
    }

    /// The sink's URI, as in the topology.
    #[must_use]
    pub fn sink_uri(&self) -> String {
        match &self.options.sink {
            Sink::Local => format!("file://{}/sink", self.folder().display()),
            Sink::Hdfs { uri, path, .. } => format!("{uri}{path}"),
        }
    }

    /// The sink, for readers.
    #[must_use]
    pub fn sink(&self) -> Tree {
        match &self.options.sink {
            Sink::Local => Tree::Local(self.folder().join("sink")),
            Sink::Hdfs { uri, webhdfs, path } => {
                Tree::Hdfs { uri: uri.clone(), webhdfs: webhdfs.clone(), path: path.clone() }
            }
        }
    }

    /// At what size the files of the category are closed, in bytes.
    ///
    /// # Errors
    /// The topology can't be read.
    pub fn roll_size(&self) -> Result<u64> {
        let topology = Topology::load(&self.folder().join("topology.toml"))?;
        let category = topology.categories().iter().find(|(name, _)| name.as_str() == self.category());
        Ok(category.context("the topology has no such category")?.1.roll_size)
    }

    /// The category of all lines.
    #[must_use]
    pub fn category(&self) -> &str {
        &self.options.category
    }

    fn node(&mut self, role: Role) -> Result<&mut Node> {
        self.nodes.get_mut(&role).with_context(|| format!("this tree has no {role}"))
    }

    /// The process id of a process that runs.
    ///
    /// # Errors
    /// It doesn't run.
    pub fn pid(&self, role: Role) -> Result<u32> {
        let process = self.nodes.get(&role).and_then(|node| node.process.as_ref());
        Ok(process.with_context(|| format!("{role} doesn't run"))?.id())
    }

    /// Starts a process; returns at once.
    ///
    /// # Errors
    /// It runs already, or can't be started.
    pub fn start_node(&mut self, role: Role) -> Result<()> {
        self.start_with(role, &[])
    }

    fn start_with(&mut self, role: Role, more: &[&str]) -> Result<()> {
        let out = self.folder().join("out");
        let program = match role {
            Role::Agent(_) => self.programs.agent.clone(),
            _ => self.programs.aggregator.clone(),
        };
        let node = self.node(role)?;
        ensure!(node.process.is_none(), "{role} runs already");
        node.starts += 1;
        node.asleep = false;
        let log = out.join(format!("{role}.{}.log", node.starts));
        let process = Process::spawn(program, AtParentDeath::Kill, log, |command| {
            command.args(["run", "--config"]).arg(&node.config).args(more);
        })?;
        node.process = Some(process);
        Ok(())
    }

    /// Runs an agent that doesn't run until it has shipped everything and all is committed (`run --once`).
    ///
    /// # Errors
    /// It fails, or doesn't end.
    pub async fn run_agent_once(&mut self, number: usize) -> Result<()> {
        let role = Role::Agent(number);
        self.start_with(role, &["--once"])?;
        let mut process = self.node(role)?.process.take().context("it was started")?;
        let status = until("the agent to have shipped everything", LIMIT, async || process.try_wait()).await?;
        ensure!(status.success(), "{role} run --once: {status}: {}", process.log_tail());
        Ok(())
    }

    /// SIGKILL. What it has on disk stays.
    ///
    /// # Errors
    /// It doesn't run.
    pub fn kill9(&mut self, role: Role) -> Result<()> {
        let node = self.node(role)?;
        let mut process = node.process.take().with_context(|| format!("{role} doesn't run"))?;
        if let Some(status) = process.try_wait()? {
            bail!("{role} had ended by itself ({status}): {}", process.log_tail());
        }
        process.kill().map(drop)
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// It doesn't run.
    pub fn signal(&mut self, role: Role, signal: Signal) -> Result<()> {
        let node = self.node(role)?;
        node.process.as_ref().with_context(|| format!("{role} doesn't run"))?.signal(signal)?;
        if matches!(signal, Signal::STOP | Signal::CONT) {
            node.asleep = signal == Signal::STOP;
        }
        Ok(())
    }

    /// The proxy in front of an aggregator.
    ///
    /// # Errors
    /// There is none.
    pub fn proxy(&self, role: Role) -> Result<&Proxy> {
        let proxy = self.nodes.get(&role).and_then(|node| node.proxy.as_ref());
        proxy.with_context(|| format!("{role} has no proxy"))
    }

    fn is_asleep(&self, role: Role) -> bool {
        self.nodes.get(&role).is_some_and(|node| node.asleep)
    }

    /// SIGTERM; returns when it has ended.
    ///
    /// # Errors
    /// It doesn't run, doesn't end, or ends with another code than 0.
    pub async fn stop(&mut self, role: Role) -> Result<()> {
        let node = self.node(role)?;
        let mut process = node.process.take().with_context(|| format!("{role} doesn't run"))?;
        process.signal(Signal::TERM)?;
        let stopped = until(format!("{role} to stop"), LIMIT, async || process.try_wait()).await;
        let status = stopped.with_context(|| process.log_tail())?;
        ensure!(status.success(), "{role} was stopped and ended with {status}: {}", process.log_tail());
        Ok(())
    }

    /// Stops every process that runs, agents first, as in an orderly end of it all.
    ///
    /// # Errors
    /// As of [`Self::stop`].
    pub async fn stop_all(&mut self) -> Result<()> {
        for role in self.roles() {
            if self.node(role)?.process.is_some() {
                self.stop(role).await?;
            }
        }
        Ok(())
    }

    /// Deletes all that a process has on local disk. It must not run.
    ///
    /// # Errors
    /// It runs, or the folder can't be deleted.
    pub fn wipe_state(&mut self, role: Role) -> Result<()> {
        ensure!(self.node(role)?.process.is_none(), "{role} runs");
        let state = self.state_dir(role);
        if !state.exists() {
            return Ok(());
        }
        // Not the folder itself, which may be a disk's.
        for entry in fs::read_dir(&state).with_context(|| format!("listing {}", state.display()))? {
            let path = entry?.path();
            let deleted = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            deleted.with_context(|| format!("deleting {}", path.display()))?;
        }
        Ok(())
    }

    /// The small disk with the state of a process.
    ///
    /// # Errors
    /// It has none.
    pub fn disk(&self, role: Role) -> Result<&SmallDisk> {
        self.disks.get(&role).with_context(|| format!("{role} has no small disk"))
    }

    /// Does as a service manager: starts the processes that have ended by themselves, and says which and how they ended.
    ///
    /// # Errors
    /// One has panicked, or found its configuration wrong; or it can't be started.
    pub fn restart_ended(&mut self) -> Result<Vec<(Role, String)>> {
        let mut ended = Vec::new();
        for (role, node) in &mut self.nodes {
            let Some(process) = &mut node.process else { continue };
            if let Some(status) = process.try_wait()? {
                let expected = status.code() == Some(1) || status.signal() == Some(Signal::ABORT.as_raw());
                ensure!(expected, "{role} has ended by itself ({status}): {}", process.log_tail());
                node.process = None;
                ended.push((*role, status.to_string()));
            }
        }
        for (role, _) in &ended {
            self.start_node(*role)?;
        }
        Ok(ended)
    }

    /// Waits until a process says that it is ready (`/readyz`).
    ///
    /// # Errors
    /// It ends, or doesn't become ready.
    pub async fn wait_until_ready(&mut self, role: Role) -> Result<()> {
        let (http, url) = (self.http.clone(), self.url(role, "/readyz")?);
        let node = self.node(role)?;
        let process = node.process.as_mut().with_context(|| format!("{role} doesn't run"))?;
        let ready = until(format!("{role} to be ready"), LIMIT, async || {
            if let Some(status) = process.try_wait()? {
                return Ok(Some(Err(status)));
            }
            let answer = http.get(&url).send().await?;
            let (good, text) = (answer.status().is_success(), answer.text().await?);
            ensure!(good, "it says: {text}");
            Ok(Some(Ok(())))
        });
        match ready.await.with_context(|| process.log_tail())? {
            Ok(()) => Ok(()),
            Err(status) => bail!("{role} ended ({status}): {}", process.log_tail()),
        }
    }

    /// `http://127.0.0.1:PORT` and `path`, of a process' own HTTP server.
    ///
    /// # Errors
    /// There is no such process in this tree.
    pub fn url(&self, role: Role, path: &str) -> Result<String> {
        Ok(format!("http://127.0.0.1:{}{path}", self.port(role)?))
    }

    /// The port of a process' own HTTP server.
    ///
    /// # Errors
    /// There is no such process in this tree.
    pub fn port(&self, role: Role) -> Result<u16> {
        Ok(self.nodes.get(&role).with_context(|| format!("this tree has no {role}"))?.port)
    }

    /// What a process says of itself, as JSON.
    ///
    /// # Errors
    /// It doesn't answer.
    pub async fn status(&self, role: Role) -> Result<serde_json::Value> {
        let path = if matches!(role, Role::Agent(_)) { "/status" } else { "/v1/status" };
        let answer = self.http.get(self.url(role, path)?).send().await?.error_for_status()?;
        Ok(answer.json().await?)
    }

    /// A process' metrics: the sum over all labels of the samples of that name (with `_total`, for a counter). 0 for one that
    /// isn't there yet.
    ///
    /// # Errors
    /// It doesn't answer.
    pub async fn metric(&self, role: Role, name: &str) -> Result<f64> {
        let answer = self.http.get(self.url(role, "/metrics")?).send().await?.error_for_status()?;
        Ok(sum_of_samples(&answer.text().await?, name))
    }

    /// Of the samples of a metric, the sum of those whose label has one of these values, like `busy`.
    ///
    /// # Errors
    /// It doesn't answer.
    pub async fn metric_of(&self, role: Role, name: &str, values: &[&str]) -> Result<f64> {
        let answer = self.http.get(self.url(role, "/metrics")?).send().await?.error_for_status()?;
        let text = answer.text().await?.to_lowercase();
        let wanted = |line: &&str| values.iter().any(|value| line.contains(&format!("=\"{value}\"")));
        let lines: Vec<&str> = text.lines().filter(wanted).collect();
        Ok(sum_of_samples(&lines.join("\n"), name))
    }

    /// Waits until all of `log`, as it is on disk, is committed, and all else that the agent has found.
    ///
    /// # Errors
    /// It doesn't come about.
    pub async fn wait_until_committed(&self, number: usize, log: &Path) -> Result<()> {
        until(format!("all of {} to be committed", log.display()), LIMIT, async || {
            // An agent that hasn't looked since the last line was written says that nothing is missing.
            let size = fs::metadata(log)?.len();
            let status = self.status(Role::Agent(number)).await?;
            let files = status["files"].as_array().context("a status without files")?;
            let whole = |file: &serde_json::Value| {
                file["path"].as_str().map(Path::new) == Some(log) && file["size"] == size && file["committed"] == size
            };
            ensure!(files.iter().any(whole) && status["lag_bytes"] == 0, "{size} bytes, and the agent says: {status}");
            Ok(Some(()))
        })
        .await
    }

    /// How many bytes of an agent's files are not committed.
    ///
    /// # Errors
    /// It doesn't answer.
    pub async fn agent_lag(&self, number: usize) -> Result<u64> {
        // A size in the metrics is whole, however it is written.
        Ok(self.metric(Role::Agent(number), "tributary_agent_lag_bytes").await? as u64)
    }

    /// How many bytes an agent knows to be committed, since its start.
    ///
    /// # Errors
    /// It doesn't answer.
    pub async fn agent_committed(&self, number: usize) -> Result<u64> {
        Ok(self.metric(Role::Agent(number), "tributary_agent_committed_bytes_total").await? as u64)
    }

    /// Fails when a process that should run has ended by itself.
    ///
    /// # Errors
    /// One has, with the end of its log.
    pub fn check_alive(&mut self) -> Result<()> {
        for (role, node) in &mut self.nodes {
            if let Some(process) = &mut node.process
                && let Some(status) = process.try_wait()?
            {
                bail!("{role} has ended by itself ({status}): {}", process.log_tail());
            }
        }
        Ok(())
    }

    /// Fails when a log of any run says that the program met something that must never be.
    ///
    /// # Errors
    /// One does.
    pub fn check_logs(&self) -> Result<()> {
        for log in self.logs()? {
            let text = fs::read(&log).with_context(|| format!("reading {}", log.display()))?;
            let text = String::from_utf8_lossy(&text);
            let bad = text.lines().find(|line| line.contains("panicked at") || line.contains("invariant"));
            ensure!(bad.is_none(), "{} says: {}", log.display(), bad.unwrap_or_default());
        }
        Ok(())
    }

    /// When a running process logged a line with these words first.
    ///
    /// # Errors
    /// It has not, or its log can't be read.
    pub fn logged_at(&self, role: Role, words: &str) -> Result<Timestamp> {
        let process = self.nodes.get(&role).and_then(|node| node.process.as_ref());
        let log = process.with_context(|| format!("{role} does not run"))?.log();
        let text = fs::read_to_string(log).with_context(|| format!("reading {}", log.display()))?;
        let line = text.lines().find(|line| line.contains(words));
        let line = line.with_context(|| format!("{} has nothing about \"{words}\"", log.display()))?;
        let time = line.split_whitespace().next().unwrap_or_default();
        time.parse().with_context(|| format!("reading the time of {line}"))
    }

    fn logs(&self) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(self.folder().join("out"))?;
        let mut logs = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        logs.sort();
        Ok(logs)
    }

    /// The end of a scenario: what came out of it, and if that is an error, the ends of all logs with it. Then the folder is
    /// kept.
    ///
    /// # Errors
    /// The one that it is given.
    pub fn explain<T>(mut self, outcome: Result<T>) -> Result<T> {
        let error: Error = match outcome {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        self.nodes.clear();
        let mut text = format!("everything is kept in {}", self.folder().display());
        for log in self.logs().unwrap_or_default() {
            let _ = write!(text, "\n--- the end of {}\n{}", log.display(), log_tail(&log));
        }
        if let Folder::Temporary(folder) = &mut self.folder {
            folder.disable_cleanup(true);
        }
        // Its own words last: that is where people look first.
        Err(error.context(text))
    }
}

fn sum_of_samples(text: &str, name: &str) -> f64 {
    let value = |line: &str| {
        let rest = line.strip_prefix(name)?;
        let rest = if rest.starts_with('{') { rest.split_once('}')?.1 } else { rest };
        rest.strip_prefix(' ')?.split(' ').next()?.parse::<f64>().ok()
    };
    text.lines().filter_map(value).sum()
}

/// A port of this machine on which nobody listens, and that the kernel gives to nobody who asks for any: a process that is
/// killed and started again finds it free. No other caller in this process is given it.
fn free_port() -> Result<u16> {
    static GIVEN: LazyLock<Mutex<HashSet<u16>>> = LazyLock::new(Mutex::default);
    const LOWEST: u16 = 10_000;
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").context("reading the kernel's ports")?;
    let first: u16 = range.split_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(32_768);
    let candidates = if first > LOWEST + 1000 { LOWEST..first } else { LOWEST..u16::MAX };
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    for _ in 0..1000 {
        let port = rand::random_range(candidates.clone());
        if !given.contains(&port) && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            given.insert(port);
            return Ok(port);
        }
    }
    bail!("found no free port from {} to {}", candidates.start, candidates.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_over_their_labels_and_names_are_whole() {
        let text =
            "# TYPE a counter\na_total{x=\"1 2\"} 3\na_total{x=\"}\"} x\na_total{x=\"2\"} 4.5\na_total_more 9\nb 7\n";
        assert!((sum_of_samples(text, "a_total") - 7.5).abs() < 1e-9);
        assert!((sum_of_samples(text, "b") - 7.0).abs() < 1e-9);
        assert!(sum_of_samples(text, "c").abs() < 1e-9);
    }
}
