//! Debian's real logrotate, with a configuration and a state file of its own.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::parts::Parts;
use crate::process::{AtParentDeath, Process};
use crate::wait::until;

/// Only turns a hang into a failure.
const LIMIT: Duration = Duration::from_secs(120);

/// How the log is taken from its writer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Method {
    /// Renamed, made anew, and then the writer is told: SIGUSR1 to the process in this file.
    Create {
        /// Like [`crate::nginx::Nginx::pid_file`].
        pid_file: PathBuf,
    },
    /// Copied, then truncated; what the writer writes between the two is lost, by logrotate itself.
    CopyTruncate,
}

/// What happens to rotated files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compress {
    /// They stay as they are.
    No,
    /// Compressed at once. A writer that hasn't yet reopened its log loses what it writes meanwhile.
    AtOnce,
    /// Compressed by the next rotation, as Debian does for nginx.
    Delayed,
}

/// How logs are rotated.
#[derive(Clone, Debug)]
pub struct LogrotateOptions {
    /// The logs, or patterns of them; absolute.
    pub logs: Vec<PathBuf>,
    /// How the log is taken from its writer.
    pub method: Method,
    /// Default in [`Self::new`]: delayed.
    pub compress: Compress,
    /// `access.log-20240501-1714564800`, not `access.log.1`: a name is given once and stays. Default in [`Self::new`]: no.
    pub dateext: bool,
    /// How many rotated files are kept. Default in [`Self::new`]: 1000, so that none is deleted.
    pub keep: u32,
}

impl LogrotateOptions {
    /// One log with the defaults.
    #[must_use]
    pub fn new(log: impl Into<PathBuf>, method: Method) -> Self {
        Self { logs: vec![log.into()], method, compress: Compress::Delayed, dateext: false, keep: 1000 }
    }
}

/// A logrotate with its configuration; it runs only when told to.
#[derive(Debug)]
pub struct Logrotate {
    program: PathBuf,
    folder: TempDir,
    dateext: bool,
    /// The second since 1970 in which the last rotation ended.
    last_second: u64,
}

impl Logrotate {
    /// Writes the configuration.
    ///
    /// # Errors
    /// logrotate is not installed; the message says what to run.
    pub fn new(options: &LogrotateOptions) -> Result<Self> {
        let program = Parts::command("logrotate")?;
        let folder = tempfile::Builder::new().prefix("tributary-logrotate-").tempdir()?;
        fs::write(folder.path().join("conf"), config(options))?;
        Ok(Self { program, folder, dateext: options.dateext, last_second: 0 })
    }

    /// Rotates now, whatever the logs' age and size; an empty log too. With dated names, which end in a second, it first waits for
    /// the next second.
    ///
    /// # Errors
    /// logrotate fails, or rotates nothing because the dated name is taken.
    pub async fn rotate(&mut self) -> Result<()> {
        if self.dateext {
            let last = self.last_second;
            until("the next second", LIMIT, async || Ok((second_now() > last).then_some(()))).await?;
        }
        let path = |name: &str| self.folder.path().join(name);
        let mut process = Process::spawn(&self.program, AtParentDeath::Kill, path("log"), |command| {
            command.args(["--verbose", "--force", "--state"]).arg(path("state")).arg(path("conf"));
        })?;
        let status = until("logrotate to end", LIMIT, async || process.try_wait()).await?;
        ensure!(status.success(), "logrotate failed ({status}): {}", process.log_tail());
        let said = fs::read_to_string(process.log()).context("reading what logrotate said")?;
        ensure!(!said.contains("skipping rotation"), "logrotate skipped a log: {said}");
        self.last_second = second_now();
        Ok(())
    }
}

fn second_now() -> u64 {
    // A clock before 1970 gives 0, and then the wait above ends with its error.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn config(options: &LogrotateOptions) -> String {
    let LogrotateOptions { logs, method, compress, dateext, keep } = options;
    let quoted = |path: &Path| format!("\"{}\"", path.display());
    let mut text: String = logs.iter().map(|log| quoted(log) + "\n").collect();
    // Writing to a String can't fail.
    let _ = writeln!(text, "{{\n    rotate {keep}\n    ifempty\n    missingok\n    sharedscripts");
    text.push_str(match compress {
        Compress::No => "    nocompress\n",
        Compress::AtOnce => "    compress\n",
        Compress::Delayed => "    compress\n    delaycompress\n",
    });
    if *dateext {
        text.push_str("    dateext\n    dateformat -%Y%m%d-%s\n");
    }
    match method {
        Method::CopyTruncate => text.push_str("    copytruncate\n"),
        Method::Create { pid_file } => {
            let pid_file = quoted(pid_file);
            let _ = writeln!(
                text,
                "    create 0644\n    postrotate\n        kill -USR1 \"$(cat {pid_file})\"\n    endscript"
            );
        }
    }
    text.push_str("}\n");
    text
}
