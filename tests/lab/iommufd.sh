#!/usr/bin/env bash
# Builds a kernel for the lab that has what Debian's lack, iommufd and VFIO's character devices, of Debian's source and
# iommufd.config: for `make test-iommufd`. Does nothing when it has done that for this source and this configuration.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # depmod, for ordinary users

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)/target/lab/kernels/iommufd
new=$root.new
source "$here/debian.sh"

# What the kernel is made of: the version of Debian's source, and our configuration.
ingredients() {
    apt-cache policy linux-source-6.12 | grep Candidate || true
    grep -v '^#' "$here/iommufd.config"
}

exec {lock}>"$root.lock"
flock "$lock"
[ "$(ingredients)" != "$(cat "$root/ingredients" 2>/dev/null)" ] || exit 0
install_packages flex bison libelf-dev bc libssl-dev

rm -rf "$new"
trap 'rm -rf "$new"' EXIT
mkdir -p "$new/source"
unpack_source "$new/source"
ingredients >"$new/ingredients"

build() { nice make -s -C "$new/source" -j"$(nproc)" "$@"; }

say "building a kernel with iommufd, which takes 10 minutes or so"
build defconfig kvm_guest.config
cat "$here/iommufd.config" >>"$new/source/.config"
build olddefconfig 2>/dev/null # it warns of all that we override
grep '^CONFIG_.*=[ym]$' "$here/iommufd.config" | while read -r option; do
    grep -qxF "$option" "$new/source/.config" || die "this kernel cannot be built with $option"
done
build bzImage modules
build INSTALL_MOD_PATH="$new" INSTALL_MOD_STRIP=1 modules_install
mv "$new/source/arch/x86/boot/bzImage" "$new/vmlinuz"
rm -rf "$new/source" "$new"/lib/modules/*/build "$root"
mv "$new" "$root"
