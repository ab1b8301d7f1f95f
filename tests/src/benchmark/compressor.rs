//! The bare compressor, beside which an agent is measured, and the logs that both are given.

use std::fs::File;
use std::io::{BufWriter, Read as _, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use libdeflater::{CompressionLvl, Compressor};
use rustix::time::{ClockId, clock_gettime};

use crate::synthetic::AccessLog;

/// The agent's `batch.max_bytes`, unless it is configured.
pub const BATCH_BYTES: usize = 1 << 20;
/// The agent's `compression.level`, unless it is configured.
pub const LEVEL: i32 = 1;

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
    /// The mean of two runs over the same log.
    #[must_use]
    pub fn mean(self, other: Self) -> Self {
        Self { cpu: (self.cpu + other.cpu) / 2, wall: (self.wall + other.wall) / 2, ..self }
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

/// Compresses a log with the agent's compressor (libdeflate, level 1) out of memory, in pieces as large as the agent's batches.
///
/// # Errors
/// The log can't be read.
pub fn compress(log: &Path) -> Result<Bare> {
    const CHUNK: u64 = 64 << 20;
    let level = CompressionLvl::new(LEVEL).map_err(|error| anyhow!("level {LEVEL}: {error:?}"))?;
    let mut compressor = Compressor::new(level);
    let mut compressed = vec![0; compressor.gzip_compress_bound(BATCH_BYTES)];
    let mut bare = Bare::default();
    let input = File::open(log).with_context(|| format!("opening {}", log.display()))?;
    let mut chunk = Vec::new();
    loop {
        chunk.clear();
        if (&input).take(CHUNK).read_to_end(&mut chunk)? == 0 {
            return Ok(bare);
        }
        let (cpu, begun) = (thread_cpu(), Instant::now());
        for piece in chunk.chunks(BATCH_BYTES) {
            let length = compressor.gzip_compress(piece, &mut compressed);
            bare.compressed += length.map_err(|error| anyhow!("compressing: {error}"))? as u64;
        }
        bare.cpu += thread_cpu() - cpu;
        bare.wall += begun.elapsed();
        bare.raw += chunk.len() as u64;
    }
}

/// The time that this thread has had on a processor.
#[must_use]
pub fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}
