use std::sync::Mutex;

use async_trait::async_trait;
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tributary_common::http::endpoint::Endpoint;
use tributary_common::ids::{LaneId, StreamId};

use super::*;
use crate::testing::{RECEIVE_LIMITS, Served, batch, body, categories, category, offer, position, post, serve_tier};

const S: StreamId = StreamId(7);

/// Takes everything, and remembers what.
#[derive(Default)]
struct Taker {
    taken: Mutex<Vec<(u64, Option<i64>)>>,
    full: bool,
    elsewhere: Option<Elsewhere>,
    hold: Option<Arc<Notify>>,
}

#[async_trait]
impl Tier for Taker {
    async fn offer(&self, batches: Vec<Received>) -> Result<Vec<Answer>, Overloaded> {
        if let Some(hold) = &self.hold {
            hold.notified().await;
        }
        if self.full {
            return Err(Overloaded::new("the spool is full", Duration::from_millis(2500)));
        }
        if let Some(elsewhere) = &self.elsewhere {
            return Err(Overloaded::go("not here", Duration::from_secs(1), elsewhere.clone()));
        }
        assert!(batches.iter().all(|one| one.batch.header.lane == LaneId(0)), "a lane that there is");
        let mut taken = self.taken.lock().expect("no panic");
        Ok(batches
            .into_iter()
            .map(|one| {
                let header = &one.batch.header;
                assert_eq!(one.frames.len(), header.slices.len());
                taken.push((header.start.offset, header.received_ms));
                Answer {
                    stream: header.stream,
                    next: Some(header.end),
                    committed: Some(header.committed),
                    owner: None,
                    verdict: Verdict::Ok,
                }
            })
            .collect())
    }

    async fn positions(&self, query: PositionsQuery) -> Result<Vec<Answer>, Overloaded> {
        let answer = |stream| Answer { stream, next: None, committed: None, owner: None, verdict: Verdict::Unknown };
        Ok(query.streams.iter().map(|asked| answer(asked.stream)).collect())
    }

    async fn reports(&self, reports: Vec<Report>) -> Result<Vec<ReportAnswer>, Overloaded> {
        if let Some(elsewhere) = &self.elsewhere {
            return Err(Overloaded::go("not here", Duration::from_secs(1), elsewhere.clone()));
        }
        assert!(reports.iter().all(|one| one.lane == LaneId(0)), "a lane that there is");
        Ok(Vec::new())
    }

    async fn status(&self) -> serde_json::Value {
        serde_json::json!({ "taken": self.taken.lock().expect("no panic").len() })
    }

    fn ready(&self) -> Result<(), String> {
        Ok(())
    }
}

async fn taker() -> (Arc<Taker>, Served) {
    let tier = Arc::<Taker>::default();
    let served = serve_tier(Arc::clone(&tier)).await;
    (tier, served)
}

fn taken(tier: &Taker) -> Vec<u64> {
    tier.taken.lock().expect("no panic").iter().map(|(start, _)| *start).collect()
}

#[tokio::test]
async fn good_batches_are_handed_on_in_order_with_the_time_of_their_first_receipt() {
    let (tier, served) = taker().await;
    let mut fresh = batch(S, 100, 200, 0);
    fresh.header.received_ms = None;
    let answers = offer(served.address, &[batch(S, 0, 100, 0), fresh]).await;
    assert_eq!(
        answers.iter().map(|answer| answer.next.map(|next| next.offset)).collect::<Vec<_>>(),
        [Some(100), Some(200)]
    );
    let mut earlier = batch(S, 200, 300, 0);
    earlier.header.received_ms = Some(5);
    offer(served.address, &[earlier]).await;
    let seen = tier.taken.lock().expect("no panic").clone();
    assert_eq!(seen, [(0, Some(1_000_000)), (100, Some(1_000_000)), (200, Some(5))]);
}

#[tokio::test]
async fn one_bad_batch_spoils_the_request_and_is_named() {
    let (tier, served) = taker().await;
    let good = body(&[batch(S, 0, 100, 0)]);
    let flipped = |at: usize| {
        let mut bad = good.clone();
        bad[at] ^= 1;
        bad
    };
    let long = |at: usize, len: u32| {
        let mut bad = good.clone();
        bad[at..at + 4].copy_from_slice(&len.to_le_bytes());
        bad
    };
    for (bad, reason, status) in [
        (vec![b'x'; 300], Reject::NotABatch, 400),
        (b"TBT2".iter().copied().chain(good[4..].iter().copied()).collect(), Reject::NotABatch, 400),
        (good[..good.len() - 1].to_vec(), Reject::Truncated, 400),
        (good[..10].to_vec(), Reject::Truncated, 400),
        (flipped(20), Reject::CorruptHeader, 400),
        (flipped(good.len() - 12), Reject::CorruptFrame, 400),
        (long(4, u32::MAX), Reject::TooLarge, 400),
        (long(4, 3), Reject::CorruptHeader, 400),
        (long(8, u32::MAX), Reject::TooLarge, 400),
        (long(8, 1 << 20), Reject::Truncated, 400),
    ] {
        let before = served.metrics.rejections(reason);
        let whole = [good.clone(), good.clone(), bad].concat();
        let (said_status, said) = post(served.address, BATCHES_PATH, BATCHES_CONTENT_TYPE, whole).await;
        assert_eq!(said_status, status, "{said}");
        assert!(said["error"].as_str().expect("a text").starts_with("batch 2 of the request"), "{said}");
        assert_eq!(served.metrics.rejections(reason), before + 1, "{said}");
    }
    assert!(taken(&tier).is_empty(), "nothing of a bad request is taken");
}

#[tokio::test]
async fn what_is_no_request_for_this_node_is_refused_with_the_reason() {
    let (tier, served) = taker().await;
    let good = body(&[batch(S, 0, 100, 0)]);
    for (path, content_type, body, status) in [
        ("/v1/nothing", BATCHES_CONTENT_TYPE, good.clone(), 404),
        (CATEGORIES_PATH, BATCHES_CONTENT_TYPE, good.clone(), 405),
        (BATCHES_PATH, "application/vnd.tributary.batches.v2", good.clone(), 415),
        (BATCHES_PATH, "text/plain", good.clone(), 415),
        (BATCHES_PATH, BATCHES_CONTENT_TYPE, Vec::new(), 400),
        (BATCHES_PATH, BATCHES_CONTENT_TYPE, vec![0; RECEIVE_LIMITS.max_request_bytes as usize + 1], 413),
        (POSITIONS_PATH, "application/json", b"{}".to_vec(), 400),
        (POSITIONS_PATH, "application/json", b"\xff".to_vec(), 400),
        (POSITIONS_PATH, BATCHES_CONTENT_TYPE, b"{\"streams\":[]}".to_vec(), 415),
    ] {
        let (said_status, said) = post(served.address, path, content_type, body).await;
        assert_eq!(said_status, status, "{path} {content_type}: {said}");
        assert!(!said["error"].as_str().expect("a text").is_empty());
    }
    assert!(taken(&tier).is_empty());
    // A parameter of the content type is no other type.
    let (status, _) = post(served.address, BATCHES_PATH, &format!("{BATCHES_CONTENT_TYPE}; a=b"), good).await;
    assert_eq!(status, 200);
}

#[tokio::test]
async fn a_batch_over_the_bound_is_refused_also_in_a_request_within_it() {
    let (tier, served) = taker().await;
    // Random content does not get smaller.
    let mut large = batch(S, 0, 100, 0);
    let mut raw = vec![0; 40_000];
    rand::rngs::StdRng::seed_from_u64(1).fill_bytes(&mut raw);
    let frame = large.verify().expect("good").remove(0);
    let mut descriptor = frame.slices[0].clone();
    descriptor.runs[0].stored = raw.len() as u64;
    large.body = tributary_common::frame::FrameEncoder::new(frame.codec, 1)
        .encode(&frame.category, frame.bucket, &[descriptor], &raw)
        .expect("encodes");
    large.header.slices[0].frame_len = large.body.len() as u32;
    let (status, said) = post(served.address, BATCHES_PATH, BATCHES_CONTENT_TYPE, body(&[large])).await;
    assert_eq!(status, 413, "{said}");
    assert!(taken(&tier).is_empty());
}

#[tokio::test]
async fn a_batch_of_an_old_number_of_lanes_is_taken_into_its_new_lane() {
    let (tier, served) = taker().await;
    let mut old = batch(S, 0, 100, 0);
    old.header.lane = LaneId(9);
    assert_eq!(offer(served.address, &[old]).await[0].verdict, Verdict::Ok);
    assert_eq!(taken(&tier), [0]);
}

#[tokio::test]
async fn who_asks_the_wrong_node_is_told_the_right_one() {
    let owner = Endpoint::at("root-2:7700").expect("valid");
    for (elsewhere, status, header, value) in [
        (Elsewhere::Node(owner), 307, "location", "http://root-2:7700/v1/batches"),
        (Elsewhere::Sibling, 503, "tributary-go", "sibling"),
    ] {
        let tier = Arc::new(Taker { elsewhere: Some(elsewhere), ..Taker::default() });
        let served = serve_tier(tier).await;
        let client = reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none());
        let url = format!("http://{}{BATCHES_PATH}", served.address);
        let request = client.build().expect("a client").post(url).header("content-type", BATCHES_CONTENT_TYPE);
        let response = request.body(body(&[batch(S, 0, 100, 0)])).send().await.expect("answers");
        assert_eq!(response.status(), status);
        assert_eq!(response.headers()[header], value);
        assert_eq!(response.headers()["retry-after"], "1");
        assert_eq!(served.metrics.rejections(Reject::Elsewhere), 1);
    }
}

#[tokio::test]
async fn a_batch_of_a_foreign_category_is_refused_and_the_others_are_taken_also_with_buckets_of_a_former_size() {
    let (tier, served) = taker().await;
    let rewritten = |change: &dyn Fn(&mut tributary_common::frame::FrameHeader)| {
        let mut changed = batch(S, 0, 100, 0);
        let mut frame = changed.verify().expect("good").remove(0);
        let raw = frame.decode(&changed.body).expect("decodes");
        change(&mut frame);
        let mut encoder = tributary_common::frame::FrameEncoder::new(frame.codec, 1);
        changed.body = encoder.encode(&frame.category, frame.bucket, &frame.slices, &raw).expect("encodes");
        changed.header.category = frame.category;
        changed.header.slices[0].bucket = frame.bucket;
        changed.header.slices[0].frame_len = changed.body.len() as u32;
        changed
    };
    let unknown = rewritten(&|frame| frame.category = "other".parse().expect("valid"));
    let minute = tributary_common::bucket::BucketSize::try_from(60).expect("valid");
    let size = rewritten(&|frame| frame.bucket = minute.bucket_of_ms(0));
    let answers = offer(served.address, &[batch(S, 0, 100, 0), unknown, size, batch(S, 100, 200, 0)]).await;
    let refused: Vec<bool> = answers.iter().map(|answer| matches!(answer.verdict, Verdict::Refused { .. })).collect();
    assert_eq!(refused, [false, true, false, false]);
    assert_eq!(taken(&tier), [0, 0, 100]);
    assert_eq!(served.metrics.rejections(Reject::Topology), 1);
}

#[tokio::test]
async fn a_full_tier_says_when_to_come_again() {
    let tier = Arc::new(Taker { full: true, ..Taker::default() });
    let served = serve_tier(tier).await;
    let url = format!("http://{}{BATCHES_PATH}", served.address);
    let response = reqwest::Client::builder().no_proxy().build().expect("a client");
    let sent =
        response.post(url).header("content-type", BATCHES_CONTENT_TYPE).body(body(&[batch(S, 0, 100, 0)])).send();
    let response = sent.await.expect("answers");
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["retry-after"], "3", "2.5 s, in whole seconds, not earlier");
}

#[tokio::test]
async fn more_bodies_than_there_is_memory_for_are_put_off() {
    let hold = Arc::new(Notify::new());
    let tier = Arc::new(Taker { hold: Some(Arc::clone(&hold)), ..Taker::default() });
    let served = serve_tier(tier).await;
    // Two requests that announce more than there is memory for; the first keeps what it took until it is answered.
    let announce = |len: usize| {
        format!(
            "POST {BATCHES_PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: {BATCHES_CONTENT_TYPE}\r\ncontent-length: {len}\r\n\r\n"
        )
    };
    let mut first = TcpStream::connect(served.address).await.expect("connects");
    first.write_all(announce(60 << 10).as_bytes()).await.expect("is sent");
    // The first one has its share as soon as its head was read, which a second one shows by being refused.
    loop {
        let mut second = TcpStream::connect(served.address).await.expect("connects");
        second.write_all(announce(60 << 10).as_bytes()).await.expect("is sent");
        let mut answer = vec![0; 1024];
        let read = tokio::time::timeout(Duration::from_millis(200), second.read(&mut answer)).await;
        if let Ok(read) = read {
            let answer = String::from_utf8_lossy(&answer[..read.expect("answers")]).to_lowercase();
            assert!(answer.starts_with("http/1.1 429") && answer.contains("retry-after: 1"), "{answer}");
            break;
        }
    }
    // A small one fits beside it.
    hold.notify_one();
    assert_eq!(offer(served.address, &[batch(S, 0, 100, 0)]).await.len(), 1);
    // Whoever goes away gives its share back.
    drop(first);
    let padded = 60 << 10;
    loop {
        hold.notify_one();
        let (status, said) = post(served.address, BATCHES_PATH, BATCHES_CONTENT_TYPE, vec![0; padded]).await;
        if status == 400 {
            break;
        }
        assert_eq!(status, 429, "{said}");
    }
}

#[tokio::test]
async fn a_body_that_breaks_off_changes_nothing() {
    let (tier, served) = taker().await;
    let whole = body(&[batch(S, 0, 100, 0)]);
    let mut cut = TcpStream::connect(served.address).await.expect("connects");
    let head = format!(
        "POST {BATCHES_PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: {BATCHES_CONTENT_TYPE}\r\ncontent-length: {}\r\n\r\n",
        whole.len() + 10
    );
    cut.write_all(head.as_bytes()).await.expect("is sent");
    cut.write_all(&whole).await.expect("is sent");
    cut.shutdown().await.expect("half closes");
    let mut answer = Vec::new();
    cut.read_to_end(&mut answer).await.expect("the server ends it");
    assert!(!String::from_utf8_lossy(&answer).contains(" 200 "));
    assert!(taken(&tier).is_empty());
    assert_eq!(served.metrics.rejections(Reject::Body), 1);
}

#[tokio::test]
async fn categories_status_and_positions_are_told() {
    let (_, served) = taker().await;
    let get = |path: &str| {
        let url = format!("http://{}{path}", served.address);
        async {
            reqwest::Client::builder().no_proxy().build().expect("a client").get(url).send().await.expect("answers")
        }
    };
    let told: Categories = get(CATEGORIES_PATH).await.json().await.expect("JSON");
    assert_eq!(told, categories());
    assert!(told.categories.contains_key(&category()));
    let status: serde_json::Value = get(STATUS_PATH).await.json().await.expect("JSON");
    assert_eq!(status["taken"], 0);
    assert_eq!(position(served.address, S).await.verdict, Verdict::Unknown);
    assert_eq!(get(BATCHES_PATH).await.status(), 405);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever one changes in a good request, it is refused, or it is a request that is as good.
    #[test]
    fn no_request_makes_the_receiver_panic(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let tier = Arc::<Taker>::default();
        let metrics = Arc::<ReceiveMetrics>::default();
        let receiver = Receiver::new(Arc::clone(&tier), categories(), RECEIVE_LIMITS, WallClock::new(|| 1), metrics);
        let whole = body(&[batch(S, 0, 100, 0), batch(S, 100, 200, 0)]);
        let mut bytes = whole.clone();
        for (at, with) in changes {
            let at = at.index(bytes.len());
            bytes[at] = with;
        }
        bytes.truncate(cut.index(whole.len() * 3));
        let same = bytes == whole;
        let request = Request::post(BATCHES_PATH)
            .header(CONTENT_TYPE, BATCHES_CONTENT_TYPE)
            .body(http_body_util::Full::new(Bytes::from(bytes)).map_err(|never| -> BodyError { match never {} }))
            .expect("a request");
        let response = runtime.block_on(receiver.handle(request));
        prop_assert_eq!(response.status() == 200, same || !taken(&tier).is_empty());
        prop_assert!(response.status() == 200 || response.status() == 400);
    }
}
