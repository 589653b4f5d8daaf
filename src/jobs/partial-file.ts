/**
 * A file that is written under a temporary name, FILE.partial, until it is complete and durable. A file with the wanted name is
 * therefore complete, also after a crash, and never written by two commands. Owns the temporary name and its locking: only the
 * process that has locked the file of that name may write to it, rename it or remove it.
 */
import { createFile, moveFile, openRegular, removeFile, statRegular } from './target-files.js';
import { OperationError } from '../operations/operations.js';
import type { HostDisk } from '../system/disk.js';
import type { OpenFile } from '../system/open-file.js';
import { hostDisk } from '../system/real-disk.js';

/** Appended to the name of a file while it is not complete. */
const PARTIAL = '.partial';
/** Attempts to get the name while other commands take and release it; each failed attempt means that one of them progressed. */
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
   * A new, empty file that will get the name `file`, a path without links. The rest of a killed command is replaced; a file
   * that another command is writing is not. Errors: BUSY, BAD_TARGET.
   */
  static async open(file: string, disk = hostDisk): Promise<PartialFile> {
    const partial = `${file}${PARTIAL}`;
    for (let tries = 0; tries < MAX_TRIES; tries++) {
      const left = await openLeft(disk, partial);
      try {
        if (left) {
          if (!isLocked(left)) throw busy(file);
          // It may have been renamed or replaced before we had the lock.
          if (!(await isNamed(disk, left, partial))) continue;
          await removeFile(disk, partial);
        }
        const handle = await createFile(disk, partial, { mayReplace: false }).catch((error: unknown) => {
          if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error;
          return undefined;
        });
        if (!handle) continue;
        if (isLocked(handle) && (await isNamed(disk, handle, partial))) return new PartialFile(disk, handle, file);
        // Another command took it for a leftover before we had locked it, and makes its own.
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

  /** Set the size; unwritten ranges are holes. */
  setSize(bytes: number): Promise<void> {
    return this.#handle.truncate(bytes);
  }

  sync(): Promise<void> {
    return this.#handle.sync();
  }

  /** Give the file its name, replacing a file that has it. Errors: BUSY (another command has taken the temporary name). */
  async finish(): Promise<void> {
    const partial = `${this.#file}${PARTIAL}`;
    if (!(await isNamed(this.#disk, this.#handle, partial))) throw busy(this.#file);
    await moveFile(this.#disk, partial, this.#file);
    await this.#handle.close();
  }

  /** Remove the file. Does not fail. */
  async abandon(): Promise<void> {
    const partial = `${this.#file}${PARTIAL}`;
    try {
      if (await isNamed(this.#disk, this.#handle, partial)) await removeFile(this.#disk, partial);
    } catch {
      // Another command has the name, or the next export replaces the file.
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

/** Whether the name still belongs to this file. */
async function isNamed(disk: HostDisk, handle: OpenFile, partial: string): Promise<boolean> {
  const [ours, named] = [handle.status(), await statRegular(disk, partial)];
  return named?.dev === ours.dev && named.ino === ours.ino;
}

/** Lock the file. True also if the filesystem has no locks. */
function isLocked(file: OpenFile): boolean {
  try {
    return file.tryLock();
  } catch {
    return true;
  }
}

function busy(file: string): OperationError {
  return new OperationError('BUSY', `another export is writing ${file}; wait until it has ended`);
}
