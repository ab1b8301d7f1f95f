//! Positions in a stream: an offset together with proof of what lies before it.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use xxhash_rust::xxh3::xxh3_64;

/// How many bytes before an offset its tail hash covers (fewer near the start of the file).
///
/// One kibibyte holds several lines of an ordinary log, so that two files with the same banner or the same
/// repeated line still differ in it.
pub const TAIL_WINDOW_BYTES: usize = 1024;

/// The hash of the [`TAIL_WINDOW_BYTES`] bytes of the file just before an offset. In text: 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TailHash(pub u64);

impl TailHash {
    /// The hash for an offset, given the bytes before it; only the last [`TAIL_WINDOW_BYTES`] of them count.
    #[must_use]
    pub fn of(bytes_before: &[u8]) -> Self {
        Self(xxh3_64(&bytes_before[bytes_before.len().saturating_sub(TAIL_WINDOW_BYTES)..]))
    }

    /// The hash for offset 0, before which there is nothing.
    #[must_use]
    pub fn empty() -> Self {
        Self::of(&[])
    }
}

impl fmt::Display for TailHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for TailHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for TailHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // JSON readers keep 53 bits of a number, so in text the hash is text.
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.to_le_bytes().serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for TailHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
            u64::from_str_radix(&text, 16).map(Self).map_err(de::Error::custom)
        } else {
            Ok(Self(u64::from_le_bytes(<[u8; 8]>::deserialize(deserializer)?)))
        }
    }
}

/// A place in a stream at which a batch ended (or the stream began), with the tail hash there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Position {
    /// Bytes from the start of the file.
    pub offset: u64,
    /// The hash of the bytes just before `offset`.
    pub tail: TailHash,
}

impl Position {
    /// The start of a file.
    #[must_use]
    pub fn zero() -> Self {
        Self { offset: 0, tail: TailHash::empty() }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.offset, self.tail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_window_counts() {
        let long: Vec<u8> = (0..5000_u32).map(|n| (n % 251) as u8).collect();
        assert_eq!(TailHash::of(&long), TailHash::of(&long[long.len() - TAIL_WINDOW_BYTES..]));
        assert_ne!(TailHash::of(&long), TailHash::of(&long[..long.len() - 1]));
        assert_eq!(TailHash::of(b""), TailHash::empty());
    }

    /// The hash is stored in files that live for years: a change of the function would read as divergence of every
    /// stream.
    #[test]
    fn the_hash_function_never_changes() {
        assert_eq!(TailHash::empty().0, 0x2d06_8005_38d3_94c2);
        assert_eq!(TailHash::of(b"tributary\n"), TailHash(xxh3_64(b"tributary\n")));
    }
}
