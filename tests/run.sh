#!/usr/bin/env bash
# Runs every check and every test. The same command serves people and CI.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo fmt --all --check
cargo clippy --workspace --all-targets -- -D warnings
cargo test --workspace
