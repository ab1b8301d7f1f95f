//! Finds single bytes where they come close together, as the newlines of a log do.
//!
//! A search that begins anew behind each byte it finds, as `memchr` does, is the fastest over long distances, but costs as much as
//! forty bytes each time. Here blocks of 64 bytes are compared at once, whatever is found in them; and many of them before anybody is told
//! what was, since a processor can't foresee which blocks have something, and waits at each that it was wrong about.

use std::iter::FusedIterator;

use wide::u8x16;

const LANES: usize = 16;
/// As many bytes as a word has bits.
const BLOCK: usize = 64;
/// Bytes that are compared before places are told.
const GROUP: usize = 16 * BLOCK;

/// Which of the bytes of `block`, 64 at most, are `byte`: the lowest bit is of the first.
#[inline]
fn matches<const LEN: usize>(block: &[u8; LEN], byte: u8) -> u64 {
    let wanted = u8x16::splat(byte);
    let (parts, _) = block.as_chunks::<LANES>();
    let bits = |part: &[u8; LANES]| u64::from(u8x16::new(*part).simd_eq(wanted).to_bitmask());
    parts.iter().rev().fold(0, |found, part| found << LANES | bits(part))
}

/// Where in some data a byte is, from the first place to the last.
#[derive(Debug, Clone)]
pub struct Places<'a> {
    byte: u8,
    /// What has not been compared, and where it begins.
    rest: &'a [u8],
    rest_at: usize,
    /// The places in the group that was compared last, and where it begins.
    found: [u16; GROUP],
    group_at: usize,
    /// How many these are, and how many of them have been told.
    count: usize,
    told: usize,
}

/// The places of `byte` in `data`.
#[must_use]
pub fn places(byte: u8, data: &[u8]) -> Places<'_> {
    Places { byte, rest: data, rest_at: 0, found: [0; GROUP], group_at: 0, count: 0, told: 0 }
}

impl Places<'_> {
    /// Compares the group that comes next.
    fn compare(&mut self) {
        let group;
        (group, self.rest) = self.rest.split_at(self.rest.len().min(GROUP));
        self.group_at = self.rest_at;
        self.rest_at += group.len();
        (self.count, self.told) = (0, 0);
        let (blocks, last) = group.as_chunks::<BLOCK>();
        for (n, block) in blocks.iter().enumerate() {
            self.note(n * BLOCK, matches(block, self.byte));
        }
        if !last.is_empty() {
            // Filled up with a byte that isn't looked for.
            let mut block = [!self.byte; BLOCK];
            block[..last.len()].copy_from_slice(last);
            self.note(blocks.len() * BLOCK, matches(&block, self.byte));
        }
    }

    /// Notes what was found in the block that begins at `at` of the group.
    #[inline]
    fn note(&mut self, at: usize, mut matches: u64) {
        // Whether there is one isn't asked: where there is none, the next block's first takes its place.
        self.found[self.count] = (at + matches.trailing_zeros() as usize) as u16;
        self.count += usize::from(matches != 0);
        matches &= matches.wrapping_sub(1);
        while matches != 0 {
            self.found[self.count] = (at + matches.trailing_zeros() as usize) as u16;
            self.count += 1;
            matches &= matches - 1;
        }
    }
}

impl Iterator for Places<'_> {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        while self.told == self.count {
            if self.rest.is_empty() {
                return None;
            }
            self.compare();
        }
        let place = self.group_at + usize::from(self.found[self.told]);
        self.told += 1;
        Some(place)
    }
}

impl FusedIterator for Places<'_> {}

/// The first place of `byte` in `text`, which is expected among the first 32 bytes.
#[inline]
#[must_use]
pub fn first(byte: u8, text: &[u8]) -> Option<usize> {
    if let Some(block) = text.first_chunk::<{ 2 * LANES }>() {
        let found = matches(block, byte);
        if found != 0 {
            return Some(found.trailing_zeros() as usize);
        }
    }
    memchr::memchr(byte, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn all_bytes_of_a_group_may_be_the_one() {
        let data = vec![b'\n'; 2 * GROUP + 1];
        assert!(places(b'\n', &data).eq(0..data.len()));
    }

    proptest! {
        #[test]
        fn every_place_is_found_once_and_in_order(data in proptest::collection::vec(0_u8..4, 0..3000), byte in 0_u8..5) {
            let expected: Vec<_> = memchr::memchr_iter(byte, &data).collect();
            prop_assert_eq!(first(byte, &data), expected.first().copied());
            let mut found = places(byte, &data);
            prop_assert_eq!(found.by_ref().collect::<Vec<_>>(), expected);
            prop_assert_eq!(found.next(), None);
        }

        #[test]
        fn what_is_rare_is_found_too(len in 0_usize..5000, at in 0_usize..5000, byte: u8) {
            let mut data = vec![!byte; len];
            let expected = (at < len).then_some(at);
            if let Some(at) = expected {
                data[at] = byte;
            }
            prop_assert_eq!(first(byte, &data), expected);
            prop_assert_eq!(places(byte, &data).collect::<Vec<_>>(), Vec::from_iter(expected));
        }
    }
}
