//! What comes again, and isn't what is there.

use tributary_common::frame::records_of;
use tributary_common::ranges::RangeSet;

use super::*;
use crate::root::ingest::{Decision, Ingest, SlicePlan};

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

/// What [`Ingest`] decides about a batch once it has seen what it asks for.
fn decide(ingest: &mut Ingest, batch: &Received) -> Decision {
    let header = &batch.batch.header;
    let mut decision = ingest.decide(header, &batch.frames, 0);
    let bodies: Vec<_> = batch
        .frames
        .iter()
        .zip(batch.batch.frames())
        .map(|(frame, bytes)| frame.decode(&bytes).expect("good"))
        .collect();
    let pieces: Vec<(u64, &[u8])> = (batch.frames.iter().zip(&bodies))
        .flat_map(|(frame, body)| records_of(&frame.slices[0], body).expect("not altered"))
        .map(|record| (record.range.start, record.bytes))
        .collect();
    if let Decision::NeedsTail { at } = decision {
        let own = ingest.own_tail(header, Some(pieces.clone()), at);
        decision = ingest.decide_crossing(header, &batch.frames, own, 0);
    }
    if let Decision::NeedsTails { at } = decision {
        let own: Vec<_> = at.iter().map(|&at| (at, ingest.own_tail(header, Some(pieces.clone()), at))).collect();
        decision = ingest.decide_overlapping(header, &batch.frames, own);
    }
    decision
}

#[test]
fn what_survived_of_a_batch_counts_only_for_a_file_that_still_has_its_bytes() {
    // Three minutes of 20 lines, and a file that has others from the line 25 on.
    for (batch_len, other_from) in [(10, 25), (40, 25), (40, 39)] {
        let log = Log::new(1, 600, 0, 3_000);
        let mut other = Log::new(1, 600, 0, 3_000);
        let from = other.line_start(other_from) as usize;
        for byte in other.text[from..].iter_mut().filter(|byte| **byte != b'\n') {
            *byte = b'y';
        }
        for settled in [false, true] {
            let mut ingest = Ingest::new(i64::MAX);
            let first = log.batch(0, 15);
            ingest.found(&category(), &first.frames[0].slices[0], true, 0);
            // Of the batch that followed, only what belongs to a later minute.
            let torn = log.batch(15, 15 + batch_len);
            let survived = torn.frames.iter().filter(|frame| frame.bucket != torn.frames[0].bucket);
            let mut ranges = Vec::new();
            for frame in survived {
                ingest.found(&category(), &frame.slices[0], settled, 0);
                ranges.extend(frame.slices[0].runs.iter().map(Run::range));
            }
            assert_eq!(ingest.positions(log.stream).expect("known").next, log.position(log.line_start(15)));

            // The same file: cut as before, or elsewhere, only what is missing is written.
            for to in [15 + batch_len, 100] {
                let Decision::Take(plans) = decide(&mut ingest, &log.batch(15, to)) else { panic!("it is the same") };
                assert_eq!(plans[0], SlicePlan::Whole);
                assert!(!plans[1..].iter().take(1).any(|plan| *plan == SlicePlan::Whole), "{plans:?}");
            }
            // A batch that ends within the one of which only parts are there can't show that they are of its bytes. That one may
            // still come, for a while.
            let within = log.batch(15, 15 + batch_len - 1);
            ingest.recovered(0);
            assert!(matches!(decide(&mut ingest, &within), Decision::Answer(Verdict::Wait { .. })));
            assert!(matches!(decide(&mut ingest, &torn), Decision::Take(_)));
            ingest.recovered(i64::MIN);
            assert!(matches!(decide(&mut ingest, &within), Decision::Take(_)));
            // The other one.
            if 15 + batch_len <= other_from {
                continue;
            }
            for (start, to) in [(15, 100), (0, 100)] {
                let batch = other.batch(start, to);
                match decide(&mut ingest, &batch) {
                    Decision::Answer(Verdict::Wait { .. }) if !settled => {}
                    Decision::Displace(there) if settled => {
                        let all = RangeSet::from_iter(ranges.iter().cloned());
                        assert!(there.iter().all(|range| all.contains(range.clone())), "{there:?}");
                    }
                    decision => panic!("{decision:?}"),
                }
            }
            if settled {
                let batch = other.batch(15, 100);
                let Decision::Take(plans) = ingest.displace(&batch.batch.header, &batch.frames) else {
                    panic!("it is taken")
                };
                assert!(plans.iter().all(|plan| *plan == SlicePlan::Whole), "{plans:?}");
            }
        }
    }
}
