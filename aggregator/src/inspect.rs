//! `inspect`: what is in segments and published files, frame by frame.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Args;
use serde_json::json;
use tributary_common::frame::FrameHeader;

use crate::dfs::{DfsOptions, DfsPath, open_dfs};
use crate::frames::{Frame, Frames, Source};

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

struct Target {
    name: String,
    len: u64,
    source: Source,
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
    let files = targets.len();
    for target in targets {
        inspect(target, options, out, &mut totals).await?;
    }
    if !options.json {
        let Totals { frames, slices, records, bytes, stored, damaged } = totals;
        let checked = if options.verify { ", bodies verified" } else { "" };
        writeln!(
            out,
            "{files} files, {frames} frames, {slices} slices, {records} records, {bytes} bytes, {stored} decompressed; {damaged} damaged{checked}"
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

async fn inspect(target: Target, options: &Options, out: &mut impl Write, totals: &mut Totals) -> anyhow::Result<()> {
    let Target { name, len, source } = target;
    if !options.json && !options.summary {
        writeln!(out, "{name}  {len} bytes")?;
    }
    let mut frames = Frames::new(name.clone(), source, len, options.verify);
    while let Some(frame) = frames.next().await? {
        match frame {
            Ok(Frame { offset, header, .. }) => {
                report(&name, offset, &header, options, out)?;
                totals.frames += 1;
                totals.slices += header.slices.len() as u64;
                totals.records += header.records();
                totals.stored += header.stored_len();
                totals.bytes += u64::from(header.frame_len);
            }
            Err(error) => {
                let at = frames.offset();
                totals.damaged += 1;
                if options.json {
                    let line = json!({ "file": name, "offset": at, "error": error.to_string() });
                    writeln!(out, "{line}")?;
                } else {
                    writeln!(out, "{name}: at {at} of {len}: {error}")?;
                }
                return Ok(());
            }
        }
    }
    Ok(())
}

fn report(name: &str, at: u64, header: &FrameHeader, options: &Options, out: &mut impl Write) -> io::Result<()> {
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
            "file": name, "offset": at, "length": header.frame_len, "codec": codec,
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
    use bytes::Bytes;
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
