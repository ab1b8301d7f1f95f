#!/usr/bin/env bash
# Builds Tributary and runs it on local files for a minute or two: a log writer, an agent, an edge and a root. Options (--kill,
# --dir DIR, --help) go to the demo.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh" --demo
cd "$here/.."
printf 'demo: building; the first time takes some minutes\n' >&2
cargo build --quiet --workspace --bins
exec cargo run --quiet --package tributary-tests --bin tributary-demo -- "$@"
