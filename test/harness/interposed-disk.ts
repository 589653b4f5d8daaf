/**
 * A disk between the code and the real one: every call is shown to a hook, which lets it go on, changes it, or answers in its
 * place. Knows which file a descriptor is of. Recording and failing disks are made of this.
 */
import path from 'node:path';
import type { HostDisk } from '../../src/system/disk.js';

export interface DiskCall {
  readonly name: keyof HostDisk;
  readonly args: readonly unknown[];
  /** The path that is named first, or that the first descriptor was opened by; '' where there is none. */
  readonly file: string;
}

/** Returns what the caller is to get; `proceed` makes the call. */
export type Hook = (call: DiskCall, proceed: () => unknown) => unknown;

/** Calls whose first argument is a descriptor. */
const BY_DESCRIPTOR = new Set<string>([
  ...['close', 'closeSync', 'tryLockSync', 'read', 'readSync', 'readCachedSync', 'write', 'writeSync', 'truncate'],
  ...['truncateSync', 'punchHole', 'zeroRange', 'canPunchHoleSync', 'canZeroRangeSync', 'reserveSync', 'nextData'],
  ...['nextHole', 'clone', 'copyRange', 'willNeed', 'dropCached', 'fdatasync', 'fsync', 'fsyncSync', 'syncfs'],
  ...['openDatabase', 'commit', 'closeDatabase', 'fstatSync', 'inodeOfSync'],
]);

/** The files that are open, by descriptor. */
export class OpenPaths {
  readonly #paths = new Map<number, string>();

  set(fd: number, file: string): void {
    this.#paths.set(fd, file);
  }

  delete(fd: number): void {
    this.#paths.delete(fd);
  }

  /** Whatever is open under the old name is found under the new one. */
  rename(from: string, to: string): void {
    for (const [fd, file] of this.#paths) if (file === from) this.#paths.set(fd, to);
  }

  of(fd: unknown): string {
    return this.#paths.get(fd as number) ?? '';
  }

  /** Names by way of a directory that is open (/proc/self/fd/7/name) as they are without it. */
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
        // Before the call: another file may have the number as soon as it is free.
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
