#!/bin/sh
# Runs a program of a client set (see build-root.sh): in-root.sh ROOT DIRECTORY SHARED[:SHARED…] PROGRAM [ARGUMENT…]
# in DIRECTORY, with /dev, /proc, the network and the SHARED files and directories of this machine under the same paths.
# It becomes the program: the same process id, and nothing is left mounted when it ends. Needs root.
set -eu
# The program's PATH may be one that a test has cut down; this script needs its own.
program_path=$PATH
PATH=/usr/sbin:/usr/bin:/sbin:/bin
if [ "${SHEEPGATE_IN_ROOT:-}" != "$$" ]; then
  # unshare becomes the shell that goes on below, as this very process.
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
