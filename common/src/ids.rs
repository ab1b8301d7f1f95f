//! Names: categories, agents, streams, lanes, epochs.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::limits::IDENTITY_LINE_BYTES;

/// A name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {name:?} is not allowed: write {rule}")]
pub struct NameError {
    what: &'static str,
    name: String,
    rule: &'static str,
}

fn check(
    what: &'static str,
    name: &str,
    max: usize,
    rule: &'static str,
    first: impl Fn(u8) -> bool,
    rest: impl Fn(u8) -> bool,
) -> Result<(), NameError> {
    let mut bytes = name.bytes();
    let fits = name.len() <= max && bytes.next().is_some_and(first) && bytes.all(rest);
    if fits { Ok(()) } else { Err(NameError { what, name: name.chars().take(max + 16).collect(), rule }) }
}

macro_rules! string_name {
    ($type:ident, $what:literal, $max:literal, $rule:literal, $first:expr, $rest:expr, $(#[$doc:meta])*) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(std::sync::Arc<str>);

        impl $type {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = NameError;
            fn from_str(name: &str) -> Result<Self, NameError> {
                check($what, name, $max, $rule, $first, $rest)?;
                Ok(Self(name.into()))
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let name = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                name.parse().map_err(de::Error::custom)
            }
        }
    };
}

string_name!(
    CategoryName, "the category", 64, "1 to 64 of a-z 0-9 . _ -, the first a letter or digit",
    |b| b.is_ascii_lowercase() || b.is_ascii_digit(),
    |b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-'),
    /// The name of a logical log, such as `nginx-access`: `[a-z0-9][a-z0-9._-]{0,63}`. It becomes a directory name on
    /// the sink, so nothing that a path could misread is allowed in it.
);

string_name!(
    AgentId, "the agent id", 64, "1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or digit",
    |b| b.is_ascii_alphanumeric(),
    |b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'),
    /// The identity of one agent (one server): `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`. No two live servers may share one.
);

string_name!(
    NodeName, "the node name", 64, "1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or digit",
    |b| b.is_ascii_alphanumeric(),
    |b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'),
    /// The name of one aggregator in the topology: `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`.
);

impl AgentId {
    /// The lane that owns this agent's streams: `xxh3_64(id) mod lanes`.
    #[must_use]
    pub fn lane(&self, lanes: LaneCount) -> LaneId {
        let index = xxh3_64(self.as_str().as_bytes()) % u64::from(lanes.0);
        LaneId(u16::try_from(index).expect("a remainder of a 16 bit divisor has 16 bits"))
    }
}

/// How many lanes there are: 1 to 1,024. Written down when the base directory is born.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct LaneCount(u16);

impl LaneCount {
    /// A single lane.
    pub const ONE: Self = Self(1);

    /// The number.
    #[must_use]
    pub fn get(self) -> u16 {
        self.0
    }

    /// Every lane, in order.
    pub fn lanes(self) -> impl Iterator<Item = LaneId> {
        (0..self.0).map(LaneId)
    }
}

impl fmt::Display for LaneCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl TryFrom<u16> for LaneCount {
    type Error = String;
    fn try_from(count: u16) -> Result<Self, String> {
        match count {
            1..=1024 => Ok(Self(count)),
            _ => Err(format!("{count} lanes are not possible: write a number from 1 to 1024")),
        }
    }
}

impl From<LaneCount> for u16 {
    fn from(count: LaneCount) -> u16 {
        count.0
    }
}

/// The unit of ownership at the roots: every agent belongs to one lane, every lane to one root at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LaneId(pub u16);

impl fmt::Display for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One period of ownership of a lane. A higher epoch fences every lower one. Compared as a number, never as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One incarnation of one file on one agent. Derived from what the file is ([`StreamId::derive`]), so an agent that
/// lost its database arrives at the same id again. In text: 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u128);

/// What a stream's id is derived from, apart from the agent.
#[derive(Debug, Clone, Copy)]
pub struct StreamIdentity<'a> {
    /// The file's inode number.
    pub inode: u64,
    /// The file's birth time in nanoseconds since 1970 where the file system has one, else the file system's id.
    pub birth_or_filesystem: i128,
    /// The file's first line without its newline; only the first [`IDENTITY_LINE_BYTES`] count.
    pub first_line: &'a [u8],
    /// 0 for the file as found first, one more each time its content was found replaced.
    pub incarnation: u32,
}

impl StreamId {
    /// Derives the id. Path and host name are not part of it: both change while the file stays the same.
    #[must_use]
    pub fn derive(agent: &AgentId, identity: &StreamIdentity<'_>) -> Self {
        let line = &identity.first_line[..identity.first_line.len().min(IDENTITY_LINE_BYTES)];
        let mut hash = Xxh3::new();
        // Variable-length parts come behind their length, so that no two different inputs look the same.
        hash.update(&(agent.as_str().len() as u64).to_le_bytes());
        hash.update(agent.as_str().as_bytes());
        hash.update(&identity.inode.to_le_bytes());
        hash.update(&identity.birth_or_filesystem.to_le_bytes());
        hash.update(&identity.incarnation.to_le_bytes());
        hash.update(&(line.len() as u64).to_le_bytes());
        hash.update(line);
        Self(hash.digest128())
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for StreamId {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        check(
            "the stream id",
            text,
            32,
            "32 hexadecimal digits",
            |b| b.is_ascii_hexdigit(),
            |b| b.is_ascii_hexdigit(),
        )?;
        u128::from_str_radix(text, 16).map(Self).map_err(|_| NameError {
            what: "the stream id",
            name: text.into(),
            rule: "32 hexadecimal digits",
        })
    }
}

impl Serialize for StreamId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            // Fixed 16 bytes: a random number as a variable-length integer would take 19.
            self.0.to_le_bytes().serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for StreamId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
            text.parse().map_err(de::Error::custom)
        } else {
            Ok(Self(u128::from_le_bytes(<[u8; 16]>::deserialize(deserializer)?)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_category_that_could_be_a_path_is_refused() {
        for bad in ["", ".", "..", "a/b", "../x", "-a", "_a", "A", "a b", "é", "a\0", &"a".repeat(65)] {
            assert!(bad.parse::<CategoryName>().is_err(), "{bad:?} was accepted");
        }
        for good in ["a", "0", "nginx-access", "a.b_c-d", &"a".repeat(64)] {
            assert_eq!(good.parse::<CategoryName>().expect("a good name").as_str(), good);
        }
    }

    #[test]
    fn every_part_of_the_identity_changes_the_stream_id() {
        let agent: AgentId = "web-1".parse().expect("valid");
        let identity = StreamIdentity { inode: 7, birth_or_filesystem: 8, first_line: b"first", incarnation: 0 };
        let id = StreamId::derive(&agent, &identity);
        assert_eq!(id, StreamId::derive(&agent, &identity), "the same input gives the same id");
        let others = [
            StreamId::derive(&"web-2".parse().expect("valid"), &identity),
            StreamId::derive(&agent, &StreamIdentity { inode: 9, ..identity }),
            StreamId::derive(&agent, &StreamIdentity { birth_or_filesystem: 9, ..identity }),
            StreamId::derive(&agent, &StreamIdentity { first_line: b"firs", ..identity }),
            StreamId::derive(&agent, &StreamIdentity { incarnation: 1, ..identity }),
        ];
        assert!(others.iter().all(|other| *other != id));
    }

    #[test]
    fn ids_read_back_from_text_and_from_bytes() {
        let id = StreamId(0x0123_4567_89ab_cdef_0011_2233_4455_6677);
        assert_eq!(id.to_string().parse::<StreamId>(), Ok(id));
        let json = serde_json::to_string(&id).expect("serializes");
        assert_eq!(json, "\"0123456789abcdef0011223344556677\"");
        assert_eq!(serde_json::from_str::<StreamId>(&json).expect("reads"), id);
        let bytes = postcard::to_stdvec(&id).expect("serializes");
        assert_eq!(bytes.len(), 16);
        assert_eq!(postcard::from_bytes::<StreamId>(&bytes).expect("reads"), id);
    }

    #[test]
    fn lanes_cover_all_agents_and_stay_put() {
        let lanes = LaneCount::try_from(4).expect("valid");
        let mut counts = [0_u32; 4];
        for n in 0..1000 {
            let agent: AgentId = format!("web-{n}").parse().expect("valid");
            counts[usize::from(agent.lane(lanes).0)] += 1;
        }
        assert!(counts.iter().all(|&count| count > 150), "{counts:?}");
        let agent: AgentId = "web-1".parse().expect("valid");
        assert_eq!(agent.lane(LaneCount::ONE), LaneId(0));
    }
}
