/**
 * What the log says of connections: who came, who was turned away, how each one ended. Owns at which level, so that a
 * client that comes back for ever, and is wrong every time, does not bury everybody else.
 */
import type { Logger } from 'pino';
import type { ConnectionCloseEvent, ConnectionOpenEvent, ConnectionRefusedEvent, Peer } from 'nbd-server-ts';

/** How long a peer that has broken the protocol again and again must behave for its connection to be told of. */
const OPEN_UNTOLD_MS = 1_000;
/** Of connections that are turned away for being too many: one line of one peer and reason in this time. */
const CROWD_INTERVAL_MS = 10_000;
/** Peers and reasons that are remembered for that. */
const MAX_CROWDS = 1024;

export class ConnectionLog {
  readonly #log: Logger;
  readonly #crowd: Crowd;
  /**
   * Connections of peers who have broken the protocol again and again, opened and not yet told of: most do it at once, and
   * are told of by their closes. Those that behave for a moment, or to their end, are told of like all others.
   */
  readonly #untold = new Map<number, { readonly tell: () => void; readonly timer: NodeJS.Timeout }>();

  /** `now`: milliseconds of a clock that nobody sets. */
  constructor(log: Logger, now: () => number = () => performance.now()) {
    this.#log = log;
    this.#crowd = new Crowd(now);
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
    const more = this.#crowd.note(`refused ${whoOf(peer)} ${reason}`);
    if (more !== undefined) this.#log.warn({ ...identityOf(peer), reason, ...more }, 'connection refused');
  }

  closed({ id, peer, exportName, violations, isCrowdedOut, ...counted }: ConnectionCloseEvent): void {
    const tellOpened = this.#takeUntold(id);
    if (isCrowdedOut && exportName === undefined) {
      const more = this.#crowd.note(`crowded out ${whoOf(peer)}`);
      const reason = { reason: counted.reason, ...more };
      if (more !== undefined) this.#log.warn({ connection: id, ...identityOf(peer), ...reason }, 'connection closed');
      return;
    }
    if (violations === 0) tellOpened?.();
    this.#log[levelOfClose(violations)](
      {
        ...{ connection: id, ...identityOf(peer), export: exportName, ...counted },
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

/** Who comes in crowds is told of once in a while, with the number of those between. */
class Crowd {
  readonly #kinds = new Map<string, { until: number; unsaid: number }>();
  readonly #now: () => number;

  constructor(now: () => number) {
    this.#now = now;
  }

  /** What to say of this one beside itself; undefined: nothing at all. */
  note(kind: string): { readonly more?: number } | undefined {
    const time = this.#now();
    const known = this.#kinds.get(kind);
    if (known !== undefined && time < known.until) {
      known.unsaid++;
      return undefined;
    }
    // In the order of their last lines.
    this.#kinds.delete(kind);
    this.#kinds.set(kind, { until: time + CROWD_INTERVAL_MS, unsaid: 0 });
    if (this.#kinds.size > MAX_CROWDS) {
      const [oldest] = this.#kinds.keys();
      if (oldest !== undefined) this.#kinds.delete(oldest);
    }
    return known !== undefined && known.unsaid > 0 ? { more: known.unsaid } : {};
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

/** Whose connections are told of together: a host's, or a user's. */
function whoOf(peer: Peer): string {
  return `${peer.host ?? peer.address} ${peer.credentials?.uid ?? ''}`;
}

/** For the log: where a peer comes from, and who the kernel or TLS say it is. */
function identityOf(peer: Peer): object {
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
