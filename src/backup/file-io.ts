/**
 * Files read and written whole, and made durable in the order that a crash needs. Owns no file; the callers' descriptors
 * stay theirs.
 */
import fs from 'node:fs';
import path from 'node:path';
import { promisify } from 'node:util';
import { OperationError } from '../daemon/operations.js';

const readAsync = promisify(fs.read);

/** Fill `into` from the file. Errors: CHANGED if the file ends before. */
export async function readFully(fd: number, into: Buffer, offset: number): Promise<void> {
  for (let done = 0; done < into.length;) {
    const { bytesRead } = await readAsync(fd, into, done, into.length - done, offset + done);
    if (bytesRead === 0)
      throw new OperationError('CHANGED', `the file became shorter while it was read: it ends at ${offset + done}`);
    done += bytesRead;
  }
}

/** Write all of `data`. */
export async function writeFully(fd: number, data: Buffer, offset: number): Promise<void> {
  for (let done = 0; done < data.length;) {
    done += await new Promise<number>((resolve, reject) => {
      fs.write(fd, data, done, data.length - done, offset + done, (error, count) =>
        error ? reject(error) : resolve(count),
      );
    });
  }
}

/** Fill `into` with what the file has there; zeros behind its end. */
export async function readWithin(fd: number, into: Buffer, offset: number): Promise<void> {
  for (let done = 0; done < into.length;) {
    const { bytesRead } = await readAsync(fd, into, done, into.length - done, offset + done);
    if (bytesRead === 0) {
      into.fill(0, done);
      return;
    }
    done += bytesRead;
  }
}

/** Replace a file by a whole new one: after a crash it is the old one or the new one. */
export async function replaceFile(file: string, content: string | Uint8Array): Promise<void> {
  const partial = `${file}.partial`;
  const handle = await fs.promises.open(partial, 'w', 0o600);
  try {
    await handle.writeFile(content);
    await handle.sync();
  } finally {
    await handle.close();
  }
  await moveFile(partial, file);
}

/** Rename, durably. */
export async function moveFile(from: string, to: string): Promise<void> {
  await fs.promises.rename(from, to);
  await syncDirectory(path.dirname(to));
  if (path.dirname(from) !== path.dirname(to)) await syncDirectory(path.dirname(from));
}

/** What was created, renamed and removed in the directory stays so after a crash. */
export async function syncDirectory(directory: string): Promise<void> {
  const handle = await fs.promises.open(directory, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}
