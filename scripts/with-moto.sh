#!/usr/bin/env bash
# Runs a command beside moto, a server that speaks the protocol of S3, on a port of its own on loopback.
#
#   scripts/with-moto.sh COMMAND...
#
# The command gets VMEM_S3_ENDPOINT and VMEM_S3_BUCKET, and what AWS's programs are given: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and
# AWS_REGION. The server checks credentials, keeps everything in memory, and ends with the command. Python and, the first time, the network
# are needed: moto comes from PyPI, into a folder below the build's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=5.2.5
place=${CARGO_TARGET_DIR:-target}/moto
if ! "$place/bin/python" -c 'import moto, sys; sys.exit(moto.__version__ != sys.argv[1])' "$version" 2>/dev/null; then
    python3 -m venv "$place"
    "$place/bin/pip" install --quiet --disable-pip-version-check "moto[s3,iam,server]==$version"
fi

work=$(mktemp -d)
server=
finish() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT

port=$("$place/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export VMEM_S3_ENDPOINT=http://127.0.0.1:$port
export VMEM_S3_BUCKET=vmem-tests
export AWS_REGION=us-east-1
# What else of the caller's own might lead elsewhere.
unset AWS_PROFILE AWS_SESSION_TOKEN AWS_ENDPOINT AWS_ENDPOINT_URL AWS_ENDPOINT_URL_S3
export NO_PROXY=127.0.0.1 no_proxy=127.0.0.1
# What makes the account below is let in without one.
INITIAL_NO_AUTH_ACTION_COUNT=4 "$place/bin/moto_server" -H 127.0.0.1 -p "$port" >"$work/log" 2>&1 &
server=$!
for _ in $(seq 300); do
    ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    if ! kill -0 "$server" 2>/dev/null; then
        cat "$work/log" >&2
        exit 1
    fi
    sleep 0.1
done
"$place/bin/python" scripts/moto_account.py >"$work/account"
# shellcheck source=/dev/null
. "$work/account"

status=0
"$@" || status=$?
exit "$status"
