/** `sheepgate export`: a VDI or snapshot becomes a raw, sparse disk image, in a file or on stdout. */
import fs from 'node:fs';
import path from 'node:path';
import type { Writable } from 'node:stream';
import { Command } from 'commander';
import { createFile, moveFile, openRegular, removeFile } from '../backup/target-files.js';
import { OperationError, type Disk, type Operations } from '../daemon/operations.js';
import { tryLock } from '../store/local/libc.js';
import { BlockDevice } from './block-device.js';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { copyDiskToFile, copyDiskToStream, type Copied } from './disk-copy.js';
import { interruptible } from './interrupt.js';
import { missingOption } from './missing.js';
import { printJson, printNote } from './output.js';
import { printable } from './printable.js';
import { startProgress, type Progress } from './progress.js';
import { formatSize } from './size.js';

const STDOUT = '-';
/** Appended to the name of a file while it is not complete. */
const PARTIAL = '.partial';

interface ExportOptions extends CommonOptions {
  readonly force?: boolean;
  readonly missing?: 'zero';
}

type Copy = (disk: Disk, progress: Progress, signal: AbortSignal) => Promise<Copied>;

/** Where the image goes. Opened before the store is and finished after it: meanwhile root may be the store's owner. */
interface Target {
  readonly copy: Copy;
  /** It is complete. */
  finish(): Promise<void>;
  /** It is not, and never will be. Does not fail. */
  abandon(): Promise<void>;
}

export function exportCommand(): Command {
  const command = new Command('export')
    .description('copy a VDI or snapshot into a raw image; zeros become holes')
    .argument('<vdi>', 'NAME, NAME@TAG, @ID, or NAME@now for a snapshot that lasts as long as the copying')
    .argument('<file>', 'file, block device, or - for stdout')
    .option('--force', 'replace an existing file, overwrite a device that holds something')
    .addOption(missingOption())
    .addHelpText(
      'after',
      '\nExamples:\n  sheepgate export vm1@now vm1.img\n  sheepgate export vm1@monday - | zstd > vm1.zst',
    );
  return withCommonOptions(command).action(async (spec: string, file: string, options: ExportOptions) => {
    if (options.json && file === STDOUT) {
      throw new OperationError('BAD_USAGE', '--json and the image cannot both go to stdout; leave --json out');
    }
    if (file === STDOUT && process.stdout.isTTY) {
      throw new OperationError(
        'BAD_USAGE',
        'a disk image does not belong on a terminal; redirect stdout or name a file',
      );
    }
    const startedAt = performance.now();
    const missingIsZero = options.missing === 'zero';
    // From before the file is made to after it has its name: whatever interrupts this, no half of one is left.
    const { size, copied } = await interruptible(async (signal) => {
      const target = await openTarget(file, options.force ?? false);
      try {
        const copying = (operations: Operations): Promise<Exported> => copyOut(operations, spec, target, signal);
        const done = await withOperations(options, copying, { missingIsZero });
        await target.finish();
        return done;
      } catch (error) {
        await target.abandon();
        throw error;
      }
    });
    const seconds = (performance.now() - startedAt) / 1000;
    if (options.json) return printJson({ vdi: spec, file, size, ...copied, seconds });
    const what = `exported ${formatSize(size)} of ${spec} in ${seconds.toFixed(1)} s`;
    process.stderr.write(`${printable(what)}: ${formatSize(copied.dataBytes)} of data\n`);
  });
}

interface Exported {
  readonly size: number;
  readonly copied: Copied;
}

async function copyOut(operations: Operations, spec: string, target: Target, signal: AbortSignal): Promise<Exported> {
  signal.throwIfAborted();
  const disk = await operations.openDisk(spec);
  const progress = startProgress(`exporting ${spec}`, disk.size);
  try {
    return { size: disk.size, copied: await target.copy(disk, progress, signal) };
  } finally {
    progress.end();
    await disk.close();
  }
}

/** Looked at before anything is copied, so that a mistake costs no time. */
async function openTarget(file: string, mayReplace: boolean): Promise<Target> {
  if (file === STDOUT) return toStream(process.stdout, 'stdout');
  const status = fs.statSync(file, { throwIfNoEntry: false });
  if (status?.isDirectory()) throw new OperationError('BAD_FILE', `${file} is a directory; give a file's name`);
  if (status?.isFIFO() || status?.isCharacterDevice()) {
    return toStream(fs.createWriteStream(file, { flags: 'r+' }), file);
  }
  if (status?.isBlockDevice()) return toBlockDevice(await BlockDevice.open(file, mayReplace));
  // A link that leads nowhere is something that is there, too.
  if (!mayReplace && fs.lstatSync(file, { throwIfNoEntry: false })) {
    throw new OperationError('EXISTS', `${file} exists; --force replaces it`);
  }
  return toFile(file);
}

function nothing(): Promise<void> {
  return Promise.resolve();
}

function toStream(stream: Writable, name: string): Target {
  // The write that failed says it; without a listener the stream would end the process before anything is cleaned up.
  stream.on('error', () => undefined);
  const copy: Copy = async (disk, progress, signal) => {
    try {
      return await copyDiskToStream(disk, stream, { progress, signal });
    } catch (error) {
      throw notComplete(error, name);
    }
  };
  return { copy, finish: nothing, abandon: nothing };
}

/** What is there now is no image, and nothing else either. */
function notComplete(error: unknown, name: string): unknown {
  const { code, syscall, message } = error as NodeJS.ErrnoException;
  if (syscall === undefined) return error;
  const why = code === 'EPIPE' ? 'its reader is gone' : message;
  return new OperationError('INCOMPLETE', `the image on ${name} is not complete: ${why}`, { cause: error });
}

/** Under another name until it is complete and on disk: a file of this name is a whole image, also after a crash. */
async function toFile(given: string): Promise<Target> {
  const file = path.join(fs.realpathSync(path.dirname(path.resolve(given))), path.basename(given));
  const partial = `${file}${PARTIAL}`;
  await refuseIfWritten(partial, given);
  const handle = await createFile(partial);
  // For others who want to write it: see refuseIfWritten.
  isOurs(handle.fd);
  return {
    copy: async (disk, progress, signal) => {
      await handle.truncate(disk.size);
      const copied = await copyDiskToFile(disk, handle.fd, { progress, signal });
      await handle.sync();
      return copied;
    },
    finish: async () => {
      await handle.close();
      await moveFile(partial, file);
    },
    abandon: async () => {
      await handle.close().catch(() => undefined);
      await removeFile(partial).catch(() => undefined);
    },
  };
}

/** What a killed export left is replaced; what another one is writing is not. Errors: BUSY, BAD_TARGET. */
async function refuseIfWritten(partial: string, file: string): Promise<void> {
  const handle = await openRegular(partial, 'r+').catch((error: NodeJS.ErrnoException) => {
    if (error.code !== 'ENOENT') throw error;
    return undefined;
  });
  if (!handle) return;
  try {
    if (!isOurs(handle.fd)) throw new OperationError('BUSY', `another export is writing ${file}; wait for it to end`);
  } finally {
    await handle.close();
  }
}

/** Lock it. Where the filesystem has no locks, there is nobody to tell of. */
function isOurs(fd: number): boolean {
  try {
    return tryLock(fd);
  } catch {
    return true;
  }
}

function toBlockDevice(device: BlockDevice): Target {
  const copy: Copy = async (disk, progress, signal) => {
    const { file, size } = device;
    if (size < disk.size) {
      throw new OperationError(
        'BAD_SIZE',
        `${file} has ${size} bytes, and the image ${disk.size}: it does not fit; nothing was written`,
      );
    }
    try {
      const zero = (offset: number, length: number): Promise<void> => device.zero(offset, length);
      const copied = await copyDiskToFile(disk, device.fd, { progress, signal, zero });
      await device.sync();
      return copied;
    } catch (error) {
      const told = notComplete(error, file);
      // Interrupted, or it could not be read: that is the error, and this what it leaves behind.
      if (told === error) printNote(`the image on ${file} is not complete: export it again`);
      throw told;
    }
  };
  return { copy, finish: () => device.close(), abandon: () => device.close().catch(() => undefined) };
}
