//! The simulated servers: each appends to a log on its own disk, a new file every hour, until its machine is lost.
//!
//! All methods ship the same files. A line counts as written when it is on the server's disk.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};

use super::HOUR;
use super::plan::Plan;
use crate::synthetic::AccessLog;

/// How often a server writes what has become due.
const TICK: Duration = Duration::from_millis(100);
/// Between the first serials of two servers.
const SERIALS: u64 = 1_000_000_000;

/// An hour of the run: which minute since 1970 stands for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hour(pub i64);

impl Hour {
    /// The one that is now.
    #[must_use]
    pub fn now() -> Self {
        Self::of(now())
    }

    fn of(since_1970: Duration) -> Self {
        Self((since_1970.as_secs() / HOUR.as_secs()) as i64)
    }

    /// The one after it.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// How long it is until this hour begins; zero when it has begun.
    #[must_use]
    pub fn begins_in(self) -> Duration {
        (HOUR * self.0 as u32).saturating_sub(now())
    }

    /// `dt=YYYY-MM-DD/hm=HHMM`, as the partitions of all methods are named.
    #[must_use]
    pub fn folder(self) -> String {
        self.format("dt=%Y-%m-%d/hm=%H%M")
    }

    fn file_name(self) -> String {
        self.format("access.log.%Y%m%dT%H%M")
    }

    fn format(self, format: &str) -> String {
        let begin = jiff::Timestamp::from_second(self.0 * HOUR.as_secs() as i64).unwrap_or_default();
        begin.strftime(format).to_string()
    }
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// What became of a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Server {
    /// Lines that it wrote.
    pub lines: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Whether its machine was lost.
    pub lost: bool,
}

#[derive(Debug)]
struct Shared {
    folders: Vec<PathBuf>,
    states: Vec<Mutex<Server>>,
    /// The hour that is being written: those before it don't grow any more.
    writing: AtomicI64,
    first: Hour,
    end: Hour,
    stop: AtomicBool,
}

/// The servers. Dropping the value stops the writing.
#[derive(Debug)]
pub struct Servers {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<Result<()>>>,
}

impl Servers {
    /// Servers with their logs in `folders`, which write from the hour `first` on.
    #[must_use]
    pub fn start(folders: Vec<PathBuf>, plan: &Plan, first: Hour, hours: u32) -> Self {
        let shared = Arc::new(Shared {
            states: folders.iter().map(|_| Mutex::default()).collect(),
            folders,
            writing: AtomicI64::new(first.0),
            first,
            end: Hour(first.0 + i64::from(hours)),
            stop: AtomicBool::new(false),
        });
        let (state, rates) = (Arc::clone(&shared), plan.rates.clone());
        let writer = Some(thread::spawn(move || write(&state, &rates)));
        Self { shared, writer }
    }

    /// A look at the log of a server, from its beginning.
    #[must_use]
    pub fn tail(&self, server: usize) -> Tail {
        let at = Position { hour: self.shared.first, offset: 0 };
        Tail { shared: Arc::clone(&self.shared), server, at, file: None }
    }

    /// Nothing more is written: the first thing that happens when a machine is lost.
    pub fn stop(&self, server: usize) {
        lock(&self.shared.states[server]).lost = true;
    }

    /// Its disk is gone: the last thing, after the ends of all who could still read it.
    ///
    /// # Errors
    /// The disk's folder can't be deleted.
    pub fn destroy_disk(&self, server: usize) -> Result<()> {
        let folder = &self.shared.folders[server];
        fs::remove_dir_all(folder).with_context(|| format!("deleting {}", folder.display()))
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.shared.states.len()
    }

    /// Waits for the end of the last hour.
    ///
    /// # Errors
    /// A line couldn't be written.
    pub fn finish(mut self) -> Result<Vec<Server>> {
        if let Some(writer) = self.writer.take() {
            writer.join().map_err(|_| anyhow!("the writer of the logs has panicked"))??;
        }
        Ok(self.shared.states.iter().map(|state| *lock(state)).collect())
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
    }
}

fn lock(state: &Mutex<Server>) -> std::sync::MutexGuard<'_, Server> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The server and the number of a line, counted from 0, by its serial.
#[must_use]
pub fn server_and_number(serial: u64) -> (usize, u64) {
    ((serial / SERIALS) as usize, serial % SERIALS)
}

fn write(shared: &Shared, rates: &[Vec<f64>]) -> Result<()> {
    let mut files: HashMap<usize, (Hour, File)> = HashMap::new();
    let mut due = vec![0.0; rates.len()];
    let (mut log, mut text) = (AccessLog::default(), Vec::new());
    thread::sleep(shared.first.begins_in());
    let mut before = Instant::now();
    while !shared.stop.load(Ordering::SeqCst) {
        let (moment, passed) = (now(), before.elapsed());
        before += passed;
        let hour = Hour::of(moment);
        shared.writing.store(hour.0, Ordering::SeqCst);
        if hour >= shared.end {
            break;
        }
        for (server, rates) in rates.iter().enumerate() {
            due[server] += rates[(hour.0 - shared.first.0) as usize] * passed.as_secs_f64();
            let count = due[server] as u64;
            due[server] -= count as f64;
            // Held while writing: what is counted is on the disk, and after `stop` nothing is written.
            let mut state = lock(&shared.states[server]);
            if state.lost || count == 0 {
                continue;
            }
            text.clear();
            let first = server as u64 * SERIALS + state.lines;
            (first..first + count).for_each(|serial| log.line(serial, moment.as_secs() as i64, &mut text));
            if files.get(&server).is_none_or(|(of, _)| *of != hour) {
                let path = shared.folders[server].join(hour.file_name());
                let opened = OpenOptions::new().create(true).append(true).open(&path);
                files.insert(server, (hour, opened.with_context(|| format!("opening {}", path.display()))?));
            }
            if let Some((_, file)) = files.get_mut(&server) {
                file.write_all(&text).with_context(|| format!("writing the log of server {server}"))?;
            }
            state.lines += count;
            state.bytes += text.len() as u64;
        }
        thread::sleep(TICK.saturating_sub(before.elapsed()));
    }
    Ok(())
}

/// A place in a server's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The file.
    pub hour: Hour,
    /// The byte in it.
    pub offset: u64,
}

/// What a look at a log finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Whole lines of an hour.
    Lines(Hour, Vec<u8>),
    /// All of this hour was seen, and no more of it will come.
    HourOver(Hour),
    /// Nothing new.
    Nothing,
    /// All hours are over.
    End,
}

/// Reads a server's log as it grows.
#[derive(Debug)]
pub struct Tail {
    shared: Arc<Shared>,
    server: usize,
    at: Position,
    file: Option<File>,
}

impl Tail {
    /// Where it stands: before what it has not seen.
    #[must_use]
    pub fn position(&self) -> Position {
        self.at
    }

    /// Goes back to where it stood.
    pub fn go_to(&mut self, position: Position) {
        self.at = position;
        self.file = None;
    }

    /// The file of an hour.
    #[must_use]
    pub fn path(&self, hour: Hour) -> PathBuf {
        Path::new(&self.shared.folders[self.server]).join(hour.file_name())
    }

    /// Whether an hour's file is complete.
    #[must_use]
    pub fn is_over(&self, hour: Hour) -> bool {
        self.shared.writing.load(Ordering::SeqCst) > hour.0
    }

    /// Looks for up to so many bytes.
    ///
    /// # Errors
    /// The disk is gone.
    pub fn look(&mut self, most: usize) -> Result<Seen> {
        if self.at.hour >= self.shared.end {
            return Ok(Seen::End);
        }
        // Asked before the file is read: what is read then is all.
        let over = self.is_over(self.at.hour);
        let mut bytes = vec![0; most];
        let (mut len, offset) = (0, self.at.offset);
        if let Some(file) = self.open()? {
            while len < most {
                match file.read_at(&mut bytes[len..], offset + len as u64)? {
                    0 => break,
                    read => len += read,
                }
            }
        }
        bytes.truncate(len);
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        bytes.truncate(whole);
        if whole > 0 {
            self.at.offset += whole as u64;
            return Ok(Seen::Lines(self.at.hour, bytes));
        }
        if !over {
            return Ok(Seen::Nothing);
        }
        let hour = self.at.hour;
        self.go_to(Position { hour: hour.next(), offset: 0 });
        Ok(Seen::HourOver(hour))
    }

    fn open(&mut self) -> Result<Option<&File>> {
        if self.file.is_none() {
            let path = self.path(self.at.hour);
            match File::open(&path) {
                Ok(file) => self.file = Some(file),
                // An hour in which the server has written nothing has no file.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error).with_context(|| format!("opening {}", path.display())),
            }
        }
        Ok(self.file.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_read_by_whole_lines_and_an_hour_is_over_when_the_next_one_is_written() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (first, second) = (Hour(100), Hour(101));
        let shared = Arc::new(Shared {
            folders: vec![folder.path().to_owned()],
            states: vec![Mutex::default()],
            writing: AtomicI64::new(first.0),
            first,
            end: Hour(102),
            stop: AtomicBool::new(false),
        });
        let servers = Servers { shared: Arc::clone(&shared), writer: None };
        let mut tail = servers.tail(0);
        assert_eq!(tail.look(100)?, Seen::Nothing, "the server has written nothing yet");
        let log = tail.path(first);
        fs::write(&log, "one\ntwo\nthr")?;
        assert_eq!(tail.look(6)?, Seen::Lines(first, b"one\n".into()));
        let before = tail.position();
        assert_eq!(tail.look(100)?, Seen::Lines(first, b"two\n".into()));
        assert_eq!(tail.look(100)?, Seen::Nothing, "the line is not whole");
        tail.go_to(before);
        fs::write(&log, "one\ntwo\nthree\n")?;
        shared.writing.store(second.0, Ordering::SeqCst);
        assert_eq!(tail.look(100)?, Seen::Lines(first, b"two\nthree\n".into()));
        assert_eq!(tail.look(100)?, Seen::HourOver(first));
        assert_eq!(tail.look(100)?, Seen::Nothing);
        shared.writing.store(102, Ordering::SeqCst);
        assert_eq!(tail.look(100)?, Seen::HourOver(second), "an hour without lines has no file");
        assert_eq!(tail.look(100)?, Seen::End);
        Ok(())
    }

    #[test]
    fn a_server_that_is_lost_writes_no_more() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let disks: Vec<PathBuf> = ["0", "1"].iter().map(|name| folder.path().join(name)).collect();
        disks.iter().try_for_each(fs::create_dir)?;
        let first = Hour::now();
        let plan = Plan { rates: vec![vec![2000.0; 2]; 2], lost_servers: Vec::new(), node_killed: HOUR, node: 0 };
        let servers = Servers::start(disks.clone(), &plan, first, 2);
        let lines = |server: usize| lock(&servers.shared.states[server]).lines;
        while lines(0) == 0 {
            thread::yield_now();
        }
        servers.stop(0);
        let (lost, before) = (lines(0), lines(1));
        servers.destroy_disk(0)?;
        while lines(1) <= before {
            thread::yield_now();
        }
        assert_eq!(lines(0), lost);
        assert!(!disks[0].exists(), "its disk came back");
        assert_eq!(server_and_number(SERIALS + 7), (1, 7));
        Ok(())
    }
}
