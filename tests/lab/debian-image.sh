#!/usr/bin/env bash
# Installs a Debian system, of Debian's packages, in the first partition of a disk: target/lab/debian/disk.img. Beside it
# are the kernel and the initramfs of that system: `vmlinuz` and `initrd.img`. User root's password is `outrigger`.
# Done once; safe to repeat. As anyone but root it uses sudo, for what installing packages takes.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # mke2fs and sfdisk, for ordinary users

here=$(cd "$(dirname "$0")" && pwd)
image=$(cd "$here/../.." && pwd)/target/lab/debian
new=$image.new
source "$here/debian.sh"

packages=(
    linux-image-cloud-amd64 tiny-initramfs # the kernel, and what makes its initramfs
    systemd-sysv udev kmod                 # the init system
    login e2fsprogs                        # what people, and the file system, need
)
# What starts on Debian systems and nobody in a lab waits for. An emulated CPU takes a second for each.
unused=(
    getty@tty1.service getty-static.service e2scrub_reap.service modprobe@.service systemd-pstore.service
    {apt-daily,apt-daily-upgrade,dpkg-db-backup,e2scrub_all,fstrim,systemd-tmpfiles-clean}.timer
    dev-{hugepages,mqueue}.mount sys-kernel-{config,debug,tracing}.mount sys-fs-fuse-connections.mount
    proc-sys-fs-binfmt_misc.automount systemd-update-utmp{,-runlevel}.service
)

mkdir -p "$(dirname "$image")"
exec {lock}>"$image.lock"
flock "$lock"
[ ! -e "$image" ] || exit 0
install_packages mmdebstrap fakeroot fdisk e2fsprogs

rm -rf "$new"
mkdir "$new"
trap 'rm -rf "$new"' EXIT

# Debian's own sources of this machine.
apt-get indextargets --format '$(ORIGIN) $(REPO_URI) $(CODENAME)' 'Identifier: Packages' |
    sed -n 's#^Debian \(.*\) \(bookworm[a-z-]*\)$#deb \1 \2 main#p' | sort -u >"$new/sources.list"
grep -q ' bookworm-security ' "$new/sources.list" || die "this is no Debian 12 with its security updates"

# The first of these hooks runs before the kernel is installed, the others when all is. Udev would load a driver for every
# feature of the CPU; an emulated one spends ten seconds on those that people in a lab have no use for.
say "installing a Debian system, which takes a minute"
as_root mmdebstrap --quiet --mode=root --variant=minbase --include="${packages[*]}" \
    --essential-hook='mkdir "$1/etc/tiny-initramfs"
        printf "%s\n" AUTO_MODULES=no INCLUDE_MODULES=virtio_blk >"$1/etc/tiny-initramfs/tiny-initramfs.conf"' \
    --customize-hook='echo debian >"$1/etc/hostname"' \
    --customize-hook='echo "/dev/vda1 / ext4 defaults 0 1" >"$1/etc/fstab"' \
    --customize-hook='printf "blacklist %s\n" kvm_amd aesni_intel ghash_clmulni_intel crc32_pclmul crct10dif_pclmul \
        sha512_ssse3 sha256_ssse3 sha1_ssse3 >"$1/etc/modprobe.d/emulated-cpu.conf"' \
    --customize-hook='mkdir "$1/etc/systemd/system.conf.d"
        printf "%s\n" "[Manager]" DefaultTimeoutStartSec=600 DefaultTimeoutStopSec=600 \
            DefaultDeviceTimeoutSec=600 >"$1/etc/systemd/system.conf.d/slow-machine.conf"' \
    --customize-hook='sed -i "s/^LOGIN_TIMEOUT.*/LOGIN_TIMEOUT 600/" "$1/etc/login.defs"' \
    --customize-hook="chroot \"\$1\" systemctl --quiet mask ${unused[*]}" \
    --customize-hook='echo root:outrigger | chroot "$1" chpasswd' \
    bookworm - "$new/sources.list" </dev/null >"$new/root.tar"

# In one run of fakeroot, which knows no owners of files of an earlier one.
fakeroot bash -euc '
    source "$1/disk.sh"
    mkdir "$2/root"
    tar -xf "$2/root.tar" -C "$2/root"
    make_disk "$2/disk.img" 512 "$2/root"
' bash "$here" "$new"
cp "$new"/root/boot/vmlinuz-* "$new/vmlinuz"
cp "$new"/root/boot/initrd.img-* "$new/initrd.img"
rm -rf "$new/root" "$new/root.tar" "$new/sources.list"
mv "$new" "$image"
