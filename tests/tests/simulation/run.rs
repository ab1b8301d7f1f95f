//! One run: a tree is drawn from a seed, bad things happen to it for some minutes of its time, then they stop, and everything has
//! to come to its end.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tributary_aggregator::dfs::hostile::{Cruelties, Hostility};

use crate::chance::{Chance, Trace, locked};
use crate::disk::Wear;
use crate::judge::Verdicts;
use crate::network::Weather;
use crate::server::Server;
use crate::tree::{Fate, Machine, Plan, Running, Seat, World};

/// So many steps of up to two seconds are bad; then the faults stop.
const BAD_STEPS: u64 = 150;

/// The longest that everything takes to be committed and published from then on; not counted, until the present bucket is over.
const PATIENCE: Duration = Duration::from_secs(1500);

/// How long an operator waits for an answer.
const OPERATORS_PATIENCE: Duration = Duration::from_secs(2);

/// What a run came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) verdicts: Verdicts,
    pub(crate) cruelties: Cruelties,
    pub(crate) faults: u64,
    /// How often an agent left.
    pub(crate) left: u64,
    /// Virtual time from the end of the faults to the end of everything.
    pub(crate) recovered_in: Duration,
    pub(crate) trace: Vec<String>,
}

thread_local! {
    /// Panics in tasks of the present run: the runtime keeps them to itself.
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Notices panics in tasks.
pub(crate) fn watch_for_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.with_borrow_mut(|panics| panics.push(info.to_string()));
            before(info);
        }));
    });
}

struct Run {
    world: World,
    seats: Vec<Seat>,
    plan: Plan,
    seed: u64,
    faults: u64,
    /// How often an agent has left.
    left: u64,
    /// Whether an operator has said that a server is gone for ever.
    retired: bool,
}

impl Run {
    fn chance(&self) -> &Chance {
        &self.world.chance
    }

    fn check(&self) {
        let mut findings = self.world.judge.findings();
        findings.extend(PANICS.with_borrow_mut(std::mem::take));
        let more = findings.len().saturating_sub(5);
        findings.truncate(5);
        assert!(findings.is_empty(), "seed {}: {}\n{more} more; {:?}", self.seed, findings.join("\n"), self.plan);
    }

    fn later(&self, most_s: u64) -> Option<Instant> {
        Some(Instant::now() + self.chance().up_to(Duration::from_secs(most_s)))
    }

    /// Starts and wakes up what is due; all of it when `all`. What died by itself is started again by its supervisor.
    fn bring_back(&mut self, all: bool) {
        let now = Instant::now();
        for seat in self.seats.iter_mut().filter(|seat| !seat.gone) {
            if seat.process.as_ref().is_some_and(|process| process.gate.is_dead()) {
                seat.crash(&self.world);
                let mut away = Duration::from_secs(2);
                if let Machine::Server(server, _) = &seat.machine
                    && server.take_has_left()
                {
                    self.left += 1;
                    away = self.world.chance.up_to(Duration::from_secs(100));
                }
                seat.back.get_or_insert(now + away);
            }
            if !all && seat.back.is_none_or(|back| back > now) {
                continue;
            }
            seat.back = None;
            match &seat.process {
                Some(process) => {
                    process.gate.resume();
                    if let Running::Root(_, dfs) = &process.running {
                        self.world.cluster.resume(dfs);
                    }
                }
                None => seat.process = Some(self.world.start(&seat.name, &seat.machine)),
            }
        }
    }

    fn crash(&mut self, at: usize, away_s: u64) {
        self.seats[at].crash(&self.world);
        self.seats[at].back = self.later(away_s);
    }

    fn fault(&mut self) {
        self.faults += 1;
        let at = self.chance().index(self.seats.len());
        let what = self.chance().below(10);
        self.world.trace.add(|| format!("fault {what} at {}", self.seats[at].name));
        match what {
            0..=2 => {
                self.crash(at, 60);
                self.after_crash(at);
            }
            3 | 4 => {
                self.seats[at].stop(&self.world);
                self.seats[at].back = self.later(150);
            }
            5 => {
                let other = self.chance().index(self.seats.len());
                self.world.network.part(&self.seats[at].name, &self.seats[other].name);
            }
            6 => self.world.network.heal(),
            7 => self.drain(at),
            8 => {
                // The machines of one tier lose their power, or all that there are.
                let all = self.chance().one_in(3);
                for seat in 0..self.seats.len() {
                    if all || self.seats[seat].is_like(&self.seats[at]) {
                        self.crash(seat, 20);
                        self.seats[seat].lose_power();
                    }
                }
                if all || matches!(self.seats[at].machine, Machine::Root) {
                    self.world.cluster.power_loss();
                }
            }
            _ => self.quiet_fault(at),
        }
    }

    /// What may be found on a machine whose process has crashed.
    fn after_crash(&mut self, at: usize) {
        let (plan, chance) = (self.plan, self.chance().clone());
        match &mut self.seats[at].machine {
            Machine::Server(server, copies) if plan.databases_change && chance.one_in(2) => {
                let with = if chance.one_in(2) { copies.get(chance.index(copies.len())).cloned() } else { None };
                server.replace_database(with.unwrap_or_default());
            }
            Machine::Edge(_, disk, copies) if plan.spools_change => match chance.below(4) {
                0 => disk.lose(),
                1 => {
                    if let Some(copy) = copies.get(chance.index(copies.len())) {
                        disk.roll_back(copy);
                    }
                }
                2 => disk.lose_power(),
                _ => {}
            },
            _ => {}
        }
    }

    /// What happens to a machine while its process works.
    fn quiet_fault(&mut self, at: usize) {
        let (plan, chance, now_ms) = (self.plan, self.chance().clone(), self.world.cluster.now_ms());
        match &mut self.seats[at].machine {
            Machine::Server(server, copies) => {
                copies.push(locked(&server.database).clone());
                if plan.files_change {
                    server.cut_off(if chance.one_in(2) { 0 } else { chance.below(100) }, now_ms);
                }
            }
            Machine::Edge(_, disk, copies) => {
                copies.push(disk.copy());
                if plan.spools_change && chance.one_in(3) {
                    disk.rot();
                }
            }
            Machine::Root => {}
        }
    }

    fn drain(&mut self, at: usize) {
        let patience = self.chance().up_to(Duration::from_secs(60));
        let Some(process) = self.seats[at].process.as_ref().filter(|process| process.gate.is_running()) else { return };
        let gate = process.gate.clone();
        match &process.running {
            Running::Agent => {}
            Running::Edge(edge) => {
                let Some(edge) = edge.get().cloned() else { return };
                // Its supervisor sees it end.
                tokio::spawn(async move {
                    let _ = tokio::time::timeout(patience, edge.drain()).await;
                    gate.kill();
                });
            }
            Running::Root(root, _) => {
                let root = Arc::clone(root);
                tokio::spawn(async move {
                    let _ = tokio::time::timeout(patience, root.drain()).await;
                    gate.kill();
                });
            }
        }
    }

    /// The server with a fate of its own, and its place.
    fn guest(&self) -> (Arc<Server>, usize) {
        let server = self.world.servers.last().expect("there is a server");
        let at = self.seats.iter().position(|seat| seat.name == server.agent.as_str()).expect("it has a place");
        (Arc::clone(server), at)
    }

    /// What becomes of it in this step.
    async fn fate(&mut self, step: u64) {
        let (server, at) = self.guest();
        match self.plan.fate {
            Fate::Stays => {}
            Fate::ComesAndGoes => {
                if self.chance().one_in(25) {
                    server.finish_lines(self.world.cluster.now_ms());
                    server.wish_to_leave(true);
                }
            }
            Fate::Retired | Fate::GivenUp => {
                if step == self.plan.dies_at {
                    self.seats[at].crash(&self.world);
                    self.seats[at].gone = true;
                    server.die(self.world.cluster.now_ms());
                }
                // It may wait for answers: not so often that a day ends meanwhile.
                if step >= self.plan.retired_at && step.is_multiple_of(8) {
                    self.retire().await;
                }
            }
        }
    }

    /// An operator says that the server is gone for ever, until somebody has heard it.
    async fn retire(&mut self) {
        let (server, _) = self.guest();
        if self.plan.fate != Fate::Retired || self.retired {
            return;
        }
        for seat in &self.seats {
            let Some(process) = seat.process.as_ref().filter(|process| process.gate.is_running()) else { continue };
            let Running::Root(root, _) = &process.running else { continue };
            let asked = tokio::time::timeout(OPERATORS_PATIENCE, root.retire(server.agent.as_str(), None)).await;
            let heard = asked.is_ok_and(|counts| counts.values().any(|count| count.is_some_and(|count| count > 0)));
            self.world.trace.add(|| format!("{} is asked to retire {}: {heard}", seat.name, server.agent));
            self.retired |= heard;
        }
    }

    fn write(&self) {
        for seat in &self.seats {
            let Machine::Server(server, _) = &seat.machine else { continue };
            // Of one that never rests no agent leaves.
            if self.chance().one_in(if server.wants_to_leave() { 8 } else { 2 }) {
                server.write(1 + self.chance().below(8), self.world.cluster.now_ms());
            }
            if self.chance().one_in(40) {
                server.rotate(self.world.cluster.now_ms());
            }
        }
    }

    async fn go(mut self) -> Told {
        for step in 0..BAD_STEPS {
            tokio::time::sleep(self.chance().up_to(Duration::from_secs(2))).await;
            self.bring_back(false);
            self.write();
            self.fate(step).await;
            if self.chance().one_in(self.plan.fault_every) {
                self.fault();
            }
            self.world.judge.look_at_published(&self.world.servers);
            self.check();
        }
        self.world.trace.add(|| "the faults stop".to_owned());
        self.world.cluster.set_hostility(Hostility::none());
        self.world.network.set_weather(Weather::default());
        self.world.network.heal();
        for seat in &self.seats {
            match &seat.machine {
                Machine::Server(server, _) => {
                    server.finish_lines(self.world.cluster.now_ms());
                    server.wish_to_leave(false);
                }
                Machine::Edge(_, disk, _) => disk.set_wear(Wear::default()),
                Machine::Root => {}
            }
        }
        self.bring_back(true);
        let quiet_since = Instant::now();
        let quiet_ms = self.world.cluster.now_ms();
        let until_over = (self.world.bucket().bucket_of_ms(quiet_ms).end_ms() - quiet_ms).unsigned_abs();
        let patience = PATIENCE + Duration::from_millis(until_over);
        while let Some(open) = self.open(quiet_ms).await {
            let late = quiet_since.elapsed() > patience;
            assert!(!late, "seed {}: {patience:?} after the last fault: {open}\n{:?}", self.seed, self.plan);
            tokio::time::sleep(Duration::from_secs(5)).await;
            self.retire().await;
            self.part();
            self.bring_back(false);
            self.world.judge.look_at_published(&self.world.servers);
            self.check();
        }
        let recovered_in = quiet_since.elapsed();
        let verdicts = self.world.judge.end(&self.world.servers);
        self.check();
        for seat in &mut self.seats {
            seat.crash(&self.world);
        }
        let cruelties = self.world.cluster.cruelties();
        let trace = self.world.trace.lines();
        Told { verdicts, cruelties, faults: self.faults, left: self.left, recovered_in, trace }
    }

    /// In the end the one that came and went leaves for ever: nothing waits for it any more.
    fn part(&mut self) {
        let (server, at) = self.guest();
        if self.plan.fate != Fate::ComesAndGoes || self.seats[at].gone {
            return;
        }
        // What was written while it left is shipped by its next run.
        if !server.is_done() {
            return;
        }
        if server.take_has_left() {
            self.left += 1;
            self.seats[at].crash(&self.world);
            self.seats[at].gone = true;
        } else {
            server.wish_to_leave(true);
        }
    }

    /// What is not as it should be in the end, if anything.
    async fn open(&self, quiet_ms: i64) -> Option<String> {
        for server in &self.world.servers {
            if !server.is_done() {
                let shipped = format!("{:?}", locked(&server.shipped));
                return Some(format!("not all of {} is committed: {shipped}\n{}", server.agent, self.nodes().await));
            }
        }
        let missing = self.world.judge.missing(&self.world.servers);
        if !missing.is_empty() {
            return Some(format!(
                "{} lines are not published: {:?}, {}",
                missing.len(),
                missing.first(),
                self.nodes().await
            ));
        }
        let unpublished = self.world.judge.unpublished();
        if !unpublished.is_empty() {
            return Some(format!("unpublished: {unpublished:?}, {}", self.nodes().await));
        }
        if let Some(hour) = self.world.judge.unpublished_hour(&self.world.servers, self.world.bucket(), quiet_ms) {
            return Some(format!("{hour} is not published, {}", self.nodes().await));
        }
        for seat in &self.seats {
            // What a server had sent that is gone may follow bytes that are lost: nobody sends these again.
            if self.world.servers.iter().any(|server| server.died_ms().is_some()) {
                break;
            }
            let Some(status) = seat.status().await else { continue };
            if !matches!(status["spool"]["batches"].as_u64(), None | Some(0)) {
                return Some(format!("{} still holds batches: {status:#}", seat.name));
            }
        }
        None
    }

    async fn nodes(&self) -> String {
        let mut said = String::new();
        for seat in &self.seats {
            if let Some(status) = seat.status().await {
                said += &format!("{}: {status}\n", seat.name);
            }
        }
        said
    }
}

/// Runs a seed, on a thread and in a time of its own.
pub(crate) fn run(seed: u64, with_trace: bool) -> Told {
    PANICS.with_borrow_mut(Vec::clear);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
    runtime.block_on(async {
        let chance = Chance::new(seed);
        let trace = Trace::new(with_trace);
        let plan = Plan::draw(&chance);
        let (world, seats) = World::draw(seed, &plan, chance, trace);
        Run { world, seats, plan, seed, faults: 0, left: 0, retired: false }.go().await
    })
}
