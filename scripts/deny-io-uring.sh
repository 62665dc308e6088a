#!/usr/bin/env bash
# Runs a command, by default the suite, on a machine whose kernel denies io_uring to all users, and
# gives the setting back however the command ends. The whole machine feels it meanwhile, so no other
# script runs this. Needs root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

setting=/proc/sys/kernel/io_uring_disabled
if [ ! -w "$setting" ]; then
    echo "SKIPPED: $setting is not there, or not for us to write" >&2
    exit 0
fi
before=$(cat "$setting")
trap 'echo "$before" > "$setting"; echo "kernel.io_uring_disabled is $(cat "$setting") again" >&2' EXIT
trap 'exit 130' INT TERM
echo 2 > "$setting"
echo "kernel.io_uring_disabled is $(cat "$setting")" >&2
if [ $# -eq 0 ]; then
    set -- cargo test -p vmem
fi
"$@"
