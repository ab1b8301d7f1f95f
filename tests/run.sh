#!/usr/bin/env bash
# Installs what the tests need, then runs every check and every test. The same command serves people and CI.
set -euo pipefail
cd "$(dirname "$0")/.."
./tests/setup.sh
cargo fmt --all --check
cargo clippy --workspace --all-targets -- -D warnings
cargo test --workspace
