#!/bin/sh
# Puts the Python code of Debian's package virtnbdbackup into a directory, without libvirt and all else that it depends on:
# unpack-virtnbdbackup.sh DIR. The tests use its reading of extents (test/e2e/backup-tools.test.ts).
set -eu
dir=$1
[ -e "$dir/usr/lib/python3/dist-packages/libvirtnbdbackup" ] && exit 0
mkdir -p "$dir"
cd "$dir"
apt-get download -qq -o APT::Sandbox::User=root virtnbdbackup
dpkg -x virtnbdbackup_*.deb .
rm virtnbdbackup_*.deb
