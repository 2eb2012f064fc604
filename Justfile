# Every recipe works on a fresh clone; `./dev RECIPE` installs what it needs first.

export BULKHEAD_CACHE := env("BULKHEAD_CACHE", env("XDG_CACHE_HOME", env("HOME") / ".cache") / "bulkhead")
target := env("CARGO_TARGET_DIR", justfile_directory() / "target")

# List all recipes
default:
    @just --list --unsorted

# Build daemon and vmmctl
build:
    cargo build -p bulkhead-sandboxer

# Build the guest kernel (cached by content; prints where it is)
kernel:
    kernel-config/build

# Build the agent for the guest (cached by content; prints where it is)
agent:
    #!/usr/bin/env bash
    set -euo pipefail
    # The agent is built anew only when something it is made of has changed.
    key=$(git ls-files -s -o -c --exclude-standard agent tests/supply-chain/remap Cargo.lock Cargo.toml rust-toolchain.toml \
        | awk '{print $NF}' | sort -u | xargs sha256sum | sha256sum | cut -c1-24)
    kept="$BULKHEAD_CACHE/agent/$key/bulkhead-agent"
    if [ ! -x "$kept" ]; then
        agent=$(agent/build | tail -n1)
        mkdir -p "${kept%/*}"
        install -m 755 "$agent" "$kept.new" && mv "$kept.new" "$kept"
    fi
    echo "$kept"

# Build the guest image with the agent in it (cached by content; prints where it is)
rootfs:
    #!/usr/bin/env bash
    set -euo pipefail
    agent=$(just agent | tail -n1)
    rootfs/build "$agent"

# Build kernel and image and make them the ones vmmctl finds by default
guest:
    #!/usr/bin/env bash
    set -euo pipefail
    kernel=$(kernel-config/build | tail -n1)
    agent=$(just agent | tail -n1)
    image=$(rootfs/build "$agent" | tail -n1)
    mkdir -p "$BULKHEAD_CACHE/current"
    ln -sfn "$kernel/vmlinux" "$BULKHEAD_CACHE/current/vmlinux"
    ln -sfn "$kernel/bzImage" "$BULKHEAD_CACHE/current/bzImage"
    ln -sfn "$agent" "$BULKHEAD_CACHE/current/agent"
    ln -sfn "$image" "$BULKHEAD_CACHE/current/rootfs.erofs"
    echo "guest: $kernel/vmlinux, $image"

# Make an initramfs that lets a distribution's kernel run our guest image
initramfs MODULES OUTPUT: guest
    rootfs/initramfs "{{MODULES}}" "$BULKHEAD_CACHE/current/agent" "{{OUTPUT}}"

# Build the app kernel (cached by content)
appkernel:
    #!/usr/bin/env bash
    set -euo pipefail
    kernel=$(appkernel/build | tail -n1)
    mkdir -p "$BULKHEAD_CACHE/current"
    ln -sfn "$kernel" "$BULKHEAD_CACHE/current/appkernel"
    echo "app kernel: $kernel"

# Build the guest kernel that keeps no rule, for tests (cached by content)
hostile:
    #!/usr/bin/env bash
    set -euo pipefail
    kernel=$(appkernel/build --hostile | tail -n1)
    mkdir -p "$BULKHEAD_CACHE/current"
    ln -sfn "$kernel" "$BULKHEAD_CACHE/current/hostile"

# Write the app kernel's table of system calls to docs/appkernel-compat.md
appkernel-compat:
    BULKHEAD_UPDATE_DOCS=1 cargo test -p bulkhead-appkernel-core

# Build the Debian package: target/deb/bulkhead_*.deb (PROFILE dev builds faster, for tests of it)
deb PROFILE="release": _disk guest appkernel
    tests/deb/build "{{PROFILE}}"

# Build the OCI images that demo and tests run (cached by content)
fixtures:
    cargo run --quiet -p bulkhead-fixtures -- build

# Licences, sources and versions of what we are built from (cargo-deny), and what is unsafe in our crates
supply-chain:
    tests/supply-chain/check

# Build kernel, app kernel, guest image and daemon twice, in two places, and compare (or only PARTS)
reproducible *PARTS: _disk
    tests/supply-chain/reproducible {{PARTS}}

# Format, clippy and shell checks
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings
    shellcheck dev .ci/run kernel-config/build rootfs/build rootfs/initramfs agent/build appkernel/build tests/deb/build tests/deb/check tests/critest/critest tests/supply-chain/check tests/supply-chain/remap tests/supply-chain/reproducible tests/dependencies tests/ltp/build tests/ltp/driver.sh tests/guest/build tests/programs/src/git.sh tests/programs/src/compile.sh

# Before any compiler runs: is the disk large enough?
_disk:
    @tests/run disk

# Run pods of every sandbox kind that exists, on real input, and print a table
demo: _disk build guest appkernel fixtures
    tests/run demo

# All checks and tests; last line "N passed, N failed"
test: _disk
    tests/run test

# The hostile guest (FACTOR times as long as in `test`; SEED chooses its moves), the hostile container, and the matrix of faults
test-walls FACTOR="20" SEED="1": _disk build guest appkernel hostile fixtures
    tests/run walls {{FACTOR}} {{SEED}}

# What threads of a VM and of wasm pods use of their tables of system calls, or those of PROGRAM ARG…, in the lab
seccomp-trace *ARGS: _disk build guest fixtures
    tests/run seccomp-trace {{ARGS}}

# Programs of the Linux Test Project on the app kernel: those of pass.list, or ARGS (see tests/ltp/run)
ltp *ARGS: _disk build appkernel
    tests/run ltp {{ARGS}}

# Debian's git, gcc, node, Go and Python on the app kernel; --all, NAME…, or --cpython for CPython's own tests
programs *ARGS: _disk build appkernel
    tests/run programs {{ARGS}}

# Everything `test` does, and the long parts: soak, fuzz, big suites
test-full: _disk
    tests/run test-full

# A shell, or a command, on a disposable host with real KVM
lab *ARGS:
    tests/lab/lab {{ARGS}}

# Benchmarks: boot, fs, appkernel, pods and wasm (the last three also by parts). Prints a table and writes target/bench/NAME.json
bench NAME *PARTS: _disk build guest appkernel fixtures
    tests/run bench {{NAME}} {{PARTS}}

# Make and remove COUNT sandboxes (KIND: pods, wasm) and count what is left
soak KIND COUNT: _disk build guest fixtures
    tests/run soak {{KIND}} {{COUNT}}

# The CRI validation suite of Kubernetes SIG-Node on pods of ours (or only what matches FOCUS)
critest FOCUS="": _disk build guest fixtures
    tests/run critest "{{FOCUS}}"

# A Kubernetes node with pods of ours: kubelet, API server, etcd and kubectl of BULKHEAD_KUBERNETES, or of the PATH
kubelet: _disk build guest appkernel fixtures
    tests/run kubelet

# Fuzz one target for some seconds; without arguments, list the targets (appkernel plays in the lab)
fuzz NAME="" SECONDS="60":
    tests/run fuzz "{{NAME}}" "{{SECONDS}}"

# Every fuzz target, and random system calls in the app kernel's VM: SECONDS in all, shared by targets
fuzz-all SECONDS: _disk build guest appkernel
    tests/run fuzz-all "{{SECONDS}}"

# Remove build results; caches under BULKHEAD_CACHE stay
clean:
    cargo clean
