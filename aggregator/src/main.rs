//! The program `tributary-aggregator`.

use std::process::ExitCode;

/// The system's allocator gives the memory of each request back and gets it again for the next one, page by page: a third of a busy
/// edge's CPU time.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// The body of a request comes from its thread's own cache, as small pieces do, where it is that of a usual batch: else the search for a
/// place is some percent of a busy edge's CPU time. Two of each size, since every thread keeps its own.
#[allow(unsafe_code, reason = "jemalloc finds its options under this name, and it is nobody else's")]
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static ALLOCATOR_OPTIONS: &[u8; 40] = b"tcache_max:262144,tcache_nslots_large:2\0";

fn main() -> ExitCode {
    tributary_aggregator::cli::main().into()
}
