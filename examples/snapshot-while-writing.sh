#!/bin/sh
# Takes a snapshot of a disk that is being written, copies it while the writer continues, and deletes it, which frees its space.
#
#   sh examples/snapshot-while-writing.sh
set -eu

needs="nbdcopy od du cmp head"
. "$(dirname "$0")/scratch-daemon.inc"
. "$(dirname "$0")/moment-writer.inc"

used_kib() { du -skc "$SHEEPGATE_STORE/objects" "$SHEEPGATE_STORE/overlays" 2>/dev/null | tail -n 1 | cut -f1; }

say "1. A 64 MiB disk full of data, served"
head -c 64M /dev/urandom >"$work/full.img"
sheepgate import "$work/full.img" disk
serve
start_writer
full=$(used_kib)
echo "a writer has made $(writes) writes; the store has $((full / 1024)) MiB"

say "2. Take a snapshot"
show sheepgate vdi snapshot disk monday

say "3. Copy it; the writer continues"
before=$(writes)
show nbdcopy "$(uri disk@monday)" "$work/monday.img"
went_on() { [ "$(writes)" -gt "$before" ]; }
wait_for went_on
check_one_moment "$work/monday.img"
show nbdcopy "$(uri disk@monday)" "$work/again.img"
cmp "$work/monday.img" "$work/again.img"
echo "the writer has made $(($(writes) - before)) writes meanwhile, and the snapshot is still the same"

say "4. The cost of the snapshot: it keeps the old version of overwritten data, and the new one is stored beside it"
has_grown() { [ "$(used_kib)" -gt $((full + 8)) ]; }
wait_for has_grown
sheepgate vdi list
echo "the store has $(($(used_kib) / 1024)) MiB"

say "5. Delete it: the space is freed, and writes are in place again"
show sheepgate vdi delete disk@monday
is_back() { [ "$(used_kib)" -lt $((full * 11 / 10)) ]; }
wait_for is_back
before=$(writes)
wait_for went_on
echo "the store has $(($(used_kib) / 1024)) MiB, and the writer continues"
