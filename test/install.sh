#!/bin/sh
# Installs the tools of the tests from Debian's archive. Tests of tools that cannot be installed are skipped with a reason.
set -u
packages="libnbd-bin libnbd-dev python3-libnbd qemu-utils nbdkit nbd-client fio fuse3 fuse2fs qemu-system-x86 busybox-static kmod cpio lz4 zstd rsync e2fsprogs xfsprogs gcc libc6-dev util-linux openssl gnutls-bin mmdebstrap arch-test iproute2 strace shellcheck"
if ! command -v apt-get >/dev/null 2>&1; then
  echo "test/install.sh: no apt-get here; install by hand what is missing: $packages" >&2
  exit 0
fi
missing=""
for package in $packages; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $package"
done
unpack() { sh "$(dirname "$0")/clients/unpack-virtnbdbackup.sh" "${XDG_CACHE_HOME:-$HOME/.cache}/sheepgate-test-clients/virtnbdbackup"; }
if [ -z "$missing" ]; then
  unpack
  exit
fi
sudo=""
[ "$(id -u)" -eq 0 ] || sudo="sudo"
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -qq || exit 1
# shellcheck disable=SC2086  # a list of words
$sudo apt-get install -qq -y --no-install-recommends $missing || exit 1
unpack
