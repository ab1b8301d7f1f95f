//! Random faults on a whole tree of real processes under load, by a plan that a seed determines; at the end the judge counts every
//! line.
//!
//! The tree: three log writers with rotation, three agents, two edges, a node between, two roots with two lanes, a fault proxy in
//! front of every aggregator, and some states on disks that are small enough to be filled. On HDFS: three DataNodes, three copies.
//!
//! The plan says when each fault begins and ends. What it meets there depends on the machine, so a seed repeats the plan, not the
//! run. Processes that end by themselves, as after a failed sync, are started again, as by a service manager.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use rustix::process::Signal;
use tokio::time::{Instant, sleep_until};

use crate::cluster::{Cluster, ClusterOptions, Role, Sink};
use crate::disk::SmallDisk;
use crate::hdfs::{HdfsOptions, MiniHdfs};
use crate::judge::{Report, Scenario};
use crate::proxy::Fault as NetworkFault;
use crate::readers::Reader;
use crate::scenario;
use crate::watch::Watch;

const AGENTS: usize = 3;
const NODES: [Role; 8] = [
    Role::Agent(0),
    Role::Agent(1),
    Role::Agent(2),
    Role::Edge(0),
    Role::Edge(1),
    Role::Mid(0),
    Role::Root(0),
    Role::Root(1),
];
/// Whose state lies on a small disk, and how many megabytes that has.
const SMALL_DISKS: [(Role, u32); 3] = [(Role::Agent(2), 4), (Role::Edge(1), 24), (Role::Mid(0), 24)];
const DATANODES: usize = 3;
/// How often the processes are looked at.
const LOOK: Duration = Duration::from_millis(250);

/// Which file system the roots write to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SinkKind {
    /// A local folder.
    File,
    /// A real HDFS.
    Hdfs,
}

/// What to do.
#[derive(Clone, Debug)]
pub struct ChaosOptions {
    /// Of the plan.
    pub seed: u64,
    /// How long faults begin. After that they end, and the last minute is waited for.
    pub duration: Duration,
    /// Where the roots write.
    pub sink: SinkKind,
    /// Lines a second, of each writer.
    pub per_second: u32,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// SIGKILL; it is started again at the end.
    Kill {
        /// Which process.
        role: Role,
        /// Whether all that it has on local disk is deleted before it is started.
        wipe: bool,
    },
    /// SIGSTOP; SIGCONT at the end.
    Sleep(Role),
    /// The connections to it.
    Network(Role, NetworkFault),
    /// The disk with its state is full.
    FullDisk(Role),
    /// A DataNode is killed, and started at the end.
    DataNode(usize),
    /// The NameNode is killed, and started at the end.
    NameNode,
    /// The NameNode sleeps.
    SleepingNameNode,
    /// HDFS can't be changed.
    SafeMode,
}

impl What {
    /// What it happens to: one thing at a time happens to each.
    fn target(self) -> String {
        match self {
            Self::Kill { role, .. } | Self::Sleep(role) => role.to_string(),
            Self::Network(role, _) => format!("connections to {role}"),
            Self::FullDisk(role) => format!("disk of {role}"),
            Self::DataNode(_) | Self::NameNode | Self::SleepingNameNode | Self::SafeMode => "hdfs".into(),
        }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill { role, wipe: false } => write!(f, "SIGKILL {role}"),
            Self::Kill { role, wipe: true } => write!(f, "SIGKILL {role} and delete its state"),
            Self::Sleep(role) => write!(f, "SIGSTOP {role}"),
            Self::Network(role, fault) => write!(f, "connections to {role}: {fault:?}"),
            Self::FullDisk(role) => write!(f, "full disk of {role}"),
            Self::DataNode(index) => write!(f, "SIGKILL DataNode {index}"),
            Self::NameNode => f.write_str("SIGKILL NameNode"),
            Self::SleepingNameNode => f.write_str("SIGSTOP NameNode"),
            Self::SafeMode => f.write_str("safe mode"),
        }
    }
}

/// A fault of a plan, with the times at which it begins and ends, from the plan's beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// When it begins.
    pub from: Duration,
    /// When it ends.
    pub until: Duration,
    /// What it is.
    pub what: What,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:7.1} s to {:7.1} s: {}", self.from.as_secs_f64(), self.until.as_secs_f64(), self.what)
    }
}

/// The faults, by the time at which they begin. The same options give the same plan.
#[must_use]
pub fn plan(options: &ChaosOptions) -> Vec<Fault> {
    let mut random = StdRng::seed_from_u64(options.seed);
    let mut busy: BTreeMap<String, Duration> = BTreeMap::new();
    let mut faults = Vec::new();
    let on_hdfs = options.sink == SinkKind::Hdfs;
    let takeover_after = if on_hdfs { 9.0 } else { 4.0 };
    let mut from = Duration::from_secs(2);
    while from < options.duration {
        let aggregator = NODES[random.random_range(AGENTS..NODES.len())];
        let any = NODES[random.random_range(0..NODES.len())];
        let (what, seconds) = match random.random_range(0..if on_hdfs { 14 } else { 10 }) {
            0..=3 => (What::Kill { role: any, wipe: random.random_bool(0.4) }, 0.1..6.0),
            4..=5 => (What::Sleep(any), takeover_after + 2.0..takeover_after + 8.0),
            6..=8 => {
                let fault = match random.random_range(0..5) {
                    0 => NetworkFault::Cut,
                    1 => NetworkFault::CutAfter(random.random_range(1..60_000)),
                    2 => NetworkFault::Delay(Duration::from_millis(random.random_range(20..500))),
                    3 => NetworkFault::Hang,
                    _ => NetworkFault::HalfClose,
                };
                (What::Network(aggregator, fault), 1.0..8.0)
            }
            9 => (What::FullDisk(SMALL_DISKS[random.random_range(0..SMALL_DISKS.len())].0), 3.0..10.0),
            10..=11 => (What::DataNode(random.random_range(0..DATANODES)), 5.0..20.0),
            12 => (if random.random_bool(0.5) { What::NameNode } else { What::SafeMode }, 3.0..10.0),
            _ => (What::SleepingNameNode, 3.0..12.0),
        };
        let until = from + Duration::from_millis((random.random_range(seconds) * 1000.0) as u64);
        let free_from = busy.entry(what.target()).or_default();
        if *free_from <= from {
            faults.push(Fault { from, until, what });
            // Time to do something before the next.
            *free_from = until + Duration::from_secs(2);
        }
        from += Duration::from_millis(random.random_range(200..2500));
    }
    faults
}

/// Runs a plan and judges what came out. `say` is told what is done.
///
/// # Errors
/// A line is missing, doubled, torn or invented, a process has panicked, or the tree doesn't recover.
pub async fn run(name: &str, options: &ChaosOptions, say: impl Fn(&str)) -> Result<Report> {
    let mut faults = plan(options);
    if !SmallDisk::is_possible() {
        say("small disks are mounted, which only root may do: no disk is filled");
        faults.retain(|fault| !matches!(fault.what, What::FullDisk(_)));
    }
    say(&format!("seed {}, {} faults:", options.seed, faults.len()));
    faults.iter().for_each(|fault| say(&format!("  {fault}")));

    let scenario = Scenario::new(name, &[Reader::Zcat]);
    let hdfs = match options.sink {
        SinkKind::File => None,
        SinkKind::Hdfs => Some(MiniHdfs::start(HdfsOptions { datanodes: DATANODES, ..HdfsOptions::default() }).await?),
    };
    let sink = hdfs.as_ref().map_or(Sink::Local, |hdfs| Sink::Hdfs {
        uri: hdfs.uri(),
        webhdfs: hdfs.webhdfs().clone(),
        path: "/logs".into(),
    });
    let cluster = Cluster::start(ClusterOptions {
        agents: AGENTS,
        edges: 2,
        mids: 1,
        roots: 2,
        lanes: 2,
        proxies: true,
        sink,
        small_disks: if SmallDisk::is_possible() { SMALL_DISKS.to_vec() } else { Vec::new() },
        // So small that files are closed for their size, beside what failures leave.
        roll_size: "1 MiB".into(),
        root_lines: "commit_bytes = \"256 KiB\"\n".into(),
        ..ClusterOptions::default()
    });
    let mut chaos = Chaos { cluster: cluster.await?, hdfs, say };
    let watch = Watch::begin(chaos.cluster.sink());
    let outcome = async {
        let writers = scenario::writers(&chaos.cluster, AGENTS, options.per_second)?;
        chaos.carry_out(&faults, options.duration).await?;
        let written = scenario::stop_all(writers)?;
        (chaos.say)("all faults have ended; the judge waits for the last minute");
        let report = scenario.end(&mut chaos.cluster, written.clone()).await?;
        let hours = watch.end(&written).await?;
        (chaos.say)(&format!("{hours} buckets were whole when they were published, and stayed as they were"));
        Ok(report)
    };
    let outcome = outcome.await;
    chaos.cluster.explain(outcome).with_context(|| format!("seed {}", options.seed))
}

struct Chaos<F> {
    cluster: Cluster,
    hdfs: Option<MiniHdfs>,
    say: F,
}

impl<F: Fn(&str)> Chaos<F> {
    async fn carry_out(&mut self, faults: &[Fault], duration: Duration) -> Result<()> {
        let begun = Instant::now();
        let mut steps: Vec<(Duration, bool, &Fault)> = Vec::new();
        for fault in faults {
            steps.push((fault.from, true, fault));
            steps.push((fault.until, false, fault));
        }
        steps.sort_by_key(|(at, begins, _)| (*at, *begins));
        for (at, begins, fault) in steps {
            self.look_until(begun + at).await?;
            let verb = if begins { "begins" } else { "ends" };
            (self.say)(&format!("{:7.1} s: {} {verb}", begun.elapsed().as_secs_f64(), fault.what));
            let done = if begins { self.begin(fault.what).await } else { self.end(fault.what).await };
            done.with_context(|| fault.to_string())?;
        }
        self.look_until(begun + duration).await?;
        if let Some(hdfs) = &self.hdfs {
            hdfs.wait_until_ready().await?;
        }
        for role in NODES {
            self.cluster.wait_until_ready(role).await?;
        }
        Ok(())
    }

    /// Until then does what a service manager does.
    async fn look_until(&mut self, then: Instant) -> Result<()> {
        loop {
            for (role, how) in self.cluster.restart_ended()? {
                (self.say)(&format!("           {role} had ended by itself ({how}) and is started again"));
            }
            if Instant::now() >= then {
                return Ok(());
            }
            sleep_until(then.min(Instant::now() + LOOK)).await;
        }
    }

    fn hdfs(&mut self) -> Result<&mut MiniHdfs> {
        self.hdfs.as_mut().context("there is no HDFS in this tree")
    }

    async fn begin(&mut self, what: What) -> Result<()> {
        match what {
            What::Kill { role, wipe } => {
                self.cluster.kill9(role)?;
                if wipe { self.cluster.wipe_state(role) } else { Ok(()) }
            }
            What::Sleep(role) => self.cluster.signal(role, Signal::STOP),
            What::Network(role, fault) => {
                self.cluster.proxy(role)?.set(fault);
                Ok(())
            }
            What::FullDisk(role) => self.cluster.disk(role)?.fill(),
            What::DataNode(index) => self.hdfs()?.kill_datanode(index),
            What::NameNode => self.hdfs()?.kill_namenode(),
            What::SleepingNameNode => self.hdfs()?.pause_namenode(),
            What::SafeMode => self.hdfs()?.safe_mode(true).await,
        }
    }

    async fn end(&mut self, what: What) -> Result<()> {
        match what {
            What::Kill { role, .. } => self.cluster.start_node(role),
            What::Sleep(role) => self.cluster.signal(role, Signal::CONT),
            What::Network(role, _) => {
                self.cluster.proxy(role)?.set(NetworkFault::None);
                Ok(())
            }
            What::FullDisk(role) => self.cluster.disk(role)?.relieve(),
            What::DataNode(index) => self.hdfs()?.start_datanode(index).await,
            What::NameNode => {
                self.hdfs()?.start_namenode().await?;
                self.hdfs()?.wait_until_ready().await
            }
            What::SleepingNameNode => self.hdfs()?.resume_namenode(),
            What::SafeMode => self.hdfs()?.safe_mode(false).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_determines_the_plan_and_nothing_has_two_faults_at_a_time() {
        for sink in [SinkKind::File, SinkKind::Hdfs] {
            let options = ChaosOptions { seed: 5, duration: Duration::from_secs(600), sink, per_second: 1 };
            let faults = plan(&options);
            assert_eq!(faults, plan(&options));
            assert_ne!(faults, plan(&ChaosOptions { seed: 6, ..options }));
            assert!(faults.len() > 200, "{}", faults.len());
            for (index, fault) in faults.iter().enumerate() {
                assert!(fault.from < fault.until, "{fault}");
                let same = |other: &&Fault| other.what.target() == fault.what.target();
                if let Some(next) = faults[index + 1..].iter().find(same) {
                    assert!(fault.until < next.from, "{fault}, {next}");
                }
            }
            let disk = faults.iter().any(|fault| matches!(fault.what, What::FullDisk(_)));
            let datanode = faults.iter().any(|fault| matches!(fault.what, What::DataNode(_)));
            assert_eq!((disk, datanode), (true, sink == SinkKind::Hdfs));
        }
    }
}
