#!/bin/dash
# The guest's only process: brings up modules and the network (10.0.2.2 is the host's loopback), runs /job, powers off.
# The first serial port connects it with the test: lines starting with "::" are for the test, which answers with lines.
# Not busybox's shell, which prefers its own applets to programs of the same name, among them nbd-client and fallocate.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
load_list() {
  while read -r module; do
    case $module in nbd.ko*) insmod "/modules/$module" nbds_max=4 ;; *) insmod "/modules/$module" ;; esac
  done < "/modules/$1"
}
load_list list
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up

say() { echo "::$*"; }
fail() { say "FAIL $*"; poweroff -f; sleep 60; }
# Loads a module that not every guest needs, and the modules that it needs.
load_module() { [ ! -e "/modules/$1.list" ] || load_list "$1.list"; }
# Waits until the test sends this word.
wait_for() {
  while read -r word < /dev/ttyS0; do [ "$word" = "$1" ] && return 0; done
  fail "the test said nothing"
}
stty -echo < /dev/ttyS0 2>/dev/null
say BOOTED "$(uname -r)"
. /job
say END
poweroff -f
