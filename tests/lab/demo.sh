#!/usr/bin/env bash
# Boots a stock Debian kernel under Outrigger from a disk, with a vfio-user device, shows the guest finding and using both,
# powers off, and looks at the disk: directly where /dev/kvm can run Linux, else in the lab. `make demo` calls this; it
# calls itself in the lab.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/sbin # e2fsck and debugfs, for ordinary users
source tests/lab/disk.sh

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

cp --sparse=always "$images/demo.img" "$folder/disk.img"
command=("$programs/outrigger" --kernel target/lab/kernels/6.12/vmlinuz --initramfs "$images/initramfs-disk.cpio"
    --cmdline "console=ttyS0 quiet panic=-1 root=/dev/vda1" --cpus 2 --memory size=512M
    --disk "path=$folder/disk.img" --user-device "socket=$folder/device.sock")
printf 'demo: '
printf '%q ' "${command[@]}"
echo
started=$(date +%s%N)
"${command[@]}" </dev/null 2>&1 | tee "$folder/output"
echo "demo: the guest ran for $((($(date +%s%N) - started) / 1000000)) ms"

fail() {
    echo "demo: $*" >&2
    exit 1
}

# The lines of report $1 that say how the checks ended. On its way through the serial port it got carriage returns.
results() { tr -d '\r' <"$1" | grep '^RESULT '; }

file_system="$folder/disk.img?offset=$disk_offset"
grep -q '^GUEST DONE' "$folder/output" || fail "the guest did not come to its end"
results "$folder/output" >"$folder/said" || fail "the guest has checked nothing"
! grep ' FAILED' "$folder/said" || fail "the guest did not find everything well"
grep -q '^ROOT /dev/vda1 ext4' "$folder/output" || fail "the guest did not boot from the disk"
e2fsck -fn "$file_system" >"$folder/check" 2>&1 || fail "the disk is not in order: $(cat "$folder/check")"
debugfs -R 'cat /report' "$file_system" >"$folder/report" 2>/dev/null
results "$folder/report" >"$folder/kept" || fail "the disk holds nothing of what the guest wrote"
cmp "$folder/said" "$folder/kept" || fail "the disk does not hold what the guest wrote"
echo "demo: the guest booted from the disk, found the device, and used its registers, memory, DMA and interrupts"
echo "demo: on the disk are the $(wc -l <"$folder/kept") results that the guest wrote"
