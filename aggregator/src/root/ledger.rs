//! The ledger: what a lane's owner writes down in the lane's directory, so that the next one need not read every frame.
//!
//! # Format
//!
//! One file per entry, `ledger-<n>` with `n` in 20 digits, never changed once it is there:
//!
//! ```text
//! magic "TLG3" (4) | body_len (4) | crc32c of the body (4) | body (postcard of Entry)
//! ```
//!
//! An entry is made under a temporary name, synced, closed, its length checked, and then renamed. Entry `n + 1` is not
//! written before `n` is seen under its name, so the entries have no gaps. Paths inside are relative to the lane's
//! directory, which is renamed from owner to owner.
//!
//! An entry says what changed since the one before; a **snapshot** says everything, and what lies before it is
//! deleted once it is seen.
//!
//! # What is never guessed
//!
//! An entry that can't be read stops the recovery: skipping it could forget that an hour is sealed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tributary_common::bucket::Bucket;
use tributary_common::checksum::Checksum;
use tributary_common::frame::{Codec, FrameHeader, SliceDescriptor};
use tributary_common::ids::{AgentId, CategoryName, Epoch, LaneId, StreamId};
use tributary_common::position::{Position, TailHash};
use tributary_common::ranges::RangeSet;
use tributary_common::report::{Session, StreamOffset};

const MAGIC: [u8; 4] = *b"TLG3";
const HEAD_BYTES: usize = 12;
const NAME_PREFIX: &str = "ledger-";

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its number.
    pub number: u64,
    /// The lane, so that a misplaced file is noticed.
    pub lane: LaneId,
    /// Who wrote it.
    pub epoch: Epoch,
    /// When, by the writer's clock, in milliseconds since 1970.
    pub written_ms: i64,
    /// Whether it says everything, not only what changed.
    pub snapshot: bool,
    /// Streams, whole.
    pub streams: Vec<StreamRecord>,
    /// Streams that are forgotten.
    pub forgotten: Vec<StreamId>,
    /// All segments of the lane: there are few, and a list without one says that it is gone.
    pub segments: Vec<SegmentRecord>,
    /// Hours, whole.
    pub hours: Vec<HourRecord>,
    /// Hours that are forgotten: long past, and their directories will answer for them.
    pub forgotten_hours: Vec<HourKey>,
    /// The hour of each category from which on every hour is sealed, also an empty one, where it changed.
    pub first_buckets: Vec<(CategoryName, Bucket)>,
    /// Members of the roster, whole.
    pub members: Vec<MemberRecord>,
    /// Members that have left.
    pub left: Vec<(AgentId, CategoryName)>,
    /// What is lost, all that the seals that come may have to say.
    pub losses: Vec<Loss>,
}

/// An agent from which the lane expects reports for a category.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// The agent.
    pub agent: AgentId,
    /// The category.
    pub category: CategoryName,
    /// Its host name.
    pub host: String,
    /// The run that counts.
    pub current: Option<RunRecord>,
    /// Runs that were given a session and have not used it yet, oldest first.
    pub candidates: Vec<RunRecord>,
    /// All of before is committed or lost, milliseconds since 1970.
    pub done_ms: Option<i64>,
    /// Its claims that are not fulfilled, at most two: the oldest and the newest.
    pub claims: Vec<ClaimRecord>,
    /// Whether it leaves once they are fulfilled.
    pub leaving: bool,
}

/// A run of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The number that it drew.
    pub run: u64,
    /// Its name.
    pub session: Session,
    /// The number of its last report when this was written.
    pub number: u64,
}

/// All that an agent will ever ship of before a watermark lies below these offsets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimRecord {
    /// The watermark, milliseconds since 1970.
    pub watermark_ms: i64,
    /// The offsets that are not committed.
    pub required: Vec<StreamOffset>,
}

/// Bytes of a stream that will never come, though their agent had said that they would.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// The category.
    pub category: CategoryName,
    /// The agent.
    pub agent: AgentId,
    /// The stream.
    pub stream: StreamId,
    /// So far it is committed.
    pub from: u64,
    /// So far it should have been.
    pub to: u64,
    /// The time that the bytes belong to lies between this, milliseconds since 1970,
    pub since_ms: i64,
    /// and this.
    pub until_ms: i64,
}

/// A stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamRecord {
    /// The stream.
    pub stream: StreamId,
    /// Its agent.
    pub agent: AgentId,
    /// Its category.
    pub category: CategoryName,
    /// Where it began.
    pub base: Position,
    /// The ranges that are durable in what the ledger covers.
    pub durable: RangeSet,
    /// Known batch ends.
    pub ends: Vec<EndRecord>,
    /// When it last got bytes, milliseconds since 1970.
    pub touched_ms: i64,
}

/// A place where a batch of a stream ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndRecord {
    /// The place.
    pub position: Position,
    /// Where the batch began and the hash of its bytes, if it was a [short one](tributary_common::frame::batch_hash).
    pub batch: Option<(u64, TailHash)>,
}

/// A file of a lane that holds frames.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentRecord {
    /// Its name in the lane's directory.
    pub name: String,
    /// The category.
    pub category: CategoryName,
    /// The bucket.
    pub bucket: Bucket,
    /// How its frames are compressed.
    pub codec: Codec,
    /// The part, from the beginning to some frame's end, that the streams of the ledger include.
    pub covered: Contents,
    /// Whether it is closed and covered to its last whole frame.
    pub closed: bool,
    /// Whether there are bytes behind the last whole frame.
    pub torn: bool,
}

/// What a run of whole frames holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// The length of the frames in bytes.
    pub bytes: u64,
    /// The checksum of the frames' bytes, headers and all.
    pub checksum: Checksum,
    /// Records.
    pub records: u64,
    /// Records and stream bytes of each agent.
    pub agents: BTreeMap<AgentId, AgentCount>,
}

impl Contents {
    /// Adds a frame behind the others.
    pub fn push(&mut self, frame_len: u64, checksum: Checksum, slices: &[SliceDescriptor]) {
        self.bytes += frame_len;
        self.checksum = self.checksum.then(checksum, frame_len);
        for slice in slices {
            self.records += slice.records;
            let count = AgentCount { records: slice.records, bytes: slice.raw_len() };
            self.agents.entry(slice.agent.clone()).or_default().add(count);
        }
    }

    /// Adds other frames behind these.
    pub fn append(&mut self, next: &Self) {
        self.bytes += next.bytes;
        self.checksum = self.checksum.then(next.checksum, next.bytes);
        self.records += next.records;
        for (agent, count) in &next.agents {
            self.agents.entry(agent.clone()).or_default().add(*count);
        }
    }
}

impl<'a> FromIterator<&'a FrameHeader> for Contents {
    fn from_iter<Headers: IntoIterator<Item = &'a FrameHeader>>(headers: Headers) -> Self {
        let mut contents = Self::default();
        for header in headers {
            contents.push(u64::from(header.frame_len), header.checksum(), &header.slices);
        }
        contents
    }
}

impl<'a> FromIterator<&'a Contents> for Contents {
    fn from_iter<Parts: IntoIterator<Item = &'a Contents>>(parts: Parts) -> Self {
        let mut contents = Self::default();
        for part in parts {
            contents.append(part);
        }
        contents
    }
}

/// What one agent contributed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentCount {
    /// Records.
    pub records: u64,
    /// Bytes of its streams.
    pub bytes: u64,
}

impl AgentCount {
    /// Adds another count.
    pub fn add(&mut self, other: Self) {
        self.records += other.records;
        self.bytes += other.bytes;
    }
}

/// Which hour.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct HourKey {
    /// The category.
    pub category: CategoryName,
    /// The bucket.
    pub bucket: Bucket,
}

impl std::fmt::Display for HourKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.category, self.bucket)
    }
}

/// How far an hour is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HourRecord {
    /// Which one.
    pub key: HourKey,
    /// How far it is.
    pub state: HourState,
}

/// The life of an hour that is no longer open. What is not in the ledger is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HourState {
    /// The seal binds: these files and no others belong to the hour. Its files are being moved.
    Announced(Seal),
    /// The lane's files and its seal are in the hour's directory, which readers don't see yet.
    Sealed,
    /// Readers see the hour.
    Published,
    /// Late files are being moved beside the hour.
    Late(Vec<LateMove>),
}

/// What a lane contributes to an hour. Its JSON form is the seal file in the hour's directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    /// The version of this form: 1.
    pub version: u32,
    /// The lane.
    pub lane: LaneId,
    /// The category.
    pub category: CategoryName,
    /// The bucket's start, seconds since 1970, UTC.
    pub bucket_start_s: i64,
    /// The bucket's size in seconds.
    pub bucket_size_s: u32,
    /// The files.
    pub files: Vec<SealedFile>,
    /// Files whose frames were copied into one of the files, to be deleted.
    pub inputs: Vec<String>,
    /// What each agent contributed.
    pub agents: BTreeMap<AgentId, AgentCount>,
    /// What agents had said would come, and never will.
    pub losses: Vec<Lost>,
    /// The agents that were waited for in vain.
    pub missing: Vec<Missing>,
    /// Whether the hour gets its success file though agents are missing.
    pub publish_partial: bool,
}

impl Seal {
    /// Whether it is a seal of this hour.
    #[must_use]
    pub fn is_of(&self, key: &HourKey) -> bool {
        (self.bucket_start_s, self.bucket_size_s) == (key.bucket.start_s(), key.bucket.size().seconds())
            && self.category == key.category
    }

    /// Its files as late ones, beside what was published in its hour's place. Which agent contributed to which of them it does not
    /// say; together they have all.
    #[must_use]
    pub fn into_late(self) -> Vec<LateMove> {
        let mut agents = self.agents;
        let files = self.files.into_iter();
        let mut moves: Vec<LateMove> = files
            .map(|file| LateMove { file: Some(file), inputs: Vec::new(), agents: std::mem::take(&mut agents) })
            .collect();
        if !self.inputs.is_empty() {
            moves.push(LateMove { file: None, inputs: self.inputs, agents: BTreeMap::new() });
        }
        moves
    }
}

/// Bytes that are lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// The agent that had them.
    pub agent: AgentId,
    /// The stream.
    pub stream: StreamId,
    /// The first byte that is lost.
    pub from: u64,
    /// The first byte behind them that is not known to be lost.
    pub to: u64,
}

/// An agent that a lane gave up waiting for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// The agent.
    pub agent: AgentId,
    /// Its host name.
    pub host: String,
    /// All of before it had said to be below the offsets, milliseconds since 1970; none where it had never said so.
    pub watermark_ms: Option<i64>,
    /// The offsets that it had named and that were not committed.
    pub offsets: Vec<StreamOffset>,
}

/// A file of an hour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedFile {
    /// Its name in the lane's directory.
    pub source: String,
    /// Its name in the hour's directory.
    pub name: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// The checksum of its bytes.
    pub crc32c: Checksum,
    /// Its records.
    pub records: u64,
}

impl SealedFile {
    /// A file that holds `contents`, and what each agent contributed to it.
    #[must_use]
    pub fn new(source: String, name: String, contents: Contents) -> (Self, BTreeMap<AgentId, AgentCount>) {
        let Contents { bytes, checksum, records, agents } = contents;
        (Self { source, name, bytes, crc32c: checksum, records }, agents)
    }
}

/// A late file on its way beside its hour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LateMove {
    /// The file; none where only files without a frame are to be deleted.
    pub file: Option<SealedFile>,
    /// Files whose frames were copied into it, to be deleted.
    pub inputs: Vec<String>,
    /// What each agent contributed.
    pub agents: BTreeMap<AgentId, AgentCount>,
}

/// Bytes that are not a good ledger entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// Foreign, cut off or altered.
    #[error("the entry is corrupt: {0}")]
    Corrupt(&'static str),
    /// In the wrong place.
    #[error("the entry says that it is number {found} of lane {lane}")]
    Misplaced {
        /// The number inside.
        found: u64,
        /// The lane inside.
        lane: LaneId,
    },
}

impl Entry {
    /// The name of the file of entry `number`.
    #[must_use]
    pub fn file_name(number: u64) -> String {
        format!("{NAME_PREFIX}{number:020}")
    }

    /// The entry's number, if this is the name of an entry's file.
    #[must_use]
    pub fn number_of(name: &str) -> Option<u64> {
        let digits = name.strip_prefix(NAME_PREFIX)?;
        (digits.len() == 20).then(|| digits.parse().ok()).flatten()
    }

    /// The file's bytes.
    ///
    /// # Panics
    /// When the entry is larger than 4 GiB: the bounds on streams and segments keep it far below.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEAD_BYTES];
        postcard::to_io(self, &mut bytes).expect("writing to memory can't fail");
        let body_len = u32::try_from(bytes.len() - HEAD_BYTES).expect("a ledger entry is far smaller than 4 GiB");
        let crc = crc32c::crc32c(&bytes[HEAD_BYTES..]);
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&body_len.to_le_bytes());
        bytes[8..12].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the file of entry `number` of `lane`.
    ///
    /// # Errors
    /// When it is not that entry, whole.
    pub fn decode(bytes: &[u8], lane: LaneId, number: u64) -> Result<Self, EntryError> {
        let head = bytes.first_chunk::<HEAD_BYTES>().ok_or(EntryError::Corrupt("it is cut off"))?;
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let body = &bytes[HEAD_BYTES..];
        if head[..4] != MAGIC {
            return Err(EntryError::Corrupt("it does not begin as an entry of a version that this program knows"));
        }
        if body.len() as u64 != u64::from(word(4)) {
            return Err(EntryError::Corrupt("it has another length than it says"));
        }
        if crc32c::crc32c(body) != word(8) {
            return Err(EntryError::Corrupt("its checksum does not match"));
        }
        let entry: Self = postcard::from_bytes(body).map_err(|_| EntryError::Corrupt("its contents can't be read"))?;
        if (entry.lane, entry.number) != (lane, number) {
            return Err(EntryError::Misplaced { found: entry.number, lane: entry.lane });
        }
        Ok(entry)
    }
}

/// What the entries add up to.
#[derive(Debug, Default)]
pub struct Replayed {
    /// The number of the last entry; none for a new lane.
    pub last: Option<u64>,
    /// When it was written, by its writer's clock.
    pub written_ms: Option<i64>,
    /// The streams.
    pub streams: BTreeMap<StreamId, StreamRecord>,
    /// The segments, by name.
    pub segments: BTreeMap<String, SegmentRecord>,
    /// The hours that are not open.
    pub hours: BTreeMap<HourKey, HourState>,
    /// The hour of each category from which on every hour is sealed.
    pub first_buckets: BTreeMap<CategoryName, Bucket>,
    /// The members of the roster.
    pub members: BTreeMap<(AgentId, CategoryName), MemberRecord>,
    /// What is lost.
    pub losses: Vec<Loss>,
}

impl Replayed {
    /// Adds the next entry.
    pub fn apply(&mut self, entry: Entry) {
        if entry.snapshot {
            *self = Self::default();
        }
        self.last = Some(entry.number);
        self.written_ms = Some(entry.written_ms);
        self.streams.extend(entry.streams.into_iter().map(|record| (record.stream, record)));
        for stream in entry.forgotten {
            self.streams.remove(&stream);
        }
        self.segments = entry.segments.into_iter().map(|record| (record.name.clone(), record)).collect();
        self.hours.extend(entry.hours.into_iter().map(|record| (record.key, record.state)));
        for key in entry.forgotten_hours {
            self.hours.remove(&key);
        }
        self.first_buckets.extend(entry.first_buckets);
        for one in entry.left {
            self.members.remove(&one);
        }
        let members = entry.members.into_iter();
        self.members.extend(members.map(|member| ((member.agent.clone(), member.category.clone()), member)));
        self.losses = entry.losses;
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use tributary_common::bucket::BucketSize;

    proptest! {
        /// Also bytes that a right checksum covers: an entry is read as a whole or not at all.
        #[test]
        fn no_bytes_make_the_reader_of_entries_panic(
            edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..6),
            cut in 0_usize..20,
            checksum: bool,
        ) {
            let mut bytes = full().encode();
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            bytes.truncate(bytes.len() - cut);
            if checksum {
                let len = (bytes.len() - HEAD_BYTES) as u32;
                bytes[4..8].copy_from_slice(&len.to_le_bytes());
                let crc = crc32c::crc32c(&bytes[HEAD_BYTES..]);
                bytes[8..12].copy_from_slice(&crc.to_le_bytes());
            }
            if let Ok(entry) = Entry::decode(&bytes, LaneId(3), full().number) {
                Replayed::default().apply(entry);
            }
        }
    }

    fn key(hour: i64) -> HourKey {
        HourKey { category: "app".parse().expect("valid"), bucket: BucketSize::HOUR.bucket_of_ms(hour * 3_600_000) }
    }

    fn stream(id: u128, end: u64) -> StreamRecord {
        StreamRecord {
            stream: StreamId(id),
            agent: "web-1".parse().expect("valid"),
            category: "app".parse().expect("valid"),
            base: Position::zero(),
            durable: std::iter::once(0..end).collect(),
            ends: vec![
                EndRecord { position: Position::zero(), batch: None },
                EndRecord { position: Position { offset: end, tail: TailHash(end) }, batch: Some((0, TailHash(3))) },
            ],
            touched_ms: 7,
        }
    }

    pub(in crate::root) fn entry(number: u64, snapshot: bool) -> Entry {
        Entry {
            number,
            lane: LaneId(3),
            epoch: Epoch(9),
            written_ms: 1_795_378_521_000,
            snapshot,
            streams: Vec::new(),
            forgotten: Vec::new(),
            segments: Vec::new(),
            hours: Vec::new(),
            forgotten_hours: Vec::new(),
            first_buckets: Vec::new(),
            members: Vec::new(),
            left: Vec::new(),
            losses: Vec::new(),
        }
    }

    fn full() -> Entry {
        let agent: AgentId = "web-1".parse().expect("valid");
        let agents = BTreeMap::from([(agent.clone(), AgentCount { records: 2, bytes: 30 })]);
        let contents = Contents { bytes: 40, checksum: Checksum(7), records: 2, agents: agents.clone() };
        let (file, _) = SealedFile::new("join-e1-0.gz".into(), "a.gz".into(), contents.clone());
        let seal = Seal {
            version: 1,
            lane: LaneId(3),
            category: key(1).category,
            bucket_start_s: 3_600,
            bucket_size_s: 3_600,
            files: vec![file.clone()],
            inputs: vec!["a.gz".into(), "b.gz".into()],
            agents: agents.clone(),
            losses: vec![Lost { agent: agent.clone(), stream: StreamId(7), from: 1, to: 2 }],
            missing: vec![Missing {
                agent: agent.clone(),
                host: "h".into(),
                watermark_ms: Some(1),
                offsets: vec![StreamOffset { stream: StreamId(8), offset: 9 }],
            }],
            publish_partial: true,
        };
        let session = Session { epoch: Epoch(9), counter: 1 };
        let member = MemberRecord {
            agent: agent.clone(),
            category: key(1).category,
            host: "h".into(),
            current: Some(RunRecord { run: 5, session, number: 6 }),
            candidates: vec![RunRecord { run: 6, session, number: 0 }],
            done_ms: Some(-1),
            claims: vec![ClaimRecord {
                watermark_ms: 3,
                required: vec![StreamOffset { stream: StreamId(8), offset: 9 }],
            }],
            leaving: true,
        };
        let loss = Loss {
            category: key(1).category,
            agent: agent.clone(),
            stream: StreamId(7),
            from: 1,
            to: 2,
            since_ms: i64::MIN,
            until_ms: 4,
        };
        let late = LateMove { file: Some(file), inputs: Vec::new(), agents };
        Entry {
            streams: vec![stream(1, 30)],
            forgotten: vec![StreamId(2)],
            segments: vec![SegmentRecord {
                name: "c.gz".into(),
                category: key(2).category,
                bucket: key(2).bucket,
                codec: Codec::Gzip,
                covered: contents,
                closed: true,
                torn: true,
            }],
            hours: vec![
                HourRecord { key: key(1), state: HourState::Announced(seal) },
                HourRecord { key: key(2), state: HourState::Sealed },
                HourRecord { key: key(3), state: HourState::Published },
                HourRecord { key: key(4), state: HourState::Late(vec![late]) },
            ],
            forgotten_hours: vec![key(0)],
            first_buckets: vec![(key(0).category, key(0).bucket)],
            members: vec![member],
            left: vec![(agent, key(2).category)],
            losses: vec![loss],
            ..entry(5, true)
        }
    }

    #[test]
    fn an_entry_reads_back_and_only_in_its_place() {
        let bytes = full().encode();
        assert_eq!(Entry::decode(&bytes, LaneId(3), 5), Ok(full()));
        for (lane, number) in [(LaneId(4), 5), (LaneId(3), 6)] {
            let misplaced = Entry::decode(&bytes, lane, number);
            assert_eq!(misplaced, Err(EntryError::Misplaced { found: 5, lane: LaneId(3) }));
        }
        assert_eq!(Entry::number_of(&Entry::file_name(5)), Some(5));
        for foreign in ["ledger-5", "tmp-ledger-00000000000000000005", "ledger-0000000000000000000x"] {
            assert_eq!(Entry::number_of(foreign), None);
        }
    }

    #[test]
    fn an_entry_that_was_cut_or_altered_is_never_read() {
        let bytes = full().encode();
        for cut in 0..bytes.len() {
            assert!(Entry::decode(&bytes[..cut], LaneId(3), 5).is_err(), "cut at {cut}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Entry::decode(&bad, LaneId(3), 5).is_err(), "bit {bit}");
        }
    }

    /// An entry as version 3 wrote it: the owner after an upgrade reads what the one before left. (Earlier ones were never released.)
    #[test]
    fn entries_of_version_3_are_still_read() {
        assert_eq!(Entry::decode(include_bytes!("../../testdata/ledger-v3"), LaneId(3), 5), Ok(full()));
    }

    #[test]
    fn entries_add_up_and_a_snapshot_replaces_all_before_it() {
        let mut replayed = Replayed::default();
        replayed.apply(Entry { streams: vec![stream(1, 10), stream(2, 10)], ..entry(0, true) });
        replayed.apply(Entry {
            streams: vec![stream(1, 20)],
            forgotten: vec![StreamId(2)],
            hours: vec![HourRecord { key: key(1), state: HourState::Sealed }],
            ..entry(1, false)
        });
        assert_eq!(replayed.streams.values().cloned().collect::<Vec<_>>(), [stream(1, 20)]);
        assert_eq!(replayed.hours, BTreeMap::from([(key(1), HourState::Sealed)]));
        replayed.apply(Entry { forgotten_hours: vec![key(1)], ..entry(2, false) });
        assert!(replayed.hours.is_empty());
        replayed.apply(full());
        assert_eq!((replayed.last, replayed.streams.len(), replayed.hours.len()), (Some(5), 1, 4));
        assert_eq!(replayed.segments.keys().collect::<Vec<_>>(), ["c.gz"]);
    }
}
