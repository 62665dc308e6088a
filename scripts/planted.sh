#!/usr/bin/env bash
# Plants the bugs of tests/planted.toml one at a time, and expects each of the tests that it names to fail.
#
#   scripts/planted.sh            all of them
#   scripts/planted.sh NAME...    some, by name
#
# One build has them all, by `--cfg vmem_planted`, and VMEM_PLANTED chooses one when a test runs. First the tests run with
# none planted, and must pass. Only a failed test, or one that hangs, is a bug seen: a filter without a test is an error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

list=tests/planted.toml
target=${CARGO_TARGET_DIR:-$PWD/target}/planted
seconds_max=300
output=$(mktemp)
trap 'rm -f "$output"' EXIT

# A caller that sets it means the bug of that name.
[ -z "${VMEM_PLANTED:-}" ] || set -- "$@" "$VMEM_PLANTED"
unset VMEM_PLANTED
for name; do
    grep -qxF "[$name]" "$list" || { echo "$list has no bug $name" >&2; exit 2; }
done

# A line for each test of a bug: NAME -p PACKAGE --test BINARY FILTER..., or --lib in place of a binary.
all=$(awk '/^\[/ { gsub(/[][]/, ""); name = $0 } /^ +"/ { gsub(/^ +"|",?$/, ""); print name, $0 }' "$list")
chosen=()
while read -r name tests; do
    if [ $# -eq 0 ] || [[ " $* " == *" $name "* ]]; then chosen+=("$name $tests"); fi
done <<<"$all"

# All packages at once, whichever bugs are chosen: with others their dependencies would have other features.
read -ra selection < <(grep -oE -- '-p [^ ]+|--test [^ ]+|--lib' <<<"$all" | sort -u | paste -sd' ')
declare -A folders binaries
built=$(RUSTFLAGS="${RUSTFLAGS:-} --cfg vmem_planted" CARGO_TARGET_DIR=$target \
    cargo test --no-run --message-format=json-render-diagnostics "${selection[@]}")
while read -r folder kind binary executable; do
    package=${folder##*/}
    if [ "$folder" = "$(pwd -P)" ]; then package=vmem; fi
    key="$package --$kind"
    if [ "$kind" = test ]; then key="$key $binary"; fi
    folders[$key]=$folder
    binaries[$key]=$executable
done < <(sed -nE 's/.*"manifest_path":"([^"]*)\/Cargo\.toml","target":\{"kind":\["([a-z]*)"\],"crate_types":\[[^]]*\],'\
'"name":"([^"]*)".*"test":true\},"features":.*"executable":"([^"]*)".*/\1 \2 \3 \4/p' <<<"$built")

# run ARGUMENT...: the tests that these arguments of `cargo test` name, as it would run them. Returns their status.
run() {
    local key="$2 $3"
    shift 3
    if [[ $key == *--test ]]; then key="$key $1"; shift; fi
    if [ "${1:-}" = -- ]; then shift; fi
    [ -n "${binaries[$key]:-}" ] || { echo "cargo built no $key" >&2; exit 2; }
    (cd "${folders[$key]}" && timeout --kill-after=10 "$seconds_max" "${binaries[$key]}" "$@") \
        >"$output" 2>&1 </dev/null
}

# verdict STATUS: what the tests that ran last say.
verdict() {
    local count failed
    count=$(sed -nE 's/^running ([0-9]+) tests?$/\1/p' "$output" | head -1)
    failed=$(sed -nE 's/^test result: FAILED\. .* ([0-9]+) failed;.*/\1/p' "$output" | tail -1)
    case $1:${count:-0} in
        124:* | 137:*) echo "seen: hangs for $seconds_max s" ;;
        *:0) echo "NO TEST RAN" ;;
        0:*) echo "UNSEEN" ;;
        *) if [ "${failed:-0}" -gt 0 ]; then echo "seen: $failed of $count fail"; else echo "DIED with status $1"; fi ;;
    esac
}

# try ARGUMENT...: runs these tests, and leaves in $found what they say.
try() {
    local status=0
    run "$@" || status=$?
    found=$(verdict "$status")
}

# Nothing is planted. Once more where that fails: the machine may have been busy.
declare -A broken
while read -r tests; do
    for attempt in 1 2; do
        # shellcheck disable=SC2086
        try $tests
        if [ "$found" = UNSEEN ]; then break; fi
        grep -A 2 panicked "$output" || tail -20 "$output"
        echo "without a bug, at attempt $attempt: $found: $tests"
    done
    if [ "$found" = UNSEEN ]; then echo "passes without a bug: $tests"; else broken[$tests]=$found; fi
done < <(printf '%s\n' "${chosen[@]}" | cut -d' ' -f2- | sort -u)

table=()
unseen=0
for entry in "${chosen[@]}"; do
    read -r name tests <<<"$entry"
    export VMEM_PLANTED=$name
    began=$SECONDS
    # shellcheck disable=SC2086
    try $tests
    if [ -n "${broken[$tests]:-}" ]; then found="FAILS WITHOUT IT TOO"; fi
    if [[ $found != seen* ]]; then unseen=$((unseen + 1)); fi
    table+=("$(printf '%-20s  %-22s %4d s  %s' "$name" "$found" $((SECONDS - began)) "$tests")")
    echo "${table[-1]}"
done

printf '\n%s\n' "${#table[@]} runs of tests, $unseen of them unseen, in $SECONDS s:"
printf '%s\n' "${table[@]}"
[ "$unseen" -eq 0 ]
