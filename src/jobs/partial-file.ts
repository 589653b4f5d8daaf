/**
 * A file that is written under another name until it is complete and on disk: a file of the wanted name is a whole one, also
 * after a crash, and never one that two commands have written. Owns the name meanwhile and who may write there: whoever has
 * locked the very file that has the name. A name is only taken away from a file by who has it locked.
 */
import { createFile, moveFile, openRegular, removeFile, statRegular } from './target-files.js';
import { OperationError } from '../operations/operations.js';
import type { HostDisk } from '../system/disk.js';
import type { OpenFile } from '../system/open-file.js';
import { hostDisk } from '../system/real-disk.js';

/** Appended to the name of a file while it is not complete. */
const PARTIAL = '.partial';
/** Others that come and go while we look; each time one of them has got further. */
const MAX_TRIES = 100;

export class PartialFile {
  readonly #disk: HostDisk;
  readonly #handle: OpenFile;
  readonly #file: string;

  private constructor(disk: HostDisk, handle: OpenFile, file: string) {
    this.#disk = disk;
    this.#handle = handle;
    this.#file = file;
  }

  /**
   * A new, empty one, for a file of this path, which is resolved. What a killed command has left is replaced; what another
   * one is writing is not. Errors: BUSY, BAD_TARGET.
   */
  static async open(file: string, disk = hostDisk): Promise<PartialFile> {
    const partial = `${file}${PARTIAL}`;
    for (let tries = 0; tries < MAX_TRIES; tries++) {
      const left = await openLeft(disk, partial);
      try {
        if (left) {
          if (!isLocked(left)) throw busy(file);
          // It may have been finished, or replaced by another one's, before we had the lock.
          if (!(await isNamed(disk, left, partial))) continue;
          await removeFile(disk, partial);
        }
        const handle = await createFile(disk, partial, { mayReplace: false }).catch((error: unknown) => {
          if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error;
          return undefined;
        });
        if (!handle) continue;
        if (isLocked(handle) && (await isNamed(disk, handle, partial))) return new PartialFile(disk, handle, file);
        // Somebody took it for left over before we had locked it, and makes one of their own.
        await handle.close();
        throw busy(file);
      } finally {
        await left?.close();
      }
    }
    throw busy(file);
  }

  get fd(): number {
    return this.#handle.fd;
  }

  /** Holes, where nothing is written. */
  setSize(bytes: number): Promise<void> {
    return this.#handle.truncate(bytes);
  }

  sync(): Promise<void> {
    return this.#handle.sync();
  }

  /** It gets its name, in place of what has it now. Errors: BUSY if it has been taken away from us. */
  async finish(): Promise<void> {
    const partial = `${this.#file}${PARTIAL}`;
    if (!(await isNamed(this.#disk, this.#handle, partial))) throw busy(this.#file);
    await moveFile(this.#disk, partial, this.#file);
    await this.#handle.close();
  }

  /** Nothing of it is left. Does not fail. */
  async abandon(): Promise<void> {
    const partial = `${this.#file}${PARTIAL}`;
    try {
      if (await isNamed(this.#disk, this.#handle, partial)) await removeFile(this.#disk, partial);
    } catch {
      // Another one's, or the next one's to replace.
    }
    await this.#handle.close().catch(() => undefined);
  }
}

async function openLeft(disk: HostDisk, partial: string): Promise<OpenFile | undefined> {
  try {
    return await openRegular(disk, partial, 'r+');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
    return undefined;
  }
}

/** Whether the name is still that of this very file. */
async function isNamed(disk: HostDisk, handle: OpenFile, partial: string): Promise<boolean> {
  const [ours, named] = [handle.status(), await statRegular(disk, partial)];
  return named?.dev === ours.dev && named.ino === ours.ino;
}

/** Lock it. Where the filesystem has no locks, there is nobody to tell of. */
function isLocked(file: OpenFile): boolean {
  try {
    return file.tryLock();
  } catch {
    return true;
  }
}

function busy(file: string): OperationError {
  return new OperationError('BUSY', `another export is writing ${file}; wait for it to end`);
}
