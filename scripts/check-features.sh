#!/usr/bin/env bash
# Checks each combination of features that makes sense, and that a build without a feature has none of
# its crates. Runs no test: the tests of the workspace have all features, `.ci/run nightly` runs those
# of the smallest build. A few minutes: the combinations share their dependencies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# check ARGUMENT...: warnings too, with these features.
check() {
    printf -- '--- %s\n' "$*"
    cargo clippy --quiet "$@" -- -D warnings
}

for features in "" gpu tokio-uring serde metrics dlpack tokio-console gpu,serde metrics,serde tokio-uring,serde; do
    check --package vmem --no-default-features --features "$features"
done
check --package vmem --all-features
for crate in vmem-io vmem-core vmem-gpu; do
    check --package "$crate" --no-default-features
    check --package "$crate" --all-features
done
check --package vmem --no-default-features --tests --examples
# What tests and `clippy --workspace` never build.
check --package vmem-bench --features watched --benches

# lacks CRATE FEATURES: no such crate stands below vmem with these features.
lacks() {
    if cargo tree --package vmem --edges normal --no-default-features --features "$2" --prefix none |
        grep -E "^($1) "; then
        echo "vmem stands on $1 with no feature but '$2'" >&2
        return 1
    fi
}
lacks 'cudarc|vmem-gpu|libloading|dlpack-rs|tokio-uring|serde|metrics' ""
lacks 'cudarc|vmem-gpu|libloading|dlpack-rs' tokio-uring,serde
lacks 'tokio-uring|metrics' gpu,dlpack,serde
