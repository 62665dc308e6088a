#!/usr/bin/env bash
# Plants each bug of tests/planted in a copy of the sources, and expects the tests that its first line names to fail.
#
#   scripts/planted.sh            all of them
#   scripts/planted.sh NAME...    some, by the names of their files
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

copy=$(mktemp -d)
trap 'git worktree remove --force "$copy/vmem" 2>/dev/null; rm -rf "$copy"' EXIT
git worktree add -q --detach "$copy/vmem" HEAD

unseen=()
for patch in tests/planted/*.patch; do
    name=$(basename "$patch" .patch)
    if [ $# -gt 0 ] && [[ " $* " != *" $name "* ]]; then continue; fi
    tests=$(sed -n '1s/^# tests: //p' "$patch")
    git -C "$copy/vmem" apply "$PWD/$patch"
    # A bug that does not compile is no bug.
    # shellcheck disable=SC2086
    (cd "$copy/vmem" && CARGO_TARGET_DIR=$PWD/../target cargo test -q --no-run $tests)
    # shellcheck disable=SC2086
    if (cd "$copy/vmem" && CARGO_TARGET_DIR=$PWD/../target timeout 300 cargo test -q $tests) >"$copy/output" 2>&1; then
        echo "UNSEEN $name"
        unseen+=("$name")
    else
        echo "seen   $name: $(grep -c 'FAILED$' "$copy/output" || true) tests fail"
    fi
    git -C "$copy/vmem" checkout -q .
done
[ ${#unseen[@]} -eq 0 ]
