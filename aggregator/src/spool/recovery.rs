//! What is done with the segment files that a stopped or crashed node left.
//!
//! | State | What is done |
//! |---|---|
//! | the newest file ends inside of a record, or in zeros | cut off: nobody was told of it |
//! | a corrupt part, anywhere (also a torn end that can't be told from one) | what is in front of it stays; from it to the end of the file is set aside and cut off, loudly |
//! | a file that is not ours, or of another version | set aside, loudly |
//! | an empty file, or one whose good part is empty | deleted |
//! | entries that no longer continue their stream's run (what was between is gone) | dropped and counted: `next` falls back and the sender, who still has them, sends them again |
//! | entries that are committed or held twice | not taken up; the file goes when none of its entries is needed |
//! | the whole spool is gone | nothing: every stream's `next` falls back to `committed` |
//!
//! Never guessed: where a stream's run begins. It begins at the highest `committed` that any record or batch names.
//!
//! Bodies are verified here only in the newest file, where a crash can have torn them; elsewhere when they are forwarded.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;

use tributary_common::batch::BatchHeader;
use tributary_common::ids::StreamId;
use tributary_common::position::Position;

use super::io::{Folder, FolderFile};
use super::run::{Entry, Offer, Place};
use super::segment::{Damage, Record, Scan, file_name, file_number, scan};
use super::{Segment, Stream};
use crate::setaside::{Piece, SetAside};

/// The spool can't be opened at all.
#[derive(Debug, thiserror::Error)]
#[error("can't {doing} in the spool {where_}: {error}; check that the folder belongs to the user that this runs as")]
pub struct OpenError {
    doing: String,
    where_: String,
    #[source]
    error: io::Error,
}

/// What was found, for the log and the metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Segment files that were read.
    pub segments: u64,
    /// Entries that are held now.
    pub entries: u64,
    /// Entries that no longer continue a run.
    pub dropped_entries: u64,
    /// Bytes of torn ends that were cut off.
    pub torn_bytes: u64,
    /// Files with a corrupt part.
    pub corrupt_files: u64,
}

pub(super) struct Recovered {
    pub(super) streams: BTreeMap<StreamId, Stream>,
    pub(super) segments: BTreeMap<u64, Segment>,
    pub(super) live: HashMap<u64, u64>,
    pub(super) next_number: u64,
    pub(super) report: Recovery,
}

pub(super) fn recover(folder: &Arc<dyn Folder>, set_aside: &SetAside) -> Result<Recovered, OpenError> {
    let failed = |doing: &str| {
        let (doing, where_) = (doing.to_owned(), folder.describe());
        move |error| OpenError { doing, where_, error }
    };
    let mut files: Vec<(u64, u64)> = folder
        .list()
        .map_err(failed("list the files"))?
        .into_iter()
        .filter_map(|(name, len)| Some((file_number(&name)?, len)))
        .collect();
    files.sort_unstable();
    let newest = files.last().map(|(number, _)| *number);

    let mut report = Recovery::default();
    let mut segments = BTreeMap::new();
    let mut batches: Vec<(Box<BatchHeader>, Place)> = Vec::new();
    let mut committed: HashMap<StreamId, Position> = HashMap::new();
    let mut tell = |stream: StreamId, position: Position| {
        let known = committed.entry(stream).or_insert(position);
        if position.offset > known.offset {
            *known = position;
        }
    };
    for (number, len) in files {
        let name = file_name(number);
        let file = folder.open(&name).map_err(failed(&format!("open {name}")))?;
        report.segments += 1;
        let is_newest = newest == Some(number);
        let scan = scan(&*file, number, len, is_newest);
        let kept_len = mend(&file, &name, len, &scan, is_newest, set_aside, &mut report)
            .map_err(failed(&format!("sync {name}")))?;
        for record in scan.records {
            match record {
                Record::Batch(header, place) => {
                    tell(header.stream, header.committed);
                    batches.push((header, place));
                }
                Record::Committed(positions) => positions.into_iter().for_each(|(stream, at)| tell(stream, at)),
            }
        }
        segments.insert(number, Segment { file, len: kept_len });
    }

    // The newest file's name may be as new as its end.
    folder.sync().map_err(failed("sync the folder"))?;

    let mut streams: BTreeMap<StreamId, Stream> = BTreeMap::new();
    let mut live: HashMap<u64, u64> = HashMap::new();
    for (header, place) in batches {
        let begin = committed.get(&header.stream).copied().unwrap_or(header.committed);
        let stream = streams.entry(header.stream).or_insert_with(|| Stream::begin(&header, begin));
        match stream.run.offer(header.start, header.end) {
            Offer::Take => {
                let received_ms = header.received_ms.unwrap_or(0);
                stream.run.push(Entry { start: header.start, end: header.end, place, received_ms });
                stream.run.settle();
                report.entries += 1;
                *live.entry(place.segment).or_default() += 1;
            }
            Offer::Held | Offer::BelowCommitted => {}
            Offer::Beyond | Offer::Diverged => report.dropped_entries += 1,
        }
    }
    streams.retain(|_, stream| !stream.run.is_empty());
    Ok(Recovered { streams, segments, live, next_number: newest.map_or(1, |number| number + 1), report })
}

/// Cuts off what is damaged, after setting it aside where it may be more than the end of a group that nobody was told of.
/// Returns the file's length then.
fn mend(
    file: &Arc<dyn FolderFile>,
    name: &str,
    len: u64,
    scan: &Scan,
    is_newest: bool,
    set_aside: &SetAside,
    report: &mut Recovery,
) -> io::Result<u64> {
    match &scan.damage {
        None => {}
        Some(Damage::Torn) if is_newest => {
            let bytes = len - scan.good_len.min(len);
            tracing::info!(file = name, at = scan.good_len, bytes, "cut the torn end of the newest spool file off");
            report.torn_bytes += bytes;
        }
        Some(damage) => {
            report.corrupt_files += 1;
            let rest = Piece { file: Arc::clone(file), offset: scan.good_len, len: len - scan.good_len.min(len) };
            match set_aside.keep(&format!("corrupt-{name}"), &[rest]) {
                Ok(kept_as) => tracing::error!(
                    file = name, at = scan.good_len, error = %damage, kept_as,
                    "a spool file is corrupt: the part from there on is set aside, its senders send it again"
                ),
                Err(error) => tracing::error!(
                    file = name, at = scan.good_len, error = %damage, set_aside_error = %error,
                    "a spool file is corrupt: the part from there on is lost here, its senders send it again"
                ),
            }
        }
    }
    if scan.damage.is_some()
        && let Err(error) = file.truncate(scan.good_len)
    {
        tracing::error!(file = name, error = %error, "can't cut a damaged spool file; the next start tries again");
        return Ok(len);
    }
    // Of the newest file's end it is not known whether it had been synced before the crash; senders are told of it now.
    if is_newest || scan.damage.is_some() {
        file.sync()?;
    }
    Ok(scan.good_len)
}
