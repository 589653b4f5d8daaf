/** The local store for the store suite, and the same directory read-only where that can be had. Owns its directories. */
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { logHeader, mapLogDirectory } from '../../src/store/local/map-log-format.js';
import { LocalStore, type LocalStoreOptions } from '../../src/store/local/local-store.js';
import { hostDisk } from '../../src/system/real-disk.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { Session } from './session.js';
import type { Abilities, StoreKind, StoreUnderTest } from './store-under-test.js';

const OBJECT = 2 ** 20;
/** So few that files are opened and closed all the time. */
const MAX_DESCRIPTORS = 4;

const ABILITIES: Abilities = {
  objectSize: OBJECT,
  canWrite: true,
  canSnapshot: true,
  canSnapshotTemporarily: true,
  canClone: true,
  canResize: true,
  keepsState: true,
  knowsHolesAtOnce: true,
  tellsChanges: true,
  countsCopies: true,
  copiesBlocks: true,
  copiesEndWithSnapshots: true,
};

export const localStore: StoreKind = {
  label: 'local store',
  abilities: ABILITIES,
  effort: 1,
  sequences: { quick: 40, full: 120, long: 5000 },
  start: () => Promise.resolve(new LocalUnderTest()),
};

/** Every new object is an overlay, also where nothing is below. */
export const localStoreOfOverlays: StoreKind = {
  label: 'local store of overlays',
  abilities: ABILITIES,
  effort: 1,
  sequences: { quick: 20, full: 60, long: 5000 },
  start: () => Promise.resolve(new LocalUnderTest({ makesOnlyOverlays: true, mergeDelayMs: 0 })),
};

export const readOnlyLocalStore: StoreKind = {
  label: 'local store on a read-only filesystem',
  missing: process.getuid?.() === 0 ? undefined : 'mounting needs root',
  abilities: { ...ABILITIES, canWrite: false },
  effort: 1,
  sequences: { quick: 0, full: 0, long: 0 },
  start: startReadOnly,
};

class LocalUnderTest implements StoreUnderTest {
  directory = scratchDirectory();
  #store: LocalStore | undefined;
  #catalog: VdiCatalog | undefined;
  readonly #options: LocalStoreOptions;

  constructor(options: LocalStoreOptions = {}) {
    this.#options = options;
  }

  async open(): Promise<VdiCatalog> {
    this.#store = await LocalStore.open(this.directory, { maxDescriptors: MAX_DESCRIPTORS, ...this.#options });
    return (this.#catalog = new VdiCatalog(this.#store));
  }

  /** Continues with a copy of the directory as it is now, marked as of an earlier boot: so nothing in recent/ counts. */
  async crash(): Promise<void> {
    const copy = scratchDirectory();
    fs.cpSync(this.directory, copy, { recursive: true });
    for (const name of fs.readdirSync(path.join(copy, 'recent'))) {
      const fd = fs.openSync(path.join(copy, 'recent', name), 'r+');
      const header = logHeader(hostDisk, mapLogDirectory(hostDisk, copy), this.#store?.logs.session ?? '', fd);
      header.write('another', header.indexOf('boot ') + 5);
      fs.writeSync(fd, header, 0, header.length, 0);
      fs.closeSync(fd);
    }
    await this.#close();
    fs.rmSync(this.directory, { recursive: true });
    this.directory = copy;
  }

  async settle(): Promise<void> {
    await this.#store?.merger.settled();
  }

  async objects(): Promise<string[]> {
    await this.#store?.reclaimed();
    const root = path.join(this.directory, 'objects');
    const names = fs.readdirSync(root, { recursive: true, encoding: 'utf8' });
    const overlays = path.join(this.directory, 'overlays');
    const segments = fs.existsSync(overlays) ? fs.readdirSync(overlays) : [];
    return [...names.filter((name) => name.includes(path.sep)), ...segments];
  }

  async stop(): Promise<void> {
    await this.#close();
    fs.rmSync(this.directory, { recursive: true, force: true });
  }

  async #close(): Promise<void> {
    await this.#catalog?.close().catch(() => undefined);
    await this.#store?.close().catch(() => undefined);
  }
}

/** In memory where that can be: what is tested here is not the disk. */
function scratchDirectory(): string {
  const base = fs.existsSync('/dev/shm') ? '/dev/shm' : os.tmpdir();
  return fs.mkdtempSync(path.join(base, 'sheepgate-suite-'));
}

async function startReadOnly(): Promise<StoreUnderTest> {
  const writable = new LocalUnderTest();
  const session = new Session(ABILITIES, () => writable);
  await session.start();
  const content = await fillForReading(session);
  await session.catalog.close();
  const { directory } = writable;
  const mount = (...args: string[]): void => {
    const { status, stderr } = spawnSync('mount', args, { encoding: 'utf8' });
    if (status !== 0) throw new Error(`mount ${args.join(' ')}: ${stderr}`);
  };
  mount('--bind', directory, directory);
  mount('-o', 'remount,bind,ro', directory);
  return {
    content,
    open: () => writable.open(),
    crash: () => Promise.resolve(),
    objects: () => writable.objects(),
    stop: async () => {
      await session.catalog.close().catch(() => undefined);
      spawnSync('umount', ['-l', directory]);
      await writable.stop();
    },
  };
}

/** A disk with data, holes and a snapshot; and the content of both. */
export async function fillForReading(session: Session): Promise<Map<string, Buffer>> {
  const { objectSize } = session;
  const { name, disk } = await session.newDisk(4);
  await disk.write(100, objectSize, 1);
  await session.catalog.snapshot(name, 'first');
  const content = new Map([[`${name}@first`, disk.now()]]);
  await disk.write(2 * objectSize - 5, 10, 2);
  await disk.trim(0, objectSize);
  content.set(name, disk.now());
  await session.release(disk.vdi);
  return content;
}
