/** The kind of Vdi for what a store has opened. */
import type { OpenVdi } from '../store/open-vdi.js';
import { CopyOnWriteVdi } from './copy-on-write-vdi.js';
import { DirectVdi } from './direct-vdi.js';
import type { Vdi } from './vdi.js';

/** `readOnlyBecause`: of the store; undefined if it can be changed. */
export function openAsVdi(opened: OpenVdi, readOnlyBecause: string | undefined): Vdi {
  return opened.kind === 'objects'
    ? new CopyOnWriteVdi(opened, readOnlyBecause)
    : new DirectVdi(opened, readOnlyBecause);
}
