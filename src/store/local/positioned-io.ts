/** Reads and writes at an offset on the thread pool, as promises of how much was done: Node's own make an object each. */
import fs from 'node:fs';

export function readOnce(fd: number, into: Buffer, at: number, offset: number): Promise<number> {
  return new Promise((resolve, reject) => {
    fs.read(fd, into, at, into.length - at, offset, (error, count) => (error ? reject(error) : resolve(count)));
  });
}

function writeOnce(fd: number, data: Buffer, from: number, offset: number): Promise<number> {
  return new Promise((resolve, reject) => {
    fs.write(fd, data, from, data.length - from, offset, (error, count) => (error ? reject(error) : resolve(count)));
  });
}

/** Read until `into` is full or the file ends. Resolves to how much of it is filled, with the `done` bytes that were. */
export async function readToEnd(fd: number, into: Buffer, offset: number, done = 0): Promise<number> {
  while (done < into.length) {
    const count = await readOnce(fd, into, done, offset + done);
    if (count === 0) break;
    done += count;
  }
  return done;
}

/** Fill `into` from `offset`; what lies behind the end of the file is zeros. */
export async function readFully(fd: number, into: Buffer, offset: number, done = 0): Promise<void> {
  into.fill(0, await readToEnd(fd, into, offset, done));
}

export async function writeFully(fd: number, data: Buffer, offset: number): Promise<void> {
  for (let done = 0; done < data.length;) done += await writeOnce(fd, data, done, offset + done);
}
