/** Attributes of a block device in /sys/dev/block, which fstat does not report. Owns the path from a device number to them. */
import fs from 'node:fs';

/** Device numbers have a high and a low half (makedev(3)). */
const HIGH = 2 ** 32;

/** One attribute of the device with this number; undefined if the kernel does not report it. */
export function blockDeviceAttribute(rdev: number, name: string): string | undefined {
  const high = Math.floor(rdev / HIGH);
  const low = rdev % HIGH;
  const major = ((low >>> 8) & 0xfff) | (high & ~0xfff);
  const minor = (low & 0xff) | ((low >>> 12) & 0xfff00);
  try {
    return fs.readFileSync(`/sys/dev/block/${major}:${minor}/${name}`, 'utf8').trim();
  } catch {
    return undefined;
  }
}
