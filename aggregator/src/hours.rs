//! The commands about hours: how each one stands, and to wait until one is complete.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Subcommand};
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use serde_json::Value;
use tokio::time::Instant;
use tributary_common::bucket::BucketSize;
use tributary_common::ids::CategoryName;
use tributary_common::messages::STATUS_PATH;
use tributary_common::topology::Topology;

use crate::agents::{ago, ask_roots, lanes_left, moment, warn_of};
use crate::config::NodeConfig;
use crate::dfs::{Dfs, DfsPath};
use crate::node::open_sink;
use crate::published::{self, HourDir, parse_moment};
use crate::root::hours::{LATE_DIR, MANIFEST_FILE, Manifest};
use crate::root::sink::read_whole;

/// What is listed unless it is said since when.
const DEFAULT_SINCE: SignedDuration = SignedDuration::from_hours(24);

/// How often the sink is looked at for an hour: one or two calls to the NameNode each time.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// `hours`, or `hours wait`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Options {
    /// The configuration of any node: its topology says where the roots and the sink are.
    #[arg(long, value_name = "FILE", required = true)]
    config: Option<PathBuf>,
    /// Only this category.
    #[arg(long)]
    category: Option<CategoryName>,
    /// Only hours that begin at this moment or later: 2026-11-22T20, UTC. A day ago unless said.
    #[arg(long, value_name = "T", value_parser = parse_moment)]
    since: Option<i64>,
    /// As JSON, for programs.
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    command: Option<Wait>,
}

/// `hours wait`.
#[derive(Debug, Subcommand)]
pub enum Wait {
    /// Wait until an hour is complete: for cron and workflow schedulers.
    ///
    /// Exit code 0: it is complete, and all of it is there. 1: it is not, when the timeout is over; or it was published without
    /// some agents (on_missing = "publish"), which never changes: see its _PARTIAL.json. It looks at the sink every 5 seconds and
    /// needs no root. Hours are published from the first one on in which the category had data, those without data, too.
    #[command(
        after_help = "Example:\n  tributary-aggregator hours wait --config /etc/tributary/aggregator.toml \\\n    \
            --category nginx-access --hour 2026-11-22T20 --timeout 2h && run-the-job"
    )]
    Wait {
        /// The configuration of any node: its topology says where the sink is.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// The category.
        #[arg(long)]
        category: CategoryName,
        /// The hour that holds this moment: 2026-11-22T20, UTC.
        #[arg(long, value_name = "H", value_parser = parse_moment)]
        hour: i64,
        /// How long to wait, such as 90s, 2h. For ever unless said.
        #[arg(long, value_name = "TIME", value_parser = parse_time)]
        timeout: Option<Duration>,
        /// An hour that was published without some agents will do, too.
        #[arg(long)]
        partial: bool,
    },
}

fn parse_time(text: &str) -> Result<Duration, String> {
    let span: SignedDuration = text.parse().map_err(|error| format!("{error}: write 90s, 10m or 2h"))?;
    Duration::try_from(span).map_err(|_| "a time to wait is not negative".into())
}

/// How an hour stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// Published, with all of every agent.
    Complete,
    /// Published without some agents.
    Partial,
    /// It is not over, or agents are waited for, or it is being put together.
    Open,
}

/// An hour of a category.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Hour {
    category: CategoryName,
    bucket_start_s: i64,
    bucket_size_s: u32,
    state: State,
    /// Data that came when it was published, beside it.
    late_files: usize,
    records: u64,
    bytes: u64,
    /// None while it is open: what it has then is joined before it is published.
    files: Option<usize>,
    /// The agents that it waits for; of a partial one, those that it lacks.
    waiting_for: u64,
    /// Some of them.
    agents: Vec<Agent>,
}

/// An agent that an hour waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Agent {
    agent: String,
    host: String,
    /// How far its word lies before the end of the hour; none if it gave none.
    behind_ms: Option<i64>,
    reason: String,
}

/// Runs the command. Returns whether all was well: everything could be asked; or the hour is complete.
///
/// # Errors
/// When the configuration is wrong, the sink can't be read, or nothing can be written.
pub async fn run(options: &Options, out: &mut impl Write) -> anyhow::Result<bool> {
    if let Some(Wait::Wait { config, category, hour, timeout, partial }) = &options.command {
        return wait(&NodeConfig::load(config)?, category, *hour, *timeout, *partial, out).await;
    }
    let file = options.config.as_ref().context("--config FILE is missing")?;
    let config = NodeConfig::load(file)?;
    let since = options.since.unwrap_or_else(|| (Timestamp::now() - DEFAULT_SINCE).as_second());
    let dfs = open_sink(&config).await?;
    let mut hours = closed(&*dfs, options.category.as_ref(), since).await?;
    let (open, left, failed) = open(&config.topology).await?;
    for hour in open {
        let wanted = options.category.as_ref().is_none_or(|category| *category == hour.category);
        if wanted && hour.bucket_start_s >= since {
            // One that is published is what readers see, whatever a root still has of it.
            hours.entry((hour.category.clone(), hour.bucket_start_s)).or_insert(hour);
        }
    }
    if options.json {
        let hours: Vec<_> = hours.values().collect();
        writeln!(out, "{:#}", serde_json::json!({ "hours": hours, "lanes_not_asked": left }))?;
    } else {
        show(&hours, out)?;
    }
    warn_of(&left, &failed);
    Ok(left.is_empty())
}

type Hours = BTreeMap<(CategoryName, i64), Hour>;

fn show(hours: &Hours, out: &mut impl Write) -> std::io::Result<()> {
    writeln!(
        out,
        "{:<20} {:<17} {:<8} {:>12} {:>15} {:>6} {:>5}  waits for",
        "CATEGORY", "HOUR", "STATE", "RECORDS", "BYTES", "FILES", "LATE"
    )?;
    for hour in hours.values() {
        let state = match hour.state {
            State::Complete => "complete",
            State::Partial => "partial",
            State::Open => "open",
        };
        let start = moment(hour.bucket_start_s * 1000);
        let files = hour.files.map_or_else(|| "-".into(), |files| files.to_string());
        let mut agents: Vec<String> = hour
            .agents
            .iter()
            .take(5)
            .map(|agent| {
                let behind = agent.behind_ms.map_or_else(|| "silent".into(), |ms| format!("{} behind", ago(ms)));
                let reason = if agent.reason.is_empty() { String::new() } else { format!(": {}", agent.reason) };
                format!("{} ({behind}{reason})", agent.host)
            })
            .collect();
        if hour.waiting_for > agents.len() as u64 {
            agents.push(format!("{} more", hour.waiting_for - agents.len() as u64));
        }
        writeln!(
            out,
            "{:<20} {:<17} {state:<8} {:>12} {:>15} {files:>6} {:>5}  {}",
            hour.category,
            start.get(..16).unwrap_or(&start),
            hour.records,
            hour.bytes,
            hour.late_files,
            agents.join(", ")
        )?;
    }
    Ok(())
}

/// The hours that readers see.
async fn closed(dfs: &dyn Dfs, category: Option<&CategoryName>, since_s: i64) -> anyhow::Result<Hours> {
    let categories = match category {
        Some(category) => vec![category.clone()],
        None => published::categories(dfs).await?,
    };
    let mut hours = Hours::new();
    for category in categories {
        for dir in published::hours(dfs, &category, since_s).await? {
            if let Some(hour) = read(dfs, &dir).await? {
                hours.insert((category.clone(), hour.bucket_start_s), hour);
            }
        }
    }
    Ok(hours)
}

async fn read(dfs: &dyn Dfs, dir: &HourDir) -> anyhow::Result<Option<Hour>> {
    if !dir.published {
        return Ok(None);
    }
    // A day's directory that only holds hours is none itself.
    let Some(manifest) = manifest(dfs, &dir.path).await? else { return Ok(None) };
    let late = dfs.list(&dir.path.join(LATE_DIR)).await?.unwrap_or_default();
    let agents: Vec<Agent> = manifest
        .missing
        .iter()
        .map(|one| Agent {
            agent: one.agent.to_string(),
            host: one.host.clone(),
            behind_ms: one.watermark_ms.map(|watermark| behind(&manifest, watermark)),
            reason: String::new(),
        })
        .collect();
    Ok(Some(Hour {
        category: manifest.category.clone(),
        bucket_start_s: manifest.bucket_start_s,
        bucket_size_s: manifest.bucket_size_s,
        state: if manifest.complete { State::Complete } else { State::Partial },
        late_files: late.iter().filter(|entry| !entry.name.ends_with(".json")).count(),
        records: manifest.records,
        bytes: manifest.bytes,
        files: Some(manifest.files.len()),
        waiting_for: agents.len() as u64,
        agents,
    }))
}

fn behind(manifest: &Manifest, watermark_ms: i64) -> i64 {
    let end_ms = (manifest.bucket_start_s + i64::from(manifest.bucket_size_s)) * 1000;
    (end_ms - watermark_ms).max(0)
}

async fn manifest(dfs: &dyn Dfs, dir: &DfsPath) -> anyhow::Result<Option<Manifest>> {
    let path = dir.join(MANIFEST_FILE);
    if dfs.stat(&path).await?.is_none() {
        return Ok(None);
    }
    let bytes = read_whole(dfs, &path).await?;
    let parsed = serde_json::from_slice(&bytes);
    parsed.map(Some).with_context(|| {
        format!("{path} is not a manifest that this program knows; tributary-aggregator audit says more")
    })
}

/// The open hours of all lanes, the lanes that nobody answered for, and what went wrong.
async fn open(topology: &Topology) -> anyhow::Result<(Vec<Hour>, Vec<String>, Vec<String>)> {
    let (answers, failed) = ask_roots(topology, |client, node| client.get(node.url(STATUS_PATH))).await?;
    let (mut lanes, mut hours) = (BTreeSet::new(), Hours::new());
    for (lane, status) in answers.iter().filter_map(|answer| answer["lanes"].as_object()).flatten() {
        let Some(categories) = status["open_hours"].as_object() else { continue };
        if !lanes.insert(lane.clone()) {
            continue;
        }
        for (category, open) in categories {
            for hour in open.as_array().into_iter().flatten() {
                let category: CategoryName = category.parse().context("a root names a category that can't be one")?;
                add(&mut hours, category, hour).context("a root answers in a form that this program doesn't know")?;
            }
        }
    }
    let left = lanes_left(topology, &lanes);
    Ok((hours.into_values().collect(), left, failed))
}

/// Adds what one lane has of an hour.
fn add(hours: &mut Hours, category: CategoryName, of_lane: &Value) -> Option<()> {
    let start_s = of_lane["bucket_start_s"].as_i64()?;
    let size_s = u32::try_from(of_lane["bucket_size_s"].as_u64()?).ok()?;
    let hour = hours.entry((category.clone(), start_s)).or_insert_with(|| Hour {
        category,
        bucket_start_s: start_s,
        bucket_size_s: size_s,
        state: State::Open,
        late_files: 0,
        records: 0,
        bytes: 0,
        files: None,
        waiting_for: 0,
        agents: Vec::new(),
    });
    hour.records += of_lane["records"].as_u64()?;
    hour.bytes += of_lane["bytes"].as_u64()?;
    // An hour that is not over waits for time, not for agents.
    if of_lane["over"].as_bool()? {
        hour.waiting_for += of_lane["waiting_for"].as_u64()?;
        hour.agents.extend(of_lane["agents"].as_array()?.iter().map(|agent| Agent {
            agent: agent["agent"].as_str().unwrap_or_default().into(),
            host: agent["host"].as_str().unwrap_or_default().into(),
            behind_ms: agent["behind_ms"].as_i64(),
            reason: agent["reason"].as_str().unwrap_or_default().into(),
        }));
    }
    Some(())
}

async fn wait(
    config: &NodeConfig,
    category: &CategoryName,
    moment_s: i64,
    timeout: Option<Duration>,
    partial: bool,
    out: &mut impl Write,
) -> anyhow::Result<bool> {
    let settings = config.topology.categories().get(category);
    let size: BucketSize = settings.with_context(|| format!("the topology has no category {category}"))?.bucket;
    let bucket = size.bucket_of_ms(moment_s.saturating_mul(1000));
    let parent = DfsPath::base().join(category.as_str());
    let parent = bucket.parent_dir().map_or_else(|| parent.clone(), |day| parent.join(day));
    let dir = parent.join(bucket.dir_name());
    let dfs = open_sink(config).await?;
    let end = timeout.map(|timeout| Instant::now() + timeout);
    loop {
        match manifest(&*dfs, &dir).await {
            Ok(Some(manifest)) if manifest.complete || partial => {
                writeln!(out, "{dir}: {} records in {} files", manifest.records, manifest.files.len())?;
                return Ok(true);
            }
            Ok(Some(manifest)) => {
                writeln!(
                    out,
                    "{dir} was published without {} agents; it will never be complete",
                    manifest.missing.len()
                )?;
                return Ok(false);
            }
            Ok(None) => {}
            // A sink that restarts is no reason to give up.
            Err(error) => eprintln!("warning: {error:#}; looking again"),
        }
        let now = Instant::now();
        if end.is_some_and(|end| end <= now) {
            writeln!(out, "{dir} is not complete; tributary-aggregator hours says whom it waits for")?;
            return Ok(false);
        }
        let next = now + LOOK_INTERVAL;
        tokio::time::sleep_until(end.map_or(next, |end| end.min(next))).await;
    }
}
