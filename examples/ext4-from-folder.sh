#!/bin/sh
# Makes an ext4 disk for any NBD client from a folder of this machine: mkfs.ext4 -d, sheepgate import, serve.
#
#   sh examples/ext4-from-folder.sh [FOLDER]      (default: the sources of sheepgate)
set -eu

needs="nbdinfo mkfs.ext4 e2fsck debugfs truncate diff"
. "$(dirname "$0")/scratch-daemon.inc"

folder=${1:-$root/src}
if [ ! -d "$folder" ]; then
  echo "$0: $folder is not a folder" >&2
  exit 2
fi
folder=$(cd "$folder" && pwd)

say "1. An ext4 image with the content of $folder"
kib=$(du -sk "$folder" | cut -f1)
truncate -s "$((kib / 1024 * 5 / 4 + 64))M" "$work/disk.img"
show mkfs.ext4 -q -F -d "$folder" "$work/disk.img"

say "2. Import the image as the VDI 'disk'; zeros use no space"
show sheepgate import "$work/disk.img" disk
rm "$work/disk.img"

say "3. Serve it, and show what an NBD client sees"
serve
show nbdinfo "$(uri disk)"

say "4. Read the filesystem through NBD"
image=
if [ -e /dev/fuse ] && command -v nbdfuse >/dev/null 2>&1 && command -v fusermount3 >/dev/null 2>&1; then
  : >"$work/fuse.img"
  nbdfuse -r "$work/fuse.img" "$(uri disk)" 2>"$work/fuse.log" &
  fuse=$!
  has_size() { [ -s "$work/fuse.img" ] || ! kill -0 "$fuse" 2>/dev/null; }
  wait_for has_size
  if [ -s "$work/fuse.img" ]; then
    echo "nbdfuse shows the export as the file $work/fuse.img"
    image="$work/fuse.img"
    trap 'fusermount3 -u "$work/fuse.img" || true; wait "$fuse" || true; cleanup' EXIT
  fi
fi
if [ -z "$image" ]; then
  echo "nbdfuse is not available, so a copy is used"
  show sheepgate export disk "$work/copy.img"
  image="$work/copy.img"
fi
show e2fsck -f -n "$image"
show debugfs -R 'ls -l /' "$image" 2>/dev/null

say "5. All files are the same as in the folder"
mkdir "$work/back"
debugfs -R "rdump / $work/back" "$image" >/dev/null 2>&1
rmdir "$work/back/lost+found"
diff -r --no-dereference "$folder" "$work/back"
echo "$(find "$work/back" -type f | wc -l) files, all identical"
