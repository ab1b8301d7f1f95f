//! The whole way on real parts: Debian's nginx under load writes an access log, Debian's logrotate rotates it, an agent, an edge
//! and a root ship it to a real HDFS, and zcat, a MapReduce job and Spark each find every line once.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use rustix::fs::statvfs;
use tributary_tests::cluster::{Cluster, ClusterOptions, Role, Sink};
use tributary_tests::hdfs::{HdfsOptions, MiniHdfs};
use tributary_tests::judge::Scenario;
use tributary_tests::load::{Load, LoadOptions};
use tributary_tests::logrotate::{Compress, Logrotate, LogrotateOptions, Method};
use tributary_tests::nginx::Nginx;
use tributary_tests::readers::Reader;
use tributary_tests::wait::until;

const LIMIT: Duration = Duration::from_secs(180);
const ROLES: [Role; 3] = [Role::Agent(0), Role::Edge(0), Role::Root(0)];

/// nginx with load on it and logrotate at hand.
struct Web {
    nginx: Nginx,
    logrotate: Logrotate,
    load: Load,
}

impl Web {
    async fn start(cluster: &Cluster, compress: Compress) -> Result<Self> {
        let nginx = Nginx::start(cluster.log_dir(0).join("access.log")).await?;
        let method = Method::Create { pid_file: nginx.pid_file() };
        let options = LogrotateOptions { compress, ..LogrotateOptions::new(nginx.access_log(), method) };
        let logrotate = Logrotate::new(&options)?;
        let options = LoadOptions { requests: u64::MAX, per_second: Some(1500), ..LoadOptions::default() };
        let load = Load::start(&nginx.url(), &options)?;
        Ok(Self { nginx, logrotate, load })
    }

    async fn requests(&self, more: u64) -> Result<()> {
        let enough = self.load.begun_requests() + more;
        until("the load to go on", LIMIT, async || Ok((self.load.begun_requests() >= enough).then_some(()))).await
    }

    /// Ends the load and nginx; the log files are what was written.
    async fn end(self, cluster: &Cluster) -> Result<Vec<PathBuf>> {
        self.load.stop();
        let report = self.load.finish().await?;
        self.nginx.quit().await?;
        ensure!(report.unanswered.is_empty(), "nginx didn't answer {} requests", report.unanswered.len());
        fs::read_dir(cluster.log_dir(0))?.map(|entry| Ok(entry?.path())).collect()
    }
}

async fn scenario(
    name: &str,
    compress: Compress,
    act: impl AsyncFnOnce(&mut Cluster, &mut Web) -> Result<()>,
) -> Result<()> {
    let act = async |cluster: &mut Cluster, web: &mut Web, _: &mut MiniHdfs| act(cluster, web).await;
    scenario_on(HdfsOptions::default(), name, &Reader::ALL, compress, act).await
}

async fn scenario_on(
    options: HdfsOptions,
    name: &str,
    readers: &[Reader],
    compress: Compress,
    act: impl AsyncFnOnce(&mut Cluster, &mut Web, &mut MiniHdfs) -> Result<()>,
) -> Result<()> {
    scenario_with(ClusterOptions::default(), options, name, readers, compress, act).await
}

async fn scenario_with(
    cluster: ClusterOptions,
    options: HdfsOptions,
    name: &str,
    readers: &[Reader],
    compress: Compress,
    act: impl AsyncFnOnce(&mut Cluster, &mut Web, &mut MiniHdfs) -> Result<()>,
) -> Result<()> {
    let scenario = Scenario::new(name, readers);
    let mut hdfs = MiniHdfs::start(options).await?;
    let sink = Sink::Hdfs { uri: hdfs.uri(), webhdfs: hdfs.webhdfs().clone(), path: "/logs".into() };
    let mut cluster = Cluster::start(ClusterOptions { sink, ..cluster }).await?;
    let outcome = async {
        let mut web = Web::start(&cluster, compress).await?;
        act(&mut cluster, &mut web, &mut hdfs).await?;
        let written = web.end(&cluster).await?;
        scenario.end(&mut cluster, written).await
    };
    let outcome = outcome.await;
    let report = cluster.explain(outcome)?;
    println!("{report}");
    Ok(())
}

/// Compressed one rotation later, as Debian does it for nginx: what the agent still reads is then deleted.
#[tokio::test(flavor = "multi_thread")]
async fn from_nginx_to_mapreduce_and_spark() -> Result<()> {
    scenario("hdfs: nginx, logrotate, three readers", Compress::Delayed, async |_, web| {
        for _ in 0..4 {
            web.requests(9000).await?;
            web.logrotate.rotate().await?;
        }
        web.requests(5000).await
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_and_restart_of_each_process_in_turn() -> Result<()> {
    scenario("hdfs: kill -9 of each in turn", Compress::No, async |cluster, web| {
        for role in ROLES {
            web.requests(5000).await?;
            cluster.kill9(role)?;
            web.requests(3000).await?;
            web.logrotate.rotate().await?;
            web.requests(2000).await?;
            cluster.start_node(role)?;
            cluster.wait_until_ready(role).await?;
        }
        web.requests(5000).await
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn all_local_state_is_deleted_between_stop_and_start() -> Result<()> {
    scenario("hdfs: local state deleted", Compress::No, async |cluster, web| {
        web.requests(8000).await?;
        for role in ROLES {
            cluster.stop(role).await?;
        }
        web.requests(3000).await?;
        web.logrotate.rotate().await?;
        for role in ROLES {
            cluster.wipe_state(role)?;
            cluster.start_node(role)?;
        }
        for role in ROLES {
            cluster.wait_until_ready(role).await?;
        }
        web.requests(8000).await
    })
    .await
}

/// Nothing is told to be durable meanwhile, nothing is given up, and nothing is sent twice into the files afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn hdfs_is_gone_refuses_and_sleeps_for_a_while() -> Result<()> {
    let act = async |_: &mut Cluster, web: &mut Web, hdfs: &mut MiniHdfs| {
        web.requests(4000).await?;
        hdfs.kill_namenode()?;
        web.requests(6000).await?;
        web.logrotate.rotate().await?;
        hdfs.start_namenode().await?;
        hdfs.wait_until_ready().await?;
        web.requests(4000).await?;
        hdfs.safe_mode(true).await?;
        web.requests(6000).await?;
        hdfs.safe_mode(false).await?;
        web.requests(4000).await?;
        hdfs.pause_namenode()?;
        web.requests(6000).await?;
        hdfs.resume_namenode()?;
        web.requests(4000).await?;
        hdfs.kill_datanode(0)?;
        web.requests(6000).await?;
        hdfs.start_datanode(0).await?;
        web.requests(4000).await
    };
    let readers = [Reader::Zcat];
    scenario_on(HdfsOptions::default(), "hdfs: outages of the NameNode and the DataNode", &readers, Compress::No, act)
        .await
}

/// A pipeline loses a DataNode and new ones meet it again, until the NameNode has noticed.
#[tokio::test(flavor = "multi_thread")]
async fn a_datanode_of_three_is_killed_under_load() -> Result<()> {
    let act = async |_: &mut Cluster, web: &mut Web, hdfs: &mut MiniHdfs| {
        for datanode in 0..2 {
            web.requests(6000).await?;
            hdfs.kill_datanode(datanode)?;
            web.requests(12_000).await?;
            web.logrotate.rotate().await?;
            hdfs.start_datanode(datanode).await?;
        }
        web.requests(6000).await
    };
    let options = HdfsOptions { datanodes: 3, ..HdfsOptions::default() };
    scenario_on(options, "hdfs: a DataNode of three killed", &[Reader::Zcat], Compress::No, act).await
}

/// HDFS keeps a block's room free for each open file, and here no DataNode has room for the block that a file of `roll_size` had
/// best be.
#[tokio::test(flavor = "multi_thread")]
async fn a_datanode_without_room_for_a_large_block_gets_smaller_ones() -> Result<()> {
    const ROOM: u64 = 20 << 30;
    let disk = statvfs(std::env::temp_dir())?;
    let reserved = (disk.f_bavail * disk.f_frsize).saturating_sub(ROOM);
    let settings = vec![("dfs.datanode.du.reserved".to_owned(), reserved.to_string())];
    let cluster = ClusterOptions { roll_size: "1 TiB".into(), ..ClusterOptions::default() };
    let options = HdfsOptions { settings, ..HdfsOptions::default() };
    let act = async |cluster: &mut Cluster, web: &mut Web, _: &mut MiniHdfs| {
        web.requests(5000).await?;
        until("a file to fail", LIMIT, async || {
            let failed = cluster.metric(Role::Root(0), "tributary_aggregator_root_segments_failed_total").await?;
            Ok((failed > 0.0).then_some(()))
        })
        .await
    };
    scenario_with(cluster, options, "hdfs: little room", &[Reader::Zcat], Compress::No, act).await
}
