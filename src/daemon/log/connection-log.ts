/**
 * What the log says of connections: who came, who was turned away, how each one ended. Owns at which level, so that a
 * client that comes back for ever, and is wrong every time, does not bury everybody else.
 */
import type { Logger } from 'pino';
import type { ConnectionCloseEvent, ConnectionOpenEvent, ConnectionRefusedEvent, Peer } from 'nbd-server-ts';
import { counted, times, type RepeatedLines } from './repeated-lines.js';

/** How long a peer that has broken the protocol again and again must behave for its connection to be told of. */
const OPEN_UNTOLD_MS = 1_000;

export class ConnectionLog {
  readonly #log: Logger;
  readonly #lines: RepeatedLines;
  /**
   * Connections of peers who have broken the protocol again and again, opened and not yet told of: most do it at once, and
   * are told of by their closes. Those that behave for a moment, or to their end, are told of like all others.
   */
  readonly #untold = new Map<number, { readonly tell: () => void; readonly timer: NodeJS.Timeout }>();

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
    const timer = setTimeout(() => this.#takeUntold(id)?.(), OPEN_UNTOLD_MS);
    this.#untold.set(id, { tell, timer: timer.unref() });
  }

  refused({ peer, reason }: ConnectionRefusedEvent): void {
    this.#lines.tell(`peer ${originOf(peer)}`, `connection ${reason}`, (repetition) => {
      const details = { ...identityOf(peer), reason, ...counted(repetition) };
      this.#log.warn(details, `connection refused${times(repetition)}`);
    });
  }

  closed({ id, peer, exportName, refused, violations, isCrowdedOut, ...figures }: ConnectionCloseEvent): void {
    const tellOpened = this.#takeUntold(id);
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

  #takeUntold(id: number): (() => void) | undefined {
    const found = this.#untold.get(id);
    if (found === undefined) return undefined;
    clearTimeout(found.timer);
    this.#untold.delete(id);
    return found.tell;
  }
}

/**
 * A client that breaks the protocol may come back for ever and do it again: told of the first time, the second, the
 * fourth, the eighth and so on, and in between only to who debugs.
 */
function levelOfClose(violations: number): 'info' | 'warn' | 'debug' {
  if (violations === 0) return 'info';
  return Number.isInteger(Math.log2(violations)) ? 'warn' : 'debug';
}

/** For the log: where a peer comes from, and who the kernel or TLS say it is. */
export function identityOf(peer: Peer): object {
  const { credentials, tls } = peer;
  return {
    peer: labelOf(peer),
    ...(credentials && { pid: credentials.pid, uid: credentials.uid }),
    ...(tls && {
      tls: `${tls.protocol} ${tls.cipher}`,
      ...(tls.certificateNames.length > 0 && { certificate: tls.certificateNames }),
      ...(tls.pskUser !== undefined && { pskUser: tls.pskUser }),
    }),
  };
}

/** Where a peer comes from, in words. */
export function labelOf(peer: Peer): string {
  return peer.transport === 'internal' ? 'control socket' : `${peer.transport} ${peer.address}`;
}

/** Whom a line is about, also when it comes back: not its port, nor the number of its process. */
export function originOf(peer: Peer): string {
  const { transport, credentials, tls } = peer;
  const proven = tls?.pskUser ?? tls?.certificateNames[0] ?? '';
  if (transport === 'tcp') return `tcp ${peer.host ?? peer.address} ${proven}`;
  return `${transport} uid ${credentials?.uid ?? 'unknown'} ${proven}`;
}
