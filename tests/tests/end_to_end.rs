//! Real agents, edges and roots on local files: every line that is written is published once, whatever is done to them.
//!
//! Each scenario writes for some seconds, does its harm meanwhile, and then waits for the end of the last line's minute. With a
//! real HDFS and real log writers: `end_to_end_hdfs.rs`.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tributary_tests::cluster::{Cluster, ClusterOptions, Role};
use tributary_tests::logrotate::{Compress, Logrotate, LogrotateOptions, Method};
use tributary_tests::published::Published;
use tributary_tests::scenario::{copy, log, reported, restart, rotating_writer, scenario, stop};
use tributary_tests::synthetic::AccessLog;
use tributary_tests::wait::until;
use tributary_tests::writer::{Writer, WriterOptions};

const LIMIT: Duration = Duration::from_secs(120);
const ONE_AGENT: [Role; 3] = [Role::Agent(0), Role::Edge(0), Role::Root(0)];

/// Writes lines of the given time to a file at once.
fn write_lines(path: &Path, serials: std::ops::Range<u64>, second: impl Fn(u64) -> i64) -> Result<()> {
    let (mut lines, mut text) = (AccessLog::default(), Vec::new());
    serials.for_each(|serial| lines.line(serial, second(serial), &mut text));
    let mut file = OpenOptions::new().append(true).create(true).open(path)?;
    file.write_all(&text).with_context(|| format!("writing {}", path.display()))
}

fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

#[test]
fn the_programs_find_nothing_wrong_with_the_configuration() -> Result<()> {
    let cluster = Cluster::prepare(ClusterOptions {
        agents: 2,
        edges: 2,
        mids: 1,
        roots: 2,
        lanes: 2,
        ..ClusterOptions::default()
    })?;
    ensure!(
        cluster.preferred_root(0)? != cluster.preferred_root(1)?,
        "what the tests do to one lane, the other is spared"
    );
    let check = |program: &Path, arguments: &[&str], file: &Path| -> Result<()> {
        let output = Command::new(program).args(arguments).arg(file).output()?;
        ensure!(output.status.success(), "{}: {}", file.display(), String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    let programs = cluster.programs();
    check(&programs.aggregator, &["topology", "check"], &cluster.folder().join("topology.toml"))?;
    assert_eq!(cluster.roles().len(), 7);
    for role in cluster.roles() {
        let program = if matches!(role, Role::Agent(_)) { &programs.agent } else { &programs.aggregator };
        check(program, &["check", "--config"], cluster.config(role))?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_become_one_file_of_their_minute() -> Result<()> {
    scenario("one file", ClusterOptions::default(), async |cluster| {
        // Not across the end of a minute, so that there is one file to expect.
        until("a minute with time left", LIMIT, async || Ok((now() % 60 < 45).then_some(()))).await?;
        let second = now();
        for part in 0..5 {
            write_lines(&log(cluster, 0), part * 100..(part + 1) * 100, |_| second)?;
            cluster.wait_until_committed(0, &log(cluster, 0)).await?;
        }
        let sink = cluster.sink();
        until("the minute to be published", LIMIT, async || {
            Ok((Published::look(&sink).await?.records() == 500).then_some(()))
        })
        .await?;
        let seen = Published::look(&sink).await?;
        assert_eq!((seen.hours.len(), seen.files().len(), seen.late().len()), (1, 1, 0), "{seen:?}");
        Ok(vec![log(cluster, 0)])
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn zstd_from_the_agent_to_the_file() -> Result<()> {
    let options = ClusterOptions { codec: "zstd".into(), ..ClusterOptions::default() };
    scenario("zstd", options, async |cluster| {
        let writer = rotating_writer(cluster, 0)?;
        writer.wait_for(10_000).await?;
        stop(writer)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_each_process_in_turn_under_load_and_rotation() -> Result<()> {
    // So small that files are closed for their size, too: the judge knows how many a minute may have.
    let options = ClusterOptions {
        roll_size: "1 MiB".into(),
        root_lines: "commit_bytes = \"256 KiB\"\n".into(),
        ..ClusterOptions::default()
    };
    let report = reported("kill -9 of each in turn", options, async |cluster| {
        let writer = rotating_writer(cluster, 0)?;
        for _ in 0..3 {
            for role in ONE_AGENT {
                writer.wait_for_more(3000).await?;
                cluster.kill9(role)?;
                // Lines and a rotation that it doesn't see.
                writer.wait_for_more(2000).await?;
                restart(cluster, role).await?;
            }
        }
        // Enough for several files, however the minutes share them.
        writer.wait_for_more(20_000).await?;
        stop(writer)
    })
    .await?;
    ensure!(report.files > report.hours, "no file was closed for its size: {report}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn all_are_killed_at_the_same_time_and_started_in_the_wrong_order() -> Result<()> {
    scenario("kill -9 of all", ClusterOptions::default(), async |cluster| {
        let writer = rotating_writer(cluster, 0)?;
        for _ in 0..3 {
            writer.wait_for_more(4000).await?;
            for role in [Role::Root(0), Role::Edge(0), Role::Agent(0)] {
                cluster.kill9(role)?;
            }
            for role in ONE_AGENT {
                cluster.start_node(role)?;
                writer.wait_for_more(1000).await?;
            }
            for role in ONE_AGENT {
                cluster.wait_until_ready(role).await?;
            }
        }
        stop(writer)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn all_local_state_is_deleted_between_stop_and_start() -> Result<()> {
    scenario("local state deleted", ClusterOptions::default(), async |cluster| {
        let writer = rotating_writer(cluster, 0)?;
        for kill in [false, true] {
            writer.wait_for_more(6000).await?;
            for role in ONE_AGENT {
                if kill { cluster.kill9(role)? } else { cluster.stop(role).await? }
            }
            writer.wait_for_more(3000).await?;
            for role in ONE_AGENT {
                cluster.wipe_state(role)?;
                cluster.start_node(role)?;
            }
            for role in ONE_AGENT {
                cluster.wait_until_ready(role).await?;
            }
        }
        writer.wait_for_more(3000).await?;
        stop(writer)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn two_agents_two_edges_and_a_mid_tier_with_a_kill_of_each() -> Result<()> {
    let options = ClusterOptions { agents: 2, edges: 2, mids: 1, ..ClusterOptions::default() };
    scenario("three tiers", options, async |cluster| {
        let writers = [rotating_writer(cluster, 0)?, rotating_writer(cluster, 1)?];
        for role in [Role::Edge(0), Role::Mid(0), Role::Edge(1), Role::Root(0), Role::Agent(1), Role::Mid(0)] {
            writers[0].wait_for_more(3000).await?;
            cluster.kill9(role)?;
            writers[0].wait_for_more(3000).await?;
            cluster.wipe_state(role)?;
            restart(cluster, role).await?;
        }
        let [first, second] = writers;
        let mut written = stop(first)?;
        written.extend(stop(second)?);
        Ok(written)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_spool_holds_what_comes_while_the_root_is_down_and_the_files_what_comes_while_the_edge_is() -> Result<()> {
    scenario("aggregators down for a while", ClusterOptions::default(), async |cluster| {
        let writer = rotating_writer(cluster, 0)?;
        for role in [Role::Root(0), Role::Edge(0)] {
            writer.wait_for_more(3000).await?;
            cluster.stop(role).await?;
            writer.wait_for_more(30_000).await?;
            restart(cluster, role).await?;
            // Only now is it sure that the downtime is over for the agent, too.
            writer.pause().await?;
            cluster.wait_until_committed(0, &log(cluster, 0)).await?;
            writer.resume();
        }
        stop(writer)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_sleeps_and_wakes_up_does_no_harm() -> Result<()> {
    scenario("SIGSTOP and SIGCONT", ClusterOptions::default(), async |cluster| {
        let writer = rotating_writer(cluster, 0)?;
        for role in ONE_AGENT {
            writer.wait_for_more(3000).await?;
            cluster.signal(role, Signal::STOP)?;
            writer.wait_for_more(9000).await?;
            cluster.signal(role, Signal::CONT)?;
        }
        writer.wait_for_more(3000).await?;
        stop(writer)
    })
    .await
}

/// What copytruncate destroys between the last read and the truncation nobody can ship: so the writer pauses for it.
#[tokio::test(flavor = "multi_thread")]
async fn copytruncate_under_a_writer_that_pauses_for_it() -> Result<()> {
    let options = ClusterOptions { include: "access.log".into(), ..ClusterOptions::default() };
    scenario("copytruncate", options, async |cluster| {
        let options = WriterOptions { per_second: 3000, ..WriterOptions::new(log(cluster, 0), copy(cluster, 0)) };
        let writer = Writer::start(options)?;
        let options =
            LogrotateOptions { compress: Compress::No, ..LogrotateOptions::new(log(cluster, 0), Method::CopyTruncate) };
        let mut logrotate = Logrotate::new(&options)?;
        for round in 0..4 {
            writer.wait_for_more(4000).await?;
            writer.pause().await?;
            cluster.wait_until_committed(0, &log(cluster, 0)).await?;
            logrotate.rotate().await?;
            writer.resume();
            if round == 1 {
                // Truncated and grown again while nobody looks.
                cluster.kill9(Role::Agent(0))?;
                writer.wait_for_more(3000).await?;
                restart(cluster, Role::Agent(0)).await?;
            }
        }
        ensure!(cluster.log_dir(0).join("access.log.4").exists(), "it was rotated");
        stop(writer)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_of_days_is_shipped_by_run_once() -> Result<()> {
    scenario("backlog by run --once", ClusterOptions::default(), async |cluster| {
        cluster.stop(Role::Agent(0)).await?;
        cluster.wipe_state(Role::Agent(0))?;
        let begin = now() - 2 * 86_400;
        // Lines of forty minutes, of which some come too early or too late by minutes, as from programs with many threads.
        let second = |serial: u64| begin + (serial / 40) as i64 - (serial % 7 * (serial % 3) * 20) as i64;
        for file in 0..4 {
            write_lines(
                &cluster.log_dir(0).join(format!("access.log.{file}")),
                file * 25_000..(file + 1) * 25_000,
                second,
            )?;
        }
        // An unterminated last line is a line too.
        let last = cluster.log_dir(0).join("access.log");
        write_lines(&last, 100_000..100_010, second)?;
        let length = fs::metadata(&last)?.len();
        OpenOptions::new().write(true).open(&last)?.set_len(length - 1)?;
        cluster.run_agent_once(0).await?;
        // Once more finds nothing to do.
        cluster.run_agent_once(0).await?;
        Ok((0..4).map(|file| cluster.log_dir(0).join(format!("access.log.{file}"))).chain([last]).collect())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_deleted_while_it_is_read_is_read_to_its_end() -> Result<()> {
    scenario("deleted while read", ClusterOptions::default(), async |cluster| {
        let path = log(cluster, 0);
        let copy = copy(cluster, 0);
        let second = now();
        write_lines(&path, 0..2000, |_| second)?;
        cluster.wait_until_committed(0, &log(cluster, 0)).await?;
        // The edge is down, so nothing of what follows can have been shipped when the file is deleted.
        cluster.stop(Role::Edge(0)).await?;
        write_lines(&path, 2000..40_000, |_| second)?;
        fs::copy(&path, &copy)?;
        fs::remove_file(&path)?;
        write_lines(&path, 40_000..41_000, |_| second)?;
        restart(cluster, Role::Edge(0)).await?;
        Ok(vec![copy, path])
    })
    .await
}
