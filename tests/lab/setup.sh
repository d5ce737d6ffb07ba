#!/usr/bin/env bash
# Prepares what the lab needs, under target/lab: Debian packages, kernels, initramfs images.
# Safe to repeat, and quick when there is nothing to do. Runs as root; as anyone else it uses sudo for apt-get.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # depmod and modprobe, for ordinary users

here=$(cd "$(dirname "$0")" && pwd)
checkout=$(cd "$here/../.." && pwd)
lab=$checkout/target/lab
source "$here/debian.sh"
source "$here/disk.sh"

packages=(
    qemu-system-x86 # the lab itself
    busybox-static  # user space of the initramfs images
    cpio            # packs them
    kmod            # depmod, modprobe
    xz-utils zstd   # kernel modules and kernels come compressed
    iproute2        # makes taps
    fdisk e2fsprogs # partitions and file systems
    make gcc        # build a kernel module, with programs of Debian's that need
    libelf1 libssl3 # these libraries
)

# Unpacks the newest kernel of metapackage $2 into kernels/$1, without installing it.
unpack_kernel() {
    local root=$lab/kernels/$1 meta=$2 new=$lab/kernels/$1.new
    [ ! -e "$root" ] || return 0
    [ -n "$(newest "$meta")" ] || update_lists
    [ -n "$(newest "$meta")" ] || die "no package $meta; the lab wants Debian 12 with its security updates"
    rm -rf "$new"
    mkdir -p "$new"
    # Newer lists may name another.
    download "$new" "$(newest "$meta")" || download "$new" "$(newest "$meta")"
    dpkg -x "$new"/*.deb "$new"
    rm "$new"/*.deb
    depmod -b "$new" "$(version "$new")"
    (cd "$new" && ln -s boot/vmlinuz-* vmlinuz)
    mv "$new" "$root"
}

# Takes the ELF kernel out of bzImage $1, whose payload is zstd. The header fields are those of the Linux x86 boot
# protocol; the payload's last four bytes are its uncompressed length, added by the kernel's build.
extract_vmlinux() {
    local start length
    start=$((($(field "$1" 0x1f1 1) + 1) * 512 + $(field "$1" 0x248 4)))
    length=$(($(field "$1" 0x24c 4) - 4))
    head -c $((start + length)) "$1" | tail -c "$length" | zstd -qdc
}

# The little-endian number of $3 bytes at offset $2 of file $1.
field() { od -An -v -tu"$3" -j $(($2)) -N "$3" "$1" | tr -d ' '; }

# Starts an initramfs tree: busybox, the init script $2, and the modules $4... of the kernel tree $3 with what they
# depend on, uncompressed and numbered in the order in which they must be loaded.
stage() {
    local tree=$1 init=$2 kernel=$3 number=10 path
    shift 3
    rm -rf "$tree"
    mkdir -p "$tree"/{bin,modules,proc,sys,dev}
    cp "$(command -v busybox)" "$tree/bin/busybox"
    install -m 755 "$init" "$tree/init"
    for path in $(modprobe -C /dev/null -d "$kernel" -S "$(version "$kernel")" --show-depends -a "$@" |
        sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++'); do
        case $path in
            *.xz) xz -dc "$path" >"$tree/modules/$number-$(basename "$path" .xz)" ;;
            *) cp "$path" "$tree/modules/$number-$(basename "$path")" ;;
        esac
        number=$((number + 1))
    done
}

# Packs tree $1 into image $2, not compressed: unpacking is what takes an emulated CPU long.
pack() {
    (cd "$1" && find . | cpio --quiet -o -H newc -R 0:0) >"$2.new"
    mv "$2.new" "$2"
    rm -rf "$1"
}

host_image() {
    local image=$lab/images/host.cpio
    [ "$here/host-init" -nt "$image" ] || [ "$here/setup.sh" -nt "$image" ] || return 0
    stage "$image.tree" "$here/host-init" "$lab/kernels/host" 9p 9pnet_virtio overlay
    pack "$image.tree" "$image"
}

# The guest program is linked statically: an initramfs has no C library.
guest_program() {
    (cd "$checkout" && cargo rustc --quiet --release --package guest --bin guest --target-dir "$lab/cargo" \
        -- -C target-feature=+crt-static)
}

# The initramfs for guests with kernel $1, with the modules $2... besides those that all guests need.
guest_image() {
    local image=$lab/images/initramfs-$1.cpio program=$lab/cargo/release/guest
    [ "$program" -nt "$image" ] || [ "$here/guest-init" -nt "$image" ] || [ "$here/setup.sh" -nt "$image" ] || return 0
    stage "$image.tree" "$here/guest-init" "$lab/kernels/$1" uio_pci_generic button evdev virtio_pci virtio_blk virtio_net "${@:2}"
    cp "$program" "$image.tree/bin/guest"
    pack "$image.tree" "$image"
}

# The initramfs for guests with kernel 6.12 that boot from a disk: the driver of the disk is what Debian's lacks.
disk_image() {
    local image=$lab/images/initramfs-disk.cpio
    [ "$here/disk-init" -nt "$image" ] || [ "$here/setup.sh" -nt "$image" ] || return 0
    stage "$image.tree" "$here/disk-init" "$lab/kernels/6.12" virtio_blk
    pack "$image.tree" "$image"
}

# The disk from which the demo's guest boots, with the modules that its devices need.
demo_disk() {
    local image=$lab/images/demo.img program=$lab/cargo/release/guest
    [ "$program" -nt "$image" ] || [ "$here/demo-init" -nt "$image" ] || [ "$here/disk.sh" -nt "$image" ] ||
        [ "$here/setup.sh" -nt "$image" ] || return 0
    stage "$image.tree" "$here/demo-init" "$lab/kernels/6.12" uio_pci_generic
    cp "$program" "$image.tree/bin/guest"
    make_disk "$image.new" 32 "$image.tree"
    mv "$image.new" "$image"
    rm -rf "$image.tree"
}

install_packages "${packages[@]}"
mkdir -p "$lab/images" "$lab/logs"
unpack_kernel host linux-image-6.12-amd64 # runs the lab, and guests with devices that the others have no driver for
unpack_kernel 6.12 linux-image-6.12-cloud-amd64
unpack_kernel 6.1 linux-image-cloud-amd64
if [ ! -e "$lab/images/vmlinux-6.12" ]; then
    extract_vmlinux "$lab/kernels/6.12/vmlinuz" >"$lab/images/vmlinux-6.12.new"
    mv "$lab/images/vmlinux-6.12.new" "$lab/images/vmlinux-6.12"
fi
host_image
guest_program
guest_image 6.12
guest_image 6.1
disk_image
demo_disk
guest_image host nvme ext4 e1000e igbvf # the cloud kernels have none of the network cards
