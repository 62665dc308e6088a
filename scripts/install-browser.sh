#!/usr/bin/env bash
# Installs what the test of the dashboard in a browser needs: Chromium and Node.js as packages of the system, where
# they are missing, and two packages of npm, by their lock file, into the target directory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

missing=()
[ -x "${VMEM_CHROMIUM:-/usr/bin/chromium}" ] || missing+=(chromium)
command -v node >/dev/null || missing+=(nodejs)
command -v npm >/dev/null || missing+=(npm)
if [ "${#missing[@]}" -gt 0 ]; then
    as_root=()
    [ "$(id -u)" -eq 0 ] || as_root=(sudo)
    "${as_root[@]}" apt-get update -qq
    DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y --no-install-recommends "${missing[@]}"
fi

modules=${CARGO_TARGET_DIR:-target}/browser
mkdir -p "$modules"
cp crates/vmem-dashboard/tests/browser/package{,-lock}.json "$modules/"
npm ci --prefix "$modules" --ignore-scripts --no-audit --no-fund
