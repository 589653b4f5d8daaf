#!/bin/sh
# qemu's own I/O tool as the client: write patterns, take a snapshot, overwrite, read both back.
#
#   sh examples/qemu-io-session.sh
set -eu

needs="qemu-io"
. "$(dirname "$0")/scratch-daemon.inc"

say "1. A 1 GiB disk, served"
serve --create disk:1G
cat "$work/ready"

say "2. Write a pattern to the first 16 MiB, and another pattern into the middle of it"
show qemu-io -f raw -c 'write -P 0x11 0 16M' -c 'write -P 0x22 5M 64k' -c flush "$(uri disk)"

say "3. Take a snapshot; qemu is not involved"
show sheepgate vdi snapshot disk before

say "4. Overwrite all of it"
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
