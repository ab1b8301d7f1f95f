//! A program that writes a log, as a thread: at a stated rate, rotating by rename, and keeping a copy of every line.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};

use crate::synthetic::AccessLog;
use crate::wait::until;

/// How often a writer writes what has become due.
const TICK: Duration = Duration::from_millis(10);
/// Only turns a hang into a failure.
const LIMIT: Duration = Duration::from_secs(60);

/// What is written, where, and how fast.
#[derive(Clone, Debug)]
pub struct WriterOptions {
    /// The log. It is appended to, as by any program that keeps its log open.
    pub log: PathBuf,
    /// The copy of all lines, which no agent may be told to read.
    pub copy: PathBuf,
    /// How many lines a second.
    pub per_second: u32,
    /// After how many lines the log is renamed to `LOG.1` (and `LOG.1` before that to `LOG.2`, and so on) and begun anew.
    /// `None`: never.
    pub rotate_every: Option<u64>,
    /// The number of the first line: two writers whose lines are compared together must not have the same numbers.
    pub first_serial: u64,
}

impl WriterOptions {
    /// Writes `log` in `folder`, and its copy beside that folder; 1000 lines a second, not rotated.
    #[must_use]
    pub fn new(log: impl Into<PathBuf>, copy: impl Into<PathBuf>) -> Self {
        Self { log: log.into(), copy: copy.into(), per_second: 1000, rotate_every: None, first_serial: 0 }
    }
}

/// A running writer. Dropping it stops it.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    copy: PathBuf,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    written: AtomicU64,
    bytes: AtomicU64,
    rotations: AtomicU64,
    stop: AtomicBool,
    pause: AtomicBool,
    paused: AtomicBool,
}

impl Writer {
    /// Begins to write.
    ///
    /// # Errors
    /// A file can't be opened.
    pub fn start(options: WriterOptions) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let copy = File::create(&options.copy).with_context(|| format!("making {}", options.copy.display()))?;
        let log = open_log(&options.log)?;
        let state = Arc::clone(&shared);
        let path = options.copy.clone();
        let thread = thread::spawn(move || write(&options, log, copy, &state));
        Ok(Self { shared, copy: path, thread: Some(thread) })
    }

    /// How many lines have been written.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.shared.written.load(Ordering::SeqCst)
    }

    /// How many bytes have been written.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::SeqCst)
    }

    /// How many times the log has been rotated.
    #[must_use]
    pub fn rotations(&self) -> u64 {
        self.shared.rotations.load(Ordering::SeqCst)
    }

    /// The copy of all lines.
    #[must_use]
    pub fn copy(&self) -> &Path {
        &self.copy
    }

    /// Waits until so many lines are written, from the first one on.
    ///
    /// # Errors
    /// The writer has failed.
    pub async fn wait_for(&self, lines: u64) -> Result<()> {
        until(format!("{lines} lines to be written"), LIMIT, async || Ok((self.written() >= lines).then_some(()))).await
    }

    /// Waits until so many more lines are written.
    ///
    /// # Errors
    /// As of [`Self::wait_for`].
    pub async fn wait_for_more(&self, lines: u64) -> Result<()> {
        self.wait_for(self.written() + lines).await
    }

    /// Writes nothing until [`Self::resume`]; returns when the last line is complete.
    ///
    /// # Errors
    /// The writer has failed.
    pub async fn pause(&self) -> Result<()> {
        self.shared.pause.store(true, Ordering::SeqCst);
        until("the writer to pause", LIMIT, async || Ok(self.shared.paused.load(Ordering::SeqCst).then_some(()))).await
    }

    /// Goes on writing.
    pub fn resume(&self) {
        self.shared.pause.store(false, Ordering::SeqCst);
    }

    /// Stops; returns how many lines were written.
    ///
    /// # Errors
    /// A line couldn't be written.
    pub fn stop(mut self) -> Result<u64> {
        self.end()?;
        Ok(self.written())
    }

    fn end(&mut self) -> Result<()> {
        self.shared.stop.store(true, Ordering::SeqCst);
        match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| anyhow!("the writer has panicked"))?,
            None => Ok(()),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Whoever needs to know whether all was written calls `stop`.
        let _ = self.end();
    }
}

fn open_log(path: &Path) -> Result<File> {
    OpenOptions::new().append(true).create(true).open(path).with_context(|| format!("opening {}", path.display()))
}

/// Renames the log as logrotate does: the highest number first.
fn rotate(log: &Path) -> Result<()> {
    let name = |number: u64| PathBuf::from(format!("{}.{number}", log.display()));
    let mut count = 0;
    while name(count + 1).exists() {
        count += 1;
    }
    for number in (1..=count).rev() {
        fs::rename(name(number), name(number + 1)).with_context(|| format!("renaming {}", name(number).display()))?;
    }
    fs::rename(log, name(1)).with_context(|| format!("renaming {}", log.display()))
}

fn write(options: &WriterOptions, mut log: File, mut copy: File, shared: &Shared) -> Result<()> {
    let (mut lines, mut text) = (AccessLog::default(), Vec::new());
    let mut begun = Instant::now();
    let mut owed_from = 0;
    loop {
        if shared.pause.load(Ordering::SeqCst) {
            shared.paused.store(true, Ordering::SeqCst);
            while shared.pause.load(Ordering::SeqCst) && !shared.stop.load(Ordering::SeqCst) {
                thread::sleep(TICK);
            }
            shared.paused.store(false, Ordering::SeqCst);
            begun = Instant::now();
            owed_from = shared.written.load(Ordering::SeqCst);
        }
        if shared.stop.load(Ordering::SeqCst) {
            return Ok(());
        }
        let written = shared.written.load(Ordering::SeqCst);
        let due = owed_from + (begun.elapsed().as_secs_f64() * f64::from(options.per_second)) as u64;
        // A batch that crosses a rotation ends at it.
        let until_rotation = options.rotate_every.map_or(u64::MAX, |every| every - written % every);
        let count = due.saturating_sub(written).min(until_rotation);
        let second = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
        text.clear();
        (written..written + count).for_each(|n| lines.line(options.first_serial + n, second, &mut text));
        copy.write_all(&text).context("writing the copy")?;
        log.write_all(&text).context("writing the log")?;
        shared.bytes.fetch_add(text.len() as u64, Ordering::SeqCst);
        shared.written.store(written + count, Ordering::SeqCst);
        if count == until_rotation {
            rotate(&options.log)?;
            log = open_log(&options.log)?;
            shared.rotations.fetch_add(1, Ordering::SeqCst);
        }
        thread::sleep(TICK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lines::Lines;

    #[tokio::test]
    async fn rotated_files_and_the_log_hold_what_the_copy_holds() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let logs = folder.path().join("logs");
        fs::create_dir(&logs)?;
        let options = WriterOptions {
            per_second: 20_000,
            rotate_every: Some(1500),
            first_serial: 7,
            ..WriterOptions::new(logs.join("a.log"), folder.path().join("copy"))
        };
        let writer = Writer::start(options)?;
        writer.wait_for(4000).await?;
        writer.pause().await?;
        let paused_at = writer.written();
        let lines = Lines::of_files([writer.copy().to_owned()])?;
        assert_eq!(lines.len() as u64, paused_at);
        writer.resume();
        writer.wait_for_more(2000).await?;
        assert!(writer.rotations() >= 3);
        let copy = writer.copy().to_owned();
        let written = writer.stop()?;
        let files = fs::read_dir(&logs)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        assert!(files.contains(&logs.join("a.log.3")), "{files:?}");
        let (expected, found) = (Lines::of_files([copy])?, Lines::of_files(files)?);
        assert_eq!(expected.len() as u64, written);
        let difference = expected.difference(&found)?;
        assert!(difference.is_none(), "{difference}");
        Ok(())
    }
}
