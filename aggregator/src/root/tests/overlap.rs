//! What comes again, and isn't what is there.

use super::*;

/// Two files that have their first 20 lines in common, as one that was restored from a copy and written on.
fn restored() -> (Log, Log) {
    let log = Log::new(1, 60, 0, 1);
    let mut other = Log::new(1, 60, 0, 1);
    let from = other.line_start(20) as usize;
    for byte in other.text[from..].iter_mut().filter(|byte| **byte != b'\n') {
        *byte = b'y';
    }
    (log, other)
}

async fn is_diverged(root: &Harness, batch: impl Fn() -> Received) {
    until(async || match root.offer(batch()).await.verdict {
        Verdict::Wait { .. } => false,
        Verdict::Diverged { .. } => true,
        other => panic!("{other:?}"),
    })
    .await;
}

#[tokio::test]
async fn other_bytes_in_a_short_batch_are_diverged_though_both_begin_at_the_same_place() {
    for recompress_below in [0, 1 << 20] {
        let dir = tempdir();
        let mut root = Harness::start(dir.path(), settings(recompress_below));
        let (log, other) = restored();
        for (from, to) in [(0, 20), (20, 21), (21, 23)] {
            assert_eq!(root.offer(log.batch(from, to)).await.verdict, Verdict::Ok);
        }
        is_diverged(&root, || other.batch(20, 40)).await;
        // The next owner finds what it needs for this in the files, or in the ledger.
        for _ in 0..2 {
            root = root.restart().await;
            is_diverged(&root, || other.batch(20, 40)).await;
        }
        // What is the same is no contradiction, also when it was cut elsewhere.
        for (from, to) in [(20, 21), (21, 40), (20, 60)] {
            assert_eq!(root.offer(log.batch(from, to)).await.verdict, Verdict::Ok);
        }
        until(async || root.lines().len() >= 60).await;
        assert_eq!(root.lines(), sorted(&[&log]));
    }
}
