/** What jobs report, shown on stderr: a line of progress on a terminal, notes everywhere. */
import type { Reporting } from '../jobs/reporting.js';
import { printNote } from './output.js';
import { startProgress } from './progress.js';

export const onStderr: Reporting = { progress: startProgress, log: printNote };
