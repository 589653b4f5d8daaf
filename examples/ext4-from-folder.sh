#!/bin/sh
# A folder of this machine becomes an ext4 disk that any NBD client can have: mkfs.ext4 -d, sheepgate import, serve.
#
#   sh examples/ext4-from-folder.sh [FOLDER]      (default: the sources of sheepgate)
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
PATH=$PATH:/usr/sbin:/sbin
say() { printf '\n== %s\n' "$*"; }
show() { printf '$ %s\n' "$*"; "$@"; }
sheepgate() { node "$root/bin/sheepgate.cjs" "$@"; }
need() {
  for tool in "$@"; do
    command -v "$tool" >/dev/null 2>&1 && continue
    echo "$0: $tool is missing; 'sh test/install.sh' installs what the examples use" >&2
    exit 3
  done
}
need node nbdinfo mkfs.ext4 e2fsck debugfs truncate diff
if [ ! -f "$root/dist/cli/main.js" ]; then
  echo "$0: not built yet; run 'npm ci && npm run build' in $root" >&2
  exit 3
fi

# A store and sockets of its own, gone when this ends, however it ends.
work=$(mktemp -d "${TMPDIR:-/tmp}/sheepgate-example.XXXXXX")
export SHEEPGATE_STORE="$work/store"
unset SHEEPGATE_CONTROL
children=
cleanup() {
  for child in $children; do kill "$child" 2>/dev/null || true; done
  for child in $children; do wait "$child" 2>/dev/null || true; done
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# wait_for COMMAND...: until it succeeds, half a minute at most.
wait_for() {
  tries=300
  until "$@"; do
    tries=$((tries - 1))
    if [ "$tries" -eq 0 ]; then
      echo "$0: waited in vain for: $*" >&2
      exit 1
    fi
    sleep 0.1
  done
}

# serve ARGUMENTS...: the daemon in the background, on a unix socket.
serve() {
  node "$root/bin/sheepgate.cjs" serve --listen "unix:$work/nbd.sock" "$@" >"$work/ready" 2>"$work/log" &
  daemon=$!
  children="$children $daemon"
  wait_for daemon_is_ready
}
daemon_is_ready() {
  grep -q Ctrl-C "$work/ready" && return 0
  kill -0 "$daemon" 2>/dev/null && return 1
  cat "$work/log" >&2
  exit 1
}
uri() { echo "nbd+unix:///$1?socket=$work/nbd.sock"; }

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

say "2. The image becomes the VDI 'disk'; what is zeros takes up no space"
show sheepgate import "$work/disk.img" disk
rm "$work/disk.img"

say "3. Serve it, and see what an NBD client sees"
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
  echo "no nbdfuse here, so a copy will do"
  show sheepgate export disk "$work/copy.img"
  image="$work/copy.img"
fi
show e2fsck -f -n "$image"
show debugfs -R 'ls -l /' "$image" 2>/dev/null

say "5. Every file is what it is in the folder"
mkdir "$work/back"
debugfs -R "rdump / $work/back" "$image" >/dev/null 2>&1
rmdir "$work/back/lost+found"
diff -r --no-dereference "$folder" "$work/back"
echo "$(find "$work/back" -type f | wc -l) files, all identical"
