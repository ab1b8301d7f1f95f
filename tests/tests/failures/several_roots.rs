//! Real processes with two roots and two lanes, under load: lanes change hands, and every line is published once.
//!
//! A directory of one machine can't fence, so there a lane belongs to its owner's process for as long as that lives; HDFS lets
//! another root take it also from one that sleeps.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use rustix::process::Signal;
use tributary_tests::cluster::{Cluster, ClusterOptions, Sink};
use tributary_tests::hdfs::{HdfsOptions, MiniHdfs};
use tributary_tests::scenario::{restart, scenario, stop_all, writers};

/// Each agent in a lane of its own.
fn two_lanes() -> ClusterOptions {
    ClusterOptions { agents: 2, edges: 2, roots: 2, lanes: 2, ..ClusterOptions::default() }
}

async fn on_hdfs(name: &str, act: impl AsyncFnOnce(&mut Cluster) -> Result<Vec<PathBuf>>) -> Result<()> {
    let hdfs = MiniHdfs::start(HdfsOptions::default()).await?;
    let sink = Sink::Hdfs { uri: hdfs.uri(), webhdfs: hdfs.webhdfs().clone(), path: "/logs".into() };
    scenario(name, ClusterOptions { sink, ..two_lanes() }, act).await
}

/// The other root takes the lane of the one that is killed, and gives it back when that one is there again.
async fn kill_each_root_for_a_while(cluster: &mut Cluster) -> Result<Vec<PathBuf>> {
    cluster.wait_until_preferred_owners().await?;
    let writers = writers(cluster, 2, 1500)?;
    for lane in 0..2 {
        let (owner, other) = (cluster.preferred_root(lane)?, cluster.other_root(cluster.preferred_root(lane)?));
        writers[0].wait_for_more(2000).await?;
        cluster.kill9(owner)?;
        let taken = cluster.wait_until_owner(lane, other).await?;
        writers[0].wait_for_more(2000).await?;
        restart(cluster, owner).await?;
        let given_back = cluster.wait_until_owner(lane, owner).await?;
        ensure!(given_back > taken, "epochs {taken} and {given_back}");
    }
    writers[0].wait_for_more(2000).await?;
    stop_all(writers)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lane_of_a_root_that_is_killed_is_taken_and_given_back() -> Result<()> {
    scenario("two roots: kill -9 of each", two_lanes(), kill_each_root_for_a_while).await
}

#[tokio::test(flavor = "multi_thread")]
async fn on_hdfs_the_lane_of_a_root_that_is_killed_is_taken_and_given_back() -> Result<()> {
    on_hdfs("hdfs: two roots, kill -9 of each", kill_each_root_for_a_while).await
}

/// While it sleeps its lane's data waits below; nobody else may write, and nobody does.
#[tokio::test(flavor = "multi_thread")]
async fn on_local_files_a_root_that_sleeps_keeps_its_lane() -> Result<()> {
    scenario("two roots: SIGSTOP of each", two_lanes(), async |cluster| {
        cluster.wait_until_preferred_owners().await?;
        let writers = writers(cluster, 2, 1500)?;
        for lane in 0..2 {
            let owner = cluster.preferred_root(lane)?;
            let epoch = cluster.wait_until_owner(lane, owner).await?;
            writers[0].wait_for_more(2000).await?;
            cluster.signal(owner, Signal::STOP)?;
            // More than twice takeover_after.
            writers[0].wait_for_more(15_000).await?;
            cluster.signal(owner, Signal::CONT)?;
            ensure!(cluster.wait_until_owner(lane, owner).await? == epoch, "it was never taken");
        }
        writers[0].wait_for_more(2000).await?;
        stop_all(writers)
    })
    .await
}

/// It wakes up in the middle of what it did, believing that the lane is its own.
#[tokio::test(flavor = "multi_thread")]
async fn on_hdfs_the_lane_of_a_root_that_sleeps_is_taken_and_the_sleeper_does_no_harm() -> Result<()> {
    on_hdfs("hdfs: two roots, SIGSTOP of each", async |cluster| {
        cluster.wait_until_preferred_owners().await?;
        let writers = writers(cluster, 2, 1500)?;
        for lane in 0..2 {
            let owner = cluster.preferred_root(lane)?;
            let other = cluster.other_root(owner);
            writers[0].wait_for_more(2000).await?;
            cluster.signal(owner, Signal::STOP)?;
            let taken = cluster.wait_until_owner(lane, other).await?;
            writers[0].wait_for_more(2000).await?;
            cluster.signal(owner, Signal::CONT)?;
            let given_back = cluster.wait_until_owner(lane, owner).await?;
            ensure!(given_back > taken, "epochs {taken} and {given_back}");
        }
        writers[0].wait_for_more(2000).await?;
        stop_all(writers)
    })
    .await
}
