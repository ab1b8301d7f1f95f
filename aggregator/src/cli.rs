//! The command line.

use std::io::{self, ErrorKind, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand};
use serde_json::Value;
use tributary_common::config::ConfigErrors;
use tributary_common::exit::{Exit, UsageError};
use tributary_common::ids::LaneCount;
use tributary_common::messages::{DRAIN_PATH, STATUS_PATH};
use tributary_common::telemetry;
use tributary_common::topology::Topology;

use crate::config::NodeConfig;
use crate::node::RunError;
use crate::root::lane::LaneSettings;
use crate::root::recovery::TakeError;
use crate::root::relane::change_lanes;
use crate::{agents, audit, hours, inspect, node};

/// How long the running node is waited for.
const STATUS_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a node that is being emptied is looked at.
const DRAIN_LOOK: Duration = Duration::from_millis(500);

#[derive(Debug, Parser)]
#[command(
    name = "tributary-aggregator",
    version,
    about = "Receives batches of log lines and passes them up; as a root, merges them into large files.",
    after_help = "Exit codes: 0 done, 1 failed, 64 wrong command line, 78 wrong configuration.\n\n\
        Example:\n  tributary-aggregator check --config /etc/tributary/aggregator.toml && \\\n  \
        tributary-aggregator run --config /etc/tributary/aggregator.toml"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run this node, as an edge or a root: the topology says which.
    ///
    /// SIGTERM or Ctrl-C ends it after what is in flight, within drain_timeout; a second one at once.
    #[command(after_help = "Example:\n  tributary-aggregator run --config /etc/tributary/aggregator.toml")]
    Run {
        /// This node's own configuration.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Check this node's configuration and the topology that it names. Reports everything that is wrong.
    #[command(after_help = "Example:\n  tributary-aggregator check --config /etc/tributary/aggregator.toml")]
    Check {
        /// This node's own configuration.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Ask the node that runs here how it is.
    #[command(
        after_help = "Example:\n  tributary-aggregator status --config /etc/tributary/aggregator.toml --json | jq .spool"
    )]
    Status {
        /// This node's own configuration, which says where it listens.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// As JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Empty the node that runs here, and end it: for maintenance.
    ///
    /// An edge takes nothing new, sends its children to its siblings, and ends when all that it holds is committed. A root commits,
    /// closes its files, and leaves its lanes to the other roots. Returns when the node has ended.
    #[command(after_help = "Example:\n  tributary-aggregator drain --config /etc/tributary/aggregator.toml")]
    Drain {
        /// This node's own configuration, which says where it listens.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Show how each hour stands: complete, partial, late or open; what it has, and which agents it waits for.
    ///
    /// Closed hours are read from the sink, open ones asked of all roots. Exit code 1 when some lane could not be asked, or something
    /// can't be read; 64 when there is no such category.
    #[command(
        after_help = "Examples:\n  tributary-aggregator hours --config /etc/tributary/aggregator.toml --category nginx-access\n  \
            tributary-aggregator hours wait --config /etc/tributary/aggregator.toml --category nginx-access --hour 2026-11-22T20"
    )]
    Hours(hours::Options),
    /// See which agents are expected, and expect one no more.
    #[command(subcommand)]
    Agents(agents::Command),
    /// Work with the lanes of the sink.
    #[command(subcommand)]
    Lanes(LanesCommand),
    /// Work with topology files.
    #[command(subcommand)]
    Topology(TopologyCommand),
    /// List the frames of a segment or of a published file, with what they hold, from their headers alone.
    #[command(
        after_help = "Examples:\n  tributary-aggregator inspect --verify /srv/logs/nginx-access/dt=2026-11-22\n  \
            tributary-aggregator inspect hdfs://nn1:8020/logs/nginx-access/dt=2026-11-22/hr=20/part-0.gz"
    )]
    Inspect(inspect::Options),
    /// Prove from the files alone that what is published is whole: no gap, no overlap, nothing missing, foreign or altered.
    ///
    /// Exit code 1 when anything is wrong; each finding says where.
    #[command(after_help = "Examples:\n  tributary-aggregator audit hdfs://nn1:8020/logs --category nginx-access\n  \
            tributary-aggregator audit /srv/logs --hour 2026-11-22T20 --deep")]
    Audit(audit::Options),
}

#[derive(Debug, Subcommand)]
enum LanesCommand {
    /// Change how many lanes the sink has, as when roots are added.
    ///
    /// Stop all roots first; then write the new number into the topology of all nodes, and start the roots. No agent or edge has
    /// to be stopped: they wait. It can be interrupted at any point, and goes on when it is run again.
    #[command(
        after_help = "Example:\n  tributary-aggregator drain --config /etc/tributary/aggregator.toml   # on every root\n  \
            tributary-aggregator lanes set 4 --config /etc/tributary/aggregator.toml"
    )]
    Set {
        /// The new number.
        #[arg(value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
        lanes: u16,
        /// The configuration of a root: its topology says where the sink is.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum TopologyCommand {
    /// Check a topology file and draw the tree.
    #[command(after_help = "Example:\n  tributary-aggregator topology check /etc/tributary/topology.toml")]
    Check {
        /// The topology.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
}

/// Runs the program with the arguments of the process.
pub fn main() -> Exit {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // With nobody to read it there is nobody to tell that either.
            let _ = error.print();
            return Exit::of_command_line(error.exit_code());
        }
    };
    match execute(cli.command) {
        Ok(exit) => exit,
        Err(error) if is_broken_pipe(&error) => Exit::Done,
        Err(error) => {
            let mut stderr = io::stderr().lock();
            match error.downcast_ref::<ConfigErrors>() {
                Some(errors) => {
                    let _ = write!(stderr, "{errors}");
                    Exit::Config
                }
                None => {
                    let _ = writeln!(stderr, "error: {error:#}");
                    if error.is::<UsageError>() { Exit::Usage } else { Exit::Failed }
                }
            }
        }
    }
}

/// Whoever read our output has enough of it.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

fn execute(command: Command) -> anyhow::Result<Exit> {
    match command {
        Command::Run { config } => {
            let config = NodeConfig::load(&config)?;
            telemetry::init(config.log)?;
            let runtime = tokio::runtime::Runtime::new().context("can't start the runtime")?;
            let ended = runtime.block_on(node::run(config));
            // Another try with the same topology would end the same way.
            let misconfigured = matches!(ended, Err(RunError::Base(TakeError::LaneCount { .. })));
            if let Err(error) = &ended {
                tracing::error!(error = %error, "the node can't run");
            }
            // A read or write that hangs in the operating system must not keep the process.
            runtime.shutdown_background();
            Ok(match ended {
                Ok(()) => Exit::Done,
                Err(_) if misconfigured => Exit::Config,
                Err(_) => Exit::Failed,
            })
        }
        Command::Check { config } => {
            let config = NodeConfig::load(&config)?;
            let place = config.place();
            let role = if place.is_root() { "a root" } else { "not a root" };
            writeln!(
                io::stdout(),
                "{}: fine. Node {} of the tier {} ({role}), listens on {}, topology {}",
                config.file().display(),
                config.name,
                place.tier.name,
                config.listen,
                config.topology.fingerprint(),
            )?;
            Ok(Exit::Done)
        }
        Command::Status { config, json } => {
            let config = NodeConfig::load(&config)?;
            let status = blocking(ask_status(reachable(config.listen)))??;
            let mut stdout = io::stdout().lock();
            if json {
                writeln!(stdout, "{status:#}")?;
            } else {
                show(&mut stdout, &status, 0)?;
            }
            Ok(Exit::Done)
        }
        Command::Drain { config } => {
            let config = NodeConfig::load(&config)?;
            blocking(drain(reachable(config.listen)))??;
            writeln!(io::stdout(), "{} is empty and has ended", config.name)?;
            Ok(Exit::Done)
        }
        Command::Hours(options) => blocking(hours::run(&options, &mut io::stdout().lock()))?,
        Command::Agents(command) => {
            let good = blocking(agents::run(&command, &mut io::stdout().lock()))??;
            Ok(if good { Exit::Done } else { Exit::Failed })
        }
        Command::Lanes(LanesCommand::Set { lanes, config }) => {
            let config = NodeConfig::load(&config)?;
            telemetry::init(config.log)?;
            let to = LaneCount::try_from(lanes).map_err(anyhow::Error::msg)?;
            let changed = blocking(async {
                let dfs = node::open_sink(&config).await?;
                anyhow::Ok(change_lanes(&dfs, &LaneSettings::of(&config.topology), to).await?)
            })??;
            let mut stdout = io::stdout().lock();
            if changed.from == changed.to {
                writeln!(stdout, "the sink has {to} lanes; nothing was to be changed")?;
            } else {
                writeln!(stdout, "the sink had {} lanes and has {to}", changed.from)?;
            }
            if config.topology.lanes() != to {
                writeln!(stdout, "now write lanes = {to} into the topology of every node, and start the roots")?;
            }
            Ok(Exit::Done)
        }
        Command::Topology(TopologyCommand::Check { file }) => {
            let topology = Topology::load(&file)?;
            writeln!(io::stdout(), "{}", topology.draw().trim_end())?;
            Ok(Exit::Done)
        }
        Command::Inspect(options) => {
            let damaged = blocking(inspect::run(&options, &mut io::stdout().lock()))??;
            Ok(if damaged { Exit::Failed } else { Exit::Done })
        }
        Command::Audit(options) => {
            let good = blocking(audit::run(&options, &mut io::stdout().lock()))??;
            Ok(if good { Exit::Done } else { Exit::Failed })
        }
    }
}

fn blocking<T>(work: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.context("can't start the runtime")?.block_on(work))
}

/// An address by which a node that listens on all interfaces is reached from its own machine.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

async fn ask_status(address: SocketAddr) -> anyhow::Result<Value> {
    let url = format!("http://{address}{STATUS_PATH}");
    let client = reqwest::Client::builder().no_proxy().timeout(STATUS_TIMEOUT).build()?;
    let asked = async { client.get(&url).send().await?.error_for_status()?.json().await };
    asked.await.with_context(|| format!("can't ask the node at {url}; is it running?"))
}

/// Tells a node to empty itself, shows what it still holds, and returns when nobody answers there any more.
async fn drain(address: SocketAddr) -> anyhow::Result<()> {
    let url = format!("http://{address}{DRAIN_PATH}");
    let client = reqwest::Client::builder().no_proxy().timeout(STATUS_TIMEOUT).build()?;
    let asked = async { client.post(&url).send().await?.error_for_status() };
    asked.await.with_context(|| format!("can't ask the node at {url}; is it running?"))?;
    let mut shown = None;
    loop {
        let status: Value = match client.get(format!("http://{address}{STATUS_PATH}")).send().await {
            Ok(response) => response.json().await.unwrap_or_default(),
            Err(error) if error.is_timeout() => continue,
            Err(_) => return Ok(()),
        };
        let left = status["spool"]["batches"].as_u64();
        if let Some(left) = left.filter(|left| shown.replace(*left) != Some(*left)) {
            writeln!(io::stdout(), "{left} batches are not committed yet")?;
        }
        tokio::time::sleep(DRAIN_LOOK).await;
    }
}

/// Writes a JSON value as indented lines for people.
fn show(out: &mut impl Write, value: &Value, depth: usize) -> io::Result<()> {
    let pad = "  ".repeat(depth);
    let line = |out: &mut dyn Write, key: &str, value: &Value| match value {
        Value::String(text) => writeln!(out, "{pad}{key}: {text}"),
        Value::Null => writeln!(out, "{pad}{key}: -"),
        other => writeln!(out, "{pad}{key}: {other}"),
    };
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let nested = match value {
                    Value::Object(fields) => !fields.is_empty(),
                    Value::Array(items) => items.iter().any(|item| item.is_object() || item.is_array()),
                    _ => false,
                };
                if nested {
                    writeln!(out, "{pad}{key}:")?;
                    show(out, value, depth + 1)?;
                } else {
                    line(out, key, value)?;
                }
            }
            Ok(())
        }
        Value::Array(items) => items.iter().enumerate().try_for_each(|(index, item)| {
            writeln!(out, "{pad}- {index}")?;
            show(out, item, depth + 1)
        }),
        other => line(out, "value", other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent_and_every_command_shows_an_example() {
        let mut cli = Cli::command();
        cli.clone().debug_assert();
        fn examples(command: &mut clap::Command) {
            if !["topology", "lanes", "agents"].contains(&command.get_name()) && command.get_name() != "help" {
                let help = command.render_long_help().to_string();
                assert!(help.contains("Example"), "{} --help has no example", command.get_name());
            }
            command.get_subcommands_mut().for_each(examples);
        }
        examples(&mut cli);
    }

    #[test]
    fn a_node_that_listens_everywhere_is_asked_on_loopback() {
        for (listen, ask) in
            [("0.0.0.0:7700", "127.0.0.1:7700"), ("[::]:7700", "[::1]:7700"), ("10.1.2.3:1", "10.1.2.3:1")]
        {
            assert_eq!(reachable(listen.parse().expect("an address")).to_string(), ask);
        }
    }

    #[test]
    fn status_is_shown_as_indented_lines() {
        let status = serde_json::json!({
            "a": 1, "b": { "c": "text", "d": null }, "e": [1, 2], "f": [{ "g": true }], "h": {}
        });
        let mut out = Vec::new();
        show(&mut out, &status, 0).expect("writes to memory");
        let text = String::from_utf8(out).expect("text");
        assert_eq!(text, "a: 1\nb:\n  c: text\n  d: -\ne: [1,2]\nf:\n  - 0\n    g: true\nh: {}\n");
    }
}
