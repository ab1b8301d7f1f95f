//! What edges, the nodes between and roots cost, beside a server that does the least that one must.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tributary_agent::ship::Sender;
use tributary_common::batch::BatchHeader;
use tributary_common::http::endpoint::Endpoint;
use tributary_common::messages::{PositionsQuery, StreamQuery};

use super::receiver::Syncs;
use super::senders::{Made, client, send_all, send_all_to_baseline};
use super::taker::Taker;
use crate::cluster::{Cluster, ClusterOptions, Role};
use crate::process::{AtParentDeath, Process};
use crate::usage::Usage;
use crate::wait::until;

/// Only turns a hang into a failure.
const LIMIT: Duration = Duration::from_secs(600);

/// CPU time of the baseline, of each kind.
#[derive(Clone, Copy, Debug)]
pub struct Baselines {
    /// [`Syncs::Each`]
    pub each: Duration,
    /// [`Syncs::Together`]
    pub together: Duration,
}

/// What one took, and what the baselines took for the same batches just before and just after it, as a mean.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Of the one that is judged.
    pub usage: Usage,
    /// Of the baselines.
    pub baselines: Baselines,
}

impl Cost {
    /// In the time of a baseline.
    #[must_use]
    pub fn ratio(&self, baseline: impl Fn(&Baselines) -> Duration) -> f64 {
        self.usage.cpu.as_secs_f64() / baseline(&self.baselines).as_secs_f64()
    }
}

/// What the same batches cost each.
#[derive(Clone, Copy, Debug)]
pub struct Tiers {
    /// Bytes of all batches.
    pub wire: u64,
    /// An edge that takes them from the senders, and has the machine to itself but for these, as the baseline has: what is above it keeps
    /// nothing.
    pub edge: Cost,
    /// An edge that has a node and a root on the same cores.
    pub crowded_edge: Cost,
    /// The node that takes them from that edge.
    pub mid: Cost,
    /// The root that takes them from there and writes them to a local directory.
    pub root: Cost,
    /// A root that takes them from the senders.
    pub direct_root: Cost,
}

/// Sends the same batches over the same number of connections to the baselines again and again, and between these to an edge alone, to one
/// that has a node between it and a root, and to a root alone.
///
/// # Errors
/// A process fails.
pub async fn measure(parent: &Path, streams: Vec<Made>) -> Result<Tiers> {
    let wire = streams.iter().map(|made| made.wire).sum();
    let mut before = baselines(parent, &streams).await?;
    let mut beside = async |above, to| {
        let usages = tree(parent, above, streams.clone(), to).await?;
        let after = baselines(parent, &streams).await?;
        let before = std::mem::replace(&mut before, after);
        let mean = |of: fn(&Baselines) -> Duration| (of(&before) + of(&after)) / 2;
        let baselines = Baselines { each: mean(|one| one.each), together: mean(|one| one.together) };
        Ok::<_, anyhow::Error>(usages.map(|usage| Cost { usage, baselines }))
    };
    let [edge, _, _] = beside(Above::Taker, Role::Edge(0)).await?;
    let [crowded_edge, mid, root] = beside(Above::NodeAndRoot, Role::Edge(0)).await?;
    let [_, _, direct_root] = beside(Above::Root, Role::Root(0)).await?;
    Ok(Tiers { wire, edge, crowded_edge, mid, root, direct_root })
}

async fn baselines(parent: &Path, streams: &[Made]) -> Result<Baselines> {
    let each = baseline(parent, Syncs::Each, streams.to_vec()).await?;
    Ok(Baselines { each, together: baseline(parent, Syncs::Together, streams.to_vec()).await? })
}

/// The CPU time of a baseline for these batches.
async fn baseline(parent: &Path, syncs: Syncs, streams: Vec<Made>) -> Result<Duration> {
    let folder = tempfile::Builder::new().prefix("baseline-").tempdir_in(parent)?;
    let (port_file, output) = (folder.path().join("port"), folder.path().join("bodies"));
    let own = std::env::current_exe().context("asking for the running executable")?;
    let mut server = Process::spawn(own, AtParentDeath::Kill, folder.path().join("log"), |command| {
        let syncs = match syncs {
            Syncs::Each => "each",
            Syncs::Together => "together",
        };
        command.arg("baseline-server").arg(&port_file).arg(&output).arg(syncs);
    })?;
    let port: u16 = until("the baseline to listen", LIMIT, async || {
        ensure!(server.try_wait()?.is_none(), "it ended: {}", server.log_tail());
        Ok(Some(std::fs::read_to_string(&port_file)?.parse()?))
    })
    .await?;
    let before = Usage::of(server.id())?;
    send_all_to_baseline(port, streams).await?;
    let after = Usage::of(server.id())?;
    server.kill()?;
    Ok(after.cpu - before.cpu)
}

/// What is above an edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Above {
    Taker,
    Root,
    NodeAndRoot,
}

/// What edge, node and root used.
async fn tree(parent: &Path, above: Above, streams: Vec<Made>, to: Role) -> Result<[Usage; 3]> {
    let folder = tempfile::Builder::new().prefix("tiers-").tempdir_in(parent)?;
    let mids = usize::from(above == Above::NodeAndRoot);
    let mut cluster = Cluster::prepare(ClusterOptions { mids, ..ClusterOptions::as_shipped(folder.path()) })?;
    let outcome = run(&mut cluster, above, streams, to).await;
    cluster.explain(outcome)
}

async fn run(cluster: &mut Cluster, above: Above, streams: Vec<Made>, to: Role) -> Result<[Usage; 3]> {
    let _taker = match above {
        Above::Taker => Some(Taker::start(cluster.port(Role::Root(0))?).await?),
        Above::Root | Above::NodeAndRoot => None,
    };
    let is_run = |role: &Role| match role {
        Role::Agent(_) => false,
        Role::Root(_) => above != Above::Taker,
        Role::Edge(_) | Role::Mid(_) => true,
    };
    let roles: Vec<Role> = cluster.roles().into_iter().rev().filter(is_run).collect();
    for role in &roles {
        cluster.start_node(*role)?;
        cluster.wait_until_ready(*role).await?;
    }
    let usage = |cluster: &Cluster, role: Role| cluster.pid(role).map_or(Ok(Usage::default()), Usage::of);
    let wanted = [Role::Edge(0), Role::Mid(0), Role::Root(0)];
    let before = wanted.map(|role| usage(cluster, role).unwrap_or_default().cpu);
    let endpoint: Endpoint = cluster.url(to, "")?.parse().map_err(anyhow::Error::msg)?;
    let last: Vec<BatchHeader> = streams.iter().filter_map(|made| Some(made.batches.last()?.header.clone())).collect();
    send_all(&endpoint, streams).await?;
    wait_until_committed(&endpoint, &last).await?;
    let mut after = [Usage::default(); 3];
    for ((role, before), after) in wanted.into_iter().zip(before).zip(&mut after) {
        *after = usage(cluster, role)?;
        after.cpu = after.cpu.saturating_sub(before);
    }
    cluster.stop_all().await?;
    Ok(after)
}

/// Waits until the streams of these batches are committed up to their ends.
///
/// # Errors
/// It doesn't come about.
pub async fn wait_until_committed(endpoint: &Endpoint, last: &[BatchHeader]) -> Result<()> {
    let sender = Sender { client: client()?, endpoint: endpoint.clone() };
    let streams = last.iter().map(|header| StreamQuery {
        lane: header.lane,
        agent: header.agent.clone(),
        category: header.category.clone(),
        stream: header.stream,
        committed: None,
    });
    let query = PositionsQuery { streams: streams.collect() };
    until("all to be committed", LIMIT, async || {
        let answers = sender.positions(&query).await?.answers;
        let behind = answers.iter().zip(last).filter(|(answer, header)| answer.committed != Some(header.end)).count();
        ensure!(behind == 0, "{behind} of {} streams are not", last.len());
        Ok(Some(()))
    })
    .await
}
