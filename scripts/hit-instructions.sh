#!/usr/bin/env bash
# Instructions of a read that host memory serves (4 KiB, one thread), counted by callgrind: repeatable on a busy machine.
#
#   scripts/hit-instructions.sh [FEATURES]     of vmem-bench, such as `watched`, with which the store can publish metrics
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! command -v valgrind >/dev/null; then
    echo "valgrind is not installed: nothing was counted" >&2
    exit 1
fi
cargo build --release -p vmem-bench --example hit ${1:+--features "$1"}
hit=${CARGO_TARGET_DIR:-target}/release/examples/hit
count() {
    valgrind --tool=callgrind --callgrind-out-file=/dev/null "$hit" "$1" 2>&1 |
        sed -n 's/.*Collected : //p'
}
# The difference of two runs leaves out what opening and closing cost.
few=$(count 1000)
many=$(count 201000)
echo "instructions of a hit: $(((many - few) / 200000))"
