/** The load generator (nbdload.c, on libnbd), built when it is needed. Owns bench/.build. */
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';

const SOURCE = path.join(import.meta.dirname, 'nbdload.c');
export const NBDLOAD = path.join(import.meta.dirname, '.build/nbdload');

/** What whoever runs a benchmark is told in one line. */
export class BenchError extends Error {}

/** Errors: BenchError if the compiler or libnbd is missing. */
export function buildNbdload() {
  const built = fs.statSync(NBDLOAD, { throwIfNoEntry: false });
  if (built && built.mtimeMs >= fs.statSync(SOURCE).mtimeMs) return;
  requireCommand('gcc', 'gcc');
  fs.mkdirSync(path.dirname(NBDLOAD), { recursive: true });
  // Linked under another name first: a build that was interrupted must not look finished.
  const result = spawnSync('gcc', ['-O2', SOURCE, '-o', `${NBDLOAD}.new`, '-lnbd', '-lpthread'], { encoding: 'utf8' });
  if (result.status !== 0) {
    const isHeaderMissing = /libnbd\.h|-lnbd/.test(result.stderr);
    throw new BenchError(
      isHeaderMissing
        ? 'libnbd is missing, which the load generator is built on; apt-get install libnbd-dev'
        : `gcc could not build ${SOURCE}:\n${result.stderr}`,
    );
  }
  fs.renameSync(`${NBDLOAD}.new`, NBDLOAD);
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
