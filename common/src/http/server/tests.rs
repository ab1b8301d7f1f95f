use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use http_body_util::BodyExt;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;

use super::*;

const LIMITS: ServerLimits = ServerLimits {
    max_connections: 100,
    header_timeout: Duration::from_secs(60),
    body: BodyPace { idle_timeout: Duration::from_secs(60), min_rate: 1 },
    write_timeout: Duration::from_secs(60),
    drain_timeout: Duration::from_secs(60),
};

struct Running {
    address: SocketAddr,
    metrics: ServerMetrics,
    shutdown: CancellationToken,
    task: JoinHandle<Drained>,
}

async fn start<H, F>(limits: ServerLimits, handler: H) -> Running
where
    H: Fn(Request<TimedBody>) -> F + Send + Sync + 'static,
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let (metrics, shutdown) = (ServerMetrics::default(), CancellationToken::new());
    let task = tokio::spawn(serve(listener, limits, metrics.clone(), shutdown.clone(), handler));
    Running { address, metrics, shutdown, task }
}

fn text(status: u16, text: impl Into<String>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text.into())));
    *response.status_mut() = StatusCode::from_u16(status).expect("a status");
    response
}

/// Answers with the body's length, or 408 and why it broke off.
async fn measure(request: Request<TimedBody>) -> Response<Full<Bytes>> {
    match request.into_body().collect().await {
        Ok(body) => text(200, body.to_bytes().len().to_string()),
        Err(error) => text(408, error.to_string()),
    }
}

impl Running {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("a connection")
    }

    async fn stop(self) -> Drained {
        self.shutdown.cancel();
        self.task.await.expect("the server does not panic")
    }
}

async fn ask(stream: &mut TcpStream, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.expect("written");
    read_answer(stream).await
}

/// Reads one response with a `Content-Length`, or all until the end.
async fn read_answer(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    loop {
        let head_end = answer.windows(4).position(|four| four == b"\r\n\r\n");
        if let Some(head_end) = head_end {
            let head = String::from_utf8_lossy(&answer[..head_end]).to_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
            if length.is_some_and(|length| answer.len() >= head_end + 4 + length) {
                break;
            }
        }
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(count) => answer.extend_from_slice(&buffer[..count]),
        }
    }
    String::from_utf8_lossy(&answer).into_owned()
}

const GET: &str = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";

#[tokio::test]
async fn requests_are_answered_over_one_connection() {
    let server = start(LIMITS, measure).await;
    let mut stream = server.connect().await;
    for _ in 0..3 {
        assert!(ask(&mut stream, GET).await.starts_with("HTTP/1.1 200 OK"));
    }
    let answer = ask(&mut stream, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello").await;
    assert!(answer.ends_with("\r\n\r\n5"), "{answer}");
    assert_eq!(server.stop().await, Drained::Clean, "an idle connection does not hold up the stop");
}

#[tokio::test]
async fn a_connection_over_the_limit_is_told_to_come_back() {
    let server = start(ServerLimits { max_connections: 2, ..LIMITS }, measure).await;
    let (mut first, mut second) = (server.connect().await, server.connect().await);
    // Answers show that both have their places.
    assert!(ask(&mut first, GET).await.contains("200 OK"));
    assert!(ask(&mut second, GET).await.contains("200 OK"));
    let mut third = server.connect().await;
    let answer = ask(&mut third, GET).await;
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("Retry-After: 1\r\n"), "{answer}");
    assert!(answer.ends_with("{\"error\":\"too many connections\"}"), "the length is right: {answer}");
    assert_eq!(server.metrics.refused(), 1);
    drop(first);
    // Its place is free as soon as the server has seen the end.
    loop {
        let mut again = server.connect().await;
        if ask(&mut again, GET).await.contains("200 OK") {
            break;
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn a_panic_is_answered_counted_and_survived() {
    let server = start(LIMITS, |request: Request<TimedBody>| async move {
        assert!(request.uri().path() != "/panic", "as asked");
        text(200, "fine")
    })
    .await;
    let mut stream = server.connect().await;
    let answer = ask(&mut stream, "GET /panic HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 500 "), "{answer}");
    let mut stream = server.connect().await;
    assert!(ask(&mut stream, GET).await.ends_with("fine"));
    assert_eq!(server.metrics.panics(), 1);
    server.stop().await;
}

#[tokio::test]
async fn a_head_that_never_ends_is_closed() {
    let server = start(ServerLimits { header_timeout: Duration::from_millis(200), ..LIMITS }, measure).await;
    let mut stream = server.connect().await;
    let answer = ask(&mut stream, "GET / HTTP/1.1\r\nHost:").await;
    assert!(!answer.contains("200"), "{answer}");
    let mut silent = server.connect().await;
    assert!(!read_answer(&mut silent).await.contains("200"), "nor is one that never begins");
    server.stop().await;
}

#[tokio::test]
async fn a_head_without_end_is_refused_at_its_size() {
    let server = start(LIMITS, measure).await;
    let mut stream = server.connect().await;
    let long = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "x".repeat(2 * MAX_HEAD_BYTES));
    // The server may close before all of it is written.
    let _ = stream.write_all(long.as_bytes()).await;
    assert!(!read_answer(&mut stream).await.contains("200 OK"));
    server.stop().await;
}

#[tokio::test]
async fn a_body_that_trickles_is_broken_off() {
    let body = BodyPace { idle_timeout: Duration::from_millis(300), min_rate: 1 << 20 };
    let server = start(ServerLimits { body, ..LIMITS }, measure).await;
    let stream = server.connect().await;
    let (mut reader, mut writer) = stream.into_split();
    let trickle = tokio::spawn(async move {
        let head = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n";
        writer.write_all(head.as_bytes()).await.expect("written");
        // A byte at a time, faster than the idle timeout, until the server has enough of it.
        while writer.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let mut answer = String::new();
    // The server may reset the connection behind its answer.
    let _ = reader.read_to_string(&mut answer).await;
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("too slowly"), "{answer}");
    trickle.await.expect("no panic");
    server.stop().await;
}

#[tokio::test]
async fn what_is_in_flight_at_a_stop_is_answered() {
    let (entered, mut entries) = mpsc::unbounded_channel();
    let gate = Arc::new(Notify::new());
    let opened = Arc::clone(&gate);
    let server = start(LIMITS, move |_| {
        let (entered, opened) = (entered.clone(), Arc::clone(&opened));
        async move {
            entered.send(()).expect("the test waits");
            opened.notified().await;
            text(200, "done")
        }
    })
    .await;
    let mut stream = server.connect().await;
    let asking = tokio::spawn(async move { ask(&mut stream, GET).await });
    entries.recv().await.expect("the request came");
    let address = server.address;
    let stopping = tokio::spawn(server.stop());
    // New connections are refused once the stop has begun.
    while TcpStream::connect(address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    gate.notify_one();
    assert!(asking.await.expect("no panic").ends_with("done"));
    assert_eq!(stopping.await.expect("no panic"), Drained::Clean);
}

#[tokio::test]
async fn a_stop_has_a_deadline() {
    let (entered, mut entries) = mpsc::unbounded_channel();
    let dropped = Arc::new(AtomicUsize::new(0));
    struct OnDrop(Arc<AtomicUsize>);
    impl Drop for OnDrop {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let counter = Arc::clone(&dropped);
    let limits = ServerLimits { drain_timeout: Duration::from_millis(100), ..LIMITS };
    let server = start(limits, move |_| {
        let (entered, guard) = (entered.clone(), OnDrop(Arc::clone(&counter)));
        async move {
            let _guard = guard;
            entered.send(()).expect("the test waits");
            std::future::pending().await
        }
    })
    .await;
    let mut stream = server.connect().await;
    let asking = tokio::spawn(async move { ask(&mut stream, GET).await });
    entries.recv().await.expect("the request came");
    assert_eq!(server.stop().await, Drained::Cut(1));
    assert_eq!(asking.await.expect("no panic"), "", "it was cut off");
    assert_eq!(dropped.load(Ordering::SeqCst), 1, "and its handler is gone");
}
