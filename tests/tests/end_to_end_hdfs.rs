//! The whole way on real parts: Debian's nginx under load writes an access log, Debian's logrotate rotates it, an agent, an edge
//! and a root ship it to a real HDFS, and zcat, a MapReduce job and Spark each find every line once.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use tributary_tests::cluster::{Cluster, ClusterOptions, Role, Sink};
use tributary_tests::hdfs::{HdfsOptions, MiniHdfs};
use tributary_tests::judge::Scenario;
use tributary_tests::load::{Load, LoadOptions};
use tributary_tests::logrotate::{Compress, Logrotate, LogrotateOptions, Method};
use tributary_tests::nginx::Nginx;
use tributary_tests::readers::Reader;
use tributary_tests::wait::until;

const LIMIT: Duration = Duration::from_secs(180);
const ROLES: [Role; 3] = [Role::Agent(0), Role::Edge(0), Role::Root];

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
    let scenario = Scenario::new(name, &Reader::ALL);
    let hdfs = MiniHdfs::start(HdfsOptions::default()).await?;
    let sink = Sink::Hdfs { uri: hdfs.uri(), webhdfs: hdfs.webhdfs().clone(), path: "/logs".into() };
    let mut cluster = Cluster::start(ClusterOptions { sink, ..ClusterOptions::default() }).await?;
    let outcome = async {
        let mut web = Web::start(&cluster, compress).await?;
        act(&mut cluster, &mut web).await?;
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
