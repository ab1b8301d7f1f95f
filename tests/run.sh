#!/usr/bin/env bash
# Installs what the tests need, then runs every check and every test. The same command serves people and CI.
set -euo pipefail
cd "$(dirname "$0")/.."

begun=$SECONDS
step() { printf '\n== %s (after %d s)\n' "$1" "$((SECONDS - begun))" >&2; }

step 'setup'
./tests/setup.sh

step 'format'
cargo fmt --all --check

step 'clippy'
cargo clippy --workspace --all-targets -- -D warnings

step 'documentation'
RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --quiet

# The tests of whole trees run the programs that this builds.
step 'build'
cargo build --workspace --bins

step 'tests'
target=${CARGO_TARGET_DIR:-target}
rm -rf "$target/judge"
output=$(mktemp)
trap 'rm -f "$output"' EXIT
# Most of the time of the longest ones is spent waiting for the end of a minute, so more of them run than there are cores. The
# tests themselves bound how many of their JVMs do.
status=0
RUST_TEST_THREADS=${RUST_TEST_THREADS:-$(($(nproc) + 2))} cargo test --workspace --no-fail-fast 2>&1 | tee "$output" || status=$?

if compgen -G "$target/judge/*.txt" >/dev/null; then
    step "the judge's reports"
    cat "$target"/judge/*.txt
fi
awk -v status="$status" -v seconds="$((SECONDS - begun))" '
    /^test result:/ { passed += $4; failed += $6; ignored += $8 }
    END {
        printf "\n%d tests passed, %d failed, %d ignored, in %d min %02d s: %s\n",
            passed, failed, ignored, seconds / 60, seconds % 60, status == 0 ? "all good" : "FAILED"
    }' "$output"
exit "$status"
