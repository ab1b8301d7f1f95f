//! What the files of one hour say of one another: manifest, seals, data files. Pure.

use std::collections::{BTreeMap, BTreeSet};

use tributary_common::bucket::{Bucket, BucketSize};
use tributary_common::ids::{CategoryName, LaneId};

use crate::root::hours::{
    FORM_VERSION, LATE_DIR, MANIFEST_FILE, Manifest, ManifestFile, PARTIAL_FILE, is_success, seal_file,
};
use crate::root::ledger::{AgentCount, Contents, HourKey, Seal};

/// What was found of a data file.
#[derive(Debug, Clone, Default)]
pub(super) struct Data {
    /// Its length in bytes.
    pub(super) len: u64,
    /// Its whole frames.
    pub(super) contents: Contents,
    /// What is wrong inside of it.
    pub(super) damage: Vec<String>,
}

/// A file that should be JSON of some form: the form, or why it is not.
pub(super) type Form<T> = Result<T, String>;

/// What lies in a directory of files: an hour's own, or its late ones.
#[derive(Debug, Default)]
pub(super) struct Folder {
    /// The data files by name.
    pub(super) data: BTreeMap<String, Data>,
    /// All other names.
    pub(super) others: BTreeSet<String>,
}

/// An hour as it was found.
#[derive(Debug)]
pub(super) struct Hour {
    /// Its category, from its path.
    pub(super) category: CategoryName,
    /// Its start, from its path, in seconds since 1970.
    pub(super) start_s: i64,
    /// The name of its directory.
    pub(super) dir_name: String,
    /// Its manifest, if there is one.
    pub(super) manifest: Option<Form<Manifest>>,
    /// The seals by lane.
    pub(super) seals: BTreeMap<LaneId, Form<Seal>>,
    /// Its own files.
    pub(super) own: Folder,
    /// What came late.
    pub(super) late: Folder,
    /// The manifests of late files, by the names of the data files that they are for.
    pub(super) late_manifests: BTreeMap<String, Form<Manifest>>,
}

/// The name of the manifest of a late file.
#[must_use]
pub(super) fn late_manifest_of(file: &str) -> String {
    format!("_{file}.manifest.json")
}

impl Hour {
    /// All that doesn't fit, as sentences.
    #[must_use]
    pub(super) fn misfits(&self, success_file: &str) -> Vec<String> {
        let mut found = Vec::new();
        for folder in [&self.own, &self.late] {
            for (name, data) in &folder.data {
                found.extend(data.damage.iter().map(|damage| format!("{name}: {damage}")));
            }
        }
        self.check_own(success_file, &mut found);
        self.check_late(&mut found);
        found
    }

    fn check_own(&self, success_file: &str, found: &mut Vec<String>) {
        let seals: Vec<&Seal> = self.seals.values().filter_map(|seal| seal.as_ref().ok()).collect();
        for (lane, seal) in &self.seals {
            match seal {
                Err(reason) => found.push(format!("{} can't be read: {reason}", seal_file(*lane))),
                Ok(seal) => self.check_seal(*lane, seal, found),
            }
        }
        let manifest = match &self.manifest {
            // Retention removed the hour, and something came later.
            None if self.own.data.is_empty() && self.seals.is_empty() => None,
            None => {
                found.push(format!("{MANIFEST_FILE} is missing: no job may rely on this hour"));
                None
            }
            Some(Err(reason)) => {
                found.push(format!("{MANIFEST_FILE} can't be read: {reason}"));
                None
            }
            Some(Ok(manifest)) => Some(manifest),
        };
        if let Some(manifest) = manifest {
            let key = self.check_key(MANIFEST_FILE, manifest, found);
            if let Some(key) = key
                && seals.len() == self.seals.len()
            {
                let seals: Vec<Seal> = seals.into_iter().cloned().collect();
                let expected = Manifest::of(&key, &seals);
                found.extend(difference(&expected, manifest));
                if is_success(&seals) != self.own.others.contains(success_file) {
                    let what = if is_success(&seals) { "is missing" } else { "is there, and agents are missing" };
                    found.push(format!("{success_file} {what}"));
                }
            }
            check_files(MANIFEST_FILE, manifest, &self.own, found);
            if manifest.complete == self.own.others.contains(PARTIAL_FILE) {
                let what = if manifest.complete { "is there, and no agent is missing" } else { "is missing" };
                found.push(format!("{PARTIAL_FILE} {what}"));
            }
        }
        let named: BTreeSet<&str> =
            manifest.into_iter().flat_map(|manifest| &manifest.files).map(|file| file.name.as_str()).collect();
        for name in self.own.data.keys().filter(|name| manifest.is_some() && !named.contains(name.as_str())) {
            found.push(format!("{name} is a foreign file: readers take it for data, and the manifest doesn't name it"));
        }
        let seal_files: BTreeSet<String> = self.seals.keys().map(|lane| seal_file(*lane)).collect();
        let known = [MANIFEST_FILE, success_file, LATE_DIR, PARTIAL_FILE];
        for name in self.own.others.iter().filter(|name| !known.contains(&name.as_str()) && !seal_files.contains(*name))
        {
            found.push(format!("{name} doesn't belong here"));
        }
    }

    /// What a seal says against the data files.
    fn check_seal(&self, lane: LaneId, seal: &Seal, found: &mut Vec<String>) {
        let name = seal_file(lane);
        if seal.lane != lane || seal.category != self.category || seal.bucket_start_s != self.start_s {
            found.push(format!("{name} is of lane {} of {} at {}", seal.lane, seal.category, seal.bucket_start_s));
        }
        let mut agents: BTreeMap<_, AgentCount> = BTreeMap::new();
        for file in &seal.files {
            let Some(data) = self.own.data.get(&file.name) else {
                found.push(format!("{}, which {name} names, is missing", file.name));
                return;
            };
            for (agent, count) in &data.contents.agents {
                agents.entry(agent.clone()).or_default().add(*count);
            }
        }
        if agents != seal.agents {
            found.push(format!("{name} says that its agents contributed {:?}; its files hold {agents:?}", seal.agents));
        }
    }

    fn check_key(&self, what: &str, manifest: &Manifest, found: &mut Vec<String>) -> Option<HourKey> {
        if manifest.version != FORM_VERSION {
            found.push(format!(
                "{what} has version {}; this program knows {FORM_VERSION}: use the newer program",
                manifest.version
            ));
            return None;
        }
        let size = BucketSize::try_from(manifest.bucket_size_s).ok();
        let bucket = size.and_then(|size| Bucket::new(manifest.bucket_start_s, size).ok());
        let Some(bucket) = bucket.filter(|bucket| {
            manifest.category == self.category && bucket.start_s() == self.start_s && bucket.dir_name() == self.dir_name
        }) else {
            found.push(format!(
                "{what} is of another hour: {} s from {} of {}",
                manifest.bucket_size_s, manifest.bucket_start_s, manifest.category
            ));
            return None;
        };
        Some(HourKey { category: self.category.clone(), bucket })
    }

    fn check_late(&self, found: &mut Vec<String>) {
        for name in self.late.data.keys().filter(|name| !self.late_manifests.contains_key(*name)) {
            found
                .push(format!("{LATE_DIR}/{name} is a foreign file: there is no {} beside it", late_manifest_of(name)));
        }
        for (name, manifest) in &self.late_manifests {
            let what = format!("{LATE_DIR}/{}", late_manifest_of(name));
            match manifest {
                Err(reason) => found.push(format!("{what} can't be read: {reason}")),
                Ok(manifest) => {
                    self.check_key(&what, manifest, found);
                    if manifest.files.iter().any(|file| file.name != *name) {
                        found.push(format!("{what} names another file than the one that it lies beside"));
                    }
                    check_files(&what, manifest, &self.late, found);
                }
            }
        }
        let known: BTreeSet<String> = self.late_manifests.keys().map(|name| late_manifest_of(name)).collect();
        for name in self.late.others.difference(&known) {
            found.push(format!("{LATE_DIR}/{name} doesn't belong here"));
        }
    }
}

/// How a manifest differs from the one that the seals make.
fn difference(expected: &Manifest, found: &Manifest) -> Option<String> {
    let names = |manifest: &Manifest| manifest.files.iter().map(|file| file.name.clone()).collect::<BTreeSet<_>>();
    let (sealed, named) = (names(expected), names(found));
    let what = if expected.lanes != found.lanes {
        let numbers = |lanes: &[LaneId]| lanes.iter().map(|lane| lane.0).collect::<Vec<_>>();
        format!("there are seals of the lanes {:?}, and it names {:?}", numbers(&expected.lanes), numbers(&found.lanes))
    } else if sealed != named {
        let only_sealed: Vec<&String> = sealed.difference(&named).collect();
        let only_named: Vec<&String> = named.difference(&sealed).collect();
        format!("only the seals name {only_sealed:?}, only the manifest names {only_named:?}")
    } else if expected.files != found.files {
        "they tell other lengths, checksums, records or lanes of the same files".to_owned()
    } else if expected != found {
        "they tell other sums".to_owned()
    } else {
        return None;
    };
    Some(format!("{MANIFEST_FILE} is not what the seals make: {what}"))
}

fn check_files(what: &str, manifest: &Manifest, folder: &Folder, found: &mut Vec<String>) {
    let mut all = Contents::default();
    for file in &manifest.files {
        match folder.data.get(&file.name) {
            None => found.push(format!("{} is missing; {what} names it", file.name)),
            Some(data) => {
                found.extend(check_file(what, file, data));
                all.append(&data.contents);
            }
        }
    }
    let said = (manifest.files.len(), manifest.records, manifest.bytes, &manifest.agents);
    let there = (manifest.files.len(), all.records, all.bytes, &all.agents);
    if manifest.files.iter().all(|file| folder.data.contains_key(&file.name)) && said != there {
        found.push(format!(
            "{what} says {} records in {} bytes of {} agents, and its files hold {} in {} of {}",
            said.1,
            said.2,
            said.3.len(),
            there.1,
            there.2,
            there.3.len(),
        ));
    }
}

fn check_file(what: &str, file: &ManifestFile, data: &Data) -> Option<String> {
    let ManifestFile { name, bytes, crc32c, records, .. } = file;
    let Contents { checksum, records: held, .. } = &data.contents;
    if *bytes != data.len {
        Some(format!("{name} has {} bytes; {what} says {bytes}", data.len))
    } else if records != held {
        Some(format!("{name} holds {held} records; {what} says {records}"))
    } else if crc32c != checksum {
        Some(format!(
            "{name} has the checksum {checksum}; {what} says {crc32c}: a frame was altered, swapped or replaced"
        ))
    } else {
        None
    }
}
