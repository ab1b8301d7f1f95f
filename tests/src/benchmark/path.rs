//! The whole way of a log that is there already: an agent, an edge, a root, until all of it is committed.

use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::compressor::{BATCH_BYTES, Bare};
use super::figures::mib;
use super::turns::Turns;
use crate::cluster::{Cluster, ClusterOptions, Role, Sink};
use crate::usage::Usage;
use crate::wait::until;

/// Only turns a hang into a failure.
pub(super) const LIMIT: Duration = Duration::from_secs(3600);

/// The time between questions to the agent while it is far from the end.
const PAUSE: Duration = Duration::from_millis(500);

/// What a run is like.
#[derive(Clone, Debug)]
pub struct PathOptions {
    /// The agent's `compression.threads`; default 1.
    pub threads: u16,
    /// Where the root writes; default: a local directory.
    pub sink: Sink,
    /// The agent's `batch.max_bytes`; default: its own.
    pub batch_bytes: Option<u64>,
    /// The agent's `bytes_per_second`; default: none.
    pub bytes_per_second: Option<u64>,
}

impl Default for PathOptions {
    fn default() -> Self {
        Self { threads: 1, sink: Sink::Local, batch_bytes: None, bytes_per_second: None }
    }
}

/// What it took.
#[derive(Clone, Copy, Debug)]
pub struct Shipped {
    /// Bytes of the log.
    pub raw: u64,
    /// Bytes of requests that the edge received.
    pub wire: u64,
    /// From the agent's start until all was committed.
    pub elapsed: Duration,
    /// From the agent's start until the edge had all of it, synced, but for the last batch: that one isn't full, so it waits for
    /// `batch.timeout`, however fast the agent is. What is left of a run without that wait, and without the one for the last commit.
    pub durable: Duration,
    /// What each process used, from its start.
    pub agent: Usage,
    /// As of the agent.
    pub edge: Usage,
    /// As of the agent.
    pub root: Usage,
}

impl Shipped {
    /// MiB of the log per second, from the agent's start on.
    #[must_use]
    pub fn speed(&self) -> f64 {
        mib(self.raw) / self.elapsed.as_secs_f64()
    }

    /// MiB of the log per second, until the edge had all but the last batch of it.
    #[must_use]
    pub fn agent_speed(&self) -> f64 {
        mib(self.raw) / self.durable.as_secs_f64()
    }

    /// CPU seconds of all three.
    #[must_use]
    pub fn cpu(&self) -> Duration {
        self.agent.cpu + self.edge.cpu + self.root.cpu
    }
}

/// A tree that isn't started, and a log that its agent will find.
pub(super) struct Laid {
    pub(super) cluster: Cluster,
    /// Bytes of the log.
    pub(super) raw: u64,
    _folders: [TempDir; 2],
}

/// Lays the log at `log` before an agent. Everything else lies in a new folder below `parent`; the log may be on another file system.
pub(super) fn lay(log: &Path, parent: &Path, options: &PathOptions) -> Result<Laid> {
    let folder = tempfile::Builder::new().prefix("run-").tempdir_in(parent).context("making a directory")?;
    let mut agent_lines = String::new();
    if let Some(rate) = options.bytes_per_second {
        agent_lines += &format!("bytes_per_second = \"{rate} B\"\n");
    }
    agent_lines += &format!("[compression]\nthreads = {}\n", options.threads);
    if let Some(bytes) = options.batch_bytes {
        agent_lines += &format!("[batch]\nmax_bytes = \"{bytes} B\"\n");
    }
    let cluster = Cluster::prepare(ClusterOptions {
        sink: options.sink.clone(),
        agent_lines,
        ..ClusterOptions::as_shipped(folder.path())
    })?;
    // A name of its own for each run, beside the log: a link to a file can't leave its file system.
    let next_to_it = log.parent().context("a log lies in a folder")?;
    let logs = tempfile::Builder::new().prefix("run-").tempdir_in(next_to_it).context("making a directory")?;
    let linked = logs.path().join("access.log");
    fs::hard_link(log, &linked).with_context(|| format!("linking {}", linked.display()))?;
    fs::remove_dir(cluster.log_dir(0))?;
    std::os::unix::fs::symlink(logs.path(), cluster.log_dir(0))?;
    Ok(Laid { cluster, raw: read_once(log)?, _folders: [folder, logs] })
}

/// Ships the log at `log`, with everything at its defaults but for `options`. Works in a new folder below `parent`; the log may be on
/// another file system.
///
/// # Errors
/// A process fails.
pub async fn ship(log: &Path, parent: &Path, options: &PathOptions) -> Result<Shipped> {
    let mut laid = lay(log, parent, options)?;
    let outcome = run(&mut laid, options.batch_bytes.unwrap_or(BATCH_BYTES as u64), None).await;
    laid.cluster.explain(outcome)
}

/// The same with the defaults, in turn with the compressor, which has the machine to itself meanwhile.
///
/// # Errors
/// A process fails.
pub async fn ship_in_turn(log: &Path, parent: &Path) -> Result<(Shipped, Bare)> {
    let mut laid = lay(log, parent, &PathOptions::default())?;
    let mut turns = Turns::open(log)?;
    let outcome = run(&mut laid, BATCH_BYTES as u64, Some(&mut turns)).await;
    Ok((laid.cluster.explain(outcome)?, turns.used()))
}

/// Whether so little of a log is left that no turn of the compressor may follow.
pub(super) fn is_nearly(raw: u64, done: u64) -> bool {
    done >= raw / 10 * 9
}

/// Reads a log, and returns its length. One that is being written is in the page cache when an agent reads it; one that was written a
/// minute ago may not be any more, and then the disk would be measured.
fn read_once(log: &Path) -> Result<u64> {
    let mut file = fs::File::open(log).with_context(|| format!("opening {}", log.display()))?;
    let mut buffer = vec![0; 1 << 20];
    let mut length = 0;
    loop {
        match file.read(&mut buffer).with_context(|| format!("reading {}", log.display()))? {
            0 => return Ok(length),
            got => length += got as u64,
        }
    }
}

async fn run(laid: &mut Laid, batch_bytes: u64, mut turns: Option<&mut Turns>) -> Result<Shipped> {
    const ROLES: [Role; 3] = [Role::Root(0), Role::Edge(0), Role::Agent(0)];
    let (cluster, raw) = (&mut laid.cluster, laid.raw);
    for role in &ROLES[..2] {
        cluster.start_node(*role)?;
        cluster.wait_until_ready(*role).await?;
    }
    let begun = Instant::now();
    cluster.start_node(Role::Agent(0))?;
    cluster.wait_until_ready(Role::Agent(0)).await?;
    let full = raw.saturating_sub(batch_bytes);
    until("the edge to have all full batches", LIMIT, async || {
        let status = cluster.status(Role::Agent(0)).await?;
        let files = status["files"].as_array().context("a status without files")?;
        let next: u64 = files.iter().filter_map(|file| file["next"].as_u64()).sum();
        if !is_nearly(raw, next) {
            // Asking costs the agent, too.
            match &mut turns {
                Some(turns) => turns.take(cluster, &ROLES).await?,
                None => tokio::time::sleep(PAUSE).await,
            }
        }
        ensure!(next >= full, "it has {next} of {full} bytes");
        Ok(Some(()))
    })
    .await?;
    let worked = || begun.elapsed() - turns.as_ref().map_or(Duration::ZERO, |turns| turns.paused());
    let durable = worked();
    until("all to be committed", LIMIT, async || {
        let committed = cluster.agent_committed(0).await?;
        ensure!(committed >= raw, "{committed} of {raw} bytes are");
        Ok(Some(()))
    })
    .await?;
    let elapsed = worked();
    let usage = |role: Role| Usage::of(cluster.pid(role)?);
    let (root, edge, agent) = (usage(Role::Root(0))?, usage(Role::Edge(0))?, usage(Role::Agent(0))?);
    let wire = cluster.metric(Role::Edge(0), "tributary_aggregator_received_bytes_total").await? as u64;
    cluster.stop_all().await?;
    Ok(Shipped { raw, wire, elapsed, durable, agent, edge, root })
}
