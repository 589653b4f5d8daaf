/** The id that the kernel gives to each boot of the machine: the one place that reads it. */
import fs from 'node:fs';

let known: string | undefined;

/** A UUID; undefined where there is no procfs. */
export function bootIdOfKernel(): string | undefined {
  try {
    known ??= fs.readFileSync('/proc/sys/kernel/random/boot_id', 'latin1').trim();
  } catch {
    // No procfs.
  }
  return known;
}
