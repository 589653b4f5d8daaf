/**
 * The name that a VDI has for the length of one request, on clusters where the nodes would take another one for it by its own
 * (by-name.ts). Its name of before is kept in its inode meanwhile, in bytes that have no use, so that a process that ends in
 * between leaves nothing without a name: whoever reads such an inode here finds that one. Owns this name and where the other is.
 */
import { textOfBytes } from '../text/name-bytes.js';
import { MAX_VID } from './object-ids.js';
import { NAME_BYTES } from './protocol.js';

const PREFIX = 'sheepgate-renamed-';
const OWN_NAME = new RegExp(`^${PREFIX}([0-9a-f]{1,6})$`);
/** sheepdog_proto.h, struct sd_inode, __unused: from 572 to the table at 4664. */
export const INODE_FORMER_NAME_OFFSET = 4096;

export function ownName(vid: number): string {
  return PREFIX + vid.toString(16);
}

/** In whose inode the name of before is; undefined if this is no such name. The VDI that a request makes has the same. */
export function formerNameAt(name: string): number | undefined {
  const vid = Number.parseInt(OWN_NAME.exec(name)?.[1] ?? '0', 16);
  return vid > 0 && vid <= MAX_VID ? vid : undefined;
}

/** Of NAME_BYTES; empty if there is none. */
export function formerName(bytes: Buffer): string {
  const end = bytes.indexOf(0);
  return end < 0 ? '' : textOfBytes(bytes.subarray(0, Math.min(end, NAME_BYTES - 1)));
}
