//! What the files of one hour say of one another: manifest, seals, data files. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use tributary_common::bucket::{Bucket, BucketSize};
use tributary_common::ids::{AgentId, CategoryName, LaneId};

use crate::dfs::DfsPath;
use crate::published::is_hidden;
use crate::root::hours::{
    FORM_VERSION, LATE_DIR, MANIFEST_FILE, Manifest, ManifestFile, PARTIAL_FILE, Partial, is_success, seal_file,
};
use crate::root::ledger::{AgentCount, Contents, HourKey, Seal};
use crate::root::sink::HourDirs;

/// So many agents, of those that don't fit, are named.
const NAMED: usize = 3;

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
    /// Its directory.
    pub(super) path: DfsPath,
    /// Its manifest, if there is one.
    pub(super) manifest: Option<Form<Manifest>>,
    /// The names of those whose data may be missing, if there is such a file.
    pub(super) partial: Option<Form<Partial>>,
    /// The seals by lane.
    pub(super) seals: BTreeMap<LaneId, Form<Seal>>,
    /// Its own files.
    pub(super) own: Folder,
    /// What came late.
    pub(super) late: Folder,
    /// The manifests of late files, by the names of the data files that they are for.
    pub(super) late_manifests: BTreeMap<String, Form<Manifest>>,
}

/// What lies in the directories of the lanes: what is not in its hour yet may still come.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// The names of the data files.
    pub(super) files: BTreeSet<String>,
    /// The hours that their frames are of, by their starts.
    pub(super) hours: BTreeSet<(CategoryName, i64)>,
}

/// What doesn't fit, as sentences.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// What is lost, double or altered, or can't be proved.
    pub(super) wrong: Vec<String>,
    /// What is worth knowing.
    pub(super) notes: Vec<String>,
}

impl Findings {
    fn wrong(&mut self, what: String) {
        self.wrong.push(what);
    }
}

/// The name of the manifest of a late file.
#[must_use]
pub(super) fn late_manifest_of(file: &str) -> String {
    format!("_{file}.manifest.json")
}

/// The lane whose seal has this name.
#[must_use]
pub(super) fn lane_of_seal(name: &str) -> Option<LaneId> {
    let lane = name.strip_prefix("_seal-")?.strip_suffix(".json")?.parse().ok().map(LaneId)?;
    // Not 01: there is one seal of a lane.
    (seal_file(lane) == name).then_some(lane)
}

/// The data file whose manifest has this name.
#[must_use]
pub(super) fn file_of_late_manifest(name: &str) -> Option<&str> {
    name.strip_prefix('_')?.strip_suffix(".manifest.json")
}

impl Hour {
    /// Whether this may be an hour that a root is working on: late files come one by one, each after its manifest, and where
    /// retention has removed the hour, its directory comes before them.
    #[must_use]
    pub(super) fn may_be_moving(&self, success_file: &str) -> bool {
        let whole = self.late.data.len() == self.late_manifests.len()
            && self.late.data.keys().all(|name| self.late_manifests.contains_key(name));
        !whole || (self.has_nothing_own(success_file) && self.has_nothing_late())
    }

    fn has_nothing_own(&self, success_file: &str) -> bool {
        let own = |name: &str| name == success_file || name == PARTIAL_FILE || lane_of_seal(name).is_some();
        self.manifest.is_none() && self.own.data.is_empty() && !self.own.others.iter().any(|name| own(name))
    }

    fn has_nothing_late(&self) -> bool {
        self.late.data.is_empty() && self.late_manifests.is_empty()
    }

    /// All that doesn't fit. `waiting` counts only for what is on its way.
    #[must_use]
    pub(super) fn misfits(&self, success_file: &str, waiting: &Waiting) -> Findings {
        let mut found = Findings::default();
        for (folder, dir) in [(&self.own, ""), (&self.late, "_late/")] {
            for (name, data) in &folder.data {
                found.wrong.extend(data.damage.iter().map(|damage| format!("{dir}{name}: {damage}")));
            }
        }
        self.check_own(success_file, waiting, &mut found);
        self.check_late(waiting, &mut found);
        found
    }

    fn check_own(&self, success_file: &str, waiting: &Waiting, found: &mut Findings) {
        let seals: Vec<&Seal> = self.seals.values().filter_map(|seal| seal.as_ref().ok()).collect();
        for (lane, seal) in &self.seals {
            match seal {
                Err(reason) => found.wrong(format!("{} can't be read: {reason}", seal_file(*lane))),
                Ok(seal) => self.check_seal(*lane, seal, found),
            }
        }
        check_names(&seals, found);
        let manifest = match &self.manifest {
            // Retention removed the hour, and something came later.
            None if self.has_nothing_own(success_file) && !self.has_nothing_late() => None,
            None if self.has_nothing_own(success_file)
                && self.own.others.contains(LATE_DIR)
                && waiting.hours.contains(&(self.category.clone(), self.start_s)) =>
            {
                found.notes.push("it is empty; late data for it waits in a lane".into());
                None
            }
            None => {
                found.wrong(format!("{MANIFEST_FILE} is missing: no job may rely on this hour"));
                None
            }
            Some(Err(reason)) => {
                found.wrong(format!("{MANIFEST_FILE} can't be read: {reason}"));
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
                if let Some(what) = difference(&expected, manifest) {
                    found.wrong(format!("{MANIFEST_FILE} is not what the seals make: {what}"));
                }
                if is_success(&seals) != self.own.others.contains(success_file) {
                    let what = if is_success(&seals) { "is missing" } else { "is there, and agents are missing" };
                    found.wrong(format!("{success_file} {what}"));
                }
            }
            check_files(MANIFEST_FILE, manifest, &self.own, found);
            self.check_partial(manifest, found);
        }
        let named: BTreeSet<&str> =
            manifest.into_iter().flat_map(|manifest| &manifest.files).map(|file| file.name.as_str()).collect();
        for name in self.own.data.keys().filter(|name| manifest.is_some() && !named.contains(name.as_str())) {
            found
                .wrong(format!("{name} is a foreign file: readers take it for data, and the manifest doesn't name it"));
        }
        let mut known: BTreeSet<String> = self.seals.keys().map(|lane| seal_file(*lane)).collect();
        known.extend([MANIFEST_FILE, success_file, LATE_DIR, PARTIAL_FILE].map(str::to_owned));
        foreign_names("", self.own.others.difference(&known), found);
    }

    /// What a seal says against its place and the data files.
    fn check_seal(&self, lane: LaneId, seal: &Seal, found: &mut Findings) {
        let name = seal_file(lane);
        if seal.version != FORM_VERSION {
            found.wrong(other_version(&name, seal.version));
            return;
        }
        let key = self.key_of(&seal.category, seal.bucket_start_s, seal.bucket_size_s);
        if seal.lane != lane || key.is_none() {
            found.wrong(format!(
                "{name} is of lane {} of {}, of {} s from {}",
                seal.lane, seal.category, seal.bucket_size_s, seal.bucket_start_s
            ));
        }
        let mut agents: BTreeMap<AgentId, AgentCount> = BTreeMap::new();
        let mut all = true;
        for file in &seal.files {
            let Some(data) = self.own.data.get(&file.name) else {
                found.wrong(format!("{}, which {name} names, is missing", file.name));
                all = false;
                continue;
            };
            for (agent, count) in &data.contents.agents {
                agents.entry(agent.clone()).or_default().add(*count);
            }
        }
        if all && let Some(what) = difference_of_agents(&seal.agents, &agents) {
            found.wrong(format!("{name} says that its agents contributed other counts than its files hold: {what}"));
        }
    }

    /// The bucket, if its directory is this one.
    fn key_of(&self, category: &CategoryName, start_s: i64, size_s: u32) -> Option<HourKey> {
        let bucket = Bucket::new(start_s, BucketSize::try_from(size_s).ok()?).ok()?;
        let fits = *category == self.category && HourDirs::new(category, bucket).visible == self.path;
        fits.then(|| HourKey { category: category.clone(), bucket })
    }

    fn check_key(&self, what: &str, manifest: &Manifest, found: &mut Findings) -> Option<HourKey> {
        let Manifest { version, category, bucket_start_s, bucket_size_s, .. } = manifest;
        if *version != FORM_VERSION {
            found.wrong(other_version(what, *version));
            return None;
        }
        let key = self.key_of(category, *bucket_start_s, *bucket_size_s);
        if key.is_none() {
            found.wrong(format!("{what} is of another hour: {bucket_size_s} s from {bucket_start_s} of {category}"));
        }
        key
    }

    fn check_partial(&self, manifest: &Manifest, found: &mut Findings) {
        match (&self.partial, Partial::of(manifest)) {
            (None, None) => {}
            (None, Some(_)) => found.wrong(format!("{PARTIAL_FILE} is missing")),
            (Some(_), None) => found.wrong(format!("{PARTIAL_FILE} is there, and no agent is missing")),
            (Some(Err(reason)), Some(_)) => found.wrong(format!("{PARTIAL_FILE} can't be read: {reason}")),
            (Some(Ok(partial)), Some(expected)) => {
                if *partial != expected {
                    let what = first_difference(&expected.missing, &partial.missing)
                        .unwrap_or_else(|| "it is of another hour or version".into());
                    found.wrong(format!("{PARTIAL_FILE} is not what {MANIFEST_FILE} makes: {what}"));
                }
            }
        }
    }

    fn check_late(&self, waiting: &Waiting, found: &mut Findings) {
        for name in self.late.data.keys().filter(|name| !self.late_manifests.contains_key(*name)) {
            found.wrong(format!(
                "{LATE_DIR}/{name} is a foreign file: there is no {} beside it",
                late_manifest_of(name)
            ));
        }
        for (name, manifest) in &self.late_manifests {
            let what = format!("{LATE_DIR}/{}", late_manifest_of(name));
            let manifest = match manifest {
                Err(reason) => {
                    found.wrong(format!("{what} can't be read: {reason}"));
                    continue;
                }
                Ok(manifest) => manifest,
            };
            self.check_key(&what, manifest, found);
            let [file] = manifest.files.as_slice() else {
                let count = manifest.files.len();
                found.wrong(format!("{what} names {count} files, and must name the one that it lies beside"));
                continue;
            };
            if file.name != *name {
                found.wrong(format!("{what} names another file than the one that it lies beside: {}", file.name));
            }
            // A late file is complete by itself, whoever is missing in its hour.
            let expected = Manifest {
                lanes: vec![file.lane],
                complete: true,
                losses: Vec::new(),
                missing: Vec::new(),
                ..manifest.clone()
            };
            if let Some(difference) = difference(&expected, manifest) {
                found.wrong(format!("{what} is not what its file makes: {difference}"));
            }
            if !self.late.data.contains_key(name) && waiting.files.contains(name) {
                found.notes.push(format!("{LATE_DIR}/{name} is on its way; it is still in its lane"));
            } else {
                check_files(&what, manifest, &self.late, found);
            }
        }
        let known: BTreeSet<String> = self.late_manifests.keys().map(|name| late_manifest_of(name)).collect();
        foreign_names("_late/", self.late.others.difference(&known), found);
    }
}

fn other_version(what: &str, version: u32) -> String {
    format!("{what} has version {version}; this program knows {FORM_VERSION}: use the newer program")
}

/// Names that have no meaning here. Those that readers skip can't change what a job reads.
fn foreign_names<'a>(dir: &str, names: impl Iterator<Item = &'a String>, found: &mut Findings) {
    for name in names {
        if is_hidden(name) {
            found.notes.push(format!("{dir}{name} doesn't belong here; readers skip names like this"));
        } else {
            found.wrong(format!("{dir}{name} doesn't belong here"));
        }
    }
}

/// A file that is named twice makes all sums twice as large, in the manifest as in what is compared with it.
fn check_names(seals: &[&Seal], found: &mut Findings) {
    let mut lanes: BTreeMap<&str, LaneId> = BTreeMap::new();
    for seal in seals {
        for file in &seal.files {
            if let Some(first) = lanes.insert(&file.name, seal.lane) {
                let (first, second) = (seal_file(first), seal_file(seal.lane));
                found.wrong(format!("{} is named twice: by {first} and by {second}", file.name));
            }
        }
    }
}

/// How a manifest differs from the one that it should be.
fn difference(expected: &Manifest, found: &Manifest) -> Option<String> {
    if expected == found {
        return None;
    }
    let names = |manifest: &Manifest| manifest.files.iter().map(|file| file.name.clone()).collect::<BTreeSet<_>>();
    let (sealed, named) = (names(expected), names(found));
    let what = if expected.lanes != found.lanes {
        let numbers = |lanes: &[LaneId]| lanes.iter().map(|lane| lane.0).collect::<Vec<_>>();
        format!("there are seals of the lanes {:?}, and it names {:?}", numbers(&expected.lanes), numbers(&found.lanes))
    } else if sealed != named {
        let only_sealed: Vec<&String> = sealed.difference(&named).collect();
        let only_named: Vec<&String> = named.difference(&sealed).collect();
        format!("only the seals name {only_sealed:?}, only the manifest names {only_named:?}")
    } else if let Some((file, said)) = expected.files.iter().zip(&found.files).find(|(file, said)| file != said) {
        format!(
            "{} has {} bytes, {} records and the checksum {}, of lane {}; it says {}, {} and {}, of lane {}",
            file.name,
            file.bytes,
            file.records,
            file.crc32c,
            file.lane,
            said.bytes,
            said.records,
            said.crc32c,
            said.lane
        )
    } else if let Some(what) = difference_of_agents(&found.agents, &expected.agents) {
        what
    } else if let Some(what) = first_difference(&expected.losses, &found.losses) {
        format!("other losses: {what}")
    } else if let Some(what) = first_difference(&expected.missing, &found.missing) {
        format!("other agents are missing: {what}")
    } else if expected.complete != found.complete {
        format!("it says complete = {}", found.complete)
    } else {
        format!(
            "{} records in {} bytes are in the files, and it says {} in {}",
            expected.records, expected.bytes, found.records, found.bytes
        )
    };
    Some(what)
}

/// The first thing of two lists that is not the same in both.
fn first_difference<T: PartialEq + Debug>(expected: &[T], found: &[T]) -> Option<String> {
    let at = (0..expected.len().max(found.len())).find(|at| expected.get(*at) != found.get(*at))?;
    let show = |one: Option<&T>| one.map_or_else(|| "nothing more".to_owned(), |one| format!("{one:?}"));
    Some(format!("expected {}, found {}", show(expected.get(at)), show(found.get(at))))
}

/// The first agents of which another count is said than is there.
fn difference_of_agents(said: &BTreeMap<AgentId, AgentCount>, there: &BTreeMap<AgentId, AgentCount>) -> Option<String> {
    let all: BTreeSet<&AgentId> = said.keys().chain(there.keys()).collect();
    let differ: Vec<&AgentId> = all.into_iter().filter(|agent| said.get(*agent) != there.get(*agent)).collect();
    let count = |counts: &BTreeMap<AgentId, AgentCount>, agent: &AgentId| {
        counts.get(agent).map_or_else(
            || "nothing".to_owned(),
            |AgentCount { records, bytes }| format!("{records} records of {bytes} bytes"),
        )
    };
    let named = differ.iter().take(NAMED);
    let mut named: Vec<String> =
        named.map(|agent| format!("{agent} has {}, and it says {}", count(there, agent), count(said, agent))).collect();
    if differ.len() > NAMED {
        named.push(format!("and {} more", differ.len() - NAMED));
    }
    (!named.is_empty()).then(|| named.join("; "))
}

fn check_files(what: &str, manifest: &Manifest, folder: &Folder, found: &mut Findings) {
    let mut all = Contents::default();
    let mut names = BTreeSet::new();
    for file in &manifest.files {
        if !names.insert(&file.name) {
            found.wrong(format!("{what} names {} twice", file.name));
            continue;
        }
        match folder.data.get(&file.name) {
            None => found.wrong(format!("{} is missing; {what} names it", file.name)),
            Some(data) => {
                found.wrong.extend(check_file(what, file, data));
                all.append(&data.contents);
            }
        }
    }
    if !manifest.files.iter().all(|file| folder.data.contains_key(&file.name)) {
        return;
    }
    if (manifest.records, manifest.bytes) != (all.records, all.bytes) {
        found.wrong(format!(
            "{what} says {} records in {} bytes, and its files hold {} in {}",
            manifest.records, manifest.bytes, all.records, all.bytes
        ));
    }
    if let Some(difference) = difference_of_agents(&manifest.agents, &all.agents) {
        found.wrong(format!("{what} says other counts of agents than its files hold: {difference}"));
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
