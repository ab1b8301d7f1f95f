//! Looks at what is published while a tree works and fails: an hour has to be whole when it is seen first, and stay as it is.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use jiff::Timestamp;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use xxhash_rust::xxh3::xxh3_64;

use crate::published::{Hour, Published, read};
use crate::readers::Tree;
use crate::synthetic::{TIME_AFTER, TIME_FORMAT};

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(3);

/// A published hour as it was when it was seen first.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    /// Records by its own manifest.
    records: u64,
    /// The hashes of all that is in its folder by their paths: data, manifest, seals. What came late doesn't belong to it.
    files: BTreeMap<String, u64>,
}

/// All that was seen.
#[derive(Debug, Default)]
struct Looks {
    hours: BTreeMap<String, Seen>,
    /// The hashes of what came late, by its paths.
    late: BTreeMap<String, u64>,
}

/// Somebody who looks.
#[derive(Debug)]
pub struct Watch {
    sink: Tree,
    end: CancellationToken,
    task: JoinHandle<Looks>,
}

impl Watch {
    /// Begins to look at a sink, every few seconds and as far as it can be read then.
    #[must_use]
    pub fn begin(sink: Tree) -> Self {
        let end = CancellationToken::new();
        let (tree, ended) = (sink.clone(), end.clone());
        let task = tokio::spawn(async move {
            let mut seen = Looks::default();
            while ended.run_until_cancelled(tokio::time::sleep(INTERVAL)).await.is_some() {
                // A sink that fails at the moment, or a rename during the look: the next one finds it.
                let _ = look(&tree, &mut seen).await;
            }
            seen
        });
        Self { sink, end, task }
    }

    /// Ends when all is published. `written` are the files with all lines, those of
    /// [`AccessLog`](crate::synthetic::AccessLog). Returns how many hours were looked at.
    ///
    /// # Errors
    /// An hour had not all of its lines when it was seen first, or has changed since then.
    pub async fn end(self, written: &[PathBuf]) -> Result<usize> {
        self.end.cancel();
        let mut seen = self.task.await.map_err(|error| anyhow!("looking at the sink: {error}"))?;
        look(&self.sink, &mut seen).await?;
        let mut now = Looks::default();
        look(&self.sink, &mut now).await?;
        for (path, hash) in &seen.late {
            ensure!(now.late.get(path) == Some(hash), "{path} came late, and has changed since, or is gone");
        }
        let lines = lines_per_bucket(written, "dt=%Y-%m-%d/hm=%H%M")?;
        for (folder, hour) in &seen.hours {
            let now = now.hours.get(folder);
            ensure!(now == Some(hour), "{folder} was {hour:?} at first and is {now:?} now");
            let minute = folder.split_once('/').map_or(folder.as_str(), |(_category, minute)| minute);
            let belong = lines.get(minute).copied().unwrap_or(0);
            ensure!(hour.records == belong, "{folder} had {} of {belong} lines when it was published", hour.records);
        }
        Ok(seen.hours.len())
    }
}

/// Adds what is new.
async fn look(sink: &Tree, seen: &mut Looks) -> Result<()> {
    for (folder, hour) in Published::look(sink).await?.hours {
        if !seen.hours.contains_key(&folder) && hour.success {
            let one = see(sink, &hour).await.with_context(|| folder.clone())?;
            seen.hours.insert(folder, one);
        }
        for path in hour.late_paths {
            if let Entry::Vacant(place) = seen.late.entry(path) {
                let hash = xxh3_64(&read(sink, place.key()).await?);
                place.insert(hash);
            }
        }
    }
    Ok(())
}

async fn see(sink: &Tree, hour: &Hour) -> Result<Seen> {
    let manifest = hour.manifest.as_ref().context("it has no manifest")?;
    let mut files = BTreeMap::new();
    for path in &hour.paths {
        files.insert(path.clone(), xxh3_64(&read(sink, path).await?));
    }
    Ok(Seen { records: manifest.records, files })
}

/// How many lines of these files belong to each bucket, by its folder; `form` says how one is named by its time.
///
/// # Errors
/// A file can't be read, or has a line that is not of [`AccessLog`](crate::synthetic::AccessLog).
pub fn lines_per_bucket(files: &[PathBuf], form: &str) -> Result<BTreeMap<String, u64>> {
    let mut counts = BTreeMap::new();
    // Lines stand in the order of their times: most have the time of the one before.
    let (mut last, mut folder) = (String::new(), String::new());
    for path in files {
        let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        for line in text.lines() {
            let time = line
                .split_once(TIME_AFTER)
                .and_then(|(_, rest)| rest.split_once(']'))
                .context("a line without a time")?
                .0;
            if time != last {
                let moment =
                    Timestamp::strptime(TIME_FORMAT, time).with_context(|| format!("reading the time {time}"))?;
                time.clone_into(&mut last);
                folder = moment.strftime(form).to_string();
            }
            match counts.get_mut(&folder) {
                Some(count) => *count += 1,
                None => drop(counts.insert(folder.clone(), 1)),
            }
        }
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::synthetic::AccessLog;

    fn write(root: &Path, path: &str, bytes: &[u8]) -> Result<()> {
        let path = root.join(path);
        fs::create_dir_all(path.parent().context("a folder")?)?;
        Ok(fs::write(path, bytes)?)
    }

    fn publish(root: &Path, records: u64) -> Result<()> {
        let hour = "app/dt=2026-11-22/hm=2015";
        write(root, &format!("{hour}/x.gz"), b"12345")?;
        let files = format!(r#"[{{"name":"x.gz","bytes":5,"records":{records}}}]"#);
        write(
            root,
            &format!("{hour}/_MANIFEST.json"),
            format!(r#"{{"records":{records},"files":{files},"complete":true,"missing":[]}}"#).as_bytes(),
        )?;
        write(root, &format!("{hour}/_SUCCESS"), b"")
    }

    #[tokio::test]
    async fn an_hour_that_is_not_whole_or_changes_is_found() -> Result<()> {
        let mut text = Vec::new();
        let mut log = AccessLog::default();
        let minute: Timestamp = "2026-11-22T20:15:00Z".parse()?;
        (0..3).for_each(|n| log.line(n, minute.as_second() + 29 * n as i64, &mut text));
        let said = async |records: u64, change: Option<(&str, &[u8])>| {
            let folder = tempfile::tempdir()?;
            let root = folder.path().join("sink");
            write(folder.path(), "written", &text)?;
            publish(&root, records)?;
            write(&root, "app/dt=2026-11-22/hm=2015/_late/z.gz", b"12")?;
            let tree = Tree::Local(root.clone());
            let mut seen = Looks::default();
            look(&tree, &mut seen).await?;
            if let Some((path, bytes)) = change {
                write(&root, &format!("app/dt=2026-11-22/hm=2015/{path}"), bytes)?;
            }
            let watch = Watch { sink: tree, end: CancellationToken::new(), task: tokio::spawn(async { seen }) };
            watch.end(&[folder.path().join("written")]).await
        };
        assert_eq!(said(3, None).await?, 1);
        assert_eq!(said(3, Some(("_late/y.gz", b"1"))).await?, 1);
        let manifest =
            br#"{"records":3,"files":[{"name":"x.gz","bytes":5,"records":3}],"complete":true,"missing":[],"more":1}"#;
        for (records, change) in [
            (2, None),
            (4, None),
            (3, Some(("x.gz", &b"54321"[..]))),
            (3, Some(("y.gz", &b"1"[..]))),
            (3, Some(("_MANIFEST.json", &manifest[..]))),
            (3, Some(("_seal-0.json", &b"{}"[..]))),
            (3, Some(("_late/z.gz", &b"21"[..]))),
        ] {
            said(records, change).await.expect_err("something is wrong");
        }
        Ok(())
    }
}
