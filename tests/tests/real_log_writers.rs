//! Real nginx under load, rotated by the real logrotate, has each answered request in its logs once.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::slice;
use std::time::Duration;

use anyhow::{Context, Result};
use tributary_tests::lines::Lines;
use tributary_tests::load::{Load, LoadOptions, LoadReport, serial_of};
use tributary_tests::logrotate::{Compress, Logrotate, LogrotateOptions, Method};
use tributary_tests::nginx::Nginx;
use tributary_tests::wait::until;

const LIMIT: Duration = Duration::from_secs(120);

fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}

/// The serials of all lines in `files`, compressed or not, sorted.
fn serials_in(files: &[PathBuf]) -> Result<Vec<u64>> {
    let mut serials = Vec::new();
    for file in files {
        let text = if file.extension().is_some_and(|extension| extension == "gz") {
            let mut text = String::new();
            let mut gzip = flate2::read::MultiGzDecoder::new(fs::File::open(file)?);
            std::io::Read::read_to_string(&mut gzip, &mut text)?;
            text
        } else {
            fs::read_to_string(file)?
        };
        for line in text.lines() {
            serials.push(serial_of(line).with_context(|| format!("{line:?} in {} has no serial", file.display()))?);
        }
    }
    serials.sort_unstable();
    Ok(serials)
}

async fn load(nginx: &Nginx, requests: u64) -> Result<LoadReport> {
    Load::start(&nginx.url(), &LoadOptions { requests, ..LoadOptions::default() })?.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn each_request_is_one_unique_line() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let nginx = Nginx::start(folder.path().join("access.log")).await?;
    let report = load(&nginx, 20_000).await?;
    assert!(nginx.quit().await?.success());
    assert_eq!(report.unanswered, [0; 0]);
    assert_eq!(report.answered, (0..20_000).collect::<Vec<_>>());
    let files = files_in(folder.path())?;
    assert_eq!(serials_in(&files)?, report.answered);
    let lines = Lines::of_files(files)?;
    assert_eq!(lines.len(), 20_000);
    assert!(lines.difference(&lines)?.is_none());
    Ok(())
}

async fn rotated_under_load(compress: Compress, dateext: bool) -> Result<()> {
    const ROTATIONS: u64 = 4;
    let folder = tempfile::tempdir()?;
    let nginx = Nginx::start(folder.path().join("access.log")).await?;
    let method = Method::Create { pid_file: nginx.pid_file() };
    let options = LogrotateOptions { compress, dateext, ..LogrotateOptions::new(nginx.access_log(), method) };
    let mut logrotate = Logrotate::new(&options)?;
    let load = Load::start(
        &nginx.url(),
        &LoadOptions { requests: u64::MAX, per_second: Some(3000), ..LoadOptions::default() },
    )?;
    for rotation in 1..=ROTATIONS {
        let enough = rotation * 4000;
        until("the load to go on", LIMIT, async || Ok((load.begun_requests() >= enough).then_some(()))).await?;
        logrotate.rotate().await?;
    }
    load.stop();
    let report = load.finish().await?;
    nginx.quit().await?;

    assert_eq!(report.unanswered, [0; 0]);
    let files = files_in(folder.path())?;
    assert_eq!(files.len() as u64, ROTATIONS + 1, "{files:?}");
    let compressed = files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "gz")).count();
    assert_eq!(compressed as u64, if compress == Compress::No { 0 } else { ROTATIONS - 1 }, "{files:?}");
    assert_eq!(serials_in(&files)?, report.answered);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn rotation_by_rename_loses_nothing_under_load() -> Result<()> {
    rotated_under_load(Compress::Delayed, false).await
}

#[tokio::test(flavor = "multi_thread")]
async fn rotation_by_rename_to_dated_names_loses_nothing_under_load() -> Result<()> {
    rotated_under_load(Compress::No, true).await
}

#[tokio::test(flavor = "multi_thread")]
async fn rotation_by_copytruncate_keeps_the_file_and_moves_its_lines() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let nginx = Nginx::start(folder.path().join("access.log")).await?;
    let first = load(&nginx, 1000).await?;
    let log = nginx.access_log().to_owned();
    // An answer may come before its line.
    until("all lines", LIMIT, async || {
        Ok((serials_in(slice::from_ref(&log))?.len() == first.answered.len()).then_some(()))
    })
    .await?;

    let before = fs::metadata(&log)?;
    let options = LogrotateOptions { compress: Compress::AtOnce, ..LogrotateOptions::new(&log, Method::CopyTruncate) };
    Logrotate::new(&options)?.rotate().await?;
    let after = fs::metadata(&log)?;
    assert_eq!((after.ino(), after.len()), (before.ino(), 0));
    assert_eq!(serials_in(&[folder.path().join("access.log.1.gz")])?, first.answered);

    let options = LoadOptions { requests: 10, first_serial: 1000, ..LoadOptions::default() };
    let second = Load::start(&nginx.url(), &options)?.finish().await?;
    nginx.quit().await?;
    assert_eq!(serials_in(&[log])?, second.answered);
    Ok(())
}
