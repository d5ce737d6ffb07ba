#!/usr/bin/env bash
# Boots a stock Debian kernel under Outrigger with a vfio-user device, shows the guest finding and using it, and powers
# off: directly where /dev/kvm can run Linux, else in the lab. `make demo` calls this; it calls itself in the lab.
set -euo pipefail
cd "$(dirname "$0")/../.."

programs=target/release
images=target/lab/images

# A stock kernel needs a CPU with hardware virtualisation behind /dev/kvm.
can_run_linux() { [ -r /dev/kvm ] && [ -w /dev/kvm ] && grep -qwE 'vmx|svm' /proc/cpuinfo; }

if ! can_run_linux; then
    if [ "${1:-}" = in-lab ]; then
        echo "demo: the lab has no working /dev/kvm" >&2
        exit 1
    fi
    echo "demo: /dev/kvm cannot run Linux here, so this runs in the lab, an emulated host; have a little patience"
    exec tests/lab/run.sh 600 tests/lab/demo.sh in-lab
fi

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT

echo "demo: starting a vfio-user device server"
mkfifo "$folder/server"
"$programs/outrigger" serve demo --socket "$folder/device.sock" >"$folder/server" 2>/dev/null &
read -r listening <"$folder/server" # it says so when it listens
echo "demo: $listening"

command=("$programs/outrigger" --kernel target/lab/kernels/6.12/vmlinuz --initramfs "$images/initramfs-6.12.cpio"
    --cmdline "console=ttyS0 quiet panic=-1" --cpus 2 --memory size=512M --user-device "socket=$folder/device.sock")
printf 'demo: '
printf '%q ' "${command[@]}"
echo
started=$(date +%s%N)
"${command[@]}" </dev/null 2>&1 | tee "$folder/output"
echo "demo: the guest ran for $((($(date +%s%N) - started) / 1000000)) ms"

if ! grep -q '^GUEST DONE' "$folder/output" || grep -q '^RESULT .* FAILED' "$folder/output"; then
    echo "demo: the guest did not find everything well" >&2
    exit 1
fi
echo "demo: the guest found the device, used its registers, memory, DMA and interrupts, and powered off"
