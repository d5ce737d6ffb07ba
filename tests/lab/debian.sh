# What set-up scripts need of Debian: packages to install, and packages to take apart without installing them.
# Read by them with `source`, in bash.

say() { printf 'lab setup: %s\n' "$*"; }

die() {
    say "$*" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# Refreshes the package lists, at most once in a run.
update_lists() {
    [ -z "${lists_updated:-}" ] || return 0
    lists_updated=yes
    say "refreshing the package lists"
    as_root apt-get -qq -o DPkg::Lock::Timeout=300 update </dev/null
}

# Installs those of the packages $@ that are not.
install_packages() {
    local missing=() package
    for package in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    update_lists
    say "installing ${missing[*]}"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 \
        install --no-install-recommends "${missing[@]}" </dev/null
}

# The package behind metapackage $1; nothing when the package lists don't know it.
newest() { apt-cache depends "$1" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-.*\)$/\1/p' | head -n 1; }

# Downloads the packages $2... into folder $1.
download() {
    local folder=$1
    shift
    say "fetching $*"
    try_download "$folder" "$@" || {
        update_lists # they may be too old to name a package that still exists
        try_download "$folder" "$@"
    }
}

try_download() { (cd "$1" && apt-get -qq -o APT::Sandbox::User=root download "${@:2}" </dev/null); }

# Unpacks the kernel's source of package linux-source-6.12 into folder $1; only the paths $2..., if there are any.
unpack_source() {
    local folder=$1
    shift
    download "$folder" linux-source-6.12
    dpkg --fsys-tarfile "$folder"/linux-source-6.12_*.deb | tar -xO --wildcards '*.tar.xz' |
        tar -xJ -C "$folder" --strip-components=1 "${@/#/linux-source-6.12/}"
    rm "$folder"/linux-source-6.12_*.deb
}

# The release of the only kernel in tree $1, as uname -r says it.
version() { basename "$1"/lib/modules/*; }
