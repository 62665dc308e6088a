#!/usr/bin/env bash
# Packages what is published, in the order in which it would be, and builds each from its package alone.
# With --no-verify it does not build them. Publishes nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

crates=(vmem-core vmem-io vmem-gpu vmem vmem-object-store vmem-remote vmem-dashboard)
packages=("${crates[@]/#/--package=}")
# Packaged together they find each other, though no registry has them yet.
cargo package --allow-dirty "$@" "${packages[@]}"

# What is in a package: sources and documents, a licence, and neither tests nor tools.
for crate in "${crates[@]}"; do
    list=$(cargo package --quiet --allow-dirty --list --package "$crate")
    for needed in LICENSE-MIT LICENSE-APACHE README.md src/lib.rs; do
        grep -qx "$needed" <<<"$list" || { echo "$crate lacks $needed" >&2; exit 1; }
    done
    if grep -E '^(tests|benches|scripts|checks|crates|\.ci)/' <<<"$list"; then
        echo "$crate has files that its package does not need" >&2
        exit 1
    fi
done
