/** How long a client counts as a user of a VDI unless the operator says otherwise. A file of its own, so that options can quote it. */

/** Of a client that was cut off. An idle guest comes back only with its next request. */
export const DEFAULT_IN_USE_MS = 60 * 60_000;
