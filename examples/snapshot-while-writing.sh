#!/bin/sh
# A snapshot of a disk that is being written, copied out while the writing goes on, then deleted: its space comes back.
#
#   sh examples/snapshot-while-writing.sh
set -eu

needs="nbdcopy od du cmp head"
. "$(dirname "$0")/scratch-daemon.inc"

# The writer: random 4 KiB writes, and after every hundred of them a number that goes up, first into the first block of
# the disk, then into the last. A copy is of one moment if both ends have the same number, or the first is one ahead.
cat >"$work/writer.mjs" <<'END'
import fs from 'node:fs';
import { NbdClient } from 'nbd-server-ts';
const client = await NbdClient.connect({ path: process.env.SOCKET });
const { size } = await client.go('disk');
const block = Buffer.alloc(4096);
const blocks = size / block.length - 2;
for (let number = 1; ; number++) {
  for (let i = 0; i < 100; i++) await client.write((1 + Math.floor(Math.random() * blocks)) * block.length, block.fill(i));
  block.writeUInt32LE(number);
  await client.write(0, block);
  await client.write(size - block.length, block);
  fs.writeFileSync(`${process.env.COUNT}.new`, String(number * 102));
  fs.renameSync(`${process.env.COUNT}.new`, process.env.COUNT);
}
END
start_writer() {
  (cd "$root" && SOCKET="$work/nbd.sock" COUNT="$work/count" exec node --input-type=module - <"$work/writer.mjs") &
  children="$children $!"
  wait_for test -s "$work/count"
}
writes() { cat "$work/count"; }
number_at() { od -An -tu4 -j "$2" -N 4 "$1" | tr -d ' '; }
check_one_moment() {
  last=$(($(wc -c <"$1") - 4096))
  first=$(number_at "$1" 0)
  behind=$((first - $(number_at "$1" "$last")))
  if [ "$behind" -ne 0 ] && [ "$behind" -ne 1 ]; then
    echo "$0: the copy is not of one moment: its ends are $behind apart" >&2
    exit 1
  fi
  echo "the copy is of one moment: its first block has number $first, its last $((first - behind))"
}

used_kib() { du -sk "$SHEEPGATE_STORE/objects" | cut -f1; }

say "1. A 64 MiB disk full of data, served"
head -c 64M /dev/urandom >"$work/full.img"
sheepgate import "$work/full.img" disk
serve
start_writer
full=$(used_kib)
echo "a writer has made $(writes) writes; the store has $((full / 1024)) MiB"

say "2. Take a snapshot"
show sheepgate vdi snapshot disk monday

say "3. Copy it out; the writer goes on"
before=$(writes)
show nbdcopy "$(uri disk@monday)" "$work/monday.img"
went_on() { [ "$(writes)" -gt "$before" ]; }
wait_for went_on
check_one_moment "$work/monday.img"
show nbdcopy "$(uri disk@monday)" "$work/again.img"
cmp "$work/monday.img" "$work/again.img"
echo "the writer has made $(($(writes) - before)) writes meanwhile, and the snapshot is still the same"

say "4. What the snapshot costs: the old version of what was overwritten"
is_doubled() { [ "$(used_kib)" -gt $((full * 19 / 10)) ]; }
wait_for is_doubled
sheepgate vdi list
echo "the store has $(($(used_kib) / 1024)) MiB"

say "5. Delete it: the space comes back, and writes are in place again"
show sheepgate vdi delete disk@monday
is_back() { [ "$(used_kib)" -lt $((full * 11 / 10)) ]; }
wait_for is_back
before=$(writes)
wait_for went_on
echo "the store has $(($(used_kib) / 1024)) MiB, and the writer goes on"
