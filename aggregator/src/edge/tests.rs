use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

use tributary_common::http::backoff::BackoffLimits;
use tributary_common::ids::StreamId;
use tributary_common::messages::{BATCHES_CONTENT_TYPE, BATCHES_PATH, Verdict};
use tributary_common::position::{Position, TailHash};

use super::*;
use crate::disk::BLOCK_BYTES;
use crate::spool::run::{Entry, Offer, Place, Run};
use crate::testing::{Served, at, batch, batch_between, body, content, offer, position, post, serve_on, serve_tier};
use crate::tier::Elsewhere;

const S: StreamId = StreamId(7);

/// A tier above that follows the one rule in memory, and can be told to do worse.
#[derive(Default, Clone)]
struct Parent {
    state: Arc<Mutex<ParentState>>,
}

#[derive(Default)]
struct ParentState {
    runs: BTreeMap<StreamId, Run>,
    /// Every byte that was taken, by stream; a byte that is taken twice must be the same.
    stored: BTreeMap<StreamId, BTreeMap<u64, u8>>,
    offers: u64,
    reports: Vec<Report>,
    /// What is taken is committed at once.
    commits: bool,
    /// What every batch is answered.
    says: Option<Verdict>,
    full: bool,
    elsewhere: Option<Elsewhere>,
}

impl Parent {
    fn committing() -> Self {
        let parent = Self::default();
        parent.with(|state| state.commits = true);
        parent
    }

    fn with<R>(&self, look: impl FnOnce(&mut ParentState) -> R) -> R {
        look(&mut self.state.lock().expect("no panic"))
    }

    /// Everything that was taken so far is durable.
    fn commit(&self) {
        self.with(|state| {
            for run in state.runs.values_mut() {
                run.commit(run.next());
            }
        });
    }

    fn stored(&self, stream: StreamId) -> Vec<u8> {
        self.with(|state| state.stored.get(&stream).map(|bytes| bytes.values().copied().collect()).unwrap_or_default())
    }
}

#[async_trait]
impl Tier for Parent {
    async fn offer(&self, batches: Vec<Received>) -> Result<Vec<Answer>, Overloaded> {
        self.with(|state| {
            if state.full {
                return Err(Overloaded::new("full", Duration::from_secs(1)));
            }
            if let Some(elsewhere) = &state.elsewhere {
                return Err(Overloaded::go("not here", Duration::from_secs(1), elsewhere.clone()));
            }
            Ok(batches.iter().map(|one| state.take(one)).collect())
        })
    }

    async fn positions(&self, query: PositionsQuery) -> Result<Vec<Answer>, Overloaded> {
        self.with(|state| {
            if let Some(elsewhere) = &state.elsewhere {
                return Err(Overloaded::go("not here", Duration::from_secs(1), elsewhere.clone()));
            }
            let answer = |asked: &tributary_common::messages::StreamQuery| match state.runs.get(&asked.stream) {
                Some(run) => answer(asked.stream, run, Verdict::Ok),
                None => {
                    Answer { stream: asked.stream, next: None, committed: None, owner: None, verdict: Verdict::Unknown }
                }
            };
            Ok(query.streams.iter().map(answer).collect())
        })
    }

    async fn reports(&self, reports: Vec<Report>) -> Result<Vec<ReportAnswer>, Overloaded> {
        self.with(|state| {
            if state.full {
                return Err(Overloaded::new("full", Duration::from_secs(1)));
            }
            if let Some(elsewhere) = &state.elsewhere {
                return Err(Overloaded::go("not here", Duration::from_secs(1), elsewhere.clone()));
            }
            let answers = reports.iter().map(|report| ReportAnswer { heard: report.number, ..report.answer() });
            let answers = answers.collect();
            state.reports.extend(reports);
            Ok(answers)
        })
    }

    async fn status(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    fn ready(&self) -> Result<(), String> {
        Ok(())
    }
}

fn answer(stream: StreamId, run: &Run, verdict: Verdict) -> Answer {
    Answer { stream, next: Some(run.next()), committed: Some(run.committed()), owner: None, verdict }
}

impl ParentState {
    fn take(&mut self, received: &Received) -> Answer {
        self.offers += 1;
        let header = &received.batch.header;
        let stream = header.stream;
        if let Some(verdict) = &self.says {
            return Answer { stream, next: None, committed: None, owner: None, verdict: verdict.clone() };
        }
        let run = self.runs.entry(stream).or_insert_with(|| Run::begin(header.committed));
        run.commit(header.committed);
        let offer = run.offer(header.start, header.end);
        if offer == Offer::Take {
            let place = Place { segment: 0, offset: self.offers, len: 0 };
            run.push(Entry { start: header.start, end: header.end, place, received_ms: 0 });
            run.settle();
            let raw = received.frames[0].decode(&received.batch.body).expect("decodes");
            let stored = self.stored.entry(stream).or_default();
            for (offset, byte) in (header.start.offset..).zip(raw) {
                assert_eq!(*stored.entry(offset).or_insert(byte), byte, "the bytes of a stream don't change");
            }
        }
        if self.commits {
            run.commit(run.next());
        }
        answer(stream, run, if offer == Offer::Beyond { Verdict::Expected } else { Verdict::Ok })
    }
}

/// An address on which nobody listens, and somebody may later: of this machine, and no other test's.
async fn free_address() -> SocketAddr {
    static NEXT: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(2);
    let own = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let listener = tokio::net::TcpListener::bind(SocketAddr::from(([127, 0, 0, own], 0))).await.expect("a port");
    listener.local_addr().expect("an address")
}

struct Running {
    edge: Edge,
    metrics: Arc<EdgeMetrics>,
    served: Served,
}

impl Running {
    async fn start(dir: &Path, parents: &[SocketAddr]) -> Self {
        Self::start_with(dir, parents, |_| ()).await
    }

    async fn start_with(dir: &Path, parents: &[SocketAddr], change: impl FnOnce(&mut EdgeOptions)) -> Self {
        let short = BackoffLimits { initial: Duration::from_millis(10), max: Duration::from_millis(50) };
        let mut options = EdgeOptions {
            spool: SpoolLimits { max_bytes: 1 << 20, segment_bytes: 1000 },
            sync_interval: Duration::from_millis(1),
            max_age: Duration::from_secs(10_000_000_000),
            max_set_aside_bytes: 1 << 20,
            forward: ForwardLimits {
                poll_interval: Duration::from_millis(20),
                rest: Duration::from_millis(10),
                max_rest: Duration::from_millis(50),
                pool: PoolOptions::new(short, Duration::from_millis(50)),
                ..ForwardLimits::default()
            },
            client: ClientOptions {
                connect_timeout: Duration::from_secs(5),
                request_timeout: Duration::from_secs(10),
                max_idle_connections: 4,
            },
            lanes: LaneCount::ONE,
            routes: vec![
                parents.iter().map(|address| Endpoint::at(&address.to_string()).expect("an address")).collect(),
            ],
        };
        change(&mut options);
        let folders = loop {
            // A process that was killed is gone when its lock is.
            match Folders::open(dir) {
                Err(StartError::InUse(_)) => tokio::task::yield_now().await,
                opened => break opened.expect("opens"),
            }
        };
        let metrics: Arc<EdgeMetrics> = Arc::default();
        let edge = Edge::start(options, folders, Arc::clone(&metrics)).await.expect("starts");
        let served = serve_tier(edge.clone()).await;
        Self { edge, metrics, served }
    }

    fn address(&self) -> SocketAddr {
        self.served.address
    }

    /// Ends it as a kill would: nothing is finished.
    fn kill(self) {}

    async fn committed(&self, stream: StreamId) -> u64 {
        position(self.address(), stream).await.committed.map_or(0, |committed| committed.offset)
    }
}

/// Waits until something is so. What never comes is ended by the test runner, or by a person.
async fn until<F: Future<Output = bool>>(what: &str, mut is_so: impl FnMut() -> F) {
    let mut tries = 0_u32;
    while !is_so().await {
        tries += 1;
        assert!(tries < 6000, "waited a minute in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn batches(from: u64, to: u64, committed: u64) -> Vec<tributary_common::batch::Batch> {
    (from / 100..to / 100).map(|n| batch(S, n * 100, n * 100 + 100, committed)).collect()
}

/// The length of a spool file without what fills its last block up.
fn records_len(bytes: &[u8]) -> usize {
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
}

fn offsets(position: Option<Position>) -> Option<u64> {
    position.map(|position| position.offset)
}

#[tokio::test]
async fn batches_go_up_and_committed_comes_down() {
    let dir = tempfile::tempdir().expect("a directory");
    let parent = Parent::default();
    let above = serve_tier(parent.clone()).await;
    let edge = Running::start(dir.path(), &[above.address]).await;
    let answers = offer(edge.address(), &batches(0, 1000, 0)).await;
    assert!(answers.iter().all(|answer| answer.verdict == Verdict::Ok && offsets(answer.next) == Some(1000)));
    assert!(answers.iter().all(|answer| offsets(answer.committed) == Some(0)), "nothing is committed yet");
    until("the parent has all", || async { parent.stored(S) == content(S, 0, 1000) }).await;
    assert_eq!(edge.committed(S).await, 0, "what the parent has is not yet what the sink has");
    assert_eq!(edge.metrics.read_back.get(), 0, "what came just now is sent on from memory");
    parent.commit();
    until("committed comes down", || async { edge.committed(S).await == 1000 }).await;
    let spool = dir.path().join("spool");
    until("the files go", || async { std::fs::read_dir(&spool).expect("lists").count() <= 1 }).await;
    until("the status shows it", || async { edge.edge.status().await["spool"]["batches"] == 0 }).await;
    assert_eq!(edge.edge.ready(), Ok(()));
}

#[tokio::test]
async fn nobody_hears_of_other_bytes_before_those_that_are_held_are_committed() {
    let dir = tempfile::tempdir().expect("a directory");
    let parent = Parent::default();
    let above = serve_tier(parent.clone()).await;
    let edge = Running::start(dir.path(), &[above.address]).await;
    offer(edge.address(), &batches(0, 200, 0)).await;
    let other = |offset| Position { offset, tail: TailHash(7) };
    let batch = batch_between(S, at(S, 100), other(200), 0);
    let answer = offer(edge.address(), std::slice::from_ref(&batch)).await.remove(0);
    assert!(matches!(answer.verdict, Verdict::Wait { .. }), "{answer:?}");
    until("the parent has all", || async { parent.stored(S) == content(S, 0, 200) }).await;
    parent.commit();
    until("committed comes down", || async { edge.committed(S).await == 200 }).await;
    let answer = offer(edge.address(), &[batch]).await.remove(0);
    assert_eq!(answer.verdict, Verdict::Diverged { history: vec![at(S, 200)] });
}

#[tokio::test]
async fn while_the_parent_is_away_batches_are_kept_through_kills() {
    let dir = tempfile::tempdir().expect("a directory");
    let above = free_address().await;
    for from in [0, 300, 600] {
        let edge = Running::start(dir.path(), &[above]).await;
        if from > 0 {
            assert_eq!(offsets(position(edge.address(), S).await.next), Some(from), "what was promised is there");
        }
        let answers = offer(edge.address(), &batches(from, from + 300, 0)).await;
        assert_eq!(offsets(answers[2].next), Some(from + 300));
        edge.kill();
    }
    let parent = Parent::committing();
    let _above = serve_on(parent.clone(), above).await;
    let edge = Running::start(dir.path(), &[above]).await;
    until("all is committed", || async { edge.committed(S).await == 900 }).await;
    assert_eq!(parent.stored(S), content(S, 0, 900));
    assert_eq!(parent.with(|state| state.offers), 9, "each went up once");
}

#[tokio::test]
async fn a_lost_spool_sends_the_sender_back_to_what_is_committed() {
    let dir = tempfile::tempdir().expect("a directory");
    let parent = Parent::default();
    let above = serve_tier(parent.clone()).await;
    let edge = Running::start(dir.path(), &[above.address]).await;
    offer(edge.address(), &batches(0, 300, 0)).await;
    until("the parent has all", || async { parent.stored(S).len() == 300 }).await;
    parent.commit();
    until("committed comes down", || async { edge.committed(S).await == 300 }).await;
    offer(edge.address(), &batches(300, 500, 300)).await;
    edge.kill();
    let fresh = tempfile::tempdir().expect("a directory");
    let edge = Running::start(fresh.path(), &[above.address]).await;
    let answers = offer(edge.address(), &batches(500, 600, 300)).await;
    assert_eq!((answers[0].verdict.clone(), offsets(answers[0].next)), (Verdict::Expected, Some(300)));
    offer(edge.address(), &batches(300, 600, 300)).await;
    until("the parent has all", || async { parent.stored(S) == content(S, 0, 600) }).await;
}

#[tokio::test]
async fn a_parent_that_lost_its_spool_gets_everything_again_from_committed() {
    let dir = tempfile::tempdir().expect("a directory");
    let parent = Parent::default();
    let above = serve_tier(parent.clone()).await;
    let edge = Running::start(dir.path(), &[above.address]).await;
    offer(edge.address(), &batches(0, 500, 0)).await;
    until("the parent has all", || async { parent.stored(S).len() == 500 }).await;
    parent.with(|state| {
        let run = state.runs.get_mut(&S).expect("there is a run");
        run.commit(at(S, 200));
    });
    until("some is committed", || async { edge.committed(S).await == 200 }).await;
    parent.with(|state| state.runs.clear());
    // Nothing new is sent: the loss is noticed by asking.
    until("it is sent again", || async {
        parent.with(|state| {
            state.runs.get(&S).is_some_and(|run| run.next() == at(S, 500) && run.committed() == at(S, 200))
        })
    })
    .await;
    assert_ne!(edge.metrics.read_back.get(), 0, "what is sent again is on the disk only");
    parent.commit();
    until("all is committed", || async { edge.committed(S).await == 500 }).await;
    assert_eq!(parent.stored(S), content(S, 0, 500));
}

#[tokio::test]
async fn a_spool_that_was_restored_from_an_older_copy_lets_go_of_what_is_committed_and_goes_on() {
    let (dir, copy) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
    let parent = Parent::committing();
    parent.with(|state| state.full = true);
    let above = serve_tier(parent.clone()).await;
    let edge = Running::start(dir.path(), &[above.address]).await;
    offer(edge.address(), &batches(0, 300, 0)).await;
    edge.kill();
    let copy_to = |from: &Path, to: &Path| {
        std::fs::create_dir_all(to).expect("made");
        for file in std::fs::read_dir(from).expect("lists").flatten() {
            std::fs::copy(file.path(), to.join(file.file_name())).expect("copied");
        }
    };
    copy_to(&dir.path().join("spool"), &copy.path().join("spool"));
    parent.with(|state| state.full = false);
    let edge = Running::start(dir.path(), &[above.address]).await;
    offer(edge.address(), &batches(300, 500, 0)).await;
    until("all is committed", || async { edge.committed(S).await == 500 }).await;
    edge.kill();
    let edge = Running::start(copy.path(), &[above.address]).await;
    until("it hears what is committed", || async { edge.committed(S).await == 500 }).await;
    offer(edge.address(), &batches(500, 600, 500)).await;
    until("the rest is committed", || async { edge.committed(S).await == 600 }).await;
    assert_eq!(parent.stored(S), content(S, 0, 600));
    until("nothing is left of the copy", || async { edge.edge.status().await["spool"]["batches"] == 0 }).await;
}

#[tokio::test]
async fn another_parent_takes_over_when_one_is_gone_or_full() {
    let dir = tempfile::tempdir().expect("a directory");
    let (first, second) = (Parent::committing(), Parent::committing());
    let (away, above) = (free_address().await, serve_tier(second.clone()).await);
    let edge = Running::start(dir.path(), &[away, above.address]).await;
    offer(edge.address(), &batches(0, 300, 0)).await;
    until("the second has all", || async { edge.committed(S).await == 300 }).await;
    assert_eq!(second.stored(S), content(S, 0, 300));
    drop(above);
    let _back = serve_on(first.clone(), away).await;
    offer(edge.address(), &batches(300, 500, 300)).await;
    until("the first has the rest", || async { edge.committed(S).await == 500 }).await;
    assert_eq!(first.stored(S), content(S, 300, 500));
}

#[tokio::test]
async fn batches_and_questions_follow_a_lane_to_the_node_that_owns_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let (wrong, owner) = (Parent::committing(), Parent::committing());
    let (wrong_served, owner_served) = (serve_tier(wrong.clone()).await, serve_tier(owner.clone()).await);
    let to = |address: SocketAddr| Some(Elsewhere::Node(Endpoint::at(&address.to_string()).expect("an address")));
    wrong.with(|state| state.elsewhere = to(owner_served.address));
    let edge = Running::start(dir.path(), &[wrong_served.address, owner_served.address]).await;
    let asked = position(edge.address(), StreamId(99)).await;
    assert_eq!(asked.verdict, Verdict::Unknown, "the question was answered by the owner");
    offer(edge.address(), &batches(0, 300, 0)).await;
    until("the owner has all", || async { edge.committed(S).await == 300 }).await;
    // The lane moves back.
    wrong.with(|state| state.elsewhere = None);
    owner.with(|state| state.elsewhere = to(wrong_served.address));
    offer(edge.address(), &batches(300, 500, 300)).await;
    until("the new owner has the rest", || async { edge.committed(S).await == 500 }).await;
    assert_eq!(owner.stored(S), content(S, 0, 300));
    assert_eq!(wrong.stored(S), content(S, 300, 500));
}

#[tokio::test]
async fn a_question_alone_finds_the_parent_that_lives() {
    let dir = tempfile::tempdir().expect("a directory");
    let (away, above) = (free_address().await, serve_tier(Parent::committing()).await);
    let edge = Running::start(dir.path(), &[away, above.address]).await;
    until("the living one is asked", || async { position(edge.address(), S).await.verdict == Verdict::Unknown }).await;
}

#[tokio::test]
async fn a_node_that_is_drained_sends_its_children_to_a_sibling_and_ends_when_all_is_committed() {
    let (root, spools) = (Parent::default(), [tempfile::tempdir(), tempfile::tempdir(), tempfile::tempdir()]);
    let [first, second, below] = spools.map(|dir| dir.expect("a directory"));
    let above = serve_tier(root.clone()).await;
    let drained = Running::start(first.path(), &[above.address]).await;
    let sibling = Running::start(second.path(), &[above.address]).await;
    let child = Running::start(below.path(), &[drained.address(), sibling.address()]).await;
    offer(child.address(), &batches(0, 300, 0)).await;
    until("it is on its way", || async { root.stored(S).len() == 300 }).await;
    let drain = tokio::spawn({
        let edge = drained.edge.clone();
        async move { edge.drain().await }
    });
    until("it says so", || async { drained.edge.status().await["draining"] == true }).await;
    offer(child.address(), &batches(300, 500, 0)).await;
    until("the sibling has the rest", || async { root.stored(S).len() == 500 }).await;
    assert!(!drain.is_finished(), "nothing is committed yet");
    let parents = child.edge.status().await["parents"][0].clone();
    assert_eq!(parents["failures"], 0, "{parents}");
    root.commit();
    drain.await.expect("it is empty");
    until("all is committed", || async { child.committed(S).await == 500 }).await;
    assert_eq!(root.stored(S), content(S, 0, 500));
}

#[tokio::test]
async fn a_full_parent_is_waited_for() {
    let dir = tempfile::tempdir().expect("a directory");
    let parent = Parent::committing();
    parent.with(|state| state.full = true);
    let above = serve_tier(parent.clone()).await;
    let edge = Running::start(dir.path(), &[above.address]).await;
    offer(edge.address(), &batches(0, 300, 0)).await;
    until("it was refused", || async { edge.edge.status().await["parents"][0]["failures"].as_u64() > Some(0) }).await;
    parent.with(|state| state.full = false);
    until("all is committed", || async { edge.committed(S).await == 300 }).await;
}

#[tokio::test]
async fn the_last_word_goes_down_and_the_batches_are_set_aside_to_be_offered_again_by_hand() {
    let last_words =
        [Verdict::Diverged { history: vec![at(S, 100)] }, Verdict::Unknown, Verdict::Refused { reason: "no".into() }];
    for verdict in last_words {
        let dir = tempfile::tempdir().expect("a directory");
        let parent = Parent::committing();
        parent.with(|state| state.says = Some(verdict.clone()));
        let above = serve_tier(parent.clone()).await;
        let edge = Running::start(dir.path(), &[above.address]).await;
        offer(edge.address(), &batches(0, 300, 0)).await;
        until("the last word comes down", || async { position(edge.address(), S).await.verdict == verdict }).await;
        let later = offer(edge.address(), &batches(300, 400, 0)).await;
        assert_eq!(later[0].verdict, verdict, "also to what would have continued the run");
        let set_aside = dir.path().join("set-aside");
        let files = || std::fs::read_dir(&set_aside).expect("lists").map(|file| file.expect("is there").path());
        until("the status shows it", || async {
            let status = edge.edge.status().await;
            status["set_aside"]["bytes"].as_u64() > Some(0) && status["spool"]["batches"] == 0
        })
        .await;
        let kept: Vec<u8> = files().flat_map(|file| std::fs::read(file).expect("reads")).collect();
        // What was set aside is a request body, and a stream begins anew where it is committed.
        parent.with(|state| state.says = None);
        let (status, said) = post(edge.address(), BATCHES_PATH, BATCHES_CONTENT_TYPE, kept).await;
        assert_eq!(status, 200, "{said}");
        until("all is committed", || async { edge.committed(S).await == 300 }).await;
        assert_eq!(parent.stored(S), content(S, 0, 300));
    }
}

#[tokio::test]
async fn batches_stay_in_the_spool_when_there_is_no_room_to_set_them_aside() {
    let dir = tempfile::tempdir().expect("a directory");
    let parent = Parent::default();
    parent.with(|state| state.says = Some(Verdict::Unknown));
    let above = serve_tier(parent).await;
    let edge = Running::start_with(dir.path(), &[above.address], |options| options.max_set_aside_bytes = 10).await;
    offer(edge.address(), &batches(0, 300, 0)).await;
    until("it could not be set aside", || async { edge.edge.status().await["set_aside"]["waiting"] == 1 }).await;
    let status = edge.edge.status().await;
    assert_eq!((&status["spool"]["batches"], &status["set_aside"]["bytes"]), (&3.into(), &0.into()));
    edge.kill();
    let again = Parent::committing();
    let above = serve_tier(again.clone()).await;
    let _edge = Running::start(dir.path(), &[above.address]).await;
    until("nothing was lost", || async { again.stored(S) == content(S, 0, 300) }).await;
}

#[tokio::test]
async fn what_is_too_old_is_set_aside_and_a_sender_that_has_it_brings_it_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let above = free_address().await;
    let edge = Running::start(dir.path(), &[above]).await;
    offer(edge.address(), &batches(0, 300, 0)).await;
    edge.kill();
    // The batches of the tests were received in 1970.
    let start = |options: &mut EdgeOptions| options.max_age = Duration::from_secs(3600);
    let edge = Running::start_with(dir.path(), &[above], start).await;
    until("they are set aside", || async { edge.edge.status().await["spool"]["batches"] == 0 }).await;
    assert_eq!(std::fs::read_dir(dir.path().join("set-aside")).expect("lists").count(), 1);
    let answers = offer(edge.address(), &batches(300, 400, 0)).await;
    assert_eq!((answers[0].verdict.clone(), offsets(answers[0].next)), (Verdict::Expected, Some(0)));
}

#[tokio::test]
async fn a_stream_that_is_not_known_here_is_asked_for_above() {
    let dir = tempfile::tempdir().expect("a directory");
    let parent = Parent::default();
    let address = free_address().await;
    let edge = Running::start(dir.path(), &[address]).await;
    assert!(matches!(position(edge.address(), S).await.verdict, Verdict::Wait { .. }), "the parent is away");
    let _above = serve_on(parent.clone(), address).await;
    until("the parent says that it knows nothing", || async {
        position(edge.address(), S).await.verdict == Verdict::Unknown
    })
    .await;
    parent.with(|state| {
        let mut run = Run::begin(at(S, 200));
        run.push(Entry {
            start: at(S, 200),
            end: at(S, 300),
            place: Place { segment: 0, offset: 0, len: 0 },
            received_ms: 0,
        });
        run.settle();
        state.runs.insert(S, run);
    });
    let known = position(edge.address(), S).await;
    let told = (known.verdict, offsets(known.committed), offsets(known.next));
    assert_eq!(told, (Verdict::Ok, Some(200), Some(200)), "what is above committed would have to be here too");
}

#[tokio::test]
async fn a_batch_that_rots_on_the_disk_comes_again_from_its_sender() {
    let dir = tempfile::tempdir().expect("a directory");
    let parent = Parent::default();
    let above = serve_tier(parent.clone()).await;
    let edge = Running::start(dir.path(), &[above.address]).await;
    offer(edge.address(), &batches(0, 500, 0)).await;
    // Once all is above, nothing of it is in memory any more.
    until("all is above", || async { parent.stored(S).len() == 500 }).await;
    // How the batches were grouped decides how many files there are; the next one may have been begun, and hold none.
    let files = std::fs::read_dir(dir.path().join("spool")).expect("lists").map(|file| file.expect("is there").path());
    let (mut bytes, file) = files
        .map(|file| (std::fs::read(&file).expect("reads"), file))
        .max_by_key(|(bytes, _)| records_len(bytes))
        .expect("a file");
    let place = records_len(&bytes) / 2;
    bytes[place] ^= 1;
    // In place: the edge has the file open.
    std::fs::write(&file, bytes).expect("writes");
    parent.with(|state| {
        state.runs.clear();
        state.commits = true;
    });
    until("the run was cut", || async { offsets(position(edge.address(), S).await.next) < Some(500) }).await;
    until("what is good goes up", || async {
        let answer = position(edge.address(), S).await;
        answer.next == answer.committed
    })
    .await;
    let next = offsets(position(edge.address(), S).await.next).expect("is told");
    assert_eq!(offer(edge.address(), &batches(500, 600, 0)).await[0].verdict, Verdict::Expected);
    offer(edge.address(), &batches(next, 600, next)).await;
    until("all is committed", || async { edge.committed(S).await == 600 }).await;
    assert_eq!(parent.stored(S), content(S, 0, 600));
    assert_eq!(std::fs::read_dir(dir.path().join("set-aside")).expect("lists").count(), 1);
}

#[tokio::test]
async fn the_smallest_spool_that_the_topology_allows_has_room_for_every_request() {
    let dir = tempfile::tempdir().expect("a directory");
    let above = free_address().await;
    let _above = serve_on(Parent::committing(), above).await;
    // The topology allows no requests of less than a block.
    let largest = body(&batches(0, 100, 0)).len().max(BLOCK_BYTES) as u64;
    let small = |options: &mut EdgeOptions| options.spool.max_bytes = options.spool.segment_bytes + 2 * largest;
    let edge = Running::start_with(dir.path(), &[above], small).await;
    for sent in (0..2000).step_by(100) {
        let whole = body(&batches(sent, sent + 100, 0));
        until("the request is taken", || async {
            post(edge.address(), BATCHES_PATH, BATCHES_CONTENT_TYPE, whole.clone()).await.0 == 200
        })
        .await;
    }
}

#[tokio::test]
async fn a_full_spool_puts_senders_off_until_the_parent_has_taken_some() {
    let dir = tempfile::tempdir().expect("a directory");
    let above = free_address().await;
    let small = |options: &mut EdgeOptions| options.spool.max_bytes = 5000;
    let edge = Running::start_with(dir.path(), &[above], small).await;
    let mut sent = 0;
    loop {
        let whole = body(&batches(sent, sent + 100, 0));
        let (status, said) = post(edge.address(), BATCHES_PATH, BATCHES_CONTENT_TYPE, whole).await;
        if status == 503 {
            assert!(said["error"].as_str().expect("a text").contains("the spool is full"), "{said}");
            break;
        }
        assert_eq!(status, 200, "{said}");
        sent += 100;
    }
    assert!(sent > 0);
    let parent = Parent::committing();
    let _above = serve_on(parent.clone(), above).await;
    until("there is room again", || async {
        post(edge.address(), BATCHES_PATH, BATCHES_CONTENT_TYPE, body(&batches(sent, sent + 100, 0))).await.0 == 200
    })
    .await;
    until("all is committed", || async { edge.committed(S).await == sent + 100 }).await;
    assert_eq!(parent.stored(S), content(S, 0, sent + 100));
}

#[tokio::test]
async fn two_processes_do_not_share_a_data_directory() {
    let dir = tempfile::tempdir().expect("a directory");
    let _first = Folders::open(dir.path()).expect("opens");
    assert!(matches!(Folders::open(dir.path()), Err(StartError::InUse(_))));
}

#[tokio::test]
async fn a_stop_finishes_what_is_being_written() {
    let dir = tempfile::tempdir().expect("a directory");
    let above = free_address().await;
    let edge = Running::start(dir.path(), &[above]).await;
    let (address, stopping) = (edge.address(), edge.edge.clone());
    let whole = body(&batches(0, 300, 0));
    let (sent, ()) = tokio::join!(post(address, BATCHES_PATH, BATCHES_CONTENT_TYPE, whole), stopping.stop());
    drop((edge, stopping));
    let edge = Running::start(dir.path(), &[above]).await;
    let reached = offer(edge.address(), &batches(0, 100, 0)).await[0].next;
    // Either it came too late and was told so, or it is there.
    match sent.0 {
        200 => assert_eq!(offsets(reached), Some(300)),
        503 => assert!(offsets(reached) <= Some(300)),
        other => panic!("status {other}: {}", sent.1),
    }
}
