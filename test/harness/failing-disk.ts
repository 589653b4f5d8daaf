/**
 * A disk that fails, waits or answers wrongly by the rules of a test, and is the real disk otherwise. A rule applies to calls of
 * some names on matching files; the newest rule that applies wins.
 */
import os from 'node:os';
import { getSystemErrorMap } from 'node:util';
import type { HostDisk } from '../../src/system/disk.js';
import { hostDisk } from '../../src/system/real-disk.js';
import { interpose, type DiskCall, type Hook } from './interposed-disk.js';

type Call = keyof HostDisk;

/** Calls that write a file, sync one, or sync the names in a directory. */
export const WRITES: readonly Call[] = ['write', 'writeSync'];
export const READS: readonly Call[] = ['read', 'readSync', 'readCachedSync'];
export const SYNCS: readonly Call[] = ['fdatasync', 'fsync', 'fsyncSync'];

export interface Rule {
  /** Calls to which it has applied. */
  readonly count: number;
  /** The files of those calls. */
  readonly files: readonly string[];
  off(): void;
}

interface Where {
  readonly calls: readonly Call[];
  /** Matches the path; without it all files match. */
  readonly file?: RegExp;
  /** How often the rule applies; without it always. */
  readonly times?: number;
}

/** The kernel's error of a call of the seam. LMDB's errors have the number as code. */
export function systemError(code: keyof typeof os.constants.errno, call: Call): NodeJS.ErrnoException {
  const errno = os.constants.errno[code];
  const [, text = code] = getSystemErrorMap().get(-errno) ?? [];
  if (call === 'commit' || call === 'openDatabase' || call === 'closeDatabase')
    return Object.assign(new Error(text), { code: errno as unknown as string });
  const syscall = call.replace(/Sync$/, '');
  return Object.assign(new Error(`${code}: ${text}, ${syscall}`), { code, errno: -errno, syscall });
}

export class FailingDisk {
  readonly disk: HostDisk;
  readonly #rules: ((call: DiskCall) => Hook | undefined)[] = [];

  constructor(real: HostDisk = hostDisk) {
    this.disk = interpose(real, (call, proceed) => {
      for (const rule of this.#rules) {
        const hook = rule(call);
        if (hook) return hook(call, proceed);
      }
      return proceed();
    });
  }

  /** `hook` replaces the calls. */
  instead({ calls, file, times = Infinity }: Where, hook: Hook): Rule {
    const files: string[] = [];
    const applies = (call: DiskCall): Hook | undefined => {
      if (!calls.includes(call.name) || (file && !file.test(call.file)) || files.length >= times) return undefined;
      files.push(call.file);
      return hook;
    };
    this.#rules.unshift(applies);
    return {
      get count() {
        return files.length;
      },
      files,
      off: () => {
        const at = this.#rules.indexOf(applies);
        if (at >= 0) this.#rules.splice(at, 1);
      },
    };
  }

  /** The calls fail, and are not made. */
  fail(where: Where, code: keyof typeof os.constants.errno): Rule {
    return this.instead(where, ({ name }) => {
      const error = systemError(code, name);
      if (isSync(name)) throw error;
      return Promise.reject(error);
    });
  }

  /** Asynchronous calls wait for `release`. `reached` resolves with the first one. */
  hold(where: Where): Rule & { readonly reached: Promise<void>; release(): void } {
    let release!: () => void;
    const released = new Promise<void>((resolve) => (release = resolve));
    let reach!: () => void;
    const reached = new Promise<void>((resolve) => (reach = resolve));
    const rule = this.instead(where, (_, proceed) => {
      reach();
      return released.then(proceed);
    });
    return Object.assign(Object.create(rule) as Rule, {
      reached,
      release: () => {
        rule.off();
        release();
      },
    });
  }
}

function isSync(name: Call): boolean {
  return name.endsWith('Sync') || name === 'openDatabase' || name === 'bootId';
}
