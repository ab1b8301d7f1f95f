//! The program `tributary-agent`.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use clap::{Parser, Subcommand};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tributary_common::config::parse_duration;
use tributary_common::exit::Exit;
use tributary_common::http::body::{BodyPace, TimedBody};
use tributary_common::http::client::{ClientOptions, build};
use tributary_common::http::ops::Ops;
use tributary_common::http::server::{ServerLimits, ServerMetrics, serve};
use tributary_common::telemetry::{self, Metrics};

use crate::config::AgentConfig;
use crate::engine::{Engine, Handle, RunError};
use crate::explain::Explanation;
use crate::metrics::AgentMetrics;
use crate::status::{STATUS_PATH, Status};

const EXAMPLES: &str = "\
Five lines are a configuration (/etc/tributary/agent.toml):

  endpoints = [\"http://edge-1:7700\", \"http://edge-2:7700\"]

  [[source]]
  category = \"nginx-access\"
  include = [\"/var/log/nginx/access.log*\"]

Exit codes: 0 done, 1 failed, 64 wrong command line, 78 wrong configuration.";

/// Ships the lines of log files to the tier above, each once, and forgets none before it is stored for good.
#[derive(Debug, Parser)]
#[command(name = "tributary-agent", version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Follow log files and ship them until stopped.
    ///
    /// SIGTERM or Ctrl-C: what is in flight is waited for, `drain_timeout` at most; a second one ends at once.
    #[command(
        after_help = "Examples:\n  tributary-agent run --config /etc/tributary/agent.toml\n  tributary-agent run --config backlog.toml --once   # ship what is there, wait until it is committed, end"
    )]
    Run {
        /// The configuration file.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Ship every file to its end, wait until all is committed, and exit with 0; with 1 where some of it is not.
        #[arg(long)]
        once: bool,
        /// With --once: how long to wait while nothing gets committed.
        #[arg(long, value_name = "DURATION", default_value = "15m", value_parser = parse_duration, requires = "once")]
        give_up_after: Duration,
    },
    /// Check a configuration file; report everything that is wrong with it.
    #[command(after_help = "Example:\n  tributary-agent check --config /etc/tributary/agent.toml")]
    Check {
        /// The configuration file.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Ask the running agent how far each file is, and why it waits.
    #[command(after_help = "Example:\n  tributary-agent status --config /etc/tributary/agent.toml --json")]
    Status {
        /// The configuration file of the running agent.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Say whether a file would be shipped, under which category, which bucket its first and last lines would get, and why.
    ///
    /// It reads the file and the configuration, and asks nobody. Exit code 1: the file would not be shipped.
    #[command(
        after_help = "Example:\n  tributary-agent explain /var/log/nginx/access.log --config /etc/tributary/agent.toml"
    )]
    Explain {
        /// The file.
        path: PathBuf,
        /// The configuration file.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// A failure that has a text and an exit code.
#[derive(Debug)]
struct Failure(Exit, String);

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(Exit::Failed, error.to_string())
    }
}

/// Runs the program with these arguments, its own name first.
#[must_use]
pub fn main(arguments: impl Iterator<Item = std::ffi::OsString>) -> Exit {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Where the text can't be printed, the exit code must do.
            let _ = error.print();
            return Exit::of_command_line(error.exit_code());
        }
    };
    let done = match cli.command {
        Command::Run { config, once, give_up_after } => {
            load(&config).and_then(|config| run(config, once.then_some(give_up_after)))
        }
        Command::Check { config } => load(&config).and_then(|config| check(&config)),
        Command::Status { config, json } => load(&config).and_then(|config| status(&config, json)),
        Command::Explain { path, config, json } => match load(&config).and_then(|config| explain(&config, &path, json))
        {
            Ok(false) => return Exit::Failed,
            done => done.map(|_| ()),
        },
    };
    match done {
        Ok(()) => Exit::Done,
        Err(Failure(exit, text)) => {
            let _ = writeln!(std::io::stderr(), "tributary-agent: {text}");
            exit
        }
    }
}

fn load(path: &std::path::Path) -> Result<AgentConfig, Failure> {
    AgentConfig::load(path).map_err(|errors| Failure(Exit::Config, errors.to_string()))
}

fn print(text: &str) -> Result<(), Failure> {
    Ok(std::io::stdout().lock().write_all(text.as_bytes())?)
}

fn check(config: &AgentConfig) -> Result<(), Failure> {
    print(&format!(
        "{} is all right: agent {} ships {} sources to {}\n",
        config.file().display(),
        config.agent_id,
        config.sources.len(),
        config.endpoints.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    ))
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    // One thread is enough: it moves bytes that others have read and compressed.
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn run(config: AgentConfig, once: Option<Duration>) -> Result<(), Failure> {
    telemetry::init(config.log)?;
    let runtime = runtime()?;
    let ended = runtime.block_on(async {
        let shutdown = tributary_common::shutdown::on_signal()?;
        Ok(run_until(config, once, shutdown).await?)
    });
    // A directory scan on a file system that hangs is not waited for.
    runtime.shutdown_background();
    ended
}

/// Runs the agent, and what shows its state, until `shutdown` is cancelled or, with `once`, everything is committed, or
/// nothing is for so long.
///
/// # Errors
/// See [`RunError`].
pub async fn run_until(
    config: AgentConfig,
    once: Option<Duration>,
    shutdown: CancellationToken,
) -> Result<(), RunError> {
    let config = Arc::new(config);
    let mut metrics = Metrics::new("agent");
    let agent_metrics = AgentMetrics::default();
    agent_metrics.register(metrics.registry());
    let mut engine = Engine::new(Arc::clone(&config), once.is_some(), agent_metrics)?;
    if let Some(patience) = once {
        engine = engine.give_up_after(patience);
    }
    let server = match config.http_listen {
        None => None,
        Some(address) => {
            let listener = TcpListener::bind(address).await.map_err(|error| RunError::Listen { address, error })?;
            Some(tokio::spawn(serve_operators(listener, metrics, engine.handle(), shutdown.clone())))
        }
    };
    tracing::info!(agent = %config.agent_id, host = config.host, version = env!("CARGO_PKG_VERSION"), "the agent runs");
    telemetry::notify_ready();
    telemetry::start_watchdog();
    let ended = engine.run(shutdown).await;
    telemetry::notify_stopping();
    if let Some(server) = server {
        server.abort();
    }
    match &ended {
        Ok(()) => tracing::info!("the agent ends"),
        Err(error) => tracing::error!(%error, "the agent ends"),
    }
    ended
}

async fn serve_operators(listener: TcpListener, mut metrics: Metrics, handle: Handle, shutdown: CancellationToken) {
    let second = Duration::from_secs(1);
    let limits = ServerLimits {
        max_connections: 64,
        header_timeout: 30 * second,
        body: BodyPace { idle_timeout: 5 * second, min_rate: 1024 },
        write_timeout: 10 * second,
        drain_timeout: second,
    };
    let server_metrics = ServerMetrics::default();
    server_metrics.register(metrics.registry());
    let trouble = Arc::new(Mutex::new(None::<String>));
    let ops = Ops::new(Arc::new(metrics), {
        let trouble = Arc::clone(&trouble);
        move || trouble.lock().unwrap_or_else(PoisonError::into_inner).clone().map_or(Ok(()), Err)
    });
    let handler = move |request: Request<TimedBody>| {
        let (handle, ops, trouble) = (handle.clone(), ops.clone(), Arc::clone(&trouble));
        async move { answer(&request, &handle, &ops, &trouble).await }
    };
    serve(listener, limits, server_metrics, shutdown, handler).await;
}

async fn answer(
    request: &Request<TimedBody>,
    handle: &Handle,
    ops: &Ops,
    trouble: &Mutex<Option<String>>,
) -> Response<Full<Bytes>> {
    let (method, path) = (request.method(), request.uri().path());
    if (method, path) == (&Method::GET, STATUS_PATH) {
        return match handle.status().await {
            Some(status) => {
                let body = serde_json::to_vec_pretty(&status).expect("a status is representable");
                let mut response = Response::new(Full::new(Bytes::from(body)));
                response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
                response
            }
            None => plain(StatusCode::SERVICE_UNAVAILABLE, "the agent is ending\n"),
        };
    }
    if path == "/readyz" {
        let now = match handle.status().await {
            None => Some("the agent is ending".to_owned()),
            Some(status) => (!status.troubles.is_empty()).then(|| status.troubles.join("\n")),
        };
        *trouble.lock().unwrap_or_else(PoisonError::into_inner) = now;
    }
    ops.answer(method, path)
        .unwrap_or_else(|| plain(StatusCode::NOT_FOUND, "here are /healthz, /readyz, /metrics and /status\n"))
}

fn plain(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    *response.status_mut() = status;
    response
}

/// Returns whether the file would be shipped.
fn explain(config: &AgentConfig, path: &std::path::Path, json: bool) -> Result<bool, Failure> {
    let path = std::path::absolute(path)?;
    let explanation = Explanation::of(config, &path, jiff::Timestamp::now().as_millisecond());
    if json {
        print(&format!("{}\n", serde_json::to_string_pretty(&explanation)?))?;
    } else {
        print(&explanation.to_text())?;
    }
    Ok(explanation.shipped)
}

fn status(config: &AgentConfig, json: bool) -> Result<(), Failure> {
    let Some(address) = config.http_listen else {
        return Err(Failure(
            Exit::Failed,
            "the agent's HTTP port is turned off: write [http] enabled = true and restart the agent".to_owned(),
        ));
    };
    let status = runtime()?.block_on(ask_status(address))?;
    if json { print(&format!("{}\n", serde_json::to_string_pretty(&status)?)) } else { print(&status.to_text()) }
}

async fn ask_status(mut address: SocketAddr) -> Result<Status, Failure> {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    let options = ClientOptions {
        connect_timeout: Duration::from_secs(5),
        request_timeout: Duration::from_secs(10),
        max_idle_connections: 1,
    };
    let failed = |error: reqwest::Error| {
        let text = format!("no agent answers at {address}: {error}; is it running with this configuration?");
        Failure(Exit::Failed, text)
    };
    let response = build(&options)?.get(format!("http://{address}{STATUS_PATH}")).send().await.map_err(failed)?;
    response.error_for_status().map_err(failed)?.json().await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_command_explains_itself_with_an_example() {
        Cli::command().debug_assert();
        let mut command = Cli::command();
        for sub in command.get_subcommands_mut() {
            let help = sub.render_long_help().to_string();
            assert!(help.contains("tributary-agent "), "{help}");
        }
    }

    #[test]
    fn a_wrong_command_line_and_a_wrong_configuration_have_their_codes() {
        let main = |arguments: &[&str]| main(arguments.iter().map(Into::into));
        assert_eq!(main(&["tributary-agent", "fly"]), Exit::Usage);
        assert_eq!(main(&["tributary-agent", "check", "--config", "/does/not/exist"]), Exit::Config);
        assert_eq!(main(&["tributary-agent", "--version"]), Exit::Done);
    }
}
