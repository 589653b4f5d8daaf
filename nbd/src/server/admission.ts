/**
 * Who is let in: how many connections there may be, in all, of one peer, over TCP and in the handshake, and who makes room
 * when there is none. Owns the counts. Those that ask nothing of anybody yet give way to those that come: a connection that
 * is leaving, or has chosen no export and is waited for. One with an export is never cut off for another.
 */

import type { Peer } from '../block-device.js';
import { DEFAULT_SHARE_OF_ONE_PEER, type Limits } from './limits.js';

/** With a unix socket beside TCP, one connection in so many is kept for those that come from this machine. */
export const UNIX_ROOM_DIVISOR = 8;

/** Connections of one peer, those that are leaving among them, for each that it may have. */
const LEAVING_FACTOR = 2;

/** What a place is taken by. */
export interface Occupant {
  /** Whether the next step is the client's: of its handshake, or of its leaving. False: it has an export, or we work for it. */
  readonly isWaitedFor: boolean;
  /** Close its socket now; called at most once. */
  crowdOut(reason: string): void;
}

/** One connection's place. It is in the handshake first. */
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

  /** The client has gone a step further in the handshake: it is not the next to make room. */
  advanced(): void {
    this.#admission.advanced(this);
  }

  /** It has chosen an export. */
  settled(): void {
    this.#admission.settled(this);
  }

  /** The client has said goodbye, or the server is done with it. It counts for its peer no more, within bounds. */
  leaving(): void {
    this.#admission.leaving(this);
  }

  /** The socket is gone. May be called again. */
  left(): void {
    this.#admission.left(this);
  }
}

/** Of one peer: its connections, and those of them that are not leaving. */
interface PeerCounts {
  open: number;
  staying: number;
}

/** In the order in which they will make room. */
type Waiting = Map<string, Set<Place>>;

export class Admission {
  /** Whether some of the places are kept for unix sockets. */
  keepsRoomForUnix = false;
  readonly #places = new Set<Place>();
  #tcpCount = 0;
  readonly #countsOf = new Map<string, PeerCounts>();
  /** In the handshake, by peer; who has been quiet for longest comes first. */
  readonly #handshakes: Waiting = new Map();
  #handshakeCount = 0;
  readonly #departures = new Set<Place>();

  readonly #limits: Limits;

  constructor(limits: Limits) {
    this.#limits = limits;
  }

  /** A place for a connection of the peer `key`, or in words why there is none. Others may be made to leave for it. */
  enter(key: string, transport: Peer['transport']): Place | string {
    const { maxConnections, maxConnectionsPerPeer, maxHandshakes } = this.#limits;
    const tcpRoom = this.#tcpRoom();
    const counts = this.#countsOf.get(key);
    if (counts && counts.staying >= maxConnectionsPerPeer && !this.#crowdOut(key)) {
      return `${maxConnectionsPerPeer} connections of this peer are open, as many as allowed`;
    }
    // Who has left may come again at once, though it is still being answered; but not leave one behind each time.
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
    // Those that we work for are let be: it is not the clients that take long.
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
    // Behind the others.
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

  /** Those that are leaving among them. Twice as many as it may have, but not the room of others: some leave slowly. */
  #mostOpenOfOnePeer(): number {
    const { maxConnections, maxConnectionsPerPeer } = this.#limits;
    const share = Math.ceil(maxConnections * DEFAULT_SHARE_OF_ONE_PEER);
    return Math.max(maxConnectionsPerPeer, Math.min(LEAVING_FACTOR * maxConnectionsPerPeer, share));
  }

  #tcpRoom(): number {
    const { maxConnections } = this.#limits;
    return this.keepsRoomForUnix ? maxConnections - Math.floor(maxConnections / UNIX_ROOM_DIVISOR) : maxConnections;
  }

  /** One that is leaving, or else one in the handshake, is made to go: over one transport, if given. */
  #makeRoom(transport?: Peer['transport']): boolean {
    return this.#expelDeparture(undefined, transport) || this.#crowdOut(undefined, transport);
  }

  #expelDeparture(key?: string, transport?: Peer['transport']): boolean {
    for (const place of this.#departures) {
      if (key !== undefined && place.key !== key) continue;
      if (transport !== undefined && place.transport !== transport) continue;
      // Its last requests are still carried out.
      if (place.occupant?.isWaitedFor !== true) continue;
      this.#expel(place, 'made room for another connection');
      return true;
    }
    return false;
  }

  /** Of the peer that has most of them in the handshake, the one that has been quiet for longest and is waited for. */
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
    // First: its room is there at once.
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
