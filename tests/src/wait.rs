//! Waiting for a condition, with a limit that only turns a hang into a failure.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow};
use tokio::time::Instant;

const PAUSE: Duration = Duration::from_millis(50);
/// How many tries fit into the limit at least: one that hangs, as a read from a DataNode that is paused, must not be the last.
const TRIES: u32 = 6;

/// Asks `probe` again and again until it gives a value. `Ok(None)` and `Err` both mean "not yet", and so does a sixth of `limit`
/// without an answer.
///
/// # Errors
/// `limit` has passed: the error names `what` and holds the probe's last error.
pub async fn until<T>(
    what: impl fmt::Display,
    limit: Duration,
    mut probe: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let begun = Instant::now();
    let patience = limit / TRIES;
    loop {
        let cause: Error = match tokio::time::timeout(patience, probe()).await {
            Ok(Ok(Some(value))) => return Ok(value),
            Ok(Ok(None)) => anyhow!("it did not come about"),
            Ok(Err(error)) => error,
            Err(_elapsed) => anyhow!("asked, and had no answer for {patience:?}"),
        };
        if begun.elapsed() >= limit {
            return Err(cause).with_context(|| format!("waited {limit:?} for {what}"));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn a_try_that_hangs_is_not_the_last_one() {
        let mut tries = 0;
        let answer = until("an answer", LIMIT, async || {
            tries += 1;
            if tries == 1 {
                std::future::pending::<()>().await;
            }
            Ok(Some(tries))
        });
        assert_eq!(answer.await.expect("the second try answers"), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn what_never_comes_is_an_error_with_the_last_reason() {
        let never = until("rain", LIMIT, async || Err::<Option<()>, _>(anyhow!("no clouds"))).await;
        assert_eq!(format!("{:#}", never.expect_err("it never comes")), "waited 60s for rain: no clouds");
        let hung = until("rain", LIMIT, async || std::future::pending::<Result<Option<()>>>().await).await;
        assert!(format!("{:#}", hung.expect_err("it never comes")).contains("no answer"));
    }
}
