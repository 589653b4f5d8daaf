/**
 * A raw disk image becomes a VDI. Owns the order in which half an image is never taken for a whole one: everything that can
 * be known is checked first, then the VDI is marked as unfinished, and the mark goes when all of the image is durable.
 */
import { randomBytes } from 'node:crypto';
import { asFileError } from './file-errors.js';
import {
  asOperationError,
  OperationError,
  type Disk,
  type Operations,
  type Redundancy,
  type VdiRecord,
} from '../operations/operations.js';
import { whatIsLeft } from './interrupted-fill.js';
import { DEFAULT_BLOCK_SIZE_SHIFT, MAX_BLOCK_SIZE_SHIFT, MAX_DATA_OBJECTS } from '../store/vdi-record.js';
import { copyFileToDisk, copyStreamToDisk, zeroRest, type Copied } from './disk-copy.js';
import type { ImageSource } from './image-source.js';
import type { JobContext } from './reporting.js';
import type { WithStore } from './with-store.js';

/** Sizes of VDIs are multiples of this; an image is filled up with zeros. */
export const SIZE_UNIT = 512;
const RUN_BYTES = 8;

export interface ImportOptions extends JobContext {
  readonly overwrite?: boolean | undefined;
  /** Also if a client that was cut off from the VDI may come back. */
  readonly force?: boolean | undefined;
  /** In bytes. Of a file: of the VDI. Of a stream: what must come. */
  readonly size?: number | undefined;
  /** Of the VDI's objects, if it is made. */
  readonly blockSizeShift?: number | undefined;
  /** Of a cluster, if the VDI is made. */
  readonly redundancy?: Redundancy | undefined;
}

export interface Imported extends Copied {
  /** Of the image, in bytes. */
  readonly size: number;
}

/**
 * Import an image that is open. The store is opened when the image is known to be one, and its first bytes have come. Errors:
 * BAD_FILE, BAD_FORMAT, BAD_SIZE, INCOMPLETE, TOO_LONG, EXISTS, BUSY, and those of the store.
 */
export async function importImage(
  withStore: WithStore,
  source: ImageSource,
  name: string,
  options: ImportOptions,
): Promise<Imported> {
  checkLength(source, options.size);
  // No store is made for what turns out to be no image, and none is held while nothing comes.
  if (source.kind === 'stream') await source.begin(options.signal);
  return withStore((operations) => importInto(operations, name, source, options));
}

/** The length of the image, and the size of the VDI. */
interface Plan {
  /** Bytes of the image; undefined if that is only known at its end. */
  readonly length: number | undefined;
  /** Of the VDI, in bytes. */
  readonly size: number;
  /** The length is not known: a new VDI is made as large as possible, and cut to the image at its end. */
  readonly isOpenEnded: boolean;
}

/** A stream has begun already. Exported for tests, which end it at each of its steps. */
export async function importInto(
  operations: Operations,
  name: string,
  source: ImageSource,
  options: ImportOptions,
): Promise<Imported> {
  options.signal.throwIfAborted();
  const plan = await planOf(operations, name, source, options);
  const run = randomBytes(RUN_BYTES).toString('hex');
  const begun = await operations.begin(name, {
    by: 'import',
    of: '',
    run,
    size: plan.size,
    blockSizeShift: options.blockSizeShift,
    redundancy: options.redundancy,
    isOpenEnded: plan.isOpenEnded,
    overwrites: options.overwrite ?? false,
    goesOn: false,
    force: options.force,
  });
  const isNew = begun.unfinished?.isNew ?? false;
  let isFinishing = false;
  try {
    const disk = await operations.openDisk(name, { run });
    let imported: Imported;
    try {
      imported = await copyIn(disk, name, source, plan, isNew, options);
    } finally {
      await disk.close();
    }
    if (isNew && plan.isOpenEnded) await operations.resize(name, roundUp(imported.size), { force: true, run });
    isFinishing = true;
    await operations.finish(name, run);
    return imported;
  } catch (error) {
    throw await afterFailure(operations, begun, isFinishing, error, options.log);
  }
}

/** Check what can be checked without the store. Errors: BAD_SIZE, INCOMPLETE, TOO_LONG. */
function checkLength({ name, length, isFed }: ImageSource, size: number | undefined): void {
  const most = MAX_DATA_OBJECTS * 2 ** MAX_BLOCK_SIZE_SHIFT;
  const wanted = Math.max(length ?? 0, size ?? 0);
  if (wanted > most)
    throw new OperationError('BAD_SIZE', `${name} would have ${wanted} bytes; a VDI can have at most ${most}`);
  if (length === undefined || size === undefined) return;
  const says = `${name} has ${length} bytes, --size says`;
  if (!isFed && size < length) throw new OperationError('BAD_SIZE', `${says} only ${size}`);
  if (isFed && size > length)
    throw new OperationError('INCOMPLETE', `${says} that ${size} must arrive; nothing was done`);
  if (isFed && size < length)
    throw new OperationError('TOO_LONG', `${says} that only ${size} arrive; nothing was done`);
}

/** Check the store before anything is written. Errors: BAD_USAGE, TOO_LONG. */
async function planOf(
  operations: Operations,
  name: string,
  source: ImageSource,
  options: ImportOptions,
): Promise<Plan> {
  const found = (await operations.list()).find((vdi) => vdi.name === name && !vdi.isSnapshot);
  const isOpenEnded = source.length === undefined && options.size === undefined;
  const length = source.length ?? options.size;
  const says =
    source.length === undefined
      ? `--size says that ${source.name} has ${length} bytes`
      : `${source.name} has ${length} bytes`;
  if (found && (options.overwrite || found.unfinished?.by === 'import') && !found.unfinished?.isNew) {
    if (options.size !== undefined && !source.isFed) {
      throw new OperationError('BAD_USAGE', `${name} exists and keeps its size; leave out --size, or resize it first`);
    }
    if (length !== undefined && length > found.size) {
      throw new OperationError('TOO_LONG', `${says}, ${name} only ${found.size}; nothing was written; resize it first`);
    }
    return { length, size: found.size, isOpenEnded };
  }
  const shift = options.blockSizeShift ?? DEFAULT_BLOCK_SIZE_SHIFT;
  // The length of a stream is known at its end. Until then the VDI has the largest size, which costs no space. The store
  // decides the largest size; a daemon of an earlier version takes this one.
  if (length === undefined) return { length, size: MAX_DATA_OBJECTS * 2 ** shift, isOpenEnded };
  const size = (source.isFed ? undefined : options.size) ?? roundUp(length);
  return { length, size, isOpenEnded };
}

async function copyIn(
  disk: Disk,
  name: string,
  source: ImageSource,
  { length }: Plan,
  isEmpty: boolean,
  context: JobContext,
): Promise<Imported> {
  const { signal } = context;
  const progress = context.progress(`importing ${name}`, length);
  try {
    const options = { progress, signal, isEmpty };
    let imported: Imported;
    if (source.kind === 'file') {
      imported = { ...(await copyFileToDisk(source.fd, source.length, disk, options)), size: source.length };
    } else {
      const limit = Math.min(length ?? disk.size, disk.size);
      const { tail, ...copied } = await copyStreamToDisk(source.chunks(signal), disk, { ...options, limit });
      source.inspectTail(tail);
      if (length !== undefined && copied.size < length) {
        throw new OperationError('INCOMPLETE', `${source.name} ended after ${copied.size} of ${length} bytes`);
      }
      imported = copied;
    }
    if (!isEmpty) await zeroRest(disk, imported.size);
    await disk.flush();
    return imported;
  } catch (error) {
    // Errors of the system concern the image; those of the disk have their own codes.
    throw asFileError(error, source.name);
  } finally {
    progress.end();
  }
}

/**
 * What to throw after a failure. Half an image is worse than none, so a VDI that was made for it is removed. A VDI that existed
 * stays and keeps its unfinished mark; so does the part that came through a broken pipe, for inspection.
 */
async function afterFailure(
  operations: Operations,
  begun: VdiRecord,
  isFinishing: boolean,
  error: unknown,
  log: JobContext['log'],
): Promise<unknown> {
  const { name, unfinished } = begun;
  const expected = asOperationError(error);
  const isKept = !unfinished?.isNew || expected?.code === 'INCOMPLETE';
  if (!isKept) {
    const isGone = await operations.remove(name, { run: unfinished.run }).then(
      () => true,
      () => false,
    );
    if (isGone) return error;
  }
  const rest = await whatIsLeft(operations, begun, { isFinishing });
  if (expected) return new OperationError(expected.code, `${expected.message}; ${rest}`, { cause: error });
  log(rest);
  return error;
}

function roundUp(size: number): number {
  return Math.ceil(size / SIZE_UNIT) * SIZE_UNIT;
}
