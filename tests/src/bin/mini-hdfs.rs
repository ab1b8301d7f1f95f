//! A real HDFS on this machine to play with: `cargo run -p tributary-tests --bin mini-hdfs -- --datanodes 3`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tributary_tests::hdfs::{HdfsOptions, MiniHdfs};

/// Runs a real HDFS (Hadoop's NameNode and DataNodes) on loopback until Ctrl-C. Run tests/setup.sh once before.
#[derive(Parser)]
#[command(after_help = "Example: mini-hdfs --datanodes 3 --dir ./hdfs-state")]
struct Arguments {
    /// How many DataNodes.
    #[arg(long, default_value_t = 1, value_name = "N")]
    datanodes: usize,
    /// Copies of each block; default: one per DataNode, at most 3.
    #[arg(long, value_name = "N")]
    replication: Option<u16>,
    /// Keep all state in this empty folder; default: a temporary one, removed at the end.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let Arguments { datanodes, replication, dir } = Arguments::parse();
    let hdfs = MiniHdfs::start(HdfsOptions { datanodes, replication, folder: dir, ..HdfsOptions::default() }).await?;
    println!("uri      {}", hdfs.uri());
    println!("webhdfs  {}/webhdfs/v1/", hdfs.webhdfs().base());
    println!("conf     {}", hdfs.conf_dir().display());
    println!("audit    {}", hdfs.audit_log().display());
    println!("Ctrl-C ends it.");
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted.context("listening for Ctrl-C"),
        _ = terminate.recv() => Ok(()),
    }
}
