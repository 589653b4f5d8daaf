/**
 * The log's share of what clients are told when the store fails them: a client sees a number, and whoever looks after the
 * machine needs the disk, the cause with its file or node, and who was hit. Owns that a client that asks again and again
 * does not fill the log: of each cause on each disk a line at once, and then one in a while that says how many there were.
 */
import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import type { Logger } from 'pino';
import { deviceFailures, type DeviceFailure } from '../../export/device-failures.js';
import { CatalogError } from '../../vdi/catalog-error.js';
import { identityOf } from './connection-log.js';
import { causeOf, counted, times, type RepeatedLines } from './repeated-lines.js';

/** Returns what to call when no more is to be logged. */
export function logFailures(log: Logger, lines: RepeatedLines): () => void {
  const listener = (message: unknown): void => {
    const failure = message as DeviceFailure;
    const { code, error, disk, exportName, peer } = failure;
    lines.tell(`disk ${disk}`, `${code} ${causeOf(error)}`, (repetition) => {
      const { message: reason } = error as Error;
      const details = { err: error, code, disk, export: exportName, ...identityOf(peer), ...counted(repetition) };
      log[levelOf(failure)](details, `${disk}: a request failed with ${code}: ${reason}${times(repetition)}`);
    });
  };
  subscribe(deviceFailures.name, listener);
  return () => void unsubscribe(deviceFailures.name, listener);
}

/**
 * What the store says by itself. Of a node that is left again and again, and of errors that come with every object (a disk is
 * gone while a snapshot is deleted), there can be as many lines as requests.
 */
export function logOfStore(log: Logger, lines: RepeatedLines): (line: string, details?: object) => void {
  return (line, details = {}) => {
    const { node, err } = details as { readonly node?: string; readonly err?: unknown };
    if (node === undefined && err === undefined) return log.warn(details, line);
    lines.tell(node === undefined ? 'store' : `node ${node}`, line, (repetition) =>
      log.warn({ ...details, ...counted(repetition) }, line + times(repetition)),
    );
  };
}

/** What is told of somebody who may come back for ever. `subject`: who, or about what. */
export function logOfPeers(
  log: Logger,
  lines: RepeatedLines,
): (subject: string, line: string, details: object) => void {
  return (subject, line, details) =>
    lines.tell(subject, line, (repetition) => {
      log.warn({ ...details, ...counted(repetition) }, line + times(repetition));
    });
}

/** What somebody has closed, or taken away, has not failed. */
function levelOf({ code, error }: DeviceFailure): 'error' | 'warn' {
  return code === 'ESHUTDOWN' || error instanceof CatalogError ? 'warn' : 'error';
}
