/** Text in structures: names, tags and labels, padded with NULs. Owns how it is cut off and where it ends. */
import { bytesOfText, textOfBytes } from '../text/name-bytes.js';
import { NAME_BYTES, TAG_BYTES } from './protocol.js';

/** Name and tag, as requests carry them. Text that does not fit is cut off: callers check names before. */
export function encodeName(name: string, tag?: string): Buffer {
  const data = Buffer.alloc(tag === undefined ? NAME_BYTES : NAME_BYTES + TAG_BYTES);
  bytesOfText(name).copy(data, 0, 0, NAME_BYTES - 1);
  if (tag !== undefined) bytesOfText(tag).copy(data, NAME_BYTES, 0, TAG_BYTES - 1);
  return data;
}

/** A tag as inodes hold it. */
export function encodeTag(tag: string): Buffer {
  const data = Buffer.alloc(TAG_BYTES);
  bytesOfText(tag).copy(data, 0, 0, TAG_BYTES - 1);
  return data;
}

export function decodeText(bytes: Buffer): string {
  const end = bytes.indexOf(0);
  return textOfBytes(end < 0 ? bytes : bytes.subarray(0, end));
}
