//! What everything costs, each figure beside a baseline of the same run: the bare compressor, or a server that does the least that
//! one must. `tests/BENCHMARKS.md` says what came out, and what was done about it.
//!
//! Nothing here decides whether a test passes.

pub mod alone;
pub mod compressor;
pub mod corpora;
pub mod crowd;
pub mod figures;
pub mod growth;
pub mod latency;
pub mod path;
pub mod plots;
pub mod receiver;
pub mod roots;
pub mod senders;
pub mod taker;
pub mod tiers;
pub mod turns;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use self::compressor::{BATCH_BYTES, Bare, write_log};
use self::crowd::Crowd;
use self::figures::{Goal, Section, gib, mib, quantile, rounded, table};
use self::path::{PathOptions, Shipped, ship};
use self::tiers::{Baselines, Cost, Tiers};
use crate::cluster::Sink;
use crate::hdfs::{HdfsOptions, MiniHdfs};

/// The fastest of the peers, in MiB of log per second (see `tests/BENCHMARKS.md`).
const PEERS_BEST_SPEED: f64 = 63.0;
/// The cheapest of the peers, in CPU seconds of sender and receiver per GiB of log.
const PEERS_LEAST_CPU: f64 = 27.5;

/// How often an agent is measured beside the compressor, and the tiers beside their baseline, in turn: a machine that is shared has
/// faster and slower minutes. What counts is the median of the ratios.
const AGENT_ROUNDS: usize = 5;
const TIER_ROUNDS: usize = 9;

/// Where and how much is measured.
#[derive(Clone, Debug)]
pub struct Bench {
    /// All files lie below it, on a disk with room for four times `log_bytes`.
    pub parent: PathBuf,
    /// The logs that are shipped lie here.
    pub logs: PathBuf,
    /// Bytes of the log that is shipped; so many that a start's own costs don't count.
    pub log_bytes: u64,
    /// Raw bytes of the batches for the tiers, which are kept in memory compressed.
    pub tier_bytes: u64,
}

impl Bench {
    /// The log that is shipped, which is written when it isn't there yet.
    fn log(&self) -> Result<PathBuf> {
        let path = self.logs.join("access.log");
        if !path.exists() {
            write_log(&path, self.log_bytes)?;
        }
        Ok(path)
    }

    /// An agent beside the bare compressor, and the whole way to a local directory.
    ///
    /// # Errors
    /// A process fails.
    pub async fn path(&self) -> Result<Vec<Section>> {
        let log = self.log()?;
        let (mut alone, mut shipped) = (Vec::new(), Vec::new());
        for _ in 0..AGENT_ROUNDS {
            alone.push(alone::measure(&log, &self.parent).await?);
            shipped.push(path::ship_in_turn(&log, &self.parent).await?);
        }
        alone.sort_by(|one, other| one.cpu().total_cmp(&other.cpu()));
        let median = alone[alone.len() / 2];
        let cpu = |(shipped, bare): &(Shipped, Bare)| bare.in_its_cpu(shipped.agent.cpu, shipped.raw);
        shipped.sort_by(|one, other| cpu(one).total_cmp(&cpu(other)));
        let (one, beside) = shipped[shipped.len() / 2];
        let two = ship(&log, &self.parent, &PathOptions { threads: 2, ..PathOptions::default() }).await?;

        let mut agent = Section::new(
            "Agent",
            format!(
                "{} MiB of access log, {} bytes a line, given to an agent with its defaults; the time of every line is read. The \
                 baseline is the agent's compressor (libdeflate, level 1) over the same bytes in memory, in pieces of {} MiB. Both have \
                 the machine to themselves: the edge to which the agent sends only says that it has everything, and agent and compressor \
                 work in turn, two seconds each. {AGENT_ROUNDS} rounds; where nothing else is said, the figures are of the one with the \
                 median of the ratios.",
                rounded(mib(median.raw)),
                210,
                BATCH_BYTES >> 20,
            ),
        );
        agent.tell("the compressor", mib(1) / median.compressor.cpu_per_byte(), "MiB per CPU second");
        agent.tell("agent, CPU seconds per GiB", median.agent.cpu.as_secs_f64() / gib(median.raw), "s");
        agent.judge("agent's CPU", median.cpu(), "× the compressor's", Goal::AtMost(1.15));
        agent.tell("… in the best and", alone[0].cpu(), "×");
        agent.tell("… in the worst round", alone[alone.len() - 1].cpu(), "×");
        agent.judge(
            "… on the whole way below, beside a real edge and a root on the same cores",
            cpu(&(one, beside)),
            "×",
            Goal::AtMost(1.15),
        );
        agent.judge(
            "wall time until all but the last, unfinished batch is taken, one compressing thread",
            median.wall(),
            "× the compressor's",
            Goal::AtMost(1.2),
        );
        agent.tell("… on the whole way, until the edge has it on disk", beside.in_its_time(one.durable, one.raw), "×");
        agent.tell(
            "speed on the whole way with two compressing threads",
            two.agent_speed() / one.agent_speed(),
            "× with one",
        );
        agent.tell("wire", one.wire as f64 / one.raw as f64, "bytes per byte of log");
        agent.judge("peak memory of the agent", mib(one.agent.peak_bytes), "MiB", Goal::AtMost(48.0));

        let mut whole = Section::new(
            "The whole way: agent, edge, root, `file://`",
            format!(
                "{} MiB of the same lines; with one compressing thread in turn with the compressor, too. The goals are three times the \
                 fastest and a fifth of the cheapest of the peers below.",
                rounded(mib(one.raw))
            ),
        );
        judge_speed(&mut whole, &one, "one compressing thread", 3.0);
        judge_speed(&mut whole, &two, "two", 3.0);
        whole.judge(
            "CPU seconds per GiB of log, all three",
            one.cpu().as_secs_f64() / gib(one.raw),
            "s",
            Goal::AtMost(PEERS_LEAST_CPU / 5.0),
        );
        whole.add(&parts(&one));
        Ok(vec![agent, whole])
    }

    /// The whole way to a real HDFS on the same cores.
    ///
    /// # Errors
    /// A process fails.
    pub async fn hdfs(&self) -> Result<Vec<Section>> {
        let log = self.log()?;
        let hdfs = MiniHdfs::start(HdfsOptions::default()).await?;
        let options = PathOptions { threads: 2, sink: hdfs_sink(&hdfs), ..PathOptions::default() };
        let shipped = ship(&log, &self.parent, &options).await?;
        let mut section = Section::new(
            "The whole way: agent, edge, root, HDFS",
            "The same log into a real HDFS, a NameNode and a DataNode, on the same cores; two compressing threads.",
        );
        judge_speed(&mut section, &shipped, "two compressing threads", 1.5);
        section.add(&parts(&shipped));
        Ok(vec![section])
    }

    /// Edges, nodes between and roots beside a server that does the least that one must.
    ///
    /// # Errors
    /// A process fails.
    pub async fn tiers(&self) -> Result<Vec<Section>> {
        const STREAMS: u64 = 16;
        let batches = (self.tier_bytes / STREAMS / BATCH_BYTES as u64).max(1) as usize;
        let streams = senders::make(STREAMS, batches, BATCH_BYTES)?;
        let mut rounds = Vec::new();
        for _ in 0..TIER_ROUNDS {
            rounds.push(tiers::measure(&self.parent, streams.clone()).await?);
        }
        let wire = rounds[0].wire;
        let mut section = Section::new(
            "Tiers",
            format!(
                "{STREAMS} senders, each with a connection and a stream of its own, send batches that were made before, {} MiB in all. The \
                 baseline is a hyper server that reads bodies, compares their CRC-32C, writes them to a file and syncs it before it \
                 answers: for each body, or, as the aggregators do, once for all that came meanwhile. An edge also sends on all that it \
                 takes, to one that keeps nothing, so that it has no more neighbours than the baseline; the node is measured between \
                 another edge and the root. {TIER_ROUNDS} rounds, in each of which every one is measured between two runs of both \
                 baselines; each figure is the median of its own.",
                rounded(mib(wire))
            ),
        );
        let per_gib = |cpu: Duration| cpu.as_secs_f64() / gib(wire);
        let median = |of: &dyn Fn(&Tiers) -> f64| quantile(&mut rounds.iter().map(of).collect::<Vec<f64>>(), 0.5);
        type Of = fn(&Tiers) -> Cost;
        type Baseline = fn(&Baselines) -> Duration;
        let baselines: [(&str, Baseline); 2] = [("each", |one| one.each), ("together", |one| one.together)];
        for (name, baseline) in baselines {
            let cost = median(&|round| per_gib(baseline(&round.edge.baselines)));
            section.tell(format!("baseline that syncs {name}, CPU seconds per compressed GiB"), cost, "s");
        }
        let tiers: [(&str, Of); 4] = [
            ("edge", |round| round.edge),
            ("node between edge and root", |round| round.mid),
            ("root on `file://`, behind these", |round| round.root),
            ("root on `file://`, alone", |round| round.direct_root),
        ];
        for (what, of) in tiers {
            let cost = rounded(median(&|round| per_gib(of(round).usage.cpu)));
            let mut ratios: Vec<f64> = rounds.iter().map(|round| of(round).ratio(|one| one.together)).collect();
            let [quarter, half, three] = [0.25, 0.5, 0.75].map(|share| quantile(&mut ratios, share));
            let (quarter, three) = (rounded(quarter), rounded(three));
            section.judge(
                format!("{what} ({cost} s per GiB; half of the ratios from {quarter} to {three})"),
                half,
                "× the one that syncs together",
                Goal::AtMost(1.5),
            );
        }
        for (what, of) in tiers {
            section.tell(what, median(&|round| of(round).ratio(|one| one.each)), "× the one that syncs each");
        }
        let crowded = median(&|round| round.crowded_edge.ratio(|one| one.together));
        section.tell(
            "an edge that has the node and the root on the same cores",
            crowded,
            "× the one that syncs together",
        );
        let peak = rounds.iter().map(|round| round.edge.usage.peak_bytes).max().unwrap_or(0);
        section.judge("peak memory of the edge", mib(peak), "MiB", Goal::AtMost(128.0));
        Ok(vec![section])
    }

    /// Memory: an edge with many agents, a root with many open segments.
    ///
    /// # Errors
    /// A process fails.
    pub async fn memory(&self) -> Result<Vec<Section>> {
        const AGENTS: u64 = 5000;
        const HOURS: u64 = 50;
        let crowd = Crowd { agents: AGENTS, streams: 1, rate: 2048, time: Duration::from_secs(30) };
        let crowded = crowd::measure(&self.parent, crowd).await?;
        let open = roots::open_segments(&self.parent, HOURS, 16).await?;
        let mut section = Section::new(
            "Memory",
            format!(
                "{AGENTS} agents, each on a connection of its own, write 2 KiB of log a second each and send it every two seconds, for 30 \
                 seconds, to one edge; and batches of {HOURS} different hours come to a root at the same time."
            ),
        );
        section.judge("peak memory of the edge", mib(crowded.edge.peak_bytes), "MiB", Goal::AtMost(512.0));
        section.judge("requests without a good answer", crowded.errors as f64, "", Goal::AtMost(0.0));
        section.tell("sent", mib(crowded.raw), "MiB");
        section.tell("CPU of the edge", 100.0 * crowded.edge.cpu.as_secs_f64() / 30.0, "% of a core");
        section.tell("until a batch is durable at the edge, half of them", crowded.durable_s.0, "s");
        section.tell("… 99 of 100", crowded.durable_s.1, "s");
        section.judge(
            format!("peak memory of a root with {HOURS} open segments"),
            mib(open.peak_bytes),
            "MiB",
            Goal::AtMost(256.0),
        );
        Ok(vec![section])
    }

    /// How long a line takes, on a real HDFS.
    ///
    /// # Errors
    /// A process fails.
    pub async fn latency(&self) -> Result<Vec<Section>> {
        let hdfs = MiniHdfs::start(HdfsOptions::default()).await?;
        let measured = latency::measure(&self.parent, hdfs_sink(&hdfs), 10 << 20, Duration::from_secs(30)).await?;
        let mut section = Section::new(
            "Latency",
            "A log grows by 10 MiB a second for 30 seconds; agent, edge, root and a real HDFS on the same cores, all with their defaults \
             (`commit_interval` 1 s). Edge and root are asked every 5 ms what they have.",
        );
        section.tell("written → durable in the edge's spool, half of the lines", measured.durable_s.0, "s");
        section.tell("… 99 of 100", measured.durable_s.1, "s");
        section.tell("written → committed on HDFS, half of the lines", measured.committed_s.0, "s");
        section.judge("… 99 of 100", measured.committed_s.1, "s", Goal::AtMost(2.0));
        Ok(vec![section])
    }

    /// How soon a lane with much that is not published is served again.
    ///
    /// # Errors
    /// A process fails.
    pub async fn recovery(&self) -> Result<Vec<Section>> {
        const SEGMENTS: u64 = 24;
        const SEGMENT_MIB: u64 = 256;
        let hdfs = MiniHdfs::start(HdfsOptions::default()).await?;
        let recovered = roots::recovery(&self.parent, hdfs_sink(&hdfs), SEGMENTS, SEGMENT_MIB).await?;
        let mut section = Section::new(
            "Recovery",
            format!(
                "A lane has {} MiB in {SEGMENTS} unpublished segments of {SEGMENT_MIB} MiB on a real HDFS; its root is killed and started again.",
                rounded(mib(recovered.unpublished))
            ),
        );
        section.judge(
            "until it serves the lane, from when its leases are recovered",
            recovered.after_leases.as_secs_f64(),
            "s",
            Goal::AtMost(5.0),
        );
        section.tell(
            "until then from its start, with the leases and the test of the sink before",
            recovered.serving_after.as_secs_f64(),
            "s",
        );
        section.tell("CPU until then", recovered.usage.cpu.as_secs_f64(), "s");
        section.tell("peak memory", mib(recovered.usage.peak_bytes), "MiB");
        Ok(vec![section])
    }

    /// How cost grows; plots are written to `parent`.
    ///
    /// # Errors
    /// A process fails, or a plot can't be written.
    pub async fn growth(&self) -> Result<Vec<Section>> {
        const PIECE: u64 = 512 << 20;
        let mut section = Section::new(
            "How cost grows",
            "CPU seconds per GiB of log, and the most memory: of edge and root against the number of agents (2 KiB a second each) and of \
             streams (batches of 2 KiB of log), of the agent against the length of lines, of all three against the size of batches.",
        );
        let log = tempfile::NamedTempFile::new_in(&self.logs)?;
        write_log(log.path(), PIECE)?;
        let parent = &self.parent;
        let grown = [
            ("agents", "agents", growth::agents(parent, &[1, 50, 500, 5000]).await?),
            ("streams", "streams", growth::streams(parent, &[1, 100, 10_000, 100_000]).await?),
            (
                "lines",
                "bytes of a line",
                growth::line_lengths(parent, &self.logs, &[50, 200, 1000, 10_000], PIECE).await?,
            ),
            (
                "batches",
                "KiB of log in a batch",
                growth::batch_sizes(parent, log.path(), &[64, 256, 1024, 4096]).await?,
            ),
        ];
        for (name, what, curves) in grown {
            plots::draw(&parent.join(format!("{name}.svg")), what, &curves)?;
            let mut rows = vec![vec![what.to_owned()]];
            let xs = curves.first().map(|curve| &curve.points).into_iter().flatten();
            rows[0].extend(xs.map(|point| point.0.to_string()));
            for curve in &curves {
                let row = |what: &str, value: fn(&(f64, f64, f64)) -> f64| {
                    let values = curve.points.iter().map(|point| rounded(value(point)));
                    std::iter::once(format!("{}, {what}", curve.name)).chain(values).collect()
                };
                rows.push(row("CPU s per GiB", |point| point.1));
                rows.push(row("memory, MiB", |point| point.2));
            }
            section.add(&format!("{}\n![{name}]({name}.svg)\n\n", table(&rows)));
        }
        Ok(vec![section])
    }

    /// Real logs of several kinds.
    ///
    /// # Errors
    /// HDFS can't be started, or a log can't be read.
    pub async fn corpora(&self) -> Result<Vec<Section>> {
        let mut section = Section::new(
            "Real logs",
            "What an agent's worker does with a batch (find the lines, read their times, compress, frame), beside the compressor alone, on one \
             thread and in memory, batch by batch in turn. Each log is repeated up to 256 MiB.",
        );
        section.add(&corpora::markdown(&corpora::measure().await?));
        Ok(vec![section])
    }

    /// How well an agent keeps to its `bytes_per_second`.
    ///
    /// # Errors
    /// A process fails.
    pub async fn rate(&self) -> Result<Vec<Section>> {
        const RATE: u64 = 2 << 20;
        let log = tempfile::NamedTempFile::new_in(&self.logs)?;
        write_log(log.path(), 256 << 20)?;
        let options = PathOptions { bytes_per_second: Some(RATE), ..PathOptions::default() };
        let shipped = ship(log.path(), &self.parent, &options).await?;
        let mut section =
            Section::new("Slow networks", "An agent whose `bytes_per_second` is 2 MiB ships 256 MiB of log.");
        let speed = shipped.wire as f64 / shipped.elapsed.as_secs_f64();
        section.judge("bytes on the wire per second", speed / RATE as f64, "× `bytes_per_second`", Goal::AtMost(1.0));
        section.tell("bytes on the wire", shipped.wire as f64 / shipped.raw as f64, "per byte of log");
        Ok(vec![section])
    }

    /// Writes the report of these sections to `report.md` below `parent`; returns where it is.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write_report(&self, sections: &[Section]) -> Result<PathBuf> {
        let mut text = format!("# Benchmarks\n\n{}.\n\n", crate::machine::machine());
        text += &sections.iter().map(Section::markdown).collect::<Vec<_>>().join("\n");
        let path = self.parent.join("report.md");
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }
}

fn hdfs_sink(hdfs: &MiniHdfs) -> Sink {
    Sink::Hdfs { uri: hdfs.uri(), webhdfs: hdfs.webhdfs().clone(), path: "/bench".into() }
}

fn judge_speed(section: &mut Section, shipped: &Shipped, how: &str, times_peers: f64) {
    let goal = Goal::AtLeast(times_peers * PEERS_BEST_SPEED);
    section.judge(format!("speed until all is committed, {how}"), shipped.speed(), "MiB/s", goal);
    section.tell(format!("speed until the edge has all, {how}"), shipped.agent_speed(), "MiB/s");
}

/// What each of the three used.
fn parts(shipped: &Shipped) -> String {
    let mut rows = vec![vec!["".to_owned(), "CPU s per GiB of log".to_owned(), "peak memory, MiB".to_owned()]];
    for (name, usage) in [("agent", shipped.agent), ("edge", shipped.edge), ("root", shipped.root)] {
        let cpu = usage.cpu.as_secs_f64() / gib(shipped.raw);
        rows.push(vec![name.to_owned(), rounded(cpu), rounded(mib(usage.peak_bytes))]);
    }
    table(&rows)
}
