/** What Linux tells of a block device in /sys/dev/block, which fstat does not. Owns the way from a device number to there. */
import fs from 'node:fs';

/** As of makedev(3): a part of each number is above the others. */
const HIGH = 2 ** 32;

/** One attribute of the device with this number; undefined where the kernel does not tell it. */
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
