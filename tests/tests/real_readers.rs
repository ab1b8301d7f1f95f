//! The readers agree on what is in a tree that looks like a published one.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use tributary_common::bucket::{Bucket, BucketSize};
use tributary_tests::hdfs::{HdfsOptions, MiniHdfs};
use tributary_tests::lines::Lines;
use tributary_tests::readers::{Reader, Tree, read_lines};

/// A gzip file of several members with extra fields, as the roots write them.
fn members(texts: &[String]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for text in texts {
        let mut member = GzBuilder::new().extra(vec![7; 300]).write(&mut bytes, Compression::fast());
        member.write_all(text.as_bytes())?;
        member.finish()?;
    }
    Ok(bytes)
}

fn text(name: &str, count: usize) -> String {
    (0..count)
        .map(|serial| format!("{name} line {serial} of {count}, ünd noch etwas mehr: {}\n", serial * 7919))
        .collect()
}

struct Published {
    /// What is in the tree, by path.
    files: Vec<(String, Vec<u8>)>,
    /// What readers of the tree must find.
    visible: String,
    /// What readers of the late folder must find.
    late: String,
}

fn published() -> Result<Published> {
    let (first, second) =
        ([text("a", 30_000), text("b", 1), text("c", 20_000)], [text("d", 10), String::new(), text("d", 10)]);
    let late = text("late", 5);
    let one = |text: &str| members(&[text.to_owned()]);
    let day = "nginx-access/dt=2024-05-01";
    let hidden = Bucket::new(1_714_564_800, BucketSize::HOUR)?.hidden_dir_name();
    let files = vec![
        (format!("{day}/hr=10/0-1.gz"), members(&first)?),
        (format!("{day}/hr=11/0-1.gz"), members(&second)?),
        (format!("{day}/hr=10/_SUCCESS"), Vec::new()),
        (format!("{day}/hr=10/_MANIFEST.json"), b"{}".to_vec()),
        (format!("{day}/hr=10/_late/0-2.gz"), one(&late)?),
        (format!("{day}/hr=10/_late/_0-2.json"), b"{}".to_vec()),
        (format!("{day}/{hidden}/0-3.gz"), one("an hour that is not published\n")?),
    ];
    Ok(Published { files, visible: [first.concat(), second.concat()].concat(), late })
}

fn lines_of(folder: &Path, text: &str) -> Result<Lines> {
    let file = folder.join("expected");
    fs::write(&file, text)?;
    // Read before the file is written anew: only an example needs it again.
    Lines::of_files([file])
}

async fn all_readers_find(tree: &Tree, expected: &str) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let expected = lines_of(scratch.path(), expected)?;
    for reader in Reader::ALL {
        let found = read_lines(reader, tree).await?;
        let difference = expected.difference(&found)?;
        assert!(difference.is_none(), "{reader}: {difference}");
    }
    Ok(())
}

#[tokio::test]
async fn all_readers_find_each_published_line_in_hdfs_and_nothing_hidden() -> Result<()> {
    // Files of several blocks.
    let settings = vec![("dfs.blocksize".to_owned(), "65536".to_owned())];
    let hdfs = MiniHdfs::start(HdfsOptions { settings, ..HdfsOptions::default() }).await?;
    let published = published()?;
    for (path, bytes) in published.files {
        hdfs.webhdfs().write(&format!("/logs/{path}"), bytes).await?;
    }
    all_readers_find(&Tree::in_hdfs(&hdfs, "/logs"), &published.visible).await?;
    let late = Tree::in_hdfs(&hdfs, "/logs/nginx-access/dt=2024-05-01/hr=10/_late");
    all_readers_find(&late, &published.late).await
}

#[tokio::test]
async fn all_readers_find_each_published_line_in_a_local_folder() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let published = published()?;
    for (path, bytes) in published.files {
        let file: PathBuf = folder.path().join("logs").join(path);
        fs::create_dir_all(file.parent().context("a file has a folder")?)?;
        fs::write(file, bytes)?;
    }
    all_readers_find(&Tree::Local(folder.path().join("logs")), &published.visible).await
}

#[tokio::test]
async fn a_folder_that_is_not_there_is_an_error() {
    for reader in Reader::ALL {
        let missing = Tree::Local("/no/such/folder".into());
        let error = read_lines(reader, &missing).await.expect_err("there is nothing to read");
        assert!(format!("{error:#}").contains("/no/such/folder"), "{reader}: {error:#}");
    }
}
