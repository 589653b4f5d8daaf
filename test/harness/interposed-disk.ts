/**
 * A disk between the code and the real disk: every call goes to a hook, which makes the call, changes it, or answers instead.
 * Knows the file of each descriptor. Recording and failing disks are built on this.
 */
import path from 'node:path';
import type { HostDisk } from '../../src/system/disk.js';

export interface DiskCall {
  readonly name: keyof HostDisk;
  readonly args: readonly unknown[];
  /** The first path argument, or the path of the first descriptor; '' if there is none. */
  readonly file: string;
}

/** Returns the result for the caller; `proceed` makes the call. */
export type Hook = (call: DiskCall, proceed: () => unknown) => unknown;

/** Calls whose first argument is a descriptor. */
const BY_DESCRIPTOR = new Set<string>([
  ...['close', 'closeSync', 'tryLockSync', 'read', 'readSync', 'readCachedSync', 'write', 'writeSync', 'truncate'],
  ...['truncateSync', 'punchHole', 'zeroRange', 'canPunchHoleSync', 'canZeroRangeSync', 'reserveSync', 'nextData'],
  ...['nextHole', 'clone', 'copyRange', 'willNeed', 'dropCached', 'fdatasync', 'fsync', 'fsyncSync', 'syncfs'],
  ...['openDatabase', 'commit', 'closeDatabase', 'fstatSync', 'inodeOfSync'],
]);

/** Open files, by descriptor. */
export class OpenPaths {
  readonly #paths = new Map<number, string>();

  set(fd: number, file: string): void {
    this.#paths.set(fd, file);
  }

  delete(fd: number): void {
    this.#paths.delete(fd);
  }

  /** Files open under the old name get the new one. */
  rename(from: string, to: string): void {
    for (const [fd, file] of this.#paths) if (file === from) this.#paths.set(fd, to);
  }

  of(fd: unknown): string {
    return this.#paths.get(fd as number) ?? '';
  }

  /** Resolves names through an open directory (/proc/self/fd/7/name). */
  resolve(file: string): string {
    const found = /^\/proc\/self\/fd\/(\d+)\/(.*)$/.exec(file);
    return path.resolve(found ? path.join(this.of(Number(found[1])), found[2] ?? '') : file);
  }
}

export function interpose(real: HostDisk, hook: Hook, paths = new OpenPaths()): HostDisk {
  return new Proxy(real, {
    get: (target, name) => {
      const method: unknown = Reflect.get(target, name);
      if (typeof method !== 'function') return method;
      return (...args: unknown[]) => {
        const [first] = args;
        const isByDescriptor = BY_DESCRIPTOR.has(String(name));
        const file = isByDescriptor ? paths.of(first) : typeof first === 'string' ? paths.resolve(first) : '';
        // Before the call: another file may get the number as soon as it is free.
        if (name === 'close' || name === 'closeSync') paths.delete(first as number);
        const proceed = (): unknown => method.apply(target, args);
        const result = hook({ name: name as keyof HostDisk, args, file }, proceed);
        if (name === 'openSync') paths.set(result as number, file);
        if (name === 'rename' || name === 'renameSync') paths.rename(file, paths.resolve(String(args[1])));
        if (name !== 'open') return result;
        return (result as Promise<number>).then((fd) => {
          paths.set(fd, file);
          return fd;
        });
      };
    },
  });
}
