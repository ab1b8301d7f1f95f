//! The whole tree in one process, in virtual time, on the orders of a seed: the code of the programs between files, disks, a
//! network and a file system that do their worst.
//!
//! | Part | What it is |
//! |---|---|
//! | `chance` | dice and trace |
//! | `network` | carries requests, badly; stops and ends processes |
//! | `disk` | what edges write their spools to |
//! | `server`, `agent` | log files that are written, rotated, emptied and restored, and the agent that ships them |
//! | `tree`, `run` | all of it together, and what befalls it |
//! | `judge` | says what is wrong |
//!
//! There is no clock, file, thread or socket in a run: a seed repeats it to the byte.
//!
//! More seeds: `TRIBUTARY_SEEDS=10000 cargo test --release -p tributary-tests --test simulation`, beginning at
//! `TRIBUTARY_FIRST_SEED`. One seed, with all that happened: `TRIBUTARY_SEED=17 … -- --nocapture`.

mod agent;
mod chance;
mod disk;
mod judge;
mod network;
mod run;
mod server;
mod tree;

use std::num::NonZero;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use self::run::{Told, run, watch_for_panics};

/// Seeds of every test run.
const SEEDS: u64 = 300;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Runs the seeds on all processors. The first that fails ends it.
fn run_all(first: u64, count: u64) -> Vec<Told> {
    let next = AtomicU64::new(first);
    let work = || {
        let mut told = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count {
                return told;
            }
            let ran = std::panic::catch_unwind(|| run(seed, false));
            told.push(ran.unwrap_or_else(|panic| {
                next.store(first + count, Ordering::Relaxed);
                eprintln!(
                    "it was seed {seed}, number {} of this run: TRIBUTARY_SEED={seed} shows it",
                    seed - first + 1
                );
                std::panic::resume_unwind(panic);
            }));
        }
    };
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.flat_map(|told| told.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

#[test]
fn whatever_befalls_the_tree_every_line_is_published_once() {
    watch_for_panics();
    if let Some(seed) = number("TRIBUTARY_SEED") {
        let _ = tracing_subscriber::fmt()
            .with_test_writer()
            .with_ansi(false)
            .without_time()
            .with_max_level(tracing::Level::DEBUG)
            .try_init();
        let told = run(seed, true);
        println!(
            "{:#?} {:?} {} faults, recovered in {:?}",
            told.verdicts, told.cruelties, told.faults, told.recovered_in
        );
        return;
    }
    let told = run_all(number("TRIBUTARY_FIRST_SEED").unwrap_or(0), number("TRIBUTARY_SEEDS").unwrap_or(SEEDS));
    let sum = |what: fn(&Told) -> u64| told.iter().map(what).sum::<u64>();
    let longest = told.iter().map(|one| one.recovered_in).max().unwrap_or(Duration::ZERO);
    println!(
        "{} seeds: {} lines, of which {} were lost with their files and {} were brought back with them; {} faults, {} torn \
         files, {} times that lost bytes stand behind later ones, {} streams that diverged, {} hours that were whole, {} without an agent that was gone for ever, {} with several files of a lane; agents left {} times; {} looks at what was answered committed; recovered within {} s",
        told.len(),
        sum(|one| one.verdicts.lines),
        sum(|one| one.verdicts.missing),
        sum(|one| one.verdicts.doubled),
        sum(|one| one.faults),
        sum(|one| one.cruelties.torn_tails),
        sum(|one| one.verdicts.out_of_order),
        sum(|one| one.verdicts.diverged),
        sum(|one| one.verdicts.hours - one.verdicts.partial),
        sum(|one| one.verdicts.partial),
        sum(|one| one.verdicts.rolled),
        sum(|one| one.left),
        sum(|one| one.verdicts.looks),
        longest.as_secs(),
    );
    assert!(sum(|one| one.verdicts.looks) > 0 && sum(|one| one.cruelties.torn_tails) > 0, "nothing happened");
    assert!(sum(|one| one.verdicts.partial) > 0 && sum(|one| one.left) > 0, "no agent went");
    assert!(sum(|one| one.verdicts.rolled) > 0, "no hour had several files of a lane");
}

#[test]
fn a_seed_repeats_its_run_to_the_byte() {
    watch_for_panics();
    for seed in 0..12 {
        let (first, second) = (run(seed, true), run(seed, true));
        let differs = first.trace.iter().zip(&second.trace).position(|(first, second)| first != second);
        if let Some(at) = differs {
            panic!("seed {seed} differs from its event {at} on:\n{}\n{}", first.trace[at], second.trace[at]);
        }
        assert_eq!(first, second, "seed {seed}");
    }
}
