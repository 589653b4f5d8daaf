/**
 * Admission of connections: how many there may be, in all, of one peer, over TCP and in the handshake, and which one is
 * closed when there is no room. It owns the counts. A connection that is leaving, or that has chosen no export and waits
 * for its client, makes room for a new one. A connection with an export is never closed for another.
 */

import type { Peer } from '../block-device.js';
import { DEFAULT_SHARE_OF_ONE_PEER, type Limits } from './limits.js';

/** With a unix socket beside TCP, one connection in so many is reserved for unix sockets. */
export const UNIX_ROOM_DIVISOR = 8;

/** Connections of one peer, including those that are leaving, for each connection that it may have. */
const LEAVING_FACTOR = 2;

/** The connection that takes a place. */
export interface Occupant {
  /**
   * Whether the next step is the client's, of its handshake or its leaving. False: it has an export, or waits for the
   * server.
   */
  readonly isWaitedFor: boolean;
  /** Close its socket now; called at most once. */
  crowdOut(reason: string): void;
}

/** One connection's place. It begins in the handshake. */
export class Place {
  occupant: Occupant | undefined;

  readonly #admission: Admission;

  constructor(
    admission: Admission,
    readonly key: string,
    readonly transport: Peer['transport'],
  ) {
    this.#admission = admission;
  }

  /** The handshake has advanced: this connection is the last of its peer to make room. */
  advanced(): void {
    this.#admission.advanced(this);
  }

  /** It has chosen an export. */
  settled(): void {
    this.#admission.settled(this);
  }

  /** The client has disconnected, or the server has finished with it. Within limits it no longer counts for its peer. */
  leaving(): void {
    this.#admission.leaving(this);
  }

  /** The socket is closed. May be called again. */
  left(): void {
    this.#admission.left(this);
  }
}

/** One peer's connections, and those of them that are not leaving. */
interface PeerCounts {
  open: number;
  staying: number;
}

/** By peer, in the order in which they make room. */
type Waiting = Map<string, Set<Place>>;

export class Admission {
  /** Whether some places are reserved for unix sockets. */
  keepsRoomForUnix = false;
  readonly #places = new Set<Place>();
  #tcpCount = 0;
  readonly #countsOf = new Map<string, PeerCounts>();
  /** Places in the handshake, by peer; the one that has been quiet for longest is first. */
  readonly #handshakes: Waiting = new Map();
  #handshakeCount = 0;
  readonly #departures = new Set<Place>();

  readonly #limits: Limits;

  constructor(limits: Limits) {
    this.#limits = limits;
  }

  /** A place for a connection of the peer `key`, or the reason why there is none. Another connection may be closed for it. */
  enter(key: string, transport: Peer['transport']): Place | string {
    const { maxConnections, maxConnectionsPerPeer, maxHandshakes } = this.#limits;
    const tcpRoom = this.#tcpRoom();
    const counts = this.#countsOf.get(key);
    if (counts && counts.staying >= maxConnectionsPerPeer && !this.#crowdOut(key)) {
      return `${maxConnectionsPerPeer} connections of this peer are open, as many as allowed`;
    }
    // A client that has left may reconnect at once, while its old connection is still being answered; but not without limit.
    if (counts && counts.open >= this.#mostOpenOfOnePeer() && !this.#expelDeparture(key)) {
      return `${counts.open - counts.staying} connections of this peer that are leaving are open, as many as allowed`;
    }
    const isOverTcp = transport === 'tcp' && tcpRoom < maxConnections;
    if (isOverTcp && this.#tcpCount >= tcpRoom && !this.#makeRoom('tcp')) {
      return `${tcpRoom} TCP connections are open, as many as allowed; ${maxConnections - tcpRoom} more are for unix sockets`;
    }
    if (this.#places.size >= maxConnections && !this.#makeRoom()) {
      return `${maxConnections} connections are open, as many as allowed`;
    }
    // Connections that wait for the server are not closed: it is not their clients that are slow.
    if (this.#handshakeCount >= maxHandshakes) this.#crowdOut();
    const place = new Place(this, key, transport);
    this.#places.add(place);
    if (transport === 'tcp') this.#tcpCount++;
    const peer = this.#countsOf.get(key) ?? { open: 0, staying: 0 };
    peer.open++;
    peer.staying++;
    this.#countsOf.set(key, peer);
    this.#addHandshake(place);
    return place;
  }

  advanced(place: Place): void {
    const ofPeer = this.#handshakes.get(place.key);
    // Last of the peer's.
    if (ofPeer?.delete(place)) ofPeer.add(place);
  }

  settled(place: Place): void {
    this.#removeHandshake(place);
  }

  leaving(place: Place): void {
    if (!this.#places.has(place) || this.#departures.has(place)) return;
    this.#removeHandshake(place);
    this.#departures.add(place);
    const counts = this.#countsOf.get(place.key);
    if (counts) counts.staying--;
  }

  left(place: Place): void {
    if (!this.#places.delete(place)) return;
    if (place.transport === 'tcp') this.#tcpCount--;
    const counts = this.#countsOf.get(place.key);
    if (counts) {
      if (!this.#departures.delete(place)) counts.staying--;
      if (--counts.open === 0) this.#countsOf.delete(place.key);
    }
    this.#removeHandshake(place);
  }

  /** Including those that are leaving, since some leave slowly: twice as many as it may have, but not the room of others. */
  #mostOpenOfOnePeer(): number {
    const { maxConnections, maxConnectionsPerPeer } = this.#limits;
    const share = Math.ceil(maxConnections * DEFAULT_SHARE_OF_ONE_PEER);
    return Math.max(maxConnectionsPerPeer, Math.min(LEAVING_FACTOR * maxConnectionsPerPeer, share));
  }

  #tcpRoom(): number {
    const { maxConnections } = this.#limits;
    return this.keepsRoomForUnix ? maxConnections - Math.floor(maxConnections / UNIX_ROOM_DIVISOR) : maxConnections;
  }

  /** Close a connection that is leaving, or else one in the handshake; of one transport, if given. */
  #makeRoom(transport?: Peer['transport']): boolean {
    return this.#expelDeparture(undefined, transport) || this.#crowdOut(undefined, transport);
  }

  #expelDeparture(key?: string, transport?: Peer['transport']): boolean {
    for (const place of this.#departures) {
      if (key !== undefined && place.key !== key) continue;
      if (transport !== undefined && place.transport !== transport) continue;
      // Otherwise its last requests are still being executed.
      if (place.occupant?.isWaitedFor !== true) continue;
      this.#expel(place, 'made room for another connection');
      return true;
    }
    return false;
  }

  /** Close a connection in the handshake: of the peer with most of them, the one that has waited for its client longest. */
  #crowdOut(key?: string, transport?: Peer['transport']): boolean {
    const peers = key === undefined ? [...this.#handshakes.values()] : [this.#handshakes.get(key) ?? new Set<Place>()];
    peers.sort((a, b) => b.size - a.size);
    for (const ofPeer of peers) {
      for (const place of ofPeer) {
        if (transport !== undefined && place.transport !== transport) break;
        if (place.occupant?.isWaitedFor !== true) continue;
        this.#expel(
          place,
          `no export chosen yet: made room for another connection (${ofPeer.size} of this peer waited)`,
        );
        return true;
      }
    }
    return false;
  }

  #expel(place: Place, reason: string): void {
    // First, so that its room is free at once.
    this.left(place);
    place.occupant?.crowdOut(reason);
  }

  #addHandshake(place: Place): void {
    const ofPeer = this.#handshakes.get(place.key);
    if (ofPeer) ofPeer.add(place);
    else this.#handshakes.set(place.key, new Set([place]));
    this.#handshakeCount++;
  }

  #removeHandshake(place: Place): void {
    const ofPeer = this.#handshakes.get(place.key);
    if (!ofPeer?.delete(place)) return;
    this.#handshakeCount--;
    if (ofPeer.size === 0) this.#handshakes.delete(place.key);
  }
}
