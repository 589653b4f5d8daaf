#!/bin/sh
# Runs a program of a client set (see build-root.sh): in-root.sh ROOT DIRECTORY SHARED[:SHARED…] PROGRAM [ARGUMENT…]
# in DIRECTORY, with /dev, /proc, the network and the SHARED files and directories of this machine under the same paths.
# The script becomes the program: same process id, and no mount is left when the program ends. Needs root.
set -eu
# A test may have shortened the program's PATH; this script needs a complete one.
program_path=$PATH
PATH=/usr/sbin:/usr/bin:/sbin:/bin
if [ "${SHEEPGATE_IN_ROOT:-}" != "$$" ]; then
  # unshare becomes the shell that continues below, in this same process.
  SHEEPGATE_IN_ROOT=$$ exec unshare --mount env PATH="$program_path" /bin/sh "$0" "$@"
fi
unset SHEEPGATE_IN_ROOT
root=$1
directory=$2
shared=$3
shift 3
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount --bind /etc/hosts "$root/etc/hosts"
IFS=:
for path in $shared; do
  if [ -d "$path" ]; then mkdir -p "$root$path"; else mkdir -p "$root$(dirname "$path")" && touch "$root$path"; fi
  mount --rbind "$path" "$root$path"
done
unset IFS
exec chroot "$root" env -C "$directory" PATH="$program_path" "$@"
