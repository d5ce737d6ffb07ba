#!/usr/bin/env bash
# Runs a command in the lab: a Debian kernel with a real /dev/kvm, inside QEMU's CPU emulation.
#
#   tests/lab/run.sh SECONDS COMMAND [ARGUMENT...]
#
# The command sees a copy-on-write view of this machine's file system, starts in the current folder, and has no input;
# its output and its exit status become this script's. What it writes is lost, except in target/lab/logs, where the
# lab kernel's console is kept too. 124 says that SECONDS have passed, 125 that the lab itself failed.
# LAB_QEMU is another program to run it with, one that knows the network card in igb.cfg.
# LAB_HOST names the lab's kernel, of those in target/lab/kernels: `host`, which is Debian's, or `iommufd`.
# LAB_PARAMETERS is added to the lab kernel's command line.
set -euo pipefail

deadline=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
lab=$(cd "$here/../.." && pwd)/target/lab
logs=$lab/logs
memory=${LAB_MEMORY:-6G}
host=${LAB_HOST:-host}
program=${LAB_QEMU:-qemu-system-x86_64}
more=()
[ -z "${LAB_QEMU:-}" ] || more=(-readconfig "$here/igb.cfg")

mkdir -p "$logs"
exec {lock}>"$lab/lock"
flock -n "$lock" || {
    echo "lab: waiting for another run to end" >&2
    flock "$lock"
}
rm -f "$logs"/* "$lab/nvme.img"
truncate -s 64M "$lab/nvme.img"
{
    printf 'touch %q\n' "$logs/started"
    printf 'modprobe -a kvm_amd\n'
    printf 'cd %q\n' "$PWD"
    printf '%q ' exec "$@"
} >"$logs/command"

exec {output}> >(cat) # QEMU opens /dev/stdout, which works when that is a pipe
cat=$!

finish() {
    [ -z "${qemu:-}" ] || kill "$qemu" 2>/dev/null || true
    exec {output}>&-
    wait "$cat"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# One CPU and one emulation thread: with more, a kernel that patches its own code races with the emulation and about
# one boot in twenty dies. XSAVE and AVX are hidden because the emulated CPU's sizes for them are inconsistent. On a
# busy machine the emulated timer is too slow for the kernel's test of it.
# The second port of the virtio-serial device is QEMU's own monitor, over a socket from QEMU to itself.
boot() {
    rm -f "$logs/started"
    local monitor=lab-monitor-$$,abstract=on
    timeout --kill-after=10 "$deadline" "$program" \
        -nodefaults -no-user-config -display none -no-reboot \
        -machine q35,kernel-irqchip=split -accel tcg,thread=single -smp 1 -m "$memory" \
        -cpu EPYC,+svm,+npt,check=off,-xsave,-avx,-avx2,-fma,-f16c \
        -kernel "$lab/kernels/$host/vmlinuz" -initrd "$lab/images/host.cpio" \
        -append "console=ttyS0 panic=-1 no_timer_check mitigations=off intel_iommu=on lab_host=$host lab_logs=$logs ${LAB_PARAMETERS:-}" \
        -device intel-iommu,intremap=on,caching-mode=on \
        -drive "file=$lab/nvme.img,if=none,id=nvme,format=raw" -readconfig "$here/devices.cfg" "${more[@]}" \
        -virtfs local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap \
        -virtfs local,path="$logs",mount_tag=logs,security_model=none \
        -device virtio-serial \
        -chardev file,id=output,path=/dev/stdout,append=on -device virtserialport,chardev=output \
        -chardev "socket,id=monitor,server=on,wait=off,path=$monitor" -mon chardev=monitor,mode=control \
        -chardev "socket,id=port,path=$monitor" -device virtserialport,chardev=port \
        -serial "file:$logs/console.log" -device isa-debug-exit,iobase=0xf4,iosize=1 \
        </dev/null >&"$output" &
    qemu=$!
    wait "$qemu" || return $?
}

for attempt in 1 2 3; do
    status=0
    boot || status=$?
    qemu=
    case $status in
        124 | 137)
            echo "lab: not done within $deadline seconds" >&2
            exit 124
            ;;
        1 | *[02468]) ;; # QEMU ended without the command's status
        *) exit $(((status - 3) / 2)) ;;
    esac
    [ ! -e "$logs/started" ] || break
    echo "lab: boot $attempt died before the command's first line; see $logs/console.log" >&2
done
echo "lab: the lab failed; its last lines were:" >&2
tail -n 20 "$logs/console.log" >&2
exit 125
