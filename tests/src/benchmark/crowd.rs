//! Many agents that each have little to say, on one edge.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tributary_agent::ship::Sender;
use tributary_common::http::endpoint::Endpoint;

use super::figures::quantile;
use super::senders::{Maker, Stream, Text, client, send};
use crate::cluster::{Cluster, ClusterOptions, Role};
use crate::usage::Usage;

/// How often each agent sends, as one that cuts a batch each `batch.timeout` would.
const INTERVAL: Duration = Duration::from_secs(2);

/// Who sends what.
#[derive(Clone, Copy, Debug)]
pub struct Crowd {
    /// Agents, each with a connection of its own.
    pub agents: u64,
    /// Streams of each, one of which gets a batch each time, in turn.
    pub streams: u64,
    /// Bytes of log a second of each agent.
    pub rate: usize,
    /// How long they send.
    pub time: Duration,
}

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub struct Crowded {
    /// What the edge used while they sent.
    pub edge: Usage,
    /// What the root used.
    pub root: Usage,
    /// Bytes of log that were sent.
    pub raw: u64,
    /// Requests that brought no good answer.
    pub errors: u64,
    /// Seconds until a batch was durable in the edge's spool: half of them, and 99 of 100, took no longer.
    pub durable_s: (f64, f64),
}

/// Lets the crowd send to an edge with a root behind it, and both with their defaults.
///
/// # Errors
/// A process fails.
pub async fn measure(parent: &Path, crowd: Crowd) -> Result<Crowded> {
    let folder = tempfile::Builder::new().prefix("crowd-").tempdir_in(parent)?;
    let mut cluster = Cluster::prepare(ClusterOptions::as_shipped(folder.path()))?;
    let outcome = run(&mut cluster, crowd).await;
    cluster.explain(outcome)
}

async fn run(cluster: &mut Cluster, crowd: Crowd) -> Result<Crowded> {
    let (edge, root) = (Role::Edge(0), Role::Root(0));
    for role in [root, edge] {
        cluster.start_node(role)?;
        cluster.wait_until_ready(role).await?;
    }
    let endpoint: Endpoint = cluster.url(edge, "")?.parse().context("the edge's address")?;
    let before = (Usage::of(cluster.pid(edge)?)?, Usage::of(cluster.pid(root)?)?);
    let maker = Arc::new(Mutex::new(Maker::default()));
    let begun = Instant::now();
    let mut agents = JoinSet::new();
    for number in 0..crowd.agents {
        let sender = Sender { client: client()?, endpoint: endpoint.clone() };
        let streams = (0..crowd.streams).map(|n| Stream::new(number, number * crowd.streams + n));
        let streams = streams.collect::<Result<Vec<_>>>()?;
        let first = begun + INTERVAL.mul_f64(number as f64 / crowd.agents as f64);
        agents.spawn(agent(sender, streams, Arc::clone(&maker), crowd, first));
    }
    let mut crowded = Crowded { edge: before.0, root: before.1, raw: 0, errors: 0, durable_s: (0.0, 0.0) };
    let mut times = Vec::new();
    while let Some(sent) = agents.join_next().await {
        let sent = sent.context("an agent of the crowd panicked")?;
        crowded.raw += sent.raw;
        crowded.errors += sent.errors;
        times.extend(sent.times);
    }
    crowded.durable_s = (quantile(&mut times, 0.5), quantile(&mut times, 0.99));
    let after = (Usage::of(cluster.pid(edge)?)?, Usage::of(cluster.pid(root)?)?);
    crowded.edge = Usage { cpu: after.0.cpu - before.0.cpu, ..after.0 };
    crowded.root = Usage { cpu: after.1.cpu - before.1.cpu, ..after.1 };
    cluster.stop_all().await?;
    Ok(crowded)
}

#[derive(Default)]
struct Sent {
    raw: u64,
    errors: u64,
    times: Vec<f64>,
}

async fn agent(
    sender: Sender,
    mut streams: Vec<Stream>,
    maker: Arc<Mutex<Maker>>,
    crowd: Crowd,
    first: Instant,
) -> Sent {
    let mut sent = Sent::default();
    let raw_bytes = (crowd.rate as f64 * INTERVAL.as_secs_f64()) as usize;
    let rounds = (crowd.time.as_secs_f64() / INTERVAL.as_secs_f64()).ceil() as usize;
    for round in 0..rounds.max(streams.len()) {
        tokio::time::sleep_until(first + INTERVAL.mul_f64(round as f64)).await;
        let count = streams.len();
        let stream = &mut streams[round % count];
        let made = {
            let mut maker = maker.lock().unwrap_or_else(PoisonError::into_inner);
            stream.next(&mut maker, Text::Access, raw_bytes)
        };
        let Ok(batch) = made else { return Sent { errors: sent.errors + 1, ..sent } };
        let begun = Instant::now();
        match send(&sender, std::slice::from_ref(&batch)).await {
            Ok(committed) => {
                if let Some(committed) = committed {
                    stream.committed(committed);
                }
                sent.times.push(begun.elapsed().as_secs_f64());
                sent.raw += batch.header.raw_len();
            }
            // Its next batch would not continue what the edge has.
            Err(_) => return Sent { errors: sent.errors + 1, ..sent },
        }
    }
    sent
}
