#!/bin/sh
# Runs inside a client set's root while it is built: downloads the packages of the release's kernel to /kernel, without
# installing them (that would need an initramfs and a boot loader). test/vm/build-guest.sh unpacks them.
set -eu
apt-get update -qq
mkdir -p /kernel
cd /kernel
depends() { apt-cache depends "$1" | sed -n "s/.*Depends: \($2\)/\1/p"; }
image=$(depends linux-image-cloud-amd64 'linux-image-[0-9].*' | head -n 1)
[ -n "$image" ] || { echo "linux-image-cloud-amd64 depends on no image" >&2; exit 1; }
# From 7.x on Debian's image package is empty, and the kernel and its modules are in packages that it depends on.
parts=$(depends "$image" 'linux-\(base\|binary\|modules\)-[0-9].*')
# shellcheck disable=SC2086  # a list of words
apt-get download -qq -o APT::Sandbox::User=root "$image" $parts
apt-get clean
