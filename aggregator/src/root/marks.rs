//! The marks of [`super::ownership`] on the sink: looking at them, renewing them.

use std::sync::Arc;

use tributary_common::ids::{Epoch, LaneId, NodeName};

use super::ownership::{Look, Mark, Wish, Word};
use super::recovery::epoch_of;
use super::sink::lanes_dir;
use crate::dfs::{Dfs, DfsError, DfsPath};

/// The directory of marks in the owner's directory.
pub const OWNER_DIR: &str = "owner";

/// Looks at a lane's directory.
///
/// # Errors
/// When the sink doesn't say.
pub async fn look(dfs: &dyn Dfs, lane: LaneId) -> Result<Look, DfsError> {
    look_at_all(dfs, lane).await.map(|(look, _)| look)
}

async fn look_at_all(dfs: &dyn Dfs, lane: LaneId) -> Result<(Look, Option<(Epoch, DfsPath)>), DfsError> {
    let (wishes, owned) = look_at_lane(dfs, lane).await?;
    let mark = match &owned {
        Some((_, dir)) => latest_mark(dfs, dir).await?,
        None => None,
    };
    Ok((Look { epoch: owned.as_ref().map(|(epoch, _)| *epoch), mark, wishes }, owned))
}

/// Who wishes to have a lane.
///
/// # Errors
/// When the sink doesn't say.
pub async fn wishes(dfs: &dyn Dfs, lane: LaneId) -> Result<Vec<Wish>, DfsError> {
    look_at_lane(dfs, lane).await.map(|(wishes, _)| wishes)
}

/// The wishes to have a lane, and the epoch and the directory of its owner.
async fn look_at_lane(dfs: &dyn Dfs, lane: LaneId) -> Result<(Vec<Wish>, Option<(Epoch, DfsPath)>), DfsError> {
    let lane_dir = lanes_dir().join(lane.to_string());
    let (mut wishes, mut highest) = (Vec::<Wish>::new(), None);
    for entry in dfs.list(&lane_dir).await?.unwrap_or_default() {
        if let Some(epoch) = epoch_of(&entry.name) {
            highest = highest.max(Some((epoch, entry.name)));
        } else if let Some(wish) = Wish::parse(&entry.name) {
            match wishes.iter_mut().find(|known| known.root == wish.root) {
                Some(known) => known.count = known.count.max(wish.count),
                None => wishes.push(wish),
            }
        }
    }
    Ok((wishes, highest.map(|(epoch, name)| (epoch, lane_dir.join(name)))))
}

/// The latest mark in an owner's directory; none when there is none, or when the directory is gone.
async fn latest_mark(dfs: &dyn Dfs, owned: &DfsPath) -> Result<Option<Mark>, DfsError> {
    let marks = dfs.list(&owned.join(OWNER_DIR)).await?.unwrap_or_default();
    Ok(marks.iter().filter_map(|entry| Mark::parse(&entry.name)).max_by_key(Mark::order))
}

/// Looks at a lane again and again: with one call as long as its owner stays.
pub struct Lookout {
    dfs: Arc<dyn Dfs>,
    lane: LaneId,
    /// The owner's directory when it was last seen.
    owned: Option<(Epoch, DfsPath)>,
}

impl Lookout {
    /// Nothing has been seen yet.
    #[must_use]
    pub fn new(dfs: Arc<dyn Dfs>, lane: LaneId) -> Self {
        Self { dfs, lane, owned: None }
    }

    /// Looks at the mark of the owner that was seen before; when it is gone, or when `wishes` are to be looked at as well, at
    /// all of the lane. A look at the owner alone has no wishes.
    ///
    /// # Errors
    /// When the sink doesn't say.
    pub async fn look(&mut self, wishes: bool) -> Result<Look, DfsError> {
        // Who takes a lane renames its owner's directory: while that is there, nobody has.
        if let Some((epoch, dir)) = self.owned.take_if(|_| !wishes)
            && let Some(mark) = latest_mark(&*self.dfs, &dir).await?
        {
            self.owned = Some((epoch, dir));
            return Ok(Look { epoch: Some(epoch), mark: Some(mark), wishes: Vec::new() });
        }
        let (look, owned) = look_at_all(&*self.dfs, self.lane).await?;
        self.owned = owned;
        Ok(look)
    }
}

/// The mark could not be renewed.
#[derive(Debug, thiserror::Error)]
pub enum BeatError {
    /// The lane's directory is not there under its name: another root has taken the lane.
    #[error("another root has taken the lane")]
    Fenced,
    /// The sink failed.
    #[error(transparent)]
    Dfs(#[from] DfsError),
}

/// An owner's mark.
pub struct Heartbeat {
    dfs: Arc<dyn Dfs>,
    dir: DfsPath,
    epoch: Epoch,
    me: NodeName,
    count: u64,
    /// The mark as it was left; none when that is not known.
    last: Option<Mark>,
}

impl Heartbeat {
    /// The heartbeat of the owner of the directory `dir`.
    #[must_use]
    pub fn new(dfs: Arc<dyn Dfs>, dir: DfsPath, epoch: Epoch, me: NodeName) -> Self {
        Self { dfs, dir, epoch, me, count: 0, last: None }
    }

    /// Renews the mark.
    ///
    /// May be dropped at any await and called again.
    ///
    /// # Errors
    /// When the lane is lost, or the sink failed.
    pub async fn beat(&mut self, word: Word) -> Result<(), BeatError> {
        let marks = self.dir.join(OWNER_DIR);
        self.count += 1;
        let mark = Mark { epoch: self.epoch, count: self.count, root: self.me.clone(), word };
        let target = marks.join(mark.name());
        if let Some(last) = self.last.take() {
            match self.dfs.rename(&marks.join(last.name()), &target).await {
                Ok(()) => {
                    self.last = Some(mark);
                    return Ok(());
                }
                // The directory is gone, or an earlier renewal was done late. A look tells.
                Err(DfsError::NotFound { .. } | DfsError::Exists { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let there = match self.dfs.list(&marks).await? {
            Some(there) => there,
            None if self.dfs.stat(&self.dir).await?.is_none() => return Err(BeatError::Fenced),
            None => {
                match self.dfs.mkdir(&marks).await {
                    Ok(()) | Err(DfsError::Exists { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
                Vec::new()
            }
        };
        let mut known: Vec<Mark> = there.iter().filter_map(|entry| Mark::parse(&entry.name)).collect();
        known.sort_by_key(Mark::order);
        let newest = known.pop();
        if let Some(newest) = newest {
            // What is done late may have left an older one beside it; only the newest counts.
            for stale in known {
                self.dfs.delete(&marks.join(stale.name())).await?;
            }
            if newest.epoch == self.epoch {
                self.count = self.count.max(newest.count + 1);
            }
            let mark = Mark { count: self.count, ..mark };
            self.dfs.rename(&marks.join(newest.name()), &marks.join(mark.name())).await?;
            self.last = Some(mark);
        } else {
            self.dfs.mkdir(&target).await?;
            self.last = Some(mark);
        }
        Ok(())
    }
}

/// A root's wish to have a lane that another one owns.
pub struct Wishing {
    dfs: Arc<dyn Dfs>,
    dir: DfsPath,
    me: NodeName,
    last: Option<Wish>,
}

impl Wishing {
    /// Nothing is wished yet.
    #[must_use]
    pub fn new(dfs: Arc<dyn Dfs>, lane: LaneId, me: NodeName) -> Self {
        Self { dfs, dir: lanes_dir().join(lane.to_string()), me, last: None }
    }

    /// Wishes, again. `seen` is what a look has just shown.
    ///
    /// # Errors
    /// When the sink failed.
    pub async fn renew(&mut self, seen: &[Wish]) -> Result<(), DfsError> {
        let before = seen.iter().find(|wish| wish.root == self.me).cloned().or_else(|| self.last.take());
        let wish = Wish { count: before.as_ref().map_or(0, |wish| wish.count + 1), root: self.me.clone() };
        let target = self.dir.join(wish.name());
        match before {
            Some(before) => self.dfs.rename(&self.dir.join(before.name()), &target).await?,
            None => self.dfs.mkdir(&target).await?,
        }
        self.last = Some(wish);
        Ok(())
    }

    /// Takes all wishes of this root back: it has the lane.
    ///
    /// # Errors
    /// When the sink failed; an old wish does no harm.
    pub async fn end(&mut self) -> Result<(), DfsError> {
        self.last = None;
        for entry in self.dfs.list(&self.dir).await?.unwrap_or_default() {
            if Wish::parse(&entry.name).is_some_and(|wish| wish.root == self.me) {
                self.dfs.delete(&self.dir.join(&entry.name)).await?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dfs::hostile::{HostileCluster, Hostility};
    use crate::root::recovery;

    fn name(name: &str) -> NodeName {
        name.parse().expect("valid")
    }

    #[tokio::test(start_paused = true)]
    async fn a_heartbeat_is_seen_by_others_and_ends_when_the_lane_is_taken() {
        let cluster = HostileCluster::new(1, Hostility::none());
        let (first, second): (Arc<dyn Dfs>, Arc<dyn Dfs>) = (Arc::new(cluster.process()), Arc::new(cluster.process()));
        let lane = LaneId(3);
        assert_eq!(look(&*second, lane).await.expect("answers"), Look::default());
        let mine = recovery::seize(&first, lane).await.expect("nobody has it");
        let mut beat = Heartbeat::new(Arc::clone(&first), mine.dir, mine.epoch, name("a"));
        for count in 1..4 {
            beat.beat(Word::Here).await.expect("it is mine");
            let mark = look(&*second, lane).await.expect("answers").mark.expect("there is one");
            assert_eq!((mark.count, mark.epoch, &mark.root), (count, mine.epoch, &name("a")));
        }
        let theirs = recovery::seize(&second, lane).await.expect("taken");
        assert!(matches!(beat.beat(Word::Here).await, Err(BeatError::Fenced)));
        let mut next = Heartbeat::new(Arc::clone(&second), theirs.dir, theirs.epoch, name("b"));
        next.beat(Word::Goodbye(Some(name("a")))).await.expect("it is theirs");
        let seen = look(&*first, lane).await.expect("answers");
        assert_eq!(seen.epoch, Some(theirs.epoch));
        let mark = seen.mark.expect("there is one");
        assert_eq!((mark.root, mark.word), (name("b"), Word::Goodbye(Some(name("a")))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_lookout_sees_what_a_look_at_all_sees_and_asks_less() {
        let cluster = HostileCluster::new(1, Hostility::none());
        let (first, second): (Arc<dyn Dfs>, Arc<dyn Dfs>) = (Arc::new(cluster.process()), Arc::new(cluster.process()));
        let lane = LaneId(3);
        let mut lookout = Lookout::new(Arc::clone(&second), lane);
        assert_eq!(lookout.look(false).await.expect("answers"), Look::default());
        for (dfs, root) in [(&first, "a"), (&second, "b"), (&first, "c")] {
            let owned = recovery::seize(dfs, lane).await.expect("taken");
            let mut beat = Heartbeat::new(Arc::clone(dfs), owned.dir, owned.epoch, name(root));
            for _ in 0..3 {
                let all = look(&*second, lane).await.expect("answers");
                assert_eq!(lookout.look(false).await.expect("answers"), all);
                beat.beat(Word::Here).await.expect("it is theirs");
            }
            beat.beat(Word::Goodbye(None)).await.expect("it is theirs");
            let before = cluster.calls();
            let seen = lookout.look(false).await.expect("answers");
            assert_eq!(cluster.calls() - before, 1, "nobody else has it");
            assert_eq!(seen, look(&*second, lane).await.expect("answers"));
        }
        Wishing::new(Arc::clone(&first), lane, name("a")).renew(&[]).await.expect("made");
        assert_eq!(lookout.look(true).await.expect("answers").wishes, [Wish { count: 0, root: name("a") }]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_heartbeat_goes_on_through_a_hostile_sink() {
        for seed in 0..20 {
            let cluster = HostileCluster::new(seed, Hostility::storm());
            let dfs: Arc<dyn Dfs> = Arc::new(cluster.process());
            let mine = loop {
                if let Ok(mine) = recovery::seize(&dfs, LaneId(0)).await {
                    break mine;
                }
            };
            let mut beat = Heartbeat::new(Arc::clone(&dfs), mine.dir, mine.epoch, name("a"));
            let mut renewed = 0;
            for _ in 0..100 {
                match beat.beat(Word::Here).await {
                    Ok(()) => renewed += 1,
                    Err(BeatError::Dfs(_)) => {}
                    Err(BeatError::Fenced) => panic!("seed {seed}: nobody took it"),
                }
            }
            assert!(renewed > 50, "seed {seed}: {renewed} of 100");
            cluster.set_hostility(Hostility::none());
            let before = look(&*dfs, LaneId(0)).await.expect("answers").mark;
            beat.beat(Word::Here).await.expect("nothing fails any more");
            let after = look(&*dfs, LaneId(0)).await.expect("answers").mark;
            assert!(after.as_ref().map(Mark::order) > before.as_ref().map(Mark::order), "{before:?} {after:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_wish_is_renewed_and_taken_back() {
        let cluster = HostileCluster::new(1, Hostility::none());
        let dfs: Arc<dyn Dfs> = Arc::new(cluster.process());
        recovery::seize(&dfs, LaneId(0)).await.expect("nobody has it");
        let mut wishing = Wishing::new(Arc::clone(&dfs), LaneId(0), name("b"));
        for count in 0..3 {
            let seen = look(&*dfs, LaneId(0)).await.expect("answers").wishes;
            wishing.renew(&seen).await.expect("made");
            let wishes = look(&*dfs, LaneId(0)).await.expect("answers").wishes;
            assert_eq!(wishes, [Wish { count, root: name("b") }]);
        }
        wishing.end().await.expect("gone");
        assert_eq!(look(&*dfs, LaneId(0)).await.expect("answers").wishes, []);
    }
}
