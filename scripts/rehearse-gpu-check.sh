#!/usr/bin/env bash
# Runs all of `gpu-check` on the emulated driver, by the one command that a card gets, and checks the record: a line for every part
# that `--list` has, in that order, each passed or skipped for want of a card; and all of it in less than the 25 minutes of a card's
# time that a run may take.
#
#   scripts/rehearse-gpu-check.sh [PROGRAM [RECORD]]
#
# PROGRAM is that of the workspace as it was built for tests, beside which the emulated driver lies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seconds_max=$((25 * 60))
target=${CARGO_TARGET_DIR:-target}
program=${1:-$target/debug/gpu-check}
record=${2:-$target/gpu-check-rehearsal.json}

rm -f "$record"
started=$SECONDS
"$program" --emulated --json "$record"
took=$((SECONDS - started))

listed=$("$program" --list | awk '{ print $1 }')
recorded=$(sed -n 's/.*"part":"\([^"]*\)".*/\1/p' "$record")
if [ -z "$listed" ] || [ "$listed" != "$recorded" ]; then
    echo "the record has other parts than the list:" >&2
    diff <(echo "$listed") <(echo "$recorded") >&2 || true
    exit 1
fi
# A line that was cut short ends in no brace.
if grep -vE '^\{.*\}$' "$record" >&2; then
    echo "these lines of the record are not whole" >&2
    exit 1
fi
if grep -v '"outcome":"passed"' "$record" | grep -v '"why":"it needs a card"' >&2; then
    echo "these parts neither passed nor need a card" >&2
    exit 1
fi
if [ "$took" -ge "$seconds_max" ]; then
    echo "it took $took s, of at most $seconds_max" >&2
    exit 1
fi
passed=$(grep -c '"outcome":"passed"' "$record")
echo "$passed of $(wc -l <"$record") parts passed in $took s; the others need a card: $record"
