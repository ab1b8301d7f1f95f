//! Reads the frames of a file one after the other, wherever the file is.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use anyhow::Context;
use bytes::Bytes;
use tributary_common::frame::{FrameError, FrameHeader, Peek};

use crate::dfs::{Dfs, DfsPath};

/// How much is read at once: the headers of many small frames, or the beginning of a large one.
const READ_BYTES: usize = 1 << 20;

/// Where the bytes come from.
pub enum Source {
    /// A local file.
    Local(File),
    /// A file on the sink.
    Dfs(Arc<dyn Dfs>, DfsPath),
}

/// A frame that was found whole.
#[derive(Debug)]
pub struct Frame {
    /// Where it begins in the file.
    pub offset: u64,
    /// What it says that it holds.
    pub header: FrameHeader,
    /// What it holds, decompressed; only when bodies are read.
    pub raw: Option<Vec<u8>>,
}

/// The frames of a file, from its beginning.
pub struct Frames {
    name: String,
    source: Source,
    len: u64,
    at: u64,
    window: (u64, Bytes),
    deep: bool,
}

impl Frames {
    /// The frames of the file `name` of `len` bytes; with `deep` their bodies are read, checked and decompressed, else only
    /// their headers.
    #[must_use]
    pub fn new(name: String, source: Source, len: u64, deep: bool) -> Self {
        Self { name, source, len, at: 0, window: (0, Bytes::new()), deep }
    }

    /// Where the next frame begins, or what is damaged.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.at
    }

    /// The next frame; none at the file's end. After a frame that is not good, nobody knows where another one begins.
    ///
    /// # Errors
    /// When the file can't be read.
    pub async fn next(&mut self) -> anyhow::Result<Option<Result<Frame, FrameError>>> {
        if self.at >= self.len {
            return Ok(None);
        }
        let frame = self.frame().await?;
        if let Ok(frame) = &frame {
            self.at += u64::from(frame.header.frame_len);
        }
        Ok(Some(frame))
    }

    async fn frame(&mut self) -> anyhow::Result<Result<Frame, FrameError>> {
        let mut want = 1;
        let header = loop {
            let bytes = self.look(want).await?;
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
        let have = self.len - self.at;
        if have < len as u64 {
            return Ok(Err(FrameError::Truncated { have, want: len as u64 }));
        }
        let offset = self.at;
        if !self.deep {
            return Ok(Ok(Frame { offset, header, raw: None }));
        }
        let frame = self.look(len).await?;
        let frame = frame.slice(..len.min(frame.len()));
        let raw = FrameHeader::verify(&frame).and_then(|header| header.decode(&frame));
        Ok(raw.map(|raw| Frame { offset, header, raw: Some(raw) }))
    }

    /// At least `want` bytes from where the frame begins, fewer only at the end; from memory where they are.
    async fn look(&mut self, want: usize) -> anyhow::Result<Bytes> {
        let (start, bytes) = &self.window;
        let held = self.at.checked_sub(*start).and_then(|skip| bytes.get(skip as usize..));
        if held.is_none_or(|held| held.len() < want) {
            let read = self.read(want.max(READ_BYTES)).await.with_context(|| self.name.clone())?;
            self.window = (self.at, read);
        }
        Ok(self.window.1.slice((self.at - self.window.0) as usize..))
    }

    /// Up to `len` bytes; fewer only at the end.
    async fn read(&self, len: usize) -> anyhow::Result<Bytes> {
        let len = len.min((self.len - self.at) as usize);
        match &self.source {
            Source::Local(file) => {
                let mut buffer = vec![0; len];
                let mut have = 0;
                while have < len {
                    match file.read_at(&mut buffer[have..], self.at + have as u64)? {
                        0 => break,
                        read => have += read,
                    }
                }
                buffer.truncate(have);
                Ok(buffer.into())
            }
            Source::Dfs(dfs, path) => Ok(dfs.read(path, self.at, len).await?),
        }
    }
}
