#!/usr/bin/env bash
# Prints which top-level modules of vmem-core name which others, a line each, and every loop among them.
# The exit status is 1 while there is a loop.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../crates/vmem-core/src"

edges=$(
    find . -name '*.rs' ! -path '*/tests.rs' ! -path '*/tests/*' ! -name lib.rs | while read -r file; do
        from=$(sed 's|^\./||; s|/.*||; s|\.rs$||' <<<"$file")
        # What tests name does not count.
        sed '/^#\[cfg(test)\]/,$d' "$file" | grep -oE 'crate::[a-z_]+(::|;)' | sed -E 's/crate::([a-z_]+).*/\1/' |
            sort -u | while read -r to; do
            [ "$from" = "$to" ] || echo "$from $to"
        done
    done | sort -u
)
awk '{ names[$1] = names[$1] " " $2 } END { for (from in names) print from ":" names[from] }' <<<"$edges" | sort
loops=$(tsort <<<"$edges" 2>&1 >/dev/null | grep -c 'input contains a loop' || true)
echo "$loops loops"
if [ "$loops" -gt 0 ]; then
    tsort <<<"$edges" 2>&1 >/dev/null | sed 's/^tsort: //' | paste -sd' ' | sed 's/-: input contains a loop:/\nloop:/g'
    exit 1
fi
