//! `inspect`: what is in segments and published files, frame by frame.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Args;
use serde_json::json;
use tributary_common::frame::{FrameError, FrameHeader, Peek};

use crate::dfs::{Dfs, DfsOptions, DfsPath, open_dfs};

/// How much is read at once: the headers of many small frames, or the beginning of a large one.
const READ_BYTES: usize = 1 << 20;

/// What to inspect, and how.
#[derive(Debug, Args)]
pub struct Options {
    /// A file or a directory: a path, or a URI (file:///…, hdfs://…). Of a directory, all files in it and below.
    #[arg(value_name = "URI-OR-FILE")]
    pub target: String,
    /// Also read, check and decompress the frames' bodies.
    #[arg(long)]
    pub verify: bool,
    /// One JSON object per frame, for programs.
    #[arg(long)]
    pub json: bool,
    /// Only the totals.
    #[arg(long, conflicts_with = "json")]
    pub summary: bool,
}

/// Where the bytes come from.
enum Source {
    Local(File),
    Dfs(Arc<dyn Dfs>, DfsPath),
}

struct Target {
    name: String,
    len: u64,
    source: Source,
}

impl Target {
    /// Up to `len` bytes from `offset`; fewer only at the end.
    async fn read(&self, offset: u64, len: usize) -> anyhow::Result<Bytes> {
        let len = len.min(self.len.saturating_sub(offset) as usize);
        match &self.source {
            Source::Local(file) => {
                let mut buffer = vec![0; len];
                let mut have = 0;
                while have < len {
                    match file.read_at(&mut buffer[have..], offset + have as u64)? {
                        0 => break,
                        read => have += read,
                    }
                }
                buffer.truncate(have);
                Ok(buffer.into())
            }
            Source::Dfs(dfs, path) => Ok(dfs.read(path, offset, len).await?),
        }
    }
}

/// Lists what `options` name. Returns whether anything is damaged.
///
/// # Errors
/// When something can't be read or written.
pub async fn run(options: &Options, out: &mut impl Write) -> anyhow::Result<bool> {
    let targets = find(&options.target).await?;
    if targets.is_empty() {
        bail!("{}: there are no .gz or .zst files in it", options.target);
    }
    let mut totals = Totals::default();
    for target in &targets {
        inspect(target, options, out, &mut totals).await?;
    }
    if !options.json {
        let Totals { frames, slices, records, bytes, stored, damaged } = totals;
        let checked = if options.verify { ", bodies verified" } else { "" };
        writeln!(
            out,
            "{} files, {frames} frames, {slices} slices, {records} records, {bytes} bytes, {stored} decompressed; {damaged} damaged{checked}",
            targets.len()
        )?;
    }
    Ok(totals.damaged > 0)
}

#[derive(Default)]
struct Totals {
    frames: u64,
    slices: u64,
    records: u64,
    bytes: u64,
    stored: u64,
    damaged: u64,
}

async fn find(target: &str) -> anyhow::Result<Vec<Target>> {
    let mut found = Vec::new();
    if target.contains("://") {
        // What is asked for becomes a path below its parent: the target may be a file.
        let trimmed = target.trim_end_matches('/');
        let (parent, name) = trimmed.rsplit_once('/').with_context(|| format!("{target:?} is not a URI of a file"))?;
        if parent.ends_with('/') || parent.ends_with(':') {
            bail!("{target:?} names no file or directory below the file system's root");
        }
        if let Some(local) = parent.strip_prefix("file://")
            && !Path::new(local).is_dir()
        {
            bail!("{parent}: there is no such directory");
        }
        let dfs = open_dfs(parent, &DfsOptions::default()).await?;
        let path = DfsPath::base().join(name);
        let status = dfs.stat(&path).await?.with_context(|| format!("{target}: nothing is there"))?;
        let mut open = vec![(path, status)];
        while let Some((path, status)) = open.pop() {
            if !status.is_dir {
                let name = format!("{parent}/{path}");
                found.push(Target { name, len: status.len, source: Source::Dfs(Arc::clone(&dfs), path) });
                continue;
            }
            let entries = dfs.list(&path).await?.unwrap_or_default();
            let wanted = entries.into_iter().filter(|entry| entry.status.is_dir || is_data(&entry.name));
            open.extend(wanted.map(|entry| (path.join(&entry.name), entry.status)));
        }
    } else {
        let mut open = vec![PathBuf::from(target)];
        while let Some(path) = open.pop() {
            let context = || path.display().to_string();
            let meta = std::fs::metadata(&path).with_context(context)?;
            if !meta.is_dir() {
                let file = File::open(&path).with_context(context)?;
                found.push(Target { name: context(), len: meta.len(), source: Source::Local(file) });
                continue;
            }
            for entry in std::fs::read_dir(&path).with_context(context)? {
                let entry = entry.with_context(context)?;
                let is_dir = entry.file_type().with_context(context)?.is_dir();
                if is_dir || entry.file_name().to_str().is_some_and(is_data) {
                    open.push(entry.path());
                }
            }
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

fn is_data(name: &str) -> bool {
    name.ends_with(".gz") || name.ends_with(".zst")
}

async fn inspect(target: &Target, options: &Options, out: &mut impl Write, totals: &mut Totals) -> anyhow::Result<()> {
    if !options.json && !options.summary {
        writeln!(out, "{}  {} bytes", target.name, target.len)?;
    }
    let mut at = 0;
    let mut window = (0, Bytes::new());
    while at < target.len {
        match frame_at(target, at, options.verify, &mut window).await? {
            Ok(header) => {
                report(target, at, &header, options, out)?;
                totals.frames += 1;
                totals.slices += header.slices.len() as u64;
                totals.records += header.records();
                totals.stored += header.stored_len();
                totals.bytes += u64::from(header.frame_len);
                at += u64::from(header.frame_len);
            }
            Err(error) => {
                totals.damaged += 1;
                if options.json {
                    let line = json!({ "file": target.name, "offset": at, "error": error.to_string() });
                    writeln!(out, "{line}")?;
                } else {
                    writeln!(out, "{}: at {at} of {}: {error}", target.name, target.len)?;
                }
                // Without its length, nobody knows where the next frame begins.
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The header of the frame at an offset, its body verified if wanted.
async fn frame_at(
    target: &Target,
    at: u64,
    verify: bool,
    window: &mut (u64, Bytes),
) -> anyhow::Result<Result<FrameHeader, FrameError>> {
    let mut want = 1;
    let header = loop {
        let bytes = look(target, at, want, window).await?;
        match FrameHeader::peek(&bytes) {
            Ok(Peek::Header(header)) => break header,
            Ok(Peek::Need(more)) if bytes.len() < more && bytes.len() < want => {
                return Ok(Err(FrameError::Truncated { have: bytes.len() as u64, want: more as u64 }));
            }
            Ok(Peek::Need(more)) => want = more,
            Err(error) => return Ok(Err(error)),
        }
    };
    let len = header.frame_len as usize;
    let have = target.len - at;
    if have < len as u64 {
        return Ok(Err(FrameError::Truncated { have, want: len as u64 }));
    }
    if verify {
        let frame = look(target, at, len, window).await?;
        let frame = frame.slice(..len.min(frame.len()));
        return Ok(FrameHeader::verify(&frame).and_then(|header| header.decode(&frame).map(|_| header)));
    }
    Ok(Ok(header))
}

/// At least `want` bytes from `at`, fewer only at the end; from memory where they are.
async fn look(target: &Target, at: u64, want: usize, window: &mut (u64, Bytes)) -> anyhow::Result<Bytes> {
    let (start, bytes) = &*window;
    let held = at.checked_sub(*start).and_then(|skip| bytes.get(skip as usize..));
    if held.is_none_or(|held| held.len() < want) {
        let read = target.read(at, want.max(READ_BYTES)).await.with_context(|| target.name.clone())?;
        *window = (at, read);
    }
    Ok(window.1.slice((at - window.0) as usize..))
}

fn report(target: &Target, at: u64, header: &FrameHeader, options: &Options, out: &mut impl Write) -> io::Result<()> {
    if options.summary {
        return Ok(());
    }
    let codec = header.codec.extension();
    if options.json {
        let slices: Vec<_> = header
            .slices
            .iter()
            .map(|slice| {
                json!({
                    "agent": slice.agent, "host": slice.host, "stream": slice.stream, "base": slice.base,
                    "start": slice.start, "end": slice.end, "runs": slice.runs, "records": slice.records,
                    "prefix_len": slice.prefix_len, "altered": slice.altered,
                    "first_time_ms": slice.first_time_ms, "last_time_ms": slice.last_time_ms,
                })
            })
            .collect();
        let line = json!({
            "file": target.name, "offset": at, "length": header.frame_len, "codec": codec,
            "category": header.category, "bucket": header.bucket.to_string(), "records": header.records(),
            "decompressed": header.stored_len(), "slices": slices,
        });
        return writeln!(out, "{line}");
    }
    writeln!(
        out,
        "  {at:>12} +{:<9} {codec} {} {}  {} records, {} decompressed",
        header.frame_len,
        header.category,
        header.bucket,
        header.records(),
        header.stored_len(),
    )?;
    for slice in &header.slices {
        let runs: Vec<String> =
            slice.runs.iter().map(|run| format!("{}..{}", run.start, run.start + run.len)).collect();
        writeln!(
            out,
            "               {} {} {} of {}..{}: {}{}",
            slice.agent,
            slice.host,
            slice.stream,
            slice.start.offset,
            slice.end.offset,
            runs.join(" "),
            if slice.altered { ", altered" } else { "" },
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::batch;
    use tributary_common::ids::StreamId;

    fn frames(count: u64) -> Vec<Bytes> {
        (0..count).map(|n| batch(StreamId(7), n * 100, n * 100 + 100, 0).body).collect()
    }

    async fn look_at(target: &Path, uri: bool, verify: bool, json: bool) -> (bool, String) {
        let target = target.display().to_string();
        let target = if uri { format!("file://{target}") } else { target };
        let mut out = Vec::new();
        let damaged = run(&Options { target, verify, json, summary: false }, &mut out).await.expect("inspects");
        (damaged, String::from_utf8(out).expect("text"))
    }

    #[tokio::test]
    async fn every_frame_is_listed_with_what_it_holds() {
        let dir = tempfile::tempdir().expect("a directory");
        let below = dir.path().join("hr=20");
        std::fs::create_dir(&below).expect("made");
        std::fs::write(below.join("a.gz"), frames(3).concat()).expect("written");
        std::fs::write(below.join("_SUCCESS"), "").expect("written");
        for uri in [false, true] {
            for (target, verify) in [(dir.path().to_owned(), false), (below.join("a.gz"), true)] {
                let (damaged, text) = look_at(&target, uri, verify, false).await;
                assert!(!damaged);
                assert!(text.contains(": 200..300"), "{text}");
                assert!(text.contains("1 files, 3 frames, 3 slices, 3 records, "), "{text}");
                let (_, text) = look_at(&target, uri, verify, true).await;
                let lines: Vec<serde_json::Value> =
                    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
                assert_eq!(lines.len(), 3);
                assert_eq!(lines[1]["slices"][0]["runs"][0]["start"], 100);
            }
        }
    }

    #[tokio::test]
    async fn damage_is_found_in_headers_always_and_in_bodies_when_verifying() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("a.gz");
        let frames = frames(2);
        let whole = frames.concat();
        let mut body = whole.clone();
        let last = body.len() - 12;
        body[last] ^= 1;
        std::fs::write(&file, &body).expect("written");
        assert!(!look_at(&file, false, false, false).await.0, "headers are fine");
        let (damaged, text) = look_at(&file, false, true, false).await;
        assert!(damaged && text.contains("the frame's body is corrupt"), "{text}");
        let mut header = whole.clone();
        header[frames[0].len() + 30] ^= 1;
        std::fs::write(&file, &header).expect("written");
        let (damaged, text) = look_at(&file, true, false, false).await;
        assert!(damaged && text.contains("1 frames"), "{text}");
        std::fs::write(&file, &whole[..whole.len() - 1]).expect("written");
        let (damaged, text) = look_at(&file, false, false, false).await;
        assert!(damaged && text.contains("cut off"), "{text}");
    }
}
