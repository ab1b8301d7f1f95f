//! Edges that live in the test's process and speak the protocol over real sockets, a root behind them that keeps every
//! record it is given, and agents over real files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tributary_agent::config::{AgentConfig, Surroundings};
use tributary_common::batch::{Batch, BatchHeader};
use tributary_common::bucket::BucketSize;
use tributary_common::frame::{Codec, cut_slice};
use tributary_common::http::body::{BodyPace, TimedBody};
use tributary_common::http::server::{ServerLimits, ServerMetrics, serve};
use tributary_common::ids::{CategoryName, Epoch, LaneCount, StreamId};
use tributary_common::messages::{
    Answer, Answers, BATCHES_PATH, CATEGORIES_PATH, Categories, CategorySettings, POSITIONS_PATH, PositionsQuery,
    REPORTS_PATH, SIBLING_HEADER, Verdict,
};
use tributary_common::position::Position;
use tributary_common::ranges::RangeSet;
use tributary_common::report::{Report, ReportAnswer, ReportAnswers, Reports, Session, StreamOffset};

use crate::machine::AgentProcess;

/// How long a test waits for something that must come.
const PATIENCE: Duration = Duration::from_secs(60);

/// One stream at the root.
#[derive(Debug, Clone)]
pub(crate) struct RootStream {
    pub(crate) base: Position,
    has: RangeSet,
    pub(crate) committed: Position,
    ends: BTreeMap<u64, Position>,
}

impl RootStream {
    fn next(&self) -> Position {
        let end = self.has.unbroken_end(self.base.offset);
        self.ends.range(..=end).next_back().map_or(self.base, |(_, end)| *end)
    }
}

/// What the root has.
#[derive(Debug, Default)]
pub(crate) struct Root {
    pub(crate) streams: BTreeMap<StreamId, RootStream>,
    /// Stored records, without their newlines, with the bucket's start in seconds.
    pub(crate) records: Vec<(i64, Vec<u8>)>,
    /// Whether what is stored is committed at once.
    pub(crate) committing: bool,
    /// When set, every batch is answered so.
    pub(crate) answer: Option<Verdict>,
    pub(crate) batches: u64,
}

impl Root {
    fn answer(&self, stream: StreamId, verdict: Verdict) -> Answer {
        let known = self.streams.get(&stream);
        Answer {
            stream,
            next: known.map(RootStream::next),
            committed: known.map(|known| known.committed),
            owner: None,
            verdict,
        }
    }

    fn offer(&mut self, batch: &Batch) -> Answer {
        let header = &batch.header;
        let frames = batch.verify().expect("only good batches come");
        if let Some(verdict) = &self.answer {
            return self.answer(header.stream, verdict.clone());
        }
        let verdict = self.verdict(header);
        if verdict == Verdict::Ok {
            self.batches += 1;
            let stream = self.streams.entry(header.stream).or_insert_with(|| RootStream {
                base: header.base,
                has: RangeSet::new(),
                committed: header.base,
                ends: BTreeMap::from([(header.base.offset, header.base)]),
            });
            for (frame, bytes) in frames.iter().zip(batch.frames()) {
                let decoded = frame.decode(&bytes).expect("it decompresses");
                let descriptor = &frame.slices[0];
                let runs: RangeSet = descriptor.runs.iter().map(tributary_common::frame::Run::range).collect();
                let missing: Vec<_> = runs.iter().flat_map(|run| stream.has.missing(run)).collect();
                let stored = if missing == runs.iter().collect::<Vec<_>>() {
                    decoded
                } else {
                    cut_slice(descriptor, &decoded, &missing).expect("unaltered").map_or(Vec::new(), |cut| cut.1)
                };
                for run in missing {
                    stream.has.insert(run);
                }
                for record in stored.split_inclusive(|byte| *byte == b'\n') {
                    let record = record.strip_suffix(b"\n").expect("records end with a newline");
                    self.records.push((frame.bucket.start_s(), record.to_vec()));
                }
            }
            stream.ends.insert(header.end.offset, header.end);
            if self.committing {
                stream.committed = stream.next();
            }
        }
        self.answer(header.stream, verdict)
    }

    fn verdict(&self, header: &BatchHeader) -> Verdict {
        let Some(stream) = self.streams.get(&header.stream) else {
            return if header.start == header.base { Verdict::Ok } else { Verdict::Unknown };
        };
        let contradicts = |position: Position| stream.ends.get(&position.offset).is_some_and(|end| *end != position);
        if header.start.offset > stream.next().offset {
            Verdict::Expected
        } else if contradicts(header.start) || contradicts(header.end) {
            Verdict::Diverged { history: stream.ends.values().copied().collect() }
        } else {
            Verdict::Ok
        }
    }

    fn query(&self, stream: StreamId, claimed: Option<Position>) -> Answer {
        if let Some(verdict) = &self.answer {
            return self.answer(stream, verdict.clone());
        }
        let verdict = match (self.streams.get(&stream), claimed) {
            (None, _) => Verdict::Unknown,
            (Some(known), Some(claimed)) if claimed.offset > known.next().offset => Verdict::Expected,
            _ => Verdict::Ok,
        };
        self.answer(stream, verdict)
    }

    /// The records as lines, sorted.
    pub(crate) fn lines(&self) -> Vec<String> {
        let mut lines: Vec<String> =
            self.records.iter().map(|(_, record)| String::from_utf8_lossy(record).into_owned()).collect();
        lines.sort();
        lines
    }
}

#[derive(Debug)]
struct Held {
    committed: Position,
    batches: Vec<Batch>,
}

#[derive(Debug)]
struct EdgeState {
    root: Arc<Mutex<Root>>,
    spool: BTreeMap<StreamId, Held>,
    forwarding: bool,
    status: Option<StatusCode>,
    /// A header of every answer.
    header: Option<(&'static str, String)>,
    requests: u64,
    /// When each request with batches had come in, and its bytes.
    arrivals: Vec<(Instant, usize)>,
    refused_line: Option<&'static str>,
    awaited: Vec<StreamOffset>,
    /// The reports, each with what was committed of each stream when it came.
    reports: Vec<(Report, BTreeMap<StreamId, u64>)>,
    categories: Categories,
}

impl EdgeState {
    fn offer(&mut self, batch: Batch) -> Answer {
        let header = &batch.header;
        let stream = header.stream;
        let held =
            self.spool.entry(stream).or_insert_with(|| Held { committed: header.committed, batches: Vec::new() });
        if header.committed.offset > held.committed.offset {
            held.committed = header.committed;
        }
        let committed = held.committed;
        held.batches.retain(|batch| batch.header.end.offset > committed.offset);
        let end = held.batches.last().map_or(committed, |batch| batch.header.end);
        let mut verdict = Verdict::Ok;
        if header.start.offset > end.offset {
            verdict = Verdict::Expected;
        } else if header.end.offset > end.offset {
            held.batches.push(batch);
        }
        self.forward(stream).unwrap_or_else(|| self.answer(stream, verdict))
    }

    fn answer(&self, stream: StreamId, verdict: Verdict) -> Answer {
        let held = &self.spool[&stream];
        let next = held.batches.last().map_or(held.committed, |batch| batch.header.end);
        Answer { stream, next: Some(next), committed: Some(held.committed), owner: None, verdict }
    }

    /// Hands what is held to the root; returns what the root says if that is final.
    fn forward(&mut self, stream: StreamId) -> Option<Answer> {
        if !self.forwarding {
            return None;
        }
        let mut root = self.root.lock().expect("no panic");
        let held = self.spool.get_mut(&stream)?;
        for batch in &held.batches {
            let answer = root.offer(batch);
            if answer.verdict != Verdict::Ok {
                self.spool.remove(&stream);
                return Some(answer);
            }
            if let Some(committed) = answer.committed.filter(|told| told.offset > held.committed.offset) {
                held.committed = committed;
            }
        }
        let committed = held.committed.offset;
        held.batches.retain(|batch| batch.header.end.offset > committed);
        None
    }

    fn query(&mut self, query: &PositionsQuery) -> Vec<Answer> {
        let mut answers = Vec::new();
        for one in &query.streams {
            let final_answer = self.forward(one.stream);
            let holds = self.spool.get(&one.stream).is_some_and(|held| !held.batches.is_empty());
            answers.push(match final_answer {
                Some(answer) => answer,
                None if holds => self.answer(one.stream, Verdict::Ok),
                None => self.root.lock().expect("no panic").query(one.stream, one.committed),
            });
        }
        answers
    }
}

/// An edge.
pub(crate) struct Edge {
    pub(crate) url: String,
    state: Arc<Mutex<EdgeState>>,
    stop: CancellationToken,
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Edge {
    /// Starts an edge in front of `root`.
    pub(crate) async fn start(root: &Arc<Mutex<Root>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let settings = CategorySettings { bucket_s: BucketSize::HOUR, codec: Codec::Gzip, close_delay_ms: 0 };
        let state = Arc::new(Mutex::new(EdgeState {
            root: Arc::clone(root),
            spool: BTreeMap::new(),
            forwarding: true,
            status: None,
            header: None,
            requests: 0,
            arrivals: Vec::new(),
            refused_line: None,
            awaited: Vec::new(),
            reports: Vec::new(),
            categories: Categories {
                lanes: LaneCount::ONE,
                categories: BTreeMap::from([("app".parse::<CategoryName>().expect("valid"), settings)]),
            },
        }));
        let stop = CancellationToken::new();
        let second = Duration::from_secs(1);
        let limits = ServerLimits {
            max_connections: 100,
            header_timeout: 60 * second,
            body: BodyPace { idle_timeout: 10 * second, min_rate: 1 },
            write_timeout: 10 * second,
            drain_timeout: Duration::ZERO,
        };
        let served = Arc::clone(&state);
        let handler = move |request| {
            let state = Arc::clone(&served);
            async move { handle(&state, request).await }
        };
        tokio::spawn(serve(listener, limits, ServerMetrics::default(), stop.clone(), handler));
        Self { url, state, stop }
    }

    fn state(&self) -> MutexGuard<'_, EdgeState> {
        self.state.lock().expect("no panic")
    }

    /// From now on every request is answered with this status.
    pub(crate) fn fail(&self, status: Option<StatusCode>) {
        self.state().status = status;
    }

    /// From now on every request is answered as by a root that doesn't own the lane, but the one at `url` does.
    pub(crate) fn redirect(&self, url: &str) {
        self.state().header = Some(("location", url.to_owned()));
        self.fail(Some(StatusCode::TEMPORARY_REDIRECT));
    }

    /// From now on every request is answered as by an edge that is being emptied.
    pub(crate) fn drain(&self) {
        self.state().header = Some((SIBLING_HEADER, "sibling".to_owned()));
        self.fail(Some(StatusCode::SERVICE_UNAVAILABLE));
    }

    /// Whether it hands what it gets to the root.
    pub(crate) fn forward(&self, forwarding: bool) {
        self.state().forwarding = forwarding;
    }

    /// Loses its spool.
    pub(crate) fn lose_spool(&self) {
        self.state().spool.clear();
    }

    /// Has these categories from now on; returns those before.
    pub(crate) fn set_categories(
        &self,
        categories: BTreeMap<CategoryName, CategorySettings>,
    ) -> BTreeMap<CategoryName, CategorySettings> {
        std::mem::replace(&mut self.state().categories.categories, categories)
    }

    /// Answers 400 to every request with a batch of which a slice begins so.
    pub(crate) fn refuse_first_line(&self, line: &'static str) {
        self.state().refused_line = Some(line);
    }

    /// Waits for these offsets, by what it answers to reports.
    pub(crate) fn awaits(&self, awaited: Vec<StreamOffset>) {
        self.state().awaited = awaited;
    }

    /// The reports that came, each with what was committed of each stream then.
    pub(crate) fn reports(&self) -> Vec<(Report, BTreeMap<StreamId, u64>)> {
        self.state().reports.clone()
    }

    /// Batches in its spool.
    pub(crate) fn held(&self) -> usize {
        self.state().spool.values().map(|held| held.batches.len()).sum()
    }

    /// The requests with batches that it got: when all of each had come, and its bytes.
    pub(crate) fn arrivals(&self) -> Vec<(Instant, usize)> {
        self.state().arrivals.clone()
    }

    /// Requests that it got.
    pub(crate) fn requests(&self) -> u64 {
        self.state().requests
    }
}

async fn handle(state: &Mutex<EdgeState>, request: Request<TimedBody>) -> Response<Full<Bytes>> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let announced = request.headers().get("content-length").is_some();
    let mut body = request.into_body().collect().await.expect("a body").to_bytes();
    let mut state = state.lock().expect("no panic");
    state.requests += 1;
    if path == BATCHES_PATH {
        state.arrivals.push((Instant::now(), body.len()));
    }
    if let Some(status) = state.status {
        let mut answer = answer(status, &serde_json::json!({ "error": "so the test wants" }));
        if let Some((name, value)) = &state.header {
            let value = if *name == "location" { format!("{value}{path}") } else { value.clone() };
            answer.headers_mut().insert(*name, value.parse().expect("a value"));
        }
        return answer;
    }
    match (method, path.as_str()) {
        (Method::GET, CATEGORIES_PATH) => answer(StatusCode::OK, &state.categories),
        (Method::POST, POSITIONS_PATH) => {
            let query = serde_json::from_slice(&body).expect("a query");
            answer(StatusCode::OK, &Answers { answers: state.query(&query) })
        }
        (Method::POST, REPORTS_PATH) => {
            let reports: Reports = serde_json::from_slice(&body).expect("reports");
            assert_eq!(reports.check(), Ok(()));
            let answers = reports.reports.iter().map(|report| ReportAnswer {
                agent: report.agent.clone(),
                category: report.category.clone(),
                run: report.run,
                // As the owner of a lane: a run counts from its first report with its session on.
                heard: report.session.map_or(0, |_| report.number),
                session: Some(Session { epoch: Epoch(1), counter: 1 }),
                rival: None,
                refused: None,
                waiting_for: state.awaited.clone(),
            });
            let answers = ReportAnswers { answers: answers.collect() };
            let committed: BTreeMap<StreamId, u64> = {
                let root = state.root.lock().expect("no panic");
                root.streams.iter().map(|(stream, of)| (*stream, of.committed.offset)).collect()
            };
            state.reports.extend(reports.reports.into_iter().map(|report| (report, committed.clone())));
            answer(StatusCode::OK, &answers)
        }
        (Method::POST, BATCHES_PATH) => {
            assert!(announced, "a body without its length would take the room of the largest");
            let mut batches = Vec::new();
            while !body.is_empty() {
                let batch = Batch::take_from(&mut body).expect("a good batch");
                let frames = batch.verify().expect("a good batch");
                let begins = |line: &str| {
                    let decoded = frames[0].decode(&batch.frames().next().expect("a frame")).expect("it decompresses");
                    decoded.starts_with(line.as_bytes())
                };
                if state.refused_line.is_some_and(begins) {
                    return answer(StatusCode::BAD_REQUEST, &serde_json::json!({ "error": "a bad batch" }));
                }
                batches.push(batch);
            }
            let answers = batches.into_iter().map(|batch| state.offer(batch)).collect();
            answer(StatusCode::OK, &Answers { answers })
        }
        (method, path) => panic!("{method} {path} is not of the protocol"),
    }
}

fn answer(status: StatusCode, body: &impl serde::Serialize) -> Response<Full<Bytes>> {
    let body = serde_json::to_vec(body).expect("serializes");
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert("retry-after", http::HeaderValue::from_static("1"));
    }
    response
}

/// A place with log files, an agent's data, edges and a root.
pub(crate) struct Scene {
    dir: tempfile::TempDir,
    pub(crate) root: Arc<Mutex<Root>>,
    pub(crate) edges: Vec<Edge>,
    /// More of the agent's configuration, and of its source's.
    pub(crate) settings: String,
    pub(crate) source: String,
    /// Where the agent's data lies, if not in the usual place.
    pub(crate) data_dir: Option<PathBuf>,
    /// Where the agent answers its operators, if it does.
    ops: Option<std::net::SocketAddr>,
    /// The pattern of the names of the files that are shipped.
    pub(crate) include: &'static str,
    /// The time between scans.
    pub(crate) refresh_interval: &'static str,
}

impl Scene {
    /// A place with so many edges.
    pub(crate) async fn new(edges: usize) -> Self {
        let root = Arc::new(Mutex::new(Root { committing: true, ..Root::default() }));
        let mut started = Vec::new();
        for _ in 0..edges {
            started.push(Edge::start(&root).await);
        }
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(dir.path().join("logs")).expect("made");
        let (settings, source) = (String::new(), String::new());
        Self {
            dir,
            root,
            edges: started,
            settings,
            source,
            include: "*.log",
            refresh_interval: "100ms",
            data_dir: None,
            ops: None,
        }
    }

    /// The directory in which all lies.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Waits until the agent has been heard of at all.
    pub(crate) async fn answered(&self) {
        let before = self.edges[0].requests();
        wait_for(|| self.edges[0].requests() > before, || "the agent asks nothing".into()).await;
    }

    /// From now on the agent answers its operators.
    pub(crate) fn answers_operators(mut self) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        self.ops = Some(listener.local_addr().expect("an address"));
        self
    }

    /// What the agent answers its operators; empty while it doesn't.
    pub(crate) async fn ask(&self, path: &str) -> String {
        match reqwest::get(format!("http://{}{path}", self.ops.expect("it answers operators"))).await {
            Ok(response) => response.text().await.unwrap_or_default(),
            Err(_) => String::new(),
        }
    }

    /// Waits until the agent's answer fulfills the condition; returns it.
    pub(crate) async fn answer(&self, path: &str, condition: impl Fn(&str) -> bool) -> String {
        let start = Instant::now();
        loop {
            let text = self.ask(path).await;
            if condition(&text) {
                return text;
            }
            assert!(start.elapsed() < PATIENCE, "waited for too long: {path} says {text}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until the agent says that it can do its work.
    pub(crate) async fn ready(&self) {
        self.answer("/readyz", |text| text == "ready\n").await;
    }

    /// A log file's path.
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.dir.path().join("logs").join(name)
    }

    /// The agent's data directory.
    pub(crate) fn data_dir(&self) -> PathBuf {
        self.data_dir.clone().unwrap_or_else(|| self.dir.path().join("data"))
    }

    pub(crate) fn config(&self) -> AgentConfig {
        let here = Surroundings { hostname: "web-1".into(), machine_id: None };
        AgentConfig::parse(Path::new("agent.toml"), &self.config_text(), &here)
            .unwrap_or_else(|errors| panic!("{errors}"))
    }

    fn config_text(&self) -> String {
        let mut endpoints: Vec<String> = self.edges.iter().map(|edge| format!("{:?}", edge.url)).collect();
        if endpoints.is_empty() {
            endpoints.push("\"http://127.0.0.1:1\"".into());
        }
        format!(
            "endpoints = [{}]\nagent_id = \"web-1\"\ndata_dir = {:?}\nrefresh_interval = {:?}\nreport_interval = \"100ms\"\ndrain_timeout = \"5s\"\n{}\n\
             batch = {{ max_bytes = \"64 KiB\", timeout = \"10ms\" }}\nhttp = {{ {} }}\n\
             backoff = {{ initial = \"10ms\", max = \"100ms\" }}\n\
             [[source]]\ncategory = \"app\"\ninclude = [{:?}]\nmax_line_bytes = \"4 KiB\"\nrotate_wait = \"100ms\"\n{}\n",
            endpoints.join(", "),
            self.data_dir(),
            self.refresh_interval,
            self.settings,
            self.ops.map_or("enabled = false".to_owned(), |ops| format!("listen = \"{ops}\"")),
            self.log(self.include),
            self.source
        )
    }

    /// Its sources.
    pub(crate) fn sources(&self) -> Vec<tributary_agent::config::Source> {
        self.config().sources
    }

    /// Writes the agent's configuration down; returns where.
    pub(crate) fn config_file(&self) -> PathBuf {
        let path = self.dir.path().join("agent.toml");
        std::fs::write(&path, self.config_text()).expect("written");
        path
    }

    /// Runs the program with these arguments and the configuration; returns its exit code and what it printed.
    pub(crate) async fn cli(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_tributary-agent"));
        command.args(arguments).arg("--config").arg(self.config_file()).kill_on_drop(true);
        let output = tokio::time::timeout(PATIENCE, command.output()).await.expect("it ends").expect("it runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }

    /// Starts an agent as a process of its own, with these arguments. `starter`: a program, with arguments, that starts it.
    pub(crate) fn spawn(&self, starter: &[&str], arguments: &[&str], uid: Option<u32>) -> AgentProcess {
        use std::os::unix::process::CommandExt;
        let words = [starter, &[env!("CARGO_BIN_EXE_tributary-agent"), "run"], arguments, &["--config"]].concat();
        let log = self.dir.path().join("agent.out");
        let output = std::fs::File::create(&log).expect("made");
        let mut command = std::process::Command::new(words[0]);
        command.args(&words[1..]).arg(self.config_file()).stdout(output.try_clone().expect("cloned")).stderr(output);
        if let Some(uid) = uid {
            command.uid(uid).gid(uid);
        }
        AgentProcess::new(command.spawn().expect("it starts"), log)
    }

    /// Waits until the agent's metric has the value.
    pub(crate) async fn metric(&self, name: &str, value: u64) {
        let line = format!("tributary_agent_{name} {value}");
        self.answer("/metrics", |text| text.lines().any(|one| one == line)).await;
    }

    /// The agent's metric now.
    pub(crate) async fn metric_now(&self, name: &str) -> u64 {
        let name = format!("tributary_agent_{name} ");
        let text = self.answer("/metrics", |text| text.contains(&name)).await;
        text.lines().find_map(|line| line.strip_prefix(&name)).and_then(|value| value.parse().ok()).expect("a number")
    }

    /// Starts an agent that follows the files.
    pub(crate) fn start(&self) -> Agent {
        let stop = CancellationToken::new();
        if std::env::var_os("RUST_LOG").is_some() {
            // Another agent of this process may have done so before.
            let _ = tributary_common::telemetry::init(self.config().log);
        }
        let run = tributary_agent::cli::run_until(self.config(), None, stop.clone());
        Agent { task: tokio::spawn(async move { run.await.map_err(|error| error.to_string()) }), stop }
    }

    /// Runs an agent that ships everything once.
    pub(crate) async fn once(&self) -> Result<(), String> {
        let run = tributary_agent::cli::run_until(self.config(), Some(PATIENCE), CancellationToken::new());
        tokio::time::timeout(PATIENCE, run).await.expect("it ends").map_err(|error| error.to_string())
    }

    /// The root.
    pub(crate) fn root(&self) -> MutexGuard<'_, Root> {
        self.root.lock().expect("no panic")
    }

    /// Has Debian's logrotate rotate `a.log` now, with these directives. The writer has no part in it.
    pub(crate) fn logrotate(&self, directives: &str) {
        let conf = self.dir.path().join("logrotate.conf");
        // Without `su` logrotate refuses a directory that others may write, as temporary ones often are.
        let text = format!("{:?} {{\nsu root root\nrotate 100\n{directives}\n}}\n", self.log("a.log"));
        std::fs::write(&conf, text).expect("written");
        let status = std::process::Command::new("logrotate")
            .arg("--force")
            .arg("--state")
            .arg(self.dir.path().join("logrotate.state"))
            .arg(&conf)
            .status()
            .expect("logrotate is installed: tests/setup.sh does it");
        assert!(status.success(), "logrotate: {status}");
    }

    /// Waits until the root has exactly these lines, in any order, and committed them.
    pub(crate) async fn expect_lines(&self, expected: &[String]) {
        let mut expected = expected.to_vec();
        expected.sort();
        wait_for(
            || self.root().lines().len() >= expected.len(),
            || format!("{} of {} lines came", self.root().lines().len(), expected.len()),
        )
        .await;
        let found = self.root().lines();
        if found != expected {
            let mut counts: BTreeMap<&str, i64> = BTreeMap::new();
            for line in &found {
                *counts.entry(line).or_default() += 1;
            }
            for line in &expected {
                *counts.entry(line).or_default() -= 1;
            }
            counts.retain(|_, surplus| *surplus != 0);
            let some: Vec<_> = counts.iter().take(10).collect();
            panic!("{} lines came too often (+) or are missing (-), such as {some:?}", counts.len());
        }
    }
}

/// An agent in a task.
pub(crate) struct Agent {
    task: JoinHandle<Result<(), String>>,
    stop: CancellationToken,
}

impl Agent {
    /// Stops it as SIGTERM does.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(PATIENCE, self.task).await.expect("it ends").expect("no panic").expect("it ends well");
    }

    /// Ends it in the middle of whatever it does.
    pub(crate) async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

/// Waits until something is true.
pub(crate) async fn wait_for(mut condition: impl FnMut() -> bool, describe: impl Fn() -> String) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited for too long: {}", describe());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Lines of a log, each different.
pub(crate) fn lines(range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|n| format!("line {n:06} {}", "x".repeat((n % 97) as usize))).collect()
}

/// Lines that begin with `name`, with much in them that can't be compressed.
pub(crate) fn random_lines(name: &str, count: u32) -> Vec<String> {
    let mut state = 7_u32;
    let line = |n: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        format!("{name} {n} {state:08x}{:08x}", state.wrapping_mul(2_654_435_761))
    };
    (0..count).map(line).collect()
}

/// Appends lines to a file.
pub(crate) fn append(path: &Path, lines: &[String]) {
    use std::io::Write;
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).expect("opens");
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    file.write_all(text.as_bytes()).expect("written");
}
