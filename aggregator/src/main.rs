//! The program `tributary-aggregator`.

use std::process::ExitCode;

/// The system's allocator gives the memory of each request back and gets it again for the next one, page by page: a third of a busy
/// edge's CPU time.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    tributary_aggregator::cli::main().into()
}
