//! Real logs of several kinds: what cutting, reading times and framing add to the bare compressor for each.

use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use jiff::tz::TimeZone;
use libdeflater::{CompressionLvl, Compressor};
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;
use tributary_agent::compress::{BatchFacts, Packer};
use tributary_agent::config::{LongLines, TimeFormat, TimestampOptions};
use tributary_agent::cut::{CutOptions, DataEnd, Input, cut};
use tributary_agent::timestamp::TimeReader;
use tributary_common::bucket::BucketSize;
use tributary_common::frame::Codec;
use tributary_common::ids::{LaneId, StreamId};
use tributary_common::position::{Position, TailHash};

use super::compressor::{BATCH_BYTES, LEVEL, thread_cpu};
use super::figures::{gib, rounded, table};
use crate::hdfs::{HdfsOptions, MiniHdfs};
use crate::load::{Load, LoadOptions};
use crate::nginx::Nginx;

/// Each kind is repeated until it has so many bytes, more than any cache.
const SIZE: usize = 256 << 20;

struct Corpus {
    name: &'static str,
    times: TimestampOptions,
    text: Vec<u8>,
}

/// What was measured of one.
#[derive(Clone, Debug)]
pub struct Measured {
    name: &'static str,
    /// Bytes that this machine has of it.
    found: usize,
    bytes_per_line: f64,
    compressed: f64,
    bare: Duration,
    agent: Duration,
    raw: u64,
}

/// Gathers what this machine has, and measures each kind on one thread.
///
/// # Errors
/// HDFS can't be started, or a log can't be read.
pub async fn measure() -> Result<Vec<Measured>> {
    gather().await?.iter().map(one).collect()
}

/// The measured kinds as a table in Markdown.
#[must_use]
pub fn markdown(measured: &[Measured]) -> String {
    let head = ["", "KiB found", "bytes a line", "compressed / raw", "compressor alone, s per GiB", "agent's part, ×"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for Measured { name, found, bytes_per_line, compressed, bare, agent, raw } in measured {
        rows.push(vec![
            (*name).to_owned(),
            (found >> 10).to_string(),
            rounded(*bytes_per_line),
            rounded(*compressed),
            rounded(bare.as_secs_f64() / gib(*raw)),
            rounded(agent.as_secs_f64() / bare.as_secs_f64()),
        ]);
    }
    table(&rows)
}

fn times(format: &str, json_field: Option<&str>) -> TimestampOptions {
    TimestampOptions {
        formats: vec![TimeFormat::Strptime(format.to_owned())],
        after: Bytes::new(),
        json_field: json_field.map(str::to_owned),
        timezone: TimeZone::UTC,
    }
}

/// Java's logs with stack traces (of a real HDFS), a web server's as lines of JSON and as syslog, and the package manager's.
async fn gather() -> Result<Vec<Corpus>> {
    let (json, syslog) = web_server().await?;
    let mut found = vec![
        Corpus {
            name: "HDFS daemons: Java, stack traces",
            times: times("%Y-%m-%d %H:%M:%S,%3f", None),
            text: java().await?,
        },
        Corpus { name: "nginx: JSON lines", times: times("%Y-%m-%dT%H:%M:%S%:z", Some("time")), text: json },
        Corpus { name: "nginx: syslog", times: times("%b %e %H:%M:%S", None), text: syslog },
    ];
    let dpkg = Path::new("/var/log/dpkg.log");
    if dpkg.exists() {
        found.push(Corpus { name: "dpkg.log", times: times("%Y-%m-%d %H:%M:%S", None), text: fs::read(dpkg)? });
    }
    found.retain(|corpus| corpus.text.contains(&b'\n'));
    Ok(found)
}

async fn java() -> Result<Vec<u8>> {
    let mut hdfs = MiniHdfs::start(HdfsOptions::default()).await?;
    // Without a DataNode the NameNode and its clients have much to say, with stack traces.
    hdfs.kill_datanode(0)?;
    hdfs.start_datanode(0).await?;
    let mut text = Vec::new();
    for entry in fs::read_dir(hdfs.log_dir())? {
        let path = entry?.path();
        if path.is_file() {
            text.extend(fs::read(&path).with_context(|| format!("reading {}", path.display()))?);
        }
    }
    Ok(text)
}

/// The log of a real nginx under load, as lines of JSON and as what it sends to a syslog daemon.
async fn web_server() -> Result<(Vec<u8>, Vec<u8>)> {
    let folder = tempfile::tempdir()?;
    let json = folder.path().join("json.log");
    let socket = UdpSocket::bind("127.0.0.1:0").await?;
    let directives = format!(
        r#"log_format json escape=json '{{"time":"$time_iso8601","client":"$remote_addr","method":"$request_method",'
            '"uri":"$request_uri","status":$status,"bytes":$body_bytes_sent,"seconds":$request_time,'
            '"referrer":"$http_referer","agent":"$http_user_agent","id":"$request_id"}}';
        access_log "{}" json;
        access_log syslog:server={} unique;"#,
        json.display(),
        socket.local_addr()?
    );
    let end = CancellationToken::new();
    let syslog = tokio::spawn(hear_syslog(socket, end.clone()));
    let nginx = Nginx::start_with(folder.path().join("access.log"), &directives).await?;
    Load::start(&nginx.url(), &LoadOptions { requests: 20_000, ..LoadOptions::default() })?.finish().await?;
    nginx.quit().await?;
    end.cancel();
    Ok((fs::read(&json).with_context(|| format!("reading {}", json.display()))?, syslog.await??))
}

/// The lines that a syslog daemon would write, of all that came until the end.
async fn hear_syslog(socket: UdpSocket, end: CancellationToken) -> Result<Vec<u8>> {
    let (mut text, mut message) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        let received = match end.run_until_cancelled(socket.recv(&mut message)).await {
            Some(received) => received?,
            // What is still in the socket.
            None => match socket.try_recv(&mut message) {
                Ok(received) => received,
                Err(_) => return Ok(text),
            },
        };
        let line = &message[..received];
        // A daemon writes all but the priority.
        let from = line.iter().position(|byte| *byte == b'>').map_or(0, |end| end + 1);
        text.extend_from_slice(&line[from..]);
        text.push(b'\n');
    }
}

fn one(corpus: &Corpus) -> Result<Measured> {
    let whole_lines = corpus.text.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
    let text = corpus.text[..whole_lines].repeat(SIZE.div_ceil(whole_lines.max(1)));
    let level = CompressionLvl::new(LEVEL).map_err(|error| anyhow::anyhow!("level {LEVEL}: {error:?}"))?;
    let mut compressor = Compressor::new(level);
    let mut room = vec![0; compressor.gzip_compress_bound(BATCH_BYTES)];
    let (mut packer, mut times) = (Packer::default(), TimeReader::new(&corpus.times));
    let facts = BatchFacts {
        lane: LaneId(0),
        agent: "bench".parse()?,
        host: "bench".into(),
        category: "app".parse()?,
        stream: StreamId(1),
        base: Position::zero(),
        committed: Position::zero(),
        prefix_len: 0,
    };
    let options = CutOptions {
        max_line_bytes: 1 << 20,
        long_lines: LongLines::Split,
        prefix: Bytes::new(),
        bucket: BucketSize::HOUR,
        max_stored_bytes: 2 * BATCH_BYTES,
    };
    let now_ms = jiff::Timestamp::now().as_millisecond();
    let (mut start, mut lines, mut carry_ms, mut compressed) = (Position::zero(), 0, None, 0);
    let (mut bare, mut agent) = (Duration::ZERO, Duration::ZERO);
    for round in 0.. {
        if start.offset as usize >= text.len() {
            break;
        }
        let at = start.offset as usize;
        let data = &text[at..(at + BATCH_BYTES).min(text.len())];
        let input = Input {
            data,
            offset: start.offset,
            end: DataEnd::Open,
            inside_line: false,
            skipping: false,
            carry_ms,
            now_ms,
        };
        let mut compress = || -> Result<()> {
            let begun = thread_cpu();
            let length = compressor.gzip_compress(data, &mut room);
            compressed += length.map_err(|error| anyhow::anyhow!("compressing: {error}"))?;
            bare += thread_cpu() - begun;
            Ok(())
        };
        // Each is the first to see the bytes as often as the other.
        let is_first = round % 2 == 0;
        if is_first {
            compress()?;
        }
        let begun = thread_cpu();
        let cut = cut(&options, input, Some(&mut times));
        ensure!(cut.len > 0, "{} has a line of more than {BATCH_BYTES} bytes", corpus.name);
        let end = Position { offset: start.offset + cut.len as u64, tail: TailHash::of(&text[..at + cut.len]) };
        black_box(packer.pack((Codec::Gzip, LEVEL), facts.clone(), (start, end), &cut, data)?);
        agent += thread_cpu() - begun;
        if !is_first {
            compress()?;
        }
        (start, carry_ms, lines) = (end, cut.carry_ms, lines + cut.lines);
    }
    Ok(Measured {
        name: corpus.name,
        found: corpus.text.len(),
        bytes_per_line: text.len() as f64 / lines.max(1) as f64,
        compressed: compressed as f64 / text.len() as f64,
        bare,
        agent,
        raw: text.len() as u64,
    })
}
