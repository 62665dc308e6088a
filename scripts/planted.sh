#!/usr/bin/env bash
# Plants each bug of tests/planted in a copy of the sources, and expects each of the tests that its first lines name to fail.
#
#   scripts/planted.sh            all of them
#   scripts/planted.sh NAME...    some, by the names of their files
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

copy=$(mktemp -d)
target=${CARGO_TARGET_DIR:-$PWD/target}/planted
trap 'git worktree remove --force "$copy/vmem" 2>/dev/null; rm -rf "$copy"' EXIT
git worktree add -q --detach "$copy/vmem" HEAD

unseen=()
for patch in tests/planted/*.patch; do
    name=$(basename "$patch" .patch)
    if [ $# -gt 0 ] && [[ " $* " != *" $name "* ]]; then continue; fi
    git -C "$copy/vmem" apply "$PWD/$patch"
    while read -r tests; do
        # A bug that does not compile is no bug.
        # shellcheck disable=SC2086
        (cd "$copy/vmem" && CARGO_TARGET_DIR=$target cargo test -q --no-run $tests </dev/null)
        # shellcheck disable=SC2086
        if (cd "$copy/vmem" && CARGO_TARGET_DIR=$target timeout 300 cargo test -q $tests </dev/null) >"$copy/output" 2>&1; then
            echo "UNSEEN $name by $tests"
            unseen+=("$name")
        else
            echo "seen   $name by $tests: $(grep -c 'FAILED$' "$copy/output" || true) tests fail"
        fi
    done < <(sed -n 's/^# tests: //p' "$patch")
    git -C "$copy/vmem" checkout -q .
done
[ ${#unseen[@]} -eq 0 ]
