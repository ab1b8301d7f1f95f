//! Logs, metrics, and what is told to the service manager.

use std::io::{self, IsTerminal};
use std::time::Duration;

use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use sd_notify::NotifyState;

use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{Layer, fmt};

use crate::config::Table;
use crate::config::kind::choice;

/// How log events are written, to standard error or to the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// `Text` on a terminal, `Journald` where standard error leads to the journal (under systemd), else `Json`.
    Auto,
    /// One line for people.
    Text,
    /// One JSON object per line.
    Json,
    /// The journal's own protocol: fields stay fields.
    Journald,
}

/// The least important events that are logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// Something needs a person.
    Error,
    /// Something is not as it should be, and is dealt with.
    Warn,
    /// What happens, in big steps.
    Info,
    /// What happens, in small steps.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// The table `[log]` of both programs' configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogOptions {
    /// `format`: `auto` (default), `text`, `json` or `journald`.
    pub format: LogFormat,
    /// `level`: `error`, `warn`, `info` (default), `debug` or `trace`. The environment variable `RUST_LOG` wins.
    pub level: LogLevel,
}

impl LogOptions {
    /// Reads the keys of the table `[log]`.
    pub fn read(table: &mut Table<'_>) -> Self {
        let format = table.or(
            "format",
            choice(&[
                ("auto", LogFormat::Auto),
                ("text", LogFormat::Text),
                ("json", LogFormat::Json),
                ("journald", LogFormat::Journald),
            ]),
            LogFormat::Auto,
        );
        let level = table.or(
            "level",
            choice(&[
                ("error", LogLevel::Error),
                ("warn", LogLevel::Warn),
                ("info", LogLevel::Info),
                ("debug", LogLevel::Debug),
                ("trace", LogLevel::Trace),
            ]),
            LogLevel::Info,
        );
        Self { format: *format, level: *level }
    }
}

/// Logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// `format = "journald"` where no journal listens.
    #[error("the journal can't be reached: {0}; write [log] format = \"text\", or start the program under systemd")]
    Journal(#[source] io::Error),
    /// `RUST_LOG` has something in it that is no filter.
    #[error("RUST_LOG={value:?} can't be read: {error}; write it like info,tributary_agent=debug, or unset it")]
    Filter {
        /// Its value.
        value: String,
        /// Why.
        #[source]
        error: tracing_subscriber::filter::ParseError,
    },
    /// Something else in this process logs already.
    #[error("logging is set up already: {0}")]
    Twice(#[from] TryInitError),
}

/// Sets up logging for the process, once: to the journal or to standard error, so that standard output is free for
/// what a command prints.
///
/// # Errors
/// See [`LogError`].
pub fn init(options: LogOptions) -> Result<(), LogError> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(value) if !value.is_empty() => {
            EnvFilter::try_new(&value).map_err(|error| LogError::Filter { value, error })?
        }
        // Below debug, the libraries' own small steps only hide ours.
        _ => match options.level {
            LogLevel::Debug | LogLevel::Trace => EnvFilter::new(format!(
                "{level},hyper=info,hyper_util=info,reqwest=info,h2=info",
                level = options.level.as_str()
            )),
            level => EnvFilter::new(level.as_str()),
        },
    };
    let layer = match resolve(options.format, io::stderr().is_terminal(), std::env::var_os("JOURNAL_STREAM").is_some())
    {
        LogFormat::Journald => tracing_journald::layer().map_err(LogError::Journal)?.boxed(),
        LogFormat::Text => fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal()).boxed(),
        LogFormat::Json | LogFormat::Auto => fmt::layer().json().flatten_event(true).with_writer(io::stderr).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(layer).try_init()?;
    Ok(())
}

/// What `auto` means here.
fn resolve(format: LogFormat, terminal: bool, journal: bool) -> LogFormat {
    match format {
        LogFormat::Auto if terminal => LogFormat::Text,
        LogFormat::Auto if journal => LogFormat::Journald,
        LogFormat::Auto => LogFormat::Json,
        named => named,
    }
}

/// The metrics of a program. All their names begin with `tributary_` and the program's.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
}

impl Metrics {
    /// Metrics of `program` (`agent`, `aggregator`), at first only the one that tells its version.
    #[must_use]
    pub fn new(program: &str) -> Self {
        let mut registry = Registry::with_prefix(format!("tributary_{program}"));
        registry.register("build", "What runs here", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        Self { registry }
    }

    /// Where a part of the program registers what it counts.
    pub fn registry(&mut self) -> &mut Registry {
        &mut self.registry
    }

    /// All metrics in the OpenMetrics text format.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).expect("writing to a string doesn't fail");
        text
    }
}

/// Tells the service manager, if there is one, that the program serves from now on.
pub fn notify_ready() {
    notify(&[NotifyState::Ready]);
}

/// Tells the service manager that the program drains and will end.
pub fn notify_stopping() {
    notify(&[NotifyState::Stopping]);
}

/// Tells the service manager again and again that the program lives, if it wants to be told (`WatchdogSec=`); a task of
/// the runtime does so, and can't when the runtime is stuck. Must be called in a Tokio runtime.
pub fn start_watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let pause = (limit / 3).max(Duration::from_millis(1));
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(pause);
        loop {
            ticks.tick().await;
            notify(&[NotifyState::Watchdog]);
        }
    });
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "the service manager could not be told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_is_text_for_people_and_fields_for_machines() {
        assert_eq!(resolve(LogFormat::Auto, true, true), LogFormat::Text);
        assert_eq!(resolve(LogFormat::Auto, false, true), LogFormat::Journald);
        assert_eq!(resolve(LogFormat::Auto, false, false), LogFormat::Json);
        assert_eq!(resolve(LogFormat::Json, true, true), LogFormat::Json);
    }
}
