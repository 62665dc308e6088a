#!/usr/bin/env bash
# Takes the pictures of the dashboard in docs/images: of a real store under the load of the example, in a real browser.
# `scripts/install-browser.sh` installs that.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-docs/images}
port=${VMEM_PORT:-3581}
built=${CARGO_TARGET_DIR:-target}
cargo build --release -p vmem-dashboard --example dashboard
"$built/release/examples/dashboard" "$port" 600 &
example=$!
trap 'kill "$example"' EXIT
for _ in {1..100}; do
    if curl --silent --fail --output /dev/null "http://127.0.0.1:$port/snapshot"; then break; fi
    sleep 0.2
done
mkdir -p "$folder"
NODE_PATH="$(realpath "$built")/browser/node_modules" \
    node crates/vmem-dashboard/tests/browser/pictures.js "http://127.0.0.1:$port/" "$folder"
ls -l "$folder"
