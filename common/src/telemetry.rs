//! Logs, metrics, and what is told to the service manager.

use std::io::{self, IsTerminal};

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
