//! What is in a sink, told from its files' names and manifests, without the code under test.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::readers::Tree;

/// A data file in the sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// Below the sink, like `nginx-access/dt=2026-11-22/hm=2015/x.gz`.
    pub path: String,
    /// Its length in bytes.
    pub bytes: u64,
}

/// A published bucket.
#[derive(Clone, Debug, Default)]
pub struct Hour {
    /// What readers see.
    pub files: Vec<DataFile>,
    /// What came after it was published.
    pub late: Vec<DataFile>,
    /// Whether its success file is there.
    pub success: bool,
    /// Whether `_PARTIAL.json` is there.
    pub partial: bool,
    /// Its own manifest.
    pub manifest: Option<Manifest>,
    /// Those of the late files.
    pub late_manifests: Vec<Manifest>,
    /// The paths of all that is in its folder: files, manifests, seals.
    pub paths: Vec<String>,
    /// The same of what came late.
    pub late_paths: Vec<String>,
}

impl Hour {
    /// Records in its manifest and those of the late files.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.manifests().map(|manifest| manifest.records).sum()
    }

    /// Its manifest and those of the late files.
    pub fn manifests(&self) -> impl Iterator<Item = &Manifest> {
        self.manifest.iter().chain(&self.late_manifests)
    }
}

/// What hours must be like.
#[derive(Clone, Debug)]
pub struct Rules {
    /// At what size files are closed.
    pub roll_size: u64,
    /// The hosts that are away for ever: hours may be published without them, and without anybody else never.
    pub may_lack: Vec<String>,
    /// Whether an hour that lacks one of them has its success file all the same.
    pub partial_succeeds: bool,
}

/// The fields of a manifest that the tests need.
#[derive(Clone, Debug, Deserialize)]
pub struct Manifest {
    /// Records in all its files.
    pub records: u64,
    /// Its files.
    pub files: Vec<ManifestFile>,
    /// Whether no agent is missing.
    pub complete: bool,
    /// The agents that are missing.
    pub missing: Vec<Missing>,
}

/// An agent that an hour was published without.
#[derive(Clone, Debug, Deserialize)]
pub struct Missing {
    /// Its id.
    pub agent: String,
    /// Its host name.
    pub host: String,
}

/// A file in a manifest.
#[derive(Clone, Debug, Deserialize)]
pub struct ManifestFile {
    /// Its name in its folder.
    pub name: String,
    /// The lane that wrote it; a late file's manifest may leave it out.
    #[serde(default)]
    pub lane: u16,
    /// Its length.
    pub bytes: u64,
    /// Its records.
    pub records: u64,
}

/// A look at a sink.
#[derive(Clone, Debug, Default)]
pub struct Published {
    /// The published buckets by their folder below the sink.
    pub hours: BTreeMap<String, Hour>,
    /// Data files that aren't published: in the root's own folder, or in a bucket that is still hidden.
    pub unpublished: Vec<DataFile>,
}

impl Published {
    /// Looks.
    ///
    /// # Errors
    /// The sink can't be read; also when something was renamed during the look, as happens while a root works.
    pub async fn look(sink: &Tree) -> Result<Self> {
        let mut seen = Self::default();
        for file in files(sink).await? {
            seen.sort_in(sink, file).await?;
        }
        Ok(seen)
    }

    async fn sort_in(&mut self, sink: &Tree, file: DataFile) -> Result<()> {
        let (folder, name) = file.path.rsplit_once('/').unwrap_or(("", &file.path));
        let is_data = name.ends_with(".gz") || name.ends_with(".zst");
        // A root that was killed while it tried the sink out leaves what it tried; it is deleted after a day.
        let is_internal = |part: &str| part.starts_with('.') || part == "_tributary" || part.starts_with("_probe-");
        let internal = folder.split('/').any(is_internal);
        if internal {
            // A call to create a file whose answer was lost may be carried out late: what it leaves is empty, belongs to nobody,
            // and is deleted by the lane's next owner.
            if is_data && file.bytes > 0 {
                self.unpublished.push(file);
            }
            return Ok(());
        }
        let (hour, is_late) = folder.strip_suffix("/_late").map_or((folder, false), |hour| (hour, true));
        let hour = hour.to_owned();
        let is_late_manifest = is_late && name.starts_with('_') && name.ends_with(".manifest.json");
        let entry = self.hours.entry(hour).or_default();
        let paths = if is_late { &mut entry.late_paths } else { &mut entry.paths };
        paths.push(file.path.clone());
        if name == "_MANIFEST.json" {
            entry.manifest = Some(read_manifest(sink, &file.path).await?);
        } else if is_late_manifest {
            entry.late_manifests.push(read_manifest(sink, &file.path).await?);
        } else if name == "_SUCCESS" {
            entry.success = true;
        } else if name == "_PARTIAL.json" {
            entry.partial = true;
        } else if is_data && is_late {
            entry.late.push(file);
        } else if is_data {
            entry.files.push(file);
        } else {
            ensure!(name.starts_with('_'), "readers would take {} for data", file.path);
        }
        Ok(())
    }

    /// Records in all manifests.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.hours.values().map(Hour::records).sum()
    }

    /// The files that readers of published buckets see.
    #[must_use]
    pub fn files(&self) -> Vec<DataFile> {
        self.hours.values().flat_map(|hour| hour.files.iter().cloned()).collect()
    }

    /// The late files.
    #[must_use]
    pub fn late(&self) -> Vec<DataFile> {
        self.hours.values().flat_map(|hour| hour.late.iter().cloned()).collect()
    }

    /// Fails when manifests and files differ, a success file is missing or should not be there, an hour lacks an agent that is
    /// not away for ever, or there are more files than there may be.
    ///
    /// # Errors
    /// The first that is wrong.
    pub fn check_manifests(&self, rules: &Rules) -> Result<()> {
        for (folder, hour) in &self.hours {
            let complete = hour.manifest.as_ref().is_none_or(|manifest| manifest.complete);
            ensure!(!complete || hour.success, "{folder} has no _SUCCESS");
            ensure!(complete || hour.success == rules.partial_succeeds, "{folder} lacks agents, and _SUCCESS is wrong");
            ensure!(complete != hour.partial, "{folder} has a wrong _PARTIAL.json, or none");
            let mut named: Vec<(String, u64)> = Vec::new();
            for manifest in hour.manifests() {
                let records: u64 = manifest.files.iter().map(|file| file.records).sum();
                ensure!(
                    records == manifest.records,
                    "{folder}: a manifest's {} records are {records}",
                    manifest.records
                );
                ensure!(manifest.complete == manifest.missing.is_empty(), "{folder}: {:?}", manifest.missing);
                let wrong = manifest.missing.iter().find(|one| !rules.may_lack.contains(&one.host));
                ensure!(wrong.is_none(), "{folder} was published without {wrong:?}");
                check_bound(manifest, rules.roll_size).with_context(|| folder.clone())?;
                named.extend(manifest.files.iter().map(|file| (file.name.clone(), file.bytes)));
            }
            let present = hour.files.iter().chain(&hour.late);
            let mut present: Vec<(String, u64)> =
                present.map(|file| (file.path.rsplit('/').next().unwrap_or_default().to_owned(), file.bytes)).collect();
            named.sort();
            present.sort();
            ensure!(named == present, "{folder}: the manifests name {named:?}, and there are {present:?}");
        }
        Ok(())
    }
}

/// Fails when a lane has more files of a codec than twice the bytes over the roll size, and one.
fn check_bound(manifest: &Manifest, roll_size: u64) -> Result<()> {
    let mut lanes: BTreeMap<(u16, &str), (u64, u64)> = BTreeMap::new();
    for file in &manifest.files {
        let codec = file.name.rsplit('.').next().unwrap_or_default();
        let (files, bytes) = lanes.entry((file.lane, codec)).or_default();
        *files += 1;
        *bytes += file.bytes;
    }
    for ((lane, codec), (files, bytes)) in lanes {
        let most = 2 * bytes / roll_size + 1;
        ensure!(files <= most, "lane {lane} has {files} files of {codec} with {bytes} bytes; {most} are the most");
    }
    Ok(())
}

/// All files below the root of `tree`, hidden ones too.
async fn files(tree: &Tree) -> Result<Vec<DataFile>> {
    match tree {
        Tree::Local(root) => local_files(root),
        Tree::Hdfs { webhdfs, path, .. } => {
            let root = path.trim_end_matches('/');
            let below = |file: String| file.strip_prefix(root).unwrap_or(&file).trim_start_matches('/').to_owned();
            let files = webhdfs.tree(root).await?;
            Ok(files.into_iter().map(|(file, status)| DataFile { path: below(file), bytes: status.length }).collect())
        }
    }
}

fn local_files(root: &Path) -> Result<Vec<DataFile>> {
    let mut files = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let full = root.join(&folder);
        for entry in fs::read_dir(&full).with_context(|| format!("listing {}", full.display()))? {
            let entry = entry?;
            let path = folder.join(entry.file_name());
            match entry.metadata() {
                Ok(metadata) if metadata.is_dir() => folders.push(path),
                Ok(metadata) => {
                    files.push(DataFile { path: path.to_string_lossy().into_owned(), bytes: metadata.len() });
                }
                // A temporary file that is gone meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).with_context(|| format!("looking at {}", path.display())),
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

async fn read_manifest(tree: &Tree, path: &str) -> Result<Manifest> {
    serde_json::from_slice(&read(tree, path).await?).with_context(|| format!("reading {path}"))
}

/// The bytes of a file below the root of `tree`.
///
/// # Errors
/// It can't be read.
pub async fn read(tree: &Tree, path: &str) -> Result<Vec<u8>> {
    match tree {
        Tree::Local(root) => fs::read(root.join(path)).with_context(|| format!("reading {path}")),
        Tree::Hdfs { webhdfs, path: root, .. } => webhdfs.read(&format!("{}/{path}", root.trim_end_matches('/'))).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sorts_what_is_published_late_and_neither() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let write = |path: &str, text: &str| -> Result<()> {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().context("a folder")?)?;
            Ok(fs::write(path, text)?)
        };
        let hour = "app/dt=2026-11-22/hm=2015";
        write(&format!("{hour}/x.gz"), "12345")?;
        write(
            &format!("{hour}/_MANIFEST.json"),
            r#"{"records":3,"files":[{"name":"x.gz","lane":0,"bytes":5,"records":3}],"complete":true,"missing":[],"version":1}"#,
        )?;
        write(&format!("{hour}/_late/y.gz"), "1")?;
        write("app/dt=2026-11-22/.hm=2016/z.gz", "12")?;
        write("_tributary/lanes/0/e1-x/s.gz", "123")?;
        write("_tributary/lanes/0/e1-x/ledger-0", "")?;
        write("_tributary/lanes/0/e1-x/empty.gz", "")?;
        let look = async || Published::look(&Tree::Local(folder.path().to_owned())).await;
        let seen = look().await?;
        assert_eq!((seen.records(), seen.files().len(), seen.late().len(), seen.unpublished.len()), (3, 1, 1, 2));
        let rules = Rules { roll_size: 4, may_lack: vec!["web-1".into()], partial_succeeds: false };
        assert!(format!("{:#}", seen.check_manifests(&rules).expect_err("no _SUCCESS")).contains("_SUCCESS"));
        write(&format!("{hour}/_SUCCESS"), "")?;
        let error = look().await?.check_manifests(&rules).expect_err("a file without a manifest");
        assert!(format!("{error:#}").contains("y.gz"), "{error:#}");
        write(
            &format!("{hour}/_late/_y.gz.manifest.json"),
            r#"{"records":1,"files":[{"name":"y.gz","bytes":1,"records":1}],"complete":true,"missing":[]}"#,
        )?;
        look().await?.check_manifests(&rules)?;
        write(&format!("{hour}/readme"), "")?;
        assert!(look().await.is_err(), "readers would read it");
        Ok(())
    }

    fn hour(files: &[u64], missing: &[&str], success: bool) -> Published {
        let of = |host: &&str| Missing { agent: (*host).to_owned(), host: (*host).to_owned() };
        let file =
            |(n, bytes): (usize, &u64)| ManifestFile { name: format!("{n}.gz"), lane: 1, bytes: *bytes, records: 1 };
        let manifest = Manifest {
            records: files.len() as u64,
            files: files.iter().enumerate().map(file).collect(),
            complete: missing.is_empty(),
            missing: missing.iter().map(of).collect(),
        };
        let present = manifest.files.iter().map(|file| DataFile { path: file.name.clone(), bytes: file.bytes });
        let hour = Hour {
            files: present.collect(),
            success,
            partial: !missing.is_empty(),
            manifest: Some(manifest),
            ..Hour::default()
        };
        Published { hours: [("app".to_owned(), hour)].into(), unpublished: Vec::new() }
    }

    #[test]
    fn hours_have_few_files_and_lack_only_who_is_away_for_ever() {
        let rules = |partial_succeeds| Rules { roll_size: 100, may_lack: vec!["web-1".into()], partial_succeeds };
        let is_good = |hour: Published, partial_succeeds| hour.check_manifests(&rules(partial_succeeds)).is_ok();
        assert!(is_good(hour(&[50, 50, 99], &[], true), false));
        assert!(!is_good(hour(&[50, 20, 20], &[], true), false), "two files could be one");
        for succeeds in [false, true] {
            assert!(is_good(hour(&[1], &["web-1"], succeeds), succeeds));
            assert!(!is_good(hour(&[1], &["web-1"], !succeeds), succeeds));
            assert!(!is_good(hour(&[1], &["web-1", "web-2"], succeeds), succeeds));
            assert!(!is_good(hour(&[1], &[], false), succeeds));
        }
    }
}
