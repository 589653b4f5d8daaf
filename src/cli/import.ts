/** `sheepgate import`: a raw disk image, from a file or stdin, becomes a VDI. */
import fs from 'node:fs';
import type { Readable } from 'node:stream';
import { Command, Option } from 'commander';
import { OperationError, type Disk, type Operations } from '../daemon/operations.js';
import { MAX_DATA_OBJECTS, DEFAULT_BLOCK_SIZE_SHIFT } from '../store/object-store.js';
import { forceOption, sizeArgument, withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { blockSizeShiftOption } from './vdi-create.js';
import { copyFileToDisk, copyStreamToDisk, zeroRest, type Copied } from './disk-copy.js';
import { interruptible } from './interrupt.js';
import { printJson, printLine } from './output.js';
import { startProgress, type Progress } from './progress.js';
import { formatSize } from './size.js';

/** Sizes of VDIs are multiples of this; an image is filled up with zeros. */
const SIZE_UNIT = 512;
const STDIN = '-';

/** Formats whose images start with a mark of their own: stored as they are they would be no disk to anybody. */
const FOREIGN_FORMATS: readonly { readonly name: string; readonly mark: Buffer }[] = [
  { name: 'qcow2', mark: Buffer.from('QFI\xfb', 'latin1') },
  { name: 'vmdk', mark: Buffer.from('KDMV', 'latin1') },
  { name: 'vhdx', mark: Buffer.from('vhdxfile', 'latin1') },
  { name: 'gzip', mark: Buffer.from([0x1f, 0x8b]) },
  { name: 'xz', mark: Buffer.from([0xfd, 0x37, 0x7a, 0x58, 0x5a]) },
  { name: 'zstd', mark: Buffer.from([0x28, 0xb5, 0x2f, 0xfd]) },
];

const MARK_BYTES = Math.max(...FOREIGN_FORMATS.map(({ mark }) => mark.length));

interface ImportOptions extends CommonOptions {
  readonly overwrite?: boolean;
  readonly raw?: boolean;
  readonly force?: boolean;
  readonly size?: number;
  readonly blockSizeShift?: number;
}

interface Source {
  /** undefined for a stream. */
  readonly fd: number | undefined;
  readonly size: number | undefined;
  readonly stream: Readable | undefined;
  /** For messages. */
  readonly name: string;
  /** Throws if the image begins like something other than a disk. */
  readonly inspect: (head: Buffer) => void;
}

export function importCommand(): Command {
  const command = new Command('import')
    .description('make a VDI from a raw disk image; zeros take up no space')
    .argument('<file>', 'image file, block device, or - for stdin')
    .argument('<name>', 'name of the VDI')
    .option('--overwrite', 'write over an existing VDI, which must be large enough')
    .addOption(forceOption())
    .option('--raw', 'import the bytes as they are, even if they look like qcow2 or another format')
    .addOption(new Option('--size <size>', 'size of the new VDI, if larger than the image').argParser(sizeArgument))
    .addOption(blockSizeShiftOption())
    .addHelpText('after', '\nExamples:\n  sheepgate import disk.img vm1\n  zcat disk.img.gz | sheepgate import - vm1');
  return withCommonOptions(command).action(async (file: string, name: string, options: ImportOptions) => {
    const startedAt = Date.now();
    const source = openSource(file, options.raw ?? false);
    try {
      const result = await withOperations(
        options,
        (operations) => interruptible((signal) => importInto(operations, name, source, options, signal)),
        { mayCreate: true },
      );
      const seconds = (Date.now() - startedAt) / 1000;
      if (options.json) printJson({ name, ...result, seconds });
      else
        printLine(
          `imported ${formatSize(result.size)} into ${name} in ${seconds.toFixed(1)} s: ` +
            `${formatSize(result.dataBytes)} of data, the rest is zeros`,
        );
    } finally {
      if (source.fd !== undefined) fs.closeSync(source.fd);
    }
  });
}

function openSource(file: string, isRaw: boolean): Source {
  const name = file === STDIN ? 'stdin' : file;
  const inspect = isRaw ? () => undefined : (head: Buffer) => refuseForeignFormat(head, name);
  if (file === STDIN) return { fd: undefined, size: undefined, stream: process.stdin, name, inspect };
  const fd = fs.openSync(file, 'r');
  try {
    const status = fs.fstatSync(fd);
    if (status.isDirectory()) throw new OperationError('BAD_FILE', `${file} is a directory, not a disk image`);
    if (!status.isFile() && !status.isBlockDevice()) {
      const stream = fs.createReadStream('', { fd, autoClose: true });
      return { fd: undefined, size: undefined, stream, name, inspect };
    }
    const size = status.isFile() ? status.size : blockDeviceSize(fd, file);
    if (size === 0) throw new OperationError('BAD_FILE', `${file} is empty`);
    const head = Buffer.alloc(MARK_BYTES);
    inspect(head.subarray(0, fs.readSync(fd, head, 0, head.length, 0)));
    return { fd, size, stream: undefined, name, inspect };
  } catch (error) {
    fs.closeSync(fd);
    throw error;
  }
}

/** The size of a block device, from sysfs: fstat does not tell it. */
function blockDeviceSize(fd: number, file: string): number {
  const { rdev } = fs.fstatSync(fd);
  const major = (rdev >> 8) & 0xfff;
  const minor = (rdev & 0xff) | ((rdev >> 12) & 0xfff00);
  const sectors = Number(fs.readFileSync(`/sys/dev/block/${major}:${minor}/size`, 'utf8'));
  if (!Number.isSafeInteger(sectors)) throw new OperationError('BAD_FILE', `cannot tell the size of ${file}`);
  return sectors * 512;
}

function refuseForeignFormat(head: Buffer, file: string): void {
  const format = FOREIGN_FORMATS.find(({ mark }) => head.subarray(0, mark.length).equals(mark));
  if (!format) return;
  const remedy =
    format.name === 'gzip' || format.name === 'xz' || format.name === 'zstd'
      ? `unpack it into the command: ${format.name} -dc ${file} | sheepgate import - NAME`
      : `copy it in with "qemu-img convert -n -f ${format.name} -O raw ${file} nbd+unix:///NAME?socket=…" into a VDI of its size`;
  throw new OperationError('BAD_FORMAT', `${file} is ${format.name}, not a raw image: ${remedy}, or say --raw`);
}

async function importInto(
  operations: Operations,
  name: string,
  source: Source,
  options: ImportOptions,
  signal: AbortSignal,
): Promise<Copied & { size: number }> {
  const isNew = !(options.overwrite && (await exists(operations, name)));
  const shift = options.blockSizeShift ?? DEFAULT_BLOCK_SIZE_SHIFT;
  const wanted = options.size ?? roundUp(source.size ?? 0);
  if (!isNew && options.size !== undefined) {
    throw new OperationError('BAD_USAGE', `${name} exists and keeps its size; leave --size out, or resize it first`);
  }
  if (source.size !== undefined && wanted < source.size) {
    throw new OperationError('BAD_SIZE', `${source.name} has ${source.size} bytes, --size says only ${wanted}`);
  }
  if (isNew) {
    // The length of a stream shows at its end: until then the VDI has all the size there is, which costs nothing.
    const size = source.size === undefined && options.size === undefined ? MAX_DATA_OBJECTS * 2 ** shift : wanted;
    await operations.create(name, size, { blockSizeShift: options.blockSizeShift, force: options.force });
  }
  try {
    if (!isNew) await operations.mustBeReplaceable(name, 'overwritten', { force: options.force });
    const disk = await operations.openDisk(name);
    let copied: Copied & { size: number };
    try {
      // Who came in between is seen now.
      await operations.mustBeReplaceable(name, 'overwritten', { force: options.force, ours: 1 });
      copied = await copyIn(disk, name, source, isNew, signal);
    } finally {
      await disk.close();
    }
    if (isNew && source.size === undefined && options.size === undefined) {
      if (copied.size === 0) throw new OperationError('BAD_FILE', `${source.name} is empty`);
      await operations.resize(name, roundUp(copied.size), { force: true });
    }
    return copied;
  } catch (error) {
    // Half an image is worse than none; what was there before the import is not ours to remove.
    if (isNew) await operations.remove(name).catch(() => undefined);
    throw error;
  }
}

async function copyIn(
  disk: Disk,
  name: string,
  source: Source,
  isEmpty: boolean,
  signal: AbortSignal,
): Promise<Copied & { size: number }> {
  if (disk.isReadOnly) throw new OperationError('IS_SNAPSHOT', `${name} is read-only; import into a VDI`);
  if (source.size !== undefined && source.size > disk.size) {
    throw new OperationError(
      'TOO_LONG',
      `the image has ${source.size} bytes, ${name} only ${disk.size}; resize it first`,
    );
  }
  const progress: Progress = startProgress(`importing ${name}`, source.size);
  try {
    const options = { progress, signal, isEmpty, inspect: source.inspect };
    let copied: Copied & { size: number };
    if (source.fd !== undefined && source.size !== undefined) {
      copied = { ...(await copyFileToDisk(source.fd, source.size, disk, options)), size: source.size };
    } else {
      copied = await copyStreamToDisk(source.stream ?? process.stdin, disk, options);
    }
    if (!isEmpty) await zeroRest(disk, copied.size);
    await disk.flush();
    return copied;
  } finally {
    progress.end();
  }
}

async function exists(operations: Operations, name: string): Promise<boolean> {
  return (await operations.list()).some((vdi) => vdi.name === name && !vdi.isSnapshot);
}

function roundUp(size: number): number {
  return Math.ceil(size / SIZE_UNIT) * SIZE_UNIT;
}
