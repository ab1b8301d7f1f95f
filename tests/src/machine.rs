//! The machine on which something was measured.

use std::fs;

/// The machine, in a few words.
#[must_use]
pub fn machine() -> String {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name);
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let kernel = rustix::system::uname();
    let (model, kernel) = (model.unwrap_or("an unknown processor"), kernel.release().to_string_lossy());
    format!("{cores} cores of {model}, Linux {kernel}")
}
