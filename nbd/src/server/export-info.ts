/**
 * The name and description of an export, as the program gave them, checked before anything is announced. It owns what counts
 * as a name.
 */

import type { ExportInfo } from '../block-device.js';
import { decodeString, MAX_STRING_BYTES } from '../protocol/wire.js';

/**
 * `given` as plain data. Without a description it is empty: it is only for people. Errors: Error if it has no name that can be
 * sent.
 */
export function checkedInfo(given: unknown): ExportInfo {
  if (typeof given !== 'object' || given === null) throw new Error('the export has no info');
  const { name, description, countedAs } = given as Partial<Record<keyof ExportInfo, unknown>>;
  if (typeof name !== 'string') throw new Error(`info.name is a value of type ${typeof name}, not a string`);
  if (decodeString(Buffer.from(name)) !== name) {
    const shown = JSON.stringify(name.slice(0, 100));
    throw new Error(`info.name cannot be sent: ${shown} is not text of at most ${MAX_STRING_BYTES} bytes without NUL`);
  }
  return {
    name,
    description: typeof description === 'string' ? description : '',
    ...(typeof countedAs === 'string' && { countedAs }),
  };
}
