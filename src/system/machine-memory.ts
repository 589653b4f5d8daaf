/**
 * How much memory this process may use: the machine's, or less where a cgroup (a container, MemoryMax= of a unit) says so.
 * Owns the ways of cgroups, of both versions; what is done with the figure is the daemon's.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';

/** Files that bound a cgroup's memory, by version: cgroups(7). `memory.high` slows a process down instead of ending it. */
const V2_FILES = ['memory.max', 'memory.high'];
const V1_FILES = ['memory.limit_in_bytes'];

/**
 * Bytes. `root` is where /proc and /sys are, for tests. libuv's uv_get_constrained_memory does not look at what is above a
 * process's own cgroup, where the limit of a slice or of a container is.
 */
export function machineMemory(root = '/', total = os.totalmem()): number {
  let least = total;
  for (const [directory, files] of cgroupDirectories(root)) {
    for (const file of files) least = Math.min(least, limitIn(path.join(directory, file)));
  }
  return least;
}

/** Of the process's cgroups and all above them. */
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
    // In a container the path may be that of the host, which is not there: then the container's own is the top.
    for (let at = path.normalize(own); ; at = path.dirname(at)) {
      yield [path.join(mount, at), files];
      if (at === '/' || at === '.') break;
    }
  }
}

/** Infinity: none. */
function limitIn(file: string): number {
  try {
    const text = fs.readFileSync(file, 'utf8').trim();
    return /^\d+$/.test(text) ? Number(text) : Infinity;
  } catch {
    return Infinity;
  }
}
