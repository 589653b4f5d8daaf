#!/bin/sh
# A backup of a disk in use with one command: NAME@now is a snapshot that exists while a client reads it.
#
#   sh examples/backup-now.sh
set -eu

needs="nbdcopy od"
. "$(dirname "$0")/scratch-daemon.inc"
. "$(dirname "$0")/moment-writer.inc"

say "1. A 64 MiB disk in use"
serve --create disk:64M
start_writer
echo "a writer has made $(writes) writes"

# Use a new label for each run: a copy that must reconnect finds the same snapshot under its label, or gets an error.
run=$(date +%Y%m%dT%H%M%S)-$$

say "2. Copy disk@now over several connections, which all see the same moment"
before=$(writes)
show nbdcopy --connections=4 "$(uri "disk@now:$run")" "$work/backup.img"
went_on() { [ "$(writes)" -gt "$before" ]; }
wait_for went_on
check_one_moment "$work/backup.img"
echo "the writer has made $(($(writes) - before)) writes meanwhile"

say "3. Two backups at the same time, each with its own label"
nbdcopy "$(uri "disk@now:nightly-$run")" "$work/nightly.img" &
nightly=$!
nbdcopy "$(uri "disk@now:weekly-$run")" "$work/weekly.img"
wait "$nightly"
check_one_moment "$work/nightly.img"
check_one_moment "$work/weekly.img"

say "4. The same without an NBD client, as a sparse file"
show sheepgate export disk@now "$work/exported.img"
check_one_moment "$work/exported.img"

say "5. No snapshot is left, only the disk"
only_disk() { [ "$(sheepgate vdi list | tail -n +2 | wc -l)" -eq 1 ]; }
wait_for only_disk
sheepgate vdi list
