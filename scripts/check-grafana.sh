#!/usr/bin/env bash
# Checks docs/grafana/vmem.json against the schema that Grafana publishes for programs that make dashboards, under Apache-2.0: each field
# of ours, each kind of panel and each data source has to be known there.
#
#   scripts/check-grafana.sh
#
# It needs Python and the network: the schema comes from PyPI, into a folder below the build's. See scripts/check_grafana.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

place=${CARGO_TARGET_DIR:-target}/grafana
if ! [ -x "$place/bin/python" ]; then
    python3 -m venv "$place"
fi
"$place/bin/pip" install --quiet --disable-pip-version-check 'grafana-foundation-sdk==1769699998!10.1.0'
"$place/bin/python" scripts/check_grafana.py docs/grafana/vmem.json
