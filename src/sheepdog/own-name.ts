/**
 * The own name: a name that a VDI has during one request, on clusters where the nodes would find another VDI by its real name.
 * The real name is kept in unused bytes of the inode meanwhile: readers of such an inode use it, so that a process that ends in
 * between leaves no VDI without its name. Owns the form of own names and the place of the real name.
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

/** The vid whose inode holds the real name; undefined if this is no own name. A VDI made by the request has the same own name. */
export function formerNameAt(name: string): number | undefined {
  const vid = Number.parseInt(OWN_NAME.exec(name)?.[1] ?? '0', 16);
  return vid > 0 && vid <= MAX_VID ? vid : undefined;
}

/** The real name in these NAME_BYTES; empty if there is none. */
export function formerName(bytes: Buffer): string {
  const end = bytes.indexOf(0);
  return end < 0 ? '' : textOfBytes(bytes.subarray(0, Math.min(end, NAME_BYTES - 1)));
}
