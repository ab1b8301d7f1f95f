//! The commands about agents: which ones the hours wait for, and to wait for one no more.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Subcommand;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use tributary_common::exit::UsageError;
use tributary_common::ids::CategoryName;
use tributary_common::messages::{AGENTS_PATH, RETIRE_PATH};
use tributary_common::topology::Topology;

use crate::config::NodeConfig;
use crate::operate::Retire;

/// How long one root is waited for.
const TIMEOUT: Duration = Duration::from_secs(10);

/// `agents …`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the agents that hours wait for, of all lanes.
    ///
    /// Asks all roots of the topology. Exit code 1 when some lane could not be asked: the list may then lack agents.
    #[command(after_help = "Example:\n  tributary-aggregator agents list --config /etc/tributary/aggregator.toml")]
    List {
        /// The configuration of any node: its topology says where the roots are.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// As JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Wait no more for an agent that is gone for ever, so that its hours become complete.
    ///
    /// What it had not shipped is lost. Of that, the manifests of the hours that come name as losses what it had told of; what it had
    /// not told of, nobody knows. One that reports again afterwards is expected again from then on. For a server that lives and has
    /// no logs of some category any more, name that one: it does so without the agent, and the others still wait for it. It asks
    /// all roots, from a machine of the topology. Exit code 1 when some lane could not be asked, or when no lane knows the agent:
    /// run it again. 64 when several agents have that host name: name the one that is gone by its id.
    #[command(
        after_help = "Examples:\n  tributary-aggregator agents retire web-17 --config /etc/tributary/aggregator.toml\n  \
                      tributary-aggregator agents retire web-17 --category nginx-access --config /etc/tributary/aggregator.toml"
    )]
    Retire {
        /// The agent's host name or its id.
        #[arg(value_name = "HOST")]
        agent: String,
        /// In this category only; default: in all.
        #[arg(long, value_name = "CATEGORY")]
        category: Option<CategoryName>,
        /// The configuration of any node: its topology says where the roots are.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
}

/// Runs the command. Returns whether everything was reached and found.
///
/// # Errors
/// When the configuration is wrong or nothing can be written.
pub async fn run(command: &Command, out: &mut impl Write) -> anyhow::Result<bool> {
    match command {
        Command::List { config, json } => list(&NodeConfig::load(config)?.topology, *json, out).await,
        Command::Retire { agent, category, config } => {
            retire(&NodeConfig::load(config)?.topology, agent, category.as_ref(), out).await
        }
    }
}

/// What the roots of a topology answer, by node; what went wrong is in words.
pub(crate) async fn ask_roots(
    topology: &Topology,
    request: impl Fn(&reqwest::Client, &tributary_common::http::endpoint::Endpoint) -> reqwest::RequestBuilder,
) -> anyhow::Result<(Vec<Value>, Vec<String>)> {
    let client = reqwest::Client::builder().no_proxy().timeout(TIMEOUT).build()?;
    let (mut answers, mut failed) = (Vec::new(), Vec::new());
    for node in &topology.root_tier().nodes {
        let asked = async { request(&client, &node.endpoint).send().await?.error_for_status()?.json::<Value>().await };
        match asked.await {
            Ok(answer) => answers.push(answer),
            Err(error) => failed.push(format!("{}: {:#}", node.name, anyhow::Error::from(error))),
        }
    }
    Ok((answers, failed))
}

/// The lanes of a topology that no root has answered for.
pub(crate) fn lanes_left(topology: &Topology, answered: &BTreeSet<String>) -> Vec<String> {
    let all = topology.lanes().lanes().map(|lane| lane.to_string());
    all.filter(|lane| !answered.contains(lane)).collect()
}

/// Says which lanes are missing from what was written before.
pub(crate) fn warn_of(left: &[String], failed: &[String]) {
    for error in failed {
        eprintln!("warning: a root can't be asked: {error}");
    }
    if !left.is_empty() {
        eprintln!(
            "warning: no root that answers serves lane {}; it may be on its way to another one: try again in a minute",
            left.join(", ")
        );
    }
}

async fn list(topology: &Topology, as_json: bool, out: &mut impl Write) -> anyhow::Result<bool> {
    let (answers, failed) = ask_roots(topology, |client, node| client.get(node.url(AGENTS_PATH))).await?;
    let (mut lanes, mut rows) = (BTreeSet::new(), Vec::new());
    for (lane, members) in answers.iter().filter_map(|answer| answer["lanes"].as_object()).flatten() {
        if lanes.insert(lane.clone()) {
            for member in members.as_array().into_iter().flatten() {
                let mut row = member.clone();
                row["lane"] = json!(lane.parse::<u16>().context("a lane's number")?);
                rows.push(row);
            }
        }
    }
    rows.sort_by_key(|row| (row["host"].to_string(), row["agent"].to_string(), row["category"].to_string()));
    let left = lanes_left(topology, &lanes);
    if as_json {
        writeln!(out, "{:#}", json!({ "agents": rows, "lanes_not_asked": left }))?;
    } else {
        let now_ms = Timestamp::now().as_millisecond();
        writeln!(
            out,
            "{:<24} {:<24} {:<20} {:>4}  {:<12} {:<20}  waits for",
            "HOST", "AGENT", "CATEGORY", "LANE", "HEARD", "COMPLETE TO"
        )?;
        for row in &rows {
            let text = |field: &str| row[field].as_str().unwrap_or("-").to_owned();
            let heard = match (row["heard"].as_bool(), row["heard_ms"].as_i64()) {
                (Some(true), Some(ms)) => format!("{} ago", ago(now_ms - ms)),
                _ => "not yet".into(),
            };
            let complete = row["complete_to_ms"].as_i64().map_or_else(|| "-".into(), moment);
            let streams = row["uncommitted_streams"].as_u64().unwrap_or(0);
            let reason = match (row["reason"].as_str().unwrap_or(""), streams) {
                ("", 0) => String::new(),
                ("", streams) => format!("{streams} files"),
                (reason, _) => reason.to_owned(),
            };
            writeln!(
                out,
                "{:<24} {:<24} {:<20} {:>4}  {heard:<12} {complete:<20}  {reason}",
                text("host"),
                text("agent"),
                text("category"),
                row["lane"]
            )?;
        }
    }
    warn_of(&left, &failed);
    Ok(left.is_empty())
}

/// The id of the agent that is called `name`, by its id or its host name, by what the roots answer; none when no lane knows it, in
/// this category if one is given.
///
/// # Errors
/// When several agents are called so: one of them may be alive, and what it has named would be declared lost.
fn whom(answers: &[Value], name: &str, category: Option<&CategoryName>) -> Result<Option<String>, UsageError> {
    let members = answers.iter().filter_map(|answer| answer["lanes"].as_object()).flatten();
    let members = members.flat_map(|(_, members)| members.as_array().into_iter().flatten());
    let mut called: BTreeMap<&str, &str> = BTreeMap::new();
    for member in members.filter(|member| category.is_none_or(|one| member["category"] == one.as_str())) {
        let (id, host) = (member["agent"].as_str().unwrap_or_default(), member["host"].as_str().unwrap_or_default());
        if id == name || host == name {
            called.insert(id, host);
        }
    }
    if called.len() > 1 {
        let ids: Vec<String> = called.iter().map(|(id, host)| format!("{id} (host {host})")).collect();
        return Err(UsageError(format!(
            "{} agents are called {name}: {}; none was retired. Name the one that is gone by its id: tributary-aggregator agents \
             list says when each was heard",
            ids.len(),
            ids.join(", ")
        )));
    }
    Ok(called.into_keys().next().map(str::to_owned))
}

async fn retire(
    topology: &Topology,
    agent: &str,
    category: Option<&CategoryName>,
    out: &mut impl Write,
) -> anyhow::Result<bool> {
    if agent.is_empty() {
        bail!("name the agent by its host name or its id: tributary-aggregator agents list shows them");
    }
    let (known, mut failed) = ask_roots(topology, |client, node| client.get(node.url(AGENTS_PATH))).await?;
    let mut lanes: BTreeSet<String> =
        known.iter().filter_map(|answer| answer["lanes"].as_object()).flat_map(|lanes| lanes.keys().cloned()).collect();
    let mut found = 0;
    if let Some(id) = whom(&known, agent, category)? {
        let body = serde_json::to_vec(&Retire { agent: id, category: category.cloned() })?;
        let retired = ask_roots(topology, |client, node| client.post(node.url(RETIRE_PATH)).body(body.clone())).await?;
        failed = retired.1;
        lanes.clear();
        for (lane, count) in retired.0.iter().filter_map(|answer| answer["lanes"].as_object()).flatten() {
            if let Some(count) = count.as_u64() {
                lanes.insert(lane.clone());
                found += count;
                if count > 0 {
                    writeln!(out, "lane {lane}: {agent} is waited for no more, in {count} categories")?;
                }
            }
        }
    }
    let left = lanes_left(topology, &lanes);
    if found == 0 {
        writeln!(
            out,
            "no lane that could be asked waits for {agent}: tributary-aggregator agents list shows whom they wait for"
        )?;
    }
    warn_of(&left, &failed);
    Ok(left.is_empty() && found > 0)
}

/// A time span in the largest unit that says enough.
pub(crate) fn ago(ms: i64) -> String {
    let seconds = SignedDuration::from_millis(ms.max(0)).as_secs();
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A moment, to the second.
pub(crate) fn moment(ms: i64) -> String {
    Timestamp::from_millisecond(ms)
        .map_or_else(|_| ms.to_string(), |time| time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(lane: &str, members: &[(&str, &str)]) -> Value {
        let members: Vec<Value> =
            members.iter().map(|(id, host)| json!({ "agent": id, "host": host, "category": "app" })).collect();
        json!({ "lanes": { lane: members } })
    }

    #[test]
    fn an_agent_is_retired_by_a_host_name_only_if_no_other_one_has_it() {
        // The machine web-1 was made anew, with another id, in another lane.
        let answers =
            [answer("0", &[("a1", "web-1"), ("a1", "web-1"), ("b1", "web-2")]), answer("1", &[("a2", "web-1")])];
        let whom = |name| whom(&answers, name, None);
        assert_eq!(whom("web-2"), Ok(Some("b1".into())));
        assert_eq!(whom("a2"), Ok(Some("a2".into())));
        assert_eq!(whom("web-3"), Ok(None));
        let refused = whom("web-1").expect_err("it is not known which one is gone").to_string();
        assert!(refused.contains("a1 (host web-1), a2 (host web-1)"), "{refused}");
    }

    #[test]
    fn an_id_that_is_another_agents_host_name_is_not_retired_by_it() {
        let answers = [answer("0", &[("web-1", "web-1.old"), ("a2", "web-1")])];
        assert!(whom(&answers, "web-1", None).is_err(), "the roots would retire both");
    }

    #[test]
    fn an_agent_is_retired_in_a_category_only_if_it_is_expected_there() {
        let answers = [answer("0", &[("a1", "web-1")])];
        let category = |name: &str| -> CategoryName { name.parse().expect("valid") };
        assert_eq!(whom(&answers, "web-1", Some(&category("app"))), Ok(Some("a1".into())));
        assert_eq!(whom(&answers, "web-1", Some(&category("db"))), Ok(None));
    }
}
