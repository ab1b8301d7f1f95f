//! Who should own a lane, decided from what is seen in the lane's directory. Pure: no clock, no file.
//!
//! # What is seen
//!
//! ```text
//! lanes/3/e7-<nonce>/owner/7.12@root-1           root-1 owns lane 3 in epoch 7 and has said so twelve times
//! lanes/3/e7-<nonce>/owner/7.13@root-1@bye       it has given the lane up
//! lanes/3/e7-<nonce>/owner/7.13@root-1@bye@root-2 ... to root-2
//! lanes/3/wish.5@root-2                          root-2 would like to have it, and has said so five times
//! ```
//!
//! A mark is an empty directory that is renamed each time, so it costs one call, no lease and no block. The owner's mark
//! lies in its epoch's directory: one that was fenced can't renew it.
//!
//! # The rules
//!
//! The roots of the topology have an order for each lane (rendezvous hashing). The first one is preferred.
//!
//! - A mark that does not change for `takeover_after` is taken over: by the first root in the order that is not the silent
//!   one, by the next one a quarter later, and so on. Time counts only while looks succeed, and a pause of the watcher
//!   itself counts for little: that nothing was seen is no proof that nothing was there.
//! - After a goodbye the one that it names takes the lane at once; after one that names nobody they come in their order.
//! - A root that starts takes back at once what its own name is on: that was its life before.
//! - A root before the owner in the order makes a wish, again and again. The owner gives the lane to it when the wish has been
//!   renewed for a while, and never before `takeover_after` and some more has passed since it took the lane.
//!
//! None of this is needed for safety: who renames the lane's directory owns it, whatever the marks say.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tributary_common::ids::{Epoch, NodeName};

/// How an owner's mark ends when it has given the lane up.
const GOODBYE: &str = "bye";

/// How a wish begins.
const WISH: &str = "wish.";

/// So many looks in a row must have found a wish renewed before it counts.
const WISH_RENEWALS: u32 = 3;

/// A renewed wish counts for so many looks: the two sides don't beat in step.
const WISH_PATIENCE: u32 = 3;

/// What an owner says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// That it is there.
    Here,
    /// That it has given the lane up, and to whom if to one.
    Goodbye(Option<NodeName>),
}

/// An owner's mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// The epoch in which it was made.
    pub epoch: Epoch,
    /// How often it was renewed.
    pub count: u64,
    /// Whose it is.
    pub root: NodeName,
    /// What it says.
    pub word: Word,
}

impl Mark {
    /// Its name in the directory of marks.
    #[must_use]
    pub fn name(&self) -> String {
        let said = format!("{}.{}@{}", self.epoch, self.count, self.root);
        match &self.word {
            Word::Here => said,
            Word::Goodbye(None) => format!("{said}@{GOODBYE}"),
            Word::Goodbye(Some(to)) => format!("{said}@{GOODBYE}@{to}"),
        }
    }

    /// The mark of this name, if it is one.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let mut parts = name.split('@');
        let (epoch, count) = parts.next()?.split_once('.')?;
        let root = parts.next()?.parse().ok()?;
        let word = match (parts.next(), parts.next(), parts.next()) {
            (None, ..) => Word::Here,
            (Some(GOODBYE), None, _) => Word::Goodbye(None),
            (Some(GOODBYE), Some(to), None) => Word::Goodbye(Some(to.parse().ok()?)),
            _ => return None,
        };
        Some(Self { epoch: Epoch(epoch.parse().ok()?), count: count.parse().ok()?, root, word })
    }

    /// Which of two marks was made later.
    #[must_use]
    pub fn order(&self) -> (Epoch, u64) {
        (self.epoch, self.count)
    }
}

/// A root's wish to have a lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// How often it was renewed.
    pub count: u64,
    /// Whose it is.
    pub root: NodeName,
}

impl Wish {
    /// Its name in the lane's directory.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{WISH}{}@{}", self.count, self.root)
    }

    /// The wish of this name, if it is one.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let (count, root) = name.strip_prefix(WISH)?.split_once('@')?;
        Some(Self { count: count.parse().ok()?, root: root.parse().ok()? })
    }
}

/// What one look at a lane's directory shows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Look {
    /// The highest epoch; none while the lane was never taken.
    pub epoch: Option<Epoch>,
    /// The latest mark in its directory.
    pub mark: Option<Mark>,
    /// The latest wish of each root.
    pub wishes: Vec<Wish>,
}

/// One root's place among those that may own a lane.
#[derive(Debug, Clone)]
pub struct Rules {
    /// This root.
    pub me: NodeName,
    /// All roots in the order in which they should have the lane.
    pub order: Vec<NodeName>,
    /// How long an owner may be silent.
    pub takeover_after: Duration,
    /// Added to how long a lane that was taken is kept, so that not all go at the same moment. Below `takeover_after`.
    pub jitter: Duration,
}

impl Rules {
    /// How often an owner renews its mark and others look.
    #[must_use]
    pub fn beat(&self) -> Duration {
        self.takeover_after / 6
    }

    /// How many roots come before this one in the order.
    #[must_use]
    pub fn my_rank(&self) -> usize {
        self.rank(&self.me)
    }

    fn rank(&self, root: &NodeName) -> usize {
        self.order.iter().position(|known| known == root).unwrap_or(self.order.len())
    }

    /// How many come before me when `gone` is left out.
    fn before_me_without(&self, gone: Option<&NodeName>) -> u32 {
        let before = self.order.iter().take_while(|root| **root != self.me).filter(|root| Some(*root) != gone);
        u32::try_from(before.count()).unwrap_or(u32::MAX)
    }
}

/// What a root that does not own a lane does about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Look again later.
    Wait,
    /// Take it, for this reason.
    Take(&'static str),
}

/// A root that does not own a lane watches it.
#[derive(Debug)]
pub struct Watch {
    rules: Rules,
    seen: Option<(Option<Epoch>, Option<Mark>)>,
    looked: Option<Instant>,
    silent: Duration,
    /// This process has not owned the lane yet, so a mark with its name is one of the process before.
    newborn: bool,
}

impl Watch {
    /// Begins to watch. `newborn`: this process did not own the lane before.
    #[must_use]
    pub fn new(rules: Rules, newborn: bool) -> Self {
        Self { rules, seen: None, looked: None, silent: Duration::ZERO, newborn }
    }

    /// A look failed, or a try to take the lane: whoever owns it may have the same trouble, so its silence so far says
    /// nothing.
    pub fn failed(&mut self) {
        self.looked = None;
        self.silent = Duration::ZERO;
    }

    /// Notes what a look at `now` showed, and says what to do.
    pub fn saw(&mut self, now: Instant, look: &Look) -> Next {
        let seen = Some((look.epoch, look.mark.clone()));
        if self.seen == seen {
            let since = self.looked.map_or(Duration::ZERO, |looked| now.saturating_duration_since(looked));
            self.silent += since.min(2 * self.rules.beat());
        } else {
            self.silent = Duration::ZERO;
            self.seen = seen;
        }
        self.looked = Some(now);
        let (reason, patience) = match (&look.epoch, &look.mark) {
            (None, _) => ("nobody has had it yet", self.rules.takeover_after * self.rules.before_me_without(None)),
            (Some(_), Some(mark)) if mark.root == self.rules.me && self.newborn => {
                ("this root had it before it was restarted", Duration::ZERO)
            }
            (Some(_), Some(Mark { word: Word::Goodbye(Some(to)), .. })) if *to == self.rules.me => {
                ("its owner gave it to this root", Duration::ZERO)
            }
            (Some(_), Some(Mark { word: Word::Goodbye(None), root, .. })) => {
                ("its owner gave it up", 2 * self.rules.beat() * self.rules.before_me_without(Some(root)))
            }
            // A mark goes from owner to owner with the directory: without one the lane was just made.
            (Some(_), None) => {
                ("nobody has said that it has it", 2 * self.rules.beat() * (1 + self.rules.before_me_without(None)))
            }
            (Some(_), Some(mark)) => {
                let later = self.rules.takeover_after / 4 * self.rules.before_me_without(Some(&mark.root));
                ("its owner has been silent for takeover_after", self.rules.takeover_after + later)
            }
        };
        if self.silent >= patience { Next::Take(reason) } else { Next::Wait }
    }

    /// The root that seems to own the lane.
    #[must_use]
    pub fn owner(&self) -> Option<&NodeName> {
        match self.seen.as_ref()? {
            (_, Some(mark)) if mark.word == Word::Here => Some(&mark.root),
            _ => None,
        }
    }

    /// Whether this root should have the lane rather than the one that has it.
    #[must_use]
    pub fn wishes(&self) -> bool {
        self.owner().is_some_and(|owner| self.rules.my_rank() < self.rules.rank(owner))
    }
}

/// A root that owns a lane.
#[derive(Debug)]
pub struct Tenure {
    rules: Rules,
    since: Instant,
    wishes: BTreeMap<NodeName, Wished>,
}

#[derive(Debug)]
struct Wished {
    count: u64,
    renewals: u32,
    idle_looks: u32,
}

impl Tenure {
    /// The lane was taken at `now`.
    #[must_use]
    pub fn new(rules: Rules, now: Instant) -> Self {
        Self { rules, since: now, wishes: BTreeMap::new() }
    }

    /// Notes the wishes that a look at `now` showed. Returns the root that the lane should be given to, if it is time.
    pub fn saw(&mut self, now: Instant, wishes: &[Wish]) -> Option<&NodeName> {
        self.wishes.retain(|root, _| wishes.iter().any(|wish| wish.root == *root));
        for wish in wishes {
            let known = self.wishes.entry(wish.root.clone()).or_insert(Wished {
                count: wish.count,
                renewals: 0,
                idle_looks: 0,
            });
            if known.count == wish.count {
                known.idle_looks += 1;
                if known.idle_looks >= WISH_PATIENCE {
                    known.renewals = 0;
                }
            } else {
                *known = Wished { count: wish.count, renewals: known.renewals + 1, idle_looks: 0 };
            }
        }
        if now.saturating_duration_since(self.since) < self.rules.takeover_after + self.rules.jitter {
            return None;
        }
        let mine = self.rules.my_rank();
        self.rules.order[..mine.min(self.rules.order.len())]
            .iter()
            .find(|root| self.wishes.get(*root).is_some_and(|wished| wished.renewals >= WISH_RENEWALS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AFTER: Duration = Duration::from_secs(60);
    const BEAT: Duration = Duration::from_secs(10);

    fn name(name: &str) -> NodeName {
        name.parse().expect("valid")
    }

    fn rules(me: &str) -> Rules {
        let order = vec![name("a"), name("b"), name("c")];
        Rules { me: name(me), order, takeover_after: AFTER, jitter: Duration::from_secs(6) }
    }

    fn mark(count: u64, root: &str, word: Word) -> Mark {
        Mark { epoch: Epoch(7), count, root: name(root), word }
    }

    fn look(mark: Mark) -> Look {
        Look { epoch: Some(mark.epoch), mark: Some(mark), wishes: Vec::new() }
    }

    /// Looks every beat until it takes; returns after how long that was.
    fn takes_after(watch: &mut Watch, look: &Look, most: u32) -> Option<Duration> {
        let start = Instant::now();
        (0..most).map(|n| n * BEAT).find(|after| matches!(watch.saw(start + *after, look), Next::Take(_)))
    }

    #[test]
    fn marks_and_wishes_have_names_that_read_back() {
        for word in [Word::Here, Word::Goodbye(None), Word::Goodbye(Some(name("root.2")))] {
            let mark = mark(12, "root-1.example", word);
            assert_eq!(Mark::parse(&mark.name()), Some(mark));
        }
        let wish = Wish { count: 3, root: name("b.c") };
        assert_eq!(Wish::parse(&wish.name()), Some(wish));
        for foreign in ["", "7", "7.1", "7.1@", "x.1@a", "7.1@a@by", "7.1@a@bye@b@c", "7.1@a@bye@"] {
            assert_eq!(Mark::parse(foreign), None, "{foreign:?}");
        }
        for foreign in ["wish.", "wish.x@a", "wish.1@", "e7-1", "wish.1"] {
            assert_eq!(Wish::parse(foreign), None, "{foreign:?}");
        }
    }

    #[test]
    fn a_silent_owner_is_replaced_after_takeover_after_and_by_later_ones_later() {
        let silent = look(mark(1, "a", Word::Here));
        assert_eq!(takes_after(&mut Watch::new(rules("b"), true), &silent, 100), Some(AFTER));
        assert_eq!(takes_after(&mut Watch::new(rules("c"), true), &silent, 100), Some(AFTER + 2 * BEAT));
    }

    #[test]
    fn an_owner_that_renews_its_mark_keeps_the_lane() {
        let (start, mut watch) = (Instant::now(), Watch::new(rules("b"), true));
        for n in 0..1000_u32 {
            let seen = watch.saw(start + n * BEAT, &look(mark(u64::from(n / 5), "c", Word::Here)));
            assert_eq!(seen, Next::Wait, "look {n}");
        }
        assert_eq!(watch.owner(), Some(&name("c")));
    }

    #[test]
    fn silence_does_not_count_while_the_sink_does_not_answer() {
        let (start, mut watch) = (Instant::now(), Watch::new(rules("b"), true));
        let silent = look(mark(1, "a", Word::Here));
        for n in 0..100_u32 {
            if n % 5 == 4 {
                watch.failed();
            } else {
                assert_eq!(watch.saw(start + n * BEAT, &silent), Next::Wait, "look {n}");
            }
        }
    }

    #[test]
    fn a_watcher_that_was_paused_itself_does_not_take_its_own_pause_for_the_owners() {
        let (start, mut watch) = (Instant::now(), Watch::new(rules("b"), true));
        let silent = look(mark(1, "a", Word::Here));
        watch.saw(start, &silent);
        assert_eq!(watch.saw(start + 100 * AFTER, &silent), Next::Wait);
    }

    #[test]
    fn a_goodbye_hurries_the_one_that_it_names_and_then_the_first_in_the_order() {
        let to_c = look(mark(9, "a", Word::Goodbye(Some(name("c")))));
        assert_eq!(takes_after(&mut Watch::new(rules("c"), false), &to_c, 100), Some(Duration::ZERO));
        assert_eq!(takes_after(&mut Watch::new(rules("b"), false), &to_c, 100), Some(AFTER));
        let to_nobody = look(mark(9, "a", Word::Goodbye(None)));
        assert_eq!(takes_after(&mut Watch::new(rules("b"), false), &to_nobody, 100), Some(Duration::ZERO));
        assert_eq!(takes_after(&mut Watch::new(rules("c"), false), &to_nobody, 100), Some(2 * BEAT));
    }

    #[test]
    fn a_root_takes_back_at_once_only_what_the_process_before_it_had() {
        let mine = look(mark(9, "c", Word::Here));
        assert_eq!(takes_after(&mut Watch::new(rules("c"), true), &mine, 100), Some(Duration::ZERO));
        assert_eq!(takes_after(&mut Watch::new(rules("c"), false), &mine, 100), Some(AFTER + 3 * BEAT));
    }

    #[test]
    fn a_new_lane_is_taken_by_its_preferred_root_and_by_others_if_that_does_not_come() {
        let unborn = Look::default();
        assert_eq!(takes_after(&mut Watch::new(rules("a"), true), &unborn, 100), Some(Duration::ZERO));
        assert_eq!(takes_after(&mut Watch::new(rules("b"), true), &unborn, 100), Some(AFTER));
    }

    #[test]
    fn a_lane_that_was_made_and_has_no_mark_is_taken_soon_and_in_order() {
        let unmarked = Look { epoch: Some(Epoch(1)), ..Look::default() };
        assert_eq!(takes_after(&mut Watch::new(rules("a"), true), &unmarked, 100), Some(2 * BEAT));
        assert_eq!(takes_after(&mut Watch::new(rules("b"), true), &unmarked, 100), Some(4 * BEAT));
    }

    #[test]
    fn only_a_root_before_the_owner_in_the_order_wishes() {
        let owned = look(mark(1, "b", Word::Here));
        for (me, wishes) in [("a", true), ("b", false), ("c", false)] {
            let mut watch = Watch::new(rules(me), false);
            watch.saw(Instant::now(), &owned);
            assert_eq!(watch.wishes(), wishes, "{me}");
        }
    }

    /// Gives the owner looks in which the wishes of `roots` are renewed every `every` looks.
    fn given_after(me: &str, roots: &[&str], every: u32) -> Option<(Duration, NodeName)> {
        let start = Instant::now();
        let mut tenure = Tenure::new(rules(me), start);
        (0..100_u32).find_map(|n| {
            let wishes: Vec<Wish> =
                roots.iter().map(|root| Wish { count: u64::from(n / every), root: name(root) }).collect();
            Some((n * BEAT, tenure.saw(start + n * BEAT, &wishes)?.clone()))
        })
    }

    #[test]
    fn a_lane_is_given_to_the_best_root_that_keeps_wishing_and_not_before_its_time() {
        assert_eq!(given_after("c", &["b"], 1), Some((AFTER + BEAT, name("b"))));
        assert_eq!(given_after("c", &["b", "a"], 2), Some((AFTER + BEAT, name("a"))));
        assert_eq!(given_after("b", &["c"], 1), None, "it would be worse off");
        assert_eq!(given_after("c", &["a"], 1000), None, "an old wish of a dead root");
    }
}
