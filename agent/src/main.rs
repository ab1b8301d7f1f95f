//! The agent's program: see `tributary-agent --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    tributary_agent::cli::main(std::env::args_os()).into()
}
