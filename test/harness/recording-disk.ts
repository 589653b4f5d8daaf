/**
 * A disk that records every change in one directory, every sync, and every commit of LMDB with its written pages: enough to
 * build the states in which a power loss can leave the directory. Owns the model of files and names that builds such a state
 * (`build`). Changes outside the directory are not recorded.
 */
import fs from 'node:fs';
import path from 'node:path';
import { O_CREAT, O_TRUNC, type HostDisk } from '../../src/system/disk.js';
import { hostDisk } from '../../src/system/real-disk.js';
import { interpose, OpenPaths, type DiskCall } from './interposed-disk.js';

/** A file or directory, independent of its name. */
type Id = number;

export type Change =
  | { readonly op: 'create'; readonly id: Id; readonly path: string; readonly kind: 'file' | 'directory' }
  | { readonly op: 'link'; readonly id: Id; readonly path: string; readonly target: string }
  | { readonly op: 'rename'; readonly id: Id; readonly from: string; readonly path: string }
  | { readonly op: 'unlink'; readonly id: Id; readonly path: string }
  /** `data` is a copy. */
  | { readonly op: 'write'; readonly id: Id; readonly path: string; readonly offset: number; readonly data: Buffer }
  | { readonly op: 'resize'; readonly id: Id; readonly path: string; readonly size: number }
  | { readonly op: 'zero'; readonly id: Id; readonly path: string; readonly offset: number; readonly length: number }
  /** The content of file `from` in that range, at the moment `begun`. */
  | {
      readonly op: 'copy';
      readonly id: Id;
      readonly path: string;
      readonly from: Id;
      readonly offset: number;
      readonly length: number;
    }
  /** LMDB has written these pages, by number, and the file has `size` bytes. */
  | {
      readonly op: 'commit' | 'database';
      readonly id: Id;
      readonly path: string;
      readonly pages: ReadonlyMap<number, Buffer>;
      readonly size: number;
    }
  /** Data and size of a file. */
  | { readonly op: 'sync'; readonly id: Id; readonly path: string }
  /** The names in a directory. */
  | { readonly op: 'sync names'; readonly id: Id; readonly path: string }
  | { readonly op: 'sync all'; readonly id: Id; readonly path: string };

/** Paths are relative to the directory; '.' is the directory itself. */
export type Recorded = Change & {
  /** Events may overlap: an event that ended before another began comes before it. One that never ended has failed. */
  readonly begun: number;
  readonly ended: number;
};

const DATABASE_PAGE = 4096;
/** Longer than any file: a clone copies all of it. */
const WHOLE = Number.MAX_SAFE_INTEGER;

export class RecordingDisk {
  readonly disk: HostDisk;
  readonly events: Recorded[] = [];
  readonly #root: string;
  readonly #paths = new OpenPaths();
  /** Files and directories with a name. */
  readonly #names = new Map<string, Id>();
  readonly #open = new Map<number, Id>();
  readonly #directories = new Set<Id>();
  readonly #databases = new Map<Id, Buffer>();
  #lastId = 0;
  #clock = 0;

  /** Present content of `directory` counts as durable. */
  constructor(directory: string, real: HostDisk = hostDisk) {
    this.#root = path.resolve(directory);
    this.disk = interpose(real, (call, proceed) => this.#record(call, proceed), this.#paths);
    if (fs.existsSync(this.#root)) this.#take('.');
  }

  /** The events since the last call as lines "op path", in the order in which they began. */
  takeLines(): string[] {
    const lines = this.events.slice(this.#taken).map(({ op, path: at }) => `${op} ${at}`);
    this.#taken = this.events.length;
    return lines;
  }
  #taken = 0;

  #take(relative: string): void {
    const full = path.join(this.#root, relative);
    const status = fs.lstatSync(full);
    const at = { begun: 0, ended: 0, path: relative, id: ++this.#lastId };
    this.#names.set(relative, at.id);
    if (status.isDirectory()) {
      this.#directories.add(at.id);
      this.events.push({ op: 'create', kind: 'directory', ...at });
      for (const name of fs.readdirSync(full)) this.#take(path.join(relative, name));
    } else if (status.isFile()) {
      this.events.push({ op: 'create', kind: 'file', ...at });
      this.events.push({ op: 'write', offset: 0, data: fs.readFileSync(full), ...at });
    }
    this.#taken = this.events.length;
  }

  /** Undefined if it is outside. */
  #relative(file: string): string | undefined {
    const relative = path.relative(this.#root, file);
    if (relative === '') return '.';
    return relative.startsWith('..') ? undefined : relative;
  }

  #record(call: DiskCall, proceed: () => unknown): unknown {
    const { name, args } = call;
    const fd = args[0] as number;
    if (name === 'close' || name === 'closeSync') this.#open.delete(fd);
    if (name === 'open' || name === 'openSync') return this.#recordOpen(call, proceed);
    const id = typeof fd === 'number' ? this.#open.get(fd) : undefined;
    if (id !== undefined && (name === 'commit' || name === 'openDatabase' || name === 'closeDatabase'))
      return this.#recordDatabase(call, id, proceed);
    const changes = id === undefined ? this.#nameChanges(call) : this.#dataChanges(call, id);
    if (changes.length === 0) return proceed();
    return this.#during(changes, proceed, (result) => {
      const [first] = changes;
      // The written part, if it is shorter.
      if (first?.op === 'write' && typeof result === 'number')
        Object.assign(first, { data: first.data.subarray(0, result) });
      if (first?.op === 'copy' && name === 'copyRange') Object.assign(first, { length: Math.max(0, result as number) });
    });
  }

  /** Record `changes` as begun, and as ended when the call has succeeded. */
  #during(
    changes: readonly Change[],
    proceed: () => unknown,
    done: (result: unknown) => void = () => undefined,
  ): unknown {
    const events = changes.map((change) => Object.assign(change, { begun: ++this.#clock, ended: Infinity }));
    this.events.push(...events);
    const succeeded = <T>(result: T): T => {
      done(result);
      for (const event of events) Object.assign(event, { ended: ++this.#clock });
      return result;
    };
    const result = proceed();
    return result instanceof Promise ? result.then(succeeded) : succeeded(result);
  }

  #recordOpen({ args, file }: DiskCall, proceed: () => unknown): unknown {
    const flags = args[1] as number;
    const relative = this.#relative(file);
    if (relative === undefined) return proceed();
    const known = this.#names.get(relative);
    const opened = (id: Id | undefined): ((fd: unknown) => void) => {
      return (fd) => {
        if (id !== undefined) this.#open.set(fd as number, id);
      };
    };
    if (known === undefined) {
      if ((flags & O_CREAT) === 0) return proceed();
      const change: Change = { op: 'create', kind: 'file', id: ++this.#lastId, path: relative };
      return this.#during([change], proceed, (fd) => {
        this.#names.set(relative, change.id);
        opened(change.id)(fd);
      });
    }
    const truncated: Change[] = (flags & O_TRUNC) === 0 ? [] : [{ op: 'resize', id: known, path: relative, size: 0 }];
    return this.#during(truncated, proceed, opened(known));
  }

  #dataChanges({ name, args, file }: DiskCall, id: Id): Change[] {
    const at = { id, path: this.#relative(file) ?? file };
    const [, second, third, fourth] = args as [number, unknown, number, number];
    switch (name) {
      case 'write':
        return [{ op: 'write', ...at, offset: fourth, data: Buffer.from((second as Buffer).subarray(third)) }];
      case 'writeSync':
        return [{ op: 'write', ...at, offset: third, data: Buffer.from(second as Buffer) }];
      case 'truncate':
      case 'truncateSync':
        return [{ op: 'resize', ...at, size: second as number }];
      case 'punchHole':
      case 'zeroRange':
        return [{ op: 'zero', ...at, offset: second as number, length: third }];
      case 'copyRange': {
        const to = this.#open.get(second as number) ?? -1;
        return [{ op: 'copy', id: to, path: this.#pathOf(second), from: id, offset: third, length: fourth }];
      }
      case 'clone': {
        const to = this.#open.get(second as number) ?? -1;
        return [{ op: 'copy', id: to, path: this.#pathOf(second), from: id, offset: 0, length: WHOLE }];
      }
      case 'fdatasync':
      case 'fsync':
      case 'fsyncSync':
        return [{ op: this.#directories.has(id) ? 'sync names' : 'sync', ...at }];
      case 'syncfs':
        return [{ op: 'sync all', ...at }];
      default:
        return [];
    }
  }

  #pathOf(fd: unknown): string {
    return this.#relative(this.#paths.of(fd)) ?? '';
  }

  #nameChanges({ name, args, file }: DiskCall): Change[] {
    if (name === 'symlinkSync') {
      const [target, at] = args as [string, string];
      const link = this.#relative(this.#paths.resolve(at));
      if (link === undefined) return [];
      this.#names.set(link, ++this.#lastId);
      return [{ op: 'link', id: this.#lastId, path: link, target }];
    }
    const relative = this.#relative(file);
    if (relative === undefined) return [];
    const id = this.#names.get(relative);
    switch (name) {
      case 'mkdirSync': {
        const made = ++this.#lastId;
        this.#directories.add(made);
        if (id === undefined) this.#names.set(relative, made);
        return [{ op: 'create', kind: 'directory', id: made, path: relative }];
      }
      case 'unlink':
      case 'unlinkSync':
      case 'rmdirSync':
        if (id === undefined) return [];
        this.#names.delete(relative);
        return [{ op: 'unlink', id, path: relative }];
      case 'rename':
      case 'renameSync': {
        const to = this.#relative(this.#paths.resolve(args[1] as string));
        if (id === undefined || to === undefined) return [];
        this.#names.delete(relative);
        this.#names.set(to, id);
        return [{ op: 'rename', id, from: relative, path: to }];
      }
      default:
        return [];
    }
  }

  #recordDatabase({ name, args, file }: DiskCall, id: Id, proceed: () => unknown): unknown {
    const fd = args[0] as number;
    if (!this.#databases.has(id)) this.#databases.set(id, contentOf(fd));
    const pages = new Map<number, Buffer>();
    const at = { id, path: this.#relative(file) ?? file, pages, size: 0 };
    const change: Change = { op: name === 'commit' ? 'commit' : 'database', ...at };
    return this.#during([change], proceed, () => {
      const before = this.#databases.get(id) ?? Buffer.alloc(0);
      const after = contentOf(fd);
      for (let from = 0; from < after.length; from += DATABASE_PAGE) {
        const page = after.subarray(from, from + DATABASE_PAGE);
        if (!page.equals(before.subarray(from, from + DATABASE_PAGE)))
          pages.set(from / DATABASE_PAGE, Buffer.from(page));
      }
      this.#databases.set(id, after);
      Object.assign(change, { size: after.length });
    });
  }

  /** The present moment, for the functions below. */
  get now(): number {
    return this.#clock;
  }

  /** Whether the event is durable at the moment `at`, by the promises of POSIX and the behaviour of LMDB. */
  isDurable(event: Recorded, at = Infinity): boolean {
    if (event.begun === 0) return true;
    if (event.ended > at || event.ended === Infinity) return false;
    if (event.op === 'commit' || event.op === 'database') return true;
    const after = this.events.filter((sync) => sync.begun > event.ended && sync.ended <= at && sync.ended !== Infinity);
    if (after.some(({ op }) => op === 'sync all')) return true;
    if (event.op === 'rename') return [event.from, event.path].every((name) => isNameSynced(name, after));
    if (event.op === 'create' || event.op === 'link' || event.op === 'unlink') return isNameSynced(event.path, after);
    return after.some((sync) => sync.op === 'sync' && sync.id === event.id);
  }

  /** The moments from `first` on at which a power loss leaves another state than one moment earlier. */
  *momentsOfLoss(first: number): Generator<number> {
    let before = '';
    for (let at = first; at <= this.now; at++) {
      const state = this.events.map((event) => (this.isDurable(event, at) ? '1' : '0')).join('');
      if (state !== before) yield at;
      before = state;
    }
  }

  /** Create in `directory` the files that the `kept` events produce. */
  build(directory: string, kept: (event: Recorded) => boolean): void {
    const files = new Map<Id, { bytes: Buffer; size: number }>();
    const names = new Map<string, Change & { readonly op: 'create' | 'link' }>();
    const made = new Map<Id, Change & { readonly op: 'create' | 'link' }>();
    const fileOf = (id: Id): { bytes: Buffer; size: number } => {
      let file = files.get(id);
      if (!file) files.set(id, (file = { bytes: Buffer.alloc(0), size: 0 }));
      return file;
    };
    const put = (id: Id, offset: number, data: Buffer): void => {
      const file = fileOf(id);
      resize(file, Math.max(file.size, offset + data.length));
      data.copy(file.bytes, offset);
    };
    for (const event of this.events) {
      if (event.op === 'create' || event.op === 'link') made.set(event.id, event);
      if (!kept(event)) continue;
      switch (event.op) {
        case 'create':
        case 'link':
          names.set(event.path, event);
          break;
        case 'unlink':
          names.delete(event.path);
          break;
        case 'rename': {
          const file = made.get(event.id);
          names.delete(event.from);
          if (file) names.set(event.path, file);
          break;
        }
        case 'write':
          put(event.id, event.offset, event.data);
          break;
        case 'resize':
          resize(fileOf(event.id), event.size);
          break;
        case 'zero': {
          const file = fileOf(event.id);
          file.bytes.fill(0, event.offset, Math.min(event.offset + event.length, file.size));
          break;
        }
        case 'copy': {
          const { bytes, size } = fileOf(event.from);
          put(event.id, event.offset, bytes.subarray(event.offset, Math.min(event.offset + event.length, size)));
          break;
        }
        case 'commit':
        case 'database':
          for (const [page, bytes] of event.pages) put(event.id, page * DATABASE_PAGE, bytes);
          break;
        default:
          break;
      }
    }
    for (const [name, file] of [...names].sort(([a], [b]) => a.length - b.length)) {
      const full = path.join(directory, name);
      // Without its directory the file cannot be found.
      if (name !== '.' && !fs.existsSync(path.dirname(full))) continue;
      if (file.op === 'link') fs.symlinkSync(file.target, full);
      else if (file.kind === 'directory') fs.mkdirSync(full, { recursive: true });
      else {
        const { bytes, size } = fileOf(file.id);
        fs.writeFileSync(full, bytes.subarray(0, size));
      }
    }
  }
}

/** The name of the directory itself is in a directory that is not recorded. */
function isNameSynced(name: string, syncs: readonly Recorded[]): boolean {
  return name === '.' || syncs.some(({ op, path: of }) => op === 'sync names' && of === path.dirname(name));
}

function resize(file: { bytes: Buffer; size: number }, size: number): void {
  if (size > file.bytes.length) {
    const bytes = Buffer.alloc(Math.max(size, 2 * file.bytes.length));
    file.bytes.copy(bytes, 0, 0, file.size);
    file.bytes = bytes;
  } else {
    file.bytes.fill(0, Math.min(size, file.size));
  }
  file.size = size;
}

/** Not through the disk: these reads must not be recorded. */
function contentOf(fd: number): Buffer {
  const bytes = Buffer.alloc(fs.fstatSync(fd).size);
  for (let done = 0; done < bytes.length;) {
    const count = fs.readSync(fd, bytes, done, bytes.length - done, done);
    if (count === 0) break;
    done += count;
  }
  return bytes;
}
