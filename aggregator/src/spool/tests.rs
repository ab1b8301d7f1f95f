use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::disk::BLOCK_BYTES;
use crate::testing::{Faults, HostileFolder, at, batch, content};

const S: StreamId = StreamId(7);
const OTHER: StreamId = StreamId(8);

struct Disk {
    spool: HostileFolder,
    set_aside: HostileFolder,
}

impl Disk {
    fn new() -> Self {
        Self { spool: HostileFolder::default(), set_aside: HostileFolder::default() }
    }

    fn open_with(&self, limits: SpoolLimits) -> (Spool, Recovery) {
        let set_aside =
            SetAside::open(self.set_aside.folder(), 1 << 30, crate::surroundings::WallClock::system()).expect("opens");
        Spool::open(self.spool.folder(), &set_aside, limits).expect("opens")
    }

    fn open(&self) -> (Spool, Recovery) {
        self.open_with(SpoolLimits { max_bytes: 1 << 30, segment_bytes: 1 << 20 })
    }
}

/// Offers batches in one group.
fn offer(spool: &mut Spool, batches: &[Batch]) -> (Vec<Offer>, Result<(), GroupError>) {
    let mut group = spool.plan();
    let offers = batches.iter().map(|batch| spool.offer(&mut group, &mut batch.clone())).collect();
    let written = group.write();
    (offers, spool.conclude(written))
}

fn take(spool: &mut Spool, batches: &[Batch]) {
    let (offers, result) = offer(spool, batches);
    assert!(offers.iter().all(|offer| *offer == Offer::Take), "{offers:?}");
    result.expect("is written");
}

/// Where the last record of the only file ends, which has batches only.
fn end_of_records(spool: &Spool) -> usize {
    let last = spool.streams().flat_map(|(_, stream)| stream.run.entries().map(|entry| entry.place)).max();
    last.map(|place| place.offset as usize + place.len as usize).expect("there is a batch")
}

fn next(spool: &Spool, stream: StreamId) -> Option<u64> {
    spool.stream(stream).map(|stream| stream.run.next().offset)
}

/// Reads back every entry and compares it with what the stream has there.
fn read_all(spool: &Spool) -> u64 {
    let mut read = 0;
    for (id, stream) in spool.streams() {
        assert_eq!(stream.run.broken_invariant(), None);
        for entry in stream.run.entries() {
            let piece = spool.piece(entry.place).expect("what is needed is there");
            let back = read_batch(&*piece.file, entry.place).expect("reads back");
            assert_eq!((back.header.stream, back.header.start, back.header.end), (id, entry.start, entry.end));
            let frames = back.verify().expect("verifies");
            let raw = frames[0].decode(&back.body).expect("decodes");
            assert_eq!(raw, content(id, entry.start.offset, entry.end.offset));
            read += 1;
        }
    }
    read
}

#[test]
fn what_was_taken_is_there_after_a_restart() {
    let disk = Disk::new();
    let (mut spool, _) = disk.open();
    take(&mut spool, &[batch(S, 0, 100, 0), batch(S, 100, 200, 0), batch(OTHER, 0, 50, 0)]);
    take(&mut spool, &[batch(S, 200, 300, 0)]);
    disk.spool.lose_power(1);
    let (spool, recovery) = disk.open();
    assert_eq!((next(&spool, S), next(&spool, OTHER)), (Some(300), Some(50)));
    assert_eq!((recovery.entries, read_all(&spool)), (4, 4));
}

#[test]
fn a_file_goes_when_none_of_its_entries_is_needed_and_runs_still_begin_right() {
    let disk = Disk::new();
    let limits = SpoolLimits { max_bytes: 1 << 30, segment_bytes: 1 };
    let (mut spool, _) = disk.open_with(limits);
    for start in 0..4 {
        take(&mut spool, &[batch(S, start * 100, start * 100 + 100, 0)]);
    }
    assert_eq!(disk.spool.names().len(), 4, "one file for each group");
    spool.commit(S, at(S, 200), None);
    assert!(spool.has_garbage());
    let (_, result) = offer(&mut spool, &[]);
    result.expect("is written");
    assert_eq!(spool.segments(), 3, "two that are needed, and the one that says where the run begins");
    disk.spool.lose_power(3);
    let (spool, recovery) = disk.open_with(limits);
    assert_eq!(spool.stream(S).expect("is there").run.committed(), at(S, 200));
    assert_eq!((next(&spool, S), recovery.dropped_entries, read_all(&spool)), (Some(400), 0, 2));
}

#[test]
fn an_empty_spool_leaves_no_files_behind_but_the_newest() {
    let disk = Disk::new();
    let limits = SpoolLimits { max_bytes: 1 << 30, segment_bytes: 1 };
    let (mut spool, _) = disk.open_with(limits);
    for start in 0..4 {
        take(&mut spool, &[batch(S, start * 100, start * 100 + 100, 0)]);
    }
    spool.commit(S, at(S, 400), None);
    let (_, result) = offer(&mut spool, &[]);
    result.expect("deletes");
    assert_eq!((disk.spool.names(), spool.entries(), spool.has_garbage()), (Vec::new(), 0, false));
}

#[test]
fn a_torn_end_is_cut_off_wherever_it_tears() {
    let disk = Disk::new();
    let (mut spool, _) = disk.open();
    take(&mut spool, &[batch(S, 0, 100, 0)]);
    let [name] = &disk.spool.names()[..] else { panic!("there is one file") };
    let good = disk.spool.bytes(name).len();
    take(&mut spool, &[batch(S, 100, 200, 0)]);
    let whole = disk.spool.bytes(name);
    let end = end_of_records(&spool);
    for cut in good..end {
        for zeros in [0, 5, whole.len() - cut, whole.len() - cut + 5000] {
            let mut torn = whole[..cut].to_vec();
            torn.resize(cut + zeros, 0);
            if torn.starts_with(&whole[..end]) {
                // A frame may end in zeros: these were its own.
                continue;
            }
            let disk = Disk::new();
            disk.spool.put(name, torn);
            let (spool, recovery) = disk.open();
            assert_eq!(next(&spool, S), Some(100), "cut at {cut}, {zeros} zeros");
            // A batch that goes over into zeros may as well have been overwritten: that is kept for a person to see.
            if zeros == 0 || cut == good {
                assert_eq!((recovery.torn_bytes as usize, recovery.corrupt_files), (cut + zeros - good, 0));
                assert!(disk.set_aside.names().is_empty());
            }
            // The next start finds nothing torn, also in what is no longer the newest file.
            let (mut spool, _) = disk.open();
            take(&mut spool, &[batch(S, 100, 200, 0)]);
            let (spool, recovery) = disk.open();
            assert_eq!((next(&spool, S), recovery.torn_bytes, recovery.corrupt_files), (Some(200), 0, 0));
        }
    }
}

/// A spool with two groups of one batch, the name of their file, and what is in it.
fn two_groups() -> (Spool, String, Vec<u8>) {
    let disk = Disk::new();
    let (mut spool, _) = disk.open();
    take(&mut spool, &[batch(S, 0, 100, 0)]);
    take(&mut spool, &[batch(S, 100, 200, 0)]);
    let [name] = &disk.spool.names()[..] else { panic!("there is one file") };
    let bytes = disk.spool.bytes(name);
    (spool, name.clone(), bytes)
}

#[test]
fn of_what_fills_a_block_up_any_part_may_be_missing() {
    let (spool, name, whole) = two_groups();
    assert_eq!(whole.len() % BLOCK_BYTES, 0);
    for len in end_of_records(&spool)..=whole.len() {
        let disk = Disk::new();
        disk.spool.put(&name, whole[..len].to_vec());
        let (spool, recovery) = disk.open();
        assert_eq!((next(&spool, S), recovery.torn_bytes, recovery.corrupt_files), (Some(200), 0, 0), "{len} bytes");
    }
}

#[test]
fn no_block_that_was_synced_is_written_again() {
    let disk = Disk::new();
    let (mut spool, _) = disk.open();
    take(&mut spool, &[batch(S, 0, 100, 0)]);
    let places = |spool: &Spool| -> Vec<u64> {
        spool.stream(S).expect("is there").run.entries().map(|entry| entry.place.offset).collect()
    };
    for from in [100, 300] {
        take(&mut spool, &[batch(S, from, from + 100, 0), batch(S, from + 100, from + 200, 0)]);
    }
    let block = BLOCK_BYTES as u64;
    let [first, second, third, fourth, fifth] = places(&spool)[..] else { panic!("there are five") };
    assert_eq!((first, second, fourth), (segment::HEADER_BYTES, block, 2 * block), "each group has blocks of its own");
    assert!(third < 2 * block && fifth < 3 * block, "and all of a group lies together");
}

#[test]
fn segments_of_version_1_are_read() {
    let (spool, name, bytes) = two_groups();
    let entries: Vec<Entry> = spool.stream(S).expect("is there").run.entries().copied().collect();
    // As it was before: one record right behind the other.
    let mut old = b"TBSP\x01\0\0\0".to_vec();
    for Entry { place, .. } in entries {
        old.extend(&bytes[place.offset as usize..][..place.len as usize]);
    }
    let disk = Disk::new();
    disk.spool.put(&name, old);
    let (spool, recovery) = disk.open();
    assert_eq!((next(&spool, S), recovery.torn_bytes, recovery.corrupt_files), (Some(200), 0, 0));
    assert_eq!(read_all(&spool), 2);
}

#[test]
fn a_corrupt_part_is_set_aside_and_the_run_ends_before_it() {
    let disk = Disk::new();
    let limits = SpoolLimits { max_bytes: 1 << 30, segment_bytes: 1 };
    let (mut spool, _) = disk.open_with(limits);
    take(&mut spool, &[batch(S, 0, 100, 0)]);
    take(&mut spool, &[batch(S, 100, 200, 0), batch(OTHER, 0, 50, 0)]);
    take(&mut spool, &[batch(S, 200, 300, 0), batch(OTHER, 50, 90, 0)]);
    let name = &disk.spool.names()[1];
    let mut bytes = disk.spool.bytes(name);
    bytes[10] ^= 1;
    disk.spool.put(name, bytes.clone());
    let (mut spool, recovery) = disk.open_with(limits);
    assert_eq!((next(&spool, S), next(&spool, OTHER)), (Some(100), None), "what is behind the gap is dropped");
    assert_eq!((recovery.corrupt_files, recovery.dropped_entries), (1, 2));
    let aside = disk.set_aside.names();
    assert_eq!(aside.len(), 1);
    assert_eq!(disk.set_aside.bytes(&aside[0]), bytes[8..]);
    // The sender goes back and everything is as before.
    take(&mut spool, &[batch(S, 100, 200, 0), batch(S, 200, 300, 0), batch(OTHER, 0, 50, 0)]);
    assert_eq!(read_all(&spool), 4);
    let (_, recovery) = disk.open_with(limits);
    assert_eq!(recovery.corrupt_files, 0, "it is not found a second time");
}

#[test]
fn no_damage_keeps_the_spool_from_opening() {
    let disk = Disk::new();
    let limits = SpoolLimits { max_bytes: 1 << 30, segment_bytes: 1 };
    let (mut spool, _) = disk.open_with(limits);
    for start in 0..3 {
        take(&mut spool, &[batch(S, start * 100, start * 100 + 100, 0)]);
    }
    let names = disk.spool.names();
    for name in &names {
        let whole = disk.spool.bytes(name);
        for damage in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[damage] ^= 0x10;
            let disk = Disk::new();
            for other in &names {
                disk.spool
                    .put(other, if other == name { bytes.clone() } else { Disk::bytes_of(&names, other, &spool) });
            }
            let (mut spool, recovery) = disk.open_with(limits);
            let reached = next(&spool, S).unwrap_or(0);
            // A corrupt body in an older file shows when it is read.
            let unreadable: Vec<Place> = (spool.stream(S).into_iter())
                .flat_map(|stream| stream.run.entries().map(|entry| entry.place))
                .filter(|place| read_batch(&*spool.piece(*place).expect("is there").file, *place).is_err())
                .collect();
            assert!(
                reached < 300 || unreadable.len() + recovery.corrupt_files as usize == 1,
                "{name} at {damage}: reached {reached}"
            );
            for place in unreadable {
                spool.cut(S, place);
            }
            read_all(&spool);
        }
    }
}

impl Disk {
    fn bytes_of(_: &[String], name: &str, spool: &Spool) -> Vec<u8> {
        let number = segment::file_number(name).expect("a segment's name");
        let segment = &spool.segments[&number];
        let mut bytes = vec![0; segment.len as usize];
        segment.file.read_at(&mut bytes, 0).expect("reads");
        bytes
    }
}

#[test]
fn foreign_files_are_left_alone() {
    let disk = Disk::new();
    disk.spool.put("lost+found", vec![1, 2, 3]);
    let (mut spool, _) = disk.open();
    take(&mut spool, &[batch(S, 0, 100, 0)]);
    assert_eq!(disk.spool.bytes("lost+found"), [1, 2, 3]);
}

#[test]
fn a_write_that_fails_takes_nothing_and_the_next_one_works() {
    let disk = Disk::new();
    let (mut spool, _) = disk.open();
    take(&mut spool, &[batch(S, 0, 100, 0)]);
    for truncation_fails in [false, true] {
        for stop in [0, 1, 100] {
            let from = next(&spool, S).expect("is there");
            disk.spool.set(Faults { write_stops_after: Some(stop), ..Faults::default() });
            for _ in 0..=usize::from(truncation_fails) {
                let (offers, result) = offer(&mut spool, &[batch(S, from, from + 100, 0)]);
                assert_eq!(offers, [Offer::Take]);
                assert!(matches!(result, Err(GroupError::Write(_))));
                assert_eq!(next(&spool, S), Some(from), "nothing is promised");
                disk.spool.set(Faults { truncate: true, write_stops_after: Some(0), ..Faults::default() });
            }
            disk.spool.set(Faults::default());
            take(&mut spool, &[batch(S, from, from + 100, 0)]);
        }
    }
    disk.spool.lose_power(5);
    let (spool, recovery) = disk.open();
    assert_eq!((next(&spool, S), recovery.dropped_entries), (Some(700), 0));
    assert_eq!(read_all(&spool), 7);
}

#[test]
fn a_sync_that_fails_is_told_apart_because_nothing_can_be_trusted_then() {
    let disk = Disk::new();
    let (mut spool, _) = disk.open();
    disk.spool.set(Faults { sync: true, ..Faults::default() });
    let (_, result) = offer(&mut spool, &[batch(S, 0, 100, 0)]);
    assert!(matches!(result, Err(GroupError::Sync(_))));
    assert_eq!(next(&spool, S), Some(0));
}

#[test]
fn files_that_can_not_be_deleted_are_tried_again() {
    let disk = Disk::new();
    let limits = SpoolLimits { max_bytes: 1 << 30, segment_bytes: 1 };
    let (mut spool, _) = disk.open_with(limits);
    take(&mut spool, &[batch(S, 0, 100, 0)]);
    take(&mut spool, &[batch(S, 100, 200, 0)]);
    spool.commit(S, at(S, 200), None);
    disk.spool.set(Faults { delete: true, ..Faults::default() });
    offer(&mut spool, &[]).1.expect("goes on");
    assert_eq!(spool.segments(), 2);
    disk.spool.set(Faults::default());
    offer(&mut spool, &[]).1.expect("goes on");
    assert_eq!(spool.segments(), 0);
}

#[test]
fn a_full_disk_still_lets_go_of_what_is_committed() {
    let disk = Disk::new();
    let limits = SpoolLimits { max_bytes: 1 << 30, segment_bytes: 1 };
    let (mut spool, _) = disk.open_with(limits);
    take(&mut spool, &[batch(S, 0, 100, 0)]);
    take(&mut spool, &[batch(S, 100, 200, 0)]);
    spool.commit(S, at(S, 100), None);
    disk.spool.set(Faults { create: true, ..Faults::default() });
    let (_, result) = offer(&mut spool, &[]);
    assert!(matches!(result, Err(GroupError::Write(_))));
    assert_eq!(disk.spool.names().len(), 1);
}

#[test]
fn a_full_spool_has_no_room() {
    let disk = Disk::new();
    let block = BLOCK_BYTES as u64;
    let max_bytes = 2 * block + 100;
    let (mut spool, _) = disk.open_with(SpoolLimits { max_bytes, segment_bytes: 1 << 20 });
    take(&mut spool, &[batch(S, 0, 100, 0)]);
    assert_eq!(spool.bytes(), block);
    let group = spool.plan();
    assert_eq!(spool.room(&group, 1, block), Ok(()));
    assert_eq!(spool.room(&group, 1, block + 1), Err(NoRoom::Bytes { max_bytes }), "it takes two more blocks");
}

#[test]
fn what_a_stream_had_stays_on_disk_until_it_is_released() {
    let disk = Disk::new();
    let limits = SpoolLimits { max_bytes: 1 << 30, segment_bytes: 1 };
    let (mut spool, _) = disk.open_with(limits);
    take(&mut spool, &[batch(S, 0, 100, 0)]);
    take(&mut spool, &[batch(S, 100, 200, 0)]);
    let entries = spool.end(S);
    assert!(spool.stream(S).is_none() && !spool.has_garbage());
    assert_eq!(entries.len(), 2);
    spool.release(entries);
    assert!(spool.has_garbage());
}

#[test]
fn empty_runs_that_nobody_mentions_are_forgotten() {
    let disk = Disk::new();
    let (mut spool, _) = disk.open();
    take(&mut spool, &[batch(S, 0, 100, 0), batch(OTHER, 0, 100, 0)]);
    spool.commit(S, at(S, 100), None);
    spool.forget_idle();
    assert!(spool.stream(S).is_some(), "it was mentioned since the last time");
    spool.forget_idle();
    assert!(spool.stream(S).is_none());
    assert!(spool.stream(OTHER).is_some(), "it holds something");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    /// Senders, commits, restarts, power cuts and failing writes in any order: what was promised is held, what is held
    /// reads back, and no run begins beyond what is committed.
    #[test]
    fn what_was_promised_survives_everything(seed: u64) {
        let mut rng = StdRng::seed_from_u64(seed);
        let disk = Disk::new();
        let limits = SpoolLimits { max_bytes: 1 << 30, segment_bytes: rng.random_range(1..20_000) };
        let (mut spool, _) = disk.open_with(limits);
        // Per stream: promised, committed above, committed as the sender knows it.
        let mut truth: HashMap<StreamId, (u64, u64, u64)> = HashMap::new();
        for step in 0..60 {
            let id = StreamId(rng.random_range(0..4));
            let (promised, committed, told) = *truth.entry(id).or_default();
            match rng.random_range(0..10) {
                0..=5 => {
                    let from = rng.random_range(told..=promised.max(told));
                    let middle = from + rng.random_range(1..60);
                    let end = middle + rng.random_range(1..60);
                    // With files to delete, a failing write may cost the record of where runs begin.
                    if !spool.has_garbage() && rng.random_bool(0.1) {
                        let stop = if rng.random_bool(0.7) { rng.random_range(0..400) } else { rng.random_range(0..4096) };
                        let truncate = rng.random_bool(0.3);
                        disk.spool.set(Faults { write_stops_after: Some(stop), truncate, ..Faults::default() });
                    }
                    let (_, result) = offer(&mut spool, &[batch(id, from, middle, told), batch(id, middle, end, told)]);
                    disk.spool.set(Faults::default());
                    let reached = next(&spool, id).expect("there is a run");
                    if result.is_ok() {
                        truth.insert(id, (promised.max(reached), committed, told));
                    }
                }
                6..=7 => {
                    let to = rng.random_range(committed..=promised.max(committed));
                    spool.commit(id, at(id, to), None);
                    truth.insert(id, (promised, to, if rng.random_bool(0.5) { to } else { told }));
                }
                8 => {
                    drop(spool);
                    (spool, _) = disk.open_with(limits);
                }
                _ => {
                    drop(spool);
                    disk.spool.lose_power(seed ^ step);
                    (spool, _) = disk.open_with(limits);
                }
            }
            read_all(&spool);
            for (id, (promised, committed, _)) in &truth {
                let run = spool.stream(*id).map(|stream| &stream.run);
                if *promised > *committed {
                    let run = run.expect("what is not committed is held");
                    prop_assert!(run.next().offset >= *promised, "{id} fell back from {promised} to {}", run.next().offset);
                }
                prop_assert!(run.is_none_or(|run| run.committed().offset <= *committed || run.committed().offset <= *promised));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever a disk gives back, the spool opens, its runs are whole, and what it reads is what was written, or an error.
    #[test]
    fn no_bytes_on_disk_make_the_spool_panic_or_give_back_something_else(
        edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<bool>(), any::<u8>()), 0..5),
        cut in prop_oneof![0_usize..40, 0_usize..9000],
        more in proptest::collection::vec(any::<u8>(), 0..40),
        which: proptest::sample::Index,
    ) {
        let disk = Disk::new();
        let limits = SpoolLimits { max_bytes: 1 << 30, segment_bytes: 9000 };
        {
            let (mut spool, _) = disk.open_with(limits);
            for n in 0..5 {
                take(&mut spool, &[batch(S, n * 50, n * 50 + 50, 0), batch(OTHER, n * 30, n * 30 + 30, 0)]);
            }
        }
        let names = disk.spool.names();
        let name = &names[which.index(names.len())];
        let mut bytes = disk.spool.bytes(name);
        for (at, in_records, value) in edits {
            let mut at = at.index(bytes.len());
            if in_records {
                at = at / BLOCK_BYTES * BLOCK_BYTES + at % 800;
            }
            bytes[at] = value;
        }
        bytes.truncate(bytes.len().saturating_sub(cut));
        bytes.extend(more);
        disk.spool.put(name, bytes);
        let (spool, _) = disk.open_with(limits);
        for (id, stream) in spool.streams() {
            prop_assert_eq!(stream.run.broken_invariant(), None);
            for entry in stream.run.entries() {
                let piece = spool.piece(entry.place);
                let Some(back) = piece.and_then(|piece| read_batch(&*piece.file, entry.place).ok()) else { continue };
                let Ok(frames) = back.verify() else { continue };
                prop_assert_eq!((back.header.stream, back.header.start, back.header.end), (id, entry.start, entry.end));
                let raw = frames[0].decode(&back.body).expect("its checksum was right");
                prop_assert_eq!(raw, content(id, entry.start.offset, entry.end.offset));
            }
        }
    }
}
