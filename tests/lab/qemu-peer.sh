#!/usr/bin/env bash
# Fetches QEMU 11.1, a vfio-user client that nobody here wrote, to target/lab/qemu-peer; `qemu` in there runs it.
# Debian 12 has none that is new enough, so this takes Debian 13's backport with all its libraries, and runs it with
# their own dynamic loader. Nothing is installed, and nobody need be root. Safe to repeat.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)/target/lab/qemu-peer
new=$root.new
[ ! -e "$root" ] || exit 0

source "$here/debian.sh"

# Debian's mirror, as this machine knows it.
mirror=$(apt-get indextargets --format '$(CODENAME) $(REPO_URI)' 'Identifier: Packages' 2>/dev/null |
    sed -n 's/^bookworm //p' | head -n 1)
[ -n "$mirror" ] || die "this is no Debian 12, or its package lists were never fetched"

rm -rf "$new"
mkdir -p "$new"/apt/{lists,archives}/partial
: >"$new/apt/status" # nothing is installed, so every library comes along
for suite in trixie trixie-backports; do
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
done >"$new/apt/sources.list"

# apt-get for a system that is only in that folder.
peer_apt() {
    apt-get -qq -o APT::Sandbox::User=root -o Acquire::Languages=none -o Acquire::http::Timeout=20 \
        -o Dir::State::status="$new/apt/status" -o Dir::State::Lists="$new/apt/lists" \
        -o Dir::Cache::Archives="$new/apt/archives" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= \
        -o Dir::Etc::SourceList="$new/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null "$@" </dev/null
}

say "fetching QEMU 11.1"
peer_apt update
peer_apt -y -t trixie-backports --no-install-recommends --download-only install qemu-system-x86 >/dev/null
for package in "$new"/apt/archives/*.deb; do dpkg-deb -x "$package" "$new"; done
rm -r "$new/apt"

cat >"$new/qemu" <<'END'
#!/bin/sh
root=${0%/*}
libraries=$root/usr/lib/x86_64-linux-gnu
exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$root/usr/bin/qemu-system-x86_64" \
    -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" "$@"
END
chmod +x "$new/qemu"
mv "$new" "$root"
