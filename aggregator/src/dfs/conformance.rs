//! What every driver must show, as tests that run against any of them.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;

use super::{CreateOptions, Dfs, DfsError, DfsPath, DfsWriter, recover_until_closed};

/// Where the cases run: a file system that several processes share.
#[async_trait]
pub trait Place: Send + Sync {
    /// Another process's use of it.
    async fn process(&self) -> Arc<dyn Dfs>;

    /// Whether recovering a file is enough to stop its writer. Where not, the writer's directory must be renamed first, and
    /// a lock keep the two apart.
    fn recovery_fences(&self) -> bool;
}

/// What a case gets: a directory of its own.
struct Ground<'a> {
    place: &'a dyn Place,
    dir: DfsPath,
}

impl Ground<'_> {
    async fn dfs(&self) -> Arc<dyn Dfs> {
        self.place.process().await
    }

    fn path(&self, name: &str) -> DfsPath {
        self.dir.join(name)
    }
}

type Case = for<'a> fn(Ground<'a>) -> BoxFuture<'a, ()>;

macro_rules! cases {
    ($($name:ident)*) => {
        const CASES: &[(&str, Case)] = &[$((stringify!($name), |ground| $name(ground).boxed())),*];
    };
}

cases! {
    create_is_exclusive
    create_needs_its_directory
    rename_replaces_nothing
    rename_says_what_is_missing
    rename_moves_a_directory_with_all_in_it
    a_directory_that_was_renamed_away_takes_and_gives_nothing
    an_old_writer_is_fenced
    an_old_writer_cannot_close
    recovery_stops_the_writer
    what_was_synced_survives_its_writer
    a_file_that_was_never_synced_is_recovered
    recovering_a_closed_file_tells_its_length
    lists_are_whole_and_sorted
    stat_tells_files_from_directories_from_nothing
    reads_end_at_the_end
    blocks_and_syncs_leave_no_seam
    directories_are_made_once
    what_is_deleted_is_gone
    an_empty_file_is_a_file
    the_clock_moves_with_changes
}

/// Runs all cases, each in a directory of its own.
///
/// # Panics
/// With the names of the cases that failed.
pub async fn run(place: &dyn Place) {
    let mut failed = Vec::new();
    for (name, case) in CASES {
        let dir = DfsPath::base().join("conformance").join(name);
        place.process().await.mkdir_all(&dir).await.expect("a directory for the case");
        if AssertUnwindSafe(case(Ground { place, dir })).catch_unwind().await.is_err() {
            failed.push(*name);
        }
    }
    assert!(failed.is_empty(), "these failed, see the panics above: {failed:?}");
}

const MIB: usize = 1 << 20;

fn options() -> CreateOptions {
    CreateOptions { block_size: MIB as u64, replication: None, sync_timeout: Duration::from_secs(60) }
}

async fn open(dfs: &dyn Dfs, path: &DfsPath) -> Box<dyn DfsWriter> {
    dfs.create(path, options()).await.expect("a new file")
}

async fn put(dfs: &dyn Dfs, path: &DfsPath, bytes: &'static str) {
    let mut writer = open(dfs, path).await;
    writer.write(bytes.into()).await.expect("written");
    assert_eq!(writer.close().await.expect("closed"), bytes.len() as u64);
}

async fn get(dfs: &dyn Dfs, path: &DfsPath) -> Bytes {
    dfs.read(path, 0, usize::MAX).await.expect("read")
}

async fn exists(dfs: &dyn Dfs, path: &DfsPath) -> bool {
    dfs.stat(path).await.expect("asked").is_some()
}

#[track_caller]
fn refused_as_missing<T>(result: Result<T, DfsError>, missing: &DfsPath) {
    match result {
        Err(DfsError::NotFound { path }) => assert_eq!(path, *missing),
        Err(error) => panic!("not {missing} is missing, but: {error}"),
        Ok(_) => panic!("{missing} is missing, and it worked"),
    }
}

#[track_caller]
fn refused_as_there<T>(result: Result<T, DfsError>, there: &DfsPath) {
    match result {
        Err(DfsError::Exists { path }) => assert_eq!(path, *there),
        Err(error) => panic!("not that {there} is there, but: {error}"),
        Ok(_) => panic!("{there} is there, and it worked"),
    }
}

#[track_caller]
fn refused<T>(result: Result<T, DfsError>) {
    match result {
        Err(DfsError::Refused { .. }) => {}
        Err(error) => panic!("not refused, but: {error}"),
        Ok(_) => panic!("not refused"),
    }
}

async fn create_is_exclusive(ground: Ground<'_>) {
    let (one, two) = (ground.dfs().await, ground.dfs().await);
    let path = ground.path("f");
    let mut writer = open(&*one, &path).await;
    refused_as_there(one.create(&path, options()).await, &path);
    refused_as_there(two.create(&path, options()).await, &path);
    writer.write("first".into()).await.expect("the first is not disturbed");
    writer.close().await.expect("closed");
    refused_as_there(two.create(&path, options()).await, &path);
    assert_eq!(get(&*two, &path).await, "first");
}

async fn create_needs_its_directory(ground: Ground<'_>) {
    let dfs = ground.dfs().await;
    let dir = ground.path("missing");
    refused_as_missing(dfs.create(&dir.join("f"), options()).await, &dir);
    assert!(!exists(&*dfs, &dir).await, "the directory was not made");
}

async fn rename_replaces_nothing(ground: Ground<'_>) {
    let dfs = ground.dfs().await;
    let (a, b, dir, full) = (ground.path("a"), ground.path("b"), ground.path("dir"), ground.path("full"));
    put(&*dfs, &a, "a").await;
    put(&*dfs, &b, "b").await;
    dfs.mkdir(&dir).await.expect("made");
    dfs.mkdir(&full).await.expect("made");
    put(&*dfs, &full.join("x"), "x").await;
    for (from, to) in [(&a, &b), (&a, &dir), (&dir, &a), (&dir, &full), (&full, &dir)] {
        refused_as_there(dfs.rename(from, to).await, to);
    }
    assert_eq!((get(&*dfs, &a).await, get(&*dfs, &b).await), ("a".into(), "b".into()));
    assert_eq!(get(&*dfs, &full.join("x")).await, "x");
}

async fn rename_says_what_is_missing(ground: Ground<'_>) {
    let dfs = ground.dfs().await;
    let (there, gone) = (ground.path("there"), ground.path("gone"));
    put(&*dfs, &there, "x").await;
    refused_as_missing(dfs.rename(&gone, &ground.path("new")).await, &gone);
    refused_as_missing(dfs.rename(&gone.join("f"), &ground.path("new")).await, &gone.join("f"));
    refused_as_missing(dfs.rename(&there, &gone.join("f")).await, &gone);
    assert_eq!(get(&*dfs, &there).await, "x");
}

async fn rename_moves_a_directory_with_all_in_it(ground: Ground<'_>) {
    let dfs = ground.dfs().await;
    let (from, to) = (ground.path("from"), ground.path("to"));
    dfs.mkdir_all(&from.join("deep/er")).await.expect("made");
    put(&*dfs, &from.join("deep/er/f"), "x").await;
    dfs.rename(&from, &to).await.expect("renamed");
    assert!(!exists(&*dfs, &from).await);
    assert_eq!(get(&*dfs, &to.join("deep/er/f")).await, "x");
}

async fn a_directory_that_was_renamed_away_takes_and_gives_nothing(ground: Ground<'_>) {
    let (old, new) = (ground.dfs().await, ground.dfs().await);
    let (epoch, next) = (ground.path("e1"), ground.path("e2"));
    old.mkdir(&epoch).await.expect("made");
    put(&*old, &epoch.join("closed"), "x").await;
    new.rename(&epoch, &next).await.expect("renamed");
    refused_as_missing(old.create(&epoch.join("f"), options()).await, &epoch);
    refused_as_missing(old.mkdir(&epoch.join("d")).await, &epoch);
    refused_as_missing(old.rename(&epoch.join("closed"), &ground.path("out")).await, &epoch.join("closed"));
    refused_as_missing(old.rename(&next.join("closed"), &epoch.join("back")).await, &epoch);
    assert!(!exists(&*new, &epoch).await, "nothing brought it back");
    assert_eq!(get(&*new, &next.join("closed")).await, "x");
}

/// A writer with "synced" on disk and " not" behind it, whose directory somebody else has taken; the file's new name.
async fn taken(ground: &Ground<'_>) -> (Box<dyn DfsWriter>, Arc<dyn Dfs>, DfsPath) {
    let (old, new) = (ground.dfs().await, ground.dfs().await);
    let (epoch, next) = (ground.path("e1"), ground.path("e2"));
    old.mkdir(&epoch).await.expect("made");
    let mut writer = open(&*old, &epoch.join("f")).await;
    writer.write("synced".into()).await.expect("written");
    writer.sync().await.expect("synced");
    writer.write(" not".into()).await.expect("written");
    new.rename(&epoch, &next).await.expect("renamed");
    recover_until_closed(&*new, &next.join("f")).await.expect("recovered").expect("it is there");
    (writer, new, next.join("f"))
}

fn is_what_was_synced_and_perhaps_more(bytes: &Bytes) {
    assert!(bytes.starts_with(b"synced") && b"synced not".starts_with(bytes), "{bytes:?}");
}

async fn an_old_writer_is_fenced(ground: Ground<'_>) {
    let (mut writer, new, path) = taken(&ground).await;
    let found = get(&*new, &path).await;
    is_what_was_synced_and_perhaps_more(&found);
    let late = async {
        writer.write(" late".into()).await?;
        writer.sync().await
    };
    late.await.expect_err("the file has another owner");
    writer.sync().await.expect_err("and keeps it");
    writer.close().await.expect_err("also at the end");
    if ground.place.recovery_fences() {
        assert_eq!(get(&*new, &path).await, found, "nothing was added");
    }
}

async fn an_old_writer_cannot_close(ground: Ground<'_>) {
    let (writer, new, path) = taken(&ground).await;
    writer.close().await.expect_err("the file has another owner");
    if ground.place.recovery_fences() {
        is_what_was_synced_and_perhaps_more(&get(&*new, &path).await);
    }
}

async fn recovery_stops_the_writer(ground: Ground<'_>) {
    if !ground.place.recovery_fences() {
        return;
    }
    let (old, new) = (ground.dfs().await, ground.dfs().await);
    let path = ground.path("f");
    let mut writer = open(&*old, &path).await;
    writer.write("synced".into()).await.expect("written");
    writer.sync().await.expect("synced");
    let len = recover_until_closed(&*new, &path).await.expect("recovered").expect("it is there");
    assert_eq!(len, 6);
    let late = async {
        writer.write(" late".into()).await?;
        writer.sync().await
    };
    late.await.expect_err("the file is closed");
    assert_eq!(get(&*new, &path).await, "synced");
}

async fn what_was_synced_survives_its_writer(ground: Ground<'_>) {
    let (old, new) = (ground.dfs().await, ground.dfs().await);
    let path = ground.path("f");
    let mut writer = open(&*old, &path).await;
    writer.write("synced".into()).await.expect("written");
    writer.sync().await.expect("synced");
    writer.write(" not".into()).await.expect("written");
    drop(writer);
    let len = recover_until_closed(&*new, &path).await.expect("recovered").expect("it is there");
    let found = get(&*new, &path).await;
    is_what_was_synced_and_perhaps_more(&found);
    assert_eq!(found.len() as u64, len);
    let again = recover_until_closed(&*new, &path).await.expect("recovered").expect("it is there");
    assert_eq!(again, len, "a recovered file does not change");
}

async fn a_file_that_was_never_synced_is_recovered(ground: Ground<'_>) {
    let (old, new) = (ground.dfs().await, ground.dfs().await);
    let (empty, begun) = (ground.path("empty"), ground.path("begun"));
    drop(open(&*old, &empty).await);
    let mut writer = open(&*old, &begun).await;
    writer.write("x".into()).await.expect("written");
    drop(writer);
    assert_eq!(recover_until_closed(&*new, &empty).await.expect("recovered"), Some(0));
    let len = recover_until_closed(&*new, &begun).await.expect("recovered").expect("it is there");
    assert_eq!(get(&*new, &begun).await, &"x"[..usize::try_from(len).expect("small")]);
}

async fn recovering_a_closed_file_tells_its_length(ground: Ground<'_>) {
    let dfs = ground.dfs().await;
    put(&*dfs, &ground.path("f"), "four").await;
    assert_eq!(recover_until_closed(&*dfs, &ground.path("f")).await.expect("recovered"), Some(4));
    assert_eq!(recover_until_closed(&*dfs, &ground.path("gone")).await.expect("asked"), None);
}

async fn lists_are_whole_and_sorted(ground: Ground<'_>) {
    let dfs = ground.dfs().await;
    let dir = ground.path("dir");
    assert_eq!(dfs.list(&dir).await.expect("asked"), None);
    dfs.mkdir(&dir).await.expect("made");
    assert_eq!(dfs.list(&dir).await.expect("listed"), Some(vec![]));
    put(&*dfs, &dir.join("b"), "1").await;
    put(&*dfs, &dir.join("a=1 %41"), "22").await;
    dfs.mkdir(&dir.join("c")).await.expect("made");
    put(&*dfs, &dir.join("c/deep"), "x").await;
    let listed = dfs.list(&dir).await.expect("listed").expect("there");
    let listed: Vec<_> = listed.iter().map(|e| (e.name.as_str(), e.status.len, e.status.is_dir)).collect();
    assert_eq!(listed, [("a=1 %41", 2, false), ("b", 1, false), ("c", 0, true)]);
    refused(dfs.list(&dir.join("b")).await);
}

async fn stat_tells_files_from_directories_from_nothing(ground: Ground<'_>) {
    let dfs = ground.dfs().await;
    put(&*dfs, &ground.path("f"), "123").await;
    let file = dfs.stat(&ground.path("f")).await.expect("asked").expect("there");
    assert_eq!((file.len, file.is_dir), (3, false));
    let dir = dfs.stat(&ground.dir).await.expect("asked").expect("there");
    assert_eq!((dir.len, dir.is_dir), (0, true));
    assert!(dfs.stat(&DfsPath::base()).await.expect("asked").expect("there").is_dir);
    assert_eq!(dfs.stat(&ground.path("gone")).await.expect("asked"), None);
    assert_eq!(dfs.stat(&ground.path("gone/deeper")).await.expect("asked"), None);
}

async fn reads_end_at_the_end(ground: Ground<'_>) {
    let dfs = ground.dfs().await;
    let path = ground.path("f");
    put(&*dfs, &path, "0123456789").await;
    for (offset, len, wanted) in
        [(0, 10, "0123456789"), (0, 4, "0123"), (4, 3, "456"), (8, 5, "89"), (10, 1, ""), (99, 1, ""), (3, 0, "")]
    {
        assert_eq!(dfs.read(&path, offset, len).await.expect("read"), wanted, "{len} bytes from {offset}");
    }
    assert_eq!(dfs.read(&path, u64::MAX, usize::MAX).await.expect("read"), "");
    let gone = ground.path("gone");
    refused_as_missing(dfs.read(&gone, 0, 1).await, &gone);
    refused(dfs.read(&ground.dir, 0, 1).await);
}

async fn blocks_and_syncs_leave_no_seam(ground: Ground<'_>) {
    let dfs = ground.dfs().await;
    let path = ground.path("f");
    let whole: Bytes = (0..5 * MIB / 2 + 77).map(|i| u8::try_from(i % 253).expect("small")).collect();
    let mut writer = open(&*dfs, &path).await;
    // Pieces that end inside a block, at its end, and beyond the next one's.
    let mut at = 0;
    for (piece, sync) in [(1, true), (0, true), (70_000, true), (MIB - 70_001, false), (MIB, true), (13, false)] {
        writer.write(whole.slice(at..at + piece)).await.expect("written");
        at += piece;
        if sync {
            writer.sync().await.expect("synced");
        }
    }
    writer.write(whole.slice(at..)).await.expect("written");
    assert_eq!(writer.close().await.expect("closed"), whole.len() as u64);
    assert!(get(&*dfs, &path).await == whole, "the bytes are others");
    let across = dfs.read(&path, MIB as u64 - 5, 10).await.expect("read");
    assert_eq!(across, whole.slice(MIB - 5..MIB + 5));
}

async fn directories_are_made_once(ground: Ground<'_>) {
    let dfs = ground.dfs().await;
    let (dir, gone) = (ground.path("dir"), ground.path("gone"));
    dfs.mkdir(&dir).await.expect("made");
    refused_as_there(dfs.mkdir(&dir).await, &dir);
    refused_as_missing(dfs.mkdir(&gone.join("d")).await, &gone);
    assert!(!exists(&*dfs, &gone).await, "its parent was not made");
    dfs.mkdir_all(&gone.join("d/e")).await.expect("made with all that leads to it");
    dfs.mkdir_all(&gone.join("d/e")).await.expect("fine again");
    assert!(exists(&*dfs, &gone.join("d/e")).await);
    put(&*dfs, &ground.path("f"), "x").await;
    refused_as_there(dfs.mkdir(&ground.path("f")).await, &ground.path("f"));
}

async fn what_is_deleted_is_gone(ground: Ground<'_>) {
    let dfs = ground.dfs().await;
    let dir = ground.path("dir");
    dfs.delete(&dir).await.expect("fine when nothing is there");
    dfs.mkdir_all(&dir.join("deep")).await.expect("made");
    put(&*dfs, &dir.join("deep/f"), "x").await;
    let mut writer = open(&*dfs, &dir.join("open")).await;
    writer.write("x".into()).await.expect("written");
    dfs.delete(&dir.join("deep/f")).await.expect("deleted");
    assert!(!exists(&*dfs, &dir.join("deep/f")).await);
    dfs.delete(&dir).await.expect("deleted with all in it");
    assert!(!exists(&*dfs, &dir).await);
    writer.sync().await.expect_err("its file is gone");
}

async fn an_empty_file_is_a_file(ground: Ground<'_>) {
    let dfs = ground.dfs().await;
    let path = ground.path("f");
    let mut writer = open(&*dfs, &path).await;
    writer.sync().await.expect("synced");
    assert_eq!(writer.close().await.expect("closed"), 0);
    assert_eq!(dfs.stat(&path).await.expect("asked").expect("there").len, 0);
    assert_eq!(get(&*dfs, &path).await, "");
}

async fn the_clock_moves_with_changes(ground: Ground<'_>) {
    let dfs = ground.dfs().await;
    put(&*dfs, &ground.path("a"), "x").await;
    put(&*dfs, &ground.path("b"), "x").await;
    let mut times = Vec::new();
    for name in ["a", "b"] {
        times.push(dfs.stat(&ground.path(name)).await.expect("asked").expect("there").modified_ms);
    }
    assert!(times[0] <= times[1] && times[0] > 1_600_000_000_000, "milliseconds since 1970: {times:?}");
}
