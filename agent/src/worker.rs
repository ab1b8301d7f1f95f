//! The threads that touch log files: they open, read, cut and compress, one job at a time each.
//!
//! A batch is read, cut and compressed by one thread, while its bytes are in that core's cache; so a thread needs one
//! buffer, whatever the number of files. Who reads what is decided elsewhere.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tributary_common::batch::Batch;
use tributary_common::bucket::BucketSize;
use tributary_common::frame::Codec;
use tributary_common::ids::StreamId;
use tributary_common::position::{Position, TAIL_WINDOW_BYTES, TailHash};

use crate::compress::{BatchFacts, Packer};
use crate::config::{LongLines, Source};
use crate::copies::{Compressor, Likeness, Original, Unpacked, compare, unpack};
use crate::cut::{CutOptions, DataEnd, Input, cut};
use crate::identity::{FileFacts, Head, ReadAt, read_up_to};
use crate::tally::Share;
use crate::timestamp::{LineTime, TimeReader};

/// How far back a line that says its time is looked for, when a file is taken up in the middle, and in which pieces.
const TIME_SEARCH_BYTES: u64 = 16 << 20;
const TIME_SEARCH_PIECE: u64 = 64 << 10;

/// How long results are held while more are to come.
const HOLD: Duration = Duration::from_millis(40);

/// How far back from the end of a file its last newline is looked for.
const END_SEARCH_BYTES: usize = 1 << 20;

/// The name of a log file in this process, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TailId(pub u64);

/// The time of the line before a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carry {
    /// Not known here: it is looked for in the file.
    Search,
    /// Milliseconds since 1970; none where no line before says a time.
    Known(Option<i64>),
}

/// Batches to make.
#[derive(Debug, Clone)]
pub struct ReadJob {
    /// Grows when the stream goes back; given back with the result.
    pub generation: u64,
    /// The number of the source.
    pub source: usize,
    /// Where to begin.
    pub from: Position,
    /// How many batches to make, one behind the other: no more than the file has bytes for, at least one.
    pub most: u32,
    /// The first line of the file by which the stream got its name, and its length in bytes: before the beginning, nothing
    /// else would show that the file is another one by now.
    pub first_line: (u32, TailHash),
    /// Whether an unterminated last line of the first batch is a record.
    pub end: DataEnd,
    /// The time of the line before the first batch.
    pub carry: Carry,
    /// The clock, milliseconds since 1970.
    pub now_ms: i64,
    /// The category's buckets.
    pub bucket: BucketSize,
    /// Codec and level.
    pub codec: (Codec, i32),
    /// What each batch says of itself.
    pub facts: BatchFacts,
}

/// What a worker is to do.
#[derive(Debug)]
pub enum Job {
    /// Open a file.
    Open {
        /// Where it is.
        path: PathBuf,
        /// Whether the end of its last line is wanted.
        find_end: bool,
    },
    /// Read the beginning of an open file.
    Head(Arc<File>),
    /// Make batches.
    Read(Arc<File>, Box<ReadJob>),
    /// Compare the file with tail hashes.
    Check(Arc<File>, Vec<Position>),
    /// Find out whether it holds what a known stream held.
    Compare {
        /// The file.
        file: Arc<File>,
        /// The streams that begin with the same line.
        originals: Vec<Original>,
        /// Whether it will not become longer.
        rested: bool,
    },
    /// Find in a compressed file what is missing of a stream.
    Unpack {
        /// The file.
        file: Arc<File>,
        /// How it is compressed.
        compressor: Compressor,
        /// The streams, each with the hash and the length of its first line.
        originals: Vec<(TailHash, u32, Original)>,
        /// Where the unpacked bytes go.
        directory: PathBuf,
    },
}

/// A file that was opened.
#[derive(Debug)]
pub struct Opened {
    /// The file.
    pub file: Arc<File>,
    /// What the system says of it.
    pub facts: FileFacts,
    /// Its beginning.
    pub head: Head,
    /// The end of its last whole line, if that was wanted.
    pub end: Option<Position>,
}

/// What became of a job.
#[derive(Debug)]
pub enum Done {
    /// The file is open.
    Opened(Box<io::Result<Opened>>),
    /// The beginning of the file.
    Head(io::Result<(FileFacts, Head)>),
    /// A batch was cut and is being compressed.
    Cut {
        /// Of the job.
        generation: u64,
        /// Where it begins.
        from: Position,
        /// Where it ends.
        end: Position,
        /// The time of its last line.
        carry: Option<i64>,
        /// Lines in it.
        lines: u64,
        /// Of these, altered ones.
        altered: u64,
        /// Lines whose time was not believed.
        implausible: u64,
        /// What it has for each bucket.
        shares: Vec<Share>,
        /// How many more the job is to make.
        more: u32,
    },
    /// There was no whole record. The job ends.
    Nothing {
        /// Of the job.
        generation: u64,
        /// How long the file was.
        size: u64,
        /// How many batches less than it was to the job has made.
        missing: u32,
    },
    /// The file does not have the bytes that it had. The job ends.
    OtherBytes {
        /// Of the job.
        generation: u64,
        /// Where the batch was to begin.
        from: Position,
        /// How long the file was.
        size: u64,
        /// How many batches less than it was to the job has made.
        missing: u32,
    },
    /// The file could not be read. The job ends.
    ReadFailed {
        /// Why.
        error: io::Error,
        /// How many batches less than it was to the job has made.
        missing: u32,
    },
    /// The batch that was cut is compressed.
    Packed {
        /// Of the job.
        generation: u64,
        /// Where it ends.
        end: Position,
        /// The batch, or what makes it impossible.
        batch: Result<Batch, String>,
        /// How many more the job is to make; it ends with the one that says none.
        more: u32,
    },
    /// The thread panicked, which is a bug.
    Died,
    /// Those positions at which the file has the bytes that the hashes say.
    Checked(Vec<Position>, io::Result<Vec<Position>>),
    /// What it is, to which stream.
    Compared(io::Result<Option<(StreamId, Likeness)>>),
    /// What it has that is missing.
    Unpacked(io::Result<Option<Unpacked>>),
}

/// What all jobs share.
#[derive(Debug)]
pub struct WorkerOptions {
    /// The sources.
    pub sources: Vec<Source>,
    /// The most bytes of a file that one batch covers.
    pub batch_bytes: usize,
}

/// The threads.
#[derive(Debug)]
pub struct Workers {
    jobs: Option<Sender<(TailId, Job)>>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts `count` threads; each result is given to `done`, which returns whether anybody still wants results.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(
        count: u16,
        options: WorkerOptions,
        done: impl Fn(TailId, Done) -> bool + Send + Clone + 'static,
    ) -> io::Result<Self> {
        let options = Arc::new(options);
        let (jobs, queue) = channel();
        let queue = Arc::new(Mutex::new(queue));
        let threads = (0..count)
            .map(|n| {
                let (options, queue, done) = (Arc::clone(&options), Arc::clone(&queue), done.clone());
                std::thread::Builder::new().name(format!("worker-{n}")).spawn(move || {
                    let _last_words = LastWords(done.clone());
                    Worker::new(&options).work(&queue, done);
                })
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { jobs: Some(jobs), threads })
    }

    /// Queues a job.
    pub fn submit(&self, tail: TailId, job: Job) {
        // Fails only when all threads are gone, of which the caller hears by its own channel.
        let _ = self.jobs.as_ref().map(|jobs| jobs.send((tail, job)));
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// Tells of a panic, so that nobody waits for results for ever.
struct LastWords<F: Fn(TailId, Done) -> bool>(F);

impl<F: Fn(TailId, Done) -> bool> Drop for LastWords<F> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            (self.0)(TailId(u64::MAX), Done::Died);
        }
    }
}

/// What one thread does, and its working memory.
pub struct Worker<'a> {
    options: &'a WorkerOptions,
    /// One per source, where it has times to read.
    times: Vec<Option<TimeReader>>,
    buffer: Vec<u8>,
    packer: Packer,
}

impl<'a> Worker<'a> {
    /// One that has done nothing yet.
    #[must_use]
    pub fn new(options: &'a WorkerOptions) -> Self {
        let times = options.sources.iter().map(|source| source.timestamp.as_ref().map(TimeReader::new)).collect();
        Self { options, times, buffer: Vec::new(), packer: Packer::default() }
    }

    fn work(&mut self, queue: &Mutex<Receiver<(TailId, Job)>>, done: impl Fn(TailId, Done) -> bool) {
        let mut results = Outbox { held: Vec::new(), since: None, done };
        loop {
            let at_hand = queue.try_lock().ok().and_then(|queue| queue.try_recv().ok());
            let next = at_hand.or_else(|| {
                // Whoever waits holds nothing back.
                let is_wanted = results.deliver();
                let next = is_wanted.then(|| queue.lock().unwrap_or_else(PoisonError::into_inner).recv());
                next?.ok()
            });
            let Some((tail, job)) = next else { return };
            if !results.make_way(&job) {
                return;
            }
            let wanted = match job {
                Job::Open { path, find_end } => results.add(tail, Done::Opened(Box::new(open(&path, find_end)))),
                Job::Head(file) => {
                    let head = FileFacts::of(&file).and_then(|facts| Ok((facts, Head::of(&file)?)));
                    results.add(tail, Done::Head(head))
                }
                Job::Check(file, positions) => {
                    let matching = check(&*file, &positions);
                    results.add(tail, Done::Checked(positions, matching))
                }
                Job::Compare { file, originals, rested } => {
                    results.add(tail, Done::Compared(compare(&file, &originals, rested)))
                }
                Job::Unpack { file, compressor, originals, directory } => {
                    let (lines, originals): (Vec<_>, Vec<_>) =
                        originals.into_iter().map(|(hash, len, original)| ((hash, len), original)).unzip();
                    let begins = |line: &[u8]| {
                        let fits = |(hash, len): &(TailHash, u32)| {
                            line.get(..*len as usize).is_some_and(|line| TailHash::of(line) == *hash)
                        };
                        (0..lines.len()).filter(|n| fits(&lines[*n])).collect()
                    };
                    results.add(tail, Done::Unpacked(unpack(&file, compressor, &originals, &directory, begins)))
                }
                Job::Read(file, job) => self.read(&*file, *job, |what| results.add(tail, what)),
            };
            if !wanted {
                return;
            }
        }
    }

    /// Makes batches, and tells `done` of what it finds on the way. Returns whether anybody still wants results.
    pub fn read(&mut self, file: &impl ReadAt, mut job: ReadJob, mut done: impl FnMut(Done) -> bool) -> bool {
        loop {
            match self.read_batch(file, &job, &mut done) {
                Ok(Made::Batch(end, carry_ms)) if job.most > 1 => {
                    (job.from, job.carry) = (end, Carry::Known(carry_ms));
                    (job.end, job.most) = (DataEnd::Open, job.most - 1);
                }
                Ok(Made::Batch(..) | Made::None) => return true,
                Ok(Made::Unwanted) => return false,
                Err(error) => return done(Done::ReadFailed { error, missing: job.most }),
            }
        }
    }

    /// Makes one batch, where the job begins.
    fn read_batch(
        &mut self,
        file: &impl ReadAt,
        job: &ReadJob,
        mut done: impl FnMut(Done) -> bool,
    ) -> io::Result<Made> {
        let ended = |wanted: bool| Ok(if wanted { Made::None } else { Made::Unwanted });
        let source = &self.options.sources[job.source];
        let (from, generation, more) = (job.from, job.generation, job.most - 1);
        let mut times = self.times[job.source].as_mut();
        // One byte more than a batch covers, so that the longest line has room for its newline.
        let wanted = self.options.batch_bytes + 1;
        let before = usize::try_from(from.offset).unwrap_or(usize::MAX).min(TAIL_WINDOW_BYTES);
        self.buffer.resize(self.buffer.len().max(before + wanted), 0);
        let got = read_up_to(file, &mut self.buffer[..before + wanted], from.offset - before as u64)?;
        let size = from.offset - before as u64 + got as u64;
        let (known, data) = self.buffer[..got].split_at(before.min(got));
        let (line_len, line_hash) = job.first_line;
        let is_other_file = got < before
            || TailHash::of(known) != from.tail
            || (from.offset == 0 && data.get(..line_len as usize).is_none_or(|line| TailHash::of(line) != line_hash));
        if is_other_file {
            return ended(done(Done::OtherBytes { generation, from, size, missing: job.most }));
        }
        let at_end = data.len() < wanted;
        let carry_ms = match (job.carry, &mut times) {
            (Carry::Known(ms), _) => ms,
            (Carry::Search, None) => None,
            (Carry::Search, Some(times)) => time_before(file, from.offset, times, job.now_ms)?,
        };
        let inside_line = known.last().is_some_and(|byte| *byte != b'\n');
        let skipping = inside_line
            && source.long_lines != LongLines::Split
            && is_behind_long_line(file, from.offset, source.max_line_bytes)?;
        let options = CutOptions {
            max_line_bytes: source.max_line_bytes as usize,
            long_lines: source.long_lines,
            prefix: source.record_prefix.clone(),
            bucket: job.bucket,
            max_stored_bytes: 2 * self.options.batch_bytes,
        };
        let input = Input {
            data,
            offset: from.offset,
            end: if at_end { job.end } else { DataEnd::Open },
            inside_line,
            skipping,
            carry_ms,
            now_ms: job.now_ms,
        };
        let cut = cut(&options, input, times);
        if cut.len == 0 {
            return ended(done(Done::Nothing { generation, size, missing: job.most }));
        }
        let end =
            Position { offset: from.offset + cut.len as u64, tail: TailHash::of(&self.buffer[..before + cut.len]) };
        let wanted = done(Done::Cut {
            generation,
            from,
            end,
            carry: cut.carry_ms,
            lines: cut.lines,
            altered: cut.altered,
            implausible: cut.implausible,
            shares: cut.shares(),
            more,
        });
        if !wanted {
            return Ok(Made::Unwanted);
        }
        let data = &self.buffer[before..got];
        let facts = job.facts.clone();
        let batch = self.packer.pack(job.codec, facts, (from, end), &cut, data).map_err(|error| error.to_string());
        let wanted = done(Done::Packed { generation, end, batch, more });
        Ok(if wanted { Made::Batch(end, cut.carry_ms) } else { Made::Unwanted })
    }
}

/// What became of one batch of a job.
enum Made {
    /// It is made; where it ends, and the time of its last line.
    Batch(Position, Option<i64>),
    /// There is none, nor any behind it.
    None,
    /// Nobody wants results any more.
    Unwanted,
}

/// Results on their way to the loop, which they wake: that costs both threads more than making a line of it, so they are told together.
struct Outbox<F: Fn(TailId, Done) -> bool> {
    held: Vec<(TailId, Done)>,
    /// Since when the first of them is held.
    since: Option<Instant>,
    done: F,
}

impl<F: Fn(TailId, Done) -> bool> Outbox<F> {
    /// Tells of a result, at once or with those that follow soon. Returns whether anybody still wants results.
    fn add(&mut self, tail: TailId, done: Done) -> bool {
        // Behind the last one that is cut, the loop has to give another job meanwhile, or this thread would wait.
        let is_awaited = !matches!(done, Done::Cut { more: 1.., .. } | Done::Packed { .. });
        self.held.push((tail, done));
        let since = *self.since.get_or_insert_with(Instant::now);
        (!is_awaited && since.elapsed() < HOLD) || self.deliver()
    }

    /// Another job begins: only while batches are made is anything held, since other jobs may take long. Returns whether anybody still wants
    /// results.
    fn make_way(&mut self, job: &Job) -> bool {
        matches!(job, Job::Read(..)) || self.deliver()
    }

    fn deliver(&mut self) -> bool {
        self.since = None;
        self.held.drain(..).all(|(tail, done)| (self.done)(tail, done))
    }
}

fn open(path: &std::path::Path, find_end: bool) -> io::Result<Opened> {
    // Opening a pipe would wait for its writer otherwise.
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits();
    let file = OpenOptions::new().read(true).custom_flags(nonblocking.cast_signed()).open(path)?;
    let facts = FileFacts::of(&file)?;
    if !facts.regular {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let head = Head::of(&file)?;
    let end = if find_end { Some(end_of_lines(&file, facts.size)?) } else { None };
    Ok(Opened { file: Arc::new(file), facts, head, end })
}

/// The position behind the last newline before `size`.
fn end_of_lines(file: &File, size: u64) -> io::Result<Position> {
    let from = size.saturating_sub(END_SEARCH_BYTES as u64);
    let mut bytes = vec![0; (size - from) as usize];
    let got = read_up_to(file, &mut bytes, from)?;
    let offset = match memchr::memrchr(b'\n', &bytes[..got]) {
        Some(newline) => from + newline as u64 + 1,
        // One very long line: its end is as good a place as any.
        None if from > 0 => from + got as u64,
        None => 0,
    };
    Ok(Position { offset, tail: tail_at(file, offset)? })
}

fn tail_at(file: &impl ReadAt, offset: u64) -> io::Result<TailHash> {
    let before = offset.min(TAIL_WINDOW_BYTES as u64);
    let mut bytes = vec![0; before as usize];
    let got = read_up_to(file, &mut bytes, offset - before)?;
    bytes.truncate(got);
    Ok(TailHash::of(&bytes))
}

/// Those of the positions at which the file has the bytes that the hashes say.
///
/// # Errors
/// When it can't be read.
pub fn check(file: &impl ReadAt, positions: &[Position]) -> io::Result<Vec<Position>> {
    let mut matching = Vec::new();
    for position in positions {
        let before = position.offset.min(TAIL_WINDOW_BYTES as u64);
        let mut bytes = vec![0; before as usize];
        let got = read_up_to(file, &mut bytes, position.offset - before)?;
        if got == bytes.len() && TailHash::of(&bytes) == position.tail {
            matching.push(*position);
        }
    }
    Ok(matching)
}

/// The time of the last line before `offset` that says one: a stack trace stays with the line that it belongs to.
///
/// # Errors
/// When the file can't be read.
pub fn time_before(file: &impl ReadAt, offset: u64, times: &mut TimeReader, now_ms: i64) -> io::Result<Option<i64>> {
    let lowest = offset.saturating_sub(TIME_SEARCH_BYTES);
    let mut end = offset;
    let mut bytes = Vec::new();
    while end > lowest {
        let from = end.saturating_sub(TIME_SEARCH_PIECE);
        bytes.resize((end - from) as usize, 0);
        let got = read_up_to(file, &mut bytes, from)?;
        let piece = &bytes[..got];
        let mut line_end = piece.len();
        while line_end > 0 {
            let newline = memchr::memrchr(b'\n', &piece[..line_end - 1]);
            let Some(start) = newline.map(|newline| newline + 1).or((from == 0).then_some(0)) else { break };
            match times.read(&piece[start..line_end], now_ms) {
                LineTime::At(ms) => return Ok(Some(ms)),
                LineTime::Implausible => return Ok(Some(now_ms)),
                LineTime::None => {}
            }
            line_end = start;
        }
        // The line that begins before the piece is read with the next one; of a very long one, only its beginning.
        end = if line_end < piece.len() { from + line_end as u64 } else { from };
    }
    Ok(None)
}

/// Whether more than `max_line_bytes` bytes without a newline lie before `offset`: then that line's beginning was
/// stored or dropped, and its rest is stored as nothing. A shorter one was given a newline, and goes on as another
/// record.
fn is_behind_long_line(file: &impl ReadAt, offset: u64, max_line_bytes: u64) -> io::Result<bool> {
    let Some(from) = offset.checked_sub(max_line_bytes + 1) else { return Ok(false) };
    let mut bytes = vec![0; max_line_bytes as usize + 1];
    let got = read_up_to(file, &mut bytes, from)?;
    Ok(got == bytes.len() && memchr::memchr(b'\n', &bytes).is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    impl ReadAt for Vec<u8> {
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
            let rest = self.get(offset as usize..).unwrap_or(&[]);
            let len = rest.len().min(buffer.len());
            buffer[..len].copy_from_slice(&rest[..len]);
            Ok(len)
        }
    }

    const BATCH_BYTES: usize = 4096;

    fn source() -> Source {
        Source {
            category: "app".parse().expect("valid"),
            include: Vec::new(),
            exclude: Vec::new(),
            read_from: crate::config::ReadFrom::Beginning,
            ignore_older: None,
            rotate_wait: Duration::from_secs(5),
            partial_line_timeout: Duration::from_secs(30),
            max_line_bytes: 1024,
            long_lines: LongLines::Split,
            record_prefix: bytes::Bytes::new(),
            timestamp: None,
        }
    }

    fn job(first_line: &[u8], most: u32) -> ReadJob {
        ReadJob {
            generation: 0,
            source: 0,
            from: Position::zero(),
            most,
            first_line: (first_line.len() as u32, TailHash::of(first_line)),
            end: DataEnd::Final,
            carry: Carry::Known(None),
            now_ms: 0,
            bucket: BucketSize::HOUR,
            codec: (Codec::Gzip, 1),
            facts: BatchFacts {
                lane: tributary_common::ids::LaneId(0),
                agent: "web-1".parse().expect("valid"),
                host: String::new(),
                category: "app".parse().expect("valid"),
                stream: StreamId(1),
                base: Position::zero(),
                committed: Position::zero(),
                prefix_len: 0,
            },
        }
    }

    fn read(file: &[u8], job: ReadJob) -> Vec<Done> {
        let options = WorkerOptions { sources: vec![source()], batch_bytes: BATCH_BYTES };
        let mut done = Vec::new();
        let keep = |what| {
            done.push(what);
            true
        };
        assert!(Worker::new(&options).read(&file.to_vec(), job, keep));
        done
    }

    fn lines(bytes: usize) -> Vec<u8> {
        (0..).flat_map(|n| format!("line {n}\n").into_bytes()).take(bytes).collect()
    }

    #[test]
    fn a_file_that_was_replaced_before_anything_was_read_of_it_is_noticed() {
        let job = || job(b"one\n", 1);
        assert!(matches!(read(b"one\ntwo\n", job())[..], [Done::Cut { .. }, Done::Packed { .. }]));
        assert!(matches!(read(b"three\nfour\n", job())[..], [Done::OtherBytes { .. }]));
        assert!(matches!(read(b"on", job())[..], [Done::OtherBytes { .. }]));
    }

    #[test]
    fn batches_of_a_job_follow_one_another() {
        let file = lines(3 * BATCH_BYTES + 100);
        let mut reach = Position::zero();
        let mut left = 3;
        for done in read(&file, job(b"line 0\n", 3)) {
            match done {
                Done::Cut { from, end, more, .. } => {
                    left -= 1;
                    assert_eq!((from, more), (reach, left));
                    reach = end;
                }
                Done::Packed { end, more, batch, .. } => {
                    assert_eq!((end, more), (reach, left));
                    batch.expect("a batch").verify().expect("a good one");
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(left, 0);
        assert_eq!(reach.tail, TailHash::of(&file[..reach.offset as usize]));
        assert!(
            file[..reach.offset as usize].ends_with(b"\n"),
            "an unterminated line is of the first batch, if of any"
        );
    }

    #[test]
    fn a_job_says_how_many_batches_it_has_not_made() {
        // The file is shorter than it was when the job was given.
        let done = read(&lines(BATCH_BYTES + 6), job(b"line 0\n", 4));
        assert!(matches!(done[0], Done::Cut { more: 3, .. }), "{done:?}");
        let made = done.iter().filter(|one| matches!(one, Done::Packed { .. })).count() as u32;
        let Some(Done::Nothing { missing, .. }) = done.last() else { panic!("{done:?}") };
        assert_eq!(made + missing, 4);
        // Another file by now.
        let done = read(b"three\n", job(b"one\n", 4));
        assert!(matches!(done[..], [Done::OtherBytes { missing: 4, .. }]), "{done:?}");
    }

    /// Results that are told, and those that are held back.
    fn outbox() -> (Outbox<impl Fn(TailId, Done) -> bool>, Receiver<Done>) {
        let (sender, told) = channel();
        (Outbox { held: Vec::new(), since: None, done: move |_, done| sender.send(done).is_ok() }, told)
    }

    #[test]
    fn results_wait_for_those_that_follow_but_not_those_that_the_loop_waits_for() {
        let (mut results, told) = outbox();
        let made = || read(&lines(3 * BATCH_BYTES), job(b"line 0\n", 2));
        // As if no time passed.
        let soon = Instant::now() + Duration::from_secs(3600);
        for (n, done) in made().into_iter().enumerate() {
            results.since = Some(soon);
            assert!(results.add(TailId(1), done));
            let expected = if n == 2 { 3 } else { 0 };
            assert_eq!(told.try_iter().count(), expected, "the last one that is cut, with all before it");
        }
        assert!(results.deliver());
        assert_eq!(told.try_iter().count(), 1);
        // Nobody knows how long another job takes.
        let file = Arc::new(tempfile::tempfile().expect("a file"));
        results.since = Some(soon);
        assert!(results.add(TailId(1), made().remove(1)));
        assert!(results.make_way(&Job::Read(Arc::clone(&file), Box::new(job(b"line 0\n", 2)))));
        assert_eq!(told.try_iter().count(), 0);
        assert!(results.make_way(&Job::Head(file)));
        assert_eq!(told.try_iter().count(), 1);
        // However many are to follow, none is held for long.
        results.since = Some(Instant::now() - HOLD);
        assert!(results.add(TailId(1), made().remove(0)));
        assert_eq!(told.try_iter().count(), 1);
        drop(told);
        let nothing = Done::Nothing { generation: 0, size: 0, missing: 1 };
        assert!(!results.add(TailId(1), nothing), "nobody wants it");
    }
}
