#!/usr/bin/env bash
# Starts the service over a directory of its own, loads it, and stops it: `load.sh --seconds 60 --stalled 400`. With `--rounds 3
# --max-ratio 2` it fails if reads take more than twice as long beside the clients that do not read.
# `load.sh --wrk 60` has wrk load it instead, for so long: a client that is not of this project.
# Fails if a body was wrong, an answer was lost, or the service did not end as it should. VMEM_BUILT names a folder with
# programs that are built already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

built=${VMEM_BUILT:-}
if [ -z "$built" ]; then
    cargo build --release --package vmem-service
    built=${CARGO_TARGET_DIR:-target}/release
fi
data=$(mktemp -d)
service=
cleanup() {
    [ -z "$service" ] || kill -KILL "$service" 2>/dev/null || true
    rm -rf "$data"
}
trap cleanup EXIT

VMEM_SERVICE_LISTEN=127.0.0.1:0 VMEM_SERVICE_STORE__DISK_PATH=$data/store VMEM_SERVICE_STORE__GPU=off \
    VMEM_SERVICE_STORE__HOST_CAPACITY=${HOST_CAPACITY:-64MiB} VMEM_SERVICE_STORE__DISK_CAPACITY=4GiB \
    VMEM_SERVICE_LIMITS__MAX_REQUESTS_PER_CLIENT=0 RUST_LOG=${RUST_LOG:-warn} "$built/vmem-service" >"$data/address" &
service=$!
until grep -q '^listening on ' "$data/address"; do
    kill -0 "$service"
    sleep 0.1
done
url=$(sed -n 's/^listening on //p' "$data/address")

if [ "${1:-}" = --wrk ]; then
    for letter in {a..z}; do
        head -c 65536 /dev/zero | tr '\0' "$letter" >"$data/body"
        curl --silent --show-error --fail --output /dev/null -T "$data/body" -H "x-object-meta-letter: $letter" \
            "$url/objects/wrk/$letter-[0-15]"
    done
    wrk --threads 2 --connections 64 --duration "$2s" --timeout 10s --latency --script examples/service/wrk.lua "$url"
else
    "$built/vmem-load" "$url" "$@"
fi
kill -TERM "$service"
wait "$service"
service=
echo "the service ended, and all was durable"
