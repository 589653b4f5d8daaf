/**
 * Logs which client was refused which export, with the full reason; the client gets only the part that concerns it. Owns the levels of
 * these lines. Repetitions are counted, so that a client that reconnects endlessly does not fill the log. Changes no answers.
 */
import type { Logger } from 'pino';
import { ExportError, type Awaitable, type ExportProvider, type Peer } from 'nbd-server-ts/block-device';
import { CatalogError, type CatalogErrorCode } from '../../vdi/catalog-error.js';
import { identityOf, originOf } from './connection-log.js';
import { causeOf, counted, times, type Repetition, type StoreAndPeerLines } from './repeated-lines.js';

/** The client has mistyped a name, or its settings are wrong. */
const MISTAKES: ReadonlySet<CatalogErrorCode> = new Set(['NO_VDI', 'NO_TAG', 'BAD_NAME']);

/** Passes all calls on to `provider`, and logs its refusals. */
export class LoggedExports implements ExportProvider {
  readonly #provider: ExportProvider;
  readonly #log: Logger;
  readonly #repeated: StoreAndPeerLines;
  /** The last refusal of each connection: clients ask for an export in two ways, and get the same refusal twice. */
  readonly #last = new WeakMap<Peer, string>();

  constructor(provider: ExportProvider, log: Logger, repeated: StoreAndPeerLines) {
    this.#provider = provider;
    this.#log = log;
    this.#repeated = repeated;
  }

  list: ExportProvider['list'] = (peer) => this.#telling(undefined, peer, () => this.#provider.list(peer));

  describe: ExportProvider['describe'] = (...of) => this.#telling(of[0], of[1], () => this.#provider.describe(...of));

  open: ExportProvider['open'] = (...of) => this.#telling(of[0], of[1], () => this.#provider.open(...of));

  left(peer: Peer): Awaitable<void> {
    return this.#provider.left?.(peer);
  }

  async #telling<T>(exportName: string | undefined, peer: Peer, ask: () => Awaitable<T>): Promise<T> {
    try {
      return await ask();
    } catch (error) {
      // Any other error is a bug, which the NBD server reports.
      if (error instanceof ExportError) this.#tell(exportName, peer, error);
      throw error;
    }
  }

  #tell(exportName: string | undefined, peer: Peer, error: ExportError): void {
    const cause = wholeCause(error);
    const level = levelOf(error, cause);
    // Our own commands report their refusals themselves; failures of the store are logged all the same.
    if (peer.transport === 'internal' && level !== 'error') return;
    // A failure concerns all clients, so it is counted per export. A refusal is counted per client: a client's own refusals do not
    // keep those of others out of the log.
    const subject = level === 'error' ? `export ${exportName}` : `peer ${originOf(peer)}`;
    const kind = level === 'error' ? causeOf(cause) : `${exportName} ${error.code} ${causeOf(cause)}`;
    if (this.#last.get(peer) === `${subject} ${kind}`) return;
    this.#last.set(peer, `${subject} ${kind}`);
    const { ofStore, ofPeers } = this.#repeated;
    const lines = level === 'error' ? ofStore : ofPeers;
    lines.tell(subject, kind, (repetition) => this.#write(level, exportName, peer, cause, repetition));
  }

  #write(level: Level, exportName: string | undefined, peer: Peer, cause: Error, repetition: Repetition): void {
    const details = { export: exportName, ...identityOf(peer), ...counted(repetition) };
    const isFailure = level === 'error';
    const what = isFailure ? 'cannot be opened' : 'refused';
    const subject =
      exportName === undefined ? 'the exports cannot be listed' : `export ${JSON.stringify(exportName)} ${what}`;
    this.#log[level](
      isFailure ? { err: cause, ...details } : details,
      `${subject}: ${cause.message}${times(repetition)}`,
    );
  }
}

type Level = 'error' | 'warn' | 'info';

/** error: the operator must act; warn: the operator may want to know; info: a client has mistyped something. */
function levelOf({ code }: ExportError, cause: Error): Level {
  switch (code) {
    case 'FAILED':
      return 'error';
    case 'POLICY':
      return 'warn';
    case 'UNKNOWN':
      return cause instanceof CatalogError && !MISTAKES.has(cause.code) ? 'warn' : 'info';
    case 'TLS_REQUIRED':
    case 'SHUTDOWN':
      return 'info';
  }
}

/** The first cause that is not an ExportError: it was not worded for the client. */
function wholeCause(error: ExportError): Error {
  let whole: Error = error;
  while (whole instanceof ExportError && whole.cause instanceof Error) whole = whole.cause;
  return whole;
}
