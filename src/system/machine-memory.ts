/**
 * How much memory this process may use: the machine's, or less if a cgroup limits it (a container, MemoryMax= of a unit).
 * Owns the paths and files of cgroups, of both versions; the daemon decides what to do with the figure.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';

/** Files that limit a cgroup's memory, by version: cgroups(7). `memory.high` slows a process down instead of ending it. */
const V2_FILES = ['memory.max', 'memory.high'];
const V1_FILES = ['memory.limit_in_bytes'];

/**
 * In bytes. `root`: where /proc and /sys are, for tests. libuv's uv_get_constrained_memory looks at the process's own cgroup
 * only; the limit of a slice or a container is on a cgroup above it.
 */
export function machineMemory(root = '/', total = os.totalmem()): number {
  let least = total;
  for (const [directory, files] of cgroupDirectories(root)) {
    for (const file of files) least = Math.min(least, limitIn(path.join(directory, file)));
  }
  return least;
}

/** The directories of the process's cgroups and of all cgroups above them, each with its limit files. */
function* cgroupDirectories(root: string): Generator<readonly [string, readonly string[]]> {
  let lines: string[];
  try {
    lines = fs.readFileSync(path.join(root, 'proc/self/cgroup'), 'utf8').split('\n');
  } catch {
    return;
  }
  for (const line of lines) {
    // HIERARCHY:CONTROLLERS:PATH; hierarchy 0 is version 2.
    const [, hierarchy, controllers, own] = /^(\d+):([^:]*):(\/.*)$/.exec(line) ?? [];
    if (hierarchy === undefined || controllers === undefined || own === undefined) continue;
    const isV1 = controllers.split(',').includes('memory');
    if (hierarchy !== '0' && !isV1) continue;
    const mount = path.join(root, isV1 ? 'sys/fs/cgroup/memory' : 'sys/fs/cgroup');
    const files = isV1 ? V1_FILES : V2_FILES;
    // In a container the path may be the host's and not exist here: then the container's own cgroup is the top directory.
    for (let at = path.normalize(own); ; at = path.dirname(at)) {
      yield [path.join(mount, at), files];
      if (at === '/' || at === '.') break;
    }
  }
}

/** In bytes; Infinity if there is no limit. */
function limitIn(file: string): number {
  try {
    const text = fs.readFileSync(file, 'utf8').trim();
    return /^\d+$/.test(text) ? Number(text) : Infinity;
  } catch {
    return Infinity;
  }
}
