//! Readers that know nothing of Tributary: what a user's jobs find in a published tree.
//!
//! All three skip names that begin with `_` or `.` below the folder that they are given (`_SUCCESS`, `_MANIFEST.json`, `_late/`, an hour
//! that is still hidden), as Hadoop does. To read a hidden folder itself, like `…/hr=05/_late`, a job must be given what is in it:
//! MapReduce refuses the folder's name and takes `…/hr=05/_late/*`; [`read_lines`] does that by itself.
//!
//! Hadoop ends a line at `\n`, `\r` or `\r\n`: lines that are to be judged must hold no `\r`.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;
use tokio::sync::Semaphore;

use crate::hdfs::MiniHdfs;
use crate::lines::Lines;
use crate::parts::Parts;
use crate::process::{AtParentDeath, Process};
use crate::wait::until;
use crate::webhdfs::WebHdfs;

/// Only turns a hang into a failure.
const JOB_LIMIT: Duration = Duration::from_secs(1200);

/// How many jobs run at the same time in this process: each is a JVM that would take a whole machine.
static JOBS: Semaphore = Semaphore::const_new(2);

const SPARK_PARTITIONS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/readers/spark_partitions.py");
const SPARK_LINES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/readers/spark_lines.py");

/// Who reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// `zcat` (or `zstdcat`), over local files or over copies made with WebHDFS.
    Zcat,
    /// A MapReduce job of Hadoop 2.7 in its local runner, with `TextInputFormat`.
    MapReduce,
    /// `spark.read.text` of Spark 3.5.
    Spark,
}

impl Reader {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Zcat, Self::MapReduce, Self::Spark];
}

impl fmt::Display for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Zcat => "zcat",
            Self::MapReduce => "MapReduce",
            Self::Spark => "Spark",
        })
    }
}

/// A folder to read, with all that is below it.
#[derive(Clone, Debug)]
pub enum Tree {
    /// A local folder.
    Local(PathBuf),
    /// A folder in HDFS.
    Hdfs {
        /// `hdfs://HOST:PORT`
        uri: String,
        /// The same HDFS by HTTP.
        webhdfs: WebHdfs,
        /// Absolute.
        path: String,
    },
}

impl Tree {
    /// A folder of this HDFS.
    #[must_use]
    pub fn in_hdfs(hdfs: &MiniHdfs, path: impl Into<String>) -> Self {
        Self::Hdfs { uri: hdfs.uri(), webhdfs: hdfs.webhdfs().clone(), path: path.into() }
    }

    /// A folder below this one, or for jobs a pattern of folders.
    #[must_use]
    pub fn below(&self, relative: &str) -> Self {
        match self {
            Self::Local(root) => Self::Local(root.join(relative)),
            Self::Hdfs { uri, webhdfs, path } => Self::Hdfs {
                uri: uri.clone(),
                webhdfs: webhdfs.clone(),
                path: format!("{}/{relative}", path.trim_end_matches('/')),
            },
        }
    }

    /// The URI that a job is given.
    fn input(&self) -> String {
        let (uri, path) = match self {
            Self::Local(path) => ("file://", path.display().to_string()),
            Self::Hdfs { uri, path, .. } => (uri.as_str(), path.clone()),
        };
        let path = path.trim_end_matches('/');
        let all = if path.rsplit('/').next().is_some_and(is_hidden) { "/*" } else { "" };
        format!("{uri}{path}{all}")
    }
}

fn is_hidden(name: &str) -> bool {
    name.starts_with(['_', '.'])
}

/// Reads all lines below `tree`.
///
/// # Errors
/// The reader is not installed (the message says what to run), fails, or finds no such folder; the message has the end of its log.
pub async fn read_lines(reader: Reader, tree: &Tree) -> Result<Lines> {
    let folder = tempfile::Builder::new().prefix("tributary-reader-").tempdir().context("making a folder")?;
    let read = async {
        let files = match reader {
            Reader::Zcat => copied_files(tree, folder.path()).await?,
            Reader::MapReduce | Reader::Spark => {
                let _permit = JOBS.acquire().await.context("the jobs' permits are never closed")?;
                if reader == Reader::Spark {
                    spark(tree, folder.path()).await?
                } else {
                    map_reduce(tree, folder.path()).await?
                }
            }
        };
        tokio::task::spawn_blocking(move || Lines::of_files_in(folder, files)).await.context("hashing lines")?
    };
    read.await.with_context(|| format!("reading {} with {reader}", tree.input()))
}

async fn copied_files(tree: &Tree, folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    match tree {
        Tree::Local(root) => {
            let mut folders = vec![root.clone()];
            while let Some(next) = folders.pop() {
                for entry in fs::read_dir(&next).with_context(|| format!("listing {}", next.display()))? {
                    let entry = entry?;
                    if is_hidden(&entry.file_name().to_string_lossy()) {
                        continue;
                    }
                    let into = if entry.file_type()?.is_dir() { &mut folders } else { &mut files };
                    into.push(entry.path());
                }
            }
        }
        Tree::Hdfs { webhdfs, path, .. } => {
            let root = path.trim_end_matches('/');
            ensure!(webhdfs.status(path).await?.is_some(), "{path} is not there");
            for (file, status) in webhdfs.tree(root).await? {
                let below = file.strip_prefix(root).unwrap_or(&file);
                if below.split('/').any(is_hidden) {
                    continue;
                }
                // Numbered, because names repeat from folder to folder, and named, because the end tells the compression.
                let copy = folder.join(format!("{:06}-{}", files.len(), status.name));
                let mut output = File::create(&copy)?;
                let mut input = webhdfs.open(&file).await?;
                let mut copied = 0;
                while let Some(chunk) = input.chunk().await.with_context(|| format!("reading {file}"))? {
                    output.write_all(&chunk)?;
                    copied += chunk.len() as u64;
                }
                ensure!(copied == status.length, "{file} has {} bytes, and {copied} came", status.length);
                files.push(copy);
            }
        }
    }
    Ok(files)
}

/// A MapReduce job that has read a tree.
#[derive(Debug)]
pub struct LinesJob {
    /// What each map task wrote: the lines that it read, as they are. One file for each, also when it read nothing.
    pub outputs: Vec<PathBuf>,
    _folder: TempDir,
}

/// Has a MapReduce job read all lines below `tree`.
///
/// # Errors
/// As those of [`read_lines`].
pub async fn lines_job(tree: &Tree) -> Result<LinesJob> {
    let folder = tempfile::Builder::new().prefix("tributary-reader-").tempdir().context("making a folder")?;
    let _permit = JOBS.acquire().await.context("the jobs' permits are never closed")?;
    let outputs = map_reduce(tree, folder.path()).await.with_context(|| format!("a job over {}", tree.input()))?;
    Ok(LinesJob { outputs, _folder: folder })
}

async fn map_reduce(tree: &Tree, folder: &Path) -> Result<Vec<PathBuf>> {
    let parts = Parts::find()?;
    let conf = folder.join("conf");
    fs::create_dir(&conf)?;
    // The local runner keeps its job's files below this, by default in one place for all of the machine's jobs.
    let scratch = folder.join("scratch");
    let property = format!("<property><name>hadoop.tmp.dir</name><value>{}</value></property>", scratch.display());
    fs::write(conf.join("core-site.xml"), format!("<configuration>{property}</configuration>\n"))?;
    let log4j = "log4j.rootLogger=WARN,out\nlog4j.appender.out=org.apache.log4j.ConsoleAppender\n\
                 log4j.appender.out.layout=org.apache.log4j.SimpleLayout\n";
    fs::write(conf.join("log4j.properties"), log4j)?;
    let classpath =
        [&conf.display().to_string(), &parts.mapreduce_classes.display().to_string(), &parts.hadoop_classpath]
            .map(String::as_str)
            .join(":");
    let output = folder.join("lines");
    let mut job = Process::spawn(parts.java(), AtParentDeath::Kill, folder.join("log"), |command| {
        command.args(Parts::hadoop_jvm_flags()).args(["-cp", &classpath, "LinesJob", &tree.input()]);
        command.arg(format!("file://{}", output.display()));
    })?;
    finish(&mut job).await?;
    job_output(&output)
}

async fn spark(tree: &Tree, folder: &Path) -> Result<Vec<PathBuf>> {
    let output = folder.join("lines");
    python_job(SPARK_LINES, &tree.input(), &format!("file://{}", output.display()), folder).await?;
    job_output(&output)
}

/// Runs a Spark job that is given its input, its output and a folder for what it needs meanwhile.
async fn python_job(script: &str, input: &str, output: &str, folder: &Path) -> Result<()> {
    let parts = Parts::find()?;
    // Python ends its JVM when it ends, so its own death is enough.
    let mut job = Process::spawn(&parts.spark_python, AtParentDeath::Kill, folder.join("log"), |command| {
        command.args([script, input, output]).arg(folder.join("scratch"));
        command.env("JAVA_HOME", parts.java_home()).env("PYSPARK_PYTHON", &parts.spark_python);
        for name in ["SPARK_HOME", "PYTHONPATH", "HADOOP_CONF_DIR", "SPARK_CONF_DIR", "PYSPARK_SUBMIT_ARGS"] {
            command.env_remove(name);
        }
    })?;
    finish(&mut job).await
}

/// What Spark finds in a table of hours by discovering its partitions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Partitions {
    /// The lines of each partition: `dt` and `hr` as they stand in the folders' names.
    pub all: BTreeMap<(String, String), u64>,
    /// The same, read with the condition `hr = '07'`.
    pub only_seven: BTreeMap<(String, String), u64>,
}

/// Has Spark discover the partitions of the category whose folder is `tree`, and count their lines.
///
/// # Errors
/// As those of [`read_lines`].
pub async fn spark_partitions(tree: &Tree) -> Result<Partitions> {
    let folder = tempfile::Builder::new().prefix("tributary-reader-").tempdir().context("making a folder")?;
    let output = folder.path().join("counts");
    let _permit = JOBS.acquire().await.context("the jobs' permits are never closed")?;
    python_job(SPARK_PARTITIONS, &tree.input(), &output.display().to_string(), folder.path()).await?;
    let mut found = Partitions::default();
    for line in fs::read_to_string(&output).context("reading what Spark counted")?.lines() {
        let (into, fields) = match line.strip_prefix("only ") {
            Some(fields) => (&mut found.only_seven, fields),
            None => (&mut found.all, line),
        };
        let [dt, hr, count] = *fields.split(' ').collect::<Vec<_>>() else { bail!("Spark said {line:?}") };
        into.insert((dt.to_owned(), hr.to_owned()), count.parse()?);
    }
    Ok(found)
}

async fn finish(job: &mut Process) -> Result<()> {
    let status = until("the job's end", JOB_LIMIT, async || job.try_wait()).await?;
    ensure!(status.success(), "it failed ({status}): {}", job.log_tail());
    Ok(())
}

fn job_output(folder: &Path) -> Result<Vec<PathBuf>> {
    ensure!(folder.join("_SUCCESS").exists(), "the job ended without _SUCCESS in {}", folder.display());
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("part-")) {
            files.push(path);
        }
    }
    Ok(files)
}
