# shellcheck shell=bash
# What some steps need of a machine beyond the pinned Rust. Sourced by `.ci/run`, which has `skip`.

# The lowest Rust that the dependencies allow.
lowest=$(sed -n 's/^rust-version = "\(.*\)"$/\1.0/p' Cargo.toml)
host=$(rustc -vV | sed -n 's/^host: //p')

# No `grep -q` here: it stops at the first match, and rustup fails when nobody reads the rest.
has_toolchain() {
    rustup toolchain list 2>/dev/null | grep "^$1-" >/dev/null
}

has_nightly() {
    cargo +nightly --version >/dev/null 2>&1
}

has_target() {
    rustup target list --installed 2>/dev/null | grep -x "$1" >/dev/null
}

has_nightly_component() {
    rustup +nightly component list --installed 2>/dev/null | grep "^$1" >/dev/null
}

# The last release before this commit, by its tag.
last_release() {
    git describe --tags --abbrev=0 --match 'v[0-9]*' 2>/dev/null
}

# lack WHAT: prints why it cannot be had here and what to do; nothing where it can.
lack() {
    case $1 in
    lowest-rust)
        has_toolchain "$lowest" || echo "install it by \`rustup toolchain install $lowest --profile minimal\`"
        ;;
    macos-target)
        has_target aarch64-apple-darwin || echo "install it by \`rustup target add aarch64-apple-darwin\`"
        ;;
    miri)
        if ! has_nightly || ! has_nightly_component miri || ! has_nightly_component rust-src; then
            echo "install it by \`rustup toolchain install nightly --component miri --component rust-src\`"
        fi
        ;;
    address-sanitizer)
        case $host in
        x86_64-unknown-linux-gnu | aarch64-unknown-linux-gnu)
            has_nightly || echo "install it by \`rustup toolchain install nightly\`"
            ;;
        *) echo "there is none for $host" ;;
        esac
        ;;
    python)
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null || echo "install Python 3.9 or newer"
        ;;
    cargo-deny | typos-cli)
        command -v "${1%-cli}" >/dev/null || echo "install it by \`cargo install --locked $1\`"
        ;;
    browser)
        # In CI it is installed; a machine of somebody's own is left as it is.
        if [ "${CI:-}" = true ] && ! scripts/install-browser.sh >&2; then
            echo "it could not be installed"
        elif [ ! -x "${VMEM_CHROMIUM:-/usr/bin/chromium}" ] ||
            [ ! -d "${CARGO_TARGET_DIR:-target}/browser/node_modules/playwright-core" ]; then
            echo "install it by \`scripts/install-browser.sh\`"
        fi
        ;;
    moto)
        scripts/with-moto.sh true >&2 ||
            echo "it could not be started: that takes Python 3.9 or newer with venv and, the first time, PyPI"
        ;;
    advisories)
        if [ -n "$(lack cargo-deny)" ]; then
            lack cargo-deny
        elif ! cargo deny fetch db >&2; then
            echo "the advisory database cannot be fetched from here"
        fi
        ;;
    release)
        if ! last_release >/dev/null; then
            echo "no release is tagged yet, so there is nothing to compare with"
        elif ! command -v cargo-semver-checks >/dev/null; then
            echo "install it by \`cargo install --locked cargo-semver-checks\`"
        fi
        ;;
    *)
        echo "nothing is known about $1" >&2
        return 1
        ;;
    esac
}

# needs WHAT COMMAND...: runs the command where this machine has WHAT, and skips the step where not.
needs() {
    local why
    why=$(lack "$1")
    shift
    if [ -n "$why" ]; then skip "$why"; else "$@"; fi
}
