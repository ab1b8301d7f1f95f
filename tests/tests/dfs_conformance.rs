//! The root's HDFS driver against a real HDFS: the cases that every driver must pass, and what only a real one does.

use std::env;
use std::fs;
use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use async_trait::async_trait;
use bytes::Bytes;
use tributary_aggregator::dfs::conformance::{self, Place};
use tributary_aggregator::dfs::probe::probe;
use tributary_aggregator::dfs::{
    CreateOptions, Dfs, DfsError, DfsOptions, DfsPath, Recovered, open_dfs, recover_until_closed,
};
use tributary_tests::hdfs::{HdfsOptions, MiniHdfs};
use tributary_tests::process::{AtParentDeath, Process};
use tributary_tests::wait::until;

/// Only turns a hang into a failure.
const LIMIT: Duration = Duration::from_secs(120);
const BLOCK: u64 = 1 << 20;

fn options() -> CreateOptions {
    CreateOptions { block_size: BLOCK, replication: None, sync_timeout: Duration::from_secs(30) }
}

async fn open(uri: &str, call_timeout: Duration) -> Result<Arc<dyn Dfs>> {
    Ok(open_dfs(&format!("{uri}/sink"), &DfsOptions { call_timeout, ..DfsOptions::default() }).await?)
}

/// A process of its own: another client name, other leases, other connections.
async fn process(hdfs: &MiniHdfs) -> Result<Arc<dyn Dfs>> {
    let dfs = open(&hdfs.uri(), Duration::from_secs(20)).await?;
    dfs.mkdir_all(&DfsPath::base()).await?;
    Ok(dfs)
}

fn path(name: &str) -> DfsPath {
    DfsPath::base().join(name)
}

struct RealHdfs(MiniHdfs);

#[async_trait]
impl Place for RealHdfs {
    async fn process(&self) -> Arc<dyn Dfs> {
        process(&self.0).await.expect("a client")
    }

    fn recovery_fences(&self) -> bool {
        true
    }
}

#[tokio::test]
async fn hdfs_keeps_what_the_trait_promises() -> Result<()> {
    let hdfs = RealHdfs(MiniHdfs::start(HdfsOptions::default()).await?);
    conformance::run(&hdfs).await;
    Ok(())
}

#[tokio::test]
async fn a_probe_passes_leaves_nothing_and_names_what_is_missing() -> Result<()> {
    let hdfs = MiniHdfs::start(HdfsOptions::default()).await?;
    let dfs = process(&hdfs).await?;
    probe(&*dfs, options()).await?;
    let left: Vec<_> = hdfs.webhdfs().tree("/sink").await?.into_iter().map(|(path, _)| path).collect();
    ensure!(left.iter().all(|path| !path.contains("probe")), "{left:?}");

    hdfs.safe_mode(true).await?;
    let error = probe(&*dfs, options()).await.expect_err("nothing can be changed");
    ensure!(error.transient && error.to_string().contains("SafeMode"), "{error}");
    hdfs.safe_mode(false).await?;

    hdfs.dfsadmin(&["-setSpaceQuota", "1m", "/sink"]).await?;
    let error = probe(&*dfs, options()).await.expect_err("two blocks don't fit");
    ensure!(error.to_string().contains("Quota"), "{error}");
    Ok(())
}

#[tokio::test]
async fn safe_mode_is_waited_out_and_hides_nothing() -> Result<()> {
    let hdfs = MiniHdfs::start(HdfsOptions::default()).await?;
    let dfs = process(&hdfs).await?;
    let (there, new) = (path("there"), path("new"));
    let mut writer = dfs.create(&there, options()).await?;
    writer.write("x".into()).await?;
    writer.close().await?;

    hdfs.safe_mode(true).await?;
    let refusals = [
        dfs.create(&new, options()).await.map(drop),
        dfs.rename(&there, &new).await,
        dfs.mkdir(&new).await,
        dfs.delete(&there).await,
    ];
    for refusal in refusals {
        match refusal {
            Err(DfsError::Unavailable { reason, .. }) => ensure!(reason.contains("SafeMode"), "{reason}"),
            other => bail!("not refused for now, but {other:?}"),
        }
    }
    ensure!(dfs.read(&there, 0, 9).await? == "x", "reading goes on");

    hdfs.safe_mode(false).await?;
    dfs.rename(&there, &new).await?;
    Ok(())
}

#[tokio::test]
async fn a_full_block_is_synced_before_the_next_one_begins() -> Result<()> {
    let hdfs = MiniHdfs::start(HdfsOptions::default()).await?;
    let dfs = process(&hdfs).await?;
    let file = path("f");
    let mut writer = dfs.create(&file, options()).await?;
    writer.write(vec![1; usize::try_from(BLOCK)?].into()).await?;
    let seen = dfs.stat(&file).await?.context("it is there")?.len;
    ensure!(seen == BLOCK, "the NameNode knows of {seen} bytes: nobody synced the full block");
    writer.write("more".into()).await?;
    ensure!(writer.close().await? == BLOCK + 4);
    Ok(())
}

#[tokio::test]
async fn a_namenode_that_is_killed_stopped_and_started_is_found_again() -> Result<()> {
    let mut hdfs = MiniHdfs::start(HdfsOptions::default()).await?;
    let dfs = open(&hdfs.uri(), Duration::from_secs(8)).await?;
    dfs.mkdir_all(&path("a")).await?;
    let mut writer = dfs.create(&path("a/open"), options()).await?;
    writer.write("synced".into()).await?;
    writer.sync().await?;

    // Killed: nobody listens, so nothing was done.
    hdfs.kill_namenode()?;
    let first = dfs.rename(&path("a"), &path("b")).await.expect_err("nobody is there");
    ensure!(first.is_transient(), "{first:?}");
    let second = dfs.rename(&path("a"), &path("b")).await.expect_err("nobody is there");
    ensure!(matches!(second, DfsError::Unavailable { .. }), "{second:?}");
    hdfs.start_namenode().await?;
    hdfs.wait_until_ready().await?;
    ensure!(dfs.stat(&path("a")).await?.is_some() && dfs.stat(&path("b")).await?.is_none(), "nothing was done");

    // Stopped: the call may wait in its queue, and it does.
    hdfs.pause_namenode()?;
    let unknown = dfs.rename(&path("a"), &path("c")).await.expect_err("nobody answers");
    ensure!(matches!(unknown, DfsError::UnknownOutcome { .. }), "{unknown:?}");
    let asked = dfs.stat(&path("a")).await.expect_err("nobody answers");
    ensure!(matches!(asked, DfsError::Unavailable { .. }), "{asked:?}");
    hdfs.resume_namenode()?;
    until("the old call to be done", LIMIT, async || Ok(dfs.stat(&path("c")).await?.map(drop))).await?;
    ensure!(dfs.stat(&path("a")).await?.is_none());

    // Renaming did not fence the writer; recovery does, and what it had synced is there.
    drop(writer);
    ensure!(recover_until_closed(&*dfs, &path("c/open")).await? == Some(6));
    ensure!(dfs.read(&path("c/open"), 0, 99).await? == "synced");
    Ok(())
}

#[tokio::test]
async fn a_datanode_killed_in_the_pipeline_costs_the_writer_and_no_synced_byte() -> Result<()> {
    let mut hdfs = MiniHdfs::start(HdfsOptions { datanodes: 3, ..HdfsOptions::default() }).await?;
    let dfs = process(&hdfs).await?;
    let file = path("f");
    let short = CreateOptions { sync_timeout: Duration::from_secs(3), ..options() };
    let mut writer = dfs.create(&file, short).await?;
    writer.write("synced;".into()).await?;
    writer.sync().await?;

    hdfs.kill_datanode(1)?;
    let hung = async {
        writer.write(Bytes::from_static(b"not")).await?;
        writer.sync().await
    };
    // Where the client mends the pipeline this may also work; then it must hold.
    let answered = hung.await;
    if let Err(error) = &answered {
        ensure!(matches!(error, DfsError::UnknownOutcome { .. }), "{error:?}");
        ensure!(writer.sync().await.is_err(), "a failed writer stays failed");
    }
    drop(writer);

    let len = recover_until_closed(&*dfs, &file).await?.context("it is there")?;
    let found = dfs.read(&file, 0, 99).await?;
    ensure!(
        found.len() as u64 == len && found.starts_with(b"synced;") && b"synced;not".starts_with(&found),
        "{found:?}"
    );
    ensure!(answered.is_err() || found == "synced;not", "what was answered is not there: {found:?}");

    // A new file with fewer copies, until one comes up without the dead one; then it gets the copies that it should have.
    let fewer = CreateOptions { replication: Some(1), ..short };
    let mut tries = 0;
    let next = until("a new file to pass its first sync", LIMIT, async || {
        tries += 1;
        let next = path(&format!("next-{tries}"));
        let mut writer = dfs.create(&next, fewer).await?;
        writer.write("new".into()).await?;
        writer.sync().await?;
        ensure!(writer.close().await? == 3);
        Ok(Some(next))
    })
    .await?;
    dfs.set_replication(&next, 2).await?;
    let status = hdfs.webhdfs().status(&format!("/sink/{next}")).await?.context("it is there")?;
    ensure!(status.replication == 2);
    Ok(())
}

const CHILD_SINK: &str = "TRIBUTARY_TEST_CHILD_SINK";

/// Not a test: the process that `what_was_synced_survives_a_kill` kills.
#[tokio::test]
#[ignore = "what_was_synced_survives_a_kill runs it as a process of its own"]
async fn writer_to_be_killed() -> Result<()> {
    let sink = env::var(CHILD_SINK).context("the sink to write to")?;
    let dfs = open_dfs(&sink, &DfsOptions::default()).await?;
    dfs.mkdir(&path("lane")).await?;
    let _guard = dfs.lock(&path("lane")).await?;
    let mut writer = dfs.create(&path("lane/f"), options()).await?;
    for i in 0_u64.. {
        writer.write(format!("{i:07}\n").into()).await?;
        writer.sync().await?;
        // What is known outside to be safe.
        writeln!(std::io::stderr(), "synced {i}")?;
    }
    Ok(())
}

async fn what_a_killed_writer_synced_is_read_back(sink: &str, dfs: &dyn Dfs) -> Result<()> {
    let logs = tempfile::tempdir()?;
    let mut child = Process::spawn(env::current_exe()?, AtParentDeath::Kill, logs.path().join("log"), |command| {
        command.args(["--exact", "writer_to_be_killed", "--ignored", "--nocapture"]).env(CHILD_SINK, sink);
    })?;
    let told = |log: &str| log.lines().filter_map(|line| line.strip_prefix("synced ")?.parse::<usize>().ok()).max();
    until("some syncs", LIMIT, async || Ok(told(&fs::read_to_string(child.log())?).filter(|told| *told >= 20)))
        .await
        .with_context(|| child.log_tail())?;

    let lane = dfs.lock(&path("lane")).await;
    ensure!(lane.is_ok() == sink.starts_with("hdfs:"), "a local lane has an owner while its process lives");
    drop(lane);
    child.kill()?;
    let told = told(&fs::read_to_string(child.log())?).context("it said so")?;

    let _guard = dfs.lock(&path("lane")).await?;
    dfs.rename(&path("lane"), &path("lane-taken")).await?;
    let file = path("lane-taken/f");
    let len = recover_until_closed(dfs, &file).await?.context("it is there")?;
    ensure!(dfs.recover(&file).await? == Recovered::Closed { len });
    let found = dfs.read(&file, 0, usize::MAX).await?;
    let lines: Vec<_> = std::str::from_utf8(&found)?.split_inclusive('\n').collect();
    for (i, line) in lines.iter().enumerate() {
        ensure!(*line == format!("{i:07}\n") || i == lines.len() - 1, "line {i} is {line:?}");
    }
    ensure!(lines.len() > told, "{told} was synced, and there are {} lines", lines.len());
    Ok(())
}

#[tokio::test]
async fn what_was_synced_survives_a_kill() -> Result<()> {
    let hdfs = MiniHdfs::start(HdfsOptions::default()).await?;
    what_a_killed_writer_synced_is_read_back(&format!("{}/sink", hdfs.uri()), &*process(&hdfs).await?).await?;

    let folder = tempfile::tempdir()?;
    let sink = format!("file://{}", folder.path().display());
    let dfs = open_dfs(&sink, &DfsOptions::default()).await?;
    what_a_killed_writer_synced_is_read_back(&sink, &*dfs).await
}
