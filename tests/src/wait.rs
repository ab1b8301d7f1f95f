//! Waiting for a condition, with a limit that only turns a hang into a failure.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow};

const PAUSE: Duration = Duration::from_millis(50);

/// Asks `probe` again and again until it gives a value. `Ok(None)` and `Err` both mean "not yet".
///
/// # Errors
/// `limit` has passed: the error names `what` and holds the probe's last error.
pub async fn until<T>(
    what: impl fmt::Display,
    limit: Duration,
    mut probe: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let begun = Instant::now();
    let mut last: Option<Error> = None;
    loop {
        let left = limit.saturating_sub(begun.elapsed());
        match tokio::time::timeout(left, probe()).await {
            Ok(Ok(Some(value))) => return Ok(value),
            Ok(Ok(None)) => last = None,
            Ok(Err(error)) => last = Some(error),
            Err(_elapsed) => {}
        }
        if begun.elapsed() >= limit {
            let cause = last.unwrap_or_else(|| anyhow!("it did not come about"));
            return Err(cause).with_context(|| format!("waited {limit:?} for {what}"));
        }
        tokio::time::sleep(PAUSE).await;
    }
}
