/**
 * Tells the operator which client asked for which export and did not get it, and why: all of the reason, of which clients are
 * told what concerns them. Owns the levels, and that a client that comes back again and again does not fill the log. Changes
 * nothing of what is answered.
 */
import type { Logger } from 'pino';
import { ExportError, type Awaitable, type ExportProvider, type Peer } from 'nbd-server-ts/block-device';
import { CatalogError, type CatalogErrorCode } from '../../vdi/catalog-error.js';
import { identityOf, originOf } from './connection-log.js';
import { causeOf, counted, times, type Repetition, type StoreAndPeerLines } from './repeated-lines.js';

/** A name was wrong, or the client's settings are. */
const MISTAKES: ReadonlySet<CatalogErrorCode> = new Set(['NO_VDI', 'NO_TAG', 'BAD_NAME']);

/** Exports whose refusals are in the log. */
export class LoggedExports implements ExportProvider {
  readonly #provider: ExportProvider;
  readonly #log: Logger;
  readonly #repeated: StoreAndPeerLines;
  /** Of each connection what it was refused last: clients ask in two ways for what they want to open. */
  readonly #last = new WeakMap<Peer, string>();

  constructor(provider: ExportProvider, log: Logger, repeated: StoreAndPeerLines) {
    this.#provider = provider;
    this.#log = log;
    this.#repeated = repeated;
  }

  list: ExportProvider['list'] = (peer) => this.#telling(undefined, peer, () => this.#provider.list(peer));

  describe: ExportProvider['describe'] = (...of) => this.#telling(of[0], of[1], () => this.#provider.describe(...of));

  open: ExportProvider['open'] = (...of) => this.#telling(of[0], of[1], () => this.#provider.open(...of));

  left(peer: Peer): void {
    this.#provider.left?.(peer);
  }

  async #telling<T>(exportName: string | undefined, peer: Peer, ask: () => Awaitable<T>): Promise<T> {
    try {
      return await ask();
    } catch (error) {
      // What is no ExportError is a bug, and told as that.
      if (error instanceof ExportError) this.#tell(exportName, peer, error);
      throw error;
    }
  }

  #tell(exportName: string | undefined, peer: Peer, error: ExportError): void {
    const cause = wholeCause(error);
    const level = levelOf(error, cause);
    // A command of ours says itself what it was refused; that a store fails is told all the same.
    if (peer.transport === 'internal' && level !== 'error') return;
    // What fails fails everybody; what is refused is somebody's affair, and does not keep the others' out of the log.
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

/** What the operator must act upon, may want to know, or what somebody has mistyped. */
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

/** The first error that was not made for the client. */
function wholeCause(error: ExportError): Error {
  let whole: Error = error;
  while (whole instanceof ExportError && whole.cause instanceof Error) whole = whole.cause;
  return whole;
}
