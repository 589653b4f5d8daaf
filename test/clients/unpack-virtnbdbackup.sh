#!/bin/sh
# Unpacks the Python code of Debian's package virtnbdbackup into a directory, without its dependencies such as libvirt:
# unpack-virtnbdbackup.sh DIR. The tests use its code that reads extents (test/e2e/backup-tools.test.ts).
set -eu
dir=$1
[ -e "$dir/usr/lib/python3/dist-packages/libvirtnbdbackup" ] && exit 0
mkdir -p "$dir"
cd "$dir"
apt-get download -qq -o APT::Sandbox::User=root virtnbdbackup
dpkg -x virtnbdbackup_*.deb .
rm virtnbdbackup_*.deb
