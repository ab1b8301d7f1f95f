//! The audit of a sink on which roots work, and of one that fails.

use super::*;
use crate::dfs::local::LocalDfs;
use crate::dfs::{CreateOptions, DfsWriter, FileStatus, Guard, Recovered};
use async_trait::async_trait;
use bytes::Bytes;
use std::sync::Mutex;

const LANE: &str = "_tributary/lanes/0/e1-x";

type Act = Box<dyn FnOnce(&Sink) + Send>;

/// Something that happens just before or just after a directory is listed or a file is read for the first time.
struct Event {
    before: bool,
    path: String,
    act: Act,
}

fn before(path: impl Into<String>, act: impl FnOnce(&Sink) + Send + 'static) -> Event {
    Event { before: true, path: path.into(), act: Box::new(act) }
}

fn after(path: impl Into<String>, act: impl FnOnce(&Sink) + Send + 'static) -> Event {
    Event { before: false, path: path.into(), act: Box::new(act) }
}

/// A sink that changes while it is looked at.
struct Moving {
    sink: Arc<Sink>,
    dfs: LocalDfs,
    events: Mutex<Vec<Event>>,
    /// The file that can't be read.
    lost: Option<String>,
}

impl Moving {
    fn happen(&self, before: bool, path: &DfsPath) {
        loop {
            let mut events = self.events.lock().expect("nobody panicked");
            let Some(at) = events.iter().position(|event| event.before == before && event.path == path.as_str()) else {
                return;
            };
            let event = events.remove(at);
            drop(events);
            (event.act)(&self.sink);
        }
    }
}

#[async_trait]
impl Dfs for Moving {
    fn describe(&self) -> String {
        self.dfs.describe()
    }

    async fn lock(&self, dir: &DfsPath) -> Result<Box<dyn Guard>, DfsError> {
        self.dfs.lock(dir).await
    }

    async fn create(&self, path: &DfsPath, _: CreateOptions) -> Result<Box<dyn DfsWriter>, DfsError> {
        panic!("an audit makes nothing: {path}")
    }

    async fn mkdir(&self, path: &DfsPath) -> Result<(), DfsError> {
        panic!("an audit makes nothing: {path}")
    }

    async fn mkdir_all(&self, path: &DfsPath) -> Result<(), DfsError> {
        panic!("an audit makes nothing: {path}")
    }

    async fn stat(&self, path: &DfsPath) -> Result<Option<FileStatus>, DfsError> {
        self.dfs.stat(path).await
    }

    async fn list(&self, dir: &DfsPath) -> Result<Option<Vec<DirEntry>>, DfsError> {
        self.happen(true, dir);
        let listed = self.dfs.list(dir).await;
        self.happen(false, dir);
        listed
    }

    async fn read(&self, path: &DfsPath, offset: u64, len: usize) -> Result<Bytes, DfsError> {
        self.happen(true, path);
        if self.lost.as_deref() == Some(path.as_str()) {
            let reason = "no DataNode has the block".into();
            return Err(DfsError::Unavailable { call: "read", path: path.clone(), reason });
        }
        let read = self.dfs.read(path, offset, len).await;
        self.happen(false, path);
        read
    }

    async fn rename(&self, from: &DfsPath, _: &DfsPath) -> Result<(), DfsError> {
        panic!("an audit moves nothing: {from}")
    }

    async fn delete(&self, path: &DfsPath) -> Result<(), DfsError> {
        panic!("an audit deletes nothing: {path}")
    }

    async fn recover(&self, path: &DfsPath) -> Result<Recovered, DfsError> {
        panic!("an audit closes nothing: {path}")
    }

    async fn set_replication(&self, path: &DfsPath, _: u16) -> Result<(), DfsError> {
        panic!("an audit changes nothing: {path}")
    }
}

/// Audits a sink while all this happens, which must.
async fn audited(
    sink: Sink,
    events: Vec<Event>,
    lost: Option<&str>,
    change: impl FnOnce(&mut Options),
) -> (bool, String, Arc<Sink>) {
    let dfs = LocalDfs::open(sink.dir.path()).expect("opens");
    let sink = Arc::new(sink);
    let moving =
        Arc::new(Moving { sink: Arc::clone(&sink), dfs, events: Mutex::new(events), lost: lost.map(str::to_owned) });
    let mut options = options(sink.dir.path());
    change(&mut options);
    let mut out = Vec::new();
    let good = audit(Arc::clone(&moving) as Arc<dyn Dfs>, &options, &mut out).await.expect("audits");
    let text = String::from_utf8(out).expect("text");
    let left: Vec<String> = moving.events.lock().expect("fine").iter().map(|event| event.path.clone()).collect();
    assert!(left.is_empty(), "it never came to {left:?}: {text}");
    (good, text, sink)
}

async fn is_right_while(sink: Sink, events: Vec<Event>) -> String {
    let (good, text, _) = audited(sink, events, None, |_| ()).await;
    assert!(good, "{text}");
    text
}

/// The second hour is not there yet: its file is in `dir`. What follows is published.
fn waiting_in(dir: &str) -> Sink {
    let sink = Sink::good();
    std::fs::create_dir_all(sink.path(dir)).expect("made");
    sink.rename(&format!("{NEXT}/c.l0.gz"), &format!("{dir}/c.l0.gz"));
    sink.remove(NEXT);
    let third = [("e.l0.gz", frame_in(2, 1, 25, 30))];
    sink.publish(THIRD, 2, &[(0, &third), (1, &[])]);
    sink
}

/// The file of the second hour goes from the lane into its hour.
fn publish_next(sink: &Sink) {
    let next = [("c.l0.gz", sink.read(&format!("{LANE}/c.l0.gz")))];
    sink.remove(&format!("{LANE}/c.l0.gz"));
    sink.publish(NEXT, 1, &[(0, &next), (1, &[])]);
}

#[tokio::test]
async fn an_hour_that_is_put_together_and_published_meanwhile_is_no_gap() {
    let hidden = "app/dt=2026-11-22/.hr=21";
    let hide = move |sink: &Sink| {
        std::fs::create_dir_all(sink.path(hidden)).expect("made");
        sink.rename(&format!("{LANE}/c.l0.gz"), &format!("{hidden}/c.l0.gz"));
    };
    for path in ["", "_tributary", LANE, "_tributary/lanes/0/e1-x/c.l0.gz", "app", "app/dt=2026-11-22", HOUR] {
        is_right_while(waiting_in(LANE), vec![before(path, hide)]).await;
        is_right_while(waiting_in(LANE), vec![before(path, publish_next)]).await;
        is_right_while(waiting_in(LANE), vec![after(path, hide)]).await;
        is_right_while(waiting_in(LANE), vec![after(path, publish_next)]).await;
    }
    let show = move |sink: &Sink| {
        let next = [("c.l0.gz", sink.read(&format!("{hidden}/c.l0.gz")))];
        sink.rename(hidden, NEXT);
        sink.publish(NEXT, 1, &[(0, &next), (1, &[])]);
    };
    for path in ["", LANE, "app", "app/dt=2026-11-22", hidden, "app/dt=2026-11-22/.hr=21/c.l0.gz"] {
        let ready = || {
            let sink = waiting_in(hidden);
            sink.write(&format!("{LANE}/f.gz"), &frame_in(3, 1, 30, 31));
            sink
        };
        is_right_while(ready(), vec![before(path, show)]).await;
        is_right_while(ready(), vec![after(path, show)]).await;
    }
}

#[tokio::test]
async fn what_was_written_after_the_lanes_were_read_is_looked_for_again() {
    // The next hour is begun, and the one before it is published with lines from behind its first ones.
    let write = |sink: &Sink| {
        sink.write(&format!("{LANE}/g.gz"), &frame_in(3, 1, 25, 27));
        let third = [("e.l0.gz", frame_in(2, 1, 27, 30))];
        sink.publish(THIRD, 2, &[(0, &third), (1, &[])]);
    };
    let sink = Sink::good();
    sink.write(&format!("{LANE}/f.gz"), &frame(3, 0, 1));
    let text = is_right_while(sink, vec![after(LANE, write)]).await;
    assert!(text.contains("3 hours"), "{text}");
    // What was written went beside an hour that was read.
    let arrive = |sink: &Sink| {
        sink.rename(&format!("{LANE}/g.gz"), &format!("{HOUR}/_late/g.gz"));
        sink.add_late_manifest(HOUR, 0, "g.gz", &frame(1, 25, 27));
    };
    let sink = Sink::good();
    sink.write(&format!("{LANE}/f.gz"), &frame(3, 0, 1));
    is_right_while(sink, vec![after(LANE, write), after(format!("{HOUR}/_late"), arrive)]).await;
    // What isn't anywhere isn't found by looking again.
    let write = |sink: &Sink| {
        let third = [("e.l0.gz", frame_in(2, 1, 27, 30))];
        sink.publish(THIRD, 2, &[(0, &third), (1, &[])]);
    };
    let (good, text, _) = audited(Sink::good(), vec![after("app/dt=2026-11-22", write)], None, |_| ()).await;
    assert!(!good && text.contains("are in no file"), "{text}");
}

#[tokio::test]
async fn a_lane_that_is_taken_over_meanwhile_is_read_again() {
    let take = |sink: &Sink| sink.rename(LANE, "_tributary/lanes/0/e2-y");
    for path in ["_tributary/lanes/0", LANE, "_tributary/lanes/0/e1-x/c.l0.gz"] {
        is_right_while(waiting_in(LANE), vec![before(path, take)]).await;
        is_right_while(waiting_in(LANE), vec![after(path, take)]).await;
    }
    // The number of lanes is changed.
    for dir in ["_tributary/lanes.old-1/0/e1-x", "_tributary/lanes.new-2/1/e0-x"] {
        is_right_while(waiting_in(dir), Vec::new()).await;
    }
}

#[tokio::test]
async fn a_late_file_that_is_on_its_way_is_not_missing() {
    let late = format!("{HOUR}/_late");
    let ready = || {
        let sink = Sink::good();
        let bytes = frame(3, 0, 10);
        sink.write(&format!("{LANE}/g.gz"), &bytes);
        sink.add_late_manifest(HOUR, 0, "g.gz", &bytes);
        sink
    };
    let arrive = |sink: &Sink| sink.rename(&format!("{LANE}/g.gz"), &format!("{HOUR}/_late/g.gz"));
    for change in [(|_| ()) as fn(&mut Options), |options| options.hour = Some(START_S)] {
        let (good, text, _) = audited(ready(), vec![after(&late, arrive)], None, change).await;
        assert!(good && text.contains(" 2 late files") && text.contains(" 0 wrong"), "{text}");
        // A root stopped between the two.
        let (good, text, _) = audited(ready(), Vec::new(), None, change).await;
        assert!(good && has(&text, "note: ", &["_late/g.gz is on its way"]), "{text}");
    }
    let sink = ready();
    sink.remove(&format!("{LANE}/g.gz"));
    sink.is_found(&["g.gz is missing; _late/_g.gz.manifest.json names it"]).await;
}

#[tokio::test]
async fn an_hour_that_is_made_for_late_data_is_not_an_emptied_one() {
    let ready = || {
        let sink = Sink::good();
        std::fs::create_dir_all(sink.path(&format!("{THIRD}/_late"))).expect("made");
        sink.write(&format!("{LANE}/g.gz"), &frame_in(2, 3, 0, 10));
        sink
    };
    ready().is_noted(&[THIRD, "late data for it waits in a lane"]).await;
    let arrive = |sink: &Sink| {
        sink.remove(&format!("{LANE}/g.gz"));
        sink.add_late(THIRD, 2, "g.gz", &frame_in(2, 3, 0, 10));
    };
    let text = is_right_while(ready(), vec![after(format!("{THIRD}/_late"), arrive)]).await;
    assert!(text.contains(" 0 notes"), "{text}");
}

#[tokio::test]
async fn a_file_that_cant_be_read_or_is_deleted_meanwhile_is_a_finding_and_the_audit_goes_on() {
    let broken = || {
        let sink = Sink::good();
        let next = [("c.l0.gz", frame_in(1, 1, 22, 25))];
        sink.publish(NEXT, 1, &[(0, &next), (1, &[])]);
        sink
    };
    let gap = format!("the bytes {}..{} are in no file", place(1, 20), place(1, 22));
    for (file, words) in [
        ("b.l1.gz", "b.l1.gz: at 0 of"),
        ("_seal-1.json", "_seal-1.json can't be read"),
        ("_MANIFEST.json", "_MANIFEST.json can't be read"),
        ("_late/d.l1.gz", "_late/d.l1.gz: at 0 of"),
        ("_late/_d.l1.gz.manifest.json", "_late/_d.l1.gz.manifest.json can't be read"),
    ] {
        let path = format!("{HOUR}/{file}");
        let (good, text, _) = audited(broken(), Vec::new(), Some(&path), |_| ()).await;
        assert!(!good && has(&text, "wrong: ", &[words, "no DataNode has the block"]), "{file}: {text}");
        assert!(has(&text, "wrong: ", &["web-1", &gap]), "{file}: {text}");
        let gone = before(&path, move |sink: &Sink| sink.remove(&format!("{HOUR}/{file}")));
        let (good, text, _) = audited(broken(), vec![gone], None, |_| ()).await;
        assert!(!good && has(&text, "wrong: ", &["web-1", &gap]), "{file}: {text}");
    }
    // A plain file where a directory should be is no reason to stop, either.
    let sink = broken();
    sink.remove(&format!("{HOUR}/_late"));
    sink.write(&format!("{HOUR}/_late"), b"");
    sink.is_found(&["_late: it can't be listed"]).await;
    sink.is_found(&["web-1", &gap]).await;
    // One that waits to be published is no part of what is proved, but what is in it is missed.
    let (good, text, _) = audited(waiting_in(LANE), Vec::new(), Some(&format!("{LANE}/c.l0.gz")), |_| ()).await;
    assert!(!good && has(&text, "note: ", &["c.l0.gz", "can't be read"]), "{text}");
}
