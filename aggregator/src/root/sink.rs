//! The steps that a lane's owner takes on the sink besides writing segments: ledger entries, joins, seals, publishing.
//!
//! Every step can be taken again after a crash at any point or an unknown outcome, by this owner or the next one: it looks
//! at what is there first. Whatever becomes visible is made in the lane's directory under a temporary name, synced,
//! closed, its length checked, and then renamed out, which an owner that was fenced can't do.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tributary_common::bucket::{Bucket, BucketSize};
use tributary_common::frame::{FrameError, FrameHeader, Peek};
use tributary_common::ids::{CategoryName, Epoch, LaneCount, LaneId};

use super::hours::{
    JOIN_PREFIX, LATE_DIR, MANIFEST_FILE, Manifest, PARTIAL_FILE, Partial, TEMP_PREFIX, is_success, late_manifest_file,
    plan_files, seal_file,
};
use super::ledger::{Entry, HourKey, LateMove, Lost, Missing, Seal, SealedFile, SegmentRecord};
use super::placement::Placement;
use crate::dfs::{CreateOptions, Dfs, DfsError, DfsPath, DfsWriter, recover_until_closed};

/// How much of a file is read at once.
const READ_BYTES: usize = 4 << 20;

/// The pause between tries of a call that failed for a reason that passes.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// Most unfinished files that are remembered; of more, the lane's next owner deletes the oldest ones.
const MAX_LEFT: usize = 10_000;

/// How many of them are deleted after a ledger entry.
const TIDIED_AT_ONCE: usize = 16;

/// For how long a step for an hour tries again what the sink refuses for now, before it lets others have its place: it may be a quota
/// of one category's directory.
const HOUR_PATIENCE: Duration = Duration::from_secs(3);

/// What a lane's owner needs for its steps.
#[derive(Clone)]
pub struct LaneSink {
    /// The file system.
    pub dfs: Arc<dyn Dfs>,
    /// The lane's directory, with this owner's epoch in its name.
    pub dir: DfsPath,
    /// The lane.
    pub lane: LaneId,
    /// How many lanes there are.
    pub lanes: LaneCount,
    /// How new files are made.
    pub create: CreateOptions,
    /// How many copies new files get; shared by all clones.
    pub placement: Arc<Placement>,
    /// This owner's epoch, for names that no other owner has used.
    pub epoch: Epoch,
    /// Of the files that were begun. Shared by all clones.
    pub attempts: Arc<Attempts>,
    /// The name of the empty file that says that an hour is complete.
    pub success_file: String,
    /// For how long a step tries again what is refused for now; none: until it is done.
    pub patience: Option<Duration>,
}

/// The files that an owner has begun.
#[derive(Debug, Default)]
pub struct Attempts {
    /// How many, for their names.
    begun: AtomicU64,
    /// Those that were not finished, and could not be deleted yet, the oldest first.
    left: Mutex<VecDeque<DfsPath>>,
}

/// What a seal says of the agents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HourVerdict {
    /// What is lost.
    pub losses: Vec<Lost>,
    /// The agents that were waited for in vain.
    pub missing: Vec<Missing>,
    /// Whether the hour gets its success file though agents are missing.
    pub publish_partial: bool,
}

/// What became of an announced seal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Executed {
    /// Its files and the seal are in the hour's directory.
    Sealed,
    /// A bucket of another size was published in that place first: its files are late beside that.
    Overtaken,
}

/// The frames found in a file.
#[derive(Debug)]
pub struct Scan {
    /// Their headers, in order.
    pub frames: Vec<FrameHeader>,
    /// Where the last whole frame ends.
    pub end: u64,
    /// What is wrong behind it, if there are more bytes.
    pub torn: Option<FrameError>,
}

/// Reads the frames of a file of `len` bytes from `from` on, bodies checked against their checksums, to the first that is not
/// whole.
///
/// # Errors
/// When the file can't be read.
pub async fn scan(dfs: &dyn Dfs, path: &DfsPath, from: u64, len: u64) -> Result<Scan, DfsError> {
    let mut scan = Scan { frames: Vec::new(), end: from, torn: None };
    let mut chunk = Bytes::new();
    let mut want = READ_BYTES;
    while scan.end < len {
        if chunk.len() < want {
            let rest = usize::try_from(len - scan.end).unwrap_or(usize::MAX);
            chunk = dfs.read(path, scan.end, want.max(READ_BYTES).min(rest)).await?;
            if chunk.len() < want && chunk.len() < rest {
                // The file is shorter than it was said to be.
                scan.torn = Some(FrameError::Truncated { have: chunk.len() as u64, want: want as u64 });
                return Ok(scan);
            }
        }
        let left = len - scan.end;
        let needed = match FrameHeader::peek(&chunk) {
            Ok(Peek::Header(header)) if (header.frame_len as usize) <= chunk.len() => {
                let frame_len = header.frame_len as usize;
                match FrameHeader::verify(&chunk[..frame_len]) {
                    Ok(header) => scan.frames.push(header),
                    Err(error) => {
                        scan.torn = Some(error);
                        return Ok(scan);
                    }
                }
                scan.end += frame_len as u64;
                let _ = chunk.split_to(frame_len);
                want = 1;
                continue;
            }
            Ok(Peek::Header(header)) => u64::from(header.frame_len),
            Ok(Peek::Need(bytes)) => bytes as u64,
            Err(error) => {
                scan.torn = Some(error);
                return Ok(scan);
            }
        };
        if needed > left {
            scan.torn = Some(FrameError::Truncated { have: left, want: needed });
            return Ok(scan);
        }
        want = needed as usize;
    }
    Ok(scan)
}

/// The directory of all lanes.
#[must_use]
pub fn lanes_dir() -> DfsPath {
    DfsPath::base().join("_tributary/lanes")
}

/// The directory of the hours that all lanes are asked to seal, an empty directory for each.
fn wanted_dir() -> DfsPath {
    DfsPath::base().join("_tributary/hours")
}

fn wanted_name(key: &HourKey) -> String {
    format!("{}@{}+{}", key.category, key.bucket.start_s(), key.bucket.size().seconds())
}

fn wanted_hour(name: &str) -> Option<HourKey> {
    let (category, bucket) = name.split_once('@')?;
    let (start, size) = bucket.split_once('+')?;
    let size = BucketSize::try_from(size.parse::<u32>().ok()?).ok()?;
    let start_ms = start.parse::<i64>().ok()?.checked_mul(1000)?;
    let bucket = size.bucket_of_ms(start_ms);
    (bucket.start_s().checked_mul(1000) == Some(start_ms))
        .then(|| Some(HourKey { category: category.parse().ok()?, bucket }))?
}

/// Where an hour's directory stands, visible and hidden, and the directory that holds both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HourDirs {
    /// What holds the hour's directory.
    pub parent: DfsPath,
    /// The directory that readers see.
    pub visible: DfsPath,
    /// The same before it is published.
    pub hidden: DfsPath,
    /// Whether what holds it has a day's directory for its name.
    is_in_a_day: bool,
}

impl HourDirs {
    /// The directories of a bucket of a category.
    #[must_use]
    pub fn new(category: &CategoryName, bucket: Bucket) -> Self {
        let category = DfsPath::base().join(category.as_str());
        let day = bucket.parent_dir();
        let is_in_a_day = day.is_some();
        let parent = day.map_or_else(|| category.clone(), |dir| category.join(dir));
        let (visible, hidden) = (parent.join(bucket.dir_name()), parent.join(bucket.hidden_dir_name()));
        Self { parent, visible, hidden, is_in_a_day }
    }

    /// Whether the other one, of a bucket of another size, can't be published when this one is: they have the same place, or one
    /// lies in the other.
    #[must_use]
    pub fn clash(&self, other: &Self) -> bool {
        self.visible == other.visible || self.visible == other.parent || self.parent == other.visible
    }
}

/// Repeats a step until it is done or fails for good. Errors that pass (no connection, safe mode, an outcome that is not
/// known) are waited out; the step looks at what is there when it is taken again. A sink with `patience` gives up after that, but
/// never while something may still come of what it asked for.
macro_rules! persist {
    ($self:ident, $what:literal, $step:expr) => {{
        let begun = Instant::now();
        let (mut reported, mut unsure) = (false, false);
        loop {
            let result: Result<_, DfsError> = async { $step }.await;
            unsure |= matches!(result, Err(DfsError::UnknownOutcome { .. }));
            match result {
                Err(error)
                    if error.is_transient()
                        && (unsure || $self.patience.is_none_or(|patience| begun.elapsed() < patience)) =>
                {
                    if !reported {
                        tracing::warn!(step = $what, %error, "the sink is not available; trying until it is");
                        reported = true;
                    }
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                other => break other,
            }
        }
    }};
}

/// A file that is being made.
struct NewFile {
    writer: Box<dyn DfsWriter>,
    len: u64,
    asked: CreateOptions,
}

impl LaneSink {
    /// A name in the lane's directory that no attempt before has used: what a call with an unknown outcome does to its path,
    /// perhaps much later, must not meet anything.
    fn fresh(&self, prefix: &str, what: &str) -> DfsPath {
        let number = self.attempts.begun.fetch_add(1, Ordering::Relaxed);
        self.dir.join(format!("{prefix}e{}-{number}.{what}", self.epoch))
    }

    /// The same for the steps of one hour, which don't wait for ever for what only this hour may lack.
    #[must_use]
    pub fn for_an_hour(&self) -> Self {
        Self { patience: Some(HOUR_PATIENCE), ..self.clone() }
    }

    /// Whether this owner has lost the lane: its directory is not there under its name.
    ///
    /// # Errors
    /// When the sink doesn't say.
    pub async fn is_fenced(&self) -> Result<bool, DfsError> {
        Ok(self.dfs.stat(&self.dir).await?.is_none())
    }

    /// Makes a whole file in the lane's directory under a temporary name, and returns where it is.
    async fn make(&self, what: &str, chunks: &[Bytes]) -> Result<DfsPath, DfsError> {
        persist!(self, "make a file", {
            let path = self.fresh(TEMP_PREFIX, what);
            let made = async {
                let mut file = self.begin(&path).await?;
                for chunk in chunks {
                    file.len += chunk.len() as u64;
                    file.writer.write(chunk.clone()).await?;
                }
                self.finish(file, &path).await
            };
            self.or_discard(made.await, path).await
        })
    }

    /// The path of a file that was made. What an attempt that failed left is deleted: a long outage has very many attempts.
    async fn or_discard(&self, made: Result<(), DfsError>, path: DfsPath) -> Result<DfsPath, DfsError> {
        if made.is_err() {
            self.discard(&path).await;
        }
        made.map(|()| path)
    }

    async fn begin(&self, path: &DfsPath) -> Result<NewFile, DfsError> {
        let asked = self.placement.for_new_file(Instant::now(), self.create);
        match self.dfs.create(path, asked).await {
            Ok(writer) => Ok(NewFile { writer, len: 0, asked }),
            Err(error) => {
                self.placement.failed(Instant::now(), asked, &error);
                Err(error)
            }
        }
    }

    /// Syncs and closes a file and gives it all its copies.
    async fn finish(&self, mut file: NewFile, path: &DfsPath) -> Result<(), DfsError> {
        if let Err(error) = file.writer.sync().await {
            self.placement.failed(Instant::now(), file.asked, &error);
            return Err(error);
        }
        self.placement.works();
        let len = file.writer.close().await?;
        if len != file.len {
            let reason = format!("{} bytes were written, and the file has {len}", file.len);
            return Err(DfsError::UnknownOutcome { call: "close", path: path.clone(), reason });
        }
        if let Some(copies) = self.placement.raise_to(file.asked.replication)
            && let Err(error) = self.dfs.set_replication(path, copies).await
        {
            tracing::warn!(file = %path, copies, %error, "the copies of a closed file can't be raised");
        }
        Ok(())
    }

    /// Moves `from` to `to`. Done when `to` is there and `from` is not, whoever did it.
    async fn settle(&self, from: &DfsPath, to: &DfsPath) -> Result<(), DfsError> {
        persist!(
            self,
            "rename",
            match self.dfs.rename(from, to).await {
                Ok(()) => Ok(()),
                Err(error) => {
                    let moved = self.dfs.stat(from).await?.is_none() && self.dfs.stat(to).await?.is_some();
                    if moved { Ok(()) } else { Err(error) }
                }
            }
        )
    }

    /// Moves what was just made, and what any owner would make the same way: if it is there already, this one goes. So it does when
    /// it can't be moved: whoever tries again makes it anew.
    async fn settle_same(&self, from: &DfsPath, to: &DfsPath) -> Result<(), DfsError> {
        match self.settle(from, to).await {
            Ok(()) => Ok(()),
            Err(DfsError::Exists { .. }) => persist!(self, "delete", self.dfs.delete(from).await),
            Err(error) => {
                self.discard(from).await;
                Err(error)
            }
        }
    }

    /// Deletes something unfinished; later, if not now. Returns whether it is gone.
    async fn discard(&self, path: &DfsPath) -> bool {
        let Err(error) = self.dfs.delete(path).await else { return true };
        tracing::debug!(file = %path, %error, "an unfinished file stays for now");
        let mut left = self.attempts.left.lock().expect("nothing panics while the lock is held");
        if left.len() == MAX_LEFT {
            left.pop_front();
        }
        left.push_back(path.clone());
        false
    }

    /// Tries again to delete what was left, a few files each time: a lane can have one owner for years, and a join be as large as an
    /// hour.
    async fn tidy(&self) {
        let oldest = || self.attempts.left.lock().expect("nothing panics while the lock is held").pop_front();
        for _ in 0..TIDIED_AT_ONCE {
            let Some(path) = oldest() else { return };
            if !self.discard(&path).await {
                return;
            }
        }
    }

    /// Writes a ledger entry and returns when it is seen under its name. The result is the time, in milliseconds since 1970, at
    /// which the sink's clock says that it was written.
    ///
    /// # Errors
    /// When it can't be written, because this owner lost the lane or for another reason that doesn't pass.
    pub async fn write_entry(&self, entry: &Entry) -> Result<i64, DfsError> {
        let name = Entry::file_name(entry.number);
        let temp = self.make(&name, &[entry.encode().into()]).await?;
        let path = self.dir.join(&name);
        self.settle(&temp, &path).await?;
        let status = persist!(self, "look at the ledger", self.dfs.stat(&path).await)?;
        let status = status.ok_or(DfsError::NotFound { path })?;
        self.tidy().await;
        Ok(status.modified_ms)
    }

    /// Deletes ledger entries that a snapshot made superfluous: those below `before`.
    ///
    /// # Errors
    /// When the sink refuses; they do no harm.
    pub async fn drop_entries(&self, before: u64) -> Result<(), DfsError> {
        for entry in self.dfs.list(&self.dir).await?.unwrap_or_default() {
            if Entry::number_of(&entry.name).is_some_and(|number| number < before) {
                self.dfs.delete(&self.dir.join(&entry.name)).await?;
            }
        }
        Ok(())
    }

    /// Prepares an hour's seal out of its closed segments: makes the joins. None when the hour is published already, so that
    /// all of this is late.
    ///
    /// # Errors
    /// When a join can't be made.
    pub async fn prepare_seal(
        &self,
        key: &HourKey,
        segments: &[SegmentRecord],
        roll_size: u64,
        verdict: HourVerdict,
    ) -> Result<Option<Seal>, DfsError> {
        let dirs = HourDirs::new(&key.category, key.bucket);
        if self.published_dir(&dirs).await?.is_some() {
            return Ok(None);
        }
        let moves = self.prepare_files(segments, roll_size).await?;
        let mut seal = Seal {
            version: super::hours::FORM_VERSION,
            lane: self.lane,
            category: key.category.clone(),
            bucket_start_s: key.bucket.start_s(),
            bucket_size_s: key.bucket.size().seconds(),
            files: Vec::new(),
            inputs: Vec::new(),
            agents: BTreeMap::new(),
            losses: verdict.losses,
            missing: verdict.missing,
            publish_partial: verdict.publish_partial,
        };
        for one in moves {
            seal.files.extend(one.file);
            seal.inputs.extend(one.inputs);
            for (agent, count) in one.agents {
                seal.agents.entry(agent).or_default().add(count);
            }
        }
        Ok(Some(seal))
    }

    /// Prepares late files: as for a seal, each file for itself.
    ///
    /// # Errors
    /// When a join can't be made.
    pub async fn prepare_late(&self, segments: &[SegmentRecord], roll_size: u64) -> Result<Vec<LateMove>, DfsError> {
        self.prepare_files(segments, roll_size).await
    }

    async fn prepare_files(&self, segments: &[SegmentRecord], roll_size: u64) -> Result<Vec<LateMove>, DfsError> {
        let mut moves = Vec::new();
        let prepared = self.prepare_moves(segments, roll_size, &mut moves).await;
        if prepared.is_err() {
            // Nobody will ever name the joins that are ready: the next attempt makes its own, perhaps of other segments.
            let joins = moves.iter().filter_map(|one| Some(&one.file.as_ref()?.source));
            for name in joins.filter(|name| name.starts_with(JOIN_PREFIX)) {
                self.discard(&self.dir.join(name)).await;
            }
        }
        prepared.map(|()| moves)
    }

    async fn prepare_moves(
        &self,
        segments: &[SegmentRecord],
        roll_size: u64,
        moves: &mut Vec<LateMove>,
    ) -> Result<(), DfsError> {
        let plan = plan_files(segments, roll_size);
        for segment in plan.whole {
            let source = segment.name.clone();
            let (file, agents) = SealedFile::new(source, segment.name, segment.covered);
            moves.push(LateMove { file: Some(file), inputs: Vec::new(), agents });
        }
        for join in plan.joins {
            let first = join.inputs.first().expect("a join has inputs");
            let source = self.join(&join.inputs, first.codec.extension()).await?;
            let contents = join.inputs.iter().map(|input| &input.covered).collect();
            // The name of its first input, which is deleted, so no other file can have it.
            let (file, agents) = SealedFile::new(source.name().to_owned(), first.name.clone(), contents);
            let inputs = join.inputs.into_iter().map(|input| input.name).collect();
            moves.push(LateMove { file: Some(file), inputs, agents });
        }
        if !plan.empty.is_empty() {
            moves.push(LateMove { file: None, inputs: plan.empty, agents: BTreeMap::new() });
        }
        Ok(())
    }

    async fn join(&self, inputs: &[SegmentRecord], extension: &str) -> Result<DfsPath, DfsError> {
        persist!(self, "join segments", {
            let path = self.fresh(JOIN_PREFIX, extension);
            let made = self.copy_into(&path, inputs).await;
            self.or_discard(made, path).await
        })
    }

    async fn copy_into(&self, path: &DfsPath, inputs: &[SegmentRecord]) -> Result<(), DfsError> {
        let mut file = self.begin(path).await?;
        for input in inputs {
            let source = self.dir.join(&input.name);
            let mut at = 0;
            while at < input.covered.bytes {
                let want = usize::try_from(input.covered.bytes - at).unwrap_or(usize::MAX).min(READ_BYTES);
                let bytes = self.dfs.read(&source, at, want).await?;
                if bytes.is_empty() {
                    let reason = format!("it has {at} bytes; the ledger says {}", input.covered.bytes);
                    return Err(DfsError::Refused { call: "join", path: source, reason });
                }
                at += bytes.len() as u64;
                file.writer.write(bytes).await?;
            }
            file.len += at;
        }
        self.finish(file, path).await
    }

    /// Where readers find what lies in the place of an hour: its directory, or that of the day that was published in one; none
    /// when nothing is published there.
    async fn published_dir(&self, dirs: &HourDirs) -> Result<Option<DfsPath>, DfsError> {
        if persist!(self, "look for the hour", self.dfs.stat(&dirs.visible).await)?.is_some() {
            return Ok(Some(dirs.visible.clone()));
        }
        if dirs.is_in_a_day {
            let manifest = dirs.parent.join(MANIFEST_FILE);
            if persist!(self, "look for the day", self.dfs.stat(&manifest).await)?.is_some() {
                return Ok(Some(dirs.parent.clone()));
            }
        }
        Ok(None)
    }

    /// Makes the hour's hidden directory, with the place for late files in it, unless the hour has a directory already.
    async fn make_hour(&self, dirs: &HourDirs, target: &DfsPath) -> Result<(), DfsError> {
        let made = persist!(self, "make the hour's directory", {
            for dir in [&dirs.visible, &dirs.hidden] {
                if self.dfs.stat(dir).await?.is_some() {
                    return Ok(None);
                }
            }
            self.dfs.mkdir_all(&dirs.parent).await?;
            let temp = self.fresh(TEMP_PREFIX, "hour");
            self.dfs.mkdir(&temp).await?;
            self.dfs.mkdir(&temp.join(LATE_DIR)).await?;
            Ok(Some(temp))
        })?;
        match made {
            Some(temp) => self.settle_same(&temp, target).await,
            None => Ok(()),
        }
    }

    /// Asks the other lanes to seal an hour, also those that have nothing for it. The mark is no data and changes nothing but
    /// that, so it lies outside of the lane's directory.
    ///
    /// # Errors
    /// When the sink refuses.
    pub async fn want_hour(&self, key: &HourKey) -> Result<(), DfsError> {
        let path = wanted_dir().join(wanted_name(key));
        persist!(self, "ask the other lanes for an hour", self.dfs.mkdir_all(&path).await)
    }

    /// The hours that some lane has asked for and that are not published as far as lane 0 knows.
    ///
    /// # Errors
    /// When the sink doesn't say.
    pub async fn wanted_hours(&self) -> Result<Vec<HourKey>, DfsError> {
        let entries = self.dfs.list(&wanted_dir()).await?.unwrap_or_default();
        Ok(entries.iter().filter_map(|entry| wanted_hour(&entry.name)).collect())
    }

    /// Takes the request for an hour back: it is published.
    ///
    /// # Errors
    /// When the sink refuses; it does no harm.
    pub async fn has_hour(&self, key: &HourKey) -> Result<(), DfsError> {
        self.dfs.delete(&wanted_dir().join(wanted_name(key))).await
    }

    /// Carries out an announced seal: moves the files into the hour's hidden directory, then the seal itself, and deletes what
    /// went into joins.
    ///
    /// # Errors
    /// When a step fails for good.
    pub async fn execute_seal(&self, key: &HourKey, seal: &Seal) -> Result<Executed, DfsError> {
        let dirs = HourDirs::new(&key.category, key.bucket);
        if self.lanes.get() > 1 {
            self.want_hour(key).await?;
        }
        self.make_hour(&dirs, &dirs.hidden).await?;
        if persist!(self, "look for the hour", self.dfs.stat(&dirs.visible).await)?.is_some() {
            // An hour is published only when every lane's seal is in it, and the seal goes in last.
            let mine = dirs.visible.join(seal_file(self.lane));
            if !persist!(self, "read a seal", self.read_seal(&mine).await)?.is_some_and(|there| there.is_of(key)) {
                return Ok(Executed::Overtaken);
            }
            self.clear_hidden(&dirs).await?;
        } else {
            for file in &seal.files {
                self.settle(&self.dir.join(&file.source), &dirs.hidden.join(&file.name)).await?;
            }
            let name = seal_file(self.lane);
            let json = serde_json::to_vec_pretty(seal).expect("a seal is plain data");
            let temp = self.make(&name, &[json.into()]).await?;
            self.settle_same(&temp, &dirs.hidden.join(&name)).await?;
        }
        self.delete_inputs(&seal.inputs).await?;
        Ok(Executed::Sealed)
    }

    /// Removes a hidden directory beside the published hour: a step that was overtaken by the publishing has made it anew. Only if
    /// nothing is in it that the hour does not have.
    async fn clear_hidden(&self, dirs: &HourDirs) -> Result<(), DfsError> {
        let list = persist!(self, "look for what is left of the hour", self.dfs.list(&dirs.hidden).await)?;
        let Some(left) = list else { return Ok(()) };
        for entry in left {
            let path = dirs.hidden.join(&entry.name);
            let is_known = if entry.status.is_dir {
                let inside = persist!(self, "look for late files", self.dfs.list(&path).await)?;
                entry.name == LATE_DIR && inside.is_none_or(|files| files.is_empty())
            } else if entry.name.ends_with(".json") {
                let there = dirs.visible.join(&entry.name);
                persist!(self, "compare what is left of the hour", self.is_same(&path, &there).await)?
            } else {
                false
            };
            if !is_known {
                tracing::error!(%path, "beside a published hour lies something that the hour does not have; it is left alone: look what it is");
                return Ok(());
            }
        }
        persist!(self, "delete what is left of the hour", self.dfs.delete(&dirs.hidden).await)
    }

    async fn is_same(&self, one: &DfsPath, other: &DfsPath) -> Result<bool, DfsError> {
        if self.dfs.stat(other).await?.is_none() {
            return Ok(false);
        }
        Ok(self.read_whole(one).await? == self.read_whole(other).await?)
    }

    /// A seal that was put into an hour; none when there is none.
    async fn read_seal(&self, path: &DfsPath) -> Result<Option<Seal>, DfsError> {
        let bytes = match self.read_whole(path).await {
            Ok(bytes) => bytes,
            Err(DfsError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let seal = serde_json::from_slice(&bytes).map_err(|error| DfsError::Refused {
            call: "read",
            path: path.clone(),
            reason: format!("the seal can't be read: {error}; the hour waits until it can"),
        })?;
        Ok(Some(seal))
    }

    async fn delete_inputs(&self, inputs: &[String]) -> Result<(), DfsError> {
        for input in inputs {
            let path = self.dir.join(input);
            persist!(self, "delete the inputs of a join", self.dfs.delete(&path).await)?;
        }
        Ok(())
    }

    /// Publishes an hour when the seals of all lanes are there: manifest, success file, and the rename that makes it visible.
    /// Returns whether the hour is published.
    ///
    /// # Errors
    /// When a step fails for good, or a seal can't be read.
    pub async fn publish(&self, key: &HourKey) -> Result<bool, DfsError> {
        let dirs = HourDirs::new(&key.category, key.bucket);
        if self.is_published(key).await? {
            return Ok(true);
        }
        let mut seals = Vec::new();
        for lane in self.lanes.lanes() {
            let path = dirs.hidden.join(seal_file(lane));
            let Some(seal) = persist!(self, "read a seal", self.read_seal(&path).await)? else { return Ok(false) };
            if !seal.is_of(key) {
                return Err(DfsError::Refused {
                    call: "publish",
                    path,
                    reason: format!(
                        "the seal is of a bucket of {} s that has the same place: the bucket size was changed while both were being \
                         sealed; move one bucket's files and seals out of the directory",
                        seal.bucket_size_s
                    ),
                });
            }
            seals.push(seal);
        }
        let manifest = Manifest::of(key, &seals);
        let json = |bytes: Result<Vec<u8>, serde_json::Error>| Bytes::from(bytes.expect("a manifest is plain data"));
        let mut files = vec![(MANIFEST_FILE, json(serde_json::to_vec_pretty(&manifest)))];
        files.extend(Partial::of(&manifest).map(|partial| (PARTIAL_FILE, json(serde_json::to_vec_pretty(&partial)))));
        if is_success(&seals) {
            files.push((&self.success_file, Bytes::new()));
        }
        for (name, bytes) in files {
            let temp = self.make(name, &[bytes]).await?;
            self.settle_same(&temp, &dirs.hidden.join(name)).await?;
        }
        self.settle(&dirs.hidden, &dirs.visible).await?;
        Ok(true)
    }

    /// Whether the hour, which this lane has sealed, can be seen by readers.
    ///
    /// # Errors
    /// When the sink doesn't say; and when something else lies in its place, and what this lane has sealed is still hidden.
    pub async fn is_published(&self, key: &HourKey) -> Result<bool, DfsError> {
        let dirs = HourDirs::new(&key.category, key.bucket);
        if persist!(self, "look for the hour", self.dfs.stat(&dirs.visible).await)?.is_none() {
            return Ok(false);
        }
        let name = seal_file(self.lane);
        let path = dirs.hidden.join(&name);
        // Nothing of an hour stays hidden that is published. Of one that retention has removed nothing is anywhere.
        if persist!(self, "read a seal", self.read_seal(&path).await)?.is_some_and(|seal| seal.is_of(key))
            && !persist!(self, "read a seal", self.read_seal(&dirs.visible.join(&name)).await)?
                .is_some_and(|seal| seal.is_of(key))
        {
            return Err(DfsError::Refused {
                call: "publish",
                path,
                reason: format!(
                    "buckets of another size were published as {} meanwhile: move the data files from beside this seal to \
                     where your jobs look for late data, and then delete the directory",
                    dirs.visible
                ),
            });
        }
        Ok(true)
    }

    /// Carries out announced moves of late files: each goes beside the published hour, with a manifest of its own.
    ///
    /// # Errors
    /// When a step fails for good.
    pub async fn execute_late(&self, key: &HourKey, moves: &[LateMove]) -> Result<(), DfsError> {
        let dirs = HourDirs::new(&key.category, key.bucket);
        let published = match self.published_dir(&dirs).await? {
            Some(published) => published,
            None => {
                // Retention may have removed the hour; what comes later still has its place.
                self.make_hour(&dirs, &dirs.visible).await?;
                dirs.visible
            }
        };
        let late = published.join(LATE_DIR);
        persist!(self, "make the directory of late files", self.dfs.mkdir_all(&late).await)?;
        for one in moves {
            if let Some(file) = &one.file {
                let seal = Seal {
                    version: super::hours::FORM_VERSION,
                    lane: self.lane,
                    category: key.category.clone(),
                    bucket_start_s: key.bucket.start_s(),
                    bucket_size_s: key.bucket.size().seconds(),
                    files: vec![file.clone()],
                    inputs: Vec::new(),
                    agents: one.agents.clone(),
                    losses: Vec::new(),
                    missing: Vec::new(),
                    publish_partial: false,
                };
                let manifest = Manifest::of(key, std::slice::from_ref(&seal));
                let json = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data");
                let name = late_manifest_file(&file.name);
                let temp = self.make(&name, &[json.into()]).await?;
                self.settle_same(&temp, &late.join(&name)).await?;
                self.settle(&self.dir.join(&file.source), &late.join(&file.name)).await?;
            }
            self.delete_inputs(&one.inputs).await?;
        }
        Ok(())
    }

    async fn read_whole(&self, path: &DfsPath) -> Result<Bytes, DfsError> {
        read_whole(&*self.dfs, path).await
    }

    /// Recovers a segment that this owner gave up, and reads what is behind `synced`. None when there is no file.
    ///
    /// # Errors
    /// When the sink refuses for good.
    pub async fn read_back(&self, name: &str, synced: u64) -> Result<Option<(Scan, u64)>, DfsError> {
        let path = self.dir.join(name);
        let Some(len) = recover_until_closed(&*self.dfs, &path).await? else {
            return Ok(None);
        };
        let scan = persist!(self, "read a segment back", scan(&*self.dfs, &path, synced, len).await)?;
        Ok(Some((scan, len)))
    }
}

/// Reads a file to its end.
///
/// # Errors
/// When it is not there or can't be read.
pub async fn read_whole(dfs: &dyn Dfs, path: &DfsPath) -> Result<Bytes, DfsError> {
    let status = dfs.stat(path).await?.ok_or_else(|| DfsError::NotFound { path: path.clone() })?;
    let len = usize::try_from(status.len).unwrap_or(usize::MAX);
    let bytes = dfs.read(path, 0, len).await?;
    if bytes.len() == len {
        Ok(bytes)
    } else {
        let reason = format!("{} of {len} bytes could be read", bytes.len());
        Err(DfsError::Unavailable { call: "read", path: path.clone(), reason })
    }
}

#[cfg(test)]
mod tests {
    use tributary_common::frame::Codec;

    use super::super::ledger::Contents;
    use super::super::ledger::tests::entry;
    use super::*;
    use crate::dfs::hostile::{HostileCluster, Hostility};
    use crate::root::recovery;

    async fn sink(cluster: &HostileCluster) -> LaneSink {
        let dfs: Arc<dyn Dfs> = Arc::new(cluster.process());
        let mine = recovery::seize(&dfs, LaneId(0)).await.expect("nobody has it");
        LaneSink {
            dfs,
            dir: mine.dir,
            lane: LaneId(0),
            lanes: LaneCount::ONE,
            create: CreateOptions { block_size: 1 << 20, replication: None, sync_timeout: RETRY_PAUSE },
            placement: Arc::new(Placement::new(None, 1)),
            epoch: mine.epoch,
            attempts: Arc::default(),
            success_file: "_SUCCESS".into(),
            patience: None,
        }
    }

    fn hour(size_s: u32) -> HourKey {
        let size = BucketSize::try_from(size_s).expect("valid");
        HourKey { category: "app".parse().expect("valid"), bucket: size.bucket_of_ms(0) }
    }

    /// A torn segment with this content.
    async fn segment(sink: &LaneSink, name: &str, bytes: &'static [u8], codec: Codec) -> SegmentRecord {
        let made = sink.make(name, &[Bytes::from_static(bytes)]).await.expect("made");
        sink.settle(&made, &sink.dir.join(name)).await.expect("moved");
        let checksum = tributary_common::checksum::Checksum::of(bytes);
        let covered = Contents { bytes: bytes.len() as u64, checksum, records: 1, ..Contents::default() };
        let key = hour(3600);
        SegmentRecord {
            name: name.into(),
            category: key.category,
            bucket: key.bucket,
            codec,
            covered,
            closed: true,
            torn: true,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_joins_of_a_plan_that_failed_do_not_stay() {
        let cluster = HostileCluster::new(1, Hostility::none());
        let sink = sink(&cluster).await;
        let good = segment(&sink, "app.a.gz", b"gzip", Codec::Gzip).await;
        let gone = SegmentRecord { name: "app.b.zst".into(), codec: Codec::Zstd, ..good.clone() };
        let prepare = |segments: Vec<SegmentRecord>| {
            let sink = &sink;
            async move { sink.prepare_seal(&hour(3600), &segments, 100, HourVerdict::default()).await }
        };
        for _ in 0..3 {
            prepare(vec![good.clone(), gone.clone()]).await.expect_err("an input is not there");
        }
        let joins = || cluster.files().into_keys().filter(|path| path.name().starts_with(JOIN_PREFIX)).count();
        assert_eq!(joins(), 0);
        prepare(vec![good]).await.expect("ready").expect("not published");
        assert_eq!(joins(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_left_hidden_beside_a_published_hour_goes_when_the_hour_has_all_of_it() {
        let cluster = HostileCluster::new(1, Hostility::none());
        let (sink, key) = (sink(&cluster).await, hour(3600));
        let dirs = HourDirs::new(&key.category, key.bucket);
        let record = segment(&sink, "app.a.gz", b"gzip", Codec::Gzip).await;
        let seal = sink
            .prepare_seal(&key, &[record], 100, HourVerdict::default())
            .await
            .expect("ready")
            .expect("not published");
        assert_eq!(sink.execute_seal(&key, &seal).await.expect("done"), Executed::Sealed);
        assert!(sink.publish(&key).await.expect("published"));
        let published = cluster.files();
        // What an owner has made that looked for the hour just before it was published. It looks again.
        let left = async |name: Option<&str>, bytes: &Bytes| {
            sink.dfs.mkdir(&dirs.hidden).await.expect("made");
            sink.dfs.mkdir(&dirs.hidden.join(LATE_DIR)).await.expect("made");
            if let Some(name) = name {
                let made = sink.make(name, std::slice::from_ref(bytes)).await.expect("made");
                sink.settle(&made, &dirs.hidden.join(name)).await.expect("moved");
            }
            assert_eq!(sink.execute_seal(&key, &seal).await.expect("done"), Executed::Sealed);
            sink.dfs.stat(&dirs.hidden).await.expect("answers").is_some()
        };
        let same = &published[&dirs.visible.join(seal_file(LaneId(0)))];
        assert!(!left(None, &Bytes::new()).await);
        assert!(!left(Some(&seal_file(LaneId(0))), same).await);
        assert_eq!(cluster.files(), published);
        assert!(left(Some("app.b.gz"), same).await, "nobody knows that it is anywhere else");
    }

    #[tokio::test(start_paused = true)]
    async fn a_seal_in_whose_place_a_bucket_of_another_size_was_published_is_late_beside_it() {
        let cluster = HostileCluster::new(1, Hostility::none());
        let sink = sink(&cluster).await;
        for (first, second) in [(3600, 7200), (86_400, 1800)] {
            let (first, second) = (hour(first), hour(second));
            let record = segment(&sink, "app.a.gz", b"gzip", Codec::Gzip).await;
            let prepared = async |key: &HourKey, records: &[SegmentRecord]| {
                sink.prepare_seal(key, records, 100, HourVerdict::default()).await.expect("ready")
            };
            let overtaken = prepared(&second, &[record]).await.expect("not published");
            let seal = prepared(&first, &[]).await.expect("not published");
            sink.execute_seal(&first, &seal).await.expect("done");
            assert!(sink.publish(&first).await.expect("published"));
            let published = cluster.files();
            assert_eq!(prepared(&second, &[]).await, None);
            if HourDirs::new(&first.category, first.bucket).visible
                == HourDirs::new(&second.category, second.bucket).visible
            {
                assert_eq!(sink.execute_seal(&second, &overtaken).await.expect("done"), Executed::Overtaken);
            }
            assert_eq!(cluster.files(), published, "nothing was moved or deleted");
            sink.execute_late(&second, &overtaken.into_late()).await.expect("done");
            let late = HourDirs::new(&first.category, first.bucket).visible.join(LATE_DIR);
            let files = cluster.files();
            assert_eq!(files[&late.join("app.a.gz")], Bytes::from_static(b"gzip"));
            let mut moved = published.keys().filter(|path| !files.contains_key(path));
            assert!(moved.all(|path| path.as_str().contains("lanes")), "the segment and its join, and nothing else");
            sink.dfs.delete(&HourDirs::new(&first.category, first.bucket).visible).await.expect("deleted");
            sink.dfs.delete(&HourDirs::new(&first.category, first.bucket).parent).await.expect("deleted");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_sealed_day_is_not_taken_for_published_because_hours_lie_in_its_place() {
        let cluster = HostileCluster::new(1, Hostility::none());
        let (sink, day) = (sink(&cluster).await, hour(86_400));
        let record = segment(&sink, "app.a.gz", b"gzip", Codec::Gzip).await;
        let prepared = sink.prepare_seal(&day, &[record], 100, HourVerdict::default()).await;
        let seal = prepared.expect("ready").expect("not published");
        sink.execute_seal(&day, &seal).await.expect("done");
        assert!(!sink.is_published(&day).await.expect("answers"));
        let dirs = HourDirs::new(&day.category, day.bucket);
        // Another lane has data of an hour of that day, and was faster.
        sink.dfs.mkdir_all(&HourDirs::new(&day.category, hour(3600).bucket).hidden).await.expect("made");
        for asked in [sink.is_published(&day).await, sink.publish(&day).await] {
            let refused = asked.expect_err("it is hidden still").to_string();
            assert!(refused.contains(dirs.hidden.as_str()), "{refused}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn attempts_that_failed_leave_nothing_behind() {
        let cluster = HostileCluster::new(1, Hostility::none());
        let sink = sink(&cluster).await;
        cluster.set_hostility(Hostility { writer_failures: 500, ..Hostility::none() });
        let mut made = Vec::new();
        for _ in 0..20 {
            made.push(sink.make("x", &[Bytes::from_static(b"text")]).await.expect("it works in the end"));
        }
        made.sort();
        assert!(sink.attempts.begun.load(Ordering::Relaxed) > 40, "no attempt failed");
        let left: Vec<DfsPath> =
            cluster.files().into_keys().filter(|path| path.as_str().contains(TEMP_PREFIX)).collect();
        assert_eq!(left, made);
    }

    #[tokio::test(start_paused = true)]
    async fn what_could_not_be_deleted_is_deleted_later() {
        let cluster = HostileCluster::new(1, Hostility::none());
        let sink = sink(&cluster).await;
        cluster.set_hostility(Hostility { writer_failures: 500, unavailable: 300, ..Hostility::none() });
        let mut made = Vec::new();
        for _ in 0..20 {
            made.push(sink.make("x", &[Bytes::from_static(b"text")]).await.expect("it works in the end"));
        }
        made.sort();
        let temporary =
            || cluster.files().into_keys().filter(|path| path.as_str().contains(TEMP_PREFIX)).collect::<Vec<DfsPath>>();
        let left = temporary().len() - made.len();
        assert!(left > 0, "every deletion worked");
        // As long as it fails, nothing is forgotten.
        for number in 0..40 {
            cluster.set_hostility(Hostility { unavailable: if number < 10 { 300 } else { 0 }, ..Hostility::none() });
            sink.write_entry(&entry(number, false)).await.expect("written in the end");
        }
        assert_eq!(temporary(), made);
        assert!(sink.attempts.left.lock().expect("not poisoned").is_empty());
    }

    #[test]
    fn a_request_for_an_hour_has_a_name_that_reads_back() {
        for (ms, size) in [(0, BucketSize::HOUR), (-3_600_000, BucketSize::HOUR), (1_795_378_500_000, BucketSize::HOUR)]
        {
            let key = HourKey { category: "nginx-access.v2".parse().expect("valid"), bucket: size.bucket_of_ms(ms) };
            assert_eq!(wanted_hour(&wanted_name(&key)), Some(key));
        }
        for foreign in ["", "app", "app@1+3600", "app@0+7", "@0+3600", "app@x+3600"] {
            assert_eq!(wanted_hour(foreign), None, "{foreign:?}");
        }
    }
}
