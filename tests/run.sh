#!/usr/bin/env bash
# Runs every check and every test: see `usage` below. The same command serves people and CI.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat <<'USAGE'
usage: tests/run.sh [--quick]

Installs what the tests need (tests/setup.sh), then runs every check and every test, with real parts. It ends with the number of
tests and, for each that failed, its name and message.

  --quick   only the tests of the parts and the simulations, in one process each: nothing is installed, no cluster is started. What
            to run after each change.
USAGE
}

quick=false
case "${1:-}" in
    '') ;;
    --quick) quick=true ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && exit 64 ;;
esac

# The message of a failure is what counts, and backtraces hide it.
export RUST_BACKTRACE=0
begun=$SECONDS
step() { printf '\n== %s (after %d s)\n' "$1" "$((SECONDS - begun))" >&2; }
output=$(mktemp)
trap 'rm -f "$output"' EXIT
status=0
unclean=''

# Says last what matters most: how many tests there were, which failed, and why.
summary() {
    awk -v status="$status" -v unclean="$unclean" -v seconds="$((SECONDS - begun))" '
        function flush_block() {
            if (name == "") return
            messages = messages "\n" name ":\n"
            for (i = 1; i <= lines; i++) {
                if (lines > 24 && i == 5) messages = messages "    ...\n"
                if (lines <= 24 || i < 5 || i > lines - 20) messages = messages "    " block[i] "\n"
            }
            name = ""
            lines = 0
        }
        /^test result:/ { passed += $4; failed += $6; ignored += $8 }
        /^---- .* (stdout )?----$/ { flush_block(); name = $2; next }
        /^failures:$/ || /^test result:/ { flush_block() }
        name != "" && $0 != "" { block[++lines] = $0 }
        END {
            flush_block()
            if (unclean != "") printf "\nFailed checks:%s see above\n", unclean
            if (messages != "") printf "\nFailed tests:\n%s", messages
            printf "\n%d tests passed, %d failed, %d ignored, in %d min %02d s: %s\n",
                passed, failed, ignored, seconds / 60, seconds % 60, status == 0 ? "all good" : "FAILED"
        }' "$output"
    exit "$status"
}

if $quick; then
    cargo test --workspace --exclude tributary-tests --no-fail-fast 2>&1 | tee "$output" || status=$?
    cargo test -p tributary-tests --test simulation 2>&1 | tee -a "$output" || status=$?
    summary
fi

step 'setup'
./tests/setup.sh

# All of them before the end, so that one run shows all that is wrong.
check() {
    step "$1"
    "${@:2}" || { status=1 && unclean+=" $1;"; }
}
check 'format' cargo fmt --all --check
check 'clippy' cargo clippy --workspace --all-targets -- -D warnings
RUSTDOCFLAGS='-D warnings' check 'documentation' cargo doc --workspace --no-deps --quiet

# The tests of whole trees run the programs that this builds.
step 'build'
cargo build --workspace --bins

step 'tests'
target=${CARGO_TARGET_DIR:-target}
rm -rf "$target/judge"
# Most of the time of the longest ones is spent waiting for the end of a minute, so more of them run than there are cores. The
# tests themselves bound how many of their JVMs do.
RUST_TEST_THREADS=${RUST_TEST_THREADS:-$(($(nproc) + 2))} cargo test --workspace --no-fail-fast 2>&1 | tee "$output" || status=$?

if compgen -G "$target/judge/*.txt" >/dev/null; then
    step "the judge's reports"
    cat "$target"/judge/*.txt
fi
summary
