//! The real HDFS that other tests stand on does what they ask of it.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;
use tributary_tests::hdfs::{HdfsOptions, MiniHdfs};
use tributary_tests::process::{AtParentDeath, Process};
use tributary_tests::wait::until;

/// Only turns a hang into a failure.
const LIMIT: Duration = Duration::from_secs(180);

#[tokio::test]
async fn a_file_survives_a_killed_namenode() -> Result<()> {
    let mut hdfs = MiniHdfs::start(HdfsOptions::default()).await?;
    hdfs.webhdfs().write("/a/b", b"hello".to_vec()).await?;
    hdfs.restart_namenode().await?;
    assert_eq!(hdfs.webhdfs().read("/a/b").await?, b"hello");
    let tree = hdfs.webhdfs().tree("/").await?;
    assert_eq!(tree.iter().map(|(path, status)| (path.as_str(), status.length)).collect::<Vec<_>>(), [("/a/b", 5)]);
    Ok(())
}

#[tokio::test]
async fn every_operation_is_in_the_audit_log() -> Result<()> {
    let hdfs = MiniHdfs::start(HdfsOptions::default()).await?;
    hdfs.webhdfs().make_dir("/x").await?;
    hdfs.webhdfs().rename("/x", "/y").await?;
    assert!(hdfs.webhdfs().rename("/x", "/z").await.is_err(), "the source is gone");
    let audit = hdfs.audit()?;
    assert!(audit.iter().any(|line| line.command == "mkdirs" && line.source == "/x"), "{audit:?}");
    let renames: Vec<_> = audit.iter().filter(|line| line.command == "rename").map(|line| &line.destination).collect();
    assert!(renames.contains(&&Some("/y".to_owned())), "{audit:?}");
    Ok(())
}

#[tokio::test]
async fn safe_mode_refuses_writes_until_it_ends() -> Result<()> {
    let hdfs = MiniHdfs::start(HdfsOptions::default()).await?;
    hdfs.safe_mode(true).await?;
    let refused = hdfs.webhdfs().make_dir("/x").await.expect_err("nothing can be changed in safe mode");
    assert!(format!("{refused:#}").contains("SafeMode"), "{refused:#}");
    hdfs.safe_mode(false).await?;
    hdfs.webhdfs().make_dir("/x").await
}

#[tokio::test]
async fn a_datanode_is_killed_missed_and_comes_back_with_its_blocks() -> Result<()> {
    let options = HdfsOptions { datanodes: 3, notices_dead_datanodes_soon: true, ..HdfsOptions::default() };
    let mut hdfs = MiniHdfs::start(options).await?;
    hdfs.webhdfs().write("/f", vec![7; 100_000]).await?;
    assert_eq!(hdfs.webhdfs().status("/f").await?.expect("it is there").replication, 3);

    hdfs.kill_datanode(1)?;
    hdfs.wait_until_live_datanodes(2).await?;
    hdfs.start_datanode(1).await?;
    hdfs.wait_until_live_datanodes(3).await?;
    hdfs.kill_datanode(0)?;
    hdfs.pause_datanode(2)?;
    hdfs.wait_until_live_datanodes(1).await?;
    let left = until("a reader to be sent to the one copy that is left", LIMIT, async || {
        hdfs.webhdfs().read("/f").await.map(Some)
    });
    assert_eq!(left.await?.len(), 100_000);
    hdfs.resume_datanode(2)?;
    assert!(hdfs.resume_datanode(2).is_err(), "it isn't paused any more");
    hdfs.wait_until_live_datanodes(2).await?;
    hdfs.restart_namenode().await
}

#[tokio::test]
async fn a_killed_owner_leaves_no_process_behind() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let state = folder.path().join("state");
    let program = env!("CARGO_BIN_EXE_mini-hdfs");
    let owner = Process::spawn(program, AtParentDeath::Kill, folder.path().join("log"), |command| {
        command.args(["--datanodes", "2", "--dir"]).arg(&state);
    })?;
    until("the HDFS to be up", LIMIT, async || {
        Ok(fs::read_to_string(owner.log())?.contains("Ctrl-C ends it").then_some(()))
    })
    .await?;
    let state = state.to_str().context("a path in UTF-8")?;
    assert_eq!(processes_that_name(state)?.len(), 4, "the owner, a NameNode and two DataNodes");

    // It alone, so that nothing but its death tells the others.
    owner.signal(Signal::KILL)?;
    until("the others to be gone", LIMIT, async || Ok(processes_that_name(state)?.is_empty().then_some(()))).await
}

/// The processes with `text` in their command line. One that has ended has none, also while nobody has waited for it.
fn processes_that_name(text: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        // Other processes come and go meanwhile.
        let command = fs::read(entry?.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).into_owned();
        if command.contains(text) {
            found.push(command);
        }
    }
    Ok(found)
}
