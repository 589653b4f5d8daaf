#!/bin/sh
# Runs a program of a client set (see build-root.sh): in-root.sh ROOT DIRECTORY SHARED[:SHARED…] PROGRAM [ARGUMENT…]
# in DIRECTORY, with /dev, /proc, the network and the SHARED files and directories of this machine under the same paths.
# The script becomes the program: same process id, and no mount is left when the program ends. Needs root.
# It runs before each command of a client set: it starts as few processes as it can.
set -eu
if [ "${SHEEPGATE_IN_ROOT:-}" != "$$" ]; then
  # unshare becomes the shell that continues below, in this same process.
  # A test may have shortened the program's PATH; this script needs a complete one.
  export SHEEPGATE_IN_ROOT=$$ SHEEPGATE_PROGRAM_PATH="$PATH" PATH=/usr/sbin:/usr/bin:/sbin:/bin
  exec unshare --mount /bin/sh "$0" "$@"
fi
program_path=$SHEEPGATE_PROGRAM_PATH
unset SHEEPGATE_IN_ROOT SHEEPGATE_PROGRAM_PATH
root=$1
directory=$2
shared=$3
shift 3
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount --bind /etc/hosts "$root/etc/hosts"
IFS=:
for path in $shared; do
  if [ -d "$path" ]; then
    [ -d "$root$path" ] || mkdir -p "$root$path"
  elif [ ! -e "$root$path" ]; then
    mkdir -p "$root$(dirname "$path")"
    touch "$root$path"
  fi
  mount --rbind "$path" "$root$path"
done
unset IFS
export PATH="$program_path"
exec /usr/bin/unshare --root="$root" --wd="$directory" -- "$@"
