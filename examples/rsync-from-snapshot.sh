#!/bin/sh
# Copies the files of a disk in use with rsync, without root: nbdfuse shows NAME@now as a file, and fuse2fs mounts the ext4
# filesystem in it. The snapshot ends when both are unmounted. Root can use a loop device instead of fuse2fs.
#
#   sh examples/rsync-from-snapshot.sh
set -eu

needs="mkfs.ext4 nbdfuse fusermount3 rsync diff mountpoint"
. "$(dirname "$0")/scratch-daemon.inc"

if [ ! -e /dev/fuse ]; then
  echo "$0: there is no /dev/fuse, which nbdfuse needs to show an export as a file" >&2
  exit 3
fi
# Without fuse2fs, root mounts through a loop device.
if command -v fuse2fs >/dev/null 2>&1; then
  how=fuse2fs
elif [ "$(id -u)" -eq 0 ] && losetup -f >/dev/null 2>&1; then
  how=loop
else
  echo "$0: fuse2fs is missing, and only root can use loop devices; 'sh test/install.sh' installs fuse2fs" >&2
  exit 3
fi

say "1. A disk with an ext4 filesystem and some files, served"
mkdir "$work/files"
cp -r "$root/src" "$work/files/src"
truncate -s 256M "$work/disk.img"
mkfs.ext4 -q -F -d "$work/files" "$work/disk.img"
sheepgate import "$work/disk.img" disk
rm "$work/disk.img"
serve

say "2. disk@now as a file: the snapshot is taken when nbdfuse opens it"
# nbdfuse never reconnects, so it needs no label. It does not send NBD_CMD_DISC, but the end of its process ends the snapshot.
image="$work/now.img"
mounted="$work/mounted"
mkdir "$mounted"
: >"$image"
release() {
  if mountpoint -q "$mounted"; then
    if [ "$how" = loop ]; then umount "$mounted"; else fusermount3 -u "$mounted"; fi
  fi
  for process in ${fuse2fs:-}; do wait "$process" || true; done
  fuse2fs=
  if [ -n "${nbdfuse:-}" ]; then
    fusermount3 -u "$image" || true
    wait "$nbdfuse" || true
  fi
  nbdfuse=
}
trap 'release; cleanup' EXIT
printf '$ nbdfuse -r %s %s &\n' "$image" "$(uri disk@now)"
nbdfuse -r "$image" "$(uri disk@now)" 2>"$work/nbdfuse.log" &
nbdfuse=$!
is_there() {
  [ -s "$image" ] && return 0
  kill -0 "$nbdfuse" 2>/dev/null && return 1
  cat "$work/nbdfuse.log" >&2
  nbdfuse=
  exit 1
}
wait_for is_there
sheepgate vdi list

say "3. Mount it read-only ($how). Its journal is not replayed: a snapshot cannot be written"
if [ "$how" = loop ]; then
  show mount -t ext4 -o ro,loop,noload "$image" "$mounted"
else
  printf '$ fuse2fs -f -o ro,norecovery %s %s &\n' "$image" "$mounted"
  fuse2fs -f -o ro,norecovery "$image" "$mounted" >"$work/fuse2fs.log" 2>&1 &
  fuse2fs=$!
  is_mounted() {
    mountpoint -q "$mounted" && return 0
    kill -0 "$fuse2fs" 2>/dev/null && return 1
    cat "$work/fuse2fs.log" >&2
    exit 1
  }
  wait_for is_mounted
fi

say "4. Copy with rsync; a second run would copy only what has changed"
mkdir "$work/backup"
show rsync -a --delete --exclude=/lost+found "$mounted/" "$work/backup/"
diff -r "$work/files" "$work/backup"
echo "$(find "$work/backup" -type f | wc -l) files, all identical"

say "5. Unmount: the snapshot ends"
release
only_disk() { [ "$(sheepgate vdi list | tail -n +2 | wc -l)" -eq 1 ]; }
wait_for only_disk
sheepgate vdi list
