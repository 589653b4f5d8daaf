/** How a job gets at its store: opened for a part of the work, and closed after it. The caller that starts the job knows which store. */
import type { Operations } from '../operations/operations.js';

/** Opens the store, does the work, and closes it. A job may call it several times. */
export type WithStore = <T>(work: (operations: Operations) => Promise<T>) => Promise<T>;
