/**
 * Words, defaults and limits of the layers below, for the options of `sheepgate serve`: so the command line imports only the
 * daemon.
 */
export { OTHERWISE, parseOtherwise, type Exclusive } from '../export/exclusive.js';
export { parseExportName } from '../export/export-name.js';
export { DEFAULT_KEEP_MS } from '../export/temporary-snapshots.js';
export { DEFAULT_IN_USE_MS } from '../vdi/in-use-time.js';
