//! The bare compressor, beside which an agent is measured, and the logs that both are given.

use std::fs::File;
use std::io::{BufWriter, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use libdeflater::{CompressionLvl, Compressor};
use rustix::time::{ClockId, clock_gettime};

use crate::synthetic::AccessLog;

/// The agent's `batch.max_bytes`, unless it is configured.
pub const BATCH_BYTES: usize = 1 << 20;
/// The agent's `compression.level`, unless it is configured.
pub const LEVEL: i32 = 1;

/// Bytes of a log that are read into memory at a time.
pub const CHUNK: u64 = 128 << 20;

/// What the compressor alone used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bare {
    /// Bytes that it was given.
    pub raw: u64,
    /// Bytes that it made of them.
    pub compressed: u64,
    /// Its thread's time on a processor.
    pub cpu: Duration,
    /// The time that passed.
    pub wall: Duration,
}

impl Bare {
    /// Two runs taken together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            raw: self.raw + other.raw,
            compressed: self.compressed + other.compressed,
            cpu: self.cpu + other.cpu,
            wall: self.wall + other.wall,
        }
    }

    /// CPU seconds per byte.
    #[must_use]
    pub fn cpu_per_byte(&self) -> f64 {
        self.cpu.as_secs_f64() / self.raw as f64
    }

    /// A CPU time for `raw` bytes, in that of the compressor for as many.
    #[must_use]
    pub fn in_its_cpu(&self, cpu: Duration, raw: u64) -> f64 {
        cpu.as_secs_f64() / raw as f64 / self.cpu_per_byte()
    }

    /// A time that passed for `raw` bytes, in that of the compressor for as many.
    #[must_use]
    pub fn in_its_time(&self, time: Duration, raw: u64) -> f64 {
        time.as_secs_f64() / raw as f64 / (self.wall.as_secs_f64() / self.raw as f64)
    }
}

/// Writes a log of at least `size` bytes, all of the present hour; returns its number of lines.
///
/// # Errors
/// It can't be written.
pub fn write_log(path: &Path, size: u64) -> Result<u64> {
    let file = File::create(path).with_context(|| format!("making {}", path.display()))?;
    let mut output = BufWriter::with_capacity(1 << 20, file);
    let now = jiff::Timestamp::now().as_second();
    let (mut log, mut line) = (AccessLog::default(), Vec::new());
    let (mut lines, mut written) = (0_u64, 0_u64);
    while written < size {
        // From the hour's beginning until now, as a log of this hour would be.
        let second = now - now % 3600 + (now % 3600) * (written >> 10) as i64 / (size >> 10).max(1) as i64;
        line.clear();
        log.line(lines, second, &mut line);
        output.write_all(&line)?;
        lines += 1;
        written += line.len() as u64;
    }
    // Or the kernel would write it out while others are measured.
    output.into_inner().map_err(|error| anyhow!("writing {}: {error}", path.display()))?.sync_all()?;
    Ok(lines)
}

/// The agent's compressor (libdeflate, level 1), and a log that it is given.
pub struct Compressing {
    log: PathBuf,
    input: File,
    compressor: Compressor,
    chunk: Vec<u8>,
    compressed: Vec<u8>,
}

impl Compressing {
    /// Begins at the beginning of the log.
    ///
    /// # Errors
    /// It can't be opened.
    pub fn open(log: &Path) -> Result<Self> {
        let level = CompressionLvl::new(LEVEL).map_err(|error| anyhow!("level {LEVEL}: {error:?}"))?;
        let mut compressor = Compressor::new(level);
        let compressed = vec![0; compressor.gzip_compress_bound(BATCH_BYTES)];
        let input = File::open(log).with_context(|| format!("opening {}", log.display()))?;
        Ok(Self { log: log.into(), input, compressor, chunk: Vec::new(), compressed })
    }

    /// Compresses the log's next `bytes` bytes, or those up to its end, out of memory, in pieces as large as the agent's batches.
    ///
    /// # Errors
    /// The log can't be read.
    pub fn next(&mut self, bytes: u64) -> Result<Bare> {
        self.chunk.clear();
        let input = (&self.input).take(bytes);
        { input }.read_to_end(&mut self.chunk).with_context(|| format!("reading {}", self.log.display()))?;
        let (mut bare, cpu, begun) = (Bare::default(), thread_cpu(), Instant::now());
        for piece in self.chunk.chunks(BATCH_BYTES) {
            let length = self.compressor.gzip_compress(piece, &mut self.compressed);
            bare.compressed += length.map_err(|error| anyhow!("compressing: {error}"))? as u64;
            bare.raw += piece.len() as u64;
        }
        Ok(Bare { cpu: thread_cpu() - cpu, wall: begun.elapsed(), ..bare })
    }
}

/// The time that this thread has had on a processor.
#[must_use]
pub fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}
