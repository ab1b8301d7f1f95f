#!/bin/sh
# What takes too long for every change: many seeds of the whole tree and of the roots in simulation. Run it every night, with
# other seeds each time:
#
#     tests/nightly.sh [SEEDS [FIRST_SEED]]
#
# SEEDS: 10,000 unless said. FIRST_SEED: the number of the day times SEEDS unless said.
set -eu
cd "$(dirname "$0")/.."

TRIBUTARY_SEEDS=${1:-10000}
TRIBUTARY_FIRST_SEED=${2:-$(($(date +%s) / 86400 * TRIBUTARY_SEEDS))}
export TRIBUTARY_SEEDS TRIBUTARY_FIRST_SEED
echo "$TRIBUTARY_SEEDS seeds from $TRIBUTARY_FIRST_SEED on"

cargo test --release --locked -p tributary-tests --test simulation -- --nocapture
cargo test --release --locked -p tributary-aggregator --lib storm -- --nocapture
