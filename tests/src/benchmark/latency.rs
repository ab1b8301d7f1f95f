//! How long a line takes: from when it is written until an edge has it on disk, and until it is committed on the sink.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tributary_agent::ship::Sender;
use tributary_common::http::endpoint::Endpoint;
use tributary_common::ids::{AgentId, LaneCount};
use tributary_common::messages::{PositionsQuery, StreamQuery};

use super::figures::quantile;
use super::senders::client;
use crate::cluster::{Cluster, ClusterOptions, Role, Sink};
use crate::synthetic::AccessLog;
use crate::wait::until;

/// How often the log is appended to.
const TICK: Duration = Duration::from_millis(10);
/// How often edge and root are asked what they have.
const LOOK: Duration = Duration::from_millis(5);
/// Only turns a hang into a failure.
const LIMIT: Duration = Duration::from_secs(120);

/// Seconds from when a line was written.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    /// Until it was durable in the edge's spool: half of the lines, and 99 of 100.
    pub durable_s: (f64, f64),
    /// Until it was committed on the sink.
    pub committed_s: (f64, f64),
}

/// A log grows by `rate` bytes a second for `time`; agent, edge and root have their defaults.
///
/// # Errors
/// A process fails.
pub async fn measure(parent: &Path, sink: Sink, rate: u64, time: Duration) -> Result<Latency> {
    let folder = tempfile::Builder::new().prefix("latency-").tempdir_in(parent)?;
    let mut cluster = Cluster::prepare(ClusterOptions { sink, ..ClusterOptions::as_shipped(folder.path()) })?;
    let outcome = run(&mut cluster, rate, time).await;
    cluster.explain(outcome)
}

async fn run(cluster: &mut Cluster, rate: u64, time: Duration) -> Result<Latency> {
    let (agent, edge, root) = (Role::Agent(0), Role::Edge(0), Role::Root(0));
    let log = cluster.log_dir(0).join("access.log");
    let mut writer = Writer::begin(&log)?;
    for role in [root, edge, agent] {
        cluster.start_node(role)?;
        cluster.wait_until_ready(role).await?;
    }
    writer.append(1000)?;
    let stream = until("the agent to have named the stream", LIMIT, async || {
        let status = cluster.status(agent).await?;
        let name = status["files"][0]["stream"].as_str().context("no stream")?.to_owned();
        ensure!(status["files"][0]["committed"].as_u64() > Some(0), "nothing is committed");
        let agent: AgentId = status["agent"].as_str().context("no agent")?.parse()?;
        Ok(Some(StreamQuery {
            lane: agent.lane(LaneCount::try_from(1).map_err(anyhow::Error::msg)?),
            agent,
            category: "nginx-access".parse()?,
            stream: serde_json::from_value(name.into())?,
            committed: None,
        }))
    })
    .await?;
    let query = PositionsQuery { streams: vec![stream] };
    let look = |role: Role| -> Result<Sender> {
        let endpoint: Endpoint = cluster.url(role, "")?.parse().context("its address")?;
        Ok(Sender { client: client()?, endpoint })
    };
    let (at_edge, at_root) = (look(edge)?, look(root)?);

    let (mut durable, mut committed) = (Seen::default(), Seen::default());
    let begun = Instant::now();
    let mut next_tick = begun;
    let mut written: Vec<(Instant, u64)> = Vec::new();
    loop {
        let now = Instant::now();
        if now >= next_tick && now < begun + time {
            let end = writer.append((rate as f64 * TICK.as_secs_f64()) as usize)?;
            written.push((Instant::now(), end));
            next_tick += TICK;
        }
        let answer = at_edge.positions(&query).await?.answers.into_iter().next().context("an answer")?;
        durable.note(answer.next.map_or(0, |next| next.offset));
        let answer = at_root.positions(&query).await?.answers.into_iter().next().context("an answer")?;
        committed.note(answer.committed.map_or(0, |end| end.offset));
        let all = written.last().is_none_or(|(_, end)| committed.last() >= *end);
        if now >= begun + time && all {
            break;
        }
        ensure!(now < begun + time + LIMIT, "what was written is not committed");
        tokio::time::sleep(LOOK).await;
    }
    cluster.stop_all().await?;
    Ok(Latency { durable_s: durable.latencies(&written), committed_s: committed.latencies(&written) })
}

struct Writer {
    file: std::fs::File,
    log: AccessLog,
    serial: u64,
    end: u64,
}

impl Writer {
    fn begin(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Self { file, log: AccessLog::default(), serial: 0, end: 0 })
    }

    /// Appends lines of about so many bytes; returns where the log ends.
    fn append(&mut self, bytes: usize) -> Result<u64> {
        let second = jiff::Timestamp::now().as_second();
        let mut text = Vec::with_capacity(bytes + 256);
        while text.len() < bytes {
            self.log.line(self.serial, second, &mut text);
            self.serial += 1;
        }
        self.file.write_all(&text)?;
        self.end += text.len() as u64;
        Ok(self.end)
    }
}

/// When an offset was seen first to have been reached.
#[derive(Default)]
struct Seen(Vec<(Instant, u64)>);

impl Seen {
    fn last(&self) -> u64 {
        self.0.last().map_or(0, |(_, offset)| *offset)
    }

    fn note(&mut self, offset: u64) {
        if offset > self.last() {
            self.0.push((Instant::now(), offset));
        }
    }

    fn latencies(&self, written: &[(Instant, u64)]) -> (f64, f64) {
        let reached = |end: u64| self.0.get(self.0.partition_point(|(_, offset)| *offset < end)).map(|(at, _)| *at);
        let mut seconds: Vec<f64> = written
            .iter()
            .filter_map(|(at, end)| Some(reached(*end)?.saturating_duration_since(*at).as_secs_f64()))
            .collect();
        (quantile(&mut seconds, 0.5), quantile(&mut seconds, 0.99))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latency_of_a_line_is_that_of_the_first_look_that_finds_it() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let seen = Seen(vec![(start + second, 10), (start + 4 * second, 30)]);
        assert_eq!(seen.latencies(&[(start, 10)]), (1.0, 1.0));
        assert_eq!(seen.latencies(&[(start, 11), (start + second, 30)]), (4.0, 4.0));
    }
}
