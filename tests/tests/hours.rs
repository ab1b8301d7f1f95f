//! Hours are complete when every agent is past them: the idle one, the new one, the one that was away, and the one that finds a
//! file late; also days, quarters of an hour, and hours of last week. One that dies for ever is waited for as long as it was
//! said, and named. On real processes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use rustix::process::Signal;
use serde_json::Value;
use tributary_tests::cluster::{Cluster, ClusterOptions, Role};
use tributary_tests::judge::{Report, Scenario};
use tributary_tests::proxy::Fault;
use tributary_tests::published::{Published, read};
use tributary_tests::readers::Reader;
use tributary_tests::scenario::{judged, log, reported, restart, stop_all, writers};
use tributary_tests::synthetic::AccessLog;
use tributary_tests::wait::until;

const LIMIT: Duration = Duration::from_secs(300);

/// Asked from the edge's machine: any node of the topology will do.
const HERE: Role = Role::Edge(0);

async fn json(cluster: &Cluster, arguments: &[&str]) -> Result<Value> {
    let (_, text) = cluster.ask(HERE, arguments).await?;
    serde_json::from_str(&text).with_context(|| format!("{arguments:?}: {text:?}"))
}

/// Waits until the roots know these agents: from then on hours wait for them.
async fn until_known(cluster: &Cluster, agents: &[usize]) -> Result<()> {
    until("the agents to be known", LIMIT, async || {
        let listed = json(cluster, &["agents", "list", "--json"]).await?;
        let listed = listed["agents"].as_array().context("no list of agents")?;
        let known =
            |agent: &usize| listed.iter().any(|one| one["host"] == format!("web-{agent}") && one["heard"] == true);
        Ok(agents.iter().all(known).then_some(()))
    })
    .await
}

/// The hosts that an hour waits for, when it is open and over; else none.
async fn waits_for(cluster: &Cluster, start_s: i64) -> Result<Option<BTreeSet<String>>> {
    let shown = json(cluster, &["hours", "--json", "--category", cluster.category()]).await?;
    let hours = shown["hours"].as_array().context("no list of hours")?;
    let Some(hour) = hours.iter().find(|hour| hour["bucket_start_s"] == start_s && hour["state"] == "open") else {
        return Ok(None);
    };
    let agents = hour["agents"].as_array().context("no list of agents")?;
    Ok(Some(agents.iter().filter_map(|agent| agent["host"].as_str().map(str::to_owned)).collect()))
}

/// Where the minute of a moment is published, below the sink.
fn minute_folder(cluster: &Cluster, second: i64) -> Result<String> {
    folder(cluster, second, "dt=%Y-%m-%d/hm=%H%M")
}

fn folder(cluster: &Cluster, second: i64, form: &str) -> Result<String> {
    let moment = Timestamp::from_second(second)?.to_zoned(TimeZone::UTC);
    Ok(format!("{}/{}", cluster.category(), moment.strftime(form)))
}

/// Lines of an access log, one each `step` seconds.
fn lines(first_serial: u64, seconds: std::ops::Range<i64>, step: usize) -> Vec<u8> {
    let (mut log, mut text) = (AccessLog::default(), Vec::new());
    for (serial, second) in (first_serial..).zip(seconds.step_by(step)) {
        log.line(serial, second, &mut text);
    }
    text
}

/// Fails when something of one of these buckets came too late.
fn nothing_is_late(report: &Report, folders: &[String]) -> Result<()> {
    let late = |path: &&String| folders.iter().any(|folder| path.starts_with(folder.as_str()));
    let late: Vec<&String> = report.late_files.iter().filter(late).collect();
    ensure!(late.is_empty(), "{late:?}");
    Ok(())
}

fn now_s() -> i64 {
    Timestamp::now().as_second()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_hour_waits_for_the_idle_agent_and_has_what_a_new_one_brings_and_what_is_found_late() -> Result<()> {
    let options = ClusterOptions { agents: 4, lanes: 2, ..ClusterOptions::default() };
    let mut held = Vec::new();
    let report = reported("hours: idle, new, found late", options, async |cluster| {
        // Of the same lane: one whose agents are all past the minute seals it, whomever another lane waits for.
        let (idle, new) = (1, 3);
        ensure!(
            cluster.lane_of_agent(idle) == cluster.lane_of_agent(new),
            "the idle agent does not hold the new one's lane"
        );
        // As if it had never been there.
        cluster.kill9(Role::Agent(new))?;
        cluster.wipe_state(Role::Agent(new))?;
        let writers = writers(cluster, 1, 200)?;
        writers[0].wait_for_more(200).await?;
        until_known(cluster, &[0, idle, 2]).await?;

        // In the middle of a minute that the idle agent does not let pass, a new one comes with lines of it.
        cluster.signal(Role::Agent(idle), Signal::STOP)?;
        let minute = now_s() / 60 * 60;
        let mut written = vec![log(cluster, new)];
        fs::write(&written[0], lines(1_000_000_000, minute..minute + 40, 1))?;
        restart(cluster, Role::Agent(new)).await?;
        cluster.wait_until_committed(new, &written[0]).await?;
        until("the minute to wait for the idle agent alone", LIMIT, async || {
            let alone = BTreeSet::from([format!("web-{idle}")]);
            Ok((waits_for(cluster, minute).await? == Some(alone)).then_some(()))
        })
        .await?;

        // The others have said that they are past it. One of them finds more.
        let late = cluster.log_dir(new).join("access.log.found");
        fs::write(&late, lines(2_000_000_000, minute..minute + 60, 1))?;
        cluster.wait_until_committed(new, &late).await?;
        written.push(late);
        let folder = minute_folder(cluster, minute)?;
        ensure!(!Published::look(&cluster.sink()).await?.hours.contains_key(&folder), "one agent is not past it");
        cluster.signal(Role::Agent(idle), Signal::CONT)?;
        until("the minute to be published", LIMIT, async || {
            Ok(Published::look(&cluster.sink()).await?.hours.contains_key(&folder).then_some(()))
        })
        .await?;
        held.push(folder);
        written.extend(stop_all(writers)?);
        Ok(written)
    })
    .await?;
    nothing_is_late(&report, &held)
}

#[tokio::test(flavor = "multi_thread")]
async fn hours_wait_for_agents_that_are_cut_off_and_are_whole_when_they_are_back() -> Result<()> {
    let options = ClusterOptions { agents: 2, edges: 2, lanes: 2, proxies: true, ..ClusterOptions::default() };
    let mut held = Vec::new();
    let report = reported("hours: cut off for hours", options, async |cluster| {
        let writers = writers(cluster, 2, 200)?;
        until_known(cluster, &[0, 1]).await?;
        for writer in &writers {
            writer.wait_for_more(200).await?;
        }
        let edges = [Role::Edge(0), Role::Edge(1)];
        for edge in edges {
            cluster.proxy(edge)?.set(Fault::Cut);
        }
        // Two whole minutes go by, for the writers as well.
        let first = now_s() / 60 * 60 + 60;
        while now_s() < first + 130 {
            writers[0].wait_for_more(200).await?;
        }
        for minute in [first, first + 60] {
            let folder = minute_folder(cluster, minute)?;
            ensure!(!Published::look(&cluster.sink()).await?.hours.contains_key(&folder), "{folder} can't be complete");
            held.push(folder);
        }
        for edge in edges {
            cluster.proxy(edge)?.set(Fault::None);
        }
        until("what was waited for to be published", LIMIT, async || {
            let published = Published::look(&cluster.sink()).await?;
            Ok(held.iter().all(|folder| published.hours.contains_key(folder)).then_some(()))
        })
        .await?;
        stop_all(writers)
    })
    .await?;
    nothing_is_late(&report, &held)
}

/// An agent dies for ever, with all stored that it had read. The minute in which that was, and those after it, wait for
/// `give_up_after` and are published without it; and say so.
async fn dead_for_ever(on_missing: &str) -> Result<()> {
    const DEAD: usize = 1;
    const GIVE_UP_AFTER_S: i64 = 60;
    let succeeds = on_missing == "publish";
    let options = ClusterOptions {
        agents: 2,
        lanes: 2,
        root_lines: format!("give_up_after = \"{GIVE_UP_AFTER_S}s\"\non_missing = \"{on_missing}\"\n"),
        ..ClusterOptions::default()
    };
    let scenario = Scenario::new(&format!("hours: dead for ever, {on_missing}"), &[Reader::Zcat]);
    let report = judged(scenario.without(&["web-1"], succeeds), options, async |cluster| {
        let writers = writers(cluster, 1, 200)?;
        until_known(cluster, &[0, DEAD]).await?;
        until("a minute with time left", LIMIT, async || Ok((now_s() % 60 < 30).then_some(()))).await?;
        let minute = now_s() / 60 * 60;
        let dead = log(cluster, DEAD);
        fs::write(&dead, lines(1_000_000_000, minute..minute + 30, 1))?;
        cluster.wait_until_committed(DEAD, &dead).await?;
        cluster.kill9(Role::Agent(DEAD))?;
        ensure!(now_s() < minute + 60, "it took so long that the agent may have been past the minute");

        until("the minute to wait for the dead agent alone", LIMIT, async || {
            let alone = BTreeSet::from(["web-1".to_owned()]);
            Ok((waits_for(cluster, minute).await? == Some(alone)).then_some(()))
        })
        .await?;
        let folder = minute_folder(cluster, minute)?;
        let hour = until("the minute to be published", LIMIT, async || {
            Ok(Published::look(&cluster.sink()).await?.hours.remove(&folder))
        })
        .await?;
        ensure!(now_s() >= minute + 60 + GIVE_UP_AFTER_S, "it was not waited for the agent");
        ensure!(hour.success == succeeds && hour.partial, "{hour:?}");
        let json_of = async |name: &str| -> Result<Value> {
            Ok(serde_json::from_slice(&read(&cluster.sink(), &format!("{folder}/{name}")).await?)?)
        };
        let (manifest, partial) = (json_of("_MANIFEST.json").await?, json_of("_PARTIAL.json").await?);
        for said in [&manifest["missing"], &partial["missing"]] {
            ensure!(said.as_array().is_some_and(|said| said.len() == 1) && said[0]["host"] == "web-1", "{said}");
        }
        ensure!(manifest["complete"] == false, "{manifest:#}");
        let agent = manifest["missing"][0]["agent"].as_str().context("an agent has a name")?;
        ensure!(manifest["agents"][agent]["records"] == 30, "what was stored of the dead agent is there: {manifest:#}");

        let shown = json(cluster, &["hours", "--json", "--category", cluster.category()]).await?;
        let hours = shown["hours"].as_array().context("no list of hours")?;
        let shown = hours.iter().find(|hour| hour["bucket_start_s"] == minute).context("the minute is not listed")?;
        ensure!(shown["state"] == "partial" && shown["agents"][0]["host"] == "web-1", "{shown:#}");
        let moment = Timestamp::from_second(minute)?.to_string();
        let wait = ["hours", "wait", "--category", cluster.category(), "--hour", &moment, "--timeout", "20s"];
        let (code, told) = cluster.ask(HERE, &wait).await?;
        ensure!(code == Some(2), "hours wait ends with {code:?}: {told}");

        // Nothing waits for it any more. What was published stays as it is.
        let (code, told) = cluster.ask(HERE, &["agents", "retire", "web-1"]).await?;
        ensure!(code == Some(0), "agents retire ends with {code:?}: {told}");
        let mut written = stop_all(writers)?;
        written.push(dead);
        Ok(written)
    })
    .await?;
    ensure!(report.late_files.is_empty(), "{:?}", report.late_files);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_hour_is_published_without_an_agent_that_died_for_ever_and_names_it() -> Result<()> {
    dead_for_ever("partial").await
}

#[tokio::test(flavor = "multi_thread")]
async fn where_readers_want_it_an_hour_without_a_dead_agent_has_its_success_file_too() -> Result<()> {
    dead_for_ever("publish").await
}

/// Two agents find the logs of `from..to`, seconds before a week ago's midnight; each bucket is published with what is its own.
async fn backlog(bucket: &str, bucket_s: i64, form: &str, span_s: i64) -> Result<()> {
    let options = ClusterOptions { agents: 2, roots: 2, lanes: 3, bucket: bucket.into(), ..ClusterOptions::default() };
    let mut folders = Vec::new();
    let report = reported(&format!("hours: a backlog in {bucket}"), options, async |cluster| {
        until_known(cluster, &[0, 1]).await?;
        // Killed, they still count, and so no bucket is complete before both have read what is there when they are back.
        for agent in 0..2 {
            cluster.kill9(Role::Agent(agent))?;
        }
        let midnight = now_s() / 86_400 * 86_400 - 7 * 86_400;
        let mut expected = BTreeMap::<String, u64>::new();
        let mut written = Vec::new();
        for agent in 0..2_i64 {
            let seconds = midnight + 1000 * agent..midnight + span_s + 1000 * agent;
            for second in seconds.clone().step_by(20) {
                *expected.entry(folder(cluster, second / bucket_s * bucket_s, form)?).or_default() += 1;
            }
            let path = log(cluster, agent as usize);
            fs::write(&path, lines(1_000_000_000 * agent as u64, seconds, 20))?;
            written.push(path);
        }
        for agent in 0..2 {
            restart(cluster, Role::Agent(agent)).await?;
        }
        let found = until("the backlog to be published", LIMIT, async || {
            let published = Published::look(&cluster.sink()).await?;
            let lines: u64 = expected.values().sum();
            Ok((published.records() >= lines).then_some(published))
        })
        .await?;
        for (folder, lines) in &expected {
            let hour = found.hours.get(folder).with_context(|| format!("{folder} is not there"))?;
            let records = hour.records();
            ensure!(hour.success && records == *lines, "{folder}: {records} of {lines} records; {hour:?}");
        }
        folders.extend(expected.into_keys());
        Ok(written)
    })
    .await?;
    nothing_is_late(&report, &folders)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_of_last_week_is_published_in_quarters_of_an_hour() -> Result<()> {
    backlog("15m", 900, "dt=%Y-%m-%d/hm=%H%M", 3 * 3600).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_of_last_week_is_published_in_hours() -> Result<()> {
    backlog("1h", 3600, "dt=%Y-%m-%d/hr=%H", 30 * 3600).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_of_last_week_is_published_in_days() -> Result<()> {
    backlog("1d", 86_400, "dt=%Y-%m-%d", 3 * 86_400).await
}
