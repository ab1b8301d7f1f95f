//! What a process has used so far, as the kernel counts it.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

/// What a process has used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Time on a processor, of all its threads, in user space and in the kernel. Counted in ticks of 10 ms.
    pub cpu: Duration,
    /// The most memory that it had at a time (`VmHWM`: resident, with the mapped files).
    pub peak_bytes: u64,
}

impl Usage {
    /// Of the process `pid`, which must run.
    ///
    /// # Errors
    /// There is no such process.
    pub fn of(pid: u32) -> Result<Self> {
        let read = |name: &str| {
            let path = format!("/proc/{pid}/{name}");
            fs::read_to_string(&path).with_context(|| format!("reading {path}"))
        };
        let (stat, status) = (read("stat")?, read("status")?);
        let parsed = cpu_ticks(&stat).zip(peak_kib(&status));
        let (ticks, kib) = parsed.with_context(|| format!("/proc/{pid} has another form than that of proc(5)"))?;
        let per_second = rustix::param::clock_ticks_per_second();
        Ok(Self { cpu: Duration::from_secs_f64(ticks as f64 / per_second as f64), peak_bytes: kib * 1024 })
    }
}

/// The fields `utime` and `stime` of proc(5). The name before them, in parentheses, may hold anything.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

fn peak_kib(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    use super::*;

    #[test]
    fn a_process_that_works_uses_more() -> Result<()> {
        let own = std::process::id();
        let before = Usage::of(own)?;
        let memory = vec![1_u8; 64 << 20];
        // Or the compiler sees that neither memory nor work is needed.
        while Usage::of(own)?.cpu < before.cpu + Duration::from_millis(50) {
            black_box(black_box(&memory).iter().map(|byte| u64::from(*byte)).sum::<u64>());
        }
        let peak = Usage::of(own)?.peak_bytes;
        assert!(peak >= 64 << 20, "{peak} bytes");
        Ok(())
    }

    #[test]
    fn a_name_may_look_like_fields() {
        let stat = "7 (a) R 1 2) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 1 0 5 6 7";
        assert_eq!(cpu_ticks(stat), Some(300));
    }
}
