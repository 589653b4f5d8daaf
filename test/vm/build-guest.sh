#!/bin/sh
# Makes a Linux guest for the kernel's own NBD client: DIR/vmlinuz and DIR/initramfs.gz, from Debian's kernel package (only
# unpacked) and this machine's programs. Downloads once; a DIR that is complete is left alone. Exit 3: cannot be had here.
set -eu
dir=$1
here=$(cd "$(dirname "$0")" && pwd)
stamp="$dir/stamp"
attach="$here/../../examples/nbd-attach.c"
want=$(cat "$0" "$here/guest-init.sh" "$attach" | cksum)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && exit 0

cannot() { echo "$1" >&2; exit 3; }
for program in qemu-system-x86_64 busybox nbd-client mkfs.ext4 e2fsck rsync cpio gzip modprobe depmod gcc dpkg apt-get; do
  PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null || cannot "$program is not installed"
done
[ "$(dpkg --print-architecture)" = amd64 ] || cannot "the guest is built for amd64 only"
PATH="$PATH:/usr/sbin:/sbin"

mkdir -p "$dir"
cd "$dir"
rm -rf root kernel stamp
set -- linux-image-*-cloud-amd64_*.deb
if [ ! -f "$1" ]; then
  package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
  [ -n "$package" ] || cannot "no linux-image-cloud-amd64 in the package lists (apt-get update?)"
  apt-get download -q "$package" >/dev/null 2>&1 || cannot "cannot download $package"
  set -- linux-image-*-cloud-amd64_*.deb
fi
mkdir kernel
dpkg -x "$1" kernel
cp kernel/boot/vmlinuz-* vmlinuz
version=$(ls kernel/lib/modules)
depmod -b kernel "$version"

mkdir -p root/bin root/modules root/proc root/sys root/dev root/tmp root/run root/mnt root/snap root/etc
ln -s /proc/mounts root/etc/mtab
# In dependency order, each once: insmod in the guest does not look for what is missing.
for module in virtio_pci virtio_net virtio_blk nbd ext4 crc32c_generic; do
  modprobe -d "$dir/kernel" -S "$version" --show-depends "$module" | sed -n 's/^insmod \([^ ]*\).*/\1/p'
done | awk '!seen[$0]++' > modules.paths
: > root/modules/list
while read -r path; do
  cp "$path" root/modules/
  basename "$path" >> root/modules/list
done < modules.paths

cp "$(command -v busybox)" root/bin/busybox
gcc -O2 -o nbd-attach "$attach"
PATH="$PATH:$dir"
for program in nbd-client nbd-attach mkfs.ext4 e2fsck rsync; do
  path=$(command -v "$program")
  cp -L "$path" "root/bin/$program"
  ldd "$path" | grep -o '/[^ ]*' | while read -r library; do
    mkdir -p "root$(dirname "$library")"
    cp -nL "$library" "root$library"
  done
done
cp "$here/guest-init.sh" root/init
chmod +x root/init
(cd root && find . | cpio -o -H newc --quiet | gzip -1) > initramfs.gz
rm -rf root kernel nbd-attach
echo "$want" > "$stamp"
