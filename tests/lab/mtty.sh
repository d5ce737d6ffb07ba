#!/usr/bin/env bash
# Builds the kernel's sample of a mediated device, a serial port that loops back, as module mtty of the lab's kernel.
# Debian does not, and its source is GPL-2.0: it is fetched, and stays under target/lab.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # depmod, for ordinary users

here=$(cd "$(dirname "$0")" && pwd)
source "$here/debian.sh"
host=$(cd "$here/../.." && pwd)/target/lab/kernels/host
release=$(version "$host")
module=$host/lib/modules/$release/extra/mtty.ko
[ ! -e "$module" ] || exit 0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/headers" "$work/source"

# The headers come in three packages, and expect to be installed.
common=${release%-amd64}
download "$work/headers" "linux-headers-$release" "linux-headers-$common-common" "linux-kbuild-$common" ||
    die "no headers for the lab's kernel any more; remove target/lab/kernels for a newer one"
for package in "$work"/headers/*.deb; do dpkg -x "$package" "$work/headers"; done
sed -i "s#/usr/src#$work/headers&#" "$work/headers/usr/src/linux-headers-$release/Makefile"

unpack_source "$work/source" samples/vfio-mdev/mtty.c
echo 'obj-m := mtty.o' >"$work/source/samples/vfio-mdev/Makefile"
# Data for debuggers would take another program.
make -s -C "$work/headers/usr/src/linux-headers-$release" M="$work/source/samples/vfio-mdev" \
    CC=gcc CONFIG_DEBUG_INFO_BTF_MODULES= modules

mkdir -p "$(dirname "$module")"
mv "$work/source/samples/vfio-mdev/mtty.ko" "$module"
depmod -b "$host" "$release"
