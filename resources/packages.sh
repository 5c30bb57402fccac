# shellcheck shell=bash
# Debian packages, for the other scripts: install missing ones, and unpack those of which only files are needed.

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

# The options that make apt-get and apt-cache use another suite's package lists instead of the machine's (see use_suite).
suite=()

refresh_lists() {
    if ((${#suite[@]})); then
        apt-get "${suite[@]}" -qq update
    else
        as_root apt-get -qq update
    fi
}

# apt COMMAND...: run COMMAND. If it fails, update the package lists and run it once more: the lists may be missing (in a
# container image) or older than the archive, which drops a package when a newer version comes. COMMAND therefore has to do
# everything that must come from the same lists. If it fails again: one line with the reason, and exit.
apt() {
    local log
    log=$(mktemp)
    "$@" >"$log" 2>&1 || { refresh_lists && "$@"; } >"$log" 2>&1 ||
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
    # The lock: Debian's own upgrades, or another of these scripts, may be installing something.
    apt as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 --no-install-recommends \
        install "${missing[@]}"
}

# use_suite SUITE DIRECTORY: take packages from another suite of Debian's from here on. Its lists are kept in DIRECTORY:
# the machine's own lists and sources stay as they are.
use_suite() {
    mkdir -p "$2/lists/partial" "$2/cache/archives/partial"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $1 main" >"$2/sources.list"
    suite=(-o "Dir::Etc::SourceList=$2/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$2/lists" -o "Dir::Cache=$2/cache")
    # apt reads and downloads as a user of its own, which may not enter this user's home directory.
    ((EUID)) || suite+=(-o APT::Sandbox::User=root)
    refresh_lists || die "cannot fetch the package lists of $1"
}

# download PACKAGE...: the packages' files, into the current directory
download() { apt-get "${suite[@]}" -qq download "$@"; }

# depends PACKAGE PATTERN: the packages that PACKAGE depends on and that match PATTERN (basic, of the whole name)
depends() { LC_ALL=C apt-cache "${suite[@]}" depends "$1" | sed -n "s/^ *Depends: \($2\)\$/\1/p"; }

# unpack DIRECTORY FILE...: unpack packages there, without installing them
unpack() {
    local directory=$1 file
    mkdir -p "$directory"
    for file in "${@:2}"; do dpkg -x "$file" "$directory"; done
}

# fetch PACKAGE DIRECTORY: download a package and unpack it there, without installing it
fetch() {
    local debs
    debs=$(mktemp -d)
    pushd "$debs" >/dev/null || exit
    apt download "$1"
    popd >/dev/null || exit
    unpack "$2" "$debs"/*.deb
    rm -r "$debs"
}

# kernel_release FLAVOUR: the release of the kernel that linux-image-FLAVOUR depends on, by the package lists
kernel_release() {
    local image
    image=$(depends "linux-image-$1" 'linux-image-[0-9].*')
    [[ $image ]] || {
        echo "E: linux-image-$1 is unknown, or depends on no kernel as it does in Debian 12"
        return 1
    }
    echo "${image#linux-image-}"
}

# download_kernel FLAVOUR PART...: the current kernel's packages, into the current directory. PART is `image` or `headers`. The
# headers fit no other kernel, and the archive drops both when it gets a newer one: hence all at once, from the same lists.
# For `apt`.
download_kernel() {
    local release packages=() part
    release=$(kernel_release "$1") || { echo "$release" && return 1; }
    for part in "${@:2}"; do packages+=("linux-$part-$release"); done
    if [[ " ${*:2} " == *' headers '* ]]; then
        mapfile -t -O "${#packages[@]}" packages < <(depends "linux-headers-$release" 'linux-\(headers\|kbuild\)-.*')
    fi
    rm -f ./*.deb
    download "${packages[@]}" && echo "$release" >release
}
