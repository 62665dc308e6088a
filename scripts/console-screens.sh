#!/usr/bin/env bash
# Takes the screens of tokio-console in docs/guide/src/console.md: of a real store under the load of the example, in a real terminal.
#
#   scripts/console-screens.sh [FOLDER]
#
# With a folder it writes the screens there, as text, and leaves the page as it is. It needs tmux and tokio-console.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-}
page=docs/guide/src/console.md
port=${VMEM_PORT:-6669}
missing=()
command -v tmux >/dev/null || missing+=("tmux, by the package of that name")
command -v tokio-console >/dev/null || missing+=("tokio-console, by \`cargo install tokio-console --locked --version 0.1.14\`")
if [ ${#missing[@]} -gt 0 ]; then
    printf '*** SKIPPED the screens of tokio-console: install %s\n' "${missing[@]}" >&2
    exit 0
fi
screens=$(mktemp -d)
server=vmem-screens-$$

# A server of its own: what others have in tmux is left alone.
in_tmux() {
    tmux -L "$server" -f /dev/null "$@"
}

end() {
    in_tmux kill-server 2>/dev/null || true
    rm -r "$screens"
}
trap end EXIT

keys() {
    local key
    for key in "$@"; do
        in_tmux send-keys -t console "$key"
        sleep 0.2
    done
}

# capture NAME PATTERN...: the screen, as soon as it has all patterns on it.
capture() {
    local name=$1 pattern missing text _
    shift
    for _ in {1..300}; do
        # As wide as a page may be, and without the empty lines at its end.
        text=$(in_tmux capture-pane -p -t console | cut -c 1-140 | sed 's/ *$//')
        printf '%s\n' "$text" >"$screens/$name.txt"
        missing=
        for pattern in "$@"; do
            grep -qE -- "$pattern" "$screens/$name.txt" || missing=$pattern
        done
        if [ -z "$missing" ]; then return; fi
        sleep 0.2
    done
    printf 'the screen %s never had "%s" on it:\n' "$name" "$missing" >&2
    cat "$screens/$name.txt" >&2
    return 1
}

# The command of the page, built first, since that takes longer than a screen is waited for.
export RUSTFLAGS="--cfg tokio_unstable"
cargo build -p vmem-console --target-dir target/unstable
in_tmux new-session -d -s load -x 140 -y 20 \
    "cargo run -p vmem-console --target-dir target/unstable -- --listen 127.0.0.1:$port"
in_tmux new-session -d -s console -x 200 -y 36 \
    "tokio-console --ascii-only true --no-colors http://127.0.0.1:$port"

# Each task by its name, with the migrations of the last seconds: from where to where, why, and which object.
capture tasks "prefetch storm" "reader that looks stuck" "disk to host: prefetch model/" "DONE +disk to host: read model/"
# By type, so that the reads come first: what fills each tier, what waits for it, and the stages of the reads.
keys r Right Right Right Right Right g g
capture resources "now=.*space" "fill=100% of .*waiters=[1-9]" "disk .*fill=[1-9]"
# The reads themselves, as soon as one waits for space for some seconds.
keys Enter
capture reads "reader that looks stuck.* [3-9]s .*waits_for=space" "was mostly"

if [ -n "$folder" ]; then
    mkdir -p "$folder"
    cp "$screens"/*.txt "$folder"
    exit 0
fi
for screen in tasks resources reads; do
    # Between the line that names the screen and the end of the block behind it.
    awk -v name="$screen" -v file="$screens/$screen.txt" '
        inside && /^```$/ { inside = 0; next }
        inside { next }
        { print }
        $0 == "<!-- screen: " name " -->" {
            print "```text"
            while ((getline line < file) > 0) print line
            print "```"
            inside = 1
        }' "$page" >"$screens/page.md"
    cp "$screens/page.md" "$page"
done
