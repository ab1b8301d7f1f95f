//! What a root needs: memory with many open segments, and time to take a lane with much that is not published.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use jiff::Timestamp;
use tributary_agent::ship::Sender;
use tributary_common::batch::BatchHeader;
use tributary_common::http::endpoint::Endpoint;

use super::senders::{Made, Maker, Stream, Text, client, send, send_all};
use super::tiers::wait_until_committed;
use crate::cluster::{Cluster, ClusterOptions, Role, Sink};
use crate::usage::Usage;

fn options(parent: &Path, sink: Sink, roll_size: &str) -> Result<(tempfile::TempDir, ClusterOptions)> {
    let folder = tempfile::Builder::new().prefix("roots-").tempdir_in(parent)?;
    let options = ClusterOptions { roll_size: roll_size.into(), sink, ..ClusterOptions::as_shipped(folder.path()) };
    Ok((folder, options))
}

async fn start_root(cluster: &mut Cluster) -> Result<Endpoint> {
    let root = Role::Root(0);
    cluster.start_node(root)?;
    cluster.wait_until_ready(root).await?;
    cluster.url(root, "")?.parse().context("the root's address")
}

/// What a root used, to which streams of so many hours sent `batches` batches of 1 MiB each at the same time: it had a segment open for
/// each.
///
/// # Errors
/// A process fails.
pub async fn open_segments(parent: &Path, hours: u64, batches: usize) -> Result<Usage> {
    let (_folder, options) = options(parent, Sink::Local, "1 GiB")?;
    let mut cluster = Cluster::prepare(options)?;
    let outcome = async {
        let endpoint = start_root(&mut cluster).await?;
        let mut maker = Maker::default();
        let one = |hour: u64| {
            let mut stream = Stream::new(hour, hour)?.behind(hour as i64 * 3600);
            let batches = (0..batches).map(|_| stream.next(&mut maker, Text::Access, 1 << 20));
            let batches = batches.collect::<Result<Vec<_>>>()?;
            Ok(Made { wire: batches.iter().map(tributary_common::batch::Batch::encoded_len).sum(), batches })
        };
        let made = (0..hours).map(one).collect::<Result<Vec<_>>>()?;
        let last: Vec<BatchHeader> = made.iter().filter_map(|one| Some(one.batches.last()?.header.clone())).collect();
        send_all(&endpoint, made).await?;
        wait_until_committed(&endpoint, &last).await?;
        let usage = Usage::of(cluster.pid(Role::Root(0))?)?;
        cluster.stop_all().await?;
        Ok(usage)
    };
    let outcome = outcome.await;
    cluster.explain(outcome)
}

/// How a root that was killed came back.
#[derive(Clone, Copy, Debug)]
pub struct Recovered {
    /// Compressed bytes that were not published.
    pub unpublished: u64,
    /// From the new process' start until it served the lane again, leases included.
    pub serving_after: Duration,
    /// What of this came after the leases were recovered.
    pub after_leases: Duration,
    /// What it had used by then.
    pub usage: Usage,
}

/// Fills a lane with `segments` segments of `segment_mib` MiB of one hour, kills the root, and starts it again.
///
/// # Errors
/// A process fails.
pub async fn recovery(parent: &Path, sink: Sink, segments: u64, segment_mib: u64) -> Result<Recovered> {
    /// Hardly compressible, so that few lines make much.
    const TEXT: Text = Text::Random(512 << 10);
    const BATCH: usize = 4 << 20;
    let (_folder, options) = options(parent, sink, &format!("{segment_mib} MiB"))?;
    let mut cluster = Cluster::prepare(options)?;
    let outcome = async {
        let endpoint = start_root(&mut cluster).await?;
        let sender = Sender { client: client()?, endpoint: endpoint.clone() };
        let (mut maker, mut stream) = (Maker::default(), Stream::new(0, 0)?);
        let mut unpublished = 0;
        let mut last = None;
        while unpublished < (segments * segment_mib) << 20 {
            let batch = stream.next(&mut maker, TEXT, BATCH)?;
            if let Some(committed) = send(&sender, std::slice::from_ref(&batch)).await? {
                stream.committed(committed);
            }
            unpublished += batch.body.len() as u64;
            last = Some(batch.header);
        }
        wait_until_committed(&endpoint, &last.into_iter().collect::<Vec<_>>()).await?;
        cluster.kill9(Role::Root(0))?;
        let begun = Instant::now();
        start_root(&mut cluster).await?;
        let serving_after = begun.elapsed();
        let closed = cluster.logged_at(Role::Root(0), "nothing of what was before is open any more")?;
        let after_leases = Timestamp::now().duration_since(closed).try_into().context("a clock that went back")?;
        let usage = Usage::of(cluster.pid(Role::Root(0))?)?;
        cluster.stop_all().await?;
        Ok(Recovered { unpublished, serving_after, after_leases, usage })
    };
    let outcome = outcome.await;
    cluster.explain(outcome)
}
