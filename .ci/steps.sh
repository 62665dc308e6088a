# shellcheck shell=bash
# The steps of `.ci/run`, in the order in which they run. Sourced by it; `step`, `needs` and the rest are there and in `.ci/needs.sh`.
# shellcheck disable=SC2154 # what those set

# The address sanitizer catches every use of freed or foreign memory, and every leak. Not instrumented: doctests, and the
# model-checked tests (`model_*`), whose checker leaks by itself when a model is meant to fail.
asan() {
    # The emulated driver is a library that is loaded: it takes the sanitizer's functions from the program.
    env RUSTFLAGS="-Zsanitizer=address -Clink-arg=-rdynamic" CARGO_TARGET_DIR="$built/asan" \
        cargo +nightly test --target "$host" "$@"
}

# under_miri FILTER: those tests of the core, under the interpreter that knows undefined behaviour.
under_miri() {
    ran_some env MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri test -p vmem-core --lib "$1"
}

# deny MANIFEST CHECK...: what `deny.toml` forbids, in everything that a package stands on.
deny() {
    local manifest=$1
    shift
    cargo deny --locked --config deny.toml --manifest-path "$manifest" --workspace check --hide-inclusion-graph "$@"
}

deny_advisories() {
    local manifest
    for manifest in Cargo.toml checks/*/Cargo.toml; do
        deny "$manifest" advisories
    done
}

# Whether the public items still keep what the last release promised by its version.
semver() {
    cargo semver-checks --workspace --baseline-rev "$(last_release)"
}

# fresh_seeds COUNT COMMAND...: runs tests with seeds that nobody has tried, and names each.
fresh_seeds() {
    local count=$1 first seed
    shift
    first=$(date +%s)
    for ((seed = first; seed < first + count; seed++)); do
        echo "VMEM_SEED=$seed"
        ran_some env VMEM_SEED="$seed" "$@"
    done
}

# tested SECONDS COMMAND...: runs what uses programs that are built with the tests.
tested() {
    cargo test --workspace --no-run --quiet
    bounded "$@"
}

# --- fast

# The tests are those of the whole workspace, in part: for one package alone, everything would be built once more, with fewer features.
step fast "formatting" cargo fmt --all --check
step fast "modules of the core point one way" scripts/core-modules.sh
step fast "clippy" cargo clippy --workspace --all-targets -- -D warnings
step fast-only "tidy" cargo test --workspace --test tidy
step fast "rustdoc" env RUSTDOCFLAGS=-Dwarnings cargo doc --no-deps --workspace --features vmem/dlpack
step fast-only "unit tests" cargo test --workspace --lib
# One test opens a hundred thousand names, for two fifths of the time of all.
step fast-only "integration tests" cargo test --workspace --test it --test causes -- --skip a_hundred_thousand_names

# --- full

step full "typos" needs typos-cli typos
step full "licences, bans and sources" needs cargo-deny deny Cargo.toml bans licenses sources
step full "licences, bans and sources of cudarc-union" \
    needs cargo-deny deny checks/cudarc-union/Cargo.toml bans licenses sources
step full "cudarc with the features of candle and cubecl" \
    cargo check --locked --manifest-path checks/cudarc-union/Cargo.toml --target-dir "$built/union"
# With other flags everything is built once more, so this is all that is done with them.
step full "with tokio_unstable: the example for tokio-console" env RUSTFLAGS="--cfg tokio_unstable" \
    CARGO_TARGET_DIR="$built/unstable" cargo run -p vmem-console -- --seconds 5
step full "features" scripts/check-features.sh
step full "packages" scripts/package.sh --no-verify --offline
# For the library alone; its tests may need more.
step full "the lowest Rust" needs lowest-rust env CARGO_TARGET_DIR="$built/lowest" \
    cargo "+$lowest" check --package vmem --all-features
step full "the dashboard in a browser" needs browser env VMEM_BROWSER=required cargo test --workspace --test browser
step full "tests and doctests" env VMEM_STRESS_SECONDS=60 cargo test --workspace
step full "the tier below disk over moto" needs moto ran_some bounded 600 \
    scripts/with-moto.sh cargo test --workspace --test it -- servers:: --include-ignored --test-threads=2
step full "example hello" tested 60 "$built/debug/examples/hello"
step full "example dashboard" tested 60 "$built/debug/examples/dashboard" 0 5
step full "example gpu_kernel" tested 120 "$built/debug/examples/gpu_kernel" --emulated
step full "example fleet, over moto" needs moto tested 120 scripts/with-moto.sh "$built/debug/vmem-fleet" --seconds 5
step full "example service" tested 300 env VMEM_BUILT="$built/debug" examples/service/load.sh --seconds 10 --stalled 50
step full "example service, killed under clients in Python" \
    needs python tested 300 examples/service/survive.py --service "$built/debug/vmem-service" --seconds 20
# As the README has it.
step full "build the example quickstart" cargo build --release --example quickstart
step full "example quickstart" bounded 300 cargo run --release --example quickstart -- --seconds 5
# A job that is dropped in flight leaks, which one test looks at.
step full-only "address sanitizer: everything dropped while the kernel has it" \
    needs address-sanitizer asan -p vmem-io --lib --test rings -- --skip on_purpose

# --- nightly

step nightly "the tests of the smallest build" ran_some cargo test --package vmem --no-default-features --test it
step nightly "gpu-check, for machines with a card and no Rust" scripts/build-gpu-check.sh
step nightly "gpu-check, all of it on the emulated driver" tested 1600 scripts/rehearse-gpu-check.sh "$built/debug/gpu-check"
step nightly "build the examples" cargo build --release --examples
step nightly "build the example service" cargo build --release --package vmem-service
# What a service promises of clients that do not read: the others are served nearly as before.
step nightly "example service: a minute of clients, and 400 that do not read" bounded 1800 env VMEM_BUILT="$built/release" \
    examples/service/load.sh --seconds 60 --stalled 400 --rounds 7 --max-ratio 2
step nightly "example service: a minute of kills" needs python bounded 600 \
    examples/service/survive.py --service "$built/release/vmem-service" --seconds 60
# The schema comes over the network.
step nightly "the dashboard for Grafana is of its schema" needs python bounded 300 scripts/check-grafana.sh
# Builds the tests of it with that flag, where `full` builds the program alone.
step nightly "what tokio-console is sent" ran_some env RUSTFLAGS="--cfg tokio_unstable" \
    CARGO_TARGET_DIR="$built/unstable" cargo test -p vmem-console --test wire
step nightly "macOS compiles" needs macos-target env CARGO_TARGET_DIR="$built/macos" RUSTFLAGS=-Dwarnings \
    cargo check --package vmem --all-features --target aarch64-apple-darwin
step nightly "licences, bans and sources of datafusion" \
    needs cargo-deny deny checks/datafusion/Cargo.toml bans licenses sources
step nightly "advisories" needs advisories deny_advisories
step nightly "versions keep their promise" needs release semver
# The files with unsafe code.
step nightly "miri: copy" needs miri under_miri copy::
step nightly "miri: host" needs miri under_miri host::arena
step nightly "address sanitizer: core" needs address-sanitizer asan -p vmem-core --lib
step nightly "address sanitizer: disk tier" needs address-sanitizer asan -p vmem-io --lib --tests -- --skip on_purpose
# Not the suite over each driver, which is everything four times more.
step nightly "address sanitizer: scenarios" needs address-sanitizer asan -p vmem --lib --tests -- \
    --skip the_suite_passes_on_every_driver
# What `tests and doctests` does for seconds, for minutes.
step nightly "long: every operation at random" ran_some env VMEM_STRESS_SECONDS=600 \
    cargo test --workspace --test stress -- every_operation_at_random
step nightly "long: kills, power cuts and damage" ran_some env VMEM_KILLS=500 VMEM_IMAGES=6000 VMEM_FLIPS=20000 \
    cargo test --workspace --test it -- names::kills names::power_cuts names::damage
step nightly "long: kernels over what a device alone has" ran_some env VMEM_DEVICE_RUNS=10000 \
    cargo test --workspace --test it -- vram::dirty::random
step nightly "long: resident memory" ran_some env VMEM_BUDGET_SECONDS=60 \
    cargo test --workspace --test it -- process::budget
step nightly "fresh seeds: the model" fresh_seeds 100 cargo test --workspace --test it -- model::
step nightly "fresh seeds: everything random" fresh_seeds 3 cargo test --workspace --lib --test it --test policy
step nightly "planted bugs are seen" scripts/planted.sh
