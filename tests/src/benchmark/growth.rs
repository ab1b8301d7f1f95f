//! How cost grows with the number of agents, of streams, with the length of lines and the size of batches.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use tributary_agent::ship::Sender;
use tributary_common::batch::{Batch, BatchHeader};
use tributary_common::http::endpoint::Endpoint;
use tributary_common::limits::MAX_STREAMS_PER_QUERY;
use tributary_common::messages::Verdict;

use super::crowd::{self, Crowd};
use super::figures::{gib, mib};
use super::path::{PathOptions, ship};
use super::plots::Curve;
use super::senders::{Maker, Stream, Text, client};
use super::tiers::wait_until_committed;
use crate::cluster::{Cluster, ClusterOptions, Role};
use crate::synthetic::AccessLog;
use crate::usage::Usage;

fn point(x: f64, usage: Usage, raw: u64) -> (f64, f64, f64) {
    (x, usage.cpu.as_secs_f64() / gib(raw), mib(usage.peak_bytes))
}

/// An edge and a root under so many agents, of 2 KiB of log a second each.
///
/// # Errors
/// A process fails.
pub async fn agents(parent: &Path, counts: &[u64]) -> Result<Vec<Curve>> {
    let (mut edge, mut root) = (Vec::new(), Vec::new());
    for &agents in counts {
        // A few agents need longer to use as much CPU time as can be measured.
        let time = Duration::from_secs(if agents < 100 { 20 } else { 10 });
        let crowded = crowd::measure(parent, Crowd { agents, streams: 1, rate: 2048, time }).await?;
        edge.push(point(agents as f64, crowded.edge, crowded.raw));
        root.push(point(agents as f64, crowded.root, crowded.raw));
    }
    Ok(vec![Curve { name: "edge", points: edge }, Curve { name: "root", points: root }])
}

/// An edge and a root, to which the same number of batches of the same size come, of so many streams.
///
/// # Errors
/// A process fails.
pub async fn streams(parent: &Path, counts: &[u64]) -> Result<Vec<Curve>> {
    let (mut edge, mut root) = (Vec::new(), Vec::new());
    for &count in counts {
        let (at_edge, at_root, raw) = many_streams(parent, count).await?;
        edge.push(point(count as f64, at_edge, raw));
        root.push(point(count as f64, at_root, raw));
    }
    Ok(vec![Curve { name: "edge", points: edge }, Curve { name: "root", points: root }])
}

async fn many_streams(parent: &Path, count: u64) -> Result<(Usage, Usage, u64)> {
    /// Batches in one request: an agent's with many files, or an edge's.
    const PER_REQUEST: usize = 250;
    const BATCHES: u64 = 100_000;
    const RAW_BYTES: usize = 2048;
    const AGENTS: u64 = 100;
    let folder = tempfile::Builder::new().prefix("streams-").tempdir_in(parent)?;
    let mut cluster = Cluster::prepare(ClusterOptions::as_shipped(folder.path()))?;
    let outcome = async {
        let (edge, root) = (Role::Edge(0), Role::Root(0));
        for role in [root, edge] {
            cluster.start_node(role)?;
            cluster.wait_until_ready(role).await?;
        }
        let endpoint: Endpoint = cluster.url(edge, "")?.parse().context("the edge's address")?;
        let sender = Sender { client: client()?, endpoint: endpoint.clone() };
        let usage = |role| Usage::of(cluster.pid(role)?);
        let before = (usage(edge)?, usage(root)?);
        let mut maker = Maker::default();
        let mut all = (0..count).map(|number| Stream::new(number % AGENTS, number)).collect::<Result<Vec<_>>>()?;
        let (mut raw, mut request): (u64, Vec<Batch>) = (0, Vec::new());
        let mut last: Vec<Option<BatchHeader>> = vec![None; all.len()];
        for n in 0..BATCHES {
            let index = (n % count) as usize;
            let batch = all[index].next(&mut maker, Text::Access, RAW_BYTES)?;
            raw += batch.header.raw_len();
            last[index] = Some(batch.header.clone());
            request.push(batch);
            if request.len() == PER_REQUEST || n + 1 == BATCHES {
                let pieces: Vec<Bytes> =
                    request.iter().flat_map(|batch| [batch.encode_head(), batch.body.clone()]).collect();
                let answers = sender.batches(pieces, request.len()).await?.answers;
                for (answer, batch) in answers.into_iter().zip(request.drain(..)) {
                    // Of several batches of one stream, each is answered with what is there after the last one.
                    let is_taken = answer.next.is_some_and(|next| next.offset >= batch.header.end.offset);
                    ensure!(answer.verdict == Verdict::Ok && is_taken, "a batch was answered {answer:?}");
                    let stream = (batch.header.stream.0 - 1) as usize;
                    if let Some(committed) = answer.committed {
                        all[stream].committed(committed);
                    }
                }
            }
        }
        let last: Vec<BatchHeader> = last.into_iter().flatten().collect();
        for some in last.chunks(MAX_STREAMS_PER_QUERY) {
            wait_until_committed(&endpoint, some).await?;
        }
        let after = (usage(edge)?, usage(root)?);
        cluster.stop_all().await?;
        let used = |before: Usage, after: Usage| Usage { cpu: after.cpu - before.cpu, ..after };
        Ok((used(before.0, after.0), used(before.1, after.1), raw))
    };
    let outcome = outcome.await;
    cluster.explain(outcome)
}

/// An agent whose lines have so many bytes; its log lies below `logs`.
///
/// # Errors
/// A process fails.
pub async fn line_lengths(parent: &Path, logs: &Path, lengths: &[usize], size: u64) -> Result<Vec<Curve>> {
    let mut points = Vec::new();
    for &length in lengths {
        let log = tempfile::NamedTempFile::new_in(logs)?;
        write_lines(log.path(), length, size)?;
        let shipped = ship(log.path(), parent, &PathOptions::default()).await?;
        points.push(point(length as f64, shipped.agent, shipped.raw));
    }
    Ok(vec![Curve { name: "agent", points }])
}

/// Lines of an access log, of which so many bytes are taken: from several, where one has fewer.
fn write_lines(path: &Path, length: usize, size: u64) -> Result<()> {
    let mut output = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let (mut log, mut line) = (AccessLog::default(), Vec::new());
    let second = jiff::Timestamp::now().as_second();
    let (mut serial, mut written) = (0, 0);
    while written < size {
        line.clear();
        while line.len() < length {
            log.line(serial, second, &mut line);
            line.pop();
            serial += 1;
        }
        line.truncate(length - 1);
        line.push(b'\n');
        output.write_all(&line)?;
        written += line.len() as u64;
    }
    output.into_inner().map_err(|error| anyhow::anyhow!("writing {}: {error}", path.display()))?.sync_all()?;
    Ok(())
}

/// An agent, an edge and a root where the agent's batches are so large.
///
/// # Errors
/// A process fails.
pub async fn batch_sizes(parent: &Path, log: &Path, kib: &[u64]) -> Result<Vec<Curve>> {
    let (mut agent, mut edge, mut root) = (Vec::new(), Vec::new(), Vec::new());
    for &kib in kib {
        let options = PathOptions { batch_bytes: Some(kib << 10), ..PathOptions::default() };
        let shipped = ship(log, parent, &options).await?;
        agent.push(point(kib as f64, shipped.agent, shipped.raw));
        edge.push(point(kib as f64, shipped.edge, shipped.raw));
        root.push(point(kib as f64, shipped.root, shipped.raw));
    }
    let curve = |name, points| Curve { name, points };
    Ok(vec![curve("agent", agent), curve("edge", edge), curve("root", root)])
}
