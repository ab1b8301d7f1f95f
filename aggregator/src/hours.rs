//! The commands about hours: how each one stands, and to wait until one is complete.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Subcommand};
use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;
use tributary_common::bucket::{Bucket, BucketSize};
use tributary_common::config::{nearest, show_duration};
use tributary_common::exit::{Exit, UsageError};
use tributary_common::ids::{CategoryName, LaneId};
use tributary_common::messages::STATUS_PATH;

mod table;

use self::table::{Hour, Key, LaneStatus, Late, OnSink, Table, Unpublished, key_of, lanes_of};
use crate::agents::{ask_roots, warn_of};
use crate::config::NodeConfig;
use crate::dfs::{Dfs, DfsError, DfsPath};
use crate::node::open_sink;
use crate::published::{self, AskedHour, HourDir, parse_hour, parse_moment};
use crate::root::hours::{
    FormError, LATE_DIR, MANIFEST_FILE, Manifest, lane_of_seal_file, late_manifest_file, read_form,
};
use crate::root::ledger::Seal;
use crate::root::sink::{HourDirs, read_whole};

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
    /// Only published hours that end after this moment: 2026-11-22T20, UTC. A day ago unless said. Open hours are listed in any case.
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
    /// Exit code 0: it is complete, all of it is there (but for what its manifest declares lost). 1: it is not, when the timeout is
    /// over, or that can't be told: try again. 2: it was published without some agents, after give_up_after, and that never
    /// changes: its _PARTIAL.json names them. 64: the topology has no such category, or the category no such hour. 78: the
    /// configuration is wrong, or the sink that it names can't be used.
    ///
    /// It looks at the sink every 5 seconds and needs no root. Hours are published from the one on in which the roots first heard of
    /// the category, those without data, too.
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
        /// The start of the hour, UTC: 2026-11-22T20; 2026-11-22T20:15 of a category with shorter ones, 2026-11-22 of one with days.
        #[arg(long, value_name = "H", value_parser = parse_hour)]
        hour: AskedHour,
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

/// Runs the command.
///
/// # Errors
/// When the configuration or the command line is wrong, the sink can't be read, or nothing can be written.
pub async fn run(options: &Options, out: &mut impl Write) -> anyhow::Result<Exit> {
    if let Some(Wait::Wait { config, category, hour, timeout, partial }) = &options.command {
        let config = NodeConfig::load(config)?;
        let bucket = bucket_asked_for(&config, category, *hour)?;
        let will_do = if *partial { WillDo::Partial } else { WillDo::Complete };
        return wait(&config, category, bucket, *timeout, will_do, out).await;
    }
    let file = options.config.as_ref().context("--config FILE is missing")?;
    let config = NodeConfig::load(file)?;
    let since_s = options.since.unwrap_or_else(|| (Timestamp::now() - DEFAULT_SINCE).as_second());
    let Some(dfs) = sink_of(&config).await else { return Ok(Exit::Config) };
    let categories = categories_asked_for(&*dfs, &config, options.category.as_ref()).await?;
    // The roots first: an hour that is published in between is then seen twice, and not missed.
    let (answers, mut failed) = ask_roots(&config.topology, |client, node| client.get(node.url(STATUS_PATH))).await?;
    let (lanes, strange) = lanes_of(&answers);
    failed.extend(strange);
    let found = look_at_sink(&*dfs, &categories, &lanes, since_s).await?;
    let table = Table::new(config.topology.lanes(), &lanes, found, options.category.as_ref());
    if options.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&table)?)?;
    } else {
        table.show(out)?;
    }
    let left: Vec<String> = table.lanes_not_asked.iter().map(ToString::to_string).collect();
    warn_of(&left, &failed);
    Ok(if table.is_whole() { Exit::Done } else { Exit::Failed })
}

/// Opens the sink. It says why it can't.
async fn sink_of(config: &NodeConfig) -> Option<Arc<dyn Dfs>> {
    open_sink(config).await.inspect_err(|error| eprintln!("error: {error}")).ok()
}

fn unknown_category(config: &NodeConfig, category: &CategoryName) -> UsageError {
    let known = || config.topology.categories().keys().map(CategoryName::as_str);
    let hint = match nearest(category.as_str(), known()) {
        Some(name) => format!("do you mean {name}?"),
        None => format!("there are {}", known().collect::<Vec<_>>().join(", ")),
    };
    UsageError(format!("the topology has no category {category}: {hint}"))
}

/// The categories to show: those that the sink has, or the one that was asked for. That may have been taken out of the topology, but
/// its hours are still there then.
async fn categories_asked_for(
    dfs: &dyn Dfs,
    config: &NodeConfig,
    asked: Option<&CategoryName>,
) -> anyhow::Result<Vec<CategoryName>> {
    let there = || published::categories(dfs);
    match asked {
        None => there().await,
        Some(category) => {
            if !config.topology.categories().contains_key(category) && !there().await?.contains(category) {
                return Err(unknown_category(config, category).into());
            }
            Ok(vec![category.clone()])
        }
    }
}

/// Where an hour lies.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    visible: DfsPath,
    hidden: DfsPath,
    /// Whether it is, or may be, put together there.
    may_be_hidden: bool,
}

/// Reads the hours of some categories that lie on the sink: published ones that end after `since_s`; those that are being put
/// together; and those that lanes call open, however old.
async fn look_at_sink(
    dfs: &dyn Dfs,
    categories: &[CategoryName],
    lanes: &BTreeMap<LaneId, LaneStatus>,
    since_s: i64,
) -> anyhow::Result<OnSink> {
    let mut places: BTreeMap<Key, Place> = BTreeMap::new();
    for category in categories {
        for dir in published::hours_that_may_end_after(dfs, category, since_s).await? {
            let (key, place) = place_of(&dir);
            // Both may have been there, one after the other, while the directory was read.
            places.entry(key).and_modify(|known| known.may_be_hidden |= place.may_be_hidden).or_insert(place);
        }
    }
    for (category, open) in lanes.values().flat_map(|lane| &lane.open_hours) {
        for hour in open.hours.iter().filter(|_| categories.contains(category)) {
            let (Some(key), Some(bucket)) = (key_of(category, hour), hour.bucket()) else { continue };
            if bucket.end_ms() <= since_s.saturating_mul(1000) {
                let HourDirs { visible, hidden, .. } = HourDirs::new(category, bucket);
                places.entry(key).or_insert(Place { visible, hidden, may_be_hidden: true });
            }
        }
    }
    let mut found = OnSink::default();
    for (key, place) in places {
        // Before it is looked for where readers see it: it may be published in between.
        if place.may_be_hidden
            && let Some(hour) = read_hidden(dfs, &place.hidden).await?
        {
            found.unpublished.insert(key.clone(), hour);
        }
        if let Some(hour) = read_published(dfs, &key, &place.visible).await? {
            let ended = hour.bucket_size_s.is_some_and(|size| hour.bucket_start_s + i64::from(size) <= since_s);
            found.published.insert(key, Some(hour).filter(|_| !ended));
        }
    }
    Ok(found)
}

fn place_of(dir: &HourDir) -> (Key, Place) {
    let (visible, hidden) = dir.visible_and_hidden();
    let key = (dir.category.clone(), dir.start_s, visible.as_str().to_owned());
    (key, Place { visible, hidden, may_be_hidden: !dir.published })
}

/// The seals in the directory of an hour that is being put together; none when there is no such directory.
async fn read_hidden(dfs: &dyn Dfs, dir: &DfsPath) -> anyhow::Result<Option<Unpublished>> {
    let Some(entries) = dfs.list(dir).await? else { return Ok(None) };
    let mut hour = Unpublished::default();
    for name in entries.into_iter().map(|entry| entry.name).filter(|name| lane_of_seal_file(name).is_some()) {
        match read_file::<Seal>(dfs, &dir.join(&name)).await {
            Ok(seal) => hour.seals.push(seal),
            // It was published meanwhile.
            Err(ReadError::Sink(DfsError::NotFound { .. })) => {}
            Err(error) => add_problem(&mut hour.problem, &name, &error),
        }
    }
    Ok(Some(hour))
}

/// An hour that readers see; none where there is nothing.
async fn read_published(dfs: &dyn Dfs, key: &Key, dir: &DfsPath) -> anyhow::Result<Option<Hour>> {
    let (late, size_s, problem) = read_late(dfs, &dir.join(LATE_DIR)).await?;
    let mut hour = match read_file::<Manifest>(dfs, &dir.join(MANIFEST_FILE)).await {
        Ok(manifest) => Hour::published(key, &manifest),
        // A day's directory that only holds hours is none itself, and retention may have left nothing but late files.
        Err(ReadError::Sink(DfsError::NotFound { .. })) if late.files == 0 => return Ok(None),
        Err(ReadError::Sink(DfsError::NotFound { .. })) => Hour::late(key, size_s),
        Err(error) => Hour::unreadable(key, format!("{MANIFEST_FILE}: {error}")),
    };
    hour.late = late;
    if hour.problem.is_none() {
        hour.problem = problem;
    }
    Ok(Some(hour))
}

/// What lies in a directory of late files, the size of their hour by their manifests, and what can't be read.
async fn read_late(dfs: &dyn Dfs, dir: &DfsPath) -> anyhow::Result<(Late, Option<u32>, Option<String>)> {
    let (mut late, mut size_s, mut problem) = (Late::default(), None, None);
    // A manifest is there before its file: one without is on its way.
    let is_data = |name: &String| !name.starts_with(['_', '.']);
    for name in dfs.list(dir).await?.unwrap_or_default().into_iter().map(|entry| entry.name).filter(is_data) {
        late.files += 1;
        let form = late_manifest_file(&name);
        match read_file::<Manifest>(dfs, &dir.join(&form)).await {
            Ok(manifest) => {
                late.records += manifest.records;
                late.bytes += manifest.bytes;
                size_s = Some(manifest.bucket_size_s);
            }
            Err(error) => add_problem(&mut problem, &format!("{LATE_DIR}/{form}"), &error),
        }
    }
    Ok((late, size_s, problem))
}

fn add_problem(problem: &mut Option<String>, file: &str, error: &ReadError) {
    let text = format!("{file}: {error}");
    *problem = Some(problem.take().map_or_else(|| text.clone(), |before| format!("{before}; {text}")));
}

/// A manifest or seal can't be had.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    Sink(#[from] DfsError),
    #[error(transparent)]
    Form(#[from] FormError),
}

async fn read_file<Form: serde::de::DeserializeOwned>(dfs: &dyn Dfs, path: &DfsPath) -> Result<Form, ReadError> {
    Ok(read_form(&read_whole(dfs, path).await?)?)
}

/// The bucket that `hours wait` is to wait for.
fn bucket_asked_for(config: &NodeConfig, category: &CategoryName, asked: AskedHour) -> Result<Bucket, UsageError> {
    let settings = config.topology.categories().get(category).ok_or_else(|| unknown_category(config, category))?;
    hour_of(category, settings.bucket, asked)
}

fn hour_of(category: &CategoryName, size: BucketSize, asked: AskedHour) -> Result<Bucket, UsageError> {
    let bucket = size.bucket_of_ms(asked.start_s.saturating_mul(1000));
    let length = show_duration(Duration::from_secs(u64::from(size.seconds())));
    if bucket.start_s() != asked.start_s {
        return Err(UsageError(format!(
            "no hour of {category} begins at that time: they are {length} long, and the one that holds it begins at {bucket}"
        )));
    }
    if asked.span_s > size.seconds() {
        return Err(UsageError(format!(
            "the hours of {category} are {length} long, and several begin in that time: name one by its start, as in {bucket}"
        )));
    }
    Ok(bucket)
}

/// Which hours are waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WillDo {
    /// Only complete ones.
    Complete,
    /// Also partial ones.
    Partial,
}

/// How to end where an hour with this manifest is there in the place of `bucket`, and what to say.
fn judge(dir: &DfsPath, bucket: Bucket, manifest: &Manifest, will_do: WillDo) -> (Exit, String) {
    let Manifest { records, files, losses, missing, .. } = manifest;
    let is_asked_for = (bucket.start_s(), bucket.size().seconds()) == (manifest.bucket_start_s, manifest.bucket_size_s);
    if !is_asked_for {
        let length = show_duration(Duration::from_secs(u64::from(manifest.bucket_size_s)));
        let text = format!(
            "{dir} is {length} long, of before the category's hours got another length: what else belongs to the time that was asked for \
             lies beside it; tributary-aggregator hours shows where"
        );
        return (Exit::Usage, text);
    }
    if !manifest.complete && will_do == WillDo::Complete {
        let text = format!("{dir} was published without {} agents; it will never be complete", missing.len());
        return (Exit::Partial, text);
    }
    let lost = if losses.is_empty() { String::new() } else { format!("; {} losses are declared", losses.len()) };
    (Exit::Done, format!("{dir}: {records} records in {} files{lost}", files.len()))
}

async fn wait(
    config: &NodeConfig,
    category: &CategoryName,
    bucket: Bucket,
    timeout: Option<Duration>,
    will_do: WillDo,
    out: &mut impl Write,
) -> anyhow::Result<Exit> {
    let dir = HourDirs::new(category, bucket).visible;
    let path = dir.join(MANIFEST_FILE);
    let Some(dfs) = sink_of(config).await else { return Ok(Exit::Config) };
    let end = timeout.map(|timeout| Instant::now() + timeout);
    loop {
        match read_file::<Manifest>(&*dfs, &path).await {
            Ok(manifest) => {
                let (exit, text) = judge(&dir, bucket, &manifest, will_do);
                writeln!(out, "{text}")?;
                return Ok(exit);
            }
            Err(ReadError::Sink(DfsError::NotFound { .. })) => {}
            // A published hour doesn't change, and so it will stay.
            Err(ReadError::Form(error)) => return Err(error).with_context(|| path.to_string()),
            // A sink that restarts is no reason to give up.
            Err(ReadError::Sink(error)) => eprintln!("warning: {error}; looking again"),
        }
        let now = Instant::now();
        if end.is_some_and(|end| end <= now) {
            writeln!(out, "{dir} is not complete; tributary-aggregator hours says whom it waits for")?;
            return Ok(Exit::Failed);
        }
        let next = now + LOOK_INTERVAL;
        tokio::time::sleep_until(end.map_or(next, |end| end.min(next))).await;
    }
}

#[cfg(test)]
mod tests;
