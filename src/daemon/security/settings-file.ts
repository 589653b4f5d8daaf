/**
 * Reads the small files that decide about access: access rules, certificates, keys. A file must not make the daemon wait (a fifo),
 * fill its memory (/dev/zero), or be misread (text that is not UTF-8). Owns these checks, and the warnings about files that other
 * users may write or read. Does not interpret the contents.
 */
import { constants } from 'node:fs';
import fs from 'node:fs/promises';
import { reasonOf } from '../../system/system-error.js';

/** Far more than ten thousand rules or a chain of certificates; revocation lists are the longest. */
export const MAX_SETTINGS_BYTES = 16 * 2 ** 20;
/** Per read. */
const PIECE_BYTES = 64 * 1024;

const WRITTEN_BY_ALL = 0o002;
const USED_BY_ALL = 0o007;

/** Why a file is not accepted; the message follows "FILE cannot be read: ". */
export class SettingsError extends Error {}

export interface SettingsFile {
  readonly bytes: Buffer;
  readonly mode: number;
}

/** Errors: SettingsError. */
export async function readSettings(file: string): Promise<SettingsFile> {
  try {
    // Without O_NONBLOCK, opening a fifo waits for its writer.
    const handle = await fs.open(file, constants.O_RDONLY | constants.O_NONBLOCK | constants.O_NOCTTY);
    try {
      const { mode, size } = await handle.stat();
      if (!isRegular(mode)) throw new SettingsError(`it is ${kindOf(mode)}, not a file`);
      if (size > MAX_SETTINGS_BYTES) throw tooLong(`${size} bytes`);
      return { bytes: await readAll(handle), mode };
    } finally {
      await handle.close();
    }
  } catch (error) {
    if (error instanceof SettingsError) throw error;
    const isMissing = (error as NodeJS.ErrnoException).code === 'ENOENT';
    throw new SettingsError(isMissing ? 'it does not exist' : reasonOf(error as Error), { cause: error });
  }
}

/** Files of /proc have no size and may have no end. */
async function readAll(handle: fs.FileHandle): Promise<Buffer> {
  const pieces: Buffer[] = [];
  for (let length = 0; length <= MAX_SETTINGS_BYTES;) {
    const { bytesRead, buffer } = await handle.read(Buffer.allocUnsafe(PIECE_BYTES), 0, PIECE_BYTES, null);
    if (bytesRead === 0) return Buffer.concat(pieces);
    pieces.push(buffer.subarray(0, bytesRead));
    length += bytesRead;
  }
  throw tooLong(`more than ${MAX_SETTINGS_BYTES} bytes`);
}

function tooLong(size: string): SettingsError {
  return new SettingsError(`it has ${size}; at most ${MAX_SETTINGS_BYTES} are read`);
}

/** The file's text, without a byte order mark. Errors: SettingsError (with the line that is not UTF-8). */
export function textOf({ bytes }: SettingsFile): string {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch (error) {
    throw new SettingsError(`${lineThatIsNotUtf8(bytes)} is not UTF-8`, { cause: error });
  }
}

/** The warning for a file that every user may write; undefined if they may not. */
export function warningOfWritable(file: string, { mode }: SettingsFile): string | undefined {
  if ((mode & WRITTEN_BY_ALL) === 0) return undefined;
  return `${file} can be written by every user of this machine, who can let any client in; chmod o-w it`;
}

/** The warning for a file with secrets that every user may read; undefined if they may not. */
export function warningOfSecret(file: string, { mode }: SettingsFile): string | undefined {
  if ((mode & USED_BY_ALL) === 0) return undefined;
  return `${file} can be read by every user of this machine; chmod 600 it`;
}

function isRegular(mode: number): boolean {
  return (mode & constants.S_IFMT) === constants.S_IFREG;
}

function kindOf(mode: number): string {
  switch (mode & constants.S_IFMT) {
    case constants.S_IFDIR:
      return 'a directory';
    case constants.S_IFIFO:
      return 'a fifo';
    case constants.S_IFCHR:
    case constants.S_IFBLK:
      return 'a device';
    default:
      return 'something else';
  }
}

function lineThatIsNotUtf8(bytes: Buffer): string {
  const decoder = new TextDecoder('utf-8', { fatal: true });
  let from = 0;
  for (let line = 1; from <= bytes.length; line++) {
    const end = bytes.indexOf(0x0a, from);
    const to = end < 0 ? bytes.length : end;
    try {
      decoder.decode(bytes.subarray(from, to));
    } catch {
      return `line ${line}`;
    }
    from = to + 1;
  }
  return 'it';
}
