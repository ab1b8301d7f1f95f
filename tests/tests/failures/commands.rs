//! The commands by which operators and schedulers see hours and agents, on real processes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use serde_json::Value;
use tributary_tests::cluster::{Cluster, ClusterOptions, Role};
use tributary_tests::scenario::{log, restart, scenario, stop, stop_all, writers};
use tributary_tests::wait::until;

const LIMIT: Duration = Duration::from_secs(180);

/// Asked from an edge's machine: any node of the topology will do.
const HERE: Role = Role::Edge(0);

async fn json(cluster: &Cluster, arguments: &[&str]) -> Result<(Option<i32>, Value)> {
    let (code, text) = cluster.ask(HERE, arguments).await?;
    Ok((code, serde_json::from_str(&text).with_context(|| format!("{arguments:?}: {text:?}"))?))
}

/// An hour as `hours` shows it, and the exit code.
async fn hour(cluster: &Cluster, start_s: i64) -> Result<(Option<i32>, Option<Value>)> {
    let (code, shown) = json(cluster, &["hours", "--json", "--category", cluster.category()]).await?;
    let hours = shown["hours"].as_array().context("no list of hours")?;
    Ok((code, hours.iter().find(|hour| hour["bucket_start_s"] == start_s).cloned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_hour_waits_for_an_agent_that_died_for_ever_until_that_is_retired() -> Result<()> {
    let options = ClusterOptions { agents: 2, roots: 2, lanes: 2, ..ClusterOptions::default() };
    scenario("hours and agents", options, async |cluster| {
        let mut writers = writers(cluster, 2, 1000)?;
        for writer in &writers {
            writer.wait_for_more(2000).await?;
        }
        until("both agents to be listed", LIMIT, async || {
            let (code, listed) = json(cluster, &["agents", "list", "--json"]).await?;
            let agents = listed["agents"].as_array().context("no list of agents")?;
            let heard = |host: &str| agents.iter().any(|one| one["host"] == host && one["heard"] == true);
            Ok((code == Some(0) && heard("web-0") && heard("web-1")).then_some(()))
        })
        .await?;

        // All that it wrote is stored, but that there is no more only it could say.
        let mut written = stop(writers.pop().context("two writers")?)?;
        cluster.wait_until_committed(1, &log(cluster, 1)).await?;
        cluster.kill9(Role::Agent(1))?;
        let start_s = Timestamp::now().as_second() / 60 * 60;
        let moment = Timestamp::from_second(start_s)?.strftime("%Y-%m-%dT%H:%M").to_string();
        let wait =
            ["hours", "wait", "--category", cluster.category(), "--hour", &moment, "--timeout"].map(str::to_owned);
        let wait_for = async |cluster: &Cluster, time: &str| -> Result<Option<i32>> {
            let arguments: Vec<&str> = wait.iter().map(String::as_str).chain([time]).collect();
            Ok(cluster.ask(HERE, &arguments).await?.0)
        };
        until("the hour to wait for the dead agent alone", LIMIT, async || {
            let (code, shown) = hour(cluster, start_s).await?;
            let Some(shown) = shown.filter(|_| code == Some(0)) else { return Ok(None) };
            ensure!(shown["state"] == "open", "{shown}");
            let agents = shown["agents"].as_array().context("no list of agents")?;
            let alone = shown["waiting_for"] == 1 && agents.len() == 1 && agents[0]["host"] == "web-1";
            Ok((alone && shown["records"].as_u64() > Some(0)).then_some(()))
        })
        .await?;
        ensure!(wait_for(cluster, "1s").await? == Some(1), "it is not complete");

        ensure!(cluster.ask(HERE, &["agents", "retire", "web-77"]).await?.0 == Some(1), "nobody has that name");
        let (code, said) = cluster.ask(HERE, &["agents", "retire", "web-1"]).await?;
        ensure!(code == Some(0), "{said}");
        ensure!(wait_for(cluster, "10m").await? == Some(0), "nobody is waited for any more");
        let (_, shown) = hour(cluster, start_s).await?;
        let shown = shown.context("the hour is published")?;
        ensure!(shown["state"] == "complete" && shown["files"].as_u64() > Some(0), "{shown}");

        // Without any root the sink still says what is complete, and the command that it doesn't know the rest.
        for number in 0..2 {
            cluster.stop(Role::Root(number)).await?;
        }
        let (code, again) = hour(cluster, start_s).await?;
        ensure!(code == Some(1) && again.as_ref() == Some(&shown), "{again:?}");
        ensure!(wait_for(cluster, "1s").await? == Some(0), "it is complete");
        ensure!(cluster.ask(HERE, &["agents", "list"]).await?.0 == Some(1), "no lane could be asked");
        for number in 0..2 {
            restart(cluster, Role::Root(number)).await?;
        }
        restart(cluster, Role::Agent(1)).await?;
        written.extend(stop_all(writers)?);
        Ok(written)
    })
    .await
}
