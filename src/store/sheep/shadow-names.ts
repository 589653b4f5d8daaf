/** The names of shadows, by which every process knows them: temporary snapshots by copy-before-write (shadow.ts). */
import { createHash } from 'node:crypto';
import type { Inode } from '../../sheepdog/inode.js';
import { bytesOfText } from '../../text/name-bytes.js';

const PREFIX = 'sheepgate-now-';
const HASH_DIGITS = 24;
/** The whole pattern: VDIs of other people may begin like that. */
const SHADOW_NAME = new RegExp(`^${PREFIX}[0-9a-f]{${HASH_DIGITS}}-\\d{1,2}$`);
/** Temporary snapshots of one disk at a time. */
export const MAX_SHADOWS = 16;
/** The name of a shadow of the disk. Has a hash, because the disk's name may be as long as any name may be. */
export function shadowName(name: string, slot: number): string {
  return `${shadowPrefix(name)}${slot}`;
}

/** The names of all shadows that a disk can have. */
export function shadowNames(name: string): string[] {
  const prefix = shadowPrefix(name);
  return Array.from({ length: MAX_SHADOWS }, (_, slot) => `${prefix}${slot}`);
}

export function shadowPrefix(name: string): string {
  return `${PREFIX}${createHash('sha256').update(bytesOfText(name)).digest('hex').slice(0, HASH_DIGITS)}-`;
}

export function isShadowName(name: string): boolean {
  return SHADOW_NAME.test(name);
}

/** False for a snapshot of a shadow that was made with the cluster's own tools: it has no mark. */
export function isShadow({ name, isSnapshot, mark }: Inode): boolean {
  return isShadowName(name) && (!isSnapshot || mark.some((byte) => byte !== 0));
}
