/** Builds the load generators (*load.c, on libnbd, libiscsi or no library) and the slow disk when needed. Owns bench/.build. */
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';

const SOURCE = path.join(import.meta.dirname, 'nbdload.c');
/** Included by two of them. */
const TIMING = path.join(import.meta.dirname, 'load-timing.h');
const SLOW_DISK_SOURCE = path.join(import.meta.dirname, 'slow-disk.c');
/** For LD_PRELOAD. */
export const SLOW_DISK = path.join(import.meta.dirname, '.build/slow-disk.so');
export const NBDLOAD = path.join(import.meta.dirname, '.build/nbdload');
export const ISCSILOAD = path.join(import.meta.dirname, '.build/iscsiload');
export const SHEEPLOAD = path.join(import.meta.dirname, '.build/sheepload');

/** An error that the user of a benchmark gets as one line. */
export class BenchError extends Error {}

/** Errors: BenchError if the compiler or libnbd is missing. */
export function buildNbdload() {
  build(SOURCE, NBDLOAD, ['-lnbd', '-lpthread']);
}

/** Errors: BenchError if the compiler or libiscsi is missing. */
export function buildIscsiload() {
  build(path.join(import.meta.dirname, 'iscsiload.c'), ISCSILOAD, ['-liscsi']);
}

/** Errors: BenchError if the compiler is missing. */
export function buildSheepload() {
  build(path.join(import.meta.dirname, 'sheepload.c'), SHEEPLOAD, []);
}

/** Errors: BenchError if the compiler is missing. */
export function buildSlowDisk() {
  build(SLOW_DISK_SOURCE, SLOW_DISK, ['-shared', '-fPIC', '-ldl']);
}

function build(source, target, options) {
  const built = fs.statSync(target, { throwIfNoEntry: false });
  if (built && [source, TIMING].every((each) => built.mtimeMs >= fs.statSync(each).mtimeMs)) return;
  requireCommand('gcc', 'gcc');
  fs.mkdirSync(path.dirname(target), { recursive: true });
  // Linked under another name first: a build that was interrupted must not look finished.
  const result = spawnSync('gcc', ['-O2', source, '-o', `${target}.new`, ...options], { encoding: 'utf8' });
  if (result.status !== 0) {
    const missing = /(libnbd|iscsi)\.h|-l(nbd|iscsi)/.exec(result.stderr)?.[0];
    const library = missing?.includes('iscsi') ? 'libiscsi' : 'libnbd';
    throw new BenchError(
      missing
        ? `${library} is missing, which ${path.basename(target)} is built on; apt-get install ${library}-dev`
        : `gcc could not build ${source}:\n${result.stderr}`,
    );
  }
  fs.renameSync(`${target}.new`, target);
}

/** Errors: BenchError that names the package. */
export function requireCommand(name, debianPackage) {
  if (!haveCommand(name)) throw new BenchError(`${name} is missing; apt-get install ${debianPackage}`);
}

export function haveCommand(name) {
  return (process.env.PATH ?? '').split(':').some((place) => {
    try {
      fs.accessSync(path.join(place, name), fs.constants.X_OK);
      return place !== '';
    } catch {
      return false;
    }
  });
}
