//! Debian's real nginx, with a master and two workers, that writes an access log as in production.
//!
//! A line is nginx's `combined` format and the request's id, so every line is unique even when all else repeats. It runs as the
//! user of the test and touches nothing of the system's nginx.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::net::TcpStream;

use crate::parts::Parts;
use crate::process::{AtParentDeath, Process};
use crate::wait::until;

/// Only turns a hang into a failure.
const LIMIT: Duration = Duration::from_secs(60);
/// How often another port is tried when somebody took it between our choice and nginx's start.
const PORT_TRIES: u32 = 5;

/// A running nginx. Dropping it kills it. The fields' order is the order of their end.
#[derive(Debug)]
pub struct Nginx {
    process: Process,
    port: u16,
    access_log: PathBuf,
    folder: TempDir,
}

impl Nginx {
    /// Starts an nginx that appends to `access_log` (absolute); returns when it takes connections.
    ///
    /// # Errors
    /// nginx is not installed (the message says what to run) or doesn't come up (it shows the end of its log).
    pub async fn start(access_log: impl Into<PathBuf>) -> Result<Self> {
        Self::start_with(access_log, "").await
    }

    /// The same, with further directives in its `http` block.
    ///
    /// # Errors
    /// As of [`Self::start`].
    pub async fn start_with(access_log: impl Into<PathBuf>, directives: &str) -> Result<Self> {
        let access_log = access_log.into();
        ensure!(access_log.is_absolute(), "{} is not absolute", access_log.display());
        let program = Parts::command("nginx")?;
        for attempt in 1.. {
            let folder = tempfile::Builder::new().prefix("tributary-nginx-").tempdir()?;
            let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
            let conf = folder.path().join("nginx.conf");
            fs::write(&conf, config(folder.path(), port, &access_log, directives))?;
            // SIGTERM, because a master that is killed leaves its workers behind.
            let at_death = AtParentDeath::Terminate;
            let mut process = Process::spawn(&program, at_death, folder.path().join("log"), |command| {
                // By default it would first try the system's error log.
                command.args(["-e", "stderr", "-p"]).arg(folder.path()).arg("-c").arg(&conf);
            })?;
            let up = until("nginx to take connections", LIMIT, async || {
                Ok(match process.try_wait()? {
                    Some(status) => Some(Err(status)),
                    None => TcpStream::connect(("127.0.0.1", port)).await.ok().map(|_| Ok(())),
                })
            });
            match up.await.with_context(|| process.log_tail())? {
                Ok(()) => return Ok(Self { process, port, access_log, folder }),
                Err(_) if attempt < PORT_TRIES && process.log_tail().contains("Address already in use") => {}
                Err(status) => bail!("nginx ended ({status}): {}", process.log_tail()),
            }
        }
        bail!("no port is free for nginx")
    }

    /// `http://127.0.0.1:PORT`, without a path.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The access log.
    #[must_use]
    pub fn access_log(&self) -> &Path {
        &self.access_log
    }

    /// The file with the master's process id, for logrotate's `postrotate`.
    #[must_use]
    pub fn pid_file(&self) -> PathBuf {
        self.folder.path().join("nginx.pid")
    }

    /// Opens the log anew by its name (SIGUSR1), as after a rotation. The workers follow a moment later and until then write to
    /// the old file.
    ///
    /// # Errors
    /// It has ended.
    pub fn reopen_log(&self) -> Result<()> {
        self.process.signal(Signal::USR1)
    }

    /// Ends it after the requests that it has (SIGQUIT); after that, nothing more comes to the log.
    ///
    /// # Errors
    /// It has ended before, or doesn't end.
    pub async fn quit(mut self) -> Result<ExitStatus> {
        self.process.signal(Signal::QUIT)?;
        until("nginx to end", LIMIT, async || self.process.try_wait()).await
    }
}

fn config(folder: &Path, port: u16, access_log: &Path, directives: &str) -> String {
    // As root it would give the workers to www-data, who may not open a log in a private folder anew.
    let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
    let (folder, access_log) = (folder.display(), access_log.display());
    format!(
        r#"{user}
daemon off;
worker_processes 2;
pid {folder}/nginx.pid;
error_log stderr notice;
events {{ worker_connections 1024; }}
http {{
    log_format unique '$remote_addr - $remote_user [$time_local] "$request" $status $body_bytes_sent '
                      '"$http_referer" "$http_user_agent" $request_id';
    access_log "{access_log}" unique;
    {directives}
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 1000000000;
    server {{
        listen 127.0.0.1:{port};
        location / {{ return 200 "ok\n"; }}
        location /missing/ {{ return 404; }}
    }}
}}
"#
    )
}
