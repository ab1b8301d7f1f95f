//! A small WebHDFS client: how the tests look at an HDFS without the code that they test.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use reqwest::{Client, Method, Response, StatusCode};
use serde::Deserialize;

/// One entry of a directory, or a file itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// The name in its directory; empty when a path itself was asked about.
    #[serde(rename = "pathSuffix")]
    pub name: String,
    /// `FILE` or `DIRECTORY`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Bytes; 0 for a directory. Of a file that is being written, what the NameNode knows.
    pub length: u64,
    /// Copies of each block; 0 for a directory.
    pub replication: u16,
    /// Bytes.
    pub block_size: u64,
    /// Milliseconds since 1970, by the NameNode's clock.
    pub modification_time: u64,
}

impl Status {
    /// Whether it is a directory.
    #[must_use]
    pub fn is_dir(&self) -> bool {
        self.kind == "DIRECTORY"
    }
}

/// A client of one NameNode's WebHDFS. Paths are absolute and given to HDFS as they are.
#[derive(Clone, Debug)]
pub struct WebHdfs {
    base: String,
    client: Client,
}

#[derive(Deserialize)]
struct Answer<T> {
    #[serde(rename = "FileStatus")]
    status: T,
}

#[derive(Deserialize)]
struct ListAnswer {
    #[serde(rename = "FileStatuses")]
    statuses: Answer<Vec<Status>>,
}

#[derive(Deserialize)]
struct BooleanAnswer {
    boolean: bool,
}

impl WebHdfs {
    /// `base` is the NameNode's web address, like `http://127.0.0.1:50070`.
    ///
    /// # Errors
    /// The HTTP client can't be made.
    pub fn new(base: impl Into<String>) -> Result<Self> {
        // No pooled connections: tests share a cluster, and each has a runtime of its own that ends with it.
        let client = Client::builder()
            .no_proxy()
            .pool_max_idle_per_host(0)
            .connect_timeout(Duration::from_secs(5))
            .read_timeout(Duration::from_secs(60))
            .build()
            .context("making an HTTP client")?;
        Ok(Self { base: base.into(), client })
    }

    /// The NameNode's web address.
    #[must_use]
    pub fn base(&self) -> &str {
        &self.base
    }

    pub(crate) async fn get_text(&self, path_and_query: &str) -> Result<String> {
        let url = format!("{}{path_and_query}", self.base);
        let answer = self.client.get(&url).send().await.with_context(|| format!("GET {url}"))?;
        answer.error_for_status()?.text().await.with_context(|| format!("reading the answer of {url}"))
    }

    pub(crate) async fn get_json<T: for<'a> Deserialize<'a>>(&self, path_and_query: &str) -> Result<T> {
        let body = self.get_text(path_and_query).await?;
        serde_json::from_str(&body).with_context(|| format!("GET {}{path_and_query} answered {body}", self.base))
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        op: &str,
        query: &[(&str, &str)],
        body: Vec<u8>,
    ) -> Result<Response> {
        ensure!(path.starts_with('/'), "the HDFS path {path:?} is not absolute");
        let mut url = reqwest::Url::parse(&self.base).with_context(|| format!("parsing {}", self.base))?;
        url.set_path(&format!("/webhdfs/v1{path}"));
        url.query_pairs_mut().append_pair("op", op).extend_pairs(query);
        self.client.request(method, url).body(body).send().await.with_context(|| format!("WebHDFS {op} {path}"))
    }

    /// What is at `path`; `None` when nothing is.
    ///
    /// # Errors
    /// The NameNode can't be asked.
    pub async fn status(&self, path: &str) -> Result<Option<Status>> {
        let answer = self.call(Method::GET, path, "GETFILESTATUS", &[], Vec::new()).await?;
        if answer.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let answer: Answer<Status> = good(answer, "GETFILESTATUS", path).await?.json().await?;
        Ok(Some(answer.status))
    }

    /// The entries of a directory; `None` when nothing is at `path`.
    ///
    /// # Errors
    /// The NameNode can't be asked.
    pub async fn list(&self, path: &str) -> Result<Option<Vec<Status>>> {
        let answer = self.call(Method::GET, path, "LISTSTATUS", &[], Vec::new()).await?;
        if answer.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let answer: ListAnswer = good(answer, "LISTSTATUS", path).await?.json().await?;
        Ok(Some(answer.statuses.status))
    }

    /// A file's bytes from the DataNodes, as they come.
    ///
    /// # Errors
    /// There is no such file, or no NameNode.
    pub async fn open(&self, path: &str) -> Result<Response> {
        let answer = self.call(Method::GET, path, "OPEN", &[], Vec::new()).await?;
        good(answer, "OPEN", path).await
    }

    /// A whole file.
    ///
    /// # Errors
    /// There is no such file, or it can't be read to its end.
    pub async fn read(&self, path: &str) -> Result<Vec<u8>> {
        let answer = self.open(path).await?;
        Ok(answer.bytes().await.with_context(|| format!("reading {path}"))?.to_vec())
    }

    /// Makes a file, with its parents, in place of one that may be there.
    ///
    /// # Errors
    /// It can't be written.
    pub async fn write(&self, path: &str, bytes: Vec<u8>) -> Result<()> {
        // The NameNode redirects to a DataNode; the body is sent to both, and the first ignores it.
        let answer = self.call(Method::PUT, path, "CREATE", &[("overwrite", "true")], bytes).await?;
        good(answer, "CREATE", path).await.map(drop)
    }

    /// Makes a directory with its parents. One that is there is fine.
    ///
    /// # Errors
    /// It can't be made.
    pub async fn make_dir(&self, path: &str) -> Result<()> {
        self.expect_true(Method::PUT, path, "MKDIRS", &[]).await
    }

    /// Renames without overwriting.
    ///
    /// # Errors
    /// HDFS refused, for instance because `from` is missing or `to` is there.
    pub async fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.expect_true(Method::PUT, from, "RENAME", &[("destination", to)]).await
    }

    /// Deletes a file, or a directory with all that is in it.
    ///
    /// # Errors
    /// There was nothing, or HDFS refused.
    pub async fn delete(&self, path: &str) -> Result<()> {
        self.expect_true(Method::DELETE, path, "DELETE", &[("recursive", "true")]).await
    }

    // HDFS says "no" with status 200 and a false in the body.
    async fn expect_true(&self, method: Method, path: &str, op: &str, query: &[(&str, &str)]) -> Result<()> {
        let answer = self.call(method, path, op, query, Vec::new()).await?;
        let answer: BooleanAnswer = good(answer, op, path).await?.json().await?;
        ensure!(answer.boolean, "WebHDFS {op} {path} {query:?}: refused");
        Ok(())
    }

    /// All files below `path`, absolute paths with their status, sorted; nothing when `path` is not there.
    ///
    /// # Errors
    /// The NameNode can't be asked.
    pub async fn tree(&self, path: &str) -> Result<Vec<(String, Status)>> {
        let mut files = Vec::new();
        let mut folders = vec![path.trim_end_matches('/').to_owned()];
        while let Some(folder) = folders.pop() {
            let asked = if folder.is_empty() { "/" } else { &folder };
            for entry in self.list(asked).await?.unwrap_or_default() {
                let full = if entry.name.is_empty() { folder.clone() } else { format!("{folder}/{}", entry.name) };
                if entry.is_dir() {
                    folders.push(full);
                } else {
                    files.push((full, entry));
                }
            }
        }
        files.sort_by(|left, right| left.0.cmp(&right.0));
        Ok(files)
    }
}

async fn good(answer: Response, op: &str, path: &str) -> Result<Response> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    bail!("WebHDFS {op} {path}: {status}: {}", answer.text().await.unwrap_or_default());
}
