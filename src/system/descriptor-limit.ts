/** How many descriptors this process may have open. Node raises the soft limit to the hard limit when it starts. */
import fs from 'node:fs';

/** RLIMIT_NOFILE as the kernel reports it; undefined without procfs. */
export function descriptorLimit(): number | undefined {
  try {
    const line = /^Max open files\s+(\d+)/m.exec(fs.readFileSync('/proc/self/limits', 'utf8'));
    const limit = Number(line?.[1]);
    return limit > 0 ? limit : undefined;
  } catch {
    return undefined;
  }
}
