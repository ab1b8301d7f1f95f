//! Senders that are nothing but senders: batches made before, sent as fast as they are taken, or at a given rate.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use bytes::Bytes;
use reqwest::Client;
use tokio::task::JoinSet;
use tributary_agent::compress::{BatchFacts, Packer};
use tributary_agent::config::{LongLines, TimeFormat, TimestampOptions};
use tributary_agent::cut::{CutOptions, DataEnd, Input, cut};
use tributary_agent::ship::{Sender, ShipError};
use tributary_agent::timestamp::TimeReader;
use tributary_common::batch::Batch;
use tributary_common::bucket::BucketSize;
use tributary_common::frame::Codec;
use tributary_common::http::client::{ClientOptions, build};
use tributary_common::http::endpoint::Endpoint;
use tributary_common::ids::{AgentId, CategoryName, LaneCount, StreamId};
use tributary_common::messages::Verdict;
use tributary_common::position::{Position, TAIL_WINDOW_BYTES, TailHash};

use super::receiver::CRC_HEADER;
use crate::synthetic::{AccessLog, TIME_AFTER, TIME_FORMAT};

/// How long a sender waits that was told to come later, and was not told when.
const PAUSE: Duration = Duration::from_millis(50);

/// What lines are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Text {
    /// Lines of an access log.
    Access,
    /// Lines of so many random bytes, as characters that compress by a quarter.
    Random(usize),
}

/// Makes batches as an agent does, for any number of streams.
pub struct Maker {
    log: AccessLog,
    times: TimeReader,
    packer: Packer,
}

impl Default for Maker {
    fn default() -> Self {
        let times = TimeReader::new(&TimestampOptions {
            formats: vec![TimeFormat::Strptime(TIME_FORMAT.to_owned())],
            after: TIME_AFTER.into(),
            json_field: None,
            timezone: jiff::tz::TimeZone::UTC,
        });
        Self { log: AccessLog::default(), times, packer: Packer::default() }
    }
}

/// The stream of one file of one agent.
#[derive(Clone, Debug)]
pub struct Stream {
    facts: BatchFacts,
    end: Position,
    /// Bytes of the stream just before `end`, as many as tail hashes are made of.
    window: Vec<u8>,
    serial: u64,
    /// How far the time of its lines is behind the clock, in seconds.
    behind_s: i64,
}

impl Stream {
    /// Stream `number` of all, which belongs to agent `agent`. Only streams with different numbers have different lines.
    ///
    /// # Errors
    /// Never with the category of a [`Cluster`](crate::cluster::Cluster)'s defaults.
    pub fn new(agent: u64, number: u64) -> Result<Self> {
        let agent: AgentId = format!("bench-{agent}").parse()?;
        let category: CategoryName = "nginx-access".parse()?;
        let facts = BatchFacts {
            lane: agent.lane(LaneCount::try_from(1).map_err(anyhow::Error::msg)?),
            host: agent.to_string(),
            agent,
            category,
            stream: StreamId(u128::from(number) + 1),
            base: Position::zero(),
            committed: Position::zero(),
            prefix_len: 0,
        };
        Ok(Self { facts, end: Position::zero(), window: Vec::new(), serial: number << 32, behind_s: 0 })
    }

    /// The same with lines of an earlier time.
    #[must_use]
    pub fn behind(mut self, seconds: i64) -> Self {
        self.behind_s = seconds;
        self
    }

    /// The batch that follows, of at least `raw_bytes` of lines of one second.
    ///
    /// # Errors
    /// Never: what is cut is what was made.
    pub fn next(&mut self, maker: &mut Maker, text: Text, raw_bytes: usize) -> Result<Batch> {
        let now = jiff::Timestamp::now();
        let known = self.window.len();
        let mut bytes = std::mem::take(&mut self.window);
        while bytes.len() - known < raw_bytes {
            match text {
                Text::Access => maker.log.line(self.serial, now.as_second() - self.behind_s, &mut bytes),
                Text::Random(len) => bytes.extend(random_line(len)),
            }
            self.serial += 1;
        }
        let options = CutOptions {
            max_line_bytes: 1 << 20,
            long_lines: LongLines::Split,
            prefix: Bytes::new(),
            bucket: BucketSize::HOUR,
            max_stored_bytes: 2 * bytes.len(),
        };
        let data = &bytes[known..];
        let input = Input {
            data,
            offset: self.end.offset,
            end: DataEnd::Open,
            inside_line: false,
            skipping: false,
            carry_ms: None,
            now_ms: now.as_millisecond(),
        };
        let cut = cut(&options, input, Some(&mut maker.times));
        ensure!(cut.len == data.len(), "whole lines are cut whole");
        let end = Position { offset: self.end.offset + cut.len as u64, tail: TailHash::of(&bytes) };
        let batch = maker.packer.pack((Codec::Gzip, 1), self.facts.clone(), (self.end, end), &cut, data)?;
        self.end = end;
        self.window = bytes.split_off(bytes.len().saturating_sub(TAIL_WINDOW_BYTES));
        Ok(batch)
    }

    /// Every batch from now on says that the stream is committed up to there.
    pub fn committed(&mut self, committed: Position) {
        self.facts.committed = committed;
    }
}

/// A line of `len` random characters.
fn random_line(len: usize) -> Vec<u8> {
    const CHARACTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut line: Vec<u8> = vec![0; len.max(1)];
    rand::fill(&mut line[..]);
    line.iter_mut().for_each(|byte| *byte = CHARACTERS[usize::from(*byte & 63)]);
    *line.last_mut().expect("a line has a byte") = b'\n';
    line
}

/// Batches of one stream, and how many bytes they have on the wire.
#[derive(Clone, Debug)]
pub struct Made {
    /// In the stream's order.
    pub batches: Vec<Batch>,
    /// Bytes of all of them in requests.
    pub wire: u64,
}

/// Makes the batches of `streams` streams, each of `batches` batches with `raw_bytes` bytes of lines.
///
/// # Errors
/// As of [`Stream::next`].
pub fn make(streams: u64, batches: usize, raw_bytes: usize) -> Result<Vec<Made>> {
    let mut maker = Maker::default();
    let one = |number| {
        let mut stream = Stream::new(number, number)?;
        let batches =
            (0..batches).map(|_| stream.next(&mut maker, Text::Access, raw_bytes)).collect::<Result<Vec<_>>>()?;
        let wire = batches.iter().map(Batch::encoded_len).sum();
        Ok(Made { batches, wire })
    };
    (0..streams).map(one).collect()
}

/// A client with one connection.
///
/// # Errors
/// The system gives none.
pub fn client() -> Result<Client> {
    let options = ClientOptions {
        connect_timeout: Duration::from_secs(10),
        request_timeout: Duration::from_secs(60),
        max_idle_connections: 1,
    };
    Ok(build(&options)?)
}

/// Sends batches of one stream in one request, again until they are taken; returns how far the receiver says that the stream is
/// committed.
///
/// # Errors
/// One is refused, or there is no answer.
pub async fn send(sender: &Sender, mut batches: &[Batch]) -> Result<Option<Position>> {
    let mut committed = None;
    while let Some(first) = batches.first() {
        let pieces = batches.iter().flat_map(|batch| [batch.encode_head(), batch.body.clone()]).collect();
        match sender.batches(pieces, batches.len()).await {
            Ok(answers) => {
                let taken = answers.answers.iter().take_while(|answer| answer.verdict == Verdict::Ok).count();
                committed = answers.answers.iter().filter_map(|answer| answer.committed).next_back().or(committed);
                match answers.answers.get(taken).map(|answer| &answer.verdict) {
                    None => ensure!(taken == batches.len(), "{taken} answers for {} batches", batches.len()),
                    Some(Verdict::Wait { .. }) => tokio::time::sleep(PAUSE).await,
                    Some(verdict) => {
                        bail!("the batch {taken} behind that at {} was answered {verdict:?}", first.header.start)
                    }
                }
                batches = &batches[taken..];
            }
            Err(ShipError::Busy { after, .. }) => tokio::time::sleep(after.unwrap_or(PAUSE)).await,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(committed)
}

/// Sends the batches of each stream over a connection of its own, one request after the other; returns the time that it took.
///
/// # Errors
/// As of [`send`].
pub async fn send_all(endpoint: &Endpoint, streams: Vec<Made>) -> Result<Duration> {
    let begun = Instant::now();
    let mut senders = JoinSet::new();
    for made in streams {
        let sender = Sender { client: client()?, endpoint: endpoint.clone() };
        senders.spawn(async move {
            let mut committed = None;
            for mut batch in made.batches {
                batch.header.committed = committed.unwrap_or(batch.header.committed);
                committed = send(&sender, &[batch]).await?.or(committed);
            }
            Ok::<_, anyhow::Error>(())
        });
    }
    while let Some(sent) = senders.join_next().await {
        sent??;
    }
    Ok(begun.elapsed())
}

/// Sends the same bodies to the [baseline](super::receiver), in the same way.
///
/// # Errors
/// It doesn't take one.
pub async fn send_all_to_baseline(port: u16, streams: Vec<Made>) -> Result<Duration> {
    let begun = Instant::now();
    let mut senders = JoinSet::new();
    for made in streams {
        let (client, url) = (client()?, format!("http://127.0.0.1:{port}/"));
        senders.spawn(async move {
            for batch in made.batches {
                let (head, body) = (batch.encode_head(), batch.body);
                let crc = crc32c::crc32c_append(crc32c::crc32c(&head), &body);
                let bytes = [head, body].concat();
                client.post(&url).header(CRC_HEADER, crc).body(bytes).send().await?.error_for_status()?;
            }
            Ok::<_, anyhow::Error>(())
        });
    }
    while let Some(sent) = senders.join_next().await {
        sent??;
    }
    Ok(begun.elapsed())
}
