//! A real HDFS on this machine: Hadoop's own NameNode and DataNodes, each a process, on loopback and ports that were free.
//!
//! ```no_run
//! # async fn f() -> anyhow::Result<()> {
//! use tributary_tests::hdfs::{HdfsOptions, MiniHdfs};
//!
//! let mut hdfs = MiniHdfs::start(HdfsOptions { datanodes: 3, ..HdfsOptions::default() }).await?;
//! assert_eq!(hdfs.webhdfs().list("/").await?, Some(vec![]));
//! hdfs.kill_datanode(1)?;
//! # Ok(()) }
//! ```
//!
//! All state is in one temporary folder; dropping the value ends the processes and removes it, and so does the death of the test
//! run (see [`crate::process`]). The folder has `conf/ name/ data-N/ log/`; after a failed start its path is in the error.
//!
//! A DataNode takes new ports at each start, as the NameNode finds it by its id; the NameNode keeps its two.

mod records;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde::Deserialize;
use tempfile::TempDir;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::parts::Parts;
use crate::process::{AtParentDeath, Process, log_tail};
use crate::wait::until;
use crate::webhdfs::WebHdfs;

pub use records::{Edit, Fsck};

/// Only turns a hang into a failure; a start takes about eight seconds.
const START_LIMIT: Duration = Duration::from_secs(180);
/// How many run at the same time in this process, whatever the number of test threads: each is two JVMs or more.
static CLUSTERS: Semaphore = Semaphore::const_new(3);
/// How often other ports are tried when somebody took one between our choice and the NameNode's start.
const PORT_TRIES: u32 = 5;

const NAMENODE: &str = "org.apache.hadoop.hdfs.server.namenode.NameNode";
const DATANODE: &str = "org.apache.hadoop.hdfs.server.datanode.DataNode";
const DFS_ADMIN: &str = "org.apache.hadoop.hdfs.tools.DFSAdmin";

/// What kind of HDFS to start.
#[derive(Clone, Debug)]
pub struct HdfsOptions {
    /// How many DataNodes; default 1.
    pub datanodes: usize,
    /// Copies of each block of a file that doesn't ask for a number; default: one per DataNode, at most 3.
    pub replication: Option<u16>,
    /// Whether the NameNode notices a dead DataNode after about 12 seconds, not after Hadoop's 10 minutes. Default: no.
    pub notices_dead_datanodes_soon: bool,
    /// More settings for `hdfs-site.xml`; they win over the built-in ones.
    pub settings: Vec<(String, String)>,
    /// Keeps all state in this folder, which must be empty or missing, also after the end. Default: a temporary folder.
    pub folder: Option<PathBuf>,
}

impl Default for HdfsOptions {
    fn default() -> Self {
        Self { datanodes: 1, replication: None, notices_dead_datanodes_soon: false, settings: Vec::new(), folder: None }
    }
}

/// One line of the NameNode's audit log: an operation that a client asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditLine {
    /// The operation, like `create`, `rename`, `mkdirs`, `recoverLease`, `fsync`.
    pub command: String,
    /// The path.
    pub source: String,
    /// The second path, of a rename.
    pub destination: Option<String>,
    /// `rpc`, or `webhdfs` where the NameNode was asked by HTTP.
    pub protocol: String,
}

#[derive(Debug)]
enum DataNode {
    Running { process: Process, address: String },
    Paused { process: Process, address: String },
    Down,
}

#[derive(Debug)]
enum Folder {
    Temporary(TempDir),
    Kept(PathBuf),
}

impl Folder {
    fn path(&self) -> &Path {
        match self {
            Self::Temporary(folder) => folder.path(),
            Self::Kept(folder) => folder,
        }
    }
}

/// A running HDFS. The fields' order is the order of their end: processes before the folder.
#[derive(Debug)]
pub struct MiniHdfs {
    datanodes: Vec<DataNode>,
    namenode: Option<Process>,
    starts: u32,
    parts: Parts,
    options: HdfsOptions,
    rpc_port: u16,
    web: WebHdfs,
    folder: Folder,
    /// Given back when all else is gone.
    _permit: SemaphorePermit<'static>,
}

#[derive(Deserialize)]
struct Jmx<T> {
    beans: Vec<T>,
}

#[derive(Deserialize)]
struct State {
    #[serde(rename = "FSState")]
    state: String,
    #[serde(rename = "NumLiveDataNodes")]
    live: usize,
}

#[derive(Deserialize)]
struct Info {
    /// JSON in a string: the DataNodes by host and port.
    #[serde(rename = "LiveNodes")]
    live: String,
}

#[derive(Deserialize)]
struct LiveNode {
    xferaddr: String,
}

impl MiniHdfs {
    /// Makes and starts an HDFS; returns when all DataNodes are in and it can be written to.
    ///
    /// # Errors
    /// The real parts are not installed (the message says what to run), or a process doesn't come up (it shows the end of its log).
    pub async fn start(options: HdfsOptions) -> Result<Self> {
        ensure!(options.datanodes > 0, "an HDFS needs at least one DataNode");
        let parts = Parts::find()?;
        let permit = CLUSTERS.acquire().await.context("the permits are never closed")?;
        let folder = match &options.folder {
            Some(folder) => {
                fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
                ensure!(fs::read_dir(folder)?.next().is_none(), "{} is not empty", folder.display());
                Folder::Kept(folder.canonicalize()?)
            }
            None => Folder::Temporary(tempfile::Builder::new().prefix("tributary-hdfs-").tempdir()?),
        };
        for name in ["conf", "log", "name"] {
            fs::create_dir(folder.path().join(name))?;
        }
        let datanodes = (0..options.datanodes).map(|_| DataNode::Down).collect();
        let web = WebHdfs::new("http://127.0.0.1:0")?;
        let mut hdfs =
            Self { datanodes, namenode: None, starts: 0, parts, options, rpc_port: 0, web, folder, _permit: permit };

        hdfs.take_ports()?;
        let formatted = hdfs.tool("format", NAMENODE, &["-format", "-nonInteractive"]).await;
        formatted.context("formatting the NameNode's folder")?;
        for attempt in 1.. {
            match hdfs.start_namenode().await {
                Ok(()) => break,
                Err(error) if attempt < PORT_TRIES && format!("{error:#}").contains("BindException") => {
                    hdfs.take_ports()?;
                }
                Err(error) => return Err(error),
            }
        }
        for index in 0..hdfs.datanodes.len() {
            hdfs.launch_datanode(index)?;
        }
        for index in 0..hdfs.datanodes.len() {
            hdfs.find_address(index).await?;
        }
        hdfs.wait_until_ready().await?;
        Ok(hdfs)
    }

    /// `hdfs://127.0.0.1:PORT`, without a path.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("hdfs://127.0.0.1:{}", self.rpc_port)
    }

    /// A client of its WebHDFS; `webhdfs().base()` is the address of the NameNode's web server.
    #[must_use]
    pub fn webhdfs(&self) -> &WebHdfs {
        &self.web
    }

    /// The NameNode's RPC port, for a proxy in front of it.
    #[must_use]
    pub fn rpc_port(&self) -> u16 {
        self.rpc_port
    }

    /// Where DataNode `index` takes blocks, `127.0.0.1:PORT`; `None` while it is down.
    ///
    /// # Panics
    /// There is no such DataNode.
    #[must_use]
    pub fn datanode_address(&self, index: usize) -> Option<&str> {
        match &self.datanodes[index] {
            DataNode::Running { address, .. } | DataNode::Paused { address, .. } => Some(address),
            DataNode::Down => None,
        }
    }

    /// A Hadoop configuration folder (`core-site.xml`, `hdfs-site.xml`) for clients.
    #[must_use]
    pub fn conf_dir(&self) -> PathBuf {
        self.folder.path().join("conf/namenode")
    }

    /// The folder with the processes' logs.
    #[must_use]
    pub fn log_dir(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// The NameNode's audit log: a line per operation, appended to over restarts.
    #[must_use]
    pub fn audit_log(&self) -> PathBuf {
        self.log_dir().join("audit.log")
    }

    /// The operations in the audit log that were allowed, in their order.
    ///
    /// # Errors
    /// The log can't be read.
    pub fn audit(&self) -> Result<Vec<AuditLine>> {
        let log = self.audit_log();
        let text = fs::read_to_string(&log).with_context(|| format!("reading {}", log.display()))?;
        Ok(text.lines().filter_map(audit_line).collect())
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// It is down already.
    ///
    /// # Panics
    /// There is no such DataNode.
    pub fn kill_datanode(&mut self, index: usize) -> Result<()> {
        match std::mem::replace(&mut self.datanodes[index], DataNode::Down) {
            DataNode::Running { mut process, .. } | DataNode::Paused { mut process, .. } => process.kill().map(drop),
            DataNode::Down => bail!("DataNode {index} is down already"),
        }
    }

    /// Starts a DataNode that was killed, with the blocks that it had; returns when the NameNode has it.
    ///
    /// # Errors
    /// It runs, or doesn't come up.
    ///
    /// # Panics
    /// There is no such DataNode.
    pub async fn start_datanode(&mut self, index: usize) -> Result<()> {
        ensure!(matches!(self.datanodes[index], DataNode::Down), "DataNode {index} runs already");
        self.launch_datanode(index)?;
        self.find_address(index).await?;
        self.wait_for_datanodes().await
    }

    /// SIGSTOP: it keeps its connections and says nothing.
    ///
    /// # Errors
    /// It doesn't run.
    ///
    /// # Panics
    /// There is no such DataNode.
    pub fn pause_datanode(&mut self, index: usize) -> Result<()> {
        self.turn(index, Signal::STOP)
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// It isn't paused.
    ///
    /// # Panics
    /// There is no such DataNode.
    pub fn resume_datanode(&mut self, index: usize) -> Result<()> {
        self.turn(index, Signal::CONT)
    }

    fn turn(&mut self, index: usize, signal: Signal) -> Result<()> {
        let slot = &mut self.datanodes[index];
        *slot = match (std::mem::replace(slot, DataNode::Down), signal) {
            (DataNode::Running { process, address }, Signal::STOP) => {
                process.signal(signal)?;
                DataNode::Paused { process, address }
            }
            (DataNode::Paused { process, address }, Signal::CONT) => {
                process.signal(signal)?;
                DataNode::Running { process, address }
            }
            (other, _) => {
                *slot = other;
                bail!("DataNode {index} can't be sent {signal:?} now");
            }
        };
        Ok(())
    }

    /// SIGKILL. What its clients were told is in its edit log.
    ///
    /// # Errors
    /// It is down already.
    pub fn kill_namenode(&mut self) -> Result<()> {
        let mut namenode = self.namenode.take().context("the NameNode is down already")?;
        namenode.kill().map(drop)
    }

    /// SIGSTOP: calls hang.
    ///
    /// # Errors
    /// It is down.
    pub fn pause_namenode(&self) -> Result<()> {
        self.namenode.as_ref().context("the NameNode is down")?.signal(Signal::STOP)
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// It is down.
    pub fn resume_namenode(&self) -> Result<()> {
        self.namenode.as_ref().context("the NameNode is down")?.signal(Signal::CONT)
    }

    /// Starts a NameNode that was killed, on its old ports; returns when it answers. It may still be in safe mode: see
    /// [`Self::wait_until_ready`].
    ///
    /// # Errors
    /// It runs, or doesn't come up.
    pub async fn start_namenode(&mut self) -> Result<()> {
        ensure!(self.namenode.is_none(), "the NameNode runs already");
        let mut process = self.launch("namenode", NAMENODE)?;
        let up = until("the NameNode to answer", START_LIMIT, async || {
            Ok(match process.try_wait()? {
                Some(status) => Some(Err(status)),
                None => self.state().await.map(|_| Some(Ok(())))?,
            })
        });
        match up.await {
            Ok(Ok(())) => {}
            Ok(Err(status)) => bail!("the NameNode ended ({status}): {}", process.log_tail()),
            Err(error) => return Err(error.context(process.log_tail())),
        }
        self.namenode = Some(process);
        Ok(())
    }

    /// Kills the NameNode and starts it again; returns when it can be written to.
    ///
    /// # Errors
    /// It is down, or doesn't come up, or stays in safe mode because blocks are missing.
    pub async fn restart_namenode(&mut self) -> Result<()> {
        self.kill_namenode()?;
        self.start_namenode().await?;
        self.wait_until_ready().await
    }

    /// Waits until every running DataNode is registered and safe mode is off.
    ///
    /// # Errors
    /// That doesn't come about.
    pub async fn wait_until_ready(&self) -> Result<()> {
        self.wait_for_datanodes().await?;
        until("the NameNode to leave safe mode", START_LIMIT, async || {
            Ok((self.state().await?.state == "Operational").then_some(()))
        })
        .await
    }

    /// Waits until the NameNode counts `count` DataNodes as alive. A killed one is missed only after 10 minutes, unless
    /// [`HdfsOptions::notices_dead_datanodes_soon`]; readers may be sent to it for a second more.
    ///
    /// # Errors
    /// That doesn't come about.
    pub async fn wait_until_live_datanodes(&self, count: usize) -> Result<()> {
        until(format_args!("{count} live DataNodes"), START_LIMIT, async || {
            Ok((self.state().await?.live == count).then_some(()))
        })
        .await
    }

    /// Enters or leaves safe mode, in which nothing can be changed.
    ///
    /// # Errors
    /// The NameNode doesn't do it.
    pub async fn safe_mode(&self, on: bool) -> Result<()> {
        self.dfsadmin(&["-safemode", if on { "enter" } else { "leave" }]).await.map(drop)
    }

    /// Runs Hadoop's `hdfs dfsadmin` with these arguments; returns what it printed.
    ///
    /// # Errors
    /// It fails.
    pub async fn dfsadmin(&self, arguments: &[&str]) -> Result<String> {
        self.tool("dfsadmin", DFS_ADMIN, arguments).await
    }

    fn take_ports(&mut self) -> Result<()> {
        // Both at once, so that they differ.
        let free = [TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?];
        self.rpc_port = free[0].local_addr()?.port();
        let web_port = free[1].local_addr()?.port();
        drop(free);
        self.web = WebHdfs::new(format!("http://127.0.0.1:{web_port}"))?;
        self.write_conf("namenode", web_port, None)?;
        for index in 0..self.datanodes.len() {
            self.write_conf(&format!("datanode-{index}"), web_port, Some(index))?;
        }
        Ok(())
    }

    fn write_conf(&self, role: &str, web_port: u16, datanode: Option<usize>) -> Result<()> {
        let root = self.folder.path();
        let conf = root.join("conf").join(role);
        fs::create_dir_all(&conf)?;
        let replication = self.options.replication.unwrap_or_else(|| self.datanodes.len().min(3) as u16);
        let mut settings: Vec<(String, String)> = [
            ("dfs.namenode.rpc-bind-host", "127.0.0.1"),
            ("dfs.namenode.datanode.registration.ip-hostname-check", "false"),
            ("dfs.namenode.safemode.extension", "0"),
            // So that a test can have files of many blocks.
            ("dfs.namenode.fs-limits.min-block-size", "1024"),
            ("dfs.permissions.enabled", "false"),
            ("dfs.webhdfs.enabled", "true"),
            ("dfs.support.append", "true"),
            ("dfs.datanode.hostname", "127.0.0.1"),
            ("dfs.datanode.address", "127.0.0.1:0"),
            ("dfs.datanode.http.address", "127.0.0.1:0"),
            ("dfs.datanode.ipc.address", "127.0.0.1:0"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
        settings.push(("dfs.namenode.http-address".into(), format!("127.0.0.1:{web_port}")));
        settings.push(("dfs.namenode.name.dir".into(), root.join("name").display().to_string()));
        settings.push(("dfs.replication".into(), replication.to_string()));
        if let Some(index) = datanode {
            let data = root.join(format!("data-{index}"));
            settings.push(("dfs.datanode.data.dir".into(), data.display().to_string()));
        }
        if self.options.notices_dead_datanodes_soon {
            // Dead after 2 × the recheck interval + 10 × the heartbeat interval.
            settings.push(("dfs.heartbeat.interval".into(), "1".into()));
            settings.push(("dfs.namenode.heartbeat.recheck-interval".into(), "1000".into()));
            settings.push(("dfs.namenode.stale.datanode.interval".into(), "3000".into()));
        }
        settings.extend(self.options.settings.iter().cloned());
        fs::write(conf.join("hdfs-site.xml"), site_xml(&settings))?;
        let core = [
            ("fs.defaultFS".to_owned(), self.uri()),
            ("hadoop.tmp.dir".to_owned(), root.join("tmp").display().to_string()),
        ];
        fs::write(conf.join("core-site.xml"), site_xml(&core))?;
        let audit = if datanode.is_none() { self.audit_log() } else { "/dev/null".into() };
        fs::write(conf.join("log4j.properties"), log4j_properties(&audit))?;
        Ok(())
    }

    fn java(&self, role: &str, class: &str) -> impl FnOnce(&mut Command) {
        let conf = self.folder.path().join("conf").join(role);
        let classpath = format!("{}:{}", conf.display(), self.parts.hadoop_classpath);
        let log_dir = self.log_dir();
        let class = class.to_owned();
        move |command| {
            command.args(Parts::hadoop_jvm_flags());
            command.arg(format!("-Dhadoop.log.dir={}", log_dir.display()));
            command.args(["-cp", &classpath, &class]);
        }
    }

    fn launch(&mut self, role: &str, class: &str) -> Result<Process> {
        self.starts += 1;
        let log = self.log_dir().join(format!("{:02}-{role}.log", self.starts));
        Process::spawn(self.parts.java(), AtParentDeath::Kill, log, self.java(role, class))
    }

    async fn tool(&self, name: &str, class: &str, arguments: &[&str]) -> Result<String> {
        let log = tempfile::Builder::new().prefix(name).suffix(".log").tempfile_in(self.log_dir())?.into_temp_path();
        let java = self.java("namenode", class);
        let mut process = Process::spawn(self.parts.java(), AtParentDeath::Kill, &*log, |command| {
            java(command);
            command.args(arguments);
        })?;
        let status = until(format_args!("{name} to end"), START_LIMIT, async || process.try_wait()).await?;
        ensure!(status.success(), "{name} {arguments:?} failed ({status}): {}", process.log_tail());
        fs::read_to_string(&log).with_context(|| format!("reading what {name} printed"))
    }

    fn launch_datanode(&mut self, index: usize) -> Result<()> {
        let process = self.launch(&format!("datanode-{index}"), DATANODE)?;
        self.datanodes[index] = DataNode::Running { process, address: String::new() };
        Ok(())
    }

    /// Fills in the address that a DataNode has chosen, which only its log says.
    async fn find_address(&mut self, index: usize) -> Result<()> {
        let DataNode::Running { process, address } = &mut self.datanodes[index] else {
            bail!("DataNode {index} is down");
        };
        let found = until(format!("DataNode {index} to listen"), START_LIMIT, async || {
            if let Some(status) = process.try_wait()? {
                return Ok(Some(Err(status)));
            }
            Ok(streaming_address(&fs::read_to_string(process.log())?).map(Ok))
        });
        match found.await.with_context(|| log_tail(process.log()))? {
            Ok(found) => *address = found,
            Err(status) => bail!("DataNode {index} ended ({status}): {}", process.log_tail()),
        }
        Ok(())
    }

    async fn wait_for_datanodes(&self) -> Result<()> {
        until("the NameNode to have all running DataNodes", START_LIMIT, async || {
            let info: Info = self.bean("NameNodeInfo").await?;
            let nodes: HashMap<String, LiveNode> = serde_json::from_str(&info.live).context("parsing LiveNodes")?;
            let all_in = self.datanodes.iter().all(|datanode| match datanode {
                DataNode::Running { address, .. } => nodes.values().any(|node| node.xferaddr == *address),
                DataNode::Paused { .. } | DataNode::Down => true,
            });
            Ok(all_in.then_some(()))
        })
        .await
        .with_context(|| format!("logs in {}", self.log_dir().display()))
    }

    async fn state(&self) -> Result<State> {
        self.bean("FSNamesystemState").await
    }

    async fn bean<T: for<'a> Deserialize<'a>>(&self, name: &str) -> Result<T> {
        let jmx: Jmx<T> = self.web.get_json(&format!("/jmx?qry=Hadoop:service=NameNode,name={name}")).await?;
        jmx.beans.into_iter().next().with_context(|| format!("the NameNode has no {name} yet"))
    }
}

fn site_xml(settings: &[(String, String)]) -> String {
    let escape = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;");
    let mut xml = String::from("<configuration>\n");
    for (name, value) in settings {
        let (name, value) = (escape(name), escape(value));
        // Writing to a String can't fail.
        let _ = writeln!(xml, "  <property><name>{name}</name><value>{value}</value></property>");
    }
    xml.push_str("</configuration>\n");
    xml
}

fn log4j_properties(audit: &Path) -> String {
    format!(
        "log4j.rootLogger=INFO,out\n\
         log4j.appender.out=org.apache.log4j.ConsoleAppender\n\
         log4j.appender.out.layout=org.apache.log4j.PatternLayout\n\
         log4j.appender.out.layout.ConversionPattern=%d{{ISO8601}} %p %c{{2}}: %m%n\n\
         log4j.logger.org.apache.hadoop.hdfs.server.namenode.FSNamesystem.audit=INFO,audit\n\
         log4j.additivity.org.apache.hadoop.hdfs.server.namenode.FSNamesystem.audit=false\n\
         log4j.appender.audit=org.apache.log4j.FileAppender\n\
         log4j.appender.audit.File={}\n\
         log4j.appender.audit.layout=org.apache.log4j.PatternLayout\n\
         log4j.appender.audit.layout.ConversionPattern=%d{{ISO8601}} %m%n\n",
        audit.display()
    )
}

/// The fields of an audit line are `name=value`, separated by tabs.
fn audit_line(line: &str) -> Option<AuditLine> {
    let field = |name: &str| {
        line.split(['\t', ' ']).find_map(|field| field.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned)
    };
    (field("allowed")? == "true").then_some(())?;
    Some(AuditLine {
        command: field("cmd")?,
        source: field("src")?,
        destination: field("dst").filter(|destination| destination != "null"),
        protocol: field("proto")?,
    })
}

fn streaming_address(log: &str) -> Option<String> {
    let line = log.lines().find(|line| line.contains("Opened streaming server at /"))?;
    let address = line.rsplit_once('/')?.1.trim();
    address.parse::<std::net::SocketAddr>().is_ok().then(|| address.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_line_of_the_audit_log() {
        let line = "2024-05-01 10:00:00,123 allowed=true\tugi=root (auth:SIMPLE)\tip=/127.0.0.1\tcmd=rename\tsrc=/a\tdst=/b\tperm=x\tproto=rpc";
        let expected = AuditLine {
            command: "rename".into(),
            source: "/a".into(),
            destination: Some("/b".into()),
            protocol: "rpc".into(),
        };
        assert_eq!(audit_line(line), Some(expected));
        assert_eq!(audit_line(&line.replace("allowed=true", "allowed=false")), None);
    }

    #[test]
    fn finds_the_address_that_a_datanode_chose() {
        let log = "a\n2024 INFO datanode.DataNode: Opened streaming server at /127.0.0.1:41731\nb";
        assert_eq!(streaming_address(log).as_deref(), Some("127.0.0.1:41731"));
    }
}
