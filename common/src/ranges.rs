//! A set of byte ranges.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// A set of bytes, kept as sorted, disjoint, non-touching half-open ranges. Nearly always one range.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RangeSet {
    ranges: Vec<(u64, u64)>,
}

impl RangeSet {
    /// The empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The ranges, in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|&(start, end)| start..end)
    }

    /// Whether nothing is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// How many bytes are in the set.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|(start, end)| end - start).sum()
    }

    /// Adds a range; an empty one changes nothing.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        // The ranges that overlap or touch the new one are replaced by their union with it.
        let from = self.ranges.partition_point(|&(_, end)| end < range.start);
        let to = self.ranges.partition_point(|&(start, _)| start <= range.end);
        let merged = self.ranges[from..to]
            .iter()
            .fold((range.start, range.end), |(start, end), &(s, e)| (start.min(s), end.max(e)));
        self.ranges.splice(from..to, [merged]);
    }

    /// Takes a range out.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let mut kept = Vec::with_capacity(self.ranges.len() + 1);
        for &(start, end) in &self.ranges {
            if start < range.start.min(end) {
                kept.push((start, end.min(range.start)));
            }
            if end > range.end.max(start) {
                kept.push((start.max(range.end), end));
            }
        }
        self.ranges = kept;
    }

    /// The parts of `range` that are not in the set, in order.
    #[must_use]
    pub fn missing(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut missing = Vec::new();
        let mut at = range.start;
        let from = self.ranges.partition_point(|&(_, end)| end <= range.start);
        for &(start, end) in &self.ranges[from..] {
            if start >= range.end {
                break;
            }
            if start > at {
                missing.push(at..start);
            }
            at = at.max(end);
        }
        if at < range.end {
            missing.push(at..range.end);
        }
        missing
    }

    /// Whether all of `range` is in the set. An empty range always is.
    #[must_use]
    pub fn contains(&self, range: Range<u64>) -> bool {
        if range.is_empty() {
            return true;
        }
        let at = self.ranges.partition_point(|&(_, end)| end <= range.start);
        self.ranges.get(at).is_some_and(|&(start, end)| start <= range.start && range.end <= end)
    }

    /// Where the unbroken run that begins at `from` ends; `from` itself if that byte is not in the set.
    #[must_use]
    pub fn unbroken_end(&self, from: u64) -> u64 {
        let at = self.ranges.partition_point(|&(_, end)| end <= from);
        match self.ranges.get(at) {
            Some(&(start, end)) if start <= from => end,
            _ => from,
        }
    }
}

impl FromIterator<Range<u64>> for RangeSet {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut set = Self::new();
        for range in ranges {
            set.insert(range);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn model(set: &RangeSet) -> Vec<bool> {
        (0..64).map(|byte| set.iter().any(|range| range.contains(&byte))).collect()
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_set_of_single_bytes(
            steps in proptest::collection::vec((any::<bool>(), 0_u64..64, 0_u64..64), 1..40),
            query in (0_u64..64, 0_u64..64),
        ) {
            let mut set = RangeSet::new();
            let mut bytes = vec![false; 64];
            for (add, a, b) in steps {
                let range = a.min(b)..a.max(b);
                if add { set.insert(range.clone()) } else { set.remove(range.clone()) }
                for byte in range { bytes[byte as usize] = add; }
            }
            prop_assert_eq!(model(&set), bytes.clone());
            prop_assert!(set.ranges.iter().all(|(start, end)| start < end));
            prop_assert!(set.ranges.windows(2).all(|pair| pair[0].1 < pair[1].0), "touching ranges are merged");
            let query = query.0.min(query.1)..query.0.max(query.1);
            let missing: RangeSet = set.missing(query.clone()).into_iter().collect();
            for byte in query.clone() {
                prop_assert_eq!(missing.contains(byte..byte + 1), !bytes[byte as usize]);
            }
            prop_assert_eq!(set.contains(query.clone()), missing.is_empty());
            let end = set.unbroken_end(query.start);
            prop_assert!((query.start..end).all(|byte| bytes[byte as usize]));
            prop_assert!(end >= 64 || !bytes[end as usize]);
            prop_assert_eq!(set.bytes(), bytes.iter().filter(|held| **held).count() as u64);
        }
    }
}
