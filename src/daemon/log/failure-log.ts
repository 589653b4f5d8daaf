/**
 * Logs failed requests and the store's own warnings. A client gets an error number only; the operator needs the disk, the cause with
 * its file or node, and the client. Repetitions are counted (repeated-lines.ts), so that a client that repeats a request does not
 * fill the log. Changes no answers.
 */
import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import type { Logger } from 'pino';
import { deviceFailures, type DeviceFailure } from '../../export/device-failures.js';
import { CatalogError } from '../../vdi/catalog-error.js';
import { identityOf } from './connection-log.js';
import { causeOf, counted, times, type RepeatedLines } from './repeated-lines.js';

/** Log each DeviceFailure. Call the returned function to stop. */
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
 * The log of a store. Lines about a node, and lines with an error, are counted: a node that fails again and again, or a disk that is
 * gone while a snapshot is deleted, can cause a line per request or object.
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

/** A log for lines that a client can cause again and again. `subject`: the client or the disk that a line is about. */
export function logOfPeers(
  log: Logger,
  lines: RepeatedLines,
): (subject: string, line: string, details: object) => void {
  return (subject, line, details) =>
    lines.tell(subject, line, (repetition) => {
      log.warn({ ...details, ...counted(repetition) }, line + times(repetition));
    });
}

/** A warning where the export was closed, or the VDI or snapshot is gone: the store has not failed. */
function levelOf({ code, error }: DeviceFailure): 'error' | 'warn' {
  return code === 'ESHUTDOWN' || error instanceof CatalogError ? 'warn' : 'error';
}
