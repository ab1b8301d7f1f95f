//! The program `tributary-aggregator`.

use std::process::ExitCode;

fn main() -> ExitCode {
    tributary_aggregator::cli::main().into()
}
