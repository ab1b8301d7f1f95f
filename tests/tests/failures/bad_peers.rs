//! Peers that break, lie or only cost, against a real edge and a real root under load: each is refused clearly, memory and time are
//! bounded, and the agent beside them ships on.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::{Bytes, BytesMut};
use reqwest::{Client, StatusCode};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tributary_common::batch::{Batch, BatchHeader, PREFIX_BYTES, SliceRef};
use tributary_common::bucket::{Bucket, BucketSize};
use tributary_common::frame::{Codec, FrameEncoder, Run, SliceDescriptor};
use tributary_common::ids::{AgentId, LaneId, StreamId};
use tributary_common::messages::{BATCHES_CONTENT_TYPE, BATCHES_PATH, POSITIONS_PATH};
use tributary_common::position::{Position, TailHash};
use tributary_tests::cluster::{Cluster, ClusterOptions, Role};
use tributary_tests::scenario::{rotating_writer, scenario, stop};
use tributary_tests::usage::Usage;
use tributary_tests::wait::until;
use tributary_tests::writer::Writer;

const LIMIT: Duration = Duration::from_secs(60);
const SERVERS: [Role; 2] = [Role::Edge(0), Role::Root(0)];
/// What every node allows here. Patience is short, so that its end is seen.
const LIMITS: &str = r#"
[limits]
max_request_bytes = "4 MiB"
max_batch_bytes = "2 MiB"
max_in_flight_bytes = "32 MiB"
max_connections = 10000
header_timeout = "15s"
body_idle_timeout = "1s"
min_body_rate = "4 KiB"
"#;
/// Far above what a node needs that allows this (the connections' buffers included), far below what the peers would like to use.
const MOST_MEMORY: u64 = 400 << 20;

fn options() -> ClusterOptions {
    ClusterOptions { topology_lines: LIMITS.into(), ..ClusterOptions::default() }
}

/// A batch of one slice of zeros, in the topology's category.
fn batch(agent: &str, bytes: u64) -> Result<Batch> {
    let (agent, category): (AgentId, _) = (agent.parse()?, "nginx-access".parse()?);
    let stream = StreamId(u128::from(rand::random::<u64>()));
    let end = Position { offset: bytes, tail: TailHash(1) };
    let bucket: Bucket = BucketSize::try_from(60).map_err(anyhow::Error::msg)?.bucket_of_ms(0);
    let descriptor = SliceDescriptor {
        agent: agent.clone(),
        host: "h".into(),
        stream,
        base: Position::zero(),
        start: Position::zero(),
        end,
        batch_hash: None,
        runs: vec![Run { start: 0, len: bytes, stored: bytes }],
        records: 1,
        prefix_len: 0,
        altered: false,
        first_time_ms: 0,
        last_time_ms: 0,
    };
    let raw = vec![0; usize::try_from(bytes)?];
    let body = FrameEncoder::new(Codec::Gzip, 1).encode(&category, bucket, &[descriptor], &raw)?;
    let header = BatchHeader {
        lane: LaneId(0),
        agent,
        category,
        stream,
        base: Position::zero(),
        start: Position::zero(),
        end,
        committed: Position::zero(),
        received_ms: None,
        slices: vec![SliceRef { bucket, frame_len: u32::try_from(body.len())? }],
    };
    Ok(Batch { header, body })
}

fn encoded(batch: &Batch) -> BytesMut {
    let mut bytes = BytesMut::from(&batch.encode_head()[..]);
    bytes.extend_from_slice(&batch.body);
    bytes
}

/// A liar computes the checksums of its lies: that of the batch's header.
fn seal(mut bytes: BytesMut) -> Bytes {
    let header_len = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
    let end = (PREFIX_BYTES + header_len).min(bytes.len());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..12]), &bytes[PREFIX_BYTES..end]);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    bytes.freeze()
}

fn replace(bytes: &mut BytesMut, from: &[u8], to: &[u8]) -> Result<()> {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|window| window == from).context("it is in there")?;
    bytes[at..at + to.len()].copy_from_slice(to);
    Ok(())
}

fn client() -> Result<Client> {
    Ok(Client::builder().no_proxy().pool_max_idle_per_host(0).timeout(LIMIT).build()?)
}

async fn post(url: &str, content_type: &str, body: impl Into<reqwest::Body>) -> Result<(StatusCode, String)> {
    let request = client()?.post(url).header("content-type", content_type).body(body);
    let answer = request.send().await?;
    Ok((answer.status(), answer.text().await?))
}

async fn connect(cluster: &Cluster, role: Role) -> Result<TcpStream> {
    let url = cluster.url(role, "")?;
    let port: u16 = url.rsplit(':').next().context("a port")?.parse()?;
    Ok(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?)
}

/// The head of a request with batches.
fn head(length: &str) -> String {
    format!("POST {BATCHES_PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: {BATCHES_CONTENT_TYPE}\r\n{length}\r\n\r\n")
}

/// What comes until the server closes.
async fn until_closed(stream: &mut TcpStream) -> Result<String> {
    let mut answer = Vec::new();
    // A reset after the answer is a closing too.
    let _ = tokio::time::timeout(LIMIT, stream.read_to_end(&mut answer)).await.context("it stays open")?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// The beginning of the answer.
async fn until_closed_or_answered(stream: &mut TcpStream) -> Result<String> {
    let mut answer = vec![0; 1024];
    let count = tokio::time::timeout(LIMIT, stream.read(&mut answer)).await.context("no answer")?.unwrap_or(0);
    Ok(String::from_utf8_lossy(&answer[..count]).into_owned())
}

/// The good agent's bytes go on to be committed, and nobody needs more memory than is allowed.
async fn undisturbed(cluster: &mut Cluster, writer: &Writer, after: &str) -> Result<()> {
    writer.wait_for_more(1000).await?;
    let committed = cluster.agent_committed(0).await?;
    until(format!("the good agent to ship on after {after}"), LIMIT, async || {
        Ok((cluster.agent_committed(0).await? > committed).then_some(()))
    })
    .await?;
    cluster.check_alive()?;
    for role in SERVERS {
        let peak = Usage::of(cluster.pid(role)?)?.peak_bytes;
        ensure!(peak < MOST_MEMORY, "{role} needed {} MiB after {after}", peak >> 20);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_garbage_and_other_versions_are_refused_and_say_why() -> Result<()> {
    scenario("bad peers: lies", options(), async |cluster| {
        let writer = rotating_writer(cluster, 0)?;
        writer.wait_for_more(2000).await?;
        let mut seen = Vec::new();
        for role in SERVERS {
            let url = cluster.url(role, BATCHES_PATH)?;
            let good = encoded(&batch("liar", 4000)?);
            let edit = |edit: &dyn Fn(&mut BytesMut) -> Result<()>| -> Result<Bytes> {
                let mut bytes = good.clone();
                edit(&mut bytes)?;
                Ok(seal(bytes))
            };
            let word = |at: usize, value: u32| {
                edit(&move |bytes| {
                    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
                    Ok(())
                })
            };
            let body_len = u32::try_from(good.len())?;
            let cases: Vec<(&str, Bytes, &str)> = vec![
                ("nothing", Bytes::new(), "no batch"),
                ("garbage", Bytes::from(vec![0xa5; 50_000]), "not the beginning of a batch"),
                ("another version", word(0, u32::from_le_bytes(*b"TBT9"))?, "version"),
                ("a header longer than the request", word(4, 60_000)?, "cut off"),
                ("a header longer than any", word(4, u32::MAX)?, "at most"),
                ("a body longer than the request", word(8, body_len + 1)?, "cut off"),
                ("a body longer than any", word(8, u32::MAX)?, "at most"),
                ("a shorter body", word(8, 10)?, "corrupt"),
                ("a wrong checksum of the header", {
                    let mut bytes = good.clone();
                    bytes[12] ^= 1;
                    bytes.freeze()
                }, "checksum"),
                ("a wrong checksum of the body", {
                    let mut bytes = good.clone();
                    let last = bytes.len() - 1;
                    bytes[last] ^= 1;
                    bytes.freeze()
                }, "checksum"),
                ("a category that is a path", edit(&|bytes| replace(bytes, b"nginx-access", b"../../../etc"))?, "corrupt"),
                ("a category with a slash", edit(&|bytes| replace(bytes, b"nginx-access", b"nginx/access"))?, "corrupt"),
                ("an agent that is a path", edit(&|bytes| replace(bytes, b"liar", b"../x"))?, "corrupt"),
                ("another agent than in the frame", edit(&|bytes| replace(bytes, b"liar", b"liax"))?, "another"),
                // The last byte of the header is the frame's length, the one before the slices their number.
                ("two batches, the second cut off", [good.clone().freeze(), good.clone().freeze().slice(..100)].concat().into(), "batch 1"),
            ];
            for (what, body, wanted) in cases {
                let (status, text) = post(&url, BATCHES_CONTENT_TYPE, body).await?;
                ensure!(status.is_client_error(), "{role} answered {status} to {what}: {text}");
                ensure!(text.contains(wanted), "{role} said of {what}: {text}");
            }
            // A category that isn't there is refused for that batch only.
            let mut other = batch("liar", 4000)?;
            other.header.category = "no-such".parse()?;
            let (status, text) = post(&url, BATCHES_CONTENT_TYPE, encoded(&other).freeze()).await?;
            ensure!(status.is_client_error() || text.contains("refused"), "{role}: {status} {text}");
            // Wrong types, paths and queries.
            let wrong_version = BATCHES_CONTENT_TYPE.replace("v1", "v9");
            let (status, text) = post(&url, &wrong_version, good.clone().freeze()).await?;
            ensure!(status == StatusCode::UNSUPPORTED_MEDIA_TYPE && text.contains("same release"), "{status} {text}");
            let mut large = connect(cluster, role).await?;
            large.write_all(head("Content-Length: 5000000").as_bytes()).await?;
            let answer = until_closed_or_answered(&mut large).await?;
            ensure!(answer.starts_with("HTTP/1.1 413"), "{role} answered a request that is too large: {answer}");
            let positions = cluster.url(role, POSITIONS_PATH)?;
            for (what, query) in [
                ("no JSON", "{".to_owned()),
                ("deep JSON", "[".repeat(100_000)),
                ("another JSON", r#"{"streams":7}"#.to_owned()),
                ("a path for a category", r#"{"streams":[{"lane":0,"agent":"a","category":"../x","stream":"000000000000000000000000000000ff","committed":null}]}"#.to_owned()),
                ("too many streams", format!(r#"{{"streams":[{}]}}"#, vec![r#"{"lane":0,"agent":"a","category":"x","stream":"000000000000000000000000000000ff","committed":null}"#; 10_001].join(","))),
            ] {
                let (status, text) = post(&positions, "application/json", query).await?;
                ensure!(status.is_client_error(), "{role} answered {status} to {what}: {text}");
            }
            for path in ["/../../etc/passwd", "/v1/batches/../../x", "/%2e%2e/etc/passwd", "//etc/passwd"] {
                let mut stream = connect(cluster, role).await?;
                stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes()).await?;
                let answer = until_closed(&mut stream).await?;
                ensure!(answer.starts_with("HTTP/1.1 404"), "{role} answered {path}: {answer}");
            }
            // No HTTP at all, and a head without an end.
            for bytes in [&b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..], &[0_u8; 4096], &[b'A'; 200_000]] {
                let mut stream = connect(cluster, role).await?;
                let _ = stream.write_all(bytes).await;
                let answer = until_closed(&mut stream).await?;
                ensure!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{role}: {answer}");
            }
            seen.push(cluster.metric(role, "tributary_aggregator_rejected_total").await?);
            ensure!(cluster.metric(role, "tributary_aggregator_http_panics_total").await? < 0.5, "{role} has panicked");
        }
        ensure!(seen.iter().all(|count| *count >= 20.0), "refusals are counted: {seen:?}");
        undisturbed(cluster, &writer, "lies").await?;
        stop(writer)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_never_end_and_ten_thousand_connections_cost_little_and_end() -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?;
    scenario("bad peers: slow and many", options(), async |cluster| {
        let writer = rotating_writer(cluster, 0)?;
        writer.wait_for_more(2000).await?;
        for role in SERVERS {
            // Nothing comes; less comes than was said; a byte at a time; chunks without an end.
            let mut silent = connect(cluster, role).await?;
            silent.write_all(head("Content-Length: 1000000").as_bytes()).await?;
            let mut short = connect(cluster, role).await?;
            short.write_all(head("Content-Length: 1000").as_bytes()).await?;
            short.write_all(&[7; 500]).await?;
            short.shutdown().await?;
            let mut crumbs = connect(cluster, role).await?;
            crumbs.write_all(head("Content-Length: 100000").as_bytes()).await?;
            let mut endless = connect(cluster, role).await?;
            endless.write_all(head("Transfer-Encoding: chunked").as_bytes()).await?;
            let (mut crumbs_in, mut crumbs_out) = crumbs.split();
            let drip = async {
                while crumbs_out.write_all(b"x").await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            };
            let mut answer = vec![0; 12];
            tokio::select! {
                () = drip => {}
                read = crumbs_in.read_exact(&mut answer) => { read?; }
            }
            ensure!(answer == b"HTTP/1.1 408", "{role}: {:?}", String::from_utf8_lossy(&answer));
            let flood = async {
                let chunk = [&b"8000\r\n"[..], &[b'x'; 0x8000], b"\r\n"].concat();
                while endless.write_all(&chunk).await.is_ok() {}
            };
            tokio::time::timeout(LIMIT, flood).await.context("a body without an end is read for ever")?;
            ensure!(until_closed(&mut silent).await?.starts_with("HTTP/1.1 408"));
            let answer = until_closed(&mut short).await?;
            ensure!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{answer}");
            undisturbed(cluster, &writer, "slow bodies").await?;

            // More bodies at the same time than there is memory for: some are put off.
            let mut busy = 0;
            let mut open = Vec::new();
            for _ in 0..20 {
                let mut stream = connect(cluster, role).await?;
                stream.write_all(head("Content-Length: 4000000").as_bytes()).await?;
                open.push(stream);
            }
            for stream in &mut open {
                let answer = until_closed_or_answered(stream).await?;
                busy +=
                    usize::from(answer.starts_with("HTTP/1.1 429") && answer.to_lowercase().contains("retry-after"));
            }
            ensure!(busy >= 10, "{role} put off {busy} of 20 requests of 4 MB each");
            undisturbed(cluster, &writer, "many bodies").await?;
        }
        // Ten thousand that say nothing, and then more than there may be.
        let role = Role::Edge(0);
        let mut idle = Vec::new();
        for _ in 0..9_900 {
            idle.push(connect(cluster, role).await?);
        }
        undisturbed(cluster, &writer, "9,900 connections").await?;
        let mut refused = 0;
        for _ in 0..150 {
            let mut stream = connect(cluster, role).await?;
            let mut answer = [0; 12];
            let read = tokio::time::timeout(Duration::from_millis(50), stream.read_exact(&mut answer)).await;
            refused += usize::from(read.is_ok_and(|read| read.is_ok()) && &answer == b"HTTP/1.1 503");
            idle.push(stream);
        }
        ensure!(refused > 0, "connections over the limit are refused");
        undisturbed(cluster, &writer, "10,050 connections").await?;
        until("those that say nothing to be closed", LIMIT, async || {
            let open = cluster.metric(role, "tributary_aggregator_http_connections").await?;
            Ok((open < 20.0).then_some(()))
        })
        .await?;
        drop(idle);
        for role in SERVERS {
            println!("{role}: peak {} MiB", Usage::of(cluster.pid(role)?)?.peak_bytes >> 20);
        }
        stop(writer)
    })
    .await
}
