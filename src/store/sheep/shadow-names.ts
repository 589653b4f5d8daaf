/** The names of shadows, by which every process knows them: temporary snapshots by copy-before-write (shadow.ts). */
import { createHash } from 'node:crypto';
import type { Inode } from '../../sheepdog/inode.js';
import { bytesOfText } from '../../text/name-bytes.js';

const PREFIX = 'sheepgate-now-';
const HASH_DIGITS = 24;
/** Others may have VDIs whose names begin like that. */
const SHADOW_NAME = new RegExp(`^${PREFIX}[0-9a-f]{${HASH_DIGITS}}-\\d{1,2}$`);
/** Temporary snapshots of one disk at a time. */
export const MAX_SHADOWS = 16;
/** The name of the VDI that is a disk's shadow. Names may be as long as a VDI's may be: hence the hash. */
export function shadowName(name: string, slot: number): string {
  return `${shadowPrefix(name)}${slot}`;
}

/** All that a disk may have. */
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

/** Not what somebody has made of one with the cluster's own tools: such a snapshot has no mark. */
export function isShadow({ name, isSnapshot, mark }: Inode): boolean {
  return isShadowName(name) && (!isSnapshot || mark.some((byte) => byte !== 0));
}
