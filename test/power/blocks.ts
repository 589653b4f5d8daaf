/**
 * Data that says where it belongs: every 512 bytes repeat a line with the disk, the number of the write, and the block. Owns
 * that line. So a wrong block tells where its bytes come from.
 */

export const BLOCK = 512;
const LINE = 32;

/** The bytes of write number `write` to the range [offset, offset + length) of `disk`. */
export function dataOf(disk: string, write: number, offset: number, length: number): Buffer {
  const first = Math.floor(offset / BLOCK);
  const last = Math.floor((offset + length - 1) / BLOCK);
  const blocks = Buffer.alloc((last - first + 1) * BLOCK);
  for (let block = first; block <= last; block++) {
    const line = `${disk} write ${write} block ${block}`.padEnd(LINE - 1).slice(0, LINE - 1);
    blocks.fill(`${line}\n`, (block - first) * BLOCK, (block - first + 1) * BLOCK, 'latin1');
  }
  return blocks.subarray(offset - first * BLOCK, offset - first * BLOCK + length);
}

/** For messages. */
export function describeBlock(bytes: Buffer): string {
  if (bytes.every((byte) => byte === 0)) return 'zeros';
  const lines = new Set(
    Array.from({ length: BLOCK / LINE }, (_, n) =>
      bytes
        .toString('latin1', n * LINE, (n + 1) * LINE)
        .trim()
        .replaceAll(/[^ -~]/g, '.'),
    ),
  );
  return [...lines].map((line) => `"${line}"`).join(' + ');
}
