/** Reads and writes of open files, whole whatever the kernel does at a time. Owns no file; descriptors stay the callers'. */
import fs from 'node:fs';
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
