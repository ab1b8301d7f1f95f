//! The real parts that `tests/setup.sh` has installed: where they are, and a clear word when they are not there.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};

/// The Java source that setup compiled must be the one that this test was built with.
const LINES_JOB: &str = include_str!("../readers/LinesJob.java");

/// What is installed for the tests.
#[derive(Clone, Debug)]
pub struct Parts {
    java_home: PathBuf,
    /// The class path of Hadoop's servers and client, without a configuration folder.
    pub hadoop_classpath: String,
    /// The Python that has PySpark.
    pub spark_python: PathBuf,
    /// The folder with the compiled MapReduce job.
    pub mapreduce_classes: PathBuf,
}

impl Parts {
    /// Finds the parts in the cache folder that `tests/setup.sh` uses too.
    ///
    /// # Errors
    /// A part is missing, or was made for another `HADOOP_HOME` or from another Java source. The message says to run setup.
    pub fn find() -> Result<Self> {
        Self::find_in(&cache_folder()?)
            .context("the tests need real parts that are not installed: run tests/setup.sh first")
    }

    fn find_in(cache: &Path) -> Result<Self> {
        let list = cache.join("parts");
        let text = fs::read_to_string(&list).with_context(|| format!("reading {}", list.display()))?;
        let found: HashMap<&str, &str> = text.lines().filter_map(|line| line.split_once('=')).collect();
        let get = |key: &str| found.get(key).copied().with_context(|| format!("{} has no {key}", list.display()));

        let hadoop_home = env::var("HADOOP_HOME").unwrap_or_default();
        let made_for = get("hadoop_home")?;
        ensure!(made_for == hadoop_home, "HADOOP_HOME is {hadoop_home:?} now and was {made_for:?} at setup");
        let parts = Self {
            java_home: get("java_home")?.into(),
            hadoop_classpath: get("hadoop_classpath")?.into(),
            spark_python: get("spark_python")?.into(),
            mapreduce_classes: get("mapreduce_classes")?.into(),
        };
        for file in [&parts.java(), &parts.spark_python] {
            ensure!(file.exists(), "{} is gone", file.display());
        }
        let compiled = parts.mapreduce_classes.join("LinesJob.java");
        let source = fs::read_to_string(&compiled).with_context(|| format!("reading {}", compiled.display()))?;
        ensure!(source == LINES_JOB, "the MapReduce job was compiled from another source");
        Ok(parts)
    }

    /// The home of the JDK.
    #[must_use]
    pub fn java_home(&self) -> &Path {
        &self.java_home
    }

    /// The `java` command.
    #[must_use]
    pub fn java(&self) -> PathBuf {
        self.java_home.join("bin/java")
    }

    /// What a Java program needs to run Hadoop 2.7 on a JDK of today.
    #[must_use]
    pub fn hadoop_jvm_flags() -> Vec<String> {
        const OPENED: [&str; 6] = [
            "java.base/java.lang",
            "java.base/java.nio",
            "java.base/sun.nio.ch",
            "java.base/java.util",
            "java.base/sun.security.util",
            "java.security.jgss/sun.security.krb5",
        ];
        let mut flags = vec![
            "--add-exports=java.security.jgss/sun.security.krb5=ALL-UNNAMED".to_owned(),
            "-Djava.net.preferIPv4Stack=true".to_owned(),
            "-XX:+UseSerialGC".to_owned(),
            "-Xmx384m".to_owned(),
        ];
        flags.extend(OPENED.iter().map(|package| format!("--add-opens={package}=ALL-UNNAMED")));
        flags
    }

    /// Finds a command of the system, also in the folders that only root has in its `PATH`.
    ///
    /// # Errors
    /// It is not there. The message says to run setup.
    pub fn command(name: &str) -> Result<PathBuf> {
        let path = env::var_os("PATH").unwrap_or_default();
        let folders = env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
        for folder in folders {
            let file = folder.join(name);
            if file.is_file() {
                return Ok(file);
            }
        }
        bail!("the tests need the command {name}, which is not installed: run tests/setup.sh first");
    }
}

fn cache_folder() -> Result<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(folder) = set("TRIBUTARY_CACHE") {
        return Ok(folder);
    }
    let caches = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
    Ok(caches.context("neither TRIBUTARY_CACHE, XDG_CACHE_HOME nor HOME is set")?.join("tributary"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_part_says_what_to_run() {
        let empty = tempfile::tempdir().expect("a folder");
        let error = Parts::find_in(empty.path()).expect_err("nothing is installed there");
        assert!(format!("{error:#}").contains("parts"), "{error:#}");
        let error = Parts::command("no-such-command-anywhere").expect_err("there is no such command");
        assert!(format!("{error:#}").contains("run tests/setup.sh first"), "{error:#}");
    }
}
