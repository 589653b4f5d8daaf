/**
 * What the options of `sheepgate serve` are made of: words, defaults and limits that belong to the layers below, handed on so
 * that the command line needs to know the daemon only.
 */
export { OTHERWISE, parseOtherwise, type Exclusive } from '../export/exclusive.js';
export { parseExportName } from '../export/export-name.js';
export { DEFAULT_KEEP_MS } from '../export/temporary-snapshots.js';
export { DEFAULT_IN_USE_MS } from '../vdi/in-use-time.js';
