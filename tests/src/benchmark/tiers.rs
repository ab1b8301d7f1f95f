//! What edges, the nodes between and roots cost, beside a server that does the least that one must.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tributary_agent::ship::Sender;
use tributary_common::batch::BatchHeader;
use tributary_common::http::endpoint::Endpoint;
use tributary_common::messages::{PositionsQuery, StreamQuery};

use super::senders::{Made, client, send_all, send_all_to_baseline};
use crate::cluster::{Cluster, ClusterOptions, Role};
use crate::process::{AtParentDeath, Process};
use crate::usage::Usage;
use crate::wait::until;

/// Only turns a hang into a failure.
const LIMIT: Duration = Duration::from_secs(600);

/// What the same batches cost each.
#[derive(Clone, Copy, Debug)]
pub struct Tiers {
    /// Bytes of all batches.
    pub wire: u64,
    /// The baseline.
    pub baseline: Usage,
    /// The edge that takes them from the senders.
    pub edge: Usage,
    /// The node that takes them from the edge.
    pub mid: Usage,
    /// The root that takes them from there and writes them to a local directory.
    pub root: Usage,
    /// A root that takes them from the senders.
    pub direct_root: Usage,
}

/// Sends the same batches over the same number of connections to the baseline, to an edge that has a node between it and a root, and to
/// a root alone.
///
/// # Errors
/// A process fails.
pub async fn measure(parent: &Path, streams: Vec<Made>) -> Result<Tiers> {
    let wire = streams.iter().map(|made| made.wire).sum();
    let baseline = baseline(parent, streams.clone()).await?;
    let (edge, mid, root) = tree(parent, 1, streams.clone(), Role::Edge(0)).await?;
    let (_, _, direct_root) = tree(parent, 0, streams, Role::Root(0)).await?;
    Ok(Tiers { wire, baseline, edge, mid, root, direct_root })
}

/// What the baseline used for these batches.
///
/// # Errors
/// It fails.
pub async fn baseline(parent: &Path, streams: Vec<Made>) -> Result<Usage> {
    let folder = tempfile::Builder::new().prefix("baseline-").tempdir_in(parent)?;
    let (port_file, output) = (folder.path().join("port"), folder.path().join("bodies"));
    let own = std::env::current_exe().context("asking for the running executable")?;
    let mut server = Process::spawn(own, AtParentDeath::Kill, folder.path().join("log"), |command| {
        command.arg("baseline-server").arg(&port_file).arg(&output);
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
    Ok(Usage { cpu: after.cpu - before.cpu, ..after })
}

async fn tree(parent: &Path, mids: usize, streams: Vec<Made>, to: Role) -> Result<(Usage, Usage, Usage)> {
    let folder = tempfile::Builder::new().prefix("tiers-").tempdir_in(parent)?;
    let mut cluster = Cluster::prepare(ClusterOptions { mids, ..ClusterOptions::as_shipped(folder.path()) })?;
    let outcome = run(&mut cluster, streams, to).await;
    cluster.explain(outcome)
}

async fn run(cluster: &mut Cluster, streams: Vec<Made>, to: Role) -> Result<(Usage, Usage, Usage)> {
    let roles: Vec<Role> = cluster.roles().into_iter().rev().filter(|role| !matches!(role, Role::Agent(_))).collect();
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
    let [edge, mid, root] = after;
    Ok((edge, mid, root))
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
