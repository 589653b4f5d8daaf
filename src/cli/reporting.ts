/** Shows the reports of jobs on stderr: a progress line on a terminal only, notes always. */
import type { Reporting } from '../jobs/reporting.js';
import { printNote } from './output.js';
import { startProgress } from './progress.js';

export const onStderr: Reporting = { progress: startProgress, log: printNote };
