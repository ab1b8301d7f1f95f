//! An aggregator that keeps nothing: it reads what it is sent, and says that it is stored. With it those that send to it have the machine
//! to themselves, as in a real tree, where the next tier is on other machines.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tributary_common::batch::{Batch, BatchHeader};
use tributary_common::bucket::BucketSize;
use tributary_common::frame::Codec;
use tributary_common::ids::{CategoryName, Epoch, LaneCount, StreamId};
use tributary_common::messages::{
    Answer, Answers, BATCHES_PATH, CATEGORIES_PATH, Categories, CategorySettings, POSITIONS_PATH, PositionsQuery,
    REPORTS_PATH, StreamQuery, Verdict,
};
use tributary_common::position::Position;
use tributary_common::report::{Report, ReportAnswer, ReportAnswers, Reports, Session};

/// How far a stream is.
#[derive(Clone, Copy, Debug)]
struct Taken {
    next: Position,
    /// One request behind, as an edge hears of it.
    committed: Position,
}

#[derive(Debug, Default)]
struct State {
    streams: BTreeMap<StreamId, Taken>,
}

impl State {
    fn take(&mut self, header: &BatchHeader) -> Answer {
        let taken = self.streams.entry(header.stream).or_insert(Taken { next: header.base, committed: header.base });
        let is_next = header.start == taken.next;
        if is_next {
            *taken = Taken { next: header.end, committed: taken.next };
        }
        Self::answer(header.stream, *taken, if is_next { Verdict::Ok } else { Verdict::Expected })
    }

    fn query(&mut self, query: &StreamQuery) -> Answer {
        match self.streams.get_mut(&query.stream) {
            Some(taken) => {
                taken.committed = taken.next;
                Self::answer(query.stream, *taken, Verdict::Ok)
            }
            None => {
                Answer { stream: query.stream, next: None, committed: None, owner: None, verdict: Verdict::Unknown }
            }
        }
    }

    fn answer(stream: StreamId, taken: Taken, verdict: Verdict) -> Answer {
        Answer { stream, next: Some(taken.next), committed: Some(taken.committed), owner: None, verdict }
    }
}

/// The server. It ends when this is dropped.
#[derive(Debug)]
pub struct Taker {
    state: Arc<Mutex<State>>,
    _connections: JoinSet<()>,
}

impl Taker {
    /// Listens on a port of this machine, in place of an aggregator of a [`Cluster`](crate::cluster::Cluster).
    ///
    /// # Errors
    /// The port is taken.
    pub async fn start(port: u16) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.context("listening")?;
        let state = Arc::<Mutex<State>>::default();
        let shared = Arc::clone(&state);
        let mut connections = JoinSet::new();
        connections.spawn(async move {
            let mut served = JoinSet::new();
            // The system gives no connection any more: whoever is to be served sees that it isn't.
            while let Ok((stream, _)) = listener.accept().await {
                let state = Arc::clone(&shared);
                let service = service_fn(move |request| serve(request, Arc::clone(&state)));
                served.spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        Ok(Self { state, _connections: connections })
    }

    /// How many bytes of logs it was sent.
    #[must_use]
    pub fn taken(&self) -> u64 {
        locked(&self.state).streams.values().map(|taken| taken.next.offset).sum()
    }
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn serve(request: Request<Incoming>, state: Arc<Mutex<State>>) -> Result<Response<Full<Bytes>>> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut body = request.into_body().collect().await?.to_bytes();
    match (method, path.as_str()) {
        (Method::GET, CATEGORIES_PATH) => {
            let settings = CategorySettings { bucket_s: BucketSize::HOUR, codec: Codec::Gzip, close_delay_ms: 0 };
            let name: CategoryName = "nginx-access".parse()?;
            json(&Categories { lanes: LaneCount::ONE, categories: BTreeMap::from([(name, settings)]) })
        }
        (Method::POST, BATCHES_PATH) => {
            let mut answers = Vec::new();
            while !body.is_empty() {
                let batch = Batch::take_from(&mut body)?;
                answers.push(locked(&state).take(&batch.header));
            }
            json(&Answers { answers })
        }
        (Method::POST, POSITIONS_PATH) => {
            let query: PositionsQuery = serde_json::from_slice(&body)?;
            json(&Answers { answers: query.streams.iter().map(|one| locked(&state).query(one)).collect() })
        }
        (Method::POST, REPORTS_PATH) => {
            let reports: Reports = serde_json::from_slice(&body)?;
            json(&ReportAnswers { answers: reports.reports.into_iter().map(heard).collect() })
        }
        _ => {
            let mut response = Response::new(Full::default());
            *response.status_mut() = StatusCode::NOT_FOUND;
            Ok(response)
        }
    }
}

fn heard(report: Report) -> ReportAnswer {
    ReportAnswer {
        agent: report.agent,
        category: report.category,
        run: report.run,
        heard: report.number,
        session: Some(Session { epoch: Epoch(1), counter: 1 }),
        rival: None,
        refused: None,
        waiting_for: Vec::new(),
    }
}

fn json(body: &impl Serialize) -> Result<Response<Full<Bytes>>> {
    Ok(Response::new(Full::new(serde_json::to_vec(body)?.into())))
}
