//! One lane at one root: watched, taken when it is this root's turn, served, given up.
//!
//! What is decided here is decided by [`super::ownership`]; this is the loop around it. While the lane is owned two things
//! run side by side: the lane's task, and the heartbeat, which notices also without any traffic that the lane was taken away.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tributary_common::ids::{LaneId, NodeName};

use super::lane::{self, Ended, LaneSettings, Request};
use super::marks::{self, BeatError, Heartbeat, Lookout, Wishing};
use super::metrics::LaneMetrics;
use super::ownership::{Next, Rules, Tenure, Watch, Word};
use super::recovery::{self, Seized, TakeError, Taken};
use crate::dfs::Dfs;

/// Requests that may wait for a lane's task. Their bytes are bounded where they are received.
const QUEUE: usize = 64;

/// How often a lane that another root owns is looked at by the two that are next in its order: how soon a goodbye is heard.
/// The others look with every beat.
const LOOK_INTERVAL: Duration = Duration::from_secs(4);

/// How many look that often.
const NEAR: usize = 2;

/// Tries to say goodbye. Without one the next owner waits for `takeover_after`.
const GOODBYES: usize = 3;

/// The pause between them.
const GOODBYE_PAUSE: Duration = Duration::from_secs(1);

/// How a lane stands at this root.
#[derive(Clone)]
pub(super) enum State {
    /// It is not known yet who has it, or it is being taken and read back; why it takes long, if it does.
    Taking(Option<String>),
    /// It is served here.
    Serving(mpsc::Sender<Request>),
    /// It is being given up.
    Leaving,
    /// Another root has it, by its mark this one.
    Elsewhere(Option<NodeName>),
    /// This root is stopping.
    Stopped,
}

/// A state that the keeper shows to others.
#[derive(Clone)]
pub(super) struct Shown(Arc<Mutex<State>>);

impl Shown {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(State::Taking(None))))
    }

    pub(super) fn get(&self) -> State {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set(&self, state: State) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }
}

/// Keeps one lane until it is stopped.
pub(super) struct Keeper {
    pub(super) dfs: Arc<dyn Dfs>,
    pub(super) lane: LaneId,
    pub(super) settings: LaneSettings,
    pub(super) rules: Rules,
    pub(super) metrics: LaneMetrics,
    pub(super) shown: Shown,
    pub(super) stop: CancellationToken,
}

impl Keeper {
    /// Watches, takes and serves the lane, again and again, until it is stopped.
    pub(super) async fn run(self) {
        // Whether a mark with this root's name is one of a life that is over.
        let mut reclaims = true;
        while let Some(seized) = self.watch(reclaims).await {
            let mut heartbeat =
                Heartbeat::new(Arc::clone(&self.dfs), seized.dir.clone(), seized.epoch, self.rules.me.clone());
            let taken = tokio::select! {
                biased;
                () = self.beat(&mut heartbeat, None) => None,
                () = self.stop.cancelled() => None,
                taken = self.read(seized) => Some(taken),
            };
            match taken {
                Some(Ok(taken)) => {
                    let goodbye = self.serve(taken, &mut heartbeat).await;
                    if let Some(word) = goodbye {
                        self.say_goodbye(&mut heartbeat, word).await;
                    }
                    reclaims = false;
                }
                Some(Err(error)) => {
                    tracing::error!(lane = %self.lane, %error, "the lane can't be read back; trying again");
                    self.shown.set(State::Taking(Some(error.to_string())));
                    reclaims = true;
                    self.pause(self.rules.beat()).await;
                }
                None => reclaims = false,
            }
        }
        self.shown.set(State::Stopped);
    }

    async fn pause(&self, time: Duration) {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => {}
            () = tokio::time::sleep(time) => {}
        }
    }

    /// Looks at the lane until it is this root's turn and its directory was taken. None when stopped.
    async fn watch(&self, reclaims: bool) -> Option<Seized> {
        let mut watch = Watch::new(self.rules.clone(), reclaims);
        let mut lookout = Lookout::new(Arc::clone(&self.dfs), self.lane);
        let mut wishing = Wishing::new(Arc::clone(&self.dfs), self.lane, self.rules.me.clone());
        let interval = if self.rules.my_rank() < NEAR { LOOK_INTERVAL } else { Duration::MAX };
        loop {
            let looking = tokio::select! {
                biased;
                () = self.stop.cancelled() => return None,
                looked = self.look(&mut watch, &mut lookout, &mut wishing) => looked,
            };
            if looking.is_some() {
                return looking;
            }
            self.pause(self.rules.beat().min(interval)).await;
        }
    }

    async fn look(&self, watch: &mut Watch, lookout: &mut Lookout, wishing: &mut Wishing) -> Option<Seized> {
        let look = match lookout.look(watch.wishes()).await {
            Ok(look) => look,
            Err(error) => {
                tracing::warn!(lane = %self.lane, %error, "can't look who has the lane");
                watch.failed();
                self.shown.set(State::Taking(Some(format!("can't look who has lane {}: {error}", self.lane))));
                return None;
            }
        };
        match watch.saw(Instant::now().into_std(), &look) {
            Next::Wait => {
                self.shown.set(State::Elsewhere(watch.owner().cloned()));
                if watch.wishes()
                    && let Err(error) = wishing.renew(&look.wishes).await
                {
                    tracing::debug!(lane = %self.lane, %error, "can't ask for the lane");
                }
                None
            }
            Next::Take(reason) => {
                tracing::info!(lane = %self.lane, reason, "taking the lane");
                self.shown.set(State::Taking(None));
                match self.seize().await {
                    Ok(seized) => {
                        // An old wish does no harm: only one that is renewed counts.
                        let _ = wishing.end().await;
                        Some(seized)
                    }
                    Err(error) => {
                        watch.failed();
                        tracing::error!(lane = %self.lane, %error, "the lane can't be taken; trying again");
                        self.shown.set(State::Taking(Some(error.to_string())));
                        None
                    }
                }
            }
        }
    }

    async fn seize(&self) -> Result<Seized, TakeError> {
        recovery::check_base(&*self.dfs, self.settings.lanes).await?;
        let seized = recovery::seize(&self.dfs, self.lane).await?;
        // It may have been changed since the first look; from here on who changes it fences this owner.
        recovery::check_base(&*self.dfs, self.settings.lanes).await?;
        Ok(seized)
    }

    async fn read(&self, seized: Seized) -> Result<Taken, TakeError> {
        let stream_ttl_ms = i64::try_from(self.settings.stream_ttl.as_millis()).unwrap_or(i64::MAX);
        recovery::read(&self.dfs, self.lane, seized, stream_ttl_ms, self.settings.clock.now_ms()).await
    }

    /// Renews the mark until the lane is lost. `give`: where to say that the lane should be given to another root.
    async fn beat(&self, heartbeat: &mut Heartbeat, give: Option<mpsc::Sender<NodeName>>) {
        let mut tenure = Tenure::new(self.rules.clone(), Instant::now().into_std());
        loop {
            let next = Instant::now() + self.rules.beat();
            match heartbeat.beat(Word::Here).await {
                Ok(()) => {}
                Err(BeatError::Fenced) => {
                    tracing::error!(lane = %self.lane, "another root has taken the lane; nothing more is written here");
                    return;
                }
                Err(BeatError::Dfs(error)) => {
                    tracing::warn!(lane = %self.lane, %error, "the owner's mark can't be renewed");
                }
            }
            if let Some(give) = &give
                && let Ok(wishes) = marks::wishes(&*self.dfs, self.lane).await
                && let Some(to) = tenure.saw(Instant::now().into_std(), &wishes)
            {
                // Once is enough.
                let _ = give.try_send(to.clone());
            }
            tokio::time::sleep_until(next).await;
        }
    }

    /// Serves the lane until it is lost, given to another root, or this one is stopped. Returns what to say in leaving; none
    /// when it was lost.
    async fn serve(&self, taken: Taken, heartbeat: &mut Heartbeat) -> Option<Word> {
        let (requests, queue) = mpsc::channel(QUEUE);
        let (give, mut given) = mpsc::channel(1);
        let run =
            lane::run(Arc::clone(&self.dfs), self.lane, taken, self.settings.clone(), self.metrics.clone(), queue);
        let beats = self.beat(heartbeat, Some(give));
        tokio::pin!(run, beats);
        self.shown.set(State::Serving(requests.clone()));
        let mut leaving: Option<(Word, Instant)> = None;
        loop {
            let deadline = leaving.as_ref().map_or_else(Instant::now, |(_, deadline)| *deadline);
            let word = tokio::select! {
                biased;
                ended = &mut run => {
                    self.shown.set(State::Elsewhere(None));
                    return match ended {
                        Ended::Fenced => None,
                        Ended::Drained => Some(leaving.map_or(Word::Goodbye(None), |(word, _)| word)),
                    };
                }
                () = &mut beats => {
                    self.shown.set(State::Elsewhere(None));
                    return None;
                }
                Some(to) = given.recv(), if leaving.is_none() => {
                    tracing::info!(lane = %self.lane, %to, "giving the lane to a root that comes before this one");
                    Word::Goodbye(Some(to))
                }
                () = self.stop.cancelled(), if leaving.is_none() => Word::Goodbye(None),
                () = tokio::time::sleep_until(deadline), if leaving.is_some() => {
                    tracing::warn!(lane = %self.lane, "not all could be closed; the next owner recovers it");
                    self.shown.set(State::Elsewhere(None));
                    return leaving.map(|(word, _)| word);
                }
            };
            self.shown.set(State::Leaving);
            leaving = Some((word, Instant::now() + self.rules.takeover_after));
            let requests = requests.clone();
            // Beside the lane's task, which may have to make room in its queue first.
            tokio::spawn(async move { requests.send(Request::Drain).await });
        }
    }

    async fn say_goodbye(&self, heartbeat: &mut Heartbeat, word: Word) {
        for _ in 0..GOODBYES {
            match heartbeat.beat(word.clone()).await {
                Ok(()) | Err(BeatError::Fenced) => return,
                Err(BeatError::Dfs(error)) => {
                    tracing::warn!(lane = %self.lane, %error, "can't say that the lane is free");
                    tokio::time::sleep(GOODBYE_PAUSE).await;
                }
            }
        }
    }
}
