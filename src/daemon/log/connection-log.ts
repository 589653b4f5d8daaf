/**
 * The log's lines about connections: opened, refused, closed. Owns their levels, so that a client that reconnects endlessly and
 * breaks the protocol each time does not bury the other lines. Changes nothing about the connections.
 */
import type { Logger } from 'pino';
import type { ConnectionCloseEvent, ConnectionOpenEvent, ConnectionRefusedEvent, Peer } from 'nbd-server-ts';
import { counted, times, type RepeatedLines } from './repeated-lines.js';

/** How long a connection of a repeat offender must stay open for its opening to be logged. */
const DELAYED_OPEN_MS = 1_000;

export class ConnectionLog {
  readonly #log: Logger;
  readonly #lines: RepeatedLines;
  /**
   * Open connections of repeat offenders whose opening is not logged yet. Most of them break the protocol at once, and then only
   * their close is logged. The opening of one that behaves for a moment, or until its end, is logged as for any other client.
   */
  readonly #delayed = new Map<number, { readonly tell: () => void; readonly timer: NodeJS.Timeout }>();

  constructor(log: Logger, lines: RepeatedLines) {
    this.#log = log;
    this.#lines = lines;
  }

  opened({ id, peer, exportName, violations }: ConnectionOpenEvent): void {
    const tell = (): void =>
      this.#log.info({ connection: id, ...identityOf(peer), export: exportName }, 'connection open');
    if (violations < 2) {
      tell();
      return;
    }
    const timer = setTimeout(() => this.#takeDelayed(id)?.(), DELAYED_OPEN_MS);
    this.#delayed.set(id, { tell, timer: timer.unref() });
  }

  refused({ peer, reason }: ConnectionRefusedEvent): void {
    this.#lines.tell(`peer ${originOf(peer)}`, `connection ${reason}`, (repetition) => {
      const details = { ...identityOf(peer), reason, ...counted(repetition) };
      this.#log.warn(details, `connection refused${times(repetition)}`);
    });
  }

  closed({ id, peer, exportName, refused, violations, isCrowdedOut, ...figures }: ConnectionCloseEvent): void {
    const tellOpened = this.#takeDelayed(id);
    if (isCrowdedOut && exportName === undefined) {
      const { reason } = figures;
      this.#lines.tell(`peer ${originOf(peer)}`, 'crowded out', (repetition) => {
        const details = { connection: id, ...identityOf(peer), reason, ...counted(repetition) };
        this.#log.warn(details, `connection closed${times(repetition)}`);
      });
      return;
    }
    if (violations === 0) tellOpened?.();
    this.#log[levelOfClose(violations)](
      {
        ...{ connection: id, ...identityOf(peer), export: exportName, refused, ...figures },
        ...(violations > 0 && { violations }),
      },
      violations > 1 ? 'connection closed, as before: the client breaks the protocol' : 'connection closed',
    );
  }

  #takeDelayed(id: number): (() => void) | undefined {
    const found = this.#delayed.get(id);
    if (found === undefined) return undefined;
    clearTimeout(found.timer);
    this.#delayed.delete(id);
    return found.tell;
  }
}

/**
 * A client may reconnect and break the protocol endlessly: the first, second, fourth, eighth time and so on is logged as a warning,
 * the others only with --debug.
 */
function levelOfClose(violations: number): 'info' | 'warn' | 'debug' {
  if (violations === 0) return 'info';
  return Number.isInteger(Math.log2(violations)) ? 'warn' : 'debug';
}

/** Fields of the log: a peer's address, and its identity as proven by the kernel or by TLS. */
export function identityOf(peer: Peer): object {
  const { credentials, tls } = peer;
  return {
    peer: labelOfPeer(peer),
    ...(credentials && { pid: credentials.pid, uid: credentials.uid }),
    ...(tls && {
      tls: `${tls.protocol} ${tls.cipher}`,
      ...(tls.certificateNames.length > 0 && { certificate: tls.certificateNames }),
      ...(tls.pskUser !== undefined && { pskUser: tls.pskUser }),
    }),
  };
}

/** A peer's address, for people. */
export function labelOfPeer(peer: Peer): string {
  return peer.transport === 'internal' ? 'control socket' : `${peer.transport} ${peer.address}`;
}

/** Identifies a peer over its connections: without its port and its process id. */
export function originOf(peer: Peer): string {
  const { transport, credentials, tls } = peer;
  const proven = tls?.pskUser ?? tls?.certificateNames[0] ?? '';
  if (transport === 'tcp') return `tcp ${peer.host ?? peer.address} ${proven}`;
  return `${transport} uid ${credentials?.uid ?? 'unknown'} ${proven}`;
}
