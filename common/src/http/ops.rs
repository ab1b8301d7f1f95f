//! What a program tells those who watch over it: `/healthz`, `/readyz`, `/metrics`.

use std::sync::Arc;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Response, StatusCode};
use http_body_util::Full;

use crate::telemetry::Metrics;

/// Answers for the paths of the operators.
///
/// `/healthz` says 200 as long as the program can answer at all; `/readyz` 200 or 503 with the reasons, one per line;
/// `/metrics` the metrics in the OpenMetrics text format.
#[derive(Clone)]
pub struct Ops {
    metrics: Arc<Metrics>,
    ready: Arc<dyn Fn() -> Result<(), String> + Send + Sync>,
}

impl std::fmt::Debug for Ops {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ops").finish_non_exhaustive()
    }
}

impl Ops {
    /// Answers from these metrics; `ready` says whether the program can do its work, or why it can't.
    pub fn new(metrics: Arc<Metrics>, ready: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Self {
        Self { metrics, ready: Arc::new(ready) }
    }

    /// The answer for a path of the operators; `None` for every other path and method.
    #[must_use]
    pub fn answer(&self, method: &Method, path: &str) -> Option<Response<Full<Bytes>>> {
        if method != Method::GET {
            return None;
        }
        match path {
            "/healthz" => Some(plain(StatusCode::OK, "ok\n".to_owned())),
            "/readyz" => Some(match (self.ready)() {
                Ok(()) => plain(StatusCode::OK, "ready\n".to_owned()),
                Err(reasons) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("{reasons}\n")),
            }),
            "/metrics" => {
                let mut response = plain(StatusCode::OK, self.metrics.render());
                let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
                response.headers_mut().insert(CONTENT_TYPE, kind);
                Some(response)
            }
            _ => None,
        }
    }
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;
    use prometheus_client::metrics::counter::Counter;
    use std::sync::Mutex;

    async fn get(ops: &Ops, path: &str) -> (u16, String) {
        let response = ops.answer(&Method::GET, path).expect("a path of the operators");
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.expect("a body in memory").to_bytes();
        (status, String::from_utf8(body.to_vec()).expect("text"))
    }

    #[tokio::test]
    async fn a_program_that_is_not_ready_says_why_and_is_healthy() {
        let state = Arc::new(Mutex::new(Err("the parent tier can't be reached".to_owned())));
        let counter: Counter = Counter::default();
        let mut metrics = Metrics::new("agent");
        metrics.registry().register("lines", "Lines read", counter.clone());
        counter.inc_by(7);
        let shared = Arc::clone(&state);
        let ops = Ops::new(Arc::new(metrics), move || shared.lock().expect("no panic").clone());
        assert_eq!(get(&ops, "/healthz").await.0, 200);
        assert_eq!(get(&ops, "/readyz").await, (503, "the parent tier can't be reached\n".to_owned()));
        *state.lock().expect("no panic") = Ok(());
        assert_eq!(get(&ops, "/readyz").await.0, 200);
        let (status, text) = get(&ops, "/metrics").await;
        assert_eq!(status, 200);
        assert!(text.contains("tributary_agent_lines_total 7\n") && text.ends_with("# EOF\n"), "{text}");
        assert!(text.contains("tributary_agent_build_info{version=\""), "{text}");
        assert!(ops.answer(&Method::POST, "/healthz").is_none() && ops.answer(&Method::GET, "/v1/x").is_none());
    }
}
