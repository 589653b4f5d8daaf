#!/bin/sh
# A backup of a disk in use with one command: NAME@now is a snapshot that exists as long as somebody reads it.
#
#   sh examples/backup-now.sh
set -eu

needs="nbdcopy od"
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

say "1. A 64 MiB disk in use"
serve --create disk:64M
start_writer
echo "a writer has made $(writes) writes"

say "2. Copy disk@now, over several connections: they all see the same moment"
before=$(writes)
show nbdcopy --connections=4 "$(uri disk@now)" "$work/backup.img"
went_on() { [ "$(writes)" -gt "$before" ]; }
wait_for went_on
check_one_moment "$work/backup.img"
echo "the writer has made $(($(writes) - before)) writes meanwhile"

say "3. Two backups side by side have a label each"
nbdcopy "$(uri disk@now:nightly)" "$work/nightly.img" &
nightly=$!
nbdcopy "$(uri disk@now:weekly)" "$work/weekly.img"
wait "$nightly"
check_one_moment "$work/nightly.img"
check_one_moment "$work/weekly.img"

say "4. The same without an NBD client, as a sparse file"
show sheepgate export disk@now "$work/exported.img"
check_one_moment "$work/exported.img"

say "5. Nothing is left of it: there is the disk, and no snapshot"
only_disk() { [ "$(sheepgate vdi list | tail -n +2 | wc -l)" -eq 1 ]; }
wait_for only_disk
sheepgate vdi list
