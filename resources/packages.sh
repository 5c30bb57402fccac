# shellcheck shell=bash
# Debian packages, for the other scripts: install what is missing, unpack what is only looked into.

say() { echo "${0##*/}: $*" >&2; }
die() {
    say "$*"
    exit 1
}

as_root() {
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -- "$@"
    else
        die "'$*' needs root: run this as root, or install sudo"
    fi
}

# apt COMMAND...: run it; again with new package lists if it fails, since they may be missing (a container image) or older
# than the archive. Fails in one line.
apt() {
    local log
    log=$(mktemp)
    "$@" >"$log" 2>&1 || { as_root apt-get -qq update && "$@"; } >"$log" 2>&1 ||
        die "'$*' failed: $(grep -m 1 '^E:' "$log" || tail -n 1 "$log")"
    rm "$log"
}

# need PACKAGE...: install those that are missing
need() {
    local missing=() package
    for package; do
        [[ $(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null) == ii* ]] || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    say "installing ${missing[*]}"
    # Debian's own upgrades, or another of these scripts, may be installing something.
    apt as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 --no-install-recommends \
        install "${missing[@]}"
}

# fetch PACKAGE DIRECTORY: unpack a package there, without installing it
fetch() {
    local debs
    debs=$(mktemp -d)
    mkdir -p "$2"
    # `apt-get download` puts the file in the current directory.
    apt env -C "$debs" apt-get -qq download "$1"
    dpkg -x "$debs/$1"_*.deb "$2"
    rm -r "$debs"
}

# kernel_release FLAVOUR: the release that the metapackage linux-image-FLAVOUR stands for now
kernel_release() {
    local release
    apt apt-cache show "linux-image-$1"
    release=$(apt-cache depends "linux-image-$1" | sed -n 's/.* linux-image-\([0-9].*\)/\1/p')
    [[ $release ]] || die "linux-image-$1 is not what it is in Debian 12: it depends on no kernel"
    echo "$release"
}
