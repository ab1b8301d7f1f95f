//! (d) Tributary: an agent on every server, two edges, and two roots that share four lanes, all of them real processes.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::HOUR;
use super::servers::Hour;
use crate::cluster::{Cluster, ClusterOptions, Role, Sink};
use crate::hdfs::MiniHdfs;
use crate::published::Published;
use crate::wait::until;

const EDGES: usize = 2;
pub(super) const ROOTS: usize = 2;
pub(super) const LANES: u16 = 4;
/// Only turns a hang into a failure. What is waited for longest are the hours of servers that are gone.
const LIMIT: Duration = Duration::from_secs(600);
/// Between two looks: each is itself work for the NameNode.
const LOOK: Duration = Duration::from_secs(2);

/// How long an hour waits and how large a file gets is scaled with the hour; all else, as the second between two syncs, is as by
/// default. (A NameNode asks of a DataNode room for all blocks that are open on it in the size of the next one: with a hundred open
/// files one DataNode has no room for a block of a GiB.)
const TABLES: &str = r#"
[root]
roll_size = "64 MiB"
settle = "10s"
close_delay = "2s"
give_up_after = "1m"
on_missing = "publish"
"#;

/// A hundred watches by inotify are more than most systems give to one user.
const AGENT_LINES: &str = "watch = false\nrefresh_interval = \"1s\"\n";

pub(super) async fn start(hdfs: &MiniHdfs, name: &str, servers: usize) -> Result<Cluster> {
    let sink = Sink::Hdfs { uri: hdfs.uri(), webhdfs: hdfs.webhdfs().clone(), path: format!("/{name}") };
    let options = ClusterOptions {
        agents: servers,
        edges: EDGES,
        roots: ROOTS,
        lanes: LANES,
        sink,
        tables: Some(TABLES.into()),
        agent_lines: AGENT_LINES.into(),
        ..ClusterOptions::default()
    };
    Cluster::start(options).await
}

/// Waits until every hour with lines is published and nothing more is under way.
pub(super) async fn wait_until_published(
    cluster: &mut Cluster,
    hdfs: &MiniHdfs,
    first: Hour,
    hours: u32,
) -> Result<()> {
    let sink = cluster.sink();
    until("all hours to be published", LIMIT, async || {
        if let Err(error) = cluster.check_alive() {
            return Ok(Some(Err(error)));
        }
        tokio::time::sleep(LOOK).await;
        for hour in (first.0..).map(Hour).take(hours as usize) {
            let folder = format!("/{}/{}", sink_name(cluster), hour.folder());
            ensure!(hdfs.webhdfs().status(&folder).await?.is_some(), "{folder} is not");
        }
        let left = Published::look(&sink).await?.unpublished;
        ensure!(left.is_empty(), "there are more files: {left:?}");
        Ok(Some(Ok(())))
    })
    .await?
}

/// The folder of the category's hours, below HDFS' root.
fn sink_name(cluster: &Cluster) -> String {
    format!("{}/{}", super::TRIBUTARY, cluster.category())
}

/// How long an hour waits for a server that is gone.
pub(super) const GIVE_UP_AFTER: Duration = HOUR;

/// The process that is killed in the middle.
pub(super) fn root(node: usize) -> Role {
    Role::Root(node % ROOTS)
}
