#!/bin/sh
# Builds a directory tree with the clients of one Debian release, for in-root.sh: build-root.sh SUITE DIR.
# Takes about half a minute and 400 MB. A complete DIR is left alone, if it is less than a week old or the suite is stable.
# Exit 3: not possible on this machine (no root, no mmdebstrap, not amd64).
set -eu
suite=$1
dir=$2
packages="qemu-utils libnbd-bin python3-libnbd nbdkit nbd-client fio qemu-system-x86 busybox-static e2fsprogs xfsprogs
fuse3 fuse2fs openssl rsync kmod cpio"
here=$(cd "$(dirname "$0")" && pwd)

cannot() { echo "$1" >&2; exit 3; }
[ "$(id -u)" -eq 0 ] || cannot "only root can make and enter a root directory of $suite"
command -v mmdebstrap >/dev/null || cannot "mmdebstrap is not installed"
[ "$(dpkg --print-architecture)" = amd64 ] || cannot "the client sets are for amd64"

mkdir -p "$(dirname "$dir")"
# Two test runs may build at the same time.
exec 9> "$dir.lock"
flock 9
want=$(cat "$0" "$here/download-kernel.sh" "$here/unpack-virtnbdbackup.sh" | cksum)
if [ "$(cat "$dir/stamp" 2>/dev/null)" = "$want" ]; then
  case $suite in
    sid | unstable | testing) [ -z "$(find "$dir/stamp" -mtime +7)" ] && exit 0 ;;
    *) exit 0 ;;
  esac
fi
rm -rf --one-file-system "$dir"
mkdir -p "$dir"
# In its own mount namespace: a killed build leaves no mounts behind. A mirror that lags is acceptable; signatures are
# still checked.
unshare --mount mmdebstrap --quiet --variant=apt --aptopt='Acquire::Check-Valid-Until "false"' \
  --include="$(echo $packages | tr ' ' ',')" \
  --customize-hook='cp "'"$here"'/download-kernel.sh" "$1/tmp/" && chroot "$1" sh /tmp/download-kernel.sh' \
  --customize-hook='cp "'"$here"'/unpack-virtnbdbackup.sh" "$1/tmp/"' \
  --customize-hook='chroot "$1" sh /tmp/unpack-virtnbdbackup.sh /opt/virtnbdbackup' \
  "$suite" "$dir/root"
echo "$want" > "$dir/stamp"
