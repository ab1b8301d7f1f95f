//! The checksum of files: CRC-32C, of which that of a file follows from those of its parts.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The CRC-32C (Castagnoli) of some bytes; that of no bytes is 0. In text, 8 hexadecimal digits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Checksum(pub u32);

impl Checksum {
    /// The checksum of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(crc32c::crc32c(bytes))
    }

    /// The checksum of these bytes and of `next_len` others behind them, whose checksum is `next`.
    #[must_use]
    pub fn then(self, next: Self, next_len: u64) -> Self {
        // On the 64-bit machines that this runs on, no length is lost.
        Self(crc32c::crc32c_combine(self.0, next.0, next_len as usize))
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// Text that is not a checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a checksum has 8 hexadecimal digits")]
pub struct NotAChecksum;

impl FromStr for Checksum {
    type Err = NotAChecksum;

    fn from_str(text: &str) -> Result<Self, NotAChecksum> {
        if text.len() != 8 {
            return Err(NotAChecksum);
        }
        u32::from_str_radix(text, 16).map(Self).map_err(|_| NotAChecksum)
    }
}

impl Serialize for Checksum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
    }
}

impl<'de> Deserialize<'de> for Checksum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
        } else {
            u32::deserialize(deserializer).map(Self)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_a_whole_follows_from_its_parts() {
        let bytes: Vec<u8> = (0..1000_u32).map(|n| (n * 31) as u8).collect();
        // The check value of CRC-32C, from the catalogues.
        assert_eq!(Checksum::of(b"123456789").to_string(), "e3069283");
        for cut in [0, 1, 500, 999, 1000] {
            let (first, second) = bytes.split_at(cut);
            assert_eq!(Checksum::of(first).then(Checksum::of(second), second.len() as u64), Checksum::of(&bytes));
        }
    }

    #[test]
    fn as_text_it_has_eight_digits_and_reads_back() {
        let checksum = Checksum(0xabc);
        assert_eq!(serde_json::to_string(&checksum).expect("plain"), "\"00000abc\"");
        assert_eq!(serde_json::from_str::<Checksum>("\"00000abc\"").expect("good"), checksum);
        for bad in ["\"abc\"", "\"0000000000abc\"", "\"0000zabc\"", "7"] {
            serde_json::from_str::<Checksum>(bad).expect_err(bad);
        }
    }
}
