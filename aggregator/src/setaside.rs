//! What can't be delivered and must not be lost: kept on disk, bounded, for a person to decide.
//!
//! A file of refused batches is a request body: `curl -H 'Content-Type: application/vnd.tributary.batches.v1'
//! --data-binary @FILE http://NODE/v1/batches` offers it again. Nothing here is ever deleted by the program.

use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use crate::spool::io::{Folder, FolderFile};
use crate::surroundings::WallClock;

/// How much is copied at once.
const PIECE_BYTES: usize = 1 << 20;

/// Something could not be set aside.
#[derive(Debug, thiserror::Error)]
pub enum SetAsideError {
    /// The bound is reached.
    #[error(
        "{where_} holds {held} of at most {max} bytes, {wanted} more don't fit: look through its files, offer them again or delete them"
    )]
    Full {
        /// The folder.
        where_: String,
        /// Bytes in it.
        held: u64,
        /// The bound.
        max: u64,
        /// Bytes to be added.
        wanted: u64,
    },
    /// The disk said no.
    #[error("can't set {label} aside in {where_}: {error}")]
    Io {
        /// What was to be kept.
        label: String,
        /// The folder.
        where_: String,
        /// Why.
        #[source]
        error: io::Error,
    },
}

/// A piece of a file.
#[derive(Clone)]
pub struct Piece {
    /// The file.
    pub file: Arc<dyn FolderFile>,
    /// Where it begins.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// The folder of things set aside.
pub struct SetAside {
    folder: Arc<dyn Folder>,
    max_bytes: u64,
    held: Mutex<u64>,
    clock: WallClock,
}

impl SetAside {
    /// The folder, with at most `max_bytes` in it. Files are named by the time of `clock`.
    ///
    /// # Errors
    /// When the folder can't be listed.
    pub fn open(folder: Arc<dyn Folder>, max_bytes: u64, clock: WallClock) -> io::Result<Self> {
        let held = folder.list()?.iter().map(|(_, len)| len).sum();
        Ok(Self { folder, max_bytes, held: Mutex::new(held), clock })
    }

    /// Bytes in it.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        *self.held.lock().expect("nothing panics while the lock is held")
    }

    /// Keeps copies of `pieces`, one behind the other, in a new file that is durable when this returns. Blocks.
    /// Returns the file's name, which begins with the time and has `label` in it.
    ///
    /// # Errors
    /// When there is no room or the disk says no; nothing is left behind then.
    pub fn keep(&self, label: &str, pieces: &[Piece]) -> Result<String, SetAsideError> {
        let wanted: u64 = pieces.iter().map(|piece| piece.len).sum();
        {
            let mut held = self.held.lock().expect("nothing panics while the lock is held");
            if *held + wanted > self.max_bytes {
                let where_ = self.folder.describe();
                return Err(SetAsideError::Full { where_, held: *held, max: self.max_bytes, wanted });
            }
            *held += wanted;
        }
        self.copy(label, pieces).map_err(|error| {
            *self.held.lock().expect("nothing panics while the lock is held") -= wanted;
            SetAsideError::Io { label: label.into(), where_: self.folder.describe(), error }
        })
    }

    fn copy(&self, label: &str, pieces: &[Piece]) -> io::Result<String> {
        let now = jiff::Timestamp::from_millisecond(self.clock.now_ms()).unwrap_or_default();
        let time = now.strftime("%Y%m%dT%H%M%SZ").to_string();
        let (name, file) = (0..1000)
            .find_map(|n| {
                let name = if n == 0 { format!("{time}-{label}") } else { format!("{time}-{n}-{label}") };
                match self.folder.create(&name) {
                    Err(error) if error.kind() == ErrorKind::AlreadyExists => None,
                    made => Some(made.map(|file| (name, file))),
                }
            })
            .unwrap_or_else(|| Err(ErrorKind::AlreadyExists.into()))?;
        let copied = copy_pieces(&*file, pieces).and_then(|()| file.sync()).and_then(|()| self.folder.sync());
        if let Err(error) = copied {
            // Half a file would look like a whole one; if it can't be removed either, its batches' checksums tell.
            let _ = self.folder.delete(&name);
            return Err(error);
        }
        Ok(name)
    }
}

fn copy_pieces(to: &dyn FolderFile, pieces: &[Piece]) -> io::Result<()> {
    let mut written = 0;
    for piece in pieces {
        let mut done = 0;
        while done < piece.len {
            let mut buffer = vec![0; PIECE_BYTES.min((piece.len - done) as usize)];
            let read = piece.file.read_at(&mut buffer, piece.offset + done)?;
            if read == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            buffer.truncate(read);
            to.write_at(&[Bytes::from(buffer)], written)?;
            done += read as u64;
            written += read as u64;
        }
    }
    Ok(())
}
