#!/usr/bin/env bash
# Builds `gpu-check` for a machine with an NVIDIA driver and nothing else: one file, stripped, that needs the C library (2.34 or
# newer) and GCC's unwinder (`libgcc_s.so.1`), which distributions install with it. A static unwinder would need the C library that
# it was built with, often a newer one. Prints where it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo build --release --package vmem-gpu-check --bin gpu-check
built=${CARGO_TARGET_DIR:-target}/gpu-check
# The linker that Rust needs comes with `strip`.
strip -o "$built" "${CARGO_TARGET_DIR:-target}/release/gpu-check"

bytes=$(stat -c %s "$built")
if [ "$bytes" -ge $((60 << 20)) ]; then
    echo "it has $bytes bytes: more than 60 MiB" >&2
    exit 1
fi
if command -v objdump >/dev/null; then
    newest=$(objdump -T "$built" | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -1)
    if [ "$(printf '%s\nGLIBC_2.34\n' "$newest" | sort -V | tail -1)" != GLIBC_2.34 ]; then
        echo "it needs $newest, which is newer than GLIBC_2.34" >&2
        exit 1
    fi
    needed=$(objdump -p "$built" | awk '/NEEDED/ { print $2 }' | tr '\n' ' ')
    for library in $needed; do
        case $library in
        libc.so.* | libm.so.* | libdl.so.* | libpthread.so.* | ld-linux* | libgcc_s.so.1) ;;
        *)
            echo "it needs $library, which a bare machine may lack" >&2
            exit 1
            ;;
        esac
    done
    echo "$built: $bytes bytes, needs $newest and $needed"
else
    echo "$built: $bytes bytes; SKIPPED which libraries it needs: there is no objdump"
fi
