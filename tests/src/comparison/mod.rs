//! The classic ways from a hundred servers' logs into HDFS, beside Tributary: at the same time, over the same lines, into the same
//! real HDFS, with the same machines lost at the same moments.
//!
//! | | |
//! |---|---|
//! | (a) `cron` | an upload per server and hour |
//! | (b) `direct` | an HDFS writer per server |
//! | (c) `collector` | four collectors, a new file every five minutes or 128 MiB |
//! | (d) `tributary` | this |
//!
//! **A minute stands for an hour.** What in production is measured against the hour is scaled with it: the length of a collector's
//! files, the spread of cron jobs, how long an hour waits for a server that is gone. What is not: how often lines are made durable,
//! and what the roots do every so many seconds in their own directories. So a file of the run holds a sixtieth of the lines that it
//! would hold at these rates, which is the same for all four.
//!
//! **Losing a server** ends its writing, then all that ships its log (its cron job, its HDFS writer, its sender, its agent by
//! SIGKILL), and deletes its disk. It never comes back. **Killing a node** ends one collector in the middle of what it does, and one
//! root by SIGKILL; both are started again after the same pause with what is on their disks. (a) and (b) have no such node.
//!
//! (a), (b) and (c) are tasks of this process that write with the HDFS client of the roots, each machine with a connection and
//! leases of its own. (d) is the programs themselves.
//!
//! At the end whatever an operator would do for (b) and (c) is done: the leases of files that nobody closed are recovered, and the
//! `.tmp` is taken off the names. Then the figures are read from HDFS.

mod collector;
mod cron;
mod direct;
pub mod figures;
pub mod plan;
pub mod servers;
mod table;
mod tributary;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::time::{Instant, sleep, sleep_until};
use tributary_aggregator::dfs::{CreateOptions, Dfs, DfsOptions, DfsPath, Recovered, open_dfs};

use crate::cluster::{Cluster, Role};
use crate::hdfs::{HdfsOptions, MiniHdfs};
use crate::wait::until;
use collector::{Collectors, TEMPORARY};
use cron::Cron;
use direct::Direct;
use figures::{Figures, Input, Records};
use plan::Plan;
use servers::{Hour, Server, Servers};

/// What stands for an hour.
pub const HOUR: Duration = Duration::from_secs(60);

const CRON: &str = "cron";
const DIRECT: &str = "direct";
const COLLECTOR: &str = "collector";
const TRIBUTARY: &str = "tributary";

/// As by default in HDFS.
const NEW_FILE: CreateOptions =
    CreateOptions { block_size: 128 << 20, replication: None, sync_timeout: Duration::from_secs(20) };
/// The most that is read of a log at a time.
const READ_BYTES: usize = 128 << 10;
/// The least time between the start of the senders and the first line.
const BEFORE_THE_FIRST_HOUR: Duration = Duration::from_secs(3);
/// How long a killed node is down.
const DOWN: Duration = Duration::from_secs(3);
/// Asked more often, HDFS begins the recovery anew.
const RECOVERY_PAUSE: Duration = Duration::from_secs(4);
/// Only turns a hang into a failure.
const LIMIT: Duration = Duration::from_secs(300);

/// What to compare.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// How many servers.
    pub servers: usize,
    /// How many hours (minutes of the run).
    pub hours: u32,
    /// Lines a second that a server writes in the mean.
    pub lines_per_second: f64,
    /// Of the rates and the kills.
    pub seed: u64,
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// What was compared.
    pub options: Options,
    /// Each server at the end.
    pub servers: Vec<Server>,
    /// (a)
    pub cron: Figures,
    /// (b)
    pub direct: Figures,
    /// (c)
    pub collector: Figures,
    /// (d)
    pub tributary: Figures,
}

/// A folder of the HDFS, for clients of their own.
#[derive(Clone, Debug)]
struct Target(String);

impl Target {
    fn new(hdfs: &MiniHdfs, name: &str) -> Self {
        Self(format!("{}/{name}", hdfs.uri()))
    }

    async fn open(&self) -> Result<Arc<dyn Dfs>> {
        Ok(open_dfs(&self.0, &DfsOptions::default()).await?)
    }
}

/// Compares. `say` is told what is done.
///
/// # Errors
/// The HDFS or the tree doesn't come up, a process ends by itself, or something can't be read. That lines are lost or doubled is a
/// figure, not an error.
pub async fn run(options: Options, say: impl Fn(&str)) -> Result<Comparison> {
    let plan = Plan::new(&options);
    let hdfs = MiniHdfs::start(HdfsOptions::default()).await?;
    let mut cluster = tributary::start(&hdfs, TRIBUTARY, options.servers).await?;
    let outcome = compare(options, &plan, &hdfs, &mut cluster, say).await;
    cluster.explain(outcome)
}

async fn compare(
    options: Options,
    plan: &Plan,
    hdfs: &MiniHdfs,
    cluster: &mut Cluster,
    say: impl Fn(&str),
) -> Result<Comparison> {
    let folders = (0..options.servers).map(|server| cluster.log_dir(server)).collect();
    let mut first = Hour::now().next();
    if first.begins_in() < BEFORE_THE_FIRST_HOUR {
        first = first.next();
    }
    let begin = Instant::now() + first.begins_in();
    let servers = Servers::start(folders, plan, first, options.hours);
    let mut cron = Cron::start(&servers, &Target::new(hdfs, CRON), first, options.hours, options.seed);
    let mut direct = Direct::start(&servers, &Target::new(hdfs, DIRECT));
    let mut collectors = Collectors::start(&servers, &Target::new(hdfs, COLLECTOR));

    for (at, event) in events(plan) {
        sleep_until(begin + at).await;
        cluster.check_alive()?;
        say(&format!("{:6.1} s: {event:?}", at.as_secs_f64()));
        match event {
            Event::LoseServer(server) => {
                servers.stop(server);
                cron.lose(server);
                direct.lose(server);
                collectors.lose(server);
                let agent = Role::Agent(server);
                cluster.kill9(agent)?;
                servers.destroy_disk(server)?;
                cluster.wipe_state(agent)?;
            }
            Event::KillNode(node) => {
                collectors.kill_node(node % collector::COLLECTORS);
                cluster.kill9(tributary::root(node))?;
            }
            Event::StartNode(node) => {
                collectors.start_node(node % collector::COLLECTORS);
                cluster.start_node(tributary::root(node))?;
            }
        }
    }
    sleep_until(begin + HOUR * options.hours).await;
    say("the day is over");
    let servers = tokio::task::spawn_blocking(move || servers.finish()).await.context("the writer has panicked")??;
    say("waiting for the uploads, the writers and the collectors");
    for (name, failures) in
        [(CRON, cron.finish().await?), (DIRECT, direct.finish().await?), (COLLECTOR, collectors.finish().await?)]
    {
        failures.iter().for_each(|failure| say(&format!("{name}: {failure}")));
        say(&format!("{name}: all is written, after {} errors", failures.len()));
    }
    say(&format!("waiting for Tributary's last hours, which wait {:?} for the lost servers", tributary::GIVE_UP_AFTER));
    tributary::wait_until_published(cluster, hdfs, first, options.hours).await?;
    cluster.stop_all().await?;
    cluster.check_logs()?;
    for name in [DIRECT, COLLECTOR] {
        let closed = close_what_was_left(hdfs, name).await?;
        say(&format!("{name}: {closed} files were left open and have been recovered"));
    }
    figures(options, hdfs, cluster, servers, say).await
}

async fn figures(
    options: Options,
    hdfs: &MiniHdfs,
    cluster: &Cluster,
    servers: Vec<Server>,
    say: impl Fn(&str),
) -> Result<Comparison> {
    let records = Records::read(hdfs).await.context("reading the NameNode's records")?;
    let of = async |name: &str, input: Input| {
        say(&format!("{name}: a MapReduce job reads {} files", input.lengths.len()));
        Figures::of(hdfs, &records, name, &input, &servers).await.with_context(|| format!("the figures of {name}"))
    };
    let cron = of(CRON, Input::all(hdfs, CRON).await?).await?;
    let direct = of(DIRECT, Input::all(hdfs, DIRECT).await?).await?;
    let collector = of(COLLECTOR, Input::all(hdfs, COLLECTOR).await?).await?;
    let tributary = of(TRIBUTARY, Input::published(&cluster.sink(), cluster.category()).await?).await?;
    Ok(Comparison { options, servers, cron, direct, collector, tributary })
}

/// What happens, and when, counted from the first hour's beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    LoseServer(usize),
    KillNode(usize),
    StartNode(usize),
}

fn events(plan: &Plan) -> Vec<(Duration, Event)> {
    let mut events: Vec<_> = plan.lost_servers.iter().map(|(at, server)| (*at, Event::LoseServer(*server))).collect();
    events.push((plan.node_killed, Event::KillNode(plan.node)));
    events.push((plan.node_killed + DOWN, Event::StartNode(plan.node)));
    events.sort();
    events
}

/// Does what an operator does, or HDFS by itself after an hour of a writer's silence: closes the files that nobody closed. Returns
/// how many there were.
async fn close_what_was_left(hdfs: &MiniHdfs, name: &str) -> Result<usize> {
    let dfs = Target::new(hdfs, name).open().await?;
    let base = format!("/{name}/");
    let below = |file: &str| file.strip_prefix(&base).map(|below| DfsPath::base().join(below));
    let open = hdfs.open_files(&base).await?;
    for file in open.iter().filter_map(|file| below(file)) {
        until(format!("{file} to be closed"), LIMIT, async || {
            if let Recovered::Closed { .. } = dfs.recover(&file).await? {
                return Ok(Some(()));
            }
            sleep(RECOVERY_PAUSE).await;
            Ok(None)
        })
        .await?;
    }
    for (file, _) in hdfs.webhdfs().tree(base.trim_end_matches('/')).await? {
        if let Some(file) = below(&file)
            && file.as_str().ends_with(TEMPORARY)
        {
            dfs.rename(&file, &collector::final_name(&file)).await?;
        }
    }
    Ok(open.len())
}
