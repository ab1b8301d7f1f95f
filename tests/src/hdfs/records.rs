//! What the NameNode knows of its files besides their bytes: `hdfs fsck`, and its edit log, in which each change stands.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};

use anyhow::{Context, Result};

use super::MiniHdfs;

const EDITS_VIEWER: &str = "org.apache.hadoop.hdfs.tools.offlineEditsViewer.OfflineEditsViewer";

/// What `hdfs fsck` counts below a path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fsck {
    /// Files that are closed.
    pub files: u64,
    /// Their blocks.
    pub blocks: u64,
}

/// A change of the names or files, from the edit log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edit {
    /// Like `OP_ADD` (a file is begun), `OP_ADD_BLOCK`, `OP_UPDATE_BLOCKS` (a sync), `OP_CLOSE`, `OP_RENAME_OLD`, `OP_MKDIR`.
    pub operation: String,
    /// The path; of a rename the first.
    pub path: String,
    /// The second path of a rename.
    pub destination: Option<String>,
    /// When, in milliseconds since 1970, by the NameNode's clock; 0 where the operation has no time.
    pub at_ms: u64,
}

impl MiniHdfs {
    /// Has the NameNode count the closed files and their blocks below `path`.
    ///
    /// # Errors
    /// It can't be asked, or answers in another form than Hadoop 2.7 does.
    pub async fn fsck(&self, path: &str) -> Result<Fsck> {
        let text = self.webhdfs().get_text(&format!("/fsck?ugi=root&path={path}")).await?;
        parse_fsck(&text).with_context(|| format!("fsck {path} says: {text}"))
    }

    /// The files below `path` that somebody has begun and nobody has closed, by `hdfs fsck -openforwrite`.
    ///
    /// # Errors
    /// The NameNode can't be asked.
    pub async fn open_files(&self, path: &str) -> Result<Vec<String>> {
        let text = self.webhdfs().get_text(&format!("/fsck?ugi=root&path={path}&files=1&openforwrite=1")).await?;
        Ok(text.lines().filter_map(open_file).map(str::to_owned).collect())
    }

    /// Gives every change of a path in the edit log to `each`, in their order.
    ///
    /// # Errors
    /// The log can't be read.
    pub async fn edits(&self, mut each: impl FnMut(Edit)) -> Result<()> {
        let folder = self.folder.path().join("name/current");
        let mut logs: Vec<_> = fs::read_dir(&folder)
            .with_context(|| format!("listing {}", folder.display()))?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_>>()?;
        // In progress or not, their names end with their first transaction, of a fixed number of digits.
        logs.retain(|log| log.file_name().is_some_and(|name| name.to_string_lossy().starts_with("edits_")));
        logs.sort_by_key(|log| log.to_string_lossy().replace("inprogress_", ""));
        for log in logs {
            let xml = tempfile::Builder::new().prefix("edits").suffix(".xml").tempfile_in(self.log_dir())?;
            let (input, output) = (log.display().to_string(), xml.path().display().to_string());
            self.tool("edits", EDITS_VIEWER, &["-i", &input, "-o", &output]).await?;
            parse_edits(BufReader::new(File::open(xml.path())?), &mut each)
                .with_context(|| format!("reading {input}"))?;
        }
        Ok(())
    }
}

fn parse_fsck(text: &str) -> Option<Fsck> {
    let number = |name: &str| {
        let rest = text.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':'))?;
        rest.split_whitespace().next()?.parse().ok()
    };
    Some(Fsck { files: number("Total files")?, blocks: number("Total blocks (validated)")? })
}

/// The path in a line like `/a/b 5 bytes, 1 block(s), OPENFORWRITE:  OK`.
fn open_file(line: &str) -> Option<&str> {
    let (path, rest) = line.split_once(' ')?;
    (path.starts_with('/') && rest.contains("OPENFORWRITE")).then_some(path)
}

/// The viewer writes one element per line.
fn parse_edits(xml: impl BufRead, each: &mut impl FnMut(Edit)) -> Result<()> {
    let mut edit = Edit::default();
    for line in xml.lines() {
        let line = line?;
        let line = line.trim();
        if line == "</RECORD>" {
            let done = std::mem::take(&mut edit);
            if !done.path.is_empty() {
                each(done);
            }
            continue;
        }
        let Some((name, value)) = element(line) else { continue };
        match name {
            "OPCODE" => edit.operation = value.to_owned(),
            "PATH" | "SRC" => edit.path = value.to_owned(),
            "DST" => edit.destination = Some(value.to_owned()),
            "MTIME" | "TIMESTAMP" => edit.at_ms = value.parse().with_context(|| format!("parsing {line}"))?,
            _ => {}
        }
    }
    Ok(())
}

/// Name and value of `<NAME>value</NAME>`.
fn element(line: &str) -> Option<(&str, &str)> {
    let (name, rest) = line.strip_prefix('<')?.split_once('>')?;
    let (value, end) = rest.rsplit_once("</")?;
    (end.strip_suffix('>') == Some(name)).then_some((name, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_fsck_says() {
        let text = "Status: HEALTHY\n Total size:\t5 B\n Total dirs:\t2\n Total files:\t13\n \
                    Total blocks (validated):\t12 (avg. block size 5 B)\n";
        assert_eq!(parse_fsck(text), Some(Fsck { files: 13, blocks: 12 }));
        assert_eq!(parse_fsck("FSCK failed"), None);
        assert_eq!(open_file("/a/b 0 bytes, 1 block(s), OPENFORWRITE: "), Some("/a/b"));
        assert_eq!(open_file("/a/b 5 bytes, 1 block(s):  OK"), None);
    }

    #[test]
    fn reads_the_changes_of_paths_in_an_edit_log() -> Result<()> {
        let xml = "<EDITS>\n<RECORD>\n<OPCODE>OP_ADD</OPCODE>\n<DATA>\n<PATH>/a</PATH>\n<MTIME>7</MTIME>\n</DATA>\n\
                   </RECORD>\n<RECORD>\n<OPCODE>OP_SET_GENSTAMP_V2</OPCODE>\n</RECORD>\n<RECORD>\n\
                   <OPCODE>OP_RENAME_OLD</OPCODE>\n<SRC>/a</SRC>\n<DST>/b</DST>\n<TIMESTAMP>9</TIMESTAMP>\n</RECORD>\n";
        let mut edits = Vec::new();
        parse_edits(xml.as_bytes(), &mut |edit| edits.push(edit))?;
        let add = Edit { operation: "OP_ADD".into(), path: "/a".into(), destination: None, at_ms: 7 };
        let rename =
            Edit { operation: "OP_RENAME_OLD".into(), path: "/a".into(), destination: Some("/b".into()), at_ms: 9 };
        assert_eq!(edits, [add, rename]);
        Ok(())
    }
}
