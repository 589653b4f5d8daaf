#!/bin/sh
# Makes a Linux guest for the kernel's own NBD client: build-guest.sh DIR [ROOT] leaves DIR/kernel and DIR/initramfs, from
# Debian's kernel package (only unpacked) and the programs of this machine, or from kernel and programs of the client set in
# ROOT (see ../clients). Downloads once; a complete DIR is left alone. Exit 3: not possible on this machine.
# A guest boots in emulation, where everything costs ten times as much: so what can be done here is done here. The kernel and
# the initramfs are not compressed, and the modules carry no type information (BTF) and no signatures, which the guest would check.
set -eu
dir=$1
root=${2:-}
here=$(cd "$(dirname "$0")" && pwd)
attach="$here/../../examples/nbd-attach.c"
# The kernel modules that each guest loads, those that a job loads when it needs them (load_module in guest-init.sh), and the
# programs. nbd-attach is added to the programs. cmp is here because busybox compares byte by byte.
modules="virtio_pci virtio_net virtio_blk nbd ext4"
more_modules="xfs"
programs="dash busybox cmp nbd-client mkfs.ext4 e2fsck resize2fs mkfs.xfs xfs_repair blkdiscard fallocate rsync"

cannot() { echo "$1" >&2; exit 3; }
here_and_sbin="$PATH:/usr/sbin:/sbin"
places=$here_and_sbin
[ -z "$root" ] || places=/usr/sbin:/usr/bin:/sbin:/bin
# The path of a program of the guest, under ROOT.
path_of() {
  for place in $(echo "$places" | tr : ' '); do
    [ -x "$root$place/$1" ] && echo "$place/$1" && return
  done
  cannot "$1 is not installed${root:+ in $root}"
}
in_root() { if [ -n "$root" ]; then chroot "$root" "$@"; else "$@"; fi; }
for program in qemu-system-x86_64 $programs; do path_of "$program" >/dev/null; done
PATH=$here_and_sbin
for program in cpio xz strip modprobe depmod gcc dpkg apt-get flock; do
  command -v "$program" >/dev/null || cannot "$program is not installed"
done
[ "$(dpkg --print-architecture)" = amd64 ] || cannot "the guest is built for amd64 only"

mkdir -p "$dir"
cd "$dir"
# Several test files start at the same time, and each needs a guest.
exec 9> lock
flock 9
# With the versions of the programs: an upgrade of a program builds the guest again.
want=$( (cat "$here/build-guest.sh" "$here/guest-init.sh" "$attach" "$root/var/lib/dpkg/status" && ls "$root/kernel" 2>/dev/null) | cksum)
[ "$(cat stamp 2>/dev/null)" = "$want" ] && exit 0

rm -rf work stamp
mkdir work
if [ -n "$root" ]; then
  set -- "$root"/kernel/*.deb
  [ -f "$1" ] || cannot "no kernel package in $root/kernel"
else
  set -- linux-image-*-cloud-amd64_*.deb
  if [ ! -f "$1" ]; then
    package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
    [ -n "$package" ] || cannot "no linux-image-cloud-amd64 in the package lists (apt-get update?)"
    apt-get download -q "$package" >/dev/null 2>&1 || cannot "cannot download $package"
    set -- linux-image-*-cloud-amd64_*.deb
  fi
fi
for package in "$@"; do dpkg -x "$package" work/kernel; done
# Later releases have all files below usr/.
[ -e work/kernel/lib ] || ln -s usr/lib work/kernel/lib
version=$(ls work/kernel/lib/modules)
for image in "boot/vmlinuz-$version" "lib/modules/$version/vmlinuz"; do
  [ ! -f "work/kernel/$image" ] || cp "work/kernel/$image" work/vmlinuz
done
[ -f work/vmlinuz ] || cannot "no kernel image in $*"
depmod -b work/kernel "$version"

# The kernel inside vmlinuz (Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length). qemu boots it
# directly if it has an entry for PVH. Without it, or without a program that unpacks it, the guest boots vmlinuz.
field() { od -An -t "u$2" -j "$1" -N "$2" work/vmlinuz | tr -d ' '; }
unpack_kernel() {
  grep -qx CONFIG_PVH=y "work/kernel/boot/config-$version" "work/kernel/lib/modules/$version/config" 2>/dev/null || return 1
  start=$((($(field 497 1) + 1) * 512 + $(field 584 4)))
  length=$(field 588 4)
  # The size of the kernel follows the compressed data; only gzip takes it for its own.
  size=$(field $((start + length - 4)) 4)
  case $(od -An -t x1 -j "$start" -N 4 work/vmlinuz | tr -d ' ') in
    02214c18) unpack=lz4 ;;
    28b52ffd) unpack=zstd ;;
    fd377a58) unpack=xz ;;
    1f8b*) unpack=gzip length=$((length + 4)) ;;
    *) return 1 ;;
  esac
  command -v "$unpack" >/dev/null || return 1
  tail -c "+$((start + 1))" work/vmlinuz | head -c $((length - 4)) | "$unpack" -dc > work/vmlinux || return 1
  [ "$(wc -c < work/vmlinux)" -eq "$size" ]
}
kernel=vmlinuz
! unpack_kernel || kernel=vmlinux

guest=work/root
for directory in bin modules proc sys dev tmp run mnt snap etc; do mkdir -p "$guest/$directory"; done
ln -s /proc/mounts "$guest/etc/mtab"
# The modules that a module needs, and itself, in order; nothing if it is built in.
needs() { modprobe -d "$dir/work/kernel" -S "$version" --show-depends "$1" > work/needs && sed -n 's/^insmod \([^ ]*\).*/\1/p' work/needs; }
# Copies the modules and writes LIST with their names, in this order, each once: insmod does not resolve dependencies.
copy_modules() {
  list=$guest/modules/$1
  shift
  : > work/paths
  for module in "$@"; do needs "$module" >> work/paths || cannot "no module $module for Linux $version"; done
  awk '!seen[$0]++' work/paths | while read -r path; do
    name=$(basename "$path" .xz)
    [ ! -e "$guest/modules/$name" ] || continue
    case $path in *.xz) xz -dc "$path" > "$guest/modules/$name" ;; *) cp "$path" "$guest/modules/$name" ;; esac
    strip --strip-debug -R .BTF "$guest/modules/$name"
    echo "$name" >> "$list"
  done
}
# shellcheck disable=SC2086  # a list of words
copy_modules list $modules
for module in $more_modules; do copy_modules "$module.list" "$module"; done

for program in $programs; do
  path=$(path_of "$program")
  cp -L "$root$path" "$guest/bin/$program"
  # Fails for what is linked statically.
  in_root ldd "$path" > work/libraries 2>/dev/null || continue
  grep -o '/[^ ]*' work/libraries | while read -r library; do
    mkdir -p "$guest$(dirname "$library")"
    [ -e "$guest$library" ] || cp -L "$root$library" "$guest$library"
  done
done
# Static, for any C library of the guest. The linker warns that looking up host names needs shared libraries; we use numbers.
gcc -O2 -static -o "$guest/bin/nbd-attach" "$attach" 2> work/warnings || { cat work/warnings >&2; exit 1; }
cp "$here/guest-init.sh" "$guest/init"
chmod +x "$guest/init"
(cd "$guest" && find . | cpio -o -H newc --quiet) > work/initramfs
mv "work/$kernel" kernel
mv work/initramfs .
rm -rf work vmlinuz initramfs.gz
echo "$want" > stamp
