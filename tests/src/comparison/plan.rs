//! What happens in a comparison, by a seed: how fast each server writes in each hour, and when which machine is killed.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::Options;

/// The exponent of the servers' rates: a few servers write much more than most, as on any site.
const PARETO_SHAPE: f64 = 1.5;
/// No server writes more than so many times what the quietest one does.
const MOST: f64 = 30.0;
/// How much busier the day is than the mean, and quieter the night.
const DAY: f64 = 0.6;
/// Kills happen in this part of the run, so that there is something before and after each.
const KILLS: std::ops::Range<f64> = 0.1..0.9;
/// One server in so many is killed.
const SERVERS_PER_KILL: usize = 10;

/// What happens.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Lines a second, by server and hour.
    pub rates: Vec<Vec<f64>>,
    /// Servers that are lost with all that is on them, by the time since the first hour's beginning.
    pub lost_servers: Vec<(Duration, usize)>,
    /// When one collector and one root are killed.
    pub node_killed: Duration,
    /// Which, modulo their number.
    pub node: usize,
}

impl Plan {
    /// The same options give the same plan.
    #[must_use]
    pub fn new(options: &Options) -> Self {
        let mut random = StdRng::seed_from_u64(options.seed);
        let servers: Vec<f64> = (0..options.servers)
            .map(|_| (1.0 - random.random_range(0.0..1.0_f64)).powf(-1.0 / PARETO_SHAPE).min(MOST))
            .collect();
        let mean = servers.iter().sum::<f64>() / servers.len() as f64;
        let rates = servers
            .iter()
            .map(|share| {
                let hours = 0..options.hours;
                let of_hour = |hour: u32| {
                    let time = std::f64::consts::TAU * f64::from(hour) / 24.0;
                    // Quietest at four in the morning.
                    let day = 1.0 - DAY * (time - std::f64::consts::TAU * 4.0 / 24.0).cos();
                    options.lines_per_second * share / mean * day * random.random_range(0.5..1.5)
                };
                hours.map(of_hour).collect()
            })
            .collect();
        let seconds = f64::from(options.hours) * super::HOUR.as_secs_f64();
        let moment = |random: &mut StdRng| {
            let part: f64 = random.random_range(KILLS);
            Duration::from_millis((part * seconds * 1000.0) as u64)
        };
        let mut victims = BTreeSet::new();
        while victims.len() < (options.servers / SERVERS_PER_KILL).max(1) {
            victims.insert(random.random_range(0..options.servers));
        }
        let mut lost_servers: Vec<_> = victims.into_iter().map(|server| (moment(&mut random), server)).collect();
        lost_servers.sort();
        let node_killed = moment(&mut random);
        Self { rates, lost_servers, node_killed, node: random.random_range(0..usize::from(u16::MAX)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_determines_rates_and_kills_and_a_tenth_of_the_servers_is_lost() {
        let options = Options { servers: 100, hours: 24, lines_per_second: 10.0, seed: 3 };
        let plan = Plan::new(&options);
        assert_eq!(plan, Plan::new(&options));
        assert_ne!(plan, Plan::new(&Options { seed: 4, ..options }));
        assert_eq!(plan.lost_servers.len(), 10);
        let day = super::super::HOUR * 24;
        assert!(plan.lost_servers.iter().all(|(at, server)| *at < day && *server < 100), "{:?}", plan.lost_servers);
        let rates: Vec<f64> = plan.rates.iter().flatten().copied().collect();
        let mean = rates.iter().sum::<f64>() / rates.len() as f64;
        assert!((8.0..12.0).contains(&mean), "{mean}");
        let of_server = |server: usize| plan.rates[server].iter().sum::<f64>();
        let (least, most) = (0..100).fold((f64::MAX, 0.0_f64), |(least, most), server| {
            (least.min(of_server(server)), most.max(of_server(server)))
        });
        assert!(most > 5.0 * least, "{least} to {most}");
    }
}
