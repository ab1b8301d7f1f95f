//! The documents name tests as proof of what they say: those tests must be there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

const WORKSPACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// All functions in the sources that are marked as tests.
fn tests() -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    let mut folders: Vec<PathBuf> = Vec::new();
    for package in ["agent", "aggregator", "common", "tests"] {
        folders.extend(["src", "tests"].map(|folder| Path::new(WORKSPACE).join(package).join(folder)));
    }
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
                names.extend(tests_in(&text).map(str::to_owned));
            }
        }
    }
    ensure!(names.len() > 300, "only {} tests were found", names.len());
    Ok(names)
}

fn tests_in(text: &str) -> impl Iterator<Item = &str> {
    let mut marked = false;
    text.lines().filter_map(move |line| {
        let line = line.trim();
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            marked = true;
            return None;
        }
        let (_, rest) =
            line.strip_prefix("async ").unwrap_or(line).split_once("fn ").filter(|(before, _)| before.is_empty())?;
        std::mem::take(&mut marked).then(|| rest.split(['(', '<']).next().unwrap_or(rest))
    })
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn each_failure_in_the_readme_names_a_test_that_is_there() -> Result<()> {
    let tests = tests()?;
    let readme = fs::read_to_string(Path::new(WORKSPACE).join("README.md"))?;
    let (_, table) = readme.split_once("## What happens when something fails").context("the section is there")?;
    let table = table.split("\n## ").next().unwrap_or(table);
    let rows: Vec<Vec<&str>> = table
        .lines()
        .filter(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    ensure!(rows.len() > 40, "the table has {} lines", rows.len());
    for row in rows {
        ensure!(row.len() == 5, "a line has {} columns: {row:?}", row.len());
        if row[0].starts_with("**") {
            continue;
        }
        ensure!(row.iter().all(|cell| !cell.is_empty()), "something is missing in {row:?}");
        ensure!(quoted(row[4]).count() > 0, "no test shows {:?}", row[0]);
        for name in quoted(row[4]) {
            ensure!(tests.contains(name), "{:?} is said to be shown by {name}, which is not there", row[0]);
        }
    }
    Ok(())
}

/// Names with so many words are those of tests.
#[test]
fn the_tests_that_the_documents_name_are_there() -> Result<()> {
    let tests = tests()?;
    for document in ["README.md", "ARCHITECTURE.md"] {
        let text = fs::read_to_string(Path::new(WORKSPACE).join(document))?;
        let is_test = |name: &&str| {
            name.matches('_').count() >= 4 && name.bytes().all(|byte| byte == b'_' || byte.is_ascii_alphanumeric())
        };
        for name in text.split("```").step_by(2).flat_map(quoted).filter(is_test) {
            ensure!(tests.contains(name), "{document} names the test {name}, which is not there");
        }
    }
    Ok(())
}
