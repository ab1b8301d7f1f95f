//! Load on a web server: a stated number of requests over kept connections, each with its serial number in the URL.
//!
//! A serial is used once, also when its request fails, so that it stands in the access log at most once. The paths look like those
//! of a site (`/article/123?serial=4711`), some are not found, and the user agents vary, so that the log compresses like a real one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use reqwest::Client;
use tokio::task::JoinSet;

const AGENTS: [&str; 4] = [
    "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148",
    "curl/8.9.1",
];
const PAGES: [&str; 5] = ["article", "search", "img", "user", "missing"];

/// How much load, and how.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// How many requests; default 10 000.
    pub requests: u64,
    /// The first serial; the others follow it. Default 0.
    pub first_serial: u64,
    /// How many at the same time, each on a connection of its own; default 32.
    pub connections: usize,
    /// At most so many a second; default: as fast as it goes.
    pub per_second: Option<u32>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { requests: 10_000, first_serial: 0, connections: 32, per_second: None }
    }
}

/// What became of the requests.
#[derive(Clone, Debug, Default)]
pub struct LoadReport {
    /// The serials that the server answered, sorted: each must be in its log once.
    pub answered: Vec<u64>,
    /// The serials without an answer, sorted: each may be in its log, or not.
    pub unanswered: Vec<u64>,
    /// From the first request to the last answer.
    pub elapsed: Duration,
}

/// A load that runs in tasks of its own, until all is sent or it is told to stop. Dropping it ends it in the middle of requests.
#[derive(Debug)]
pub struct Load {
    serials: Arc<Serials>,
    tasks: JoinSet<(Vec<u64>, Vec<u64>)>,
    begun: Instant,
}

#[derive(Debug)]
struct Serials {
    first: u64,
    next: AtomicU64,
    end: AtomicU64,
}

impl Serials {
    fn take(&self) -> Option<u64> {
        let end = self.end.load(Ordering::SeqCst);
        let taken = self.next.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |next| (next < end).then_some(next + 1));
        taken.ok()
    }
}

impl Load {
    /// Begins to send to `url` (`http://127.0.0.1:PORT`).
    ///
    /// # Errors
    /// The options can't be met, or the HTTP client can't be made.
    pub fn start(url: &str, options: &LoadOptions) -> Result<Self> {
        ensure!(options.connections > 0, "a load needs at least one connection");
        ensure!(options.per_second != Some(0), "0 requests per second would never end");
        let end = options.first_serial.checked_add(options.requests).context("the serials don't fit 64 bits")?;
        let first = options.first_serial;
        let serials = Arc::new(Serials { first, next: AtomicU64::new(first), end: AtomicU64::new(end) });
        let begun = Instant::now();
        let mut tasks = JoinSet::new();
        for _ in 0..options.connections {
            // A client of its own, so a connection of its own.
            let client = Client::builder().no_proxy().timeout(Duration::from_secs(30)).build()?;
            tasks.spawn(send(client, url.to_owned(), Arc::clone(&serials), begun, options.per_second));
        }
        Ok(Self { serials, tasks, begun })
    }

    /// How many requests have been begun.
    #[must_use]
    pub fn begun_requests(&self) -> u64 {
        self.serials.next.load(Ordering::SeqCst) - self.serials.first
    }

    /// Begins no more requests.
    pub fn stop(&self) {
        self.serials.end.store(0, Ordering::SeqCst);
    }

    /// Waits until every request that was to be sent has its answer.
    ///
    /// # Errors
    /// A task has panicked.
    pub async fn finish(mut self) -> Result<LoadReport> {
        let mut report = LoadReport::default();
        while let Some(ended) = self.tasks.join_next().await {
            let (answered, unanswered) = ended.context("a task of the load ended early")?;
            report.answered.extend(answered);
            report.unanswered.extend(unanswered);
        }
        report.answered.sort_unstable();
        report.unanswered.sort_unstable();
        report.elapsed = self.begun.elapsed();
        Ok(report)
    }
}

async fn send(
    client: Client,
    url: String,
    serials: Arc<Serials>,
    begun: Instant,
    per_second: Option<u32>,
) -> (Vec<u64>, Vec<u64>) {
    let (mut answered, mut unanswered) = (Vec::new(), Vec::new());
    while let Some(serial) = serials.take() {
        if let Some(per_second) = per_second {
            let due = Duration::from_secs_f64((serial - serials.first) as f64 / f64::from(per_second));
            tokio::time::sleep_until((begun + due).into()).await;
        }
        // Any spread will do, as long as it is the same for the same serial.
        let spread = serial.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        let pick = |choices: u64| (spread % choices) as usize;
        let page = PAGES[pick(PAGES.len() as u64)];
        let target = format!("{url}/{page}/{}?serial={serial}", spread % 1000);
        let request = client.get(target).header("user-agent", AGENTS[pick(AGENTS.len() as u64)]);
        let outcome = async { request.send().await?.bytes().await };
        if outcome.await.is_ok() { answered.push(serial) } else { unanswered.push(serial) }
    }
    (answered, unanswered)
}

/// The serial in a line of the access log.
#[must_use]
pub fn serial_of(line: &str) -> Option<u64> {
    let rest = line.split_once("?serial=")?.1;
    rest.split_once(' ')?.0.parse().ok()
}
