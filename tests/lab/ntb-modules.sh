#!/usr/bin/env bash
# Builds Linux's own NTB modules for Debian's cloud kernel, and fetches that kernel's image.
#
# Debian leaves CONFIG_NTB unset, so the driver that keeps the NTB model honest has to be built: out
# of tree, from linux-source, against the cloud kernel's headers (its virtio drivers are built in:
# such a host needs no other module). Made once for each kernel version, in the newer Debian of the
# lab's cache; what is only needed to build is taken out again.
# Usage: ntb-modules.sh OUT_DIR
#   OUT_DIR/version           uname -r; written last
#   OUT_DIR/vmlinuz           the kernel
#   OUT_DIR/modules/*.ko      ntb, ntb_hw_intel, ntb_pingpong, ntb_perf, ntb_tool
#   OUT_DIR/modules/modules.dep   empty: no Debian module is needed
set -euo pipefail

SERIES=6.12
CACHE="${SUBLET_CACHE:-$HOME/.cache/sublet-lab}"
ROOT="$CACHE/trixie"
WORK=/var/cache/sublet-ntb
BUILD_PACKAGES=(gcc-14 make)

say() { printf 'ntb-modules: %s\n' "$*"; }
die() { printf 'ntb-modules: %s\n' "$*" >&2; exit 1; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
in_root() { as_root nice chroot "$ROOT" env LC_ALL=C DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"; }

newest() {
    in_root apt-cache pkgnames "linux-headers-$SERIES" |
        sed -nE 's/^linux-headers-([0-9.]+\+deb[0-9]+-cloud-amd64)$/\1/p' | sort -V | tail -n 1
}

download() {
    local version="$1" common source
    source=$(in_root apt-cache show "linux-headers-$version" | sed -nE 's/^Version: //p' | head -n 1)
    common="${version%-cloud-amd64}"
    in_root sh -c 'cd "$0" && apt-get -q -o APT::Sandbox::User=root download "$@"' "$WORK" \
        "linux-headers-$version" "linux-headers-$common-common" "linux-kbuild-$common" \
        "linux-image-$version" "linux-source-$SERIES=$source"
}

# The headers are only unpacked: as packages they would bring the kernel and an initramfs with them.
unpack() {
    local deb work="$ROOT$WORK"
    as_root mkdir "$work/tree" "$work/image"
    for deb in "$work"/linux-headers-*.deb "$work"/linux-kbuild-*.deb; do as_root dpkg-deb -x "$deb" "$work/tree"; done
    as_root dpkg-deb -x "$work"/linux-image-*.deb "$work/image"
    dpkg-deb --fsys-tarfile "$work/linux-source-$SERIES"_*.deb |
        tar -xO "./usr/src/linux-source-$SERIES.tar.xz" |
        as_root nice tar -xJ -C "$work" --strip-components=2 "linux-source-$SERIES/drivers/ntb"
}

# The headers name each other by absolute paths, hence the links.
build() {
    local version="$1" added=() package
    for package in "${BUILD_PACKAGES[@]}"; do
        in_root dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || added+=("$package")
    done
    [ "${#added[@]}" = 0 ] || in_root apt-get -q -y install -t trixie-backports --no-install-recommends "${added[@]}"
    in_root sh -c 'ln -sfn "$0"/tree/usr/src/linux-headers-* /usr/src/ && ln -sfn "$0"/tree/usr/lib/linux-kbuild-* /usr/lib/' "$WORK"
    in_root make -C "/usr/src/linux-headers-$version" M="$WORK/ntb" CONFIG_DEBUG_INFO_BTF_MODULES= \
        CONFIG_NTB=m CONFIG_NTB_INTEL=m CONFIG_NTB_PINGPONG=m CONFIG_NTB_PERF=m CONFIG_NTB_TOOL=m modules
    in_root sh -c 'cd "$0" && find ntb -name "*.ko" -exec objcopy --strip-debug {} \;' "$WORK"
    [ "${#added[@]}" = 0 ] || in_root apt-get -q -y purge --auto-remove "${added[@]}"
}

clean() {
    as_root rm -rf "$ROOT$WORK"
    as_root find "$ROOT/usr/src" "$ROOT/usr/lib" -maxdepth 1 -xtype l -lname "*$WORK*" -delete
    in_root apt-get clean
}

main() {
    local out="$1" version module
    [ -d "$ROOT" ] || die "$ROOT is not there: tests/run --install makes it"
    version=$(newest)
    [ -n "$version" ] || { in_root apt-get -q update; version=$(newest); }
    [ -n "$version" ] || die "no linux-headers-$SERIES*-cloud-amd64 in the mirror"
    if [ "$(cat "$out/version" 2>/dev/null)" = "$version" ]; then return 0; fi
    say "for $version"
    clean
    in_root mkdir -p "$WORK" /usr/src
    download "$version"
    unpack
    build "$version"
    rm -rf "$out.new"
    mkdir -p "$out.new/modules"
    for module in ntb hw/intel/ntb_hw_intel test/ntb_pingpong test/ntb_perf test/ntb_tool; do
        cp "$ROOT$WORK/ntb/$module.ko" "$out.new/modules/"
    done
    cp "$ROOT$WORK/image/boot/vmlinuz-$version" "$out.new/vmlinuz"
    : >"$out.new/modules/modules.dep"
    printf '%s\n' "$version" >"$out.new/version"
    clean
    rm -rf "$out"
    mv "$out.new" "$out"
}

[ $# = 1 ] || die 'usage: ntb-modules.sh OUT_DIR'
mkdir -p "$(dirname "$1")"
# apt in the shared root: one at a time, also against install.sh.
exec 8>"$CACHE/lock"
flock 8
main "$1"
