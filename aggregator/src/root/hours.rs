//! Hours: when a lane seals one, which files it gets, and what is written beside them. Pure.
//!
//! An hour's files are closed segments as they are, and **joins**: small ones and ones with a torn tail are copied
//! together, frame by frame, so that the hour has few files whatever happened while it was written.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tributary_common::checksum::Checksum;
use tributary_common::ids::{AgentId, CategoryName, LaneId};

use super::ledger::{AgentCount, HourKey, Lost, Missing, Seal, SegmentRecord};
use super::segment::begun;

/// The version of the manifest's and the seal's form.
pub const FORM_VERSION: u32 = 1;

/// A file is no manifest, seal or `_PARTIAL.json` that this program can read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormError {
    /// Written by a newer program: its fields may mean something else.
    #[error("it has version {0}, and this program knows version {FORM_VERSION}: use the newer program")]
    Newer(u32),
    /// Not such a file at all.
    #[error("it can't be read: {0}; tributary-aggregator audit says more")]
    Unreadable(String),
}

/// Reads a [`Manifest`], [`Seal`] or [`Partial`].
///
/// # Errors
/// When it is none, or one of a newer version.
pub fn read_form<Form: DeserializeOwned>(bytes: &[u8]) -> Result<Form, FormError> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let unreadable = |error: serde_json::Error| FormError::Unreadable(error.to_string());
    // Before the rest, which a newer version may write in another way.
    let Versioned { version } = serde_json::from_slice(bytes).map_err(unreadable)?;
    if version > FORM_VERSION {
        return Err(FormError::Newer(version));
    }
    serde_json::from_slice(bytes).map_err(unreadable)
}

/// The hour's manifest: its files, and who contributed how much.
pub const MANIFEST_FILE: &str = "_MANIFEST.json";

/// The names of the agents whose data is missing in an hour that was published all the same.
pub const PARTIAL_FILE: &str = "_PARTIAL.json";

/// Where late files go, inside of the hour's directory.
pub const LATE_DIR: &str = "_late";

/// The name of a lane's seal in the hour's directory.
#[must_use]
pub fn seal_file(lane: LaneId) -> String {
    format!("_seal-{lane}.json")
}

/// The lane whose seal has this name, if it is that of a seal.
#[must_use]
pub fn lane_of_seal_file(name: &str) -> Option<LaneId> {
    name.strip_prefix("_seal-")?.strip_suffix(".json")?.parse().ok().map(LaneId)
}

/// The name of the manifest of a late file, beside that in [`LATE_DIR`]. Readers of the directory skip names that begin with `_`.
#[must_use]
pub fn late_manifest_file(file: &str) -> String {
    format!("_{file}.manifest.json")
}

/// Files to be made into one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinPlan {
    /// What goes in, in order.
    pub inputs: Vec<SegmentRecord>,
}

/// Which files an hour gets.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct FilePlan {
    /// As they are.
    pub whole: Vec<SegmentRecord>,
    /// Copied together.
    pub joins: Vec<JoinPlan>,
    /// Without a single frame: deleted.
    pub empty: Vec<String>,
}

/// Plans an hour's files out of its closed segments: of each codec at most `2 * bytes / roll_size + 1`, however many segments
/// crashes and takeovers have left.
///
/// A segment of at least half of `roll_size` with nothing torn stays as it is. The others are packed into joins, filled in
/// order up to `roll_size`; a single one that needs no copying stays as it is, too.
#[must_use]
pub fn plan_files(segments: &[SegmentRecord], roll_size: u64) -> FilePlan {
    let mut plan = FilePlan::default();
    let mut leftovers: BTreeMap<&'static str, Vec<&SegmentRecord>> = BTreeMap::new();
    for segment in segments {
        if segment.covered.bytes == 0 {
            plan.empty.push(segment.name.clone());
        } else if !segment.torn && segment.covered.bytes >= roll_size / 2 {
            plan.whole.push(segment.clone());
        } else {
            leftovers.entry(segment.codec.extension()).or_default().push(segment);
        }
    }
    for mut segments in leftovers.into_values() {
        // In the order in which they were begun, so that a stream's lines stay in theirs.
        segments.sort_by_cached_key(|segment| (begun(&segment.name), segment.name.clone()));
        let mut groups: Vec<(u64, Vec<SegmentRecord>)> = Vec::new();
        for segment in segments {
            match groups.last_mut() {
                Some((bytes, group)) if *bytes + segment.covered.bytes <= roll_size => {
                    *bytes += segment.covered.bytes;
                    group.push(segment.clone());
                }
                _ => groups.push((segment.covered.bytes, vec![segment.clone()])),
            }
        }
        for (_, inputs) in groups {
            match inputs.as_slice() {
                [single] if !single.torn => plan.whole.push(single.clone()),
                _ => plan.joins.push(JoinPlan { inputs }),
            }
        }
    }
    plan.whole.sort_by(|a, b| a.name.cmp(&b.name));
    plan
}

/// A file in a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Its name in the hour's directory.
    pub name: String,
    /// The lane that wrote it.
    pub lane: LaneId,
    /// Its length in bytes.
    pub bytes: u64,
    /// The CRC-32C of its bytes.
    pub crc32c: Checksum,
    /// Its records.
    pub records: u64,
}

/// The manifest of an hour, or of one late file: `_MANIFEST.json`. Made of the seals alone, so whoever makes it makes the same.
///
/// ```json
/// {
///   "version": 1,
///   "category": "nginx-access",
///   "bucket_start_s": 1795377600,
///   "bucket_size_s": 3600,
///   "lanes": [0, 1],
///   "complete": true,
///   "records": 2,
///   "bytes": 40,
///   "files": [{ "name": "nginx-access.20261122T2000Z.l0-e7-3.gz", "lane": 0, "bytes": 40, "crc32c": "0a1b2c3d", "records": 2 }],
///   "agents": { "web-1": { "records": 2, "bytes": 30 } },
///   "losses": [{ "agent": "web-2", "stream": "000000000000000000000000000000ff", "from": 0, "to": 9 }],
///   "missing": []
/// }
/// ```
///
/// Readers ignore fields that they don't know; whatever changes the meaning of one changes `version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of this form: 1.
    pub version: u32,
    /// The category.
    pub category: CategoryName,
    /// The bucket's start, seconds since 1970, UTC.
    pub bucket_start_s: i64,
    /// The bucket's size in seconds.
    pub bucket_size_s: u32,
    /// The lanes that have sealed it: all that there were, also those without a file.
    pub lanes: Vec<LaneId>,
    /// Whether every agent had said that it had shipped all of the hour, and all that it had named was stored, or declared lost.
    pub complete: bool,
    /// All records.
    pub records: u64,
    /// The length of all files in bytes.
    pub bytes: u64,
    /// The files, by name.
    pub files: Vec<ManifestFile>,
    /// What each agent contributed.
    pub agents: BTreeMap<AgentId, AgentCount>,
    /// What agents had, and had said that they would ship, and have lost.
    pub losses: Vec<Lost>,
    /// The agents whose data may be missing.
    pub missing: Vec<Missing>,
}

impl Manifest {
    /// Made from the seals of all lanes, never from a listing of the directory: a file that nobody sealed is not part of the
    /// hour.
    #[must_use]
    pub fn of(key: &HourKey, seals: &[Seal]) -> Self {
        let mut files: Vec<ManifestFile> = seals
            .iter()
            .flat_map(|seal| {
                seal.files.iter().map(|file| ManifestFile {
                    name: file.name.clone(),
                    lane: seal.lane,
                    bytes: file.bytes,
                    crc32c: file.crc32c,
                    records: file.records,
                })
            })
            .collect();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let mut agents: BTreeMap<AgentId, AgentCount> = BTreeMap::new();
        for (agent, count) in seals.iter().flat_map(|seal| &seal.agents) {
            agents.entry(agent.clone()).or_default().add(*count);
        }
        Self {
            version: FORM_VERSION,
            category: key.category.clone(),
            bucket_start_s: key.bucket.start_s(),
            bucket_size_s: key.bucket.size().seconds(),
            lanes: seals.iter().map(|seal| seal.lane).collect(),
            records: files.iter().map(|file| file.records).sum(),
            bytes: files.iter().map(|file| file.bytes).sum(),
            files,
            agents,
            losses: seals.iter().flat_map(|seal| seal.losses.iter().cloned()).collect(),
            missing: seals.iter().flat_map(|seal| seal.missing.iter().cloned()).collect(),
            complete: seals.iter().all(|seal| seal.missing.is_empty()),
        }
    }
}

/// The names of the agents whose data may be missing in an hour: `_PARTIAL.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partial {
    /// The version of this form: 1.
    pub version: u32,
    /// The category.
    pub category: CategoryName,
    /// The bucket's start, seconds since 1970, UTC.
    pub bucket_start_s: i64,
    /// The bucket's size in seconds.
    pub bucket_size_s: u32,
    /// The agents.
    pub missing: Vec<Missing>,
}

impl Partial {
    /// Made of the manifest; none where nobody is missing.
    #[must_use]
    pub fn of(manifest: &Manifest) -> Option<Self> {
        (!manifest.complete).then(|| Self {
            version: FORM_VERSION,
            category: manifest.category.clone(),
            bucket_start_s: manifest.bucket_start_s,
            bucket_size_s: manifest.bucket_size_s,
            missing: manifest.missing.clone(),
        })
    }
}

/// Whether an hour with these seals gets its success file.
#[must_use]
pub fn is_success(seals: &[Seal]) -> bool {
    seals.iter().all(|seal| seal.missing.is_empty() || seal.publish_partial)
}

/// How the names of joins begin until they are in their hour. One that no ledger entry names is deleted by the next owner.
pub const JOIN_PREFIX: &str = "join-";

/// How the names of temporary files begin: deleted by the next owner without a look.
pub const TEMP_PREFIX: &str = "tmp-";

#[cfg(test)]
mod tests {
    use super::super::ledger::Contents;
    use super::*;
    use tributary_common::bucket::BucketSize;
    use tributary_common::frame::Codec;

    fn segment(name: &str, bytes: u64, torn: bool) -> SegmentRecord {
        SegmentRecord {
            name: name.into(),
            category: "app".parse().expect("valid"),
            bucket: BucketSize::HOUR.bucket_of_ms(0),
            codec: Codec::Gzip,
            covered: Contents { bytes, records: 1, ..Contents::default() },
            closed: true,
            torn,
        }
    }

    #[test]
    fn a_form_of_a_newer_version_is_refused_whatever_else_it_says() {
        let newer = br#"{ "version": 2, "category": { "name": "app" } }"#;
        assert_eq!(read_form::<Manifest>(newer), Err(FormError::Newer(2)));
        let cut = read_form::<Manifest>(br#"{ "version": 1, "category": "app""#);
        assert!(matches!(cut, Err(FormError::Unreadable(_))), "{cut:?}");
    }

    #[test]
    fn the_name_of_a_seal_says_its_lane() {
        assert_eq!(lane_of_seal_file(&seal_file(LaneId(12))), Some(LaneId(12)));
        for foreign in ["_seal-x.json", "_seal-1.json.tmp", "_MANIFEST.json"] {
            assert_eq!(lane_of_seal_file(foreign), None);
        }
    }

    fn names(segments: &[SegmentRecord]) -> Vec<&str> {
        segments.iter().map(|segment| segment.name.as_str()).collect()
    }

    #[test]
    fn large_segments_stay_and_small_ones_are_joined_up_to_the_roll_size() {
        let segments = [
            segment("a", 100, false),
            segment("b", 30, false),
            segment("c", 30, false),
            segment("d", 45, false),
            segment("e", 0, true),
        ];
        let plan = plan_files(&segments, 100);
        assert_eq!(names(&plan.whole), ["a", "d"]);
        assert_eq!(plan.joins.len(), 1);
        assert_eq!(names(&plan.joins[0].inputs), ["b", "c"]);
        assert_eq!(plan.empty, ["e"]);
    }

    #[test]
    fn a_torn_file_never_becomes_visible_as_it_is() {
        let plan = plan_files(&[segment("a", 100, true)], 100);
        assert!(plan.whole.is_empty());
        assert_eq!(names(&plan.joins[0].inputs), ["a"]);
    }

    #[test]
    fn a_single_small_segment_is_not_copied() {
        let plan = plan_files(&[segment("a", 1, false)], 100);
        assert_eq!((names(&plan.whole), plan.joins.len()), (vec!["a"], 0));
    }

    #[test]
    fn codecs_are_never_mixed_in_a_file() {
        let zstd = SegmentRecord { codec: Codec::Zstd, ..segment("b", 10, false) };
        let plan = plan_files(&[segment("a", 10, false), zstd], 100);
        assert_eq!(names(&plan.whole), ["a", "b"]);
    }

    #[test]
    fn however_many_leftovers_an_hour_has_few_small_files() {
        for count in 1..60 {
            let segments: Vec<SegmentRecord> =
                (0..count).map(|n| segment(&format!("s{n:03}"), 1 + (n * 37) % 97, n % 5 == 0)).collect();
            let total: u64 = segments.iter().map(|segment| segment.covered.bytes).sum();
            let plan = plan_files(&segments, 100);
            let files = (plan.whole.len() + plan.joins.len()) as u64;
            // Two neighbours never fit into one file, so any two hold more than the roll size.
            assert!(files <= 2 * total / 100 + 1, "{count} segments of {total} bytes gave {files} files");
        }
    }
}
