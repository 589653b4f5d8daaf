#!/bin/sh
# qemu's own I/O tool as the client: write patterns, take a snapshot, overwrite, read both back.
#
#   sh examples/qemu-io-session.sh
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
need node qemu-io
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

say "1. A 1 GiB disk, served"
serve --create disk:1G
cat "$work/ready"

say "2. Write a pattern to the first 16 MiB, and another into the middle of it"
show qemu-io -f raw -c 'write -P 0x11 0 16M' -c 'write -P 0x22 5M 64k' -c flush "$(uri disk)"

say "3. A snapshot; qemu need not know"
show sheepgate vdi snapshot disk before

say "4. Overwrite it all"
show qemu-io -f raw -c 'write -P 0x33 0 16M' -c 'discard 12M 4M' -c flush "$(uri disk)"

say "5. The disk has the new patterns, the snapshot the old ones (qemu-io compares every byte)"
verify() {
  printf '$ qemu-io %s\n' "$*"
  qemu-io "$@" >"$work/out"
  cat "$work/out"
  if grep -qi 'verification failed\|error' "$work/out"; then exit 1; fi
}
verify -r -f raw -c 'read -P 0x33 0 12M' -c 'read -P 0 12M 4M' "$(uri disk)"
verify -r -f raw -c 'read -P 0x11 0 5M' -c 'read -P 0x22 5M 64k' -c 'read -P 0x11 6M 10M' "$(uri disk@before)"
show sheepgate vdi list
