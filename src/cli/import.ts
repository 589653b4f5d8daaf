/**
 * `sheepgate import`: a raw disk image, from a file or stdin, becomes a VDI. Owns the order that lets nobody take half an
 * image for a whole one: what can be known is looked at first, then the VDI is marked as unfinished, and it is an ordinary
 * one when all of it is durable.
 */
import { randomBytes } from 'node:crypto';
import { Command, Option } from 'commander';
import { asFileError } from '../jobs/file-errors.js';
import {
  asOperationError,
  OperationError,
  type Disk,
  type Operations,
  type VdiRecord,
} from '../operations/operations.js';
import { whatIsLeft } from '../jobs/interrupted-fill.js';
import { DEFAULT_BLOCK_SIZE_SHIFT, MAX_BLOCK_SIZE_SHIFT, MAX_DATA_OBJECTS } from '../store/object-store.js';
import { checkName } from '../vdi/names.js';
import { forceOption, sizeArgument, withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { copiesOption, type CopiesOption } from './copies-option.js';
import { blockSizeShiftOption } from './vdi-create.js';
import { copyFileToDisk, copyStreamToDisk, zeroRest, type Copied } from '../jobs/disk-copy.js';
import { openSource, type ImageSource } from '../jobs/image-source.js';
import { interruptible } from './interrupt.js';
import { printJson, printLine, printNote } from './output.js';
import { startProgress, type Progress } from './progress.js';
import { formatSize } from '../text/size.js';

/** Sizes of VDIs are multiples of this; an image is filled up with zeros. */
const SIZE_UNIT = 512;
const RUN_BYTES = 8;

interface ImportOptions extends CommonOptions, CopiesOption {
  readonly overwrite?: boolean;
  readonly raw?: boolean;
  readonly force?: boolean;
  readonly size?: number;
  readonly blockSizeShift?: number;
}

interface Imported extends Copied {
  /** Of the image, in bytes. */
  readonly size: number;
}

const HELP = `
--size of a file makes the VDI larger than the image. From stdin it says how much has to come: the end of a pipe looks the
same whether its writer has finished or failed, and fewer bytes are an error, after which the VDI stays marked as unfinished.
The store is opened when the first bytes have come.

Until it is complete the VDI is unfinished: 'vdi list' says so, and nobody can open it. The same command again starts over.

Examples:
  sheepgate import disk.img vm1
  zcat disk.img.gz | sheepgate import - vm1 --size 20G`;

export function importCommand(): Command {
  const command = new Command('import')
    .description('make a VDI from a raw disk image; zeros take up no space')
    .argument('<file>', 'image file, block device, or - for stdin')
    .argument('<name>', 'name of the VDI')
    .option('--overwrite', 'write over an existing VDI, which must be large enough')
    .addOption(forceOption())
    .option('--raw', 'import the bytes as they are, even if they look like qcow2 or another format')
    .addOption(
      new Option(
        '--size <size>',
        'size of the new VDI, if larger than the file; from stdin: bytes that must come',
      ).argParser(sizeArgument),
    )
    .addOption(blockSizeShiftOption())
    .addOption(copiesOption())
    .addHelpText('after', HELP);
  return withCommonOptions(command).action(async (file: string, name: string, options: ImportOptions) => {
    const startedAt = performance.now();
    checkName(name);
    const source = openSource(file, { isRaw: options.raw ?? false, vdi: name });
    try {
      const result = await interruptible(async (signal) => {
        checkLength(source, options.size);
        // No store is made for what turns out to be no image, and none is held while nothing comes.
        if (source.kind === 'stream') await source.begin(signal);
        return withOperations(options, (operations) => importInto(operations, name, source, options, signal), {
          mayCreate: true,
        });
      });
      const seconds = (performance.now() - startedAt) / 1000;
      if (options.json) printJson({ name, ...result, seconds });
      else
        printLine(
          `imported ${formatSize(result.size)} into ${name} in ${seconds.toFixed(1)} s: ` +
            `${formatSize(result.dataBytes)} of data, the rest is zeros`,
        );
      if (source.length === undefined && options.size === undefined) noteUnknownLength(source, result.size);
    } catch (error) {
      throw asFileError(error, source.name);
    } finally {
      source.close();
    }
  });
}

/** How long the image is, and what becomes of the VDI's size. */
interface Plan {
  /** Bytes of the image; undefined if only its end will tell. */
  readonly length: number | undefined;
  /** Of the VDI, if it is made. */
  readonly size: number;
  /** The VDI is made for an image whose length is not known, and cut to it at the end. */
  readonly isOpenEnded: boolean;
}

/** Exported for tests, which end it at each of its steps. A stream has begun already. */
export async function importInto(
  operations: Operations,
  name: string,
  source: ImageSource,
  options: ImportOptions,
  signal: AbortSignal,
): Promise<Imported> {
  signal.throwIfAborted();
  const plan = await planOf(operations, name, source, options);
  const run = randomBytes(RUN_BYTES).toString('hex');
  const begun = await operations.begin(name, {
    by: 'import',
    of: '',
    run,
    size: plan.size,
    blockSizeShift: options.blockSizeShift,
    redundancy: options.copies,
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
      imported = await copyIn(disk, name, source, plan, isNew, signal);
    } finally {
      await disk.close();
    }
    if (isNew && plan.isOpenEnded) await operations.resize(name, roundUp(imported.size), { force: true, run });
    isFinishing = true;
    await operations.finish(name, run);
    return imported;
  } catch (error) {
    throw await afterFailure(operations, begun, isFinishing, error);
  }
}

/** Errors: what the lengths tell without the store, BAD_SIZE, INCOMPLETE, TOO_LONG. */
function checkLength({ name, length, isFed }: ImageSource, size: number | undefined): void {
  const most = MAX_DATA_OBJECTS * 2 ** MAX_BLOCK_SIZE_SHIFT;
  const wanted = Math.max(length ?? 0, size ?? 0);
  if (wanted > most) throw new OperationError('BAD_SIZE', `${name}: ${wanted} bytes, and no VDI has more than ${most}`);
  if (length === undefined || size === undefined) return;
  const says = `${name} has ${length} bytes, --size says`;
  if (!isFed && size < length) throw new OperationError('BAD_SIZE', `${says} only ${size}`);
  if (isFed && size > length)
    throw new OperationError('INCOMPLETE', `${says} that ${size} must come; nothing was done`);
  if (isFed && size < length) throw new OperationError('TOO_LONG', `${says} that only ${size} come; nothing was done`);
}

/** Errors: what the store tells to be wrong before anything is written. */
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
      throw new OperationError('BAD_USAGE', `${name} exists and keeps its size; leave --size out, or resize it first`);
    }
    if (length !== undefined && length > found.size) {
      throw new OperationError('TOO_LONG', `${says}, ${name} only ${found.size}; nothing was written; resize it first`);
    }
    return { length, size: found.size, isOpenEnded };
  }
  const shift = options.blockSizeShift ?? DEFAULT_BLOCK_SIZE_SHIFT;
  // The length of a stream shows at its end: until then the VDI has all the size there is, which costs nothing. How much that
  // is is the store's to say; a daemon of before takes it from here.
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
  signal: AbortSignal,
): Promise<Imported> {
  const progress: Progress = startProgress(`importing ${name}`, length);
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
    // What the disk's errors say they say themselves.
    throw asFileError(error, source.name);
  } finally {
    progress.end();
  }
}

/**
 * What to throw when it has failed. Half an image is worse than none, so a VDI that was made for it goes; but one that was
 * there stays and keeps its mark, and so does what a broken pipe has left, for whoever wants to see how far it came.
 */
async function afterFailure(
  operations: Operations,
  begun: VdiRecord,
  isFinishing: boolean,
  error: unknown,
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
  printNote(rest);
  return error;
}

/** Nobody has said how much has to come, and a writer that has failed looks like one that has finished. */
function noteUnknownLength({ name }: ImageSource, size: number): void {
  const odd =
    size % SIZE_UNIT === 0 ? '' : `; ${size} bytes are no whole number of sectors, so it was probably cut off there`;
  printNote(
    `${name} ended after ${size} bytes, and nothing says whether that was all${odd}; --size SIZE makes a short one an error`,
  );
}

function roundUp(size: number): number {
  return Math.ceil(size / SIZE_UNIT) * SIZE_UNIT;
}
