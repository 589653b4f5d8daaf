/**
 * How an error of the provider is told to the client that asked for an export. It owns the table of ExportError's codes;
 * whatever is thrown, the answer is an error of the protocol.
 */

import { ExportError, type ExportErrorCode } from '../block-device.js';
import { REP } from '../protocol/wire.js';
import type { HandshakeHost } from './handshake-host.js';

/** "Option reply types". `FAILED` and codes that this copy of the package does not know have none of their own. */
const REFUSALS: ReadonlyMap<unknown, number> = new Map<ExportErrorCode, number>([
  ['UNKNOWN', REP.ERR_UNKNOWN],
  ['POLICY', REP.ERR_POLICY],
  ['TLS_REQUIRED', REP.ERR_TLS_REQD],
  ['SHUTDOWN', REP.ERR_SHUTDOWN],
]);

/**
 * The answer to an error of the provider's `method`; it is remembered if it concerns an export. Anything but an ExportError is a
 * bug: its text is not sent. Both are reported, unless the code says that the error is an answer. Never throws.
 */
export function refusal(
  host: Pick<HandshakeHost, 'export'>,
  error: unknown,
  method: 'list' | 'describe' | 'open',
  exportName?: string,
): { readonly type: number; readonly message: string } {
  if (exportName !== undefined) host.export.refused = exportName;
  const { type, message, isExpected } = refusalOf(error);
  if (type === undefined) host.export.failed(error, { source: 'provider', method, exportName }, isExpected);
  return { type: type ?? REP.ERR_UNKNOWN, message };
}

/** `type` is undefined for failures, which are no answers and are to be reported. Never throws. */
export function refusalOf(error: unknown): { type: number | undefined; message: string; isExpected: boolean } {
  const bug = { type: undefined, message: 'the export cannot be opened: internal error', isExpected: false };
  try {
    if (!(error instanceof ExportError)) return bug;
    const { code, message }: { code: unknown; message: unknown } = error;
    if (typeof message !== 'string') return bug;
    return { type: REFUSALS.get(code), message, isExpected: code === 'FAILED' || REFUSALS.has(code) };
  } catch {
    // A getter or a proxy of the program has thrown.
    return bug;
  }
}
