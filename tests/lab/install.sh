#!/usr/bin/env bash
# Fills the lab's cache folder: a newer Debian with its QEMU, and a stock kernel.
#
# Each stage leaves a stamp, so that a broken install goes on where it stopped; what a stage
# makes is written beside its place and renamed, so that nothing half done is ever found.
# Usage: install.sh check | install | versions | llvm MAJOR
set -euo pipefail

CACHE="${SUBLET_CACHE:-$HOME/.cache/sublet-lab}"
ROOT="$CACHE/trixie"
STAMPS="$CACHE/stamps"
HOST_PACKAGES=(debootstrap zstd cpio xz-utils busybox-static kmod)
ROOT_PACKAGES=(qemu-system-x86 seabios pciutils)

say() { printf 'install: %s\n' "$*"; }
die() { printf 'install: %s\n' "$*" >&2; exit 1; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
have_package() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q 'ok installed'; }
in_root() { as_root chroot "$ROOT" env LC_ALL=C DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"; }

missing_packages() {
    local p
    for p in "${HOST_PACKAGES[@]}"; do have_package "$p" || printf '%s ' "$p"; done
}

# The mirror that this machine installs Debian from, whichever it is.
mirror() {
    if [ -n "${SUBLET_DEBIAN_MIRROR:-}" ]; then printf '%s\n' "$SUBLET_DEBIAN_MIRROR"; return; fi
    local uri
    uri=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -n 1)
    if [ -z "$uri" ]; then
        uri=$(sed -nE 's/^URIs: *([^ ]+).*/\1/p; s/^deb +(\[[^]]*\] +)?([^ ]+) .*/\2/p' \
            /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | grep -E '/debian/?$' | head -n 1)
    fi
    [ -n "$uri" ] || die 'no Debian mirror in the apt sources of this machine; set SUBLET_DEBIAN_MIRROR'
    printf '%s\n' "${uri%/}"
}

install_host_packages() {
    local wanted
    wanted=$(missing_packages)
    [ -n "$wanted" ] || return 0
    say "on this machine: $wanted"
    as_root apt-get -q update
    # shellcheck disable=SC2086 # a list of words
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends $wanted
}

install_root() {
    [ -e "$STAMPS/root" ] && return 0
    local new="$CACHE/trixie.new"
    as_root rm -rf "$new"
    say "debootstrap of trixie from $1"
    as_root debootstrap --variant=minbase trixie "$new" "$1" || die 'debootstrap failed'
    printf 'deb %s trixie main\ndeb %s trixie-backports main\n' "$1" "$1" | as_root tee "$new/etc/apt/sources.list" >/dev/null
    as_root rm -f "$new"/etc/apt/sources.list.d/*
    # A proxy, or a mirror that is a snapshot, is this machine's affair: the newer Debian follows it.
    apt-config dump | grep -E '^Acquire::(https?::Proxy|Check-)' | as_root tee "$new/etc/apt/apt.conf.d/99machine" >/dev/null || true
    as_root cp /etc/resolv.conf "$new/etc/resolv.conf"
    as_root rm -rf "$ROOT"
    as_root mv "$new" "$ROOT"
    touch "$STAMPS/root"
}

install_qemu() {
    [ -e "$STAMPS/qemu" ] && return 0
    say "${ROOT_PACKAGES[*]} from backports"
    in_root apt-get -q update
    in_root apt-get -q -y install -t trixie-backports --no-install-recommends "${ROOT_PACKAGES[@]}"
    in_root apt-get clean
    as_root rm -rf "$ROOT"/var/lib/apt/lists/*-security* "$ROOT"/usr/share/{doc,man,locale}
    touch "$STAMPS/qemu"
}

# The newest plain kernel of backports: not cloud, not rt, not debug.
newest_kernel() {
    in_root apt-cache pkgnames linux-binary- | sed -nE 's/^linux-binary-([0-9][0-9.]*[^-]*-amd64|[0-9].*\+deb[0-9]+-amd64)$/\1/p' |
        grep -vE 'cloud|rt|dbg|unsigned' | sort -V | tail -n 1
}

install_kernel() {
    [ -e "$STAMPS/kernel" ] && return 0
    local version new
    version=$(newest_kernel)
    [ -n "$version" ] || die 'no linux-binary-*-amd64 package in trixie-backports'
    say "kernel $version"
    new="$CACHE/kernel/$version.new"
    as_root rm -rf "$new"
    mkdir -p "$new"
    as_root rm -rf "$ROOT/var/cache/sublet"
    in_root mkdir -p /var/cache/sublet
    in_root sh -c 'cd /var/cache/sublet && apt-get -q -o APT::Sandbox::User=root download "$@"' sh "linux-binary-$version" "linux-modules-$version"
    local deb
    for deb in "$ROOT"/var/cache/sublet/*.deb; do dpkg-deb -x "$deb" "$new"; done
    as_root rm -rf "$ROOT/var/cache/sublet"
    # The package has no modules.dep: Debian's postinst makes it. The warnings are about lists of
    # what is built in, which come in yet another package.
    depmod -b "$new/usr" "$version" 2>/dev/null || die 'depmod failed'
    rm -rf "$CACHE/kernel/$version"
    mv "$new" "$CACHE/kernel/$version"
    printf '%s\n' "$version" >"$STAMPS/kernel"
}

check() {
    local absent wanted
    absent=''
    wanted=$(missing_packages)
    [ -z "$wanted" ] || absent="the Debian packages $wanted"
    local stage
    for stage in root qemu kernel; do
        [ -e "$STAMPS/$stage" ] || absent="$absent${absent:+, }the $stage stage of $CACHE"
    done
    [ -e "$CACHE/ntb/version" ] || absent="$absent${absent:+, }the NTB modules of $CACHE"
    [ -z "$absent" ] && return 0
    printf 'missing: %s\n' "$absent"
    printf 'tests/run --install installs the packages and fills the cache folder (SUBLET_CACHE names another, SUBLET_DEBIAN_MIRROR another mirror)\n'
    return 1
}

versions() {
    printf 'QEMU %s, kernel %s, cache %s (%s)\n' \
        "$(in_root qemu-system-x86_64 --version | sed -nE '1s/.*version ([^ ]+).*/\1/p')" \
        "$(cat "$STAMPS/kernel")" "$CACHE" "$(as_root du -sh "$CACHE" | cut -f1)"
}

# llvm-cov and llvm-profdata of a compiler's LLVM, which may be newer than any stable Debian's, with
# the libraries that they need and the loader of those: `tool.sh NAME ARGUMENT ...` runs one.
install_llvm() {
    local major="$1" at="$CACHE/llvm-$1" new="$CACHE/llvm-$1.new" tool
    [ -e "$at/tool.sh" ] && return 0
    say "llvm-$major from forky"
    as_root rm -rf "$new" "$new.root"
    # debootstrap of an older Debian has no script of that name, and sid's does.
    as_root debootstrap --variant=minbase --include="llvm-$major" forky "$new.root" "$2" /usr/share/debootstrap/scripts/sid ||
        die "debootstrap of forky failed, or it has no llvm-$major"
    mkdir -p "$new/bin" "$new/lib"
    for tool in llvm-cov llvm-profdata; do
        cp "$new.root/usr/lib/llvm-$major/bin/$tool" "$new/bin/"
        as_root chroot "$new.root" ldd "/usr/lib/llvm-$major/bin/$tool" | grep -oE '/[^ ]+' | sort -u |
            while read -r library; do cp -L "$new.root$library" "$new/lib/"; done
    done
    as_root rm -rf "$new.root"
    printf '#!/bin/sh\nat=$(dirname "$0") name="$1"\nshift\nexec "$at"/lib/ld-linux-*.so.* --library-path "$at/lib" "$at/bin/$name" "$@"\n' >"$new/tool.sh"
    chmod +x "$new/tool.sh"
    rm -rf "$at"
    mv "$new" "$at"
}

case "${1:-}" in
check) check ;;
llvm)
    mkdir -p "$CACHE"
    exec 9>"$CACHE/lock"
    flock 9
    install_host_packages
    install_llvm "$2" "$(mirror)"
    ;;
versions) versions ;;
install)
    mkdir -p "$STAMPS" "$CACHE/kernel"
    exec 9>"$CACHE/lock"
    flock 9
    install_host_packages
    install_root "$(mirror)"
    install_qemu
    install_kernel
    # It takes the lock by itself.
    exec 9>&-
    "$(dirname "$0")/ntb-modules.sh" "$CACHE/ntb"
    ;;
*) die 'usage: install.sh check | install | versions | llvm MAJOR' ;;
esac
